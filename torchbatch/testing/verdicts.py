"""What of two outcomes of a mapped function is the same: outputs, derivatives, and what was written."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from torchbatch import tree
from torchbatch.testing.compare import LeafDifference, Rules, compare, compare_leaf
from torchbatch.testing.tolerance import Tolerance
from torchbatch.testing.variants import is_inexact


def closer(expected: Any, first: Any, second: Any = None) -> Any:
    """The leaf that is closer to what is expected."""
    if not (is_inexact(expected) and is_inexact(first) and is_inexact(second)) or not first.numel():
        return first
    if not expected.shape == first.shape == second.shape:
        return first
    sizes = [(expected.detach().to(leaf.dtype) - leaf.detach()).abs().nan_to_num(torch.inf).max() for leaf in (first, second)]
    return first if bool(sizes[0] <= sizes[1]) else second


def leaves_compared(
    found: Any, expected: Any, reference: Any, what: str, rules: Rules, scatter: Sequence[float] = ()
) -> list[LeafDifference]:
    """Outputs leaf by leaf, derivatives by name.

    Args:
        found, expected, reference: what a way, the loop, and the loop in float64 gave; the last may be None.
        what: ``"values"``, or which derivative.
        rules: what counts as a difference.
        scatter: by how much each leaf of the loop changes when its arguments change by a last place.
    """
    if what == "values" or found.keys() != expected.keys():
        leaves = compare(found, expected, reference, rules)
    else:
        leaves = [compare_leaf(name, found[name], expected[name], (reference or {}).get(name), rules) for name in expected]
    references = [None] * len(leaves) if reference is None else flattened(reference, what)
    if not scatter:
        return leaves
    rows = zip(leaves, flattened(found, what), flattened(expected, what), references, scatter, strict=True)
    return [_excused(leaf, a, b, c, off, rules) for leaf, a, b, c, off in rows]


def _excused(leaf: LeafDifference, found: Any, expected: Any, reference: Any, off: float, rules: Rules) -> LeafDifference:
    """A leaf again, if it is within eight times what the loop changes by when its arguments change by a last place."""
    if leaf.problem != "values" or not 8 * off > leaf.tolerance.atol:
        return leaf
    why = f"{leaf.tolerance.why}; the loop changes by {off:.2g} when its arguments change by a last place"
    tolerance = Tolerance(leaf.tolerance.rtol, 8 * off, why)
    return compare_leaf(leaf.where, found, expected, reference, dataclasses.replace(rules, tolerance=tolerance))


def doubtful(leaves: Iterable[LeafDifference]) -> bool:
    return any(leaf.problem in ("values", "nonfinite") for leaf in leaves)


def flattened(value: Any, what: str) -> list[Any]:
    """The leaves of an output, or of derivatives in the order of their names."""
    return tree.leaves(value) if what == "values" else list(value.values())


def distance(a: Any, b: Any) -> float:
    """How far two leaves are apart at most, where both are finite."""
    if not (is_inexact(a) and is_inexact(b)) or a.shape != b.shape or not a.numel():
        return 0.0
    wide = torch.complex128 if a.is_complex() or b.is_complex() else torch.float64
    return float((a.detach().to(wide) - b.detach().to(wide)).abs().nan_to_num(0.0, 0.0, 0.0).max())


def unspoiled(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Gradients through two maps of which one counts: the other adds nothing, which is NaN where a derivative is infinite."""

    def picked(mine: torch.Tensor, loops: Any) -> torch.Tensor:
        if not isinstance(loops, torch.Tensor) or loops.shape != mine.shape:
            return mine
        return torch.where(mine.isnan() & ~loops.isfinite(), loops.to(mine.dtype), mine)

    return {name: picked(mine, expected.get(name)) for name, mine in found.items()}


def writes_compared(
    names: Iterable[str], found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor], rules: Rules
) -> list[LeafDifference]:
    """The inputs that a run left otherwise than the loop did."""
    leaves = []
    for name, mine, loops in zip(names, found, expected, strict=True):
        leaf = compare_leaf(f"input {name}", mine, loops, None, rules)
        if not leaf.passed:
            message = f"afterwards it is not what it is after the loop: {leaf.message}"
            leaves.append(dataclasses.replace(leaf, problem="inputs", message=message))
    return leaves
