"""Run a function without keeping what its derivative needs, and run it again when the derivative is asked for.

PyTorch's own checkpoint works with hooks on saved tensors, which its transforms do not support. Here the first run
happens on detached tensors, one ``autograd.Function`` ties its outputs to its inputs, and the backward pass of that
Function runs the pullback of a second run. Tensors that the function closes over are inputs too: the first run notes
every tensor that an operation sees and that is neither an argument nor the result of another operation, and the second
run has the Function's own inputs in their place.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from torchbatch._torch import derivatives, draw_state, levels, wrappers
from torchbatch.core.argnums import alias, flatten, unflatten
from torchbatch.core.derivative import is_inexact, or_zeros
from torchbatch.errors import UnsupportedOperationError


def needs_gradient(value: torch.Tensor) -> bool:
    """Whether a transform or autograd records what is computed of a tensor."""
    while True:
        if value.requires_grad:
            return True
        if not levels.is_wrapped(value):
            return False
        value = levels.get_unwrapped(value)


class Surroundings:
    """The random state, how keys are counted, and the autocast settings at one moment, to be had again later."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self.devices = sorted({t.device.index or 0 for t in tensors if t.device.type == "cuda"})
        self.cpu_state, self.partitionable = torch.get_rng_state(), draw_state.partitionable()
        self.cuda_states = [torch.cuda.get_rng_state(device) for device in self.devices]
        kinds = ["cpu", *(["cuda"] if self.devices else [])]
        self.autocast = [(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)) for kind in kinds]

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        """Run with the same random numbers and the same autocast, then put everything back."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng(self.devices))
            stack.enter_context(draw_state.again(self.partitionable))
            for kind, dtype, enabled in self.autocast:
                stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled))
            torch.set_rng_state(self.cpu_state)
            for device, state in zip(self.devices, self.cuda_states, strict=True):
                torch.cuda.set_rng_state(state, device)
            yield


class _Running(threading.local):
    mode: Swap | None = None


_running = _Running()


def seen(tensors: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """These tensors as an operation gets them; to be called by what takes tensors and is no operation that a mode sees."""
    mode = _running.mode
    if mode is None:
        return list(tensors)
    with paused():
        found = [mode.replace(tensor) for tensor in tensors]
    mode.note(found)
    return found


def note(tensors: Sequence[torch.Tensor]) -> None:
    """Tell the modes of tensors that were made otherwise than by an operation that they see."""
    mode = _running.mode
    if mode is not None:
        mode.note(tensors)


@contextlib.contextmanager
def paused() -> Iterator[None]:
    """The modes leave everything as it is, and note nothing."""
    mode, _running.mode = _running.mode, None
    chain = list(_chain(mode))
    before = [each.paused for each in chain]
    for each in chain:
        each.paused = True
    try:
        yield
    finally:
        _running.mode = mode
        for each, was in zip(chain, before, strict=True):
            each.paused = was


@contextlib.contextmanager
def unnoted() -> Iterator[None]:
    """First runs look at nothing: what runs here has been looked at before, and what it reads was told by :func:`seen`."""
    chain = [mode for mode in _chain(_running.mode) if isinstance(mode, FirstRun) and not mode.paused]
    for mode in chain:
        mode.paused = True
    try:
        yield
    finally:
        for mode in chain:
            mode.paused = False


def _chain(mode: Swap | None) -> Iterator[Swap]:
    while mode is not None:
        yield mode
        mode = mode.outer


# What asks about a tensor, and makes nothing of it. Whether something requires a gradient is asked of wrapped tensors too.
_PROPERTIES = ("requires_grad", "is_leaf", "grad_fn", "shape", "dtype", "device", "layout", "ndim", "is_meta", "is_cuda")
_METHODS = ("dim", "size", "numel", "stride", "is_floating_point", "is_complex", "is_contiguous")
_QUESTIONS = frozenset(
    [getattr(torch.Tensor, name).__get__ for name in _PROPERTIES] + [getattr(torch.Tensor, name) for name in _METHODS]
)


class Swap(TorchFunctionMode):
    """Give every operation other tensors in the place of known ones."""

    def __init__(self) -> None:
        super().__init__()
        self.outer = _running.mode
        self.instead: dict[int, torch.Tensor] = {}
        self.level = levels.depth()
        self.paused = False

    def __enter__(self) -> Any:
        _running.mode = self
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *error: Any) -> None:
        _running.mode = self.outer
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.paused or func in _QUESTIONS:
            return func(*args, **(kwargs or {}))
        args, kwargs = self._swapped((args, kwargs or {}))
        result = func(*args, **kwargs)
        self.note(flatten(result)[0])
        return result

    def _swapped(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return self.replace(value)
        if isinstance(value, dict):
            return {key: self._swapped(item) for key, item in value.items()}
        if type(value) in (tuple, list):
            return type(value)([self._swapped(item) for item in value])
        return value

    def replace(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor that an operation gets for ``tensor``."""
        return self.instead.get(id(tensor), tensor)

    def note(self, results: Sequence[Any]) -> None:
        """Look at what an operation returned."""


class _Opaque(Swap):
    """Inside a function that has rules of its own, which may read nothing beside its arguments that is differentiated."""

    def __init__(self, arguments: Sequence[torch.Tensor], refused: Callable[[], Exception]) -> None:
        super().__init__()
        self._own = arguments
        self._refused = refused

    def replace(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor."""
        own = not (tensor.requires_grad and tensor.is_leaf) or levels.is_wrapped(tensor)
        if own or any(levels.share_memory(tensor, value) for value in self._own):
            return tensor
        raise self._refused()


@contextlib.contextmanager
def opaque(arguments: Sequence[torch.Tensor], refused: Callable[[], Exception]) -> Iterator[None]:
    """The modes do not look into what runs here. It may read ``arguments``; another tensor with a gradient is ``refused``."""
    if _running.mode is None:
        yield
        return
    with paused(), _Opaque(arguments, refused):
        yield


class FirstRun(Swap):
    """Detach what comes from outside, and note it."""

    def __init__(self, arguments: Sequence[torch.Tensor]) -> None:
        super().__init__()
        self.outside: list[torch.Tensor] = []
        self.stand_ins: list[torch.Tensor] = []
        self.names: dict[int, tuple[torch.Tensor, int]] = {}  # by id: a tensor the function reads, its place in outside
        self.known: weakref.WeakValueDictionary[int, torch.Tensor] = weakref.WeakValueDictionary()
        for tensor in arguments:
            self.admit(tensor, tensor)

    def admit(self, tensor: torch.Tensor, read: torch.Tensor) -> None:
        """Note a tensor from outside, which the function reads as ``read``, and make a detached stand-in for it."""
        self.instead[id(tensor)] = tensor  # until there is a better one: an outer run sees the next line as an operation
        inside = tensor.detach()
        self.names[id(tensor)] = tensor, len(self.outside)
        self.names[id(read)] = read, len(self.outside)
        self.outside.append(tensor)
        self.stand_ins.append(inside)
        self.instead[id(tensor)] = self.instead[id(inside)] = inside

    def replace(self, tensor: torch.Tensor) -> torch.Tensor:
        """The stand-in for a tensor from outside; else the tensor itself."""
        seen = tensor if self.outer is None else self.outer.replace(tensor)
        if id(seen) not in self.known:
            *_, base = wrappers.layers(seen, self.level)
            if id(base) not in self.instead and id(base) not in self.known:
                self.admit(base, tensor if base is seen else base)
            elif seen is not tensor and id(seen) in self.names:
                self.names[id(tensor)] = tensor, self.names[id(seen)][1]
        return self.instead.get(id(seen), seen)

    def note(self, results: Sequence[Any]) -> None:
        """Remember the results of operations, which are not from outside."""
        for leaf in results:
            if isinstance(leaf, torch.Tensor) and id(leaf) not in self.instead:
                self.known[id(leaf)] = leaf
        if self.outer is not None:
            self.outer.note(results)


class SecondRun(Swap):
    """Put other tensors in the place of those that the first run noted."""

    def __init__(self, names: dict[int, tuple[torch.Tensor, int]], instead: Sequence[torch.Tensor]) -> None:
        super().__init__()
        self.names = names
        self.instead = {name: instead[place] for name, (_, place) in names.items()}
        self.read: set[int] = set()  # of which tensors others were made
        self.new = {id(tensor) for tensor in instead}
        self._looked_at: set[int] = set()

    def replace(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor in the place of ``tensor``."""
        for layer in wrappers.layers(tensor, self.level):
            if id(layer) in self.new:
                return tensor
            if id(layer) in self.instead:
                if layer is tensor:
                    self._looked_at.add(self.names[id(layer)][1])
                    return self.instead[id(layer)]
                if needs_gradient(layer):
                    raise _unseen()
                return tensor
        return tensor if self.outer is None else self.outer.replace(tensor)

    def note(self, results: Sequence[Any]) -> None:
        """A tensor is read if something is made of it; to ask for its shape is not enough."""
        if any(isinstance(leaf, torch.Tensor) for leaf in results):
            self.read |= self._looked_at
        self._looked_at = set()
        if self.outer is not None:
            self.outer.note(results)


def _unseen() -> UnsupportedOperationError:
    return UnsupportedOperationError(
        "checkpoint: the function hands a tensor that it closes over straight to a transform such as vmap or grad, or to a "
        "collective such as psum. Make that tensor an argument of the checkpointed function."
    )


class Segment:
    """One call of a checkpointed function."""

    def __init__(self, fun: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.fun = fun
        self.leaves, self.structure = flatten((args, kwargs))
        self.positions = [i for i, leaf in enumerate(self.leaves) if isinstance(leaf, torch.Tensor)]

    def run(self) -> Any:
        """The output of the function, tied to everything that it depends on."""
        arguments = [self.leaves[i] for i in self.positions]
        self.surroundings = Surroundings(arguments)
        first = FirstRun(arguments)
        leaves, structure = self._call(first, first.stand_ins)
        self.names = first.names
        inexact = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor) and is_inexact(leaf)]
        values = [leaves[i] for i in inexact]
        tied = Tie.apply(self, len(values), *values, *first.outside) if values else ()  # type: ignore[no-untyped-call]
        if first.outer is not None:
            first.outer.note(tied)
        for i, value in zip(inexact, tied, strict=True):
            leaves[i] = value
        return structure.unflatten(leaves)

    def again(self, instead: Sequence[torch.Tensor], wanted: Sequence[int]) -> tuple[torch.Tensor, ...]:
        """The inexact outputs with other tensors in the place of those from outside; ``wanted`` must be read."""
        second = SecondRun(self.names, instead)
        with self.surroundings.again():
            leaves, _ = self._call(second, instead)
        if any(place >= len(self.positions) and place not in second.read for place in wanted):
            raise _unseen()
        return tuple([leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and is_inexact(leaf)])

    def _call(self, mode: Swap, tensors: Sequence[torch.Tensor]) -> tuple[list[Any], Any]:
        leaves = list(self.leaves)
        for i, tensor in zip(self.positions, tensors, strict=False):
            leaves[i] = tensor
        args, kwargs = unflatten(self.structure, leaves)
        with mode:
            return flatten(self.fun(*args, **kwargs))

    def pull(
        self, inputs: Sequence[torch.Tensor], wanted: Sequence[int], cotangents: Sequence[torch.Tensor | None]
    ) -> list[torch.Tensor | None]:
        """Cotangents of the ``wanted`` inputs, None for the others."""

        def flat(*values: torch.Tensor) -> tuple[derivatives.Tensors, derivatives.Tensors]:
            return self.again(_placed(inputs, wanted, values), wanted), ()

        outputs, _, pull = derivatives.vjp(flat, [inputs[i] for i in wanted])
        full = [or_zeros(c, o) for o, c in zip(outputs, cotangents, strict=True)]
        found: list[torch.Tensor | None] = [None] * len(inputs)
        for i, value in zip(wanted, pull(tuple(full)), strict=True):
            found[i] = value
        return found

    def push(
        self, inputs: Sequence[torch.Tensor], wanted: Sequence[int], tangents: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor, ...]:
        """Tangents of the outputs along tangents of the ``wanted`` inputs."""

        def flat(*values: torch.Tensor) -> tuple[derivatives.Tensors, derivatives.Tensors]:
            return self.again(_placed(inputs, wanted, values), wanted), ()

        with torch.inference_mode(False), torch.set_grad_enabled(torch.is_grad_enabled()):  # turns forward mode on
            inputs = [derivatives.primal(tensor) for tensor in inputs]
            return derivatives.jvp(flat, [inputs[i] for i in wanted], tangents)[1]


def _placed(inputs: Sequence[torch.Tensor], wanted: Sequence[int], values: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    found = [alias(tensor) for tensor in inputs]
    for i, value in zip(wanted, values, strict=True):
        found[i] = value
    return found


class Tie(torch.autograd.Function):
    """From values computed beforehand, and the tensors they depend on, to outputs with derivatives by recomputation."""

    generate_vmap_rule = True

    @staticmethod
    def forward(segment: Segment, count: int, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The values."""
        return tuple([value.view_as(value) for value in tensors[:count]])

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Keep the inputs, and not the values."""
        ctx.set_materialize_grads(False)
        ctx.segment, ctx.count, *tensors = inputs
        ctx.save_for_backward(*tensors[ctx.count :])
        ctx.save_for_forward(*tensors[ctx.count :])

    @staticmethod
    def backward(ctx: Any, *cotangents: torch.Tensor | None) -> Any:
        """The pullback of a second run."""
        start = 2 + ctx.count
        if any(ctx.needs_input_grad[:start]):
            raise _unseen()
        wanted = [i for i, needed in enumerate(ctx.needs_input_grad[start:]) if needed]
        inputs = [wrappers.alive(tensor) for tensor in ctx.saved_tensors]
        return (*[None] * start, *ctx.segment.pull(inputs, wanted, cotangents))

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        """The pushforward of a second run."""
        if any(tangent is not None for tangent in tangents[: 2 + ctx.count]):
            raise _unseen()
        given = tangents[2 + ctx.count :]
        wanted = [i for i, tangent in enumerate(given) if tangent is not None]
        inputs = [wrappers.alive(tensor) for tensor in ctx.saved_tensors]
        return ctx.segment.push(inputs, wanted, [given[i] for i in wanted])
