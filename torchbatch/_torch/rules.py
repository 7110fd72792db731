"""Batching rules for operators that lack one."""

from __future__ import annotations

import torch

from torchbatch._torch import batching
from torchbatch._torch.fallback import loop_kernel

_aten = torch.library.Library("aten", "IMPL")

for _name in batching.lacking():
    _aten.impl(_name, loop_kernel(_name), batching.NAME)
