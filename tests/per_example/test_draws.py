"""Models that draw: a draw for each example, whatever the chunk and the compiler, of the right distribution."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from tests.per_example.models import Function
from torchbatch import lax, per_example
from torchbatch.errors import RandomnessError
from torchbatch.testing import assert_close

COUNT = 7


class Drawing(nn.Module):
    """Multiplies by a weight what a function makes of the input: the gradient of the sum is what was drawn."""

    def __init__(self, draw, size=6):
        super().__init__()
        self.draw, self.weight = draw, nn.Parameter(torch.ones(size))

    def forward(self, x):
        return self.draw(x) * self.weight


def _sum(output):
    return output.sum()


def _drawn(draw, x, seed=0, size=None, **options):
    """What was drawn for each example."""
    torch.manual_seed(seed)
    model = Drawing(draw, size or x.shape[-1])
    return per_example.gradients(model, _sum, **{"targets": 0, "compile": False, **options})(x)["weight"]


def test_a_mask_for_each_example_whatever_the_chunk_and_reproducible():
    x = torch.ones(COUNT, 40)
    found = _drawn(F.dropout, x)
    assert set(found.unique().tolist()) == {0.0, 2.0}
    assert len({tuple(row.tolist()) for row in found}) == COUNT
    for size in (1, 3, 7, 10):
        assert torch.equal(_drawn(F.dropout, x, chunk_size=size), found)
    assert torch.equal(_drawn(F.dropout, x[:3]), found[:3])
    assert not torch.equal(_drawn(F.dropout, x, seed=1), found)


def test_a_mask_does_not_depend_on_the_compiler():
    x = torch.ones(COUNT, 40)
    assert torch.equal(_drawn(F.dropout, x, compile=True, chunk_size=3), _drawn(F.dropout, x))


def test_the_generator_moves_on_only_if_something_is_drawn():
    model, x = nn.Sequential(nn.Linear(3, 3), nn.Dropout()), torch.randn(4, 3)
    run = per_example.gradients(model, _sum, targets=0, compile=False)
    torch.manual_seed(0)
    first, second = run(x), run(x)
    assert not torch.equal(first["0.weight"], second["0.weight"])
    torch.manual_seed(0)
    assert torch.equal(run(x)["0.weight"], first["0.weight"])
    model.eval()
    before = torch.get_rng_state()
    per_example.gradients(model, _sum, targets=0, compile=False)(x)
    assert torch.equal(torch.get_rng_state(), before)


def test_all_quantities_of_a_call_see_the_same_masks():
    model, x = nn.Sequential(nn.Linear(5, 8), nn.Dropout(0.3), nn.Linear(8, 4)), torch.randn(COUNT, 5)

    def of(quantity, **options):
        torch.manual_seed(3)
        return quantity(model, _sum, targets=0, compile=False, **options)(x)

    whole = of(per_example.gradients, chunk_size=2)
    flat = torch.cat([value.flatten(1) for value in whole.values()], 1)
    assert_close(of(per_example.norms), flat.norm(dim=1))
    assert_close(of(per_example.norms, chunk_size=3), flat.norm(dim=1))
    v = {name: torch.ones_like(value) for name, value in model.named_parameters()}
    assert_close(of(per_example.dot, v=v), flat.sum(1))


#: A function that draws, what it is given, and the mean and the variance of what it draws.
DISTRIBUTIONS = {
    "dropout": (lambda x: F.dropout(x, 0.2), 1.0, 1.0, 0.25),
    "dropout in place": (lambda x: F.dropout(x * 1, 0.2, inplace=True), 1.0, 1.0, 0.25),
    "dropout in bfloat16": (lambda x: F.dropout(x.bfloat16(), 0.2), 1.0, 1.0, 0.25),
    "alpha_dropout": (lambda x: F.alpha_dropout(x, 0.3, True), 0.0, 0.0, None),
    "gumbel_softmax": (lambda x: F.gumbel_softmax(x.unflatten(-1, (-1, 2)), hard=True)[..., 0].repeat(2), 0.0, 0.5, 0.25),
    "rrelu": (lambda x: F.rrelu(x, 0.2, 0.4, training=True), -1.0, -0.3, 0.04 / 12),
    "rand": (lambda x: x * torch.rand(x.shape), 1.0, 0.5, 1 / 12),
    "rand_like": (lambda x: x * torch.rand_like(x), 1.0, 0.5, 1 / 12),
    "randn": (lambda x: x * torch.randn(x.shape), 1.0, 0.0, 1.0),
    "randn_like": (lambda x: x + torch.randn_like(x), 2.0, 2.0, 1.0),
    "normal": (lambda x: x * torch.normal(1.0, 2.0, x.shape), 1.0, 1.0, 4.0),
    "normal of tensors": (lambda x: torch.normal(x, 3 * torch.ones_like(x)), 1.0, 1.0, 9.0),
    "normal_": (lambda x: torch.empty_like(x).normal_(1, 2), 0.0, 1.0, 4.0),
    "uniform_": (lambda x: torch.empty_like(x).uniform_(1, 3), 0.0, 2.0, 4 / 12),
    "exponential_": (lambda x: torch.empty_like(x).exponential_(2.0), 0.0, 0.5, 0.25),
    "log_normal_": (lambda x: torch.empty_like(x).log_normal_(0, 0.5), 0.0, math.exp(0.125), math.exp(0.5) - math.exp(0.25)),
    "geometric_": (lambda x: torch.empty_like(x).geometric_(0.25), 0.0, 4.0, 12.0),
    "bernoulli": (torch.bernoulli, 0.3, 0.3, 0.21),
    "bernoulli_": (lambda x: torch.empty_like(x).bernoulli_(x), 0.3, 0.3, 0.21),
    "cauchy_": (lambda x: torch.empty_like(x).cauchy_(1, 2).sub(1).sign(), 0.0, 0.0, 1.0),
    "randint": (lambda x: torch.randint(2, 6, x.shape).float(), 0.0, 3.5, 1.25),
    "randint_like": (lambda x: torch.randint_like(x, 4), 0.0, 1.5, 1.25),
    "randperm": (lambda x: torch.randperm(x.shape[-1]).float() / (x.shape[-1] - 1), 0.0, 0.5, 1 / 12),
    "multinomial": (lambda x: torch.multinomial(torch.tensor([0.25, 0.75]), x.shape[-1], True).float(), 0.0, 0.75, 0.1875),
}


@pytest.fixture(scope="module")
def drawn():
    """What each of these functions draws for six examples, all in one model."""
    def draw(x):
        return torch.stack([draw(torch.full_like(x[0], given)).float() for draw, given, _, _ in DISTRIBUTIONS.values()])

    return dict(zip(DISTRIBUTIONS, _drawn(draw, torch.zeros(6, 800), size=(len(DISTRIBUTIONS), 800)).unbind(1), strict=True))


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_distribution(name, drawn):
    _, _, mean, variance = DISTRIBUTIONS[name]
    values = drawn[name]
    assert (values[0] != values[1]).any()
    several = values.numel() ** -0.5
    if variance is None:
        variance = float(values.var())
        assert variance > 0.1
    assert abs(float(values.mean()) - mean) < 5 * math.sqrt(variance) * several
    assert abs(float(values.var()) / variance - 1) < 20 * several


def test_dropout_of_whole_channels():
    torch.manual_seed(0)
    model = Drawing(nn.Dropout2d(0.5), (6, 3, 3))
    found = per_example.gradients(model, _sum, targets=0, compile=False)(torch.ones(COUNT, 6, 3, 3))["weight"]
    assert bool((found == found[:, :, :1, :1]).all()) and found.unique().tolist() == [0.0, 2.0]


def test_two_draws_of_an_example_are_not_the_same():
    def draw(x):
        return F.dropout(x) - F.dropout(x) + 3 * (torch.rand_like(x) - torch.rand_like(x))

    assert bool((_drawn(draw, torch.ones(2, 50)) != 0).all())


def test_gradients_are_those_of_the_loop_with_the_same_masks():
    torch.manual_seed(0)
    first, second = nn.Linear(5, 8).double(), nn.Linear(8, 3).double()
    mask = nn.Parameter(torch.ones(8, dtype=torch.float64))
    x, y = torch.randn(COUNT, 5).double(), torch.randn(COUNT, 3).double()

    def forward(self, x):
        return self.second(F.dropout(torch.tanh(self.first(x)), 0.4) * self.mask)

    model = Function(forward, first=first, second=second, mask=mask)
    torch.manual_seed(5)
    found = per_example.gradients(model, F.mse_loss, compile=False)(x, y)
    for i in range(COUNT):
        hidden = torch.tanh(first(x[i]))
        dropped = found["mask"][i] != 0
        kept = dropped.double() / 0.6
        loss = F.mse_loss(second(hidden * kept), y[i])
        expected = torch.autograd.grad(loss, [first.weight, second.weight])
        assert_close(found["first.weight"][i], expected[0])
        assert_close(found["second.weight"][i], expected[1])
        assert 0 < int(dropped.sum()) <= 8


def _summed_over_weights(model, x):
    torch.manual_seed(1)
    criterion = Function(lambda self, output: (output[0] if isinstance(output, tuple) else output).sum())
    found = per_example.gradients(model, criterion, targets=0, compile=False)(*x)
    return torch.cat([value.flatten(1) for value in found.values()], 1)


@pytest.mark.parametrize(
    "model",
    [
        nn.MultiheadAttention(4, 2, dropout=0.5, batch_first=True),
        nn.LSTM(4, 2, num_layers=2, dropout=0.5, batch_first=True),
        nn.Sequential(nn.Conv1d(3, 4, 1), nn.FeatureAlphaDropout()),
    ],
    ids=lambda model: type(model).__name__,
)
def test_networks_with_dropout_inside(model):
    x = torch.randn(1, 3, 4).expand(4, -1, -1)  # examples that differ by their masks alone
    x = (x, x, x) if isinstance(model, nn.MultiheadAttention) else (x,)
    found = _summed_over_weights(model, x)
    assert all(not torch.allclose(found[i], found[0]) for i in range(1, 4))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_what_is_checkpointed_draws_the_same_in_both_passes(use_reentrant):
    def draw(x):
        return F.dropout(x * 1)

    def forward(self, x):
        kept = checkpoint(lambda x: F.dropout(x * self.weight) * self.weight, x, use_reentrant=use_reentrant)
        return kept * self.other

    model = Function(forward, weight=nn.Parameter(torch.full((40,), 3.0)), other=nn.Parameter(torch.ones(40)))
    found = per_example.gradients(model, _sum, targets=0, compile=False)(torch.ones(2, 40))
    assert_close(found["other"] / 3, found["weight"] / 2)
    assert set(found["weight"].unique().tolist()) == {0.0, 12.0}


def test_what_cannot_be_drawn():
    with pytest.raises(RandomnessError, match=r"^per_example: the model draws random numbers with poisson, for which there is"):
        _drawn(torch.poisson, torch.ones(2, 3))
    with pytest.raises(RandomnessError, match=r"^per_example: the model hands rand a generator, which knows no examples."):
        _drawn(lambda x: torch.rand(3, generator=torch.Generator()), torch.ones(2, 3))
    with pytest.raises(RandomnessError, match=r"^per_example: the model hands bernoulli a generator"):
        _drawn(lambda x: torch.bernoulli(x, generator=torch.Generator()), torch.ones(2, 3))


def test_draws_inside_a_loop():
    def draw(x):
        return lax.scan(lambda carry, now: (carry + F.dropout(now), None), torch.zeros(3), x.reshape(2, 3))[0]

    with pytest.raises(RandomnessError, match=r"^per_example: the model draws random numbers inside a loop or a branch"):
        _drawn(draw, torch.ones(2, 6), size=3)
