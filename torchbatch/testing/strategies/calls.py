"""Strategies for whole calls of ``vmap``: arguments, ``in_axes`` and ``out_axes`` for a function of a known signature."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from hypothesis import currently_in_test_context, note
from hypothesis import strategies as st

from torchbatch import ShapeDtypeStruct, tree
from torchbatch.errors import AxisSpecError, TorchbatchError
from torchbatch.testing.reproducer import reproducer
from torchbatch.testing.strategies.arrays import LAYOUTS, arrays, dtype_name, tensors
from torchbatch.testing.strategies.axes import entries_of, mapped_prefixes, new_axis, out_axes_for, with_entries

__all__ = ["BatchedCall", "batched_calls", "reproduced"]

_LIST = r"\((?:\w+(?:,\w+)*)?\)"
_SIGNATURE = re.compile(rf"({_LIST}(?:,{_LIST})*)->({_LIST}(?:,{_LIST})*)")
_SHORT = {"float": "f", "bfloat": "bf", "int": "i", "uint": "u", "complex": "c"}


# --- what is drawn ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, repr=False, eq=False)
class BatchedCall:
    """Arguments over a batch, and the axes to map: ``vmap(fun, call.in_axes, call.out_axes)(*call.args)``.

    Attributes:
        args: the arguments.
        in_axes: which axis of each is mapped.
        out_axes: where the mapped axis goes.
        axis_size: the number of samples.
        output: a tree of :class:`torchbatch.ShapeDtypeStruct`: what the function returns for one sample; None if not known.
    """

    args: tuple[Any, ...]
    in_axes: Any
    out_axes: Any
    axis_size: int
    output: Any = None

    def reproducer(self, fun: Callable[..., Any], **options: Any) -> str:
        """A program that makes this call; see :func:`torchbatch.testing.reproducer`."""
        given = {"axis_size": self.axis_size, "output": self.output, **options}
        return reproducer(fun, self.args, self.in_axes, self.out_axes, **given)

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(repr(self))

    def __repr__(self) -> str:
        shown = [*map(short, self.args), f"in_axes={self.in_axes!r}", f"out_axes={self.out_axes!r}"]
        return f"BatchedCall({', '.join(shown)}, axis_size={self.axis_size})"


def short(value: Any) -> str:
    """A tree of arrays in a few characters: ``(f32[2,3], {'w': f64[3]})``."""
    return re.sub(r"'(\w+\[[\d,]*\](?: strides \([-\d, ]*\))?)'", r"\1", repr(tree.map(_short_leaf, value)))


def _short_leaf(leaf: Any) -> Any:
    return short_struct(leaf) + _short_strides(leaf) if isinstance(leaf, torch.Tensor | np.ndarray) else leaf


def short_struct(leaf: Any) -> str:
    """The dtype and the shape of an array or a stand-in: ``f32[2,3]``."""
    name = dtype_name(leaf.dtype)
    letters = name.rstrip("0123456789")
    kind = _SHORT.get(letters, letters) + name[len(letters) :]
    return f"{kind}[{','.join(map(str, leaf.shape))}]"


def _short_strides(leaf: torch.Tensor | np.ndarray[Any, Any]) -> str:
    if isinstance(leaf, torch.Tensor):
        return "" if leaf.is_contiguous() else f" strides {tuple(leaf.stride())}"
    return "" if leaf.flags.c_contiguous else f" strides {tuple(stride // leaf.itemsize for stride in leaf.strides)}"


@contextlib.contextmanager
def reproduced(fun: Callable[..., Any], call: BatchedCall, **options: Any) -> Iterator[None]:
    """A context for what may fail: a failure within it shows a program in plain PyTorch that makes the same call.

    Within a hypothesis test, the program is a note on the smallest failing case. Elsewhere it is a note on the exception
    (from Python 3.11 on).

    Args:
        fun: the function of one sample.
        call: the call.
        options: passed on to :func:`torchbatch.testing.reproducer`.

    Example:
        >>> import torch
        >>> from hypothesis import given, settings
        >>> from torchbatch import vmap
        >>> from torchbatch.testing import loop
        >>> from torchbatch.testing.strategies import batched_calls, reproduced
        >>> @settings(deadline=None, derandomize=True, max_examples=20)
        ... @given(batched_calls("(n),(n)->()"))
        ... def test_dot(call):
        ...     with reproduced(torch.dot, call):
        ...         found, wanted = (map(torch.dot, call.in_axes, call.out_axes)(*call.args) for map in (vmap, loop))
        ...         torch.testing.assert_close(found, wanted)
        >>> test_dot()
    """
    try:
        yield
    except Exception as error:
        try:
            text = call.reproducer(fun, **options)
        except TorchbatchError as problem:
            text = f"There is no program that reproduces this: {problem}"
        if currently_in_test_context():
            note(text)
        elif hasattr(error, "add_note"):
            error.add_note(text)
        raise


# --- signatures ------------------------------------------------------------------------------------------------------


class Signature(NamedTuple):
    """What a function takes and returns for one sample, in stand-ins; ``outputs`` is None where that is not known."""

    arguments: tuple[Any, ...]
    outputs: Any


def _sides(text: str) -> list[list[str]]:
    return [[name for name in part.split(",") if name] for part in re.findall(r"\(([^)]*)\)", text)]


@st.composite
def _from_text(draw: st.DrawFn, text: str, sizes: Mapping[str, int], dtype: Any, sides: st.SearchStrategy[int]) -> Signature:
    """The shapes of ``"(n,k),(k)->(n)"``, with a size for each name."""
    match = _SIGNATURE.fullmatch(text.replace(" ", ""))
    if match is None:
        raise AxisSpecError(
            f"batched_calls: the signature {text!r} cannot be read. Write the axes of each argument and of each output, such as "
            "'(n,k),(k)->(n)', or give a tuple of ShapeDtypeStruct."
        )
    inputs, outputs = _sides(match[1]), _sides(match[2])
    names = dict.fromkeys(name for part in (*inputs, *outputs) for name in part)
    unknown = [name for name in sizes if name not in names]
    if unknown:
        raise AxisSpecError(f"batched_calls: sizes has {unknown[0]!r}, but the signature {text!r} has no such name.")
    known = {name: int(name) if name.isdigit() else sizes.get(name) for name in names}
    found = {name: draw(sides) if size is None else size for name, size in known.items()}
    kind = draw(dtype) if isinstance(dtype, st.SearchStrategy) else dtype
    structs = [ShapeDtypeStruct([found[name] for name in part], kind) for part in (*inputs, *outputs)]
    results = structs[len(inputs) :]
    return Signature(tuple(structs[: len(inputs)]), results[0] if len(results) == 1 else tuple(results))


def _read(signature: Any, out: Any) -> Signature:
    """The signature of a tuple of stand-ins, or of what has ``arguments`` and ``outputs``."""
    if hasattr(signature, "arguments") and hasattr(signature, "outputs"):
        return Signature(tuple(signature.arguments), signature.outputs)
    arguments = (signature,) if isinstance(signature, ShapeDtypeStruct) else signature
    leaves = tree.leaves(arguments)
    if type(arguments) not in (tuple, list) or not leaves or not all(isinstance(leaf, ShapeDtypeStruct) for leaf in leaves):
        raise AxisSpecError(
            "batched_calls: the signature must be text such as '(n,k),(k)->(n)', a tuple with a tree of ShapeDtypeStruct for "
            f"each argument, or a program, but it is {signature!r}."
        )
    return Signature(tuple(arguments), out)


# --- calls -----------------------------------------------------------------------------------------------------------


class _Options(NamedTuple):
    """How calls are drawn."""

    batch_sizes: Sequence[int]
    none: bool
    negative: bool
    make: Callable[[tuple[int, ...], torch.dtype], st.SearchStrategy[Any]]


@st.composite
def _calls(draw: st.DrawFn, signatures: st.SearchStrategy[Signature], options: _Options) -> BatchedCall:
    arguments, outputs = draw(signatures)
    size = draw(st.sampled_from(list(options.batch_sizes)))
    choices = tree.map(lambda leaf: new_axis(leaf, none=options.none, negative=options.negative), arguments)
    in_axes = draw(mapped_prefixes(choices))
    batched = [_batched(draw, axis, part, size, options) for axis, part in entries_of(in_axes, arguments)]
    args = batched[0] if in_axes is None or isinstance(in_axes, int) else with_entries(in_axes, iter(batched))
    found = out_axes_for(outputs, negative=options.negative) if outputs is not None else None
    out_axes = draw(st.sampled_from([0, -1] if options.negative else [0]) if found is None else found)
    return BatchedCall(args, in_axes, out_axes, size, outputs)


def _batched(draw: st.DrawFn, axis: int | None, part: Any, size: int, options: _Options) -> Any:
    """Arrays in the place of stand-ins, with the batch at this axis."""

    def array(struct: ShapeDtypeStruct) -> Any:
        shape = list(struct.shape)
        if axis is not None:
            shape.insert(axis if axis >= 0 else axis + len(shape) + 1, size)
        return draw(options.make(tuple(shape), struct.dtype))

    return tree.map(array, part)


def batched_calls(
    signature: Any,
    *,
    out: Any = None,
    sizes: Mapping[str, int] | None = None,
    dtype: Any = torch.float32,
    max_side: int = 3,
    batch_sizes: Sequence[int] = (1, 2, 3, 0),
    none: bool = True,
    negative: bool = True,
    library: str = "torch",
    layouts: Sequence[str] = LAYOUTS,
    special_values: bool = False,
    min_value: float | None = None,
    max_value: float | None = None,
    requires_grad: bool | st.SearchStrategy[bool] = False,
) -> st.SearchStrategy[BatchedCall]:
    """Calls of ``vmap`` for a function of this signature: over any axis of each argument, or none, to any axis of the output.

    Args:
        signature: what the function takes and returns for one sample. Text as for NumPy's generalized ufuncs,
            ``"(n,k),(k)->(n)"``, where a number is a size; or a tuple with a tree of :class:`torchbatch.ShapeDtypeStruct` for
            each argument; or one of :func:`programs`.
        out: with a tuple, the tree of :class:`torchbatch.ShapeDtypeStruct` that the function returns, such as
            :func:`torchbatch.eval_shape` gives. Without it, ``out_axes`` is 0 or -1, which fit all outputs.
        sizes: sizes for some of the names in the text; the others are from 1 to ``max_side``.
        dtype: with text, the dtype of all arguments, or a strategy for it.
        max_side: see ``sizes``.
        batch_sizes: how many samples there may be, the simplest first.
        none: whether arguments may be left unmapped. At least one array is mapped.
        negative: whether axes are also counted from the end.
        library: ``"torch"`` for tensors, ``"numpy"`` for NumPy arrays.
        layouts, special_values, min_value, max_value, requires_grad: as for :func:`tensors`; for a program, values are by
            default from its domain.

    Raises:
        AxisSpecError: the signature, or an option, cannot be read.

    Example:
        >>> from hypothesis import find
        >>> from torchbatch.testing.strategies import batched_calls
        >>> find(batched_calls("(n,k),(k)->(n)"), lambda call: call.axis_size == 2 and call.out_axes == -1)
        BatchedCall(f32[2,1,1], f32[2,1], in_axes=0, out_axes=-1, axis_size=2)
    """
    domain = getattr(signature, "domain", (None, None))
    low, high = (given if given is not None else own for given, own in zip((min_value, max_value), domain, strict=True))
    values: dict[str, Any] = {"layouts": layouts, "special_values": special_values, "min_value": low, "max_value": high}
    if library not in ("torch", "numpy"):
        raise AxisSpecError(f"batched_calls: library must be 'torch' or 'numpy', but it is {library!r}.")

    def make(shape: tuple[int, ...], kind: torch.dtype) -> st.SearchStrategy[Any]:
        if library == "numpy":
            return arrays(shape, kind, **values)
        return tensors(shape, kind, requires_grad=requires_grad, **values)

    options = _Options(batch_sizes, none, negative, make)
    if isinstance(signature, str):
        return _calls(_from_text(signature, sizes or {}, dtype, st.integers(1, max_side)), options)
    return _calls(st.just(_read(signature, out)), options)
