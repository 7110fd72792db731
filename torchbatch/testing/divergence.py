"""``first_divergence``: the first intermediate value in which two versions of a function differ."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch.fx import Graph, GraphModule, Node

import torchbatch
from torchbatch import tree
from torchbatch.errors import AxisError, AxisSpecError
from torchbatch.testing.alignment import Alignment, align, turned
from torchbatch.testing.compare import LeafDifference, Rules, compare_leaf
from torchbatch.testing.frameworks import Framework, Fun, as_tensors, framework, has_wide, parse
from torchbatch.testing.intermediates import Line, Step, Steps, of_jax, of_torch
from torchbatch.testing.tolerance import Tolerance, Work, choose
from torchbatch.testing.values import Values, read


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a version was when it parted from the other.

    Attributes:
        version: which version it is, such as ``"torch"``.
        operation: what it computed, such as ``"aten.mm"`` or ``"dot_general"``.
        values: the dtype and shape of the result, as text.
        line: the user's line, or None if it is not known. ``line.file``, ``line.number`` and ``line.text`` are its parts.
    """

    version: str
    operation: str
    values: str
    line: Line | None

    def __str__(self) -> str:
        return f"{self.version}: {self.operation} {self.values}" + ("" if self.line is None else f"  {self.line}")


@dataclasses.dataclass(frozen=True)
class Divergence:
    """The first intermediate value in which two versions of a function differ.

    Attributes:
        first: where the first version was.
        second: where the second version was; None if it has nothing of the kind.
        difference: how both values differ. ``got`` is the first version's.
        agreed: how many intermediate values were the same before.
        hint: what else there is to say; may be empty.
    """

    first: Place
    second: Place | None
    difference: LeafDifference
    agreed: int
    hint: str = ""

    def __str__(self) -> str:
        agreed = "1 intermediate value that agrees" if self.agreed == 1 else f"{self.agreed} intermediate values that agree"
        lines = [f"First divergence, after {agreed}:", f"  {self.first}"]
        lines += [] if self.second is None else [f"  {self.second}"]
        lines += [f"  {line}" for line in (self.difference.message, self.hint) if line]
        return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class Version:
    """A function, and how it is run.

    Attributes:
        name: what to call it.
        framework: its framework.
        ways: what its name says beyond that: ``"jit"``, ``"loop"``.
        fun: the function.
    """

    name: str
    framework: Framework
    ways: tuple[str, ...]
    fun: Fun

    def steps(self, args: Any) -> Steps:
        """All that it computes on the way to its output."""
        with self.framework.context():
            fun, given = _of_arrays(self.fun, self.framework.arrays(args))
            return of_jax(fun, given) if self.framework.name == "jax" else of_torch(fun, given)


def _of_arrays(fun: Fun, args: Any) -> tuple[Fun, list[Any]]:
    """A function of the arrays among its arguments, and these: numbers and texts stay what they are in a trace."""
    leaves, structure = tree.flatten(tuple(args))
    places = [place for place, leaf in enumerate(leaves) if hasattr(leaf, "dtype")]

    def of_arrays(*arrays: Any) -> Any:
        given = dict(zip(places, arrays, strict=True))
        return fun(*tree.unflatten(structure, [given.get(place, leaf) for place, leaf in enumerate(leaves)]))

    return of_arrays, [leaves[place] for place in places]


def first_divergence(
    first: Any,
    second: Any,
    *args: Any,
    tolerance: Tolerance | None = None,
    backend: str | Callable[..., Any] = "inductor",
    x64: bool | None = None,
) -> Divergence | None:
    """Find the first intermediate value in which two versions of a function differ, and the lines that computed it.

    Both versions are traced and run operation by operation. A value of one that the other has too, in whichever order of its
    axes, is agreed upon; so it does not matter whether a version scales before a product or after it. The divergence is the
    first value on the way to a differing output that only one of them has though both have all that it is computed from.

    A compiled version is held against itself, uncompiled: beginnings of its graph are compiled, as many as it takes to halve
    the graph until one operation is left.

    Args:
        first, second: PyTorch functions, or pairs of a framework and a function: ``("jax", fun)``, ``("torch jit", fun)``.
        args: the arguments: trees of tensors, NumPy or JAX arrays, and numbers.
        tolerance: how far values may be apart; by default rounding in their format.
        backend: what compiles a ``"torch jit"`` version, as for :func:`torchbatch.jit`.
        x64: whether JAX has 64-bit numbers; by default if an input has real or complex ones of 64 bits.

    Returns:
        The divergence, or None if the outputs agree.

    Raises:
        AxisSpecError: a version is given in another way, or is a NumPy function, which cannot be traced.
        AxisError: the versions return different numbers of arrays.
        ImportError: a version is a JAX function, and JAX is not installed.
        TorchbatchError: a version cannot be traced: see :func:`torchbatch.make_graph`.

    Example:
        >>> import torch
        >>> from torchbatch.testing import first_divergence
        >>> def spread(x, correction):
        ...     centred = x - x.mean()
        ...     return (centred**2).sum() / (len(x) - correction)
        >>> found = first_divergence(lambda x: spread(x, 0), lambda x: spread(x, 1), torch.arange(3.0))
        >>> found.first.operation, found.first.line.text, found.agreed
        ('aten.div', 'return (centred**2).sum() / (len(x) - correction)', 4)
    """
    tensors = as_tensors(args)
    wide = has_wide(tensors) if x64 is None else x64
    versions = [_version(given, wide, backend) for given in (first, second)]
    if versions[0].name == versions[1].name:
        versions = [dataclasses.replace(one, name=f"{which} version") for one, which in zip(versions, _WHICH, strict=True)]
    return parting(versions, tensors, backend, tolerance)


def parting(versions: Sequence[Version], tensors: Any, backend: Any, tolerance: Tolerance | None) -> Divergence | None:
    """The first divergence of two versions; the arguments are given as tensors."""
    runs = [version.steps(tensors) for version in versions]
    found = _between(versions, runs, tolerance)
    for version, run in zip(versions, runs, strict=True):
        if found is None and "jit" in version.ways and version.framework.name == "torch":
            found = _within(version, run, backend, tolerance)
    return found


_WHICH = ("first", "second")


def _version(given: Any, x64: bool, backend: Any) -> Version:
    pair = given if isinstance(given, tuple) and len(given) == 2 else ("torch", given)
    name, fun = pair
    if not isinstance(name, str) or not callable(fun):
        raise AxisSpecError(
            "first_divergence takes two versions, each a PyTorch function or a pair such as ('jax', fun), but one of them is "
            f"{given!r}."
        )
    kind, ways = parse(name, name)
    if kind == "numpy":
        raise AxisSpecError("first_divergence walks through PyTorch and JAX functions; NumPy's cannot be traced.")
    return Version(name, framework(kind, ways, x64, backend), ways, fun)


# --- two versions ----------------------------------------------------------------------------------------------------


def _between(versions: Sequence[Version], runs: Sequence[Steps], tolerance: Tolerance | None) -> Divergence | None:
    """Where two functions part, both run operation by operation."""
    mine, theirs = runs
    if len(mine.outputs) != len(theirs.outputs):
        counts = " and ".join(str(len(run.outputs)) for run in runs)
        raise AxisError(f"first_divergence: the versions must return trees of the same structure, but have {counts} outputs.")
    work = Work(operations=max(16, *(len(run.steps) for run in runs)))
    outputs = [output for output in range(len(mine.outputs)) if _differ(mine, theirs, output, work, tolerance)]
    if not outputs:
        return None
    alignment = align(mine, theirs, work)
    a, b = alignment.parting(outputs)
    if a is None or b is None:
        return None
    x, y = _comparable(alignment, a, b, outputs)
    found = _difference(mine.steps[x], theirs.steps[y], work, tolerance)
    for version, here, there, run in ((versions[0], a, x, mine), (versions[1], b, y, theirs)):
        found = found if here == there else _against(found, version.name, run.steps[there])
    first, second = _place(versions[0].name, mine.steps[a]), _place(versions[1].name, theirs.steps[b])
    return Divergence(first, second, found, alignment.agreed(a), _hint(alignment, a, b))


def _comparable(alignment: Alignment, a: int, b: int, outputs: Sequence[int]) -> tuple[int, int]:
    """Two steps whose numbers can be compared: where one run parts, and what is nearest to it in the other."""
    near = alignment.nearest(0, a, outputs)
    if near is not None:
        return a, near
    near = alignment.nearest(1, b, outputs)
    return (a, b) if near is None else (near, b)


def _differ(mine: Steps, theirs: Steps, output: int, work: Work, tolerance: Tolerance | None) -> bool:
    a, b = mine.outputs[output], theirs.outputs[output]
    if a is None or b is None:
        return False
    return not _compared(mine.steps[a].values, theirs.steps[b].values, work, tolerance).passed


def _compared(a: Values, b: Values, work: Work, tolerance: Tolerance | None) -> LeafDifference:
    rules = Rules(tolerance or choose(a, b, None, work), work, dtypes=False, devices=False)
    return compare_leaf("intermediate value", a, b, None, rules)


def _difference(a: Step, b: Step, work: Work, tolerance: Tolerance | None) -> LeafDifference:
    """How two values differ, with the axes of the first in the order in which it is nearest to the second."""
    fitting = turned(a.values.numbers, b.values.numbers)
    values = a.values if fitting is None else a.values._replace(numbers=fitting)
    return _compared(values, b.values, work, tolerance)


def _place(version: str, step: Step) -> Place:
    return Place(version, step.operation, str(step.values), step.line)


def _against(found: LeafDifference, version: str, step: Step) -> LeafDifference:
    """Say what was compared, where that is not the step at which a run parts but one that follows from it."""
    return dataclasses.replace(found, message=f"compared at the {step.operation} of {version}: {found.message}")


def _hint(alignment: Alignment, a: int, b: int) -> str:
    x, y = (np.sort(run.steps[place].values.numbers, axis=None) for run, place in ((alignment.first, a), (alignment.second, b)))
    shared = alignment.shared[0][a] and alignment.shared[1][b] and x.shape == y.shape
    if shared and np.allclose(x, y, rtol=1e-4, equal_nan=True):
        return "Both hold the same numbers, in another order: look at the axes."
    return ""


# --- one version, compiled -------------------------------------------------------------------------------------------


def _within(version: Version, run: Steps, backend: Any, tolerance: Tolerance | None) -> Divergence | None:
    """Where a function parts from itself compiled."""
    search = _Search(run, backend, tolerance)
    outputs = [place for place in run.outputs if place is not None]
    wrong = [place for place, found in zip(outputs, search.compiled(outputs), strict=True) if not found.passed]
    if not wrong:
        return None
    ways = [place for place in sorted(search.ancestors(wrong)) if run.steps[place].kind == "operation"] or wrong[:1]
    place, alone = search.first(ways)
    found = search.compiled([place])[0] if alone else search.compiled(outputs)[outputs.index(wrong[0])]
    step = run.steps[place]
    before = sum(bool(run.steps[other].inputs) for other in ways[: ways.index(place)])
    hint = "" if alone else "It differs only if the whole function is compiled as one."
    eager, compiled = (_place(name, step) for name in ("torch", version.name))
    return Divergence(eager, compiled, _swapped(found), before, hint)


def _swapped(found: LeafDifference) -> LeafDifference:
    return dataclasses.replace(found, message=f"compiled, {found.message}")


class _Search:
    """Compile beginnings of a graph, and compare what they give."""

    def __init__(self, run: Steps, backend: Any, tolerance: Tolerance | None) -> None:
        self._run, self._backend, self._tolerance = run, backend, tolerance
        module: Any = run.module
        self._module = module
        self._nodes: dict[str, Node] = {node.name: node for node in module.graph.nodes}

    def ancestors(self, places: Sequence[int]) -> set[int]:
        """All steps that the given ones are computed from, and these themselves."""
        found: set[int] = set()
        waiting = list(places)
        while waiting:
            place = waiting.pop()
            if place not in found:
                found.add(place)
                waiting += self._run.steps[place].inputs
        return found

    def first(self, places: Sequence[int]) -> tuple[int, bool]:
        """The first of the steps, in order, that differs if the graph up to it is compiled; whether it does so at all."""
        low, high = 0, len(places) - 1
        if self.compiled([places[high]])[0].passed:
            return places[high], False
        while low < high:
            middle = (low + high) // 2
            if self.compiled([places[middle]])[0].passed:
                low = middle + 1
            else:
                high = middle
        return places[low], True

    def compiled(self, places: Sequence[int]) -> list[LeafDifference]:
        """How steps differ if the graph up to them is compiled."""
        beginning = self._beginning(places)
        arguments = [value.clone() for value in self._run.arguments]
        with torch.no_grad():
            results = torchbatch.jit(lambda *given: beginning(*given), backend=self._backend)(*arguments)
        work = Work(operations=max(16, len(self._run.steps)))
        expected = [self._run.steps[place].values for place in places]
        return [
            _compared(read(result), values, work, self._tolerance)
            for result, values in zip(tree.leaves(results), expected, strict=True)
        ]

    def _beginning(self, places: Sequence[int]) -> GraphModule:
        """The graph that ends at the given steps."""
        graph = Graph()
        copies: dict[Node, Node] = {}
        wanted = [self._nodes[self._run.steps[place].label] for place in places]
        needed = _needed(wanted)
        for node in self._module.graph.nodes:
            if node.op == "placeholder" or node in needed:
                copies[node] = graph.node_copy(node, lambda source: copies[source])
        graph.output([copies[node] for node in wanted])
        return GraphModule(self._module, graph)


def _needed(nodes: Sequence[Node]) -> set[Node]:
    found: set[Node] = set()
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting += node.all_input_nodes
    return found
