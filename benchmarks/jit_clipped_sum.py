"""What does the sum of clipped per-example gradients cost, as private training needs it?

    python benchmarks/jit_clipped_sum.py [--device cuda] [--quick] [--repeats N] [--only TEXT] [--json FILE] [--plot FILE]

A network of 784-512-512-10 and a batch of 64: the examples' gradients have 43 million numbers, their sum 670,000. By hand is
the form that never makes them: the norms follow from those of the layers' inputs and of their outputs' gradients.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import by_hand
import contenders
import jax
import jax.numpy as jnp
import models
import torch
import torch.nn.functional as F
from contenders import Work

import torchbatch

ASKED = {"torch.func": 0.1}
BOUND = 0.5


def loss(p: Any, x: Any, y: Any) -> Any:
    """Of one example."""
    return F.cross_entropy(models.mlp(p, x), y)


def loss_jax(p: Any, x: Any, y: Any) -> Any:
    """The same in JAX."""
    return models.cross_entropy(models.mlp_jax(p, x), y)


def clipped_sum(per_example: Any) -> Any:
    """The sum over examples, each scaled to a norm of at most ``BOUND``."""

    def summed(p: Any, x: Any, y: Any) -> Any:
        gradients = per_example(p, x, y)
        square = sum((g * g).flatten(1).sum(1) for g in gradients.values())
        factor = (BOUND / square.sqrt()).clamp(max=1)
        return {name: (factor.view(-1, *[1] * (g.dim() - 1)) * g).sum(0) for name, g in gradients.items()}

    return summed


def clipped_sum_jax(p: Any, x: Any, y: Any) -> Any:
    """The same in JAX."""
    gradients = jax.vmap(jax.grad(loss_jax), in_axes=(None, 0, 0))(p, x, y)
    square = sum((g * g).reshape(len(g), -1).sum(1) for g in gradients.values())
    factor = jnp.minimum(BOUND / jnp.sqrt(square), 1)
    return {name: (factor.reshape(-1, *[1] * (g.ndim - 1)) * g).sum(0) for name, g in gradients.items()}


def without_gradients(p: models.Params, x: torch.Tensor, y: torch.Tensor) -> Any:
    """By hand."""
    pairs = by_hand.mlp_pairs(p, x, y)
    square = sum((d * d).sum(1) * ((h * h).sum(1) + 1) for d, h in pairs.values())
    factor = (BOUND / square.sqrt()).clamp(max=1)[:, None]
    scaled = {name: (factor * d, h) for name, (d, h) in pairs.items()}
    return {name: d.sum(0) if name[0] == "b" else d.T @ h for name in p for d, h in [scaled[name[1]]]}


def works(device: str) -> Iterator[Work]:
    """The one row."""
    p = models.made(models.layers(784, 512, 512, 10), device)
    x, y = torch.randn(64, 784, device=device), torch.randint(10, (64,), device=device)
    axes = (None, 0, 0)
    ours = clipped_sum(torchbatch.vmap(torchbatch.grad(loss), in_axes=axes))
    theirs = clipped_sum(torch.func.vmap(torch.func.grad(loss), in_dims=axes))
    yield Work(
        "clipped sum, batch 64",
        contenders.contenders(ours, theirs, clipped_sum_jax, without_gradients, (p, x, y)),
        ASKED,
        1e-4,
    )


if __name__ == "__main__":
    options = contenders.options(__doc__)
    contenders.run(works(options.device), options)
