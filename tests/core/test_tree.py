"""The tree machinery: paths, prefixes, and the mirror of PyTorch's registry."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict, namedtuple
from typing import Any

import pytest
import torch
from torch.utils import _pytree as torch_pytree

from torchbatch._torch import registry
from torchbatch.core import tree
from torchbatch.errors import AxisError

Point = namedtuple("Point", "x y")


class Box:
    def __init__(self, *items: Any) -> None:
        self.items = items


def new_box() -> type[Box]:
    return type("Box", (Box,), {})


def register(cls: type[Box], step: int = 1) -> None:
    """Register with PyTorch's Python registry alone, from which a class can be taken out again."""
    torch_pytree._private_register_pytree_node(
        cls, lambda b: (list(b.items[::step]), None), lambda c, _: cls(*list(c)[::step])
    )


def unregister(cls: type) -> None:
    for table in (torch_pytree.SUPPORTED_NODES, torch_pytree.SUPPORTED_SERIALIZED_TYPES):
        table.pop(cls)


# --- the registry ----------------------------------------------------------------------------------------------------


def test_a_class_is_a_leaf_until_pytorch_knows_it_and_again_afterwards() -> None:
    cls = new_box()
    box = cls(1, 2)
    assert tree.flatten(box)[0] == [box]
    assert not tree.is_node_type(cls)
    register(cls)
    leaves, structure = tree.flatten({"b": box})
    assert leaves == [1, 2]
    assert tree.unflatten(structure, [3, 4])["b"].items == (3, 4)
    assert tree.is_node_type(cls)
    unregister(cls)
    assert tree.flatten(box)[0] == [box]
    assert not tree.is_node_type(cls)


def test_a_class_registered_anew_is_looked_at_anew() -> None:
    cls = new_box()
    register(cls)
    assert tree.flatten(cls(1, 2))[0] == [1, 2]
    unregister(cls)
    register(cls, step=-1)
    assert tree.flatten(cls(1, 2))[0] == [2, 1]


def test_one_class_out_and_another_in() -> None:
    old, new = new_box(), new_box()
    register(old)
    tree.flatten(None)
    unregister(old)
    register(new)
    box = old(1)
    assert tree.flatten([box, new(2)])[0] == [box, 2]


def test_dataclasses_registered_with_pytorch_keep_fields_that_are_none() -> None:
    @dataclasses.dataclass
    class Pair:
        x: Any
        y: Any

    torch.export.register_dataclass(Pair, serialized_type_name="test_tree.Pair")
    leaves, structure = tree.flatten(Pair(1, None))
    assert leaves == [1]
    assert tree.unflatten(structure, [5]) == Pair(5, None)
    assert tree.replace_none(Pair(0, None), "unmapped") == Pair(0, "unmapped")
    assert tree.paths([Pair(1, 2)], "p") == ["p[0].x", "p[0].y"]


def test_built_in_results_of_pytorch_are_nodes() -> None:
    result = torch.ones(2, 2).max(0)
    leaves, structure = tree.flatten(result)
    assert len(leaves) == 2
    assert type(tree.unflatten(structure, leaves)) is torch.return_types.max
    assert tree.flatten(torch.Size([2, 3]))[0] == [2, 3]


def test_node_with_names_of_all_kinds() -> None:
    class Mixed:
        def __init__(self, a: Any, b: Any, c: Any) -> None:
            self.a, self.b, self.c = a, b, c

    names = [torch_pytree.GetAttrKey("a"), torch_pytree.MappingKey("b"), torch_pytree.SequenceKey(2)]
    torch_pytree.register_pytree_node(
        Mixed,
        lambda m: ([m.a, m.b, m.c], None),
        lambda c, _: Mixed(*c),
        flatten_with_keys_fn=lambda m: (list(zip(names, [m.a, m.b, m.c], strict=True)), None),
    )
    value = [Mixed(1, 2, {"k": 3})]
    assert tree.paths(value, "v") == ["v[0].a", "v[0]['b']", "v[0][2]['k']"]
    accessors, leaves, _ = tree.flatten_with_path(value)
    assert leaves == [1, 2, 3]
    assert accessors[0](value) == 1


def test_register_round_trip_through_pytorch() -> None:
    class Ends:
        def __init__(self, low: Any, high: Any, unit: Any = None) -> None:
            self.low, self.high, self.unit = low, high, unit

    registry.register(registry.attribute_node(Ends, ["low", "high"], ["unit"]))
    leaves, spec = torch_pytree.tree_flatten(Ends(1, 2, "m"))
    assert leaves == [1, 2]
    assert torch_pytree.tree_unflatten([3, 4], spec).unit == "m"
    pairs, _ = torch_pytree.tree_flatten_with_path(Ends(1, 2))
    assert [torch_pytree.keystr(path) for path, _ in pairs] == [".low", ".high"]
    assert tree.paths(Ends(1, [2]), "e") == ["e.low", "e.high[0]"]


# --- paths and prefixes ----------------------------------------------------------------------------------------------


def test_paths() -> None:
    value = {"b": [1, (2, None)], "a": Point(3, OrderedDict(z=4, y=5))}
    assert tree.paths(value, "batch") == [
        "batch['a'].x",
        "batch['a'].y['z']",
        "batch['a'].y['y']",
        "batch['b'][0]",
        "batch['b'][1][0]",
    ]
    assert tree.paths(7, "x") == ["x"]
    assert tree.paths(None, "x") == []


def test_flatten_and_map() -> None:
    leaves, structure = tree.flatten({"b": 1, "a": None, "c": [2]})
    assert leaves == [1, 2]
    assert tree.unflatten(structure, "xy") == {"b": "x", "a": None, "c": ["y"]}
    assert tree.map_leaves(lambda a, b: a + b, {"a": 1}, {"a": 2}) == {"a": 3}
    assert tree.replace_none({"a": None, "b": [0, None]}, -1) == {"a": -1, "b": [0, -1]}


def test_broadcast_prefix_and_flatten_up_to() -> None:
    prefix, value = {"a": 0, "b": (1, 2)}, {"b": ([5, 6], 7), "a": {"c": 8, "d": None}}
    assert tree.broadcast_prefix(prefix, value, what="in_axes", root="x") == [0, 1, 1, 2]
    assert tree.flatten_up_to(prefix, value, what="in_axes", root="x") == [{"c": 8, "d": None}, [5, 6], 7]
    assert tree.broadcast_prefix(3, value, what="in_axes", root="x") == [3] * 4


@pytest.mark.parametrize(
    ("prefix", "value", "text"),
    [
        ((0, 1), [1, 2], "at batch it has a tuple of length 2, but the value there is a list of length 2."),
        ((0, 1), (1,), "at batch it has a tuple of length 2, but the value there is a tuple of length 1."),
        ({"a": [0]}, {"a": 1}, "at batch['a'] it has a list of length 1, but the value there is a leaf of type int."),
        ({"a": 0}, {"b": 0}, "at batch it has a dict with keys ['a'], but the value there is a dict with keys ['b']."),
        ({"a": 0}, OrderedDict(a=0), "a dict with keys ['a'], but the value there is an OrderedDict with keys ['a']."),
        ([0, [1]], [1, None], "at batch[1] it has a list of length 1, but the value there is None (an empty tree)."),
        (
            Point(0, (1,)),
            Point(0, 1),
            "at batch.y it has a tuple of length 1, but the value there is a leaf of type int.",
        ),
        ({"z": 0, "a": (0, [1])}, {"z": 1, "a": (1, (1,))}, "at batch['a'][1] it has a list of length 1"),
    ],
)
def test_prefix_mismatch(prefix: Any, value: Any, text: str) -> None:
    for function in (tree.broadcast_prefix, tree.flatten_up_to, tree.check_prefix):
        with pytest.raises(AxisError) as caught:
            function(prefix, value, what="in_axes[0]", root="batch")
        assert text in str(caught.value)
        assert str(caught.value).startswith("in_axes[0] must be a tree prefix of batch: at batch")
        assert str(caught.value).endswith("Give the same structure, or one int or None for the whole subtree.")
    assert tree.prefix_mismatch(prefix, value, what="in_axes[0]", root="batch") == str(caught.value)


def test_prefix_mismatch_in_metadata() -> None:
    class Tagged(Box):
        pass

    torch_pytree.register_pytree_node(Tagged, lambda b: (list(b.items[1:]), b.items[0]), lambda c, tag: Tagged(tag, *c))
    mine, theirs = (f"a Tagged with 1 child and metadata {tag!r}" for tag in "ab")
    text = f"at t it has {mine}, but the value there is {theirs}"
    with pytest.raises(AxisError, match=text):
        tree.check_prefix(Tagged("a", 0), Tagged("b", 0), what="in_axes", root="t")
    tree.check_prefix(Tagged("a", 0), Tagged("a", [0, 1]), what="in_axes", root="t")
    with pytest.raises(AxisError, match="it has a Tagged with 2 children, but the value there is a leaf of type int"):
        tree.check_prefix(Tagged("a", 1, 2), 3, what="in_axes", root="b")
