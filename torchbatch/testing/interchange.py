"""Trees of arrays from one framework to another: PyTorch, NumPy and JAX, in the same memory where that can be."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from torchbatch import random, tree
from torchbatch.errors import AxisSpecError, InputTypeError, UnsupportedOperationError
from torchbatch.testing.optional import imported, require

# The types that both PyTorch and NumPy have, by the name that they have in both; and those that NumPy has by ml_dtypes, each
# with a type of the same size that both have.
_SHARED = "bool uint8 uint16 uint32 uint64 int8 int16 int32 int64 float16 float32 float64 complex64 complex128".split()
_BY_ML_DTYPES = {
    "bfloat16": "int16",
    **dict.fromkeys("float8_e4m3fn float8_e4m3fnuz float8_e5m2 float8_e5m2fnuz float8_e8m0fnu".split(), "uint8"),
}
_NARROW = {"int64": "int32", "uint64": "uint32", "float64": "float32", "complex128": "complex64"}
_PLAIN = (bool, int, float, complex, str, bytes)
_PROTOCOLS = ("__array__", "__array_interface__", "__dlpack__", "__cuda_array_interface__")
_Array = Any
_Change = Callable[[Any, str], Any]


def to_jax(values: Any, *, copy: bool | None = None, narrow: bool | str = False) -> Any:
    """A tree whose tensors and NumPy arrays are JAX arrays.

    Args:
        values: a tree. Tensors, NumPy arrays and NumPy numbers are converted, keys of :mod:`torchbatch.random` become JAX's keys,
            JAX arrays stay. What is no array stays too: Python numbers, strings, functions, None.
        copy: True gives every array memory of its own; None shares the memory where that can be; False shares it or raises an
            error. JAX arrays are constants to JAX: **whoever writes into a tensor that shares the memory changes the array**,
            and functions compiled with it may or may not see that.
        narrow: what becomes of 64-bit numbers while JAX has none, because ``jax_enable_x64`` is off. False raises an error. True
            makes 32-bit numbers of them: floating-point numbers are rounded, integers have to fit. ``"exact"`` does so if no
            number changes.

    Returns:
        A tree of the same structure. Arrays are where the tensors were: on the processor, or on the same GPU.

    Raises:
        ImportError: JAX is not installed.
        InputTypeError: a leaf has no counterpart: a sparse, quantized or meta tensor; a tensor inside ``vmap``, ``grad`` or
            ``jit``; a type that JAX does not have; 64-bit numbers, see ``narrow``; a module; an array of another library.
        UnsupportedOperationError: ``copy=False``, and the memory cannot be shared; or JAX would draw other numbers from a key.
        AxisSpecError: an option has no such value.

    The memory is shared if the tensor is contiguous, is in main memory at an address that is a multiple of 64, as new tensors
    are, and has a type that JAX has at the time. Gradients do not flow from one framework to the other: a tensor that requires
    a gradient is taken as it is, detached.

    Example:
        >>> import jax, torch
        >>> from torchbatch.testing.interchange import from_jax, to_jax
        >>> values = to_jax({"x": torch.ones(2, dtype=torch.bfloat16), "n": 3})
        >>> values["x"].dtype, values["n"]
        (dtype(bfloat16), 3)
        >>> from_jax(jax.tree.map(lambda x: x + 1, values))
        {'n': 4, 'x': tensor([2., 2.], dtype=torch.bfloat16)}

    Source: ``jax.dlpack.from_dlpack``, with the rules of Python's array API standard for ``copy``.
    """
    jax = require("jax", "to_jax", "jax")
    _check_copy("to_jax", copy)
    if narrow not in (True, False, "exact"):
        raise AxisSpecError(f"to_jax: narrow must be True, False or 'exact', but it is {narrow!r}.")
    return _converted(values, functools.partial(_to_jax, jax=jax, copy=copy, narrow=narrow), "to_jax", "tree")


def from_jax(values: Any, *, copy: bool | None = None) -> Any:
    """A tree whose JAX and NumPy arrays are tensors.

    Args:
        values: a tree. JAX arrays, NumPy arrays and NumPy numbers are converted, JAX's keys become keys of
            :mod:`torchbatch.random`, and ``float0``, the derivative of integers, zeros of bool. Tensors stay, and so does what is
            no array.
        copy: as in :func:`to_jax`. **Writing into a tensor that shares its memory with a JAX array changes the array**, which
            JAX takes for a constant. For tensors that are written to, say ``copy=True``.

    Returns:
        A tree of the same structure; tensors are where the arrays were, and require no gradient. Nodes of trees that only JAX
        knows, such as Flax's, are looked into, too.

    Raises:
        InputTypeError: a leaf has no counterpart: a value inside ``jax.jit``, ``jax.grad`` or ``jax.vmap``, an array that was
            deleted, a type that PyTorch does not have, a key of another generator than Threefry, an array of another library.
        UnsupportedOperationError: ``copy=False``, and the memory cannot be shared.
        AxisSpecError: ``copy`` has no such value.

    Example:
        >>> import jax.numpy as jnp
        >>> from torchbatch.testing.interchange import from_jax
        >>> from_jax((jnp.arange(3), None))
        (tensor([0, 1, 2], dtype=torch.int32), None)

    Source: ``torch.from_dlpack``.
    """
    return _to_tensors("from_jax", values, copy)


def to_numpy(values: Any, *, copy: bool | None = None) -> Any:
    """A tree whose tensors and JAX arrays are NumPy arrays.

    Args:
        values: a tree. Tensors and JAX arrays are converted, NumPy's stay; keys become their words, arrays of uint32. What is no
            array stays too.
        copy: as in :func:`to_jax`. An array that shares its memory with a tensor can be written to, and so changes the tensor;
            one that shares it with a JAX array is read-only.

    Returns:
        A tree of the same structure. ``bfloat16`` and 8-bit floating-point numbers have the types of ``ml_dtypes``.

    Raises:
        ImportError: ``ml_dtypes`` is needed and not installed.
        InputTypeError: as in :func:`to_jax` and :func:`from_jax`.
        UnsupportedOperationError: ``copy=False``, and the memory cannot be shared: the array is on a GPU, say.
        AxisSpecError: ``copy`` has no such value.

    Example:
        >>> import torch
        >>> from torchbatch.testing.interchange import to_numpy
        >>> to_numpy([torch.ones(2, requires_grad=True), 3])
        [array([1., 1.], dtype=float32), 3]
    """
    _check_copy("to_numpy", copy)
    return _converted(values, functools.partial(_to_numpy, copy=copy), "to_numpy", "tree")


def from_numpy(values: Any, *, copy: bool | None = None) -> Any:
    """A tree whose NumPy (and JAX) arrays are tensors.

    Args:
        values: a tree. NumPy arrays and numbers are converted, tensors stay. What is no array stays too.
        copy: as in :func:`to_jax`. PyTorch cannot share every array: one that is read-only, has negative strides or the other
            order of bytes is copied; ``copy=False`` refuses it.

    Returns:
        A tree of the same structure.

    Raises:
        InputTypeError: a leaf has no counterpart: an array of strings, objects, dates, records or long doubles, a masked array.
        UnsupportedOperationError: ``copy=False``, and the memory cannot be shared.
        AxisSpecError: ``copy`` has no such value.

    Example:
        >>> import numpy as np
        >>> from torchbatch.testing.interchange import from_numpy
        >>> from_numpy({"x": np.arange(3)[::-1], "name": "sum"})
        {'x': tensor([2, 1, 0]), 'name': 'sum'}

    Source: ``torch.from_numpy``.
    """
    return _to_tensors("from_numpy", values, copy)


# --- trees -----------------------------------------------------------------------------------------------------------


def _check_copy(who: str, copy: Any) -> None:
    if copy is not None and not isinstance(copy, bool):
        raise AxisSpecError(f"{who}: copy must be True, False or None, but it is {copy!r} of type {type(copy).__name__}.")


def _converted(values: Any, change: _Change, who: str, root: str) -> Any:
    """The tree with ``change(leaf, where)`` for each array and each key."""
    pairs, treedef = tree.flatten_with_path(values, is_leaf=_is_key)
    return tree.unflatten(treedef, [_leaf(leaf, change, who, root + tree.keystr(path)) for path, leaf in pairs])


def _leaf(leaf: Any, change: _Change, who: str, where: str) -> Any:
    if isinstance(leaf, torch.Tensor | np.ndarray | np.generic) or _is_key(leaf) or _is_jax(leaf):
        return change(leaf, f"{who}: {where}")
    if leaf is None or isinstance(leaf, _PLAIN):
        return leaf
    if isinstance(leaf, torch.nn.Module):
        raise InputTypeError(
            f"{who}: {where} is a module of type {type(leaf).__name__}. Pass its parameters and buffers: "
            "state_dict_to_jax(module) makes a JAX tree of them, and module.state_dict() is a dict."
        )
    if any(hasattr(type(leaf), protocol) for protocol in _PROTOCOLS):
        raise InputTypeError(
            f"{who}: {where} is an array of type {type(leaf).__name__}, which is neither PyTorch's, NumPy's nor JAX's. Make it "
            "one of theirs before, with numpy.asarray, say."
        )
    return _jax_node(leaf, change, who, where)


def _jax_node(leaf: Any, change: _Change, who: str, where: str) -> Any:
    """What is a leaf here, but may be a node of trees in JAX; a real leaf stays as it is."""
    jax = imported("jax")
    if jax is None or jax.tree_util.all_leaves([leaf]):
        return leaf
    keystr = jax.tree_util.keystr
    return jax.tree_util.tree_map_with_path(lambda path, x: _converted(x, change, who, where + keystr(path)), leaf)


def _is_key(value: Any) -> bool:
    return isinstance(value, random.Key)


def _is_jax(value: Any) -> bool:
    jax = imported("jax")
    return jax is not None and isinstance(value, jax.Array)


# --- messages --------------------------------------------------------------------------------------------------------


def _described(value: Any) -> str:
    """``bfloat16[2,3]``."""
    return f"{str(value.dtype).removeprefix('torch.')}[{','.join(map(str, value.shape))}]"


def _cannot_share(where: str, value: Any, why: str) -> UnsupportedOperationError:
    return UnsupportedOperationError(f"{where} is {_described(value)}, and copy is False, but {why}. Say copy=None or copy=True.")


def _no_counterpart(where: str, value: Any, library: str, hint: str) -> InputTypeError:
    return InputTypeError(f"{where} is {_described(value)}, a type that {library} does not have. {hint}")


# --- tensors and NumPy -----------------------------------------------------------------------------------------------


def _name(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _array_of(tensor: torch.Tensor, where: str, copy: bool | None) -> np.ndarray:
    """The numbers of a tensor as a NumPy array: in the same memory, if that can be."""
    _check_tensor(tensor, where)
    plain = _in_memory(tensor, where)
    if copy is False and plain is not tensor:
        obstacles = {"it is on a GPU": tensor.device.type != "cpu", "its conjugate is not computed yet": tensor.is_conj()}
        why = next((why for why, is_so in obstacles.items() if is_so), "its negative is not computed yet")
        raise _cannot_share(where, tensor, why)
    name = _name(tensor)
    dtype = None if name in _SHARED else getattr(_ml_dtypes(tensor, where), name)
    array = _numpy(plain.detach() if dtype is None else plain.detach().view(getattr(torch, _BY_ML_DTYPES[name])), tensor, where)
    array = array if dtype is None else array.view(dtype)
    return array.copy() if copy and plain is tensor else array


def _check_tensor(tensor: torch.Tensor, where: str) -> None:
    lacking = {
        "is a lazy parameter, which has no numbers yet. Call its module once before": torch.nn.parameter.is_lazy(tensor),
        "is a nested tensor. Convert its parts, tensor.unbind()": tensor.is_nested,
        "is sparse. Convert tensor.to_dense()": not tensor.is_nested and tensor.layout is not torch.strided,
        "is quantized. Convert tensor.dequantize(), or tensor.int_repr()": tensor.is_quantized,
        "is on the meta device, and has no numbers": tensor.device.type == "meta",
    }
    for text, is_so in lacking.items():
        if is_so:
            raise InputTypeError(f"{where} {text}.")
    if _name(tensor) not in _SHARED and _name(tensor) not in _BY_ML_DTYPES:
        raise _no_counterpart(where, tensor, "NumPy or JAX", "Convert it before: tensor.to(dtype).")


def _in_memory(tensor: torch.Tensor, where: str) -> torch.Tensor:
    """The tensor itself, if its numbers are in main memory as they are; otherwise a copy."""
    if tensor.device.type == "cpu" and not tensor.is_conj() and not tensor.is_neg():
        return tensor
    return tensor.detach().cpu().resolve_conj().resolve_neg()


def _numpy(plain: torch.Tensor, tensor: torch.Tensor, where: str) -> np.ndarray:
    try:
        return plain.numpy()
    except (RuntimeError, TypeError) as error:
        raise InputTypeError(
            f"{where} is {_described(tensor)} without memory of its own: a value inside vmap, grad or a function that is being "
            "traced. Convert outside of the transform."
        ) from error


def _ml_dtypes(value: Any, where: str) -> Any:
    try:
        return require("ml_dtypes", where, "jax")
    except ImportError as error:
        raise ImportError(
            f"{where} is {_described(value)}, a type that NumPy has by the package ml_dtypes, which is not installed: "
            "pip install 'torchbatch[jax]', which brings it, or convert to float32 before."
        ) from error


def _tensor_of(array: np.ndarray, where: str, copy: bool | None) -> torch.Tensor:
    """A tensor in the memory of a NumPy array, if that can be."""
    name = array.dtype.name
    if name not in _SHARED and name not in _BY_ML_DTYPES:
        raise _no_counterpart(where, array, "PyTorch", "Convert it before: array.astype(dtype).")
    obstacle = None if copy else _obstacle(array)
    if obstacle is not None and copy is False:
        raise _cannot_share(where, array, obstacle)
    if copy or obstacle is not None:
        array = np.array(array, dtype=array.dtype.newbyteorder("="), order="C")
    if name in _SHARED:
        return torch.from_numpy(array)
    found: torch.Tensor = torch.from_numpy(array.view(_BY_ML_DTYPES[name])).view(getattr(torch, name))
    return found


def _obstacle(array: np.ndarray) -> str | None:
    """Why PyTorch cannot use the memory of an array, or None if it can."""
    if not array.dtype.isnative:
        return "its bytes are in the other order"
    if not array.flags.writeable:
        return "the array is read-only, and a tensor is not"
    if any(stride < 0 for stride in array.strides):
        return "it has negative strides"
    if any(stride % array.itemsize for stride in array.strides) or not array.flags.aligned:
        return "its strides are no multiples of the size of a number"
    return None


def _is_float0(leaf: Any) -> bool:
    """Whether it is what JAX takes for the derivative of integers: a NumPy array without numbers."""
    return isinstance(leaf, np.ndarray) and leaf.dtype.names == ("float0",)


def _plain(value: Any, where: str) -> np.ndarray:
    """A NumPy array or number as an array of the base class."""
    if isinstance(value, np.ma.MaskedArray):
        raise InputTypeError(f"{where} is a masked array. Convert array.filled(value), or its data and its mask.")
    return np.asarray(value)


# --- each leaf -------------------------------------------------------------------------------------------------------


def _to_numpy(leaf: Any, where: str, copy: bool | None) -> _Array:
    if _is_key(leaf):
        return _array_of(random.key_data(leaf), where, None if copy else copy)
    if isinstance(leaf, torch.Tensor):
        return _array_of(leaf, where, copy)
    if isinstance(leaf, np.ndarray | np.generic):
        return leaf.copy() if copy else leaf
    return _jax_to_numpy(_checked_jax(leaf, where), where, copy)


def _jax_to_numpy(leaf: Any, where: str, copy: bool | None) -> np.ndarray:
    array = np.asarray(leaf)
    if copy is False and leaf.size and not _same_memory(leaf, array):
        raise _cannot_share(where, leaf, "its numbers are not in main memory as NumPy wants them")
    return array.copy() if copy else array


def _same_memory(leaf: Any, array: np.ndarray) -> bool:
    one = len(leaf.devices()) == 1 and next(iter(leaf.devices())).platform == "cpu"
    return bool(one and leaf.unsafe_buffer_pointer() == array.ctypes.data)


def _to_tensors(who: str, values: Any, copy: bool | None) -> Any:
    _check_copy(who, copy)
    return _converted(values, functools.partial(_to_torch, copy=copy), who, "tree")


def _to_torch(leaf: Any, where: str, copy: bool | None) -> Any:
    if _is_key(leaf):
        return random.wrap_key_data(random.key_data(leaf), partitionable=leaf.partitionable) if copy else leaf
    if isinstance(leaf, torch.Tensor):
        return leaf.detach().clone() if copy else leaf
    if isinstance(leaf, np.generic) and copy is False:
        raise _cannot_share(where, leaf, "a NumPy number has no memory that can be shared")
    if _is_float0(leaf):
        return torch.zeros(leaf.shape, dtype=torch.bool)
    if isinstance(leaf, np.ndarray | np.generic):
        return _tensor_of(_plain(leaf, where), where, copy)
    leaf = _checked_jax(leaf, where, keys=True)
    return _key_from_jax(leaf, where) if _is_jax_key(leaf) else _jax_to_torch(leaf, where, copy)


def _jax_to_torch(leaf: Any, where: str, copy: bool | None) -> torch.Tensor:
    name = leaf.dtype.name
    if name not in _SHARED and name not in _BY_ML_DTYPES:
        raise _no_counterpart(where, leaf, "PyTorch", "Convert it before: array.astype(dtype).")
    try:
        shared = torch.utils.dlpack.from_dlpack(leaf)
    except (BufferError, RuntimeError, TypeError) as error:  # on several devices, say, or a type that DLPack did not have
        if copy is False:
            raise _cannot_share(where, leaf, f"DLPack cannot hand it over ({str(error).splitlines()[0]})") from error
        return _tensor_of(np.asarray(leaf), where, True)
    return shared.clone() if copy else shared


def _to_jax(leaf: Any, where: str, jax: Any, copy: bool | None, narrow: bool | str) -> Any:
    if _is_key(leaf):
        return _key_to_jax(leaf, where, jax)
    if _is_jax(leaf) or _is_float0(leaf):
        return leaf.copy() if copy else leaf
    if isinstance(leaf, torch.Tensor) and leaf.device.type == "cuda":
        return _cuda_to_jax(leaf, where, jax, copy, narrow)
    array = _array_of(leaf, where, None if copy else copy) if isinstance(leaf, torch.Tensor) else _plain(leaf, where)
    narrowed = _narrowed(array, where, jax, narrow)
    if copy is False and narrowed is not array:
        raise _cannot_share(where, leaf, "JAX has no 64-bit numbers (jax_enable_x64 is off)")
    return _array_to_jax(narrowed, where, jax, copy)


def _array_to_jax(array: np.ndarray, where: str, jax: Any, copy: bool | None) -> Any:
    if not array.dtype.isnative and copy is False:
        raise _cannot_share(where, array, "its bytes are in the other order")
    if copy or not array.dtype.isnative:
        array = np.array(array, dtype=array.dtype.newbyteorder("="), order="C")
    try:
        with jax.default_device(jax.local_devices(backend="cpu")[0]):
            found = jax.device_put(array)
    except TypeError as error:
        raise _no_counterpart(where, array, "JAX", "Convert it before.") from error
    found.block_until_ready()  # or a write into the array may still come before JAX has read it
    if copy is False and array.size and found.unsafe_buffer_pointer() != array.ctypes.data:
        raise _cannot_share(where, array, "JAX shares contiguous memory at an address that is a multiple of 64 only")
    return found


# --- 64-bit numbers --------------------------------------------------------------------------------------------------


def _narrowed(array: np.ndarray, where: str, jax: Any, narrow: bool | str) -> np.ndarray:
    """The array in a type that JAX has now."""
    narrower = _NARROW.get(array.dtype.name)
    if narrower is None or jax.config.jax_enable_x64:
        return array
    if not narrow:
        raise InputTypeError(
            f"{where} is {_described(array)}, but JAX has no 64-bit numbers while jax_enable_x64 is off: it would make "
            f"{narrower} of it. Turn them on with jax.config.update('jax_enable_x64', True), or for a while with "
            f"jax.experimental.enable_x64(); or say narrow=True for {narrower}."
        )
    with np.errstate(all="ignore"):
        found = array.astype(narrower)
        same = np.array_equal(found.astype(array.dtype), array, equal_nan=array.dtype.kind in "fc")
    if not same and (array.dtype.kind in "iu" or narrow == "exact"):
        raise InputTypeError(
            f"{where} is {_described(array)}, and not all of its numbers are numbers of {narrower}, the type that JAX would give "
            "it while jax_enable_x64 is off. Turn 64-bit numbers on: jax.config.update('jax_enable_x64', True)."
        )
    return found


# --- GPUs ------------------------------------------------------------------------------------------------------------


def _cuda_to_jax(tensor: torch.Tensor, where: str, jax: Any, copy: bool | None, narrow: bool | str) -> Any:
    """Through DLPack, on the same GPU, or an error: nothing is moved from device to device."""
    _check_tensor(tensor, where)
    plain = tensor.detach().resolve_conj().resolve_neg()
    if _name(tensor) in _NARROW and not jax.config.jax_enable_x64:
        narrowed = _narrowed(_array_of(tensor, where, None), where, jax, narrow)
        plain = plain.to(getattr(torch, narrowed.dtype.name))
    if copy is False and plain.data_ptr() != tensor.data_ptr():
        raise _cannot_share(where, tensor, "JAX cannot have it as it is")
    plain = plain.clone(memory_format=torch.contiguous_format) if copy or (copy is None and not plain.is_contiguous()) else plain
    try:
        return jax.dlpack.from_dlpack(plain)
    except RuntimeError as error:
        raise InputTypeError(
            f"{where} is {_described(tensor)} on {tensor.device}, but JAX cannot use it there: {str(error).splitlines()[0]} "
            "Install JAX for this GPU, or convert tensor.cpu()."
        ) from error


# --- JAX's own -------------------------------------------------------------------------------------------------------


def _checked_jax(leaf: Any, where: str, keys: bool = False) -> Any:
    """A JAX array that has numbers; typed keys as their words, unless ``keys`` are wanted."""
    jax = require("jax", where, "jax")
    if isinstance(leaf, jax.core.Tracer):
        raise InputTypeError(
            f"{where} is {_described(leaf)} without numbers: a value inside jax.jit, jax.grad, jax.vmap or another transform. "
            "Convert outside of it, or call the other framework with jax.pure_callback."
        )
    if leaf.is_deleted():
        raise InputTypeError(f"{where} is {_described(leaf)} and was deleted: it was donated to a function.")
    return jax.random.key_data(leaf) if _is_jax_key(leaf) and not keys else leaf


def _is_jax_key(leaf: Any) -> bool:
    jax = require("jax", "from_jax", "jax")
    return bool(jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key))


def _key_from_jax(leaf: Any, where: str) -> random.Key:
    jax = require("jax", where, "jax")
    implementation = str(jax.random.key_impl(leaf))
    if "threefry2x32" not in implementation:
        raise InputTypeError(
            f"{where} is a key of JAX's generator {implementation}, which torchbatch does not have. Convert its words, "
            "jax.random.key_data(key)."
        )
    words = np.asarray(jax.random.key_data(leaf))
    return random.wrap_key_data(words, partitionable=bool(jax.config.jax_threefry_partitionable))


def _key_to_jax(key: random.Key, where: str, jax: Any) -> Any:
    if key.partitionable is not bool(jax.config.jax_threefry_partitionable):
        raise UnsupportedOperationError(
            f"{where} is a key with partitionable={key.partitionable}, but JAX would draw other numbers from it: "
            f"jax_threefry_partitionable is {bool(jax.config.jax_threefry_partitionable)}. Set it with jax.config.update."
        )
    return jax.random.wrap_key_data(_array_of(random.key_data(key), where, True), impl="threefry2x32")
