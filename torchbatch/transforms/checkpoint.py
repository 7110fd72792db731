"""``checkpoint``: compute again in the backward pass instead of keeping."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from torchbatch._torch import graphs
from torchbatch.core import argnums as positional
from torchbatch.core.recompute import Segment
from torchbatch.core.wrapper import Wrapper
from torchbatch.errors import GradientTypeError, GradientValueError

__all__ = ["checkpoint"]


def checkpoint(
    fun: Callable[..., Any],
    *,
    prevent_cse: bool = True,
    policy: Callable[..., bool] | None = None,
    static_argnums: int | tuple[int, ...] = (),
    static_argnames: str | Iterable[str] = (),
) -> Callable[..., Any]:
    """Make ``fun`` keep nothing but its inputs for the backward pass, which runs it a second time.

    Derivatives of every mode and order are the same as without it; only memory and time differ. It works in every
    transform, and may close over tensors and modules: their gradients are right too. Random draws are the same in both
    runs.

    Shapes: those of ``fun``.

    Args:
        fun: any function. It must not write into its arguments.
        prevent_cse: kept for JAX's signature; PyTorch does not merge the two runs in any case.
        policy: kept for JAX's signature; must be None: everything is recomputed.
        static_argnums, static_argnames: arguments that are not arrays. They need no marking here, so that these are
            only checked.

    Returns:
        A function like ``fun``. When ``torch.compile`` or :func:`jit` traces it, it is ``fun`` itself: the compiler decides
        what to recompute.

    Raises:
        GradientTypeError: ``fun`` is not a function, ``static_argnums`` holds no ints.
        GradientValueError: there is a ``policy``, or ``static_argnums`` is out of range.
        UnsupportedOperationError: (in the backward pass) a tensor that ``fun`` closes over goes straight into a
            transform inside it.

    Example:
        >>> import torch, torchbatch
        >>> block = torchbatch.checkpoint(lambda x: torch.sin(torch.sin(x)))
        >>> torchbatch.grad(lambda x: block(x).sum())(torch.zeros(2))
        tensor([1., 1.])

    Source: ``jax.checkpoint``.
    """
    positional.check_callable(fun, "checkpoint")
    if policy is not None:
        raise GradientValueError(
            f"checkpoint: policy must be None, but it is {policy!r}. Everything inside is recomputed; call checkpoint "
            f"on a smaller part of the function to keep the rest."
        )
    names = (static_argnames,) if isinstance(static_argnames, str) else tuple(static_argnames)
    if not all(isinstance(name, str) for name in names):
        raise GradientTypeError(f"checkpoint: static_argnames must be a str or several, but it is {static_argnames!r}.")
    numbers = () if static_argnums == () else positional.parse(static_argnums, "checkpoint", "static_argnums")
    return Checkpointed(fun, bool(prevent_cse), numbers, names)


class Checkpointed(Wrapper):
    """The result of :func:`checkpoint`."""

    def __init__(
        self, fun: Callable[..., Any], prevent_cse: bool, static_argnums: positional.Argnums, names: tuple[str, ...]
    ) -> None:
        super().__init__(fun, prevent_cse, static_argnums, names)
        self.fun, self.static_argnums = fun, static_argnums

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        """The output of the function."""
        if self.static_argnums != ():
            positional.resolve(self.static_argnums, len(args), "checkpoint", GradientValueError, "static_argnums")
        if torch.compiler.is_compiling() or graphs.is_traced_by_jit():
            return self.fun(*args, **kwargs)
        return Segment(self.fun, args, kwargs).run()
