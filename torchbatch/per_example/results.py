"""Memory for large results on the CPU, used again once nobody holds the last result.

Memory that was never written costs more than what is written into it: the system hands it out page by page, and zeroes it.
"""

from __future__ import annotations

import math
import weakref

import numpy as np
import torch
from torch import Tensor

LARGE = 2**20  # bytes from which on it pays
_ALIGNED = 64  # bytes


class Memory:
    """Blocks of memory, each lent to one tensor at a time. What a call does not take again is let go."""

    def __init__(self) -> None:
        self._free: dict[int, list[np.ndarray]] = {}

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor on the CPU with any numbers in it."""
        count = math.prod(shape) * dtype.itemsize
        free = self._free.get(count)
        try:
            block = free.pop() if free else _new(count)
        except IndexError:  # another thread was faster
            block = _new(count)
        lent = block[:]
        # The tensor holds ``lent``; where the last tensor with this storage goes, so does it.
        back = self._free.setdefault(count, []).append
        weakref.finalize(lent, back, block).atexit = False
        return torch.from_numpy(lent).view(dtype).view(shape)

    def let_go(self) -> None:
        """Give the system what nobody holds."""
        for free in tuple(self._free.values()):
            free.clear()


def _new(count: int) -> np.ndarray:
    block = np.empty(count + _ALIGNED, np.uint8)
    start = -block.ctypes.data % _ALIGNED
    return block[start : start + count]
