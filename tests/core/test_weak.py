"""Numbers as tensors that give way to other dtypes."""

from __future__ import annotations

import pytest
import torch

from torchbatch import vmap
from torchbatch.core.weak import WIDEST, WeakNumbers, as_weak, strong
from torchbatch.testing import assert_close

NUMBERS = [True, 3, 2.5, 1 - 2j]


@pytest.mark.parametrize("number", NUMBERS)
def test_as_weak_keeps_the_value(number):
    value = as_weak(number)
    assert value.item() == number and value.dtype is WIDEST[type(number)] and value.dim() == 0


def test_as_weak_is_on_the_cpu_whatever_the_default_device():
    with torch.device("meta"):
        assert as_weak(2.5).device.type == "cpu"


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.uint8, torch.int32, torch.float16, torch.float32, torch.float64, torch.complex64]
)
@pytest.mark.parametrize("shape", [(), (2,)])
def test_promotion_is_that_of_a_number(number, dtype, shape):
    x, weak = torch.ones(shape).to(dtype), as_weak(number)
    for fun in (lambda x, n: x * n, lambda x, n: n + x, lambda x, n: torch.where(x == x, x, n)):
        with WeakNumbers([weak]):
            got = fun(x, weak)
        assert_close(got, fun(x, number))


def test_several_tensors():
    half, single, weak = torch.ones(2).half(), torch.ones(2), as_weak(2.5)
    with WeakNumbers([weak]):
        assert torch.where(half > 0, half, weak).dtype is torch.float16
        assert torch.addcmul(half, half, half).dtype is torch.float16
        assert (half * weak).dtype is torch.float16 and (half * weak * single).dtype is torch.float32


def test_what_is_computed_of_numbers_alone_is_a_number():
    n, m, x = as_weak(3), as_weak(2.5), torch.ones(2).half()
    with WeakNumbers([n, m]) as weak:
        for value in (n + 1, n * m, n / 2, -n, n**2, abs(n)):
            assert weak.is_weak(value) and (value * x).dtype is torch.float16
        assert not weak.is_weak(x * n) and not weak.is_weak(n.expand(2))


@pytest.mark.parametrize(
    "make", [lambda n: n.reshape(1), lambda n: n.expand(3), lambda n: torch.stack([n, n]), lambda n: n[None]]
)
def test_a_number_with_dimensions_has_the_default_dtype(make):
    with WeakNumbers([number := as_weak(2.5)]):
        assert make(number).dtype is torch.float32 and (make(number) * torch.ones(1).half()).dtype is torch.float32


def test_asking_and_converting():
    with WeakNumbers([number := as_weak(2.5)]):
        assert number.dtype is torch.float64 and number.shape == ()
        assert number.to(torch.float64).dtype is torch.float64 and number.double().dtype is torch.float64
        assert not torch.is_complex(number) and number.is_floating_point()


@pytest.mark.parametrize(("number", "dtype"), [(2.5, torch.float32), (3, torch.int64), (True, torch.bool), (1j, torch.complex64)])
def test_strong(number, dtype):
    value = as_weak(number)
    other = torch.ones((), dtype=torch.float64)
    with WeakNumbers([value]):
        assert strong(value).dtype is dtype and strong(other) is other and strong("text") == "text"
    assert strong(value) is value, "outside it is a tensor like any other"


def test_strong_with_another_default_dtype():
    torch.set_default_dtype(torch.float64)
    try:
        with WeakNumbers([value := as_weak(2.5)]):
            assert strong(value).dtype is torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


def test_an_integer_may_be_an_index():
    with WeakNumbers([number := as_weak(1)]):
        assert torch.equal(torch.arange(3.0)[number], torch.tensor(1.0))
        assert torch.equal(torch.arange(3.0).index_select(0, number.reshape(1)), torch.tensor([1.0]))


def test_inside_vmap():
    x = torch.ones(2).half()
    with WeakNumbers([number := as_weak(2.5)]):
        assert vmap(lambda a: a * number + 1)(x).dtype is torch.float16


def test_a_complex_number_is_not_written_into_a_real_tensor():
    with WeakNumbers([number := as_weak(1 + 2j)]):
        for write in (
            lambda x: x.add_(number),
            lambda x: x.__setitem__(0, number),
            lambda x: x.fill_(number),
            lambda x: x.__imul__(number),
        ):
            with pytest.raises(RuntimeError):
                write(torch.ones(2))
        assert torch.equal(torch.ones(2, dtype=torch.complex64).mul_(number), torch.full((2,), 1 + 2j))


def test_it_ends():
    number, x = as_weak(2.5), torch.ones((), dtype=torch.float16)
    with WeakNumbers([number]):
        pass
    assert (x * number).dtype is torch.float64
    with pytest.raises(KeyError), WeakNumbers([number]):
        raise KeyError
    assert (x * number).dtype is torch.float64 and torch._C._len_torch_function_stack() == 0


X = torch.tensor([0.5, -1.5])
CHOICES = {
    "where": lambda c, n: torch.where(c, X, n),
    "of both": lambda c, n: torch.where(c, c, X),
    "by name": lambda c, n: torch.where(other=X, input=-X, condition=c),
    "of integers": lambda c, n: torch.where(c, X.int(), n),
    "a method": lambda c, n: X.where(c, n),
    "a fill": lambda c, n: X.masked_fill(c, n),
    "a fill in place": lambda c, n: X.clone().masked_fill_(mask=c, value=n),
}


@pytest.mark.parametrize("choose", CHOICES.values(), ids=CHOICES)
@pytest.mark.parametrize("number", [2.5, -2.5])
def test_a_comparison_of_numbers_stays_a_truth_value_where_one_chooses(choose, number):
    with WeakNumbers([n := as_weak(number)]):
        got = choose((n >= 0) & (n <= 3), n)
    assert_close(got, choose(torch.tensor(0 <= number <= 3), number))
