"""What do the Hessian and the Jacobians of an MLP cost, where the Jacobian is wide and where it is tall?

    python benchmarks/jit_jacobians.py [--device cuda] [--quick] [--repeats N] [--only TEXT] [--json FILE] [--plot FILE]
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import contenders
import jax
import models
import torch
from contenders import Work

import torchbatch

ASKED = {"jax": 1.0}


def hessian_by_hand(p: models.Params, x: torch.Tensor) -> torch.Tensor:
    """``[n] -> [n, n]``, of a network with two hidden layers and one output."""
    h1 = torch.tanh(torch.mv(p["w1"], x) + p["b1"])
    h2 = torch.tanh(torch.mv(p["w2"], h1) + p["b2"])
    s1, s2 = 1 - h1 * h1, 1 - h2 * h2
    g2 = p["w3"][0] * s2
    J2 = p["w2"] @ (s1[:, None] * p["w1"])
    return J2.T @ ((-2 * h2 * g2)[:, None] * J2) + p["w1"].T @ ((-2 * h1 * s1 * (g2 @ p["w2"]))[:, None] * p["w1"])


def jacobian_by_hand(p: models.Params, x: torch.Tensor) -> torch.Tensor:
    """``[n] -> [m, n]``, multiplied from the side that has fewer rows."""
    h1 = torch.tanh(torch.mv(p["w1"], x) + p["b1"])
    h2 = torch.tanh(torch.mv(p["w2"], h1) + p["b2"])
    s1, s2 = 1 - h1 * h1, 1 - h2 * h2
    if len(p["b3"]) < len(x):
        return (((p["w3"] * s2) @ p["w2"]) * s1) @ p["w1"]
    return p["w3"] @ (s2[:, None] * (p["w2"] @ (s1[:, None] * p["w1"])))


def work(name: str, transform: str, sizes: tuple[int, ...], device: str) -> Work:
    """The derivative of a network with layers of these sizes by its input."""
    p = models.made(models.layers(*sizes), device)
    x = torch.randn(sizes[0], device=device)
    scalar = sizes[-1] == 1

    def f(x: Any) -> Any:
        y = models.mlp(p, x)
        return y[0] if scalar else y

    arrays = jax.tree.map(lambda value: jax.numpy.asarray(value.cpu().numpy()), p)

    def f_jax(x: Any) -> Any:
        y = models.mlp_jax(arrays, x)
        return y[0] if scalar else y

    by_hand = hessian_by_hand if scalar else jacobian_by_hand
    calls = contenders.contenders(
        getattr(torchbatch, transform)(f),
        getattr(torch.func, transform)(f),
        getattr(jax, transform)(f_jax),
        lambda x: by_hand(p, x),
        (x,),
    )
    return Work(name, calls | {"loop": lambda: _loop(f, x, scalar)}, ASKED, 1e-4)


def _loop(f: Any, x: torch.Tensor, scalar: bool) -> torch.Tensor:
    """One backward pass for each row."""
    leaf = x.clone().requires_grad_()
    rows = torch.autograd.grad(f(leaf), leaf, create_graph=True)[0] if scalar else f(leaf)
    return torch.stack([torch.autograd.grad(row, leaf, retain_graph=True)[0] for row in rows])


def works(device: str) -> Iterator[Work]:
    """All rows."""
    yield work("Hessian, 64-128-128-1", "hessian", (64, 128, 128, 1), device)
    yield work("jacrev, wide: 256 to 8", "jacrev", (256, 128, 128, 8), device)
    yield work("jacfwd, wide: 256 to 8", "jacfwd", (256, 128, 128, 8), device)
    yield work("jacrev, tall: 8 to 256", "jacrev", (8, 128, 128, 256), device)
    yield work("jacfwd, tall: 8 to 256", "jacfwd", (8, 128, 128, 256), device)


if __name__ == "__main__":
    options = contenders.options(__doc__)
    contenders.run(works(options.device), options)
