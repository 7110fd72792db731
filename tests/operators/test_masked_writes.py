"""A write where a mask is true, with a mask that varies from sample to sample: as the loop, values and gradients."""

from __future__ import annotations

import re

import pytest
import torch

from torchbatch import grad, jit, vmap
from torchbatch.errors import DataDependentError
from torchbatch.testing import assert_close, loop

X = torch.tensor([[1.0, -2.0, 3.0], [-4.0, 5.0, 6.0]])
ROWS = torch.arange(12.0).reshape(2, 3, 2)
MASK = X > 0
V = torch.tensor([10.0, 20.0])


def scalar(x, mask, v):
    x[mask] = 7.0


def a_number_per_sample(x, mask, v):
    x[mask] = v


def one_entry(x, mask, v):
    x[mask] = torch.tensor([7.0])


def a_row(x, mask, v):
    x[mask] = torch.tensor([1.0, 2.0])


def a_row_per_sample(x, mask, v):
    x[mask] = torch.stack([v, 2 * v])


def a_negated_mask(x, mask, v):
    x[~mask] = v


def through_a_view(x, mask, v):
    x[:, 0][mask] = v


def beside_a_slice(x, mask, v):
    x.T[:, mask] = v


def beside_an_index(x, mask, v):
    x[mask, 1] = v


def masked_fill(x, mask, v):
    x.masked_fill_(mask.reshape(-1, *[1] * (x.dim() - 1)), 7.0)


def twice(x, mask, v):
    x[mask] = v
    x[x > 15] = -v


def mask_made_inside(x, mask, v):
    chosen = torch.zeros(3, dtype=torch.bool)
    chosen[mask.float().argmax()[None]] = True
    x[chosen] = v


FLAT = [scalar, a_number_per_sample, one_entry, a_negated_mask, masked_fill, twice, mask_made_inside]
DEEP = [scalar, a_row, a_row_per_sample, through_a_view, beside_a_slice, beside_an_index, masked_fill]
CASES = [(write, X) for write in FLAT] + [(write, ROWS) for write in DEEP]


def applied(write):
    def function(x, mask, v):
        x = x * 2  # a tensor of its own
        write(x, mask, v)
        return x

    return function


@pytest.mark.parametrize("run", [lambda f: f, lambda f: jit(f, backend="eager")], ids=["eager", "jit"])
@pytest.mark.parametrize(("write", "x"), CASES, ids=lambda value: getattr(value, "__name__", ""))
def test_a_masked_write_is_a_choice(write, x, run):
    function = applied(write)
    assert run(vmap(function))(x, MASK, V).equal(loop(function)(x, MASK, V))
    nested = run(vmap(vmap(function), in_axes=(0, None, None)))(x[None], MASK, V)
    assert nested.equal(loop(function)(x, MASK, V)[None])
    gradient = grad(lambda x, mask, v: function(x, mask, v).square().sum(), (0, 2))
    ours, theirs = run(vmap(gradient))(x, MASK, V), loop(gradient)(x, MASK, V)
    assert_close(ours, theirs)


def test_a_shared_mask_is_an_index_like_any_other():
    function = applied(scalar)
    assert vmap(function, (0, None, 0))(X, MASK[0], V).equal(loop(function, (0, None, 0))(X, MASK[0], V))


def test_a_value_for_each_true_needs_as_many_in_every_sample():
    def write(x, mask, v):
        x[mask] = torch.arange(2.0)

    assert vmap(applied(write))(X, MASK, V).equal(loop(applied(write))(X, MASK, V))
    message = "the index of a write of 2 values, and it does not have 2 True elements in every sample. Write a value for every"
    with pytest.raises(DataDependentError, match=re.escape(message)):
        vmap(applied(write))(X, X > 2, V)


def test_reading_by_a_mask_names_the_way_out():
    def add(x, mask, v):
        part = x[mask]  # has another length in each sample; x[mask] += v alone has a meaning: see test_masked.py
        part += v
        x[mask] = part

    with pytest.raises(DataDependentError, match=re.escape("Fixed shapes work: torch.where(mask, x, fill) keeps every element")):
        vmap(applied(add))(X, MASK, V)
    added = vmap(lambda x, mask, v: x.index_put((mask,), v, accumulate=True))(X, MASK, V)
    assert added.equal(torch.where(MASK, X + V[:, None], X))
