"""How much a result changes if its inputs change in the last place: what rounding inside a function may do to it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from torchbatch import tree
from torchbatch.testing.compare import LeafDifference
from torchbatch.testing.tolerance import Tolerance
from torchbatch.testing.values import FORMATS, is_array, read

_TIMES = 8  # how far two runs may be apart, in changes by the last place
_MOST = 3e-3  # and in the largest number of a leaf: a step, as that of round(), is no rounding


def nudged(tensors: Any, seed: int) -> Any:
    """A tree of tensors in which every real or complex number is a place or two further up or down, at random."""
    generator = torch.Generator().manual_seed(seed)

    def nudge(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor) or read(leaf).format is None:
            return leaf
        epsilon = FORMATS[str(read(leaf).format)][0]
        signs = torch.randint(0, 2, leaf.shape, generator=generator).to(leaf.device, torch.float64) * 2 - 1
        wide = leaf.to(torch.complex128 if leaf.is_complex() else torch.float64)
        return (wide * (1 + epsilon * signs)).to(leaf.dtype)

    return tree.map(nudge, tensors)


def changes(value: Any, again: Any, near: Sequence[Any]) -> list[np.ndarray | None]:
    """For each leaf of a result how much every number changes in other runs; None where nothing is known.

    Args:
        value: the result.
        again: the result of the same inputs once more. A leaf that is another one then is not known: it is drawn.
        near: results of inputs that differ in the last place.
    """
    structure = tree.structure(value)
    if any(tree.structure(other) != structure for other in (again, *near)):
        return [None] * len(tree.leaves(value))
    rows = zip(tree.leaves(value), tree.leaves(again), *(tree.leaves(other) for other in near), strict=True)
    return [_change(*row) for row in rows]


def _change(value: Any, again: Any, *near: Any) -> np.ndarray | None:
    values = [read(leaf) for leaf in (value, again, *near) if is_array(leaf)]
    if len(values) < 2 + len(near) or values[0].format is None or any(other.shape != values[0].shape for other in values):
        return None
    mine, once_more, *others = (each.numbers for each in values)
    if not np.array_equal(mine, once_more, equal_nan=True):
        return None
    apart: np.ndarray = np.asarray(np.max([_apart(mine, other) for other in others], axis=0))
    size = np.abs(np.where(np.isfinite(mine), mine, 0)).max(initial=0.0)
    usual = apart.max(initial=0.0)  # of all numbers, unless one of them makes a step
    if _TIMES * usual > _MOST * size:
        usual = np.quantile(apart, 0.75) if apart.size else 0.0
    return np.asarray(np.maximum(apart, usual))


def _apart(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    finite = np.isfinite(x) & np.isfinite(y)
    apart: np.ndarray = np.abs(np.where(finite, x, 0) - np.where(finite, y, 0))
    return apart


def forgiven(
    leaves: Sequence[LeafDifference],
    got: Any,
    expected: Any,
    apart: Sequence[tuple[np.ndarray | None, np.ndarray | None]],
) -> list[LeafDifference]:
    """The comparison once more, with those leaves passed that differ by no more than the last place of inputs explains.

    Args:
        leaves: the comparison.
        got, expected: what was compared.
        apart: for each leaf how much either changes.
    """
    rows = zip(leaves, tree.leaves(got), tree.leaves(expected), apart, strict=True)
    return [_forgiven(leaf, a, b, change) for leaf, a, b, change in rows]


def _forgiven(leaf: LeafDifference, got: Any, expected: Any, apart: Sequence[np.ndarray | None]) -> LeafDifference:
    known = [change for change in apart if change is not None]
    if leaf.problem != "values" or len(known) < 2 or not (is_array(got) and is_array(expected)):
        return leaf
    x, y = read(got).numbers, read(expected).numbers
    size = np.where(np.isfinite(y), np.abs(y), 0.0)
    allowed = np.minimum(_TIMES * np.maximum(*known), _MOST * size.max(initial=0.0))
    if (_apart(x, y) > np.maximum(allowed, leaf.tolerance.atol + leaf.tolerance.rtol * size)).any():
        return leaf
    largest = float(allowed.max(initial=0.0))
    why = f"{leaf.tolerance.why}; inputs that differ in the last place change it by {largest / _TIMES:.2g}"
    wider = Tolerance(leaf.tolerance.rtol, max(largest, leaf.tolerance.atol), why)
    return dataclasses.replace(leaf, problem=None, message="", differing=0, tolerance=wider)
