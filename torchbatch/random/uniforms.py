"""Uniform numbers, and what the functions of this package share about shapes, dtypes and parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from torchbatch._torch import draw_math, draw_ops, levels, overlay
from torchbatch.core.arrays import as_tensor
from torchbatch.core.describe import describe, shown
from torchbatch.core.weak import strong
from torchbatch.errors import AxisError, AxisSpecError, InputTypeError
from torchbatch.random.keys import Key, KeyLike, shape_of, single
from torchbatch.random.words import integers

_WIDTHS = {torch.float64: (64, 52), torch.float32: (32, 23), torch.float16: (16, 10), torch.bfloat16: (8, 7)}
DROPPED = {torch.float32: 0, torch.float16: 13, torch.bfloat16: 16}
_Number = (int, float, np.number)


def float_dtype(name: str, dtype: torch.dtype | None) -> torch.dtype:
    """The dtype of a draw; None is PyTorch's default dtype.

    Raises:
        AxisSpecError: it is no floating-point dtype.
    """
    dtype = torch.get_default_dtype() if dtype is None else dtype
    if dtype not in _WIDTHS:
        raise AxisSpecError(
            f"{name}: dtype must be torch.float64, float32, float16 or bfloat16, but it is {shown(dtype)}."
        )
    return dtype


def parameter(name: str, argument: str, value: Any, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A parameter of a distribution as a tensor of the dtype of the draw.

    Raises:
        InputTypeError: it is no array of numbers.
    """
    if isinstance(value, int | float):
        return torch.tensor(value, dtype=dtype, device=device)
    found = as_tensor(strong(value))
    if found is None or found.is_complex():
        raise InputTypeError(f"{name}: {argument} must be a real number or a tensor, but it is {shown(value)}.")
    found = found.to(device=found.device if isinstance(value, torch.Tensor) else device)
    if dtype in (torch.float16, torch.bfloat16) and found.dtype is not dtype:
        found = rounded(found.float(), dtype)
    return found.to(dtype)


def known(value: torch.Tensor) -> torch.Tensor | None:
    """The numbers in a tensor, of all samples where it is mapped; None in a trace, which has none."""
    if torch.compiler.is_compiling() or overlay.is_traced() or value.device.type == "meta":
        return None
    return levels.innermost(value)


def broadcast(
    name: str, shape: Any, batch: Mapping[str, Sequence[int]] | None = None, **parameters: torch.Tensor
) -> tuple[int, ...]:
    """The shape of a draw, to which its parameters must broadcast; None is the shape that they have together.

    ``batch`` has the batch axes of those parameters of which one is a vector or a matrix.

    Raises:
        AxisSpecError, AxisError: it is no shape, or they do not.
    """
    sizes = {argument: value.shape for argument, value in parameters.items()} | dict(batch or {})
    given = None if shape is None else shape_of(name, shape)
    try:
        found: Any = torch.broadcast_shapes(*sizes.values(), *([] if given is None else [given]))  # type: ignore[no-untyped-call]
    except RuntimeError:
        found = None
    if found is None or (given is not None and tuple(found) != given):
        described = [f"{argument} is {describe(value)}" for argument, value in parameters.items()]
        axes = "" if batch is None else f" (batch axes {', '.join(str(tuple(size)) for size in batch.values())})"
        goal = "one another" if given is None else f"shape={given}"
        raise AxisError(f"{name}: the parameters must broadcast to {goal}, but {', '.join(described)}{axes}.")
    return tuple(found)


def uniform(
    key: KeyLike, shape: int | Sequence[int] = (), dtype: torch.dtype | None = None, minval: Any = 0.0, maxval: Any = 1.0
) -> torch.Tensor:
    """Numbers that are uniformly distributed in ``[minval, maxval)``.

    Shapes: ``[] -> shape``.

    Args:
        key: a single key.
        shape: the shape of the result; an int is the size of a vector.
        dtype: a floating-point dtype; None is PyTorch's default.
        minval: the least number, or a tensor of them that broadcasts to ``shape``.
        maxval: the upper bound, likewise.

    Returns:
        A tensor of ``shape``, through which gradients flow to ``minval`` and ``maxval``.

    Raises:
        InputTypeError, AxisError: ``key`` is no single key, or a bound is no number or does not fit ``shape``.
        AxisSpecError: ``shape`` is neither an int nor a tuple of ints, or ``dtype`` no floating-point dtype.

    Example:
        >>> from torchbatch import random
        >>> random.uniform(random.key(0), (3,))
        tensor([0.9477, 0.9786, 0.3323])
        >>> random.uniform(random.key(0), (3,), minval=-1, maxval=1)
        tensor([ 0.8953,  0.9572, -0.3354])

    Source: ``jax.random.uniform``.
    """
    found = single("uniform", key)
    dtype = float_dtype("uniform", dtype)
    size = shape_of("uniform", shape)
    return between(found, size, dtype, *_bounds("uniform", minval, maxval, size, dtype, found))


def _bounds(name: str, low: Any, high: Any, shape: Sequence[int], dtype: torch.dtype, key: Key) -> tuple[Any, Any]:
    if isinstance(low, _Number) and isinstance(high, _Number) and dtype is not torch.float64:
        return float(low), float(high)
    low, high = (parameter(name, text, value, dtype, key.device) for text, value in (("minval", low), ("maxval", high)))
    broadcast(name, tuple(shape), minval=low, maxval=high)
    return low, high


def unit(key: Key, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Uniform numbers in ``[0, 1)``: all multiples of the dtype's epsilon are equally likely."""
    width, digits = _WIDTHS[dtype]
    drawn = integers(key, shape, width)
    whole = (drawn >> (width - digits)) & ((1 << digits) - 1)
    return whole.to(dtype if width > 8 else torch.float32).mul(2.0**-digits).to(dtype)


def between(key: Key, shape: Sequence[int], dtype: torch.dtype, low: Any, high: Any) -> torch.Tensor:
    """Uniform numbers between two bounds, which are both Python numbers or both tensors."""
    whole = unit(key, shape, dtype)
    if isinstance(low, float) and dtype in DROPPED:
        if (low, high) == (0.0, 1.0):
            return whole
        low, high = (as_held(value, dtype) for value in (low, high))
        return step(whole, "affine_in_steps" if dtype is torch.bfloat16 else "affine", high - low, low)
    low, high = (torch.as_tensor(value, dtype=dtype, device=whole.device) for value in (low, high))
    return spread(whole, low, high)


def spread(u: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """Uniform numbers from 0 to 1 as such between two bounds, rounded where JAX rounds."""
    dtype = u.dtype
    if dtype not in (torch.float16, torch.bfloat16):
        return torch.maximum(low, fused(u, high - low, low))
    u, low, high = u.float(), low.float(), high.float()
    product = u * rounded(high - low, dtype)  # which float32 holds
    if dtype is torch.bfloat16:
        product = rounded(product, dtype)
    return torch.maximum(low, rounded(product + low, dtype)).to(dtype)


def rounded(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """float32 numbers as a dtype holds them, also where the compiler would leave that out; gradients pass through."""
    if dtype is torch.float32:
        return x
    return draw_ops.draw(x, "same", (), DROPPED[dtype]) + torch.where(x.isfinite(), x - x.detach(), 0)


def as_held(value: float, dtype: torch.dtype) -> float:
    """A Python number as a dtype holds it."""
    if dtype is torch.bfloat16:
        word = int(np.float32(value).view(np.uint32))
        return float(np.uint32((word + 0x7FFF + (word >> 16 & 1)) & 0xFFFF0000).view(np.float32))
    held: Any = {torch.float64: np.float64, torch.float32: np.float32, torch.float16: np.float16}[dtype](value)
    return float(held)


def fused(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """``a * b + c``, in float32 rounded once."""
    if a.dtype is not torch.float32:
        return a * b + c
    if draw_math.has_fma(a.device) and not overlay.is_traced() and not torch.compiler.is_compiling():
        return torch.addcmul(c, a, b)
    return (a.double() * b.double() + c.double()).float()  # the compiler would round addcmul twice


def step(x: torch.Tensor, name: str, *numbers: float) -> torch.Tensor:
    """A step of :data:`draw_math.STEPS`, with the numbers that go with it as the dtype holds them."""
    numbers = tuple([as_held(number, x.dtype) for number in numbers])
    if x.dtype is torch.float64:
        return draw_ops.wide_draw(x, name, numbers)
    return draw_ops.draw(x.float(), name, numbers, DROPPED[x.dtype]).to(x.dtype)
