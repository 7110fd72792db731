"""``in_axes`` and ``out_axes``: checked once, laid over the leaves of a call, and explained when they do not fit.

Nothing here opens a level or calls the user's function; the results are lists of leaves and of integers.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from torchbatch._torch.escape import EscapedTensor
from torchbatch.core import tree
from torchbatch.core.arrays import as_tensor
from torchbatch.core.describe import describe, shown
from torchbatch.errors import AxisError, AxisSpecError, EscapedValueError, InputTypeError

Axis = int | None


class _Unmapped:
    """Stands for None among the leaves of an axis tree, where a bare None would be the empty tree."""

    def __repr__(self) -> str:
        return "None"


UNMAPPED = _Unmapped()


class Prefix(NamedTuple):
    """An axis tree: its leaves (None for "unmapped") and its structure, or None for a single leaf."""

    axes: tuple[Axis, ...]
    structure: tree.TreeDef | None
    sealed: Any


class Mapped(NamedTuple):
    """The leaves of a call that are mapped, the axis of each, and how to rebuild the arguments around them."""

    values: list[torch.Tensor]
    axes: list[int]
    rebuild: Callable[[Sequence[Any]], tuple[Sequence[Any], dict[str, Any]]]


def is_axis(entry: Any) -> bool:
    """Whether ``entry`` is an int or None; True, False and NumPy's integers are not, as in JAX."""
    return entry is None or type(entry) is int


def parse_prefix(axes: Any, what: str) -> Prefix:
    """Check an axis tree and take it apart.

    Raises:
        AxisSpecError: a leaf is neither an int nor None.
    """
    if is_axis(axes):
        return Prefix((axes,), None, UNMAPPED if axes is None else axes)
    sealed = tree.replace_none(axes, UNMAPPED)
    leaves, structure = tree.flatten(sealed)
    for leaf in leaves:
        if leaf is not UNMAPPED and not is_axis(leaf):
            raise AxisSpecError(
                f"{what} must be an int, None, or a tree with ints and None as leaves, but it holds {shown(leaf)}."
            )
    return Prefix(tuple(None if leaf is UNMAPPED else leaf for leaf in leaves), structure, sealed)


class InAxes:
    """A checked ``in_axes``, ready to be laid over the arguments of a call."""

    def __init__(self, in_axes: Any) -> None:
        self.entries: tuple[Prefix, ...] | None = None
        self.single: Prefix | None = None
        if is_axis(in_axes):
            self.single = parse_prefix(in_axes, "in_axes")
        elif type(in_axes) in (tuple, list):
            self.entries = tuple(parse_prefix(entry, f"in_axes[{i}]") for i, entry in enumerate(in_axes))
        else:
            raise AxisSpecError(
                "in_axes must be an int, None, or a tuple or list with one entry per positional argument, but it is "
                f"{shown(in_axes)}."
            )
        self.flat = self._flat()

    def _flat(self) -> tuple[Axis, ...] | None:
        """The axis of each argument where every entry is a plain int or None, else None."""
        if self.entries is None or any(entry.structure is not None for entry in self.entries):
            return None
        return tuple(entry.axes[0] for entry in self.entries)

    def for_arguments(self, count: int) -> Sequence[Prefix]:
        """One prefix per positional argument."""
        if self.single is not None:
            return (self.single,) * count
        entries = self.entries or ()
        if len(entries) != count:
            raise AxisError(
                f"in_axes must have one entry per positional argument: it has {len(entries)}, but the "
                f"function was called with {count} positional argument{'' if count == 1 else 's'}."
            )
        return entries


_KEYWORD = Prefix((0,), None, 0)


class _Slot(NamedTuple):
    """One argument: its prefix, the pieces under the prefix's leaves, and the structure of each mapped piece."""

    prefix: Prefix
    pieces: list[Any]
    structures: list[tree.TreeDef | None]


def open_arguments(in_axes: InAxes, args: tuple[Any, ...], kwargs: dict[str, Any], fun: Any) -> Mapped:
    """Find the mapped leaves of a call.

    Keyword arguments are mapped over axis 0. What is unmapped is not looked into, and is handed on as it is.

    Raises:
        AxisError: the count or the structure of ``in_axes`` does not fit, or an axis is out of bounds.
        InputTypeError: a mapped leaf is not an array.
    """
    values: list[Any] = []
    axes: list[Axis] = []
    prefixes = in_axes.for_arguments(len(args))
    slots = [_open(prefix, value, i, fun, values, axes) for i, (prefix, value) in enumerate(zip(prefixes, args, strict=True))]
    keywords = {key: _open(_KEYWORD, value, key, fun, values, axes) for key, value in kwargs.items()}
    leaves = [_as_mapped(value, axis) for value, axis in zip(values, axes, strict=True)]
    bad = [i for i, leaf in enumerate(leaves) if leaf is _BAD]
    if bad:
        raise _input_error(bad[0], values, axes, _names(in_axes, args, kwargs, fun))
    kept = [i for i, leaf in enumerate(leaves) if leaf is not None]

    def rebuild(batched: Sequence[Any]) -> tuple[Sequence[Any], dict[str, Any]]:
        filled = list(values)
        for i, value in zip(kept, batched, strict=True):
            filled[i] = value
        stream = iter(filled)
        return [_close(slot, stream) for slot in slots], {key: _close(slot, stream) for key, slot in keywords.items()}

    return Mapped([leaves[i] for i in kept], [_bounded(axes[i], leaves[i]) for i in kept], rebuild)


def _open(prefix: Prefix, value: Any, key: int | str, fun: Any, values: list[Any], axes: list[Axis]) -> _Slot:
    if prefix.structure is None:
        pieces = [value]
    else:
        what = f"in_axes[{key}]"
        try:
            pieces = tree.flatten_up_to(prefix.sealed, value, what=what, root="the argument")
        except AxisError:  # the name is worth looking up only now
            root = f"argument {argument_name(fun, key)}"
            raise AxisError(tree.prefix_mismatch(prefix.sealed, value, what=what, root=root)) from None
    structures: list[tree.TreeDef | None] = []
    for piece, axis in zip(pieces, prefix.axes, strict=True):
        if axis is None:
            structures.append(None)
            continue
        leaves, structure = tree.flatten(piece)
        values += leaves
        axes += [axis] * len(leaves)
        structures.append(structure)
    return _Slot(prefix, pieces, structures)


def _close(slot: _Slot, stream: Iterable[Any]) -> Any:
    pieces = [
        piece if structure is None else structure.unflatten([next(stream) for _ in range(structure.num_leaves)])  # type: ignore[call-overload]
        for piece, structure in zip(slot.pieces, slot.structures, strict=True)
    ]
    return pieces[0] if slot.prefix.structure is None else slot.prefix.structure.unflatten(pieces)


_BAD = object()


def _as_mapped(value: Any, axis: Axis) -> Any:
    """A tensor with an axis ``axis``; None for what passes through unmapped; ``_BAD`` for what cannot be mapped."""
    if isinstance(value, torch.nn.Module):
        return None
    if isinstance(value, EscapedTensor):
        return _BAD
    tensor = as_tensor(value)
    return tensor if tensor is not None and axis is not None and -tensor.ndim <= axis < tensor.ndim else _BAD


def _bounded(axis: Axis, value: torch.Tensor) -> int:
    return (axis or 0) % value.ndim


def _input_error(index: int, values: list[Any], axes: list[Axis], names: list[str]) -> Exception:
    value, axis, name = values[index], axes[index], names[index]
    if isinstance(value, EscapedTensor):
        return EscapedValueError(f"argument {name} is a per-sample value that escaped from a vmap that has finished.")
    array = as_tensor(value)
    if array is None:
        return InputTypeError(
            f"argument {name} is to be mapped over axis {axis}, but {shown(value)} is not an array of numbers "
            "that PyTorch can hold. Pass a tensor or a NumPy array, or "
            "give None for it in in_axes so that it reaches the function as it is."
        )
    need = axis + 1 if axis is not None and axis >= 0 else -(axis or 0)
    return AxisError(
        f"argument {name} is to be mapped over axis {axis}, which needs at least {need} dimension{'s' * (need > 1)}, but it "
        f"is {describe(array)} with {array.ndim}. Axes run over [-ndim, ndim); give None in in_axes for what is not mapped."
    )


def axis_size(mapped: Mapped, given: int | None, names: Callable[[], list[str]]) -> int:
    """The one size that all mapped axes have.

    Raises:
        AxisError: the sizes disagree, or there is nothing to tell the size from.
    """
    sizes = [value.shape[axis] for value, axis in zip(mapped.values, mapped.axes, strict=True)]
    if not sizes and given is None:
        raise AxisError(
            "vmap has nothing to map: give it at least one argument that is an array with an axis in in_axes that is not "
            "None, or say how many samples there are with axis_size=."
        )
    size = sizes[0] if given is None else given
    if any(s != size for s in sizes):
        raise AxisError(_sizes_message(sizes, mapped, given, names()))
    return size


def _sizes_message(sizes: list[int], mapped: Mapped, given: int | None, names: list[str]) -> str:
    sizes = [int(size) for size in sizes]  # while a function is traced, a size may be a formula
    lines = [] if given is None else [f"  * the argument axis_size was {given}"]
    groups = Counter(sizes).most_common()
    for rank, (size, count) in enumerate(groups):
        i = sizes.index(size)
        which = f"axis {mapped.axes[i]} of argument {names[i]}, {describe(mapped.values[i])}"
        if count == 1:
            lines.append(f"  * one axis had size {size}: {which}")
        else:
            most = rank == 0 and len(groups) > 1 and count > groups[1][1]
            lines.append(f"  * {'most' if most else 'some'} axes ({count} of them) had size {size}, e.g. {which}")
    return (
        "vmap got axes of different sizes to map over:\n" + ";\n".join(lines) + ".\n"
        "Map axes of one size, or give None in in_axes for what all samples share."
    )


def mapped_names(in_axes: InAxes, args: tuple[Any, ...], kwargs: dict[str, Any], fun: Any) -> list[str]:
    """The names of the leaves in ``Mapped.values``, e.g. ``batch['y'][0]``."""
    mapped: list[Any] = []
    prefixes = in_axes.for_arguments(len(args))
    for i, (prefix, value) in enumerate(zip(prefixes, args, strict=True)):
        _open(prefix, value, i, fun, mapped, [])
    for key, value in kwargs.items():
        _open(_KEYWORD, value, key, fun, mapped, [])
    names = _names(in_axes, args, kwargs, fun)
    return [name for name, value in zip(names, mapped, strict=True) if not isinstance(value, torch.nn.Module)]


def _names(in_axes: InAxes, args: tuple[Any, ...], kwargs: dict[str, Any], fun: Any) -> list[str]:
    """One name per leaf under a mapped prefix, in the order of :func:`open_arguments`."""
    names: list[str] = []
    for i, (prefix, value) in enumerate(zip(in_axes.for_arguments(len(args)), args, strict=True)):
        root = argument_name(fun, i)
        if prefix.structure is None:
            pieces, roots = [value], [root]
        else:
            pieces = tree.flatten_up_to(prefix.sealed, value, what="in_axes", root=root)
            roots = tree.paths(prefix.sealed, root)
        for piece, axis, where in zip(pieces, prefix.axes, roots, strict=True):
            names += [] if axis is None else tree.paths(piece, where)
    for key, value in kwargs.items():
        names += tree.paths(value, argument_name(fun, key))
    return names


def samples(in_axes: InAxes, args: tuple[Any, ...], kwargs: dict[str, Any], fun: Any) -> list[str]:
    """One text per mapped argument, at most five: ``argument x is float32[8,3], one sample of it float32[3]``."""
    mapped = open_arguments(in_axes, args, kwargs, fun)
    names = mapped_names(in_axes, args, kwargs, fun)
    return [
        f"argument {name} is {describe(value)}, one sample of it {describe(value.movedim(axis, 0)[0])}"
        for name, value, axis in zip(names, mapped.values, mapped.axes, strict=True)
        if value.shape[axis]
    ][:5]


def shared_tensors(in_axes: InAxes, args: tuple[Any, ...], fun: Any) -> dict[str, torch.Tensor]:
    """The tensors in the unmapped parts of the arguments, by name."""
    found: dict[str, torch.Tensor] = {}
    for i, (prefix, value) in enumerate(zip(in_axes.for_arguments(len(args)), args, strict=True)):
        root = argument_name(fun, i)
        whole = prefix.structure is None
        pieces = [value] if whole else tree.flatten_up_to(prefix.sealed, value, what="in_axes", root=root)
        roots = [root] if whole else tree.paths(prefix.sealed, root)
        for piece, axis, where in zip(pieces, prefix.axes, roots, strict=True):
            if axis is None:
                leaves = zip(tree.paths(piece, where), tree.flatten(piece)[0], strict=True)
                found.update({name: leaf for name, leaf in leaves if isinstance(leaf, torch.Tensor)})
    return found


def argument_name(fun: Any, key: int | str) -> str:
    """What the signature of ``fun`` calls a positional or keyword argument, e.g. ``x``, ``args[2]``, ``kwargs['k']``."""
    parameters = _parameters(fun)
    if isinstance(key, str):
        named = key in parameters and parameters[key].kind is not inspect.Parameter.POSITIONAL_ONLY
        if named or not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            return key
        return f"{next(name for name, p in parameters.items() if p.kind is p.VAR_KEYWORD)}[{key!r}]"
    positional = [n for n, p in parameters.items() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if key < len(positional):
        return positional[key]
    rest = next((n for n, p in parameters.items() if p.kind is p.VAR_POSITIONAL), "args")
    return f"{rest}[{key - len(positional)}]"


def _parameters(fun: Any) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(fun).parameters
    except (TypeError, ValueError):  # built-in functions without a signature
        return {}
