"""A tangent has the dtype of its value, where PyTorch makes it float64: for a tensor without dimensions and a Python number."""

from __future__ import annotations

import pytest
import torch

from torchbatch import checkpoint, custom_jvp, hessian, jacfwd, jit, jvp, lax, linearize, vmap
from torchbatch.core.tree import flatten
from torchbatch.testing import assert_close

POINT, ONE = torch.tensor(0.5), torch.ones(())
STEPS = {
    "product": lambda x: 1.5 * x,
    "sum": lambda x: x * x + 1.5 * x,
    "quotient": lambda x: x / 1.5 + 1.5 / x,
    "power": lambda x: 1.5 * x**3,
    "half": lambda x: x.half() * 1.5,
    "complex": lambda x: x * (1 + 2j),
    "scan": lambda x: lax.scan(lambda c, _: (1.5 * c, 2.5 * c), x, None, length=3),
    "fori_loop": lambda x: lax.fori_loop(0, 3, lambda i, c: 1.5 * c, x),
    "while_loop": lambda x: lax.while_loop(lambda c: c < 5, lambda c: 1.5 * c, x),
    "cond": lambda x: lax.cond(x > 0, lambda c: 1.5 * c, lambda c: c, x),
    "checkpoint": checkpoint(lambda x: 1.5 * x),
}


def pushed(fun):
    return lambda x: jvp(fun, (x,), (torch.ones_like(x),))


def check(value, tangent):
    for a, b in zip(flatten(value)[0], flatten(tangent)[0], strict=True):
        assert a.dtype is b.dtype and a.shape == b.shape


@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
def test_the_tangent_has_the_dtype_of_the_value(step):
    check(*pushed(step)(POINT))
    check(*jit(pushed(step), backend="eager")(POINT))
    check(*pushed(jit(step, backend="eager"))(POINT))
    check(*vmap(pushed(step))(torch.tensor([0.5, 0.7])))


@pytest.mark.parametrize("name", sorted(STEPS.keys() - {"while_loop", "complex"}))  # these have no such derivative
def test_of_jacobians_and_linear_functions(name):
    check(STEPS[name](POINT), jacfwd(STEPS[name])(POINT))
    check(STEPS[name](POINT), linearize(STEPS[name], POINT)[1](ONE))


def test_the_numbers_are_right():
    value, tangent = pushed(STEPS["power"])(POINT)
    assert_close((value, tangent), (torch.tensor(0.1875), torch.tensor(1.125)))


@pytest.mark.parametrize("wrap", [lambda f: f, lambda f: jit(f, backend="eager")], ids=["eager", "jit"])
def test_of_second_order(wrap):
    cube = STEPS["power"]
    for second in (hessian(cube), jacfwd(jacfwd(cube)), lambda x: pushed(lambda y: pushed(cube)(y)[1])(x)[1]):
        assert_close(wrap(second)(POINT), torch.tensor(4.5))


@pytest.mark.parametrize("wrap", [lambda f: f, lambda f: jit(f, backend="eager")], ids=["eager", "jit"])
def test_inside_a_loop_the_tangent_can_be_carried(wrap):
    steps = wrap(lambda x: lax.scan(lambda c, _: (pushed(STEPS["product"])(c)[1], c), x, None, length=3))
    assert_close(steps(POINT), (torch.tensor(1.5), torch.tensor([0.5, 1.5, 1.5])))


def test_a_rule_gets_a_tangent_of_the_dtype_of_its_argument():
    sine = custom_jvp(torch.sin)
    sine.defjvp(lambda primals, tangents: (torch.sin(primals[0]), torch.cos(primals[0]) * tangents[0]))
    value, tangent = pushed(lambda x: sine(2.5 * x))(POINT)
    assert_close((value, tangent), (torch.tensor(1.25).sin(), 2.5 * torch.tensor(1.25).cos()))


def test_compiled_by_torch_compile():
    check(*torch.compile(pushed(STEPS["product"]), backend="eager")(POINT))
