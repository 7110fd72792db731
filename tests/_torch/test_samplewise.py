"""What cannot be batched runs once for each sample, whichever kind of batch it meets."""

from __future__ import annotations

import functools

import pytest
import torch
from torch.autograd.functional import hessian, jacobian

from torchbatch import jit, vmap
from torchbatch._torch import samplewise
from torchbatch.errors import UnsupportedOperationError
from torchbatch.testing import assert_close

X = torch.tensor([1.0, 2.0, 3.0])


def numbers(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


WEIGHTS = numbers(4, 3)


def weighed(x):
    return torch.tanh(WEIGHTS @ x) * x.sum()


def cubes():
    x = X.clone().requires_grad_()
    return x, jit(lambda x: x**3, backend="eager")(x)


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_a_batch_of_gradients(backend):
    x = X.clone().requires_grad_()
    got = torch.autograd.grad(jit(weighed, backend=backend)(x), x, numbers(5, 4), is_grads_batched=True)
    assert_close(got, torch.autograd.grad(weighed(x), x, numbers(5, 4), is_grads_batched=True))


def test_a_jacobian_and_its_gradients_for_captured_tensors():
    scale = torch.tensor(2.0, requires_grad=True)
    jitted = jit(lambda x: (weighed(x) * scale, x * scale), backend="eager")
    for got, want in zip(jacobian(jitted, X, vectorize=True), jacobian(jitted, X), strict=True):
        assert_close(got, want)


@pytest.mark.parametrize("mapped", [vmap, torch.func.vmap])
@pytest.mark.parametrize("axis", [0, 1])
def test_a_backward_pass_inside_vmap(mapped, axis):
    x, y = cubes()
    pull = lambda v: torch.autograd.grad(y, x, v, retain_graph=True)[0]  # noqa: E731
    v = numbers(3, 3)
    assert_close(mapped(pull, axis)(v), 3 * X**2 * v.movedim(axis, 0))


def test_two_levels_and_no_samples():
    x, y = cubes()
    pull = lambda v: torch.autograd.grad(y, x, v, retain_graph=True)[0]  # noqa: E731
    v = numbers(2, 4, 3)
    assert_close(vmap(vmap(pull, in_axes=1, out_axes=1))(v.mT.contiguous()), (3 * X**2 * v).mT)
    assert vmap(pull)(torch.zeros(0, 3)).shape == (0, 3)


def test_each_sample_is_plain_and_contiguous():
    seen = []

    def fun(values):
        seen.append([value if isinstance(value, int) else (tuple(value), value.is_contiguous()) for value in values])
        return [values[0] * values[1]]

    def mapped(x):
        return samplewise.run(fun, [x, 2, torch.ones(2)][:2])[0]

    x = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    assert_close(vmap(mapped, in_axes=1)(x), 2 * x.T)
    assert seen == [[((1.0, 4.0), True), 2], [((2.0, 5.0), True), 2], [((3.0, 6.0), True), 2]]


def test_older_batches_within_each_other():
    old = functools.partial(torch._vmap_internals._vmap, in_dims=0, out_dims=0)
    def plain(values):
        assert all(value.tolist() for value in values)  # there is memory to read
        return [values[0] * 2 + values[1]]

    double = lambda x, y: samplewise.run(plain, [x, y])[0]  # noqa: E731
    x, y = numbers(2, 3, 4), numbers(2, 4)
    got = old(lambda x, y: old(lambda row: double(row, y))(x))(x, y)
    assert_close(got, x * 2 + y[:, None])
    assert_close(old(lambda row: double(torch.ones(4), row[0]) + row)(x), y.new_full((2, 1, 4), 2.0) + x[:, :1] + x)


@pytest.mark.parametrize("differentiated", [functools.partial(jacobian, create_graph=True), hessian])
def test_a_second_derivative_is_refused(differentiated):
    fun = jit(lambda x: x**3 if differentiated is not hessian else (x**3).sum(), backend="eager")
    with pytest.raises(UnsupportedOperationError, match=r"differentiated a second time by autograd \(create_graph=True\)"):
        differentiated(fun, X, vectorize=True)


def test_another_transform_is_refused():
    x, y = cubes()
    with pytest.raises(UnsupportedOperationError, match=r"^jit: the backward pass of a jit function runs inside torch.func.grad"):
        torch.func.grad(lambda v: torch.autograd.grad(y, x, v, retain_graph=True)[0].sum())(torch.ones(3))
