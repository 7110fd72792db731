"""The operations that random programs are made of: what they are called in each library, and which shapes they take.

An operation is text with a place for its arguments, such as ``{xp}.sin({x})``, where ``xp`` is ``torch``, ``jnp`` or ``np``. Each
value has a bound for its numbers, so that nothing overflows and no number comes near a place where rounding decides.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
from hypothesis import strategies as st

__all__ = ["OPERATIONS", "Operation", "Text", "Value"]

Shape = tuple[int, ...]

LARGEST_VALUE = 50.0
LARGEST_ARRAY = 48
MOST_AXES = 3


class Value(NamedTuple):
    """A variable: its name, its shape, and what no number in it is larger than."""

    name: str
    shape: Shape
    bound: float


class Text(NamedTuple):
    """An expression, with ``{xp}`` for the library, or in other words for some libraries; and what it gives."""

    plain: str
    shape: Shape
    bound: float
    uses: tuple[str, ...]
    other: Mapping[str, str] = MappingProxyType({})

    def for_library(self, library: str, xp: str) -> str:
        """The expression in one library."""
        return self.other.get(library, self.plain).replace("{xp}", xp)

    def renamed(self, names: Mapping[str, str]) -> Text:
        """The same with other names of variables, which have one letter each."""

        def change(words: str) -> str:
            return re.sub(r"\b[a-z]\b", lambda found: names.get(found[0], found[0]), words)

        other = {library: change(words) for library, words in self.other.items()}
        uses = tuple(names.get(name, name) for name in self.uses)
        return self._replace(plain=change(self.plain), other=other, uses=uses)

    @property
    def fits(self) -> bool:
        """Whether the result is small."""
        return self.bound <= LARGEST_VALUE and math.prod(self.shape) <= LARGEST_ARRAY and len(self.shape) <= MOST_AXES


Make = Callable[[st.DrawFn, Value, Sequence[Value]], Text | None]


class Operation(NamedTuple):
    """``make`` writes it for a first argument and all values there are, or gives None where it does not fit.

    ``kind`` is ``"smooth"``; ``"kinked"``, which has no derivative somewhere; or ``"jumps"``, which is not continuous.
    """

    name: str
    kind: str
    make: Make


# --- number by number ------------------------------------------------------------------------------------------------


def _unary(text: str, bound: Callable[[float], float], limit: float = LARGEST_VALUE, **other: str) -> Make:
    def make(draw: st.DrawFn, x: Value, values: Sequence[Value]) -> Text | None:
        if x.bound > limit:
            return None
        texts = {library: words.replace("{x}", x.name) for library, words in other.items()}
        return Text(text.replace("{x}", x.name), x.shape, bound(x.bound), (x.name,), texts)

    return make


_UNARY: dict[str, tuple[str, Make]] = {
    "sin": ("smooth", _unary("{xp}.sin({x})", lambda b: min(b, 1.0))),
    "tanh": ("smooth", _unary("{xp}.tanh({x})", lambda b: min(b, 1.0))),
    "half": ("smooth", _unary("0.5 * {x}", lambda b: 0.5 * b)),
    "negative": ("smooth", _unary("-{x}", lambda b: b)),
    "one minus": ("smooth", _unary("1.0 - {x}", lambda b: 1 + b)),
    "cos": ("smooth", _unary("{xp}.cos({x})", lambda b: 1.0)),
    "exp": ("smooth", _unary("{xp}.exp({x})", math.exp, limit=3.5)),
    "square": ("smooth", _unary("{x} * {x}", lambda b: b * b)),
    "root": ("smooth", _unary("{xp}.sqrt(1.0 + {x} * {x})", lambda b: 1 + b)),
    "log": ("smooth", _unary("{xp}.log1p({x} * {x})", lambda b: math.log1p(b * b))),
    "ratio": ("smooth", _unary("{x} / (1.0 + {x} * {x})", lambda b: min(b, 0.5))),
    "sigmoid": (
        "smooth",
        _unary("{xp}.sigmoid({x})", lambda b: 1.0, jax="jax.nn.sigmoid({x})", numpy="1.0 / (1.0 + np.exp(-{x}))"),
    ),
    "abs": ("kinked", _unary("{xp}.abs({x})", lambda b: b)),
    "relu": ("kinked", _unary("{xp}.relu({x})", lambda b: b, jax="jax.nn.relu({x})", numpy="np.maximum({x}, 0.0)")),
    "clip": ("kinked", _unary("{xp}.clip({x}, -1.0, 1.0)", lambda b: min(b, 1.0))),
    "leaky": ("kinked", _unary("{xp}.where({x} > 0.0, {x}, 0.125 * {x})", lambda b: b)),
    "floor": ("jumps", _unary("{xp}.floor({x})", lambda b: b + 1)),
    "sign": ("jumps", _unary("{xp}.sign({x})", lambda b: 1.0)),
}


def _binary(text: str, bound: Callable[[float, float], float]) -> Make:
    def make(draw: st.DrawFn, x: Value, values: Sequence[Value]) -> Text | None:
        y = draw(st.sampled_from([value for value in values if _broadcast(x.shape, value.shape) is not None]))
        shape = _broadcast(x.shape, y.shape) or ()
        words = text.replace("{x}", x.name).replace("{y}", y.name)
        return Text(words, shape, bound(x.bound, y.bound), (x.name, y.name))

    return make


def _broadcast(a: Shape, b: Shape) -> Shape | None:
    try:
        return np.broadcast_shapes(a, b)
    except ValueError:
        return None


_BINARY: dict[str, tuple[str, Make]] = {
    "add": ("smooth", _binary("{x} + {y}", lambda a, b: a + b)),
    "multiply": ("smooth", _binary("{x} * {y}", lambda a, b: a * b)),
    "subtract": ("smooth", _binary("{x} - {y}", lambda a, b: a + b)),
    "divide": ("smooth", _binary("{x} / (1.0 + {y} * {y})", lambda a, b: a)),
    "logaddexp": ("smooth", _binary("{xp}.logaddexp({x}, {y})", lambda a, b: max(a, b) + 0.7)),
    "arctan2": ("smooth", _binary("{xp}.arctan2({x}, 1.0 + {y} * {y})", lambda a, b: 1.6)),
    "maximum": ("kinked", _binary("{xp}.maximum({x}, {y})", max)),
    "minimum": ("kinked", _binary("{xp}.minimum({x}, {y})", max)),
    "choose": ("jumps", _binary("{xp}.where({x} > {y}, {x}, 0.5 * {y})", max)),
}


# --- along an axis ---------------------------------------------------------------------------------------------------


def _axis(draw: st.DrawFn, ndim: int) -> int:
    axis: int = draw(st.sampled_from([*range(ndim), *range(-1, -ndim - 1, -1)]))
    return axis


def _reduction(
    text: str, bound: Callable[[float, int], float], keep: bool = False, limit: float = LARGEST_VALUE, **other: str
) -> Make:
    """An operation along ``{axis}``, which it drops, or with ``keep`` leaves as it is."""

    def make(draw: st.DrawFn, x: Value, values: Sequence[Value]) -> Text | None:
        if not x.shape or x.bound > limit:
            return None
        axis = _axis(draw, len(x.shape))
        at = axis % len(x.shape)
        shape = x.shape if keep else (*x.shape[:at], *x.shape[at + 1 :])
        words = [part.replace("{x}", x.name).replace("{axis}", str(axis)) for part in (text, *other.values())]
        return Text(words[0], shape, bound(x.bound, x.shape[at]), (x.name,), dict(zip(other, words[1:], strict=True)))

    return make


def _kept(draw: st.DrawFn, x: Value, values: Sequence[Value]) -> Text | None:
    if not x.shape:
        return None
    axis = draw(st.integers(0, len(x.shape) - 1))
    shape = (*x.shape[:axis], 1, *x.shape[axis + 1 :])
    return Text(f"{x.name}.sum({axis}, keepdims=True)", shape, x.bound * x.shape[axis], (x.name,))


def _total(draw: st.DrawFn, x: Value, values: Sequence[Value]) -> Text | None:
    return Text(f"{x.name}.sum()", (), x.bound * math.prod(x.shape), (x.name,)) if x.shape else None


_ALONG: dict[str, tuple[str, Make]] = {
    "sum": ("smooth", _reduction("{x}.sum({axis})", lambda b, n: b * n)),
    "mean": ("smooth", _reduction("{x}.mean({axis})", lambda b, n: b)),
    "total": ("smooth", _total),
    "sum, kept": ("smooth", _kept),
    "prod": ("smooth", _reduction("{x}.prod({axis})", lambda b, n: max(b, 1.0) ** n)),
    "cumsum": ("smooth", _reduction("{xp}.cumsum({x}, {axis})", lambda b, n: b * n, keep=True)),
    "softmax": (
        "smooth",
        _reduction(
            "{xp}.softmax({x}, {axis})",
            lambda b, n: 1.0,
            keep=True,
            limit=20.0,
            jax="jax.nn.softmax({x}, {axis})",
            numpy="np.exp({x}) / np.exp({x}).sum({axis}, keepdims=True)",
        ),
    ),
    "logsumexp": (
        "smooth",
        _reduction(
            "{xp}.logsumexp({x}, {axis})",
            lambda b, n: b + math.log(n),
            limit=20.0,
            jax="jax.nn.logsumexp({x}, {axis})",
            numpy="np.log(np.exp({x}).sum({axis}))",
        ),
    ),
    "max": ("kinked", _reduction("{xp}.max({x}, {axis})", lambda b, n: b, torch="torch.amax({x}, {axis})")),
    "sort": ("kinked", _reduction("{xp}.sort({x}, {axis})", lambda b, n: b, keep=True, torch="torch.sort({x}, {axis})[0]")),
}


# --- shapes ----------------------------------------------------------------------------------------------------------


def _swapped(draw: st.DrawFn, x: Value, values: Sequence[Value]) -> Text | None:
    if len(x.shape) < 2:
        return None
    a, b = draw(st.sampled_from([(0, 1), (0, -1), (-2, -1)]))
    shape = list(x.shape)
    shape[a], shape[b] = shape[b], shape[a]
    return Text(f"{x.name}.swapaxes({a}, {b})", tuple(shape), x.bound, (x.name,))


def _reshaped(draw: st.DrawFn, x: Value, values: Sequence[Value]) -> Text | None:
    size = math.prod(x.shape)
    shapes: list[Shape] = [(size,), (1, size), (size, 1)]
    shapes += [(side, size // side) for side in range(2, size) if size % side == 0]
    shape = draw(st.sampled_from(shapes))
    written = ", ".join(map(str, shape)) if shape != (size,) else "-1"
    return Text(f"{x.name}.reshape({written})", shape, x.bound, (x.name,))


def _indexed(draw: st.DrawFn, x: Value, values: Sequence[Value]) -> Text | None:
    ways: dict[str, Shape] = {"[None]": (1, *x.shape), "[..., None]": (*x.shape, 1)}
    if x.shape:
        first, last = x.shape[0], x.shape[-1]
        ways = {"[0]": x.shape[1:], "[..., -1]": x.shape[:-1], **ways, "[::2]": (-(-first // 2), *x.shape[1:])}
        ways[f"[{{xp}}.asarray([{first - 1}, 0])]"] = (2, *x.shape[1:])
        if first > 1:
            ways["[1:]"] = (first - 1, *x.shape[1:])
        if last > 1:
            ways["[..., :-1]"] = (*x.shape[:-1], last - 1)
    index = draw(st.sampled_from(list(ways)))
    return Text(x.name + index, ways[index], x.bound, (x.name,))


def _moved(draw: st.DrawFn, x: Value, values: Sequence[Value]) -> Text | None:
    if not x.shape:
        return None
    axis = draw(st.integers(0, len(x.shape) - 1))
    text = draw(st.sampled_from(["{xp}.flip(%s, (%d,))", "{xp}.roll(%s, 1, %d)"])) % (x.name, axis)
    return Text(text, x.shape, x.bound, (x.name,))


def _joined(draw: st.DrawFn, x: Value, values: Sequence[Value]) -> Text | None:
    y = draw(st.sampled_from([value for value in values if value.shape == x.shape]))
    if not x.shape or draw(st.booleans()):
        axis = draw(st.integers(0, len(x.shape)))
        shape = (*x.shape[:axis], 2, *x.shape[axis:])
        text = f"{{xp}}.stack([{x.name}, {y.name}], {axis})"
    else:
        axis = draw(st.integers(0, len(x.shape) - 1))
        shape = (*x.shape[:axis], 2 * x.shape[axis], *x.shape[axis + 1 :])
        text = f"{{xp}}.concatenate([{x.name}, {y.name}], {axis})"
    return Text(text, shape, max(x.bound, y.bound), (x.name, y.name))


def _of_matrix(text: str, shape: Callable[[int, int], Shape]) -> Make:
    def make(draw: st.DrawFn, x: Value, values: Sequence[Value]) -> Text | None:
        if len(x.shape) != 2:
            return None
        return Text(text.replace("{x}", x.name), shape(*x.shape), x.bound, (x.name,))

    return make


_SHAPES: dict[str, tuple[str, Make]] = {
    "swapaxes": ("smooth", _swapped),
    "index": ("smooth", _indexed),
    "reshape": ("smooth", _reshaped),
    "join": ("smooth", _joined),
    "move": ("smooth", _moved),
    "tril": ("smooth", _of_matrix("{xp}.tril({x})", lambda n, m: (n, m))),
    "diagonal": ("smooth", _of_matrix("{xp}.diagonal({x})", lambda n, m: (min(n, m),))),
}


# --- products --------------------------------------------------------------------------------------------------------


def _matmul(draw: st.DrawFn, x: Value, values: Sequence[Value]) -> Text | None:
    fitting = [y for y in values if 0 < len(x.shape) <= 2 and 0 < len(y.shape) <= 2 and x.shape[-1] == y.shape[0]]
    if not fitting:
        return None
    y = draw(st.sampled_from(fitting))
    bound = x.bound * y.bound * x.shape[-1]
    return Text(f"{x.name} @ {y.name}", (*x.shape[:-1], *y.shape[1:]), bound, (x.name, y.name))


def _outer(draw: st.DrawFn, x: Value, values: Sequence[Value]) -> Text | None:
    fitting = [y for y in values if len(x.shape) == len(y.shape) == 1]
    if not fitting:
        return None
    y = draw(st.sampled_from(fitting))
    return Text(f"{{xp}}.outer({x.name}, {y.name})", (*x.shape, *y.shape), x.bound * y.bound, (x.name, y.name))


def _einsum(draw: st.DrawFn, x: Value, values: Sequence[Value]) -> Text | None:
    fitting = [y for y in values if len(x.shape) == len(y.shape) == 2 and x.shape[-1] == y.shape[-1]]
    if not fitting:
        return None
    y = draw(st.sampled_from(fitting))
    text = f"{{xp}}.einsum('ij,kj->ik', {x.name}, {y.name})"
    return Text(text, (x.shape[0], y.shape[0]), x.bound * y.bound * x.shape[1], (x.name, y.name))


_PRODUCTS: dict[str, tuple[str, Make]] = {
    "matmul": ("smooth", _matmul),
    "outer": ("smooth", _outer),
    "einsum": ("smooth", _einsum),
}

_GROUPS: tuple[dict[str, tuple[str, Make]], ...] = (_UNARY, _BINARY, _ALONG, _SHAPES, _PRODUCTS)

#: All operations by name, in groups from which one is drawn first.
OPERATIONS: tuple[tuple[Operation, ...], ...] = tuple(
    tuple(Operation(name, kind, make) for name, (kind, make) in group.items()) for group in _GROUPS
)


def allowed(kinds: Sequence[str]) -> list[list[Operation]]:
    """The operations of these kinds, group by group."""
    groups = [[operation for operation in group if operation.kind in kinds] for group in OPERATIONS]
    return [group for group in groups if group]


def kinds(*, differentiable: bool, continuous: bool) -> list[str]:
    """The kinds of operations of such programs."""
    return ["smooth", *([] if differentiable else ["kinked"]), *([] if continuous else ["jumps"])]


def call_of(name: str, argument: Value, result: Value) -> Operation:
    """A call of a function that was drawn before."""

    def make(draw: st.DrawFn, x: Value, values: Sequence[Value]) -> Text | None:
        fits = x.shape == argument.shape and x.bound <= argument.bound
        return Text(f"{name}({x.name})", result.shape, result.bound, (x.name, name)) if fits else None

    return Operation(name, "smooth", make)
