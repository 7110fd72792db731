"""``check_equivalent``: is it the same function, in PyTorch, in JAX and in NumPy?"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from torchbatch import tree
from torchbatch.errors import AxisSpecError, GradientTypeError, GradientValueError
from torchbatch.testing.arguments import arrays_of, line
from torchbatch.testing.compare import LeafDifference, Rules, compare
from torchbatch.testing.divergence import Version, parting
from torchbatch.testing.frameworks import (
    Fun,
    MissingTransformError,
    as_tensors,
    framework,
    has_wide,
    parse,
)
from torchbatch.testing.noise import changes, forgiven, is_far, nudged, strays
from torchbatch.testing.precision import PrecisionPolicy, precision_policy
from torchbatch.testing.references import (
    Counter,
    NoReferenceError,
    count_jax,
    in_float64,
    parse_reference,
    with_digits,
    work_of,
)
from torchbatch.testing.report import Check, Report
from torchbatch.testing.tolerance import Tolerance, Work
from torchbatch.testing.transformed import (
    Options,
    argument_names,
    label,
    parse_transform,
    path_name,
    result_name,
    transformed,
)
from torchbatch.testing.values import is_array, read

_SMALL = {"int64": "int32", "uint64": "uint32"}  # what JAX makes of them without 64-bit numbers


def check_equivalent(
    versions: Mapping[str, Any],
    *args: Any,
    transforms: Sequence[Any] | None = None,
    in_axes: Any = 0,
    out_axes: Any = 0,
    argnums: int | Sequence[int] | None = None,
    has_aux: bool = False,
    against: str | None = None,
    reference: Any = "float64",
    tolerance: Tolerance | None = None,
    dtypes: bool = True,
    writes: bool = False,
    x64: bool | None = None,
    backend: str | Callable[..., Any] = "inductor",
    seed: int = 0,
    raise_on_failure: bool = True,
) -> Report:
    """Check that versions of a function, in PyTorch, JAX and NumPy, give the same: values, gradients and batches.

    Every version gets its own copies of the same inputs, and every result is compared leaf by leaf with that of the version that
    is trusted: containers, shapes, dtypes, NaN and Inf, numbers. A reference with more digits says which of the two is off. If
    values differ, the report names the first intermediate value that does, with the lines that computed it.

    Args:
        versions: the functions by name. The first word of a name is the framework: ``"torch"``, ``"jax"``, ``"numpy"``, ``"torch
            old"``. A version with the word ``jit`` (``"torch jit"``, ``"jax jit"``) is compiled; with ``loop``
            (``"torch loop"``), ``vmap`` is the plain loop. Under any other name, give a pair: ``{"mine": ("torch", fun)}``.
        args: the arguments, trees of tensors, NumPy or JAX arrays, and Python numbers.
        transforms: what to compare: ``"value"``, ``"grad"``, ``"value_and_grad"``, ``"vjp"`` and ``"jvp"`` (along a fixed random
            direction), ``"jacobian"``, ``"hessian"``, ``"vmap"``, ``"jit"``, and tuples of them, the outermost first: ``("vmap",
            "grad")``. Each framework uses its own transforms; a version whose framework has none is skipped. By default the
            values, and if the function returns one real number its gradient, else ``"vjp"``.
        in_axes, out_axes: for ``"vmap"``, as for :func:`torchbatch.vmap`.
        argnums: the positions of the arguments to differentiate by; by default all that hold real or complex numbers only.
        has_aux: whether functions return ``(output, aux)``, of which only the output is differentiated.
        against: the version that is trusted; by default the first.
        reference: ``"float64"``: the trusted version, run in float64. ``"mpmath"``: the trusted version, which must be PyTorch's,
            run with fifty digits, on small arrays. A function of NumPy arrays in float64, or a pair such as ``("jax", fun)``:
            then the trusted version is held against it too. None for no reference.
        tolerance: how far numbers may be apart; by default what rounding explains, by dtype, the number of operations and the
            reference.
        dtypes: whether dtypes must be equal; if not, they must be of one kind.
        writes: whether versions may write into their arguments.
        x64: whether JAX has 64-bit numbers. By default it does if an argument holds real or complex numbers of 64 bits, or
            integers that need them. Without, JAX's int32 counts as int64.
        backend: what compiles PyTorch functions, as for :func:`torchbatch.jit`.
        seed: decides directions of derivatives, and PyTorch's random numbers: every version starts from this seed.
        raise_on_failure: whether to raise an error, rather than return the report, if a check failed.

    Returns:
        The report: ``print(report)``; ``report.passed``; ``report.checks`` are its lines.

    Raises:
        EquivalenceError: the versions differ, or nothing could be compared; the error's text is the report.
        AxisSpecError: an option or a name is not known.
        GradientTypeError: ``"grad"`` or ``"hessian"`` is asked for, and the trusted version does not return one number.
        ImportError: JAX or mpmath is needed and not installed.

    Example:
        >>> import numpy as np, torch
        >>> from torchbatch.testing import check_equivalent
        >>> def in_torch(x, w):
        ...     return torch.softmax(x @ w, -1)
        >>> def in_numpy(x, w):
        ...     e = np.exp(x @ w)
        ...     return e / e.sum(-1, keepdims=True)
        >>> print(check_equivalent({"torch": in_torch, "numpy": in_numpy}, torch.eye(2, 3), torch.ones(3, 2)))
        check_equivalent(torch, numpy): 1 check passed, 1 skipped
          x: float32[2, 3]
          w: float32[3, 2]
        <BLANKLINE>
        run    what    on                 largest difference
        numpy  values  as given  passed   equal
        numpy  vjp     as given  skipped  NumPy has no vjp
    """
    if not isinstance(versions, Mapping):
        raise AxisSpecError(f"check_equivalent takes a dict of functions by name first, but it got {versions!r}.")
    _check_options(tolerance, seed)
    tensors = as_tensors(args)
    wide = has_wide(tensors) if x64 is None else x64
    known = [_version(name, given, wide, backend) for name, given in versions.items()]
    trusted = _trusted(known, against)
    names = argument_names(trusted.fun, len(args))
    constants = frozenset(place for place, leaf in enumerate(tree.leaves(tensors)) if not isinstance(leaf, torch.Tensor))
    options = Options(_positions(argnums, len(args)), names, in_axes, out_axes, has_aux, seed, constants)
    rules = Rules(tolerance, dtypes=dtypes, devices=False, numbers=True)
    session = _Session(known, trusted, tensors, options, parse_reference(reference), rules, writes, wide)
    with _seeded(seed):
        wanted = _wanted(session, transforms)
        checks = tuple(check for transform in wanted for check in session.checks(transform))
        notes = (*session.notes, *_divergences(session, checks, backend))
    title = f"check_equivalent({', '.join(versions)})"
    policy = _policy(known)
    mapped = any("vmap" in transform for transform in wanted)
    arguments = arrays_of(tensors, names, in_axes if mapped else None)
    report = Report(title, checks, tuple(map(line, arguments)), notes, policy, arguments=arguments)
    return report.raise_if_failed() if raise_on_failure else report


def _policy(known: Sequence[Version]) -> PrecisionPolicy:
    """The settings of the frameworks, as they are while versions run."""
    with contextlib.ExitStack() as stack:
        for version in known:
            stack.enter_context(version.framework.context())
        return precision_policy(sorted({version.framework.name for version in known}))


# --- versions --------------------------------------------------------------------------------------------------------


def _version(name: str, given: Any, x64: bool, backend: Any) -> Version:
    pair = given if isinstance(given, tuple) and len(given) == 2 else (name, given)
    if not isinstance(name, str) or not isinstance(pair[0], str) or not callable(pair[1]):
        raise AxisSpecError(
            "check_equivalent takes a dict of functions by name, or of pairs such as ('torch', fun), but it holds "
            f"{name!r}: {given!r}."
        )
    kind, ways = parse(pair[0], name)
    return Version(name, framework(kind, ways, x64, backend), ways, pair[1])


def _check_options(tolerance: Any, seed: Any) -> None:
    if not (tolerance is None or isinstance(tolerance, Tolerance)):
        raise AxisSpecError(f"check_equivalent: tolerance must be a Tolerance(rtol, atol) or None, but it is {tolerance!r}.")
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise AxisSpecError(f"check_equivalent: seed must be a whole number from 0 up, but it is {seed!r}.")


def _trusted(known: Sequence[Version], against: str | None) -> Version:
    names = [version.name for version in known]
    if len(known) < 2:
        raise AxisSpecError(f"check_equivalent compares two versions or more, but it got {names!r}.")
    if against is not None and against not in names:
        raise AxisSpecError(f"check_equivalent: against must be one of {names!r}, but it is {against!r}.")
    return known[0] if against is None else known[names.index(against)]


def _positions(argnums: Any, count: int) -> tuple[int, ...] | None:
    if argnums is None:
        return None
    positions = tuple(argnums) if isinstance(argnums, Sequence) and not isinstance(argnums, str) else (argnums,)
    for position in positions:
        if not isinstance(position, int) or isinstance(position, bool):
            raise AxisSpecError(f"check_equivalent: argnums must be an int or a tuple of ints, but it is {argnums!r}.")
        if not -count <= position < count:
            raise GradientValueError(f"check_equivalent: argnums holds {position}, but there are {count} arguments.")
    return tuple(position % count for position in positions)


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """PyTorch's random numbers of their own, and those of before afterwards."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


# --- runs ------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Outcome:
    """What a run gave: a value or an error; or nothing, for a reason."""

    value: Any = None
    error: Exception | None = None
    reason: str = ""
    written: tuple[str, ...] = ()
    seconds: float = 0.0


class _Session:
    """One call of :func:`check_equivalent`."""

    def __init__(
        self,
        versions: Sequence[Version],
        trusted: Version,
        tensors: Any,
        options: Options,
        reference: Any,
        rules: Rules,
        writes: bool,
        x64: bool,
    ) -> None:
        self.versions, self.trusted, self.tensors, self.options = versions, trusted, tensors, options
        self._reference, self._rules, self._writes, self._x64 = reference, rules, writes, x64
        self.notes: list[str] = []
        self._written: set[str] = set()
        self._calls: dict[tuple[str, tuple[str, ...]], Fun] = {}
        self._counters: dict[tuple[str, tuple[str, ...]], Counter] = {}
        self.done: list[tuple[str, ...]] = []
        self.tolerance = rules.tolerance
        if x64 and any(version.framework.name == "jax" for version in versions):
            self.notes.append("JAX runs with 64-bit numbers (jax_enable_x64), since an argument has them or x64=True.")

    def checks(self, names: tuple[str, ...]) -> Iterator[Check]:
        """The checks of one transform."""
        self.done.append(names)
        outcomes = {version.name: self._run(version, names) for version in self.versions}
        against = next((v for v in self._order() if not outcomes[v.name].reason), self.trusted)
        work = self._work(against, names)
        expected = outcomes[against.name]
        reference = None if expected.error or expected.reason else self._of_reference(against, names, expected.value)
        if self._is_independent(reference):
            yield self._held_to_reference(against, expected, reference, names, work)
        for version in self.versions:
            yield from self._write_check(version, outcomes[version.name])
            if version is not against:
                yield self._check(version, against, outcomes, reference, names, work)

    def _order(self) -> list[Version]:
        return [self.trusted, *(version for version in self.versions if version is not self.trusted)]

    def output(self) -> Any:
        """What the trusted version returns, without its aux, or None if it fails."""
        found = self._run(self.trusted, ())
        if found.error or found.reason or not self.options.has_aux:
            return found.value
        if not isinstance(found.value, tuple) or len(found.value) != 2:
            raise GradientTypeError(
                f"check_equivalent: has_aux=True needs functions that return (output, aux), but {self.trusted.name} returns "
                f"{_shown(found.value)}."
            )
        return found.value[0]

    def _call(self, version: Version, names: tuple[str, ...]) -> Fun:
        """A version under transforms, compiled once if it is to be."""
        key = version.name, names
        if key not in self._calls:
            way, fun = version.framework, version.fun
            if way.name == "torch" and "jit" not in version.ways:
                self._counters[key] = Counter()
                fun = self._counters[key].watch(fun)
            call = transformed(way, fun, names, self.options)
            self._calls[key] = way.jit(call) if "jit" in version.ways else call
        return self._calls[key]

    def _run(self, version: Version, names: tuple[str, ...], tensors: Any = None) -> _Outcome:
        torch.manual_seed(self.options.seed)
        start = time.perf_counter()
        try:
            with version.framework.context():
                given = version.framework.arrays(self.tensors if tensors is None else tensors)
                value = self._call(version, names)(*given)
                _wait(value)
        except MissingTransformError as missing:
            return _Outcome(reason=str(missing))
        except Exception as error:
            if isinstance(error, ImportError):
                raise
            return _Outcome(error=error, seconds=time.perf_counter() - start)
        written = () if tensors is not None else self._changed(given)
        return _Outcome(value, written=written, seconds=time.perf_counter() - start)

    def _sensitivity(self, version: Version, names: tuple[str, ...], value: Any) -> list[np.ndarray | None]:
        """How much the numbers of a version's result change if inputs do in the last place."""
        again, *near = [self._run(version, names, tensors).value for tensors in (self.tensors, *self._near())]
        return changes(value, again, near)

    def _near(self) -> list[Any]:
        return [nudged(self.tensors, seed) for seed in range(1, 4)]

    def _changed(self, given: Any) -> tuple[str, ...]:
        """The names of the arguments that a run wrote into."""
        found, _ = tree.flatten_with_path(self.tensors)
        pairs = zip(found, tree.leaves(as_tensors(given)), strict=True)
        names = [path_name(path, self.options.names) for (path, before), after in pairs if _differ(before, after)]
        return tuple(names)

    def _work(self, against: Version, names: tuple[str, ...]) -> Work:
        counters = [counter for (_, transforms), counter in self._counters.items() if transforms == names]
        if not any(counter.operations for counter in counters) and against.framework.name == "jax" and "vmap" not in names:
            with against.framework.context(), contextlib.suppress(Exception):  # it ran, but cannot be traced: then uncounted
                counters = [count_jax(against.fun, against.framework.arrays(self.tensors))]
        return work_of(counters, names, self.tensors)

    # --- the reference -----------------------------------------------------------------------------------------------

    def _is_independent(self, reference: Any) -> bool:
        """Whether the reference may show that the trusted version is wrong: it is not that version in float64."""
        return reference is not None and self._reference != "float64"

    def _of_reference(self, against: Version, names: tuple[str, ...], expected: Any) -> Any:
        """The reference's result, or None, with a note that says why."""
        try:
            reference = self._compute_reference(against, names)
        except (NoReferenceError, MissingTransformError) as error:
            self._note(f"There is no reference for {label(names)}: {error}.")
            return None
        return self._believed(against, names, expected, reference) if self._reference == "float64" else reference

    def _believed(self, against: Version, names: tuple[str, ...], expected: Any, reference: Any) -> Any:
        """The float64 reference without the leaves in which it is another result, rather than a more exact one.

        Where a function rounds, sorts or compares, float64 may choose otherwise. That says nothing about how far two runs in
        float32 may be apart. A function that makes numbers of 16 bits on the way is expected to be far from it.
        """
        if reference is None or tree.structure(reference) != tree.structure(expected):
            return reference
        pairs = list(zip(tree.leaves(expected), tree.leaves(reference), strict=True))
        if not any(is_far(*pair) for pair in pairs) or self._is_narrow(names):
            return reference
        near = [self._run(against, names, tensors).value for tensors in self._near()]
        if any(tree.structure(other) != tree.structure(expected) for other in near):
            return reference
        rows = zip(*map(tree.leaves, near), strict=True)
        odd = [is_far(*pair) and strays(*pair, row) for pair, row in zip(pairs, rows, strict=True)]
        if any(odd):
            self._note(
                f"There is no reference for {label(names)}: in float64 {against.name} gives another result, not one that differs "
                "by rounding, as where it rounds, sorts or compares."
            )
        kept = ["" if out else leaf for out, (_, leaf) in zip(odd, pairs, strict=True)]
        return tree.unflatten(tree.structure(reference), kept)

    def _is_narrow(self, names: tuple[str, ...]) -> bool:
        return any(counter.narrow for (_, transforms), counter in self._counters.items() if transforms == names)

    def _compute_reference(self, against: Version, names: tuple[str, ...]) -> Any:
        if self._reference is None:
            return None
        if self._reference == "mpmath":
            if against.framework.name != "torch":
                raise AxisSpecError(
                    "check_equivalent: reference='mpmath' runs the graph of a PyTorch function, but the version that is trusted, "
                    f"{against.name!r}, is none. Give against= the name of one, or another reference."
                )
            return with_digits(against.fun, names, self.options, self.tensors)
        name, fun = (against.framework.name, against.fun) if self._reference == "float64" else self._reference
        if self._reference != "float64":
            name = parse(name, "reference")[0]
        return in_float64(name, fun, names, self.options, self.tensors)

    def _held_to_reference(
        self, against: Version, expected: _Outcome, reference: Any, names: tuple[str, ...], work: Work
    ) -> Check:
        rules = dataclasses.replace(self._rules, work=work, dtypes=False)
        leaves = compare(expected.value, reference, None, rules, result_name(names))
        known = self._reference if isinstance(self._reference, str) else "reference"
        return Check.of_leaves(against.name, known, label(names), "as given", leaves, expected.seconds)

    def _reference_name(self) -> str:
        """What a report calls the reference."""
        return f"{self._reference} reference" if isinstance(self._reference, str) else "given reference"

    # --- lines -------------------------------------------------------------------------------------------------------

    def _check(
        self,
        version: Version,
        against: Version,
        outcomes: Mapping[str, _Outcome],
        reference: Any,
        names: tuple[str, ...],
        work: Work,
    ) -> Check:
        got, expected = outcomes[version.name], outcomes[against.name]
        about = (version.name, against.name, label(names), "as given")
        reason = got.reason or expected.reason
        if reason:
            return Check(*about, "skipped", None, reason)
        if got.error or expected.error:
            return _error_check(about, got, expected)
        leaves = self._compared(version, against, got.value, expected.value, reference, names, work)
        return Check.of_leaves(*about, leaves, got.seconds, self._reference_name())

    def _compared(
        self, version: Version, against: Version, got: Any, expected: Any, reference: Any, names: Sequence[str], work: Work
    ) -> list[LeafDifference]:
        if not self._x64:
            got = _as_wide(got, expected) if version.framework.name == "jax" else got
            expected = _as_wide(expected, got) if against.framework.name == "jax" else expected
        rules = dataclasses.replace(self._rules, work=work)
        if self._reference == "float64":
            reference = _with_more_digits(reference, expected)
        leaves = compare(got, expected, reference, rules, result_name(names))
        if (
            rules.tolerance is not None
            or self._is_independent(reference)
            or {leaf.problem for leaf in leaves} - {None} != {"values"}
        ):
            return leaves
        both = [self._sensitivity(one, tuple(names), outcome) for one, outcome in ((version, got), (against, expected))]
        found = forgiven(leaves, got, expected, list(zip(*both, strict=True)))
        for before, after in zip(leaves, found, strict=True):
            if before.passed != after.passed:
                self._note(
                    f"{label(names)}, {version.name}: {after.where} is {after.max_abs:.2g} from that of {against.name}, and "
                    "inputs that differ in the last place change it about as much: it is taken for rounding."
                )
        return found

    def _write_check(self, version: Version, outcome: _Outcome) -> Iterator[Check]:
        """A failed check for a version that wrote into its arguments, once."""
        if outcome.written and not self._writes and version.name not in self._written:
            self._written.add(version.name)
            message = (
                f"{version.name} writes into its argument{'s' if len(outcome.written) > 1 else ''} {', '.join(outcome.written)}. "
                "Let it write into a copy, or say writes=True."
            )
            yield Check(version.name, "its arguments", "arguments left alone", "as given", "failed", "values", message)

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)


def _with_more_digits(reference: Any, expected: Any) -> Any:
    """A float64 reference without the leaves that are float64 in any case: it is the same run, and knows nothing better."""
    if tree.structure(reference) != tree.structure(expected):
        return reference
    wide = ("float64", "complex128")
    return tree.map(lambda leaf, like: "" if is_array(like) and read(like).dtype in wide else leaf, reference, expected)


def _wait(value: Any) -> None:
    """Wait until JAX has computed it."""
    for leaf in tree.leaves(value):
        if hasattr(leaf, "block_until_ready"):
            leaf.block_until_ready()


def _differ(before: Any, after: Any) -> bool:
    if not isinstance(before, torch.Tensor):
        return False
    a, b = read(before).numbers, read(after).numbers
    if a.shape != b.shape or a.dtype.kind not in "fc":
        return not np.array_equal(a, b)
    rounded = read(before.to(after.dtype)).numbers  # JAX without 64-bit numbers
    return not np.array_equal(rounded, b, equal_nan=True)


def _error_check(about: tuple[str, str, str, str], got: _Outcome, expected: _Outcome) -> Check:
    run, against = about[:2]
    if got.error and expected.error:
        message = f"both raise an error: {run} {_said(got.error)}; {against} {_said(expected.error)}"
        return Check(*about, "skipped", None, message, (), got.seconds)
    failed = f"{run} raises {_said(got.error)}" if got.error else f"{against} raises {_said(expected.error)}"
    other = against if got.error else run
    return Check(*about, "failed", "error", f"{failed}; {other} does not", (), got.seconds)


def _said(error: Exception | None) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _as_wide(value: Any, other: Any) -> Any:
    """JAX's int32 as int64 where the other has int64: without 64-bit numbers JAX has no other integers."""
    leaves, structure = tree.flatten(value)
    others = tree.leaves(other)
    if len(leaves) != len(others):
        return value
    return tree.unflatten(structure, [_widened(leaf, like) for leaf, like in zip(leaves, others, strict=True)])


def _widened(leaf: Any, like: Any) -> Any:
    if not (is_array(leaf) and is_array(like) and hasattr(leaf, "dtype")):
        return leaf
    wanted = read(like).dtype
    return np.asarray(leaf).astype(wanted) if _SMALL.get(wanted) == read(leaf).dtype else leaf


# --- what is compared, and of what -----------------------------------------------------------------------------------


def _default(session: _Session) -> list[tuple[str, ...]]:
    """Values, and the gradient of one real number, or else the vjp."""
    return [(), ("grad",) if _is_number(session.output()) else ("vjp",)]


def _is_number(output: Any) -> bool:
    return is_array(output) and read(output).shape == () and read(output).numbers.dtype.kind == "f"


def _wanted(session: _Session, transforms: Sequence[Any] | None) -> list[tuple[str, ...]]:
    """The transforms to compare."""
    if transforms is None:
        return _default(session)
    if not isinstance(transforms, Iterable):
        raise AxisSpecError(f"check_equivalent: transforms must be a tuple of names, but it is {transforms!r}.")
    wanted = [parse_transform(each) for each in ([transforms] if isinstance(transforms, str) else transforms)]
    if not wanted:
        raise AxisSpecError("check_equivalent: transforms is empty; name some, such as ('value', 'grad').")
    scalar = [name for name in ("grad", "value_and_grad", "hessian") if (name,) in wanted]
    output = session.output() if scalar or session.options.has_aux else None
    if scalar and output is not None and not _is_number(output):
        raise GradientTypeError(
            f"check_equivalent: {scalar[0]!r} needs a function that returns one real number, but {session.trusted.name} returns "
            f"{_shown(output)}. Say 'vjp' or 'jacobian'; or has_aux=True, if it "
            "returns (output, aux)."
        )
    return wanted


def _shown(output: Any) -> str:
    return str(read(output) if is_array(output) else tree.structure(output))


def _divergences(session: _Session, checks: Sequence[Check], backend: Any) -> Iterator[str]:
    """For each version that differs, where it first does."""
    versions = {version.name: version for version in session.versions}
    for name, version in versions.items():
        wrong = [check for check in checks if check.run == name and check.against in versions and check.status == "failed"]
        first = next((check for check in wrong if check.problem in ("values", "nonfinite", "shape")), None)
        if first is not None:
            yield from _divergence(session, version, versions[first.against], first.what, backend)


#: What a trace of a function may raise that runs without one.
_OF_TRACES = (ArithmeticError, AssertionError, AttributeError, LookupError, NameError, RuntimeError, TypeError, ValueError)


def _divergence(session: _Session, version: Version, against: Version, what: str, backend: Any) -> Iterator[str]:
    pair = (version, against)
    if any(one.framework.name == "numpy" for one in pair):
        return
    names = next(names for names in session.done if label(names) == what)
    kept = tuple(name for name in names if name != "jit")
    run = [_under(one, kept, jit="jit" in names, options=session.options) for one in pair]
    try:
        found = parting(run, session.tensors, backend, session.tolerance)
    except _OF_TRACES as error:  # it ran, but cannot be traced
        yield f"Where {version.name} and {against.name} part is not known: {_said(error)}"
        return
    if found is not None:
        yield f"{what}: {found}"


def _under(version: Version, names: Sequence[str], jit: bool, options: Options) -> Version:
    """A version under transforms, as a version."""
    ways = (*version.ways, "jit") if jit and "jit" not in version.ways else version.ways
    return dataclasses.replace(version, ways=ways, fun=transformed(version.framework, version.fun, names, options))
