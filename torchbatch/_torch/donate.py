"""Take the memory of a tensor away from the one who holds it."""

from __future__ import annotations

from typing import Any

import torch

from torchbatch.errors import DonatedBufferError, UnsupportedOperationError


class DonatedTensor(torch.Tensor):
    """What is left of a tensor whose memory was given to a jit function: every use is an error."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise DonatedBufferError(
            "a tensor is used after it was passed to a jit function with donate_argnums, which gave its memory away. Use what "
            "the function returned, pass a copy (.clone()), or leave the argument out of donate_argnums."
        )

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return "<tensor whose memory was given to a jit function>"


def check(tensor: torch.Tensor, name: str) -> None:
    """Refuse to take a tensor that autograd may need.

    Raises:
        UnsupportedOperationError: the tensor requires a gradient.
    """
    if tensor.requires_grad:
        raise UnsupportedOperationError(
            f"jit: argument {name} is donated, but it requires a gradient, so that autograd may need it later. Pass "
            f"{name}.detach(), or leave it out of donate_argnums."
        )


def take(tensor: torch.Tensor) -> torch.Tensor:
    """The same tensor as a new object; the old one becomes unusable."""
    taken = tensor.detach()
    torch.autograd.graph.increment_version(tensor)  # for what autograd saved of it elsewhere
    tensor.data = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    tensor.__class__ = DonatedTensor
    return taken
