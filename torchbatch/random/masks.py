"""Dropout."""

from __future__ import annotations

from typing import Any

import torch

from torchbatch.core.arrays import as_tensor
from torchbatch.core.describe import shown
from torchbatch.errors import AxisError, InputTypeError
from torchbatch.random.keys import KeyLike, single
from torchbatch.random.uniforms import unit


def dropout(key: KeyLike, x: Any, rate: Any) -> torch.Tensor:
    """A tensor with a random part of its elements set to zero, and the others scaled up so that the mean stays.

    Shapes: ``[], [a] -> [a]``.

    Args:
        key: a single key.
        x: a tensor of a floating-point dtype.
        rate: the probability of zero, from 0 to 1, or a tensor without dimensions.

    Returns:
        A tensor like ``x``, through which gradients flow to it.

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
    if isinstance(rate, int | float) and not isinstance(rate, bool):
        if not 0 <= rate <= 1:
            raise AxisError(f"dropout: rate must be from 0 to 1, but it is {rate}.")
        if rate in (0, 1):
            return torch.where(torch.full_like(values, rate, dtype=torch.bool), 0, values)
    elif not isinstance(rate, torch.Tensor) or rate.dim():
        raise InputTypeError(f"dropout: rate must be a number or a tensor without dimensions, but it is {shown(rate)}.")
    kept = 1 - rate
    mask = unit(found, values.shape, torch.get_default_dtype()) < kept
    return torch.where(mask, values / kept, 0)
