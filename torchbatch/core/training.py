"""The modules that a traced function runs or refers to: what a trace depends on beside its arguments.

``model.eval()`` changes a Python value, and ``model.double()`` may put another tensor in the place of a buffer; a trace would go
on as before. These are the changes that everybody makes, so the modules are remembered with the trace. What a function does to
the attributes of a module happens only while it is traced: if it puts a value of the trace there, that is an error.
"""

from __future__ import annotations

import gc
import itertools
import operator
import threading
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.parameter import is_lazy

from torchbatch._torch.graphs import is_of_trace
from torchbatch._torch.modules import computed_anew, dict_version, held_by, own_attributes, tensors_of
from torchbatch.core.describe import describe
from torchbatch.core.reach import modules_of
from torchbatch.errors import LeakedTracerError, UnsupportedOperationError


class Modules:
    """Modules as they are when this is made: whether each trains, and what it holds."""

    def __init__(self, modules: Sequence[nn.Module] = ()) -> None:
        self._modules = modules
        self._modes = list(map(_training, modules))
        self._dicts = [held for module in modules for held in held_by(module) if held]
        self._versions = list(map(dict_version, self._dicts))  # first, in case that another thread writes
        self._values = [*_values(self._dicts), _END]
        self._names = _names(modules)
        self._before = self._described()

    def __bool__(self) -> bool:
        return bool(self._modules)

    def same(self) -> bool:
        """Whether all are in the mode that they were in, and hold the same parameters, buffers and submodules."""
        return list(map(_training, self._modules)) == self._modes and (
            list(map(dict_version, self._dicts)) == self._versions or self._hold_the_same()
        )

    def _hold_the_same(self) -> bool:
        """The dicts were written to, but perhaps as they had been, as ``functional_call`` does."""
        versions = list(map(dict_version, self._dicts))
        same = all(map(operator.is_, itertools.chain(_values(self._dicts), (_END,)), self._values))
        if same:
            self._versions = versions
        return same

    def changes(self) -> tuple[dict[str, str], dict[str, str]]:
        """What is not as it was: by name and in words, as it was and as it is."""
        before, now = self._before, self._described()
        changed = [name for name in {**before, **now} if before.get(name) is not now.get(name)]
        was = {name: _in_words(before[name]) for name in changed if name in before}
        new = {name: _in_words(now[name]) for name in changed if name in now}
        return was, {name: f"another {text}" if was.get(name) == text else text for name, text in new.items()}

    def _described(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, module in zip(self._names, self._modules, strict=True):
            found[f"module {name}"] = _TRAINING if module.training else _EVALUATION
            for held in held_by(module):
                found |= {f"{entry} of module {name}": value for entry, value in held.items()}
        return found


_training = operator.attrgetter("training")
_TRAINING, _EVALUATION = "training", "evaluation"
_END = object()


def _values(dicts: Sequence[dict[str, Any]]) -> Iterator[Any]:
    return itertools.chain.from_iterable(map(dict.values, dicts))


def _in_words(value: Any) -> str:
    if isinstance(value, str):
        return value
    return "None" if value is None else describe(value) if isinstance(value, torch.Tensor) else type(value).__name__


def _names(modules: Sequence[nn.Module]) -> list[str]:
    """The class of a module, or the name that it has in one of the others."""
    found: dict[int, str] = {}
    taken: set[str] = set()
    for module in modules:
        name = root = type(module).__name__
        numbers = itertools.count(2)
        while id(module) not in found and name in taken:
            name = f"{root} no. {next(numbers)}"
        for path, inner in module.named_modules():
            found.setdefault(id(inner), f"{name}.{path}" if path else name)
        taken.add(name)
    return [found[id(module)] for module in modules]


class _Before(NamedTuple):
    """A module before the trace, and for each name in its dicts a value with the number of values of traces in it."""

    module: weakref.ref[nn.Module]
    entries: list[dict[str, tuple[Any, int]]]


class RanModules:
    """A context in which the modules that this thread runs are noted, beside those that ``roots`` refer to.

    Raises:
        UnsupportedOperationError: a module without shapes yet is run.
        LeakedTracerError: (at its end) a value of the trace is found in a module; the old value is put back.
    """

    def __init__(self, roots: Iterable[Any] = ()) -> None:
        self._roots = roots
        self._noted: dict[int, _Before] = {}

    def __enter__(self) -> RanModules:
        self._thread = threading.get_ident()
        for module in modules_of(self._roots):
            self._note(module)
        self._handle = register_module_forward_pre_hook(self._before_forward)
        return self

    def __exit__(self, kind: Any, *error: object) -> None:
        self._handle.remove()
        found = self._leaks()
        if not found:
            return
        gc.collect()  # a module that was made inside may wait for it
        said = [_put_back(before, entries, name) for before, entries, name in found if before.module() is not None]
        if said and kind is None:
            raise said[0]

    def _before_forward(self, module: nn.Module, args: Any) -> None:
        if threading.get_ident() == self._thread:
            _check_has_shapes(module)
            self._note(module)

    def _note(self, module: nn.Module) -> None:
        if self._is_known(module):
            return
        for inner in module.modules():
            if not self._is_known(inner):
                self._noted[id(inner)] = _Before(weakref.ref(inner), [_noted(entries) for entries in _attributes(inner)])

    def _is_known(self, module: nn.Module) -> bool:
        known = self._noted.get(id(module))
        return known is not None and known.module() is module

    def _alive(self) -> Iterator[tuple[_Before, nn.Module]]:
        for before in self._noted.values():
            module = before.module()
            if module is not None:
                yield before, module

    def _leaks(self) -> list[tuple[_Before, int, str]]:
        """Where values of the trace are that were not there before."""
        return [
            (before, i, name)
            for before, module in self._alive()
            for i, entries in enumerate(_attributes(module))
            for name, value in entries.items()
            if _count(value) > before.entries[i].get(name, _ABSENT)[1] and name not in computed_anew(module)
        ]

    def found(self) -> Modules:
        """The modules that are still there, as they are now."""
        alive = [module for _, module in self._alive()]
        return Modules([module for module in alive if not any(map(_count, _values(tensors_of(module))))])


_UNKNOWN, _ABSENT = object(), (object(), 0)


def _attributes(module: nn.Module) -> list[dict[str, Any]]:
    return [*tensors_of(module), own_attributes(module)]


def _noted(entries: dict[str, Any]) -> dict[str, tuple[Any, int]]:
    found = {}
    for name, value in entries.items():
        count = _count(value)
        plain = not count and isinstance(value, _PUT_BACK)  # a bound method would keep its module alive
        found[name] = (value if plain else _UNKNOWN, count)
    return found


_PUT_BACK = (torch.Tensor, bool, int, float, complex, str, list, tuple, dict, deque, type(None))


def _count(value: Any, depth: int = 3) -> int:
    """How many values of a trace there are in a value of an attribute."""
    if isinstance(value, torch.Tensor):
        return int(is_of_trace(value))
    if not depth or not isinstance(value, list | tuple | dict | deque):
        return 0
    items = value.values() if isinstance(value, dict) else value
    return sum(_count(item, depth - 1) for item in itertools.islice(items, _MOST_ITEMS))


_MOST_ITEMS = 1000


def _check_has_shapes(module: nn.Module) -> None:
    lazy = [name for entries in tensors_of(module) for name, value in entries.items() if is_lazy(value)]
    if lazy:
        raise UnsupportedOperationError(
            f"jit: the function runs a {type(module).__name__}, whose {lazy[0]} has no shape yet: a lazy module takes it from "
            f"the first numbers that it sees. Run the module once before, without jit."
        )


def _put_back(before: _Before, kind: int, name: str) -> LeakedTracerError:
    """Give an attribute the value that it had, if that is known; the error that says so."""
    module: Any = before.module()
    old = before.entries[kind].get(name, _ABSENT)[0]
    if old is _ABSENT[0] and isinstance(module, nn.ParameterDict):
        del module[name]
    elif old is _ABSENT[0]:
        delattr(module, name)
    elif old is not _UNKNOWN:
        [*tensors_of(module), vars(module)][kind][name] = old
    what = ("parameter", "buffer", "attribute")[kind]
    return LeakedTracerError(
        f"jit: {type(module).__name__} keeps a value of the trace in its {what} {name}, which would happen only while the "
        f"function is traced, and not at each call. Write into a tensor in place (self.{name}.copy_(…), self.{name}.add_(…)), or "
        f"return the new state. If it is a cache, fill it before: run the module once without jit."
    )
