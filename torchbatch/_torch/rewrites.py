"""Other forms of what a trace recorded, which cost less: batching rules leave transpositions behind that say nothing.

Names used: those of ``torch.ops.aten``, as torch 2.11, 2.13 and 2.15 have them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, Node

from torchbatch._torch.graphs import has_effect

_aten = torch.ops.aten
_PRODUCTS = (_aten.mm.default, _aten.bmm.default)


def simplify(graph: Graph) -> None:
    """Rewrite a graph in place; its results are the same up to rounding."""
    for node in list(graph.nodes):
        if node.target in _PRODUCTS:
            _transpose_operands(graph, node)
    graph.eliminate_dead_code(has_effect)


def _transpose_operands(graph: Graph, product: Node) -> None:
    """``(A Bᵀ)ᵀ = B Aᵀ``: the transposition of a product is free where an operand is transposed already."""
    users = list(product.users)
    if len(users) != 1 or _transposed(users[0]) is not product:
        return
    left, right = (operand for operand in product.args if isinstance(operand, Node))
    if _transposed(left) is None and _transposed(right) is None:
        return
    with graph.inserting_before(users[0]):
        operands = [_transposed(operand) or _transposition(graph, operand) for operand in (right, left)]
        found = graph.call_function(product.target, tuple(operands))  # type: ignore[arg-type]
    found.meta = dict(users[0].meta)
    users[0].replace_all_uses_with(found)


def _transposed(node: Node) -> Node | None:
    """What a node transposes in its last two axes, if that is all it does."""
    if node.op != "call_function" or not isinstance(node.args[0], Node):
        return None
    source: Node = node.args[0]
    rank = source.meta["val"].dim()
    if node.target is _aten.t.default and rank == 2:
        return source
    if node.target is _aten.permute.default:
        axes: Any = node.args[1]
        order = [axis % rank for axis in axes]
        return source if order == [*range(rank - 2), rank - 1, rank - 2] else None
    if node.target is _aten.transpose.int and {axis % rank for axis in node.args[1:]} == {rank - 1, rank - 2}:
        return source
    return None


def _transposition(graph: Graph, node: Node) -> Node:
    made = graph.call_function(_aten.transpose.int, (node, -2, -1))
    made.meta["val"] = node.meta["val"].transpose(-2, -1)
    return made
