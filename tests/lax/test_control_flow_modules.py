"""Modules in the bodies of loops and in branches, with parameters that ``functional_call`` lends them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from torchbatch import grad, jit, lax, vmap
from torchbatch.testing import assert_close

Tensors = dict[str, torch.Tensor]


class Mixing(nn.Module):
    """Uses its layer in every step of a scan, or in one of two branches."""

    def __init__(self, is_loop: bool) -> None:
        super().__init__()
        self.mix, self.is_loop = nn.Linear(4, 4), is_loop

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.is_loop:
            return lax.scan(lambda state, now: (torch.tanh(self.mix(state) + now), None), x.new_zeros(4), x)[0].sum()
        return lax.cond(x.sum() > 0, lambda: self.mix(x).sum(), lambda: self.mix(x).tanh().sum())


@pytest.mark.parametrize("is_loop", [True, False])
@pytest.mark.parametrize("transform", [grad, lambda f: vmap(grad(f))])
def test_gradients_by_lent_parameters_under_jit(is_loop: bool, transform: Callable[..., Callable[..., Tensors]]) -> None:
    torch.manual_seed(0)
    module, x = Mixing(is_loop), torch.randn(3, 4)
    lent = {name: torch.randn_like(value) for name, value in module.named_parameters()}
    of = lambda p: torch.func.functional_call(module, p, (x,))  # noqa: E731
    params = lent if transform is grad else {name: torch.stack([value, -value]) for name, value in lent.items()}
    expected = transform(of)(params)
    found = jit(transform(of), backend="eager")(params)
    assert_close(found, expected)
    assert all(value.abs().max() > 0.01 for value in expected.values())
    assert all(parameter.grad is None for parameter in module.parameters())
