"""The graph of a function of one example, ready to be mapped over examples, with the gradients in it taken apart.

What the graph draws is drawn from a key, and what its loops do is done by functions that may be mapped.

Operators used: those of ``torch.ops.aten``, as torch 2.11, 2.13 and 2.15 have them. Private names used, seen on the same:
``torch.utils._python_dispatch._disable_current_modes``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch.fx import Graph, Node
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import _disable_current_modes

from torchbatch._torch.checkpoints import everything_kept
from torchbatch._torch.factored import Made, Term, find
from torchbatch._torch.programs import OPERATORS, Program, programs_in
from torchbatch._torch.recurrent import step_by_step
from torchbatch._torch.rewriting import add, shape, value
from torchbatch._torch.staged import Staged, stage
from torchbatch.errors import InPlaceError

_aten = torch.ops.aten
_WRITES = (
    "per_example: the loss of one example writes in place into an input, a parameter or another tensor from outside (as "
    "max_norm of an embedding does), and each example would have to see what the others wrote. Compute a new value instead."
)
_Instead = Callable[[Any], Callable[..., Any]]

class Parts(NamedTuple):
    """The gradient of one parameter as the graph of :class:`Taken` returns it: positions among what that returns.

    Attributes:
        whole: of the gradient itself.
        terms: for each term its class, the positions of its tensors, and what else belongs to it; or why there are none.
    """

    whole: int
    terms: list[tuple[type[Term], list[int], tuple[Any, ...]]] | Made


class Taken(NamedTuple):
    """The graph of a function that returns further values and then gradients, with the factors of these returned too."""

    run: Callable[..., list[Any]]
    captured: list[torch.Tensor]
    parts: list[Parts]
    draws: bool  # whether it draws random numbers


def taken_apart(
    body: Callable[..., Sequence[torch.Tensor]],
    inputs: Sequence[torch.Tensor],
    first: int,
    draws: _Instead,
    loops: _Instead,
) -> Taken:
    """Trace ``body``, whose results from number ``first`` on are gradients; must be called where jit traces.

    Args:
        body: a function of plain tensors. The last one, which it does not read, is a key for random draws.
        inputs: tensors like one example's, and like the key.
        first: how many results come before the gradients.
        draws: for an operator that draws random numbers, what takes its place: a function of the key, the number of the draw,
            and the arguments of the operator.
        loops: for a :class:`~torchbatch._torch.programs.Program`, a function of its tensors that does what it does.
    """

    def stepwise(*values: torch.Tensor) -> Sequence[torch.Tensor]:
        with step_by_step(), everything_kept():
            return body(*values)

    try:
        staged = _without_fused_draws(stepwise, inputs)
    except InPlaceError as error:
        raise InPlaceError(_WRITES if str(error).startswith("jit: the body") else str(error)) from error
    module = staged.body.graph
    graph = module.graph
    drawn = _draw_from_key(graph, graph.find_nodes(op="placeholder")[len(inputs) - 1], draws)
    with torch.no_grad(), _disable_current_modes(), staged.body.mode:
        _without_copies(graph)
        results: list[Any] = list(graph.output_node().args[0])  # type: ignore[arg-type]
        parts = [_parts(find(graph, results[i]), i, results) for i in range(first, len(results))]
    graph.output_node().args = (results,)
    _replace_loops(graph, {program.number: program for program in programs_in(module)}, loops)
    module.recompile()
    return Taken(module.forward, staged.captured, parts, drawn)


def _without_fused_draws(body: Callable[..., Sequence[torch.Tensor]], inputs: Sequence[torch.Tensor]) -> Staged:
    """The trace; if fused attention draws in it, a trace in which attention is made of operations that draw by themselves."""
    staged = stage(body, inputs)
    if not any(_draws(node) and _dropout_of(node) is not None for node in staged.body.graph.graph.nodes):
        return staged
    with sdpa_kernel(SDPBackend.MATH):
        return stage(body, inputs)


def _without_copies(graph: Graph) -> None:
    """In the place of a copy into a tensor, what was copied."""
    for node in graph.find_nodes(op="call_function", target=_aten.copy.default):
        target, source = node.args[:2]
        with graph.inserting_before(node):
            made = add(graph, _aten.expand.default, source, list(shape(target)))
            if value(source).dtype != value(target).dtype:
                made = add(graph, _aten._to_copy.default, made, dtype=value(target).dtype)
        node.replace_all_uses_with(made)
        graph.erase_node(node)


def _replace_loops(graph: Graph, programs: dict[int, Program], loops: _Instead) -> None:
    for operator in OPERATORS:
        for node in graph.find_nodes(op="call_function", target=operator):
            node.target, node.args = loops(programs[node.args[1]]), node.args[:1]


def _draw_from_key(graph: Graph, key: Node, draws: Callable[[Any], Callable[..., Any]]) -> bool:
    """Let all draws depend on a key, each in its own way; whether there are any."""
    drawing = [node for node in graph.nodes if _draws(node)]
    for number, node in enumerate(drawing):
        with graph.inserting_before(node):
            made = graph.call_function(draws(node.target), (key, number, *node.args), dict(node.kwargs))
        made.meta["val"] = node.meta["val"]
        node.replace_all_uses_with(made)
        graph.erase_node(node)
    return bool(drawing)


def _draws(node: Node) -> bool:
    """Whether an operation draws; fused attention is marked as drawing even where it drops nothing out."""
    if torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()) or node.target in OPERATORS:
        return False
    return _dropout_of(node) is None or bool(_dropout_of(node))


def _dropout_of(node: Node) -> Any:
    """The probability that is given to fused attention; None for other operations."""
    names = [argument.name for argument in getattr(getattr(node.target, "_schema", None), "arguments", ())]
    if "dropout_p" not in names:
        return None
    position = names.index("dropout_p")
    return node.kwargs.get("dropout_p", node.args[position] if position < len(node.args) else 0.0)


def _parts(found: list[Term] | Made, whole: int, results: list[Any]) -> Parts:
    """Let the graph return the tensors of the terms too."""
    if isinstance(found, Made):
        return Parts(whole, found)
    terms: list[tuple[type[Term], list[int], tuple[Any, ...]]] = []
    for term in found:
        nodes = [each for each in term if isinstance(each, Node)]
        terms.append((type(term), list(range(len(results), len(results) + len(nodes))), tuple(term[len(nodes) :])))
        results += nodes
    return Parts(whole, terms)
