"""The form of ``vmap`` that Dynamo can trace, used when ``torch.compile`` or ``torch.export`` traces the caller.

Private names used, seen on torch 2.11, 2.13 and 2.15: ``torch.utils._pytree.tree_flatten``, ``tree_unflatten``,
``_broadcast_to_and_flatten`` and those of :mod:`torchbatch._torch.levels`.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils import _pytree as pytree

from torchbatch._torch import factories, levels
from torchbatch.errors import AxisError, AxisSpecError, InputTypeError, OutputTypeError, UnmappedOutputError

Tree = Any


class Options(NamedTuple):
    """The options of ``vmap``."""

    in_axes: Tree
    out_axes: Tree
    sum_match: bool
    size: int | None
    randomness: str
    chunk_size: int | None
    names: tuple[Hashable, Hashable]  # of the mapped axis: where all samples are there, and where one chunk of them is
    scope: list[Any]  # the names, sizes and levels of the axes that are mapped now


def mapped(fun: Callable[..., Any], options: Options) -> Callable[..., Any]:
    """What ``vmap(fun)`` is where it is written inside a function that is being compiled."""
    if options.randomness not in ("error", "different", "same"):
        raise AxisError(f"randomness must be 'error', 'different' or 'same', but it is {options.randomness!r}.")

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return call(fun, options, args, kwargs)

    return wrapper


def call(fun: Callable[..., Any], options: Options, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``vmap(fun)(*args, **kwargs)``, spelled with operations that Dynamo follows."""
    leaves, spec = pytree.tree_flatten((args, kwargs))
    prefix = (_per_argument(options.in_axes, len(args)), dict.fromkeys(kwargs, 0))
    axes = pytree._broadcast_to_and_flatten(prefix, spec)
    if axes is None:
        raise AxisError(f"in_axes {options.in_axes!r} must be a tree prefix of the arguments of the mapped function.")
    if any(axis is not None and type(axis) is not int for axis in axes):
        raise AxisSpecError(f"in_axes must be an int, None, or a tree of them, but it is {options.in_axes!r}.")
    leaves = [_array(leaf, axis) for leaf, axis in zip(leaves, axes, strict=True)]
    size = _size(leaves, axes, options.size)
    if options.chunk_size is None or options.chunk_size >= size:
        part, _, out_spec = _run(fun, options, options.names[0], leaves, axes, spec, size)
        return pytree.tree_unflatten(part, out_spec)
    parts: list[list[Any]] = []
    for start in range(0, size, options.chunk_size):
        length = min(options.chunk_size, size - start)
        chunk = [_narrow(value, axis, start, length) for value, axis in zip(leaves, axes, strict=True)]
        part, ways, out_spec = _run(fun, options, options.names[1], chunk, axes, spec, length)
        parts.append(part)
    joined = [_join(pieces, way) for pieces, way in zip(zip(*parts, strict=True), ways, strict=True)]
    return pytree.tree_unflatten(joined, out_spec)


def _array(leaf: Any, axis: int | None) -> Any:
    """A leaf of the arguments; as a tensor, if it is a mapped NumPy array."""
    if axis is None or leaf is None or isinstance(leaf, torch.Tensor | torch.nn.Module):
        return leaf
    if isinstance(leaf, np.ndarray):
        return torch.as_tensor(leaf)
    raise InputTypeError(f"vmap is to map a {type(leaf).__name__}, which is not an array. Give None for it in in_axes.")


def _run(
    fun: Any, options: Options, name: Hashable, leaves: list[Any], axes: list[Any], spec: Any, size: int
) -> tuple[Any, Any, Any]:
    """The leaves of the output of one chunk, how each is to be joined with those of others, and their structure."""
    every = torch.ones(size, dtype=torch.bool)
    with levels.traceable_level(size, options.randomness) as level:
        batched = [_wrap(leaf, axis, level) for leaf, axis in zip(leaves, axes, strict=True)]
        positional, keywords = pytree.tree_unflatten(batched, spec)
        options.scope.append((name, size, level, leaves))
        try:
            with factories.WithRoom(levels.traceable_add(every, 0, level)):
                output = fun(*positional, **keywords)
        finally:
            options.scope.pop()
        results, out_spec = pytree.tree_flatten(output)
        ends = pytree._broadcast_to_and_flatten(options.out_axes, out_spec)
        if ends is None:
            raise AxisError(f"out_axes {options.out_axes!r} must be a tree prefix of the output of the mapped function.")
        taken = [_take(leaf, axis, level, size, options.sum_match) for leaf, axis in zip(results, ends, strict=True)]
        return [value for value, _ in taken], [way for _, way in taken], out_spec


def _narrow(leaf: Any, axis: int | None, start: int, length: int) -> Any:
    return leaf if axis is None or not isinstance(leaf, torch.Tensor) else leaf.narrow(axis, start, length)


def _join(parts: Any, way: int | str) -> Any:
    if isinstance(way, int):
        return torch.cat(parts, way)
    return parts[0] if way == "once" else torch.stack(parts).sum(0)


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


def _take(leaf: Any, axis: int | None, level: int, size: int, sum_match: bool) -> tuple[Any, int | str]:
    """An output leaf outside the level, and how those of several chunks become one."""
    if leaf is None:
        return None, "once"
    if axis is None:
        return _take_unmapped(leaf, level, sum_match)
    if isinstance(leaf, bool | int | float | complex):
        leaf = torch.as_tensor(leaf)
    if not isinstance(leaf, torch.Tensor):
        raise OutputTypeError(f"the mapped function returned a {type(leaf).__name__}, which is not an array.")
    rank = leaf.dim() + 1
    if not -rank <= axis < rank:
        raise AxisError(f"out_axes {axis} is out of bounds: with the mapped axis the output has {rank} dimensions.")
    axis %= rank
    if levels.unwrap_batched(leaf, level)[1] is None:  # PyTorch's own function repeats only along the first axis here
        return leaf.unsqueeze(axis).expand(*leaf.shape[:axis], size, *leaf.shape[axis:]), axis
    taken = levels.traceable_remove(leaf, level, size, 0)  # torch.export takes no other axis
    return (taken.movedim(0, axis) if axis else taken), axis


def _take_unmapped(leaf: Any, level: int, sum_match: bool) -> tuple[Any, int | str]:
    if not isinstance(leaf, torch.Tensor):
        return leaf, "once"
    inner, at = levels.unwrap_batched(leaf, level)
    if at is None:
        return leaf, "once"
    if not sum_match:
        raise UnmappedOutputError("an output of the mapped function varies along the mapped axis, but its out_axes is None.")
    return inner.sum(at), "sum"


def map_leaves(function: Callable[[Any], Any], tree: Tree) -> Tree:
    """``function`` over the leaves of a tree, in which None is an empty tree."""
    return pytree.tree_map(lambda leaf: None if leaf is None else function(leaf), tree)
