"""The stack of mapped axes in scope, one per thread, and the search for an axis by its name."""

from __future__ import annotations

import threading
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

from torchbatch.errors import AxisNameError

# One vmap that is running: the name of its axis (or None), its size, its batch level, and the values that it maps. A bare
# tuple, since one is made on every call.
AxisFrame = tuple[Hashable, int, int, Sequence[Any]]


class Part(NamedTuple):
    """Takes the place of a name where only a part of the samples is present."""

    name: Hashable
    chunk_size: int | None


class _Frames(threading.local):
    def __init__(self) -> None:
        self.stack: list[AxisFrame] = []


#: ``in_scope.stack`` holds the frames of this thread, outermost first. Whoever pushes pops in ``finally``.
in_scope = _Frames()


def find(name: Hashable, who: str) -> AxisFrame:
    """The innermost frame with an axis of this name.

    Args:
        name: what ``axis_name`` was given to ``vmap``.
        who: what looks for it, for the error.

    Raises:
        AxisNameError: there is none, or its ``vmap`` runs a part of its samples at a time.
    """
    for frame in in_scope.stack[::-1]:
        if isinstance(frame[0], Part):
            if name is not None and frame[0].name == name:
                raise AxisNameError(_part_message(frame[0], who))
        elif name is not None and frame[0] == name:
            return frame
    raise AxisNameError(_unknown_message(name, who))


def _part_message(part: Part, who: str) -> str:
    return (
        f"{who} looks across all samples of the axis {part.name!r}, but its vmap was given chunk_size={part.chunk_size}, so that "
        "only that many are there at a time. Leave chunk_size out of that vmap."
    )


def _unknown_message(name: Hashable, who: str) -> str:
    known = [frame[0].name if isinstance(frame[0], Part) else frame[0] for frame in in_scope.stack]
    names = ", ".join(repr(known) for known in known if known is not None)
    scope = f"The names in scope are, from the outside in: {names}" if names else "No name is in scope"
    return (
        f"{who} asks for the axis {name!r}, but no vmap around it has that name. {scope}. "
        f"Call it inside vmap(…, axis_name={name!r})."
    )
