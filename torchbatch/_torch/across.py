"""Look across the samples of a batch level from inside it.

:func:`gather` makes the mapped axis of a level an ordinary first axis, :func:`own` gives every sample its part of such a
first axis again, and :func:`total` sums over the samples. All three work however many transforms are open inside the level,
and can be differentiated. They need the number of a level and its size, not the name of an axis.

Right inside a level, a look is an unwrap. Elsewhere the wrappers of other transforms lie around the batch, and
:class:`_Gather` takes the look down to its level through them.

Private names used: those of :mod:`torchbatch._torch.levels`, :mod:`torchbatch._torch.overlay` and
:mod:`torchbatch._torch.wrappers`.
"""

from __future__ import annotations

import operator
from typing import Any

import torch

from torchbatch._torch import levels, overlay, wrappers


def gather(x: torch.Tensor, level: int, size: int) -> torch.Tensor:
    """The values of ``x`` in all samples of ``level``, along a new first axis that is the same for all samples."""
    x = wrappers.alive(x)
    if not levels.is_batched_at(x, level):
        return x.unsqueeze(0).expand(size, *x.shape)
    if levels.depth() == level:
        value, axis = levels.unwrap_batched(x, level)
        return value.movedim(axis, 0)
    result: torch.Tensor = _Gather.apply(x, level, size)
    return result


def total(x: torch.Tensor, level: int, size: int) -> torch.Tensor:
    """The sum of ``x`` over all samples of ``level``; of truth values, how many are true."""
    if not levels.is_batched_at(x, level):
        return x * size
    return gather(x, level, size).sum(0, dtype=None if x.dtype is torch.bool else x.dtype)


def own(full: torch.Tensor, level: int, size: int) -> torch.Tensor:
    """``full[i]`` for sample number ``i`` of ``level``; ``full`` must be the same for all of them."""
    if levels.depth() == level:
        result: torch.Tensor = levels.add_batch_dim(full, 0, level)
        return result
    return full.index_select(0, number(level, size, full.device).unsqueeze(0)).squeeze(0)


def number(level: int, size: int, device: torch.device | None) -> torch.Tensor:
    """The number of each sample of ``level``, from 0."""
    numbers = overlay.call(torch.arange, (size,), {"device": device})
    result: torch.Tensor = levels.add_batch_dim(levels.innermost(numbers), 0, level)
    return result


def pick(full: torch.Tensor, places: list[int]) -> torch.Tensor:
    """The entries of ``full`` at these places of its first axis, in a tensor of its own."""
    result: torch.Tensor = overlay.call(operator.getitem, (full, places), {})
    return result


def copy(x: torch.Tensor) -> torch.Tensor:
    """A copy, so that what is written into the result of a look does not reach what was looked at."""
    return overlay.call(torch.clone, (x,), {}) if overlay.is_traced() else x.clone()


class _Gather(torch.autograd.Function):
    """:func:`gather` of what is batched at a level that is not the innermost transform."""

    @staticmethod
    def forward(x: torch.Tensor, level: int, size: int) -> torch.Tensor:
        return gather(x, level, size).clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[torch.Tensor, int, int], output: torch.Tensor) -> None:
        _, ctx.level, ctx.size = inputs

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int, None, None], x: torch.Tensor, level: int, size: int) -> tuple[Any, Any]:
        values = x.movedim(in_dims[0], 0)
        if levels.depth() + 1 == level:
            return values.contiguous(), None  # forward mode wants each element in a place of its own
        return gather(values, level, size).contiguous(), 1

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        return own(total(gradient, ctx.level, ctx.size), ctx.level, ctx.size), None, None

    @staticmethod
    def jvp(ctx: Any, tangent: torch.Tensor, *_: Any) -> torch.Tensor:
        return gather(tangent, ctx.level, ctx.size).clone()
