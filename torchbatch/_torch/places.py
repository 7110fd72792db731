"""``x[i]`` with an integer tensor ``i`` that has no number, or another one for each sample.

PyTorch takes an index without dimensions for an int and asks for its value, unless a ``vmap`` is the innermost transform. In a
trace there is no value, and inside ``grad`` inside ``vmap`` there are many. What is done instead is a selection by index. In a
trace a mode looks at each index; elsewhere that would cost too much, and tensors that are such indices have a class that does.

Private names used, seen on torch 2.11, 2.13 and 2.15: ``torch._C.DisableTorchFunctionSubclass``, and those of
:mod:`torchbatch._torch.levels`, :mod:`torchbatch._torch.local` and :mod:`torchbatch._torch.overlay`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from torchbatch._torch import levels, local, overlay

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8)
_EVERYTHING = slice(None)


class Place(local.LocalTensor):  # so that PyTorch asks it before a tensor that is written at such a place
    """A number of each sample, inside a transform that hides from PyTorch that it varies."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in ("__getitem__", "__setitem__"):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            if any(map(is_number, index)):
                return get(args[0], index) if name == "__getitem__" else put(args[0], index, args[2])
        if local.LocalTensor in types:
            return mark(local.LocalTensor.__torch_function__(func, types, args, kwargs))
        with torch._C.DisableTorchFunctionSubclass():
            return mark(func(*args, **(kwargs or {})))


def mark(value: Any) -> Any:
    """A tensor as it is, and a :class:`Place` if it has to be one."""
    plain = type(value) is torch.Tensor and not value.dim() and levels.is_wrapped(value)
    if plain and is_number(value) and any(levels.batch_levels(value)):
        value.__class__ = Place
    return value


def _marked(original: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: mark(original(*args, **kwargs))


def _select_one(original: Callable[..., Any]) -> Callable[..., Any]:
    """PyTorch's rule for a number of each sample as the index gives all samples the entries of all of them."""
    return lambda x, dim, index: original(x, dim, index if index.dim() else index.reshape(1))


for _name in ("argmax", "argmin"):
    overlay.register(_name, _marked)
overlay.register("index_select", _select_one)


def is_number(entry: Any) -> bool:
    """Whether an entry of an index is a tensor that stands for one int, and that PyTorch would ask for its value."""
    if not isinstance(entry, torch.Tensor) or entry.dim() or entry.dtype not in _INTEGERS:
        return False
    return not levels.is_batchedtensor(entry)


def get(tensor: torch.Tensor, index: Sequence[Any]) -> torch.Tensor:
    """``tensor[index]``, where entries of the index are numbers."""
    if _has_others(index):
        return tensor[tuple([i.reshape(1) if is_number(i) else i for i in index])]
    view, axes = _opened(tensor, index)
    for axis, number in reversed(axes):
        view = view.index_select(axis, _counted_from_start(number, view.shape[axis])).squeeze(axis)
    return view


def put(tensor: torch.Tensor, index: Sequence[Any], value: Any) -> None:
    """``tensor[index] = value``, where entries of the index are numbers."""
    if _has_others(index):
        tensor[tuple([i.reshape(1) if is_number(i) else i for i in index])] = value
        return
    view, axes = _opened(tensor, index)
    written = torch.as_tensor(value, dtype=tensor.dtype, device=tensor.device)
    shape = [size for axis, size in enumerate(view.shape) if axis not in dict(axes)]
    while written.dim() > len(shape) and written.shape[0] == 1:
        written = written.squeeze(0)
    written = written.expand(shape)
    for axis, _ in axes:
        written = written.unsqueeze(axis)
    if len(axes) == 1:
        [(axis, number)] = axes
        view.index_copy_(axis, _counted_from_start(number, view.shape[axis]), written)
        return
    chosen = torch.ones((), dtype=torch.bool, device=tensor.device)
    for axis, number in axes:
        places = torch.arange(view.shape[axis], device=tensor.device) == _counted_from_start(number, view.shape[axis])
        chosen = chosen & places.reshape([-1 if axis == other else 1 for other in range(view.dim())])
    view.copy_(torch.where(chosen, written, view))


def _has_others(index: Sequence[Any]) -> bool:
    """Whether there is an index by a list or by a tensor with dimensions beside the numbers."""
    return any(isinstance(i, list) or (isinstance(i, torch.Tensor) and not is_number(i)) for i in index)


def _opened(tensor: torch.Tensor, index: Sequence[Any]) -> tuple[torch.Tensor, list[tuple[int, torch.Tensor]]]:
    """What the rest of an index selects, and the axes of it that the numbers select from."""
    index = list(index)
    if Ellipsis in [entry for entry in index if not isinstance(entry, torch.Tensor)]:
        place = next(i for i, entry in enumerate(index) if entry is Ellipsis)
        consumed = sum(entry is not None and entry is not Ellipsis for entry in index)
        index[place : place + 1] = [_EVERYTHING] * (tensor.dim() - consumed)
    view = tensor[tuple([_EVERYTHING if is_number(entry) else entry for entry in index])]
    axes, axis = [], 0
    for entry in index:
        if is_number(entry):
            axes.append((axis, entry))
        if entry is None or isinstance(entry, slice) or is_number(entry):
            axis += 1
    return view, axes


def _counted_from_start(number: torch.Tensor, size: int) -> torch.Tensor:
    number = number.to(torch.int64)
    return torch.where(number < 0, number + size, number).reshape(1)
