"""Functions of PyTorch whose gradient knows no examples, and what is called in their place."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode


class StandIns(TorchFunctionMode):
    """While it is active, embeddings have dense gradients, and bags are made of embeddings."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        instead = _INSTEAD.get(func)
        return func(*args, **(kwargs or {})) if instead is None else instead(*args, **(kwargs or {}))


def _embedding(
    numbers: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    return functional.embedding(numbers, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq, False)


def _bag(
    numbers: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Tensor:
    if numbers.dim() != 2 or max_norm is not None or scale_grad_by_freq or mode == "max" or not numbers.shape[1]:
        return functional.embedding_bag(
            numbers, weight, offsets, max_norm, norm_type, scale_grad_by_freq, mode, False, per_sample_weights,
            include_last_offset, padding_idx,
        )  # fmt: skip
    found = functional.embedding(numbers, weight, padding_idx)
    if per_sample_weights is not None:
        found = found * per_sample_weights[..., None]
    if padding_idx is None:
        return found.sum(1) if mode == "sum" else found.mean(1)
    kept = (numbers != padding_idx % len(weight)).to(found.dtype)[..., None]
    total = (found * kept).sum(1)
    return total if mode == "sum" else total / kept.sum(1).clamp(min=1)


_INSTEAD: dict[Any, Any] = {functional.embedding: _embedding, functional.embedding_bag: _bag}
