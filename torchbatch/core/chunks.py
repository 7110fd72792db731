"""Run a mapped function a few samples at a time, with the results of one run, random draws included."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch

from torchbatch._torch import draw_state, draws, graphs
from torchbatch.core import batch
from torchbatch.core.axes import Mapped
from torchbatch.core.frames import Part
from torchbatch.core.outputs import OutAxes
from torchbatch.errors import RandomnessError


def run(
    call: Callable[..., Any],
    mapped: Mapped,
    size: int,
    chunk_size: int,
    name: Hashable,
    randomness: str,
    out: OutAxes,
    writes: bool,
) -> tuple[Any, int]:
    """Map ``call`` over ``chunk_size`` samples at a time and join the results.

    Every chunk begins with the state that the random generators had at first. Under ``randomness="same"`` it so draws what
    every other chunk drew; under ``"different"`` a draw is made for all samples, of which the chunk takes its own.

    Raises:
        RandomnessError: the function may draw, and is traced: the state of a generator cannot be set back in a graph.
    """
    if randomness != "error" and graphs.is_traced_by_jit():
        raise RandomnessError(
            f"vmap: chunk_size={chunk_size} does not go with randomness={randomness!r} in a function that jit traces: what one "
            f"chunk draws cannot be drawn again for the next one. Leave chunk_size out, or draw outside of vmap."
        )
    writes = writes or randomness != "error"  # the operators that draw are told apart by the same key
    state = draws.GeneratorState(mapped.values) if randomness != "error" else None
    chunks: list[list[Any]] = []
    part_name, apart = Part(name, chunk_size), draw_state.Apart()
    for start in range(0, size, chunk_size):
        length = min(chunk_size, size - start)
        values = [value.narrow(axis, start, length) for value, axis in zip(mapped.values, mapped.axes, strict=True)]
        if state is not None:
            state.restore()
        finish = _Finish(out)
        part = draws.part_of(start, size, values) if randomness == "different" else contextlib.nullcontext()
        with draws.in_chunks(), apart.one(), part:
            chunks.append(batch.run(call, values, mapped.axes, length, part_name, randomness, finish, writes)[0])
    joined = [_join(parts, how) for parts, how in zip(zip(*chunks, strict=True), finish.joins, strict=True)]
    return finish.rebuild(joined), sum(isinstance(x, torch.Tensor) for x in joined)


class _Finish:
    """Takes the leaves of one chunk out of its level and notes how each is to be joined with those of the others."""

    def __init__(self, out: OutAxes) -> None:
        self._out = out
        self.joins: list[int | str] = []

    def __call__(self, output: Any, level: int, size: int, inputs: Sequence[Any]) -> tuple[list[Any], int]:
        leaves, axes, self.rebuild = self._out.open(output)
        self.joins = [self._out.join(leaf, axis, level) for leaf, axis in zip(leaves, axes, strict=True)]
        results = self._out.leaves(leaves, axes, level, size, output)
        return results, sum(isinstance(x, torch.Tensor) for x in results)


def _join(parts: Sequence[Any], how: int | str) -> Any:
    if isinstance(how, int):
        return torch.cat(tuple(parts), dim=how)
    return parts[0] if how == "once" else torch.stack(tuple(parts)).sum(0, dtype=parts[0].dtype)
