"""The generator's state, and the order in which a tensor lies in memory."""

from __future__ import annotations

import torch

from torchbatch._torch import draws, levels


def test_the_state_is_saved_compared_and_restored():
    state = draws.GeneratorState([torch.zeros(1)])
    assert state.is_current()
    first = torch.rand(2)
    assert not state.is_current()
    state.restore()
    assert torch.equal(torch.rand(2), first)
    state.save()
    assert state.is_current()


def test_rows_first():
    level = levels.enter_level(3, "different")
    try:
        x = torch.zeros(3, 4)
        assert draws._lies_in_order([levels.add_batch_dim(x, 0, level)])
        assert not draws._lies_in_order([levels.add_batch_dim(x, 1, level)])
        assert not draws._lies_in_order([levels.add_batch_dim(x.t(), 1, level)])
        assert not draws._lies_in_order([x.t()])
        assert draws._lies_in_order([5]) and draws._lies_in_order([])
    finally:
        levels.leave_level()


def test_every_operator_named_in_the_table_exists():
    names = [name for names in draws._KERNELS.values() for name in names.split()]
    assert len(names) == len(set(names))
    assert {"rand", "uniform_", "dropout", "dropout_", "bernoulli", "multinomial"} <= set(draws.REGISTERED)
