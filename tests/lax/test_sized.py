"""Functions with a fixed size: against live JAX and NumPy, one call and under vmap, eager and traced."""

from __future__ import annotations

import re
from functools import partial

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from torchbatch import grad, jit, lax, vmap
from torchbatch.errors import AxisError, AxisSpecError, DataDependentError, InputTypeError, TorchbatchError
from torchbatch.testing import assert_close

ROWS = np.array([[0, 3, 0, 3], [5, 0, 7, 5], [0, 0, 0, 0], [1, 2, 3, 4]], np.int64)


@pytest.fixture(scope="module")
def jnp():
    jax = pytest.importorskip("jax")
    return jax.numpy


def same(ours, theirs):
    ours, theirs = (value if isinstance(value, tuple) else (value,) for value in (ours, theirs))
    assert len(ours) == len(theirs)
    for mine, other in zip(ours, theirs, strict=True):
        assert tuple(mine.shape) == other.shape
        assert_close(mine.numpy(), other, dtypes=False)


NAMES = ["nonzero", "argwhere", "flatnonzero", "where"]
OPTIONS = [{"size": 3}, {"size": 6, "fill_value": -1}, {"size": 0}, {"size": 6}, {}]
UNIQUE = [
    {"size": 3},
    {"size": 6, "fill_value": 9},
    {"size": 2, "return_index": True, "return_inverse": True, "return_counts": True},
    {"size": 6, "fill_value": 9, "return_index": True, "return_inverse": True, "return_counts": True},
    {"return_counts": True, "return_inverse": True},
]


ARRAYS = [ROWS, ROWS > 2, ROWS.astype(np.float32), ROWS[0], ROWS[:, :, None] * np.ones(2, np.int64)]
FLOATS = np.array([[np.nan, 1, np.nan], [np.nan, 1, np.nan], [0.5, 1, 2]], np.float32)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_hits_are_those_of_numpy(options):
    for value in ARRAYS:
        hits, tensor = np.argwhere(value), torch.tensor(value)
        if "size" in options:
            more = np.full((options["size"], value.ndim), options.get("fill_value", 0))
            hits = np.concatenate([hits, more])[: options["size"]]
        same(lax.argwhere(tensor, **options), hits)
        same(lax.nonzero(tensor, **options), tuple(hits.T))
        same(lax.where(tensor, **options), tuple(hits.T))
        if value.ndim == 1:
            same(lax.flatnonzero(tensor, **options), hits[:, 0])


@pytest.mark.parametrize("axis", [None, 0, 1, -1])
def test_without_a_size_unique_is_that_of_numpy(axis):
    everything = {"return_index": True, "return_inverse": True, "return_counts": True, "axis": axis}
    for value in (ROWS, ROWS[[1, 1, 0]], FLOATS):
        if axis is not None and value is FLOATS:
            continue  # NumPy tells rows with NaN apart
        ours, theirs = lax.unique(torch.tensor(value), **everything), list(np.unique(value, **everything))
        theirs[2] = theirs[2].reshape(tuple(ours[2].shape))  # another shape in each version of NumPy
        same(ours, tuple(theirs))
    same(lax.unique(torch.tensor(FLOATS), equal_nan=False), np.unique(FLOATS, equal_nan=False))


def calls_of_one(lib, x, floats):
    """What JAX compiles at once, which takes a tenth of the time of call by call."""
    yield from (getattr(lib, name)(x, **options) for name in NAMES for options in OPTIONS[:4])
    for axis in (None, 0, -1):
        yield from (lib.unique(x, axis=axis, **options) for options in UNIQUE[:4])
        yield lib.unique(floats, axis=axis, size=3, return_counts=True)
    yield lib.unique(floats, size=9, equal_nan=False)


def calls_of_many(lib, row):
    yield lib.nonzero(row, size=3, fill_value=-1)
    yield lib.argwhere(row, size=3)
    yield lib.flatnonzero(row, size=2, fill_value=7)
    yield lib.where(row > 2, size=2, fill_value=7)
    yield lib.where(row > 2, row, 0)
    yield lib.unique(row, size=3, fill_value=-1, return_index=True, return_inverse=True, return_counts=True)
    yield lib.unique(row.reshape(2, 2), axis=0, size=2, return_counts=True)


def test_as_in_jax(jnp):
    jax = pytest.importorskip("jax")
    theirs = jax.jit(lambda x, floats: list(calls_of_one(jnp, x, floats)))(ROWS, FLOATS)
    for mine, other in zip(calls_of_one(lax, torch.tensor(ROWS), torch.tensor(FLOATS)), theirs, strict=True):
        same(mine, other)


@pytest.mark.parametrize("run", [lambda f: f, partial(jit, backend="eager")], ids=["eager", "jit"])
def test_under_vmap_as_in_jax(jnp, run):
    jax = pytest.importorskip("jax")
    theirs = jax.jit(jax.vmap(lambda row: list(calls_of_many(jnp, row))))(ROWS)
    ours = run(vmap(lambda row: list(calls_of_many(lax, row))))(torch.tensor(ROWS))
    nested = vmap(vmap(lambda row: list(calls_of_many(lax, row))), in_axes=1)(torch.tensor(ROWS[:, None]))
    for mine, deep, other in zip(ours, nested, theirs, strict=True):
        same(mine, other)
        same(tuple(leaf[0] for leaf in deep) if isinstance(deep, tuple) else deep[0], other)


@settings(max_examples=40)
@given(st.lists(st.lists(st.integers(0, 3), min_size=4, max_size=4), min_size=1, max_size=3), st.integers(0, 6))
def test_any_rows(rows, size):
    x = torch.tensor(rows)
    found = vmap(lambda row: lax.nonzero(row, size=size, fill_value=-1)[0])(x)
    values, counts = vmap(lambda row: lax.unique(row, size=size, fill_value=-1, return_counts=True))(x)
    for row, mine, value, count in zip(rows, found.tolist(), values.tolist(), counts.tolist(), strict=True):
        hits = [i for i, entry in enumerate(row) if entry]
        assert mine == (hits + [-1] * size)[:size]
        known = sorted(set(row))
        assert value == (known + [-1] * size)[:size]
        assert count == ([row.count(entry) for entry in known] + [0] * size)[:size]


def test_a_fill_for_each_axis_and_for_each_sample(jnp):
    same(lax.nonzero(torch.tensor(ROWS), size=9, fill_value=(8, 9)), jnp.nonzero(ROWS, size=9, fill_value=(8, 9)))
    found = vmap(lambda row, fill: lax.flatnonzero(row, size=3, fill_value=fill))(torch.tensor(ROWS), torch.arange(10, 14))
    assert found.tolist() == [[1, 3, 10], [0, 2, 3], [12, 12, 12], [0, 1, 2]]
    assert lax.unique(torch.tensor([2, 1, 2]), size=3).tolist() == [1, 2, 1]


def test_single_numbers_and_empty_arrays(jnp):
    assert lax.argwhere(torch.tensor(3.0), size=2).shape == jnp.argwhere(jnp.array(3.0), size=2).shape == (2, 0)
    same(lax.flatnonzero(torch.tensor(3.0), size=2), jnp.flatnonzero(jnp.array(3.0), size=2))
    assert [index.tolist() for index in lax.nonzero(torch.zeros(0, 3), size=2, fill_value=7)] == [[7, 7], [7, 7]]
    options = {"size": 3, "fill_value": 2, "return_counts": True, "return_index": True, "return_inverse": True}
    same(lax.unique(torch.zeros(0), **options), jnp.unique(jnp.zeros(0), **options))
    assert lax.unique(torch.zeros(0)).shape == (0,)
    options["size"] = 2
    same(lax.unique(torch.tensor(5), **options), jnp.unique(jnp.array(5), **options))


def test_gradients_flow_through_the_values():
    x = torch.tensor([3.0, 1.0, 3.0])
    assert grad(lambda x: (lax.unique(x, size=3, fill_value=0) * torch.tensor([1.0, 10.0, 100.0])).sum())(x).tolist() == [
        10,
        1,
        0,
    ]
    assert vmap(grad(lambda x: x[lax.nonzero(x, size=2)].prod()))(torch.tensor([[0.0, 2.0, 5.0]])).tolist() == [[0, 5, 2]]


@pytest.mark.parametrize("name", ["nonzero", "argwhere", "flatnonzero", "unique", "where"])
def test_inside_vmap_a_size_is_needed(name):
    who = "nonzero" if name == "where" else name
    message = f"{who} without a size has as many entries as there are hits, and that number differs from sample"
    with pytest.raises(DataDependentError, match=re.escape(message)):
        vmap(getattr(lax, name))(torch.tensor(ROWS))
    with pytest.raises(TorchbatchError):
        jit(getattr(lax, name), backend="eager")(torch.tensor(ROWS))
    shared = torch.tensor([0, 1, 1])
    assert vmap(lambda x: x + lax.flatnonzero(shared).sum())(torch.zeros(2)).tolist() == [3, 3]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: lax.nonzero(x[0, 0]), AxisError, "nonzero takes an array with at least one axis, but it got a single number"),
        (lambda x: lax.nonzero("a"), InputTypeError, "nonzero takes an array, but it got 'a' of type str"),
        (lambda x: lax.nonzero(x, size=-1), AxisError, "nonzero: size must not be negative, but it is -1"),
        (lambda x: lax.unique(x, size=2.5), AxisSpecError, "unique: size must be an int or None, but it is 2.5"),
        (
            lambda x: lax.nonzero(x, size=2, fill_value=(1, 2, 3)),
            AxisError,
            "a tuple with one for each of the 2 axes, but it is (1, 2, 3)",
        ),
        (lambda x: lax.argwhere(x, size=2, fill_value=torch.ones(2)), AxisError, "fill_value must be a number, or a tuple"),
        (lambda x: lax.unique(x, axis=2), AxisError, "unique: axis 2 is out of bounds for int64[4,4]"),
        (lambda x: lax.unique(x[:0], size=2), AxisError, "unique: the array is empty, so 2 values can only be fill_value"),
        (lambda x: lax.where(x, x, 0, size=2), AxisError, "where takes size and fill_value only with a condition alone"),
        (lambda x: lax.where(x, x), AxisSpecError, "where takes both x and y, or neither, but y is None"),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=re.escape(message)):
        call(torch.tensor(ROWS))
