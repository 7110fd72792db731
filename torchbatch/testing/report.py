"""``Report``: what was run, what was compared, and what differed."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from torchbatch.errors import EquivalenceError
from torchbatch.testing.compare import LeafDifference

_MOST_LEAVES = 5  # that the text of a failed check describes after the first
_MOST_LINES = 200  # of a program that the text shows
#: The statuses of a check.
STATUSES = ("passed", "failed", "skipped")


@dataclasses.dataclass(frozen=True)
class Argument:
    """One array that goes in or comes out, as it is shown.

    Attributes:
        name: the argument's name and the place in it, such as ``params['w']``, or ``output[0]``.
        dtype: the name of its type, such as ``"float32"``.
        shape: its shape, the batch axis included.
        axis: its batch axis, counted from the front; None for what all samples share.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    axis: int | None = None

    def __str__(self) -> str:
        axis = "not mapped" if self.axis is None else f"mapped over axis {self.axis}"
        return f"{self.name}: {self.dtype}{list(self.shape)}, {axis}"


@dataclasses.dataclass(frozen=True)
class Check:
    """One line of a report: one run held against another.

    Attributes:
        run: what was run, such as ``"eager"``, ``"jit"`` or ``"jax"``.
        against: what it was held against, such as ``"loop"``.
        what: what was compared, such as ``"values"``, ``"reverse-mode gradient"``, ``"per-sample gradient"``, ``"vjp"``.
        variant: on which inputs: ``"as given"``, ``"batch of 1"``, ``"axes moved: in_axes=(1, None)"``.
        status: ``"passed"``, ``"failed"`` or ``"skipped"``.
        problem: None, ``"error"`` (one run raised an exception and the other none, or another kind), or what is wrong with the
            first leaf that differs: ``"structure"``, ``"type"``, ``"shape"``, ``"dtype"``, ``"device"``, ``"nonfinite"``,
            ``"values"``, ``"inputs"`` (a run wrote something else into its arguments), ``"randomness"`` (samples share draws).
        message: what is wrong, or why it was skipped, or which error both raised; one line, or an error's text.
        leaves: every leaf that was compared.
        seconds: how long the run took, the first call included.
        reference: what says which of the two is off, where something does.
    """

    run: str
    against: str
    what: str
    variant: str
    status: str
    problem: str | None = None
    message: str = ""
    leaves: tuple[LeafDifference, ...] = ()
    seconds: float = 0.0
    reference: str = "float64 reference"

    @classmethod
    def of_leaves(
        cls,
        run: str,
        against: str,
        what: str,
        variant: str,
        leaves: Sequence[LeafDifference],
        seconds: float = 0.0,
        reference: str = "float64 reference",
    ) -> Check:
        """A check that passed if all leaves did; it is named after the first leaf that did not."""
        wrong = [leaf for leaf in leaves if not leaf.passed]
        if not wrong:
            return cls(run, against, what, variant, "passed", None, "", tuple(leaves), seconds, reference)
        first = wrong[0]
        blamed = first.blamed(run, against)
        blame = f"; the {reference} says that {blamed} is off" if blamed not in ("", "both") else ""
        message = f"{first.where}: {first.message}{blame}"
        return cls(run, against, what, variant, "failed", first.problem, message, tuple(leaves), seconds, reference)

    @property
    def name(self) -> str:
        """The line in a few words, such as ``"jit, reverse-mode gradient, batch of 1"``."""
        return f"{self.run}, {self.what}, {self.variant}"


@dataclasses.dataclass(frozen=True)
class Report:
    """Every check of a call, in order.

    Attributes:
        title: what was checked, such as ``"check_vmap(f)"``.
        checks: the lines.
        inputs: one line for each input leaf: its name, dtype, shape and batch axis.
        notes: what else a reader should know: how the tolerance was chosen, where runs first part.
        precision: the settings that the numbers depend on (:class:`torchbatch.testing.PrecisionPolicy`), or None.
        reproducer: a text in plain PyTorch that shows the first failure; empty if nothing failed.
        arguments: the arrays that went in, for the picture of a page; ``inputs`` are the same as text.
        outputs: the arrays that came out, if they are known.
    """

    title: str
    checks: tuple[Check, ...] = ()
    inputs: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    precision: Any = None
    reproducer: str = ""
    arguments: tuple[Argument, ...] = ()
    outputs: tuple[Argument, ...] = ()

    @property
    def failures(self) -> tuple[Check, ...]:
        """The checks that failed."""
        return tuple(check for check in self.checks if check.status == "failed")

    @property
    def passed(self) -> bool:
        """Whether no check failed. A report in which everything was skipped has not passed."""
        return not self.failures and any(check.status == "passed" for check in self.checks)

    def raise_if_failed(self) -> Report:
        """The report itself.

        Raises:
            EquivalenceError: a check failed, or none could be made.
        """
        if not self.passed:
            raise EquivalenceError(str(self), self)
        return self

    def __str__(self) -> str:
        return "\n".join(_lines(self))

    def to_dict(self) -> dict[str, Any]:
        """The report as dicts, lists, text and numbers; numbers that are not finite as text."""
        precision = None if self.precision is None else self.precision.to_dict()
        plain = _plain({field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "precision"})
        return {"passed": self.passed, **plain, "precision": precision}

    def save_json(self, path: str | Path) -> None:
        """Write :meth:`to_dict` to a file."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")


def _plain(value: Any) -> Any:
    """A value as JSON can hold it."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    if value is None or isinstance(value, str | bool | int) or (isinstance(value, float) and math.isfinite(value)):
        return value
    return str(value)


# --- text ------------------------------------------------------------------------------------------------------------


def _lines(report: Report) -> Iterable[str]:
    yield f"{report.title}: {summary(report)}"
    yield from (f"  {line}" for line in report.inputs)
    yield ""
    yield from table(report.checks)
    for check in report.failures:
        yield ""
        yield f"FAILED {check.name} ({check.problem}), against {check.against}:"
        yield from (f"  {line}" for line in check.message.splitlines())
        others = [leaf for leaf in check.leaves if not leaf.passed and not check.message.startswith(f"{leaf.where}: ")]
        yield from (f"  also {leaf.where}: {leaf.message}" for leaf in others[:_MOST_LEAVES])
        if len(others) > _MOST_LEAVES:
            yield f"  and {len(others) - _MOST_LEAVES} more leaves"
    if report.notes or (report.precision is not None and not report.passed):
        yield ""
        yield from report.notes
    if report.precision is not None and not report.passed:
        yield from (f"note: {warning}" for warning in report.precision.warnings())
    if report.reproducer:
        yield from ("", "To reproduce it in plain PyTorch:", "", program(report))


def program(report: Report) -> str:
    """The program that shows the first failure, or where it is if the numbers of its arguments would fill pages."""
    lines = report.reproducer.count("\n")
    if lines <= _MOST_LINES:
        return report.reproducer
    text = f"The program has {lines} lines with the numbers in it."
    return f"{text} It is report.reproducer, and stands in the files of JSON and HTML."


def summary(report: Report) -> str:
    """The outcome in a few words: ``"2 of 14 checks failed, 1 skipped"``."""
    count, failed = len(report.checks), len(report.failures)
    skipped = sum(check.status == "skipped" for check in report.checks)
    made = count - skipped
    checks = f"{made} {'check' if made == 1 else 'checks'}"
    outcome = f"{failed} of {checks} failed" if failed else f"{checks} passed" if made else "nothing checked"
    return outcome + (f", {skipped} skipped" if skipped else "")


def table(checks: Sequence[Check]) -> list[str]:
    """One line for each check, in columns."""
    rows = [("run", "what", "on", "", "largest difference")]
    rows += [(check.run, check.what, check.variant, check.status, extent(check)) for check in checks]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, [*widths, 0], strict=True)).rstrip() for row in rows]


def extent(check: Check) -> str:
    """The largest difference of a check in a few words, or why there is none."""
    if check.status == "skipped" or not check.leaves:
        return check.message.splitlines()[0] if check.message else ""
    if check.problem not in (None, "values"):
        return str(check.problem)
    largest = max(check.leaves, key=lambda leaf: (not leaf.passed, leaf.max_abs))
    if largest.max_abs == 0:
        return "equal"
    ulps = "" if largest.max_ulp is None else f", {largest.max_ulp:.3g} ulp"
    return f"{largest.max_abs:.2g}{ulps}"
