"""``x[mask] += v`` with a mask that varies from sample to sample.

Python reads ``x[mask]``, adds to it, and writes it back. How many elements are read differs from sample to sample, so what is
read here is the whole of ``x``, in a tensor that only such a statement gets hold of, and that only it can use.

Private names used, seen on torch 2.11, 2.13 and 2.15: ``torch._C.DisableTorchFunctionSubclass``, and those of
:mod:`torchbatch._torch.levels`, :mod:`torchbatch._torch.local` and :mod:`torchbatch._torch.overlay`.
"""

from __future__ import annotations

import dis
import functools
import operator
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from torchbatch._torch import caller, levels, local, overlay
from torchbatch.errors import DataDependentError, UnsupportedOperationError

_EVERYTHING = slice(None)
_OPERATIONS: dict[str, Callable[[Any, Any], Any]] = {
    "add_": operator.add,
    "sub_": operator.sub,
    "mul_": operator.mul,
    "div_": operator.truediv,
    "floor_divide_": operator.floordiv,
    "remainder_": operator.mod,
    "pow_": operator.pow,
    "__iand__": operator.and_,
    "__ior__": operator.or_,
    "__ixor__": operator.xor,
    "__ilshift__": operator.lshift,
    "__irshift__": operator.rshift,
}


class Masked(local.LocalTensor):  # so that PyTorch asks it before a tensor that it is written into
    """All elements of a tensor, in the place of those where a mask is true."""

    _whole: Tensor
    _mask: Tensor  # broadcast to the values
    _rest: int  # how many axes the mask leaves alone
    _error: Exception | None  # what the write will raise: Python takes a TypeError of an operator for a missing one

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in _OPERATIONS and type(args[0]) is Masked:
            return _computed(name, *args)
        if name == "__setitem__" and type(args[2]) is Masked:
            return _write(*args)
        raise _no_number()


def _no_number() -> DataDependentError:
    return DataDependentError(
        "A boolean mask that varies from sample to sample is the index of x[mask] += v or the like, which takes a number there, "
        f"or one entry for all. Write torch.where(mask, x + v, x) for a value for each element.{caller.line()}"
    )


def _masked(values: Tensor, mask: Tensor, rest: int, error: Exception | None = None) -> Masked:
    with torch._C.DisableTorchFunctionSubclass():
        result: Any = values.clone()
    result.__class__ = Masked
    result._whole, result._mask, result._rest, result._error = values, mask, rest, error
    found: Masked = result
    return found


def _computed(name: str, old: Masked, other: Any) -> Masked:
    """What becomes of the values; where the mask is false, of ones, which have a derivative under every operation."""
    values, mask, rest = old._whole, old._mask, old._rest
    if isinstance(other, Tensor) and other.dim() > rest:
        if type(other) is Masked or other.dim() > rest + 1 or other.shape[0] != 1:
            return _masked(values, mask, rest, _no_number())
        other = other.reshape(other.shape[1:])
    new = _OPERATIONS[name](torch.where(mask, values, torch.ones_like(values)), other)
    if torch.can_cast(new.dtype, values.dtype):
        return _masked(new.to(values.dtype), mask, rest)
    text = (
        f"what {name} gives has dtype {new.dtype}, which cannot be written into a tensor of dtype {values.dtype}.{caller.line()}"
    )
    return _masked(values, mask, rest, UnsupportedOperationError(text))


def _write(target: Tensor, index: Any, new: Masked) -> None:
    if new._error is not None:
        raise new._error
    entries = index if isinstance(index, tuple) else (index,)
    opened: list[Any] = []
    for entry in entries:
        opened += [_EVERYTHING] * entry.dim() if isinstance(entry, Tensor) else [entry]
    part = target[tuple(opened)]
    part.copy_(torch.where(new._mask, new._whole, part))


def _index(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def kernel(x: Tensor, indices: Sequence[Tensor | None]) -> Tensor:
        at = _mask_of(indices)
        mask = None if at is None else indices[at]
        if at is None or mask is None or not _is_augmented(caller.user_frame()):
            return original(x, indices)
        rest = x.dim() - at - mask.dim()
        return _masked(x, mask.reshape(*mask.shape, *[1] * rest), rest)

    return kernel


def _mask_of(indices: Sequence[Tensor | None]) -> int | None:
    """Which index is a per-sample mask, if it is the only index."""
    given = [i for i, index in enumerate(indices) if index is not None]
    index = indices[given[0]] if len(given) == 1 else None
    if index is None or index.dtype is not torch.bool or not any(levels.batch_levels(index)):
        return None
    return given[0]


def _is_augmented(frame: types.FrameType | None) -> bool:
    """Whether a frame reads an item in order to write it back."""
    return frame is not None and frame.f_lasti in _augmented(frame.f_code)


@functools.lru_cache(maxsize=4096)
def _augmented(code: types.CodeType) -> frozenset[int]:
    """Where a code object has ``x[i]`` of a statement such as ``x[i] += v``: it copies both ``x`` and ``i`` before."""
    steps = [step for step in dis.get_instructions(code) if step.opname != "CACHE"]
    copies = [step.opname == "COPY" and step.arg == 2 for step in steps]
    return frozenset(
        step.offset
        for step, *before in zip(steps[2:], copies[1:], copies, strict=False)
        if all(before) and step.opname in ("BINARY_SUBSCR", "BINARY_OP")
    )


overlay.register_factory("index.Tensor", _index)  # asked in functions only that may write in place
