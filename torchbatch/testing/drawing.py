"""The pictures of a report's page, as SVG inside of it: axes as stacked sheets, errors as a heat map.

They take their colours from the page (:mod:`torchbatch.testing.html`) by class, so that they follow its light or dark theme.
"""

from __future__ import annotations

import html
import math
import re
import sys
from collections.abc import Iterator, Sequence

import numpy as np

from torchbatch.testing.compare import LeafDifference
from torchbatch.testing.report import Argument

#: Upper ends of the shades of a heat map, in tolerances, and what the legend says of each.
SHADES: tuple[tuple[float, str], ...] = (
    (0.0, "equal"),
    (0.01, "≤ 1/100"),
    (0.1, "≤ 1/10"),
    (1.0, "≤ 1"),
    (10.0, "≤ 10"),
    (100.0, "≤ 100"),
    (1e4, "≤ 10⁴"),
    (sys.float_info.max, "> 10⁴"),
    (math.inf, "not finite"),
)
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
_SHEETS = 4  # how many samples a picture shows
_STEP = 7  # how far one sheet is from the next


def text(value: object) -> str:
    """Any value as text that cannot be taken for HTML, and that can be written as UTF-8."""
    plain = str(value).encode("utf-8", "backslashreplace").decode("utf-8")
    return html.escape(_UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", plain))


# --- axes ------------------------------------------------------------------------------------------------------------


def axes(argument: Argument) -> str:
    """An array: one sheet for each sample, with the sizes of a sample at its edges, and below it the shape, axis by axis."""
    return f'<div class="picture">{_sheets(argument)}{_chips(argument)}</div>'


def _sheets(argument: Argument) -> str:
    batch = None if argument.axis is None else argument.shape[argument.axis]
    sample = [size for place, size in enumerate(argument.shape) if place != argument.axis]
    width, height = _extent(sample)
    count = 1 if batch is None else min(max(batch, 1), _SHEETS)
    back = _STEP * (count - 1)
    left, top = 10 + (8 * len(str(sample[-2])) if len(sample) > 1 else 0), 4
    parts = list(_rectangles(left, top, width, height, count, batch))
    parts += _edge_labels(left, top + back, width, height, sample)
    if batch is not None:
        parts.append(f'<text class="batch-label" x="{left + back + width + 7}" y="{top + height / 2 + 2:g}">× {batch}</text>')
    label = f"{argument.name}: " + ("not mapped" if batch is None else f"{batch} samples")
    full = (left + back + width + 26 + 9 * len(str(batch)), top + back + height + 20)
    return (
        f'<svg class="sheets" width="{full[0]}" height="{full[1]}" viewBox="0 0 {full[0]} {full[1]}" role="img">'
        f"<title>{text(label)}</title>{''.join(parts)}</svg>"
    )


def _extent(sample: Sequence[int]) -> tuple[int, int]:
    """Width and height of a sheet: a square for a number, a row for a vector, an area for anything more."""
    if not sample:
        return 26, 26
    across = _length(sample[-1])
    return (across, 22) if len(sample) == 1 else (across, round(_length(sample[-2]) * 0.72))


def _length(size: int) -> int:
    return round(34 + 22 * min(math.log2(max(size, 1)), 4.5) / 1.5)


def _rectangles(left: int, top: int, width: int, height: int, count: int, batch: int | None) -> Iterator[str]:
    kind = "shared" if batch is None else "none" if batch == 0 else "sample"
    for place in range(count):
        x, y = left + _STEP * (count - 1 - place), top + _STEP * place
        yield f'<rect class="{kind}" x="{x}" y="{y}" width="{width}" height="{height}" rx="3"/>'


def _edge_labels(left: int, top: int, width: int, height: int, sample: Sequence[int]) -> Iterator[str]:
    """The sizes of a sample: the last axis below, the one before it to the left, all others inside."""
    middle = left + width / 2
    if not sample:
        yield f'<text class="inside" x="{middle:g}" y="{top + height / 2 + 4:g}">1</text>'
        return
    yield f'<text x="{middle:g}" y="{top + height + 14}">{sample[-1]}</text>'
    if len(sample) > 1:
        yield f'<text class="end" x="{left - 6}" y="{top + height / 2 + 4:g}">{sample[-2]}</text>'
    if len(sample) > 2:
        more = " × ".join(str(size) for size in sample[:-2])
        yield f'<text class="inside" x="{middle:g}" y="{top + height / 2 + 4:g}">{more} ×</text>'


def _chips(argument: Argument) -> str:
    """The shape, one box for each axis, the batch axis marked."""
    if not argument.shape:
        return '<span class="chips"><span class="chip plain">no axes</span></span>'
    chips = []
    for place, size in enumerate(argument.shape):
        mapped = place == argument.axis
        note = f"axis {place}, batch" if mapped else f"axis {place}"
        chips.append(f'<span class="chip{" batch" if mapped else ""}"><b>{size}</b><small>{note}</small></span>')
    return f'<span class="chips">{"".join(chips)}</span>'


# --- errors ----------------------------------------------------------------------------------------------------------


def heat_map(leaf: LeafDifference) -> str:
    """The errors of a leaf in tolerances: the last axis across, all others down, and a ring around the worst place.

    Of a single number there is no picture.
    """
    if leaf.heat is None or leaf.heat.size < 2:
        return ""
    rows, columns = leaf.heat.shape
    cell = max(6, min(28, 560 // max(columns, 1), 260 // max(rows, 1)))
    width, height = columns * cell, rows * cell
    parts = [f'<path class="h{shade}" d="{"".join(runs)}"/>' for shade, runs in _runs(shades(leaf.heat), cell) if runs]
    parts.append(_ring(*worst_cell(leaf), cell))
    label = f"errors of {leaf.where}, {rows} by {columns} cells"
    return (
        f'<svg class="heat" width="{width + 8}" height="{height + 8}" viewBox="-4 -4 {width + 8} {height + 8}" role="img">'
        f"<title>{text(label)}</title>{''.join(parts)}</svg>"
    )


def shades(heat: np.ndarray) -> np.ndarray:
    """The place in :data:`SHADES` of every error."""
    ends = np.array([end for end, _ in SHADES])
    return np.asarray(np.searchsorted(ends, np.nan_to_num(heat, nan=np.inf, posinf=np.inf), side="left"))


def worst_cell(leaf: LeafDifference) -> tuple[int, int]:
    """Row and column of the heat map in which the worst place lies."""
    if leaf.heat is None or leaf.worst is None or len(leaf.shape) != len(leaf.worst.index):
        return 0, 0
    across = leaf.shape[-1] if leaf.shape else 1
    flat = int(np.ravel_multi_index(leaf.worst.index, leaf.shape)) if leaf.shape else 0
    rows = int(np.prod(leaf.shape[:-1]))
    return _folded(flat // across, rows, leaf.heat.shape[0]), _folded(flat % across, across, leaf.heat.shape[1])


def _folded(place: int, size: int, cells: int) -> int:
    """The cell of a place, where ``size`` places are folded into fewer cells, as :mod:`torchbatch.testing.compare` does."""
    starts = np.linspace(0, size, cells, endpoint=False).astype(int)
    return int(np.searchsorted(starts, place, side="right")) - 1


def _runs(picture: np.ndarray, cell: int) -> Iterator[tuple[int, list[str]]]:
    """For each shade, the outlines of its cells; neighbours in a row are one outline, so that pages stay small."""
    for shade in range(len(SHADES)):
        runs = []
        for y, row in enumerate(picture == shade):
            edges = np.flatnonzero(np.diff(np.concatenate([[0], row.astype(np.int8), [0]])))
            for start, stop in zip(edges[::2], edges[1::2], strict=True):
                runs.append(f"M{start * cell} {y * cell}h{(stop - start) * cell}v{cell}h{-(stop - start) * cell}z")
        yield shade, runs


def _ring(row: int, column: int, cell: int) -> str:
    x, y, radius = (column + 0.5) * cell, (row + 0.5) * cell, max(cell * 0.42, 5)
    rings = [f'<circle class="{kind}" cx="{x:g}" cy="{y:g}" r="{radius:g}"/>' for kind in ("ring-under", "ring")]
    return "".join(rings)


def legend() -> str:
    """What the shades of a heat map mean."""
    entries = [f'<span><i class="h{shade}"></i>{text(label)}</span>' for shade, (_, label) in enumerate(SHADES)]
    return f'<p class="legend">error in tolerances: {"".join(entries)}<span><i class="ring-mark"></i>worst</span></p>'


def blame_bar(name: str, off: float) -> str:
    """How far a run is off the reference, in tolerances, on a logarithmic scale with a mark at 1."""
    share = 100.0 if not math.isfinite(off) else 100 * (math.log10(min(max(off, 1e-4), 1e6)) + 4) / 10
    kind = "within" if off <= 1 else "beyond"
    amount = f"{off:.3g} × the tolerance" if math.isfinite(off) else "not finite where the reference is, or the reverse"
    return (
        f'<div class="blame"><span class="who">{text(name)}</span><span class="bar"><i class="{kind}" style="width:{share:.1f}%">'
        f'</i><i class="one"></i></span><span class="amount">{"✓" if off <= 1 else "✕"} {amount}</span></div>'
    )
