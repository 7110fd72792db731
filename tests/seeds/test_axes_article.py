"""The article on `in_axes` and `out_axes`: its tables in full, for two (2,2) and two (2,3,5,7,9) arrays."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

COMPILED = pytest.mark.parametrize("how", ["eager", "jit", "inductor"], indirect=True)
SMALL = (2, 2)
LARGE = (2, 3, 5, 7, 9)


def both(shape):
    """Arrays `a` and `b` of unique numbers, in torch and in JAX."""
    n = int(np.prod(shape))
    a = np.arange(1, n + 1, dtype=np.int32).reshape(shape)
    b = (1000 * np.arange(1, n + 1, dtype=np.int32)).reshape(shape)
    return (torch.from_numpy(a), torch.from_numpy(b)), (jnp.asarray(a), jnp.asarray(b))


def choices(shape):
    """Every pair of in_axes within the bounds, None included, but not None twice."""
    one = [None, *range(-len(shape), len(shape))]
    return [pair for pair in itertools.product(one, one) if pair != (None, None)]


def slice_shape(shape, axis):
    return shape if axis is None else tuple(np.delete(shape, axis))


def fits(shape, in_axes):
    """Whether the sizes of the mapped axes agree and the slices can be added."""
    sizes = {shape[axis] for axis in in_axes if axis is not None}
    try:
        np.broadcast_shapes(*(slice_shape(shape, axis) for axis in in_axes))
    except ValueError:
        return False
    return len(sizes) == 1


def out_ndim(shape, in_axes):
    return 1 + max(len(slice_shape(shape, axis)) for axis in in_axes)


FITTING = [(shape, in_axes) for shape in (SMALL, LARGE) for in_axes in choices(shape) if fits(shape, in_axes)]
NOT_FITTING = [in_axes for in_axes in choices(LARGE) if not fits(LARGE, in_axes)]


def test_the_tables_are_complete():
    assert len(choices(SMALL)) == sum(shape == SMALL for shape, _ in FITTING) == 24
    assert len(choices(LARGE)) == 120
    assert sum(shape == LARGE for shape, _ in FITTING) == 24
    assert len(NOT_FITTING) == 96


@pytest.mark.parametrize(("shape", "in_axes"), FITTING)
def test_every_out_axes(shape, in_axes, same, vmap, how):
    ours, theirs = both(shape)
    ndim = out_ndim(shape, in_axes)
    for out_axes in how.some(range(-ndim, ndim)):
        out = vmap(torch.add, in_axes=in_axes, out_axes=out_axes)(*ours)
        same(out, jax.vmap(jnp.add, in_axes=in_axes, out_axes=out_axes)(*theirs))


SOME = [(SMALL, (0, 0)), (SMALL, (None, 1)), (LARGE, (1, 1)), (LARGE, (0, None))]


@pytest.mark.parametrize(("shape", "in_axes"), SOME)
def test_out_axes_out_of_bounds(shape, in_axes, vmap):
    """The article writes the interval as (-z, z]; it is [-z, z)."""
    ours, theirs = both(shape)
    ndim = out_ndim(shape, in_axes)
    for out_axes in (-ndim - 1, ndim):
        with pytest.raises(ValueError):
            vmap(torch.add, in_axes=in_axes, out_axes=out_axes)(*ours)
        with pytest.raises(ValueError):
            jax.vmap(jnp.add, in_axes=in_axes, out_axes=out_axes)(*theirs)


@pytest.mark.parametrize("in_axes", NOT_FITTING)
def test_axes_that_do_not_fit(in_axes, vmap):
    """Two sizes that differ are vmap's own error; slices that cannot be added are that of the addition."""
    ours, theirs = both(LARGE)
    by_vmap = None not in in_axes
    with pytest.raises(ValueError if by_vmap else RuntimeError) as error:
        vmap(torch.add, in_axes=in_axes)(*ours)
    with pytest.raises((ValueError, TypeError)):
        jax.vmap(jnp.add, in_axes=in_axes)(*theirs)
    if by_vmap:
        sizes = [LARGE[axis] for axis in in_axes]
        assert all(f"size {size}" in str(error.value) for size in sizes), str(error.value)


@pytest.mark.parametrize("in_axes", [(2, 0), (0, 2), (-3, 0), (0, -3), (2, None)])
def test_in_axes_out_of_bounds(in_axes, vmap):
    ours, theirs = both(SMALL)
    with pytest.raises(ValueError):
        vmap(torch.add, in_axes=in_axes)(*ours)
    with pytest.raises(ValueError):
        jax.vmap(jnp.add, in_axes=in_axes)(*theirs)


def test_at_least_one_must_be_mapped(vmap):
    ours, theirs = both(SMALL)
    with pytest.raises(ValueError):
        vmap(torch.add, in_axes=(None, None))(*ours)
    with pytest.raises(ValueError):
        jax.vmap(jnp.add, in_axes=(None, None))(*theirs)


def test_whole_numbers_keep_the_shape_of_a_plain_addition(vmap):
    (a, b), _ = both(SMALL)
    for in_axes in itertools.product(range(-2, 2), repeat=2):
        assert vmap(torch.add, in_axes=in_axes)(a, b).shape == torch.add(a, b).shape


@COMPILED
def test_none_adds_each_row_or_column_to_a_whole_copy(vmap):
    (a, b), _ = both(SMALL)
    rows = vmap(torch.add, in_axes=(None, 0))(a, b)
    columns = vmap(torch.add, in_axes=(None, 1))(a, b)
    assert rows.tolist() == [[[1001, 2002], [1003, 2004]], [[3001, 4002], [3003, 4004]]]
    assert columns.tolist() == [[[1001, 3002], [1003, 3004]], [[2001, 4002], [2003, 4004]]]


def test_each_next_out_axis_swaps_two_neighbours(vmap):
    """The article's rule: the shape for out_axes = n is that for n - 1 with its indices n - 1 and n swapped."""
    (a, b), _ = both(LARGE)
    shapes = [tuple(vmap(torch.add, in_axes=(0, None), out_axes=n)(a, b).shape) for n in range(6)]
    assert shapes[0] == (2, *LARGE)
    for n in range(1, 6):
        swapped = list(shapes[n - 1])
        swapped[n - 1], swapped[n] = swapped[n], swapped[n - 1]
        assert shapes[n] == tuple(swapped)


@pytest.mark.parametrize("axis", range(-3, 3))
def test_summary_one_mapped_matrix_and_one_whole(axis, same, vmap, how):
    """in_axes = (n, None) hands the slices of A1 without axis n to all rows of A2; the ranks may differ."""
    A1 = torch.arange(27).reshape(3, 3, 3)
    A2 = torch.arange(100, 112).reshape(4, 3)[:, None].expand(4, 3, 3).reshape(2, 2, 3, 3)
    jA1, jA2 = jnp.asarray(A1.numpy()), jnp.asarray(A2.numpy())
    for out_axes in how.some(range(-5, 5)):
        out = vmap(torch.add, in_axes=(axis, None), out_axes=out_axes)(A1, A2)
        same(out, jax.vmap(jnp.add, in_axes=(axis, None), out_axes=out_axes)(jA1, jA2))
