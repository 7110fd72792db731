"""vmap(grad(loss)) equals the loop on the shipped images, and a difference would be seen."""

from __future__ import annotations

import pytest
import torch

from torchbatch.demo import comparison, data
from torchbatch.demo.main import new_model


def test_equal_on_256_images():
    found = comparison.compare(new_model(0), data.load()[:256], repetitions=1)
    assert found.images == 256
    assert found.numbers == 256 * 13_802
    assert found.max_relative_error < 1e-5
    assert found.loop_seconds > 0 and found.vmap_seconds > 0 and found.repetitions == 1


def test_errors_are_the_largest_of_any_parameter():
    expected = {"a": torch.tensor([1.0, -4.0]), "b": torch.tensor([0.01])}
    found = {"a": torch.tensor([1.0, -3.0]), "b": torch.tensor([0.02])}
    absolute, relative = comparison.errors(found, expected)
    assert absolute == pytest.approx(1.0)
    assert relative == pytest.approx(1.0)
    assert comparison.errors(expected, expected) == (0.0, 0.0)


def test_errors_where_the_expected_gradient_is_zero():
    zero, one = {"a": torch.zeros(2)}, {"a": torch.ones(2)}
    assert comparison.errors(zero, zero) == (0.0, 0.0)
    assert comparison.errors(one, zero) == (1.0, float("inf"))


def test_speedup_is_loop_over_vmap():
    assert comparison.Comparison(1, 1, 0.0, 0.0, loop_seconds=6.0, vmap_seconds=2.0, repetitions=1).speedup == 3.0


def test_the_clock_waits_for_the_accelerator(monkeypatch):
    waits = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waits.append(len(waits)))
    assert comparison.seconds(lambda gradients: None, lambda params, images, labels: params) >= 0
    assert len(waits) == 2
