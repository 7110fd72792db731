"""What tests compare: the numbers of any array, as NumPy's, and what else is known of it."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch

from torchbatch.errors import InputTypeError

#: Formats of floating-point numbers: the distance from 1 to the next number, and the smallest normal number.
FORMATS: dict[str, tuple[float, float]] = {
    "float64": (2.0**-52, 2.0**-1022),
    "float32": (2.0**-23, 2.0**-126),
    "float16": (2.0**-10, 2.0**-14),
    "bfloat16": (2.0**-7, 2.0**-126),
    "float8_e4m3fn": (2.0**-3, 2.0**-6),
    "float8_e5m2": (2.0**-2, 2.0**-14),
    "float8_e4m3fnuz": (2.0**-3, 2.0**-7),
    "float8_e5m2fnuz": (2.0**-2, 2.0**-15),
}
_REAL = {"complex128": "float64", "complex64": "float32", "complex32": "float16"}
_LONG = ("float96", "float128", "complex192", "complex256")  # NumPy's, which are compared as float64
_KINDS = {"O": "Python objects", "U": "text", "S": "text", "M": "dates", "m": "times", "T": "text"}
_WIDER = {torch.bfloat16: torch.float32, torch.complex32: torch.complex64}


class Values(NamedTuple):
    """An array as it is compared.

    Attributes:
        numbers: NumPy's array of float64, complex128, int64, uint64 or bool: every number as it is, if one of these holds it.
        dtype: the name that all frameworks give the type, such as ``"bfloat16"``; ``"number"`` for a Python number.
        device: where the array was, such as ``"cpu"`` or ``"cuda:0"``.
    """

    numbers: np.ndarray
    dtype: str
    device: str = "cpu"

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape, ``()`` for a number."""
        return self.numbers.shape

    @property
    def format(self) -> str | None:
        """The format of its floating-point numbers; None for whole numbers and bools."""
        if self.dtype == "number" or self.dtype in _LONG:
            return "float64" if self.numbers.dtype.kind in "fc" else None
        name = _REAL.get(self.dtype, self.dtype)
        return name if name in FORMATS else None

    def __str__(self) -> str:
        return f"{self.dtype}{list(self.shape)}"


def is_array(value: Any) -> bool:
    """Whether :func:`read` takes it: a tensor, an array, a number, or what was read of one."""
    if isinstance(value, Values | torch.Tensor | np.ndarray | np.generic | bool | int | float | complex):
        return True
    return hasattr(value, "__array__") and hasattr(value, "dtype") and hasattr(value, "shape")


def read(value: Any) -> Values:
    """The numbers of a tensor, a NumPy or JAX array, or a Python number. Nothing but NumPy's long double is rounded.

    Raises:
        InputTypeError: it is none of them, or has no numbers.
    """
    if isinstance(value, Values):
        return value
    if isinstance(value, torch.Tensor):
        return Values(_of_tensor(value), str(value.dtype).removeprefix("torch."), str(value.device))
    if isinstance(value, bool | int | float | complex):
        return Values(_wide(np.asarray(value)), "number")
    if not is_array(value):
        raise InputTypeError(f"only arrays and numbers can be compared, but this is {value!r} of type {type(value).__name__}.")
    return Values(_wide(np.asarray(value)), str(value.dtype), _device_of(value))


def _of_tensor(tensor: torch.Tensor) -> np.ndarray:
    if tensor.is_meta or tensor.is_nested:
        what = "on the device meta, which holds no numbers" if tensor.is_meta else "nested: compare the tensors in it"
        raise InputTypeError(f"only arrays and numbers can be compared, but this tensor is {what}.")
    plain = tensor.detach().to_dense() if tensor.layout is not torch.strided else tensor.detach()
    plain = plain.dequantize() if plain.is_quantized else plain
    plain = plain.resolve_conj().resolve_neg().cpu()
    if plain.dtype in _WIDER or (plain.dtype.itemsize == 1 and plain.dtype.is_floating_point):
        plain = plain.to(_WIDER.get(plain.dtype, torch.float32))
    return _wide(plain.numpy())


def _wide(array: np.ndarray) -> np.ndarray:
    """The same numbers in the widest type of their kind."""
    if array.dtype.kind == "b":
        return array
    if array.dtype.kind in "iu":
        return array.astype(np.uint64 if array.dtype.kind == "u" else np.int64)
    if array.dtype.kind in _KINDS:
        raise InputTypeError(f"an array of {_KINDS[array.dtype.kind]} cannot be compared: {array!r}.")
    return array.astype(np.complex128 if array.dtype.kind == "c" else np.float64)


def _device_of(array: Any) -> str:
    """The device of an array that is no tensor; JAX calls a CUDA device ``cuda:0`` too."""
    device = getattr(array, "device", "cpu")
    platform = getattr(device, "platform", None)
    if platform is None or platform == "cpu":
        return "cpu"
    return f"{'cuda' if platform == 'gpu' else platform}:{getattr(device, 'id', 0)}"
