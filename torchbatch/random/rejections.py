"""Draws that take as many tries as it needs: the gamma distribution, what is made of it, and the Poisson distribution."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from torchbatch._torch import draw_loops
from torchbatch.core.describe import describe, shown
from torchbatch.errors import AxisError, AxisSpecError, UnsupportedOperationError
from torchbatch.random import reuse
from torchbatch.random.continuous import exponential
from torchbatch.random.discrete import DTYPES, saturated, signs
from torchbatch.random.keys import Key, KeyLike, children, is_size, parts, shape_of, single
from torchbatch.random.uniforms import broadcast, float_dtype, parameter


def gamma(
    key: KeyLike, a: Any, shape: int | Sequence[int] | None = None, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """Numbers of the gamma distribution with scale 1.

    Shapes: ``[], [a] -> shape``.

    Args:
        key: a single key.
        a: the shape parameter, or a tensor of them.
        shape: the shape of the result; None is that of ``a``.
        dtype: a floating-point dtype; None is PyTorch's default.

    Returns:
        A tensor of ``shape``, through which gradients flow to ``a``. The tries are JAX's, and the numbers differ in the last
        digits.

    Raises:
        InputTypeError, AxisError: ``key`` is no single key, or ``a`` no number or does not fit ``shape``.
        AxisSpecError: ``dtype`` is no floating-point dtype.

    Example:
        >>> from torchbatch import random
        >>> random.gamma(random.key(0), 3.0, (3,))
        tensor([...])

    Source: ``jax.random.gamma``.
    """
    return _of_shape("gamma", single("gamma", key), a, shape, dtype, logarithm=False)


def loggamma(
    key: KeyLike, a: Any, shape: int | Sequence[int] | None = None, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """Logarithms of numbers of the gamma distribution, which for small ``a`` may be too small themselves.

    Shapes: ``[], [a] -> shape``.

    Args:
        key: a single key.
        a: as in :func:`gamma`.
        shape: as in :func:`gamma`.
        dtype: as in :func:`gamma`.

    Returns:
        A tensor of ``shape``.

    Raises:
        InputTypeError, AxisError, AxisSpecError: as in :func:`gamma`.

    Example:
        >>> from torchbatch import random
        >>> random.loggamma(random.key(0), 0.001).exp()
        tensor(0.)

    Source: ``jax.random.loggamma``.
    """
    return _of_shape("loggamma", single("loggamma", key), a, shape, dtype, logarithm=True)


def _of_shape(name: str, key: Key, a: Any, shape: Any, dtype: Any, logarithm: bool) -> torch.Tensor:
    dtype = float_dtype(name, dtype)
    alpha = parameter(name, "a", a, _wide(dtype), key.device)
    return gammas(key, alpha.expand(broadcast(name, shape, a=alpha)), logarithm).to(dtype)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which is drawn."""
    return dtype if dtype is torch.float64 else torch.float32


def gammas(key: Key, alpha: torch.Tensor, logarithm: bool) -> torch.Tensor:
    """Draws for a tensor of shape parameters, in float32 or float64."""
    keys = children(key, tuple(alpha.shape))
    drawn = draw_loops.call("gamma", keys.first, keys.second, alpha, logarithm, key.partitionable)
    result: torch.Tensor = _with_slope(alpha, drawn, logarithm)
    return result


class _WithSlope(torch.autograd.Function):
    """What was drawn, with its derivative by the shape parameter."""

    generate_vmap_rule = True

    @staticmethod
    def forward(alpha: torch.Tensor, drawn: torch.Tensor, logarithm: bool) -> torch.Tensor:
        """What was drawn."""
        return drawn.view_as(drawn)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Keep what the derivative is made of."""
        alpha, drawn, ctx.logarithm = inputs
        ctx.save_for_backward(alpha, drawn)
        ctx.save_for_forward(alpha, drawn)

    @staticmethod
    def backward(ctx: Any, cotangent: torch.Tensor) -> Any:
        """In reverse mode."""
        alpha, drawn = ctx.saved_tensors
        return cotangent * _slope(alpha, drawn, ctx.logarithm), None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Any, *_: Any) -> Any:
        """In forward mode."""
        alpha, drawn = ctx.saved_tensors
        return tangent * _slope(alpha, drawn, ctx.logarithm)


class _Once(torch.autograd.Function):
    """A derivative that cannot be differentiated by the shape parameter."""

    generate_vmap_rule = True

    @staticmethod
    def forward(alpha: torch.Tensor, slope: torch.Tensor) -> torch.Tensor:
        """The derivative."""
        return slope.view_as(slope)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Nothing is kept."""

    @staticmethod
    def backward(ctx: Any, cotangent: torch.Tensor) -> Any:
        """In reverse mode."""
        raise UnsupportedOperationError(_TWICE)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        """In forward mode."""
        raise UnsupportedOperationError(_TWICE)


_TWICE = (
    "gamma, and what is made of it (loggamma, beta, dirichlet, ball), can be differentiated once by its parameters; there is no "
    "rule for the second derivative. Draw outside of the function that is differentiated twice, or .detach() the parameter."
)
_with_slope: Callable[..., Any] = _WithSlope.apply
_once: Callable[..., Any] = _Once.apply


def _slope(alpha: torch.Tensor, drawn: torch.Tensor, logarithm: bool) -> torch.Tensor:
    """The derivative of a draw by the shape parameter."""
    sample = drawn.detach().exp().clamp(min=torch.finfo(drawn.dtype).tiny) if logarithm else drawn.detach()
    slope = draw_loops.call("gamma_slope", alpha, sample)
    slope = slope / sample if logarithm else slope
    found: torch.Tensor = _once(alpha, torch.where(slope.isfinite(), slope, 0))
    return found


def beta(
    key: KeyLike, a: Any, b: Any, shape: int | Sequence[int] | None = None, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """Numbers of the beta distribution.

    Shapes: ``[], [a], [a] -> shape``.

    Args:
        key: a single key.
        a: the first shape parameter, or a tensor of them.
        b: the second, likewise.
        shape: the shape of the result; None is that of ``a`` and ``b``, broadcast together.
        dtype: a floating-point dtype; None is PyTorch's default.

    Returns:
        A tensor of ``shape``, through which gradients flow to ``a`` and ``b``; equal to JAX's but for the last digits.

    Raises:
        InputTypeError, AxisError, AxisSpecError: as in :func:`gamma`.

    Example:
        >>> from torchbatch import random
        >>> random.beta(random.key(0), 2.0, 3.0).shape
        torch.Size([])

    Source: ``jax.random.beta``.
    """
    found = single("beta", key)
    dtype = float_dtype("beta", dtype)
    first, second = (parameter("beta", text, value, _wide(dtype), found.device) for text, value in (("a", a), ("b", b)))
    size = broadcast("beta", shape, a=first, b=second)
    halves = zip(parts(found, 2), (first, second), strict=True)
    logs = torch.stack([gammas(part, alpha.expand(size), logarithm=True) for part, alpha in halves])
    return torch.softmax(logs.double(), 0)[0].to(dtype)


def dirichlet(
    key: KeyLike, alpha: Any, shape: int | Sequence[int] | None = None, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """Vectors of the Dirichlet distribution, which are positive and add up to 1.

    Shapes: ``[], […, n] -> [*shape, n]``.

    Args:
        key: a single key.
        alpha: the vector of parameters, or a batch of them.
        shape: the batch axes of the result; None is those of ``alpha``.
        dtype: a floating-point dtype; None is PyTorch's default.

    Returns:
        A tensor of shape ``[*shape, n]``, through which gradients flow to ``alpha``; equal to JAX's but for the last digits.

    Raises:
        InputTypeError, AxisError, AxisSpecError: as in :func:`gamma`.

    Example:
        >>> import torch
        >>> from torchbatch import random
        >>> random.dirichlet(random.key(0), torch.ones(3)).sum()
        tensor(1...)

    Source: ``jax.random.dirichlet``.
    """
    found = single("dirichlet", key)
    dtype = float_dtype("dirichlet", dtype)
    given = parameter("dirichlet", "alpha", alpha, _wide(dtype), found.device)
    if not given.dim():
        raise AxisError(f"dirichlet: alpha must have an axis, the last one, for the components, but it is {describe(given)}.")
    size = (*broadcast("dirichlet", shape, {"alpha": given.shape[:-1]}, alpha=given), given.shape[-1])
    return torch.softmax(gammas(found, given.expand(size), logarithm=True).double(), -1).to(dtype)


def ball(
    key: KeyLike, d: int, p: float = 2, shape: int | Sequence[int] = (), dtype: torch.dtype | None = None
) -> torch.Tensor:
    """Points that are uniformly distributed in the unit ball of a p-norm.

    Shapes: ``[] -> [*shape, d]``.

    Args:
        key: a single key.
        d: the dimension of the ball.
        p: the exponent of the norm, or a tensor without dimensions.
        shape: the batch axes of the result.
        dtype: a floating-point dtype; None is PyTorch's default.

    Returns:
        A tensor of shape ``[*shape, d]``, equal to JAX's but for the last digits.

    Raises:
        InputTypeError, AxisError, AxisSpecError: as in :func:`uniform`.

    Example:
        >>> from torchbatch import random
        >>> random.ball(random.key(0), 3).norm() <= 1
        tensor(True)

    Source: ``jax.random.ball``.
    """
    found = single("ball", key)
    dtype = float_dtype("ball", dtype)
    wide = _wide(dtype)
    if not is_size(d):
        raise AxisSpecError(f"ball: d must be an int, but it is {shown(d)}.")
    (size,) = shape_of("ball", d, "d")
    batch = shape_of("ball", shape)
    power = parameter("ball", "p", p, wide, found.device)
    if power.dim():
        raise AxisError(f"ball: p must be one number, but it is {describe(power)}. Map over it with vmap.")
    for_points, for_radius = parts(found, 2)
    for_gamma, for_sign = parts(for_points, 2)
    alpha = (1 / power).expand((*batch, size))
    sizes = gammas(for_gamma, alpha, logarithm=False).double()  # the p-th powers of the coordinates
    radius = exponential(for_radius, batch, wide).double()
    inverse = 1 / power.double()
    points = signs(for_sign, (*batch, size), torch.float64) * sizes**inverse
    return (points / ((sizes.sum(-1) + radius) ** inverse).unsqueeze(-1)).to(dtype)


def poisson(
    key: KeyLike, lam: Any, shape: int | Sequence[int] | None = None, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """Numbers of the Poisson distribution.

    Shapes: ``[], [a] -> shape``.

    Args:
        key: a single key.
        lam: the rate, or a tensor of them.
        shape: the shape of the result; None is that of ``lam``.
        dtype: an integer dtype; None is torch.int64. A number that it does not hold becomes the largest that it does.

    Returns:
        A tensor of ``shape``. For rates of 10 and more, a number may differ from JAX's where the two compute the logarithm of
        the gamma function differently.

    Raises:
        InputTypeError, AxisError: ``key`` is no single key, or ``lam`` no number or does not fit ``shape``.
        AxisSpecError: ``dtype`` is no such dtype.

    Example:
        >>> from torchbatch import random
        >>> random.poisson(random.key(0), 4.0, (5,))
        tensor([...])

    Source: ``jax.random.poisson``.
    """
    found = single("poisson", key)
    dtype = torch.int64 if dtype is None else dtype
    if dtype not in DTYPES:
        raise AxisSpecError(f"poisson: dtype must be an integer dtype, but it is {shown(dtype)}.")
    rate = parameter("poisson", "lam", lam, torch.float32, found.device)
    size = broadcast("poisson", shape, lam=rate)
    flat = rate.expand(size).reshape(math.prod(size))
    reuse.use(found.first, found.second)
    drawn = draw_loops.call("poisson", found.first, found.second, flat, found.partitionable)
    return saturated(drawn.reshape(size), dtype)
