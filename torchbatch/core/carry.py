"""What a loop carries from step to step: its structure, shapes, dtypes and devices stay as they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from torchbatch._torch import draw_state, levels
from torchbatch.core import tree, weak
from torchbatch.core.arrays import as_tensor
from torchbatch.core.describe import describe, function_name, shown
from torchbatch.errors import InPlaceError, InputTypeError, OutputTypeError

_Tensor = torch.Tensor
_NUMBERS = (bool, int, float, complex)


def kind_of(dtype: torch.dtype) -> int:
    """0 for bool, 1 for integers, 2 for floating point, 3 for complex numbers."""
    if dtype is torch.bool:
        return 0
    return 3 if dtype.is_complex else 2 if dtype.is_floating_point else 1


class Promoted(Exception):  # noqa: N818 (it is no error)
    """The first step gave a Python number of the carry another type: call ``promote``, and begin again."""


class Carry:
    """The carry of a loop at its beginning, and the check that what a step returns is like it.

    Args:
        value: the initial value.
        who, what: how an error calls the loop, and its parameter that holds ``value``.
    """

    def __init__(self, value: Any, who: str, what: str) -> None:
        self.who, self._what = who, what
        given, self.structure = tree.flatten(value)
        self._given = given
        self.leaves = [self._tensor(leaf, value, i) for i, leaf in enumerate(given)]
        self._is_number = [is_number(leaf) for leaf in given]
        self._bare = self.structure == tree.LEAF
        self._pending: dict[int, tuple[torch.device, torch.dtype]] = {}
        self._draws = draw_state.Apart()
        self._note()

    @property
    def has_numbers(self) -> bool:
        """Whether something in the initial value is a Python number, whose dtype gives way."""
        return any(self._is_number)

    @property
    def value(self) -> Any:
        """The initial value, with tensors for leaves."""
        return self.leaves[0] if self._bare else self.structure.unflatten(self.leaves)

    def rebuild(self, leaves: Sequence[torch.Tensor]) -> Any:
        """The carry with these leaves."""
        return leaves[0] if self._bare else self.structure.unflatten(leaves)

    def like(self, value: Any) -> Carry:
        """Another carry of the same loop."""
        return Carry(value, self.who, self._what)

    def fit(self, output: Any, fun: Any) -> tuple[Any, list[torch.Tensor]]:
        """What a step returned as the next carry, and its leaves.

        Raises:
            OutputTypeError: it is not like the initial value.
            Promoted: Python numbers of the initial value have taken the type that the step gives them.
        """
        if type(output) is _Tensor and self._bare and self._is_like(output, 0):
            return output, [output]
        leaves, structure = tree.flatten(output)
        if structure != self.structure:
            raise self._other_structure(output, fun)
        for i, leaf in enumerate(leaves):
            if not isinstance(leaf, _Tensor) or not self._is_like(leaf, i) or _is_weak(leaf):
                leaves = self._cast(leaves, output, fun)
                return self.rebuild(leaves), leaves
        return output, leaves

    def _is_like(self, leaf: torch.Tensor, index: int) -> bool:
        return leaf.dtype is self._dtypes[index] and leaf.shape == self._shapes[index] and self._is_beside(leaf, index)

    def _is_beside(self, leaf: torch.Tensor, index: int) -> bool:
        """Whether a tensor is on the device of the carry; the meta device stands for any, where only shapes are asked for."""
        device = self._devices[index]
        return leaf.device == device or leaf.device.type == "meta" or device.type == "meta"

    def _cast(self, given: list[Any], output: Any, fun: Any) -> list[torch.Tensor]:
        """The leaves as tensors; numbers give way to the carry, and numbers of the initial value to what came out."""
        found = [as_tensor(weak.strong(leaf)) for leaf in given]
        for i, (value, leaf) in enumerate(zip(found, given, strict=True)):
            if value is None or value.shape != self._shapes[i]:
                raise self._other_type(i, leaf, output, fun)
            if self._is_like(value, i):
                continue
            if is_number(leaf) and kind_of(value.dtype) <= kind_of(self._dtypes[i]):
                found[i] = number_as(leaf, self._devices[i], self._dtypes[i])
            elif self._is_number[i] and kind_of(self._dtypes[i]) <= kind_of(value.dtype):
                self._pending[i] = (self._devices[i] if self._is_beside(value, i) else value.device), value.dtype
                self._is_number[i] = is_number(leaf)
            else:
                raise self._other_type(i, leaf, output, fun)
        if self._pending:
            raise Promoted
        return found  # type: ignore[return-value]

    def promote(self) -> None:
        """Begin again with numbers of the types that a step gave them; to be called after :class:`Promoted`."""
        for i, (device, dtype) in self._pending.items():
            self.leaves[i] = self._given[i] = number_as(self._given[i], device, dtype)
        self._pending = {}
        self._draws.undo()  # the step that ran will run again
        self._note()

    def _note(self) -> None:
        self._dtypes = [leaf.dtype for leaf in self.leaves]
        self._shapes = [leaf.shape for leaf in self.leaves]
        self._devices = [leaf.device for leaf in self.leaves]

    def _tensor(self, leaf: Any, value: Any, index: int) -> torch.Tensor:
        found = as_tensor(weak.strong(leaf))
        if found is None:
            raise InputTypeError(
                f"{self.who}: {_path(value, index, self._what)} is {shown(leaf)}, but a loop carries arrays and numbers only. "
                "Bind anything else to the function with functools.partial, or close over it."
            )
        return found

    def _other_structure(self, output: Any, fun: Any) -> OutputTypeError:
        found = None if self._bare else tree.first_difference(self.rebuild(self.leaves), output)
        if found is None:
            where = f"{self._what} has the structure {self.structure}, the new value {tree.flatten(output)[1]}."
        else:
            where = f"{self._what}{found[0]} goes in as {found[1]} and comes out as {found[2]}. Return it as it goes in."
        return OutputTypeError(f"{self._head(fun)} have identical structure, but they differ. {where}")

    def _other_type(self, index: int, leaf: Any, output: Any, fun: Any) -> OutputTypeError:
        where = _path(output, index, self._what)
        got = describe(leaf) if isinstance(leaf, _Tensor) else shown(leaf)
        went_in, advice = describe(self.leaves[index]), "the dtype and shape that the function returns, or cast or reshape"
        if isinstance(leaf, _Tensor) and not self._is_beside(leaf, index):
            went_in, got = f"{went_in} on {self._devices[index]}", f"{got} on {leaf.device}"
            advice = "the type and device that the function returns, or move (.to) or cast"
        return OutputTypeError(
            f"{self._head(fun)} have identical types, but they differ at {where}: it goes in as {went_in} and comes out as "
            f"{got}. Give {self._what} {advice} what it returns."
        )

    def _head(self, fun: Any) -> str:
        return f"{self.who}: the input and the output of {function_name(fun)} must"


def _is_weak(leaf: Any) -> bool:
    return weak.active.numbers is not None and weak.active.numbers.is_weak(leaf)


def is_number(leaf: Any) -> bool:
    """Whether a value gives way to others in promotion: a Python number, or what jit made of one."""
    return isinstance(leaf, _NUMBERS) or _is_weak(leaf)


def number_as(number: Any, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """A number as a tensor, with all its digits."""
    return number.to(device, dtype) if isinstance(number, _Tensor) else torch.tensor(number, device=device, dtype=dtype)


def _path(value: Any, index: int, root: str) -> str:
    return tree.paths(value, root)[index]


def marks(leaves: Sequence[torch.Tensor]) -> list[int]:
    """How often each tensor has been written in place."""
    if torch.is_inference_mode_enabled():
        return []
    return [levels.innermost(leaf)._version for leaf in leaves]


def check_kept(leaves: Sequence[torch.Tensor], new: Sequence[torch.Tensor], before: Sequence[int], who: str, fun: Any) -> None:
    """Refuse a step that hands on a part of its carry after writing into it: earlier values would change with it.

    Raises:
        InPlaceError: it did.
    """
    for old, mark in zip(leaves, before, strict=False):
        if levels.innermost(old)._version != mark and any(value is old for value in new):
            raise InPlaceError(
                f"{who}: {function_name(fun)} writes in place into its carry, which holds values that other steps return too. "
                "Return a new value: carry + x in the place of carry += x."
            )
