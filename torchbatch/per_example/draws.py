"""Random draws of a module, each from the key of its example: the same whatever the batch, the chunk and the compiler."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from torchbatch import random
from torchbatch._torch.staged import is_staging
from torchbatch.errors import RandomnessError

_aten = torch.ops.aten
_GENERATOR = (
    "per_example: the model hands {} a generator, which knows no examples. Leave it out, so that torch.manual_seed decides, or "
    "draw from a key that is part of the batch (torchbatch.random)."
)


def from_key(operator: Any) -> Callable[..., Any]:
    """What draws from a key in the place of an operator.

    Raises:
        RandomnessError: there is nothing.
    """
    found = _DRAWS.get(operator)
    name = str(getattr(operator, "__name__", operator)).partition(".")[0]
    if str(operator).endswith("generator"):
        raise RandomnessError(_GENERATOR.format(name))
    if found is None:
        raise RandomnessError(
            f"per_example: the model draws random numbers with {name}, for which there is no draw of each example's own. Draw "
            f"from a key that is part of the batch (torchbatch.random), or put the module that draws into eval mode."
        )

    def drawn(words: Tensor, number: int, *args: Any, generator: torch.Generator | None = None, **kwargs: Any) -> Any:
        if generator is not None:
            raise RandomnessError(_GENERATOR.format(name))
        return found(words, number, *args, **kwargs)

    return drawn


def seed() -> Tensor:
    """Two words that PyTorch's generator would draw next, so that ``torch.manual_seed`` decides; it is not moved on."""
    ahead = torch.Generator()
    ahead.set_state(torch.default_generator.get_state())
    return _words(ahead)


def traced() -> Tensor:
    """Two words for an outer trace, which draws them when it runs; zeros where nothing traces."""
    return _words(None) if is_staging() else torch.zeros(2, dtype=torch.int32)


def move_on() -> None:
    """Draw from PyTorch's generator what :func:`seed` saw."""
    _words(torch.default_generator)


def _words(generator: torch.Generator | None) -> Tensor:
    """Two words that a generator draws."""
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


def _exponential(words: Tensor, number: int, like: Tensor, lambd: float = 1.0) -> Tensor:
    return random.exponential(_key(words, number), tuple(like.shape), like.dtype) / lambd


def _log_normal(words: Tensor, number: int, like: Tensor, mean: float = 1.0, std: float = 2.0) -> Tensor:
    return _gaussian(words, number, like, mean, std).exp()


def _cauchy(words: Tensor, number: int, like: Tensor, median: float = 0.0, sigma: float = 1.0) -> Tensor:
    return median + sigma * random.cauchy(_key(words, number), tuple(like.shape), like.dtype)


def _geometric(words: Tensor, number: int, like: Tensor, p: float) -> Tensor:
    return torch.floor(torch.log1p(-_uniform(words, number, like.shape, like.dtype)) / math.log1p(-p)) + 1


def _about(words: Tensor, number: int, mean: Any, std: Any = 1.0, size: Sequence[int] = (), **_: Any) -> Tensor:
    """``torch.normal`` of numbers and tensors."""
    given = [value for value in (mean, std) if isinstance(value, Tensor)]
    dtype = given[0].dtype if given else torch.get_default_dtype()
    shape = (given[0] + given[-1]).shape if given else size
    found: Tensor = mean + std * _normal(words, number, shape, dtype)
    return found


def _integers(words: Tensor, number: int, *given: Any, dtype: torch.dtype | None = None, **_: Any) -> Tensor:
    low, high, size = given if len(given) == 3 else (0, *given)
    found: Tensor = random.randint(_key(words, number), tuple(size), low, high)
    return found.to(dtype or torch.int64)


def _integers_like(words: Tensor, number: int, like: Tensor, *bounds: int, dtype: torch.dtype | None = None, **_: Any) -> Tensor:
    low, high = bounds if len(bounds) == 2 else (0, bounds[0])
    return _integers(words, number, low, high, like.shape, dtype=dtype or like.dtype)


def _order(words: Tensor, number: int, count: int, dtype: torch.dtype | None = None, **_: Any) -> Tensor:
    found: Tensor = random.permutation(_key(words, number), torch.arange(count, device=words.device))
    return found.to(dtype or torch.int64)


def _categories(words: Tensor, number: int, weights: Tensor, count: int, replacement: bool = False) -> Tensor:
    shape = (count, *weights.shape[:-1])
    found: Tensor = random.categorical(_key(words, number), weights.log(), shape=shape, replace=replacement)
    return found.movedim(0, -1).to(torch.int64)


def _leaky(
    words: Tensor, number: int, x: Tensor, noise: Tensor, low: float = 0.125, high: float = 1 / 3, train: bool = False
) -> tuple[Tensor, Tensor]:
    """``rrelu``, and by what each number was multiplied."""
    if not train:
        return torch.where(x > 0, x, x * ((low + high) / 2)), noise
    slopes = torch.where(x > 0, torch.ones_like(x), _between(words, number, x, low, high))
    return x * slopes, slopes


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
    _aten.bernoulli.Tensor: _bernoulli,
    _aten.exponential.default: _exponential,
    _aten.log_normal.default: _log_normal,
    _aten.cauchy.default: _cauchy,
    _aten.geometric.default: _geometric,
    _aten.normal.float_float: _about,
    _aten.normal.Tensor_float: _about,
    _aten.normal.float_Tensor: _about,
    _aten.normal.Tensor_Tensor: _about,
    _aten.randint.default: _integers,
    _aten.randint.low: _integers,
    _aten.randint_like.default: _integers_like,
    _aten.randint_like.low_dtype: _integers_like,
    _aten.randperm.default: _order,
    _aten.multinomial.default: _categories,
}
_DRAWS.update({getattr(_aten, name).default: _leaky for name in ("rrelu_with_noise_functional",) if hasattr(_aten, name)})
