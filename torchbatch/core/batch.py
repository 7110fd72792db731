"""Run a flat function at a new batch level."""

from __future__ import annotations

import atexit
from collections.abc import Callable, Hashable, Sequence
from typing import Any

from torchbatch._torch.autocast import is_on as autocast_is_on
from torchbatch._torch.levels import add_batch_dim, enter_level, leave_level
from torchbatch._torch.local import calls
from torchbatch._torch.overlay import KEY, WRITES_KEY, include, is_included
from torchbatch.core.frames import in_scope

# ``finish(output, level, size, values)`` takes the results out of the level and says how many of their tensors are new.
Finish = Callable[[Any, int, int, Sequence[Any]], tuple[Any, int]]


def _close() -> None:
    """At the interpreter's exit the kernels of the overlay go first, and nothing can be mapped without them."""
    global enter_level
    enter_level = _refuse


def _refuse(size: int, randomness: str) -> int:
    raise RuntimeError("vmap cannot run any more: the interpreter is shutting down.")


atexit.register(_close)


def run(
    call: Callable[..., Any],
    values: Sequence[Any],
    axes: Sequence[int | None],
    size: int,
    name: Hashable,
    randomness: str,
    finish: Finish,
    writes: bool | None,
) -> tuple[Any, int]:
    """``finish`` of ``call(*values)`` with each value's axis mapped; the level is closed whatever happens.

    Args:
        call: what is mapped.
        values, axes: tensors, each with the axis that is mapped; a value whose axis is None is handed on as it is.
        size, name, randomness: of the mapped axis.
        finish: takes the results out of the level.
        writes: whether ``call`` may write into tensors that it makes.
    """
    stack = in_scope.stack
    level = enter_level(size, randomness)
    if not stack:
        include(KEY, True)
    writes = writes or autocast_is_on()  # the operators that are cast are told apart by the same key
    made_writable = writes and not is_included(WRITES_KEY)
    if made_writable:
        include(WRITES_KEY, True)
    if writes:
        calls.stack.append([level])
    stack.append((name, size, level, values))
    try:
        if len(values) == 1:  # the commonest call, kept free of loops
            return finish(call(add_batch_dim(values[0], axes[0] or 0, level)), level, size, values)
        batched = [value if axis is None else add_batch_dim(value, axis, level) for value, axis in zip(values, axes, strict=True)]
        return finish(call(*batched), level, size, values)
    finally:
        stack.pop()
        if not stack:
            include(KEY, False)
        if made_writable:
            include(WRITES_KEY, False)
        if writes:
            calls.stack.pop()
        leave_level()
