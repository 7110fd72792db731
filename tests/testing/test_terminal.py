"""A report on the terminal: wide and narrow, in colour and piped."""

from __future__ import annotations

import dataclasses
import io
import sys

import pytest
import torch

from torchbatch.testing.precision import precision_policy
from torchbatch.testing.report import Check, Report
from torchbatch.testing.terminal import print_report

from . import reports


class Terminal(io.StringIO):
    """A file that says it is a terminal."""

    def isatty(self):
        return True


def printed(report, width=None, file=None):
    file = io.StringIO() if file is None else file
    print_report(report, file, width)
    return file.getvalue()


def rows(text):
    return [line.split() for line in text.splitlines()]


def test_all_passed():
    text = printed(reports.good())
    assert text.startswith("check_vmap(f): 3 checks passed, 1 skipped\n  query: float32[8, 40, 120], mapped over axis 0\n\n")
    assert ["run", "against", "what", "on", "outcome", "largest", "difference"] in rows(text)
    assert ["eager", "loop", "values", "batch", "of", "1", "✓", "ok", "equal"] in rows(text)
    assert ["compile", "loop", "values", "as", "given", "–", "skipped", "no", "compiler"] in rows(text)
    assert "✗" not in text and "reproduce" not in text


def test_what_failed():
    text = printed(reports.bad())
    for line in (
        "✗ jit, values, as given (nonfinite), against loop:\n  output['loss']: 1 of 8 differ, most at [2]: nan instead of",
        "  also output['scores']: 31 of 38400 differ, most at [3, 7, 89]:",
        "       the float64 reference says that jit is off\n",
        "✗ chunked, values, as given (shape), against loop:\n  output['scores']: shape (8, 120, 40) instead of (8, 40, 120)\n",
        "  AxisError: <script>alert('&')</script>\n  second line\n",
        "\ntolerance: chosen & noted\n",
        "\nTo reproduce it in plain PyTorch:\n\nimport torch\nassert 1 < 2\n",
    ):
        assert line in text, line


def test_settings_are_a_hint_where_something_failed():
    with torch.autocast("cpu", torch.bfloat16):
        policy = precision_policy(["torch"])
    hint = "note: PyTorch casts to lower precision on its own: autocast is on (cpu: bfloat16)."
    assert hint in printed(dataclasses.replace(reports.bad(), precision=policy))
    assert hint not in printed(dataclasses.replace(reports.good(), precision=policy))


def test_nothing_is_markup():
    check = Check("[red]a", "[/]", "values", "in_axes=[0]", "failed", "error", "[b]\n[bold]x[/bold]")
    text = printed(Report("check_vmap([f])", (check,)))
    for words in ("check_vmap([f])", "[red]a", "[/]", "in_axes=[0]", "[b]", "  [bold]x[/bold]"):
        assert words in text


@pytest.mark.parametrize("width", [36, 40, 71])
def test_narrow(width):
    text = printed(reports.good(), width)
    table = text.split("\n\n")[1].splitlines()
    assert max(map(len, table)) <= width
    assert table[0].split() == ["check", "outcome", "difference"]
    assert ["axes", "moved:"] in [line.split()[:2] for line in table]


def test_no_color_when_piped():
    assert "\x1b" not in printed(reports.bad())


def test_color_on_a_terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    text = printed(reports.bad(), 120, Terminal())
    assert "\x1b[32m✓ ok" in text and "\x1b[1;31m✗ FAILED" in text
    monkeypatch.setenv("NO_COLOR", "1")
    assert "[32m" not in printed(reports.bad(), 120, Terminal())


def test_a_terminal_that_knows_ascii_only():
    file = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    print_report(reports.bad(), file)
    file.flush()
    text = file.buffer.getvalue().decode()
    assert ["eager", "|loop", "|values", "|batch", "of", "1", "|ok", "|equal"] in rows(text)
    assert "FAILED jit, values, as given (nonfinite)" in text


def test_an_empty_report():
    assert printed(Report("nothing")) == "nothing: nothing checked\n\n"


def test_without_rich(monkeypatch):
    monkeypatch.setitem(sys.modules, "rich", None)
    with pytest.raises(ImportError, match=r"print_report needs rich, .*: pip install 'torchbatch\[testing\]'"):
        print_report(Report("f"))


def test_a_program_of_pages_is_left_out():
    file = io.StringIO()
    print_report(dataclasses.replace(Report("f"), reproducer="x = 1\n" * 3000), file)
    assert "The program has 3000 lines with the numbers in it." in file.getvalue() and "x = 1" not in file.getvalue()
