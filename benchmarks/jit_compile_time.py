"""How long does the first call take: with an empty cache on disk, and in a second process that finds the first one's cache?

    python benchmarks/jit_compile_time.py [--device cuda] [--quick] [--repeats N] [--only TEXT] [--json FILE]

Every first call is made in a process of its own, which has imported all packages before. It includes what the packages put
off until then, such as loading the compiler. With an empty cache, what generates a C++ kernel also compiles small programs
that try out the processor; the headers that PyTorch compiled before stay in their own folder, and are not compiled anew.
Where there is no kernel to generate, both are spared. JAX keeps no cache on disk unless told to, so it has no second number.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

import jax
import jax.numpy as jnp
import models
import side_by_side
import torch
import torch.nn.functional as F

import torchbatch

WORKS = {"layer": "vmap of a layer, 64 x 100, batch 16", "mlp": "per-example gradients, MLP, batch 32"}
CONTENDERS = {"jit": "torchbatch.jit", "torch.compile": "torch.compile(torch.func)", "jax": "jax.jit"}
SHAPES = {"layer": models.layers(100, 64), "mlp": models.layers(784, 128, 128, 10)}
AXES = {"layer": (None, 0), "mlp": (None, 0, 0)}
REPEATS = 3


def layer(p: Any, x: Any) -> Any:
    """``[100] -> [64]``, in PyTorch and in JAX."""
    return p["w1"] @ x + p["b1"]


def loss(p: Any, x: Any, y: Any) -> Any:
    """``[784], [] -> []``."""
    return F.cross_entropy(models.mlp(p, x), y)


def loss_jax(p: Any, x: Any, y: Any) -> Any:
    """The same in JAX."""
    return models.cross_entropy(models.mlp_jax(p, x), y)


def function(work: str, contender: str) -> Any:
    """What is called."""
    axes = AXES[work]
    if contender == "jit":
        return torchbatch.jit(torchbatch.vmap(layer if work == "layer" else torchbatch.grad(loss), in_axes=axes))
    if contender == "torch.compile":
        return torch.compile(torch.func.vmap(layer if work == "layer" else torch.func.grad(loss), in_dims=axes))
    return jax.jit(jax.vmap(layer if work == "layer" else jax.grad(loss_jax), in_axes=axes))


def arguments(work: str, contender: str, device: str) -> tuple[Any, ...]:
    """What it is called with."""
    p = models.made(SHAPES[work], device)
    batch = (torch.randn(16, 100, device=device),)
    if work == "mlp":
        batch = (torch.randn(32, 784, device=device), torch.randint(10, (32,), device=device))
    if contender != "jax":
        return (p, *batch)
    return jax.block_until_ready(jax.tree.map(lambda value: jnp.asarray(value.cpu().numpy()), (p, *batch)))


def first_call(work: str, contender: str, device: str) -> float:
    """Seconds of this process's first call."""
    torch.set_num_threads(1)
    fun, args = function(work, contender), arguments(work, contender, device)
    start = time.perf_counter()
    found = fun(*args)
    if contender == "jax":
        jax.block_until_ready(found)
    elif device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def in_a_process(work: str, contender: str, device: str, cache: str) -> float:
    """``first_call`` in a new process with this cache."""
    places = {"TORCHINDUCTOR_CACHE_DIR": cache, "TRITON_CACHE_DIR": f"{cache}/triton"}
    without = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    command = [sys.executable, __file__, "--device", device, "--first-call", work, contender]
    done = subprocess.run(command, env=without | places, stdout=subprocess.PIPE, text=True, check=True)
    return float(done.stdout.split()[-1])


def measured(work: str, contender: str, device: str, repeats: int) -> dict[str, list[float]]:
    """Seconds of the first call, a number for each repeat."""
    found: dict[str, list[float]] = {"empty cache": [], "filled cache": []}
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as cache:
            for numbers in list(found.values())[: 1 if contender == "jax" else 2]:
                numbers.append(in_a_process(work, contender, device, cache))
    return {name: numbers for name, numbers in found.items() if numbers}


def as_line(label: str, found: dict[str, list[float]]) -> str:
    """A line of the table: medians."""
    cells = (f"{statistics.median(found[name]):.2f} s" if name in found else "-" for name in ("empty cache", "filled cache"))
    return f"  {label:38}" + "".join(f"{cell:>15}" for cell in cells)


def main(options: argparse.Namespace) -> None:
    """Measure, print the table, and write the figures where asked."""
    rows = []
    print(f"{'first call':40}{'empty cache':>15}{'filled cache':>15}")
    for work, name in list(WORKS.items())[: 1 if options.quick else None]:
        if options.only not in name:
            continue
        print(name)
        for contender, label in CONTENDERS.items():
            found = measured(work, contender, options.device, 1 if options.quick else options.repeats)
            rows.append({"work": name, "contender": contender, "seconds": found})
            print(as_line(label, found), flush=True)
    side_by_side.write(options.json, options.device, rows)


if __name__ == "__main__":
    parser = side_by_side.parser(__doc__)
    parser.set_defaults(repeats=REPEATS)
    parser.add_argument("--quick", action="store_true", help="each first call once, and the layer only")
    parser.add_argument("--only", default="", help="only what has this text in its name")
    parser.add_argument("--first-call", nargs=2, help=argparse.SUPPRESS)
    options = side_by_side.started(parser)
    if options.first_call:
        print(first_call(*options.first_call, options.device))
    else:
        main(options)
