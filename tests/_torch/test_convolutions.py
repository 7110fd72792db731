"""Cheaper forms of convolutions and pools: the same numbers, and what they are made for is done."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import torchbatch
from tests._torch.test_rewrites import rewritten
from torchbatch import grad, vmap
from torchbatch.testing import assert_close


def numbers(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- relu and pooling ------------------------------------------------------------------------------------------------

POOLS = {
    "plain": {"kernel_size": 2},
    "overlapping": {"kernel_size": 3, "stride": 1},
    "padded": {"kernel_size": 3, "stride": 2, "padding": 1},
    "dilated": {"kernel_size": 2, "dilation": 2},
    "rounded up": {"kernel_size": 2, "ceil_mode": True},
}


def pooled(x, **pool):
    return F.max_pool2d(F.relu(x), **pool)


def order(names):
    return [name for name in names if name.startswith(("relu", "max_pool", "threshold"))]


@pytest.mark.parametrize("name", POOLS)
def test_relu_comes_after_the_pool(name):
    x = numbers(2, 3, 7, 9)
    x[0, 0, :4] = -x[0, 0, :4].abs()  # some windows have no positive number
    x[1, 1, 2, 2], x[1, 2, 3] = torch.nan, 0.5  # and some have several that are largest
    before, after = rewritten(lambda x: (pooled(x, **POOLS[name]), grad(lambda x: pooled(x, **POOLS[name]).sin().sum())(x)), x)
    forward, backward = ["relu.default", "max_pool2d_with_indices.default"], "max_pool2d_with_indices_backward.default"
    assert order(before)[-2:] == [backward, "threshold_backward.default"]
    assert order(after)[-2:] == ["threshold_backward.default", backward]
    assert order(after)[:2] == forward[::-1]


OTHER_USES = {
    "relu returned": lambda x: (F.relu(x), F.max_pool2d(F.relu(x), 2)),
    "one relu, two uses": lambda x: (lambda r: r.sum() + F.max_pool2d(r, 2))(F.relu(x)),
    "positions returned": lambda x: F.max_pool2d(F.relu(x), 2, return_indices=True),
    "another function": lambda x: F.max_pool2d(x.abs(), 2),
}


@pytest.mark.parametrize("name", OTHER_USES)
def test_other_uses_of_relu_and_positions_are_left_alone(name):
    fun = OTHER_USES[name]
    if name == "relu returned":

        def fun(x):
            activation = F.relu(x)
            return activation, F.max_pool2d(activation, 2)

    before, after = rewritten(fun, numbers(1, 2, 6, 6))
    assert order(after) == order(before)


def test_two_pools_of_one_relu():
    def fun(x):
        activation = F.relu(x)
        return F.max_pool2d(activation, 2).sum() + F.max_pool2d(activation, 3).sum()

    before, after = rewritten(lambda x: (fun(x), grad(fun)(x)), numbers(1, 2, 6, 6))
    assert order(after) == order(before)


# --- convolutions of few channels ------------------------------------------------------------------------------------


def per_example(convolution):
    """Gradients for each example, and for one convolution the numbers that it gives."""

    def loss(weight, bias, x):
        return convolution(x, weight, bias).sin().sum()

    return lambda weight, bias, x: (
        *vmap(grad(loss, argnums=(0, 1, 2)), in_axes=(None, None, 0))(weight, bias, x),
        convolution(x, weight, bias),
    )


@pytest.mark.parametrize("channels", [1, 2, 4])
@pytest.mark.parametrize("outputs", [20, 40])
@pytest.mark.parametrize("padding", [0, 1, (1, 2), "same"])
@pytest.mark.parametrize("bias", [True, False])
def test_columns_take_the_place_of_convolutions(channels, outputs, padding, bias):
    fun = per_example(lambda x, weight, bias_: F.conv2d(x, weight, bias_ if bias else None, padding=padding))
    if not bias:
        fun = (lambda inner: lambda weight, bias_, x: inner(weight, bias_, x)[::2])(fun)
    before, after = rewritten(fun, numbers(outputs, channels, 3, 3), numbers(outputs, seed=1), numbers(5, channels, 6, 7, seed=2))
    assert before.count("convolution_backward.default") == 2
    assert after.count("convolution_backward.default") == 1  # the gradient of the input
    assert "bmm.default" in after and after.count("convolution.default") < before.count("convolution.default")


LEFT_ALONE = {
    "many channels": ((40, 5, 3, 3), {}),
    "few outputs": ((4, 1, 3, 3), {}),
    "stride": ((20, 1, 3, 3), {"stride": 2}),
    "dilation": ((20, 1, 3, 3), {"dilation": 2}),
    "groups": ((20, 1, 3, 3), {"groups": 2}),
}


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_other_convolutions_are_left_alone(name):
    shape, options = LEFT_ALONE[name]
    fun = per_example(lambda x, weight, bias: F.conv2d(x, weight, bias, **options))
    channels = shape[1] * options.get("groups", 1)
    before, after = rewritten(fun, numbers(*shape), numbers(shape[0], seed=1), numbers(5, channels, 7, 8, seed=2))
    assert "bmm.default" not in after
    assert after.count("convolution_backward.default") == before.count("convolution_backward.default")


def test_convolutions_without_gradients_for_each_example_are_left_alone():
    weight, bias, x = numbers(20, 1, 3, 3), numbers(20, seed=1), numbers(5, 1, 6, 7, seed=2)
    _, after = rewritten(vmap(F.conv2d, in_axes=(0, None, None)), x, weight, bias)
    assert "convolution.default" in after
    _, after = rewritten(lambda w: grad(lambda w: F.conv2d(x, w, bias).sin().sum())(w), weight)
    assert after.count("convolution_backward.default") == 1


def test_one_input_of_two_convolutions():
    def loss(first, second, x):
        return (F.conv2d(x, first) * F.conv2d(x, second)).sum()

    fun = vmap(grad(loss, argnums=(0, 1)), in_axes=(None, None, 0))
    inputs = numbers(20, 2, 3, 3), numbers(20, 2, 3, 3, seed=1), numbers(5, 2, 6, 7, seed=2)
    _, after = rewritten(fun, *inputs)
    assert "convolution_backward.default" not in after


def test_inputs_that_are_not_contiguous():
    weight, bias, x = numbers(20, 2, 3, 3), numbers(20, seed=1), numbers(5, 6, 7, 2, seed=2).permute(0, 3, 1, 2)
    rewritten(per_example(F.conv2d), weight, bias, x)


def test_a_compiled_network_gives_the_gradients_of_the_plain_one():
    def loss(first, second, x):
        x = F.max_pool2d(F.relu(F.conv2d(x, first, padding=1)), 2)
        return F.max_pool2d(F.relu(F.conv2d(x, second, padding=1)), 2).square().sum()

    fun = vmap(grad(loss, argnums=(0, 1)), in_axes=(None, None, 0))
    inputs = numbers(8, 1, 3, 3), numbers(16, 8, 3, 3, seed=1), numbers(4, 1, 8, 8, seed=2)
    assert_close(torchbatch.jit(fun)(*inputs), fun(*inputs))
