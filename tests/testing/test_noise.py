"""What a change in the last place of inputs does to a result is allowed for, and nothing more."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from torchbatch.testing.compare import compare
from torchbatch.testing.equivalent import check_equivalent
from torchbatch.testing.noise import changes, forgiven, nudged


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.complex64])
def test_every_number_moves_by_a_place_or_two(dtype):
    x = torch.linspace(1.01, 1.99, 20).to(dtype)
    moved = nudged({"x": x, "i": torch.arange(3), "n": 2.0}, seed=0)
    assert moved["i"].equal(torch.arange(3)) and moved["n"] == 2.0 and moved["x"].dtype is dtype
    places = (moved["x"] - x).abs().double() / torch.finfo(dtype).eps
    assert ((places >= 0.9) & (places <= 2.1)).all()
    assert not nudged(x, seed=0).equal(nudged(x, seed=1))


def test_changes():
    value = {"a": torch.tensor([1.0, torch.inf, 0.0, 0.0]), "b": np.float32(2), "c": torch.tensor(3), "d": "text"}
    other = {"a": torch.tensor([1.5, torch.inf, 0.0, 0.0]), "b": np.float32(1), "c": torch.tensor(9), "d": "text"}
    a, b, c, d = changes(value, value, [value, other])
    assert a.tolist() == [0.5, 0.125, 0.125, 0.125] and b.tolist() == 1.0 and c is None and d is None
    assert changes(value, None, [value]) == [None] * 4
    assert changes(value, other, [value])[0] is None


def test_only_what_the_change_explains_is_forgiven():
    expected = (torch.tensor([0.0, 1000.0]),) * 4
    got = tuple(torch.tensor([apart, 1000.0]) for apart in (0.5, 0.5, 5.0, 0.5))
    known = [(np.full(2, size), np.zeros(2)) for size in (0.1, 0.01, 10.0)]
    leaves = forgiven(compare(got, expected), got, expected, [*known, (None, np.ones(2))])
    assert [leaf.passed for leaf in leaves] == [True, False, False, False]
    assert "inputs that differ in the last place change it by 0.1" in leaves[0].tolerance.why


def test_steps_are_no_noise():
    x = torch.tensor([0.5, 1.5, 2.5, 3.7, 100.2, 7.0])
    versions = {"torch": torch.round, "torch up": lambda x: (x + 0.5).floor()}
    assert [check.what for check in check_equivalent(versions, x, raise_on_failure=False).failures] == ["values"]
    versions = {"torch": lambda x: (x >= 7) * x, "torch b": lambda x: (x > 7) * x}
    assert not check_equivalent(versions, x, raise_on_failure=False).passed


def test_random_numbers_are_no_noise():
    generator = np.random.default_rng(0)
    versions = {"numpy": lambda x: x + generator.random() * 1e-4, "torch": lambda x: x + 5e-5}
    options = {"transforms": ["value"], "dtypes": False, "reference": None, "raise_on_failure": False}
    assert not check_equivalent(versions, torch.ones(3), **options).passed


def test_an_ill_conditioned_function_raises_no_alarm():
    points = torch.linspace(0, 1, 8, dtype=torch.float64)
    hard = torch.linalg.vander(points) + 1e-9 * torch.eye(8, dtype=torch.float64)
    versions = {
        "torch": lambda a: torch.linalg.solve(a, torch.ones(8, dtype=a.dtype)),
        "numpy": lambda a: np.linalg.inv(a) @ np.ones(8),
    }
    report = check_equivalent(versions, hard, transforms=["value"])
    assert "differ in the last place" in report.checks[0].leaves[0].tolerance.why
    assert "it is taken for rounding" in report.notes[0]
    versions["numpy"] = lambda a: np.linalg.inv(a) @ np.ones(8) * (1 + 1e-5)
    assert not check_equivalent(versions, hard, transforms=["value"], raise_on_failure=False).passed


def test_low_precision_inside_is_no_noise():
    versions = {"torch": lambda x: x.exp() * 2, "torch low": lambda x: x.bfloat16().float().exp() * 2}
    x = torch.linspace(-1, 1, 50)
    report = check_equivalent(versions, x, raise_on_failure=False)
    assert [check.what for check in report.failures] == ["values", "vjp"]


def test_float64_is_no_reference_for_float64():
    versions = {"torch": lambda x: x * 3, "torch b": lambda x: x * 3.001}
    x = torch.ones(2, dtype=torch.float64)
    assert "reference" not in check_equivalent(versions, x, raise_on_failure=False, transforms=["value"]).failures[0].message
    report = check_equivalent(versions, x, raise_on_failure=False, transforms=["value"], reference=lambda x: x * 3)
    assert "torch b is off" in report.failures[0].message
