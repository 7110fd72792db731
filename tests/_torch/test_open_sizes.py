"""Which tensors fit a graph whose sizes are partly open."""

from __future__ import annotations

import pytest
import torch

from torchbatch._torch import graphs


def sizes_of(fun, *inputs, axes):
    """What a trace found out about the sizes."""
    found = graphs.trace(lambda values: [fun(*values)], inputs, gradients=False, open_axes=axes)
    assert found.sizes is not None
    return found.sizes


def test_an_open_axis_takes_any_size_above_one():
    sizes = sizes_of(lambda x: x.sin(), torch.ones(4, 3), axes=[[0]])
    assert [sizes.accept([torch.ones(n, 3)]) for n in (2, 4, 5, 1000, 1, 0)] == [True] * 4 + [False] * 2


def test_fixed_axes_dimensions_and_numbers_of_tensors_must_fit():
    sizes = sizes_of(lambda x: x.sin(), torch.ones(4, 3), axes=[[0]])
    assert not sizes.accept([torch.ones(5, 4)]) and not sizes.accept([torch.ones(5)]) and not sizes.accept([torch.ones(5, 3, 1)])


def test_strides_must_fit():
    sizes = sizes_of(lambda x: x.sin(), torch.ones(4, 3), axes=[[0]])
    assert (
        sizes.accept([torch.ones(7, 3)])
        and not sizes.accept([torch.ones(3, 7).t()])
        and not sizes.accept([torch.ones(7, 6)[:, ::2]])
    )
    turned = sizes_of(lambda x: x.sin(), torch.ones(3, 4).t(), axes=[[0]])
    assert turned.accept([torch.ones(3, 7).t()]) and not turned.accept([torch.ones(7, 3)])


def test_axes_that_are_equal_stay_equal():
    sizes = sizes_of(torch.mul, torch.ones(4), torch.ones(4), axes=[[0], [0]])
    assert sizes.accept([torch.ones(5), torch.ones(5)]) and not sizes.accept([torch.ones(5), torch.ones(6)])


def test_axes_of_different_sizes_are_independent():
    sizes = sizes_of(lambda x, y: x.sum() + y.sum(), torch.ones(4), torch.ones(5), axes=[[0], [0]])
    assert sizes.accept([torch.ones(7), torch.ones(3)])


def test_an_open_axis_that_a_fixed_one_has_to_match():
    sizes = sizes_of(lambda x, y: x * y if x.shape[0] == y.shape[0] else x, torch.ones(4), torch.ones(4), axes=[[0], []])
    assert sizes.accept([torch.ones(4), torch.ones(4)]) and not sizes.accept([torch.ones(5), torch.ones(4)])


@pytest.mark.parametrize(("first", "fitting", "other"), [(4, (2, 10), (11, 50)), (11, (11, 50), (2, 10))])
def test_conditions_of_python_hold(first, fitting, other):
    sizes = sizes_of(lambda x: x * 2 if x.shape[0] > 10 else x * 3, torch.ones(first), axes=[[0]])
    assert all(sizes.accept([torch.ones(n)]) for n in fitting) and not any(sizes.accept([torch.ones(n)]) for n in other)


def test_a_condition_on_the_remainder():
    sizes = sizes_of(lambda x: x.reshape(2, -1) if x.shape[0] % 2 == 0 else x, torch.ones(4), axes=[[0]])
    assert [sizes.accept([torch.ones(n)]) for n in (6, 8, 5, 7)] == [True, True, False, False]


def test_a_size_that_python_used_as_a_number_is_fixed():
    sizes = sizes_of(lambda x: sum(x[i] * i for i in range(x.shape[0])), torch.ones(4), axes=[[0]])
    assert sizes.accept([torch.ones(4)]) and not sizes.accept([torch.ones(5)])


def test_two_open_axes_of_one_tensor():
    sizes = sizes_of(lambda x: x.sin(), torch.ones(4, 5), axes=[[0, 1]])
    assert sizes.accept([torch.ones(7, 3)]) and not sizes.accept([torch.ones(3, 7).t()])
