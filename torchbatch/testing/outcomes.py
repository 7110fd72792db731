"""What a run of a function gave: a value or an error."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from torchbatch.testing.report import Check

#: Two errors are alike if both belong to one of these.
KINDS = (
    ValueError,
    TypeError,
    RuntimeError,
    LookupError,
    ArithmeticError,
    AttributeError,
    AssertionError,
    NameError,
    OSError,
)


class Outcome(NamedTuple):
    """What a run gave.

    Attributes:
        value: what it returned.
        error: what it raised instead.
        seconds: how long it took.
        inputs: the tensors it was given, as it left them.
    """

    value: Any
    error: Exception | None
    seconds: float = 0.0
    inputs: Sequence[torch.Tensor] = ()


def attempt(run: Callable[[], Any], inputs: Sequence[torch.Tensor] = ()) -> Outcome:
    """Run something that may fail, except for lack of memory."""
    start = time.perf_counter()
    try:
        value, error = run(), None
    except Exception as raised:
        if isinstance(raised, MemoryError | torch.OutOfMemoryError):
            raise
        value, error = None, raised
    return Outcome(value, error, time.perf_counter() - start, inputs)


def errors_compared(head: tuple[str, str, str, str], found: Outcome, expected: Outcome, any_kind: bool = False) -> Check:
    """The check of two runs at least one of which failed: it passes if both raise an error of one kind.

    Args:
        head: run, against, what and variant of the check.
        found, expected: what both gave.
        any_kind: whether the run has error classes of its own.
    """
    if found.error is None:
        return Check(*head, "failed", "error", f"no error, but the {head[1]} raises {line(expected.error)}", (), found.seconds)
    text = f"{type(found.error).__name__}: {found.error}"
    if expected.error is None:
        return Check(*head, "failed", "error", text, (), found.seconds)
    if any_kind or are_alike(found.error, expected.error):
        return Check(*head, "passed", None, f"both raise {line(found.error)}", (), found.seconds)
    return Check(*head, "failed", "error", f"{text}\nwhere the {head[1]} raises {line(expected.error)}", (), found.seconds)


def are_alike(a: Exception, b: Exception) -> bool:
    """Whether two errors are of one kind."""
    return type(a) is type(b) or any(isinstance(a, kind) and isinstance(b, kind) for kind in KINDS)


def line(error: Exception | None) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
