"""Operators that select, whose derivative PyTorch's batching rules get wrong where it is taken outside the map.

``max()``, ``min()``, ``median()`` and ``nanmedian()`` of a whole sample: without ``vmap``, all elements that are equal to the
result share the derivative. PyTorch's rules take the element at one place, which gets all of it; and they refuse the median
of a sample without elements. ``select_scatter``: PyTorch's rule writes what is given along the whole axis, and so sums the
derivative over it.

These rules replace them, for ``torch.func.vmap`` too. They are rules, not overlays: a derivative inside the map is right as
it is.

Private names used, seen on torch 2.11, 2.13 and 2.15: those of :mod:`torchbatch._torch.batching` and
:mod:`torchbatch._torch.levels`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from torchbatch._torch import batching, levels

Selection = Callable[[Tensor], Tensor]

_ROWS: dict[str, Selection] = {
    "max": lambda rows: rows.amax(tuple(range(1, rows.dim()))),
    "min": lambda rows: rows.amin(tuple(range(1, rows.dim()))),
    "median": lambda rows: rows.flatten(1).median(1).values,
    "nanmedian": lambda rows: rows.flatten(1).nanmedian(1).values,
}


def _rule(name: str, select: Selection) -> batching.Kernel:
    """The batching rule of an operator of which ``select`` is the same along the first axis."""
    operator = batching.operator_of(name)

    def kernel(x: Tensor) -> Tensor:
        level = batching.current_level()
        is_batched = levels.is_batchedtensor(x) and levels.maybe_get_level(x) == level
        with batching.below():
            if not is_batched:
                result: Tensor = operator(x)
                return result
            rows = batching.opened(x, level).front()
            rows = rows if rows.dim() > 1 else rows.unsqueeze(1)
            if not math.prod(rows.shape[1:]):
                return batching.wrapped(_of_nothing(operator, rows), level)
            values = _even(rows, select(rows.detach())) if _is_differentiated(rows) else select(rows)
            return batching.wrapped(values, level)

    return kernel


def _of_nothing(operator: Any, rows: Tensor) -> Tensor:
    """What the operator says of no elements; for a median, a number that depends on them all the same."""
    value: Tensor = operator(rows.new_empty(0))
    return value + rows.flatten(1).sum(1, dtype=rows.dtype)


def _is_differentiated(x: Tensor) -> bool:
    """Whether some derivative may be taken of a tensor; a yes too many costs time only."""
    if not x.is_floating_point():
        return False
    while levels.is_wrapped(x):
        if not levels.is_batchedtensor(x):
            return True
        x = levels.get_unwrapped(x)
    return x.requires_grad or forward_ad.unpack_dual(x).tangent is not None


def _even(rows: Tensor, values: Tensor) -> Tensor:
    """``values``, one for each row, with the derivative of the mean of the elements that are equal to it.

    What is taken from a value is a mean of differences that are zero, so it keeps all its digits and its sign. An infinite
    value has no such difference: twice of it is as infinite.
    """
    axes = tuple(range(1, rows.dim()))
    wide = values.reshape(-1, *[1] * len(axes))
    equal = (rows == wide) | (rows.isnan() & wide.isnan())
    zeros = torch.where(equal, wide.nan_to_num(0.0, 0.0, 0.0) - rows, 0)
    return values - zeros.sum(axes) / equal.sum(axes)


def _select_scatter(x: Tensor, src: Tensor, dim: int, index: int) -> Tensor:
    """A slice of length one, written."""
    if x.select(dim, index).shape != src.shape:
        raise RuntimeError(
            f"select_scatter: src has the shape {tuple(src.shape)}, but the part of the sample that it replaces has "
            f"{tuple(x.select(dim, index).shape)}."
        )
    axis, place = dim % x.dim(), index % x.shape[dim]
    return x.slice_scatter(src.unsqueeze(axis), axis, place, place + 1)


_library = torch.library.Library("aten", "IMPL")

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", message=".*overrid", category=UserWarning)
    for _name, _select in _ROWS.items():
        _library.impl(_name, _rule(_name, _select), batching.NAME)
    _library.impl("select_scatter", _select_scatter, batching.NAME)
