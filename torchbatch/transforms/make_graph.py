"""``make_graph``: the operations that a function performs, as text and as a graph."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.fx import GraphModule

from torchbatch.core.listing import of_trace
from torchbatch.core.program import Program
from torchbatch.core.signature import StaticArguments
from torchbatch.core.wrapper import Wrapper
from torchbatch.errors import AxisSpecError, TorchbatchError
from torchbatch.transforms.eval_shape import ShapeDtypeStruct, bind_shapes


def make_graph(
    fun: Callable[..., Any], static_argnums: int | Sequence[int] = (), return_shape: bool = False
) -> Callable[..., Any]:
    """Show the operations that a function performs, below every transform that it uses.

    Args:
        fun: a pure function of its arguments and of the tensors that it closes over, as for :func:`~torchbatch.jit`.
        static_argnums: positions of arguments that are constants of the trace. They must be hashable.
        return_shape: whether to return the shapes and dtypes of the output too.

    Returns:
        A function of the arguments of ``fun`` that returns a :class:`~torchbatch.transforms.make_graph.Graph`, or with
        ``return_shape`` a pair of it and the tree that ``fun`` returns, with a :class:`~torchbatch.ShapeDtypeStruct` for every
        array. A :class:`~torchbatch.ShapeDtypeStruct` may also stand for any argument: nothing is computed.

    The text has one line for each operation, and is made for reading. Views stand where they are used, as Python would write
    them; where the shapes say them already (in broadcasting, and in the batch axes of a matrix product) they are left out, and
    so are copies. Constants are numbers, and a ``bmm`` of one matrix is an ``mm``. Only the function itself is shown, and no
    backward pass, unless the function computes gradients (:func:`grad`).

    Raises:
        StaticArgumentError: an argument is neither an array nor static, or is static and not hashable.
        DataDependentError: Python needs the value of a tensor (``if``, ``.item()``, a size).
        OutputTypeError: an output is not an array.
        UnsupportedOperationError: it is called inside another transform or a trace.
        AxisSpecError: ``fun`` is not a function, or ``return_shape`` not a bool.

    Example:
        >>> import torch
        >>> from torchbatch import ShapeDtypeStruct, make_graph, vmap
        >>> weights, bias = torch.ones(4, 5), torch.ones(4)
        >>> def model(x):
        ...     return torch.tanh(weights @ x + bias).sum()
        >>> make_graph(vmap(model))(ShapeDtypeStruct((3, 5), torch.float32))
        inputs a:f32[3,5]; captured b:f32[4,5] c:f32[4]
        d:f32[4,3] = mm b a.T
        e:f32[3,4] = add d.T c
        f:f32[3,4] = tanh e
        g:f32[3] = sum[dim=1] f
        return g

    Source: ``jax.make_jaxpr``.
    """
    return _GraphMaker(fun, static_argnums, return_shape)


class Graph:
    """The operations of a function; ``str()`` shows them.

    Attributes:
        operations: the names of the operations in order; views, copies and constants are none.
        inputs: the arguments, flat; dicts in the order in which they were filled.
        outputs: what is returned, flat.
        captured: the tensors that the function closes over.
        module: the graph itself, of aten operations: ``module(*inputs, *captured)`` gives the flat outputs, and after them the
            new values of the inputs that the function writes in place.

    Source: ``jax.core.ClosedJaxpr``.
    """

    def __init__(self, program: Program) -> None:
        trace = program.trace
        self.module: GraphModule = trace.graph
        if trace.programs:
            self.module.meta["programs"] = trace.programs  # loops and choices: the graph itself holds only their numbers
        self.captured: list[torch.Tensor] = trace.captured
        self.inputs = [_abstract(value) for value in trace.examples[: len(trace.examples) - len(trace.captured)]]
        results: Any = self.module.graph.output_node().args[0]
        self.outputs = [_abstract(result.meta["val"]) for result in results[: trace.outputs]]
        shown = of_trace(trace)
        self.operations: list[str] = shown.operations
        self._text = str(shown)

    def __repr__(self) -> str:
        return self._text


class _GraphMaker(Wrapper):
    """What :func:`~torchbatch.make_graph` returns."""

    def __init__(self, fun: Callable[..., Any], static_argnums: Any, return_shape: bool) -> None:
        if not callable(fun):
            raise AxisSpecError(f"make_graph shows a function, but it got {fun!r} of type {type(fun).__name__}.")
        if not isinstance(return_shape, bool):
            raise AxisSpecError(
                f"make_graph: return_shape must be True or False, but it is {return_shape!r} of type "
                f"{type(return_shape).__name__}."
            )
        super().__init__(fun, static_argnums, return_shape)
        with _as_make_graph(fun):
            self._static = StaticArguments(fun, static_argnums, None)
        self._return_shape = return_shape

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        with _as_make_graph(self.__wrapped__), torch.no_grad():
            call = bind_shapes(self.__wrapped__, self._static, args, kwargs, "make_graph", "make_graph(vmap(f))(…)")
            program = Program(call)
        graph = Graph(program)
        return (graph, program.structure.unflatten(graph.outputs)) if self._return_shape else graph


def _abstract(value: torch.Tensor) -> ShapeDtypeStruct:
    return ShapeDtypeStruct(value.shape, value.dtype, value.device)


@contextmanager
def _as_make_graph(fun: Callable[..., Any]) -> Iterator[None]:
    """Let messages speak of make_graph where they speak of jit, with which it shares the trace."""
    try:
        yield
    except TorchbatchError as error:
        text = re.sub(r"^jit:|\bjit\(…|; jit takes", lambda found: found[0].replace("jit", "make_graph"), str(error))
        text = re.sub(r"static_argnames=('(\w+)'|…)", lambda found: f"static_argnums={_position(fun, found[2])}", text)
        raise type(error)(text.replace(" and static_argnames.", ".")) from error


def _position(fun: Callable[..., Any], name: str | None) -> str:
    """The position of an argument in the signature of a function."""
    try:
        names = list(inspect.signature(fun).parameters)
    except (ValueError, TypeError):
        names = []
    return str(names.index(name)) if name in names else "…"
