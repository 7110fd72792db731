"""What does a call of a compiled function cost where there is next to nothing to compute?

    python benchmarks/jit_call_cost.py [--device cuda] [--quick] [--repeats N] [--only TEXT] [--json FILE] [--plot FILE]

The notebook's three: x * 2 + 1 on 8 numbers; a layer of 64 x 100 on a batch of 16, with its matrix closed over; 100 dot
products of vectors of 150.
"""

from __future__ import annotations

from collections.abc import Iterator

import contenders
import jax
import jax.numpy as jnp
import torch
from contenders import Work

import torchbatch

ASKED = {"by hand": 1.3, "torch.compile": 1 / 3, "jax": 1.0}


def affine(device: str) -> Work:
    """``[8] -> [8]``."""

    def f(x):
        return x * 2 + 1

    args = (torch.arange(8.0, device=device),)
    calls = contenders.contenders(torchbatch.vmap(f), torch.func.vmap(f), jax.vmap(f), f, args)
    return Work("x * 2 + 1 on 8 numbers", calls | {"loop": lambda: torch.stack([f(x) for x in args[0]])}, ASKED)


def layer(device: str) -> Work:
    """``[16, 100] -> [16, 64]``, the matrix is closed over."""
    W, batch = torch.randn(64, 100, device=device), torch.randn(16, 100, device=device)
    W_jax = jnp.asarray(W.cpu().numpy())

    def f(x):
        return torch.mv(W, x)

    calls = contenders.contenders(
        torchbatch.vmap(f), torch.func.vmap(f), jax.vmap(lambda x: jnp.dot(W_jax, x)), lambda x: x @ W.T, (batch,)
    )
    return Work("W @ x, 64 x 100, batch 16", calls | {"loop": lambda: torch.stack([f(x) for x in batch])}, ASKED, 1e-4)


def dots(device: str) -> Work:
    """``[100, 150], [100, 150] -> [100]``."""
    a = torch.arange(150.0, device=device).repeat(100, 1)
    b = torch.arange(100.0, 250.0, device=device).repeat(100, 1)
    calls = contenders.contenders(
        torchbatch.vmap(torch.dot), torch.func.vmap(torch.dot), jax.vmap(jnp.dot), torch.linalg.vecdot, (a, b)
    )
    loop = {"loop": lambda: torch.stack([torch.dot(x, y) for x, y in zip(a, b, strict=True)])}
    return Work("dot products, 100 x 150", calls | loop, ASKED)


def works(device: str) -> Iterator[Work]:
    """All rows."""
    torch.manual_seed(0)
    yield affine(device)
    yield layer(device)
    yield dots(device)


if __name__ == "__main__":
    options = contenders.options(__doc__)
    contenders.run(works(options.device), options)
