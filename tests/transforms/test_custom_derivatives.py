"""custom_jvp and custom_vjp: against plain functions, the loop and live JAX, in every order with other transforms."""

from __future__ import annotations

import pickle
import re
from functools import partial

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from hypothesis import given, settings

import torchbatch
from torchbatch import custom_jvp, custom_vjp, custom_vmap, grad, hessian, jacfwd, jacrev, jit, jvp, lax, vjp, vmap
from torchbatch.errors import GradientTypeError, GradientValueError, InputTypeError, UnsupportedOperationError
from torchbatch.testing import assert_close, loop

X, Y = torch.linspace(-1, 2, 5), torch.linspace(0.5, 2, 5)
eager_jit = partial(jit, backend="eager")


def plain(x, y):
    return torch.sin(x) * y


def by_jvp(calls, np=torch, custom=custom_jvp):
    made = custom(lambda x, y: np.sin(x) * y)

    @made.defjvp
    def rule(primals, tangents):
        calls.append("jvp")
        (x, y), (dx, dy) = primals, tangents
        return made(x, y), np.cos(x) * dx * y + np.sin(x) * dy

    return made


def by_vjp(calls, np=torch, custom=custom_vjp):
    made = custom(lambda x, y: np.sin(x) * y)

    def fwd(x, y):
        calls.append("fwd")
        return made(x, y), (np.cos(x), np.sin(x), y)

    def bwd(residuals, ct):
        calls.append("bwd")
        c, s, y = residuals
        return c * ct * y, s * ct

    made.defvjp(fwd, bwd)
    return made


KINDS = {"jvp": by_jvp, "vjp": by_vjp}
REVERSE = {
    "grad": lambda g: grad(g, (0, 1)),
    "vjp": lambda g: lambda x, y: vjp(g, x, y)[1](x),
    "jacrev": lambda g: jacrev(g, (0, 1)),
    "grad of grad": lambda g: grad(grad(g), 1),
    "three times": lambda g: grad(grad(grad(g))),
    "jacrev of jacrev": lambda g: jacrev(jacrev(g, (0, 1)), 0),
}
FORWARD = {
    "jvp": lambda g: lambda x, y: jvp(g, (x, y), (y, x)),
    "jacfwd": lambda g: jacfwd(g, (0, 1)),
    "hessian": lambda g: hessian(g, (0, 1)),
    "jacfwd of jacfwd": lambda g: jacfwd(jacfwd(g, 1)),
    "jacrev of jacfwd": lambda g: jacrev(jacfwd(g), (0, 1)),
}
CASES = [("jvp", name) for name in (*REVERSE, *FORWARD)] + [("vjp", name) for name in REVERSE]


def same(ours, theirs):
    assert_close(ours, theirs)


@pytest.mark.parametrize("run", [lambda f: f, eager_jit], ids=["eager", "jit"])
@pytest.mark.parametrize(("kind", "name"), CASES)
def test_derivatives_under_vmap(kind, name, run):
    made, derivative = KINDS[kind]([]), {**REVERSE, **FORWARD}[name]
    for axes in [(0, 0), (0, None)]:
        args = [v if axis == 0 else v[0] for v, axis in zip((X, Y), axes, strict=True)]
        same(run(vmap(derivative(made), axes))(*args), loop(derivative(plain), axes)(*args))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("axes", [(0, 0), (0, None), (None, 0)])
def test_derivatives_of_what_is_mapped(kind, axes):
    made = KINDS[kind]([])
    args = [v if axis == 0 else v[0] for v, axis in zip((X, Y), axes, strict=True)]

    def total(f):
        return lambda *args: vmap(f, axes)(*args).square().sum()

    same(grad(total(made), (0, 1))(*args), grad(total(plain), (0, 1))(*args))
    same(jacrev(jacrev(total(made)), (0, 1))(*args), jacrev(jacrev(total(plain)), (0, 1))(*args))
    if kind == "jvp":
        same(jvp(vmap(made, axes), tuple(args), tuple(args)), jvp(vmap(plain, axes), tuple(args), tuple(args)))
        same(hessian(total(made))(*args), hessian(total(plain))(*args))


@settings(max_examples=12)
@given(st.sampled_from(["jvp", "vjp"]), st.lists(st.sampled_from(["vmap", "left", "right", "grad", "grad 1"]), max_size=4))
def test_any_nesting_equals_the_loop(kind, steps):
    def nested(g, mapped):
        sizes_x, sizes_y = (), ()
        for number, step in enumerate(steps):
            if step.startswith("grad"):
                g = grad(lambda x, y, g=g: g(x, y).sum(), int(step.endswith("1")))
                continue
            axes = {"vmap": (0, 0), "left": (0, None), "right": (None, 0)}[step]
            g = mapped(g, axes)
            sizes_x += (number + 2,) if axes[0] == 0 else ()
            sizes_y += (number + 2,) if axes[1] == 0 else ()
        return g, sizes_x[::-1], sizes_y[::-1]

    ours, sizes_x, sizes_y = nested(KINDS[kind]([]), vmap)
    x, y = (
        torch.linspace(0, 1, int(np.prod(sizes_x))).reshape(sizes_x),
        torch.linspace(1, 2, int(np.prod(sizes_y))).reshape(sizes_y),
    )
    same(ours(x, y), nested(plain, loop)[0](x, y))


def test_who_is_asked_is_as_in_jax():
    jax = pytest.importorskip("jax")
    x, y = float(X[0]), float(Y[0])
    for ours, theirs, call in [
        (by_vjp, jax.custom_vjp, lambda lib, f: f(lib.one(x), lib.one(y))),
        (by_vjp, jax.custom_vjp, lambda lib, f: lib.grad(f)(lib.one(x), lib.one(y))),
        (by_vjp, jax.custom_vjp, lambda lib, f: lib.grad(lib.grad(f))(lib.one(x), lib.one(y))),
        (by_jvp, jax.custom_jvp, lambda lib, f: lib.jvp(f, (lib.one(x), lib.one(y)), (lib.one(y), lib.one(x)))[1]),
        (by_jvp, jax.custom_jvp, lambda lib, f: lib.hessian(f)(lib.one(x), lib.one(y))),
    ]:
        mine, others = [], []
        torchbatch.one, jax.one = torch.tensor, jax.numpy.asarray
        try:
            value = call(torchbatch, ours(mine))
            other = call(jax, ours(others, jax.numpy, theirs))
        finally:
            del torchbatch.one, jax.one
        assert_close(value, other, rtol=1e-5, dtypes=False)
        assert set(mine) == set(others)


def test_trees_as_in_jax():
    jax = pytest.importorskip("jax")

    def result(lib, array, np_):
        made = (custom_vjp if lib is torchbatch else lib.custom_vjp)(
            lambda tree, n: {"out": (tree["a"] * tree["b"][0], tree["b"][1])}
        )

        def fwd(tree, n):
            return made(tree, n), (tree, n)

        def bwd(residuals, ct):
            tree, _ = residuals
            first, second = ct["out"]
            return {"a": 2 * first * tree["b"][0], "b": (3 * first * tree["a"], None if lib is torchbatch else second * 0)}, None

        made.defvjp(fwd, bwd)

        def loss(tree):
            first, second = made(tree, 3)["out"]
            return first.sum() + second.sum()

        tree = {
            "a": array(np.arange(6.0, dtype=np.float32).reshape(2, 3)),
            "b": (array(np.ones((2, 3), np.float32)), array(np.ones(2, np.float32))),
        }
        return lib.vmap(lib.grad(loss))(tree)

    ours, theirs = result(torchbatch, torch.from_numpy, torch), result(jax, jax.numpy.asarray, jax.numpy)
    for mine, other in zip(torchbatch.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert_close(mine, other, dtypes=False)


def test_numbers_that_plain_differentiation_gets_wrong():
    @custom_jvp
    def log1pexp(x):
        return torch.log(1 + torch.exp(x))

    log1pexp.defjvps(lambda t, out, x: t * torch.sigmoid(x))
    x = torch.tensor([0.0, 100.0])
    assert vmap(grad(lambda x: torch.log(1 + torch.exp(x))))(x).isnan().any()
    same(vmap(grad(log1pexp))(x), torch.tensor([0.5, 1.0]))
    same(vmap(hessian(log1pexp))(x), torch.tensor([0.25, 0.0]))
    same(grad(lambda x: vmap(log1pexp)(x).sum())(x), torch.tensor([0.5, 1.0]))


def test_defjvps():
    made = custom_jvp(lambda x, y: {"p": x * y})
    made.defjvps(None, lambda t, out, x, y: {"p": 10 * t * out["p"]})
    same(jvp(made, (X, Y), (X, Y)), ({"p": X * Y}, {"p": 10 * Y * X * Y}))
    same(grad(lambda x, y: made(x, y)["p"].sum(), (0, 1))(X, Y), (torch.zeros(5), 10 * X * Y))


@pytest.mark.parametrize("kind", KINDS)
def test_autograd_of_pytorch(kind):
    made = KINDS[kind]([])
    for f in (made, vmap(made)):
        x = X.clone().requires_grad_()
        (first,) = torch.autograd.grad(f(x, Y).sum(), x, create_graph=True)
        first.sum().backward()
        same(first.detach(), torch.cos(X) * Y)
        same(x.grad, -torch.sin(X) * Y)
        with torch.no_grad():
            assert not f(x, Y).requires_grad


def test_forward_mode_of_pytorch():
    made = by_jvp([])
    with forward_ad.dual_level():
        for f in (made, vmap(made)):
            same(forward_ad.unpack_dual(f(forward_ad.make_dual(X, Y), Y)).tangent, torch.cos(X) * Y * Y)
        with pytest.raises(GradientTypeError, match="has a rule for reverse mode only"):
            by_vjp([])(forward_ad.make_dual(X, Y), Y)


def test_under_torch_func():
    for kind in KINDS:
        calls = []
        made = KINDS[kind](calls)
        same(torch.func.vmap(torch.func.grad(made))(X, Y), torch.cos(X) * Y)
        assert calls


def test_outside_of_derivatives_the_function_runs_itself():
    for kind in KINDS:
        calls = []
        made = KINDS[kind](calls)
        same(vmap(made)(X, Y), plain(X, Y))
        same(eager_jit(made)(X, Y), plain(X, Y))
        assert calls == []


def test_arguments_that_are_not_differentiated():
    @partial(custom_vjp, nondiff_argnums=(0, 2))
    def apply(f, x, mode):
        return f(x)

    def fwd(f, x, mode):
        assert mode == "double"
        return f(x), x

    def bwd(f, mode, x, ct):
        assert f is torch.sin and mode == "double"
        return (2 * torch.cos(x) * ct,)

    apply.defvjp(fwd, bwd)
    same(vmap(grad(lambda x: apply(torch.sin, x, "double")))(X), 2 * torch.cos(X))

    @partial(custom_jvp, nondiff_argnames="scale")
    def scaled(x, scale):
        return x * scale

    @scaled.defjvp
    def rule(scale, primals, tangents):
        return scaled(*primals, scale), 5 * scale * tangents[0]

    same(vmap(grad(scaled), (0, None))(X, 3.0), torch.full((5,), 15.0))
    same(vmap(grad(scaled))(X, Y), 5 * Y)
    same(vmap(grad(lambda x, s: scaled(x, scale=s)))(X, Y), 5 * Y)


def test_what_is_not_differentiated_must_not_be():
    scaled = custom_jvp(lambda scale, x: x * scale, nondiff_argnums=0)
    scaled.defjvp(lambda scale, primals, tangents: (scaled(scale, *primals), scale * tangents[0]))
    message = "an argument of <lambda> that is listed in nondiff_argnums is differentiated. Take it off the list"
    for call in (
        lambda: vmap(grad(scaled, (0, 1)))(X, Y),
        lambda: jvp(scaled, (X, Y), (X, Y)),
        lambda: jvp(vmap(scaled), (X, Y), (X, Y)),
        lambda: scaled(X.clone().requires_grad_(), Y),
    ):
        with pytest.raises(GradientTypeError, match=message):
            call()
    same(vmap(grad(lambda s, x: scaled(torchbatch.stop_gradient(s), x), (0, 1)))(X, Y), (torch.zeros(5), X))


def test_integers_have_no_derivative():
    made = custom_vjp(lambda x, i: (x[i], i + 1))
    seen = []

    def bwd(residuals, ct):
        seen.append((ct[1].dtype, ct[1].shape))
        x, i = residuals
        return torch.zeros_like(x).index_add(0, i.reshape(1), ct[0].reshape(1)), None

    made.defvjp(lambda x, i: (made(x, i), (x, i)), bwd)
    index = torch.tensor([0, 2, 1])
    same(vmap(grad(lambda x, i: made(x, i)[0]))(X.expand(3, 5), index), torch.nn.functional.one_hot(index, 5).float())
    assert seen == [(torch.bool, ())]

    pair = custom_jvp(lambda x, i: (x * i, i))
    pair.defjvp(lambda primals, tangents: ((primals[0] * primals[1], primals[1]), (7 * tangents[0], tangents[1])))
    same(vmap(grad(lambda x, i: pair(x, i)[0]))(X, torch.arange(5)), torch.full((5,), 7.0))


def test_complex_cotangents_are_those_of_jax():
    jax = pytest.importorskip("jax")
    z = torch.tensor([1 + 2j, -0.5 + 1j])

    def loss(lib, made):
        return lambda z: lib.real(made(z) * (2 + 1j)).sum()

    ours, theirs = custom_vjp(lambda z: z * z), jax.custom_vjp(lambda z: z * z)
    for made in (ours, theirs):
        made.defvjp(lambda z: (z * z, z), lambda z, ct: (2 * z * ct,))
    mine = grad(loss(torch, ours))(z)
    same(mine, grad(loss(torch, lambda z: z * z))(z))
    assert_close(mine.resolve_conj(), jax.grad(loss(jax.numpy, theirs))(z.numpy()), rtol=1e-5, dtypes=False)
    moved = custom_jvp(lambda z: z * z)
    moved.defjvp(lambda primals, tangents: (moved(*primals), 2 * primals[0] * tangents[0]))
    same(grad(loss(torch, moved))(z), mine)


def test_collectives_inside():
    made = custom_vjp(lambda x: x - lax.pmean(x, "i"))
    made.defvjp(lambda x: (made(x), None), lambda _, ct: (ct - lax.pmean(ct, "i"),))
    plain_ = vmap(lambda x: x - lax.pmean(x, "i"), axis_name="i")
    w = torch.arange(5.0)
    same(grad(lambda x: (vmap(made, axis_name="i")(x) * w).sum())(X), grad(lambda x: (plain_(x) * w).sum())(X))


def test_custom_vmap_inside_of_custom_vjp_as_in_jax():
    jax = pytest.importorskip("jax")

    def result(lib, np_, x, y):
        custom_vmap_ = custom_vmap if lib is torchbatch else jax.custom_batching.custom_vmap
        f = custom_vmap_(lambda x, y: np_.sin(x) * y)
        f.def_vmap(lambda axis_size, in_batched, x, y: (np_.cos(x) * y, True))
        outer = lib.custom_vjp(f)
        outer.defvjp(lambda x, y: (f(x, y), (np_.cos(x), np_.sin(x), y)), lambda r, g: (r[0] * g * r[2], r[1] * g))
        return lib.vmap(outer)(x, y), lib.vmap(lib.value_and_grad(outer))(x, y)

    ours = result(torchbatch, torch, X, Y)
    theirs = result(jax, jax.numpy, X.numpy(), Y.numpy())
    for mine, other in zip(torchbatch.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert_close(mine, other, rtol=1e-5, dtypes=False)


def test_outputs_that_are_arguments_or_each_other():
    made = custom_vjp(lambda x: (x, x))
    made.defvjp(lambda x: ((x, x), None), lambda _, ct: (ct[0] + 10 * ct[1],))
    same(vmap(grad(lambda x: sum(made(x))))(X), torch.full((5,), 11.0))
    x = X.clone().requires_grad_()
    sum(made(x)).sum().backward()
    same(x.grad, torch.full((5,), 11.0))


def test_a_shared_output_stays_shared():
    made = custom_vjp(lambda x, y: (x * y, y * 2))
    made.defvjp(lambda x, y: (made(x, y), (x, y)), lambda r, ct: (ct[0] * r[1], ct[0] * r[0] + 2 * ct[1]))

    def loss(y):
        first, second = vmap(made, (0, None), out_axes=(0, None))(X, y)
        assert second.shape == ()
        return first.sum() + second

    same(grad(loss)(Y[0]), X.sum() + 2)


def test_it_pickles_by_name():
    assert pickle.loads(pickle.dumps(NAMED)) is NAMED
    assert repr(NAMED) == "<custom_vjp of NAMED>"


@custom_vjp
def NAMED(x):
    return x


NAMED.defvjp(lambda x: (x, None), lambda _, ct: (2 * ct,))


class Scaled:
    def __init__(self, scale):
        self.scale = scale

    @custom_jvp
    def call(self, x):
        return x * self.scale


def test_a_method_needs_its_object_out_of_the_way():
    with pytest.raises(InputTypeError, match=re.escape("argument self of call is <")):
        Scaled.call.defjvp(lambda primals, tangents: None)
        Scaled(2.0).call(X)


def test_torch_compile_leaves_the_call_to_python():
    torch._dynamo.reset()
    made, x = by_vjp([]), X.clone().requires_grad_()
    run = torch.compile(lambda x, y: vmap(made)(x, y) * 2, backend="eager")
    same(run(X, Y), plain(X, Y) * 2)
    run(x, Y).sum().backward()
    same(x.grad, 2 * torch.cos(X) * Y)


@pytest.mark.xfail(reason="Dynamo cannot go on in the middle of a gradient where a call was left to Python", strict=True)
def test_torch_compile_of_a_gradient():
    torch._dynamo.reset()
    same(torch.compile(vmap(grad(by_vjp([]))), backend="eager")(X, Y), torch.cos(X) * Y)


@pytest.mark.parametrize("kind", KINDS)
def test_with_checkpoint_linearize_and_chunks(kind):
    made = KINDS[kind]([])
    slope = torch.cos(X) * Y
    same(grad(torchbatch.checkpoint(lambda x: vmap(made)(x, Y).sum()))(X), slope)
    same(vmap(grad(torchbatch.checkpoint(made)))(X, Y), slope)
    same(vmap(grad(made), chunk_size=2)(X, Y), slope)
    _, linear = torchbatch.linearize(lambda x: vmap(grad(made))(x, Y), X)
    same(linear(X), -torch.sin(X) * Y * X)


# --- errors ----------------------------------------------------------------------------------------------------------


def test_there_must_be_a_rule():
    with pytest.raises(
        UnsupportedOperationError, match=re.escape("custom_jvp: plain has no rule for its derivative. Give it one with")
    ):
        custom_jvp(plain)(X, Y)
    with pytest.raises(UnsupportedOperationError, match=re.escape("Give it one with plain.defvjp.")):
        custom_vjp(plain)(X, Y)
    with pytest.raises(UnsupportedOperationError, match=re.escape("Give it one with its method defjvp.")):
        custom_jvp(lambda x: x)(X)


def test_a_wrong_result_of_a_rule_is_described():
    made = custom_jvp(torch.sin)
    made.defjvp(lambda primals, tangents: torch.sin(primals[0]))
    with pytest.raises(GradientTypeError, match=re.escape("but it returned float32[] of type Tensor.")):
        grad(made)(torch.tensor(1.0))


def test_forward_mode_of_a_vjp_is_an_error_as_in_jax():
    jax = pytest.importorskip("jax")
    made = by_vjp([])
    message = "custom_vjp: <lambda> has a rule for reverse mode only, but it is differentiated in forward mode"
    for call in (lambda: jvp(made, (X, Y), (X, Y)), lambda: vmap(jacfwd(made))(X, Y), lambda: jvp(vmap(made), (X, Y), (X, Y))):
        with pytest.raises(GradientTypeError, match=message):
            call()
    with pytest.raises(TypeError):
        jax.jvp(by_vjp([], jax.numpy, jax.custom_vjp), (1.0, 1.0), (1.0, 1.0))


@pytest.mark.parametrize(
    ("bwd", "error", "message"),
    [
        (
            lambda r, ct: ct,
            GradientTypeError,
            "must return a tuple with one cotangent for each of its 2 differentiated argument(s)",
        ),
        (lambda r, ct: (ct,), GradientTypeError, "but it returned 1 values."),
        (lambda r, ct: ((ct,), ct), GradientTypeError, "a cotangent with the structure of argument x, or None, but it returned"),
        (lambda r, ct: (ct, ct.reshape(1)), GradientValueError, "and dtype of argument y, float32[], but it is float32[1]."),
        (lambda r, ct: (ct, "a"), GradientTypeError, "custom_vjp: the cotangent of y is 'a' of type str"),
    ],
)
def test_what_bwd_must_return(bwd, error, message):
    made = custom_vjp(lambda x, y: x * y)
    made.defvjp(lambda x, y: (x * y, None), bwd)
    with pytest.raises(error, match=re.escape(message)):
        grad(made)(X[0], Y[0])


@pytest.mark.parametrize(
    ("result", "error", "message"),
    [
        (lambda x, t: x, GradientTypeError, "must return a pair (output, tangent), but it returned"),
        (lambda x, t: (x, (t,)), GradientTypeError, "a tangent with the structure of the output, but it is"),
        (lambda x, t: (x, t.reshape(1)), GradientTypeError, "but it is float32[1] for float32[]."),
        (lambda x, t: (x, t.double()), GradientTypeError, "but it is float64[] for float32[]."),
        (lambda x, t: (x, "a"), GradientTypeError, "leaf 0 of the tangent of <lambda> is 'a' of type str"),
    ],
)
def test_what_a_jvp_must_return(result, error, message):
    made = custom_jvp(lambda x: x)
    made.defjvp(lambda primals, tangents: result(*primals, *tangents))
    with pytest.raises(error, match=re.escape(message)):
        jvp(made, (X[0],), (X[0],))


def test_other_errors():
    made = by_vjp([])
    with pytest.raises(GradientTypeError, match="custom_vjp expects a function"):
        custom_vjp(3)
    with pytest.raises(GradientValueError, match="symbolic_zeros must be False"):
        made.defvjp(plain, plain, symbolic_zeros=True)
    with pytest.raises(GradientValueError, match="symbolic_zeros must be False"):
        by_jvp([]).defjvp(plain, symbolic_zeros=True)
    with pytest.raises(GradientValueError, match="nondiff_argnames has 'z', but plain has no such positional argument"):
        custom_vjp(plain, nondiff_argnames=("z",))
    with pytest.raises(GradientTypeError, match=re.escape("defjvps does not go with nondiff_argnums")):
        custom_jvp(plain, nondiff_argnums=0).defjvps(None)
    with pytest.raises(InputTypeError, match=re.escape("argument y of <lambda> is 'a' of type str, which is not an array. List")):
        made(X, "a")
    three = custom_vjp(lambda x: x)
    three.defvjp(lambda x: x, lambda r, ct: (ct,))
    with pytest.raises(GradientTypeError, match=re.escape("fwd of <lambda> must return a pair (output, residuals)")):
        grad(three)(X[0])


def test_closing_over_what_is_differentiated_is_an_error():
    def outer(x, y):
        made = custom_jvp(lambda y: x * y)
        made.defjvps(lambda t, out, y: x * t)
        return made(y)

    message = re.escape("closes over a value that a transform around it maps or differentiates. Pass that value as an argument.")
    with pytest.raises(UnsupportedOperationError, match=message):
        grad(outer, (0, 1))(X[0], Y[0])
    with pytest.raises(UnsupportedOperationError, match=message):
        vmap(grad(lambda x, y: outer(x, y)))(X, Y)
    with pytest.raises(UnsupportedOperationError, match=message):
        outer(X.clone().requires_grad_(), Y.clone().requires_grad_())
    same(outer(X, Y), X * Y)
    same(vmap(outer)(X, Y), X * Y)


def test_a_python_number_keeps_its_digits():
    @custom_jvp
    def scaled(x, a):
        return x * a

    scaled.defjvp(lambda primals, tangents: (scaled(*primals), tangents[0] * primals[1] + primals[0] * tangents[1]))
    one = torch.ones((), dtype=torch.float64)
    assert scaled(one, 0.1).item() == 0.1
    assert grad(lambda x: scaled(x, 0.1))(one).item() == 0.1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_python_number_does_not_promote_single_numbers(dtype):
    made = custom_jvp(lambda x, a: x * a + 1)
    made.defjvp(lambda primals, tangents: (made(*primals), tangents[0] * primals[1] + primals[0] * tangents[1]))
    x = torch.ones(3, dtype=dtype)
    found = [made(x[0], 0.1), vmap(lambda x: made(x, 0.1))(x), vmap(grad(lambda x: made(x, 0.1)))(x)]
    assert [value.dtype for value in found] == [dtype] * 3
    same(found[0], x[0] * 0.1 + 1)
    jax = pytest.importorskip("jax")
    theirs = jax.custom_jvp(lambda x, a: x * a + 1)
    theirs.defjvp(lambda primals, tangents: (theirs(*primals), tangents[0] * primals[1] + primals[0] * tangents[1]))
    if dtype is torch.float16:
        assert jax.vmap(lambda x: theirs(x, 0.1))(x.numpy()).dtype == np.float16


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.complex64, torch.int64, torch.bool])
def test_a_cotangent_of_another_dtype_is_an_error(dtype):
    made = custom_vjp(lambda x: x * 2)
    made.defvjp(lambda x: (x * 2, None), lambda _, ct: (torch.ones(3, dtype=dtype),))
    name = str(dtype).removeprefix("torch.")
    message = f"must return a cotangent of the shape and dtype of argument x, float32[3], but it is {name}[3]"
    with pytest.raises(GradientValueError, match=re.escape(message)):
        grad(lambda x: made(torch.sin(x)).sum())(X[:3])
    jax = pytest.importorskip("jax")
    theirs = jax.custom_vjp(lambda x: x * 2)
    theirs.defvjp(lambda x: (x * 2, None), lambda _, ct: (np.ones(3, "float16"),))
    with pytest.raises(TypeError):
        jax.grad(lambda x: theirs(jax.numpy.sin(x)).sum())(X[:3].numpy())


def test_a_number_is_a_cotangent_of_a_number():
    made = custom_vjp(lambda x: x * 2)
    made.defvjp(lambda x: (x * 2, None), lambda _, ct: (3.0,))
    for dtype in (torch.float16, torch.float64):
        found = grad(made)(torch.ones((), dtype=dtype))
        assert found.dtype is dtype and found == 3


@pytest.mark.parametrize("kind", [custom_jvp, custom_vjp])
@pytest.mark.parametrize("reach", ["closure", "argument", "method", "deep"])
def test_closing_over_a_module_is_an_error_where_its_parameters_are_differentiated(kind, reach):
    """Their gradients would be lost."""
    net = torch.nn.Linear(3, 3)

    class Holder:
        def __init__(self):
            self.nets = {"one": [net]}

        def run(self, x):
            return self.nets["one"][0](x)

    holder = Holder()
    call = {"closure": net, "method": holder.run, "deep": lambda x: holder.run(x)}.get(reach)
    if reach == "argument":
        made = kind(lambda f, x: f(x), nondiff_argnums=0)
        if kind is custom_jvp:
            made.defjvp(lambda f, primals, tangents: (f(*primals), f.weight @ tangents[0]))
        else:
            made.defvjp(lambda f, x: (f(x), None), lambda f, _, ct: (f.weight.T @ ct,))
        function = partial(made, net)
    else:
        made = function = kind(lambda x: call(x))
        if kind is custom_jvp:
            made.defjvp(lambda primals, tangents: (call(*primals), net.weight @ tangents[0]))
        else:
            made.defvjp(lambda x: (call(x), None), lambda _, ct: (net.weight.T @ ct,))
    x = X[:3]
    with pytest.raises(UnsupportedOperationError, match="closes over a value that a transform around it maps or differentiates"):
        function(x.clone().requires_grad_()).sum().backward()
    with pytest.raises(UnsupportedOperationError, match="closes over a value"):
        function(x)
    with torch.no_grad():
        same(function(x), net(x))
    net.requires_grad_(False)
    same(grad(lambda x: function(x).sum())(x), net.weight.sum(0))
    leaf = x.clone().requires_grad_()
    function(leaf).sum().backward()
    same(leaf.grad, net.weight.sum(0))
