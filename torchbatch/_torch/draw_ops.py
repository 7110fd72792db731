"""The two steps of a random draw as operators of their own: the hash, and a function of :mod:`torchbatch._torch.draw_math`.

An operator is one entry of a graph, where the hundred operations of the hash would each be one; transforms see through it by a
batching rule, and the compiler by a lowering (:mod:`torchbatch._torch.draw_lowerings`). On plain tensors, the functions run at
once, in blocks that stay in the processor's cache.

Private names used, seen on torch 2.11, 2.13 and 2.15: ``torch._C._functorch.peek_interpreter_stack`` and those of
:mod:`torchbatch._torch.batching` and :mod:`torchbatch._torch.overlay`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch._C import _functorch

from torchbatch._torch import batching, draw_math, overlay

_Pair = tuple[torch.Tensor, torch.Tensor]
_BLOCK = 1 << 15
_library = torch.library.Library("torchbatch", "FRAGMENT")
_tags = (torch.Tag.pt2_compliant_tag,)
_library.define("threefry2x32(Tensor key_a, Tensor key_b, Tensor count_a, Tensor count_b) -> (Tensor, Tensor)", tags=_tags)
_library.define("draw(Tensor x, str name, float[] numbers, int dropped) -> Tensor", tags=_tags)
_library.define("wide_draw(Tensor x, str name, float[] numbers) -> Tensor", tags=_tags)
_library.define("same_bits(Tensor x, ScalarType dtype) -> Tensor", tags=_tags)
_is_compiling = torch.compiler.is_compiling


def is_plain() -> bool:
    """Whether nothing looks on: no transform, no tracer."""
    return not _is_compiling() and _functorch.peek_interpreter_stack() is None and not overlay.is_traced()


def threefry2x32(key_a: torch.Tensor, key_b: torch.Tensor, count_a: torch.Tensor, count_b: torch.Tensor) -> _Pair:
    """The hash of two words of counters under two words of keys, int32 tensors with as many dimensions each."""
    operator: Callable[..., _Pair] = _hash if is_plain() else torch.ops.torchbatch.threefry2x32.default
    return operator(key_a, key_b, count_a, count_b)


def draw(x: torch.Tensor, name: str, numbers: Sequence[float] = (), dropped: int = 0) -> torch.Tensor:
    """The step ``name`` of :data:`draw_math.STEPS` on float32 numbers; no gradient flows through it."""
    operator: Callable[..., torch.Tensor] = _draw if is_plain() else torch.ops.torchbatch.draw.default
    return operator(x.detach(), name, list(numbers), dropped)


def wide_draw(x: torch.Tensor, name: str, numbers: Sequence[float] = ()) -> torch.Tensor:
    """The same on float64 numbers. The compiler calls it as it is, since its own functions differ in the last digits."""
    operator: Callable[..., torch.Tensor] = _wide_draw if is_plain() else torch.ops.torchbatch.wide_draw.default
    return operator(x.detach(), name, list(numbers))


def same_bits(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The bits of a tensor as another dtype of the same width.

    The batching rule for it is younger than torch 2.11, and the compiler's loops over unsigned words are slow.
    """
    if x.dtype is dtype:
        return x
    return x.view(dtype) if is_plain() else torch.ops.torchbatch.same_bits.default(x, dtype)


# --- on plain tensors ------------------------------------------------------------------------------------------------


def _hash(*words: torch.Tensor) -> _Pair:
    shape = torch.broadcast_shapes(*[word.shape for word in words])
    if math.prod(shape) <= _BLOCK:
        return draw_math.threefry2x32(draw_math.OnTensors, words[:2], words[2:])
    first, second = (torch.empty(shape, dtype=torch.int32, device=words[0].device) for _ in range(2))
    for place in _blocks(shape, _block(words[0].device)):
        block = [word[_within(word.shape, place)] for word in words]
        first[place], second[place] = draw_math.threefry2x32(draw_math.OnTensors, block[:2], block[2:])
    return first, second


def _draw(x: torch.Tensor, name: str, numbers: Sequence[float], dropped: int) -> torch.Tensor:
    size = _block(x.device)
    if x.numel() <= size:
        return draw_math.apply(draw_math.OnTensors, x, name, numbers, dropped)
    flat = x.reshape(-1)
    result = torch.empty_like(flat)
    for start in range(0, flat.numel(), size):
        block = flat[start : start + size]
        result[start : start + size] = draw_math.apply(draw_math.OnTensors, block, name, numbers, dropped)
    return result.view(x.shape)


def _wide_draw(x: torch.Tensor, name: str, numbers: Sequence[float]) -> torch.Tensor:
    return draw_math.WIDE[name](x, *numbers)


def _same_bits(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return x.view(dtype).clone()  # the result of an operator is no view of its argument


def _block(device: torch.device) -> int:
    """How many numbers are worked on at a time."""
    return _BLOCK * torch.get_num_threads() if device.type == "cpu" else 1 << 28


def _blocks(shape: Sequence[int], size: int) -> Iterator[tuple[slice, ...]]:
    """Slices that cut a shape into pieces of at most that many elements."""
    if math.prod(shape) <= size:
        yield tuple(slice(None) for _ in shape)
        return
    inner = math.prod(shape[1:])
    step = max(size // inner, 1)
    for start in range(0, shape[0], step):
        rows = slice(start, start + step)
        yield from ((rows, *rest) for rest in _blocks(shape[1:], max(size, 1)))


def _within(shape: Sequence[int], place: Sequence[slice]) -> tuple[slice, ...]:
    """A place in the whole, in an operand that is broadcast along its axes of size 1."""
    return tuple(slice(None) if size == 1 else part for size, part in zip(shape, place, strict=True))


# --- shapes, and batching rules --------------------------------------------------------------------------------------


def _like_hash(*words: torch.Tensor) -> _Pair:
    shape = torch.broadcast_shapes(*[word.shape for word in words])
    return words[0].new_empty(shape), words[0].new_empty(shape)


def _like_draw(x: torch.Tensor, *_: Any) -> torch.Tensor:
    return x.new_empty(x.shape)


def _like_bits(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return x.new_empty(x.shape, dtype=dtype)


def _batched_hash(*words: torch.Tensor) -> Any:
    level = batching.current_level()
    opened = [batching.opened(word, level) for word in words]
    values = [item.value.unsqueeze(0) if item.axis is None else item.front() for item in opened]
    with batching.below():
        results = torch.ops.torchbatch.threefry2x32.default(*values)
    if all(item.axis is None for item in opened):
        return tuple(result[0] for result in results)
    return tuple(batching.wrapped(result, level) for result in results)


def _batched_draw(operator: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def kernel(x: torch.Tensor, *options: Any) -> torch.Tensor:
        level = batching.current_level()
        opened = batching.opened(x, level)
        with batching.below():
            result = operator(opened.front(), *options)
        return result if opened.axis is None else batching.wrapped(result, level)

    return kernel


_KERNELS: dict[str, tuple[Callable[..., Any], ...]] = {
    "threefry2x32": (_hash, _like_hash, _batched_hash),
    "draw": (_draw, _like_draw, _batched_draw(torch.ops.torchbatch.draw.default)),
    "wide_draw": (_wide_draw, _like_draw, _batched_draw(torch.ops.torchbatch.wide_draw.default)),
    "same_bits": (_same_bits, _like_bits, _batched_draw(torch.ops.torchbatch.same_bits.default)),
}
for _name, _kernels in _KERNELS.items():
    for _kernel, _key in zip(_kernels, ("CompositeExplicitAutograd", "Meta", batching.NAME), strict=True):
        _library.impl(_name, _kernel, _key)
