"""Loops and choices as single steps of a graph: the operator ``torchbatch::run`` and the programs that it runs.

The operator takes tensors and the number of a program, which holds the graphs of a body or of branches. To whatever handles
graphs it is an operator like others: it has no views, writes nothing, and knows the shapes of its results. Graphs are replayed,
unless :meth:`Program.compile` has put something faster in their place.

Private names used, seen on torch 2.11, 2.13 and 2.15: ``torch._subclasses.fake_tensor.FakeTensorMode``;
``torch.utils._python_dispatch._disable_current_modes``; ``torch._C.DisableTorchFunction``.
"""

from __future__ import annotations

import hashlib
import itertools
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule
from torch.utils._python_dispatch import _disable_current_modes

from torchbatch.errors import UnsupportedOperationError

Tensors = list[torch.Tensor]
Run = Callable[[Tensors], Sequence[torch.Tensor]]
_BLOCK = 256

_library = torch.library.Library("torchbatch", "FRAGMENT")
_library.define("run(Tensor[] values, int program) -> Tensor[]")
_library.define("run_drawing(Tensor[] values, int program) -> Tensor[]", tags=(torch.Tag.nondeterministic_seeded,))
_library.define("refused(Tensor gradient, Tensor like) -> Tensor")
OPERATORS = (torch.ops.torchbatch.run.default, torch.ops.torchbatch.run_drawing.default)

_programs: weakref.WeakValueDictionary[int, Program] = weakref.WeakValueDictionary()


class Like(NamedTuple):
    """The type of a tensor."""

    shape: Sequence[Any]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, value: torch.Tensor, shape: Sequence[Any] | None = None) -> Like:
        """That of a tensor, or of one of another shape."""
        return cls(tuple(value.shape if shape is None else shape), value.dtype, value.device)


class Body(NamedTuple):
    """A graph, fake tensors like its inputs, and their mode."""

    graph: GraphModule
    examples: list[torch.Tensor]
    mode: FakeTensorMode


Compile = Callable[[Body], Run]


class Program:
    """What one step of a graph does.

    Args:
        bodies: the body or the branches.
        results: what the tensors are like that the program returns.
        details: whatever else tells what the program does.
    """

    def __init__(self, bodies: Sequence[Body], results: Sequence[Like], details: Any) -> None:
        self.bodies, self.results = bodies, results
        self.number = _number((type(self).__name__, details, [tuple(like) for like in results]), bodies)
        self._runs: list[Run] = [_replayed(body.graph) for body in bodies]
        self._is_compiled = False
        self.inner = [program for body in bodies for program in programs_of(body.graph)]  # kept alive
        self.draws: bool = any(program.draws for program in self.inner) or any(_draws(body.graph) for body in bodies)
        _programs[self.number] = self

    def compile(self, build: Compile) -> None:
        """Let ``build`` make the functions that run the graphs, unless that was done before."""
        if not self._is_compiled:
            self._runs = [build(body) for body in self.bodies]
            self._is_compiled = True

    def call(self, values: Tensors) -> Tensors:
        """The operator, to be recorded by whatever traces."""
        given = [value.contiguous() for value in values] or [torch.zeros(())]
        results: Tensors = OPERATORS[self.draws](given, self.number)
        return results

    def run(self, values: Tensors) -> Tensors:
        """The results."""
        raise NotImplementedError

    def fake(self, values: Tensors) -> Tensors:
        """Results without numbers."""
        return [torch.empty(like.shape, dtype=like.dtype, device=like.device) for like in self.results]


class Scan(Program):
    """Steps along slices: ``values`` are the carry, tensors with all slices, and what the body reads beside them."""

    def __init__(
        self, bodies: Sequence[Body], results: Sequence[Like], *, carried: int, sliced: int, length: int, reverse: bool
    ) -> None:
        super().__init__(bodies, results, (carried, sliced, length, reverse))
        self.carried, self.sliced, self.length, self.reverse = carried, sliced, length, reverse

    def run(self, values: Tensors) -> Tensors:
        (step,), carried = self._runs, self.carried
        values = values[: len(self.bodies[0].examples)]
        carry, whole, rest = values[:carried], values[carried : carried + self.sliced], values[carried + self.sliced :]
        stacks = Stacks(len(self.results) - carried, self.reverse)
        order = range(self.length)[::-1] if self.reverse else range(self.length)
        for start in range(0, self.length, _BLOCK):
            numbers = order[start : start + _BLOCK]
            low, high = min(numbers[0], numbers[-1]), max(numbers[0], numbers[-1]) + 1
            blocks = [value[low:high].unbind(0) for value in whole]
            for number in numbers:
                out = step([*carry, *[block[number - low] for block in blocks], *rest])
                carry = [value.contiguous() for value in out[:carried]]
                stacks.add(out[carried:])
            stacks.stack()
        return [*carry, *stacks.finish()]


class Stacks:
    """Stacks tensors that come one after the other, block by block."""

    def __init__(self, count: int, reverse: bool) -> None:
        self._columns: list[Tensors] = [[] for _ in range(count)]
        self._blocks: list[Tensors] = [[] for _ in range(count)]
        self._reverse = reverse

    def add(self, values: Sequence[torch.Tensor]) -> None:
        """Note the tensors of one step."""
        for column, value in zip(self._columns, values, strict=True):
            column.append(value)

    def stack(self) -> None:
        """End a block."""
        for column, blocks in zip(self._columns, self._blocks, strict=True):
            blocks.append(torch.stack(column[::-1] if self._reverse else column))
            column.clear()

    def finish(self) -> Tensors:
        """All blocks, one after the other."""
        ordered = [blocks[::-1] if self._reverse else blocks for blocks in self._blocks]
        return [blocks[0] if len(blocks) == 1 else torch.cat(blocks) for blocks in ordered]


class While(Program):
    """Steps as long as the last of the carried tensors holds anywhere."""

    def __init__(self, bodies: Sequence[Body], results: Sequence[Like], *, carried: int) -> None:
        super().__init__(bodies, results, carried)
        self.carried = carried

    def run(self, values: Tensors) -> Tensors:
        (step,) = self._runs
        carry, rest = values[: self.carried], values[self.carried :]
        while bool(carry[-1].any() if carry[-1].dim() else carry[-1]):
            carry = [value.contiguous() for value in step([*carry, *rest])]
        return carry

    def moved_by(self, moving: Sequence[bool]) -> list[bool]:
        """Which of the carried tensors depend, in some step, on values that ``moving`` says of, which must be differentiable."""
        carry, rest = list(moving[: self.carried]), list(moving[self.carried :])
        while True:
            new = [was or now for was, now in zip(carry, _reached(self.bodies[0].graph, [*carry, *rest]), strict=True)]
            if new == carry:
                return carry
            carry = new


def _reached(graph: GraphModule, moving: Sequence[bool]) -> list[bool]:
    """Which outputs of a graph depend on some of its inputs by way of floating-point or complex numbers."""
    inputs = graph.graph.find_nodes(op="placeholder")
    found = {node for node, moves in zip(inputs, moving, strict=True) if moves}
    for node in graph.graph.nodes:
        if node.op == "call_function" and found.intersection(node.all_input_nodes) and _is_inexact(node.meta.get("val")):
            found.add(node)
    outputs: Any = graph.graph.output_node().args[0]
    return [node in found for node in outputs]


def _is_inexact(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return value.is_floating_point() or value.is_complex()
    return value is None or (isinstance(value, tuple | list) and any(map(_is_inexact, value)))


class Choice(Program):
    """One of several branches: ``values`` begin with its number; ``inputs`` says which of the others each branch reads."""

    def __init__(self, bodies: Sequence[Body], results: Sequence[Like], *, inputs: Sequence[Sequence[int]]) -> None:
        super().__init__(bodies, results, inputs)
        self.inputs = inputs

    def run(self, values: Tensors) -> Tensors:
        number = min(max(int(values[0]), 0), len(self._runs) - 1)
        return list(self._runs[number]([values[1 + i] for i in self.inputs[number]]))


def _number(about: Any, bodies: Sequence[Body]) -> int:
    """A number that tells what a program does, and that no other program has.

    In the text of a graph it is all that stands for the program, and code is kept on disk, and loaded, by that text.
    """
    digest = hashlib.sha256(repr(about).encode())
    for body in bodies:
        digest.update(body.graph.code.encode())
        digest.update(repr([Like.of(example) for example in body.examples]).encode())
        for node in body.graph.graph.find_nodes(op="get_attr"):
            constant: torch.Tensor = getattr(body.graph, str(node.target))
            with _disable_current_modes(), torch._C.DisableTorchFunction():
                digest.update(constant.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    numbers = (_of(digest.digest() + str(again).encode()) for again in itertools.count())
    return next(number for number in numbers if number not in _programs)


def _of(content: bytes) -> int:
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "big") >> 2


def numbers_in(graph: GraphModule) -> list[int]:
    """The numbers of the programs that a graph runs."""
    nodes = [node for operator in OPERATORS for node in graph.graph.find_nodes(op="call_function", target=operator)]
    return [node.args[1] for node in nodes]


def programs_of(graph: GraphModule) -> list[Program]:
    """The programs that a graph runs."""
    return [_programs[number] for number in numbers_in(graph)]


def programs_in(graph: GraphModule) -> list[Program]:
    """The programs that a graph runs, and those that these run, innermost first."""
    found: list[Program] = []
    for number in numbers_in(graph):
        program = _programs[number]
        for inner in (*(each for body in program.bodies for each in programs_in(body.graph)), program):
            if inner not in found:
                found.append(inner)
    return found


def _replayed(graph: GraphModule) -> Run:
    forward: Callable[..., Any] = graph.forward
    return lambda values: forward(*values)


def _draws(graph: GraphModule) -> bool:
    tags = [getattr(node.target, "tags", ()) for node in graph.graph.nodes]
    return any(torch.Tag.nondeterministic_seeded in found for found in tags)


def _run(values: Tensors, program: int) -> Tensors:
    """Nothing that is returned shares memory with what was given, or with another result."""
    known = {value.untyped_storage().data_ptr() for value in values}
    found = _programs.get(program)
    if found is None:
        raise UnsupportedOperationError(
            "a compiled function that was loaded from a file runs a loop (scan, while_loop, fori_loop) or a choice (cond, "
            "switch), whose body is not in the file. Trace the function again in this process, with jit."
        )
    with torch.no_grad():
        results = found.run([value.contiguous() for value in values])
    for i, value in enumerate(results):
        place = value.untyped_storage().data_ptr()
        results[i] = value.clone(memory_format=torch.contiguous_format) if place in known else value.contiguous()
        known.add(place)
    return results


def _fake(values: Tensors, program: int) -> Tensors:
    return _programs[program].fake(values)


NO_GRADIENT = (
    "while_loop has no gradient in reverse mode (grad, vjp, jacrev, backward()), nor has a fori_loop whose bounds differ "
    "from sample to sample: how many steps there are is not known beforehand. Use scan, or a fori_loop with fixed "
    "bounds; forward mode (jvp, jacfwd); or stop_gradient."
)


def refused(gradient: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """What a loop makes of a gradient that it cannot pull back, as a step of a graph: an error when it runs."""
    result: torch.Tensor = torch.ops.torchbatch.refused.default(gradient, like)
    return result


def _refused(gradient: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A compiled function pulls all its outputs back at once; for those that nobody differentiates the gradient is zero."""
    if bool(gradient.any()):
        raise UnsupportedOperationError(NO_GRADIENT)
    return torch.zeros_like(like)


_library.impl("refused", _refused, "CompositeExplicitAutograd")
torch.library.register_fake("torchbatch::refused", lambda gradient, like: torch.empty_like(like), lib=_library)
for _name in ("run", "run_drawing"):
    _library.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"torchbatch::{_name}", _fake, lib=_library)
