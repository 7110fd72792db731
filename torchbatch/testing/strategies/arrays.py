"""Strategies for NumPy arrays and tensors: shapes, dtypes, values, and how they lie in memory."""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from torchbatch.errors import AxisSpecError, InputTypeError

__all__ = ["LAYOUTS", "arrays", "dtypes", "shapes", "tensors"]

Shape = tuple[int, ...]

#: How a tensor may lie in memory, the plainest first. NumPy arrays may have a ``"negative_stride"``, too.
LAYOUTS = ("contiguous", "transposed", "strided", "expanded", "storage_offset")

_KINDS = {
    "float": ("float32", "float64", "float16", "bfloat16"),
    "int": ("int64", "int32", "int16", "int8", "uint8"),
    "bool": ("bool",),
    "complex": ("complex64", "complex128"),
}
_FLOATS = {*_KINDS["float"], *_KINDS["complex"]}
_PARTS = {"complex64": "float32", "complex128": "float64"}


# --- shapes and dtypes -----------------------------------------------------------------------------------------------


def shapes(
    *, min_dims: int = 0, max_dims: int = 3, min_side: int = 0, max_side: int = 4
) -> st.SearchStrategy[tuple[int, ...]]:
    """Shapes, which shrink to few axes of size 1; size 0 counts as the least simple.

    Args:
        min_dims, max_dims: how many axes.
        min_side, max_side: how long they are.

    Raises:
        AxisSpecError: there is no such shape.

    Example:
        >>> from torchbatch.testing.strategies import shapes
        >>> from hypothesis import find
        >>> find(shapes(), lambda shape: len(shape) == 2)
        (1, 1)
    """
    if not 0 <= min_dims <= max_dims or not 0 <= min_side <= max_side:
        raise AxisSpecError(
            f"shapes: there is no shape with {min_dims} to {max_dims} axes of size {min_side} to {max_side}. Give "
            "0 <= min_dims <= max_dims and 0 <= min_side <= max_side."
        )
    sides = [*range(max(min_side, 1), max_side + 1), *([0] if min_side == 0 else [])]
    return st.lists(st.sampled_from(sides), min_size=min_dims, max_size=max_dims).map(tuple)


def dtypes(*kinds: str, exclude: Collection[torch.dtype] = ()) -> st.SearchStrategy[torch.dtype]:
    """PyTorch's dtypes, ``torch.float32`` first.

    Args:
        kinds: some of ``"float"``, ``"int"``, ``"bool"`` and ``"complex"``; without any, all of them.
        exclude: dtypes to leave out.

    Raises:
        AxisSpecError: an unknown kind, or nothing is left.

    Example:
        >>> from torchbatch.testing.strategies import dtypes
        >>> from hypothesis import find
        >>> find(dtypes("float", "complex"), lambda dtype: True)
        torch.float32
    """
    unknown = [kind for kind in kinds if kind not in _KINDS]
    if unknown:
        raise AxisSpecError(f"dtypes: there is no kind {unknown[0]!r}; the kinds are {', '.join(map(repr, _KINDS))}.")
    found = [getattr(torch, name) for kind in kinds or _KINDS for name in _KINDS[kind]]
    left = [dtype for dtype in found if dtype not in exclude]
    if not left:
        raise AxisSpecError("dtypes: exclude leaves no dtype of these kinds.")
    return st.sampled_from(left)


def dtype_name(dtype: Any) -> str:
    """``"float32"`` for ``torch.float32``, ``np.float32``, ``np.dtype("f4")`` and ``"float32"``."""
    if isinstance(dtype, torch.dtype):
        return str(dtype).removeprefix("torch.")
    if dtype == "bfloat16":
        return "bfloat16"
    try:
        return str(np.dtype(dtype).name)
    except TypeError as error:
        raise AxisSpecError(f"dtype must be a torch.dtype or a NumPy dtype, but it is {dtype!r}.") from error


def _numpy_dtype(name: str) -> np.dtype[Any]:
    if name == "bfloat16":
        try:
            importlib.import_module("ml_dtypes")
        except ModuleNotFoundError as error:
            raise InputTypeError(
                "NumPy has no bfloat16 of its own: pip install ml_dtypes (it comes with pip install 'torchbatch[jax]'), "
                "or leave the dtype out: dtypes(exclude=[torch.bfloat16])."
            ) from error
    return np.dtype(name)


def _strategy(value: Any) -> st.SearchStrategy[Any]:
    return value if isinstance(value, st.SearchStrategy) else st.just(value)


def _checked_shape(shape: Any) -> Shape:
    sides = (shape,) if isinstance(shape, int) else tuple(shape)
    if not all(type(side) is int and side >= 0 for side in sides):
        raise AxisSpecError(f"shape must be a tuple of sizes, or a strategy that makes such tuples, but it is {shape!r}.")
    return sides


# --- values ----------------------------------------------------------------------------------------------------------


class Values(NamedTuple):
    """Which numbers an array has."""

    special: bool = False
    low: float | None = None
    high: float | None = None
    elements: st.SearchStrategy[Any] | None = None

    @functools.lru_cache  # noqa: B019  (a named tuple, which lives on in tests only)
    def strategy(self, name: str) -> st.SearchStrategy[Any]:
        """The elements of an array of dtype ``name``."""
        if self.elements is not None:
            return self.elements
        if name == "bool":
            return st.booleans()
        if name in _PARTS:
            part = self.strategy(_PARTS[name])
            return st.one_of(part.map(complex), st.builds(complex, part, part))
        return self._floats(name) if name in _FLOATS else self._integers(name)

    def bounds(self) -> tuple[float, float]:
        """The least and the largest of the ordinary numbers."""
        low = min(-10.0, (0 if self.high is None else self.high) - 10) if self.low is None else self.low
        high = max(10.0, low + 10) if self.high is None else self.high
        if not low <= high:
            raise AxisSpecError(f"min_value must not be above max_value, but they are {low} and {high}.")
        return low, high

    def _integers(self, name: str) -> st.SearchStrategy[Any]:
        kind, (low, high) = np.iinfo(name), self.bounds()
        least, most = max(math.ceil(low), int(kind.min)), min(math.floor(high), int(kind.max))
        if least > most:
            raise AxisSpecError(f"there is no {name} from min_value={low} to max_value={high}.")
        ordinary = st.integers(least, most)
        extremes = [value for value in (int(kind.max), int(kind.min), int(kind.max) - 1) if self._allows(value)]
        return st.one_of(ordinary, st.sampled_from(extremes)) if self.special and extremes else ordinary

    def _floats(self, name: str) -> st.SearchStrategy[Any]:
        low, high = self.bounds()
        least, most = _inward(low, name, math.inf), _inward(high, name, -math.inf)
        if not least <= most:
            raise AxisSpecError(f"there is no {name} from min_value={low} to max_value={high}.")
        width: Any = {"float16": 16, "float64": 64}.get(name, 32)
        ordinary = st.floats(least, most, width=width, allow_subnormal=False)
        parts = [ordinary.map(_chopped) if name == "bfloat16" else ordinary]
        if math.ceil(low) <= math.floor(high):
            whole = st.integers(math.ceil(low), math.floor(high)).map(float)
            parts.insert(0, whole.filter(lambda value: least <= value <= most and _is_exact(value, name)))
        extremes = [value for value in _special_floats(name) if self._allows(value)]
        return st.one_of(*parts, st.sampled_from(extremes)) if self.special and extremes else st.one_of(*parts)

    def _allows(self, value: float) -> bool:
        below = self.low is None or value >= self.low
        return below and (self.high is None or value <= self.high)


def _special_floats(name: str) -> list[float]:
    info = torch.finfo(getattr(torch, name))
    least = info.smallest_normal * info.eps  # the smallest subnormal number
    return [-0.0, math.nan, math.inf, -math.inf, info.max, info.min, info.smallest_normal, least, -least, 1 + info.eps]


def _chopped(value: float) -> float:
    """The next bfloat16 towards zero."""
    bits = np.float32(value).view(np.uint32) & np.uint32(0xFFFF0000)
    return float(bits.view(np.float32))


def _is_exact(value: float, name: str) -> bool:
    return (_chopped(value) if name == "bfloat16" else float(np.dtype(name).type(value))) == value


def _inward(bound: float, name: str, towards: float) -> float:
    """The number of this dtype that is next to a bound, on its inner side."""
    if name == "bfloat16":
        nearest = _chopped(bound)
        away = float((np.float32(nearest).view(np.uint32) + np.uint32(0x10000)).view(np.float32))
        outside = nearest < bound if towards > 0 else nearest > bound
        return away if outside else nearest
    found = np.dtype(name).type(bound)
    outside = found < bound if towards > 0 else found > bound
    return float(np.nextafter(found, found.dtype.type(towards)) if outside else found)


# --- places in memory ------------------------------------------------------------------------------------------------


class Place(NamedTuple):
    """Where the elements of an array lie in a stretch of memory; strides and offset count elements."""

    strides: Shape
    offset: int
    length: int


def _plain_strides(shape: Sequence[int]) -> list[int]:
    strides, step = [], 1
    for side in reversed(shape):
        strides.append(step)
        step *= max(side, 1)
    return strides[::-1]


def _contiguous(draw: st.DrawFn, shape: Shape) -> Place:
    return Place(tuple(_plain_strides(shape)), 0, math.prod(shape))


def _transposed(draw: st.DrawFn, shape: Shape) -> Place:
    orders = st.permutations(range(len(shape))).filter(lambda order: list(order) != sorted(order))
    order = draw(orders)
    strides = dict(zip(order, _plain_strides([shape[axis] for axis in order]), strict=True))
    return Place(tuple(strides[axis] for axis in range(len(shape))), 0, math.prod(shape))


def _strided(draw: st.DrawFn, shape: Shape) -> Place:
    axis, step = draw(st.integers(0, len(shape) - 1)), draw(st.integers(2, 3))
    room = [side * step if i == axis else side for i, side in enumerate(shape)]
    strides = _plain_strides(room)
    strides[axis] *= step
    return Place(tuple(strides), 0, math.prod(room))


def _expanded(draw: st.DrawFn, shape: Shape) -> Place:
    axis = draw(st.sampled_from([i for i, side in enumerate(shape) if side > 1]))
    room = [1 if i == axis else side for i, side in enumerate(shape)]
    strides = _plain_strides(room)
    strides[axis] = 0
    return Place(tuple(strides), 0, math.prod(room))


def _with_offset(draw: st.DrawFn, shape: Shape) -> Place:
    offset = draw(st.integers(1, 3))
    return Place(tuple(_plain_strides(shape)), offset, math.prod(shape) + offset)


def _backwards(draw: st.DrawFn, shape: Shape) -> Place:
    axis = draw(st.sampled_from([i for i, side in enumerate(shape) if side > 1]))
    strides = _plain_strides(shape)
    offset = (shape[axis] - 1) * strides[axis]
    strides[axis] *= -1
    return Place(tuple(strides), offset, math.prod(shape))


_PLACES: dict[str, Callable[[st.DrawFn, Shape], Place]] = {
    "contiguous": _contiguous,
    "transposed": _transposed,
    "strided": _strided,
    "expanded": _expanded,
    "storage_offset": _with_offset,
    "negative_stride": _backwards,
}


def _fits(layout: str, shape: Shape) -> bool:
    """Whether a shape can lie in memory in this way."""
    if layout == "transposed":
        return sum(side > 1 for side in shape) > 1
    if layout in ("expanded", "negative_stride"):
        return any(side > 1 for side in shape) and 0 not in shape
    return layout != "strided" or bool(shape)


def _draw_place(draw: st.DrawFn, shape: Shape, layouts: Sequence[str]) -> Place:
    fitting = [layout for layout in layouts if _fits(layout, shape)]
    return _PLACES[draw(st.sampled_from(fitting or ["contiguous"]))](draw, shape)


def _checked_layouts(layouts: Sequence[str], known: Sequence[str], what: str) -> tuple[str, ...]:
    names = (layouts,) if isinstance(layouts, str) else tuple(layouts)
    for name in names or [""]:
        if name not in known:
            hint = " PyTorch has no negative strides." if name == "negative_stride" else ""
            raise AxisSpecError(f"{what}: there is no layout {name!r}; the layouts are {', '.join(map(repr, known))}.{hint}")
    return names


class _Memory(NamedTuple):
    """A stretch of memory with an array somewhere in it; the gaps hold what should never be read."""

    memory: np.ndarray[Any, Any]
    shape: Shape
    place: Place

    def view(self, memory: np.ndarray[Any, Any], *, writeable: bool = True) -> np.ndarray[Any, Any]:
        """The array, in a stretch of memory like this one."""
        strides = [stride * memory.itemsize for stride in self.place.strides]
        start = memory[self.place.offset :]
        return np.lib.stride_tricks.as_strided(start, self.shape, strides, writeable=writeable)


@st.composite
def _memories(draw: st.DrawFn, shape: Any, name: str, layouts: Sequence[str], values: Values) -> _Memory:
    sides = _checked_shape(draw(_strategy(shape)))
    place = _draw_place(draw, sides, layouts)
    carrier = np.dtype("float32" if name == "bfloat16" else name)
    numbers = draw(hnp.arrays(carrier, sides, elements=values.strategy(name)))
    gap = {"b": True, "i": 77, "u": 77}.get(carrier.kind, math.nan)
    found = _Memory(np.full(place.length, gap, carrier), sides, place)
    if numbers.size:
        found.view(found.memory)[...] = numbers
    return found


# --- arrays and tensors ----------------------------------------------------------------------------------------------


@st.composite
def _drawn_array(draw: st.DrawFn, shape: Any, dtype: Any, layouts: Sequence[str], values: Values) -> np.ndarray[Any, Any]:
    name = dtype_name(draw(_strategy(dtype)))
    wanted = _numpy_dtype(name)
    found = draw(_memories(shape, name, layouts, values))
    once = all(stride or side == 1 for stride, side in zip(found.place.strides, found.shape, strict=True))
    return found.view(found.memory.astype(wanted, copy=False), writeable=once)


def arrays(
    shape: Any = None,
    dtype: Any = None,
    *,
    layouts: Sequence[str] = (*LAYOUTS, "negative_stride"),
    special_values: bool = False,
    min_value: float | None = None,
    max_value: float | None = None,
    elements: st.SearchStrategy[Any] | None = None,
) -> st.SearchStrategy[np.ndarray[Any, Any]]:
    """NumPy arrays.

    Args:
        shape: a shape, or a strategy for shapes (default: :func:`shapes`).
        dtype: a dtype of NumPy or PyTorch, or a strategy for them (default: :func:`dtypes` without bfloat16).
        layouts: how the array may lie in memory. ``"negative_stride"`` runs backwards along an axis; the others are those of
            :func:`tensors`. What cannot be had for a shape is left out; an ``"expanded"`` array is read-only.
        special_values, min_value, max_value, elements: as for :func:`tensors`.

    Raises:
        AxisSpecError: an argument is of the wrong kind, or there are no such arrays.

    Example:
        >>> import numpy as np
        >>> from torchbatch.testing.strategies import arrays
        >>> from hypothesis import find
        >>> find(arrays(3, np.float32), lambda array: array.sum() > 2)
        array([0., 0., 3.], dtype=float32)
    """
    names = _checked_layouts(layouts, tuple(_PLACES), "arrays")
    shape = shapes() if shape is None else shape
    dtype = dtypes(exclude=[torch.bfloat16]) if dtype is None else dtype
    return _drawn_array(shape, dtype, names, Values(special_values, min_value, max_value, elements))


@st.composite
def _drawn_tensor(
    draw: st.DrawFn, shape: Any, dtype: Any, layouts: Sequence[str], values: Values, requires_grad: Any, device: Any
) -> torch.Tensor:
    name = dtype_name(draw(_strategy(dtype)))
    found = draw(_memories(shape, name, layouts, values))
    memory = torch.from_numpy(found.memory).to(device=device, dtype=getattr(torch, name))
    tensor = memory.as_strided(found.shape, found.place.strides, found.place.offset)
    return tensor.requires_grad_() if name in _FLOATS and draw(_strategy(requires_grad)) else tensor


def tensors(
    shape: Any = None,
    dtype: Any = None,
    *,
    layouts: Sequence[str] = LAYOUTS,
    special_values: bool = False,
    min_value: float | None = None,
    max_value: float | None = None,
    elements: st.SearchStrategy[Any] | None = None,
    requires_grad: bool | st.SearchStrategy[bool] = False,
    device: torch.device | str = "cpu",
) -> st.SearchStrategy[torch.Tensor]:
    """Tensors, which shrink to small whole numbers that are contiguous in memory.

    Args:
        shape: a shape, or a strategy for shapes (default: :func:`shapes`).
        dtype: a dtype, or a strategy for dtypes (default: :func:`dtypes`).
        layouts: how a tensor may lie in memory: ``"contiguous"``; ``"transposed"``, axes in another order; ``"strided"``, with
            gaps; ``"expanded"``, all the same along one axis; ``"storage_offset"``, not at the beginning. What cannot be had
            for a shape is left out. Gaps hold NaN, or 77, so that who reads them gets a wrong result.
        special_values: whether NaN, infinities, -0.0, subnormal numbers, the largest and the smallest of the dtype are among
            the values, as far as ``min_value`` and ``max_value`` allow.
        min_value, max_value: bounds for the values (for the parts of complex ones); by default -10 and 10 for the ordinary ones,
            and none for the special ones.
        elements: a strategy for the values, instead of all this.
        requires_grad: whether tensors require gradients, where their dtype can.
        device: where they are.

    Raises:
        AxisSpecError: an argument is of the wrong kind, or there are no such tensors.

    Example:
        >>> import torch
        >>> from torchbatch.testing.strategies import tensors
        >>> from hypothesis import find
        >>> find(tensors((2, 2), torch.float32), lambda x: not x.is_contiguous())
        tensor([[0., 0.],
                [0., 0.]])
    """
    names = _checked_layouts(layouts, LAYOUTS, "tensors")
    shape = shapes() if shape is None else shape
    dtype = dtypes() if dtype is None else dtype
    values = Values(special_values, min_value, max_value, elements)
    return _drawn_tensor(shape, dtype, names, values, requires_grad, device)
