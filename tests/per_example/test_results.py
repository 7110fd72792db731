"""The memory of large results: used again when nobody holds them, and never before."""

from __future__ import annotations

import copy
import gc
import threading

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss

from torchbatch import jit, per_example
from torchbatch.per_example.results import Memory
from torchbatch.testing import assert_close


@pytest.fixture
def wide():
    torch.manual_seed(0)
    return nn.Linear(600, 500).double()


def batch(seed, count=2):
    torch.manual_seed(seed)
    return torch.randn(count, 600, dtype=torch.float64), torch.randn(count, 500, dtype=torch.float64)


def by_hand(model, x, y):
    residual = 2 * (model(x) - y).detach() / y.shape[1]
    return residual[:, :, None] * x[:, None, :]


def test_a_result_that_is_held_stays_as_it_is(wide):
    found = per_example.gradients(wide, mse_loss, compile=False)
    first = found(*batch(1))["weight"]
    row = found(*batch(2))["weight"][1]
    found(*batch(3))
    assert_close(first, by_hand(wide, *batch(1)))
    assert_close(row, by_hand(wide, *batch(2))[1])


def test_memory_that_nobody_holds_is_used_again(wide):
    found = per_example.gradients(wide, mse_loss, compile=False)
    places = {found(*batch(seed))["weight"].untyped_storage().data_ptr() for seed in range(5)}
    assert len(places) == 1


def test_chunks_of_it_and_other_sizes_are_right(wide):
    found = per_example.gradients(wide, mse_loss, chunk_size=2, compile=False)
    for count in (5, 3, 5):
        assert_close(found(*batch(count, count))["weight"], by_hand(wide, *batch(count, count)))


def test_memory_of_other_sizes_is_let_go():
    memory = Memory()
    held = [memory.empty((1000 + i,), torch.float32) for i in range(3)]
    memory.let_go()
    del held
    gc.collect()
    assert sum(len(free) for free in memory._free.values()) == 3
    memory.let_go()
    assert sum(len(free) for free in memory._free.values()) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.complex64, torch.complex128])
def test_memory_is_aligned_and_of_every_dtype(dtype):
    found = Memory().empty((3, 5), dtype)
    assert found.shape == (3, 5) and found.dtype is dtype and found.data_ptr() % 64 == 0 and found.is_contiguous()


def test_threads_share_it(wide):
    found, wrong = per_example.gradients(wide, mse_loss, compile=False), []
    found(*batch(0))

    inputs = {seed: batch(seed) for seed in (1, 2, 3)}
    wants = {seed: by_hand(wide, *inputs[seed]) for seed in inputs}

    def checked(seed):
        for _ in range(5):
            wrong.append(float((found(*inputs[seed])["weight"] - wants[seed]).abs().max()))

    threads = [threading.Thread(target=checked, args=(seed,)) for seed in inputs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(wrong) == 15 and max(wrong) < 1e-12


def test_results_can_be_trained_written_copied_and_traced(wide):
    found = per_example.gradients(wide, mse_loss, compile=False)
    result = found(*batch(1))["weight"]
    result.requires_grad_().square().sum().backward()
    assert_close(result.grad, 2 * result.detach())
    assert copy.deepcopy(result).equal(result)
    inside = jit(lambda x, y: found(x, y)["weight"], backend="eager")(*batch(1))
    assert_close(inside, result.detach())
