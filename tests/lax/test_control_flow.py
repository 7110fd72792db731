"""Loops and choices next to live JAX: values and gradients, mapped or not, run as they stand and traced by jit."""

from __future__ import annotations

import functools
import gc
import inspect
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import torchbatch
from torchbatch import lax, vmap
from torchbatch.testing import assert_close, loop

jax = pytest.importorskip("jax")
TRANSFORMS = ("vmap", "grad", "jvp", "jacrev", "jacfwd", "hessian", "checkpoint")
OURS = SimpleNamespace(lax=lax, np=torch, **{name: getattr(torchbatch, name) for name in TRANSFORMS})
THEIRS = SimpleNamespace(lax=jax.lax, np=jax.numpy, **{name: getattr(jax, name) for name in TRANSFORMS})
RNG = np.random.default_rng(0)
V = np.linspace(-1, 2, 5).astype(np.float32)
M = np.linspace(-1, 2, 15).astype(np.float32).reshape(5, 3)
W = (RNG.standard_normal((3, 3)) / 2).astype(np.float32)
B = RNG.standard_normal((4, 6, 3)).astype(np.float32)


def same(ours, theirs):
    a, a_structure = jax.tree.flatten(jax.tree.map(lambda leaf: np.asarray(leaf.detach()), ours))
    b, b_structure = jax.tree.flatten(jax.tree.map(np.asarray, theirs))
    assert a_structure == b_structure
    for mine, other in zip(a, b, strict=True):
        assert mine.shape == other.shape and mine.dtype.kind == other.dtype.kind, (mine, other)
        assert_close(mine, other, rtol=2e-4, atol=2e-4, dtypes=False)


# --- what runs in both libraries -------------------------------------------------------------------------------------


def rnn(m, w, xs):
    return m.lax.scan(lambda h, x: (m.np.tanh(w @ h + x), h.sum()), m.np.zeros(3), xs)


def loss(m, w, xs):
    h, ys = rnn(m, w, xs)
    return (h**2).sum() + (ys**2).sum()


def decided(m, w, xs):
    """A scan whose steps choose by their carry."""

    def step(h, x):
        return m.lax.cond(h.sum() > 0.1, lambda h: m.np.tanh(w @ h + x), lambda h: h + x @ w, h), h.sum()

    return m.lax.scan(step, m.np.zeros(3), xs)[1].sum()


def root(m, x):
    """Right for negative numbers too, whose root has no derivative."""
    return m.lax.cond(x > 0, lambda: m.np.sqrt(x), lambda: x**3)


def shared_root(m, s, x):
    return m.lax.cond(x > 0, lambda: m.np.sqrt(s * x), lambda: s * x)


def growing(m, a, b):
    return m.lax.while_loop(lambda s: s[0] < a, lambda s: (s[0] + abs(b) + 0.1, s[1] * 2), (0.0, b))


def mixed(m, v, w):
    step = lambda c, x: ((c[1], c[0] + x["a"].sum()), {"y": (x["b"], c[0])})  # noqa: E731
    return m.lax.scan(step, (0.0, 1.0), {"a": w, "b": v})


def halve(m, x):
    return m.lax.while_loop(lambda state: state[1] > 0.5, lambda state: (state[0] + 1, state[1] / 2), (0, x))


def power(m, x):
    return m.lax.while_loop(lambda state: state[1] > 0.5, lambda state: (state[0] * state[1], state[1] / 2), (x, x))[0]


def newton(m, a):
    return m.lax.while_loop(lambda s: abs(s * s - a) > 1e-3, lambda s: s - (s * s - a) / (2 * s), a)


def filled(m, xs):
    """An inner loop that ends at different times in the steps of an outer one."""
    return m.lax.scan(lambda h, x: (m.lax.while_loop(lambda c: c.sum() < 3, lambda c: c + abs(x), h * 0), h), m.np.zeros(3), xs)


def nested(m, w, xs):
    return m.lax.scan(lambda h, _: (rnn(m, w, xs + h)[0], h), m.np.zeros(3), None, length=3)[0].sum()


def coupled(m, x):
    """A loop in which the samples see each other."""
    step = lambda h, z: (m.np.tanh(h + m.lax.psum(z * h, "i")), m.lax.axis_index("i") * z.sum())  # noqa: E731
    h, ys = m.lax.scan(step, m.np.ones(3), x)
    return h.sum() + ys.sum()


def two_names(m, a):
    """Samples of two axes see each other, and a gradient lies between."""

    def inner(z):
        step = lambda h, _: (m.np.sin(h * z + m.lax.psum(h, "o") + m.lax.pmean(h * z, "n")), None)  # noqa: E731
        return m.lax.scan(step, z, None, length=3)[0].sum()

    return m.grad(lambda a: m.vmap(inner, axis_name="n")(a).sum())(a)


def four_levels(m, a):
    def inner(z):
        return m.lax.scan(lambda h, _: (m.np.sin(h * z + m.lax.pmean(h * z, "n")), None), z, None, length=3)[0].sum()

    return m.grad(lambda a: m.vmap(m.grad(inner), axis_name="n")(a).sum())(a)


def linear(m, a, b, **options):
    return m.lax.associative_scan(lambda p, q: (p[0] * q[0], q[0] * p[1] + q[1]), (a, b), **options)


CASES = {
    "cond mapped": (lambda m, v: m.vmap(lambda x: m.lax.cond(x > 0, m.np.sqrt, lambda x: x * 2, x))(v), V),
    "cond one for all": (lambda m, w: m.lax.cond(w[0, 0] > 0, lambda a: (a * w, 1), lambda a: (a - w, 2), w), W),
    "cond without operands": (lambda m, w: m.lax.cond(w[0, 0] > 0, lambda: m.np.ones(3), lambda: m.np.zeros(3)), W),
    "cond older form": (lambda m, v: m.lax.cond(v[0] > 0, v, m.np.sin, v * 2, m.np.cos), V),
    "cond by a number": (lambda m, v: m.vmap(lambda x: m.lax.cond(x.round(), m.np.sin, m.np.cos, x))(v), V),
    "cond vmap grad": (lambda m, v: m.vmap(m.grad(lambda x: m.lax.cond(x > 0, m.np.sqrt, lambda x: x * 2, x)))(v), V),
    "cond vmap grad, closed over": (lambda m, v: m.vmap(m.grad(lambda x: root(m, x)))(v), V),
    "cond grad vmap, closed over": (lambda m, v: m.grad(lambda v: m.vmap(lambda x: root(m, x))(v).sum())(v), V),
    "cond grad vmap, shared": (
        lambda m, v: m.grad(lambda s: m.vmap(lambda x: shared_root(m, s, x))(v).sum())(v[0]),
        V,
    ),
    "cond hessian": (lambda m, v: m.hessian(lambda v: m.vmap(lambda x: root(m, x))(v).sum())(v), V[2:]),
    "cond jvp": (lambda m, v: m.vmap(lambda x: m.jvp(lambda x: root(m, x), (x,), (x,)))(v), V),
    "cond inner grad": (
        lambda m, v: m.vmap(m.grad(lambda x: m.lax.cond(x > 0, lambda: m.grad(m.np.sqrt)(x), lambda: x * 2)))(v),
        V,
    ),
    "cond one for all, grad": (
        lambda m, w: m.grad(lambda w: m.lax.cond(w[0, 0] > 0, lambda: m.np.sin(w).sum(), lambda: (w**2).sum()))(w),
        W,
    ),
    "cond one for all, hessian": (
        lambda m, w: m.hessian(lambda w: m.lax.cond(w[0, 0] < 0, lambda: m.np.sin(w).sum(), lambda: (w**3).sum()))(w),
        W,
    ),
    "cond one for all, vmap grad": (
        lambda m, w, x: m.vmap(m.grad(lambda x: m.lax.cond(w[0, 0] < 0, lambda: m.np.sin(x).sum(), lambda: (w @ x).sum())))(x),
        W,
        B[0],
    ),
    "cond with axis_index": (
        lambda m, v: m.vmap(
            lambda x: m.lax.cond(x > 0, lambda: m.lax.axis_index("i") * 1, lambda: m.lax.psum(1, "i")), axis_name="i"
        )(v),
        V,
    ),
    "switch mapped": (
        lambda m, i, v: m.vmap(lambda i, x: m.lax.switch(i, [lambda x: x, m.np.sin, lambda x: x**2], x))(i, v),
        np.array([-3, 0, 1, 2, 9]),
        V,
    ),
    "switch one for all": (lambda m, i, v: m.lax.switch(i, [m.np.sin, m.np.cos, m.np.tanh], v), np.int32(7), V),
    "switch grad": (
        lambda m, i, v: m.grad(lambda v: m.lax.switch(i, [m.np.sin, m.np.cos, m.np.tanh], v).sum())(v),
        np.int32(1),
        V,
    ),
    "select": (lambda m, v: m.vmap(lambda x: m.lax.select(x > 0, m.np.sin(x), m.np.cos(x)))(v), V),
    "select_n": (lambda m, i, v: m.lax.select_n(i, v, v * 2, v * 3), np.array([0, 2, 1, 1, 0], np.int32), V),
    "scan": (lambda m, v: m.lax.scan(lambda c, x: (c + x, c * x), 0.0, v), V),
    "scan mapped": (lambda m, v: m.vmap(lambda v: m.lax.scan(lambda c, x: (c + x, c * x), 0.0, v))(v), M),
    "scan reversed": (lambda m, v: m.vmap(lambda v: m.lax.scan(lambda c, x: (c + x, c * x), 0, v, reverse=True))(v), M),
    "scan over nothing": (
        lambda m: m.lax.scan(lambda c, _: ({"a": c["a"] + 1, "b": c["b"] * 2.0}, None), {"a": 0, "b": 1.0}, None, length=4),
    ),
    "scan of no steps": (lambda m, v: m.lax.scan(lambda c, x: (c + x, (c, x > 0)), 0, v[:0]), V),
    "scan of no steps, mapped": (lambda m, v: m.vmap(lambda x: m.lax.scan(lambda c, z: (c + z, (c, z)), 0, v[:0] + x))(v), V),
    "scan trees": (mixed, V, M),
    "scan grad of weights": (lambda m, w, x: m.grad(lambda w: loss(m, w, x))(w), W, B[0]),
    "scan grad of xs": (lambda m, w, x: m.grad(lambda x: loss(m, w, x))(x), W, B[0]),
    "scan vmap grad": (lambda m, w, x: m.vmap(lambda x: m.grad(lambda w: loss(m, w, x))(w))(x), W, B),
    "scan grad vmap": (lambda m, w, x: m.grad(lambda w: m.vmap(lambda x: loss(m, w, x))(x).sum())(w), W, B),
    "scan vmap grad, data closed over": (
        lambda m, w, x: m.vmap(
            lambda x: m.grad(lambda w: m.lax.scan(lambda h, _: (m.np.tanh(w @ h + x[0]), None), x[1], None, length=4)[0].sum())(w)
        )(x),
        W,
        B,
    ),
    "scan jvp": (lambda m, w, x: m.jvp(lambda w: loss(m, w, x), (w,), (w * 2,)), W, B[0]),
    "scan jacfwd": (lambda m, w, x: m.jacfwd(lambda w: rnn(m, w, x)[0])(w), W, B[0]),
    "scan jacrev": (lambda m, w, x: m.jacrev(lambda w: rnn(m, w, x)[0])(w), W, B[0]),
    "scan hessian": (lambda m, w, x: m.hessian(lambda w: loss(m, w, x))(w), W, B[0]),
    "scan jacrev of jacrev": (lambda m, w, x: m.jacrev(m.jacrev(lambda w: loss(m, w, x)))(w), W, B[0]),
    "scan in scan": (lambda m, w, x: m.vmap(lambda x: m.grad(lambda w: nested(m, w, x))(w))(x), W, B),
    "scan with checkpoint": (
        lambda m, x: m.grad(lambda x: m.lax.scan(m.checkpoint(lambda c, z: (m.np.sin(c * z), None)), z3(m), x)[0].sum())(x),
        B[0],
    ),
    "scan with integers": (
        lambda m, v: m.grad(lambda v: m.lax.scan(lambda c, x: ((c[0] + 1, c[1] * x), c[0] * x), (0, 1.0), v)[1].sum())(v),
        V,
    ),
    "scan with cond": (lambda m, w, x: m.vmap(lambda x: m.grad(lambda w: decided(m, w, x))(w))(x), W, B),
    "scan with cond, one for all": (lambda m, w, x: m.grad(lambda w: decided(m, w, x))(w), W, B[0]),
    "scan with psum": (lambda m, x: m.vmap(m.grad(lambda x: coupled(m, x)), axis_name="i")(x), B),
    "scan with psum, grad outside": (
        lambda m, x: m.grad(lambda x: m.vmap(lambda x: coupled(m, x), axis_name="i")(x).sum())(x),
        B,
    ),
    "scan with psum, jacrev outside": (lambda m, x: m.jacrev(m.vmap(lambda x: coupled(m, x), axis_name="i"))(x), B),
    "scan with two names": (lambda m, x: m.vmap(lambda a: two_names(m, a), axis_name="o")(x), B),
    "scan in four transforms": (lambda m, x: m.vmap(lambda a: four_levels(m, a), axis_name="o")(x), B),
    "scan with psum of what is closed over": (
        lambda m, v: m.vmap(
            m.grad(lambda x: m.lax.scan(lambda c, _: (c * m.lax.psum(x, "i"), None), x, None, length=2)[0]), axis_name="i"
        )(v),
        V,
    ),
    "scan, psum of what is closed over, grad outside": (
        lambda m, v: m.grad(
            lambda v: m.vmap(
                lambda x: m.lax.scan(lambda c, _: (c * m.lax.psum(x, "i"), None), x, None, length=2)[0], axis_name="i"
            )(v).sum()
        )(v),
        V,
    ),
    "scan, inner vmap of what is closed over": (
        lambda m, w: m.grad(
            lambda w: m.lax.scan(lambda c, _: (c + m.vmap(lambda r: m.np.sin(r).sum())(w).sum(), None), 0.0, None, length=3)[0]
        )(w),
        W,
    ),
    "scan, inner grad of what is closed over": (
        lambda m, w: m.grad(
            lambda w: m.lax.scan(lambda c, _: (c + m.grad(lambda r: m.np.sin(r).sum())(w).sum(), None), 0.0, None, length=3)[0]
        )(w),
        W,
    ),
    "cond, inner vmap of what is closed over": (
        lambda m, w: m.grad(
            lambda w: m.lax.cond(w[0, 0] > 0, lambda: m.vmap(lambda r: m.np.sin(r).sum())(w).sum(), lambda: w.sum())
        )(w),
        W,
    ),
    "cond, psum of what is closed over": (
        lambda m, v: m.grad(
            lambda v: m.vmap(lambda x: m.lax.cond(x > 0, lambda: m.lax.psum(x, "i") * x, lambda: x * 2), axis_name="i")(v).sum()
        )(v),
        V,
    ),
    "scan of complex numbers": (
        lambda m, v: m.grad(lambda v: abs(m.lax.scan(lambda c, z: (c * (1 + 1j * z), None), v[0] * (1 + 0j), v)[0]) ** 2)(v),
        V,
    ),
    "while": (lambda m, v: halve(m, v[4]), V),
    "while mapped": (lambda m, v: m.vmap(lambda x: halve(m, x))(v), V),
    "while of no steps": (lambda m, v: m.lax.while_loop(lambda s: s[1] > 50, lambda s: (s[0] + 1.0, s[1] / 2), (0, v[4])), V),
    "while jvp": (lambda m, v: m.vmap(lambda x: m.jvp(lambda x: power(m, x), (x,), (x,)))(v), V),
    "while jvp, closed over": (
        lambda m, v: m.jvp(lambda v: m.lax.while_loop(lambda c: c < 10, lambda c: c + abs(v).sum(), 0.0), (v,), (v,)),
        V,
    ),
    "while mapped twice": (lambda m, v: m.vmap(lambda a: m.vmap(lambda b: growing(m, a, b))(v))(v), V),
    "while with psum": (
        lambda m, v: m.vmap(
            lambda x: m.lax.while_loop(lambda s: s[1] > 0.5, lambda s: (s[0] + m.lax.psum(s[1], "i"), s[1] / 2), (0.0, x)),
            axis_name="i",
        )(v),
        V,
    ),
    "newton": (lambda m, v: m.vmap(lambda a: newton(m, a))(v), np.array([1, 4, 9, 100], np.float32)),
    "while in scan": (lambda m, x: m.vmap(lambda x: filled(m, x))(x), B),
    "scan in while": (
        lambda m, w, x: m.lax.while_loop(lambda s: s[0] < 3, lambda s: (s[0] + 1, rnn(m, w, x + s[1])[0]), (0, m.np.zeros(3))),
        W,
        B[0],
    ),
    "fori": (lambda m, v: m.lax.fori_loop(0, 5, lambda i, c: c * i + 1, v), V),
    "fori grad": (lambda m, v: m.vmap(m.grad(lambda x: m.lax.fori_loop(0, 4, lambda i, c: c * i + x, x)))(v), V),
    "fori to what is given": (lambda m, n, v: m.lax.fori_loop(0, n, lambda i, c: c * 2 + i, v), np.int32(4), V),
    "fori, bounds of each sample": (
        lambda m, n, v: m.vmap(lambda n, x: m.lax.fori_loop(0, n, lambda i, c: c * i + 1, x))(n, v),
        np.arange(5),
        V,
    ),
    "map": (lambda m, x: m.lax.map(lambda z: (m.np.sin(z).sum(), z), x), M),
    "map grad": (lambda m, x: m.grad(lambda v: m.lax.map(lambda z: m.np.sin(z).sum() * v.sum(), v).sum())(x), M),
    "map in batches": (
        lambda m, x: m.grad(lambda v: m.lax.map(lambda z: m.np.sin(z).sum() * v.sum(), v, batch_size=2).sum())(x),
        M,
    ),
    "associative_scan": (lambda m, x: linear(m, x, x * 2), M),
    "associative_scan reversed": (lambda m, x: m.vmap(lambda x: linear(m, x, x + 1, reverse=True, axis=1))(x), B),
    "associative_scan last axis": (lambda m, x: linear(m, x, x + 1, axis=-1), B),
    "associative_scan grad": (lambda m, x: m.grad(lambda v: linear(m, v, v)[1].sum())(x), M),
}


def z3(m):
    return m.np.ones(3)


@functools.cache
def expected(name):
    fun, *arrays = CASES[name]
    return jax.jit(functools.partial(fun, THEIRS))(*arrays)


@pytest.mark.parametrize("name", CASES)
def test_as_in_jax(name):
    fun, *arrays = CASES[name]
    same(fun(OURS, *map(torch.tensor, arrays)), expected(name))


@pytest.mark.parametrize("name", CASES)
def test_as_in_jax_when_traced(name):
    fun, *arrays = CASES[name]
    same(torchbatch.jit(functools.partial(fun, OURS), backend="eager")(*map(torch.tensor, arrays)), expected(name))


@pytest.mark.parametrize("name", ["newton", "cond one for all, grad"])
def test_as_in_jax_when_compiled(name):
    fun, *arrays = CASES[name]
    same(torchbatch.jit(functools.partial(fun, OURS))(*map(torch.tensor, arrays)), expected(name))


@pytest.mark.parametrize(
    "name", ["cond", "switch", "while_loop", "fori_loop", "scan", "map", "associative_scan", "select", "select_n"]
)
def test_the_signatures_of_jax(name):
    ours = [(p.name, p.kind) for p in inspect.signature(getattr(lax, name)).parameters.values()]
    theirs = [(p.name, p.kind) for p in inspect.signature(getattr(jax.lax, name)).parameters.values() if p.name[0] != "_"]
    assert ours[: len(theirs)] == theirs


# --- programs that nobody thought of ---------------------------------------------------------------------------------

STEPS = {
    "rotate": lambda m, c, x: ((c[1], m.np.sin(c[0] + x)), c[0]),
    "choose": lambda m, c, x: ((m.lax.cond(c[0] > x, m.np.cos, lambda v: v * x, c[0]), c[1] + x), c[1] * x),
    "look across": lambda m, c, x: ((m.np.tanh(c[0] + m.lax.pmean(x, "i")), m.lax.psum(c[1], "i") / 4), c[0]),
    "inner loop": lambda m, c, x: ((m.lax.fori_loop(0, 3, lambda i, v: m.np.sin(v + i), c[0] * x), c[0]), c[1]),
}
AROUND = {
    "vmap": lambda m, f: m.vmap(f, axis_name="i"),
    "vmap grad": lambda m, f: m.vmap(m.grad(lambda x: summed(m, f(x))), axis_name="i"),
    "grad vmap": lambda m, f: m.grad(lambda x: summed(m, m.vmap(f, axis_name="i")(x))),
    "jvp vmap": lambda m, f: lambda x: m.jvp(m.vmap(f, axis_name="i"), (x,), (x * 2,)),
    "vmap jacfwd": lambda m, f: m.vmap(m.jacfwd(lambda x: f(x)[1]), axis_name="i"),
}


def summed(m, tree):
    return sum((m.np.sin(leaf).sum() for leaf in jax.tree.leaves(tree)), m.np.zeros(()))


@given(
    st.lists(st.sampled_from(sorted(STEPS)), min_size=1, max_size=2),
    st.sampled_from(sorted(AROUND)),
    st.booleans(),
    st.booleans(),
)
@settings(max_examples=5 if settings.default.max_examples <= 100 else 300)
def test_programs(steps, around, reverse, jit):
    def program(m, x):
        def step(c, z):
            ys = []
            for name in steps:
                c, y = STEPS[name](m, c, z)
                ys.append(y)
            return c, sum(ys)

        return m.lax.scan(step, (x[0], x[1]), x, reverse=reverse)

    fun = functools.partial
    ours = AROUND[around](OURS, fun(program, OURS))
    ours = torchbatch.jit(ours, backend="eager") if jit else ours
    same(ours(torch.tensor(B[:, :, 0])), jax.jit(AROUND[around](THEIRS, fun(program, THEIRS)))(B[:, :, 0]))


# --- next to the plain loop ------------------------------------------------------------------------------------------

EACH = {
    "cond": lambda x: lax.cond(x.sum() > 0, torch.sin, torch.cos, x),
    "scan": lambda x: lax.scan(lambda c, z: (c * z + 1, c - z), torch.tensor(0.5), x),
    "while_loop": lambda x: lax.while_loop(lambda c: (c**2).sum() < 20, lambda c: c * 1.5, x + 1),
    "fori_loop": lambda x: lax.fori_loop(2, 6, lambda i, c: c * x + i, x),
    "map": lambda x: lax.map(lambda z: z * x, x, batch_size=2),
    "associative_scan": lambda x: lax.associative_scan(torch.mul, x),
}


@pytest.mark.parametrize("name", EACH)
def test_as_in_the_plain_loop(name):
    x = torch.tensor(M)
    ours, theirs = vmap(EACH[name])(x), loop(EACH[name])(x)
    assert_close(ours, theirs)


# --- what JAX has no test for ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", [None, "eager"])
def test_an_index_of_a_sample_that_has_finished_stays_in_bounds(backend):
    row = torch.arange(5.0)

    def first_above(bound, start):
        return lax.while_loop(lambda i: i < 5, lambda i: torch.where(row[i] >= bound, i + 10, i + 1), start)

    found = vmap(first_above)
    found = found if backend is None else torchbatch.jit(found, backend=backend)
    bounds, starts = torch.tensor([0.0, 3.0, 9.0, 9.0]), torch.tensor([0, 0, 1, 5])
    assert found(bounds, starts).tolist() == [10, 13, 5, 5]


@pytest.mark.parametrize("backend", [None, "eager"])
def test_a_sample_that_has_finished_is_not_touched_by_nan(backend):
    def countdown(x):
        return lax.while_loop(lambda s: s[0] > 0, lambda s: (s[0] - 1, s[1] + torch.log(s[0])), (x, torch.zeros(())))[1]

    found = vmap(countdown)
    found = found if backend is None else torchbatch.jit(found, backend=backend)
    assert_close(found(torch.tensor([1.0, 4.0])), torch.tensor([0.0, np.log(24.0)], dtype=torch.float32))


def test_one_branch_runs_if_the_choice_is_the_same_for_all():
    ran = []
    lax.cond(torch.tensor(True), lambda: ran.append("yes"), lambda: ran.append("no"))
    vmap(lambda x: lax.switch(torch.tensor(1), [lambda: ran.append(0), lambda: ran.append(1)]) or x)(torch.ones(2))
    assert ran == ["yes", 1]


def test_outputs_are_tensors():
    assert isinstance(lax.cond(True, lambda: 1, lambda: 2), torch.Tensor)
    assert isinstance(lax.while_loop(lambda x: x < 3, lambda x: x + 1, 0), torch.Tensor)


@pytest.mark.parametrize("batch_size", [None, 2, 3, 8])
def test_map_shows_its_progress(batch_size, capsys):
    result = lax.map(lambda x: x * 2, torch.arange(7), batch_size=batch_size, progress=True)
    assert result.tolist() == [0, 2, 4, 6, 8, 10, 12]
    assert "7/7" in capsys.readouterr().err


def test_map_needs_tqdm_for_progress(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tqdm", None)
    with pytest.raises(ImportError, match="pip install tqdm"):
        lax.map(lambda x: x, torch.arange(3), progress=True)


def test_checkpoint_in_scan_keeps_only_the_carries():
    kept = []

    def pack(value):
        kept.append(value.numel())
        return value

    def last(step):
        kept.clear()
        x = torch.ones(20, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
            last_carry = lax.scan(step, torch.ones(()), x)[0]
        last_carry.backward()
        return sum(kept), x.grad

    def step(c, x):
        wide = (c * x).expand(1000)
        return torch.sin(torch.cos(wide) * wide).mean(), None

    plain, expected_gradient = last(step)
    few, gradient = last(torchbatch.checkpoint(step))
    assert few < 1000 < plain
    assert_close(gradient, expected_gradient)


def test_a_long_loop_keeps_nothing():
    alive = []

    def count():
        return sum(issubclass(type(value), torch.Tensor) for value in gc.get_objects())

    def step(c, x):
        if int(c) in (50, 1950):
            alive.append(count())
        return c + 1, c * x

    torchbatch.jvp(lambda x: lax.scan(step, torch.tensor(0.0), x)[1], (torch.ones(2000),), (torch.ones(2000),))
    assert alive[1] - alive[0] < 3 * 256
    alive.clear()
    lax.while_loop(lambda c: c < 2000, lambda c: step(c, c)[0], torch.tensor(0.0))
    assert alive[1] - alive[0] < 10


@pytest.mark.parametrize("name", ["scan", "fori_loop", "map", "while_loop"])
def test_one_step_tells_all_shapes(name):
    ran = []

    def noted(c, x):
        ran.append(1)
        return c + x, (c > x, x)

    calls = {
        "scan": lambda x: lax.scan(noted, 0, x),
        "fori_loop": lambda x: lax.fori_loop(0, 50, lambda i, c: noted(c, i)[0] + x.sum(), 0),
        "map": lambda x: lax.map(lambda z: noted(z, x.sum())[1], x),
        "while_loop": lambda x: lax.while_loop(lambda c: c < 9, lambda c: noted(c, x.sum())[0], 0),
    }
    x = torch.arange(50.0)
    shapes = torchbatch.eval_shape(calls[name], x)
    assert len(ran) <= 2  # the second time with a number's new dtype
    expected = torchbatch.tree.map(lambda leaf: torchbatch.ShapeDtypeStruct(leaf.shape, leaf.dtype), calls[name](x))
    assert shapes == expected
    mapped = torchbatch.eval_shape(vmap(calls[name]), torch.ones(7, 50))
    assert mapped == torchbatch.tree.map(lambda leaf: torchbatch.ShapeDtypeStruct((7, *leaf.shape), leaf.dtype), shapes)


@pytest.mark.parametrize("backend", [None, "eager"])
def test_no_samples(backend):
    empty = torch.zeros(0)
    for fun in (
        lambda x: lax.while_loop(lambda c: c < 3, lambda c: c + x, 0.0),
        lambda x: lax.scan(lambda c, z: (c + x, c), x, None, length=3)[0],
        lambda x: lax.fori_loop(0, x.int(), lambda i, c: c + 1, x),
        lambda x: lax.cond(x > 0, torch.sin, torch.cos, x),
    ):
        found = vmap(fun) if backend is None else torchbatch.jit(vmap(fun), backend=backend)
        assert found(empty).shape == (0,)
    assert torch.func.vmap(EACH["while_loop"])(torch.zeros(0, 3)).shape == (0, 3)


@pytest.mark.parametrize("bounds", [(np.int64(0), np.int32(3)), (np.array(0), 3), (torch.tensor(0), torch.tensor(3))])
@pytest.mark.parametrize("backend", [None, "eager"])
def test_bounds_of_other_kinds(bounds, backend):
    fun = lambda x: lax.fori_loop(*bounds, lambda i, c: c * x + i, x)  # noqa: E731
    found = fun if backend is None else torchbatch.jit(fun, backend=backend)
    assert found(torch.tensor(2.0)) == 20  # ((2·2 + 0)·2 + 1)·2 + 2
    if backend is None or not isinstance(bounds[0], torch.Tensor):  # where jit traces, the value of a tensor is not known
        slope = torchbatch.grad(fun) if backend is None else torchbatch.jit(torchbatch.grad(fun), backend=backend)
        assert slope(torch.tensor(2.0)) == 33  # 4x³ + 1


@pytest.mark.parametrize("name", ["fori_loop", "scan", "switch", "cond"])
def test_sizes_that_are_open(name):
    fun = {
        "fori_loop": lambda x: lax.fori_loop(0, lax.axis_size("i"), lambda i, c: c * x + i, x),
        "scan": lambda x: lax.scan(lambda c, _: (c * x, c), x, None, length=lax.axis_size("i"))[1].sum(),
        "switch": lambda x: lax.switch(lax.axis_size("i") - 3, [torch.sin, torch.cos], x),
        "cond": lambda x: lax.cond(lax.axis_size("i") > 3, torch.sin, torch.cos, x),
    }[name]
    call = vmap(torchbatch.value_and_grad(fun), axis_name="i")
    found = torchbatch.jit(call, backend="eager", dynamic=True)
    for size in (3, 5, 3):
        x = torch.rand(size)
        assert_close(found(x), call(x))


def test_map_without_batches():
    assert lax.map(torch.neg, torch.arange(3), batch_size=0).tolist() == [0, -1, -2]  # as in JAX


@pytest.mark.parametrize("backend", [None, "eager"])
def test_numbers_keep_their_digits(backend):
    z = torch.zeros(2, dtype=torch.float64)
    for fun in (
        lambda z, n: lax.scan(lambda c, x: (c + x, None), n, z)[0],
        lambda z, n: lax.scan(lambda c, x: (n, None), z[0], z)[0],
        lambda z, n: vmap(lambda z: lax.cond(z < 1, lambda: n, lambda: z))(z)[0],
        lambda z, n: lax.while_loop(lambda c: c < 0.05, lambda c: c + z[0], n),
        lambda z, n: lax.cond(z[0] < 1, lambda: n + z[0], lambda: z[0]),
    ):
        for call in (fun, lambda z, _, fun=fun: fun(z, 0.1)):
            assert (call if backend is None else torchbatch.jit(call, backend=backend))(z, 0.1).item() == 0.1


@pytest.mark.parametrize("backend", [None, "eager"])
def test_a_number_of_a_branch_gives_way(backend):
    half = torch.tensor(3.0, dtype=torch.bfloat16)
    for fun in (
        lambda x, n: vmap(lambda x: lax.cond(x > 0, lambda: n * 2, lambda: half))(x),
        lambda x, n: vmap(lambda x: lax.switch((x > 0).int(), [lambda: half, lambda: n * 2, lambda: 1.0]))(x),
        lambda x, n: vmap(lambda x: lax.cond(x > 0, lambda n: n, lambda n: half, n * 2))(x),
    ):
        found = (fun if backend is None else torchbatch.jit(fun, backend=backend))(torch.tensor([1.0, -1.0]), 2.0)
        assert found.dtype is torch.bfloat16 and found.tolist()[0] == 4
    if backend:
        found = torchbatch.jit(lambda x, n: lax.cond(x > 0, lambda: n, lambda: half), backend=backend)(torch.tensor(1.0), 2.0)
        assert found.dtype is torch.bfloat16 and found == 2
