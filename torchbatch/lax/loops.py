"""Loops over values that are known only when the function runs."""

from __future__ import annotations

import functools
import importlib
import operator
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch

from torchbatch._torch.guards import hidden_from_compile
from torchbatch.core import batch, loops, steps, tree
from torchbatch.core.carry import Carry
from torchbatch.core.describe import function_name, shown
from torchbatch.core.outputs import OutAxes
from torchbatch.core.scalars import integer, is_batched, is_known, number, scalar
from torchbatch.core.writes import may_write
from torchbatch.errors import AxisError, AxisSpecError, InputTypeError

_Tensor = torch.Tensor
_Parameters = ParamSpec("_Parameters")
_Result = TypeVar("_Result")
_is_compiling = torch.compiler.is_compiling


def _left_to_python(function: Callable[_Parameters, _Result]) -> Callable[_Parameters, _Result]:
    """A function that ``torch.compile`` does not follow: it ends its graph there, and Python runs the call."""
    loop_left_to_python = hidden_from_compile(function)  # what Dynamo's message calls it, if it must not end its graph

    @functools.wraps(function)
    def call(*args: _Parameters.args, **kwargs: _Parameters.kwargs) -> _Result:
        return loop_left_to_python(*args, **kwargs) if _is_compiling() else function(*args, **kwargs)

    return call


@_left_to_python
def scan(
    f: Callable[[Any, Any], tuple[Any, Any]],
    init: Any,
    xs: Any = None,
    length: int | None = None,
    reverse: bool = False,
    unroll: int | bool = 1,
) -> tuple[Any, Any]:
    """Go along the first axis of ``xs`` with a carry, and stack what each step returns.

    The same as::

        carry, ys = init, []
        for x in xs:
            carry, y = f(carry, x)
            ys.append(y)
        return carry, stack(ys)

    Shapes: ``([c], [n, x]) -> ([c], [n, y])``, for ``f: ([c], [x]) -> ([c], [y])``.

    Args:
        f: one step, from ``(carry, x)`` to ``(carry, y)``. It must not write into its arguments.
        init: the first carry: a tree of tensors and numbers. Each step returns one of the same structure, shapes and dtypes.
        xs: a tree of tensors with first axes of one size, or None.
        length: the number of steps, if ``xs`` is None.
        reverse: whether to begin at the end. ``ys`` is in the order of ``xs`` all the same.
        unroll: how many steps to write out at once where ``jit`` traces the loop; True writes out all. Each step of a
            compiled loop costs some microseconds, and so does each block of steps. It changes no result.

    Returns:
        The last carry, and the stacked ``y`` of all steps.

    Raises:
        OutputTypeError: ``f`` returns no pair, or a carry with another structure, shape or dtype.
        AxisError: the first axes of ``xs`` have different sizes, or there are none.
        InputTypeError: something in ``init`` or ``xs`` is no array.
        InPlaceError: ``f`` writes into its carry and hands it on.

    Example:
        >>> import torch
        >>> from torchbatch import lax
        >>> lax.scan(lambda total, x: (total + x, total), 0.0, torch.tensor([1.0, 2.0, 3.0]))
        (tensor(6.), tensor([0., 1., 3.]))

    Source: ``jax.lax.scan``.
    """
    _check_function(f, "scan", "f")
    _check_unroll(unroll, "scan")
    carry = Carry(init, "scan", "carry")
    slices = steps.Slices(xs, _count(length, "scan", "length"), "scan")
    return loops.scan(f, carry, slices, bool(reverse), unroll)


@_left_to_python
def while_loop(cond_fun: Callable[[Any], Any], body_fun: Callable[[Any], Any], init_val: Any) -> Any:
    """Call ``body_fun`` as long as ``cond_fun`` holds.

    Where each sample has its own condition, the loop goes on until it holds for none. A sample that has finished keeps its
    value, whatever ``body_fun`` would make of it.

    Shapes: ``[a] -> [a]``.

    Args:
        cond_fun: from a value to a single truth value.
        body_fun: from a value to the next one, of the same structure, shapes and dtypes. It must not write into its argument.
        init_val: the first value: a tree of tensors and numbers.

    Returns:
        The last value. It has no gradient in reverse mode, since the number of steps is not known beforehand; forward mode
        works.

    Raises:
        OutputTypeError: ``body_fun`` returns another structure, shape or dtype.
        InputTypeError: ``cond_fun`` returns no single truth value; something in ``init_val`` is no array.
        UnsupportedOperationError: (in the backward pass) the result is differentiated in reverse mode.

    Example:
        >>> import torch
        >>> from torchbatch import lax, vmap
        >>> def halvings(x):  # how often until it is at most 1
        ...     return lax.while_loop(lambda state: state[1] > 1, lambda state: (state[0] + 1, state[1] / 2), (0, x))[0]
        >>> vmap(halvings)(torch.tensor([1.0, 2.0, 100.0]))
        tensor([0, 1, 7])

    Source: ``jax.lax.while_loop``.
    """
    _check_function(cond_fun, "while_loop", "cond_fun")
    _check_function(body_fun, "while_loop", "body_fun")
    return loops.repeat_while(cond_fun, body_fun, Carry(init_val, "while_loop", "the value"))


@_left_to_python
def fori_loop(
    lower: Any, upper: Any, body_fun: Callable[[Any, Any], Any], init_val: Any, *, unroll: int | bool | None = None
) -> Any:
    """Call ``body_fun(i, value)`` for each ``i`` from ``lower`` on, below ``upper``.

    Shapes: ``([], [], [a]) -> [a]``.

    Args:
        lower, upper: integers. If they are the same for all samples, the loop has a gradient in reverse mode, as :func:`scan`
            has; if each sample has its own, it has none, as :func:`while_loop`.
        body_fun: from ``(i, value)`` to the next value, of the same structure, shapes and dtypes; ``i`` is a tensor.
        init_val: the first value: a tree of tensors and numbers.
        unroll: as in :func:`scan`.

    Returns:
        The last value; ``init_val``, if ``upper`` is not above ``lower``.

    Raises:
        OutputTypeError: ``body_fun`` returns another structure, shape or dtype.
        InputTypeError: a bound is not a single integer; something in ``init_val`` is no array.

    Example:
        >>> import torch
        >>> from torchbatch import lax
        >>> lax.fori_loop(1, 5, lambda i, product: product * i, 1)
        tensor(24)

    Source: ``jax.lax.fori_loop``.
    """
    _check_function(body_fun, "fori_loop", "body_fun")
    if unroll is not None:
        _check_unroll(unroll, "fori_loop")
    first, last = _bound(lower, "lower"), _bound(upper, "upper")
    carry = Carry(init_val, "fori_loop", "the value")
    if isinstance(first, int) and isinstance(last, int):
        return loops.repeat(body_fun, carry, first, last, unroll or False)
    return loops.repeat_while(
        lambda state: state[0] < last,
        lambda state: (state[0] + 1, body_fun(state[0], state[1])),
        Carry((torch.as_tensor(first), carry.value), "fori_loop", "(i, value)"),
    )[1]


@_left_to_python
def map(f: Callable[[Any], Any], xs: Any, *, batch_size: int | None = None, progress: bool = False) -> Any:
    """Call ``f`` for each slice of ``xs`` along the first axis, one after the other, and stack the results.

    It needs the memory of one call at a time. ``vmap`` makes all calls at once, and ``batch_size`` is between the two.

    Shapes: ``[n, x] -> [n, y]``, for ``f: [x] -> [y]``.

    Args:
        f: a function of one slice.
        xs: a tree of tensors with first axes of one size.
        batch_size: how many slices ``f`` is mapped over at once; None, or 0, calls it slice by slice.
        progress: whether to show a progress bar, on the standard error. It needs ``tqdm``.

    Returns:
        The results, stacked.

    Raises:
        AxisError: the first axes of ``xs`` have different sizes, or there are none; ``batch_size`` is below 0.
        InputTypeError, OutputTypeError: something in ``xs``, or in what ``f`` returns, is no array.
        ImportError: ``tqdm`` is not installed, and ``progress`` is true.

    Example:
        >>> import torch
        >>> from torchbatch import lax
        >>> lax.map(lambda x: x.sum(), torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        tensor([3., 7.])

    Source: ``jax.lax.map``; ``progress`` is torchbatch's own.
    """
    _check_function(f, "map", "f")
    size = _count(batch_size, "map", "batch_size") or None
    slices = steps.Slices(xs, None, "map")
    bar = _bar(slices.length) if progress else None
    try:
        if size is None:
            return loops.scan(_told(f, bar, 1), Carry((), "map", "carry"), slices, False)[1]
        return _in_batches(f, slices, size, bar)
    finally:
        if bar is not None:
            bar.close()


def _in_batches(f: Callable[[Any], Any], slices: steps.Slices, size: int, bar: Any) -> Any:
    """The results of ``f``, mapped over ``size`` slices at a time; those that are left over come last."""
    full = slices.length - slices.length % size
    parts = []
    if full or not slices.length:
        blocks = [leaf[:full].reshape(full // size, size, *leaf.shape[1:]) for leaf in slices.leaves]
        mapped = _told(functools.wraps(f)(functools.partial(_mapped, f)), bar, size)
        xs = steps.Slices(slices.structure.unflatten(blocks), None, "map")
        found = loops.scan(mapped, Carry((), "map", "carry"), xs, False)[1]
        parts.append(tree.map_leaves(lambda leaf: leaf.flatten(0, 1), found))
    if full < slices.length:
        parts.append(_mapped(f, slices.structure.unflatten([leaf[full:] for leaf in slices.leaves])))
        if bar is not None:
            bar.update(slices.length - full)
    return parts[0] if len(parts) == 1 else tree.map_leaves(lambda *leaves: torch.cat(leaves), *parts)


def _mapped(f: Callable[[Any], Any], xs: Any) -> Any:
    """``f`` of all slices at once."""
    leaves, structure = tree.flatten(xs)
    finish = OutAxes(0, False, f).finish
    call: Callable[..., Any] = lambda *values: f(structure.unflatten(values))  # noqa: E731
    axes = (0,) * len(leaves)
    return batch.run(call, leaves, axes, leaves[0].shape[0], None, "error", finish, may_write(f))[0]


def _told(f: Callable[[Any], Any], bar: Any, count: int) -> Callable[[Any, Any], Any]:
    """``f`` as the step of a scan, which moves the progress bar on."""

    def step(carry: Any, x: Any) -> Any:
        output = f(x)
        if bar is not None:
            bar.update(count)
        return carry, output

    step.__name__ = function_name(f)
    return step


def _bar(total: int) -> Any:
    try:
        bar: Any = importlib.import_module("tqdm").tqdm(total=total)
    except ImportError as error:
        raise ImportError("map: progress=True shows its bar with tqdm, which is not installed: pip install tqdm.") from error
    return bar


# --- options ---------------------------------------------------------------------------------------------------------


def _check_function(function: Any, who: str, name: str) -> None:
    if not callable(function):
        raise AxisSpecError(f"{who}: {name} must be a function, but it is {shown(function)}.")


def _check_unroll(unroll: Any, who: str) -> None:
    if not isinstance(unroll, bool):
        _count(unroll, who, "unroll", 0)


def _count(value: Any, who: str, name: str, least: int = 0) -> int | None:
    if value is None:
        return None
    try:
        found = operator.index(value)
    except TypeError:
        raise AxisSpecError(f"{who}: {name} must be an int or None, but it is {shown(value)}.") from None
    if found < least:
        raise AxisError(f"{who}: {name} must be at least {least}, but it is {found}.")
    return found


def _bound(value: Any, name: str) -> int | torch.Tensor:
    """A bound as a Python int, if that is known and the same for all samples."""
    known = integer(value)
    if known is not None:
        return known
    found = scalar(value, "fori_loop", name)
    if found.dtype is torch.bool or found.is_floating_point() or found.is_complex():
        raise InputTypeError(f"fori_loop: {name} must be an integer, but it is {shown(value)}.")
    return found if is_batched(found) or not is_known(found) else number(found)
