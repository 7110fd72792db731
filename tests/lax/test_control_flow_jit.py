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
from torchbatch.testing import assert_close

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
    assert_close(found(torch.eye(2) * 2), torch.eye(2) / 2)


def test_captured_tensors_are_read_anew():
    w = torch.tensor(2.0)
    found = traced(lambda x: lax.scan(lambda c, z: (c * w + z, None), torch.tensor(1.0), x)[0])
    first = found(X)
    w.mul_(2)
    expected = lax.scan(lambda c, z: (c * w + z, None), torch.tensor(1.0), X)[0]
    assert first != expected
    assert_close(found(X), expected)


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
        assert_close(mine, other)


def test_gradients_reach_parameters_when_compiled():
    fun = WITH_PARAMETERS["scan"]
    expected = torch.autograd.grad(fun(B), list(CELL.parameters()))
    assert_close(torch.autograd.grad(jit(fun)(B), list(CELL.parameters())), expected)


def test_draws_are_those_of_eager_mode():
    fun = lambda x: lax.scan(lambda c, z: (c + torch.randn(()), torch.randn(2)), torch.tensor(0.0), x)  # noqa: E731
    found = traced(fun)
    results = []
    for run in (found, found, fun):
        torch.manual_seed(0)
        results.append(run(X))
    assert_close(results[0], results[2])
    assert_close(results[1], results[2])
    assert len(set(results[0][1].flatten().tolist())) == 10
    assert not torch.equal(found(X)[1], found(X)[1])


@pytest.mark.parametrize(
    "fun", [lambda r: lax.scan(running, torch.zeros(()), r), lambda r: lax.while_loop(lambda c: c.sum() < 3, torch.exp, r)]
)
def test_open_sizes(fun):
    found = traced(vmap(fun), dynamic=True)
    for n in (6, 9):
        x = torch.rand(n, 3)
        assert_close(found(x), vmap(fun)(x))
    assert found.cache_size() == 1


def test_tensors_made_in_a_body_can_be_written():
    def padded(x):
        def step(c, z):
            out = torch.zeros(3)
            out[1] = z
            return c + out, out

        return lax.scan(step, torch.zeros(3), x)

    assert_close(traced(vmap(padded))(B), vmap(padded)(B))


def test_a_jit_function_as_body_and_numbers_as_arguments():
    inner = traced(running)
    found = traced(lambda x, n: lax.scan(inner, n, x))
    assert_close(found(X, 1.0), lax.scan(running, 1.0, X))


@pytest.mark.parametrize("unroll", [2, 5, 7, 10, 20, 0])
@pytest.mark.parametrize("reverse", [False, True])
def test_several_steps_at_once(unroll, reverse):
    x = torch.linspace(-1, 1, 10)
    fun = lambda x, unroll: lax.scan(running, x[0] * 0, x, reverse=reverse, unroll=unroll)  # noqa: E731
    loss = lambda x, unroll: fun(x, unroll)[1].sin().sum()  # noqa: E731
    assert_close(traced(lambda x: fun(x, unroll))(x), fun(x, 1))
    expected = torchbatch.grad(loss)(x, 1)
    assert_close(traced(lambda x: torchbatch.grad(loss)(x, unroll))(x), expected)


def test_several_steps_at_once_without_slices():
    fun = lambda x, unroll: lax.fori_loop(0, 7, lambda i, c: c * 2 + i, x, unroll=unroll)  # noqa: E731
    assert_close(traced(lambda x: fun(x, 3))(X), fun(X, None))
    counted = traced(lambda x: lax.scan(lambda c, _: (c + 1, c), x, None, length=7, unroll=3))
    assert_close(counted(X), lax.scan(lambda c, _: (c + 1, c), X, None, length=7))


@pytest.mark.parametrize("length", [0, 1, 2, 257, 600])
@pytest.mark.parametrize("reverse", [False, True])
def test_lengths(length, reverse):
    x = torch.linspace(-1, 1, length)
    fun = lambda x: lax.scan(running, torch.zeros(()), x, reverse=reverse)  # noqa: E731
    assert_close(traced(fun)(x), fun(x))
    c, ys = torch.zeros(()), []
    for z in x.flip(0) if reverse else x:
        c, y = running(c, z)
        ys.append(y)
    assert_close(fun(x), (c, torch.stack(ys[::-1] if reverse else ys) if ys else torch.zeros(0)))


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
    generate_vmap_rule = True

    @staticmethod
    def forward(w, x):
        return 2 * w * x

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, tangent):
        w, x = ctx.saved_tensors
        return 2 * tangent * x, 2 * tangent * w


class TwiceInOne(torch.autograd.Function):
    @staticmethod
    def forward(ctx, w, x):
        ctx.save_for_backward(w, x)
        return 2 * w * x

    @staticmethod
    def backward(ctx, tangent):
        return Twice.backward(ctx, tangent)


@torchbatch.custom_vjp
def twice(w, x):
    return 2 * w * x


twice.defvjp(lambda w, x: (twice(w, x), (w, x)), lambda kept, tangent: (2 * tangent * kept[1], 2 * tangent * kept[0]))


@torchbatch.custom_jvp
def doubled(w, x):
    return 2 * w * x


doubled.defjvp(lambda primals, tangents: (doubled(*primals), 2 * (primals[0] * tangents[1] + primals[1] * tangents[0])))


@torchbatch.custom_vmap
def mapped(w, x):
    return 2 * w * x


mapped.def_vmap(lambda size, batched, w, x: (2 * w * x, True))


class Cell:
    """A step that hands a tensor of its own to a function with rules of its own."""

    def __init__(self, w, fun):
        self.w, self.fun = w, fun

    def __call__(self, c, x):
        return self.fun(self.w, c) + x


RULES = {"autograd.Function": Twice.apply, "custom_vjp": twice, "custom_jvp": doubled, "custom_vmap": mapped}
AROUND = {
    "scan": lambda cell, xs: lax.scan(lambda c, x: (cell(c, x), None), torch.ones(()), xs)[0],
    "checkpointed": lambda cell, xs: lax.scan(torchbatch.checkpoint(lambda c, x: (cell(c, x), None)), torch.ones(()), xs)[0],
    "cond": lambda cell, xs: lax.cond(xs[0] > 0, lambda: cell(xs[1], xs[2]), lambda: xs[0]),
    "mapped cond": lambda cell, xs: vmap(lambda x: lax.cond(x > 1.5, lambda: cell(x, x), lambda: x))(xs).sum(),
    "scan in a mapped cond": lambda cell, xs: vmap(
        lambda x: lax.cond(x > 1.5, lambda: lax.scan(lambda c, _: (cell(c, x), None), x, None, length=3)[0], lambda: x)
    )(xs).sum(),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("backend", [None, "eager"])
def test_a_gradient_of_a_tensor_in_an_object(around, rule, backend):
    xs, w = torch.tensor([1.0, 2.0, 3.0]), torch.tensor(0.5, requires_grad=True)

    def by(fun):
        return lambda w, xs: AROUND[around](Cell(w, fun), xs)

    ways = {
        "autograd": lambda f: lambda w, xs: torch.autograd.grad(f(xs), w)[0],
        "grad": lambda f: lambda w, xs: grad(f)(w, xs),
        "vmap grad": lambda f: lambda w, xs: vmap(grad(f), in_axes=(None, 0))(w, torch.stack([xs, xs / 2])),
    }
    if not backend and around == "checkpointed" and rule == "autograd.Function":
        del ways["autograd"]  # see the next test
    plain = lambda w, x: 2 * w * x  # noqa: E731
    for name, way in ways.items():
        if name == "autograd":
            expected = way(lambda xs: by(plain)(w, xs))(w, xs)
            fun = lambda xs: by(RULES[rule])(w, xs)  # noqa: E731
            found = way(traced(fun) if backend else fun)(w, xs)
        else:
            expected = way(by(plain))(w.detach(), xs)
            fun = way(by(RULES[rule]))
            found = (traced(fun) if backend else fun)(w.detach(), xs)
        assert_close(found, expected, where=name)


def test_checkpoint_refuses_what_only_autograd_sees():
    cell = Cell(torch.ones((), requires_grad=True), Twice.apply)
    with pytest.raises(UnsupportedOperationError, match="straight to a transform"):
        AROUND["checkpointed"](cell, torch.ones(3)).backward()


def test_a_function_of_autograd_in_one_piece_is_refused():
    cell = Cell(torch.ones((), requires_grad=True), TwiceInOne.apply)
    with pytest.raises(RuntimeError, match="setup_context"):
        traced(lambda xs: AROUND["scan"](cell, xs))(torch.ones(3))


def test_what_a_rule_of_its_own_reads_beside_its_arguments_is_refused():
    hidden = Cell(torch.ones((), requires_grad=True), None)
    reading = torchbatch.custom_vjp(lambda x: x * hidden.w)
    reading.defvjp(lambda x: (x * hidden.w, hidden.w), lambda w, tangent: (tangent * w,))

    def fun(x, around):
        step = lambda c, z: (reading(c * z), None)  # noqa: E731
        return lax.scan(torchbatch.checkpoint(step) if around else step, x, torch.ones(3))[0]

    for run in (traced(lambda x: fun(x, False)), lambda x: fun(x, True)):
        with pytest.raises(UnsupportedOperationError, match="closes over a value"):
            run(torch.ones((), requires_grad=True)).backward()


COMPILED = {
    "scan": lambda x: lax.scan(running, 0.0, x)[1] + 1,
    "while_loop, mapped": lambda x: vmap(lambda x: lax.while_loop(lambda c: c < 3, lambda c: c + 1, x) * 2)(x),
    "fori_loop, mapped, bounds of each sample": vmap(lambda x: lax.fori_loop(0, (x > 0).int() * 2, lambda i, c: c * x + i, x)),
    "map": lambda x: lax.map(torch.sin, x, batch_size=2),
    "cond": vmap(lambda x: lax.cond(x > 0, torch.sin, torch.cos, x)),
    "switch": vmap(grad(lambda x: lax.switch((x > 0).int(), [torch.sin, torch.cos], x))),
}


@pytest.mark.parametrize("name", COMPILED)
def test_torch_compile_leaves_loops_to_python(name):
    torch._dynamo.reset()
    assert_close(torch.compile(COMPILED[name], backend="eager")(X), COMPILED[name](X))


def test_torch_compile_must_not_end_its_graph_at_a_loop():
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="scan"):
        torch.compile(COMPILED["scan"], backend="eager", fullgraph=True)(X)


@pytest.mark.xfail(strict=True, reason="PyTorch: a graph that ends inside a gradient cannot be taken up again")
def test_torch_compile_of_a_gradient_of_a_loop():
    torch._dynamo.reset()
    torch.compile(grad(lambda x: lax.scan(running, x[0], x)[0] * 2), backend="eager")(X)


def powers(x):
    """What depends on ``x``, and what does not."""
    step = lambda s: (s[0] + 1, s[1] * x, s[2] * 2)  # noqa: E731
    return lax.while_loop(lambda s: s[0] < 5, step, (torch.tensor(0), torch.tensor(1.0), torch.tensor(3.0)))[1:]


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_a_while_loop_over_what_requires_a_gradient_runs_and_refuses_only_its_own(backend):
    w = torch.tensor(2.0, requires_grad=True)
    found = jit(lambda x: (*powers(x), x * x), backend=backend)
    power, doubled, square = found(w)
    assert power == 32 and doubled == 96 and power.requires_grad and not doubled.requires_grad
    assert torch.autograd.grad(square, w) == (4.0,)
    power, _, square = found(w)
    with pytest.raises(UnsupportedOperationError, match="while_loop has no gradient in reverse mode"):
        (power + square).backward()
    with torch.no_grad():
        assert found(w)[0] == 32
    closing = jit(lambda: powers(w)[0], backend="eager")
    with pytest.raises(UnsupportedOperationError, match="no gradient in reverse mode"):
        closing().backward()


@pytest.mark.parametrize("traced_first", [False, True])
def test_a_part_of_a_while_loop_that_is_constant_has_a_gradient(traced_first):
    x = torch.tensor([2.0, 3.0])
    for fun in (
        vmap(grad(lambda x: powers(x)[1] * x)),
        grad(lambda x: vmap(lambda x: powers(x)[1] * x)(x).sum()),
        lambda x: torchbatch.jvp(vmap(powers), (x,), (torch.ones(2),))[1][1] + 96,
    ):
        assert (traced(fun) if traced_first else fun)(x).tolist() == [96, 96]
    moved = vmap(torchbatch.jacfwd(lambda x: powers(x)[0]))
    assert (traced(moved) if traced_first else moved)(x).tolist() == [80, 405]


def slope(z):
    z = z.detach().requires_grad_()
    return torch.autograd.grad(torch.sin(z * z), z)[0]


GRADIENTS_INSIDE = {
    "scan": lambda x: lax.scan(lambda c, z: (c * x[0] + slope(z), slope(c)), x[0], x)[0],
    "while_loop": lambda x: lax.while_loop(lambda c: c < 2, lambda c: c + 1 + slope(c) ** 2, x[0]),
    "cond": lambda x: lax.cond(slope(x[0]) < 9, lambda: slope(x[1]) * x[2], lambda: x[0]),
    "without": lambda x: torch.no_grad()(lax.scan)(lambda c, z: (c + (c * z).requires_grad, None), x[0], x)[0],
}


@pytest.mark.parametrize("name", GRADIENTS_INSIDE)
def test_gradients_of_autograd_inside_a_body(name):
    fun = GRADIENTS_INSIDE[name]
    assert_close(traced(fun)(X), fun(X))
