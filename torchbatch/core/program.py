"""A function traced for one kind of call: a graph, and the trees around it."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch

from torchbatch._torch import explain, graphs
from torchbatch._torch.graphs import Trace
from torchbatch._torch.methods import Methods
from torchbatch.core import tree
from torchbatch.core.argnums import flatten
from torchbatch.core.describe import function_name, shown
from torchbatch.core.frames import in_scope
from torchbatch.core.indexing import IntegerIndices
from torchbatch.core.signature import Call
from torchbatch.core.training import RanModules
from torchbatch.core.weak import WeakNumbers, strong
from torchbatch.errors import OutputTypeError, TorchbatchError

# PyTorch's tracer and compiler keep state of the process, so one thread traces or compiles at a time. A function that is
# traced may trace another one, in the same thread.
one_at_a_time = threading.RLock()


class Program:
    """What one trace of a function gave.

    Attributes:
        trace: the graph and what goes into it.
        structure: that of the output.
        modules: those that ran, or that the function refers to, as they were.
    """

    def __init__(self, call: Call, open_axes: Sequence[Sequence[int]] | None = None) -> None:
        self.call = call
        self.structure: tree.TreeDef
        with one_at_a_time, RanModules((call.fun, *(value for _, _, value in call.statics))) as ran:
            self.trace = self._traced(open_axes)
        self.modules = ran.found()
        self.single = self.trace.outputs == 1 and self.structure == tree.LEAF

    def _traced(self, open_axes: Sequence[Sequence[int]] | None) -> Trace:
        gradients = torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
        try:
            return graphs.trace(self._flat, self.call.values, gradients=gradients, open_axes=open_axes)
        except Exception as error:
            if isinstance(error, TorchbatchError):
                raise
            clearer = explain.explain_trace(error, function_name(self.call.fun))
            if clearer is None:
                raise
            raise clearer from error

    def _flat(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        numbers = [inputs[i] for i in self.call.numbers]
        args, kwargs = self.call.arguments(inputs)
        modes = [IntegerIndices(), *([WeakNumbers(numbers)] if numbers else [])]
        with ExitStack() as stack:
            for mode in (*modes, Methods(modes)):
                stack.enter_context(mode)
            leaves, self.structure = flatten(self.call.fun(*args, **kwargs))
            return [self._tensor(strong(leaf), i) for i, leaf in enumerate(leaves)]

    def _tensor(self, leaf: Any, index: int) -> torch.Tensor:
        if isinstance(leaf, torch.Tensor):
            return leaf
        if isinstance(leaf, torch.SymInt):  # a size that was left open
            return torch.scalar_tensor(leaf, dtype=torch.int64)  # type: ignore[arg-type]
        if isinstance(leaf, bool | int | float | complex):
            return self._constant(leaf, index)
        if isinstance(leaf, np.ndarray | np.generic) and leaf.dtype.kind in "biufc":
            return torch.tensor(leaf)
        raise self._bad_output(leaf, index, "every output must be an array or a number")

    def _constant(self, number: bool | int | float | complex, index: int) -> torch.Tensor:
        try:
            return torch.tensor(number)
        except (OverflowError, RuntimeError, ValueError):
            raise self._bad_output(number, index, "it does not fit into an int64") from None

    def _bad_output(self, leaf: Any, index: int, rule: str) -> OutputTypeError:
        name = tree.paths(self.structure.unflatten(range(self.structure.num_leaves)), "output")[index]
        return OutputTypeError(f"jit: {name} of {function_name(self.call.fun)} is {shown(leaf)}, but {rule}.")


class _Recording(list[Any]):
    """The stack of mapped axes, which remembers the sizes that were ever on it."""

    def __init__(self, frames: Iterable[Any]) -> None:
        super().__init__(frames)
        self.sizes: set[int] = set()

    def append(self, frame: Any) -> None:
        self.sizes.add(int(frame[1]))
        super().append(frame)


def mapped_sizes(call: Call) -> set[int]:
    """The sizes over which a function maps, found by tracing it once."""
    before = in_scope.stack
    recording = _Recording(before)
    in_scope.stack = recording
    try:
        Program(call)
    finally:
        in_scope.stack = before
    return recording.sizes
