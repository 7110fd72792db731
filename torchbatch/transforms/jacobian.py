"""Jacobians and Hessians: ``jacfwd``, ``jacrev``, ``hessian``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch

from torchbatch.core import argnums as positional
from torchbatch.core.argnums import Split
from torchbatch.core.derivative import Outputs, Primals, Pullback, conjugate, push, reverse, vectorize
from torchbatch.core.dtypes import (
    check_forward_inputs,
    check_forward_outputs,
    check_reverse_inputs,
    check_reverse_outputs,
)
from torchbatch.core.wrapper import Wrapper
from torchbatch.errors import GradientValueError

__all__ = ["hessian", "jacfwd", "jacrev"]


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
        output, at each leaf of which is the tree of the argument, at each leaf of which is that tree again, with
        tensors of shape ``output.shape + input1.shape + input2.shape``.

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

    def __init__(self, fun: Callable[..., Any], argnums: positional.Argnums, has_aux: bool, holomorphic: bool) -> None:
        super().__init__(fun, argnums, has_aux, holomorphic)
        self.fun, self.argnums, self.has_aux, self.holomorphic = fun, argnums, has_aux, holomorphic

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        """The Jacobian, with the aux where there is one."""
        split, primals = _bind(self.fun, self.argnums, args, kwargs, "jacfwd")
        check_forward_inputs(primals, "jacfwd", self.holomorphic)
        outputs = Outputs(self.has_aux, "jacfwd")
        values, columns, others = _columns(split, primals, outputs)
        flat = outputs.merge_flat(values, outputs.discrete(others))
        check_forward_outputs(flat, outputs.names, "jacfwd", self.holomorphic)
        blocks = [self._blocks(column, primals) for column in columns[: len(flat)]]
        jacobian = outputs.structure.unflatten(blocks)
        return (jacobian, outputs.give(values, others)[1]) if self.has_aux else jacobian

    def _blocks(self, column: torch.Tensor, primals: Primals) -> Any:
        """From ``[inputs, *output.shape]`` for one output to the tree of the arguments."""
        shape = column.shape[1:]
        parts = torch.split(column.movedim(0, -1), [p.numel() for p in primals.tensors], dim=-1)
        blocks = [part.reshape((*shape, *p.shape)) for part, p in zip(parts, primals.tensors, strict=True)]
        return _unpack(primals.structure.unflatten(blocks), self.argnums)


def _columns(split: Split, primals: Primals, outputs: Outputs) -> Any:
    """As :func:`push` along every unit tangent, with an axis for those in front of the tangents."""
    basis = standard_basis(primals.tensors)
    if basis[0].shape[0]:
        values, columns, others = vectorize(lambda *tangents: push(split, primals, outputs, tangents), basis, False)
        return [value[0] for value in values], columns, [other[0] for other in others]
    values, _, others = push(split, primals, outputs, tuple(primals.tensors))
    return values, [value.new_zeros(0, *value.shape) for value in values], others


class JacRev(Wrapper):
    """The result of :func:`jacrev`."""

    def __init__(
        self, fun: Callable[..., Any], argnums: positional.Argnums, has_aux: bool, holomorphic: bool, allow_int: bool
    ) -> None:
        super().__init__(fun, argnums, has_aux, holomorphic, allow_int)
        self.fun, self.argnums, self.has_aux = fun, argnums, has_aux
        self.holomorphic, self.allow_int = holomorphic, allow_int

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        """The Jacobian, with the aux where there is one."""
        split, primals = _bind(self.fun, self.argnums, args, kwargs, "jacrev")
        check_reverse_inputs(primals, "jacrev", self.holomorphic, self.allow_int)
        pulled = reverse(split, primals, self.has_aux, "jacrev")
        outputs = pulled.outputs
        flat = outputs.merge_flat(pulled.values, outputs.discrete(pulled.others))
        check_reverse_outputs(flat, outputs.names, "jacrev", self.holomorphic)
        sizes = [output.numel() for output in flat]
        rows = [torch.split(row, sizes) for row in _rows(pulled, primals, flat)]
        blocks = [self._blocks(output.shape, [row[i] for row in rows], primals) for i, output in enumerate(flat)]
        jacobian = outputs.structure.unflatten(blocks)
        return (jacobian, outputs.give(pulled.values, pulled.others)[1]) if self.has_aux else jacobian

    def _blocks(self, shape: torch.Size, rows: Sequence[torch.Tensor], primals: Primals) -> Any:
        """From ``[outputs, *input.shape]`` for one output to the tree of the arguments."""
        blocks = [row.reshape((*shape, *p.shape)) for row, p in zip(rows, primals.tensors, strict=True)]
        return _unpack(primals.structure.unflatten(blocks), self.argnums)


def _rows(pulled: Pullback, primals: Primals, flat: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """For each primal, its cotangents for every unit cotangent of the outputs, along axis 0."""
    count = sum(output.numel() for output in flat)
    rows: Sequence[torch.Tensor] = ()
    if count and primals.active:
        rows = vectorize(lambda *c: pulled.pull(c, retain_graph=False), standard_basis(flat), False)
        rows = [conjugate(row) for row in rows]
    found = iter(rows)
    return [
        next(found) if rows and i in primals.active else primal.new_zeros(count, *primal.shape)
        for i, primal in enumerate(primals.tensors)
    ]


def standard_basis(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Unit vectors in the space of all ``tensors`` together, one along axis 0 for each number in them.

    Each varies from sample to sample where its tensor does, so that a function may write it in place into the other.
    """
    sizes = [tensor.numel() for tensor in tensors]
    starts = accumulate(sizes, initial=0)
    return [_unit_rows(sum(sizes), start, tensor) for start, tensor in zip(starts, tensors, strict=False)]


def _unit_rows(count: int, start: int, like: torch.Tensor) -> torch.Tensor:
    size = like.numel()
    rows = like.new_zeros(count, size)
    if size:
        rows.diagonal(-start).fill_(1)
    return rows.reshape(count, *like.shape)


def _bind(
    fun: Callable[..., Any], argnums: positional.Argnums, args: tuple[Any, ...], kwargs: dict[str, Any], transform: str
) -> tuple[Split, Primals]:
    positions = positional.resolve(argnums, len(args), transform, GradientValueError)
    split = Split(fun, positions, args, kwargs)
    primals = Primals(split.picked, split.names)
    if not primals.tensors:
        raise GradientValueError(
            f"{transform}: argument {positional.argument_name(fun, positions[0])} holds no arrays to differentiate by."
        )
    return split, primals


def _unpack(trees: Any, argnums: positional.Argnums) -> Any:
    return trees[0] if isinstance(argnums, int) else trees
