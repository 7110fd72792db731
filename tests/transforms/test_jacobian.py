"""jacfwd, jacrev and hessian, held to live JAX."""

from __future__ import annotations

import inspect
import operator
import pickle
from collections import namedtuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from torchbatch.core import tree
from torchbatch.errors import GradientTypeError, GradientValueError
from torchbatch.testing import assert_close
from torchbatch.transforms import jacobian as module
from torchbatch.transforms.jacobian import hessian, jacfwd, jacrev
from torchbatch.transforms.vmap import vmap

jax = pytest.importorskip("jax")
jnp = jax.numpy

jax.config.update("jax_platforms", "cpu")

Point = namedtuple("Point", "x y")
VMAPS = pytest.mark.parametrize("mapped", [torch.func.vmap, vmap], ids=["torch.func.vmap", "torchbatch.vmap"])
EVERY_WAY = pytest.mark.parametrize("how", ["eager", "jit", "inductor"], indirect=True)
BOTH = pytest.mark.parametrize("name", ["jacfwd", "jacrev"])
ALL = pytest.mark.parametrize("name", ["jacfwd", "jacrev", "hessian"])
X = torch.tensor([0.5, -1.0, 2.0])


def to_jax(value):
    def convert(leaf):
        if not isinstance(leaf, torch.Tensor):
            return leaf
        if leaf.dtype is torch.bfloat16:
            return jnp.asarray(leaf.float().numpy()).astype(jnp.bfloat16)
        return jnp.asarray(leaf.numpy())

    return tree.map_leaves(convert, value)


def assert_same(ours, theirs):
    """The same tree with the same shapes, dtypes and numbers."""
    assert jax.tree.structure(theirs) == jax.tree.structure(tree.map_leaves(lambda _: 0, ours))
    for mine, other in zip(tree.flatten(ours)[0], jax.tree.leaves(theirs), strict=True):
        assert tuple(mine.shape) == np.shape(other)
        assert str(mine.dtype).removeprefix("torch.") == str(other.dtype)
        wide = torch.complex64 if mine.is_complex() else torch.float32
        assert_close(mine.to(wide).numpy(), np.asarray(other).astype(str(wide)[6:]), rtol=2e-5, atol=2e-6, dtypes=False)


@ALL
def test_signatures_are_those_of_jax(name):
    def plain(function):
        return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]

    assert plain(getattr(module, name)) == plain(getattr(jax, name))


FUNCTIONS = {
    "vector": (lambda xp: lambda x: xp.sin(x) * x[0], (X,)),
    "scalar": (lambda xp: lambda x: xp.sum(xp.sin(x) * x[0]), (X,)),
    "number": (lambda xp: lambda x: x**3, (torch.tensor(2.0),)),
    "matrix": (lambda xp: lambda x: x @ x.T, (torch.linspace(-1, 1, 6).reshape(2, 3),)),
    "trees": (
        lambda xp: lambda p: {"o": xp.sum(p["a"]) * p["b"], "q": (p["b"] * p["a"], None)},
        ({"a": X, "b": X[0]},),
    ),
    "namedtuple": (lambda xp: lambda p: Point(p.x * p.y, p.x), (Point(X, X * 2),)),
    "None": (lambda xp: lambda p: [p["a"] ** 2, None], ({"a": X, "b": None},)),
    "size 0 in": (lambda xp: lambda x: x * 2, (torch.zeros(0, 2),)),
    "size 0 out": (lambda xp: lambda x: x[:0] * 2, (X,)),
    "size 0 beside": (lambda xp: lambda p: xp.sum(p[0]) * p[1], ([torch.zeros(0), X],)),
    "independent": (lambda xp: lambda p: xp.cos(p[0]), ((X, X + 1),)),
    "mixed dtypes": (
        lambda xp: lambda p: {"f": p["a"] * 2, "b": p["b"] * 3},
        ({"a": X, "b": X.bfloat16()},),
    ),
}


@BOTH
@pytest.mark.parametrize("case", FUNCTIONS)
def test_jacobians_are_jax(name, case):
    make, args = FUNCTIONS[case]
    ours = getattr(module, name)(make(torch))(*args)
    assert_same(ours, getattr(jax, name)(make(jnp))(*to_jax(args)))


@pytest.mark.parametrize("case", ["vector", "scalar", "number", "trees", "namedtuple", "None"])
def test_hessian_is_jax(case):
    make, args = FUNCTIONS[case]
    assert_same(hessian(make(torch))(*args), jax.hessian(make(jnp))(*to_jax(args)))


@ALL
@pytest.mark.parametrize("argnums", [0, 1, -1, (0,), (1, 0), [0, 1]])
def test_argnums(name, argnums):
    def make(xp):
        return lambda a, b: {"o": xp.sum(a["k"]) * b}

    args = ({"k": X}, X + 1)
    assert_same(
        getattr(module, name)(make(torch), argnums)(*args), getattr(jax, name)(make(jnp), argnums)(*to_jax(args))
    )


shapes = st.lists(st.integers(0, 2), max_size=2)
arrays = shapes.map(lambda shape: torch.linspace(-1.0, 2.0, int(np.prod(shape))).reshape(shape))
trees = st.one_of(
    arrays, st.lists(arrays, min_size=1, max_size=2), st.dictionaries(st.sampled_from("ab"), arrays, min_size=1)
)


@EVERY_WAY
def test_any_tree(how):
    def make(xp, leaves_of):
        def function(*args):
            leaves = leaves_of(args)
            total = sum((xp.sum(leaf * leaf) for leaf in leaves), start=xp.zeros(()))
            return {"first": xp.sin(leaves[0]) * total, "total": (total,)}

        return function

    @how.examples(10)
    @given(st.lists(trees, min_size=1, max_size=2), st.data())
    def holds(args, data):
        argnums = data.draw(st.sampled_from([0, -1, tuple(range(len(args)))]))
        ours, theirs = make(torch, lambda a: tree.flatten(a)[0]), make(jnp, jax.tree.leaves)
        for name in ("jacfwd", "jacrev"):
            found = how.run(getattr(module, name)(ours, argnums))(*args)
            assert_same(found, getattr(jax, name)(theirs, argnums)(*to_jax(tuple(args))))

    holds()


@BOTH
def test_complex(name):
    def holomorphic(xp):
        return lambda z: xp.sin(z) * z[0]

    z = X + 1j
    assert_same(
        getattr(module, name)(holomorphic(torch), holomorphic=True)(z),
        getattr(jax, name)(holomorphic(jnp), holomorphic=True)(jnp.asarray(z.numpy())),
    )


def test_complex_without_holomorphic():
    assert_same(jacfwd(lambda x: x * (1 + 2j))(X), jax.jacfwd(lambda x: x * (1 + 2j))(to_jax(X)))

    def square(xp):
        return lambda z: xp.abs(z) ** 2

    assert_same(jacrev(square(torch))(X + 1j), jax.jacrev(square(jnp))(jnp.asarray((X + 1j).numpy())))


def test_holomorphic_hessian():
    def make(xp):
        return lambda z: xp.sum(z**3)

    theirs = jax.hessian(make(jnp), holomorphic=True)(jnp.asarray((X + 1j).numpy()))
    assert_same(hessian(make(torch), holomorphic=True)(X + 1j), theirs)


def test_allow_int():
    numbers = torch.tensor([1, 2, 3], dtype=torch.int32)

    def make(xp):
        return lambda p: p["n"] * p["x"]

    args = ({"n": numbers, "x": X},)
    assert_same(jacrev(make(torch), allow_int=True)(*args), jax.jacrev(make(jnp), allow_int=True)(*to_jax(args)))


@ALL
def test_has_aux(name):
    def make(x):
        return (x**3, {"y": x * 2})

    ours, aux = getattr(module, name)(make, has_aux=True)(X)
    theirs, their_aux = getattr(jax, name)(make, has_aux=True)(to_jax(X))
    assert_same(ours, theirs)
    assert_same(aux, their_aux)
    aux["y"] = aux["y"] + 1


@ALL
def test_aux_may_hold_any_object(name):
    _, aux = getattr(module, name)(lambda x: (x**2, ("text", int)), has_aux=True)(X)
    assert aux == ("text", int)


@ALL
def test_keyword_and_other_arguments(name):
    def function(x, power, *, scale, label=None):
        return scale["s"] * x**power if label == "cat" else x

    ours = getattr(module, name)(function)(X, 3, scale={"s": torch.tensor(2.0)}, label="cat")
    assert_same(ours, getattr(jax, name)(lambda x: 2 * x**3)(to_jax(X)))


@ALL
def test_numbers(name):
    assert getattr(module, name)(lambda x: x * x)(3.0) == {"hessian": 2, "jacfwd": 6, "jacrev": 6}[name]


@VMAPS
@ALL
def test_under_vmap(name, mapped):
    def make(xp):
        return lambda x: xp.sin(x) * xp.sum(x)

    rows = torch.stack([X, X + 1])
    theirs = jax.vmap(getattr(jax, name)(make(jnp)))(to_jax(rows))
    assert_same(mapped(getattr(module, name)(make(torch)))(rows), theirs)


def test_orders_agree():
    def function(x):
        return torch.sum(torch.sin(x) * x**2)

    expected = hessian(function)(X)
    for outer in (jacfwd, jacrev):
        for inner in (jacfwd, jacrev):
            assert_close(outer(inner(function))(X), expected)


def test_random_draws_are_the_same_for_every_column():
    for transform in (jacfwd, jacrev):
        jacobian = transform(lambda x: torch.nn.functional.dropout(x, 0.5, training=True))(torch.ones(8))
        assert set(jacobian.diagonal().tolist()) <= {0.0, 2.0} and jacobian.count_nonzero() == (jacobian == 2).sum()


@ALL
def test_wrapper(name):
    transform = getattr(module, name)
    wrapped = transform(operator.mul, argnums=(0, 1))
    assert wrapped.__wrapped__ is not None and wrapped.__name__ == "mul"
    assert_close(pickle.loads(pickle.dumps(wrapped))(X, X), wrapped(X, X))


# --- errors


INPUTS = {"w": torch.arange(3)}
ERRORS = [
    (
        jacfwd,
        {},
        (INPUTS,),
        GradientTypeError,
        "jacfwd differentiates by floating-point arrays, but argument p['w'] has",
    ),
    (jacfwd, {}, (X + 1j,), GradientTypeError, "argument p has dtype complex64"),
    (jacfwd, {"holomorphic": True}, (X,), GradientTypeError, "jacfwd with holomorphic=True needs complex inputs and"),
    (
        jacrev,
        {},
        (INPUTS,),
        GradientTypeError,
        "jacrev differentiates by floating-point and complex arrays, but argument",
    ),
    (jacrev, {"holomorphic": True}, (X,), GradientTypeError, "but argument p has dtype float32"),
    (jacfwd, {}, ("s",), GradientTypeError, "argument p is 's' of type str"),
    (jacfwd, {"argnums": 1}, (X,), GradientValueError, "jacfwd: argnums=1 needs at least 2 positional argument(s)"),
    (jacrev, {"argnums": -2}, (X,), GradientValueError, "jacrev: argnums=-2 needs at least 2"),
    (hessian, {"argnums": 1}, (X,), GradientValueError, "argnums=1 needs at least 2"),
    (jacfwd, {}, (None,), GradientValueError, "jacfwd: argument p holds no arrays to differentiate by"),
    (jacrev, {}, ({},), GradientValueError, "jacrev: argument p holds no arrays to differentiate by"),
]


@pytest.mark.parametrize(("transform", "options", "args", "error", "text"), ERRORS)
def test_bad_inputs(transform, options, args, error, text):
    def function(p):
        return p

    with pytest.raises(error) as raised:
        transform(function, **options)(*args)
    assert text in str(raised.value)
    with pytest.raises((TypeError, ValueError)):
        getattr(jax, transform.__name__)(function, **options)(*to_jax(args))


@pytest.mark.parametrize(
    ("transform", "options", "function", "text"),
    [
        (jacrev, {}, lambda x: {"a": x * 1j}, "jacrev needs a real output, but output['a'] has dtype complex64"),
        (jacrev, {}, lambda x: [x, x.real > 1], "jacrev needs floating-point outputs, but output[1] has dtype bool"),
        (jacfwd, {}, lambda x: [x, x.real > 1], "jacfwd needs floating-point outputs, but output[1] has dtype bool"),
        (jacfwd, {}, lambda x: "s", "jacfwd: output is 's' of type str"),
    ],
)
def test_bad_outputs(transform, options, function, text):
    with pytest.raises(GradientTypeError) as raised:
        transform(function, **options)(X)
    assert text in str(raised.value)
    with pytest.raises(TypeError):
        getattr(jax, transform.__name__)(function, **options)(to_jax(X))


@BOTH
def test_holomorphic_with_a_real_output(name):
    with pytest.raises(
        GradientTypeError, match="holomorphic=True needs complex inputs and outputs, but output has dtype"
    ):
        getattr(module, name)(lambda z: z.real, holomorphic=True)(X + 1j)


@ALL
def test_not_a_function(name):
    with pytest.raises(GradientTypeError, match="expects a function, but got 3 of type int"):
        getattr(module, name)(3)


# --- torch.compile


COMPILED = {
    "jacfwd": (jacfwd(lambda x: torch.sin(x) * x[0]), (X,)),
    "jacrev": (jacrev(lambda x: torch.sin(x) * x[0]), (X,)),
    "hessian": (hessian(lambda x: (x**3).sum()), (X,)),
    "dict": (jacrev(lambda p: {"o": p["a"] * p["b"]}), ({"a": X, "b": X},)),
    "argnums": (jacfwd(lambda a, b: (a * b, a), argnums=(0, 1)), (X, X)),
}


@pytest.mark.parametrize("case", COMPILED)
def test_torch_compile(case):
    function, args = COMPILED[case]
    torch._dynamo.reset()
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    assert_close(compiled(*args), function(*args))


@VMAPS
@BOTH
def test_functions_that_write_in_place_into_what_they_made(name, mapped):
    def written(x):
        y = x.clone()
        y[0] = x[1] * x[2]
        return y.mul_(2)

    rows = torch.stack([X, X + 1])
    wanted = jax.vmap(getattr(jax, name)(lambda x: 2 * x.at[0].set(x[1] * x[2])))(to_jax(rows))
    assert_same(mapped(getattr(module, name)(written))(rows), wanted)
