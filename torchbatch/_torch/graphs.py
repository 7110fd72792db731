"""Trace a flat function to a graph of plain aten operations, with the tensors that it closes over as further inputs.

The function runs once, on fake tensors, below every transform that it uses: what is recorded are the operations that reach
the device. Where something requires a gradient, the backward pass is recorded in the same run, as autograd runs it, so that
``no_grad``, ``detach`` and a custom ``autograd.Function`` mean what they mean. In-place writes are taken out in a second run,
over the graph; what is written to an input becomes a ``copy_`` at the end.

Private names used, seen on torch 2.11, 2.13 and 2.15: ``torch.fx.experimental.proxy_tensor.make_fx``, ``get_proxy_mode``;
``torch._subclasses.fake_tensor.FakeTensor``, ``FakeTensorMode``; ``torch._functorch.config``;
``torch.distributions.Distribution._validate_args``; ``torch._dynamo.config``.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import logging
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch._functorch import config as functorch_config
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributions import Distribution
from torch.fx import Graph, GraphModule, Interpreter, Node
from torch.fx.experimental.proxy_tensor import get_proxy_mode, make_fx

from torchbatch._torch import levels, open_sizes, seeding
from torchbatch._torch.captured import (
    Captured,
    called_backward,
    changed_shape,
    check_independent,
    reshaped,
    without_hooks,
    wrote_differentiable,
)
from torchbatch._torch.programs import programs_in
from torchbatch.errors import LeakedTracerError, UnsupportedOperationError

Flat = Callable[[Sequence[torch.Tensor]], Sequence[torch.Tensor]]
_aten = torch.ops.aten


class Trace(NamedTuple):
    """A function as a graph without in-place writes.

    ``graph`` takes the inputs, then the captured tensors, then one tangent for each output that requires a gradient. It
    returns the outputs, then the new values of what is ``mutated``, then a gradient for each of ``wanted``.
    """

    graph: GraphModule
    examples: list[torch.Tensor]  # fake, one for each input of the graph
    mode: FakeTensorMode  # that of the examples
    captured: list[torch.Tensor]
    outputs: int
    differentiable: list[int]  # which outputs require a gradient
    wanted: list[int]  # which inputs and captured tensors get one
    mutated: list[int]  # which inputs and captured tensors are written in place
    sizes: open_sizes.OpenSizes | None  # what is known of the sizes that were left open
    programs: list[Any]  # loops and choices in the graph


class _Tracing(threading.local):
    active: bool = False


_tracing = _Tracing()


def is_tracing() -> bool:
    """Whether a function is being traced in this thread: by jit, or by PyTorch's make_fx."""
    return _tracing.active or get_proxy_mode() is not None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """PyTorch's log of fake tensors prints a stack of its own for each error of the user's."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before


@contextlib.contextmanager
def _unvalidated() -> Iterator[None]:
    """Distributions do not check their arguments, since there are no values to look at."""
    before = Distribution._validate_args
    Distribution.set_default_validate_args(False)
    try:
        yield
    finally:
        Distribution.set_default_validate_args(before)


def _uncompiled() -> contextlib.AbstractContextManager[Any]:
    """A function that ``torch.compile`` made runs as the one that it was made of; what is recorded is compiled as a whole."""
    compiler: Any = sys.modules.get("torch._dynamo")  # without it there is no such function
    return contextlib.nullcontext() if compiler is None else compiler.config.patch(error_on_nested_fx_trace=False)


def is_traced_by_jit() -> bool:
    """Whether a function is being traced by jit in this thread."""
    return _tracing.active


@contextlib.contextmanager
def _tracing_here() -> Iterator[None]:
    """State of the thread and the process while a function is traced."""
    outer, _tracing.active = _tracing.active, True
    try:
        with seeding.watched(), torch.autograd.set_detect_anomaly(False), _quiet(), _unvalidated(), _uncompiled():
            yield
    finally:
        _tracing.active = outer


def trace(
    flat: Flat,
    inputs: Sequence[torch.Tensor],
    *,
    gradients: bool,
    open_axes: Sequence[Sequence[int]] | None = None,
) -> Trace:
    """Run ``flat`` once on fakes of ``inputs`` and record what it does.

    Args:
        flat: takes and returns flat lists of tensors.
        inputs: plain tensors.
        gradients: whether to record the backward pass too, if an output turns out to require a gradient.
        open_axes: for each input the axes whose size is left open; None fixes all sizes.

    Raises:
        UnsupportedOperationError: captured tensors that require gradients depend on each other.
    """
    shapes = None if open_axes is None else open_sizes.environment()
    with functorch_config.patch(fake_tensor_allow_unsafe_data_ptr_access=False):
        mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=shapes, static_shapes=shapes is None)
    fakes = [_fake(mode, value, open_axes[i] if open_axes else None) for i, value in enumerate(inputs)]
    aliases = [value.detach() for value in fakes]
    run = _Run(flat, gradients)
    run.captured.note(fakes)
    try:
        with _tracing_here(), run.captured_restored(), mode:
            recorded = make_fx(run, DECLARED, _allow_fake_constant=True, record_stack_traces=True)(*fakes)
        _check_inputs(inputs, fakes, aliases)
    except BaseException:
        _mark_leaked(mode, run.captured)
        raise
    _lift(recorded, run.captured.fakes, run.tangents)
    own_mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=shapes, static_shapes=shapes is None)
    examples = _examples(recorded, own_mode)
    run.captured.forget()
    del fakes, aliases
    _mark_leaked(mode, run.captured)
    return _finished(recorded, examples, own_mode, run)


def _check_inputs(inputs: Sequence[torch.Tensor], fakes: Sequence[torch.Tensor], aliases: Sequence[torch.Tensor]) -> None:
    for value, fake, alias in zip(inputs, fakes, aliases, strict=True):
        _check_input(value, fake, alias)


def _check_input(value: torch.Tensor, fake: torch.Tensor, alias: torch.Tensor) -> None:
    """Refuse what a function did to an argument, and that would not happen to the real one."""
    if fake.grad_fn is not None:
        raise wrote_differentiable("an argument")
    if fake.grad is not None:
        raise called_backward()
    if reshaped(fake, alias):
        raise changed_shape("an argument")
    if fake.requires_grad != value.requires_grad or not levels.share_memory(fake, alias):
        raise UnsupportedOperationError(
            "jit: the function changes an argument itself (requires_grad_(), x.data = …, set_()), which would happen only while "
            "it is traced. Do it before the call, or to a copy (x.clone())."
        )


def _fake(mode: FakeTensorMode, value: torch.Tensor, open_axes: Sequence[int] | None) -> torch.Tensor:
    """A fake that has a memory of its own, and no history."""
    if open_axes is None:
        with mode:
            fake = torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device=value.device)
        return fake.requires_grad_(value.requires_grad)
    return open_sizes.fake(mode, value.data.requires_grad_(value.requires_grad), open_axes)


def _batch_norm(*args: Any) -> Any:
    """PyTorch's operator for batch norm does not declare that it writes into the running averages; this one does."""
    tensor, weight, bias, mean, variance, training, *rest = args
    if mean is None or not training:
        return NotImplemented
    return _aten._native_batch_norm_legit.default(tensor, weight, bias, mean, variance, training, *rest)


def _bernoulli(like: torch.Tensor, *args: Any, **options: Any) -> Any:
    """Functionalization takes this operator for ``bernoulli_``, which draws in the order of the memory."""
    order = sorted(range(like.dim()), key=like.stride, reverse=True)
    if like.is_contiguous() or not like.permute(order).is_contiguous():
        return NotImplemented
    drawn = _aten.bernoulli.p(like.permute(order), *args, **options)
    return drawn.permute([order.index(axis) for axis in range(like.dim())])


def _cudnn_batch_norm(*args: Any) -> Any:
    result = _aten.native_batch_norm.default(*args)
    return (*result, args[0].new_zeros((0,), dtype=torch.uint8))


def _zeros(size: Sequence[int], **options: Any) -> torch.Tensor:
    """The zeros of a tangent that is not there have no memory, which compiled code would read."""
    return _aten.zeros.default([], **options).expand(size)


DECLARED = {_aten.native_batch_norm.default: _batch_norm, _aten.cudnn_batch_norm.default: _cudnn_batch_norm}
REAL_ZEROS: dict[Any, Callable[..., Any]] = {_aten._efficientzerotensor.default: _zeros, _aten.bernoulli.p: _bernoulli}


class _Run:
    """What is traced: the function, and the gradients of what it returns."""

    def __init__(self, flat: Flat, gradients: bool) -> None:
        self.flat, self.gradients = flat, gradients
        self.outputs = self.tangents = 0
        self.differentiable: list[int] = []
        self.wanted: list[int] = []  # positions among the inputs
        self.captured = Captured()

    def __call__(self, *inputs: torch.Tensor) -> list[torch.Tensor]:
        with self.captured:
            outputs = self._own_memory(self.flat(inputs), inputs)
        self.outputs = len(outputs)
        gradients = self._gradients([outputs[i] for i in self.differentiable], inputs) if self.differentiable else []
        return [*(value.detach() for value in outputs), *gradients]

    def _own_memory(self, values: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Copies of outputs that would share memory with something that exists outside: as in JAX, outputs are new values.

        Where there are gradients, no output shares memory with another one either: autograd would tie their fates.
        """
        self.differentiable = [i for i, value in enumerate(values) if self.gradients and value.requires_grad]
        outputs: list[torch.Tensor] = []
        for value in values:
            outside = [*inputs, *self.captured.fakes, *(outputs if self.differentiable else ())]
            shared = type(value) is not FakeTensor or any(levels.share_memory(value, other) for other in outside)
            outputs.append(value.clone() if shared else value)
        return outputs

    def _gradients(self, results: list[torch.Tensor], inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """A gradient for each source that has one, and the tangents from which they are computed."""
        with torch.no_grad():
            tangents = [torch.empty_like(value, memory_format=torch.contiguous_format) for value in results]
        self.captured.note(tangents)  # hooks are given them
        self.tangents = len(tangents)
        sources = [*inputs, *self.captured.tensors]
        wanted = [i for i, value in enumerate(sources) if value.requires_grad]
        if not wanted:  # it is only inside that something was made to require a gradient
            self.differentiable, self.tangents = [], 0
            return []
        check_independent([value for value in self.captured.tensors if value.requires_grad])
        with without_hooks(self.captured.tensors), self.captured:
            found = torch.autograd.grad(results, [sources[i] for i in wanted], tangents, allow_unused=True)
        self.wanted = [i for i, gradient in zip(wanted, found, strict=True) if gradient is not None]
        return [*(gradient for gradient in found if gradient is not None), *tangents]

    @contextlib.contextmanager
    def captured_restored(self) -> Iterator[None]:
        """Leave the captured tensors as they were, and refuse what the function did to them that it cannot do."""
        try:
            yield
        except BaseException:
            self.captured.restore()
            raise
        for error in self.captured.restore():
            raise error


def _lift(module: GraphModule, captured: list[torch.Tensor], tangents: int) -> None:
    """Make inputs of the captured tensors, and of the last ``tangents`` outputs."""
    graph = module.graph
    uses: dict[int, list[Node]] = {id(fake): [] for fake in captured}
    for node in graph.find_nodes(op="get_attr"):
        uses.get(id(getattr(module, str(node.target))), []).append(node)
    output = graph.output_node()
    results: list[Any] = list(output.args[0])  # type: ignore[arg-type]
    kept = len(results) - tangents
    output.args = (results[:kept],)
    with graph.inserting_before(next(node for node in graph.nodes if node.op != "placeholder")):
        made = [graph.placeholder(f"captured_{i}") for i in range(len(captured))]
        made += [graph.placeholder(f"tangents_{i}") for i in range(tangents)]
    for placeholder, fake in zip(made, captured, strict=False):
        _replace(uses[id(fake)], placeholder, fake)
    for placeholder, node in zip(made[len(captured) :], results[kept:], strict=True):
        _replace([node], placeholder, node.meta["val"])
    module.recompile()


def _replace(nodes: Sequence[Node], placeholder: Node, value: torch.Tensor) -> None:
    placeholder.meta["val"] = value
    for node in nodes:
        node.replace_all_uses_with(placeholder)
        node.graph.erase_node(node)


def _examples(module: GraphModule, mode: FakeTensorMode) -> list[torch.Tensor]:
    """A fake for each input of a graph, without autograd and apart from those of the trace."""
    values = [node.meta["val"] for node in module.graph.nodes if node.op == "placeholder"]
    with mode:
        return [
            torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device=value.device) for value in values
        ]


def _without_writes(recorded: GraphModule, examples: list[torch.Tensor], mode: FakeTensorMode) -> GraphModule:
    """A graph run once more, on other fakes, and recorded as operations that write nowhere in place."""
    try:
        with torch.no_grad(), mode, _quiet(), torch.fx.traceback.preserve_node_meta():
            functional = torch.func.functionalize(Interpreter(recorded).run)
            return make_fx(functional, REAL_ZEROS, _allow_non_fake_inputs=True)(*examples)
    except (RuntimeError, NotImplementedError) as error:
        said = str(error).partition("\n\nWhile executing")[0]
        raise UnsupportedOperationError(
            f"jit: the function writes in place, or changes a tensor itself, in a way that cannot be taken out of the trace: "
            f"{said}. Compute a new value instead (x.t() for x.t_(), x.clone() before a write)."
        ) from error


def _finished(
    recorded: GraphModule,
    examples: list[torch.Tensor],
    mode: FakeTensorMode,
    run: _Run,
) -> Trace:
    module = _without_writes(recorded, examples, mode)
    for node in module.graph.nodes:
        if node.target in (_aten.detach.default, _aten.alias.default):
            node.replace_all_uses_with(node.args[0])
    mutated = _return_new_values(module.graph, run.outputs)
    module.graph.eliminate_dead_code(has_effect)
    module.recompile()
    inputs = examples[: len(examples) - run.tangents - len(run.captured.tensors)]
    sizes = None if mode.shape_env is None else open_sizes.OpenSizes(inputs, mode.shape_env)
    about = run.outputs, run.differentiable, run.wanted, mutated, sizes, programs_in(module)
    return Trace(module, examples, mode, run.captured.tensors, *about)


def writes_cross(trace: Trace) -> bool:
    """Whether the new value of an input depends on another input that is written too, as when two are exchanged."""
    placeholders = trace.graph.graph.find_nodes(op="placeholder")
    written = {placeholders[position] for position in trace.mutated}
    if len(written) < 2:
        return False
    reads: dict[Node, set[Node]] = {node: {node} & written for node in placeholders}
    for node in trace.graph.graph.nodes:
        reads[node] = reads.get(node, set()).union(*(reads[source] for source in node.all_input_nodes))
    results: Any = trace.graph.graph.output_node().args[0]
    news = zip(trace.mutated, results[trace.outputs :], strict=False)
    return any(reads[new] - {placeholders[position]} for position, new in news)


def written_in_place(trace: Trace) -> GraphModule:
    """The graph of a trace without gradients, which writes the new values of its inputs itself instead of returning them."""
    if not trace.mutated:
        return trace.graph
    module = GraphModule(trace.graph, copy.deepcopy(trace.graph.graph))
    graph = module.graph
    placeholders = graph.find_nodes(op="placeholder")
    output = graph.output_node()
    results: list[Any] = list(output.args[0])  # type: ignore[arg-type]
    with graph.inserting_before(output):
        for position, value in zip(trace.mutated, results[trace.outputs :], strict=True):
            graph.call_function(_aten.copy_.default, (placeholders[position], value))
    output.args = (results[: trace.outputs],)
    module.recompile()
    return module


def _return_new_values(graph: Graph, outputs: int) -> list[int]:
    """Make further outputs of what is copied into inputs at the end; the positions of these inputs."""
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    written = {}
    for node in list(graph.nodes):
        if node.target is _aten.copy_.default and node.args[0] in placeholders:
            written[placeholders.index(node.args[0])] = node.args[1]
            node.replace_all_uses_with(node.args[1])
            graph.erase_node(node)
    output = graph.output_node()
    results: list[Any] = list(output.args[0])  # type: ignore[arg-type]
    output.args = ([*results[:outputs], *written.values(), *results[outputs:]],)
    return list(written)


def has_effect(node: Node) -> bool:
    """Whether an operation does more than return its value; a draw moves the generator on, also if nobody reads it."""
    return node.is_impure() or torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


class LeakedTensor(torch.Tensor):
    """What is left of a value of a trace that was kept beyond it: every use is an error."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise LeakedTracerError(
            "a value from inside a jit function is used after it was traced: it leaked through a global, a closure, a list or "
            "an attribute, and holds no numbers. Return it from the function instead."
        )

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return "<value leaked from a traced function>"


def _mark_leaked(mode: FakeTensorMode, captured: Captured) -> None:
    """Make unusable what is still alive of the values of a trace that is over, with the wrappers that transforms put around."""
    if not captured.any_alive():
        return
    tensors = [value for value in gc.get_objects() if issubclass(type(value), torch.Tensor)]
    for value in [value for value in tensors if _is_of(mode, levels.innermost(value))]:
        value.__class__ = LeakedTensor


def is_of_trace(value: torch.Tensor) -> bool:
    """Whether a tensor holds no numbers, since it belongs to a trace, or did."""
    return type(value) is LeakedTensor or type(levels.innermost(value)) is FakeTensor


def _is_of(mode: FakeTensorMode, value: torch.Tensor) -> bool:
    return type(value) is FakeTensor and value.fake_mode is mode
