"""The network, and its loss for one image: nothing in this file knows about batches."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from torchbatch.demo.data import CLASSES

Params = dict[str, Tensor]
Loss = Callable[[Params, Tensor, Tensor], Tensor]


class SmallCNN(nn.Sequential):
    """Two convolutions, two linear layers; group norm, since batch norm would mix the images of a batch."""

    def __init__(self) -> None:
        super().__init__(
            *(nn.Conv2d(1, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(16, 32, 3, padding=1), nn.GroupNorm(4, 32), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, CLASSES)),
        )


def parameters(model: nn.Module) -> Params:
    """The parameters by name, cut off from the module's own autograd."""
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def loss_of(model: nn.Module) -> Loss:
    """The loss of one image: ``({parameters}, [1, 8, 8], []) -> []``."""

    def loss(params: Params, image: Tensor, label: Tensor) -> Tensor:
        logits = functional_call(model, params, (image[None],))
        return F.cross_entropy(logits, label[None])

    return loss


@torch.no_grad()
def probabilities(model: nn.Module, images: Tensor) -> Tensor:
    """What the network takes each image for: ``[n, 1, 8, 8] -> [n, 10]``."""
    output: Tensor = model(images)
    return output.softmax(dim=1)
