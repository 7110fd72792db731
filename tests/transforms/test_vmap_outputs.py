"""Rules 7 to 9: what comes out of a mapped function. Each call is made in torchbatch, in the loop and in JAX."""

from __future__ import annotations

from collections import OrderedDict, defaultdict, namedtuple
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from torchbatch import tree, vmap
from torchbatch.errors import AxisError, AxisSpecError, OutputTypeError, UnmappedOutputError
from torchbatch.testing import assert_close, loop

jax = pytest.importorskip("jax")
RNG = np.random.default_rng(0)
X = RNG.standard_normal((3, 4)).astype(np.float32)
Z = RNG.standard_normal((3, 4, 5)).astype(np.float32)
ROW = X[0]
Point = namedtuple("Point", "x y")


@dataclass
class Result:
    value: Any
    rest: Any
    kind: str = "plain"


tree.register_dataclass(Result, meta_fields=("kind",))
jax.tree_util.register_dataclass(Result, ("value", "rest"), ("kind",))


def double(x):
    return x * 2


# --- rule 7: out_axes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axis", [-3, -2, -1, 0, 1, 2])
def test_rule_07_axes_run_over_the_dimensions_of_the_result(agree, axis):
    agree(double, Z, out_axes=axis)
    agree(double, Z, in_axes=1, out_axes=axis)
    agree(lambda x: x, Z, in_axes=-1, out_axes=axis)


@pytest.mark.parametrize("axis", [-4, 3, 100])
def test_rule_07_axes_out_of_bounds(agree, axis):
    agree(double, Z, out_axes=axis, error=AxisError)
    agree(lambda x: ROW.sum(), Z, out_axes=axis, error=AxisError)


@pytest.mark.parametrize("axis", [-1, 0])
def test_rule_07_a_scalar_output_has_one_axis(agree, axis):
    agree(lambda x: x.sum(), X, out_axes=axis)
    agree(lambda x: 1.0, X, out_axes=axis)


@pytest.mark.parametrize("axis", [-2, 1])
def test_rule_07_a_scalar_output_has_no_second_axis(agree, axis):
    agree(lambda x: x.sum(), X, out_axes=axis, error=AxisError)
    agree(lambda x: 1.0, X, out_axes=axis, error=AxisError)


@pytest.mark.parametrize(
    ("out_axes", "output"),
    [
        ((0, 1), lambda x: (x, x * 2)),
        ([1, 0], lambda x: [x, x.sum()]),
        ({"a": 1, "b": 0}, lambda x: {"b": x.sum(), "a": x}),
        (OrderedDict(b=0, a=1), lambda x: OrderedDict(b=x.sum(), a=x)),
        (Point(1, 0), lambda x: Point(x, x.sum())),
        (Result(1, -1), lambda x: Result(x, {"k": x})),
        ((1, 0), lambda x: ({"a": x, "b": [x, (x,)]}, x.sum())),
        ((1, None), lambda x: (x, {"a": 1.0, "b": [2, 3]})),
        ((1, (0, None)), lambda x: (x, (x, None))),
        ((-1, 7), lambda x: (x, None)),
        ((0, ()), lambda x: (x, ())),
        ((1, None), lambda x: [x, 1.0] and (x, 1.0)),
    ],
    ids=lambda value: None,
)
def test_rule_07_out_axes_is_a_prefix_of_the_output(agree, out_axes, output):
    agree(output, X, out_axes=out_axes)


@pytest.mark.parametrize(
    ("out_axes", "output"),
    [
        ((0, 0), lambda x: x),
        ((0, 0), lambda x: [x, x]),
        ([0, 0], lambda x: (x, x)),
        ((0,), lambda x: (x, x)),
        ((0, 0, 0), lambda x: (x, x)),
        ({"a": 0}, lambda x: {"b": x}),
        ({"a": 0}, lambda x: {"a": x, "b": x}),
        ({"a": 0}, lambda x: OrderedDict(a=x)),
        (OrderedDict(a=0, b=0), lambda x: OrderedDict(b=x, a=x)),
        ({"a": (0, 0)}, lambda x: {"a": x}),
        (Point(0, 0), lambda x: (x, x)),
        ((0, 0), lambda x: Point(x, x)),
        (Result(0, 0, "other"), lambda x: Result(x, x)),
        ((), lambda x: x),
        ([], lambda x: ()),
    ],
    ids=lambda value: None,
)
def test_rule_07_a_prefix_that_does_not_fit(agree, out_axes, output):
    agree(output, X, out_axes=out_axes, error=AxisError)


@pytest.mark.parametrize("bad", [True, False, "0", 0.5, 1j, {0}, (0, "1"), {"a": True}, [(0, 0.0)]])
def test_rule_07_a_leaf_is_an_int_or_none(agree, bad):
    agree(double, X, out_axes=bad, error=AxisSpecError)


def test_rule_07_arrays_are_not_axes():
    for bad in (torch.tensor(0), np.int64(0), (np.int32(0),)):
        for mapped in (vmap, loop):
            with pytest.raises(AxisSpecError):
                mapped(double, out_axes=bad)


def test_rule_07_the_axis_of_an_output_is_that_of_its_own_rank(agree):
    agree(lambda x: {"x": x, "s": x.sum(), "o": x[:, None] * x}, X, out_axes={"x": -1, "s": -1, "o": -2})
    agree(lambda x: (x, x.sum()), X, out_axes=-1)
    agree(lambda x: (x, x.sum()), X, out_axes=1, error=AxisError)


@pytest.mark.parametrize("size", [0, 1])
@pytest.mark.parametrize("axis", [-2, 0, 1])
def test_rule_07_small_batches(agree, size, axis):
    agree(double, X[:size], out_axes=axis)
    agree(lambda x: (x.sum(), 1.0), X[:size])


# --- rule 8: what comes out ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axis", [-2, -1, 0, 1])
def test_rule_08_what_does_not_vary_is_broadcast(agree, axis):
    agree(lambda x, y: y * 2, X, ROW, in_axes=(0, None), out_axes=axis)
    agree(lambda x, y: y, X, ROW, in_axes=(0, None), out_axes=axis)
    agree.call(lambda lib: lib.vmap(lambda x: lib.np.ones(2), out_axes=axis)(lib.array(X)))
    agree.call(lambda lib: lib.vmap(lambda x: (lib.np.zeros((2, 3)), x), out_axes=(axis, 0))(lib.array(X)))


@pytest.mark.parametrize("size", [0, 1, 3])
@pytest.mark.parametrize("number", [1, 2.5, True, 3j, np.float32(1.5), np.float64(2.5), np.int32(3), np.bool_(True)])
def test_rule_08_numbers_become_tensors(agree, number, size):
    found = agree(lambda x: (number, x), X[:size])[0]
    assert isinstance(found, torch.Tensor) and found.shape == (size,)


def test_rule_08_numpy_arrays_become_tensors(agree):
    found = agree(lambda x: (ROW, x), X)[0]
    assert isinstance(found, torch.Tensor) and found.dtype == torch.float32
    agree(lambda x: {"a": ROW.astype(np.float64), "b": X[::-1]}, X, out_axes=-1)


def test_rule_08_none_stays_none(agree):
    assert agree(lambda x: None, X) is None
    assert agree(lambda x: None, X, out_axes=5) is None
    agree(lambda x: (x, None, {"a": None}), X)
    agree(lambda x: (x, None), X, out_axes=(0, None))


def test_rule_08_empty_containers_stay_empty(agree):
    for empty in ((), [], {}, OrderedDict(), defaultdict(list)):
        agree(lambda x: empty, X)  # noqa: B023
        agree(lambda x: (x, empty), X, out_axes=-1)  # noqa: B023


@pytest.mark.parametrize("thing", ["text", object(), abs, {1, 2}, b"bytes", range(3), torch.float32, np.array(["a"])])
def test_rule_08_any_other_object_is_a_type_error(agree, thing):
    agree(lambda x: thing, X, error=OutputTypeError)
    agree(lambda x: {"a": (x, thing)}, X, error=OutputTypeError)
    agree(lambda x: {"a": (x, thing)}, X, out_axes={"a": (None, 0)}, sum_match=True, error=OutputTypeError)


@pytest.mark.parametrize("thing", ["text", object(), abs, b"bytes", range(3)])
def test_rule_08_an_object_is_handed_back_where_out_axes_is_none(thing):
    for mapped in (vmap, loop):
        assert mapped(lambda x: (x, thing), out_axes=(0, None))(X)[1] is thing
    with pytest.raises(TypeError):  # JAX is stricter
        jax.vmap(lambda x: (x, thing), out_axes=(0, None))(X)


def test_rule_08_an_unmapped_object_is_handed_back_where_out_axes_is_none():
    module = torch.nn.ReLU()
    for mapped in (vmap, loop):
        assert mapped(lambda m, x: (m, x), in_axes=(None, 0), out_axes=(None, 0))(module, X)[0] is module
        with pytest.raises(OutputTypeError):
            mapped(lambda m, x: (m, x), in_axes=(None, 0))(module, X)


def test_rule_08_the_output_keeps_its_containers(agree):
    found = agree(lambda x: {"b": [x, (x,)], "a": Point(x, None), "c": Result(x, OrderedDict(z=x, y=x))}, X)
    assert list(found) == ["b", "a", "c"] and list(found["c"].rest) == ["z", "y"]
    assert found["c"].kind == "plain"
    found = vmap(lambda x: defaultdict(int, a=x))(X)
    assert found.default_factory is int


@pytest.mark.parametrize("dtype", ["bool", "int8", "int32", "int64", "uint8", "float16", "float32", "float64", "complex64"])
def test_rule_08_dtypes_are_kept(agree, dtype):
    array = (X > 0) if dtype == "bool" else (X * 4).astype(dtype)
    found = agree(lambda x: (x, x[:2]), array, out_axes=(0, 1))
    assert found[0].dtype == getattr(torch, dtype)


def test_rule_08_an_output_may_be_an_input():
    x = torch.tensor(X)
    assert vmap(lambda x: x)(x).data_ptr() == x.data_ptr()
    assert torch.equal(vmap(lambda x: x, out_axes=1)(x), x.T)
    for mapped in (vmap, loop):
        a, b = mapped(lambda x: (x, x))(x)
        assert torch.equal(a, x) and torch.equal(b, x)


def test_rule_08_gradients_flow_through_broadcast_outputs():
    for mapped in (vmap, loop):
        weight = torch.ones(4, requires_grad=True)
        mapped(lambda x, w: w * 2, in_axes=(0, None))(torch.tensor(X), weight).sum().backward()
        assert torch.equal(weight.grad, torch.full((4,), 6.0))


# --- rule 9: out_axes=None -------------------------------------------------------------------------------------------


def test_rule_09_none_hands_back_an_unmapped_output_once(agree):
    agree(lambda x, y: y * 2, X, ROW, in_axes=(0, None), out_axes=None)
    agree(lambda x, y: (x, y), X, ROW, in_axes=(0, None), out_axes=(0, None))
    agree(lambda x: 3.5, X, out_axes=None)
    agree(lambda x: {"a": x, "b": {"c": 1, "d": True}}, X, out_axes={"a": 0, "b": None})
    agree.call(lambda lib: lib.vmap(lambda x: lib.np.ones(2), out_axes=None)(lib.array(X)))
    agree.call(lambda lib: lib.vmap(lambda x: (x, lib.np.zeros(2) + 1), out_axes=(0, None))(lib.array(X)))


def test_rule_09_what_is_handed_back_is_the_object_itself():
    row, array = torch.tensor(ROW), ROW
    for mapped in (vmap, loop):
        for shared in (row, array, 2.5, "text"):
            options = {"in_axes": (0, None), "out_axes": (0, None)}
            assert mapped(lambda x, y: (x, y), **options)(torch.tensor(X), shared)[1] is shared


def test_rule_09_none_for_a_varying_output_is_an_error(agree):
    agree(double, X, out_axes=None, error=UnmappedOutputError)
    agree(lambda x: x, X, out_axes=None, error=UnmappedOutputError)
    agree(lambda x: (x, x), X, out_axes=(0, None), error=UnmappedOutputError)
    agree(lambda x: {"a": [1.0, x.sum()]}, X, out_axes=None, error=UnmappedOutputError)
    agree(lambda x, w: w, X, kwargs={"w": X}, out_axes=None, error=UnmappedOutputError)


@pytest.mark.parametrize("size", [0, 1])
def test_rule_09_a_batch_of_none_or_one_varies_too(agree, size):
    agree(double, X[:size], out_axes=None, error=UnmappedOutputError)
    agree(lambda x: (x.sum(), 2.0), X[:size], out_axes=(0, None))


def test_rule_09_sum_match_sums_what_varies(agree):
    agree(double, X, out_axes=None, sum_match=True)
    agree(double, X, in_axes=1, out_axes=None, sum_match=True)
    agree(lambda x: (x, x.sum(), {"a": x}), X, out_axes=(0, None, None), sum_match=True)
    agree(lambda x: x > 0, X, out_axes=None, sum_match=True)
    agree(lambda x: x, (X * 4).astype(np.int32), out_axes=None, sum_match=True)
    agree(lambda x: x, (X * 4).astype(np.complex64), out_axes=None, sum_match=True)


def test_rule_09_samples_that_are_alike_by_chance_vary_too(agree):
    ones = np.ones((3, 2), np.float32)
    agree(double, ones, out_axes=None, error=UnmappedOutputError)
    agree(double, ones, out_axes=None, sum_match=True)


def test_rule_09_sum_match_leaves_what_does_not_vary(agree):
    agree(lambda x, y: (x, y * 2, 3.0), X, ROW, in_axes=(0, None), out_axes=None, sum_match=True)
    agree(lambda x, y: (x, y, 3.0), X, ROW, in_axes=(0, None), out_axes=0, sum_match=True)


@pytest.mark.parametrize("size", [0, 1])
def test_rule_09_sum_match_over_small_batches(agree, size):
    agree(double, X[:size], out_axes=None, sum_match=True)


@pytest.mark.parametrize("chunk_size", [1, 2, 3, 4])
def test_rule_09_sum_match_in_chunks(chunk_size):
    options = {"in_axes": (0, None), "out_axes": (None, None, 1), "sum_match": True, "chunk_size": chunk_size}
    found = vmap(lambda x, y: (x * 2, y * 2, x), **options)(X, torch.tensor(ROW))
    expected = loop(lambda x, y: (x * 2, y * 2, x), **options)(X, torch.tensor(ROW))
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b)


def test_rule_09_sum_match_counts_as_a_truth_value():
    for value in (1, "yes", [0]):
        assert torch.equal(vmap(double, out_axes=None, sum_match=value)(X), torch.tensor(X).mul(2).sum(0))


def test_rule_09_none_in_a_nested_map_is_about_its_own_axis(agree):
    def call(lib):
        inner = lib.vmap(lambda x, y: (x + y, x * 2), in_axes=(None, 0), out_axes=(0, None))
        return lib.vmap(inner)(lib.array(X), lib.array(X))

    agree.call(call)
    agree.call(lambda lib: lib.vmap(lambda x: lib.vmap(double, out_axes=None)(x))(lib.array(X)), UnmappedOutputError)
    agree.call(lambda lib: lib.vmap(lambda x: lib.vmap(double, out_axes=None, sum_match=True)(x))(lib.array(X)))
