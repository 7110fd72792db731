"""Functions whose result has as many entries as there are hits, with a fixed ``size`` instead: ``nonzero``, ``unique``, …

Without a size they work outside of transforms only, where the number of hits is known.
"""

from __future__ import annotations

import operator
from typing import Any

import torch

from torchbatch._torch import lowered
from torchbatch.core.arrays import as_tensor
from torchbatch.core.describe import describe, shown
from torchbatch.errors import AxisError, AxisSpecError, DataDependentError, InputTypeError

__all__ = ["argwhere", "flatnonzero", "nonzero", "unique", "where"]

_Tensor = torch.Tensor


def nonzero(a: Any, *, size: int | None = None, fill_value: Any = None) -> tuple[_Tensor, ...]:
    """Where an array is not zero: for each of its axes, the indices of the hits.

    Shapes: ``[a, b] -> ([size], [size])``.

    Args:
        a: an array with at least one axis.
        size: how many hits to return: the first ones, or ``fill_value`` where there are fewer. It must be given inside
            ``vmap`` and ``jit``; without it, all hits are returned.
        fill_value: what to return where there are fewer hits than ``size``: a number for all axes, or a tuple with one for each.
            None stands for 0.

    Returns:
        A tuple with one array of indices for each axis, as ``a[nonzero(a)]`` takes it.

    Raises:
        AxisError: ``a`` is a single number, ``size`` is negative, or ``fill_value`` has not one entry per axis.
        AxisSpecError: ``size`` is not an int.
        DataDependentError: ``size`` is not given, and ``a`` varies from sample to sample.

    Example:
        >>> import torch
        >>> from torchbatch import lax, vmap
        >>> rows = torch.tensor([[0, 7, 7], [0, 0, 7]])
        >>> vmap(lambda row: lax.nonzero(row, size=2, fill_value=-1)[0])(rows)
        tensor([[ 1,  2],
                [ 2, -1]])

    Source: ``jax.numpy.nonzero``.
    """
    array = _array(a, "nonzero")
    if not array.dim():
        raise AxisError(
            "nonzero takes an array with at least one axis, but it got a single number. Pass x.reshape(1), or use torch.where."
        )
    return _hits(array, size, fill_value, "nonzero")


def flatnonzero(a: Any, *, size: int | None = None, fill_value: Any = None) -> _Tensor:
    """Where an array is not zero, as indices into its flattened form.

    Shapes: ``[a, b] -> [size]``.

    Args:
        a, size, fill_value: as for :func:`nonzero`.

    Returns:
        The indices.

    Raises:
        AxisError, AxisSpecError, DataDependentError: as for :func:`nonzero`.

    Example:
        >>> import torch
        >>> from torchbatch import lax
        >>> lax.flatnonzero(torch.tensor([[0, 5], [5, 0]]), size=3, fill_value=-1)
        tensor([ 1,  2, -1])

    Source: ``jax.numpy.flatnonzero``.
    """
    return _hits(_array(a, "flatnonzero").reshape(-1), size, fill_value, "flatnonzero")[0]


def argwhere(a: Any, *, size: int | None = None, fill_value: Any = None) -> _Tensor:
    """Where an array is not zero: one row of indices for each hit.

    Shapes: ``[a, b] -> [size, 2]``.

    Args:
        a, size, fill_value: as for :func:`nonzero`; ``a`` may be a single number.

    Returns:
        The indices, a row for each hit and a column for each axis.

    Raises:
        AxisError, AxisSpecError, DataDependentError: as for :func:`nonzero`.

    Example:
        >>> import torch
        >>> from torchbatch import lax
        >>> lax.argwhere(torch.tensor([[0, 5], [5, 0]]), size=3, fill_value=-1)
        tensor([[ 0,  1],
                [ 1,  0],
                [-1, -1]])

    Source: ``jax.numpy.argwhere``.
    """
    array = _array(a, "argwhere")
    if array.dim():
        return torch.stack(_hits(array, size, fill_value, "argwhere"), -1)
    hit = _hits(array.reshape(1), size, None if isinstance(fill_value, tuple) else fill_value, "argwhere")[0]
    return hit.new_zeros((hit.shape[0], 0))


def where(
    condition: Any, x: Any = None, y: Any = None, /, *, size: int | None = None, fill_value: Any = None
) -> _Tensor | tuple[_Tensor, ...]:
    """``x`` where a condition is true and ``y`` elsewhere; of a condition alone, where it is true.

    Shapes: ``([a], [a], [a]) -> [a]``; of a condition alone, ``[a, b] -> ([size], [size])``.

    Args:
        condition: an array; any value but zero counts as true.
        x: an array or number, for where it is true.
        y: an array or number, for where it is not.
        size: of a condition alone, as for :func:`nonzero`.
        fill_value: of a condition alone, as for :func:`nonzero`.

    Returns:
        ``torch.where(condition, x, y)``, or what :func:`nonzero` returns.

    Raises:
        AxisError: ``size`` or ``fill_value`` is given together with ``x`` and ``y``.
        AxisSpecError: only one of ``x`` and ``y`` is given.
        AxisError, AxisSpecError, DataDependentError: as for :func:`nonzero`.

    Example:
        >>> import torch
        >>> from torchbatch import lax
        >>> x = torch.tensor([-1.0, 2.0])
        >>> lax.where(x > 0, x, 0.0), lax.where(x > 0, size=1)
        (tensor([0., 2.]), (tensor([1]),))

    Source: ``jax.numpy.where``.
    """
    if x is None and y is None:
        return nonzero(condition, size=size, fill_value=fill_value)
    if x is None or y is None:
        raise AxisSpecError(f"where takes both x and y, or neither, but {'x' if x is None else 'y'} is None.")
    if size is not None or fill_value is not None:
        raise AxisError("where takes size and fill_value only with a condition alone: where(condition, size=…).")
    first, second = (value if isinstance(value, bool | int | float | complex) else _array(value, "where") for value in (x, y))
    return torch.where(_truth(_array(condition, "where")), first, second)


def unique(
    ar: Any,
    return_index: bool = False,
    return_inverse: bool = False,
    return_counts: bool = False,
    axis: int | None = None,
    *,
    equal_nan: bool = True,
    size: int | None = None,
    fill_value: Any = None,
    sorted: bool = True,
) -> Any:
    """The values of an array, each once, in order.

    Shapes: ``[a, b] -> [size]``; with ``axis=0``, ``[a, b] -> [size, b]``.

    Args:
        ar: an array of numbers that have an order.
        return_index: whether to return where each value stands first, too.
        return_inverse: whether to return which of the values each entry of ``ar`` is, too. It counts all values, also those
            that ``size`` cuts off.
        return_counts: whether to return how often each value stands in ``ar``, too; 0 where there are fewer than ``size``.
        axis: the axis whose slices are compared; None compares single entries.
        equal_nan: whether all NaN are one value.
        size: how many values to return: the first ones in order, or ``fill_value`` where there are fewer. It must be given
            inside ``vmap`` and ``jit``; without it, all values are returned.
        fill_value: what to return where there are fewer values than ``size``; None stands for the smallest value.
        sorted: kept for JAX's signature: the values always come in order.

    Returns:
        The values, or a tuple of them and of what else was asked for.

    Raises:
        AxisError: ``axis`` or ``size`` is out of range, or ``ar`` is empty and there is no ``fill_value``.
        AxisSpecError: ``size`` is not an int.
        DataDependentError: ``size`` is not given, and ``ar`` varies from sample to sample.

    Example:
        >>> import torch
        >>> from torchbatch import lax, vmap
        >>> rows = torch.tensor([[3, 1, 3], [2, 2, 2]])
        >>> vmap(lambda row: lax.unique(row, size=2, fill_value=-1))(rows)
        tensor([[ 1,  3],
                [ 2, -1]])

    Source: ``jax.numpy.unique``.
    """
    array = _array(ar, "unique")
    if axis is not None and not -array.dim() <= operator.index(axis) < array.dim():
        raise AxisError(f"unique: axis {axis} is out of bounds for {describe(array)}.")
    slices = array.reshape(-1) if axis is None else array.movedim(axis, 0)
    if not slices.shape[0]:
        return _unique_of_none(slices, axis, size, fill_value, (return_index, return_inverse, return_counts))
    order, is_new = _grouped(slices, equal_nan)
    first, valid = _first_hits(is_new, _size_of(is_new, size, "unique"), "unique")
    source = order[first]
    source = torch.where(valid, source, source[:1]) if source.shape[0] else source
    values = slices[source]
    if fill_value is not None:
        values = torch.where(valid.reshape([-1] + [1] * (slices.dim() - 1)), values, _as_value(fill_value, values))
    results = [values if axis is None else values.movedim(0, axis)]
    if return_index:
        results.append(source)
    if return_inverse:
        number = torch.empty_like(order).scatter(0, order, is_new.cumsum(0) - 1)
        results.append(number.reshape(array.shape) if axis is None else number)
    if return_counts:
        results.append(_counts(is_new, valid))
    return tuple(results) if len(results) > 1 else results[0]


def _unique_of_none(slices: _Tensor, axis: int | None, size: int | None, fill_value: Any, more: tuple[bool, ...]) -> Any:
    count = 0 if size is None else _checked(size, "unique")
    if count and fill_value is None:
        raise AxisError(f"unique: the array is empty, so {count} values can only be fill_value, which has to be given.")
    values = slices.new_zeros((count, *slices.shape[1:]))
    values = torch.where(values == 0, _as_value(fill_value, values), values) if count else values
    none = torch.zeros(0, dtype=torch.int64, device=slices.device)
    results = [values if axis is None else values.movedim(0, axis), *(none for wanted in more if wanted)]
    return tuple(results) if len(results) > 1 else results[0]


def _grouped(slices: _Tensor, equal_nan: bool) -> tuple[_Tensor, _Tensor]:
    """The order of the slices in which equal ones are neighbours, and where in it each one begins that is new."""
    rows = slices.detach().reshape(slices.shape[0], -1)
    order = torch.arange(slices.shape[0], device=slices.device)
    for column in reversed(range(rows.shape[1])):
        order = order[rows[:, column][order].sort(stable=True).indices]
    ordered = rows[order]
    before, after = ordered[:-1], ordered[1:]
    differs = before != after
    if equal_nan and rows.is_floating_point():
        differs = differs & ~(before.isnan() & after.isnan())
    return order, torch.cat([torch.ones_like(order[:1], dtype=torch.bool), differs.any(1)])


def _counts(is_new: _Tensor, valid: _Tensor) -> _Tensor:
    """How many slices there are in each group."""
    group = is_new.cumsum(0) - 1
    counts = torch.zeros_like(group).scatter_add(0, group, torch.ones_like(group))
    wanted = torch.arange(valid.shape[0], device=valid.device).clamp(max=max(group.shape[0] - 1, 0))
    return torch.where(valid, counts[wanted], 0)


def _as_value(fill_value: Any, like: _Tensor) -> _Tensor:
    return torch.as_tensor(fill_value, device=like.device).to(like.dtype)


# --- hits ------------------------------------------------------------------------------------------------------------


def _hits(array: _Tensor, size: int | None, fill_value: Any, who: str) -> tuple[_Tensor, ...]:
    """For each axis the indices of what is not zero."""
    fills = _fills(fill_value, array.dim(), who)
    mask = _truth(array).reshape(-1)
    place, valid = _first_hits(mask, _size_of(mask, size, who), who)
    indices: list[_Tensor] = []
    for length, fill in zip(reversed(array.shape), reversed(fills), strict=True):
        index = place % max(length, 1)
        place = place.div(max(length, 1), rounding_mode="floor")
        indices.append(torch.where(valid, index, fill))
    return tuple(reversed(indices))


def _fills(fill_value: Any, rank: int, who: str) -> tuple[Any, ...]:
    entries = fill_value if isinstance(fill_value, tuple) else (0 if fill_value is None else fill_value,) * rank
    fills = tuple([as_tensor(entry) if not isinstance(entry, int | float) else entry for entry in entries])
    if len(fills) != rank or any(fill is None or (isinstance(fill, _Tensor) and fill.dim()) for fill in fills):
        raise AxisError(
            f"{who}: fill_value must be a number, or a tuple with one for each of the {rank} axes, but it is {shown(fill_value)}."
        )
    return fills


def _first_hits(mask: _Tensor, size: int, who: str) -> tuple[_Tensor, _Tensor]:
    """The indices of the first ``size`` true entries, and which of them there are."""
    count = mask.shape[0]
    rank = mask.cumsum(0) - 1
    slot = torch.where(mask & (rank < size), rank, size)  # what is no hit, and what is too many, goes to one slot at the end
    places = torch.arange(count, device=mask.device)
    found = torch.zeros(size + 1, dtype=torch.int64, device=mask.device).scatter(0, slot, places)[:size]
    return found, torch.arange(size, device=mask.device) < mask.sum()


def _truth(array: _Tensor) -> _Tensor:
    return array if array.dtype is torch.bool else array != 0


def _array(value: Any, who: str) -> _Tensor:
    found = as_tensor(value)
    if found is None:
        raise InputTypeError(f"{who} takes an array, but it got {shown(value)}.")
    return found


def _size_of(mask: _Tensor, size: int | None, who: str) -> int:
    """The size that was given, or else the number of true entries."""
    if size is not None:
        return _checked(size, who)
    if lowered.is_mapped(mask):
        raise DataDependentError(
            f"{who} without a size has as many entries as there are hits, and that number differs from sample to sample. Give "
            f"it a size: {who}(…, size=n, fill_value=…) returns n of them."
        )
    return int(mask.sum())


def _checked(size: Any, who: str) -> int:
    try:
        count = operator.index(size)
    except TypeError:
        raise AxisSpecError(f"{who}: size must be an int or None, but it is {shown(size)}.") from None
    if count < 0:
        raise AxisError(f"{who}: size must not be negative, but it is {count}.")
    return count
