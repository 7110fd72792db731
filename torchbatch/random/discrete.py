"""Draws of integers, truth values and categories."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from torchbatch._torch import draw_ops
from torchbatch._torch.draw_math import WORD
from torchbatch.core.arrays import as_tensor
from torchbatch.core.describe import describe, shown
from torchbatch.core.weak import strong
from torchbatch.errors import AxisError, AxisSpecError, InputTypeError
from torchbatch.random.continuous import gumbels
from torchbatch.random.keys import Key, KeyLike, parts, shape_of, single
from torchbatch.random.uniforms import broadcast, known, unit
from torchbatch.random.words import integers

_UNSIGNED = {torch.uint16: (0, 2**16 - 1), torch.uint32: (0, 2**32 - 1)}
_NARROW = (torch.int8, torch.int16, torch.uint8, torch.uint16)
DTYPES = (*_NARROW, torch.int32, torch.uint32, torch.int64, torch.uint64)
_TOP = -(2**63)  # the first digit of a word of 64 bits


def bernoulli(key: KeyLike, p: Any = 0.5, shape: int | Sequence[int] | None = None, mode: str = "low") -> torch.Tensor:
    """Truth values that are True with a given probability.

    Shapes: ``[], [a] -> shape``.

    Args:
        key: a single key.
        p: the probability of True, or a tensor of them of a floating-point dtype, in which is drawn.
        shape: the shape of the result; None is that of ``p``.
        mode: ``"low"`` draws one uniform number for each, ``"high"`` two, for probabilities near 0.

    Returns:
        A tensor of bools.

    Raises:
        InputTypeError, AxisError: ``key`` is no single key, or ``p`` no probability, or it does not fit ``shape``.
        AxisSpecError: there is no such mode.

    Example:
        >>> from torchbatch import random
        >>> random.bernoulli(random.key(0), 0.4, (3,))
        tensor([False, False,  True])

    Source: ``jax.random.bernoulli``.
    """
    found = single("bernoulli", key)
    if mode not in ("low", "high"):
        raise AxisSpecError(f"bernoulli: mode must be 'low' or 'high', but it is {shown(mode)}.")
    probability = _probability("bernoulli", p, found)
    size = broadcast("bernoulli", shape, p=probability)
    if mode == "low":
        return torch.lt(unit(found, size, probability.dtype), probability)
    first, second = unit(found, (2, *size), probability.dtype)
    return torch.lt(second * torch.finfo(probability.dtype).eps, probability - first)


def _probability(name: str, p: Any, key: Key) -> torch.Tensor:
    if isinstance(p, float):
        return torch.tensor(p, dtype=torch.get_default_dtype(), device=key.device)
    found = as_tensor(strong(p))
    if found is None or not found.is_floating_point():
        raise InputTypeError(f"{name}: p must be a float or a tensor of a floating-point dtype, but it is {shown(p)}.")
    return found


def rademacher(key: KeyLike, shape: int | Sequence[int] = (), dtype: torch.dtype | None = None) -> torch.Tensor:
    """Numbers that are -1 or 1, equally likely.

    Shapes: ``[] -> shape``.

    Args:
        key: a single key.
        shape: the shape of the result; an int is the size of a vector.
        dtype: a dtype of signed integers, or a floating-point or complex dtype; None is torch.int64.

    Returns:
        A tensor of ``shape``.

    Raises:
        InputTypeError, AxisError, AxisSpecError: as in :func:`uniform`.

    Example:
        >>> from torchbatch import random
        >>> random.rademacher(random.key(0), (3,))
        tensor([-1, -1,  1])

    Source: ``jax.random.rademacher``.
    """
    found = single("rademacher", key)
    dtype = torch.int64 if dtype is None else dtype
    if not isinstance(dtype, torch.dtype) or not dtype.is_signed or dtype in _UNUSABLE:
        raise AxisSpecError(
            f"rademacher: dtype must be of signed integers, floating-point or complex numbers, but it is {shown(dtype)}."
        )
    return signs(found, shape_of("rademacher", shape), dtype)


_UNUSABLE = (torch.qint8, torch.quint8, torch.qint32, torch.complex32)


def signs(key: Key, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """The same for a key that is known to be one."""
    true = unit(key, shape, torch.get_default_dtype()) < 0.5
    return 2 * true.to(dtype) - 1


# --- integers --------------------------------------------------------------------------------------------------------


def randint(
    key: KeyLike, shape: int | Sequence[int], minval: Any, maxval: Any, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """Integers that are uniformly distributed in ``[minval, maxval)``.

    Shapes: ``[] -> shape``.

    Args:
        key: a single key.
        shape: the shape of the result; an int is the size of a vector.
        minval: the least number, or an integer tensor that broadcasts to ``shape``.
        maxval: the upper bound, likewise; where it is not above ``minval``, the result is ``minval``. A bound that the dtype of
            the draw does not hold is brought into its range, as in JAX.
        dtype: an integer dtype. None gives the numbers of JAX with 32-bit integers, as torch.int64; the draws for torch.int64
            and torch.uint64 take twice as many bits, and so give other numbers.

    Returns:
        A tensor of ``shape``.

    Raises:
        InputTypeError, AxisError: ``key`` is no single key, or the bounds are no integers, do not fit ``shape``, or, with
            ``dtype=None``, are known to need 64 bits; in a function that is traced nobody can look at a tensor.
        AxisSpecError: ``shape`` is neither an int nor a tuple of ints, or ``dtype`` no such dtype.

    Example:
        >>> from torchbatch import random
        >>> random.randint(random.key(0), (5,), 0, 10)
        tensor([9, 0, 2, 3, 1])

    Source: ``jax.random.randint``.
    """
    found = single("randint", key)
    size = shape_of("randint", shape)
    if dtype is not None and dtype not in DTYPES:
        raise AxisSpecError(f"randint: dtype must be an integer dtype, but it is {shown(dtype)}.")
    unsigned = dtype is torch.uint64
    low, high = _integer("minval", minval, found, unsigned), _integer("maxval", maxval, found, unsigned)
    broadcast("randint", size, minval=low, maxval=high)
    if dtype in (torch.int64, torch.uint64):
        return draw_ops.same_bits(_in_64_bits(found, size, low, high, _TOP if unsigned else 0), dtype)
    if dtype is None:
        _check_32_bits(low, high, *(bound for bound in (minval, maxval) if not isinstance(bound, torch.Tensor)))
    drawn = _in_32_bits(found, size, low, high, torch.int32 if dtype is None else dtype)
    return drawn if dtype is None else _held(drawn, dtype)


def _integer(argument: str, value: Any, key: Key, unsigned: bool) -> torch.Tensor:
    """A bound as int64; for unsigned draws its digits, where a negative one is 0."""
    least, most = (0, 2**64) if unsigned else (-(2**63), 2**63)
    if isinstance(value, int) and not isinstance(value, bool) and value < most and (unsigned or value >= least):
        value = max(value, least)
        return torch.tensor(value if value < 2**63 else value - 2**64, dtype=torch.int64, device=key.device)
    found = as_tensor(value)
    kinds = (torch.bool,) if unsigned else (torch.bool, torch.uint64)
    if found is None or found.is_floating_point() or found.is_complex() or found.dtype in kinds:
        most_bits = "64" if unsigned else "63"
        raise InputTypeError(f"randint: {argument} must be an integer of at most {most_bits} bits, but it is {shown(value)}.")
    if found.dtype is torch.uint64:
        return draw_ops.same_bits(found, torch.int64)
    return found.long().clamp(min=0) if unsigned else found.long()


def _check_32_bits(*bounds: Any) -> None:
    """Refuse bounds that are too large, so far as they are known: in a trace those are that are Python's numbers."""
    for bound in bounds:
        if isinstance(bound, torch.SymInt):
            continue  # a size that jit leaves open
        found = known(bound) if isinstance(bound, torch.Tensor) else np.asarray(bound, np.int64)
        if found is not None and bool(((found < -(2**31)) | (found >= 2**31)).any()):
            raise AxisError("randint: minval and maxval need more than 32 bits; give dtype=torch.int64.")


def below(key: Key, shape: Sequence[int], most: int) -> torch.Tensor:
    """Integers from 0 to ``most``, which is not among them, drawn with a key that was looked at before."""
    _check_32_bits(most)
    low, high = (torch.tensor(bound, dtype=torch.int64, device=key.device) for bound in (0, most))
    return _in_32_bits(key, shape, low, high, torch.int32)


def _in_32_bits(key: Key, shape: Sequence[int], low: torch.Tensor, high: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The draw, as int64."""
    least, most = _limits(dtype)
    if dtype in _NARROW:
        low, high = low.clamp(least, most), high.clamp(least, most + 1)
        least, most = _limits(torch.int32)
    beyond = high > most
    low, high = low.clamp(least, most), high.clamp(least, most)
    span = torch.where(high <= low, 1, (high - low) & WORD)
    span = torch.where(beyond & (high > low), (span + 1) & WORD, span)
    upper, lower = (integers(part, shape, 32).long() & WORD for part in parts(key, 2))
    power = _modulo(torch.full_like(span, 2**16), span)
    power = _modulo((power * power) & WORD, span)
    offset = (_modulo(upper, span) * power + _modulo(lower, span)) & WORD
    return low + _modulo(offset, span)


def _limits(dtype: torch.dtype) -> tuple[int, int]:
    if dtype in _UNSIGNED:
        return _UNSIGNED[dtype]
    return torch.iinfo(dtype).min, torch.iinfo(dtype).max


def _held(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """int64 as a narrower dtype."""
    if dtype in _UNSIGNED:
        half = {torch.uint16: torch.int16, torch.uint32: torch.int32}[dtype]
        top = 1 << (8 * dtype.itemsize)
        return draw_ops.same_bits(torch.where(value >= top // 2, value - top, value).to(half), dtype)
    return torch.where(value > WORD >> 1, value - 2**32, value).to(dtype)


def saturated(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """int64 as an integer dtype: what is too large for that becomes its largest number."""
    if dtype in (torch.int64, torch.uint64):
        return draw_ops.same_bits(value, dtype)
    return _held(value.clamp(max=_limits(dtype)[1]), dtype)


def _modulo(x: torch.Tensor, span: torch.Tensor) -> torch.Tensor:
    """The remainder, which for a span of 0, the whole range, is the number itself."""
    return torch.where(span == 0, x, x % torch.where(span == 0, 1, span))


def _in_64_bits(key: Key, shape: Sequence[int], low: torch.Tensor, high: torch.Tensor, top: int) -> torch.Tensor:
    """The draw for int64, or with ``top`` as the first digit for uint64, whose digits are given."""
    upper, lower = (integers(part, shape, 64) for part in parts(key, 2))
    span = torch.where((high ^ top) <= (low ^ top), 1, high - low)  # unsigned from here on
    power = _unsigned_modulo(torch.full_like(span, 2**32), span)
    power = _unsigned_modulo(power * power, span)
    offset = _unsigned_modulo(upper, span) * power + _unsigned_modulo(lower, span)
    return low + _unsigned_modulo(offset, span)


def _unsigned_modulo(x: torch.Tensor, span: torch.Tensor) -> torch.Tensor:
    """The remainder of 64-bit words that are read as unsigned numbers; ``span`` is not 0."""
    large = span < 0  # 2**63 or more, which goes into a word once at most
    positive = torch.where(large, 1, span)
    quotient = ((x >> 1) & (2**63 - 1)) // positive
    rest = x - ((quotient << 1) * positive)
    rest = torch.where((rest ^ _TOP) >= (positive ^ _TOP), rest - positive, rest)
    return torch.where(large, torch.where((x ^ _TOP) >= (span ^ _TOP), x - span, x), rest)


# --- categories ------------------------------------------------------------------------------------------------------


def categorical(
    key: KeyLike,
    logits: Any,
    axis: int = -1,
    shape: int | Sequence[int] | None = None,
    replace: bool = True,
    mode: str | None = None,
) -> torch.Tensor:
    """Categories whose probabilities are given by their logarithms.

    Shapes: ``[], [a, n] -> [a]``.

    Args:
        key: a single key.
        logits: logarithms of probabilities, up to a constant, of a floating-point dtype.
        axis: the axis of the categories.
        shape: the shape of the result, which ends with that of the other axes; None is just that.
        replace: whether a category may be drawn more than once; if not, the axes of ``shape`` in front are one draw.
        mode: as in :func:`gumbel`.

    Returns:
        A tensor of int64.

    Raises:
        InputTypeError, AxisError: ``key`` is no single key, ``logits`` are no numbers, ``axis`` or ``shape`` do not fit, or there
            are fewer categories than are to be drawn.
        AxisSpecError: there is no such mode.

    Example:
        >>> import torch
        >>> from torchbatch import random
        >>> random.categorical(random.key(0), torch.tensor([0.1, 0.2, 0.7]).log(), shape=(5,))
        tensor([1, 2, 2, 1, 2])

    Source: ``jax.random.categorical``.
    """
    found = single("categorical", key)
    scores = as_tensor(logits)
    if scores is None or not scores.is_floating_point() or not scores.dim():
        raise InputTypeError(f"categorical: logits must be a tensor of a floating-point dtype with an axis, not {shown(logits)}.")
    if not isinstance(axis, int | np.integer) or not -scores.dim() <= axis < scores.dim():
        raise AxisError(f"categorical: axis must be an int in [{-scores.dim()}, {scores.dim()}), but it is {shown(axis)}.")
    axis = int(axis) % scores.dim()
    if not scores.shape[axis]:
        raise AxisError(f"categorical: there is nothing to draw from; {describe(scores)} has no categories.")
    batch = (*scores.shape[:axis], *scores.shape[axis + 1 :])
    size = batch if shape is None else shape_of("categorical", shape)
    broadcast("categorical", size, {"logits": batch}, logits=scores)
    front = size[: len(size) - len(batch)]
    if replace:
        inner = list(size[len(front) :])
        inner.insert(axis, scores.shape[axis])
        drawn = gumbels("categorical", found, (*front, *inner), scores.dtype, mode) + scores
        return drawn.argmax(len(front) + axis)
    return _without_replacement(found, scores, axis, size, front, mode)


def _without_replacement(
    key: Key, scores: torch.Tensor, axis: int, size: tuple[int, ...], front: tuple[int, ...], mode: str | None
) -> torch.Tensor:
    count = math.prod(front)
    if count > scores.shape[axis]:
        raise AxisError(
            f"categorical: {count} categories are to be drawn without replacement, but there are {scores.shape[axis]} in "
            f"{describe(scores)}."
        )
    found = first_of((scores + gumbels("categorical", key, scores.shape, scores.dtype, mode)).movedim(axis, -1), count)
    return found.movedim(-1, 0).reshape(size)


def first_of(scores: torch.Tensor, count: int) -> torch.Tensor:
    """The places of the greatest numbers along the last axis, the greatest first; of equal ones the earlier is first."""
    return torch.sort(scores, dim=-1, descending=True, stable=True).indices[..., :count]
