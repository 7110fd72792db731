"""Views of the zeros that forward mode uses for a tangent that is not there, where fake tensors stand in for tensors.

PyTorch's kernels for three views return a plain tensor on the meta device in the place of a fake one, and the trace that
holds it returns a value without numbers. Without these kernels the operators that fakes know are asked, and plain tensors
take the same path as before. Seen on torch 2.11, 2.13 and 2.15: the operators ``view``, ``_reshape_alias`` and ``as_strided``
under the key ``ZeroTensor``.
"""

from __future__ import annotations

import warnings

import torch

_library = torch.library.Library("aten", "IMPL")

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", message=".*overrid", category=UserWarning)
    for _name in ("view", "_reshape_alias", "as_strided"):
        _library.impl(_name, torch.library.fallthrough_kernel, "ZeroTensor")
