"""The function modes at one moment, to be active again where PyTorch has set them aside.

A mode is set aside while it looks at a call. So all are where such a call runs a function of the user, as an
``autograd.Function`` inside a transform and a backward pass do.

Private names used, seen on torch 2.11, 2.13 and 2.15: ``torch.overrides._get_current_function_mode_stack``, ``_push_mode``,
``_pop_mode``; ``torch._functorch.autograd_function.custom_function_call``.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch.overrides
from torch._functorch.autograd_function import custom_function_call
from torch.overrides import TorchFunctionMode

_overrides: Any = torch.overrides
_STEPS = ("forward", "setup_context", "backward", "jvp", "vmap")
_no_steps: Any = torch.autograd.Function


class Remembered:
    """Function modes: these, or those that are active.

    Args:
        modes: None for those that are active.
        leaving_out: a class of modes that are left out.
    """

    def __init__(self, modes: Sequence[TorchFunctionMode] | None = None, leaving_out: type | tuple[()] = ()) -> None:
        found = _overrides._get_current_function_mode_stack() if modes is None else modes
        self._modes = [mode for mode in found if not isinstance(mode, leaving_out)]

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        """Those that are not active are so in this context; none is entered anew."""
        active = set(map(id, _overrides._get_current_function_mode_stack()))
        missing = [mode for mode in self._modes if id(mode) not in active]
        for mode in missing:
            _overrides._push_mode(mode)
        try:
            yield
        finally:
            for _ in missing:
                _overrides._pop_mode()

    def kept_by(self, function: Any) -> Any:
        """An ``autograd.Function`` whose methods run where these modes are active."""
        steps = {name: getattr(function, name) for name in _STEPS if getattr(function, name) is not getattr(_no_steps, name)}
        return type(function.__name__, (function,), {name: staticmethod(self._kept(step)) for name, step in steps.items()})

    def _kept(self, step: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(step)
        def kept(*args: Any) -> Any:
            with self.again():
                return step(*args)

        return kept


def calls_function(func: Any) -> bool:
    """Whether what a mode sees is the call of an ``autograd.Function`` inside a transform; the first argument is the class."""
    return func is custom_function_call
