"""What a function closes over, as inputs of it: found by running it once, and put in its place when it runs again."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from torchbatch._torch import across, levels, modes, staged, wrappers
from torchbatch.core import recompute
from torchbatch.core.closures import tensors_in, with_tensors
from torchbatch.core.frames import in_scope
from torchbatch.core.reach import modules_of
from torchbatch.core.recompute import needs_gradient
from torchbatch.errors import UnsupportedOperationError

Tensors = list[torch.Tensor]


class Outside:
    """The tensors that a function reads beside its arguments, as far as gradients may need them.

    Args:
        run: calls the function with tensors in the place of ``arguments``; it is called once, and not recorded.
        function: the function.
    """

    def __init__(self, run: Callable[[Tensors], Any], arguments: Sequence[torch.Tensor], function: Any) -> None:
        with staged.unrecorded() as was_made, recompute.paused():
            arguments = [value.clone() for value in arguments]  # not the same objects as what is closed over
            first = recompute.FirstRun(arguments)
            with first:
                self.output = run(first.stand_ins[: len(arguments)])
        self._modules = _ModulesThen(function)
        count = len(arguments)
        places = [i for i, value in enumerate(first.outside) if i >= count and _matters(value) and not was_made(value)]
        self.tensors = recompute.seen(first.outside[i] for i in places)
        index = {place: i for i, place in enumerate(places)}
        self._names = {name: (value, index[place]) for name, (value, place) in first.names.items() if place in index}
        for value in tensors_in(function):
            if id(value) not in self._names and _matters(value):
                self._names[id(value)] = value, len(self.tensors)
                self.tensors += recompute.seen([value])

    def replaced(self, instead: Sequence[torch.Tensor]) -> contextlib.AbstractContextManager[Any]:
        """In this context the function reads other tensors in the place of ``tensors``."""
        context = contextlib.ExitStack()
        context.enter_context(self._modules.again())
        if self._names:
            context.enter_context(_Put(self._names, instead))
        return context

    def closed_over(self, function: Any, instead: Sequence[torch.Tensor]) -> Any:
        """The function with other tensors in the place of those that it closes over."""
        return with_tensors(function, {name: instead[place] for name, (_, place) in self._names.items()})


class _ModulesThen:
    """The parameters and buffers that the modules of a function had at one moment, to be had again.

    ``torch.func.functional_call`` lends a module other ones, and takes them back before a derivative runs the function again.
    """

    def __init__(self, function: Any) -> None:
        modules = {id(part): part for module in modules_of([function]) for part in module.modules()}
        self._held: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self._held += [(held, dict(held)) for part in modules.values() for held in (part._parameters, part._buffers)]

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        """In this context the modules have them."""
        lent = [(held, dict(held), then) for held, then in self._held if not _same(held, then)]
        for held, _, then in lent:
            held.update(then)
        try:
            yield
        finally:
            for held, before, _ in lent:
                held.update(before)


def _same(held: dict[str, Any], then: dict[str, Any]) -> bool:
    return all(held.get(name) is value for name, value in then.items())


def _matters(value: torch.Tensor) -> bool:
    return levels.is_wrapped(value) or needs_gradient(value)


class _Put(recompute.Swap):
    """Puts other tensors in the place of known ones."""

    def __init__(self, names: dict[int, tuple[torch.Tensor, int]], instead: Sequence[torch.Tensor]) -> None:
        super().__init__()
        self.instead = {name: instead[place] for name, (_, place) in names.items()}
        self._new = {id(value) for value in instead}

    def replace(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor in the place of ``tensor``."""
        for layer in wrappers.layers(tensor, self.level):
            if id(layer) in self._new:
                return tensor
            if id(layer) in self.instead:
                if layer is tensor:
                    return self.instead[id(layer)]
                raise UnsupportedOperationError(
                    "jit: the body of a loop, or a branch, hands a tensor that it closes over straight to a transform such as "
                    "vmap or grad, and is differentiated in reverse mode. Make that tensor a part of the carry, of xs or of the "
                    "operands."
                )
        return tensor if self.outer is None else self.outer.replace(tensor)


class Surroundings:
    """The mapped axes and the modes at one moment, to be had again where PyTorch has set them aside.

    A function that is differentiated runs below the transforms that are open, and PyTorch opens new levels for the samples. A
    token for each level, which is an input of the function, tells which one has taken its place.
    """

    def __init__(self) -> None:
        maps = list(levels.open_maps())
        self._levels = [level for level, _, _ in maps]
        self._frames = list(in_scope.stack)
        self._modes = modes.Remembered(leaving_out=recompute.Swap)
        self.tokens = [across.number(level, size, None) for level, size, _ in maps]
        recompute.note(self.tokens)

    @contextlib.contextmanager
    def again(self, tokens: Sequence[torch.Tensor]) -> Iterator[None]:
        """The mapped axes have the levels of these tokens, and the modes are active."""
        now = {}
        for level, token in zip(self._levels, tokens, strict=True):
            found = next(levels.batch_levels(token), None)
            if found is None:
                raise UnsupportedOperationError("jit: a loop is differentiated in a transform that hides the samples from it.")
            now[level] = found
        before = in_scope.stack
        in_scope.stack = [(name, size, now.get(level, level), values) for name, size, level, values in self._frames]
        try:
            with self._modes.again():
                yield
        finally:
            in_scope.stack = before
