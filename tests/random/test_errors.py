"""What draws refuse, word for word."""

from __future__ import annotations

import pytest
import torch

from torchbatch import random
from torchbatch.errors import AxisError, AxisSpecError, InputTypeError

KEY = random.key(0)
FLOATS = "dtype must be torch.float64, float32, float16 or bfloat16, but it is "
CASES = {
    "a number as shape": (
        lambda: random.normal(KEY, 3), AxisSpecError,
        "normal: shape must be a tuple of ints, but it is 3 of type int. Write (3,).",
    ),
    "a float in a shape": (
        lambda: random.uniform(KEY, (2.0,)), AxisSpecError,
        "uniform: shape must be a tuple of ints, but it is (2.0,) of type tuple.",
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
        lambda: random.gumbel(KEY, mode="highest"), AxisSpecError,
        "gumbel: mode must be 'low', 'high' or None, but it is 'highest' of type str.",
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
        "randint: dtype must be an integer dtype (but not torch.uint64), but it is torch.float32 of type dtype.",
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
        lambda: random.categorical(KEY, torch.zeros(2), 1), AxisError, "categorical: axis must be in [-1, 1), but it is 1.",
    ),
    "a shape of categories": (
        lambda: random.categorical(KEY, torch.zeros(2, 3), shape=(3,)), AxisError,
        "categorical: the parameters must broadcast to shape=(3,), but logits is float32[2].",
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
    "a rate": (lambda: random.dropout(KEY, torch.ones(3), 1.5), AxisError, "dropout: rate must be from 0 to 1, but it is 1.5."),
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


def test_rates_at_the_ends():
    x = torch.tensor([1.0, -2.0])
    assert torch.equal(random.dropout(KEY, x, 0), x) and torch.equal(random.dropout(KEY, x, 1.0), x * 0)
    assert torch.equal(random.dropout(KEY, torch.ones(99), torch.tensor(0.5)), random.dropout(KEY, torch.ones(99), 0.5))
