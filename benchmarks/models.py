"""The networks of the benchmarks, each for one example and twice: in PyTorch and in JAX, with one dict of parameters."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import torch
import torch.nn.functional as F

Params = dict[str, torch.Tensor]


def made(shapes: dict[str, tuple[int, ...]], device: str = "cpu") -> Params:
    """Parameters with these shapes, of a size that keeps activations near 1."""
    torch.manual_seed(0)
    fan_in = {name: torch.Size(shape[1:]).numel() for name, shape in shapes.items()}
    return {name: torch.randn(shape, device=device) / max(fan_in[name], 1) ** 0.5 for name, shape in shapes.items()}


def layers(*sizes: int) -> dict[str, tuple[int, ...]]:
    """The shapes of a network of dense layers."""
    found: dict[str, tuple[int, ...]] = {}
    for i, (before, after) in enumerate(itertools.pairwise(sizes), 1):
        found |= {f"w{i}": (after, before), f"b{i}": (after,)}
    return found


def cross_entropy(logits, label):
    """``[c], [] -> []`` in JAX."""
    return -jax.nn.log_softmax(logits)[label]


def mlp(p, x):
    """``[784] -> [10]``."""
    x = torch.tanh(p["w1"] @ x + p["b1"])
    x = torch.tanh(p["w2"] @ x + p["b2"])
    return p["w3"] @ x + p["b3"]


def mlp_jax(p, x):
    """The same in JAX."""
    x = jnp.tanh(p["w1"] @ x + p["b1"])
    x = jnp.tanh(p["w2"] @ x + p["b2"])
    return p["w3"] @ x + p["b3"]


CNN = {"c1": (8, 1, 3, 3), "d1": (8,), "c2": (16, 8, 3, 3), "d2": (16,), "w": (10, 16 * 7 * 7), "b": (10,)}


def cnn(p, x):
    """``[1, 28, 28] -> [10]``."""
    x = F.max_pool2d(F.relu(F.conv2d(x, p["c1"], p["d1"], padding=1)), 2)
    x = F.max_pool2d(F.relu(F.conv2d(x, p["c2"], p["d2"], padding=1)), 2)
    return p["w"] @ x.flatten() + p["b"]


def _convolved(x, kernel, bias):
    return jax.lax.conv_general_dilated(x[None], kernel, (1, 1), "SAME")[0] + bias[:, None, None]


def _pooled(x):
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 2, 2), (1, 2, 2), "VALID")


def cnn_jax(p, x):
    """The same in JAX."""
    x = _pooled(jax.nn.relu(_convolved(x, p["c1"], p["d1"])))
    x = _pooled(jax.nn.relu(_convolved(x, p["c2"], p["d2"])))
    return p["w"] @ x.flatten() + p["b"]


WIDTH, HEADS, LENGTH = 64, 4, 16
TRANSFORMER = {
    "n1": (WIDTH,), "m1": (WIDTH,), "qkv": (3 * WIDTH, WIDTH), "o": (WIDTH, WIDTH),
    "n2": (WIDTH,), "m2": (WIDTH,), **layers(WIDTH, 4 * WIDTH, WIDTH), "w": (10, WIDTH), "b": (10,),
}  # fmt: skip


def transformer(p, x):
    """``[16, 64] -> [10]``: attention and a feed-forward layer, then the mean over the sequence."""
    normed = F.layer_norm(x, (WIDTH,), p["n1"], p["m1"])
    q, k, v = (normed @ p["qkv"].T).reshape(LENGTH, 3, HEADS, WIDTH // HEADS).permute(1, 2, 0, 3)
    weights = torch.softmax(q @ k.transpose(-2, -1) / (WIDTH // HEADS) ** 0.5, -1)
    x = x + (weights @ v).transpose(0, 1).reshape(LENGTH, WIDTH) @ p["o"].T
    normed = F.layer_norm(x, (WIDTH,), p["n2"], p["m2"])
    x = x + F.gelu(normed @ p["w1"].T + p["b1"]) @ p["w2"].T + p["b2"]
    return p["w"] @ x.mean(0) + p["b"]


def _normed(x, scale, shift):
    mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) / jnp.sqrt(variance + 1e-5) * scale + shift


def transformer_jax(p, x):
    """The same in JAX."""
    normed = _normed(x, p["n1"], p["m1"])
    q, k, v = (normed @ p["qkv"].T).reshape(LENGTH, 3, HEADS, WIDTH // HEADS).transpose(1, 2, 0, 3)
    weights = jax.nn.softmax(q @ k.transpose(0, 2, 1) / (WIDTH // HEADS) ** 0.5, -1)
    x = x + (weights @ v).transpose(1, 0, 2).reshape(LENGTH, WIDTH) @ p["o"].T
    normed = _normed(x, p["n2"], p["m2"])
    x = x + jax.nn.gelu(normed @ p["w1"].T + p["b1"], approximate=False) @ p["w2"].T + p["b2"]
    return p["w"] @ x.mean(0) + p["b"]


INPUT, HIDDEN, STEPS = 32, 64, 10
LSTM = {"ih": (4 * HIDDEN, INPUT), "hh": (4 * HIDDEN, HIDDEN), "z": (4 * HIDDEN,), "w": (10, HIDDEN), "b": (10,)}


def lstm(p, xs):
    """``[10, 32] -> [10]``: the cell over a short sequence."""
    h = c = xs.new_zeros(HIDDEN)
    for x in xs:
        i, f, g, o = (p["ih"] @ x + p["hh"] @ h + p["z"]).chunk(4)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
    return p["w"] @ h + p["b"]


def lstm_jax(p, xs):
    """The same in JAX; the loop is unrolled there too."""
    h = c = jnp.zeros(HIDDEN)
    for x in xs:
        i, f, g, o = jnp.split(p["ih"] @ x + p["hh"] @ h + p["z"], 4)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
    return p["w"] @ h + p["b"]
