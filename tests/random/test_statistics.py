"""The draws follow their distributions. The keys are fixed, so these tests either always pass or always fail."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from torchbatch import random, vmap

stats = pytest.importorskip("scipy.stats")
KEY = random.key(2024)
COUNT = (20_000,)
CONTINUOUS = {
    "uniform": (lambda: random.uniform(KEY, COUNT, minval=-1, maxval=3), stats.uniform(-1, 4)),
    "normal": (lambda: random.normal(KEY, COUNT), stats.norm()),
    "truncated_normal": (lambda: random.truncated_normal(KEY, -1.0, 2.0, COUNT), stats.truncnorm(-1, 2)),
    "exponential": (lambda: random.exponential(KEY, COUNT), stats.expon()),
    "laplace": (lambda: random.laplace(KEY, COUNT), stats.laplace()),
    "logistic": (lambda: random.logistic(KEY, COUNT), stats.logistic()),
    "gumbel": (lambda: random.gumbel(KEY, COUNT), stats.gumbel_r()),
    "gumbel, high": (lambda: random.gumbel(KEY, COUNT, mode="high"), stats.gumbel_r()),
    "gumbel, highest": (lambda: random.gumbel(KEY, COUNT, mode="highest"), stats.gumbel_r()),
    "cauchy": (lambda: random.cauchy(KEY, COUNT), stats.cauchy()),
    "gamma": (lambda: random.gamma(KEY, 2.5, COUNT), stats.gamma(2.5)),
    "small gamma": (lambda: random.gamma(KEY, 0.3, COUNT), stats.gamma(0.3)),
    "loggamma": (lambda: random.loggamma(KEY, 0.7, COUNT), stats.loggamma(0.7)),
    "beta": (lambda: random.beta(KEY, 0.5, 2.0, COUNT), stats.beta(0.5, 2.0)),
    "dirichlet": (lambda: random.dirichlet(KEY, torch.tensor([1.0, 2.0, 3.0]), COUNT)[:, 1], stats.beta(2, 4)),
    "ball, radius": (lambda: random.ball(KEY, 3, shape=COUNT).norm(dim=-1) ** 3, stats.uniform()),
    "ball of another norm": (lambda: random.ball(KEY, 2, 1.5, COUNT).norm(p=1.5, dim=-1) ** 2, stats.uniform()),
    "ball, coordinate": (lambda: random.ball(KEY, 3, shape=COUNT)[:, 1] / 2 + 0.5, stats.beta(2, 2)),
    "multivariate_normal": (
        lambda: random.multivariate_normal(KEY, torch.tensor([1.0, 2.0]), torch.tensor([[2.0, 0.5], [0.5, 1.0]]), COUNT)[:, 0],
        stats.norm(1, math.sqrt(2)),
    ),
}


@pytest.mark.parametrize("name", CONTINUOUS)
def test_continuous_draws(name):
    draw, distribution = CONTINUOUS[name]
    assert stats.kstest(draw().numpy(), distribution.cdf).pvalue > 1e-3


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_both_modes(mode, dtype):
    x = random.normal(random.key(1, partitionable=mode), COUNT, dtype).numpy()
    assert stats.kstest(x, stats.norm().cdf).pvalue > 1e-3
    assert abs(x.mean()) < 0.03 and abs(x.std() - 1) < 0.03 and abs(stats.kurtosis(x)) < 0.15


def chi_square(found, probabilities):
    counts = np.bincount(found.numpy(), minlength=len(probabilities))
    assert len(counts) == len(probabilities)
    kept = probabilities > 5 / len(found)
    observed, wanted = counts[kept], probabilities[kept] * len(found)
    return stats.chisquare(observed, wanted * observed.sum() / wanted.sum()).pvalue


PAIRS = [0, 1 / 6, 1 / 6, 1 / 6, 0, 1 / 6, 1 / 6, 1 / 6, 0]  # of two different numbers below 3


def pairs(draw):
    """The first two of what is drawn, as one number."""
    drawn = vmap(draw)(random.split(KEY, 5000))
    return 3 * drawn[:, 0] + drawn[:, 1]


DISCRETE = {
    "bernoulli": (lambda: random.bernoulli(KEY, 0.3, COUNT).long(), [0.7, 0.3]),
    "rademacher": (lambda: (random.rademacher(KEY, COUNT) + 1) // 2, [0.5, 0.5]),
    "randint": (lambda: random.randint(KEY, COUNT, 5, 12) - 5, [1 / 7] * 7),
    "randint, int64": (lambda: random.randint(KEY, COUNT, 5, 12, torch.int64) - 5, [1 / 7] * 7),
    "randint, uint64": (lambda: random.randint(KEY, COUNT, 5, 12, torch.uint64).long() - 5, [1 / 7] * 7),
    "choice, without": (lambda: pairs(lambda key: random.choice(key, 3, (2,), False)), PAIRS),
    "categorical, without": (
        lambda: pairs(lambda key: random.categorical(key, torch.zeros(3), shape=(2,), replace=False)), PAIRS,
    ),
    "permutation, all": (lambda: pairs(lambda key: random.permutation(key, 3)), PAIRS),
    "choice": (lambda: random.choice(KEY, 6, COUNT), [1 / 6] * 6),
    "choice, weighted": (lambda: random.choice(KEY, 3, COUNT, True, torch.tensor([0.2, 0.3, 0.5])), [0.2, 0.3, 0.5]),
    "categorical": (lambda: random.categorical(KEY, torch.tensor([0.2, 0.3, 0.5]).log(), shape=COUNT), [0.2, 0.3, 0.5]),
    "permutation": (lambda: random.permutation(KEY, torch.arange(4).expand(*COUNT, 4), 1, True)[:, 0], [0.25] * 4),
    "bits": (lambda: random.bits(KEY, COUNT, torch.uint8).long() // 16, [1 / 16] * 16),
}


@pytest.mark.parametrize("name", DISCRETE)
def test_discrete_draws(name):
    draw, probabilities = DISCRETE[name]
    assert chi_square(draw(), np.array(probabilities)) > 1e-3


@pytest.mark.parametrize("rate", [0.7, 9.5, 10.5, 40.0])
def test_poisson(rate):
    found = random.poisson(KEY, rate, COUNT)
    assert chi_square(found, stats.poisson(rate).pmf(np.arange(int(found.max()) + 1))) > 1e-3


@pytest.mark.parametrize("method", ["cholesky", "eigh", "svd"])
def test_moments_of_the_multivariate_normal(method):
    mean, cov = torch.tensor([1.0, -2.0]), torch.tensor([[2.0, 0.6], [0.6, 1.0]])
    x = random.multivariate_normal(KEY, mean, cov, COUNT, method=method)
    assert (x.mean(0) - mean).abs().max() < 0.05 and (torch.cov(x.T) - cov).abs().max() < 0.08


def test_moments_of_the_dirichlet():
    alpha = torch.tensor([0.5, 1.0, 3.0])
    x = random.dirichlet(KEY, alpha, COUNT)
    assert (x.sum(-1) - 1).abs().max() < 1e-6 and (x.mean(0) - alpha / alpha.sum()).abs().max() < 0.01


def test_every_bit_is_fair():
    words = random.bits(KEY, (10_000,)).view(torch.int32)
    ones = torch.stack([(words >> i) & 1 for i in range(32)]).float().mean(1)
    assert (ones - 0.5).abs().max() < 0.025


def test_split_keys_are_independent():
    x = torch.stack([random.normal(key, (5000,)) for key in random.split(KEY, 6)])
    assert (torch.corrcoef(x) - torch.eye(6)).abs().max() < 0.06


def test_dropout_keeps_the_mean():
    x = random.dropout(KEY, torch.ones(COUNT), 0.2)
    assert set(x.unique().tolist()) == {0.0, 1.25} and abs(float(x.mean()) - 1) < 0.02
