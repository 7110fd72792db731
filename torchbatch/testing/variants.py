"""The inputs on which a mapped function is checked: as given, and changed in ways that must not matter."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

import torchbatch as tb
from torchbatch import tree
from torchbatch.errors import AxisError

Axis = int | None
_WIDE = {True: torch.complex128, False: torch.float64}


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of a mapped function: ``vmap(fun, in_axes, out_axes, **options)(*args, **kwargs)``.

    Attributes:
        fun: the function of one sample.
        args, kwargs: the arguments, with the batch in them.
        in_axes: an axis, or a tuple of one tree for each of ``args``.
        out_axes: as in ``vmap``.
        axis_name, axis_size, randomness: as in ``vmap``.
    """

    fun: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    in_axes: Any = 0
    out_axes: Any = 0
    axis_name: Hashable = None
    axis_size: int | None = None
    randomness: str = "error"

    @property
    def options(self) -> dict[str, Any]:
        """What ``vmap`` takes besides the function and the axes."""
        return {"axis_name": self.axis_name, "axis_size": self.axis_size, "randomness": self.randomness}

    @functools.cached_property
    def leaves(self) -> list[Any]:
        """Every leaf of the arguments."""
        return tree.leaves((self.args, self.kwargs))

    @functools.cached_property
    def axes(self) -> list[Axis]:
        """The mapped axis of each leaf, or None."""
        in_axes = tuple(self.in_axes) if isinstance(self.in_axes, list) else self.in_axes
        per_argument = in_axes if isinstance(in_axes, tuple) else (in_axes,) * len(self.args)
        return [*spread(tuple(per_argument), self.args), *spread(0, self.kwargs)]

    @functools.cached_property
    def places(self) -> list[int]:
        """Which leaves are tensors."""
        return [i for i, leaf in enumerate(self.leaves) if isinstance(leaf, torch.Tensor)]

    @property
    def tensors(self) -> list[torch.Tensor]:
        """The leaves that are tensors."""
        return [self.leaves[i] for i in self.places]

    @property
    def tensor_axes(self) -> list[Axis]:
        """The mapped axis of each tensor, or None."""
        return [self.axes[i] for i in self.places]

    @functools.cached_property
    def names(self) -> list[str]:
        """What to call each tensor, such as ``params['w'][0]``."""
        roots = [*_positional_names(self.fun, len(self.args)), *sorted(self.kwargs)]
        values = [*self.args, *(self.kwargs[name] for name in sorted(self.kwargs))]
        names = [root + tree.keystr(path) for root, value in zip(roots, values, strict=True) for path in _paths(value)]
        return [names[i] for i in self.places]

    @functools.cached_property
    def size(self) -> int:
        """The number of samples."""
        sizes = {leaf.shape[axis] for leaf, axis in zip(self.tensors, self.tensor_axes, strict=True) if axis is not None}
        return self.axis_size if self.axis_size is not None else next(iter(sizes))

    def rebuilt(self, tensors: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with other tensors in them."""
        leaves = list(self.leaves)
        for place, tensor in zip(self.places, tensors, strict=True):
            leaves[place] = tensor
        args, kwargs = tree.unflatten(tree.structure((self.args, self.kwargs)), leaves)
        return args, kwargs

    def having(self, tensors: Sequence[torch.Tensor], **changes: Any) -> Call:
        """The same call with other tensors."""
        args, kwargs = self.rebuilt(tensors)
        return dataclasses.replace(self, args=args, kwargs=kwargs, **changes)

    def widened(self, nudge: float = 0.0) -> Call:
        """The call in float64, every number moved by a part of its last place, up or down as ``nudge`` is positive or not."""
        return self.having([_moved_a_little(tensor, nudge, 0, _WIDE[tensor.is_complex()]) for tensor in self.tensors])

    def nudged(self, nudge: float, seed: int) -> Call:
        """The call with some numbers moved by a last place, up or down as ``nudge`` is positive or not."""
        return self.having([_moved_a_little(tensor, nudge, seed, tensor.dtype) for tensor in self.tensors])

    def described(self) -> list[str]:
        """One line for each tensor: its name, dtype, shape and mapped axis."""
        rows = zip(self.names, self.tensors, self.tensor_axes, strict=True)
        return [f"{name}: {_described(tensor)}, {'shared' if axis is None else f'axis {axis}'}" for name, tensor, axis in rows]


def call_of(fun: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], **options: Any) -> Call:
    """A call whose axes fit; what is mapped is made a tensor.

    Raises:
        AxisSpecError, AxisError, InputTypeError: those of ``vmap``, where they do not fit.
    """
    call = Call(fun, args, kwargs, **options)
    try:
        leaves = [_as_tensor(leaf, axis) for leaf, axis in zip(call.leaves, call.axes, strict=True)]
        args, kwargs = tree.unflatten(tree.structure((args, kwargs)), leaves)
        call = Call(fun, args, kwargs, **options)
        sizes = {leaf.shape[axis] for leaf, axis in zip(call.tensors, call.tensor_axes, strict=True) if axis is not None}
        unmapped = any(axis is not None and not _may_be_mapped(leaf) for leaf, axis in zip(call.leaves, call.axes, strict=True))
        fits = len({*sizes, *([] if call.axis_size is None else [call.axis_size])}) == 1 and not unmapped
    except (ValueError, TypeError, IndexError):
        fits = False
    if not fits:
        tb.vmap(fun, call.in_axes, call.out_axes, **call.options)(*args, **kwargs)
        raise AxisError(f"check_vmap: the axes do not fit the arguments: in_axes={call.in_axes!r}.")
    return call


def spread(axes: Any, value: Any) -> list[Axis]:
    """The axis of each leaf, from an axis tree that is a prefix."""
    given, structure = tree.flatten(axes, is_leaf=lambda node: node is None)
    parts = structure.flatten_up_to(value)
    return [axis for axis, part in zip(given, parts, strict=True) for _ in tree.leaves(part)]


def copied(tensor: torch.Tensor) -> torch.Tensor:
    """A copy that nobody else writes into, with the same strides where memory allows it."""
    plain = tensor.detach()
    if plain.layout is not torch.strided or plain.is_quantized:
        return plain.clone()
    base = plain[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in plain.stride())]
    reach = 1 + sum((size - 1) * stride for size, stride in zip(base.shape, base.stride(), strict=True))
    if base.numel() == 0 or reach < base.numel():
        return plain.clone()
    new = torch.empty_strided(base.shape, base.stride(), dtype=plain.dtype, device=plain.device)
    return new.copy_(base).expand(plain.shape)


def is_inexact(value: Any) -> bool:
    """Whether it is a tensor that can be differentiated."""
    return isinstance(value, torch.Tensor) and (value.is_floating_point() or value.is_complex())


def random_like(tensor: torch.Tensor, seed: int) -> torch.Tensor:
    """Normal numbers of its shape and dtype, the same for the same seed; none are drawn from PyTorch's generators."""
    generator = np.random.default_rng(seed)
    shape = tuple(tensor.shape)
    numbers = generator.standard_normal(shape)
    both = numbers + 1j * generator.standard_normal(shape) if tensor.is_complex() else numbers
    return torch.as_tensor(np.asarray(both)).to(device=tensor.device, dtype=tensor.dtype)


def _positional_names(fun: Any, count: int) -> list[str]:
    try:
        parameters = list(inspect.signature(fun).parameters.values())
    except (TypeError, ValueError):
        parameters = []
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return [names[i] if i < len(names) else f"args[{i}]" for i in range(count)]


def _paths(value: Any) -> list[Any]:
    return [path for path, _ in tree.flatten_with_path(value)[0]]


def _described(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def _as_tensor(leaf: Any, axis: Axis) -> Any:
    """A mapped array of another framework as a tensor of its own."""
    if axis is None or isinstance(leaf, torch.Tensor | torch.nn.Module) or not hasattr(leaf, "__array__"):
        return leaf
    return torch.as_tensor(np.array(leaf))


def _may_be_mapped(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor | torch.nn.Module)


def _moved_a_little(tensor: torch.Tensor, nudge: float, seed: int, dtype: torch.dtype) -> torch.Tensor:
    """Numbers that are equal move alike, so that ties stay ties, and zeros stay zeros."""
    if not is_inexact(tensor):
        return tensor
    wide = tensor.detach().to(_WIDE[tensor.is_complex()])
    part = (wide.abs() * (1234.5 + 67.8 * seed)).sin().abs().nan_to_num()
    return (wide + wide.abs() * (nudge * torch.finfo(tensor.dtype).eps * part) if nudge else wide).to(dtype)


# --- variants --------------------------------------------------------------------------------------------------------


class Variant(NamedTuple):
    """Inputs on which ways are compared.

    Attributes:
        name: as in a line of the report.
        call: the call.
        alike: whether only the numbers are other than as given, so that what was compiled for those serves again.
        given_layout: whether the axes are as given, as a hand-written batched version needs them.
    """

    name: str
    call: Call
    alike: bool = False
    given_layout: bool = True


def variants(call: Call, seed: int) -> Iterator[Variant]:
    """The changed inputs, without those that make no difference here."""
    moved = _moved(call)
    yield Variant(f"axes moved: in_axes={moved.in_axes!r}", moved, given_layout=False)
    out_axes = tree.map(_other_axis, call.out_axes, is_leaf=lambda node: node is None)
    yield Variant(f"out_axes={out_axes!r}", dataclasses.replace(call, out_axes=out_axes), given_layout=False)
    if call.size > 1:
        yield Variant("samples permuted", permuted(call, order(call, seed)), alike=True)
    yield Variant("not contiguous", call.having([_strided(tensor) for tensor in call.tensors]))
    for size in (1, 0):
        if call.size > size:
            yield Variant(f"batch of {size}", cut(call, size))


def order(call: Call, seed: int) -> torch.Tensor:
    """A permutation of the samples that moves each of them."""
    places = np.random.default_rng(seed).permutation(call.size)
    moved = np.empty_like(places)
    moved[places] = np.roll(places, 1)
    return torch.as_tensor(moved)


def permuted(call: Call, places: torch.Tensor) -> Call:
    """The call with its samples in another order."""
    return call.having([take(*row, places) for row in zip(call.tensors, call.tensor_axes, strict=True)])


def take(tensor: Any, axis: Axis, places: torch.Tensor) -> Any:
    """Some samples of a tensor; anything else as it is."""
    if axis is None or not isinstance(tensor, torch.Tensor):
        return tensor
    return tensor.detach().index_select(axis, places.to(tensor.device))


def cut(call: Call, size: int) -> Call:
    """The call with the first few of its samples."""
    rows = zip(call.tensors, call.tensor_axes, strict=True)
    tensors = [tensor if axis is None else tensor.narrow(axis, 0, size) for tensor, axis in rows]
    return call.having(tensors, axis_size=None if call.axis_size is None else size)


def _moved(call: Call) -> Call:
    """The call with every mapped axis of a positional argument elsewhere; keyword arguments have theirs in front."""
    count = len(tree.leaves(call.args))
    axes = [axis if i >= count else _elsewhere(leaf, axis) for i, (leaf, axis) in enumerate(_rows(call))]
    leaves = [leaf.movedim(old, new) if new != old else leaf for (leaf, old), new in zip(_rows(call), axes, strict=True)]
    remaining = iter(axes)
    in_axes = tuple(_short(arg, [next(remaining) for _ in tree.leaves(arg)]) for arg in call.args)
    return call.having([leaves[i] for i in call.places], in_axes=in_axes)


def _rows(call: Call) -> Iterator[tuple[Any, Axis]]:
    return zip(call.leaves, call.axes, strict=True)


def _elsewhere(leaf: Any, axis: Axis) -> Axis:
    """Another axis: the last one, which is written as -1, or the first."""
    if axis is None or not isinstance(leaf, torch.Tensor):
        return axis
    return -1 if axis % leaf.ndim != leaf.ndim - 1 or (leaf.ndim == 1 and axis != -1) else 0


def _short(arg: Any, axes: list[Axis]) -> Any:
    """An axis tree for an argument, one axis if all are alike."""
    return axes[0] if len(set(axes)) == 1 else tree.unflatten(tree.structure(arg), axes) if axes else None


def _other_axis(axis: Axis) -> Axis:
    return None if axis is None else 0 if axis == -1 else -1


def _strided(tensor: torch.Tensor) -> torch.Tensor:
    """The same numbers, every second one in memory, with the axes in another order."""
    if tensor.layout is not torch.strided or tensor.ndim == 0:
        return tensor
    turned = tensor.detach().transpose(0, -1)
    return torch.stack([turned, turned], -1)[..., 0].transpose(0, -1)
