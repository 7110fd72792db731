"""Rule 17: a per-sample value that outlives its ``vmap`` is an error where it is next used; nothing else ever is."""

from __future__ import annotations

import functools
import gc
import subprocess
import sys
import threading
import time

import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp
from torch.func import vmap as tvmap

import torchbatch
from torchbatch import vmap
from torchbatch._torch.escape import EscapedTensor
from torchbatch.errors import EscapedValueError
from torchbatch.testing import assert_close, loop

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
TEXT = (
    "a per-sample value is used after the vmap that it belongs to has finished: it escaped through a global, a closure, a list "
    "or an attribute. Return it from the mapped function instead."
)


class Box:
    """Somewhere to keep a value."""

    kept = None


@pytest.fixture(params=["collector on", "collector off"], autouse=True)
def collector(request):
    was = gc.isenabled()
    if request.param == "collector off":
        gc.disable()
    yield
    if was:
        gc.enable()


def keep_in_list(box, x):
    box.kept = [*(box.kept or [])[-2:], x * 2]
    return x


def keep_argument(box, x):
    box.kept = x
    return x * 2


def keep_and_return(box, x):
    box.kept = x * 2
    return box.kept


def keep_in_closure(box, x):
    box.kept = lambda: x + 1
    return x


def keep_generator(box, x):
    box.kept = (x * i for i in range(3))
    return x


def keep_method(box, x):
    box.kept = x.sum
    return x


def keep_attribute(box, x):
    x.aside = x * 3
    box.kept = x
    return x * 1


def keep_in_tree(box, x):
    box.kept = {"a": ({"b": x.view(2, 2)},)}
    return {"a": x, "b": [x * 2]}


def keep_under_grad(box, x):
    def loss(y):
        box.kept = y * 2
        return (y**2).sum()

    return grad(loss)(x)


def keep_detached(box, x):
    box.kept = x.detach()
    return x


def keep_written(box, x):
    box.kept = torch.zeros(4)
    box.kept[0] = x[0]
    return x


def keep_parameter(box, x):
    box.kept = torch.nn.Parameter(x * 1)
    return x


def keep_inner(box, x):
    def inner(s):
        box.kept = s + 1
        return s

    return vmap(inner)(x)


def keep_outer(box, x):
    box.kept = x + 1
    return vmap(lambda s: s * 2)(x)


def keep_and_collect(box, x):
    box.kept = x + 1
    gc.collect(1)
    return x


def keep_while_collecting(box, x):
    gc.collect(1)
    box.kept = x + 1
    gc.collect(0)
    junk = [[] for _ in range(2000)]
    return x + len(junk)


def keep_and_fail(box, x):
    box.kept = x + 1
    raise KeyError("here")


def used(kept):
    """Use what was kept, however it was."""
    while not isinstance(kept, torch.Tensor):
        if isinstance(kept, list):
            kept = kept[-1]
        elif isinstance(kept, dict):
            kept = kept["a"][0]["b"]
        else:
            kept = kept() if callable(kept) else next(kept)
    return getattr(kept, "aside", kept) + 1


KEEPERS = [fun for name, fun in list(globals().items()) if name.startswith("keep_")]


@pytest.mark.parametrize("options", [{}, {"chunk_size": 1}, {"randomness": "different"}], ids=str)
@pytest.mark.parametrize("keeper", KEEPERS)
def test_an_escaped_value_is_an_error_where_it_is_next_used(keeper, options):
    box = Box()
    mapped = vmap(functools.partial(keeper, box), **options)
    for _ in range(4):
        try:
            mapped(X)
        except KeyError:
            assert keeper is keep_and_fail
        if keeper is keep_and_return and not isinstance(box.kept, torch.Tensor):
            continue
        with pytest.raises(EscapedValueError) as caught:
            used(box.kept)
        assert str(caught.value) == TEXT


@pytest.mark.parametrize("keeper", [keep_argument, keep_in_list, keep_written])
def test_in_another_vmap_too(keeper):
    box = Box()
    vmap(functools.partial(keeper, box))(X)
    for use in (lambda x: x + box_tensor(box), lambda x: torch.stack([x, box_tensor(box)]), lambda x: box_tensor(box)):
        with pytest.raises(EscapedValueError):
            vmap(use)(X)
    with pytest.raises(EscapedValueError, match=r"^argument x is a per-sample value that escaped from a vmap that has finished"):
        vmap(lambda x: x)(box_tensor(box))


def box_tensor(box):
    return box.kept[-1] if isinstance(box.kept, list) else box.kept


def test_an_inner_value_used_in_the_outer_function():
    def outer(x):
        box = Box()
        vmap(functools.partial(keep_argument, box))(x)
        return box.kept + x[0]

    with pytest.raises(EscapedValueError):
        vmap(outer)(X)


def test_one_value_dies_while_another_escapes():
    """The count of objects alone does not give such a value away."""
    box, junk = Box(), []

    def fun(x):
        junk.clear()
        box.kept = x * 2
        return x * 3

    mapped = vmap(fun)
    for count in (0, 1, 2, 5, 40, 0):
        box.kept = None
        junk.extend([] for _ in range(count))
        mapped(X)
        with pytest.raises(EscapedValueError):
            used(box.kept)


def test_what_is_left_can_be_looked_at():
    box = Box()
    vmap(functools.partial(keep_argument, box))(X)
    assert repr(box.kept) == "<per-sample value of a vmap that has finished>"
    assert isinstance(box.kept, torch.Tensor)


def test_in_a_thread():
    box, errors = Box(), []

    def work():
        time.sleep(0.05)  # the count of objects is that of all threads: let the other one come to rest
        vmap(functools.partial(keep_argument, box))(X)
        try:
            used(box.kept)
        except EscapedValueError as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert len(errors) == 1


# --- no false alarm ---------------------------------------------------------------------------------------------------


class Remembers(torch.nn.Module):
    """A module that stores attributes, caches and counts, all of them the same for every sample."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(4, 4)
        self.calls, self.table, self.cache = 0, None, {}
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        self.seen += 1
        if self.table is None:
            self.table = torch.arange(4.0)
            self.mask = torch.ones(4, 4).tril()
        self.cache.setdefault(x.shape, torch.ones(x.shape))
        return self.linear(x) + self.table @ self.mask + self.cache[x.shape]


@functools.lru_cache
def table(n):
    return torch.arange(float(n)).view(1, n).expand(2, n)


REMEMBERS, MLP = Remembers(), torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
LOG, ALIVE = [], {"w": torch.ones(4), "list": [torch.zeros(4)]}
PARAMETERS = dict(MLP.named_parameters())


def logs_shapes(x):
    LOG.append((x.shape, x.dtype, object()))
    return x * 2


def catches(x):
    try:
        raise ValueError(x)
    except ValueError:
        return x + 1


def grows_junk(x):
    LOG.extend([[i] for i in range(300)])
    del LOG[:250]
    return x.sin()


def recursive(x, depth=3):
    return x if not depth else recursive(x.sin(), depth - 1) + 1


def cyclic(x):
    node = {"x": x}
    node["self"] = node
    return node["x"] * 2


def replaces_a_global(x):
    ALIVE["w"] = torch.ones(4) * 2
    ALIVE["list"].append(torch.zeros(4))
    return x * ALIVE["w"]


INNOCENT = {
    "identity": lambda x: x,
    "arithmetic": lambda x: x * 2 + 1,
    "tree": lambda x: {"a": x, "b": [x * 2, (x.sum(), None)]},
    "view": lambda x: x.view(2, 2).t(),
    "many views": lambda x: [x[i:] for i in range(4)],
    "constant": lambda x: torch.ones(2),
    "numbers": lambda x: (1, 2.0, True),
    "closed over": lambda x: x * ALIVE["w"],
    "global returned": lambda x: ALIVE["list"][0],
    "module": lambda x: MLP(x),
    "module with state": lambda x: REMEMBERS(x),
    "functional_call": lambda x: functional_call(MLP, PARAMETERS, (x,)),
    "lru_cache": lambda x: table(4) + x,
    "log": logs_shapes,
    "exception": catches,
    "junk": grows_junk,
    "recursion": recursive,
    "cycle": cyclic,
    "global replaced": replaces_a_global,
    "generator": lambda x: sum(x[i] for i in range(4)),
    "sorted": lambda x: sorted([3, 1, 2])[0] * x,
    "string": lambda x: x * len(f"{x.shape}"),
    "collects": lambda x: x * (gc.collect(1) >= 0),
    "writes": lambda x: torch.zeros(2, 4).index_add_(0, torch.tensor([0]), x[None]),
    "grad": grad(lambda x: (x**2).sum()),
    "torchbatch.grad": torchbatch.grad(lambda x: (x**2).sum()),
    "grad of parameters": lambda x: grad(lambda p: functional_call(MLP, p, (x,)).sum())(PARAMETERS),
    "value_and_grad": torchbatch.value_and_grad(lambda x: (x**2).sum()),
    "jvp": lambda x: jvp(torch.sin, (x,), (x,)),
    "vjp": lambda x: vjp(torch.sin, x)[1](x),
    "jacrev": jacrev(torch.sin),
    "jacfwd": jacfwd(torch.sin),
    "hessian": hessian(lambda x: (x**3).sum()),
    "nested": lambda x: vmap(lambda s: s * x)(x),
    "nested twice": lambda x: vmap(lambda s: vmap(lambda t: t * s)(x))(x),
    "torch.func.vmap": lambda x: tvmap(lambda s: s * 2)(x),
    "nested grad": lambda x: vmap(grad(lambda s: s * s))(x),
    "inner constant": lambda x: vmap(lambda s: torch.ones(()), axis_size=2, in_axes=None)(x),
    "detach": lambda x: x.detach() + x,
    "no_grad": torch.no_grad()(lambda x: x * 2),
    "clone": lambda x: x.clone(),
    "in place": lambda x: x.clone().add_(1),
    "softmax": lambda x: F.softmax(x, -1),
    "where": lambda x: torch.where(x > 0, x, 0.0),
    "cat": lambda x: torch.cat([x, x]),
    "split": lambda x: torch.split(x, 2),
    "einsum": lambda x: torch.einsum("i,j->ij", x, x),
}


@pytest.mark.parametrize("options", [{}, {"chunk_size": 2}, {"in_axes": 1, "out_axes": -1}], ids=str)
@pytest.mark.parametrize("name", INNOCENT)
def test_innocent_programs_never_raise_a_false_alarm(name, options):
    """Each runs several times; what it returned, and every tensor that was there before, stays as it was."""
    x = X.clone()
    mine = [x, *PARAMETERS.values(), *REMEMBERS.parameters(), *ALIVE["list"]]
    mapped, results = vmap(INNOCENT[name], **options), []
    axis = {"in_axes": options.get("in_axes", 0)}
    square = x[:, :3].repeat(2, 2)[:4, :4] if axis["in_axes"] else x
    for _ in range(5):
        results.append(mapped(square))
    expected = loop(INNOCENT[name], **options)(square)
    for result in results:
        assert_close(result, expected)
    assert not any(isinstance(t, EscapedTensor) for t in mine)


def test_an_outer_transforms_values_are_left_alone():
    """An inner map that ends does not touch what outer transforms, PyTorch's own too, still need."""

    def outer(x):
        before = [x * i for i in range(3)]
        gc.collect(1)
        Box.kept = vmap(lambda s: s * x)(x)
        return torch.stack(before).sum(0) + Box.kept.sum(0)

    expected = torch.stack([x * 3 + (x[:, None] * x).sum(0) for x in X])
    for transform in (vmap, tvmap, lambda f: lambda x: torch.stack([jvp(f, (row,), (row,))[0] for row in x])):
        Box.kept = None
        assert_close(transform(outer)(X), expected)
    Box.kept = None


def test_a_suspended_generator_keeps_its_own():
    def rows(x):
        for row in x:
            yield vmap(torch.sin)(row)

    def total(x):
        first, second = rows(x.view(2, 2)), rows(x.view(2, 2).t())
        return sum(a + b for a, b in zip(first, second, strict=True))

    assert_close(vmap(total)(X), loop(total)(X))


def test_threads_do_not_lose_their_values():
    errors = []

    def work(seed):
        box = Box()
        x = torch.randn(5, 4, generator=torch.Generator().manual_seed(seed))
        try:
            for i in range(30):
                if i % 3 == 0:
                    vmap(functools.partial(keep_argument, box))(x)  # something to look for, while others are at work
                assert_close(vmap(lambda r: vmap(lambda s: s * r)(r) @ r)(x), x * (x * x).sum(1, keepdim=True))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


MAKING = """
import gc, sys, threading, torchbatch
kept = [{} for _ in range(1000)]  # so that the dictionaries of a threading.local must be allocated
for threshold in range(2, 12):
    gc.set_threshold(threshold)  # the collector starts in the middle of the making of some
    kept += [threading.local() for _ in range(200)]
print("alive")
"""


def test_the_look_at_young_objects_survives_those_that_are_being_made():
    done = subprocess.run([sys.executable, "-c", MAKING], capture_output=True, text=True, check=False)
    assert done.stdout == "alive\n", done.stderr[-500:]
