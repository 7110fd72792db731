"""nn.LSTM, nn.GRU and nn.RNN under vmap: as the loop, and never run as one."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

import torchbatch
from torchbatch import grad, hessian, jacfwd, jacrev, jit, jvp, vmap
from torchbatch.errors import RandomnessError, UnsupportedOperationError
from torchbatch.testing import assert_close, loop

KINDS = {
    "lstm": (nn.LSTM, {}),
    "projected": (nn.LSTM, {"proj_size": 2}),
    "gru": (nn.GRU, {}),
    "tanh": (nn.RNN, {}),
    "relu": (nn.RNN, {"nonlinearity": "relu"}),
}
SETTINGS = [
    dict(zip(("num_layers", "bidirectional", "batch_first", "bias"), values, strict=True))
    for values in [(1, False, False, True), (2, True, False, True), (2, False, True, False), (1, True, True, False)]
]


@pytest.fixture(autouse=True)
def no_loops():
    torch.manual_seed(0)
    with torchbatch.fallback("error"):
        yield


def made(kind, **settings):
    cls, options = KINDS[kind]
    return cls(3, 4, **options, **settings)


def states_of(network, batch, samples=()):
    """A state for one sample, or for many."""
    layers = network.num_layers * (2 if network.bidirectional else 1)
    hidden = torch.randn(*samples, layers, *batch, network.proj_size or 4)
    return (hidden, torch.randn(*samples, layers, *batch, 4)) if isinstance(network, nn.LSTM) else hidden


def loss_of(network):
    def loss(params, x, *state):
        output, last = torch.func.functional_call(network, params, (x, *state))
        return output.square().sum() + sum(part.sin().sum() for part in (last if isinstance(last, tuple) else (last,)))

    return loss


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("settings", "batch"), zip(SETTINGS, [(2,), (2,), (2,), ()], strict=True), ids=str)
def test_values_and_gradients_are_the_loops(kind, settings, batch):
    network = made(kind, **settings)
    x = torch.randn(6, *((*batch, 5) if settings["batch_first"] else (5, *batch)), 3)
    params = dict(network.named_parameters())
    many = {name: value.detach() + 0.1 * torch.randn(6, *value.shape) for name, value in params.items()}
    gradient = grad(loss_of(network), (0, 1))
    for state, axis in [((), ()), ((states_of(network, batch),), (None,)), ((states_of(network, batch, (6,)),), (0,))]:
        axes = (0, *axis)
        assert_close(vmap(network, axes)(x, *state), loop(network, axes)(x, *state))
        for of_params, given in ((None, params), (0, many)) if axis else ():
            ours = vmap(gradient, (of_params, *axes))(given, x, *state)
            assert_close(ours, loop(gradient, (of_params, *axes))(given, x, *state))


@pytest.mark.parametrize("kind", KINDS)
def test_what_varies_may_be_the_weights_or_the_state_alone(kind):
    network = made(kind, num_layers=2, bidirectional=True)
    params, x = dict(network.named_parameters()), torch.randn(5, 2, 3)
    many = {name: value.detach() + 0.1 * torch.randn(6, *value.shape) for name, value in params.items()}
    loss = loss_of(network)
    assert_close(vmap(loss, (0, None))(many, x), loop(loss, (0, None))(many, x))
    xs = torch.randn(6, 5, 2, 3)
    assert_close(vmap(loss)(many, xs), loop(loss)(many, xs))
    state = states_of(network, (2,), (6,))
    assert_close(vmap(network, (None, 0))(x, state), loop(network, (None, 0))(x, state))


@pytest.mark.parametrize("kind", KINDS)
def test_in_every_order_with_other_transforms(kind):
    network, x = made(kind, num_layers=2), torch.randn(4, 3, 3)
    params = dict(network.named_parameters())
    one = lambda params, x: torch.func.functional_call(network, params, (x,))[0]  # noqa: E731
    assert_close(vmap(vmap(network))(x[None])[0][0], loop(network)(x)[0])
    assert_close(vmap(network, in_axes=1, out_axes=2)(x)[0], loop(network, in_axes=1, out_axes=2)(x)[0])

    def total(mapped):
        return lambda params: mapped(one, (None, 0))(params, x).square().sum()

    assert_close(grad(total(vmap))(params), grad(total(loop))(params))
    rows = torch.stack([torch.autograd.functional.jacobian(lambda x: one(params, x), sample) for sample in x])
    for jacobian in (jacrev, jacfwd):
        assert_close(vmap(jacobian(one, 1), (None, 0))(params, x), rows)
        assert_close(jacobian(lambda x: one(params, x))(x[0]), rows[0])
    moved = jvp(vmap(lambda x: one(params, x)), (x,), (x,))[1]
    assert_close(moved, torch.einsum("nabcd,ncd->nab", rows, x))
    curved = lambda x: one(params, x).sum()  # noqa: E731
    assert_close(
        vmap(hessian(curved))(x[:2]), torch.stack([torch.autograd.functional.hessian(curved, s) for s in x[:2]])
    )


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_traced(kind):
    network, x = made(kind), torch.randn(2, 2, 3)
    params, gradient = dict(network.named_parameters()), vmap(grad(loss_of(network)), (None, 0))
    assert_close(jit(gradient, backend="eager")(params, x), gradient(params, x))
    assert_close(jit(vmap(network), backend="eager")(x), vmap(network)(x))


@pytest.mark.parametrize(("kind", "gradients"), itertools.product(["lstm", "gru", "tanh"], [False, True]))
def test_dropout_between_layers(kind, gradients):
    network = made(kind, num_layers=2, dropout=0.5)
    x = torch.randn(3, 3).expand(6, 3, 3)
    run = grad(lambda x: network(x)[0].square().sum()) if gradients else lambda x: network(x)[0]
    different, same = (vmap(run, randomness=how)(x) for how in ("different", "same"))
    assert (different[0] != different[1]).any()
    assert (same[0] == same[1]).all()
    with pytest.raises(RandomnessError):
        vmap(run)(x)
    torch.manual_seed(3)
    mean = vmap(lambda x: network(x)[0], randomness="different")(x[0].expand(4000, 3, 3)).mean(0)
    torch.manual_seed(4)
    expected = torch.stack([network(x[0])[0].detach() for _ in range(2000)]).mean(0)
    assert_close(mean, expected, rtol=0, atol=0.03)
    assert_close(vmap(run)(x) if network.eval() else None, loop(run)(x))


def test_other_dtypes_and_empty_batches():
    network = made("lstm", bidirectional=True).double()
    x = torch.randn(4, 3, 3, dtype=torch.float64)
    assert_close(vmap(network)(x), loop(network)(x))
    assert vmap(network)(x[:0])[0].shape == (0, 3, 8)


def test_shared_weights_run_pytorchs_own_kernel_once():
    network, x = made("lstm"), torch.randn(4, 3, 3)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        vmap(network)(x)
    seen = [event.name for event in profile.events()]
    assert seen.count("aten::lstm") <= 2 and seen.count("aten::sigmoid") == 0


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_packed_sequences_are_refused_with_a_way_out(kind):
    network, x, lengths = kind(3, 4, batch_first=True), torch.randn(4, 2, 5, 3), torch.tensor([5, 3])

    def packed(x, lengths):
        sequences = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True)
        return nn.utils.rnn.pad_packed_sequence(network(sequences)[0], batch_first=True)[0]

    message = r"pack_padded_sequence cannot pack sequences that vary .* out\[length - 1\] is .*\n  in packed, .*\n    sequences ="
    for fun in (packed, grad(lambda x, lengths: packed(x, lengths).sum())):
        with pytest.raises(UnsupportedOperationError, match=message):
            vmap(fun, (0, None))(x, lengths)
    with pytest.raises(UnsupportedOperationError, match="pack_padded_sequence"):
        vmap(packed)(x, lengths.expand(4, 2))
    masked = vmap(lambda x: torch.where(torch.arange(5)[:, None] < lengths[:, None, None], network(x)[0], 0.0))(x)
    assert_close(masked, torch.stack([packed(each, lengths) for each in x]), atol=1e-5, rtol=1e-5)
    assert packed(x[0], lengths).shape == vmap(lambda y: packed(x[0], lengths) + y)(torch.zeros(2)).shape[1:]
