"""Short texts for values in messages."""

from __future__ import annotations

from typing import Any

import torch

from torchbatch._torch import levels


def describe(value: Any) -> str:
    """``float32[8,3]`` for an array, the type's name for anything else."""
    if not isinstance(value, torch.Tensor):
        return f"a value of type {type(value).__name__}"
    return f"{str(value.dtype).removeprefix('torch.')}[{','.join(str(n) for n in value.shape)}]"


def in_detail(value: torch.Tensor) -> str:
    """:func:`describe`, with strides, ``requires_grad`` and the device where they are not the usual ones."""
    details = [] if value.is_contiguous() else [f"strides {tuple(value.stride())}"]
    details += ["requires_grad"] if value.requires_grad else []
    details += [f"on {value.device}"] if value.device.type != "cpu" else []
    return " ".join([describe(value), *details])


def shown(value: Any) -> str:
    """``value`` as Python shows it, on one line and not longer than that, and its type: ``'sum' of type str``."""
    if isinstance(value, torch.Tensor) and (levels.is_wrapped(value) or type(value) not in (torch.Tensor, torch.nn.Parameter)):
        return f"{describe(value)} of type Tensor"  # what Python shows tells how transforms work, and no number
    text = " ".join(repr(value).split())
    dtype = f" and dtype {value.dtype}" if hasattr(value, "dtype") and not isinstance(value, type) else ""
    return f"{text if len(text) <= 100 else text[:99] + '…'} of type {type(value).__name__}{dtype}"


def function_name(fun: Any) -> str:
    """What a message calls a function."""
    return getattr(fun, "__name__", None) or type(fun).__name__


def method_name(fun: Any, method: str) -> str:
    """What a message calls a method of what a function has become: ``f.method``, unless the function has no name."""
    name = function_name(fun)
    return f"{name}.{method}" if name.isidentifier() else f"its method {method}"
