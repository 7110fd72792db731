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


def strays(value: Any, reference: Any, near: Sequence[Any]) -> bool:
    """Whether most numbers of a leaf that are far from the same run in float64 are so for another reason than rounding.

    Rounding does what the last place of the inputs does. If nothing happens then, or the same step each time or none at all, it
    is a choice: of ``round``, ``argmax``, a comparison, or a draw.

    Args:
        value: the leaf.
        reference: the leaf in float64.
        near: the leaf for inputs that differ in the last place.
    """
    off, far = _far(value, reference)
    others = [read(other).numbers for other in near if is_array(other) and read(other).shape == off.shape]
    if not far.any() or len(others) < len(near):
        return False
    moves = np.stack([_apart(read(value).numbers, other) for other in others])
    most = moves.max(0)
    steps = ((moves < 0.01 * most) | (moves > 0.99 * most)).all(0)
    return float((steps | (_TIMES * most < off))[far].mean()) > 0.5


def is_far(value: Any, reference: Any) -> bool:
    """Whether a leaf is so far from the same run in float64 that one has to ask why."""
    return bool(_far(value, reference)[1].any())


def _far(value: Any, reference: Any) -> tuple[np.ndarray, np.ndarray]:
    """How far numbers are from a reference, and which of them are too far."""
    values = [read(leaf) for leaf in (value, reference) if is_array(leaf)]
    if len(values) < 2 or values[0].format is None or values[0].shape != values[1].shape:
        return np.zeros(0), np.zeros(0, bool)
    off = _apart(values[0].numbers, values[1].numbers)
    exact = np.abs(values[1].numbers)
    return off, off > _MOST * np.where(np.isfinite(exact), exact, 0.0).max(initial=0.0)


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
