"""A report on the terminal, as a table of rich."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, TextIO

from torchbatch.testing.optional import require
from torchbatch.testing.report import Check, Report, extent, program, summary

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

SIGNS = {"passed": ("✓", "ok", "green"), "failed": ("✗", "FAILED", "bold red"), "skipped": ("–", "skipped", "yellow")}
_PLACE = ("run", "against", "what", "variant")
_NARROW = 72  # columns below which a line of the table takes two lines
_PIPED = 120  # the width of what goes to a file or another program


def print_report(report: Report, file: TextIO | None = None, width: int | None = None) -> None:
    """Print a report: a table of its checks, and under it what is wrong, setting by setting, number by number.

    Colours are for terminals only; what is piped is plain text. Where the terminal is narrow, the columns that say which check it
    is are put under each other.

    Args:
        report: what a check returned.
        file: where to print it; standard output by default.
        width: the number of columns; by default that of the terminal, and 120 where there is none.

    Raises:
        ImportError: rich is not installed.

    Example:
        >>> from torchbatch.testing.report import Check, Report
        >>> from torchbatch.testing.terminal import print_report
        >>> print_report(Report("check_vmap(f)", (Check("eager", "loop", "values", "as given", "passed"),)))
        check_vmap(f): 1 check passed
        <BLANKLINE>
        run    against  what    on        outcome  largest difference
        ─────────────────────────────────────────────────────────────
        eager  loop     values  as given  ✓ ok
    """
    require("rich", "print_report", "testing")
    out = _console(file, width)
    _print_opening(report, out)
    if report.checks:
        out.print(_table(report.checks, out.width < _NARROW, _unicode(out)))
    for line in _below(report, _unicode(out)):
        out.print(line, soft_wrap=True)


def _console(file: TextIO | None, width: int | None) -> Console:
    from rich.console import Console

    console = Console(file=file, highlight=False)
    if width is not None or not console.is_terminal:
        console.width = width or _PIPED
    return console


def _print_opening(report: Report, out: Console) -> None:
    from rich.text import Text

    style = "bold green" if report.passed else "bold red"
    out.print(Text.assemble((report.title, "bold"), ": ", (summary(report), style)), soft_wrap=True)
    for line in report.inputs or [str(argument) for argument in report.arguments]:
        out.print(Text(f"  {line}"), soft_wrap=True)
    out.print()


def _unicode(out: Console) -> bool:
    return out.encoding.lower().startswith("utf")


def _table(checks: Sequence[Check], narrow: bool, signs: bool) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    names = ("check", "outcome", "difference") if narrow else ("run", "against", "what", "on", "outcome", "largest difference")
    for name in names:
        table.add_column(name, overflow="fold", no_wrap=name in ("outcome", "run", "against"))
    for check in checks:
        sign, word, style = SIGNS[check.status]
        place = [f"{check.run}, {check.what}\n{check.variant}"] if narrow else [getattr(check, name) for name in _PLACE]
        outcome = Text(f"{sign} {word}" if signs else word, style)
        table.add_row(*(Text(cell) for cell in place), outcome, Text(extent(check)))
    return table


def _below(report: Report, signs: bool) -> Iterator[Text]:
    """What comes under the table, line by line."""
    from rich.text import Text

    for check in report.failures:
        yield Text("")
        start = ("✗ " if signs else "FAILED ", "bold red")
        yield Text.assemble(start, (check.name, "bold"), f" ({check.problem}), against {check.against}:")
        yield from (Text(f"  {line}") for line in _lines(check))
    warnings = report.precision.warnings() if report.precision is not None and not report.passed else []
    if report.notes or warnings:
        yield Text("")
        yield from (Text(note) for note in report.notes)
        yield from (Text.assemble(("note: ", "yellow"), warning) for warning in warnings)
    if report.reproducer:
        yield Text("\nTo reproduce it in plain PyTorch:\n")
        yield Text(program(report))


def _lines(check: Check) -> Iterator[str]:
    """What is wrong with a check, and who is off in each of its leaves."""
    yield from check.message.splitlines()
    for leaf in check.leaves:
        if not leaf.passed and not check.message.startswith(f"{leaf.where}: "):
            yield f"also {leaf.where}: {leaf.message}"
            blamed = leaf.blamed(check.run, check.against)
            yield from [f"     the {check.reference} says that {blamed} is off"] if blamed not in ("", "both") else []
