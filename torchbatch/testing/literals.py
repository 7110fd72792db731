"""Values as Python source: numbers, arrays with their place in memory, trees of them."""

from __future__ import annotations

import base64
import collections
import dataclasses
import inspect
import math
import sys
import textwrap
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from torchbatch import tree

__all__ = ["Writer", "from_library"]

SMALL = 64  # arrays with more elements are written as compressed bytes
_FAR = 1024  # a place in memory further from its beginning is brought closer, with the same alignment
_PLAIN = (bool, int, str, bytes, range, slice, type(None), type(...), type(NotImplemented))
_LIBRARIES = {"torch", "torchbatch", "numpy", "jax", "math"}

Write = Callable[[str, Any], str]


def from_library(module: str | None) -> bool:
    """Whether a module is one that a fresh process has, too."""
    root = (module or "").partition(".")[0]
    return root in _LIBRARIES or (root in sys.stdlib_module_names and root != "__main__")


class Writer:
    """Writes values, and keeps what has to stand above them.

    Attributes:
        imports: lines such as ``import math``.
        definitions: classes and functions.
        missing: what could not be written, by the name that stands for it.
    """

    def __init__(self) -> None:
        self.imports: dict[str, None] = {"import torch": None}
        self.definitions: list[str] = []
        self.missing: dict[str, str] = {}
        self.taken: dict[str, Any] = {"torch": torch}

    def fresh(self, wanted: str) -> str:
        """A name that stands for nothing yet."""
        name = wanted
        while name in self.taken:
            name += "_"
        self.taken[name] = None
        return name

    def supplied(self, wanted: str, what: str) -> str:
        """A name for what the reader has to supply."""
        name = self.fresh(wanted)
        self.missing[name] = what
        return name

    def library(self, module: str) -> str:
        """Import a module; its name."""
        self.imports[f"import {module}"] = None
        return module

    # --- values ------------------------------------------------------------------------------------------------------

    def value(self, value: Any, name: str = "value") -> str:
        """An expression for a value; ``name`` is what to call it if there is none."""
        known = self.scalar(value)
        if known is not None:
            return known
        if isinstance(value, torch.Tensor):
            return self.tensor(value, name)
        if isinstance(value, np.ndarray):
            return self.array(value, name)
        written = self.container(value, lambda step, child: self.value(child, name + _word(step)))
        return self.other(value, name) if written is None else written

    def other(self, value: Any, name: str) -> str:
        """What is no number, array or container of them."""
        if isinstance(value, type) and not isinstance(value, torch.dtype):
            return self.class_name(value)
        return self.supplied(name, f"a {type(value).__module__}.{type(value).__qualname__}")

    def scalar(self, value: Any) -> str | None:
        """A number, a string or the like; None if it is something else."""
        if isinstance(value, np.generic):
            return self._numpy_scalar(value) if _is_written(value.dtype) else None
        if type(value) is float:
            return repr(value) if math.isfinite(value) else self._not_finite(value)
        if type(value) is complex:
            return f"complex({self.scalar(value.real)}, {self.scalar(value.imag)})"
        if isinstance(value, torch.device):
            return f"torch.device({str(value)!r})"
        return repr(value) if type(value) in _PLAIN or isinstance(value, torch.dtype | torch.layout) else None

    def _not_finite(self, value: float) -> str:
        self.library("math")
        return "math.nan" if math.isnan(value) else "math.inf" if value > 0 else "-math.inf"

    def _numpy_scalar(self, value: np.generic) -> str:
        self.library("numpy")
        return f"numpy.dtype({value.dtype.name!r}).type({self.scalar(value.item())})"

    # --- containers --------------------------------------------------------------------------------------------------

    def container(self, value: Any, write: Write) -> str | None:
        """A container, whose children ``write(step, child)`` writes; None for what is none."""
        kind = type(value)
        if kind in (tuple, list):
            children = [write(f"[{i}]", child) for i, child in enumerate(value)]
            inside = ", ".join(children) + ("," if kind is tuple and len(children) == 1 else "")
            return f"({inside})" if kind is tuple else f"[{inside}]"
        if kind in (dict, collections.OrderedDict, collections.defaultdict):
            return self._dictionary(value, write)
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            names = list(value._fields)
        elif dataclasses.is_dataclass(value) and not isinstance(value, type):
            names = [field.name for field in dataclasses.fields(value) if field.init]
        else:
            return None
        children = [f"{name}={write('.' + name, getattr(value, name))}" for name in names]
        return f"{self.class_name(kind)}({', '.join(children)})"

    def _dictionary(self, value: dict[Any, Any], write: Write) -> str:
        items = [f"{self.value(key)}: {write(f'[{key!r}]', child)}" for key, child in value.items()]
        inside = "{" + ", ".join(items) + "}"
        if type(value) is dict:
            return inside
        self.library("collections")
        factory = f"{self.value(value.default_factory)}, " if isinstance(value, collections.defaultdict) else ""
        return f"collections.{type(value).__name__}({factory}{inside})"

    def class_name(self, cls: type) -> str:
        """The name of a class, which is imported or defined above."""
        name = cls.__name__
        if self.taken.get(name) is cls or cls.__module__ == "builtins":
            return name
        if name in self.taken:
            return self.supplied(name, f"the class {cls.__module__}.{cls.__qualname__}")
        self.taken[name] = cls
        if from_library(cls.__module__) and "." not in cls.__qualname__:
            self.imports[f"from {cls.__module__} import {name}"] = None
        elif issubclass(cls, tuple) and hasattr(cls, "_fields"):
            self.library("collections")
            self.definitions.append(f"{name} = collections.namedtuple({name!r}, {list(cls._fields)!r})")
        else:
            self._define_class(cls)
        return name

    def _define_class(self, cls: type) -> None:
        try:
            source = textwrap.dedent(inspect.getsource(cls))
        except (OSError, TypeError):
            source = ""
        fields = [field.name for field in dataclasses.fields(cls)] if dataclasses.is_dataclass(cls) else []
        if not fields or not source.startswith(("@dataclasses.dataclass", "@dataclass", "class ")):
            self.missing[cls.__name__] = f"the class {cls.__module__}.{cls.__qualname__}"
            return
        self.library("dataclasses")
        self.imports.update({"from typing import Any": None})
        header = "" if source.startswith("@") else "@dataclasses.dataclass\n"
        self.definitions.append(header + source.replace("@dataclass\n", "@dataclasses.dataclass\n").rstrip())
        data = _data_fields(cls, fields)
        if data is not None:
            self.library("torchbatch")
            self.definitions.append(f"torchbatch.tree.register_dataclass({cls.__name__}, data_fields={data!r})")

    # --- arrays ------------------------------------------------------------------------------------------------------

    def tensor(self, value: torch.Tensor, name: str = "tensor") -> str:
        """A tensor with the same numbers, dtype, strides and device."""
        if type(value) not in (torch.Tensor, torch.nn.Parameter) or value.layout is not torch.strided or value.is_quantized:
            return self.supplied(name, f"a {type(value).__name__} of layout {value.layout}, shape {tuple(value.shape)}")
        plain = value.detach()
        text = self._strided(plain.conj()) + ".conj()" if plain.is_conj() else self._strided(plain.resolve_neg())
        if isinstance(value, torch.nn.Parameter):
            return f"torch.nn.Parameter({text}, requires_grad={value.requires_grad})"
        return f"{text}.requires_grad_()" if value.requires_grad else text

    def _strided(self, value: torch.Tensor) -> str:
        device = "" if value.device.type == "cpu" else f", device={str(value.device)!r}"
        shape, strides, offset = tuple(value.shape), tuple(value.stride()), value.storage_offset()
        if not offset and strides == torch.empty(shape, device="meta").stride():
            return self._filled(value, device)
        offset = offset if offset <= _FAR else offset % SMALL
        length = 1 + sum((side - 1) * stride for side, stride in zip(shape, strides, strict=True)) if value.numel() else 0
        if value.numel() and _is_injective(shape, strides):
            empty = f"torch.empty({offset + length}, dtype={value.dtype}{device}).as_strided({shape}, {strides}, {offset})"
            empty = empty if offset else f"torch.empty_strided({shape}, {strides}, dtype={value.dtype}{device})"
            return f"{empty}.copy_({self._filled(value.contiguous(), device)})"
        memory = torch.zeros(offset + length, dtype=value.dtype, device=value.device)
        memory[offset:] = torch.as_strided(value, (length,), (1,))
        return f"torch.as_strided({self._filled(memory, device)}, {shape}, {strides}, {offset})"

    def _filled(self, value: torch.Tensor, device: str) -> str:
        """A contiguous tensor with these numbers."""
        end = f"dtype={value.dtype}{device})"
        if not value.numel():
            return f"torch.empty({tuple(value.shape)}, {end}"
        if value.numel() > SMALL:
            return self._compressed(value, device)
        return f"torch.tensor({self._numbers(value)}, {end}"

    def _numbers(self, value: torch.Tensor) -> str:
        """The numbers as nested lists, each with as few digits as give it back."""
        flat = value.reshape(-1).cpu()
        exact = flat.tolist()
        brief = [_brief(number, value.dtype) for number in exact]
        same = torch.tensor(brief, dtype=value.dtype)
        texts = iter([self.scalar(b if _same(b, same[i].item(), exact[i]) else exact[i]) for i, b in enumerate(brief)])

        def nested(shape: tuple[int, ...]) -> str:
            return f"[{', '.join(nested(shape[1:]) for _ in range(shape[0]))}]" if shape else str(next(texts))

        return nested(tuple(value.shape))

    def _compressed(self, value: torch.Tensor, device: str) -> str:
        raw = value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        place = f".to({device.partition('=')[2]})" if device else ""
        return f"torch.frombuffer({self._bytes(raw)}, dtype={value.dtype}).reshape({tuple(value.shape)}){place}"

    def _bytes(self, raw: bytes) -> str:
        """Compressed bytes, in lines."""
        self.library("base64")
        self.library("zlib")
        text = base64.b64encode(zlib.compress(raw, 9)).decode()
        lines = "\n".join(f'    "{text[i : i + 100]}"' for i in range(0, len(text), 100))
        return f"bytearray(zlib.decompress(base64.b64decode(\n{lines}\n)))"

    def array(self, value: np.ndarray[Any, Any], name: str = "array") -> str:
        """A NumPy array with the same numbers, dtype and strides."""
        if type(value) is not np.ndarray or not _is_written(value.dtype):
            return self.supplied(name, f"a {type(value).__name__} of dtype {value.dtype}, shape {value.shape}")
        self.library("numpy")
        dtype = repr(value.dtype.name if value.dtype.isnative else value.dtype.str)
        if value.dtype.name == "bfloat16":
            self.imports["import ml_dtypes  # NumPy's bfloat16"] = None
        if value.flags.c_contiguous or not value.size:
            return self._numpy_filled(value, dtype)
        low = sum(min((n - 1) * s, 0) for n, s in zip(value.shape, value.strides, strict=True))
        high = sum(max((n - 1) * s, 0) for n, s in zip(value.shape, value.strides, strict=True))
        if any(stride % value.itemsize for stride in value.strides):
            return self._numpy_filled(value, dtype)  # a field of records: its numbers alone
        start = np.lib.stride_tricks.as_strided(value, value.shape, value.strides)
        for axis, stride in enumerate(value.strides):
            start = np.flip(start, axis) if stride < 0 else start
        memory = np.lib.stride_tricks.as_strided(start, ((high - low) // value.itemsize + 1,), (value.itemsize,))
        text = self._numpy_filled(memory, dtype)
        return f"numpy.lib.stride_tricks.as_strided({text}[{-low // value.itemsize}:], {value.shape}, {value.strides})"

    def _numpy_filled(self, value: np.ndarray[Any, Any], dtype: str) -> str:
        if not value.size:
            return f"numpy.empty({value.shape}, {dtype})"
        if value.size > SMALL:
            raw = np.ascontiguousarray(value).tobytes()
            return f"numpy.frombuffer({self._bytes(raw)}, {dtype}).reshape({value.shape})"
        numbers = value.astype(np.float32) if value.dtype.name == "bfloat16" else value.astype(value.dtype.newbyteorder("="))
        return f"numpy.array({self._numbers(torch.from_numpy(numbers.copy()))}, {dtype})"


# --- small questions -------------------------------------------------------------------------------------------------


def _is_written(dtype: np.dtype[Any]) -> bool:
    """Whether numbers of this dtype are known to PyTorch, which reads and writes them here."""
    return (dtype.kind in "biufc" and dtype.char not in "gG") or dtype.name == "bfloat16"


def _word(step: str) -> str:
    letters = "".join(letter if letter.isalnum() else "_" for letter in step).strip("_")
    return f"_{letters}"


def _data_fields(cls: type, names: list[str]) -> list[str] | None:
    """The fields of a registered dataclass that are children; None if it is not registered."""
    try:
        example = cls(**dict.fromkeys(names, 0))
    except TypeError:
        return None
    if any(leaf is example for leaf in tree.leaves(example)):
        return None
    found, _ = tree.flatten_with_path(example, is_leaf=lambda node: node is not example)
    return [tree.keystr(path).strip(".") for path, _ in found]


def _is_injective(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether no two elements lie at the same place."""
    reach = 0
    for stride, side in sorted(zip(strides, shape, strict=True)):
        if side > 1:
            if stride <= reach:
                return False
            reach += (side - 1) * stride
    return True


def _brief(number: Any, dtype: torch.dtype) -> Any:
    """A number with as few digits as this dtype has; it may still be a little off."""
    if isinstance(number, complex):
        part = torch.float32 if dtype is torch.complex64 else torch.float64
        return complex(_brief(number.real, part), _brief(number.imag, part))
    if not isinstance(number, float) or not math.isfinite(number):
        return number
    digits = {torch.float32: 9, torch.float16: 5, torch.bfloat16: 4}.get(dtype, 17)
    for count in range(1, digits + 1):
        found = float(f"{number:.{count}g}")
        if torch.tensor(found, dtype=dtype).item() == number:
            return math.copysign(found, number)
    return number


def _same(brief: Any, found: Any, exact: Any) -> bool:
    """Whether a brief number stands for the exact one, signs of zeros included."""
    return bool(repr(found) == repr(exact) or (brief != brief and exact != exact))
