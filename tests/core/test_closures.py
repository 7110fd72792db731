"""Tensors in closures: found, and replaced."""

from __future__ import annotations

import functools

import torch

from torchbatch import lax, value_and_grad, vmap
from torchbatch.core.closures import tensors_in, with_tensors

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
    torch.testing.assert_close(values, x * (x + 1))
    torch.testing.assert_close(slopes, 2 * x + 1)
