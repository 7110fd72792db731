"""The stages of a compilation: ``jit(f).lower(*args)`` traces, ``.compile()`` compiles, and each can be looked at."""

from __future__ import annotations

from torch.fx import GraphModule

from torchbatch.core.executable import Backend
from torchbatch.core.program import Program


class Lowered:
    """A function that was traced for one kind of call, and not compiled yet.

    Source: ``jax.stages.Lowered``.
    """

    def __init__(self, program: Program, backend: Backend) -> None:
        self._program, self._backend = program, backend

    @property
    def graph(self) -> GraphModule:
        """The operations, as a ``torch.fx.GraphModule``."""
        return self._program.trace.graph
