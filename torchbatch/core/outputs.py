"""Take the results of a mapped function out of its batch level, laid out as ``out_axes`` says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from torchbatch._torch import levels, local
from torchbatch.core import tree
from torchbatch.core.arrays import as_tensor
from torchbatch.core.axes import Axis, parse_prefix
from torchbatch.core.describe import describe, function_name, shown
from torchbatch.errors import AxisError, OutputTypeError, UnmappedOutputError

_Tensor = torch.Tensor


class OutAxes:
    """A checked ``out_axes``, ready for the output of a call."""

    def __init__(self, out_axes: Any, sum_match: bool, fun: Any) -> None:
        self.prefix = parse_prefix(out_axes, "out_axes")
        self.sum_match = sum_match
        self._fun = fun
        self._in_front = self.prefix.structure is None and self.prefix.axes[0] == 0

    def finish(self, output: Any, level: int, size: int, inputs: Sequence[Any]) -> tuple[Any, int]:
        """The output outside ``level``, and how many of its tensors are not among ``inputs``."""
        if self._in_front and type(output) is _Tensor:
            result = levels.remove_batch_dim(output, level, size, 0)
            for value in inputs:
                if value is result:
                    return result, 0
            return result, 1
        leaves, axes, rebuild = self.open(output)
        results = self.leaves(leaves, axes, level, size, output)
        known = {id(value) for value in inputs}
        return rebuild(results), sum(isinstance(x, _Tensor) and id(x) not in known for x in results)

    def open(self, output: Any) -> tuple[list[Any], list[Axis], Any]:
        """The leaves of an output, the axis of each, and how to rebuild the output around other leaves."""
        if self.prefix.structure is None:
            leaves, structure = tree.flatten(output)
            return leaves, [self.prefix.axes[0]] * len(leaves), structure.unflatten
        leaves, structure = tree.flatten(output)
        what = f"out_axes of {function_name(self._fun)}"
        axes = tree.broadcast_prefix(self.prefix.sealed, output, what=what, root="the output")
        return leaves, [axis if isinstance(axis, int) else None for axis in axes], structure.unflatten

    def leaves(self, leaves: list[Any], axes: list[Axis], level: int, size: int, output: Any) -> list[Any]:
        """Each leaf outside ``level``, with the mapped axis where its entry of ``axes`` says."""
        return [self._leaf(i, leaf, axis, level, size, output) for i, (leaf, axis) in enumerate(zip(leaves, axes, strict=True))]

    def join(self, leaf: Any, axis: Axis, level: int) -> int | str:
        """How a leaf of several chunks becomes one: the axis to concatenate, ``"sum"``, or ``"once"`` if it is the same."""
        if axis is not None:
            return axis
        varies = isinstance(leaf, _Tensor) and levels.unwrap_batched(leaf, level)[1] is not None
        return "sum" if varies else "once"

    def _leaf(self, index: int, leaf: Any, axis: Axis, level: int, size: int, output: Any) -> Any:
        value = as_tensor(leaf)
        if type(value) is local.LocalTensor:
            local.settle(value)
        if axis is None:
            return leaf if not isinstance(value, _Tensor) else self._unmapped(index, leaf, value, level, output)
        if value is None:
            raise OutputTypeError(
                f"{self._path(output, index)} is {shown(leaf)}, which is not an array of numbers that PyTorch can hold. "
                "Return tensors, arrays and numbers only, or give None for it in out_axes if it is the same for all samples."
            )
        at = self._bounded(index, value, axis, output)
        if at and levels.unwrap_batched(value, level)[1] is None:  # PyTorch broadcasts only along a first axis
            return value.unsqueeze(at).expand(*value.shape[:at], size, *value.shape[at:])
        return levels.remove_batch_dim(value, level, size, at)

    def _unmapped(self, index: int, leaf: Any, value: torch.Tensor, level: int, output: Any) -> Any:
        inner, at = levels.unwrap_batched(value, level)
        if at is None:
            return leaf
        if self.sum_match:
            return inner.sum(at)
        raise UnmappedOutputError(
            f"{self._path(output, index)} varies along the mapped axis (each sample has its own {describe(value)}), but out_axes "
            "is None for it. Give it an int in out_axes, or reduce it over the samples first."
        )

    def _bounded(self, index: int, value: torch.Tensor, axis: int, output: Any) -> int:
        rank = value.dim() + 1
        if not -rank <= axis < rank:
            raise AxisError(
                f"out_axes is {axis} for {self._path(output, index)}, but with the mapped axis it has {rank} "
                f"dimension{'s' * (rank > 1)} (one sample is {describe(value)}): axes run over [-{rank}, {rank})."
            )
        return axis % rank

    def _path(self, output: Any, index: int) -> str:
        where = tree.paths(output)[index]
        return f"the output of {function_name(self._fun)}" + (f" at {where}" if where else "")
