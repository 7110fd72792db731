"""A failing call as a program of its own, in plain PyTorch."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from torchbatch import tree
from torchbatch.errors import AxisSpecError, InputTypeError
from torchbatch.testing.function_source import FunctionWriter

__all__ = ["reproducer"]

VMAP = "torchbatch.vmap({fun}, in_axes={in_axes}, out_axes={out_axes})"

_STACK = '''\
def stack(outputs, axis):
    """One result out of those of all samples."""
    first = outputs[0]
    if isinstance(first, dict):
        axes = axis if isinstance(axis, dict) else dict.fromkeys(first, axis)
        return {key: stack([output[key] for output in outputs], axes[key]) for key in first}
    if isinstance(first, (tuple, list)):
        axes = axis if isinstance(axis, (tuple, list)) else [axis] * len(first)
        return type(first)([stack(list(part), a) for part, a in zip(zip(*outputs), axes)])
    if first is None or axis is None:
        return first
    return torch.stack([torch.as_tensor(output) for output in outputs], dim=axis)'''


def reproducer(
    fun: Callable[..., Any] | str,
    args: Sequence[Any],
    in_axes: Any = 0,
    out_axes: Any = 0,
    *,
    kwargs: Mapping[str, Any] | None = None,
    axis_size: int | None = None,
    output: Any = None,
    wrap: str = "{fun}",
    transform: str | None = VMAP,
    seed: int | None = None,
    rtol: float | None = None,
    atol: float | None = None,
) -> str:
    """Write a program that makes one call twice: as a plain loop over the samples, and mapped.

    The program needs PyTorch only, but for what ``transform`` names. It holds the source of ``fun`` with the functions and
    values that it uses, and the arguments: their numbers, dtypes, strides and offsets in memory. What cannot be written is
    named in a comment, to be supplied.

    Args:
        fun: the function of one sample, or its source: the definition of a function (the last one counts), or an expression
            such as ``"torch.dot"``.
        args, kwargs: the arguments over the batch. Keyword arguments are mapped over axis 0.
        in_axes, out_axes, axis_size: as for :func:`torchbatch.vmap`.
        output: what ``fun`` returns for one sample, or a stand-in for it. If it is known to be one array, the program is shorter.
        wrap: an expression for what is mapped, in which ``{fun}`` stands for the function: ``"torch.func.grad({fun})"``.
        transform: an expression for the mapped function, with ``{fun}``, ``{in_axes}`` and ``{out_axes}`` in it; None leaves it
            out, and with it the comparison.
        seed: the seed that is set before each of the two, for functions that draw random numbers.
        rtol, atol: how close the two must be; by default as :func:`torch.testing.assert_close` chooses.

    Returns:
        The source of the program.

    Raises:
        AxisSpecError: ``fun`` is text that is no function, or no size is known.
        InputTypeError: a mapped argument is no array.

    Example:
        >>> import torch
        >>> from torchbatch.testing.reproducer import reproducer
        >>> xs = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        >>> text = reproducer(torch.dot, (xs, torch.ones(2)), in_axes=(0, None), output=torch.ones(()))
        >>> print(text, end="")
        import torch
        import torchbatch
        <BLANKLINE>
        <BLANKLINE>
        def inputs():
            x0 = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float32)
            x1 = torch.tensor([1.0, 1.0], dtype=torch.float32)
            return x0, x1
        <BLANKLINE>
        <BLANKLINE>
        # One sample after the other.
        x0, x1 = inputs()
        n = 2
        outputs = [torch.dot(x0.select(0, i), x1) for i in range(n)]
        expected = torch.stack(outputs, dim=0)
        <BLANKLINE>
        # All samples at once.
        x0, x1 = inputs()
        got = torchbatch.vmap(torch.dot, in_axes=(0, None), out_axes=0)(x0, x1)
        <BLANKLINE>
        print("the loop:       ", expected)
        print("torchbatch.vmap:", got)
        torch.testing.assert_close(got, expected, equal_nan=True)
        >>> exec(text)
        the loop:         tensor([3., 7.])
        torchbatch.vmap:  tensor([3., 7.])
    """
    return _Program(fun, args, dict(kwargs or {}), in_axes, out_axes, wrap).text(axis_size, output, transform, seed, rtol, atol)


class _Program:
    """The parts of a program."""

    def __init__(
        self, fun: Callable[..., Any] | str, args: Sequence[Any], kwargs: dict[str, Any], in_axes: Any, out_axes: Any, wrap: str
    ) -> None:
        self.writer = FunctionWriter()
        self.fun = wrap.format(fun=self._function(fun))
        self.import_named(wrap)
        self.axes = [*_entries(in_axes, len(args)), *(0 for _ in kwargs)]
        self.values = [*args, *kwargs.values()]
        self.in_axes, self.out_axes = self.writer.value(in_axes), self.writer.value(out_axes)
        self.names = [self.writer.fresh(name) for name in [*_parameter_names(fun, len(args)), *kwargs]]
        self.keywords = list(kwargs)
        self.count, self.index, self.make = (self.writer.fresh(name) for name in ("n", "i", "inputs"))
        self.stack, self.outputs = self.writer.fresh("stack"), self.writer.fresh("outputs")
        self.expected, self.got = self.writer.fresh("expected"), self.writer.fresh("got")

    def _function(self, fun: Callable[..., Any] | str) -> str:
        if not isinstance(fun, str):
            return self.writer.function(fun, "f")
        name = _last_name(fun)
        if name is None:
            self.import_named(fun)
            return fun if re.fullmatch(r"[\w.]+", fun.strip()) else f"({fun.strip()})"
        self.writer.taken[name] = fun
        self.writer.definitions.append(fun.strip())
        return name

    def import_named(self, text: str | None) -> None:
        """Import the libraries that an expression names."""
        for name in re.findall(r"\b(torchbatch|jax|numpy|functools|math|operator)\.", text or ""):
            self.writer.library(name)

    # --- parts -------------------------------------------------------------------------------------------------------

    def text(
        self,
        axis_size: int | None,
        output: Any,
        transform: str | None,
        seed: int | None,
        rtol: float | None,
        atol: float | None,
    ) -> str:
        """The whole program."""
        size = self.size(axis_size)
        self.import_named(transform)
        inputs = self.inputs()
        seeded = [] if seed is None else [f"torch.manual_seed({seed})"]
        parts = [inputs, "\n".join(["# One sample after the other.", *self.unpacked(), *seeded, *self.loop(size, output)])]
        if transform is not None:
            mapped = self.mapped(transform, size)
            parts.append("\n".join(["# All samples at once.", *self.unpacked(), *seeded, *mapped]))
        parts.append("\n".join(self.shown(transform, size, rtol, atol)))
        definitions = [self.missing(), *self.writer.definitions]
        above = "\n\n\n".join(part for part in ["\n".join(sorted(self.writer.imports)), *definitions, parts[0]] if part)
        return above + "\n\n\n" + "\n\n".join(parts[1:]) + "\n"

    def missing(self) -> str:
        """A comment on each name that the reader has to supply."""
        return "\n".join(f"# Supply {name}: {what}." for name, what in self.writer.missing.items())

    def inputs(self) -> str:
        """A function that makes the arguments, anew for each of the two runs."""
        lines = [f"{name} = {self.writer.value(value, name)}" for name, value in zip(self.names, self.values, strict=True)]
        indented = [f"    {line}".replace("\n", "\n    ") for line in lines]
        return "\n".join([f"def {self.make}():", *indented, f"    return {self.tuple_of_names()}"])

    def tuple_of_names(self) -> str:
        return f"({self.names[0]},)" if len(self.names) == 1 else ", ".join(self.names) or "()"

    def unpacked(self) -> list[str]:
        return [f"{self.tuple_of_names()} = {self.make}()"] if self.names else []

    def call(self, arguments: Sequence[str]) -> str:
        """The arguments of a call, those by keyword with their names."""
        first = len(arguments) - len(self.keywords)
        named = [f"{key}={value}" for key, value in zip(self.keywords, arguments[first:], strict=True)]
        return ", ".join([*arguments[:first], *named])

    def loop(self, size: int, output: Any) -> list[str]:
        """One sample after the other."""
        rows = zip(self.names, self.values, self.axes, strict=True)
        samples = [self.sample(name, value, axis, name) for name, value, axis in rows]
        lines = [f"{self.count} = {size}"]
        if not size:
            return [*lines, "# The batch is empty, so there is no sample to run."]
        lines.append(f"{self.outputs} = [{self.fun}({self.call(samples)}) for {self.index} in range({self.count})]")
        if hasattr(output, "shape") and self.out_axes.lstrip("-").isdigit():
            return [*lines, f"{self.expected} = torch.stack({self.outputs}, dim={self.out_axes})"]
        self.writer.definitions.append(_STACK.replace("stack(", f"{self.stack}(").replace(f"torch.{self.stack}(", "torch.stack("))
        return [*lines, f"{self.expected} = {self.stack}({self.outputs}, {self.out_axes})"]

    def mapped(self, transform: str, size: int) -> list[str]:
        """All samples at once."""
        options = self.out_axes if any(axis is not None for axis in self.axes) else f"{self.out_axes}, axis_size={size}"
        expression = transform.replace("{fun}", self.fun).replace("{in_axes}", self.in_axes).replace("{out_axes}", options)
        return [f"{self.got} = {expression}({self.call(self.names)})"]

    def shown(self, transform: str | None, size: int, rtol: float | None, atol: float | None) -> list[str]:
        """What is printed, and the comparison."""
        label = "mapped" if transform is None else transform.partition("(")[0]
        width = max(len(label), len("the loop")) + 3
        lines = [f'print("{"the loop:":<{width - 2}}", {self.expected})'] if size else []
        if transform is not None:
            lines.append(f'print("{label + ":":<{width - 2}}", {self.got})')
        if transform is not None and size:
            close = "" if rtol is None and atol is None else f", rtol={rtol or 0}, atol={atol or 0}"
            lines.append(f"torch.testing.assert_close({self.got}, {self.expected}{close}, equal_nan=True)")
        return lines

    # --- samples -----------------------------------------------------------------------------------------------------

    def sample(self, text: str, value: Any, axis: Any, name: str) -> str:
        """An expression for what one sample gets of an argument that ``text`` stands for."""
        if axis is None or value is None:
            return text
        if isinstance(value, torch.Tensor):
            return f"{text}.select({axis}, {self.index})"
        if isinstance(value, np.ndarray):
            return f"torch.tensor(numpy.ascontiguousarray({text})).select({axis}, {self.index})"
        steps = _steps(value)

        def child(step: str, part: Any) -> str:
            inner = _entry(axis, step, name) if step in steps else None  # a field that is no child is not mapped
            return self.sample(text + step, part, inner, name + step)

        found = self.writer.container(value, child)
        if found is None:
            raise InputTypeError(
                f"reproducer: the argument {name} is mapped over axis {axis}, but it is {value!r} of type {type(value).__name__}."
            )
        return found

    def size(self, given: int | None) -> int:
        """The number of samples."""
        if given is not None:
            return given
        for value, axis in zip(self.values, self.axes, strict=True):
            found = _size(value, axis)
            if found is not None:
                return found
        raise AxisSpecError("reproducer: nothing is mapped; give axis_size, the number of samples.")


def _size(value: Any, axis: Any) -> int | None:
    """The size of the mapped axis of the first array in a tree that has one."""
    if axis is None:
        return None
    if isinstance(axis, int):
        shapes = [leaf.shape for leaf in tree.leaves(value) if hasattr(leaf, "shape")]
        return int(shapes[0][axis]) if shapes else None
    rows, _ = tree.flatten_with_path(axis)
    sizes = [_size(path(value), entry) for path, entry in rows]
    return next((size for size in sizes if size is not None), None)


def _entries(in_axes: Any, count: int) -> list[Any]:
    return list(in_axes) if isinstance(in_axes, tuple | list) else [in_axes] * count


def _steps(value: Any) -> list[str]:
    """What leads to the children of a node."""
    found, _ = tree.flatten_with_path(value, is_leaf=lambda node: node is not value)
    return [tree.keystr(path) for path, _ in found]


def _entry(axis: Any, step: str, name: str) -> Any:
    """The entry of a tree of axes for a child."""
    if axis is None or isinstance(axis, int):
        return axis
    if step.startswith("."):
        return getattr(axis, step[1:])
    return axis[ast.literal_eval(step)[0]]


def _parameter_names(fun: Callable[..., Any] | str, count: int) -> list[str]:
    """What to call the arguments."""
    try:
        parameters = inspect.signature(fun).parameters.values() if callable(fun) else ()
    except (TypeError, ValueError):
        parameters = ()
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return [names[i] if i < len(names) else f"x{i}" for i in range(count)]


def _last_name(source: str) -> str | None:
    """The name of the last function that a source defines; None for an expression."""
    try:
        body = ast.parse(source.strip()).body
    except SyntaxError as error:
        raise AxisSpecError(f"reproducer: fun is text that Python cannot read: {error}.") from error
    if len(body) == 1 and isinstance(body[0], ast.Expr):
        return None
    for node in reversed(body):
        if isinstance(node, ast.FunctionDef):
            return node.name
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            return node.targets[0].id
    raise AxisSpecError("reproducer: fun is text that defines no function.")
