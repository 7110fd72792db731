"""Jacobians and Hessians: ``jacfwd``, ``jacrev``, ``hessian``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import Any

import torch

from torchbatch.core import argnums as positional
from torchbatch.core import tree
from torchbatch.core.argnums import Split
from torchbatch.core.derivative import Outputs, Primals, Pullback, forward, reverse
from torchbatch.core.dtypes import (
    check_forward_inputs,
    check_forward_outputs,
    check_reverse_inputs,
    check_reverse_outputs,
)
from torchbatch.core.wrapper import Wrapper
from torchbatch.errors import GradientValueError

__all__ = ["hessian", "jacfwd", "jacrev"]

vectorize = torch.func.vmap


def jacfwd(
    fun: Callable[..., Any], argnums: int | Sequence[int] = 0, has_aux: bool = False, holomorphic: bool = False
) -> Callable[..., Any]:
    """Make a function that computes the Jacobian of ``fun`` column by column, in forward mode.

    Cheaper than :func:`jacrev` where the inputs are fewer numbers than the outputs.

    Shapes: if ``fun`` takes ``[a]`` to ``[b]``, ``jacfwd(fun)`` takes ``[a]`` to ``[b, a]``.

    Args:
        fun: takes tensors, NumPy arrays, numbers or trees of them in the arguments ``argnums``, and anything in the
            others; returns such a tree.
        argnums: which positional arguments to differentiate by: an int (negative ones count from the end), or several.
        has_aux: ``fun`` returns ``(output, aux)``, and only ``output`` is differentiated.
        holomorphic: ``fun`` is holomorphic: its inputs and outputs are complex.

    Returns:
        A function with the arguments of ``fun`` that returns the Jacobian (or ``(jacobian, aux)``): the tree of the
        output, at each leaf of which is the tree of the argument (a tuple of them if ``argnums`` is a sequence), with
        tensors of shape ``output.shape + input.shape``.

    Raises:
        GradientTypeError: an input or output has a dtype or type that cannot be differentiated.
        GradientValueError: ``argnums`` is empty, has a repetition or is out of range, or there is no array to
            differentiate by.

    Example:
        >>> import torch, torchbatch
        >>> torchbatch.jacfwd(lambda x: x**2)(torch.tensor([1.0, 2.0]))
        tensor([[2., 0.],
                [0., 4.]])

    Source: ``jax.jacfwd``.
    """
    positional.check_callable(fun, "jacfwd")
    return JacFwd(fun, positional.parse(argnums, "jacfwd"), has_aux, holomorphic)


def jacrev(
    fun: Callable[..., Any],
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    holomorphic: bool = False,
    allow_int: bool = False,
) -> Callable[..., Any]:
    """Make a function that computes the Jacobian of ``fun`` row by row, in reverse mode.

    Cheaper than :func:`jacfwd` where the outputs are fewer numbers than the inputs.

    Shapes: if ``fun`` takes ``[a]`` to ``[b]``, ``jacrev(fun)`` takes ``[a]`` to ``[b, a]``.

    Args:
        fun, argnums, has_aux, holomorphic: as for :func:`jacfwd`.
        allow_int: accept integers and bools in ``argnums``; their Jacobians are zeros of their dtype.

    Returns:
        As :func:`jacfwd`. For complex inputs of a function with real outputs, each entry is ``d/dx - i d/dy``.

    Raises:
        GradientTypeError, GradientValueError: as for :func:`jacfwd`.

    Example:
        >>> import torch, torchbatch
        >>> torchbatch.jacrev(lambda p: {"sum": p["x"] + p["y"]})({"x": torch.tensor(1.0), "y": torch.tensor(2.0)})
        {'sum': {'x': tensor(1.), 'y': tensor(1.)}}

    Source: ``jax.jacrev``.
    """
    positional.check_callable(fun, "jacrev")
    return JacRev(fun, positional.parse(argnums, "jacrev"), has_aux, holomorphic, allow_int)


def hessian(
    fun: Callable[..., Any], argnums: int | Sequence[int] = 0, has_aux: bool = False, holomorphic: bool = False
) -> Callable[..., Any]:
    """Make a function that computes the second derivatives of ``fun``: ``jacfwd(jacrev(fun))``.

    Shapes: if ``fun`` takes ``[a]`` to ``[]``, ``hessian(fun)`` takes ``[a]`` to ``[a, a]``.

    Args:
        fun, argnums, has_aux, holomorphic: as for :func:`jacfwd`.

    Returns:
        A function with the arguments of ``fun`` that returns the Hessian (or ``(hessian, aux)``): the tree of the
        output, at each leaf of which is the tree of the argument, at each leaf of which is that tree again, with tensors
        of shape ``output.shape + input1.shape + input2.shape``.

    Raises:
        GradientTypeError, GradientValueError: as for :func:`jacfwd`.

    Example:
        >>> import torch, torchbatch
        >>> torchbatch.hessian(lambda x: x[0] ** 3 - 2 * x[0] * x[1])(torch.tensor([1.0, 2.0]))
        tensor([[ 6., -2.],
                [-2.,  0.]])

    Source: ``jax.hessian``.
    """
    inner = jacrev(fun, argnums, has_aux, holomorphic)
    return jacfwd(inner, argnums, has_aux, holomorphic)


class JacFwd(Wrapper):
    """The result of :func:`jacfwd`."""

    def __init__(
        self, fun: Callable[..., Any], argnums: positional.Argnums, has_aux: bool, holomorphic: bool
    ) -> None:
        super().__init__(fun, argnums, has_aux, holomorphic)
        self.fun, self.argnums, self.has_aux, self.holomorphic = fun, *self.options

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The Jacobian, with the aux where there is one."""
        split, primals = _bind(self.fun, self.argnums, args, kwargs, "jacfwd")
        check_forward_inputs(primals, "jacfwd", self.holomorphic)
        run = _Forward(split, primals, self.has_aux)
        basis = standard_basis(primals.tensors)
        flat_args = vectorize(run, in_dims=0, out_dims=(None, 0), randomness="same")(basis)
        return flat_args


class JacRev(Wrapper):
    """The result of :func:`jacrev`."""
