"""The cells of recurrent networks, whose own kernels write one sample's gates into a tensor that all samples share.

Source: the formulas in the documentation of ``torch.nn.LSTMCell``, ``GRUCell`` and ``RNNCell``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from torchbatch._torch import overlay


def lstm_cell(x: Tensor, state: Sequence[Tensor], *weights: Any) -> tuple[Tensor, Tensor]:
    """The next hidden and cell state."""
    hidden, cell = state
    from_x, from_hidden = _gates(x, hidden, *weights)
    enter, forget, new, leave = (from_x + from_hidden).chunk(4, -1)
    cell = forget.sigmoid() * cell + enter.sigmoid() * new.tanh()
    return leave.sigmoid() * cell.tanh(), cell


def gru_cell(x: Tensor, hidden: Tensor, *weights: Any) -> Tensor:
    """The next hidden state."""
    from_x, from_hidden = _gates(x, hidden, *weights)
    x_reset, x_keep, x_new = from_x.chunk(3, -1)
    h_reset, h_keep, h_new = from_hidden.chunk(3, -1)
    new = (x_new + (x_reset + h_reset).sigmoid() * h_new).tanh()
    return new + (x_keep + h_keep).sigmoid() * (hidden - new)


def _rnn_cell(activation: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    def cell(x: Tensor, hidden: Tensor, *weights: Any) -> Tensor:
        from_x, from_hidden = _gates(x, hidden, *weights)
        return activation(from_x + from_hidden)

    return cell


def _gates(x: Tensor, hidden: Tensor, of_x: Tensor, of_hidden: Tensor, *biases: Tensor | None) -> tuple[Tensor, Tensor]:
    bias_x, bias_hidden = (*biases, None, None)[:2]
    return linear(x, of_x, bias_x), linear(hidden, of_hidden, bias_hidden)


_CELLS: dict[str, Callable[..., Any]] = {
    "lstm_cell": lstm_cell,
    "gru_cell": gru_cell,
    "rnn_tanh_cell": _rnn_cell(torch.tanh),
    "rnn_relu_cell": _rnn_cell(torch.relu),
}


def _instead(operator: overlay.Operator) -> overlay.Operator:
    return _CELLS[operator.__name__]


REGISTERED = [name for name in _CELLS if overlay.register(name, _instead)]
