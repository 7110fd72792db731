"""Random draws of a module, each from the key of its example: the same whatever the batch, the chunk and the compiler."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from torchbatch import random
from torchbatch.errors import RandomnessError

_aten = torch.ops.aten


def from_key(operator: Any) -> Callable[..., Any]:
    """What draws from a key in the place of an operator.

    Raises:
        RandomnessError: there is nothing.
    """
    found = _DRAWS.get(operator)
    if found is None:
        name = str(getattr(operator, "__name__", operator)).partition(".")[0]
        raise RandomnessError(
            f"per_example: the model draws random numbers with {name}, for which there is no draw of each example's own. Draw "
            f"from a key that is part of the batch (torchbatch.random), or put the module that draws into eval mode."
        )
    return found


def seed() -> Tensor:
    """Two words that PyTorch's generator would draw next, so that ``torch.manual_seed`` decides; it is not moved on."""
    ahead = torch.Generator()
    ahead.set_state(torch.default_generator.get_state())
    return _words(ahead)


def move_on() -> None:
    """Draw from PyTorch's generator what :func:`seed` saw."""
    _words(torch.default_generator)


def _words(generator: torch.Generator) -> Tensor:
    return torch.randint(-(2**31), 2**31, (2,), generator=generator).to(torch.int32)


def keys(words: Tensor, start: int, count: int) -> Tensor:
    """A key for each of ``count`` examples from number ``start`` on, ``[count, 2]``."""
    numbers = torch.arange(start, start + count, dtype=torch.int32, device=words.device)
    return torch.stack([words[0].expand(count), words[1] ^ numbers], 1)


def _key(words: Tensor, number: int) -> random.Key:
    found: random.Key = random.fold_in(random.wrap_key_data(words, partitionable=True), number)
    return found


def _uniform(words: Tensor, number: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return random.uniform(_key(words, number), tuple(shape), dtype)


def _normal(words: Tensor, number: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return random.normal(_key(words, number), tuple(shape), dtype)


def _bernoulli(words: Tensor, number: int, like: Tensor, p: Any = None, **_: Any) -> Tensor:
    real = torch.float64 if like.dtype is torch.float64 else torch.float32
    return (_uniform(words, number, like.shape, real) < (like if p is None else p)).to(like.dtype)


def _dropout(words: Tensor, number: int, x: Tensor, p: float, train: bool | None = True) -> tuple[Tensor, Tensor]:
    if not train or p == 0:
        return x, torch.ones_like(x, dtype=torch.bool)
    kept = _uniform(words, number, x.shape, torch.float32) < 1 - p
    return (x * kept / (1 - p) if p < 1 else torch.zeros_like(x)), kept


def _of_size(draw: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def drawn(words: Tensor, number: int, size: Sequence[int], dtype: torch.dtype | None = None, **_: Any) -> Tensor:
        return draw(words, number, size, dtype or torch.get_default_dtype())

    return drawn


def _like(draw: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def drawn(words: Tensor, number: int, like: Tensor, dtype: torch.dtype | None = None, **_: Any) -> Tensor:
        return draw(words, number, like.shape, dtype or like.dtype)

    return drawn


def _between(words: Tensor, number: int, like: Tensor, low: float = 0.0, high: float = 1.0, **_: Any) -> Tensor:
    return low + (high - low) * _uniform(words, number, like.shape, like.dtype)


def _gaussian(words: Tensor, number: int, like: Tensor, mean: float = 0.0, std: float = 1.0, **_: Any) -> Tensor:
    return mean + std * _normal(words, number, like.shape, like.dtype)


_DRAWS: dict[Any, Callable[..., Any]] = {
    _aten.bernoulli.p: _bernoulli,
    _aten.bernoulli.default: _bernoulli,
    _aten.native_dropout.default: _dropout,
    _aten.rand.default: _of_size(_uniform),
    _aten.randn.default: _of_size(_normal),
    _aten.rand_like.default: _like(_uniform),
    _aten.randn_like.default: _like(_normal),
    _aten.uniform.default: _between,
    _aten.normal_functional.default: _gaussian,
}
