"""Operators without a batching rule: run once per sample, and what is said about it.

Private names used, seen on torch 2.11, 2.13 and 2.15: ``torch._C._functorch._set_vmap_fallback_enabled``,
``_set_vmap_fallback_warning_enabled`` (for operators that are not PyTorch's own, which PyTorch's loop runs),
``OpOverload._schema`` and those of :mod:`torchbatch._torch.batching`.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import torch

from torchbatch._torch import batching, caller
from torchbatch._torch.explain import FIXED_SHAPES
from torchbatch.errors import AxisError, DataDependentError, FallbackError, FallbackWarning, UnsupportedOperationError

_functorch: Any = torch._C._functorch
MODES = ("warn", "error", "silent")


class _Policy(threading.local):
    """``here`` is what a ``with`` statement of this thread asks for, else None; ``everywhere`` holds for all threads."""

    everywhere = "warn"
    set_by: object = None  # the ``fallback(mode)`` that said so

    def __init__(self) -> None:
        self.here: str | None = None


_policy = _Policy()


class fallback:  # noqa: N801
    """Say what happens when an operator without a batching rule meets a per-sample value.

    Such an operator gives the right result, but it runs once per sample, as a plain loop would. Call ``fallback(mode)`` to
    set the policy for the whole program, or use it in a ``with`` statement, for that block and this thread only. (Operators
    of other libraries are looped over by PyTorch itself, whose switch is one for all threads.)

    Args:
        mode: ``"warn"`` (the default policy) issues a :class:`~torchbatch.errors.FallbackWarning` that names the operator,
            once for each line of your code; ``"error"`` refuses with a :class:`~torchbatch.errors.FallbackError`;
            ``"silent"`` says nothing.

    Raises:
        AxisError: ``mode`` is none of the three.

    Example:
        >>> import torch
        >>> from torchbatch import fallback, vmap
        >>> x = torch.tensor([[4.0, 1.0], [2.0, 3.0]])
        >>> with fallback("error"):
        ...     vmap(torch.sort)(x).values
        tensor([[1., 4.],
                [2., 3.]])
    """

    def __init__(self, mode: str) -> None:
        if mode not in MODES:
            raise AxisError(f"fallback takes 'warn', 'error' or 'silent', but it got {mode!r}.")
        self._mode = mode
        self._before = _Policy.everywhere, _Policy.set_by
        self._outer: str | None = None
        _Policy.everywhere, _Policy.set_by = mode, self
        _tell_torch()

    def __enter__(self) -> fallback:
        if _Policy.set_by is self:  # what was said for the whole program in between stays
            _Policy.everywhere, _Policy.set_by = self._before
        self._outer, _policy.here = _policy.here, self._mode
        _tell_torch()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        _policy.here = self._outer
        _tell_torch()

    def __repr__(self) -> str:
        return f"fallback({self._mode!r})"


def mode() -> str:
    """The policy that holds in this thread."""
    return _policy.here or _Policy.everywhere


def _tell_torch() -> None:
    """Hold PyTorch's own loop, which runs the operators of other libraries, to the policy."""
    _functorch._set_vmap_fallback_warning_enabled(mode() == "warn")
    _functorch._set_vmap_fallback_enabled(mode() != "error")


def announce(name: str) -> None:
    """Warn of, refuse or pass over the loop that an operator needs.

    Raises:
        FallbackError: the policy is ``"error"``.
    """
    policy = mode()
    if policy == "silent":
        return
    frame = caller.user_frame()
    if policy == "error":
        raise FallbackError(
            f"{name} has no batching rule, so it would run once per sample, and fallback('error') refuses that. Express it "
            f"by other operations, or allow the loop with fallback('warn') or fallback('silent').{caller.line()}"
        )
    text = (
        f"{name} has no batching rule, so it runs once per sample: the result is right, but it takes as long as a loop. "
        "torchbatch.fallback('silent') turns this warning off, fallback('error') makes it an error."
    )
    if frame is None:
        warnings.warn(text, FallbackWarning, stacklevel=2)
        return
    registry = frame.f_globals.setdefault("__warningregistry__", {})
    module = frame.f_globals.get("__name__", "")
    warnings.warn_explicit(text, FallbackWarning, frame.f_code.co_filename, frame.f_lineno, module, registry)


# --- the loop --------------------------------------------------------------------------------------------------------


def loop_kernel(name: str) -> batching.Kernel:
    """A batching rule for ``aten::name`` that runs it once per sample."""

    def kernel(*args: Any, **kwargs: Any) -> Any:
        operator, level = batching.operator_of(name), batching.current_level()
        size = batching.batch_size(args, kwargs, level)
        with batching.below():
            if size is None:
                return operator(*args, **kwargs)
            announce(name.removeprefix("aten::").partition(".")[0])
            return _loop(operator, args, kwargs, size, level)

    return kernel


def _loop(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any], size: int, level: int) -> Any:
    _refuse_views(operator)
    targets = [batching.argument(place, args, kwargs) for place in batching.written(operator)]
    for target in targets:
        _check_target(operator, target, level)
    written = {id(tensor) for target in targets for tensor in batching.tensors([target], {})}

    def samples(tensor: torch.Tensor) -> _Samples:
        return _Samples(*batching.opened(tensor, level), max(size, 1), id(tensor) in written, size == 0)

    columns = [batching.replaced(value, samples) for value in args]
    named = {key: batching.replaced(value, samples) for key, value in kwargs.items()}
    rows = []
    for i in range(max(size, 1)):
        positional = [_pick(column, i) for column in columns]
        rows.append(operator(*positional, **{key: _pick(column, i) for key, column in named.items()}))
    if len(operator._schema.returns) == 1:
        return _result(operator, rows, targets, 0, size, level)
    results = [[row[i] for row in rows] for i in range(len(operator._schema.returns))]
    return tuple(_result(operator, column, targets, i, size, level) for i, column in enumerate(results))


def _result(operator: Any, rows: list[Any], targets: list[Any], index: int, size: int, level: int) -> Any:
    """One result for all samples: the argument that was written to, or what the samples returned, put together."""
    alias = operator._schema.returns[index].alias_info
    if alias is None or not alias.is_write:
        return _joined(operator, rows, size, level)
    writes = [a.alias_info for a in operator._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    return targets[next(i for i, written in enumerate(writes) if written.before_set == alias.before_set)]


class _Samples:
    """One tensor for each sample of the batch."""

    def __init__(self, value: torch.Tensor, axis: int | None, count: int, written: bool, empty: bool) -> None:
        self._shared = value if axis is None else None
        self._each: Sequence[torch.Tensor] = ()
        if axis is None:
            return
        if empty:  # a made-up sample, to learn what the operator returns
            self._each = [batching.made_up(value.movedim(axis, 0))]
        elif written:
            self._each = [value.select(axis, i) for i in range(count)]
        else:
            self._each = value.unbind(axis)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self._each[index] if self._shared is None else self._shared


def _pick(column: Any, index: int) -> Any:
    if isinstance(column, _Samples):
        return column[index]
    if isinstance(column, tuple | list):
        return type(column)([_pick(item, index) for item in column])
    return column


def _refuse_views(operator: Any) -> None:
    for result in operator._schema.returns:
        if result.alias_info is not None and not result.alias_info.is_write:
            raise UnsupportedOperationError(
                f"{operator} gives a view of its argument, and PyTorch has no rule to make such a view for all samples at once. "
                f"Copy the value, or express the view by others (select, narrow, reshape, ...).{caller.line()}"
            )


def _check_target(operator: Any, target: Any, level: int) -> None:
    for tensor in batching.tensors([target], {}):
        if batching.opened(tensor, level).axis is None:
            raise RuntimeError(f"vmap: inplace arithmetic: {operator} writes per-sample values into a shared tensor")


def _joined(operator: Any, rows: list[Any], size: int, level: int) -> Any:
    first = rows[0]
    if first is None or isinstance(first, torch.Tensor):
        return _stacked(operator, rows, size, level)
    if isinstance(first, tuple | list):
        if any(len(row) != len(first) for row in rows):
            raise _ragged(operator)
        return type(first)(_joined(operator, list(column), size, level) for column in zip(*rows, strict=True))
    if any(row != first for row in rows):
        raise DataDependentError(
            f"{operator} returns a Python value, and per-sample values can give each sample another one.{caller.line()}"
        )
    return first


def _stacked(operator: Any, column: list[Any], size: int, level: int) -> Any:
    if column[0] is None:
        return None
    if any(row.shape != column[0].shape for row in column):
        raise _ragged(operator)
    return batching.wrapped(torch.stack(column)[:size], level)


def _ragged(operator: Any) -> DataDependentError:
    return DataDependentError(
        f"The shape of what {operator.__name__.partition('.')[0]} returns depends on values that vary from sample to sample. "
        f"{FIXED_SHAPES}{caller.line()}"
    )

