"""Cases for the sweep over PyTorch's operator database, and the comparison of a mapped operator with a loop.

Run as a program it counts what a mapping function gets right, slow, refused or wrong; ``--func`` counts for
``torch.func.vmap`` instead of torchbatch.
"""

from __future__ import annotations

import argparse
import collections
import functools
import itertools
import sys
import warnings
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch.testing._internal.common_methods_invocations import op_db
from torch.utils import _pytree as pytree

from torchbatch.testing import assert_close

DTYPES = (torch.float64, torch.float32, torch.complex128, torch.int64, torch.bool)
#: Operators of which an empty batch cannot tell the shape of the result.
VALUES_GIVE_SHAPE = {"bincount", "repeat_interleave", "_segment_reduce.lengths"}
#: Operators whose values are arbitrary or drawn: only shapes and dtypes are compared.
UNINITIALISED = {"empty", "empty_like", "new_empty", "new_empty_strided", "empty_permuted", "empty_strided"}


class Case(NamedTuple):
    """One operator on one sample, with some of its tensors mapped."""

    operator: str  # the full name in the database, e.g. "linalg.svd" or "sum.sum_to_size"
    variant: str  # "function" or "inplace"
    sample: int
    mapped: tuple[bool, ...]  # which tensor leaves are mapped
    axis: str  # "first", "last" or "middle"
    size: int
    out_axis: int

    @property
    def mixture(self) -> str:
        return "".join("m" if m else "-" for m in self.mapped)


class Verdict(NamedTuple):
    kind: str  # "ok", "slow", "refused", "wrong", "both fail", "only loop fails", "ragged", "no tensor"
    detail: str = ""


OPERATORS = {f"{op.name}.{op.variant_test_name}".rstrip("."): op for op in op_db if op.supported_dtypes("cpu")}


def dtype_of(op: Any) -> torch.dtype:
    supported = op.supported_dtypes("cpu")
    return next((d for d in DTYPES if d in supported), next(iter(supported)))


class Sample(NamedTuple):
    """The same call with different values: ``leaves[i]`` are the tensors of sample ``i`` of the batch."""

    leaves: list[list[torch.Tensor]]
    rebuild: Callable[[list[Any]], tuple[Any, ...]]
    broadcasts_input: bool


BATCH = 3


@functools.lru_cache(maxsize=4)
def samples(name: str, dtype: torch.dtype, limit: int) -> list[Sample]:
    """Up to ``limit`` samples of an operator, spread over those the database has."""
    op = OPERATORS[name]
    columns = [_raw_samples(op, dtype, seed, limit) for seed in range(BATCH)]
    chosen = _spread(len(columns[0]), limit)
    return [_merge([column[i] if i < len(column) else columns[0][i] for column in columns]) for i in chosen]


def _raw_samples(op: Any, dtype: torch.dtype, seed: int, limit: int) -> list[Any]:
    """The samples of an operator; of very many only the first, which are made in an order from simple to special."""
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return list(itertools.islice(op.sample_inputs("cpu", dtype, requires_grad=False), 10 * limit))


def _spread(count: int, limit: int) -> list[int]:
    if count <= limit:
        return list(range(count))
    return sorted({round(i * (count - 1) / (limit - 1)) for i in range(limit)})


def _merge(column: list[Any]) -> Sample:
    flat = [pytree.tree_flatten((s.input, s.args, s.kwargs)) for s in column]
    leaves, spec = flat[0]
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
    rows = [[leaves[i] for i in places]]
    for other, other_spec in flat[1:]:
        same = other_spec == spec and all(_fits(a, b) for a, b in zip(leaves, other, strict=True))
        rows.append([(other if same else leaves)[i] for i in places])

    def rebuild(tensors: list[Any]) -> tuple[Any, ...]:
        filled = list(leaves)
        for i, tensor in zip(places, tensors, strict=True):
            filled[i] = tensor
        return pytree.tree_unflatten(filled, spec)

    return Sample(rows, rebuild, column[0].broadcasts_input)


def _fits(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.shape == b.shape and a.dtype == b.dtype and a.layout == b.layout
    return type(a) is type(b) and (a == b or repr(a) == repr(b) or callable(a))


def cases(name: str, limit: int, dtype: torch.dtype | None = None, gradients: bool = False) -> Iterator[Case]:
    """The cases of an operator: all tensors mapped, and each alone, over several axes and sizes."""
    op = OPERATORS[name]
    variants = ["function"] + (["inplace"] if op.inplace_variant is not None else [])
    if gradients:
        variants = ["gradient"] if op.supports_autograd and dtype_of(op).is_floating_point else []
    for index, sample in enumerate(samples(name, dtype or dtype_of(op), limit)):
        count = len(sample.leaves[0])
        dense = [leaf.layout is torch.strided for leaf in sample.leaves[0]]
        mixtures = {tuple(dense)} | {tuple(i == j and dense[j] for j in range(count)) for i in range(count)}
        for variant in variants if not sample.broadcasts_input else variants[:1]:
            for mapped in sorted(mixtures, reverse=True):
                if any(mapped):
                    yield from _placed(name, variant, index, mapped)


def _placed(name: str, variant: str, index: int, mapped: tuple[bool, ...]) -> Iterator[Case]:
    digest = zlib.crc32(f"{name}/{variant}/{index}/{mapped}".encode())
    if all(mapped):
        for shift, axis in enumerate(("first", "last", "middle")):
            yield Case(name, variant, index, mapped, axis, (BATCH, 1, BATCH)[(digest + shift) % 3], (0, -1, 1)[shift])
        if name not in VALUES_GIVE_SHAPE:
            yield Case(name, variant, index, mapped, "first", 0, 0)
    else:
        axis = ("first", "last", "middle")[digest % 3]
        yield Case(name, variant, index, mapped, axis, (BATCH, 1)[digest // 3 % 2], (0, -1, 1)[digest // 6 % 3])


def place(axis: str, rank: int) -> int:
    """Where a batch axis goes in a sample of some rank."""
    return {"first": 0, "last": rank, "middle": min(1, rank)}[axis]


def check(case: Case, vmap: Callable[..., Any], dtype: torch.dtype | None = None, limit: int = 6) -> Verdict:
    """Compare one case with the loop."""
    op = OPERATORS[case.operator]
    sample = samples(case.operator, dtype or dtype_of(op), limit)[case.sample]
    call = _call_of(op, case.variant, sample)
    try:
        expected = _loop(call, sample, case)
    except RaggedError as error:
        expected = error
    except Exception as error:
        expected = error
    slow = False
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            got, out_axes = _mapped(call, sample, case, vmap, expected)
        slow = any("performance drop" in str(w.message) or w.category.__name__ == "FallbackWarning" for w in caught)
    except Exception as error:
        if isinstance(expected, RaggedError):
            return Verdict("ragged", f"{type(error).__name__}: {_short(error)}")
        if isinstance(expected, Exception):
            return Verdict("both fail")
        return Verdict("refused", f"{type(error).__name__}: {_short(error)}")
    if isinstance(expected, Exception):
        if case.variant == "gradient":  # PyTorch has no derivative for an argument that vmap does not ask about
            return Verdict("both fail")
        return Verdict("only loop fails", f"{type(expected).__name__}: {_short(expected)}")
    problem = _difference(op, expected, got, out_axes)
    if problem:
        return Verdict("wrong", problem)
    return Verdict("slow" if slow else "ok")


def _short(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:200]


class RaggedError(Exception):
    """The results of different samples have different shapes."""


def _call_of(op: Any, variant: str, sample: Sample) -> Callable[..., list[Any]]:
    if variant == "gradient":
        return _gradient_of(_call_of(op, "function", sample))
    function = op.op if variant == "function" else op.inplace_variant

    def call(*tensors: Any) -> list[Any]:
        value, args, kwargs = sample.rebuild(list(tensors))
        if variant == "inplace":
            value = value.clone()
        out = pytree.tree_leaves(function(value, *args, **kwargs))
        return [x for x in out if x is not None]

    return call


def _gradient_of(call: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
    """The gradients of a weighted sum of the results with respect to every floating argument."""

    def gradients(*tensors: Any) -> list[Any]:
        floating = [i for i, x in enumerate(tensors) if x.is_floating_point()]

        def scalar(*values: Any) -> Any:
            filled = list(tensors)
            for i, value in zip(floating, values, strict=True):
                filled[i] = value
            results = [x for x in call(*filled) if isinstance(x, torch.Tensor) and x.is_floating_point()]
            weights = [torch.linspace(1, 2, x.numel(), dtype=x.dtype).reshape(x.shape) for x in results]
            return sum((x * w).sum() for x, w in zip(results, weights, strict=True))

        return list(torch.func.grad(scalar, tuple(range(len(floating))))(*[tensors[i] for i in floating]))

    return gradients


def _loop(call: Callable[..., list[Any]], sample: Sample, case: Case) -> list[torch.Tensor]:
    rows = []
    for i in range(max(case.size, 1)):
        torch.manual_seed(17)
        rows.append(call(*[_own(sample.leaves[i if m else 0][j]) for j, m in enumerate(case.mapped)]))
    stacked = []
    for column in zip(*rows, strict=True):
        if not all(isinstance(x, torch.Tensor) for x in column):
            raise NoTensorError(f"{type(column[0]).__name__} result")
        if any(x.shape != column[0].shape or x.dtype != column[0].dtype for x in column):
            raise RaggedError
        stacked.append(torch.stack([_dense(x) for x in column])[: case.size])
    return stacked


class NoTensorError(Exception):
    """The operator returns something that is not a tensor."""


def _own(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().clone()


def _dense(x: torch.Tensor) -> torch.Tensor:
    x = x.resolve_conj().resolve_neg().detach()
    return x.float() if x.dtype.itemsize == 1 and x.is_floating_point() else x


def _mapped(
    call: Callable[..., list[Any]], sample: Sample, case: Case, vmap: Callable[..., Any], expected: Any
) -> tuple[list[torch.Tensor], list[int]]:
    inputs, in_axes = [], []
    for j, mapped in enumerate(case.mapped):
        column = [row[j] for row in sample.leaves[: max(case.size, 1)]]
        if not mapped:
            inputs.append(_own(column[0]))
            in_axes.append(None)
            continue
        axis = place(case.axis, column[0].dim())
        batch = torch.stack([_own(x) for x in column])[: case.size].movedim(0, axis)
        inputs.append(batch)
        in_axes.append(axis)
    ranks = [x.dim() for x in expected] if isinstance(expected, list) else []
    out_axes = [case.out_axis if -rank <= case.out_axis < rank else 0 for rank in ranks]
    torch.manual_seed(17)
    outs = vmap(call, tuple(in_axes), out_axes if ranks else 0, randomness="different")(*inputs)
    return outs, out_axes


def _difference(op: Any, expected: list[torch.Tensor], got: list[torch.Tensor], out_axes: list[int]) -> str:
    if len(expected) != len(got):
        return f"{len(got)} results, expected {len(expected)}"
    for i, (e, g, axis) in enumerate(zip(expected, got, out_axes, strict=True)):
        g = _dense(g.movedim(axis, 0))
        if e.shape != g.shape or e.dtype != g.dtype:
            return f"result {i} is {g.dtype} {tuple(g.shape)}, expected {e.dtype} {tuple(e.shape)}"
        if is_random(op) or op.name in UNINITIALISED:
            continue
        try:
            assert_close(g, e, rtol=2e-4 if e.dtype != torch.float64 else 1e-6, atol=1e-5)
        except AssertionError as error:
            return f"result {i}: {' '.join(str(error).split())[:150]}"
    return ""


def is_random(op: Any) -> bool:
    """Whether an operator draws numbers, so that its values cannot be compared."""
    return op.name in RANDOM


RANDOM = {
    "normal", "bernoulli", "multinomial", "rand_like", "randn", "randn_like", "randint", "randint_like", "uniform", "cauchy",
    "exponential", "geometric", "log_normal", "nn.functional.dropout", "nn.functional.dropout2d",
    "nn.functional.dropout3d", "nn.functional.alpha_dropout", "nn.functional.feature_alpha_dropout", "nn.functional.rrelu",
    "nn.functional.fractional_max_pool2d", "nn.functional.fractional_max_pool3d", "svd_lowrank", "pca_lowrank",
    "nn.functional.scaled_dot_product_attention", "nn.functional.multi_head_attention_forward", "signal.windows",
}  # fmt: skip


def run(
    names: list[str],
    vmap: Callable[..., Any],
    limit: int,
    show: bool,
    dtype: torch.dtype | None = None,
    gradients: bool = False,
) -> collections.Counter[str]:
    """Count the verdicts over all cases of some operators."""
    total: collections.Counter[str] = collections.Counter()
    for name in names:
        mine: dict[tuple[str, str], list[Case]] = {}
        if dtype is not None and dtype not in OPERATORS[name].supported_dtypes("cpu"):
            continue
        for case in cases(name, limit, dtype, gradients):
            verdict = check(case, vmap, dtype, limit)
            total[verdict.kind] += 1
            total["cases"] += 1
            mine.setdefault((verdict.kind, verdict.detail), []).append(case)
        for (kind, detail), found in mine.items():
            if show and kind not in ("ok", "both fail"):
                first = found[0]
                where = f"{first.variant} sample {first.sample} {first.mixture} {first.axis} n={first.size} out={first.out_axis}"
                print(f"{name:45} {kind:10} x{len(found):<4} [{where}] {detail}", flush=True)
    return total


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--func", action="store_true")
    parser.add_argument("--limit", type=int, default=6)
    parser.add_argument("--part", default="0/1")
    parser.add_argument("--dtype", default=None)
    parser.add_argument("--gradients", action="store_true")
    parser.add_argument("names", nargs="*")
    options = parser.parse_args()
    part, parts = map(int, options.part.split("/"))
    if options.func:
        vmap = lambda f, i, o, randomness: torch.func.vmap(f, i, o, randomness=randomness)  # noqa: E731
    else:
        import torchbatch
        vmap = torchbatch.vmap
    names = options.names or [n for k, n in enumerate(sorted(OPERATORS)) if k % parts == part]
    print(dict(run(names, vmap, options.limit, True, options.dtype and getattr(torch, options.dtype), options.gradients)))


if __name__ == "__main__":
    sys.exit(main())
