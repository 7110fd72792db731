"""Per-sample values that outlive their ``vmap``: found when the level closes, and made unusable.

A batch level is only a number, which the next ``vmap`` gets again: a tensor that was stored in a list, a global or a
closure would be taken for that call's data. PyTorch keeps no list of the tensors of a level, so the ones still alive when
it closes are looked for among the objects that Python's garbage collector tracks. The look is only taken when the
collector's own counters say that more objects survived the call than it returned, which costs a tenth of a microsecond
to ask.

Private names used: those of :mod:`torchbatch._torch.levels`.
"""

from __future__ import annotations

import gc
import weakref
from typing import Any

import torch

from torchbatch._torch import levels
from torchbatch._torch.local import LocalTensor
from torchbatch.errors import EscapedValueError

counts = gc.get_count


class EscapedTensor(torch.Tensor):
    """What is left of a per-sample value once its ``vmap`` has finished: every use is an error."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise EscapedValueError(
            "a per-sample value is used after the vmap that it belongs to has finished: it escaped through a global, a "
            "closure, a list or an attribute. Return it from the mapped function instead."
        )

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return "<per-sample value of a vmap that has finished>"


class Watch:
    """Decides, for one mapped function, after which calls to look for escaped values.

    A call leaves a certain number of tracked objects behind: its results, and what Python keeps in free lists. That number
    is learned: a look that finds nothing lets one more object pass, a call that leaves fewer lowers the bar again.
    """

    __slots__ = ("allowed",)

    def __init__(self) -> None:
        self.allowed = 0

    def check(self, level: int, before: tuple[int, int, int], after: tuple[int, int, int], returned: int) -> None:
        """Look for escaped values at ``level``, and learn.

        Args:
            level: the level that has just closed.
            before: the collector's counts when it opened.
            after: the collector's counts now.
            returned: how many new tensors the call returns.
        """
        if after[1:] != before[1:]:
            mark_escaped(level, (0, 1) if after[2] == before[2] else (0, 1, 2))
            return
        left = after[0] - before[0] - returned
        if left < self.allowed:
            self.allowed = max(left, 0)
        if (left > self.allowed or deaths.seen) and not mark_escaped(level, (0,)) and left > self.allowed:
            self.allowed += 1


_watches: dict[Any, Watch] = {}


def watch_of(fun: Any) -> Watch:
    """The watch of a function; those made anew from the same code share one."""
    key = getattr(fun, "__code__", None)
    if key is None:
        return Watch()
    watch = _watches.get(key)
    if watch is None:
        if len(_watches) >= _MOST_WATCHES:
            _watches.clear()
        watch = _watches[key] = Watch()
    return watch


_MOST_WATCHES = 4096


class _Deaths:
    """Whether an escaped tensor has died since the last look: its end may have hidden the birth of another."""

    def __init__(self) -> None:
        self.seen = False
        self._alive: set[weakref.ref[torch.Tensor]] = set()

    def watch(self, tensor: torch.Tensor) -> None:
        self._alive.add(weakref.ref(tensor, self._dead))

    def _dead(self, reference: weakref.ref[torch.Tensor]) -> None:
        self._alive.discard(reference)
        self.seen = True


deaths = _Deaths()


_BATCHED_TYPES = (torch.Tensor, LocalTensor)


def mark_escaped(level: int, generations: tuple[int, ...] = (0, 1, 2)) -> int:
    """Make every live tensor that is batched at ``level`` or deeper an :class:`EscapedTensor`; how many there were.

    Args:
        level: the level that has just closed.
        generations: the collector's generations in which to look.
    """
    deaths.seen = False
    dead = [
        thing
        for generation in generations
        for thing in gc.get_objects(generation=generation)
        if type(thing) in _BATCHED_TYPES and _is_dead(thing, level)
    ]
    for tensor in dead:
        tensor.__class__ = EscapedTensor
        deaths.watch(tensor)
    return len(dead)


def _is_dead(value: torch.Tensor, level: int) -> bool:
    return any(other >= level for other in levels.batch_levels(value))
