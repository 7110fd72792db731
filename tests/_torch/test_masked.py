"""``x[mask] += v`` with a mask that varies from sample to sample: as the loop, values and gradients."""

from __future__ import annotations

import pytest
import torch

from torchbatch import grad, jacfwd, jit, vmap
from torchbatch.errors import DataDependentError
from torchbatch.testing import assert_close, loop

X = torch.tensor([[1.0, -2.0, 3.0], [-4.0, 5.0, 6.0], [-1.0, -1.0, -1.0]])
ROWS = torch.arange(18.0).reshape(3, 3, 2) - 7
V = torch.tensor([10.0, 20.0, 30.0])


def plus(x, v):
    x[x > 0] += v
    return x


def minus_row(x, v):
    x[x[:, 0] > 0] -= torch.stack([v, 2 * v])
    return x


def one_entry(x, v):
    x[x > 0] *= v[None]
    return x


def times(x, v):
    x[x > 0] *= 3.0
    x[x < 0] /= v
    return x


def root(x, v):
    x[x > 0] **= 0.5
    return x


def beside_a_slice(x, v):
    x[1:, x[0] > 0] += v
    return x


def beside_dots(x, v):
    x[..., x[0] > 0] += v
    return x


def made_inside(x, v):
    y = torch.ones(x.shape)
    y[x > 0] += v
    y[1:][x[1:] > 0] *= 2
    return y


def a_view(x, v):
    x.T[x.T > 0] += v
    return x


def counted(x, v):
    y = torch.zeros(x.shape, dtype=torch.int64)
    y[x > 0] += 1
    y[x > 2] |= 4
    return x * y


def nothing(x, v):
    x[x > 100] += v
    return x


FUNCTIONS = [plus, times, root, made_inside, a_view, counted, nothing, one_entry]
OF_ROWS = [minus_row, beside_a_slice, beside_dots, plus, a_view, made_inside]
CASES = [(fun, X) for fun in FUNCTIONS] + [(fun, ROWS) for fun in OF_ROWS]


TRACED = (plus, made_inside, counted, beside_a_slice)


@pytest.mark.parametrize(
    ("fun", "x", "how"),
    [(*case, "eager") for case in CASES] + [(f, ROWS, "jit") for f in TRACED],
    ids=lambda part: getattr(part, "__name__", str(getattr(part, "ndim", part))),
)
def test_as_the_loop(fun, x, how):
    run = jit(backend="eager") if how == "jit" else lambda f: f

    def value(x, v):
        return fun(x.clone(), v)

    def loss(x, v):
        return (value(x, v) ** 2).sum()

    expected = loop(value)(x, V), loop(grad(loss, (0, 1)))(x, V), loop(jacfwd(value))(x, V)
    found = run(lambda x, v: (vmap(value)(x, v), vmap(grad(loss, (0, 1)))(x, v), vmap(jacfwd(value))(x, v)))(x, V)
    assert_close(found, expected)
    nested = run(lambda x, v: vmap(vmap(value))(x[None], v[None]))(x, V)
    assert_close(nested[0], expected[0])


def test_an_argument_is_written_in_place():
    x = X.clone()
    vmap(plus)(x, V)
    assert_close(x, loop(plus)(X.clone(), V))


def a_value_for_each(x, v):
    x[x > 0] += torch.arange(2.0)
    return x


def read(x, v):
    y = x[x > 0]
    y += v
    return y


@pytest.mark.parametrize(
    ("fun", "text"), [(a_value_for_each, "x\\[mask\\] \\+= v"), (read, "selects a different number of elements")]
)
def test_what_has_no_fixed_shape_is_an_error(fun, text):
    with pytest.raises(DataDependentError, match=text):
        vmap(fun)(X.clone(), V)
