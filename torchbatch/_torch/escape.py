"""Per-sample values that outlive their ``vmap``: found when the level closes, and made unusable.

A batch level is only a number, which the next ``vmap`` gets again: a tensor that was stored in a list, a global or a
closure would be taken for that call's data. PyTorch keeps no list of the tensors of a level, so the ones still alive when
it closes are looked for among the youngest objects that Python's garbage collector tracks. The look is taken after each call
of a function whose code may keep a value (:mod:`torchbatch.core.writes`), and after any other call when the collector's own
counter says that another number of objects survived it than it returned, which costs a tenth of a microsecond to ask. When
the collector runs during a call, the look is taken just before, while what is new is still young.

Tensors do not know their thread. While another thread is inside a transform, nothing is marked.

Private names used, seen on torch 2.11, 2.13 and 2.15: the folder ``torch/_functorch``, and those of
:mod:`torchbatch._torch.levels`.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import itertools
import operator
import os
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import torch

from torchbatch._torch import levels, local
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


def check(before: tuple[int, int, int], after: tuple[int, int, int], keeps: bool) -> None:
    """Look for escaped values after a call that may keep some, or left other objects behind than those it returned.

    Where the collector is switched off, what is young becomes ever more; beyond a number of objects no look is taken.

    Args:
        before: the collector's counts when the call began.
        after: the collector's counts now.
        keeps: whether the code of the function may keep a value, so that the counts prove nothing.
    """
    if after[0] > (_MOST_YOUNG_WHERE_KEPT if keeps else _MOST_YOUNG):
        return
    whole = keeps or after[1] != before[1] or deaths.seen
    mark_escaped(None if whole else max(after[0] - before[0], 0) + _MARGIN)


_MOST_YOUNG = 4096  # the collector runs at 700 (2,000 on newer Pythons) unless it is switched off
_MOST_YOUNG_WHERE_KEPT = 500_000
_MARGIN = 64  # how many objects from before the call are taken to have died during it, at most


class _Deaths:
    """Whether an escaped tensor has died since the last look: its end may have hidden the birth of another."""

    def __init__(self) -> None:
        self.seen = False
        self._alive: dict[int, weakref.ref[torch.Tensor]] = {}  # by their ids: the hash of a reference asks the tensor

    def watch(self, tensor: torch.Tensor) -> None:
        reference = weakref.ref(tensor, self._dead)
        self._alive[id(reference)] = reference

    def _dead(self, reference: weakref.ref[torch.Tensor]) -> None:
        self._alive.pop(id(reference), None)
        self.seen = True


deaths = _Deaths()
_grown: list[weakref.ref[torch.Tensor]] = []  # per-sample tensors that the collector has moved out of the youngest generation


def _before_collection(phase: str, info: dict[str, int]) -> None:
    """Note what is about to grow up; also between the end of a call and the look, when no level is open any more."""
    if phase != "start":
        return
    with contextlib.suppress(RecursionError):  # there is no room left to look, and the recursion ends in an error anyway
        if len(_grown) > _MOST_GROWN:
            _grown[:] = [reference for reference in _grown if reference() is not None]
        _grown.extend(weakref.ref(tensor) for tensor in _young(select=_by_class))


_MOST_GROWN = 1000
gc.callbacks.append(_before_collection)


def _by_isinstance(lists: Iterator[list[Any]]) -> Iterator[torch.Tensor]:
    """The tensors in a list; it must not hold objects that are just being made."""
    return filter(_is_tensor, itertools.chain.from_iterable(lists))


def _by_class(lists: Iterator[list[Any]]) -> Iterator[torch.Tensor]:
    """The tensors in a list, in three times the time, but by ``type()`` alone.

    isinstance also asks an object for its ``__class__``. The collector may start in the middle of the making of one, and a
    ``threading.local`` that is not finished crashes when it is asked.
    """
    lists = itertools.chain.from_iterable(map(_THRICE, lists))
    objects, again = (itertools.chain.from_iterable(itertools.islice(lists, 1)) for _ in range(2))
    emptied: Iterator[Any] = filter(None, map(list.clear, lists))  # since the list holds the iterators that hold it
    return itertools.chain(itertools.compress(objects, map(_is_tensor_class, map(type, again))), emptied)


_is_tensor = functools.partial(type.__instancecheck__, torch.Tensor)  # isinstance, without a step through Python
_is_tensor_class = functools.partial(type.__subclasscheck__, torch.Tensor)
_THRICE = functools.partial(itertools.repeat, times=3)


def _young(
    newest: int | None = None, select: Callable[[Iterator[list[Any]]], Iterator[torch.Tensor]] = _by_isinstance
) -> list[torch.Tensor]:
    """The wrapped tensors among the collector's youngest objects, which it keeps in the order in which they were made.

    Among those objects are tuples that another thread is just filling, which must be referred to by nobody else when it goes
    on. So nothing but tensors is ever held here while another thread may run: the whole selection is one call into C.
    """
    part = operator.itemgetter(slice(None if newest is None else -newest, None))
    selected = select(map(part, map(gc.get_objects, (0,))))
    was_enabled = gc.isenabled()
    gc.disable()  # a collection would run Python code in the middle
    try:
        tensors = list(selected)
    finally:
        if was_enabled:
            gc.enable()
    return [tensor for tensor in tensors if levels.is_wrapped(tensor)]


def mark_escaped(newest: int | None = None) -> int:
    """Make every live tensor that is batched at a level that is closed an :class:`EscapedTensor`; how many there were.

    Args:
        newest: how many of the youngest objects to look at; None looks at all.
    """
    if _busy_elsewhere():
        return 0
    open_levels = levels.depth()
    deaths.seen = False
    found = _young(newest)  # first, since the collector may run even here, and then ``_grown`` has what it moved
    found += [tensor for tensor in (reference() for reference in (*_grown, *local.given_room)) if tensor is not None]
    if not open_levels:
        _grown.clear()
        local.given_room.clear()
    dead = {id(tensor): tensor for tensor in found if _is_dead(tensor, open_levels)}
    if not dead or _busy_elsewhere():
        return 0
    for tensor in dead.values():
        tensor.__class__ = EscapedTensor
        deaths.watch(tensor)
    return len(dead)


def _is_dead(value: torch.Tensor, open_levels: int) -> bool:
    return type(value) is not EscapedTensor and any(level > open_levels for level in levels.batch_levels(value))


_FOLDER = os.path.join(os.path.dirname(torch.__file__), "_functorch")
_BATCH = os.path.join(os.path.dirname(os.path.dirname(__file__)), "core", "batch.py")


def _busy_elsewhere() -> bool:
    """Whether another thread is inside a transform."""
    frames = sys._current_frames()
    frames.pop(threading.get_ident(), None)  # this very frame, which would hold itself
    for top in frames.values():
        frame: FrameType | None = top
        while frame is not None:
            path = frame.f_code.co_filename
            if path == _BATCH or path.startswith(_FOLDER):
                return True
            frame = frame.f_back
    return False
