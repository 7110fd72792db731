"""``vectorize``: a function of numbers, vectors or matrices becomes one that broadcasts over all axes in front of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch

from torchbatch.core import tree
from torchbatch.core.argnums import argument_name
from torchbatch.core.arrays import as_tensor, as_tensor_beside
from torchbatch.core.describe import describe, function_name, shown
from torchbatch.core.parcel import positional_names
from torchbatch.core.wrapper import Wrapper
from torchbatch.errors import AxisError, AxisSpecError, InputTypeError, OutputTypeError
from torchbatch.transforms.vmap import vmap

__all__ = ["vectorize"]

_CORE = r"\((?:\w+(?:,\w+)*)?\)"
_SIGNATURE = re.compile(rf"({_CORE}(?:,{_CORE})*)->({_CORE}(?:,{_CORE})*)")

CoreDims = tuple[str, ...]
Shape = tuple[int, ...]


def vectorize(
    fun: Callable[..., Any] | None = None,
    *,
    excluded: Collection[int | str] = (),
    signature: str | None = None,
) -> Callable[..., Any]:
    """Make a function broadcast over all axes in front of those that it is written for.

    Shapes: for ``fun : ([n, m], [m]) -> [n]`` and the signature ``(n,m),(m)->(n)``, ``vectorize(fun)`` takes
    ``([*a, n, m], [*b, m])`` to ``[*c, n]``, where ``c`` is what ``a`` and ``b`` broadcast to.

    Args:
        fun: a function of tensors. Without it, ``vectorize(signature=…)`` is a decorator.
        excluded: what is handed to ``fun`` as it is: the numbers of positional arguments, the names of keyword arguments.
        signature: the axes that ``fun`` sees, as NumPy writes them for generalized ufuncs: a name for each, and the same size
            wherever the same name stands. It lists the arguments that are not excluded, then the outputs. Without a signature,
            ``fun`` sees single numbers, and its outputs may have any shape.

    Returns:
        The function, with the name and documentation of ``fun``. An argument that is None reaches ``fun`` as None. Keyword
        arguments that are not excluded are broadcast too; where there is a signature, they stand for the positional
        arguments of their names.

    Raises:
        AxisSpecError: ``excluded`` or ``signature`` is of the wrong type.
        AxisError: ``signature`` cannot be read, or shapes do not fit it or each other.
        InputTypeError: an argument is not an array, or the arguments are not as many as the signature has.
        OutputTypeError: the outputs are not as many as the signature has.

    Example:
        >>> import torch
        >>> from torchbatch import vectorize
        >>> @vectorize(signature="(n,m),(m)->(n)")
        ... def apply(matrix, vector):
        ...     return matrix @ vector
        >>> apply(torch.ones(5, 1, 2, 3), torch.ones(4, 3)).shape
        torch.Size([5, 4, 2])

    Source: ``jax.numpy.vectorize``, and ``numpy.vectorize`` for keyword arguments, which JAX's ignores.
    """
    if fun is None:
        return partial(vectorize, excluded=excluded, signature=signature)
    if not callable(fun):
        raise AxisSpecError(f"vectorize takes a function, but it got {shown(fun)}, which is not callable.")
    return Vectorized(fun, _checked_excluded(excluded), signature)


class Signature(NamedTuple):
    """What a signature says: the core dimensions of each argument and of each output."""

    text: str
    inputs: list[CoreDims]
    outputs: list[CoreDims]


class Slot(NamedTuple):
    """One argument: its place or name, what messages call it, its value, and its core dimensions."""

    key: int | str
    name: str
    value: torch.Tensor
    core: CoreDims

    @property
    def loop_shape(self) -> Shape:
        """The axes in front of the core dimensions."""
        return tuple(self.value.shape[: self.value.dim() - len(self.core)])


class Vectorized(Wrapper):
    """The function that :func:`vectorize` returns."""

    def __init__(self, fun: Callable[..., Any], excluded: frozenset[int | str], signature: str | None) -> None:
        super().__init__(fun, excluded, signature)
        self._excluded = excluded
        self._signature = None if signature is None else _parsed(signature)

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        """The outputs, with the broadcast axes in front."""
        places, names = self._arguments(args, kwargs)
        given: dict[Any, Any] = {**places, **names}
        looped = [key for key in given if not self._is_excluded(key)]
        slots = self._slots(looped, given)
        sizes = _core_sizes(slots, self._text())
        shape = _loop_shape(slots, self._text())

        def call(*values: torch.Tensor) -> Any:
            filled = {**given, **{slot.key: value for slot, value in zip(slots, values, strict=True)}}
            output = self.__wrapped__(*(filled[i] for i in places), **{name: filled[name] for name in names})
            if self._signature is not None:
                _check_outputs(output, self._signature, sizes)
            return output

        return _looped(call, slots, shape)

    def _arguments(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[dict[int, Any], dict[str, Any]]:
        """The arguments by place and by name; with a signature, a name that has a place is given by place."""
        places, names = dict(enumerate(args)), dict(kwargs)
        if self._signature is None or not names:
            return places, names
        for place, name in enumerate(positional_names(self.__wrapped__)):
            if name in names and name not in self._excluded and place == len(places):
                places[place] = names.pop(name)
        for name in names:
            if name not in self._excluded:
                raise InputTypeError(
                    f"vectorize: the keyword argument {name!r} of {function_name(self.__wrapped__)} has no place in the "
                    f"signature {self._text()!r}. Give it by position, or name it in excluded={{{name!r}}}."
                )
        return places, names

    def _is_excluded(self, key: int | str) -> bool:
        if key in self._excluded:
            return True
        if isinstance(key, int):
            return False
        return any(place in self._excluded for place, name in enumerate(positional_names(self.__wrapped__)) if name == key)

    def _slots(self, looped: Sequence[int | str], given: Mapping[int | str, Any]) -> list[Slot]:
        cores = [()] * len(looped) if self._signature is None else self._signature.inputs
        if len(cores) != len(looped):
            raise InputTypeError(
                f"vectorize: the signature {self._text()!r} is for {len(cores)} argument(s), but "
                f"{function_name(self.__wrapped__)} got {len(looped)}{' that are not excluded' * bool(self._excluded)}."
            )
        slots = []
        for key, core in zip(looped, cores, strict=True):
            name = key if isinstance(key, str) else argument_name(self.__wrapped__, key)
            if given[key] is not None:
                slots.append(Slot(key, name, _tensor(given[key], name, given.values()), core))
            elif core:
                raise AxisError(
                    f"vectorize: argument {name} is None, but the signature {self._text()!r} gives it the axes {_shown(core)}. "
                    "None can stand only for an argument without any, written ()."
                )
        return slots

    def _text(self) -> str:
        return "" if self._signature is None else self._signature.text


def _checked_excluded(excluded: Any) -> frozenset[int | str]:
    entries = None if isinstance(excluded, str) or not isinstance(excluded, Collection) else list(excluded)
    if entries is None or any(isinstance(entry, bool) or not isinstance(entry, int | str) for entry in entries):
        raise AxisSpecError(
            f"vectorize: excluded must be a collection of ints (positions) and strings (names), but it is {shown(excluded)}."
        )
    for entry in entries:
        if isinstance(entry, int) and entry < 0:
            raise AxisError(f"vectorize: excluded must count positions from the front, but it has {entry}.")
    return frozenset(entries)


def _parsed(signature: Any) -> Signature:
    if not isinstance(signature, str):
        raise AxisSpecError(f"vectorize: signature must be a string or None, but it is {shown(signature)}.")
    found = _SIGNATURE.fullmatch(re.sub(r"\s", "", signature))
    if found is None:
        raise AxisError(
            f"vectorize: {signature!r} is no signature of a generalized ufunc. Write the axes of each argument and of each "
            "output in parentheses, such as '(n,m),(m)->(n)'; () is a single number."
        )
    inputs, outputs = ([tuple(re.findall(r"\w+", part)) for part in re.findall(_CORE, side)] for side in found.groups())
    return Signature(signature, inputs, outputs)


def _tensor(value: Any, name: str, others: Iterable[Any]) -> torch.Tensor:
    found = as_tensor_beside(value, others)
    if found is None:
        raise InputTypeError(
            f"vectorize: argument {name} is {shown(value)}, which is not an array. Name it in excluded= to hand it on as it is."
        )
    return found


def _shown(core: CoreDims) -> str:
    return f"({','.join(core)})"


def _core_sizes(slots: Sequence[Slot], text: str) -> dict[str, int]:
    """The size of each core dimension."""
    sizes: dict[str, int] = {}
    first: dict[str, str] = {}
    for slot in slots:
        rank, count = slot.value.dim(), len(slot.core)
        if rank < count:
            raise AxisError(
                f"vectorize: argument {slot.name} is {describe(slot.value)}, which has {rank} axes, but the signature {text!r} "
                f"gives it {count}: {_shown(slot.core)}."
            )
        for name, size in zip(slot.core, slot.value.shape[rank - count :], strict=True):
            if sizes.setdefault(name, size) != size:
                raise AxisError(
                    f"vectorize: the axis {name!r} of the signature {text!r} has size {sizes[name]} in argument {first[name]}, "
                    f"but size {size} in argument {slot.name}, {describe(slot.value)}."
                )
            first.setdefault(name, slot.name)
    return sizes


def _loop_shape(slots: Sequence[Slot], text: str) -> Shape:
    """What the axes in front of the core dimensions broadcast to."""
    shapes = [slot.loop_shape for slot in slots]
    try:
        return tuple(torch.broadcast_shapes(*shapes))  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        each = ", ".join(f"{shape} of argument {slot.name}" for slot, shape in zip(slots, shapes, strict=True))
        where = f" in front of those of the signature {text!r}" if text else ""
        raise AxisError(f"vectorize: the axes{where} do not broadcast: {each}.") from error


def _looped(call: Callable[..., Any], slots: Sequence[Slot], shape: Shape) -> Any:
    """``call``, mapped over each axis of ``shape`` from the last to the first; axes of size 1 are put back at the end."""
    rank, single = len(shape), []
    for axis in reversed(range(rank)):
        mapped = [_size_at(slot, axis - rank) != 1 for slot in slots]
        if any(mapped):
            call = vmap(call, tuple([0 if each else None for each in mapped]))
        else:
            single.append(axis)
    output = call(*(_squeezed(slot) for slot in slots))
    return tree.map_leaves(lambda leaf: _unsqueezed(leaf, single), output) if single else output


def _size_at(slot: Slot, axis: int) -> int:
    """The size of a loop axis, counted from the last one; 1 where the argument has it not."""
    shape = slot.loop_shape
    return shape[axis] if len(shape) >= -axis else 1


def _squeezed(slot: Slot) -> torch.Tensor:
    kept = [size for size in slot.loop_shape if size != 1]
    return slot.value.reshape([*kept, *slot.value.shape[len(slot.loop_shape) :]])


def _unsqueezed(leaf: Any, axes: Sequence[int]) -> torch.Tensor:
    found = as_tensor(leaf)
    if found is None:
        raise OutputTypeError(f"vectorize: every output must be an array, but one is {shown(leaf)}.")
    for axis in reversed(axes):
        found = found.unsqueeze(axis)
    return found


def _check_outputs(output: Any, signature: Signature, inputs: Mapping[str, int]) -> None:
    """Hold what the function returned, in its innermost call, against the signature."""
    outputs = output if isinstance(output, tuple) else (output,)
    count = len(signature.outputs)
    if count != len(outputs) or (count > 1 and not isinstance(output, tuple)):
        got = f"a tuple of {len(outputs)}" if isinstance(output, tuple) else describe(output)
        raise OutputTypeError(
            f"vectorize: the signature {signature.text!r} has {count} output(s), so the function must return "
            f"{f'a tuple of {count}' if count > 1 else 'one array'}, but it returned {got}."
        )
    sizes = dict(inputs)
    for i, (leaf, core) in enumerate(zip(outputs, signature.outputs, strict=True)):
        _check_output(leaf, core, sizes, f"output {i}" if count > 1 else "the output", signature.text)


def _check_output(leaf: Any, core: CoreDims, sizes: dict[str, int], name: str, text: str) -> None:
    value = as_tensor(leaf)
    if value is None:
        raise OutputTypeError(f"vectorize: {name} must be an array, but it is {shown(leaf)}.")
    if value.dim() != len(core):
        raise AxisError(
            f"vectorize: {name} is {describe(value)} for one element, but the signature {text!r} gives it the axes "
            f"{_shown(core)}."
        )
    for axis, size in zip(core, value.shape, strict=True):
        if sizes.setdefault(axis, size) != size:
            raise AxisError(
                f"vectorize: {name} is {describe(value)} for one element, but the axis {axis!r} of the signature {text!r} has "
                f"size {sizes[axis]}."
            )
