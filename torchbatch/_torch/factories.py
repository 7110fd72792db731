"""What makes a tensor inside a mapped function makes a :class:`~torchbatch._torch.local.LocalTensor` there."""

from __future__ import annotations

from typing import Any

import torch

from torchbatch._torch import levels, local, overlay

FACTORIES = (
    "arange arange.start arange.start_step bartlett_window bartlett_window.periodic blackman_window "
    "blackman_window.periodic clone empty.memory_format empty_like empty_permuted empty_strided eye eye.m full full_like "
    "hamming_window hamming_window.periodic hamming_window.periodic_alpha hamming_window.periodic_alpha_beta hann_window "
    "hann_window.periodic kaiser_window kaiser_window.periodic kaiser_window.beta lift_fresh linspace linspace.Tensor_Tensor "
    "linspace.Tensor_Scalar linspace.Scalar_Tensor logspace logspace.Tensor_Tensor logspace.Tensor_Scalar "
    "logspace.Scalar_Tensor new_empty new_empty_strided new_full new_ones new_zeros ones ones_like rand rand.generator "
    "rand_like randint randint.generator randint.low randint.low_generator randint_like randint_like.low_dtype randn "
    "randn.generator randn_like randperm randperm.generator range range.step scalar_tensor tril_indices triu_indices "
    "vander zeros zeros_like"
).split()


def _local_result(operator: overlay.Operator) -> overlay.Operator:
    def kernel(*args: Any, **kwargs: Any) -> Any:
        result = overlay.call(operator, args, kwargs)
        if type(result) is torch.Tensor and not any(True for _ in levels.batch_levels(result)):
            return result if overlay.is_traced() else local.adopt(result)
        return result

    return kernel


REGISTERED = [name for name in FACTORIES if overlay.register(name, _local_result)]
