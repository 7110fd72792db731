"""The loop oracle against live JAX, and against plain statements of the rules."""

from __future__ import annotations

import functools
from collections import OrderedDict, defaultdict, namedtuple
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchbatch import grad, jvp, tree
from torchbatch.errors import (
    AxisError,
    AxisSpecError,
    InPlaceError,
    InputTypeError,
    OutputTypeError,
    RandomnessError,
    UnmappedOutputError,
)
from torchbatch.testing import assert_close, loop

jax = pytest.importorskip("jax")
jax.config.update("jax_platforms", "cpu")

Point = namedtuple("Point", "x y")


def numbers(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def is_numeric(leaf: Any) -> bool:
    return isinstance(leaf, np.ndarray) and leaf.dtype.kind != "U"


def to_torch(value: Any) -> Any:
    return jax.tree.map(lambda leaf: torch.from_numpy(leaf.copy()) if is_numeric(leaf) else leaf, value)


def assert_same(ours: Any, theirs: Any) -> None:
    leaves, treedef = jax.tree.flatten(ours)
    expected, expected_treedef = jax.tree.flatten(theirs)
    assert treedef == expected_treedef
    for leaf, other in zip(leaves, expected, strict=True):
        np.testing.assert_allclose(np.asarray(leaf), np.asarray(other), rtol=1e-5, atol=1e-6)


def assert_equals_jax(
    fun: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None, **options: Any
) -> Any:
    kwargs = kwargs or {}
    ours = loop(fun, **options)(*to_torch(args), **to_torch(kwargs))
    assert_same(ours, jax.vmap(fun, **options)(*args, **kwargs))
    return ours


# --- values and shapes -----------------------------------------------------------------------------------------------

X, Y = numbers(3, 4), numbers(4, 3)
VALUES = {
    "one axis for all": (lambda x, y: x * y, (X, X), {}),
    "an axis each": (lambda x, y: x * y, (X, Y), {"in_axes": (0, 1)}),
    "a list of axes": (lambda x, y: x * y, (X, Y), {"in_axes": [0, 1]}),
    "negative axes": (lambda x, y: x * y, (X, Y), {"in_axes": (-2, -1), "out_axes": -1}),
    "unmapped": (lambda x, y: x * y, (X, Y[:, 0]), {"in_axes": (0, None)}),
    "out axis": (lambda x: (x, x.sum()), (X,), {"out_axes": (1, 0)}),
    "axis size": (lambda: 2.0, (), {"axis_size": 3}),
    "axis size and nothing mapped": (lambda x: x + 1, (X,), {"in_axes": None, "axis_size": 2}),
    "axis size zero": (lambda x: x + 1, (X,), {"in_axes": None, "axis_size": 0}),
    "empty batch": (lambda x: (x * 2, 1.0), (X[:0],), {"out_axes": (1, 0)}),
    "empty batch, inner axis": (lambda x: x.sum(), (X[:, :0],), {"in_axes": -1}),
    "dict prefix": (lambda d: d["a"] + d["b"], ({"b": X, "a": Y},), {"in_axes": ({"a": 1, "b": 0},)}),
    "one axis for a subtree": (lambda d, s: d["a"] + d["b"][0] * s, ({"b": [X], "a": X}, 2.0), {"in_axes": (0, None)}),
    "named tuple": (lambda p: Point(p.y, p.x), (Point(X, Y),), {"in_axes": (Point(0, 1),), "out_axes": Point(1, 0)}),
    "ordered dict": (lambda d: d, (OrderedDict(b=X, a=X),), {"in_axes": (OrderedDict(b=0, a=0),)}),
    "default dict": (lambda d: d, (defaultdict(int, b=X, a=X),), {}),
    "None argument": (lambda x, y: x, (X, None), {"in_axes": (0, 3)}),
    "None output": (lambda x: (x, None), (X,), {"out_axes": (0, 5)}),
    "constant output": (lambda x: (x, 7.0), (X,), {"out_axes": (0, None)}),
    "constant array": (lambda x: (x, np.ones(2)), (X,), {"out_axes": (0, None)}),
    "sum of what varies": (lambda x: (x, 3.0), (X,), {"out_axes": None, "sum_match": True}),
    "sum over a batch of one": (lambda x: (x, 3.0), (X[:1],), {"out_axes": None, "sum_match": True}),
    "sum over an empty batch": (lambda x: (x + 1, 3.0), (X[:0],), {"out_axes": None, "sum_match": True}),
    "nested": (
        lambda x, y: (
            loop(lambda a, b: a * b, in_axes=(None, 0))(x, y)
            if isinstance(x, torch.Tensor)
            else jax.vmap(lambda a, b: a * b, in_axes=(None, 0))(x, y)
        ),
        (X, X),
        {},
    ),
}


@pytest.mark.parametrize("name", VALUES)
def test_equals_jax(name: str) -> None:
    fun, args, options = VALUES[name]
    assert_equals_jax(fun, args, **options)


def test_keyword_arguments_are_mapped_over_axis_0() -> None:
    assert_equals_jax(lambda x, y: x * y["a"], (X,), {"y": {"a": Y}}, in_axes=(1,))
    assert_equals_jax(lambda x, y: x * y["a"], (X,), {"y": {"a": X}})
    assert_equals_jax(lambda *, y: y, (), {"y": X}, in_axes=None)
    assert_equals_jax(lambda y: y, (), {"y": X}, in_axes=())


class Covered(NamedTuple):
    """A tree of shapes under one axis."""

    shapes: Any
    axis: int | None


shapes = st.lists(st.integers(0, 3), max_size=2).map(np.array)


def trees(leaf: Any) -> Any:
    keys = st.sampled_from(["a", "b", "c"])
    return st.recursive(
        leaf,
        lambda inner: st.one_of(
            st.lists(inner, max_size=2),
            st.lists(inner, max_size=2).map(tuple),
            st.dictionaries(keys, inner, max_size=2),
            st.tuples(inner, inner).map(lambda pair: Point(*pair)),
        ),
        max_leaves=4,
    )


covered = st.builds(Covered, trees(shapes), st.sampled_from([None, 0, -1]))
is_covered = functools.partial(jax.tree.map, is_leaf=lambda x: isinstance(x, Covered))


def array_for(piece: Covered, size: int) -> Any:
    def make(shape: np.ndarray) -> np.ndarray:
        full = [int(n) for n in shape]
        if piece.axis is not None:
            full.insert(len(full) if piece.axis == -1 else 0, size)
        return numbers(*full)

    return jax.tree.map(make, piece.shapes)


@settings(derandomize=True, deadline=None, max_examples=60)
@given(st.lists(trees(covered), max_size=3), st.integers(0, 3), st.sampled_from([0, -1]))
def test_random_trees_and_prefixes_equal_jax(arguments: list[Any], size: int, out_axis: int) -> None:
    args = tuple(is_covered(lambda piece: array_for(piece, size), argument) for argument in arguments)
    in_axes = tuple(is_covered(lambda piece: piece.axis, argument) for argument in arguments)
    out_axes = is_covered(lambda piece: None if piece.axis is None else out_axis, tuple(arguments))
    assert_equals_jax(
        lambda *xs: jax.tree.map(lambda x: x * 2, xs), args, in_axes=in_axes, axis_size=size, out_axes=out_axes
    )
    assert_equals_jax(lambda *xs: (xs, 1.0), args, in_axes=in_axes, axis_size=size, out_axes=out_axis)


def test_unmapped_values_arrive_untouched() -> None:
    config, text = {"scale": object()}, "text"
    seen: list[Any] = []
    loop(lambda x, c, t: seen.extend((c, t)), in_axes=(0, None, None))(torch.ones(1), config, text)
    assert seen[0] is config
    assert seen[1] is text


def test_inside_other_transforms() -> None:
    x, w = torch.randn(2, 3), torch.randn(4)

    def row(a: torch.Tensor) -> torch.Tensor:
        return loop(lambda a, b: a.sin() * b, in_axes=(None, 0))(a, w)

    expected = x.sin()[:, None, :] * w[:, None]
    assert_close(torch.func.vmap(row)(x), expected)
    assert_close(loop(row)(x), expected)
    assert_close(torch.func.grad(lambda a: row(a).sum())(x), x.cos() * w.sum())
    assert_close(loop(torch.func.grad(lambda a: row(a).sum()))(x), x.cos() * w.sum())


def test_modules_are_unmapped_leaves() -> None:
    module = torch.nn.Linear(4, 2)
    x = torch.ones(3, 4)
    assert_close(loop(lambda m, v: m(v))(module, x), module(x))


def test_registered_classes_are_nodes() -> None:
    class Pair:
        def __init__(self, a: Any, b: Any) -> None:
            self.a, self.b = a, b

    tree.register_node(Pair, lambda p: ((p.a, p.b), None), lambda _, children: Pair(*children))
    out = loop(lambda p: Pair(p.b, p.a), in_axes=(Pair(0, None),), out_axes=Pair(None, 1))(Pair(torch.ones(2, 3), 5.0))
    assert out.a == 5.0
    assert out.b.shape == (3, 2)
    best = loop(lambda x: x.max(0))(torch.tensor([[1.0, 2.0], [4.0, 3.0]]))
    assert type(best) is torch.return_types.max
    assert best.indices.tolist() == [1, 0]


@pytest.mark.parametrize(
    "array", [np.arange(6.0).reshape(2, 3), np.arange(6.0).reshape(2, 3)[::-1], np.arange(6, dtype=">i4").reshape(2, 3)]
)
def test_numpy_arrays_become_tensors(array: np.ndarray) -> None:
    out = loop(lambda x: x + 0)(array)
    assert out.tolist() == array.tolist()


def test_anything_with_array_is_an_array() -> None:
    class Boxed:
        def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
            return np.arange(3)

    assert loop(lambda x: x + 1)(Boxed()).tolist() == [1, 2, 3]
    assert loop(lambda x: x + 1)(jax.numpy.arange(3)).tolist() == [1, 2, 3]


def test_numbers_become_tensors() -> None:
    out = loop(lambda x: (1, 2.0, True, np.float64(3), np.arange(2)))(torch.ones(2))
    assert [leaf.dtype for leaf in out] == [torch.int64, torch.float32, torch.bool, torch.float64, torch.int64]
    assert out[4].tolist() == [[0, 1], [0, 1]]


def test_keeps_name_and_signature() -> None:
    def scale(x: torch.Tensor) -> torch.Tensor:
        """Twice."""
        return 2 * x

    assert loop(scale).__name__ == "scale"
    assert loop(scale).__doc__ == "Twice."
    assert loop(scale).__wrapped__ is scale
    assert loop(functools.partial(torch.add, 1))(torch.ones(2)).tolist() == [2, 2]


def test_gradients_flow() -> None:
    x = torch.ones(3, 2, requires_grad=True)
    loop(lambda row: (row**2).sum())(x).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [[2, 2]] * 3
    empty = torch.ones(0, 2, requires_grad=True)
    assert loop(lambda row: row.sum())(empty).requires_grad


def test_objects_are_handed_back_where_out_axes_is_none() -> None:
    thing = object()
    out = loop(lambda x: (x, thing, "text"), out_axes=(0, None, None))(torch.ones(2))
    assert out[1] is thing
    assert out[2] == "text"


# --- errors ----------------------------------------------------------------------------------------------------------

T = torch.ones(2, 3)
identity = lambda x: x  # noqa: E731
second = lambda x, y: x  # noqa: E731
ERRORS = {
    "in_axes True": (
        AxisSpecError,
        "in_axes must be an int, None, or a tuple or list",
        identity,
        (X,),
        {"in_axes": True},
    ),
    "in_axes float": (AxisSpecError, "it is 1.0 of type float", identity, (X,), {"in_axes": 1.0}),
    "in_axes string": (AxisSpecError, "of type str", identity, (X,), {"in_axes": "a"}),
    "in_axes set": (AxisSpecError, "of type set", identity, (X,), {"in_axes": {0}}),
    "in_axes dict": (AxisSpecError, "of type dict", identity, (X,), {"in_axes": {"x": 0}}),
    "in_axes named tuple": (AxisSpecError, "of type Point", second, (X, X), {"in_axes": Point(0, 0)}),
    "in_axes NumPy int": (AxisSpecError, "of type int64", identity, (X,), {"in_axes": np.int64(0)}),
    "in_axes leaf": (AxisSpecError, "holds True of type bool", identity, (X,), {"in_axes": (True,)}),
    "out_axes True": (AxisSpecError, "out_axes must be .* holds True", identity, (X,), {"out_axes": True}),
    "out_axes leaf": (AxisSpecError, "out_axes must be .* holds 'a'", identity, (X,), {"out_axes": (0, "a")}),
    "not a function": (AxisSpecError, "needs a function, but it got 3", 3, (X,), {}),
    "axis_size float": (AxisSpecError, "axis_size must be an int", identity, (X,), {"axis_size": 2.5, "in_axes": None}),
    "axis_size negative": (AxisError, "axis_size must be at least 0, but it is -1", lambda: 1.0, (), {"axis_size": -1}),
    "axis_size disagrees": (AxisError, "axis 0 of x has 3, axis_size has 5", identity, (X,), {"axis_size": 5}),
    "entries": (AxisError, "in_axes has 2 entries for 1 positional arguments", identity, (X,), {"in_axes": (0, 0)}),
    "no entries": (AxisError, "in_axes has 0 entries", identity, (X,), {"in_axes": ()}),
    "prefix": (
        AxisError,
        "at x it has a dict with .'a'., but the value there is a leaf",
        identity,
        (X,),
        {"in_axes": ({"a": 0},)},
    ),
    "prefix length": (
        AxisError,
        "at x it has a list with .0., but the value there is a list with .0., .1.",
        identity,
        ([X, X],),
        {"in_axes": ([0],)},
    ),
    "prefix kind": (AxisError, "has a tuple with", identity, ([X],), {"in_axes": ((0,),)}),
    "prefix dictionary kind": (AxisError, "is a OrderedDict", identity, (OrderedDict(a=X),), {"in_axes": ({"a": 0},)}),
    "prefix of None": (AxisError, "is a NoneType with nothing in it", second, (X, None), {"in_axes": (0, (0,))}),
    "rank": (AxisError, "argument x is mapped over axis 2, but it has 2 dimensions", identity, (X,), {"in_axes": 2}),
    "negative rank": (AxisError, "mapped over axis -3", identity, (X,), {"in_axes": -3}),
    "number mapped": (AxisError, "argument y is mapped over axis 0, but it has 0 dimensions", second, (X, 1.0), {}),
    "sizes": (AxisError, "axis 0 of x has 3, axis 0 of y has 4", second, (X, Y), {}),
    "nothing mapped": (AxisError, "nothing is mapped", identity, (X,), {"in_axes": None}),
    "no arguments": (AxisError, "nothing is mapped", lambda: 1.0, (), {}),
    "None only": (AxisError, "nothing is mapped", identity, (None,), {}),
    "string mapped": (
        InputTypeError,
        r"argument y\['k'\] is mapped over axis 0, but 'a' of type str",
        second,
        (X, {"k": "a"}),
        {},
    ),
    "object mapped": (InputTypeError, "of type object is not an array", second, (X, object()), {}),
    "array of strings": (InputTypeError, "of type ndarray is not an array", second, (X, np.array(["a"] * 3)), {}),
    "out_axes prefix": (AxisError, "out_axes must be a tree prefix", lambda x: (x, x), (X,), {"out_axes": [0, 0]}),
    "out_axes range": (
        AxisError,
        "out_axes is 2 for the output, which has 2 dimensions",
        identity,
        (X,),
        {"out_axes": 2},
    ),
    "out_axes negative": (AxisError, "out_axes is -3", identity, (X,), {"out_axes": -3}),
    "string output": (
        OutputTypeError,
        r"the output\[1\] is 'a' of type str, which is not an array",
        lambda x: (x, "a"),
        (X,),
        {},
    ),
    "varies": (UnmappedOutputError, "the output differs between samples", identity, (X,), {"out_axes": None}),
    "varies, batch of one": (UnmappedOutputError, "differs", identity, (X[:1],), {"out_axes": None}),
    "varies, empty batch": (UnmappedOutputError, "differs", identity, (X[:0],), {"out_axes": None}),
}


@pytest.mark.parametrize("name", ERRORS)
def test_raises_the_class_of_jax(name: str) -> None:
    cls, text, fun, args, options = ERRORS[name]
    with pytest.raises(cls, match=text):
        loop(fun, **options)(*to_torch(args))
    theirs = (
        TypeError if name == "axis_size negative" else next(c for c in (TypeError, ValueError) if issubclass(cls, c))
    )
    with pytest.raises(theirs):
        jax.vmap(fun, **options)(*args)


@pytest.mark.parametrize(
    ("cls", "options", "text"),
    [
        (AxisSpecError, {"in_dims": 0}, "no option 'in_dims'; write in_axes="),
        (AxisSpecError, {"out_dims": 0}, "no option 'out_dims'; write out_axes="),
        (AxisSpecError, {"axes": 0}, "no option 'axes'."),
        (AxisSpecError, {"chunk_size": 1.5}, "chunk_size must be an int or None, but it is 1.5"),
        (AxisSpecError, {"axis_size": True}, "axis_size must be an int or None, but it is True"),
        (AxisError, {"chunk_size": 0}, "chunk_size must be at least 1, but it is 0"),
        (AxisError, {"randomness": "maybe"}, "randomness must be 'error', 'different' or 'same', but it is 'maybe'"),
    ],
)
def test_bad_options(cls: type[Exception], options: dict[str, Any], text: str) -> None:
    with pytest.raises(cls, match=text):
        loop(identity, **options)


def test_samples_that_do_not_stack() -> None:
    with pytest.raises(AxisError, match="different shapes for different samples"):
        loop(lambda x: torch.ones(int(x)))(torch.tensor([1, 2]))
    with pytest.raises(AxisError, match="trees of different structure"):
        loop(lambda x: [x] * int(x))(torch.tensor([1, 2]))
    with pytest.raises(OutputTypeError, match="which is not an array"):
        loop(lambda x: object(), out_axes=None)(torch.ones(2))


def test_a_batch_of_one_is_judged_by_other_numbers_of_floating_arguments() -> None:
    index, table = torch.tensor([1]), torch.arange(3)
    assert loop(lambda i, t: t[i], in_axes=(0, None), out_axes=None)(index, table).item() == 1
    with pytest.raises(UnmappedOutputError):
        loop(lambda x: x + 1, out_axes=None)(torch.zeros(1))
    with pytest.raises(UnmappedOutputError):
        loop(lambda x: x.to(torch.int8 if x == 1 else torch.int16), out_axes=None)(torch.tensor([1.0, 2.0]))


# --- writing in place ------------------------------------------------------------------------------------------------


def test_writes_to_a_mapped_argument_reach_the_caller() -> None:
    x, array = torch.zeros(2, 3), np.zeros((3, 2))
    loop(lambda a, b: (a.add_(1), b.add_(2)), in_axes=(0, 1))(x, array)
    assert x.tolist() == [[1, 1, 1]] * 2
    assert array.tolist() == [[2, 2]] * 3


def test_different_writes_to_a_shared_tensor_are_an_error_and_undone() -> None:
    shared = torch.zeros(3)
    with pytest.raises(InPlaceError, match=r"different values into y\['total'\], which is not mapped"):
        loop(lambda x, y: y["total"].add_(x), in_axes=(0, None))(torch.tensor([1.0, 2.0]), {"total": shared})
    assert shared.tolist() == [0, 0, 0]


def test_equal_writes_to_a_shared_tensor_count_once() -> None:
    shared = torch.zeros(3)
    out = loop(lambda x, y: y.add_(1) * x, in_axes=(0, None))(torch.tensor([1.0, 2.0]), shared)
    assert shared.tolist() == [1, 1, 1]
    assert out.tolist() == [[1, 1, 1], [2, 2, 2]]


def test_writes_into_the_buffers_of_a_module_are_seen() -> None:
    norm = torch.nn.BatchNorm1d(2)
    before = norm.running_mean.clone()
    with pytest.raises(InPlaceError, match=r"into norm\.running_mean"):
        loop(lambda x, norm: norm(x), in_axes=(0, None))(torch.randn(3, 4, 2), norm)
    assert_close(norm.running_mean, before)


def test_shared_tensors_are_restored_after_an_exception_and_under_inference_mode() -> None:
    with torch.inference_mode():
        shared = torch.zeros(2)

    def broken(x: torch.Tensor, y: torch.Tensor) -> None:
        with torch.inference_mode():
            y.add_(1)
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"), torch.inference_mode():
        loop(broken, in_axes=(0, None))(torch.ones(2), shared)
    assert shared.tolist() == [0, 0]


@pytest.mark.parametrize("size", [0, 1, 3])
def test_derivatives_where_out_axes_is_none(size: int) -> None:
    def both(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return loop(lambda x, y: (x * y, y * y), in_axes=(0, None), out_axes=(0, None))(x, y)

    x, y = torch.ones(size, 2), torch.tensor([3.0, 4.0])
    _, tangents = jvp(both, (x, y), (x, y))
    assert_close(tangents, (2 * y.expand(size, 2), 2 * y * y))
    gradient = grad(lambda x, y: sum(part.sum() for part in both(x, y)), argnums=(0, 1))
    assert_close(gradient(x, y), (y.expand(size, 2), size + 2 * y))


@pytest.mark.parametrize("size", [0, 1, 3])
def test_a_look_aside_leaves_gradients_alone(size: int) -> None:
    asked = []

    def ask(x: torch.Tensor) -> tuple[torch.Tensor, float]:
        asked.append(x.requires_grad)
        return x.exp(), 1.0

    x = torch.ones(size, 2, requires_grad=True)
    loop(ask, out_axes=(0, None))(x)[0].sum().backward()
    assert_close(x.grad, x.detach().exp())
    assert all(asked)


# --- random numbers --------------------------------------------------------------------------------------------------


def noisy(x: torch.Tensor) -> torch.Tensor:
    return x + torch.rand(())


@pytest.mark.parametrize("size", [0, 2])
def test_randomness_error(size: int) -> None:
    with pytest.raises(RandomnessError, match="drew random numbers, but randomness is 'error'"):
        loop(noisy)(torch.zeros(size))


def test_randomness_same_and_different() -> None:
    x = torch.zeros(4)
    assert len(set(loop(noisy, randomness="different")(x).tolist())) == 4
    torch.manual_seed(0)
    first = torch.rand(())
    then = torch.rand(())
    torch.manual_seed(0)
    assert set(loop(noisy, randomness="same")(x).tolist()) == {first.item()}
    assert torch.rand(()) == then


@pytest.mark.parametrize("size", [0, 1, 3])
def test_random_outputs_vary_unless_the_same(size: int) -> None:
    def draw(x: torch.Tensor) -> torch.Tensor:
        return torch.rand(2)

    assert loop(draw, out_axes=None, randomness="same")(torch.zeros(size)).shape == (2,)
    with pytest.raises(UnmappedOutputError):
        loop(draw, out_axes=None, randomness="different")(torch.zeros(size))


def test_looking_aside_leaves_the_generator_alone() -> None:
    torch.manual_seed(0)
    torch.rand(())
    after_one = torch.get_rng_state()
    torch.manual_seed(0)
    loop(lambda x: (noisy(x), 1.0), out_axes=(0, None), randomness="different")(torch.zeros(1))
    assert torch.equal(torch.get_rng_state(), after_one)
