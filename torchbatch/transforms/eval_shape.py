"""``eval_shape``: the shapes and dtypes a function returns, without computing them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from torchbatch._torch import guards
from torchbatch._torch.likes import Like, stand_ins
from torchbatch.core import argnums as positional
from torchbatch.core import tree
from torchbatch.core.abstract import META, Abstract, to_meta
from torchbatch.core.argnums import flatten
from torchbatch.core.signature import Call, StaticArguments, bind
from torchbatch.errors import AxisSpecError, InputTypeError, OutputTypeError, UnsupportedOperationError

__all__ = ["ShapeDtypeStruct", "eval_shape"]


class ShapeDtypeStruct:
    """A tensor without its numbers: a shape, a dtype and a device.

    Args:
        shape: the sizes of the axes.
        dtype: a ``torch.dtype``.
        device: a device (default: the CPU).

    Example:
        >>> import torch, torchbatch
        >>> torchbatch.ShapeDtypeStruct((2, 3), torch.float32)
        ShapeDtypeStruct(shape=(2, 3), dtype=float32, device=cpu)

    Source: ``jax.ShapeDtypeStruct``.
    """

    __slots__ = ("device", "dtype", "shape")

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device | str | None = None) -> None:
        if not isinstance(dtype, torch.dtype):
            raise AxisSpecError(
                f"ShapeDtypeStruct: dtype must be a torch.dtype such as torch.float32, but got {dtype!r}."
            )
        self.shape = torch.Size(shape)
        self.dtype = dtype
        self.device = torch.device("cpu" if device is None else device)

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """The number of elements."""
        return self.shape.numel()

    def __repr__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"ShapeDtypeStruct(shape={tuple(self.shape)}, dtype={dtype}, device={self.device})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ShapeDtypeStruct) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def _key(self) -> tuple[Any, ...]:
        return tuple(self.shape), self.dtype, self.device


def eval_shape(fun: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Compute the shapes and dtypes that ``fun(*args, **kwargs)`` returns, without computing its numbers.

    Nothing is allocated: the function runs on tensors of PyTorch's meta device. What it closes over may be real.

    Args:
        fun: a function of tensors. All of its tensors are on one device.
        args, kwargs: trees of tensors, NumPy arrays, numbers and :class:`ShapeDtypeStruct`.

    Returns:
        The tree that ``fun`` returns, with a :class:`ShapeDtypeStruct` for every array and number.

    Raises:
        InputTypeError: an argument is not an array. Bind such arguments with ``functools.partial``.
        OutputTypeError: an output is not an array.
        DataDependentError: ``fun`` needs the value of a tensor.
        UnsupportedOperationError: ``fun`` moves a tensor to another device.

    Example:
        >>> import torch, torchbatch
        >>> big = torchbatch.ShapeDtypeStruct((100_000, 100_000), torch.float32)
        >>> torchbatch.eval_shape(lambda a, b: (a @ b).sum(0), big, big)
        ShapeDtypeStruct(shape=(100000,), dtype=float32, device=cpu)

    Source: ``jax.eval_shape``.
    """
    positional.check_callable(fun, "eval_shape")
    leaves, structure = flatten((args, kwargs))
    device = _device(leaves)
    names = _Names(fun, args, kwargs)
    abstract_args, abstract_kwargs = positional.unflatten(
        structure, [_abstract(leaf, names, i) for i, leaf in enumerate(leaves)]
    )
    with Abstract(device), META:
        output = fun(*abstract_args, **abstract_kwargs)
    found, out_structure = flatten(output)
    return out_structure.unflatten([_describe(leaf, output, i, device) for i, leaf in enumerate(found)])


def bind_shapes(
    fun: Callable[..., Any], static: StaticArguments, args: Sequence[Any], kwargs: Mapping[str, Any], who: str, instead: str
) -> Call:
    """The arguments of a call, taken apart, where a :class:`ShapeDtypeStruct` may stand for a tensor; it takes no memory.

    Raises:
        UnsupportedOperationError: a transform or a trace is at work; ``who`` was called, and ``instead`` should be.
    """
    if guards.inside_other():
        raise UnsupportedOperationError(
            f"{who} is called inside a transform, a trace or a mode of PyTorch, where operations are not what they look like. "
            f"Call it outside, on the transformed function: {instead}."
        )
    known: dict[int, torch.Tensor] = {}

    def example(leaf: Any) -> Any:
        if not isinstance(leaf, ShapeDtypeStruct):
            return leaf
        place = torch.empty(0)
        like = Like.of(torch.empty(leaf.shape, dtype=leaf.dtype, device=META))
        [known[id(place)]] = stand_ins([like._replace(device=leaf.device)])
        return place

    args, kwargs = tree.map_leaves(example, (tuple(args), dict(kwargs)))
    call = bind(fun, static, args, kwargs)
    return call._replace(values=[known.get(id(value), value) for value in call.values])


class _Names:
    """What a message calls each leaf of the arguments."""

    def __init__(self, fun: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.fun, self.args, self.kwargs = fun, args, kwargs

    def __getitem__(self, index: int) -> str:
        roots = [positional.argument_name(self.fun, i) for i in range(len(self.args))]
        keys = sorted(self.kwargs)
        return positional.leaf_names([*roots, *keys], [*self.args, *(self.kwargs[key] for key in keys)])[index]


def _device(leaves: Iterable[Any]) -> torch.device:
    """The device of the arguments; a tensor on the CPU may go with those on another one, as a number does."""
    devices = [leaf.device for leaf in leaves if isinstance(leaf, torch.Tensor | ShapeDtypeStruct)]
    return next((device for device in devices if device.type != "cpu"), torch.device("cpu"))


def _abstract(leaf: Any, names: _Names, index: int) -> torch.Tensor:
    if isinstance(leaf, ShapeDtypeStruct):
        return torch.empty(leaf.shape, dtype=leaf.dtype, device=META)
    try:
        if isinstance(leaf, torch.Tensor):
            return to_meta(leaf)
        return to_meta(torch.as_tensor(leaf if isinstance(leaf, bool | int | float | complex) else np.asarray(leaf)))
    except (TypeError, ValueError, RuntimeError):
        raise InputTypeError(
            f"eval_shape: argument {names[index]} is {leaf!r} of type {type(leaf).__name__}, where a tensor, a "
            f"ShapeDtypeStruct, a NumPy array or a number is needed. Bind it with functools.partial."
        ) from None


def _describe(leaf: Any, output: Any, index: int, device: torch.device) -> ShapeDtypeStruct:
    if isinstance(leaf, bool | int | float | complex | np.generic | np.ndarray):
        leaf = torch.as_tensor(leaf)
    if not isinstance(leaf, torch.Tensor):
        raise OutputTypeError(
            f"eval_shape: {tree.paths(output, 'output')[index]} is {leaf!r} of type {type(leaf).__name__}, but every "
            f"output must be an array or a number."
        )
    return ShapeDtypeStruct(leaf.shape, leaf.dtype, device)
