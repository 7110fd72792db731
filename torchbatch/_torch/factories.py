"""What makes a tensor inside a mapped function makes one that can be written with per-sample values.

In eager mode that is a :class:`~torchbatch._torch.local.LocalTensor`, which gets its room when it is written to. A tracer
follows tensors by identity, so while one is at work every new tensor gets its room at once: :class:`WithRoom` for Dynamo,
:func:`_with_room` for everything that traces by a dispatch mode (``make_fx``, fake tensors).

Private names used: those of :mod:`torchbatch._torch.levels` and :mod:`torchbatch._torch.overlay`.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from torchbatch._torch import levels, local, overlay

FACTORIES = (
    "arange arange.start arange.start_step bartlett_window bartlett_window.periodic blackman_window "
    "blackman_window.periodic clone empty.memory_format empty_like empty_permuted eye eye.m full full_like "
    "hamming_window hamming_window.periodic hamming_window.periodic_alpha hamming_window.periodic_alpha_beta hann_window "
    "hann_window.periodic kaiser_window kaiser_window.periodic kaiser_window.beta lift_fresh linspace linspace.Tensor_Tensor "
    "linspace.Tensor_Scalar linspace.Scalar_Tensor logspace logspace.Tensor_Tensor logspace.Tensor_Scalar "
    "logspace.Scalar_Tensor new_empty new_full new_ones new_zeros normal.float_float ones rand rand.generator "
    "rand_like randint randint.generator randint.low randint.low_generator randint_like randint_like.low_dtype randn "
    "randn.generator randn_like randperm randperm.generator range range.step tril_indices triu_indices "
    "vander zeros zeros_like"
).split()


def _local_result(operator: overlay.Operator) -> overlay.Operator:
    def kernel(*args: Any, **kwargs: Any) -> Any:
        result = operator(*args, **kwargs)
        if any(True for _ in levels.batch_levels(result)) or (not result.dim() and _is_deepcopy()):
            return result
        if not overlay.is_traced():
            return local.adopt(result)
        return result if is_constant else _with_room(result)

    is_constant = operator.__name__ == "lift_fresh"  # torch.tensor detaches what it makes, which a tensor with room refuses
    return kernel


def _is_deepcopy() -> bool:
    """Whether ``copy.deepcopy`` makes the tensor, which has to be of the same class as the copied one."""
    return sys._getframe(3).f_code is _DEEPCOPY


_DEEPCOPY = torch.Tensor.__deepcopy__.__code__
REGISTERED = [name for name in FACTORIES if overlay.register_factory(name, _local_result)]


def _with_room(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of a tensor with one value per sample of every open ``vmap``."""
    for level, size, _ in levels.open_maps():
        tensor = local.along(tensor, level, size)
    return tensor


_NAMES = {name.partition(".")[0] for name in FACTORIES} | {"new_tensor", "tensor"}
WRITABLE = frozenset(getattr(owner, name) for owner in (torch, torch.Tensor) for name in _NAMES if hasattr(owner, name))


class WithRoom(TorchFunctionMode):
    """Gives the results of the functions in ``WRITABLE`` one value per sample; Dynamo can trace it."""

    def __init__(self, samples: torch.Tensor) -> None:
        super().__init__()
        self.samples = samples

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        return torch.where(self.samples, result, result) if func in WRITABLE else result
