"""The gradient of a weight, for one example, as the product that it is: found in the graph of a gradient.

The gradient of a weight that multiplies is a product of two matrices, ``rows[m, t] @ columns[t, n]``, where t counts the places
at which the weight was used (tokens, pixels, steps). Most that one wants to know of it (its norm, a weighted sum over examples,
an inner product) is had from the two for less than from the product, which needs not be made.

What is looked at is the graph of one example: there are no batch axes in it, so a product stands there as one.

Operators used: those of ``torch.ops.aten``, as torch 2.11, 2.13 and 2.15 have them. Private names used, seen on the same:
``torch.utils._python_dispatch._disable_current_modes``.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch.fx import Graph, Node
from torch.utils._python_dispatch import _disable_current_modes

from torchbatch._torch.programs import numbers_in
from torchbatch._torch.recurrent import step_by_step
from torchbatch._torch.rewriting import add, shape, value
from torchbatch._torch.staged import stage

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
    count: int  # the rows that there are


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
    if value(gradient).dim() < 2:
        return Made("it is a vector")
    with graph.inserting_before(graph.output_node()):
        try:
            return _added_up(graph, [_in_order(graph, placed, gradient) for placed in _terms(graph, gradient)])
        except _Whole as reason:
            return Made(str(reason))


def _terms(graph: Graph, node: Node) -> list[_Placed]:
    target, args = node.target, node.args
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


def _is_zeros(node: Any) -> bool:
    return isinstance(node, Node) and node.target in (_aten.new_zeros.default, _aten.zeros.default, _aten.zeros_like.default)


_RULES: dict[Any, Callable[[Graph, Node], Term]] = {
    _aten.mm.default: _matrices,
    _aten.bmm.default: _batched_matrices,
    _aten.mul.Tensor: _outer,
    operator.getitem: _convolution,
    _aten.embedding_dense_backward.default: _embedding,
    _aten.index_put.default: _index_put,
}


# --- in the order of the gradient's numbers --------------------------------------------------------------------------


def _in_order(graph: Graph, placed: _Placed, gradient: Node) -> Term:
    """The term with all that was done to it since done to its factors."""
    term, moves = placed
    if not isinstance(term, Product):
        sizes = shape(gradient)
        if _strides(_sizes(term), moves) != _contiguous(sizes):
            raise _Whole("its axes are moved after it is made")
        return term
    groups, rows, inner = shape(term.rows)
    columns = shape(term.columns)[2]
    if _strides(_before(moves, (groups, rows, columns)), moves) == _contiguous(shape(gradient)):
        return term
    swapped = Product(*(add(graph, _aten.transpose.int, factor, 1, 2) for factor in (term.columns, term.rows)))
    strides = _strides(_before(moves, (groups, rows, columns)), moves, transposed=(groups, rows, columns))
    if strides != _contiguous(shape(gradient)):
        raise _Whole("its axes are moved after it is made")
    return swapped


def _sizes(term: Term) -> tuple[int, ...]:
    if isinstance(term, Convolution):
        return shape(term.weight)
    lookup: Any = term
    return lookup.count, shape(lookup.columns)[1]


def _before(moves: Sequence[Node], otherwise: tuple[int, ...]) -> tuple[int, ...]:
    return shape(moves[0].args[0]) if moves else otherwise  # type: ignore[arg-type]


def _contiguous(sizes: Sequence[int]) -> list[tuple[int, int]]:
    return _long(sizes, [math.prod(sizes[axis + 1 :]) for axis in range(len(sizes))])


def _long(sizes: Sequence[int], strides: Sequence[int]) -> list[tuple[int, int]]:
    return [(size, stride) for size, stride in zip(sizes, strides, strict=True) if size != 1]


def _strides(sizes: Sequence[int], moves: Sequence[Node], transposed: tuple[int, int, int] | None = None) -> Any:
    """Where the numbers of a matrix are after it was moved about; of one that lies transposed, if ``transposed`` says so.

    None if they cannot be moved without a copy.
    """
    if transposed is None:
        numbers = torch.empty(tuple(sizes), device="meta")
    else:
        groups, rows, columns = transposed
        numbers = torch.empty((groups, columns, rows), device="meta").transpose(1, 2)
        try:
            numbers = numbers.view(tuple(sizes))
        except RuntimeError:
            return None
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


# --- a function of one example, taken apart --------------------------------------------------------------------------


class Parts(NamedTuple):
    """The gradient of one parameter as the graph of :class:`Taken` returns it: positions among what that returns.

    Attributes:
        whole: of the gradient itself.
        terms: for each term its class, the positions of its tensors, and what else belongs to it; or why there are none.
    """

    whole: int
    terms: list[tuple[type[Term], list[int], tuple[Any, ...]]] | Made


class Taken(NamedTuple):
    """The graph of a function that returns further values and then gradients, with the factors of these returned too."""

    run: Callable[..., list[Any]]
    captured: list[torch.Tensor]
    parts: list[Parts]
    draws: bool  # whether it draws random numbers
    loops: bool  # whether there are loops in it that have not been unrolled


def taken_apart(
    body: Callable[..., Sequence[torch.Tensor]],
    inputs: Sequence[torch.Tensor],
    first: int,
    draws: Callable[[Any], Callable[..., Any]],
) -> Taken:
    """Trace ``body``, whose results from number ``first`` on are gradients; must be called where jit traces.

    Args:
        body: a function of plain tensors. The last one, which it does not read, is a key for random draws.
        inputs: tensors like one example's, and like the key.
        first: how many results come before the gradients.
        draws: for an operator that draws random numbers, what takes its place: a function of the key, the number of the draw,
            and the arguments of the operator.
    """

    def stepwise(*values: torch.Tensor) -> Sequence[torch.Tensor]:
        with step_by_step():
            return body(*values)

    staged = stage(stepwise, inputs)
    module = staged.body.graph
    graph = module.graph
    drawn = _draw_from_key(graph, graph.find_nodes(op="placeholder")[len(inputs) - 1], draws)
    with torch.no_grad(), _disable_current_modes(), staged.body.mode:
        results: list[Any] = list(graph.output_node().args[0])  # type: ignore[arg-type]
        parts = [_parts(find(graph, results[i]), i, results) for i in range(first, len(results))]
    graph.output_node().args = (results,)
    module.recompile()
    return Taken(module.forward, staged.captured, parts, drawn, bool(numbers_in(module)))


def _draw_from_key(graph: Graph, key: Node, draws: Callable[[Any], Callable[..., Any]]) -> bool:
    """Let all draws depend on a key, each in its own way; whether there are any."""
    drawing = [node for node in graph.nodes if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())]
    for number, node in enumerate(drawing):
        with graph.inserting_before(node):
            made = graph.call_function(draws(node.target), (key, number, *node.args), dict(node.kwargs))
        made.meta["val"] = node.meta["val"]
        node.replace_all_uses_with(made)
        graph.erase_node(node)
    return bool(drawing)


def _parts(found: list[Term] | Made, whole: int, results: list[Any]) -> Parts:
    """Let the graph return the tensors of the terms too."""
    if isinstance(found, Made):
        return Parts(whole, found)
    terms: list[tuple[type[Term], list[int], tuple[Any, ...]]] = []
    for term in found:
        nodes = [each for each in term if isinstance(each, Node)]
        terms.append((type(term), list(range(len(results), len(results) + len(nodes))), tuple(term[len(nodes) :])))
        results += nodes
    return Parts(whole, terms)
