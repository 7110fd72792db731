"""Corner cases of what a mapped function may do: each was once a wrong answer, or a misleading error."""

from __future__ import annotations

import gc
import subprocess
import sys

import pytest
import torch
from torch import nn

import torchbatch
from torchbatch import vmap
from torchbatch.core.writes import may_keep
from torchbatch.errors import AxisError, EscapedValueError, InPlaceError, RandomnessError
from torchbatch.testing import assert_close, loop

X = torch.arange(6.0).reshape(3, 2)


def test_importing_torchbatch_is_enough_to_get_every_operator():
    program = """
import warnings; warnings.simplefilter("error")
import torch, torchbatch
print(torchbatch.vmap(lambda x: torch.roll(x, 1))(torch.arange(3.0)).tolist())
print(torchbatch.vmap(torch.nn.LSTMCell(3, 4))(torch.ones(5, 3))[0].shape)
print(torchbatch.vmap(lambda x: torch.zeros(2).scatter_(0, torch.tensor([1]), x))(torch.ones(3, 1)).tolist())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[0.0, 1.0, 2.0]\ntorch.Size([5, 4])\n[[0.0, 1.0], [0.0, 1.0], [0.0, 1.0]]\n"


def test_a_number_is_flipped_like_a_tensor():
    assert vmap(lambda x: x.flip(0))(torch.arange(3.0)).tolist() == [0, 1, 2]
    assert vmap(lambda x: x.flip(0))(X).tolist() == [[1, 0], [3, 2], [5, 4]]


# --- values that escape ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("collect", [True, False])
def test_a_value_that_takes_the_place_of_another_object_is_found(collect):
    kept = {"last": torch.zeros(2)}

    def step(x):
        kept["last"] = x * 1
        return x

    mapped = vmap(step)
    for _ in range(3):
        kept["last"] = torch.zeros(2)
        if collect:
            gc.collect()
        mapped(X)
        with pytest.raises(EscapedValueError):
            vmap(lambda y: y * 0 + kept["last"])(X)


def test_a_value_kept_by_a_call_that_was_interrupted_is_found():
    kept = []

    def interrupted(x):
        kept.append(x * 1)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        vmap(interrupted)(X)
    with pytest.raises(EscapedValueError):
        vmap(lambda y: y + kept[0])(X)


def test_a_tensor_of_an_earlier_call_is_not_given_the_values_of_a_later_one():
    cache = {}

    def cached(x):
        if "zeros" not in cache:
            cache["zeros"] = torch.zeros(2)
        return x + cache["zeros"]

    assert_close(vmap(cached)(X), X)
    with pytest.raises(InPlaceError, match="made outside the vmap that maps it"):
        vmap(lambda x: cache["zeros"].add_(x))(X)
    assert_close(vmap(cached)(X), X)
    assert cache["zeros"].tolist() == [0, 0]


STATE = []


def stores_in_a_global_list(x):
    STATE.append(x)
    return x


def sets_a_global(x):
    global LAST
    LAST = x
    return x


class Remembers(nn.Module):
    def forward(self, x):
        self.last = x
        return x


def pure(x):
    parts = [x.sum(), x.mean()]
    return torch.stack(parts) * 2


def test_what_may_keep_a_value_is_read_off_the_code():
    outside = []
    assert all(map(may_keep, [stores_in_a_global_list, sets_a_global, Remembers(), lambda x: outside.append(x)]))
    assert not any(map(may_keep, [pure, torch.sin, nn.Linear(2, 2), lambda x: x * 2 + 1, torchbatch.grad(pure)]))


# --- tensors made inside ---------------------------------------------------------------------------------------------


def index_changed_later(x):
    buffer, place = torch.zeros(3), torch.tensor(0)
    first = buffer[place]
    place += 1
    buffer[0] = x[0]
    return first + 0


class NamedLikeAMethod(nn.Module):
    def norm(self, x):
        out = torch.zeros(2)
        out[0] = x.sum()
        return out

    def forward(self, x):
        return self.norm(x)


class Adder:
    def add(self, x):
        out = torch.zeros(2)
        out[1] = x[0]
        return out


def patched():
    module = nn.Identity()
    module.forward = NamedLikeAMethod().norm
    return module


def drawn(x):
    return torch.normal(0.0, 1.0, (2,)).copy_(x)


@pytest.mark.parametrize("fun", [index_changed_later, NamedLikeAMethod(), torchbatch.checkpoint(NamedLikeAMethod()), patched()])
def test_a_write_that_is_hard_to_see_in_the_code(fun):
    assert_close(vmap(fun)(X), loop(fun)(X))


def test_a_write_in_an_unmapped_argument():
    def through(model, x):
        return torch.func.functional_call(model, {}, (x,))

    axes = (None, 0)
    assert_close(vmap(through, axes)(NamedLikeAMethod(), X), loop(through, axes)(NamedLikeAMethod(), X))
    assert_close(vmap(lambda a, x: a.add(x), axes)(Adder(), X), loop(lambda a, x: a.add(x), axes)(Adder(), X))


def test_a_write_into_what_was_drawn():
    assert_close(vmap(drawn, randomness="same")(X), X)


def test_memory_that_was_handed_on_is_not_exchanged():
    def exported(x):
        buffer = torch.zeros(3)
        seen = buffer.numpy()
        buffer[0] = x[0]
        return torch.from_numpy(seen) + 0

    with pytest.raises(InPlaceError) as caught:
        vmap(exported)(X)
    assert str(caught.value).startswith(
        "A per-sample value is written in place into a tensor whose memory was handed on (.numpy(), dlpack, .data_ptr()), where "
        "it would not be seen. Write first, or hand on a copy."
    )


def test_out_keeps_to_the_dtype_and_fills_an_empty_tensor():
    with pytest.raises(InPlaceError) as caught:
        vmap(lambda x: torch.mul(x, 1.5, out=torch.zeros(2, dtype=torch.long)))(X)
    assert str(caught.value) == "out= has dtype torch.int64, to which a result of dtype torch.float32 cannot be cast."
    assert_close(vmap(lambda x: torch.mul(x, 2, out=torch.empty(0)))(X), X * 2)


# --- draws and errors ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("randomness", ["same", "different"])
def test_a_generator_of_ones_own_is_refused_in_chunks(randomness):
    generator = torch.Generator().manual_seed(0)
    with pytest.raises(RandomnessError) as caught:
        vmap(lambda x: x * torch.rand((), generator=generator), randomness=randomness, chunk_size=2)(X)
    assert str(caught.value) == (
        "A generator of your own (generator=) cannot draw in chunks what it would draw at once: only PyTorch's default "
        "generators are set back for each chunk. Map without chunk_size, or leave generator= out."
    )


@pytest.mark.parametrize(
    "error",
    [
        ValueError("mask must be a boolean mask of shape (3,), got float"),
        ValueError("images must be channels_last"),
        RuntimeError("this requires_grad_() must be called first"),
    ],
)
def test_errors_of_the_users_own_are_left_alone(error):
    def fun(x):
        raise error

    with pytest.raises(type(error)) as caught:
        vmap(fun)(X)
    assert caught.value is error
    assert not getattr(caught.value, "__notes__", [])


@pytest.mark.skipif(sys.version_info < (3, 11), reason="exceptions take notes from Python 3.11 on")
def test_an_error_of_pytorch_says_what_one_sample_is():
    with pytest.raises(IndexError, match="Dimension out of range") as caught:
        vmap(lambda x: x.sum(1))(X)
    assert caught.value.__notes__[0].startswith(
        "(raised inside vmap, where shapes may have the batch in front: argument x is float32[3,2], one sample of it "
        "float32[2])\n  in <lambda>, "
    )


def test_an_operator_that_has_no_rule_for_a_named_axis_of_size_0():
    assert vmap(torch.sin, axis_name="i")(torch.zeros(0)).shape == (0,)
    with pytest.raises(AxisError, match="vmap: the axis named 'i' has size 0, for which an operator in shifted has no rule"):
        vmap(shifted, axis_name="i")(torch.zeros(0))
    assert vmap(shifted)(torch.zeros(0)).shape == (0,)


def shifted(x):
    return x + 1
