"""Two trees of arrays, leaf by leaf: where they differ, by how much, and which of them is off."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import numpy as np

from torchbatch import tree
from torchbatch.errors import InputTypeError
from torchbatch.testing.tolerance import EXACT, Tolerance, Work, choose, customary
from torchbatch.testing.values import FORMATS, Values, is_array, read

#: What may be wrong with a leaf, the first that applies: everything after it could not be compared.
PROBLEMS = ("structure", "type", "shape", "dtype", "device", "nonfinite", "values", "inputs", "randomness")


@dataclasses.dataclass(frozen=True)
class Worst:
    """The place where two leaves differ most, measured in tolerances.

    Attributes:
        index: the place, one whole number for each axis.
        got, expected: the numbers there.
        reference: the number of the float64 reference there, if there is one.
    """

    index: tuple[int, ...]
    got: Any
    expected: Any
    reference: Any = None


@dataclasses.dataclass(frozen=True)
class LeafDifference:
    """What is known of one leaf in two runs.

    Attributes:
        where: the leaf's place in the output, such as ``output['loss'][0]``.
        problem: None if they are the same, or one of ``torchbatch.testing.compare.PROBLEMS``.
        message: what is wrong, in one line.
        got, expected: dtype and shape of both, as text.
        max_abs, max_rel: the largest absolute and relative difference of finite numbers.
        max_ulp: the largest difference in units of the last place of the coarser format; None for whole numbers.
        differing: how many numbers are further apart than the tolerance, or not finite in the same way.
        size: how many numbers there are.
        worst: where they differ most.
        nonfinite: how many of both are NaN, inf or -inf, in one line; empty if none is.
        tolerance: what was allowed.
        got_off, expected_off: the largest error of each against the float64 reference, in units of the tolerance at that place.
        heat: the errors in tolerances, folded into at most 48 rows of 96 columns by taking the largest; None without numbers.
        shape: the shape of both, where numbers were compared.
    """

    where: str
    problem: str | None
    message: str
    got: str
    expected: str
    max_abs: float = 0.0
    max_rel: float = 0.0
    max_ulp: float | None = None
    differing: int = 0
    size: int = 0
    worst: Worst | None = None
    nonfinite: str = ""
    tolerance: Tolerance = EXACT
    got_off: float | None = None
    expected_off: float | None = None
    heat: np.ndarray | None = dataclasses.field(default=None, repr=False, compare=False)
    shape: tuple[int, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether the leaf is the same in both runs."""
        return self.problem is None

    def blamed(self, got: str, expected: str) -> str:
        """Which of the two is off, by the reference: one of the given names, ``"both"``, or an empty text if nobody knows."""
        if self.got_off is None or self.expected_off is None:
            return ""
        off = [name for name, by in ((got, self.got_off), (expected, self.expected_off)) if not by <= 1]
        return "both" if len(off) == 2 else "".join(off)


@dataclasses.dataclass(frozen=True)
class Rules:
    """What counts as a difference.

    Attributes:
        tolerance: what is allowed for numbers; None to choose it from dtype, work and reference.
        work: how much was computed; None if nobody knows, then without a reference the tolerance is the customary one.
        dtypes: whether dtypes must be equal; if not, they must be of one kind (bool, whole, real, complex).
        devices: whether devices must be equal.
        numbers: whether a Python number may stand for an array without axes.
    """

    tolerance: Tolerance | None = None
    work: Work | None = dataclasses.field(default_factory=Work)
    dtypes: bool = True
    devices: bool = True
    numbers: bool = False


def compare(
    got: Any, expected: Any, reference: Any = None, rules: Rules | None = None, where: str = "output"
) -> list[LeafDifference]:
    """Compare two trees leaf by leaf.

    Args:
        got: the output of the run in question.
        expected: the output that it should have.
        reference: the output in float64, to say which of them is off; None if there is none. Where its structure is another
            one it is not used.
        rules: what counts as a difference.
        where: what to call the trees.

    Returns:
        One entry for each leaf of ``expected``, in order; a single one if the structures differ.
    """
    rules = rules or Rules()
    mine, theirs = _paths(got, where), _paths(expected, where)
    problem = _structures(got, expected, mine, theirs, where)
    if problem is not None:
        return [LeafDifference(where, "structure", problem, _outline(mine), _outline(theirs))]
    aside = _paths(reference, where)
    references: Iterable[Any] = aside.values() if aside.keys() == theirs.keys() else [None] * len(theirs)
    rows = zip(theirs, mine.values(), theirs.values(), references, strict=True)
    return [compare_leaf(name, a, b, c, rules) for name, a, b, c in rows]


def compare_leaf(where: str, got: Any, expected: Any, reference: Any, rules: Rules) -> LeafDifference:
    """Compare two leaves."""
    if not (is_array(got) and is_array(expected)):
        return _compare_objects(where, got, expected)
    a, b = read(got), read(expected)
    c = read(reference) if reference is not None and is_array(reference) else None
    problem = _outside(a, b, rules)
    if problem is not None:
        kind, message = problem
        return LeafDifference(where, kind, message, str(a), str(b), size=b.numbers.size)
    return _compare_numbers(where, a, b, c if c is not None and c.shape == b.shape else None, rules)


# --- structure -------------------------------------------------------------------------------------------------------


def _paths(value: Any, where: str) -> dict[str, Any]:
    found, _ = tree.flatten_with_path(value)
    return {where + tree.keystr(path): leaf for path, leaf in found}


def _structures(got: Any, expected: Any, mine: dict[str, Any], theirs: dict[str, Any], where: str) -> str | None:
    """What is wrong with the containers of a tree, if anything is."""
    if mine.keys() != theirs.keys():
        missing, more = theirs.keys() - mine.keys(), mine.keys() - theirs.keys()
        if where in mine or where in theirs:
            return f"{_form(got, mine)} instead of {_form(expected, theirs)}"
        parts = [f"{word} {', '.join(sorted(names)[:4])}" for word, names in (("lacks", missing), ("has", more)) if names]
        return f"the output {' and '.join(parts)}"
    if tree.structure(got) != tree.structure(expected):
        containers = [str(tree.structure(value)).removeprefix("PyTreeSpec(")[:-1] for value in (got, expected)]
        return f"the containers differ: {containers[0]} instead of {containers[1]}"
    return None


def _form(value: Any, paths: dict[str, Any]) -> str:
    """What a tree is, in a few words: a leaf, a container with leaves, or None."""
    if value is None:
        return "None"
    inside = "" if any(leaf is value for leaf in paths.values()) else f" of {_outline(paths)}"
    return f"a {type(value).__name__}{inside}"


def _outline(paths: dict[str, Any]) -> str:
    count = len(paths)
    return f"{count} {'leaf' if count == 1 else 'leaves'}"


def _compare_objects(where: str, got: Any, expected: Any) -> LeafDifference:
    names = (type(got).__name__, type(expected).__name__)
    if type(got) is not type(expected):
        return LeafDifference(where, "type", f"{where} is a {names[0]} instead of a {names[1]}", *names)
    if got is expected or _equal(where, got, expected):
        return LeafDifference(where, None, "", *names)
    return LeafDifference(where, "values", f"{where} is {got!r} instead of {expected!r}", *names, differing=1, size=1)


def _equal(where: str, got: Any, expected: Any) -> bool:
    try:
        return bool(got == expected)
    except Exception as error:
        raise InputTypeError(
            f"{where} is a {type(got).__name__}, which is neither an array nor a container that is known, and == cannot say "
            f"whether two are equal: {type(error).__name__}: {error}. Compare its parts, or make it a container: "
            f"torchbatch.tree.register_dataclass."
        ) from error


def _outside(a: Values, b: Values, rules: Rules) -> tuple[str, str] | None:
    """What is wrong with an array before its numbers are looked at."""
    if a.shape != b.shape:
        return "shape", f"shape {a.shape} instead of {b.shape}"
    if rules.numbers and "number" in (a.dtype, b.dtype):
        return None if _kind(a) == _kind(b) else ("dtype", f"{a.dtype} instead of {b.dtype}")
    if a.dtype != b.dtype and (rules.dtypes or _kind(a) != _kind(b)):
        return "dtype", f"dtype {a.dtype} instead of {b.dtype}"
    if rules.devices and a.device != b.device:
        return "device", f"device {a.device} instead of {b.device}"
    return None


def _kind(values: Values) -> str:
    kind = values.numbers.dtype.kind
    return "i" if kind == "u" else kind


# --- numbers ---------------------------------------------------------------------------------------------------------


def _compare_numbers(where: str, a: Values, b: Values, c: Values | None, rules: Rules) -> LeafDifference:
    chosen = customary(a, b) if rules.work is None and c is None else choose(a, b, c, rules.work)
    tolerance = rules.tolerance or chosen
    x, y = _common(a.numbers, b.numbers)
    finite = np.isfinite(x) & np.isfinite(y)
    apart = _apart(x, y, finite)
    errors = _in_tolerances(apart, y, tolerance)
    errors[~finite & ~_alike(x, y)] = np.inf
    differing = int((errors > 1).sum())
    odd = bool((errors == np.inf)[~finite].any())
    problem = "nonfinite" if odd else "values" if differing else None
    worst = _worst(errors, a, b, c)
    size = np.abs(np.where(finite, y, 0)).astype(np.float64)
    offs = [None if c is None else _off(values, c, tolerance) for values in (a, b)]
    found = LeafDifference(
        where=where,
        problem=problem,
        message="",
        got=str(a),
        expected=str(b),
        max_abs=float(apart.max(initial=0.0)),
        max_rel=float(np.divide(apart, size, out=np.zeros_like(apart), where=size > 0).max(initial=0.0)),
        max_ulp=_ulps(apart, x, y, finite, a, b),
        differing=differing,
        size=int(errors.size),
        worst=worst,
        nonfinite=_nonfinite(x, y),
        tolerance=tolerance,
        got_off=offs[0],
        expected_off=offs[1],
        heat=_folded(errors),
        shape=b.shape,
    )
    return dataclasses.replace(found, message=_sentence(found))


def _common(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both in one type that holds either; whole numbers with and without a sign as float64, where they are large."""
    if a.dtype == b.dtype:
        return a, b
    if {a.dtype.kind, b.dtype.kind} == {"i", "u"}:
        small = max(int(array.max(initial=0)) for array in (a, b)) < 2**63
        return (a.astype(np.int64), b.astype(np.int64)) if small else (a.astype(np.float64), b.astype(np.float64))
    both = np.result_type(a, b)
    return a.astype(both), b.astype(both)


def _apart(x: np.ndarray, y: np.ndarray, finite: np.ndarray) -> np.ndarray:
    """The distance of finite numbers, 0 elsewhere, in float64."""
    if x.dtype.kind == "b":
        return np.asarray(x != y, np.float64)
    if x.dtype.kind in "iu":
        return np.asarray(np.asarray(np.where(x > y, x - y, y - x), np.uint64), np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        return np.asarray(np.where(finite, np.abs(x - y), 0.0))


def _in_tolerances(apart: np.ndarray, y: np.ndarray, tolerance: Tolerance) -> np.ndarray:
    """Distances as multiples of what is allowed; any distance is infinite where nothing is."""
    size = np.abs(y.astype(np.complex128 if y.dtype.kind == "c" else np.float64))
    allowed = tolerance.atol + tolerance.rtol * np.where(np.isfinite(size), size, 0.0)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        return np.asarray(np.where(apart == 0, 0.0, apart / allowed))


def _alike(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Where numbers are not finite in the same way; NaN is like NaN."""
    if x.dtype.kind == "c":
        return np.asarray(_alike(x.real, y.real) & _alike(x.imag, y.imag))
    return np.asarray((x == y) | (np.isnan(x) & np.isnan(y)) | (np.isfinite(x) & np.isfinite(y)))


def _worst(errors: np.ndarray, a: Values, b: Values, c: Values | None) -> Worst | None:
    if errors.size == 0:
        return None
    index = tuple(int(place) for place in np.unravel_index(int(np.argmax(errors)), errors.shape))
    return Worst(index, *(None if values is None else values.numbers[index].item() for values in (a, b, c)))


def _off(values: Values, reference: Values, tolerance: Tolerance) -> float:
    """The largest error against the reference, in tolerances."""
    x, y = _common(values.numbers, reference.numbers)
    finite = np.isfinite(x) & np.isfinite(y)
    errors = _in_tolerances(_apart(x, y, finite), y, tolerance)
    errors[~finite & ~_alike(x, y)] = np.inf
    return float(errors.max(initial=0.0))


def _ulps(apart: np.ndarray, x: np.ndarray, y: np.ndarray, finite: np.ndarray, a: Values, b: Values) -> float | None:
    formats = [values.format for values in (a, b) if values.format is not None]
    if not formats:
        return None
    epsilon, smallest = max((FORMATS[name] for name in formats), key=lambda format: format[0])
    size = np.where(finite, np.maximum(np.abs(x), np.abs(y)), smallest)
    unit = epsilon * 2.0 ** np.floor(np.log2(np.maximum(size, smallest)))
    return float((apart / unit).max(initial=0.0))


def _nonfinite(x: np.ndarray, y: np.ndarray) -> str:
    counts = []
    for name, test in (("NaN", np.isnan), ("inf", _positive_inf), ("-inf", _negative_inf)):
        mine, theirs = int(test(x).sum()), int(test(y).sum())
        if mine or theirs:
            counts.append(f"{name} {mine} instead of {theirs}" if mine != theirs else f"{name} {mine}")
    return ", ".join(counts)


def _positive_inf(x: np.ndarray) -> np.ndarray:
    return np.asarray(np.isinf(x) & (x.real > 0))


def _negative_inf(x: np.ndarray) -> np.ndarray:
    return np.asarray(np.isinf(x) & ~(x.real > 0))


def _folded(errors: np.ndarray, rows: int = 48, columns: int = 96) -> np.ndarray | None:
    """The errors as a picture: the last axis across, all others down, the largest error of each cell."""
    if errors.size == 0:
        return None
    flat = errors.reshape(-1, errors.shape[-1]) if errors.ndim > 1 else errors.reshape(1, -1)
    for axis, most in ((0, rows), (1, columns)):
        starts = np.linspace(0, flat.shape[axis], min(most, flat.shape[axis]), endpoint=False).astype(int)
        flat = np.maximum.reduceat(flat, starts, axis=axis)
    return flat


def _sentence(found: LeafDifference) -> str:
    if found.problem is None or found.worst is None:
        return ""
    worst = found.worst
    text = f"{found.differing} of {found.size} differ, most at {list(worst.index)}: {worst.got!r} instead of {worst.expected!r}"
    if found.problem == "nonfinite":
        return f"{text} ({found.nonfinite or 'not finite in other places'})"
    ulps = "" if found.max_ulp is None else f", {found.max_ulp:.3g} ulp"
    return f"{text} (at most {found.max_abs:.3g} apart{ulps}; allowed: {found.tolerance})"
