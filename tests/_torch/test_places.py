"""``x[i]`` where ``i`` is one number of each sample: inside ``vmap``, and inside derivatives inside ``vmap``."""

from __future__ import annotations

import pytest
import torch

import torchbatch
from torchbatch import grad, jacfwd, jacrev, jit, vmap
from torchbatch.testing import assert_close, loop

X = torch.linspace(-1, 2, 60).reshape(4, 5, 3)
I = torch.tensor([0, 2, 4, 1])  # noqa: E741


def written(x, i):
    y = x * 1
    y[i] = 2 * x[0]
    return (y**2).sum()


def added(x, i):
    y = x * 1
    y[i] += 3 * x[0]
    return (y**2).sum()


def made(x, i):
    y = torch.zeros(5, 3)
    y[i, 1:] = x[0, 1:]
    y[-1, i % 3] += x[0, 0]
    return (y**2).sum()


FUNCTIONS = {
    "x[i]": lambda x, i: (x[i] ** 2).sum(),
    "x[i, j]": lambda x, i: x[i, i % 3] ** 2,
    "x[i, :]": lambda x, i: (x[i, :] ** 2).sum(),
    "x[:, i]": lambda x, i: (x[:, i % 3] ** 2).sum(),
    "x[..., i]": lambda x, i: (x[..., i % 3] ** 2).sum(),
    "x[i, None]": lambda x, i: (x[i, None] ** 2).sum(),
    "x[1:, i]": lambda x, i: (x[1:, i % 3] ** 2).sum(),
    "x[-i]": lambda x, i: (x[-i - 1] ** 2).sum(),
    "x[i, [..]]": lambda x, i: (x[i, [0, 1]] ** 2).sum(),
    "x[i, 1]": lambda x, i: x[i, 1] ** 2,
    "x[i.int()]": lambda x, i: (x[i.int()] ** 2).sum(),
    "x[argmax]": lambda x, i: x[:, 0][x[:, 1].argmax()] * x[:, 1][(x[:, 2].argmin() + i) % 5],
    "take": lambda x, i: torch.take(x, i) ** 2,
    "gather": lambda x, i: (x[:, 0].gather(0, i[None]) ** 2).sum(),
    "index_select": lambda x, i: (x.index_select(0, i) ** 2).sum(),
    "index_select 1": lambda x, i: (torch.index_select(x, 1, i % 3) ** 2).sum(),
    "take_along_dim": lambda x, i: (torch.take_along_dim(x, i[None, None], 0) ** 2).sum(),
    "narrow": lambda x, i: (x.narrow(0, i % 3, 2) ** 2).sum(),
    "x[i] = v": written,
    "x[i] += v": added,
    "zeros[i] = v": made,
}
TRANSFORMS = {
    "value": lambda f: f,
    "grad": grad,
    "jacrev": jacrev,
    "jacfwd": jacfwd,
    "value_and_grad": lambda f: lambda x, i: torchbatch.value_and_grad(f)(x, i)[1],
    "jvp": lambda f: lambda x, i: torchbatch.jvp(f, (x, i), (x, torch.zeros((), dtype=torch.bool)))[1],
    "grad of grad": lambda f: grad(lambda x, i: (grad(f)(x, i) ** 2).sum()),
}


TRACED = ("x[i]", "x[:, i]", "x[i, [..]]", "x[argmax]", "index_select", "x[i] += v", "zeros[i] = v")


@pytest.mark.parametrize(("name", "how"), [(name, "eager") for name in FUNCTIONS] + [(name, "jit") for name in TRACED])
def test_a_number_of_each_sample_is_an_index(name, how):
    run = jit(backend="eager") if how == "jit" else lambda f: f
    for transform in TRANSFORMS if how == "eager" else ("value", "grad", "jacfwd"):
        fun = TRANSFORMS[transform](FUNCTIONS[name])
        expected = loop(fun)(X, I)
        found = run(lambda x, i, fun=fun: (vmap(fun)(x, i), vmap(vmap(fun))(x[None], i[None])))(X, I)
        assert_close(found[0], expected, where=str(transform))
        assert_close(found[1], expected[None])


@pytest.mark.parametrize("name", ["x[i]", "x[i, :]", "x[i, None]", "x[i, [..]]", "index_select", "x[i] = v", "x[i] += v"])
def test_an_index_that_a_derivative_closes_over(name):
    fun = lambda x, i: grad(lambda x: FUNCTIONS[name](x, i))(x)  # noqa: E731
    assert_close(vmap(fun)(X, I), loop(fun)(X, I))


def test_a_shared_tensor_at_a_place_of_each_sample():
    fun = lambda x, i: (x[i] ** 2).sum()  # noqa: E731
    assert_close(vmap(grad(fun), (None, 0))(X[0], I), loop(grad(fun), (None, 0))(X[0], I))
    outer = vmap(lambda x: vmap(grad(fun), (None, 0))(x, I))(X)
    assert_close(outer, loop(lambda x: loop(grad(fun), (None, 0))(x, I))(X))
    inner = vmap(lambda i: vmap(lambda x: grad(fun)(x, i))(X))(I)
    assert_close(inner, outer.movedim(0, 1))


def test_as_in_jax():
    jax = pytest.importorskip("jax")
    fun = lambda x, i: (x[i] ** 2).sum() * x[i, 1]  # noqa: E731
    theirs = jax.vmap(jax.grad(fun))(X.numpy(), I.numpy())
    assert_close(vmap(grad(fun))(X, I), torch.tensor(theirs.__array__()))


def test_what_comes_out_is_an_ordinary_tensor():
    kept = vmap(lambda x, i: torchbatch.value_and_grad(lambda x, i: (x[i].sum(), i + 1), has_aux=True)(x, i))(X, I)
    assert type(kept[0][1]) is torch.Tensor and torch.equal(kept[0][1], I + 1)
    assert type(vmap(grad(lambda x, i: x[i].sum()))(X, I)) is torch.Tensor


def test_a_number_beyond_the_end_is_an_error():
    with pytest.raises((IndexError, RuntimeError), match=r"out of (range|bounds)"):
        vmap(grad(lambda x, i: x[i].sum()))(X, I + 3)


@pytest.mark.xfail(reason="an index that is computed inside of a derivative from what it closes over", strict=True)
def test_an_index_computed_from_what_a_derivative_closes_over():
    fun = lambda x, i: grad(lambda x: x[i + 0].sum())(x)  # noqa: E731
    assert_close(vmap(fun)(X, I), loop(fun)(X, I))
