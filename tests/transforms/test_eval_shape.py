"""eval_shape: shapes and dtypes as JAX's, and nothing computed."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from torchbatch.core import tree
from torchbatch.errors import (
    AxisSpecError,
    DataDependentError,
    InputTypeError,
    OutputTypeError,
    UnsupportedOperationError,
)
from torchbatch.transforms.eval_shape import ShapeDtypeStruct, eval_shape
from torchbatch.transforms.grad import grad
from torchbatch.transforms.jacobian import hessian
from torchbatch.transforms.vmap import vmap

S = ShapeDtypeStruct
F32 = torch.float32
W = torch.randn(3, 5)


def shapes(value):
    return [(tuple(leaf.shape), str(leaf.dtype).removeprefix("torch.")) for leaf in tree.flatten(value)[0]]


def test_against_jax():
    jax = pytest.importorskip("jax")

    def make(xp):
        return lambda a, p, k: {"o": xp.exp(a) @ p["w"], "t": (xp.sum(a), None), "k": k * a, "c": a > 0}

    ours = eval_shape(make(torch), S((2, 3), F32), {"w": W}, k=2.0)
    theirs = jax.eval_shape(make(jax.numpy), jax.ShapeDtypeStruct((2, 3), "float32"), {"w": W.numpy()}, k=2.0)
    expected = [(leaf.shape, str(leaf.dtype)) for leaf in jax.tree.leaves(theirs)]
    assert shapes(ours) == expected and jax.tree.structure(ours) == jax.tree.structure(theirs)


def test_nothing_is_computed():
    huge = S((10**6, 10**6), F32)
    assert eval_shape(lambda a, b: (a @ b).sum(0), huge, huge).shape == (10**6,)


CASES = {
    "closure": (lambda a: torch.cat([a, W[:2]], 1) @ torch.ones(8, 1), [((2, 1), "float32")]),
    "factories": (
        lambda a: a + torch.zeros(3) + torch.randn(3, device="cpu") + torch.tensor([1, 2, 3]),
        [((2, 3), "float32")],
    ),
    "device of the argument": (lambda a: a + torch.zeros(3, device=a.device), [((2, 3), "float32")]),
    "dtype moves": (lambda a: a.to(torch.float64).cpu().to("cpu"), [((2, 3), "float64")]),
    "numbers": (lambda a: (a, 1.5, 2, True, np.float64(1), np.ones(2)), None),
    "transforms": (grad(lambda a: (a @ W).sum()), [((2, 3), "float32")]),
    "closure in a transform": (lambda a: grad(lambda w: (a @ w).sum())(W), [((3, 5), "float32")]),
    "hessian": (hessian(lambda a: (a**2).sum()), [((2, 3, 2, 3), "float32")]),
    "vmap": (torch.func.vmap(lambda row: row @ W), [((2, 5), "float32")]),
}


@pytest.mark.parametrize("case", CASES)
def test_programs(case):
    function, expected = CASES[case]
    found = shapes(eval_shape(function, S((2, 3), F32)))
    if expected is None:
        expected = [
            ((2, 3), "float32"),
            ((), "float32"),
            ((), "int64"),
            ((), "bool"),
            ((), "float64"),
            ((2,), "float64"),
        ]
    assert found == expected


def test_module_and_numpy():
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Dropout())
    before = model[1].running_mean.clone()
    assert eval_shape(model, S((2, 3, 8, 8), F32)).shape == (2, 4, 6, 6)
    assert torch.equal(model[1].running_mean, before)
    assert shapes(eval_shape(lambda a, b, c: a * b + c, np.ones(3, np.float32), 2, 1.5)) == [((3,), "float32")]


def test_arguments_are_not_written():
    x = torch.ones(3)
    eval_shape(lambda a: (a.add_(1), x.add_(1)), x)
    assert x.tolist() == [1, 1, 1]


@pytest.mark.parametrize("mapped", [torch.func.vmap, vmap], ids=["torch.func.vmap", "torchbatch.vmap"])
def test_inside_vmap_it_sees_one_sample(mapped):
    seen = []
    mapped(lambda x: seen.append(eval_shape(lambda a: a @ W, x)) or x)(torch.ones(2, 4, 3))
    assert seen[0] == S((4, 5), F32)


def test_the_struct():
    struct = S((2, 3), F32)
    assert repr(struct) == "ShapeDtypeStruct(shape=(2, 3), dtype=float32, device=cpu)"
    assert struct == S([2, 3], F32, "cpu") and hash(struct) == hash(S([2, 3], F32))
    assert struct != S((2, 3), F32, "cuda") and struct != (2, 3)
    assert (struct.ndim, struct.size, struct.shape) == (2, 6, torch.Size((2, 3)))
    assert eval_shape(lambda a: a @ a.T, S((2, 4), F32, "cuda")).device == torch.device("cuda")


@pytest.mark.parametrize(
    ("function", "args", "error", "text"),
    [
        (lambda a, b: a, (W, {"k": "s"}), InputTypeError, "argument b['k'] is 's' of type str, where a tensor"),
        (lambda a: {"o": "s"}, (W,), OutputTypeError, "output['o'] is 's' of type str, but every output"),
        (lambda a: a if a.sum() > 0 else -a, (W,), DataDependentError, "needs the value of a tensor (__bool__)"),
        (lambda a: a.sum().item(), (W,), DataDependentError, "needs the value of a tensor (item)"),
        (lambda a: a[a > 0], (W,), DataDependentError, "Use torch.where in the place of Python's if and of boolean"),
        (lambda a: a.nonzero(), (W,), DataDependentError, "(nonzero)"),
        (lambda a: a.to_sparse(), (W,), UnsupportedOperationError, "cannot say which shape to_sparse returns"),
        (
            lambda a: a.cuda(),
            (W,),
            UnsupportedOperationError,
            "asks for a tensor on cuda, but its arguments are on cpu",
        ),
        (lambda a: W.to_sparse() @ a, (W,), UnsupportedOperationError, "cannot say which shape to_sparse returns"),
        (lambda a: a.to("cuda:1"), (W,), UnsupportedOperationError, "asks for a tensor on cuda:1"),
    ],
)
def test_errors(function, args, error, text):
    with pytest.raises(error) as raised:
        eval_shape(function, *args)
    assert text in str(raised.value)


def test_keyword_argument_is_named():
    with pytest.raises(InputTypeError, match="argument mode is 'fast' of type str"):
        eval_shape(lambda a, *, mode: a, W, mode="fast")


def test_bad_struct():
    with pytest.raises(AxisSpecError, match=r"dtype must be a torch\.dtype such as torch\.float32, but got 'float32'"):
        S((2,), "float32")
