"""Arguments written down as text, for the command line: ``f32[8,3]``, ``i64[8]<10``, ``{"w": f32[3,4], "b": f32[4]}``."""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

import torchbatch as tb

_NAMES = {
    **{f"f{bits}": f"float{bits}" for bits in (16, 32, 64)},
    **{f"i{bits}": f"int{bits}" for bits in (8, 16, 32, 64)},
    **{f"u{bits}": f"uint{bits}" for bits in (8, 16, 32, 64)},
    **{f"c{bits}": f"complex{bits}" for bits in (64, 128)},
    "bf16": "bfloat16",
    "f8_e4m3fn": "float8_e4m3fn",
    "f8_e5m2": "float8_e5m2",
    "bool": "bool",
}
DTYPES: dict[str, torch.dtype] = {name: getattr(torch, full) for short, full in _NAMES.items() for name in (short, full)}
_DIGITS = 10  # whole numbers are drawn below it where nothing else is said
_GRAMMAR = "write a dtype with its shape, such as f32[8,3], f32[] or i64[8]<10, a file such as x.npy, key, or a tree of them"


class SpecError(ValueError):
    """A text that describes no argument, or no axes; it says what is wrong with it."""


def read_arguments(specs: Iterable[str], seed: int = 0) -> list[Any]:
    """Draw the arguments that texts describe.

    ======================  ===========================================================================================
    text                    argument
    ======================  ===========================================================================================
    ``f32[8,3]``            normally distributed numbers; all of f16 f32 f64 bf16 f8_e4m3fn f8_e5m2 c64 c128, and the full
                            names (``float32``)
    ``f32[]``               one number, without axes
    ``0<f32[8]``            above 0: the bound and the size of a normally distributed number
    ``-1<=f32[8]<1``        uniform between the two
    ``i64[8]``              whole numbers from 0 to 9; i8 i16 i32 i64 u8 u16 u32 u64
    ``i64[8]<100``          from 0 to 99; ``-5<=i64[8]<5`` has both bounds
    ``bool[3]``             true or false
    ``key``, ``key[8]``     one random key of :mod:`torchbatch.random`, or 8
    ``weights.npy``         the array in a file that NumPy saved
    ``2``, ``None``         Python's numbers, text, True, False and None
    ``(f32[3], [f32[]])``   tuples, lists and dicts of all these but files
    ======================  ===========================================================================================

    Args:
        specs: one text for each argument.
        seed: of all that is drawn; the same texts and the same seed give the same numbers.

    Returns:
        One argument for each text.

    Raises:
        SpecError: a text describes no argument.

    Example:
        >>> from torchbatch.testing.specs import read_arguments
        >>> x, i = read_arguments(["f32[8,3]", "i64[4]<3"])
        >>> x.shape, i.dtype, int(i.max()) < 3
        (torch.Size([8, 3]), torch.int64, True)
    """
    generator = torch.Generator().manual_seed(seed)
    return [_Reader(spec, generator).argument() for spec in specs]


def read_axes(text: str, option: str) -> Any:
    """Axes as Python writes them: ``0``, ``0,None``, ``({"w": None, "b": 0}, 1)``.

    Args:
        text: what was written.
        option: what it was written for, for the error's text.

    Raises:
        SpecError: it is not a value of Python.

    Example:
        >>> from torchbatch.testing.specs import read_axes
        >>> read_axes("0,None", "--in-axes")
        (0, None)
    """
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
        raise SpecError(f"{option} {text!r}: write axes as Python does, such as 0, or 0,None, or ({{'w': None}}, 0).") from error


class Bounds(NamedTuple):
    """Where numbers are to lie: from ``low`` up to, but without, ``high``."""

    low: float | None = None
    high: float | None = None


class _Reader:
    """Reads one text."""

    def __init__(self, spec: str, generator: torch.Generator) -> None:
        self.spec, self.generator = spec, generator

    def argument(self) -> Any:
        """The argument that the whole text describes."""
        text = self.spec.strip()
        if text.endswith(".npy"):
            return self._loaded(text)
        try:
            node = ast.parse(re.sub(r"(\w)\[\s*\]", r"\1[()]", text), mode="eval").body
        except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
            raise self.error(_GRAMMAR) from error
        return self.value(node)

    def error(self, what: str) -> SpecError:
        """What to raise."""
        return SpecError(f"argument {self.spec!r}: {what}.")

    def value(self, node: ast.AST) -> Any:
        """What one part of the text describes."""
        for kind, read in self._readers().items():
            if isinstance(node, kind):
                return read(node)
        raise self.error(_GRAMMAR)

    def _readers(self) -> dict[type[ast.AST], Callable[[Any], Any]]:
        return {
            ast.Constant: lambda node: node.value,
            ast.UnaryOp: self._number,
            ast.BinOp: self._number,
            ast.Tuple: lambda node: tuple(self.value(item) for item in node.elts),
            ast.List: lambda node: [self.value(item) for item in node.elts],
            ast.Dict: self._dict,
            ast.Name: self._name,
            ast.Subscript: lambda node: self._array(node, Bounds()),
            ast.Compare: self._bounded,
        }

    def _dict(self, node: ast.Dict) -> dict[Any, Any]:
        if any(not isinstance(key, ast.Constant) for key in node.keys):
            raise self.error("the keys of a dict must be text or numbers")
        keys = [key.value for key in node.keys if isinstance(key, ast.Constant)]
        return {key: self.value(item) for key, item in zip(keys, node.values, strict=True)}

    def _number(self, node: ast.AST) -> Any:
        try:
            return ast.literal_eval(node)
        except ValueError as error:
            raise self.error(_GRAMMAR) from error

    def _name(self, node: ast.Name) -> Any:
        if node.id == "key":
            return tb.random.key(self._seed())
        hint = f"; {node.id}[] is one number, without axes" if node.id in DTYPES else ""
        raise self.error(f"{_GRAMMAR}{hint}")

    def _seed(self) -> int:
        return int(torch.randint(2**31, (), generator=self.generator))

    def _array(self, node: ast.Subscript, bounds: Bounds) -> Any:
        """An array by its dtype and shape, or keys by their shape."""
        name = node.value.id if isinstance(node.value, ast.Name) else ""
        shape = self._shape(node.slice)
        if name not in ("key", *DTYPES):
            raise self.error(f"there is no dtype {name!r}; there are {', '.join(_NAMES)}" if name else _GRAMMAR)
        try:
            if name == "key":
                return tb.random.split(tb.random.key(self._seed()), shape)
            return self._drawn(DTYPES[name], shape, bounds)
        except (RuntimeError, OverflowError, TypeError, MemoryError) as error:
            raise self.error(f"an array of this shape cannot be made: {(str(error).splitlines() or [''])[0]}") from error

    def _shape(self, node: ast.AST) -> tuple[int, ...]:
        parts = node.elts if isinstance(node, ast.Tuple) else [node]
        sizes = [part.value if isinstance(part, ast.Constant) else None for part in parts]
        if any(type(size) is not int for size in sizes):
            raise self.error("a shape is a list of whole numbers, such as [8,3], or [] for one number")
        return tuple(size for size in sizes if isinstance(size, int))

    def _bounded(self, node: ast.Compare) -> torch.Tensor:
        """``low <= array < high``, either of the two left out or the other way round."""
        parts = [node.left, *node.comparators]
        places = [i for i, part in enumerate(parts) if isinstance(part, ast.Subscript)]
        if places not in ([0], [1]) or len(parts) - places[0] > 2:
            raise self.error("write bounds as -1<=f32[8]<1, with the array in the middle")
        (place,) = places
        array: Any = parts[place]
        found: dict[str, Any] = {}
        for i, part in enumerate(parts):
            if i != place:
                found |= self._bound(node.ops[min(i, place)], self._number(part), before=i < place, whole=_whole(array))
        if len(found) < len(parts) - 1:
            raise self.error("both bounds are on the same side")
        drawn: torch.Tensor = self._array(array, Bounds(**found))
        return drawn

    def _bound(self, op: ast.cmpop, number: Any, before: bool, whole: bool) -> dict[str, Any]:
        """Which bound it is, and where: whole numbers that may be equal to the upper one end one above it."""
        if not isinstance(op, ast.Lt | ast.LtE | ast.Gt | ast.GtE) or type(number) not in (int, float):
            raise self.error("bounds are numbers, written with <, <=, > or >=")
        equal = isinstance(op, ast.LtE | ast.GtE)
        if isinstance(op, ast.Lt | ast.LtE) == before:
            return {"low": number + 1 if whole and not equal else number}
        return {"high": number + 1 if whole and equal else number}

    def _drawn(self, dtype: torch.dtype, shape: Sequence[int], bounds: Bounds) -> torch.Tensor:
        if bounds != Bounds() and (dtype is torch.bool or dtype.is_complex):
            raise self.error(f"{_name(dtype)} has no bounds")
        if bounds.low is not None and bounds.high is not None and not bounds.low < bounds.high:
            raise self.error(f"there are no numbers from {bounds.low} up to {bounds.high}")
        if dtype is torch.bool:
            return torch.randint(2, shape, generator=self.generator).bool()
        draw = self._real if dtype.is_floating_point or dtype.is_complex else self._integer
        return draw(dtype, shape, bounds)

    def _integer(self, dtype: torch.dtype, shape: Sequence[int], bounds: Bounds) -> torch.Tensor:
        first = 0 if bounds.high is None or bounds.high > 0 else bounds.high - _DIGITS
        low = math.ceil(first if bounds.low is None else bounds.low)
        high = low + _DIGITS if bounds.high is None else math.ceil(bounds.high)
        limits = torch.iinfo(dtype)
        if not limits.min <= low < high <= min(limits.max + 1, 2**63 - 1):
            raise self.error(f"{_name(dtype)} does not hold numbers from {low} to {high - 1}")
        return torch.randint(low, high, shape, generator=self.generator).to(dtype)

    def _real(self, dtype: torch.dtype, shape: Sequence[int], bounds: Bounds) -> torch.Tensor:
        wide = dtype if dtype in (torch.float64, torch.complex64, torch.complex128) else torch.float32
        if bounds.low is not None and bounds.high is not None:
            drawn = torch.rand(shape, dtype=wide, generator=self.generator) * (bounds.high - bounds.low) + bounds.low
            return drawn.to(dtype)
        drawn = torch.randn(shape, dtype=wide, generator=self.generator)
        if bounds.low is not None:
            drawn = bounds.low + drawn.abs()
        elif bounds.high is not None:
            drawn = bounds.high - drawn.abs()
        return drawn.to(dtype)

    def _loaded(self, path: str) -> torch.Tensor:
        try:
            array = np.load(path, allow_pickle=False)
            return torch.from_numpy(np.ascontiguousarray(array).reshape(array.shape))
        except (OSError, ValueError, TypeError, EOFError) as error:
            raise self.error(f"cannot read the file: {error}") from error


def _whole(node: Any) -> bool:
    """Whether an array is one of whole numbers."""
    dtype = DTYPES.get(getattr(node.value, "id", ""), torch.float32)
    return not (dtype.is_floating_point or dtype.is_complex)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
