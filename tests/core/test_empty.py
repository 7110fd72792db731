"""An empty batch runs on a made-up sample (rule 17)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from torchbatch.core import axes, empty
from torchbatch.core.outputs import OutAxes


def run(fun: Callable[..., Any], *args: torch.Tensor, in_axes: Any = 0, out_axes: Any = 0, sum_match: bool = False) -> Any:
    mapped = axes.open_arguments(axes.InAxes(in_axes), args, {}, fun)

    def call(*batched: Any) -> Any:
        return fun(*mapped.rebuild(batched)[0])

    return empty.run(call, mapped, "error", OutAxes(out_axes, sum_match, fun), False)[0]


@pytest.mark.parametrize(
    "call",
    [
        lambda x: F.avg_pool2d(x, 2),
        lambda x: F.conv2d(x, torch.ones(2, 3, 2, 2)),
        lambda x: torch.fft.fft(x),
        lambda x: F.group_norm(x[None], 3),
        lambda x: F.interpolate(x[None], 6),
        lambda x: torch.linalg.cholesky(x),
        lambda x: torch.linalg.inv(x),
        lambda x: F.binary_cross_entropy(x, x),
        lambda x: x.sum() > 0,
    ],
)
def test_shapes_and_dtypes_are_those_of_a_sample(call: Callable[[torch.Tensor], torch.Tensor]) -> None:
    sample = torch.eye(4).expand(3, 4, 4)
    expected = call(sample)
    result = run(call, torch.zeros(0, 3, 4, 4))
    assert result.shape == (0, *expected.shape)
    assert result.dtype == expected.dtype


def test_out_axes() -> None:
    assert run(lambda x: x, torch.zeros(2, 0, 3), in_axes=1, out_axes=2).shape == (2, 3, 0)
    assert run(lambda x: x + 1, torch.zeros(2, 0), in_axes=1, out_axes=None, sum_match=True).equal(torch.zeros(2))
    assert run(lambda x: torch.ones(2), torch.zeros(0), out_axes=None).equal(torch.ones(2))


def test_division_of_integers() -> None:
    x = torch.zeros(0, 3, dtype=torch.int64)
    assert run(lambda x: x // x, x).shape == (0, 3)


def test_an_error_of_the_function() -> None:
    with pytest.raises(RuntimeError, match="size mismatch"):
        run(lambda x: x @ torch.ones(5), torch.zeros(0, 3, 4))


def test_gradients_reach_the_empty_input() -> None:
    x = torch.zeros(0, 3, requires_grad=True)
    run(lambda x: x.sin(), x).sum().backward()
    assert x.grad is not None
    assert x.grad.shape == (0, 3)
