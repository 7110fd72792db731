"""Tensors in closures: found, and replaced."""

from __future__ import annotations

import functools
from typing import NamedTuple

import pytest
import torch

from torchbatch import grad, jit, lax, value_and_grad, vmap
from torchbatch.core.closures import tensors_in, with_tensors
from torchbatch.testing import assert_close

A, B = torch.ones(2), torch.zeros(2)


def closing(a, b):
    def inner(scale=a):
        return a * scale

    def outer():
        return inner() + holder["b"][0] + part()

    holder, part = {"b": (b, 1)}, functools.partial(lambda x: x, b)
    return outer


def test_tensors_are_found_once():
    assert {id(value) for value in tensors_in(closing(A, B))} == {id(A), id(B)}
    assert tensors_in(lambda: 1) == []


def test_tensors_are_replaced():
    fun = closing(A, B)
    changed = with_tensors(fun, {id(A): A * 3, id(B): B + 5})
    assert changed().tolist() == [19, 19]
    assert fun().tolist() == [1, 1]
    assert changed.__name__ == "outer"


def test_what_closes_over_none_of_them_is_the_same_function():
    fun = closing(A, B)
    assert with_tensors(fun, {}) is fun
    assert with_tensors(fun, {id(torch.ones(1)): A}) is fun


def test_a_function_may_close_over_itself_and_over_what_is_not_there_yet():
    def countdown(n):
        return A if n == 0 else countdown(n - 1) + later

    assert tensors_in(countdown) == []
    fun = with_tensors(countdown, {id(B): A})
    later = 1
    assert fun(2).tolist() == [3, 3]


def test_two_partials_are_told_apart():
    """Their parts are looked at in tuples that are made for it, and may have one place in memory."""
    x = torch.tensor([2.0, 3.0])

    def fun(x):
        times, plus = functools.partial(torch.mul, x), functools.partial(torch.add, x)
        return lax.cond(x > 0, lambda: times(plus(torch.ones(()))), lambda: x)

    values, slopes = vmap(value_and_grad(fun), axis_name="i")(x)
    assert_close(values, x * (x + 1))
    assert_close(slopes, 2 * x + 1)


class Pair(NamedTuple):
    first: object
    second: object


class Holder:
    def __init__(self, value):
        self.value = value

    def total(self, x, *, plus=A):
        return (self.value + plus + x).sum()


def test_tensors_in_named_tuples_keyword_defaults_and_methods():
    pair = Pair(A, 1)

    def fun(*, scale=B):
        return pair.first + scale

    assert {id(value) for value in tensors_in(fun)} == {id(A), id(B)}
    changed = with_tensors(fun, {id(A): A * 3, id(B): B + 5})
    assert changed().tolist() == [8, 8] and fun().tolist() == [1, 1]
    assert {id(value) for value in tensors_in(Holder(B).total)} == {id(A)}


def test_objects_are_copied_if_they_hold_a_tensor_that_is_replaced():
    holder = Holder(Holder({"a": [B]}))
    module = torch.nn.Linear(2, 1)

    def fun():
        return holder.value.value["a"][0].sum() + module.weight.sum() * 0 + plain.value

    plain = Holder(1)
    assert tensors_in(fun) == []
    changed = with_tensors(fun, {id(B): B + 5, id(module.weight): torch.zeros(1, 2)})
    assert changed() == 11 and fun() == 1
    assert holder.value.value["a"][0] is B and isinstance(module.weight, torch.nn.Parameter)
    assert with_tensors(Holder(B).total, {id(B): B + 1})(B).item() == 4


def test_an_object_that_holds_itself():
    holder = Holder(B)
    holder.me = holder
    changed = with_tensors(lambda: holder.value.sum() + (holder.me is None), {id(B): B + 5})
    assert changed() == 10


@pytest.mark.parametrize("how", ["method", "keyword", "named tuple", "object"])
@pytest.mark.parametrize("around", ["scan", "cond"])
def test_a_tensor_that_goes_straight_into_a_transform(how, around):
    def fun(w):
        pair, holder = Pair(w, 1), Holder(w)
        inner = {
            "method": functools.partial(grad(holder.total), A[0]),
            "keyword": lambda *, w=w: grad(torch.sin)(w),
            "named tuple": lambda: grad(torch.sin)(pair.first),
            "object": lambda: grad(torch.sin)(holder.value),
        }[how]
        if around == "scan":
            return lax.scan(lambda c, _: (c + inner() * w, None), torch.ones(()), None, length=3)[0]
        return lax.cond(w > 0, lambda: inner() * w, lambda: w)

    w = torch.tensor(2.0)
    for call, x in ((grad(fun), w), (grad(grad(fun)), w), (vmap(grad(fun)), torch.stack([w, w / 2]))):
        assert_close(jit(call, backend="eager")(x), call(x))
