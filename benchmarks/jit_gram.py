"""What does a Gram matrix of the RBF kernel cost, written for two vectors and mapped twice?

    python benchmarks/jit_gram.py [--device cuda] [--quick] [--repeats N] [--only TEXT] [--json FILE] [--plot FILE]

Beside the time, the memory: in a fresh process for each contender, by how much the peak of the resident memory grows in one
call, after a first one. The result has N² numbers; an intermediate with N²·D of them would show. (Not for JAX, which keeps
memory that it once had.)
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from typing import Any

import contenders
import jax
import jax.numpy as jnp
import peak_memory
import torch
from contenders import ORDER, Work

import torchbatch

ASKED = {"torch.compile": 1.0, "jax": 1.0}
SIZES = [(512, 3), (2000, 3), (4000, 3), (512, 64), (2000, 64), (4000, 64)]
TOO_MUCH = 4e9  # bytes that an operator-by-operator run may take


def kernel(x, y):
    """``[d], [d] -> []``."""
    return torch.exp(-0.5 * ((x - y) ** 2).sum())


def kernel_jax(x, y):
    """The same in JAX."""
    return jnp.exp(-0.5 * ((x - y) ** 2).sum())


def gram(vmap: Any, kernel: Any) -> Any:
    """``[n, d], [n, d] -> [n, n]``."""
    return vmap(vmap(kernel, (None, 0)), (0, None))


def by_hand(x, y):
    """By the binomial formula, which needs a matrix product only and loses digits where points are close."""
    squares = (x * x).sum(1)[:, None] + (y * y).sum(1)[None] - 2 * (x @ y.T)
    return torch.exp(-0.5 * squares.clamp(min=0))


def work(n: int, d: int, device: str) -> Work:
    """One size."""
    torch.manual_seed(0)
    x, y = (torch.randn(n, d, device=device) / d**0.5 for _ in range(2))
    calls = contenders.contenders(
        gram(torchbatch.vmap, kernel), gram(torch.func.vmap, kernel), gram(jax.vmap, kernel_jax), by_hand, (x, y)
    )
    if 3 * 4 * n * n * d > TOO_MUCH:
        del calls["torch.func"], calls["eager"]
    return Work(f"RBF Gram matrix, N = {n}, D = {d}", calls, ASKED, 1e-4)


def works(device: str, quick: bool) -> Iterator[Work]:
    """All sizes."""
    for n, d in SIZES:
        if not quick or n < 4000:
            yield work(n, d, device)


def peak(n: int, d: int, name: str) -> float:
    """Bytes by which the peak of this process grows in one call."""
    return peak_memory.growth(work(n, d, "cpu").calls[name])


def peaks(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Print by how much each contender's peak grows, in units of the result."""
    print("peak of memory in one call, as a multiple of the result's N² numbers" + " " * 8 + "D = one N²·D intermediate")
    found = []
    for n, d in SIZES:
        if n >= 2000 and (n == 2000 or not options.quick):
            size = 4 * n * n
            names = [name for name in work(n, d, "cpu").calls if name != "jax"]
            row = {name: _peak(n, d, name) / size for name in ORDER if name in names}
            print(f"N = {n}, D = {d:<4}" + "".join(f"{name:>15} {multiple:5.2f}" for name, multiple in row.items()), flush=True)
            found.append({"n": n, "d": d, "result": size, "peak / result": row, "no N²·D intermediate": row["jit"] < min(d, 2.5)})
    return found


def _peak(n: int, d: int, name: str) -> float:
    found = peak_memory.in_fresh_process(__file__, n, d, name)
    if found is None:
        raise SystemExit(f"the peak of {name} for N = {n}, D = {d} could not be measured")
    return found


def main() -> None:
    """Times, then memory."""
    if sys.argv[1:2] == ["--peak"]:
        torch.set_num_threads(1)
        print(peak(int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]))
        return
    options = contenders.options(__doc__)
    contenders.run(works(options.device, options.quick), options)
    if options.device == "cpu":
        memory = peaks(options)
        if options.json is not None:
            options.json.write_text(json.dumps(json.loads(options.json.read_text()) | {"memory": memory}, indent=1))


if __name__ == "__main__":
    main()
