"""References: float64 in every framework, fifty digits by mpmath, a function of one's own; and how much is computed."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from torchbatch.errors import AxisSpecError, UnsupportedOperationError
from torchbatch.testing.equivalent import check_equivalent
from torchbatch.testing.references import Counter, NoReferenceError, in_float64, longest_sum, with_digits, work_of
from torchbatch.testing.tolerance import Work
from torchbatch.testing.transformed import Options

mpmath = pytest.importorskip("mpmath")
X = torch.from_numpy(np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32))
W = torch.from_numpy(np.random.default_rng(1).standard_normal((4, 4)).astype(np.float32))
INDEX = torch.tensor([0, 1, 2])
OPTIONS = Options(names=("x",))


def check(versions, *args, **options):
    return check_equivalent(versions, *args, raise_on_failure=False, backend="eager", **options)


# --- float64 ---------------------------------------------------------------------------------------------------------


def wide(fun, *args, names=()):
    return in_float64("torch", fun, names, Options(names=("x", "y", "z")), args)


def test_captured_parameters_and_new_tensors_are_widened():
    layer = torch.nn.Linear(4, 2)
    found = wide(lambda x: layer(x) + torch.ones(2) + torch.full((2,), 0.1, dtype=torch.float32), X)
    expected = F.linear(X.double(), layer.weight.double(), layer.bias.double()) + 1 + 0.1
    torch.testing.assert_close(found, expected, rtol=1e-14, atol=0)
    assert layer.weight.dtype is torch.float32 and torch.get_default_dtype() is torch.float32


def test_casts_are_left_out():
    assert wide(lambda x: x.half().float().to(torch.bfloat16).exp(), X).equal(X.double().exp())
    assert wide(lambda x: x.type(torch.float32).int(), X * 10).dtype is torch.int32


def test_derivatives_and_batches_in_float64():
    found = wide(lambda x, w: (x @ w).sin().sum(), X, W, names=("grad",))
    expected = torch.func.grad(lambda x: (x @ W.double()).sin().sum())(X.double())
    torch.testing.assert_close(found["x"], expected, rtol=1e-14, atol=1e-14)
    assert wide(lambda x: (x * W[0]).sum(), X, names=("vmap",)).dtype is torch.float64


def test_the_default_dtype_is_put_back_if_the_function_fails():
    with pytest.raises(NoReferenceError, match="in float64 it raises RuntimeError: shape"):
        wide(lambda x: x.view(7), X)
    assert torch.get_default_dtype() is torch.float32


@pytest.mark.parametrize("draw", [torch.rand_like, F.dropout, lambda x: x + torch.randn(4), torch.bernoulli])
def test_random_numbers_are_others_in_float64(draw):
    with pytest.raises(NoReferenceError, match="draws random numbers"):
        wide(draw, X.abs() / 10)


def test_a_dropout_that_does_nothing_draws_nothing():
    assert wide(lambda x: F.dropout(x, 0.5, training=False), X).equal(X.double())
    assert wide(lambda x: F.dropout(x, p=0.0), X).equal(X.double())


def test_numpy_and_jax_in_float64():
    assert in_float64("numpy", lambda x: x * 2, (), OPTIONS, (X,)).dtype == np.float64
    pytest.importorskip("jax")
    assert str(in_float64("jax", lambda x: x * 2, (), OPTIONS, (X,)).dtype) == "float64"


# --- fifty digits ----------------------------------------------------------------------------------------------------

FUNCTIONS = {
    "softmax": lambda x: F.softmax(x, -1)[:, 0],
    "layer norm": lambda x: F.layer_norm(x, (4,), W[0], W[1]).sin(),
    "gelu": lambda x: F.gelu(x) + F.gelu(x, approximate="tanh"),
    "activations": lambda x: F.silu(x) + F.softplus(x) + F.elu(x) + F.leaky_relu(x) + x.tanh() * x.sigmoid() + x.relu(),
    "losses": lambda x: F.cross_entropy(x, INDEX) + F.mse_loss(x, x * 2) + F.huber_loss(x, x * 3),
    "moments": lambda x: x.var(-1) + x.std() + x.mean(0, keepdim=True).sum(),
    "extremes": lambda x: x.amax(-1) + x.max(-1).values + x.min() + x.logsumexp(-1),
    "cumulative": lambda x: x.cumsum(-1).cumsum(0) + x.prod(),
    "choices": lambda x: torch.where(x > 0, x, 0.5).clamp(-1, 1) + x.masked_fill(x > 1, -3.0),
    "products": lambda x: F.linear(x, W, W[0]) + torch.einsum("ij,kj->ik", x, W) + (x[:, :, None] * x[:, None]).sum(-1),
    "attention": lambda x: torch.softmax(x @ x.T / 2, -1) @ x,
    "moves": lambda x: torch.cat([x, x.flip(0)], 1).roll(1, 1)[:, 1:5] + torch.stack([x, x])[1] + x.T.reshape(3, 4),
    "indices": lambda x: x[INDEX] + x.gather(1, INDEX[:, None]) + F.embedding(INDEX, x) + x.index_select(0, INDEX),
    "triangles": lambda x: torch.tril(x) + F.pad(x, (1, 2), value=2.0)[:, :4] + x.diagonal().sum(),
    "norms": lambda x: x / x.norm(dim=-1, keepdim=True) + x.abs().sqrt() + (x**2 + 1).rsqrt() + x.pow(3),
    "whole numbers": lambda x: (
        x * (INDEX[:, None] == torch.arange(4)) + x.argmax(-1, keepdim=True) + (x > 0).sum() + torch.arange(4.0)
    ),
    "writes": lambda x: torch.zeros(3, 4).index_add(0, INDEX, x).scatter_add(1, INDEX[:, None], x[:, :1]),
    "functions": lambda x: x.exp().log1p() + x.sin() * x.cos() + x.atan() + torch.erf(x) + x.expm1() + x.sinh(),
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("names", [(), ("vjp",)], ids=["value", "vjp"])
def test_fifty_digits_agree_with_float64(name, names):
    exact = with_digits(FUNCTIONS[name], names, OPTIONS, (X,))
    close = in_float64("torch", FUNCTIONS[name], names, OPTIONS, (X,))
    exact, close = (exact["x"], close["x"]) if names else (exact, close)
    np.testing.assert_allclose(exact, close.numpy(), rtol=1e-12, atol=1e-13)


def test_batch_norm_with_fifty_digits():
    def normalized(x):
        return F.batch_norm(x, None, None, W[0], W[1], training=True) + F.batch_norm(x, W[2], W[3].abs())

    exact = with_digits(normalized, (), OPTIONS, (X,))
    np.testing.assert_allclose(exact, in_float64("torch", normalized, (), OPTIONS, (X,)), rtol=1e-12)
    with pytest.raises(UnsupportedOperationError, match="native_batch_norm_backward"):
        with_digits(normalized, ("vjp",), OPTIONS, (X,))


def test_digits_show_what_float64_cannot():
    x = torch.tensor([1e-9, 1e-12], dtype=torch.float64)
    exact = with_digits(lambda x: (1 - x.cos()) / x**2, (), OPTIONS, (x,))
    np.testing.assert_allclose(exact, [0.5, 0.5], rtol=1e-15)
    assert abs(in_float64("torch", lambda x: (1 - x.cos()) / x**2, (), OPTIONS, (x,)) - 0.5).max() > 0.1


def test_what_is_not_finite():
    x = torch.tensor([0.0, -1.0, math.inf, math.nan, -0.0])
    for fun in (
        torch.log,
        torch.sqrt,
        torch.exp,
        torch.reciprocal,
        torch.relu,
        lambda x: x / 0,
        lambda x: x**0.5,
        lambda x: x * 0,
    ):
        np.testing.assert_array_equal(with_digits(fun, (), OPTIONS, (x.abs(),)), fun(x.abs().double()).numpy())
    np.testing.assert_array_equal(with_digits(torch.sqrt, (), OPTIONS, (x,)), torch.sqrt(x.double()).numpy())


def test_an_operation_that_is_not_known_is_named():
    with pytest.raises(UnsupportedOperationError, match=r"does not know the operation aten\.sort\.default"):
        with_digits(lambda x: x.sort().values, (), OPTIONS, (X,))


def test_mpmath_says_who_is_off():
    def naive(x):
        return (x**2).mean(-1) - x.mean(-1) ** 2

    def steady(x):
        return ((x - x.mean(-1, keepdim=True)) ** 2).mean(-1)

    versions = {"torch": steady, "torch naive": naive}
    report = check(versions, X.double() + 1e6, transforms=["value"], reference="mpmath")
    assert [(found.run, found.against, found.status) for found in report.checks] == [
        ("torch", "mpmath", "passed"),
        ("torch naive", "torch", "failed"),
    ]
    assert "says that torch naive is off" in report.failures[0].message


def test_a_reference_may_show_that_the_trusted_version_is_wrong():
    versions = {"torch": lambda x: x.var(-1), "torch b": lambda x: x.var(-1)}
    report = check(versions, X, transforms=["value"], reference=lambda x: x.var(-1))
    (found,) = report.failures
    assert (found.run, found.against) == ("torch", "reference") and "output: 3 of 3 differ" in found.message
    assert check(versions, X, transforms=["value"], reference=("numpy", lambda x: x.var(-1, ddof=1))).passed


def test_mpmath_needs_a_graph():
    versions = {"numpy": lambda x: x * 2, "torch": lambda x: x * 2}
    with pytest.raises(AxisSpecError, match="the version that is trusted, 'numpy', is none"):
        check(versions, X, transforms=["value"], reference="mpmath")
    assert check(versions, X, transforms=["value"], reference="mpmath", against="torch").passed


def test_without_mpmath(monkeypatch):
    monkeypatch.setitem(sys.modules, "mpmath", None)
    with pytest.raises(ImportError, match="reference='mpmath' needs mpmath, which is not installed"):
        with_digits(torch.sin, (), OPTIONS, (X,))


def test_no_reference():
    versions = {"torch": lambda x: x, "torch b": lambda x: x + 1}
    (found,) = check(versions, X, transforms=["value"], reference=None).failures
    assert "reference" not in found.message


# --- how much is computed --------------------------------------------------------------------------------------------


def test_operations_and_sums_are_counted():
    counter = Counter()
    counter.watch(lambda x: (x @ torch.ones(200, 5)).tanh().sum())(torch.ones(3, 200))
    assert (counter.operations, counter.longest, counter.largest) == (4, 200, 1000)
    assert work_of([counter], ("grad",), (torch.ones(3, 200),)) == Work(16, 200)
    assert work_of([], (), ()) == Work()
    counter.operations = 20
    assert work_of([counter], (), ()).operations == 20 and work_of([counter], ("vmap", "grad"), ()).operations == 60


@pytest.mark.parametrize(
    ("name", "given", "size", "expected"),
    [("matmul", [15, 35], 21, 5), ("sum", [100], 10, 10), ("add", [10, 10], 10, 1), ("bmm", [0, 0], 0, 1), ("sum", [], 1, 1)],
)
def test_the_longest_sum(name, given, size, expected):
    assert longest_sum(name, given, size) == expected


def test_long_sums_may_round_more():
    x = torch.from_numpy(np.random.default_rng(2).random(200_000, dtype=np.float32))
    versions = {"torch": lambda x: x.cumsum(0)[-1], "numpy": lambda x: x.sum()}
    assert check(versions, x, transforms=["value"]).passed
