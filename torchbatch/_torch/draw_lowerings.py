"""What the compiler makes of the operators of :mod:`torchbatch._torch.draw_ops`: one loop body each.

Inductor calls the body of an operation again for each of its uses. A hash written in a hundred operations, each of which uses
the one before twice, would so be written out thousands of times; as one body, it is written once.

This module loads the compiler, so it is imported with the first compilation.

On processors, some operations are written here in the compiler's place: its ``fma`` is a multiplication and an addition, rounded
twice; a number's bits are read one number at a time; and it has no rotation, for which ``inline_asm_elementwise`` stands.

Private names used, seen on torch 2.11, 2.13 and 2.15: ``torch._inductor.lowering.register_lowering``;
``torch._inductor.ir.Pointwise``, ``TensorBox``; ``torch._inductor.virtualized.ops``, ``V.kernel._get_num_vectors``;
``torch._inductor.cpu_vec_isa.pick_vec_isa``, ``VecAVX2``, ``VecAVX512``; and ``torch._inductor.codegen.cpp.CppOverrides`` and
``CppVecOverrides``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._inductor.codegen.cpp import CppOverrides, CppVecOverrides
from torch._inductor.cpu_vec_isa import VecAVX2, VecAVX512, pick_vec_isa
from torch._inductor.ir import Pointwise, TensorBox
from torch._inductor.lowering import register_lowering
from torch._inductor.virtualized import V, ops

from torchbatch._torch import draw_math
from torchbatch._torch import draw_ops as draw_ops  # defines the operators


def _fma(x: Any, y: Any, z: Any) -> str:
    return f"std::fma({x}, {y}, {z})"


def _fma_of_vectors(x: Any, y: Any, z: Any) -> str:
    return f"at::vec::fmadd({x}, {y}, {z})"


_bitcast: Callable[..., str] = vars(CppVecOverrides)["to_dtype_bitcast"].__func__
_CASTS = {(torch.int32, torch.float32): ("int32_t", "castps_si"), (torch.float32, torch.int32): ("float", "castsi")}


def _bitcast_of_vectors(x: Any, dtype: torch.dtype, src_dtype: torch.dtype) -> str:
    bits = _register()
    if not bits or (dtype, src_dtype) not in _CASTS:
        return _bitcast(x, dtype, src_dtype)
    kind, name = _CASTS[dtype, src_dtype]
    call = f"_mm{bits}_{name}{bits}" + ("_ps" if name == "castsi" else "")
    return f"at::vec::Vectorized<{kind}>({call}({x}))"


def _register() -> int:
    """How many bits a vector of 32-bit numbers has, where it is one register of an Intel-like processor; else 0."""
    isa = pick_vec_isa()
    bits = 512 if isinstance(isa, VecAVX512) else 256 if isinstance(isa, VecAVX2) else 0
    return bits if V.kernel._get_num_vectors(torch.int32) == V.kernel._get_num_vectors(torch.float32) == 1 else 0


def _rotated(x: Any, *, asm: str, **_: Any) -> str:
    distance = _distance(asm)
    word = f"static_cast<uint32_t>({x})"
    return f"static_cast<int32_t>(({word} << {distance}) | ({word} >> {32 - distance}))"


def _rotated_vectors(x: Any, *, asm: str, **_: Any) -> str:
    distance, bits = _distance(asm), _register()
    if bits == 512:
        return f"at::vec::Vectorized<int32_t>(_mm512_rol_epi32({x}, {distance}))"
    if bits == 256:
        left, right = f"_mm256_slli_epi32({x}, {distance})", f"_mm256_srli_epi32({x}, {32 - distance})"
        return f"at::vec::Vectorized<int32_t>(_mm256_or_si256({left}, {right}))"
    left, right, kept = (f"decltype({x})({number})" for number in (distance, 32 - distance, (1 << distance) - 1))
    return f"(({x} << {left}) | (({x} >> {right}) & {kept}))"


_ROTATED = "rotated to the left by "


def _distance(asm: str) -> int:
    if not asm.startswith(_ROTATED):
        raise NotImplementedError("inline_asm_elementwise is for GPUs")
    return int(asm.removeprefix(_ROTATED))


def _replace(name: str, scalar: Callable[..., str] | None, vector: Callable[..., str]) -> None:
    """Write an operation in the compiler's place."""
    vector.__name__ = name  # by which the scalar one is found
    setattr(CppVecOverrides, name, staticmethod(vector))
    if scalar is not None:
        setattr(CppOverrides, name, staticmethod(scalar))


_replace("fma", _fma, _fma_of_vectors)
_replace("to_dtype_bitcast", None, _bitcast_of_vectors)
_replace("inline_asm_elementwise", _rotated, _rotated_vectors)


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
    def rotated(x: Any, distance: int) -> Any:
        return ops.inline_asm_elementwise(x, asm=f"{_ROTATED}{distance}", dtype=torch.int32)

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
    def rotated(x: Any, distance: int) -> Any:
        return (x << _InCode.integer(distance)) | _InCode.shifted(x, 32 - distance)

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


def _space(value: TensorBox) -> type[_InCode]:
    device = value.get_device()
    return _InCode if device is not None and device.type == "cpu" else _InOtherCode


def _pointwise(like: TensorBox, dtype: torch.dtype, body: Callable[[Any], Any]) -> TensorBox:
    result = Pointwise.create(device=like.get_device(), dtype=dtype, inner_fn=body, ranges=list(like.get_size()))
    result.realize()  # or the body would be written out again for each use; loops are fused later
    return result


@register_lowering(torch.ops.torchbatch.threefry2x32.default, broadcast=True, type_promotion_kind=None)
def _hash(*words: TensorBox) -> tuple[TensorBox, ...]:
    loaders, space = [word.make_loader() for word in words], _space(words[0])

    def body(part: int) -> Callable[[Any], Any]:
        def value(index: Any) -> Any:
            loaded = [loader(index) for loader in loaders]
            return draw_math.threefry2x32(space, loaded[:2], loaded[2:])[part]

        return value

    return tuple(_pointwise(words[0], torch.int32, body(part)) for part in (0, 1))


@register_lowering(torch.ops.torchbatch.draw.default, type_promotion_kind=None)
def _draw(x: TensorBox, name: str, numbers: Sequence[float], dropped: int) -> TensorBox:
    loader, space = x.make_loader(), _space(x)

    def body(index: Any) -> Any:
        return draw_math.apply(space, loader(index), name, numbers, dropped)

    return _pointwise(x, torch.float32, body)
