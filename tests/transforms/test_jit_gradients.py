"""jit and autograd: gradients of inputs and captured tensors are those of the plain function."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.utils.checkpoint

import torchbatch
from torchbatch import grad, jit, vmap
from torchbatch.core import tree
from torchbatch.errors import InPlaceError, UnsupportedOperationError
from torchbatch.testing import assert_close

replayed = functools.partial(jit, backend="eager")
BOTH = pytest.mark.parametrize("backend", ["eager", "inductor"])


def numbers(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


class Fake(torch.autograd.Function):
    """A backward that is not the derivative of the forward."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * 2

    @staticmethod
    def backward(ctx, tangent):
        return tangent * 100 * ctx.saved_tensors[0]


def no_grad_inside(x, w):
    with torch.no_grad():
        scale = (x * w).sum()
    return x * scale


def derivative_inside(x, w):
    (found,) = torch.autograd.grad((x**3 * w).sum(), x, create_graph=True)
    return found * w


def in_place_inside(x, w):
    out = torch.zeros(2, 3)
    out[0] = x * w
    out[1] = 3
    out += x
    return out.mul_(w)


FUNCTIONS = {
    "sum": lambda x, w: (x * w).sum(),
    "many": lambda x, w: ({"a": x * w}, (x + w, x.sin())),
    "one is used": lambda x, w: x * 2,
    "integers beside": lambda x, w: (x * w).max(0),
    "a comparison beside": lambda x, w: (x > w, x * w),
    "a constant beside": lambda x, w: (torch.ones(2), x * w, 3),
    "an output twice": lambda x, w: (x * w,) * 2,
    "the input itself": lambda x, w: (x, x * w),
    "a view of the input": lambda x, w: (x[1:], w.unsqueeze(0)),
    "detach": lambda x, w: x.detach() * w,
    "an output and itself detached": lambda x, w: (lambda y: (y, y.detach()))(x * w),
    "an output and a detached view": lambda x, w: (lambda y: (y, y.detach()[1:]))(x * w),
    "no_grad": no_grad_inside,
    "autograd.Function": lambda x, w: Fake.apply(x) * w,
    "autograd.grad": derivative_inside,
    "torchbatch.grad": lambda x, w: grad(lambda x: (x**3 * w).sum())(x),
    "vmap": lambda x, w: vmap(lambda x: x * w)(x),
    "in place": in_place_inside,
    "checkpoint": lambda x, w: torchbatch.checkpoint(lambda x: (x.sin() * w).sin())(x),
    "PyTorch's checkpoint": lambda x, w: torch.utils.checkpoint.checkpoint(
        lambda x: (x.sin() * w).sin(), x, use_reentrant=False
    ),
    "complex inside": lambda x, w: torch.fft.fft(torch.complex(x, w)).abs(),
    "a hook inside": lambda x, w: hooked(x * w) * 2,
    "transposed": lambda x, w: torch.outer(x, w).t(),
    "stacked": lambda x, w: torch.stack([x, w]).softmax(0)[:, ::2],
}


def hooked(value):
    if value.requires_grad:
        value.register_hook(lambda tangent: tangent * 5)
    return value


def leaves(value):
    return [torch.as_tensor(leaf) for leaf in tree.flatten(value)[0]]


def outputs_and_gradients(fun, *inputs):
    outputs = leaves(fun(*inputs))
    wanted = [value for value in outputs if value.requires_grad]
    tangents = [numbers(*value.shape, seed=i) for i, value in enumerate(wanted)]
    found = torch.autograd.grad(wanted, inputs, tangents, allow_unused=True, materialize_grads=True)
    return [value.detach() for value in outputs], [value.requires_grad for value in outputs], found


@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradients_of_inputs(name):
    fun = FUNCTIONS[name]
    x, w = numbers(3).requires_grad_(), numbers(3, seed=1).requires_grad_()
    got, want = outputs_and_gradients(replayed(fun), x, w), outputs_and_gradients(fun, x, w)
    assert_close(got[0], want[0])
    assert got[1] == want[1]
    assert_close(got[2], want[2])


@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradients_of_captured_tensors(name):
    fun = FUNCTIONS[name]
    x, w = numbers(3).requires_grad_(), numbers(3, seed=1).requires_grad_()
    jitted = replayed(lambda: fun(x, w))
    got = outputs_and_gradients(lambda x, w: jitted(), x, w)
    want = outputs_and_gradients(fun, x, w)
    assert got[1] == want[1]
    assert_close((got[0], got[2]), (want[0], want[2]))


@pytest.mark.parametrize("name", ["many", "integers beside", "an output and itself detached", "in place", "transposed"])
def test_gradients_compiled_by_inductor(name):
    fun = FUNCTIONS[name]
    x, w = numbers(3).requires_grad_(), numbers(3, seed=1).requires_grad_()
    jitted = jit(lambda x: fun(x, w))
    got = outputs_and_gradients(lambda x, w: jitted(x), x, w)
    want = outputs_and_gradients(fun, x, w)
    assert got[1] == want[1]
    assert_close((got[0], got[2]), (want[0], want[2]))


def test_only_some_inputs_require_a_gradient():
    x, w = numbers(3), numbers(3, seed=1).requires_grad_()
    replayed(lambda x, w: (x * w).sum())(x, w).backward()
    assert torch.equal(w.grad, x) and x.grad is None


@BOTH
def test_backward_twice(backend):
    x = numbers(3).requires_grad_()
    y = jit(lambda x: (x.sin() * x).sum(), backend=backend)(x)
    y.backward(retain_graph=True)
    first, x.grad = x.grad, None
    y.backward()
    assert_close(x.grad, first)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        y.backward()


@BOTH
def test_tangents_of_any_layout(backend):
    x = numbers(2, 3).requires_grad_()
    jitted = jit(lambda x: x.sin() * 2, backend=backend)
    negated = torch.complex(numbers(2, 3), numbers(2, 3, seed=4)).conj().imag
    for tangent in (torch.ones(()).expand(2, 3), numbers(3, 2).t(), negated, torch.ones(4, 6)[::2, ::2]):
        assert_close(
            torch.autograd.grad(jitted(x), x, tangent), torch.autograd.grad(x.sin() * 2, x, tangent)
        )


def test_tangents_that_are_missing():
    x = numbers(3).requires_grad_()
    _a, b = replayed(lambda x: (x * 2, x * 3))(x)
    b.sum().backward()
    assert torch.equal(x.grad, torch.full((3,), 3.0))


def test_gradient_flows_through_non_leaf_inputs():
    leaf = numbers(3).requires_grad_()
    inner = leaf * 2
    replayed(lambda x: (x**2).sum())(inner).backward()
    assert_close(leaf.grad, 8 * leaf)


def test_one_tensor_as_two_arguments():
    x = numbers(3).requires_grad_()
    replayed(lambda a, b: (a * b).sum())(x, x).backward()
    assert_close(x.grad, 2 * x)


def test_jit_functions_in_a_row():
    x = numbers(3).requires_grad_()
    square = replayed(lambda x: x**2)
    square(square(x)).sum().backward()
    assert_close(x.grad, 4 * x**3)


def test_call_under_no_grad():
    x = numbers(3).requires_grad_()
    jitted = replayed(lambda x: x * 2)
    with torch.no_grad():
        assert not jitted(x).requires_grad
    jitted(x).sum().backward()
    assert torch.equal(x.grad, torch.full((3,), 2.0))


def test_enable_grad_inside_a_call_under_no_grad():
    w = numbers(3).requires_grad_()

    def fun(x):
        with torch.enable_grad():
            value = (x * w**2).sum()
        return torch.autograd.grad(value, w)[0]

    with torch.no_grad():
        assert_close(replayed(fun)(torch.ones(3)), 2 * w)


@BOTH
def test_complex_gradients(backend):
    fun = lambda z, w: (z * w + z.conj() * 2).abs().sum()  # noqa: E731
    z = numbers(3, dtype=torch.complex64).requires_grad_()
    w = numbers(3, seed=1, dtype=torch.complex64).requires_grad_()
    got = torch.autograd.grad(jit(fun, backend=backend)(z, w), (z, w))
    assert_close(got, torch.autograd.grad(fun(z, w), (z, w)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes_of_gradients(dtype):
    x = numbers(3, dtype=dtype).requires_grad_()
    replayed(lambda x: (x * 2).float().sum())(x).backward()
    assert x.grad.dtype == dtype and torch.equal(x.grad, torch.full((3,), 2.0, dtype=dtype))


def test_hooks_on_results_and_inputs():
    seen = []
    x = numbers(3).requires_grad_()
    x.register_hook(lambda tangent: seen.append("input") or tangent * 2)
    y = replayed(lambda x: x * 3)(x)
    y.register_hook(lambda tangent: seen.append("result") or tangent * 10)
    y.sum().backward()
    assert seen == ["result", "input"] and torch.equal(x.grad, torch.full((3,), 60.0))


@pytest.mark.parametrize("is_leaf", [True, False])
def test_hook_on_a_captured_tensor_runs_once(is_leaf):
    seen = []
    leaf = numbers(3).requires_grad_()
    w = leaf if is_leaf else leaf * 1
    w.register_hook(lambda tangent: seen.append(1) or tangent * 2)
    jitted = replayed(lambda x: (x * w).sum())
    value = jitted(torch.ones(3))
    assert seen == [], "tracing runs no hooks of tensors from outside"
    value.backward()
    assert torch.equal(leaf.grad, torch.full((3,), 2.0)) and len(seen) == 1


def test_tracing_leaves_no_gradient_behind():
    w = numbers(3).requires_grad_()
    inner = w * 2
    inner.retain_grad()
    replayed(lambda x: (x * inner).sum())(torch.ones(3))
    assert w.grad is None and inner.grad is None


def test_retained_gradient_of_a_captured_non_leaf():
    w = numbers(3).requires_grad_()
    inner = w * 2
    inner.retain_grad()
    replayed(lambda x: (x * inner).sum())(torch.ones(3)).backward()
    assert type(inner.grad) is torch.Tensor and torch.equal(inner.grad, torch.ones(3))


# A second derivative


SECOND = {
    "of a square": lambda x: (x**2).sum(),
    "of what keeps results": lambda x: (x * 2).exp().sum(),
    "linear": lambda x: x * 2,
}


@pytest.mark.parametrize("name", SECOND)
def test_second_derivative_says_what_to_do(name):
    x = numbers(3).requires_grad_()
    value = replayed(SECOND[name])(x)
    (first,) = torch.autograd.grad((value**2).sum(), x, create_graph=True)
    with pytest.raises(UnsupportedOperationError, match="differentiated a second time by autograd") as raised:
        (value.sum() + first.pow(2).sum()).backward()
    assert "jit(lambda x: torchbatch.grad(f)(x)" in str(raised.value)


def test_create_graph_alone_is_no_error():
    x = numbers(3).requires_grad_()
    (first,) = torch.autograd.grad(replayed(lambda x: (x**2).sum())(x), x, create_graph=True)
    assert_close(first.detach(), 2 * x.detach())


def test_second_derivative_inside():
    x = numbers(3).requires_grad_()
    replayed(lambda x: (grad(lambda x: (x**3).sum())(x) ** 2).sum())(x).backward()
    assert_close(x.grad, 36 * x**3)


# What changes between the forward and the backward pass


@BOTH
@pytest.mark.parametrize("what", ["the result", "a view of the result", "a captured tensor", "an argument"])
def test_overwritten_values_are_noticed(backend, what):
    x, w, v = numbers(3).requires_grad_(), numbers(3, seed=1), numbers(3, seed=2)
    fun = (lambda x, v: (x * w * v).exp().reshape(3, 1)) if what == "a view of the result" else lambda x, v: (x * w * v).exp()
    result = jit(fun, backend=backend)(x, v)
    with torch.no_grad():
        {"a captured tensor": w, "an argument": v}.get(what, result).mul_(0)
    if what == "a view of the result":  # which has a memory of its own
        result.sum().backward()
        assert_close(x.grad, torch.autograd.grad(fun(x, v).sum(), x)[0])
        return
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        result.sum().backward()


@pytest.mark.parametrize("fun", [lambda x: x * 2, lambda x: (x * 2).t(), lambda x: (x * 2)[:1], lambda x: x, lambda x: x.t()])
def test_results_can_be_written_in_place(fun):
    x = numbers(2, 2).requires_grad_()
    y = replayed(fun)(x)
    y.mul_(3)
    y.sum().backward()
    want = numbers(2, 2).requires_grad_()
    (fun(want) * 3).sum().backward()
    assert torch.equal(x.grad, want.grad)


def test_write_into_an_argument_that_requires_a_gradient():
    leaf = torch.ones(3, requires_grad=True)
    inner = leaf * 2
    with pytest.raises(InPlaceError, match="writes in place into an argument, or a tensor that it closes over, that requires"):
        replayed(lambda x: x.mul_(3).sum())(inner)
    assert torch.equal(inner, torch.full((3,), 2.0))


def test_write_of_a_value_that_requires_a_gradient_into_a_captured_tensor():
    w, state = torch.ones(3, requires_grad=True), torch.zeros(3)

    def fun(x):
        state.add_(w * x)
        return x * 2

    with pytest.raises(InPlaceError, match=r"into a tensor that it closes over, in place. Return the value, or write value.det"):
        replayed(fun)(torch.full((3,), 5.0))
    assert torch.equal(state, torch.zeros(3)) and not state.requires_grad


def test_state_written_next_to_a_gradient():
    state = torch.ones(3)

    def fun(x):
        value = (x * state.clone()).sum()
        state.add_(1)
        return value

    x = numbers(3).requires_grad_()
    jitted = replayed(fun)
    for count in (1.0, 2.0):
        assert torch.equal(torch.autograd.grad(jitted(x), x)[0], torch.full((3,), count))
    assert torch.equal(state, torch.full((3,), 3.0))


def test_result_stored_under_no_grad():
    state = torch.zeros(3)

    def fun(x):
        value = x * 2
        with torch.no_grad():
            state.copy_(value)
        return value

    x = numbers(3).requires_grad_()
    y = replayed(fun)(x)
    assert y.requires_grad and not state.requires_grad and torch.equal(state, y)
    y.sum().backward()
    assert torch.equal(x.grad, torch.full((3,), 2.0))
    y.detach().zero_()
    assert torch.equal(state, 2 * x), "the result has its own memory"


@BOTH
def test_batch_norm_and_dropout_in_training(backend):
    def run(fun, model):
        torch.manual_seed(5)
        x = numbers(8, 4).requires_grad_()
        y = fun(x)
        y.sum().backward()
        return [y.detach(), x.grad, *(p.grad for p in model.parameters()), *model.buffers()]

    def made():
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.BatchNorm1d(6), torch.nn.Dropout(0.5), torch.nn.Linear(6, 2))

    plain, other = made(), made()
    assert_close(run(jit(other, backend=backend), other), run(plain, plain), rtol=1e-5, atol=1e-5)


def test_unused_parameters_get_no_gradient():
    """An optimizer with momentum or decay would change them."""
    w, unused = numbers(3).requires_grad_(), numbers(3).requires_grad_()
    replayed(lambda x, u: (x * w).sum())(numbers(3), unused).backward()
    assert w.grad is not None
    assert unused.grad is None


def test_backward_inside():
    w = numbers(3).requires_grad_()

    def fun(x):
        (x * w).sum().backward()
        return x * 2

    with pytest.raises(UnsupportedOperationError, match=r"torchbatch\.grad"):
        replayed(fun)(numbers(3))
    assert w.grad is None
