"""What the demo prints, from findings that are known beforehand."""

from __future__ import annotations

import io
import sys

import pytest
import torch

from torchbatch.demo import data, report
from torchbatch.demo.comparison import Comparison
from torchbatch.demo.model import SmallCNN
from torchbatch.demo.training import Step


@pytest.fixture
def findings():
    """Twelve images; each is taken for what it is, but for the first, and the first ones are the hardest."""
    digits = data.load()[:12]
    probabilities = torch.full((12, 10), 0.01)
    probabilities[torch.arange(12), digits.labels] = 0.91
    probabilities[0] = torch.eye(10)[7]
    return report.Findings(digits, probabilities, torch.arange(12, 0, -1.0))


def lines(capsys):
    return [line.strip() for line in capsys.readouterr().out.splitlines()]


def test_findings(findings):
    assert findings.accuracy == pytest.approx(11 / 12)
    assert findings.right.tolist() == [False] + [True] * 11
    assert findings.hardest(3).tolist() == [0, 1, 2]
    assert findings.easiest(2).tolist() == [11, 10]


def test_the_opening_names_versions_machine_and_sizes(capsys):
    digits = data.load()
    report.print_opening(SmallCNN(), digits[:5], digits[5:8], torch.device("cpu"))
    text = capsys.readouterr().out
    assert f"PyTorch {torch.__version__}" in text
    for part in ("torchbatch 0.", "CPU", "thread", "13,802", "5 handwritten", "3 held out"):
        assert part in text


@pytest.mark.parametrize(("threads", "text"), [(1, "1 thread"), (2, "2 threads")])
def test_machine_on_the_cpu(monkeypatch, threads, text):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert report.machine(torch.device("cpu")).endswith(text)


def test_machine_on_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU number {device.index}")
    assert report.machine(torch.device("cuda", 1)) == "GPU number 1"


def test_the_findings_in_print(capsys, findings):
    report.print_findings(findings)
    printed = lines(capsys)
    assert "Test accuracy 91.7% (11 of 12)" in printed
    assert "0        2      50.0%   2.0e+00    7.000    12.000" in printed
    assert ["1", "0", "0", "7", "0.0%", "12.000"] in [line.split() for line in printed]
    assert ["10", "9", "9", "9", "91.0%", "3.000"] in [line.split() for line in printed]
    assert "0 taken for 7      1, hardly          2, hardly          3, hardly" in printed


def test_a_digit_without_images_has_no_row(capsys, findings):
    few = report.Findings(findings.digits[:2], findings.probabilities[:2], findings.norms[:2])
    report.print_classes(few)
    rows = [line.split() for line in lines(capsys)]
    assert [row[0] for row in rows if len(row) == 6 and row[2].endswith("%")] == ["0", "1"]


def test_drawing():
    image = torch.zeros(1, 8, 8)
    image[0, 0] = torch.tensor([0, 0.25, 0.5, 0.75, 1, 1, 0, 0])
    drawn = report.draw(image, report.SHADES)
    assert drawn == ["  ░░▒▒▓▓████    "] + [" " * 16] * 7
    assert report.draw(image, report.ASCII_SHADES)[0] == "  ..++##@@@@    "


def test_a_file_that_takes_ascii_only_gets_ascii_only(monkeypatch, findings):
    buffer = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(buffer, encoding="ascii"))
    report.print_findings(findings)
    sys.stdout.flush()
    assert b"@@" in buffer.getvalue()


def test_no_control_characters_in_a_file(capsys, findings):
    with report.training_bar(2, 1) as advance, report.waiting("a moment"):
        advance(Step(0, 0.5))
        advance(Step(0, 0.25))
    report.print_findings(findings)
    printed = capsys.readouterr()
    assert "100%" in printed.err and "25% clipped" in printed.err
    assert "a moment" not in printed.err
    assert not [c for c in printed.out + printed.err if not c.isprintable() and c != "\n"]


def test_the_picture_is_named_on_one_line(capsys, tmp_path):
    path = tmp_path / ("long" * 40) / "[red].png"
    report.print_picture(path)
    assert capsys.readouterr().out == f"Picture written to {path}\n"


def test_the_comparison_in_print(capsys):
    report.print_comparison(Comparison(256, 1_000_000, 2e-6, 3e-7, 0.18, 0.012, 5), torch.device("cpu"))
    text = capsys.readouterr().out
    for part in ("over 256 images", "1,000,000 numbers", "2.0e-06", "3.0e-07"):
        assert part in text
    assert "15 times faster: 180 ms for the loop, 12 ms for vmap\n" in text
