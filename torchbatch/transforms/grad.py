"""The gradient family: ``grad``, ``value_and_grad``, ``vjp``, ``jvp``, ``linearize``, ``stop_gradient``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from torchbatch._torch import derivatives
from torchbatch.core import argnums as positional
from torchbatch.core import tree
from torchbatch.core.argnums import Split, leaf_names
from torchbatch.core.derivative import (
    OUTPUT_HINT,
    Aux,
    Outputs,
    Primals,
    Pullback,
    as_tensor,
    float0_like,
    forward,
    guarded,
    is_inexact,
    reverse,
    split_aux,
)
from torchbatch.core.describe import describe
from torchbatch.core.dtypes import check_reverse_inputs, check_reverse_outputs
from torchbatch.core.fit import check_cotangents, check_tangents
from torchbatch.core.weak import strong
from torchbatch.core.wrapper import Wrapper
from torchbatch.errors import GradientTypeError, GradientValueError

__all__ = ["grad", "jvp", "linearize", "stop_gradient", "value_and_grad", "vjp"]


def grad(
    fun: Callable[..., Any],
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    holomorphic: bool = False,
    allow_int: bool = False,
    reduce_axes: Sequence[Any] = (),
) -> Callable[..., Any]:
    """Make a function that computes the gradient of ``fun``, which must return one real number.

    Shapes: if ``fun`` takes ``[a]`` to ``[]``, ``grad(fun)`` takes ``[a]`` to ``[a]``.

    Args:
        fun: takes tensors, NumPy arrays, numbers or trees of them in the arguments ``argnums``, and anything in the
            others.
        argnums: which positional arguments to differentiate by: an int (negative ones count from the end), or several.
        has_aux: ``fun`` returns ``(output, aux)``, and only ``output`` is differentiated.
        holomorphic: ``fun`` is holomorphic: its inputs and its output are complex.
        allow_int: accept integers and bools in ``argnums``. Their gradients are zeros of dtype ``torch.bool`` in their
            shape, which stand for JAX's ``float0``.
        reduce_axes: kept for JAX's signature; must be empty.

    Returns:
        A function with the arguments of ``fun`` that returns the gradient, a tree like the argument (a tuple of them
        if ``argnums`` is a sequence), or ``(gradient, aux)``.

        For a complex argument ``x + iy`` the gradient of a real output is ``d/dx - i d/dy``, as in JAX: the conjugate
        of what ``torch.autograd`` gives, and of the direction to step in.

    Raises:
        GradientTypeError: an input or the output has a dtype, shape or type that cannot be differentiated, or
            ``argnums`` is too large.
        GradientValueError: ``argnums`` is empty, has a repetition, or is too small.

    Example:
        >>> import torch, torchbatch
        >>> torchbatch.grad(lambda x: (x**2).sum())(torch.tensor([1.0, 2.0]))
        tensor([2., 4.])
        >>> torchbatch.grad(lambda x, y: x * y, argnums=(0, 1))(3.0, 4.0)
        (tensor(4.), tensor(3.))

    Source: ``jax.grad``.
    """
    positional.check_callable(fun, "grad")
    _check_axes(reduce_axes, "grad")
    return Grad(fun, positional.parse(argnums, "grad"), has_aux, holomorphic, allow_int)


def value_and_grad(
    fun: Callable[..., Any],
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    holomorphic: bool = False,
    allow_int: bool = False,
    reduce_axes: Sequence[Any] = (),
) -> Callable[..., Any]:
    """Make a function that computes ``fun`` and its gradient together.

    Shapes: if ``fun`` takes ``[a]`` to ``[]``, ``value_and_grad(fun)`` takes ``[a]`` to ``([], [a])``.

    Args:
        fun, argnums, has_aux, holomorphic, allow_int, reduce_axes: as for :func:`grad`.

    Returns:
        A function with the arguments of ``fun`` that returns ``(output, gradient)``, or
        ``((output, aux), gradient)``. Note that ``torch.func.grad_and_value`` has them the other way round.

    Raises:
        GradientTypeError, GradientValueError: as for :func:`grad`.

    Example:
        >>> import torch, torchbatch
        >>> torchbatch.value_and_grad(lambda x: x**2)(torch.tensor(3.0))
        (tensor(9.), tensor(6.))

    Source: ``jax.value_and_grad``.
    """
    positional.check_callable(fun, "value_and_grad")
    _check_axes(reduce_axes, "value_and_grad")
    return ValueAndGrad(fun, positional.parse(argnums, "value_and_grad"), has_aux, holomorphic, allow_int)


def _check_axes(reduce_axes: Sequence[Any], transform: str) -> None:
    if reduce_axes:
        raise GradientValueError(
            f"{transform}: reduce_axes must be empty, but it is {reduce_axes!r}. JAX dropped it too; sum over a named "
            f"axis with torchbatch.lax.psum instead."
        )


class ValueAndGrad(Wrapper):
    """The result of :func:`value_and_grad`."""

    transform = "value_and_grad"

    def __init__(
        self, fun: Callable[..., Any], argnums: positional.Argnums, has_aux: bool, holomorphic: bool, allow_int: bool
    ) -> None:
        super().__init__(fun, argnums, has_aux, holomorphic, allow_int)
        self.fun, self.argnums, self.has_aux = fun, argnums, has_aux
        self.holomorphic, self.allow_int = holomorphic, allow_int
        self._simple = argnums in (0, -1) and not has_aux and not holomorphic

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        """The output (with its aux) and the gradient."""
        value, gradient, aux = self._run(args, kwargs)
        return ((value, aux) if self.has_aux else value), gradient

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[torch.Tensor, Any, Any]:
        if self._simple and len(args) == 1 and not kwargs:
            x = strong(args[0])
            if isinstance(x, torch.Tensor) and x.is_floating_point():
                value, gradients, _ = guarded(
                    derivatives.value_and_gradient, self.transform, self._simple_scalar, (x,)
                )
                return value, gradients[0], None
        return self._run_trees(args, kwargs)

    def _simple_scalar(self, x: torch.Tensor) -> Any:
        return (self._scalar(self.fun(x)),), ()

    def _run_trees(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[torch.Tensor, Any, Any]:
        positions = positional.resolve(self.argnums, len(args), self.transform, GradientTypeError)
        split = Split(self.fun, positions, args, kwargs)
        primals = Primals(split.picked, split.names)
        check_reverse_inputs(primals, self.transform, self.holomorphic, self.allow_int)
        aux = Aux()

        def flat(*inputs: torch.Tensor) -> Any:
            result = split(*primals.rebuild(inputs))
            if not self.has_aux:
                return (self._scalar(result),), ()
            result, beside = split_aux(result, self.transform)
            return (self._scalar(result),), aux.take(beside)

        value, found, beside = guarded(derivatives.value_and_gradient, self.transform, flat, primals.inputs())
        gradient = positional.unflatten(primals.structure, primals.cotangents(found))
        gradient = gradient[0] if isinstance(self.argnums, int) else gradient
        return value, gradient, aux.give(beside) if self.has_aux else None

    def _scalar(self, result: Any) -> torch.Tensor:
        output: torch.Tensor = result if isinstance(result, torch.Tensor) else self._number(result)
        if output.dim():
            raise GradientTypeError(
                f"{self.transform}: the function must return one number, but its output is {describe(output)}. Return "
                f"loss.sum() or loss.mean(), or use jacrev for the derivative of every element."
            )
        if self.holomorphic or not output.is_floating_point():
            check_reverse_outputs([output], lambda: ["the output"], self.transform, self.holomorphic)
        return output

    def _number(self, output: Any) -> torch.Tensor:
        if tree.is_node_type(type(output)):
            raise GradientTypeError(
                f"{self.transform}: the function must return one number, but it returned {_article(output)}. "
                f"Return (output, aux) and pass has_aux=True to get more out of it."
            )
        return as_tensor(output, lambda: f"{self.transform}: the output", OUTPUT_HINT)


def _article(value: Any) -> str:
    return "None" if value is None else f"a {type(value).__name__}"


class Grad(ValueAndGrad):
    """The result of :func:`grad`."""

    transform = "grad"

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        """The gradient, with the aux where there is one."""
        _, gradient, aux = self._run(args, kwargs)
        return (gradient, aux) if self.has_aux else gradient


def vjp(fun: Callable[..., Any], *primals: Any, has_aux: bool = False, reduce_axes: Sequence[Any] = ()) -> Any:
    """Compute ``fun(*primals)``, and a function from cotangents of its output to cotangents of ``primals``.

    Shapes: if ``fun`` takes ``[a]`` to ``[b]``, the function takes ``[b]`` to ``([a],)``.

    Args:
        fun: takes and returns tensors, NumPy arrays, numbers or trees of them.
        primals: its arguments.
        has_aux: ``fun`` returns ``(output, aux)``, and only ``output`` is differentiated.
        reduce_axes: kept for JAX's signature; must be empty.

    Returns:
        ``(output, vjp_fn)`` or ``(output, vjp_fn, aux)``. ``vjp_fn(cotangent)`` can be called any number of times, also
        inside other transforms; it takes one tree like the output and returns a tuple with one tree per primal.
        Cotangents of integers and bools are zeros of dtype ``torch.bool``, for JAX's ``float0``.

        There is no complex conjugate in it, as in JAX: ``vjp_fn(c)[0]`` is what ``torch.func.vjp`` gives for the
        conjugate of ``c``, conjugated.

    Raises:
        GradientTypeError: an input or an output is not an array.
        GradientValueError: (from ``vjp_fn``) the cotangent does not fit the output.

    Example:
        >>> import torch, torchbatch
        >>> output, vjp_fn = torchbatch.vjp(torch.sin, torch.tensor([0.0, 1.0]))
        >>> vjp_fn(torch.tensor([1.0, 0.0]))
        (tensor([1., 0.]),)

    Source: ``jax.vjp``.
    """
    positional.check_callable(fun, "vjp")
    _check_axes(reduce_axes, "vjp")
    inputs = Primals(primals, lambda: _names(fun, primals))
    pulled = reverse(fun, inputs, has_aux, "vjp")
    output, aux = pulled.outputs.give(pulled.values, pulled.others)
    vjp_fn = VjpFunction(inputs, pulled)
    return (output, vjp_fn, aux) if has_aux else (output, vjp_fn)


class VjpFunction:
    """The second result of :func:`vjp`: from a cotangent of the output to cotangents of the primals."""

    def __init__(self, primals: Primals, pulled: Pullback) -> None:
        self._primals = primals
        self._pulled = pulled

    def __call__(self, *cotangent: Any) -> tuple[Any, ...]:
        """One tree of cotangents per primal."""
        if len(cotangent) != 1:
            raise GradientTypeError(
                f"vjp: the function it returns takes one argument, a tree like the output, but got {len(cotangent)}. "
                f"If the output is a tuple, pass one tuple: vjp_fn((a, b))."
            )
        flat = check_cotangents(self._pulled.outputs, self._pulled.values, cotangent[0])
        found = self._primals.cotangents(self._pulled.pull(flat))
        return tuple(positional.unflatten(self._primals.structure, found))


def jvp(fun: Callable[..., Any], primals: Any, tangents: Any, has_aux: bool = False) -> Any:
    """Compute ``fun(*primals)`` and its derivative along ``tangents``, in forward mode.

    Shapes: if ``fun`` takes ``[a]`` to ``[b]``, ``jvp`` takes ``([a],), ([a],)`` to ``([b], [b])``.

    Args:
        fun: takes and returns tensors, NumPy arrays, numbers or trees of them.
        primals: a tuple or list of its arguments.
        tangents: a tuple or list like ``primals``, with the same shapes and dtypes; for integers and bools, zeros of
            dtype ``torch.bool``.
        has_aux: ``fun`` returns ``(output, aux)``, and only ``output`` is differentiated.

    Returns:
        ``(output, output_tangent)`` or ``(output, output_tangent, aux)``.

    Raises:
        GradientTypeError: ``primals`` or ``tangents`` is not a tuple or list, or their trees or dtypes differ.
        GradientValueError: their shapes differ.

    Example:
        >>> import torch, torchbatch
        >>> torchbatch.jvp(lambda x: x**2, (torch.tensor(3.0),), (torch.tensor(1.0),))
        (tensor(9.), tensor(6.))

    Source: ``jax.jvp``.
    """
    positional.check_callable(fun, "jvp")
    for name, value in (("primals", primals), ("tangents", tangents)):
        if not isinstance(value, tuple | list):
            raise GradientTypeError(
                f"jvp: {name} must be a tuple or a list with one entry per argument, but got {describe(value)}. Write "
                f"({name[:-1]},) for a function of one argument."
            )
    inputs = Primals(primals, lambda: _names(fun, primals))
    flat = check_tangents(inputs, tangents, "jvp", GradientTypeError)
    output, tangent, aux = forward(fun, inputs, flat, has_aux, "jvp")
    return (output, tangent, aux) if has_aux else (output, tangent)


def linearize(fun: Callable[..., Any], *primals: Any, has_aux: bool = False) -> Any:
    """Compute ``fun(*primals)``, and the linear function from tangents of ``primals`` to those of the output.

    ``fun`` runs once; the linear function does not run it again. What it keeps takes as much memory as reverse mode,
    since it is the pullback of the pullback: every operation in ``fun`` must be twice differentiable in reverse mode.

    Shapes: if ``fun`` takes ``[a]`` to ``[b]``, the linear function takes ``[a]`` to ``[b]``.

    Args:
        fun: takes and returns tensors, NumPy arrays, numbers or trees of them.
        primals: its arguments.
        has_aux: ``fun`` returns ``(output, aux)``, and only ``output`` is differentiated.

    Returns:
        ``(output, f_jvp)`` or ``(output, f_jvp, aux)``. ``f_jvp(*tangents)`` can be called any number of times, also
        inside other transforms.

    Raises:
        GradientTypeError: an input or an output is not an array, or (from ``f_jvp``) the tree does not fit.
        GradientValueError: (from ``f_jvp``) a shape or dtype does not fit.

    Example:
        >>> import torch, torchbatch
        >>> output, f_jvp = torchbatch.linearize(lambda x: x**2, torch.tensor(3.0))
        >>> f_jvp(torch.tensor(1.0)), f_jvp(torch.tensor(10.0))
        (tensor(6.), tensor(60.))

    Source: ``jax.linearize``.
    """
    positional.check_callable(fun, "linearize")
    inputs = Primals(primals, lambda: _names(fun, primals))
    pulled = reverse(fun, inputs, has_aux, "linearize")
    output, aux = pulled.outputs.give(pulled.values, pulled.others)
    zeros = [torch.zeros_like(value) for value in pulled.values]
    push: Callable[..., Any] = derivatives.vjp(lambda *flat: (pulled.pull(flat), ()), zeros)[2]
    f_jvp = LinearFunction(inputs, pulled.outputs, push, float0_like(pulled.outputs.discrete(pulled.others)))
    return (output, f_jvp, aux) if has_aux else (output, f_jvp)


class LinearFunction:
    """The second result of :func:`linearize`: from tangents of the primals to tangents of the output."""

    def __init__(
        self, primals: Primals, outputs: Outputs, push: Callable[..., Any], discrete: list[torch.Tensor]
    ) -> None:
        self._primals, self._outputs, self._push, self._discrete = primals, outputs, push, discrete

    def __call__(self, *tangents: Any) -> Any:
        """The tangent of the output."""
        flat = check_tangents(self._primals, tangents, "linearize", GradientValueError)
        return self._outputs.merge(self._push(self._primals.inputs(flat)), self._discrete)


def _names(fun: Callable[..., Any], primals: Sequence[Any]) -> list[str]:
    return leaf_names([positional.argument_name(fun, i) for i in range(len(primals))], primals)


def stop_gradient(x: Any) -> Any:
    """Return ``x`` as a constant: its derivative is zero in every mode and order.

    Shapes: ``[a] -> [a]``.

    Args:
        x: a tree. Its tensors are detached from every transform and from autograd; other leaves are handed back as
            they are.

    Returns:
        The same tree.

    Example:
        >>> import torch, torchbatch
        >>> torchbatch.grad(lambda x: x * torchbatch.stop_gradient(x))(torch.tensor(3.0))
        tensor(3.)

    Source: ``jax.lax.stop_gradient``.
    """
    leaves, structure = positional.flatten(x)
    return structure.unflatten([_detached(leaf) for leaf in leaves])


def _detached(leaf: Any) -> Any:
    return leaf.detach() if isinstance(leaf, torch.Tensor) and is_inexact(leaf) else leaf
