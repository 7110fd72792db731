"""Fake tensors that stand for real ones where only shape, strides, dtype and device matter.

Private names used, seen on torch 2.11, 2.13 and 2.15: ``torch._subclasses.fake_tensor.FakeTensorMode``.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensorMode


class Like(NamedTuple):
    """A tensor without its numbers; it can be pickled."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    requires_grad: bool

    @classmethod
    def of(cls, value: torch.Tensor) -> Like:
        """What is known of a tensor."""
        return cls(tuple(value.size()), tuple(value.stride()), value.dtype, value.device, value.requires_grad)


def new_mode() -> FakeTensorMode:
    """A mode for fake tensors of fixed sizes, in which a graph may hold real constants."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def stand_ins(likes: Iterable[Like], mode: FakeTensorMode | None = None) -> list[torch.Tensor]:
    """A fake tensor for each."""
    with mode or new_mode():
        return [
            torch.empty_strided(like.size, like.stride, dtype=like.dtype, device=like.device, requires_grad=like.requires_grad)
            for like in likes
        ]
