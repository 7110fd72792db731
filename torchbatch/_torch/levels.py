"""Batch levels: open and close one, wrap and unwrap values, ask at which levels a value is batched.

Private names used, seen on torch 2.11, 2.13 and 2.15: ``torch._C._functorch._vmap_increment_nesting``,
``_vmap_decrement_nesting``, ``_add_batch_dim``, ``_remove_batch_dim``, ``_unwrap_batched``, ``is_batchedtensor``,
``is_functorch_wrapped_tensor``, ``maybe_get_level``, ``get_unwrapped``; ``torch._functorch.vmap.vmap_increment_nesting``
with that module's ``_add_batch_dim``, ``_remove_batch_dim`` (the forms that Dynamo traces);
``torch._C._is_alias_of``; ``torch._functorch.predispatch.lazy_load_decompositions``; ``torch._functorch.pyfunctorch``'s
``retrieve_all_functorch_interpreters`` and ``torch._C._functorch.TransformType``; ``_pt_inner_ctx`` of the contexts of
``torch._functorch.autograd_function``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch._functorch import vmap
from torch._functorch.predispatch import lazy_load_decompositions
from torch._functorch.pyfunctorch import retrieve_all_functorch_interpreters

lazy_load_decompositions()

_functorch: Any = torch._C._functorch
_traceable: Any = vmap
_is_alias_of: Callable[[torch.Tensor, torch.Tensor], bool] = torch._C._is_alias_of  # type: ignore[attr-defined]
enter_level = _functorch._vmap_increment_nesting
leave_level = _functorch._vmap_decrement_nesting
add_batch_dim = _functorch._add_batch_dim
remove_batch_dim = _functorch._remove_batch_dim
unwrap_batched: Callable[[torch.Tensor, int], tuple[torch.Tensor, Any]] = _functorch._unwrap_batched
is_wrapped = _functorch.is_functorch_wrapped_tensor
is_batchedtensor = _functorch.is_batchedtensor
maybe_get_level = _functorch.maybe_get_level
get_unwrapped = _functorch.get_unwrapped
depth = _functorch.get_dynamic_layer_stack_depth

traceable_level = _traceable.vmap_increment_nesting
traceable_add = _traceable._add_batch_dim
traceable_remove = _traceable._remove_batch_dim


def open_maps() -> Iterator[tuple[int, int, str]]:
    """Level, size and randomness of every open ``vmap`` (PyTorch's own too), outermost first."""
    interpreter: Any
    for interpreter in retrieve_all_functorch_interpreters():
        if interpreter.key() == _functorch.TransformType.Vmap:
            yield interpreter.level(), interpreter.batch_size(), interpreter.randomness()


def opened_again(ctx: Any) -> list[tuple[int, int]]:
    """Level and size of the maps that PyTorch opened again for the backward pass of an ``autograd.Function``."""
    count = 0
    while "_pt_inner_ctx" in vars(ctx):  # one context around the other for each of them, and they are the innermost ones
        ctx, count = ctx._pt_inner_ctx, count + 1
    maps = [(level, size) for level, size, _ in open_maps()]
    return maps[len(maps) - count :]


def batch_levels(value: torch.Tensor) -> Iterator[int]:
    """The levels at which ``value`` is batched, innermost first, looking through the wrappers of grad levels."""
    while is_wrapped(value):
        if _functorch.is_batchedtensor(value):
            yield _functorch.maybe_get_level(value)
        value = _functorch.get_unwrapped(value)


def is_batched_at(value: torch.Tensor, level: int) -> bool:
    """Whether ``value`` holds one value per sample of the batch at ``level``."""
    return level in batch_levels(value)


def innermost(value: torch.Tensor) -> torch.Tensor:
    """The plain tensor inside every wrapper."""
    while is_wrapped(value):
        value = _functorch.get_unwrapped(value)
    return value


def share_memory(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors use the same memory, inside whatever wraps them."""
    first, second = innermost(a), innermost(b)
    if first.layout is not torch.strided or second.layout is not torch.strided:
        return False
    return _is_alias_of(first, second)


def is_view(value: Any) -> bool:
    """Whether a value is a tensor that shows the memory of another one."""
    return isinstance(value, torch.Tensor) and value._is_view()


def of_dtype(tangent: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """A tangent in the dtype of its value: PyTorch makes it float64 where a tensor without dimensions meets a Python number."""
    return tangent if tangent.dtype is value.dtype else tangent.to(value.dtype)
