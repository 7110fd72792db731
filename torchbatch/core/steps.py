"""Loops, run step by step in Python."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from torchbatch._torch import draw_state, levels
from torchbatch._torch.programs import NO_GRADIENT, Stacks, refused
from torchbatch._torch.staged import is_staging
from torchbatch.core import tree
from torchbatch.core.abstract import Abstract, to_meta
from torchbatch.core.arrays import as_tensor
from torchbatch.core.carry import Carry, Promoted, check_kept, marks
from torchbatch.core.describe import describe, function_name, shown
from torchbatch.core.recompute import needs_gradient
from torchbatch.core.scalars import holds, is_batched, looks_across, of_a_sample, scalar, selected, truth
from torchbatch.core.weak import strong
from torchbatch.errors import AxisError, DataDependentError, InputTypeError, OutputTypeError, UnsupportedOperationError

Function = Callable[..., Any]
_Tensor = torch.Tensor
_BLOCK = 256  # steps whose slices, or results, are held as tensors of their own at a time


# --- a fixed number of steps -----------------------------------------------------------------------------------------


class Slices:
    """What a scan goes through: the slices of tensors along their first axis.

    Raises:
        InputTypeError, AxisError: a leaf is no array, has no axis, or has another length.
    """

    def __init__(self, xs: Any, length: int | None, who: str) -> None:
        given, self.structure = tree.flatten(xs)
        self.leaves = [_array(leaf, xs, i, who) for i, leaf in enumerate(given)]
        self.length = _length(self.leaves, xs, length, who)
        self._who = who

    def __iter__(self) -> Iterator[Any]:
        return self.steps(False)

    def steps(self, reverse: bool) -> Iterator[Any]:
        """The slices one after the other, as trees like ``xs``."""
        if len(self.leaves) == 1 and self.structure == tree.LEAF:
            yield from _slices(self.leaves[0], reverse)
        elif not self.leaves:
            empty: Any = self.structure.unflatten([])
            for _ in range(self.length):
                yield empty
        else:
            for parts in zip(*[_slices(leaf, reverse) for leaf in self.leaves], strict=True):
                yield self.structure.unflatten(parts)

    def part(self, start: int, stop: int) -> Slices:
        """Some of the slices."""
        return Slices(self.structure.unflatten([leaf[start:stop] for leaf in self.leaves]), stop - start, self._who)

    def blocks(self, count: int) -> Slices:
        """As many at a time; their number must be a multiple of ``count``."""
        leaves = [leaf.reshape(self.length // count, count, *leaf.shape[1:]) for leaf in self.leaves]
        return Slices(self.structure.unflatten(leaves), self.length // count, self._who)

    def meta(self) -> Any:
        """One slice, without numbers."""
        return self.structure.unflatten([torch.empty(leaf.shape[1:], dtype=leaf.dtype, device="meta") for leaf in self.leaves])


def _array(leaf: Any, xs: Any, index: int, who: str) -> torch.Tensor:
    value = as_tensor(leaf)
    where = tree.paths(xs, "xs")[index] if value is None or not value.dim() else ""
    if value is None:
        raise InputTypeError(f"{who}: {where} is {shown(leaf)}, which is no array.")
    if not value.dim():
        raise AxisError(f"{who}: {where} is a single number ({describe(value)}), which has no first axis to go along.")
    return value


def _length(leaves: Sequence[torch.Tensor], xs: Any, length: int | None, who: str) -> int:
    if not leaves and length is None:
        raise AxisError(f"{who}: there is nothing in xs, so length must say how many steps there are.")
    found = leaves[0].shape[0] if length is None else length
    for i, leaf in enumerate(leaves):
        if leaf.shape[0] != found:
            names = tree.paths(xs, "xs")
            first = f"length is {length}" if length is not None else f"{names[0]} has {found} slices"
            raise AxisError(f"{who}: {first}, but {names[i]} ({describe(leaf)}) has {leaf.shape[0]} along its first axis.")
    return int(found)


def _slices(values: torch.Tensor, reverse: bool) -> Iterator[torch.Tensor]:
    """The slices of a tensor. Taken out block by block: the gradient of a block is one tensor, not one for each slice."""
    blocks: Sequence[torch.Tensor] = torch.split(values, _BLOCK) if values.shape[0] > _BLOCK else (values,)
    for block in reversed(blocks) if reverse else blocks:
        parts = block.unbind(0)
        yield from reversed(parts) if reverse else parts


class _Results:
    """Stacks what the steps return beside the carry, a block at a time."""

    def __init__(self, reverse: bool, fun: Function, who: str) -> None:
        self._reverse, self._fun, self._who = reverse, fun, who
        self._structure: tree.TreeDef | None = None
        self._types: list[tuple[torch.Size, torch.dtype, str]] = []
        self._stacks = Stacks(0, reverse)
        self._count = 0

    def add(self, value: Any) -> None:
        """Note the result of a step."""
        if type(value) is _Tensor:
            leaves, structure = [value], tree.LEAF
        else:
            given, structure = tree.flatten(value)
            leaves = [result_leaf(leaf, value, i, self._fun, self._who) for i, leaf in enumerate(given)]
        if self._structure is None:
            self._structure, self._types = structure, [(leaf.shape, leaf.dtype, describe(leaf)) for leaf in leaves]
            self._stacks = Stacks(len(leaves), self._reverse)
        elif structure != self._structure:
            raise self._other("structure", f"{_what(self._who)} has the structure", self._structure, structure)
        for i, (leaf, (shape, dtype, text)) in enumerate(zip(leaves, self._types, strict=True)):
            if leaf.shape != shape or leaf.dtype is not dtype:
                raise self._other("types", f"{tree.paths(value, _what(self._who))[i]} is", text, describe(leaf))
        self._stacks.add(leaves)
        self._count += 1
        if not self._count % _BLOCK:
            self._stacks.stack()

    def finish(self) -> Any:
        """All results, stacked."""
        if self._count % _BLOCK:
            self._stacks.stack()
        return self._structure.unflatten(self._stacks.finish()) if self._structure is not None else None

    def _other(self, what: str, where: str, first: Any, other: Any) -> OutputTypeError:
        return OutputTypeError(
            f"{self._who}: {function_name(self._fun)} must return the same {what} at every step, but {where} {first} at one step "
            f"and {other} at another."
        )


def _what(who: str) -> str:
    return "output" if who == "map" else "y"


def result_leaf(leaf: Any, value: Any, index: int, fun: Function, who: str) -> torch.Tensor:
    """A leaf of what a step returns, as a tensor."""
    found = as_tensor(strong(leaf))
    if found is None:
        where = tree.paths(value, _what(who))[index]
        raise OutputTypeError(f"{who}: {where} that {function_name(fun)} returns is {shown(leaf)}, which is no array of numbers.")
    return found


def pair(output: Any, fun: Function) -> tuple[Any, Any]:
    """The carry and the result that a step of a scan returns.

    Raises:
        OutputTypeError: it did not return two things.
    """
    if not isinstance(output, tuple | list) or len(output) != 2:
        raise OutputTypeError(f"scan: {function_name(fun)} must return a pair (carry, y), but it returned {shown(output)}.")
    return output[0], output[1]


def scan(fun: Function, carry: Carry, slices: Slices, reverse: bool) -> tuple[Any, Any]:
    """The last carry, and the results of all steps."""
    if not slices.length:
        return _no_steps(fun, carry, slices)
    while True:
        results = _Results(reverse, fun, carry.who)
        value, leaves = carry.value, carry.leaves
        try:
            for x in slices.steps(reverse):
                before = marks(leaves)
                output, result = pair(fun(value, x), fun)
                value, new = carry.fit(output, fun)
                check_kept(leaves, new, before, carry.who, fun)
                leaves = new
                results.add(result)
            return value, results.finish()
        except Promoted:
            carry.promote()
            continue


def _no_steps(fun: Function, carry: Carry, slices: Slices) -> tuple[Any, Any]:
    """The shapes of the results of a scan without steps come from a run without numbers."""
    device = next((leaf.device for leaf in (*carry.leaves, *slices.leaves)), torch.device("cpu"))
    _, result = pair(without_numbers(fun, device, carry, slices.meta()), fun)
    leaves, structure = tree.flatten(result)
    found = [result_leaf(leaf, result, i, fun, carry.who) for i, leaf in enumerate(leaves)]
    empty = [torch.empty((0, *leaf.shape), dtype=leaf.dtype, device=device) for leaf in found]
    return carry.value, structure.unflatten(empty)


def without_numbers(fun: Function, device: torch.device, carry: Carry, *rest: Any) -> Any:
    """The output of a step for tensors without numbers; numbers in ``carry`` take the dtype that the step gives them."""
    while True:
        meta = carry.rebuild([to_meta(leaf) for leaf in carry.leaves])
        with _words_of_a_loop(carry.who), Abstract(device):
            output = fun(meta, *rest)
        try:
            carry.fit(output[0] if rest else output, fun)
        except Promoted:
            carry.promote()
            continue
        return output


@contextlib.contextmanager
def _words_of_a_loop(who: str) -> Iterator[None]:
    """Errors of a run without numbers say that it is one."""
    try:
        yield
    except (DataDependentError, UnsupportedOperationError) as error:
        if not str(error).startswith("eval_shape: "):
            raise
        text = str(error).removeprefix("eval_shape: ").replace("eval_shape", who)
        raise type(error)(f"{who}: there are no steps, so that {who} looks at shapes and dtypes alone. Here {text}") from error


def repeat(fun: Function, carry: Carry, lower: int, upper: int) -> Any:
    """The carry after ``fun(i, carry)`` for each ``i`` from ``lower`` on, below ``upper``."""
    if upper <= lower:
        if carry.has_numbers:
            device = carry.leaves[0].device
            without_numbers(lambda value: fun(torch.zeros((), dtype=torch.int64, device="meta"), value), device, carry)
        return carry.value
    while True:
        value, leaves = carry.value, carry.leaves
        try:
            for number in _slices(torch.arange(lower, upper), False):
                before = marks(leaves)
                value, new = carry.fit(fun(number, value), fun)
                check_kept(leaves, new, before, carry.who, fun)
                leaves = new
            return value
        except Promoted:
            carry.promote()
            continue


# --- as long as a condition holds ------------------------------------------------------------------------------------


def repeat_while(condition: Function, fun: Function, carry: Carry) -> Any:
    """The carry after as many steps as the condition holds, for each sample."""
    started = False
    value, leaves = carry.value, carry.leaves
    while True:
        holding = predicate(condition, value)
        if is_batched(holding):
            leaves = _per_sample(condition, fun, carry, leaves, holding)
            break
        if not truth(holding):
            if not started and carry.has_numbers:
                without_numbers(fun, carry.leaves[0].device, carry)
                leaves = carry.leaves
            break
        before = marks(leaves)
        try:
            value, new = carry.fit(fun(value), fun)
        except Promoted:
            carry.promote()
            value, leaves = carry.value, carry.leaves
            continue
        check_kept(leaves, new, before, carry.who, fun)
        leaves, started = new, True
    return carry.rebuild([forward_only(leaf) for leaf in leaves])


def predicate(condition: Function, value: Any) -> torch.Tensor:
    """Whether the loop goes on."""
    found = condition(value)
    if type(found) is _Tensor and found.dtype is torch.bool and not found.dim():
        return found
    holding = scalar(strong(found), "while_loop", f"what {function_name(condition)} returns")
    if holding.dtype is not torch.bool:
        raise InputTypeError(
            f"while_loop: {function_name(condition)} must return a truth value, but it returned {describe(holding)}. "
            "Compare it with something."
        )
    return holding


def _per_sample(
    condition: Function, fun: Function, carry: Carry, leaves: list[torch.Tensor], holding: torch.Tensor
) -> list[torch.Tensor]:
    """Go on until the condition holds for no sample any more.

    A sample that has finished keeps its carry. The step runs for it all the same, and is given a carry for which its condition
    held: with the last one, which is beyond the end, an index might be out of bounds. Where others can look at the sample, by
    the name of the axis, they are to see what it keeps.
    """
    seen = looks_across(holding)
    valid, apart = leaves, draw_state.Apart()  # a sample that has finished uses its keys again
    count, samples = holds(holding)
    if 0 < count < samples and not seen:
        valid = of_a_sample(holding, leaves)
    while count:
        everyone = count == samples
        given = leaves if everyone or seen else selected(holding, leaves, valid)
        before = marks(given)
        try:
            new = carry.fit(apart.run(fun, carry.rebuild(given)), fun)[1]
        except Promoted:
            carry.promote()
            leaves = given = carry.leaves
            valid = leaves if everyone or seen else of_a_sample(holding, leaves)
            continue
        check_kept(given, new, before, carry.who, fun)
        leaves = new if everyone else selected(holding, new, leaves)
        valid = given
        holding = predicate(condition, carry.rebuild(leaves))
        seen = seen or looks_across(holding)
        count, samples = holds(holding)
    return leaves


class _ForwardOnly(torch.autograd.Function):
    """A value that has no gradient in reverse mode."""

    @staticmethod
    def forward(value: torch.Tensor, *sources: torch.Tensor) -> torch.Tensor:
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def vmap(info: Any, in_dims: Any, value: torch.Tensor, *sources: torch.Tensor) -> tuple[Any, Any]:
        return _ForwardOnly.apply(value, *sources), in_dims[0]  # type: ignore[no-untyped-call]

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        if levels.depth() or not is_staging():
            raise UnsupportedOperationError(NO_GRADIENT)
        return None, *(refused(gradient, source) for source in ctx.saved_tensors)  # jit records the backward pass beforehand

    @staticmethod
    def jvp(ctx: Any, tangent: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        return tangent.clone()


def forward_only(value: torch.Tensor, sources: Sequence[torch.Tensor] = ()) -> torch.Tensor:
    """The value, for which reverse mode raises an error; itself, if nothing records what is computed of it or of ``sources``."""
    if not (value.is_floating_point() or value.is_complex()) or not (sources or needs_gradient(value)):
        return value
    found: torch.Tensor = _ForwardOnly.apply(value, *sources)  # type: ignore[no-untyped-call]
    return found
