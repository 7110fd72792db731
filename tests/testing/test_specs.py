"""Arguments written down as text: what is drawn, and what is said of texts that mean nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import torchbatch as tb
from torchbatch.testing.specs import DTYPES, SpecError, read_arguments, read_axes


def read(spec, seed=0):
    (argument,) = read_arguments([spec], seed)
    return argument


@pytest.mark.parametrize(
    ("spec", "dtype", "shape"),
    [
        ("f32[8,3]", torch.float32, (8, 3)),
        ("float32[8, 3]", torch.float32, (8, 3)),
        ("f64[2]", torch.float64, (2,)),
        ("f16[2,2]", torch.float16, (2, 2)),
        ("bf16[]", torch.bfloat16, ()),
        ("f32[ ]", torch.float32, ()),
        ("f8_e4m3fn[4]", torch.float8_e4m3fn, (4,)),
        ("i64[8]", torch.int64, (8,)),
        ("u8[3,0]", torch.uint8, (3, 0)),
        ("u64[3]", torch.uint64, (3,)),
        ("bool[3]", torch.bool, (3,)),
        ("c64[2]", torch.complex64, (2,)),
        ("complex128[2]", torch.complex128, (2,)),
    ],
)
def test_dtype_and_shape(spec, dtype, shape):
    found = read(spec)
    assert found.dtype is dtype and tuple(found.shape) == shape


@pytest.mark.parametrize("name", DTYPES)
def test_every_dtype_can_be_drawn(name):
    assert read(f"{name}[5]").dtype is DTYPES[name]


def test_the_spelling_is_that_of_a_graph():
    graph = str(tb.make_graph(lambda x: x + 1)(read("f32[3,4]")))
    assert "f32[3,4]" in graph


def test_the_same_seed_gives_the_same_numbers_and_another_one_others():
    specs = ["f32[8]", "f32[8]"]
    first, again, other = (read_arguments(specs, seed) for seed in (3, 3, 4))
    assert all(map(torch.equal, first, again))
    assert not torch.equal(first[0], other[0])
    assert not torch.equal(*first)


def test_normal_numbers():
    found = read("f64[20000]")
    assert abs(float(found.mean())) < 0.05 and abs(float(found.std()) - 1) < 0.05


@pytest.mark.parametrize(
    ("spec", "low", "high"),
    [
        ("i64[500]", 0, 9),
        ("i64[500]<3", 0, 2),
        ("i64[500]<=3", 0, 3),
        ("3>i64[500]", 0, 2),
        ("i64[500]>=5", 5, 14),
        ("i64[500]>5", 6, 15),
        ("-5<=i64[500]<5", -5, 4),
        ("5>i64[500]>=-5", -5, 4),
        ("i8[500]<-3", -13, -4),
        ("i64[500]<2.5", 0, 2),
        ("200<=u8[900]<=255", 200, 255),
    ],
)
def test_whole_numbers_in_bounds(spec, low, high):
    found = read(spec).to(torch.int64)
    assert (int(found.min()), int(found.max())) == (low, high)


@pytest.mark.parametrize(
    ("spec", "low", "high"),
    [("0<f32[900]", 0, 9), ("f32[900]<0", -9, 0), ("2<=f64[900]<3", 2, 3), ("f32[900]>=1.5", 1.5, 9), ("-1<bf16[900]<1", -1, 1)],
)
def test_real_numbers_in_bounds(spec, low, high):
    found = read(spec).double()
    assert low <= float(found.min()) < float(found.max()) <= high
    assert float(found.max() - found.min()) > 0.8


@pytest.mark.parametrize(
    ("spec", "value"), [("2", 2), ("-2.5", -2.5), ("None", None), ("True", True), ("'mean'", "mean"), ("-1-2j", -1 - 2j)]
)
def test_python_values(spec, value):
    found = read(spec)
    assert found == value and type(found) is type(value)


def test_trees():
    found = read('{"w": f32[3,4], "b": (f32[4], [i64[]<2, None, 0.5])}')
    assert list(found) == ["w", "b"]
    assert found["w"].shape == (3, 4) and found["b"][0].shape == (4,)
    assert found["b"][1][0].dtype is torch.int64 and found["b"][1][1:] == [None, 0.5]
    assert read("()") == () and read("[]") == [] and read("{}") == {}


def test_keys():
    assert read("key").shape == () and read("key[8]").shape == (8,) and read("key[2,3]").shape == (2, 3)
    first, second = read_arguments(["key", "key"])
    assert not torch.equal(tb.random.key_data(first), tb.random.key_data(second))


@pytest.mark.parametrize("array", [np.arange(6.0).reshape(2, 3).T, np.array(3, np.int32), np.zeros((0, 2), bool)])
def test_files(tmp_path, array):
    np.save(tmp_path / "x.npy", array)
    found = read(str(tmp_path / "x.npy"))
    assert tuple(found.shape) == array.shape and np.array_equal(found.numpy(), array)
    assert found.numpy().dtype == array.dtype


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        ("f33[2]", "there is no dtype 'f33'; there are f16, f32"),
        ("f32", "f32[] is one number, without axes"),
        ("x", "write a dtype with its shape, such as f32[8,3]"),
        ("", "write a dtype with its shape"),
        ("f32[8", "write a dtype with its shape"),
        ("f32[-1]", "a shape is a list of whole numbers"),
        ("f32[2.5]", "a shape is a list of whole numbers"),
        ("f32[n]", "a shape is a list of whole numbers"),
        ("f32[True]", "a shape is a list of whole numbers"),
        ("f32[2][3]", "write a dtype with its shape"),
        ("__import__('os').getcwd()", "write a dtype with its shape"),
        ("-x", "write a dtype with its shape"),
        ("{**x}", "the keys of a dict must be text or numbers"),
        ("{x: 1}", "the keys of a dict must be text or numbers"),
        ("bool[3]<1", "bool has no bounds"),
        ("c64[3]<1", "complex64 has no bounds"),
        ("i8[3]<200", "int8 does not hold numbers from 0 to 199"),
        ("u8[3]>=-1", "uint8 does not hold numbers from -1 to 8"),
        ("3<i64[3]<3", "there are no numbers from 4 up to 3"),
        ("1<f32[3]<1", "there are no numbers from 1 up to 1"),
        ("0<f32[3]>1", "both bounds are on the same side"),
        ("f32[3]<1<2", "with the array in the middle"),
        ("f32[3]<f32[3]", "with the array in the middle"),
        ("f32[3]==1", "bounds are numbers, written with <, <=, > or >="),
        ("f32[3]<'a'", "bounds are numbers"),
        ("f32[3]<True", "bounds are numbers"),
        ("f32[99999999999,99]", "an array of this shape cannot be made: "),
        ("i64[99999999999999999999]", "an array of this shape cannot be made: "),
        ("missing.npy", "cannot read the file: "),
    ],
)
def test_what_it_refuses(spec, text):
    with pytest.raises(SpecError) as caught:
        read(spec)
    assert str(caught.value).startswith(f"argument {spec!r}: ")
    assert text in str(caught.value)


def test_a_file_of_objects_is_not_read(tmp_path):
    np.save(tmp_path / "x.npy", np.array([object()]), allow_pickle=True)
    with pytest.raises(SpecError, match="cannot read the file"):
        read(str(tmp_path / "x.npy"))


@pytest.mark.parametrize(
    ("text", "axes"),
    [
        ("0", 0),
        (" 0,None", (0, None)),
        ("-1", -1),
        ("({'w': None, 'b': 0}, 1)", ({"w": None, "b": 0}, 1)),
        ("None", None),
        ("0,", (0,)),
    ],
)
def test_axes(text, axes):
    assert read_axes(text, "--in-axes") == axes


@pytest.mark.parametrize("text", ["", "x", "0 None", "f()", "(0"])
def test_axes_it_refuses(text):
    with pytest.raises(SpecError, match=r"--in-axes .*write axes as Python does"):
        read_axes(text, "--in-axes")
