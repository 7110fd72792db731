"""The functions of :mod:`torchbatch._torch.across` as single steps of the graphs that Dynamo makes.

Dynamo follows neither the wrappers of a tensor nor the rules of an ``autograd.Function`` inside a transform: traced like
other code, these functions would give wrong results without an error. Loading this module loads Dynamo, which takes a
second, so only functions that are being compiled do it.
"""

from __future__ import annotations

import torch

from torchbatch._torch import across


def _gather(x: torch.Tensor, level: int, size: int) -> torch.Tensor:
    return across.gather(x, level, size)


def _total(x: torch.Tensor, level: int, size: int) -> torch.Tensor:
    return across.total(x, level, size)


def _own(full: torch.Tensor, level: int, size: int) -> torch.Tensor:
    return across.own(full, level, size)


def _number(level: int, size: int, device: torch.device | None) -> torch.Tensor:
    return across.number(level, size, device)


def _pick(full: torch.Tensor, places: list[int]) -> torch.Tensor:
    return across.pick(full, places)


def _copy(x: torch.Tensor) -> torch.Tensor:
    return across.copy(x)


_steps = (_gather, _total, _own, _number, _pick, _copy)
gather, total, own, number, pick, copy = map(torch.compiler.allow_in_graph, _steps)
