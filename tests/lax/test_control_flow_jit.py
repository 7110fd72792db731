"""Loops and choices under jit: they stay loops and choices, see what they close over, and are differentiated."""

from __future__ import annotations

import gc
import subprocess
import sys

import pytest
import torch

import torchbatch
from torchbatch import grad, jit, lax, vmap
from torchbatch._torch import programs
from torchbatch.errors import UnsupportedOperationError

X = torch.linspace(-1, 2, 5)
B = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))


def traced(fun, **options):
    return jit(fun, backend="eager", **options)


def lines(fun, *args):
    """The graph, without the lines of inputs and outputs."""
    text = str(torchbatch.make_graph(fun)(*args))
    return [line for line in text.splitlines() if " = " in line]


def running(c, x):
    return torch.tanh(c + x), c * x


LOOPS = {
    "scan": lambda x: lax.scan(running, x[0], x),
    "scan mapped": vmap(lambda x: lax.scan(running, torch.zeros(()), x), in_axes=0),
    "fori_loop": lambda x: lax.fori_loop(0, x.shape[0], lambda i, c: c * 2 + i, x[0]),
    "while_loop": lambda x: lax.while_loop(lambda c: c.sum() < x.shape[0], lambda c: c + 1, x[0]),
    "map": lambda x: lax.map(lambda z: z.sin(), x),
}


@pytest.mark.parametrize("name", LOOPS)
def test_a_loop_is_one_step_however_long(name):
    short, long = (lines(LOOPS[name], torch.ones(n, n)) for n in (4, 400))
    assert len(short) == len(long) < 8
    assert sum("torchbatch.run" in line for line in long) == 1


def test_the_gradient_of_a_loop_is_one_more():
    graph = lines(torchbatch.grad(lambda x: lax.scan(running, x[0] * 0, x)[1].sum()), torch.ones(400))
    assert sum("torchbatch.run" in line for line in graph) == 2 and len(graph) < 20


def test_unroll_true_writes_all_steps_out():
    graph = lines(lambda x: lax.scan(running, x[0], x, unroll=True), torch.ones(4))
    assert not any("torchbatch.run" in line for line in graph)


def test_only_the_branch_that_is_chosen_runs():
    def invert(x):
        return lax.cond(x.sum() > 0, lambda: torch.linalg.inv_ex(x, check_errors=True).inverse, lambda: x)

    found = traced(invert)
    assert found(torch.zeros(2, 2)).sum() == 0
    torch.testing.assert_close(found(torch.eye(2) * 2), torch.eye(2) / 2)


def test_captured_tensors_are_read_anew():
    w = torch.tensor(2.0)
    found = traced(lambda x: lax.scan(lambda c, z: (c * w + z, None), torch.tensor(1.0), x)[0])
    first = found(X)
    w.mul_(2)
    expected = lax.scan(lambda c, z: (c * w + z, None), torch.tensor(1.0), X)[0]
    assert first != expected
    torch.testing.assert_close(found(X), expected)


CELL = torch.nn.Linear(3, 3)
WITH_PARAMETERS = {
    "scan": lambda b: sum(out.sum() for out in lax.scan(lambda h, z: (torch.tanh(CELL(h) + z), h**2), torch.zeros(3), b)),
    "cond": lambda b: lax.cond(b.sum() > 0, lambda: CELL(b).sum(), lambda: (CELL(b) ** 2).sum()),
    "switch": lambda b: lax.switch((b.sum() > 0).int() + 1, [torch.sum, lambda b: CELL(b).sum(), lambda b: CELL(b).prod()], b),
    "map": lambda b: lax.map(lambda z: CELL(z).sin(), b).sum(),
    "checkpointed": lambda b: lax.scan(torchbatch.checkpoint(lambda h, z: (CELL(h * z), None)), torch.ones(3), b)[0].sum(),
}


@pytest.mark.parametrize("name", WITH_PARAMETERS)
@pytest.mark.parametrize("sign", [1, -1])
def test_gradients_reach_parameters(name, sign):
    fun, b = WITH_PARAMETERS[name], B.abs() * sign
    torch.manual_seed(0)
    expected = torch.autograd.grad(fun(b), list(CELL.parameters()), allow_unused=True)
    found = torch.autograd.grad(traced(fun)(b), list(CELL.parameters()), allow_unused=True)
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, other)


def test_gradients_reach_parameters_when_compiled():
    fun = WITH_PARAMETERS["scan"]
    expected = torch.autograd.grad(fun(B), list(CELL.parameters()))
    torch.testing.assert_close(torch.autograd.grad(jit(fun)(B), list(CELL.parameters())), expected)


def test_draws_are_those_of_eager_mode():
    fun = lambda x: lax.scan(lambda c, z: (c + torch.randn(()), torch.randn(2)), torch.tensor(0.0), x)  # noqa: E731
    found = traced(fun)
    results = []
    for run in (found, found, fun):
        torch.manual_seed(0)
        results.append(run(X))
    torch.testing.assert_close(results[0], results[2])
    torch.testing.assert_close(results[1], results[2])
    assert len(set(results[0][1].flatten().tolist())) == 10
    assert not torch.equal(found(X)[1], found(X)[1])


@pytest.mark.parametrize(
    "fun", [lambda r: lax.scan(running, torch.zeros(()), r), lambda r: lax.while_loop(lambda c: c.sum() < 3, torch.exp, r)]
)
def test_open_sizes(fun):
    found = traced(vmap(fun), dynamic=True)
    for n in (6, 9):
        x = torch.rand(n, 3)
        torch.testing.assert_close(found(x), vmap(fun)(x))
    assert found.cache_size() == 1


def test_tensors_made_in_a_body_can_be_written():
    def padded(x):
        def step(c, z):
            out = torch.zeros(3)
            out[1] = z
            return c + out, out

        return lax.scan(step, torch.zeros(3), x)

    torch.testing.assert_close(traced(vmap(padded))(B), vmap(padded)(B))


def test_a_jit_function_as_body_and_numbers_as_arguments():
    inner = traced(running)
    found = traced(lambda x, n: lax.scan(inner, n, x))
    torch.testing.assert_close(found(X, 1.0), lax.scan(running, 1.0, X))


@pytest.mark.parametrize("unroll", [2, 5, 7, 10, 20, 0])
@pytest.mark.parametrize("reverse", [False, True])
def test_several_steps_at_once(unroll, reverse):
    x = torch.linspace(-1, 1, 10)
    fun = lambda x, unroll: lax.scan(running, x[0] * 0, x, reverse=reverse, unroll=unroll)  # noqa: E731
    loss = lambda x, unroll: fun(x, unroll)[1].sin().sum()  # noqa: E731
    torch.testing.assert_close(traced(lambda x: fun(x, unroll))(x), fun(x, 1))
    expected = torchbatch.grad(loss)(x, 1)
    torch.testing.assert_close(traced(lambda x: torchbatch.grad(loss)(x, unroll))(x), expected)


def test_several_steps_at_once_without_slices():
    fun = lambda x, unroll: lax.fori_loop(0, 7, lambda i, c: c * 2 + i, x, unroll=unroll)  # noqa: E731
    torch.testing.assert_close(traced(lambda x: fun(x, 3))(X), fun(X, None))
    counted = traced(lambda x: lax.scan(lambda c, _: (c + 1, c), x, None, length=7, unroll=3))
    torch.testing.assert_close(counted(X), lax.scan(lambda c, _: (c + 1, c), X, None, length=7))


@pytest.mark.parametrize("length", [0, 1, 2, 257, 600])
@pytest.mark.parametrize("reverse", [False, True])
def test_lengths(length, reverse):
    x = torch.linspace(-1, 1, length)
    fun = lambda x: lax.scan(running, torch.zeros(()), x, reverse=reverse)  # noqa: E731
    torch.testing.assert_close(traced(fun)(x), fun(x))
    c, ys = torch.zeros(()), []
    for z in x.flip(0) if reverse else x:
        c, y = running(c, z)
        ys.append(y)
    torch.testing.assert_close(fun(x), (c, torch.stack(ys[::-1] if reverse else ys) if ys else torch.zeros(0)))


def test_a_loop_without_any_tensor():
    assert traced(lambda: lax.scan(lambda c, _: ((), torch.ones(2)), (), None, length=3)[1])().tolist() == [[1, 1]] * 3
    assert traced(lambda p: lax.cond(p, lambda: torch.ones(2), lambda: torch.zeros(2)))(torch.tensor(True)).tolist() == [1, 1]


def test_results_share_no_memory():
    x = torch.ones(3)
    c, d = traced(lambda x: lax.while_loop(lambda s: s[0].sum() < 0, lambda s: s, (x, x)))(x)
    assert len({value.data_ptr() for value in (x, c, d)}) == 3


def test_shapes_without_numbers():
    spec = torchbatch.eval_shape(lambda x: lax.while_loop(lambda c: c.sum() < 3, lambda c: c + 1, x), X)
    assert spec.shape == (5,)
    assert torchbatch.eval_shape(lambda x: lax.cond(x.sum() > 0, torch.sin, torch.cos, x), X).shape == (5,)


def test_programs_end_with_the_functions_that_run_them():
    gc.collect()
    before = set(programs._programs)
    found = traced(LOOPS["scan"])
    found(torch.ones(4, 4))
    assert set(programs._programs) - before
    del found
    gc.collect()
    assert not set(programs._programs) - before


def test_a_number_tells_what_a_program_does():
    def number(fun):
        (line,) = (line for line in lines(fun, X) if "torchbatch.run" in line)
        gc.collect()
        return line

    plus, minus, again = (number(lambda x, s=s: lax.scan(lambda c, z: (c + s * z, c), x[0], x)) for s in (1, -1, 1))
    assert plus == again != minus
    assert number(lambda x: lax.scan(lambda c, z: (c + z, c), x[0], x, reverse=True)) != plus
    one, two = (number(lambda x, k=k: lax.scan(lambda c, z: (c + torch.tensor([k])[0] * z, c), x[0], x)) for k in (2.0, 3.0))
    assert one != two


def test_a_program_that_is_gone_is_an_error():
    with pytest.raises(torchbatch.errors.UnsupportedOperationError, match="loaded from a file"):
        torch.ops.torchbatch.run([torch.ones(2)], 12345)


def test_importing_does_not_load_the_compiler():
    code = "import sys, torchbatch.lax; print([m for m in ('torch._dynamo', 'torch._inductor', 'sympy') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


@pytest.mark.parametrize("choice", [False, True])
def test_the_gradient_of_a_step_that_draws_is_refused(choice):
    def fun(w):
        if choice:
            return lax.cond(w > 0, lambda: w * torch.rand(()), lambda: w)
        return lax.scan(lambda c, x: (c, w * torch.rand(())), torch.zeros(()), None, length=5)[1].sum()

    with pytest.raises(UnsupportedOperationError, match="runs its steps a second time, and they draw random numbers"):
        jit(grad(fun), backend="eager")(torch.ones(()))
    assert jit(fun, backend="eager")(torch.ones(())) > 0


@pytest.mark.parametrize("backend", [None, "eager"])
def test_a_condition_that_comes_to_vary_shows_others_what_a_sample_keeps(backend):
    def fun(x):
        return lax.while_loop(lambda s: s[0] < 3, lambda s: (s[0] + x, s[1] + lax.psum(s[0], "i")), (0.0, 0.0))

    mapped = vmap(fun, axis_name="i")
    first, second = (jit(mapped, backend=backend) if backend else mapped)(torch.tensor([1.0, 2.0]))
    assert first.tolist() == [3.0, 4.0] and second.tolist() == [9.0, 3.0]  # as in JAX


class Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, w, x):
        return 2 * w * x

    @staticmethod
    def backward(ctx, tangent):
        return 2 * tangent, 2 * tangent


class Cell(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.ones(()))

    def forward(self, c, x):
        return Twice.apply(self.w, c) + x


@pytest.mark.xfail(strict=True, reason="a tensor that an autograd.Function gets from an object is not found")
def test_a_gradient_of_a_tensor_in_an_object():
    cell, xs = Cell(), torch.ones(3)
    jit(lambda xs: lax.scan(lambda c, x: (cell(c, x), None), torch.ones(()), xs)[0], backend="eager")(xs).backward()
    assert cell.w.grad is not None
