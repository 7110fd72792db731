"""What the pytest plugin does for tests that use it; pytest itself sees ``torchbatch_pytest`` only.

A test with the fixture ``batched``, or with the marker ``torchbatch``, is run once for each backend of ``--torchbatch-backends``.
In the backend ``loop`` it is the plain loop over samples; in every other one the batched result is held against the loop's.
"""

from __future__ import annotations

import dataclasses
import inspect
import time
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch

from torchbatch import tree
from torchbatch.errors import AxisSpecError, EquivalenceError, OutputTypeError
from torchbatch.testing.arguments import inputs_of
from torchbatch.testing.compare import LeafDifference, Rules, compare
from torchbatch.testing.frameworks import as_tensors, framework
from torchbatch.testing.optional import require
from torchbatch.testing.precision import precision_policy
from torchbatch.testing.report import Check, Report
from torchbatch.testing.tolerance import Tolerance, is_amount
from torchbatch.testing.variants import Call, call_of, copied
from torchbatch.testing.verdicts import writes_compared
from torchbatch.testing.ways import LOOP, ways

Fun = Callable[..., Any]


class Batched:
    """The fixture ``batched``: ``vmap``, run in one backend, and held against the loop.

    ``batched(fun, in_axes, out_axes)`` is called like the function that ``vmap`` makes, and returns what the backend gives. It
    raises :class:`~torchbatch.errors.EquivalenceError` where the loop gives something else.

    Args:
        backend: one of :data:`torchbatch_pytest.BACKENDS`.

    Example:
        >>> import torch
        >>> from torchbatch.testing.plugin import Batched
        >>> batched = Batched("eager")
        >>> batched(torch.dot, in_axes=(0, None))(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.ones(2))
        tensor([3., 7.])
    """

    def __init__(self, backend: str) -> None:
        self.backend = backend

    def __repr__(self) -> str:
        return f"Batched({self.backend!r})"

    def __call__(
        self,
        fun: Fun,
        in_axes: Any = 0,
        out_axes: Any = 0,
        *,
        jax: Fun | None = None,
        axis_name: Hashable = None,
        axis_size: int | None = None,
        randomness: str = "error",
        tolerance: Tolerance | float | None = None,
    ) -> Fun:
        """The function over a batch.

        Args:
            fun: a function of one sample, in PyTorch.
            in_axes, out_axes, axis_name, axis_size, randomness: as in :func:`torchbatch.vmap`. Where random numbers are drawn,
                only structure, shapes and dtypes are compared.
            jax: the same function in JAX, for the backend ``jax``, which skips the test without it.
            tolerance: how far results may be apart; a number is both relative and absolute. By default it is chosen from dtypes.

        Returns:
            The mapped function.
        """
        rules = Rules(_tolerance(tolerance))
        options = {"in_axes": in_axes, "out_axes": out_axes, "axis_name": axis_name, "axis_size": axis_size}

        def mapped(*args: Any, **kwargs: Any) -> Any:
            __tracebackhide__ = True
            call = call_of(fun, args, kwargs, randomness=randomness, **options)
            if self.backend == "loop":
                return LOOP.make(call)(call.tensors)
            return _held(_Run(self.backend, call, jax, rules))

        return mapped


def run_marked(fun: Fun, values: Mapping[str, Any], backend: str, in_axes: Any = 0, out_axes: Any = 0, **options: Any) -> None:
    """Run a test function with the marker: mapped over its arguments, in one backend.

    Args:
        fun: the test, a function of one sample.
        values: the values of its arguments, which are batches, by name; others are ignored.
        backend: the backend.
        in_axes: an axis for all arguments, a tuple with one entry for each, or a dict of those that are mapped, by name.
        out_axes, options: as in :class:`Batched`.

    Raises:
        EquivalenceError: the backend does not give what the loop gives.
        OutputTypeError: the test returns nothing that could be compared.
        AxisSpecError: the test cannot be mapped.
    """
    __tracebackhide__ = True
    if hasattr(fun, "hypothesis"):
        raise AxisSpecError("the marker torchbatch does not go with @given: use the fixture batched within the test instead.")
    unknown = [name for name in options if name not in inspect.signature(Batched.__call__).parameters]
    if unknown:
        raise AxisSpecError(f"the marker torchbatch has no option {unknown[0]!r}; pytest --markers lists those that it has.")
    names = [name for name in inspect.signature(fun).parameters if name in values]
    mapped = Batched(backend)(fun, _axes(in_axes, names), out_axes, **options)
    result = mapped(*(values[name] for name in names))
    if not tree.leaves(result):
        raise OutputTypeError(
            f"{fun.__name__} has the marker torchbatch, but returns nothing: return the arrays that must be the same in all "
            "backends."
        )


def _axes(in_axes: Any, names: list[str]) -> Any:
    """Axes by the names of arguments, as ``vmap`` takes them."""
    __tracebackhide__ = True
    if not isinstance(in_axes, dict):
        return in_axes
    unknown = [name for name in in_axes if name not in names]
    if unknown:
        raise AxisSpecError(f"in_axes names {unknown[0]!r}, but the test has the arguments {', '.join(names) or 'none'}.")
    return tuple(in_axes.get(name) for name in names)


def _tolerance(given: Tolerance | float | None) -> Tolerance | None:
    __tracebackhide__ = True
    if given is None or isinstance(given, Tolerance):
        return given
    if not is_amount(given):
        raise AxisSpecError(f"tolerance must be a number from 0 up, a Tolerance or None, but it is {given!r}.")
    return Tolerance(float(given), float(given))


# --- one call, held against the loop ---------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Run:
    """One call in one backend."""

    backend: str
    call: Call
    jax: Fun | None
    rules: Rules


def _held(run: _Run) -> Any:
    """What the backend gives.

    Raises:
        EquivalenceError: the loop gives something else.
    """
    __tracebackhide__ = True
    aside = run.call.having([copied(tensor).requires_grad_(tensor.requires_grad) for tensor in run.call.tensors])
    start = time.perf_counter()
    got, rules = _in_jax(run) if run.backend == "jax" else _in_torch(run)
    seconds = time.perf_counter() - start
    expected = _loop(aside)
    leaves = [*_compared(run, got, expected, rules, aside), *_written(run, aside)]
    check = Check.of_leaves(run.backend, "loop", "values", "as given", leaves, seconds)
    if check.status == "failed":
        raise EquivalenceError(f"{run.backend} does not give what the loop gives: {check.message}", _report(run, check))
    return _in_dtypes_of(got, expected) if run.backend == "jax" else got


def _in_torch(run: _Run) -> tuple[Any, Rules]:
    way = ways([run.backend], run.call.size)
    if not way:
        _skip(f"a batch of {run.call.size} cannot be cut into chunks")
    got = way[-1].make(run.call)(run.call.tensors)
    return got, dataclasses.replace(run.rules, numbers=way[-1].numbers)


def _in_jax(run: _Run) -> tuple[Any, Rules]:
    """By JAX's own vmap, of the same function in JAX. It has 64-bit numbers if one is given."""
    if run.jax is None:
        _skip("the backend jax needs the same function in JAX, which this test does not give: jax=...")
    wide = any(tensor.dtype in (torch.float64, torch.complex128) for tensor in run.call.tensors)
    library = framework("jax", x64=wide)
    call, fun = run.call, run.jax
    with library.context():
        args, kwargs = library.arrays((call.args, call.kwargs))
        options = {"axis_name": call.axis_name, "axis_size": call.axis_size}
        vmap = require("jax", "the backend jax", "jax").vmap
        found = vmap(fun, in_axes=call.in_axes, out_axes=call.out_axes, **options)(*args, **kwargs)
        return as_tensors(found), dataclasses.replace(run.rules, dtypes=False, devices=False, numbers=True)


def _skip(reason: str) -> None:
    __tracebackhide__ = True
    require("pytest", "the fixture batched", "test").skip(reason)


def _loop(call: Call) -> Any:
    """What the loop gives; the generators of random numbers stay as they are."""
    with torch.random.fork_rng(enabled=call.randomness != "error"):
        return LOOP.make(call)(call.tensors)


def _compared(run: _Run, got: Any, expected: Any, rules: Rules, aside: Call) -> list[LeafDifference]:
    """Every leaf; where one differs, once more next to a reference, which says who is off and what rounding explains."""
    if aside.randomness != "error":
        got, expected = (tree.map(_zeros, value) for value in (got, expected))
    leaves = compare(got, expected, rules=rules)
    if all(leaf.passed for leaf in leaves) or aside.randomness != "error":
        return leaves
    return compare(got, expected, _reference(aside), rules)


def _written(run: _Run, aside: Call) -> list[LeafDifference]:
    """The arguments that are not as the loop leaves them. JAX writes into none, and ``nested`` runs on copies."""
    if run.backend in ("jax", "nested") or aside.randomness != "error":
        return []
    return writes_compared(run.call.names, run.call.tensors, aside.tensors, run.rules)


def _zeros(leaf: Any) -> Any:
    return torch.zeros_like(leaf) if isinstance(leaf, torch.Tensor) else leaf


def _reference(call: Call) -> Any:
    """The loop in float64; None where the function does not take it."""
    wide = call.widened()
    try:
        return LOOP.make(wide)(wide.tensors)
    except (RuntimeError, TypeError, ValueError):
        return None


def _in_dtypes_of(got: Any, expected: Any) -> Any:
    """JAX's results in the types that PyTorch gives, so that the rest of a test need not know where they are from."""

    def typed(mine: Any, theirs: Any) -> Any:
        return torch.as_tensor(mine).to(theirs.dtype) if isinstance(theirs, torch.Tensor) else theirs

    return tree.map(typed, got, expected)


def _report(run: _Run, check: Check) -> Report:
    arguments = inputs_of(run.call)
    name = getattr(run.call.fun, "__name__", type(run.call.fun).__name__)
    return Report(
        title=f"batched({name})",
        checks=(check,),
        inputs=tuple(str(argument) for argument in arguments),
        precision=precision_policy(),
        arguments=arguments,
    )
