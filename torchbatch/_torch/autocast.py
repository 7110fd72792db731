"""Autocast inside a mapped function: the dtypes that the same function has for one sample.

PyTorch casts below the batching rules. A rule that takes an operator apart (a convolution, a loss) so hides it from autocast,
or shows it only a part. The operators of this file are cast before that, wherever autocast is on.

Private names used, seen on torch 2.11, 2.13 and 2.15: ``torch._C._is_any_autocast_enabled``,
``torch._C._dispatch_has_kernel_for_dispatch_key``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from torchbatch._torch import batching, overlay

is_on: Callable[[], bool] = torch._C._is_any_autocast_enabled

LOWER = (
    "addbmm addmm addmv baddbmm conv1d conv1d.padding conv2d conv2d.padding conv3d conv3d.padding conv_tbc conv_transpose1d "
    "conv_transpose2d.input conv_transpose3d.input linear prelu"
).split()
FLOAT32 = (
    "binary_cross_entropy_with_logits cosine_embedding_loss cross_entropy_loss ctc_loss.IntList ctc_loss.Tensor "
    "hinge_embedding_loss huber_loss kl_div l1_loss margin_ranking_loss mse_loss multi_margin_loss multilabel_margin_loss "
    "nll_loss nll_loss2d nll_loss_nd poisson_nll_loss smooth_l1_loss soft_margin_loss triplet_margin_loss"
).split()


def _cast(operator: overlay.Operator) -> overlay.Operator:
    def kernel(*args: Any, **kwargs: Any) -> Any:
        given = next(batching.tensors(args, kwargs), None)
        device = "cpu" if given is None else given.device.type
        if not torch.is_autocast_enabled(device) or not _has_autocast(operator.__name__, device):
            return operator(*args, **kwargs)
        dtype = torch.get_autocast_dtype(device) if operator.__name__ in LOWER else torch.float32

        def cast(value: Any) -> Any:
            return batching.replaced(value, lambda tensor: _to(tensor, dtype))

        return operator(*map(cast, args), **{name: cast(value) for name, value in kwargs.items()})

    return kernel


@functools.cache
def _has_autocast(name: str, device: str) -> bool:
    name = name.removesuffix("_nd")  # which chooses between nll_loss and nll_loss2d
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", f"Autocast{device.upper()}")


def _to(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What autocast casts: all floating-point numbers but those of double precision."""
    return tensor.to(dtype) if tensor.is_floating_point() and tensor.dtype is not torch.float64 else tensor


REGISTERED = [name for name in (*LOWER, *FLOAT32) if overlay.register_factory(name, _cast)]
