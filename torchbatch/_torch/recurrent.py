"""Recurrent networks under ``vmap``: ``nn.LSTM``, ``nn.GRU``, ``nn.RNN`` and their cells, whose own kernels know no samples.

Where the weights are the same for all samples, and nothing inside the ``vmap`` is differentiated, the samples are put beside
the batch that a network has anyway, and PyTorch's own kernel runs once. Otherwise (gradients of each sample, an ensemble of
networks) the network runs step by step, one step for all samples at a time. PyTorch's kernels for cells write one sample's
gates into a tensor that all samples share, and PyTorch's definitions in Python leave out the dropout between layers.

Private names used: those of :mod:`torchbatch._torch.overlay`, :mod:`torchbatch._torch.levels` and
:mod:`torchbatch._torch.lowered`.

Source: the formulas in the documentation of ``torch.nn.LSTM``, ``GRU`` and ``RNN`` and of their cells.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from torchbatch._torch import caller, levels, lowered, overlay
from torchbatch.errors import UnsupportedOperationError

State = tuple[Tensor, ...]  # the hidden state, and of an LSTM the cell state
Step = Callable[[Tensor, Tensor, State], State]


# --- one step --------------------------------------------------------------------------------------------------------


def _lstm_step(from_x: Tensor, from_hidden: Tensor, state: State) -> State:
    enter, forget, new, leave = (from_x + from_hidden).chunk(4, -1)
    cell = forget.sigmoid() * state[1] + enter.sigmoid() * new.tanh()
    return leave.sigmoid() * cell.tanh(), cell


def _gru_step(from_x: Tensor, from_hidden: Tensor, state: State) -> State:
    x_reset, x_keep, x_new = from_x.chunk(3, -1)
    h_reset, h_keep, h_new = from_hidden.chunk(3, -1)
    new = (x_new + (x_reset + h_reset).sigmoid() * h_new).tanh()
    return (new + (x_keep + h_keep).sigmoid() * (state[0] - new),)


def _tanh_step(from_x: Tensor, from_hidden: Tensor, _: State) -> State:
    return (torch.tanh(from_x + from_hidden),)


def _relu_step(from_x: Tensor, from_hidden: Tensor, _: State) -> State:
    return (torch.relu(from_x + from_hidden),)


# --- cells -----------------------------------------------------------------------------------------------------------


def _cell(step: Step) -> Callable[..., Any]:
    def cell(x: Tensor, state: Any, of_x: Tensor, of_hidden: Tensor, *biases: Tensor | None) -> Any:
        given = (state,) if isinstance(state, Tensor) else tuple(state)
        bias_x, bias_hidden = (*biases, None, None)[:2]
        found = step(linear(x, of_x, bias_x), linear(given[0], of_hidden, bias_hidden), given)
        return found[0] if isinstance(state, Tensor) else found

    return cell


# --- networks --------------------------------------------------------------------------------------------------------


def _network(step: Step) -> Callable[..., Any]:
    """The network, step by step, as the operator of PyTorch takes it."""

    def network(
        x: Tensor,
        states: Sequence[Tensor],
        weights: Sequence[Tensor],
        has_biases: bool,
        num_layers: int,
        dropout: float,
        train: bool,
        bidirectional: bool,
        batch_first: bool,
    ) -> tuple[Tensor, ...]:
        x = x.transpose(0, 1) if batch_first else x
        directions = 2 if bidirectional else 1
        each = len(weights) // (num_layers * directions)
        lasts: list[State] = []
        for layer in range(num_layers):
            outputs = []
            for direction in range(directions):
                number = layer * directions + direction
                own = weights[number * each : (number + 1) * each]
                output, last = _along(step, x, tuple([state[number] for state in states]), own, has_biases, bool(direction))
                outputs.append(output)
                lasts.append(last)
            x = outputs[0] if directions == 1 else torch.cat(outputs, -1)
            if dropout and train and layer < num_layers - 1:
                x = torch.dropout(x, dropout, True)
        return (x.transpose(0, 1) if batch_first else x, *(torch.stack(parts) for parts in zip(*lasts, strict=True)))

    return network


def _along(
    step: Step, x: Tensor, state: State, weights: Sequence[Tensor], has_biases: bool, backwards: bool
) -> tuple[Tensor, State]:
    """One layer in one direction: the hidden states of all times, and the last state."""
    of_x, of_hidden = weights[:2]
    bias_x, bias_hidden = weights[2:4] if has_biases else (None, None)
    projection = weights[4 if has_biases else 2 :]
    from_x = linear(x, of_x, bias_x).unbind(0)
    outputs: list[Tensor] = []
    for now in reversed(from_x) if backwards else from_x:
        state = step(now, linear(state[0], of_hidden, bias_hidden), state)
        if projection:
            state = (linear(state[0], projection[0]), *state[1:])
        outputs.append(state[0])
    return torch.stack(outputs[::-1] if backwards else outputs), state


def _is_batched(value: Tensor, level: int) -> bool:
    return levels.is_batched_at(value, level)


def _fits_beside(transform: lowered.Transform, moving: Sequence[Tensor], weights: Sequence[Tensor], draws: bool) -> bool:
    """Whether the samples of the innermost map can go beside the batch of the network."""
    return (
        transform.is_map
        and not draws
        and any(_is_batched(value, transform.level) for value in moving)
        and not any(_is_batched(value, transform.level) for value in weights)
    )


def _beside(
    operator: overlay.Operator,
    transform: lowered.Transform,
    x: Tensor,
    states: Sequence[Tensor],
    rest: Sequence[Any],
    axis: int,
) -> tuple[Tensor, ...]:
    """The network run once, with the samples of the innermost map beside the batch, which is along ``axis`` of ``x``."""
    size = transform.size
    inside = [_folded(value, transform.level, size, at) for value, at in [(x, axis), *((state, 1) for state in states)]]
    with transform.outside():
        found = operator(inside[0], inside[1] if len(states) == 1 else inside[1:], *rest)
        places = [axis] + [1] * len(states)
        unfolded = [value.unflatten(at, (size, -1)) for value, at in zip(found, places, strict=True)]
    return tuple([levels.add_batch_dim(value, at, transform.level) for value, at in zip(unfolded, places, strict=True)])


def _folded(value: Tensor, level: int, size: int, axis: int) -> Tensor:
    """What a value is outside of a level, with the samples beside the axis ``axis``."""
    inside, at = levels.unwrap_batched(value, level)
    if at is None:
        inside = inside.unsqueeze(axis)
        inside = inside.expand(*inside.shape[:axis], size, *inside.shape[axis + 1 :])
    else:
        inside = inside.movedim(at, axis)
    return inside.flatten(axis, axis + 1)


class _Stepwise(threading.local):
    active = False


_stepwise = _Stepwise()


@contextlib.contextmanager
def step_by_step() -> Iterator[None]:
    """Networks run step by step also where nothing is mapped yet: a trace of one sample will be."""
    was, included = _stepwise.active, overlay.is_included(overlay.KEY)
    _stepwise.active = True
    overlay.include(overlay.KEY, True)
    try:
        yield
    finally:
        _stepwise.active = was
        overlay.include(overlay.KEY, included)


def _varies(value: Tensor) -> bool:
    return levels.is_wrapped(value) and any(True for _ in levels.batch_levels(value))


def _instead(step: Step, packet: Any) -> Callable[[overlay.Operator], overlay.Operator]:
    network = _network(step)

    def make(original: overlay.Operator) -> overlay.Operator:
        def kernel(x: Tensor, states: Any, weights: Sequence[Tensor], *options: Any) -> Any:
            x = lowered.alive(x)
            moving = [lowered.alive(state) for state in ([states] if isinstance(states, Tensor) else states)]
            _, _, dropout, train, _, batch_first = options
            transform = lowered.innermost()
            if transform is not None and x.numel() and _fits_beside(transform, [x, *moving], weights, bool(dropout and train)):
                return _beside(packet, transform, x, moving, (weights, *options), 0 if batch_first else 1)
            stepwise = _stepwise.active or any(map(_varies, (x, *moving, *weights)))
            if stepwise or (transform is not None and transform.is_forward):
                return network(x, moving, weights, *options)
            return original(x, states, weights, *options)

        return kernel

    return make


_STEPS: dict[str, Step] = {"lstm": _lstm_step, "gru": _gru_step, "rnn_tanh": _tanh_step, "rnn_relu": _relu_step}
_CELLS = {f"{name}_cell": _cell(step) for name, step in _STEPS.items()}


def _as_called(name: str) -> Callable[..., Any]:
    """A network as modules call it, step by step; one of a packed sequence stays what it is."""
    network, original = _network(_STEPS[name]), getattr(torch, name)

    def called(x: Tensor, states: Any, weights: Any, *options: Any) -> Any:
        if isinstance(weights, Tensor):
            return original(x, states, weights, *options)
        return network(x, [states] if isinstance(states, Tensor) else states, weights, *options)

    return called


#: For functions of PyTorch, those that do the same step by step.
STEPWISE = {getattr(torch, name): _as_called(name) for name in _STEPS} | {getattr(torch, name): _CELLS[name] for name in _CELLS}
REGISTERED = [name for name in _CELLS if overlay.register(name, lambda operator: _CELLS[operator.__name__])]
REGISTERED += [
    f"{name}.input"
    for name, step in _STEPS.items()
    if overlay.register(f"{name}.input", _instead(step, getattr(torch.ops.aten, name).input))
]


def _packing(original: overlay.Operator) -> overlay.Operator:
    """How many sequences go on at each step is a number in Python, and a pack of one sample is no part of a pack of all."""

    def kernel(*args: Any, **kwargs: Any) -> Any:
        if any(map(_varies, args[:2])):
            raise UnsupportedOperationError(
                "pack_padded_sequence cannot pack sequences that vary from sample to sample. Inside vmap, run the network on the "
                "padded sequences, and choose what counts: out[length - 1] is the last output of a sequence, and "
                f"torch.where(torch.arange(time) < length, out, 0.0) leaves the padding out.{caller.line()}"
            )
        return original(*args, **kwargs)

    return kernel


overlay.register("_pack_padded_sequence", _packing)
