"""Methods of tensors that Python runs and no operation stands for, while a function is traced.

Private names used, seen on torch 2.11, 2.13 and 2.15: ``torch._subclasses.fake_tensor.FakeTensor``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode

from torchbatch._torch import levels, modes
from torchbatch._torch.captured import called_backward
from torchbatch.errors import UnsupportedOperationError


class Methods(TorchFunctionMode):
    """Refuses ``backward()`` and ``.grad``, which reach what is outside; records ``copy.copy`` and ``copy.deepcopy``.

    Args:
        others: modes that are active too, and are to be so inside an ``autograd.Function``, as this one.
    """

    def __init__(self, others: Sequence[TorchFunctionMode] = ()) -> None:
        super().__init__()
        self._others = others

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.backward:
            raise called_backward()
        if modes.calls_function(func):
            return func(modes.Remembered([self, *self._others]).kept_by(args[0]), *args[1:])
        if func in _GRADIENT and _is_from_outside(args[0]):
            raise _used_gradient()
        if func is torch.Tensor.__deepcopy__ and args[0].is_leaf:  # PyTorch's own refuses the others
            return _as_leaf(args[0].detach().clone(), args[0])
        if func is torch.Tensor.__reduce_ex__:
            shared = _as_leaf(args[0].detach(), args[0])
            return lambda: shared, ()  # which nothing can pickle
        return func(*args, **(kwargs or {}))


_property: Any = torch.Tensor.grad
_GRADIENT = frozenset((_property.__get__, _property.__set__, _property.__delete__))


def _is_from_outside(value: torch.Tensor) -> bool:
    """Whether a tensor is an argument or closed over; nothing that is made inside has a gradient."""
    return type(levels.innermost(value)) is not FakeTensor or (value.is_leaf and value.requires_grad)


def _used_gradient() -> UnsupportedOperationError:
    return UnsupportedOperationError(
        "jit: the function reads or sets .grad of a tensor from outside. That is another tensor after each backward(), but the "
        "compiled function would keep to the one that it saw. Pass the gradient as an argument of its own, f(…, w.grad), and "
        "return the new one."
    )


def _as_leaf(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return value.requires_grad_() if like.requires_grad else value
