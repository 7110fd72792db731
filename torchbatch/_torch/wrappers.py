"""The wrappers that transforms put around a tensor, and what is inside one.

Private names used, seen on torch 2.11, 2.13 and 2.15: ``torch._C._functorch.maybe_get_level``, ``get_unwrapped``,
``unwrap_if_dead``.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch._C import _functorch


def layers(tensor: torch.Tensor, level: int) -> Iterator[torch.Tensor]:
    """``tensor``, what it wraps, what that wraps, …, down to the first that no transform deeper than ``level`` made."""
    yield tensor
    while _functorch.maybe_get_level(tensor) > level:
        tensor = _functorch.get_unwrapped(tensor)
        yield tensor


def alive(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` without the wrappers of transforms that have finished, which some operations do not look through."""
    while True:
        inner: torch.Tensor = _functorch.unwrap_if_dead(tensor)
        if inner is tensor:
            return tensor
        tensor = inner
