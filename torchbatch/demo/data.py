"""The digits: 1,797 real images of 8x8 pixels, shipped with the package (see ``data/digits/NOTICE.md``)."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources

import numpy as np
import torch
from torch import Tensor

CLASSES = 10


@dataclass(frozen=True)
class Digits:
    """Some of the images: ``images [n, 1, 8, 8]`` from 0 to 1, ``labels [n]``, ``numbers [n]`` in the data set."""

    images: Tensor
    labels: Tensor
    numbers: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Tensor | slice) -> Digits:
        return Digits(self.images[index], self.labels[index], self.numbers[index])

    def to(self, device: torch.device) -> Digits:
        """The same images on another device."""
        return Digits(self.images.to(device), self.labels.to(device), self.numbers.to(device))


def load() -> Digits:
    """All 1,797 images, in the order of the data set."""
    file = resources.files("torchbatch") / "data" / "digits" / "digits.npz"
    with file.open("rb") as stream, np.load(stream) as arrays:
        images = torch.from_numpy(arrays["images"])
        labels = torch.from_numpy(arrays["labels"])
    return Digits(images[:, None].float() / 16, labels.long(), torch.arange(len(labels)))


def split(digits: Digits, held_out: int, generator: torch.Generator) -> tuple[Digits, Digits]:
    """The images in random order, cut in two: those to train on and the last ``held_out``."""
    order = torch.randperm(len(digits), generator=generator)
    shuffled = digits[order]
    return shuffled[: len(digits) - held_out], shuffled[len(digits) - held_out :]
