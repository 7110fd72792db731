"""Who takes part in the benchmarks of jit, and what each of them prints: a table with times, ratios and what was asked.

Every contender gives its answer before it is timed, and all answers must agree. Then they run in turn, A B A B, in one
process and one thread. Compiled ones get an empty cache on disk for their first call, whose time is printed too.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import matplotlib.pyplot as plt
import side_by_side
import torch
from matplotlib.axes import Axes
from side_by_side import Call
from torch._inductor.utils import fresh_cache

import torchbatch

ORDER = ("jit", "by hand", "torch.func", "torch.compile", "eager", "jax", "loop")
COLOURS = dict(zip(ORDER, ("#d1495b", "#1b1f24", "#7a8ca5", "#2f7fd0", "#e09f3e", "#27966a", "#a3abb6"), strict=True))
SLOW = 1.0  # seconds; a loop that takes longer is left out
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of malloc.h

# XLA reads this when it is first used, so JAX has one thread as PyTorch has.
os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"

Function = Callable[..., Any]


class Work(NamedTuple):
    """Something to compute, and how much of another contender's time jit may take for it."""

    name: str
    calls: dict[str, Call]
    asked: Mapping[str, float]
    tolerance: float = 1e-5
    filling: Call | None = None  # writes as many numbers as the result has, and computes nothing


def contenders(ours: Function, theirs: Function, in_jax: Function, by_hand: Function, args: tuple[Any, ...]) -> dict[str, Call]:
    """The calls of one function: with torchbatch's transforms, with torch.func's, with JAX's, and without any."""
    jitted, compiled = torchbatch.jit(ours), torch.compile(theirs)
    return {
        "jit": lambda: jitted(*args),
        "by hand": lambda: by_hand(*args),
        "torch.func": lambda: theirs(*args),
        "torch.compile": lambda: compiled(*args),
        "eager": lambda: ours(*args),
        "jax": jax_call(in_jax, args),
    }


def jax_call(fun: Function, args: tuple[Any, ...]) -> Call:
    """A call of jax.jit that waits for the result."""
    jitted = jax.jit(fun)
    arrays = jax.tree.map(lambda value: jax.numpy.asarray(value.cpu().numpy()), args)
    if isinstance(jax.eval_shape(fun, *arrays), jax.ShapeDtypeStruct):
        return lambda: jitted(*arrays).block_until_ready()
    return lambda: jax.block_until_ready(jitted(*arrays))


class Timed(NamedTuple):
    """What was measured for one work, in seconds: a list of rounds and the first call for each contender."""

    work: Work
    rounds: dict[str, list[float]]
    first: dict[str, float]
    left_out: dict[str, str]

    def seconds(self, name: str) -> float:
        """Median seconds per call."""
        return statistics.median(self.rounds[name])

    def ratio(self, name: str) -> float:
        """Jit's time as a multiple of another's: the median over the rounds."""
        return statistics.median(a / b for a, b in zip(self.rounds["jit"], self.rounds[name], strict=True))

    def as_row(self) -> dict[str, Any]:
        """For the JSON file."""
        return {
            "work": self.work.name,
            "seconds": {name: self.seconds(name) for name in self.rounds},
            "jit / other": {name: self.ratio(name) for name in self.rounds},
            "asked": {name: {"at most": most, "reached": self.ratio(name) <= most} for name, most in self._asked()},
            "first call": self.first,
            "left out": self.left_out,
        }

    def _asked(self) -> list[tuple[str, float]]:
        return [(name, most) for name, most in self.work.asked.items() if name in self.rounds]


def timed(work: Work, options: argparse.Namespace) -> Timed:
    """Check and time one work."""
    torch.compiler.reset()  # torch.compile looks through all that it compiled for one piece of code, which costs time
    left_out: dict[str, str] = {}
    first: dict[str, float] = {}
    for name, call in work.calls.items():
        try:
            with fresh_cache():
                first[name] = once(call)
        except Exception as error:
            if name == "jit":
                raise
            left_out[name] = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    if "loop" in work.calls and first["loop"] > SLOW:
        left_out["loop"] = f"takes {first['loop']:.1f} s"
    calls = {name: work.calls[name] for name in ORDER if name in work.calls and name not in left_out}
    side_by_side.check(work.name, list(calls.values()), rtol=work.tolerance, atol=work.tolerance)
    if work.filling is not None:
        calls["filling"] = work.filling
    found = side_by_side.rounds(list(calls.values()), options.repeats, options.device)
    return Timed(work, dict(zip(calls, found, strict=True)), first, left_out)


def keep_memory() -> None:
    """Tell malloc not to give memory back. Otherwise it depends on what ran before whether a call has to ask for its memory
    page by page, which may take longer than its work."""
    if sys.platform == "linux":
        malloc = ctypes.CDLL(None)
        malloc.mallopt(M_MMAP_MAX, 0)
        malloc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def _wake(device: str) -> None:
    """Load the compilers, which costs the first call seconds that are not its own."""
    for call in contenders(torch.sin, torch.sin, jax.numpy.sin, torch.sin, (torch.zeros(3, device=device),)).values():
        call()


def once(call: Call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def head() -> None:
    """Print the columns' names."""
    print(" " * 32 + "".join(f"{name:>15}" for name in ORDER))


def show(found: Timed) -> None:
    """Print a work's lines of the table."""
    print(f"{found.work.name:32}" + "".join(_cell(found, name, lambda name: duration(found.seconds(name))) for name in ORDER))
    print(f"{'  jit / other':32}" + "".join(_cell(found, name, lambda name: f"{found.ratio(name):.2f}") for name in ORDER))
    print(f"{'  asked: at most':32}" + "".join(_cell(found, name, lambda name: _verdict(found, name)) for name in ORDER))
    print(f"{'  first call':32}" + "".join(_cell(found, name, lambda name: duration(found.first[name])) for name in ORDER))
    if "filling" in found.rounds:
        print(f"  to write as many numbers, and nothing else: {duration(found.seconds('filling'))}")
    for name, reason in found.left_out.items():
        print(f"  {name} is left out: {reason}")
    print(flush=True)


def _cell(found: Timed, name: str, text: Callable[[str], str]) -> str:
    return f"{text(name) if name in found.rounds else '-':>15}"


def _verdict(found: Timed, name: str) -> str:
    most = found.work.asked.get(name)
    if most is None:
        return ""
    return f"{most:.2f} {'yes' if found.ratio(name) <= most else 'NO'}"


def duration(seconds: float) -> str:
    """Seconds in the unit that suits them."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


def draw(found: list[Timed], file: Path) -> None:
    """A bar for each contender and work: its time as a multiple of jit's."""
    figure, axes = plt.subplots(figsize=(9, 0.6 + 1.3 * len(found)), layout="constrained")
    ticks = []
    for i, one in enumerate(found):
        names = [name for name in ORDER if name in one.rounds]
        height = 0.8 / len(names)
        for j, name in enumerate(names):
            _bar(axes, i + (j - (len(names) - 1) / 2) * height, height, one, name)
        ticks.append(f"{one.work.name}\n(jit: {duration(one.seconds('jit'))})")
    axes.set_yticks(range(len(found)), ticks)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.axvline(1, color=COLOURS["jit"], linewidth=1)
    axes.set_xlabel("time of a call as a multiple of jit's (less is faster)")
    figure.savefig(file)


def _bar(axes: Axes, position: float, height: float, found: Timed, name: str) -> None:
    multiple = found.seconds(name) / found.seconds("jit")
    axes.barh(position, multiple - 1 if multiple != 1 else 0.01, height, left=1, color=COLOURS[name])
    side = "left" if multiple >= 1 else "right"
    axes.annotate(f" {name} {multiple:.2g} ", (multiple, position), va="center", ha=side, fontsize=7)


def options(description: str | None) -> argparse.Namespace:
    """The command line of the benchmarks of jit."""
    parser = side_by_side.parser(description)
    parser.add_argument("--plot", type=Path, help="a picture of the ratios")
    parser.add_argument("--quick", action="store_true", help="few rounds and the smaller sizes only")
    parser.add_argument("--only", default="", help="only what has this text in its name")
    found = side_by_side.started(parser)
    if found.quick:
        found.repeats = min(found.repeats, 5)
    return found


def run(works: Iterable[Work], options: argparse.Namespace) -> list[Timed]:
    """Measure, print the table, and write the figures and the plot where asked."""
    keep_memory()
    _wake(options.device)
    head()
    found = []
    for work in works:
        if options.only in work.name:
            found.append(timed(work, options))
            show(found[-1])
    side_by_side.write(options.json, options.device, [one.as_row() for one in found])
    if options.plot is not None:
        draw(found, options.plot)
    return found
