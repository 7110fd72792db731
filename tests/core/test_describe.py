"""Short texts for values."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch

from torchbatch import jit, vmap
from torchbatch.core.describe import describe, function_name, method_name, shown


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (torch.zeros(8, 3), "float32[8,3]"),
        (torch.tensor(1), "int64[]"),
        (torch.zeros(0, dtype=torch.bfloat16), "bfloat16[0]"),
        ("a", "a value of type str"),
        (None, "a value of type NoneType"),
    ],
)
def test_describe(value, text):
    assert describe(value) == text


def test_describe_says_what_one_sample_is():
    seen = []
    vmap(lambda x: (seen.append(describe(x)), x)[1])(torch.zeros(8, 3))
    assert seen == ["float32[3]"]


class Long:
    def __repr__(self):
        return "x" * 300


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("sum", "'sum' of type str"),
        (None, "None of type NoneType"),
        (True, "True of type bool"),
        (Long(), "x" * 99 + "… of type Long"),
        (np.array([["a"], ["b"]]), "array([['a'], ['b']], dtype='<U1') of type ndarray and dtype <U1"),
        (torch.tensor(0), "tensor(0) of type Tensor and dtype torch.int64"),
    ],
)
def test_shown(value, text):
    assert shown(value) == text


def test_shown_is_one_short_line():
    text = shown(np.zeros((50, 50)))
    assert "\n" not in text and len(text) < 160


def test_shown_says_nothing_of_how_transforms_work():
    said = []
    torch.func.grad(lambda x: (said.append(shown(x)), x.sum())[1])(torch.zeros(2, 3))
    vmap(lambda x: (said.append(shown(x)), x)[1])(torch.zeros(2, 3))
    jit(lambda x: (said.append(shown(x)), x)[1], backend="eager")(torch.zeros(3))
    assert said == ["float32[2,3] of type Tensor", "float32[3] of type Tensor", "float32[3] of type Tensor"]


def test_method_name():
    assert method_name(abs, "defjvp") == "abs.defjvp"
    assert method_name(lambda: 1, "defjvp") == "its method defjvp"


def test_function_name():
    assert function_name(abs) == "abs"
    assert function_name(lambda: 1) == "<lambda>"
    assert function_name(functools.partial(abs)) == "partial"
    assert function_name(torch.nn.ReLU()) == "ReLU"
    assert function_name(vmap(abs)) == "abs"
