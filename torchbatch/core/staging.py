"""Loops and choices that jit traces as single steps of its graph, for flat lists of tensors, without gradients.

Each function here works in whatever transforms are open. Gradients are the matter of :mod:`torchbatch.core.staged_gradients`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from torchbatch._torch import staged
from torchbatch._torch.programs import Choice, Scan, While
from torchbatch._torch.staged import Grown, Named, Path, Places, Stack, Staged
from torchbatch.core.derivative import is_inexact
from torchbatch.core.frames import in_scope
from torchbatch.core.recompute import needs_gradient, note, unnoted
from torchbatch.core.scalars import is_batched, looks_across, of_a_sample, selected

Tensors = list[torch.Tensor]
Step = Callable[[Tensors, Tensors], tuple[Tensors, Tensors]]


def _staged(body: Callable[..., Tensors], inputs: Tensors) -> Staged:
    with unnoted():
        return staged.stage(body, inputs)


class _Body:
    """The body of a loop on plain tensors, for carries that have certain places."""

    def __init__(self, step: Step, stack: Stack, need: Places, places: Places, carry: Named, xs: Named) -> None:
        self._step, self._stack, self._need, self._x_places = step, stack, need, places
        self._carry, self._xs = sorted(carry), sorted(xs)
        self.y_paths: list[Path] = []
        self.y_places: Places = frozenset()

    def __call__(self, *values: torch.Tensor) -> Tensors:
        stack, count = self._stack, len(self._carry)
        carry = stack.raised(dict(zip(self._carry, values[:count], strict=True)), self._need)
        xs = stack.raised(dict(zip(self._xs, values[count:], strict=True)), self._x_places)
        with stack.everything():
            note([*carry, *xs])
            new, ys = self._step(carry, xs)
        lowered, places = stack.lowered(new, self._need)
        if places - self._need:
            raise Grown(places)
        found, self.y_places = stack.lowered(ys)
        self.y_paths = sorted(found)
        return [value.contiguous() for value in (*staged.flat(lowered), *staged.flat(found))]


def scan(step: Step, carry: Tensors, xs: Tensors, length: int, reverse: bool) -> tuple[Tensors, Tensors]:
    """The last carry and the stacked results of ``step``."""
    with Stack() as stack:
        slices, x_places = stack.lowered(xs, at=1)
        need: Places = frozenset()
        while True:
            first, need = stack.lowered(carry, need)
            body = _Body(step, stack, need, x_places, first, slices)
            try:
                found = _staged(body, [*staged.flat(first), *[value[0] for value in staged.flat(slices)]])
                break
            except Grown as grown:
                need = need | grown.places
        count = len(first)
        results = found.results[:count] + [like._replace(shape=(length, *like.shape)) for like in found.results[count:]]
        sizes = {"carried": count, "sliced": len(slices), "length": length}
        program = Scan([found.body], results, **sizes, reverse=reverse)
        out = staged.called(program, [*staged.flat(first), *staged.flat(slices), *found.captured])
        new = stack.raised(dict(zip(sorted(first), out[:count], strict=True)), need)
        ys = stack.raised(dict(zip(body.y_paths, out[count:], strict=True)), body.y_places, at=1)
    note([*new, *ys])
    return new, ys


def repeat_while(
    condition: Callable[[Tensors], torch.Tensor], fun: Callable[[Tensors], Tensors], carry: Tensors, reads_moving: bool = False
) -> tuple[Tensors, list[bool]]:
    """The carry after as many steps as the condition holds, for each sample, and which of it depends on what is differentiated.

    Args:
        reads_moving: whether the functions read tensors from outside that need a gradient.
    """
    holding = condition(carry)
    loop = _WhileLoop(condition, fun, carry, holding)
    with Stack() as stack:
        loop.keeps_mask = loop.masked and not _is_cheap(condition, carry, stack)
        need: Places = frozenset()
        while True:
            with stack.everything():
                values = loop.values()
            first, need = stack.lowered(values, need)
            body = _WhileBody(loop.step, stack, need, frozenset(), first, {})
            try:
                found = _staged(body, [*staged.flat(first), torch.ones((), dtype=torch.bool, device=holding.device)])
            except Grown as grown:
                need = need | grown.places
                continue
            if loop.masked or not body.y_places:
                break
            loop.mask()
            loop.keeps_mask, need = not _is_cheap(condition, carry, stack), frozenset()
        count = len(first)
        program = While([found.body], found.results, carried=count + 1)
        goes_on = _anywhere(staged.flat(stack.lowered([holding])[0])[0])
        out = staged.called(program, [*staged.flat(first), goes_on, *found.captured])
        new = stack.raised(dict(zip(sorted(first), out[:count], strict=True)), need)[: len(carry)]
    note(new)
    begin = [needs_gradient(values[path[0]]) for path in sorted(first)]
    outside = [reads_moving and is_inexact(value) for value in found.captured]
    moves = program.moved_by([*begin, False, *outside])
    moved = {path[0] for path, moves in zip(sorted(first), moves[:count], strict=True) if moves}
    return new, [i in moved for i in range(len(carry))]


def _anywhere(holding: torch.Tensor) -> torch.Tensor:
    return holding.any() if holding.dim() else holding


class _WhileBody(_Body):
    """One whose steps have one result, a truth value; it returns, after the carry, whether that holds in any sample.

    Its last argument is the truth value of the step before, which it does not need.
    """

    def __call__(self, *values: torch.Tensor) -> Tensors:
        *carry, holding = super().__call__(*values[:-1])
        return [*carry, _anywhere(holding)]


def _is_cheap(condition: Callable[[Tensors], torch.Tensor], carry: Tensors, stack: Stack) -> bool:
    """Whether the compiler fuses a condition with what is around, so that it costs less to compute it anew than to keep it."""
    first, places = stack.lowered(carry)
    body = _Body(lambda values, _: ([], [condition(values)]), stack, places, frozenset(), first, {})
    found = _staged(body, staged.flat(first)).body.graph
    return staged.is_fused(found)


class _WhileLoop:
    """What a ``while_loop`` carries: the values, then, if samples may end at different times, values for which the condition
    held (see :mod:`torchbatch.core.steps`), and where it holds, if that is not computed anew. Compiled code handles numbers much
    faster than truth values, so this is an int32.
    """

    def __init__(self, condition: Any, fun: Any, carry: Tensors, holding: torch.Tensor) -> None:
        self._condition, self._fun, self._carry, self._holding = condition, fun, carry, holding
        self.keeps_mask = True
        self.masked = is_batched(holding)
        self._seen = self.masked and looks_across(holding)

    def mask(self) -> None:
        """Samples may end at different times, as it turns out."""
        self.masked, self._seen = True, any(name is not None for name, *_ in in_scope.stack)

    def values(self) -> Tensors:
        """What the loop begins with."""
        if not self.masked:
            return list(self._carry)
        mask = [self._holding.int()] if self.keeps_mask else []
        if self._seen:
            return [*self._carry, *mask]
        valid = of_a_sample(self._holding, self._carry) if is_batched(self._holding) else self._carry
        return [*self._carry, *selected(self._holding, self._carry, valid), *mask]

    def step(self, values: Tensors, _: Tensors) -> tuple[Tensors, Tensors]:
        """One step for all samples; its result is where the condition holds then."""
        count = len(self._carry)
        carry, rest = values[:count], values[count:]
        if not self.masked:
            new = self._fun(carry)
            return new, [self._condition(new)]
        holding, valid = (rest[-1] != 0, rest[:-1]) if self.keeps_mask else (self._condition(carry), rest)
        given = selected(holding, carry, valid) if valid else carry
        new = selected(holding, self._fun(given), carry)
        goes_on = self._condition(new)
        return [*new, *(given if valid else ()), *([goes_on.int()] if self.keeps_mask else ())], [goes_on]


def choose(index: torch.Tensor, branches: Sequence[Callable[[], Tensors]]) -> Tensors:
    """The values of one branch; all have the same number of values, of the same types."""
    with Stack() as stack:
        number = staged.flat(stack.lowered([index])[0])[0]
        need: Places = frozenset()
        while True:
            found = [_Branch(branch, stack, need) for branch in branches]
            places = frozenset().union(*(each.places for each in found))
            if all(each.places == places for each in found):
                break
            need = places
        captured = {id(value): value for each in found for value in each.staged.captured}
        order = {key: i for i, key in enumerate(captured)}
        inputs = [[order[id(value)] for value in each.staged.captured] for each in found]
        program = Choice([each.staged.body for each in found], found[0].staged.results, inputs=inputs)
        out = staged.called(program, [number, *captured.values()])
        values = stack.raised(dict(zip(found[0].paths, out, strict=True)), places)
    note(values)
    return values


class _Branch:
    """A branch that has been traced."""

    def __init__(self, thunk: Callable[[], Tensors], stack: Stack, need: Places) -> None:
        self.places: Places = frozenset()
        self.paths: list[Path] = []
        self._thunk, self._stack, self._need = thunk, stack, need
        self.staged = _staged(self._run, [])

    def _run(self) -> Tensors:
        with self._stack.everything():
            values = self._thunk()
        found, self.places = self._stack.lowered(values, self._need)
        self.paths = sorted(found)
        return [value.contiguous() for value in staged.flat(found)]
