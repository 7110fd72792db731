"""Kernels that are asked before any transform, inside a mapped function only."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from torchbatch import vmap
from torchbatch._torch import overlay
from torchbatch.testing import assert_close

NAME = "special_zeta"  # an operator that nothing else here calls
X = torch.tensor([[2.0, 3.0]])
calls: list[tuple[str, ...]] = []


def noting(label: str) -> Callable[[overlay.Operator], overlay.Operator]:
    """A kernel that notes that it ran, and goes on to the operator."""

    def make(operator: overlay.Operator) -> overlay.Operator:
        def kernel(*args: Any, **kwargs: Any) -> Any:
            calls.append((label,))
            return operator(*args, **kwargs)

        return kernel

    return make


@pytest.fixture(scope="module", autouse=True)
def registered() -> None:
    assert overlay.register(NAME, noting("first"))


@pytest.fixture(autouse=True)
def no_calls() -> Iterator[None]:
    calls.clear()
    yield
    calls.clear()


def zeta(x: torch.Tensor) -> torch.Tensor:
    return torch.special.zeta(x, torch.ones(()))


def test_asked_inside_a_mapped_function_and_not_outside() -> None:
    outside = zeta(X)
    assert calls == []
    assert_close(vmap(zeta)(X), outside)
    assert calls == [("first",)]


def test_asked_above_inner_transforms_once() -> None:
    vmap(torch.func.vmap(zeta))(X)
    assert calls == [("first",)]


def test_off_again_after_an_exception() -> None:
    def fail(x: torch.Tensor) -> torch.Tensor:
        raise KeyError("stop")

    with pytest.raises(KeyError):
        vmap(fail)(X)
    zeta(X)
    assert calls == []
    assert not overlay.is_included(overlay.KEY)


def test_an_operator_that_there_is_not() -> None:
    assert not overlay.register("no_such_operator", noting("never"))
    assert not overlay.register("add.no_such_overload", noting("never"))


def test_call_goes_around_the_kernels() -> None:
    vmap(lambda x: overlay.call(torch.ops.aten.special_zeta.default, (x, x), {}))(X)
    assert calls == []


def test_a_second_registration_goes_around_the_first() -> None:
    assert overlay.register(NAME, noting("second"))
    vmap(zeta)(X)
    assert calls == [("second",), ("first",)]
