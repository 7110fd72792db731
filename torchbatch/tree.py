"""Trees: nested tuples, lists, dicts, NamedTuples, registered classes, and None, which is the empty tree.

Everything here works as in :mod:`jax.tree`. A class that is registered here is known to PyTorch too (``torch.func``,
``torch.compile``, ``torch.export``), and a class that was registered with PyTorch is known here.
"""

from __future__ import annotations

import builtins
import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import optree

from torchbatch._torch import registry
from torchbatch.core import tree as core
from torchbatch.errors import AxisError, AxisSpecError

__all__ = [
    "TreeDef",
    "all",
    "flatten",
    "flatten_with_path",
    "keystr",
    "leaves",
    "map",
    "reduce",
    "register_dataclass",
    "register_node",
    "structure",
    "transpose",
    "unflatten",
]

TreeDef = optree.PyTreeSpec
Path = optree.PyTreeAccessor
IsLeaf = Callable[[Any], bool]
_T = TypeVar("_T")
_UNSET: Any = object()


def flatten(tree: Any, is_leaf: IsLeaf | None = None) -> tuple[list[Any], TreeDef]:
    """Take a tree apart into its leaves and its structure.

    Args:
        tree: any object; what is not a known node type is a leaf.
        is_leaf: where it returns True, the tree is not looked into any further.

    Returns:
        The leaves from left to right (dictionaries in the order of their sorted keys), and the structure.

    Example:
        >>> from torchbatch import tree
        >>> leaves, treedef = tree.flatten({"b": 1, "a": (2, None)})
        >>> leaves
        [2, 1]
        >>> tree.unflatten(treedef, [20, 10]) == {"a": (20, None), "b": 10}
        True

    Source: ``jax.tree.flatten``.
    """
    return core.flatten(tree, _checked(is_leaf))


def unflatten(treedef: TreeDef, leaves: Iterable[Any]) -> Any:
    """Build a tree from its structure and its leaves.

    Args:
        treedef: what :func:`flatten` or :func:`structure` gave.
        leaves: as many leaves as the structure has, from left to right.

    Returns:
        The tree.

    Raises:
        AxisSpecError: ``treedef`` is not a structure.
        AxisError: the number of leaves is wrong.

    Example:
        >>> from torchbatch import tree
        >>> tree.unflatten(tree.structure((0, [0, 0])), "abc")
        ('a', ['b', 'c'])

    Source: ``jax.tree.unflatten``.
    """
    if not isinstance(treedef, TreeDef):
        raise AxisSpecError(
            "tree.unflatten takes the structure first and the leaves second, but the structure is "
            f"{treedef!r} of type {type(treedef).__name__}. Pass what tree.structure or tree.flatten returned."
        )
    leaves = list(leaves)
    if len(leaves) != treedef.num_leaves:
        raise AxisError(f"the structure {treedef} has {treedef.num_leaves} leaves, but {len(leaves)} were given.")
    return treedef.unflatten(leaves)


def leaves(tree: Any, is_leaf: IsLeaf | None = None) -> list[Any]:
    """The leaves of a tree from left to right; arguments as in :func:`flatten`.

    Example:
        >>> from torchbatch import tree
        >>> tree.leaves([1, (2, None), {"x": 3}])
        [1, 2, 3]

    Source: ``jax.tree.leaves``.
    """
    return flatten(tree, is_leaf)[0]


def structure(tree: Any, is_leaf: IsLeaf | None = None) -> TreeDef:
    """The structure of a tree, without its leaves; arguments as in :func:`flatten`.

    Example:
        >>> from torchbatch import tree
        >>> tree.structure([1, (2, 3)]) == tree.structure(["a", ("b", "c")])
        True

    Source: ``jax.tree.structure``.
    """
    return flatten(tree, is_leaf)[1]


def flatten_with_path(tree: Any, is_leaf: IsLeaf | None = None) -> tuple[list[tuple[Path, Any]], TreeDef]:
    """Like :func:`flatten`, with the path to each leaf.

    Returns:
        A list of ``(path, leaf)``, and the structure. :func:`keystr` makes text of a path; ``path(tree)`` is the leaf.

    Example:
        >>> from torchbatch import tree
        >>> [(tree.keystr(path), leaf) for path, leaf in tree.flatten_with_path({"w": [1, 2], "b": 3})[0]]
        [("['b']", 3), ("['w'][0]", 1), ("['w'][1]", 2)]

    Source: ``jax.tree.flatten_with_path``.
    """
    paths, found, treedef = core.flatten_with_path(tree, _checked(is_leaf))
    return list(zip(paths, found, strict=True)), treedef


def keystr(path: Path) -> str:
    """A path of :func:`flatten_with_path` as text, such as ``['y'][0].mean``.

    Example:
        >>> from torchbatch import tree
        >>> path, leaf = tree.flatten_with_path([{"x": 1}])[0][0]
        >>> tree.keystr(path)
        "[0]['x']"

    Source: ``jax.tree_util.keystr``.
    """
    return path.codify("")


def map(f: Callable[..., Any], tree: Any, *rest: Any, is_leaf: IsLeaf | None = None) -> Any:
    """Call a function on each leaf of a tree, or on the leaves of several trees together.

    Args:
        f: a function of one argument per tree.
        tree: the tree whose structure the result has.
        rest: more trees. ``tree`` must be a prefix of each; the subtree under a leaf of ``tree`` is passed whole.
        is_leaf: where it returns True, ``tree`` is not looked into any further.

    Returns:
        A tree of what ``f`` returned.

    Raises:
        AxisSpecError: ``f`` or ``is_leaf`` is not callable.
        AxisError: the trees do not fit; the text says where.

    Example:
        >>> from torchbatch import tree
        >>> tree.map(lambda x, y: x + y, {"a": 1, "b": (2, 3)}, {"a": 10, "b": (20, 30)})
        {'a': 11, 'b': (22, 33)}

    Source: ``jax.tree.map``.
    """
    if not callable(f):
        raise AxisSpecError(f"tree.map takes a function first, but it got {f!r} of type {type(f).__name__}.")
    found, treedef = flatten(tree, is_leaf)
    columns = [_aligned(tree, treedef, other, number, is_leaf) for number, other in enumerate(rest, 2)]
    return treedef.unflatten(f(*values) for values in zip(found, *columns, strict=True))


def _aligned(tree: Any, treedef: TreeDef, other: Any, number: int, is_leaf: IsLeaf | None) -> list[Any]:
    """What ``other`` has at each leaf of ``tree``."""
    found, its_treedef = core.flatten(other, is_leaf)
    if its_treedef == treedef:
        return found
    what, root = "the first tree of tree.map", f"tree {number}"
    core.check_prefix(tree, other, what=what, root=root, is_leaf=is_leaf, leaf="one leaf")
    return treedef.flatten_up_to(other)


def all(tree: Any, *, is_leaf: IsLeaf | None = None) -> bool:
    """Whether every leaf of a tree is true.

    Example:
        >>> from torchbatch import tree
        >>> tree.all({"a": True, "b": [1, 0]})
        False

    Source: ``jax.tree.all``.
    """
    return builtins.all(leaves(tree, is_leaf))


def reduce(
    function: Callable[[Any, Any], Any], tree: Any, initializer: Any = _UNSET, is_leaf: IsLeaf | None = None
) -> Any:
    """Fold the leaves of a tree from left to right with a function of two arguments.

    Args:
        function: called with what there is so far and the next leaf.
        tree: any tree.
        initializer: what there is before the first leaf; without it, the first leaf.
        is_leaf: as in :func:`flatten`.

    Returns:
        The last result.

    Raises:
        AxisSpecError: the tree has no leaves and there is no ``initializer``.

    Example:
        >>> from torchbatch import tree
        >>> tree.reduce(lambda total, leaf: total + leaf, {"a": 1, "b": [2, 3]})
        6

    Source: ``jax.tree.reduce``.
    """
    found = leaves(tree, is_leaf)
    if initializer is not _UNSET:
        return functools.reduce(function, found, initializer)
    if not found:
        raise AxisSpecError("tree.reduce got a tree without leaves and no initializer; give one.")
    return functools.reduce(function, found)


def transpose(outer_treedef: TreeDef, inner_treedef: TreeDef | None, tree: Any) -> Any:
    """Turn a tree of trees inside out: a list of dicts becomes a dict of lists.

    Args:
        outer_treedef: the structure of ``tree`` down to the inner trees.
        inner_treedef: the structure that all inner trees have; None takes that of the first.
        tree: the tree of trees.

    Returns:
        A tree of structure ``inner_treedef`` whose leaves are trees of structure ``outer_treedef``.

    Raises:
        AxisError: ``tree`` does not have the structure that the two make.

    Example:
        >>> from torchbatch import tree
        >>> tree.transpose(tree.structure([0, 0]), None, [{"a": 1, "b": 2}, {"a": 3, "b": 4}])
        {'a': [1, 3], 'b': [2, 4]}

    Source: ``jax.tree.transpose``.
    """
    found, treedef = flatten(tree)
    inner = inner_treedef
    if inner is None:
        outer = outer_treedef.unflatten([0] * outer_treedef.num_leaves)
        subtrees = core.flatten_up_to(outer, tree, what="outer_treedef", root="tree")
        inner = structure(subtrees[0] if subtrees else None)
    if treedef != outer_treedef.compose(inner):
        raise AxisError(
            f"tree.transpose needs a tree of structure {outer_treedef.compose(inner)}, which is outer_treedef with "
            f"inner_treedef at each leaf, but the tree has the structure {treedef}."
        )
    rows = [found[i :: inner.num_leaves] for i in range(inner.num_leaves)]
    return inner.unflatten(outer_treedef.unflatten(row) for row in rows)


def register_node(
    nodetype: type[_T],
    flatten_func: Callable[[_T], tuple[Iterable[Any], Any]],
    unflatten_func: Callable[[Any, tuple[Any, ...]], _T],
) -> None:
    """Make a class a node of trees, here and in PyTorch.

    Args:
        nodetype: the class; subclasses are not covered.
        flatten_func: ``x -> (children, metadata)``; the metadata are compared with ``==`` and part of the structure.
        unflatten_func: ``(metadata, children) -> x``.

    Raises:
        AxisSpecError: an argument is of the wrong kind.
        AxisError: the class is a node already.

    Example:
        >>> import torch
        >>> from torchbatch import tree, vmap
        >>> class Interval:
        ...     def __init__(self, low, high):
        ...         self.low, self.high = low, high
        >>> tree.register_node(Interval, lambda i: ((i.low, i.high), None), lambda _, ends: Interval(*ends))
        >>> vmap(lambda i: i.high - i.low)(Interval(torch.tensor([0, 1]), torch.tensor([5, 7])))
        tensor([5, 6])

    Source: ``jax.tree_util.register_pytree_node``, with the same order of arguments.
    """
    _check_registrable(nodetype)
    for name, function in (("flatten_func", flatten_func), ("unflatten_func", unflatten_func)):
        if not callable(function):
            raise AxisSpecError(f"{name} must be a function, but it is {function!r} of type {type(function).__name__}.")

    def flatten_checked(x: Any) -> tuple[Iterable[Any], Any]:
        result = flatten_func(x)
        if not isinstance(result, tuple) or len(result) != 2:
            raise AxisSpecError(
                f"flatten_func of {nodetype.__name__} must return a pair (children, metadata), but it returned "
                f"{result!r}."
            )
        return result

    registry.register(registry.indexed_node(nodetype, flatten_checked, unflatten_func))


def register_dataclass(
    nodetype: type[_T],
    data_fields: Sequence[str] | None = None,
    meta_fields: Sequence[str] | None = None,
    drop_fields: Sequence[str] = (),
) -> type[_T]:
    """Make a dataclass a node of trees, here and in PyTorch; usable as a decorator.

    Args:
        nodetype: the dataclass.
        data_fields: names of the fields that are children. By default all that are not listed elsewhere.
        meta_fields: names of the fields that are part of the structure: they are compared with ``==``, never mapped or
            differentiated. By default those made by ``field(metadata={"static": True})``, and, where ``data_fields`` is
            given, all that it leaves out.
        drop_fields: names of the fields that are left out, and get their default in a rebuilt object.

    Returns:
        The same class.

    Raises:
        AxisSpecError: not a dataclass, or a list of fields is of the wrong kind.
        AxisError: the class is a node already, or the fields are unknown, repeated or incomplete.

    Example:
        >>> import dataclasses, functools, torch
        >>> from torchbatch import tree, vmap
        >>> @functools.partial(tree.register_dataclass, meta_fields=["scale"])
        ... @dataclasses.dataclass
        ... class Point:
        ...     x: torch.Tensor
        ...     y: torch.Tensor
        ...     scale: float = 1.0
        >>> vmap(lambda p: p.scale * (p.x + p.y))(Point(torch.ones(3), torch.arange(3), scale=2.0))
        tensor([2., 4., 6.])

    Source: ``jax.tree_util.register_dataclass``.
    """
    _check_registrable(nodetype)
    if not dataclasses.is_dataclass(nodetype):
        raise AxisSpecError(
            f"register_dataclass takes a dataclass, but {nodetype.__name__} is not one. Put @dataclasses.dataclass "
            "below it, or use tree.register_node."
        )
    fields = {field.name: field for field in dataclasses.fields(nodetype) if field.init}
    data, meta, drop = (_names(*item) for item in (("data", data_fields), ("meta", meta_fields), ("drop", drop_fields)))
    drop = drop or ()
    rest = [name for name in fields if name not in (*(data or ()), *(meta or ()), *drop)]
    if meta is None:
        meta = tuple(n for n in rest if data is not None or fields[n].metadata.get("static", False))
    if data is None:
        data = tuple(name for name in rest if name not in meta)
    _check_fields(nodetype, fields, data, meta, drop)
    registry.register(registry.attribute_node(nodetype, data, meta))
    return nodetype


def _names(kind: str, names: Sequence[str] | None) -> tuple[str, ...] | None:
    if names is None:
        return None
    if isinstance(names, str) or not builtins.all(isinstance(name, str) for name in names):
        raise AxisSpecError(f"{kind}_fields must be a list of field names, but it is {names!r}.")
    return tuple(names)


def _check_fields(
    nodetype: type, fields: dict[str, Any], data: tuple[str, ...], meta: tuple[str, ...], drop: tuple[str, ...]
) -> None:
    named = [*data, *meta, *drop]
    problems = {
        "name": [name for name in named if name not in fields],
        "repeat": sorted({name for name in named if named.count(name) > 1}),
        "leave out": [name for name in fields if name not in named],
        "drop, without a default,": [name for name in drop if name in fields and not _has_default(fields[name])],
    }
    for verb, names in problems.items():
        if names:
            raise AxisError(
                f"data_fields, meta_fields and drop_fields must name each init field of {nodetype.__name__} once, but "
                f"they {verb} {', '.join(names)}; its init fields are {', '.join(fields)}."
            )


def _has_default(field: dataclasses.Field[Any]) -> bool:
    return field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING


def _check_registrable(nodetype: Any) -> None:
    if not isinstance(nodetype, type):
        raise AxisSpecError(f"a class is registered, but {nodetype!r} is of type {type(nodetype).__name__}.")
    if core.is_node_type(nodetype):
        raise AxisError(
            f"{nodetype.__name__} is a node of trees already: it is built in, a NamedTuple, or registered here or with "
            "PyTorch. Register a class once."
        )


def _checked(is_leaf: IsLeaf | None) -> IsLeaf | None:
    if is_leaf is not None and not callable(is_leaf):
        raise AxisSpecError(f"is_leaf must be a function, but it is {is_leaf!r} of type {type(is_leaf).__name__}.")
    return is_leaf
