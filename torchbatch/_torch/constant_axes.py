"""Products of matrices of which one is constant along an axis, such as the gradient of a mean: a sum does their work."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from torchbatch._torch.rewriting import insert, operands, shape, value

_aten = torch.ops.aten
_VIEWS = (_aten.view.default, _aten._unsafe_view.default, _aten.reshape.default)
_ELEMENTWISE = frozenset(
    (_aten.div.Scalar, _aten.mul.Scalar, _aten.neg.default, _aten.clone.default, _aten.tanh.default, _aten.exp.default,
     _aten.add.Tensor, _aten.sub.Tensor, _aten.mul.Tensor, _aten.div.Tensor)
)  # fmt: skip
Axes = frozenset[int]


def products_with_constants() -> Callable[[Graph, Node], Node | None]:
    """A rewriting of batched products; it must see the nodes of a graph in their order."""
    known: dict[Node, Axes] = {}

    def rewrite(graph: Graph, node: Node) -> Node | None:
        known[node] = _constant_axes(node, known)
        if node.target is not _aten.bmm.default:
            return None
        left, right = operands(node)
        cheaper = _cheaper(known.get(left, frozenset()), known.get(right, frozenset()))
        return None if cheaper is None else insert(graph, cheaper, left, right)

    return rewrite


def _cheaper(left: Axes, right: Axes) -> Callable[[Tensor, Tensor], Tensor] | None:
    """The product of two batches of matrices that are constant along these axes, if there is a cheaper way to it."""
    if 2 in left:
        return lambda a, b: a[:, :, :1] * b.sum(1, keepdim=True)
    if 1 in right:
        return lambda a, b: a.sum(2, keepdim=True) * b[:, :1]
    if 1 in left:
        return lambda a, b: torch.bmm(a[:, :1], b).expand(-1, a.shape[1], -1)
    if 2 in right:
        return lambda a, b: torch.bmm(a, b[:, :, :1]).expand(-1, -1, b.shape[2])
    return None


def _constant_axes(node: Node, known: dict[Node, Axes]) -> Axes:
    """The axes longer than 1 along which all entries are seen to be equal."""
    found = node.meta.get("val")
    if node.op != "call_function" or not isinstance(found, Tensor):
        return frozenset()
    if node.target in _ELEMENTWISE or node.target is _aten.expand.default:
        return frozenset.intersection(*(_widened(source, node, known) for source in operands(node)))
    source = operands(node)[0] if operands(node) else node
    inner, rank = known.get(source, frozenset()), found.dim()
    if not inner:
        return inner
    if node.target is _aten.permute.default:
        order: Any = node.args[1]
        return frozenset(i for i, axis in enumerate(order) if axis % rank in inner)
    if node.target is _aten.transpose.int:
        axes: Any = node.args[1:]
        first, second = (axis % rank for axis in axes)
        return frozenset({first: second, second: first}.get(axis, axis) for axis in inner)
    return inner if node.target in _VIEWS and shape(source) == shape(node) else frozenset()


def _widened(source: Node, node: Node, known: dict[Node, Axes]) -> Axes:
    """The axes of ``node`` along which ``source`` is constant, once it is broadcast to the shape of ``node``."""
    missing = value(node).dim() - value(source).dim()
    sizes, inner = (1,) * missing + shape(source), known.get(source, frozenset())
    return frozenset(
        axis for axis, size in enumerate(shape(node)) if size > 1 and (sizes[axis] == 1 or axis - missing in inner)
    )
