"""Every message about axes, inputs, outputs and options, word for word."""

from __future__ import annotations

import functools
from collections import OrderedDict, defaultdict, namedtuple
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from torchbatch import tree, vmap
from torchbatch.errors import AxisError, AxisSpecError, EscapedValueError, InputTypeError, OutputTypeError, UnmappedOutputError

X, Y = torch.zeros(3, 4), torch.zeros(4, 3)
Point = namedtuple("Point", "x y")


@dataclass
class Tagged:
    value: Any
    tag: str = "a"


tree.register_dataclass(Tagged, meta_fields=("tag",))


def multiply(x, y):
    return x * y


def loss(weights, batch):
    return 1.0


def many(x, *rest, **options):
    return x


def positional(x, /, **options):
    return x


class Long:
    def __repr__(self):
        return "<" + "long\n" * 100 + ">"


THE_SPEC = "in_axes must be an int, None, or a tuple or list with one entry per positional argument, but it is "
A_LEAF = "must be an int, None, or a tree with ints and None as leaves, but it holds "
OPTIONS = "in_axes, out_axes, axis_name, axis_size, spmd_axis_name, sum_match, randomness, chunk_size"
LONG = "<" + " ".join(["long"] * 20)[:98] + "…"

# --- when vmap is applied --------------------------------------------------------------------------------------------

APPLIED = {
    "a bool as in_axes": ({"in_axes": True}, AxisSpecError, THE_SPEC + "True of type bool."),
    "a string as in_axes": ({"in_axes": "0"}, AxisSpecError, THE_SPEC + "'0' of type str."),
    "a dict as in_axes": ({"in_axes": {"x": 0}}, AxisSpecError, THE_SPEC + "{'x': 0} of type dict."),
    "a named tuple as in_axes": ({"in_axes": Point(0, 0)}, AxisSpecError, THE_SPEC + "Point(x=0, y=0) of type Point."),
    "a NumPy integer as in_axes": (
        {"in_axes": np.int64(0)}, AxisSpecError, THE_SPEC + f"{np.int64(0)!r} of type int64 and dtype int64.",
    ),
    "something long as in_axes": ({"in_axes": Long()}, AxisSpecError, THE_SPEC + f"{LONG} of type Long."),
    "a leaf of in_axes": ({"in_axes": (0, {"a": 0.5})}, AxisSpecError, f"in_axes[1] {A_LEAF}0.5 of type float."),
    "a tensor in in_axes": (
        {"in_axes": [torch.tensor(0)]}, AxisSpecError, f"in_axes[0] {A_LEAF}tensor(0) of type Tensor and dtype torch.int64.",
    ),
    "a leaf of out_axes": ({"out_axes": (0, "1")}, AxisSpecError, f"out_axes {A_LEAF}'1' of type str."),
    "a bool as out_axes": ({"out_axes": False}, AxisSpecError, f"out_axes {A_LEAF}False of type bool."),
    "in_dims": ({"in_dims": 0}, AxisSpecError, "vmap has no option 'in_dims': it is spelled in_axes= here, as in JAX."),
    "out_dims": ({"out_dims": 0}, AxisSpecError, "vmap has no option 'out_dims': it is spelled out_axes= here, as in JAX."),
    "unknown": ({"axes": 0}, AxisSpecError, f"vmap has no option 'axes'; it has {OPTIONS}."),
    "axis_name": ({"axis_name": ["i"]}, AxisSpecError, "axis_name must be hashable, but it is ['i'] of type list."),
    "axis_size": ({"axis_size": 2.0}, AxisSpecError, "axis_size must be an int or None, but it is 2.0 of type float."),
    "negative axis_size": ({"axis_size": -1}, AxisError, "axis_size must be at least 0, but it is -1."),
    "chunk_size": ({"chunk_size": True}, AxisSpecError, "chunk_size must be an int or None, but it is True of type bool."),
    "chunk_size of 0": ({"chunk_size": 0}, AxisError, "chunk_size must be at least 1, but it is 0."),
    "randomness": (
        {"randomness": "some"}, AxisError, "randomness must be 'error', 'different' or 'same', but it is 'some' of type str.",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", APPLIED)
def test_when_vmap_is_applied(name):
    options, kind, text = APPLIED[name]
    with pytest.raises(kind) as caught:
        vmap(multiply, **options)
    assert str(caught.value) == text


@pytest.mark.parametrize(("fun", "shown"), [(3, "3 of type int"), (None, "None of type NoneType"), ("f", "'f' of type str")])
def test_what_is_no_function(fun, shown):
    with pytest.raises(AxisSpecError) as caught:
        vmap(fun)
    assert str(caught.value) == f"vmap maps a function, but it got {shown}, which is not callable."


# --- arguments -------------------------------------------------------------------------------------------------------

NOT_AN_ARRAY = (
    " is not an array of numbers that PyTorch can hold. Pass a tensor or a NumPy array, or give None for it in in_axes so that "
    "it reaches the function as it is."
)
RUN_OVER = ". Axes run over [-ndim, ndim); give None in in_axes for what is not mapped."
NOTHING = (
    "vmap has nothing to map: give it at least one argument that is an array with an axis in in_axes that is not None, or say "
    "how many samples there are with axis_size=."
)
SIZES = "vmap got axes of different sizes to map over:\n"
SHARE = ".\nMap axes of one size, or give None in in_axes for what all samples share."
STRUCTURE = ". Give the same structure, or one int or None for the whole subtree."


def entry_for(prefix, batch):
    return lambda: vmap(loss, in_axes=(0, prefix))(X, batch)


CALLED = {
    "too few entries": (
        lambda: vmap(multiply, in_axes=(0,))(X, X), AxisError,
        "in_axes must have one entry per positional argument: it has 1, but the function was called with 2 positional arguments.",
    ),
    "too many entries": (
        lambda: vmap(multiply, in_axes=[0, 1])(X), AxisError,
        "in_axes must have one entry per positional argument: it has 2, but the function was called with 1 positional argument.",
    ),
    "no array, in a tree": (
        lambda: vmap(loss)(X, {"mode": "sum"}), InputTypeError,
        "argument batch['mode'] is to be mapped over axis 0, but 'sum' of type str" + NOT_AN_ARRAY,
    ),
    "no array, a keyword": (
        lambda: vmap(many)(X, mode="sum"), InputTypeError,
        "argument options['mode'] is to be mapped over axis 0, but 'sum' of type str" + NOT_AN_ARRAY,
    ),
    "no array, among *rest": (
        lambda: vmap(many, in_axes=-1)(X, X, "sum"), InputTypeError,
        "argument rest[1] is to be mapped over axis -1, but 'sum' of type str" + NOT_AN_ARRAY,
    ),
    "no array, long": (
        lambda: vmap(multiply)(X, Long()), InputTypeError,
        f"argument y is to be mapped over axis 0, but {LONG} of type Long" + NOT_AN_ARRAY,
    ),
    "an array of strings": (
        lambda: vmap(multiply)(X, np.array(["a"])), InputTypeError,
        "argument y is to be mapped over axis 0, but array(['a'], dtype='<U1') of type ndarray and dtype <U1" + NOT_AN_ARRAY,
    ),
    "an unregistered class": (
        lambda: vmap(multiply)(X, Point), InputTypeError,
        "argument y is to be mapped over axis 0, but <class 'test_messages.Point'> of type type" + NOT_AN_ARRAY,
    ),
    "rank too small": (
        lambda: vmap(multiply, in_axes=(0, 2))(X, X), AxisError,
        "argument y is to be mapped over axis 2, which needs at least 3 dimensions, but it is float32[3,4] with 2" + RUN_OVER,
    ),
    "rank too small, from the end": (
        lambda: vmap(multiply, in_axes=(0, -3))(X, X), AxisError,
        "argument y is to be mapped over axis -3, which needs at least 3 dimensions, but it is float32[3,4] with 2" + RUN_OVER,
    ),
    "a scalar": (
        lambda: vmap(multiply)(X, torch.tensor(True)), AxisError,
        "argument y is to be mapped over axis 0, which needs at least 1 dimension, but it is bool[] with 0" + RUN_OVER,
    ),
    "a Python number": (
        lambda: vmap(loss)({"w": X}, [X, 0.1]), AxisError,
        "argument batch[1] is to be mapped over axis 0, which needs at least 1 dimension, but it is float32[] with 0" + RUN_OVER,
    ),
    "nothing mapped": (lambda: vmap(multiply, in_axes=None)(X, X), AxisError, NOTHING),
    "no arguments": (lambda: vmap(lambda: 1)(), AxisError, NOTHING),
    "two sizes": (
        lambda: vmap(multiply)(X, Y), AxisError,
        SIZES + "  * one axis had size 3: axis 0 of argument x, float32[3,4];\n"
        "  * one axis had size 4: axis 0 of argument y, float32[4,3]" + SHARE,
    ),
    "an outlier": (
        lambda: vmap(loss, in_axes=(0, {"x": 0, "y": 1}))({"w": X, "b": [X]}, {"x": X, "y": X.double()}), AxisError,
        SIZES + "  * most axes (3 of them) had size 3, e.g. axis 0 of argument weights['b'][0], float32[3,4];\n"
        "  * one axis had size 4: axis 1 of argument batch['y'], float64[3,4]" + SHARE,
    ),
    "two outliers": (
        lambda: vmap(many)([X, X, X], X[:2], k=X[:2], j=X[:1]), AxisError,
        SIZES + "  * most axes (3 of them) had size 3, e.g. axis 0 of argument x[0], float32[3,4];\n"
        "  * some axes (2 of them) had size 2, e.g. axis 0 of argument rest[0], float32[2,4];\n"
        "  * one axis had size 1: axis 0 of argument options['j'], float32[1,4]" + SHARE,
    ),
    "two against two": (
        lambda: vmap(loss, in_axes=-1)([Y, Y], (X, X)), AxisError,
        SIZES + "  * some axes (2 of them) had size 3, e.g. axis 1 of argument weights[0], float32[4,3];\n"
        "  * some axes (2 of them) had size 4, e.g. axis 1 of argument batch[0], float32[3,4]" + SHARE,
    ),
    "against axis_size": (
        lambda: vmap(multiply, axis_size=5)(X, X), AxisError,
        SIZES + "  * the argument axis_size was 5;\n"
        "  * some axes (2 of them) had size 3, e.g. axis 0 of argument x, float32[3,4]" + SHARE,
    ),
    "sizes of keywords and of a module's neighbour": (
        lambda: vmap(many)(torch.nn.ReLU(), X, scale=Y), AxisError,
        SIZES + "  * one axis had size 3: axis 0 of argument rest[0], float32[3,4];\n"
        "  * one axis had size 4: axis 0 of argument options['scale'], float32[4,3]" + SHARE,
    ),
    "a keyword named as a positional-only parameter": (
        lambda: vmap(positional)(X, x=Y), AxisError,
        SIZES + "  * one axis had size 3: axis 0 of argument x, float32[3,4];\n"
        "  * one axis had size 4: axis 0 of argument options['x'], float32[4,3]" + SHARE,
    ),
    "sizes under a prefix": (
        lambda: vmap(multiply, in_axes=(Point(0, None), {"a": 0, "b": None}))(Point(X, 1), {"a": (Y,), "b": "c"}), AxisError,
        SIZES + "  * one axis had size 3: axis 0 of argument x.x, float32[3,4];\n"
        "  * one axis had size 4: axis 0 of argument y['a'][0], float32[4,3]" + SHARE,
    ),
    "names of a partial": (
        lambda: vmap(functools.partial(multiply, X))(Point(X, Y)), AxisError,
        SIZES + "  * one axis had size 3: axis 0 of argument y.x, float32[3,4];\n"
        "  * one axis had size 4: axis 0 of argument y.y, float32[4,3]" + SHARE,
    ),
    "names of a built-in function": (
        lambda: vmap(torch.add)(X, Y), AxisError,
        SIZES + "  * one axis had size 3: axis 0 of argument args[0], float32[3,4];\n"
        "  * one axis had size 4: axis 0 of argument args[1], float32[4,3]" + SHARE,
    ),
    "names of a keyword of a built-in function": (
        lambda: vmap(torch.add)(X, other=Y), AxisError,
        SIZES + "  * one axis had size 3: axis 0 of argument args[0], float32[3,4];\n"
        "  * one axis had size 4: axis 0 of argument other, float32[4,3]" + SHARE,
    ),
    "more arguments than parameters": (
        lambda: vmap(lambda x: x)(X, Y), AxisError,
        SIZES + "  * one axis had size 3: axis 0 of argument x, float32[3,4];\n"
        "  * one axis had size 4: axis 0 of argument args[0], float32[4,3]" + SHARE,
    ),
    "a prefix of another length": (
        entry_for([0, 0], [X]), AxisError,
        "in_axes[1] must be a tree prefix of argument batch: at argument batch it has a list of length 2, but the value there "
        "is a list of length 1" + STRUCTURE,
    ),
    "a prefix with other keys": (
        entry_for({"x": 0}, {"x": X, "y": X}), AxisError,
        "in_axes[1] must be a tree prefix of argument batch: at argument batch it has a dict with keys ['x'], but the value "
        "there is a dict with keys ['x', 'y']" + STRUCTURE,
    ),
    "a prefix deeper than the argument": (
        entry_for({"x": [0]}, {"x": X}), AxisError,
        "in_axes[1] must be a tree prefix of argument batch: at argument batch['x'] it has a list of length 1, but the value "
        "there is a leaf of type Tensor" + STRUCTURE,
    ),
    "a prefix of another type": (
        entry_for([{"a": Point(0, 0)}], [{"a": (X, X)}]), AxisError,
        "in_axes[1] must be a tree prefix of argument batch: at argument batch[0]['a'] it has a Point with 2 children, but "
        "the value there is a tuple of length 2" + STRUCTURE,
    ),
    "a prefix for None": (
        entry_for((0,), None), AxisError,
        "in_axes[1] must be a tree prefix of argument batch: at argument batch it has a tuple of length 1, but the value there "
        "is None (an empty tree)" + STRUCTURE,
    ),
    "a prefix in another order": (
        entry_for(OrderedDict(a=0, b=0), OrderedDict(b=X, a=X)), AxisError,
        "in_axes[1] must be a tree prefix of argument batch: at argument batch it has an OrderedDict with keys ['a', 'b'], but "
        "the value there is an OrderedDict with keys ['b', 'a']" + STRUCTURE,
    ),
    "a prefix with other metadata": (
        entry_for((Tagged(0, "b"),), (Tagged(X, "a"),)), AxisError,
        "in_axes[1] must be a tree prefix of argument batch: at argument batch[0] it has a Tagged with 1 child and metadata "
        "('b',), but the value there is a Tagged with 1 child and metadata ('a',)" + STRUCTURE,
    ),
    "a prefix with another factory": (
        entry_for(defaultdict(int, a=0), defaultdict(list, a=X)), AxisError,
        "in_axes[1] must be a tree prefix of argument batch: at argument batch it has a defaultdict with keys ['a'] and metadata "
        "(<class 'int'>, ['a']), but the value there is a defaultdict with keys ['a'] and metadata (<class 'list'>, ['a'])"
        + STRUCTURE,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLED)
def test_arguments_that_do_not_fit(name):
    call, kind, text = CALLED[name]
    with pytest.raises(kind) as caught:
        call()
    assert str(caught.value).replace(f"{__name__}.", "test_messages.") == text


def test_an_argument_that_escaped():
    kept = []
    vmap(lambda x: (kept.append(x * 2), x)[1])(X)
    with pytest.raises(EscapedValueError) as caught:
        vmap(loss)(X, {"a": kept[0]})
    text = "argument batch['a'] is a per-sample value that escaped from a vmap that has finished."
    assert str(caught.value) == text


# --- outputs ---------------------------------------------------------------------------------------------------------

NO_ARRAY_OUT = (
    ", which is not an array of numbers that PyTorch can hold. Return tensors, arrays and numbers only, or give None for it in "
    "out_axes if it is the same for all samples."
)
INT_OR_REDUCE = "Give it an int in out_axes, or reduce it over the samples first."


def returns(output, out_axes=0):
    def fun(x):
        return output(x)

    return lambda: vmap(fun, out_axes=out_axes)(X)


RETURNED = {
    "out of bounds": (
        returns(lambda x: x, 2), AxisError,
        "out_axes is 2 for the output of fun, but with the mapped axis it has 2 dimensions (one sample is float32[4]): axes run "
        "over [-2, 2).",
    ),
    "a scalar out of bounds": (
        returns(lambda x: {"a": [x.sum()]}, -2), AxisError,
        "out_axes is -2 for the output of fun at ['a'][0], but with the mapped axis it has 1 dimension (one sample is "
        "float32[]): axes run over [-1, 1).",
    ),
    "no prefix": (
        returns(lambda x: x, (0, 0)), AxisError,
        "out_axes of fun must be a tree prefix of the output: at the output it has a tuple of length 2, but the value there is a "
        "leaf of type Tensor" + STRUCTURE,
    ),
    "no prefix further in": (
        returns(lambda x: (x, {"a": x}), (0, {"b": 0})), AxisError,
        "out_axes of fun must be a tree prefix of the output: at the output[1] it has a dict with keys ['b'], but the value "
        "there is a dict with keys ['a']" + STRUCTURE,
    ),
    "an object": (returns(lambda x: "text"), OutputTypeError, "the output of fun is 'text' of type str" + NO_ARRAY_OUT),
    "an object further in": (
        returns(lambda x: {"a": Point(x, {1, 2})}), OutputTypeError,
        "the output of fun at ['a'].y is {1, 2} of type set" + NO_ARRAY_OUT,
    ),
    "a large number": (
        returns(lambda x: 2**64), OutputTypeError, "the output of fun is 18446744073709551616 of type int" + NO_ARRAY_OUT,
    ),
    "varies": (
        returns(lambda x: x, None), UnmappedOutputError,
        "the output of fun varies along the mapped axis (each sample has its own float32[4]), but out_axes is None for it. "
        + INT_OR_REDUCE,
    ),
    "varies further in": (
        returns(lambda x: (x, {"n": (x > 0).sum()}), (0, None)), UnmappedOutputError,
        "the output of fun at [1]['n'] varies along the mapped axis (each sample has its own int64[]), but out_axes is None for "
        "it. " + INT_OR_REDUCE,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", RETURNED)
def test_outputs_that_do_not_fit(name):
    call, kind, text = RETURNED[name]
    with pytest.raises(kind) as caught:
        call()
    assert str(caught.value) == text


def test_a_function_without_a_name():
    with pytest.raises(OutputTypeError) as caught:
        vmap(Nameless())(X)
    assert str(caught.value) == "the output of Nameless is 'text' of type str" + NO_ARRAY_OUT


class Nameless:
    def __call__(self, x):
        return "text"


# --- inside another map ----------------------------------------------------------------------------------------------


def test_an_inner_map_speaks_of_one_sample():
    with pytest.raises(AxisError) as caught:
        vmap(lambda x: vmap(multiply, in_axes=(0, 1))(x, x))(X)
    text = "argument y is to be mapped over axis 1, which needs at least 2 dimensions, but it is float32[4] with 1" + RUN_OVER
    assert str(caught.value) == text
