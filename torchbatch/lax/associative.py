"""Combine the entries along an axis, each with all before it, in a number of rounds that grows with the logarithm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from torchbatch.core import tree
from torchbatch.core.arrays import as_tensor
from torchbatch.core.describe import describe, function_name, shown
from torchbatch.errors import AxisError, AxisSpecError, InputTypeError, OutputTypeError


def associative_scan(fn: Callable[[Any, Any], Any], elems: Any, reverse: bool = False, axis: int = 0) -> Any:
    """All partial results of an operation that may be done in any order.

    Entry ``i`` of the result combines the entries ``0`` to ``i`` of ``elems``. For ``n`` entries ``fn`` is called about
    ``2 log2(n)`` times, on many entries at once.

    Shapes: ``[n, a] -> [n, a]``.

    Args:
        fn: combines two trees like ``elems`` entry by entry: ``fn(a, b)[i]`` depends on ``a[i]`` and ``b[i]`` alone. It must be
            associative: ``fn(a, fn(b, c))`` equal to ``fn(fn(a, b), c)``.
        elems: a tree of tensors with axes of one size.
        reverse: whether to begin at the end: entry ``i`` combines the entries from the last down to ``i``.
        axis: the axis of the entries, in ``[-ndim, ndim)``.

    Returns:
        A tree like ``elems``.

    Raises:
        AxisError: the axes have different sizes, or there are none.
        InputTypeError: something in ``elems`` is no array.
        OutputTypeError: ``fn`` returns another structure, shape or dtype.

    Example:
        >>> import torch
        >>> from torchbatch import lax
        >>> lax.associative_scan(torch.maximum, torch.tensor([1, 3, 2, 5, 4]))
        tensor([1, 3, 3, 5, 5])

    Source: ``jax.lax.associative_scan``.
    """
    if not callable(fn):
        raise AxisSpecError(f"associative_scan: fn must be a function, but it is {shown(fn)}.")
    leaves, structure = tree.flatten(elems)
    found = [_array(leaf, elems, i, axis) for i, leaf in enumerate(leaves)]
    rows = [value.movedim(axis, 0) for value in found]
    _check_sizes(rows, found, elems, axis)
    if not rows:
        return elems
    combine = _Combine(fn, structure)
    rows = [value.flip(0) for value in rows] if reverse else rows
    rows = combine.partial(rows)
    rows = [value.flip(0) for value in rows] if reverse else rows
    return structure.unflatten([value.movedim(0, axis) for value in rows])


class _Combine:
    """``fn`` on lists of tensors whose first axis holds the entries."""

    def __init__(self, fn: Callable[[Any, Any], Any], structure: tree.TreeDef) -> None:
        self._fn, self._structure = fn, structure

    def partial(self, rows: list[torch.Tensor]) -> list[torch.Tensor]:
        """All partial results: those at odd places first, from pairs; then the others, each from the one before it."""
        count = rows[0].shape[0]
        if count < 2:
            return [value.clone() for value in rows]
        pairs = self([value[:-1:2] for value in rows], [value[1::2] for value in rows])
        odd = self.partial(pairs)
        before = [value[:-1] for value in odd] if count % 2 == 0 else odd
        even = self(before, [value[2::2] for value in rows]) if count > 2 else None
        return [_interleaved(value[:1], None if even is None else even[i], odd[i]) for i, value in enumerate(rows)]

    def __call__(self, a: list[torch.Tensor], b: list[torch.Tensor]) -> list[torch.Tensor]:
        output = self._fn(self._structure.unflatten(a), self._structure.unflatten(b))
        leaves, structure = tree.flatten(output)
        if structure != self._structure:
            raise OutputTypeError(
                f"associative_scan: {function_name(self._fn)} must return the structure of elems, {self._structure}, but it "
                f"returned {structure}."
            )
        for i, (value, like) in enumerate(zip(leaves, a, strict=True)):
            if not isinstance(value, torch.Tensor) or value.shape != like.shape or value.dtype is not like.dtype:
                raise self._other_type(i, value, like, output)
        return leaves

    def _other_type(self, index: int, value: Any, like: torch.Tensor, output: Any) -> OutputTypeError:
        got = describe(value) if isinstance(value, torch.Tensor) else shown(value)
        return OutputTypeError(
            f"associative_scan: the input and the output of {function_name(self._fn)} must have identical types, but they differ "
            f"at {tree.paths(output, 'elems')[index]}: it goes in as {describe(like)} and comes out as {got}. fn gets "
            "many entries at once, along the first axis."
        )


def _interleaved(first: torch.Tensor, even: torch.Tensor | None, odd: torch.Tensor) -> torch.Tensor:
    """``first``, then the others by turns, ``odd`` before ``even``."""
    others = first if even is None else torch.cat([first, even])
    paired = torch.stack([others[: odd.shape[0]], odd], 1).flatten(0, 1)
    return paired if others.shape[0] == odd.shape[0] else torch.cat([paired, others[-1:]])


def _array(leaf: Any, elems: Any, index: int, axis: int) -> torch.Tensor:
    found = as_tensor(leaf)
    if found is None:
        raise InputTypeError(f"associative_scan: {tree.paths(elems, 'elems')[index]} is {shown(leaf)}, which is no array.")
    if not -found.dim() <= axis < found.dim():
        raise AxisError(
            f"associative_scan: axis {axis} is out of bounds for {tree.paths(elems, 'elems')[index]}, which is {describe(found)}."
        )
    return found


def _check_sizes(rows: list[torch.Tensor], found: list[torch.Tensor], elems: Any, axis: int) -> None:
    for i, value in enumerate(rows):
        if value.shape[0] != rows[0].shape[0]:
            names = tree.paths(elems, "elems")
            raise AxisError(
                f"associative_scan: all of elems must have the same size along axis {axis}, but {names[0]} is "
                f"{describe(found[0])} and {names[i]} is {describe(found[i])}."
            )
