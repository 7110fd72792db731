"""Functions of PyTorch whose gradient knows no examples, and what is called in their place."""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from torchbatch._torch.recurrent import STEPWISE
from torchbatch.errors import AxisError
from torchbatch.per_example.ctc import ctc_loss


class StandIns(TorchFunctionMode):
    """While it is active, embeddings have dense gradients, bags are made of embeddings, and recurrent networks of steps.

    Losses that look at values (lengths, variances) are made of operations that need none. Transformers do not ask whether the
    numbers of a mask make it a causal one.

    Args:
        own_statistics: whether layers that take statistics over a batch, which has one example, leave running ones alone.
    """

    def __init__(self, own_statistics: bool = False) -> None:
        super().__init__()
        self._instead = {**_INSTEAD, **_OWN_STATISTICS} if own_statistics else _INSTEAD

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        instead = self._instead.get(func)
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


def _batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if not training:
        return functional.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
    return _normalised(x, [0, *range(2, x.dim())], weight, bias, eps)


def _instance_norm(
    x: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if not use_input_stats:
        return functional.instance_norm(x, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)
    return _normalised(x, list(range(2, x.dim())), weight, bias, eps)


def _normalised(x: Tensor, axes: list[int], weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    if math.prod(x.shape[axis] for axis in axes) < 2:
        raise AxisError(
            f"per_example: with batch_norm=\"per_example\" an example is normalised by statistics of its own, but a layer sees "
            f"a single number for each channel of it, as the shape {tuple(x.shape)} has, with a batch of one. Replace that layer "
            f"(per_example.replace_batch_norm), or put it into eval mode."
        )
    wide = x.float() if x.dtype.itemsize < 4 else x
    var, mean = torch.var_mean(wide, axes, correction=0, keepdim=True)
    found = (wide - mean) * torch.rsqrt(var + eps)
    shape = [1, -1, *[1] * (x.dim() - 2)]
    found = found if weight is None else found * weight.reshape(shape)
    return (found if bias is None else found + bias.reshape(shape)).to(x.dtype)


def _gaussian_nll(
    x: Tensor, target: Tensor, var: Tensor | float, full: bool = False, eps: float = 1e-6, reduction: str = "mean"
) -> Tensor:
    """PyTorch's refuses negative variances, which it has to look at; here they give NaN."""
    given = torch.as_tensor(var, dtype=x.dtype, device=x.device)
    given = given[..., None] if given.dim() and given.shape != x.shape and given.shape == x.shape[:-1] else given
    var = torch.where(given < 0, torch.nan, given + (given.clamp(min=eps) - given).detach())
    loss = 0.5 * (var.log() + (x - target).square() / var)
    loss = loss + 0.5 * math.log(2 * math.pi) if full else loss
    return loss.mean() if reduction == "mean" else loss.sum() if reduction == "sum" else loss


def _truth(value: Tensor) -> bool:
    """Whether a tensor of one number is not zero. Transformers ask whether a mask is causal, only to be faster: it may be not."""
    frame = inspect.currentframe()
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] == "torchbatch":
        frame = frame.f_back
    asks = frame is not None and (frame.f_globals.get("__name__"), frame.f_code.co_name) == _ASKS_ABOUT_MASK
    return False if asks else bool(value)


_ASKS_ABOUT_MASK = "torch.nn.modules.transformer", "_detect_is_causal_mask"  # its name in torch 2.11, 2.13 and 2.15
_OWN_STATISTICS: dict[Any, Any] = {functional.batch_norm: _batch_norm, functional.instance_norm: _instance_norm}
_INSTEAD: dict[Any, Any] = {
    functional.embedding: _embedding,
    functional.embedding_bag: _bag,
    functional.ctc_loss: ctc_loss,
    functional.gaussian_nll_loss: _gaussian_nll,
    Tensor.__bool__: _truth,
    **STEPWISE,
}
