"""The form of ``vmap`` that Dynamo can trace, used when ``torch.compile`` or ``torch.export`` traces the caller.

Private names used, seen on torch 2.11, 2.13 and 2.15: ``torch.utils._pytree.tree_flatten``, ``tree_unflatten``,
``_broadcast_to_and_flatten`` and those of :mod:`torchbatch._torch.levels`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils import _pytree as pytree

from torchbatch._torch import factories, levels
from torchbatch.errors import AxisError, OutputTypeError, UnmappedOutputError

Tree = Any


def call(
    fun: Callable[..., Any],
    in_axes: Tree,
    out_axes: Tree,
    sum_match: bool,
    size: int | None,
    randomness: str,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """``vmap(fun)(*args, **kwargs)``, spelled with operations that Dynamo follows; the axes are already checked."""
    leaves, spec = pytree.tree_flatten((args, kwargs))
    prefix = (_per_argument(in_axes, len(args)), dict.fromkeys(kwargs, 0))
    axes = pytree._broadcast_to_and_flatten(prefix, spec)
    if axes is None:
        raise AxisError(f"in_axes {in_axes!r} must be a tree prefix of the arguments of the mapped function.")
    size = _size(leaves, axes, size)
    every = torch.ones(size, dtype=torch.bool)
    with levels.traceable_level(size, randomness) as level:
        batched = [_wrap(leaf, axis, level) for leaf, axis in zip(leaves, axes, strict=True)]
        positional, keywords = pytree.tree_unflatten(batched, spec)
        with factories.WithRoom(levels.traceable_add(every, 0, level)):
            output = fun(*positional, **keywords)
        results, out_spec = pytree.tree_flatten(output)
        ends = pytree._broadcast_to_and_flatten(out_axes, out_spec)
        if ends is None:
            raise AxisError(f"out_axes {out_axes!r} must be a tree prefix of the output of the mapped function.")
        taken = [_take(leaf, axis, level, size, sum_match) for leaf, axis in zip(results, ends, strict=True)]
        return pytree.tree_unflatten(taken, out_spec)


def _per_argument(in_axes: Tree, count: int) -> tuple[Any, ...]:
    if in_axes is None or isinstance(in_axes, int):
        return (in_axes,) * count
    if len(in_axes) != count:
        raise AxisError(f"in_axes must have one entry per positional argument: {len(in_axes)} entries, {count} arguments.")
    return tuple(in_axes)


def _size(leaves: list[Any], axes: list[Any], given: int | None) -> int:
    size = given
    for leaf, axis in zip(leaves, axes, strict=True):
        if axis is None or not isinstance(leaf, torch.Tensor):
            continue
        if not -leaf.dim() <= axis < leaf.dim():
            raise AxisError(f"axis {axis} is out of bounds for a mapped argument of shape {tuple(leaf.shape)}.")
        if size is None:
            size = leaf.shape[axis]
        elif size != leaf.shape[axis]:
            raise AxisError(f"vmap got axes of different sizes to map over: {size} and {leaf.shape[axis]}.")
    if size is None:
        raise AxisError("vmap has nothing to map: no argument has an axis in in_axes, and axis_size is not given.")
    return size


def _wrap(leaf: Any, axis: int | None, level: int) -> Any:
    if axis is None or not isinstance(leaf, torch.Tensor):
        return leaf
    return levels.traceable_add(leaf, axis % leaf.dim(), level)


def _take(leaf: Any, axis: int | None, level: int, size: int, sum_match: bool) -> Any:
    if leaf is None:
        return None
    if axis is None:
        return _take_unmapped(leaf, level, sum_match)
    if isinstance(leaf, bool | int | float | complex):
        leaf = torch.as_tensor(leaf)
    if not isinstance(leaf, torch.Tensor):
        raise OutputTypeError(f"the mapped function returned a {type(leaf).__name__}, which is not an array.")
    rank = leaf.dim() + 1
    if not -rank <= axis < rank:
        raise AxisError(f"out_axes {axis} is out of bounds: with the mapped axis the output has {rank} dimensions.")
    return levels.traceable_remove(leaf, level, size, axis % rank)


def _take_unmapped(leaf: Any, level: int, sum_match: bool) -> Any:
    if not isinstance(leaf, torch.Tensor):
        return leaf
    inner, at = levels.unwrap_batched(leaf, level)
    if at is None:
        return leaf
    if not sum_match:
        raise UnmappedOutputError("an output of the mapped function varies along the mapped axis, but its out_axes is None.")
    return inner.sum(at)
