"""How much a result changes if its inputs change in the last place: what rounding inside a function may do to it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from torchbatch import tree
from torchbatch.testing.compare import LeafDifference, Rules, compare_leaf
from torchbatch.testing.tolerance import Tolerance
from torchbatch.testing.values import FORMATS, is_array, read

_TIMES = 8  # how far two runs may be apart, in changes by the last place


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


def changes(value: Any, others: Sequence[Any]) -> list[float]:
    """For each leaf the largest change in other runs; 0 where they are no arrays of one shape."""
    found = [0.0] * len(tree.leaves(value))
    for other in others:
        if tree.structure(other) == tree.structure(value):
            pairs = zip(tree.leaves(value), tree.leaves(other), strict=True)
            found = [max(known, _apart(a, b)) for known, (a, b) in zip(found, pairs, strict=True)]
    return found


def _apart(a: Any, b: Any) -> float:
    if not (is_array(a) and is_array(b)) or read(a).shape != read(b).shape or read(a).format is None:
        return 0.0
    x, y = read(a).numbers, read(b).numbers
    finite = np.isfinite(x) & np.isfinite(y)
    return float(np.abs(np.where(finite, x, 0) - np.where(finite, y, 0)).max(initial=0.0))


def forgiven(
    leaves: Sequence[LeafDifference], got: Any, expected: Any, reference: Any, rules: Rules, apart: Sequence[float]
) -> list[LeafDifference]:
    """The comparison once more, where numbers differ, with a tolerance that allows for what the last place of inputs does.

    Args:
        leaves: the comparison.
        got, expected, reference: what was compared.
        rules: how.
        apart: for each leaf how much it changes.
    """
    references = tree.leaves(reference)
    references = references if len(references) == len(leaves) else [None] * len(leaves)
    rows = zip(leaves, tree.leaves(got), tree.leaves(expected), references, apart, strict=True)
    return [_forgiven(leaf, a, b, c, rules, change) for leaf, a, b, c, change in rows]


def _forgiven(leaf: LeafDifference, got: Any, expected: Any, reference: Any, rules: Rules, change: float) -> LeafDifference:
    allowed = _TIMES * change
    if leaf.problem != "values" or allowed <= leaf.tolerance.atol:
        return leaf
    why = f"{leaf.tolerance.why}; inputs that differ in the last place change it by {change:.2g}"
    wider = dataclasses.replace(rules, tolerance=Tolerance(leaf.tolerance.rtol, allowed, why))
    found = compare_leaf(leaf.where, got, expected, reference, wider)
    return found if found.passed else leaf
