"""Operators that torch.func.vmap gets wrong or refuses."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from torchbatch import vmap
from torchbatch._torch import repairs, rules
from torchbatch._torch.fallback import fallback
from torchbatch.errors import DataDependentError, InPlaceError, UnsupportedOperationError
from torchbatch.testing import assert_close, loop

REGISTERED = (repairs, rules)
X = torch.tensor([[1.0, -2.0, 3.0], [-4.0, 5.0, 6.0]])


def set_item(x: torch.Tensor, mask: torch.Tensor, value: object) -> torch.Tensor:
    x = x.clone()
    x[mask] = value
    return x


def test_roll_of_a_number() -> None:
    assert vmap(lambda x: torch.roll(x, 1))(torch.arange(3.0)).equal(torch.arange(3.0))


@pytest.mark.parametrize("value", [0.0, torch.tensor(7.0)])
def test_write_one_value_where_a_mask_is_true(value: object) -> None:
    expected = torch.where(X < 0, torch.as_tensor(value), X)
    assert vmap(lambda x: set_item(x, x < 0, value))(X).equal(expected)
    assert vmap(lambda x, mask: set_item(x, mask, value), in_axes=(None, 0))(X[0], X < 0).equal(
        torch.where(X < 0, torch.as_tensor(value), X[0])
    )


def test_write_a_per_sample_value_where_a_mask_is_true() -> None:
    values = torch.tensor([10.0, 20.0])
    expected = torch.where(X < 0, values[:, None], X)
    assert vmap(lambda x, v: set_item(x, x < 0, v))(X, values).equal(expected)
    added = vmap(lambda x, v: x.index_put((x < 0,), v, accumulate=True))(X, values)
    assert added.equal(torch.where(X < 0, X + values[:, None], X))


def test_write_rows_where_a_mask_is_true() -> None:
    x, row = torch.zeros(2, 3, 2), torch.tensor([1.0, 2.0])
    result = vmap(lambda x, mask: set_item(x, mask, row))(x, X > 0)
    assert result.equal(torch.where((X > 0)[..., None], row, x))


def test_write_one_value_for_each_true() -> None:
    mask = torch.tensor([[True, False, True], [False, True, True]])
    values = torch.tensor([[10.0, 20.0], [30.0, 40.0]])
    result = vmap(set_item)(X, mask, values)
    assert result.equal(torch.tensor([[10.0, -2.0, 20.0], [-4.0, 30.0, 40.0]]))


def test_write_as_many_values_as_there_are_not() -> None:
    message = "A boolean mask that varies from sample to sample is the index of a write of 2 values, and it does not have 2 True"
    with pytest.raises(DataDependentError, match=re.escape(message)):
        vmap(lambda x, v: set_item(x, x > 0, v))(torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, 0.0]]), torch.ones(2, 2))


def test_a_mask_and_the_gradient() -> None:
    total = lambda x: (set_item(x, x < 0, 0.0) ** 2).sum()  # noqa: E731
    assert vmap(torch.func.grad(total))(X).equal(torch.where(X < 0, 0.0, 2 * X))


def test_a_mask_into_a_shared_tensor() -> None:
    def write(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        x[mask] = 0.0
        return x

    with pytest.raises(InPlaceError, match="argument x, which is unmapped"):
        vmap(write, in_axes=(None, 0))(X[0].clone(), X < 0)


def test_narrow_from_a_per_sample_place() -> None:
    starts = torch.tensor([0, 1])
    assert vmap(lambda x, i: torch.narrow(x, 0, i, 2))(X, starts).equal(torch.stack([X[0, 0:2], X[1, 1:3]]))
    assert vmap(lambda x: torch.narrow(x, 0, torch.tensor(1), 2))(X).equal(X[:, 1:])


def test_column_stack() -> None:
    assert vmap(lambda x: torch.column_stack([x, x]))(X).equal(torch.stack([X, X], -1))


def test_tensor_split() -> None:
    parts = vmap(lambda x: torch.tensor_split(x, torch.tensor([1])))(X)
    assert parts[0].equal(X[:, :1])
    assert parts[1].equal(X[:, 1:])
    with pytest.raises(DataDependentError, match="tensor_split cuts at places that vary from sample to sample"):
        vmap(lambda i: torch.tensor_split(X[0], i))(torch.tensor([[1], [2]]))


def test_histogramdd() -> None:
    x = torch.rand(2, 5, 2)
    with fallback("silent"):
        counts = vmap(lambda x: torch.histogramdd(x, [2, 3], range=[0.0, 1.0, 0.0, 1.0]).hist)(x)
    assert counts.equal(torch.stack([torch.histogramdd(s, [2, 3], range=[0.0, 1.0, 0.0, 1.0]).hist for s in x]))


def test_one_hot() -> None:
    labels = torch.tensor([0, 2])
    assert vmap(lambda i: F.one_hot(i, 3))(labels).equal(F.one_hot(labels, 3))


def test_squeeze_in_place_whatever_the_axis() -> None:
    x = torch.rand(1, 3, 1, 2)
    assert vmap(lambda x: x.squeeze_(), in_axes=3, out_axes=1)(x.clone()).equal(x[0, :, 0])
    assert vmap(lambda x: x.squeeze_(-1), in_axes=3, out_axes=2)(x.clone()).equal(x[:, :, 0])


def test_resize_in_place() -> None:
    assert vmap(lambda x: x.resize_(3, 1))(X.clone()).shape == (2, 3, 1)
    with pytest.raises(UnsupportedOperationError, match="resize_ cannot change the shape of this per-sample tensor in place"):
        vmap(lambda x: x.resize_(1, 2), in_axes=1)(X.clone())


def test_channels_last() -> None:
    with pytest.raises(UnsupportedOperationError, match="Leave memory_format out: it changes no value"):
        vmap(lambda x: x.to(memory_format=torch.channels_last))(torch.rand(2, 1, 3, 4, 4))


def test_rrelu() -> None:
    result = vmap(lambda x: F.rrelu(x, training=True), randomness="different")(X)
    assert result[X > 0].equal(X[X > 0])
    assert (result[X < 0] / X[X < 0]).clamp(1 / 8, 1 / 3).equal(result[X < 0] / X[X < 0])
    assert_close(vmap(F.rrelu)(X), F.rrelu(X))


def test_covariance_with_weights() -> None:
    x, weights = torch.rand(2, 3, 4), torch.randint(1, 4, (2, 4))
    result = vmap(lambda x, w: torch.cov(x, fweights=w, aweights=w / 2))(x, weights)
    expected = [torch.cov(x[i], fweights=weights[i], aweights=weights[i] / 2) for i in range(2)]
    assert_close(result, torch.stack(expected))


def test_integer_products_stay_integers() -> None:
    x, y = torch.arange(6).reshape(2, 3), torch.arange(18).reshape(2, 3, 3)
    result = vmap(lambda x, y: torch.addmv(x, y, x, beta=2, alpha=3))(x, y)
    assert result.equal(torch.stack([torch.addmv(x[i], y[i], x[i], beta=2, alpha=3) for i in range(2)]))


def test_nothing_changes_for_what_is_shared() -> None:
    shared = torch.tensor(5.0)
    assert vmap(lambda x: x + torch.roll(shared, 1))(X).equal(X + 5)


@pytest.mark.parametrize("loss", [F.mse_loss, F.huber_loss, F.smooth_l1_loss])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_losses_in_nested_maps(loss: Callable[..., torch.Tensor], reduction: str) -> None:
    x, target = 3 * torch.rand(2, 3, 4), torch.rand(4)
    call = lambda x: loss(x, target, reduction=reduction)  # noqa: E731
    expected = torch.stack([torch.stack([call(row) for row in part]) for part in x])
    assert_close(vmap(vmap(call))(x), expected)


def test_index_fill_in_nested_maps() -> None:
    places = torch.tensor([[[0], [-1]], [[1], [2]]])
    result = vmap(vmap(lambda i: X[0].index_fill(0, i, 9.0)))(places)
    assert result.equal(torch.stack([torch.stack([X[0].index_fill(0, i, 9.0) for i in row]) for row in places]))


def test_the_padding_row_of_a_table_of_each_sample_has_no_gradient():
    tables = torch.ones(2, 4, 3, requires_grad=True)
    words = torch.tensor([[0, 1], [3, 0]])

    def read(table, words):
        return torch.nn.functional.embedding(words, table, padding_idx=0).sum()

    (found,) = torch.autograd.grad(vmap(read)(tables, words).sum(), tables)
    expected = torch.zeros(2, 4, 3)
    expected[0, 1] = expected[1, 3] = 1
    assert torch.equal(found, expected)


@pytest.mark.parametrize("where", ["inside", "outside"])
def test_derivatives_at_kinks(where: str) -> None:
    tables, target = torch.ones(2, 3, 2), torch.tensor([1, 0, -1])

    def bags(table: torch.Tensor) -> torch.Tensor:
        return F.embedding_bag(torch.tensor([0, 1, 2, 2]), table, torch.tensor([0, 3]), mode="max").sum()

    def margins(table: torch.Tensor) -> torch.Tensor:
        return F.multilabel_margin_loss(table.flatten()[:3] * torch.tensor([0.0, 0.0, -1.0]), target)

    for f in (bags, margins):
        if where == "inside":
            assert_close(vmap(torch.func.grad(f))(tables), loop(torch.func.grad(f))(tables))
        else:
            total = lambda mapped: torch.func.grad(lambda x: mapped(x).sum())(tables)  # noqa: E731
            assert_close(total(vmap(f)), total(loop(f)))
