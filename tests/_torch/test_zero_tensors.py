"""Tangents that are not there, in a trace: PyTorch's zeros without memory have to become zeros that can be read."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import torchbatch
from torchbatch import jvp, vmap
from torchbatch.testing import assert_close

VIEWS = {
    "view": lambda z: z.view(4),
    "reshape": lambda z: z.reshape(4),
    "flatten": lambda z: z.flatten(),
    "as_strided": lambda z: z.as_strided((4,), (1,)),
    "transpose": lambda z: z.t(),
    "expand": lambda z: z.expand(3, 2, 2),
}


@pytest.mark.parametrize("name", VIEWS)
def test_views_of_fake_zeros_are_fake(name):
    with FakeTensorMode():
        view = VIEWS[name](torch._efficientzerotensor([2, 2]))
    assert type(view) is FakeTensor and view.device.type == "cpu"


@pytest.mark.parametrize("name", VIEWS)
def test_views_of_zeros_stay_zeros(name):
    zeros = torch._efficientzerotensor([2, 2])
    assert VIEWS[name](zeros)._is_zerotensor()
    assert torch.equal(VIEWS[name](zeros) + 1, VIEWS[name](torch.zeros(2, 2)) + 1)


def tangent(f):
    return lambda x, w: jvp(lambda x: f(x, w), (x,), (torch.cos(x),))[1]


def product(x, w):
    return torch.sin(x) * w


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("backend", ["eager", "inductor"])
@pytest.mark.parametrize("axes", [((None, 0), (0, None)), ((0, None), (None, 0))])
@pytest.mark.parametrize("times", [1, 2, 3])
def test_tangents_under_nested_vmaps(axes, times, backend, dynamic):
    f = product
    for _ in range(times):
        f = tangent(f)
    both = vmap(vmap(f, in_axes=axes[0]), in_axes=axes[1])
    x, w = torch.rand(3, dtype=torch.float64), torch.rand(2, dtype=torch.float64)
    assert_close(torchbatch.jit(both, backend=backend, dynamic=dynamic)(x, w), both(x, w))


def test_zeros_that_are_the_result():
    f = vmap(lambda x: jvp(lambda y: torch.ones(2), (x,), (x,))[1])
    x = torch.rand(3)
    for backend in ("eager", "inductor"):
        result = torchbatch.jit(f, backend=backend)(x)
        assert torch.equal(result, torch.zeros(3, 2)) and not result._is_zerotensor()
