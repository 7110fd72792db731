"""Draw the pictures of `vmap_explained.md`: axes going in and out, one colour and one number per sample.

Run `python docs/pictures/draw.py` to write the SVG files next to this script.

A page includes them inline, so that they take the colours of its theme; opened alone they follow the system's.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).parent
CELL = 26
SHARED = 3  # the grey of what every sample gets; without a number
ALONE = 4  # the colour of sample 0 where it is the only one; without a number
FILLS = ("#9ccbff", "#ffcf85", "#97e3bd", "#d3d7de", "#9ccbff")
LINES = ("#2f7fd0", "#cf8412", "#27966a", "#848c99", "#2f7fd0")
STYLE = """
.axes-picture { --ink: var(--color-foreground-primary, #1b1f24); --soft: var(--color-foreground-muted, #5d6673);
  max-width: 100%; height: auto; }
@media (prefers-color-scheme: dark) {
  .axes-picture { --ink: var(--color-foreground-primary, #e8eaed); --soft: var(--color-foreground-muted, #a3abb6); } }
.axes-picture text { fill: var(--ink); font: 14px system-ui, -apple-system, "Segoe UI", "Liberation Sans", sans-serif;
  text-anchor: middle; }
.axes-picture .code { font: 14px ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
.axes-picture .head { font-weight: 600; }
.axes-picture .start { text-anchor: start; }
.axes-picture .soft { fill: var(--soft); }
.axes-picture .in-cell { fill: #1b1f24; font-size: 13px; }
.axes-picture .line { stroke: var(--soft); stroke-width: 1.6; fill: none; }
.axes-picture .tip { fill: var(--soft); }
.axes-picture .box { stroke: var(--ink); stroke-width: 1.6; fill: none; }
"""

Grid = Sequence[Sequence[int]]


class Picture:
    """An SVG file that grows by one shape at a time; coordinates are pixels from the top left corner."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self.size = width, height
        self.title = title
        self.shapes: list[str] = []

    def text(self, x: float, y: float, text: str, kind: str = "") -> None:
        self.shapes.append(f'<text x="{x:g}" y="{y:g}" class="{kind}">{escape(text)}</text>')

    def cells(self, x: float, y: float, grid: Grid, gap: tuple[int, int] = (0, 0)) -> tuple[float, float]:
        """Cells with their sample's number; `gap` sets rows and columns apart. The middle of the grid."""
        down, right = CELL + gap[0], CELL + gap[1]
        for i, row in enumerate(grid):
            for j, sample in enumerate(row):
                self._cell(x + j * right, y + i * down, sample)
        return x + (right * len(grid[0]) - gap[1]) / 2, y + (down * len(grid) - gap[0]) / 2

    def _cell(self, x: float, y: float, sample: int) -> None:
        self.shapes.append(
            f'<rect x="{x:g}" y="{y:g}" width="{CELL}" height="{CELL}" fill="{FILLS[sample]}" '
            f'stroke="{LINES[sample]}" stroke-width="1.4"/>'
        )
        if sample not in (SHARED, ALONE):
            self.text(x + CELL / 2, y + CELL / 2 + 4.5, str(sample), "in-cell")

    def arrow(self, x0: float, y0: float, x1: float, y1: float, both: bool = False) -> None:
        """A straight arrow along one of the two directions, with a tip at its end or at both."""
        self.shapes.append(f'<path class="line" d="M{x0:g} {y0:g} L{x1:g} {y1:g}"/>')
        self._tip(x0, y0, x1, y1)
        if both:
            self._tip(x1, y1, x0, y0)

    def _tip(self, x0: float, y0: float, x1: float, y1: float) -> None:
        length = ((x1 - x0) ** 2 + (y1 - y0) ** 2) ** 0.5
        u, v = (x1 - x0) / length, (y1 - y0) / length
        left, right = (x1 - 7 * u - 4 * v, y1 - 7 * v + 4 * u), (x1 - 7 * u + 4 * v, y1 - 7 * v - 4 * u)
        corners = " ".join(f"{a:g},{b:g}" for a, b in ((x1 + u, y1 + v), left, right))
        self.shapes.append(f'<polygon class="tip" points="{corners}"/>')

    def function(self, x: float, y: float, name: str, width: int = 60) -> None:
        """A rounded box around the name of a function, its middle at (x, y)."""
        self.shapes.append(
            f'<rect class="box" x="{x - width / 2:g}" y="{y - 20:g}" width="{width}" height="40" rx="9"/>'
        )
        self.text(x, y + 5, name, "code head")

    def svg(self) -> str:
        width, height = self.size
        return "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" class="axes-picture" viewBox="0 0 {width} {height}" '
                f'width="{width}" height="{height}" role="img">',
                f"<title>{escape(self.title)}</title>",
                f"<style>{STYLE}</style>",
                *self.shapes,
                "</svg>\n",
            ]
        )


def escape(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def rows(count: int, length: int) -> Grid:
    """A matrix in which each row is a sample."""
    return [[i] * length for i in range(count)]


def columns(count: int, length: int) -> Grid:
    """A matrix in which each column is a sample."""
    return [list(range(count))] * length


def one_sample() -> Picture:
    """Step 1: a function of one sample."""
    p = Picture(560, 170, "A function of one sample: two vectors of length 4 go in, one number comes out.")
    p.text(92, 26, "x", "code head")
    p.cells(40, 36, [[ALONE] * 4])
    p.text(92, 112, "y", "code head")
    p.cells(40, 122, [[ALONE] * 4])
    p.text(185, 54, "[4]", "code soft")
    p.text(185, 140, "[4]", "code soft")
    p.arrow(210, 49, 258, 80)
    p.arrow(210, 135, 258, 104)
    p.function(304, 92, "dot", 80)
    p.arrow(352, 92, 408, 92)
    p.cells(422, 79, [[ALONE]])
    p.text(480, 97, "[]", "code soft")
    p.text(435, 66, "one number")
    return p


def input_axes() -> Picture:
    """Step 2: how `in_axes` takes one sample out of an argument."""
    p = Picture(720, 318, "in_axes=0 takes rows, in_axes=1 takes columns, in_axes=None hands over the whole.")
    for x, head in ((130, "in_axes=0"), (370, "in_axes=1"), (600, "in_axes=None")):
        p.text(x, 24, head, "code head")
    p.cells(78, 58, rows(3, 4), gap=(8, 0))
    p.arrow(58, 58, 58, 152, both=True)
    p.text(36, 102, "axis", "soft")
    p.text(36, 118, "0", "code soft")
    p.cells(323, 58, columns(3, 4), gap=(0, 8))
    p.arrow(323, 46, 417, 46, both=True)
    p.text(450, 50, "axis 1", "soft")
    p.cells(548, 92, [[SHARED] * 4])
    for x, shape in ((130, "[3,4]"), (370, "[4,3]"), (600, "[4]")):
        p.text(x, 184, shape, "code soft")
        p.arrow(x, 196, x, 228)
    p.cells(78, 240, [[1] * 4])
    p.cells(318, 240, [[1] * 4])
    p.cells(548, 240, [[SHARED] * 4])
    p.text(130, 290, "sample 1 sees row 1: [4]")
    p.text(370, 290, "sample 1 sees column 1: [4]")
    p.text(600, 290, "each sample sees all of it: [4]")
    return p


def output_axes() -> Picture:
    """Step 3: where `out_axes` puts the new axis."""
    p = Picture(720, 250, "out_axes=0 makes each result a row, 1 a column; None returns what does not vary once.")
    p.text(92, 24, "what fun returned", "head")
    for i in range(3):
        p.cells(40, 52 + 46 * i, [[i] * 4])
    p.text(92, 222, "3 times [4]", "code soft")
    p.arrow(168, 110, 214, 110)
    p.text(310, 24, "out_axes=0", "code head")
    p.cells(258, 71, rows(3, 4))
    p.arrow(240, 71, 240, 149, both=True)
    p.text(310, 222, "[3,4]", "code soft")
    p.text(460, 24, "out_axes=1", "code head")
    p.cells(421, 58, columns(3, 4))
    p.arrow(421, 46, 499, 46, both=True)
    p.text(460, 222, "[4,3]", "code soft")
    p.text(620, 24, "out_axes=None", "code head")
    p.cells(568, 97, [[SHARED] * 4])
    p.text(620, 222, "[4]", "code soft")
    p.text(620, 78, "for what is not mapped", "soft")
    return p


def nested() -> Picture:
    """Step 4: an inner product, mapped twice, is a matrix product."""
    p = Picture(720, 405, "vv takes two vectors to a number; mapped over rows it is mv; mapped over columns, mm.")
    _stage(p, 0, "vv = torch.dot", "([4], [4]) -> []", ([[ALONE] * 4], [[ALONE]] * 4, [[ALONE]]))
    _stage(p, 140, "mv = vmap(vv, (0, None))", "([3,4], [4]) -> [3]", (rows(3, 4), [[SHARED]] * 4, rows(3, 1)))
    grids = [[SHARED] * 4] * 3, columns(2, 4), columns(2, 3)
    _stage(p, 280, "mm = vmap(mv, (None, 1), 1)", "([3,4], [4,2]) -> [3,2]", grids)
    return p


def _stage(p: Picture, y: float, call: str, shapes: str, grids: tuple[Grid, Grid, Grid]) -> None:
    """One line of the fourth picture: the code, its shapes, and the three grids, centred on one line."""
    p.text(20, y + 62, call, "code head start")
    p.text(20, y + 84, shapes, "code soft start")
    for x, grid in zip((300, 470, 620), grids, strict=True):
        p.cells(x, y + 60 - CELL * len(grid) / 2, grid)
    p.text(436, y + 65, "·", "head")
    p.arrow(546, y + 60, 600, y + 60)


PICTURES = {"one_sample": one_sample, "input_axes": input_axes, "output_axes": output_axes, "nested": nested}


def main() -> None:
    for name, draw in PICTURES.items():
        (HERE / f"{name}.svg").write_text(draw().svg(), encoding="utf-8")


if __name__ == "__main__":
    main()
