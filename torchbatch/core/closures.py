"""The tensors in the closure of a function, and the same function with others in their place.

A mode that watches operations does not see a tensor that goes straight into a transform, or into a collective. Such a tensor
is nearly always a variable of a function around, so it is found in the cells of the functions, where it can be replaced too.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from types import CellType, FunctionType, MethodType, ModuleType
from typing import Any

import torch

_CONTAINERS = (FunctionType, MethodType, functools.partial, tuple, list, dict)
_new: Any = object.__new__
_DEPTH = 8  # how many objects, one in the other, are looked into


def tensors_in(value: Any) -> list[torch.Tensor]:
    """The tensors that a function closes over, also by way of other functions, tuples, lists and dicts.

    Objects are not looked into: a module may have many tensors that the function does not use.
    """
    finder = _Finder()
    finder.visit(value)
    return list(finder.found.values())


def with_tensors(value: Any, instead: Mapping[int, torch.Tensor]) -> Any:
    """A function that closes over other tensors, given by the ids of those that they replace; itself if it has none of them.

    Objects that hold such tensors, modules among them, are copied.
    """
    return _Replacer(instead).visit(value) if instead else value


class _Visitor:
    """Goes through functions and containers; what is left unchanged is not copied."""

    def __init__(self) -> None:
        self._seen: dict[int, Any] = {}
        self._inside = 0  # how many objects
        self._alive: list[Any] = []  # so that no other object gets the number of one that was seen

    def tensor(self, value: torch.Tensor) -> torch.Tensor:
        """What becomes of a tensor."""
        return value

    def visit(self, value: Any) -> Any:
        """What becomes of anything."""
        if isinstance(value, torch.Tensor):
            return self.tensor(value)
        if not self.opens(value):
            return value
        if id(value) not in self._seen:
            self._alive.append(value)
            self._seen[id(value)] = value  # a function may close over itself
            self._seen[id(value)] = self._visited(value)
        return self._seen[id(value)]

    def opens(self, value: Any) -> bool:
        """Whether to look into something."""
        return type(value) in _CONTAINERS or (isinstance(value, tuple) and hasattr(value, "_fields"))

    def _visited(self, value: Any) -> Any:
        if isinstance(value, FunctionType):
            return self._function(value)
        if isinstance(value, MethodType):
            function, owner = self.visit(value.__func__), self.visit(value.__self__)
            return value if function is value.__func__ and owner is value.__self__ else MethodType(function, owner)
        if isinstance(value, functools.partial):
            parts = self.visit((value.func, value.args, value.keywords))
            return value if parts[0] is value.func and parts[1] is value.args and parts[2] is value.keywords else _partial(*parts)
        if isinstance(value, dict):
            entries = {key: self.visit(item) for key, item in value.items()}
            return entries if any(entries[key] is not item for key, item in value.items()) else value
        if not isinstance(value, tuple | list):
            return self._object(value)
        items = [self.visit(item) for item in value]
        if all(a is b for a, b in zip(items, value, strict=True)):
            return value
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)

    def _object(self, value: Any) -> Any:
        self._inside += 1
        attributes = self.visit(vars(value))
        self._inside -= 1
        if attributes is vars(value):
            return value
        made = _new(type(value))
        made.__dict__.update(attributes)
        return made

    def _function(self, function: FunctionType) -> FunctionType:
        cells = tuple([self._cell(cell) for cell in function.__closure__ or ()])
        defaults = self.visit(function.__defaults__)
        by_name = self.visit(function.__kwdefaults__)
        same = defaults is function.__defaults__ and by_name is function.__kwdefaults__
        if same and all(a is b for a, b in zip(cells, function.__closure__ or (), strict=True)):
            return function
        made = FunctionType(function.__code__, function.__globals__, function.__name__, defaults, cells or None)
        made.__kwdefaults__, made.__qualname__ = by_name, function.__qualname__
        return made

    def _cell(self, cell: CellType) -> CellType:
        try:
            content = cell.cell_contents
        except ValueError:  # a variable that has no value yet
            return cell
        changed = self.visit(content)
        return cell if changed is content else CellType(changed)


def _partial(function: Any, args: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
    return functools.partial(function, *args, **keywords)


class _Finder(_Visitor):
    def __init__(self) -> None:
        super().__init__()
        self.found: dict[int, torch.Tensor] = {}

    def tensor(self, value: torch.Tensor) -> torch.Tensor:
        self.found[id(value)] = value
        return value


class _Replacer(_Visitor):
    def __init__(self, instead: Mapping[int, torch.Tensor]) -> None:
        super().__init__()
        self._instead = instead

    def opens(self, value: Any) -> bool:
        """Objects too, if an empty one of their class can be made."""
        if super().opens(value):
            return True
        is_object = hasattr(value, "__dict__") and not isinstance(value, type | ModuleType)
        return is_object and type(value).__new__ is _new and self._inside < _DEPTH

    def tensor(self, value: torch.Tensor) -> torch.Tensor:
        return self._instead.get(id(value), value)
