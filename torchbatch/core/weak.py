"""Python numbers as tensors that give way to others in type promotion, as Python numbers do.

A number that is an argument of a jit function is a tensor inside, so that another number needs no other trace. PyTorch
promotes a zero-dimensional tensor by its dtype, but a number only by its kind (bool, int, float, complex). JAX calls such a
value weakly typed. Here it is a zero-dimensional tensor of the widest dtype of its kind, which is cast before an operation to
what the other operands make of it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from torchbatch.core.argnums import flatten
from torchbatch.errors import InPlaceError

_CPU = torch.device("cpu")
WIDEST = {bool: torch.bool, int: torch.int64, float: torch.float64, complex: torch.complex128}
_KINDS = {dtype: kind for kind, dtype in WIDEST.items()}
_INEXACT = (torch.float64, torch.complex128)


def as_weak(number: bool | int | float | complex) -> torch.Tensor:
    """The tensor that stands for a number."""
    return torch.scalar_tensor(number, dtype=WIDEST[type(number)], device=_CPU)


def _strong_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that PyTorch makes of a number by default, for that of a weak tensor."""
    if dtype is torch.float64:
        return torch.get_default_dtype()
    return torch.get_default_dtype().to_complex() if dtype is torch.complex128 else dtype


class _Active(threading.local):
    """The numbers of the function that is traced in this thread."""

    numbers: WeakNumbers | None = None


active = _Active()


def strong(value: Any) -> Any:
    """A value as it enters a transform or leaves the function: a number gets PyTorch's default dtype for its kind."""
    numbers = active.numbers
    return value if numbers is None or not numbers.is_weak(value) else value.to(_strong_dtype(value.dtype))


class WeakNumbers(TorchFunctionMode):
    """While this is active, the given tensors, and what is computed of them alone, are promoted as Python numbers are."""

    def __init__(self, numbers: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self._weak = {id(number): number for number in numbers}  # kept alive, so that an id stands for one tensor

    def __enter__(self) -> Any:
        self._outer, active.numbers = active.numbers, self
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *error: Any) -> None:
        active.numbers = self._outer
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def is_weak(self, value: Any) -> bool:
        """Whether a value is one of the weak tensors."""
        return id(value) in self._weak

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        leaves, structure = flatten((args, kwargs))
        weak = [i for i, leaf in enumerate(leaves) if self.is_weak(leaf)]
        if not weak or name == "__get__":  # reading a property, such as x.dtype
            return func(*args, **kwargs)
        if name in _MAKERS:
            return _MAKERS[name](self, *args, **kwargs)
        others = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and not self.is_weak(leaf)]
        if name.strip("_") in ("clamp", "clip"):  # the bounds are two numbers or two tensors
            weak = [i for i, leaf in enumerate(leaves) if i in weak or type(leaf) in WIDEST]
            leaves = [as_weak(leaf) if type(leaf) in WIDEST else leaf for leaf in leaves]
        if not others:
            return self._alone(func, leaves, structure)
        _check_write(name, leaves[0], [leaves[i] for i in weak], others)
        if name in ("pow", "__pow__") and leaves[0].dtype is torch.bool is leaves[1].dtype and weak == [1]:
            return leaves[0] | ~leaves[1]  # PyTorch takes a number there, but no tensor
        mask = _place_of_mask(func, name, leaves, len(args), kwargs)
        for i in weak:
            leaves[i] = leaves[i] if i == mask else _beside(leaves[i], others, name)
        args, kwargs = structure.unflatten(leaves)
        return func(*args, **kwargs)

    def _alone(self, func: Any, leaves: list[Any], structure: Any) -> Any:
        """What is computed of numbers alone is a number again."""
        name = getattr(func, "__name__", "").strip("_")
        if name in _COUNTING or (_is_arithmetic(name) and not self._are_truths(name, leaves)):
            dtype = _dtype_of_whole(name, leaves)
            leaves = [self._counted(leaf, dtype) for leaf in leaves]
        args, kwargs = structure.unflatten(leaves)
        result = func(*args, **kwargs)
        if not isinstance(result, torch.Tensor) or name in _CONVERSIONS or result.dtype not in _KINDS:
            return result
        if result.dim():
            return result.to(_strong_dtype(result.dtype))
        self._weak[id(result)] = result
        return result

    def _are_truths(self, name: str, leaves: list[Any]) -> bool:
        """Whether truth values are combined by logic, and give one."""
        operands = [leaf.dtype is torch.bool if self.is_weak(leaf) else isinstance(leaf, bool) for leaf in leaves]
        return name in _LOGIC and all(operands)

    def _counted(self, leaf: Any, dtype: torch.dtype) -> Any:
        """A truth value is a number in arithmetic, and a whole number is computed with in ``dtype``."""
        if isinstance(leaf, bool):
            return int(leaf)
        if not self.is_weak(leaf) or leaf.dtype in _INEXACT:
            return leaf
        return leaf.to(dtype)

    def full(self, size: Any, fill_value: Any, dtype: torch.dtype | None = None, **options: Any) -> torch.Tensor:
        """``torch.full`` with a number that is not known yet."""
        made = torch.empty(size, dtype=dtype or _strong_dtype(fill_value.dtype), **options)
        return made.copy_(fill_value)

    def full_like(self, like: torch.Tensor, fill_value: torch.Tensor, **options: Any) -> torch.Tensor:
        """``torch.full_like`` with such a number."""
        return torch.empty_like(like, **options).copy_(fill_value)

    def new_full(self, like: torch.Tensor, size: Any, fill_value: torch.Tensor, **options: Any) -> torch.Tensor:
        """``Tensor.new_full`` with such a number."""
        return like.new_empty(size, **options).copy_(fill_value)

    def tensor(self, data: Any, dtype: torch.dtype | None = None, **options: Any) -> torch.Tensor:
        """``torch.tensor`` of such numbers, and lists of them."""
        if isinstance(data, list | tuple):
            return torch.stack([self.tensor(item, dtype, **options) for item in data])
        if not isinstance(data, torch.Tensor):
            return torch.tensor(data, dtype=dtype, **options)
        return data.to(dtype=dtype or (_strong_dtype(data.dtype) if self.is_weak(data) else data.dtype), copy=True)


_MAKERS: dict[str, Callable[..., torch.Tensor]] = {
    "full": WeakNumbers.full,
    "full_like": WeakNumbers.full_like,
    "new_full": WeakNumbers.new_full,
    "tensor": WeakNumbers.tensor,
}
_CONVERSIONS = frozenset("to float double half bfloat16 long int short bool type type_as cfloat cdouble".split())
_ARITHMETIC = frozenset("add sub rsub mul div truediv floordiv floor_divide mod remainder pow and or xor maximum minimum".split())
_LOGIC = frozenset("and or xor rand ror rxor iand ior ixor".split())
_COUNTING = frozenset("neg negative abs pos positive lshift rshift rlshift rrshift ilshift irshift".split())
_CHOICE = frozenset("where clamp clamp_ clip clip_ clamp_min clamp_max fmod masked_fill fill lerp".split())


def _is_arithmetic(name: str) -> bool:
    return name in _ARITHMETIC or name.removeprefix("r") in _ARITHMETIC or name.removeprefix("i") in _ARITHMETIC


def _dtype_of_whole(name: str, leaves: list[Any]) -> torch.dtype:
    """What a whole number becomes in arithmetic: quotients and powers below 0 make fractions, and so do Python's floats."""
    if any(isinstance(leaf, complex) for leaf in leaves):
        return torch.complex128
    fraction = ("div" in name and "floor" not in name) or any(isinstance(leaf, float) for leaf in leaves)
    below = name == "pow" and len(leaves) > 1 and type(leaves[1]) is int and leaves[1] < 0
    return torch.float64 if fraction or below else torch.int64


def _check_write(name: str, target: Any, weak: Sequence[torch.Tensor], others: Sequence[torch.Tensor]) -> None:
    """Refuse, as PyTorch does, to write a number into a tensor whose dtype does not hold its kind."""
    in_place = (name.endswith("_") and not name.endswith("__")) or name.startswith("__i")
    if not isinstance(target, torch.Tensor) or not (in_place or name == "__setitem__"):
        return
    if not target.is_complex() and any(value.is_complex() for value in weak):
        raise InPlaceError("jit: a complex number is written in place into a real tensor.")
    if in_place and _is_arithmetic(name.strip("_")):
        found = _promoted(weak[0], others)
        if not torch.can_cast(found, target.dtype):
            raise InPlaceError(f"jit: {name} makes values of {found}, which a tensor of {target.dtype} does not hold.")


def _place_of_mask(func: Any, name: str, leaves: Sequence[Any], count: int, kwargs: Mapping[str, Any]) -> int | None:
    """Which of the operands is the truth value that chooses between others; there are ``count`` positional ones."""
    if name not in ("where", "masked_fill", "masked_fill_"):
        return None
    place = 0 if func is torch.where else 1
    if place < count:
        return place
    given = kwargs.get("condition", kwargs.get("mask"))
    return next((i for i in range(count, len(leaves)) if leaves[i] is given), None)


def _beside(weak: torch.Tensor, others: Sequence[torch.Tensor], name: str) -> torch.Tensor:
    """A number as an operand beside tensors.

    An integer that may be an index, a size or an axis stays what it is. Beside tensors with dimensions PyTorch's own promotion
    gives way, and computes in the precision of the number.
    """
    arithmetic = _is_arithmetic(name.strip("_"))
    if weak.dtype not in _INEXACT and not (arithmetic or name.strip("_") in _CHOICE):
        return weak
    dtype = _promoted(weak, others)
    gives_way = arithmetic and any(other.dim() and other.dtype is dtype for other in others)
    return weak if gives_way else weak.to(dtype)


def _promoted(weak: torch.Tensor, others: Sequence[torch.Tensor]) -> torch.dtype:
    """The dtype that a Python number of the kind of ``weak`` takes beside these tensors."""
    kind: Any = _KINDS[weak.dtype]
    values = [other for other in others if other.dtype is not torch.bool] or others  # a mask says nothing
    found = torch.result_type(values[0], kind(1))
    for other in values[1:]:
        found = torch.promote_types(found, torch.result_type(other, kind(1)))
    return found
