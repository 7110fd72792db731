"""Views of a value as Python would write them: ``a.T``, ``a[:,None]``, ``a[0].view(3,4)``.

A view is described by where each of its axes comes from, so that a chain of them becomes one short text, or none.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

Size = int | str  # a size that is left open is text, since to compare it would fix it
Shape = tuple[Size, ...]


class Axis(NamedTuple):
    """An axis of a view: where in the base it comes from, if it is not new, and how long it is."""

    source: int | None
    size: Size
    cut: tuple[int, int, int] | None = None  # start, stop and step, where it is not the whole axis


class View(NamedTuple):
    """A value in terms of one that has a name.

    Attributes:
        base: the text of that value.
        shape: its shape.
        axes: those of the view.
        picked: for each axis of the base that is gone, which index was taken.
        before: the view that was reshaped to give the base, if one was.
    """

    base: str
    shape: Shape
    axes: tuple[Axis, ...]
    picked: dict[int, Size]
    before: Any = None

    @property
    def sizes(self) -> Shape:
        """The shape of the view."""
        return tuple([axis.size for axis in self.axes])


def named(base: str, shape: Shape) -> View:
    """The whole of a value that has a name."""
    return View(base, shape, tuple([Axis(i, size) for i, size in enumerate(shape)]), {})


# --- what is done to a view ------------------------------------------------------------------------------------------


def permuted(view: View, order: Iterable[int]) -> View:
    """The view with its axes in another order."""
    return view._replace(axes=tuple([view.axes[i] for i in order]))


def expanded(view: View, shape: Shape) -> View:
    """The view, repeated along axes of size 1 and along new ones in front."""
    added = len(shape) - len(view.axes)
    kept = [axis._replace(size=size) for axis, size in zip(view.axes, shape[added:], strict=True)]
    return view._replace(axes=(*[Axis(None, size) for size in shape[:added]], *kept))


def selected(view: View, dim: int, index: Any) -> View | None:
    """One index of an axis; None where that cannot be told."""
    part = sliced(view, dim, index, 1, 1)
    return None if part is None else _without(part, [part.axes[dim]])


def sliced(view: View, dim: int, start: Any, step: Any, size: Size) -> View | None:
    """Every ``step``-th index of an axis from ``start`` on, ``size`` of them; None where that cannot be told."""
    axis = view.axes[dim]
    if size == axis.size:
        return view
    if axis.source is None or _is_repeated(view, axis):
        return _replaced(view, dim, axis._replace(size=size))
    if not all(isinstance(number, int) for number in (start, step, size, axis.size)):
        return None
    start = start + axis.size if start < 0 else start
    first, _, stride = axis.cut or (0, 0, 1)
    first, stride = first + start * stride, stride * step
    stop = first + (int(size) - 1) * stride + 1 if size else first
    return _replaced(view, dim, Axis(axis.source, size, (first, stop, stride)))


def _replaced(view: View, dim: int, axis: Axis) -> View:
    return view._replace(axes=(*view.axes[:dim], axis, *view.axes[dim + 1 :]))


def _without(view: View, gone: Sequence[Axis]) -> View:
    """The view without some axes of size 1."""
    axes = tuple([axis for axis in view.axes if not any(axis is other for other in gone)])
    return view._replace(axes=axes, picked={**view.picked, **_firsts(gone)})


def _firsts(axes: Iterable[Axis]) -> dict[int, Size]:
    """For each axis of the base that is among these, the first index."""
    return {axis.source: axis.cut[0] if axis.cut else 0 for axis in axes if axis.source is not None}


def reshaped(view: View, shape: Shape) -> View:
    """The view in another shape: a new base, unless only axes of size 1 come or go."""
    found = _with_ones(view, shape)
    if found is not None:
        return found
    if view.before is not None and _is_whole(view):
        return reshaped(view.before, shape)
    return named(f"{text(view)}.view({joined(shape)})", shape)._replace(before=view)


def _with_ones(view: View, shape: Shape) -> View | None:
    """The view with other axes of size 1, if these are the only difference."""
    left, axes, gone = list(view.axes), list[Axis](), list[Axis]()
    for size in shape:
        while left and left[0].size == 1 and size != 1:
            gone.append(left.pop(0))
        if left and left[0].size == size:
            axes.append(left.pop(0))
        elif size == 1:
            axes.append(Axis(None, 1))
        else:
            return None
    if any(axis.size != 1 for axis in left):
        return None
    return _settled(_without(view, [*gone, *left])._replace(axes=tuple(axes)))


def _settled(view: View) -> View:
    """The view with axes of size 1 that went and came again as if they had stayed."""
    axes, picked = list(view.axes), dict(view.picked)
    for source in [source for source in view.picked if view.shape[source] == 1]:
        for i, axis in enumerate(axes):
            if axis.source is None and _fits(axes, i, source):
                axes[i] = axis._replace(source=source)
                del picked[source]
                break
    return view._replace(axes=tuple(axes), picked=picked)


def _fits(axes: Sequence[Axis], place: int, source: int) -> bool:
    """Whether an axis of the base would stand in its order at that place."""
    before = [axis.source for axis in axes[:place] if axis.source is not None]
    after = [axis.source for axis in axes[place + 1 :] if axis.source is not None]
    return all(other < source for other in before) and all(other > source for other in after)


def _is_repeated(view: View, axis: Axis) -> bool:
    """Whether an axis holds the same values again and again."""
    if axis.size == 1 or axis.source is None:
        return axis.size != 1
    return len(range(*axis.cut)) == 1 if axis.cut else view.shape[axis.source] == 1


def _is_whole(view: View) -> bool:
    """Whether a view is its base, but for axes of size 1."""
    if any(axis.cut is not None or _is_repeated(view, axis) for axis in view.axes):
        return False
    return _in_order(view.axes) and all(view.shape[source] == 1 for source in view.picked)


def _in_order(axes: Iterable[Axis]) -> bool:
    kept = [axis.source for axis in axes if axis.source is not None]
    return kept == sorted(kept)


# --- the text --------------------------------------------------------------------------------------------------------


def text(view: View) -> str:
    """A view, with everything that was done to it."""
    if not any(_is_repeated(view, axis) for axis in view.axes):
        return _written(view)
    first = next((i for i, axis in enumerate(view.axes) if axis.source is not None), len(view.axes))
    return f"{_written(view._replace(axes=view.axes[first:]))}.expand({joined(view.sizes)})"


def broadcast_text(view: View) -> str:
    """A view where axes in front and repeats are understood from the shapes around it."""
    count = next((i for i, axis in enumerate(view.axes) if not _is_empty(view, axis)), len(view.axes))
    axes = view.axes[count:]
    if _are_last(axes, view.shape):
        return view.base
    return _written(view._replace(axes=axes, picked={**view.picked, **_firsts(view.axes[:count])}))


def _is_empty(view: View, axis: Axis) -> bool:
    """Whether an axis says nothing in front: it is new, or has size 1 in the base."""
    return axis.source is None or (view.shape[axis.source] == 1 and axis.cut is None)


def _are_last(axes: Sequence[Axis], shape: Shape) -> bool:
    """Whether these are the last axes of a shape, and all others have size 1."""
    first = len(shape) - len(axes)
    whole = [axis.source for axis in axes if axis.cut is None] == list(range(first, len(shape)))
    return whole and all(size == 1 for size in shape[:first])


def _written(view: View) -> str:
    if _in_order(view.axes):
        return view.base + _index(_entries(view))
    kept = [axis for axis in view.axes if axis.source is not None]
    order = sorted(kept, key=lambda axis: axis.source or 0)
    places = _index([":" if axis.source is not None else "None" for axis in view.axes])
    return view.base + _index(_entries(view._replace(axes=tuple(order)))) + _order([order.index(a) for a in kept]) + places


def _entries(view: View) -> list[str]:
    """What stands in square brackets, for axes that are in order."""
    entries, left = [], list(range(len(view.shape)))
    for axis in view.axes:
        while left and left[0] in view.picked:
            entries.append(str(view.picked[left.pop(0)]))
        entries.append("None" if axis.source is None else _cut(axis, view.shape[left.pop(0)]))
    return entries + [str(view.picked[source]) for source in left]


def _cut(axis: Axis, whole: Size) -> str:
    if axis.cut is None:
        return ":"
    start, stop, step = axis.cut
    ends = isinstance(whole, int) and stop > whole - step
    return f"{start or ''}:{'' if ends else stop}{f':{step}' if step != 1 else ''}"


def _index(entries: list[str]) -> str:
    while entries and entries[-1] == ":":
        entries = entries[:-1]
    return f"[{','.join(entries)}]" if entries else ""


def _order(places: list[int]) -> str:
    if places == [1, 0]:
        return ".T"
    rest = len(places) - 2
    return ".mT" if places == [*range(rest), rest + 1, rest] else f".permute({joined(places)})"


def joined(numbers: Iterable[Size]) -> str:
    """Sizes with commas between them."""
    return ",".join([str(number) for number in numbers])
