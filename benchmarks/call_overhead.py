"""What does one call of a mapped function cost, next to torch.func.vmap and to the function written by hand for a batch?

    python benchmarks/call_overhead.py [--device cuda] [--json FILE] [--repeats N]

Each row first checks that all contenders give the same answer. Then they run in turn, A B A B, in this one process; a figure is
the median over the rounds. Only the ratios are worth quoting, and only with the machine that is printed above them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import side_by_side
import torch
from side_by_side import Call

import torchbatch


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
        row("torch.func's gradient", torch.func.grad(lambda v: (v * v).sum()), (matrix,), 0, lambda v: 2 * v, 1),
        gradient(matrix),
        nested(matrix),
        made_anew(x),
    ]


def row(name: str, fun: Callable[..., Any], args: Any, axes: Any, by_hand: Callable[..., Any], at_least: float) -> Row:
    """The same function mapped by torchbatch and by torch.func."""
    ours = torchbatch.vmap(fun, in_axes=axes)
    theirs = torch.func.vmap(fun, in_dims=axes)
    return Row(name, lambda: ours(*args), lambda: theirs(*args), lambda: by_hand(*args), at_least)


def gradient(matrix: torch.Tensor) -> Row:
    """Each its own ``grad``."""

    def loss(v: torch.Tensor) -> torch.Tensor:
        return (v * v).sum()

    ours, theirs = torchbatch.vmap(torchbatch.grad(loss)), torch.func.vmap(torch.func.grad(loss))
    return Row("gradient", lambda: ours(matrix), lambda: theirs(matrix), lambda: 2 * matrix, 1)


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


def main() -> None:
    """Measure, print a table, and write the figures where asked."""
    options = side_by_side.options(__doc__)
    print(f"{'call':28}{'torchbatch':>12}{'torch.func':>12}{'by hand':>10}{'cheaper than torch.func':>26}{'asked':>8}")
    figures = []
    for entry in rows(options.device):
        calls = [entry.ours, entry.torch_func, entry.by_hand]
        side_by_side.check(entry.name, calls)
        ours, theirs, hand = side_by_side.measure(calls, options.repeats, options.device)
        print(
            f"{entry.name:28}{ours * 1e6:9.1f} us{theirs * 1e6:9.1f} us{hand * 1e6:7.1f} us{theirs / ours:23.1f} x"
            f"{entry.at_least:6.0f} x"
        )
        figures.append({"call": entry.name, "torchbatch": ours, "torch_func": theirs, "by_hand": hand})
    side_by_side.write(options.json, options.device, figures)


if __name__ == "__main__":
    main()
