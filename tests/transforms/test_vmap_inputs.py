"""Rules 1 to 6: what goes into a mapped function. Each call is made in torchbatch, in the loop and in JAX."""

from __future__ import annotations

import functools
from collections import OrderedDict, defaultdict, namedtuple
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from torchbatch import tree, vmap
from torchbatch.errors import AxisError, AxisSpecError, InputTypeError
from torchbatch.testing import assert_close, loop

jax = pytest.importorskip("jax")
RNG = np.random.default_rng(0)
X = RNG.standard_normal((3, 4)).astype(np.float32)
Y = RNG.standard_normal((4, 3)).astype(np.float32)
Z = RNG.standard_normal((2, 3, 4)).astype(np.float32)
ROW = X[0]
Point = namedtuple("Point", "x y")


class Pair(NamedTuple):
    left: Any
    right: Any


@dataclass
class State:
    weight: Any
    bias: Any
    rate: float = 0.5


@dataclass
class Box:
    value: Any


tree.register_dataclass(State, meta_fields=("rate",))
jax.tree_util.register_dataclass(State, ("weight", "bias"), ("rate",))
tree.register_dataclass(Box)
jax.tree_util.register_dataclass(Box, ("value",), ())


def multiply(x, y):
    return x * y


def first(x, *rest):
    return x * 2


# --- rule 1: in_axes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axis", [-2, -1, 0, 1])
def test_rule_01_one_int_is_the_axis_of_every_argument(agree, axis):
    agree(multiply, X, X, in_axes=axis)


@pytest.mark.parametrize("axis", [-3, -2, -1, 0, 1, 2])
def test_rule_01_axes_run_over_minus_ndim_to_ndim(agree, axis):
    agree(first, Z, in_axes=axis)


@pytest.mark.parametrize("axis", [-4, 3, 100])
def test_rule_01_axes_out_of_bounds(agree, axis):
    agree(first, Z, in_axes=axis, error=AxisError)


@pytest.mark.parametrize("kind", [tuple, list])
@pytest.mark.parametrize("axes", [(0, 1), (-2, -1), (0, -1), (-2, 1)])
def test_rule_01_one_entry_per_argument(agree, kind, axes):
    agree(multiply, X, Y, in_axes=kind(axes))
    agree(multiply, X, Y, in_axes=kind(reversed(axes)))


def test_rule_01_none_is_unmapped(agree):
    agree(multiply, X, ROW, in_axes=(0, None))
    agree(multiply, ROW, X, in_axes=(None, 0))
    agree(lambda x, d: x * d["w"], X, {"w": ROW}, in_axes=(0, None))


@pytest.mark.parametrize(
    ("in_axes", "argument"),
    [
        (({"a": 0, "b": 1},), {"a": X, "b": Y}),
        (({"a": 0, "b": None},), {"a": X, "b": ROW}),
        (([0, 1],), [X, Y]),
        (((0, (1, None)),), (X, (Y, ROW))),
        ((Point(0, 1),), Point(X, Y)),
        ((Point(0, {"k": 1}),), Point([X, X], {"k": (Y, Y)})),
        ((Pair(0, None),), Pair((X, [X]), {"k": ROW})),
        ((OrderedDict(b=1, a=0),), OrderedDict(b=Y, a=X)),
        ((State(0, None),), State(X, ROW)),
        ((Box(0),), Box({"a": X, "b": [X]})),
        (({"a": [0, {"c": -1}]},), {"a": [X, {"c": (Y, Y)}]}),
        (((0, None, None),), (X, None, (None, None))),
    ],
    ids=lambda value: None,
)
def test_rule_01_an_entry_is_a_prefix_of_its_argument(agree, in_axes, argument):
    def double(tree_):
        return jax.tree.map(lambda leaf: leaf * 2, tree_)

    agree(double, argument, in_axes=in_axes)


@pytest.mark.parametrize("entry", [True, False])
@pytest.mark.parametrize("place", [lambda e: e, lambda e: (e,), lambda e: ({"a": e},)])
def test_rule_01_a_bool_is_not_an_axis(agree, entry, place):
    argument = {"a": X} if isinstance(place(entry), tuple) and isinstance(place(entry)[0], dict) else X
    agree(first, argument, in_axes=place(entry), error=AxisSpecError)


@pytest.mark.parametrize("bad", ["0", 0.0, 1j, b"0", {0}, ("0",), ({"a": 0.5},), [(0, "1")]])
def test_rule_01_a_leaf_is_an_int_or_none(agree, bad):
    agree(first, X, in_axes=bad, error=AxisSpecError)


def test_rule_01_arrays_are_not_axes():
    for bad in (torch.tensor(0), np.int64(0), np.array([0]), (torch.tensor(0),)):
        for mapped in (vmap, loop):
            with pytest.raises(AxisSpecError):
                mapped(first, in_axes=bad)


@pytest.mark.parametrize("bad", [{"x": 0}, OrderedDict(x=0), State(0, 0)])
def test_rule_01_the_whole_is_an_int_none_tuple_or_list(agree, bad):
    agree(first, X, in_axes=bad, error=AxisSpecError)


def test_rule_01_a_named_tuple_is_not_the_tuple_of_entries(agree):
    agree(multiply, X, X, in_axes=Point(0, 0), error=AxisSpecError)


@pytest.mark.parametrize("in_axes", [(), [], (None,), (0,)])
def test_rule_01_the_count_of_entries_is_that_of_the_arguments(agree, in_axes):
    agree(multiply, X, X, in_axes=in_axes, error=AxisError)
    agree(multiply, X, X, in_axes=(*in_axes, 0, 0, 0), error=AxisError)


def test_rule_01_no_arguments_need_no_entries(agree):
    for in_axes in (0, None, (), []):
        agree(lambda: 1.0, in_axes=in_axes, axis_size=2)


# --- rule 2: keyword arguments ---------------------------------------------------------------------------------------


def test_rule_02_keyword_arguments_are_mapped_over_axis_0(agree):
    agree(lambda x, *, w: x * w, X, kwargs={"w": X})
    agree(lambda x, *, w: x * w, Y, kwargs={"w": X}, in_axes=1)
    agree(lambda x, w: x * w, X, kwargs={"w": X}, in_axes=(0,))
    agree(lambda x, w: x * w["a"][0], ROW, kwargs={"w": {"a": [X]}}, in_axes=None)
    agree(lambda x, **rest: x * rest["k"] * rest["j"], X, kwargs={"k": X, "j": X})


def test_rule_02_keyword_arguments_alone(agree):
    agree(lambda *, w: w * 2, kwargs={"w": X})
    agree(lambda w: w * 2, kwargs={"w": X}, in_axes=())
    agree(lambda w: w * 2, kwargs={"w": X}, in_axes=None)


def test_rule_02_keyword_arguments_are_mapped_even_where_in_axes_has_an_entry_for_them(agree):
    agree(multiply, X, kwargs={"y": X}, in_axes=(0, None), error=AxisError)


def test_rule_02_partial_binds_an_unmapped_one(agree):
    agree.call(lambda lib: lib.vmap(functools.partial(multiply, y=lib.array(ROW)))(lib.array(X)))
    agree.call(lambda lib: lib.vmap(functools.partial(multiply, lib.array(ROW)))(lib.array(X)))


def test_rule_02_a_keyword_argument_that_is_no_array(agree):
    agree(lambda x, mode: x, X, kwargs={"mode": "sum"}, error=InputTypeError)
    agree(lambda x, rate: x, X, kwargs={"rate": 2.0}, error=AxisError)
    agree(lambda x, rate: x, X, kwargs={"rate": None})


def test_rule_02_defaults_are_not_arguments(agree):
    agree(lambda x, scale=2.0: x * scale, X)


@pytest.mark.parametrize("name", ["self", "args", "kwargs", "fun", "in_axes", "instance"])
def test_rule_02_any_name_can_be_a_keyword(agree, name):
    agree(lambda **rest: rest[name] * 2, kwargs={name: X})


# --- rule 3: axis_size -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 3])
def test_rule_03_axis_size_alone_is_enough(agree, size):
    agree(lambda: 1.5, axis_size=size)
    agree(lambda x: x * 2, X, in_axes=None, axis_size=size)
    agree(lambda x: x * 2, X, in_axes=(None,), axis_size=size)
    agree(lambda x: x, None, axis_size=size)
    agree(lambda x: x, {}, axis_size=size)


def test_rule_03_axis_size_may_be_given_where_it_is_known(agree):
    agree(first, X, axis_size=3)
    agree(first, X, in_axes=-1, axis_size=4)


@pytest.mark.parametrize("size", [0, 2, 4])
def test_rule_03_axis_size_must_agree(agree, size):
    agree(first, X, axis_size=size, error=AxisError)


def test_rule_03_nothing_mapped_without_axis_size(agree):
    agree(lambda: 1.0, error=AxisError)
    agree(first, X, in_axes=None, error=AxisError)
    agree(first, X, in_axes=(None,), error=AxisError)
    agree(first, None, error=AxisError)
    agree(first, {}, error=AxisError)
    agree(lambda x: x, X, in_axes=({},), error=AxisError)


def test_rule_03_axis_size_is_a_count():
    for mapped in (vmap, loop):
        with pytest.raises(AxisError):
            mapped(first, axis_size=-1)
        for bad in (2.0, "2", True, torch.tensor(2)):
            with pytest.raises(AxisSpecError):
                mapped(first, axis_size=bad)


# --- rule 4: values --------------------------------------------------------------------------------------------------


class Config:
    scale = 2.0


@pytest.mark.parametrize("value", ["sum", Config(), Config, abs, 3, None, object(), {"a": Config()}, [1, "two"], {1, 2}])
def test_rule_04_what_is_not_mapped_reaches_fun_untouched(agree, value):
    def call(lib):
        seen = []
        found = lib.vmap(lambda x, other: (seen.append(other), x)[1], in_axes=(0, None))(lib.array(X), value)
        rebuilt = lib.name == "JAX" and isinstance(value, dict | list)
        assert seen and all(other is value or rebuilt for other in seen)
        return found

    agree.call(call)


def test_rule_04_what_is_not_mapped_inside_a_prefix_is_untouched_too(agree):
    config, seen = Config(), []

    def fun(d):
        seen.append(d["config"])
        return d["x"] * d["config"].scale

    agree(fun, {"x": X, "config": config}, in_axes=({"x": 0, "config": None},))
    assert all(other is config for other in seen)


def test_rule_04_an_unmapped_array_stays_what_it_is():
    for mapped in (vmap, loop):
        for value in (X, torch.tensor(X), np.float32(2.0), torch.nn.Parameter(torch.ones(4))):
            seen = []
            mapped(lambda x, other: (seen.append(other), x)[1], in_axes=(0, None))(torch.tensor(X), value)  # noqa: B023
            assert all(other is value for other in seen)


class Arraylike:
    def __init__(self, array):
        self.array = array

    def __array__(self, dtype=None, copy=None):
        return self.array if dtype is None else self.array.astype(dtype)


class Jaxlike(Arraylike):
    def __jax_array__(self):
        return jax.numpy.asarray(self.array)


def test_rule_04_numpy_arrays_become_tensors(agree):
    agree.call(lambda lib: lib.vmap(first)(X))
    agree.call(lambda lib: lib.vmap(multiply, in_axes=(0, 1))(X, lib.array(Y)))
    agree.call(lambda lib: lib.vmap(lambda d: d["a"] * d["b"])({"a": X, "b": X}))
    seen = []
    vmap(lambda x: (seen.append(type(x)), x)[1])(X)
    assert seen == [torch.Tensor]


@pytest.mark.parametrize(
    "dtype", ["bool", "int8", "int16", "int32", "int64", "uint8", "float16", "float32", "float64", "complex64", "complex128"]
)
def test_rule_04_numpy_dtypes_are_kept(agree, dtype):
    agree.call(lambda lib: lib.vmap(lambda x: x)(X.astype(dtype)))
    assert vmap(lambda x: x)(X.astype(dtype)).dtype == getattr(torch, dtype)


def test_rule_04_anything_with_array_can_be_mapped():
    expected = torch.tensor(X) * 2
    for mapped in (vmap, loop):
        assert torch.equal(mapped(lambda x: x * 2)(Arraylike(X)), expected)
        assert torch.equal(mapped(lambda d: d["a"] * 2)({"a": Arraylike(X)}), expected)
        assert torch.equal(mapped(lambda x: x * 2)(jax.numpy.asarray(X)), expected)


@pytest.mark.parametrize(
    "array",
    [X[::-1], X[:, ::2], X.T, X.astype(">f4"), np.broadcast_to(ROW, (3, 4)), np.asfortranarray(X)],
    ids=["backwards", "strided", "transposed", "big endian", "read-only", "fortran"],
)
def test_rule_04_arrays_that_pytorch_cannot_share(agree, array):
    agree.call(lambda lib: lib.vmap(lambda x: x * 2)(array if lib.name != "JAX" else np.array(array, dtype=np.float32)))


@pytest.mark.parametrize("bad", ["text", object(), abs, {1, 2}, b"bytes", np.array(["a", "b", "c"])])
def test_rule_04_what_is_mapped_must_be_an_array(agree, bad):
    agree.call(lambda lib: lib.vmap(lambda x, y: x)(lib.array(X), bad), InputTypeError)
    agree.call(lambda lib: lib.vmap(lambda x, y: x)(lib.array(X), {"a": bad}), InputTypeError)


@pytest.mark.parametrize("number", [1, 2.5, True, 1j, np.float32(2)])
def test_rule_04_a_number_has_no_axis(agree, number):
    agree.call(lambda lib: lib.vmap(lambda x, y: x)(lib.array(X), number), AxisError)


def test_rule_04_a_module_passes_through():
    module = torch.nn.Linear(4, 2)
    x = torch.tensor(X)
    for in_axes in (0, (None, 0), (0, 0)):
        found = vmap(lambda m, x: m(x), in_axes=in_axes)(module, x)
        assert_close(found, loop(lambda m, x: m(x), in_axes=in_axes)(module, x))
        assert_close(found, module(x))
    found = vmap(lambda d, x: d["m"](x))({"m": module}, x)
    assert_close(found, module(x))


def test_rule_04_subclasses_of_tensor_can_be_mapped():
    parameter = torch.nn.Parameter(torch.tensor(X))
    for mapped in (vmap, loop):
        assert torch.equal(mapped(lambda x: x * 2)(parameter), parameter * 2)
        mapped(lambda x: (x * 2).sum())(parameter).sum().backward()
        assert torch.equal(parameter.grad, torch.full((3, 4), 2.0))
        parameter.grad = None


# --- rule 5: trees ---------------------------------------------------------------------------------------------------

TREES = {
    "tuple": (X, X),
    "list": [X, X],
    "dict": {"b": X, "a": X},
    "dict of int keys": {2: X, 1: X},
    "OrderedDict": OrderedDict(b=X, a=X),
    "defaultdict": defaultdict(list, b=X, a=X),
    "namedtuple": Point(X, X),
    "NamedTuple": Pair(X, [X]),
    "dataclass": State(X, X),
    "None": (X, None),
    "empty containers": (X, (), [], {}, OrderedDict()),
    "nested": {"a": [X, (X, {"b": Pair(X, None)})], "c": State([X], {"d": X})},
    "one-element": (X,),
}


@pytest.mark.parametrize("name", TREES)
def test_rule_05_trees_go_in_and_come_out(agree, name):
    agree(lambda t: t, TREES[name])
    agree(lambda t: (t, t), TREES[name], in_axes=1, out_axes=-1)
    agree(lambda x, **rest: rest, X, kwargs={"t": TREES[name]})


def test_rule_05_the_containers_inside_are_the_callers_kinds():
    seen = []
    vmap(lambda t: (seen.append(t), t)[1])(TREES["nested"])
    (inside,) = seen
    assert type(inside) is dict and list(inside) == ["a", "c"]
    assert type(inside["a"][1][1]["b"]) is Pair and inside["a"][1][1]["b"].right is None
    assert type(inside["c"]) is State and inside["c"].rate == 0.5


def test_rule_05_a_default_dict_keeps_its_factory():
    for mapped in (vmap, loop):
        assert mapped(lambda d: d)(TREES["defaultdict"]).default_factory is list


def test_rule_05_none_is_the_empty_tree(agree):
    agree(lambda x, y: x, X, None)
    agree(lambda x, y: (x, y), X, (None, [None]))
    agree(lambda x, y: x, X, None, in_axes=(0, 7))


def test_rule_05_an_unregistered_dataclass_is_a_leaf(agree):
    @dataclass
    class Plain:
        x: Any

    agree.call(lambda lib: lib.vmap(lambda p: p.x)(Plain(lib.array(X))), InputTypeError)
    agree.call(lambda lib: lib.vmap(lambda p, x: p.x * x, in_axes=(None, 0))(Plain(lib.array(ROW)), lib.array(X)))


class Ring:
    def __init__(self, items):
        self.items = items


def test_rule_05_nodes_registered_with_pytorch_are_seen():
    torch.utils._pytree.register_pytree_node(
        Ring, lambda ring: (list(ring.items), None), lambda items, _: Ring(list(items)), serialized_type_name="tests.Ring"
    )
    x = torch.tensor(X)
    for mapped in (vmap, loop):
        found = mapped(lambda ring: Ring([ring.items[0] * ring.items[1]]))(Ring([x, x]))
        assert type(found) is Ring
        assert_close(found.items[0], x * x)


# --- rule 6: what does not fit ---------------------------------------------------------------------------------------


def test_rule_06_sizes_that_disagree(agree):
    agree(multiply, X, Y, error=AxisError)
    agree(multiply, X, Y, in_axes=(1, 1), error=AxisError)
    agree(lambda d: d["a"], {"a": X, "b": Y}, error=AxisError)
    agree(lambda x, w: x, X, kwargs={"w": Y}, error=AxisError)
    agree(multiply, X, X[:0], error=AxisError)
    agree(multiply, X[:1], X, error=AxisError)


@pytest.mark.parametrize("shape", [(), (3,)])
def test_rule_06_a_rank_that_is_too_small(agree, shape):
    small = np.ones(shape, np.float32)
    for axis in (len(shape), -len(shape) - 1):
        agree(lambda x, y: x, X, small, in_axes=(0, axis), error=AxisError)


@pytest.mark.parametrize(
    ("entry", "argument"),
    [
        ([0], X),
        ([0, 0], [X]),
        ([0], [X, X]),
        ((0, 0), [X, X]),
        ([0, 0], (X, X)),
        ({"a": 0}, {"b": X}),
        ({"a": 0}, {"a": X, "b": X}),
        ({"a": 0, "b": 0}, {"a": X}),
        ({"a": 0}, OrderedDict(a=X)),
        (OrderedDict(a=0, b=0), OrderedDict(b=X, a=X)),
        (defaultdict(int, a=0), defaultdict(float, a=X)),
        ({"a": {"b": 0}}, {"a": X}),
        ({"a": [0, 0]}, {"a": [X]}),
        (Point(0, 0), (X, X)),
        ((0, 0), Point(X, X)),
        (Point(0, 0), Pair(X, X)),
        (State(0, 0, rate=0.1), State(X, X, rate=0.5)),
        (Box(0), State(X, X)),
        ((), X),
        ([], (X,)),
    ],
    ids=lambda value: None,
)
def test_rule_06_a_prefix_that_does_not_fit(agree, entry, argument):
    agree(lambda t: 1.0, argument, in_axes=(entry,), axis_size=3, error=AxisError)


def test_rule_06_errors_are_also_the_built_in_ones():
    assert issubclass(AxisError, ValueError) and issubclass(AxisSpecError, TypeError) and issubclass(InputTypeError, TypeError)


def test_rule_06_the_function_is_not_called_when_the_arguments_do_not_fit():
    calls = []
    for bad in ((X, Y), (X, "text"), (X, np.float32(1))):
        with pytest.raises((ValueError, TypeError)):
            vmap(lambda x, y: calls.append(1))(*bad)
    assert not calls


def test_rule_06_errors_of_the_function_are_its_own(agree):
    def bad(x):
        raise KeyError("mine")

    for mapped in (vmap, loop, jax.vmap):
        with pytest.raises(KeyError, match="mine"):
            mapped(bad)(X)
        with pytest.raises(TypeError, match="argument"):
            mapped(lambda: 1.0)(X)
