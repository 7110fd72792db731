"""The public face of trees, against ``jax.tree``."""

from __future__ import annotations

import dataclasses
import functools
from collections import OrderedDict, defaultdict, namedtuple
from typing import Any

import optree
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchbatch import tree
from torchbatch.errors import AxisError, AxisSpecError

jax = pytest.importorskip("jax")

Point = namedtuple("Point", "x y")
keys = st.sampled_from(["a", "b", "c"])


def containers(inner: Any) -> Any:
    dictionaries = st.dictionaries(keys, inner, max_size=3)
    return st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.tuples(inner, inner).map(lambda pair: Point(*pair)),
        dictionaries,
        dictionaries.map(OrderedDict),
        dictionaries.map(lambda items: defaultdict(int, items)),
    )


any_tree = st.recursive(st.one_of(st.integers(0, 9), st.none(), st.sampled_from("xyz")), containers, max_leaves=10)
checked = settings(derandomize=True, deadline=None, max_examples=100)


@checked
@given(any_tree)
def test_flatten_is_that_of_jax(value: Any) -> None:
    leaves, treedef = tree.flatten(value)
    assert leaves == jax.tree.leaves(value)
    assert tree.leaves(value) == leaves
    assert tree.structure(value) == treedef
    assert tree.unflatten(treedef, leaves) == value
    assert jax.tree.structure(tree.unflatten(treedef, leaves)) == jax.tree.structure(value)


@checked
@given(any_tree)
def test_paths_are_those_of_jax(value: Any) -> None:
    ours, treedef = tree.flatten_with_path(value)
    theirs, _ = jax.tree.flatten_with_path(value)
    assert [(tree.keystr(path), leaf) for path, leaf in ours] == [(jax.tree_util.keystr(p), leaf) for p, leaf in theirs]
    assert treedef == tree.structure(value)
    assert all(path(value) is leaf for path, leaf in ours)


@checked
@given(any_tree, any_tree)
def test_map_over_two_trees_is_that_of_jax(first: Any, other: Any) -> None:
    try:
        expected = jax.tree.map(lambda *leaves: leaves, first, other)
    except ValueError:
        with pytest.raises(AxisError, match="must be a tree prefix of tree 2"):
            tree.map(lambda *leaves: leaves, first, other)
    else:
        assert tree.map(lambda *leaves: leaves, first, other) == expected


@checked
@given(any_tree, any_tree)
def test_structures_are_equal_when_those_of_jax_are(first: Any, other: Any) -> None:
    assert (tree.structure(first) == tree.structure(other)) == (jax.tree.structure(first) == jax.tree.structure(other))


@checked
@given(any_tree)
def test_all_and_reduce_are_those_of_jax(value: Any) -> None:
    assert tree.all(value) == jax.tree.all(value)
    assert tree.reduce(lambda a, b: f"{a}{b}", value, "") == jax.tree.reduce(lambda a, b: f"{a}{b}", value, "")


def test_is_leaf() -> None:
    def is_pair(x: Any) -> bool:
        return isinstance(x, tuple) or x is None

    value = {"a": (1, 2), "b": [None, 3]}
    assert tree.leaves(value, is_pair) == jax.tree.leaves(value, is_leaf=is_pair) == [(1, 2), None, 3]
    assert tree.map(type, value, is_leaf=is_pair) == {"a": tuple, "b": [type(None), int]}
    assert tree.map(lambda a, b: (a, b), [(1, 2)], [5], is_leaf=is_pair) == [((1, 2), 5)]
    assert tree.all({"a": ()}, is_leaf=is_pair) is False
    assert [tree.keystr(path) for path, _ in tree.flatten_with_path(value, is_pair)[0]] == [
        "['a']",
        "['b'][0]",
        "['b'][1]",
    ]
    with pytest.raises(AxisSpecError, match="is_leaf must be a function, but it is 3 of type int"):
        tree.flatten(value, 3)  # type: ignore[arg-type]


def test_map_keeps_the_order_of_keys_and_several_trees() -> None:
    out = tree.map(lambda *leaves: sum(leaves), {"b": 1, "a": 2}, {"a": 20, "b": 10}, {"b": 100, "a": 200})
    assert out == {"b": 111, "a": 222}


@pytest.mark.parametrize(
    ("first", "other", "text"),
    [
        (
            {"a": [1, 2]},
            {"a": [1]},
            r"at tree 2\['a'\] it has a list of length 2, but the value there is a list of length 1",
        ),
        (
            {"a": 1},
            OrderedDict(a=1),
            r"it has a dict with keys \['a'\], but the value there is an OrderedDict with keys",
        ),
        (
            OrderedDict(a=1, b=2),
            OrderedDict(b=2, a=1),
            r"an OrderedDict with keys \['a', 'b'\], but the value there is an OrderedDict with keys \['b', 'a'\]",
        ),
        (defaultdict(int, a=1), defaultdict(list, a=1), r"metadata \(<class 'int'>, \['a'\]\), but .*<class 'list'>"),
        (
            Point(1, (2, 3)),
            Point(1, 5),
            r"at tree 2\.y it has a tuple of length 2, but the value there is a leaf of type int",
        ),
        ([None], [1], r"at tree 2\[0\] it has None \(an empty tree\), but"),
        (Point(1, 2), (1, 2), r"it has a Point with 2 children, but the value there is a tuple of length 2"),
    ],
)
def test_map_says_where_trees_part(first: Any, other: Any, text: str) -> None:
    with pytest.raises(AxisError, match=text):
        tree.map(max, first, other)
    with pytest.raises(AxisError, match=r"Give the same structure, or one leaf for the whole subtree\.$"):
        tree.map(max, first, other)
    with pytest.raises(ValueError):
        jax.tree.map(max, first, other)


def test_bad_arguments() -> None:
    with pytest.raises(AxisSpecError, match=r"tree\.map takes a function first, but it got 1 of type int"):
        tree.map(1, [1])  # type: ignore[arg-type]
    with pytest.raises(
        AxisSpecError, match=r"takes the structure first and the leaves second, but the structure is \[1\]"
    ):
        tree.unflatten([1], tree.structure([0]))  # type: ignore[arg-type]
    for leaves in ([1], [1, 2, 3]):
        with pytest.raises(AxisError, match=rf"has 2 leaves, but {len(leaves)} were given"):
            tree.unflatten(tree.structure([0, 0]), leaves)
    with pytest.raises(AxisSpecError, match="without leaves and no initializer"):
        tree.reduce(max, [None])


def test_reduce_without_initializer() -> None:
    assert tree.reduce(lambda a, b: a - b, {"b": 2, "a": [10, 3]}) == 5


def test_transpose() -> None:
    outer, inner = tree.structure([0, 0]), tree.structure({"a": 0, "b": 0})
    value = [{"a": 1, "b": 2}, {"a": 3, "b": 4}]
    expected = jax.tree.transpose(jax.tree.structure([0, 0]), jax.tree.structure({"a": 0, "b": 0}), value)
    assert (
        tree.transpose(outer, inner, value)
        == tree.transpose(outer, None, value)
        == expected
        == {"a": [1, 3], "b": [2, 4]}
    )
    assert tree.transpose(tree.structure([]), None, []) is None
    with pytest.raises(AxisError, match=r"tree.transpose needs a tree of structure .*but the tree has the structure"):
        tree.transpose(outer, inner, [{"a": 1, "b": 2}, {"a": 3, "c": 4}])
    with pytest.raises(AxisError, match="outer_treedef must be a tree prefix of tree"):
        tree.transpose(outer, None, {"a": 1})


# --- registering -----------------------------------------------------------------------------------------------------


class Interval:
    def __init__(self, low: Any, high: Any, unit: str = "m") -> None:
        self.low, self.high, self.unit = low, high, unit


tree.register_node(Interval, lambda i: ((i.low, i.high), i.unit), lambda unit, ends: Interval(*ends, unit))


def test_register_node() -> None:
    value = {"i": Interval(1, Interval(2, None))}
    leaves, treedef = tree.flatten(value)
    assert leaves == [1, 2]
    again = tree.unflatten(treedef, [10, 20])["i"]
    assert (again.low, again.high.low, again.high.high, again.unit) == (10, 20, None, "m")
    assert [tree.keystr(path) for path, _ in tree.flatten_with_path(value)[0]] == ["['i'][0]", "['i'][1][0]"]
    with pytest.raises(AxisError, match=r"an Interval with 2 children and metadata 'm', but .* and metadata 's'"):
        tree.map(max, Interval(1, 2), Interval(1, 2, "s"))


def test_a_registered_class_is_known_to_pytorch() -> None:
    def width(i: Interval) -> torch.Tensor:
        return (i.high - i.low).sum()

    value = Interval(torch.zeros(3), torch.arange(3.0))
    assert torch.func.vmap(width)(value).tolist() == [0, 1, 2]
    assert torch.func.grad(width)(value).high.tolist() == [1, 1, 1]
    assert torch.compile(width, backend="eager", fullgraph=True)(value).item() == 3


def test_register_node_refuses() -> None:
    for cls in (Interval, dict, list, Point, type(None), torch.return_types.max):
        with pytest.raises(AxisError, match=f"{cls.__name__} is a node of trees already"):
            tree.register_node(cls, lambda x: ((), None), lambda m, c: None)
    with pytest.raises(AxisSpecError, match="a class is registered, but 3 is of type int"):
        tree.register_node(3, lambda x: ((), None), lambda m, c: None)  # type: ignore[arg-type]

    class New:
        pass

    with pytest.raises(AxisSpecError, match="flatten_func must be a function, but it is None"):
        tree.register_node(New, None, lambda m, c: None)  # type: ignore[arg-type]
    with pytest.raises(AxisSpecError, match="unflatten_func must be a function, but it is 'x'"):
        tree.register_node(New, lambda x: ((), None), "x")  # type: ignore[arg-type]
    tree.register_node(New, lambda x: [1, 2, 3], lambda m, c: None)  # type: ignore[arg-type, return-value]
    with pytest.raises(AxisSpecError, match=r"flatten_func of New must return a pair .* it returned \[1, 2, 3\]"):
        tree.flatten(New())


@functools.partial(tree.register_dataclass, meta_fields=["name"])
@dataclasses.dataclass
class State:
    mean: Any
    count: Any = 0
    name: str = "s"
    cache: Any = dataclasses.field(default=None, init=False, compare=False)


def test_register_dataclass() -> None:
    value = State({"w": 1}, 2, "first")
    leaves, treedef = tree.flatten(value)
    assert leaves == [1, 2]
    assert tree.unflatten(treedef, [3, 4]) == State({"w": 3}, 4, "first")
    assert treedef != tree.structure(State({"w": 1}, 2, "second"))
    assert [tree.keystr(path) for path, _ in tree.flatten_with_path([value])[0]] == ["[0].mean['w']", "[0].count"]
    assert torch.func.vmap(lambda s: s.mean * s.count)(State(torch.ones(2), torch.arange(2))).tolist() == [0, 1]


def test_register_dataclass_chooses_fields_as_jax_does() -> None:
    def make() -> type:
        @dataclasses.dataclass
        class Cell:
            a: Any
            b: Any = dataclasses.field(default=1, metadata={"static": True})
            c: Any = 2

        return Cell

    choices: list[dict[str, Any]] = [{}, {"data_fields": ["c", "a"], "meta_fields": ["b"]}]
    choices.append({"data_fields": ["a"], "meta_fields": ["b"], "drop_fields": ["c"]})
    for options in choices:
        ours, theirs = tree.register_dataclass(make(), **options), make()
        jax.tree_util.register_dataclass(theirs, **options)
        assert tree.leaves(ours(10, 20, 30)) == jax.tree.leaves(theirs(10, 20, 30))
        again = tree.map(lambda x: x + 1, ours(10, 20, 30))
        assert dataclasses.astuple(again) == dataclasses.astuple(jax.tree.map(lambda x: x + 1, theirs(10, 20, 30)))
    assert tree.leaves(tree.register_dataclass(make(), data_fields=["a"])(10, 20, 30)) == [10]


def test_register_dataclass_refuses() -> None:
    @dataclasses.dataclass
    class Cell:
        a: Any
        b: Any = 0

    class Plain:
        pass

    names = "must name each init field of Cell once, but they"
    refused: list[tuple[type[Exception], Any, dict[str, Any], str]] = [
        (AxisSpecError, Plain, {}, "takes a dataclass, but Plain is not one"),
        (AxisSpecError, Cell, {"data_fields": "a"}, "data_fields must be a list of field names, but it is 'a'"),
        (AxisSpecError, Cell, {"meta_fields": [1]}, r"meta_fields must be a list of field names, but it is \[1\]"),
        (AxisError, Cell, {"data_fields": ["a", "z"]}, f"{names} name z; its init fields are a, b"),
        (AxisError, Cell, {"data_fields": ["a", "b"], "meta_fields": ["b"]}, f"{names} repeat b"),
        (AxisError, Cell, {"data_fields": ["a"], "meta_fields": []}, f"{names} leave out b"),
        (AxisError, Cell, {"drop_fields": ["a"]}, f"{names} drop, without a default, a"),
        (AxisError, State, {}, "State is a node of trees already"),
    ]
    for cls, nodetype, options, text in refused:
        with pytest.raises(cls, match=text):
            tree.register_dataclass(nodetype, **options)
    assert tree.leaves(Cell(1)) == [Cell(1)]


def test_treedef_is_that_of_optree() -> None:
    assert isinstance(tree.structure(1), tree.TreeDef)
    assert tree.TreeDef is optree.PyTreeSpec
