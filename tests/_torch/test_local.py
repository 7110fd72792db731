"""Local tensors: what they are, and that they end as ordinary ones."""

from __future__ import annotations

import torch

from torchbatch import vmap
from torchbatch._torch import local
from torchbatch._torch.local import LocalTensor

X = torch.arange(12.0).view(3, 4)


def test_adopt_and_settle():
    plain = torch.zeros(2)
    assert local.adopt(plain) is plain and type(plain) is LocalTensor
    local.settle(plain)
    assert type(plain) is torch.Tensor and not hasattr(plain, "_home")
    local.settle(plain)
    parameter = torch.nn.Parameter(torch.zeros(2))
    assert type(local.adopt(parameter)) is torch.nn.Parameter


def test_the_object_and_its_views_are_given_new_bodies():
    seen = []

    def write(x):
        room = torch.zeros(2, 4)
        view = room[1]
        ids = id(room), id(view)
        view += x
        seen.append((ids == (id(room), id(view)), type(room), type(view), view._parent is room))
        return room

    assert torch.equal(vmap(write)(X)[:, 1], X)
    assert seen == [(True, LocalTensor, LocalTensor, True)]


def test_an_operator_of_torch_ops_is_known_by_its_schema():
    def write(x):
        room = torch.zeros(4)
        torch.ops.aten.add_.Tensor(room, x)
        torch.ops.aten.copy_(room[:1], x[1:2])
        return room

    expected = X.clone()
    expected[:, 0] = X[:, 1]
    assert torch.equal(vmap(write)(X), expected)


def test_a_local_tensor_of_an_inner_map_becomes_one_of_the_outer():
    def outer(x):
        room = vmap(lambda s: torch.zeros(2).add_(0), out_axes=None)(x)
        room[0] = x[0]
        return room

    assert torch.equal(vmap(outer)(X)[:, 0], X[:, 0])
