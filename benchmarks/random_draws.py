"""What do random draws cost, next to JAX's and to PyTorch's own?

    python benchmarks/random_draws.py [--device cuda] [--quick] [--repeats N] [--json FILE]

The contenders take turns in one process, on one thread. Before they do, what torchbatch draws is compared with JAX's numbers, bit
by bit. At the end, in fresh processes without caches: how long a function with eight draws takes to compile.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
import side_by_side
import torch

from torchbatch import jit, random, vmap

Draw = Callable[..., Any]
MOST_SECONDS = 10.0


class Work(NamedTuple):
    """One draw: ours, JAX's, PyTorch's own, and what our compiled one may cost as a multiple of each of the others."""

    name: str
    ours: Draw
    theirs: Draw
    torchs: Draw
    asked: dict[str, float]
    exact: bool = True


def works(device: str, quick: bool) -> Iterator[Work]:
    """All draws."""
    count = 10**5 if quick else 10**6
    side = 300 if quick else 1000
    wide = 512 if quick else 4096
    x = torch.ones(wide, wide, device=device)
    theirs = jax.numpy.asarray(np.ones((wide, wide), np.float32))
    on = {"device": device}
    yield Work(
        f"{count:,} normals",
        lambda key: random.normal(key, (count,)),
        lambda key: jax.random.normal(key, (count,)),
        lambda: torch.randn(count, **on),
        {"jax": 1.0, "torch": 1.3},
    )
    yield Work(
        f"{count:,} words of bits",
        lambda key: random.bits(key, (count,)),
        lambda key: jax.random.bits(key, (count,)),
        lambda: torch.randint(-(2**31), 2**31, (count,), dtype=torch.int32, **on),
        {"jax": 1.0},
    )
    yield Work(
        f"{side:,} keys, {side:,} normals each, mapped",
        lambda key: vmap(lambda key: random.normal(key, (side,)))(random.split(key, side)),
        lambda key: jax.vmap(lambda key: jax.random.normal(key, (side,)))(jax.random.split(key, side)),
        lambda: torch.randn(side, side, **on),
        {"jax": 1.0},
    )
    yield Work(
        f"dropout, {wide} x {wide}",
        lambda key: random.dropout(key, x, 0.1),
        lambda key: jax.numpy.where(jax.random.bernoulli(key, 0.9, theirs.shape), theirs / 0.9, 0.0),
        lambda: torch.nn.functional.dropout(x, 0.1),
        {"jax": 1.0},
        exact=False,
    )
    yield Work("one normal", random.normal, jax.random.normal, lambda: torch.randn((), **on), {})


def run(work: Work, options: argparse.Namespace) -> dict[str, Any]:
    """Check one draw, measure it and print the result."""
    key, theirs = random.key(7).to(options.device), jax.random.key(7)
    compiled, compiled_jax = jit(work.ours), jax.jit(work.theirs)
    calls: dict[str, Callable[[], Any]] = {
        "jit": lambda: compiled(key),
        "eager": lambda: work.ours(key),
        "jax": lambda: compiled_jax(theirs).block_until_ready(),
        "torch": work.torchs,
    }
    tolerance = {"rtol": 0.0, "atol": 0.0} if work.exact else {"rtol": 1e-6, "atol": 0.0}
    as_numbers = [lambda name=name: plain(calls[name]()) for name in ("jax", "eager", "jit")]
    side_by_side.check(work.name, as_numbers, **tolerance)
    seconds = dict(zip(calls, side_by_side.measure(list(calls.values()), options.repeats, options.device), strict=True))
    ratios = {name: seconds["jit"] / seconds[name] for name in work.asked}
    met = {name: ratios[name] <= most for name, most in work.asked.items()}
    times = "  ".join(f"{name} {value * 1e6:10.1f} us" for name, value in seconds.items())
    verdict = "  ".join(f"jit/{name} {ratios[name]:.2f} {'ok' if met[name] else 'MISSED'}" for name in ratios)
    print(f"{work.name:40} {times}  {verdict}", flush=True)
    return {"name": work.name, "seconds": seconds, "ratios": ratios, "met": met}


def plain(value: Any) -> torch.Tensor:
    """Numbers that can be compared: words as signed ones."""
    if isinstance(value, torch.Tensor):
        return value.cpu().view(torch.int32) if value.dtype is torch.uint32 else value.cpu()
    array = np.array(value)
    return torch.from_numpy(array.view(np.int32) if array.dtype == np.uint32 else array)


def eight(key: Any) -> list[torch.Tensor]:
    """A function with eight draws."""
    keys = random.split(key, 8)
    return [
        random.normal(keys[0], (1000, 3)),
        random.uniform(keys[1], (500,)),
        random.bernoulli(keys[2], 0.3, (77, 7)),
        random.randint(keys[3], (64,), 0, 10),
        random.exponential(keys[4], (33,)),
        random.gumbel(keys[5], (12, 5)),
        random.normal(keys[6], (256,)),
        random.dropout(keys[7], torch.ones(40, 40), 0.5),
    ]


def seconds_to_compile() -> float:
    """In this process, which must be fresh."""
    jit(lambda x: x + 1)(torch.zeros(3))  # the compiler itself is loaded
    start = time.perf_counter()
    jit(eight)(random.key(0))
    return time.perf_counter() - start


def compile_times() -> dict[str, Any]:
    """Print how long it takes in a fresh process with an empty cache."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": folder}
        command = [sys.executable, __file__, "--compile"]
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    seconds = float(done.stdout.splitlines()[-1])
    print(f"a function with 8 draws compiles in {seconds:.1f} s  {'ok' if seconds < MOST_SECONDS else 'MISSED'}", flush=True)
    return {"name": "8 draws", "seconds to compile": seconds, "met": seconds < MOST_SECONDS}


def main() -> None:
    """Times of calls, then of a compilation."""
    if sys.argv[1:] == ["--compile"]:
        print(seconds_to_compile())
        return
    parser = side_by_side.parser(__doc__)
    parser.add_argument("--quick", action="store_true")
    options = side_by_side.started(parser)
    figures = [run(work, options) for work in works(options.device, options.quick)]
    if options.device == "cpu":
        figures.append(compile_times())
    side_by_side.write(options.json, options.device, figures)


if __name__ == "__main__":
    main()
