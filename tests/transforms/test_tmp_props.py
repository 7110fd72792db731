"""Random calls of vmap, held to the loop and to live JAX."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from torchbatch import tree
from torchbatch.errors import AxisError, AxisSpecError, InputTypeError, OutputTypeError, TorchbatchError, UnmappedOutputError
from torchbatch.testing import loop

jax = pytest.importorskip("jax")
LONG = settings.default.max_examples > 100


def examples(count: int) -> Any:
    """``count`` examples, or as many as the long profile says."""
    fixture = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
    return settings(max_examples=settings.default.max_examples if LONG else count, suppress_health_check=fixture)


# --- random trees ----------------------------------------------------------------------------------------------------

Point = namedtuple("Point", "x y")


@dataclass
class Node:
    first: Any
    second: Any
    tag: str = "t"


tree.register_dataclass(Node, meta_fields=("tag",))
jax.tree_util.register_dataclass(Node, ("first", "second"), ("tag",))

MAKERS: dict[str, Callable[[list[Any]], Any]] = {
    "tuple": tuple,
    "list": list,
    "dict": lambda children: {f"k{9 - i}": child for i, child in enumerate(children)},
    "OrderedDict": lambda children: OrderedDict((f"k{9 - i}", child) for i, child in enumerate(children)),
    "namedtuple": lambda children: Point(*children),
    "dataclass": lambda children: Node(*children),
}
DTYPES = ["float32", "float64", "int32", "int64", "bool", "complex64", "float16", "bfloat16"]
SIZES = st.integers(0, 3)


class Covered(NamedTuple):
    """A tree, and an axis tree that is its prefix."""

    value: Any
    axes: Any


def container(draw: Any) -> tuple[Callable[[list[Any]], Any], int]:
    kind = draw(st.sampled_from(sorted(MAKERS)))
    return MAKERS[kind], 2 if kind in ("namedtuple", "dataclass") else draw(st.integers(1, 2))


def make_array(draw: Any, shape: tuple[int, ...], dtypes: list[str] = DTYPES) -> np.ndarray:
    """Small whole numbers, which no dtype rounds, all different as far as they go."""
    count = int(np.prod(shape))
    numbers = (np.arange(count) * draw(st.sampled_from([1, 2, 3])) + draw(st.integers(0, 6))) % 7 - 3
    return numbers.reshape(shape).astype(jax.numpy.dtype(draw(st.sampled_from(dtypes))))


def slice_shape(draw: Any, least: int) -> tuple[int, ...]:
    return tuple(draw(st.lists(SIZES, min_size=least, max_size=max(least, 2))))


def array_over(draw: Any, size: int, axis: int | None, dtypes: list[str]) -> np.ndarray:
    """An array whose axis ``axis`` has size ``size``."""
    least = 0 if axis is None else axis if axis >= 0 else -axis - 1
    shape = slice_shape(draw, least)
    if axis is not None:
        at = axis % (len(shape) + 1)
        shape = (*shape[:at], size, *shape[at:])
    return make_array(draw, shape, dtypes)


def tree_over(draw: Any, size: int, axis: int | None, dtypes: list[str], depth: int = 2) -> Any:
    """A tree of such arrays, with None here and there."""
    kind = draw(st.sampled_from(["array", "array", "array", "None", "tree"] if depth else ["array"]))
    if kind == "array":
        return array_over(draw, size, axis, dtypes)
    if kind == "None":
        return None
    make, count = container(draw)
    return make([tree_over(draw, size, axis, dtypes, depth - 1) for _ in range(count)])


def covered(draw: Any, size: int, dtypes: list[str], depth: int = 2) -> Covered:
    """An argument and its entry in ``in_axes``."""
    if depth and draw(st.booleans()):
        make, count = container(draw)
        children = [covered(draw, size, dtypes, depth - 1) for _ in range(count)]
        return Covered(make([child.value for child in children]), make([child.axes for child in children]))
    axis = draw(st.sampled_from([0, 0, 1, 2, -1, -2, None]))
    return Covered(tree_over(draw, size, axis, dtypes, depth), axis)


# --- random functions ------------------------------------------------------------------------------------------------


def leaves(value: Any) -> list[Any]:
    return jax.tree.leaves(value)


OPERATIONS: dict[str, Callable[[Any, Any], Any]] = {
    "itself": lambda x, y: x,
    "sum of two": lambda x, y: x + x,
    "total": lambda x, y: x.sum(),
    "sum over the first": lambda x, y: x.sum(0) if x.ndim else x,
    "new axis": lambda x, y: x[..., None],
    "flat": lambda x, y: x.reshape(-1),
    "comparison": lambda x, y: x == y.sum(),
    "product": lambda x, y: x * y.sum(),
    "transposed": lambda x, y: x.swapaxes(0, -1) if x.ndim else x,
    "number": lambda x, y: 2.5,
    "whole number": lambda x, y: 3,
    "None": lambda x, y: None,
}
CONSTANT = ("number", "whole number", "None")


class Output(NamedTuple):
    """What a random function returns: a tree of (operation, place of x, place of y) and its ``out_axes``."""

    plan: Any
    axes: Any


class Op(NamedTuple):
    name: str
    x: int
    y: int


def function_of(plan: Any) -> Callable[..., Any]:
    """The function that a plan describes; its arguments are taken as one flat list of arrays."""

    def fun(*args: Any, **kwargs: Any) -> Any:
        flat = leaves((args, kwargs)) or [np.float32(2)]

        def built(op: Op) -> Any:
            return OPERATIONS[op.name](flat[op.x % len(flat)], flat[op.y % len(flat)])

        return jax.tree.map(built, plan, is_leaf=lambda node: isinstance(node, Op))

    return fun


def operation(draw: Any, names: Any) -> Op:
    return Op(draw(st.sampled_from(sorted(names))), draw(st.integers(0, 5)), draw(st.integers(0, 5)))


def plan_tree(draw: Any, names: Any, depth: int = 2) -> Any:
    if not depth or draw(st.booleans()):
        return operation(draw, names)
    make, count = container(draw)
    return make([plan_tree(draw, names, depth - 1) for _ in range(count)])


def output_plan(draw: Any, depth: int = 2) -> Output:
    """A plan and axes that fit outputs of any rank, or with some luck those of this one."""
    if depth and draw(st.booleans()):
        make, count = container(draw)
        children = [output_plan(draw, depth - 1) for _ in range(count)]
        return Output(make([child.plan for child in children]), make([child.axes for child in children]))
    axis = draw(st.sampled_from([0, 0, 0, -1, -1, 1, -2, None]))
    return Output(plan_tree(draw, OPERATIONS if axis is not None else CONSTANT, depth), axis)


class Case(NamedTuple):
    """A call of a mapped function."""

    plan: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    in_axes: Any
    out_axes: Any
    size: int
    give_size: bool
    as_numpy: bool

    def thunk(self, lib: Any) -> Any:
        size = {"axis_size": self.size} if self.give_size else {}
        mapped = lib.vmap(function_of(self.plan), in_axes=self.in_axes, out_axes=self.out_axes, **size)
        keep = self.as_numpy and lib.name != "JAX"
        args, kwargs = (self.args, self.kwargs) if keep else (lib.tree(self.args), lib.tree(self.kwargs))
        return mapped(*args, **kwargs)


@st.composite
def cases(draw: Any, dtypes: list[str] = DTYPES) -> Case:
    size = draw(st.integers(1,3))
    entries = [covered(draw, size, dtypes) for _ in range(draw(st.integers(0, 3)))]
    kwargs = {name: tree_over(draw, size, 0, dtypes, 1) for name in draw(st.sampled_from([(), (), ("w",), ("v", "u")]))}
    kind = draw(st.sampled_from([tuple, list]))
    axes = kind(entry.axes for entry in entries)
    as_numpy = draw(st.booleans()) and "bfloat16" not in {str(leaf.dtype) for e in entries for leaf in leaves(e.value)} | {
        str(leaf.dtype) for leaf in leaves(kwargs)
    }
    output = output_plan(draw)
    return Case(output.plan, tuple(e.value for e in entries), kwargs, axes, output.axes, size, draw(st.booleans()), as_numpy)


@examples(150)
@given(case=cases())
def test_random_calls_agree(agree, case):
    agree.either(case.thunk)
