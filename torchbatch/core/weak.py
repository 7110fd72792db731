"""Python numbers as tensors that give way to others in type promotion, as Python numbers do.

A number that is an argument of a jit function is a tensor inside, so that another number needs no other trace. PyTorch
promotes a zero-dimensional tensor by its dtype, but a number only by its kind (bool, int, float, complex). JAX calls such a
value weakly typed. Here it is a zero-dimensional tensor of the widest dtype of its kind, which is cast before each operation
to what the other operands make of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from torchbatch.core.argnums import flatten

WIDEST = {bool: torch.bool, int: torch.int64, float: torch.float64, complex: torch.complex128}
_CPU = torch.device("cpu")
_KINDS = {dtype: kind for kind, dtype in WIDEST.items()}


def as_weak(number: bool | int | float | complex) -> torch.Tensor:
    """The tensor that stands for a number."""
    return torch.scalar_tensor(number, dtype=WIDEST[type(number)], device=_CPU)


def strong_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that PyTorch makes of a number by default, for that of a weak tensor."""
    if dtype is torch.float64:
        return torch.get_default_dtype()
    return torch.get_default_dtype().to_complex() if dtype is torch.complex128 else dtype


class WeakNumbers(TorchFunctionMode):
    """While this is active, the given tensors, and what is computed of them alone, are promoted as Python numbers are."""

    def __init__(self, numbers: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self._weak = {id(number): number for number in numbers}  # kept alive, so that an id stands for one tensor

    def is_weak(self, value: Any) -> bool:
        """Whether a value is one of the weak tensors."""
        return id(value) in self._weak

    def strong(self, value: torch.Tensor) -> torch.Tensor:
        """A tensor as it leaves the function: a number gets PyTorch's default dtype for its kind."""
        return value.to(strong_dtype(value.dtype)) if self.is_weak(value) else value

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        leaves, structure = flatten((args, kwargs))
        weak = [i for i, leaf in enumerate(leaves) if self.is_weak(leaf)]
        if not weak or _is_question(func):
            return func(*args, **kwargs)
        others = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and not self.is_weak(leaf)]
        if not others:
            return self._alone(func, args, kwargs)
        for i in weak:
            if leaves[i].dtype in _FLOATING or _is_arithmetic(func):
                leaves[i] = leaves[i].to(_promoted(leaves[i], others))
        args, kwargs = structure.unflatten(leaves)
        return func(*args, **kwargs)

    def _alone(self, func: Any, args: Any, kwargs: Any) -> Any:
        """What is computed of numbers alone is a number again."""
        result = func(*args, **kwargs)
        if isinstance(result, torch.Tensor) and result.dim() == 0 and result.dtype in _KINDS and func is not torch.Tensor.to:
            self._weak[id(result)] = result
        return result


def _is_question(func: Any) -> bool:
    """Whether a call only asks for a property: reading ``x.dtype`` is a call, too."""
    return getattr(func, "__name__", "") == "__get__"


_FLOATING = (torch.float64, torch.complex128)
_ARITHMETIC = frozenset("add sub rsub mul div truediv floordiv floor_divide mod remainder pow and or xor maximum minimum".split())


def _is_arithmetic(func: Any) -> bool:
    """Whether an integer takes part in the arithmetic, and is no index, size or axis."""
    name = getattr(func, "__name__", "").strip("_")
    return name in _ARITHMETIC or name.removeprefix("r") in _ARITHMETIC or name.removeprefix("i") in _ARITHMETIC


def _promoted(weak: torch.Tensor, others: Sequence[torch.Tensor]) -> torch.dtype:
    """The dtype that a Python number of the kind of ``weak`` takes beside these tensors."""
    kind = _KINDS[weak.dtype]
    found = torch.result_type(others[0], kind(1))
    for other in others[1:]:
        found = torch.promote_types(found, torch.result_type(other, kind(1)))
    return found
