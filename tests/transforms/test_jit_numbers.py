"""jit: Python numbers as arguments give what they give without it."""

from __future__ import annotations

import functools
import operator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchbatch import grad, jit, vmap
from torchbatch.core import tree
from torchbatch.errors import StaticArgumentError
from torchbatch.testing import assert_close

replayed = functools.partial(jit, backend="eager")
X = torch.tensor([1.0, 2.0, 3.0])


def scaled(x, n):
    return x * n


def noted(fun):
    """The function, and a list of the values that its argument ``n`` had when Python ran it."""
    seen = []

    @functools.wraps(fun)
    def run(x, n):
        seen.append(n)
        return fun(x, n)

    return run, seen


NUMBERS = st.one_of(
    st.booleans(),
    st.integers(-3, 3),
    st.sampled_from([0.0, 0.5, -1.5, 2.0, float("inf"), float("nan")]),
    st.sampled_from([1j, 1 - 2j, 0j]),
)
DTYPES = [torch.bool, torch.uint8, torch.int32, torch.int64]
DTYPES += [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64]


def assigned(x, n):
    y = x.clone().reshape(-1)
    y[0] = n
    return y


OPERATIONS = {
    **{f"x {name} n": getattr(operator, name) for name in "add sub mul truediv floordiv mod lt le eq ne gt and_ or_ xor".split()},
    **{f"n {name} x": lambda x, n, name=name: getattr(operator, name)(n, x) for name in "add sub mul truediv lt eq and_".split()},
    "x << n": lambda x, n: x << n,
    "x >> n": lambda x, n: x >> n,
    "squared": lambda x, n: (x + n) ** 2,
    "the number alone": lambda x, n: n,
    "the number in a tree": lambda x, n: {"n": (n, x)},
    "n * 2": lambda x, n: n * 2,
    "(n + 1) * x": lambda x, n: (n + 1) * x,
    "(n / 2) * x": lambda x, n: (n / 2) * x,
    "n * n * x": lambda x, n: n * n * x,
    "x + n + n": lambda x, n: x + n + n,
    "where": lambda x, n: torch.where(x == x, x, n),
    "where the number first": lambda x, n: torch.where(x != x, n, x),
    "clamp": lambda x, n: x.clamp(min=n),
    "masked_fill": lambda x, n: x.masked_fill(x == x, n),
    "fill_": lambda x, n: x.clone().fill_(n),
    "add_": lambda x, n: x.clone().add_(n),
    "mul_": lambda x, n: x.clone().mul_(n),
    "item assignment": assigned,
    "fmod": torch.fmod,
    "remainder": torch.remainder,
    "xlogy": torch.xlogy,
    "copysign": torch.copysign,
    "torch.tensor": lambda x, n: torch.tensor(n),
    "torch.tensor, dtype": lambda x, n: torch.tensor(n, dtype=x.dtype),
    "as_tensor, to": lambda x, n: torch.as_tensor(n).to(x.dtype),
    "as_tensor, reshape": lambda x, n: torch.as_tensor(n).reshape(1),
    "as_tensor, expand, times": lambda x, n: torch.as_tensor(n).expand(3) * x,
    "vmap": lambda x, n: vmap(lambda x: x * n)(x.reshape(-1)),
    "vmap, an argument": lambda x, n: vmap(scaled, (0, None))(x.reshape(-1), n),
    "sum": lambda x, n: x.sum() * n,
    "several dtypes": lambda x, n: (x.to(torch.int8) + n, x.half() * n),
    "jit": lambda x, n: replayed(scaled)(x, n),
}


def outcome(fun, *args):
    """The leaves of what a function returns as tensors, or the error."""
    try:
        return [torch.as_tensor(leaf) for leaf in tree.flatten(fun(*args))[0]]
    except Exception as error:
        return error


def excused(name, x, n):
    """Where jit and PyTorch without it differ, and may."""
    comparison = name.split()[1:2] and name.split()[1] in ("lt", "le", "gt", "ge", "eq", "ne")
    return (
        (type(n) is bool and name in ("n * 2", "(n + 1) * x", "(n / 2) * x", "n * n * x", "x << n", "x >> n"))  # True + True
        or (x.dtype is torch.bool and name in ("x << n", "x >> n"))
        or (x.dtype is torch.uint8 and comparison and n.real < 0)  # PyTorch says uint8(2) < -1
        or (type(n) is complex and name == "n truediv x")  # half precision, and nan or inf for 1j / 0
        or (type(n) is complex and name == "clamp")  # complex numbers have no order; PyTorch compares real parts, or refuses
        or (type(n) is complex and not x.is_complex() and name in ("masked_fill", "fill_", "item assignment"))  # refused
    )


@settings(max_examples=settings.default.max_examples * 2)
@given(st.sampled_from(sorted(OPERATIONS)), st.sampled_from(DTYPES), st.booleans(), NUMBERS)
def test_numbers_give_what_they_give_without_jit(name, dtype, flat, n):
    """The dtype of the result too; where PyTorch refuses a combination, jit may give a result, or refuse it."""
    x = torch.tensor([1, 2, 0]).to(dtype) if flat else torch.tensor(2).to(dtype)
    want = outcome(OPERATIONS[name], x, n)
    if isinstance(want, Exception) or excused(name, x, n):
        return
    got = outcome(replayed(OPERATIONS[name]), x, n)
    assert not isinstance(got, Exception), got
    assert_close(
        got, want, rtol=2e-2 if dtype in (torch.float16, torch.bfloat16) else 1e-5, atol=1e-5
    )


REFUSED_IN_PLACE = [
    (torch.int64, 1.5, lambda x, n: x.clone().mul_(n)),
    (torch.int64, 1.5, lambda x, n: x.clone().add_(n)),
    (torch.bool, 2, lambda x, n: x.clone().mul_(n)),
    (torch.float32, 1 + 2j, lambda x, n: x.clone().add_(n)),
    (torch.float32, 1 + 2j, lambda x, n: x.clone().mul_(n)),
    (torch.float32, 1 + 2j, lambda x, n: x.clone().fill_(n)),
    (torch.float32, 1 + 2j, assigned),
]


@pytest.mark.parametrize(("dtype", "n", "fun"), REFUSED_IN_PLACE)
def test_a_number_that_does_not_fit_is_refused_in_place(dtype, n, fun):
    """A part of it would be lost in silence."""
    x = torch.ones(3).to(dtype)
    with pytest.raises(RuntimeError):
        fun(x, n)
    with pytest.raises(RuntimeError):
        replayed(fun)(x, n)


@pytest.mark.parametrize("n", [True, 3, 2.5, 1 + 2j])
def test_another_number_of_the_same_class_is_no_new_trace(n):
    fun, seen = noted(scaled)
    jitted = replayed(fun)
    for number in (n, type(n)(0), n):
        assert_close(jitted(X, number), X * number)
    assert len(seen) == 1


def test_classes_of_numbers_are_told_apart():
    fun, seen = noted(lambda x, n: n)
    jitted = replayed(fun)
    for _ in range(2):
        kinds = [jitted(X, n).dtype for n in (True, 1, 1.0, 1j, np.float32(1), torch.tensor(1.0))]
    assert kinds == [torch.bool, torch.int64, torch.float32, torch.complex64, torch.float32, torch.float32]
    assert len(seen) == jitted.cache_size() and len(seen) in (5, 6)


@pytest.mark.parametrize("n", [2**62 + 1, -(2**63), 1e300, 5e-324, -0.0, float("inf")])
def test_numbers_keep_their_precision(n):
    assert replayed(lambda x, n: x * n)(torch.ones((), dtype=torch.float64 if type(n) is float else torch.int64), n).item() == n
    assert np.signbit(replayed(lambda n: n * torch.ones((), dtype=torch.float64))(float(n)).item()) == np.signbit(float(n))


def test_a_number_beside_another_number():
    jitted = replayed(lambda n, m: (n + m, n / m, n < m, n**m))
    got, want = jitted(3, 2), (5, 1.5, False, 9)
    assert [value.item() for value in got] == list(want)
    assert [value.dtype for value in got] == [torch.int64, torch.float32, torch.bool, torch.int64]


def test_default_dtype_of_numbers():
    torch.set_default_dtype(torch.float64)
    try:
        assert replayed(lambda n: n)(2.0).dtype == torch.float64 and replayed(lambda n: n * 1j)(2.0).dtype == torch.complex128
    finally:
        torch.set_default_dtype(torch.float32)
    assert replayed(lambda n: n)(2.0).dtype == torch.float32


def test_the_gradient_by_a_number():
    got = replayed(lambda x, n: grad(lambda n: (x * n).sum())(n))(X, 2.0)
    want = grad(lambda n: (X * n).sum())(torch.tensor(2.0))
    assert_close(got, want)


def test_a_number_is_no_integer_where_python_wants_one():
    for fun in (lambda n: torch.zeros(n), lambda n: [n] * n, lambda n: list(range(n)), lambda n: (1, 2, 3)[n]):
        with pytest.raises(TypeError, match="Python needs a value here"):
            replayed(fun)(2)


@pytest.mark.parametrize("n", [2**64, -(2**63) - 1])
def test_a_number_that_is_too_large(n):
    with pytest.raises(
        StaticArgumentError, match=rf"^jit: argument n of scaled is {n} of type int, which does not fit into int64"
    ):
        replayed(scaled)(X, n)


CLAMPS = [
    lambda x, n: x.clamp(n, 2),
    lambda x, n: torch.clip(x, max=n, min=0.5),
    lambda x, n: torch.clamp(x, n, None),
]


@pytest.mark.parametrize("clamp", CLAMPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int32])
@pytest.mark.parametrize("number", [1, 1.5])
def test_one_bound_may_be_a_number_that_is_known(clamp, dtype, number):
    x = torch.arange(4).to(dtype)
    assert_close(replayed(clamp)(x, number), clamp(x, number))


def test_a_number_between_numbers():
    assert replayed(lambda n: n.clamp(0, 1) + n.clamp(0.5, n + 1))(1.5) == 2.5


def test_a_number_decides_what_is_chosen():
    def inside(x, n):
        return torch.where((n >= 0) & (n <= 1), x, float("nan"))

    chosen = replayed(inside)
    assert torch.equal(chosen(X, 0.5), X) and chosen(X, 1.5).isnan().all() and chosen(X, 1.5).dtype is X.dtype
    assert torch.equal(replayed(vmap(inside, in_axes=(0, None)))(X, 1), X)
