"""Strategies for ``in_axes`` and ``out_axes`` that fit a tree of arrays, or that do not."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from hypothesis import strategies as st

from torchbatch import tree
from torchbatch.errors import AxisError

__all__ = ["axes_for", "out_axes_for"]

Axis = int | None
Shape = tuple[int, ...]


# --- reading trees ---------------------------------------------------------------------------------------------------


def children_of(node: Any) -> tuple[list[Any], Any] | None:
    """The children of a node and its structure; None for a leaf."""
    children, structure = tree.flatten(node, is_leaf=lambda value: value is not node)
    return None if len(children) == 1 and children[0] is node else (children, structure)


def shape_of(leaf: Any) -> Shape | None:
    """The shape of an array, a number, or a stand-in with a shape; None for anything else."""
    if isinstance(leaf, bool | int | float | complex):
        return ()
    shape = getattr(leaf, "shape", None)
    return tuple(shape) if isinstance(shape, tuple) else None


def entries_of(axes: Any, value: Any) -> list[tuple[Any, Any]]:
    """The entries of a tree of axes, which is a prefix of a tree of values, each with the subtree that it covers."""
    if axes is None or isinstance(axes, int):
        return [(axes, value)]
    mine, theirs = children_of(axes), children_of(value)
    if mine is None or theirs is None or len(mine[0]) != len(theirs[0]):
        raise AxisError(f"the axes {axes!r} are no tree prefix of {value!r}.")
    return [found for pair in zip(mine[0], theirs[0], strict=True) for found in entries_of(*pair)]


def with_entries(axes: Any, entries: Iterator[Any]) -> Any:
    """The tree of axes with other entries."""
    opened = None if axes is None or isinstance(axes, int) else children_of(axes)
    if opened is None:
        return next(entries)
    return tree.unflatten(opened[1], [with_entries(child, entries) for child in opened[0]])


# --- drawing axes ----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Choice:
    """The axes that one array may have, the simplest first; in a tree it is a leaf."""

    axes: tuple[Axis, ...]

    @property
    def mapped(self) -> Choice:
        """The same without None."""
        return Choice(tuple(axis for axis in self.axes if axis is not None))


def choice(indices: Sequence[int], ndim: int, *, none: bool, negative: bool) -> Choice:
    """Axes out of ``indices`` of an array with ``ndim`` axes, also counted from the end, and None."""
    below = [index - ndim for index in indices] if negative else []
    return Choice((*indices, *below, *([None] if none else [])))


@st.composite
def one_of(draw: st.DrawFn, options: Sequence[Any]) -> Any:
    """One of the options; an option less is not simpler, so that what is drawn shrinks to the first ones."""
    return options[draw(st.integers(0, 11)) % len(options)]


@st.composite
def prefixes(draw: st.DrawFn, choices: Any) -> Any:
    """One axis per leaf of a tree of choices, or one for a whole subtree."""
    opened = children_of(choices)
    if opened is None:
        return draw(one_of(choices.axes))
    leaves = tree.leaves(choices)
    first: tuple[Axis, ...] = leaves[0].axes if leaves else (0, None)
    common = [axis for axis in first if all(axis in leaf.axes for leaf in leaves)]
    if draw(st.sampled_from(["one for all", "one for each"])) == "one for all" and common:
        return draw(one_of(common))
    return tree.unflatten(opened[1], [draw(prefixes(child)) for child in opened[0]])


@st.composite
def mapped_prefixes(draw: st.DrawFn, choices: Any) -> Any:
    """The same, with at least one array mapped."""
    leaves, structure = tree.flatten(choices)
    chosen = draw(one_of([i for i, leaf in enumerate(leaves) if leaf.mapped.axes]))
    leaves[chosen] = leaves[chosen].mapped
    return draw(prefixes(tree.unflatten(structure, leaves)))


def axes_for(
    value: Any, *, none: bool = True, negative: bool = True, batch_size: int | None = None, legal: bool = True
) -> st.SearchStrategy[Any]:
    """The ``in_axes`` with which ``vmap`` can map a tuple of arguments, or an entry of it for one argument.

    At least one array is mapped, all mapped axes have the same size, and what is no array is not mapped. A subtree whose arrays
    all have the same axis may get a single entry.

    Args:
        value: the arguments: a tree of arrays, or of stand-ins that have a ``shape``.
        none: whether arrays may be left unmapped.
        negative: whether axes are also counted from the end.
        batch_size: the size that the mapped axes have; by default any one that fits.
        legal: False asks for axes that ``vmap`` must refuse with a ``TypeError`` or ``ValueError`` where it is given no
            ``axis_size``: out of range, of another size, of the wrong type or structure, too many, or None for all.

    Raises:
        AxisError: the arrays have no axis that could be mapped.

    Example:
        >>> import torch
        >>> from hypothesis import find
        >>> from torchbatch.testing.strategies import axes_for
        >>> args = torch.ones(4, 3), {"w": torch.ones(3, 2), "b": torch.ones(3)}
        >>> find(axes_for(args), lambda axes: True)
        (0, None)
        >>> find(axes_for(args, batch_size=3), lambda axes: axes[1] is not None)
        (1, 0)
    """
    leaves, structure = tree.flatten(value)
    shapes = [shape_of(leaf) for leaf in leaves]
    sizes = _sizes(shapes, none, batch_size)

    def axes_of(size: int) -> st.SearchStrategy[Any]:
        choices = [_choice_of(shape, size, none, negative) for shape in shapes]
        found = mapped_prefixes(tree.unflatten(structure, choices))
        return found if legal else found.flatmap(lambda axes: _illegal(value, axes, size, batch_size is None))

    return one_of(sizes).flatmap(axes_of)


def _choice_of(shape: Shape | None, size: int, none: bool, negative: bool) -> Choice:
    if shape is None:
        return Choice((None,))
    return choice([i for i, side in enumerate(shape) if side == size], len(shape), none=none, negative=negative)


def _sizes(shapes: Sequence[Shape | None], none: bool, wanted: int | None) -> list[int]:
    """The sizes of which every array that has to be mapped has an axis."""
    arrays = [shape for shape in shapes if shape is not None]
    sides = list(dict.fromkeys(side for shape in arrays for side in shape))
    fitting = [side for side in sides if none or all(side in shape for shape in arrays)]
    found = [side for side in fitting if wanted is None or side == wanted]
    if not found:
        size = "the same size" if wanted is None else f"size {wanted}"
        which = "any array" if none else "all arrays"
        raise AxisError(f"axes_for: there is no axis of {size} in {which} of the shapes {', '.join(map(str, arrays))}.")
    return found


def out_axes_for(value: Any, *, negative: bool = True) -> st.SearchStrategy[Any]:
    """The ``out_axes`` that fit a function which returns such a tree for one sample.

    Args:
        value: the output for one sample: a tree of arrays, numbers or stand-ins that have a ``shape``.
        negative: whether axes are also counted from the end.

    Raises:
        AxisError: a leaf is no array.

    Example:
        >>> import torch
        >>> from hypothesis import find
        >>> from torchbatch.testing.strategies import out_axes_for
        >>> find(out_axes_for({"a": torch.ones(3), "b": 2.0}), lambda axes: isinstance(axes, dict))
        {'a': 0, 'b': 0}
    """
    return prefixes(tree.map(lambda leaf: new_axis(leaf, none=False, negative=negative), value))


def new_axis(leaf: Any, *, none: bool, negative: bool) -> Choice:
    """The places at which one more axis can be put into the shape of a leaf."""
    shape = shape_of(leaf)
    if shape is None:
        raise AxisError(f"a leaf must be an array, a number or have a shape, but it is {leaf!r} of type {type(leaf).__name__}.")
    return choice(range(len(shape) + 1), len(shape) + 1, none=none, negative=negative)


# --- axes that do not fit --------------------------------------------------------------------------------------------


@st.composite
def _illegal(draw: st.DrawFn, value: Any, axes: Any, size: int, need_one: bool) -> Any:
    """Legal axes with one mistake made in them."""
    entries = entries_of(axes, value)
    wrong = [(i, entry) for i, (_, part) in enumerate(entries) for entry in _mistakes(part, size, _others(entries, i))]
    wrong.append((-1, "too many"))
    if need_one:
        wrong.append((-1, "none at all"))
    place, entry = draw(st.sampled_from(wrong))
    if place >= 0:
        return with_entries(axes, iter([entry if i == place else old for i, (old, _) in enumerate(entries)]))
    if entry == "none at all":
        return with_entries(axes, iter([None] * len(entries)))
    return (*axes, 0) if type(axes) is tuple else (axes,) * (_width(value) + 1)


def _others(entries: Sequence[tuple[Any, Any]], index: int) -> bool:
    """Whether another entry maps an array."""
    return any(axis is not None and tree.leaves(part) for i, (axis, part) in enumerate(entries) if i != index)


def _mistakes(part: Any, size: int, others: bool) -> list[Any]:
    """What must not stand as the entry of a subtree."""
    shapes = [shape for shape in map(shape_of, tree.leaves(part)) if shape is not None]
    if not shapes:
        return [{"no such key": 0}]
    least = min(map(len, shapes))
    sizes = [i for shape in shapes for i, side in enumerate(shape) if side != size] if others else []
    return [least, -least - 1, *dict.fromkeys(sizes), "0", 0.5, {"no such key": 0}]


def _width(value: Any) -> int:
    opened = children_of(value)
    return 1 if opened is None else len(opened[0])
