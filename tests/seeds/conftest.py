"""What the tests of the seed texts share: the same numbers in both libraries, and the comparison between them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

jax = pytest.importorskip("jax")

Same = Callable[[torch.Tensor, Any], None]


@pytest.fixture(autouse=True)
def jax_on_cpu() -> None:
    jax.config.update("jax_platforms", "cpu")


@pytest.fixture
def same() -> Same:
    """Check that a torch tensor and a JAX array have one shape, one kind of dtype and the same values."""

    def check(ours: torch.Tensor, theirs: Any) -> None:
        assert isinstance(ours, torch.Tensor)
        assert tuple(ours.shape) == tuple(theirs.shape)
        assert ours.dtype.is_floating_point == np.issubdtype(theirs.dtype, np.floating)
        np.testing.assert_allclose(ours.detach().numpy(), np.asarray(theirs), rtol=1e-5, atol=1e-6)

    return check


@pytest.fixture
def draw() -> Callable[..., np.ndarray]:
    """Standard normal float32 numbers of a given shape, the same in every run."""
    generator = np.random.default_rng(0)
    return lambda *shape: generator.standard_normal(shape).astype(np.float32)
