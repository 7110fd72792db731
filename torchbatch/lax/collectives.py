"""Collectives: what one sample can know of all samples of an axis that ``vmap(…, axis_name=…)`` names."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from torchbatch.core.describe import describe, shown
from torchbatch.core.frames import AxisFrame
from torchbatch.errors import AxisError, AxisSpecError, UnsupportedOperationError
from torchbatch.lax.named import (
    Groups,
    device_of,
    everyone,
    frames_of,
    group_size,
    no_groups,
    over_leaves,
    own,
    size_of,
    steps,
    total,
)

_Tensor = torch.Tensor


def psum(x: Any, axis_name: Any, *, axis_index_groups: Groups = None) -> Any:
    """The sum over all samples of a named axis.

    Shapes: ``[a] -> [a]``; the result is the same for all samples.

    Args:
        x: a tensor, an array, a number or a tree of them. What is the same for all samples is added up all the same: ``psum(1,
            "i")`` is the number of samples, as a Python int.
        axis_name: the name of the axis, or a tuple of names to sum over several.
        axis_index_groups: as in JAX, allowed under ``vmap`` only where ``x`` is a Python number: the sum is then over a group.

    Returns:
        A tree like ``x``. Truth values are counted; other dtypes stay as they are.

    Raises:
        AxisNameError: no enclosing ``vmap`` has the name, or it has a ``chunk_size`` that cuts the axis up.
        AxisError: a name is given twice.

    Example:
        >>> import torch
        >>> from torchbatch import lax, vmap
        >>> vmap(lambda x: x / lax.psum(x, "i"), axis_name="i")(torch.tensor([1.0, 3.0, 4.0]))
        tensor([0.1250, 0.3750, 0.5000])

    Source: ``jax.lax.psum``. The gradient is JAX's too: the transpose of a sum over samples is a sum over samples.
    """
    frames = frames_of(axis_name, "psum")
    size = group_size(x, frames, axis_index_groups, "psum")
    return over_leaves(lambda value: total(value, frames), x, "psum", lambda number: number * size)


def pmean(x: Any, axis_name: Any, *, axis_index_groups: Groups = None) -> Any:
    """The mean over all samples of a named axis.

    Shapes: ``[a] -> [a]``; the result is the same for all samples.

    Args:
        x: a tensor, an array, a number or a tree of them.
        axis_name: the name of the axis, or a tuple of names.
        axis_index_groups: as in :func:`psum`.

    Returns:
        A tree like ``x``; the mean of integers is floating-point.

    Raises:
        AxisNameError, AxisError: as in :func:`psum`.

    Example:
        >>> import torch
        >>> from torchbatch import lax, vmap
        >>> vmap(lambda x: x - lax.pmean(x, "i"), axis_name="i")(torch.tensor([1.0, 3.0, 5.0]))
        tensor([-2.,  0.,  2.])

    Source: ``jax.lax.pmean``.
    """
    frames = frames_of(axis_name, "pmean")
    size = group_size(x, frames, axis_index_groups, "pmean")
    return over_leaves(lambda value: total(value, frames) / size, x, "pmean", lambda n: n * size / size if size else math.nan)


def all_gather(
    x: Any, axis_name: Any, *, axis_index_groups: Groups = None, axis: int = 0, tiled: bool = False, to: str = "varying"
) -> Any:
    """The values of all samples of a named axis, as one tensor.

    Shapes: with ``n`` samples and ``axis=0``, ``[a] -> [n, a]``; with ``tiled=True``, ``[a] -> [n * a]``. The result is the
    same for all samples.

    Args:
        x: a tensor, an array, a number or a tree of them.
        axis_name: the name of the axis; of a tuple of names, the last one varies fastest.
        axis_index_groups: not available under ``vmap``, in JAX neither.
        axis: where the samples go in the result; with ``tiled``, which axis of ``x`` they are concatenated along.
        tiled: whether the samples are concatenated along an axis of ``x``, not stacked along a new one.
        to: ``"varying"``; the other values that JAX has concern devices.

    Returns:
        A tree like ``x``. Its tensors are copies, and can be written to.

    Raises:
        AxisNameError: no enclosing ``vmap`` has the name, or it has a ``chunk_size`` that cuts the axis up.
        AxisError: ``axis`` is out of bounds, or a name is given twice.
        UnsupportedOperationError: ``axis_index_groups`` or ``to`` is given.

    Example:
        >>> import torch
        >>> from torchbatch import lax, vmap
        >>> points = torch.tensor([0.0, 1.0, 4.0])
        >>> vmap(lambda x: (lax.all_gather(x, "i") - x).abs(), axis_name="i")(points)
        tensor([[0., 1., 4.],
                [1., 0., 3.],
                [4., 3., 0.]])

    Source: ``jax.lax.all_gather``.
    """
    if to != "varying":
        raise UnsupportedOperationError(f"all_gather has to='varying' only, but to is {to!r}: other values concern devices.")
    frames = frames_of(axis_name, "all_gather")
    no_groups(axis_index_groups, "all_gather")
    if not frames:
        return x

    def gather(value: _Tensor) -> _Tensor:
        at = _axis(axis, "axis", value, value.dim() + (not tiled), "all_gather")
        full = everyone(value, frames).movedim(0, at)
        copied: _Tensor = steps().copy(full.flatten(at, at + 1) if tiled else full)
        return copied

    return over_leaves(gather, x, "all_gather")


def all_to_all(
    x: Any, axis_name: Any, split_axis: int, concat_axis: int, *, axis_index_groups: Groups = None, tiled: bool = False
) -> Any:
    """Exchange parts: sample ``i`` gets part number ``i`` of every sample.

    Shapes: with ``n`` samples, ``split_axis=0`` and ``concat_axis=1``, ``[n, a] -> [a, n]``; with ``tiled=True``,
    ``[n * k, a] -> [k, n * a]``.

    Args:
        x: a tensor, an array or a tree of them.
        axis_name: the name of the axis; of a tuple of names, the last one varies fastest.
        split_axis: which axis of ``x`` holds the parts.
        concat_axis: where the samples that the parts come from go in the result.
        axis_index_groups: not available under ``vmap``, in JAX neither.
        tiled: whether ``split_axis`` is cut into ``n`` pieces that are concatenated along ``concat_axis``; otherwise it has
            size ``n`` and goes, and ``concat_axis`` is new.

    Returns:
        A tree like ``x``.

    Raises:
        AxisNameError: no enclosing ``vmap`` has the name, or it has a ``chunk_size`` that cuts the axis up.
        AxisError: an axis is out of bounds, the size of ``split_axis`` does not fit, or a name is given twice.
        UnsupportedOperationError: ``axis_index_groups`` is given.

    Example:
        >>> import torch
        >>> from torchbatch import lax, vmap
        >>> rows = torch.tensor([[1, 2], [3, 4]])
        >>> vmap(lambda row: lax.all_to_all(row, "i", 0, 0), axis_name="i")(rows)
        tensor([[1, 3],
                [2, 4]])

    Source: ``jax.lax.all_to_all``.
    """
    return _all_to_all(x, axis_name, (split_axis, concat_axis), axis_index_groups, tiled, "all_to_all")


def pswapaxes(x: Any, axis_name: Any, axis: int, *, axis_index_groups: Groups = None) -> Any:
    """Exchange a named axis with an axis of ``x`` of the same size.

    Shapes: with ``n`` samples and ``axis=0``, ``[n, a] -> [n, a]``: the first axis counts the samples afterwards.

    Args:
        x: a tensor, an array or a tree of them.
        axis_name: the name of the axis, or a tuple of names.
        axis: which axis of ``x``.
        axis_index_groups: not available under ``vmap``, in JAX neither.

    Returns:
        A tree like ``x``.

    Raises:
        AxisNameError, AxisError, UnsupportedOperationError: as in :func:`all_to_all`.

    Example:
        >>> import torch
        >>> from torchbatch import lax, vmap
        >>> vmap(lambda row: lax.pswapaxes(row, "i", 0), axis_name="i")(torch.tensor([[1, 2], [3, 4]]))
        tensor([[1, 3],
                [2, 4]])

    Source: ``jax.lax.pswapaxes``.
    """
    return _all_to_all(x, axis_name, (axis, axis), axis_index_groups, False, "pswapaxes")


def psum_scatter(
    x: Any, axis_name: Any, *, scatter_dimension: int = 0, axis_index_groups: Groups = None, tiled: bool = False
) -> Any:
    """The sum over all samples of a named axis, of which sample ``i`` keeps part number ``i``.

    Shapes: with ``n`` samples and ``scatter_dimension=0``, ``[n, a] -> [a]``; with ``tiled=True``, ``[n * k, a] -> [k, a]``.

    Args:
        x: a tensor, an array or a tree of them.
        axis_name: the name of the axis; of a tuple of names, the last one varies fastest.
        scatter_dimension: which axis of ``x`` holds the parts.
        axis_index_groups: not available under ``vmap``, in JAX neither.
        tiled: whether ``scatter_dimension`` is cut into ``n`` pieces; otherwise it has size ``n`` and goes.

    Returns:
        A tree like ``x``.

    Raises:
        AxisNameError: no enclosing ``vmap`` has the name, or it has a ``chunk_size`` that cuts the axis up.
        AxisError: ``scatter_dimension`` is out of bounds or its size does not fit, or a name is given twice.
        UnsupportedOperationError: ``axis_index_groups`` is given.

    Example:
        >>> import torch
        >>> from torchbatch import lax, vmap
        >>> vmap(lambda row: lax.psum_scatter(row, "i"), axis_name="i")(torch.tensor([[1, 2], [3, 4]]))
        tensor([4, 6])

    Source: ``jax.lax.psum_scatter``.
    """
    frames = frames_of(axis_name, "psum_scatter")
    no_groups(axis_index_groups, "psum_scatter")
    if not frames:
        return x

    def scatter(value: _Tensor) -> _Tensor:
        at = _axis(scatter_dimension, "scatter_dimension", value, value.dim(), "psum_scatter")
        return own(_parts(total(value, frames), at, frames, tiled, "psum_scatter", "scatter_dimension"), frames)

    return over_leaves(scatter, x, "psum_scatter")


def ppermute(x: Any, axis_name: Any, perm: Sequence[tuple[int, int]]) -> Any:
    """Send the values of samples to other samples.

    Shapes: ``[a] -> [a]``.

    Args:
        x: a tensor, an array, a number or a tree of them.
        axis_name: the name of the axis; of a tuple of names, the last one varies fastest.
        perm: pairs ``(source, destination)``, no source and no destination twice. A sample that is no destination gets zeros.

    Returns:
        A tree like ``x``.

    Raises:
        AxisNameError: no enclosing ``vmap`` has the name, or it has a ``chunk_size`` that cuts the axis up.
        AxisError: ``perm`` has a number out of bounds, or a source or destination twice; or a name is given twice.
        AxisSpecError: ``perm`` holds anything but pairs of ints.

    Example:
        >>> import torch
        >>> from torchbatch import lax, vmap
        >>> around = [(0, 1), (1, 2), (2, 0)]
        >>> vmap(lambda x: lax.ppermute(x, "i", around), axis_name="i")(torch.tensor([1, 2, 3]))
        tensor([3, 1, 2])

    Source: ``jax.lax.ppermute``. JAX's ``vmap`` takes only permutations of all samples; zeros are what JAX gives elsewhere.
    """
    frames = frames_of(axis_name, "ppermute")
    sources = _sources(perm, size_of(frames))
    return over_leaves(lambda value: _moved(value, sources, frames), x, "ppermute")


def pshuffle(x: Any, axis_name: Any, perm: Sequence[int]) -> Any:
    """Give sample ``i`` the value of sample ``perm[i]``.

    Shapes: ``[a] -> [a]``.

    Args:
        x: a tensor, an array, a number or a tree of them.
        axis_name: the name of the axis; of a tuple of names, the last one varies fastest.
        perm: the numbers of all samples, each once.

    Returns:
        A tree like ``x``.

    Raises:
        AxisNameError: no enclosing ``vmap`` has the name, or it has a ``chunk_size`` that cuts the axis up.
        AxisError: ``perm`` does not hold every number once; or a name is given twice.
        AxisSpecError: ``perm`` is no list of ints.

    Example:
        >>> import torch
        >>> from torchbatch import lax, vmap
        >>> vmap(lambda x: lax.pshuffle(x, "i", [2, 0, 1]), axis_name="i")(torch.tensor([1, 2, 3]))
        tensor([3, 1, 2])

    Source: ``jax.lax.pshuffle``.
    """
    frames = frames_of(axis_name, "pshuffle")
    size = size_of(frames)
    if not isinstance(perm, Iterable):
        raise AxisSpecError(f"pshuffle needs a perm that is a list of ints, but it is {shown(perm)}.")
    sources = [_int(source, "pshuffle", "perm") for source in perm]
    if sorted(sources) != list(range(size)):
        raise AxisError(f"pshuffle needs a perm that holds each number from 0 to {size - 1} once, but it is {list(perm)!r}.")
    return over_leaves(lambda value: _moved(value, sources, frames), x, "pshuffle")


def pbroadcast(x: Any, axis_name: Any, source: int) -> Any:
    """Give all samples the value of one of them.

    Shapes: ``[a] -> [a]``; the result is the same for all samples.

    Args:
        x: a tensor, an array, a number or a tree of them.
        axis_name: the name of the axis; of a tuple of names, the last one varies fastest.
        source: the number of the sample, from 0.

    Returns:
        A tree like ``x``. Its tensors are copies, and can be written to.

    Raises:
        AxisNameError: no enclosing ``vmap`` has the name, or it has a ``chunk_size`` that cuts the axis up.
        AxisError: there is no such sample, or a name is given twice.
        AxisSpecError: ``source`` is not an int.

    Example:
        >>> import torch
        >>> from torchbatch import lax, vmap
        >>> vmap(lambda x: x - lax.pbroadcast(x, "i", 0), axis_name="i")(torch.tensor([1, 5, 3]))
        tensor([0, 4, 2])

    Source: ``jax.lax.pbroadcast``, as its documentation says; JAX 0.10 has an error there under ``vmap``.
    """
    frames = frames_of(axis_name, "pbroadcast")
    size = size_of(frames)
    if isinstance(source, bool) or not isinstance(source, int):
        raise AxisSpecError(f"pbroadcast needs an int for source, but it is {shown(source)}.")
    if not 0 <= source < size:
        raise AxisError(f"pbroadcast got source={source}, but there are {size} samples: they run from 0 to {size - 1}.")
    return over_leaves(lambda value: steps().pick(everyone(value, frames), [source]).squeeze(0), x, "pbroadcast")


def axis_index(axis_name: Any) -> torch.Tensor:
    """The number of the sample along a named axis, from 0.

    Shapes: ``[]``, different for each sample.

    Args:
        axis_name: the name of the axis; of a tuple of names, the last one varies fastest.

    Returns:
        An int64 tensor, on the device of the values that are mapped.

    Raises:
        AxisNameError: no enclosing ``vmap`` has the name, or it has a ``chunk_size`` that cuts the axis up.
        AxisError: a name is given twice.

    Example:
        >>> import torch
        >>> from torchbatch import lax, vmap
        >>> vmap(lambda x: x * lax.axis_index("i"), axis_name="i")(torch.tensor([5, 5, 5]))
        tensor([ 0,  5, 10])

    Source: ``jax.lax.axis_index``, which returns an int32.
    """
    index = None
    for _, size, level, values in frames_of(axis_name, "axis_index"):
        number = steps().number(level, size, device_of(values))
        index = number if index is None else index * size + number
    return torch.tensor(0) if index is None else index


def axis_size(axis_name: Any) -> int:
    """The number of samples along a named axis.

    Args:
        axis_name: the name of the axis; of a tuple of names, the product of the sizes.

    Returns:
        A Python int.

    Raises:
        AxisNameError: no enclosing ``vmap`` has the name, or it has a ``chunk_size`` that cuts the axis up.
        AxisError: a name is given twice.

    Example:
        >>> import torch
        >>> from torchbatch import lax, vmap
        >>> vmap(lambda x: x / lax.axis_size("i"), axis_name="i")(torch.tensor([3.0, 6.0, 9.0]))
        tensor([1., 2., 3.])

    Source: ``jax.lax.axis_size``.
    """
    return size_of(frames_of(axis_name, "axis_size"))


# --- options ---------------------------------------------------------------------------------------------------------


def _axis(axis: Any, what: str, value: _Tensor, rank: int, who: str) -> int:
    if isinstance(axis, bool) or not isinstance(axis, int):
        raise AxisSpecError(f"{who} needs an int for {what}, but it is {shown(axis)}.")
    if not -rank <= axis < rank:
        raise AxisError(
            f"{who} got {what}={axis} for {describe(value)}, where it runs over [-{rank}, {rank})"
            + (": there is no axis to choose." if rank == 0 else ".")
        )
    return axis % rank


def _sources(perm: Sequence[tuple[int, int]], size: int) -> list[int]:
    """The source of each sample, by number; ``size`` where it has none."""
    sources = [size] * size
    pairs = list(perm) if isinstance(perm, Iterable) else [perm]
    for pair in pairs:
        if not isinstance(pair, Iterable) or len(list(pair)) != 2:
            raise AxisSpecError(f"ppermute needs a perm of pairs (source, destination), but it is {shown(perm)}.")
        source, destination = [_number(end, size, pair) for end in pair]
        if source in sources or sources[destination] != size:
            twice = f"source {source}" if source in sources else f"destination {destination}"
            raise AxisError(
                f"ppermute needs a perm with each source and each destination once, but {twice} is there twice: {perm!r}."
            )
        sources[destination] = source
    return sources


def _int(number: Any, who: str, what: str) -> int:
    try:
        return operator.index(number)
    except TypeError:
        raise AxisSpecError(f"{who} needs ints in {what}, but one is {shown(number)}.") from None


def _number(end: Any, size: int, pair: tuple[int, int]) -> int:
    number = _int(end, "ppermute", "perm")
    if not -size <= number < size:
        raise AxisError(
            f"ppermute got the pair {tuple(pair)!r} in perm, but there are {size} samples: they run from 0 to {size - 1}."
        )
    return number % size


# --- what each does --------------------------------------------------------------------------------------------------


def _parts(full: _Tensor, at: int, frames: list[AxisFrame], tiled: bool, who: str, what: str, offset: int = 0) -> _Tensor:
    """The parts along axis ``at``, one per sample, along the first axis."""
    size, axis_names = size_of(frames), " and ".join(repr(frame[0]) for frame in frames)
    length = full.shape[at]
    if not tiled and length == size:
        return full.movedim(at, 0)
    if tiled and size and length % size == 0:
        return full.reshape(*full.shape[:at], size, length // size, *full.shape[at + 1 :]).movedim(at, 0)
    need = f"a multiple of {size}" if tiled else f"of size {size}"
    raise AxisError(
        f"{who} deals out {what}={at - offset}, which must be {need}, the number of samples of {axis_names}, but it has size "
        f"{length}."
    )


def _all_to_all(x: Any, axis_name: Any, axes: tuple[int, int], groups: Groups, tiled: bool, who: str) -> Any:
    frames = frames_of(axis_name, who)
    no_groups(groups, who)
    split_name, concat_name = ("axis", "axis") if who == "pswapaxes" else ("split_axis", "concat_axis")

    def exchange(value: _Tensor) -> _Tensor:
        split = _axis(axes[0], split_name, value, value.dim(), who)
        concat = _axis(axes[1], concat_name, value, value.dim(), who)
        parts = _parts(everyone(value, frames), split + 1, frames, tiled, who, split_name, offset=1)
        mine = own(parts, frames).movedim(0, concat)
        copied: _Tensor = steps().copy(mine.flatten(concat, concat + 1) if tiled else mine)
        return copied

    return over_leaves(exchange, x, who)


def _moved(value: _Tensor, sources: list[int], frames: list[AxisFrame]) -> _Tensor:
    full = everyone(value, frames)
    if len(sources) in sources:
        full = torch.nn.functional.pad(full, [0, 0] * (full.dim() - 1) + [0, 1])
    return own(steps().pick(full, sources), frames)
