"""What the benchmarks share: contenders that take turns in one process, the machine in words, and the command line."""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import torchbatch

Call = Callable[[], Any]
BUDGET = 0.02  # seconds that one contender runs in one round


def check(name: str, calls: list[Call]) -> None:
    """Stop if the contenders disagree."""
    results = [torchbatch.tree.leaves(call()) for call in calls]
    for others in results[1:]:
        for a, b in zip(results[0], others, strict=True):
            torch.testing.assert_close(a, b, msg=lambda text: f"{name}: {text}")


def measure(calls: list[Call], repeats: int, device: str) -> list[float]:
    """Median seconds per call of each contender; they take turns in every round."""
    times: list[list[float]] = [[] for _ in calls]
    counts = [max(1, int(BUDGET / max(_time(call, 20, device) / 20, 1e-8))) for call in calls]
    for _ in range(repeats):
        for call, count, found in zip(calls, counts, times, strict=True):
            found.append(_time(call, count, device) / count)
    return [statistics.median(found) for found in times]


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


def options(description: str | None) -> argparse.Namespace:
    """The command line of a benchmark; one thread from here on."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--repeats", type=int, default=15)
    found = parser.parse_args()
    torch.set_num_threads(1)
    print(machine(found.device))
    return found


def write(file: Path | None, device: str, figures: list[dict[str, Any]]) -> None:
    """Write the figures with the machine they were taken on, if a file is given."""
    if file is not None:
        file.write_text(json.dumps({"machine": machine(device), "rows": figures}, indent=1))
