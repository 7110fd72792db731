"""Loops and choices of a model, one example's of which were traced as single steps, run for all examples of a batch."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import GraphModule, Interpreter

from torchbatch._torch.programs import OPERATORS, Choice, Program, Scan, While, programs_in
from torchbatch.core import staging
from torchbatch.core.scalars import is_batched
from torchbatch.errors import RandomnessError

Tensors = list[torch.Tensor]
Run = Callable[[Tensors], Tensors]


def of_program(program: Any) -> Run:
    """A function of tensors that does what a program does, in whatever transforms are open.

    Raises:
        RandomnessError: it draws random numbers.
    """
    if program.draws:
        raise RandomnessError(
            "per_example: the model draws random numbers inside a loop or a branch of torchbatch.lax, where they cannot be each "
            "example's own. Split a key into one for each step, and scan over the keys; or put the module that draws into eval "
            "mode."
        )
    return _RUNS[type(program)](program)


class _Replayed(Interpreter):
    """A graph, step by step, with the loops in it run likewise."""

    def __init__(self, graph: GraphModule, programs: dict[int, Program]) -> None:
        super().__init__(graph)
        self._programs = programs

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """One step."""
        if target in OPERATORS:
            values, number = args
            return of_program(self._programs[number])(list(values))
        return super().call_function(target, args, kwargs)


def _body(graph: GraphModule) -> Run:
    replayed = _Replayed(graph, {program.number: program for program in programs_in(graph)})

    def body(values: Tensors) -> Tensors:
        return list(replayed.run(*values))

    return body


def _scan(program: Scan) -> Run:
    body, count = _body(program.bodies[0].graph), program.carried
    given = len(program.bodies[0].examples)

    def scan(values: Tensors) -> Tensors:
        rest = values[count + program.sliced : given]

        def step(carry: Tensors, xs: Tensors) -> tuple[Tensors, Tensors]:
            found = body([*carry, *xs, *rest])
            return found[:count], found[count:]

        xs = values[count : count + program.sliced]
        carry, stacks = staging.scan(step, values[:count], xs, program.length, program.reverse)
        return [*carry, *stacks]

    return scan


def _while(program: While) -> Run:
    body, count = _body(program.bodies[0].graph), program.carried

    def repeat(values: Tensors) -> Tensors:
        carry, rest = values[:count], values[count:]
        return staging.repeat_while(lambda now: now[-1], lambda now: body([*now, *rest]), carry)[0]

    return repeat


def _choice(program: Choice) -> Run:
    bodies = [_body(body.graph) for body in program.bodies]

    def choose(values: Tensors) -> Tensors:
        index, rest = values[0], values[1:]
        branches = [
            functools.partial(body, [rest[i] for i in inputs]) for body, inputs in zip(bodies, program.inputs, strict=True)
        ]
        if not is_batched(index):
            return staging.choose(index, branches)
        found = [branch() for branch in branches]
        chosen = found[-1]
        for number in reversed(range(len(found) - 1)):
            chosen = [torch.where(index <= number, a, b) for a, b in zip(found[number], chosen, strict=True)]
        return chosen

    return choose


_RUNS: dict[type, Callable[[Any], Run]] = {Scan: _scan, While: _while, Choice: _choice}
