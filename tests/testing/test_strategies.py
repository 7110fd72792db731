"""The strategies for arrays, trees and axes: what they make, and what it shrinks to."""

from __future__ import annotations

import dataclasses
import importlib
import math
import sys
from collections import OrderedDict

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, find, given, settings
from hypothesis import strategies as st
from hypothesis.errors import NoSuchExample

import torchbatch
from torchbatch import tree
from torchbatch.errors import AxisError, AxisSpecError, TorchbatchError
from torchbatch.testing import loop, strategies
from torchbatch.testing.strategies import (
    LAYOUTS,
    NODES,
    Pair,
    Record,
    arrays,
    axes_for,
    dtypes,
    out_axes_for,
    pytrees,
    shapes,
    tensors,
)

few = settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
ALL_DTYPES = [
    *(torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8),
    *(torch.uint8, torch.bool, torch.complex64, torch.complex128),
]


def simplest(strategy, holds=lambda value: True):
    quick = settings(max_examples=1000, phases=[Phase.generate, Phase.shrink], report_multiple_bugs=False, database=None)
    return find(strategy, holds, settings=quick)


# --- shapes and dtypes -----------------------------------------------------------------------------------------------


class TestShapes:
    @given(shapes(min_dims=1, max_dims=2, min_side=2, max_side=3))
    def test_bounds_hold(self, shape):
        assert 1 <= len(shape) <= 2 and set(shape) <= {2, 3}

    def test_empty_axes_are_among_them_and_count_as_the_least_simple(self):
        assert simplest(shapes(), lambda shape: 0 in shape) == (0,)
        assert simplest(shapes(), lambda shape: len(shape) == 3) == (1, 1, 1)
        assert simplest(shapes()) == ()

    @pytest.mark.parametrize("bounds", [{"min_dims": 3, "max_dims": 2}, {"min_side": -1}, {"min_side": 5}])
    def test_bounds_that_no_shape_has(self, bounds):
        with pytest.raises(AxisSpecError, match="shapes: there is no shape with"):
            shapes(**bounds)


class TestDtypes:
    @pytest.mark.parametrize("dtype", ALL_DTYPES)
    def test_every_dtype_is_made(self, dtype):
        assert simplest(dtypes(), lambda found: found == dtype) is dtype

    def test_float32_comes_first(self):
        assert simplest(dtypes()) is torch.float32
        assert simplest(dtypes(exclude=[torch.float32])) is torch.float64

    def test_unknown_kind(self):
        with pytest.raises(AxisSpecError, match="no kind 'real'; the kinds are 'float', 'int', 'bool', 'complex'"):
            dtypes("real")

    def test_nothing_left(self):
        with pytest.raises(AxisSpecError, match="exclude leaves no dtype"):
            dtypes("bool", exclude=[torch.bool])


# --- values ----------------------------------------------------------------------------------------------------------


class TestValues:
    @few
    @given(dtypes().flatmap(lambda dtype: st.tuples(st.just(dtype), tensors((2, 3), dtype))))
    def test_ordinary_values_are_finite_and_at_most_ten(self, drawn):
        dtype, x = drawn
        assert x.dtype is dtype and x.shape == (2, 3)
        parts = torch.view_as_real(x.resolve_conj()) if x.is_complex() else x
        assert parts.double().abs().max() <= 10

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
    @pytest.mark.parametrize(
        ("name", "holds"),
        {
            "nan": lambda x, info: x != x,
            "inf": lambda x, info: x == math.inf,
            "minus inf": lambda x, info: x == -math.inf,
            "minus zero": lambda x, info: x == 0 and math.copysign(1, x) < 0,
            "subnormal": lambda x, info: 0 < x < info.smallest_normal,
            "largest": lambda x, info: x == info.max,
            "smallest": lambda x, info: x == info.min,
        }.items(),
        ids=lambda item: item if isinstance(item, str) else "",
    )
    def test_special_floats(self, dtype, name, holds):
        info = torch.finfo(dtype)
        assert simplest(tensors((), dtype, special_values=True), lambda x: holds(x.item(), info)).dtype is dtype

    @pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64])
    def test_extremes_of_integers(self, dtype):
        info = torch.iinfo(dtype)
        for extreme in (info.min, info.max):
            assert simplest(tensors((), dtype, special_values=True), lambda x: x.item() == extreme).item() == extreme  # noqa: B023

    def test_special_complex_numbers(self):
        found = simplest(tensors((), torch.complex64, special_values=True), lambda x: math.isnan(x.item().imag))
        assert found.item().real == 0

    @few
    @given(dtypes(exclude=[torch.bool]).flatmap(lambda d: tensors((3,), d, min_value=0.3, max_value=4.7, special_values=True)))
    def test_bounds_hold_for_special_values_too(self, x):
        parts = torch.view_as_real(x) if x.is_complex() else x
        parts = parts.double()
        assert ((parts >= 0.3) & (parts <= 4.7)).all() or x.is_complex()  # the imaginary part may be left at 0
        assert (parts[..., 0] >= 0.3).all() if x.is_complex() else True

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_one_bound_alone(self, dtype):
        assert simplest(tensors((), dtype, min_value=100.0)).item() == 100
        assert simplest(tensors((), dtype, max_value=-100.0)).item() <= -100

    def test_bounds_between_which_there_is_nothing(self):
        with pytest.raises(AxisSpecError, match=r"there is no int32 from min_value=0.2 to max_value=0.8"):
            simplest(tensors((), torch.int32, min_value=0.2, max_value=0.8))
        with pytest.raises(AxisSpecError, match="min_value must not be above max_value, but they are 2 and 1"):
            simplest(tensors((), torch.float32, min_value=2, max_value=1))

    def test_elements_of_ones_own(self):
        assert simplest(tensors((2,), torch.float32, elements=st.just(0.5))).tolist() == [0.5, 0.5]


# --- layouts ---------------------------------------------------------------------------------------------------------


LAYOUT_HOLDS = {
    "contiguous": lambda x: x.is_contiguous() and x.storage_offset() == 0,
    "transposed": lambda x: not x.is_contiguous() and x.storage_offset() == 0 and min(x.stride()) == 1,
    "strided": lambda x: math.prod(x.shape) < x.untyped_storage().nbytes() // x.itemsize and not x.storage_offset(),
    "expanded": lambda x: 0 in x.stride(),
    "storage_offset": lambda x: x.storage_offset() > 0 and x.is_contiguous(),
}


class TestLayouts:
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_each_layout_is_what_it_says(self, layout):
        @settings(max_examples=20)
        @given(tensors((2, 3), torch.float32, layouts=[layout]))
        def holds(x):
            assert LAYOUT_HOLDS[layout](x)

        holds()

    @few
    @given(tensors())
    def test_gaps_are_never_seen(self, x):
        assert not (x.isnan().any() if x.is_floating_point() or x.is_complex() else (x == 77).any())

    @few
    @given(st.data())
    def test_numbers_do_not_depend_on_the_layout(self, data):
        """An array of ones is one of ones wherever it lies, and can be written to, but for expanded ones."""
        x = data.draw(tensors((2, 2, 2), torch.float32, elements=st.just(1.0)))
        assert torch.equal(x, torch.ones(2, 2, 2))
        if 0 not in x.stride():
            x[0, 1, 0] = 5
            assert x.sum() == 12

    def test_what_a_shape_cannot_have_is_left_out(self):
        assert simplest(tensors((), torch.float32, layouts=["transposed", "expanded"])).is_contiguous()
        assert simplest(tensors((0, 3), torch.float32, layouts=["expanded"])).shape == (0, 3)

    @few
    @given(arrays((3, 2), np.float64, layouts=["negative_stride"]))
    def test_negative_strides(self, x):
        assert min(x.strides) < 0 and np.isfinite(x).all()

    def test_numpy_arrays_in_memory(self):
        assert simplest(arrays((2, 2), "int32", layouts=["expanded"])).flags.writeable is False
        assert simplest(arrays((2, 2), "int32", layouts=["strided"])).flags.c_contiguous is False

    @pytest.mark.parametrize(("layouts", "text"), [(["negative_stride"], "PyTorch has no negative strides"), ([], "layout ''")])
    def test_unknown_layouts(self, layouts, text):
        with pytest.raises(AxisSpecError, match=text):
            tensors(layouts=layouts)


class TestArraysAndTensors:
    def test_the_simplest_ones(self):
        x = simplest(tensors())
        assert x.shape == () and x.dtype is torch.float32 and x.item() == 0 and not x.requires_grad
        array = simplest(arrays(), lambda array: array.size > 1)
        assert array.shape == (2,) and array.dtype == np.float32 and not array.any()

    def test_shrunk_values_are_whole_numbers(self):
        x = simplest(tensors((2, 2), torch.float32, special_values=True), lambda x: x.sum() > 1)
        assert x.is_contiguous() and sorted(x.flatten().tolist()) == [0, 0, 0, 2]

    @few
    @given(tensors((2,), requires_grad=True))
    def test_gradients_where_the_dtype_can(self, x):
        assert x.requires_grad is (x.is_floating_point() or x.is_complex()) and x.is_leaf

    def test_gradients_by_a_strategy(self):
        assert not simplest(tensors((), torch.float32, requires_grad=st.booleans())).requires_grad

    def test_device(self):
        assert simplest(tensors((2,), torch.float32, device="meta")).device.type == "meta"

    @pytest.mark.parametrize("dtype", [torch.float64, np.float64, "float64", np.dtype("f8")])
    def test_dtypes_of_both_libraries(self, dtype):
        assert simplest(tensors((), dtype)).dtype is torch.float64
        assert simplest(arrays((), dtype)).dtype == np.float64

    def test_bfloat16_in_numpy(self):
        pytest.importorskip("ml_dtypes")
        assert simplest(arrays((1,), torch.bfloat16)).dtype.name == "bfloat16"

    def test_bfloat16_without_ml_dtypes(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "ml_dtypes", None)
        with pytest.raises(TypeError, match=r"pip install ml_dtypes .*exclude=\[torch.bfloat16\]"):
            simplest(arrays((), torch.bfloat16))

    @pytest.mark.parametrize(("shape", "dtype"), [((-1,), torch.float32), ((2.0,), torch.float32), ((), "no dtype")])
    def test_wrong_shapes_and_dtypes(self, shape, dtype):
        with pytest.raises(AxisSpecError, match="must be a"):
            simplest(tensors(shape, dtype))

    def test_shape_by_a_strategy_or_a_number(self):
        assert simplest(tensors(st.just((1, 2)))).shape == (1, 2)
        assert simplest(tensors(3)).shape == (3,)


# --- trees -----------------------------------------------------------------------------------------------------------


KINDS = {"tuple": tuple, "list": list, "dict": dict, "OrderedDict": OrderedDict, "namedtuple": Pair, "dataclass": Record}


class TestTrees:
    @pytest.mark.parametrize("node", KINDS)
    def test_every_node_is_made_and_no_other(self, node):
        found = simplest(pytrees(st.just(1), nodes=[node]), lambda value: len(tree.leaves(value)) == 2)
        assert type(found) is KINDS[node] and tree.leaves(found) == [1, 1]

    def test_none_is_a_tree(self):
        assert simplest(pytrees(st.just(1)), lambda value: value is None) is None

    def test_shrinking(self):
        assert simplest(pytrees(st.just(1))) == 1
        assert simplest(pytrees(st.just(1)), lambda value: len(tree.leaves(value)) == 3) in [(1, 1, 1), (1, (1, 1))]

    def test_leaves_are_tensors_by_default(self):
        assert torch.equal(simplest(pytrees()), torch.zeros(()))

    @few
    @given(pytrees(st.just(1), max_leaves=4))
    def test_they_are_trees_for_all(self, value):
        leaves, structure = tree.flatten(value)
        assert set(leaves) <= {1} and tree.unflatten(structure, leaves) == value

    def test_records_in_jax(self):
        jax = pytest.importorskip("jax")
        strategies.register_with_jax()
        strategies.register_with_jax()
        assert jax.tree.leaves(Record(1, (2, 3))) == [1, 2, 3]

    def test_without_jax(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "jax", None)
        with pytest.raises(ImportError, match=r"pip install 'torchbatch\[jax\]'"):
            strategies.register_with_jax()

    def test_unknown_node(self):
        with pytest.raises(AxisSpecError, match=f"no node 'set'; the nodes are {', '.join(map(repr, NODES))}"):
            pytrees(nodes=["set"])


# --- axes ------------------------------------------------------------------------------------------------------------


def small(*shapes_):
    return tuple(torch.arange(float(math.prod(shape))).reshape(shape) for shape in shapes_)


some_trees = pytrees(tensors(shapes(max_dims=2, max_side=3), torch.float32), max_leaves=3)
some_arguments = st.lists(some_trees, min_size=1, max_size=3).map(tuple)


def can_be_mapped(args):
    return any(leaf.ndim for leaf in tree.leaves(args))


def total(*args):
    return sum((leaf.sum() for leaf in tree.leaves(args)), start=torch.zeros(()))


class TestAxes:
    @settings(few, max_examples=60)
    @given(some_arguments.filter(can_be_mapped), st.data())
    def test_legal_axes_are_taken_by_vmap_and_by_the_loop(self, args, data):
        in_axes = data.draw(axes_for(args))
        ours, theirs = torchbatch.vmap(total, in_axes)(*args), loop(total, in_axes)(*args)
        torch.testing.assert_close(ours, theirs)

    @settings(few, max_examples=25)
    @given(some_arguments.filter(can_be_mapped), st.data())
    def test_legal_axes_are_taken_by_jax(self, args, data):
        jax = pytest.importorskip("jax")
        strategies.register_with_jax()
        in_axes = data.draw(axes_for(args))
        arrays = tree.map(lambda x: x.numpy(), args)
        theirs = jax.vmap(lambda *xs: sum(leaf.sum() for leaf in jax.tree.leaves(xs)), in_axes)(*arrays)
        np.testing.assert_allclose(torchbatch.vmap(total, in_axes)(*args), theirs, rtol=1e-6)

    @settings(few, max_examples=60)
    @given(some_arguments.filter(can_be_mapped), st.data())
    def test_illegal_axes_are_refused_by_all(self, args, data):
        in_axes = data.draw(axes_for(args, legal=False))
        for transform in (torchbatch.vmap, loop):
            with pytest.raises(TorchbatchError):
                transform(total, in_axes)(*args)

    @pytest.mark.parametrize(
        "text", ["different sizes", "must be an int", "tree prefix", "entries", "nothing is mapped", "dimensions"]
    )
    def test_illegal_axes_are_of_every_kind(self, text):
        args = small((2, 3), (2, 3))

        def says(in_axes):
            with pytest.raises(TorchbatchError) as caught:
                loop(total, in_axes)(*args)
            return text in str(caught.value)

        simplest(axes_for(args, legal=False), says)

    @few
    @given(st.data())
    def test_sizes_agree(self, data):
        args = small((2, 3), (3,), (4, 3, 2))
        in_axes = data.draw(axes_for(args, none=False))
        each = (in_axes,) * 3 if isinstance(in_axes, int) else in_axes
        assert {x.shape[axis] for x, axis in zip(args, each, strict=True)} == {3}

    def test_options(self):
        args = small((2, 2))
        assert all(simplest(axes_for(args, negative=False), lambda a, w=w: a in (w, (w,))) is not None for w in (0, 1))
        with pytest.raises(NoSuchExample):
            simplest(axes_for(args, negative=False, none=False), lambda a: a not in (0, 1, (0,), (1,)))
        assert simplest(axes_for(args), lambda a: a == -1) == -1

    def test_shrinking(self):
        assert simplest(axes_for(small((2, 3), (2,)))) == 0
        args = ({"a": torch.ones(3, 2), "b": torch.ones(3)}, torch.ones(3, 2))
        assert simplest(axes_for(args), lambda axes: isinstance(axes, tuple)) == (0, 0)
        assert simplest(axes_for(args), lambda axes: isinstance(axes, tuple) and axes[1] == -2) == (0, -2)

    def test_what_is_no_array_is_not_mapped(self):
        assert simplest(axes_for(("a name", torch.ones(2)))) == (None, 0)
        assert simplest(axes_for((2.5, None, np.ones(2)), none=True), lambda a: True)[0] is None

    def test_a_given_size(self):
        assert simplest(axes_for(small((2, 3)), batch_size=3)) == 1

    def test_no_such_size(self):
        with pytest.raises(AxisError, match=r"no axis of size 7 in any array of the shapes \(2, 3\), \(\)"):
            axes_for(small((2, 3), ()), batch_size=7)
        with pytest.raises(AxisError, match=r"no axis of the same size in all arrays of the shapes \(2, 3\), \(4,\)"):
            axes_for(small((2, 3), (4,)), none=False)


class TestOutAxes:
    @few
    @given(pytrees(tensors(shapes(max_dims=2, min_side=1), torch.float32), max_leaves=3), st.data())
    def test_they_fit_what_is_returned(self, output, data):
        out_axes = data.draw(out_axes_for(output))
        assume(tree.leaves(output))

        def fun(x):
            return tree.map(lambda leaf: leaf + x, output)

        xs = torch.arange(3.0)
        ours, theirs = torchbatch.vmap(fun, 0, out_axes)(xs), loop(fun, 0, out_axes)(xs)
        for a, b in zip(tree.leaves(ours), tree.leaves(theirs), strict=True):
            assert torch.equal(a, b)

    def test_stand_ins_and_numbers(self):
        struct = torchbatch.ShapeDtypeStruct((2, 3), torch.float32)
        assert simplest(out_axes_for((struct, 1.0)), lambda axes: axes == (-3, -1)) == (-3, -1)
        assert simplest(out_axes_for(struct, negative=False), lambda axis: axis == 2) == 2

    def test_no_array(self):
        with pytest.raises(AxisError, match="must be an array, a number or have a shape, but it is 'text' of type str"):
            out_axes_for("text")


# --- the package -----------------------------------------------------------------------------------------------------


def test_without_hypothesis(monkeypatch):
    monkeypatch.setitem(sys.modules, "hypothesis", None)
    monkeypatch.delitem(sys.modules, "torchbatch.testing.strategies")
    with pytest.raises(ModuleNotFoundError, match="pip install hypothesis") as caught:
        importlib.import_module("torchbatch.testing.strategies")
    assert caught.value.name == "hypothesis"


def test_every_public_name_is_there_and_documented():
    for name in strategies.__all__:
        found = getattr(strategies, name)
        assert not callable(found) or found.__doc__


def test_records_are_plain_dataclasses():
    assert dataclasses.asdict(Record(1, 2)) == {"left": 1, "right": 2, "tag": "tag"}
