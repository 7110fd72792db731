"""``vmap``: a function of one sample becomes the same function of a batch."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable
from typing import Any

import numpy as np
import torch

from torchbatch._torch import escape, explain, traced
from torchbatch._torch import install as install  # registers operators
from torchbatch._torch.escape import counts, deaths
from torchbatch.core import axes as axes_
from torchbatch.core import batch, chunks, empty
from torchbatch.core.axes import Axis
from torchbatch.core.describe import function_name, shown
from torchbatch.core.frames import Part, in_scope
from torchbatch.core.outputs import OutAxes
from torchbatch.core.wrapper import Wrapper
from torchbatch.core.writes import may_keep, may_write
from torchbatch.errors import AxisError, AxisSpecError, TorchbatchError

_Tensor = torch.Tensor
_is_compiling = torch.compiler.is_compiling
_DATA = (torch.Tensor, np.ndarray, np.generic, bool, int, float, complex, str, tuple, list, dict, type(None))
_ONE_AXIS = {axis: axes_.InAxes(axis) for axis in range(-3, 4)}
_RANDOMNESS = ("error", "different", "same")


def vmap(
    fun: Callable[..., Any],
    in_axes: Any = 0,
    out_axes: Any = 0,
    axis_name: Hashable = None,
    axis_size: int | None = None,
    spmd_axis_name: Any = None,
    sum_match: bool = False,
    *,
    randomness: str = "error",
    chunk_size: int | None = None,
    **unknown: Any,
) -> Callable[..., Any]:
    """Map a function of one sample over an axis of its arguments.

    Shapes: for ``fun : [a] -> [b]``, ``vmap(fun) : [n, a] -> [n, b]``; for ``fun : ([b, a], [a]) -> [b]``,
    ``vmap(fun, in_axes=(None, 0)) : ([b, a], [n, a]) -> [n, b]``.

    Args:
        fun: a function of tensors, arrays, numbers and trees of them, written for one sample.
        in_axes: which axis of each positional argument is mapped: an int for all, or a tuple or list with one entry per
            argument. An entry is an int, None (the argument is shared by all samples and reaches ``fun`` as it is) or a
            tree of them that is a prefix of the argument. Axes run over ``[-ndim, ndim)``. Keyword arguments are always
            mapped over axis 0.
        out_axes: where the mapped axis goes in each output: an int, None (the output does not vary and is returned
            once) or a tree of them that is a prefix of the output.
        axis_name: a name for the mapped axis, by which the functions of :mod:`torchbatch.lax` look across the samples.
        axis_size: the number of samples; needed only when no argument is mapped.
        spmd_axis_name: accepted as in JAX, where it concerns sharding over devices; it has no effect here.
        sum_match: whether an output that varies where ``out_axes`` is None is summed over the axis, not an error.
        randomness: what random operations inside ``fun`` do: ``"error"``, draw ``"different"`` values for each sample,
            or the ``"same"``.
        chunk_size: how many samples to run at once; None runs all. The result is the same, the memory is less.

    Returns:
        The mapped function, with the name, documentation and signature of ``fun``.

    Raises:
        AxisSpecError: an option has the wrong type or spelling.
        AxisError: axes, sizes or structures do not fit the arguments or outputs.
        InputTypeError, OutputTypeError: what is mapped, or returned, is not an array.
        UnmappedOutputError: ``out_axes`` is None for an output that varies.
        DataDependentError, InPlaceError, RandomnessError, UnsupportedOperationError, EscapedValueError: ``fun`` does
            what cannot be done for all samples at once; the text names the line.

    Example:
        >>> import torch
        >>> from torchbatch import vmap
        >>> matrix = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
        >>> vectors = torch.tensor([[1.0, 1.0], [2.0, 3.0], [4.0, 5.0]])
        >>> vmap(torch.mv, in_axes=(None, 0))(matrix, vectors)
        tensor([[ 1.,  2.],
                [ 2.,  6.],
                [ 4., 10.]])

    Source: the signature and the rules are those of ``jax.vmap``; ``randomness`` and ``chunk_size`` are those of
    ``torch.func.vmap``.
    """
    if unknown:
        raise _unknown_options(unknown)
    if _is_compiling():
        options = (in_axes, out_axes, sum_match, axis_size, randomness, chunk_size)
        return traced.mapped(fun, _traced_options(axis_name, *options))
    _check_options(fun, axis_name, axis_size, randomness, chunk_size)
    return Vmapped(fun, in_axes, out_axes, axis_name, axis_size, spmd_axis_name, sum_match, randomness, chunk_size)


class Vmapped(Wrapper):
    """The mapped function that :func:`vmap` returns."""

    _writes: bool | None
    _keeps: bool

    def __init__(self, fun: Callable[..., Any], in_axes: Any, out_axes: Any, *options: Any) -> None:
        super().__init__(fun, in_axes, out_axes, *options)
        self._name, self._size, _, sum_match, self._randomness, self._chunk_size = options
        self._fun = explain.uncompiled(fun)
        in_front = _ONE_AXIS.get(in_axes) if type(in_axes) is int else None
        self._in = axes_.InAxes(in_axes) if in_front is None else in_front
        self._out = OutAxes(out_axes, bool(sum_match), fun)
        self._finish = self._out.finish
        self._writes, self._keeps = None, True  # read off the code at the first call, when all that it names is defined
        # Where these two are set, a call with bare tensors only skips everything that has to do with trees.
        plain = self._chunk_size is None and self._size is None
        self._plain_axes = (self._in.flat if plain else None) or ()
        self._every_axis = self._in.single.axes[0] if plain and self._in.single else None

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        if _is_compiling():
            return self._traced(args, kwargs)
        if self._writes is None:
            self._read_code(args)
        before = counts()
        try:
            axes = self._plain_axes if self._every_axis is None else (self._every_axis,) * len(args)
            size = None if kwargs else _plain_size(args, axes)
            if not size:  # not known, or an empty batch
                result, new = self._general(args, kwargs)
            else:
                result, new = batch.run(
                    self._fun, args, axes, size, self._name, self._randomness, self._finish, self._writes
                )
        except Exception as error:
            escape.mark_escaped()
            clearer = None if isinstance(error, TorchbatchError) else explain.explain(error, self._shared(args))
            if clearer is None:
                explain.add_note(error, lambda: axes_.samples(self._in, args, kwargs, self._fun))
                raise
            raise clearer from error
        except BaseException:
            escape.mark_escaped()
            raise
        after = counts()
        if self._keeps or after[0] - before[0] != new or after[1] != before[1] or deaths.seen:
            escape.check(before, after, self._keeps)
        return result

    def _read_code(self, args: tuple[Any, ...]) -> None:
        """Learn from the code whether the function may write in place, and whether it may keep a value."""
        given = [value for value in args if not isinstance(value, _DATA)]
        unknown = any(not callable(value) or may_write(value) for value in given)
        self._writes = unknown or self._randomness == "different" or may_write(self._fun)
        self._keeps = unknown or may_keep(self._fun) or any(may_keep(value) for value in given)

    def _general(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, int]:
        fun, in_axes = self._fun, self._in
        mapped = axes_.open_arguments(in_axes, args, kwargs, fun)
        size = axes_.axis_size(mapped, self._size, lambda: axes_.mapped_names(in_axes, args, kwargs, fun))

        def call(*batched: Any) -> Any:
            positional, keywords = mapped.rebuild(batched)
            return fun(*positional, **keywords)

        if self._chunk_size is not None and self._chunk_size < size:
            return chunks.run(
                call, mapped, size, self._chunk_size, self._name, self._randomness, self._out, bool(self._writes)
            )
        if size == 0 and self._name is None:
            return empty.run(call, mapped, self._randomness, self._out, bool(self._writes))
        try:
            return batch.run(
                call, mapped.values, mapped.axes, size, self._name, self._randomness, self._finish, self._writes
            )
        except IndexError as error:
            if size:
                raise
            raise AxisError(
                f"vmap: the axis named {self._name!r} has size 0, for which an operator in {function_name(fun)} has no rule in "
                f"PyTorch. Without axis_name the function is run on one made-up sample instead."
            ) from error

    def _traced(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        in_axes, out_axes, *_ = self.options
        options = (in_axes, out_axes, self._out.sum_match, self._size, self._randomness, self._chunk_size)
        return traced.call(self._fun, _traced_options(self._name, *options), args, kwargs)

    def _shared(self, args: tuple[Any, ...]) -> Callable[[], dict[str, torch.Tensor]]:
        """The unmapped tensors of a call by name, for an error that has to name one."""
        return lambda: axes_.shared_tensors(self._in, args, self._fun)

    def __repr__(self) -> str:
        return f"<vmap of {function_name(self.__wrapped__)}>"


def _plain_size(args: tuple[Any, ...], axes: tuple[Axis, ...]) -> int | None:
    """The size of the mapped axes if all mapped arguments are bare tensors that fit, else None."""
    if len(axes) != len(args):
        return None
    size = None
    for value, axis in zip(args, axes, strict=False):
        if axis is None:
            continue
        if type(value) is not _Tensor:
            return None
        shape = value.shape
        if not 0 <= axis < len(shape) or (size is not None and shape[axis] != size):
            return None
        size = shape[axis]
    return size


def _traced_options(axis_name: Hashable, *options: Any) -> traced.Options:
    names = (axis_name, Part(axis_name, options[-1]))
    return traced.Options._make((*options, names, in_scope.stack))


_SPELLING = {"in_dims": "in_axes", "out_dims": "out_axes"}


def _unknown_options(unknown: dict[str, Any]) -> AxisSpecError:
    name = next(iter(unknown))
    if name in _SPELLING:
        return AxisSpecError(f"vmap has no option {name!r}: it is spelled {_SPELLING[name]}= here, as in JAX.")
    known = ", ".join(list(inspect.signature(vmap).parameters)[1:-1])
    return AxisSpecError(f"vmap has no option {name!r}; it has {known}.")


def _check_options(fun: Any, axis_name: Any, axis_size: Any, randomness: Any, chunk_size: Any) -> None:
    if not callable(fun):
        raise AxisSpecError(f"vmap maps a function, but it got {shown(fun)}, which is not callable.")
    if axis_name is not None:
        _check_name(axis_name)
    _check_count("axis_size", axis_size, 0)
    _check_count("chunk_size", chunk_size, 1)
    if randomness not in _RANDOMNESS:
        raise AxisError(f"randomness must be 'error', 'different' or 'same', but it is {shown(randomness)}.")


def _check_name(axis_name: Any) -> None:
    try:
        hash(axis_name)
    except TypeError as error:
        raise AxisSpecError(f"axis_name must be hashable, but it is {shown(axis_name)}.") from error


def _check_count(name: str, value: Any, least: int) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise AxisSpecError(f"{name} must be an int or None, but it is {shown(value)}.")
    if value < least:
        raise AxisError(f"{name} must be at least {least}, but it is {value}.")
