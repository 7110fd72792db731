"""What is left out of loops before they are compiled, and how a mapped while_loop keeps its samples apart."""

from __future__ import annotations

import pytest
import torch

from torchbatch import grad, jit, jvp, lax, vmap
from torchbatch._torch import programs, unused
from torchbatch.testing import assert_close

X = torch.linspace(-1, 2, 5)


def running(c, x):
    return torch.tanh(c + x), c * x


def chained(c, z):
    return (c[0] + c[1], c[1] * z, c[2] + c[0]), z


def nested(x):
    inner = lambda c, z: (lax.scan(lambda d, y: (d * y, d + z), c, x[:2])[1].sum(), c)  # noqa: E731
    return lax.scan(inner, x[0], x)[0]


# A function, and how many results its loops have left, in the order of the graph.
FUNCTIONS = {
    "gradient": (grad(lambda x: lax.scan(running, x[0] * 0, x)[0]), [2, 2]),
    "gradient, of a constant": (lambda x: grad(lambda w: lax.scan(lambda c, z: (torch.sin(c * w), 0), w, x)[0])(x[1]), [2, 2]),
    "results that need the carry": (lambda x: lax.scan(running, x[0], x)[1], None),
    "the carry alone": (lambda x: lax.scan(running, x[0], x, reverse=True)[0], [1]),
    "one carry needs the other": (lambda x: lax.scan(chained, (x[0],) * 3, x)[0][0], [2]),
    "one carry": (lambda x: lax.scan(lambda c, z: ((c[0] + 1, c[1] * z), c[0]), (0, x[0]), x)[0][1], [1]),
    "neither xs nor what is closed over": (lambda x: lax.scan(lambda c, z: ((c[0] * x[2], c[1] + 1), z), (x, 0), x)[0][1], [1]),
    "all": (lambda x: lax.scan(running, x[0], x), None),
    "nested": (grad(nested), [2, 3]),
    "second derivative": (grad(grad(lambda w: lax.scan(lambda c, z: (torch.sin(c * w + z), 0), w, X)[0])), [2, 4, 4, 2]),
    "gradient, mapped": (
        grad(lambda x: vmap(lambda w: lax.scan(lambda c, z: (torch.sin(c * w + z), c), w, X)[0])(x).sum()), [2, 2],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FUNCTIONS)
def test_loops_without_what_nobody_reads(name):
    fun, left = FUNCTIONS[name]
    kept = []

    def backend(module, examples):
        smaller, made = unused.without_unused(module)
        counts = [[len(program.results) for program in programs.programs_of(each)] for each in (module, smaller)]
        kept.extend([made, *counts])
        return smaller.forward

    x = X[1] if name == "second derivative" else X
    traced = jit(fun, backend=backend)
    assert_close(traced(x), fun(x))
    made, before, after = kept
    assert after == (left or before) and bool(made) == (after != before)


def test_loops_without_what_nobody_reads_compiled():
    fun = grad(lambda x: lax.scan(running, x[0] * 0, x)[0])
    assert_close(jit(fun)(X), fun(X))


WEIGHT = torch.eye(2) / 2
CONDITIONS = {  # the first is computed anew at each step, the others are kept
    "cheap": lambda s: s.sum() > 0.3,
    "with a product": lambda s: (WEIGHT @ s).sum() > 0.1,
    "with a loop": lambda s: lax.fori_loop(0, 2, lambda i, c: c + s.sum(), torch.zeros(())) > 0.5,
}


@pytest.mark.parametrize("name", CONDITIONS)
@pytest.mark.parametrize("named", [False, True])
def test_samples_that_end_at_different_times(name, named):
    x = torch.tensor([[1.0, 2.0], [0.1, 0.1], [9.0, 7.0]])
    body = (lambda s: s / 2 + 0 * lax.psum(s, "i")) if named else lambda s: s / 2
    fun = vmap(lambda x: lax.while_loop(CONDITIONS[name], body, x), axis_name="i" if named else None)
    assert_close(jit(fun, backend="eager")(x), fun(x))
    moved = lambda x: jvp(fun, (x,), (torch.ones_like(x),))[1]  # noqa: E731
    assert_close(jit(moved, backend="eager")(x), moved(x))


def test_a_condition_that_only_a_step_makes_different_from_sample_to_sample():
    fun = vmap(lambda x: lax.while_loop(lambda s: s < 5, lambda s: s + x, 0.0))
    x = torch.tensor([1.0, 2.0, 9.0])
    for found in (fun(x), jit(fun, backend="eager")(x)):
        assert found.tolist() == [5, 6, 9]


def test_a_condition_that_draws_draws_the_numbers_of_eager_mode():
    fun = vmap(lambda x: lax.while_loop(lambda s: s < 9 * torch.rand(()), lambda s: s + 1, x), randomness="different")
    results = []
    for run in (fun, jit(fun, backend="eager")):
        torch.manual_seed(0)
        results.append(run(torch.zeros(50)))
    assert torch.equal(*results) and len(results[0].unique()) > 1
