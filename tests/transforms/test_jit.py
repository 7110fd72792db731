"""jit: when it traces, what it is, what it gives inside and around other transforms, threads."""

from __future__ import annotations

import copy
import functools
import inspect
import pickle
import threading

import pytest
import torch
import torch.utils.checkpoint
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

import torchbatch
from torchbatch import grad, jit, lax, vmap
from torchbatch.errors import AxisSpecError, InputTypeError
from torchbatch.testing import assert_close

replayed = functools.partial(jit, backend="eager")
X = torch.tensor([1.0, 2.0, 3.0])


def counted(fun):
    """The function, and a list that grows by one when Python runs it."""
    runs: list[int] = []

    @functools.wraps(fun)
    def run(*args, **kwargs):
        runs.append(1)
        return fun(*args, **kwargs)

    return run, runs


def double(x):
    """Twice."""
    return x * 2


replayed_double = replayed(double)


# When it traces


def test_one_signature_is_traced_once():
    fun, runs = counted(lambda x: x.sin() + 1)
    jitted = replayed(fun)
    for _ in range(3):
        assert_close(jitted(X), X.sin() + 1)
    assert len(runs) == 1 and jitted.cache_size() == 1


def test_inductor_traces_once_and_gives_the_same():
    fun, runs = counted(lambda x, w: torch.tanh(x @ w).sum(0))
    jitted = jit(fun)
    x, w = torch.randn(5, 3), torch.randn(3, 4)
    for scale in (1.0, 2.0, -1.0):
        assert_close(jitted(x * scale, w), torch.tanh(x * scale @ w).sum(0))
    assert len(runs) == 1


CHANGES = {
    "shape": lambda: torch.ones(4),
    "dimensions": lambda: torch.ones(3, 1),
    "dtype": lambda: X.double(),
    "integer": lambda: torch.arange(3),
    "device": lambda: X.to("meta"),
    "strides": lambda: torch.ones(6)[::2],
    "broadcast": lambda: torch.ones(1).expand(3),
    "requires_grad": lambda: X.clone().requires_grad_(),
    "number": lambda: 2.0,
    "list": lambda: [X],
    "tuple": lambda: (X,),
    "dict": lambda: {"x": X},
}


def first_leaf(x):
    while isinstance(x, list | tuple | dict):
        x = x["x"] if isinstance(x, dict) else x[0]
    return x * 2


@pytest.mark.parametrize("change", CHANGES)
def test_another_kind_of_argument_is_traced_anew(change):
    fun, runs = counted(first_leaf)
    jitted = replayed(fun)
    for count, argument in enumerate([X, CHANGES[change](), X, CHANGES[change]()]):
        got, want = jitted(argument), first_leaf(argument)
        if getattr(want, "is_meta", False):
            assert got.is_meta and got.shape == want.shape
        else:
            assert_close(got.detach(), torch.as_tensor(want).detach())
        assert len(runs) == min(count + 1, 2)


def test_the_order_of_keys_is_part_of_the_kind_of_call():
    fun, runs = counted(lambda p: [value - 1 for value in p.values()])
    jitted = replayed(fun)
    for _ in range(2):
        for params in ({"a": X, "b": 2 * X}, {"b": 2 * X, "a": X}):
            assert all(map(torch.equal, jitted(params), fun(params)))
    assert len(runs) == 2 + 4  # four calls without jit


def test_the_order_of_nested_keys_and_of_returned_ones():
    def update(trees, gradients):
        params = trees[0]["p"]
        return {key: value - gradient for (key, value), gradient in zip(params.items(), gradients, strict=True)}

    jitted = replayed(update)
    for params in ({"a": X, "b": X + 1}, {"b": X, "a": X + 1}):
        found, expected = jitted([{"p": params}], [X, 2 * X]), update([{"p": params}], [X, 2 * X])
        assert list(found) == list(expected) and all(torch.equal(found[key], expected[key]) for key in found)


def test_the_order_of_keyword_arguments_says_nothing():
    fun, runs = counted(lambda a, b: a - b)
    jitted = replayed(fun)
    assert torch.equal(jitted(a=X, b=2 * X), jitted(b=2 * X, a=X))
    assert len(runs) == 1


def test_a_compiled_function_refuses_another_order_of_keys():
    compiled = replayed(lambda p: next(iter(p.values())) * 1).lower({"a": X, "b": 2 * X}).compile()
    assert torch.equal(compiled({"a": X, "b": 2 * X}), X)
    with pytest.raises(InputTypeError, match=r"another kind of call: .*'a': .*, 'b': .* -> .*'b': .*, 'a'"):
        compiled({"b": 2 * X, "a": X})


@pytest.mark.parametrize(
    "context",
    [
        lambda: torch.autocast("cpu", torch.bfloat16),
        lambda: torch.autocast("cpu", torch.float16),
        lambda: torch.device("meta"),
    ],
)
def test_state_of_pytorch_is_part_of_the_signature(context):
    def fun(x):
        return x @ torch.ones(3, 2)

    fun, runs = counted(fun)
    jitted = replayed(fun)
    outside = jitted(X[None])
    with context():
        x = X[None].to(torch.get_default_device())
        want, got, again = fun(x), jitted(x), jitted(x)
    assert got.dtype == want.dtype == again.dtype and got.device == want.device
    assert torch.equal(jitted(X[None]), outside)
    assert len(runs) == 3, "one run by hand and two traces"


def test_default_dtype_is_part_of_the_signature():
    fun, runs = counted(lambda x: x * torch.ones(3))
    jitted = replayed(fun)
    assert jitted(torch.arange(3)).dtype == torch.float32
    torch.set_default_dtype(torch.float64)
    try:
        assert jitted(torch.arange(3)).dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert jitted(torch.arange(3)).dtype == torch.float32
    assert len(runs) == 2


@pytest.mark.parametrize("first", ["grad", "no_grad", "inference"])
def test_grad_mode_is_part_of_the_signature(first):
    x = X.clone().requires_grad_()
    modes = {"grad": torch.enable_grad, "no_grad": torch.no_grad, "inference": torch.inference_mode}
    order = [first, *(name for name in modes if name != first)]
    jitted = replayed(lambda x: x * 2)
    for name in [*order, *order]:
        with modes[name]():
            assert jitted(x).requires_grad is (name == "grad"), name


@pytest.mark.parametrize("first", ["grad", "no_grad"])
def test_grad_mode_matters_for_captured_tensors(first):
    w = torch.ones(3, requires_grad=True)
    modes = {"grad": torch.enable_grad, "no_grad": torch.no_grad}
    jitted = replayed(lambda x: x * w)
    for name in [first, *(name for name in modes if name != first)]:
        with modes[name]():
            assert jitted(X).requires_grad is (name == "grad"), name


def test_each_grad_mode_has_its_trace():
    fun, runs = counted(double)
    jitted = replayed(fun)
    jitted(X)
    with torch.no_grad():
        jitted(X)
    assert len(runs) == 2


def test_a_function_that_asks_for_the_grad_mode():
    jitted = replayed(lambda x: x * 2 if torch.is_grad_enabled() else x * 3)
    assert torch.equal(jitted(X), X * 2)
    with torch.no_grad():
        assert torch.equal(jitted(X), X * 3)


def test_captured_tensor_changed_in_place_is_not_traced_anew():
    w = torch.ones(3)
    fun, runs = counted(lambda x: x * w)
    jitted = replayed(fun)
    for value in (1.0, 5.0, -2.0):
        w.fill_(value)
        assert torch.equal(jitted(X), X * value)
    assert len(runs) == 1


def test_many_signatures_alternate():
    fun, runs = counted(lambda x: x.sum())
    jitted = replayed(fun)
    with pytest.warns(torchbatch.errors.RetraceWarning):
        for _ in range(2):
            for size in range(1, 21):
                assert jitted(torch.ones(size)) == size
    assert len(runs) == jitted.cache_size() == 20


def test_clear_cache():
    fun, runs = counted(double)
    jitted = replayed(fun)
    jitted(X)
    jitted.clear_cache()
    assert jitted.cache_size() == 0
    jitted(X)
    assert len(runs) == 2 and jitted.cache_size() == 1


def test_same_tensor_twice_is_one_signature():
    fun, runs = counted(lambda a, b: a * b)
    jitted = replayed(fun)
    assert torch.equal(jitted(X, X), X * X)
    assert torch.equal(jitted(X, 2 * X), 2 * X * X)
    assert torch.equal(jitted(X, X), X * X)
    assert len(runs) == 1


# What it is


def test_wrapper_looks_like_the_function():
    assert replayed_double.__name__ == "double" and replayed_double.__doc__ == "Twice."
    assert replayed_double.__wrapped__ is double
    assert inspect.signature(replayed_double) == inspect.signature(double)
    assert repr(replayed_double) == "<jit of double>"


@jit(backend="eager")
def decorated(x, y=1.0):
    return x + y


@jit
def decorated_bare(x):
    return x + 1


def test_decorator():
    assert torch.equal(decorated(X), X + 1) and torch.equal(decorated(X, 2.0), X + 2)
    assert torch.equal(decorated_bare(X), X + 1)
    assert jit(backend="eager")(double)(X).equal(X * 2)


def test_pickle_and_copy():
    assert pickle.loads(pickle.dumps(decorated)) is decorated
    again = pickle.loads(pickle.dumps(replayed_double))
    assert again.options == replayed_double.options and torch.equal(again(X), X * 2)
    replayed_double(X)
    assert torch.equal(copy.deepcopy(replayed_double)(X), X * 2)


class Scaler:
    def __init__(self, scale):
        self.scale = scale

    @functools.partial(jit, static_argnums=0, backend="eager")
    def numbered(self, x):
        return x * self.scale

    @jit(static_argnames="self", backend="eager")
    def named(self, x):
        return x * self.scale

    @staticmethod
    @jit(backend="eager")
    def static(x):
        return x * 2

    @classmethod
    @functools.partial(jit, static_argnums=0, backend="eager")
    def of_class(cls, x):
        return x * 4

    def plain(self, x, n):
        return x * self.scale * n

    def __call__(self, x):
        return x * self.scale


def test_methods():
    two, three = Scaler(2.0), Scaler(3.0)
    for one in (two, three, two):
        assert torch.equal(one.numbered(X), X * one.scale)
        assert torch.equal(one.named(X), X * one.scale)
    assert torch.equal(two.static(X), X * 2) and torch.equal(two.of_class(X), X * 4)
    assert torch.equal(replayed(two.plain, static_argnums=1)(X, 3), X * 6)
    assert torch.equal(replayed(two)(X), X * 2)


def test_module_is_a_function():
    model = torch.nn.Linear(3, 2)
    assert_close(replayed(model)(X), model(X))
    assert_close(replayed(model.forward)(X), model(X))


def test_a_module_that_changes_from_training_to_evaluation():
    model = torch.nn.Dropout(0.5)
    jitted = replayed(model)
    jitted(X)
    model.eval()
    assert torch.equal(jitted(X), X)


@pytest.mark.parametrize("fun", [torch.sin, torch.nn.functional.relu, torch.Tensor.exp])
def test_functions_of_pytorch(fun):
    assert_close(replayed(fun)(X), fun(X))


def test_partial():
    def fun(a, x, n):
        return a * x * n

    assert torch.equal(replayed(functools.partial(fun, 2), static_argnames="n")(X, n=3), X * 6)
    assert torch.equal(replayed(functools.partial(fun, 2), static_argnums=1)(X, 3), X * 6)
    assert torch.equal(functools.partial(replayed(fun), n=3)(2, X), X * 6)


def test_not_a_function():
    with pytest.raises(AxisSpecError, match="jit compiles a function, but it got 3 of type int"):
        jit(3)


def test_backend_given_as_a_function():
    seen = []

    def backend(graph, examples):
        seen.append([tuple(x.shape) for x in examples])
        return graph.forward

    w = torch.ones(3)
    jitted = jit(lambda x: x * w, backend=backend)
    assert torch.equal(jitted(X), X) and torch.equal(jitted(X), X)
    assert seen == [[(3,), (3,)]]


# Other transforms


def loss(w, x):
    return (torch.tanh(x @ w) ** 2).sum()


W = torch.randn(3, 2, generator=torch.Generator().manual_seed(0))
BATCH = torch.randn(5, 3, generator=torch.Generator().manual_seed(1))
HERE_AND_THERE = {
    "vmap": lambda f: vmap(f, (None, 0))(W, BATCH),
    "grad": lambda f: grad(f)(W, X),
    "vmap of grad": lambda f: vmap(grad(f), (None, 0))(W, BATCH),
    "grad of vmap": lambda f: grad(lambda w: vmap(f, (None, 0))(w, BATCH).sum())(W),
    "jvp": lambda f: torchbatch.jvp(lambda w: f(w, X), (W,), (W,)),
    "vjp": lambda f: torchbatch.vjp(lambda w: f(w, X), W)[1](torch.ones(())),
    "jacrev": lambda f: torchbatch.jacrev(f)(W, X),
    "jacfwd": lambda f: torchbatch.jacfwd(f)(W, X),
    "hessian": lambda f: torchbatch.hessian(f)(W, X),
    "torch.func.hessian": lambda f: torch.func.hessian(f)(W, X),
    "torch.func.vmap": lambda f: torch.func.vmap(f, (None, 0))(W, BATCH),
    "jit": lambda f: replayed(f)(W, X),
    "autograd": lambda f: torch.autograd.functional.jacobian(lambda w: f(w, X), W),
    "checkpoint": lambda f: torchbatch.checkpoint(f)(W, X),
}


@pytest.mark.parametrize("name", HERE_AND_THERE)
def test_inside_other_transforms(name):
    transform = HERE_AND_THERE[name]
    want = transform(loss)
    inner = replayed(loss)
    inner(W, X)  # a call that has a trace must not be served by it inside
    assert_close(transform(inner), want)
    assert_close(transform(replayed(loss)), want)


@pytest.mark.parametrize("name", [name for name in HERE_AND_THERE if name != "autograd"])
def test_around_other_transforms(name):
    transform = HERE_AND_THERE[name]
    assert_close(replayed(lambda: transform(loss))(), transform(loss))
    assert_close(replayed(lambda: transform(replayed(loss)))(), transform(loss))


def test_inner_jit_is_traced_by_the_outer_and_keeps_no_trace():
    inner = replayed(double)
    outer = replayed(lambda x: inner(x) + 1)
    assert torch.equal(outer(X), X * 2 + 1)
    assert inner.cache_size() == 0 and outer.cache_size() == 1


def test_per_example_gradients_compiled_by_inductor():
    jitted = jit(vmap(grad(loss), (None, 0)))
    assert_close(jitted(W, BATCH), vmap(grad(loss), (None, 0))(W, BATCH))


def test_collectives():
    def fun(x):
        return x - lax.pmean(x, "i") + lax.axis_index("i") * lax.axis_size("i")

    mapped = vmap(fun, axis_name="i")
    assert_close(replayed(mapped)(X), mapped(X))
    assert_close(vmap(replayed(fun), axis_name="i")(X), mapped(X))


def test_torch_compile():
    jitted = replayed(lambda x: vmap(lambda a: a * 2)(x))
    assert torch.equal(torch.compile(jitted, backend="eager", fullgraph=True)(X), X * 2)
    replayed_double(X)
    assert torch.equal(torch.compile(lambda x: replayed_double(x) + 1, backend="eager", fullgraph=True)(X), X * 2 + 1)


def test_make_fx_and_eval_shape_look_inside():
    replayed_double(X)
    assert "aten.mul" in make_fx(replayed_double)(X).code
    assert torchbatch.eval_shape(replayed_double, X).shape == (3,)


def test_forward_mode_ad():
    jitted = replayed(torch.sin)
    jitted(X)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(X, torch.ones(3))
        assert_close(forward_ad.unpack_dual(jitted(dual)).tangent, X.cos())
    assert_close(jitted(X), X.sin())


def test_forward_mode_ad_inside():
    def tangent(x):
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(forward_ad.make_dual(x, torch.ones_like(x)).sin()).tangent

    assert_close(replayed(tangent)(X), X.cos())


# Threads


def test_threads_call_one_function():
    fun, runs = counted(lambda x: x * 2)
    jitted = replayed(fun)
    start, results = threading.Barrier(4), []

    def work():
        start.wait()
        for i in range(60):
            x = torch.full((i % 5 + 1,), float(i))
            results.append(torch.equal(jitted(x), x * 2))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 240
    assert len(runs) == jitted.cache_size() == 5


def test_threads_trace_while_others_run_plain_pytorch():
    start, results = threading.Barrier(4), []

    def trace(k):
        w = torch.full((3,), float(k), requires_grad=True)
        start.wait()
        for i in range(5):
            x = torch.randn(4, 3)
            value = replayed(vmap(lambda x, i=i: (x * w * i).sum()))(x)
            value.sum().backward()
            results.append(torch.allclose(w.grad, x.sum(0) * i, atol=1e-5))
            w.grad = None

    def plain():
        model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Tanh())
        start.wait()
        for _ in range(30):
            x = torch.randn(4, 3)
            want = torch.tanh(x @ model[0].weight.T + model[0].bias)
            results.append(type(model(x)) is torch.Tensor and torch.allclose(model(x), want, atol=1e-6))

    threads = [threading.Thread(target=trace, args=(k,)) for k in (1, 2)]
    threads += [threading.Thread(target=plain) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 70


def test_backward_runs_in_another_thread():
    x = X.clone().requires_grad_()
    y = replayed(lambda x: (x**2).sum())(x)
    thread = threading.Thread(target=y.backward)
    thread.start()
    thread.join()
    assert torch.equal(x.grad, 2 * X)
