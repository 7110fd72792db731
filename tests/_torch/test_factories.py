"""Factories: every one makes a tensor that can be written with per-sample values."""

from __future__ import annotations

import pytest
import torch

from torchbatch import vmap
from torchbatch._torch import factories
from torchbatch.testing import assert_close, loop

X = torch.rand(3, 4, generator=torch.Generator().manual_seed(0))
MAKERS = {
    "zeros": lambda x: torch.zeros(4), "ones": lambda x: torch.ones(4), "full": lambda x: torch.full((4,), 2.0),
    "empty": lambda x: torch.empty(4).zero_(), "arange": lambda x: torch.arange(4.0), "arange 2": lambda x: torch.arange(1.0, 5),
    "arange 3": lambda x: torch.arange(0.0, 8, 2), "linspace": lambda x: torch.linspace(0, 1, 4),
    "logspace": lambda x: torch.logspace(0, 1, 4), "eye": lambda x: torch.eye(4)[0], "eye 2": lambda x: torch.eye(2, 4)[1],
    "tensor": lambda x: torch.tensor([1.0, 2, 3, 4]), "new_zeros": lambda x: x.new_zeros(4), "new_ones": lambda x: x.new_ones(4),
    "new_full": lambda x: x.new_full((4,), 3.0), "new_tensor": lambda x: x.new_tensor([1.0, 2, 3, 4]),
    "zeros_like": lambda x: torch.zeros_like(x), "ones_like": lambda x: torch.ones_like(x),
    "full_like": lambda x: torch.full_like(x, 2), "clone": lambda x: OUTSIDE.clone(),
    "hann_window": lambda x: torch.hann_window(4),
    "tril_indices": lambda x: torch.tril_indices(3, 3)[0].float()[:4], "vander": lambda x: torch.vander(OUTSIDE)[0],
    "like a constant": lambda x: torch.zeros_like(OUTSIDE), "empty_permuted": lambda x: torch.empty_permuted((4,), (0,)).fill_(1),
    "range": lambda x: torch.range(1, 4), "kaiser_window": lambda x: torch.kaiser_window(4),
    "scalar_tensor": lambda x: torch.ones(()).repeat(4),
    "list": lambda x: torch.as_tensor([1.0, 2.0, 3.0, 4.0]), "stack": lambda x: torch.stack([torch.zeros(())] * 4),
}  # fmt: skip
OUTSIDE = torch.arange(4.0)


@pytest.mark.filterwarnings("ignore:torch.range")
@pytest.mark.parametrize("name", MAKERS)
def test_what_is_made_can_be_written(name):
    def write(x):
        room = MAKERS[name](x)
        room[1:] += x[1:]
        room[0] = x.sum()
        return room

    assert_close(vmap(write)(X), loop(write)(X))


def test_the_lists_name_what_exists():
    assert set(factories.REGISTERED) <= set(factories.FACTORIES)
    assert {"zeros", "empty.memory_format", "clone", "arange.start_step"} <= set(factories.REGISTERED)
    assert {torch.zeros, torch.arange, torch.eye, torch.tensor, torch.Tensor.new_zeros} <= factories.WRITABLE


@pytest.mark.parametrize("make", [lambda: torch.ones(2), lambda: torch.arange(2.0), lambda: torch.rand(2) * 0])
def test_with_room_gives_new_tensors_their_room(make):
    def write(x):
        with factories.WithRoom(x[0] > 0):
            room = make()
            room[0] = x[0]
        return room

    assert_close(vmap(write, randomness="different")(X)[:, 0], X[:, 0])
