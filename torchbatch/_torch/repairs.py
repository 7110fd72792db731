"""Operators that PyTorch's vmap gets wrong or refuses, written as others that it gets right.

They are asked before any transform and only inside a mapped function, so each is a composition that can be differentiated.

Private names used: those of :mod:`torchbatch._torch.overlay` and :mod:`torchbatch._torch.levels`;
``torch._decomp.decomposition_table``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._decomp import decomposition_table

from torchbatch._torch import batching, caller, formulas, levels, overlay
from torchbatch.errors import DataDependentError, UnsupportedOperationError

Original = Callable[..., Any]


def repair(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Let a function run in place of some operators where an argument is per-sample; it gets the original as ``_``.

    Operators that write in place are caught only in functions that may do so: PyTorch calls them within many others.
    """

    def enter(function: Callable[..., Any]) -> Callable[..., Any]:
        def make(original: Original) -> Original:
            def kernel(*args: Any, **kwargs: Any) -> Any:
                if any(varies(tensor) for tensor in batching.tensors(args, kwargs)):
                    return function(original, *args, **kwargs)
                return original(*args, **kwargs)

            return kernel

        for name in names:
            in_place = name.partition(".")[0].endswith("_")
            (overlay.register_factory if in_place else overlay.register)(name, make)
        return function

    return enter


def varies(value: Tensor) -> bool:
    """Whether a tensor is per-sample at some level."""
    return levels.is_wrapped(value) and any(True for _ in levels.batch_levels(value))


# --- shapes ----------------------------------------------------------------------------------------------------------


@repair("flip")
def flip(original: Original, x: Tensor, dims: Sequence[int]) -> Tensor:
    """Of a number, along an axis that it does not have."""
    return original(x, dims) if x.dim() else x.clone()


@repair("roll")
def roll(_: Original, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """A number rolls onto itself."""
    rolled: Tensor = _(x if x.dim() else x.reshape(1), *args, **kwargs)
    return rolled.reshape(x.shape)


@repair("narrow.Tensor")
def narrow(_: Original, x: Tensor, dim: int, start: Tensor, length: int) -> Tensor:
    """A window that begins elsewhere in each sample; a copy, not a view, if ``start`` is per-sample."""
    if not varies(start):
        narrowed: Tensor = _(x, dim, start, length)
        return narrowed
    start = torch.where(start < 0, start + x.shape[dim], start)
    return x.index_select(dim, start + torch.arange(length, device=x.device))


@repair("as_strided_scatter")
def as_strided_scatter(
    _: Original,
    x: Tensor,
    src: Tensor,
    size: Sequence[int],
    stride: Sequence[int],
    storage_offset: int | None = None,
) -> Tensor:
    """Write into a contiguous tensor at the places that the strides give."""
    place = torch.full((), storage_offset or 0, device=x.device)
    for length, step in zip(size, stride, strict=True):
        place = place.unsqueeze(-1) + step * torch.arange(length, device=x.device)
    return x.reshape(-1).index_put((place.reshape(-1),), src.reshape(-1)).reshape(x.shape)


@repair("squeeze_", "squeeze_.dim", "squeeze_.dims")
def squeeze(_: Original, x: Tensor, dim: int | Sequence[int] | None = None) -> Tensor:
    """One axis after the other, the last first."""
    rank = x.dim()
    dims = range(rank) if dim is None else [dim] if isinstance(dim, int) else dim
    for axis in sorted({d % rank for d in dims} if rank else (), reverse=True):
        if x.shape[axis] == 1:
            x = overlay.call(torch.ops.aten.squeeze_.dim, (x, axis), {})
    return x


@repair("resize_")
def resize(_: Original, x: Tensor, size: Sequence[int], **options: Any) -> Tensor:
    """Possible only where the samples lie one after the other."""
    try:
        result: Tensor = _(x, size, **options)
    except RuntimeError as error:
        raise UnsupportedOperationError(
            f"resize_ cannot change the shape of this per-sample tensor in place. Use x.reshape(...), torch.nn.functional.pad "
            f"or a new tensor.{caller.line()}"
        ) from error
    return result


@repair("max_unpool2d", "max_unpool3d")
def max_unpool(_: Original, x: Tensor, indices: Tensor, output_size: Sequence[int], *options: Any) -> Tensor:
    """The formula again: PyTorch's gradient asks how the memory is laid out."""
    return formulas.max_unpool(_, x, indices, output_size, *options)


# --- masks as indices ------------------------------------------------------------------------------------------------


@repair("index_put")
def index_put(_: Original, x: Tensor, indices: Sequence[Tensor | None], values: Tensor, accumulate: bool = False) -> Tensor:
    """Where the index is a per-sample mask, choose between the old value and the new one."""
    at = _mask_of(indices)
    mask = None if at is None else indices[at]
    if at is None or mask is None:
        result: Tensor = _(x, indices, values, accumulate)
        return result
    rest = x.dim() - at - mask.dim()
    wide = mask.reshape(*mask.shape, *[1] * rest)
    new = _new_values(x, mask, values, rest)
    if accumulate:
        return x + torch.where(wide, new, torch.zeros_like(new))
    return torch.where(wide, new, x)


@repair("index_put_")
def index_put_in_place(
    _: Original, x: Tensor, indices: Sequence[Tensor | None], values: Tensor, accumulate: bool = False
) -> Tensor:
    """The same, written into the tensor."""
    if _mask_of(indices) is None:
        result: Tensor = _(x, indices, values, accumulate)
        return result
    return x.copy_(index_put(_, x, indices, values, accumulate))


def _mask_of(indices: Sequence[Tensor | None]) -> int | None:
    """Which index is a per-sample mask, if it is the only index."""
    given = [i for i, index in enumerate(indices) if index is not None]
    if len(given) != 1:
        return None
    index = indices[given[0]]
    return given[0] if index is not None and index.dtype is torch.bool and varies(index) else None


def _new_values(x: Tensor, mask: Tensor, values: Tensor, rest: int) -> Tensor:
    """The values for every element of the mask, True or not: they are one for all, or one for each True in order."""
    values = values.to(x.dtype)
    if values.dim() <= rest:
        return values
    if values.shape[-rest - 1] == 1:
        shape = values.shape[: values.dim() - rest - 1] + (1,) * mask.dim() + values.shape[values.dim() - rest :]
        return values.reshape(shape)
    count = values.shape[-rest - 1]
    if values.dim() > rest + 1 or not _has_count(mask, count):
        raise DataDependentError(
            f"A boolean mask that varies from sample to sample is the index of a write of {count} values, and it does not have "
            f"{count} True elements in every sample. Write a value for every element, with torch.where.{caller.line()}"
        )
    place = (mask.reshape(-1).cumsum(0) - 1).clamp(0, max(count - 1, 0))
    return values.index_select(0, place).reshape(*mask.shape, *values.shape[1:])


def _has_count(mask: Tensor, count: int) -> bool:
    """Whether every sample of a mask has some number of True elements."""
    return count > 0 and not overlay.is_traced() and bool((levels.innermost(mask.sum()) == count).all())


@repair("index_fill.int_Scalar", "index_fill.int_Tensor")
def index_fill(_: Original, x: Tensor, dim: int, index: Tensor, value: Any) -> Tensor:
    """Choose between the old value and the new one, where the index is per-sample."""
    if not varies(index):
        result: Tensor = _(x, dim, index, value)
        return result
    if x.dim() == 0:
        return index_fill(_, x.reshape(1), 0, index, value).reshape(())
    count = x.shape[dim]
    places = torch.where(index < 0, index + count, index).reshape(-1)
    hit = torch.zeros(count, dtype=torch.bool, device=x.device).scatter(0, places, True)
    shape = [1] * x.dim()
    shape[dim] = -1
    return torch.where(hit.reshape(shape), torch.as_tensor(value, dtype=x.dtype, device=x.device), x)


# --- statistics and random numbers -----------------------------------------------------------------------------------


@repair("cov")
def cov(_: Original, x: Tensor, *, correction: int = 1, fweights: Tensor | None = None, aweights: Tensor | None = None) -> Tensor:
    """The covariance with weights, without a look at whether they are negative."""
    weights = [w for w in (fweights, aweights) if w is not None]
    if not weights:
        result: Tensor = _(x, correction=correction)
        return result
    rows = x.reshape(-1, x.shape[-1]) if x.dim() else x.reshape(1, 1)
    weight = weights[0] if len(weights) == 1 else weights[0] * weights[1]
    total = weight.sum()
    norm = total - correction * ((weight * aweights).sum() / total if aweights is not None else 1)
    centred = rows - (rows * weight).sum(1, keepdim=True) / total
    return ((centred * weight) @ centred.mH / norm.clamp(min=0)).squeeze()


@repair("addbmm", "addbmm_", "addmv", "addmv_", "baddbmm", "baddbmm_")
def integers(_: Original, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The factors of a product of integers are integers, as PyTorch has them without vmap."""
    if not (x.is_floating_point() or x.is_complex()):
        kwargs = {key: int(value) for key, value in kwargs.items()}
    result: Tensor = _(x, *args, **kwargs)
    return result


@repair("linalg_pinv.atol_rtol_tensor", "linalg_pinv.rcond_tensor")
def pinv(_: Original, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The inverse of a matrix without elements is its transpose, whatever the tolerance."""
    inverse: Tensor = _(x, *args, **kwargs) if x.numel() else x.mH
    return inverse


@repair("rrelu")
def rrelu(
    _: Original, x: Tensor, lower: float = 1 / 8, upper: float = 1 / 3, training: bool = False, generator: Any = None
) -> Tensor:
    """A leaky ReLU whose slope is drawn for each element."""
    if not training:
        return torch.nn.functional.leaky_relu(x, (lower + upper) / 2)
    slope = torch.empty_like(x.detach()).uniform_(lower, upper, generator=generator)
    return torch.where(x > 0, x, x * slope)


@repair("rrelu_")
def rrelu_in_place(_: Original, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The same, written into the tensor."""
    return x.copy_(rrelu(_, x, *args, **kwargs))


@repair("fft_ihfftn", "fft_ihfft2")
def ihfftn(_: Original, x: Tensor, s: Any = None, dim: Any = None, norm: str | None = None) -> Tensor:
    """The inverse for real values is the conjugate of the forward transform."""
    swapped = {None: "forward", "backward": "forward", "forward": "backward", "ortho": "ortho"}
    return torch.fft.rfftn(x, s, dim, swapped[norm]).conj_physical()


# --- losses and embeddings -------------------------------------------------------------------------------------------


def _decomposed(name: str) -> None:
    """Use PyTorch's own definition in Python, whose gradient needs no formula of its own."""
    operator = batching.operator_of(name)
    repair(name)(lambda _, *args, **kwargs: decomposition_table[operator](*args, **kwargs))


_decomposed("multi_margin_loss")


def _batched_alike(a: Tensor, b: Tensor) -> bool:
    return list(levels.batch_levels(a)) == list(levels.batch_levels(b))


def _elementwise_loss(name: str, formula: Callable[..., Tensor]) -> None:
    """Use a formula where the arguments vary along different axes, which PyTorch mixes up in nested maps."""

    @repair(name)
    def loss(_: Original, x: Tensor, target: Tensor, reduction: int = 1, *options: float) -> Tensor:
        if _batched_alike(x, target):
            result: Tensor = _(x, target, reduction, *options)
            return result
        each = formula(x - target, *options)
        return each.mean() if reduction == 1 else each.sum() if reduction == 2 else each


_elementwise_loss("mse_loss", torch.square)
_elementwise_loss("huber_loss", lambda d, delta=1.0: torch.where(d.abs() < delta, d * d / 2, delta * (d.abs() - delta / 2)))
_elementwise_loss(
    "smooth_l1_loss",
    lambda d, beta=1.0: torch.where(d.abs() < beta, d * d / 2 / (beta or 1.0), d.abs() - beta / 2),
)


@repair("multilabel_margin_loss")
def multilabel_margin_loss(_: Original, x: Tensor, target: Tensor, reduction: int = 1) -> Tensor:
    """A formula whose gradient needs no formula of its own."""
    return formulas.multilabel_margin_loss(_, x, target, reduction)[0]


@repair("ctc_loss.IntList")
def ctc_loss(
    _: Original,
    scores: Tensor,
    targets: Tensor,
    inputs: Sequence[int],
    lengths: Sequence[int],
    blank: int = 0,
    reduction: int = 1,
    zero_infinity: bool = False,
) -> Tensor:
    """The loss of each sequence, and the reduction, which PyTorch's definition does not do under ``grad``."""
    if scores.dim() == 2:
        scores, targets = scores.unsqueeze(1), targets.unsqueeze(0) if targets.dim() else targets
        whole = ctc_loss(_, scores, targets, inputs, lengths, blank, reduction, zero_infinity)
        return whole if reduction else whole.squeeze(0)
    loss: Tensor = torch.ops.aten._ctc_loss(scores, targets, list(inputs), list(lengths), blank, zero_infinity)[0]
    if zero_infinity:
        loss = torch.where(loss == torch.inf, 0.0, loss)
    if reduction == 1:
        return (loss / torch.tensor(lengths, dtype=loss.dtype, device=loss.device).clamp(min=1)).mean()
    return loss.sum() if reduction == 2 else loss


@repair("ctc_loss.Tensor")
def ctc_loss_of_tensors(_: Original, scores: Tensor, targets: Tensor, inputs: Tensor, lengths: Tensor, *options: Any) -> Tensor:
    """The same, where all samples have the same lengths."""
    if varies(inputs) or varies(lengths):
        result: Tensor = _(scores, targets, inputs, lengths, *options)
        return result
    return ctc_loss(_, scores, targets, inputs.reshape(-1).tolist(), lengths.reshape(-1).tolist(), *options)


@repair("conv_tbc")
def conv_tbc(_: Original, x: Tensor, weight: Tensor, bias: Tensor, pad: int = 0) -> Tensor:
    """A convolution with time first, batch second, channels last."""
    return torch.conv1d(x.permute(1, 2, 0), weight.permute(2, 1, 0), bias, padding=pad).permute(2, 0, 1)


@repair("pdist")
def pdist(_: Original, x: Tensor, p: float = 2.0) -> Tensor:
    """The distances of all pairs of rows."""
    first, second = torch.triu_indices(x.shape[0], x.shape[0], 1, device=x.device)
    return torch.linalg.vector_norm(x[first] - x[second], p, dim=-1)


@repair("embedding")
def embedding(
    original: Original,
    weight: Tensor,
    indices: Tensor,
    padding_idx: int = -1,
    by_frequency: bool = False,
    sparse: bool = False,
) -> Any:
    """PyTorch's rule for a table of each sample's own forgets that the row ``padding_idx`` has no gradient."""
    if padding_idx < 0 or not varies(weight):
        return original(weight, indices, padding_idx, by_frequency, sparse)
    found = original(weight, indices, -1, by_frequency, sparse)
    return torch.where((indices == padding_idx).unsqueeze(-1), found.detach(), found)


@repair("embedding_bag", "embedding_bag.padding_idx")
def embedding_bag(
    _: Original,
    weight: Tensor,
    indices: Tensor,
    offsets: Tensor,
    scale_grad_by_freq: bool = False,
    mode: int = 0,
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sum, average or take the maximum of rows of a table, bag by bag."""
    bags = offsets.shape[0] - include_last_offset
    last = torch.arange(indices.shape[0], device=indices.device, dtype=offsets.dtype)
    bag = (torch.searchsorted(offsets[:bags].contiguous(), last, right=True) - 1).clamp(min=0)
    kept = torch.ones_like(indices, dtype=torch.bool)
    if padding_idx is not None:
        kept = indices != (padding_idx if padding_idx >= 0 else padding_idx + weight.shape[0])
    rows = weight[indices]
    if scale_grad_by_freq:  # a gradient, and so a value, of which only this part counts
        part = rows / (indices.unsqueeze(-1) == indices).sum(-1, keepdim=True)
        rows = part + (rows - part).detach()
    if per_sample_weights is not None:
        rows = rows * per_sample_weights.unsqueeze(-1)
    member = (bag == torch.arange(bags, device=bag.device).unsqueeze(-1)) & kept
    count = member.sum(1)
    result = _pooled(rows, member, count, mode)
    return result, bag, count, torch.zeros_like(count)


def _pooled(rows: Tensor, member: Tensor, count: Tensor, mode: int) -> Tensor:
    if mode == 2:
        filled = torch.where(member.unsqueeze(-1), rows, -torch.inf)
        return torch.where(count.unsqueeze(-1) > 0, filled.max(1).values, 0.0) if rows.shape[0] else filled.sum(1)
    total = member.to(rows.dtype) @ rows
    return total / count.clamp(min=1).unsqueeze(-1) if mode == 1 else total
