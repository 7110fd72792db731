"""Hand a graph to Inductor, the compiler behind torch.compile, and get a function of a list of tensors.

What is called in the end is the generated wrapper itself: nothing of torch.compile stands between, since the caller has made
sure that the tensors are of the kind that the graph was compiled for.

This module takes two seconds to import, so it is imported with the first compilation.

Private names used, seen on torch 2.11, 2.13 and 2.15: ``torch._inductor.compile_fx.compile_fx``, ``compile_fx_inner``;
``torch._inductor.config``, ``list_mode_options``, ``list_options``; ``torch._inductor.decomposition.select_decomp_table``;
``torch._inductor.exc.InvalidCxxCompiler``; ``torch._functorch.partitioners.min_cut_rematerialization_partition``;
``torch._functorch.config``; ``torch._guards.TracingContext``, ``tracing``;
``torch.fx.experimental.symbolic_shapes.ShapeEnv``, ``FakeTensorMode.shape_env``; the attributes
``SymInt.node.expr``, ``current_callable`` and ``source_code`` of a compiled graph.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch._functorch import config as functorch_config
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._guards import TracingContext, tracing
from torch._inductor import config, list_mode_options, list_options
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.exc import InvalidCxxCompiler
from torch.fx import GraphModule, Interpreter
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from torchbatch._torch import draw_lowerings as draw_lowerings  # tells the compiler of random draws
from torchbatch._torch.graphs import Trace
from torchbatch._torch.programs import programs_of
from torchbatch._torch.unused import without_unused
from torchbatch.errors import AxisSpecError, CompilerError

Run = Callable[[list[torch.Tensor]], Sequence[Any]]

# The call has been checked already, and draws are to be those of PyTorch's own operators.
_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
_OURS = {"size_asserts": False, "fallback_random": True}


class Code(NamedTuple):
    """A compiled graph: ``run`` takes a list of tensors, and empties it; ``source`` is the generated Python and C++."""

    run: Run
    source: str


def settings(mode: str | None, options: Mapping[str, Any] | None) -> dict[str, Any]:
    """Inductor's settings for the ``mode`` and the ``options`` of torch.compile.

    Raises:
        AxisSpecError: there is no such mode or option.
    """
    known = list_options()
    for name in options or {}:
        if not isinstance(name, str) or name.replace("-", "_") not in known:
            raise AxisSpecError(f"jit: options has no entry {name!r}. torch._inductor.list_options() lists those that exist.")
    if mode not in (None, *_MODES):
        raise AxisSpecError(f"jit: mode must be one of {', '.join(_MODES)}, but it is {mode!r}.")
    found = list_mode_options(mode) if mode is not None else {}
    given = {name.replace("-", "_"): value for name, value in (options or {}).items()}
    return {**_OURS, **found, **given}


def compile_graph(module: GraphModule, examples: Sequence[torch.Tensor], trace: Trace, patches: Mapping[str, Any]) -> Code:
    """Compile a graph for inputs like ``examples``.

    Raises:
        CompilerError: the compiler failed, or there is none.
    """
    module, smaller = without_unused(module)
    trace.programs.extend(smaller)
    _compile_programs(module, trace, patches)
    made: list[Any] = []

    def inner(graph: GraphModule, inputs: Sequence[Any], **kwargs: Any) -> Any:
        made.append(compile_fx_inner(graph, inputs, **kwargs))
        return made[-1]

    if trace.mode.shape_env is None:
        trace.mode.shape_env = ShapeEnv()  # there are no open sizes, but without it the cache on disk is not used
    own = GraphModule(module, copy.deepcopy(module.graph))  # the compiler changes what it is given
    places = _open_sizes(examples)
    sizes = _take_sizes(own, places, examples)
    constants = _take_constants(own)
    try:
        with _settled({**_for_pools(own), **patches}), tracing(TracingContext(trace.mode)):
            whole: Any = compile_fx(own, [*constants, *sizes, *examples], inner_compile=inner, decompositions=_table())
    except Exception as error:
        raise explained(error) from error
    code = made[-1]
    run = code.current_callable if _is_plain(code) else lambda values: whole(*values)
    if places or constants:
        return Code(lambda values: run([*constants, *(values[i].shape[axis] for i, axis in places), *values]), _source(code))
    return Code(run, _source(code))


def _compile_programs(module: GraphModule, trace: Trace, patches: Mapping[str, Any]) -> None:
    """Compile the bodies of the loops, and the branches, that a graph runs."""
    for program in programs_of(module):
        mine = trace._replace(programs=program.inner)
        program.compile(lambda body: compile_graph(body.graph, body.examples, mine._replace(mode=body.mode), patches).run)  # noqa: B023


_TANH = (-5.70498872745e-3, 2.06390887954e-2, -5.37397155531e-2, 1.33314422036e-1, -3.33332819422e-1)


def _tanh(x: torch.Tensor) -> Any:
    """On the CPU in float32: S. Moshier's form (Cephes, ``tanhf``), wrong by at most 2 units in the last place.

    The vectorized function that Inductor calls is wrong by at most 1, and takes twice as long.
    """
    if x.dtype is not torch.float32 or x.device.type != "cpu":
        return NotImplemented
    size, square = x.abs(), x * x
    factor = torch.full_like(x, _TANH[0])
    for coefficient in _TANH[1:]:
        factor = factor * square + coefficient
    return torch.where(size < 0.625, x * (factor * square + 1), torch.copysign(1 - 2 / (torch.exp(2 * size) + 1), x))


def _table() -> dict[Any, Callable[..., Any]]:
    """What operators are taken apart into before Inductor sees them."""
    return {**select_decomp_table(), torch.ops.aten.tanh.default: _tanh}


_POOLS = (torch.ops.aten.max_pool2d_with_indices.default, torch.ops.aten.max_pool2d_with_indices_backward.default)


def _for_pools(module: GraphModule) -> dict[str, Any]:
    """Settings for max pooling on the CPU: otherwise each pool transposes what the convolutions give, in scalar loops.

    Measured on per-example gradients of a CNN with 256 examples of 28 x 28: 0.64 of the time.
    """
    pools = [node for node in module.graph.nodes if node.target in _POOLS]
    if not pools or pools[0].args[0].meta["val"].device.type != "cpu":
        return {}
    return {"layout_optimization": False, "cpp.enable_tiling_heuristics": False}


def _open_sizes(examples: Sequence[Any]) -> list[tuple[int, int]]:
    """Where each open size is found first: the number of an input, and its axis."""
    known = {value.node.expr for value in examples if isinstance(value, torch.SymInt)}
    places: list[tuple[int, int]] = []
    for i, value in enumerate(examples):
        sizes: Sequence[Any] = value.size() if isinstance(value, torch.Tensor) else ()
        for axis, size in enumerate(sizes):
            if isinstance(size, torch.SymInt) and size.node.expr.is_symbol and size.node.expr not in known:
                known.add(size.node.expr)
                places.append((i, axis))
    return places


def _take_sizes(module: GraphModule, places: Sequence[tuple[int, int]], examples: Sequence[Any]) -> list[Any]:
    """Make the open sizes the first inputs of a graph, as the code that is generated for torch.compile wants them."""
    sizes = [examples[i].size(axis) for i, axis in places]
    first = next(iter(module.graph.nodes))
    with module.graph.inserting_before(first):
        for i, size in enumerate(sizes):
            module.graph.placeholder(f"size_{i}").meta["val"] = size
    module.recompile()
    return sizes


@contextlib.contextmanager
def _settled(patches: Mapping[str, Any]) -> Iterator[None]:
    """The compiler's settings; its cache of whole graphs is off, since a hit there would not pass by the hook above."""
    with torch.no_grad(), config.patch(dict(patches)), functorch_config.patch(enable_autograd_cache=False):
        yield


def _take_constants(module: GraphModule) -> list[torch.Tensor]:
    """Make the tensors that a graph holds its first inputs; a single number stays where it is, and is compiled in."""
    graph = module.graph
    first = next(iter(graph.nodes))
    nodes = graph.find_nodes(op="get_attr")
    tensors: dict[str, torch.Tensor] = {str(node.target): getattr(module, str(node.target)) for node in nodes}
    many = {target: value for target, value in tensors.items() if value.dim()}
    with graph.inserting_before(first):
        made = {target: graph.placeholder(f"constant_{i}") for i, target in enumerate(many)}
    for node in nodes:
        value = tensors[str(node.target)]
        with graph.inserting_before(node):
            number = made.get(str(node.target)) or graph.call_function(
                torch.ops.aten.full.default, ([], value.item()), {"dtype": value.dtype, "device": value.device}
            )
        number.meta["val"] = value
        node.replace_all_uses_with(number)
        graph.erase_node(node)
    for target in tensors:
        delattr(module, target)  # or it would be taken for a parameter of the module
    module.recompile()
    return list(many.values())


def _source(code: Any) -> str:
    return getattr(code, "source_code", "")


def _is_plain(code: Any) -> bool:
    return getattr(code, "current_callable", None) is not None


def explained(error: BaseException) -> CompilerError:
    """The error to raise for one that came out of Inductor."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, InvalidCxxCompiler):
            return CompilerError(
                "jit: there is no C++ compiler on this machine, which Inductor needs for the CPU. Install g++ or clang (or set "
                'CXX to one), or run the traced operations as they are with jit(…, backend="eager").'
            )
        cause = getattr(cause, "inner_exception", None) or cause.__cause__ or cause.__context__
    text = " ".join(str(error).split())[:300]
    return CompilerError(
        f'jit: Inductor failed: {type(error).__name__}: {text}. jit(…, backend="eager") runs the traced operations without it.'
    )


def partition(trace: Trace, decompose: bool) -> tuple[GraphModule, GraphModule]:
    """The forward and the backward graph of a trace with gradients.

    The forward graph returns the outputs and new values, then what the backward graph needs; that one takes those, then the
    tangents.
    """
    table = _table() if decompose else None
    with torch.no_grad(), trace.mode:
        joint = make_fx(Interpreter(trace.graph).run, table)(*trace.examples)
    placeholders = [node for node in joint.graph.nodes if node.op == "placeholder"]
    for i, node in enumerate(placeholders):
        primal = len(placeholders) - i > len(trace.differentiable)
        node.target = node.name = f"primals_{i}" if primal else f"tangents_{i}"
    joint.recompile()
    outputs = trace.outputs + len(trace.mutated)
    with config.patch(_OURS), tracing(TracingContext(trace.mode)):
        return min_cut_rematerialization_partition(joint, trace.examples, num_fwd_outputs=outputs)
