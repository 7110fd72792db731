"""Other forms of what a trace recorded, which cost less.

Batching rules leave transpositions behind that say nothing, forward-mode derivatives are full of tangents that are zero, and
Jacobians begin with a product with the identity. All of them are known when the graph is made. The results are the same up to
rounding. A zero tangent stays zero next to inf and NaN, as it does in PyTorch's own forward mode.

Operators used: those of ``torch.ops.aten``, as torch 2.11, 2.13 and 2.15 have them.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from torchbatch._torch.constant_axes import products_with_constants
from torchbatch._torch.contractions import contract
from torchbatch._torch.convolutions import convolve_by_columns, pool_before_relu
from torchbatch._torch.graphs import Trace, has_effect
from torchbatch._torch.rewriting import add, operands, shape, value

_aten = torch.ops.aten
_MATMULS = (_aten.mm.default, _aten.bmm.default)
_SAME_SHAPE_VIEWS = frozenset((_aten.view.default, _aten._unsafe_view.default, _aten.reshape.default, _aten.expand.default))
_TRANSPOSITIONS = frozenset((_aten.permute.default, _aten.t.default, _aten.transpose.int))
_VIEWS = _SAME_SHAPE_VIEWS | _TRANSPOSITIONS | {_aten.unsqueeze.default, _aten.squeeze.dims, _aten.squeeze.dim}
_PURE_VIEWS = (_VIEWS | {_aten.squeeze.default}) - {_aten.reshape.default, _aten.expand.default}  # neither copies nor repeats
# What is zero if its first argument is, and what is zero if any of its arguments is.
_LINEAR = _VIEWS | {_aten.neg.default, _aten.mul.Scalar, _aten.div.Tensor, _aten.sum.dim_IntList, _aten.sum.default}
_LINEAR |= {_aten.tanh_backward.default, _aten.sigmoid_backward.default, _aten.threshold_backward.default}
_PRODUCTS = frozenset((_aten.mul.Tensor, _aten.mm.default, _aten.bmm.default, _aten.mv.default))


def simplified(trace: Trace) -> Trace:
    """A trace with a graph that costs less and gives the same."""
    module = GraphModule(trace.graph, copy.deepcopy(trace.graph.graph))
    with torch.no_grad(), trace.mode:
        simplify(module.graph, fixed_sizes=trace.sizes is None)
    module.recompile()
    return trace._replace(graph=module)


def simplify(graph: Graph, fixed_sizes: bool) -> None:
    """Rewrite a graph in place.

    Must be called under the fake mode of the values that its nodes carry. Where sizes are left open, what depends on two
    sizes being equal is not done.
    """
    own = _own_memory(_results(graph))
    zeros: set[Node] = set()
    by_size = (
        _drop_copy, _drop_zero(zeros), _drop_views, _drop_identity, products_with_constants(), contract, _fold_shared,
        convolve_by_columns,
    )  # fmt: skip
    for rewrite in (*(by_size if fixed_sizes else ()), _transpose_operands):
        for node in list(graph.nodes):
            if node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload):
                with graph.inserting_before(node):
                    found = rewrite(graph, node)
                if found is not None:
                    node.replace_all_uses_with(found)
    pool_before_relu(graph)
    _copy_shared(graph, own)
    graph.eliminate_dead_code(has_effect)


def _results(graph: Graph) -> list[Node]:
    results: Any = graph.output_node().args[0]
    return list(results)


def _memory(node: Node) -> Node:
    """The node whose memory a node shows: itself, if it is no view."""
    while node.op == "call_function" and _may_alias(node.target):
        node = operands(node)[0]
    return node


def _may_alias(target: Any) -> bool:
    """Whether an operation returns memory of its first argument."""
    if target in _VIEWS or not isinstance(target, torch._ops.OpOverload):
        return target in _VIEWS or target is operator.getitem
    return any(result.alias_info is not None for result in target._schema.returns)


def _own_memory(results: Sequence[Node]) -> list[bool]:
    """For each result, whether all its numbers have a place of their own, apart from the inputs and the results before it."""
    owners = [_memory(node) for node in results]
    return [
        owner.op != "placeholder" and owner not in owners[:i] and not _repeats(node)
        for i, (node, owner) in enumerate(zip(results, owners, strict=True))
    ]


def _repeats(node: Node) -> bool:
    """Whether several numbers of a tensor are in one place."""
    found = value(node)
    return any(stride == 0 and size != 1 for stride, size in zip(found.stride(), found.shape, strict=True))


def _copy_shared(graph: Graph, own: Sequence[bool]) -> None:
    """Copy those results that had a memory of their own before the rewriting, and share one now."""
    output, results = graph.output_node(), _results(graph)
    shared = [had and not has for had, has in zip(own, _own_memory(results), strict=True)]
    with graph.inserting_before(output):
        copied = [
            add(graph, _aten.clone.default, node, memory_format=torch.contiguous_format) if share else node
            for node, share in zip(results, shared, strict=True)
        ]
    output.args = (copied,)


def _drop_copy(graph: Graph, node: Node) -> Node | None:
    """A copy, or a view, that changes neither shape nor dtype."""
    if node.target is _aten.copy.default:
        source = operands(node)[-1]
    elif node.target in _SAME_SHAPE_VIEWS:
        source = operands(node)[0]
    else:
        return None
    same = len(operands(node)) == (2 if node.target is _aten.copy.default else 1) and shape(source) == shape(node)
    return source if same and value(source).dtype is value(node).dtype else None


def _drop_views(graph: Graph, node: Node) -> Node | None:
    """Views that lead from one contiguous tensor to another one: one view says it."""
    if node.target not in _PURE_VIEWS or not value(node).is_contiguous():
        return None
    first, source = None, node
    while source.target in _PURE_VIEWS:
        source = operands(source)[0]
        first = source if value(source).is_contiguous() else first
    if first is None or first is operands(node)[0]:
        return None
    return first if shape(first) == shape(node) else add(graph, _aten.view.default, first, list(shape(node)))


def _drop_zero(zeros: set[Node]) -> Callable[[Graph, Node], Node | None]:
    """Leave out tangents that are zero; ``zeros`` collects the nodes that are."""

    def rewrite(graph: Graph, node: Node) -> Node | None:
        given = operands(node)
        linear = node.target in _LINEAR and given[0] in zeros
        product = node.target in _PRODUCTS and any(operand in zeros for operand in given)
        if _is_zero_tangent(node) or linear or product:
            zeros.add(node)
        elif node.target is _aten.add.Tensor and len(given) == 2 and not node.kwargs:
            rest = [operand for operand in given if operand not in zeros]
            if not rest:
                zeros.add(node)
            elif len(rest) == 1 and value(rest[0]).dtype is value(node).dtype:
                return _as_wide(graph, rest[0], node)
        return None

    return rewrite


def _is_zero_tangent(node: Node) -> bool:
    """``zeros([]).expand(…)``, as forward mode records it; a user's own zeros carry one more option."""
    if node.target is not _aten.expand.default:
        return False
    source = operands(node)[0]
    return source.target is _aten.zeros.default and not source.args[0] and "pin_memory" not in source.kwargs


def _as_wide(graph: Graph, source: Node, like: Node) -> Node:
    return source if shape(source) == shape(like) else add(graph, _aten.expand.default, source, list(shape(like)))


def _drop_identity(graph: Graph, node: Node) -> Node | None:
    """A product with the unit vectors that a Jacobian is computed from."""
    if node.target is not _aten.mm.default:
        return None
    left, right = operands(node)
    return left if _is_identity(right) else right if _is_identity(left) else None


def _is_identity(node: Node) -> bool:
    if node.target in (*_SAME_SHAPE_VIEWS, _aten.permute.default, _aten.t.default) and len(shape(node)) == 2:
        source = operands(node)[0]
        return shape(source) == shape(node) and _is_identity(source)
    if node.target is not _aten.diagonal_scatter.default or len(node.args) != 2:
        return False
    rows, ones = operands(node)
    square = len(shape(node)) == 2 and shape(node)[0] == shape(node)[1]
    empty = rows.target in (_aten.new_zeros.default, _aten.zeros.default)
    return bool(square and empty and ones.target is _aten.fill.Scalar and ones.args[1] == 1)


def _fold_shared(graph: Graph, node: Node) -> Node | None:
    """One product in the place of a batch of products in which one operand is the same for all."""
    if node.target is not _aten.bmm.default:
        return None
    left, right = operands(node)
    batch, rows, columns = shape(node)
    matrix = _shared(right)
    if matrix is not None:
        flat = add(graph, _aten.reshape.default, left, [batch * rows, shape(left)[2]])
        return add(graph, _aten.view.default, add(graph, _aten.mm.default, flat, matrix), [batch, rows, columns])
    matrix = _shared(left)
    if matrix is None or columns != 1:
        return None
    vectors = add(graph, _aten.squeeze.dims, right, [2])
    product = add(graph, _aten.mm.default, vectors, add(graph, _aten.permute.default, matrix, [1, 0]))
    return add(graph, _aten.unsqueeze.default, product, 2)


def _shared(node: Node) -> Node | None:
    """The matrix that every entry of a batch of matrices is, if that can be seen."""
    while node.target in _SAME_SHAPE_VIEWS:
        source = operands(node)[0]
        if node.target is _aten.expand.default and len(shape(source)) == 2:
            return source if shape(source) == shape(node)[1:] else None
        if shape(source) != shape(node):
            return None
        node = source
    return None


def _transpose_operands(graph: Graph, node: Node) -> Node | None:
    """``(A Bᵀ)ᵀ = B Aᵀ``: the transposition of a product is free where an operand is transposed already."""
    product = _transposed(node)
    if product is None or product.target not in _MATMULS or len(product.users) != 1:
        return None
    left, right = operands(product)
    if _transposed(left) is None and _transposed(right) is None:
        return None
    swapped = [_transposed(operand) or add(graph, _aten.transpose.int, operand, -2, -1) for operand in (right, left)]
    return add(graph, product.target, *swapped)


def _transposed(node: Node) -> Node | None:
    """What a node transposes in its last two axes, if that is all it does."""
    if node.target not in _VIEWS:
        return None
    source = operands(node)[0]
    rank = len(shape(source))
    axes: Sequence[Any] = node.args[1:]
    if node.target is _aten.t.default:
        return source if rank == 2 else None
    if node.target is _aten.permute.default:
        order = [axis % rank for axis in axes[0]]
        return source if order == [*range(rank - 2), rank - 1, rank - 2] else None
    if node.target is _aten.transpose.int:
        return source if {axis % rank for axis in axes} == {rank - 1, rank - 2} else None
    return None
