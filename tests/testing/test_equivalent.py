"""``check_equivalent``: broken ports are caught and blamed, correct ones are not; names, options, inputs, errors."""

from __future__ import annotations

import math
import sys
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from torchbatch.errors import AxisSpecError, EquivalenceError, GradientTypeError, GradientValueError
from torchbatch.testing.equivalent import check_equivalent
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


def normal(*shape, seed=0, dtype=np.float32):
    return torch.from_numpy(np.random.default_rng([seed, *shape]).standard_normal(shape).astype(dtype))


def check(versions, *args, **options):
    return check_equivalent(versions, *args, raise_on_failure=False, backend="eager", **options)


X, W, B, Q = normal(4, 6), normal(6, 6, seed=1), normal(6, seed=2), normal(3, 4, 6, seed=3)
D, Z = W.double() + 6 * torch.eye(6), torch.complex(X, X + 1)
LABELS = torch.tensor([1, 0, 5, 2])
IMAGE, KERNEL = normal(1, 2, 6, 6), normal(3, 2, 3, 3, seed=4)


# --- ports, correct and broken ---------------------------------------------------------------------------------------
# Each pair is a function in PyTorch and its port to JAX; a mutant is the port with one thing wrong.


def layer_norm(x, w, b):
    return F.layer_norm(x, (6,), w[0], b, eps=1e-5)


def jax_layer_norm(x, w, b, eps=1e-5, ddof=0):
    mean = x.mean(-1, keepdims=True)
    variance = jnp.var(x, -1, keepdims=True, ddof=ddof)
    return (x - mean) / jnp.sqrt(variance + eps) * w[0] + b


def attention(q, k, v):
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    keep = torch.tril(torch.ones(scores.shape[-2:], dtype=torch.bool))
    return torch.softmax(scores.masked_fill(~keep, -math.inf), -1) @ v


def jax_attention(q, k, v, scale=None, axis=-1, offset=0, fill=-jnp.inf if jnp else None):
    scores = jnp.einsum("bqd,bkd->bqk", q, k) / (math.sqrt(q.shape[-1]) if scale is None else scale)
    keep = jnp.tril(jnp.ones(scores.shape[-2:], dtype=bool), offset)
    return jax.nn.softmax(jnp.where(keep, scores, fill), axis=axis) @ v


def dense(x, w, b):
    return F.gelu(F.linear(x, w, b))


def jax_dense(x, w, b, approximate=False, transposed=True, bias=1.0):
    return jax.nn.gelu(x @ (w.T if transposed else w) + bias * b, approximate=approximate)


def loss(x, w, labels):
    return F.cross_entropy(x @ w, labels)


def jax_loss(x, w, labels, mean=True):
    logs = jax.nn.log_softmax(x @ w)
    picked = jnp.take_along_axis(logs, labels[:, None], axis=-1)
    return -(picked.mean() if mean else picked.sum())


def convolve(image, kernel):
    return F.conv2d(image, kernel, padding="same").relu()


def jax_convolve(image, kernel, padding="SAME", flip=False):
    kernel = kernel[:, :, ::-1, ::-1] if flip else kernel
    return jax.nn.relu(jax.lax.conv_general_dilated(image, kernel, (1, 1), padding))


def statistics(x):
    return {"var": x.var(-1), "norm": x.norm(dim=-1), "max": x.amax(0), "lse": x.logsumexp(-1)}


def jax_statistics(x, ddof=1, axis=-1):
    norm = jnp.sqrt((x**2).sum(-1))
    return {"var": x.var(-1, ddof=ddof), "norm": norm, "max": x.max(0), "lse": jax.nn.logsumexp(x, axis=axis)}


def integers(x):
    whole = (x * 10).int()
    return whole // 3, torch.remainder(whole, 3), (whole > 0).sum(-1), whole.argmax(-1)


def jax_integers(x, towards_zero=False):
    whole = (x * 10).astype(jnp.int32)
    quotient = jax.lax.div(whole, jnp.int32(3)) if towards_zero else whole // 3
    return quotient, whole % 3, (whole > 0).sum(-1), whole.argmax(-1)


class Port(NamedTuple):
    name: str
    torch: Any
    jax: Any
    args: tuple[Any, ...]


PORTS = [
    Port("layer norm", layer_norm, jax_layer_norm, (X, W, B)),
    Port("attention", attention, jax_attention, (Q, Q + 1, Q * 2)),
    Port("dense", dense, jax_dense, (X, W, B)),
    Port("loss", loss, jax_loss, (X, W, LABELS)),
    Port("convolution", convolve, jax_convolve, (IMAGE, KERNEL)),
    Port("statistics", statistics, jax_statistics, (X,)),
    Port("integers", integers, jax_integers, (X,)),
    Port("softplus", lambda x: F.softplus(x), lambda x: jax.nn.softplus(x), (X,)),
    Port("silu", lambda x: F.silu(x) * x.sigmoid(), lambda x: jax.nn.silu(x) * jax.nn.sigmoid(x), (X,)),
    Port("mse", lambda x, y: F.mse_loss(x, y), lambda x, y: ((x - y) ** 2).mean(), (X, X * 2)),
    Port("cosine", lambda a, b: F.cosine_similarity(a, b, 0), lambda a, b: a @ b / jnp.sqrt(a @ a * (b @ b)), (X[0], X[1])),
    Port("tree", lambda p: [p["a"].sum(), (p["b"],)], lambda p: [p["a"].sum(), (p["b"],)], ({"a": X, "b": B},)),
    Port("numbers", lambda x, n: x * n + 1, lambda x, n: x * n + 1, (X, 3.0)),
    Port("bfloat16", lambda x: x.exp() * 2, lambda x: jnp.exp(x) * 2, (X.bfloat16(),)),
    Port("float64", lambda x: torch.linalg.solve(x, x @ x), lambda x: jnp.linalg.solve(x, x @ x), (D,)),
    Port("complex", lambda z: (z * z.conj()).real + z.abs(), lambda z: (z * z.conj()).real + jnp.abs(z), (Z,)),
    Port("not finite", lambda x: (x.log(), x / 0), lambda x: (jnp.log(x), x / 0), (X,)),
    Port("embedding", lambda w, i: F.embedding(i, w).cumsum(0), lambda w, i: jnp.cumsum(w[i], 0), (W, LABELS)),
    Port("empty", lambda x: (x.sum(), x * 2), lambda x: (x.sum(), x * 2), (torch.zeros(0, 3),)),
    Port("pooling", lambda x: F.max_pool2d(x, 2), lambda x: x.reshape(1, 2, 3, 2, 3, 2).max((3, 5)), (IMAGE,)),
]


@needs_jax
@pytest.mark.parametrize("port", PORTS, ids=lambda port: port.name)
def test_a_correct_port_raises_no_alarm(port):
    report = check({"torch": port.torch, "jax jit": port.jax}, *port.args)
    assert report.passed, str(report)
    assert report.checks[0].status == "passed"
    assert not any("diverge" in note for note in report.notes)


def changed(port, **changes):
    """A port with one thing changed."""
    return lambda *args: port(*args, **changes)


class Mutant(NamedTuple):
    name: str
    torch: Any
    jax: Any
    args: tuple[Any, ...]
    where: str = "output"
    problem: str = "values"


MUTANTS = [
    Mutant("epsilon", layer_norm, changed(jax_layer_norm, eps=1e-3), (X, W, B)),
    Mutant("small epsilon", layer_norm, changed(jax_layer_norm, eps=1e-6), (X * 0.1, W, B)),
    Mutant("ddof of a norm", layer_norm, changed(jax_layer_norm, ddof=1), (X, W, B)),
    Mutant("no scale", attention, changed(jax_attention, scale=1), (Q, Q + 1, Q * 2)),
    Mutant("softmax axis", attention, changed(jax_attention, axis=1), (Q, Q + 1, Q * 2)),
    Mutant("mask off by one", attention, changed(jax_attention, offset=1), (Q, Q + 1, Q * 2)),
    Mutant("mask misses a row", attention, changed(jax_attention, offset=-1), (Q, Q + 1, Q * 2), "output", "nonfinite"),
    Mutant("mask too weak", attention, changed(jax_attention, fill=-5.0), (Q, Q + 1, Q * 2)),
    Mutant("gelu", dense, changed(jax_dense, approximate=True), (X, W, B)),
    Mutant("weights transposed", dense, changed(jax_dense, transposed=False), (X, W, B)),
    Mutant("no bias", dense, changed(jax_dense, bias=0.0), (X, W, B)),
    Mutant("sum for mean", loss, changed(jax_loss, mean=False), (X, W, LABELS)),
    Mutant("padding", convolve, changed(jax_convolve, padding="VALID"), (IMAGE, KERNEL), "output", "shape"),
    Mutant("kernel flipped", convolve, changed(jax_convolve, flip=True), (IMAGE, KERNEL)),
    Mutant("ddof", statistics, changed(jax_statistics, ddof=0), (X,), "output['var']"),
    Mutant("axis", statistics, changed(jax_statistics, axis=0), (X,), "output['lse']", "shape"),
    Mutant("division", integers, changed(jax_integers, towards_zero=True), (X,), "output[0]"),
    Mutant("dtype", lambda x: x.half(), lambda x: x.astype(jnp.bfloat16), (X,), "output", "dtype"),
    Mutant("low precision", lambda x: x @ x.T, lambda x: (x.astype(jnp.bfloat16) @ x.T).astype(jnp.float32), (X,)),
    Mutant("tie", lambda x: x.round().argmax(-1), lambda x: 3 - jnp.round(x)[:, ::-1].argmax(-1), (torch.ones(2, 4),)),
    Mutant("tuple", lambda x: (x, x), lambda x: [x, x], (X,), "output", "structure"),
    Mutant("leaf missing", lambda x: {"a": x, "b": x}, lambda x: {"a": x}, (X,), "output", "structure"),
    Mutant("nan masked", lambda x: x.log(), lambda x: jnp.nan_to_num(jnp.log(x)), (X,), "output", "nonfinite"),
    Mutant("inf clipped", lambda x: x / 0, lambda x: jnp.clip(x / 0, -1e30, 1e30), (X,), "output", "nonfinite"),
    Mutant("transposed", lambda x: x @ x.T @ x @ x.T * x[:, :4], lambda x: (x @ x.T @ x @ x.T * x[:, :4]).T, (X,)),
    Mutant("one element", lambda x: x * 2, lambda x: (x * 2).at[2, 3].add(1e-3), (X,)),
    Mutant("heads split wrongly", lambda x: x.view(4, 2, 3).transpose(0, 1) * 1, lambda x: x.reshape(2, 4, 3) * 1, (X,)),
    Mutant("raises", lambda x: x.sum(), lambda x: jnp.dot(x, x), (X,), "jax jit raises", "error"),
]
BLAMED = {"values", "nonfinite"}


@needs_jax
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_broken_port_is_caught_and_blamed(mutant):
    report = check({"torch": mutant.torch, "jax jit": mutant.jax}, *mutant.args, transforms=["value"])
    (found,) = report.failures
    assert (found.run, found.what, found.problem) == ("jax jit", "values", mutant.problem), str(report)
    assert found.message.startswith(mutant.where), found.message
    if mutant.problem in BLAMED and str(mutant.args[0].dtype) == "torch.float32" and mutant.name != "tie":
        assert "the float64 reference says that jax jit is off" in found.message


@needs_jax
def test_the_other_one_is_blamed_if_it_is_trusted_less():
    versions = {"torch": layer_norm, "jax": changed(jax_layer_norm, eps=1e-3)}
    (found,) = check(versions, X, W, B, against="jax", transforms=["value"]).failures
    assert found.run == "torch" and "says that torch is off" in found.message


GRADIENTS = [
    ("a stop_gradient", lambda x: (x * x.detach()).sum(), lambda x: (x * x).sum(), lambda x: (x * x.detach()).sum()),
    ("off by the batch size", lambda x: (x**2).mean(), lambda x: (x**2).mean(), lambda x: _scaled_gradient((x**2).mean())),
    ("a straight-through estimator", lambda x: x.round().sum(), lambda x: (x + (x.round() - x).detach()).sum(), None),
]


def _scaled_gradient(value):
    return value * 4 - (value * 3).detach()


@pytest.mark.parametrize(("name", "first", "second", "third"), GRADIENTS, ids=lambda case: case if isinstance(case, str) else "")
def test_a_gradient_that_differs_though_the_values_agree(name, first, second, third):
    report = check({"torch": first, "torch other": second if third is None else third if name[0] == "o" else second}, X)
    assert [check.status for check in report.checks] == ["passed", "failed"]
    (found,) = report.failures
    assert found.what == "grad" and found.message.startswith("gradient['x']")


@needs_jax
def test_a_custom_gradient_that_forgets_a_factor():
    @jax.custom_vjp
    def square(x):
        return x**2

    square.defvjp(lambda x: (x**2, x), lambda x, g: (x * g,))
    report = check({"torch": lambda x: (x**2).sum(), "jax": lambda x: square(x).sum()}, X)
    assert [check.what for check in report.failures] == ["grad"]
    assert "says that jax is off" in report.failures[0].message


# --- transforms ------------------------------------------------------------------------------------------------------


def energy(x, w):
    return ((x @ w) ** 2).sum() + x.sin().sum()


def jax_energy(x, w):
    return ((x @ w) ** 2).sum() + jnp.sin(x).sum()


def numpy_energy(x, w):
    return ((x @ w) ** 2).sum() + np.sin(x).sum()


@needs_jax
def test_every_transform_in_every_framework():
    names = ["value", "grad", "value_and_grad", "vjp", "jvp", "jacobian", "hessian", "jit", ("jit", "grad")]
    report = check({"torch": energy, "jax jit": jax_energy, "numpy": numpy_energy}, X[0], W, transforms=names)
    assert report.passed and len(report.checks) == 2 * len(names)
    skipped = {check.what: check.message for check in report.checks if check.status == "skipped"}
    assert {check.run for check in report.checks if check.status == "skipped"} == {"numpy"}
    assert skipped["grad"] == "NumPy has no grad" and skipped["jit(grad)"] == "NumPy has no jit" and "values" not in skipped


@needs_jax
def test_batches():
    versions = {"torch": energy, "jax": jax_energy, "numpy": numpy_energy, "torch loop": energy}
    names = ["vmap", ("vmap", "grad"), ("grad", "vmap")]
    report = check(versions, X.T.contiguous(), W, transforms=names[:2], in_axes=(1, None))
    assert report.passed, str(report)
    assert [check.what for check in report.checks[::3]] == ["vmap", "vmap(grad)"]
    assert report.inputs == ("x: float32[6, 4], axis 1", "w: float32[6, 6]")
    assert [argument.axis for argument in report.arguments] == [1, None]


def test_a_mistake_that_only_a_batch_shows():
    report = check({"torch": lambda x: x.sum(), "torch other": lambda x: x.sum(0)}, X, transforms=["vmap"])
    assert report.passed
    report = check({"torch": lambda x: x.sum(-1), "torch other": lambda x: x.sum(0)}, X[None], transforms=["vmap"])
    assert [check.problem for check in report.failures] == ["shape"]


def test_derivatives_of_arguments_that_hold_integers_too():
    batch = {"x": X, "labels": LABELS}
    report = check({"torch": lambda w, batch: loss(batch["x"], w, batch["labels"]), "torch b": _loss_of_batch}, W, batch)
    assert report.passed and [leaf.where for leaf in report.checks[1].leaves] == ["gradient['w']"]
    report = check({"torch": _loss_of_batch, "torch b": _loss_of_batch}, W, batch, argnums=1)
    assert [leaf.where for leaf in report.checks[1].leaves] == ["gradient['batch']['x']"]


def _loss_of_batch(w, batch):
    return -(batch["x"] @ w).log_softmax(-1)[torch.arange(4), batch["labels"]].mean()


def test_nothing_to_differentiate_by():
    report = check({"torch": lambda i: i * 2, "torch b": lambda i: i + i}, LABELS)
    assert [check.status for check in report.checks] == ["passed", "skipped"]
    assert "nothing to differentiate by" in report.checks[1].message


def test_aux():
    versions = {"torch": lambda x: ((x**2).sum(), x + 1), "torch b": lambda x: ((x * x).sum(), 1 + x)}
    report = check(versions, X, has_aux=True)
    assert report.passed and [check.what for check in report.checks] == ["values", "grad"]


# --- inputs ----------------------------------------------------------------------------------------------------------


@needs_jax
def test_inputs_of_any_framework():
    args = (X, np.asarray(W), jnp.asarray(B.numpy()))
    assert check({"torch": dense, "jax": jax_dense}, *args, transforms=["value"]).passed


@needs_jax
@pytest.mark.parametrize(("x64", "dtype"), [(None, "int64"), (True, "int64")])
def test_integers_of_64_bits_are_those_of_32_in_jax(x64, dtype):
    versions = {"torch": lambda x: x.argmax(-1), "jax": lambda x: x.argmax(-1)}
    assert check(versions, X, x64=x64).passed
    assert check(versions, X, x64=x64, against="jax").passed


@needs_jax
def test_jax_has_64_bits_if_an_argument_has_them():
    seen = []
    versions = {"torch": lambda x: x * 2, "jax": lambda x: [seen.append(x.dtype), x * 2][1]}
    report = check(versions, X.double(), transforms=["value"])
    assert report.passed and str(seen[0]) == "float64" and "JAX runs with 64-bit numbers" in report.notes[0]
    assert report.precision.jax.enable_x64
    report = check(versions, torch.tensor([2**40]), transforms=["value"])
    assert report.passed and str(seen[-1]) == "int64"
    report = check(versions, X.double(), transforms=["value"], x64=False)
    assert [check.problem for check in report.failures] == ["dtype"]


def test_a_version_that_writes_into_its_argument():
    def writes(p):
        return p["a"].mul_(2)

    report = check({"torch": lambda p: p["a"] * 2, "torch b": writes}, {"a": X.clone()}, transforms=["value"])
    (found,) = report.failures
    assert found.message == "torch b writes into its argument p['a']. Let it write into a copy, or say writes=True."
    assert check({"torch": lambda p: p["a"] * 2, "torch b": writes}, {"a": X}, transforms=["value"], writes=True).passed


def test_no_version_sees_what_another_one_wrote():
    before = X.clone()

    def numpy_writes(x):
        x *= 2
        return x

    versions = {"numpy": numpy_writes, "torch": lambda x: x.mul_(2), "torch b": lambda x: x * 2}
    assert check(versions, X, transforms=["value"], writes=True).passed
    assert torch.equal(X, before)


def test_versions_start_from_one_seed():
    versions = {"torch": lambda x: F.dropout(x), "torch b": lambda x: F.dropout(x, 0.5)}
    report = check(versions, X, transforms=["value"])
    assert report.passed and "draws random numbers" in report.notes[0]


def test_random_numbers_of_the_process_are_left_alone():
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    check({"torch": lambda x: x * torch.rand(6), "torch b": lambda x: x * torch.rand(6)}, X)
    assert torch.equal(torch.rand(3), expected)


# --- errors ----------------------------------------------------------------------------------------------------------


def test_errors():
    with pytest.raises(AxisSpecError, match="takes a dict of functions by name first, but it got <function"):
        check(energy, X, W)
    with pytest.raises(AxisSpecError, match="the version 'mine' must begin with the name of its framework"):
        check({"mine": energy, "torch": energy}, X, W)
    with pytest.raises(AxisSpecError, match="asks for jit, which NumPy does not have"):
        check({"numpy jit": energy, "torch": energy}, X, W)
    with pytest.raises(AxisSpecError, match="asks for the loop, which takes PyTorch functions only"):
        check({"numpy loop": energy, "torch": energy}, X, W)
    with pytest.raises(AxisSpecError, match="two versions or more, but it got"):
        check({"torch": energy}, X, W)
    with pytest.raises(AxisSpecError, match=r"against must be one of \['torch', 'torch b'\], but it is 'jax'"):
        check({"torch": energy, "torch b": energy}, X, W, against="jax")
    with pytest.raises(AxisSpecError, match="transforms holds 'gard'; known are 'value', 'grad'"):
        check({"torch": energy, "torch b": energy}, X, W, transforms=["gard"])
    with pytest.raises(AxisSpecError, match="transforms is empty"):
        check({"torch": energy, "torch b": energy}, X, W, transforms=[])
    with pytest.raises(AxisSpecError, match="reference must be 'float64', 'mpmath', None"):
        check({"torch": energy, "torch b": energy}, X, W, reference="float128")
    with pytest.raises(AxisSpecError, match="it holds 'torch': 3"):
        check({"torch": 3, "torch b": energy}, X, W)
    with pytest.raises(GradientTypeError, match=r"'grad' needs .* returns float32\[4, 6\]\. Say 'vjp'"):
        check({"torch": dense, "torch b": dense}, X, W, B, transforms=["grad"])
    with pytest.raises(GradientValueError, match="argnums holds 5, but there are 2 arguments"):
        check_equivalent({"torch": energy, "torch b": energy}, X, W, argnums=5)


def test_names_and_pairs():
    versions = {"torch": energy, "mine": ("torch", energy), "Torch (fused)": energy, "np": ("numpy", numpy_energy)}
    report = check(versions, X, W, transforms=["value"])
    assert report.passed and [check.run for check in report.checks] == ["mine", "Torch (fused)", "np"]


def test_one_that_raises_and_one_that_does_not():
    report = check({"torch": lambda x: x.sum(), "torch b": lambda x: x.view(7)}, X, transforms=["value"])
    (found,) = report.failures
    assert found.problem == "error" and found.message.startswith("torch b raises RuntimeError: shape '[7]' is invalid")


def test_if_all_raise_nothing_was_compared():
    with pytest.raises(EquivalenceError, match="both raise an error: torch b RuntimeError"):
        check_equivalent({"torch": lambda x: x.view(7), "torch b": lambda x: x.view(7)}, X, transforms=["value"])


def test_the_report_is_raised():
    with pytest.raises(EquivalenceError, match=r"check_equivalent\(torch, torch b\): 1 of 1 check failed") as caught:
        check_equivalent({"torch": lambda x: x, "torch b": lambda x: x + 1}, X, transforms=["value"])
    assert caught.value.report.failures[0].leaves[0].differing == X.numel()


def test_a_given_tolerance():
    versions = {"torch": lambda x: x, "torch b": lambda x: x + 1e-3}
    assert check(versions, X, transforms=["value"], tolerance=Tolerance(0, 1e-2)).passed
    assert not check(versions, X, transforms=["value"], tolerance=Tolerance(0, 1e-4)).passed


def test_dtypes_may_be_let_differ():
    versions = {"torch": lambda x: x, "torch b": lambda x: x.double()}
    assert not check(versions, X, transforms=["value"]).passed
    assert check(versions, X, transforms=["value"], dtypes=False).passed


def test_the_settings_are_in_the_report():
    report = check({"torch": energy, "numpy": numpy_energy}, X, W, transforms=["value"])
    assert report.precision.torch is not None and report.precision.numpy is not None and report.precision.jax is None
    assert report.to_dict()["precision"]["torch"]["default_dtype"] == "float32"


def test_without_jax(monkeypatch):
    monkeypatch.setitem(sys.modules, "jax", None)
    with pytest.raises(ImportError, match=r"needs JAX, which is not installed: pip install 'torchbatch\[jax\]'"):
        check({"torch": energy, "jax": energy}, X, W)
    assert check({"torch": energy, "numpy": numpy_energy}, X, W).passed


# --- notes -----------------------------------------------------------------------------------------------------------


@needs_jax
def test_the_report_names_the_first_divergence():
    versions = {"torch": attention, "jax": changed(jax_attention, axis=1)}
    report = check(versions, Q, Q + 1, Q * 2, transforms=["value"])
    (note,) = report.notes
    assert note.startswith("values: First divergence, after ") and "torch.softmax(scores" in note and "jax.nn.softmax" in note


def test_the_report_names_the_operation_that_the_compiler_gets_wrong():
    def wrong(module, inputs):
        for node in module.graph.nodes:
            if node.target is torch.ops.aten.sin.default:
                node.target = torch.ops.aten.cos.default
        module.recompile()
        return module

    versions = {"torch": energy, "torch jit": energy}
    report = check_equivalent(versions, X, W, transforms=["value"], backend=wrong, raise_on_failure=False)
    assert "torch jit: aten.sin" in report.notes[0] and "x.sin().sum()" in report.notes[0]
