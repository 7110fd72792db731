"""``max()``, ``min()``, ``median()`` and ``nanmedian()`` of a whole sample, where several elements are equal to the result.

Without ``vmap`` all of them share the derivative. PyTorch's batching rules take the element at one place, which gets all of
it if the derivative is taken outside the map; and they refuse the median of a sample without elements. These rules replace
them, for ``torch.func.vmap`` too. They are rules, not overlays: a derivative inside the map is right as it is.

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

    The mean itself may be off by a rounding, so it adds no more than its derivative. Infinities have no difference, but a sum
    of them is exact. The halves keep a sum of the largest numbers finite.
    """
    axes = tuple(range(1, rows.dim()))
    wide = values.reshape(-1, *[1] * len(axes))
    equal = (rows == wide) | (rows.isnan() & wide.isnan())
    parts = torch.where(equal, rows, 0) / (2 * equal.sum(axes, keepdim=True))
    half = parts.sum(axes)
    return torch.where(values.isfinite(), values - 2 * (half.detach() - half), 2 * half)


_library = torch.library.Library("aten", "IMPL")

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", message=".*overrid", category=UserWarning)
    for _name, _select in _ROWS.items():
        _library.impl(_name, _rule(_name, _select), batching.NAME)
