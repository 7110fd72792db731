"""Operators that behave differently inside a mapped function, and only there.

PyTorch's dispatcher asks a list of keys, highest first, for a kernel. Two of its highest keys are unused, and off unless a
thread switches them on. A running ``vmap`` does, so that the kernels registered here are asked before any transform sees the
operator; every other operator falls through, and outside ``vmap`` nothing changes at all.

``KEY`` is on in every mapped function: it is for operators that PyTorch itself rarely calls while it runs another one.
``WRITES_KEY`` is for those that make tensors, which nearly every operator calls within: it is on only where the function may
write in place (:mod:`torchbatch.core.writes`).

Private names used, seen on torch 2.11, 2.13 and 2.15: ``torch._C._parse_dispatch_key``,
``torch._C._dispatch_tls_set_dispatch_key_included``, ``_dispatch_tls_is_dispatch_key_included``,
``_dispatch_tls_is_dispatch_key_excluded``, ``torch._C._len_torch_dispatch_stack``,
``torch._ops._HIGHER_ORDER_OP_DEFAULT_FALLTHROUGH_DISPATCH_KEYS``, ``torch._ops._higher_order_ops``, and the keys
``TESTING_ONLY_GenericMode`` and ``TESTING_ONLY_GenericWrapper``, which PyTorch keeps free for its own tests.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import _ops

_KEY_NAME, _WRITES_KEY_NAME = "TESTING_ONLY_GenericMode", "TESTING_ONLY_GenericWrapper"
KEY: Any = torch._C._parse_dispatch_key(_KEY_NAME)
WRITES_KEY: Any = torch._C._parse_dispatch_key(_WRITES_KEY_NAME)
_FRONT = torch._C.DispatchKey.FuncTorchDynamicLayerFrontMode
include = torch._C._dispatch_tls_set_dispatch_key_included
is_included = torch._C._dispatch_tls_is_dispatch_key_included
_is_excluded = torch._C._dispatch_tls_is_dispatch_key_excluded

_every_operator = torch.library.Library("_", "IMPL")
_every_operator.fallback(torch.library.fallthrough_kernel, _KEY_NAME)
_every_operator.fallback(torch.library.fallthrough_kernel, _WRITES_KEY_NAME)
_aten = torch.library.Library("aten", "IMPL")
# Operators that take functions (autograd.Function, cond, scan) have a dispatcher of their own, in Python.
_ops._HIGHER_ORDER_OP_DEFAULT_FALLTHROUGH_DISPATCH_KEYS.extend([KEY, WRITES_KEY])
for _operator in _ops._higher_order_ops.values():
    _operator.fallthrough(KEY)
    _operator.fallthrough(WRITES_KEY)

Operator = Callable[..., Any]


def called_by_user() -> bool:
    """Whether the operator that runs now was called by the mapped function, not by a transform at work on another one."""
    return is_included(_FRONT) and not _is_excluded(_FRONT)


def is_traced() -> bool:
    """Whether a dispatch mode (a tracer, fake tensors) watches the operators of this thread."""
    return torch._C._len_torch_dispatch_stack() > 0


def call(operator: Operator, args: Any, kwargs: Any) -> Any:
    """The operator without the kernels of this file."""
    return _without(KEY, _without, (WRITES_KEY, operator, args, kwargs), {})


def _without(key: Any, operator: Operator, args: Any, kwargs: Any) -> Any:
    was = is_included(key)
    include(key, False)
    try:
        return operator(*args, **kwargs)
    finally:
        include(key, was)


class _Overlay:
    """The kernels of one key."""

    def __init__(self, key: Any, key_name: str) -> None:
        self._key, self._key_name = key, key_name
        self._kernels: dict[str, Operator] = {}

    def register(self, name: str, make: Callable[[Operator], Operator]) -> bool:
        """Let ``make(operator)`` run in place of ``aten::name``; False if PyTorch has no such operator.

        ``operator`` runs without this overlay. A second registration of one name goes around the first: its ``operator`` is
        the first one's kernel.
        """
        packet, _, overload = name.partition(".")
        operator = getattr(getattr(torch.ops.aten, packet, None), overload or "default", None)
        if operator is None:
            return False
        kernels, key = self._kernels, self._key
        if name in kernels:
            kernels[name] = make(kernels[name])
            return True

        def below(*args: Any, **kwargs: Any) -> Any:
            return _without(key, operator, args, kwargs)

        def checked(*args: Any, **kwargs: Any) -> Any:
            return kernels[name](*args, **kwargs) if called_by_user() else below(*args, **kwargs)

        below.__name__ = name
        kernels[name] = make(below)
        _aten.impl(name, checked, self._key_name)
        return True


register = _Overlay(KEY, _KEY_NAME).register
register_factory = _Overlay(WRITES_KEY, _WRITES_KEY_NAME).register
