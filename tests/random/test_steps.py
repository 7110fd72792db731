"""The functions that make numbers of a distribution from uniform ones, over all uniform numbers that there are."""

from __future__ import annotations

import math
import os
from fractions import Fraction

import numpy as np
import pytest
import torch

from torchbatch import jit, random
from torchbatch._torch import draw_math, draw_ops
from torchbatch.random import uniforms

LONG = os.environ.get("HYPOTHESIS_PROFILE") == "long"
STRIDE = 1 if LONG else 101
TINY = float(np.finfo(np.float32).tiny)


def mantissas():
    """Every multiple of 2**-23 in [0, 1), or some of them."""
    return np.arange(0, 2**23, STRIDE, dtype=np.float32) * np.float32(2.0**-23)


def steps(jax):
    """Name, numbers, the uniform numbers that the step is given, and JAX's function of them."""
    lax, u = jax.lax, mantissas()
    positive = np.maximum(u, np.float32(TINY))
    centered = np.maximum(u * np.float32(2) - np.float32(0.99999994), np.float32(-0.99999994))
    root = np.float32(math.sqrt(2))
    return {
        "normal": ([float(root)], centered, lambda u: root * lax.erf_inv(u)),
        "exponential": ([], u, lambda u: -lax.log1p(-u)),
        "laplace": ([], centered, lambda u: lax.sign(u) * lax.log1p(-lax.abs(u))),
        "gumbel": ([], positive, lambda u: -lax.log(-lax.log(u))),
        "gumbel_high": ([], positive, lambda u: -lax.log(-lax.log1p(-u))),
        "logistic": ([], positive, lambda u: lax.log(u) - lax.log1p(-u)),
        # By itself, it would be another kernel.
        "erf": ([], u * np.float32(16) - np.float32(8), lambda u: lax.erf(u * np.float32(0.5))),
    }


NAMES = ["normal", "exponential", "laplace", "gumbel", "gumbel_high", "logistic", "erf"]


@pytest.mark.parametrize("name", NAMES)
def test_each_step_has_the_bits_of_jax(name, equal_bits):
    jax = pytest.importorskip("jax")
    numbers, u, theirs = steps(jax)[name]
    ours = torch.from_numpy(u) * 0.5 if name == "erf" else torch.from_numpy(u)
    equal_bits(draw_ops.draw(ours, name, numbers), jax.jit(theirs)(u))


@pytest.mark.parametrize("name", ["normal", "exponential", "gumbel", "laplace", "logistic"])
@pytest.mark.parametrize(("dtype", "digits"), [("float16", 10), ("bfloat16", 7)])
def test_all_uniform_numbers_of_half_precision(monkeypatch, equal_bits, name, dtype, digits):
    """Drawn in both libraries from bits that go through all numbers: the counters in the place of their hashes."""
    jax = pytest.importorskip("jax")
    count, width = 2**digits, 16 if dtype == "float16" else 8
    words = np.arange(count) << (width - digits)
    with monkeypatch.context() as patch:
        patch.setattr(uniforms, "integers", lambda key, shape, width: torch.from_numpy(words).int().reshape(shape))
        ours = getattr(random, name)(random.key(0), (count,), getattr(torch, dtype))
    core = pytest.importorskip("jax._src.random.core")
    bits = jax.numpy.asarray(words.astype(f"uint{width}"))
    monkeypatch.setattr(core, "_random_bits", lambda key, width, shape: bits.reshape(shape))
    jax.clear_caches()
    try:
        theirs = getattr(jax.random, name)(jax.random.key(0), (count,), dtype)
    finally:
        jax.clear_caches()
    assert len(set(ours.tolist())) > count // 4
    equal_bits(ours, theirs)


def test_compiled_steps_have_the_same_bits(equal_bits):
    u = torch.from_numpy(mantissas()).clamp(min=TINY)
    root = float(np.float32(math.sqrt(2)))

    def draws(u):
        return [draw_ops.draw(u * 2 - 0.99999994, n, [root]) if n == "normal" else draw_ops.draw(u, n) for n in NAMES]

    equal_bits(jit(draws)(u), draws(u))


def fraction(value):
    return Fraction(float(value))


def test_addcmul_is_a_fused_multiply_add():
    """PyTorch does not promise it. Where a product and a sum are rounded separately, 40 % of these differ."""
    torch.manual_seed(0)
    assert draw_math.has_fma(torch.device("cpu")) == (torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512"))
    for size in (1, 3, 16, 67):
        a, b, c = torch.randn(3, size)
        found = draw_math.OnTensors.fma(a, b, c)
        wanted = [np.float32(float(fraction(x) * fraction(y) + fraction(z))) for x, y, z in zip(a, b, c, strict=True)]
        assert found.tolist() == [float(value) for value in wanted]
    a, b, c = torch.randn(3, 100_000)
    assert torch.equal(draw_math.OnTensors.fma(a, b, c), (a.double() * b.double() + c.double()).float())
    one = torch.tensor(0.7)
    assert torch.equal(draw_math.OnTensors.fma(a, b, one), (a.double() * b.double() + one.double()).float())
    assert not torch.equal(a * b + c, (a.double() * b.double() + c.double()).float())


def test_without_such_an_addcmul(monkeypatch, equal_bits):
    u = torch.from_numpy(mantissas()[::7]).clamp(min=TINY)
    wanted = [draw_ops.draw(u, name) for name in ("gumbel", "logistic", "erf_inv")]
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    equal_bits([draw_ops.draw(u, name) for name in ("gumbel", "logistic", "erf_inv")], wanted)


@pytest.mark.parametrize(("dropped", "dtype"), [(16, torch.bfloat16), (13, torch.float16)])
def test_rounding(dropped, dtype):
    torch.manual_seed(0)
    scale = 10.0 ** torch.linspace(-7, 4, 5000)
    x = torch.cat([torch.randn(5000) * scale, torch.tensor([0.0, -0.0, 1.0, math.inf, -math.inf])])
    assert torch.equal(draw_math._rounded(draw_math.OnTensors, x, dropped), x.to(dtype).float())


def test_logarithms_of_what_is_not_positive():
    found = draw_ops.draw(torch.tensor([0.0, -1.0, math.inf, math.nan]), "log")
    assert found[0] == -math.inf and found[1].isnan() and found[2] == math.inf and found[3].isnan()
    assert draw_ops.draw(torch.tensor([1.0, -1.0]), "erf_inv").tolist() == [math.inf, -math.inf]


def test_large_draws_go_in_blocks(equal_bits):
    u = torch.rand(3, 40000).clamp(min=TINY)
    whole = draw_math.apply(draw_math.OnTensors, u, "gumbel", (), 0)
    equal_bits(draw_ops.draw(u, "gumbel"), whole)
    equal_bits(draw_ops.draw(u.T, "gumbel"), whole.T)
