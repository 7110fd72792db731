"""A trace as something that runs: compiled or replayed, with and without gradients."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.fx import GraphModule

from torchbatch._torch import graphs, guards, levels, samplewise
from torchbatch._torch.graphs import Trace
from torchbatch._torch.rewrites import simplified
from torchbatch.core import compile_log
from torchbatch.core.describe import function_name, in_detail
from torchbatch.core.program import Program, one_at_a_time
from torchbatch.core.signature import Call
from torchbatch.errors import AxisSpecError, CompilerError, UnsupportedOperationError

Run = Callable[[list[torch.Tensor]], Sequence[torch.Tensor]]
Build = Callable[[GraphModule, Sequence[torch.Tensor]], tuple[Run, str]]


@functools.cache
def compiler() -> Any:
    """The module that stands for Inductor, which takes two seconds to import."""
    return importlib.import_module("torchbatch._torch.inductor")


class Backend:
    """What makes a callable of a graph.

    Args:
        name: ``"inductor"``; ``"eager"``, which replays the operations; or a function of a graph and its inputs, as
            torch.compile takes it.
        mode, options: those of torch.compile.
    """

    def __init__(self, name: Any, mode: str | None, options: Mapping[str, Any] | None) -> None:
        if not isinstance(options, Mapping | None):
            raise AxisSpecError(f"jit: options must be a dict of Inductor's settings, but it is {options!r}.")
        if name not in ("inductor", "eager") and not callable(name):
            raise AxisSpecError(f'jit: backend must be "inductor", "eager" or a function, but it is {name!r}.')
        if (mode is not None or options) and name != "inductor":
            raise AxisSpecError("jit: mode and options are settings of Inductor, so they go with backend='inductor'.")
        self.name = name
        self._mode, self._options = mode, options
        if mode is not None or options:
            self.settings  # noqa: B018 (a wrong mode or option is refused now)

    @functools.cached_property
    def settings(self) -> dict[str, Any]:
        """Inductor's settings."""
        found: dict[str, Any] = compiler().settings(self._mode, self._options)
        return found

    def build(self, trace: Trace, module: GraphModule, examples: Sequence[torch.Tensor]) -> tuple[Run, str]:
        """A function of a list of tensors, and the code that was generated for it."""
        if self.name == "inductor":
            found: tuple[Run, str] = compiler().compile_graph(module, examples, trace, self.settings)
            return found
        run = module.forward if self.name == "eager" else self.name(module, list(examples))
        if not callable(run):
            raise CompilerError(f"jit: the backend {function_name(self.name)} must return a function, but it returned {run!r}.")
        return (lambda values: run(*values)), module.code


class Executable:
    """A compiled program: ``run`` takes the flat tensors of a call and gives the flat outputs, ``finish`` their tree."""

    def __init__(self, program: Program, backend: Backend) -> None:
        compiled = backend.name == "inductor"
        self.trace = trace = simplified(program.trace) if compiled else program.trace
        self.backend, self.name = backend, function_name(program.call.fun)
        self.single = program.single
        self.finish: Callable[[Any], Any] = program.structure.unflatten
        self.captured = trace.captured
        self.modules = program.modules
        self._captured_described = _described(self.captured)
        self._captured_like = guards.tensors_like(self.captured)
        self.is_open = trace.sizes is not None
        self._kind = program.call.key_of_open() if self.is_open else None
        self._mutated = trace.mutated
        self.source: list[str] = []
        self.direct: Run | None = None  # takes the captured tensors too, and returns the outputs, if nothing else is to be done
        if trace.differentiable:
            forward, self._backward_graph = compiler().partition(trace, decompose=compiled)
            with trace.mode:
                _keep_outputs_apart(forward, trace.outputs + len(trace.mutated))
            self._forward = self._build(forward, trace.examples[: len(trace.examples) - len(trace.differentiable)])
            self.run: Run = self._run_differentiable
        else:
            crossing = graphs.writes_cross(trace)
            self._forward = self._build(trace.graph if crossing else graphs.written_in_place(trace), trace.examples)
            self.run = self._plain_run(program) if not trace.mutated else self._run_copying if crossing else self._run_writing

    def surroundings_same(self) -> bool:
        """Whether the captured tensors and the modules are such as they were when the function was traced."""
        return self._captured_like(*self.captured) and self.modules.same()

    def changes(self) -> tuple[dict[str, str], dict[str, str]]:
        """What is not as it was among the captured tensors and the modules: by name and in words, as it was and as it is."""
        was, now = self._captured_described, _described(self.captured)
        changed = [name for name in now if now[name] != was[name]]
        modules_were, modules_are = self.modules.changes()
        return {name: was[name] for name in changed} | modules_were, {name: now[name] for name in changed} | modules_are

    def accepts(self, call: Call) -> bool:
        """Whether a program with open sizes serves a call."""
        sizes = self.trace.sizes
        return sizes is not None and call.key_of_open() == self._kind and sizes.accept(call.values) and self.surroundings_same()

    def _build(self, module: GraphModule, examples: Sequence[torch.Tensor]) -> Run:
        run, source = self.backend.build(self.trace, module, examples)
        self.source.append(source)
        return run

    def _plain_run(self, program: Program) -> Run:
        """The shortest way to the outputs of a program without gradients and in-place writes."""
        captured = self.captured
        anything = any(value.requires_grad for value in (*program.call.values, *captured))
        forward = guards.without_gradients(self._forward) if anything or self.backend.name != "inductor" else self._forward
        self.direct = forward

        def run(values: list[torch.Tensor]) -> Sequence[torch.Tensor]:
            values += captured  # in place: whoever is called frees the tensors as it goes
            return forward(values)

        return run if captured else forward

    def _run_writing(self, values: list[torch.Tensor]) -> Sequence[torch.Tensor]:
        values = [*values, *self.captured]
        written = [values[i] for i in self._mutated]
        check_apart(written, values)
        with torch.no_grad():
            results = self._forward(values)
        torch.autograd.graph.increment_version(written)
        return results

    def _run_copying(self, values: list[torch.Tensor]) -> Sequence[torch.Tensor]:
        """The graph only returns the new values: written one by one, the first would be read where the old one is meant."""
        inputs = [*values, *self.captured]
        written = [inputs[i] for i in self._mutated]
        check_apart(written, inputs)
        with torch.no_grad():
            results = self._forward([*inputs])
            for value, new in zip(written, results[self.trace.outputs :], strict=True):
                value.copy_(new)
        return results[: self.trace.outputs]

    def _run_differentiable(self, values: list[torch.Tensor]) -> Sequence[torch.Tensor]:
        inputs = [*values, *self.captured]
        check_apart([inputs[i] for i in self._mutated], inputs)
        results: Any = _apply(self, *inputs)
        count = self.trace.outputs
        with torch.no_grad():
            for position, value in zip(self._mutated, results[count:-1], strict=True):
                inputs[position].copy_(value)
        return results[:count]  # type: ignore[no-any-return]

    def forward(self, inputs: Sequence[torch.Tensor]) -> tuple[list[torch.Tensor], list[Any]]:
        """The outputs with the new values of inputs, and what the backward pass needs."""
        results = self._forward(list(inputs))
        count = self.trace.outputs + len(self.trace.mutated)
        written = {id(inputs[i]) for i in self._mutated}  # what the backward pass needs of them is their old value
        given = {id(value) for value in inputs}
        plain = {id(value): value.data for value in results if id(value) not in given and levels.is_view(value)}
        outputs = [plain.get(id(value), value) for value in results[:count]]
        saved = [value.clone() if id(value) in written else plain.get(id(value), value) for value in results[count:]]
        return outputs, saved

    @functools.cached_property
    def backward(self) -> Run:
        """The compiled backward pass; it is compiled when it is first needed."""
        graph = self._backward_graph
        with one_at_a_time, compile_log.compiling(f"the backward pass of {self.name}"):
            return self._build(graph, [node.meta["val"] for node in graph.graph.find_nodes(op="placeholder")])


def _described(captured: Sequence[torch.Tensor]) -> dict[str, str]:
    return {f"captured tensor no. {i}": in_detail(value) for i, value in enumerate(captured, 1)}


class _Differentiable(torch.autograd.Function):
    """Ties the compiled forward and backward pass into autograd."""

    @staticmethod
    def forward(ctx: Any, executable: Executable, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        results, saved = executable.forward(inputs)
        ctx.executable = executable
        link = torch.empty(0)  # one more output, which is saved too: it leads from the backward pass to the inputs
        ctx.save_for_backward(link, *(value for value in saved if isinstance(value, torch.Tensor)))
        ctx.sizes = [value for value in saved if not isinstance(value, torch.Tensor)]
        wanted = set(executable.trace.differentiable)
        ctx.mark_non_differentiable(*(value for i, value in enumerate(results) if i not in wanted))
        return (*results, link)

    @staticmethod
    def backward(ctx: Any, *tangents: torch.Tensor) -> Any:
        executable: Executable = ctx.executable
        trace = executable.trace
        link, *saved = ctx.saved_tensors
        with torch.no_grad():
            given = [tangents[i].contiguous() for i in trace.differentiable]
            found = samplewise.run(executable.backward, [*ctx.sizes, *saved, *given])
        if torch.is_grad_enabled():
            if samplewise.is_batching():
                raise _differentiated_twice()
            found = _once(len(found), link, *tangents[:-1], *found)
        gradients: list[Any] = [None] * (len(trace.examples) - len(trace.differentiable) + 1)
        for position, value in zip(trace.wanted, found, strict=True):
            gradients[position + 1] = value
        return tuple(gradients)


class _Once(torch.autograd.Function):
    """The last ``count`` values, which cannot be differentiated by any of them."""

    @staticmethod
    def forward(ctx: Any, count: int, *values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(value.detach().clone() for value in values[len(values) - count :])

    @staticmethod
    def backward(ctx: Any, *tangents: torch.Tensor) -> Any:
        raise _differentiated_twice()


def _differentiated_twice() -> UnsupportedOperationError:
    return UnsupportedOperationError(
        "jit: the gradient of a jit function is differentiated a second time by autograd (create_graph=True), but its "
        "backward pass is compiled. Put the first derivative inside: jit(lambda x: torchbatch.grad(f)(x)…)."
    )


_apply: Callable[..., Any] = _Differentiable.apply
_once: Callable[..., Any] = _Once.apply


def _keep_outputs_apart(module: GraphModule, outputs: int) -> None:
    """Copy those outputs that share memory with what is saved beside them: autograd could not see them overwritten."""
    output = module.graph.output_node()
    results: list[Any] = list(output.args[0])  # type: ignore[arg-type]
    saved = [node for node in results[outputs:] if isinstance(node.meta["val"], torch.Tensor)]
    for i, node in enumerate(results[:outputs]):
        if any(node is not other and levels.share_memory(node.meta["val"], other.meta["val"]) for other in saved):
            with module.graph.inserting_before(output):
                results[i] = module.graph.call_function(torch.ops.aten.clone.default, (node,))
            results[i].meta["val"] = node.meta["val"].clone()
    output.args = (tuple(results),)
    module.recompile()


def check_apart(written: Sequence[torch.Tensor], values: Sequence[torch.Tensor]) -> None:
    """A graph writes each input by itself, so what is written must not share memory with another input."""
    for value in written:
        start = value.untyped_storage().data_ptr()
        if value.numel() and sum(other.untyped_storage().data_ptr() == start for other in values) > 1:
            raise UnsupportedOperationError(
                "jit: the function writes in place into an argument that shares memory with another one. Pass a copy of one "
                "of them (.clone()), or return the new value instead."
            )
