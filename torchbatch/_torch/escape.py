"""Per-sample values that outlive their ``vmap``: found when the level closes, and made unusable.

A batch level is only a number, which the next ``vmap`` gets again: a tensor that was stored in a list, a global or a
closure would be taken for that call's data. PyTorch keeps no list of the tensors of a level, so the ones still alive when
it closes are looked for among the youngest objects that Python's garbage collector tracks. The look is only taken when the
collector's own counter says that more objects survived the call than it returned, which costs a tenth of a microsecond to
ask; when the collector runs during the call, it is asked just before, while what is new is still young.

Tensors do not know their thread. While another thread is inside a transform, nothing is marked.

Private names used, seen on torch 2.11, 2.13 and 2.15: the folder ``torch/_functorch``, and those of
:mod:`torchbatch._torch.levels`.
"""

from __future__ import annotations

import gc
import os
import sys
import threading
import weakref
from typing import Any

import torch

from torchbatch._torch import levels
from torchbatch._torch.local import LocalTensor
from torchbatch.errors import EscapedValueError

counts = gc.get_count
Counts = tuple[int, int, int]


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

    def check(self, level: int, before: Counts, after: Counts, returned: int) -> None:
        """Look for escaped values at ``level`` if there may be some, and learn.

        Args:
            level: the level that has just closed.
            before: the collector's counts when it opened.
            after: the collector's counts now.
            returned: how many new tensors the call returns.
        """
        if after[1:] != before[1:]:
            mark_escaped(level)
            return
        left = after[0] - before[0] - returned
        if left < self.allowed:
            self.allowed = max(left, 0)
        if (left > self.allowed or deaths.seen) and not mark_escaped(level) and left > self.allowed:
            self.allowed += 1


_watches: dict[Any, Watch] = {}
_MOST_WATCHES = 4096


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
_grown: list[weakref.ref[torch.Tensor]] = []  # per-sample tensors that the collector has moved out of the youngest generation


def _before_collection(phase: str, info: dict[str, int]) -> None:
    if phase == "start" and levels.depth():
        _grown.extend(weakref.ref(tensor) for tensor in _young())


gc.callbacks.append(_before_collection)


def _young() -> list[torch.Tensor]:
    return [
        thing
        for thing in gc.get_objects(generation=0)
        if (type(thing) is torch.Tensor or type(thing) is LocalTensor) and levels.is_wrapped(thing)
    ]


def mark_escaped(level: int) -> int:
    """Make every live tensor that is batched at ``level`` or deeper an :class:`EscapedTensor`; how many there were.

    Args:
        level: the level that has just closed.
    """
    if _busy_elsewhere():
        return 0
    deaths.seen = False
    grown = [tensor for tensor in (reference() for reference in _grown) if tensor is not None]
    if level == 1:
        _grown.clear()
    dead = [tensor for tensor in (*_young(), *grown) if _is_dead(tensor, level)]
    if not dead or _busy_elsewhere():
        return 0
    for tensor in dead:
        tensor.__class__ = EscapedTensor
        deaths.watch(tensor)
    return len(dead)


def _is_dead(value: torch.Tensor, level: int) -> bool:
    return type(value) is not EscapedTensor and any(other >= level for other in levels.batch_levels(value))


_FOLDER = os.path.join(os.path.dirname(torch.__file__), "_functorch")
_BATCH = os.path.join(os.path.dirname(os.path.dirname(__file__)), "core", "batch.py")


def _busy_elsewhere() -> bool:
    """Whether another thread is inside a transform."""
    here = threading.get_ident()
    for thread, top in sys._current_frames().items():
        frame = None if thread == here else top
        while frame is not None:
            path = frame.f_code.co_filename
            if path == _BATCH or path.startswith(_FOLDER):
                return True
            frame = frame.f_back  # type: ignore[assignment]
    return False
