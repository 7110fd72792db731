"""A call as a program of its own: it runs alone, and rebuilds its inputs to the last bit."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import io
import math
import subprocess
import sys
from collections import OrderedDict, defaultdict
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import torchbatch
from torchbatch import tree
from torchbatch.errors import AxisSpecError, InputTypeError
from torchbatch.testing import loop
from torchbatch.testing.literals import Writer
from torchbatch.testing.reproducer import reproducer
from torchbatch.testing.strategies import Record, arrays, batched_calls, programs, pytrees, tensors

few = settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow])
SCALE = 2.0
WEIGHTS = torch.tensor([1.0, 2.0, 3.0])


def run(text, **supplied):
    """Run a program; the names that it leaves, and under ``printed`` what it prints."""
    names: dict[str, Any] = {"__name__": "__main__", **supplied}
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(text, "<program>", "exec"), names)
    return {**names, "printed": printed.getvalue()}


def rebuilt(value):
    """A value, written and read again."""
    writer = Writer()
    text = writer.value(value)
    names: dict[str, Any] = {}
    exec("\n".join([*writer.imports, *writer.definitions]), names)
    return eval(text, names)


def assert_identical(a, b):
    """The same numbers to the last bit (a NaN is a NaN), in the same dtype, at the same places in memory."""
    assert type(a) is type(b) and a.dtype == b.dtype and a.shape == b.shape
    if isinstance(a, np.ndarray):
        assert a.strides == b.strides or a.size == 0 or a.flags.c_contiguous
        a, b = (torch.from_numpy(np.array(x, dtype=np.float32 if x.dtype.name == "bfloat16" else None)) for x in (a, b))
    else:
        assert a.stride() == b.stride() and a.storage_offset() == b.storage_offset()
        assert a.requires_grad == b.requires_grad and a.is_conj() == b.is_conj()
    if a.is_complex():
        a, b = torch.view_as_real(a.detach().resolve_conj()), torch.view_as_real(b.detach().resolve_conj())
    a, b = a.detach().contiguous(), b.detach().contiguous()
    if a.is_floating_point():
        assert torch.equal(a.isnan(), b.isnan())
        a, b = a.nan_to_num(nan=7.0, posinf=math.inf, neginf=-math.inf), b.nan_to_num(nan=7.0, posinf=math.inf, neginf=-math.inf)
        assert torch.equal(a.signbit(), b.signbit())
    assert torch.equal(a, b)


# --- values ----------------------------------------------------------------------------------------------------------


class TestArrays:
    @settings(few, max_examples=100)
    @given(tensors(special_values=True, requires_grad=st.booleans()))
    def test_tensors(self, x):
        assert_identical(rebuilt(x), x)

    @settings(few, max_examples=100)
    @given(arrays(special_values=True))
    def test_numpy_arrays(self, x):
        assert_identical(rebuilt(x), x)

    @few
    @given(tensors((9, 10), special_values=True))
    def test_large_ones_are_compressed(self, x):
        assert "zlib.decompress" in Writer().value(x) or not x.is_contiguous()
        assert_identical(rebuilt(x), x)

    @pytest.mark.parametrize("array", [np.arange(100.0)[::-2], np.arange(100).reshape(10, 10).T, np.ones((3, 40), np.float16)])
    def test_large_numpy_arrays(self, array):
        assert_identical(rebuilt(array), array)

    def test_numbers_have_few_digits(self):
        text = Writer().value(torch.tensor([0.1, 1e-30, 1 / 3, -0.0], dtype=torch.float32))
        assert text == "torch.tensor([0.1, 1e-30, 0.33333334, -0.0], dtype=torch.float32)"
        assert Writer().value(torch.tensor([0.1], dtype=torch.bfloat16)) == "torch.tensor([0.1], dtype=torch.bfloat16)"

    @few
    @given(st.lists(st.floats(width=32), min_size=1, max_size=5))
    def test_all_numbers_of_single_precision(self, numbers):
        x = torch.tensor(numbers, dtype=torch.float32)
        assert_identical(rebuilt(x), x)

    @pytest.mark.parametrize(
        "x",
        [
            torch.nn.Parameter(torch.ones(2)),
            torch.nn.Parameter(torch.ones(2), requires_grad=False),
            torch.tensor([1 + 2j, 3j]).conj(),
            torch.arange(8.0).unfold(0, 3, 1),
            torch.arange(5000.0)[4000:4003],
            torch.arange(5000.0)[4000:4006:2],
            torch.ones(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
            torch.empty(0, 3),
            torch.ones(()).expand(4),
        ],
        ids=["parameter", "frozen", "conjugate", "windows", "far", "far and strided", "channels last", "empty", "expanded"],
    )
    def test_uncommon_tensors(self, x):
        found = rebuilt(x)
        assert type(found) is type(x) and found.stride() == x.stride() and found.requires_grad is x.requires_grad
        assert torch.equal(found, x) and found.is_conj() == x.is_conj()
        assert found.storage_offset() % 16 == x.storage_offset() % 16

    def test_what_is_no_plain_tensor_is_to_be_supplied(self):
        writer = Writer()
        assert writer.value(torch.eye(2).to_sparse(), "matrix") == "matrix"
        assert writer.missing == {"matrix": "a Tensor of layout torch.sparse_coo, shape (2, 2)"}


    @pytest.mark.parametrize("dtype", ["O", "U3", "M8[s]", "g"])
    def test_numpy_dtypes_that_pytorch_does_not_have(self, dtype):
        array = np.zeros(2, dtype)
        writer = Writer()
        assert writer.value([array, array[0]] if dtype in "gM8[s]" else [array], "x").startswith("[x_0")
        assert writer.missing["x_0"] == f"a ndarray of dtype {array.dtype}, shape (2,)"

    def test_numpy_dtypes_that_pytorch_hardly_has(self):
        for dtype in ("uint16", "uint32", "uint64", ">f4", ">i8"):
            array = np.arange(3).astype(dtype)
            assert rebuilt(array).dtype == array.dtype and (rebuilt(array) == array).all()


class Local(NamedTuple):
    a: Any
    b: Any


@dataclasses.dataclass
class Mine:
    left: Any
    right: Any = 3.0
    name: str = "mine"


tree.register_dataclass(Mine, meta_fields=("name",))


class TestOtherValues:
    @pytest.mark.parametrize(
        "value",
        [
            *(None, True, 3, -2.5, math.inf, -math.inf, 1e300, "text", b"bytes", 2 + 3j, ..., slice(1, None), range(3)),
            *((), (1,), [1, [2.5]], {"a": (1, "b")}, {}, torch.float16, torch.device("cpu"), torch.strided),
            *(OrderedDict(b=1, a=2), defaultdict(list, {"k": [1]}), np.float32(0.1), np.int8(3), np.bool_(True)),
            *(int, OrderedDict),
        ],
        ids=repr,
    )
    def test_values(self, value):
        found = rebuilt(value)
        assert found == value and type(found) is type(value)

    def test_nan(self):
        assert math.isnan(rebuilt(math.nan)) and math.isnan(rebuilt(complex(0, math.nan)).imag)

    @few
    @given(pytrees(tensors((), torch.float32)))
    def test_trees(self, value):
        found = rebuilt(value)
        assert repr(found) == repr(value)

    def test_classes_of_ones_own(self):
        assert repr(rebuilt(Local(1, [Record(2, 3)]))) == "Local(a=1, b=[Record(left=2, right=3, tag='tag')])"
        text = reproducer(lambda m: m.left * m.right, (Mine(torch.ones(3), torch.ones(3), "x"),))
        assert "class Mine:" in text and "torchbatch.tree.register_dataclass(Mine, data_fields=['left', 'right'])" in text
        assert torch.equal(run(text)["got"], torch.ones(3))

    def test_an_object(self):
        writer = Writer()
        assert writer.value({"model": torch.nn.Linear(1, 1)}, "x") == "{'model': x_model}"
        assert writer.missing == {"x_model": "a torch.nn.modules.linear.Linear"}


# --- functions -------------------------------------------------------------------------------------------------------


def doubled(x):
    return SCALE * x


def weighted(x, y=WEIGHTS):
    """Uses a global function, a global tensor, and a module by another name."""
    return F.softplus(doubled(x)) @ y + WEIGHTS.sum() + math.pi


def annotated(x: Mine, power: np.ndarray | None = None) -> OrderedDict:
    total: Local = x.sum()
    return total


def even(x, n):
    return x if n == 0 else odd(x + 1, n - 1)


def odd(x, n):
    return even(x * 2, n - 1)


def decorate(fun):
    @functools.wraps(fun)
    def decorated(x):
        return fun(x) + 100

    return decorated


@decorate
def with_decorator(x):
    return x * SCALE


def with_closure():
    scale, offset, names = 3.0, torch.tensor([1.0, 2.0]), {"b": 1}

    def inner(x):
        return helper(x) * names["b"]

    def helper(x):
        return scale * x + offset

    return inner


def checked(fun, *args, in_axes=0, out_axes=0, **options):
    """The program runs, and gives what the two give here."""
    text = reproducer(fun, args, in_axes, out_axes, **options)
    assert "Supply" not in text, text
    names = run(text)
    ours, theirs = torchbatch.vmap(fun, in_axes, out_axes)(*args), loop(fun, in_axes, out_axes)(*args)
    for name, wanted in (("got", ours), ("expected", theirs)):
        for a, b in zip(tree.leaves(names[name]), tree.leaves(wanted), strict=True):
            assert torch.equal(a, b)
    return text


XS = torch.arange(6.0).reshape(2, 3)


class TestFunctions:
    @pytest.mark.parametrize(
        "fun",
        [torch.sin, F.softplus, torch.Tensor.sum, torch.linalg.norm, torch.special.erf, torch.neg, F.gelu],
        ids=lambda fun: fun.__name__,
    )
    def test_functions_of_pytorch(self, fun):
        assert f".{fun.__name__.rpartition('_')[2]}(" in checked(fun, XS)

    @pytest.mark.parametrize("fun", [doubled, weighted, annotated, with_decorator], ids=lambda fun: fun.__name__)
    def test_functions_of_a_file(self, fun):
        assert f"def {fun.__name__}(" in checked(fun, XS)

    def test_functions_that_call_each_other(self):
        text = checked(even, XS, 4, in_axes=(0, None))
        assert text.count("def even") == text.count("def odd") == 1

    def test_functions_with_closures(self):
        text = checked(with_closure(), torch.ones(3, 2))
        assert "scale = 3.0\n" in text and "offset = torch.tensor([1.0, 2.0], dtype=torch.float32)" in text

    def test_partial(self):
        text = checked(functools.partial(weighted, y=torch.ones(3)), XS)
        assert "functools.partial(weighted, y=torch.tensor([1.0, 1.0, 1.0], dtype=torch.float32))" in text

    def test_lambdas(self):
        scale = 4.0
        assert "f = lambda x: x * scale" in checked(lambda x: x * scale, XS)
        first, second = (lambda x: x + 1, lambda x: x + 2)
        assert "lambda x: x + 2" in checked(second, XS) and "lambda x: x + 1" in checked(first, XS)
        assert "scale = 4.0" in checked(lambda x, k=scale: k * x, XS)
        checked(
            lambda x, y: torch.where(
                x > y, x, torch.zeros(())
            ),
            XS, XS + 1,
        )  # fmt: skip

    def test_lambdas_that_differ_in_what_they_call(self):
        chosen = [(lambda x: x.sin(), lambda x: x.cos()), (lambda x: doubled(x), lambda x: annotated(x))]
        for pair in chosen:
            for fun in pair:
                checked(fun, XS)

    def test_lambdas_that_are_the_same(self):
        alike = (lambda x, y: x[0] - y, lambda x, y: x[0] - y)
        checked(alike[1], XS, XS, in_axes=(0, None))

    @pytest.mark.skipif(sys.version_info < (3, 11), reason="code objects have no columns")
    def test_lambdas_told_apart_by_their_column(self):
        pair = (lambda x: sum([y + 1 for y in x]), lambda x: sum([y + 2 for y in x]))
        for fun in pair:
            checked(fun, XS)

    def test_source_as_text(self):
        text = checked_source("def f(x):\n    return x + 1\n", XS)
        assert "def f(x):" in text
        assert "torch.sin(x0.select(0, i))" in checked_source("torch.sin", XS)
        assert "math." in checked_source("lambda x: x * math.pi", XS)
        checked_source("k = 2\ng = lambda x: k * x", XS)

    @pytest.mark.parametrize(("text", "error"), [("def f(", "cannot read"), ("import torch\n1 + 1", "defines no function")])
    def test_source_that_is_none(self, text, error):
        with pytest.raises(AxisSpecError, match=error):
            reproducer(text, (XS,))

    def test_random_programs(self):
        @settings(few, max_examples=25)
        @given(programs(differentiable=False).flatmap(lambda p: st.tuples(st.just(p), batched_calls(p))))
        def holds(drawn):
            program, call = drawn
            names = run(call.reproducer(program.torch, rtol=1e-4, atol=1e-4))
            theirs = loop(program.torch, call.in_axes, call.out_axes)(*call.args)
            for a, b in zip(tree.leaves(names["got"]), tree.leaves(theirs), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)

        holds()


def checked_source(source, *args):
    text = reproducer(source, args)
    run(text)
    return text


class TestToBeSupplied:
    def test_modules_and_other_objects(self):
        model = torch.nn.Linear(3, 1)
        text = reproducer(model, (XS,))
        assert "# Supply f: a callable torch.nn.modules.linear.Linear." in text
        assert torch.equal(run(text, f=model)["got"], model(XS))

    def test_what_a_function_uses(self):
        model = torch.nn.Linear(3, 1)
        text = reproducer(lambda x: model(x), (XS,))
        assert "# Supply model: a torch.nn.modules.linear.Linear." in text
        assert torch.equal(run(text, model=model)["got"], torchbatch.vmap(model)(XS))

    def test_functions_without_source(self):
        names = {}
        exec("def hidden(x):\n    return x + 1", names)
        text = reproducer(names["hidden"], (XS,))
        assert "# Supply f: the function builtins.hidden." in text or "# Supply f: the function None.hidden." in text
        run(text, f=names["hidden"])

    def test_two_things_of_one_name(self):
        def first(k):
            return lambda x: k * x

        k = 5.0
        inner = first(2.0)
        text = reproducer(lambda x: inner(x) + k, (XS,))
        assert "# Supply k: a name that stands for two things." in text


# --- calls -----------------------------------------------------------------------------------------------------------


class TestCalls:
    @few
    @given(batched_calls("(n,k),(k)->(n)", special_values=True))
    def test_axes(self, call):
        names = run(call.reproducer(torch.mv, transform=None))
        if call.axis_size:
            theirs = loop(torch.mv, call.in_axes, call.out_axes)(*call.args)
            torch.testing.assert_close(names["expected"], theirs, equal_nan=True)

    def test_trees(self):
        def fun(params, x):
            return {"y": params["w"] @ x + params["b"][0], "pair": (x, None)}

        params = {"w": torch.ones(2, 3, 2), "b": [torch.ones(3)]}
        axes = ({"w": 0, "b": None}, 1)
        text = checked(fun, params, torch.ones(2, 2), in_axes=axes, out_axes={"y": 1, "pair": 0})
        assert "{'w': params['w'].select(0, i), 'b': params['b']}" in text

    def test_nodes_of_other_kinds(self):
        def fun(a, b):
            return a.left * b.a

        checked(fun, Record(torch.ones(2), None), Local(torch.ones(2), "text"), in_axes=(0, Local(0, None)))
        checked(fun, Record(torch.ones(2), None), Local(torch.ones(2), torch.ones(2)), in_axes=(Record(0, None), 0))

    def test_numpy_arrays(self):
        checked(torch.sin, np.arange(6.0).reshape(2, 3)[:, ::-1], in_axes=1)

    def test_keyword_arguments(self):
        def fun(x, *, shift):
            return x + shift

        text = reproducer(fun, (XS,), (1,), kwargs={"shift": torch.arange(3.0)})
        assert "fun(x.select(1, i), shift=shift.select(0, i))" in text
        assert torch.equal(run(text)["got"], torchbatch.vmap(fun, (1,))(XS, shift=torch.arange(3.0)))

    def test_no_mapped_argument(self):
        text = reproducer(torch.sin, (XS,), None, axis_size=4)
        assert run(text)["got"].shape == (4, 2, 3) and "axis_size=4" in text
        with pytest.raises(AxisSpecError, match="nothing is mapped; give axis_size"):
            reproducer(torch.sin, (XS,), None)

    def test_an_empty_batch(self):
        names = run(reproducer(torch.sin, (torch.ones(0, 3),)))
        assert names["got"].shape == (0, 3) and "expected" not in names

    def test_no_output_axis(self):
        def fun(x, y):
            return x, y

        checked(fun, XS, torch.ones(2), in_axes=(0, None), out_axes=(0, None))

    def test_gradients(self):
        text = reproducer(doubled, (XS[0],), wrap="torch.func.grad({fun})")
        assert torch.equal(run(text)["got"], torch.full((3,), 2.0)) and "torch.func.grad(doubled)(x.select(0, i))" in text

    def test_random_numbers(self):
        def fun(x):
            return x + torch.rand(3)

        names = run(reproducer(fun, (XS,), seed=3, transform=None))
        torch.manual_seed(3)
        assert torch.equal(names["expected"], XS + torch.rand(2, 3))

    def test_writes_into_arguments_do_not_reach_the_other_run(self):
        def fun(x):
            return x.add_(1)

        names = run(reproducer(fun, (XS.clone(),)))
        assert torch.equal(names["got"], XS + 1)

    def test_other_transforms(self):
        text = reproducer(torch.sin, (XS,), 0, 1, transform="torch.func.vmap({fun}, in_dims={in_axes}, out_dims={out_axes})")
        assert "torchbatch" not in text and torch.equal(run(text)["got"], torch.sin(XS).T)

    def test_names_do_not_collide(self):
        n, i, inputs, stack, got = 2.0, 3.0, 4.0, 5.0, 6.0

        def fun(x, outputs):
            return x * n * i * inputs * stack + outputs * got

        names = run(reproducer(fun, (XS, XS)))
        assert torch.equal(names["got_"], fun(XS, XS)) and torch.equal(names["expected"], fun(XS, XS))

    def test_a_mapped_argument_that_is_no_array(self):
        with pytest.raises(InputTypeError, match="the argument x0 is mapped over axis 0, but it is 'text' of type str"):
            reproducer(torch.sin, ("text",), axis_size=2)

    def test_a_difference_is_an_error(self):
        text = reproducer(torch.sin, (XS,), transform="torch.func.vmap(torch.cos)", output=torch.ones(3))
        with pytest.raises(AssertionError, match="not close"):
            run(text)
        assert run(text.replace("equal_nan=True", "rtol=9, atol=9"))["printed"].startswith("the loop:")

    def test_tolerances(self):
        text = reproducer(torch.sin, (XS,), transform="torch.func.vmap(torch.cos)", atol=9)
        assert "rtol=0, atol=9" in text
        run(text)


class TestFreshProcess:
    """The programs need nothing but PyTorch, and what they name."""

    def start(self, text):
        return subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, timeout=120)

    def test_it_runs_alone(self):
        transform = "torch.func.vmap({fun}, in_dims={in_axes}, out_dims={out_axes})"
        args = (XS, {"w": torch.arange(12.0).reshape(3, 4)[:, ::2], "kind": collections.OrderedDict(b=torch.ones(70))})

        def fun(x, params):
            return weighted(x) + (x @ params["w"]).sum() + params["kind"]["b"].sum() * SCALE

        done = self.start(reproducer(fun, args, (0, None), transform=transform))
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("the loop:") and "torch.func.vmap:" in done.stdout

    def test_a_failure_is_seen(self):
        done = self.start(reproducer(torch.sin, (XS,), transform="torch.func.vmap(torch.cos)"))
        assert done.returncode == 1 and "Tensor-likes are not close" in done.stderr
