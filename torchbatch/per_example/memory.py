"""How many examples fit into the memory, found by following a trace for a few of them."""

from __future__ import annotations

import contextlib
import importlib
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

SHARE = 0.6  # of the free memory that may be filled: allocators need more than the tensors have
_FEW, _MORE = 2, 4  # examples that are measured; one alone may be worked on in another way
_LONG = 3.0  # seconds from which on progress is shown


def free(device: torch.device) -> int:
    """The bytes that are free on a device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def fitting(bytes_for: Callable[[int], int], count: int, budget: int) -> int:
    """How many of ``count`` examples can be worked on at a time within ``budget`` bytes, if each takes as many as the others.

    At least one, even if that one does not fit. Chunks are made about equal.
    """
    if count <= _FEW:
        return max(count, 1)
    few, more = bytes_for(_FEW), bytes_for(_MORE)
    each = max((more - few) / (_MORE - _FEW), 1)
    most = max(int((budget - (few - _FEW * each)) / each), 1)
    return math.ceil(count / math.ceil(count / most))


class Progress:
    """A progress bar on the standard error, if what is done takes long and ``tqdm`` is installed."""

    def __init__(self, who: str, count: int, is_shown: bool) -> None:
        self._who, self._count, self._is_shown = who, count, is_shown
        self._start, self._done = time.monotonic(), 0
        self._bar: Any = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: Any) -> None:
        if self._bar is not None:
            self._bar.close()

    def update(self, count: int) -> None:
        """So many more examples are done."""
        self._done += count
        if self._bar is not None:
            self._bar.update(count)
        elif self._is_shown and self._done < self._count and self._expected() > _LONG:
            with contextlib.suppress(ImportError):  # a bar is no result; without tqdm there is none
                self._bar = importlib.import_module("tqdm").tqdm(total=self._count, initial=self._done, desc=self._who)

    def _expected(self) -> float:
        """Seconds for all examples."""
        return (time.monotonic() - self._start) * self._count / max(self._done, 1)
