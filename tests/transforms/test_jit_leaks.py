"""jit: values that leave a function by another way than return, and what a function cannot do while it is traced."""

from __future__ import annotations

import contextlib
import functools
import inspect

import pytest
import torch

import torchbatch
from torchbatch import grad, jit, vmap
from torchbatch.errors import EscapedValueError, LeakedTracerError, UnsupportedOperationError
from torchbatch.lax import fori_loop
from torchbatch.testing import assert_close

replayed = functools.partial(jit, backend="eager")
X = torch.tensor([1.0, 2.0, 3.0])

# Leaked values

LEAKED = (
    "a value from inside a jit function is used after it was traced: it leaked through a global, a closure, a list or an "
    "attribute, and holds no numbers. Return it from the function instead."
)
KEPT = []


class Holder:
    value = None


def through_a_list(x):
    KEPT.append(x * 2)
    return x


def through_a_dict(x):
    KEPT.append({"a": [x * 2]})
    return x


def through_an_attribute(x):
    Holder.value = x * 2
    return x


def through_a_closure(x):
    y = x * 2
    KEPT.append(lambda: y)
    return x


def the_argument_itself(x):
    KEPT.append(x)
    return x * 2


def the_result_itself(x):
    KEPT.append(x * 2)
    return KEPT[-1]


def a_view(x):
    KEPT.append(x[:2])
    return x


def a_constant(x):
    KEPT.append(torch.tensor([1.0, 2.0]))
    return x


def inside_grad(x):
    return grad(lambda a: (KEPT.append(a * 2), a.sum())[1])(x)


def inside_vjp(x):
    return torchbatch.vjp(lambda a: (KEPT.append(a * 2), a)[1], x)[0]


def inside_jvp(x):
    return torchbatch.jvp(lambda a: (KEPT.append(a * 2), a)[1], (x,), (x,))


def into_the_attributes_of_a_tensor(x):
    GIVEN.__dict__.update(kept=x * 2)
    KEPT.append(GIVEN.kept)
    return x


def in_a_loop(x):
    return fori_loop(0, 3, lambda i, c: (KEPT.append(c * 3), c * 2)[1], x)


def by_a_hook(x):
    y = x.clone().requires_grad_() * 2
    y.register_hook(KEPT.append)
    return torch.autograd.grad(y.sum(), y)[0]


def inside_an_inner_jit(x):
    return replayed(through_a_list)(x)


GIVEN = torch.ones(3)


def of_a_captured_tensor(x):
    KEPT.append(GIVEN * 2)
    return x


def before_an_error(x):
    KEPT.append(x * 2)
    raise KeyError("mine")


LEAKS = [through_a_list, through_a_dict, through_an_attribute, through_a_closure, the_argument_itself, the_result_itself, a_view]
LEAKS += [inside_an_inner_jit, in_a_loop, by_a_hook, into_the_attributes_of_a_tensor]
LEAKS += [a_constant, inside_grad, inside_vjp, inside_jvp, of_a_captured_tensor, before_an_error]
USES = {
    "arithmetic": lambda v: v + 1,
    "beside a tensor": lambda v: torch.add(X, v),
    "shape": lambda v: v.shape,
    "item": lambda v: v.sum().item(),
    "numpy": lambda v: v.numpy(),
    "bool": bool,
    "jit": replayed(torch.sin),
    "captured": lambda v: replayed(lambda x: x * v)(X),
    "vmap": vmap(torch.sin),
}


def leaked(fun):
    KEPT.clear()
    with contextlib.suppress(KeyError):
        replayed(fun)(X)
    value = KEPT[0] if KEPT else Holder.value
    value = value["a"][0] if isinstance(value, dict) else value
    return value() if inspect.isfunction(value) else value


@pytest.mark.parametrize("fun", LEAKS)
@pytest.mark.parametrize("use", ["arithmetic", "shape", "jit"])
def test_leaked_values(fun, use):
    value = leaked(fun)
    with pytest.raises(LeakedTracerError) as raised:
        USES[use](value)
    assert str(raised.value) == LEAKED


@pytest.mark.parametrize("use", USES)
def test_every_use_of_a_leaked_value_is_an_error(use):
    value = leaked(through_a_list)
    with pytest.raises(LeakedTracerError, match="leaked through a global"):
        USES[use](value)
    assert repr(value) == "<value leaked from a traced function>"


@pytest.mark.parametrize("wrap", [vmap, lambda f: vmap(grad(f)), lambda f: grad(lambda x: vmap(f)(x).sum())])
def test_values_leaked_from_vmap_are_as_without_jit(wrap):
    def fun(x):
        KEPT.append(x * 2)
        return x

    KEPT.clear()
    replayed(wrap(fun))(X)
    with pytest.raises((EscapedValueError, LeakedTracerError)):
        KEPT[0] + 1


def test_a_leak_spoils_nothing():
    leaked(through_a_list)
    assert torch.equal(replayed(through_a_list)(X), X)


def test_results_are_no_leaks():
    made = []
    jitted = replayed(lambda x: x * 2)
    made.append(jitted(X))
    assert torch.equal(made[0] + 1, X * 2 + 1)


def test_a_value_that_is_made_inside_and_not_of_tensors_is_no_leak():
    kept = []
    replayed(lambda x: (kept.append((x.shape, x.dtype)), x)[1])(X)
    assert kept == [(X.shape, X.dtype)]


# What cannot be done while a function is traced

BACKWARD = (
    "jit: the function calls backward(), which leaves its result in .grad, outside of the function. Return gradients instead: "
    "torchbatch.grad or torch.autograd.grad inside, or call backward() on the result of the jit function."
)


@pytest.mark.parametrize("before", [None, torch.ones(3)], ids=["no gradient before", "a gradient before"])
def test_backward_inside(before):
    w = torch.ones(3, requires_grad=True)
    w.grad = before

    def fun(x):
        (x * w).sum().backward()
        return x

    with pytest.raises(UnsupportedOperationError) as raised:
        replayed(fun)(X)
    assert str(raised.value) == BACKWARD
    assert w.grad is before and (before is None or torch.equal(before, torch.ones(3)))


def test_backward_inside_by_an_argument():
    x = X.clone().requires_grad_()
    with pytest.raises(UnsupportedOperationError) as raised:
        replayed(lambda x: ((x**2).sum().backward(), x)[1])(x)
    assert str(raised.value) == BACKWARD and x.grad is None


def reads(w, x):
    return (w.grad, x * w)[1]


def asks_for(w, x):
    return x if w.grad is None else x * w


def sets(w, x):
    w.grad = x
    return x * w


def clears(w, x):
    w.grad = None
    return x * w


def deletes(w, x):
    del w.grad
    return x * w


def sets_to_zero(w, x):
    torch.optim.SGD([w], 0.1).zero_grad()
    return x * w


@pytest.mark.parametrize("wrap", [lambda fun: fun, vmap, lambda fun: grad(lambda x: fun(x).sum())])
@pytest.mark.parametrize("fun", [reads, asks_for, sets, clears, deletes, sets_to_zero])
def test_gradients_of_captured_tensors(fun, wrap):
    w = torch.ones((), requires_grad=True)
    w.grad = before = torch.ones(())
    with pytest.raises(UnsupportedOperationError) as raised:
        replayed(wrap(lambda x: fun(w, x)))(X)
    assert str(raised.value) == (
        "jit: the function reads or sets .grad of a tensor from outside. That is another tensor after each backward(), but the "
        "compiled function would keep to the one that it saw. Pass the gradient as an argument of its own, f(…, w.grad), and "
        "return the new one."
    )
    assert w.grad is before and torch.equal(before, torch.ones(()))


def test_the_gradient_of_an_argument():
    with pytest.raises(UnsupportedOperationError, match=r"reads or sets \.grad of a tensor from outside"):
        replayed(lambda x: reads(x, x))(X.clone().requires_grad_())


def test_what_is_made_inside_has_no_gradient():
    assert torch.equal(replayed(lambda x: x if (x * 2).grad is None else x * 2)(X), X)


def test_an_argument_is_made_to_require_a_gradient_inside():
    with pytest.raises(UnsupportedOperationError, match="requires_grad_"):
        replayed(lambda x: x.requires_grad_() * 2)(X.clone())


def test_a_value_is_made_to_require_a_gradient_inside():
    """It is a leaf of its own, which nobody outside can see."""

    def fun(x):
        y = (x * 1).requires_grad_()
        return torch.autograd.grad((y**2).sum(), y)[0], y * 2

    assert_close(replayed(fun)(X)[0], X * 2)


@pytest.mark.parametrize("seed", [lambda: torch.manual_seed(1234), torch.seed, lambda: torch.random.manual_seed(4321)])
def test_the_generator_is_seeded_inside(seed):
    def fun(x):
        seed()
        return x + torch.rand(3)

    with pytest.raises(UnsupportedOperationError) as raised:
        replayed(fun)(X)
    assert str(raised.value) == (
        "jit: the function sets the state of the random generator (torch.manual_seed, torch.random.fork_rng, "
        "torch.set_rng_state, or torch.utils.checkpoint around a draw), which would happen only while it is traced. Seed "
        "before the call, draw outside, or use torchbatch.checkpoint."
    )


def test_a_refused_seed_leaves_the_generator_as_it_was():
    torch.manual_seed(7)
    want = torch.rand(2)
    torch.manual_seed(7)
    with pytest.raises(UnsupportedOperationError):
        replayed(lambda x: x + torch.manual_seed(0).initial_seed())(X)
    assert torch.equal(torch.rand(2), want)


def test_the_body_of_an_argument_is_replaced():
    def fun(x):
        x.data = torch.zeros(3)
        return x * 2

    try:
        got = replayed(fun)(X.clone())
    except UnsupportedOperationError:
        return
    assert torch.equal(got, torch.zeros(3))
