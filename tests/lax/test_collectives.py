"""Rule 11: collectives inside mapped functions, next to live JAX and to plain NumPy."""

from __future__ import annotations

import inspect
import math
import subprocess
import sys
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.fx.experimental.proxy_tensor import make_fx

import torchbatch
from torchbatch import checkpoint, errors, grad, jit, lax, vmap
from torchbatch.testing import assert_close

jax = pytest.importorskip("jax")
EVERY_WAY = pytest.mark.parametrize("how", ["eager", "jit", "inductor"], indirect=True)
RNG = np.random.default_rng(0)
TRANSFORMS = ("vmap", "grad", "jvp", "jacrev", "jacfwd", "hessian")
OURS = SimpleNamespace(lax=lax, np=torch, array=torch.tensor, **{name: getattr(torchbatch, name) for name in TRANSFORMS})
parallel = pytest.importorskip("jax._src.lax.parallel")  # pargmax and pargmin are in no public module of JAX any more


def jax_pbroadcast(x, axis_name, source):
    """What JAX 0.10 says that its pbroadcast is; its own rule for vmap fails."""

    def one(leaf):
        sent = jax.numpy.where(jax.lax.axis_index(axis_name) == source, leaf, jax.numpy.zeros_like(leaf))
        return jax.lax.psum(sent, axis_name).astype(sent.dtype)

    return jax.tree.map(one, x)


SUBSTITUTES = {"pargmax": parallel.pargmax, "pargmin": parallel.pargmin, "pbroadcast": jax_pbroadcast}
JAX_LAX = SimpleNamespace(**{**vars(jax.lax), **SUBSTITUTES})
THEIRS = SimpleNamespace(lax=JAX_LAX, np=jax.numpy, array=jax.numpy.asarray, **{name: getattr(jax, name) for name in TRANSFORMS})


def data(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


X = data(3, 4)


def tx():
    return torch.tensor(X)


def over_i(fun, x=None, **options):
    """``vmap(fun, axis_name="i")`` of three rows."""
    return vmap(fun, axis_name="i", **options)(tx() if x is None else x)


def same(ours, theirs):
    a, a_structure = jax.tree.flatten(jax.tree.map(np.asarray, ours))
    b, b_structure = jax.tree.flatten(jax.tree.map(np.asarray, theirs))
    assert a_structure == b_structure
    for mine, other in zip(a, b, strict=True):
        assert mine.shape == other.shape and mine.dtype.kind == other.dtype.kind, (mine, other)
        assert_close(mine, other, rtol=2e-4, atol=2e-4, dtypes=False)


def agree(thunk, jit=False):
    """What a thunk of a library gives in both."""
    ours = thunk(OURS)
    same(ours, jax.jit(lambda: thunk(THEIRS))() if jit else thunk(THEIRS))
    return ours


def times(x, number):
    return jax.tree.map(lambda leaf: leaf * number, x) if isinstance(x, dict) else x * number


# Each takes a module of collectives, a value or tree, the name or names, and the number of samples.
FUNCTIONS = {
    "psum": lambda lax, x, names, n: lax.psum(x, names),
    "pmean": lambda lax, x, names, n: lax.pmean(x, names),
    "pmax": lambda lax, x, names, n: lax.pmax(x, names),
    "pmin": lambda lax, x, names, n: lax.pmin(x, names),
    "pargmax": lambda lax, x, names, n: lax.pargmax(x, names),
    "pargmin": lambda lax, x, names, n: lax.pargmin(x, names),
    "pbroadcast": lambda lax, x, names, n: lax.pbroadcast(x, names, n - 1),
    "all_gather": lambda lax, x, names, n: lax.all_gather(x, names),
    "all_gather last": lambda lax, x, names, n: lax.all_gather(x, names, axis=-1),
    "all_gather tiled": lambda lax, x, names, n: lax.all_gather(x, names, axis=1, tiled=True),
    "all_to_all 00": lambda lax, x, names, n: lax.all_to_all(x, names, 0, 0),
    "all_to_all 01": lambda lax, x, names, n: lax.all_to_all(x, names, 0, 1),
    "all_to_all 00 in parts": lambda lax, x, names, n: lax.all_to_all(x, names, 0, 0, tiled=True),
    "all_to_all 01 in parts": lambda lax, x, names, n: lax.all_to_all(x, names, 0, 1, tiled=True),
    "psum_scatter": lambda lax, x, names, n: lax.psum_scatter(x, names),
    "psum_scatter in parts": lambda lax, x, names, n: lax.psum_scatter(x, names, tiled=True),
    "ppermute": lambda lax, x, names, n: lax.ppermute(x, names, [(i, (i + 1) % n) for i in range(n)]),
    "pshuffle": lambda lax, x, names, n: lax.pshuffle(x, names, list(range(n))[::-1]),
    "pswapaxes": lambda lax, x, names, n: lax.pswapaxes(x, names, 0),
    "axis_index": lambda lax, x, names, n: times(x, lax.axis_index(names)),
    "axis_size": lambda lax, x, names, n: times(x, lax.axis_size(names)),
}
IN_JAX = [name for name in FUNCTIONS if hasattr(JAX_LAX, name.split()[0])]
FLAT = ("pargmax", "pargmin")  # JAX has them for arrays only, not for trees
DERIVED = [name for name in IN_JAX if name not in ("pmax", "pmin", "axis_size", *FLAT)]  # JAX has no derivative of pmax
SEVERAL = ("psum", "pmean", "pmax", "pmin", "all_to_all", "axis_index", "axis_size")  # JAX has no others over a tuple
NAMES = {"inner": "inner", "outer": "outer", "both": ("outer", "inner"), "turned": ("inner", "outer")}


def number(names):
    """The number of samples: two inner ones in each of three outer ones."""
    return 6 if isinstance(names, tuple) else {"inner": 2, "outer": 3}[names]


def rows(function, n):
    return 2 * n if "parts" in function else n


def cases(functions, nestings=tuple(NAMES)):
    return [
        pytest.param(function, NAMES[nesting], id=f"{function}-{nesting}")
        for function in functions
        for nesting in nestings
        if nesting in ("inner", "outer") or function.split()[0] in SEVERAL
    ]


def nested(lib, fun, between=lambda f: f, outside=0, inside=0):
    inner = lib.vmap(fun, in_axes=inside, axis_name="inner", axis_size=2)
    return lib.vmap(between(inner), in_axes=outside, axis_name="outer", axis_size=3)


def varied(lib, function, value, names):
    """The value; for JAX's all_to_all, whose result has a wrong shape for what is unmapped, made to vary in name."""
    if lib is OURS or not function.startswith(("all_to_all", "pswapaxes")):
        return value
    return jax.tree.map(lambda leaf: leaf + 0 * jax.lax.axis_index(names), value)


# --- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("function", "names"), cases(IN_JAX))
def test_rule_11_mapped_at_some_levels(function, names):
    n = number(names)
    x = data(3, 2, rows(function, n), 2)
    for outside, inside in [(0, 0), (0, None), (None, 0), (None, None)][: 4 if isinstance(names, str) else 2]:
        part = x[tuple(slice(None) if axis == 0 else 0 for axis in (outside, inside))]

        def thunk(lib, part=part, outside=outside, inside=inside):
            fun = nested(
                lib,
                lambda v: FUNCTIONS[function](lib.lax, varied(lib, function, v, names), names, n),
                outside=outside,
                inside=inside,
            )
            return fun(lib.array(part))

        agree(thunk)


@pytest.mark.parametrize("function", [name for name in IN_JAX if name not in FLAT])
def test_rule_11_trees_with_mapped_and_unmapped_leaves(function):
    x, y = data(3, rows(function, 3), 2), data(rows(function, 3), 2)

    def thunk(lib):
        def fun(x, y):
            return FUNCTIONS[function](lib.lax, varied(lib, function, {"m": x, "u": (y, None, [x * y])}, "i"), "i", 3)

        return lib.vmap(fun, in_axes=(0, None), axis_name="i")(lib.array(x), lib.array(y))

    agree(thunk)


@pytest.mark.parametrize("out_axes", [0, 1, -1])
@pytest.mark.parametrize("in_axes", [0, 1, -1])
@pytest.mark.parametrize("function", ["psum", "all_gather", "psum_scatter", "ppermute"])
def test_rule_11_axes(function, in_axes, out_axes):
    x = data(3, 3, 3)
    agree(lambda lib: lib.vmap(lambda v: FUNCTIONS[function](lib.lax, v, "i", 3), in_axes, out_axes, axis_name="i")(lib.array(x)))


@pytest.mark.parametrize("function", ["psum", "pmean", "pmax", "pmin", "pbroadcast"])
@pytest.mark.parametrize("dtype", ["bool", "int8", "int32", "float32", "float64"])
def test_rule_11_dtypes(function, dtype):
    x = np.asarray(X > 0 if dtype == "bool" else X * 10).astype(dtype)
    for axes in (0, None):
        ours = agree(
            lambda lib, a=axes: lib.vmap(lambda v: FUNCTIONS[function](lib.lax, v, "i", 3), a, axis_name="i", axis_size=3)(
                lib.array(x)
            )
        )
        if dtype != "bool" and function != "pmean":
            assert ours.dtype == torch.tensor(x).dtype


@pytest.mark.parametrize("function", ["psum", "pmean", "pmax", "pmin", "all_gather"])
def test_rule_11_an_empty_axis(function):
    agree(lambda lib: lib.vmap(lambda v: getattr(lib.lax, function)(v, "i"), axis_name="i")(lib.array(X[:0])))
    if function != "pmean":
        agree(lambda lib: lib.vmap(lambda v: getattr(lib.lax, function)(v, "i"), 0, None, axis_name="i")(lib.array(X[:0])))


@pytest.mark.parametrize("dtype", ["bool", "int16", "float32"])
@pytest.mark.parametrize("function", ["pmax", "pmin"])
def test_rule_11_the_extreme_of_no_samples(function, dtype):
    agree(
        lambda lib: lib.vmap(lambda v: getattr(lib.lax, function)(v, "i"), 0, None, axis_name="i")(
            lib.array(np.zeros((0, 2), dtype))
        )
    )


@pytest.mark.parametrize("function", FLAT)
@pytest.mark.parametrize("dtype", ["bool", "int8", "int32", "float32", "float64"])
def test_rule_11_the_first_of_equal_extremes(function, dtype):
    x = np.array([[0, 1, 2], [5, 1, 2], [5, 0, 1], [0, 0, 5]]).astype(dtype)
    for axes, out in [(0, 0), (0, None), (None, 0)]:
        ours = agree(
            lambda lib, a=axes, o=out: lib.vmap(lambda v: getattr(lib.lax, function)(v, "i"), a, o, axis_name="i", axis_size=4)(
                lib.array(x)
            )
        )
        assert ours.dtype is torch.int64
    nothing = vmap(lambda v: getattr(lax, function)(v, "i"), 0, None, axis_name="i")(torch.tensor(x[:0]))
    assert nothing.tolist() == [torch.iinfo(torch.int64).max] * 3  # JAX: the largest number of its own type


@pytest.mark.parametrize("function", FLAT)
def test_the_place_of_an_extreme_is_that_of_torch(function):
    x = torch.tensor([1.0, math.nan, 5.0, math.nan, -5.0])
    there = {"pargmax": torch.argmax, "pargmin": torch.argmin}[function]
    assert vmap(lambda v: getattr(lax, function)(v, "i"), 0, None, axis_name="i")(x) == there(x) == 1
    trees = over_i(lambda v: getattr(lax, function)({"a": v, "b": (3, None)}, "i"))
    same(trees, {"a": there(tx(), 0).expand(3, 4), "b": (torch.zeros(3, dtype=torch.int64), None)})


def test_pbroadcast_of_what_all_samples_share_needs_no_out_axis():
    assert torch.equal(over_i(lambda v: lax.pbroadcast(v, "i", 1), out_axes=None), tx()[1])


def test_rule_11_python_numbers():
    seen = []

    def fun(x):
        seen.append((lax.psum(1, "i"), lax.psum(2.5, "i"), lax.psum(True, "i"), lax.psum((1, None), ("i",)), lax.axis_size("i")))
        seen.append((lax.pmean(3, "i"), lax.pmax(3, "i"), lax.pmin({"a": 2.5}, "i")))
        return x

    over_i(fun)
    assert seen == [(3, 7.5, 3, (3, None), 3), (3.0, 3, {"a": 2.5})]
    assert [type(v) for v in seen[0]] == [int, float, int, tuple, int]
    assert math.isnan(vmap(lambda: lax.pmean(3, "i"), axis_name="i", axis_size=0, out_axes=None)())
    for function in ("all_gather", "ppermute", "pshuffle", "pbroadcast"):
        agree(lambda lib, f=function: lib.vmap(lambda v: FUNCTIONS[f](lib.lax, 3, "i", 3), axis_name="i")(lib.array(X)))


def test_rule_11_numpy_arrays():
    row = X[0]
    agree(lambda lib: lib.vmap(lambda v: (lib.lax.psum(row, "i"), lib.lax.all_gather(row, "i"), v), axis_name="i")(lib.array(X)))


def test_rule_11_groups_of_python_numbers():
    groups = [[0, 2], [3, 1]]

    def thunk(lib):
        options = {"axis_index_groups": groups}
        fun = lambda v: (lib.lax.psum(5, "i", **options), lib.lax.pmean(5, "i", **options), v)  # noqa: E731
        return lib.vmap(fun, axis_name="i")(lib.array(x))

    x = data(4)
    agree(thunk)
    assert vmap(lambda: lax.pmax(5, "i", axis_index_groups=groups), axis_name="i", axis_size=4, out_axes=None)() == 5


def test_rule_11_the_inner_of_two_equal_names():
    x = data(2, 3, 4)
    agree(lambda lib: lib.vmap(lib.vmap(lambda v: lib.lax.psum(v, "i"), axis_name="i"), axis_name="i")(lib.array(x)))


@pytest.mark.parametrize("function", ["psum", "pmean", "pmax", "pmin", "all_gather", "psum_scatter"])
def test_rule_11_no_names(function):
    assert torch.equal(over_i(lambda v: getattr(lax, function)(v, ())), tx())
    assert torch.equal(over_i(lambda v: getattr(lax, function)(v, [])), tx())


def test_rule_11_no_names_elsewhere():
    result = over_i(lambda v: (lax.axis_index(()), lax.axis_size(()), lax.pshuffle(v, (), [0]), lax.pswapaxes(v[None], (), 0)[0]))
    same(result, (torch.zeros(3, dtype=torch.int64), torch.ones(3, dtype=torch.int64), tx(), tx()))


@pytest.mark.parametrize("names", [("a", "b"), ("b", "a"), ["a", "b"]])
def test_rule_11_the_last_of_several_names_varies_fastest(names):
    """JAX has these over several names on devices only, so they are held against NumPy."""
    x = data(3, 2, 6, 4)
    perm = [4, 2, 0, 5, 1, 3]

    def fun(v):
        spread = lax.all_gather(v, names), lax.psum_scatter(v, names), lax.pshuffle(v, names, perm)
        places = lax.pargmax(v, names), lax.pbroadcast(v, names, 4)
        return *spread, *places, lax.ppermute(v, names, list(zip(perm, range(6), strict=True))), lax.axis_index(names)

    turned = names == ("b", "a")
    gathered, scattered, shuffled, place, sent, permuted, index = vmap(vmap(fun, axis_name="b"), axis_name="a")(torch.tensor(x))
    numbers = np.arange(6).reshape(2, 3).T if turned else np.arange(6).reshape(3, 2)
    flat = (x.swapaxes(0, 1) if turned else x).reshape(6, 6, 4)
    same(index, numbers)
    same(gathered, np.broadcast_to(flat, (3, 2, 6, 6, 4)))
    same(scattered, flat.sum(0)[numbers])
    same(shuffled, flat[np.array(perm)[numbers]])
    same(place, np.broadcast_to(flat.argmax(0), (3, 2, 6, 4)))
    same(sent, np.broadcast_to(flat[4], (3, 2, 6, 4)))
    same(permuted, shuffled)


def test_ppermute_gives_zeros_where_nothing_is_sent():
    x = tx()
    result = over_i(lambda v: lax.ppermute(v, "i", [(0, 2), (-1, 0)]), x)
    assert torch.equal(result, torch.stack([x[2], torch.zeros(4), x[0]]))
    nan = torch.full((3, 4), math.nan)
    assert torch.equal(over_i(lambda v: lax.ppermute(v, "i", []), nan), torch.zeros(3, 4))
    assert torch.equal(
        over_i(lambda v: lax.ppermute(v, "i", [(0, 1)]), torch.tensor([True, True, True])), torch.tensor([False, True, False])
    )


@pytest.mark.parametrize("function", ["psum", "pmean", "pmax", "pmin", "all_gather"])
def test_rule_11_what_all_samples_share_needs_no_out_axis(function):
    agree(lambda lib: lib.vmap(lambda v: FUNCTIONS[function](lib.lax, v, "i", 3), 0, None, axis_name="i")(lib.array(X)))


@pytest.mark.parametrize("function", FUNCTIONS)
def test_rule_11_writing_into_a_result_leaves_the_input_alone(function):
    x = torch.tensor(data(3, rows(function, 3), 2))
    before = x.clone()

    def fun(v):
        out = FUNCTIONS[function](lax, v, "i", 3)
        out.zero_()
        return v

    assert torch.equal(over_i(fun, x), before) and torch.equal(x, before)


def test_rule_11_per_sample_values_can_be_written_into_what_was_gathered():
    def fun(v):
        everyone = lax.all_gather(v, "i")
        everyone[0] = v
        return everyone

    x = tx()
    result = over_i(fun, x)
    assert all(torch.equal(result[i], torch.stack([x[i], x[1], x[2]])) for i in range(3))


def test_rule_11_tensors_made_and_filled_inside():
    def fun(v):
        made = torch.zeros(4)
        shared = lax.psum(made + 1, "i")
        made[:] = v
        return lax.psum(made, "i"), lax.all_gather(made, "i"), shared

    x = tx()
    same(over_i(fun, x), (x.sum(0).expand(3, 4), x.expand(3, 3, 4), torch.full((3, 4), 3.0)))


# --- derivatives -----------------------------------------------------------------------------------------------------


def loss_of(lib, function, names):
    def loss(x):
        y = FUNCTIONS[function](lib.lax, lib.np.sin(x), names, number(names))
        return (lib.np.sin(y) * y).sum() * x.sum()

    return loss


def summed(fun):
    return lambda x: fun(x).sum()


def along(lib, fun):
    return lambda x: lib.jvp(fun, (x,), (lib.np.cos(x),))


MODES = {
    "grad inside": lambda lib, loss: nested(lib, lib.grad(loss)),
    "grad between": lambda lib, loss: nested(lib, loss, lambda f: lib.grad(summed(f))),
    "grad outside": lambda lib, loss: lib.grad(summed(nested(lib, loss))),
    "grad of grad": lambda lib, loss: lib.grad(summed(nested(lib, lib.grad(loss)))),
    "jvp inside": lambda lib, loss: nested(lib, along(lib, loss)),
    "jvp between": lambda lib, loss: nested(lib, loss, lambda f: along(lib, f)),
    "jvp outside": lambda lib, loss: along(lib, nested(lib, loss)),
    "jacrev inside": lambda lib, loss: nested(lib, lib.jacrev(lib.grad(loss))),
    "jacrev between": lambda lib, loss: nested(lib, loss, lib.jacrev),
    "jacrev outside": lambda lib, loss: lib.jacrev(nested(lib, loss)),
    "jacfwd inside": lambda lib, loss: nested(lib, lib.jacfwd(loss)),
    "hessian inside": lambda lib, loss: nested(lib, lib.hessian(loss)),
}


MOST = ("grad inside", "grad between", "grad outside", "jvp inside", "jvp outside", "jacrev inside")
SOME = ("grad inside", "jvp between", "jacrev outside")
CORE = ("all_gather", "all_gather tiled", "all_to_all 01", "all_to_all 01 in parts", "psum_scatter", "ppermute")
ONE_NAME = cases(DERIVED, ("inner", "outer"))
TWO_NAMES = cases(["psum", "pmean", "axis_index"], ("both",))  # JAX fails to transpose all_to_all over two


@pytest.mark.parametrize(("function", "names"), ONE_NAME + TWO_NAMES)
def test_rule_11_derivatives(function, names):
    x = data(3, 2, rows(function, number(names)), 1) / 2

    modes = MODES if function == "psum" else MOST if function in CORE else SOME

    def thunk(lib):
        return {mode: MODES[mode](lib, loss_of(lib, function, names))(lib.array(x)) for mode in modes}

    agree(thunk, jit=True)


@pytest.mark.parametrize("function", ["pmax", "pmin"])
def test_the_derivative_of_an_extreme_is_that_of_torch(function):
    extreme = {"pmax": torch.amax, "pmin": torch.amin}[function]
    x, w = tx(), torch.arange(3.0)
    by_hand = torch.func.grad(lambda x: (extreme(x, 0)[None] * w[:, None]).sum())(x)
    fun = lambda v, w: (getattr(lax, function)(v, "i") * w).sum()  # noqa: E731
    assert torch.equal(torchbatch.grad(lambda x: vmap(fun, axis_name="i")(x, w).sum())(x), by_hand)
    assert torch.equal(vmap(torchbatch.grad(fun), axis_name="i")(x, w), by_hand)


def test_derivatives_of_ordinary_autograd_reach_through():
    x = tx().requires_grad_()
    y = vmap(vmap(lambda v: lax.psum(v, "o") * lax.axis_index("o"), axis_name="i"), axis_name="o")(x)
    (y * tx()).sum().backward()
    weights = (tx() * torch.arange(3.0)[:, None]).sum(0)
    assert_close(x.grad, weights.expand(3, 4))


def test_torch_func_around_and_inside():
    fun = lambda v: (lax.psum(v, "i") ** 2).sum()  # noqa: E731
    ours = over_i(torchbatch.grad(fun))
    assert_close(over_i(torch.func.grad(fun)), ours)
    x = tx().expand(2, 3, 4)
    assert_close(torch.func.vmap(vmap(torch.func.grad(fun), axis_name="i"))(x), ours.expand(2, 3, 4))
    inside = vmap(lambda rows: torch.func.vmap(lambda v: lax.psum(v, "i"))(rows), axis_name="i")(x)
    assert_close(inside, 2 * x)


# --- in any nesting --------------------------------------------------------------------------------------------------

DEPTH = 3
AROUND = {
    "nothing": lambda fun: fun,
    "vjp": lambda fun: lambda x: torchbatch.vjp(fun, x)[0],
    "jvp": lambda fun: lambda x: torchbatch.jvp(fun, (x,), (torch.ones_like(x),))[0],
    "torch.func.vmap": lambda fun: lambda x: torch.func.vmap(fun)(x[None])[0],
}


@st.composite
def nestings(draw):
    depth = draw(st.integers(1, DEPTH))
    labels = draw(st.permutations(["a", "b", "c"]))[:depth]
    sizes = draw(st.lists(st.integers(1, 3), min_size=depth, max_size=depth))
    mapped = draw(st.lists(st.booleans(), min_size=depth, max_size=depth))
    around = draw(st.lists(st.sampled_from(sorted(AROUND)), min_size=depth, max_size=depth))
    names = draw(st.lists(st.sampled_from(labels), min_size=1, unique=True))
    return labels, sizes, mapped, around, names


@EVERY_WAY
def test_rule_11_any_nesting_equals_numpy(how):
    @how.examples(80)
    @given(nestings(), st.sampled_from(["psum", "pmax", "all_gather", "pshuffle", "axis_index", "psum_scatter"]))
    def holds(nesting, function):
        labels, sizes, mapped, around, names = nesting
        places = [labels.index(name) for name in names]
        n = math.prod(sizes[place] for place in places)
        x = data(*[size if m else 1 for size, m in zip(sizes, mapped, strict=True)], n, 2)

        def fun(v):
            if function == "axis_index":
                return v + lax.axis_index(tuple(names))
            return FUNCTIONS[function](lax, v, tuple(names), n)

        for i in reversed(range(len(labels))):
            fun = AROUND[around[i]](vmap(fun, in_axes=0 if mapped[i] else None, axis_name=labels[i], axis_size=sizes[i]))
        value = torch.tensor(x.reshape(*[s for s, m in zip(sizes, mapped, strict=True) if m], n, 2))
        same(how.run(fun)(value), by_numpy(function, np.broadcast_to(x, (*sizes, n, 2)), places, n))

    holds()


def by_numpy(function, x, places, n):
    """The same on the whole array, whose first axes are those that are mapped."""
    depth, kept = x.ndim - 2, tuple(range(len(places)))
    moved = np.moveaxis(x, places, kept)
    flat = moved.reshape(n, *moved.shape[len(places) :])  # all samples along one axis, then the other mapped axes
    if function in ("psum", "pmax"):
        reduced = {"psum": np.sum, "pmax": np.max}[function](flat, 0)
        result = np.broadcast_to(reduced, flat.shape)
    elif function == "all_gather":
        result = np.broadcast_to(np.moveaxis(flat, 0, depth - len(places)), (n, *flat.shape[1:-2], n, *flat.shape[-2:]))
    elif function == "psum_scatter":
        result = np.moveaxis(flat.sum(0), -2, 0)
    elif function == "pshuffle":
        result = flat[::-1]
    else:
        result = flat + np.arange(n).reshape(n, *[1] * (flat.ndim - 1))
    back = result.reshape(*moved.shape[: len(places)], *result.shape[1:])
    return np.moveaxis(back, kept, places)


def test_rule_11_threads_do_not_see_each_others_names():
    wrong, inside, done = [], threading.Event(), threading.Event()

    def holder(v):
        inside.set()
        done.wait(10)
        return lax.psum(v, "held")

    def look():
        inside.wait(10)
        try:
            vmap(lambda v: lax.psum(v, "held"), axis_name="mine")(tx())
            wrong.append("seen")
        except errors.AxisNameError as error:
            if "'mine'" not in str(error) or "outside in: 'mine'." not in str(error):
                wrong.append(str(error))
        finally:
            done.set()

    def work(n):
        for _ in range(10):
            result = vmap(lambda v: lax.psum(v, "i") + lax.axis_index("i"), axis_name="i")(torch.full((3,), float(n)))
            if not torch.equal(result, 3.0 * n + torch.arange(3)):
                wrong.append(n)

    results = []
    hold = lambda: results.append(vmap(holder, axis_name="held")(tx()))  # noqa: E731
    threads = [threading.Thread(target=target) for target in (hold, look)]
    threads += [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert_close(results[0], tx().sum(0).expand(3, 4))


# --- compiled --------------------------------------------------------------------------------------------------------


def compiled(fun):
    torch.compiler.reset()
    return torch.compile(fun, fullgraph=True, backend="aot_eager")


def every_function(v):
    found = [function(lax, v, "i", 3) for name, function in FUNCTIONS.items() if "parts" not in name]
    return [*found, lax.ppermute(v, "i", [(0, 1)]), lax.psum({"a": v, "n": None, "one": 1}, "i"), lax.axis_index("i")]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("written", ["inside", "outside"])
def test_rule_11_every_function_compiled(written):
    x = torch.tensor(data(3, 3, 2))
    mapped = vmap(every_function, axis_name="i")
    fun = mapped if written == "outside" else lambda x: vmap(every_function, axis_name="i")(x)
    same(compiled(fun)(x), mapped(x))


@pytest.mark.parametrize(
    ("mode", "names"),
    [
        ("grad inside", "inner"),
        ("grad inside", "outer"),
        ("grad between", "outer"),
        ("grad outside", "outer"),
        ("jvp inside", "outer"),
    ],
)
def test_rule_11_derivatives_compiled(mode, names):
    x = torch.tensor(data(3, 2, number(names), 1))

    def loss(v):
        parts = [loss_of(OURS, function, names)(v) for function in ("psum", "psum_scatter", "ppermute")]
        return sum(parts) + lax.axis_index(names) * v.sum()

    fun = MODES[mode](OURS, loss)
    same(compiled(fun)(x), fun(x))


def test_rule_11_ordinary_gradients_compiled():
    fun = vmap(vmap(lambda v: lax.psum(v, "o") ** 2 + lax.all_gather(v, ("o", "i")).sum(), axis_name="i"), axis_name="o")
    found = []
    for call in (fun, compiled(fun)):
        x = tx().requires_grad_()
        (call(x) * tx()).sum().backward()
        found.append(x.grad)
    assert_close(*found)


def test_rule_11_make_fx():
    fun = vmap(every_function, axis_name="i")
    x = torch.tensor(data(3, 3, 2))
    same(make_fx(fun)(x)(x + 1), fun(x + 1))


def test_importing_does_not_load_the_compiler():
    code = "import sys, torchbatch; sys.exit('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- errors ----------------------------------------------------------------------------------------------------------


def test_signatures_are_those_of_jax():
    modules = ("torchbatch.lax.collectives", "torchbatch.lax.extremes")
    collectives = [name for name in lax.__all__ if getattr(lax, name).__module__ in modules]
    assert {"psum", "pmax", "pargmax"} < {*collectives}
    for name in collectives:
        theirs = getattr(parallel, name, None)
        if theirs is not None:
            mine, known = [
                {k: (p.kind, p.default) for k, p in inspect.signature(f).parameters.items()} for f in (getattr(lax, name), theirs)
            ]
            assert mine == known or {k: v for k, v in mine.items() if k != "to"} == known


CALLS = {name: function for name, function in FUNCTIONS.items() if " " not in name}


@pytest.mark.parametrize("function", CALLS)
def test_rule_11_an_unknown_name(function):
    with pytest.raises(errors.AxisNameError) as caught:
        vmap(vmap(lambda v: CALLS[function](lax, v, "q", 3), axis_name="b"), axis_name="a")(torch.zeros(2, 3, 3))
    assert str(caught.value) == (
        f"{function} asks for the axis 'q', but no vmap around it has that name. The names in scope are, from the outside in: "
        "'a', 'b'. Call it inside vmap(…, axis_name='q')."
    )
    assert isinstance(caught.value, NameError)
    with pytest.raises(errors.AxisNameError, match=r"No name is in scope\. Call it inside"):
        CALLS[function](lax, torch.zeros(3, 3), "q", 3)
    with pytest.raises(errors.AxisNameError, match="No name is in scope"):
        vmap(lambda v: CALLS[function](lax, v, None, 3))(torch.zeros(3, 3))
    assert isinstance(jax_error(lambda: jax.lax.psum(1, "q")), NameError)


def jax_error(thunk):
    with pytest.raises(Exception) as caught:
        thunk()
    return caught.value


def test_rule_11_a_name_is_gone_when_its_vmap_has_finished():
    over_i(lambda v: lax.psum(v, "i"))
    with pytest.raises(KeyError):
        over_i(lambda v: {}[0])
    with pytest.raises(errors.AxisNameError):
        lax.psum(1, "i")


@pytest.mark.parametrize("function", CALLS)
def test_rule_11_a_chunk_is_not_taken_for_all_samples(function):
    call = lambda v: CALLS[function](lax, v, "i", 3)  # noqa: E731
    with pytest.raises(errors.AxisNameError) as caught:
        over_i(call, torch.zeros(3, 3, 2), chunk_size=2)
    assert str(caught.value) == (
        f"{function} looks across all samples of the axis 'i', but its vmap was given chunk_size=2, so that only that many are "
        "there at a time. Leave chunk_size out of that vmap."
    )
    over_i(call, torch.zeros(3, 3, 2), chunk_size=3)  # all samples at once


def test_rule_11_chunks_beside_a_named_axis():
    x = torch.tensor(data(4, 3, 2))
    fun = vmap(vmap(lambda v: lax.psum(v, "i"), axis_name="i"), axis_name="o", chunk_size=3)
    assert_close(fun(x), x.sum(1, keepdim=True).expand(4, 3, 2))
    with pytest.raises(errors.AxisNameError, match=r"psum asks for the axis 'q'.*from the outside in: 'o', 'i'\."):
        vmap(vmap(lambda v: lax.psum(v, "q"), axis_name="i"), axis_name="o", chunk_size=3)(x)
    with pytest.raises(errors.AxisNameError, match="No name is in scope"):
        vmap(lambda v: lax.psum(v, None), chunk_size=3)(x)


def test_rule_11_a_name_given_twice():
    text = r"psum got the axis 'i' twice, at places 0 and 2 of \('i', 'j', 'i'\)\."
    with pytest.raises(errors.AxisError, match=text):
        over_i(lambda v: lax.psum(v, ("i", "j", "i")))
    assert isinstance(jax_error(lambda: jax.vmap(lambda v: jax.lax.psum(v, ("i", "i")), axis_name="i")(X)), ValueError)


@pytest.mark.parametrize("name", [0, True, ("i", 0)])
def test_rule_11_a_positional_axis(name):
    with pytest.raises(errors.AxisSpecError, match=r"psum takes names that vmap was given .* got the int (0|True), which stands"):
        over_i(lambda v: lax.psum(v, name))


TROUBLE = {
    "all_gather(v, 'i', axis=2)": r"all_gather got axis=2 for float32\[4\], where it runs over \[-2, 2\)\.",
    "all_gather(v, 'i', axis=1, tiled=True)": r"all_gather got axis=1 for float32\[4\], where it runs over \[-1, 1\)\.",
    "all_gather(v[0], 'i', tiled=True)": r"all_gather got axis=0 for float32\[\], .*: there is no axis to choose\.",
    "all_gather(v, 'i', axis=0.5)": r"all_gather needs an int for axis, but it is 0\.5 of type float\.",
    "all_gather(v, 'i', axis=True)": r"all_gather needs an int for axis, but it is True of type bool\.",
    "all_gather(v, 'i', to='reduced')": r"all_gather has to='varying' only, but to is 'reduced'",
    "all_to_all(v, 'i', 0, 0)": r"all_to_all deals out split_axis=0, which must be of size 3, the number of samples of 'i', .*size 4\.",  # noqa: E501
    "all_to_all(v, 'i', -1, 0, tiled=True)": r"all_to_all deals out split_axis=0, which must be a multiple of 3, .* it has size 4\.",  # noqa: E501
    "all_to_all(v, 'i', 1, 0)": r"all_to_all got split_axis=1 for float32\[4\], where it runs over \[-1, 1\)\.",
    "all_to_all(v[:3], 'i', 0, 1)": r"all_to_all got concat_axis=1 for float32\[3\], where it runs over \[-1, 1\)\.",
    "pswapaxes(v, 'i', 0)": r"pswapaxes deals out axis=0, which must be of size 3, the number of samples of 'i', .* size 4\.",
    "pswapaxes(v, 'i', 3)": r"pswapaxes got axis=3 for float32\[4\], where it runs over \[-1, 1\)\.",
    "psum_scatter(v, 'i')": r"psum_scatter deals out scatter_dimension=0, which must be of size 3, .* it has size 4\.",
    "psum_scatter(v, 'i', tiled=True)": r"psum_scatter deals out scatter_dimension=0, which must be a multiple of 3, .* size 4\.",
    "psum_scatter(v[0], 'i')": r"psum_scatter got scatter_dimension=0 for float32\[\], .*: there is no axis to choose\.",
    "ppermute(v, 'i', [(0, 1), (0, 2)])": r"ppermute needs .* but source 0 is there twice: \[\(0, 1\), \(0, 2\)\]\.",
    "ppermute(v, 'i', [(0, 1), (2, 1)])": r"ppermute needs .* but destination 1 is there twice: \[\(0, 1\), \(2, 1\)\]\.",
    "ppermute(v, 'i', [(0, 1), (-1, -2)])": r"ppermute needs .* but destination 1 is there twice",
    "ppermute(v, 'i', [(0, 3)])": r"ppermute got the pair \(0, 3\) in perm, but there are 3 samples: they run from 0 to 2\.",
    "ppermute(v, 'i', [1, 2, 0])": r"ppermute needs a perm of pairs \(source, destination\), but it is \[1, 2, 0\] of type list\.",  # noqa: E501
    "ppermute(v, 'i', [(0, 1, 2)])": r"ppermute needs a perm of pairs .* but it is \[\(0, 1, 2\)\] of type list\.",
    "ppermute(v, 'i', 1)": r"ppermute needs a perm of pairs .* but it is 1 of type int\.",
    "ppermute(v, 'i', [(0, 0.5)])": r"ppermute needs ints in perm, but one is 0\.5 of type float\.",
    "pshuffle(v, 'i', 2)": r"pshuffle needs a perm that is a list of ints, but it is 2 of type int\.",
    "pshuffle(v, 'i', [0.5, 1, 2])": r"pshuffle needs ints in perm, but one is 0\.5 of type float\.",
    "pshuffle(v, 'i', [0, 0, 1])": r"pshuffle needs a perm that holds each number from 0 to 2 once, but it is \[0, 0, 1\]\.",
    "pshuffle(v, 'i', [0, 1])": r"pshuffle needs a perm that holds each number from 0 to 2 once, but it is \[0, 1\]\.",
    "pbroadcast(v, 'i', 3)": r"pbroadcast got source=3, but there are 3 samples: they run from 0 to 2\.",
    "pbroadcast(v, 'i', -1)": r"pbroadcast got source=-1, but there are 3 samples: they run from 0 to 2\.",
    "pbroadcast(v, 'i', 1.5)": r"pbroadcast needs an int for source, but it is 1\.5 of type float\.",
    "pargmax('v', 'i')": r"pargmax takes tensors, arrays, numbers and trees of them, but it got 'v' of type str\.",
    "psum('v', 'i')": r"psum takes tensors, arrays, numbers and trees of them, but it got 'v' of type str\.",
    "psum({'a': [v, object]}, 'i')": r"psum takes tensors, .* but it got <class 'object'> of type type\.",
    "psum(v, 'i', axis_index_groups=[[0, 1, 2]])": r"psum has no axis_index_groups under vmap, in JAX neither\. Map over two axes",  # noqa: E501
    "all_gather(v, 'i', axis_index_groups=[[0, 1, 2]])": r"all_gather has no axis_index_groups under vmap",
    "all_to_all(v, 'i', 0, 0, axis_index_groups=[[0, 1, 2]])": r"all_to_all has no axis_index_groups under vmap",
    "pswapaxes(v, 'i', 0, axis_index_groups=[[0, 1, 2]])": r"pswapaxes has no axis_index_groups under vmap",
    "psum_scatter(v, 'i', axis_index_groups=[[0, 1, 2]])": r"psum_scatter has no axis_index_groups under vmap",
    "psum(1, 'i', axis_index_groups=[[0], [1]])": r"psum needs axis_index_groups .* each number from 0 to 2 once, but they are \[\[0\]",  # noqa: E501
    "pmax(1, 'i', axis_index_groups=[[0], [1, 2]])": r"pmax needs axis_index_groups of one size",
}  # fmt: skip


@pytest.mark.parametrize("call", TROUBLE)
def test_rule_11_messages(call):
    with pytest.raises(errors.TorchbatchError, match=TROUBLE[call]) as caught:
        over_i(lambda v: eval(f"lax.{call}", {"lax": lax, "v": v}))
    assert isinstance(caught.value, ValueError | TypeError)


def test_rule_17_a_value_that_escaped():
    kept = []
    over_i(lambda v: kept.append(v * 2) or v)
    with pytest.raises(errors.EscapedValueError, match="psum got a per-sample value that escaped from a vmap that has finished"):
        over_i(lambda v: lax.psum(kept[0], "i"))
    with pytest.raises(errors.EscapedValueError):
        over_i(lambda v: lax.psum([v, kept[0]], "i"))


@pytest.mark.parametrize("name", ["psum", "pmean", "pmax", "all_gather"])
def test_a_checkpointed_function_that_closes_over_what_a_collective_takes(name):
    w, collective = torch.tensor([2.0, 3.0]), getattr(lax, name)
    plain = lambda w: (collective(w, "i") * w).sum()  # noqa: E731
    kept = lambda w: checkpoint(lambda x: (collective(w, "i") * x).sum())(w)  # noqa: E731
    found, expected = (vmap(grad(f), axis_name="i")(w) for f in (kept, plain))
    assert_close(found, expected)
    assert_close(jit(vmap(grad(kept), axis_name="i"), backend="eager")(w), expected)
