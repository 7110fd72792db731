"""Loops without the results that nobody reads.

The backward pass of a scan returns what it began each step with, which only a second derivative reads, and what is known to be
zero or not wanted is summed up all the same. A loop of a graph whose results are not all used is replaced by one that computes
only those that are, and what these need.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Sequence
from typing import Any

from torch.fx import Graph, GraphModule, Node

from torchbatch._torch.graphs import has_effect
from torchbatch._torch.programs import OPERATORS, Body, Program, Scan, programs_in


def without_unused(module: GraphModule) -> tuple[GraphModule, list[Program]]:
    """The same graph with smaller loops, and these; the module itself, if there is nothing to leave out."""
    known = {program.number: program for program in programs_in(module)}
    if not known:
        return module, []
    own = GraphModule(module, copy.deepcopy(module.graph))
    made: list[Program] = []
    for node in reversed(own.graph.find_nodes(op="call_function", target=OPERATORS[0])):  # what is left out may be the only user
        program: Any = known[node.args[1]]
        used = _used(node)
        if isinstance(program, Scan) and used is not None and len(used) < len(program.results):
            smaller = _Smaller(program, used)
            if smaller.program is not None:
                made.append(smaller.program)
                _replace(own.graph, node, smaller)
                own.graph.eliminate_dead_code(has_effect)
    own.recompile()
    return (own, made) if made else (module, [])


def _used(node: Node) -> set[int] | None:
    """Which results of a loop are read; None, if that cannot be seen."""
    if not node.users or any(user.target is not operator.getitem for user in node.users):
        return None
    places: list[Any] = [user.args[1] for user in node.users if user.users]
    return set(places)


class _Smaller:
    """A scan that computes some of the results of another one.

    Attributes:
        program: the scan; None, if all is needed.
        results: the places that its results have in the other one.
        inputs: those of its inputs.
    """

    def __init__(self, scan: Scan, used: set[int]) -> None:
        body, carried = scan.bodies[0], scan.carried
        carry = _needed_carry(body.graph, carried, used)
        self.results = [*sorted(carry), *sorted(place for place in used if place >= carried)]
        graph, self.inputs = _with_outputs(body.graph, self.results, carry)
        self.program: Scan | None = None
        if self.results and len(self.results) < len(scan.results):
            examples = [body.examples[i] for i in self.inputs]
            counts = {"carried": len(carry), "sliced": sum(carried <= i < carried + scan.sliced for i in self.inputs)}
            likes = [scan.results[i] for i in self.results]
            self.program = Scan([Body(graph, examples, body.mode)], likes, **counts, length=scan.length, reverse=scan.reverse)


def _needed_carry(graph: GraphModule, carried: int, used: set[int]) -> set[int]:
    """Which of the carry must be computed so that some results are right."""
    outputs: Any = graph.graph.output_node().args[0]
    inputs = graph.graph.find_nodes(op="placeholder")
    places = {node: i for i, node in enumerate(inputs[:carried])}
    carry: set[int] = set()
    waiting = set(used)
    seen: set[Node] = set()
    while waiting:
        place = waiting.pop()
        carry |= {place} if place < carried else set()
        waiting |= {places[node] for node in _reach(outputs[place], seen) if node in places} - carry
    return carry


def _reach(node: Any, seen: set[Node]) -> list[Node]:
    """A node and all that it is computed from, as far as that was not seen before."""
    found, stack = [], [node]
    while stack:
        current = stack.pop()
        if isinstance(current, Node) and current not in seen:
            seen.add(current)
            found.append(current)
            stack += current.all_input_nodes
    return found


def _with_outputs(module: GraphModule, results: Sequence[int], carry: set[int]) -> tuple[GraphModule, list[int]]:
    """A body with some of its outputs, and the places of the inputs that it still has: ``carry``, and what is read."""
    own = GraphModule(module, copy.deepcopy(module.graph))
    output = own.graph.output_node()
    outputs: Any = output.args[0]
    output.args = ([outputs[i] for i in results],)
    own.graph.eliminate_dead_code(has_effect)
    places = []
    for i, node in enumerate(own.graph.find_nodes(op="placeholder")):
        if node.users or i in carry:
            places.append(i)
        else:
            own.graph.erase_node(node)
    own.recompile()
    return own, places


def _replace(graph: Graph, node: Node, smaller: _Smaller) -> None:
    values: Any = node.args[0]
    program: Any = smaller.program
    with graph.inserting_before(node):
        given = [values[i] for i in smaller.inputs] or [values[0]]
        made = graph.call_function(OPERATORS[program.draws], (given, program.number))
    made.meta["val"] = [node.meta["val"][i] for i in smaller.results]
    for user in list(node.users):
        if user.users:
            place: Any = user.args[1]
            user.args = (made, smaller.results.index(place))
        else:
            graph.erase_node(user)
    graph.erase_node(node)
