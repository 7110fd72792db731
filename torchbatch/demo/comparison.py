"""The same gradients twice: one ``vmap(grad(loss))``, and a Python loop that calls autograd image by image."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from torchbatch.demo.data import Digits
from torchbatch.demo.model import Loss, Params, loss_of, parameters
from torchbatch.demo.training import per_example_gradients

Gradients = Callable[[Params, Tensor, Tensor], Params]


class Comparison(NamedTuple):
    """How far apart the two results are, and how long each took (seconds; the median of ``repetitions``)."""

    images: int
    numbers: int
    max_absolute_error: float
    max_relative_error: float
    loop_seconds: float
    vmap_seconds: float
    repetitions: int

    @property
    def speedup(self) -> float:
        """How many times faster vmap was."""
        return self.loop_seconds / self.vmap_seconds


def loop_gradients(loss: Loss) -> Gradients:
    """The gradient for every image, one after the other, by plain autograd; nothing of torchbatch is in it."""

    def gradients_of(params: Params, images: Tensor, labels: Tensor) -> Params:
        leaves = {name: value.detach().requires_grad_() for name, value in params.items()}
        rows = [
            torch.autograd.grad(loss(leaves, image, label), list(leaves.values()))
            for image, label in zip(images, labels, strict=True)
        ]
        return {name: torch.stack(column) for name, column in zip(leaves, zip(*rows, strict=True), strict=True)}

    return gradients_of


def compare(model: nn.Module, digits: Digits, repetitions: int) -> Comparison:
    """Take the gradients of ``digits`` both ways, compare every number, and time the two in turn."""
    loss, params = loss_of(model), parameters(model)
    vmapped, looped = per_example_gradients(loss), loop_gradients(loss)

    def call(gradients_of: Gradients) -> Params:
        return gradients_of(params, digits.images, digits.labels)

    absolute, relative = errors(call(vmapped), call(looped))
    times = [(seconds(call, looped), seconds(call, vmapped)) for _ in range(repetitions)]
    loop_times, vmap_times = zip(*times, strict=True)
    numbers = len(digits) * sum(value.numel() for value in params.values())
    medians = statistics.median(loop_times), statistics.median(vmap_times)
    return Comparison(len(digits), numbers, absolute, relative, *medians, repetitions)


def errors(found: Params, expected: Params) -> tuple[float, float]:
    """The largest difference, and the largest one relative to the largest number in its parameter."""
    gaps = torch.stack([(found[name] - expected[name]).abs().max() for name in expected])
    scales = torch.stack([value.abs().max() for value in expected.values()])
    relative = torch.where(gaps == 0, gaps, gaps / scales)
    return gaps.max().item(), relative.max().item()


def seconds(call: Callable[[Gradients], object], argument: Gradients) -> float:
    """How long one call takes, the accelerator's work included."""
    synchronize()
    start = time.perf_counter()
    call(argument)
    synchronize()
    return time.perf_counter() - start


def synchronize() -> None:
    """Wait until the accelerator, where one is in use, has done what was asked of it."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
