"""The rows of `docs/coming_from.md`, run in JAX, in torch.func and here: what differs, and what does not."""

from __future__ import annotations

import inspect
import pickle
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

import torchbatch
from torchbatch import vmap

jax = pytest.importorskip("jax")
jnp = jax.numpy
tvmap = torch.func.vmap
AS_ON_THE_PAGE = torch.__version__.startswith("2.13.")  # torch.func of other versions may differ

PAGE = (Path(__file__).parent.parent / "docs" / "coming_from.md").read_text(encoding="utf-8")
X = torch.arange(6.0).reshape(3, 2)
JX = jnp.arange(6.0).reshape(3, 2)


def outcome(thunk):
    """The shape of the result, the result itself if it has none, or the built-in class of what was raised."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = thunk()
    except (ValueError, TypeError, RuntimeError, IndexError) as error:
        return next(c for c in (ValueError, IndexError, TypeError, RuntimeError) if isinstance(error, c))
    return tuple(result.shape) if hasattr(result, "shape") else result


def add(x, w=0):
    return x + w


def first(x, *rest):
    return x


def written_in_place(x):
    out = torch.zeros(2)
    out += x
    return out


def read(how, x):
    return getattr(x, how)()


# The row of the page; then the call and its outcome in JAX, in torch.func and here. None: there is no such thing.
ROWS = [
    ("names of the options",
     None, None,
     lambda: tvmap(first, in_dims=1, out_dims=1)(X), (3, 2),
     lambda: vmap(first, in_dims=1), TypeError),
    ("keyword arguments",
     lambda: jax.vmap(add)(JX, w=JX), (3, 2),
     lambda: tvmap(add)(X, w=X), (3, 3, 2),
     lambda: vmap(add)(X, w=X), (3, 2)),
    ("a list as `in_axes`",
     lambda: jax.vmap(add, [0, 0])(JX, JX), (3, 2),
     lambda: tvmap(add, [0, 0])(X, X), ValueError,
     lambda: vmap(add, [0, 0])(X, X), (3, 2)),
    ("`in_axes` as a prefix tree",
     lambda: jax.vmap(lambda d: d["a"][0], ({"a": 0, "b": None},))({"a": [JX], "b": 1}), (3, 2),
     lambda: tvmap(lambda d: d["a"][0], ({"a": 0, "b": None},))({"a": [X], "b": 1}), (3, 2),
     lambda: vmap(lambda d: d["a"][0], ({"a": 0, "b": None},))({"a": [X], "b": 1}), (3, 2)),
    ("axes",
     lambda: jax.vmap(first, -2)(JX), (3, 2),
     lambda: tvmap(first, -2)(X), (3, 2),
     lambda: vmap(first, -2)(X), (3, 2)),
    ("`True` as an axis",
     lambda: jax.vmap(first, True)(JX), TypeError,
     lambda: tvmap(first, True)(X), TypeError,
     lambda: vmap(first, True)(X), TypeError),
    ("`None` in place of a tree",
     lambda: jax.vmap(first)(JX, None), (3, 2),
     lambda: tvmap(first)(X, None), ValueError,
     lambda: vmap(first)(X, None), (3, 2)),
    ("nothing mapped, or no arguments",
     lambda: jax.vmap(lambda: 1.0, axis_size=3)(), (3,),
     lambda: tvmap(lambda: torch.ones(()))(), ValueError,
     lambda: vmap(lambda: 1.0, axis_size=3)(), (3,)),
    ("NumPy arrays",
     lambda: jax.vmap(first)(np.ones((3, 2))), (3, 2),
     lambda: tvmap(first)(np.ones((3, 2))), ValueError,
     lambda: vmap(first)(np.ones((3, 2))), (3, 2)),
    ("strings, configurations, other objects",
     lambda: jax.vmap(read, (None, 0))("sum", JX), (3,),
     lambda: tvmap(read, (None, 0))("sum", X), (3,),
     lambda: vmap(read, (None, 0))("sum", X), (3,)),
    ("an `nn.Module`",
     None, None,
     lambda: tvmap(lambda m, x: m(x))(torch.nn.ReLU(), X), ValueError,
     lambda: vmap(lambda m, x: m(x))(torch.nn.ReLU(), X), (3, 2)),
    ("size 0",
     lambda: jax.vmap(add)(JX[:0]), (0, 2),
     lambda: tvmap(add)(X[:0]), (0, 2),
     lambda: vmap(add)(X[:0]), (0, 2)),
    ("`axis_name`",
     lambda: jax.vmap(first, axis_name="i")(JX), (3, 2),
     lambda: tvmap(first, axis_name="i")(X), TypeError,
     lambda: vmap(first, axis_name="i")(X), (3, 2)),
    ("`spmd_axis_name`",
     lambda: jax.vmap(first, spmd_axis_name="i")(JX), (3, 2),
     lambda: tvmap(first, spmd_axis_name="i")(X), TypeError,
     lambda: vmap(first, spmd_axis_name="i")(X), (3, 2)),
    ("`sum_match`",
     lambda: jax.vmap(first, out_axes=None, sum_match=True)(JX), (2,),
     lambda: tvmap(first, sum_match=True)(X), TypeError,
     lambda: vmap(first, out_axes=None, sum_match=True)(X), (2,)),
    ("`randomness`, `chunk_size`",
     lambda: jax.vmap(first, chunk_size=2)(JX), TypeError,
     lambda: tvmap(first, chunk_size=2, randomness="same")(X), (3, 2),
     lambda: vmap(first, chunk_size=2, randomness="same")(X), (3, 2)),
    ("does not vary, axis is an int",
     lambda: jax.vmap(lambda x: jnp.ones(2))(JX), (3, 2),
     lambda: tvmap(lambda x: torch.ones(2))(X), (3, 2),
     lambda: vmap(lambda x: torch.ones(2))(X), (3, 2)),
    ("does not vary, axis is None",
     lambda: jax.vmap(lambda x: jnp.ones(2), out_axes=None)(JX), (2,),
     lambda: tvmap(lambda x: torch.ones(2), out_dims=None)(X), (2,),
     lambda: vmap(lambda x: torch.ones(2), out_axes=None)(X), (2,)),
    ("varies, axis is None",
     lambda: jax.vmap(first, out_axes=None)(JX), ValueError,
     lambda: tvmap(first, out_dims=None)(X), ValueError,
     lambda: vmap(first, out_axes=None)(X), ValueError),
    ("Python numbers",
     lambda: jax.vmap(lambda x: 1.0)(JX), (3,),
     lambda: tvmap(lambda x: 1.0)(X), ValueError,
     lambda: vmap(lambda x: 1.0)(X), (3,)),
    ("None",
     lambda: jax.vmap(lambda x: (x, None))(JX)[1], None,
     lambda: tvmap(lambda x: (x, None))(X), ValueError,
     lambda: vmap(lambda x: (x, None))(X)[1], None),
    ("any other object",
     lambda: jax.vmap(lambda x: "s", out_axes=None)(JX), TypeError,
     lambda: tvmap(lambda x: "s", out_dims=None)(X), "s",
     lambda: vmap(lambda x: "s", out_axes=None)(X), "s"),
    ("an axis for each entry of a dictionary",
     lambda: jax.vmap(lambda x: {"a": x}, out_axes={"a": 1})(JX)["a"], (2, 3),
     lambda: tvmap(lambda x: {"a": x}, out_dims={"a": 1})(X)["a"], (2, 3),
     lambda: vmap(lambda x: {"a": x}, out_axes={"a": 1})(X)["a"], (2, 3)),
    ("an axis for a whole subtree",
     lambda: jax.vmap(lambda x: ([x, x], x), out_axes=(1, 0))(JX)[0][1], (2, 3),
     lambda: tvmap(lambda x: ([x, x], x), out_dims=(1, 0))(X)[0][1], (2, 3),
     lambda: vmap(lambda x: ([x, x], x), out_axes=(1, 0))(X)[0][1], (2, 3)),
    ("axis out of bounds",
     lambda: jax.vmap(first, out_axes=2)(JX), ValueError,
     lambda: tvmap(first, out_dims=2)(X), IndexError,
     lambda: vmap(first, out_axes=2)(X), ValueError),
    ("order of a dictionary's keys",
     lambda: list(jax.vmap(first)({"b": JX, "a": JX})), ["a", "b"],
     lambda: list(tvmap(first)({"b": X, "a": X})), ["b", "a"],
     lambda: list(vmap(first)({"b": X, "a": X})), ["b", "a"]),
    ("`__name__`, signature",
     lambda: jax.vmap(add).__name__, "add",
     lambda: tvmap(add).__name__, "add",
     lambda: vmap(add).__name__, "add"),
    ("writing samples' values into `torch.zeros(…)` made inside",
     None, None,
     lambda: tvmap(written_in_place)(X), RuntimeError,
     lambda: vmap(written_in_place)(X), (3, 2)),
    ("writing samples' values into a shared tensor",
     None, None,
     lambda: tvmap(torch.Tensor.add_, (None, 0))(torch.zeros(2), X), RuntimeError,
     lambda: vmap(torch.Tensor.add_, (None, 0))(torch.zeros(2), X), ValueError),
    ("`if` on a sample's value, `.item()`, `nonzero`, masks",
     lambda: jax.vmap(lambda x: x if x.sum() else -x)(JX), TypeError,
     lambda: tvmap(lambda x: x if x.sum() else -x)(X), RuntimeError,
     lambda: vmap(lambda x: x if x.sum() else -x)(X), TypeError),
    ("integer input",
     lambda: jax.grad(lambda x: x * 1.0)(3), TypeError,
     lambda: torch.func.grad(lambda x: x * 1.0)(torch.tensor(3)), RuntimeError,
     lambda: torchbatch.grad(lambda x: x * 1.0)(torch.tensor(3)), TypeError),
    ("`holomorphic`, `allow_int`",
     lambda: jax.grad(lambda z: z * z, holomorphic=True)(1j), (),
     lambda: torch.func.grad(lambda z: z * z, holomorphic=True)(torch.tensor(1j)), TypeError,
     lambda: torchbatch.grad(lambda z: z * z, holomorphic=True)(torch.tensor(1j)), ()),
    ("value together with gradient",
     lambda: float(jax.value_and_grad(lambda x: x * x)(3.0)[0]), 9.0,
     lambda: torch.func.grad_and_value(lambda x: x * x)(torch.tensor(3.0))[0].item(), 6.0,
     lambda: torchbatch.value_and_grad(lambda x: x * x)(torch.tensor(3.0))[0].item(), 9.0),
    ("negative `argnums`",
     lambda: float(jax.grad(lambda x, y: x * y, argnums=-1)(2.0, 3.0)), 2.0,
     lambda: torch.func.grad(lambda x, y: x * y, argnums=-1)(torch.tensor(2.0), torch.tensor(3.0)).item(), 2.0,
     lambda: torchbatch.grad(lambda x, y: x * y, argnums=-1)(torch.tensor(2.0), torch.tensor(3.0)).item(), 2.0),
    ("Python numbers as arguments",
     lambda: float(jax.grad(lambda x: x * x)(3.0)), 6.0,
     lambda: torch.func.grad(lambda x: x * x)(3.0), ValueError,
     lambda: torchbatch.grad(lambda x: x * x)(3.0).item(), 6.0),
    ("gradient of an integer under `allow_int`",
     lambda: str(jax.grad(lambda x: x * 1.0, allow_int=True)(3).dtype), str(np.dtype(jax.dtypes.float0)),
     None, None,
     lambda: torchbatch.grad(lambda x: x * 1.0, allow_int=True)(3).dtype, torch.bool),
    ("output that is not one number",
     lambda: jax.grad(lambda x: x)(JX), TypeError,
     lambda: torch.func.grad(lambda x: x)(X), RuntimeError,
     lambda: torchbatch.grad(lambda x: x)(X), TypeError),
    ("gradient of a real function of `z = x + iy`",
     lambda: complex(jax.grad(lambda z: (z * z).real)(1 + 2j)), 2 + 4j,
     lambda: torch.func.grad(lambda z: (z * z).real)(torch.tensor(1 + 2j)).item(), 2 - 4j,
     lambda: torchbatch.grad(lambda z: (z * z).real)(torch.tensor(1 + 2j)).item(), 2 + 4j),
    ("`jacfwd(randomness=)`, `jacrev(chunk_size=)`",
     lambda: jax.jacrev(jnp.sin, chunk_size=2)(JX), TypeError,
     lambda: torch.func.jacrev(torch.sin, chunk_size=2)(X), (3, 2, 3, 2),
     lambda: torchbatch.jacrev(torch.sin, chunk_size=2)(X), TypeError),
    ("`arange(3)`",
     lambda: str(jnp.arange(3).dtype), "int32",
     lambda: torch.arange(3).dtype, torch.int64,
     lambda: torchbatch.vmap(lambda x: 1)(X).dtype, torch.int64),
]  # fmt: skip


@pytest.mark.parametrize("row", ROWS, ids=[row[0] for row in ROWS])
def test_row(row):
    for library, thunk, expected in zip(("jax", "torch.func", "torchbatch"), row[1::2], row[2::2], strict=True):
        if thunk is not None and (library != "torch.func" or AS_ON_THE_PAGE):
            assert outcome(thunk) == expected, library


def test_the_rows_are_those_of_the_page():
    rows = set(re.findall(r"^\| ([^|]+?) \|", PAGE, flags=re.MULTILINE))
    assert {row[0] for row in ROWS} <= rows


@pytest.mark.parametrize("function", [tvmap, vmap], ids=["torch.func", "torchbatch"])
def test_writing_into_a_mapped_argument_is_seen_by_the_caller(function):
    x = X.clone()
    function(lambda row: row.mul_(2))(x)
    assert torch.equal(x, 2 * X)


def test_a_value_that_outlives_its_vmap():
    outlived = {function: [] for function in (jax.vmap, tvmap, vmap)}

    def keep_then_use(function, x):
        function(lambda x: outlived[function].append(x * 1) or x)(x)
        return function(lambda x: x + outlived[function][0])(10 * x)

    with pytest.raises(jax.errors.UnexpectedTracerError):
        keep_then_use(jax.vmap, JX)
    if AS_ON_THE_PAGE:
        assert torch.equal(keep_then_use(tvmap, X), 11 * X)
    with pytest.raises(torchbatch.errors.EscapedValueError, match="used after the vmap that it belongs to"):
        keep_then_use(vmap, X)


@torch.library.custom_op("torchbatch_tests::reversed", mutates_args=())
def reversed_copy(x: torch.Tensor) -> torch.Tensor:
    return x.flip(0).clone()


def test_an_operator_without_a_batching_rule():
    assert torch.equal(tvmap(reversed_copy)(X), X.flip(1))
    with torchbatch.fallback("silent"):
        assert torch.equal(vmap(reversed_copy)(X), X.flip(1))
    with pytest.raises(RuntimeError), torchbatch.fallback("error"):
        vmap(reversed_copy)(X)


def test_roll_on_single_numbers():
    if AS_ON_THE_PAGE:
        assert tvmap(lambda x: torch.roll(x, 1))(torch.arange(3.0)).tolist() == [2, 0, 1]
    assert vmap(lambda x: torch.roll(x, 1))(torch.arange(3.0)).tolist() == [0, 1, 2]


def test_dtypes():
    assert (jnp.arange(3).dtype, torch.arange(3).dtype) == (jnp.int32, torch.int64)
    assert vmap(lambda x: 1)(X).dtype == torch.int64
    assert vmap(lambda x: 1.0)(X).dtype == torch.float32
    assert vmap(first)(np.ones((3, 2))).dtype == torch.float64


@tvmap
def decorated_there(x):
    return x


@vmap
def decorated_here(x):
    return x


@jax.vmap
def decorated_in_jax(x):
    return x


def test_pickle():
    for name in ("decorated_there", "decorated_here", "decorated_in_jax"):
        assert globals()[name].__name__ == name
        assert "x" in inspect.signature(globals()[name]).parameters
    for theirs in (tvmap, jax.vmap):
        with pytest.raises(pickle.PicklingError):
            pickle.dumps(theirs(torch.nn.functional.relu))
    ours = pickle.loads(pickle.dumps(vmap(torch.nn.functional.relu)))
    assert torch.equal(ours(X - 1), torch.relu(X - 1))


class Twice(torch.autograd.Function):
    """Has a batching rule of its own, which notes the batch sizes that it was given."""

    sizes: list[int] = []  # noqa: RUF012

    @staticmethod
    def forward(x):
        return 2 * x

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient

    @staticmethod
    def vmap(info, in_dims, x):
        Twice.sizes.append(info.batch_size)
        return Twice.apply(x), in_dims[0]


def test_the_vmap_method_of_a_function_is_what_custom_vmap_is_in_jax():
    Twice.sizes.clear()
    assert torch.equal(vmap(Twice.apply)(X), 2 * X)
    assert Twice.sizes == [3]
    assert torch.equal(vmap(torch.func.grad(lambda x: Twice.apply(x).sum()))(X), torch.full((3, 2), 2.0))
