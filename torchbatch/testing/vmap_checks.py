"""``check_vmap``: is the mapped function the loop, in every way to run it?"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from torchbatch import tree
from torchbatch.errors import AxisError, AxisNameError, AxisSpecError, RandomnessError, UnmappedOutputError
from torchbatch.testing import gradients
from torchbatch.testing import randomness as draws
from torchbatch.testing.compare import LeafDifference, Rules, compare
from torchbatch.testing.failing_program import written_out
from torchbatch.testing.gradients import FORWARD, INSIDE, REVERSE
from torchbatch.testing.outcomes import Outcome, attempt, errors_compared, line
from torchbatch.testing.precision import precision_policy
from torchbatch.testing.report import Check, Report
from torchbatch.testing.tolerance import Tolerance, Work, is_amount
from torchbatch.testing.variants import Call, Variant, call_of, copied, order, spread, take
from torchbatch.testing.variants import variants as all_variants
from torchbatch.testing.verdicts import closer, distance, doubtful, flattened, leaves_compared, unspoiled, writes_compared
from torchbatch.testing.ways import BACKENDS, LOOP, Flat, Way, hand_written, lacking
from torchbatch.testing.ways import ways as all_ways

DERIVATIVES = ("reverse", "forward", "differences")
VALUES = "values"


def check_vmap(
    fun: Callable[..., Any],
    *args: Any,
    in_axes: Any = 0,
    out_axes: Any = 0,
    axis_name: Hashable = None,
    axis_size: int | None = None,
    kwargs: dict[str, Any] | None = None,
    batched: Callable[..., Any] | None = None,
    backends: Sequence[str] = ("eager", "chunked", "jit", "nested", "compile"),
    derivatives: Sequence[str] = DERIVATIVES,
    variants: bool = True,
    tolerance: Tolerance | float | None = None,
    randomness: str = "error",
    raise_on_failure: bool = True,
    seed: int = 0,
) -> Report:
    """Hold every way to map a function against the plain loop: values, derivatives and errors.

    Shapes: the arguments are those of ``vmap(fun)``, with the batch in them.

    Each way runs on the arguments as given, and on changed ones: batch axes elsewhere, samples in another order, batches of 1
    and of 0, memory that is not contiguous. Each is held against the loop on the same arguments: structure, dtypes, shapes,
    devices, numbers, what was written into the arguments, and errors, which both raise or none.

    Args:
        fun: a function of one sample.
        args: its arguments, with the batch in them.
        in_axes, out_axes, axis_name, axis_size, randomness: as in :func:`torchbatch.vmap`. With a ``randomness`` other than
            ``"error"``, a function that draws is checked for what can be known: shapes, dtypes, and whether samples share.
        kwargs: its keyword arguments, mapped over axis 0.
        batched: a batched version that you wrote. It gets the arguments as they are, and is held against the loop too.
        backends: which ways to run: ``"eager"`` (``vmap``), ``"chunked"`` (with ``chunk_size``), ``"traced"`` (what ``jit``
            records, replayed without a compiler), ``"jit"``, ``"nested"`` (inside another ``vmap``), ``"compile"``
            (``torch.compile`` of ``vmap``).
        derivatives: what of derivatives to check: ``"reverse"`` (the gradient of the mapped function, and the mapped gradient
            of ``fun``), ``"forward"``, ``"differences"`` (both modes against differences of the values in float64, which finds
            wrong rules; leave it out where a gradient is not the derivative on purpose, as with ``stop_gradient``).
        variants: whether to run on changed arguments too.
        tolerance: what is allowed; None to choose it for each leaf from its dtype, from what the function computes, and from
            what the loop itself is off a float64 run, or changes by when its arguments change by a last place.
        raise_on_failure: whether a difference is an error.
        seed: of the permutation, of the tangents and of the cotangents.

    Returns:
        The report; ``print`` it.

    Raises:
        EquivalenceError: something differs; ``error.report`` is the report.
        AxisSpecError, AxisError, InputTypeError, UnmappedOutputError: those of ``vmap``, for axes that do not fit.
        RandomnessError: the function draws random numbers, and ``randomness`` is ``"error"``.
        AxisNameError: the function looks across the samples, which a loop cannot.

    Example:
        >>> import torch
        >>> from torchbatch.testing import check_vmap
        >>> def distance(a, b):
        ...     return (a - b).abs().sum()
        >>> x, y = torch.arange(12.0).reshape(4, 3), torch.ones(3)
        >>> report = check_vmap(distance, x, y, in_axes=(0, None), backends=("eager", "chunked"))
        >>> report.passed
        True
        >>> def by_hand(x, y):                             # sums over the samples too
        ...     return (x - y).abs().sum().expand(len(x))
        >>> report = check_vmap(distance, x, y, in_axes=(0, None), batched=by_hand, backends=(), raise_on_failure=False)
        >>> report.failures[0].name
        'batched, values, as given'
    """
    _check_options(fun, batched, backends, derivatives, randomness)
    _check_values(kwargs, axis_name, seed)
    options = {"axis_name": axis_name, "axis_size": axis_size, "randomness": randomness}
    call = call_of(fun, args, dict(kwargs or {}), in_axes=in_axes, out_axes=out_axes, **options)
    chosen = [*([] if batched is None else [hand_written(batched)]), *all_ways(backends, call.size)]
    checker = _Checker(Variant("as given", call), chosen, tuple(derivatives), _tolerance(tolerance), seed)
    with torch.inference_mode(False), torch.enable_grad():  # what is checked of derivatives is checked wherever it is called
        checks = tuple(checker.drawn() if draws.is_drawn(call, seed) else checker.all(variants))
    report = Report(
        title=f"check_vmap({getattr(fun, '__name__', type(fun).__name__)})",
        checks=checks,
        inputs=tuple(call.described()),
        notes=tuple(checker.notes()),
        precision=precision_policy(),
        reproducer=checker.reproduced(checks),
    )
    return report.raise_if_failed() if raise_on_failure else report


# --- options ---------------------------------------------------------------------------------------------------------


def _check_options(fun: Any, batched: Any, backends: Any, derivatives: Any, randomness: Any) -> None:
    for name, value in (("fun", fun), ("batched", batched)):
        if not callable(value) and (value is not None or name == "fun"):
            raise AxisSpecError(f"check_vmap: {name} must be a function, but it is {value!r} of type {type(value).__name__}.")
    for name, given, known in (("backends", backends, BACKENDS), ("derivatives", derivatives, DERIVATIVES)):
        if isinstance(given, str) or not isinstance(given, Sequence):
            raise AxisSpecError(f"check_vmap: {name} must be a sequence of names, such as ({known[0]!r},), but it is {given!r}.")
        for item in given:
            if item not in known:
                raise AxisSpecError(f"check_vmap: {name} has {item!r}, but knows only {', '.join(map(repr, known))}.")
    if batched is None and not backends:
        raise AxisSpecError("check_vmap: backends is empty and there is no batched function: there is nothing to check.")
    if randomness not in ("error", "different", "same"):
        raise AxisSpecError(f"check_vmap: randomness must be 'error', 'different' or 'same', but it is {randomness!r}.")


def _check_values(kwargs: Any, axis_name: Any, seed: Any) -> None:
    if kwargs is not None and not (isinstance(kwargs, dict) and all(isinstance(name, str) for name in kwargs)):
        raise AxisSpecError(f"check_vmap: kwargs must be a dict of arguments by name, or None, but it is {kwargs!r}.")
    if not isinstance(axis_name, Hashable):
        raise AxisSpecError(f"check_vmap: axis_name must be hashable, but it is {axis_name!r}.")
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**64:
        raise AxisSpecError(f"check_vmap: seed must be a whole number from 0 up to 2**64 - 1, but it is {seed!r}.")


def _tolerance(given: Tolerance | float | None) -> Tolerance | None:
    if given is None or isinstance(given, Tolerance):
        return given
    if not is_amount(given):
        raise AxisSpecError(
            f"check_vmap: tolerance must be a Tolerance, a number that serves as rtol and atol, or None, but it is {given!r}."
        )
    return Tolerance(float(given), float(given))


# --- running ---------------------------------------------------------------------------------------------------------


class _Counter(TorchFunctionMode):
    """Counts operations, and how long a sum in one of them may be."""

    def __init__(self) -> None:
        super().__init__()
        self.operations, self.longest = 0, 1

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations += 1
        self.longest = max(self.longest, *(x.numel() for x in args if isinstance(x, torch.Tensor)), 1)
        return func(*args, **(kwargs or {}))


def _work(call: Call) -> Work:
    """How much a sample takes to compute, counted on the loop."""
    counter = _Counter()

    def counted(*args: Any, **kwargs: Any) -> Any:
        with counter:
            return call.fun(*args, **kwargs)

    flat = LOOP.make(dataclasses.replace(call, fun=counted))
    if attempt(lambda: flat([copied(tensor) for tensor in call.tensors])).error is not None:
        return Work()
    return Work(min(max(counter.operations // max(call.size, 1), 16), 10_000), min(max(counter.longest, 64), 1_000_000))


# --- checking --------------------------------------------------------------------------------------------------------


class _Checker:
    """One call of :func:`check_vmap`."""

    def __init__(
        self, given: Variant, ways: list[Way], derivatives: tuple[str, ...], tolerance: Tolerance | None, seed: int
    ) -> None:
        self.given, self.ways, self.derivatives, self.tolerance, self.seed = given, ways, derivatives, tolerance, seed
        self.flats: dict[tuple[str, str], Flat] = {}
        self.loops: dict[tuple[str, str], Outcome] = {}
        self.references: dict[tuple[str, str], Any] = {}
        self.scatters: dict[tuple[str, str], list[float]] = {}
        self.calls = {given.name: given.call}
        self.lacks: dict[str, str] = {}
        self.work, self.drawing, self.steady = Work(), False, True
        self.broken: set[str] = set()

    # --- what is checked

    def drawn(self) -> Iterator[Check]:
        """The checks of a function that draws random numbers."""
        self.drawing = True
        for way in self.ways:
            yield from (self._or_skipped(way, check) for check in draws.checked(way, self.given.call, self.seed))

    def all(self, variants: bool) -> Iterator[Check]:
        """The checks of a function that draws none."""
        call = self.given.call
        loop = self.loop(self.given, VALUES)
        if isinstance(loop.error, RandomnessError):
            raise loop.error
        if isinstance(loop.error, AxisNameError) and call.axis_name is not None:
            raise AxisNameError(
                f"check_vmap: the function looks across the samples, by the axis name {call.axis_name!r}. A loop has one sample "
                f"at a time, so there is nothing to hold it against."
            ) from loop.error
        if isinstance(loop.error, AxisError | AxisSpecError | UnmappedOutputError) and self._runs_with_plain_out_axes():
            raise loop.error
        if loop.error is None:
            self.work = _work(call)
            again = self._loop_again()
            self.steady = again.status == "passed"
            yield again
        yield from self._as_given()
        if variants:
            for variant in all_variants(call, self.seed):
                self.calls[variant.name] = variant.call
                yield from self._on(variant)

    def _runs_with_plain_out_axes(self) -> bool:
        """Whether the function itself is fine, if the loop fails: then ``out_axes`` do not fit."""
        call = dataclasses.replace(self.given.call, out_axes=0)
        return self._measured(call, LOOP, LOOP.make(call), VALUES, None).error is None

    def _as_given(self) -> Iterator[Check]:
        fine = []
        for way in self.ways:
            check = self.check(way, self.given, VALUES)
            yield check
            if check.status == "skipped" or check.problem == "error":
                self.broken.add(way.name)
            elif check.problem in (None, "values", "nonfinite", "inputs"):
                fine.append(way)
        if not self._has_derivatives(self.given):
            return
        if "reverse" in self.derivatives:
            yield from (self.check(way, self.given, REVERSE) for way in fine)
            inner = [way for way in fine if way.kind in ("eager", "chunked")]
            yield from (self.check(way, self.given, INSIDE) for way in inner)
        if "forward" in self.derivatives:
            yield from (self.check(way, self.given, FORWARD) for way in fine if not way.traced)
        if "differences" in self.derivatives:
            yield from self._differences()

    def _on(self, variant: Variant) -> Iterator[Check]:
        if variant.name == "samples permuted" and self.loop(self.given, VALUES).error is None:
            yield self._loop_permuted(variant)
        if variant.call.size == 0 and self.loop(variant, VALUES).error is not None:
            return  # there is no sample, and the function fails on the made-up one
        for way in self._ways_on(variant):
            check = self.check(way, variant, VALUES)
            yield check
            differentiated = way.kind in ("eager", "batched") and "reverse" in self.derivatives and variant.call.size > 0
            if differentiated and check.status == "passed" and self._has_derivatives(variant):
                yield self.check(way, variant, REVERSE)

    def _ways_on(self, variant: Variant) -> list[Way]:
        last = [way for way in self.ways if way.kind == "chunked"][-1:]
        return [way for way in self.ways if way.name not in self.broken and _runs_on(way, variant, way in last)]

    def _has_derivatives(self, variant: Variant) -> bool:
        loop = self.loop(variant, VALUES)
        return loop.error is None and gradients.is_differentiable(variant.call, loop.value)

    # --- one run against another

    def check(self, way: Way, variant: Variant, what: str) -> Check:
        """One way against the loop."""
        loop = self.loop(variant, what)
        made = self._made(way, variant)
        found = made if isinstance(made, Outcome) else self._measured(variant.call, way, made, what, self._like(variant, what))
        head = (way.name, "loop", what, variant.name)
        if what != VALUES and found.error is None and isinstance(loop.error, NotImplementedError):
            return Check(*head, "skipped", None, f"PyTorch cannot differentiate the loop: {line(loop.error)}", (), found.seconds)
        if found.error is not None or loop.error is not None:
            return self._or_skipped(way, errors_compared(head, found, loop, way.kind == "compile"))
        work = self.work if what == VALUES else Work(4 * self.work.operations, self.work.longest * max(variant.call.size, 1))
        rules = Rules(self.tolerance, work, numbers=way.numbers)
        value = unspoiled(found.value, loop.value) if way.kind == "nested" and what == REVERSE else found.value
        leaves = self._compared(value, loop.value, variant, what, rules)
        if what == VALUES and way.kind != "nested":  # which gets copies
            leaves += writes_compared(variant.call.names, found.inputs, loop.inputs, rules)
        return Check.of_leaves(*head, leaves, found.seconds)

    def _compared(self, found: Any, expected: Any, variant: Variant, what: str, rules: Rules) -> list[LeafDifference]:
        """The leaves of two outcomes; how well the loop can do is asked only where they differ by more than rounding."""
        leaves = leaves_compared(found, expected, None, what, rules)
        if self.tolerance is not None or not doubtful(leaves):
            return leaves
        reference = self.reference(variant, what)
        leaves = leaves_compared(found, expected, reference, what, rules)
        if not doubtful(leaves):
            return leaves
        return leaves_compared(found, expected, reference, what, rules, self.scatter(variant, what))

    def loop(self, variant: Variant, what: str) -> Outcome:
        """What the loop gives."""
        key = variant.name, what
        if key not in self.loops:
            self.loops[key] = self._measured(variant.call, LOOP, LOOP.make(variant.call), what, self._like(variant, what))
        return self.loops[key]

    def _like(self, variant: Variant, what: str) -> Any:
        """What the loop returns, for a derivative of it."""
        return None if what == VALUES else self.loop(variant, VALUES).value

    def reference(self, variant: Variant, what: str) -> Any:
        """What the loop gives in float64, with the numbers moved a little to one side or to the other, where it is closer.

        One of both sides lies beyond a jump of the function, where there is one.
        """
        key = variant.name, what
        if key not in self.references:
            calls, like = [variant.call.widened(nudge) for nudge in (0.5, -0.5)], self._like(variant, what)
            found = [self._measured(call, LOOP, LOOP.make(call), what, like) for call in calls]
            expected = self.loop(variant, what).value
            values = [outcome.value for outcome in found if outcome.error is None]
            values = [value for value in values if tree.structure(value) == tree.structure(expected)]
            self.references[key] = tree.map(closer, expected, *values) if values else None
        return self.references[key]

    def scatter(self, variant: Variant, what: str) -> list[float]:
        """By how much each leaf of the loop changes when numbers move by a last place, up or down, whichever changes it less."""
        key = variant.name, what
        if key not in self.scatters:
            like, expected = self._like(variant, what), flattened(self.loop(variant, what).value, what)
            sides = []
            for nudge in (1.0, -1.0):
                calls = [variant.call.nudged(nudge, seed) for seed in range(1, 4)]
                runs = [self._measured(call, LOOP, LOOP.make(call), what, like) for call in calls]
                found = [flattened(run.value, what) for run in runs if run.error is None]
                found = [leaves for leaves in found if len(leaves) == len(expected)]
                sides.append([max((distance(x, y[i]) for y in found), default=0.0) for i, x in enumerate(expected)])
            self.scatters[key] = [min(pair) for pair in zip(*sides, strict=True)]
        return self.scatters[key]

    def _made(self, way: Way, variant: Variant) -> Flat | Outcome:
        key = way.name, self.given.name if variant.alike else variant.name
        if key not in self.flats:
            made = attempt(lambda: way.make(variant.call))
            if made.error is not None:
                return made
            self.flats[key] = made.value
        return self.flats[key]

    def _measured(self, call: Call, way: Way, flat: Flat, what: str, like: Any) -> Outcome:
        if what == REVERSE:
            return attempt(lambda: gradients.reverse(call, flat, like, self.seed))
        if what == FORWARD:
            run = gradients.loop_in_full(call) if way is LOOP else flat
            return attempt(lambda: gradients.forward(call, run, like, self.seed))
        inputs = [copied(tensor) for tensor in call.tensors]
        if what == INSIDE:
            inner = gradients.inside(call, self.seed)
            return attempt(lambda: gradients.name_inside(call, way.make(inner)(inputs)))
        return attempt(lambda: flat(inputs), inputs)

    # --- the loop against what is known of it

    def _loop_again(self) -> Check:
        """A loop that gives something else the second time cannot be compared with anything."""
        call, first = self.given.call, self.loop(self.given, VALUES)
        again = self._measured(call, LOOP, LOOP.make(call), VALUES, None)
        head = ("loop", "loop", VALUES, "once more")
        if again.error is not None:
            return errors_compared(head, again, first)
        return Check.of_leaves(*head, compare(again.value, first.value, None, self._rules()), again.seconds)

    def _loop_permuted(self, variant: Variant) -> Check:
        """A loop gives the same for a sample, wherever it stands."""
        call, loop, given = self.given.call, self.loop(variant, VALUES), self.loop(self.given, VALUES)
        head = ("loop", "loop", VALUES, variant.name)
        if loop.error is not None:
            return errors_compared(head, loop, given)
        places = order(call, self.seed)
        axes = iter(spread(call.out_axes, given.value))
        expected = tree.map(lambda leaf: take(leaf, next(axes), places), given.value)
        return Check.of_leaves(*head, compare(loop.value, expected, None, self._rules()), loop.seconds)

    def _rules(self) -> Rules:
        return Rules(self.tolerance, self.work)

    def _differences(self) -> Iterator[Check]:
        """Both modes of the loop against differences of its values."""
        modes = [(name, what) for name, what in (("reverse", REVERSE), ("forward", FORWARD)) if name in self.derivatives]
        made = attempt(lambda: gradients.Differences(self.given.call, self.seed))
        for name, what in modes:
            if self.loop(self.given, what).error is not None:
                continue  # the function has no derivative in this mode, as the line of each way says
            head = ("loop", "differences", what, "as given, in float64")
            if made.error is not None:
                yield Check(*head, "skipped", None, f"the function does not run in float64: {line(made.error)}")
            elif made.value.narrow:
                yield Check(*head, "skipped", None, f"the function returns {made.value.narrow[0]} for float64")
            elif not made.value.slope.smooth:
                yield Check(*head, "skipped", None, "the function is not smooth at these inputs or close by")
            else:
                found = attempt(getattr(made.value, name))
                expected = made._replace(value=None)
                if found.error is not None:
                    yield errors_compared(head, found, expected)
                else:
                    yield Check.of_leaves(*head, [made.value.compared(found.value)], found.seconds)

    # --- what the machine lacks

    def _or_skipped(self, way: Way, check: Check) -> Check:
        """The check, or that there is no compiler."""
        if not way.compiled or check.problem != "error":
            return check
        if way.kind not in self.lacks:
            self.lacks[way.kind] = lacking(way)
        if not self.lacks[way.kind]:
            return check
        return dataclasses.replace(check, status="skipped", problem=None, message=f"no compiler: {self.lacks[way.kind]}")

    # --- what else the report says

    def notes(self) -> Iterator[str]:
        """What a reader should know."""
        loop = self.loops.get((self.given.name, VALUES))
        if loop is not None and loop.error is not None:
            yield f"note: the loop raises an error on these arguments, and so must every way: {line(loop.error)}"
        if not self.steady:
            yield "note: the function gives something else when it is called again, so that nothing can be compared with it"
        if self.tolerance is not None:
            yield f"tolerance: {self.tolerance}"
            return
        yield (
            f"tolerance: chosen for each leaf from its dtype, from {self.work.operations} operations for a sample with sums of "
            f"up to {self.work.longest}, and from what the loop is itself off a float64 run"
        )

    def reproduced(self, checks: Iterable[Check]) -> str:
        """A program in plain PyTorch that shows the first failure, as far as one can be written."""
        failed = next((check for check in checks if check.status == "failed"), None)
        if failed is None:
            return ""
        way = next((way for way in self.ways if way.name == failed.run), LOOP)
        seed = self.seed if self.drawing else None
        written = attempt(lambda: written_out(failed, self.calls.get(failed.variant, self.given.call), way, seed))
        return str(written.value) if written.error is None else f"# No program could be written: {line(written.error)}\n"


def _runs_on(way: Way, variant: Variant, last: bool) -> bool:
    """Whether a way runs on changed inputs; of the chunked ones only the last does."""
    if way.kind == "batched":
        return variant.given_layout
    if way.traced:
        return variant.alike
    return way.kind == "eager" or (variant.call.size > 1 and not variant.alike and (way.kind == "nested" or last))
