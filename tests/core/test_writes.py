"""Whether a function may write into a tensor that it makes: never a wrong no, and a no for what is common and pure."""

from __future__ import annotations

import contextlib
import functools
import operator
import types
from operator import iadd

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import torchbatch
from torchbatch.core import writes
from torchbatch.core.writes import may_write
from torchbatch.testing import assert_close

FOLLOWED = pytest.mark.skipif(not writes._FOLLOWED, reason="the code of this Python version is not read")
W, OUT = torch.ones(2, 2), {"out": torch.zeros(2)}


def writer(x):
    out = torch.zeros(3)
    out[0] = x
    return out


class Function(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return writer(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass


class Thing:
    def method(self, x):
        return writer(x)

    def template(self, x):
        return self.method(x)

    @property
    def hidden(self):
        return writer(W[0, 0])

    @functools.cached_property
    def cached(self):
        return writer(W[0, 0])

    def with_property(self, x):
        return x + self.hidden

    def with_cached(self, x):
        return x + self.cached

    def recursive(self, x):
        return self.recursive(x) if x is None else self.method(x)

    def __call__(self, x):
        return writer(x)


class WritingModule(nn.Module):
    def __init__(self):
        super().__init__()
        self.step = writer

    def forward(self, x):
        return self.step(x)


class BySuper(WritingModule):
    def forward(self, x):
        return super().forward(x)


class InALoop(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([WritingModule()])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def hooked():
    module = nn.Linear(2, 2)
    module.register_forward_hook(lambda module, args, output: output.add_(1))
    return module


def recursion(x):
    return recursion(x) if x is None else writer(x)


def keyword_default(x, *, f=writer):
    return torch.func.grad(f)(x)


def default(x, f=writer):
    return torch.func.grad(f)(x)


def generator(x):
    yield writer(x)


def closed(f):
    return lambda x: f(x)


def closed_deep(f):
    return lambda x: [f(y) for y in x]


def with_import(x):
    from math import pi

    return x * pi


thing, table, tables = Thing(), [[writer]], {"a": {"b": (writer,)}}
in_place = functools.partial(torch.Tensor.add_)

WRITES = {
    "an item": writer,
    "a slice": lambda x: (out := torch.zeros(3), out.__setitem__(slice(0, 1), x)),
    "a method that ends in _": lambda x: torch.zeros(2).add_(x),
    "copy_ of an index": lambda x: torch.zeros(2)[0].copy_(x),
    "__setitem__": lambda x: torch.zeros(2).__setitem__(0, x),
    "__iadd__": lambda x: torch.zeros(2).__iadd__(x),
    "__setitem__ of the class": lambda x: torch.Tensor.__setitem__(torch.zeros(2), 0, x),
    "operator.setitem": lambda x: operator.setitem(torch.zeros(2), 0, x),
    "operator.iadd imported": lambda x: iadd(torch.zeros(2), x),
    "operator.iadd itself": operator.iadd,
    "methodcaller": operator.methodcaller("add_", 1),
    "out=": lambda x: torch.add(x, 1, out=torch.zeros(2)),
    "**options": lambda x: torch.add(x, 1, **OUT),
    "inplace=": lambda x: F.relu(x, inplace=True),
    "an operator": lambda x: torch.ops.aten.add_.Tensor(torch.zeros(2), x),
    "_foreach_": lambda x: torch._foreach_add_([torch.zeros(2)], [x]),
    "nn.init": lambda x: nn.init.zeros_(torch.zeros(2)),
    ".data": lambda x: torch.zeros(2).data.fill_(x),
    "a method of torch": torch.Tensor.add_,
    "getattr": lambda x: getattr(torch.zeros(2), "add_")(x),  # noqa: B009
    "map": lambda x: list(map(writer, x)),
    "a global function": lambda x: writer(x),
    "recursion": recursion,
    "a global partial": lambda x: in_place(torch.zeros(2), x),
    "a partial": functools.partial(writer),
    "a partial's argument": functools.partial(lambda f, x: f(x), writer),
    "a closure": closed(writer),
    "a comprehension": lambda x: [writer(y) for y in x],
    "a comprehension over a closure": closed_deep(writer),
    "a callable argument": lambda f, x: f(x),
    "a callable argument in a comprehension": lambda f, x: [f(y) for y in x],
    "a local name": lambda x: (lambda f: f(x))(writer),
    "a default": default,
    "a keyword default": keyword_default,
    "a list of functions": lambda x: table[0][0](x),
    "a dict of functions": lambda x: tables["a"]["b"][0](x),
    "an argument's list of functions": lambda fs, x: fs[0](x),
    "a method": thing.method,
    "a method that calls one": thing.template,
    "a recursive method": thing.recursive,
    "a method of a global": lambda x: thing.method(x),
    "a property": thing.with_property,
    "a property of a global": lambda x: x + thing.hidden,
    "a cached property": thing.with_cached,
    "a callable object": thing,
    "a callable global object": lambda x: thing(x),
    "a class": lambda x: Thing().method(x),
    "a generator": lambda x: next(generator(x)),
    "a sort key": lambda x: sorted([x], key=writer),
    "an import": with_import,
    "an unknown name": lambda x: not_yet_defined(x),  # noqa: F821
    "an unknown attribute": lambda x: torch.not_yet_defined(x),
    "an autograd function": lambda x: Function.apply(x),
    "a module": WritingModule(),
    "a module in a Sequential": nn.Sequential(nn.ReLU(), WritingModule()),
    "a module called": WritingModule().__call__,
    "a method of a module": lambda x: WritingModule.forward(x),
    "super": BySuper(),
    "a module in a loop": InALoop(),
    "an inplace module": nn.Sequential(nn.ReLU(inplace=True)),
    "a hook": hooked(),
    "functional_call": lambda x: torch.func.functional_call(module_that_writes, {}, (x,)),
    "a wrapped function": functools.wraps(writer)(lambda *args: writer(*args)),
    "lru_cache": functools.lru_cache(writer),
    "vmap": torchbatch.vmap(writer),
    "vmap inside": lambda x: torchbatch.vmap(writer)(x),
    "torch.func.grad": torch.func.grad(writer),
    "torch.func.grad inside": lambda x: torch.func.grad(writer)(x),
    "checkpoint": lambda x: torch.utils.checkpoint.checkpoint(writer, x, use_reentrant=False),
    "a conditional function": lambda x: (writer if x is None else torch.sin)(x),
    "an augmented assignment": None,
    "too much to follow": lambda x: many(x),
}
module_that_writes = WritingModule()


def augmented(x):
    out = torch.zeros(2)
    out += x
    return out


WRITES["an augmented assignment"] = augmented
many = functools.partial(torch.sin, *[[i] for i in range(300)])


@pytest.mark.parametrize("name", WRITES)
def test_a_function_that_writes(name):
    assert may_write(WRITES[name]) is True


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.scale = nn.Linear(2, 3), nn.Linear(3, 1), 2.0

    def forward(self, x):
        return self.second(torch.relu(self.first(x))).squeeze(-1) * self.scale * self.factor

    @property
    def factor(self):
        return 2.0


class Scaled(nn.Linear):
    pass


mlp = Mlp()
network = nn.Sequential(
    nn.Linear(2, 2), nn.ReLU(), nn.LayerNorm(2), nn.Conv2d(1, 1, 1), nn.BatchNorm1d(2), nn.Dropout(), nn.MaxPool2d(2)
)


def mse(params, x, y):
    return F.mse_loss(torch.func.functional_call(mlp, params, (x,)), y)


def predict(params, x):
    for w, b in params[:-1]:
        x = torch.tanh(x @ w + b)
    return x @ params[-1][0]


def repeated(x, n=3):
    return x if n == 0 else repeated(x * 2, n - 1)


PURE = {
    "recursion": repeated,
    "identity": lambda x: x,
    "arithmetic": lambda x: x * 2 + 1,
    "a function of torch": torch.sin,
    "a built-in function": abs,
    "a method of torch": torch.Tensor.sum,
    "a partial": functools.partial(torch.add, alpha=2),
    "a global tensor": lambda x: (x @ W).softmax(-1).argmax(),
    "a closed tensor": closed(torch.cos),
    "functional": lambda x: F.gelu(F.layer_norm(x, (2,))),
    "linalg": lambda a: torch.linalg.svd(a)[1],
    "einsum": lambda a, b: torch.einsum("i,i->", a, b),
    "numpy": lambda x: x * np.pi,
    "containers": lambda params, x: {"a": torch.tanh(x @ params["w"] + params["b"]), "s": (x.sum(), x.max(0).values)},
    "a comprehension": lambda x: torch.stack([x * i for i in range(3)]),
    "zip": lambda x, y: sum(a * b for a, b in zip(x, y, strict=True)),
    "a check": lambda x: x if isinstance(x, torch.Tensor) else torch.tensor(x),
    "where": lambda x: torch.where(x > 0, x, torch.zeros_like(x)),
    "shapes": lambda x: x.reshape(x.shape[0] * len(x)).T,
    "a loop": predict,
    "a linear layer": nn.Linear(2, 2),
    "a subclass of one": Scaled(2, 2),
    "a network": network,
    "a module": mlp,
    "a loss": mse,
    "functional_call": lambda p, x: torch.func.functional_call(network, p, (x,)),
    "grad": torch.func.grad(mse),
    "torchbatch's vmap": torchbatch.vmap(lambda x: x * 2),
    "a nested map": lambda x: torch.func.vmap(lambda y: y * 2)(x),
}


@FOLLOWED
@pytest.mark.parametrize("name", PURE)
def test_a_function_that_does_not(name):
    assert may_write(PURE[name]) is False


def test_other_versions_of_python_are_not_read(monkeypatch):
    monkeypatch.setattr(writes, "_FOLLOWED", False)
    assert may_write(torch.sin)


@FOLLOWED
def test_properties_are_not_run():
    class Touchy:
        @property
        def value(self):
            raise RuntimeError("touched")

        def method(self, x):
            return x * self.value

    assert may_write(Touchy().method) is False


def test_a_property_without_python_code_is_unknown():
    class Odd:
        value = property(operator.attrgetter("other"))

        def method(self, x):
            return x * self.value

    assert may_write(Odd().method)


@FOLLOWED
def test_an_inherited_template_method_may_call_anything():
    class Loader(torch.utils.data.Dataset):
        def __getitem__(self, index):
            return writer(index)

    loader = Loader()
    assert may_write(loader.__add__)


HOOKS = {
    "forward": (nn.Module.register_forward_hook, nn.modules.module.register_module_forward_hook),
    "forward_pre": (nn.Module.register_forward_pre_hook, nn.modules.module.register_module_forward_pre_hook),
    "backward": (nn.Module.register_full_backward_hook, nn.modules.module.register_module_full_backward_hook),
    "backward_pre": (nn.Module.register_full_backward_pre_hook, nn.modules.module.register_module_full_backward_pre_hook),
}


@FOLLOWED
@pytest.mark.parametrize("kind", HOOKS)
def test_hooks_of_every_kind(kind):
    of_one, of_all = HOOKS[kind]
    module = nn.Linear(2, 2)
    assert not may_write(module)
    with contextlib.closing(types.SimpleNamespace(close=of_all(lambda *args: writer(args[-1])).remove)):
        assert may_write(module)
    assert not may_write(module)
    of_one(module, lambda *args: writer(args[-1]))
    assert may_write(module)


@FOLLOWED
def test_what_is_known_of_code_is_forgotten_at_some_point(monkeypatch):
    monkeypatch.setattr(writes, "_MOST_KNOWN", 1)
    assert may_write(writer) and not may_write(lambda x: x) and may_write(writer)
    assert len(writes._known) <= 2


def test_a_cell_that_is_still_empty():
    def outer():
        def inner(x):
            return later(x)

        found = may_write(inner)
        later = torch.sin
        return found, later

    assert outer()[0] in (True, False)


@pytest.mark.parametrize("name", ["an item", "an augmented assignment", "a method that ends in _"])
def test_writes_work_where_the_answer_is_yes(name):
    x = torch.arange(3.0)
    found = torchbatch.vmap(WRITES[name])(x)
    assert_close(found, torchbatch.testing.loop(WRITES[name])(x))
