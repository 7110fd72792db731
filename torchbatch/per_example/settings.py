"""The Python values that a loss depends on. A trace goes on with those that it saw, so each call looks at them again."""

from __future__ import annotations

import dis
import functools
import itertools
import types
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from torchbatch._torch.modules import computed_anew

_DEEP = 3  # how far containers and objects are followed
_MOST_ITEMS = 1000  # of one container
_PLAIN = frozenset(
    {bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size, torch.layout, torch.memory_format}
)
_OF_EVERY_MODULE = frozenset(vars(nn.Module())) | {"training"}
_LIBRARIES = frozenset({"torch", "numpy", "builtins", "functools", "torchbatch", "abc", "typing", "collections"})
_BY_IDENTITY = (Tensor, types.FunctionType, types.BuiltinFunctionType)


class Setting(NamedTuple):
    """A value under a name; of another kind is another value, so that 1 is not 1.0."""

    name: str
    kind: type
    value: Any


class _Same:
    """A tensor or a function, which is equal to itself only."""

    __slots__ = ("thing",)

    def __init__(self, thing: Any) -> None:
        self.thing = thing

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.thing is self.thing

    def __hash__(self) -> int:
        return id(self.thing)


class Settings(tuple[Setting, ...]):
    """What was found at one call."""

    def changed(self, before: Settings) -> list[str]:
        """The names of what differs."""
        return sorted({mine.name for mine in set(self) ^ set(before)})


def settings_of(*roots: Any) -> Settings:
    """The Python values that modules and functions hold or refer to: attributes, hooks, closures, global names."""
    walk = _Walk()
    for root in roots:
        walk.take("", root, _DEEP)
    return Settings(walk.found)


class _Walk:
    def __init__(self) -> None:
        self.found: list[Setting] = []
        self._seen: dict[int, Any] = {}  # keeps what it has seen alive, for the sake of the ids

    def take(self, name: str, value: Any, depth: int) -> None:
        kind = type(value)
        if kind in _PLAIN:
            self.found.append(Setting(name, kind, value))
            return
        if issubclass(kind, _BY_IDENTITY):
            self.found.append(Setting(name, kind, _Same(value)))
        if id(value) in self._seen or not depth or issubclass(kind, Tensor):
            return
        self._seen[id(value)] = value
        if issubclass(kind, nn.Module):
            self._module(value)
            return
        for inner, referred in _referred(name, value, kind):
            self.take(inner, referred, depth - 1)

    def _module(self, module: nn.Module) -> None:
        held = vars(module)
        for name, value in tuple(held.items()):
            if name in _OF_EVERY_MODULE:
                if value and type(value) is OrderedDict:
                    self._hooks(value)
            elif type(value) in _PLAIN:
                self.found.append(Setting(name, type(value), value))
            elif name not in computed_anew(module):
                self.take(name, value, _DEEP - 1)
        kind: Any = type(module)
        for name, value in _globals_of_class(kind) if _methods(kind) else ():
            self.take(name, value, _DEEP - 1)
        for child in tuple(held.get("_modules", {}).values()):
            self.take("", child, _DEEP)

    def _hooks(self, hooks: OrderedDict[int, Any]) -> None:
        for hook in tuple(hooks.values()):
            self.take("a hook", hook, _DEEP - 1)


def _referred(name: str, thing: Any, kind: type) -> Iterable[tuple[str, Any]]:
    """What a function, a container or an object of a user's class refers to."""
    if issubclass(kind, types.FunctionType):
        return _by_function(thing)
    if issubclass(kind, types.MethodType):
        return [(name, thing.__func__), (name, thing.__self__)]
    if issubclass(kind, functools.partial):
        return [(name, value) for value in (thing.func, *thing.args, *thing.keywords.values())]
    if issubclass(kind, dict):
        return [(f"{name}[{key!r}]", value) for key, value in itertools.islice(tuple(thing.items()), _MOST_ITEMS)]
    if issubclass(kind, list | tuple):
        return [(name, value) for value in itertools.islice(thing, _MOST_ITEMS)]
    if issubclass(kind, type | types.ModuleType) or _in_library(kind.__module__):
        return []
    return [*tuple(getattr(thing, "__dict__", {}).items()), *_globals_of_class(kind)]


def _by_function(fun: types.FunctionType) -> list[tuple[str, Any]]:
    cells = zip(fun.__code__.co_freevars, fun.__closure__ or (), strict=True)
    found = [(name, cell.cell_contents) for name, cell in cells if cell != types.CellType()]
    if _in_library(fun.__module__):
        return found
    defaults = [("a default", value) for value in (*(fun.__defaults__ or ()), *(fun.__kwdefaults__ or {}).values())]
    return [*found, *defaults, *_globals(fun)]


def _globals(fun: types.FunctionType) -> Iterator[tuple[str, Any]]:
    return ((name, fun.__globals__[name]) for name in _global_names(fun.__code__) if name in fun.__globals__)


@functools.lru_cache(maxsize=1000)
def _global_names(code: types.CodeType) -> tuple[str, ...]:
    """The global variables that code reads, and that functions in it read."""
    names = {step.argval for step in dis.get_instructions(code) if step.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            names.update(_global_names(inner))
    return tuple(sorted(names))


def _globals_of_class(kind: type) -> Iterator[tuple[str, Any]]:
    for fun in _methods(kind):
        yield from _globals(fun)


@functools.lru_cache(maxsize=1000)
def _methods(kind: type) -> tuple[types.FunctionType, ...]:
    """The methods that the users' classes among those of ``kind`` define."""
    mine = [base for base in kind.__mro__ if not _in_library(base.__module__)]
    return tuple(member for base in mine for member in vars(base).values() if isinstance(member, types.FunctionType))


def _in_library(name: Any) -> bool:
    return str(name).partition(".")[0] in _LIBRARIES
