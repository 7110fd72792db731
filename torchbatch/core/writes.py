"""Whether a function may write into a tensor that it makes, or keep a value beyond its call, read off its code.

Tensors made inside a mapped function can be written with per-sample values; that takes a look at every tensor that is made,
PyTorch's own temporaries included, which would make functions slower that never write. So the code is read first: the
function, what it calls by name, what it closes over, the ``forward`` of its modules. Where something cannot be followed, the
answer is yes.
"""

from __future__ import annotations

import builtins
import dis
import functools
import inspect
import sys
import types
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch

from torchbatch._torch.modules import global_hooks, hooks_of
from torchbatch.core.wrapper import Wrapper

_FOLLOWED = (3, 11) <= sys.version_info[:2] <= (3, 13)
_MOST_KNOWN = 4096
_MOST_FOLLOWED = 200  # how many functions and modules are followed before the answer is simply yes


def may_write(fun: Callable[..., Any]) -> bool:
    """False only if nothing that ``fun`` is seen to call writes in place, gives ``out=``, or is unknown."""
    return _followed(fun) is None


def may_keep(fun: Callable[..., Any]) -> bool:
    """False only if nothing that ``fun`` is seen to call can store a value where it outlives the call, or is unknown.

    Places to store one are globals, variables of enclosing functions, attributes, and lists, dicts and sets from outside.
    """
    followed = _followed(fun)
    return followed is None or any(_keeps(thing) for thing in followed)


def _followed(fun: Callable[..., Any]) -> list[Any] | None:
    """All that ``fun`` may call or reads from outside; None if it may write in place, or something cannot be followed."""
    if not _FOLLOWED:
        return None
    waiting: list[Any] = [fun]
    seen: dict[Any, Any] = {}  # keeps what it has seen alive, for the sake of the ids
    while waiting:
        thing = waiting.pop()
        mark = _mark(thing)
        if mark in seen:
            continue
        seen[mark] = thing
        if len(seen) > _MOST_FOLLOWED:
            return None
        reached = _reach(thing)
        if reached is None:
            return None
        waiting += reached
    return list(seen.values())


_STORES = frozenset({"STORE_GLOBAL", "STORE_ATTR", "DELETE_GLOBAL", "YIELD_VALUE", "RETURN_GENERATOR"})


def _keeps(thing: Any) -> bool:
    if isinstance(thing, types.MethodType):
        return _keeps(thing.__func__)
    if isinstance(thing, types.FunctionType) and not _in_library(thing.__globals__.get("__name__", "")):
        return _stores(thing.__code__)
    owner = getattr(thing, "__self__", thing) if isinstance(thing, types.BuiltinFunctionType) else thing
    return isinstance(owner, list | dict | set | deque)


@functools.lru_cache(maxsize=_MOST_KNOWN)
def _stores(code: types.CodeType) -> bool:
    """Whether a code object, or one nested in it, stores into a global, an attribute or an enclosing function's variable."""
    for now in dis.get_instructions(code):
        if now.opname in _STORES or (now.opname == "STORE_DEREF" and now.argval in code.co_freevars):
            return True
    return any(_stores(inner) for inner in code.co_consts if isinstance(inner, types.CodeType))


def _mark(thing: Any) -> Any:
    """What tells ``thing`` from others; a method is a new object whenever it is asked for."""
    return (id(thing.__func__), id(thing.__self__)) if isinstance(thing, types.MethodType) else id(thing)


def _reach(thing: Any) -> list[Any] | None:
    """What calling ``thing`` may call in turn; None if it may write, or cannot be followed."""
    name = getattr(thing, "__name__", "")
    if _named_in_place(name) or (getattr(thing, "__module__", "") == "_operator" and name in _OPERATOR_WRITES):
        return None
    if isinstance(thing, functools.partial):
        return [thing.func, *thing.args, *thing.keywords.values()]
    if isinstance(thing, types.MethodType) and isinstance(thing.__func__, types.FunctionType):
        return _reach_method(thing.__func__, thing.__self__)
    if isinstance(thing, torch.nn.Module):
        return _reach_module(thing)
    if isinstance(thing, types.FunctionType):
        return _reach_function(thing, None)
    if isinstance(thing, tuple | list | dict):
        items = thing.values() if isinstance(thing, dict) else thing
        return [item for item in items if callable(item) or isinstance(item, tuple | list | dict)]
    if isinstance(thing, Wrapper):
        return [thing.__wrapped__]
    return [] if _is_harmless(thing) else None


_DATA = (torch.Tensor, torch.dtype, torch.device, np.ndarray, np.generic, bool, int, float, complex, str, bytes, type(None))
_PLAIN = (types.ModuleType, types.BuiltinFunctionType, types.MethodDescriptorType, types.WrapperDescriptorType, *_DATA)


def _is_harmless(thing: Any) -> bool:
    """Whether ``thing`` is no Python code of the user's: data, a module of functions, a built-in, a class of a library."""
    if isinstance(thing, _PLAIN):
        return True
    if isinstance(thing, type):
        return _is_library(thing)
    return callable(thing) and _is_library(type(thing)) and not _is_custom_operator(thing)


def _is_custom_operator(thing: Any) -> bool:
    """Whether ``thing`` is an operator of another library than PyTorch's, which may write into its arguments."""
    module = type(thing).__module__
    return module.startswith("torch._library") or (module == "torch._ops" and not str(thing).startswith("aten."))


_OPERATOR_WRITES = frozenset(
    "iadd iand iconcat ifloordiv ilshift imatmul imod imul ior ipow irshift isub itruediv ixor setitem".split()
)


_METHOD_WRITES = frozenset(f"__{name}__" for name in _OPERATOR_WRITES)


def _named_in_place(name: Any) -> bool:
    """Whether a function of this name writes in place, by PyTorch's convention or Python's."""
    return isinstance(name, str) and name.endswith("_") and (not name.endswith("__") or name in _METHOD_WRITES)


def _is_library(thing: Any) -> bool:
    return _in_library(getattr(thing, "__module__", None) or "")


def _in_library(module: str) -> bool:
    return module.partition(".")[0] in ("torch", "numpy", "math", "builtins", "torchbatch")


def _reach_module(module: torch.nn.Module) -> list[Any] | None:
    own = [m for m in module.modules() if not _is_library(type(m)) or "forward" in m.__dict__]
    hooks = [*global_hooks(), *(hook for m in module.modules() for hook in hooks_of(m))]
    if any(getattr(m, "inplace", False) for m in module.modules()):
        return None
    return [*(m.forward for m in own), *hooks]


def _reach_method(fun: types.FunctionType, owner: Any) -> list[Any] | None:
    if not _in_library(fun.__globals__.get("__name__", "")):
        return _reach_function(fun, owner)
    if isinstance(owner, torch.nn.Module):
        return [] if fun.__name__ == "forward" else _reach_module(owner)
    cls = owner if isinstance(owner, type) else type(owner)
    return [] if _is_library(cls) else None  # it may call what a user's class overrides


def _reach_function(fun: types.FunctionType, owner: Any) -> list[Any] | None:
    cells = dict(zip(fun.__code__.co_freevars, fun.__closure__ or (), strict=True))
    closed = [cell.cell_contents for cell in cells.values() if cell != types.CellType()]
    if _in_library(fun.__globals__.get("__name__", "")):
        return [item for item in closed if callable(item)]
    facts = _facts(fun.__code__)
    if facts is None:
        return None
    named = []
    for path in facts.calls:
        found = _resolve(path, fun.__globals__)
        if found is _UNKNOWN:
            return None
        named.append(found)
    for name in facts.own:
        found = None if owner is None and name in _DATA_ATTRIBUTES else _UNKNOWN
        found = found if owner is None else _attribute(owner, name)
        if found is _UNKNOWN:
            return None
        named.append(found)
    return [*closed, *named, *(fun.__defaults__ or ()), *(fun.__kwdefaults__ or {}).values()]


_UNKNOWN = object()


def _attribute(owner: Any, name: str) -> Any:
    """An attribute, without running the code of a property."""
    if isinstance(owner, types.ModuleType):
        return getattr(owner, name, _UNKNOWN)
    found = inspect.getattr_static(type(owner), name, None)
    if isinstance(found, property):
        return types.MethodType(found.fget, owner) if isinstance(found.fget, types.FunctionType) else _UNKNOWN
    if isinstance(found, functools.cached_property):
        return types.MethodType(found.func, owner)
    return getattr(owner, name, _UNKNOWN)


def _resolve(path: tuple[str, ...], variables: dict[str, Any]) -> Any:
    """The value of a dotted global name."""
    value = variables.get(path[0], getattr(builtins, path[0], _UNKNOWN))
    for name in path[1:]:
        if isinstance(value, _DATA):
            return value
        value = _attribute(value, name)
    return _UNKNOWN if path[-1] in _HIDES else value


# What may call or write something that the code does not name.
_HIDES = frozenset({"eval", "exec", "filter", "getattr", "globals", "locals", "map", "reduce", "setattr", "vars", "__import__"})


class _Facts(NamedTuple):
    """What a code object reads of its surroundings: dotted global names, attributes of its first argument.

    And the variables of enclosing functions that it calls.
    """

    calls: tuple[tuple[Any, ...], ...]
    own: tuple[str, ...]
    enclosing: tuple[str, ...]


_known: dict[types.CodeType, _Facts | None] = {}


def _facts(code: types.CodeType) -> _Facts | None:
    """The facts of a code object and the ones nested in it; None if it may write or calls something unknown."""
    if code not in _known:
        if len(_known) >= _MOST_KNOWN:
            _known.clear()
        _known[code] = _read(code)
    return _known[code]


def _read(code: types.CodeType) -> _Facts | None:
    calls: list[tuple[Any, ...]] = []
    own: list[str] = []
    enclosing: list[str] = []
    first = code.co_varnames[0] if code.co_argcount else None
    instructions = [i for i in dis.get_instructions(code) if i.opname not in ("CACHE", "RESUME", "EXTENDED_ARG", "NOP")]
    for before, now in zip([None, *instructions], instructions, strict=False):
        if _writes(now) or _calls_local(before, now):
            return None
        enclosing += _called_from_outside(before, now)
    if any(isinstance(constant, tuple) and {"out", "inplace"} & set(constant) for constant in code.co_consts):
        return None  # the names of keyword arguments are a constant
    for path in _paths(instructions, first):
        if path is None:
            return None
        if path[0] is None:
            own.append(path[1])
        else:
            calls.append(path)
    for inner in (c for c in code.co_consts if isinstance(c, types.CodeType)):
        facts = _facts(inner)
        if facts is None:
            return None
        calls += facts.calls
        own += facts.own
        enclosing += facts.enclosing
    if set(enclosing) & set(code.co_cellvars):
        return None  # a local variable, called by a function inside
    return _Facts(tuple(calls), tuple(own), tuple(enclosing))


def _writes(now: dis.Instruction) -> bool:
    if now.opname in ("STORE_SUBSCR", "STORE_SLICE", "IMPORT_NAME"):
        return True
    if now.opname == "STORE_ATTR":
        return now.argval in ("real", "imag", "data")
    if now.opname == "BINARY_OP":
        return now.argrepr.endswith("=")
    if now.opname == "CALL_FUNCTION_EX":
        return bool((now.arg or 0) & 1)  # **options may hold out=
    if not now.opname.startswith("LOAD_") or now.opname == "LOAD_CONST":
        return False
    return now.argval == "autocast" or _named_in_place(now.argval)  # autocast needs the same look at operators


def _calls_local(before: dis.Instruction | None, now: dis.Instruction) -> bool:
    """Whether a callable held by a local variable is about to be called, which cannot be followed."""
    pair = {before.opname if before is not None else "", now.opname}
    return "PUSH_NULL" in pair and bool(pair & {"LOAD_FAST", "LOAD_FAST_CHECK", "LOAD_DEREF_LOCAL"})


def _called_from_outside(before: dis.Instruction | None, now: dis.Instruction) -> list[str]:
    """The variable of an enclosing function that is about to be called, if one is."""
    pair = [i for i in (before, now) if i is not None]
    called = "PUSH_NULL" in {i.opname for i in pair}
    return [str(i.argval) for i in pair if called and i.opname == "LOAD_DEREF"]


_DATA_ATTRIBUTES = frozenset(dir(torch.Tensor)) | frozenset(dir(dict)) | frozenset(dir(list)) | frozenset(dir(str))


def _paths(instructions: list[dis.Instruction], first: str | None) -> Iterator[tuple[Any, ...] | None]:
    """The dotted global names that are read, and ``(None, name)`` for attributes of the variable ``first``.

    None stands for an attribute of something else, unless tensors or containers have one of that name.
    """
    path: list[str] = []
    before = None
    for now in instructions:
        if now.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            if path:
                yield tuple(path)
            path = [now.argval]
        elif now.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            if path:
                path.append(now.argval)
            elif before is not None and before.opname == "LOAD_FAST" and before.argval == first:
                yield (None, now.argval)
            elif now.argval not in _DATA_ATTRIBUTES:
                yield None
        elif now.opname.startswith("LOAD_SUPER"):
            yield None
        elif path and now.opname != "PUSH_NULL":
            yield tuple(path)
            path = []
        before = now
    if path:
        yield tuple(path)
