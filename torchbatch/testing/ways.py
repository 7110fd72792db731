"""The ways in which a mapped function can be run: the loop, and everything that must give the same."""

from __future__ import annotations

import dataclasses
import itertools
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch

import torchbatch as tb
from torchbatch import tree
from torchbatch.testing.loop import loop
from torchbatch.testing.outcomes import attempt, line
from torchbatch.testing.variants import Call

#: What ``backends`` may hold. ``"traced"`` is what ``jit`` records, replayed without a compiler.
BACKENDS = ("eager", "chunked", "traced", "jit", "nested", "compile")
Flat = Callable[[Sequence[torch.Tensor]], Any]
_NUMBERS = itertools.count()


@dataclasses.dataclass(frozen=True)
class Way:
    """A way to run a call.

    Attributes:
        name: as in a line of the report.
        make: from a call to a function of its tensors.
        kind: the backend that it belongs to, ``"loop"`` or ``"batched"``.
        numbers: whether it returns arrays where the function returns Python numbers.
        written: the batched version, if somebody wrote it.
    """

    name: str
    make: Callable[[Call], Flat]
    kind: str
    numbers: bool = False
    written: Callable[..., Any] | None = None

    @property
    def traced(self) -> bool:
        """Whether it runs a recording, whose making takes time."""
        return self.kind in ("traced", "jit", "compile")

    @property
    def compiled(self) -> bool:
        """Whether it needs a compiler."""
        return self.kind in ("jit", "compile")


def _mapped(transform: Callable[..., Any], **more: Any) -> Callable[[Call], Flat]:
    def make(call: Call) -> Flat:
        return _of_tensors(call, transform(call.fun, call.in_axes, call.out_axes, **call.options, **more))

    return make


def _of_tensors(call: Call, run: Callable[..., Any]) -> Flat:
    def flat(tensors: Sequence[torch.Tensor]) -> Any:
        args, kwargs = call.rebuilt(tensors)
        return run(*args, **kwargs)

    return flat


def _jitted(backend: str) -> Callable[[Call], Flat]:
    """Under ``jit``; what is not a tensor is a constant."""

    def make(call: Call) -> Flat:
        flat = EAGER.make(call)
        run = tb.jit(lambda *tensors: flat(tensors), backend=backend)
        return lambda tensors: run(*tensors)

    return make


def _compiled(call: Call) -> Flat:
    """Under ``torch.compile``, which remembers by its place and name which shapes a piece of code has seen: this one is new.

    It would otherwise leave the sizes open from the second check on, and give up after the eighth.
    """
    mapped = tb.vmap(call.fun, call.in_axes, call.out_axes, **call.options)

    def run(*args: Any, **kwargs: Any) -> Any:
        return mapped(*args, **kwargs)

    code = run.__code__.replace(co_name=f"mapped_{next(_NUMBERS)}")
    fresh = types.FunctionType(code, run.__globals__, code.co_name, None, run.__closure__)
    return _of_tensors(call, torch.compile(fresh))


def _nested(call: Call) -> Flat:
    """As the inner of two maps, the samples of whose first batch are in reverse order; the second is what is asked for."""
    inner = EAGER.make(call)
    axes = [None if axis is None else 0 for axis in call.tensor_axes]
    outer = tb.vmap(lambda *tensors: inner(tensors), in_axes=tuple(axes), axis_size=2, randomness=call.randomness)

    def flat(tensors: Sequence[torch.Tensor]) -> Any:
        rows = zip(tensors, call.tensor_axes, strict=True)
        pairs = [tensor if axis is None else torch.stack([tensor.flip(axis), tensor]) for tensor, axis in rows]
        return tree.map(lambda leaf: leaf[1], outer(*pairs))

    return flat


LOOP = Way("loop", _mapped(loop), "loop")
EAGER = Way("eager", _mapped(tb.vmap), "eager")


def hand_written(batched: Callable[..., Any]) -> Way:
    """A batched version that somebody wrote."""
    return Way("batched", lambda call: _of_tensors(call, batched), "batched", written=batched)


def ways(backends: Sequence[str], size: int) -> list[Way]:
    """The ways to run a call of so many samples, in order."""
    return [way for name in backends for way in _ways(name, size)]


def _ways(name: str, size: int) -> list[Way]:
    if name == "chunked":
        return [Way(f"chunked by {count}", _mapped(tb.vmap, chunk_size=count), "chunked") for count in chunk_sizes(size)]
    if name == "eager":
        return [EAGER]
    make = {"traced": _jitted("eager"), "jit": _jitted("inductor"), "nested": _nested, "compile": _compiled}[name]
    return [Way(name, make, name, numbers=True)]


def chunk_sizes(size: int) -> list[int]:
    """One sample at a time, and the smallest number above that with a rest."""
    with_rest = next((count for count in range(2, size) if size % count), None)
    return [count for count in (1, with_rest) if count is not None and count < size]


def lacking(way: Way) -> str:
    """What this machine lacks for a compiled way, as the compiler says it; empty if the compiler works."""
    error = attempt(lambda: (tb.jit(_probe) if way.kind == "jit" else torch.compile(_probe))(torch.ones(3))).error
    return "" if error is None else line(error)


def _probe(x: torch.Tensor) -> torch.Tensor:
    return x.sin() + 1
