"""Per-example gradients as one writes them without a transform: one backward pass over the batch, whose gradients of the
layers' outputs give each example's gradient of the weights by an outer product.
"""

from __future__ import annotations

from typing import Any

import models
import torch
import torch.nn.functional as F
from models import HEADS, HIDDEN, LENGTH, WIDTH, Params


class Record:
    """The linear layers of a forward pass over a batch: what went in, and what came out."""

    def __init__(self) -> None:
        self.uses: list[tuple[str, str | None, torch.Tensor, torch.Tensor]] = []

    def linear(self, p: Params, weight: str, bias: str | None, x: torch.Tensor) -> torch.Tensor:
        """``x @ weight.T + bias``, remembered."""
        y = F.linear(x, p[weight], p[bias] if bias else None)
        y.requires_grad_()
        self.uses.append((weight, bias, x.detach(), y))
        return y

    def scale(self, p: Params, weight: str, bias: str, x: torch.Tensor) -> torch.Tensor:
        """``x * weight + bias``, remembered."""
        y = torch.addcmul(p[bias], x, p[weight])
        y.requires_grad_()
        self.uses.append((weight, bias, x.detach(), y))
        return y

    def gradients(self, loss: torch.Tensor) -> Params:
        """Each example's gradient of each weight."""
        found: dict[str, torch.Tensor] = {}
        for (weight, bias, x, _), dy in zip(self.uses, self._of_outputs(loss), strict=True):
            scaled = x.shape == dy.shape and weight.startswith("n")
            _add(found, weight, _sum(dy * x) if scaled else _outer(dy, x))
            if bias is not None:
                _add(found, bias, _sum(dy))
        return found

    def _of_outputs(self, loss: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(loss, [y for *_, y in self.uses])


def _add(found: dict[str, torch.Tensor], name: str, value: torch.Tensor) -> None:
    found[name] = found[name] + value if name in found else value


def _sum(value: torch.Tensor) -> torch.Tensor:
    return value.flatten(1, -2).sum(1) if value.dim() > 2 else value


def _outer(dy: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """``[b, …, m], [b, …, n] -> [b, m, n]``."""
    if dy.dim() == 2:
        return dy[:, :, None] * x[:, None]
    return dy.transpose(1, 2) @ x


def mlp_pairs(p: Params, x: torch.Tensor, y: torch.Tensor) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """For each layer the gradient of what comes out, and what goes in; the backward pass is written out."""
    h1 = torch.tanh(torch.addmm(p["b1"], x, p["w1"].T))
    h2 = torch.tanh(torch.addmm(p["b2"], h1, p["w2"].T))
    d3 = torch.softmax(torch.addmm(p["b3"], h2, p["w3"].T), 1)
    d3[torch.arange(len(y), device=y.device), y] -= 1
    d2 = (d3 @ p["w3"]) * (1 - h2 * h2)
    d1 = (d2 @ p["w2"]) * (1 - h1 * h1)
    return {"1": (d1, x), "2": (d2, h1), "3": (d3, h2)}


def mlp(p: Params, x: torch.Tensor, y: torch.Tensor) -> Any:
    """Outer products."""
    pairs = mlp_pairs(p, x, y)
    return {name: d if name[0] == "b" else _outer(d, h) for name in p for d, h in [pairs[name[1]]]}


def _convolved(record: list[Any], p: Params, kernel: str, bias: str, x: torch.Tensor) -> torch.Tensor:
    y = F.conv2d(x, p[kernel], p[bias], padding=1).requires_grad_()
    record.append((kernel, bias, x.detach(), y))
    return y


def cnn(p: Params, x: torch.Tensor, y: torch.Tensor) -> Any:
    """The kernels' gradients by unfolded inputs and a batched matrix product."""
    record, convolutions = Record(), []
    h = F.max_pool2d(F.relu(_convolved(convolutions, p, "c1", "d1", x)), 2)
    h = F.max_pool2d(F.relu(_convolved(convolutions, p, "c2", "d2", h)), 2)
    loss = F.cross_entropy(record.linear(p, "w", "b", h.flatten(1)), y, reduction="sum")
    *of_convolutions, dy = torch.autograd.grad(loss, [c[3] for c in convolutions] + [record.uses[0][3]])
    found = {}
    for (kernel, bias, before, _), d in zip(convolutions, of_convolutions, strict=True):
        columns = F.unfold(before, 3, padding=1)
        found[kernel] = (d.flatten(2) @ columns.transpose(1, 2)).view(len(x), *p[kernel].shape)
        found[bias] = d.flatten(2).sum(2)
    return found | {"w": _outer(dy, record.uses[0][2]), "b": dy}


def transformer(p: Params, x: torch.Tensor, y: torch.Tensor) -> Any:
    """The block over a batch."""
    record = Record()
    normed = record.scale(p, "n1", "m1", F.layer_norm(x, (WIDTH,)))
    qkv = record.linear(p, "qkv", None, normed).view(-1, LENGTH, 3, HEADS, WIDTH // HEADS)
    mixed = F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4)).transpose(1, 2).reshape(-1, LENGTH, WIDTH)
    x = x + record.linear(p, "o", None, mixed)
    normed = record.scale(p, "n2", "m2", F.layer_norm(x, (WIDTH,)))
    x = x + record.linear(p, "w2", "b2", F.gelu(record.linear(p, "w1", "b1", normed)))
    loss = F.cross_entropy(record.linear(p, "w", "b", x.mean(1)), y, reduction="sum")
    found = record.gradients(loss)
    return {name: found[name] for name in p}


def lstm(p: Params, xs: torch.Tensor, y: torch.Tensor) -> Any:
    """The cell over a batch; the weights' gradients of all steps are one batched matrix product."""
    h = c = xs.new_zeros(len(xs), HIDDEN)
    before, gates = [], []
    for x in (xs @ p["ih"].T + p["z"]).unbind(1):
        before.append(h.detach())
        gates.append(torch.addmm(x, h, p["hh"].T).requires_grad_())
        i, f, g, o = gates[-1].chunk(4, 1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
    logits = torch.addmm(p["b"], h, p["w"].T)
    *of_gates, d = torch.autograd.grad(F.cross_entropy(logits, y, reduction="sum"), [*gates, logits])
    dz = torch.stack(of_gates, 1)
    return {
        "ih": _outer(dz, xs), "hh": _outer(dz, torch.stack(before, 1)), "z": dz.sum(1), "w": _outer(d, h.detach()), "b": d
    }  # fmt: skip


FORMS = {"mlp": mlp, "cnn": cnn, "transformer": transformer, "lstm": lstm}
SHAPES = {"mlp": models.layers(784, 128, 128, 10), "cnn": models.CNN, "transformer": models.TRANSFORMER, "lstm": models.LSTM}
