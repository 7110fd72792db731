"""What can be known of a mapped function that draws random numbers: shapes, dtypes, and who shares a draw."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from torchbatch import tree
from torchbatch.testing.compare import LeafDifference, compare
from torchbatch.testing.outcomes import Outcome, attempt, errors_compared
from torchbatch.testing.report import Check
from torchbatch.testing.variants import Axis, Call, copied, permuted, spread
from torchbatch.testing.ways import LOOP, Flat, Way

RANDOMNESS = "randomness"
_SEEDS = 4


def is_drawn(call: Call, seed: int) -> bool:
    """Whether the loop gives other numbers from other states of PyTorch's generators."""
    if call.randomness == "error":
        return False
    flat = LOOP.make(call)
    outcomes = [_seeded(flat, call, seed + i) for i in range(_SEEDS)]
    if any(outcome.error is not None for outcome in outcomes):
        return False
    first, *others = (outcome.value for outcome in outcomes)
    return any(not leaf.passed for other in others for leaf in compare(other, first))


def checked(way: Way, call: Call, seed: int) -> Iterator[Check]:
    """A way against the loop: what its output looks like, and whether samples that are equal draw the same numbers.

    Draws of few numbers may be alike by chance: they are made several times.
    """
    made = attempt(lambda: way.make(call))
    if made.error is not None:
        yield errors_compared((way.name, "loop", "values", "as given"), made, Outcome(None, None))
        return
    loop = LOOP.make(call)
    found, expected = _seeded(made.value, call, seed), _seeded(loop, call, seed)
    head = (way.name, "loop", "values", "as given")
    if found.error is not None or expected.error is not None:
        yield errors_compared(head, found, expected)
        return
    outlines = [tree.map(_outline, outcome.value) for outcome in (found, expected)]
    yield Check.of_leaves(*head, compare(*outlines), found.seconds)
    alike = permuted(call, torch.zeros(call.size, dtype=torch.long))
    runs = [[_seeded(flat, alike, seed + i).value for i in range(_SEEDS)] for flat in (made.value, loop)]
    if tree.structure(runs[0]) == tree.structure(runs[1]):
        yield Check.of_leaves(way.name, "loop", RANDOMNESS, "equal samples", _shared(call, *runs))


def _seeded(flat: Flat, call: Call, seed: int) -> Outcome:
    """One run from a state of the generators; they are left as they were."""
    inputs = [copied(tensor) for tensor in call.tensors]
    with torch.random.fork_rng():
        torch.manual_seed(seed % 2**64)
        return attempt(lambda: flat(inputs))


def _outline(leaf: Any) -> Any:
    return torch.zeros_like(leaf) if isinstance(leaf, torch.Tensor) else leaf


def _shared(call: Call, found: Sequence[Any], expected: Sequence[Any]) -> list[LeafDifference]:
    """For each leaf whether as many samples share their numbers as in the loop."""
    paths = [f"output{tree.keystr(path)}" for path, _ in tree.flatten_with_path(found[0])[0]]
    axes = spread(call.out_axes, found[0])
    columns = [list(zip(*(tree.leaves(output) for output in outputs), strict=True)) for outputs in (found, expected)]
    return [_shared_leaf(*row) for row in zip(paths, axes, *columns, strict=True)]


def _shared_leaf(where: str, axis: Axis, found: Sequence[Any], expected: Sequence[Any]) -> LeafDifference:
    mine, loops = _counts(found, axis), _counts(expected, axis)
    message = ""
    if max(loops) > 1 and max(mine) == 1:
        message = "all samples get the same random numbers, but those of the loop get different ones"
    elif max(loops) == 1 and max(mine) > 1:
        message = "samples get different random numbers, but those of the loop get the same"
    elif min(loops) > max(mine):
        message = f"at most {max(mine)} of the samples get numbers of their own, but at least {min(loops)} of the loop's"
    elif _distinct(expected) > 1 and _distinct(found) == 1:
        message = "every call gives the same random numbers, whatever the state of the generators"
    kind = type(found[0]).__name__
    return LeafDifference(where, RANDOMNESS if message else None, message, kind, kind)


def _counts(outputs: Sequence[Any], axis: Axis) -> list[int]:
    """How many different samples each output has."""
    if axis is None:
        return [1 for _ in outputs]
    return [_distinct(output.detach().unbind(axis)) for output in outputs]


def _distinct(values: Sequence[Any]) -> int:
    different: list[Any] = []
    for value in values:
        if not any(compare(value, other)[0].max_abs == 0 and compare(value, other)[0].passed for other in different):
            different.append(value)
    return len(different)
