"""Everything that a function computes on the way to its output, each with the user's line: in PyTorch and in JAX."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import linecache
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.fx import GraphModule, Interpreter, Node
from torch.fx import traceback as node_meta
from torch.overrides import TorchFunctionMode

import torchbatch
from torchbatch import tree
from torchbatch.testing.optional import require
from torchbatch.testing.values import Values, read

_VIEWS = frozenset(
    # PyTorch's
    "view _unsafe_view reshape permute transpose t expand squeeze unsqueeze alias clone detach contiguous lift_fresh_copy "
    "_reshape_alias _to_copy lift_fresh "
    # JAX's
    "broadcast_in_dim expand_dims convert_element_type copy copy_p stop_gradient".split()
)
_CASTS = frozenset(("_to_copy", "convert_element_type"))
_CALLS = frozenset(
    "pjit jit closed_call core_call core_closed_call custom_jvp_call custom_vjp_call custom_vjp_call_jaxpr checkpoint remat "
    "remat2 custom_lin".split()
)
_MOST_STEPS = 64  # longer loops of JAX are one step
_LIBRARIES = ("torch", "torchbatch", "jax", "jaxlib", "numpy")


@dataclasses.dataclass(frozen=True)
class Line:
    """A line of the user's code."""

    file: str
    number: int

    @property
    def text(self) -> str:
        """What stands there; empty if the file cannot be read."""
        return linecache.getline(self.file, self.number).strip()

    def __str__(self) -> str:
        place = f"{os.path.relpath(self.file) if os.path.isabs(self.file) else self.file}:{self.number}"
        return f"{place}: {self.text}" if self.text else place


@dataclasses.dataclass(frozen=True)
class Step:
    """One value that was computed.

    Attributes:
        operation: the framework's name of the operation, such as ``"aten.mm"`` or ``"dot_general"``.
        kind: ``"input"``, ``"captured"``, ``"view"`` (the same numbers in another shape or order, or some repeated), or
            ``"operation"``.
        values: the numbers.
        inputs: the places of the steps that it was computed from.
        line: the user's line, if it is known.
        label: what else to call it, such as the name of the node in the graph.
    """

    operation: str
    kind: str
    values: Values
    inputs: tuple[int, ...] = ()
    line: Line | None = None
    label: str = ""

    @property
    def short(self) -> str:
        """The operation without the names before and after it: ``"mm"`` for ``"aten.mm"``."""
        return self.operation.removeprefix("aten.").removesuffix("_")


@dataclasses.dataclass(frozen=True)
class Steps:
    """All steps of a call, in order.

    Attributes:
        steps: the steps.
        outputs: the places of the output's leaves; None for one that no step computed.
        pieces: numbers that single operations compute inside: the sum in a softmax.
        module: the graph, of a PyTorch function.
        arguments: what the graph takes.
    """

    steps: tuple[Step, ...]
    outputs: tuple[int | None, ...]
    pieces: tuple[Values, ...] = ()
    module: GraphModule | None = None
    arguments: tuple[torch.Tensor, ...] = ()

    def source(self, place: int) -> int:
        """The step whose numbers a view shows; the step itself, if it is no view."""
        while self.steps[place].kind == "view" and self.steps[place].inputs:
            place = self.steps[place].inputs[0]
        return place


# --- lines -----------------------------------------------------------------------------------------------------------


def _folders() -> tuple[str, ...]:
    found = (getattr(sys.modules.get(name), "__file__", None) for name in _LIBRARIES)
    return tuple(os.path.dirname(file) + os.sep for file in found if file)


def line_of(frames: Iterable[tuple[str, int]]) -> Line | None:
    """The first line, from the innermost on, that is not in a library.

    Args:
        frames: file and line of each call, the innermost first.
    """
    folders = _folders()
    for file, number in frames:
        if not file.startswith((*folders, "<frozen")) and file != "<string>":
            return Line(file, number)
    return None


def _frames(depth: int) -> Iterator[tuple[str, int]]:
    """File and line of each call inside the function that is traced, the innermost first."""
    frame = sys._getframe(depth)
    while frame is not None and frame.f_code.co_filename != __file__:
        yield frame.f_code.co_filename, frame.f_lineno
        frame = frame.f_back  # type: ignore[assignment]


class _Lines(TorchFunctionMode):
    """Note the user's line at every operation, for the nodes of the graph that is being recorded."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        line = line_of(_frames(3))
        node_meta.set_stack_trace([] if line is None else [f"{line.file}:{line.number}"])
        return func(*args, **(kwargs or {}))


def _noted(node: Node) -> Line | None:
    file, _, number = (node.meta.get("stack_trace") or "").rpartition(":")
    return Line(file, int(number)) if file and number.isdigit() else None


# --- PyTorch ---------------------------------------------------------------------------------------------------------


def of_torch(fun: Callable[..., Any], args: Sequence[Any]) -> Steps:
    """The steps of a PyTorch function: what it does below all transforms, as :func:`torchbatch.make_graph` shows it.

    Raises:
        TorchbatchError: it cannot be traced.
    """
    leaves, structure = tree.flatten(tuple(args))

    def watched(*given: Any) -> Any:
        with _Lines():
            return fun(*tree.unflatten(structure, given))

    with node_meta.preserve_node_meta():
        graph = torchbatch.make_graph(watched)(*leaves)
    rows = zip(leaves, graph.inputs, strict=True)
    arguments = [torch.as_tensor(leaf, dtype=shape.dtype, device=shape.device) for leaf, shape in rows]
    arguments = [*(value.detach().clone() for value in arguments), *graph.captured]
    recorder = _Recorder(graph.module, len(graph.inputs))
    with torch.no_grad():
        recorder.run(*arguments)
    results: Any = graph.module.graph.output_node().args[0]
    outputs = tuple(recorder.places.get(node) for node in results[: len(graph.outputs)])
    return Steps(tuple(recorder.steps), outputs, tuple(recorder.pieces), graph.module, tuple(arguments))


class _Recorder(Interpreter):
    """Run a graph, and keep all that it computes."""

    def __init__(self, module: GraphModule, inputs: int) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.steps: list[Step] = []
        self.places: dict[Node, int] = {}
        self.pieces: list[Values] = []
        self._inputs = iter(["input"] * inputs)

    def run_node(self, n: Node) -> Any:
        """Compute one node, and keep its value."""
        value = super().run_node(n)
        if isinstance(value, torch.Tensor) and n.op != "output":
            self._keep(n, value)
        if n.op == "call_function":
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            self.pieces += [read(piece) for piece in pieces_of(_short(n), args, kwargs, value)]
        return value

    def _keep(self, node: Node, value: torch.Tensor) -> None:
        self.places[node] = len(self.steps)
        maker = node
        while _is_getitem(maker):  # of an operation with several results
            maker = maker.all_input_nodes[0]
        inputs = tuple(self.places[source] for source in maker.all_input_nodes if source in self.places)
        operation = f"aten.{_short(maker)}" if maker.op == "call_function" else maker.op
        step = Step(operation, self._kind(maker, value, inputs), read(value), inputs, _noted(maker), node.name)
        self.steps.append(step)

    def _kind(self, node: Node, value: torch.Tensor, inputs: tuple[int, ...]) -> str:
        if node.op == "placeholder":
            return next(self._inputs, "captured")
        if node.op == "get_attr":
            return "captured"
        return kind_of(_short(node), read(value), self.steps[inputs[0]].values if inputs else None)


def kind_of(operation: str, values: Values, source: Values | None) -> str:
    """Whether an operation is a view: a cast is one if it keeps all numbers."""
    if operation not in _VIEWS or source is None:
        return "operation"
    if operation in _CASTS and not np.array_equal(values.numbers, source.numbers, equal_nan=values.numbers.dtype.kind in "fc"):
        return "operation"
    return "view"


def _is_getitem(node: Node) -> bool:
    return node.op == "call_function" and getattr(node.target, "__name__", "") == "getitem"


def _short(node: Node) -> str:
    """The name of an operation without its overload."""
    name = getattr(node.target, "__name__", str(node.target))
    return name.split(".")[0]


def pieces_of(operation: str, args: Any, kwargs: Any, value: Any) -> list[torch.Tensor]:
    """What an operation that is one in PyTorch computes inside, where other frameworks write it out."""
    write_out = _PIECES.get(operation)
    if write_out is None:
        return []
    parameters = inspect.signature(write_out).parameters.values()
    known = {parameter.name: kwargs[parameter.name] for parameter in parameters if parameter.name in kwargs}
    takes_all = any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters)
    given = args if takes_all else args[: len(parameters) - len(known)]
    return [piece.detach() for piece in write_out(*given, **known)]


def _softmax(x: torch.Tensor, dim: int = -1) -> list[torch.Tensor]:
    largest = x.amax(dim, keepdim=True)
    exp = (x - largest).exp()
    total = exp.sum(dim, keepdim=True)
    return [largest, x - largest, exp, total, total.log(), exp / total]


def _axes(x: torch.Tensor, dim: Any) -> list[int]:
    return list(range(x.dim())) if dim is None else [dim] if isinstance(dim, int) else list(dim) or list(range(x.dim()))


def _moments(x: torch.Tensor, axes: list[int], correction: float = 0) -> list[torch.Tensor]:
    count = max(int(np.prod([x.shape[axis] for axis in axes])), 1)
    total = x.sum(axes, keepdim=True)
    away = x - total / count
    squares = (away * away).sum(axes, keepdim=True)
    variance = squares / max(count - correction, 1)
    square_of = (x * x).sum(axes, keepdim=True)
    return [total, total / count, away, away * away, squares, variance, variance.sqrt(), x * x, square_of, square_of / count]


def _variance(x: torch.Tensor, dim: Any = None, correction: Any = 1) -> list[torch.Tensor]:
    return _moments(x, _axes(x, dim), 1 if correction is None else correction)


def _mean(x: torch.Tensor, dim: Any = None) -> list[torch.Tensor]:
    return [x.sum(_axes(x, dim))] if x.dim() else []


def _layer_norm(
    x: torch.Tensor, shape: Sequence[int], weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float
) -> list[torch.Tensor]:
    axes = list(range(x.dim() - len(shape), x.dim()))
    return _normalized(x, axes, weight, eps)


def _normalized(x: torch.Tensor, axes: list[int], weight: torch.Tensor | None, eps: float) -> list[torch.Tensor]:
    found = _moments(x, axes)
    steadied = found[5] + eps
    normal = found[2] * steadied.rsqrt()
    scaled = [] if weight is None or weight.dim() != len(axes) else [normal * weight, steadied.rsqrt() * weight]
    return [*found, steadied, steadied.sqrt(), steadied.rsqrt(), normal, *scaled]


def _batch_norm(
    x: torch.Tensor, weight: Any, bias: Any, mean: Any, var: Any, training: bool, momentum: float, eps: float
) -> list[torch.Tensor]:
    axes = [axis for axis in range(x.dim()) if axis != 1]
    return _normalized(x, axes, None, eps) if training else []


def _gelu(x: torch.Tensor, approximate: str = "none") -> list[torch.Tensor]:
    if approximate == "none":
        inner = x * 0.5**0.5
        return [inner, -inner, inner.erf(), (-inner).erfc(), 1 + inner.erf(), 0.5 * x, x * (-inner).erfc()]
    cube = 0.044715 * x**3
    inner = (2 / np.pi) ** 0.5 * (x + cube)
    half = 0.5 * (1 + inner.tanh())
    return [x**3, cube, x + cube, inner, inner.tanh(), 1 + inner.tanh(), half, 0.5 * x]


def _silu(x: torch.Tensor) -> list[torch.Tensor]:
    return [x.sigmoid()]


def _addmm(bias: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> list[torch.Tensor]:
    return [a @ b]


def _attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dropout: float = 0.0,
    is_causal: bool = False,
    attn_mask: torch.Tensor | None = None,
    scale: float | None = None,
) -> list[torch.Tensor]:
    scores = q @ k.transpose(-1, -2)
    scaled = scores * (q.shape[-1] ** -0.5 if scale is None else scale)
    masked = scaled if attn_mask is None else scaled + attn_mask
    if is_causal:
        masked = masked.masked_fill(torch.ones_like(masked, dtype=torch.bool).tril().logical_not(), -torch.inf)
    return [scores, scaled, masked, *_softmax(masked)]


def _group_norm(
    x: torch.Tensor, weight: torch.Tensor | None, bias: Any, count: int, channels: int, rest: int, groups: int, eps: float
) -> list[torch.Tensor]:
    grouped = x.reshape(count, groups, -1)
    normal = _normalized(grouped, [2], None, eps)
    scaled = normal[-1].reshape(count, channels, rest)
    return [*normal, *([] if weight is None else [scaled * weight[:, None]])]


def _convolution(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *rest: Any) -> list[torch.Tensor]:
    return [] if bias is None else [torch.ops.aten.convolution.default(x, weight, None, *rest)]


_PIECES: dict[str, Callable[..., list[torch.Tensor]]] = {
    "_softmax": _softmax,
    "_log_softmax": _softmax,
    "logsumexp": _softmax,
    "var": _variance,
    "std": _variance,
    "var_mean": _variance,
    "mean": _mean,
    "native_layer_norm": _layer_norm,
    "native_batch_norm": _batch_norm,
    "_native_batch_norm_legit": _batch_norm,
    "convolution": _convolution,
    "native_group_norm": _group_norm,
    "gelu": _gelu,
    "silu": _silu,
    "addmm": _addmm,
    "baddbmm": _addmm,
    "_scaled_dot_product_flash_attention_for_cpu": _attention,
    "_scaled_dot_product_attention_math": _attention,
}


# --- JAX -------------------------------------------------------------------------------------------------------------


def of_jax(fun: Callable[..., Any], args: Sequence[Any]) -> Steps:
    """The steps of a JAX function: its jaxpr, equation by equation, with functions that it calls written out.

    Raises:
        ImportError: JAX is not installed.
    """
    jax = require("jax", "first_divergence with a JAX function", "jax")
    closed = jax.make_jaxpr(fun)(*args)
    leaves = [jax.numpy.asarray(leaf) for leaf in tree.leaves(tuple(args))]
    walker = _Equations()

    def walked(given: Any, consts: Any) -> list[Any]:
        placed = [walker.given(leaf, "input") for leaf in given], [walker.given(const, "captured") for const in consts]
        walker.outputs = walker.run(closed.jaxpr, placed[1], placed[0], None)
        return [value for value, _ in walker.found]

    values = jax.jit(walked)(leaves, list(closed.consts))  # one compilation, rather than one for each equation
    steps: list[Step] = []
    for value, (_, (name, kind, inputs, line)) in zip(values, walker.found, strict=True):
        kind = kind or kind_of(name, read(value), steps[inputs[0]].values if inputs else None)
        steps.append(Step(name, kind, read(value), inputs, line, f"equation {len(steps)}"))
    return Steps(tuple(steps), tuple(place for _, place in walker.outputs))


_Placed = tuple[Any, "int | None"]
_About = tuple[str, str, tuple[int, ...], "Line | None"]  # operation, kind if it is known, inputs, line


class _Equations:
    """Run a jaxpr, and keep all that it computes.

    Attributes:
        found: each value, and what is known of it.
        outputs: the outputs.
    """

    def __init__(self) -> None:
        self.found: list[tuple[Any, _About]] = []
        self.outputs: list[_Placed] = []

    def given(self, value: Any, kind: str) -> _Placed:
        """A value that is not computed."""
        return value, self._keep(value, kind, kind, (), None)

    def _keep(self, value: Any, operation: str, kind: str, inputs: tuple[int, ...], line: Line | None) -> int | None:
        if not hasattr(value, "dtype") or str(value.dtype).startswith(("key<", "float0")):
            return None
        self.found.append((value, (operation, kind, inputs, line)))
        return len(self.found) - 1

    def run(self, jaxpr: Any, consts: Sequence[_Placed], args: Sequence[_Placed], line: Line | None) -> list[_Placed]:
        """The outputs of a jaxpr.

        Args:
            jaxpr: the jaxpr.
            consts, args: what it takes.
            line: the line where a function of JAX itself was called whose jaxpr this is. Such a jaxpr may be of an earlier call.
        """
        known: dict[Any, _Placed] = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))

        def look_up(atom: Any) -> _Placed:
            return (atom.val, None) if hasattr(atom, "val") else known[atom]

        for equation in jaxpr.eqns:
            given = [look_up(atom) for atom in equation.invars]
            results = self._equation(equation, given, line or _line_of_equation(equation))
            known.update(zip(equation.outvars, results, strict=True))
        return [look_up(atom) for atom in jaxpr.outvars]

    def _equation(self, equation: Any, given: list[_Placed], line: Line | None) -> list[_Placed]:
        if str(equation.primitive.name) == "scan" and equation.params["length"] <= _MOST_STEPS:
            return self._scan(equation, given, line)
        inner = _inner(equation)
        if inner is not None:
            consts = [self.given(const, "captured") for const in getattr(inner, "consts", ())]
            body = getattr(inner, "jaxpr", inner)
            return self.run(body, consts, given, line if _is_of_library(body) else None)
        return self._opaque(equation, given, line)

    def _opaque(self, equation: Any, given: list[_Placed], line: Line | None) -> list[_Placed]:
        """An equation as it is."""
        bound = equation.primitive.get_bind_params(equation.params)
        functions, params = bound if isinstance(bound, tuple) else ((), bound)  # a pair, before JAX 0.10
        results = equation.primitive.bind(*functions, *(value for value, _ in given), **params)
        results = results if equation.primitive.multiple_results else [results]
        inputs = tuple(place for _, place in given if place is not None)
        name = str(equation.primitive.name)
        return [(value, self._keep(value, name, "", inputs, line)) for value in results]

    def _scan(self, equation: Any, given: list[_Placed], line: Line | None) -> list[_Placed]:
        """A short loop, written out."""
        params, jax = equation.params, require("jax", "first_divergence with a JAX function", "jax")
        body, length = params["jaxpr"], params["length"]
        constants, carried = params["num_consts"], params["num_carry"]
        fixed, carry, rows = given[:constants], given[constants : constants + carried], given[constants + carried :]
        consts = [self.given(const, "captured") for const in body.consts]
        found: list[list[_Placed]] = []
        for step in reversed(range(length)) if params["reverse"] else range(length):
            row = [self._computed(values[step], "slice", (place,), line) for values, place in rows]
            results = self.run(body.jaxpr, consts, [*fixed, *carry, *row], None)
            carry = results[:carried]
            found.append(results[carried:])
        found = found[::-1] if params["reverse"] else found
        if not found:
            return self._opaque(equation, given, line)
        stacked = [
            (jax.numpy.stack([value for value, _ in column]), [place for _, place in column])
            for column in zip(*found, strict=True)
        ]
        return [*carry, *(self._computed(values, "stack", places, line) for values, places in stacked)]

    def _computed(self, value: Any, name: str, inputs: Iterable[int | None], line: Line | None) -> _Placed:
        return value, self._keep(value, name, "", tuple(place for place in inputs if place is not None), line)


def _inner(equation: Any) -> Any:
    """The jaxpr of an equation that only calls a function."""
    if str(equation.primitive.name) not in _CALLS:
        return None
    params = equation.params
    return next((params[name] for name in ("jaxpr", "call_jaxpr", "fun_jaxpr") if name in params), None)


def _is_of_library(jaxpr: Any) -> bool:
    """Whether a function that is called is one of JAX itself, such as ``jnp.var``."""
    about = str(getattr(getattr(jaxpr, "debug_info", None), "func_src_info", "") or "")
    return any(folder in about for folder in _folders())


def _line_of_equation(equation: Any) -> Line | None:
    frames = getattr(getattr(equation.source_info, "traceback", None), "frames", None) or ()
    inside = itertools.takewhile(lambda frame: frame.file_name != __file__, frames)
    return line_of((frame.file_name, frame.line_num) for frame in inside)
