"""What a change in the last place of inputs does to a result is allowed for, and nothing more."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from torchbatch.testing.compare import Rules, compare
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
    value = {"a": torch.tensor([1.0, torch.inf]), "b": np.float32(2), "c": torch.tensor(3), "d": "text"}
    other = {"a": torch.tensor([1.5, torch.inf]), "b": np.float32(1), "c": torch.tensor(9), "d": "text"}
    assert changes(value, [value, other]) == [0.5, 1.0, 0.0, 0.0]
    assert changes(value, [None, {"a": 1}]) == [0.0] * 4


def test_only_what_the_change_explains_is_forgiven():
    expected = (torch.zeros(2), torch.zeros(2))
    got = (torch.tensor([0.0, 0.5]), torch.tensor([0.0, 0.5]))
    leaves = forgiven(compare(got, expected), got, expected, None, Rules(), [0.1, 0.01])
    assert [leaf.passed for leaf in leaves] == [True, False]
    assert "inputs that differ in the last place change it by 0.1" in leaves[0].tolerance.why


def test_an_ill_conditioned_function_raises_no_alarm():
    points = torch.linspace(0, 1, 8, dtype=torch.float64)
    hard = torch.linalg.vander(points) + 1e-9 * torch.eye(8, dtype=torch.float64)
    versions = {
        "torch": lambda a: torch.linalg.solve(a, torch.ones(8, dtype=a.dtype)),
        "numpy": lambda a: np.linalg.inv(a) @ np.ones(8),
    }
    report = check_equivalent(versions, hard, transforms=["value"])
    assert "differ in the last place" in report.checks[0].leaves[0].tolerance.why
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
