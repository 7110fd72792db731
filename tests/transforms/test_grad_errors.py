"""What grad, value_and_grad, vjp, jvp and linearize refuse: the class of error that JAX raises, and our words."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from torchbatch.core import tree
from torchbatch.errors import GradientTypeError, GradientValueError
from torchbatch.testing import assert_close
from torchbatch.transforms.grad import grad, jvp, linearize, value_and_grad, vjp

jax = pytest.importorskip("jax")
jnp = jax.numpy

jax.config.update("jax_platforms", "cpu")

X = torch.tensor([0.5, -1.0, 2.0])


def to_jax(value):
    return tree.map_leaves(lambda leaf: jnp.asarray(leaf.numpy()) if isinstance(leaf, torch.Tensor) else leaf, value)


def message(raised) -> str:
    return str(raised.value)


def square(x):
    return x * x


ARGNUMS_ERRORS = [
    (1, GradientTypeError, "grad: argnums=1 needs at least 2 positional argument(s), but the call has 1"),
    ((0, 2), GradientTypeError, "grad: argnums=(0, 2) needs at least 3 positional argument(s), but the call has 1"),
    (-2, GradientValueError, "grad: argnums=-2 needs at least 2 positional argument(s), but the call has 1"),
    ((0, -1), GradientValueError, "grad: argnums=(0, -1) names an argument twice"),
]


@pytest.mark.parametrize(("argnums", "error", "text"), ARGNUMS_ERRORS)
def test_argnums_out_of_range(argnums, error, text):
    with pytest.raises(error) as raised:
        grad(lambda x: x.sum(), argnums)(X)
    assert text in message(raised)
    with pytest.raises((TypeError, AttributeError) if argnums == (0, -1) else error.__mro__[2]):
        jax.grad(lambda x: x.sum(), argnums)(to_jax(X))


@pytest.mark.parametrize(
    ("argnums", "error", "text"),
    [
        (
            "x",
            GradientTypeError,
            "argnums must be an int or a sequence of ints that number positional arguments, but got",
        ),
        (1.0, GradientTypeError, "but got 1.0 of type float"),
        (None, GradientTypeError, "but got None of type NoneType"),
        ((), GradientValueError, "grad: argnums is empty"),
    ],
)
def test_argnums_of_the_wrong_kind(argnums, error, text):
    with pytest.raises(error) as raised:
        grad(square, argnums)
    assert text in message(raised)


def test_keyword_only_call():
    with pytest.raises(GradientTypeError, match="Arguments passed by keyword do not count: pass them by position"):
        grad(square)(x=3.0)


def test_not_a_function():
    with pytest.raises(GradientTypeError, match="grad expects a function, but got 3 of type int"):
        grad(3)


@pytest.mark.parametrize("transform", [grad, value_and_grad, partial(vjp, square)])
def test_reduce_axes(transform):
    fun = X if isinstance(transform, partial) else square
    with pytest.raises(GradientValueError, match="reduce_axes must be empty, but it is"):
        transform(fun, reduce_axes=("i",))


def of_params(params, *rest, batch=None):
    return sum((leaf.sum() for leaf in tree.flatten(params)[0]), start=torch.zeros(()))


INPUT_ERRORS = [
    (({"w": torch.arange(3)},), {}, "argument params['w'] has dtype int64. Convert it with .float()"),
    (([X, torch.ones(2, dtype=torch.bool)],), {}, "argument params[1] has dtype bool"),
    ((X, 1, 2, "s"), {"argnums": (0, 3)}, "argument rest[2] is 's' of type str, where a tensor, a NumPy array"),
    ((X, 3), {"argnums": 1}, "argument rest[0] has dtype int64"),
    ((X,), {"holomorphic": True}, "grad with holomorphic=True needs complex inputs and outputs, but argument params"),
    ((torch.nn.Linear(1, 1),), {}, "Pass it in an argument that is not differentiated, or bind it"),
]


@pytest.mark.parametrize(("args", "options", "text"), INPUT_ERRORS)
def test_inputs_that_cannot_be_differentiated(args, options, text):
    with pytest.raises(GradientTypeError) as raised:
        grad(of_params, **options)(*args)
    assert text in message(raised)


def test_a_function_without_a_signature_is_named_by_position():
    with pytest.raises(GradientTypeError, match=r"argument args\[0\] has dtype int64"):
        grad(torch.sin)(torch.tensor(1))


OUTPUT_ERRORS = [
    (lambda x: x, "the function must return one number, but its output is float32[3]. Return loss.sum()"),
    (lambda x: x[:1], "its output is float32[1]"),
    (lambda x: (x.sum(), x), "it returned a tuple. Return (output, aux) and pass has_aux=True"),
    (lambda x: None, "it returned None"),
    (lambda x: "text", "grad: the output is 'text' of type str"),
    (lambda x: 1, "grad needs floating-point outputs, but the output has dtype int64"),
    (lambda x: x.sum() > 1, "the output has dtype bool"),
    (lambda x: x.sum() * 1j, "grad needs a real output, but the output has dtype complex64. Return a real number"),
]


@pytest.mark.parametrize(("fun", "text"), OUTPUT_ERRORS)
def test_outputs_that_are_not_one_real_number(fun, text):
    with pytest.raises(GradientTypeError) as raised:
        grad(fun)(X)
    assert text in message(raised)
    with pytest.raises(TypeError):
        jax.grad(fun)(to_jax(X))


@pytest.mark.parametrize("result", [lambda x: x, lambda x: (x, x, x), lambda x: {"a": x}])
@pytest.mark.parametrize("transform", [grad, jvp, vjp, linearize])
def test_has_aux_without_a_pair(transform, result):
    call = {
        grad: lambda: grad(result, has_aux=True)(X[0]),
        jvp: lambda: jvp(result, (X,), (X,), has_aux=True),
        vjp: lambda: vjp(result, X, has_aux=True),
        linearize: lambda: linearize(result, X, has_aux=True),
    }[transform]
    with pytest.raises(
        GradientTypeError, match=r"with has_aux=True the function must return a pair \(output, aux\), but"
    ):
        call()


def pair(x, p):
    return x * p["k"], p["k"]


P = {"k": X}
TANGENT_ERRORS = [
    (
        X,
        (X,),
        GradientTypeError,
        "jvp: primals must be a tuple or a list with one entry per argument, but got float32[3]",
    ),
    ((X, P), X, GradientTypeError, "jvp: tangents must be a tuple or a list"),
    ((X, P), (X,), GradientTypeError, "primals[1]['k'] has no counterpart in the tangents"),
    ((X, P), (X, {"q": X}), GradientTypeError, "primals[1]['k'] has no counterpart, while tangents[1]['q'] has none"),
    ((X, P), (X, P, X), GradientTypeError, "tangents[2] has no counterpart in the primals"),
    ((X, P), [X, P], GradientTypeError, "the tangents must have the structure of the primals, but one is"),
    ((X, P), (X, {"k": X.int()}), GradientTypeError, "tangents[1]['k'] is int32[3], but argument p['k'] is float32[3]"),
    ((X, P), (X[:2], P), GradientValueError, "jvp: tangents[0] is float32[2], but argument x is float32[3], whose"),
    ((X, P), (X, {"k": "s"}), GradientTypeError, "jvp: tangents[1]['k'] is 's' of type str"),
    ((2.0, {"k": 3}), (1.0, {"k": 1}), GradientTypeError, "whose tangents are bool[]. (Integers have no tangents"),
]


@pytest.mark.parametrize(("primals", "tangents", "error", "text"), TANGENT_ERRORS)
def test_tangents_that_do_not_fit(primals, tangents, error, text):
    with pytest.raises(error) as raised:
        jvp(pair, primals, tangents)
    assert text in message(raised)
    with pytest.raises(TypeError if error is GradientTypeError else ValueError):
        jax.jvp(pair, to_jax(primals), to_jax(tangents))


@pytest.mark.parametrize(
    ("tangents", "error", "text"),
    [
        ((X,), GradientTypeError, "linearize: the tangents must have the structure of the primals"),
        ((X[:2], P), GradientValueError, "linearize: tangents[0] is float32[2]"),
        ((X.int(), P), GradientValueError, "linearize: tangents[0] is int32[3], but argument x is float32[3]"),
    ],
)
def test_tangents_that_do_not_fit_a_linear_function(tangents, error, text):
    _, f_jvp = linearize(pair, X, P)
    with pytest.raises(error) as raised:
        f_jvp(*tangents)
    assert text in message(raised)
    with pytest.raises(TypeError if error is GradientTypeError else ValueError):
        jax.linearize(pair, *to_jax((X, P)))[1](*to_jax(tangents))


@pytest.mark.parametrize(
    ("cotangents", "error", "text"),
    [
        (([X, X],), GradientValueError, "vjp: the cotangents must have the structure of the output, but one is"),
        (((X,),), GradientValueError, "output[1] has no counterpart in the cotangents"),
        (((X, X[:2]),), GradientValueError, "vjp: cotangents[1] is float32[2], but the output there is float32[3]"),
        (((X, X.int()),), GradientValueError, "vjp: cotangents[1] is int32[3]"),
        ((X, X), GradientTypeError, "takes one argument, a tree like the output, but got 2. If the output is a tuple"),
        ((("s", X),), GradientTypeError, "vjp: cotangents[0] is 's' of type str"),
    ],
)
def test_cotangents_that_do_not_fit(cotangents, error, text):
    _, vjp_fn = vjp(pair, X, P)
    with pytest.raises(error) as raised:
        vjp_fn(*cotangents)
    assert text in message(raised)


@pytest.mark.parametrize("call", [lambda f: vjp(f, X), lambda f: jvp(f, (X,), (X,)), lambda f: linearize(f, X)])
def test_an_output_that_is_not_an_array(call):
    with pytest.raises(GradientTypeError) as raised:
        call(lambda x: {"a": x, "b": ["text"]})
    assert "output['b'][0] is 'text' of type str" in message(raised) and "has_aux=True" in message(raised)


def test_other_errors_pass_as_they_are():
    class MineError(RuntimeError):
        pass

    def fails(x):
        raise MineError("mine")

    with pytest.raises(MineError, match="mine"):
        grad(fails)(X)
    assert_close(grad(lambda x: (x**2).sum())(X), 2 * X)
