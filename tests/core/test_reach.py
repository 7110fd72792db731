"""Which modules a function refers to."""

from __future__ import annotations

import functools
import types
from collections import deque

import pytest
import torch
from torch import nn

from torchbatch import grad, jit, vmap
from torchbatch.core import reach
from torchbatch.core.reach import modules_of

A, B = nn.Linear(2, 2), nn.Linear(2, 2)
SETTINGS = types.ModuleType("settings")
SETTINGS.model, SETTINGS.other = A, B


def helper(x):
    return A(x)


def by_helper(x):
    return helper(x)


def nested(x):
    return [(lambda: A(y))() for y in x]


def by_python_module(x):
    return SETTINGS.model(x)


def recursive(x):
    return recursive(x) if x else A


def decorated(fun):
    @functools.wraps(fun)
    def call(*args):
        return fun(*args)

    return call


class Holder:
    shared = A

    @property
    def computed(self):
        return A

    @functools.cached_property
    def found(self):
        return A

    @staticmethod
    def static(x):
        return A(x)

    def method(self, x):
        return A(x)


class Slots:
    __slots__ = ("module",)


class Proxy:
    """As of frameworks: what it stands for is not there yet."""

    @property
    def __class__(self):
        raise RuntimeError("working outside of a request")


class Outer(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.value = [value]


FOUND = {
    "itself": A,
    "a method": A.forward,
    "a helper": by_helper,
    "nested code": nested,
    "a member of a Python module": by_python_module,
    "a recursive function": recursive,
    "a closure": (lambda module: lambda x: module(x))(A),
    "a default": lambda x, module=A: module(x),
    "a default by name": lambda x, *, module=A: module(x),
    "a partial": functools.partial(print, A),
    "a keyword of a partial": functools.partial(print, end=A),
    "containers": [({"a": deque([A])},), {1, 2}],
    "a decorator": decorated(helper),
    "transforms": jit(vmap(grad(helper))),
    "no_grad": torch.no_grad()(helper),
    "what the class of an object holds": Holder(),
    "a class": Holder,
}


@pytest.mark.parametrize("name", FOUND)
def test_found(name):
    assert modules_of([FOUND[name]]) == [A]


def test_attributes_of_objects_and_modules():
    holder = Slots.__new__(Slots)
    assert modules_of([holder, Proxy()]) == []
    outer = Outer(Outer(B))
    outer.register_forward_hook(lambda *args: A)
    assert {id(module) for module in modules_of([outer])} == {id(outer), id(outer.value[0]), id(A), id(B)}


@pytest.mark.parametrize("root", [torch.sin, lambda x: x * 2, torch, 3, None, [], vmap(torch.sin)])
def test_nothing_found(root):
    assert modules_of([root]) == []


def test_there_is_an_end(monkeypatch):
    monkeypatch.setattr(reach, "_MOST", 10)
    assert modules_of([[[i] for i in range(100)] + [A]]) == []
