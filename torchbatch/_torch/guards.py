"""Whether a call is like one that was seen before, asked in C++: tensors, and the state that operations depend on.

``TensorGuards`` compares class, dtype, device, shape, strides, ``requires_grad`` and the dispatch keys, which tell that a
transform or a mode is active. ``GlobalStateGuard`` compares grad mode, autocast, default dtype, threads and the like.

Private names used, seen on torch 2.11, 2.13 and 2.15: ``torch._C._dynamo.guards.TensorGuards``, ``GlobalStateGuard``;
``torch.utils._python_dispatch._len_torch_dispatch_stack``; ``torch.utils._device.DeviceContext``;
``torch.autograd.forward_ad._current_level``; ``torch._compile._disable_dynamo``, which, unlike
``torch.compiler.disable``, does not import the compiler.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._compile import _disable_dynamo as hidden_from_compile
from torch.autograd import forward_ad
from torch.utils import _python_dispatch
from torch.utils._device import DeviceContext

from torchbatch._torch import draw_state, graphs, levels

__all__ = ["calls_like", "hidden_from_compile", "inside_other", "state", "state_like_now", "tensors_like", "without_gradients"]

_guards: Any = torch._C._dynamo.guards
_dispatch_modes: Callable[[], int] = getattr(_python_dispatch, "_len_torch_dispatch_stack")  # noqa: B009
_function_modes: Callable[[], int] = torch._C._len_torch_function_stack
_function_mode_at: Callable[[int], Any] = torch._C._get_function_stack_at
_set_grad_enabled: Callable[[bool], None] = torch._C._set_grad_enabled


def tensors_like(tensors: Sequence[torch.Tensor]) -> Callable[..., bool]:
    """A function that tells whether as many other tensors are like these, and the same ones among them are one.

    Raises:
        TypeError: (the function) it is given another number of tensors.
    """
    first = {id(value): i for i, value in reversed(list(enumerate(tensors)))}
    places = [first[id(value)] for value in tensors]
    distinct = sorted(set(places))
    guard: Any = _guards.TensorGuards(*(tensors[i] for i in distinct), dynamic_dims_sizes=None, dynamic_dims_strides=None)
    check: Callable[..., bool] = guard.check
    if len(distinct) == len(tensors):
        return check

    def check_with_repetitions(*values: Any) -> bool:
        if len(values) != len(places):
            raise TypeError("wrong length")
        return all(values[i] is value for i, value in zip(places, values, strict=True)) and check(*(values[i] for i in distinct))

    return check_with_repetitions


def state_like_now() -> Callable[[], bool]:
    """A function that tells whether the state of PyTorch is what it is now."""
    alike: Callable[[], bool] = _guards.GlobalStateGuard().check
    count, was = _function_modes(), draw_state.partitionable()

    def same() -> bool:
        return alike() and draw_state.partitionable() is was

    if count == 0:
        return lambda: same() and not _function_modes() and forward_ad._current_level < 0
    device = _default_device()  # it is set as a mode
    if device is None:
        return lambda: False
    return lambda: same() and _function_modes() == count and _default_device() == device and forward_ad._current_level < 0


def calls_like(values: Sequence[torch.Tensor], others: Sequence[torch.Tensor]) -> Callable[..., bool]:
    """A function of tensors that tells whether they are like ``values``, and all else is as it is now, ``others`` too.

    It is what a call waits for, so it is one function: each further one would take as long as a check.
    """
    like, same = tensors_like([*values, *others]), state_like_now()
    if _function_modes():
        return lambda *found: like(*found, *others) and same() and draw_state.uses() is None
    alike: Callable[[], bool] = _guards.GlobalStateGuard().check
    was, unusual = draw_state.partitionable(), draw_state.contexts  # a thread's own state takes longer to read than a list
    if others:
        return lambda *found: (
            like(*found, *others)
            and alike()
            and not _function_modes()
            and forward_ad._current_level < 0
            and (draw_state.is_as(was) if unusual else was)
        )
    return lambda *found: (
        like(*found)
        and alike()
        and not _function_modes()
        and forward_ad._current_level < 0
        and (draw_state.is_as(was) if unusual else was)
    )


def _default_device() -> tuple[torch.device, int] | None:
    """What modes make the default device, and which GPU it is; None where other modes are at work, or it takes long to tell."""
    modes = [_function_mode_at(i) for i in range(_function_modes())]
    if not modes or any(type(mode) is not DeviceContext for mode in modes):
        return None
    device: Any = modes[-1].device  # the innermost one decides
    if device.index is not None or device.type in ("cpu", "meta"):
        return device, -1
    return (device, torch.cuda.current_device()) if device.type == "cuda" else None


def without_gradients(run: Callable[[list[torch.Tensor]], Any]) -> Callable[[list[torch.Tensor]], Any]:
    """``run`` under no_grad, without the time that the context manager takes."""

    def call(values: list[torch.Tensor]) -> Any:
        before = torch.is_grad_enabled()
        _set_grad_enabled(False)
        try:
            return run(values)
        finally:
            _set_grad_enabled(before)

    return call


def state() -> dict[str, Any]:
    """What the result of a function may depend on beside its arguments."""
    devices = [kind for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)]
    return {
        "grad mode": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "autocast": tuple((kind, str(torch.get_autocast_dtype(kind))) for kind in devices),
        "default dtype": str(torch.get_default_dtype()),
        "default device": str(torch.get_default_device()),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "float32 matmul precision": torch.get_float32_matmul_precision(),
        "threefry_partitionable": draw_state.partitionable(),
    }


def inside_other() -> bool:
    """Whether a transform, a trace or a mode is at work here that has to see each operation."""
    return (
        levels.depth() > 0
        or graphs.is_tracing()
        or _dispatch_modes() > 0
        or forward_ad._current_level >= 0
        or any(not isinstance(_function_mode_at(i), DeviceContext) for i in range(_function_modes()))
    )
