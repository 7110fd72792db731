"""Gradients that are found as products: that they are found, right, and never made where that is said."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from tests.conftest import LONG
from tests.per_example.together import Together, assert_close, by_definition, quantities
from torchbatch import grad, per_example, vmap
from torchbatch.per_example.batch import Params
from torchbatch.per_example.transform import Chunk, PerExample

COUNT = 3
NEVER, KEPT = "never made", "its factors have hardly fewer numbers"


def _random(*sizes, seed=0):
    return torch.randn(*sizes, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) / 3


def _tokens(*sizes, below):
    return torch.randint(below, sizes, generator=torch.Generator().manual_seed(1))


def _bent(x):
    return torch.tanh(x).sum()


def _packed(w, x):
    q, k, v = x @ w[:8].T, x @ w[8:16].T, x @ w[16:].T
    return _bent(q * k + v)


def _tied(w, tokens):
    return F.cross_entropy(torch.tanh(w[tokens[:-1]]) @ w.T, tokens[1:])


#: A loss, the parameter, the batch, and how the parameter is gone about.
PRODUCTS: dict[str, tuple[Any, torch.Tensor, tuple[torch.Tensor, ...], str]] = {
    "a vector times": (lambda w, x: _bent(x @ w), _random(9, 8), (_random(COUNT, 9),), NEVER),
    "times a vector": (lambda w, x: _bent(w @ x), _random(9, 8), (_random(COUNT, 8),), NEVER),
    "an outer product": (lambda w, x: _bent(torch.outer(x, x[:8]) * w), _random(9, 8), (_random(COUNT, 9),), "it comes from mul"),
    "few tokens": (lambda w, x: _bent(F.linear(x, w)), _random(24, 20), (_random(COUNT, 3, 20),), NEVER),
    "many tokens": (lambda w, x: _bent(F.linear(x, w)), _random(4, 3), (_random(COUNT, 9, 3),), KEPT),
    "tokens times the transposed": (lambda w, x: _bent(x @ w), _random(20, 24), (_random(COUNT, 3, 20),), NEVER),
    "used twice": (lambda w, x: _bent(torch.tanh(w @ x) @ w), _random(20, 20), (_random(COUNT, 20),), NEVER),
    "scaled, negated, divided": (lambda w, x: _bent(-(w / 3) * 2 @ x), _random(9, 8), (_random(COUNT, 8),), NEVER),
    "groups": (lambda w, x: _bent(torch.einsum("gmn,gn->gm", w, x)), _random(4, 9, 8), (_random(COUNT, 4, 8),), NEVER),
    "three axes": (lambda w, x: _bent(torch.einsum("hdn,tn->htd", w, x)), _random(2, 6, 12), (_random(COUNT, 2, 12),), NEVER),
    "heads and widths": (
        lambda w, x: _bent(torch.einsum("thd,hdn->tn", x, w)), _random(2, 6, 12), (_random(COUNT, 2, 2, 6),), NEVER,
    ),
    "the same matrix on a stack": (lambda w, x: _bent(w @ x), _random(20, 24), (_random(COUNT, 2, 24, 1),), NEVER),
    "rows of a packed matrix": (_packed, _random(24, 40), (_random(COUNT, 40),), NEVER),
    "columns of a matrix": (lambda w, x: _bent(w[:, 2:9] @ x), _random(20, 24), (_random(COUNT, 7),), NEVER),
    "every other row": (lambda w, x: _bent(w[::2] @ x), _random(20, 24), (_random(COUNT, 24),), NEVER),
    "the last rows": (lambda w, x: _bent(w[-4:] @ x), _random(20, 24), (_random(COUNT, 24),), NEVER),
    "one matrix of a stack": (lambda w, x: _bent(w[1] @ x), _random(3, 20, 24), (_random(COUNT, 24),), NEVER),
    "one matrix along the last axis": (lambda w, x: _bent(w[..., -1] @ x), _random(20, 24, 3), (_random(COUNT, 24),), NEVER),
    "a chunk": (lambda w, x: _bent(torch.cat([c @ x for c in w.chunk(2)])), _random(20, 24), (_random(COUNT, 24),), NEVER),
    "a split of two sizes": (lambda w, x: _bent(w.split([5, 15])[1] @ x), _random(20, 24), (_random(COUNT, 24),), NEVER),
    "matrices one by one": (lambda w, x: _bent(sum(m @ x for m in w)), _random(2, 20, 24), (_random(COUNT, 24),), NEVER),
    "put together with others": (
        lambda w, x: _bent(torch.cat([w, torch.ones(4, 24).double()]) @ x), _random(20, 24), (_random(COUNT, 24),), NEVER,
    ),
    "stacked with others": (
        lambda w, x: _bent(torch.stack([w, 2 * w]) @ x), _random(20, 24), (_random(COUNT, 24),), NEVER,
    ),
    "moved about": (
        lambda w, x: _bent(w.reshape(4, 5, 24).permute(2, 0, 1).reshape(24, 20).T @ x),
        _random(20, 24), (_random(COUNT, 24),), NEVER,
    ),
    "expanded": (lambda w, x: _bent(w.expand(4, -1, -1) @ x), _random(20, 24), (_random(COUNT, 4, 24, 1),), NEVER),
    "looked up": (lambda w, t: _bent(F.embedding(t, w)), _random(60, 5), (_tokens(COUNT, 4, below=8),), NEVER),
    "looked up by index": (lambda w, t: _bent(w[t] ** 2), _random(60, 5), (_tokens(COUNT, 4, below=8) - 4,), NEVER),
    "looked up in two ways": (
        lambda w, t: _bent(w[t] * F.embedding(t, w).flip(0)), _random(90, 5), (_tokens(COUNT, 4, below=4),), NEVER,
    ),
    "looked up, with padding": (
        lambda w, t: _bent(F.embedding(t, w, padding_idx=2)), _random(60, 5), (_tokens(COUNT, 6, below=4),), NEVER,
    ),
    "looked up among complex numbers": (
        lambda w, t: _bent((w[t] + 1).abs()), torch.complex(_random(60, 5), _random(60, 5, seed=2)),
        (_tokens(COUNT, 4, below=8),), "summed as a product",
    ),
    "looked up in a part": (lambda w, t: _bent(w[10:][t]), _random(60, 5), (_tokens(COUNT, 4, below=8),), NEVER),
    "looked up in columns": (lambda w, t: _bent(w[:, 1:4][t]), _random(60, 5), (_tokens(COUNT, 4, below=8),), NEVER),
    "looked up at one place": (lambda w, t: _bent(w[t]), _random(60, 5), (_tokens(COUNT, below=8),), NEVER),
    "tied": (_tied, _random(60, 30), (_tokens(COUNT, 4, below=9),), NEVER),
    "a convolution": (
        lambda w, x: _bent(F.conv2d(x[None], w, padding=1)), _random(4, 3, 3, 3), (_random(COUNT, 3, 5, 5),), KEPT,
    ),
    "a convolution in groups, twice": (
        lambda w, x: _bent(F.conv1d(torch.tanh(F.conv1d(x[None], w, groups=2, padding=1)), w, groups=2)),
        _random(4, 2, 3), (_random(COUNT, 4, 5),), KEPT,
    ),
    "a convolution at few places": (
        lambda w, x: _bent(F.conv2d(x[None], w, stride=2)), _random(24, 20, 2, 2), (_random(COUNT, 20, 4, 4),), NEVER,
    ),
    "a transposed convolution at few places": (
        lambda w, x: _bent(F.conv_transpose2d(x[None], w, padding=1)), _random(20, 24, 2, 2), (_random(COUNT, 20, 2, 2),), NEVER,
    ),
    "a convolution in groups at few places, twice": (
        lambda w, x: _bent(F.conv1d(torch.tanh(F.conv1d(x[None], w, groups=2, padding=1)), w, groups=2)),
        _random(24, 12, 3), (_random(COUNT, 24, 3),), NEVER,
    ),
    "a product and what all examples share": (
        lambda w, x: _bent(w @ x) + w.square().sum(), _random(9, 8), (_random(COUNT, 8),), "it comes from mul",
    ),
    "a diagonal": (lambda w, x: _bent(w.diagonal() * x), _random(8, 8), (_random(COUNT, 8),), "it comes from"),
    "a row": (lambda w, x: _bent(w * x), _random(1, 8), (_random(COUNT, 8),), "it is a vector"),
    "no place at all": (lambda w, x: _bent(x @ w) + 0 * w.sum(), _random(9, 8), (_random(COUNT, 0, 9),), "it comes from"),
}  # fmt: skip



RARELY = {
    "times a vector", "tokens times the transposed", "three axes", "columns of a matrix", "the last rows", "a chunk",
    "stacked with others", "one matrix along the last axis", "looked up by index", "looked up in columns", "a convolution",
    "a convolution in groups, twice", "a row", "used twice", "looked up",
}  # fmt: skip


@pytest.mark.parametrize("name", [name for name in PRODUCTS if LONG or name not in RARELY])
def test_product(name):
    loss, w, batch, how = PRODUCTS[name]
    gradients = vmap(grad(loss), in_axes=(None, *[0] * len(batch)))(w, *batch)
    expected = by_definition({"w": gradients.conj().resolve_conj()}, 0.7)  # grad is JAX's, which is the conjugate of PyTorch's
    parts = {key: quantities(0.7)[key] for key in ("norms", "flat", "gram", *(["fisher_diag"] if "looked" in name else []))}
    run = PerExample("together", Together(parts), loss, None, {"compile": False})
    found = run(w, *batch)
    for key, value in found.items():
        assert_close(value, expected[key]["w"] if isinstance(expected[key], dict) else expected[key], 1e-12, key)
    assert how in run._told[0], run._told


@pytest.mark.parametrize("quantity", [per_example.norms, per_example.clipped_sum] if LONG else [per_example.clipped_sum])
@pytest.mark.parametrize("name", ["few tokens", "looked up", "tied", "a convolution at few places"])
def test_what_is_never_made_is_never_made(name, quantity):
    loss, w, batch, _ = PRODUCTS[name]
    run = quantity(loss, compile=False)
    params = Params(w, "")
    arguments = run._arguments(params, Chunk.of(batch, 0, COUNT, COUNT, params), torch.zeros(2, dtype=torch.int32))
    made = [node.meta["val"] for node in run._runs["eager"].lower(*arguments).graph.graph.nodes if node.op == "call_function"]
    assert max(value.untyped_storage().nbytes() for value in made if isinstance(value, torch.Tensor)) < COUNT * w.nbytes
