"""What the benchmarks share: contenders that take turns in one process, the machine in words, and the command line."""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import torchbatch

Call = Callable[[], Any]
BUDGET = 0.02  # seconds that one contender runs in one round
WARM_UP = 20  # calls before the first round


def check(name: str, calls: Sequence[Call], **tolerance: float) -> None:
    """Stop if the contenders disagree; their results may be tensors, NumPy's or JAX's arrays."""
    expected = torchbatch.tree.leaves(calls[0]())
    for call in calls[1:]:
        for a, b in zip(expected, torchbatch.tree.leaves(call()), strict=True):
            torch.testing.assert_close(
                _tensor(b), _tensor(a), msg=lambda text: f"{name}: {text}", check_dtype=False, check_stride=False, **tolerance
            )


def _tensor(value: Any) -> torch.Tensor:
    return value if isinstance(value, torch.Tensor) else torch.from_numpy(np.array(value))


def measure(calls: Sequence[Call], repeats: int, device: str) -> list[float]:
    """Median seconds per call of each contender; they take turns in every round."""
    return [statistics.median(found) for found in rounds(calls, repeats, device)]


def rounds(calls: Sequence[Call], repeats: int, device: str) -> list[list[float]]:
    """Seconds per call of each contender in each round; they take turns in every round."""
    times: list[list[float]] = [[] for _ in calls]
    counts = [_count(call, device) for call in calls]
    order = list(range(len(calls)))
    for _ in range(repeats):
        for i in order:
            times[i].append(_time(calls[i], counts[i], device) / counts[i])
        order.append(order.pop(0))  # who came before leaves its mark on caches and memory
    return times


def _count(call: Call, device: str) -> int:
    """How often a contender is called in one round; what takes long is not warmed up by more than one call."""
    once = _time(call, 1, device)
    if once < BUDGET:
        once = _time(call, WARM_UP, device) / WARM_UP
    return max(1, int(BUDGET / max(once, 1e-8)))


def _time(call: Call, count: int, device: str) -> float:
    start = time.perf_counter()
    for _ in range(count):
        call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def machine(device: str) -> str:
    """The machine, in words."""
    processor = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            processor = line.partition(":")[2].strip()
            break
    gpu = f", {torch.cuda.get_device_name()}" if device == "cuda" else ""
    return f"{processor}, {torch.get_num_threads()} thread(s){gpu}, torch {torch.__version__}, Python {platform.python_version()}"


def parser(description: str | None) -> argparse.ArgumentParser:
    """The command line that all benchmarks have."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    made.add_argument("--json", type=Path)
    made.add_argument("--repeats", type=int, default=15)
    return made


def options(description: str | None) -> argparse.Namespace:
    """The command line of a benchmark; one thread from here on."""
    return started(parser(description))


def started(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Read the command line, and print the machine; one thread from here on."""
    found = parser.parse_args()
    torch.set_num_threads(1)
    print(machine(found.device), flush=True)
    return found


def write(file: Path | None, device: str, figures: list[dict[str, Any]]) -> None:
    """Write the figures with the machine they were taken on, if a file is given."""
    if file is not None:
        file.write_text(json.dumps({"machine": machine(device), "rows": figures}, indent=1))
