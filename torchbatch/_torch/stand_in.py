"""Tensors that have a shape, a dtype and a device, and no memory; a trace takes them in the place of real ones.

Private names used, seen on torch 2.11, 2.13 and 2.15: ``torch._subclasses.fake_tensor.FakeTensorMode``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch._subclasses.fake_tensor import FakeTensorMode


def stand_in(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A tensor that costs nothing, however large it is; its numbers cannot be read."""
    with FakeTensorMode():
        return torch.empty(tuple(shape), dtype=dtype, device=device)
