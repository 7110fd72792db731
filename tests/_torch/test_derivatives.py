"""Reverse and forward mode on flat tensors, held to torch.func."""

from __future__ import annotations

import gc
import sys
import threading

import pytest
import torch
from torch.autograd import forward_ad
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode

from torchbatch._torch import derivatives, levels
from torchbatch._torch.derivatives import jvp, value_and_gradient, vjp
from torchbatch.testing import assert_close
from torchbatch.transforms.vmap import vmap

X = torch.tensor([0.5, -1.0, 2.0])
Y = torch.tensor([1.0, 3.0, -2.0])
ONES = torch.ones(3)
VMAPS = pytest.mark.parametrize("mapped", [torch.func.vmap, vmap], ids=["torch.func.vmap", "torchbatch.vmap"])


def flat(*functions):
    """A flat function from some of the same arguments to one output each."""
    return lambda *inputs: (tuple(function(*inputs) for function in functions), ())


def cube(x):
    return x * x * x


def grad(function):
    """The gradient by the first argument."""
    return lambda x, *rest: value_and_gradient(flat(lambda v: function(v, *rest)), (x,))[1][0]


def push(function):
    """The derivative along a tangent."""
    return lambda x, t: jvp(flat(function), (x,), (t,))[1][0]


def pull(function):
    """The derivative along a cotangent."""
    return lambda x, c: vjp(flat(function), (x,))[2]((c,))[0]


def push_ones(function):
    """The derivative along a tangent of ones."""
    return lambda x: push(function)(x, torch.ones_like(x))


def pull_ones(function):
    """The derivative along a cotangent of ones."""
    return lambda x: pull(function)(x, torch.ones_like(x))


def state():
    """All that a transform switches, and must put back."""
    functorch = torch._C._functorch
    return (
        levels.depth(),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch._C._is_fwd_grad_enabled(),
        functorch.get_inplace_requires_grad_allowed(),
        torch._C._autograd._saved_tensors_hooks_get_disabled_error_message(),
        forward_ad._current_level,
        torch._functorch.eager_transforms.JVP_NESTING,
    )


@pytest.fixture(autouse=True)
def nothing_left_behind():
    before = state()
    yield
    assert state() == before


def test_vjp_gives_the_outputs_the_others_and_the_pullback():
    def function(x, y):
        return (x * y, x.sin()), (y + 1, torch.tensor([3]))

    outputs, others, pulled = vjp(function, (X, Y))
    wanted, wanted_pull = torch.func.vjp(lambda x, y: function(x, y)[0], X, Y)
    assert_close(outputs, wanted)
    assert_close(others, (Y + 1, torch.tensor([3])))
    for cotangents in ((ONES, X), (Y, 2 * ONES)):
        assert_close(pulled(cotangents), wanted_pull(cotangents))


def test_a_pullback_that_gives_up_its_graph_works_once():
    pulled = vjp(flat(cube), (X,))[2]
    assert_close(pulled((ONES,), retain_graph=False), (3 * X * X,))
    with pytest.raises(RuntimeError, match="second time"):
        pulled((ONES,))


def test_value_and_gradient():
    value, gradients, others = value_and_gradient(lambda x, y: (((x * y).sum(),), (x * 2,)), (X, Y))
    assert_close(value, torch.tensor(-6.5))
    assert_close(gradients, (Y, X))
    assert_close(others, (2 * X,))


def test_jvp_gives_outputs_tangents_and_others():
    outputs, tangents, others = jvp(lambda x, y: ((x * y, x.sin()), (x + 1,)), (X, Y), (ONES, X))
    wanted = torch.func.jvp(lambda x, y: (x * y, x.sin()), (X, Y), (ONES, X))
    assert_close((outputs, tangents), wanted)
    assert_close(others, (X + 1,))


def test_what_does_not_depend_on_an_input_has_zero_derivatives():
    constant = torch.full((2,), 5.0)
    outputs, _, pulled = vjp(lambda x, y: ((y * 2, constant), ()), (X, Y))
    assert_close(pulled((ONES, constant)), (torch.zeros(3), 2 * ONES))
    assert outputs[1] is constant
    assert_close(vjp(lambda x: ((constant,), ()), (X,))[2]((constant,)), (torch.zeros(3),))
    assert_close(jvp(lambda x: ((constant,), ()), (X,), (ONES,))[1], (torch.zeros(2),))


@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize("ours", [grad, push_ones, pull_ones])
def test_derivatives_of_any_order(ours, order):
    def function(x):
        return x.sin() * x**4

    mine, theirs = function, function
    for _ in range(order):
        mine, theirs = ours(mine), torch.func.grad(theirs)
    x = torch.tensor(0.7, dtype=torch.float64)
    assert_close(mine(x), theirs(x))


@pytest.mark.parametrize("outer", [push, pull])
@pytest.mark.parametrize("inner", [push, pull])
def test_forward_and_reverse_mode_inside_one_another(outer, inner):
    found = outer(lambda x: inner(torch.sin)(x, Y))(X, ONES)
    assert_close(found, -X.sin() * Y)


@pytest.mark.parametrize("outer", ["torch.func", "torchbatch"])
def test_inside_and_around_those_of_torch_func(outer):
    theirs = {"grad": torch.func.grad, "push": lambda f: lambda x: torch.func.jvp(f, (x,), (torch.ones(()),))[1]}
    mine = {"grad": grad, "push": push_ones}
    first, second = (theirs, mine) if outer == "torch.func" else (mine, theirs)
    for one in first.values():
        for other in second.values():
            assert_close(one(other(cube))(torch.tensor(2.0)), torch.tensor(12.0))
            assert_close(one(other(one(cube)))(torch.tensor(2.0)), torch.tensor(6.0))


@VMAPS
def test_inside_a_map_and_around_one(mapped):
    rows = torch.stack([X, Y])
    assert_close(mapped(grad(lambda x: cube(x).sum()))(rows), 3 * rows**2)
    assert_close(mapped(pull(cube))(rows, rows), 3 * rows**3)
    assert_close(mapped(push(cube))(rows, rows), 3 * rows**3)
    assert_close(grad(lambda x: mapped(cube)(x).sum())(rows), 3 * rows**2)
    assert_close(push(mapped(cube))(rows, rows), 3 * rows**3)
    assert_close(mapped(grad(lambda x: mapped(grad(cube))(x).sum()))(rows), 6 * rows)


@VMAPS
def test_a_mapped_pullback(mapped):
    pulled = vjp(flat(cube), (X,))[2]
    assert_close(mapped(lambda c: pulled((c,))[0])(torch.eye(3)), torch.diag(3 * X * X))


@VMAPS
def test_tangents_shared_by_all_samples_have_room_for_what_is_written(mapped):
    def function(x):
        y = x.clone()
        y[0] = x[1] * x[2]
        y.mul_(2)
        return y

    rows = torch.stack([X, Y])
    found = mapped(lambda x: push(function)(x, ONES))(rows)
    assert_close(found, torch.stack([push(function)(x, ONES) for x in rows]))
    assert_close(mapped(lambda t: push(function)(X, t))(rows), torch.stack([push(function)(X, t) for t in rows]))


def test_gradients_of_ordinary_autograd_go_through():
    x, w = X.clone().requires_grad_(), Y.clone().requires_grad_()
    found = grad(lambda v: (cube(v) * w).sum())(x)
    assert_close(torch.autograd.grad(found.sum(), (x, w)), (6 * X * Y, 3 * X * X))
    found = push(lambda v: cube(v) * w)(x, ONES)
    assert_close(torch.autograd.grad(found.sum(), (x, w)), (6 * X * Y, 3 * X * X))
    cotangent = ONES.clone().requires_grad_()
    found = pull(cube)(x, cotangent)
    assert_close(torch.autograd.grad(found.sum(), (x, cotangent)), (6 * X, 3 * X * X))
    assert not grad(lambda v: cube(v).sum())(X).requires_grad


def test_no_grad_around_the_call_does_not_count_and_inside_it_does():
    w = Y.clone().requires_grad_()
    with torch.no_grad():
        found = grad(lambda x: (cube(x) * w).sum())(X)
        second = grad(grad(cube))(torch.tensor(2.0))
    assert_close(found, 3 * X * X * Y)
    assert_close(second, torch.tensor(12.0))
    assert not found.requires_grad

    def partly(x):
        with torch.no_grad():
            square = x * x
        return (x * square).sum()

    assert_close(grad(partly)(X), X * X)


def test_grad_mode_that_a_function_switches_off_is_back_on_after_it():
    def function(x):
        torch.set_grad_enabled(False)
        return (x * x).sum()

    assert_close(grad(function)(X), torch.zeros(3))
    assert torch.is_grad_enabled()


def test_forward_mode_that_is_off_around_the_call_does_not_count():
    with forward_ad._set_fwd_grad_enabled(False):
        assert_close(push(cube)(X, ONES), 3 * X * X)
        assert not torch._C._is_fwd_grad_enabled()


@pytest.mark.parametrize("made_inside", [False, True])
def test_inference_mode(made_inside):
    with torch.inference_mode():
        x = X.clone() if made_inside else X
        assert torch.equal(grad(lambda v: cube(v).sum())(x), 3 * X * X)
        assert torch.equal(push(cube)(x, x), 3 * X * X * X)
        assert torch.equal(pull(cube)(x, x), 3 * X * X * X)
        assert torch.equal(grad(lambda v: push(torch.square)(v, ONES).sum())(x), 2 * ONES)
        assert torch.equal(torch.func.vmap(grad(cube))(x), 3 * X * X)
        assert torch.is_inference_mode_enabled() and not torch.is_grad_enabled()
    pulled = vjp(flat(cube), (X,))[2]
    with torch.inference_mode():
        assert torch.equal(pulled((ONES,))[0], 3 * X * X)


def test_hooks_on_saved_tensors_are_refused():
    refused = pytest.raises(RuntimeError, match=r"hooks on saved tensors .* use torchbatch\.checkpoint")
    with refused, saved_tensors_hooks(lambda x: x, lambda x: x):
        grad(lambda x: cube(x).sum())(X)

    def function(x):
        with saved_tensors_hooks(lambda x: x, lambda x: x):
            return cube(x).sum()

    with pytest.raises(RuntimeError, match=r"hooks on saved tensors .* use torchbatch\.checkpoint"):
        grad(function)(X)
    with torch.autograd.graph.disable_saved_tensors_hooks("not here"):
        assert_close(grad(lambda x: cube(x).sum())(X), 3 * X * X)
        with pytest.raises(RuntimeError, match="not here"), saved_tensors_hooks(lambda x: x, lambda x: x):
            pass
    with saved_tensors_hooks(lambda x: x * 0, lambda x: x):
        assert_close(push(cube)(X, ONES), 3 * X * X)


class Boom(BaseException):
    """Not an Exception."""


@pytest.mark.parametrize("error", [ValueError, Boom, KeyboardInterrupt])
@pytest.mark.parametrize("depth", [0, 1, 2, 3])
@pytest.mark.parametrize("make", [grad, push_ones, pull_ones, torch.func.vmap, vmap])
def test_everything_is_closed_after_an_error_at_any_depth(make, depth, error):
    def fail(x):
        raise error("from the function")

    inner = make(fail)
    chain = [lambda f: lambda x: grad(lambda v: f(v).sum())(x), lambda f: lambda x: push(f)(x, x), torch.func.vmap]
    for transform in chain[:depth]:
        inner = transform(inner)
    before = state()
    with pytest.raises(error, match="from the function"):
        inner(torch.ones(2, 2, 2))
    assert state() == before
    assert_close(grad(lambda x: cube(x).sum())(X), 3 * X * X)


def test_a_function_may_catch_an_error_of_an_inner_one():
    def fail(x):
        raise ValueError

    def function(x):
        for transform in (grad, lambda f: lambda v: push(f)(v, v)):
            with pytest.raises(ValueError):
                transform(fail)(x)
        return cube(x).sum()

    assert_close(grad(function)(X), 3 * X * X)
    assert_close(push(function)(X, ONES), (3 * X * X).sum())


def test_an_error_in_a_backward_formula_closes_everything():
    class Failing(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(x):
            return x.clone()

        @staticmethod
        def setup_context(ctx, inputs, output):
            pass

        @staticmethod
        def backward(ctx, cotangent):
            raise ValueError("in backward")

    with pytest.raises(ValueError, match="in backward"):
        grad(lambda x: grad(lambda v: Failing.apply(v).sum())(x).sum())(X)


def test_a_dual_level_of_the_user_is_refused_as_by_torch_func_and_left_open():
    with forward_ad.dual_level():
        for function in (push(cube), lambda x, t: torch.func.jvp(cube, (x,), (t,))):
            with pytest.raises(RuntimeError, match="Nested forward mode AD"):
                function(X, ONES)
        assert forward_ad._current_level == 0


def test_gradients_inside_a_dual_level_of_the_user():
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(X, ONES)
        found = forward_ad.unpack_dual(grad(lambda x: cube(x).sum())(dual))
    assert_close((found.primal, found.tangent), (3 * X * X, 6 * X))


def test_complex_numbers_are_those_of_torch_func():
    z = torch.tensor([1 + 2j, -0.5j])
    outputs, pulled = torch.func.vjp(lambda z: z * z.conj() * z, z)
    mine = vjp(flat(lambda z: z * z.conj() * z), (z,))
    assert_close((mine[0][0], mine[2]((outputs,))), (outputs, pulled(outputs)))


def test_threads():
    start = threading.Barrier(4)
    found, errors = [], []

    def work(scale):
        try:
            start.wait()
            for _ in range(40):
                x = X * scale
                found.append(torch.allclose(grad(lambda v: cube(v).sum())(x), 3 * x * x))
                found.append(torch.allclose(push(lambda v: push(cube)(v, ONES))(x, ONES), 6 * x))
                found.append(torch.allclose(push(lambda v: grad(lambda u: cube(u).sum())(v))(x, ONES), 6 * x))
        except Exception as error:
            errors.append(error)

    was = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=work, args=(i + 1.0,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(was)
    assert not errors and len(found) == 480 and all(found)


def test_a_pullback_called_in_another_thread():
    pulled, found = vjp(flat(cube), (X,))[2], []
    thread = threading.Thread(target=lambda: found.append(pulled((ONES,))[0]))
    thread.start()
    thread.join()
    assert_close(found, [3 * X * X])


def test_results_are_plain_tensors():
    class Same(torch.autograd.Function):
        @staticmethod
        def forward(x):
            return x.clone()

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(*inputs)

        @staticmethod
        def backward(ctx, cotangent):
            return ctx.saved_tensors[0]

    found = [*vjp(flat(lambda x: x, Same.apply), (X,))[0], *vjp(flat(Same.apply), (X,))[2]((ONES,))]
    found += [t for part in jvp(flat(lambda x: x, cube), (X,), (ONES,)) for t in part]
    found += [*vjp(lambda x: ((x,), (x, cube(x))), (X,))[1], *jvp(lambda x: ((x,), (x, cube(x))), (X,), (ONES,))[2]]
    assert not any(torch._C._functorch.is_functorch_wrapped_tensor(tensor) for tensor in found)


def test_modes_see_the_backward_pass():
    class Names(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            names.append(getattr(func, "__name__", ""))
            return func(*args, **(kwargs or {}))

    names: list[str] = []
    with Names():
        assert_close(pull(cube)(X, ONES), 3 * X * X)
    assert "grad" in names


def test_compiled_autograd_is_not_used():
    from torch._dynamo import compiled_autograd

    def compiler(graph):
        raise AssertionError("compiled")

    with compiled_autograd._enable(compiler):
        assert_close(pull(cube)(X, ONES), 3 * X * X)


def test_a_call_leaves_nothing_for_the_garbage_collector():
    params = [X.clone() for _ in range(20)]
    calls = [
        lambda: vjp(flat(cube), (X,))[2]((ONES,)),
        lambda: jvp(flat(cube), (X,), (ONES,)),
        lambda: value_and_gradient(flat(lambda *p: sum(x.sum() for x in p)), params),
        lambda: grad(grad(cube))(torch.tensor(1.0)),
    ]
    for call in calls:
        call()
        gc.collect()
        gc.disable()
        try:
            call()
            assert gc.collect() == 0
        finally:
            gc.enable()


@pytest.mark.parametrize("function", ["vjp", "value_and_gradient", "jvp"])
def test_dynamo_is_handed_torch_func(function, monkeypatch):
    monkeypatch.setattr(derivatives, "_is_compiling", lambda: True)
    if function == "vjp":
        outputs, others, pulled = vjp(lambda x: ((cube(x),), (x + 1,)), (X,))
        found = (*outputs, *others, *pulled((ONES,)))
    elif function == "jvp":
        found = tuple(t for part in jvp(lambda x: ((cube(x),), (x + 1,)), [X], [ONES]) for t in part)
        found = (found[0], found[2], found[1])
    else:
        value, gradients, others = value_and_gradient(lambda x: ((cube(x).sum(),), (x + 1,)), (X,))
        assert value == cube(X).sum()
        found = (cube(X), *others, *gradients)
    assert_close(found, (cube(X), X + 1, 3 * X * X))
