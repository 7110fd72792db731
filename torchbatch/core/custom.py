"""Functions that say themselves what a transform makes of them.

A :class:`Rule` is such a function on flat tensors. :func:`call` asks the innermost transform first, runs what the rule says
below it, and so on down to plain tensors:

- in a ``vmap``: :meth:`Rule.mapped`, which runs when the level is set aside, on whole batches;
- in reverse mode, and for PyTorch's own autograd: :meth:`Rule.forward` and, later, :meth:`Rule.backward`;
- in forward mode: :meth:`Rule.push`.

Where no transform has anything to ask, the function runs as it stands, with all transforms around it.

A rule is made for one call. It remembers of the forward run what the backward run has to know.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import types
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from torchbatch._torch import levels, lowered, modes
from torchbatch._torch.guards import hidden_from_compile
from torchbatch._torch.lowered import Transform, alive
from torchbatch.core import batch, recompute
from torchbatch.core.derivative import is_inexact, or_zeros
from torchbatch.core.frames import in_scope
from torchbatch.core.wrapper import Wrapper
from torchbatch.core.writes import may_write
from torchbatch.errors import TorchbatchError, UnsupportedOperationError

Tensors = Sequence[torch.Tensor]
_DYNAMO = "torch._dynamo"  # where it is not loaded, it does not look at bytecode either
_ESCAPED = "may have escaped from inside a function being vmapped"  # what PyTorch says of a value whose level is not open


class Level(NamedTuple):
    """A map that is set aside."""

    size: int
    name: Hashable
    randomness: str
    writes: bool


class Rule:
    """A function of flat tensors, and what transforms make of it.

    Attributes:
        name: what messages call the function.
        outputs: how many of the results of :meth:`forward` are outputs; the others are kept for :meth:`backward`.
    """

    name: str
    outputs: int

    def applies(self, values: Tensors) -> bool:
        """Whether there is anything to ask for these arguments."""
        raise NotImplementedError

    def must_know(self, value: torch.Tensor) -> bool:
        """Whether a value has to be an argument, and must not be closed over."""
        raise NotImplementedError

    def refuse(self, differentiated: Sequence[bool]) -> None:
        """Raise an error where an argument is differentiated that must not be."""

    def run(self, values: Tensors) -> list[torch.Tensor]:
        """The outputs of the function as it stands."""
        raise NotImplementedError

    def mapped(self, level: Level, values: Tensors, mapped: Sequence[bool]) -> tuple[list[torch.Tensor], list[bool]]:
        """The outputs for a whole batch, and which of them have a batch axis; batch axes come first."""
        inner = _Mapped(self, level, mapped)
        outputs = call(inner, values)
        return outputs, inner.results_mapped[: len(outputs)]

    def forward(self, values: Tensors) -> list[torch.Tensor]:
        """The outputs, and what the backward run needs beside them; sets ``outputs``."""
        raise NotImplementedError

    def backward(
        self, values: Tensors, results: Tensors, cotangents: Sequence[torch.Tensor | None], wanted: Sequence[bool]
    ) -> list[torch.Tensor | None]:
        """Cotangents of ``values``, in PyTorch's convention; None of ``cotangents`` stands for zeros."""
        raise NotImplementedError

    def push(self, primals: Tensors, tangents: Tensors) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """The outputs and their tangents; integers have tangents too, which say nothing."""
        raise NotImplementedError


class CustomFunction(Wrapper):
    """A function with rules of its own, as the user sees it.

    Dynamo follows no such rules, and what it made of them would be wrong without an error: it has to leave such calls to Python.
    """

    _writes: bool | None = None  # whether one of its functions may write in place; read off the code at the first call

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        """The output of the function."""
        return _hidden(self, args, kwargs) if _DYNAMO in sys.modules else self._run(args, kwargs)

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        rule, functions = self.rule(args, kwargs)
        if self._writes is None:
            self._writes = any(may_write(function) for function in functions)
        values = recompute.seen(rule.args.take())
        enclosed = [value for function in functions for value in _enclosed(function, 2)]
        if enclosed and rule.applies([*values, *enclosed]) and any(map(rule.must_know, enclosed)):
            raise _closed_over(rule)
        inside = recompute.opaque(values, lambda: _closed_over(rule)) if rule.applies(values) else contextlib.nullcontext()
        with inside, lowered.writable() if self._writes else contextlib.nullcontext():
            results = call(rule, values)
        recompute.note(results)
        return rule.output.rebuild(results)

    def rule(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Sequence[Callable[..., Any]]]:
        """The rule for one call, and the functions of the user that it calls."""
        raise NotImplementedError


@hidden_from_compile
def _hidden(function: CustomFunction, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return function._run(args, kwargs)


def _enclosed(function: Any, depth: int) -> Iterator[torch.Tensor]:
    """The tensors that a function closes over, and those that functions in its closure do."""
    if isinstance(function, functools.partial):
        yield from _enclosed_in([*function.args, *function.keywords.values(), function.func], depth)
    elif isinstance(function, types.FunctionType) and function.__closure__ is not None:
        cells = [cell.cell_contents for cell in function.__closure__ if cell != types.CellType()]
        yield from _enclosed_in(cells, depth)


def _enclosed_in(things: Sequence[Any], depth: int) -> Iterator[torch.Tensor]:
    for thing in things:
        if isinstance(thing, torch.Tensor):
            yield thing
        elif isinstance(thing, tuple | list | dict) and depth:
            yield from _enclosed_in(list(thing.values()) if isinstance(thing, dict) else thing, depth - 1)
        elif depth:
            yield from _enclosed(thing, depth - 1)


def call(rule: Rule, values: Tensors) -> list[torch.Tensor]:
    """The outputs of a function, by its own rules."""
    values = [alive(value) for value in values]
    if not rule.applies(values):
        return rule.run(values)
    transform = lowered.innermost()
    if transform is None:
        rule.refuse([value.requires_grad for value in values])
        results: Sequence[torch.Tensor] = _Recorded.apply(rule, *values)  # type: ignore[no-untyped-call]
        return list(results[: rule.outputs])
    if transform.is_map:
        return _through_map(rule, values, transform)
    if transform.is_forward:
        return _through_forward(rule, values, transform)
    if transform.is_reverse:
        return _through_reverse(rule, values, transform)
    return rule.run(values)


def _through_map(rule: Rule, values: Tensors, transform: Transform) -> list[torch.Tensor]:
    pairs = [levels.unwrap_batched(value, transform.level) for value in values]
    mapped = [axis is not None for _, axis in pairs]
    with _outside(transform, rule) as level:
        inside = [value if axis is None else value.movedim(axis, 0) for value, axis in pairs]
        results, flags = rule.mapped(level, inside, mapped) if any(mapped) else (call(rule, inside), [])
        _check_below(results, rule)
    if not any(mapped):
        return results
    return [levels.add_batch_dim(r, 0, transform.level) if flag else r for r, flag in zip(results, flags, strict=True)]


def _through_forward(rule: Rule, values: Tensors, transform: Transform) -> list[torch.Tensor]:
    pairs = [transform.unpacked(value) for value in values]
    with _outside(transform, rule):
        primals = [primal for primal, _ in pairs]
        if all(tangent is None for _, tangent in pairs):
            results, tangents = call(rule, primals), None
        else:
            rule.refuse([tangent is not None for _, tangent in pairs])
            results, tangents = rule.push(primals, [or_zeros(tangent, primal) for primal, tangent in pairs])
        _check_below([*results, *(tangents or ())], rule)
    if tangents is None:
        return results
    inexact = [is_inexact(result) for result in results]
    pushed = zip(results, tangents, inexact, strict=True)
    return [transform.packed(result, tangent) if moves else result for result, tangent, moves in pushed]


def _through_reverse(rule: Rule, values: Tensors, transform: Transform) -> list[torch.Tensor]:
    values = transform.lifted(values)
    if any(value.requires_grad for value in values):
        rule.refuse([value.requires_grad for value in values])
        results: Sequence[torch.Tensor] = _RecordedAtLevel.run((rule, transform), *values)
        return list(results[: rule.outputs])
    with _outside(transform, rule):
        outputs = call(rule, [transform.taken(value) for value in values])
        _check_below(outputs, rule)
    return outputs


@contextlib.contextmanager
def _outside(transform: Transform, rule: Rule) -> Iterator[Level]:
    """Set a transform aside; if it is a map, with the name of its axis."""
    stack, name, size, randomness = in_scope.stack, None, 0, "error"
    frame = None
    if transform.is_map:
        size, randomness = transform.size, transform.randomness
        frame = stack.pop() if stack and stack[-1][2] == transform.level else None
        name = None if frame is None else frame[0]
    writes = lowered.may_write()
    try:
        with transform.outside():
            yield Level(size, name, randomness, writes)
    except RuntimeError as error:
        if _ESCAPED not in str(error) or isinstance(error, TorchbatchError):
            raise
        raise _closed_over(rule) from error
    finally:
        if frame is not None:
            stack.append(frame)


def _check_below(results: Tensors, rule: Rule) -> None:
    """Refuse what a function got hold of by other ways than its arguments: transforms would not know of it."""
    if any(lowered.belongs_deeper(value) for value in results):
        raise _closed_over(rule)


def check_enclosed(rule: Rule, values: Tensors, results: Tensors) -> None:
    """Refuse results that are differentiated where no argument is: the function got hold of a parameter of a module, say."""
    if any(map(lowered.is_differentiated, results)) and not any(map(lowered.is_differentiated, values)):
        raise _closed_over(rule)


def _closed_over(rule: Rule) -> UnsupportedOperationError:
    return UnsupportedOperationError(
        f"{rule.name} has rules of its own for transforms, and closes over a value that a transform around it maps or "
        "differentiates. Pass that value as an argument."
    )


class _Recording:
    """What both classes of autograd functions have in common."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
        rule, *values = inputs
        ctx.rule = rule if isinstance(rule, Rule) else rule[0]
        ctx.count, ctx.modes = len(values), modes.Remembered(leaving_out=recompute.Swap)
        ctx.set_materialize_grads(False)
        kept = output[ctx.rule.outputs :]
        ctx.unkept = ctx.rule.outputs
        ctx.save_for_backward(*values, *kept)
        ctx.save_for_forward(*values, *kept)
        ctx.mark_non_differentiable(*(value for value in output if not is_inexact(value)))

    @staticmethod
    def backward(ctx: Any, *cotangents: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        saved = ctx.saved_tensors
        wanted = [bool(needed) for needed in ctx.needs_input_grad[1:]]
        with ctx.modes.again():
            return (None, *ctx.rule.backward(saved[: ctx.count], saved[ctx.count :], cotangents, wanted))

    @staticmethod
    def jvp(ctx: Any, *tangents: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        primals = ctx.saved_tensors[: ctx.count]
        moved = [levels.of_dtype(or_zeros(t, primal), primal) for primal, t in zip(primals, tangents[1:], strict=True)]
        with ctx.modes.again():
            return tuple(ctx.rule.push(primals, moved)[1])


class _Recorded(_Recording, torch.autograd.Function):
    """A rule in PyTorch's own autograd, where no transform is open."""

    @staticmethod
    def forward(rule: Rule, *values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        with torch.enable_grad():  # so that what depends on anything but the arguments shows
            inside = [value.detach() for value in values]
            results = rule.forward(inside)
            check_enclosed(rule, inside, results)
        return _own(results, inside)


class _RecordedAtLevel(_Recording, lowered.AtOneLevel):
    """A rule in reverse mode."""

    @staticmethod
    def forward(bundle: tuple[Rule, Transform], *values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        rule, transform = bundle
        taken = [transform.taken(value) for value in values]
        with lowered.differentiable(), _outside(transform, rule):
            results = rule.forward(taken)
            _check_below(results, rule)
        return tuple([transform.given(result) for result in results])


def _own(results: Tensors, values: Tensors) -> tuple[torch.Tensor, ...]:
    """The results, where each is a tensor of its own."""
    known = {id(value) for value in values}
    own = []
    for result in results:
        own.append(result.view_as(result) if id(result) in known else result)
        known.add(id(result))
    return tuple(own)


class _Mapped(Rule):
    """A rule over a batch: everything it has to say is said at a level that is opened again for it."""

    results_mapped: list[bool]  # for the outputs, and then for what forward keeps

    def __init__(self, base: Rule, level: Level, mapped: Sequence[bool]) -> None:
        self.base, self.level, self.values_mapped = base, level, list(mapped)
        self.name = base.name

    def applies(self, values: Tensors) -> bool:
        return self.base.applies(values)

    def refuse(self, differentiated: Sequence[bool]) -> None:
        self.base.refuse(differentiated)

    def run(self, values: Tensors) -> list[torch.Tensor]:
        results, self.results_mapped = self._at_level(self.base.run, values, self.values_mapped)
        return results

    def forward(self, values: Tensors) -> list[torch.Tensor]:
        results, self.results_mapped = self._at_level(self.base.forward, values, self.values_mapped)
        self.outputs = self.base.outputs
        return results

    def backward(
        self, values: Tensors, results: Tensors, cotangents: Sequence[torch.Tensor | None], wanted: Sequence[bool]
    ) -> list[torch.Tensor | None]:
        given = [(i, ct) for i, ct in enumerate(cotangents) if ct is not None]
        kept = self.results_mapped[self.outputs :]
        found: list[int] = []

        def back(inside: Tensors) -> list[torch.Tensor]:
            first, second = len(values), len(values) + len(results)
            full: list[torch.Tensor | None] = [None] * len(cotangents)
            for (i, _), value in zip(given, inside[second:], strict=True):
                full[i] = value
            gradients = self.base.backward(inside[:first], inside[first:second], full, wanted)
            found[:] = [i for i, gradient in enumerate(gradients) if gradient is not None]
            return [gradient for gradient in gradients if gradient is not None]

        flags = [*self.values_mapped, *kept, *[True] * len(given)]
        parts = [ct if self.results_mapped[i] else self._shared_out(ct) for i, ct in given]
        gradients, mapped = self._at_level(back, [*values, *results, *parts], flags)
        answer: list[torch.Tensor | None] = [None] * len(values)
        for i, gradient, flag in zip(found, gradients, mapped, strict=True):
            answer[i] = self._fitted(gradient, flag, self.values_mapped[i])
        return answer

    def _shared_out(self, cotangent: torch.Tensor) -> torch.Tensor:
        """The cotangent of an output that all samples share, in equal parts; JAX gives each of them the whole."""
        return repeated(cotangent / max(self.level.size, 1), self.level.size)

    def _fitted(self, gradient: torch.Tensor, mapped: bool, wanted: bool) -> torch.Tensor:
        """The gradient of a value that all samples share is a sum over them."""
        if mapped == wanted:
            return gradient
        return gradient.sum(0) if mapped else repeated(gradient, self.level.size)

    def push(self, primals: Tensors, tangents: Tensors) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        def pushed(inside: Tensors) -> list[torch.Tensor]:
            results, moved = self.base.push(inside[: len(primals)], inside[len(primals) :])
            return [*results, *moved]

        found, mapped = self._at_level(pushed, [*primals, *tangents], self.values_mapped * 2)
        half = len(found) // 2
        self.results_mapped = [a or b for a, b in zip(mapped[:half], mapped[half:], strict=True)]
        wanted = self.results_mapped * 2
        full = [repeated(r, self.level.size) if w and not m else r for r, m, w in zip(found, mapped, wanted, strict=True)]
        return full[:half], full[half:]

    def _at_level(
        self, function: Callable[[Tensors], list[torch.Tensor]], values: Tensors, mapped: Sequence[bool]
    ) -> tuple[list[torch.Tensor], list[bool]]:
        axes = [0 if flag else None for flag in mapped]
        level = self.level
        found: tuple[list[torch.Tensor], list[bool]] = batch.run(
            lambda *inside: function(inside), values, axes, level.size, level.name, level.randomness, _taken, level.writes
        )[0]
        return found


def _taken(outputs: list[torch.Tensor], level: int, size: int, values: Sequence[Any]) -> tuple[Any, int]:
    """The outputs outside of a level, and which of them had a batch axis there."""
    pairs = [levels.unwrap_batched(output, level) for output in outputs]
    results = [value if axis is None else value.movedim(axis, 0) for value, axis in pairs]
    return (results, [axis is not None for _, axis in pairs]), len(results)


def repeated(value: torch.Tensor, size: int) -> torch.Tensor:
    """A value that all samples share, once for each of them."""
    return value.expand(size, *value.shape)
