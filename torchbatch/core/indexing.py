"""``x[i]`` with an integer tensor ``i`` while a function is traced: PyTorch would ask for its value, as it does for an int.

What is recorded instead is a selection by index, which reads the value when the graph runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from torchbatch._torch import levels

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8)
_EVERYTHING = slice(None)


class IntegerIndices(TorchFunctionMode):
    """While this is active, tensors without dimensions may be indices."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in ("__getitem__", "__setitem__"):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            if any(map(_is_number, index)):
                return _get(args[0], index) if name == "__getitem__" else _set(args[0], index, args[2])
        return func(*args, **(kwargs or {}))


def _is_number(entry: Any) -> bool:
    """Whether an entry of an index is a tensor that stands for one int; one that varies in a ``vmap`` is none."""
    if not isinstance(entry, torch.Tensor) or entry.dim() or entry.dtype not in _INTEGERS:
        return False
    return not any(levels.batch_levels(entry))


def _get(tensor: torch.Tensor, index: Sequence[Any]) -> torch.Tensor:
    if _has_others(index):
        return tensor[tuple([i.reshape(1) if _is_number(i) else i for i in index])]
    view, axes = _opened(tensor, index)
    for axis, number in reversed(axes):
        view = view.index_select(axis, _counted_from_start(number, view.shape[axis])).squeeze(axis)
    return view


def _set(tensor: torch.Tensor, index: Sequence[Any], value: Any) -> None:
    if _has_others(index):
        tensor[tuple([i.reshape(1) if _is_number(i) else i for i in index])] = value
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
    return any(isinstance(i, list) or (isinstance(i, torch.Tensor) and not _is_number(i)) for i in index)


def _opened(tensor: torch.Tensor, index: Sequence[Any]) -> tuple[torch.Tensor, list[tuple[int, torch.Tensor]]]:
    """What the rest of an index selects, and the axes of it that the numbers select from."""
    index = list(index)
    if Ellipsis in [entry for entry in index if not isinstance(entry, torch.Tensor)]:
        place = next(i for i, entry in enumerate(index) if entry is Ellipsis)
        consumed = sum(entry is not None and entry is not Ellipsis for entry in index)
        index[place : place + 1] = [_EVERYTHING] * (tensor.dim() - consumed)
    view = tensor[tuple([_EVERYTHING if _is_number(entry) else entry for entry in index])]
    axes, axis = [], 0
    for entry in index:
        if _is_number(entry):
            axes.append((axis, entry))
        if entry is None or isinstance(entry, slice) or _is_number(entry):
            axis += 1
    return view, axes


def _counted_from_start(number: torch.Tensor, size: int) -> torch.Tensor:
    number = number.to(torch.int64)
    return torch.where(number < 0, number + size, number).reshape(1)
