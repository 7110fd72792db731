"""Gradients of traced loops and choices whose results all samples share, around the ``vmap``: eager, traced and in JAX."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import torchbatch
from torchbatch import jit, lax
from torchbatch.testing import assert_close

X = np.array([[1.0, 2.0], [3.0, 5.0]], dtype=np.float32)
W = np.array([2.0, 3.0], dtype=np.float32)


# Each is what one sample gets of its ``x`` and of ``w``, which all share.
SHARED = {
    "psum in map": lambda lax, m: lambda x, w: lax.map(lambda t: lax.psum(t * t, "i"), x),
    "pmean of the carry": lambda lax, m: lambda x, w: lax.scan(lambda c, t: (c * t, lax.pmean(m.sin(c), "i")), x[0], x)[1],
    "all_gather": lambda lax, m: lambda x, w: lax.map(lambda t: lax.all_gather(t * t, "i"), x),
    "shared carry": lambda lax, m: lambda x, w: lax.fori_loop(0, 3, lambda i, c: lax.psum(c * x[0], "i"), m.sum(w)),
    "choice": lambda lax, m: lambda x, w: lax.cond(
        lax.psum(x[0], "i") > 0, lambda: lax.psum(x * x * w, "i"), lambda: lax.psum(x, "i")
    ),
    "no collective": lambda lax, m: lambda x, w: lax.scan(lambda c, t: (c * t, w * w), x[0], x)[1],
    "shared only": lambda lax, m: lambda x, w: lax.map(lambda t: lax.psum(t * t, "i"), w),
    "both": lambda lax, m: lambda x, w: lax.scan(lambda c, t: (c + m.sum(w * t), lax.psum(t * t * c, "i") * w), m.sum(w), x)[1],
    "by number": lambda lax, m: lambda x, w: lax.map(lambda t: lax.psum(lax.axis_index("i") * t * t, "i"), w),
}  # fmt: skip
ACROSS_TWO = {
    "over the outer axis": lambda lax, m: lambda x, w: lax.map(lambda t: lax.psum(t * t * w, "i"), x),
    "over both axes, and a choice of each sample": lambda lax, m: lambda x, w: lax.cond(
        lax.psum(x[0], "i") > 5, lambda: lax.psum(x * w, ("i", "j")), lambda: lax.psum(w, "j")
    ),
    "both": SHARED["both"],
}
PROGRAMS = SHARED | ACROSS_TWO


def mapped(lib, f, **options):
    return lib.vmap(f, in_axes=(0, None), axis_name="i", **options)


def gradients(lib, f, out_axes=0):
    return lib.grad(lambda x, w: (mapped(lib, f, out_axes=out_axes)(x, w) ** 2).sum(), argnums=(0, 1))


def within(lib, f):
    return lib.vmap(gradients(lib, f))


def hessian(lib, f):
    return lib.hessian(lambda x, w: lib.sin(mapped(lib, f)(x, w)).sum(), argnums=(0, 1))


class Torch:
    grad, vmap, hessian, jacrev, sin = torchbatch.grad, torchbatch.vmap, torchbatch.hessian, torchbatch.jacrev, torch.sin


def in_jax(transform, name, *values):
    jax = pytest.importorskip("jax")

    class Jax:
        grad, vmap, hessian, jacrev, sin = jax.grad, jax.vmap, jax.hessian, jax.jacrev, jax.numpy.sin

    return jax.tree.leaves(transform(Jax, PROGRAMS[name](jax.lax, jax.numpy))(*values))


def in_torch(transform, name, *values, through=lambda f: f):
    found = through(transform(Torch, PROGRAMS[name](lax, torch)))(*map(torch.tensor, values))
    return torchbatch.tree.flatten(found)[0]


def traced(f):
    return jit(f, backend="eager")


def check(transform, name, *values):
    expected = in_jax(transform, name, *values)
    for through in (lambda f: f, traced):
        found = in_torch(transform, name, *values, through=through)
        for a, b in zip(found, expected, strict=True):
            assert_close(a.numpy(), np.asarray(b), rtol=2e-5, atol=1e-5, dtypes=False)


@pytest.mark.parametrize("name", SHARED)
def test_gradient_around_the_map(name):
    check(gradients, name, X, W)


@pytest.mark.parametrize("name", ["psum in map", "choice"])
def test_gradient_where_the_output_is_not_mapped(name):
    check(lambda lib, f: gradients(lib, f, out_axes=None), name, X, W)


@pytest.mark.parametrize("name", ["psum in map", "both"])
def test_gradient_inside_another_map(name):
    check(within, name, np.stack([X, X + 1]), np.stack([W, W - 1]))


def test_gradient_of_an_extreme_around_the_map():
    """JAX has none."""
    largest = torchbatch.vmap(lambda x: lax.map(lambda t: lax.pmax(t * t, "i"), x), axis_name="i")
    gradient = torchbatch.grad(lambda x: largest(x).sum())
    expected = torch.tensor([[0.0, 0.0], [12.0, 20.0]])
    assert_close(gradient(torch.tensor(X)), expected)
    assert_close(traced(gradient)(torch.tensor(X)), expected)


@pytest.mark.parametrize("name", ["shared carry", "both"])
def test_second_derivative(name):
    check(hessian, name, X, W)


@pytest.mark.parametrize("name", ["pmean of the carry", "choice"])
def test_reverse_jacobian(name):
    check(lambda lib, f: lib.jacrev(mapped(lib, f), argnums=(0, 1)), name, X, W)


@pytest.mark.parametrize("name", ["psum in map", "both", "choice"])
def test_gradient_inside_the_map(name):
    check(lambda lib, f: mapped(lib, lib.grad(lambda x, w: f(x, w).sum(), argnums=(0, 1))), name, X, W)


def across_two(lib, f):
    both = lib.vmap(lib.vmap(f, in_axes=(0, None), axis_name="j"), in_axes=(0, None), axis_name="i")
    return lib.grad(lambda x, w: lib.sin(both(x, w)).sum(), argnums=(0, 1))


@pytest.mark.parametrize("name", ACROSS_TWO)
def test_gradient_around_two_maps(name):
    check(across_two, name, np.stack([X, X + 1, X - 2]), W)


def test_forward_mode_of_a_gradient_around_the_map():
    """PyTorch gives ``prod`` a mapped tangent in the step that runs again, where the product is not mapped."""

    def gathered(x, w):
        return lax.map(lambda t: lax.all_gather(t * w, "i").prod(0), x)

    def second(w):
        gradient = torchbatch.grad(lambda w: mapped(Torch, gathered)(torch.tensor(X), w).sin().sum())
        return torchbatch.jvp(gradient, (w,), (torch.ones(2),))[1]

    w = torch.tensor([0.2, 0.3])
    assert_close(traced(second)(w), second(w), rtol=1e-4, atol=1e-4)
