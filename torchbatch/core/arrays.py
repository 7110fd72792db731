"""What counts as an array, and how it becomes a tensor."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

_WIDE = ("torch.float64", "torch.complex128", "float64", "complex128")

def as_tensor(value: Any) -> torch.Tensor | None:
    """A tensor as it is; Python numbers, NumPy arrays and scalars, and anything with ``__array__`` as a tensor; else None.

    None too for numbers that no dtype of PyTorch can hold.

    Memory is shared with a NumPy array where PyTorch can: not if it is read-only, runs backwards or has a foreign byte order.
    """
    if isinstance(value, torch.Tensor):
        return value
    if isinstance(value, bool | int | float | complex):
        fits = not isinstance(value, int) or -(2**63) <= value < 2**63
        return torch.as_tensor(value) if fits else None
    if not hasattr(value, "__array__"):
        return None
    array = np.asarray(value)
    if array.dtype.kind not in "biufc" or array.dtype.char in "gG":  # PyTorch has no longdouble
        return None
    array = np.asarray(array, dtype=array.dtype.newbyteorder("="))
    shareable = array.flags.writeable and all(stride >= 0 for stride in array.strides)
    return torch.as_tensor(array if shareable else array.copy())


def as_tensor_beside(value: Any, others: Iterable[Any]) -> torch.Tensor | None:
    """As :func:`as_tensor`, but a Python number keeps its digits where an array beside it has 64 bits."""
    if type(value) in (float, complex) and any(_is_wide(other) for other in others):
        return torch.tensor(value, dtype=torch.float64 if type(value) is float else torch.complex128)
    return as_tensor(value)


def _is_wide(value: Any) -> bool:
    return str(getattr(value, "dtype", None)) in _WIDE
