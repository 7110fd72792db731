"""What random draws depend on beside their keys, thread by thread: JAX's way of counting, and the check of repeated uses.

Other threads, and calls of compiled functions, must not wait for it: while :data:`contexts` is empty, all is as usual.

Private names used: none.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

Words = tuple[int, int]


class Uses:
    """The keys that were used, by their words, with the line of each use, and how many uses more their clones allow."""

    def __init__(self) -> None:
        self.name = ""  # of the function that draws
        self.lines: dict[Words, list[str]] = {}
        self.spare: dict[Words, int] = {}

    def copy(self) -> Uses:
        """The same uses, to which others can be added."""
        found = Uses()
        found.name, found.spare = self.name, dict(self.spare)
        found.lines = {words: [*lines] for words, lines in self.lines.items()}
        return found

    def join(self, other: Uses) -> None:
        """Add what was used in a run that began with the same uses as another one."""
        for words, lines in other.lines.items():
            if len(lines) > len(self.lines.get(words, ())):
                self.lines[words] = lines
        for words, count in other.spare.items():
            self.spare[words] = max(count, self.spare.get(words, 0))


class _State(threading.local):
    partitionable = True
    uses: Uses | None = None


_state = _State()
contexts: list[None] = []  # one entry for each open context, of any thread


@contextlib.contextmanager
def _as(**attributes: Any) -> Iterator[None]:
    outer = {name: getattr(_state, name) for name in attributes}
    contexts.append(None)
    vars(_state).update(attributes)
    try:
        yield
    finally:
        vars(_state).update(outer)
        contexts.pop()


def partitionable() -> bool:
    """Which of JAX's two ways of counting is meant in this thread where nothing says so."""
    return _state.partitionable


def counting(partitionable: bool) -> contextlib.AbstractContextManager[None]:
    """Within this context, it is the given one."""
    return _as(partitionable=partitionable)


def uses() -> Uses | None:
    """The uses in this thread, while they are checked."""
    return _state.uses


def checking() -> contextlib.AbstractContextManager[None]:
    """Within this context, uses are checked."""
    return _as(uses=Uses())


def again(partitionable: bool) -> contextlib.AbstractContextManager[None]:
    """Within this context, what ran before runs again: with its way of counting, and using no key anew."""
    return _as(partitionable=partitionable, uses=None)


class Apart:
    """Runs of which one counts, or which are parts of one: that two of them use the same key is no repeated use."""

    def __init__(self) -> None:
        self._before = _state.uses.copy() if contexts and _state.uses is not None else None

    @contextlib.contextmanager
    def one(self) -> Iterator[None]:
        """One of the runs; later ones do not see what it uses, and what comes after them does."""
        outer = _state.uses
        if outer is None or self._before is None:
            yield
            return
        _state.uses = self._before.copy()
        try:
            yield
        finally:
            outer.join(_state.uses)
            _state.uses = outer

    def undo(self) -> None:
        """Forget what was used since."""
        if self._before is not None:
            _state.uses = self._before.copy()

    def run(self, fun: Callable[..., Any], *args: Any) -> Any:
        """A function as one of the runs."""
        with self.one():
            return fun(*args)


def is_as(was: bool | None) -> bool:
    """Whether draws are as they were when :func:`partitionable` gave ``was``, and are not checked."""
    return _state.partitionable is was and _state.uses is None
