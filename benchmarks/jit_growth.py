"""How does the time of a call grow with the batch?  tanh(W @ x + b), where W is 64 x 100, for batches of 1 to 65536.

    python benchmarks/jit_growth.py [--device cuda] [--quick] [--repeats N] [--json FILE] [--plot FILE]

"jit dynamic" is one function with dynamic=True for all batches; the others that compile do so for each.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NamedTuple

import contenders
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import side_by_side
import torch
import torch.nn.functional as F
from side_by_side import Call

import torchbatch

NAMES = {
    "by hand": "torch, by hand",
    "torch.func": "torch.func.vmap",
    "torch.compile": "torch.compile(torch.func.vmap)",
    "eager": "torchbatch.vmap",
    "jit": "jit(torchbatch.vmap)",
    "jit dynamic": "jit(torchbatch.vmap, dynamic=True)",
    "jax": "jax.jit(jax.vmap)",
    "loop": "Python loop",
}
COLOURS = contenders.COLOURS | {"jit dynamic": contenders.COLOURS["jit"]}
LONGEST_LOOP = 256
TOLERANCE = 1e-4


def layer(W: torch.Tensor, b: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """``[64, 100], [64], [100] -> [64]``."""
    return torch.tanh(torch.mv(W, x) + b)


def layer_jax(W: Any, b: Any, x: Any) -> Any:
    """The same in JAX."""
    return jnp.tanh(W @ x + b)


def layer_by_hand(W: torch.Tensor, b: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """``[64, 100], [64], [n, 100] -> [n, 64]``."""
    return torch.tanh(F.linear(x, W, b))


AXES = (None, None, 0)
ours = torchbatch.vmap(layer, in_axes=AXES)
ours_dynamic = torchbatch.jit(ours, dynamic=True)


class Row(NamedTuple):
    """Seconds per call of each contender for one batch."""

    batch: int
    seconds: dict[str, float]

    def as_row(self) -> dict[str, Any]:
        """For the JSON file."""
        return {"batch": self.batch, "seconds": self.seconds}

    def as_line(self) -> str:
        """A line of the table."""
        cells = (contenders.duration(self.seconds[name]) if name in self.seconds else "-" for name in NAMES)
        return f"{self.batch:>8}" + "".join(f"{cell:>15}" for cell in cells)


def calls(batch: int, device: str) -> dict[str, Call]:
    """All contenders, for one batch."""
    W, b, x = torch.randn(64, 100, device=device) / 10, torch.randn(64, device=device), torch.randn(batch, 100, device=device)
    theirs, in_jax = torch.func.vmap(layer, in_dims=AXES), jax.vmap(layer_jax, in_axes=AXES)
    found = contenders.contenders(ours, theirs, in_jax, layer_by_hand, (W, b, x))
    found["jit dynamic"] = lambda: ours_dynamic(W, b, x)
    if batch <= LONGEST_LOOP:
        found["loop"] = lambda: torch.stack([layer(W, b, one) for one in x])
    return found


def measured(batch: int, options: argparse.Namespace) -> Row:
    """Check and time one batch."""
    torch.compiler.reset()  # torch.compile would take the second size for one of many, and leave it open
    found = calls(batch, options.device)
    side_by_side.check(f"batch {batch}", list(found.values()), rtol=TOLERANCE, atol=TOLERANCE)
    return Row(batch, dict(zip(found, side_by_side.measure(list(found.values()), options.repeats, options.device), strict=True)))


def draw(rows: list[Row], file: Path) -> None:
    """A line for each contender, with logarithmic axes."""
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for name, label in NAMES.items():
        points = [(row.batch, row.seconds[name] * 1e6) for row in rows if name in row.seconds]
        style = "--" if name == "jit dynamic" else "-"
        width = 2.2 if name == "jit" else 1.4
        axes.plot(*zip(*points, strict=True), style, marker="o", markersize=4, color=COLOURS[name], label=label, linewidth=width)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks([row.batch for row in rows], [str(row.batch) for row in rows])
    axes.minorticks_off()
    axes.set_xlabel("batch size")
    axes.set_ylabel("microseconds per call")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, frameon=False)
    figure.savefig(file)


def main(options: argparse.Namespace) -> None:
    """Measure, print the table, and write the figures and the plot where asked."""
    torch.manual_seed(0)
    contenders.keep_memory()
    print(" " * 8 + "".join(f"{name:>15}" for name in NAMES))
    rows = []
    for batch in (1, 64, 1024) if options.quick else (1, 16, 256, 4096, 65536):
        rows.append(measured(batch, options))
        print(rows[-1].as_line(), flush=True)
    side_by_side.write(options.json, options.device, [row.as_row() for row in rows])
    if options.plot is not None:
        draw(rows, options.plot)


if __name__ == "__main__":
    main(contenders.options(__doc__))
