"""Small programs of loops and choices, one inside the other, next to the same program in plain Python, and to live JAX."""

from __future__ import annotations

import functools
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import torchbatch
from torchbatch import lax
from torchbatch.testing import assert_close, loop

LONG = os.environ.get("HYPOTHESIS_PROFILE") == "long"
WEIGHTS = (0.5, -1.0, 0.25)
X = np.array([-0.7, 0.3, 1.1], np.float32)


# --- what a program is -----------------------------------------------------------------------------------------------
# A tree of tuples: a name and what is inside. It takes a carry and a value, both single numbers, and gives the next carry.

SIMPLE = {
    "sin": lambda m, c, x: m.np.sin(c + x),
    "product": lambda m, c, x: c * x + 0.5,
    "tanh": lambda m, c, x: m.np.tanh(c - 2 * x),
}
KINDS = ("scan", "reverse", "fori", "map", "cond", "closing cond", "switch", "then", "while")


def run(m, program, c, x):
    name, *parts = program
    if name in SIMPLE:
        return SIMPLE[name](m, c, x)
    return globals()[f"run_{name.replace(' ', '_')}"](m, parts, c, x)


def run_scan(m, parts, c, x, reverse=False):
    last, ys = m.lax.scan(lambda h, z: (run(m, parts[0], h, z), h * z), c, m.array(WEIGHTS) * x, reverse=reverse)
    return last + (ys * m.array(WEIGHTS)).sum()


run_reverse = functools.partial(run_scan, reverse=True)


def run_fori(m, parts, c, x):
    return m.lax.fori_loop(1, 4, lambda i, h: run(m, parts[0], h, x) / i, c)


def run_map(m, parts, c, x):
    return m.lax.map(lambda z: run(m, parts[0], z, x), m.array(WEIGHTS) * c).sum()


def run_cond(m, parts, c, x):
    return m.lax.cond(c > x, lambda h: run(m, parts[0], h, x), lambda h: run(m, parts[1], h, x), c)


def run_closing_cond(m, parts, c, x):
    return m.lax.cond(c < x, lambda: run(m, parts[0], c, x), lambda: run(m, parts[1], x, c))


def run_switch(m, parts, c, x):
    index = (c > 0) * 1 + (x > 0) * 1
    return m.lax.switch(index, [lambda h: run(m, parts[0], h, x), lambda h: run(m, parts[1], x, h), lambda h: h * x], c)


def run_then(m, parts, c, x):
    return run(m, parts[1], run(m, parts[0], c, x), x)


def run_while(m, parts, c, x):
    return m.lax.while_loop(lambda s: (s[0] < 4) & (s[1] < 1.0), lambda s: (s[0] + 1, run(m, parts[0], s[1], x) + 0.4), (0, c))[1]


def programs(kinds):
    def around(inner):
        two = st.tuples(st.sampled_from([k for k in kinds if k in ("cond", "closing cond", "switch", "then")]), inner, inner)
        one = st.tuples(st.sampled_from([k for k in kinds if k in ("scan", "reverse", "fori", "map", "while")]), inner)
        return st.one_of(one, two)

    return around(st.recursive(st.tuples(st.sampled_from(sorted(SIMPLE))), around, max_leaves=3))


# --- who runs it -----------------------------------------------------------------------------------------------------


def plain_scan(f, carry, xs, reverse=False):
    ys = []
    for x in xs.flip(0) if reverse else xs:
        carry, y = f(carry, x)
        ys.append(y)
    return carry, torch.stack(ys[::-1] if reverse else ys)


def plain_while(condition, body, state):
    while condition(state):
        state = body(state)
    return state


PLAIN = SimpleNamespace(
    scan=plain_scan,
    while_loop=plain_while,
    fori_loop=lambda start, stop, body, value: functools.reduce(lambda h, i: body(i, h), range(start, stop), value),
    map=lambda f, xs: torch.stack([f(x) for x in xs]),
    cond=lambda p, yes, no, *operands: (yes if p else no)(*operands),
    switch=lambda i, branches, *operands: branches[i](*operands),
)
OURS = SimpleNamespace(lax=lax, np=torch, array=torch.tensor, vmap=torchbatch.vmap, grad=torchbatch.grad, jvp=torchbatch.jvp)
LOOP = SimpleNamespace(lax=PLAIN, np=torch, array=torch.tensor, vmap=loop, grad=torchbatch.grad, jvp=torchbatch.jvp)
AROUND = {
    "vmap": lambda m, f: m.vmap(f),
    "vmap grad": lambda m, f: m.vmap(m.grad(f)),
    "vmap grad grad": lambda m, f: m.vmap(m.grad(m.grad(f))),
    "grad vmap": lambda m, f: m.grad(lambda x: m.vmap(f)(x).sum()),
    "grad": lambda m, f: lambda x: m.grad(f)(x[0]),
    "jvp": lambda m, f: lambda x: m.jvp(f, (x[1],), (x[2],)),
    "vmap jvp": lambda m, f: m.vmap(lambda x: m.jvp(f, (x,), (x * 2,))),
    "two vmaps": lambda m, f: lambda x: m.vmap(lambda a: m.vmap(lambda b: f(a * b))(x))(x),
}
FORWARD = ("vmap", "jvp", "vmap jvp", "two vmaps")


def call(m, program, around):
    return AROUND[around](m, lambda x: run(m, program, x * 0.5, x))


def close(ours, theirs):
    pairs = [(ours, theirs)] if not isinstance(ours, tuple) else zip(ours, theirs, strict=True)
    for mine, other in pairs:
        assert_close(np.asarray(mine.detach()), np.asarray(other), rtol=2e-4, atol=2e-5, dtypes=False)


cases = st.one_of(
    st.tuples(programs(KINDS), st.sampled_from(FORWARD)), st.tuples(programs(KINDS[:-1]), st.sampled_from(sorted(AROUND)))
)


def few(count, long):
    return settings(max_examples=long if LONG else count, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@given(cases)
@few(5, 400)
def test_as_in_plain_python(case):
    x = torch.tensor(X)
    ours = call(OURS, *case)
    expected = call(LOOP, *case)(x)
    close(ours(x), expected)
    close(torchbatch.jit(ours, backend="eager")(x), expected)


@given(cases)
@few(2, 200)
def test_as_in_jax(case):
    jax = pytest.importorskip("jax")
    theirs = SimpleNamespace(lax=jax.lax, np=jax.numpy, array=jax.numpy.array, vmap=jax.vmap, grad=jax.grad, jvp=jax.jvp)
    ours, expected = call(OURS, *case), jax.jit(call(theirs, *case))(X)
    x = torch.tensor(X)
    close(ours(x), expected)
    close(torchbatch.jit(ours, backend="eager")(x), expected)


NESTED = {
    "scan in a mapped cond in a scan": ("scan", ("closing cond", ("scan", ("product",)), ("fori", ("sin",)))),
    "cond in a scan in a cond": ("closing cond", ("reverse", ("cond", ("sin",), ("product",))), ("map", ("tanh",))),
    "switch of loops": ("switch", ("fori", ("closing cond", ("sin",), ("tanh",))), ("scan", ("product",))),
}


@pytest.mark.parametrize("name", NESTED)
@pytest.mark.parametrize("around", ["vmap grad", "grad vmap", "vmap grad grad"] if LONG else ["grad vmap"])
def test_nested(name, around):
    x = torch.tensor(X)
    ours, expected = call(OURS, NESTED[name], around), call(LOOP, NESTED[name], around)(x)
    close(ours(x), expected)
    close(torchbatch.jit(ours, backend="eager")(x), expected)


def test_traced_twice():
    """PyTorch makes a tangent of float64 here, which no view can show."""
    x, case = torch.tensor(X), (("closing cond", ("tanh",), ("fori", ("sin",))), "jvp")
    expected, ours = call(LOOP, *case)(x), call(OURS, *case)
    for _ in range(3):
        close(torchbatch.jit(ours, backend="eager")(x), expected)
