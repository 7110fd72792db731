"""The demo as a whole: it trains well, prints, draws, and refuses what it cannot do before it begins."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from torchbatch import demo
from torchbatch.demo import main


@pytest.fixture
def printed(capsys, monkeypatch, tmp_path):
    """What the demo prints in six epochs, and the picture that it writes."""
    monkeypatch.setattr(main, "REPETITIONS", 1)
    path = tmp_path / "picture.png"
    demo.run(demo.Options(seed=1, epochs=6, output=path))
    return capsys.readouterr(), path


def test_from_beginning_to_end(printed):
    (out, err), path = printed
    assert float(re.search(r"Test accuracy ([\d.]+)%", out)[1]) > 95
    assert float(re.search(r"\(([\d.e-]+) of the largest", out)[1]) < 1e-5
    order = ["torchbatch 0.", "Test accuracy", "by class", "10 hardest", "Picture written", "times faster"]
    places = [out.index(part) for part in order]
    assert places == sorted(places)
    assert "epoch  6 of 6" in err
    assert path.read_bytes().startswith(b"\x89PNG")
    assert "\x1b" not in out + err


@pytest.mark.parametrize(
    ("missing", "text"),
    [
        (["rich"], "the demo needs rich, not installed here; install with: python -m pip install rich"),
        (
            ["matplotlib", "rich"],
            "the demo needs matplotlib and rich, not installed here; "
            "install with: python -m pip install matplotlib rich",
        ),
    ],
)
def test_a_missing_package(missing, text):
    with pytest.raises(demo.DemoError) as error:
        main.check_packages(lambda name: None if name in missing else name)
    assert str(error.value) == text


def test_one_thread_and_as_many_as_before_afterwards(monkeypatch, tmp_path):
    threads = []
    monkeypatch.setattr(main, "show", lambda options, device: threads.append(main.torch.get_num_threads()))
    before = main.torch.get_num_threads()
    main.torch.set_num_threads(2)
    try:
        demo.run(demo.Options(output=tmp_path / "picture.png"))
        assert (threads, main.torch.get_num_threads()) == ([1], 2)
    finally:
        main.torch.set_num_threads(before)


def test_a_cuda_device_that_is_there(monkeypatch):
    monkeypatch.setattr(main.torch.cuda, "is_available", lambda: True)
    assert main.check_device("cuda").type == "cuda"
    assert main.check_device("cpu").type == "cpu"


def test_a_cuda_device_that_is_not_there(monkeypatch):
    monkeypatch.setattr(main.torch.cuda, "is_available", lambda: False)
    with pytest.raises(demo.DemoError, match=r"--device cuda: .* finds no CUDA device .*; use --device cpu"):
        main.check_device("cuda")


def test_pictures_that_cannot_be_written(tmp_path):
    refusals = {
        "picture": "expected a file name that ends in .png, .pdf, .svg; for example --output digits.png",
        "picture.txt": "expected a file name that ends in .png, .pdf, .svg",
        "nowhere/picture.png": f"there is no directory {tmp_path / 'nowhere'}; make it first or choose another place",
        "folder.png": "this is a directory; expected the name of a file to write",
    }
    (tmp_path / "folder.png").mkdir()
    for name, text in refusals.items():
        with pytest.raises(demo.DemoError) as error:
            main.check_output(tmp_path / name)
        assert str(error.value).startswith(f"--output {tmp_path / name}: {text}")


def test_a_picture_that_can_be_written(tmp_path):
    main.check_output(tmp_path / "picture.SVG")
    main.check_output(Path("picture.png"))


def test_nothing_starts_when_something_is_refused(capsys, tmp_path):
    with pytest.raises(demo.DemoError):
        demo.run(demo.Options(output=tmp_path / "picture.txt"))
    assert capsys.readouterr().out == ""
