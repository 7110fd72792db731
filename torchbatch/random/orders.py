"""Draws of elements: in another order, or some of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from torchbatch.core.arrays import as_tensor
from torchbatch.core.describe import describe, shown
from torchbatch.errors import AxisError, InputTypeError
from torchbatch.random.continuous import gumbels
from torchbatch.random.discrete import below, first_of
from torchbatch.random.keys import Key, KeyLike, is_size, parts, shape_of, single
from torchbatch.random.uniforms import known, unit
from torchbatch.random.words import integers


def permutation(key: KeyLike, x: Any, axis: int = 0, independent: bool = False) -> torch.Tensor:
    """The slices of a tensor in a random order.

    Shapes: ``[], [n, a] -> [n, a]``.

    Args:
        key: a single key.
        x: a tensor, or an int ``n`` for ``arange(n)``.
        axis: the axis along which the order is drawn.
        independent: whether each vector along the axis gets an order of its own.

    Returns:
        A tensor like ``x``, through which gradients flow.

    Raises:
        InputTypeError, AxisError: ``key`` is no single key, ``x`` neither a tensor nor an int, or it has no such axis.

    Example:
        >>> from torchbatch import random
        >>> random.permutation(random.key(0), 5)
        tensor([0, 1, 4, 3, 2])

    Source: ``jax.random.permutation``.
    """
    found = single("permutation", key)
    values = _values("permutation", x, found)
    axis = _axis("permutation", axis, values)
    return _permuted(found, values, axis, independent)


def _values(name: str, x: Any, key: Key) -> torch.Tensor:
    if is_size(x):
        size: Any = max(x if isinstance(x, torch.SymInt) else int(x), 0)
        return torch.arange(size, device=key.device)
    found = as_tensor(x)
    if found is None or not found.dim():
        raise InputTypeError(f"{name}: what is drawn from must be a tensor with an axis, or an int, but it is {shown(x)}.")
    return found


def _axis(name: str, axis: Any, values: torch.Tensor) -> int:
    if not isinstance(axis, int | np.integer) or not -values.dim() <= axis < values.dim():
        raise AxisError(f"{name}: axis must be an int in [{-values.dim()}, {values.dim()}), but it is {shown(axis)}.")
    return int(axis) % values.dim()


def _permuted(key: Key, values: torch.Tensor, axis: int, independent: bool) -> torch.Tensor:
    if independent and values.dim() > 1:
        places = torch.arange(values.shape[axis], device=values.device)
        shape = [1] * values.dim()
        shape[axis] = -1
        return values.gather(axis, _shuffled(key, places.reshape(shape).expand(values.shape), axis))
    return values.index_select(axis, _shuffled(key, torch.arange(values.shape[axis], device=values.device), 0))


def _shuffled(key: Key, places: torch.Tensor, axis: int) -> torch.Tensor:
    """Sorted by random words, as often as it takes that equal words do not matter."""
    rounds = math.ceil(3 * math.log(max(1, places.numel())) / math.log(2**32 - 1))
    for _ in range(rounds):
        key, subkey = parts(key, 2)
        words = integers(subkey, places.shape, 32) ^ -(2**31)
        places = places.gather(axis, words.sort(dim=axis, stable=True).indices)
    return places


def choice(
    key: KeyLike,
    a: Any,
    shape: int | Sequence[int] = (),
    replace: bool = True,
    p: Any = None,
    axis: int = 0,
    mode: str | None = None,
) -> torch.Tensor:
    """Some slices of a tensor.

    Shapes: ``[], [n, a] -> [*shape, a]``.

    Args:
        key: a single key.
        a: a tensor, or an int ``n`` for ``arange(n)``.
        shape: how many, as the axes that take the place of ``axis``.
        replace: whether a slice may be drawn more than once.
        p: the probability of each slice; None makes all equally likely.
        axis: the axis along which is drawn.
        mode: as in :func:`gumbel`, for a draw with probabilities and without replacement.

    Returns:
        A tensor of the dtype of ``a``, through which gradients flow to it. With ``p`` and replacement, a draw that lies on the
        border of two slices may differ from JAX's, which adds probabilities in another order.

    Raises:
        InputTypeError, AxisError: ``key`` is no single key, ``a`` neither a tensor nor an int, the shapes do not fit, ``p`` holds
            what is no probability, or more slices are to be drawn than there are.
        AxisSpecError: ``shape`` is neither an int nor a tuple of ints.

    Example:
        >>> import torch
        >>> from torchbatch import random
        >>> random.choice(random.key(0), torch.tensor([10, 20, 30, 40]), (3,), replace=False)
        tensor([10, 20, 40])

    Source: ``jax.random.choice``.
    """
    found = single("choice", key)
    size = shape_of("choice", shape)
    values = _values("choice", a, found)
    axis = _axis("choice", axis, values)
    count, population = math.prod(size), values.shape[axis]
    if count and not population:
        raise AxisError("choice: there is nothing to draw from; a must not be empty.")
    if not replace and count > population:
        raise AxisError(f"choice: {count} slices are to be drawn without replacement, but there are {population}.")
    places = _places(found, count, population, replace, p, mode)
    drawn = values.index_select(axis, places.reshape(-1))
    return drawn.reshape((*values.shape[:axis], *size, *values.shape[axis + 1 :]))


def _places(key: Key, count: int, population: int, replace: bool, p: Any, mode: str | None) -> torch.Tensor:
    if not count:
        return torch.zeros(0, dtype=torch.int64, device=key.device)
    if p is not None:
        return _weighted(key, count, population, replace, p, mode)
    if replace:
        return below(key, (count,), population)
    return _shuffled(key, torch.arange(population, device=key.device), 0)[:count]


def _weighted(key: Key, count: int, population: int, replace: bool, p: Any, mode: str | None) -> torch.Tensor:
    weights = as_tensor(p)
    if isinstance(p, list | tuple):
        weights = torch.tensor(p, device=key.device)
    if weights is None:
        raise InputTypeError(f"choice: p must be a tensor, but it is {shown(p)}.")
    weights = weights.detach() if weights.is_floating_point() else weights.to(torch.get_default_dtype())
    if tuple(weights.shape) != (population,):
        raise AxisError(f"choice: p must be of shape [{population}], one for each slice, but it is {describe(weights)}.")
    seen = known(weights)
    if seen is not None and not bool(((seen >= 0) & (seen < math.inf)).all()):
        raise AxisError(f"choice: p must hold numbers from 0 on, but it is {shown(p)}.")
    if not replace:
        return first_of(gumbels("choice", key, (population,), weights.dtype, mode) + weights.log(), count)
    totals = weights.cumsum(0)
    drawn = totals[-1] * (1 - unit(key, (count,), weights.dtype))
    return torch.searchsorted(totals, drawn.contiguous()).clamp(max=population - 1)  # NaN, which a trace may meet, is beyond
