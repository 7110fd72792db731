"""What the rewritings of a graph have in common: a node's value, and new operations in the place of old ones.

Every node of such a graph carries its value on fake tensors (``node.meta["val"]``), and so does every node made here. Must be
used under the fake mode of these values.

Private names used, seen on torch 2.11, 2.13 and 2.15: ``torch.fx.experimental.proxy_tensor.make_fx``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.node import map_arg


def value(node: Node) -> torch.Tensor:
    """The fake tensor that a node stands for."""
    found: torch.Tensor = node.meta["val"]
    return found


def shape(node: Node) -> tuple[int, ...]:
    """The shape of what a node stands for."""
    return tuple(value(node).shape)


def operands(node: Node) -> list[Node]:
    """The arguments of an operation that are results of others."""
    return [arg for arg in node.args if isinstance(arg, Node)]


def add(graph: Graph, target: Any, *args: Any, **kwargs: Any) -> Node:
    """A new operation, with the value that it has on fakes."""
    made = graph.call_function(target, args, kwargs)
    made.meta["val"] = target(*map_arg(args, value), **kwargs)
    return made


def insert(graph: Graph, function: Callable[..., torch.Tensor], *nodes: Node) -> Node:
    """The operations of a function of tensors, applied to nodes; the node of its result."""
    traced = make_fx(function)(*map(value, nodes)).graph
    known = dict(zip(traced.find_nodes(op="placeholder"), nodes, strict=True))
    for node in traced.nodes:
        if node.op == "call_function":
            known[node] = graph.node_copy(node, known.__getitem__)
    result: Any = traced.output_node().args[0]
    return known[result]
