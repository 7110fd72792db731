"""Whether a call is like one before: tensors, state of PyTorch, transforms and modes at work."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from torchbatch import random, vmap
from torchbatch._torch import guards

X = torch.ones(2, 3)


def test_other_tensors_of_the_same_kind():
    like = guards.tensors_like([X, torch.ones(1)])
    assert like(torch.zeros(2, 3), torch.zeros(1)) and like(X, torch.ones(1))
    assert guards.tensors_like([])()


CHANGES = {
    "shape": lambda: torch.ones(3, 3),
    "dimensions": lambda: torch.ones(2, 3, 1),
    "dtype": lambda: X.double(),
    "device": lambda: X.to("meta"),
    "strides": lambda: torch.ones(3, 2).t(),
    "expanded": lambda: torch.ones(1, 3).expand(2, 3),
    "requires_grad": lambda: X.clone().requires_grad_(),
    "conjugated lazily": lambda: torch.ones(2, 3, dtype=torch.complex64).conj().imag,
    "class": lambda: torch.nn.Parameter(X, requires_grad=False),
    "sparse": lambda: X.to_sparse(),
    "number": lambda: 2.0,
}


@pytest.mark.parametrize("change", CHANGES)
def test_tensors_of_another_kind(change):
    like = guards.tensors_like([X, X.clone()])
    assert not like(CHANGES[change](), X.clone()) and not like(X.clone(), CHANGES[change]())


def test_an_offset_is_no_other_kind():
    assert guards.tensors_like([X])(torch.ones(3, 3)[1:])


def test_one_tensor_twice_is_another_kind():
    assert not guards.tensors_like([X, X.clone()])(X, X)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_another_number_of_tensors(count):
    like = guards.tensors_like([X, X.clone()])
    try:
        same = like(*(X.clone() for _ in range(count)))
    except TypeError:
        return
    assert not same


def test_tensors_inside_a_transform_are_of_another_kind():
    like, seen = guards.tensors_like([torch.ones(3)]), []
    vmap(lambda x: (seen.append(like(x)), x)[1])(X)
    torch.func.grad(lambda x: (seen.append(like(x)), x.sum())[1])(torch.ones(3))
    assert seen == [False, False]


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def precision():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


STATES = {
    "grad mode": torch.no_grad,
    "inference mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "default dtype": lambda: default_dtype(torch.float64),
    "default device": lambda: torch.device("meta"),
    "deterministic algorithms": deterministic,
    "float32 matmul precision": precision,
    "threefry_partitionable": lambda: random.threefry_partitionable(False),
}


@pytest.mark.parametrize("name", STATES)
def test_state_by_name(name):
    before = guards.state()
    with STATES[name]():
        changed = {key for key, value in guards.state().items() if value != before[key]}
    assert name in changed and changed <= {name, "grad mode"}
    assert guards.state() == before and set(before) == set(STATES)


def test_autocast_to_another_dtype_is_another_state():
    with torch.autocast("cpu", torch.bfloat16):
        first, same = guards.state(), guards.state_like_now()
        assert same()
    with torch.autocast("cpu", torch.float16):
        assert guards.state() != first and not same()


@pytest.mark.parametrize("name", STATES)
def test_state_is_compared_quickly(name):
    same = guards.state_like_now()
    assert same()
    with STATES[name]():
        assert not same()
    assert same()


@pytest.mark.parametrize("name", [name for name in STATES if name != "default device"])
def test_state_is_compared_quickly_where_it_was_another(name):
    with STATES[name]():
        same = guards.state_like_now()
        assert same()
    assert not same()


def test_the_default_device_is_part_of_the_state():
    with torch.device("cpu"):
        same = guards.state_like_now()
        assert same()
        with torch.device("meta"):
            assert not same()
    assert not same()
    with torch.device("cpu"):
        assert same()
    with torch.device("meta"):
        assert not same()


def test_under_another_mode_nothing_is_recognised_quickly():
    class Passing(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    with torch.device("cpu"), Passing():
        same = guards.state_like_now()
        assert not same()
    with torch.device("cpu"):
        assert not same()
        outer = guards.state_like_now()
        with Passing():
            assert not outer()


def test_forward_mode_is_another_state():
    same = guards.state_like_now()
    with forward_ad.dual_level():
        assert not same()
    assert same()


@pytest.mark.parametrize("enabled", [True, False])
def test_without_gradients(enabled):
    x = torch.ones(2, requires_grad=True)
    run = guards.without_gradients(lambda values: [value * 2 for value in values])
    with torch.set_grad_enabled(enabled):
        assert not run([x])[0].requires_grad
        assert torch.is_grad_enabled() is enabled


def test_without_gradients_puts_the_mode_back_after_an_error():
    def fail(values):
        raise KeyError

    with pytest.raises(KeyError):
        guards.without_gradients(fail)([])
    assert torch.is_grad_enabled()


class Nothing(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def test_inside_other():
    seen = []

    def ask(x):
        seen.append(guards.inside_other())
        return x.sum()

    assert not guards.inside_other()
    for transform in (vmap, torch.func.grad, torch.func.jacfwd, torch.func.functionalize, make_fx):
        transform(ask)(X)
    for mode in (Nothing(), FlopCounterMode(display=False), forward_ad.dual_level()):
        with mode:
            ask(X)
    assert all(seen) and len(seen) == 8
    with torch.device("cpu"), torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert not guards.inside_other(), "these are parts of the kind of call"
    assert not guards.inside_other()
