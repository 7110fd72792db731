"""By how much the peak of a process's memory grows in one call, as Linux counts it."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path
from typing import Any

from side_by_side import Call


def growth(call: Call) -> int:
    """Bytes by which the peak of this process grows in the second call."""
    call()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is what there is now
    before = _peak()
    call()
    return _peak() - before


def _peak() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def in_fresh_process(file: str, *about: Any) -> float | None:
    """What a benchmark prints last when it is called with ``--peak`` and what is to be measured; None if it fails."""
    done = subprocess.run([sys.executable, file, "--peak", *map(str, about)], check=False, capture_output=True, text=True)
    return float(done.stdout.splitlines()[-1]) if done.returncode == 0 else None
