"""The stack of mapped axes in scope, one per thread."""

from __future__ import annotations

import threading
from collections.abc import Hashable

# One vmap that is running: the name of its axis (or None), its size, and its batch level. A bare tuple, since one is made
# on every call.
AxisFrame = tuple[Hashable, int, int]


class _Frames(threading.local):
    def __init__(self) -> None:
        self.stack: list[AxisFrame] = []


#: ``in_scope.stack`` holds the frames of this thread, outermost first. Whoever pushes pops in ``finally``.
in_scope = _Frames()


def levels() -> list[int]:
    """The batch levels that are open in this thread, outermost first."""
    return [level for _, _, level in in_scope.stack]
