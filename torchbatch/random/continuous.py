"""Draws that are a function of one uniform number."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from torchbatch._torch import draw_ops
from torchbatch._torch.draw_math import WORD
from torchbatch.core.describe import describe, shown
from torchbatch.errors import AxisError, AxisSpecError
from torchbatch.random.keys import Key, KeyLike, parts, shape_of, single
from torchbatch.random.uniforms import as_held, between, broadcast, float_dtype, parameter, rounded, spread, step, unit
from torchbatch.random.words import integers

_COMPLEX = {torch.complex64: torch.float32, torch.complex128: torch.float64}


def normal(key: KeyLike, shape: int | Sequence[int] = (), dtype: torch.dtype | None = None) -> torch.Tensor:
    """Numbers of the standard normal distribution.

    Shapes: ``[] -> shape``.

    Args:
        key: a single key.
        shape: the shape of the result; an int is the size of a vector.
        dtype: a floating-point or complex dtype; None is PyTorch's default.

    Returns:
        A tensor of ``shape``.

    Raises:
        InputTypeError, AxisError: ``key`` is no single key.
        AxisSpecError: ``shape`` is neither an int nor a tuple of ints, or ``dtype`` no such dtype.

    Example:
        >>> from torchbatch import random
        >>> random.normal(random.key(0), (3,))
        tensor([ 1.6226,  2.0253, -0.4336])

    Source: ``jax.random.normal``.
    """
    found = single("normal", key)
    size = shape_of("normal", shape)
    if dtype in _COMPLEX:
        real, imaginary = (normals(part, size, _COMPLEX[dtype]) for part in parts(found, 2))
        return torch.complex(real, imaginary) / math.sqrt(2)
    return normals(found, size, float_dtype("normal", dtype))


def normals(key: Key, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """The same for a key that is known to be one, and a dtype that is real."""
    low = as_held(-1 + torch.finfo(dtype).eps / 2, dtype)
    u = between(key, shape, dtype, low, 1.0)
    return step(u, "normal", math.sqrt(2))


def _drawn(name: str, key: Any, shape: Any, dtype: Any, low: float, shift: float, *numbers: float) -> torch.Tensor:
    """The draw that a step makes of uniform numbers from ``low + shift * epsilon`` to 1."""
    found = single(name, key)
    dtype = float_dtype(name, dtype)
    u = between(found, shape_of(name, shape), dtype, low + shift * torch.finfo(dtype).eps, 1.0)
    return step(u, name, *numbers)


def exponential(key: KeyLike, shape: int | Sequence[int] = (), dtype: torch.dtype | None = None) -> torch.Tensor:
    """Numbers of the exponential distribution with rate 1.

    Shapes: ``[] -> shape``.

    Args:
        key: a single key.
        shape: the shape of the result; an int is the size of a vector.
        dtype: a floating-point dtype; None is PyTorch's default.

    Returns:
        A tensor of ``shape``.

    Raises:
        InputTypeError, AxisError, AxisSpecError: as in :func:`uniform`.

    Example:
        >>> from torchbatch import random
        >>> random.exponential(random.key(0), (3,))
        tensor([2.9501, 3.8434, 0.4039])

    Source: ``jax.random.exponential``.
    """
    return _drawn("exponential", key, shape, dtype, 0.0, 0.0)


def laplace(key: KeyLike, shape: int | Sequence[int] = (), dtype: torch.dtype | None = None) -> torch.Tensor:
    """Numbers of the Laplace distribution with scale 1.

    Shapes: ``[] -> shape``.

    Args:
        key: a single key.
        shape: the shape of the result; an int is the size of a vector.
        dtype: a floating-point dtype; None is PyTorch's default.

    Returns:
        A tensor of ``shape``.

    Raises:
        InputTypeError, AxisError, AxisSpecError: as in :func:`uniform`.

    Example:
        >>> from torchbatch import random
        >>> random.laplace(random.key(0), (3,))
        tensor([-2.2570, -3.1503,  0.4086])

    Source: ``jax.random.laplace``.
    """
    return _drawn("laplace", key, shape, dtype, -1.0, 0.5)


def logistic(key: KeyLike, shape: int | Sequence[int] = (), dtype: torch.dtype | None = None) -> torch.Tensor:
    """Numbers of the logistic distribution.

    Shapes: ``[] -> shape``.

    Args:
        key: a single key.
        shape: the shape of the result; an int is the size of a vector.
        dtype: a floating-point dtype; None is PyTorch's default.

    Returns:
        A tensor of ``shape``.

    Raises:
        InputTypeError, AxisError, AxisSpecError: as in :func:`uniform`.

    Example:
        >>> from torchbatch import random
        >>> random.logistic(random.key(0), (3,))
        tensor([ 2.8964,  3.8218, -0.6978])

    Source: ``jax.random.logistic``.
    """
    found = single("logistic", key)
    dtype = float_dtype("logistic", dtype)
    u = unit(found, shape_of("logistic", shape), dtype).clamp(min=torch.finfo(dtype).tiny)
    return step(u, "logistic")


def cauchy(key: KeyLike, shape: int | Sequence[int] = (), dtype: torch.dtype | None = None) -> torch.Tensor:
    """Numbers of the Cauchy distribution.

    Shapes: ``[] -> shape``.

    Args:
        key: a single key.
        shape: the shape of the result; an int is the size of a vector.
        dtype: a floating-point dtype; None is PyTorch's default.

    Returns:
        A tensor of ``shape``. In float32 the last digit may differ from JAX's.

    Raises:
        InputTypeError, AxisError, AxisSpecError: as in :func:`uniform`.

    Example:
        >>> from torchbatch import random
        >>> random.cauchy(random.key(0), (3,))
        tensor([ 6.0275, 14.8379, -0.5817])

    Source: ``jax.random.cauchy``.
    """
    return _drawn("cauchy", key, shape, dtype, 0.0, 1.0, math.pi)


def gumbel(
    key: KeyLike, shape: int | Sequence[int] = (), dtype: torch.dtype | None = None, mode: str | None = None
) -> torch.Tensor:
    """Numbers of the standard Gumbel distribution.

    Shapes: ``[] -> shape``.

    Args:
        key: a single key.
        shape: the shape of the result; an int is the size of a vector.
        dtype: a floating-point dtype; None is PyTorch's default.
        mode: ``"low"`` (None is the same) draws one uniform number for each, ``"high"`` two, for rare large numbers;
            ``"highest"`` makes one uniform number of 64 bits for each number of float32, and is ``"high"`` for other dtypes.

    Returns:
        A tensor of ``shape``.

    Raises:
        InputTypeError, AxisError, AxisSpecError: as in :func:`uniform`, or there is no such mode.

    Example:
        >>> from torchbatch import random
        >>> random.gumbel(random.key(0), (3,))
        tensor([ 2.9234,  3.8326, -0.0969])

    Source: ``jax.random.gumbel``.
    """
    found = single("gumbel", key)
    return gumbels("gumbel", found, shape_of("gumbel", shape), float_dtype("gumbel", dtype), mode)


def gumbels(name: str, key: Key, shape: Sequence[int], dtype: torch.dtype, mode: str | None) -> torch.Tensor:
    """The same for a key that is known to be one."""
    if mode not in (None, "low", "high", "highest"):
        raise AxisSpecError(f"{name}: mode must be 'low', 'high', 'highest' or None, but it is {shown(mode)}.")
    info = torch.finfo(dtype)
    if mode == "highest" and dtype is torch.float32:
        return _gumbels_of_64_bits(key, shape)
    if mode in ("high", "highest"):
        high, low = unit(key, (2, *shape), dtype)
        u = torch.where(high >= 0.5, high, high + info.eps * low + info.tiny)
        return step(u, "gumbel_high")
    return step(unit(key, shape, dtype).clamp(min=info.tiny), "gumbel")


def _gumbels_of_64_bits(key: Key, shape: Sequence[int]) -> torch.Tensor:
    """Draws of float32 made of a fraction of 64 bits; one above 1/2 is handled as what is missing to 1."""
    first, second = integers(key, (2, *shape), 32).long()
    drawn = first << 32 | (second & WORD)
    size = torch.where(drawn >= 0, drawn, -drawn)
    high, low = (size >> 32) & WORD, size & WORD
    low = torch.where(high >= 2**24, 0, torch.where(high > 0, low & ~7, low))  # 53 digits, of which 24 count
    digits = draw_ops.same_bits(high.double() * 2.0**32 + low.double(), torch.int64) & ~(2**29 - 1)
    u = torch.where(size == 0, 0.5, draw_ops.same_bits(digits, torch.float64)).float() * 2.0**-64
    return torch.where(drawn >= 0, step(u, "gumbel_high"), step(u, "gumbel"))


# --- the truncated normal distribution -------------------------------------------------------------------------------


def truncated_normal(
    key: KeyLike, lower: Any, upper: Any, shape: int | Sequence[int] | None = None, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """Numbers of the standard normal distribution, given that they lie between two bounds.

    Shapes: ``[], [a], [a] -> shape``.

    Args:
        key: a single key.
        lower: the lower bound, or a tensor of them.
        upper: the upper bound, likewise.
        shape: the shape of the result; None is that of the bounds, broadcast together.
        dtype: a floating-point dtype; None is PyTorch's default.

    Returns:
        A tensor of ``shape``, through which gradients flow to the bounds.

    Raises:
        InputTypeError, AxisError, AxisSpecError: as in :func:`uniform`.

    Example:
        >>> from torchbatch import random
        >>> random.truncated_normal(random.key(0), -2, 2, (3,))
        tensor([ 1.4560,  1.7147, -0.4127])

    Source: ``jax.random.truncated_normal``.
    """
    found = single("truncated_normal", key)
    dtype = float_dtype("truncated_normal", dtype)
    low, high = (
        parameter("truncated_normal", text, value, dtype, found.device) for text, value in (("lower", lower), ("upper", upper))
    )
    size = broadcast("truncated_normal", shape, lower=low, upper=high)
    root = as_held(math.sqrt(2), dtype)
    part = 1 / root if dtype is torch.bfloat16 else as_held(1 / root, dtype)
    a, b = (_smooth(_scaled(bound, part), "erf") for bound in (low, high))
    u = spread(unit(found, size, dtype), a, b)
    inverse = step if isinstance(lower, int | float) and isinstance(upper, int | float) else _smooth
    least, most = _above(low.detach()), -_above(-high.detach())
    return torch.minimum(torch.maximum(root * inverse(u, "erf_inv"), least), most)


def _above(x: torch.Tensor) -> torch.Tensor:
    """The next larger number of the dtype. The compiler takes that of float32 for half precision."""
    if x.dtype in (torch.float32, torch.float64):
        return torch.nextafter(x, torch.full_like(x, math.inf))
    bits = draw_ops.same_bits(x, torch.int16)
    above = torch.where(x > 0, bits + 1, torch.where(x < 0, bits - 1, 1)).to(torch.int16)
    return torch.where(x < math.inf, draw_ops.same_bits(above, x.dtype), x)


def _scaled(x: torch.Tensor, factor: float) -> torch.Tensor:
    """A product, of half precision too rounded once, in the compiler as elsewhere."""
    return x * factor if x.dtype in (torch.float32, torch.float64) else rounded(x.float() * factor, x.dtype).to(x.dtype)


def _smooth(x: torch.Tensor, name: str) -> torch.Tensor:
    """The error function or its inverse, with the derivatives, of any order, of PyTorch's own."""
    inside = torch.where(x.isfinite() if name == "erf" else x.abs() < 1, x, 0).double()
    exact = torch.erf(inside) if name == "erf" else torch.erfinv(inside)
    return step(x.detach(), name) + (exact - exact.detach()).to(x.dtype)  # the second term is zero


def multivariate_normal(
    key: KeyLike,
    mean: Any,
    cov: Any,
    shape: int | Sequence[int] | None = None,
    dtype: torch.dtype | None = None,
    method: str = "cholesky",
) -> torch.Tensor:
    """Vectors of a normal distribution.

    Shapes: ``[], […, n], […, n, n] -> […, n]``.

    Args:
        key: a single key.
        mean: the mean, or a batch of them.
        cov: the covariance matrix, or a batch of them.
        shape: the batch axes of the result; None is those of ``mean`` and ``cov``, broadcast together.
        dtype: a floating-point dtype; None is that of ``mean`` and ``cov``.
        method: how a root of ``cov`` is found: ``"cholesky"``, ``"eigh"`` or ``"svd"``.

    Returns:
        A tensor of shape ``[*shape, n]``, equal to JAX's but for the last digits of the root and of the sums.

    Raises:
        InputTypeError, AxisError: ``key`` is no single key, or the shapes do not fit.
        AxisSpecError: there is no such method.
        torch.linalg.LinAlgError: ``cov`` is not positive definite, by ``"cholesky"``; the other methods take a singular one.

    Example:
        >>> import torch
        >>> from torchbatch import random
        >>> random.multivariate_normal(random.key(0), torch.zeros(2), torch.eye(2))
        tensor([1.6226, 2.0253])

    Source: ``jax.random.multivariate_normal``.
    """
    found = single("multivariate_normal", key)
    if method not in _ROOTS:
        raise AxisSpecError(f"multivariate_normal: method must be 'cholesky', 'eigh' or 'svd', but it is {shown(method)}.")
    kinds = [value.dtype for value in (mean, cov) if isinstance(value, torch.Tensor) and value.is_floating_point()]
    common = kinds[0] if kinds else torch.get_default_dtype()
    for kind in kinds:
        common = torch.promote_types(common, kind)
    dtype = float_dtype("multivariate_normal", common if dtype is None else dtype)
    center, spread = (
        parameter("multivariate_normal", text, value, common, found.device) for text, value in (("mean", mean), ("cov", cov))
    )
    size = _check_moments(center, spread, shape)
    noise = normals(found, (*size, center.shape[-1]), dtype)
    wide = _ROOTS[method](spread).double() @ noise.double().unsqueeze(-1)  # so that the order of sums hardly matters
    result: torch.Tensor = (center.double() + wide.squeeze(-1)).to(torch.promote_types(common, dtype))
    return result


def _check_moments(mean: torch.Tensor, cov: torch.Tensor, shape: Any) -> tuple[int, ...]:
    count = mean.shape[-1] if mean.dim() else None
    if count is None or cov.dim() < 2 or tuple(cov.shape[-2:]) != (count, count):
        raise AxisError(
            f"multivariate_normal: mean must be of shape [..., n] and cov of shape [..., n, n], but mean is {describe(mean)} and "
            f"cov is {describe(cov)}."
        )
    return broadcast("multivariate_normal", shape, {"mean": mean.shape[:-1], "cov": cov.shape[:-2]}, mean=mean, cov=cov)


def _root(values: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
    return vectors * values.sqrt().unsqueeze(-2)


_ROOTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "cholesky": torch.linalg.cholesky,
    "eigh": lambda cov: _root(*torch.linalg.eigh(cov)),
    "svd": lambda cov: _root(*torch.linalg.svd(cov)[1::-1]),
}
