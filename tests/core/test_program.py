"""A function traced for one kind of call: the trees around the graph."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

from torchbatch import vmap
from torchbatch.core.frames import in_scope
from torchbatch.core.program import Program, mapped_sizes
from torchbatch.core.signature import StaticArguments, bind
from torchbatch.errors import OutputTypeError
from torchbatch.testing import assert_close

X = torch.tensor([1.0, 2.0, 3.0])


def program(fun, *args, nums=None, **kwargs):
    return Program(bind(fun, StaticArguments(fun, nums, None), args, kwargs))


def run(made):
    """What a program gives for the call that it was made of."""
    return made.structure.unflatten(made.trace.graph(*made.call.values, *made.trace.captured))


def test_trees_on_both_sides():
    def fun(p, n, *, how):
        return {"y": (p["w"] * n, [p["b"]]), "none": None, "how": how + 1}

    found = run(program(fun, {"w": X, "b": X[0]}, 2, how=3.0))
    assert found.keys() == {"y", "none", "how"} and found["none"] is None
    assert_close(found["y"], (X * 2, [X[0]]))
    assert_close(found["how"], torch.tensor(4.0))


def test_static_values_reach_the_function_as_they_are():
    seen = []
    run(program(lambda x, how, n: (seen.append((how, n)), x)[1], X, "sum", 2, nums=(1, 2)))
    assert seen == [("sum", 2)]


@pytest.mark.parametrize(
    ("value", "dtype"),
    [
        (3, torch.int64), (True, torch.bool), (2.5, torch.float32), (1j, torch.complex64), (np.float64(2.5), torch.float64),
        (np.arange(3, dtype=np.int16), torch.int16), (np.bool_(True), torch.bool),
    ],
)  # fmt: skip
def test_numbers_and_arrays_become_tensors(value, dtype):
    found = run(program(lambda x: (x, value), X))[1]
    assert found.dtype is dtype and torch.equal(found, torch.as_tensor(value).to(dtype))


def test_numbers_of_the_default_dtype():
    torch.set_default_dtype(torch.float64)
    try:
        assert run(program(lambda n: (n, 2.5), 1.5))[0].dtype is torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(("output", "single"), [(lambda x: x, True), (lambda x: [x], False), (lambda x: (x, x), False)])
def test_single(output, single):
    assert program(output, X).single is single


def test_an_output_that_is_no_array():
    with pytest.raises(OutputTypeError, match=r"jit: output\['a'\]\[1\] of <lambda> is 'text' of type str"):
        program(lambda x: {"a": [x, "text"]}, X)


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_gradients_are_recorded_where_they_are_enabled(mode):
    with mode():
        trace = program(lambda x: x * 2, X.clone().requires_grad_()).trace
    assert bool(trace.wanted) is (mode is torch.enable_grad)


def test_modules_that_run_are_remembered():
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Dropout(0.5))
    modules = program(model, torch.ones(2, 3)).modules
    assert modules and modules.same()
    model[1].eval()
    assert not modules.same()


OTHER = torch.nn.Dropout(0.5)


def test_modules_that_another_thread_runs_do_not_count():
    def fun(x):
        thread = threading.Thread(target=lambda: globals()["OTHER"](torch.ones(2)))
        thread.start()
        thread.join()
        return x * 2

    assert not program(fun, X).modules


def test_mapped_sizes():
    def fun(x, y):
        return vmap(vmap(lambda a: a * 2))(x), vmap(torch.sum, axis_size=7, in_axes=None)(y), y.sum(0)

    call = bind(fun, StaticArguments(fun, None, None), (torch.ones(4, 5, 6), torch.ones(3)), {})
    assert mapped_sizes(call) == {4, 5, 7}
    none = bind(torch.sin, StaticArguments(torch.sin, None, None), (X,), {})
    assert mapped_sizes(none) == set()


def test_mapped_sizes_of_a_function_that_fails():
    def fun(x):
        return vmap(lambda a: a @ torch.ones(9))(x)

    call = bind(fun, StaticArguments(fun, None, None), (torch.ones(4, 5),), {})
    stack = in_scope.stack
    with pytest.raises(RuntimeError):
        mapped_sizes(call)
    assert in_scope.stack is stack and stack == []
