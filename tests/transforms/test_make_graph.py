"""make_graph: what it takes and returns, beside JAX's make_jaxpr."""

from __future__ import annotations

import collections
import functools

import numpy as np
import pytest
import torch

from torchbatch import jit, lax, make_graph, tree, vmap
from torchbatch.errors import (
    AxisError,
    AxisSpecError,
    DataDependentError,
    OutputTypeError,
    StaticArgumentError,
    TorchbatchError,
    UnsupportedOperationError,
)
from torchbatch.testing import assert_close
from torchbatch.transforms.eval_shape import ShapeDtypeStruct, eval_shape
from torchbatch.transforms.grad import grad
from torchbatch.transforms.jacobian import hessian, jacfwd, jacrev

S = ShapeDtypeStruct
F32 = torch.float32
X, W = torch.randn(3, 5), torch.randn(5, 2)


def layer(x, w):
    return torch.tanh(x @ w)


# --- what comes back -------------------------------------------------------------------------------------------------


def test_a_graph():
    graph = make_graph(lambda x: (layer(x, W), {"x": x.sum()}))(X)
    assert str(graph) == repr(graph)
    assert str(graph).splitlines() == [
        "inputs a:f32[3,5]; captured b:f32[5,2]",
        "c:f32[3,2] = mm a b",
        "d:f32[3,2] = tanh c",
        "e:f32[] = sum a",
        "return d e",
    ]
    assert graph.operations == ["mm", "tanh", "sum"]
    assert graph.inputs == [S((3, 5), F32)]
    assert graph.outputs == [S((3, 2), F32), S((), F32)]
    assert len(graph.captured) == 1 and graph.captured[0] is W


def test_the_module_runs():
    graph = make_graph(lambda x: (layer(x, W), x.sum()))(X)
    for ours, theirs in zip(graph.module(X, *graph.captured), (layer(X, W), X.sum()), strict=True):
        assert_close(ours, theirs)


def test_the_shapes_of_the_output():
    def fun(x, w):
        return {"y": layer(x, w), "rest": (x.sum(), [3, None])}

    graph, shapes = make_graph(fun, return_shape=True)(X, W)
    assert shapes == eval_shape(fun, X, W)
    assert graph.outputs == tree.flatten(shapes)[0]


def test_nothing_is_computed():
    huge = S((10**6, 10**6), F32)
    graph = make_graph(lambda a, b: (a @ b).sum(0))(huge, huge)
    assert graph.operations == ["mm", "sum"] and graph.outputs == [S((10**6,), F32)]


def test_a_shape_and_a_tensor_give_the_same():
    one = make_graph(layer)(X, W)
    two = make_graph(layer)(S((3, 5), F32), W)
    assert str(one) == str(two) and one.inputs == two.inputs


def test_a_device_that_may_not_be_there():
    graph = make_graph(lambda x: (x * 2).cpu())(S((3,), F32, "cuda"))
    assert graph.inputs[0].device.type == "cuda" and graph.outputs[0].device.type == "cpu"
    assert str(graph).splitlines()[2] == "c:f32[3] = to[cpu] b"


def test_trees_keywords_and_numbers():
    graph = make_graph(lambda p, *, scale: p["x"] * scale + p["y"][0])({"x": X, "y": [np.ones(5, "float32")]}, scale=2.0)
    assert [name for name in graph.operations if name != "to"] == ["mul", "add"]
    assert [value.shape for value in graph.inputs] == [(3, 5), (5,), ()]


def test_static_arguments():
    fun = make_graph(lambda x, how, n: getattr(x, how)() * n, static_argnums=(1, 2))
    assert fun(X, "sum", 3).operations == ["sum", "mul"]
    assert fun(X, "exp", 3).operations == ["exp", "mul"]
    assert make_graph(lambda x, n: x.sum(n), 1)(X, 0).outputs == [S((5,), F32)]


def test_a_method_and_a_module():
    linear = torch.nn.Linear(5, 2)
    assert make_graph(linear)(X).operations == ["addmm"]
    assert len(make_graph(linear)(X).captured) == 2

    class Scaled:
        @make_graph
        def twice(self, x):
            return x * 2

        @functools.partial(make_graph, static_argnums=0)
        def thrice(self, x):
            return x * 3

    assert Scaled().thrice(X).operations == ["mul"]
    with pytest.raises(StaticArgumentError, match="argument self of twice"):
        Scaled().twice(X)


def test_only_the_forward_function_is_shown():
    x, w = X.clone().requires_grad_(), W.clone().requires_grad_()
    assert str(make_graph(lambda x: layer(x, w))(x)) == str(make_graph(lambda x: layer(x, W))(X))
    assert make_graph(grad(lambda x: layer(x, w).sum()))(x).operations == ["mm", "tanh", "sum", "tanh_backward", "mm"]
    assert torch.is_grad_enabled()


def test_what_is_written_in_place():
    x = X.clone()
    graph = make_graph(lambda x: x.mul_(2).sum())(x)
    assert str(graph).splitlines()[-2:] == ["a <- b", "return c"]
    assert graph.outputs == [S((), F32)] and len(graph.module(X)) == 2
    assert_close(x, X)


def test_jit_dissolves():
    jitted = jit(lambda x: layer(x, W), backend="eager")
    jitted(X)
    assert str(make_graph(jitted)(X)) == str(make_graph(lambda x: layer(x, W))(X))
    assert str(make_graph(vmap(jitted))(X)) == str(make_graph(vmap(lambda x: layer(x, W)))(X))


def test_collectives():
    assert make_graph(vmap(lambda x: x - lax.pmean(x, "i"), axis_name="i"))(X).operations == ["sum", "div", "sub"]


def test_it_looks_like_the_function():
    made = make_graph(layer)
    assert made.__name__ == "layer" and made.__wrapped__ is layer


# --- errors ----------------------------------------------------------------------------------------------------------


def mode(x, how="sum"):
    return getattr(x, how)()


WRONG = {
    "no function": (lambda: make_graph(3), AxisSpecError, "make_graph shows a function, but it got 3 of type int."),
    "the options of JAX": (
        lambda: make_graph(mode, (), None),
        AxisSpecError,
        "make_graph: return_shape must be True or False, but it is None of type NoneType.",
    ),
    "static_argnums of the wrong kind": (
        lambda: make_graph(mode, "how"),
        StaticArgumentError,
        "make_graph: static_argnums must be one or several ints, but it is 'how' of type str.",
    ),
    "static_argnums out of range": (
        lambda: make_graph(mode, 2),
        StaticArgumentError,
        "make_graph: static_argnums=2 is out of range: mode has 2 positional argument(s): x, how.",
    ),
    "a string": (
        lambda: make_graph(mode)(X, "sum"),
        StaticArgumentError,
        "make_graph: argument how of mode is 'sum' of type str, which is not an array. Make it static, "
        "make_graph(…, static_argnums=1), bind it with functools.partial, or let the function close over it.",
    ),
    "a string by keyword": (
        lambda: make_graph(mode)(X, how="sum"),
        StaticArgumentError,
        "make_graph: argument how of mode is 'sum' of type str, which is not an array. Make it static, "
        "make_graph(…, static_argnums=1), bind it with functools.partial, or let the function close over it.",
    ),
    "a string by a keyword that has no position": (
        lambda: make_graph(lambda x, **options: x)(X, how="sum"),
        StaticArgumentError,
        "make_graph: argument how of <lambda> is 'sum' of type str, which is not an array. Make it static, "
        "make_graph(…, static_argnums=…), bind it with functools.partial, or let the function close over it.",
    ),
    "a static list": (
        lambda: make_graph(mode, 1)(X, ["sum"]),
        StaticArgumentError,
        "make_graph: the static argument how must be hashable, but it is ['sum'] of type list. Give a tuple in the place of a "
        "list, and a frozen dataclass or a tuple of pairs in that of a dict.",
    ),
    "a static tensor": (
        lambda: make_graph(mode, 0)(X),
        StaticArgumentError,
        "make_graph: the static argument x is a tensor, float32[3,5]. A static argument is a constant of the trace, and is "
        "compared by value: leave a tensor out of static_argnums.",
    ),
    "a string as output": (
        lambda: make_graph(lambda x: "sum")(X),
        OutputTypeError,
        "make_graph: output of <lambda> is 'sum' of type str, but every output must be an array or a number.",
    ),
    "within a map": (
        lambda: vmap(lambda x: (make_graph(mode)(x), x)[1])(X),
        UnsupportedOperationError,
        "make_graph is called inside a transform, a trace or a mode of PyTorch, where operations are not what they look like. "
        "Call it outside, on the transformed function: make_graph(vmap(f))(…).",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_errors(name):
    call, kind, message = WRONG[name]
    with pytest.raises(TorchbatchError) as caught:
        call()
    assert type(caught.value) is kind and str(caught.value) == message


def test_the_value_of_a_tensor_is_not_known():
    with pytest.raises(DataDependentError, match=r"static: make_graph\(…, static_argnums=…\)"):
        make_graph(lambda x, n: x[:n])(X, 2)


def test_the_errors_of_what_is_inside():
    with pytest.raises(AxisError, match=r"^vmap got axes of different sizes"):
        make_graph(vmap(torch.add))(X, W)


def test_a_sparse_tensor():
    with pytest.raises(UnsupportedOperationError, match=r"^make_graph: argument x of mode .*; make_graph takes plain dense"):
        make_graph(mode)(X.to_sparse())


# --- beside JAX ------------------------------------------------------------------------------------------------------

PRODUCTS = dict.fromkeys(["dot_general", "mm", "bmm", "mv", "dot", "addmm"], "product")
ESSENTIAL = {**PRODUCTS, "tanh": "tanh", "exp": "exp", "sum": "sum", "reduce_sum": "sum"}


def equations(jaxpr):
    """The names of all primitives, those of nested functions in their place."""
    for equation in jaxpr.eqns:
        inner = [value.jaxpr for value in equation.params.values() if hasattr(value, "jaxpr")]
        yield from (name for part in inner for name in equations(part)) if inner else [equation.primitive.name]


def both(fun, transform, jax_transform, *shapes):
    """How often each essential operation is there, in ours and in JAX's."""
    jax = pytest.importorskip("jax")
    ours = make_graph(transform(functools.partial(fun, torch)))(*(S(shape, F32) for shape in shapes))
    theirs = jax.make_jaxpr(jax_transform(jax)(functools.partial(fun, jax.numpy)))(
        *(jax.ShapeDtypeStruct(shape, "float32") for shape in shapes)
    )
    return tuple(
        collections.Counter(ESSENTIAL[name] for name in names if name in ESSENTIAL)
        for names in (ours.operations, equations(theirs.jaxpr))
    )


def loss(xp, x, w, v):
    return (xp.tanh(x @ w) @ v).sum()


def deep(xp, x, w, v):
    return (xp.tanh(xp.tanh(x @ w) @ v) ** 2).sum()


def kernel(xp, x, y):
    return xp.exp(-((x - y) ** 2).sum())


SHAPES = (6, 5), (5, 4), (4, 2)
PER_EXAMPLE = {"in_axes": (0, None, None)}
SAME = {
    "a mapped model": (loss, lambda f: vmap(f, **PER_EXAMPLE), lambda jax: lambda f: jax.vmap(f, **PER_EXAMPLE), SHAPES),
    "gradients per example": (
        loss,
        lambda f: vmap(grad(f, (1, 2)), **PER_EXAMPLE),
        lambda jax: lambda f: jax.vmap(jax.grad(f, (1, 2)), **PER_EXAMPLE),
        SHAPES,
    ),
    "a Gram matrix": (
        kernel,
        lambda f: vmap(vmap(f, (None, 0)), (0, None)),
        lambda jax: lambda f: jax.vmap(jax.vmap(f, (None, 0)), (0, None)),
        ((3, 2), (4, 2)),
    ),
    "a Jacobian by rows": (lambda xp, x, w, v: xp.tanh(x @ w) @ v, jacrev, lambda jax: jax.jacrev, ((5,), *SHAPES[1:])),
}


@pytest.mark.parametrize("name", SAME)
def test_as_many_operations_as_jax(name):
    ours, theirs = both(*SAME[name][:3], *SAME[name][3])
    assert ours == theirs and ours


@pytest.mark.xfail(strict=True, reason="products with tangents that are zero are in the trace, and go only when it is compiled")
@pytest.mark.parametrize(("transform", "name"), [(jacfwd, "jacfwd"), (hessian, "hessian")])
def test_as_many_products_as_jax_in_forward_mode(transform, name):
    ours, theirs = both(deep, transform, lambda jax: getattr(jax, name), (5,), *SHAPES[1:])
    assert ours["product"] <= theirs["product"]
