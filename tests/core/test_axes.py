"""Axis trees laid over the leaves of a call."""

from __future__ import annotations

import functools
from collections import namedtuple

import numpy as np
import pytest
import torch

from torchbatch.core.axes import (
    UNMAPPED,
    InAxes,
    argument_name,
    axis_size,
    is_axis,
    mapped_names,
    open_arguments,
    parse_prefix,
    shared_tensors,
)
from torchbatch.errors import AxisError, AxisSpecError, InputTypeError

X, Y = torch.arange(12.0).reshape(3, 4), torch.arange(6.0).reshape(2, 3)
Point = namedtuple("Point", "x y")


def fun(x, batch, /, scale=1, *rest, mode="a", **options):
    return x


def opened(in_axes, *args, **kwargs):
    return open_arguments(InAxes(in_axes), args, kwargs, fun)


@pytest.mark.parametrize("entry", [0, -1, 10**9, None])
def test_is_axis(entry):
    assert is_axis(entry)


@pytest.mark.parametrize("entry", [True, False, 0.0, "0", np.int64(0), torch.tensor(0), (0,), {}])
def test_is_not_an_axis(entry):
    assert not is_axis(entry)


def test_unmapped_shows_itself_as_none():
    assert repr(UNMAPPED) == "None" and repr({"a": UNMAPPED}) == "{'a': None}"


def test_parse_prefix_of_one_axis():
    assert parse_prefix(2, "it") == ((2,), None, 2)
    assert parse_prefix(None, "it") == ((None,), None, UNMAPPED)


def test_parse_prefix_of_a_tree():
    prefix = parse_prefix({"b": [0, None], "a": Point(None, -1)}, "it")
    assert prefix.axes == (None, -1, 0, None)
    assert prefix.sealed == {"b": [0, UNMAPPED], "a": Point(UNMAPPED, -1)}
    assert prefix.structure.num_leaves == 4


def test_parse_prefix_of_an_empty_tree():
    assert parse_prefix((), "it").axes == () and parse_prefix({"a": []}, "it").axes == ()


def test_parse_prefix_refuses_other_leaves():
    with pytest.raises(AxisSpecError, match=r"^it must be .* holds True of type bool\.$"):
        parse_prefix([0, {"a": True}], "it")


def test_in_axes_that_are_flat():
    assert InAxes((0, None, -1)).flat == (0, None, -1)
    assert InAxes([0]).flat == (0,) and InAxes(()).flat == ()
    assert InAxes(0).flat is None and InAxes(None).flat is None and InAxes((0, [1])).flat is None


def test_in_axes_for_arguments():
    assert [prefix.axes for prefix in InAxes(1).for_arguments(2)] == [(1,), (1,)]
    assert [prefix.axes for prefix in InAxes((0, [1, None])).for_arguments(2)] == [(0,), (1, None)]
    assert list(InAxes(()).for_arguments(0)) == []
    with pytest.raises(AxisError):
        InAxes((0,)).for_arguments(2)


def test_open_arguments_finds_what_is_mapped():
    mapped = opened((0, {"y": -1, "z": None}), X, {"y": [Y, Y], "z": "text"}, scale=X)
    assert [value.shape for value in mapped.values] == [(3, 4), (2, 3), (2, 3), (3, 4)]
    assert mapped.axes == [0, 1, 1, 0]


def test_open_arguments_rebuilds_around_other_values():
    marker = object()
    mapped = opened((0, {"y": -1, "z": None}), Point(X, None), {"y": [Y], "z": marker}, scale={"k": X})
    positional, keywords = mapped.rebuild(["a", "b", "c"])
    assert list(positional) == [Point("a", None), {"y": ["b"], "z": marker}]
    assert positional[1]["z"] is marker and keywords == {"scale": {"k": "c"}}


def test_open_arguments_can_be_rebuilt_again():
    mapped = opened(0, X, Y.T)
    assert mapped.rebuild([1, 2])[0] == [1, 2] and mapped.rebuild([3, 4])[0] == [3, 4]


def test_open_arguments_makes_tensors():
    mapped = opened(0, np.ones(3), [np.arange(3)])
    assert [type(value) for value in mapped.values] == [torch.Tensor] * 2


def test_open_arguments_lets_modules_pass():
    module = torch.nn.ReLU()
    mapped = opened(0, module, {"m": module, "x": X})
    assert len(mapped.values) == 1
    positional, _ = mapped.rebuild(["x"])
    assert positional[0] is module and positional[1] == {"m": module, "x": "x"}


def test_open_arguments_checks_every_leaf():
    with pytest.raises(InputTypeError, match=r"argument batch\['a'\]\[1\]"):
        opened(0, X, {"a": [X, "text"]})
    with pytest.raises(AxisError, match=r"argument options\['k'\]"):
        opened(0, X, k=torch.tensor(1))


def test_axis_size():
    names = lambda: pytest.fail("names are looked up for errors only")  # noqa: E731
    assert axis_size(opened(0, X), None, names) == 3
    assert axis_size(opened((0, -1), X, Y), None, names) == 3
    assert axis_size(opened(None, X), 7, names) == 7
    assert axis_size(opened(0, X), 3, names) == 3
    assert axis_size(opened(0, X[:0]), None, names) == 0


def test_mapped_names_are_in_the_order_of_the_values():
    in_axes, args, kwargs = InAxes((0, {"y": 0, "z": None})), (Point(X, [X]), {"y": (X,), "z": X}), {"mode": X, "k": {"j": X}}
    names = mapped_names(in_axes, args, kwargs, fun)
    assert names == ["x.x", "x.y[0]", "batch['y'][0]", "mode", "options['k']['j']"]
    assert len(open_arguments(in_axes, args, kwargs, fun).values) == len(names)


def test_mapped_names_skip_modules():
    assert mapped_names(InAxes(0), (torch.nn.ReLU(), [torch.nn.ReLU(), X]), {}, fun) == ["batch[1]"]


def test_shared_tensors():
    in_axes, args = InAxes((None, {"y": None, "z": 0}, None)), ([X, "text"], {"y": {"w": Y}, "z": X}, 3)
    found = shared_tensors(in_axes, args, fun)
    assert list(found) == ["x[0]", "batch['y']['w']"]
    assert found["x[0]"] is X and found["batch['y']['w']"] is Y


@pytest.mark.parametrize(
    ("key", "name"),
    [
        (0, "x"), (1, "batch"), (2, "scale"), (3, "rest[0]"), (5, "rest[2]"), ("scale", "scale"), ("mode", "mode"),
        ("other", "options['other']"), ("x", "options['x']"),
    ],
)  # fmt: skip
def test_argument_name(key, name):
    assert argument_name(fun, key) == name


@pytest.mark.parametrize(
    ("other", "key", "name"),
    [
        (lambda: 1, 0, "args[0]"),
        (lambda a: a, 2, "args[1]"),
        (lambda a: a, "b", "b"),
        (lambda *values: 1, 1, "values[1]"),
        (functools.partial(fun, 1), 0, "batch"),
        (functools.partial(fun, mode="b"), 1, "batch"),
        (torch.nn.Linear(2, 2), 0, "input"),
        (torch.add, 1, "args[1]"),
        (3, 0, "args[0]"),
    ],
)
def test_argument_name_of_other_callables(other, key, name):
    found = argument_name(other, key)
    assert found == name or (isinstance(other, torch.nn.Module) and found == "args[0]")
