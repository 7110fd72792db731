"""Indices, numbers and refusals in the bodies of loops and branches that are traced and differentiated."""

from __future__ import annotations

import pytest
import torch

from torchbatch import checkpoint, custom_jvp, custom_vjp, grad, hessian, jacrev, jit, jvp, lax, vmap
from torchbatch.errors import UnsupportedOperationError
from torchbatch.testing import assert_close

X = torch.tensor([1.0, 2.0, 4.0])


def summed(x):
    return lax.fori_loop(0, 2, lambda i, c: c + x[i] ** 2, torch.zeros(()))


def sliced(x):
    return lax.scan(lambda c, i: (c + x[i] * c, x[i, None]), x[0], torch.tensor([2, 1]))[0]


def chosen(x):
    return lax.fori_loop(0, 3, lambda i, c: lax.cond(i > 0, lambda: c * x[i], lambda: c + x[i - 1]), torch.ones(()))


def placed(x):
    def step(i, c):
        c = c.clone()
        c[i] = x[i] * x[0]
        return c

    return lax.fori_loop(0, 2, step, torch.zeros(3)).sum()


LOOPS = [summed, sliced, chosen, placed]


@pytest.mark.parametrize("f", LOOPS)
@pytest.mark.parametrize("transform", [grad, lambda f: vmap(grad(f)), lambda f: grad(lambda x: vmap(f)(x).sum())])
def test_a_body_that_indexes_by_its_counter(f, transform):
    x = X if transform is grad else torch.stack([X, X + 1])
    assert_close(jit(transform(f), backend="eager")(x), transform(f)(x))


@pytest.mark.parametrize("second", [hessian, lambda f: jacrev(grad(f))])
def test_second_derivatives_of_such_a_body(second):
    assert_close(jit(second(summed), backend="eager")(X), second(summed)(X))


def test_forward_mode_of_such_a_body():
    def both(x):
        return jvp(summed, (x,), (torch.ones(3),))

    assert_close(jit(both, backend="eager")(X), both(X))


def test_numbers_that_are_arguments_stay_weak_in_the_body():
    def f(x, number):
        return grad(lambda x: lax.fori_loop(0, 2, lambda i, c: c * number, x.half()).float())(x)

    assert jit(f, backend="eager")(X[0], 3.0).item() == 9


def test_a_body_that_calls_backward_is_refused():
    def step(c, x):
        c.sum().backward()
        return c, None

    with pytest.raises(UnsupportedOperationError, match="backward"):
        jit(grad(lambda x: lax.scan(step, x, None, length=2)[0].sum()), backend="eager")(X)


def test_rules_for_derivatives_that_index():
    @custom_vjp
    def pick(x, i):
        return x[i]

    pick.defvjp(lambda x, i: (x[i], (x, i)), lambda kept, g: (torch.zeros(3).index_fill(0, kept[1], kept[0][kept[1]]) * g, None))

    @custom_jvp
    def square(x, i):
        return x[i] ** 2

    square.defjvp(lambda primals, tangents: (primals[0][primals[1]] ** 2, 2 * primals[0][primals[1]] * tangents[0][primals[1]]))

    i = torch.tensor(1)
    for f in (pick, square):
        h = grad(lambda x, i, f=f: f(x, i))
        assert_close(jit(h, backend="eager")(X, i), h(X, i))
        h = grad(lambda x, i, f=f: vmap(lambda x: f(x, i))(torch.stack([x, x * 2])).sum())
        assert_close(jit(h, backend="eager")(X, i), h(X, i))


def around_a_map(f):
    return grad(lambda x, i: vmap(f)(x[None], i[None]).sum())


@pytest.mark.parametrize("outer", [grad, around_a_map, lambda f: grad(checkpoint(f))])
def test_an_autograd_function_that_indexes(outer):
    class Pick(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(x, i):
            return x[i] * 1

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(*inputs)

        @staticmethod
        def backward(ctx, g):
            x, i = ctx.saved_tensors
            return torch.zeros_like(x).index_fill(0, i, 1.0) * g * x[i], None

    i = torch.tensor(1)
    h = outer(lambda x, i: Pick.apply(x, i) * x[i])
    assert_close(jit(h, backend="eager")(X, i), h(X, i))
