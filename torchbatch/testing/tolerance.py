"""How far two results may be apart: by what their numbers can hold, and by how much was computed."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from torchbatch.errors import AxisSpecError
from torchbatch.testing.values import FORMATS, Values

_NARROW, _NARROWEST = 8, 2  # how many last places a number of 16 bits, or of 8, may be off


def is_amount(value: Any) -> bool:
    """Whether a value is a real number from 0 up, Python's or NumPy's."""
    is_number = isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
    return is_number and bool(value >= 0)


@dataclasses.dataclass(frozen=True)
class Work:
    """How much was computed, as far as rounding goes.

    Attributes:
        operations: the number of operations, one after the other.
        longest: the longest sum that one of them may take.
    """

    operations: int = 16
    longest: int = 64


@dataclasses.dataclass(frozen=True)
class Tolerance:
    """``|a - b| <= atol + rtol * |b|``, and where it comes from.

    Attributes:
        rtol: relative to the expected number.
        atol: absolute.
        why: one line that says how it was chosen.

    Raises:
        AxisSpecError: one of them is no number from 0 up.
    """

    rtol: float
    atol: float
    why: str = "given"

    def __post_init__(self) -> None:
        for name, value in (("rtol", self.rtol), ("atol", self.atol)):
            if not is_amount(value):
                raise AxisSpecError(f"Tolerance: {name} must be a number from 0 up, but it is {value!r}.")

    def __str__(self) -> str:
        return f"rtol {self.rtol:.2g}, atol {self.atol:.2g} ({self.why})"


EXACT = Tolerance(0.0, 0.0, "whole numbers and bools are equal or not")


def rounding(format: str, work: Work) -> float:
    """The relative error that rounding explains: a few last places for each operation, as random errors add up.

    Formats of 16 bits and fewer sum in float32, so the length of sums counts only for the wider ones. Their last place is coarse:
    they are given fewer of them, so that a tenth more or less is a difference however long the computation was.

    Source: N. Higham, T. Mary, A new approach to probabilistic rounding error analysis, SIAM J. Sci. Comput. 41 (2019).
    """
    epsilon, steps = FORMATS[format][0], math.sqrt(work.operations)
    if epsilon < 1e-4:
        return min(epsilon * (8 + 2 * steps + math.sqrt(work.longest)), 0.5)
    return epsilon * min(2 + steps / 2, _NARROW if epsilon < 0.1 else _NARROWEST)


def customary(got: Values, expected: Values) -> Tolerance:
    """The tolerance of ``torch.testing.assert_close`` for the coarser of both formats; of float8, one last place."""
    formats = [values.format for values in (got, expected) if values.format is not None]
    if not formats:
        return EXACT
    coarser = max(formats, key=lambda name: FORMATS[name][0])
    return Tolerance(*_CUSTOMARY.get(coarser, FORMATS[coarser]), f"customary for {coarser}")


_CUSTOMARY = {"float64": (1e-7, 1e-7), "float32": (1.3e-6, 1e-5), "float16": (1e-3, 1e-5), "bfloat16": (1.6e-2, 1e-5)}


def choose(got: Values, expected: Values, reference: Values | None = None, work: Work | None = None) -> Tolerance:
    """The tolerance for one leaf: rounding in the coarser of both formats, and what the expected run is itself off by.

    A number may be off by rounding relative to the size of the whole leaf: sums cancel. Where the expected run is further than
    that from the reference, the problem is ill-conditioned, and the other may be as far off, eight times over.
    """
    formats = [values.format for values in (got, expected) if values.format is not None]
    if not formats:
        return EXACT
    work = work or Work()
    coarser = max(formats, key=lambda name: FORMATS[name][0])
    rtol = rounding(coarser, work)
    why = f"{coarser}, {work.operations} operations, sums of up to {work.longest}"
    size = _largest(expected.numbers if reference is None else reference.numbers)
    smallest = FORMATS[coarser][1]
    atol = max(rtol * size, 8 * smallest * FORMATS[coarser][0])
    if reference is not None and reference.shape == expected.shape:
        with np.errstate(invalid="ignore"):  # inf - inf
            off = 8 * _largest(expected.numbers - reference.numbers)
        if off > atol:
            return Tolerance(rtol, off, f"{why}; the expected run is {off / 8:.2g} off the float64 reference")
    return Tolerance(rtol, atol, why)


def _largest(numbers: np.ndarray) -> float:
    """The largest finite magnitude."""
    size = np.abs(numbers.astype(np.complex128 if numbers.dtype.kind == "c" else np.float64))
    finite = size[np.isfinite(size)]
    return float(finite.max()) if finite.size else 0.0
