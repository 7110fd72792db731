"""Products with matrices that are constant along an axis."""

from __future__ import annotations

import pytest
import torch

from tests._torch.test_rewrites import rewritten


def numbers(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


ROW, COLUMN = numbers(5, 1, 4), numbers(5, 3, 1, seed=1)
LEFT, RIGHT = numbers(5, 3, 4, seed=2), numbers(5, 4, 2, seed=3)

CONSTANT = {
    "left along the sum": (lambda c, r: torch.bmm(c.expand(5, 3, 4), r), (COLUMN, RIGHT), False),
    "right along the sum": (lambda m, c: torch.bmm(m, c.expand(5, 4, 2)), (LEFT, numbers(5, 1, 2)), False),
    "left along its rows": (lambda c, r: torch.bmm(c.expand(5, 3, 4), r), (ROW, RIGHT), True),
    "right along its columns": (lambda m, c: torch.bmm(m, c.expand(5, 4, 2)), (LEFT, numbers(5, 4, 1)), True),
    "scaled": (lambda c, r: torch.bmm(-c.expand(5, 3, 4) / 3, r), (COLUMN, RIGHT), False),
    "sum of two": (lambda c, r: torch.bmm(c.expand(5, 3, 4) + 2 * c, r), (COLUMN, RIGHT), False),
    "transposed": (lambda c, r: torch.bmm(c.expand(5, 4, 3).transpose(1, 2), r), (numbers(5, 1, 3), RIGHT), False),
    "permuted": (lambda c, r: torch.bmm(c.expand(4, 5, 3).permute(1, 2, 0), r), (numbers(1, 5, 3), RIGHT), False),
    "from fewer axes": (lambda c, r: torch.bmm(c.expand(5, 3, 4), r), (numbers(4), RIGHT), True),
    "twice": (lambda c, r: torch.bmm(c.expand(5, 3, 4).exp().tanh(), r), (COLUMN, RIGHT), False),
}


@pytest.mark.parametrize("name", CONSTANT)
def test_a_sum_does_the_work(name):
    fun, inputs, product = CONSTANT[name]
    before, after = rewritten(fun, *inputs)
    assert "bmm.default" in before
    assert ("bmm.default" in after) is product


def test_the_rest_of_a_product_is_smaller():
    fun, inputs, _ = CONSTANT["left along its rows"]
    _, after = rewritten(fun, *inputs)
    assert after[-4:] == ["slice.Tensor", "bmm.default", "expand.default", "clone.default"]


VARIES = {
    "one of two": (lambda c, m, r: torch.bmm(c.expand(5, 3, 4) + m, r), (COLUMN, LEFT, RIGHT)),
    "moved by a view": (lambda c, r: torch.bmm(c.expand(5, 4, 3).reshape(5, 3, 4), r), (numbers(5, 1, 3), RIGHT)),
    "along the batch": (lambda c, r: torch.bmm(c.expand(5, 3, 4), r), (numbers(1, 3, 4), RIGHT)),
    "one sum by itself": (lambda a, b: torch.bmm(a, b), (numbers(5, 3, 1), numbers(5, 1, 2))),
}


@pytest.mark.parametrize("name", VARIES)
def test_what_varies_is_multiplied(name):
    fun, inputs = VARIES[name]
    _, after = rewritten(fun, *inputs)
    assert "bmm.default" in after or "mm.default" in after


def test_the_gradient_of_a_mean():
    def fun(w, x):
        return torch.func.vmap(torch.func.grad(lambda w, x: (x @ w).mean()), in_dims=(None, 0))(w, x)

    before, after = rewritten(fun, numbers(4, 2), numbers(5, 3, 4))
    assert "bmm.default" in before and "bmm.default" not in after


def test_a_long_chain_is_followed_without_recursion():
    def fun(c, r):
        matrix = c.expand(5, 3, 4)
        for _ in range(1500):
            matrix = matrix + 1
        return torch.bmm(matrix, r)

    _, after = rewritten(fun, COLUMN, RIGHT)
    assert "bmm.default" not in after
