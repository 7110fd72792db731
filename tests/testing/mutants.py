"""Wrong versions of functions, each with the line of a report that must show it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

import torchbatch as tb
from tests.testing.correct_functions import Draw, three, x

REVERSE, FORWARD, INSIDE = "reverse-mode gradient", "forward-mode gradient", "per-sample gradient"


@dataclasses.dataclass
class Mutant:
    """A function of one sample, what is wrong, and where it must be seen first."""

    fun: Callable[..., Any]
    inputs: Callable[[Draw], Any]
    problem: str
    batched: Callable[..., Any] | None = None
    run: str = "batched"
    what: str = "values"
    variant: str = "as given"
    subtle: bool = False
    also: tuple[str, ...] = ()
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


MUTANTS: dict[str, Mutant] = {}


def wrong(name: str, fun: Any, batched: Any, inputs: Any, problem: str = "values", **options: Any) -> None:
    """A batched version that is wrong."""
    assert name not in MUTANTS, name
    fields = {key: options.pop(key) for key in ("run", "what", "variant", "subtle", "also") if key in options}
    MUTANTS[name] = Mutant(fun, inputs, problem, batched, **fields, options=options)


def inside(name: str, fun: Any, inputs: Any, problem: str = "values", run: str = "eager", **options: Any) -> None:
    """A function that is itself wrong, or cannot be mapped."""
    wrong(name, fun, None, inputs, problem, run=run, **options)


def subtle(name: str, fun: Any, batched: Any, inputs: Any, **options: Any) -> None:
    """Wrong by about a part in ten thousand."""
    wrong(name, fun, batched, inputs, subtle=True, **options)


# --- axes ------------------------------------------------------------------------------------------------------------

wrong("softmax over the batch", lambda a: a.softmax(-1), lambda a: a.softmax(0), x(4, 4))
wrong("softmax over the wrong axis", lambda a: a.softmax(-1), lambda a: a.softmax(1), x(2, 3, 3))
wrong("sum over the wrong axis", lambda a: a.sum(0), lambda a: a.sum(2), x(4, 3, 3))
wrong("sum over the samples too", lambda a: a.sum(), lambda a: a.sum().expand(4), x(4, 3))
wrong("a transposed output", lambda a: a @ a, lambda a: (a @ a).mT, x(4, 3, 3))
wrong(
    "a transposed output that is not square",
    lambda a, b: torch.outer(a, b),
    lambda a, b: b[:, :, None] * a[:, None],
    lambda d: (d.normal(4, 3), d.normal(4, 2)),
    "shape",
)
wrong("the batch along the other axis", lambda a: a * 2, lambda a: (a * 2).T, x(3, 3))
wrong("in_axes that is not heeded", lambda a: a.cumsum(0), lambda a: a.cumsum(1), x(3, 3), in_axes=1)
wrong("a flip of the samples", lambda a: a.flip(0), lambda a: a.flip(0, 1), x(4, 3))
wrong("samples in reverse order", lambda a: a.sum(), lambda a: a.sum(1).flip(0), x(4, 3))
wrong("outputs that change places", lambda a: (a.sum(), a.prod()), lambda a: (a.prod(1), a.sum(1)), x(4, 3))
wrong(
    "a matrix product from the wrong side",
    lambda w, a: w @ a,
    lambda w, a: a @ w,
    lambda d: (d.normal(3, 3), d.normal(4, 3)),
    in_axes=(None, 0),
)

# --- shapes, dtypes, structure ---------------------------------------------------------------------------------------

wrong("a dropped broadcast", lambda a, b: a[:, None] * b, lambda a, b: a * b, lambda d: (d.normal(4, 3), d.normal(4, 3)), "shape")
wrong("a broadcast along the batch", lambda a, s: a * s, lambda a, s: a * s, lambda d: (d.normal(3, 3), d.normal(3)))
wrong("a missing keepdim", lambda a: a.mean(0, keepdim=True), lambda a: a.mean(1), x(4, 3), "shape")
wrong("a squeeze too many", lambda a: a.sum(0), lambda a: a.sum(1).squeeze(), x(4, 3, 2), "shape", variant="batch of 1")
wrong("a drift to float64", lambda a: a * 2, lambda a: a * torch.full((3,), 2.0, dtype=torch.float64), x(4, 3), "dtype")
wrong("a drift to float32", torch.sin, lambda a: a.float().sin(), x(4, 3, dtype=torch.float64), "dtype")
wrong(
    "a sum of bfloat16 in float32",
    lambda a: a.sum(),
    lambda a: a.sum(1, dtype=torch.float32),
    x(4, 3, dtype=torch.bfloat16),
    "dtype",
)
wrong("int32 indices", lambda a: a.argmax(), lambda a: a.argmax(1).int(), x(4, 3), "dtype")
wrong("a mask as numbers", lambda a: a > 0, lambda a: (a > 0).float(), x(4, 3), "dtype")
wrong("a lost output", lambda a: {"loss": a.sum(), "n": a.max()}, lambda a: {"loss": a.sum(1)}, x(4, 3), "structure")
wrong("a list for a tuple", lambda a: (a, a), lambda a: [a, a], x(4, 3), "structure")

# --- indices and masks -----------------------------------------------------------------------------------------------

wrong("a roll by one too many", lambda a: a.roll(1), lambda a: a.roll(2, 1), x(4, 5))
wrong(
    "the next index",
    lambda a, i: a[i],
    lambda a, i: a[torch.arange(4), (i + 1) % 5],
    lambda d: (d.normal(4, 5), d.ints(4, high=5)),
)
wrong(
    "weights indexed by the batch",
    lambda w, i, a: w[i] * a,
    lambda w, i, a: w[: len(a)] * a,
    lambda d: (d.normal(6, 3), torch.tensor([3, 1, 5, 0]), d.normal(4, 3)),
    in_axes=(None, 0, 0),
)
wrong(
    "an inverted mask",
    lambda a, m: a.masked_fill(m, 0.0),
    lambda a, m: a.masked_fill(~m, 0.0),
    lambda d: (d.normal(4, 6), d.bools(4, 6)),
)
wrong("a mask that reaches one too far", lambda a: a.tril(), lambda a: a.tril(1), x(4, 3, 3))
wrong(
    "the last of several largest",
    lambda a: a.argmax(),
    lambda a: a.shape[1] - 1 - a.flip(1).argmax(1),
    lambda d: torch.tensor([[1.0, 1.0, 0.0], [2.0, 0.0, 2.0]]),
)
wrong(
    "sorted samples",
    lambda a: a * 2,
    lambda a: a.sort(0).values * 2,
    lambda d: d.normal(5, 3).sort(0).values,
    variant="samples permuted",
)
wrong(
    "a last chunk that is dropped",
    lambda a: a.exp(),
    lambda a: torch.cat([c.exp() if len(c) == 2 else c * 0 for c in a.split(2)]) if len(a) else a,
    x(5, 3),
)
wrong(
    "a last chunk that is missing",
    lambda a: a.exp(),
    lambda a: torch.cat([c.exp() for c in a.split(2) if len(c) == 2]),
    x(5, 3),
    "shape",
)

# --- numbers ---------------------------------------------------------------------------------------------------------

wrong("a mean for a sum", lambda a: a.sum(), lambda a: a.mean(1), x(4, 3))
wrong("another sign", lambda a, b: a - b, lambda a, b: b - a, lambda d: (d.normal(4, 3), d.normal(4, 3)))
wrong("the other variance", lambda a: a.var(), lambda a: a.var(1, correction=0), x(4, 6))
wrong("statistics of the batch", lambda a: (a - a.mean()) / a.std(), lambda a: (a - a.mean()) / a.std(), x(4, 6))
wrong(
    "NaN that is masked",
    torch.log,
    lambda a: a.log().nan_to_num(posinf=math.inf, neginf=-math.inf),
    lambda d: torch.tensor([[1.0, -1.0], [2.0, 3.0]]),
    "nonfinite",
    derivatives=(),
)
wrong(
    "inf that is cut off",
    lambda a: 1 / a,
    lambda a: (1 / a).clamp(max=1e30),
    lambda d: torch.tensor([[1.0, 0.0], [2.0, 3.0]]),
    "nonfinite",
    derivatives=(),
)
wrong("an exp that overflows", lambda a: a.logsumexp(0), lambda a: a.exp().sum(1).log(), x(4, 3, mean=100.0), "nonfinite")
wrong("a clamp before the log", torch.log, lambda a: a.clamp(min=1e-2).log(), lambda d: d.uniform(4, 6, low=1e-3, high=2e-2))
wrong(
    "sums in int32",
    lambda a: a.sum(),
    lambda a: a.sum(1, dtype=torch.int32).long(),
    lambda d: d.ints(4, 3, low=2**30, high=2**31),
)
wrong(
    "a difference of uint8",
    lambda a, b: a.int() - b.int(),
    lambda a, b: (a - b).int(),
    lambda d: tuple(d.ints(4, 6, high=255, dtype=torch.uint8) for _ in range(2)),
)
wrong(
    "a missing conjugate",
    torch.vdot,
    lambda a, b: (a * b).sum(1),
    lambda d: (d.normal(4, 3, dtype=torch.complex64), d.normal(4, 3, dtype=torch.complex64)),
)
wrong(
    "a missing scale",
    lambda q, k, v: F.scaled_dot_product_attention(q[None], k[None], v[None])[0],
    lambda q, k, v: (q @ k.mT).softmax(-1) @ v,
    three(3, 4, 8),
)
wrong(
    "a division that rounds to zero",
    lambda a: a // 3,
    lambda a: torch.div(a, 3, rounding_mode="trunc"),
    lambda d: d.ints(4, 5, low=-9),
)
wrong(
    "a stale cache",
    lambda a: a.sum(),
    lambda a, known={}: known.setdefault(a.shape, a.sum(1).clone()),
    x(4, 3),
    variant="samples permuted",
    derivatives=(),
)

# --- what is written, what is raised ---------------------------------------------------------------------------------

wrong("a write into the samples", lambda a: a.relu(), lambda a: a.relu_().clone(), x(4, 3), "inputs", derivatives=())
wrong(
    "a write into the weights",
    lambda w, a: (w * 2) @ a,
    lambda w, a: a @ w.mul_(2).T,
    lambda d: (d.normal(2, 3), d.normal(4, 3)),
    "inputs",
    in_axes=(None, 0),
    derivatives=(),
)
wrong("no batch of 0", lambda a: a.reshape(-1), lambda a: a.reshape(len(a), -1), x(4, 3, 2), "error", variant="batch of 0")
wrong(
    "no strides",
    lambda a: a.reshape(-1),
    lambda a: a.view(a.shape[0], a.shape[1] * a.shape[2]),
    x(4, 3, 2),
    "error",
    variant="not contiguous",
)
wrong("an error for good inputs", lambda a: a.sum(), lambda a: torch.linalg.cholesky(a), x(4, 3), "error")
wrong("no error for bad inputs", torch.dot, lambda a, b: (a * b).sum(1), lambda d: (d.normal(4, 3), d.normal(4, 1)), "error")


def choosing(a: Any) -> Any:
    return a if a.sum() > 0 else -a


inside("an if", choosing, x(4, 3), "error")
inside("a Python number", lambda a: a * float(a.sum()), x(4, 3), "error", derivatives=())
inside("a size from values", lambda a: a[a > 0].sum(), x(4, 3), "error")


class Counting:
    """A function that knows how often it was called."""

    calls = 0

    def __call__(self, a: Any) -> Any:
        self.calls += 1
        return a.sum() * self.calls


inside("a count of the calls", Counting(), x(4, 3), run="loop", variant="once more", derivatives=(), also=("eager",))


# --- random numbers --------------------------------------------------------------------------------------------------


def noisy(a: Any) -> Any:
    return a + torch.rand(3)


def fixed(a: Any) -> Any:
    return a + torch.rand(a.shape, generator=torch.Generator().manual_seed(0))


RANDOM = {"what": "randomness", "variant": "equal samples"}
wrong("shared random numbers", noisy, noisy, x(4, 3), "randomness", **RANDOM, randomness="different")
wrong(
    "random numbers that are not shared",
    noisy,
    lambda a: a + torch.rand(a.shape),
    x(4, 3),
    "randomness",
    **RANDOM,
    randomness="same",
)
wrong("the same random numbers in every call", noisy, fixed, x(4, 3), "randomness", **RANDOM, randomness="different")
wrong(
    "a dropout mask of the features",
    lambda a: F.dropout(a, 0.5),
    lambda a: a * F.dropout(torch.ones(8), 0.5),
    x(6, 8),
    "randomness",
    **RANDOM,
    randomness="different",
)
wrong("random numbers of another shape", noisy, lambda a: a[:, :1] + torch.rand(4, 1), x(4, 3), "shape", randomness="different")
wrong(
    "two halves that share",
    noisy,
    lambda a: a + torch.rand(2, 3).repeat(2, 1)[: len(a)],
    x(4, 3),
    "randomness",
    **RANDOM,
    randomness="different",
)

# --- derivatives -----------------------------------------------------------------------------------------------------

wrong(
    "a detached denominator",
    lambda a: a.exp() / a.exp().sum(),
    lambda a: a.exp() / a.exp().sum(1, keepdim=True).detach(),
    x(4, 3),
    what=REVERSE,
)
wrong("a detached output", lambda a: (a * 2, a * 3), lambda a: (a * 2, a.detach() * 3), x(4, 3), what=REVERSE)
wrong(
    "a gradient that is masked",
    lambda a: (a * a).sqrt(),
    torch.abs,
    lambda d: torch.tensor([[1.0, 0.0], [2.0, -1.0]]),
    "nonfinite",
    what=REVERSE,
    derivatives=("reverse",),
)


def with_vjp(fun: Callable[..., Any], fwd: Callable[..., Any], bwd: Callable[..., Any]) -> Any:
    made = tb.custom_vjp(fun)
    made.defvjp(fwd, bwd)
    return made


def with_jvp(fun: Callable[..., Any], rule: Callable[..., Any]) -> Any:
    made = tb.custom_jvp(fun)
    made.defjvp(rule)
    return made


def with_vmap(fun: Callable[..., Any], rule: Callable[..., Any]) -> Any:
    made = tb.custom_vmap(fun)
    made.def_vmap(rule)
    return made


RULE = {"run": "loop", "variant": "as given, in float64"}
summed = with_vjp(lambda a: a.sum(), lambda a: (a.sum(), a), lambda a, c: (c.expand(a.shape) / a.shape[0],))
product = with_vjp(lambda a, b: a * b, lambda a, b: (a * b, (a, b)), lambda kept, c: (kept[1] * c, torch.zeros_like(c)))
linear = with_vjp(lambda w, a: w @ a, lambda w, a: (w @ a, (w, a)), lambda kept, c: (torch.outer(kept[1], c), kept[0].T @ c))
straight = with_vjp(lambda a: a**3, lambda a: (a**3, a), lambda a, c: (c,))
backwards = with_vjp(torch.tanh, lambda a: (a.tanh(), a), lambda a, c: (-c * (1 - a.tanh() ** 2),))
unsquared = with_vjp(torch.tanh, lambda a: (a.tanh(), a.tanh()), lambda y, c: (c * (1 - y),))
exponential = with_jvp(torch.exp, lambda primals, tangents: (primals[0].exp(), tangents[0] * primals[0]))
conjugated = with_vjp(lambda a: a * (1 + 2j), lambda a: (a * (1 + 2j), None), lambda _, c: (c * (1 - 2j),))
inside("a gradient off by the size", summed, x(4, 3), what=REVERSE, **RULE)
inside("a gradient without a term", product, lambda d: (d.normal(4, 3), d.normal(4, 3)), what=REVERSE, **RULE)
inside("a transposed gradient", linear, lambda d: (d.normal(3, 3), d.normal(4, 3)), what=REVERSE, in_axes=(None, 0), **RULE)
inside("a gradient straight through", straight, x(4, 3), what=REVERSE, **RULE)
inside("a gradient with another sign", backwards, x(4, 3), what=REVERSE, **RULE)
inside("a gradient without a square", unsquared, x(4, 3), what=REVERSE, **RULE)
inside("a wrong rule for both modes", lambda a: exponential(a).sum(), x(4, 3), what=REVERSE, **RULE)
inside("a gradient with a conjugate too many", conjugated, x(4, 3, dtype=torch.complex64), what=REVERSE, **RULE)


class Sine(torch.autograd.Function):
    """Its rule for forward mode is wrong."""

    generate_vmap_rule = True

    @staticmethod
    def forward(a: Any) -> Any:
        return a.sin()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, cotangent: Any) -> Any:
        return cotangent * ctx.saved_tensors[0].cos()

    @staticmethod
    def jvp(ctx: Any, tangent: Any) -> Any:
        return tangent * ctx.saved_tensors[0].sin()


class Mapped(torch.autograd.Function):
    """Its own rule for ``vmap`` mixes the samples."""

    @staticmethod
    def forward(a: Any) -> Any:
        return a - a.max()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, cotangent: Any) -> Any:
        return cotangent

    @staticmethod
    def vmap(info: Any, in_dims: Any, a: Any) -> Any:
        return a - a.max(), in_dims[0]


inside("a wrong rule for forward mode", lambda a: Sine.apply(a), x(4, 3), what=FORWARD, **RULE)
inside("a rule for vmap that mixes samples", lambda a: Mapped.apply(a), x(4, 3), derivatives=())
inside("custom_vmap with another axis", with_vmap(lambda a: a.cumsum(0), lambda n, b, a: (a.cumsum(0), True)), x(3, 3))
inside("custom_vmap that takes one sample for all", with_vmap(lambda a: a.sum(), lambda n, b, a: (a[0].sum(), False)), x(4, 3))
inside(
    "custom_vmap that does not look at in_batched",
    with_vmap(lambda w, a: w * a, lambda n, b, w, a: (w[0] * a, True)),
    lambda d: (d.normal(3), d.normal(4, 3)),
    in_axes=(None, 0),
)
inside(
    "custom_vmap without a gradient", with_vmap(lambda a: a * 2, lambda n, b, a: (a.detach() * 2, True)), x(4, 3), what=REVERSE
)
inside("custom_vmap with another dtype", with_vmap(lambda a: a * 2, lambda n, b, a: (a.double() * 2, True)), x(4, 3), "dtype")

# --- wrong by little -------------------------------------------------------------------------------------------------


def cut_to_tf32(a: torch.Tensor) -> torch.Tensor:
    return (a.view(torch.int32) & ~0x1FFF).view(torch.float32)


def normalized(a: torch.Tensor, axis: int, inner: float, outer: float) -> torch.Tensor:
    centered = a - a.mean(axis, keepdim=True)
    return centered / ((centered**2).mean(axis, keepdim=True) + inner).sqrt().add(outer)


def leaning(a: torch.Tensor) -> torch.Tensor:
    """Its value is right, its gradient is not."""
    return a.sin() + 1e-4 * (a - a.detach())


nearly = with_vjp(torch.sin, lambda a: (a.sin(), a), lambda a, c: (c * a.cos() * 1.0001,))
nearly_both = with_jvp(torch.sin, lambda primals, tangents: (primals[0].sin(), tangents[0] * (primals[0].cos() + 1e-4)))
pair = lambda *shape: lambda d: (d.normal(*shape), d.normal(*shape))  # noqa: E731

subtle("pi of four places", lambda a: (math.pi * a).sin(), lambda a: (3.1415 * a).sin(), x(4, 8))
subtle("gelu by tanh", F.gelu, lambda a: F.gelu(a, approximate="tanh"), x(4, 8))
subtle("another eps", lambda a: F.layer_norm(a, (8,)), lambda a: F.layer_norm(a, (8,), eps=1e-4), x(4, 8))
subtle("eps beside the root", lambda a: normalized(a, 0, 1e-4, 0.0), lambda a: normalized(a, 1, 0.0, 1e-4), x(4, 8))
subtle("the other variance of many", lambda a: a.var(), lambda a: a.var(1, correction=0), x(3, 10_000))
subtle("sigmoid in float16", torch.sigmoid, lambda a: a.half().sigmoid().float(), x(4, 8))
subtle("a product in float16", lambda a, b: a @ b, lambda a, b: (a.half() * b.half()).sum(1).float(), pair(4, 8))
subtle("softplus that ends at 8", F.softplus, lambda a: F.softplus(a, threshold=8), lambda d: d.uniform(4, 8, low=8, high=9))
subtle("a root of four places", lambda a: a / math.sqrt(2), lambda a: a * 0.7071, x(4, 8))
subtle("numbers cut to TF32", lambda a, b: a @ b, lambda a, b: (cut_to_tf32(a) * cut_to_tf32(b)).sum(1), pair(4, 16))
subtle("a sine by three terms", torch.sin, lambda a: a - a**3 / 6 + a**5 / 120, lambda d: d.uniform(4, 8, low=0.5, high=0.9))
subtle("a decay that is a little off", lambda a, m: 0.999 * m + 0.001 * a, lambda a, m: 0.9991 * m + 0.0009 * a, pair(4, 8))
subtle(
    "smoothed labels",
    lambda a, t: F.cross_entropy(a, t),
    lambda a, t: F.cross_entropy(a, t, reduction="none", label_smoothing=1e-4),
    lambda d: (d.normal(4, 8), d.ints(4, high=8)),
)
subtle("one sample that is a little off", lambda a: a.exp(), lambda a: a.exp() * (1 + 1e-4 * torch.eye(len(a))[:, -1:]), x(4, 8))
subtle("a gradient that is a little off", torch.sin, leaning, x(4, 8), what=REVERSE)
subtle("a rule that is a little off", nearly, None, x(4, 8), what=REVERSE, **RULE)
subtle("a rule for both modes that is a little off", nearly_both, None, x(4, 8), what=REVERSE, **RULE)
