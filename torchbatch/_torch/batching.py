"""What a batching rule needs: which operators lack one, how to read the per-sample arguments of a call, how to add one.

A rule is a kernel for the dispatch key of batched tensors. It is called at one batch level with arguments that may be
batched at that level, at outer levels, or not at all.

Private names used, seen on torch 2.11, 2.13 and 2.15: ``torch._C._dispatch_get_all_op_names``,
``torch._C._dispatch_get_registrations_for_dispatch_key``, ``torch._C.DispatchKey``, ``torch._C.DispatchKeySet``,
``torch._C._ExcludeDispatchKeyGuard``, ``torch._C._functorch.current_level``, ``OpOverload._schema``,
``OpOverload._overloadname`` and those of :mod:`torchbatch._torch.levels`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch._C import _functorch

from torchbatch._torch import levels

NAME = "FuncTorchBatched"
_BATCHED = torch._C.DispatchKeySet(torch._C.DispatchKey.FuncTorchBatched)
_with_kernel = torch._C._dispatch_get_registrations_for_dispatch_key
current_level = _functorch.current_level

Operator = Callable[..., Any]
Kernel = Callable[..., Any]


def lacking() -> list[str]:
    """The names (``aten::add.out``) of PyTorch's operators that have no batching rule."""
    ruled = {*_with_kernel(NAME), *_with_kernel(NAME + "Decomposition")}
    return [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("aten::") and name not in ruled]


def operator_of(name: str) -> Any:
    """The operator behind ``aten::add.out`` or ``add.out``."""
    packet, _, overload = name.removeprefix("aten::").partition(".")
    return getattr(getattr(torch.ops.aten, packet), overload or "default")


def below() -> Any:
    """A context in which a call goes on to the levels outside the current one."""
    return torch._C._ExcludeDispatchKeyGuard(_BATCHED)


class Batched(NamedTuple):
    """A tensor without the current level, and the axis that holds the samples, or None if they share it."""

    value: torch.Tensor
    axis: int | None

    def front(self) -> torch.Tensor:
        """The value with the samples along its first axis."""
        return self.value if self.axis is None else self.value.movedim(self.axis, 0)


def opened(value: torch.Tensor, level: int) -> Batched:
    """Take the current level off a tensor."""
    return Batched(*levels.unwrap_batched(value, level))


def wrapped(value: torch.Tensor, level: int) -> torch.Tensor:
    """Put a tensor whose first axis holds the samples at a level."""
    return levels.add_batch_dim(value, 0, level)


def tensors(args: Sequence[Any], kwargs: dict[str, Any]) -> Iterator[torch.Tensor]:
    """The tensors among the arguments of an operator, which may be in lists."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, tuple | list):
            yield from (item for item in value if isinstance(item, torch.Tensor))


def batch_size(args: Sequence[Any], kwargs: dict[str, Any], level: int) -> int | None:
    """How many samples the arguments hold at a level; None if no argument is batched there."""
    for tensor in tensors(args, kwargs):
        if levels.is_batchedtensor(tensor) and levels.maybe_get_level(tensor) == level:
            value, axis = levels.unwrap_batched(tensor, level)
            return int(value.shape[axis])
    return None


def replaced(value: Any, change: Callable[[torch.Tensor], Any]) -> Any:
    """An argument of an operator with every tensor in it changed."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, tuple | list):
        return type(value)([replaced(item, change) for item in value])
    return value


def written(operator: Any) -> list[tuple[int, str]]:
    """The place and name of each argument that an operator writes to."""
    arguments = operator._schema.arguments
    return [(i, a.name) for i, a in enumerate(arguments) if a.alias_info is not None and a.alias_info.is_write]


def argument(place: tuple[int, str], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """The argument at a place that :func:`written` gives."""
    index, name = place
    return args[index] if index < len(args) else kwargs.get(name)


def made_up(empty: torch.Tensor, integer: int = 0) -> torch.Tensor:
    """A sample to stand for those of an empty batch, whose first axis has size 0.

    It is to do no harm as a matrix to be inverted or factorised, as a probability, as an index or divisor (``integer``), or
    (int32) as a pivot, which counts from 1.
    """
    shape = empty.shape[1:]
    if not (empty.is_floating_point() or empty.is_complex()):
        return empty.new_full(shape, 1 if empty.dtype is torch.int32 else integer)
    if len(shape) < 2:
        return empty.new_full(shape, 0.9)
    noise = torch.arange(shape.numel(), dtype=torch.float64, device=empty.device).cos().square().reshape(shape)
    return (0.9 * torch.eye(*shape[-2:], dtype=torch.float64, device=empty.device) + noise / 100).to(empty.dtype)
