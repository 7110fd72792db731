"""Sums of products without the products: ``sum_b c_b d_bi h_bj`` is one matrix product, and never has an entry for each b, i, j.

This is what clipped sums of per-example gradients consist of, and their norms: a layer's gradient is an outer product.
"""

from __future__ import annotations

import math
import string
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import Graph, Node

from torchbatch._torch.rewriting import insert, operands, shape, value

_aten = torch.ops.aten
_MOST = 16  # factors that are looked for
_MANY = 2**14  # a product of fewer numbers is made and summed by one kernel in less time than a call takes
Axes = frozenset[int]


class _Factor(NamedTuple):
    node: Node
    axes: Axes  # of the product: those along which the factor is longer than 1


def contract(graph: Graph, node: Node) -> Node | None:
    """The sum of a product of tensors that each lack some of its axes, by a matrix product."""
    if node.target is not _aten.sum.dim_IntList or node.kwargs or not value(node).dtype.is_floating_point:
        return None
    product, summed = _below_views(node)
    if product is None or math.prod(shape(product)) < _MANY:
        return None
    factors = _factors(product)
    parted = _parted(factors, len(shape(product)), _long(shape(product)))
    if parted is None or not summed:
        return None
    kept = [axis for axis in range(len(shape(product))) if axis not in summed]
    left, right = parted
    count, sizes = len(left), [shape(product), shape(node)]

    def contracted(*tensors: Tensor) -> Tensor:
        return _einsum(tensors[:count], tensors[count:], kept, sizes[0]).reshape(sizes[1])

    return insert(graph, contracted, *(factor.node for factor in (*left, *right)))


def _long(sizes: Sequence[int]) -> Axes:
    return frozenset(axis for axis, size in enumerate(sizes) if size != 1)


def _below_views(node: Node) -> tuple[Node | None, list[int]]:
    """The product that is summed, and its axes that are, where a view between the two may have merged some."""
    source: Any = node.args[0]
    axes: Any = node.args[1]
    summed = [int(axis) % len(shape(source)) for axis in axes]
    inner = _copied(source)
    if inner.target not in (_aten.view.default, _aten._unsafe_view.default):
        return inner, summed
    below = _copied(operands(inner)[0])
    groups = _merged(shape(below), shape(inner))
    return (None, []) if groups is None else (below, [axis for merged in summed for axis in groups[merged]])


def _merged(sizes: Sequence[int], after: Sequence[int]) -> list[list[int]] | None:
    """For each axis of a view the axes that it was made of; None if one was taken apart."""
    groups: list[list[int]] = []
    first = 0
    for size in after:
        last = first
        while last < len(sizes) and math.prod(sizes[first:last]) < size:
            last += 1
        if math.prod(sizes[first:last]) != size:
            return None
        groups.append(list(range(first, last)))
        first = last
    return groups if math.prod(sizes[first:]) == 1 and 0 not in sizes else None


def _copied(node: Node) -> Node:
    while node.target is _aten.clone.default:
        node = operands(node)[0]
    return node


def _factors(product: Node) -> list[_Factor]:
    """What is multiplied to make ``product``; repeated entries are looked through."""
    left: list[Node] = [product]
    found: list[_Factor] = []
    while left:
        node = _copied(left.pop())
        if node.target is _aten.mul.Tensor and len(operands(node)) == 2 and len(left) + len(found) < _MOST:
            left += reversed(operands(node))
        else:
            found.append(_factor(node, len(shape(product))))
    return found


def _factor(node: Node, rank: int) -> _Factor:
    while node.target is _aten.expand.default:
        node = operands(node)[0]
    missing = rank - len(shape(node))
    return _Factor(node, frozenset(axis + missing for axis in _long(shape(node))))


def _parted(factors: list[_Factor], rank: int, whole: Axes) -> tuple[list[_Factor], list[_Factor]] | None:
    """Two groups of factors, neither of which has all axes."""
    if len(factors) < 2 or rank > len(string.ascii_letters) or len({value(factor.node).dtype for factor in factors}) > 1:
        return None
    largest = max((factor.axes for factor in factors), key=len)
    left = [factor for factor in factors if factor.axes <= largest]
    right = [factor for factor in factors if not factor.axes <= largest]
    others = frozenset[int]().union(*(factor.axes for factor in right))
    return (left, right) if largest != whole and right and others != whole else None


def _einsum(left: Sequence[Tensor], right: Sequence[Tensor], kept: Sequence[int], sizes: Sequence[int]) -> Tensor:
    """The product of both groups, summed over all axes but ``kept``."""
    groups = [_multiplied(group, len(sizes)) for group in (left, right)]
    names = [[axis for axis, size in enumerate(group.shape) if size != 1] for group in groups]
    lacking = [axis for axis in range(len(sizes)) if sizes[axis] != 1 and axis not in names[0] and axis not in names[1]]
    present = [axis for axis in kept if axis in names[0] or axis in names[1]]
    letters = ["".join(string.ascii_letters[axis] for axis in axes) for axes in (*names, present)]
    flat = [group.reshape([sizes[axis] for axis in axes]) for group, axes in zip(groups, names, strict=True)]
    found = torch.einsum(f"{letters[0]},{letters[1]}->{letters[2]}", *flat)
    times = math.prod(sizes[axis] for axis in lacking if axis not in kept)
    found = found * times if times != 1 else found
    full = [sizes[axis] if axis in present else 1 for axis in kept]
    return found.reshape(full).expand([sizes[axis] for axis in kept])


def _multiplied(group: Sequence[Tensor], rank: int) -> Tensor:
    """The product of tensors, with as many axes as the whole has."""
    product = group[0]
    for tensor in group[1:]:
        product = product * tensor
    return product.reshape([1] * (rank - product.dim()) + list(product.shape))
