"""What the collectives share: the samples of one or several named axes taken together, the last axis varying fastest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from torchbatch._torch import across, traced
from torchbatch._torch.escape import EscapedTensor
from torchbatch.core import recompute, tree
from torchbatch.core.arrays import as_tensor
from torchbatch.core.describe import shown
from torchbatch.core.frames import AxisFrame, find
from torchbatch.errors import AxisError, AxisSpecError, EscapedValueError, InputTypeError, UnsupportedOperationError

_Tensor = torch.Tensor
Groups = Sequence[Sequence[int]] | None
_is_compiling = torch.compiler.is_compiling


def frames_of(axis_name: Any, who: str) -> list[AxisFrame]:
    """The frames of the axes that are named."""
    names = list(axis_name) if isinstance(axis_name, tuple | list) else [axis_name]
    for place, name in enumerate(names):
        if isinstance(name, int):
            raise AxisSpecError(
                f"{who} takes names that vmap was given as axis_name, but it got the int {name}, which stands for an axis of the "
                "tensor in JAX. Reduce or move that one with the functions of torch."
            )
        if name in names[:place]:
            raise AxisError(f"{who} got the axis {name!r} twice, at places {names.index(name)} and {place} of {axis_name!r}.")
    return [find(name, who) for name in names]


def size_of(frames: list[AxisFrame]) -> int:
    """The number of samples of the axes taken together."""
    size = 1
    for frame in frames:
        size = size * frame[1]
    return size


def device_of(values: Sequence[Any]) -> torch.device | None:
    """Where the first tensor among the values is."""
    for value in values:
        if isinstance(value, _Tensor):
            return value.device
    return None


def steps() -> Any:
    """The functions that look across one level."""
    if _is_compiling():
        from torchbatch._torch import in_graph  # loads the compiler, which takes a second

        return in_graph
    return across


def total(value: _Tensor, frames: list[AxisFrame]) -> _Tensor:
    """The sum over all samples."""
    for _, size, level, _ in frames:
        value = steps().total(value, level, size)
    return value


def everyone(value: _Tensor, frames: list[AxisFrame]) -> _Tensor:
    """The values of all samples along a new first axis; the last frame varies fastest."""
    for _, size, level, _ in frames[::-1]:
        value = steps().gather(value, level, size)
    if len(frames) == 1:
        return value
    return value.flatten(0, len(frames) - 1) if frames else value.unsqueeze(0)


def own(full: _Tensor, frames: list[AxisFrame]) -> _Tensor:
    """What each sample finds at its number along the first axis."""
    if len(frames) != 1:
        full = full.reshape([*(frame[1] for frame in frames), *full.shape[1:]])
    for _, size, level, _ in frames:
        full = steps().own(full, level, size)
    return full


def group_size(x: Any, frames: list[AxisFrame], groups: Groups, who: str) -> int:
    """How many samples a reduction is over."""
    if groups is None:
        return size_of(frames)
    members = [member for group in groups for member in group]
    if sorted(members) != list(range(size_of(frames))) or len({len(group) for group in groups}) > 1:
        raise AxisError(
            f"{who} needs axis_index_groups of one size that hold each number from 0 to {size_of(frames) - 1} once, but they are "
            f"{groups!r}."
        )
    if not all(isinstance(leaf, bool | int | float | complex) for leaf in tree.flatten(x)[0]):
        no_groups(groups, who)
    return len(groups[0]) if groups else 0


def no_groups(groups: Groups, who: str) -> None:
    if groups is not None:
        raise UnsupportedOperationError(
            f"{who} has no axis_index_groups under vmap, in JAX neither. Map over two axes, one for the groups and one for "
            "their members, and name only the members' axis."
        )


def _noted(function: Callable[[_Tensor], _Tensor], value: _Tensor) -> _Tensor:
    """``function(value)``, which ``checkpoint`` and the like do not see as an operation: they are asked and told."""
    (value,) = recompute.seen([value])
    with recompute.paused():  # a look is partly run below the transforms that a mode knows
        result = function(value)
    recompute.note(tree.flatten(result)[0])
    return result


def over_leaves(function: Callable[[_Tensor], _Tensor], x: Any, who: str, of_number: Callable[[Any], Any] | None = None) -> Any:
    """``function`` over the tensors and arrays in ``x``, and ``of_number``, if given, over its Python numbers."""

    def one(leaf: Any) -> Any:
        if of_number is not None and isinstance(leaf, bool | int | float | complex):
            return of_number(leaf)
        if isinstance(leaf, EscapedTensor):
            raise EscapedValueError(f"{who} got a per-sample value that escaped from a vmap that has finished.")
        value = as_tensor(leaf)
        if value is None:
            raise InputTypeError(f"{who} takes tensors, arrays, numbers and trees of them, but it got {shown(leaf)}.")
        return function(value) if _is_compiling() else _noted(function, value)

    if isinstance(x, _Tensor):
        return one(x)
    return traced.map_leaves(one, x) if _is_compiling() else tree.map_leaves(one, x)
