"""grad, value_and_grad, vjp, jvp, linearize and stop_gradient, held to live JAX."""

from __future__ import annotations

import inspect
import operator
import pickle
from collections import OrderedDict, namedtuple
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from torchbatch.core import tree
from torchbatch.errors import InPlaceError
from torchbatch.testing import assert_close
from torchbatch.transforms import grad as module
from torchbatch.transforms.grad import grad, jvp, linearize, stop_gradient, value_and_grad, vjp
from torchbatch.transforms.vmap import vmap

jax = pytest.importorskip("jax")
jnp = jax.numpy

jax.config.update("jax_platforms", "cpu")

Point = namedtuple("Point", "x y")
EVERY_WAY = pytest.mark.parametrize("how", ["eager", "jit", "inductor"], indirect=True)
VMAPS = pytest.mark.parametrize("mapped", [torch.func.vmap, vmap], ids=["torch.func.vmap", "torchbatch.vmap"])
X = torch.tensor([0.5, -1.0, 2.0])


def to_jax(value):
    return tree.map_leaves(lambda leaf: jnp.asarray(leaf.numpy()) if isinstance(leaf, torch.Tensor) else leaf, value)


def assert_same(ours, theirs):
    """The same tree with the same shapes, dtypes and numbers."""
    assert jax.tree.structure(theirs) == jax.tree.structure(tree.map_leaves(lambda _: 0, ours))
    for mine, other in zip(tree.flatten(ours)[0], jax.tree.leaves(theirs), strict=True):
        other = np.asarray(other)
        assert tuple(mine.shape) == other.shape
        if other.dtype.names is not None:  # float0
            assert mine.dtype == torch.bool and not mine.any()
            continue
        assert_close(mine.detach().numpy(), other, rtol=2e-5, atol=2e-6, dtypes=False)
        assert str(mine.dtype).removeprefix("torch.") == str(other.dtype)


def message(raised) -> str:
    return str(raised.value)


# --- grad and value_and_grad


@pytest.mark.parametrize("name", ["grad", "value_and_grad", "jvp", "vjp", "linearize"])
def test_signatures_are_those_of_jax(name):
    def plain(function):
        parameters = inspect.signature(function).parameters.values()
        return [(p.name, p.kind, p.default) for p in parameters]

    assert plain(getattr(module, name)) == plain(getattr(jax, name))


FUNCTIONS = {
    "sum of sines": (lambda xp: lambda x: xp.sum(xp.sin(x) * x), (X,)),
    "tree": (lambda xp: lambda p: xp.sum(p["w"] ** 2 * p["b"][0]) + p["b"][1], ({"w": X, "b": (X + 1, X[0])},)),
    "namedtuple": (lambda xp: lambda p: xp.sum(p.x * p.y), (Point(X, X * 2),)),
    "None inside": (lambda xp: lambda p: xp.sum(p["a"] ** 3), ({"a": X, "b": None},)),
    "list": (lambda xp: lambda p: xp.sum(p[0] * p[1]), ([X, X + 1],)),
    "independent": (lambda xp: lambda p: p["a"], ({"a": X[0], "b": X},)),
    "constant": (lambda xp: lambda x: 1.0, (X,)),
    "empty": (lambda xp: lambda x: xp.sum(x), (torch.zeros(0, 2),)),
    "half of it": (lambda xp: lambda x, y: xp.sum(x * y), (X, X + 1)),
    "half precision": (lambda xp: lambda x: xp.sum(x * x), (X.half(),)),
    "real of complex": (lambda xp: lambda z: xp.sum(xp.abs(z) ** 2), (X + 2j,)),
    "real through complex": (lambda xp: lambda x: xp.sum(xp.abs(x * (1 + 2j)) ** 2), (X,)),
    "mixed complex": (lambda xp: lambda p: xp.sum(xp.abs(p[0] * p[1])), ((X + 1j, X),)),
}


@pytest.mark.parametrize("case", FUNCTIONS)
def test_grad_and_value_are_jax(case):
    make, args = FUNCTIONS[case]
    theirs = jax.value_and_grad(make(jnp))(*to_jax(args))
    value, gradient = value_and_grad(make(torch))(*args)
    assert_same(gradient, theirs[1])
    assert_close(float(value), float(theirs[0]), rtol=1e-3 if "half" in case else 1e-5, dtypes=False)
    assert_same(grad(make(torch))(*args), theirs[1])


@pytest.mark.parametrize("argnums", [0, 1, 2, -1, -3, (0,), (2, 0), [1, -1], (0, 1, 2), np.int64(1), True])
def test_argnums(argnums):
    def make(xp):
        return lambda a, b, c: xp.sum(a["x"] ** 2 * b) + 3 * c

    args = ({"x": X}, X + 1, X[0])
    assert_same(grad(make(torch), argnums)(*args), jax.grad(make(jnp), argnums)(*to_jax(args)))


shapes = st.lists(st.integers(0, 3), max_size=3)
arrays = shapes.map(lambda shape: torch.linspace(-1.0, 2.0, int(np.prod(shape))).reshape(shape))
trees = st.recursive(
    st.one_of(arrays, st.none()),
    lambda inner: st.one_of(
        st.lists(inner, max_size=2),
        st.lists(inner, max_size=2).map(tuple),
        st.dictionaries(st.sampled_from("abc"), inner, max_size=2),
        st.tuples(inner, inner).map(lambda pair: Point(*pair)),
        st.dictionaries(st.sampled_from("abc"), inner, max_size=2).map(OrderedDict),
    ),
    max_leaves=5,
)


@EVERY_WAY
def test_any_tree_and_any_argnums(how):
    def make(xp, leaves_of):
        return lambda *args: sum((xp.sum(xp.sin(leaf) * leaf) for leaf in leaves_of(args)), start=xp.zeros(()))

    @how.examples(25)
    @given(st.lists(trees, min_size=1, max_size=3), st.data())
    def holds(args, data):
        count = len(args)
        argnums = data.draw(
            st.integers(-count, count - 1) | st.lists(st.integers(0, count - 1), min_size=1, unique=True).map(tuple)
        )
        theirs = jax.value_and_grad(make(jnp, jax.tree.leaves), argnums)(*to_jax(tuple(args)))
        ours = how.run(value_and_grad(make(torch, lambda args: tree.flatten(args)[0]), argnums))(*args)
        assert_same(ours, theirs)

    holds()


@pytest.mark.parametrize("number", [3.0, np.float32(3.0), np.array(3.0, np.float32), 2.5])
def test_numbers_and_numpy_arrays_are_accepted(number):
    gradient = grad(lambda x: x**3)(number)
    assert isinstance(gradient, torch.Tensor) and gradient.dtype == torch.float32
    assert_same(gradient, jax.grad(lambda x: x**3)(number))


def test_a_numpy_array_keeps_its_precision():
    assert grad(lambda x: (x**2).sum())(np.ones(3)).dtype == torch.float64


def test_keyword_arguments_and_other_objects_pass_untouched():
    layer, seen, marker = torch.nn.Linear(3, 1), [], object()

    def loss(x, model, label, *, scale, mode=None):
        seen.append((model, label, mode))
        return (model(x) * scale["s"]).sum()

    gradient = grad(loss)(X, layer, "cat", scale={"s": torch.tensor(2.0)}, mode=marker)
    assert_close(gradient, 2 * layer.weight[0].detach())
    assert seen[0][0] is layer and seen[0][1] == "cat" and seen[0][2] is marker


def test_has_aux_hands_out_tensors_and_other_objects():
    def loss(x):
        y = x**2
        return y.sum(), {"y": y, "name": "loss", "none": None, "type": int}

    gradient, aux = grad(loss, has_aux=True)(X)
    (value, same), _ = value_and_grad(loss, has_aux=True)(X)
    assert_close(gradient, 2 * X)
    assert_close(aux["y"], X**2)
    assert_close(value, (X**2).sum())
    assert aux["name"] == same["name"] == "loss" and aux["none"] is None and aux["type"] is int
    aux["y"] += 1  # an ordinary tensor, whose transform is over


def test_allow_int_gives_bool_zeros_for_float0():
    def make(xp):
        return lambda p: xp.sum(p["x"] * p["n"])

    args = ({"x": X, "n": torch.tensor([1, 2, 3], dtype=torch.int32)},)
    assert_same(grad(make(torch), allow_int=True)(*args), jax.grad(make(jnp), allow_int=True)(*to_jax(args)))
    assert grad(lambda b: b.float().sum(), allow_int=True)(torch.tensor([True])).tolist() == [False]


def test_holomorphic_is_jax():
    def make(xp):
        return lambda z: xp.sum(z**3 + xp.exp(z))

    assert_same(
        grad(make(torch), holomorphic=True)(X + 1j), jax.grad(make(jnp), holomorphic=True)(jnp.asarray(X.numpy()) + 1j)
    )


def test_complex_gradient_is_the_conjugate_of_pytorchs():
    def function(z):
        return (z.abs() ** 2).sum()

    assert_close(grad(function)(X + 1j), torch.func.grad(function)(X + 1j).conj().resolve_conj())
    grad(function)(X + 1j).numpy()  # not a lazy conjugate, which numpy() refuses


def test_level_zero_autograd_sees_through():
    x = X.clone().requires_grad_()
    grad(lambda x: (x**3).sum())(x).sum().backward()
    assert_close(x.grad, 6 * X)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_contexts_outside_do_not_matter_but_inside_do(context):
    with context():
        assert_close(grad(lambda x: (x**2).sum())(X).clone(), 2 * X)
        assert_close(grad(lambda x: grad(lambda x: (x**3).sum())(x).sum())(X).clone(), 6 * X)

    def partly(x):
        with torch.no_grad():
            constant = x**2
        return (x * constant).sum()

    assert_close(grad(partly)(X), X**2)


def test_a_tensor_passed_as_another_argument_can_be_written_in_place():
    norm = torch.nn.BatchNorm1d(3)
    parameters = {name: value.detach() for name, value in norm.named_parameters()}
    buffers = {name: value.clone() for name, value in norm.named_buffers()}
    data = torch.randn(5, 3)

    def loss(p, b, x):
        return (torch.func.functional_call(norm, (p, b), (x,)) ** 2).sum()

    expected = torch.func.grad(loss)(parameters, {name: value.clone() for name, value in buffers.items()}, data)
    assert_close(grad(loss)(parameters, buffers, data), expected)
    assert buffers["num_batches_tracked"] == 1
    assert_close(buffers["running_mean"], 0.1 * data.mean(0))


def test_a_write_into_a_closed_over_tensor_is_an_error():
    store = torch.zeros(3)
    with pytest.raises(InPlaceError, match="grad: the function writes in place into a tensor that it closes over"):
        grad(lambda x: store.add_(x).sum())(X)


# --- nesting


@VMAPS
@pytest.mark.parametrize("reverse", [True, False])
def test_derivatives_and_vmap_nest_both_ways(mapped, reverse):
    rows = torch.linspace(-1, 1, 6).reshape(2, 3)
    if reverse:
        ours = grad(lambda rows: mapped(lambda x: torch.sin(x * x).sum())(rows).sum())(rows)
    else:
        ours = mapped(grad(lambda x: torch.sin(x * x).sum()))(rows)
    assert_same(ours, jax.vmap(jax.grad(lambda x: jnp.sum(jnp.sin(x * x))))(to_jax(rows)))


ORDERS = {
    "grad grad": (
        lambda xp, g, j: lambda x: g(lambda y: xp.sum(xp.sin(g(lambda z: xp.sum(z**3 * y))(y))))(x),
        True,
    ),
    "jvp of grad": (lambda xp, g, j: lambda x: j(g(lambda y: xp.sum(xp.sin(y) * y**2)), (x,), (x,))[1], True),
    "grad of jvp": (lambda xp, g, j: lambda x: g(lambda y: xp.sum(j(lambda z: xp.sin(z) * z, (y,), (y,))[1]))(x), True),
    "jvp of jvp": (
        lambda xp, g, j: lambda x: j(lambda y: j(lambda z: xp.exp(z) * z, (y,), (y,))[1], (x,), (x,))[1],
        True,
    ),
    "third": (
        lambda xp, g, j: lambda x: g(lambda a: xp.sum(g(lambda b: xp.sum(g(lambda c: xp.sum(c**4))(b) ** 2))(a)))(x),
        True,
    ),
}


@VMAPS
@pytest.mark.parametrize("order", ORDERS)
def test_orders_are_jax(order, mapped):
    make, _ = ORDERS[order]
    theirs = make(jnp, jax.grad, jax.jvp)
    ours = make(torch, grad, jvp)
    assert_same(ours(X), theirs(to_jax(X)))
    rows = torch.stack([X, X * 2])
    assert_same(mapped(ours)(rows), jax.vmap(theirs)(to_jax(rows)))


# --- vjp


def test_vjp_is_jax_and_can_be_called_again():
    def make(xp):
        return lambda x, p: {"s": xp.sin(x) * p["k"], "t": (xp.sum(x), None)}

    args = (X, {"k": X + 1})
    theirs, their_vjp = jax.vjp(make(jnp), *to_jax(args))
    output, vjp_fn = vjp(make(torch), *args)
    assert_same(output, theirs)
    for scale in (1.0, 2.0):
        cotangent = {"s": X * scale, "t": (torch.tensor(scale), None)}
        assert_same(vjp_fn(cotangent), their_vjp(to_jax(cotangent)))


def test_vjp_has_no_conjugate_as_in_jax():
    def make(xp):
        return lambda z: xp.conj(z) * z * z

    z, c = X + 2j, X * 1j + 1
    _, ours = vjp(lambda z: z.conj() * z * z, z)
    _, theirs = jax.vjp(make(jnp), jnp.asarray(z.numpy()))
    assert_same(ours(c), theirs(jnp.asarray(c.numpy())))


def test_vjp_of_integers_and_without_arrays():
    output, vjp_fn = vjp(lambda x, n, m: (x * n["n"], n["n"]), X, {"n": torch.tensor([1, 2, 3])}, None)
    assert output[1].tolist() == [1, 2, 3]
    x, n, m = vjp_fn((torch.ones(3), torch.zeros(3, dtype=torch.bool)))
    assert x.tolist() == [1, 2, 3] and n["n"].tolist() == [False] * 3 and m is None
    assert vjp(lambda: 3.0)[1](1.0) == ()
    assert vjp(lambda x: None, 2.0)[1](None)[0] == 0


@VMAPS
def test_vjp_function_works_inside_vmap_and_after(mapped):
    _, vjp_fn = vjp(lambda x: x**2, X)
    assert_close(mapped(lambda c: vjp_fn(c)[0])(torch.eye(3)), torch.diag(2 * X))
    assert_close(grad(lambda c: vjp_fn(c)[0].sum())(X), 2 * X)


def test_vjp_takes_numbers_and_numpy_as_cotangents():
    assert vjp(lambda x: x**2, torch.tensor(3.0))[1](1.0)[0] == 6
    assert vjp(lambda x: x**2, X)[1](np.ones(3))[0].dtype == torch.float32


def test_vjp_has_aux():
    output, vjp_fn, aux = vjp(lambda x: (x**2, ("a", x)), X, has_aux=True)
    assert_close(vjp_fn(X)[0], 2 * X * X)
    assert aux[0] == "a" and torch.equal(aux[1], X) and torch.equal(output, X**2)


# --- jvp and linearize


LINEAR = {
    "tree": (
        lambda xp: lambda x, p: {"s": xp.sin(x) * p["k"], "t": (xp.sum(x), None)},
        (X, {"k": X + 1}),
        (X * 2, {"k": X - 1}),
    ),
    "independent": (lambda xp: lambda x: (x * 2, 1.0, 3), (X,), (X,)),
    "complex": (lambda xp: lambda z: xp.conj(z) * z * z, (X + 1j,), (X * 1j + 1,)),
    "numbers": (lambda xp: lambda x: x**3, (3.0,), (2.0,)),
    "empty": (lambda xp: lambda x: x * 2, (torch.zeros(0, 3),), (torch.zeros(0, 3),)),
    "integers": (
        lambda xp: lambda x, n: (x * n, n),
        (X, torch.tensor([1, 2, 3], dtype=torch.int32)),
        (X, torch.zeros(3, dtype=torch.bool)),
    ),
}


@pytest.mark.parametrize("case", LINEAR)
@pytest.mark.parametrize("transform", ["jvp", "linearize"])
def test_forward_mode_is_jax(case, transform):
    make, primals, tangents = LINEAR[case]
    their_tangents = tree.map_leaves(
        lambda t: np.zeros(3, jax.dtypes.float0) if getattr(t, "dtype", None) == torch.bool else t, tangents
    )
    fun = make(torch) if case != "complex" else lambda z: z.conj().resolve_conj() * z * z
    theirs = jax.jvp(make(jnp), to_jax(primals), to_jax(their_tangents))
    if transform == "jvp":
        ours = jvp(fun, primals, tangents)
    else:
        output, f_jvp = linearize(fun, *primals)
        ours = output, f_jvp(*tangents)
    theirs, ours = theirs[1], ours[1]
    if case in ("independent", "numbers"):  # JAX hands out Python numbers here
        assert_close(*(np.asarray(jax.tree.leaves(t)[0], float) for t in (ours, theirs)), dtypes=False)
    else:
        assert_same(ours, theirs)


def test_linearize_runs_the_function_once_and_is_linear():
    calls = []
    output, f_jvp = linearize(lambda x: calls.append(1) or torch.sin(x), X)
    assert_close(f_jvp(X), torch.cos(X) * X)
    assert_close(f_jvp(3 * X), 3 * torch.cos(X) * X)
    assert len(calls) == 1 and torch.equal(output, torch.sin(X))


@VMAPS
def test_linearize_in_and_under_transforms(mapped):
    _, f_jvp = linearize(torch.sin, X)
    assert_close(mapped(f_jvp)(torch.eye(3)), torch.diag(torch.cos(X)))
    rows = torch.stack([X, X * 2])
    assert_close(mapped(lambda x: linearize(torch.sin, x)[1](x))(rows), torch.cos(rows) * rows)
    inner = grad(lambda x: linearize(torch.sin, x)[1](torch.ones(3)).sum())(X)
    assert_close(inner, -torch.sin(X))


def test_linearize_where_the_derivative_is_infinite():
    theirs = jax.linearize(jnp.sqrt, jnp.zeros(2))[1](jnp.ones(2))
    assert_same(linearize(torch.sqrt, torch.zeros(2))[1](torch.ones(2)), theirs)


def test_jvp_and_linearize_have_aux():
    def fun(x):
        return (x**2, {"x": x, "s": "aux"})

    _, tangent, aux = jvp(fun, [X], [X], has_aux=True)
    _, f_jvp, same = linearize(fun, X, has_aux=True)
    assert_close(tangent, f_jvp(X))
    assert aux["s"] == same["s"] == "aux" and torch.equal(aux["x"], X) and torch.equal(same["x"], X)


# --- stop_gradient


STOPS = {
    "value": lambda xp, s: lambda x: xp.sum(x * s(x)),
    "inner": lambda xp, s: lambda x: xp.sum(xp.sin(s(x * x) * x) + s(x)),
    "tree": lambda xp, s: lambda x: xp.sum(s({"a": x * x, "b": (x,)})["a"] * x),
}


@pytest.mark.parametrize("case", STOPS)
def test_stop_gradient_in_every_mode_and_order(case):
    ours, theirs = STOPS[case](torch, stop_gradient), STOPS[case](jnp, jax.lax.stop_gradient)
    x = to_jax(X)
    assert_same(grad(ours)(X), jax.grad(theirs)(x))
    assert_same(jvp(ours, (X,), (X,)), jax.jvp(theirs, (x,), (x,)))

    def second(g, xp, f):
        return lambda x: g(lambda y: xp.sum(g(f)(y) ** 2))(x)

    assert_same(second(grad, torch, ours)(X), second(jax.grad, jnp, theirs)(x))
    assert_same(jvp(grad(ours), (X,), (X,))[1], jax.jvp(jax.grad(theirs), (x,), (x,))[1])
    assert_same(grad(lambda v: jvp(ours, (v,), (v,))[1])(X), jax.grad(lambda v: jax.jvp(theirs, (v,), (v,))[1])(x))


def test_stop_gradient_stops_an_outer_transform_from_within_an_inner_one():
    def make(xp, g, s):
        return g(lambda x: g(lambda y: xp.sum(s(x) * y**2 * x))(x).sum())

    ours, theirs = make(torch, grad, stop_gradient), make(jnp, jax.grad, jax.lax.stop_gradient)
    assert_same(ours(X), theirs(to_jax(X)))


def test_stop_gradient_leaves_other_objects_alone_and_stops_autograd():
    marker = object()
    x = X.clone().requires_grad_()
    stopped = stop_gradient({"m": marker, "s": "text", "x": x, "n": None, "i": torch.tensor(1)})
    assert stopped["m"] is marker and stopped["s"] == "text" and stopped["n"] is None
    assert not stopped["x"].requires_grad


# --- what the wrapper is


def square(x):
    """The square."""
    return x * x


@grad
def slope(x):
    return x**3


class Model:
    @grad
    def loss(self):
        return None

    @partial(grad, argnums=1)
    def energy(self, x):
        return x**2


def test_the_wrapper_keeps_name_doc_and_signature():
    wrapped = grad(square)
    assert (wrapped.__name__, wrapped.__doc__, wrapped.__wrapped__) == ("square", "The square.", square)
    assert str(inspect.signature(wrapped)) == "(x)"
    assert repr(wrapped) == "<grad of square>" and repr(value_and_grad(square)) == "<valueandgrad of square>"
    assert grad(partial(operator.mul, 2.0))(3.0) == 2


@pytest.mark.parametrize("transform", [grad, value_and_grad, partial(grad, argnums=(0,), allow_int=True)])
def test_pickle(transform):
    made = transform(torch.sum)
    again = pickle.loads(pickle.dumps(made))
    assert str(again(X)) == str(made(X))


def test_pickle_by_name_where_the_wrapper_took_the_functions_place(monkeypatch):
    import sys
    import types

    home = types.ModuleType("home_of_slope")
    monkeypatch.setitem(sys.modules, "home_of_slope", home)
    home.slope = slope
    monkeypatch.setattr(slope, "__module__", "home_of_slope")
    assert pickle.loads(pickle.dumps(slope)) is slope


def test_methods():
    assert Model().energy(3.0) == 6
    assert isinstance(Model.energy, module.Grad)


def test_other_arguments_pass_without_a_copy_where_they_cannot_be_written():
    sparse = torch.eye(3).to_sparse()
    assert_close(grad(lambda x, m: (torch.sparse.mm(m, x[:, None])).sum())(X, sparse), torch.ones(3))


def test_an_argument_may_be_called_self():
    assert grad(lambda x, self: x * self)(2.0, self=3.0) == 3


def test_a_compiled_function_inside():
    compiled = torch.compile(square, backend="eager")
    assert grad(compiled)(torch.tensor(3.0)) == 6


# --- torch.compile


COMPILED = {
    "tensor": (grad(lambda x: (x**3).sum()), (X,)),
    "tuple": (grad(lambda p: (p[0] ** 3 * p[1]).sum()), ((X, X + 1),)),
    "dict": (grad(lambda p: (p["b"] ** 3 * p["a"]).sum()), ({"b": X, "a": X + 1},)),
    "argnums": (grad(lambda a, b: (a**3 * b).sum(), argnums=(0, 1)), (X, X + 1)),
    "rest": (value_and_grad(lambda a, b: (a**3 * b["k"]).sum()), (X, {"k": X + 1})),
    "keyword": (lambda x, y: grad(lambda a, b: (a**3 * b).sum())(x, b=y), (X, X + 1)),
    "aux": (grad(lambda x: ((x**3).sum(), {"y": x, "s": 1}), has_aux=True), (X,)),
    "vjp": (lambda x: vjp(lambda a: (a**2, a > 0), x)[1]((x, x > 0)), (X,)),
    "jvp": (lambda x: jvp(lambda a: {"s": a.sin()}, (x,), (x,)), (X,)),
    "linearize": (lambda x: linearize(torch.sin, x)[1](x), (X,)),
    "stop": (grad(lambda x: (x * stop_gradient(x)).sum()), (X,)),
    "vmap": (vmap(grad(lambda x: (x**3).sum())), (torch.stack([X, X]),)),
    "second": (grad(lambda x: grad(lambda y: (y**3).sum())(x).sum()), (X,)),
}


@pytest.mark.parametrize("case", COMPILED)
def test_torch_compile(case):
    function, args = COMPILED[case]
    torch._dynamo.reset()
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    assert_close(compiled(*args), function(*args))
