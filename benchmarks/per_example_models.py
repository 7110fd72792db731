"""The networks of the benchmark of per-example gradients: as modules, and the same in JAX, with the modules' parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import torch
import torch.nn.functional as F
from torch import nn


class Network(NamedTuple):
    """A module, what its inputs look like, and the same network in JAX: ``in_jax(params, x)`` for one example."""

    name: str
    module: nn.Module
    shape: tuple[int, ...]
    in_jax: Callable[[Any, Any], Any]


def _dense(p, name, x):
    return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]


def mlp() -> Network:
    """Dense layers of 784-512-512-10."""
    module = nn.Sequential(nn.Linear(784, 512), nn.Tanh(), nn.Linear(512, 512), nn.Tanh(), nn.Linear(512, 10))

    def in_jax(p, x):
        return _dense(p, "4", jnp.tanh(_dense(p, "2", jnp.tanh(_dense(p, "0", x)))))

    return Network("MLP 784-512-512-10", module, (784,), in_jax)


def cnn() -> Network:
    """Two convolutions of 28 x 28 pixels."""
    first, second = nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 32, 3, padding=1)
    module = nn.Sequential(
        first, nn.ReLU(), nn.MaxPool2d(2), second, nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(32 * 49, 10)
    )

    def convolved(p, name, x):
        found = jax.lax.conv_general_dilated(x[None], p[f"{name}.weight"], (1, 1), "SAME")[0] + p[f"{name}.bias"][:, None, None]
        return jax.lax.reduce_window(jax.nn.relu(found), -jnp.inf, jax.lax.max, (1, 2, 2), (1, 2, 2), "VALID")

    def in_jax(p, x):
        return _dense(p, "7", convolved(p, "3", convolved(p, "0", x)).reshape(-1))

    return Network("CNN 28 x 28", module, (1, 28, 28), in_jax)


class Block(nn.Module):
    """Attention and a feed-forward layer, of layers that all contenders know, then the mean over the sequence."""

    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down, self.head = nn.Linear(width, 4 * width), nn.Linear(4 * width, width), nn.Linear(width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[B, t, width] -> [B, 10]``."""
        batch, length, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).reshape(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, length, width)
        x = x + self.out(mixed)
        x = x + self.down(F.gelu(self.up(self.norm2(x))))
        return self.head(x.mean(1))


def transformer(width: int, length: int) -> Network:
    """A transformer block."""

    def normed(p, name, x):
        mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
        return (x - mean) / jnp.sqrt(variance + 1e-5) * p[f"{name}.weight"] + p[f"{name}.bias"]

    def in_jax(p, x):
        q, k, v = _dense(p, "qkv", normed(p, "norm1", x)).reshape(length, 3, 4, -1).transpose(1, 2, 0, 3)
        weights = jax.nn.softmax(q @ k.transpose(0, 2, 1) / (width // 4) ** 0.5, -1)
        x = x + _dense(p, "out", (weights @ v).transpose(1, 0, 2).reshape(length, width))
        x = x + _dense(p, "down", jax.nn.gelu(_dense(p, "up", normed(p, "norm2", x)), approximate=False))
        return _dense(p, "head", x.mean(0))

    return Network(f"transformer block, {width} wide, {length} long", Block(width), (length, width), in_jax)


NETWORKS = (mlp, cnn, lambda: transformer(64, 32), lambda: transformer(256, 32))
