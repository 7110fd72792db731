"""Connectionist temporal classification for a batch whose lengths are tensors, of operations that know examples.

Source: A. Graves et al., Connectionist temporal classification, ICML 2006; the gradient is that of PyTorch's
``ctc_loss``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchbatch.lax.loops import scan

_NEVER = -1e30  # the logarithm of a probability of zero, that can be added to itself


def ctc_loss(
    log_probs: Tensor,
    targets: Tensor,
    input_lengths: Any,
    target_lengths: Any,
    blank: int = 0,
    reduction: str = "mean",
    zero_infinity: bool = False,
) -> Tensor:
    """``torch.nn.functional.ctc_loss`` for ``[T, 1, C]`` or ``[T, C]``, and ``[1, S]`` or ``[S]``."""
    has_batch = log_probs.dim() == 3
    logs, labels = (log_probs[:, 0] if has_batch else log_probs), targets.reshape(-1)
    steps = torch.as_tensor(input_lengths, device=logs.device).reshape(())
    count = torch.as_tensor(target_lengths, device=logs.device).reshape(())
    is_read = torch.arange(len(logs), device=logs.device) < steps
    loss = _negative_log_likelihood(logs, labels.long(), is_read, count, blank)
    infinite = loss >= -_NEVER / 2
    loss = torch.where(infinite, 0.0 if zero_infinity else torch.inf, loss)
    loss = loss + torch.where(infinite, 0.0, _as_of_logits(logs, is_read))
    if not zero_infinity:
        loss = loss + _without_gradient(logs, infinite)
    if reduction == "none":
        return loss[None] if has_batch else loss
    return loss / count.clamp(min=1) if reduction == "mean" else loss


def _negative_log_likelihood(logs: Tensor, labels: Tensor, is_read: Tensor, count: Tensor, blank: int) -> Tensor:
    """Over all ways in which blanks between and repetitions of the labels fill the time."""
    blanks = torch.full_like(labels, blank)
    path = torch.cat([torch.stack([blanks, labels], 1).reshape(-1), blanks.new_full((1,), blank)])
    before = torch.cat([path.new_full((2,), blank), path[:-2]]) if len(path) > 2 else torch.full_like(path, blank)
    skips = (path != blank) & (path != before)
    places = torch.arange(len(path), device=path.device)
    start = torch.where(places < 2, logs[0][path], _NEVER)

    def step(alpha: Tensor, seen: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[()]]:
        now, counts = seen
        one, two = (torch.cat([alpha.new_full((n,), _NEVER), alpha])[: len(path)] for n in (1, 2))
        ways = torch.stack([alpha, one, torch.where(skips, two, _NEVER)])
        moved = (torch.logsumexp(ways, 0) + now[path]).clamp(min=_NEVER)
        return torch.where(counts, moved, alpha), ()

    alpha, _ = scan(step, start, (logs[1:], is_read[1:]))
    ends = torch.where((places == 2 * count) | (places == 2 * count - 1), alpha, _NEVER)
    return -torch.logsumexp(ends, 0)


def _as_of_logits(logs: Tensor, is_read: Tensor) -> Tensor:
    """Zero, with the gradient that PyTorch adds: its own takes ``log_probs`` for what ``log_softmax`` returns."""
    read = torch.where(is_read[:, None], logs.exp(), 0.0)
    return (read - read.detach()).sum()


def _without_gradient(logs: Tensor, infinite: Tensor) -> Tensor:
    """Zero; where a loss is infinite, the gradient is NaN, as PyTorch's is."""
    one = torch.where(infinite, 0.0, 1.0).to(logs.dtype)
    return (one + (logs.clamp(-1, 1) * 0).sum()).sqrt() - one
