"""A tree with its tensors taken out, to be put together again with other ones."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from torchbatch.core import tree
from torchbatch.core.argnums import flatten
from torchbatch.core.arrays import as_tensor
from torchbatch.core.describe import function_name
from torchbatch.errors import InputTypeError

_TENSOR = object()


class Parcel:
    """A tree, taken apart: its tensors in order, and everything else.

    Args:
        value: any tree.
        convert: makes a tensor of a leaf that is none, or gives None to keep the leaf as it is. It gets the number of the leaf.
    """

    __slots__ = ("count", "leaves", "structure", "tensors")

    def __init__(self, value: Any, convert: Callable[[Any, int], torch.Tensor | None] | None = None) -> None:
        self.leaves, self.structure = flatten(value)
        self.tensors: list[torch.Tensor] = []
        for i, leaf in enumerate(self.leaves):
            found = leaf if isinstance(leaf, torch.Tensor) or convert is None else convert(leaf, i)
            if isinstance(found, torch.Tensor):
                self.tensors.append(found)
                self.leaves[i] = _TENSOR
        self.count = len(self.tensors)

    def take(self) -> list[torch.Tensor]:
        """The tensors, which are not kept any longer."""
        tensors, self.tensors = self.tensors, []
        return tensors

    @staticmethod
    def is_tensor(leaf: Any) -> bool:
        """Whether an entry of ``leaves`` stands for a tensor."""
        return leaf is _TENSOR

    def rebuild(self, tensors: Iterable[Any]) -> Any:
        """The tree with something else in the places of its tensors."""
        rest = iter(tensors)
        return self.structure.unflatten([next(rest) if leaf is _TENSOR else leaf for leaf in self.leaves])

    def flags(self, tensors: Iterable[bool]) -> Any:
        """The tree with a bool in each place: as given for its tensors, False for anything else."""
        rest = iter(tensors)
        return self.structure.unflatten([next(rest) if leaf is _TENSOR else False for leaf in self.leaves])

    def names(self, root: str) -> list[str]:
        """What messages call each leaf."""
        return tree.paths(self.structure.unflatten([0] * self.structure.num_leaves), root)


def number_as_tensor(leaf: Any, _: int) -> torch.Tensor | None:
    """A tensor for a number or an array; None for anything else."""
    return as_tensor(leaf)


def positional(fun: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
    """All arguments by position, defaults included.

    Raises:
        InputTypeError: they do not fit the function, or one can be given by keyword only.
    """
    signature = _signature(fun)
    if signature is None:
        if kwargs:
            raise InputTypeError(
                f"{function_name(fun)} has rules of its own for transforms, and no signature that says which argument "
                f"{next(iter(kwargs))!r} is. Give it by position."
            )
        return args
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as error:
        raise InputTypeError(f"{function_name(fun)} was called with arguments that do not fit it: {error}.") from error
    bound.apply_defaults()
    if bound.kwargs:
        raise InputTypeError(
            f"{function_name(fun)} has rules of its own for transforms, which take arguments by position, but "
            f"{next(iter(bound.kwargs))!r} can be given by keyword only. Make it a positional argument."
        )
    return bound.args


def _signature(fun: Callable[..., Any]) -> inspect.Signature | None:
    try:
        return inspect.signature(fun)
    except (ValueError, TypeError):
        return None


def positional_names(fun: Callable[..., Any]) -> list[str]:
    """The names of the arguments that can be given by position."""
    signature = _signature(fun)
    parameters = () if signature is None else signature.parameters.values()
    return [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
