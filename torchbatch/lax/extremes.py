"""The greatest and the least over the samples of a named axis, and where they are."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from torchbatch.lax.named import Groups, everyone, frames_of, group_size, over_leaves, size_of, steps

_Tensor = torch.Tensor


def pmax(x: Any, axis_name: Any, *, axis_index_groups: Groups = None) -> Any:
    """The greatest value over all samples of a named axis, element by element.

    Shapes: ``[a] -> [a]``; the result is the same for all samples.

    Args:
        x: a tensor, an array, a number or a tree of them.
        axis_name: the name of the axis, or a tuple of names.
        axis_index_groups: as in :func:`psum`.

    Returns:
        A tree like ``x``.

    Raises:
        AxisNameError, AxisError: as in :func:`psum`.

    Example:
        >>> import torch
        >>> from torchbatch import lax, vmap
        >>> vmap(lambda x: x == lax.pmax(x, "i"), axis_name="i")(torch.tensor([1.0, 5.0, 3.0]))
        tensor([False,  True, False])

    Source: ``jax.lax.pmax``. JAX has no derivative of it; here it is that of ``torch.amax``.
    """
    return _extreme(x, axis_name, axis_index_groups, "pmax", torch.amax)


def pmin(x: Any, axis_name: Any, *, axis_index_groups: Groups = None) -> Any:
    """The least value over all samples of a named axis, element by element.

    Shapes: ``[a] -> [a]``; the result is the same for all samples.

    Args:
        x: a tensor, an array, a number or a tree of them.
        axis_name: the name of the axis, or a tuple of names.
        axis_index_groups: as in :func:`psum`.

    Returns:
        A tree like ``x``.

    Raises:
        AxisNameError, AxisError: as in :func:`psum`.

    Example:
        >>> import torch
        >>> from torchbatch import lax, vmap
        >>> vmap(lambda x: x - lax.pmin(x, "i"), axis_name="i")(torch.tensor([1.0, 5.0, 3.0]))
        tensor([0., 4., 2.])

    Source: ``jax.lax.pmin``. JAX has no derivative of it; here it is that of ``torch.amin``.
    """
    return _extreme(x, axis_name, axis_index_groups, "pmin", torch.amin)


def pargmax(x: Any, axis_name: Any) -> Any:
    """Which sample of a named axis has the greatest value, element by element.

    Shapes: ``[a] -> [a]``; the result is the same for all samples.

    Args:
        x: a tensor, an array, a number or a tree of them.
        axis_name: the name of the axis; of a tuple of names, the last one varies fastest.

    Returns:
        A tree like ``x``, of int64: the first of several equal ones, and the first NaN where there is one.

    Raises:
        AxisNameError: no enclosing ``vmap`` has the name, or it has a ``chunk_size`` that cuts the axis up.
        AxisError: a name is given twice.

    Example:
        >>> import torch
        >>> from torchbatch import lax, vmap
        >>> vmap(lambda x: lax.pargmax(x, "i") == lax.axis_index("i"), axis_name="i")(torch.tensor([1.0, 5.0, 3.0]))
        tensor([False,  True, False])

    Source: ``jax.lax.parallel.pargmax``, which no public module of JAX 0.10 has; it takes one name and no tree, and gives
    the largest integer where there is a NaN.
    """
    return _place(x, axis_name, "pargmax", torch.argmax)


def pargmin(x: Any, axis_name: Any) -> Any:
    """Which sample of a named axis has the least value, element by element.

    Shapes: ``[a] -> [a]``; the result is the same for all samples.

    Args:
        x: a tensor, an array, a number or a tree of them.
        axis_name: the name of the axis; of a tuple of names, the last one varies fastest.

    Returns:
        A tree like ``x``, of int64: the first of several equal ones, and the first NaN where there is one.

    Raises:
        AxisNameError, AxisError: as in :func:`pargmax`.

    Example:
        >>> import torch
        >>> from torchbatch import lax, vmap
        >>> vmap(lambda x: x - lax.pargmin(x, "i"), axis_name="i")(torch.tensor([3, 5, 1]))
        tensor([ 1,  3, -1])

    Source: ``jax.lax.parallel.pargmin``; see :func:`pargmax`.
    """
    return _place(x, axis_name, "pargmin", torch.argmin)


def _extreme(x: Any, axis_name: Any, groups: Groups, who: str, reduce: Callable[..., _Tensor]) -> Any:
    frames = frames_of(axis_name, who)
    group_size(x, frames, groups, who)

    def extreme(value: _Tensor) -> _Tensor:
        for _, size, level, _ in frames:
            full = steps().gather(value, level, size)
            value = reduce(full, 0) if size else _extreme_of_none(full, who == "pmin")
        return value

    return over_leaves(extreme, x, who, lambda number: number)


def _extreme_of_none(full: _Tensor, greatest: bool) -> _Tensor:
    """What the extreme of no values at all is."""
    dtype = full.dtype
    if dtype is torch.bool:
        bound: Any = greatest
    elif dtype.is_floating_point:
        bound = math.inf if greatest else -math.inf
    else:
        bound = torch.iinfo(dtype).max if greatest else torch.iinfo(dtype).min
    return torch.full(full.shape[1:], bound, dtype=dtype, device=full.device)


def _place(x: Any, axis_name: Any, who: str, where: Callable[..., _Tensor]) -> Any:
    frames = frames_of(axis_name, who)
    size = size_of(frames)

    def place(value: _Tensor) -> _Tensor:
        full = everyone(value, frames)
        if not size:
            return _extreme_of_none(full.long(), greatest=True)
        return where(full.to(torch.uint8) if full.dtype is torch.bool else full, 0)

    return over_leaves(place, x, who)
