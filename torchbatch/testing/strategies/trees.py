"""Strategies for trees: containers of every kind around given leaves."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from hypothesis import strategies as st

from torchbatch import tree
from torchbatch.errors import AxisSpecError
from torchbatch.testing.optional import require
from torchbatch.testing.strategies.arrays import tensors

__all__ = ["NODES", "Pair", "Record", "pytrees", "register_with_jax"]

_KEYS = ("b", "a", "c")  # not in the order in which trees are read


class Pair(NamedTuple):
    """A node of two children, as :func:`pytrees` makes them."""

    first: Any
    second: Any


@dataclasses.dataclass
class Record:
    """A registered dataclass with two children and one field that is part of the structure."""

    left: Any
    right: Any
    tag: str = "tag"


tree.register_dataclass(Record, meta_fields=("tag",))


def register_with_jax() -> None:
    """Make :class:`Record` a node of JAX's trees, too; calling it again does nothing.

    Raises:
        ImportError: JAX is not installed.

    Example:
        >>> from torchbatch.testing import strategies
        >>> strategies.register_with_jax()  # doctest: +SKIP
    """
    jax = require("jax", "register_with_jax", "jax")
    if jax.tree_util.all_leaves([Record(0, 0)]):
        jax.tree_util.register_dataclass(Record, ("left", "right"), ("tag",))


def _nodes(build: Callable[[list[Any]], Any], least: int = 0, most: int = 3) -> Callable[[st.SearchStrategy[Any]], Any]:
    """Nodes of a few children. A number is drawn for each, even where it is known: so all kinds are equally simple."""

    def over(children: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
        counts = st.integers(least, 3).map(lambda count: min(count, most))
        return counts.flatmap(lambda count: st.tuples(*[children] * count)).map(lambda found: build(list(found)))

    return over


# More numbers are drawn than for a tensor, so that None counts as less simple.
_NONE: st.SearchStrategy[Any] = st.lists(st.just(0), min_size=12, max_size=13).map(lambda _: None)

_MAKERS: dict[str, Callable[[st.SearchStrategy[Any]], st.SearchStrategy[Any]]] = {
    "tuple": _nodes(tuple),
    "list": _nodes(list),
    "dict": _nodes(lambda children: dict(zip(_KEYS, children, strict=False))),
    "OrderedDict": _nodes(lambda children: OrderedDict(zip(_KEYS, children, strict=False))),
    "namedtuple": _nodes(lambda children: Pair(*children), 2, 2),
    "dataclass": _nodes(lambda children: Record(*children), 2, 2),
    "None": lambda children: _NONE,
}

#: The kinds of nodes that :func:`pytrees` makes, the plainest first.
NODES = tuple(_MAKERS)


def pytrees(
    leaves: st.SearchStrategy[Any] | None = None, *, max_leaves: int = 5, nodes: Sequence[str] = NODES
) -> st.SearchStrategy[Any]:
    """Trees around leaves, which shrink to a single leaf.

    Args:
        leaves: a strategy for the leaves (default: :func:`tensors`).
        max_leaves: at most about as many leaves.
        nodes: the kinds of nodes: some of ``"tuple"``, ``"list"``, ``"dict"``, ``"OrderedDict"``, ``"namedtuple"``
            (:class:`Pair`), ``"dataclass"`` (:class:`Record`) and ``"None"``, the empty tree.

    Raises:
        AxisSpecError: an unknown kind of node.

    Example:
        >>> from hypothesis import find, strategies as st
        >>> from torchbatch import tree
        >>> from torchbatch.testing.strategies import pytrees
        >>> find(pytrees(st.just(1.0)), lambda found: len(tree.leaves(found)) == 2)
        (1.0, 1.0)
    """
    for node in nodes:
        if node not in _MAKERS:
            raise AxisSpecError(f"pytrees: there is no node {node!r}; the nodes are {', '.join(map(repr, NODES))}.")
    base = tensors() if leaves is None else leaves
    makers = [_MAKERS[node] for node in nodes if node != "None"]
    base = st.one_of(base, _NONE) if "None" in nodes else base
    if not makers:
        return base
    return st.recursive(base, lambda children: st.one_of(*(make(children) for make in makers)), max_leaves=max_leaves)
