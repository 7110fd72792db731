"""The command line: what it prints, what it refuses, and with which exit status."""

from __future__ import annotations

import runpy
import subprocess
import sys

import pytest
import torch

import torchbatch as tb
from torchbatch import cli, demo


@pytest.fixture
def started(monkeypatch):
    """The options of every demo that the command line started."""
    calls = []
    monkeypatch.setattr(demo, "run", calls.append)
    return calls


def refused(capsys, *arguments):
    """What a command line that argparse refuses prints."""
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"torchbatch {tb.__version__}\n"


def test_help_names_the_command(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--help"])
    assert stop.value.code == 0
    assert "demo" in capsys.readouterr().out


def test_help_of_the_demo_names_every_option_and_its_default(capsys):
    with pytest.raises(SystemExit):
        cli.main(["demo", "--help"])
    text = capsys.readouterr().out
    assert "Train a small CNN with per-example clipped gradients" in text
    for part in ("--device {cpu,cuda}", "--seed N", "--epochs N", "--output FILE", "torchbatch-demo.png", "(20)"):
        assert part in text


def test_defaults(started):
    assert cli.main(["demo"]) == 0
    assert started == [demo.Options()]


def test_options_reach_the_demo(started, tmp_path):
    output = tmp_path / "a.png"
    line = ["demo", "--device", "cuda", "--seed", "3", "--epochs", "7", "--output", str(output)]
    assert cli.main(line) == 0
    assert started == [demo.Options("cuda", 3, 7, output)]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["dmeo"], "invalid choice: 'dmeo'"),
        (["demo", "--speed", "9"], "unrecognized arguments: --speed 9"),
        (["demo", "--dev", "cpu"], "unrecognized arguments: --dev cpu"),
        (["demo", "more"], "unrecognized arguments: more"),
        (["demo", "--device", "tpu"], "argument --device: invalid choice: 'tpu'"),
        (["demo", "--epochs", "0"], "argument --epochs: expected a whole number from 1 up, got '0'"),
        (["demo", "--epochs", "two"], "argument --epochs: expected a whole number from 1 up, got 'two'"),
        (["demo", "--seed", "-1"], "argument --seed: expected a whole number from 0 up, got '-1'"),
        (["demo", "--seed", "1.5"], "argument --seed: expected a whole number from 0 up, got '1.5'"),
        (["demo", "--seed", str(2**64)], f"argument --seed: expected a whole number up to {2**64 - 1}"),
    ],
)
def test_what_it_refuses(capsys, started, arguments, text):
    assert text in refused(capsys, *arguments)
    assert started == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_no_cuda_device(capsys, tmp_path):
    assert cli.main(["demo", "--device", "cuda", "--output", str(tmp_path / "a.png")]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("torchbatch demo: error: --device cuda: PyTorch ")
    assert "finds no CUDA device on this machine; use --device cpu" in printed.err


def test_an_interrupt_is_no_traceback(monkeypatch, capsys):
    def interrupted(options):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "run", interrupted)
    assert cli.main(["demo"]) == 130
    assert capsys.readouterr().err == "stopped\n"


def test_as_a_module(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["torchbatch", "--version"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("torchbatch", run_name="__main__")
    assert stop.value.code == 0
    assert tb.__version__ in capsys.readouterr().out


def test_importing_the_main_module_does_nothing():
    assert "main" in runpy.run_module("torchbatch.__main__", run_name="elsewhere")


def test_from_a_shell():
    done = subprocess.run([sys.executable, "-m", "torchbatch", "demo", "--bogus"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "unrecognized arguments: --bogus" in done.stderr
    assert "Traceback" not in done.stderr
