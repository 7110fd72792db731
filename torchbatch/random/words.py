"""Random bits: what all other draws are made of."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from torchbatch._torch import draw_ops, draw_state
from torchbatch._torch.draw_math import WORD
from torchbatch.core.describe import shown
from torchbatch.errors import AxisError, AxisSpecError
from torchbatch.random import reuse
from torchbatch.random.keys import Key, KeyLike, few, hashed, shape_of, single

_UNSIGNED = {torch.uint8: 8, torch.uint16: 16, torch.uint32: 32, torch.uint64: 64}
_SIGNED = {8: torch.uint8, 16: torch.int16, 32: torch.int32, 64: torch.int64}


def bits(key: KeyLike, shape: int | Sequence[int] = (), dtype: torch.dtype | None = None) -> torch.Tensor:
    """Random bits: unsigned integers, all equally likely.

    Shapes: ``[] -> shape``.

    Args:
        key: a single key.
        shape: the shape of the result; an int is the size of a vector.
        dtype: torch.uint8, uint16, uint32 or uint64; None is uint32, as in JAX with 32-bit integers. PyTorch has few
            operations on the last three; ``.view(torch.int32)`` is the same bits with a sign.

    Returns:
        A tensor of ``shape``.

    Raises:
        InputTypeError, AxisError: ``key`` is no single key.
        AxisSpecError: ``shape`` is neither an int nor a tuple of ints, or ``dtype`` none of these.

    Example:
        >>> import torch
        >>> from torchbatch import random
        >>> random.bits(random.key(0), (3,), torch.uint8)
        tensor([167, 146,  40], dtype=torch.uint8)

    Source: ``jax.random.bits``.
    """
    found = single("bits", key)
    dtype = torch.uint32 if dtype is None else dtype
    if dtype not in _UNSIGNED:
        raise AxisSpecError(f"bits: dtype must be an unsigned integer type of torch, but it is {shown(dtype)}.")
    width = _UNSIGNED[dtype]
    drawn = integers(found, shape_of("bits", shape), width)
    if width < 32:
        drawn = drawn.to(_SIGNED[width])
    return draw_ops.same_bits(drawn, dtype)


def integers(key: Key, shape: Sequence[int], width: int) -> torch.Tensor:
    """Random bits as int32, or for a width of 64 as int64; fewer bits than 32 are the lowest ones, the others are 0.

    Raises:
        RandomnessError: within ``debug_key_reuse()``, the key was used before.
    """
    count = math.prod(shape)
    flat = _at_once(key, count, width)
    if flat is None:
        flat = _parallel(key, shape, width) if key.partitionable else _in_halves(key, count, width)
    if draw_state.contexts:
        reuse.use(key.first, key.second)
    return flat.reshape(tuple(shape))


def _at_once(key: Key, count: int, width: int) -> torch.Tensor | None:
    """A few numbers, if that is quicker one by one."""
    if count > 8 or width > 32 or not key.partitionable:
        return None
    found = few(key, [(0, i) for i in range(count)])
    if found is None:
        return None
    mask = -1 if width == 32 else (1 << width) - 1
    return torch.tensor([(first ^ second) & mask for first, second in found], dtype=torch.int32, device=key.device)


def _parallel(key: Key, shape: Sequence[int], width: int) -> torch.Tensor:
    """Today's way: number i is the hash of i, so each can be made alone."""
    count, device = math.prod(shape), key.device
    if count < 2**31:
        return _joined(*hashed(key, 0, torch.arange(count, dtype=torch.int32, device=device)), width)
    whole = torch.arange(count, device=device)
    return _joined(*hashed(key, (whole >> 32).to(torch.int32), whole.to(torch.int32)), width)


def _joined(first: torch.Tensor, second: torch.Tensor, width: int) -> torch.Tensor:
    if width == 64:
        return (first.long() << 32) | (second.long() & WORD)
    word = first ^ second
    return word if width == 32 else word & ((1 << width) - 1)


def _in_halves(key: Key, count: int, width: int) -> torch.Tensor:
    """The older way: the words are those of the hashes of pairs of counters that lie half of the whole apart."""
    needed = -(-count * width // 32)
    if needed > WORD:
        raise AxisError(f"a draw of {count} numbers with partitionable=False needs more than 2**32 - 1 words. Split the key.")
    half = (needed + 1) // 2
    low = torch.arange(half, device=key.device)
    high = torch.where(low + half < needed, low + half, 0)
    words = torch.cat(hashed(key, low.to(torch.int32), high.to(torch.int32)))[:needed]
    if width == 64:
        return _joined(words[:count], words[count:], 64)
    if width == 32:
        return words
    parts = [(words >> shift) & ((1 << width) - 1) for shift in range(0, 32, width)]
    return torch.stack(parts, -1).reshape(-1)[:count]
