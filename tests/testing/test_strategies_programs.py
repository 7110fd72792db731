"""Random programs: the same in all libraries, well conditioned, and what is printed is what runs."""

from __future__ import annotations

import inspect
import os
import sys
import traceback

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, find, given, settings
from hypothesis import strategies as st

import torchbatch
from torchbatch import tree
from torchbatch.errors import AxisSpecError
from torchbatch.testing import loop
from torchbatch.testing.strategies import Program, batched_calls, programs
from torchbatch.testing.strategies.operations import OPERATIONS

LONG = os.environ.get("HYPOTHESIS_PROFILE") == "long"
few = settings(max_examples=2000 if LONG else 40, suppress_health_check=list(HealthCheck))
fewer = settings(few, max_examples=400 if LONG else 15)
any_program = st.sampled_from([(True, True), (False, True), (False, False)]).flatmap(
    lambda kind: programs(differentiable=kind[0], continuous=kind[1])
)


def simplest(strategy, holds=lambda value: True):
    quick = settings(max_examples=3000, phases=[Phase.generate, Phase.shrink], report_multiple_bugs=False, database=None)
    return find(strategy, holds, settings=quick)


def samples(program, seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    return [rng.uniform(*program.domain, struct.shape).astype(dtype) for struct in program.arguments]


def assert_close(ours, theirs, program, tolerance=2e-4):
    mine, others = tree.leaves(ours), tree.leaves(theirs)
    assert len(mine) == len(others)
    for a, b in zip(mine, others, strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=tolerance, atol=tolerance, err_msg=str(program))


class TestOneFunction:
    @few
    @given(any_program)
    def test_torch_and_numpy_agree(self, program):
        args = samples(program)
        ours, theirs = program.torch(*map(torch.from_numpy, args)), program.numpy(*args)
        assert_close(ours, theirs, program)

    @fewer
    @given(programs(differentiable=False))
    def test_jax_agrees(self, program):
        pytest.importorskip("jax")
        args = samples(program)
        assert_close(program.torch(*map(torch.from_numpy, args)), program.jax(*args), program)

    @few
    @given(any_program)
    def test_the_outputs_are_those_that_it_says(self, program):
        outputs = program.torch(*map(torch.from_numpy, samples(program)))
        assert tree.structure(outputs) == tree.structure(program.outputs)
        for found, struct in zip(tree.leaves(outputs), tree.leaves(program.outputs), strict=True):
            assert found.shape == struct.shape and found.dtype == struct.dtype

    @few
    @given(programs(differentiable=False, continuous=False, calls=False))
    def test_every_line_has_the_shape_and_the_bound_that_it_says(self, program):
        (main,) = program.functions
        edge = [np.full(struct.shape, program.domain[1]) for struct in program.arguments]  # where bounds are reached
        names = {"np": np, **dict(zip(main.parameters, edge, strict=True))}
        for name, text in main.lines:
            names[name] = eval(text.for_library("numpy", "np"), names)
            assert np.shape(names[name]) == text.shape, str(program)
            assert np.abs(names[name]).max() <= text.bound * 1.001, str(program)

    @few
    @given(programs(differentiable=False))
    def test_it_is_well_conditioned(self, program):
        """Single precision is as good as double precision, and no number is large."""
        exact = program.torch(*(torch.from_numpy(x).double() for x in samples(program)))
        found = program.torch(*map(torch.from_numpy, samples(program)))
        assert_close(found, exact, program)
        assert all(leaf.abs().max() <= 51 for leaf in tree.leaves(exact))

    @fewer
    @given(programs(trees=False))
    def test_gradients_are_those_of_differences(self, program):
        args = [torch.from_numpy(x).requires_grad_() for x in samples(program, dtype=np.float64)]
        ways = torch.autograd.gradcheck(program.torch, args, atol=1e-5, rtol=1e-4) if program.length else True
        assert ways

    @few
    @given(any_program, st.data())
    def test_it_can_be_mapped(self, program, data):
        call = data.draw(batched_calls(program, batch_sizes=(1, 2)))
        ours, theirs = (f(program.torch, call.in_axes, call.out_axes)(*call.args) for f in (torchbatch.vmap, loop))
        assert_close(ours, theirs, program)
        assert all(leaf.abs().max() <= 2 for leaf in tree.leaves(call.args))

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    def test_dtype(self, dtype):
        program = simplest(programs(dtype=st.just(dtype)), lambda program: program.length > 1)
        assert {struct.dtype for struct in tree.leaves((program.arguments, program.outputs))} == {dtype}


class TestOperations:
    @pytest.mark.parametrize(
        ("options", "words", "least"),
        [
            ({}, "exp( softmax logsumexp cumsum @ einsum concatenate reshape [None] swapaxes outer .sum .mean / -", 10),
            ({"differentiable": False}, "amax sort abs relu clip where maximum minimum", 4),
            ({"continuous": False}, "floor sign where", 2),
        ],
        ids=["smooth", "with kinks", "with jumps"],
    )
    def test_what_is_drawn(self, options, words, least):
        seen = []

        @settings(max_examples=200, phases=[Phase.generate], database=None, suppress_health_check=list(HealthCheck))
        @given(programs(**options))
        def collect(program):
            seen.append(str(program))

        collect()
        assert sum(word in "".join(seen) for word in words.split()) >= least

    @few
    @given(programs())
    def test_nothing_else_is_drawn(self, program):
        assert program.differentiable
        assert not any(word in str(program) for word in ("abs", "amax", "sort", "where", "floor", "sign", "maximum", "clip"))

    def test_which_are_not_smooth(self):
        names = {kind: {o.name for group in OPERATIONS for o in group if o.kind == kind} for kind in ("kinked", "jumps")}
        assert names["kinked"] == {"abs", "relu", "clip", "leaky", "maximum", "minimum", "max", "sort"}
        assert names["jumps"] == {"floor", "sign", "choose"}

    def test_there_are_many(self):
        assert sum(map(len, OPERATIONS)) >= 45

    @few
    @given(programs(max_arguments=1, max_lines=2, max_side=1, trees=False, calls=False))
    def test_limits(self, program):
        assert len(program.arguments) <= 1 and program.length <= 2 and len(program.functions) == 1
        assert isinstance(program.outputs, torchbatch.ShapeDtypeStruct)
        assert all(set(struct.shape) <= {1} for struct in program.arguments)

    @pytest.mark.parametrize("options", [{"max_arguments": 4}, {"max_lines": 0}, {"max_side": 5}])
    def test_limits_out_of_range(self, options):
        with pytest.raises(AxisSpecError, match=f"{next(iter(options))} must be from 1 to"):
            programs(**options)


class TestSource:
    def test_shrinking(self):
        assert repr(simplest(programs(), lambda program: program.length)) == "<Program f(x: f32[]): a = torch.sin(x); return a>"
        program = simplest(programs(), lambda program: "softmax" in str(program))
        assert repr(program) == "<Program f(x: f32[1]): a = torch.softmax(x, 0); return a>"

    def test_what_is_printed_is_what_runs(self):
        program = simplest(programs(), lambda program: program.length > 2)
        names = {}
        exec(str(program), names)
        args = [torch.from_numpy(x) for x in samples(program)]
        assert_close(names["f"](*args), program.torch(*args), program, tolerance=0)
        assert inspect.getsource(program.torch) in str(program)

    def test_a_call_of_a_second_function(self):
        program = simplest(programs(), lambda program: "g(x)\n" in str(program).partition("def f")[2])
        assert str(program).index("def g(x):") < str(program).index("def f(x):")
        args = samples(program)
        assert_close(program.torch(*map(torch.from_numpy, args)), program.numpy(*args), program)

    def test_source_of_each_library(self):
        program = simplest(programs(), lambda program: "sigmoid" in str(program))
        assert "torch.sigmoid(x)" in program.source()
        assert "jax.nn.sigmoid(x)" in program.source("jax")
        assert "1.0 / (1.0 + np.exp(-x))" in program.source("numpy")
        with pytest.raises(AxisSpecError, match="written for 'torch', 'jax', 'numpy', but not for 'tensorflow'"):
            program.source("tensorflow")

    def test_tracebacks_show_the_line(self):
        program = simplest(programs(), lambda program: program.length)
        with pytest.raises(TypeError) as caught:
            program.torch("text")
        assert "a = torch.sin(x)" in "".join(traceback.format_exception(caught.value))

    def test_without_jax(self, monkeypatch):
        program = simplest(programs())
        monkeypatch.setitem(sys.modules, "jax", None)
        with pytest.raises(ImportError, match=r"pip install 'torchbatch\[jax\]'"):
            _ = program.jax

    @few
    @given(any_program)
    def test_every_line_is_read_by_another(self, program):
        for function in program.functions:
            read = {name for _, text in function.lines for name in text.uses} | set(tree.leaves(function.result))
            assert all(name in read for name, _ in function.lines)

    def test_hypothesis_prints_one_line(self):
        program = simplest(programs())
        assert isinstance(program, Program)
        assert repr(program).count("\n") == 0
