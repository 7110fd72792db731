"""vectorize: NumPy's rule of generalized ufuncs, against JAX, NumPy and a plain loop."""

from __future__ import annotations

import itertools
import pickle
import re

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

import torchbatch
from torchbatch import grad, jvp, vectorize, vmap
from torchbatch.errors import AxisError, AxisSpecError, InputTypeError, OutputTypeError, TorchbatchError
from torchbatch.testing import assert_close


def by_loop(fun, cores, *args):
    """``fun`` of every element, one by one; ``cores`` says how many axes ``fun`` sees of each argument."""
    loops = [arg.shape[: arg.dim() - core] for arg, core in zip(args, cores, strict=True)]
    shape = torch.broadcast_shapes(*loops)
    wide = [arg.expand([*shape, *arg.shape[arg.dim() - core :]]) for arg, core in zip(args, cores, strict=True)]
    each = [fun(*(arg[place] for arg in wide)) for place in itertools.product(*map(range, shape))]
    return torch.stack(each).reshape([*shape, *each[0].shape])


def apply(matrix, vector):
    return matrix @ vector


def scaled(x, y=2.0):
    return x * y


mv = vectorize(apply, signature="(n,m),(m)->(n)")


@pytest.mark.parametrize(
    ("a", "b"),
    [((), ()), ((4,), ()), ((), (4,)), ((4,), (4,)), ((1,), (4,)), ((5, 1), (4,)), ((1, 1), (1,)), ((2, 1, 3), (4, 1))],
)
@pytest.mark.parametrize("jit", [False, True])
def test_leading_axes_broadcast(a, b, jit):
    matrix, vector = torch.randn(*a, 2, 3), torch.randn(*b, 3)
    run = torchbatch.jit(mv, backend="eager") if jit else mv
    assert_close(run(matrix, vector), by_loop(apply, (2, 1), matrix, vector))


@settings(max_examples=25)
@given(st.data())
def test_any_signature_equals_the_loop_and_jax(data):
    jnp = pytest.importorskip("jax.numpy")
    sizes = {"i": 2, "j": 3, "k": 1}
    cores = data.draw(st.lists(st.lists(st.sampled_from("ijk"), max_size=2, unique=True), min_size=1, max_size=3))
    full = data.draw(st.lists(st.integers(1, 3), max_size=3))
    args = []
    for core in cores:
        length = data.draw(st.integers(0, len(full)))
        loop = [size if data.draw(st.booleans()) else 1 for size in full[len(full) - length :]]
        args.append(torch.randn([*loop, *(sizes[name] for name in core)]))
    text = ",".join(f"({','.join(core)})" for core in cores) + f"->({','.join(cores[0])})"

    def fun(first, *others):
        return first * sum([other.sum() for other in others], first.sum())

    ours = vectorize(fun, signature=text)(*args)
    assert_close(ours, by_loop(fun, [len(core) for core in cores], *args))
    theirs = jnp.vectorize(fun, signature=text)(*map(np.asarray, args))
    assert_close(ours, theirs, rtol=1e-5, atol=1e-5, dtypes=False)


def test_without_a_signature_the_function_sees_numbers_and_may_return_anything():
    x, y = torch.randn(4, 1), torch.randn(3)
    seen = []

    def fun(a, b):
        seen.append((a.shape, b.shape))
        return {"sum": a + b, "pair": (torch.stack([a, b]), 1.0)}

    found = vectorize(fun)(x, y)
    assert seen == [((), ())]
    assert found["sum"].equal(x + y)
    assert found["pair"][0].equal(torch.stack(torch.broadcast_tensors(x, y), -1))
    assert found["pair"][1].equal(torch.ones(4, 3))
    assert vectorize(fun)(x[:1], y[0])["pair"][1].shape == (1, 1)


def test_several_outputs():
    jnp = pytest.importorskip("jax.numpy")
    x = torch.randn(4, 1, 3)
    fun = vectorize(lambda v: (v.sum(), v * 2), signature="(n)->(),(n)")
    total, double = fun(x)
    assert total.shape == (4, 1) and double.equal(x * 2)
    theirs = jnp.vectorize(lambda v: (v.sum(), v * 2), signature="(n)->(),(n)")(x.numpy())
    assert_close(total, theirs[0], rtol=1e-6, dtypes=False)


def test_a_decorator_with_and_without_arguments():
    @vectorize
    def plain(x):
        """One number."""
        return x + 1

    @vectorize(signature="(n)->()")
    def reduce(x):
        return x.sum()

    assert plain(torch.zeros(2, 3)).equal(torch.ones(2, 3))
    assert (plain.__name__, plain.__doc__) == ("plain", "One number.")
    assert reduce(torch.ones(2, 3)).equal(torch.full((2,), 3.0))


def test_it_pickles():
    again = pickle.loads(pickle.dumps(vectorize(apply, signature="(n,m),(m)->(n)")))
    assert again(torch.ones(5, 2, 3), torch.ones(3)).shape == (5, 2)


def test_what_is_excluded_is_handed_on_as_it_is():
    jnp = pytest.importorskip("jax.numpy")
    coefficients, x = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([[0.0, 1.0]])

    def polynomial(p, x):
        assert p.shape == (3,)
        return p[0] + p[1] * x + p[2] * x**2

    ours = vectorize(polynomial, excluded={0})(coefficients, x)
    assert ours.equal(torch.tensor([[1.0, 6.0]]))
    theirs = jnp.vectorize(polynomial, excluded={0})(jnp.asarray(coefficients), jnp.asarray(x))
    assert_close(ours, theirs, dtypes=False)
    assert vectorize(lambda x, mode: x if mode == "same" else None, excluded={1})(x, "same").equal(x)
    assert vectorize(lambda x, mode: x if mode == "same" else None, excluded={"mode"})(x, mode="same").equal(x)
    assert vectorize(lambda x, mode: x if mode == "same" else None, excluded={1})(x, mode="same").equal(x)
    with_signature = vectorize(lambda p, x: p.sum() * x.sum(), excluded={0}, signature="(n)->()")
    assert with_signature(coefficients, x).equal(torch.tensor([6.0]))


def test_keyword_arguments_are_broadcast_as_numpy_does():
    x, y = torch.randn(3), torch.randn(2, 1)
    assert_close(vectorize(scaled)(x, y=y), np.vectorize(scaled)(x.numpy(), y=y.numpy()), rtol=1e-6, dtypes=False)
    assert vectorize(scaled)(x).equal(2 * x)
    assert vectorize(apply, signature="(n,m),(m)->(n)")(torch.ones(2, 3), vector=torch.ones(4, 3)).shape == (4, 2)
    assert vectorize(apply, signature="(n,m),(m)->(n)")(vector=torch.ones(4, 3), matrix=torch.ones(2, 3)).shape == (4, 2)
    assert vectorize(lambda x, *, power: x.sum() ** power, excluded={"power"}, signature="(n)->()")(x, power=2).shape == ()


def test_none_reaches_the_function():
    jnp = pytest.importorskip("jax.numpy")

    def fun(x, y):
        return x if y is None else x + y

    x = torch.randn(2, 3)
    assert vectorize(fun)(x, None).equal(x)
    assert vectorize(fun, signature="(n),()->(n)")(x, None).equal(x)
    assert_close(vectorize(fun)(x, None), jnp.vectorize(fun)(jnp.asarray(x), None), dtypes=False)
    with pytest.raises(ValueError):
        jnp.vectorize(fun, signature="(n),(n)->(n)")(jnp.asarray(x), None)
    with pytest.raises(AxisError, match=re.escape("argument y is None, but the signature '(n),(n)->(n)' gives it the axes (n)")):
        vectorize(fun, signature="(n),(n)->(n)")(x, None)


def test_numbers_and_numpy_arrays_are_arrays():
    assert vectorize(scaled)(np.ones((2, 3), np.float32), 3.0).equal(torch.full((2, 3), 3.0))
    assert vectorize(scaled)(2, 3).equal(torch.tensor(6))


def test_empty_axes():
    assert mv(torch.ones(0, 2, 3), torch.ones(3)).shape == (0, 2)
    assert mv(torch.ones(0, 1, 2, 3), torch.ones(4, 3)).shape == (0, 4, 2)
    assert mv(torch.ones(2, 0), torch.ones(5, 0)).equal(torch.zeros(5, 2))


@pytest.mark.parametrize("jit", [False, True])
def test_inside_and_outside_of_other_transforms(jit):
    matrix, vector = torch.randn(4, 2, 3), torch.randn(3)
    wrap = (lambda f: torchbatch.jit(f, backend="eager")) if jit else (lambda f: f)

    def loss(matrix, vector):
        return (mv(matrix, vector) ** 2).sum()

    def plain(matrix, vector):
        return ((matrix @ vector) ** 2).sum()

    assert_close(wrap(grad(loss, (0, 1)))(matrix, vector), grad(plain, (0, 1))(matrix, vector))
    assert_close(
        wrap(vmap(grad(loss), (0, None)))(matrix, vector), torch.stack([grad(plain)(m, vector) for m in matrix])
    )
    ours = wrap(lambda m, v: jvp(loss, (m, v), (m, v)))(matrix, vector)
    assert_close(ours, jvp(plain, (matrix, vector), (matrix, vector)))
    slope = vectorize(grad(lambda x, y: x**2 * y))
    assert_close(wrap(slope)(vector, matrix[0, 0]), 2 * vector * matrix[0, 0])


def test_under_torch_compile():
    run = torch.compile(lambda a, b: mv(a, b), backend="eager", fullgraph=True)
    a, b = torch.randn(5, 1, 2, 3), torch.randn(4, 3)
    assert_close(run(a, b), by_loop(apply, (2, 1), a, b))


MM = "(n,m),(m)->(n)"
BAD_CALLS = [
    (mv, ((3,), (3,)), f"argument matrix is float32[3], which has 1 axes, but the signature '{MM}' gives it 2: (n,m)."),
    (mv, ((2, 3), (4,)), f"the axis 'm' of the signature '{MM}' has size 3 in argument matrix, but size 4 in argument vector"),
    (mv, ((2, 2, 3), (3, 3)), f"the axes in front of those of the signature '{MM}' do not broadcast: (2,) of argument"),
    (vectorize(scaled), ((2,), (3,)), "the axes do not broadcast: (2,) of argument x, (3,) of argument y."),
    (mv, ((2, 3),), f"the signature '{MM}' is for 2 argument(s), but apply got 1."),
    (vectorize(apply, excluded={0}, signature=MM), ((2, 3), (3,)), "got 1 that are not excluded."),
    (vectorize(apply, signature="(n,m),(m)->()"), ((2, 3), (3,)), "the output is float32[2] for one element, but the signature"),
    (vectorize(apply, signature="(n,m),(m)->(m)"), ((2, 3), (3,)), "the axis 'm' of the signature '(n,m),(m)->(m)' has size 3."),
    (vectorize(apply, signature="(n,m),(m)->(n),()"), ((2, 3), (3,)), "must return a tuple of 2, but it returned float32[2]."),
    (vectorize(lambda x: (x, x), signature="()->()"), ((2,),), "must return one array, but it returned a tuple of 2."),
]


@pytest.mark.parametrize(("fun", "shapes", "message"), BAD_CALLS)
def test_calls_that_do_not_fit(fun, shapes, message):
    jnp = pytest.importorskip("jax.numpy")
    with pytest.raises(TorchbatchError, match=re.escape(message)) as caught:
        fun(*map(torch.ones, shapes))
    excluded, signature = fun.options
    with pytest.raises((ValueError, TypeError)) as theirs:
        jnp.vectorize(fun.__wrapped__, excluded=excluded, signature=signature)(*map(jnp.ones, shapes))
    assert isinstance(caught.value, ValueError if theirs.type is ValueError else TypeError)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"signature": "n->n"}, AxisError, "'n->n' is no signature of a generalized ufunc"),
        ({"signature": "(n)"}, AxisError, "'(n)' is no signature"),
        ({"signature": "(n,)->()"}, AxisError, "'(n,)->()' is no signature"),
        ({"signature": 3}, AxisSpecError, "signature must be a string or None, but it is 3 of type int"),
        ({"excluded": {1.5}}, AxisSpecError, "excluded must be a collection of ints (positions) and strings (names)"),
        ({"excluded": "mode"}, AxisSpecError, "excluded must be a collection"),
        ({"excluded": {-1}}, AxisError, "excluded must count positions from the front, but it has -1"),
    ],
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=re.escape(message)):
        vectorize(apply, **options)


def test_other_errors():
    with pytest.raises(AxisSpecError, match="vectorize takes a function, but it got 3 of type int"):
        vectorize(3)
    with pytest.raises(InputTypeError, match="argument x is 'a' of type str, which is not an array"):
        vectorize(scaled)("a")
    with pytest.raises(InputTypeError, match="the keyword argument 'z' of <lambda> has no place in the signature"):
        vectorize(lambda x, **rest: x, signature="(n)->(n)")(torch.ones(2), z=torch.ones(2))
    with pytest.raises(OutputTypeError, match="every output must be an array, but one is 'a'"):
        vectorize(lambda x: "a")(torch.ones(1))


def test_a_python_number_keeps_its_digits():
    x = torch.ones(3, dtype=torch.float64)
    assert torch.equal(vectorize(lambda x, y: x * y)(x, 0.1), x * 0.1)
    assert vectorize(lambda x, y: x * y)(x.float(), 0.1).dtype == torch.float32
