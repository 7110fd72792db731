"""Which modules a traced function ran, and whether they were in training mode.

``model.eval()`` changes a Python value, and a trace would go on as before. It is the one such change that everybody makes, so
the modules whose class reads ``training`` are remembered with the trace.
"""

from __future__ import annotations

import functools
import inspect
import threading
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook


class RanModules:
    """A context in which the modules that this thread runs are noted, with the mode each is in."""

    def __init__(self) -> None:
        self.modes: list[tuple[nn.Module, bool]] = []

    def __enter__(self) -> RanModules:
        self._thread = threading.get_ident()
        self._handle = register_module_forward_pre_hook(self._note)
        return self

    def __exit__(self, *error: object) -> None:
        self._handle.remove()

    def _note(self, module: nn.Module, args: Any) -> None:
        kind: Any = type(module)
        here = threading.get_ident() == self._thread
        if here and _reads_training(kind) and all(module is not known for known, _ in self.modes):
            self.modes.append((module, module.training))


@functools.cache
def _reads_training(kind: Any) -> bool:
    """Whether a method of a class, or of one that it inherits from, mentions ``training``."""
    classes = [base for base in kind.__mro__ if issubclass(base, nn.Module) and base is not nn.Module]
    methods = [method for base in classes for method in vars(base).values() if inspect.isfunction(method)]
    return any("training" in method.__code__.co_names for method in methods)
