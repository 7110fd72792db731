"""``first_divergence`` names the operation and the line at which two versions part, and nothing where they do not."""

from __future__ import annotations

import math
import os
import sys
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import torchbatch
from torchbatch.errors import AxisError, AxisSpecError, DataDependentError
from torchbatch.testing.divergence import first_divergence
from torchbatch.testing.intermediates import Line, line_of, of_torch
from torchbatch.testing.tolerance import Tolerance

try:
    import jax
    import jax.numpy as jnp
except ModuleNotFoundError:
    jax = jnp = None
needs_jax = pytest.mark.skipif(jax is None, reason="needs JAX")


@pytest.fixture(autouse=True, scope="module")
def quick_compilation():
    """JAX compiles in half the time without its optimizations."""
    if jax is None:
        yield
        return
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


def normal(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32))


X, W, B, Q = normal(4, 6), normal(6, 6, seed=1), normal(6, seed=2), normal(2, 5, 8, seed=3)


# --- PyTorch and JAX -------------------------------------------------------------------------------------------------
# The line that a mutant parts at is marked with the word "here" in both versions.


def norm(x):
    return F.layer_norm(x, (6,), eps=1e-5)  # here


def block(q, w):
    a = q @ w
    heads = a.view(2, 5, 2, 4).transpose(1, 2)
    scores = heads @ heads.transpose(-1, -2)  # product
    scores = scores / math.sqrt(4)  # scale
    keep = torch.tril(torch.ones(5, 5, dtype=torch.bool))  # keep
    scores = scores.masked_fill(~keep, -math.inf)  # mask
    p = torch.softmax(scores, -1)  # softmax
    mixed = (p @ heads).transpose(1, 2).reshape(2, 5, 8)  # mix
    return mixed + q  # residual


def jax_block(q, w, split="right", scale=2.0, offset=0, axis=-1, residual=1.0, precise=True):
    a = q @ w
    heads = a.reshape(2, 5, 2, 4).transpose(0, 2, 1, 3) if split == "right" else a.reshape(2, 2, 5, 4)
    scores = jnp.einsum("bhqd,bhkd->bhqk", heads, heads)  # product
    scores = scores / scale  # scale
    keep = jnp.tril(jnp.ones((5, 5), dtype=bool), offset)  # keep
    scores = jnp.where(keep, scores, -jnp.inf)  # mask
    p = jax.nn.softmax(scores, axis=axis)  # softmax
    p = p if precise else p.astype(jnp.bfloat16).astype(jnp.float32)  # rounding
    mixed = jnp.einsum("bhqk,bhkd->bqhd", p, heads).reshape(2, 5, 8)  # mix
    return mixed + residual * q  # residual


def mlp(x, w, b):
    y = F.linear(x, w, b)  # linear
    y = F.gelu(y)  # activation
    return (y**2).mean(0)  # loss


def jax_mlp(x, w, b, transposed=True, bias=1.0, approximate=False, mean=True):
    y = x @ (w.T if transposed else w) + bias * b  # linear
    y = jax.nn.gelu(y, approximate=approximate)  # activation
    return (y**2).mean(0) if mean else (y**2).sum(0)  # loss


def jax_norm(x, eps=1e-5, ddof=0):
    centred = x - x.mean(-1, keepdims=True)
    variance = jnp.var(x, -1, keepdims=True, ddof=ddof)  # variance
    return centred / jnp.sqrt(variance + eps)  # epsilon


class Parting(NamedTuple):
    name: str
    torch: Any
    jax: Any
    changes: dict[str, Any]
    args: tuple[Any, ...]
    operation: str
    mark: str
    other: tuple[str, ...]  # what the operation may be in JAX
    other_mark: str


PARTINGS = [
    Parting("epsilon", norm, jax_norm, {"eps": 1e-3}, (X,), "native_layer_norm", "here", ("add",), "epsilon"),
    Parting("ddof", norm, jax_norm, {"ddof": 1}, (X,), "native_layer_norm", "here", ("sub", "div"), "variance"),
    Parting("scale", block, jax_block, {"scale": 1.0}, (Q, normal(8, 8)), "div", "scale", ("select_n", "div"), "mask"),
    Parting("other scale", block, jax_block, {"scale": 4.0}, (Q, normal(8, 8)), "div", "scale", ("div",), "scale"),
    Parting("mask", block, jax_block, {"offset": 1}, (Q, normal(8, 8)), "tril", "keep", ("add", "ge"), "keep"),
    Parting("softmax axis", block, jax_block, {"axis": -2}, (Q, normal(8, 8)), "_softmax", "softmax", ("reduce_max",), "softmax"),
    Parting("heads", block, jax_block, {"split": "wrong"}, (Q, normal(8, 8)), "bmm", "product", ("dot_general",), "product"),
    Parting("residual", block, jax_block, {"residual": 0.5}, (Q, normal(8, 8)), "add", "residual", ("mul", "add"), "residual"),
    Parting(
        "rounding",
        block,
        jax_block,
        {"precise": False},
        (Q, normal(8, 8)),
        "bmm",
        "mix",
        ("convert_element_type",),
        "rounding",
    ),
    Parting("transposed", mlp, jax_mlp, {"transposed": False}, (X, W, B), "addmm", "linear", ("dot_general",), "linear"),
    Parting("bias", mlp, jax_mlp, {"bias": 0.5}, (X, W, B), "addmm", "linear", ("mul", "add"), "linear"),
    Parting("gelu", mlp, jax_mlp, {"approximate": True}, (X, W, B), "gelu", "activation", ("integer_pow", "mul"), "activation"),
    Parting("mean", mlp, jax_mlp, {"mean": False}, (X, W, B), "mean", "loss", ("reduce_sum",), "loss"),
]


@needs_jax
@pytest.mark.parametrize("case", PARTINGS, ids=lambda case: case.name)
def test_the_operation_and_the_line_of_a_port_that_is_wrong(case):
    found = first_divergence(case.torch, ("jax", lambda *args: case.jax(*args, **case.changes)), *case.args)
    assert found.first.operation == f"aten.{case.operation}", str(found)
    assert f"# {case.mark}" in found.first.line.text, str(found)
    assert found.second.operation in case.other, str(found)
    assert f"# {case.other_mark}" in found.second.line.text, str(found)
    assert not found.difference.passed


@needs_jax
@pytest.mark.parametrize(
    ("first", "second", "args"),
    [(norm, jax_norm, (X,)), (block, jax_block, (Q, normal(8, 8))), (mlp, jax_mlp, (X, W, B))],
    ids=["norm", "block", "mlp"],
)
def test_a_correct_port_does_not_part(first, second, args):
    assert first_divergence(first, ("jax", second), *args) is None
    assert first_divergence(("jax", second), first, *args) is None


@needs_jax
def test_lines_of_a_function_that_was_traced_before():
    """JAX keeps what it traced of its own functions, with the line of the first call."""

    def earlier(x):
        return jnp.var(x)

    def later(x):
        return jnp.var(x, ddof=0) + x.sum()  # later

    of = torch.arange(6.0)
    first_divergence(torch.var, ("jax", earlier), of)
    found = first_divergence(lambda x: x.var(correction=1) + x.sum(), ("jax", later), of)
    assert "# later" in found.second.line.text


@needs_jax
def test_a_function_that_is_jitted_inside():
    @jax.jit
    def inner(x):
        y = jnp.sin(x)
        return y * 3  # inside

    found = first_divergence(lambda x: x.sin() * 2, ("jax", lambda x: inner(x)), X)
    assert found.agreed == 1 and "# inside" in found.second.line.text


def cell(x, factor=0.5):
    h, found = torch.zeros(6), []
    for row in x:
        h = torch.tanh(h * factor + row)  # cell
        found.append(h)
    return torch.stack(found)


def jax_cell(x, factor=0.5, reverse=False):
    def step(h, row):
        h = jnp.tanh(h * factor + row)  # step
        return h, h

    return jax.lax.scan(step, jnp.zeros(6), x, reverse=reverse)[1]


@needs_jax
def test_a_loop_of_jax_is_written_out():
    assert first_divergence(cell, ("jax", jax_cell), X) is None
    assert first_divergence(lambda x: cell(x.flip(0)).flip(0), ("jax", lambda x: jax_cell(x, reverse=True)), X) is None
    found = first_divergence(cell, ("jax", lambda x: jax_cell(x, 0.6)), X)
    assert "# cell" in found.first.line.text and "# step" in found.second.line.text
    assert (found.first.operation, found.second.operation) == ("aten.mul", "mul")
    long = normal(70, 6)
    assert first_divergence(cell, ("jax", jax_cell), long) is None
    assert first_divergence(cell, ("jax", lambda x: jax_cell(x, 0.6)), long).second.operation == "scan"
    assert first_divergence(lambda x: x.sum(), ("jax", lambda x: jax_cell(x).sum()), torch.zeros(0, 6)) is None


@needs_jax
def test_without_jax(monkeypatch):
    monkeypatch.setitem(sys.modules, "jax", None)
    with pytest.raises(ImportError, match=r"needs JAX, which is not installed"):
        first_divergence(norm, ("jax", norm), X)


# --- PyTorch and PyTorch ---------------------------------------------------------------------------------------------


def test_two_versions_in_pytorch():
    def old(x, w):
        y = x @ w
        z = y.relu()
        return z.sum(-1) / 6

    def new(x, w):
        z = torch.relu((x.double() @ w.double()).float())
        return z.sum(0) / 6  # wrong

    found = first_divergence(old, new, W, W)
    assert (found.agreed, found.first.operation, found.second.operation) == (2, "aten.sum", "aten.sum")
    assert found.first.version == "first version" and "# wrong" in found.second.line.text
    assert "6 of 6 differ" in found.difference.message


CHAIN = [
    lambda x: x @ W,
    lambda x: x.tanh(),
    lambda x: x.T.reshape(6, 4) * 2,
    lambda x: x - x.mean(0),
    lambda x: x.softmax(-1),
    lambda x: F.layer_norm(x, (4,)),
    lambda x: torch.cat([x, x.exp()], 1),
    lambda x: x.cumsum(0),
]


@pytest.mark.parametrize("place", range(len(CHAIN)))
@pytest.mark.parametrize("seed", range(3))
def test_each_step_of_a_chain(place, seed):
    """Whichever step is changed, everything before it is agreed upon, and nothing after it."""

    def run(x, steps):
        for step in steps:
            x = step(x)
        return x

    def changed(x):
        y = CHAIN[place](x)
        return y + y**2 * 0.1  # changed

    x = normal(4, 6, seed=10 + seed)
    steps = [*CHAIN[:place], changed, *CHAIN[place + 1 :]]
    found = first_divergence(lambda x: run(x, CHAIN), lambda x: run(x, steps), x)
    before = of_torch(lambda x: run(x, CHAIN[: place + 1]), (x,)).steps
    if place < len(CHAIN) - 1:
        assert found.agreed == sum(step.kind == "operation" and bool(step.inputs) for step in before)
    assert "# changed" in found.second.line.text


def test_algebra_does_not_matter():
    def before(q, k):
        return (q / 3 @ k.T).exp()

    def after(q, k):
        return torch.exp(torch.einsum("ij,kj->ki", k, q) / 3)

    assert first_divergence(before, after, X, X + 1) is None
    found = first_divergence(before, lambda q, k: torch.exp(q @ k.T / 3).sqrt(), X, X + 1)
    assert found.first.operation in ("aten.exp", "aten.clone") or found.second.operation == "aten.sqrt"


def test_masks_may_be_inverted():
    """A mask that says what is kept is that which says what is not; so the mistake is not in the mask."""
    keep = torch.ones(4, 4).tril()

    def kept(x):
        y = torch.where(keep > 0, x @ x.T, -1e9)
        return y.softmax(-1) * 2  # two

    def dropped(x):
        y = (x @ x.T).masked_fill(keep.logical_not(), -1e9)
        return y.softmax(-1) * 3  # three

    found = first_divergence(kept, dropped, X)
    assert "# two" in found.first.line.text and "# three" in found.second.line.text and found.agreed >= 4


def test_an_order_along_an_axis_is_not_an_order_of_axes():
    found = first_divergence(lambda x: x.exp() @ W, lambda x: x.exp().flip(1) @ W, X)  # flip
    assert found.second.operation == "aten.flip" and found.agreed == 1


def test_transforms_are_looked_through():
    def model(x):
        return (x.tanh() * 2).sum()

    def other(x):
        return (x.tanh() * 3).sum()

    found = first_divergence(torchbatch.vmap(model), torchbatch.vmap(other), X)
    assert found.agreed == 1 and found.first.operation == "aten.mul" and "x.tanh() * 2" in found.first.line.text
    found = first_divergence(torchbatch.grad(model), torchbatch.grad(lambda x: model(x) + (x * 2).sum()), X)
    assert found.first.line is None or "x.tanh()" in found.first.line.text  # a backward pass has no lines of its own


def test_modules():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 3), torch.nn.Tanh(), torch.nn.LayerNorm(3))
    other = torch.nn.Sequential(model[0], torch.nn.Tanh(), torch.nn.LayerNorm(3, eps=0.1))
    assert first_divergence(model, model, X) is None
    assert first_divergence(model, other, X).first.operation == "aten.native_layer_norm"


def test_outputs_in_another_order_of_axes():
    found = first_divergence(lambda x: x @ x.T @ x[:, :4], lambda x: (x @ x.T @ x[:, :4]).T, X)
    assert "in another order" in found.hint
    assert "in another order" in str(found)


def test_draws():
    torch.manual_seed(0)
    found = first_divergence(lambda x: x.exp() * torch.rand(6), lambda x: x.exp() * torch.rand(6), X)
    assert found is None or found.first.operation in ("aten.mul", "aten.rand")


def test_only_the_output_that_differs_counts():
    found = first_divergence(lambda x: (x.sin(), x.cos() * 2), lambda x: (x.sin(), x.cos() * 3), X)
    assert found.first.operation == "aten.mul" and found.agreed == 2


def test_a_given_tolerance():
    versions = (lambda x: x * 1.0, lambda x: x * 1.001)
    assert first_divergence(*versions, X) is not None
    assert first_divergence(*versions, X, tolerance=Tolerance(1e-2, 1e-2)) is None


def test_errors():
    with pytest.raises(AxisSpecError, match="NumPy's cannot be traced"):
        first_divergence(norm, ("numpy", np.sin), X)
    with pytest.raises(AxisSpecError, match="takes two versions, each a PyTorch function or a pair"):
        first_divergence(norm, 3, X)
    with pytest.raises(AxisSpecError, match="must begin with the name of its framework"):
        first_divergence(norm, ("tensorflow", norm), X)
    with pytest.raises(AxisError, match="but have 1 and 2 outputs"):
        first_divergence(lambda x: x, lambda x: (x, x), X)
    with pytest.raises(DataDependentError):
        first_divergence(lambda x: x if x.sum() > 0 else -x, norm, X)


# --- PyTorch, compiled -----------------------------------------------------------------------------------------------


def breaking(wrong, right):
    """A compiler that takes one operation for another."""
    calls = []

    def backend(module, inputs):
        calls.append(len(module.graph.nodes))
        for node in module.graph.nodes:
            if node.op == "call_function" and node.target is right:
                node.target = wrong
        module.recompile()
        return module

    return backend, calls


def deep(x, w, before=6):
    for _ in range(before):
        x = (x @ w).tanh()
    y = x.exp()
    z = y.sin()  # wrong
    for _ in range(12 - before):
        z = (z @ w).tanh()
    return z.sum(-1)


@pytest.mark.parametrize("before", [0, 3, 6, 11])
def test_the_operation_that_a_compiler_gets_wrong(before):
    backend, calls = breaking(torch.ops.aten.cos.default, torch.ops.aten.sin.default)

    def fun(x, w):
        return deep(x, w, before)

    found = first_divergence(fun, ("torch jit", fun), X, W / 3, backend=backend)
    assert found.first.operation == found.second.operation == "aten.sin" and found.second.version == "torch jit"
    assert "# wrong" in found.first.line.text and found.agreed == 2 * before + 1
    assert found.difference.message.startswith("compiled, ")
    assert len(calls) <= 2 * (2 + math.ceil(math.log2(27)))


def test_a_compiler_that_is_right():
    assert first_divergence(deep, ("torch jit", deep), X, W / 3, backend="eager") is None


def test_a_compiler_that_is_wrong_about_the_whole_only():
    def backend(module, inputs):
        large = sum(node.op == "call_function" for node in module.graph.nodes) > 2
        return (lambda *args: [value + 1 for value in module(*args)]) if large and _outputs(module) > 1 else module

    fun = lambda x: (x.sin(), x.sin().cos(), x.exp())  # noqa: E731
    found = first_divergence(fun, ("torch jit", fun), X, backend=backend)
    assert found is not None and "only if the whole function is compiled" in found.hint


def _outputs(module):
    return len(next(iter(reversed(module.graph.nodes))).args[0])


@pytest.mark.skipif(os.environ.get("HYPOTHESIS_PROFILE") != "long", reason="compiles, which takes seconds")
def test_inductor_agrees():
    assert first_divergence(torch.sin, ("torch jit", torch.sin), X[0]) is None


def test_eager_versions_are_held_against_each_other_first():
    backend, calls = breaking(torch.ops.aten.cos.default, torch.ops.aten.sin.default)
    found = first_divergence(lambda x: x.sin() * 2, ("torch jit", lambda x: x.sin() * 3), X, backend=backend)
    assert found.first.operation == "aten.mul" and not calls


# --- parts -----------------------------------------------------------------------------------------------------------


def test_lines():
    here = Line(__file__, 2)
    assert str(here).endswith("test_divergence.py:2") and here.text == ""
    assert line_of([(torch.__file__, 3), (__file__, 7), (__file__, 9)]) == Line(__file__, 7)
    assert line_of([(torch.__file__, 3)]) is None


def test_steps_of_a_function():
    steps = of_torch(lambda x: (x @ x.T).view(-1).softmax(0), (X,))
    names = [step.short for step in steps.steps]
    assert names[1] in ("t", "permute", "transpose") and names[2:] == ["mm", "view", "_softmax"]
    assert [step.kind for step in steps.steps] == ["input", "view", "operation", "view", "operation"]
    assert steps.source(3) == 2 and steps.outputs == (4,)
    np.testing.assert_allclose(steps.pieces[-1].numbers, steps.steps[-1].values.numbers, rtol=1e-6)


def test_pieces_of_every_operation_that_is_one_here():
    image = normal(1, 2, 6, 6)
    functions = [
        (lambda x: x.var(-1) + x.std(dim=-1) + x.mean(-1) + x.logsumexp(-1), X),
        (lambda x: torch.var_mean(x, 0), X),
        (lambda x: F.silu(x) + F.gelu(x) + F.gelu(x, approximate="tanh"), X),
        (lambda x: F.batch_norm(x, None, None, training=True), image),
        (lambda x: F.conv2d(x, torch.ones(3, 2, 3, 3), torch.ones(3)), image),
        (lambda x: F.scaled_dot_product_attention(x, x, x), image),
        (lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=True, scale=0.5), image),
        (lambda x: F.group_norm(x, 2, torch.ones(2)), image),
        (lambda x: torch.baddbmm(x, x, x), image[0]),
        (lambda x: x.std() + x.mean(), X),
    ]
    for fun, x in functions:
        assert of_torch(fun, (x,)).pieces
