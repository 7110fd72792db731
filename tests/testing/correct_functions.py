"""Functions of one sample that are right, of many kinds, each with inputs for any seed."""

from __future__ import annotations

import functools
import math
from collections import namedtuple
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

import torchbatch as tb
from torchbatch import lax
from torchbatch import random as keys

Point = namedtuple("Point", "x y")


class Draw:
    """Random inputs from a seed."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.generator = np.random.default_rng(seed)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0, mean: float = 0.0) -> torch.Tensor:
        numbers = self.generator.standard_normal(shape)
        if dtype.is_complex:
            numbers = numbers + 1j * self.generator.standard_normal(shape)
        return torch.as_tensor(np.asarray(numbers * scale + mean)).to(dtype)

    def uniform(self, *shape: int, low: float = 0.1, high: float = 0.9, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.as_tensor(np.asarray(self.generator.uniform(low, high, shape))).to(dtype)

    def ints(self, *shape: int, low: int = 0, high: int = 3, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.as_tensor(np.asarray(self.generator.integers(low, high, shape))).to(dtype)

    def bools(self, *shape: int) -> torch.Tensor:
        return self.ints(*shape, high=2) > 0

    def matrices(self, *shape: int, condition: float = 10.0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Square matrices of a condition number."""
        u, _ = np.linalg.qr(self.generator.standard_normal(shape))
        v, _ = np.linalg.qr(self.generator.standard_normal(shape))
        return torch.as_tensor(u * np.geomspace(1, 1 / condition, shape[-1]) @ v).to(dtype)

    def definite(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Symmetric positive definite matrices."""
        root = self.generator.standard_normal(shape)
        return torch.as_tensor(root @ np.swapaxes(root, -1, -2) + shape[-1] * np.eye(shape[-1])).to(dtype)

    def keys(self, *shape: int) -> Any:
        return keys.split(keys.key(self.seed), shape)


class Case(NamedTuple):
    """A function, its inputs, and how it is mapped."""

    fun: Callable[..., Any]
    inputs: Callable[[Draw], tuple[Any, ...]]
    options: dict[str, Any]
    ill: bool


CASES: dict[str, Case] = {}


def add(name: str, fun: Callable[..., Any], inputs: Callable[[Draw], Any], ill: bool = False, **options: Any) -> None:
    assert name not in CASES, name
    CASES[name] = Case(fun, lambda draw: _as_tuple(inputs(draw)), options, ill)


def _as_tuple(value: Any) -> tuple[Any, ...]:
    return value if type(value) is tuple else (value,)


def x(*shape: int, **options: Any) -> Callable[[Draw], torch.Tensor]:
    return lambda draw: draw.normal(*shape, **options)


F64, BF16, F16, C64, C128 = torch.float64, torch.bfloat16, torch.float16, torch.complex64, torch.complex128

# --- elementwise, and dtypes -----------------------------------------------------------------------------------------

add("tanh", torch.tanh, x(5, 3))
add("tanh in float64", torch.tanh, x(5, 3, dtype=F64))
add("gelu in bfloat16", F.gelu, x(5, 8, dtype=BF16))
add("silu in float16", F.silu, x(5, 8, dtype=F16))
add("layer norm in bfloat16", lambda v: F.layer_norm(v, (8,)), x(5, 8, dtype=BF16))
add("softmax in bfloat16", lambda v: v.softmax(-1), x(4, 8, dtype=BF16))
add(
    "a product in bfloat16",
    lambda w, v: torch.tanh(w @ v),
    lambda d: (d.normal(6, 8, dtype=BF16), d.normal(5, 8, dtype=BF16)),
    in_axes=(None, 0),
)
add("promotion of bfloat16 and float32", lambda a, b: a * b, lambda d: (d.normal(5, 3, dtype=BF16), d.normal(5, 3)))
add("promotion of int and float", lambda a, b: a * b + 1, lambda d: (d.ints(5, 3), d.normal(5, 3)))
add("whole numbers", lambda a: (a * 3 - 1) // 2 % 5, lambda d: d.ints(5, 4, high=100))
add("bits", lambda a, b: (a & b) ^ (a << 1) | ~b, lambda d: (d.ints(5, 4, high=99), d.ints(5, 4, high=99)))
add("uint8 that wraps", lambda a: a + 200, lambda d: d.ints(5, 4, high=255, dtype=torch.uint8))
add("bools", lambda a, b: (a & ~b, a.any(), b.all()), lambda d: (d.bools(5, 4), d.bools(5, 4)))
add("comparisons", lambda a, b: (a < b, a == a, torch.isclose(a, b)), lambda d: (d.normal(5, 3), d.normal(5, 3)))
add("a cast to double and back", lambda a: a.double().sin().float(), x(5, 3))
add("where", lambda a: torch.where(a > 0, a.exp(), -a), x(5, 6))
add("clamp", lambda a: a.clamp(-0.5, 0.5) * a, x(5, 6))
add("relu, abs, max", lambda a: (a.relu(), a.abs(), torch.maximum(a, a.flip(0))), x(5, 6))
add("rounding", lambda a: (a.floor(), a.round(), a.trunc(), a.frac()), x(5, 6, scale=5.0))
add("numbers at kinks", lambda a: (a.relu().sum(), a.abs().sum(), a.amax()), lambda d: d.ints(5, 4, low=-1, high=2).float())
add("NaN and inf pass through", lambda a: torch.log(a) + 1 / a, lambda d: d.ints(5, 4, low=-1, high=3).float(), derivatives=())
add("constants from inside", lambda a: a + torch.arange(3.0) + torch.ones_like(a) + torch.eye(3)[1], x(5, 3))
add("a python number in the output", lambda a: (a * 2, 3.5), x(5, 3), out_axes=(0, None))
add("logic on shapes", lambda a: a.sum() if a.shape[0] > 2 else a.prod(), x(5, 3))

# --- complex ---------------------------------------------------------------------------------------------------------

add(
    "a complex product",
    lambda a, b: a * torch.conj_physical(b) * 1j,
    lambda d: (d.normal(5, 3, dtype=C64), d.normal(5, 3, dtype=C64)),
)
add("the size of complex numbers", lambda a: a.abs() ** 2 + a.angle(), x(5, 3, dtype=C64))
add("complex exp in complex128", lambda a: torch.exp(1j * a).sum(), x(5, 3, dtype=C128))
add("real and imaginary parts", lambda a: {"real": a.real, "imag": a.imag}, x(5, 3, dtype=C64))
add("fft", lambda a: torch.fft.fft(a), x(5, 8))
add("rfft and back", lambda a: torch.fft.irfft(torch.fft.rfft(a) * 2, n=8), x(5, 8))
add("fft2 of complex", lambda a: torch.fft.fft2(a).abs().sum(), x(3, 4, 4, dtype=C64))
add("fftshift", lambda a: torch.fft.fftshift(torch.fft.fft(a)), x(5, 7))
add("a complex matrix product", lambda a, b: a @ b, lambda d: (d.normal(4, 3, 2, dtype=C64), d.normal(4, 2, 3, dtype=C64)))

# --- trees and axes --------------------------------------------------------------------------------------------------

add(
    "a dict of parameters",
    lambda p, v: torch.tanh(p["w"] @ v + p["b"]),
    lambda d: ({"w": d.normal(4, 3), "b": d.normal(4)}, d.normal(5, 3)),
    in_axes=(None, 0),
)
add(
    "a dict mapped in part",
    lambda p, v: p["w"] @ v + p["b"],
    lambda d: ({"w": d.normal(4, 3), "b": d.normal(5, 4)}, d.normal(5, 3)),
    in_axes=({"w": None, "b": 0}, 0),
)
add(
    "a named tuple",
    lambda p: Point(p.x + p.y, p.x * 2),
    lambda d: Point(d.normal(5, 3), d.normal(3, 5)),
    in_axes=(Point(0, 1),),
    out_axes=Point(1, 0),
)
add(
    "lists in tuples",
    lambda a, b: [a[0] * b, (a[1].sum(), {"k": b})],
    lambda d: ([d.normal(5, 3), d.normal(5, 2)], d.normal(5, 3)),
)
add("None in a tree", lambda p: p["a"] * 2, lambda d: ({"a": d.normal(5, 3), "none": None},))
add("axes 1 and -1", lambda a, b: a @ b, lambda d: (d.normal(3, 5), d.normal(3, 5)), in_axes=(1, -1))
add("axis 2 in, axis 1 out", lambda a: a @ a.mT, x(3, 4, 5), in_axes=2, out_axes=1)
add("different axes out", lambda a: (a, a.sum(0), a.sum()), x(5, 3, 4), out_axes=(2, 1, 0))
add(
    "an output that does not vary",
    lambda a, w: (a * w, w * 2),
    lambda d: (d.normal(5, 3), d.normal(3)),
    in_axes=(0, None),
    out_axes=(0, None),
)
add(
    "keyword arguments",
    lambda a, *, scale, shift: a * scale + shift,
    lambda d: (d.normal(5, 3),),
    kwargs=lambda d: {"scale": d.normal(5, 3), "shift": d.normal(5)},
)
add("nothing but axis_size", lambda w: w * 2, lambda d: (d.normal(3),), in_axes=None, axis_size=4)
add("numbers as arguments", lambda a, power: a.abs() ** power, lambda d: (d.normal(5, 3), 1.5), in_axes=(0, None))
add("a NumPy array", lambda a: a * 2, lambda d: (d.normal(5, 3).numpy(),))
add("one sample", lambda a: a.cumsum(0), x(1, 3))
add("two samples", lambda a: a.cumsum(0), x(2, 3))
add("an expanded input", lambda a, b: a * b, lambda d: (d.normal(1, 3).expand(5, 3), d.normal(5, 3)))
add("a transposed input", lambda a: a.sum(0), lambda d: d.normal(3, 5).T)
add("broadcasting", lambda a, b: a[:, None] + b[None, :], lambda d: (d.normal(5, 3), d.normal(5, 2)))
add("ranks that differ", lambda a, b: a * b, lambda d: (d.normal(5, 2, 3), d.normal(5)))

# --- reductions, orders, indices -------------------------------------------------------------------------------------

add("sums and means", lambda a: (a.sum(), a.mean(0), a.sum(-1, keepdim=True), a.prod(0)), x(5, 3, 4))
add("var and std", lambda a: (a.var(), a.std(0), a.var(-1, correction=0)), x(5, 3, 4))
add("norms", lambda a: (a.norm(), a.norm(p=1, dim=0), torch.linalg.vector_norm(a, ord=3)), x(5, 3, 4))
add("min, max, argmax", lambda a: (a.min(), a.max(0), a.argmax(), a.argmin(-1)), x(5, 3, 4))
add("ties", lambda a: (a.argmax(), a.max(0).values, a.amax()), lambda d: d.ints(5, 6, high=2).float())
add("cumulative", lambda a: (a.cumsum(0), a.cumprod(0), a.cummax(0).values, torch.logcumsumexp(a, 0)), x(5, 6))
add("sort and argsort", lambda a: (a.sort(descending=True).values, a.argsort()), x(5, 6))
add("topk", lambda a: a.topk(2), x(5, 6))
add("median and quantile", lambda a: (a.median(), a.quantile(0.3)), x(5, 7))
add(
    "gather and scatter",
    lambda a, i: a.gather(0, i) + torch.zeros_like(a).scatter_add(0, i, a),
    lambda d: (d.normal(5, 4), d.ints(5, 4, high=4)),
)
add(
    "indexing with an index of the sample",
    lambda table, i: table[i],
    lambda d: (d.normal(7, 3), d.ints(5, 2, high=7)),
    in_axes=(None, 0),
)
add(
    "embedding",
    lambda table, i: F.embedding(i, table).sum(0),
    lambda d: (d.normal(7, 3), d.ints(5, 4, high=7)),
    in_axes=(None, 0),
)
add("one hot", lambda i: F.one_hot(i, 4).float(), lambda d: d.ints(5, 2, high=4))
add(
    "searchsorted",
    lambda edges, v: torch.searchsorted(edges, v),
    lambda d: (d.normal(6).sort().values, d.normal(5, 3)),
    in_axes=(None, 0),
)
add("slices and flips", lambda a: (a[::2], a.flip(0)[1:], a[..., -1], a.roll(2)), x(5, 6))
add(
    "stack, cat, chunk",
    lambda a, b: (torch.stack([a, b]), torch.cat([a, b]), a.chunk(2)),
    lambda d: (d.normal(5, 4), d.normal(5, 4)),
)
add("reshape and permute", lambda a: a.permute(2, 0, 1).reshape(-1, 3).unsqueeze(0), x(5, 3, 2, 4))
add("unfold", lambda a: a.unfold(0, 3, 2).sum(-1), x(5, 8))
add("tril and diagonal", lambda a: (a.tril(), a.diagonal(), torch.diag_embed(a[0]), a.trace()), x(5, 3, 3))
add("pad", lambda a: (F.pad(a, (1, 2)), F.pad(a[None], (1, 1), mode="reflect")), x(5, 4))
add("writes into a copy", lambda a: a.clone().mul_(2).index_fill_(0, torch.tensor([1]), 0.0), x(5, 4))
add("writes into the argument", lambda a: a.add_(1).sum(), x(5, 4), derivatives=(), backends=("eager", "chunked", "nested"))

# --- algebra ---------------------------------------------------------------------------------------------------------

add("einsum", lambda a, b: torch.einsum("ij,kj->ik", a, b), lambda d: (d.normal(5, 3, 4), d.normal(2, 4)), in_axes=(0, None))
add(
    "a bilinear form", lambda u, m, v: u @ m @ v, lambda d: (d.normal(5, 3), d.normal(3, 4), d.normal(5, 4)), in_axes=(0, None, 0)
)
add("outer and cross", lambda a, b: (torch.outer(a, b), torch.linalg.cross(a, b)), lambda d: (d.normal(5, 3), d.normal(5, 3)))
add("solve", torch.linalg.solve, lambda d: (d.matrices(5, 3, 3), d.normal(5, 3)))
add("solve with one matrix", torch.linalg.solve, lambda d: (d.matrices(3, 3), d.normal(5, 3)), in_axes=(None, 0))
add("inverse and determinant", lambda a: (torch.linalg.inv(a), torch.linalg.det(a)), lambda d: d.matrices(5, 3, 3))
add("slogdet", lambda a: torch.linalg.slogdet(a), lambda d: d.matrices(5, 3, 3))
add("cholesky", torch.linalg.cholesky, lambda d: d.definite(5, 3, 3))
add("singular values", torch.linalg.svdvals, x(5, 3, 4))
add("eigenvalues of symmetric matrices", torch.linalg.eigvalsh, lambda d: d.definite(5, 3, 3))
add("qr, up to its signs", lambda a: torch.linalg.qr(a).R.abs(), x(5, 4, 3))
add(
    "solve_triangular",
    lambda a, b: torch.linalg.solve_triangular(a.tril() + 3 * torch.eye(3), b, upper=False),
    lambda d: (d.normal(5, 3, 3), d.normal(5, 3, 2)),
)
add("matrix exp", torch.linalg.matrix_exp, x(4, 3, 3))
add("a power of a matrix", lambda a: torch.linalg.matrix_power(a, 3), x(5, 3, 3))
add("cdist", lambda a, b: torch.cdist(a, b), lambda d: (d.normal(4, 3, 2), d.normal(5, 2)), in_axes=(0, None))

# --- networks --------------------------------------------------------------------------------------------------------

add("softmax and its log", lambda a: (a.softmax(-1), a.log_softmax(0)), x(4, 3, 5))
add("cross entropy", lambda a, t: F.cross_entropy(a, t), lambda d: (d.normal(5, 4, 3), d.ints(5, 4)))
add(
    "losses",
    lambda a, b: (F.mse_loss(a, b), F.smooth_l1_loss(a, b), F.binary_cross_entropy_with_logits(a, b.sigmoid())),
    lambda d: (d.normal(5, 4), d.normal(5, 4)),
)
add(
    "layer norm",
    lambda a, w, b: F.layer_norm(a, (6,), w, b),
    lambda d: (d.normal(5, 4, 6), d.normal(6), d.normal(6)),
    in_axes=(0, None, None),
)
add("group norm", lambda a: F.group_norm(a[None], 2)[0], x(3, 4, 5))
add("conv1d", lambda a, w: F.conv1d(a, w, padding=1), lambda d: (d.normal(5, 2, 7), d.normal(3, 2, 3)), in_axes=(0, None))
add(
    "conv2d with weights of the sample",
    lambda a, w: F.conv2d(a[None], w, stride=2)[0],
    lambda d: (d.normal(3, 2, 6, 6), d.normal(3, 4, 2, 3, 3)),
)
add("pooling", lambda a: (F.max_pool1d(a, 2), F.avg_pool1d(a, 3), F.adaptive_avg_pool1d(a, 2)), x(4, 2, 8))
add("interpolate", lambda a: F.interpolate(a[None], scale_factor=2.0, mode="linear")[0], x(4, 2, 5))


def attention(q: Any, k: Any, v: Any) -> Any:
    weights = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1)
    return weights @ v


def three(*shape: int) -> Callable[[Draw], Any]:
    return lambda d: (d.normal(*shape), d.normal(*shape), d.normal(*shape))


add("attention", attention, three(4, 3, 5))
add("attention by PyTorch", lambda q, k, v: F.scaled_dot_product_attention(q[None], k[None], v[None])[0], three(3, 4, 8))
add(
    "attention with a mask",
    lambda q, m: (q @ q.mT).masked_fill(m, -torch.inf).softmax(-1) @ q,
    lambda d: (d.normal(4, 3, 5), d.bools(4, 3, 3) & ~torch.eye(3, dtype=torch.bool)),
)

MODEL = torch.nn.Sequential(torch.nn.Linear(3, 6), torch.nn.Tanh(), torch.nn.Linear(6, 2))
GRU = torch.nn.GRU(3, 4, batch_first=True)


def parameters(draw: Draw, module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: draw.normal(*value.shape, scale=0.5) for name, value in module.named_parameters()}


add(
    "functional_call",
    lambda p, a: torch.func.functional_call(MODEL, p, (a,)),
    lambda d: (parameters(d, MODEL), d.normal(5, 3)),
    in_axes=(None, 0),
)
add(
    "an ensemble",
    lambda p, a: torch.func.functional_call(MODEL, p, (a,)),
    lambda d: ({k: torch.stack([v, v * 2, -v]) for k, v in parameters(d, MODEL).items()}, d.normal(4, 3)),
    in_axes=(0, None),
)
add("a module that is closed over", lambda a: MODEL(a), x(5, 3))
add(
    "a gru",
    lambda p, a: torch.func.functional_call(GRU, p, (a[None],))[0][0],
    lambda d: (parameters(d, GRU), d.normal(3, 4, 3)),
    in_axes=(None, 0),
)
add("dropout that is off", lambda a: F.dropout(a, 0.5, training=False), x(5, 3))

# --- special functions -----------------------------------------------------------------------------------------------

add(
    "erf, lgamma, digamma",
    lambda a: (torch.erf(a), torch.lgamma(a), torch.digamma(a)),
    lambda d: d.uniform(5, 3, low=0.5, high=4),
)
add("bessel and sinc", lambda a: (torch.special.i0(a), torch.special.i1e(a), torch.sinc(a)), x(5, 3))
add("xlogy and entr", lambda a: (torch.special.xlogy(a, a), torch.special.entr(a)), lambda d: d.uniform(5, 3))
add("erfinv and ndtri", lambda a: (torch.erfinv(a), torch.special.ndtri(a)), lambda d: d.uniform(5, 3))
add("trigonometry", lambda a: (torch.atan2(a[0], a[1]), a.sin() * a.cosh(), a.atan(), torch.hypot(a[0], a[2])), x(5, 3))
add("powers", lambda a: (a.sqrt(), a**2.5, a.rsqrt(), a.log1p(), a.expm1(), torch.pow(2.0, a)), lambda d: d.uniform(5, 3))

# --- control flow and keys -------------------------------------------------------------------------------------------

add(
    "scan",
    lambda w, xs: lax.scan(lambda c, v: (torch.tanh(w @ c + v), c.sum()), torch.zeros(3), xs),
    lambda d: (d.normal(3, 3), d.normal(4, 5, 3)),
    in_axes=(None, 0),
)
add("cond", lambda a: lax.cond(a.sum() > 0, lambda v: v.exp(), lambda v: -v * 2, a), x(5, 3))
add("switch", lambda i, a: lax.switch(i, [torch.sin, torch.cos, torch.neg], a), lambda d: (d.ints(5, high=3), d.normal(5, 3)))
add("fori_loop", lambda a: lax.fori_loop(0, 4, lambda i, v: v * 0.5 + i, a), x(5, 3))
add("associative_scan", lambda a: lax.associative_scan(torch.add, a), x(5, 6))
add(
    "while_loop", lambda a: lax.while_loop(lambda v: v.abs().sum() > 1.0, lambda v: v * 0.5, a), x(5, 3), derivatives=("forward",)
)
add("normal numbers from keys", lambda key: keys.normal(key, (3,)), lambda d: (d.keys(5),))
add("dropout from keys", lambda key, a: a * keys.bernoulli(key, 0.5, (3,)), lambda d: (d.keys(5), d.normal(5, 3)))
add("a permutation from keys", lambda key, a: a[keys.permutation(key, 4)], lambda d: (d.keys(5), d.normal(5, 4)))

# --- transforms inside -----------------------------------------------------------------------------------------------

add("vmap inside", lambda a, b: tb.vmap(torch.dot)(a, b), lambda d: (d.normal(4, 3, 2), d.normal(4, 3, 2)))
add("vmap inside, twice", lambda a: tb.vmap(tb.vmap(lambda v: v.exp()), in_axes=1, out_axes=1)(a), x(4, 3, 2))
add(
    "torch.func.vmap inside",
    lambda a, w: torch.func.vmap(torch.dot, (0, None))(a, w),
    lambda d: (d.normal(4, 3, 2), d.normal(2)),
    in_axes=(0, None),
)
add(
    "grad inside",
    lambda w, a: tb.grad(lambda w: ((a @ w) ** 2).sum())(w),
    lambda d: (d.normal(3), d.normal(5, 2, 3)),
    in_axes=(None, 0),
)
add("torch.func.grad inside", lambda a: torch.func.grad(lambda v: v.sin().sum())(a), x(5, 3))
add("hessian inside", lambda a: tb.hessian(lambda v: (v**3).sum() * v.sum())(a), x(4, 3))
add("jacobians inside", lambda a: (tb.jacfwd(torch.tanh)(a), tb.jacrev(torch.tanh)(a)), x(4, 3))
add("jvp inside", lambda a, t: tb.jvp(torch.sin, (a,), (t,)), lambda d: (d.normal(5, 3), d.normal(5, 3)))
add("checkpoint", tb.checkpoint(lambda a: a.sin().exp().sum()), x(5, 3))
add(
    "a gradient step",
    lambda w, a, y: w - 0.1 * tb.grad(lambda w: (a @ w - y) ** 2)(w),
    lambda d: (d.normal(3), d.normal(5, 3), d.normal(5)),
    in_axes=(None, 0, 0),
)
add("stop_gradient that changes nothing", lambda a: (a - tb.stop_gradient(a.max())).softmax(0), x(5, 4))


@tb.custom_vmap
def solved(matrix: Any, vector: Any) -> Any:
    return torch.linalg.solve(matrix, vector)


@solved.def_vmap
def solved_many(axis_size: int, in_batched: Any, matrix: Any, vector: Any) -> Any:
    if in_batched == [False, True]:
        return torch.linalg.solve(matrix, vector.T).T, True
    return tb.vmap(torch.linalg.solve, [0 if batched else None for batched in in_batched])(matrix, vector), True


@tb.custom_jvp
def log1pexp(a: Any) -> Any:
    return torch.log(1 + torch.exp(a))


@log1pexp.defjvp
def log1pexp_jvp(primals: Any, tangents: Any) -> Any:
    (a,), (t,) = primals, tangents
    return log1pexp(a), t * torch.sigmoid(a)


@tb.custom_vjp
def cubed(a: Any) -> Any:
    return a**3


cubed.defvjp(lambda a: (a**3, a), lambda a, cotangent: (3 * a**2 * cotangent,))


class Squared(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(a: Any) -> Any:
        return a * a

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, cotangent: Any) -> Any:
        return 2 * ctx.saved_tensors[0] * cotangent

    @staticmethod
    def jvp(ctx: Any, tangent: Any) -> Any:
        return 2 * ctx.saved_tensors[0] * tangent


@tb.custom_vjp
def clipped(a: Any) -> Any:
    return a.clone()


clipped.defvjp(lambda a: (a.clone(), None), lambda _, cotangent: (cotangent.clamp(-1, 1),))

add("custom_vmap", solved, lambda d: (d.matrices(3, 3), d.normal(5, 3)), in_axes=(None, 0))
add("custom_jvp", lambda a: log1pexp(a).sum(), x(5, 3))
add("custom_vjp", lambda w, a: cubed(w * a).sum(), lambda d: (d.normal(3), d.normal(5, 3)), in_axes=(None, 0))
add("autograd.Function", Squared.apply, x(5, 3))
add("a gradient that is clipped on purpose", clipped, x(5, 3, scale=3.0), derivatives=("reverse",))
add("sequential_vmap", tb.sequential_vmap(lambda a: a * 2), x(4, 3))

# --- errors on both sides --------------------------------------------------------------------------------------------


def refusing(a: Any) -> Any:
    raise ValueError("not today")


add("an error of the function", refusing, x(4, 3))
add("shapes that do not fit", lambda a, b: a @ b, lambda d: (d.normal(4, 3), d.normal(4, 2)))
add(
    "a derivative that does not exist",
    lambda a: tb.lax.while_loop(lambda v: v.sum() < 3, lambda v: v + 1, a),
    x(3, 2),
    derivatives=("reverse",),
)

# --- ill-conditioned -------------------------------------------------------------------------------------------------

ill = functools.partial(add, ill=True)
ill("a sum that cancels", lambda a: (a + 1000).sum() - 1000 * a.shape[0], x(5, 200))
ill("a difference of large numbers", lambda a, b: (a - b) * 1e4, lambda d: (d.normal(5, 4, mean=1e4), d.normal(5, 4, mean=1e4)))
ill("softmax of large logits", lambda a: a.softmax(-1), x(5, 6, scale=1e3))
ill(
    "cross entropy of large logits",
    lambda a, t: F.cross_entropy(a, t),
    lambda d: (d.normal(5, 4, scale=300.0), d.ints(5, high=4)),
)
ill("logsumexp", lambda a: torch.logsumexp(a, 0), x(5, 20, scale=100.0, mean=1e4))
ill("var of a large mean", lambda a: a.var(), x(5, 30, mean=1e3))
ill("var by two means", lambda a: (a**2).mean() - a.mean() ** 2, x(5, 30, mean=30.0))
ill("layer norm of a large mean", lambda a: F.layer_norm(a, (16,)), x(5, 16, mean=300.0))
ill("inverse of condition 1e4", torch.linalg.inv, lambda d: d.matrices(4, 4, 4, condition=1e4))
ill("solve of condition 1e4", torch.linalg.solve, lambda d: (d.matrices(4, 4, 4, condition=1e4), d.normal(4, 4)))
ill("inverse of condition 1e8 in float64", torch.linalg.inv, lambda d: d.matrices(4, 4, 4, condition=1e8, dtype=F64))
ill("a polynomial near its root", lambda a: a**3 - 3 * a**2 + 3 * a - 1, lambda d: d.normal(5, 4, scale=1e-2, mean=1.0))
ill("a long recurrence", lambda a: lax.fori_loop(0, 30, lambda i, v: 3.7 * v * (1 - v), a), lambda d: d.uniform(4, 3, dtype=F64))
ill("sin of large numbers", torch.sin, x(5, 4, scale=1e5))
ill("exp of large numbers", torch.exp, x(5, 4, scale=20.0))
ill("a dot product of orthogonal vectors", lambda a, b: a @ b - (a * b).sum(), lambda d: (d.normal(5, 64), d.normal(5, 64)))
ill("a product in float16 that cancels", lambda a, b: a @ b, lambda d: (d.normal(5, 64, dtype=F16), d.normal(5, 64, dtype=F16)))
ill("a mean of bfloat16", lambda a: a.mean(), x(5, 100, dtype=BF16))
ill("determinant of condition 1e4", torch.linalg.det, lambda d: d.matrices(4, 4, 4, condition=1e4))
ill(
    "norms of tiny and huge numbers",
    lambda a, b: (a.norm(), b.norm()),
    lambda d: (d.normal(5, 4, scale=1e-15), d.normal(5, 4, scale=1e15)),
)
