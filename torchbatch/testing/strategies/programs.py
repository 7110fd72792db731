"""Random small functions, written out in PyTorch, JAX and NumPy."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import linecache
from collections.abc import Callable, Sequence
from typing import Any

import torch
from hypothesis import strategies as st

from torchbatch import ShapeDtypeStruct, tree
from torchbatch.errors import AxisSpecError
from torchbatch.testing.strategies.arrays import shapes
from torchbatch.testing.strategies.calls import short_struct
from torchbatch.testing.strategies.operations import Operation, Text, Value, allowed, call_of, kinds

__all__ = ["Program", "programs"]

_DOMAIN = 2.0
_LIBRARIES = {
    "torch": ("torch", "import torch"),
    "jax": ("jnp", "import jax\nimport jax.numpy as jnp"),
    "numpy": ("np", "import numpy as np"),
}
_NAMES = "abcdefhijklmnopqrstuvw"


@dataclasses.dataclass(frozen=True)
class Function:
    """One function of a program: its name, parameters, lines, and what it returns."""

    name: str
    parameters: tuple[str, ...]
    lines: tuple[tuple[str, Text], ...]
    result: Any

    def source(self, library: str) -> str:
        """The function in one library."""
        xp = _LIBRARIES[library][0]
        lines = [f"    {name} = {text.for_library(library, xp)}" for name, text in self.lines]
        return "\n".join([f"def {self.name}({', '.join(self.parameters)}):", *lines, f"    return {_written(self.result)}"])


def _written(result: Any) -> str:
    """A tree of names as source."""
    if isinstance(result, dict):
        return "{" + ", ".join(f"{key!r}: {_written(value)}" for key, value in result.items()) + "}"
    if isinstance(result, tuple):
        return "(" + ", ".join(map(_written, result)) + ("," if len(result) == 1 else "") + ")"
    return str(result)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Program:
    """The same function in three libraries.

    Attributes:
        arguments: a :class:`torchbatch.ShapeDtypeStruct` for each argument.
        outputs: the tree of them that the function returns.
        functions: what it is made of; the last one is the function itself.
        differentiable: whether it has a derivative everywhere.
        domain: the range of numbers for which it is well conditioned.
        torch, jax, numpy: the function.
    """

    arguments: tuple[ShapeDtypeStruct, ...]
    outputs: Any
    functions: tuple[Function, ...]
    differentiable: bool
    domain: tuple[float, float] = (-_DOMAIN, _DOMAIN)

    def source(self, library: str = "torch") -> str:
        """What is run: the source for ``"torch"``, ``"jax"`` or ``"numpy"``."""
        if library not in _LIBRARIES:
            raise AxisSpecError(f"a program is written for {', '.join(map(repr, _LIBRARIES))}, but not for {library!r}.")
        return "\n\n\n".join([_LIBRARIES[library][1], *(function.source(library) for function in self.functions)]) + "\n"

    @functools.cached_property
    def torch(self) -> Callable[..., Any]:
        """The function in PyTorch."""
        return _compiled(self.source("torch"), self.functions[-1].name)

    @functools.cached_property
    def jax(self) -> Callable[..., Any]:
        """The function in JAX."""
        try:
            return _compiled(self.source("jax"), self.functions[-1].name)
        except ModuleNotFoundError as error:
            raise ImportError("the JAX version of a program needs JAX: pip install 'torchbatch[jax]'.") from error

    @functools.cached_property
    def numpy(self) -> Callable[..., Any]:
        """The function in NumPy."""
        return _compiled(self.source("numpy"), self.functions[-1].name)

    @property
    def length(self) -> int:
        """The number of lines that compute something."""
        return sum(len(function.lines) for function in self.functions)

    def __str__(self) -> str:
        return self.source("torch")

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(repr(self))

    def __repr__(self) -> str:
        *_, last = self.functions
        given = ", ".join(f"{name}: {short_struct(struct)}" for name, struct in zip(last.parameters, self.arguments, strict=True))
        lines = [f"{name} = {text.for_library('torch', 'torch')}" for f in self.functions for name, text in f.lines]
        return f"<Program {last.name}({given}): {'; '.join([*lines, f'return {_written(last.result)}'])}>"


def _compiled(source: str, name: str) -> Callable[..., Any]:
    """Run the source, which tracebacks and :mod:`inspect` then know, too."""
    file = f"<program {hashlib.sha256(source.encode()).hexdigest()[:12]}>"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    names: dict[str, Any] = {"__name__": file}
    exec(compile(source, file, "exec"), names)
    found: Callable[..., Any] = names[name]
    return found


# --- drawing ---------------------------------------------------------------------------------------------------------


@st.composite
def _lines(
    draw: st.DrawFn, given: Sequence[Value], groups: Sequence[Sequence[Operation]], most: int
) -> tuple[list[tuple[str, Text]], list[Value]]:
    """Lines that each compute a new value out of those before, and all values."""
    values, lines = list(given), []
    for name in _NAMES[: draw(st.integers(1, most))]:
        text = draw(_text(values, groups))
        if text is not None:
            lines.append((name, text))
            values.append(Value(name, text.shape, text.bound))
    return lines, values


@st.composite
def _text(draw: st.DrawFn, values: Sequence[Value], groups: Sequence[Sequence[Operation]]) -> Text | None:
    """One operation on values there are, often on the last one; None if those drawn do not fit."""
    last, *others = list(values)[::-1]
    for _ in range(3):
        x = draw(st.sampled_from([last, last, *others]))
        operation = draw(st.sampled_from(draw(st.sampled_from(list(groups)))))
        found = operation.make(draw, x, values)
        if found is not None and found.fits:
            return found
    return None


def _needed(lines: Sequence[tuple[str, Text]], results: Sequence[str]) -> list[tuple[str, Text]]:
    """The lines without those whose values nobody reads."""
    wanted, kept = set(results), []
    for name, text in reversed(lines):
        if name in wanted:
            kept.append((name, text))
            wanted.update(text.uses)
    return kept[::-1]


@st.composite
def _inner(draw: st.DrawFn, shape: tuple[int, ...], groups: Sequence[Sequence[Operation]]) -> tuple[Function, Operation]:
    """A function ``g`` of one argument, and the operation that calls it."""
    argument = Value("x", shape, _DOMAIN)
    lines, values = draw(_lines([argument], groups, 3))
    function, _ = _function("g", [argument], lines, values[-1].name, keep=True)
    return function, call_of("g", argument, values[-1])


def _function(
    name: str, given: Sequence[Value], lines: Sequence[tuple[str, Text]], result: Any, keep: bool
) -> tuple[Function, list[Value]]:
    """A function without lines that nobody reads, and, but with ``keep``, without such arguments; and the arguments left."""
    kept = _needed(lines, tree.leaves(result))
    used = {used for _, text in kept for used in text.uses} | set(tree.leaves(result))
    left = [value for value in given if keep or value.name in used]
    names = dict(zip((value.name for value in left), "xyz", strict=False))
    names |= dict(zip((name for name, _ in kept), _NAMES, strict=False))
    renamed = tuple((names[name], text.renamed(names)) for name, text in kept)
    parameters = tuple(names[value.name] for value in left)
    return Function(name, parameters, renamed, tree.map(names.__getitem__, result)), left


@st.composite
def _results(draw: st.DrawFn, values: Sequence[Value], trees: bool) -> Any:
    """The last value, or a tree with it in the first place."""
    last = values[-1].name
    kind = draw(st.sampled_from(["one", "tuple", "dict"])) if trees else "one"
    if kind == "one":
        return last
    other = draw(st.sampled_from([value.name for value in values]))
    return (last, other) if kind == "tuple" else {"q": last, "p": other}


@st.composite
def _drawn_program(draw: st.DrawFn, options: _Options) -> Program:
    groups = allowed(kinds(differentiable=options.differentiable, continuous=options.continuous))
    sizes: dict[str, Any] = {"max_dims": 2, "min_side": 1, "max_side": options.max_side}
    sides = st.one_of(shapes(**sizes), shapes(min_dims=1, **sizes))  # fewer single numbers
    given = [Value(name, draw(sides), _DOMAIN) for name in "xyz"[: draw(st.integers(1, options.max_arguments))]]
    functions = []
    if options.calls and draw(st.booleans()):
        inner, call = draw(_inner(given[0].shape, groups))
        functions, groups = [inner], [*groups, [call]]
    lines, values = draw(_lines(given, groups, options.max_lines))
    result = draw(_results(values, options.trees))
    main, left = _function("f", given, lines, result, keep=draw(st.booleans()))
    called = {name for _, text in main.lines for name in text.uses}
    dtype = draw(options.dtype) if isinstance(options.dtype, st.SearchStrategy) else options.dtype
    structs = {value.name: ShapeDtypeStruct(value.shape, dtype) for value in values}
    arguments = tuple(structs[value.name] for value in left)
    outputs = tree.map(structs.__getitem__, result)
    return Program(arguments, outputs, (*(f for f in functions if f.name in called), main), options.differentiable)


@dataclasses.dataclass(frozen=True)
class _Options:
    """What :func:`programs` was asked for."""

    differentiable: bool
    continuous: bool
    dtype: Any
    max_arguments: int
    max_lines: int
    max_side: int
    trees: bool
    calls: bool


def programs(
    *,
    differentiable: bool = True,
    continuous: bool = True,
    dtype: Any = torch.float32,
    max_arguments: int = 3,
    max_lines: int = 6,
    max_side: int = 3,
    trees: bool = True,
    calls: bool = True,
) -> st.SearchStrategy[Program]:
    """Random functions of a few arrays, the same in PyTorch, JAX and NumPy.

    They have operations number by number, reductions, products, new shapes, indices, joins, and calls of a second function.
    Nothing is badly conditioned for arguments from -2 to 2 (``program.domain``): no number grows beyond 50, and nothing is
    divided by a number near 0. They shrink to one line.

    Args:
        differentiable: whether they have a derivative everywhere; otherwise ``abs``, ``max``, ``sort`` and the like are among
            their operations.
        continuous: whether they are continuous; otherwise ``floor``, ``sign`` and comparisons are among their operations,
            for which a difference in rounding is a difference in the result.
        dtype: of all arguments: one for floating-point numbers, or a strategy for them.
        max_arguments: at most so many arguments.
        max_lines: at most so many operations.
        max_side: the size of the longest axis of an argument.
        trees: whether they may return a tuple or a dict.
        calls: whether they may have a second function, which is called.

    Raises:
        AxisSpecError: an option is out of range.

    Example:
        >>> from hypothesis import find
        >>> from torchbatch.testing.strategies import programs
        >>> program = find(programs(), lambda program: "@" in str(program))
        >>> print(program, end="")
        import torch
        <BLANKLINE>
        <BLANKLINE>
        def f(x):
            a = x @ x
            return a
        >>> program
        <Program f(x: f32[1]): a = x @ x; return a>
    """
    ranges = {"max_arguments": (max_arguments, 3), "max_lines": (max_lines, len(_NAMES)), "max_side": (max_side, 4)}
    for name, (value, most) in ranges.items():
        if not 1 <= value <= most:
            raise AxisSpecError(f"programs: {name} must be from 1 to {most}, but it is {value!r}.")
    return _drawn_program(_Options(differentiable, continuous, dtype, max_arguments, max_lines, max_side, trees, calls))
