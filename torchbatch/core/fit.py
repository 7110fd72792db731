"""Whether tangents fit their primals and cotangents their outputs, and what to say when they do not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from torchbatch.core import tree
from torchbatch.core.argnums import flatten
from torchbatch.core.derivative import FLOAT0, TANGENT_HINT, Outputs, Primals, as_tensor, conjugate, is_inexact
from torchbatch.core.describe import describe
from torchbatch.errors import GradientTypeError, GradientValueError


def check_tangents(primals: Primals, tangents: Any, transform: str, mismatch: type[Exception]) -> list[torch.Tensor]:
    """``tangents`` as flat tensors that fit ``primals``.

    Raises:
        GradientTypeError: the trees differ.
        mismatch: a dtype differs.
        GradientValueError: a shape differs.
    """
    leaves, structure = flatten(tangents)
    if structure != primals.structure:
        raise GradientTypeError(
            f"{transform}: the tangents must have the structure of the primals, but "
            f"{tree_difference(primals.structure.unflatten(primals.tensors), tangents, 'primals', 'tangents')}."
        )
    return [
        _check_tangent(leaf, primals, i, partial(_leaf_name, transform, "tangents", tangents, i), mismatch)
        for i, leaf in enumerate(leaves)
    ]


def _leaf_name(transform: str, root: str, value: Any, index: int) -> str:
    return f"{transform}: {tree.paths(value, root)[index]}"


def _check_tangent(
    leaf: Any, primals: Primals, index: int, name: Callable[[], str], mismatch: type[Exception]
) -> torch.Tensor:
    primal = primals.tensors[index]
    tangent = as_tensor(leaf, name, TANGENT_HINT, primal)
    wanted = primal.dtype if is_inexact(primal) else FLOAT0
    if tangent.dtype != wanted or tangent.shape != primal.shape:
        error = mismatch if tangent.dtype != wanted else GradientValueError
        raise error(
            f"{name()} is {describe(tangent)}, but argument {primals.names()[index]} is {describe(primal)}, whose "
            f"tangents are {_describe_as(primal, wanted)}.{_float0_hint(wanted)}"
        )
    return tangent


def check_cotangents(outputs: Outputs, examples: Sequence[torch.Tensor], cotangents: Any) -> tuple[torch.Tensor, ...]:
    """``cotangents`` as flat tensors in PyTorch's convention that fit the inexact outputs ``examples``.

    Raises:
        GradientValueError: the trees, a shape or a dtype differ.
    """
    leaves, structure = flatten(cotangents)
    if structure != outputs.structure:
        example = outputs.structure.unflatten([0] * len(outputs.kinds))
        raise GradientValueError(
            f"vjp: the cotangents must have the structure of the output, but "
            f"{tree_difference(example, cotangents, 'output', 'cotangents')}."
        )
    rest = iter(examples)
    found = [
        _check_cotangent(leaf, next(rest), partial(_leaf_name, "vjp", "cotangents", cotangents, i))
        for i, (leaf, inexact) in enumerate(zip(leaves, outputs.kinds, strict=True))
        if inexact
    ]
    return tuple(found) or tuple(torch.zeros_like(example) for example in examples)


def _check_cotangent(leaf: Any, example: torch.Tensor, name: Callable[[], str]) -> torch.Tensor:
    cotangent = as_tensor(leaf, name, TANGENT_HINT, example)
    if cotangent.dtype != example.dtype or cotangent.shape != example.shape:
        raise GradientValueError(
            f"{name()} is {describe(cotangent)}, but the output there is {describe(example)}. A cotangent has the "
            f"shape and dtype of its output."
        )
    return conjugate(cotangent)


def _describe_as(primal: torch.Tensor, dtype: torch.dtype) -> str:
    return f"{str(dtype).removeprefix('torch.')}[{','.join(str(n) for n in primal.shape)}]"


def _float0_hint(wanted: torch.dtype) -> str:
    return " (Integers have no tangents: bool zeros stand for JAX's float0.)" if wanted is FLOAT0 else ""


def tree_difference(wanted: Any, given: Any, wanted_name: str, given_name: str) -> str:
    """One clause that says where two trees part."""
    wanted_paths, given_paths = tree.paths(wanted, ""), tree.paths(given, "")
    missing = next((path for path in wanted_paths if path not in given_paths), None)
    extra = next((path for path in given_paths if path not in wanted_paths), None)
    if missing and extra:
        return f"{wanted_name}{missing} has no counterpart, while {given_name}{extra} has none in the {wanted_name}"
    if missing or extra:
        lacking, name = (missing, wanted_name) if missing else (extra, given_name)
        return f"{name}{lacking} has no counterpart in the {given_name if missing else wanted_name}"
    return f"one is {tree.flatten(wanted)[1]} and the other {tree.flatten(given)[1]}"
