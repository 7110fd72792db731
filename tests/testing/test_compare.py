"""Comparing trees leaf by leaf: what differs, by how much, and who is off."""

from __future__ import annotations

import dataclasses
import math
from collections import OrderedDict, namedtuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchbatch.errors import AxisSpecError, EquivalenceError, InputTypeError
from torchbatch.testing.assertions import assert_close
from torchbatch.testing.compare import PROBLEMS, Rules, compare
from torchbatch.testing.tolerance import EXACT, Tolerance, Work, choose, rounding
from torchbatch.testing.values import FORMATS, read

NAN, INF = math.nan, math.inf
Pair = namedtuple("Pair", "a b")


def single(got, expected, reference=None, **rules):
    (found,) = compare(got, expected, reference, Rules(**rules))
    return found


# --- problems --------------------------------------------------------------------------------------------------------

ONE = torch.ones(2, 3)
WRONG = {
    "structure": [
        ({"a": ONE}, {"b": ONE}, "lacks output['b'] and has output['a']"),
        ((ONE, ONE), (ONE,), "has output[1]"),
        ((ONE,), [ONE], "the containers differ: (*,) instead of [*]"),
        (Pair(ONE, ONE), (ONE, ONE), "the output lacks output[0], output[1] and has output.a, output.b"),
        (None, ONE, "None instead of a Tensor"),
        ((ONE,), ONE, "a tuple of 1 leaf instead of a Tensor"),
        (ONE, {"a": ONE, "b": ONE}, "a Tensor instead of a dict of 2 leaves"),
    ],
    "type": [("text", ONE, "output is a str instead of a Tensor"), ([len], ["text"], "output[0] is a builtin_function")],
    "shape": [(ONE.T, ONE, "shape (3, 2) instead of (2, 3)"), (ONE[0], ONE, "shape (3,) instead of (2, 3)")],
    "dtype": [
        (ONE.double(), ONE, "dtype float64 instead of float32"),
        (1.0, torch.tensor(1.0), "dtype number instead of float32"),
        (ONE.bool(), ONE, "dtype bool instead of float32"),
    ],
    "nonfinite": [
        (torch.tensor([1.0, NAN]), torch.tensor([1.0, 2.0]), "most at [1]: nan instead of 2.0 (NaN 1 instead of 0)"),
        (torch.tensor([0.0, 2.0]), torch.tensor([NAN, 2.0]), "0.0 instead of nan"),
        (torch.tensor(INF), torch.tensor(-INF), "inf 1 instead of 0, -inf 0 instead of 1"),
        (torch.tensor([NAN, 1.0]), torch.tensor([1.0, NAN]), "2 of 2 differ"),
        (torch.tensor(complex(1, NAN)), torch.tensor(complex(1, 2)), "NaN 1 instead of 0"),
    ],
    "values": [
        (torch.tensor([1, 2]), torch.tensor([1, 3]), "1 of 2 differ, most at [1]: 2 instead of 3 (at most 1 apart"),
        (torch.tensor([True]), torch.tensor([False]), "True instead of False"),
        (ONE + 1e-4, ONE, "6 of 6 differ"),
        (torch.tensor([2**63 - 1]), torch.tensor([2**63 - 2]), "at most 1 apart"),
        (np.array([2**64 - 1], np.uint64), np.array([0], np.uint64), "apart; allowed: rtol 0"),
        ("a", "b", "output is 'a' instead of 'b'"),
    ],
}


@pytest.mark.parametrize(("problem", "row"), [(name, row) for name, rows in WRONG.items() for row in rows])
def test_a_problem_and_its_message(problem, row):
    got, expected, text = row
    found = single(got, expected)
    assert (found.problem, found.passed) == (problem, False)
    assert text in found.message
    assert problem in PROBLEMS


def test_a_device_is_compared_unless_it_does_not_matter():
    class Elsewhere:
        """An array that says it is on another device."""

        dtype, shape, device = np.dtype("float32"), (), type("Device", (), {"platform": "gpu", "id": 1})()

        def __array__(self, dtype=None, copy=None):
            return np.ones((), np.float32)

    found = single(Elsewhere(), torch.tensor(1.0))
    assert (found.problem, found.message) == ("device", "device cuda:1 instead of cpu")
    assert single(Elsewhere(), torch.tensor(1.0), devices=False).passed


SAME = [
    ({"a": ONE, "b": [ONE, None]}, {"b": [ONE, None], "a": ONE}),
    (OrderedDict(x=ONE), OrderedDict(x=ONE)),
    (torch.tensor([NAN, INF, -INF, 1.0]), torch.tensor([NAN, INF, -INF, 1.0])),
    (torch.zeros(0, 3), torch.zeros(0, 3)),
    (torch.tensor(-0.0), torch.tensor(0.0)),
    (torch.tensor(1 + 2j).conj(), torch.tensor(1 - 2j)),
    (torch.ones(3).bfloat16(), torch.ones(3).bfloat16()),
    (torch.ones(3).to(torch.float8_e4m3fn), torch.ones(3).to(torch.float8_e4m3fn)),
    (torch.eye(3).to_sparse(), torch.eye(3).to_sparse()),
    (np.float32(2), torch.tensor(2.0)),
    (len, len),
    (2.5, 2.5),
    ("text", "text"),
]


@pytest.mark.parametrize("pair", SAME, ids=str)
def test_what_is_the_same(pair):
    assert all(leaf.passed and leaf.message == "" for leaf in compare(*pair))


def test_dtypes_need_only_be_of_one_kind_if_so_asked():
    assert single(ONE.double(), ONE, dtypes=False).passed
    assert single(ONE.long(), ONE, dtypes=False).problem == "dtype"
    assert single(1.0, torch.tensor(1.0), numbers=True).passed
    assert single(True, torch.tensor(1.0), numbers=True).problem == "dtype"


def test_every_leaf_has_its_place():
    found = compare({"a": [ONE, ONE + 1]}, {"a": [ONE, ONE]}, where="grad")
    assert [(leaf.where, leaf.passed) for leaf in found] == [("grad['a'][0]", True), ("grad['a'][1]", False)]


# --- numbers ---------------------------------------------------------------------------------------------------------


def test_the_numbers_of_a_difference():
    expected = torch.tensor([[1.0, 2.0], [4.0, 8.0]])
    found = single(expected + torch.tensor([[0.0, 0.0], [0.5, 0.0]]), expected, expected.double())
    assert found.worst == type(found.worst)((1, 0), 4.5, 4.0, 4.0)
    assert (found.differing, found.size, found.max_abs, found.max_rel) == (1, 4, 0.5, 0.125)
    assert found.max_ulp == 0.5 / (4 * 2.0**-23)
    assert found.heat.shape == (2, 2) and (found.heat > 1).tolist() == [[False, False], [True, False]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("number", [1.0, 3.0, 1000.0, 2.0**-10])
def test_one_unit_in_the_last_place(dtype, number):
    here = torch.tensor(number, dtype=dtype)
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    there = (here.view(bits) + 1).view(dtype)
    assert single(there, here).max_ulp == 1.0


def test_a_subnormal_number_is_a_few_units_away_from_zero():
    smallest = torch.tensor(2.0**-149)
    assert single(smallest * 3, torch.tensor(0.0)).max_ulp == 3.0


def test_the_reference_says_who_is_off():
    right = torch.tensor([1.0, 2.0], dtype=torch.float64)
    wrong = (right + 1e-3).float()
    assert single(wrong, right.float(), right).blamed("jit", "loop") == "jit"
    assert single(right.float(), wrong, right, tolerance=Tolerance(1e-6, 0)).blamed("jit", "loop") == "loop"
    assert single(wrong, wrong + 1, right, tolerance=Tolerance(1e-6, 0)).blamed("jit", "loop") == "both"
    assert single(wrong, wrong).blamed("jit", "loop") == ""


def test_heat_is_folded_and_keeps_the_largest():
    expected = torch.zeros(1000, 300, dtype=torch.float64)
    got = expected.clone()
    got[777, 123] = 1.0
    heat = single(got, expected).heat
    assert heat.shape == (48, 96) and (heat > 0).sum() == 1


@given(st.integers(0, 3), st.integers(0, 2**32 - 1))
@settings(max_examples=40)
def test_what_is_folded_covers_every_number(axes, seed):
    generator = np.random.default_rng(seed)
    shape = tuple(generator.integers(0, 120, axes))
    errors = np.asarray(generator.random(shape) < 0.01)
    found = single(errors.astype(np.int64), np.zeros(shape, np.int64))
    assert (found.heat is None) == (errors.size == 0)
    assert errors.size == 0 or bool((found.heat > 0).any()) == bool(errors.any())


# --- values ----------------------------------------------------------------------------------------------------------


def test_only_arrays_have_values():
    with pytest.raises(InputTypeError, match="only arrays and numbers can be compared, but this is 'a' of type str"):
        read("a")
    with pytest.raises(InputTypeError, match="an array of Python objects"):
        read(np.array([object()]))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (np.array(["a"]), "an array of text cannot be compared"),
        (np.array([None, 1]), "an array of Python objects cannot be compared"),
        (np.array(["2020-01-01"], "M8[D]"), "an array of dates cannot be compared"),
        (torch.ones(2, device="meta"), "on the device meta, which holds no numbers"),
        (torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), "nested: compare the tensors in it"),
    ],
    ids=["text", "objects", "dates", "meta", "nested"],
)
def test_what_has_no_numbers_is_refused(value, text):
    with pytest.raises(InputTypeError, match=text):
        compare(value, value)


def test_objects_that_cannot_be_compared_are_named():
    @dataclasses.dataclass
    class State:
        x: torch.Tensor

    with pytest.raises(InputTypeError, match=r"output\[0\] is a State, which is neither an array nor .*register_dataclass"):
        compare([State(ONE)], [State(ONE.clone())])


def test_long_doubles_are_floating_point_numbers():
    assert single(np.longdouble(1) + np.longdouble(1e-16), np.longdouble(1) / 3 * 3).passed


def test_jax_arrays_are_read():
    jnp = pytest.importorskip("jax.numpy")
    found = read(jnp.ones((2,), jnp.bfloat16))
    assert (found.dtype, found.shape, found.device) == ("bfloat16", (2,), "cpu")
    assert compare(jnp.arange(3.0), torch.arange(3.0))[0].passed


def test_large_integers_are_not_rounded():
    assert read(torch.tensor([2**63 - 1])).numbers[0] == 2**63 - 1
    assert read(np.array([2**64 - 1], np.uint64)).numbers[0] == 2**64 - 1


# --- tolerances ------------------------------------------------------------------------------------------------------


def test_whole_numbers_are_equal_or_not():
    assert choose(read(torch.tensor([1])), read(torch.tensor([1]))) is EXACT


def test_more_work_and_coarser_formats_allow_more():
    assert rounding("float64", Work()) < rounding("float32", Work()) < rounding("float32", Work(1000, 4096)) < 1e-4
    assert rounding("bfloat16", Work(4, 10**6)) == rounding("bfloat16", Work(4, 1)) < 0.2


@pytest.mark.parametrize(("dtype", "part"), [(torch.bfloat16, 0.2), (torch.float16, 0.03), (torch.float8_e4m3fn, 0.6)])
def test_coarse_formats_do_not_allow_everything_however_long_the_computation_was(dtype, part):
    with pytest.raises(EquivalenceError):
        assert_close((torch.ones(3) + part).to(dtype), torch.ones(3).to(dtype))
    assert_close(torch.tensor([1 + torch.finfo(dtype).eps]).to(dtype), torch.ones(1).to(dtype))


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "float8_e5m2fnuz"])  # PyTorch says 1/8
def test_formats_are_those_of_pytorch(name):
    known = torch.finfo(getattr(torch, name))
    assert FORMATS[name] == (known.eps, known.smallest_normal)


@pytest.mark.parametrize("number", [-1, float("nan"), True, "1e-3", None])
def test_a_tolerance_is_no_less_than_zero(number):
    with pytest.raises(AxisSpecError, match="Tolerance: rtol must be a number from 0 up, but it is "):
        Tolerance(number, 0.0)
    with pytest.raises(AxisSpecError, match="Tolerance: atol must be a number from 0 up, but it is "):
        Tolerance(0.0, number)
    if number is not None:
        with pytest.raises(AxisSpecError, match="assert_close: rtol must be a number from 0 up"):
            assert_close(1.0, 1.0, rtol=number)


def test_the_coarser_of_two_formats_counts():
    mixed = choose(read(torch.ones(3).bfloat16()), read(torch.ones(3)))
    assert mixed.rtol == rounding("bfloat16", Work())
    assert "bfloat16, 16 operations" in mixed.why


def test_what_cancels_is_held_against_the_size_of_the_leaf():
    large = torch.tensor([1e6, 0.0])
    assert single(large + torch.tensor([0.0, 0.01]), large).passed
    assert not single(torch.tensor([0.01]), torch.tensor([0.0])).passed


def test_an_ill_conditioned_problem_allows_what_the_expected_run_is_off_by():
    reference = torch.tensor([1.0, 2.0], dtype=torch.float64)
    expected = (reference + 1e-3).float()
    found = single((reference - 2e-3).float(), expected, reference)
    assert found.passed and "0.001 off the float64 reference" in found.tolerance.why
    assert not single((reference - 2e-2).float(), expected, reference).passed


def test_a_given_tolerance_is_taken():
    assert single(ONE + 0.5, ONE, tolerance=Tolerance(0.0, 0.6)).passed
    assert str(Tolerance(1e-3, 0.5)) == "rtol 0.001, atol 0.5 (given)"


def test_without_work_and_reference_the_tolerance_is_pytorchs():
    large = torch.tensor([1e8, 1.0])
    with pytest.raises(EquivalenceError, match=r"customary for float32"):
        assert_close(torch.tensor([1e8, 2.0]), large)
    assert assert_close(large * (1 + 1e-6), large).passed
    assert assert_close(torch.tensor([1e8, 2.0]), large, work=Work()).passed
