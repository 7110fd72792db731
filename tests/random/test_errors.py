"""What draws refuse, word for word."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from torchbatch import grad, jit, random, vmap
from torchbatch.errors import AxisError, AxisSpecError, InputTypeError
from torchbatch.testing import loop

KEY = random.key(0)
FLOATS = "dtype must be torch.float64, float32, float16 or bfloat16, but it is "
SIZES = "shape must be an int or a tuple of ints, but it is "
KNOWN = "Sizes must be known: under jit, name the argument they come from in static_argnums; in vmap, all samples share them."
CASES = {
    "a truth value as shape": (
        lambda: random.normal(KEY, True), AxisSpecError,
        "normal: shape must be an int or a tuple of ints, but it is True of type bool.",
    ),
    "a float in a shape": (
        lambda: random.uniform(KEY, (2.0,)), AxisSpecError,
        "uniform: shape must be an int or a tuple of ints, but it is (2.0,) of type tuple.",
    ),
    "a tensor as shape": (lambda: random.bits(KEY, torch.tensor(2)), AxisSpecError, f"bits: {SIZES}int64[]. {KNOWN}"),
    "a size that jit does not know": (
        lambda: jit(lambda n: random.normal(KEY, (2, n)), backend="eager")(3), AxisSpecError,
        f"normal: {SIZES}(2, int64[]). {KNOWN}",
    ),
    "a size of each sample": (
        lambda: vmap(lambda n: random.normal(KEY, (n,)))(torch.arange(3)), AxisSpecError, f"normal: {SIZES}(int64[],). {KNOWN}",
    ),
    "a negative number as shape": (lambda: random.bits(KEY, -1), AxisError, "bits: shape must not be negative, but it is -1."),
    "a class of NumPy": (
        lambda: random.normal(KEY, (), np.float32), AxisSpecError, f"normal: {FLOATS}<class 'numpy.float32'> of type type.",
    ),
    "the dimension of a ball": (
        lambda: random.ball(KEY, 2.5), AxisSpecError, "ball: d must be an int, but it is 2.5 of type float.",
    ),
    "a negative dimension": (lambda: random.ball(KEY, -1), AxisError, "ball: d must not be negative, but it is -1."),
    "the norms of a ball": (
        lambda: random.ball(KEY, 3, torch.ones(2)), AxisError,
        "ball: p must be one number, but it is float32[2]. Map over it with vmap.",
    ),
    "no categories": (
        lambda: random.categorical(KEY, torch.zeros(2, 0)), AxisError,
        "categorical: there is nothing to draw from; float32[2,0] has no categories.",
    ),
    "a negative probability": (
        lambda: random.choice(KEY, 2, (3,), p=torch.tensor([-1.0, 2.0])), AxisError,
        "choice: p must hold numbers from 0 on, but it is tensor([-1., 2.]) of type Tensor and dtype torch.float32.",
    ),
    "a probability that is no number": (
        lambda: random.choice(KEY, 2, replace=False, p=[float("nan"), 1.0]), AxisError,
        "choice: p must hold numbers from 0 on, but it is [nan, 1.0] of type list.",
    ),
    "bounds of NumPy with more than 32 bits": (
        lambda: jit(lambda key: random.randint(key, (), 0, np.int64(2**40)), backend="eager")(KEY), AxisError,
        "randint: minval and maxval need more than 32 bits; give dtype=torch.int64.",
    ),
    "a negative size": (lambda: random.bits(KEY, (2, -1)), AxisError, "bits: shape must not be negative, but it is (2, -1)."),
    "integers as floats": (
        lambda: random.normal(KEY, (), torch.int64), AxisSpecError, f"normal: {FLOATS}torch.int64 of type dtype.",
    ),
    "complex as real": (
        lambda: random.gumbel(KEY, (), torch.complex64), AxisSpecError, f"gumbel: {FLOATS}torch.complex64 of type dtype.",
    ),
    "signed bits": (
        lambda: random.bits(KEY, (), torch.int32), AxisSpecError,
        "bits: dtype must be an unsigned integer type of torch, but it is torch.int32 of type dtype.",
    ),
    "a bound that is none": (
        lambda: random.uniform(KEY, (), minval="0"), InputTypeError,
        "uniform: minval must be a real number or a tensor, but it is '0' of type str.",
    ),
    "bounds that do not fit": (
        lambda: random.uniform(KEY, (3,), minval=torch.zeros(2)), AxisError,
        "uniform: the parameters must broadcast to shape=(3,), but minval is float32[2], maxval is float32[].",
    ),
    "bounds that are larger": (
        lambda: random.truncated_normal(KEY, torch.zeros(2, 3), 1.0, (3,)), AxisError,
        "truncated_normal: the parameters must broadcast to shape=(3,), but lower is float32[2,3], upper is float32[].",
    ),
    "parameters that do not fit": (
        lambda: random.beta(KEY, torch.ones(2), torch.ones(3)), AxisError,
        "beta: the parameters must broadcast to one another, but a is float32[2], b is float32[3].",
    ),
    "a mode": (
        lambda: random.gumbel(KEY, mode="higher"), AxisSpecError,
        "gumbel: mode must be 'low', 'high', 'highest' or None, but it is 'higher' of type str.",
    ),
    "a mode of bernoulli": (
        lambda: random.bernoulli(KEY, mode=None), AxisSpecError,
        "bernoulli: mode must be 'low' or 'high', but it is None of type NoneType.",
    ),
    "an integer as probability": (
        lambda: random.bernoulli(KEY, 1), InputTypeError,
        "bernoulli: p must be a float or a tensor of a floating-point dtype, but it is 1 of type int.",
    ),
    "a float as bound": (
        lambda: random.randint(KEY, (), 0, 2.5), InputTypeError,
        "randint: maxval must be an integer of at most 63 bits, but it is 2.5 of type float.",
    ),
    "floats as integers": (
        lambda: random.randint(KEY, (), 0, 2, torch.float32), AxisSpecError,
        "randint: dtype must be an integer dtype, but it is torch.float32 of type dtype.",
    ),
    "bounds of more than 32 bits": (
        lambda: random.randint(KEY, (), 0, 2**40), AxisError,
        "randint: minval and maxval need more than 32 bits; give dtype=torch.int64.",
    ),
    "a scalar to permute": (
        lambda: random.permutation(KEY, torch.tensor(3)), InputTypeError,
        "permutation: what is drawn from must be a tensor with an axis, or an int, but it is tensor(3) of type Tensor and dtype "
        "torch.int64.",
    ),
    "an axis": (
        lambda: random.permutation(KEY, torch.zeros(2, 3), 2), AxisError,
        "permutation: axis must be an int in [-2, 2), but it is 2 of type int.",
    ),
    "nothing to choose from": (
        lambda: random.choice(KEY, 0, (2,)), AxisError, "choice: there is nothing to draw from; a must not be empty.",
    ),
    "too much to choose": (
        lambda: random.choice(KEY, 3, (2, 2), replace=False), AxisError,
        "choice: 4 slices are to be drawn without replacement, but there are 3.",
    ),
    "probabilities that do not fit": (
        lambda: random.choice(KEY, 3, (2,), p=torch.ones(2)), AxisError,
        "choice: p must be of shape [3], one for each slice, but it is float32[2].",
    ),
    "probabilities that are none": (
        lambda: random.choice(KEY, 3, (2,), p="p"), InputTypeError, "choice: p must be a tensor, but it is 'p' of type str.",
    ),
    "integer logits": (
        lambda: random.categorical(KEY, 3), InputTypeError,
        "categorical: logits must be a tensor of a floating-point dtype with an axis, not 3 of type int.",
    ),
    "an axis of logits": (
        lambda: random.categorical(KEY, torch.zeros(2), 1), AxisError,
        "categorical: axis must be an int in [-1, 1), but it is 1 of type int.",
    ),
    "a shape of categories": (
        lambda: random.categorical(KEY, torch.zeros(2, 3), shape=(3,)), AxisError,
        "categorical: the parameters must broadcast to shape=(3,), but logits is float32[2,3] (batch axes (2,)).",
    ),
    "too many categories": (
        lambda: random.categorical(KEY, torch.zeros(2), shape=(3,), replace=False), AxisError,
        "categorical: 3 categories are to be drawn without replacement, but there are 2 in float32[2].",
    ),
    "a method": (
        lambda: random.multivariate_normal(KEY, torch.zeros(2), torch.eye(2), method="qr"), AxisSpecError,
        "multivariate_normal: method must be 'cholesky', 'eigh' or 'svd', but it is 'qr' of type str.",
    ),
    "moments that do not fit": (
        lambda: random.multivariate_normal(KEY, torch.zeros(2), torch.eye(3)), AxisError,
        "multivariate_normal: mean must be of shape [..., n] and cov of shape [..., n, n], but mean is float32[2] and cov is "
        "float32[3,3].",
    ),
    "a scalar alpha": (
        lambda: random.dirichlet(KEY, 1.0), AxisError,
        "dirichlet: alpha must have an axis, the last one, for the components, but it is float32[].",
    ),
    "floats as counts": (
        lambda: random.poisson(KEY, 1.0, dtype=torch.float32), AxisSpecError,
        "poisson: dtype must be an integer dtype, but it is torch.float32 of type dtype.",
    ),
    "vectors that do not fit": (
        lambda: random.dirichlet(KEY, torch.ones(2, 3), (4,)), AxisError,
        "dirichlet: the parameters must broadcast to shape=(4,), but alpha is float32[2,3] (batch axes (2,)).",
    ),
    "batches of moments": (
        lambda: random.multivariate_normal(KEY, torch.zeros(4, 2), torch.eye(2).expand(3, 2, 2)), AxisError,
        "multivariate_normal: the parameters must broadcast to one another, but mean is float32[4,2], cov is float32[3,2,2] "
        "(batch axes (4,), (3,)).",
    ),
    "signs without a sign": (
        lambda: random.rademacher(KEY, (), torch.uint8), AxisSpecError,
        "rademacher: dtype must be of signed integers, floating-point or complex numbers, but it is torch.uint8 of type dtype.",
    ),
    "signs as truth values": (
        lambda: random.rademacher(KEY, (), torch.bool), AxisSpecError,
        "rademacher: dtype must be of signed integers, floating-point or complex numbers, but it is torch.bool of type dtype.",
    ),
    "signs as a name": (
        lambda: random.rademacher(KEY, (), "int32"), AxisSpecError,
        "rademacher: dtype must be of signed integers, floating-point or complex numbers, but it is 'int32' of type str.",
    ),
    "a bound of 64 bits": (
        lambda: random.randint(KEY, (), 0, 2**63, torch.int64), InputTypeError,
        f"randint: maxval must be an integer of at most 63 bits, but it is {2**63} of type int.",
    ),
    "a bound of 65 bits": (
        lambda: random.randint(KEY, (), 0, 2**64, torch.uint64), InputTypeError,
        f"randint: maxval must be an integer of at most 64 bits, but it is {2**64} of type int.",
    ),
    "a rate": (lambda: random.dropout(KEY, torch.ones(3), 1.5), AxisError, "dropout: rate must be from 0 to 1, but it is 1.5."),
    "a rate as a tensor": (
        lambda: random.dropout(KEY, torch.ones(3), torch.tensor(1.5)), AxisError,
        "dropout: rate must be from 0 to 1, but it is tensor(1.5000) of type Tensor and dtype torch.float32.",
    ),
    "rates": (
        lambda: random.dropout(KEY, torch.ones(3), torch.zeros(3)), InputTypeError,
        "dropout: rate must be a number or a tensor without dimensions, but it is tensor([0., 0., 0.]) of type Tensor and dtype "
        "torch.float32.",
    ),
    "a rate that is no number": (
        lambda: random.dropout(KEY, torch.ones(3), torch.tensor(float("nan"))), AxisError,
        "dropout: rate must be from 0 to 1, but it is tensor(nan) of type Tensor and dtype torch.float32.",
    ),
    "a rate that is none": (
        lambda: random.dropout(KEY, torch.ones(3), "0.5"), InputTypeError,
        "dropout: rate must be a number or a tensor without dimensions, but it is '0.5' of type str.",
    ),
    "integers to drop": (
        lambda: random.dropout(KEY, 3, 0.5), InputTypeError,
        "dropout: x must be a tensor of a floating-point dtype, but it is 3 of type int.",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_errors(name):
    call, kind, text = CASES[name]
    with pytest.raises(kind) as caught:
        call()
    assert str(caught.value) == text


def test_too_large_for_the_older_way():
    with pytest.raises(AxisError, match="needs more than 2\\*\\*32 - 1 words"):
        random.uniform(random.key(0, partitionable=False), (2**33,))


X = torch.tensor([1.0, -2.0])


@pytest.mark.parametrize("rate", [0, 0.0, np.int64(0), np.float32(0), torch.tensor(0.0), torch.tensor(0), np.array(0.0)])
def test_nothing_is_dropped(rate):
    assert torch.equal(random.dropout(KEY, X, rate), X)


@pytest.mark.parametrize("rate", [1, 1.0, np.int32(1), np.float64(1), torch.tensor(1.0), torch.tensor(1)])
def test_all_is_dropped(rate):
    assert torch.equal(random.dropout(KEY, X, rate), X * 0)
    assert torch.equal(grad(lambda x: random.dropout(KEY, x, rate).sum())(X), X * 0)


def test_a_rate_may_be_any_number():
    x = torch.ones(99)
    wanted = random.dropout(KEY, x, 0.5)
    for rate in (torch.tensor(0.5), np.float32(0.5), np.float64(0.5), np.array(0.5), torch.tensor(0.5, dtype=torch.float32)):
        assert torch.equal(random.dropout(KEY, x, rate), wanted)
    assert torch.equal(jit(random.dropout, backend="eager")(KEY, x, 0.5), wanted)


def test_gradients_of_dropout_by_the_rate():
    slope = grad(lambda rate: random.dropout(KEY, X, rate).sum())
    kept = float((random.dropout(KEY, X, 0.5) / 2).sum())
    assert float(slope(torch.tensor(0.5))) == pytest.approx(kept / 0.25)
    assert float(slope(torch.tensor(1.0))) == 0.0


def test_rates_under_transforms():
    """As far as they are known, they are looked at; a trace makes NaN of a wrong one."""
    good, bad = torch.tensor([0.0, 0.3, 1.0]), torch.tensor([0.5, -0.5])
    mapped = vmap(lambda rate: random.dropout(KEY, X, rate))
    assert torch.equal(mapped(good), loop(lambda rate: random.dropout(KEY, X, rate))(good))
    with pytest.raises(AxisError, match="rate must be from 0 to 1"):
        mapped(bad)
    traced = jit(mapped, backend="eager")
    assert torch.equal(traced(good), mapped(good))
    assert traced(bad).isnan().any(1).tolist() == [False, True]


def test_numbers_of_numpy_are_numbers():
    two, half = np.int64(2), np.float32(0.5)
    assert random.normal(KEY, (two, np.int32(3))).shape == (2, 3) and random.split(KEY, two).shape == (2,)
    assert torch.equal(random.permutation(KEY, np.int64(5)), random.permutation(KEY, 5))
    assert torch.equal(random.choice(KEY, np.int32(5), (two,)), random.choice(KEY, 5, (2,)))
    x = torch.arange(6.0).reshape(2, 3)
    assert torch.equal(random.permutation(KEY, x, np.int64(1)), random.permutation(KEY, x, 1))
    assert torch.equal(random.categorical(KEY, x, np.int64(0)), random.categorical(KEY, x, 0))
    assert torch.equal(random.uniform(KEY, (3,), minval=half, maxval=two), random.uniform(KEY, (3,), minval=0.5, maxval=2))
    assert torch.equal(random.bernoulli(KEY, half, (9,)), random.bernoulli(KEY, 0.5, (9,)))
    assert torch.equal(random.randint(KEY, (9,), two, np.uint8(7)), random.randint(KEY, (9,), 2, 7))
    assert torch.equal(random.gamma(KEY, half), random.gamma(KEY, 0.5)) and random.ball(KEY, two, half).shape == (2,)
    assert torch.equal(random.poisson(KEY, np.float64(3)), random.poisson(KEY, 3))


def test_bounds_are_looked_at_under_transforms():
    with pytest.raises(AxisError, match="need more than 32 bits"):
        vmap(lambda most: random.randint(KEY, (), 0, most))(torch.tensor([5, 2**40]))
