"""What a traced or compiled program costs: operations, memory that is moved, memory that is held."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from torch.fx import GraphModule

from torchbatch._torch import buffers, graphs
from torchbatch._torch.buffers import Observed
from torchbatch._torch.graphs import Trace
from torchbatch._torch.likes import Like
from torchbatch.core.executable import Executable, compiler
from torchbatch.errors import UnsupportedOperationError


class MemoryAnalysis(NamedTuple):
    """The memory that a call takes, in bytes.

    Attributes:
        argument_size_in_bytes: that of the arguments, and of the tensors that the function closes over.
        output_size_in_bytes: that of what is returned.
        temp_size_in_bytes: what is held beside these two when most is held. If the result can be differentiated, what is kept
            for the backward pass is part of it.
        generated_code_size_in_bytes: the length of the generated source text.

    Source: ``CompiledMemoryStats`` of JAX.
    """

    argument_size_in_bytes: int
    output_size_in_bytes: int
    temp_size_in_bytes: int
    generated_code_size_in_bytes: int


def observe(trace: Trace, likes: Sequence[Like]) -> Observed:
    """What a call does, operation by operation, without the backward pass.

    Args:
        trace: the program.
        likes: the arguments and the captured tensors.
    """
    seen = buffers.observe_graph(_forward(trace), likes)
    return seen._replace(outputs=seen.outputs[: trace.outputs])


def _forward(trace: Trace) -> GraphModule:
    """The graph without the gradients."""
    if not trace.differentiable:
        return graphs.written_in_place(trace)
    module = GraphModule(trace.graph, copy.deepcopy(trace.graph.graph))
    output: Any = module.graph.output_node()
    output.args = (list(output.args[0])[: trace.outputs + len(trace.mutated)],)
    module.graph.eliminate_dead_code()
    for tangent in module.graph.find_nodes(op="placeholder")[len(trace.examples) - len(trace.differentiable) :]:
        module.graph.erase_node(tangent)
    module.recompile()
    return module


def observe_compiled(executable: Executable, likes: Sequence[Like]) -> Observed:
    """What a call of a compiled program does; where nothing was compiled, what the liveness of the graph says.

    Raises:
        UnsupportedOperationError: the sizes are open, or the generated code is of an unknown kind.
    """
    trace = executable.trace
    if executable.backend.name == "inductor":
        if executable.is_open:
            raise UnsupportedOperationError(
                "what a function compiled with dynamic=True moves and holds depends on the sizes of the call. Lower it without "
                "dynamic=True for the sizes in question."
            )
        return buffers.observe_code(executable.source[0], likes)
    if trace.differentiable:
        return buffers.observe_graph(compiler().partition(trace, decompose=False)[0], likes)
    return observe(trace, likes)


def memory(executable: Executable, likes: Sequence[Like], outputs: Iterable[Like]) -> MemoryAnalysis:
    """The memory that a call of a compiled program takes.

    Args:
        executable: the program.
        likes: the arguments and the captured tensors.
        outputs: what is returned.

    Raises:
        UnsupportedOperationError: as for :func:`observe_compiled`.
    """
    returned = sum(_size(like) for like in outputs)
    held = max(observe_compiled(executable, likes).peak - returned, 0)
    code = sum(len(text.encode()) for text in executable.source)
    return MemoryAnalysis(sum(_size(like) for like in likes), returned, held, code)


def _size(like: Like) -> int:
    return math.prod(like.size) * like.dtype.itemsize
