"""The form of ``vmap`` that Dynamo traces, run in eager mode: the same results, and the same classes of errors."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from torchbatch import vmap
from torchbatch.errors import AxisError, InputTypeError, OutputTypeError, UnmappedOutputError
from torchbatch.testing import assert_close, loop

X, Y = torch.arange(12.0).view(3, 4), torch.ones(3, 4)
LINEAR = torch.nn.Linear(4, 2)


@pytest.fixture(autouse=True)
def traced(monkeypatch):
    monkeypatch.setattr("torchbatch.transforms.vmap._is_compiling", lambda: True)


CALLS = {
    "plain": lambda lib: lib(lambda v: v * 2)(X),
    "axes": lambda lib: lib(lambda a, b: a + b, (1, -2), -1)(X, X.t()),
    "None": lambda lib: lib(lambda a, b: (a + b, b), (0, None), (0, None))(X, Y[0]),
    "all None": lambda lib: lib(lambda a: a * 2, None, axis_size=2)(X),
    "trees": lambda lib: lib(lambda d: {"a": d["p"], "n": None}, ({"p": 0, "q": None},), {"a": 1, "n": 0})({"p": X, "q": "text"}),
    "keywords": lambda lib: lib(lambda a, *, k: a * k)(X, k=Y),
    "numbers": lambda lib: lib(lambda a: (1.0, True, torch.ones(2)), out_axes=(0, 0, -1))(X),
    "None argument": lambda lib: lib(lambda a, b: a)(X, None),
    "NumPy": lambda lib: lib(lambda a: a + 1)(np.ones((2, 3))),
    "module": lambda lib: lib(lambda m, a: m(a))(LINEAR, X),
    "sum": lambda lib: lib(lambda a: a, out_axes=None, sum_match=True)(X),
    "sum of what is the same": lambda lib: lib(lambda a: (a, 2.0, Y), out_axes=None, sum_match=True)(X),
    "chunks": lambda lib: lib(lambda a, b: (a * b, Y, 3.0), (0, None), (1, None, None), chunk_size=2)(X, Y[0]),
    "chunks, sum": lambda lib: lib(lambda a: a, out_axes=None, sum_match=True, chunk_size=2)(X),
    "empty": lambda lib: lib(lambda a: a.sum())(X[:0]),
    "nested": lambda lib: lib(lib(lambda s: s * 2), 1, 1)(X),
}


@pytest.mark.parametrize("name", CALLS)
def test_it_gives_what_the_loop_gives(name):
    assert_close(CALLS[name](vmap), CALLS[name](loop))


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: vmap(lambda a: a, ({"a": 0},))(X), AxisError,
         "in_axes ({'a': 0},) must be a tree prefix of the arguments of the mapped function."),
        (lambda: vmap(lambda a: a, out_axes={"a": 0})(X), AxisError,
         "out_axes {'a': 0} must be a tree prefix of the output of the mapped function."),
        (lambda: vmap(lambda a: a, (0, 0))(X), AxisError,
         "in_axes must have one entry per positional argument: 2 entries, 1 arguments."),
        (lambda: vmap(lambda a: a, 5)(X), AxisError, "axis 5 is out of bounds for a mapped argument of shape (3, 4)."),
        (lambda: vmap(torch.add)(X, X[:2]), AxisError, "vmap got axes of different sizes to map over: 3 and 2."),
        (lambda: vmap(lambda a: a, None)(X), AxisError,
         "vmap has nothing to map: no argument has an axis in in_axes, and axis_size is not given."),
        (lambda: vmap(lambda a: a, out_axes=9)(X), AxisError,
         "out_axes 9 is out of bounds: with the mapped axis the output has 2 dimensions."),
        (lambda: vmap(lambda a: a, out_axes=None)(X), UnmappedOutputError,
         "an output of the mapped function varies along the mapped axis, but its out_axes is None."),
        (lambda: vmap(lambda a: "text")(X), OutputTypeError, "the mapped function returned a str, which is not an array."),
        (lambda: vmap(torch.add)(X, 3.0), InputTypeError,
         "vmap is to map a float, which is not an array. Give None for it in in_axes."),
    ],
)  # fmt: skip
def test_its_errors(call, error, text):
    with pytest.raises(error) as caught:
        call()
    assert type(caught.value) is error and str(caught.value) == text
