"""Refuse what sets random generators to another state while a function is traced: it would happen then, and never again.

While a trace runs, the default generators have seeds that nobody else sets, a new one after each draw. A draw that finds
another seed comes after something that set it.

Private names used, seen on torch 2.11, 2.13 and 2.15: none; ``torch.cuda.default_generators`` has no documentation.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Iterator

import torch

from torchbatch.errors import UnsupportedOperationError

_marks = itertools.count(0x7B_5EED_0000_0000)


class _Marked(threading.local):
    seed: int | None = None
    repeats: str | None = None  # what runs a second time


_marked = _Marked()


def _generators() -> list[torch.Generator]:
    cuda = torch.cuda.default_generators if torch.cuda.is_initialized() else ()
    return [torch.default_generator, *cuda]


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """Inside, whoever sets a default generator is refused; afterwards they all are as they were.

    Raises:
        UnsupportedOperationError: the state of a generator was set.
    """
    generators, outer = _generators(), _marked.seed
    states = [generator.get_state() for generator in generators]
    mark()
    try:
        yield
        check()
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)
        _marked.seed = outer


def mark() -> None:
    """Set the generators to a state that is known here, if a trace is watched or begins."""
    _marked.seed = next(_marks)
    for generator in _generators():
        generator.manual_seed(_marked.seed)


def set_back() -> None:
    """Take notice that torchbatch itself has set the generators back."""
    if _marked.seed is not None:
        mark()


@contextlib.contextmanager
def repeating(what: str) -> Iterator[None]:
    """Inside, ``what`` runs a second time in a trace, where it would draw other numbers than the first time."""
    outer, _marked.repeats = _marked.repeats, what
    try:
        yield
    finally:
        _marked.repeats = outer


def drawn() -> None:
    """Take notice of a draw.

    Raises:
        UnsupportedOperationError: the state of a generator was set before it, or it was made before.
    """
    if _marked.repeats is not None and _marked.seed is not None:
        raise UnsupportedOperationError(
            f"jit: the derivative of {_marked.repeats} runs its steps a second time, and they draw random numbers, which would "
            f"be others. Draw outside, and pass the numbers in (scan's xs), or use torchbatch.random with a key."
        )
    if _marked.seed is not None:
        check()
        mark()


def check() -> None:
    """Refuse it if the state of a generator was set since the last draw."""
    if any(generator.initial_seed() != _marked.seed for generator in _generators()):
        raise UnsupportedOperationError(
            "jit: the function sets the state of the random generator (torch.manual_seed, torch.random.fork_rng, "
            "torch.set_rng_state, or torch.utils.checkpoint around a draw), which would happen only while it is traced. Seed "
            "before the call, draw outside, or use torchbatch.checkpoint."
        )
