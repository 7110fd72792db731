"""The gradients of one parameter for all examples of a batch, whole or as products, and what can be had of them.

Shapes: a batch of B examples, a parameter of m x n numbers, t places at which an example uses it. ``rows`` are ``[B, g, m, t]``
and ``columns`` ``[B, g, t, n]``, where g counts groups that do not mix (those of a convolution); B numbers go in as ``[B]``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from torchbatch._torch.factored import Convolution, Lookup, Made, Product
from torchbatch._torch.one_example import Parts

_KEPT = 2  # gradients that are made are kept up to so many times the numbers of their factors, which are kept anyway
_backward = torch.ops.aten.convolution_backward.default
_dense = torch.ops.aten.embedding_dense_backward.default


def wide(dtype: torch.dtype) -> torch.dtype:
    """The real dtype in which numbers of a dtype are summed."""
    real = dtype.to_real()
    return torch.float32 if real.itemsize < 4 else real


class Gradients:
    """The gradients of one parameter, for each example.

    Args:
        parameter: ``[*shape]``.
        results: what the function of :func:`~torchbatch._torch.one_example.taken_apart` returned, mapped over the examples.
        parts: where the gradient and its factors are among these.
    """

    def __init__(self, parameter: Tensor, results: Sequence[Any], parts: Parts) -> None:
        self.shape, self.dtype, self.device = parameter.shape, parameter.dtype, parameter.device
        self.whole: Tensor = results[parts.whole]
        self.count: int = self.whole.shape[0]
        terms = parts.terms
        self.why = terms.why if isinstance(terms, Made) else ""
        self._kept: Tensor | None = None
        self._terms: list[Any] = [] if isinstance(terms, Made) else [_made(*term, results) for term in terms]

    @classmethod
    def made(cls, parameter: Tensor, whole: Tensor) -> Gradients:
        """Gradients that exist already."""
        return cls(parameter, [whole], Parts(0, Made("it was asked for as a whole")))

    def squares(self) -> Tensor:
        """The sum of squares, ``[B]``."""
        terms = self._terms
        if not terms or not all(self._is_worth(term, other) for term in terms for other in terms):
            flat = self.flat()
            self._kept = flat if self._is_small(flat) else None
            return _squares(flat)
        products = [term.product() for term in terms]
        pairs = [(a, b, 1 if i == j else 2) for i, a in enumerate(products) for j, b in enumerate(products) if i <= j]
        return torch.stack([_inner(a, b) * times for a, b, times in pairs]).sum(0)

    def weighted(self, weights: Tensor) -> Tensor:
        """The sum over the examples, each times its weight; ``[*shape]``."""
        flat = self._kept if self._terms else self.flat()
        if flat is not None:
            return (weights.to(flat.dtype) @ flat).reshape(self.shape)
        total: Tensor = self._terms[0].weighted(weights)
        for term in self._terms[1:]:
            total = total + term.weighted(weights)
        return total.reshape(self.shape)

    def weighted_squares(self, weights: Tensor) -> Tensor:
        """The sum over the examples of the squares, number by number, each times its weight; ``[*shape]``."""
        term: Any = self._terms[0] if len(self._terms) == 1 else None
        if self._is_plain():
            return _Products(_squared(term.rows), _squared(term.columns)).weighted(weights).reshape(self.shape)
        if isinstance(term, _Lookups):
            return term.merged_squares().weighted(weights).reshape(self.shape)
        flat = _squared(self.flat())
        return (weights.to(flat.dtype) @ flat).reshape(self.shape)

    def flat(self) -> Tensor:
        """The gradients themselves, ``[B, numbers]``."""
        return self.made_whole().reshape(self.count, self.shape.numel())

    def projected(self, matrix: Tensor) -> Tensor:
        """The inner products with ``matrix[k, *shape]``, ``[B, k]``."""
        term = self._terms[0] if len(self._terms) == 1 else None
        if isinstance(term, _Lookups) or (isinstance(term, _Products) and term.places * len(matrix) <= term.sizes[1]):
            return term.projected(matrix)
        return self.flat() @ matrix.reshape(len(matrix), self.shape.numel()).T

    def against(self, other: Gradients) -> Tensor:
        """The inner products with those of another batch, ``[B, C]``."""
        if len(self._terms) == len(other._terms) == 1:
            mine, theirs = self._terms[0], other._terms[0]
            if isinstance(mine, _Products | _Lookups) and mine.places * theirs.places * other.count <= self.shape.numel():
                return _across(mine, theirs)
        return self.flat() @ other.flat().conj().T

    def _is_plain(self) -> bool:
        """Whether each is the product of two vectors."""
        terms = self._terms
        return len(terms) == 1 and isinstance(terms[0], _Products) and terms[0].places == terms[0].sizes[0] == 1

    def how(self) -> str:
        """In words, what is done for the sum of squares."""
        if not self._terms:
            return f"made for each example: {self.why}"
        if self._kept is not None:
            return "made for each example: its factors have hardly fewer numbers"
        if not all(self._is_worth(term, other) for term in self._terms for other in self._terms):
            return "summed as a product; made for each example for its norm, which costs less than the products of its factors"
        return "never made: its norm and its sum come from the factors of its product"

    def _is_worth(self, term: Any, other: Any) -> bool:
        """Whether the inner products of factors cost less than the gradient."""
        if self.dtype.is_complex:
            return False
        _, rows, columns = term.sizes
        both: int = term.places * other.places * ((0 if term.is_lookup or other.is_lookup else rows) + columns)
        made: int = (term.places + other.places) * (0 if term.is_lookup else rows) * columns // 2 + rows * columns
        return both < made

    def _is_small(self, flat: Tensor) -> bool:
        """Whether gradients that were made are worth keeping: where they have not many more numbers than their factors."""
        entries: int = sum(term.entries() for term in self._terms)
        return 0 < flat.shape[1] <= _KEPT * entries

    def product(self) -> tuple[Tensor, Tensor] | None:
        """``[B, g, m, t]`` and ``[B, g, t, n]`` whose product the gradients are, if the two have fewer numbers."""
        term = self._terms[0] if len(self._terms) == 1 else None
        if not isinstance(term, _Products) or term.entries() > self.shape.numel():
            return None
        return term.rows, term.columns

    def made_whole(self) -> Tensor:
        """The gradients, in whatever shape they are made."""
        term = self._terms[0] if len(self._terms) == 1 else None
        return term.whole() if isinstance(term, _Products) else self.whole


def _squares(flat: Tensor) -> Tensor:
    flat = torch.view_as_real(flat).flatten(1) if flat.is_complex() else flat
    return flat.to(wide(flat.dtype)).square().sum(1)


def _squared(values: Tensor) -> Tensor:
    return (values * values.conj()).real if values.is_complex() else values.square()


def _made(kind: Any, positions: Sequence[int], rest: Sequence[Any], results: Sequence[Any]) -> Any:
    tensors = [results[position] for position in positions]
    return _CLASSES[kind](*tensors, *rest)


class _Products:
    """``rows @ columns``."""

    is_lookup = False

    def __init__(self, rows: Tensor, columns: Tensor) -> None:
        self.rows, self.columns = rows, columns
        self.places: int = rows.shape[3]
        self.sizes = rows.shape[1], rows.shape[2], columns.shape[3]

    def entries(self) -> int:
        """How many numbers the factors of one example have."""
        return self.rows[0].numel() + self.columns[0].numel()

    def product(self) -> _Products:
        """The form that inner products need."""
        return self

    def whole(self) -> Tensor:
        """``[B, g, m, n]``."""
        return self.rows @ self.columns

    def projected(self, matrix: Tensor) -> Tensor:
        """The inner products with ``matrix[k, g * m * n]``, ``[B, k]``."""
        by_rows = torch.einsum("bgmt,kgmn->bgktn", self.rows, matrix.reshape(-1, *self.sizes))
        return torch.einsum("bgktn,bgtn->bk", by_rows, self.columns)

    def weighted(self, weights: Tensor) -> Tensor:
        rows, columns = self.rows, self.columns
        scaled = weights.to(rows.dtype)[:, None, None, None]
        rows, columns = (rows * scaled, columns) if rows.numel() < columns.numel() else (rows, columns * scaled)
        groups, height, width = self.sizes
        left = rows.permute(1, 2, 0, 3).reshape(groups, height, -1)
        right = columns.permute(1, 0, 2, 3).reshape(groups, -1, width)
        return left[0] @ right[0] if groups == 1 else left @ right


class _Lookups:
    """``columns`` added up in rows that numbers say; ``[B, t]`` and ``[B, t, n]``."""

    is_lookup = True

    def __init__(self, numbers: Tensor, columns: Tensor, count: int) -> None:
        self.numbers, self.columns, self.count = numbers, columns[:, None], count
        self.places: int = numbers.shape[1]
        self.sizes = 1, count, columns.shape[2]

    def entries(self) -> int:
        """How many numbers the factors of one example have."""
        return self.columns[0].numel()

    def product(self) -> _Lookups:
        """The form that inner products need."""
        return self

    def projected(self, matrix: Tensor) -> Tensor:
        """The inner products with ``matrix[k, count * n]``, ``[B, k]``."""
        picked = matrix.reshape(-1, *self.sizes[1:])[:, self.numbers]  # [k, B, t, n]
        return torch.einsum("kbtn,btn->bk", picked, self.columns[:, 0])

    def merged_squares(self) -> _Lookups:
        """The squares of the numbers, where what is added up in one row is added up before."""
        same = self.numbers[:, :, None] == self.numbers[:, None, :]
        is_first = ~same.tril(-1).any(2)
        merged = same.to(self.columns.dtype) @ self.columns[:, 0]
        return _Lookups(self.numbers, _squared(merged * is_first[..., None]), self.count)

    def weighted(self, weights: Tensor) -> Tensor:
        scaled = self.columns[:, 0] * weights.to(self.columns.dtype)[:, None, None]
        if not scaled.is_complex():
            found: Tensor = _dense(scaled.flatten(0, 1), self.numbers.flatten(), self.count, -1, False)
            return found
        zeros = scaled.new_zeros(self.count, self.sizes[2])
        return zeros.index_add(0, self.numbers.flatten(), scaled.flatten(0, 1))


class _Convolutions:
    """The gradients of the weight of a convolution: ``[B, b, c, *out]`` of its outputs, and ``[B, b, c, *in]``, its inputs."""

    is_lookup = False

    def __init__(self, cotangent: Tensor, given: Tensor, weight: Tensor, settings: tuple[Any, ...]) -> None:
        self._cotangent, self._given, self._weight, self._settings = cotangent, given, weight, settings
        self._fixed, self._moved = (given, cotangent) if settings[3] else (cotangent, given)
        groups = settings[5]
        self.places: int = self._fixed[0].numel() // max(self._fixed.shape[2], 1)
        self.sizes = groups, weight.shape[1] // groups, weight[0, 0].numel()

    def entries(self) -> int:
        """How many numbers the factors of one example have."""
        return self._cotangent[0].numel() + self._given[0].numel()

    def product(self) -> _Products:
        """The same as a product, with a column for each place and each number that the weight meets there."""
        count, groups = len(self._fixed), self.sizes[0]
        stride, padding, dilation = self._settings[:3]
        axes = self._fixed.dim() - 3
        patches = functional.pad(self._moved, [each for size in reversed(padding) for each in (size, size)])
        for axis in range(axes):
            length = (self._weight.shape[3 + axis] - 1) * dilation[axis] + 1
            patches = patches.unfold(3 + axis, length, stride[axis]).narrow(3 + axis, 0, self._fixed.shape[3 + axis])
            patches = patches[..., :: dilation[axis]]
        ahead = _in_groups(patches, groups).movedim((2, 1), (1, 2))  # [B, g, b, c, *places, *kernel]
        columns = ahead.movedim(3, 3 + axes).reshape(count, groups, self.places, self.sizes[2])
        rows = _in_groups(self._fixed, groups).movedim((2, 3), (1, 2))  # [B, g, o, b, *places]
        return _Products(rows.reshape(count, *self.sizes[:2], self.places), columns)

    def weighted(self, weights: Tensor) -> Tensor:
        cotangent = self._cotangent * weights.to(self._cotangent.dtype).reshape(-1, *[1] * (self._cotangent.dim() - 1))
        found = _backward(
            cotangent.flatten(0, 1), self._given.flatten(0, 1), self._weight[0], None, *self._settings, [False, True, False]
        )
        weight: Tensor = found[1]
        return weight


def _in_groups(values: Tensor, groups: int) -> Tensor:
    """``[B, b, g * c, …]`` as ``[B, b, g, c, …]``."""
    return values.reshape(*values.shape[:2], groups, values.shape[2] // groups, *values.shape[3:])


_CLASSES = {Product: _Products, Lookup: _Lookups, Convolution: _Convolutions}


def _inner(a: Any, b: Any) -> Tensor:
    """The inner products of two terms of the same gradients, ``[B]``, from their factors."""
    kind = wide(a.columns.dtype)
    if a.places == 1 and b is a and not a.is_lookup:
        found: Tensor = (a.rows[..., 0].to(kind).square().sum(2) * a.columns[:, :, 0].to(kind).square().sum(2)).sum(1)
        return found
    if a.is_lookup and not b.is_lookup:
        a, b = b, a
    columns: Tensor = a.columns.to(kind) @ b.columns.to(kind).transpose(2, 3)
    return (_rows_inner(a, b, kind) * columns).flatten(1).sum(1)


def _rows_inner(a: Any, b: Any, kind: torch.dtype) -> Tensor:
    """``[B, g, t, s]``, the inner products of the rows of two terms."""
    found: Tensor
    if a.is_lookup:
        found = (a.numbers[:, :, None] == b.numbers[:, None, :]).to(kind)[:, None]
    elif b.is_lookup:
        picked = b.numbers[:, None, :, None].expand(-1, a.rows.shape[1], -1, a.places)
        found = a.rows.to(kind).gather(2, picked).transpose(2, 3)
    else:
        found = a.rows.to(kind).transpose(2, 3) @ b.rows.to(kind)
    return found


def _across(a: Any, b: Any) -> Tensor:
    """The inner products of the gradients of two batches, ``[B, C]``, from their factors."""
    columns: Tensor = torch.einsum("bgtn,cgsn->gbtcs", a.columns, b.columns.conj())
    if a.is_lookup:
        rows = (a.numbers[:, :, None, None] == b.numbers).to(columns.dtype)[None]
    else:
        rows = torch.einsum("bgmt,cgms->gbtcs", a.rows, b.rows.conj())
    found: Tensor = (rows * columns).sum((0, 2, 4))
    return found
