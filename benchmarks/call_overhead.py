"""What does one call of a mapped function cost, next to torch.func.vmap and to the function written by hand for a batch?

    python benchmarks/call_overhead.py [--device cuda] [--json FILE] [--repeats N]

Each row first checks that all contenders give the same answer. Then they run in turn, A B A B, in this one process; a figure is
the median over the rounds. Only the ratios are worth quoting, and only with the machine that is printed above them.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

import torchbatch

Call = Callable[[], Any]
BUDGET = 0.02  # seconds that one contender runs in one round


class Row(NamedTuple):
    """One kind of call: what torchbatch, torch.func and handwritten torch run, and the ratio to reach."""

    name: str
    ours: Call
    torch_func: Call
    by_hand: Call
    at_least: float  # how many times cheaper than torch.func.vmap the call must be


def rows(device: str) -> list[Row]:
    """The calls that are measured."""
    x = torch.arange(8.0, device=device)
    matrix = torch.arange(24.0, device=device).reshape(8, 3)
    params = {f"p{i}": torch.full((3,), float(i), device=device) for i in range(20)}
    return [
        row("identity", lambda v: v, (x,), 0, lambda v: v, 8),
        row("x * 2 + 1 on 8 numbers", lambda v: v * 2 + 1, (x,), 0, lambda v: v * 2 + 1, 3),
        row("20 parameters unmapped", lambda p, v: v + p["p3"], (params, matrix), (None, 0), lambda p, v: v + p["p3"], 5),
        row("a dict of 20 mapped", lambda d: d["p3"], (dict.fromkeys(params, x),), 0, lambda d: d["p3"], 1),
        row("two arguments", lambda a, b: a + b, (x, x), 0, lambda a, b: a + b, 1),
        row("last axis", lambda v: v.sum(), (matrix,), -1, lambda v: v.sum(0), 1),
        row("a dict returned", lambda v: {"a": v, "b": v + 1}, (x,), 0, lambda v: {"a": v, "b": v + 1}, 1),
        row("gradient", torch.func.grad(lambda v: (v * v).sum()), (matrix,), 0, lambda v: 2 * v, 1),
        nested(matrix),
        made_anew(x),
    ]


def row(name: str, fun: Callable[..., Any], args: Any, axes: Any, by_hand: Callable[..., Any], at_least: float) -> Row:
    """The same function mapped by torchbatch and by torch.func."""
    ours = torchbatch.vmap(fun, in_axes=axes)
    theirs = torch.func.vmap(fun, in_dims=axes)
    return Row(name, lambda: ours(*args), lambda: theirs(*args), lambda: by_hand(*args), at_least)


def nested(matrix: torch.Tensor) -> Row:
    """Every pair of rows, by two maps."""
    ours = torchbatch.vmap(torchbatch.vmap(torch.dot, in_axes=(None, 0)), in_axes=(0, None))
    theirs = torch.func.vmap(torch.func.vmap(torch.dot, in_dims=(None, 0)), in_dims=(0, None))
    return Row(
        "every pair, two maps", lambda: ours(matrix, matrix), lambda: theirs(matrix, matrix), lambda: matrix @ matrix.T, 1
    )


def made_anew(x: torch.Tensor) -> Row:
    """``vmap(f)(x)`` written on one line, so that the wrapper is made on every call too."""

    def f(v: torch.Tensor) -> torch.Tensor:
        return v * 2

    return Row("vmap(f)(x), made anew", lambda: torchbatch.vmap(f)(x), lambda: torch.func.vmap(f)(x), lambda: x * 2, 1)


def check(entry: Row) -> None:
    """Stop if the contenders disagree."""
    results = [torchbatch.tree.leaves(call()) for call in (entry.ours, entry.torch_func, entry.by_hand)]
    for others in results[1:]:
        for a, b in zip(results[0], others, strict=True):
            torch.testing.assert_close(a, b)


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


def main() -> None:
    """Measure, print a table, and write the figures where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(machine(options.device))
    print(f"{'call':28}{'torchbatch':>12}{'torch.func':>12}{'by hand':>10}{'cheaper than torch.func':>26}{'asked':>8}")
    figures = []
    for entry in rows(options.device):
        check(entry)
        ours, theirs, hand = measure([entry.ours, entry.torch_func, entry.by_hand], options.repeats, options.device)
        print(
            f"{entry.name:28}{ours * 1e6:9.1f} us{theirs * 1e6:9.1f} us{hand * 1e6:7.1f} us{theirs / ours:23.1f} x"
            f"{entry.at_least:6.0f} x"
        )
        figures.append({"call": entry.name, "torchbatch": ours, "torch_func": theirs, "by_hand": hand})
    if options.json is not None:
        options.json.write_text(json.dumps({"machine": machine(options.device), "rows": figures}, indent=1))


if __name__ == "__main__":
    main()
