"""Run a function on shapes and dtypes alone: every tensor in it is on PyTorch's meta device, which holds no numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from torchbatch.core.argnums import flatten
from torchbatch.errors import DataDependentError, UnsupportedOperationError

META = torch.device("meta")

_NEEDS_VALUES = frozenset(
    getattr(torch.Tensor, name)
    for name in "item tolist numpy __bool__ __int__ __float__ __complex__ __index__ __array__ __contains__".split()
)
_TENSOR_METHODS_OF_DEVICE = frozenset((torch.Tensor.cpu, torch.Tensor.cuda))


def _needs_values(func: Any) -> DataDependentError:
    return DataDependentError(
        f"eval_shape: the function needs the value of a tensor ({func.__name__}), but it runs on shapes and dtypes "
        f"alone. Use torch.where in the place of Python's if and of boolean masks, or bind the value with "
        f"functools.partial."
    )


def to_meta(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor without numbers, of the same shape, strides and dtype."""
    if tensor.device == META:
        return tensor
    if tensor.layout is not torch.strided:
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=META)
    return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=META)


class Abstract(TorchFunctionMode):
    """Move every tensor and every new tensor to the meta device, and refuse what needs numbers."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _NEEDS_VALUES:
            raise _needs_values(func)
        if func in _TENSOR_METHODS_OF_DEVICE:
            self._same_device(torch.device(func.__name__))
            return args[0]
        args, kwargs = self._moved((args, kwargs or {}))
        try:
            return func(*args, **kwargs)
        except NotImplementedError as error:
            if "data-independent" in str(error):
                raise _needs_values(func) from error
            raise UnsupportedOperationError(
                f"eval_shape: PyTorch cannot say which shape {func.__name__} returns without running it. Call the "
                f"function on small tensors instead."
            ) from error

    def _moved(self, value: Any) -> Any:
        leaves, structure = flatten(value)
        return structure.unflatten([self._moved_leaf(leaf) for leaf in leaves])

    def _moved_leaf(self, leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor):
            return to_meta(leaf)
        if isinstance(leaf, torch.device) or (isinstance(leaf, str) and leaf.partition(":")[0] in _DEVICE_TYPES):
            return self._same_device(torch.device(leaf))
        return leaf

    def _same_device(self, device: torch.device) -> torch.device:
        if device.type not in ("meta", self.device.type):
            raise UnsupportedOperationError(
                f"eval_shape: the function asks for a tensor on {device}, but its arguments are on {self.device}. "
                f"eval_shape follows one device only; leave the move out of the function."
            )
        return META


_DEVICE_TYPES = frozenset(("cpu", "cuda", "mps", "xpu", "meta"))
