"""Trees: flatten, unflatten, key paths, prefixes.

A thin layer over optree with a namespace of our own, in which every node type known to PyTorch's pytree registry is
mirrored. ``None`` is the empty tree and dictionary keys are sorted, as in JAX.
"""

from __future__ import annotations

import threading
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable
from typing import Any

import optree

from torchbatch._torch import registry
from torchbatch.errors import AxisError

NAMESPACE = "torchbatch"
_IN_ORDER = "torchbatch.in_order"  # here dictionaries with another order of keys are other trees
_keep_order = optree.dict_insertion_ordered(True, namespace=_IN_ORDER)
_keep_order.__enter__()  # for good
TreeDef = optree.PyTreeSpec

_BUILT_IN = frozenset({tuple, list, dict, OrderedDict, defaultdict, deque, type(None)})
_mirrored: dict[type, object] = {}
_seen: object = None
_lock = threading.Lock()


class KeyEntry(optree.PyTreeEntry):
    """A step of a path into a registered node, taken with one of PyTorch's key objects."""

    def __call__(self, obj: Any) -> Any:
        """The child of ``obj`` that this step leads to."""
        return self.entry.get(obj)

    def codify(self, node: str = "") -> str:
        """The step as Python source, after ``node``."""
        return f"{node}{self.entry}"


def sync_registry() -> None:
    """Mirror what was registered with PyTorch, changed or taken out since the last look."""
    global _seen
    with _lock:
        mark, known = registry.mark(), registry.registered_types()
        for cls, registration in list(_mirrored.items()):
            if known.get(cls) is not registration:
                for namespace in (NAMESPACE, _IN_ORDER):
                    optree.unregister_pytree_node(cls, namespace=namespace)
                del _mirrored[cls]
        for cls, registration in known.items():
            if cls not in _mirrored and not _is_built_in(cls):
                _mirror(registry.node(cls))
                _mirrored[cls] = registration
        _seen = mark


def _is_built_in(cls: type) -> bool:
    return cls in _BUILT_IN or optree.is_namedtuple_class(cls) or optree.is_structseq_class(cls)


def is_node_type(cls: type) -> bool:
    """Whether objects of class ``cls`` are looked into."""
    flatten(None)
    return cls in _mirrored or _is_built_in(cls)


def _mirror(node: registry.Node) -> None:
    for namespace in (NAMESPACE, _IN_ORDER):
        optree.register_pytree_node(node.cls, node.flatten, node.unflatten, path_entry_type=KeyEntry, namespace=namespace)


def flatten(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> tuple[list[Any], TreeDef]:
    """The leaves of ``tree`` from left to right, and its structure; ``is_leaf`` stops early."""
    if registry.mark() != _seen:
        sync_registry()
    return optree.tree_flatten(tree, is_leaf, namespace=NAMESPACE)


LEAF = flatten(0)[1]  # the structure of what is no container


def flatten_in_order(tree: Any) -> tuple[list[Any], TreeDef]:
    """As :func:`flatten`, but with the keys of dictionaries in their order, and in another order they are another structure."""
    if registry.mark() != _seen:
        sync_registry()
    return optree.tree_flatten(tree, namespace=_IN_ORDER)


def flatten_with_path(
    tree: Any, is_leaf: Callable[[Any], bool] | None = None
) -> tuple[list[optree.PyTreeAccessor], list[Any], TreeDef]:
    """The path of each leaf, the leaves, and the structure."""
    flatten(None)
    return optree.tree_flatten_with_accessor(tree, is_leaf, namespace=NAMESPACE)


def unflatten(structure: TreeDef, leaves: Iterable[Any]) -> Any:
    """The inverse of :func:`flatten`."""
    return structure.unflatten(leaves)


def paths(tree: Any, root: str = "") -> list[str]:
    """One Python expression per leaf, such as ``batch['y'][0].mean``, that begins with ``root``."""
    return [path.codify(root) for path in flatten_with_path(tree)[0]]


def paths_in_order(tree: Any, root: str = "") -> list[str]:
    """The same for the leaves of :func:`flatten_in_order`."""
    flatten(None)
    return [path.codify(root) for path in optree.tree_accessors(tree, namespace=_IN_ORDER)]


def replace_none(tree: Any, value: Any) -> Any:
    """The same tree with every None replaced by ``value``, which is a leaf."""
    flatten(tree)
    return optree.tree_map(lambda leaf: value if leaf is None else leaf, tree, none_is_leaf=True, namespace=NAMESPACE)


def broadcast_prefix(prefix: Any, tree: Any, *, what: str, root: str) -> list[Any]:
    """The leaves of ``prefix``, each repeated for all leaves of ``tree`` that it covers.

    Args:
        prefix: a tree whose Nones were replaced by :func:`replace_none`.
        tree: the full tree.
        what: how an error calls the prefix, e.g. ``"in_axes"``.
        root: how an error calls the tree, e.g. ``"batch"``.

    Raises:
        AxisError: ``prefix`` is not a prefix of ``tree``; the text names the first place where they part.
    """
    check_prefix(prefix, tree, what=what, root=root)
    return optree.broadcast_prefix(prefix, tree, namespace=NAMESPACE)


def flatten_up_to(prefix: Any, tree: Any, *, what: str, root: str) -> list[Any]:
    """The subtree of ``tree`` at each leaf of ``prefix``; arguments and errors as :func:`broadcast_prefix`."""
    check_prefix(prefix, tree, what=what, root=root)
    return flatten(prefix)[1].flatten_up_to(tree)


def check_prefix(
    prefix: Any,
    tree: Any,
    *,
    what: str,
    root: str,
    is_leaf: Callable[[Any], bool] | None = None,
    leaf: str = "one int or None",
) -> None:
    """Raise an AxisError where ``prefix`` is not a prefix of ``tree``.

    As in JAX, node types are equal or not: a dict is no prefix of an OrderedDict, whose keys have an order, and
    metadata must be equal too. (optree alone takes one kind of dictionary for another.)
    """
    flatten(None)
    found = _first_mismatch(prefix, tree, is_leaf)
    if found is not None:
        raise AxisError(_mismatch_text(*found, what=what, root=root, leaf=leaf))


def prefix_mismatch(prefix: Any, tree: Any, *, what: str, root: str) -> str:
    """One sentence on the first place at which ``prefix`` is not a prefix of ``tree``."""
    found = _first_mismatch(prefix, tree, None) or ("", prefix, tree)
    return _mismatch_text(*found, what=what, root=root)


def first_difference(a: Any, b: Any) -> tuple[str, str, str] | None:
    """Where ``a`` is first no prefix of ``b``, and what is there in each; None if it is one."""
    found = _first_mismatch(a, b, None)
    return None if found is None else (found[0], *_told_apart(*found[1:]))


def _told_apart(a: Any, b: Any) -> tuple[str, str]:
    first, second = _describe(a), _describe(b)
    return (first, second) if first != second else (first + _metadata(a), second + _metadata(b))


def _mismatch_text(
    where: str, of_prefix: Any, of_tree: Any, *, what: str, root: str, leaf: str = "one int or None"
) -> str:
    mine, theirs = _told_apart(of_prefix, of_tree)
    return (
        f"{what} must be a tree prefix of {root}: at {root}{where} it has {mine}, but the value there is {theirs}. "
        f"Give the same structure, or {leaf} for the whole subtree."
    )


def _first_mismatch(prefix: Any, tree: Any, is_leaf: Callable[[Any], bool] | None) -> tuple[str, Any, Any] | None:
    if type(prefix) is int or optree.tree_is_leaf(prefix, is_leaf, namespace=NAMESPACE):
        return None
    pairs = _children_side_by_side(prefix, tree)
    if pairs is None:
        return "", prefix, tree
    for i, (a, b) in enumerate(pairs):
        found = _first_mismatch(a, b, is_leaf)
        if found is not None:
            return _step(prefix, i) + found[0], *found[1:]
    return None


def _children_side_by_side(prefix: Any, tree: Any) -> list[tuple[Any, Any]] | None:
    """The children of two nodes in pairs, or None where the nodes differ."""
    kind = type(prefix)
    if kind is not type(tree):
        return None
    if kind is dict:
        return [(child, tree[key]) for key, child in prefix.items()] if prefix.keys() == tree.keys() else None
    mine, meta_mine = _one_level(prefix)
    theirs, meta_theirs = _one_level(tree)
    same = len(mine) == len(theirs) and meta_mine == meta_theirs
    return list(zip(mine, theirs, strict=True)) if same else None


def _one_level(node: Any) -> tuple[list[Any], Any]:
    """The children of a node, and its metadata."""
    if type(node) in (tuple, list):
        return list(node), None
    children, metadata, _, _ = optree.tree_flatten_one_level(node, namespace=NAMESPACE)
    return children, metadata


def _step(tree: Any, index: int) -> str:
    """What leads from ``tree`` to its child number ``index``, e.g. ``['y']``."""
    if type(tree) is dict:
        return f"[{list(tree)[index]!r}]"
    return flatten_with_path(tree, is_leaf=lambda x: x is not tree)[0][index].codify("")


def _describe(tree: Any) -> str:
    name = type(tree).__name__
    article = "an" if name[0] in "AEIOUaeiou" else "a"
    if isinstance(tree, dict):
        return f"{article} {name} with keys {list(tree)}"
    if tree is None:
        return "None (an empty tree)"
    if optree.tree_is_leaf(tree, namespace=NAMESPACE):
        return f"a leaf of type {name}"
    if type(tree) in (tuple, list):
        return f"a {name} of length {len(tree)}"
    count = len(_one_level(tree)[0])
    return f"{article} {name} with {count} child{'' if count == 1 else 'ren'}"


def _metadata(node: Any) -> str:
    return f" and metadata {_one_level(node)[1]!r:.120}"


def map_leaves(function: Callable[..., Any], tree: Any, *rest: Any) -> Any:
    """``function`` over the leaves of one or several trees; the others may have ``tree`` as their prefix."""
    flatten(tree)
    return optree.tree_map(function, tree, *rest, namespace=NAMESPACE)
