"""Every draw against live JAX: bit by bit where that is possible, and how near where it is not.

JAX compiles each call, which takes most of the time; ``HYPOTHESIS_PROFILE=long`` makes more of them.
"""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch

from torchbatch import jit, random, vmap
from torchbatch.testing import assert_close

LONG = os.environ.get("HYPOTHESIS_PROFILE") == "long"
SHAPES = [(), (0,), (3, 5)] if LONG else [(), (3, 5)]
EXACT = ["normal", "exponential", "gumbel", "laplace", "logistic", "uniform"]


long_only = pytest.mark.skipif(not LONG, reason="JAX compiles this for seconds; HYPOTHESIS_PROFILE=long")


def some(items, count):
    """All, in the long profile; otherwise the first."""
    return items if LONG else items[:count]


def near(ours, theirs, **tolerance):
    theirs = np.asarray(theirs)
    assert tuple(ours.shape) == theirs.shape
    assert_close(ours.detach().numpy(), theirs, **tolerance, dtypes=False)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("width", [8, 16, 32])
def test_bits(both, equal_bits, width, shape):
    key, theirs = both.keys(1)
    found = random.bits(key, shape, getattr(torch, f"uint{width}"))
    equal_bits(found, both.random.bits(theirs, shape, f"uint{width}"))
    if width == 32:
        equal_bits(random.bits(key, shape), found)


@pytest.mark.parametrize("shape", some([(7,), (), (0,), (1,), (40,)], 2))
def test_bits_of_64(both, equal_bits, shape):
    with both.x64():
        key, theirs = both.keys(1)
        equal_bits(random.bits(key, shape, torch.uint64), both.random.bits(theirs, shape, "uint64"))


@pytest.mark.parametrize("size", some([3, 5, 1, 2, 4, 6, 9, 10], 2))
def test_bits_of_odd_sizes(both, equal_bits, size):
    key, theirs = both.keys(2)
    for width in (8, 32):
        equal_bits(random.bits(key, (size,), getattr(torch, f"uint{width}")), both.random.bits(theirs, (size,), f"uint{width}"))


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_draws_of_one_uniform_number(modern, equal_bits, dtypes, name, dtype):
    key, theirs = modern.keys(3)
    for shape in SHAPES if dtype == "float32" else [(1999,)]:
        equal_bits(getattr(random, name)(key, shape, dtypes[dtype]), getattr(modern.random, name)(theirs, shape, dtype))


@pytest.mark.parametrize("name", ["normal", "uniform"])
def test_bfloat16_in_both_modes(both, equal_bits, name):
    key, theirs = both.keys(3)
    equal_bits(getattr(random, name)(key, (199,), torch.bfloat16), getattr(both.random, name)(theirs, (199,), "bfloat16"))


def test_large_draws(both, equal_bits):
    key, theirs = both.keys(4)
    equal_bits(random.normal(key, (401, 333)), both.random.normal(theirs, (401, 333)))


@pytest.mark.parametrize("bounds", some([(2.5, 7.1), (-3e-3, 1e-3), (-1, 1), (1, 1), (2, -1), (0, 1e4)], 3))
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_uniform_between_bounds(modern, equal_bits, dtypes, dtype, bounds):
    key, theirs = modern.keys(5)
    ours = random.uniform(key, (999,), dtypes[dtype], *bounds)
    equal_bits(ours, modern.random.uniform(theirs, (999,), dtype, *bounds))


def tensors(modern, dtype, name, *shapes):
    """Numbers of either sign, rounded to a dtype: as tensors, and as JAX's arrays."""
    drawn = [3 * torch.randn(shape, generator=torch.Generator().manual_seed(7)) for shape in shapes]
    ours = [value.to(dtype) for value in drawn]
    return ours, [modern.jax.numpy.asarray(value.float().numpy()).astype(name) for value in ours]


@pytest.mark.parametrize("shapes", some([((50,), (50,)), ((), ()), ((40, 1), (50,)), ((50,), ())], 1))
@pytest.mark.parametrize("name", ["float32", "float16", "bfloat16"])
def test_uniform_between_tensors(modern, equal_bits, dtypes, name, shapes):
    key, theirs = modern.keys(6)
    (low, span), (their_low, _) = tensors(modern, dtypes[name], name, *shapes)
    high = low.mean() + span
    their_high = modern.jax.numpy.asarray(high.float().numpy()).astype(name)
    wanted = modern.random.uniform(theirs, (40, 50), name, their_low, their_high)
    equal_bits(random.uniform(key, (40, 50), dtypes[name], low, high), wanted)
    if LONG:
        equal_bits(jit(lambda *bounds: random.uniform(key, (40, 50), dtypes[name], *bounds))(low, high), wanted)


@pytest.mark.parametrize("name", [*EXACT, "cauchy"])
def test_float64(modern, name):
    with modern.x64():
        key, theirs = modern.keys(7)
        ours = getattr(random, name)(key, (1000,), torch.float64)
        near(ours, getattr(modern.random, name)(theirs, (1000,), "float64"), rtol=3e-12, atol=1e-15)


def test_gumbel_of_two_numbers(modern, equal_bits, dtypes):
    key, theirs = modern.keys(8)
    for name, dtype in dtypes.items():
        equal_bits(random.gumbel(key, (499,), dtype, "high"), modern.random.gumbel(theirs, (499,), name, "high"))


def test_gumbel_of_64_bits(both, equal_bits, dtypes):
    key, theirs = both.keys(8)
    for name, dtype in dtypes.items() if LONG else [("float32", torch.float32)]:
        equal_bits(random.gumbel(key, (4999,), dtype, "highest"), both.random.gumbel(theirs, (4999,), name, "highest"))


def test_cauchy_to_the_last_digit(modern):
    key, theirs = modern.keys(9)
    near(random.cauchy(key, (5000,)), modern.random.cauchy(theirs, (5000,)), rtol=2.4e-7)


def test_complex_normal(modern):
    key, theirs = modern.keys(9)
    near(random.normal(key, (500,), torch.complex64), modern.random.normal(theirs, (500,), "complex64"), rtol=2e-7)


@pytest.mark.parametrize("bounds", [(-2, 2), (0.5, 3), (-np.inf, np.inf), (-5.35, 1)])
def test_truncated_normal(modern, equal_bits, dtypes, bounds):
    key, theirs = modern.keys(10)
    for name, dtype in dtypes.items() if LONG or bounds[0] == -2 else [("float32", torch.float32)]:
        wanted = modern.random.truncated_normal(theirs, *bounds, (1000,), name)
        equal_bits(random.truncated_normal(key, *bounds, (1000,), dtype), wanted)


@pytest.mark.parametrize("name", ["float32", "float16", "bfloat16"])
def test_truncated_normal_between_tensors(modern, equal_bits, dtypes, name):
    key, theirs = modern.keys(10)
    (low,), (their_low,) = tensors(modern, dtypes[name], name, (999,))
    low, their_low = low.minimum(torch.tensor(1.5).to(low.dtype)), modern.jax.numpy.minimum(their_low, 1.5)
    wanted = modern.random.truncated_normal(theirs, their_low, 2.0, (999,), name)
    equal_bits(random.truncated_normal(key, low, 2.0, (999,), dtypes[name]), wanted)
    if LONG:
        equal_bits(jit(lambda low: random.truncated_normal(key, low, 2.0, (999,), dtypes[name]))(low), wanted)


@pytest.mark.parametrize("p", some([0.25, 0.0, 0.9, 1.0], 1))
@pytest.mark.parametrize("mode", ["low", "high"])
def test_bernoulli(modern, equal_bits, p, mode):
    key, theirs = modern.keys(11)
    equal_bits(random.bernoulli(key, p, (300,), mode), modern.random.bernoulli(theirs, p, (300,), mode))


def test_bernoulli_of_tensors(modern, equal_bits, dtypes):
    key, theirs = modern.keys(11)
    for name, dtype in dtypes.items():
        p = torch.linspace(0, 1, 100).to(dtype)
        other = modern.jax.numpy.asarray(p.float().numpy()).astype(name)
        equal_bits(random.bernoulli(key, p), modern.random.bernoulli(theirs, other))


def test_rademacher(modern, equal_bits):
    key, theirs = modern.keys(12)
    ours = random.rademacher(key, (100,))
    assert ours.dtype is torch.int64
    equal_bits(ours.int(), modern.random.rademacher(theirs, (100,)))
    equal_bits(random.rademacher(key, (9,), torch.float32), modern.random.rademacher(theirs, (9,), "float32"))


@pytest.mark.parametrize("bounds", [(0, 10), (-5, 2**31 - 1), (-(2**31), 2**31 - 1), (7, 3)])
def test_randint(modern, equal_bits, bounds):
    key, theirs = modern.keys(13)
    ours = random.randint(key, (300,), *bounds)
    assert ours.dtype is torch.int64
    equal_bits(ours.int(), modern.random.randint(theirs, (300,), *bounds))


@pytest.mark.parametrize("dtype", some(["int8", "uint16", "uint32", "uint8", "int16", "int32"], 3))
@pytest.mark.parametrize("bounds", some([(-500, 300), (-5, 100), (0, 2**31 - 1)], 1))
def test_randint_of_dtypes(modern, equal_bits, dtype, bounds):
    key, theirs = modern.keys(13)
    equal_bits(random.randint(key, (99,), *bounds, getattr(torch, dtype)), modern.random.randint(theirs, (99,), *bounds, dtype))


@pytest.mark.parametrize("bounds", some([(-(2**63), 2**63 - 1), (0, 10), (5, 5), (-(2**62), 2**62 + 5), (0, 2**40)], 2))
def test_randint_of_64_bits(both, equal_bits, bounds):
    with both.x64():
        key, theirs = both.keys(13)
        equal_bits(random.randint(key, (300,), *bounds, torch.int64), both.random.randint(theirs, (300,), *bounds, "int64"))


UNSIGNED = [(7, np.uint64(2**64 - 1)), (-3, 2**40), (np.uint64(2**63 + 1), np.uint64(2**64 - 1)), (0, 10), (9, 3)]


@pytest.mark.parametrize("bounds", some(UNSIGNED, 3), ids=str)
def test_randint_of_unsigned_64_bits(modern, equal_bits, bounds):
    with modern.x64():
        key, theirs = modern.keys(13)
        ours = random.randint(key, (300,), *bounds, torch.uint64)
        equal_bits(ours, modern.random.randint(theirs, (300,), *bounds, "uint64"))
        equal_bits(random.randint(key, (300,), *map(int, bounds), torch.uint64), ours)


def test_randint_between_tensors(modern, equal_bits):
    key, theirs = modern.keys(14)
    low, high = np.arange(-50, 50, dtype=np.int32), np.full(100, 60, np.int32)
    ours = random.randint(key, (3, 100), torch.from_numpy(low), torch.from_numpy(high), torch.int32)
    equal_bits(ours, modern.random.randint(theirs, (3, 100), low, high))


@pytest.mark.parametrize("size", some([3000, 0, 1, 2, 100], 2))
def test_permutation_of_numbers(both, equal_bits, size):
    key, theirs = both.keys(15)
    equal_bits(random.permutation(key, size).int(), both.random.permutation(theirs, size))


@pytest.mark.parametrize("axis", some([1, 0, -1], 1))
@pytest.mark.parametrize("independent", [False, True])
def test_permutation_of_tensors(modern, equal_bits, axis, independent):
    key, theirs = modern.keys(15)
    x = np.arange(84, dtype=np.float32).reshape(6, 7, 2)
    ours = random.permutation(key, torch.from_numpy(x), axis, independent)
    equal_bits(ours, modern.random.permutation(theirs, x, axis, independent))


@pytest.mark.parametrize("replace", [True, False])
@pytest.mark.parametrize("shape", some([(2, 2), (), (0,), (2,)], 1))
def test_choice(modern, equal_bits, shape, replace):
    key, theirs = modern.keys(16)
    x = np.arange(84, dtype=np.float32).reshape(6, 7, 2)
    equal_bits(random.choice(key, 9, shape, replace).int(), modern.random.choice(theirs, 9, shape, replace).astype("int32"))
    if shape != (0,):  # for which JAX's result lacks the other axes
        ours = random.choice(key, torch.from_numpy(x), shape, replace, axis=1)
        equal_bits(ours, modern.random.choice(theirs, x, shape, replace, axis=1))


def test_choice_with_probabilities(modern, equal_bits):
    key, theirs = modern.keys(17)
    p = np.random.default_rng(0).dirichlet(np.ones(20)).astype(np.float32)
    equal_bits(random.choice(key, 20, (15,), False, torch.from_numpy(p)).int(), modern.random.choice(theirs, 20, (15,), False, p))
    ours, others = random.choice(key, 20, (1000,), True, torch.from_numpy(p)), modern.random.choice(theirs, 20, (1000,), True, p)
    assert (ours.numpy() != np.asarray(others)).sum() <= 2  # on the border of two


@pytest.mark.parametrize("axis", some([1, 0, -1], 1))
def test_categorical(modern, equal_bits, axis):
    key, theirs = modern.keys(18)
    logits = np.random.default_rng(0).normal(size=(4, 5, 3)).astype(np.float32)
    ours = torch.from_numpy(logits)
    equal_bits(random.categorical(key, ours, axis).int(), modern.random.categorical(theirs, logits, axis))
    shape = (2, *np.delete(logits.shape, axis).tolist())
    equal_bits(random.categorical(key, ours, axis, shape).int(), modern.random.categorical(theirs, logits, axis, shape))
    alone = random.categorical(key, ours, axis, shape, replace=False)
    equal_bits(alone.int(), modern.random.categorical(theirs, logits, axis, shape, replace=False))


def test_gamma(modern):
    key, theirs = modern.keys(19)
    a = np.array([0.1, 0.7, 1.0, 3.5, 40.0], np.float32)
    near(random.gamma(key, torch.from_numpy(a), (200, 5)), modern.random.gamma(theirs, a, (200, 5)), rtol=1e-5)


@long_only
def test_loggamma_and_beta(modern):
    key, theirs = modern.keys(20)
    a = np.array([0.1, 0.7, 1.0, 3.5, 40.0], np.float32)
    near(random.loggamma(key, torch.from_numpy(a), (99, 5)), modern.random.loggamma(theirs, a, (99, 5)), rtol=1e-5, atol=5e-6)
    near(random.beta(key, 0.5, 2.0, (300,)), modern.random.beta(theirs, 0.5, 2.0, (300,)), rtol=3e-6)


@long_only
def test_dirichlet(modern):
    key, theirs = modern.keys(20)
    alpha = np.array([0.5, 1, 3], np.float32)
    near(random.dirichlet(key, torch.from_numpy(alpha), (300,)), modern.random.dirichlet(theirs, alpha, (300,)), rtol=3e-6)


def test_poisson(both, equal_bits):
    key, theirs = both.keys(21)
    lam = np.array([0, 0.5, 4, 9.9, 15, np.nan], np.float32)
    ours = random.poisson(key, torch.from_numpy(lam), (200, 6), torch.int32)
    equal_bits(ours, both.random.poisson(theirs, lam, (200, 6), "int32"))


def test_poisson_of_large_rates(modern):
    key, theirs = modern.keys(21)
    lam = np.linspace(0, 300, 1000).astype(np.float32)
    ours = random.poisson(key, torch.from_numpy(lam))
    assert (ours.numpy() != np.asarray(modern.random.poisson(theirs, lam))).mean() <= 0.01


@long_only
@pytest.mark.parametrize("p", [1.5, 2])
def test_ball(modern, p):
    key, theirs = modern.keys(22)
    near(random.ball(key, 3, p, (300,)), modern.random.ball(theirs, 3, p, (300,)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", some(["cholesky", "eigh", "svd"], 1))
def test_multivariate_normal(modern, method):
    key, theirs = modern.keys(23)
    mean, cov = np.array([1, 2], np.float32), np.array([[2, 0.3], [0.3, 1]], np.float32)
    ours = random.multivariate_normal(key, torch.from_numpy(mean), torch.from_numpy(cov), (200,), method=method)
    near(ours, modern.random.multivariate_normal(theirs, mean, cov, (200,), method=method), rtol=1e-4, atol=1e-6)


def test_dropout(modern):
    key, theirs = modern.keys(24)
    x = np.linspace(1, 2, 500, dtype=np.float32)
    kept = np.asarray(modern.random.bernoulli(theirs, 1 - 0.3, x.shape))
    near(random.dropout(key, torch.from_numpy(x), 0.3), np.where(kept, x / np.float32(0.7), 0), rtol=2e-7)


@pytest.mark.parametrize("name", some(["normal", "randint", "bits", "permutation", "categorical"], 2))
def test_mapped_over_keys_and_shapes(modern, equal_bits, name):
    logits = np.random.default_rng(0).normal(size=7).astype(np.float32)
    arguments = {"normal": ((2, 3),), "bits": ((5,),), "randint": ((5,), 0, 100), "permutation": (9,), "categorical": (logits,)}
    key, theirs = modern.keys(25)
    extra = [torch.from_numpy(a) if isinstance(a, np.ndarray) else a for a in arguments[name]]
    ours = vmap(lambda key: getattr(random, name)(key, *extra))(random.split(key, 5))
    others = modern.jax.vmap(lambda key: getattr(modern.random, name)(key, *arguments[name]))(modern.random.split(theirs, 5))
    equal_bits(ours.int() if ours.dtype is torch.int64 else ours, others)


@pytest.mark.parametrize("name", ["uniform", "bits"])
def test_a_shape_may_be_a_number(modern, equal_bits, name):
    ours, theirs = modern.keys(1)
    equal_bits(getattr(random, name)(ours, 3), getattr(modern.random, name)(theirs, 3))
    equal_bits(random.randint(ours, np.int32(3), 0, 9), random.randint(ours, (3,), 0, 9))


def test_randint_between_tensors_of_narrow_dtypes(modern, equal_bits):
    ours, theirs = modern.keys(1)
    low, high = np.int8([-3, 0]), np.uint8([200, 255])
    expected = np.asarray(modern.random.randint(theirs, (2,), low, high)).astype(np.int64)
    equal_bits(random.randint(ours, (2,), torch.tensor(low), torch.tensor(high)), expected)


def test_poisson_beyond_a_dtype(equal_bits):
    for rate, dtype in [(125.0, torch.int8), (250.0, torch.uint8), (3.0, torch.uint32), (3.0, torch.uint64)]:
        wide, drawn = (random.poisson(random.key(1), rate, (9,), chosen) for chosen in (torch.int64, dtype))
        assert drawn.dtype is dtype
        equal_bits(drawn.long(), wide.clamp(max=min(torch.iinfo(dtype).max, 2**62)))


@long_only
@pytest.mark.parametrize("dtype", ["int8", "uint8", "uint16", "int32", "uint32"])
def test_poisson_of_dtypes(modern, equal_bits, dtype):
    ours, theirs = modern.keys(1)
    rates = np.float32([3, 9.9, 125, 250, np.nan, np.inf, 0])
    equal_bits(random.poisson(ours, rates, dtype=getattr(torch, dtype)), modern.random.poisson(theirs, rates, dtype=dtype))


def test_choice_in_a_trace_stays_within_its_slices(modern):
    drawn = jit(lambda p: random.choice(random.key(0), 3, (50,), p=p), backend="eager")(torch.tensor([float("nan"), 0.0, 1.0]))
    assert drawn.min() >= 0 and drawn.max() < 3
