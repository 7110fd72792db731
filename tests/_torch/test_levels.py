"""Levels: open, wrap, ask, close."""

from __future__ import annotations

import torch

from torchbatch._torch import levels

X = torch.arange(6.0).view(2, 3)


def test_a_value_tells_its_levels_innermost_first():
    outer = levels.enter_level(2, "error")
    inner = levels.enter_level(3, "different")
    try:
        value = levels.add_batch_dim(levels.add_batch_dim(X, 0, outer), 0, inner)
        assert list(levels.batch_levels(value)) == [inner, outer]
        assert levels.is_batched_at(value, outer) and not levels.is_batched_at(X, outer)
        assert levels.innermost(value).shape == (2, 3)
        assert list(levels.open_maps()) == [(outer, 2, "error"), (inner, 3, "different")]
        assert levels.share_memory(value, X) and not levels.share_memory(value, X.clone())
    finally:
        levels.leave_level()
        levels.leave_level()
    assert levels.depth() == 0


def test_grad_levels_are_looked_through():
    seen = []

    def loss(x):
        level = levels.enter_level(2, "error")
        value = levels.add_batch_dim(x, 0, level)
        seen.append((list(levels.batch_levels(value)), level, [m[0] for m in levels.open_maps()]))
        levels.leave_level()
        return x.sum()

    torch.func.grad(loss)(X)
    batched, level, maps = seen[0]
    assert batched == [level] == maps == [2]


def test_sparse_tensors_share_nothing():
    assert not levels.share_memory(X.to_sparse(), X)
