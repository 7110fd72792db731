"""Operators written as others, where PyTorch has no such definition or it does not work for batched tensors.

Each function takes the operator and its arguments, which are per-sample tensors or shared ones.
"""

from __future__ import annotations

import string
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

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
    place = torch.where(mask, mask.reshape(-1).cumsum(0).reshape(mask.shape) - 1, count).reshape(-1)
    room = torch.zeros_like(place, dtype=grad.dtype).new_zeros(count + 1)
    return room.scatter_add(0, place, grad.reshape(-1) * mask.reshape(-1))[:count].reshape(sizes)


@formula("nonzero_static")
def nonzero_static(_: Any, x: Tensor, *, size: int, fill_value: int = -1) -> Tensor:
    """The first ``size`` places of elements that are not zero, in order."""
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


@formula("conv_tbc")
def conv_tbc(_: Any, x: Tensor, weight: Tensor, bias: Tensor, pad: int = 0) -> Tensor:
    """A convolution with time first, batch second, channels last."""
    return torch.conv1d(x.permute(1, 2, 0), weight.permute(2, 1, 0), bias, padding=pad).permute(2, 0, 1)


@formula("_weight_norm_interface_backward")
def weight_norm_backward(_: Any, grad: Tensor, v: Tensor, g: Tensor, norms: Tensor, dim: int) -> Any:
    """The gradient of a weight that is split into direction and length."""
    return torch.ops.aten._weight_norm_differentiable_backward(grad, v, g, norms, dim)


@formula("_pdist_forward")
def pdist(_: Any, x: Tensor, p: float = 2.0) -> Tensor:
    """The distances of all pairs of rows."""
    first, second = torch.triu_indices(x.shape[0], x.shape[0], 1, device=x.device)
    return torch.linalg.vector_norm(x[first] - x[second], p, dim=-1)
