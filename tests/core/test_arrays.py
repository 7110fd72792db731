"""What counts as an array, and how it becomes a tensor."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from torchbatch.core.arrays import as_tensor


class Arraylike:
    def __init__(self, array):
        self.array = array

    def __array__(self, dtype=None, copy=None):
        return self.array


def test_tensors_are_themselves():
    for tensor in (torch.ones(2), torch.nn.Parameter(torch.ones(2)), torch.ones(2).to_sparse()):
        assert as_tensor(tensor) is tensor


@pytest.mark.parametrize(
    ("number", "dtype"),
    [
        (True, torch.bool), (3, torch.int64), (2**63 - 1, torch.int64), (-(2**63), torch.int64), (0.5, torch.float32),
        (1j, torch.complex64),
    ],
)  # fmt: skip
def test_python_numbers(number, dtype):
    found = as_tensor(number)
    assert found.dtype == dtype and found.shape == () and found.item() == number


@pytest.mark.parametrize("number", [2**63, -(2**63) - 1, 10**30])
def test_numbers_that_no_dtype_holds(number):
    assert as_tensor(number) is None


@pytest.mark.parametrize(
    "dtype", "bool int8 int16 int32 int64 uint8 uint16 uint32 uint64 float16 float32 float64 complex64 complex128".split()
)
def test_numpy_dtypes(dtype):
    array = np.array([0, 1, 2]).astype(dtype)
    assert as_tensor(array).dtype == getattr(torch, dtype)
    assert as_tensor(array[1]).dtype == getattr(torch, dtype)
    np.testing.assert_array_equal(as_tensor(array).numpy(), array)


@pytest.mark.parametrize("dtype", ["<U1", "S1", "O", "M8[s]", "m8[s]", "longdouble", "clongdouble", [("a", "f4")]])
def test_numpy_dtypes_that_are_not_numbers_of_pytorch(dtype):
    assert as_tensor(np.zeros(2, dtype)) is None


def test_memory_is_shared_where_it_can_be():
    array = np.zeros(3)
    as_tensor(array)[0] = 5
    assert array[0] == 5
    as_tensor(Arraylike(array))[1] = 6
    assert array[1] == 6


@pytest.mark.parametrize("make", [lambda a: a[::-1], lambda a: a.astype(">f8"), lambda a: np.broadcast_to(a, (2, 3))])
def test_memory_is_copied_where_it_cannot(make):
    array = make(np.arange(3.0))
    tensor = as_tensor(array)
    np.testing.assert_array_equal(tensor.numpy(), array)
    assert tensor.dtype == torch.float64


def test_read_only_arrays_stay_as_they_are(recwarn):
    array = np.zeros(3)
    array.flags.writeable = False
    as_tensor(array)[0] = 5
    assert array[0] == 0 and not recwarn.list


def test_strided_and_empty_arrays():
    for array in (np.arange(6.0)[::2], np.asfortranarray(np.ones((2, 3))), np.zeros((0, 3)), np.array(3.0)):
        np.testing.assert_array_equal(as_tensor(array).numpy(), array)


@pytest.mark.parametrize("value", ["text", b"x", None, object(), [1, 2], {"a": 1}, abs, np.float32, torch.Tensor, range(3)])
def test_anything_else_is_no_array(value):
    assert as_tensor(value) is None
