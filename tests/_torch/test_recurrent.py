"""Cells of recurrent networks: values and gradients as the loop's, without a warning."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import torchbatch
from torchbatch import vmap
from torchbatch.testing import assert_close, loop

CELLS = {
    "lstm": (lambda **k: nn.LSTMCell(3, 4, **k), 2),
    "gru": (lambda **k: nn.GRUCell(3, 4, **k), 1),
    "tanh": (lambda **k: nn.RNNCell(3, 4, **k), 1),
    "relu": (lambda **k: nn.RNNCell(3, 4, nonlinearity="relu", **k), 1),
}


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("mapped_state", [True, False, None])
def test_a_cell_equals_the_loop(name, bias, mapped_state):
    torch.manual_seed(0)
    make, states = CELLS[name]
    cell, x = make(bias=bias), torch.randn(5, 3)
    state = [torch.randn(5, 4) if mapped_state else torch.randn(4) for _ in range(states)]
    state = tuple(state) if states == 2 else state[0]
    args = (x,) if mapped_state is None else (x, state)
    axes = (0,) if mapped_state is None else (0, 0 if mapped_state else None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = vmap(cell, in_axes=axes)(*args)
    assert_close(ours, loop(cell, in_axes=axes)(*args))


@pytest.mark.parametrize("name", CELLS)
def test_gradients_of_a_handwritten_loop_over_time(name):
    torch.manual_seed(0)
    make, states = CELLS[name]
    cell, xs = make(), torch.randn(5, 6, 3)

    def last(sequence):
        state = torch.zeros(4) if states == 1 else (torch.zeros(4), torch.zeros(4))
        for x in sequence:
            state = cell(x, state)
        return (state if states == 1 else state[0]).square().sum()

    gradient = torchbatch.grad(last)
    assert_close(vmap(gradient)(xs), torch.stack([gradient(x) for x in xs]))
