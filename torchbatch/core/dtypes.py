"""Which dtypes each gradient transform accepts, and what to say about those it does not."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from torchbatch.core.derivative import Primals, is_inexact
from torchbatch.errors import GradientTypeError


def _name(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def check_reverse_inputs(primals: Primals, transform: str, holomorphic: bool, allow_int: bool) -> None:
    """Refuse integers unless ``allow_int``, and under ``holomorphic`` what is not complex."""
    if not holomorphic and (allow_int or len(primals.active) == len(primals.tensors)):
        return
    for i, tensor in enumerate(primals.tensors):
        if holomorphic and not tensor.is_complex():
            raise GradientTypeError(_not_complex(f"argument {primals.names()[i]}", tensor, transform))
        if i not in primals.active and not allow_int:
            raise GradientTypeError(
                f"{transform} differentiates by floating-point and complex arrays, but argument {primals.names()[i]} "
                f"has dtype {_name(tensor)}. Convert it with .float(), leave it out of argnums, or pass "
                f"allow_int=True to get zeros for it."
            )


def check_reverse_outputs(
    outputs: Sequence[torch.Tensor], names: Callable[[], Sequence[str]], transform: str, holomorphic: bool
) -> None:
    """Refuse outputs that are not real, or under ``holomorphic`` not complex."""
    for i, output in enumerate(outputs):
        if holomorphic:
            if not output.is_complex():
                raise GradientTypeError(_not_complex(names()[i], output, transform))
        elif output.is_complex():
            raise GradientTypeError(
                f"{transform} needs a real output, but {names()[i]} has dtype {_name(output)}. Return a real number "
                f"such as z.abs(), pass holomorphic=True if the function is holomorphic, or use vjp."
            )
        elif not output.is_floating_point():
            raise GradientTypeError(_no_derivative(names()[i], output, transform, "vjp"))


def check_forward_inputs(primals: Primals, transform: str, holomorphic: bool) -> None:
    """Refuse inputs that are not real, or under ``holomorphic`` not complex."""
    for i, tensor in enumerate(primals.tensors):
        if holomorphic:
            if not tensor.is_complex():
                raise GradientTypeError(_not_complex(f"argument {primals.names()[i]}", tensor, transform))
        elif not tensor.is_floating_point():
            raise GradientTypeError(
                f"{transform} differentiates by floating-point arrays, but argument {primals.names()[i]} has dtype "
                f"{_name(tensor)}. Convert it with .float(), leave it out of argnums, pass holomorphic=True for a "
                f"holomorphic function of complex numbers, or use jvp."
            )


def check_forward_outputs(
    outputs: Sequence[torch.Tensor], names: Callable[[], Sequence[str]], transform: str, holomorphic: bool
) -> None:
    """Refuse integers, and under ``holomorphic`` what is not complex."""
    for i, output in enumerate(outputs):
        if holomorphic and not output.is_complex():
            raise GradientTypeError(_not_complex(names()[i], output, transform))
        if not is_inexact(output):
            raise GradientTypeError(_no_derivative(names()[i], output, transform, "jvp"))


def _no_derivative(name: str, output: torch.Tensor, transform: str, instead: str) -> str:
    return (
        f"{transform} needs floating-point outputs, but {name} has dtype {_name(output)}, which has no derivative. "
        f"Compute it in floating point, return it as aux with has_aux=True, or use {instead}."
    )


def _not_complex(name: str, tensor: torch.Tensor, transform: str) -> str:
    return (
        f"{transform} with holomorphic=True needs complex inputs and outputs, but {name} has dtype {_name(tensor)}. "
        f"Convert it with .to(torch.complex64), or leave out holomorphic=True."
    )
