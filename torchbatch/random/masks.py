"""Dropout."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from torchbatch.core.arrays import as_tensor
from torchbatch.core.describe import shown
from torchbatch.core.weak import strong
from torchbatch.errors import AxisError, InputTypeError
from torchbatch.random.keys import Key, KeyLike, single
from torchbatch.random.uniforms import known, unit


def dropout(key: KeyLike, x: Any, rate: Any) -> torch.Tensor:
    """A tensor with a random part of its elements set to zero, and the others scaled up so that the mean stays.

    Shapes: ``[], [a] -> [a]``.

    Args:
        key: a single key.
        x: a tensor of a floating-point dtype.
        rate: the probability of zero, from 0 to 1: a number, or a tensor without dimensions.

    Returns:
        A tensor like ``x``, through which gradients flow to it and to ``rate``. In a function that is traced nobody can look at
        a tensor: there the result is NaN for a rate that is not from 0 to 1.

    Raises:
        InputTypeError: ``key`` is no key, ``x`` no tensor of a floating-point dtype, or ``rate`` no number.
        AxisError: ``key`` is an array of keys, or ``rate`` is not from 0 to 1.

    Example:
        >>> import torch
        >>> from torchbatch import random
        >>> random.dropout(random.key(0), torch.ones(6), 0.5)
        tensor([0., 0., 2., 2., 0., 2.])

    Source: ``flax.linen.Dropout``: what ``jax.random.bernoulli(key, 1 - rate)`` picks is divided by ``1 - rate``.
    """
    found = single("dropout", key)
    values = as_tensor(x)
    if values is None or not values.is_floating_point():
        raise InputTypeError(f"dropout: x must be a tensor of a floating-point dtype, but it is {shown(x)}.")
    if isinstance(rate, int | float | np.integer) and not isinstance(rate, bool):
        if not 0 <= rate <= 1:
            raise AxisError(f"dropout: rate must be from 0 to 1, but it is {rate}.")
        if rate in (0, 1):
            return torch.where(torch.full_like(values, bool(rate), dtype=torch.bool), 0, values)
        kept = 1 - float(rate)
        return torch.where(unit(found, values.shape, torch.get_default_dtype()) < kept, values / kept, 0)
    return _by_tensor(found, values, _rate(rate))


def _rate(rate: Any) -> torch.Tensor:
    found = None if isinstance(rate, bool) else as_tensor(strong(rate))
    if found is None or found.dim() or found.is_complex() or found.dtype is torch.bool:
        raise InputTypeError(f"dropout: rate must be a number or a tensor without dimensions, but it is {shown(rate)}.")
    seen = known(found)
    if seen is not None and not bool(((seen >= 0) & (seen <= 1)).all()):
        raise AxisError(f"dropout: rate must be from 0 to 1, but it is {shown(rate)}.")
    return found


def _by_tensor(key: Key, values: torch.Tensor, rate: torch.Tensor) -> torch.Tensor:
    """Dropout at a rate that is a tensor; in a trace nobody can look at it, so a wrong one makes NaN."""
    kept = 1 - rate.to(values.device)
    mask = unit(key, values.shape, torch.get_default_dtype()) < kept
    scaled = torch.where(mask, values / torch.where(kept > 0, kept, 1), 0)  # so that the gradient is finite where none is kept
    return scaled if known(rate) is not None else torch.where((kept >= 0) & (kept <= 1), scaled, math.nan)
