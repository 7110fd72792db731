"""The axes in scope, one stack per thread."""

from __future__ import annotations

import threading

import pytest
import torch

from torchbatch import vmap
from torchbatch._torch import levels
from torchbatch.core.frames import in_scope


def test_nothing_is_in_scope_at_first():
    assert in_scope.stack == []


def test_a_frame_has_name_size_and_level():
    seen = []
    vmap(lambda x: (seen.append(list(in_scope.stack)), x)[1], axis_name="i")(torch.zeros(5))
    ((frame,),) = seen
    assert frame[:2] == ("i", 5) and frame[2] >= 1
    assert in_scope.stack == []


def test_levels_grow_inwards():
    seen = []
    inner = vmap(lambda x: (seen.append([frame[2] for frame in in_scope.stack]), x)[1])
    vmap(lambda x: torch.func.grad(lambda x: inner(x).sum())(x))(torch.zeros(2, 3))
    assert seen and all(found == sorted(found) and len(found) == 2 for found in seen)


def test_an_exception_leaves_nothing_in_scope():
    def fails(x):
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        vmap(lambda x: vmap(fails)(x))(torch.zeros(2, 3))
    assert in_scope.stack == [] and levels.depth() == 0


def test_keyboard_interrupts_leave_nothing_in_scope():
    def stops(x):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        vmap(stops)(torch.zeros(2))
    assert in_scope.stack == [] and levels.depth() == 0


def test_threads_have_their_own():
    seen = {}

    def look(x):
        thread = threading.Thread(target=lambda: seen.update(other=list(in_scope.stack)))
        thread.start()
        thread.join()
        seen["own"] = len(in_scope.stack)
        return x

    vmap(look)(torch.zeros(2))
    assert seen == {"other": [], "own": 1}
