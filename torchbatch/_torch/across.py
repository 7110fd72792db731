"""Look across the samples of a batch level from inside it.

:func:`gather` makes the mapped axis of a level an ordinary first axis, :func:`own` gives every sample its part of such a
first axis again, and :func:`total` sums over the samples. All three work however many transforms are open inside the level,
and can be differentiated. They need the number of a level and its size, not the name of an axis.

Right inside a level, a look is an unwrap. Elsewhere the wrappers of other transforms lie around the batch, and the look goes down
through them, one by one. (An ``autograd.Function`` with a ``vmap`` of its own would do that too, but in forward mode inside
forward mode PyTorch loses a tangent of it.)

Private names used: those of :mod:`torchbatch._torch.levels`, :mod:`torchbatch._torch.lowered`,
:mod:`torchbatch._torch.overlay` and :mod:`torchbatch._torch.wrappers`.
"""

from __future__ import annotations

import operator
from typing import Any

import torch

from torchbatch._torch import levels, lowered, overlay, wrappers


def gather(x: torch.Tensor, level: int, size: int) -> torch.Tensor:
    """The values of ``x`` in all samples of ``level``, along a new first axis that is the same for all samples."""
    x = wrappers.alive(x)
    if not levels.is_batched_at(x, level):
        return x.unsqueeze(0).expand(size, *x.shape)
    if levels.depth() == level:
        value, axis = levels.unwrap_batched(x, level)
        return value.movedim(axis, 0)
    transform: Any = lowered.innermost()
    through = _through_map if transform.is_map else _through_forward if transform.is_forward else _through_reverse
    return through(transform, x, level, size)


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


def part(value: torch.Tensor, level: int, size: int) -> torch.Tensor:
    """An equal part of ``value`` for each sample of ``level``, which has none of its own: the sum over them is ``value``."""
    return value / max(size, 1) * (number(level, size, value.device) >= 0)


def pick(full: torch.Tensor, places: list[int]) -> torch.Tensor:
    """The entries of ``full`` at these places of its first axis, in a tensor of its own."""
    result: torch.Tensor = overlay.call(operator.getitem, (full, places), {})
    return result


def copy(x: torch.Tensor) -> torch.Tensor:
    """A copy, so that what is written into the result of a look does not reach what was looked at."""
    return overlay.call(torch.clone, (x,), {}) if overlay.is_traced() else x.clone()


def _through_map(transform: lowered.Transform, x: torch.Tensor, level: int, size: int) -> torch.Tensor:
    value, axis = levels.unwrap_batched(x, transform.level)
    with transform.below():
        full = gather(value if axis is None else value.movedim(axis, 0), level, size)
    result: torch.Tensor = full if axis is None else levels.add_batch_dim(full, 1, transform.level)
    return result


def _through_forward(transform: lowered.Transform, x: torch.Tensor, level: int, size: int) -> torch.Tensor:
    primal, tangent = transform.unpacked(x)
    with transform.below():
        full = gather(primal, level, size)
        moved = None if tangent is None else gather(tangent, level, size)
    return full if moved is None else transform.packed(full, moved)


def _through_reverse(transform: lowered.Transform, x: torch.Tensor, level: int, size: int) -> torch.Tensor:
    (lifted,) = transform.lifted([x])
    if lifted.requires_grad:
        result: torch.Tensor = _Gather.run(lifted, transform, level, size)
        return result
    with transform.below():
        return gather(transform.taken(lifted), level, size)


class _Gather(lowered.AtOneLevel):
    """:func:`gather` in reverse mode."""

    @staticmethod
    def forward(x: torch.Tensor, transform: lowered.Transform, level: int, size: int) -> torch.Tensor:
        with lowered.differentiable(), transform.below():
            full = gather(transform.taken(x), level, size)
        return transform.given(full)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[torch.Tensor, lowered.Transform, int, int], output: torch.Tensor) -> None:
        _, _, ctx.level, ctx.size = inputs

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        return own(total(gradient, ctx.level, ctx.size), ctx.level, ctx.size), None, None, None
