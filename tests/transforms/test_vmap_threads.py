"""Threads, and exceptions at every depth: levels, names and dispatch keys are clean afterwards, and results right."""

from __future__ import annotations

import contextlib
import threading
import warnings

import pytest
import torch
from torch.func import grad
from torch.func import vmap as tvmap

import torchbatch
from torchbatch import vmap
from torchbatch._torch import levels, overlay
from torchbatch.core.frames import in_scope
from torchbatch.errors import DataDependentError, InPlaceError, RandomnessError
from torchbatch.testing import assert_close, loop

X = torch.randn(3, 4, 2, generator=torch.Generator().manual_seed(0))
BATCHED = torch._C._parse_dispatch_key("FuncTorchDynamicLayerFrontMode")


def assert_clean():
    assert levels.depth() == 0
    assert in_scope.stack == []
    assert not any(overlay.is_included(key) for key in (overlay.KEY, overlay.WRITES_KEY, BATCHED))
    assert torch.equal(vmap(torch.sin)(X), X.sin())
    torch.zeros(2)[0] = 1.0


@pytest.fixture(autouse=True)
def clean_before_and_after():
    assert_clean()
    yield
    assert_clean()


class Stop(BaseException):
    """Not an Exception, like KeyboardInterrupt."""


ERRORS = [KeyError, RuntimeError, ValueError, KeyboardInterrupt, SystemExit, GeneratorExit, StopIteration, Stop, Warning]


def nested(depth, fail_at, error, wrap):
    """A function mapped ``depth`` times that raises at level ``fail_at``, before or after the inner call."""

    def level(k):
        def fun(x):
            if k == fail_at:
                raise error("on the way in")
            y = x.sin() if k == depth else wrap(level(k + 1), k)(x)
            if k == -fail_at:
                raise error("on the way out")
            return y + torch.zeros(()).add_(1)

        return fun

    return level(0)


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("fail_at", [0, 1, 2, 3, -1, -2])
def test_an_exception_at_any_depth_closes_every_level(error, fail_at):
    fun = nested(3, fail_at, error, lambda f, k: vmap(f, chunk_size=2 if k == 1 else None, randomness="different"))
    with pytest.raises(RuntimeError if error is StopIteration else error, match=r"on the way|StopIteration"):
        raise_stop_iteration_as_runtime_error(fun, X)
    assert_clean()


def raise_stop_iteration_as_runtime_error(fun, x):
    try:
        fun(x)
    except StopIteration as error:
        raise RuntimeError("StopIteration") from error


@pytest.mark.parametrize(
    "wrap",
    [
        lambda f, k: vmap(f),
        lambda f, k: tvmap(f) if k % 2 else vmap(f),
        lambda f, k: vmap(lambda x: grad(lambda y: f(y).sum())(x)),
        lambda f, k: vmap(lambda x: torchbatch.jvp(f, (x,), (x,))[0]),
        lambda f, k: vmap(f, axis_name=f"level {k}"),
    ],
)
@pytest.mark.parametrize("fail_at", [1, 2, 3, -1, -2])
def test_with_other_transforms_in_between(wrap, fail_at):
    with pytest.raises(KeyError, match="on the way"):
        nested(3, fail_at, KeyError, wrap)(X)


def test_an_exception_that_is_caught_inside():
    def outer(x):
        with contextlib.suppress(DataDependentError):
            vmap(lambda s: s.item())(x)
        with contextlib.suppress(RandomnessError):
            vmap(lambda s: torch.rand(()))(x)
        shared = x.new_zeros(())
        with pytest.raises(InPlaceError):
            vmap(lambda s, t: t.add_(s), (0, None))(x, torch.zeros(()))
        return vmap(torch.sin)(x) + shared

    assert_close(vmap(vmap(outer))(X), X.sin())


def test_errors_in_the_arguments_and_the_output():
    for bad in (
        lambda: vmap(lambda x: x, in_axes=5)(X),
        lambda: vmap(lambda x, y: x)(X, X[:2]),
        lambda: vmap(lambda x: "text")(X),
        lambda: vmap(lambda x: x, out_axes=9)(X),
        lambda: vmap(lambda x: x, out_axes=None)(X),
        lambda: vmap(lambda x: vmap(lambda s: object())(x))(X),
        lambda: vmap(lambda x: {"a": x}, out_axes={"b": 0})(X),
    ):
        with pytest.raises((TypeError, ValueError)):
            bad()
        assert_clean()


def test_a_warning_turned_into_an_error():
    def fun(x):
        warnings.warn("careful", UserWarning, stacklevel=1)
        return x

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning):
            vmap(fun)(X)


def test_a_generator_that_is_closed_or_thrown_into():
    def rows(x):
        for row in x:
            yield vmap(torch.sin)(row)

    generator = rows(X)
    next(generator)
    with pytest.raises(KeyError):
        generator.throw(KeyError("thrown"))
    generator = rows(X)
    next(generator)
    generator.close()

    def fun(x):
        it = rows(x[None])
        first = next(it)
        it.close()
        return first

    assert_close(vmap(fun)(X[:, :, :1]), loop(fun)(X[:, :, :1]))


# --- threads ----------------------------------------------------------------------------------------------------------


def program(x, weight):
    """Three nested maps with grad, factories, names and a write in place."""
    def row(r):
        room = torch.zeros(3)
        room[0] = r.sum()
        room[1:] += vmap(grad(lambda s: (s**2 * weight).sum()))(r)[:2]
        return room, vmap(lambda s: vmap(lambda t: t * s + weight, axis_name="k")(r), axis_name="j")(r)

    return vmap(row, axis_name="i")(x)


def run_in_threads(count, work):
    errors, barrier = [], threading.Barrier(count)

    def body(number):
        barrier.wait()
        try:
            work(number)
            assert_clean()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=body, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def test_eight_threads_call_nested_maps_at_once():
    inputs = [torch.randn(3 + k % 3, 2 + k % 2, generator=torch.Generator().manual_seed(k)) for k in range(8)]
    expected = [program_of_loops(x, float(k)) for k, x in enumerate(inputs)]

    def work(k):
        for _ in range(8):
            assert_close(program(inputs[k], float(k)), expected[k])

    run_in_threads(8, work)


def program_of_loops(x, weight):
    rooms = torch.stack([torch.cat([r.sum()[None], (2 * r * weight)[:2]]) for r in x])
    tables = torch.stack([r[:, None] * r[None, :] + weight for r in x])
    return rooms, tables


def test_threads_whose_functions_raise_do_not_disturb_the_others():
    def work(k):
        for i in range(12):
            if k % 2:
                with pytest.raises(KeyError, match="on the way"):
                    nested(3, (1, 2, 3, -1)[i % 4], KeyError, lambda f, _: vmap(f))(X)
            else:
                assert_close(nested(3, 99, KeyError, lambda f, _: vmap(f))(X), X.sin() + 4)

    def unraised(x):
        return x

    assert unraised(X) is X
    run_in_threads(8, work)


def test_one_mapped_function_shared_by_threads():
    mapped = vmap(vmap(lambda s, t: s * t + torch.zeros(2).add_(s)), in_axes=(0, None))

    def work(k):
        x, y = X + k, X[0] - k
        for _ in range(10):
            assert_close(mapped(x, y), x * y + x)

    run_in_threads(8, work)


def test_a_thread_started_inside_a_mapped_function_sees_no_level():
    seen = []

    def fun(x):
        thread = threading.Thread(target=lambda: seen.append((levels.depth(), list(in_scope.stack), vmap(torch.sin)(X))))
        thread.start()
        thread.join()
        return x * 2

    assert torch.equal(vmap(fun)(X), X * 2)
    depth, stack, result = seen[0]
    assert depth == 0 and stack == [] and torch.equal(result, X.sin())
