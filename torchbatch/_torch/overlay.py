"""Operators that behave differently inside a mapped function, and only there.

PyTorch's dispatcher asks a list of keys, highest first, for a kernel. One of its highest keys is unused and off unless a
thread switches it on. A running ``vmap`` switches it on, so that the kernels registered here are asked before any transform
sees the operator; every other operator falls through, and outside ``vmap`` nothing changes at all.

Private names used, seen on torch 2.11, 2.13 and 2.15: ``torch._C._parse_dispatch_key``,
``torch._C._dispatch_tls_set_dispatch_key_included``, ``_dispatch_tls_is_dispatch_key_included``,
``_dispatch_tls_is_dispatch_key_excluded``, ``torch._C._len_torch_dispatch_stack``, and the key
``TESTING_ONLY_GenericMode``, which PyTorch keeps free for its own tests.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_NAME = "TESTING_ONLY_GenericMode"
KEY = torch._C._parse_dispatch_key(_NAME)
_FRONT = torch._C.DispatchKey.FuncTorchDynamicLayerFrontMode
include = torch._C._dispatch_tls_set_dispatch_key_included
_is_included = torch._C._dispatch_tls_is_dispatch_key_included
_is_excluded = torch._C._dispatch_tls_is_dispatch_key_excluded

_every_operator = torch.library.Library("_", "IMPL")
_every_operator.fallback(torch.library.fallthrough_kernel, _NAME)
_aten = torch.library.Library("aten", "IMPL")

Operator = Callable[..., Any]


def called_by_user() -> bool:
    """Whether the operator that runs now was called by the mapped function, not by a transform at work on another one."""
    return _is_included(_FRONT) and not _is_excluded(_FRONT)


def is_traced() -> bool:
    """Whether a dispatch mode (a tracer, fake tensors) watches the operators of this thread."""
    return torch._C._len_torch_dispatch_stack() > 0


def call(operator: Operator, args: Any, kwargs: Any) -> Any:
    """The operator without this overlay."""
    was = _is_included(KEY)
    include(KEY, False)
    try:
        return operator(*args, **kwargs)
    finally:
        include(KEY, was)


_kernels: dict[str, Operator] = {}


def register(name: str, make: Callable[[Operator], Operator]) -> bool:
    """Let ``make(operator)`` run in place of ``aten::name`` inside mapped functions; False if PyTorch has no such operator.

    ``operator`` runs without the overlay. A second registration of one name goes around the first: its ``operator`` is the
    first one's kernel.
    """
    packet, _, overload = name.partition(".")
    operator = getattr(getattr(torch.ops.aten, packet, None), overload or "default", None)
    if operator is None:
        return False
    if name in _kernels:
        _kernels[name] = make(_kernels[name])
        return True

    def below(*args: Any, **kwargs: Any) -> Any:
        return call(operator, args, kwargs)

    def checked(*args: Any, **kwargs: Any) -> Any:
        return _kernels[name](*args, **kwargs) if called_by_user() else below(*args, **kwargs)

    below.__name__ = name
    _kernels[name] = make(below)

    _aten.impl(name, checked, _NAME)
    return True
