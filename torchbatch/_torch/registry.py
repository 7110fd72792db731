"""PyTorch's own pytree registry, read so that its node types can be mirrored elsewhere.

Private names used, seen on torch 2.11, 2.13 and 2.15: in ``torch.utils._pytree``, ``SUPPORTED_NODES``, ``GetAttrKey``,
``SequenceKey``, ``register_pytree_node`` and the local function names of ``register_dataclass``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from torch.utils import _pytree as torch_pytree


class Node(NamedTuple):
    """How one registered type is taken apart: ``flatten(x) -> (children, metadata, keys)``, and put together.

    A key says where its child sits: ``str(key)`` is ``.name`` or ``['name']``, ``key.get(x)`` is the child.
    """

    cls: type
    flatten: Callable[[Any], tuple[Iterable[Any], Any, Iterable[Any]]]
    unflatten: Callable[[Any, Iterable[Any]], Any]


def mark() -> object:
    """A value that changes when PyTorch's registry does; cheap enough to ask on every call."""
    nodes = torch_pytree.SUPPORTED_NODES
    return len(nodes), next(reversed(nodes.values()))


def registered_types() -> dict[type, object]:
    """Every type that PyTorch's registry holds now, with an object that is its registration."""
    return {cls: entry for cls, entry in torch_pytree.SUPPORTED_NODES.items() if isinstance(cls, type)}


def node(cls: type) -> Node:
    """The registration of ``cls`` in PyTorch's registry, with names for its children where it gives them."""
    entry = torch_pytree.SUPPORTED_NODES[cls]
    names = _dataclass_fields(entry)
    if names is not None:
        return attribute_node(cls, names, ())
    flatten = _without_keys(entry) if entry.flatten_with_keys_fn is None else _with_keys(entry)
    return Node(cls, flatten, lambda context, children: entry.unflatten_fn(list(children), context))


def _with_keys(entry: Any) -> Callable[[Any], tuple[list[Any], Any, list[Any]]]:
    def flatten(x: Any) -> tuple[list[Any], Any, list[Any]]:
        pairs, context = entry.flatten_with_keys_fn(x)
        return [child for _, child in pairs], context, [key for key, _ in pairs]

    return flatten


def _without_keys(entry: Any) -> Callable[[Any], tuple[list[Any], Any, list[Any]]]:
    def flatten(x: Any) -> tuple[list[Any], Any, list[Any]]:
        children, context = entry.flatten_fn(x)
        children = list(children)
        return children, context, [torch_pytree.SequenceKey(i) for i in range(len(children))]

    return flatten


def indexed_node(
    cls: type, flatten: Callable[[Any], tuple[Iterable[Any], Any]], unflatten: Callable[[Any, Any], Any]
) -> Node:
    """A node whose children have no names but their places."""

    def flatten_with_keys(x: Any) -> tuple[list[Any], Any, list[Any]]:
        children, metadata = flatten(x)
        children = list(children)
        return children, metadata, [torch_pytree.SequenceKey(i) for i in range(len(children))]

    return Node(cls, flatten_with_keys, lambda metadata, children: unflatten(metadata, tuple(children)))


def attribute_node(cls: type, data_fields: Iterable[str], meta_fields: Iterable[str]) -> Node:
    """A node whose children are the attributes ``data_fields`` and whose metadata are ``meta_fields``."""
    data, meta = tuple(data_fields), tuple(meta_fields)
    keys = [torch_pytree.GetAttrKey(name) for name in data]

    def flatten(x: Any) -> tuple[list[Any], tuple[Any, ...], list[Any]]:
        return [getattr(x, name) for name in data], tuple(getattr(x, name) for name in meta), keys

    def unflatten(context: tuple[Any, ...], children: Iterable[Any]) -> Any:
        return cls(**dict(zip(data, children, strict=True)), **dict(zip(meta, context, strict=True)))

    return Node(cls, flatten, unflatten)


def register(new: Node) -> None:
    """Make PyTorch's registry (``torch.func``, ``torch.compile``, ``torch.export``) know a node type too."""

    def flatten(x: Any) -> tuple[list[Any], Any]:
        children, context, _ = new.flatten(x)
        return list(children), context

    def flatten_with_keys(x: Any) -> tuple[list[tuple[Any, Any]], Any]:
        children, context, keys = new.flatten(x)
        return list(zip(keys, children, strict=True)), context

    torch_pytree.register_pytree_node(
        new.cls,
        flatten,
        lambda children, context: new.unflatten(context, children),
        serialized_type_name=f"{new.cls.__module__}.{new.cls.__qualname__}",
        flatten_with_keys_fn=flatten_with_keys,
    )


def _dataclass_fields(entry: Any) -> tuple[str, ...] | None:
    """The field names of a type that PyTorch's ``register_dataclass`` registered, else None.

    PyTorch drops fields that are None from the children; a prefix such as ``Point(x=0, y=None)`` needs them in place.
    """
    function = entry.flatten_fn
    if not dataclasses.is_dataclass(entry.type) or "register_dataclass.<locals>" not in function.__qualname__:
        return None
    cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=False))
    return tuple(cells["field_names"].cell_contents) if "field_names" in cells else None
