"""Operators written as others, where PyTorch has no such definition or it does not work for batched tensors.

Each function takes the operator and its arguments, which are per-sample tensors or shared ones.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from torchbatch._torch import batching, caller
from torchbatch._torch.fallback import loop_kernel
from torchbatch.errors import DataDependentError, UnsupportedOperationError

TABLE: dict[str, Callable[..., Any]] = {}


def formula(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Enter a function in the table under the names of its operators."""

    def enter(function: Callable[..., Any]) -> Callable[..., Any]:
        TABLE.update(dict.fromkeys(names, function))
        return function

    return enter


# --- reading and writing by index ------------------------------------------------------------------------------------


@formula("put")
def put(_: Any, x: Tensor, index: Tensor, source: Tensor, accumulate: bool = False) -> Tensor:
    """Write into the flattened tensor."""
    return x.reshape(-1).index_put((index.reshape(-1),), source.reshape(-1), accumulate).reshape(x.shape)


@formula("take")
def take(_: Any, x: Tensor, index: Tensor) -> Tensor:
    """Read from the flattened tensor."""
    place = torch.where(index < 0, index + x.numel(), index).reshape(-1)
    return x.reshape(-1).gather(0, place).reshape(index.shape)


@formula("max_unpool2d", "max_unpool3d")
def max_unpool(_: Any, x: Tensor, indices: Tensor, output_size: Sequence[int], *__: Any) -> Tensor:
    """Every maximum goes back to the place that it came from, in each channel."""
    first = x.dim() - len(output_size)
    room = x.new_zeros(*x.shape[:first], torch.Size(output_size).numel())
    return room.scatter(-1, indices.flatten(first), x.flatten(first)).unflatten(-1, output_size)


@formula("index_reduce")
def index_reduce(
    _: Any, x: Tensor, dim: int, index: Tensor, source: Tensor, reduce: str, *, include_self: bool = True
) -> Tensor:
    """A ``scatter_reduce`` whose index is the same along all other axes."""
    if x.dim() == 0:
        return x.reshape(1).scatter_reduce(0, index.reshape(-1), source.reshape(-1), reduce, include_self=include_self)[0]
    shape = [1] * source.dim()
    shape[dim] = -1
    wide = index.reshape(shape).expand_as(source)
    return x.scatter_reduce(dim, wide, source, reduce, include_self=include_self)


@formula("masked_scatter")
def masked_scatter(_: Any, x: Tensor, mask: Tensor, source: Tensor) -> Tensor:
    """The ``k``-th True of the mask takes the ``k``-th element of the source."""
    x, mask = torch.broadcast_tensors(x, mask)
    if source.numel() == 0:
        return x.clone()
    place = (mask.reshape(-1).cumsum(0) - 1).clamp(0, source.numel() - 1)
    return torch.where(mask, source.reshape(-1)[place].reshape(x.shape), x)


@formula("masked_scatter_backward")
def masked_scatter_backward(_: Any, grad: Tensor, mask: Tensor, sizes: list[int]) -> Tensor:
    """The gradient of the source: what the ``k``-th True of the mask took."""
    count = torch.Size(sizes).numel()
    mask = mask.expand_as(grad)
    place = torch.where(mask, mask.reshape(-1).cumsum(0).reshape(mask.shape) - 1, count).reshape(-1)
    room = torch.zeros_like(place, dtype=grad.dtype).new_zeros(count + 1)
    return room.scatter_add(0, place, grad.reshape(-1) * mask.reshape(-1))[:count].reshape(sizes)


@formula("nonzero_static")
def nonzero_static(_: Any, x: Tensor, *, size: int, fill_value: int = -1) -> Tensor:
    """The first ``size`` places of elements that are not zero, in order."""
    if x.numel() == 0:
        return torch.full_like(x, fill_value, dtype=torch.int64).new_full((size, x.dim()), fill_value)
    flat = (x != 0).reshape(-1)
    order = torch.argsort(flat.logical_not().to(torch.uint8), stable=True)[:size]
    order = torch.cat([order, order.new_zeros(size - order.shape[0])])
    filled = torch.arange(size, device=x.device) < flat.sum()
    places = torch.stack(torch.unravel_index(order, x.shape), -1) if x.dim() else order.new_zeros(size, 0)
    return torch.where(filled.unsqueeze(-1), places, fill_value)


@formula("searchsorted.Scalar")
def searchsorted(_: Any, edges: Tensor, value: float, **options: Any) -> Tensor:
    """The search for one number."""
    return torch.searchsorted(edges, edges.new_full((1,), value), **options)[0]


# --- sums of products ------------------------------------------------------------------------------------------------


@formula("_trilinear")
def trilinear(
    _: Any, a: Tensor, b: Tensor, c: Tensor, no_a: list[int], no_b: list[int], no_c: list[int], summed: list[int], *__: Any
) -> Tensor:
    """The product of three tensors that lack some axes each, summed over some axes."""
    axes = string.ascii_letters[: a.dim() + len(no_a)]
    terms = ["".join(letter for i, letter in enumerate(axes) if i not in missing) for missing in (no_a, no_b, no_c)]
    result = "".join(letter for i, letter in enumerate(axes) if i not in summed)
    return torch.einsum(f"{','.join(terms)}->{result}", a, b, c)


@formula("_weight_norm_interface_backward")
def weight_norm_backward(_: Any, grad: Tensor, v: Tensor, g: Tensor, norms: Tensor, dim: int) -> Any:
    """The gradient of a weight that is split into direction and length."""
    return torch.ops.aten._weight_norm_differentiable_backward(grad, v, g, norms, dim)


@formula("_pdist_forward")
def pdist(_: Any, x: Tensor, p: float = 2.0) -> Tensor:
    """The distances of all pairs of rows."""
    first, second = torch.triu_indices(x.shape[0], x.shape[0], 1, device=x.device)
    return torch.linalg.vector_norm(x[first] - x[second], p, dim=-1)


@formula("polygamma_")
def polygamma(_: Any, x: Tensor, n: int) -> Tensor:
    """The functional form takes its arguments the other way round."""
    if not x.is_floating_point():
        raise RuntimeError(f"result type Float can't be cast to the desired output type {x.dtype}")
    return x.copy_(torch.polygamma(n, x))


@formula("multilabel_margin_loss_forward")
def multilabel_margin_loss(_: Any, x: Tensor, target: Tensor, reduction: int = 1) -> tuple[Tensor, Tensor]:
    """Every class named before the first -1 is to exceed every class not named by a margin of 1."""
    named = (target >= 0).cumprod(-1).bool()
    rows = x.reshape(1) if x.dim() == 0 else x
    classes = torch.arange(rows.shape[-1], device=x.device)
    wanted = ((target.reshape(rows.shape).unsqueeze(-1) == classes) & named.reshape(rows.shape).unsqueeze(-1)).any(-2)
    scores = rows.gather(-1, torch.where(named, target, 0).reshape(rows.shape))
    short = (1 - scores.unsqueeze(-1) + rows.unsqueeze(-2)).relu()  # no derivative at zero, unlike clamp
    counted = named.reshape(rows.shape).unsqueeze(-1) & ~wanted.unsqueeze(-2)
    loss = torch.where(counted, short, 0.0).sum((-2, -1)) / max(rows.shape[-1], 1)
    loss = loss.mean() if reduction == 1 else loss.sum() if reduction == 2 else loss
    return loss, wanted.to(x.dtype).reshape(target.shape)


# --- what looks at values --------------------------------------------------------------------------------------------


@formula("embedding_renorm_")
def embedding_renorm(_: Any, weight: Tensor, indices: Tensor, max_norm: float, norm_type: float) -> Tensor:
    """Shrink the rows in use whose norm is too large."""
    norm = torch.linalg.vector_norm(weight, norm_type, dim=1)
    used = (torch.arange(weight.shape[0], device=weight.device) == indices.reshape(-1, 1)).any(0)
    return weight.copy_(torch.where(used & (norm > max_norm), max_norm / (norm + 1e-7), 1.0).unsqueeze(1) * weight)


@formula("repeat_interleave.Tensor")
def repeat_interleave(_: Any, repeats: Tensor, *, output_size: int | None = None) -> Any:
    """Each position as often as it says."""
    if output_size is None:
        return loop_kernel("repeat_interleave.Tensor")(repeats)
    ends = repeats.cumsum(0)
    places = torch.arange(output_size, device=repeats.device, dtype=ends.dtype)
    return torch.searchsorted(ends, places, right=True).to(repeats.dtype)


@formula("tensor_split.tensor_indices_or_sections")
def tensor_split(_: Any, x: Tensor, places: Tensor, dim: int = 0) -> Any:
    """Split where a tensor says, if it says the same for all samples."""
    if batching.batch_size((places,), {}, batching.current_level()) is None:
        return torch.tensor_split(x, places.tolist() if places.dim() else int(places), dim)
    raise DataDependentError(
        "tensor_split cuts at places that vary from sample to sample, so the parts have no fixed shape. Give the places as "
        f"numbers or as an unmapped tensor, or read windows of one length with torch.narrow or torch.gather.{caller.line()}"
    )


@formula("histc")
def histc(_: Any, x: Tensor, bins: int = 100, min: float = 0, max: float = 0) -> Tensor:
    """Count the elements between each pair of edges; the last bin has both of its edges."""
    flat = x.reshape(-1)
    low, high = _histogram_range(flat, min, max)
    step = (high - low) / bins
    at = torch.arange(bins + 1, device=x.device, dtype=x.dtype)
    edges = torch.where(at < (bins + 1) // 2, low + step * at, high - step * (bins - at))
    place = torch.searchsorted(edges, flat, right=True) - 1
    place = torch.where(flat == high, bins - 1, place)
    counted = (flat >= low) & (flat <= high)
    room = torch.zeros_like(edges[:-1] * flat.sum())
    return room.scatter_add(0, place.clamp(0, bins - 1), counted.to(x.dtype))


def _histogram_range(x: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    if low != high or x.numel() == 0:
        low, high = (low, high) if low != high else (low - 1, high + 1)
        return torch.as_tensor(low, dtype=x.dtype, device=x.device), torch.as_tensor(high, dtype=x.dtype, device=x.device)
    first, last = torch.aminmax(x)
    flat = first == last
    return torch.where(flat, first - 1, first), torch.where(flat, last + 1, last)


@formula("equal")
def equal(_: Any, *__: Tensor) -> bool:
    """One True or False for Python cannot be had from all samples."""
    raise DataDependentError(
        "Python needs one True or False from comparing per-sample tensors. Use (a == b).all() or torch.isclose(a, b).all(), "
        f"which stay tensors.{caller.line()}"
    )


@formula("resize_as_")
def resize_as(operator: Any, x: Tensor, template: Tensor, **_: Any) -> Tensor:
    """Nothing to do where the shape is right; else refused."""
    if x.shape == template.shape:
        return x
    raise UnsupportedOperationError(
        f"{operator} cannot change the shape of a per-sample tensor in place. Use x.reshape(...), torch.nn.functional.pad or "
        f"a new tensor.{caller.line()}"
    )


# --- sequences -------------------------------------------------------------------------------------------------------


@formula("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention_for_cpu_backward")
def attention(operator: Any, *args: Any, attn_mask: Tensor | None = None, **options: Any) -> Any:
    """The samples as part of the batch that attention has already."""
    level = batching.current_level()
    size = batching.batch_size(args, {"mask": attn_mask}, level) or 0
    count = args[0].shape[0]
    if attn_mask is not None:
        attn_mask = attn_mask.reshape((1,) * (4 - attn_mask.dim()) + attn_mask.shape)
        attn_mask = attn_mask.expand(count, *attn_mask.shape[1:])
    with batching.below():
        folded = [batching.replaced(value, lambda x: _sequences(x, level, size, 0)) for value in args]
        mask = None if attn_mask is None else _sequences(attn_mask, level, size, 0)
        results = operator(*folded, attn_mask=mask, **options)
        return tuple(batching.wrapped(part.unflatten(0, (size, count)), level) for part in results)


@formula("_upsample_nearest_exact1d_backward", "_upsample_nearest_exact2d_backward", "_upsample_nearest_exact3d_backward")
def nearest_backward(operator: Any, grad: Tensor, output: list[int], inputs: list[int], *scales: Any) -> Tensor:
    """The samples as part of the batch of images."""
    level = batching.current_level()
    size = batching.batch_size((grad,), {}, level) or 0
    with batching.below():
        result = operator(_sequences(grad, level, size, 0), output, [size * inputs[0], *inputs[1:]], *scales)
        return batching.wrapped(result.unflatten(0, (size, inputs[0])), level)


@formula("_ctc_loss")
def ctc_loss(
    operator: Any, scores: Tensor, targets: Tensor, inputs: list[int], lengths: list[int], *options: Any, **named: Any
) -> Any:
    """All sequences of all samples as one batch of sequences."""
    level = batching.current_level()
    size = batching.batch_size((scores, targets), {}, level) or 0
    with batching.below():
        loss, alpha = operator(
            _sequences(scores, level, size, 1), _sequences(targets, level, size, 0), inputs * size, lengths * size,
            *options, **named,
        )  # fmt: skip
        return tuple(batching.wrapped(part.unflatten(0, (size, -1)), level) for part in (loss, alpha))


@formula("_ctc_loss_backward")
def ctc_loss_backward(
    operator: Any, grad: Tensor, scores: Tensor, targets: Tensor, inputs: list[int], lengths: list[int], loss: Tensor,
    alpha: Tensor, *options: Any, **named: Any,
) -> Tensor:  # fmt: skip
    """The gradient of the same."""
    level = batching.current_level()
    size = batching.batch_size((grad, scores, targets, loss, alpha), {}, level) or 0
    with batching.below():
        given = ((grad, 0), (scores, 1), (targets, 0), (loss, 0), (alpha, 0))
        fold = [_sequences(value, level, size, axis) for value, axis in given]
        result = operator(*fold[:3], inputs * size, lengths * size, *fold[3:], *options, **named)
        return batching.wrapped(result.unflatten(1, (size, -1)).movedim(1, 0), level)


def _sequences(value: Tensor, level: int, size: int, axis: int) -> Tensor:
    """Join the samples with the axis of the sequences."""
    inner = batching.opened(value, level)
    front = value.unsqueeze(0).expand(size, *value.shape) if inner.axis is None else inner.front()
    return front.movedim(0, axis).flatten(axis, axis + 1)
