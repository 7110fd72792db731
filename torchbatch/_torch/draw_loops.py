"""Draws that reject and try again, as operators: how often is known only when they run, so no tracer can follow them.

Private names used, seen on torch 2.11, 2.13 and 2.15: ``torch._standard_gamma_grad`` and those of
:mod:`torchbatch._torch.batching` and :mod:`torchbatch._torch.draw_ops`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from torchbatch._torch import batching, draw_math, draw_ops

_library = torch.library.Library("torchbatch", "FRAGMENT")
_tags = (torch.Tag.pt2_compliant_tag,)
_library.define("gamma(Tensor key_a, Tensor key_b, Tensor alpha, bool logarithm, bool partitionable) -> Tensor", tags=_tags)
_library.define("gamma_slope(Tensor alpha, Tensor sample) -> Tensor", tags=_tags)
_library.define("poisson(Tensor key_a, Tensor key_b, Tensor rate, bool partitionable) -> Tensor", tags=_tags)
_SQUEEZE = 0.0331
fma = draw_math.OnTensors.fma
_ROOT = {torch.float32: draw_math.SQRT2, torch.float64: math.sqrt(2)}


class _Keys(NamedTuple):
    """Arrays of keys, of shape ``[k]``."""

    first: torch.Tensor
    second: torch.Tensor
    partitionable: bool

    def _hash(self, first: Sequence[int], second: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        counts = [torch.tensor([numbers], dtype=torch.int32, device=self.first.device) for numbers in (first, second)]
        return draw_ops.threefry2x32(self.first.unsqueeze(1), self.second.unsqueeze(1), *counts)

    def split(self, count: int) -> list[_Keys]:
        """Each key as several, in a list of arrays."""
        if self.partitionable:
            first, second = self._hash([0] * count, range(count))
        else:
            both = torch.cat(self._hash(range(count), range(count, 2 * count)), 1)
            first, second = both[:, 0::2], both[:, 1::2]
        return [_Keys(first[:, i], second[:, i], self.partitionable) for i in range(count)]

    def words(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The two words of each of the numbers that a draw of ``count`` 32-bit numbers is made of; ``[k, count]``."""
        if self.partitionable:
            return self._hash([0] * count, range(count))
        half = (count + 1) // 2
        both = torch.cat(self._hash(range(half), [i if i < count else 0 for i in range(half, 2 * half)]), 1)
        return both[:, :count], torch.zeros_like(both[:, :count])

    def uniform(self, count: int) -> torch.Tensor:
        """Numbers of float32 in ``[0, 1)``, of shape ``[k, count]``."""
        first, second = self.words(count)
        return (((first ^ second) >> 9) & (2**23 - 1)).float() * 2.0**-23

    def one_uniform(self, dtype: torch.dtype) -> torch.Tensor:
        """One number in ``[0, 1)`` for each key."""
        if dtype is torch.float32:
            return self.uniform(1)[:, 0]
        first, second = self._hash([0], [0 if self.partitionable else 1])
        whole = (first.long() << 32) | (second.long() & draw_math.WORD)
        return ((whole >> 12) & (2**52 - 1)).double()[:, 0] * 2.0**-52

    def one_normal(self, dtype: torch.dtype) -> torch.Tensor:
        """One normal number for each key."""
        low = -1 + torch.finfo(dtype).eps / 2
        u = (self.one_uniform(dtype) * 2 + low).clamp(min=low)
        return _step(u, "normal", _ROOT[dtype])

    def at(self, places: torch.Tensor) -> _Keys:
        """Some of the keys."""
        return _Keys(self.first[places], self.second[places], self.partitionable)

    def put(self, places: torch.Tensor, other: _Keys) -> None:
        """Replace some of the keys."""
        self.first[places], self.second[places] = other.first, other.second


def _step(x: torch.Tensor, name: str, *numbers: float) -> torch.Tensor:
    return draw_ops.draw(x, name, numbers) if x.dtype is torch.float32 else draw_ops.wide_draw(x, name, numbers)


def _log(x: torch.Tensor) -> torch.Tensor:
    return _step(x, "log")


# --- gamma, by the method of Marsaglia and Tsang (2000) --------------------------------------------------------------


def _gamma(
    key_a: torch.Tensor, key_b: torch.Tensor, alpha: torch.Tensor, logarithm: bool, partitionable: bool
) -> torch.Tensor:
    shape = torch.broadcast_shapes(key_a.shape, key_b.shape, alpha.shape)
    flat = [value.broadcast_to(shape).reshape(-1) for value in (key_a, key_b, alpha)]
    given = flat[2]
    large = given >= 1
    d = torch.where(large, given, given + 1) - 1 / 3
    keys, last = _Keys(flat[0], flat[1], partitionable).split(2)
    cube = _accepted(_Keys(keys.first.clone(), keys.second.clone(), partitionable), d)
    u = last.one_uniform(given.dtype)
    if logarithm:
        logs = _step(-u, "log1p")
        boost = torch.where(large | (logs == 0), 0, logs * (1 / given))
        return (_log(d) + _log(cube) + boost).reshape(shape)
    boost = torch.where(large, 1, (1 - u) ** (1 / given))
    return (d * cube * boost).reshape(shape)


def _accepted(keys: _Keys, d: torch.Tensor) -> torch.Tensor:
    """The cube that each key ends with; places that are done leave the loop."""
    c = (1 / 3) / d.double().sqrt().to(d.dtype)
    result = torch.ones_like(d)
    left = torch.arange(d.numel(), device=d.device)
    while left.numel():
        following, for_normal, for_uniform = keys.at(left).split(3)
        keys.put(left, following)
        x, v = _positive(for_normal, c[left])
        square, cube, u = x * x, v * v * v, for_uniform.one_uniform(d.dtype)
        result[left] = cube
        again = (u >= 1 - _SQUEEZE * (square * square)) & (_log(u) >= square * 0.5 + d[left] * ((1 - cube) + _log(cube)))
        left = left[again]
    return result


def _positive(keys: _Keys, c: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """For each key the first normal number x for which ``1 + c * x`` is positive, and that."""
    x, v = torch.zeros_like(c), torch.full_like(c, -1)
    keys = _Keys(keys.first.clone(), keys.second.clone(), keys.partitionable)
    left = torch.arange(c.numel(), device=c.device)
    while left.numel():
        following, subkeys = keys.at(left).split(2)
        keys.put(left, following)
        drawn = subkeys.one_normal(c.dtype)
        x[left], v[left] = drawn, 1 + drawn * c[left]
        left = left[v[left] <= 0]
    return x, v


def _gamma_slope(alpha: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
    alpha, sample = torch.broadcast_tensors(alpha, sample)
    return torch._standard_gamma_grad(alpha, sample)


# --- poisson, by Knuth's method, and for large rates by transformed rejection (Hörmann, 1993) ------------------------


def _poisson(key_a: torch.Tensor, key_b: torch.Tensor, rate: torch.Tensor, partitionable: bool) -> torch.Tensor:
    """Draws for keys of shape ``[…]`` at rates of shape ``[…, n]``, as int64."""
    keys = _Keys(key_a.reshape(-1), key_b.reshape(-1), partitionable)
    rates = rate.reshape(keys.first.numel(), rate.shape[-1])
    small = rates.isnan() | (rates < 10)
    drawn = torch.where(small, _by_knuth(keys, rates.where(small, 0)), _by_rejection(keys, rates.where(~small, 1e5)))
    return drawn.where(rates != 0, 0).reshape(rate.shape)


def _by_knuth(keys: _Keys, rate: torch.Tensor) -> torch.Tensor:
    count, product = torch.zeros_like(rate, dtype=torch.int64), torch.zeros_like(rate)
    while bool((product > -rate).any()):
        keys, subkeys = keys.split(2)
        count = count + (product > -rate)
        product = product + _log(subkeys.uniform(rate.shape[1]))
    return count - 1


def _log_factorial(k: torch.Tensor) -> torch.Tensor:
    """The logarithm of ``k!`` by the approximation of Lanczos (1964), with the rounding errors that XLA's has."""
    total = torch.full_like(k, _LANCZOS[0])
    for i, coefficient in enumerate(_LANCZOS[1:]):
        total = total + coefficient / (k + (i + 1))
    shifted = k + 7.5
    log_shifted = draw_ops.draw(k / 7.5, "log1p") + math.log(7.5)
    scaled = fma(k + 0.5 - shifted / log_shifted, log_shifted, torch.full_like(k, 0.5 * math.log(2 * math.pi)))
    return scaled + _log(total)


_LANCZOS = (
    0.99999999999980993, 676.520368121885098, -1259.13921672240287, 771.323428777653079, -176.615029162140599,
    12.5073432786869048, -0.138571095265720117, 9.98436957801957086e-6, 1.50563273514931156e-7,
)  # fmt: skip


def _by_rejection(keys: _Keys, rate: torch.Tensor) -> torch.Tensor:
    b = 0.931 + 2.53 * rate.double().sqrt().float()
    a = -0.059 + 0.02483 * b
    inverse, enough = 1.1239 + 1.1328 / (b - 3.4), 0.9277 - 3.6224 / (b - 2)
    result, accepted = torch.full_like(rate, -1), torch.zeros_like(rate, dtype=torch.bool)
    while not bool(accepted.all()):
        busy = ~accepted.all(1, keepdim=True)  # a key that has all of its numbers draws no more
        keys, for_u, for_v = keys.split(3)
        u, v = for_u.uniform(rate.shape[1]) - 0.5, for_v.uniform(rate.shape[1])
        near = 0.5 - u.abs()
        k = torch.floor(fma(2 * a / near + b, u, rate) + 0.43)
        s = _log(v * inverse / (a / (near * near) + b))
        t = fma(k, _log(rate), -rate) - _log_factorial(k)
        accept = ((near >= 0.07) & (v <= enough)) | (~((k < 0) | ((near < 0.013) & (v > near))) & (s <= t))
        result = k.where(busy & accept, result)
        accepted = accepted | (busy & accept)
    return result.nan_to_num(0, posinf=2.0**62).long()


# --- operators -------------------------------------------------------------------------------------------------------


def _batched(name: str, count: int) -> Any:
    """The batching rule: the first ``count`` arguments with the samples in front."""

    def kernel(*args: Any) -> Any:
        level = batching.current_level()
        opened = [batching.opened(value, level) for value in args[:count]]
        sizes = [item.value.shape[item.axis] for item in opened if item.axis is not None]
        with batching.below():
            if not sizes:
                return getattr(torch.ops.torchbatch, name).default(*args)
            values = [item.value.expand(sizes[0], *item.value.shape) if item.axis is None else item.front() for item in opened]
            result = getattr(torch.ops.torchbatch, name).default(*values, *args[count:])
        return batching.wrapped(result, level)

    return kernel


def _like_gamma(key_a: torch.Tensor, key_b: torch.Tensor, alpha: torch.Tensor, *_: bool) -> torch.Tensor:
    return alpha.new_empty(torch.broadcast_shapes(key_a.shape, key_b.shape, alpha.shape))


def _like_slope(alpha: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
    return alpha.new_empty(torch.broadcast_shapes(alpha.shape, sample.shape))


def _like_poisson(key_a: torch.Tensor, key_b: torch.Tensor, rate: torch.Tensor, partitionable: bool) -> torch.Tensor:
    return rate.new_empty(rate.shape, dtype=torch.int64)


_OPERATORS: dict[str, tuple[Any, Any, int]] = {
    "gamma": (_gamma, _like_gamma, 3),
    "gamma_slope": (_gamma_slope, _like_slope, 2),
    "poisson": (_poisson, _like_poisson, 3),
}
for _name, (_run, _like, _count) in _OPERATORS.items():
    for _kernel, _key in ((_run, "CompositeExplicitAutograd"), (_like, "Meta"), (_batched(_name, _count), batching.NAME)):
        _library.impl(_name, _kernel, _key)


def call(name: str, *args: Any) -> torch.Tensor:
    """``gamma``, ``gamma_slope`` or ``poisson``; no gradient flows through them."""
    args = tuple([value.detach() if isinstance(value, torch.Tensor) else value for value in args])
    if draw_ops.is_plain() and args[0].device.type != "meta":
        return _OPERATORS[name][0](*args)
    result: torch.Tensor = getattr(torch.ops.torchbatch, name).default(*args)
    return result
