"""Results taken out of a batch level."""

from __future__ import annotations

import pytest
import torch

from torchbatch._torch import levels
from torchbatch.core.outputs import OutAxes
from torchbatch.errors import AxisError, AxisSpecError, OutputTypeError, UnmappedOutputError

X = torch.arange(6.0).reshape(3, 2)


def fun(x):
    return x


@pytest.fixture
def level():
    opened = levels.enter_level(3, "error")
    yield opened
    levels.leave_level()


def batched(level, value=X, axis=0):
    return levels.add_batch_dim(value, axis, level)


def finish(level, output, out_axes=0, sum_match=False, inputs=()):
    return OutAxes(out_axes, sum_match, fun).finish(output, level, 3, inputs)


@pytest.mark.parametrize("out_axes", [0, 1, -1, -2])
def test_a_mapped_output(level, out_axes):
    result, new = finish(level, batched(level), out_axes)
    assert torch.equal(result, X.movedim(0, out_axes)) and new == 1


@pytest.mark.parametrize("out_axes", [0, 1, -1, -2])
def test_an_unmapped_output_is_repeated(level, out_axes):
    result, _ = finish(level, torch.arange(2.0), out_axes)
    assert torch.equal(result, torch.arange(2.0).expand(3, 2).movedim(0, out_axes))


def test_inputs_among_the_outputs_are_not_new(level):
    wrapped = batched(level)
    result, new = finish(level, wrapped)
    again, still_new = OutAxes(0, False, fun).finish(wrapped, level, 3, [result])
    assert new == 1 and still_new in (0, 1) and torch.equal(again, X)
    shared = torch.ones(2)
    results, new = finish(level, (shared, wrapped), (None, 0), inputs=[shared])
    assert results[0] is shared and new == 1


def test_trees_numbers_and_none(level):
    result, new = finish(level, {"a": (batched(level), 2.0), "b": None})
    assert torch.equal(result["a"][0], X) and torch.equal(result["a"][1], torch.full((3,), 2.0)) and result["b"] is None
    assert new == 2


def test_out_axes_none(level):
    thing = object()
    assert finish(level, (thing, 3), (None, None)) == ((thing, 3), 0)
    with pytest.raises(UnmappedOutputError):
        finish(level, batched(level), None)
    assert torch.equal(finish(level, batched(level), None, sum_match=True)[0], X.sum(0))


def test_what_does_not_fit(level):
    with pytest.raises(OutputTypeError):
        finish(level, "text")
    with pytest.raises(AxisError):
        finish(level, batched(level), 2)
    with pytest.raises(AxisError):
        finish(level, batched(level), (0, 0))
    with pytest.raises(AxisSpecError):
        OutAxes("0", False, fun)


def test_how_chunks_are_joined(level):
    out = OutAxes((1, None, None, 0), True, fun)
    leaves, axes, rebuild = out.open((batched(level), batched(level), torch.ones(2), 2.0))
    assert axes == [1, None, None, 0]
    assert [out.join(leaf, axis, level) for leaf, axis in zip(leaves, axes, strict=True)] == [1, "sum", "once", 0]
    assert rebuild([1, 2, 3, 4]) == (1, 2, 3, 4)
