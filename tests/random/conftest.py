"""What the tests of random draws share: JAX, both of its modes, and bits that are compared as bits."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from torchbatch import random, tree

LONG = os.environ.get("HYPOTHESIS_PROFILE") == "long"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class Jax:
    """JAX's functions under the mode of a test, and a key in both libraries."""

    def __init__(self, jax: Any, partitionable: bool) -> None:
        self.jax, self.random, self.partitionable = jax, jax.random, partitionable

    def keys(self, seed: int) -> tuple[random.Key, Any]:
        """The same key here and there."""
        return random.key(seed), self.jax.random.key(seed)

    def x64(self, on: bool = True) -> contextlib.AbstractContextManager[Any]:
        """JAX with 64-bit numbers."""
        enable = self.jax.enable_x64 if hasattr(self.jax, "enable_x64") else self.jax.experimental.enable_x64
        return enable(on)


@contextlib.contextmanager
def in_mode(partitionable: bool) -> Iterator[Jax]:
    jax = pytest.importorskip("jax")
    with jax.threefry_partitionable(partitionable), random.threefry_partitionable(partitionable):
        yield Jax(jax, partitionable)


@pytest.fixture(params=[True, False], ids=["partitionable", "original"])
def both(request: pytest.FixtureRequest) -> Iterator[Jax]:
    """JAX in each of its modes, which is ours too."""
    with in_mode(request.param) as found:
        yield found


@pytest.fixture(params=[True, False] if LONG else [True], ids=str)
def modern(request: pytest.FixtureRequest) -> Iterator[Jax]:
    """JAX in today's mode, for what is made of bits in the same way in both; in the long profile in each of them."""
    with in_mode(request.param) as found:
        yield found


def same_bits(ours: Any, theirs: Any) -> None:
    """Same shapes, dtypes and bits; ``theirs`` may be JAX's, NumPy's, or a tree of tensors like ours."""
    mine, others = tree.leaves(ours), tree.leaves(theirs)
    assert len(mine) == len(others)
    for a, b in zip(mine, others, strict=True):
        b = b if isinstance(b, torch.Tensor) else as_torch(b)
        assert a.shape == b.shape and a.dtype == b.dtype, (a, b)
        np.testing.assert_array_equal(raw(a), raw(b))


def as_torch(array: Any) -> torch.Tensor:
    array = np.array(array)
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def raw(value: torch.Tensor) -> np.ndarray:
    if value.is_complex():
        value = torch.view_as_real(value)
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[value.element_size()]
    return value.detach().contiguous().reshape(-1).view(whole).numpy()


@pytest.fixture
def equal_bits() -> Any:
    """The comparison."""
    return same_bits


@pytest.fixture
def dtypes() -> dict[str, torch.dtype]:
    """The dtypes in which draws equal JAX's, by name."""
    return DTYPES
