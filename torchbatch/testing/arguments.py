"""The arrays that go into a call and come out of it, as a report shows them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torchbatch import tree
from torchbatch.testing.report import Argument
from torchbatch.testing.transformed import path_name
from torchbatch.testing.values import is_array, read
from torchbatch.testing.variants import Call, spread


def inputs_of(call: Call) -> tuple[Argument, ...]:
    """The tensors of a call's arguments, each with its batch axis."""
    rows = zip(call.names, call.tensors, call.tensor_axes, strict=True)
    return tuple(_argument(name, tensor, axis) for name, tensor, axis in rows)


def outputs_of(call: Call, value: Any) -> tuple[Argument, ...]:
    """The arrays that a call returned, each with its batch axis."""
    found, _ = tree.flatten_with_path(value)
    rows = zip(found, spread(call.out_axes, value), strict=True)
    return tuple(_argument(f"output{tree.keystr(path)}", leaf, axis) for (path, leaf), axis in rows if is_array(leaf))


def arrays_of(args: Any, names: Sequence[str], in_axes: Any) -> tuple[Argument, ...]:
    """The arrays and numbers among positional arguments, each with its batch axis.

    Args:
        args: the arguments.
        names: their names.
        in_axes: as for ``vmap``; None where nothing is mapped.
    """
    found, _ = tree.flatten_with_path(args)
    rows = [(path_name(path, names), leaf, _axis(in_axes, path)) for path, leaf in found if is_array(leaf)]
    return tuple(_argument(name, leaf, axis if isinstance(axis, int) else None) for name, leaf, axis in rows)


def _axis(spec: Any, path: Any) -> Any:
    """The axis of ``in_axes`` for a leaf."""
    for entry in path:
        if spec is None or isinstance(spec, int):
            break
        spec = entry(spec)
    return spec


def line(argument: Argument) -> str:
    """An argument in a line of text."""
    axis = "" if argument.axis is None else f", axis {argument.axis}"
    return f"{argument.name}: {argument.dtype}{list(argument.shape)}{axis}"


def _argument(name: str, array: Any, axis: int | None) -> Argument:
    shape, dtype = tuple(getattr(array, "shape", ())), getattr(array, "dtype", None)
    text = read(array).dtype if dtype is None else str(dtype).removeprefix("torch.")
    return Argument(name, text, shape, None if axis is None or not shape else axis % len(shape))
