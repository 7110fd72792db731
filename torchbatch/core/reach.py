"""Which modules a function can get hold of: what it closes over, names, is bound to, and what these refer to in turn.

A module may be read without being run: a helper asks ``model.training``, or computes with ``model.weight``. This is a search by
reference and not by meaning, so it finds too many rather than too few; what a function imports or looks up when it runs is not
found.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import types
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

from torchbatch._torch.modules import hooks_of, own_attributes
from torchbatch.core.wrapper import Wrapper

_MOST = 2000  # how many objects are looked at
_MOST_ITEMS = 1000  # of one container
_DATA = (torch.Tensor, np.ndarray, np.generic, bool, int, float, complex, str, bytes, torch.dtype, torch.device, type(None))


def modules_of(roots: Iterable[Any]) -> list[nn.Module]:
    """The modules that functions and objects refer to, without their submodules."""
    waiting = deque(roots)
    seen: dict[int, Any] = {}  # keeps what it has seen alive, for the sake of the ids
    while waiting and len(seen) < _MOST:
        thing = waiting.popleft()
        if issubclass(type(thing), _DATA) or id(thing) in seen:
            continue
        seen[id(thing)] = thing
        waiting += _referred(thing)
    return [thing for thing in seen.values() if issubclass(type(thing), nn.Module)]


def _referred(thing: Any) -> Iterable[Any]:
    """What ``thing`` refers to, so far as a user's code does it."""
    kind = type(thing)  # isinstance would run the code of a proxy
    if issubclass(kind, types.FunctionType):
        return _by_function(thing)
    if issubclass(kind, types.MethodType):
        return [thing.__func__, thing.__self__]
    if issubclass(kind, functools.partial):
        return [thing.func, *thing.args, *thing.keywords.values()]
    if issubclass(kind, Wrapper):
        return [thing.__wrapped__]
    if issubclass(kind, dict):
        return itertools.islice(thing.values(), _MOST_ITEMS)
    if issubclass(kind, list | tuple | set | frozenset | deque):
        return itertools.islice(thing, _MOST_ITEMS)
    if issubclass(kind, type):
        return _by_class(thing)
    return _by_object(thing)


def _by_function(fun: types.FunctionType) -> list[Any]:
    cells = [cell.cell_contents for cell in fun.__closure__ or () if cell != types.CellType()]
    found = [*cells, *vars(fun).values()]
    if _in_library(fun.__globals__.get("__name__")):
        return found
    return [*found, *(fun.__defaults__ or ()), *(fun.__kwdefaults__ or {}).values(), *_globals(fun)]


def _globals(fun: types.FunctionType) -> Iterator[Any]:
    """The global variables that a function names; of a Python module those members that it names too."""
    names = set(_names(fun.__code__))
    for name in names & fun.__globals__.keys():
        value = fun.__globals__[name]
        if isinstance(value, types.ModuleType):
            members = vars(value)
            yield from (members[member] for member in names & members.keys() if not _in_library(value.__name__))
        else:
            yield value


def _names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            yield from _names(inner)


def _by_object(thing: Any) -> list[Any]:
    """The attributes of an object, and what its class defines."""
    kind = type(thing)
    if issubclass(kind, nn.Module):
        return [*own_attributes(thing).values(), *hooks_of(thing), *thing.children(), *_by_class(kind)]
    if issubclass(kind, types.ModuleType) or _is_library(kind):
        return []
    own: dict[str, Any] = {}
    with contextlib.suppress(AttributeError):
        own = object.__getattribute__(thing, "__dict__")
    return [*own.values(), *_by_class(kind)]


def _by_class(kind: type) -> Iterator[Any]:
    """The functions and modules that the users' classes among those of ``kind`` hold."""
    for base in kind.__mro__:
        for member in () if _is_library(base) else tuple(vars(base).values()):
            found = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
            found = found.func if isinstance(found, functools.cached_property) else found
            if isinstance(found, types.FunctionType | nn.Module):
                yield found


def _is_library(kind: type) -> bool:
    return _in_library(kind.__module__)


def _in_library(name: Any) -> bool:
    return str(name).partition(".")[0] in ("torch", "numpy", "builtins", "functools", "torchbatch", "abc", "typing")
