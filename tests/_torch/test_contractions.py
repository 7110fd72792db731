"""Sums of products that are never made."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import torchbatch
from tests._torch.test_rewrites import rewritten
from torchbatch import grad, vmap
from torchbatch._torch import graphs
from torchbatch._torch.rewrites import simplified
from torchbatch.testing import assert_close

B, N, M = 9, 60, 70


def numbers(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


C, D, H = numbers(B), numbers(B, N, seed=1), numbers(B, M, seed=2)
W = numbers(N, M, seed=3)


def outer(d, h):
    return d[:, :, None] * h[:, None]


SUMS = {
    "over the batch": lambda c, d, h: (c[:, None, None] * outer(d, h)).sum(0),
    "weights last": lambda c, d, h: (outer(d, h) * c[:, None, None]).sum(0),
    "kept dimension": lambda c, d, h: (c[:, None, None] * outer(d, h)).sum(0, keepdim=True),
    "negative axis": lambda c, d, h: (outer(d, h) * outer(d, h)).sum((-1, -2)),
    "norms": lambda c, d, h: (outer(d, h) * outer(d, h)).flatten(1).sum(1),
    "rows": lambda c, d, h: (outer(d, h) * c[:, None, None]).sum((0, 2)),
    "columns": lambda c, d, h: outer(d, h).sum(1),
    "kept batch": lambda c, d, h: (outer(d, h) * outer(d.cos(), h.sin())).sum(2),
    "repeated": lambda c, d, h: (d[:, :, None].expand(B, N, M) * h[:, None].expand(B, N, M)).sum(0),
    "an axis that neither has": lambda c, d, h: (d[:, :, None, None] * h[:, None, :, None].expand(B, 1, M, 3)).sum((0, 3)),
    "an axis that neither has, kept": lambda c, d, h: (d[:, :, None, None] * h[:, None, :, None].expand(B, 1, M, 3)).sum(0),
    "a matrix and its rows": lambda c, d, h: (d[:, :, None] * W).sum(1),
}


def products(fun, *inputs):
    """The sizes of the elementwise products in a graph before and after."""
    trace = graphs.trace(lambda values: [fun(*values)], inputs, gradients=False)
    return [
        [node.meta["val"].numel() for node in each.graph.graph.find_nodes(op="call_function", target=torch.ops.aten.mul.Tensor)]
        for each in (trace, simplified(trace))
    ]


@pytest.mark.parametrize("name", SUMS)
def test_the_product_is_not_made(name):
    rewritten(SUMS[name], C, D, H)
    before, after = products(SUMS[name], C, D, H)
    assert max(before) >= B * N * M and max(after, default=0) < B * N * M


LEFT_ALONE = {
    "a factor with all axes": lambda c, d, h: (outer(d, h).exp() * c[:, None, None]).sum(0),
    "no product": lambda c, d, h: outer(d, h).exp().sum(0),
    "few numbers": lambda c, d, h: outer(d[:2, :3], h[:2, :3]).sum(0),
    "a view that takes an axis apart": lambda c, d, h: outer(d, h).view(B, 2, N // 2, M).sum(1),
    "another dtype": lambda c, d, h: outer(d, h).sum(0, dtype=torch.float32),
    "integers": lambda c, d, h: outer(d.long(), h.long()).sum(0),
}


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_other_sums_are_left_alone(name):
    before, after = rewritten(LEFT_ALONE[name], C, D, H)
    assert not {"bmm.default", "mm.default"} & set(after)
    assert sum(n.startswith("sum") for n in after) == sum(n.startswith("sum") for n in before)


def test_squares_of_squares_are_not_looked_through_for_ever():
    def fun(c, d, h):
        found = outer(d, h)
        for _ in range(40):
            found = found * found
        return found.sum(0)

    rewritten(fun, C, D.clamp(-0.9, 0.9), H.clamp(-0.9, 0.9))


def loss(p, x, y):
    return F.cross_entropy(p["v"] @ torch.tanh(p["w"] @ x), y)


def clipped_sum(p, x, y):
    gradients = vmap(grad(loss), in_axes=(None, 0, 0))(p, x, y)
    square = sum((g * g).flatten(1).sum(1) for g in gradients.values())
    factor = (0.1 / square.sqrt()).clamp(max=1)
    return {name: (factor.view(-1, 1, 1) * g).sum(0) for name, g in gradients.items()}


def test_a_clipped_sum_makes_no_gradient_of_an_example():
    p = {"w": numbers(40, 30), "v": numbers(10, 40, seed=1)}
    x, y = numbers(32, 30, seed=2), torch.arange(32) % 10
    rewritten(lambda w, v, x, y: tuple(clipped_sum({"w": w, "v": v}, x, y).values()), p["w"], p["v"], x, y)
    sizes = torchbatch.jit(clipped_sum).lower(p, x, y).compile().memory_analysis()
    assert sizes.temp_size_in_bytes < 32 * 40 * 30 * 8
    assert_close(torchbatch.jit(clipped_sum)(p, x, y), clipped_sum(p, x, y))
