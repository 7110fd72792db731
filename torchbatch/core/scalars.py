"""Predicates and indices: single numbers that decide which way a function goes, for all samples or for each."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from torchbatch._torch import across, graphs, levels, wrappers
from torchbatch.core.arrays import as_tensor
from torchbatch.core.describe import describe, shown
from torchbatch.core.frames import in_scope
from torchbatch.errors import InputTypeError

_Tensor = torch.Tensor
_is_compiling = torch.compiler.is_compiling


def scalar(value: Any, who: str, what: str) -> torch.Tensor:
    """A single number as a tensor without dimensions.

    Raises:
        InputTypeError: it is something else.
    """
    found = as_tensor(_size(value))
    if found is None:
        raise InputTypeError(f"{who}: {what} must be a single number or truth value, but it is {shown(value)}.")
    if found.dim():
        raise InputTypeError(
            f"{who}: {what} must be a single number, but it is {describe(found)}. Reduce it (.any(), .all()), or map the "
            "function over that axis with vmap; torch.where chooses element by element."
        )
    return found if _is_compiling() else wrappers.alive(found)


def _size(value: Any) -> Any:
    """A number for a size that jit leaves open, or for a comparison of such sizes; the trace then holds for it alone."""
    return bool(value) if isinstance(value, torch.SymBool) else int(value) if isinstance(value, torch.SymInt) else value


def integer(value: Any) -> int | None:
    """What Python or NumPy holds as an integer; None for anything else, among it tensors and truth values."""
    if isinstance(value, bool | _Tensor | np.bool_):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def is_batched(value: torch.Tensor) -> bool:
    """Whether samples may have different values."""
    return next(levels.batch_levels(value), None) is not None


def is_known(value: torch.Tensor) -> bool:
    """Whether Python can read the value: nothing traces, and it has numbers."""
    return not graphs.is_tracing() and levels.innermost(value).device.type != "meta"


def holds(value: torch.Tensor) -> tuple[int, int]:
    """In how many samples a truth value holds, and how many values there are."""
    inner = levels.innermost(value)
    return int(inner.sum()), inner.numel()


def open_levels(value: torch.Tensor) -> list[tuple[int, int]]:
    """The level and size of each batch that a value varies over, outermost first."""
    mine = set(levels.batch_levels(value))
    return [(level, size) for level, size, _ in levels.open_maps() if level in mine]


def looks_across(value: torch.Tensor) -> bool:
    """Whether a collective may look across the samples over which a value varies."""
    mine = set(levels.batch_levels(value))
    return any(name is not None and level in mine for name, _, level, _ in in_scope.stack)


def everywhere(value: torch.Tensor, over: list[tuple[int, int]]) -> torch.Tensor:
    """The values of all samples of some levels, along a new first axis."""
    for level, size in over[::-1]:
        value = across.gather(value, level, size)
    return value.flatten(0, len(over) - 1)


def number(value: torch.Tensor) -> int:
    """An integer that is the same for all samples."""
    return int(levels.innermost(value))


def truth(value: torch.Tensor) -> bool:
    """A truth value that is the same for all samples."""
    return bool(levels.innermost(value))


def selected(mask: torch.Tensor, yes: Sequence[torch.Tensor], no: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The first where the mask holds, and the second elsewhere."""
    return [a if a is b else torch.where(mask, a, b) for a, b in zip(yes, no, strict=True)]


def of_a_sample(mask: torch.Tensor, leaves: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The values of the first sample in which the mask holds, for all; those that are given, if there are no samples."""
    over = open_levels(mask)
    held = levels.innermost(everywhere(mask, over))
    if not held.numel():
        return list(leaves)
    chosen = held.int().argmax().reshape(1)
    varying = {level for level, _ in over}
    return [
        everywhere(leaf, over).index_select(0, chosen).squeeze(0) if varying & {*levels.batch_levels(leaf)} else leaf
        for leaf in leaves
    ]
