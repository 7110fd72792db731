"""The innermost transform, as a function sees it that says itself what each transform makes of it.

Such a function takes its arguments out of the transform, runs something else below it, and brings the results back in.

Private names used, seen on torch 2.11, 2.13 and 2.15: ``torch._functorch.pyfunctorch.retrieve_all_functorch_interpreters``,
``retrieve_current_functorch_interpreter`` with ``level``, ``key``, ``lift``, ``lower``, ``batch_size`` and ``randomness`` of
what they return;
``torch._C._functorch.peek_interpreter_stack``, ``TransformType``, ``_unwrap_for_grad``, ``_wrap_for_grad``,
``set_single_level_autograd_function_allowed``, ``get_single_level_autograd_function_allowed``;
``torch.autograd.function._SingleLevelFunction``; ``torch._VF._make_dual``, ``_unpack_dual``;
``torch.autograd.forward_ad._current_level``, ``_set_fwd_grad_enabled``; ``torch._C._is_fwd_grad_enabled``; and those of
:mod:`torchbatch._torch.levels`, :mod:`torchbatch._torch.local`, :mod:`torchbatch._torch.overlay` and
:mod:`torchbatch._torch.wrappers`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch._functorch.pyfunctorch import retrieve_all_functorch_interpreters, retrieve_current_functorch_interpreter
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction

from torchbatch._torch import escape, levels, local, overlay, wrappers

_functorch: Any = torch._C._functorch
_forward_ad: Any = forward_ad
_dual: Any = torch._VF
_MAP, _REVERSE, _FORWARD = _functorch.TransformType.Vmap, _functorch.TransformType.Grad, _functorch.TransformType.Jvp
_wrap, _unwrap = _functorch._wrap_for_grad, _functorch._unwrap_for_grad
alive, is_wrapped = wrappers.alive, levels.is_wrapped

Pair = tuple[torch.Tensor, torch.Tensor | None]


class Transform:
    """The innermost transform that is open."""

    def __init__(self, interpreter: Any) -> None:
        self._interpreter = interpreter
        self.level: int = interpreter.level()
        kind = interpreter.key()
        self.is_map, self.is_reverse, self.is_forward = kind == _MAP, kind == _REVERSE, kind == _FORWARD

    @property
    def size(self) -> int:
        """How many samples a map has."""
        size: int = self._interpreter.batch_size()
        return size

    @property
    def randomness(self) -> str:
        """What a random draw is in a map."""
        name: str = self._interpreter.randomness()
        return name

    @contextlib.contextmanager
    def outside(self) -> Iterator[None]:
        """Run what is below this transform, as if it were not there."""
        calls = local.calls.stack
        writing = calls.pop() if self.is_map and calls and calls[-1][0] == self.level else None
        keys = [(key, overlay.is_included(key)) for key in (overlay.KEY, overlay.WRITES_KEY)]
        marked = set(escape.deaths._alive)
        try:
            with self._interpreter.lower(), writable():
                yield
        finally:
            _unmark(marked)
            for key, was in keys:
                overlay.include(key, was)
            if writing is not None:
                calls.append(writing)

    def below(self) -> contextlib.AbstractContextManager[Any]:
        """:meth:`outside` for what calls no function of the user."""
        below: contextlib.AbstractContextManager[Any] = self._interpreter.lower()
        return below

    def lifted(self, values: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """The values as values of this transform, which differentiates."""
        lifted: tuple[torch.Tensor, ...] = self._interpreter.lift(tuple(values), {})[0]
        return lifted

    def taken(self, value: torch.Tensor) -> torch.Tensor:
        """What a value of this transform, which differentiates, is outside of it."""
        taken: torch.Tensor = _unwrap(value, self.level)
        return taken

    def given(self, value: torch.Tensor) -> torch.Tensor:
        """The inverse of :meth:`taken`; always a new tensor."""
        given: torch.Tensor = _wrap(value, self.level)
        return given

    def unpacked(self, value: torch.Tensor) -> Pair:
        """A value of forward mode, and its tangent, outside of this transform."""
        primal, tangent = _dual._unpack_dual(value, level=0)
        return self.taken(primal), None if tangent is None else self.taken(levels.of_dtype(tangent, primal))

    def packed(self, value: torch.Tensor, tangent: torch.Tensor) -> torch.Tensor:
        """The inverse of :meth:`unpacked`."""
        packed: torch.Tensor = _dual._make_dual(value.contiguous(), tangent.contiguous(), level=0)  # each element has its place
        return packed


def _unmark(known: set[int]) -> None:
    """Give back what was taken for escaped while its transform was set aside: its level had seemed to be closed."""
    for mark, reference in list(escape.deaths._alive.items()):
        value = None if mark in known else reference()
        if value is not None and max(levels.batch_levels(value), default=0) <= levels.depth():
            value.__class__ = local.LocalTensor if "_home" in vars(value) else torch.Tensor


def innermost() -> Transform | None:
    """The innermost transform; None if none is open."""
    if _functorch.peek_interpreter_stack() is None:
        return None
    return Transform(retrieve_current_functorch_interpreter())


def is_mapped(value: torch.Tensor) -> bool:
    """Whether a value is per-sample at some level."""
    return any(True for _ in levels.batch_levels(value))


def is_differentiated(value: torch.Tensor) -> bool:
    """Whether a value may have a derivative: at a level of a transform, or for PyTorch's own autograd."""
    while levels.is_wrapped(value):
        if not levels.is_batchedtensor(value) and (value.requires_grad or levels.maybe_get_level(value) in _forward_levels()):
            return True
        value = levels.get_unwrapped(value)
    return (value.requires_grad and torch.is_grad_enabled()) or _is_dual(value)


def _forward_levels() -> set[int]:
    """The levels of forward mode, whose values do not tell from outside whether they have a tangent."""
    interpreters: Any = retrieve_all_functorch_interpreters()
    return {interpreter.level() for interpreter in interpreters if interpreter.key() == _FORWARD}


def _is_dual(value: torch.Tensor) -> bool:
    if _forward_ad._current_level < 0 or not torch._C._is_fwd_grad_enabled():
        return False
    return _dual._unpack_dual(value, level=_forward_ad._current_level)[1] is not None


def belongs_deeper(value: torch.Tensor) -> bool:
    """Whether a value belongs to a transform that is not open here."""
    return bool(levels.maybe_get_level(value) > levels.depth())


@contextlib.contextmanager
def writable() -> Iterator[None]:
    """Let tensors that are made from here on be written in place with values of the samples of each map that is open."""
    calls, maps = local.calls.stack, [level for level, _, _ in levels.open_maps()]
    was = may_write()
    if not maps or (was and calls and calls[-1][0] == maps[-1]):
        yield
        return
    overlay.include(overlay.WRITES_KEY, True)
    calls.append([maps[-1]])
    try:
        yield
    finally:
        calls.pop()
        overlay.include(overlay.WRITES_KEY, was)


def may_write() -> bool:
    """Whether the mapped function that runs may write in place."""
    return bool(overlay.is_included(overlay.WRITES_KEY))


@contextlib.contextmanager
def differentiable() -> Iterator[None]:
    """Record derivatives inside the forward function of an ``autograd.Function``, where PyTorch switches that off."""
    with torch.enable_grad(), _forward_ad._set_fwd_grad_enabled(True):
        yield


class AtOneLevel(_SingleLevelFunction):
    """An ``autograd.Function`` whose inputs and outputs belong to the innermost transform, and that is run as it stands."""

    @classmethod
    def run(cls, *args: Any) -> Any:
        """What ``apply`` does, which refuses such functions unless it is told that they know what they do."""
        was = _functorch.get_single_level_autograd_function_allowed()
        _functorch.set_single_level_autograd_function_allowed(True)
        try:
            function: Any = cls
            return function.apply(*args)
        finally:
            _functorch.set_single_level_autograd_function_allowed(was)
