"""Draws that are a function of one uniform number."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from torchbatch.core.describe import describe, shown
from torchbatch.errors import AxisError, AxisSpecError
from torchbatch.random.keys import Key, KeyLike, parts, shape_of, single
from torchbatch.random.uniforms import as_held, between, broadcast, float_dtype, fused, parameter, step, unit

_COMPLEX = {torch.complex64: torch.float32, torch.complex128: torch.float64}


def normal(key: KeyLike, shape: Sequence[int] = (), dtype: torch.dtype | None = None) -> torch.Tensor:
    """Numbers of the standard normal distribution.

    Shapes: ``[] -> shape``.

    Args:
        key: a single key.
        shape: the shape of the result.
        dtype: a floating-point or complex dtype; None is PyTorch's default.

    Returns:
        A tensor of ``shape``.

    Raises:
        InputTypeError, AxisError: ``key`` is no single key.
        AxisSpecError: ``shape`` is no tuple of ints, or ``dtype`` no such dtype.

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


def exponential(key: KeyLike, shape: Sequence[int] = (), dtype: torch.dtype | None = None) -> torch.Tensor:
    """Numbers of the exponential distribution with rate 1.

    Shapes: ``[] -> shape``.

    Args:
        key: a single key.
        shape: the shape of the result.
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


def laplace(key: KeyLike, shape: Sequence[int] = (), dtype: torch.dtype | None = None) -> torch.Tensor:
    """Numbers of the Laplace distribution with scale 1.

    Shapes: ``[] -> shape``.

    Args:
        key: a single key.
        shape: the shape of the result.
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


def logistic(key: KeyLike, shape: Sequence[int] = (), dtype: torch.dtype | None = None) -> torch.Tensor:
    """Numbers of the logistic distribution.

    Shapes: ``[] -> shape``.

    Args:
        key: a single key.
        shape: the shape of the result.
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


def cauchy(key: KeyLike, shape: Sequence[int] = (), dtype: torch.dtype | None = None) -> torch.Tensor:
    """Numbers of the Cauchy distribution.

    Shapes: ``[] -> shape``.

    Args:
        key: a single key.
        shape: the shape of the result.
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
    key: KeyLike, shape: Sequence[int] = (), dtype: torch.dtype | None = None, mode: str | None = None
) -> torch.Tensor:
    """Numbers of the standard Gumbel distribution.

    Shapes: ``[] -> shape``.

    Args:
        key: a single key.
        shape: the shape of the result.
        dtype: a floating-point dtype; None is PyTorch's default.
        mode: ``"low"`` (None is the same) draws one uniform number for each, ``"high"`` two, for rare large numbers.

    Returns:
        A tensor of ``shape``.

    Raises:
        InputTypeError, AxisError, AxisSpecError: as in :func:`uniform`, or there is no such mode.

    Example:
        >>> from torchbatch import random
        >>> random.gumbel(random.key(0), (3,))
        tensor([ 2.9234,  3.8326, -0.0969])

    Source: ``jax.random.gumbel``, but for its mode ``"highest"``.
    """
    found = single("gumbel", key)
    return gumbels("gumbel", found, shape_of("gumbel", shape), float_dtype("gumbel", dtype), mode)


def gumbels(name: str, key: Key, shape: Sequence[int], dtype: torch.dtype, mode: str | None) -> torch.Tensor:
    """The same for a key that is known to be one."""
    if mode not in (None, "low", "high"):
        raise AxisSpecError(f"{name}: mode must be 'low', 'high' or None, but it is {shown(mode)}.")
    info = torch.finfo(dtype)
    if mode == "high":
        high, low = unit(key, (2, *shape), dtype)
        u = torch.where(high >= 0.5, high, high + info.eps * low + info.tiny)
        return step(u, "gumbel_high")
    return step(unit(key, shape, dtype).clamp(min=info.tiny), "gumbel")


# --- the truncated normal distribution -------------------------------------------------------------------------------


def truncated_normal(
    key: KeyLike, lower: Any, upper: Any, shape: Sequence[int] | None = None, dtype: torch.dtype | None = None
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
    root, part = as_held(math.sqrt(2), dtype), as_held(1 / as_held(math.sqrt(2), dtype), dtype)
    a, b = _smooth(low * part, "erf"), _smooth(high * part, "erf")
    u = torch.maximum(a, fused(unit(found, size, dtype), b - a, a))
    bounds = (torch.nextafter(value.detach(), torch.full_like(value, end)) for value, end in ((low, math.inf), (high, -math.inf)))
    return torch.minimum(torch.maximum(root * _smooth(u, "erf_inv"), next(bounds)), next(bounds))


def _smooth(x: torch.Tensor, name: str) -> torch.Tensor:
    """The error function or its inverse, with a derivative."""
    value = step(x.detach(), name)
    argument = x.detach() if name == "erf" else value
    bell = 2 / math.sqrt(math.pi) * torch.exp(-(argument.double() ** 2))
    slope = bell if name == "erf" else 1 / bell
    slope = torch.where(slope.isfinite(), slope, 0).to(x.dtype)
    zero = torch.where(x.isfinite(), x - x.detach(), 0)  # which has the derivative
    return value + zero * slope


def multivariate_normal(
    key: KeyLike,
    mean: Any,
    cov: Any,
    shape: Sequence[int] | None = None,
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
    return broadcast("multivariate_normal", shape, mean=mean.sum(-1), cov=cov.sum((-2, -1)))


def _eigen_root(cov: torch.Tensor) -> torch.Tensor:
    values, vectors = torch.linalg.eigh(cov)
    root: torch.Tensor = vectors * values.sqrt().unsqueeze(-2)
    return root


def _singular_root(cov: torch.Tensor) -> torch.Tensor:
    vectors, values, _ = torch.linalg.svd(cov)
    root: torch.Tensor = vectors * values.sqrt().unsqueeze(-2)
    return root


_ROOTS = {"cholesky": torch.linalg.cholesky, "eigh": _eigen_root, "svd": _singular_root}
