"""What do per-example gradients cost: an MLP, a small CNN, a transformer block, an LSTM cell over a short sequence?

    python benchmarks/jit_per_example.py [--device cuda] [--quick] [--repeats N] [--only TEXT] [--json FILE] [--plot FILE]
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import by_hand
import contenders
import jax
import models
import torch
import torch.nn.functional as F
from contenders import Work

import torchbatch

ASKED = {"torch.func": 0.5, "torch.compile": 1.0, "jax": 1.0}
INPUTS = {"mlp": (784,), "cnn": (1, 28, 28), "transformer": (models.LENGTH, models.WIDTH), "lstm": (models.STEPS, models.INPUT)}
NAMES = {"mlp": "MLP 784-128-128-10", "cnn": "CNN 28 x 28", "transformer": "transformer block", "lstm": "LSTM cell, 10 steps"}


def work(kind: str, batch: int, device: str) -> Work:
    """One network."""
    model, model_jax = getattr(models, kind), getattr(models, f"{kind}_jax")

    def loss(p: Any, x: Any, y: Any) -> Any:
        return F.cross_entropy(model(p, x), y)

    def loss_jax(p: Any, x: Any, y: Any) -> Any:
        return models.cross_entropy(model_jax(p, x), y)

    p = models.made(by_hand.SHAPES[kind], device)
    x, y = torch.randn(batch, *INPUTS[kind], device=device), torch.randint(10, (batch,), device=device)
    axes = (None, 0, 0)
    calls = contenders.contenders(
        torchbatch.vmap(torchbatch.grad(loss), in_axes=axes),
        torch.func.vmap(torch.func.grad(loss), in_dims=axes),
        jax.vmap(jax.grad(loss_jax), in_axes=axes),
        by_hand.FORMS[kind],
        (p, x, y),
    )
    calls["loop"] = lambda: _loop(loss, p, x, y)
    return Work(f"{NAMES[kind]}, batch {batch}", calls, ASKED, 1e-3, lambda: _filled(p, batch))


def _filled(p: models.Params, batch: int) -> list[torch.Tensor]:
    return [value.new_full((batch, *value.shape), 1.0) for value in p.values()]


def _loop(loss: Any, p: dict[str, torch.Tensor], x: torch.Tensor, y: torch.Tensor) -> Any:
    leaves = {name: value.detach().requires_grad_() for name, value in p.items()}
    found = [torch.autograd.grad(loss(leaves, a, b), list(leaves.values())) for a, b in zip(x, y, strict=True)]
    return {name: torch.stack([one[i] for one in found]) for i, name in enumerate(leaves)}


def works(device: str, quick: bool) -> Iterator[Work]:
    """Every network with both batch sizes."""
    for kind in NAMES:
        for batch in (32,) if quick else (32, 256):
            yield work(kind, batch, device)


if __name__ == "__main__":
    options = contenders.options(__doc__)
    contenders.run(works(options.device, options.quick), options)
