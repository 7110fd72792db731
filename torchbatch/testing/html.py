"""A report as one page of HTML: nothing is fetched, nothing is run, and it can be mailed as it is."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torchbatch as tb
from torchbatch.testing import drawing
from torchbatch.testing.compare import LeafDifference
from torchbatch.testing.drawing import text
from torchbatch.testing.report import Argument, Check, Report, extent, summary
from torchbatch.testing.style import STYLE

SIGNS = {"passed": "✓", "failed": "✕", "skipped": "–"}
_OPEN_UP_TO = 40  # a longer list of checks is folded
_FAILURES_OPEN = 4  # what is said about any further failure is folded


def to_html(report: Report) -> str:
    """A report as a page: the outcome, the axes drawn, every check, and for each one that failed the errors as a heat map.

    Args:
        report: what a check returned, or the ``report`` of an :class:`~torchbatch.errors.EquivalenceError`.

    Returns:
        One self-contained HTML document, light or dark as the reader's system is.

    Example:
        >>> from torchbatch.testing import Check, Report, to_html
        >>> page = to_html(Report("check_vmap(f)", (Check("eager", "loop", "values", "as given", "passed"),)))
        >>> "1 check passed" in page
        True
    """
    sections = [_header(report), _axes(report), _glance(report), _failures(report), _warnings(report), _notes(report)]
    sections += [_reproducer(report), _all_checks(report), _precision(report), _footer()]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{text(report.title)}: {text(summary(report))}</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n<main>\n{''.join(sections)}</main>\n</body>\n</html>\n"
    )


def save_html(report: Report, path: str | Path) -> None:
    """Write a report as a page; see :func:`to_html`.

    Args:
        report: what a check returned.
        path: the file to write.

    Example:
        >>> import tempfile, pathlib
        >>> from torchbatch.testing import Report, save_html
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_html(Report("check_vmap(f)"), pathlib.Path(folder) / "report.html")
    """
    Path(path).write_text(to_html(report), encoding="utf-8")


# --- the top ---------------------------------------------------------------------------------------------------------


def _header(report: Report) -> str:
    status = "passed" if report.passed else "failed"
    counts = {name: sum(check.status == name for check in report.checks) for name in SIGNS}
    kinds = {"passed": "good", "failed": "bad", "skipped": "skip"}
    tiles = [f'<div class="tile {kinds[n] if c else ""}"><b>{c}</b><small>{n}</small></div>' for n, c in counts.items()]
    seconds = sum(check.seconds for check in report.checks)
    if seconds:
        tiles.append(f'<div class="tile"><b>{_time(seconds)}</b><small>of running</small></div>')
    return (
        f'<header class="card {status}"><div class="mark" aria-hidden="true">{SIGNS[status]}</div>'
        f'<div class="words"><h1 class="mono">{text(report.title)}</h1><p>{text(summary(report))}</p></div>'
        f'<div class="tiles">{"".join(tiles)}</div></header>\n'
    )


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.0f} ms" if seconds < 1 else f"{seconds:.1f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


def _axes(report: Report) -> str:
    """What goes in and what comes out, drawn; as text where only that is known."""
    if not report.arguments:
        lines = "".join(f"<li><code>{text(line)}</code></li>" for line in report.inputs)
        return f'<h2>Inputs</h2>\n<div class="card"><ul>{lines}</ul></div>\n' if lines else ""
    arrow = '<span class="arrow" aria-hidden="true">↓</span>'
    parts = [_arrays(report.arguments), f'<div class="step">{arrow}<div class="function mono">{text(report.title)}</div></div>']
    heading = "What goes in, what comes out" if report.outputs else "What goes in"
    parts += [_arrays(report.outputs)] if report.outputs else []
    return f'<h2>{heading}</h2>\n<div class="card flow">{"".join(parts)}</div>\n'


def _arrays(arguments: Sequence[Argument]) -> str:
    mapped = any(argument.axis is not None for argument in arguments)
    return f'<div class="arrays">{"".join(_array(argument, mapped) for argument in arguments)}</div>'


def _array(argument: Argument, mapped: bool) -> str:
    """One array; where others are mapped, it is said of one that is not."""
    shared = ", shared by all samples" if mapped and argument.axis is None else ""
    return (
        f'<div class="array"><code>{text(argument.name)}</code><span class="dtype">{text(argument.dtype)}{shared}</span>'
        f"{drawing.axes(argument)}</div>"
    )


# --- checks ----------------------------------------------------------------------------------------------------------


def _glance(report: Report) -> str:
    """One row for what was compared on which inputs, one column for each run."""
    columns = list(dict.fromkeys((check.run, check.against) for check in report.checks))
    if not columns:
        return ""
    heads = [f'<th scope="col">{text(run)}<small>against {text(against)}</small></th>' for run, against in columns]
    rows = []
    for variant, group in itertools.groupby(_by_variant(report.checks), key=lambda check: check.variant):
        rows.append(f'<tr class="group"><th scope="rowgroup" colspan="{len(columns) + 1}">{text(variant)}</th></tr>')
        rows += _glance_rows(list(group), columns, report.failures)
    return (
        '<h2>At a glance</h2>\n<div class="card scroll"><table class="glance"><thead><tr><th scope="col">on, what</th>'
        f"{''.join(heads)}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>\n"
    )


def _by_variant(checks: Sequence[Check]) -> list[Check]:
    order = {variant: place for place, variant in enumerate(dict.fromkeys(check.variant for check in checks))}
    return sorted(checks, key=lambda check: order[check.variant])


def _glance_rows(checks: Sequence[Check], columns: Sequence[tuple[str, str]], failures: Sequence[Check]) -> Iterator[str]:
    for what in dict.fromkeys(check.what for check in checks):
        cells = []
        for column in columns:
            here = [check for check in checks if check.what == what and (check.run, check.against) == column]
            cells.append(f"<td>{' '.join(_mark(check, failures) for check in here)}</td>")
        yield f'<tr><th scope="row">{text(what)}</th>{"".join(cells)}</tr>'


def _mark(check: Check, failures: Sequence[Check], words: str | None = None) -> str:
    """The sign of a check; that of a failed one leads to what is said about it."""
    if words is None:
        found = {"failed": str(check.problem), "skipped": "skipped"}.get(check.status) or extent(check) or check.status
        words = found.partition(", ")[0]
    shown = f"{SIGNS[check.status]} {text(_short(words))}"
    if check.status != "failed":
        title = f' title="{text(check.message)}"' if check.message else ""
        return f'<span class="{check.status}-mark"{title}>{shown}</span>'
    place = next(number for number, failure in enumerate(failures) if failure is check)
    return f'<a class="failed-mark" href="#failure-{place}">{shown}</a>'


def _short(words: str, most: int = 40) -> str:
    return words if len(words) <= most else words[: most - 1] + "…"


def _all_checks(report: Report) -> str:
    if not report.checks:
        return ""
    heads = "".join(f'<th scope="col">{name}</th>' for name in _COLUMNS)
    rows = "".join(_check_row(check, report.failures) for check in report.checks)
    opened = " open" if len(report.checks) <= _OPEN_UP_TO else ""
    return (
        f'<h2>All checks</h2>\n<details class="card"{opened}><summary>{len(report.checks)} lines</summary><div class="scroll">'
        f'<table class="checks"><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div></details>\n'
    )


_COLUMNS = ("outcome", "run", "against", "what", "on", "largest difference", "leaves", "time")


def _check_row(check: Check, failures: Sequence[Check]) -> str:
    cells = [check.run, check.against, check.what, check.variant, extent(check)]
    numbers = [str(len(check.leaves) or ""), _time(check.seconds) if check.seconds else ""]
    return (
        f'<tr class="{check.status}-row"><td>{_mark(check, failures, check.status)}</td>'
        + "".join(f"<td>{text(cell)}</td>" for cell in cells)
        + "".join(f'<td class="number">{number}</td>' for number in numbers)
        + "</tr>"
    )


# --- what failed -----------------------------------------------------------------------------------------------------


def _failures(report: Report) -> str:
    if not report.failures:
        return ""
    found = "".join(_failure(check, place) for place, check in enumerate(report.failures))
    return f"<h2>What differs</h2>\n{found}"


def _failure(check: Check, place: int) -> str:
    wrong = [leaf for leaf in check.leaves if not leaf.passed]
    right = len(check.leaves) - len(wrong)
    rest = f'<p class="quiet">{right} other {"leaf is" if right == 1 else "leaves are"} the same.</p>' if right else ""
    opened = " open" if place < _FAILURES_OPEN else ""
    kind = f'<span class="kind">{text(check.problem or "failed")}</span>'
    return (
        f'<details class="card failure"{opened}><summary>✕ {text(check.name)}: {kind}</summary>'
        f'<div class="target" id="failure-{place}"><p class="quiet">{text(check.run)} held against '
        f"{text(check.against)}</p><pre>{text(check.message)}</pre>{''.join(_leaf(leaf, check) for leaf in wrong)}{rest}"
        "</div></details>\n"
    )


def _leaf(leaf: LeafDifference, check: Check) -> str:
    """The numbers of one leaf, who is off, and its errors as a picture."""
    message = "" if check.message.startswith(f"{leaf.where}: ") else f"<p>{text(leaf.message)}</p>"
    facts = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in _facts(leaf, check))
    picture = drawing.heat_map(leaf)
    if picture:
        picture = f'{drawing.legend()}{picture}<p class="quiet">{text(_scale(leaf))}</p>'
    return (
        f'<div class="leaf"><h3><code>{text(leaf.where)}</code></h3>{message}<dl class="facts">{facts}</dl>'
        f"{_blame(leaf, check)}{picture}</div>"
    )


def _facts(leaf: LeafDifference, check: Check) -> Iterable[tuple[str, str]]:
    yield text(check.run), f"<code>{text(leaf.got)}</code>"
    yield text(check.against), f"<code>{text(leaf.expected)}</code>"
    if leaf.worst is None:
        return
    yield "numbers that differ", f"{leaf.differing} of {leaf.size}"
    yield "largest absolute difference", f"{leaf.max_abs:.4g}"
    yield "largest relative difference", f"{leaf.max_rel:.4g}"
    if leaf.max_ulp is not None:
        yield "largest difference in last places", f"{leaf.max_ulp:.4g} ulp"
    yield "allowed", text(leaf.tolerance)
    if leaf.nonfinite:
        yield "not finite", text(leaf.nonfinite)
    worst = leaf.worst
    yield "worst at", f"<code>{text(list(worst.index))}</code>"
    yield f"{text(check.run)} there", f"<code>{text(worst.got)}</code>"
    yield f"{text(check.against)} there", f"<code>{text(worst.expected)}</code>"
    if worst.reference is not None:
        yield f"{text(check.reference)} there", f"<code>{text(worst.reference)}</code>"


def _blame(leaf: LeafDifference, check: Check) -> str:
    """How far each run is off the reference."""
    if leaf.got_off is None or leaf.expected_off is None:
        return ""
    blamed = leaf.blamed(check.run, check.against)
    sentence = {"": "neither is off", "both": "both are off"}.get(blamed, f"{blamed} is off")
    bars = drawing.blame_bar(check.run, leaf.got_off) + drawing.blame_bar(check.against, leaf.expected_off)
    return f'<p>By the {text(check.reference)}, <b>{text(sentence)}</b>:</p><div class="blames">{bars}</div>'


def _scale(leaf: LeafDifference) -> str:
    """How to read the picture of a leaf."""
    if leaf.heat is None:
        return ""
    rows, columns = leaf.heat.shape
    across = leaf.shape[-1] if leaf.shape else 1
    down = 1
    for size in leaf.shape[:-1]:
        down *= size
    folded = "" if (rows, columns) == (down, across) else f", folded into {rows} × {columns} cells that show their largest"
    others = "" if len(leaf.shape) < 2 else ", all others down"
    return f"the last axis across{others}: {down} × {across} numbers{folded}"


# --- the rest --------------------------------------------------------------------------------------------------------


def _warnings(report: Report) -> str:
    """Settings that may be the reason."""
    found = [] if report.precision is None else report.precision.warnings()
    if not found:
        return ""
    items = "".join(f"<li>{text(warning)}</li>" for warning in found)
    return f'<h2>Settings that numbers depend on</h2>\n<div class="card"><ul class="warnings">{items}</ul></div>\n'


def _notes(report: Report) -> str:
    notes = "".join(f"<pre>{text(note)}</pre>" for note in report.notes)
    return f'<h2>Notes</h2>\n<div class="card">{notes}</div>\n' if notes else ""


def _reproducer(report: Report) -> str:
    if not report.reproducer:
        return ""
    code = f"<pre><code>{text(report.reproducer)}</code></pre>"
    return f'<h2>Reproduce it</h2>\n<details class="card"><summary>In plain PyTorch</summary>{code}</details>\n'


def _precision(report: Report) -> str:
    """The settings of each framework, one table each."""
    if report.precision is None:
        return ""
    tables = []
    for framework, settings in report.precision.to_dict().items():
        rows = "".join(f'<tr><th scope="row">{text(n)}</th><td>{_setting(v)}</td></tr>' for n, v in _rows(settings))
        tables.append(f"<div><h3>{text(framework)}</h3><table><tbody>{rows}</tbody></table></div>")
    opened = "" if report.passed else " open"
    return (
        f'<h2>Precision policy</h2>\n<details class="card"{opened}><summary>Versions and settings</summary>'
        f'<div class="settings">{"".join(tables)}</div></details>\n'
    )


def _rows(settings: Any) -> list[tuple[Any, Any]]:
    return list(settings.items()) if isinstance(settings, dict) else [("", settings)]


def _setting(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "–", True: "yes", False: "no"}[value]
    return text(", ".join(map(str, value)) or "–") if isinstance(value, list | tuple) else f"<code>{text(value)}</code>"


def _footer() -> str:
    return f"<footer>torchbatch {text(tb.__version__)}</footer>\n"
