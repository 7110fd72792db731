"""Run on plain tensors what cannot be batched, such as compiled code: once for each sample, one after the other.

There are two kinds of batched tensors: those of ``vmap``, and older ones, which ``torch.autograd.grad(is_grads_batched=True)``
and so ``torch.autograd.functional.jacobian(vectorize=True)`` still make. What the older ones do not tell about themselves is
found by trying.

Private names used, seen on torch 2.11, 2.13 and 2.15: those of :mod:`torchbatch._torch.levels`;
``torch._functorch.pyfunctorch.temporarily_clear_interpreter_stack``; ``torch._add_batch_dim``, ``torch._remove_batch_dim``;
``torch._C._dispatch_key_parse``, ``_dispatch_keys``, ``_dispatch_tls_is_dispatch_key_included``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

from torchbatch._torch import levels
from torchbatch.errors import UnsupportedOperationError

Run = Callable[[list[Any]], Sequence[torch.Tensor]]

_private: Any = torch
_core: Any = torch._C
_OLD, _OLD_MODE = _core._dispatch_key_parse("Batched"), _core._dispatch_key_parse("VmapMode")
_is_included: Callable[[Any], bool] = _core._dispatch_tls_is_dispatch_key_included
_OLD_LEVELS = range(64, 0, -1)


def is_batching() -> bool:
    """Whether a transform is at work, or the older kind of batch."""
    return levels.depth() > 0 or _is_included(_OLD_MODE)


def run(fun: Run, values: Sequence[Any]) -> Sequence[torch.Tensor]:
    """``fun(values)``, where tensors among the values may be batched at any number of levels.

    Raises:
        UnsupportedOperationError: a value belongs to a transform other than a ``vmap``.
    """
    if _is_included(_OLD_MODE):
        return _run_old(fun, values)
    return _run(fun, values) if levels.depth() else fun(list(values))


def _run(fun: Run, values: Sequence[Any]) -> Sequence[torch.Tensor]:
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    level = max((level for value in tensors for level in levels.batch_levels(value)), default=0)
    if level:
        split = [_unwrapped(value, level) for value in values]
        return [levels.add_batch_dim(value, 0, level) for value in _each(_run, fun, split)]
    if any(map(levels.is_wrapped, tensors)):
        raise UnsupportedOperationError(
            "jit: the backward pass of a jit function runs inside torch.func.grad, jvp or vjp, but it is compiled. Call the jit "
            "function inside the transformed function too, where it dissolves."
        )
    with temporarily_clear_interpreter_stack():
        return fun(list(values))


def _unwrapped(value: Any, level: int) -> tuple[Any, int | None]:
    is_batched = isinstance(value, torch.Tensor) and levels.is_batchedtensor(value)
    return levels.unwrap_batched(value, level) if is_batched else (value, None)


def _run_old(fun: Run, values: Sequence[Any]) -> Sequence[torch.Tensor]:
    old = [isinstance(value, torch.Tensor) and _core._dispatch_keys(value).has(_OLD) for value in values]
    batched = [value for value, is_old in zip(values, old, strict=True) if is_old]
    level = next((level for level in _OLD_LEVELS if any(_has_level(value, level) for value in batched)), None)
    if level is None:
        return fun(list(values))
    taken = [
        (_private._remove_batch_dim(value, level, 0, 0), 0) if is_old and _has_level(value, level) else (value, None)
        for value, is_old in zip(values, old, strict=True)
    ]
    return [_private._add_batch_dim(value, 0, level) for value in _each(_run_old, fun, taken)]


def _has_level(value: torch.Tensor, level: int) -> bool:
    """Whether an older batched tensor is batched at a level: if not, as many copies are made of it as are asked for."""
    return bool(_private._remove_batch_dim(value, level, 0, 0).shape[0])


def _each(inner: Callable[..., Any], fun: Run, split: Sequence[tuple[Any, int | None]]) -> list[torch.Tensor]:
    """The stacked results for each sample; ``split`` holds values and the axes of the samples."""
    size: int = next(value.shape[axis] for value, axis in split if axis is not None)
    found = [inner(fun, _sample(split, i)) for i in range(size)] or [inner(fun, _zeros(split))]
    return [torch.stack(column)[:size] for column in zip(*found, strict=True)]


def _sample(split: Sequence[tuple[Any, int | None]], number: int) -> list[Any]:
    return [value if axis is None else value.select(axis, number).contiguous() for value, axis in split]


def _zeros(split: Sequence[tuple[Any, int | None]]) -> list[Any]:
    """A sample where there is none, to learn the shapes of the results."""
    return [value if axis is None else value.sum(axis) for value, axis in split]
