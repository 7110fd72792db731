"""The formulas of the quantities, each for one chunk of a batch."""

from __future__ import annotations

import functools
import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torchbatch import random
from torchbatch._torch.staged import is_staging
from torchbatch.core import tree
from torchbatch.core.describe import describe, shown
from torchbatch.errors import AxisError, AxisSpecError, GradientValueError
from torchbatch.per_example.batch import Batch, Params
from torchbatch.per_example.factors import Gradients
from torchbatch.per_example.results import LARGE, Memory
from torchbatch.per_example.transform import Found, Quantity
from torchbatch.random.keys import single

_sum: Any = sum


def _result_dtype(params: Params) -> torch.dtype:
    """The real dtype of a number that all parameters have a part in."""
    dtypes: list[torch.dtype] = [leaf.dtype.to_real() for leaf in params.leaves]
    return functools.reduce(torch.promote_types, dtypes)


def like_params(values: Sequence[Tensor], params: Params) -> Any:
    """A tree like that of the parameters."""
    return params.structure.unflatten(values)


class Whole(Quantity):
    """The gradients themselves. Large products on the CPU are made last, in memory that is used again."""

    def __init__(self) -> None:
        self._memory = Memory()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()

    def of(self, batch: Batch, extra: list[Tensor]) -> Found:
        return [self._parts(each) for each in batch.gradients()], []

    def finish(self, each: list[Any], total: list[Tensor], params: Params, count: int) -> Any:
        rows = zip(each, params.leaves, strict=True)
        found = [self._multiplied(part, leaf) if isinstance(part, tuple) else part for part, leaf in rows]
        self._memory.let_go()
        return like_params(found, params)

    def _parts(self, gradients: Gradients) -> Any:
        product = gradients.product()
        size = gradients.count * gradients.shape.numel() * gradients.dtype.itemsize
        is_large = size >= LARGE and gradients.device.type == "cpu"
        return gradients.whole if product is None or not is_large else product

    def _multiplied(self, product: tuple[Tensor, Tensor], parameter: Tensor) -> Tensor:
        rows, columns = product
        shape = (*rows.shape[:3], columns.shape[3])
        if is_staging():
            return (rows @ columns).reshape(shape[0], *parameter.shape)
        found = self._memory.empty(shape, rows.dtype)
        torch.bmm(rows.flatten(0, 1), columns.flatten(0, 1), out=found.flatten(0, 1))
        return found.reshape(shape[0], *parameter.shape)


class Norms(Quantity):
    """The norms: of all parameters together, of each, or of each layer's."""

    def __init__(self, per: str | None) -> None:
        if per not in (None, "parameter", "layer"):
            raise AxisSpecError(f'norms: per must be None, "parameter" or "layer", but it is {shown(per)}.')
        self._per = per

    def of(self, batch: Batch, extra: list[Tensor]) -> Found:
        squares = [each.squares() for each in batch.gradients()]
        return (squares, []) if self._per else ([_sum(squares)], [])

    def finish(self, each: list[Tensor], total: list[Tensor], params: Params, count: int) -> Any:
        dtype = _result_dtype(params)
        if self._per is None:
            return each[0].sqrt().to(dtype)
        if self._per == "parameter":
            pairs = zip(each, params.leaves, strict=True)
            return like_params([value.sqrt().to(leaf.dtype.to_real()) for value, leaf in pairs], params)
        layers: dict[str, list[Tensor]] = {}
        for name, value in zip(params.layers(), each, strict=True):
            layers.setdefault(name, []).append(value)
        return {name: _sum(values).sqrt().to(dtype) for name, values in layers.items()}


class Sums(Quantity):
    """A sum over the examples, each clipped, or their mean."""

    def __init__(self, who: str, clip: Clip | None, is_mean: bool) -> None:
        self._who, self._clip, self._is_mean = who, clip, is_mean

    def extra(self, params: Params) -> list[Tensor]:
        return [] if self._clip is None else self._clip.bounds(params)

    def of(self, batch: Batch, extra: list[Tensor]) -> Found:
        gradients = batch.gradients()
        weights = [batch.present] * len(gradients) if self._clip is None else self._clip.weights(gradients, batch, extra)
        return [], [each.weighted(weight).to(each.dtype) for each, weight in zip(gradients, weights, strict=True)]

    def finish(self, each: list[Tensor], total: list[Tensor], params: Params, count: int) -> Any:
        if self._is_mean and not count:
            raise AxisError(f"{self._who}: the mean over a batch without examples does not exist. Leave empty batches out.")
        if not count:
            total = [torch.zeros_like(value) for value in total]
        return like_params([value / count for value in total] if self._is_mean else total, params)


class Clip:
    """How the gradient of one example is made shorter.

    Args:
        max_norm: the most that a norm may be: a number, or a tree of numbers like the parameters, or a dict by layer.
        clipping: ``"flat"``, ``"per_layer"``, ``"per_parameter"`` or ``"automatic"``.
        gamma: of ``"automatic"``, what is added to the norm.
    """

    def __init__(self, who: str, max_norm: Any, clipping: str, gamma: float) -> None:
        if clipping not in _CLIPPINGS:
            raise AxisSpecError(f"{who}: clipping must be {_CLIPPINGS_SAID}, but it is {shown(clipping)}.")
        if not clipping.startswith("per_") and not _is_bound(max_norm):
            raise AxisSpecError(f"{who}: max_norm must be a number above 0, but it is {shown(max_norm)}.")
        if not _is_bound(gamma):
            raise AxisSpecError(f"{who}: gamma must be a number above 0, but it is {shown(gamma)}.")
        self._who, self._max_norm, self._clipping, self._gamma = who, max_norm, clipping, gamma

    def _groups(self, params: Params) -> list[str]:
        """For each parameter, the name of what is clipped together with it."""
        if self._clipping == "per_layer":
            return params.layers()
        return params.names() if self._clipping == "per_parameter" else [""] * len(params.leaves)

    def bounds(self, params: Params) -> list[Tensor]:
        """The largest norms, one for each group of parameters that is clipped together, as numbers on the device."""
        groups, given = list(dict.fromkeys(self._groups(params))), self._max_norm
        bounds = [given / len(groups) ** 0.5] * len(groups) if _is_bound(given) else self._of_tree(params, groups)
        return [torch.as_tensor(bound, dtype=torch.float64).to(params.leaves[0].device) for bound in bounds]

    def _of_tree(self, params: Params, groups: list[str]) -> list[Any]:
        given, is_by_layer = self._max_norm, self._clipping == "per_layer"
        bounds, structure = tree.flatten(given)
        if is_by_layer and isinstance(given, dict):
            bounds = [given[name] for name in groups] if given.keys() == set(groups) else []
        fits = len(bounds) == len(groups) and (is_by_layer or structure == params.structure)
        if not fits or not all(map(_is_bound, bounds)):
            raise AxisSpecError(
                f"{self._who}: max_norm must be a number above 0 or, with clipping={self._clipping!r}, such a number for each "
                f"{self._clipping[4:]} ({', '.join(map(_quoted_if_empty, groups))}), but it is {shown(given)}."
            )
        return bounds

    def weights(self, gradients: Sequence[Gradients], batch: Batch, bounds: Sequence[Tensor]) -> list[Tensor]:
        """A number for each example and parameter by which the gradient is multiplied."""
        groups = self._groups(batch.params())
        together: dict[str, list[Tensor]] = {}
        for group, each in zip(groups, gradients, strict=True):
            together.setdefault(group, []).append(each.squares().to(batch.present.dtype))
        pairs = zip(together.items(), bounds, strict=True)
        factors = {group: self._factor(_sum(squares), bound) * batch.present for (group, squares), bound in pairs}
        return [factors[group] for group in groups]

    def _factor(self, square: Tensor, bound: Tensor) -> Tensor:
        norm = square.sqrt()
        bound = bound.to(norm.dtype)
        return bound / (norm + self._gamma) if self._clipping == "automatic" else (bound / norm).clamp(max=1)


_CLIPPINGS = "flat", "per_layer", "per_parameter", "automatic"
_CLIPPINGS_SAID = '"flat", "per_layer", "per_parameter" or "automatic"'


def _quoted_if_empty(name: str) -> str:
    return name or "''"


def _is_bound(value: Any) -> bool:
    if isinstance(value, Tensor):
        return not value.dim() and not value.is_complex() and bool(value > 0)
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


class Moments(Quantity):
    """The mean and, about it, the mean of the squares of what differs from it."""

    def __init__(self, correction: int) -> None:
        self._correction = correction

    def of(self, batch: Batch, extra: list[Tensor]) -> Found:
        count = batch.present.sum()
        means, squares = [], []
        for each in batch.gradients():
            flat = each.flat()
            weights = batch.present.to(flat.dtype)
            mean = weights @ flat / count.clamp(min=1)
            off = flat - mean
            squares.append((weights.to(off.dtype.to_real()) @ (off * off.conj()).real).reshape(each.shape))
            means.append(mean.reshape(each.shape))
        return [], [count, *means, *squares]

    def add(self, total: list[Tensor], new: list[Tensor]) -> list[Tensor]:
        half = len(total) // 2
        before, here = total[0], new[0]
        both = before + here
        means, squares = [], []
        for mean, mean_here, square, square_here in zip(
            total[1 : half + 1], new[1 : half + 1], total[half + 1 :], new[half + 1 :], strict=True
        ):
            off = mean_here - mean
            means.append(mean + off * (here / both))
            squares.append(square + square_here + (off * off.conj()).real * (before * here / both))
        return [both, *means, *squares]

    def finish(self, each: list[Tensor], total: list[Tensor], params: Params, count: int) -> Any:
        if count <= self._correction:
            least = self._correction
            raise AxisError(f"variance: with correction={least} it takes more than {least} examples, not {count}.")
        return like_params([value / (count - self._correction) for value in total[len(total) // 2 + 1 :]], params)


class MeanSquares(Quantity):
    """The mean of the squares, number by number."""

    def of(self, batch: Batch, extra: list[Tensor]) -> Found:
        return [], [each.weighted_squares(batch.present) for each in batch.gradients()]

    def finish(self, each: list[Tensor], total: list[Tensor], params: Params, count: int) -> Any:
        if not count:
            raise AxisError("fisher_diag: the mean over a batch without examples does not exist. Leave empty batches out.")
        return like_params([value / count for value in total], params)


class NoiseScale(Quantity):
    """The trace of the gradients' covariance by the square of their mean's norm."""

    def of(self, batch: Batch, extra: list[Tensor]) -> Found:
        gradients = batch.gradients()
        square = _sum(each.squares().to(batch.present.dtype) for each in gradients)
        return [], [batch.present @ square, *[each.weighted(batch.present) for each in gradients]]

    def finish(self, each: list[Tensor], total: list[Tensor], params: Params, count: int) -> Any:
        if count < 2:
            raise AxisError(f"noise_scale: it takes at least two examples, not {count}.")
        square, *sums = total
        mean = _sum((value / count).abs().square().sum().to(square.dtype) for value in sums)
        trace = (square - count * mean) / (count - 1)
        return (trace / (mean - trace / count)).to(_result_dtype(params))


class Along(Quantity):
    """The inner products with one direction, or their cosines."""

    def __init__(self, who: str, v: Any, is_cosine: bool) -> None:
        self._who, self._v, self._is_cosine = who, v, is_cosine

    def extra(self, params: Params) -> list[Tensor]:
        return matching(self._who, "v", self._v, params)

    def of(self, batch: Batch, extra: list[Tensor]) -> Found:
        moved = None if self._is_cosine else batch.along(extra)
        if moved is not None:
            return [moved], []
        gradients = batch.gradients()
        products: Tensor = _sum(_real(each.projected(v.conj()[None])[:, 0]) for each, v in zip(gradients, extra, strict=True))
        if not self._is_cosine:
            return [products], []
        square = _sum(each.squares() for each in gradients)
        length = _sum(value.abs().square().sum() for value in extra)
        return [products / (square.to(products.dtype) * length.to(products.dtype)).sqrt()], []

    def finish(self, each: list[Tensor], total: list[Tensor], params: Params, count: int) -> Any:
        return each[0].to(_result_dtype(params))


def _real(value: Tensor) -> Tensor:
    return value.real if value.is_complex() else value


def matching(who: str, what: str, given: Any, params: Params, more: int = 0) -> list[Tensor]:
    """The leaves of a tree like the parameters, whose leaves may have ``more`` axes in front.

    Raises:
        GradientValueError: it is none.
    """
    leaves, structure = tree.flatten(given)
    if structure != params.structure:
        raise GradientValueError(f"{who}: {what} must be a tree like the parameters ({', '.join(params.names())}).")
    for name, leaf, parameter in zip(params.names(), leaves, params.leaves, strict=True):
        if not isinstance(leaf, Tensor) or leaf.shape[more:] != parameter.shape or leaf.dim() != parameter.dim() + more:
            rows = "one row for each direction and then " if more else ""
            raise GradientValueError(
                f"{who}: {what} has {describe(leaf) if isinstance(leaf, Tensor) else shown(leaf)} for {name}, where {rows}"
                f"{describe(parameter)} is needed."
            )
    return [leaf.to(parameter.dtype) for leaf, parameter in zip(leaves, params.leaves, strict=True)]


class Projected(Quantity):
    """The inner products with several directions."""

    def __init__(self, matrix: Any, key: Any, size: int | None) -> None:
        if (matrix is None) == (key is None):
            raise AxisSpecError("project: give either matrix=…, a tree like the parameters, or key=… and size=….")
        if key is not None and not (isinstance(size, int) and not isinstance(size, bool) and size > 0):
            raise AxisSpecError(f"project: size says onto how many directions it is projected, but it is {shown(size)}.")
        self._matrix, self._size = matrix, size or 0
        self._key = None if key is None else single("project", key)

    def extra(self, params: Params) -> list[Tensor]:
        if self._key is not None:
            return [random.key_data(self._key).to(params.leaves[0].device)]
        leaves = matching("project", "matrix", self._matrix, params, more=1)
        if len({leaf.shape[0] for leaf in leaves}) > 1:
            raise GradientValueError("project: the leaves of matrix must have as many rows each, one for each direction.")
        return leaves

    def of(self, batch: Batch, extra: list[Tensor]) -> Found:
        gradients = batch.gradients()
        if self._key is None:
            return [_sum(each.projected(rows) for each, rows in zip(gradients, extra, strict=True))], []
        return [_sum(each.projected(self._drawn(extra[0], i, each)) for i, each in enumerate(gradients))], []

    def _drawn(self, words: Tensor, number: int, like: Gradients) -> Tensor:
        key = random.fold_in(random.wrap_key_data(words), number)
        drawn: Tensor = random.normal(key, (self._size, *like.shape), like.dtype) / self._size**0.5
        return drawn

    def finish(self, each: list[Tensor], total: list[Tensor], params: Params, count: int) -> Any:
        return each[0].to(_result_dtype(params)) if not each[0].is_complex() else each[0]


class Inner(Quantity, threading.local):
    """The inner products with the gradients of another batch, which is set before it runs, in each thread."""

    other: Any = None

    def extra(self, params: Params) -> list[Tensor]:
        values, keys = self.other
        return [*tree.flatten(values)[0], keys]

    def of(self, batch: Batch, extra: list[Tensor]) -> Found:
        others = batch.beside(tree.flatten(self.other[0])[1].unflatten(extra[:-1]), extra[-1])
        pairs = zip(batch.gradients(), others.gradients(), strict=True)
        return [_sum(mine.against(theirs) for mine, theirs in pairs)], []

    def finish(self, each: list[Tensor], total: list[Tensor], params: Params, count: int) -> Any:
        return each[0]
