"""Dicts whose keys are not in alphabetical order, which a graph takes as they were filled and a tree sorts."""

from __future__ import annotations

import pytest
import torch

from torchbatch.testing import check_equivalent, first_divergence

PARAMS = {"w": torch.linspace(-1, 1, 12).reshape(3, 4), "b": torch.linspace(0, 1, 3)}
X = torch.linspace(1, 2, 4)


def fun(p, x):
    return {"z": p["w"] @ x, "a": (p["w"] @ x * p["b"]).exp().sum()}


def other(p, x):
    return {"z": (p["w"] * x).sum(1), "a": ((p["w"] * x).sum(1) * p["b"]).exp().sum()}


def wrong(p, x):
    return {"z": (p["w"] * x).sum(1), "a": ((p["w"] * x).sum(1) + p["b"]).exp().sum()}


def test_fifty_digits():
    pytest.importorskip("mpmath")
    report = check_equivalent({"torch": fun, "torch other": other}, PARAMS, X, reference="mpmath", transforms=["value"])
    assert report.passed and [check.against for check in report.checks] == ["mpmath", "torch"]


def test_the_first_divergence():
    found = first_divergence(fun, wrong, PARAMS, X)
    assert found is not None and 'p["b"]' in str(found)
    assert first_divergence(fun, other, PARAMS, X) is None
