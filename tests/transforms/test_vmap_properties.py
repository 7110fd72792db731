"""Random calls of vmap, as they stand and traced by jit, held to the loop and to live JAX."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from torchbatch import tree
from torchbatch.errors import AxisError, AxisSpecError, InputTypeError, OutputTypeError, TorchbatchError, UnmappedOutputError

jax = pytest.importorskip("jax")
EVERY_WAY = pytest.mark.parametrize("how", ["eager", "jit", "inductor"], indirect=True)


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
        flat = [torch.as_tensor(x) if isinstance(x, np.ndarray) else x for x in leaves((args, kwargs))] or [np.float32(2)]

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
    chunk_size: int | None = None

    def sound(self) -> Case:
        """The same call, of a function that never fails."""
        return self._replace(plan={"a": Op("number", 0, 0)}, out_axes=0, give_size=True, as_numpy=False)

    def thunk(self, lib: Any) -> Any:
        size = {"axis_size": self.size} if self.give_size else {}
        chunk = {} if lib.name == "JAX" else {"chunk_size": self.chunk_size}
        mapped = lib.vmap(function_of(self.plan), in_axes=self.in_axes, out_axes=self.out_axes, **size, **chunk)
        keep = self.as_numpy and lib.name != "JAX"
        args, kwargs = (self.args, self.kwargs) if keep else (lib.tree(self.args), lib.tree(self.kwargs))
        return mapped(*args, **kwargs)


@st.composite
def cases(draw: Any, dtypes: list[str] = DTYPES) -> Case:
    size = draw(SIZES)
    entries = [covered(draw, size, dtypes) for _ in range(draw(st.integers(0, 3)))]
    kwargs = {name: tree_over(draw, size, 0, dtypes, 1) for name in draw(st.sampled_from([(), (), ("w",), ("v", "u")]))}
    kind = draw(st.sampled_from([tuple, list]))
    axes = kind(entry.axes for entry in entries)
    as_numpy = draw(st.booleans()) and "bfloat16" not in {str(leaf.dtype) for e in entries for leaf in leaves(e.value)} | {
        str(leaf.dtype) for leaf in leaves(kwargs)
    }
    output = output_plan(draw)
    args, chunk = tuple(entry.value for entry in entries), draw(st.sampled_from([None, None, 1, 2]))
    return Case(output.plan, args, kwargs, axes, output.axes, size, draw(st.booleans()), as_numpy, chunk)


@EVERY_WAY
def test_random_calls_agree(agree, how):
    @how.examples(150)
    @given(case=cases())
    def holds(case):
        agree.either(case.thunk)

    holds()


# --- nesting ---------------------------------------------------------------------------------------------------------


class Level(NamedTuple):
    """One transform of a stack: the letter, and for ``v`` the axes of x and w, the output's, and the size."""

    letter: str
    x_axis: int | None = None
    w_axis: int | None = None
    out_axis: int = 0
    size: int = 2


class Stack(NamedTuple):
    levels: list[Level]
    x: np.ndarray
    w: np.ndarray

    def thunk(self, lib: Any) -> Any:
        f = base_of(lib)
        for level in self.levels:
            f = applied(lib, f, level)
        return f(lib.array(self.x), lib.array(self.w))


def base_of(lib: Any) -> Callable[..., Any]:
    return lambda x, w: lib.np.sin(x) * w.sum() + x * x * lib.np.tanh(w).sum()


def applied(lib: Any, f: Callable[..., Any], level: Level) -> Callable[..., Any]:
    if level.letter == "v":
        return lib.vmap(f, in_axes=(level.x_axis, level.w_axis), out_axes=level.out_axis)
    if level.letter == "g":
        return lib.grad(lambda x, w: lib.np.tanh(f(x, w)).sum())
    return lambda x, w: lib.jvp(lambda x: f(x, w), (x,), (lib.np.cos(x),))[1]


def inserted(draw: Any, shape: tuple[int, ...], size: int) -> tuple[tuple[int, ...], int]:
    """A shape with one more axis, and where that is."""
    axis = draw(st.integers(-len(shape) - 1, len(shape)))
    at = axis % (len(shape) + 1)
    return (*shape[:at], size, *shape[at:]), axis


def quarter(array: np.ndarray) -> np.ndarray:
    return np.asarray(array / 4)


@st.composite
def stacks(draw: Any) -> Stack:
    letters = draw(st.lists(st.sampled_from("vvgj"), min_size=1, max_size=5).filter(lambda s: 1 <= s.count("v") <= 3))
    x = w = tuple(draw(st.lists(SIZES, max_size=1)))
    out, levels = x, []
    for letter in letters:
        if letter != "v":
            out = x if letter == "g" else out
            levels.append(Level(letter))
            continue
        size, which = draw(SIZES), draw(st.sampled_from(["x", "w", "xw", "xw"]))
        (new_x, x_axis), (new_w, w_axis) = inserted(draw, x, size), inserted(draw, w, size)
        x, x_axis = (new_x, x_axis) if "x" in which else (x, None)
        w, w_axis = (new_w, w_axis) if "w" in which else (w, None)
        out, out_axis = inserted(draw, out, size)
        levels.append(Level(letter, x_axis, w_axis, out_axis, size))
    return Stack(levels, quarter(make_array(draw, x, ["float64"])), quarter(make_array(draw, w, ["float64"])))


@EVERY_WAY
def test_random_stacks_of_transforms_agree(agree, how):
    @how.examples(60)
    @given(stack=stacks())
    def holds(stack):
        agree.call(stack.thunk, tolerance=1e-9, jit=True)

    holds()


# --- bad calls -------------------------------------------------------------------------------------------------------


class Thing:
    """What is not an array."""


Damage = Callable[[Any, Case], tuple[Case, type[TorchbatchError]]]


def ones(*shape: int) -> np.ndarray:
    return np.ones(shape, np.float32)


def add_argument(case: Case, value: Any, axis: Any) -> Case:
    """The call with one more mapped argument, in a random place as drawn by its caller."""
    return case._replace(args=(*case.args, value), in_axes=[*case.in_axes, axis])


def other_size(draw: Any, case: Case) -> tuple[Case, type[TorchbatchError]]:
    case = add_argument(case, ones(case.size, 2), 0)
    axis = draw(st.sampled_from([0, -1]))
    return add_argument(case, {"bad": [ones(case.size + 1)]}, draw(st.sampled_from([axis, {"bad": axis}]))), AxisError


def rank_too_small(draw: Any, case: Case) -> tuple[Case, type[TorchbatchError]]:
    rank = draw(st.integers(0, 2))
    axis = draw(st.sampled_from([rank, rank + 1, -rank - 1, -rank - 5]))
    return add_argument(case, [ones(*(case.size,) * rank)], axis), AxisError


def not_an_array(draw: Any, case: Case) -> tuple[Case, type[TorchbatchError]]:
    return add_argument(case, draw(st.sampled_from([Thing(), "text", {"a": Thing()}, [b"x"]])), 0), InputTypeError


def wrong_count(draw: Any, case: Case) -> tuple[Case, type[TorchbatchError]]:
    if draw(st.booleans()) or not case.in_axes:
        return case._replace(in_axes=[*case.in_axes, 0]), AxisError
    return case._replace(in_axes=list(case.in_axes)[:-1]), AxisError


def wrong_prefix(draw: Any, case: Case) -> tuple[Case, type[TorchbatchError]]:
    make, count = container(draw)
    prefix = make([draw(st.sampled_from([0, -1, None])) for _ in range(count)])
    values = [ones(case.size), [ones(case.size)] * 3, {"other": ones(case.size)}]
    return add_argument(case, draw(st.sampled_from(values)), draw(st.sampled_from([prefix]))), AxisError


def bad_in_axis(draw: Any, case: Case) -> tuple[Case, type[TorchbatchError]]:
    bad = draw(st.sampled_from([True, "0", 0.0, {"a": False}, (0, "1"), Thing()]))
    return add_argument(case, {"a": ones(case.size)}, bad), AxisSpecError


def bad_out_axis(draw: Any, case: Case) -> tuple[Case, type[TorchbatchError]]:
    bad = draw(st.sampled_from([True, "0", 0.0, {"a": False}, (0, "1"), Thing()]))
    return case._replace(out_axes=bad), AxisSpecError


def out_of_bounds(draw: Any, case: Case) -> tuple[Case, type[TorchbatchError]]:
    plan = {"a": Op("number", 0, 0), "b": Op("itself", 0, 0)}
    return case._replace(plan=plan, out_axes=draw(st.sampled_from([1, 9, -9]))), AxisError


def out_prefix(draw: Any, case: Case) -> tuple[Case, type[TorchbatchError]]:
    plan = draw(st.sampled_from([Op("number", 0, 0), [Op("number", 0, 0)] * 3, {"other": Op("number", 0, 0)}]))
    make, count = container(draw)
    return case._replace(plan=plan, out_axes=make([0] * count)), AxisError


def varying_output(draw: Any, case: Case) -> tuple[Case, type[TorchbatchError]]:
    size = max(case.size, 1)
    x = np.arange(size, dtype=np.float32)
    plan = make_output(draw, Op("itself", 0, 0))
    return Case(plan, (x,), {}, draw(st.sampled_from([0, [0], (-1,)])), None, size, False, False), UnmappedOutputError


def make_output(draw: Any, op: Op) -> Any:
    make, count = container(draw)
    return make([op, *[Op("None", 0, 0)] * (count - 1)])


def wrong_axis_size(draw: Any, case: Case) -> tuple[Case, type[TorchbatchError]]:
    case = add_argument(case, ones(case.size), 0)
    return case._replace(size=case.size + draw(st.integers(1, 2)), give_size=True), AxisError


def nothing_mapped(draw: Any, case: Case) -> tuple[Case, type[TorchbatchError]]:
    return case._replace(in_axes=None, kwargs={}, give_size=False), AxisError


OPERATIONS["thing"] = lambda x, y: Thing()


def not_an_array_out(draw: Any, case: Case) -> tuple[Case, type[TorchbatchError]]:
    case = case._replace(plan=make_output(draw, Op("thing", 0, 0)), out_axes=draw(st.sampled_from([0, -1])), give_size=True)
    return case, OutputTypeError


DAMAGES: list[Damage] = [
    other_size, rank_too_small, not_an_array, wrong_count, wrong_prefix, bad_in_axis, bad_out_axis, out_of_bounds, out_prefix,
    varying_output, wrong_axis_size, nothing_mapped, not_an_array_out,
]  # fmt: skip


@pytest.mark.parametrize("how", ["eager", "jit"], indirect=True)
@pytest.mark.parametrize("damage", DAMAGES)
def test_random_bad_calls_fail_alike(agree, how, damage):
    @how.examples(15)
    @given(data=st.data())
    def holds(data):
        good = data.draw(cases()).sound()
        agree.call(good.thunk)
        bad, error = damage(data.draw, good)
        agree.call(bad.thunk, error)

    holds()
