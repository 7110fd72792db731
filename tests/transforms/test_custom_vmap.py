"""custom_vmap and sequential_vmap: against the loop and live JAX, in every order with other transforms."""

from __future__ import annotations

import pickle
import re
from functools import partial

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

import torchbatch
from torchbatch import custom_vmap, grad, hessian, jacfwd, jacrev, jit, jvp, lax, sequential_vmap, vmap
from torchbatch.errors import AxisError, AxisNameError, AxisSpecError, InputTypeError, OutputTypeError, UnsupportedOperationError
from torchbatch.testing import assert_close, loop

X, Y = torch.linspace(-1, 2, 5), torch.linspace(0.5, 2, 5)
eager_jit = partial(jit, backend="eager")


def plain(x, y):
    return torch.sin(x) * y


def described(calls):
    """``plain`` with a rule that notes how it is called."""
    made = custom_vmap(plain)

    @made.def_vmap
    def rule(axis_size, in_batched, x, y):
        calls.append((axis_size, in_batched, tuple(x.shape), tuple(y.shape)))
        return vmap(plain, [0 if flag else None for flag in in_batched])(x, y), True

    return made


@pytest.fixture
def calls():
    return []


@pytest.fixture
def f(calls):
    return described(calls)


def same(ours, theirs):
    assert_close(ours, theirs)


def test_without_vmap_the_function_runs_itself(f, calls):
    same(f(X, Y), plain(X, Y))
    same(grad(f)(X[0], Y[0]), torch.cos(X[0]) * Y[0])
    assert calls == []


@pytest.mark.parametrize(("axes", "flags"), [((0, 0), [True, True]), ((0, None), [True, False]), ((None, 0), [False, True])])
def test_the_rule_sees_what_is_batched(f, calls, axes, flags):
    args = [v if axis == 0 else v[0] for v, axis in zip((X, Y), axes, strict=True)]
    same(vmap(f, axes)(*args), loop(plain, axes)(*args))
    assert calls == [(5, flags, *(tuple(arg.shape) for arg in args))]


def test_the_rule_gets_the_samples_along_the_first_axis(f, calls):
    x = torch.randn(3, 2, 5)
    same(vmap(f, in_axes=(2, None), out_axes=1)(x, Y[0]), loop(plain, in_axes=(2, None), out_axes=1)(x, Y[0]))
    assert calls[0][2] == (5, 3, 2)


def test_the_rule_of_jax_gets_the_same():
    jax = pytest.importorskip("jax")

    def seen(lib, array):
        calls = []
        made = (custom_vmap if lib is torch else jax.custom_batching.custom_vmap)(
            lambda tree, y: (tree["a"] * y, tree["b"][0] + 1)
        )

        @made.def_vmap
        def rule(axis_size, in_batched, tree, y):
            calls.append((axis_size, in_batched, tuple(tree["a"].shape), tuple(tree["b"][0].shape), tuple(y.shape)))
            return (tree["a"] * y.reshape(-1, 1), tree["b"][0] + 1), (True, in_batched[0]["b"][0])

        v = vmap if lib is torch else jax.vmap
        args = (
            {"a": array(np.ones((4, 3, 2), np.float32)), "b": (array(np.arange(3.0, dtype=np.float32)),)},
            array(np.ones(4, np.float32)),
        )
        out = v(v(made, in_axes=({"a": 0, "b": (0,)}, None), out_axes=(0, 0)), in_axes=({"a": 0, "b": (None,)}, 0))(*args)
        return calls, [np.asarray(leaf) for leaf in out]

    ours, theirs = seen(torch, torch.from_numpy), seen(jax, jax.numpy.asarray)
    assert ours[0] == theirs[0]
    for mine, other in zip(ours[1], theirs[1], strict=True):
        assert_close(mine, other, dtypes=False)


@pytest.mark.parametrize("run", [lambda f: f, eager_jit], ids=["eager", "jit"])
@pytest.mark.parametrize("axes", [(0, 0), (0, None), (None, 0)])
def test_derivatives_inside_and_outside(f, run, axes):
    args = [v if axis == 0 else v[0] for v, axis in zip((X, Y), axes, strict=True)]
    for derivative in (
        lambda g: grad(g, (0, 1)),
        lambda g: lambda x, y: jvp(g, (x, y), (y, x)),
        lambda g: hessian(g, (0, 1)),
        lambda g: grad(grad(g), 1),
        lambda g: jacfwd(jacfwd(g)),
        lambda g: jacrev(jacrev(g), 1),
    ):
        same(run(vmap(derivative(f), axes))(*args), loop(derivative(plain), axes)(*args))
    for derivative in (lambda g: jacrev(g, (0, 1)), lambda g: jacfwd(g, (0, 1)), lambda g: hessian(lambda *a: g(*a).sum())):
        same(run(derivative(vmap(f, axes)))(*args), derivative(loop(plain, axes))(*args))


@settings(max_examples=15)
@given(st.lists(st.sampled_from(["vmap", "left", "right", "grad"]), min_size=1, max_size=4))
def test_any_nesting_equals_the_loop(steps):
    def nested(g, mapped):
        sizes_x, sizes_y = (), ()
        for number, step in enumerate(steps):
            axes = {"vmap": (0, 0), "left": (0, None), "right": (None, 0)}.get(step)
            if axes is None:
                inner = g
                g = grad(lambda x, y, inner=inner: inner(x, y).sum(), (0, 1)) if number == 0 else g
                g = g if number else (lambda x, y, inner=g: sum(inner(x, y)))
                continue
            g = mapped(g, axes)
            sizes_x += (number + 2,) if axes[0] == 0 else ()
            sizes_y += (number + 2,) if axes[1] == 0 else ()
        return g, sizes_x[::-1], sizes_y[::-1]

    ours, sizes_x, sizes_y = nested(described([]), vmap)
    expected = nested(plain, loop)[0]
    x, y = (
        torch.linspace(0, 1, int(np.prod(sizes_x))).reshape(sizes_x),
        torch.linspace(1, 2, int(np.prod(sizes_y))).reshape(sizes_y),
    )
    same(ours(x, y), expected(x, y))


def test_autograd_of_pytorch(f):
    x = X.clone().requires_grad_()
    vmap(f)(x, Y).sum().backward()
    same(x.grad, torch.cos(X) * Y)
    x.grad = None
    vmap(grad(f))(x, Y).sum().backward()
    same(x.grad, -torch.sin(X) * Y)


def test_under_torch_func(f, calls):
    same(torch.func.vmap(torch.func.grad(f))(X, Y), torch.cos(X) * Y)
    assert all(call[0] == 5 for call in calls) and calls


def test_a_rule_that_calls_the_function_is_asked_again():
    seen = []

    @custom_vmap
    def g(x):
        return x.sum()

    @g.def_vmap
    def rule(axis_size, in_batched, x):
        seen.append(axis_size)
        return torch.stack([g(row) for row in x]), True

    same(vmap(vmap(g))(torch.ones(2, 3, 4)), torch.full((2, 3), 4.0))
    assert seen == [3, 2, 2, 2]


def test_an_output_may_be_shared():
    @custom_vmap
    def g(x):
        return x + 1, torch.tensor(7.0)

    @g.def_vmap
    def rule(axis_size, in_batched, x):
        return (x + 1, torch.tensor(7.0)), (True, False)

    assert vmap(g, out_axes=(0, None))(X)[1].shape == ()
    same(vmap(g)(X)[1], torch.full((5,), 7.0))
    same(vmap(grad(lambda x: sum(g(x))))(X), torch.ones(5))


def test_integers_and_objects_go_along():
    @custom_vmap
    def g(x, index, mode):
        return x[index] if mode == "pick" else x.sum()

    @g.def_vmap
    def rule(axis_size, in_batched, x, index, mode):
        assert in_batched == [True, True, False] and mode == "pick"
        return x[torch.arange(axis_size), index], True

    x, index = torch.randn(4, 3), torch.tensor([0, 2, 1, 1])
    same(vmap(g, (0, 0, None))(x, index, "pick"), x[range(4), index])
    same(vmap(grad(g), (0, 0, None))(x, index, "pick"), torch.nn.functional.one_hot(index, 3).float())


def test_keyword_arguments_and_defaults_are_given_by_position(f, calls):
    same(vmap(lambda x, y: f(y=y, x=x))(X, Y), plain(X, Y))
    assert calls[0][1] == [True, True]

    @custom_vmap
    def g(x, scale=2.0):
        return x * scale

    seen = []

    @g.def_vmap
    def rule(axis_size, in_batched, x, scale):
        seen.append((in_batched, scale))
        return x * scale, True

    same(vmap(g)(X), 2 * X)
    assert seen == [([True, False], 2.0)]


def test_the_name_of_the_axis_is_not_in_scope_in_the_rule():
    made = custom_vmap(lambda x: lax.psum(x, "i"))
    made.def_vmap(lambda axis_size, in_batched, x: (x * lax.axis_size("i"), True))
    with pytest.raises(AxisNameError):
        vmap(made, axis_name="i")(X)
    again = custom_vmap(lambda x: x)
    again.def_vmap(lambda axis_size, in_batched, x: (x * lax.axis_size("o"), True))
    same(vmap(vmap(again, axis_name="i"), axis_name="o")(torch.ones(2, 3)), torch.full((2, 3), 2.0))


def test_a_rule_may_write_into_tensors_that_it_makes():
    made = custom_vmap(lambda x: x * 2)

    @made.def_vmap
    def rule(axis_size, in_batched, x):
        out = torch.zeros(axis_size)
        for i in range(axis_size):
            out[i] = 2 * x[i]
        return out, True

    x = torch.randn(2, 3)
    same(vmap(vmap(made))(x), 2 * x)


def test_an_empty_batch(f):
    assert vmap(f)(torch.ones(0), torch.ones(0)).shape == (0,)


def test_it_pickles_by_name_and_keeps_its_name(f):
    assert pickle.loads(pickle.dumps(NAMED)) is NAMED
    assert (NAMED.__name__, NAMED.__doc__, repr(NAMED)) == ("NAMED", "Of one sample.", "<custom_vmap of NAMED>")


@custom_vmap
def NAMED(x):
    """Of one sample."""
    return x


# --- sample by sample ------------------------------------------------------------------------------------------------


def halvings(x):
    count = 0
    while x > 1:
        x, count = x / 2, count + 1
    return {"count": torch.tensor(count), "rest": x}


def test_sequential():
    made, x = sequential_vmap(halvings), torch.tensor([[1.0, 2.0, 9.0], [3.0, 0.5, 70.0]])
    same(vmap(made)(x[0]), loop(halvings)(x[0]))
    same(vmap(vmap(made))(x[:1]), loop(loop(halvings))(x[:1]))
    same(vmap(grad(lambda x: made(x)["rest"]))(x[0]), torch.tensor([1.0, 0.5, 1 / 16]))
    same(grad(lambda x: vmap(made)(x)["rest"].sum())(x[0]), torch.tensor([1.0, 0.5, 1 / 16]))
    assert vmap(made)(torch.ones(0))["rest"].shape == (0,)


def test_sequential_runs_once_per_sample_as_in_jax():
    jax = pytest.importorskip("jax")
    seen = []
    made = sequential_vmap(lambda x, y: (seen.append(1), x.sum() * y)[1])
    x = torch.randn(4, 3)
    ours = vmap(made, (0, None))(x, torch.tensor(2.0))
    theirs = jax.vmap(jax.custom_batching.sequential_vmap(lambda x, y: x.sum() * y), (0, None))(x.numpy(), 2.0)
    assert_close(ours, theirs, rtol=1e-5, dtypes=False)
    assert len(seen) == 4


# --- torch.compile ---------------------------------------------------------------------------------------------------


def test_torch_compile_leaves_the_call_to_python():
    def make():
        made = custom_vmap(lambda x: x * 2)
        made.def_vmap(lambda axis_size, in_batched, x: (x * 3, True))  # another value, to see who was asked
        return made

    made = make()
    torch._dynamo.reset()
    same(torch.compile(lambda x: made(x) + 1, backend="eager")(X), 2 * X + 1)
    same(torch.compile(lambda x: vmap(made)(x) + 1, backend="eager")(X), 3 * X + 1)
    same(torch.compile(vmap(made), backend="eager")(X), 3 * X)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="_hidden"):
        torch.compile(lambda x: vmap(made)(x) + 1, backend="eager", fullgraph=True)(X)


# --- errors ----------------------------------------------------------------------------------------------------------


def test_there_must_be_a_rule():
    with pytest.raises(
        UnsupportedOperationError, match=re.escape("custom_vmap: plain has no rule. Give it one: @plain.def_vmap.")
    ):
        custom_vmap(plain)(X, Y)
    with pytest.raises(UnsupportedOperationError, match=re.escape("<lambda> has no rule. Give it one with its method def_vmap.")):
        custom_vmap(lambda x: x)(X)


@pytest.mark.parametrize(
    ("result", "error", "message"),
    [
        (lambda x: x, OutputTypeError, "the rule of <lambda> must return a pair (output, out_batched), but it returned"),
        (lambda x: (x, [True]), AxisError, "its output is True with True for each array, and out_batched is [True]."),
        (lambda x: (x, 0), AxisError, "and out_batched is 0."),
        (lambda x: (x[:2], True), AxisError, "its axis 0 must have size 5, but it is float32[2]."),
        (lambda x: (x.sum(), True), AxisError, "its axis 0 must have size 5, but it is float32[]."),
        (lambda x: ("a", True), OutputTypeError, "the rule of <lambda> must return arrays, but output is 'a' of type str."),
    ],
)
def test_what_a_rule_must_return(result, error, message):
    made = custom_vmap(lambda x: x)
    made.def_vmap(lambda axis_size, in_batched, x: result(x))
    with pytest.raises(error, match=re.escape(message)):
        vmap(made)(X)


def test_other_errors(f):
    with pytest.raises(AxisSpecError, match="custom_vmap takes a function, but it got 3"):
        custom_vmap(3)
    with pytest.raises(AxisSpecError, match="sequential_vmap takes a function, but it got 3"):
        sequential_vmap(3)
    with pytest.raises(AxisSpecError, match="def_vmap takes a function, but it got 3"):
        f.def_vmap(3)
    with pytest.raises(
        InputTypeError, match="plain was called with arguments that do not fit it: missing a required argument: 'y'"
    ):
        f(X)
    only = custom_vmap(lambda x, *, y: x)
    only.def_vmap(lambda axis_size, in_batched, x: (x, True))
    with pytest.raises(InputTypeError, match="'y' can be given by keyword only"):
        only(X, y=1)


def test_closing_over_a_value_of_a_transform_is_an_error():
    def outer(x, y):
        made = custom_vmap(lambda y: x * y)
        made.def_vmap(lambda axis_size, in_batched, y: (x * y, True))
        return made(y)

    message = "closes over a value that a transform around it maps or differentiates. Pass that value as an argument."
    with pytest.raises(UnsupportedOperationError, match=re.escape(message)):
        vmap(outer)(X, Y)
    with pytest.raises(UnsupportedOperationError, match=re.escape(message)):
        vmap(lambda x, y: grad(lambda x: outer(x, y))(x), (None, 0))(X[0], Y)


def test_an_error_in_the_rule_leaves_no_level_open(f):
    made = custom_vmap(lambda x: x)

    @made.def_vmap
    def rule(axis_size, in_batched, x):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        vmap(vmap(made, axis_name="i"), axis_name="o")(torch.ones(2, 3))
    assert torchbatch._torch.levels.depth() == 0
    same(vmap(f)(X, Y), plain(X, Y))


def test_tangents_are_told_apart_from_values():
    """A mapped argument comes before an unmapped one with an unmapped tangent."""

    @custom_vmap
    def f(x, y, z):
        return x * y * z

    seen = []

    @f.def_vmap
    def rule(size, batched, x, y, z):
        seen.append(list(batched))
        return x * y * z, True

    one, x = torch.tensor(1.0), torch.tensor([1.0, 2.0])
    primal, tangent = vmap(lambda x, t: jvp(f, (x, one, one), (x, one, t)))(x, 2 * x)
    assert_close(primal, x)
    assert_close(tangent, x + x + x * 2 * x)


@pytest.mark.parametrize(
    ("fun", "text"),
    [
        (lambda x: {"a": x} if x > 0 else {"b": x}, "{'a': float32[]} for sample 0 and {'b': float32[]} for sample 2"),
        (lambda x: (x, x) if x > 0 else [x, x], "(float32[], float32[]) for sample 0 and [float32[], float32[]] for sample 2"),
        (lambda x: x if x > 0 else x.double(), "float32[] for sample 0 and float64[] for sample 2"),
        (lambda x: x if x > 0 else x[None], "float32[] for sample 0 and float32[1] for sample 2"),
        (lambda x: x if x > 0 else (x, None), "float32[] for sample 0 and (float32[], None) for sample 2"),
        (lambda x: (x, x) if x > 0 else (x,), "(float32[], float32[]) for sample 0 and (float32[],) for sample 2"),
    ],
)
def test_sequential_samples_must_be_alike(fun, text):
    message = f"must return the same tree of the same shapes and dtypes for every sample, but it returned {text}."
    with pytest.raises(OutputTypeError, match=re.escape(message)):
        vmap(sequential_vmap(fun))(torch.tensor([1.0, 2.0, -1.0]))
