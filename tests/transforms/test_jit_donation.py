"""jit: memory that is given away with donate_argnums."""

from __future__ import annotations

import copy
import functools

import numpy as np
import pytest
import torch

from torchbatch import jit, vmap
from torchbatch.errors import DonatedBufferError, UnsupportedOperationError
from torchbatch.testing import assert_close

replayed = functools.partial(jit, backend="eager")


def numbers():
    return torch.tensor([1.0, 2.0, 3.0])


def added(a, b):
    return a + b


USES = {
    "arithmetic": lambda a: a + 1,
    "an attribute": lambda a: a.shape,
    "a method": lambda a: a.sum(),
    "bool": bool,
    "len": len,
    "numpy": np.asarray,
    "deepcopy": copy.deepcopy,
    "vmap": vmap(torch.sin),
    "format": lambda a: f"{a}",
    "another jit function": lambda a: replayed(added)(numbers(), a),
    "an argument in a tree": lambda a: replayed(lambda x: x["a"] * 2)({"a": a}),
    "the same jit function": lambda a: replayed(added, donate_argnums=0)(a, numbers()),
    "captured": lambda a: replayed(lambda x: x + a)(numbers()),
    "written": lambda a: a.zero_(),
    "backward": lambda a: a.backward(),
}


@pytest.mark.parametrize("use", USES)
def test_a_donated_tensor_cannot_be_used(use):
    jitted, a, b = replayed(added, donate_argnums=0), numbers(), numbers()
    assert torch.equal(jitted(a, b), b * 2)
    with pytest.raises(DonatedBufferError) as raised:
        USES[use](a)
    assert str(raised.value) == (
        "a tensor is used after it was passed to a jit function with donate_argnums, which gave its memory away. Use what the "
        "function returned, pass a copy (.clone()), or leave the argument out of donate_argnums."
    )
    assert repr(a) == "<tensor whose memory was given to a jit function>"
    assert torch.equal(b, numbers()), "only what is donated is gone"
    assert torch.equal(jitted(numbers(), b), b * 2), "the function goes on working"


def test_donated_by_inductor():
    jitted, a = jit(lambda a: a * 2 + 1, donate_argnums=0), numbers()
    assert torch.equal(jitted(a), numbers() * 2 + 1) and torch.equal(jitted(numbers()), numbers() * 2 + 1)
    with pytest.raises(DonatedBufferError):
        a.sum()


@pytest.mark.parametrize("fun", [lambda a: a, lambda a: a.add_(1), lambda a: a[:1], lambda a: (a, a * 2)])
def test_results_of_a_function_that_donates(fun):
    assert_close(replayed(fun, donate_argnums=0)(numbers()), fun(numbers()))


def test_donated_by_position_in_trees():
    jitted = replayed(lambda n, p, x: p["a"] * n + p["b"][1] * x, donate_argnums=-2, static_argnums=0)
    p, x = {"a": numbers(), "b": [numbers(), numbers()]}, numbers()
    assert torch.equal(jitted(2, p, x), numbers() * 2 + numbers() ** 2)
    for leaf in (p["a"], *p["b"]):
        with pytest.raises(DonatedBufferError):
            leaf + 1
    assert torch.equal(x, numbers()) and jitted.cache_size() == 1


def test_donated_by_name():
    a, b = numbers(), numbers()
    replayed(added, donate_argnums=0)(b=b, a=a)
    assert torch.equal(b, numbers())
    with pytest.raises(DonatedBufferError):
        a + 1


@pytest.mark.parametrize("donated", [0, 1, (0, 1)])
def test_one_tensor_twice_of_which_one_is_donated(donated):
    a = numbers()
    with pytest.raises(DonatedBufferError, match=r"jit: argument [ab] is donated, but the same tensor is passed twice\."):
        replayed(added, donate_argnums=donated)(a, a)
    assert torch.equal(a, numbers())


@pytest.mark.parametrize("make", [lambda: numbers().requires_grad_(), lambda: numbers().requires_grad_() * 1])
@pytest.mark.parametrize("first", [True, False])
def test_donated_tensors_must_not_require_gradients(make, first):
    wanted, other = make(), numbers()
    arguments = (wanted, other) if first else (other, wanted)
    with pytest.raises(UnsupportedOperationError) as raised:
        replayed(added, donate_argnums=(0, 1))(*arguments)
    name = "a" if first else "b"
    assert str(raised.value) == (
        f"jit: argument {name} is donated, but it requires a gradient, so that autograd may need it later. Pass {name}.detach(), "
        "or leave it out of donate_argnums."
    )
    assert torch.equal(wanted.detach(), numbers()) and torch.equal(other, numbers()), "a call that is refused takes nothing"


@pytest.mark.parametrize("size", [1, 3])
def test_autograd_notices_that_what_it_saved_is_donated(size):
    w, a = torch.ones(size, requires_grad=True), torch.full((size,), 5.0)
    y = (w * a).sum()
    replayed(lambda a: a * 2, donate_argnums=0)(a)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_donated_beside_what_requires_a_gradient():
    w, a = numbers().requires_grad_(), numbers()
    replayed(lambda a, w: (a * w).sum(), donate_argnums=0)(a, w).backward()
    assert torch.equal(w.grad, numbers())


def test_numbers_and_arrays_can_be_donated_and_nothing_happens():
    jitted, array = replayed(added, donate_argnums=(0, 1)), np.ones(3)
    assert torch.equal(jitted(2.0, numbers()), numbers() + 2) and torch.equal(jitted(array, 1.0), torch.full((3,), 2.0).double())
    assert (array == 1).all()


def test_a_call_that_fails_while_it_is_traced_takes_nothing():
    a = numbers()
    with pytest.raises(RuntimeError):
        replayed(lambda a: a @ torch.ones(5), donate_argnums=0)(a)
    assert torch.equal(a, numbers())


def test_nothing_is_donated_inside_other_transforms():
    inner, a = replayed(lambda a: a + 1, donate_argnums=0), numbers()
    assert torch.equal(vmap(inner)(a), numbers() + 1) and torch.equal(replayed(inner)(a), numbers() + 1)
    assert torch.equal(a, numbers())
