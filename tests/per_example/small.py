"""A small network and batches for it."""

from __future__ import annotations

import torch
from torch import nn


def mlp() -> nn.Module:
    """Dense layers of 4, 5 and 3 numbers."""
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def batch(count: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and classes."""
    return torch.randn(count, 4, dtype=torch.float64), torch.randint(3, (count,))
