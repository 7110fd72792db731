"""Two derivatives of a loop or a choice, one around the other, in every order: eager and traced, against JAX."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch

import torchbatch
from torchbatch import grad, jit, jvp, lax, vmap
from torchbatch.testing import assert_close

X = np.linspace(-1, 1, 3).astype(np.float32)


# Each is a function of three numbers that gives three; ``w`` is from outside, or depends on ``x``.
LOOPS = {
    "scan": lambda lax, m, w: lambda x: lax.scan(lambda c, _: (m.sin(c) * w, None), x, None, length=2)[0],
    "scan, xs and ys": lambda lax, m, w: lambda x: lax.scan(lambda c, z: (m.tanh(c * z + w), m.sin(c)), x, m.stack([x, w]))[1][1],
    "scan, closing over x": lambda lax, m, w: lambda x: lax.scan(lambda c, _: (m.sin(c) * x, 0), x * w, None, length=2)[0],
    "scan, counting": lambda lax, m, w: lambda x: lax.scan(
        lambda c, _: ((c[0] + 1, c[1] * x * c[0]), c[0]), (1, x), None, length=3
    )[0][1],
    "fori_loop": lambda lax, m, w: lambda x: lax.fori_loop(1, 3, lambda i, c: m.sin(c) * i * x, x),
    "map": lambda lax, m, w: lambda x: lax.map(lambda z: m.sin(z * x).sum() * z, x),
    "associative_scan": lambda lax, m, w: lambda x: lax.associative_scan(lambda a, b: a * b, m.sin(x + 2)),
    "cond": lambda lax, m, w: lambda x: lax.cond(x.sum() < 1, lambda a: m.sin(a) * x, lambda a: a, x),
    "switch": lambda lax, m, w: lambda x: lax.switch((x.sum() < 1) + 0, [m.cos, lambda a: m.sin(a * x), m.cos], x),
    "scan in cond": lambda lax, m, w: lambda x: lax.cond(
        x.sum() < 1, lambda: lax.scan(lambda c, _: (m.sin(c) * x, 0), x, None, length=2)[0], lambda: x
    ),
    "cond in scan": lambda lax, m, w: lambda x: lax.scan(
        lambda c, i: (lax.cond(i > 0, m.sin, lambda c: c * x, c), None), x, m.arange(2)
    )[0],
    "while_loop": lambda lax, m, w: lambda x: lax.while_loop(
        lambda s: s[0] < 2, lambda s: (s[0] + 1, m.sin(s[1]) * x), (0, x)
    )[1],
}  # fmt: skip


def reverse(lib, f):
    return lambda x: lib.grad(lambda x: f(x).sum())(x)


def forward(lib, f):
    return lambda x: lib.jvp(f, (x,), (lib.ones(x.shape) + x * 0,))[1]


def both(first, second):
    return lambda lib, f: second(lib, first(lib, f))


ORDERS = {
    "grad of jvp": both(forward, reverse),
    "jvp of grad": both(reverse, forward),
    "jvp of jvp": both(forward, forward),
    "grad of grad": both(reverse, reverse),
    "grad of jacfwd": lambda lib, f: reverse(lib, lib.jacfwd(f)),
    "jacfwd of jacrev": lambda lib, f: lib.jacfwd(lib.jacrev(f)),
    "jacrev of jacfwd": lambda lib, f: lib.jacrev(lib.jacfwd(f)),
    "grad of a mapped jvp": lambda lib, f: reverse(lib, lambda x: lib.vmap(forward(lib, f))(lib.stack([x, x * 2]))),
    "grad of jvp of mapped": lambda lib, f: reverse(lib, forward(lib, lambda x: lib.vmap(f)(lib.stack([x, x * 2])))),
    "grad of jacfwd of mapped": lambda lib, f: reverse(lib, lib.jacfwd(lambda x: lib.vmap(f)(lib.stack([x, x * 2])))),
    "hessian": lambda lib, f: lib.hessian(lambda x: f(x).sum()),
    "jvp of grad of jvp": both(both(forward, reverse), forward),
    "grad of grad of jvp": both(both(forward, reverse), reverse),
}
ONLY_FORWARD = ("jvp of jvp",)


class Ours:
    grad, jvp, vmap = staticmethod(grad), staticmethod(jvp), staticmethod(vmap)
    jacfwd, jacrev, hessian = map(staticmethod, (torchbatch.jacfwd, torchbatch.jacrev, torchbatch.hessian))
    stack, ones, array, lax, numpy = map(staticmethod, (torch.stack, torch.ones, torch.tensor, lax, torch))


@pytest.fixture(scope="module")
def theirs():
    jax = pytest.importorskip("jax")

    class Theirs:
        grad, jvp, vmap = staticmethod(jax.grad), staticmethod(jax.jvp), staticmethod(jax.vmap)
        jacfwd, jacrev, hessian = map(staticmethod, (jax.jacfwd, jax.jacrev, jax.hessian))
        jit = staticmethod(jax.jit)
        stack, ones, array, lax, numpy = map(staticmethod, (jax.numpy.stack, jax.numpy.ones, jax.numpy.array, jax.lax, jax.numpy))

    return Theirs


def second(lib, loop, order):
    def fun(x):
        w = lib.ones(3) * 0.7 + x[0] * 0.5
        return LOOPS[loop](lib.lax, lib.numpy, w)(x)

    return ORDERS[order](lib, fun)


ALL = [(loop, order) for loop in LOOPS for order in ORDERS if loop != "while_loop" or order in ONLY_FORWARD]
SOME = {
    "scan": (
        "grad of jvp",
        "jvp of grad",
        "jacfwd of jacrev",
        "jacrev of jacfwd",
        "grad of jacfwd of mapped",
        "grad of grad of jvp",
    ),
    "scan, xs and ys": ("grad of jvp", "jvp of grad of jvp"),
    "scan, closing over x": ("grad of jvp", "grad of a mapped jvp"),
    "scan, counting": ("grad of jvp",),
    "fori_loop": ("grad of jvp", "hessian"),
    "map": ("grad of jacfwd",),
    "associative_scan": ("grad of jvp",),
    "cond": ("grad of jvp", "grad of jacfwd of mapped", "grad of grad"),
    "switch": ("hessian", "jacrev of jacfwd"),
    "scan in cond": ("grad of jvp",),
    "cond in scan": ("grad of jvp", "jvp of grad"),
    "while_loop": ("jvp of jvp",),
}
CASES = ALL if os.environ.get("HYPOTHESIS_PROFILE") == "long" else [(loop, order) for loop in SOME for order in SOME[loop]]


@pytest.mark.parametrize("loop, order", CASES)
def test_two_derivatives(loop, order, theirs):
    expected = np.asarray(theirs.jit(second(theirs, loop, order))(theirs.array(X)))
    fun = second(Ours, loop, order)
    for way in (fun, jit(fun, backend="eager")):
        found = way(torch.tensor(X))
        assert_close(found.numpy(), expected, rtol=1e-4, atol=1e-5, dtypes=False)


def test_nested_forward_mode_of_an_expanded_value():
    one = torch.tensor(1.0)
    inner = lambda x: jvp(torch.sin, (x.expand(2, 3),), (torch.ones(2, 3),))[1]  # noqa: E731
    for way in (lambda f: f, lambda f: jit(f, backend="eager")):
        value, tangent = way(lambda x: jvp(inner, (x,), (x,)))(one)
        assert_close(value, torch.cos(one).expand(2, 3))
        assert_close(tangent, -torch.sin(one).expand(2, 3))
