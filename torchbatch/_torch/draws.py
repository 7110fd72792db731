"""Random draws inside ``vmap(..., chunk_size=…)``, which must be those of the unchunked call.

A chunk of an ``"different"`` map begins with the generator state of the whole call. Each operator that draws draws for all
samples of the whole call, and the chunk takes the rows that are its own. That is possible where the number of random
numbers consumed depends on shapes only; the others are refused.

Private names used, seen on torch 2.11, 2.13 and 2.15:
``torch._functorch.pyfunctorch.temporarily_clear_interpreter_stack``, ``torch.Generator._cdata``, and those of
:mod:`torchbatch._torch.levels`.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch._functorch import pyfunctorch

from torchbatch._torch import levels, overlay, seeding
from torchbatch.errors import RandomnessError


class GeneratorState:
    """The state of the default generators: the CPU's, and those of the CUDA devices of ``values``."""

    def __init__(self, values: Sequence[torch.Tensor]) -> None:
        self._devices = {value.device for value in values if value.device.type == "cuda"}
        self._states = self._now()

    def _now(self) -> list[torch.Tensor]:
        return [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in self._devices)]

    def restore(self) -> None:
        """Set the generators back to the state that was saved."""
        torch.set_rng_state(self._states[0])
        for device, state in zip(self._devices, self._states[1:], strict=True):
            torch.cuda.set_rng_state(state, device)
        seeding.set_back()

    def save(self) -> None:
        """Save the state that the generators have now instead."""
        self._states = self._now()

    def is_current(self) -> bool:
        """Whether nothing was drawn since the state was saved."""
        return all(torch.equal(saved, now) for saved, now in zip(self._states, self._now(), strict=True))


class _Parts(threading.local):
    """The chunks that run in this thread: ``(start, total)`` by batch level, and the generators after the last draw."""

    def __init__(self) -> None:
        self.by_level: dict[int, tuple[int, int]] = {}
        self.chunked = 0
        self.state: GeneratorState | None = None


_parts = _Parts()


_OWN_GENERATOR = (
    "A generator of your own (generator=) cannot draw in chunks what it would draw at once: only PyTorch's default generators "
    "are set back for each chunk. Map without chunk_size, or leave generator= out."
)


def _is_own_generator(value: Any) -> bool:
    defaults: list[Any] = [torch.default_generator, *torch.cuda.default_generators]
    if not isinstance(value, torch.Generator):
        return False
    own: Any = value
    return not any(own._cdata == default._cdata for default in defaults)


@contextlib.contextmanager
def in_chunks() -> Iterator[None]:
    """Inside, a map runs chunk by chunk."""
    _parts.chunked += 1
    try:
        yield
    finally:
        _parts.chunked -= 1


@contextlib.contextmanager
def part_of(start: int, total: int, values: Sequence[torch.Tensor]) -> Iterator[None]:
    """The batch level opened next holds the samples from ``start`` on, of ``total``.

    Raises:
        RandomnessError: something drew by another way than the operators of this file, and so not for all samples.
    """
    level = levels.depth() + 1
    outer = _parts.state
    _parts.by_level[level], _parts.state = (start, total), GeneratorState(values)
    try:
        yield
        _check_state("An operation inside the mapped function")
    finally:
        del _parts.by_level[level]
        _parts.state = outer
        if outer is not None:
            outer.save()


def _check_state(what: str) -> None:
    if _parts.state is not None and not _parts.state.is_current():
        raise _refused(what)


class _Map(NamedTuple):
    """One open ``vmap`` that draws for each sample anew: this chunk holds ``size`` of ``total`` samples, from ``start`` on."""

    level: int
    size: int
    start: int
    total: int


def _open_maps() -> list[_Map]:
    return [
        _Map(level, size, *_parts.by_level.get(level, (0, size)))
        for level, size, randomness in levels.open_maps()
        if randomness == "different"
    ]


def _draw(maps: list[_Map], whole: Callable[[list[int]], torch.Tensor]) -> torch.Tensor:
    """This chunk's rows of ``whole(sizes)``, a draw for all samples with the axes of ``maps`` in front."""
    _check_state("An operation before this line")
    with pyfunctorch.temporarily_clear_interpreter_stack():
        drawn = overlay.call(whole, ([m.total for m in maps],), {})
        for axis, m in enumerate(maps):
            drawn = drawn.narrow(axis, m.start, m.size)
    if _parts.state is not None:
        _parts.state.save()
    for m in maps:
        drawn = levels.add_batch_dim(drawn, 0, m.level)
    return drawn


def _mapped(sizes: list[int], draw: Callable[..., torch.Tensor], *physical: torch.Tensor) -> torch.Tensor:
    """``draw(*physical)`` under one "different" map per size, outermost first, whose axes are in front in and out."""
    if not sizes:
        return draw(*physical)
    level = levels.enter_level(sizes[0], "different")
    try:
        inside = [levels.add_batch_dim(tensor, 0, level) for tensor in physical]
        return levels.remove_batch_dim(_mapped(sizes[1:], draw, *inside), level, sizes[0], 0)
    finally:
        levels.leave_level()


def _factory(operator: overlay.Operator) -> overlay.Operator:
    """``rand(2)``, ``rand_like(x)``: the shape is all that counts."""

    def draw(args: Any, kwargs: Any) -> torch.Tensor:
        plain = [torch.empty(a.shape, dtype=a.dtype, device=a.device) if isinstance(a, torch.Tensor) else a for a in args]
        return _draw(_open_maps(), lambda sizes: _mapped(sizes, lambda: operator(*plain, **kwargs)))

    return _in_chunks(operator, draw, by_layout=True)


def _in_place(operator: overlay.Operator) -> overlay.Operator:
    """``x.uniform_()``: drawn in a new tensor, and copied."""

    def draw(args: Any, kwargs: Any) -> torch.Tensor:
        tensor, *rest = args

        def whole(sizes: list[int]) -> torch.Tensor:
            return operator(torch.empty([*sizes, *tensor.shape], dtype=tensor.dtype, device=tensor.device), *rest, **kwargs)

        return tensor.copy_(_draw(_open_maps(), whole))

    return _in_chunks(operator, draw, by_layout=True)


def _dropout(operator: overlay.Operator) -> overlay.Operator:
    """``dropout(x, p, train)``: the noise is what becomes of ones, and multiplies ``x``."""

    def draw(args: Any, kwargs: Any) -> torch.Tensor:
        tensor, *rest = args

        def whole(sizes: list[int]) -> torch.Tensor:
            ones = torch.ones([*sizes, *tensor.shape], dtype=tensor.dtype, device=tensor.device)
            return _mapped(sizes, lambda x: operator(x, *rest, **kwargs), ones)

        noise = _draw(_open_maps(), whole)
        return tensor.mul_(noise) if operator.__name__.endswith("_") else tensor * noise

    return _in_chunks(operator, draw)


def _of_values(operator: overlay.Operator) -> overlay.Operator:
    """``bernoulli(p)``, ``normal(mean, std)``: one number for each element, whatever the values are."""

    def draw(args: Any, kwargs: Any) -> torch.Tensor:
        maps = _open_maps()
        given = [_physical(a) if isinstance(a, torch.Tensor) else a for a in args]
        ranks = [a.dim() for a in args if isinstance(a, torch.Tensor)]

        def whole(_: list[int]) -> torch.Tensor:
            return operator(*[_pad(g, maps, max(ranks), operator) if isinstance(g, tuple) else g for g in given], **kwargs)

        return _draw(maps, whole)

    return _in_chunks(operator, draw)


def _physical(tensor: torch.Tensor) -> tuple[torch.Tensor, list[int]]:
    """The plain tensor inside, and the levels of the axes that it has in front."""
    if not levels.is_wrapped(tensor):
        return tensor.detach(), []
    if not levels.is_batchedtensor(tensor):
        return _physical(levels.get_unwrapped(tensor))
    level = levels.maybe_get_level(tensor)
    value, at = levels.unwrap_batched(tensor, level)
    plain, outer = _physical(value)
    with pyfunctorch.temporarily_clear_interpreter_stack():
        return plain.movedim(len(outer) + at, len(outer)), [*outer, level]


def _pad(given: tuple[torch.Tensor, list[int]], maps: list[_Map], rank: int, operator: overlay.Operator) -> torch.Tensor:
    """A plain tensor with all axes of ``maps`` in front, at full size: rows of other chunks repeat one of this chunk."""
    plain, has = given
    if not set(has) <= {m.level for m in maps}:
        raise _refused(operator.__name__)
    for axis, m in enumerate(maps):
        if m.level not in has:
            plain = plain.unsqueeze(axis).expand(*plain.shape[:axis], m.size, *plain.shape[axis:])
        rows = (torch.arange(m.total, device=plain.device) - m.start).clamp(0, m.size - 1)
        plain = plain.index_select(axis, rows)
    missing = rank + len(maps) - plain.dim()
    return plain.reshape(*plain.shape[: len(maps)], *[1] * missing, *plain.shape[len(maps) :])


def _refuse(operator: overlay.Operator) -> overlay.Operator:
    def draw(args: Any, kwargs: Any) -> torch.Tensor:
        raise _refused(operator.__name__)

    return _in_chunks(operator, draw)


def _refused(what: str) -> RandomnessError:
    return RandomnessError(
        f"{what} cannot draw in chunks what it would draw at once: how many random numbers it takes, or in which order, is not "
        'known from shapes alone. Map without chunk_size, or with randomness="same".'
    )


def _in_chunks(
    operator: overlay.Operator, draw: Callable[[Any, Any], torch.Tensor], by_layout: bool = False
) -> overlay.Operator:
    """``draw`` in a chunk; with ``by_layout`` also where PyTorch would draw in the order in which a tensor lies in memory."""

    def kernel(*args: Any, **kwargs: Any) -> Any:
        if _parts.chunked and any(_is_own_generator(value) for value in (*args, *kwargs.values())):
            raise RandomnessError(_OWN_GENERATOR)
        if _parts.by_level or (by_layout and not _lies_in_order(args) and _open_maps()):
            return draw(args, kwargs)
        return operator(*args, **kwargs)

    kernel.__name__ = operator.__name__
    return kernel


def _lies_in_order(args: Any) -> bool:
    """Whether the first argument, if it is a tensor, lies in memory sample by sample, row by row."""
    value = args[0] if args else None
    if not isinstance(value, torch.Tensor):
        return True
    while levels.is_wrapped(value):
        if levels.is_batchedtensor(value) and levels.unwrap_batched(value, levels.maybe_get_level(value))[1] != 0:
            return False
        value = levels.get_unwrapped(value)
    return value.is_contiguous()


_KERNELS = {
    _factory: (
        "rand rand.generator rand_like randint randint.generator randint.low randint.low_generator randint_like "
        "randint_like.low_dtype randn randn.generator randn_like randperm randperm.generator normal.float_float"
    ),
    _in_place: "bernoulli_.float cauchy_ exponential_ geometric_ log_normal_ normal_ random_ random_.from random_.to uniform_",
    _dropout: "dropout dropout_ feature_dropout feature_dropout_",
    _of_values: "bernoulli bernoulli.p normal.Tensor_Tensor normal.Tensor_float normal.float_Tensor",
    _refuse: (
        "alpha_dropout alpha_dropout_ bernoulli_.Tensor binomial feature_alpha_dropout feature_alpha_dropout_ "
        "multinomial poisson rrelu rrelu_ rrelu_with_noise rrelu_with_noise_ _standard_gamma "
        "_sample_dirichlet fractional_max_pool2d fractional_max_pool3d"
    ),
}
REGISTERED = [name for make, names in _KERNELS.items() for name in names.split() if overlay.register_factory(name, make)]
