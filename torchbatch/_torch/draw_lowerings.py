"""What the compiler makes of the operators of :mod:`torchbatch._torch.draw_ops`: one loop body each.

Inductor calls the body of an operation again for each of its uses. A hash written in a hundred operations, each of which uses
the one before twice, would so be written out thousands of times; as one body, it is written once.

This module loads the compiler, so it is imported with the first compilation.

Private names used, seen on torch 2.11, 2.13 and 2.15: ``torch._inductor.lowering.register_lowering``;
``torch._inductor.ir.Pointwise``, ``TensorBox``; ``torch._inductor.virtualized.ops``; and of ``torch._inductor.codegen.cpp``,
``CppOverrides`` and ``CppVecOverrides``, whose ``fma`` is otherwise a multiplication and an addition, rounded twice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._inductor.codegen.cpp import CppOverrides, CppVecOverrides
from torch._inductor.ir import Pointwise, TensorBox
from torch._inductor.lowering import register_lowering
from torch._inductor.virtualized import ops

from torchbatch._torch import draw_math
from torchbatch._torch import draw_ops as draw_ops  # defines the operators


def _fma(x: Any, y: Any, z: Any) -> str:
    return f"std::fma({x}, {y}, {z})"


def _fma_of_vectors(x: Any, y: Any, z: Any) -> str:
    return f"at::vec::fmadd({x}, {y}, {z})"


_fma_of_vectors.__name__ = "fma"  # by which the scalar one is found
for _overrides, _code in ((CppOverrides, _fma), (CppVecOverrides, _fma_of_vectors)):
    setattr(_overrides, "fma", staticmethod(_code))  # noqa: B010


class _InCode:
    """The operations of :mod:`~torchbatch._torch.draw_math` on values of Inductor's loop bodies, for processors."""

    where, less, equal, maximum, absolute, fma = ops.where, ops.lt, ops.eq, ops.maximum, ops.abs, ops.fma
    root, divided, at_least = ops.sqrt, ops.truediv, ops.ge

    @staticmethod
    def integer(value: int) -> Any:
        return ops.constant(value, torch.int32)

    @staticmethod
    def number(value: float, like: Any) -> Any:
        return ops.constant(value, torch.float32)

    @staticmethod
    def shifted(x: Any, distance: int) -> Any:
        return ops.bitwise_right_shift(x, _InCode.integer(distance)) & _InCode.integer((1 << (32 - distance)) - 1)

    @staticmethod
    def as_bits(x: Any) -> Any:
        return ops.to_dtype_bitcast(x, torch.int32, torch.float32)

    @staticmethod
    def as_float(x: Any) -> Any:
        return ops.to_dtype_bitcast(x, torch.float32, torch.int32)

    @staticmethod
    def to_float(x: Any) -> Any:
        return ops.to_dtype(x, torch.float32, src_dtype=torch.int32)

    @staticmethod
    def tangent(x: Any) -> Any:
        return _single(ops.tan(_double(x)))


class _InOtherCode(_InCode):
    """The same for other devices, whose fast square root and division are not rounded to the nearest."""

    @staticmethod
    def root(x: Any) -> Any:
        return _single(ops.sqrt(_double(x)))

    @staticmethod
    def divided(x: Any, y: Any) -> Any:
        return _single(ops.truediv(_double(x), _double(y)))


def _double(x: Any) -> Any:
    return ops.to_dtype(x, torch.float64, src_dtype=torch.float32)


def _single(x: Any) -> Any:
    return ops.to_dtype(x, torch.float32, src_dtype=torch.float64)


def _pointwise(like: TensorBox, dtype: torch.dtype, body: Callable[[Any], Any]) -> TensorBox:
    result = Pointwise.create(device=like.get_device(), dtype=dtype, inner_fn=body, ranges=list(like.get_size()))
    result.realize()  # or the body would be written out again for each use; loops are fused later
    return result


@register_lowering(torch.ops.torchbatch.threefry2x32.default, broadcast=True, type_promotion_kind=None)
def _hash(*words: TensorBox) -> tuple[TensorBox, ...]:
    loaders = [word.make_loader() for word in words]

    def body(part: int) -> Callable[[Any], Any]:
        def value(index: Any) -> Any:
            loaded = [loader(index) for loader in loaders]
            return draw_math.threefry2x32(_InCode, loaded[:2], loaded[2:])[part]

        return value

    return tuple(_pointwise(words[0], torch.int32, body(part)) for part in (0, 1))


@register_lowering(torch.ops.torchbatch.draw.default, type_promotion_kind=None)
def _draw(x: TensorBox, name: str, numbers: Sequence[float], dropped: int) -> TensorBox:
    loader = x.make_loader()
    device = x.get_device()
    space = _InCode if device is not None and device.type == "cpu" else _InOtherCode

    def body(index: Any) -> Any:
        return draw_math.apply(space, loader(index), name, numbers, dropped)

    return _pointwise(x, torch.float32, body)
