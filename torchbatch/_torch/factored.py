"""The gradient of a weight, for one example, as the product that it is: found in the graph of a gradient.

The gradient of a weight that multiplies is a product of two matrices, ``rows[m, t] @ columns[t, n]``, where t counts the places
at which the weight was used (tokens, pixels, steps). Most that one wants to know of it (its norm, a weighted sum over examples,
an inner product) is had from the two for less than from the product, which needs not be made.

What is looked at is the graph of one example: there are no batch axes in it, so a product stands there as one.

Operators used: those of ``torch.ops.aten``, as torch 2.11, 2.13 and 2.15 have them.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch.fx import Graph, Node

from torchbatch._torch.programs import OPERATORS
from torchbatch._torch.rewriting import add, shape, value

_aten = torch.ops.aten
_SAME = frozenset((_aten.clone.default, _aten.detach.default, _aten.alias.default, _aten.lift_fresh_copy.default))
_MOVES = frozenset((
    _aten.view.default, _aten._unsafe_view.default, _aten.reshape.default, _aten.t.default, _aten.transpose.int,
    _aten.permute.default, _aten.unsqueeze.default, _aten.squeeze.dim, _aten.squeeze.dims, _aten.squeeze.default,
))  # fmt: skip
_SCALINGS = frozenset((_aten.mul.Tensor, _aten.mul.Scalar, _aten.div.Tensor, _aten.div.Scalar))


class Product(NamedTuple):
    """``rows[g, m, t] @ columns[g, t, n]``, which has the numbers of the gradient in their order."""

    rows: Node
    columns: Node


class Lookup(NamedTuple):
    """Rows that are added up in the places that numbers say: ``gradient[numbers[t]] += columns[t]``."""

    numbers: Node
    columns: Node
    height: int  # the rows that there are


class Convolution(NamedTuple):
    """The gradient of a convolution's weight: those of its output, with a batch of any size, and its input."""

    cotangent: Node
    input: Node
    weight: Node
    settings: tuple[Any, ...]  # stride, padding, dilation, transposed, output_padding, groups


Term = Product | Lookup | Convolution


class Made(NamedTuple):
    """A gradient that has to be made as a whole, and why."""

    why: str


class _Placed(NamedTuple):
    """A term, and what was done to it since: views, which move its numbers about."""

    term: Term
    moves: tuple[Node, ...]


class _Whole(Exception):  # noqa: N818 (it is no error)
    """There is no product in a gradient, or not only."""


def find(graph: Graph, gradient: Any) -> list[Term] | Made:
    """The terms that add up to a gradient; operations that these need are added to the graph before its output.

    Must be used under the fake mode of the values that the nodes carry.
    """
    if not isinstance(gradient, Node):
        return Made("it is zero")
    if sum(size != 1 for size in shape(gradient)) < 2:
        return Made("it is a vector")
    with graph.inserting_before(graph.output_node()):
        try:
            return _added_up(graph, _resolved(graph, gradient)) or Made("it is zero")
        except _Whole as reason:
            return Made(str(reason))


def _resolved(graph: Graph, node: Any) -> list[Term]:
    """The terms that add up to a node, with their numbers in the order of the node's."""
    if not isinstance(node, Node):
        raise _Whole("it comes from a number")
    return [_in_order(graph, placed, node) for placed in _terms(graph, node)]


def _terms(graph: Graph, node: Node) -> list[_Placed]:
    target, args = node.target, node.args
    if _is_zeros(node):
        return []
    if target in _BLOCKS:
        return [_Placed(term, ()) for term in _BLOCKS[target](graph, node)]
    if target is _aten._to_copy.default and args and _widens(node):
        return [placed._replace(term=_cast(graph, placed.term, value(node).dtype)) for placed in _terms(graph, args[0])]  # type: ignore[arg-type]
    if target in _SAME or (target in _MOVES and value(node).numel() == value(node.args[0]).numel()):  # type: ignore[arg-type]
        below = _terms(graph, args[0])  # type: ignore[arg-type]
        return below if target in _SAME else [placed._replace(moves=(*placed.moves, node)) for placed in below]
    if target is _aten.add.Tensor and not node.kwargs and all(_has_shape(arg, shape(node)) for arg in args):
        return [placed for arg in args for placed in _terms(graph, arg)]  # type: ignore[arg-type]
    if target is _aten.neg.default or (target in _SCALINGS and _has_shape(args[0], shape(node)) and _is_number(args[1])):
        return _scaled(graph, node)
    rule = _RULES.get(target)
    if rule is None:
        raise _Whole(f"it comes from {_name(node)}")
    return [_Placed(rule(graph, node), ())]


def _name(node: Node) -> str:
    if node.target is operator.getitem:
        return _name(node.args[0])  # type: ignore[arg-type]
    if node.target in OPERATORS:
        return "a loop or a choice of torchbatch.lax"
    return str(getattr(node.target, "__name__", node.target)).partition(".")[0] if node.op == "call_function" else "an input"


def _has_shape(arg: Any, sizes: Sequence[int]) -> bool:
    return isinstance(arg, Node) and shape(arg) == tuple(sizes)


def _is_number(arg: Any) -> bool:
    return value(arg).dim() == 0 if isinstance(arg, Node) else isinstance(arg, int | float)


def _scaled(graph: Graph, node: Node) -> list[_Placed]:
    def scale(factor: Node) -> Node:
        return add(graph, node.target, factor, *node.args[1:], **node.kwargs)

    found = []
    for placed in _terms(graph, node.args[0]):  # type: ignore[arg-type]
        term = placed.term
        if isinstance(term, Convolution):
            found.append(placed._replace(term=term._replace(cotangent=scale(term.cotangent))))
        else:
            found.append(placed._replace(term=term._replace(columns=scale(term.columns))))
    return found


def _widens(node: Node) -> bool:
    before, after = value(node.args[0]).dtype, value(node).dtype  # type: ignore[arg-type]
    return before.is_floating_point and after.is_floating_point and after.itemsize >= before.itemsize


def _cast(graph: Graph, term: Term, dtype: torch.dtype) -> Term:
    """The term in a wider dtype, as autocast leaves it: the factors are widened, and not the product."""

    def wide(factor: Node) -> Node:
        return add(graph, _aten._to_copy.default, factor, dtype=dtype)

    if isinstance(term, Product):
        return Product(wide(term.rows), wide(term.columns))
    if isinstance(term, Lookup):
        return term._replace(columns=wide(term.columns))
    return term._replace(cotangent=wide(term.cotangent), input=wide(term.input), weight=wide(term.weight))


# --- where products are made -----------------------------------------------------------------------------------------


def _matrices(graph: Graph, node: Node) -> Product:
    left, right = (add(graph, _aten.unsqueeze.default, arg, 0) for arg in node.args)
    return Product(left, right)


def _batched_matrices(graph: Graph, node: Node) -> Product:
    left: Any = node.args[0]
    right: Any = node.args[1]
    return Product(left, right)


def _outer(graph: Graph, node: Node) -> Product:
    """``[m, 1] * [1, n]``, as the product of two vectors is recorded; further axes of length 1 may stand beside."""
    whole = shape(node)
    left, right = node.args
    if not isinstance(left, Node) or not isinstance(right, Node):
        raise _Whole("it comes from mul")
    long = [{axis for axis in range(len(whole)) if _size(arg, axis - len(whole)) != 1} for arg in (left, right)]
    everything = {axis for axis, size in enumerate(whole) if size != 1}
    if long[0] & long[1] or long[0] | long[1] != everything:
        raise _Whole("it comes from mul, and not as an outer product")
    if long[0] and long[1] and min(long[1]) < max(long[0]):
        left, right, long = right, left, long[::-1]
    if long[0] and long[1] and min(long[1]) < max(long[0]):
        raise _Whole("it comes from mul, with axes that alternate")
    return Product(add(graph, _aten.reshape.default, left, [1, -1, 1]), add(graph, _aten.reshape.default, right, [1, 1, -1]))


def _size(node: Node, axis: int) -> int:
    return shape(node)[axis] if -axis <= len(shape(node)) else 1


def _convolution(graph: Graph, node: Node) -> Convolution:
    made: Any = node.args[0]
    if made.target is not _aten.convolution_backward.default or node.args[1] != 1:
        raise _Whole(f"it comes from {_name(made)}")
    cotangent, given, weight, _, *settings = made.args
    return Convolution(cotangent, given, weight, tuple(settings[:6]))


def _embedding(graph: Graph, node: Node) -> Lookup:
    cotangent, numbers, count, padding, by_frequency = node.args
    if by_frequency:
        raise _Whole("it comes from an embedding with scale_grad_by_freq")
    numbers = add(graph, _aten.reshape.default, numbers, [-1])
    columns = add(graph, _aten.reshape.default, cotangent, [-1, shape(node)[1]])
    if isinstance(padding, int) and padding >= 0:
        kept = add(graph, _aten.unsqueeze.default, add(graph, _aten.ne.Scalar, numbers, padding), 1)
        columns = add(graph, _aten.mul.Tensor, columns, add(graph, _aten._to_copy.default, kept, dtype=value(columns).dtype))
    return Lookup(numbers, columns, int(count))  # type: ignore[arg-type]


def _index_put(graph: Graph, node: Node) -> Lookup:
    zeros, indices, values, *accumulate = node.args
    numbers: Any = indices[0] if len(indices) == 1 else None  # type: ignore[index, arg-type]
    is_rows = isinstance(numbers, Node) and not value(numbers).dtype.is_floating_point and value(numbers).dtype is not torch.bool
    if not _is_zeros(zeros) or accumulate != [True] or not is_rows or len(shape(node)) != 2:
        raise _Whole("it comes from index_put")
    count, width = shape(node)
    numbers = add(graph, _aten.remainder.Scalar, add(graph, _aten.reshape.default, numbers, [-1]), count)
    return Lookup(numbers, add(graph, _aten.reshape.default, values, [-1, width]), count)


def _index_add(graph: Graph, node: Node) -> Lookup:
    zeros, axis, numbers, values = node.args
    if not _is_zeros(zeros) or axis != 0 or node.kwargs or len(shape(node)) != 2:
        raise _Whole("it comes from index_add")
    columns = add(graph, _aten.reshape.default, values, [-1, shape(node)[1]])
    return Lookup(add(graph, _aten.reshape.default, numbers, [-1]), columns, shape(node)[0])


def _is_zeros(node: Any) -> bool:
    return isinstance(node, Node) and node.target in (_aten.new_zeros.default, _aten.zeros.default, _aten.zeros_like.default)


_RULES: dict[Any, Callable[[Graph, Node], Term]] = {
    _aten.mm.default: _matrices,
    _aten.bmm.default: _batched_matrices,
    _aten.mul.Tensor: _outer,
    operator.getitem: _convolution,
    _aten.embedding_dense_backward.default: _embedding,
    _aten.index_put.default: _index_put,
    _aten.index_add.default: _index_add,
}


# --- what acts along one axis of a product acts on one of its factors ------------------------------------------------

Change = Callable[[Node, int], Node]


def _changed(graph: Graph, term: Term, sizes: Sequence[int], axis: int, change: Change) -> Term:
    """A term of a tensor of some sizes, after something was done along one axis of it that is linear along the axis.

    Args:
        graph: where the operations go.
        term: in the order of the tensor's numbers.
        sizes: of the tensor.
        axis: of the tensor.
        change: what is done to a factor, along an axis of it.
    """
    axis = axis % len(sizes)
    if isinstance(term, Convolution):
        raise _Whole("it is a part of the weight of a convolution")
    if isinstance(term, Lookup):
        if axis == 0:
            raise _Whole("it takes rows of what is looked up")
        return term._replace(columns=_along(graph, term.columns, [shape(term.columns)[0], *sizes[1:]], axis, change, 1))
    groups, rows, places = shape(term.rows)
    first, last = _bounds(sizes, groups, rows, shape(term.columns)[2])
    product = term
    if axis < last:
        whole = [*sizes[:last], places]
        product = product._replace(rows=_along(graph, term.rows, whole, axis, change, first, last))
    if axis < first or axis >= last:
        whole = [*sizes[:first], places, *sizes[last:]]
        axis = axis if axis < first else axis - last + first + 1
        product = product._replace(columns=_along(graph, term.columns, whole, axis, change, first, first + 1))
    return product


def _along(graph: Graph, factor: Node, sizes: Sequence[int], axis: int, change: Change, *splits: int) -> Node:
    """A factor with its axes apart, changed along one of them, and put together again to axes that begin at ``splits``."""
    made = change(add(graph, _aten.reshape.default, factor, list(sizes)), axis)
    found = shape(made)
    edges = [0, *splits, len(found)]
    merged = [math.prod(found[low:high]) for low, high in itertools.pairwise(edges)]
    return add(graph, _aten.reshape.default, made, merged)


def _bounds(sizes: Sequence[int], groups: int, rows: int, columns: int) -> tuple[int, int]:
    """Which axes are those of the groups, ``[:first]``, of the rows, ``[first:last]``, and of the columns, ``[last:]``."""
    for first in range(len(sizes) + 1):
        for last in range(first, len(sizes) + 1):
            if (math.prod(sizes[:first]), math.prod(sizes[first:last]), math.prod(sizes[last:])) == (groups, rows, columns):
                return first, last
    raise _Whole("its axes are mixed after it is made")


def _embedded(graph: Graph, term: Term, sizes: Sequence[int], axis: int, total: int, start: int, step: int = 1) -> Term:
    """A term that is a part of a larger tensor, along an axis that has ``total`` places there, with zeros in the others."""
    axis = axis % len(sizes)
    end = start + (sizes[axis] - 1) * step + 1
    if isinstance(term, Lookup) and axis == 0 and step == 1:
        return term._replace(numbers=add(graph, _aten.add.Tensor, term.numbers, start), height=total)

    def within(factor: Node, at: int) -> Node:
        whole = list(shape(factor))
        whole[at] = total
        return add(graph, _aten.slice_backward.default, factor, whole, at, start, end, step)

    return _changed(graph, term, sizes, axis, within)


def _slice_backward(graph: Graph, node: Node) -> list[Term]:
    arguments: Any = node.args
    given, sizes, axis, start, _, step = arguments
    start = start + sizes[axis] if start < 0 else start
    return [_embedded(graph, term, shape(given), axis, sizes[axis], start, step) for term in _resolved(graph, given)]


def _select_backward(graph: Graph, node: Node) -> list[Term]:
    arguments: Any = node.args
    given, sizes, axis, index = arguments
    axis %= len(sizes)
    inner = [*sizes[:axis], 1, *sizes[axis + 1 :]]
    return [_embedded(graph, term, inner, axis, sizes[axis], index % sizes[axis]) for term in _resolved(graph, given)]


def _joined(graph: Graph, node: Node) -> list[Term]:
    """``cat``: each part with zeros in the places of the others."""
    parts: Any = node.args[0]
    axis = (int(node.args[1]) if len(node.args) > 1 else 0) % len(shape(node))  # type: ignore[arg-type]
    total, start, found = shape(node)[axis], 0, []
    for part in parts:
        found += [_embedded(graph, term, shape(part), axis, total, start) for term in _resolved(graph, part)]
        start += shape(part)[axis]
    return found


def _stacked(graph: Graph, node: Node) -> list[Term]:
    parts: Any = node.args[0]
    axis = (int(node.args[1]) if len(node.args) > 1 else 0) % len(shape(node))  # type: ignore[arg-type]
    inner = [*shape(node)[:axis], 1, *shape(node)[axis + 1 :]]
    return [
        _embedded(graph, term, inner, axis, len(parts), i) for i, part in enumerate(parts) for term in _resolved(graph, part)
    ]


def _sliced(graph: Graph, node: Node) -> list[Term]:
    arguments: Any = node.args
    given, axis, *rest = arguments

    def part(factor: Node, at: int) -> Node:
        return add(graph, _aten.slice.Tensor, factor, at, *rest)

    return [_changed(graph, term, shape(given), axis, part) for term in _resolved(graph, given)]


def _selected(graph: Graph, node: Node) -> list[Term]:
    arguments: Any = node.args
    given, axis, index = arguments

    def part(factor: Node, at: int) -> Node:
        return add(graph, _aten.slice.Tensor, factor, at, index, index + 1 or None)

    return [_changed(graph, term, shape(given), axis, part) for term in _resolved(graph, given)]


def _summed(graph: Graph, node: Node) -> list[Term]:
    """A sum over all groups of a product is a product of longer factors; over rows or columns, of factors summed."""
    arguments: Any = node.args
    given, axes = arguments[:2]
    sizes, terms = list(shape(given)), _resolved(graph, given)
    for axis in [axis % len(sizes) for axis in axes]:
        if sizes[axis] != 1:
            terms = [_summed_along(graph, term, sizes, axis) for term in terms]
            sizes[axis] = 1
    return terms


def _summed_along(graph: Graph, term: Term, sizes: Sequence[int], axis: int) -> Term:
    if isinstance(term, Product):
        groups, rows, places = shape(term.rows)
        columns = shape(term.columns)[2]
        if axis < _bounds(sizes, groups, rows, columns)[0]:
            if sizes[axis] != groups:
                raise _Whole("it is a sum over some of the groups of a product")
            left = add(graph, _aten.permute.default, term.rows, [1, 0, 2])
            left = add(graph, _aten.reshape.default, left, [1, rows, groups * places])
            return Product(left, add(graph, _aten.reshape.default, term.columns, [1, groups * places, columns]))

    def total(factor: Node, at: int) -> Node:
        return add(graph, _aten.sum.dim_IntList, factor, [at], True)

    return _changed(graph, term, sizes, axis, total)


_BLOCKS: dict[Any, Callable[[Graph, Node], list[Term]]] = {
    _aten.slice_backward.default: _slice_backward,
    _aten.select_backward.default: _select_backward,
    _aten.cat.default: _joined,
    _aten.stack.default: _stacked,
    _aten.slice.Tensor: _sliced,
    _aten.select.int: _selected,
    _aten.sum.dim_IntList: _summed,
}


# --- in the order of the gradient's numbers --------------------------------------------------------------------------


def _in_order(graph: Graph, placed: _Placed, gradient: Node) -> Term:
    """The term with all that was done to it since done to its factors."""
    term, moves = placed
    if not moves:
        return term
    axes = _strides(shape(moves[0].args[0]), moves)  # type: ignore[arg-type]
    if axes is None or not (isinstance(term, Product) or axes == _contiguous(shape(gradient))):
        raise _Whole("its axes are moved after it is made")
    return _permuted(graph, term, axes) if isinstance(term, Product) else term


def _permuted(graph: Graph, term: Product, axes: list[tuple[int, int]]) -> Product:
    """A product whose numbers are looked at as a tensor whose axes have these sizes and strides."""
    groups, rows, _ = shape(term.rows)
    columns = shape(term.columns)[2]
    whole = [groups * rows * columns, rows * columns, columns, 1]
    kinds = [next(kind for kind in range(3) if axis[1] >= whole[kind + 1]) for axis in axes]
    parts = [[axis for axis, kind in zip(axes, kinds, strict=True) if kind == wanted] for wanted in range(3)]
    in_order, swapped = sorted(kinds), sorted(kinds, key=[0, 2, 1].__getitem__)
    fits = all(size * stride <= whole[kind] for (size, stride), kind in zip(axes, kinds, strict=True))
    if kinds not in (in_order, swapped) or not fits:
        raise _Whole("its axes are moved after it is made")
    left = _reordered(graph, _reordered(graph, term.rows, 0, parts[0]), 1, parts[1])
    right = _reordered(graph, _reordered(graph, term.columns, 0, parts[0]), 2, parts[2])
    if kinds == in_order:
        return Product(left, right)
    return Product(*(add(graph, _aten.transpose.int, factor, 1, 2) for factor in (right, left)))


def _reordered(graph: Graph, factor: Node, axis: int, parts: list[tuple[int, int]]) -> Node:
    """A factor one axis of which consists of several, of sizes and strides, that come in another order."""
    order = sorted(range(len(parts)), key=lambda i: -parts[i][1])
    if order == list(range(len(parts))):
        return factor
    whole = shape(factor)
    apart = add(graph, _aten.reshape.default, factor, [*whole[:axis], *[parts[i][0] for i in order], *whole[axis + 1 :]])
    places = [axis + order.index(i) for i in range(len(parts))]
    axes = [*range(axis), *places, *range(axis + len(parts), len(whole) + len(parts) - 1)]
    return add(graph, _aten.reshape.default, add(graph, _aten.permute.default, apart, axes), list(whole))


def _contiguous(sizes: Sequence[int]) -> list[tuple[int, int]]:
    return _long(sizes, [math.prod(sizes[axis + 1 :]) for axis in range(len(sizes))])


def _long(sizes: Sequence[int], strides: Sequence[int]) -> list[tuple[int, int]]:
    return [(size, stride) for size, stride in zip(sizes, strides, strict=True) if size != 1]


def _strides(sizes: Sequence[int], moves: Sequence[Node]) -> Any:
    """Where the numbers of a tensor are after it was moved about; None if they cannot be moved without a copy."""
    numbers = torch.empty(tuple(sizes), device="meta")
    for move in moves:
        target: Any = _aten.view.default if move.target in (_aten._unsafe_view.default, _aten.reshape.default) else move.target
        try:
            numbers = target(numbers, *move.args[1:])
        except RuntimeError:
            return None
    return _long(numbers.shape, numbers.stride())


def _added_up(graph: Graph, terms: list[Term]) -> list[Term]:
    """Products next to each other as one, of longer factors."""
    products = [term for term in terms if isinstance(term, Product)]
    others = [term for term in terms if not isinstance(term, Product)]
    if len(products) < 2:
        return terms
    sizes = {(shape(term.rows)[:2], shape(term.columns)[2]) for term in products}
    if len(sizes) > 1:
        raise _Whole("it is a sum of products of several forms")
    rows = add(graph, _aten.cat.default, [term.rows for term in products], 2)
    columns = add(graph, _aten.cat.default, [term.columns for term in products], 1)
    return [Product(rows, columns), *others]
