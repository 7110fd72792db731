"""Training with per-example gradients: each image's gradient is cut to a norm before the gradients are averaged."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

import torchbatch as tb
from torchbatch.demo.data import Digits
from torchbatch.demo.model import Loss, Params, loss_of, parameters


class Step(NamedTuple):
    """One step of training: the epoch it belongs to, and the share of the images whose gradient was cut."""

    epoch: int
    clipped: float


def per_example_gradients(loss: Loss) -> Callable[[Params, Tensor, Tensor], Params]:
    """The gradient of the loss for every image of a batch: each one as large as the parameters."""
    return tb.vmap(tb.grad(loss), in_axes=(None, 0, 0))


def norms(gradients: Params) -> Tensor:
    """The length of every image's gradient, over all parameters: ``{[n, ...]} -> [n]``."""
    squares = [gradient.flatten(1).square().sum(dim=1) for gradient in gradients.values()]
    return torch.stack(squares).sum(dim=0).sqrt()


def clipped_mean(gradients: Params, max_norm: float) -> tuple[Params, Tensor]:
    """The mean of the gradients, each cut to ``max_norm``, and their lengths before: ``{[n, ...]} -> {[...]}, [n]``."""
    lengths = norms(gradients)
    weights = (max_norm / lengths.clamp_min(max_norm)) / len(lengths)
    return {name: torch.tensordot(weights, gradient, dims=1) for name, gradient in gradients.items()}, lengths


def steps_per_epoch(images: int, batch_size: int) -> int:
    """How many steps one pass over the images takes; the last one may be smaller."""
    return -(-images // batch_size)


def train(
    model: nn.Module, digits: Digits, *, epochs: int, batch_size: int, max_norm: float, generator: torch.Generator
) -> Iterator[Step]:
    """Train ``model`` in place, one step each time the caller asks for the next."""
    gradients_of = per_example_gradients(loss_of(model))
    steps = epochs * steps_per_epoch(len(digits), batch_size)
    optimizer = torch.optim.Adam(model.parameters(), lr=4e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for epoch in range(epochs):
        order = torch.randperm(len(digits), generator=generator).to(digits.labels.device)
        for index in torch.split(order, batch_size):
            batch = digits[index]
            gradients = gradients_of(parameters(model), batch.images, batch.labels)
            mean, lengths = clipped_mean(gradients, max_norm)
            for name, parameter in model.named_parameters():
                parameter.grad = mean[name]
            optimizer.step()
            schedule.step()
            yield Step(epoch, (lengths > max_norm).float().mean().item())


def gradient_norms(model: nn.Module, digits: Digits, batch_size: int = 256) -> Tensor:
    """How long the gradient of every image is: a measure of how hard the network finds it."""
    gradients_of = per_example_gradients(loss_of(model))
    params = parameters(model)
    pieces = zip(torch.split(digits.images, batch_size), torch.split(digits.labels, batch_size), strict=True)
    return torch.cat([norms(gradients_of(params, images, labels)) for images, labels in pieces])
