"""Gradients of the loops and choices of :mod:`torchbatch.core.staging`: each is differentiated as one function.

The gradient of a scan is a scan in the other direction, whose step runs the step of the first one again, for the carry that it
began with, and pulls the cotangents back through it. So what is kept for the backward pass is the carry of each step. The
gradient of a choice is a choice between the gradients. Forward mode is a scan of the step on values and tangents, and a choice
between the forward derivatives. As these are scans and choices themselves, they can be differentiated again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from torchbatch._torch import across, derivatives, levels, seeding, wrappers
from torchbatch.core import staging
from torchbatch.core.derivative import is_inexact, or_zeros
from torchbatch.core.enclosed import Surroundings
from torchbatch.core.frames import in_scope
from torchbatch.core.recompute import needs_gradient, note

Tensors = list[torch.Tensor]
Step = Callable[[Tensors, Tensors, Tensors], tuple[Tensors, Tensors]]
Branch = Callable[[Tensors], Tensors]
Cotangents = Sequence[torch.Tensor | None]
Moving = Mapping[int, torch.Tensor]  # tangents by the number of the input
Maps = Sequence[tuple[int, int]]  # level and size


def scan(step: Step, carry: Tensors, xs: Tensors, others: Tensors, length: int, reverse: bool) -> tuple[Tensors, Tensors]:
    """``staging.scan`` of ``step(carry, x, others)``, which reads no other tensor that needs a gradient."""
    if not _recorded([*carry, *xs, *others]):
        return staging.scan(_bound(step, others), carry, xs, length, reverse)
    call = _Scan(step, (len(carry), len(xs), len(others)), length, reverse)
    out = _applied(call, [*carry, *xs, *others])
    return out[: len(carry)], out[len(carry) : len(out) - len(carry)]


def choose(index: torch.Tensor, branches: Sequence[Branch], inputs: Tensors) -> Tensors:
    """``staging.choose`` of functions of ``inputs``, which read no other tensors that need a gradient."""
    if not _recorded(inputs):
        return staging.choose(index, [functools.partial(branch, inputs) for branch in branches])
    return _applied(_Choice(branches), [index, *inputs])


def _bound(step: Step, others: Tensors) -> staging.Step:
    return lambda carry, x: step(carry, x, others)


def _recorded(values: Sequence[torch.Tensor]) -> bool:
    return torch.is_grad_enabled() and any(is_inexact(value) and needs_gradient(value) for value in values)


def _applied(call: _Call, inputs: Tensors) -> Tensors:
    out: Sequence[torch.Tensor] = _Function.apply(call, *inputs, *call.surroundings.tokens)  # type: ignore[no-untyped-call]
    note(out)
    return list(out)


class _Call:
    """One loop or choice, as a function of tensors; the last of them are the tokens of its surroundings."""

    def __init__(self) -> None:
        self.surroundings = Surroundings()

    def _split(self, values: Sequence[torch.Tensor]) -> tuple[Tensors, Tensors]:
        count = len(values) - len(self.surroundings.tokens)
        return list(values[:count]), list(values[count:])

    def forward(self, values: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """The outputs."""
        inputs, tokens = self._split(values)
        with self.surroundings.again(tokens):
            return tuple(self.run(inputs))

    def backward(
        self, values: Sequence[torch.Tensor], kept: Tensors, wanted: list[int], given: Cotangents, inside: Maps
    ) -> Cotangents:
        """Cotangents of all inputs, None where they are not wanted; the maps ``inside`` of what differentiates are open again."""
        inputs, tokens = self._split(values)
        with self.surroundings.again(tokens):
            found = self.pull(inputs, kept, wanted, _dealt_out(given, inputs, inside))
        result: list[torch.Tensor | None] = [None] * len(values)
        for i, value in zip(wanted, found, strict=True):
            result[i] = value
        return result

    def tangents(self, values: Sequence[torch.Tensor], moving: Moving) -> Cotangents:
        """Tangents of all outputs, None where they are no floating-point numbers."""
        inputs, tokens = self._split(values)
        with self.surroundings.again(tokens):
            return self.push(inputs, moving)

    def kept(self, outputs: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        """Which outputs the backward pass needs."""
        return ()

    def run(self, inputs: Tensors) -> Tensors:
        raise NotImplementedError

    def push(self, inputs: Tensors, moving: Moving) -> Cotangents:
        raise NotImplementedError

    def pull(self, inputs: Tensors, kept: Tensors, wanted: list[int], given: Cotangents) -> Tensors:
        raise NotImplementedError


def _dealt_out(given: Cotangents, inputs: Tensors, inside: Maps) -> Cotangents:
    """Cotangents in which each sample has its part: what all share counts once outside of a map, and once a sample in it."""
    named = {level for name, _, level, _ in in_scope.stack if name is not None}
    for level, size in inside:
        if level in named or any(levels.is_batched_at(value, level) for value in inputs):
            given = [c if c is None or levels.is_batched_at(c, level) else across.part(c, level, size) for c in given]
    return given


def _once(tangent: torch.Tensor | None, mapped: list[bool], inside: Maps) -> torch.Tensor | None:
    """A tangent whose sum over the samples is the tangent of what they share, which is the same in each: PyTorch sums it."""
    for (level, size), own in zip(inside, mapped, strict=True):
        if tangent is not None and not own and levels.is_batched_at(tangent, level):
            tangent = tangent / max(size, 1)
    return tangent


class _Scan(_Call):
    """A scan. Beside its own outputs it returns the carry that each step began with."""

    def __init__(self, step: Step, counts: tuple[int, int, int], length: int, reverse: bool) -> None:
        super().__init__()
        self._step, self._counts, self._length, self._reverse = step, counts, length, reverse

    def _parts(self, inputs: Tensors) -> tuple[Tensors, Tensors, Tensors]:
        carry, xs, _ = self._counts
        return inputs[:carry], inputs[carry : carry + xs], inputs[carry + xs :]

    def _with_begin(self, carry: Tensors, x: Tensors, others: Tensors) -> tuple[Tensors, Tensors]:
        new, ys = self._step(carry, x, others)
        return new, [*ys, *carry]

    def run(self, inputs: Tensors) -> Tensors:
        carry, xs, others = self._parts(inputs)
        new, ys = staging.scan(_bound(self._with_begin, others), carry, xs, self._length, self._reverse)
        return [*new, *ys]

    def push(self, inputs: Tensors, moving: Moving) -> Cotangents:
        carry, xs, others = self._parts(inputs)
        start, end = len(carry), len(carry) + len(xs)
        by_x, by_others = [i - start for i in moving if start <= i < end], [i - end for i in moving if i >= end]
        plan = _Push(self._with_begin, carry, by_x, by_others)
        begin = [or_zeros(moving.get(i), carry[i]) for i in plan.inexact]
        along = [moving[i + start] for i in plan.xs]
        beside = [moving[i + end] for i in plan.others]
        new, ys = scan(plan, [*carry, *begin], [*xs, *along], [*others, *beside], self._length, self._reverse)
        by_carry = dict(zip(plan.inexact, new[len(carry) :], strict=True))
        own = iter(ys[len(plan.moved) :])
        return [*[by_carry.get(i) for i in range(len(carry))], *[next(own) if moves else None for moves in plan.moved]]

    def kept(self, outputs: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        return outputs[len(outputs) - self._counts[0] :]

    def pull(self, inputs: Tensors, kept: Tensors, wanted: list[int], given: Cotangents) -> Tensors:
        carry, xs, others = self._parts(inputs)
        first, ys = given[: len(carry)], given[len(carry) : len(given) - len(carry)]
        begins = given[len(given) - len(carry) :]
        plan = _Pull(self._step, wanted, carry, xs, others, [value is not None for value in ys])
        begin = [or_zeros(c, value) for c, value in zip(first, carry, strict=True) if is_inexact(value)]
        sums = [torch.zeros_like(others[i]) for i in plan.others]
        beside = [value for value in (*ys, *begins) if value is not None]
        plan.begins = [value is not None for value in begins]
        new, found = scan(plan, [*begin, *sums], [*kept, *xs, *beside], others, self._length, not self._reverse)
        by_carry = dict(zip(plan.inexact, new, strict=False))
        return [*[by_carry[i] for i in plan.carry], *found, *new[len(begin) :]]


class _Pull:
    """One step of the backward pass of a scan: from cotangents of what a step returned to those of what it was given."""

    def __init__(self, step: Step, wanted: list[int], carry: Tensors, xs: Tensors, others: Tensors, has_ys: list[bool]) -> None:
        self._step, self._counts, self._has_ys = step, (len(carry), len(xs)), has_ys
        self.begins: list[bool] = []
        self.inexact = [i for i, value in enumerate(carry) if is_inexact(value)]
        start, end = len(carry), len(carry) + len(xs)
        self.carry = [i for i in wanted if i < start]
        self.xs = [i - start for i in wanted if start <= i < end]
        self.others = [i - end for i in wanted if i >= end]

    def __call__(self, cotangents: Tensors, x: Tensors, others: Tensors) -> tuple[Tensors, Tensors]:
        count, slices = self._counts
        carry, xs, rest = x[:count], x[count : count + slices], iter(x[count + slices :])
        ys = [next(rest) if has else None for has in self._has_ys]
        begins = [next(rest) if has else None for has in self.begins]
        sources = [*[carry[i] for i in self.inexact], *[xs[i] for i in self.xs], *[others[i] for i in self.others]]

        def flat(*values: torch.Tensor) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
            note(values)
            own = iter(values)
            given = [_with(carry, self.inexact, own), _with(xs, self.xs, own), _with(others, self.others, own)]
            new, results = self._step(*given)
            kept = [value for value, has in zip(results, self._has_ys, strict=True) if has]
            return (*[new[i] for i in self.inexact], *kept), ()

        ends = [*cotangents[: len(self.inexact)], *[value for value in ys if value is not None]]
        found = list(derivatives.vjp(flat, sources)[2](ends, retain_graph=False)) if sources else []
        note(found)
        by_carry, by_x = found[: len(self.inexact)], found[len(self.inexact) : len(self.inexact) + len(self.xs)]
        extra = [begins[i] for i in self.inexact]
        by_carry = [value if more is None else value + more for value, more in zip(by_carry, extra, strict=True)]
        sums = [a + b for a, b in zip(cotangents[len(self.inexact) :], found[len(by_carry) + len(by_x) :], strict=True)]
        return [*by_carry, *sums], by_x


class _Push:
    """One step of a scan on values and their tangents: all of the carry that can have one, and some of the rest."""

    def __init__(self, step: Step, carry: Tensors, xs: list[int], others: list[int]) -> None:
        self._step, self._count, self.xs, self.others = step, len(carry), xs, others
        self.inexact = [i for i, value in enumerate(carry) if is_inexact(value)]
        self.moved: list[bool] = []  # which results of a step have tangents, as its trace tells

    def __call__(self, carry: Tensors, x: Tensors, others: Tensors) -> tuple[Tensors, Tensors]:
        carry, by_carry = carry[: self._count], carry[self._count :]
        x, by_x = x[: len(x) - len(self.xs)], x[len(x) - len(self.xs) :]
        others, by_others = others[: len(others) - len(self.others)], others[len(others) - len(self.others) :]

        def run(own: Iterator[torch.Tensor]) -> Tensors:
            given = [_with(carry, self.inexact, own), _with(x, self.xs, own), _with(others, self.others, own)]
            new, ys = self._step(*given)
            return [*new, *ys]

        sources = [*[carry[i] for i in self.inexact], *[x[i] for i in self.xs], *[others[i] for i in self.others]]
        values, found = _pushed(run, sources, [*by_carry, *by_x, *by_others])
        count = self._count
        self.moved = [value is not None for value in found[count:]]
        tangents = [[value for value in part if value is not None] for part in (found[:count], found[count:])]
        return [*values[:count], *tangents[0]], [*values[count:], *tangents[1]]


def _pushed(run: Callable[[Iterator[torch.Tensor]], Tensors], sources: Tensors, tangents: Tensors) -> tuple[Tensors, Cotangents]:
    """The outputs of a function of ``sources``, and their tangents, None where they are no floating-point numbers."""
    inexact: list[bool] = []

    def flat(*own: torch.Tensor) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
        note(own)
        outputs = run(iter(own))
        inexact[:] = [is_inexact(value) for value in outputs]
        return tuple(value for value in outputs if is_inexact(value)), tuple(value for value in outputs if not is_inexact(value))

    moving, moved, still = derivatives.jvp(flat, sources, tangents)
    note([*moving, *moved, *still])
    values, by_value, others = iter(moving), iter(moved), iter(still)
    return [next(values if moves else others) for moves in inexact], [next(by_value) if moves else None for moves in inexact]


def _with(values: Tensors, places: Sequence[int], new: Any) -> Tensors:
    found = list(values)
    for i in places:
        found[i] = next(new)
    return found


class _Choice(_Call):
    """A choice: its first input says which branch."""

    def __init__(self, branches: Sequence[Branch]) -> None:
        super().__init__()
        self._branches = branches

    def run(self, inputs: Tensors) -> Tensors:
        index, *values = inputs
        return staging.choose(index, [functools.partial(branch, values) for branch in self._branches])

    def push(self, inputs: Tensors, moving: Moving) -> Cotangents:
        index, *values = inputs
        kinds: list[bool] = []
        branches = [_pushed_branch(branch, [i - 1 for i in moving], kinds) for branch in self._branches]
        found = iter(choose(index, branches, [*values, *moving.values()]))
        return [next(found) if moves else None for moves in kinds]

    def pull(self, inputs: Tensors, kept: Tensors, wanted: list[int], given: Cotangents) -> Tensors:
        index, *values = inputs
        places = [i - 1 for i in wanted]
        ends = [value for value in given if value is not None]
        has = [value is not None for value in given]
        branches = [_pulled(branch, places, has) for branch in self._branches]
        return choose(index, branches, [*values, *ends])


def _pushed_branch(branch: Branch, places: list[int], kinds: list[bool]) -> Branch:
    """From the inputs of a branch and tangents of some to the outputs that can have tangents, and these."""

    def pushed(inputs: Tensors) -> Tensors:
        values, tangents = inputs[: len(inputs) - len(places)], inputs[len(inputs) - len(places) :]
        found = _pushed(lambda own: branch(_with(values, places, own)), [values[i] for i in places], tangents)[1]
        kinds[:] = [value is not None for value in found]
        return [value for value in found if value is not None]

    return pushed


def _pulled(branch: Branch, places: list[int], has: list[bool]) -> Branch:
    """From the inputs of a branch and cotangents of some outputs to the cotangents of some inputs."""

    def pulled(inputs: Tensors) -> Tensors:
        values, ends = inputs[: len(inputs) - sum(has)], inputs[len(inputs) - sum(has) :]

        def flat(*own: torch.Tensor) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
            note(own)
            outputs = branch(_with(values, places, iter(own)))
            return tuple([value for value, wanted in zip(outputs, has, strict=True) if wanted]), ()

        found = list(derivatives.vjp(flat, [values[i] for i in places])[2](ends, retain_graph=False))
        note(found)
        return found

    return pulled


class _Function(torch.autograd.Function):
    """Ties the outputs of a call to its inputs."""

    generate_vmap_rule = True

    @staticmethod
    def forward(call: _Call, *values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return call.forward(values)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.set_materialize_grads(False)
        ctx.call, *values = inputs
        ctx.count = len(values)
        saved = (*values, *ctx.call.kept(output))
        ctx.mapped = [[levels.is_batched_at(value, level) for level, _ in levels.opened_again(ctx)] for value in output]
        ctx.save_for_backward(*saved)
        ctx.save_for_forward(*saved)  # the same: under vmap, PyTorch has one list of axes for both

    @staticmethod
    def backward(ctx: Any, *cotangents: torch.Tensor | None) -> Any:
        saved = [wrappers.alive(value) for value in ctx.saved_tensors]
        values, kept = saved[: ctx.count], saved[ctx.count :]
        wanted = [i for i, needed in enumerate(ctx.needs_input_grad[1:]) if needed and is_inexact(values[i])]
        with seeding.repeating("a loop or choice (torchbatch.lax)"):
            return (None, *ctx.call.backward(values, kept, wanted, cotangents, levels.opened_again(ctx)))

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        call, given = ctx.call, tangents[1:]
        values = [wrappers.alive(value) for value in ctx.saved_tensors][: len(given)]
        moving = {i: tangent for i, tangent in enumerate(given) if tangent is not None}
        with torch.inference_mode(False), torch.set_grad_enabled(torch.is_grad_enabled()):  # turns forward mode on
            values = [derivatives.primal(value) for value in values]
            with seeding.repeating("a loop or choice (torchbatch.lax)"):
                found = call.tangents(values, moving)
        return tuple([_once(*pair, levels.opened_again(ctx)) for pair in zip(found, ctx.mapped, strict=True)])
