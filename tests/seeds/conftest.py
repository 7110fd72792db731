"""What the tests of the seed texts share: the same numbers in both libraries, and the comparison between them.

Each snippet runs as it stands and traced by jit: where a test takes ``vmap``, that is torchbatch's, or jit of what it returns.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from torchbatch.testing import assert_close

jax = pytest.importorskip("jax")

Same = Callable[[torch.Tensor, Any], None]


@pytest.fixture(autouse=True)
def jax_on_cpu() -> None:
    jax.config.update("jax_platforms", "cpu")


@pytest.fixture(params=["eager", "jit", *(["inductor"] if os.environ.get("TORCHBATCH_JIT") == "full" else [])])
def how(request: pytest.FixtureRequest, ways: dict[str, Any]) -> Any:
    """How torchbatch runs a snippet; those that are compiled in any case are parametrized with it."""
    return ways[request.param]


@pytest.fixture
def vmap(how: Any) -> Callable[..., Any]:
    """torchbatch's vmap, whose functions run in one of the ways."""
    return how.library.vmap


@pytest.fixture
def same() -> Same:
    """Check that a torch tensor and a JAX array have one shape, one kind of dtype and the same values."""

    def check(ours: torch.Tensor, theirs: Any) -> None:
        assert isinstance(ours, torch.Tensor)
        assert tuple(ours.shape) == tuple(theirs.shape)
        assert ours.dtype.is_floating_point == np.issubdtype(theirs.dtype, np.floating)
        assert_close(ours.detach().numpy(), np.asarray(theirs), rtol=1e-5, atol=1e-6, dtypes=False)

    return check


@pytest.fixture
def draw() -> Callable[..., np.ndarray]:
    """Standard normal float32 numbers of a given shape, the same in every run."""
    generator = np.random.default_rng(0)
    return lambda *shape: generator.standard_normal(shape).astype(np.float32)
