"""Draw the pictures of the tutorials from what the code of their pages computes.

Run `PYTHONPATH=. python docs/pictures/tutorials.py` to write the SVG files next to this script. It runs the Python blocks of
`private_training.md` and `hardest_examples.md`, as the tests do, and draws what their variables hold.
"""

from __future__ import annotations

import doctest
from collections.abc import Sequence
from typing import Any

import torch
from draw import FILLS, HERE, LINES, Picture

BLUE, ORANGE = LINES[0], LINES[1]
PIXEL = 7  # the side of a pixel of a digit


def variables(page: str) -> dict[str, Any]:
    """What the code of a page leaves behind."""
    text = (HERE.parent / page).read_text(encoding="utf-8").replace("```", "")
    names: dict[str, Any] = {"__name__": "__main__"}
    torch.manual_seed(0)
    for example in doctest.DocTestParser().get_examples(text):
        exec(compile(example.source, page, "exec"), names)
    return names


class Chart:
    """Lines in a frame, in a picture.

    Args:
        picture: where it is drawn.
        frame: left, top, width and height.
        across, up: the numbers at the two ends of each axis.
    """

    def __init__(
        self, picture: Picture, frame: tuple[int, int, int, int], across: tuple[float, float], up: tuple[float, float]
    ) -> None:
        self._picture, self._frame, self._across, self._up = picture, frame, across, up

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Where a point of the chart is in the picture."""
        left, top, width, height = self._frame
        (low, high), (bottom, ceiling) = self._across, self._up
        return left + width * (x - low) / (high - low), top + height * (ceiling - y) / (ceiling - bottom)

    def marks(self, xs: Sequence[float], ys: Sequence[float], form: str) -> None:
        """Numbers along the axes, with thin lines."""
        (left, _, width, _), bottom = self._frame, self._up[0]
        for y in ys:
            height = self.at(0, y)[1]
            self._picture.shapes.append(f'<path class="line" stroke-opacity=".3" d="M{left} {height:.1f} h{width}"/>')
            self._picture.text(left - 26, height + 5, format(y, form), "soft")
        for x in xs:
            across, height = self.at(x, bottom)
            self._picture.text(across, height + 20, f"{x:g}", "soft")

    def line(self, xs: Sequence[float], ys: Sequence[float], colour: str, dashes: str = "") -> None:
        """A line through points."""
        points = " ".join("{:.1f},{:.1f}".format(*self.at(x, y)) for x, y in zip(xs, ys, strict=True))
        self._picture.shapes.append(
            f'<polyline fill="none" stroke="{colour}" stroke-width="2.2" stroke-dasharray="{dashes}" points="{points}"/>'
        )

    def label(self, x: float, y: float, text: str, kind: str = "start") -> None:
        """A text at a point."""
        self._picture.text(*self.at(x, y), text, kind)


def private_training() -> Picture:
    """Two charts, one above the other: accuracy and ε over the steps."""
    found = variables("private_training.md")
    private, plain, spent = found["private"], found["plain"], [0.0, *found["spent"]]
    marks, last = [0, *found["marks"]], len(private) - 1
    p = Picture(720, 420, f"Over {last} steps the accuracy grows to {private[-1]:.1%}, and ε to {spent[-1]:.2f}.")
    p.text(20, 26, "accuracy on 360 held-out digits", "head start")
    top = Chart(p, (70, 40, 470, 180), (0, last), (0, 1))
    top.marks((), (0, 0.25, 0.5, 0.75, 1), ".0%")
    top.line(range(last + 1), plain, ORANGE, "5 4")
    top.line(range(last + 1), private, BLUE)
    top.label(last + 1, plain[-1] + 0.02, f"without privacy {plain[-1]:.1%}")
    top.label(last + 1, private[-1] - 0.1, f"private {private[-1]:.1%}")
    p.text(20, 262, "ε spent, at δ = 10⁻⁵", "head start")
    below = Chart(p, (70, 276, 470, 90), (0, last), (0, 3))
    below.marks(range(0, last + 1, 10), (0, 1, 2, 3), "g")
    below.line(marks, spent, BLUE)
    below.label(last + 1, spent[-1] - 0.1, f"ε = {spent[-1]:.2f}")
    p.text(305, 408, "steps", "soft")
    return p


def digit(p: Picture, x: float, y: float, image: torch.Tensor, above: str, below: str, frame: str) -> None:
    """An image of 8 x 8 pixels, with a line of text above and below."""
    side = 8 * PIXEL
    p.text(x + side / 2, y - 7, above)
    p.shapes.append(f'<rect x="{x - 2:g}" y="{y - 2:g}" width="{side + 4}" height="{side + 4}" rx="3" fill="{frame}"/>')
    p.shapes.append(f'<rect x="{x:g}" y="{y:g}" width="{side}" height="{side}" fill="#fff"/>')
    for row, line in enumerate(image[0].tolist()):
        for column, value in enumerate(line):
            if value:
                p.shapes.append(
                    f'<rect x="{x + column * PIXEL:g}" y="{y + row * PIXEL:g}" width="{PIXEL}" height="{PIXEL}" '
                    f'fill="#1b1f24" fill-opacity="{value:.2f}"/>'
                )
    p.text(x + side / 2, y + side + 19, below, "soft")


def hardest_examples() -> Picture:
    """Rows of the hardest images, and below a test image between those that speak against it and for it."""
    found = variables("hardest_examples.md")
    images, labels, truth, lengths = found["images"], found["labels"], found["train"].labels, found["lengths"]
    hardest, influence = found["hardest"], found["influence"]
    p = Picture(740, 460, "Digits with long gradients; a test image, and the digits with the most influence on it.")

    def show(x: float, y: float, place: int, below: str) -> None:
        is_wrong = labels[place] != truth[place]
        digit(p, x, y, images[place], f"“{labels[place]}”", below, ORANGE if is_wrong else FILLS[3])

    right = hardest[(labels == truth)[hardest]]
    rows = {"The longest gradients of all": hardest, "The longest of those with the right label": right}
    for j, (title, places) in enumerate(rows.items()):
        p.text(20, 24 + j * 150, title, "head start")
        for i, place in enumerate(places[:10].tolist()):
            show(24 + i * 71, 58 + j * 150, place, f"{lengths[place]:.1f}")
    one, test = int(found["one"]), found["test"]
    taken = int(found["model"](test.images[one][None]).argmax())
    title = f"A {test.labels[one]} that is taken for a {taken}, and the images with the most influence on it"
    p.text(20, 324, title, "head start")
    digit(p, 342, 358, test.images[one], "test image", "", BLUE)
    for i, (low, high) in enumerate(zip(found["against"].tolist(), found["favour"].tolist(), strict=True)):
        show(24 + i * 62, 358, low, f"−{-influence[low]:.0f}")
        show(426 + i * 62, 358, high, f"+{influence[high]:.0f}")
    p.text(176, 454, "speak against it", "soft")
    p.text(578, 454, "speak for it", "soft")
    return p


PICTURES = {"private_training": private_training, "hardest_examples": hardest_examples}


def main() -> None:
    for name, draw in PICTURES.items():
        (HERE / f"{name}.svg").write_text(draw().svg(), encoding="utf-8")


if __name__ == "__main__":
    main()
