"""Reverse and forward mode on flat tensors: what ``torch.func.vjp`` and ``torch.func.jvp`` do, without their trees.

A function here takes tensors and returns ``(outputs, others)``: a tuple of the floating-point or complex tensors that are
differentiated, never empty, and a tuple of tensors beside them. Each call opens a level of its own and closes it whatever
happens. Gradients are right inside ``no_grad`` and inference mode too: what counts is what the function itself does.
Nothing that is left behind needs Python's garbage collector.

While ``torch.compile`` traces the caller, everything goes through ``torch.func``, which Dynamo knows.

Private names used, seen on torch 2.11, 2.13 and 2.15: ``torch._C._functorch._grad_increment_nesting``,
``_grad_decrement_nesting``, ``_jvp_increment_nesting``, ``_jvp_decrement_nesting``, ``_wrap_for_grad``,
``_unwrap_for_grad``, ``unwrap_if_dead``, ``get_inplace_requires_grad_allowed``, ``set_inplace_requires_grad_allowed``;
``torch._functorch.eager_transforms.JVP_NESTING``; ``torch._C._autograd._saved_tensors_hooks_disable``,
``_saved_tensors_hooks_enable``, ``_saved_tensors_hooks_get_disabled_error_message``; ``torch._C._set_grad_enabled``,
``_set_fwd_grad_enabled``, ``_is_fwd_grad_enabled``; ``torch._VF._make_dual``, ``_unpack_dual``;
``torch._C._enter_dual_level``, ``_exit_dual_level``, ``torch.autograd.forward_ad._current_level``;
``torch.autograd.graph._engine_run_backward``, ``torch.autograd.forward_ad._maybe_load_decompositions``;
``torch._dynamo.compiled_autograd.compiled_autograd_enabled``, ``_disable``; and those of :mod:`torchbatch._torch.levels`.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch._functorch import eager_transforms
from torch.autograd import forward_ad
from torch.autograd import graph as _graph
from torch.overrides import has_torch_function

from torchbatch._torch import levels

Tensors = tuple[torch.Tensor, ...]
Flat = Callable[..., tuple[Tensors, Tensors]]
Pull = Callable[..., Tensors]

_functorch: Any = torch._C._functorch
_hooks: Any = torch._C._autograd
_dual: Any = torch._VF
_forward_ad: Any = forward_ad
_transforms: Any = eager_transforms
_enter_dual_level: Any = torch._C._enter_dual_level
_exit_dual_level: Any = torch._C._exit_dual_level
_run_backward: Any = _graph._engine_run_backward
_is_compiling = torch.compiler.is_compiling
_is_inference = torch.is_inference_mode_enabled
_is_grad_enabled = torch.is_grad_enabled
_set_grad_enabled = torch._C._set_grad_enabled
_set_forward_enabled = torch._C._set_fwd_grad_enabled
_is_forward_enabled = torch._C._is_fwd_grad_enabled
_wrap = _functorch._wrap_for_grad
_unwrap = _functorch._unwrap_for_grad
_alive = _functorch.unwrap_if_dead

_NO_HOOKS = (
    "hooks on saved tensors (torch.autograd.graph.saved_tensors_hooks, save_on_cpu, non-reentrant "
    "torch.utils.checkpoint) do not work inside grad, vjp, jacrev and hessian. Take them off around the call; for "
    "recomputation use torchbatch.checkpoint."
)


def vjp(function: Flat, inputs: Sequence[torch.Tensor]) -> tuple[Tensors, Tensors, Pull]:
    """The outputs, the other tensors, and the pullback: from cotangents of the outputs to cotangents of the inputs.

    The pullback takes a sequence of tensors in the shapes and dtypes of the outputs, which is not checked, and
    ``retain_graph``, whether it can be called again; it follows the ``no_grad`` that it is called in.
    """
    if _is_compiling():
        outputs, pull, others = torch.func.vjp(function, *inputs, has_aux=True)  # type: ignore[misc]
        return outputs, others, pull
    inside, results, outputs, others = _at_new_level(function, inputs)

    def pull_back(cotangents: Sequence[torch.Tensor], retain_graph: bool = True) -> Tensors:
        return _pull(inside, results, inputs, cotangents, retain_graph)

    return outputs, others, pull_back


def value_and_gradient(function: Flat, inputs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, Tensors, Tensors]:
    """The one output of ``function``, its gradients by ``inputs``, and the other tensors."""
    if _is_compiling():
        outputs, pull, others = torch.func.vjp(function, *inputs, has_aux=True)  # type: ignore[misc]
        return outputs[0], pull((torch.ones_like(outputs[0]),), retain_graph=False), others
    inside, results, outputs, others = _at_new_level(function, inputs)
    return outputs[0], _pull(inside, results, inputs, (torch.ones_like(outputs[0]),), False), others


def jvp(
    function: Flat, inputs: Sequence[torch.Tensor], tangents: Sequence[torch.Tensor]
) -> tuple[Tensors, Tensors, Tensors]:
    """The outputs, their tangents, and the other tensors."""
    if _is_compiling():
        values, moved, others = torch.func.jvp(function, tuple(inputs), tuple(tangents), has_aux=True)  # type: ignore[misc]
    else:
        values, moved, others = _at_dual_level(function, inputs, tangents)
    return values, tuple([levels.of_dtype(t, value) for t, value in zip(moved, values, strict=True)]), others


def primal(value: torch.Tensor) -> torch.Tensor:
    """A value without the tangent that it has at the innermost level of forward mode."""
    found: torch.Tensor
    if levels.is_batchedtensor(value):
        level = levels.maybe_get_level(value)
        inner, axis = levels.unwrap_batched(value, level)
        found = levels.add_batch_dim(primal(inner), axis, level)
    else:
        found = _dual._unpack_dual(value, level=0)[0]
    return found


def _at_dual_level(
    function: Flat, inputs: Sequence[torch.Tensor], tangents: Sequence[torch.Tensor]
) -> tuple[Tensors, Tensors, Tensors]:
    if _is_inference():
        with _no_inference():
            return _at_dual_level(function, inputs, tangents)
    level = _functorch._jvp_increment_nesting()
    was = _is_forward_enabled()
    try:
        _set_forward_enabled(True)
        _duals.enter()
        try:
            inputs = [_unshared(x) for x in inputs] if level > 1 else inputs
            duals = [_dual._make_dual(x, _spread(t, x), level=0) for x, t in zip(inputs, tangents, strict=True)]
            outputs, others = function(*duals)
            pairs = [_dual._unpack_dual(output, level=0) for output in outputs]
            values = tuple([_unwrap(value, level) for value, _ in pairs])
            moved = [torch.zeros_like(value) if tangent is None else tangent for value, tangent in pairs]
            return values, tuple([_unwrap(t, level) for t in moved]), tuple([_unwrap(t, level) for t in others])
        finally:
            _duals.leave()
    finally:
        _set_forward_enabled(was)
        _functorch._jvp_decrement_nesting()


def _unshared(value: torch.Tensor) -> torch.Tensor:
    """A value in which each number has its own memory: inside another forward mode PyTorch writes the tangent in its layout."""
    return value.contiguous() if 0 in value.stride() else value


def _spread(tangent: torch.Tensor, primal: torch.Tensor) -> torch.Tensor:
    """``tangent`` with every mapped axis of ``primal``, so that what is written into the one has room in the other."""
    if levels.is_wrapped(primal) and not set(levels.batch_levels(primal)) <= set(levels.batch_levels(tangent)):
        return tangent + torch.zeros_like(primal)
    return tangent


def _at_new_level(function: Flat, inputs: Sequence[torch.Tensor]) -> tuple[Tensors, Tensors, Tensors, Tensors]:
    """The inputs and the outputs at a level of their own, closed again, and the outputs and others outside of it."""
    if _is_inference():
        with _no_inference():
            return _at_new_level(function, inputs)
    refused = _hooks._saved_tensors_hooks_get_disabled_error_message()
    try:
        _hooks._saved_tensors_hooks_disable(_NO_HOOKS)
        level = _functorch._grad_increment_nesting()
        was = _is_grad_enabled()
        try:
            _set_grad_enabled(True)
            inside = _differentiable(inputs, level)
            results, beside = function(*inside)
            outputs = tuple([_unwrap(result, level) for result in results])
            return inside, results, outputs, tuple([_unwrap(other, level) for other in beside])
        finally:
            _set_grad_enabled(was)
            _functorch._grad_decrement_nesting()
    finally:
        if refused is None:
            _hooks._saved_tensors_hooks_enable()
        else:
            _hooks._saved_tensors_hooks_disable(refused)


def _differentiable(inputs: Sequence[torch.Tensor], level: int) -> Tensors:
    """The inputs as leaves of the graph that ``level`` records."""
    allowed = _functorch.get_inplace_requires_grad_allowed()
    _functorch.set_inplace_requires_grad_allowed(True)
    try:
        return tuple([_wrap(tensor, level).requires_grad_() for tensor in inputs])
    finally:
        _functorch.set_inplace_requires_grad_allowed(allowed)


def _pull(
    inside: Tensors, results: Tensors, inputs: Sequence[torch.Tensor], cotangents: Sequence[torch.Tensor], retain: bool
) -> Tensors:
    """Cotangents of the inputs; zeros for those that no result depends on."""
    if _is_inference():
        with _no_inference():
            return _pull(inside, results, inputs, cotangents, retain)
    pairs = [(result, c) for result, c in zip(results, cotangents, strict=True) if result.requires_grad]
    if not pairs:
        return tuple([torch.zeros_like(tensor) for tensor in inputs])
    sources, given = zip(*pairs, strict=True)
    found = _backward(sources, inside, given, retain, _is_grad_enabled())
    return tuple([torch.zeros_like(x) if g is None else _alive(g) for g, x in zip(found, inputs, strict=True)])


def _backward(sources: Tensors, inside: Tensors, given: Tensors, retain: bool, record: bool) -> Sequence[Any]:
    """``torch.autograd.grad`` without compiled autograd, and without its checks where nobody watches it."""
    compiled: Any = sys.modules.get("torch._dynamo.compiled_autograd")
    if compiled is not None and compiled.compiled_autograd_enabled:
        with compiled._disable():
            return torch.autograd.grad(sources, inside, given, retain, record, allow_unused=True)
    if has_torch_function((*sources, *inside)):
        return torch.autograd.grad(sources, inside, given, retain, record, allow_unused=True)
    found: Sequence[Any] = _run_backward(sources, given, retain, record, inside, True, accumulate_grad=False)
    return found


@contextlib.contextmanager
def _no_inference() -> Iterator[None]:
    """Leave inference mode, in which nothing is recorded; both grad modes stay as they are."""
    reverse, forward = _is_grad_enabled(), _is_forward_enabled()
    with torch.inference_mode(False):
        _set_grad_enabled(reverse)
        _set_forward_enabled(forward)
        yield


class _Duals:
    """The one level of PyTorch's forward mode, which all open ``jvp`` of all threads share.

    The first one opens it and the last one closes it, unless ``torch.func.jvp`` runs around them, which does so itself.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open = 0
        self._level: int | None = None
        self._loaded = False

    def enter(self) -> None:
        with self._lock:
            if not self._loaded:
                _forward_ad._maybe_load_decompositions()
                self._loaded = True
            if not _transforms.JVP_NESTING:
                self._level = _forward_ad._current_level = _enter_dual_level()
            _transforms.JVP_NESTING += 1
            self._open += 1

    def leave(self) -> None:
        with self._lock:
            _transforms.JVP_NESTING -= 1
            self._open -= 1
            if not self._open and self._level is not None:
                level, self._level = self._level, None
                _exit_dual_level(level=level)
                _forward_ad._current_level = level - 1


_duals = _Duals()
