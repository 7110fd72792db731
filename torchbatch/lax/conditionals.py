"""Choose between functions, or between values, by something that is known only when the function runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from torchbatch._torch.staged import is_staging
from torchbatch.core.arrays import as_tensor
from torchbatch.core.choice import as_tensors, per_sample
from torchbatch.core.describe import describe, shown
from torchbatch.core.loops import choose
from torchbatch.core.scalars import is_batched, is_known, number, scalar, truth
from torchbatch.errors import AxisError, AxisSpecError, InputTypeError

_Tensor = torch.Tensor
_is_compiling = torch.compiler.is_compiling
_nothing: Any = object()


def cond(pred: Any, true_fun: Callable[..., Any], false_fun: Callable[..., Any], *operands: Any, operand: Any = _nothing) -> Any:
    """Call ``true_fun`` or ``false_fun``.

    Where ``pred`` is the same for all samples, one of the two runs. Where each sample has its own, both run, for all samples,
    and the results are selected; in the gradient, the function that a sample did not choose has no part, NaN included.

    Shapes: ``[] and those of the operands -> those of the outputs``.

    Args:
        pred: a truth value or a number, which is true unless it is zero.
        true_fun, false_fun: take the operands; both return the same structure, shapes and dtypes.
        operands: trees, or anything else that the functions take.
        operand: another way to give a single operand.

    Returns:
        What the chosen function returns, with tensors for leaves.

    Raises:
        InputTypeError: ``pred`` is not a single number.
        OutputTypeError: the functions return different types. Where only one of them runs, it alone is looked at.

    Example:
        >>> import torch
        >>> from torchbatch import lax, vmap
        >>> def root(x):
        ...     return lax.cond(x > 0, torch.sqrt, torch.zeros_like, x)
        >>> vmap(root)(torch.tensor([4.0, -1.0, 9.0]))
        tensor([2., 0., 3.])

    Source: ``jax.lax.cond``.
    """
    older = _older_form(true_fun, false_fun, operands)
    if older is not None:
        return cond(pred, *older)
    _check_functions("cond", true_fun=true_fun, false_fun=false_fun)
    operands = _operands(operands, operand, "cond")
    value = scalar(pred, "cond", "pred")
    if not _is_decided(value):
        chosen = value if value.dtype is torch.bool else value != 0
        if _is_step(value):
            return choose(chosen, [false_fun, true_fun], operands, "cond")
        return per_sample([chosen, ~chosen], [true_fun, false_fun], operands, "cond")
    function = true_fun if truth(value) else false_fun
    return as_tensors(function(*operands), "cond", function)


def switch(index: Any, branches: Sequence[Callable[..., Any]], *operands: Any, operand: Any = _nothing) -> Any:
    """Call one of several functions.

    Where ``index`` is the same for all samples, one function runs. Where each sample has its own, all of them run, for all
    samples, and the results are selected; gradients are as in :func:`cond`.

    Shapes: ``[] and those of the operands -> those of the outputs``.

    Args:
        index: an integer; one that is too small or too large stands for the first or the last function.
        branches: functions of the operands; all return the same structure, shapes and dtypes.
        operands: trees, or anything else that the functions take.
        operand: another way to give a single operand.

    Returns:
        What the chosen function returns, with tensors for leaves.

    Raises:
        InputTypeError: ``index`` is not a single integer.
        AxisError: there are no branches.
        OutputTypeError: the functions return different types.

    Example:
        >>> import torch
        >>> from torchbatch import lax, vmap
        >>> step = lambda i, x: lax.switch(i, [torch.neg, torch.sin, torch.square], x)
        >>> vmap(step)(torch.tensor([0, 2, 7]), torch.tensor([5.0, 5.0, 3.0]))
        tensor([-5., 25.,  9.])

    Source: ``jax.lax.switch``.
    """
    if not isinstance(branches, Iterable):
        raise AxisSpecError(f"switch: branches must be a list of functions, but it is {shown(branches)}.")
    branches = tuple(branches)
    if not branches:
        raise AxisError("switch: branches must hold at least one function, but there is none.")
    _check_functions("switch", **{f"branches[{i}]": branch for i, branch in enumerate(branches)})
    operands = _operands(operands, operand, "switch")
    value = scalar(index, "switch", "index")
    if value.dtype is torch.bool or value.is_floating_point() or value.is_complex():
        raise InputTypeError(f"switch: index must be an integer, but it is {describe(value)}. Convert it: index.int().")
    last = len(branches) - 1
    if not _is_decided(value):
        if _is_step(value):
            return choose(value, branches, operands, "switch")
        value = value.clamp(0, last)
        return per_sample([value == i for i in range(last + 1)], branches, operands, "switch")
    function = branches[min(max(number(value), 0), last)]
    return as_tensors(function(*operands), "switch", function)


def select(pred: Any, on_true: Any, on_false: Any) -> torch.Tensor:
    """Choose between two tensors, element by element or as wholes.

    Shapes: ``([a], [a], [a]) -> [a]`` or ``([], [a], [a]) -> [a]``.

    Args:
        pred: truth values, of the shape of the others or a single one.
        on_true, on_false: tensors of one shape and dtype.

    Returns:
        A tensor like them.

    Raises:
        InputTypeError: ``pred`` holds no truth values, or the shapes or dtypes differ.

    Example:
        >>> import torch
        >>> from torchbatch import lax
        >>> lax.select(torch.tensor([True, False]), torch.tensor([1, 2]), torch.tensor([3, 4]))
        tensor([1, 4])

    Source: ``jax.lax.select``. ``torch.where`` broadcasts and promotes; this does not.
    """
    return _selected(_array(pred, "pred", "select"), [on_false, on_true], ["on_false", "on_true"], "select")


def select_n(which: Any, *cases: Any) -> torch.Tensor:
    """Choose between several tensors by number, element by element or as wholes.

    Shapes: ``([a], [a], …) -> [a]`` or ``([], [a], …) -> [a]``.

    Args:
        which: the numbers of the cases, from 0, of the shape of the cases or a single one; or truth values, which choose
            the second of two cases where they are true.
        cases: tensors of one shape and dtype.

    Returns:
        A tensor like them. A number that is out of bounds chooses the nearest case.

    Raises:
        InputTypeError: ``which`` holds neither integers nor truth values, or the shapes or dtypes differ.
        AxisError: there are no cases, or more than two for truth values.

    Example:
        >>> import torch
        >>> from torchbatch import lax
        >>> lax.select_n(torch.tensor([2, 0]), torch.tensor([1, 2]), torch.tensor([3, 4]), torch.tensor([5, 6]))
        tensor([5, 2])

    Source: ``jax.lax.select_n``.
    """
    if not cases:
        raise AxisError("select_n: there must be at least one case, but there is none.")
    return _selected(_array(which, "which", "select_n"), cases, [f"cases[{i}]" for i in range(len(cases))], "select_n")


def _selected(which: torch.Tensor, cases: Sequence[Any], names: Sequence[str], who: str) -> torch.Tensor:
    values = [_array(case, name, who) for case, name in zip(cases, names, strict=True)]
    for value, name in zip(values, names, strict=True):
        if value.shape != values[0].shape or value.dtype is not values[0].dtype:
            raise InputTypeError(
                f"{who}: the tensors must have one shape and dtype, but {names[0]} is {describe(values[0])} and {name} is "
                f"{describe(value)}. torch.where broadcasts."
            )
    what = "pred" if who == "select" else "which"
    if which.dim() and which.shape != values[0].shape:
        raise InputTypeError(
            f"{who}: {what} must be a single number or have the shape of the tensors, but it is {describe(which)} and they are "
            f"{describe(values[0])}."
        )
    if which.dtype is torch.bool and len(values) > 2:
        raise AxisError(f"{who}: truth values choose between two cases at most, but there are {len(values)}.")
    if which.is_floating_point() or which.is_complex() or (who == "select" and which.dtype is not torch.bool):
        kinds = "truth values" if who == "select" else "integers or truth values"
        raise InputTypeError(f"{who}: {what} must hold {kinds}, but it is {describe(which)}.")
    return _nth(which, values)


def _nth(which: torch.Tensor, values: Sequence[torch.Tensor]) -> torch.Tensor:
    result = values[0]
    for i, value in enumerate(values[1:], 1):
        result = torch.where(which if which.dtype is torch.bool else which >= i, value, result)
    return result.clone() if len(values) == 1 else result


def _array(value: Any, name: str, who: str) -> torch.Tensor:
    found = as_tensor(value)
    if found is None:
        raise InputTypeError(f"{who}: {name} is {shown(value)}, which is no array.")
    return found


def _older_form(yes: Any, yes_fun: Any, rest: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Two functions and a common operand, where each function was given with an operand of its own, as JAX still allows."""
    if callable(yes) or not callable(yes_fun) or len(rest) != 2 or not callable(rest[1]):
        return None
    no, no_fun = rest
    return lambda pair: yes_fun(pair[0]), lambda pair: no_fun(pair[1]), (yes, no)


def _is_decided(value: torch.Tensor) -> bool:
    """Whether one value decides for all samples, and Python can read it."""
    return not _is_compiling() and not is_batched(value) and is_known(value)


def _is_step(value: torch.Tensor) -> bool:
    """Whether the choice becomes one step of a graph, in which one function runs."""
    return not _is_compiling() and not is_batched(value) and is_staging()


def _operands(operands: tuple[Any, ...], operand: Any, who: str) -> tuple[Any, ...]:
    if operand is _nothing:
        return operands
    if operands:
        raise AxisSpecError(f"{who}: give operands by position, or one as operand=…, but not both.")
    return (operand,)


def _check_functions(who: str, **functions: Any) -> None:
    for name, function in functions.items():
        if not callable(function):
            raise AxisSpecError(f"{who}: {name} must be a function, but it is {shown(function)}.")
