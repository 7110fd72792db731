"""Rule 11 in programs that hypothesis writes: collectives, names, nestings, transforms, loops, as they stand and traced.

Each is held against live JAX, and against the same program on whole arrays, in which a mapped axis is an axis like any other
and a derivative is that of the sum over all samples.
"""

from __future__ import annotations

import math
import os
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st

import torchbatch
from torchbatch import lax
from torchbatch.testing import assert_close

jax = pytest.importorskip("jax")
TRANSFORMS = ("vmap", "grad", "jvp", "jacrev", "jacfwd")
OURS = SimpleNamespace(lax=lax, np=torch, **{name: getattr(torchbatch, name) for name in TRANSFORMS})
THEIRS = SimpleNamespace(lax=jax.lax, np=jax.numpy, **{name: getattr(jax, name) for name in TRANSFORMS})
WIDTH = 2
LONG = os.environ.get("HYPOTHESIS_PROFILE") == "long"


class Step(NamedTuple):
    """One collective over some of the named axes, and where it stands."""

    function: str
    names: tuple[str, ...]
    number: int  # chooses a sample, or an order of them
    place: str


class Program(NamedTuple):
    labels: tuple[str, ...]  # outermost first
    sizes: tuple[int, ...]
    mapped: tuple[bool, ...]
    around: tuple[str, ...]  # the transform around each vmap; the last one is inside of all
    steps: tuple[Step, ...]

    def count(self, names: tuple[str, ...]) -> int:
        return math.prod(self.sizes[self.labels.index(name)] for name in names)


# --- a collective, from values to values of the same shape -----------------------------------------------------------


def weights(n: int) -> list[float]:
    return [0.5 - i / 3 for i in range(n)]


def order(n: int, number: int) -> list[int]:
    return [(i * 2 + number) % n if n % 2 else (i + number) % n for i in range(n)]


def weighted(m, parts, n):
    return sum(weight * parts[i] for i, weight in enumerate(weights(n)))


def copies(m, v, n):
    return m.np.stack([v * (k + 1) for k in range(n)])


COLLECTIVES: dict[str, Any] = {  # for several names: those that JAX has for several
    "psum": lambda m, v, names, n, k: m.lax.psum(v, names),
    "pmean": lambda m, v, names, n, k: m.lax.pmean(v, names),
    "pmax": lambda m, v, names, n, k: m.lax.pmax(v, names),
    "pmin": lambda m, v, names, n, k: m.lax.pmin(v, names),
    "axis_index": lambda m, v, names, n, k: v * (1 + m.lax.axis_index(names)),
    "psum of a constant": lambda m, v, names, n, k: v / m.lax.psum(1.0 + k, names),
}
ONE_NAME: dict[str, Any] = {
    "all_gather": lambda m, v, name, n, k: weighted(m, m.lax.all_gather(v, name), n),
    "all_gather tiled": lambda m, v, name, n, k: weighted(m, m.lax.all_gather(v[None], name, tiled=True), n),
    "all_gather last": lambda m, v, name, n, k: weighted(m, m.lax.all_gather(v, name, axis=-1).T, n),
    "all_to_all": lambda m, v, name, n, k: weighted(m, m.lax.all_to_all(copies(m, v, n), name, 0, 0), n),
    "all_to_all tiled": lambda m, v, name, n, k: weighted(m, m.lax.all_to_all(copies(m, v, n), name, 0, 0, tiled=True), n),
    "pswapaxes": lambda m, v, name, n, k: weighted(m, m.lax.pswapaxes(copies(m, v, n), name, 0), n),
    "psum_scatter": lambda m, v, name, n, k: m.lax.psum_scatter(copies(m, v, n), name),
    "psum_scatter tiled": lambda m, v, name, n, k: m.lax.psum_scatter(copies(m, v, n), name, tiled=True)[0],
    "pshuffle": lambda m, v, name, n, k: m.lax.pshuffle(v, name, order(n, k)),
    "ppermute": lambda m, v, name, n, k: m.lax.ppermute(v, name, [(s, d) for d, s in enumerate(order(n, k))]),
}
IN_TORCH_ONLY: dict[str, Any] = {  # JAX has an error there, or gives it no derivative, or has it on devices only
    "pbroadcast": lambda m, v, names, n, k: m.lax.pbroadcast(v, names, k % n),
    "pargmax": lambda m, v, names, n, k: v + m.lax.pargmax(v, names),
    "pargmin": lambda m, v, names, n, k: v + m.lax.pargmin(v, names),
}
EVERY = {**COLLECTIVES, **ONE_NAME, **IN_TORCH_ONLY}


def collective(m, step, v, n):
    names = step.names if step.function in COLLECTIVES or step.function in IN_TORCH_ONLY else step.names[0]
    return EVERY[step.function](m, v, names, n, step.number)


def on_whole(step, x, program):
    """The same on the whole array, whose first axes are the named ones."""
    names = step.names if step.function in COLLECTIVES or step.function in IN_TORCH_ONLY else step.names[:1]
    places, n = [program.labels.index(name) for name in names], program.count(names)
    kept = list(range(len(places)))
    moved = x.movedim(places, kept)
    flat = moved.reshape(n, *moved.shape[len(places) :])
    numbers = torch.arange(n).reshape(n, *[1] * (flat.dim() - 1))
    result = whole_collective(step.function, flat, numbers, n, step.number).expand(flat.shape)
    return result.reshape(moved.shape).movedim(kept, places)


def whole_collective(function, flat, numbers, n, k):
    kind = function.split()[0]
    if function == "psum of a constant":
        return flat / ((1 + k) * n)
    if kind in ("pargmax", "pargmin"):
        return flat + (flat.argmax(0) if kind == "pargmax" else flat.argmin(0))
    if kind in ("pshuffle", "ppermute"):
        return flat[order(n, k)]
    gathered = sum(weight * flat[i] for i, weight in enumerate(weights(n)))
    return {
        "psum": lambda: flat.sum(0),
        "pmean": lambda: flat.mean(0),
        "pmax": lambda: flat.amax(0),
        "pmin": lambda: flat.amin(0),
        "axis_index": lambda: flat * (1 + numbers),
        "all_gather": lambda: gathered,
        "all_to_all": lambda: gathered * (1 + numbers),
        "pswapaxes": lambda: gathered * (1 + numbers),
        "psum_scatter": lambda: flat.sum(0) * (1 + numbers),
        "pbroadcast": lambda: flat[k % n],
    }[kind]()


# --- where it stands -------------------------------------------------------------------------------------------------


def stands(m, step, v, n):
    """The collective by itself, or in a loop or a branch; ``odd`` samples of its first axis take the other branch."""

    def run(v):
        return collective(m, step, m.np.sin(v), n) + 0.3 * v

    if step.place == "scan":
        return m.lax.scan(lambda c, _: (run(c), None), v, None, length=2)[0]
    if step.place == "while_loop":
        return m.lax.while_loop(lambda s: s[0] < 2, lambda s: (s[0] + 1, run(s[1])), (0, v))[1]
    if step.place == "cond":
        return m.lax.cond(m.lax.axis_index(step.names[0]) % 2 == 0, run, lambda v: 2 * v, v)
    return run(v)


def stands_in_whole(step, x, program):
    def run(x):
        return on_whole(step, torch.sin(x), program) + 0.3 * x

    if step.place in ("scan", "while_loop"):
        return run(run(x))
    if step.place == "cond":
        place = program.labels.index(step.names[0])
        index = torch.arange(x.shape[place]).reshape(-1, *[1] * (x.dim() - place - 1))
        return torch.where(index % 2 == 0, run(x), 2 * x)
    return run(x)


# --- transforms, from functions to functions of the same shapes ------------------------------------------------------


def transformed(m, kind, fun):
    if kind == "grad":
        return m.grad(lambda x: fun(x).sum())
    if kind == "jvp":
        return lambda x: m.jvp(fun, (x,), (m.np.cos(x),))[1]
    if kind == "jacrev":
        jacobian = m.jacrev(lambda x: fun(x).reshape(-1))
        return lambda x: jacobian(x).sum(0)
    if kind == "jacfwd":
        return lambda x: over_inputs(m.jacfwd(fun)(x), x)
    return fun


def over_inputs(jacobian, x):
    return jacobian.reshape(*jacobian.shape[: jacobian.ndim - x.ndim], -1).sum(-1)


def built(m, program):
    def fun(v):
        for step in program.steps:
            v = stands(m, step, v, program.count(step.names))
        return v

    fun = transformed(m, program.around[-1], fun)
    for i in reversed(range(len(program.labels))):
        axes = 0 if program.mapped[i] else None
        fun = m.vmap(fun, in_axes=axes, axis_name=program.labels[i], axis_size=program.sizes[i])
        fun = transformed(m, program.around[i], fun)
    return fun


def built_whole(program):
    """Summed over its outputs, a Jacobian is a gradient; summed over its inputs, it is the derivative along ones."""

    def along(kind, fun):
        if kind == "jacfwd":
            return lambda x: torchbatch.jvp(fun, (x,), (torch.ones_like(x),))[1]
        return transformed(OURS, "grad" if kind == "jacrev" else kind, fun)

    def fun(x):
        for step in program.steps:
            x = stands_in_whole(step, x, program)
        return x

    def at_level(fun, i):
        shape = [-1] * (len(program.labels) + 1)
        shape[i] = program.sizes[i]
        return lambda x: fun(x if program.mapped[i] else x.expand(shape).clone())

    fun = along(program.around[-1], fun)
    for i in reversed(range(len(program.labels))):
        fun = along(program.around[i], at_level(fun, i))
    return fun


def value_of(program, seed=0):
    shape = [size for size, mapped in zip(program.sizes, program.mapped, strict=True) if mapped]
    return np.random.default_rng(seed).uniform(-1, 1, (*shape, WIDTH)).astype(np.float32)


def by_whole(program, x):
    shape = [size if mapped else 1 for size, mapped in zip(program.sizes, program.mapped, strict=True)]
    return built_whole(program)(torch.tensor(x, dtype=torch.float64).reshape(*shape, WIDTH)).numpy()


# --- programs --------------------------------------------------------------------------------------------------------

REVERSE, FORWARD = ("grad", "jacrev"), ("jvp", "jacfwd")


@st.composite
def programs(draw, functions=tuple(COLLECTIVES) + tuple(ONE_NAME), several=tuple(COLLECTIVES), whole=False):
    depth = draw(st.integers(1, 3))
    labels = draw(st.permutations("abc"))[:depth]
    sizes = draw(st.lists(st.integers(1, 3), min_size=depth, max_size=depth))
    mapped = draw(st.lists(st.sampled_from([True, True, False]), min_size=depth, max_size=depth))
    around = ["nothing"] * (depth + 1)
    for _ in range(draw(st.integers(0, 2))):
        around[draw(st.integers(0, depth))] = draw(st.sampled_from([*REVERSE, *FORWARD]))
    steps = draw(st.lists(step(labels, mapped, around, functions, several, whole), min_size=1, max_size=2))
    return Program(tuple(labels), tuple(sizes), tuple(mapped), tuple(around), tuple(steps))


@st.composite
def step(draw, labels, mapped, around, functions, several, whole):
    derived = {*around} != {"nothing"}
    if not whole and (derived or not all(mapped)):  # JAX 0.10: results of the wrong shape where something does not vary
        functions = [f for f in functions if f.split()[0] not in ("all_to_all", "pswapaxes")]
    if not whole and len(labels) > 1:  # JAX 0.10: takes the wrong axis for the outer samples
        functions = [f for f in functions if f != "psum_scatter"]
    function = draw(st.sampled_from([f for f in functions if not (derived and f in ("pmax", "pmin"))]))
    most = len(labels) if function in several else 1
    names = draw(st.lists(st.sampled_from(labels), min_size=1, max_size=most, unique=True))
    places = ["plain", "plain", "scan", *([] if {*around} & {*REVERSE} else ["while_loop"])]
    places += [] if derived else ["cond"]  # what JAX says of samples that do not take the branch changes with the nesting
    return Step(function, tuple(names), draw(st.integers(0, 2)), draw(st.sampled_from(places)))


def close(ours, theirs, program):
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape and ours.dtype == np.float32, (program, ours.shape, theirs.shape)
    assert_close(ours, theirs, rtol=2e-3, atol=2e-3 * max(1, np.abs(theirs).max()), where=str(program), dtypes=False)


def reverse_over_forward(program):
    """Whether a gradient is taken of a derivative in forward mode, with a loop inside: see the last test."""
    kinds = [kind for kind in program.around if kind != "nothing"]
    loops = any(step.place == "scan" for step in program.steps)
    return loops and len(kinds) == 2 and kinds[0] in REVERSE and kinds[1] in FORWARD


def examples(how, count):
    phases = [phase for phase in Phase if phase is not Phase.shrink or LONG]  # what fails is not made smaller: it takes minutes
    return settings(how.examples(count), suppress_health_check=list(HealthCheck), phases=phases)


EVERY_WAY = pytest.mark.parametrize("how", ["eager", "jit"], indirect=True)


@EVERY_WAY
def test_rule_11_programs_as_in_jax(how):
    @examples(how, 30)
    @given(programs())
    def holds(program):
        assume(how.backend is None or not reverse_over_forward(program))
        x = value_of(program)
        ours = how.run(built(OURS, program))(torch.tensor(x))
        close(ours, jax.jit(built(THEIRS, program))(x), program)

    holds()


@EVERY_WAY
def test_rule_11_programs_as_on_whole_arrays(how):
    @examples(how, 50)
    @given(programs(tuple(EVERY), tuple({**COLLECTIVES, **IN_TORCH_ONLY}), whole=True))
    def holds(program):
        assume(how.backend is None or not reverse_over_forward(program))
        x = value_of(program)
        whole = by_whole(program, x)
        ours = how.run(built(OURS, program))(torch.tensor(x)).numpy()
        close(ours, whole.reshape(ours.shape) if whole.size == ours.size else whole, program)

    holds()


def test_an_example_of_a_program():
    """What the two tests above would say if nothing were generated any more."""
    steps = (Step("psum", ("b", "a"), 0, "scan"), Step("all_to_all", ("a",), 1, "plain"))
    program = Program(("a", "b"), (3, 2), (True, True), ("grad", "jvp", "nothing"), steps)
    x = value_of(program)
    ours = built(OURS, program)(torch.tensor(x))
    close(ours, by_whole(program, x), program)
    close(ours, jax.jit(built(THEIRS, program))(x), program)


@pytest.mark.parametrize("function", ["psum", "ppermute", "all_gather", "psum_scatter"])
def test_forward_mode_inside_forward_mode(function):
    """PyTorch loses the second tangent of an ``autograd.Function`` there."""
    for around in [
        ("jvp", "nothing", "jvp"),
        ("jvp", "jacfwd", "nothing"),
        ("nothing", "jvp", "jvp"),
        ("nothing", "jacfwd", "jvp"),
    ]:
        program = Program(("a", "b"), (3, 2), (True, True), around, (Step(function, ("a",), 1, "plain"),))
        x = value_of(program)
        close(built(OURS, program)(torch.tensor(x)), by_whole(program, x), program)


def test_jit_of_a_gradient_of_a_forward_derivative_of_scan():
    program = Program(("a",), (3,), (True,), ("grad", "jvp"), (Step("psum", ("a",), 0, "scan"),))
    x = value_of(program)
    close(torchbatch.jit(built(OURS, program), backend="eager")(torch.tensor(x)), by_whole(program, x), program)
