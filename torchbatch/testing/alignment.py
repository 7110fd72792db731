"""Which intermediate values two functions have in common, and where they first part."""

from __future__ import annotations

import dataclasses
import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from torchbatch.testing.intermediates import Step, Steps
from torchbatch.testing.tolerance import Work, choose
from torchbatch.testing.values import FORMATS, Values

_MOST_AXES = 5  # arrays of more axes are not tried in every order of them
_FAMILIES = (
    "mm bmm addmm baddbmm mv dot addmv dot_general",
    "convolution conv_general_dilated",
    "sum mean reduce_sum cumsum native_layer_norm native_batch_norm native_group_norm",
    "amax max reduce_max _softmax _log_softmax logsumexp",
    "amin min reduce_min",
    "mul div reciprocal",
    "add sub rsub add_any",
    "sigmoid logistic silu",
    "gelu erf erfc tanh",
    "pow integer_pow square",
    "var std var_mean sqrt rsqrt",
    "where select_n masked_fill",
    "argmax argmin",
    "index gather embedding index_select take",
    "_to_copy convert_element_type",
    "slice dynamic_slice",
    "cat concatenate",
    "tril triu iota arange",
    "constant_pad_nd pad",
)
_FAMILY = {name: number for number, names in enumerate(_FAMILIES) for name in names.split()}


@dataclasses.dataclass(frozen=True)
class Alignment:
    """Which steps of two runs the other one has too.

    Attributes:
        first, second: the runs.
        shared: for each step of the first whether the second has its numbers, and the other way round.
    """

    first: Steps
    second: Steps
    shared: tuple[tuple[bool, ...], tuple[bool, ...]]

    def parting(self, outputs: Iterable[int]) -> tuple[int, int] | tuple[None, None]:
        """The first step of each run that the other one does not have, on the way to the given outputs.

        None if a run did not compute the outputs: they are constants.
        """
        outputs = list(outputs)
        mine = _frontier(self.first, self.shared[0], outputs)
        theirs = _frontier(self.second, self.shared[1], outputs)
        if not mine or not theirs:
            return None, None
        kin = [place for place in theirs if related(self.first.steps[mine[0]], self.second.steps[place])]
        return mine[0], (kin or theirs)[0]

    def nearest(self, side: int, place: int, outputs: Iterable[int]) -> int | None:
        """The step of the other run, among those that this one does not have, whose numbers are nearest to those of a step.

        Args:
            side: 0 for a step of the first run, 1 for one of the second.
            place: the step.
            outputs: the outputs that differ.
        """
        run, other = (self.first, self.second) if side == 0 else (self.second, self.first)
        numbers = run.steps[place].values.numbers
        _, ways = _unshared(other, self.shared[1 - side], outputs)
        found = [(place, other.steps[place].values.numbers) for place in sorted(ways)]
        pairs = [(turned(numbers, theirs), theirs, place) for place, theirs in found if _kind(theirs) == _kind(numbers)]
        fitting = [(_distance(x, theirs), place) for x, theirs, place in pairs if x is not None]
        return min(fitting)[1] if fitting else None

    def agreed(self, place: int) -> int:
        """How many values were computed alike in both runs before a step of the first."""
        steps = zip(self.first.steps[:place], self.shared[0], strict=False)
        return sum(step.kind == "operation" and bool(step.inputs) and shared for step, shared in steps)


def align(first: Steps, second: Steps, work: Work) -> Alignment:
    """Look up each value of one run among those of the other.

    Numbers are what counts, not the operations that computed them: one function may scale before a product and the other after
    it. Two values are the same if their numbers are, up to rounding, in whichever order of the axes.
    """
    mine, theirs = _Pool(first, work), _Pool(second, work)
    return Alignment(first, second, (_shared(first, theirs), _shared(second, mine)))


def related(a: Step, b: Step) -> bool:
    """Whether two operations are of one family, such as matrix products."""
    return a.short == b.short or _FAMILY.get(a.short, -1) == _FAMILY.get(b.short, -2)


def _shared(steps: Steps, pool: _Pool) -> tuple[bool, ...]:
    found: list[bool] = []
    for step in steps.steps:
        if step.kind == "view" and step.inputs:
            found.append(found[step.inputs[0]])
        else:
            found.append(step.kind != "operation" or not step.inputs or pool.has(step.values))
    return tuple(found)


def _frontier(steps: Steps, shared: Sequence[bool], outputs: Iterable[int]) -> list[int]:
    """The steps that the other run does not have though it has all that they are computed from; in order."""
    places, bad = _unshared(steps, shared, outputs)
    edge = [place for place in bad if steps.steps[place].kind != "view" and not bad.intersection(steps.steps[place].inputs)]
    return sorted(edge) or sorted(places)[:1]


def _unshared(steps: Steps, shared: Sequence[bool], outputs: Iterable[int]) -> tuple[list[int], set[int]]:
    """The steps of outputs, and those that lead to them from where the other run has a value for the last time."""
    bad: set[int] = set()
    places = [place for place in (steps.outputs[output] for output in outputs) if place is not None]
    waiting = list(places)
    while waiting:
        place = waiting.pop()
        if not shared[place] and place not in bad:
            bad.add(place)
            waiting += steps.steps[place].inputs
    return places, bad


# --- equal numbers ---------------------------------------------------------------------------------------------------


class _Pool:
    """The values of a run, by how many numbers they have."""

    def __init__(self, steps: Steps, work: Work) -> None:
        self._work = work
        self._values: dict[int, list[tuple[Values, np.ndarray]]] = defaultdict(list)
        for values in itertools.chain((step.values for step in steps.steps), steps.pieces):
            self._values[values.numbers.size].append((values, _ordered(values.numbers)))

    def has(self, values: Values) -> bool:
        """Whether one of them has these numbers."""
        ordered = _ordered(values.numbers)
        return any(self._same(values, ordered, *other) for other in self._values.get(values.numbers.size, ()))

    def _same(self, a: Values, ordered_a: np.ndarray, b: Values, ordered_b: np.ndarray) -> bool:
        if (a.numbers.dtype.kind == "b") != (b.numbers.dtype.kind == "b"):
            return False
        if a.numbers.dtype.kind == "b":
            return _same_mask(a.numbers, b.numbers)
        finer = min((a, b), key=_spacing)  # float32 rounded to bfloat16 is not the same
        tolerance = choose(finer, finer, None, self._work)
        if not _near(ordered_a, ordered_b, tolerance.rtol, tolerance.atol):
            return False
        return any(_near(x, y, tolerance.rtol, tolerance.atol) for x, y in _orders(a.numbers, b.numbers))


def _spacing(values: Values) -> float:
    """The distance from 1 to the next number; more than that of any format for whole numbers."""
    return FORMATS[values.format][0] if values.format is not None else 1.0


def _ordered(numbers: np.ndarray) -> np.ndarray:
    """All numbers by size: of complex ones, both parts."""
    if numbers.dtype.kind == "c":
        return np.concatenate([np.sort(numbers.real, axis=None), np.sort(numbers.imag, axis=None)])
    return np.sort(numbers, axis=None)


def _same_mask(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two arrays of bools are the same, or each other's contrary."""
    return any(np.array_equal(x, y) or np.array_equal(x, ~y) for x, y in _orders(a, b))


def _near(a: np.ndarray, b: np.ndarray, rtol: float, atol: float) -> bool:
    return a.shape == b.shape and bool(np.allclose(a, b, rtol=rtol, atol=atol, equal_nan=True))


def _orders(a: np.ndarray, b: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The same array beside the other in every order of its axes in which the shapes are equal.

    Where the number of axes is another one, axes were merged or split: then it is the other with its numbers sorted.
    """
    a, b = a.squeeze(), b.squeeze()
    if a.ndim != b.ndim or a.ndim > _MOST_AXES:
        yield np.sort(a, axis=None), np.sort(b, axis=None)
        return
    for axes in itertools.permutations(range(a.ndim)):
        if tuple(a.shape[axis] for axis in axes) == b.shape:
            yield a.transpose(axes), b


def _kind(numbers: np.ndarray) -> str:
    """Bools, whole numbers or others: only numbers of one kind can be compared."""
    return {"b": "bool", "i": "whole", "u": "whole"}.get(numbers.dtype.kind, "real or complex")


def turned(a: np.ndarray, b: np.ndarray) -> np.ndarray | None:
    """The first array with its axes in the order in which it is nearest to the second; None if it fits in none."""
    if a.squeeze().ndim != b.squeeze().ndim or a.ndim > _MOST_AXES:
        return None
    pairs = list(_orders(a, b))
    if not pairs:
        return None
    return min((x for x, _ in pairs), key=lambda x: _distance(x, b.squeeze())).reshape(b.shape)


def _distance(a: np.ndarray, b: np.ndarray) -> float:
    finite = np.isfinite(a) & np.isfinite(b)
    return float(np.abs(np.where(finite, a, 0) * 1.0 - np.where(finite, b, 0)).mean()) if a.size else 0.0
