"""Loops and choices, run in Python, or, while jit traces, as single steps of its graph."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from torchbatch._torch import staged
from torchbatch.core import staged_gradients, staging, steps, tree
from torchbatch.core.argnums import flatten
from torchbatch.core.carry import Carry, Promoted, number_as
from torchbatch.core.choice import alike, check_structures
from torchbatch.core.describe import function_name
from torchbatch.core.enclosed import Outside
from torchbatch.core.recompute import needs_gradient
from torchbatch.core.steps import Slices

Function = Callable[..., Any]
Tensors = list[torch.Tensor]
_Tensor = torch.Tensor


def scan(fun: Function, carry: Carry, slices: Slices, reverse: bool, unroll: int | bool = False) -> tuple[Any, Any]:
    """The last carry, and the results of all steps; ``unroll`` says how many are written out at once in a graph."""
    if slices.length and _only_shapes([*carry.leaves, *slices.leaves]):
        return _one_step_of_scan(fun, carry, slices)
    if unroll is True or slices.length < 2 or not staged.is_staging():
        return steps.scan(fun, carry, slices, reverse)
    if 1 < unroll < slices.length and not carry.has_numbers:
        return _scan_blocks(fun, carry, slices, reverse, unroll)
    step = _Step(fun, carry, slices)
    new, ys = staged_gradients.scan(step, carry.leaves, slices.leaves, step.outside.tensors, slices.length, reverse)
    return carry.rebuild(new), step.structure.unflatten(ys)


def _scan_blocks(fun: Function, carry: Carry, slices: Slices, reverse: bool, count: int) -> tuple[Any, Any]:
    """A scan with ``count`` steps at a time; those that are left over come last."""
    rest, full = slices.length % count, slices.length // count
    (first, last) = (slices.part(rest, slices.length), slices.part(0, rest)) if reverse else (slices.part(0, full * count), None)
    last = slices.part(full * count, slices.length) if last is None else last

    def block(value: Any, part: Any) -> tuple[Any, Any]:
        return steps.scan(fun, carry.like(value), Slices(part, count, carry.who), reverse)

    value, ys = scan(block, carry, first.blocks(count), reverse)
    ys = tree.map_leaves(lambda leaf: leaf.flatten(0, 1), ys)
    if not rest:
        return value, ys
    value, others = steps.scan(fun, carry.like(value), last, reverse)
    parts = (others, ys) if reverse else (ys, others)
    return value, tree.map_leaves(lambda *leaves: torch.cat(leaves), *parts)


def repeat(fun: Function, carry: Carry, lower: int, upper: int, unroll: int | bool = False) -> Any:
    """The carry after ``fun(i, carry)`` for each ``i`` from ``lower`` on, below ``upper``."""
    if upper > lower and _only_shapes(carry.leaves):
        return _one_step(lambda value: fun(torch.zeros((), dtype=torch.int64, device="meta"), value), carry)
    if unroll is True or upper - lower < 2 or not staged.is_staging():
        return steps.repeat(fun, carry, lower, upper)
    numbers = Slices(torch.arange(lower, upper), None, "fori_loop")

    def step(value: Any, number: Any) -> tuple[Any, tuple[()]]:
        return fun(number, value), ()

    step.__name__ = getattr(fun, "__name__", type(fun).__name__)
    return scan(step, carry, numbers, False, unroll)[0]


def repeat_while(condition: Function, fun: Function, carry: Carry) -> Any:
    """The carry after as many steps as the condition holds, for each sample."""
    if _only_shapes(carry.leaves):
        steps.predicate(condition, carry.value)
        return _one_step(fun, carry)
    if not staged.is_staging():
        return steps.repeat_while(condition, fun, carry)
    condition, fun = _as_here(condition), _as_here(fun)

    def both(leaves: Tensors) -> None:
        value = carry.rebuild(leaves)
        steps.predicate(condition, value)
        carry.fit(fun(value), fun)

    outside = _settled(carry, both, lambda: carry.leaves, (condition, fun))
    sources = [value for value in (*carry.leaves, *outside.tensors) if torch.is_grad_enabled() and needs_gradient(value)]
    new, moved = staging.repeat_while(
        lambda leaves: steps.predicate(condition, carry.rebuild(leaves)),
        lambda leaves: carry.fit(fun(carry.rebuild(leaves)), fun)[1],
        carry.leaves,
        any(map(needs_gradient, outside.tensors)),
    )
    return carry.rebuild([steps.forward_only(leaf, sources) if m else leaf for leaf, m in zip(new, moved, strict=True)])


def _only_shapes(leaves: Tensors) -> bool:
    """Whether there are no numbers, so that one step tells what there is to know of all."""
    return any(leaf.is_meta for leaf in leaves)


def _one_step_of_scan(fun: Function, carry: Carry, slices: Slices) -> tuple[Any, Any]:
    results: Any = None

    def step(value: Any) -> Any:
        nonlocal results
        output, results = steps.pair(fun(value, slices.structure.unflatten([leaf.select(0, 0) for leaf in slices.leaves])), fun)
        return output

    step.__name__ = function_name(fun)
    value = _one_step(step, carry)
    given, structure = flatten(results)
    leaves = [steps.result_leaf(leaf, results, i, fun, carry.who) for i, leaf in enumerate(given)]
    return value, structure.unflatten([leaf.unsqueeze(0).expand(slices.length, *leaf.shape).contiguous() for leaf in leaves])


def _as_here(function: Function) -> Function:
    """The function, for which gradients are recorded, or not, as they are here; while a body is traced they are not."""
    enabled = torch.is_grad_enabled()

    @functools.wraps(function)
    def called(*args: Any) -> Any:
        with torch.set_grad_enabled(enabled):
            return function(*args)

    called.__name__ = function_name(function)
    return called


def _one_step(fun: Function, carry: Carry) -> Any:
    while True:
        try:
            return carry.fit(fun(carry.value), fun)[0]
        except Promoted:
            carry.promote()
            continue


def _settled(carry: Carry, run: Callable[[Tensors], Any], arguments: Callable[[], Tensors], function: Any) -> Outside:
    """What a step reads beside its arguments, when the numbers in the carry have the dtype that the step gives them."""
    while True:
        try:
            return Outside(run, arguments(), function)
        except Promoted:
            carry.promote()
            continue


class _Step:
    """The step of a scan on flat lists of tensors."""

    def __init__(self, fun: Function, carry: Carry, slices: Slices) -> None:
        fun = _as_here(fun)
        self._fun, self._carry, self._slices = fun, carry, slices
        with staged.unrecorded():
            first = [leaf.select(0, 0) for leaf in slices.leaves]
        count = len(carry.leaves)
        self.structure: Any = None

        def run(values: Tensors) -> Any:
            return self._run(values[:count], values[count:], fun)

        self.outside = _settled(carry, run, lambda: [*carry.leaves, *first], fun)

    def __call__(self, carry: Tensors, x: Tensors, others: Tensors) -> tuple[Tensors, Tensors]:
        with self.outside.replaced(others):
            return self._run(carry, x, self.outside.closed_over(self._fun, others))

    def _run(self, carry: Tensors, x: Tensors, fun: Function) -> tuple[Tensors, Tensors]:
        output, result = steps.pair(fun(self._carry.rebuild(carry), self._slices.structure.unflatten(x)), self._fun)
        new = self._carry.fit(output, self._fun)[1]
        given, self.structure = flatten(result)
        return new, [steps.result_leaf(leaf, result, i, self._fun, self._carry.who) for i, leaf in enumerate(given)]


def choose(index: torch.Tensor, branches: Sequence[Function], operands: tuple[Any, ...], who: str) -> Any:
    """The output of one branch, where jit traces and ``index`` is the same for all samples."""
    given = _Operands(operands)
    branches = [_as_here(branch) for branch in branches]
    traced = [Outside(given.caller(branch), given.tensors, branch) for branch in branches]
    outputs = [each.output for each in traced]
    check_structures(outputs, branches, who)
    columns = list(zip(*[flatten(output)[0] for output in outputs], strict=True))
    with staged.unrecorded():
        types = [alike(list(column), outputs[0], i, branches, who)[0].dtype for i, column in enumerate(columns)]
    inputs, flat = list(given.tensors), []
    for branch, outside in zip(branches, traced, strict=True):
        flat.append(_Flat(branch, given, outside, len(inputs), types))
        inputs += outside.tensors
    return flatten(outputs[0])[1].unflatten(staged_gradients.choose(index, flat, inputs))


class _Operands:
    """The operands of a choice, around other tensors."""

    def __init__(self, operands: tuple[Any, ...]) -> None:
        self._leaves, self._structure = flatten(operands)
        self._places = [i for i, leaf in enumerate(self._leaves) if isinstance(leaf, _Tensor)]
        self.tensors: Tensors = [self._leaves[i] for i in self._places]

    def caller(self, branch: Function) -> Callable[[Tensors], Any]:
        """What calls a branch with tensors in the place of those here."""
        return lambda tensors: branch(*self.rebuild(tensors))

    def rebuild(self, tensors: Sequence[torch.Tensor]) -> Any:
        leaves = list(self._leaves)
        for i, value in zip(self._places, tensors, strict=False):
            leaves[i] = value
        return self._structure.unflatten(leaves)


class _Flat:
    """A branch on a flat list of tensors: the operands, then what all branches read beside them."""

    def __init__(self, branch: Function, operands: _Operands, outside: Outside, start: int, types: list[torch.dtype]) -> None:
        self._branch, self._operands, self._outside, self._types = branch, operands, outside, types
        self._own = slice(start, start + len(outside.tensors))

    def __call__(self, inputs: Tensors) -> Tensors:
        own = inputs[self._own]
        with self._outside.replaced(own):
            leaves = flatten(self._outside.closed_over(self._branch, own)(*self._operands.rebuild(inputs)))[0]
        values = [steps.result_leaf(leaf, leaves, i, self._branch, "cond") for i, leaf in enumerate(leaves)]
        triples = zip(leaves, values, self._types, strict=True)
        return [value if value.dtype is dtype else number_as(leaf, value.device, dtype) for leaf, value, dtype in triples]
