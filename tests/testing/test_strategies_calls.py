"""Whole calls of ``vmap``, and what a failing one shows."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, find, given, settings
from hypothesis import strategies as st

import torchbatch
from torchbatch import ShapeDtypeStruct, tree
from torchbatch.errors import AxisSpecError
from torchbatch.testing import loop
from torchbatch.testing.strategies import BatchedCall, Pair, batched_calls, reproduced

few = settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow])


def simplest(strategy, holds=lambda value: True):
    quick = settings(max_examples=1000, phases=[Phase.generate, Phase.shrink], report_multiple_bugs=False, database=None)
    return find(strategy, holds, settings=quick)


def same(fun, call):
    """``vmap`` and the loop agree on a call."""
    ours, theirs = (transform(fun, call.in_axes, call.out_axes)(*call.args) for transform in (torchbatch.vmap, loop))
    assert tree.structure(ours) == tree.structure(theirs)
    for a, b in zip(tree.leaves(ours), tree.leaves(theirs), strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)
    return ours


def struct(*shape, dtype=torch.float32):
    return ShapeDtypeStruct(shape, dtype)


# --- signatures as text ----------------------------------------------------------------------------------------------


class TestText:
    @few
    @given(batched_calls("(n,k),(k,m)->(n,m)"))
    def test_a_product_of_matrices(self, call):
        found = same(torch.matmul, call)
        assert found.shape[call.out_axes] == call.axis_size

    @few
    @given(batched_calls("(n),()->(n),(n)"))
    def test_two_outputs(self, call):
        same(lambda x, y: (x * y, x + y), call)

    @few
    @given(batched_calls("(3,n)->(n,3)", sizes={"n": 2}, dtype=torch.float64))
    def test_sizes_that_are_given(self, call):
        (x,) = call.args
        assert x.dtype is torch.float64 and sorted(x.shape) == sorted([2, 3, call.axis_size])

    @pytest.mark.parametrize("wanted", [0, 1, 2, 3])
    def test_batch_sizes(self, wanted):
        call = simplest(batched_calls("(n)->()"), lambda call: call.axis_size == wanted)
        assert wanted in call.args[0].shape

    def test_batch_sizes_that_are_given(self):
        assert simplest(batched_calls("()->()", batch_sizes=[5])).axis_size == 5

    @pytest.mark.parametrize(
        "holds",
        [
            lambda call: isinstance(call.in_axes, tuple) and None in call.in_axes,
            lambda call: isinstance(call.in_axes, tuple) and -2 in call.in_axes,
            lambda call: call.in_axes == (1, 0),
            lambda call: call.out_axes == -1,
            lambda call: call.out_axes == 1,
            lambda call: not call.args[0].is_contiguous(),
        ],
        ids=["None", "negative", "moved", "last", "second", "strided"],
    )
    def test_what_there_is(self, holds):
        simplest(batched_calls("(n),(n)->(n)"), holds)

    @few
    @given(batched_calls("(n),(n)->(n)", none=False, negative=False))
    def test_what_can_be_left_out(self, call):
        axes = call.in_axes if isinstance(call.in_axes, tuple) else (call.in_axes,)
        assert all(axis is not None and axis >= 0 for axis in axes) and call.out_axes >= 0

    @few
    @given(batched_calls("(n),(n)->()", library="numpy", special_values=True, layouts=["contiguous"]))
    def test_numpy_arrays(self, call):
        assert all(isinstance(array, np.ndarray) and array.flags.c_contiguous for array in call.args)

    def test_dtypes_by_a_strategy(self):
        both = st.sampled_from([torch.float32, torch.int64])
        assert simplest(batched_calls("()->()", dtype=both), lambda call: call.args[0].dtype is torch.int64).axis_size == 1

    def test_gradients_and_bounds(self):
        call = simplest(batched_calls("()->()", requires_grad=True, min_value=3, max_value=4))
        assert call.args[0].requires_grad and call.args[0].tolist() == [3.0]

    def test_shrinking(self):
        call = simplest(batched_calls("(n,k),(k)->(n)"))
        assert repr(call) == "BatchedCall(f32[1,1,1], f32[1,1], in_axes=0, out_axes=0, axis_size=1)"
        assert not any(x.any() for x in call.args)

    @pytest.mark.parametrize("text", ["(n)", "n->n", "(n,)->()", "(n)->()->()", ""])
    def test_text_that_cannot_be_read(self, text):
        with pytest.raises(AxisSpecError, match=r"cannot be read. Write the axes .*'\(n,k\),\(k\)->\(n\)'"):
            simplest(batched_calls(text))

    def test_sizes_of_names_that_are_not_there(self):
        with pytest.raises(AxisSpecError, match=r"sizes has 'k', but the signature '\(n\)->\(n\)' has no such name"):
            simplest(batched_calls("(n)->(n)", sizes={"k": 2}))


# --- signatures as stand-ins -----------------------------------------------------------------------------------------


def affine(params, x):
    return {"y": params["w"] @ x + params["b"], "norm": x.norm()}


class TestStandIns:
    params = {"w": struct(2, 3), "b": struct(2)}  # noqa: RUF012

    @few
    @given(batched_calls((params, struct(3)), out={"y": struct(2), "norm": struct()}))
    def test_trees(self, call):
        same(affine, call)

    @few
    @given(batched_calls((params, struct(3))))
    def test_unknown_outputs_go_first_or_last(self, call):
        assert call.out_axes in (0, -1)
        same(affine, call)

    def test_entries_for_parts_of_a_tree(self):
        holds = lambda call: isinstance(call.in_axes, tuple) and isinstance(call.in_axes[0], dict)  # noqa: E731
        call = simplest(batched_calls((self.params, struct(3))), holds)
        assert set(call.in_axes[0]) == {"w", "b"}
        same(affine, call)

    @few
    @given(batched_calls((Pair(struct(2), [struct(), None]),), out=struct(2)))
    def test_other_nodes(self, call):
        same(lambda pair: pair.first * pair.second[0], call)

    @few
    @given(batched_calls([struct(2, dtype=torch.int64), struct(dtype=torch.bool)]))
    def test_dtypes(self, call):
        assert [x.dtype for x in call.args] == [torch.int64, torch.bool]

    def test_eval_shape_gives_the_outputs(self):
        args = (self.params, struct(3))
        calls = batched_calls(args, out=torchbatch.eval_shape(affine, *args))
        same(affine, simplest(calls, lambda call: isinstance(call.out_axes, dict) and call.out_axes["y"] == 1))

    def test_one_stand_in_is_one_argument(self):
        assert len(simplest(batched_calls(struct(2))).args) == 1

    @pytest.mark.parametrize("signature", [math.sin, (), (torch.ones(2),), {"x": 1}, None])
    def test_other_signatures(self, signature):
        with pytest.raises(AxisSpecError, match="the signature must be text"):
            batched_calls(signature)

    def test_other_libraries(self):
        with pytest.raises(AxisSpecError, match="library must be 'torch' or 'numpy', but it is 'cupy'"):
            batched_calls("()->()", library="cupy")


# --- how calls are shown ---------------------------------------------------------------------------------------------


def product(x, y):
    return (x * y).sum()


def broken(fun, in_axes, out_axes):
    """A vmap that forgets to move the axis of the second argument."""
    first, second = in_axes if isinstance(in_axes, tuple) else (in_axes, in_axes)
    return torchbatch.vmap(fun, (first, 0 if second is not None else None), out_axes)


class TestShown:
    def test_repr(self):
        args = ({"w": torch.ones(2, 3).t(), "k": "text"}, torch.ones(2, dtype=torch.bfloat16), np.ones((2, 2))[::-1])
        call = BatchedCall(args, ({"w": 1, "k": None}, 0, -1), 0, 2)
        assert repr(call) == (
            "BatchedCall({'w': f32[3,2] strides (1, 3), 'k': 'text'}, bf16[2], f64[2,2] strides (-2, 1), "
            "in_axes=({'w': 1, 'k': None}, 0, -1), out_axes=0, axis_size=2)"
        )

    def test_a_failing_case_shows_a_program(self):
        @settings(phases=[Phase.generate, Phase.shrink], report_multiple_bugs=False, database=None)
        @given(batched_calls("(n),(n)->()", sizes={"n": 2}, batch_sizes=[2]))
        def holds(call):
            with reproduced(product, call, transform="broken({fun}, {in_axes}, {out_axes})"):
                ours = broken(product, call.in_axes, call.out_axes)(*call.args)
                torch.testing.assert_close(ours, loop(product, call.in_axes, call.out_axes)(*call.args))

        with pytest.raises(AssertionError) as caught:
            holds()
        if sys.version_info < (3, 11):
            return  # hypothesis prints it
        notes = "\n".join(caught.value.__notes__)
        assert "call=BatchedCall(f32[2,2], f32[2,2], in_axes=" in notes
        program = notes[notes.index("import torch\n") :]
        assert "def product(x, y):" in program and "expected = torch.stack(outputs, dim=0)" in program
        assert "got = broken(product, " in program

    def test_outside_of_hypothesis_it_is_a_note_on_the_exception(self):
        call = BatchedCall((torch.ones(2),), 0, 0, 2)
        with pytest.raises(ZeroDivisionError) as caught, reproduced(torch.sin, call):
            raise ZeroDivisionError
        notes = getattr(caught.value, "__notes__", ["torch.sin(x0.select(0, i))"])  # Python 3.10 has none
        assert "torch.sin(x0.select(0, i))" in notes[0]

    def test_what_cannot_be_written_hides_no_failure(self):
        call = BatchedCall(("text",), 0, 0, 2)
        with pytest.raises(ZeroDivisionError) as caught, reproduced(torch.sin, call):
            raise ZeroDivisionError
        assert "There is no program" in getattr(caught.value, "__notes__", ["There is no program"])[0]

    def test_nothing_is_shown_where_nothing_fails(self):
        with reproduced(torch.sin, BatchedCall((torch.ones(2),), 0, 0, 2)):
            pass
