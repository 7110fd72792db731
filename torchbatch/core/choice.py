"""Choose between functions: by a value that is the same for all samples, or for each sample by its own.

In the second case all functions run for all samples, and the results are selected. The gradient of a function that was not
chosen may be NaN, and zero times NaN is NaN. So where gradients may be asked for, a function sees each tensor as
``where(chosen, x, x.detach())``: the operands, and what it closes over too.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch

from torchbatch._torch import draw_state
from torchbatch.core import tree, weak
from torchbatch.core.argnums import flatten
from torchbatch.core.arrays import as_tensor
from torchbatch.core.carry import is_number, kind_of, number_as
from torchbatch.core.closures import tensors_in, with_tensors
from torchbatch.core.derivative import is_inexact
from torchbatch.core.describe import describe, function_name, shown
from torchbatch.core.recompute import Swap, needs_gradient
from torchbatch.core.scalars import looks_across
from torchbatch.errors import OutputTypeError

Function = Callable[..., Any]
_Tensor = torch.Tensor
_is_compiling = torch.compiler.is_compiling


def guarded(value: Any, chosen: torch.Tensor) -> Any:
    """A value whose gradient is zero for the samples in which ``chosen`` is false."""
    if not isinstance(value, _Tensor) or not is_inexact(value):
        return value
    return torch.where(chosen, value, value.detach()) if _is_compiling() or needs_gradient(value) else value


class _Guard(Swap):
    """Guards what a function closes over: each tensor that is neither an operand nor the result of an operation."""

    def __init__(self, chosen: torch.Tensor) -> None:
        super().__init__()
        self._chosen = chosen
        self._known: weakref.WeakValueDictionary[int, torch.Tensor] = weakref.WeakValueDictionary()
        self._guarded: list[tuple[torch.Tensor, torch.Tensor]] = []  # kept alive, so that an id stands for one tensor

    def replace(self, tensor: torch.Tensor) -> torch.Tensor:
        """The guarded tensor for one from outside."""
        seen = tensor if self.outer is None else self.outer.replace(tensor)
        key = id(seen)
        if key in self.instead:
            return self.instead[key]
        if key in self._known:
            return seen
        self._known[key] = seen
        found: torch.Tensor = guarded(seen, self._chosen)
        if found is seen:
            return seen
        self.instead[key] = self._known[id(found)] = found
        self._guarded.append((seen, found))
        return found

    def note(self, results: Sequence[Any]) -> None:
        """Results of operations are not from outside."""
        for leaf in results:
            if isinstance(leaf, _Tensor):
                self._known[id(leaf)] = leaf
        if self.outer is not None:
            self.outer.note(results)


def per_sample(masks: Sequence[torch.Tensor], functions: Sequence[Function], operands: tuple[Any, ...], who: str) -> Any:
    """For each sample the output of the function whose mask holds."""
    apart = draw_state.Apart()  # for each sample the keys of one function count
    outputs = [apart.run(_run, mask, function, operands) for mask, function in zip(masks, functions, strict=True)]
    check_structures(outputs, functions, who)
    columns = [list(column) for column in zip(*[flatten(output)[0] for output in outputs], strict=True)]
    chosen = [_chosen(masks, column, outputs[0], i, functions, who) for i, column in enumerate(columns)]
    return flatten(outputs[0])[1].unflatten(chosen)


def check_structures(outputs: Sequence[Any], functions: Sequence[Function], who: str) -> None:
    """Refuse branches that return different structures."""
    structures = [flatten(output)[1] for output in outputs]
    for output, structure, function in zip(outputs, structures, functions, strict=True):
        if structure != structures[0]:
            raise _other_structure(outputs[0], output, functions[0], function, who)


def _run(mask: torch.Tensor, function: Function, operands: tuple[Any, ...]) -> Any:
    if not torch.is_grad_enabled():
        return function(*operands)
    leaves, structure = flatten(operands)
    given = structure.unflatten([guarded(leaf, mask) for leaf in leaves])
    if _is_compiling():
        return function(*given)
    guard = _Guard(mask)
    guard.note(flatten(given)[0])
    if looks_across(mask):  # a collective reads a tensor in ways that the mode does not see
        function = _closing_over_guarded(function, mask, guard)
    with guard:
        return function(*given)


def _closing_over_guarded(function: Function, mask: torch.Tensor, guard: _Guard) -> Function:
    pairs = [(value, guarded(value, mask)) for value in tensors_in(function)]
    guard.note([new for _, new in pairs])
    return with_tensors(function, {id(value): new for value, new in pairs})  # type: ignore[no-any-return]


def _chosen(
    masks: Sequence[torch.Tensor], column: list[Any], output: Any, index: int, functions: Sequence[Function], who: str
) -> torch.Tensor:
    """One leaf of the output, given those of all functions."""
    values = alike(column, output, index, functions, who)
    result = values[-1]
    for mask, value in zip(masks[-2::-1], values[-2::-1], strict=True):
        result = torch.where(mask, value, result)
    return result


def alike(column: list[Any], output: Any, index: int, functions: Sequence[Function], who: str) -> list[torch.Tensor]:
    """The same leaf of several outputs, as tensors of one shape and dtype; Python numbers take that of the others."""
    values = [as_tensor(weak.strong(leaf)) for leaf in column]
    firm = [value for value, leaf in zip(values, column, strict=True) if not is_number(leaf)]
    like = firm[0] if firm else max(values, key=lambda value: -1 if value is None else kind_of(value.dtype))
    for i, (value, leaf) in enumerate(zip(values, column, strict=True)):
        if value is not None and like is not None and value.shape == like.shape:
            if value.dtype is like.dtype:
                continue
            if is_number(leaf) and kind_of(value.dtype) == kind_of(like.dtype):
                values[i] = number_as(leaf, value.device, like.dtype)
                continue
        place = next((k for k, other in enumerate(values) if other is like), 0)
        raise _other_type(column, i, like, output, index, (functions[place], functions[i]), who)
    return values  # type: ignore[return-value]


def as_tensors(output: Any, who: str, function: Function) -> Any:
    """The output of one function, with tensors for its leaves."""
    if type(output) is _Tensor:
        return output
    leaves, structure = flatten(output)
    return structure.unflatten([_as_tensor(leaf, output, i, who, function) for i, leaf in enumerate(leaves)])


def _as_tensor(leaf: Any, output: Any, index: int, who: str, function: Function) -> torch.Tensor:
    value = as_tensor(weak.strong(leaf))
    if value is None:
        where = tree.paths(output, "output")[index]
        raise OutputTypeError(f"{who}: {where} of {function_name(function)} is {shown(leaf)}, which is no array of numbers.")
    return value


def _other_structure(first: Any, other: Any, mine: Function, theirs: Function, who: str) -> OutputTypeError:
    return OutputTypeError(
        f"{who}: all branches must return the same structure, but {function_name(mine)} returns {flatten(first)[1]} and "
        f"{function_name(theirs)} returns {flatten(other)[1]}."
    )


def _other_type(
    column: list[Any], i: int, like: Any, output: Any, index: int, functions: tuple[Function, Function], who: str
) -> OutputTypeError:
    where = tree.paths(output, "output")[index]
    other = column[i]
    got = describe(other) if isinstance(other, _Tensor) else shown(other)
    return OutputTypeError(
        f"{who}: all branches must return identical types, but they differ at {where}: {function_name(functions[0])} returns "
        f"{describe(like)} and {function_name(functions[1])} returns {got}. Cast or reshape one of them."
    )
