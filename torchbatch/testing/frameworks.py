"""What :func:`~torchbatch.testing.check_equivalent` asks of PyTorch, JAX and NumPy: arrays, ``vmap``, derivatives, ``jit``."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

import torchbatch
from torchbatch import tree
from torchbatch.errors import AxisSpecError
from torchbatch.testing.interchange import from_numpy, to_jax, to_numpy
from torchbatch.testing.loop import loop
from torchbatch.testing.optional import require
from torchbatch.testing.values import FORMATS

Fun = Callable[..., Any]


class MissingTransformError(Exception):
    """A framework has no such transform, or nothing to apply it to: the check is skipped, for this reason."""


class Framework:
    """What differs between frameworks. Derivatives are of functions of positional arrays, by all of them."""

    name = ""
    title = ""

    def arrays(self, tensors: Any) -> Any:
        """A tree of tensors as a tree of arrays that share no memory with them."""
        raise NotImplementedError

    def context(self) -> contextlib.AbstractContextManager[Any]:
        """What has to be open around every call."""
        return contextlib.nullcontext()

    def is_inexact(self, leaf: Any) -> bool:
        """Whether a leaf is an array of real or complex numbers."""
        dtype = getattr(leaf, "dtype", None)
        name = str(dtype).removeprefix("torch.")
        return dtype is not None and (name in FORMATS or name.startswith("complex"))

    def like(self, leaf: Any, numbers: np.ndarray) -> Any:
        """An array of given numbers, in the dtype of another one."""
        raise NotImplementedError

    def vmap(self, fun: Fun, in_axes: Any, out_axes: Any) -> Fun:
        """The function over a batch."""
        raise NotImplementedError

    def grad(self, fun: Fun, count: int) -> Fun:
        """The gradient by the first ``count`` arguments, a tuple."""
        raise self.missing("grad")

    def vjp(self, fun: Fun, *primals: Any) -> tuple[Any, Fun]:
        """The value, and the function from cotangents to cotangents."""
        raise self.missing("vjp")

    def jvp(self, fun: Fun, primals: Sequence[Any], tangents: Sequence[Any]) -> tuple[Any, Any]:
        """The value and its tangent."""
        raise self.missing("jvp")

    def jacobian(self, fun: Fun, count: int) -> Fun:
        """The Jacobian by the first ``count`` arguments."""
        raise self.missing("jacobian")

    def hessian(self, fun: Fun, count: int) -> Fun:
        """The second derivatives by the first ``count`` arguments."""
        raise self.missing("hessian")

    def jit(self, fun: Fun) -> Fun:
        """The function, compiled."""
        raise self.missing("jit")

    def missing(self, transform: str) -> MissingTransformError:
        """What to raise where there is no such transform."""
        return MissingTransformError(f"{self.title} has no {transform}")


class Torch(Framework):
    """PyTorch, by the transforms of torchbatch."""

    name, title = "torch", "PyTorch"

    def __init__(self, backend: Any = "inductor", mapped: Fun = torchbatch.vmap) -> None:
        self._backend, self._mapped = backend, mapped

    def arrays(self, tensors: Any) -> Any:
        """A copy of each."""
        return copied(tensors)

    def like(self, leaf: Any, numbers: np.ndarray) -> Any:
        """A new tensor on the same device; of a list, since that is a constant for a trace too."""
        return torch.tensor(numbers.tolist(), dtype=leaf.dtype, device=leaf.device).reshape(numbers.shape)

    def vmap(self, fun: Fun, in_axes: Any, out_axes: Any) -> Fun:
        """``torchbatch.vmap``; the loop, where a version asks for it."""
        mapped: Fun = self._mapped(fun, in_axes=in_axes, out_axes=out_axes, randomness="different")
        return mapped

    def grad(self, fun: Fun, count: int) -> Fun:
        """``torchbatch.grad``."""
        return torchbatch.grad(fun, argnums=tuple(range(count)))

    def vjp(self, fun: Fun, *primals: Any) -> tuple[Any, Fun]:
        """``torchbatch.vjp``."""
        value, pull = torchbatch.vjp(fun, *primals)
        return value, pull

    def jvp(self, fun: Fun, primals: Sequence[Any], tangents: Sequence[Any]) -> tuple[Any, Any]:
        """``torchbatch.jvp``."""
        value, tangent = torchbatch.jvp(fun, tuple(primals), tuple(tangents))
        return value, tangent

    def jacobian(self, fun: Fun, count: int) -> Fun:
        """``torchbatch.jacrev``."""
        return torchbatch.jacrev(fun, argnums=tuple(range(count)))

    def hessian(self, fun: Fun, count: int) -> Fun:
        """``torchbatch.hessian``."""
        return torchbatch.hessian(fun, argnums=tuple(range(count)))

    def jit(self, fun: Fun) -> Fun:
        """``torchbatch.jit``."""
        if self._mapped is loop:
            raise MissingTransformError("the loop cannot be compiled")
        compiled: Fun = torchbatch.jit(fun, backend=self._backend)
        return compiled


class Jax(Framework):
    """JAX, by its own transforms."""

    name, title = "jax", "JAX"

    def __init__(self, x64: bool) -> None:
        self._jax = require("jax", "check_equivalent with a 'jax' version", "jax")
        self.x64 = x64

    def context(self) -> contextlib.AbstractContextManager[Any]:
        """64-bit numbers, or none, whatever the process is set to."""
        jax = self._jax
        enable = (
            jax.enable_x64 if hasattr(jax, "enable_x64") else require("jax.experimental", "check_equivalent", "jax").enable_x64
        )
        context: contextlib.AbstractContextManager[Any] = enable(self.x64)
        return context

    def arrays(self, tensors: Any) -> Any:
        """A copy of each; without 64-bit numbers, narrowed as JAX does."""
        return to_jax(tensors, copy=True, narrow=True)

    def like(self, leaf: Any, numbers: np.ndarray) -> Any:
        """A new array."""
        return self._jax.numpy.asarray(numbers, dtype=leaf.dtype)

    def vmap(self, fun: Fun, in_axes: Any, out_axes: Any) -> Fun:
        """``jax.vmap``."""
        mapped: Fun = self._jax.vmap(fun, in_axes=in_axes, out_axes=out_axes)
        return mapped

    def grad(self, fun: Fun, count: int) -> Fun:
        """``jax.grad``."""
        gradient: Fun = self._jax.grad(fun, argnums=tuple(range(count)))
        return gradient

    def vjp(self, fun: Fun, *primals: Any) -> tuple[Any, Fun]:
        """``jax.vjp``."""
        value, pull = self._jax.vjp(fun, *primals)
        return value, pull

    def jvp(self, fun: Fun, primals: Sequence[Any], tangents: Sequence[Any]) -> tuple[Any, Any]:
        """``jax.jvp``."""
        value, tangent = self._jax.jvp(fun, tuple(primals), tuple(tangents))
        return value, tangent

    def jacobian(self, fun: Fun, count: int) -> Fun:
        """``jax.jacrev``."""
        jacobian: Fun = self._jax.jacrev(fun, argnums=tuple(range(count)))
        return jacobian

    def hessian(self, fun: Fun, count: int) -> Fun:
        """``jax.hessian``."""
        hessian: Fun = self._jax.hessian(fun, argnums=tuple(range(count)))
        return hessian

    def jit(self, fun: Fun) -> Fun:
        """``jax.jit``."""
        compiled: Fun = self._jax.jit(fun)
        return compiled


class Numpy(Framework):
    """NumPy: values, and batches by a loop."""

    name, title = "numpy", "NumPy"

    def arrays(self, tensors: Any) -> Any:
        """A copy of each."""
        return to_numpy(tensors, copy=True)

    def like(self, leaf: Any, numbers: np.ndarray) -> Any:
        """A new array."""
        return numbers.astype(leaf.dtype)

    def vmap(self, fun: Fun, in_axes: Any, out_axes: Any) -> Fun:
        """One sample after the other, by :func:`~torchbatch.testing.loop`, which takes tensors."""

        def sample(*tensors: Any) -> Any:
            return as_tensors(fun(*self.arrays(tensors)))

        looped = loop(sample, in_axes=in_axes, out_axes=out_axes)
        return lambda *args: self.arrays(looped(*as_tensors(args)))


FRAMEWORKS: dict[str, str] = {"torch": "PyTorch", "jax": "JAX", "numpy": "NumPy"}
#: What may follow the framework in the name of a version, and changes how it is run.
WAYS = ("jit", "loop")


def parse(name: str, key: str) -> tuple[str, tuple[str, ...]]:
    """The framework and the ways that a name such as ``"torch jit"`` stands for.

    The first word is the framework. Among the words after it, ``jit`` means that the function is run compiled, and ``loop``
    (PyTorch only) that ``vmap`` is the plain loop; all others say nothing. Words end at spaces and at ``_ - : / ( )``.

    Raises:
        AxisSpecError: the first word is not a framework's.
    """
    words = "".join(letter if letter.isalnum() else " " for letter in name.lower()).split()
    if not words or words[0] not in FRAMEWORKS:
        raise AxisSpecError(
            f"check_equivalent: the version {key!r} must begin with the name of its framework, 'torch', 'jax' or 'numpy', as in "
            f"'torch jit'; or be given as a pair: {{{key!r}: ('torch', fun)}}."
        )
    if words[0] == "numpy" and "jit" in words[1:]:
        raise AxisSpecError(f"check_equivalent: the version {key!r} asks for jit, which NumPy does not have.")
    if words[0] != "torch" and "loop" in words[1:]:
        raise AxisSpecError(f"check_equivalent: the version {key!r} asks for the loop, which takes PyTorch functions only.")
    return words[0], tuple(way for way in WAYS if way in words[1:])


def framework(name: str, ways: Sequence[str] = (), x64: bool = False, backend: Any = "inductor") -> Framework:
    """The framework of a name."""
    if name == "jax":
        return Jax(x64)
    return Numpy() if name == "numpy" else Torch(backend, loop if "loop" in ways else torchbatch.vmap)


# --- inputs ----------------------------------------------------------------------------------------------------------


def as_tensors(value: Any) -> Any:
    """A tree of tensors, NumPy and JAX arrays as tensors; numbers and everything else as they are."""
    return from_numpy(value)


def has_wide(tensors: Any) -> bool:
    """Whether JAX needs its 64-bit numbers: there are real or complex ones, or whole ones beyond 32 bits."""
    return any(_is_wide(leaf) for leaf in tree.leaves(tensors) if isinstance(leaf, torch.Tensor))


def _is_wide(leaf: torch.Tensor) -> bool:
    if leaf.dtype in (torch.int64, torch.uint64):
        numbers = leaf.to(torch.float64)  # rounds, but no number of 32 bits
        least, most = (0.0, 2.0**32) if leaf.dtype is torch.uint64 else (-(2.0**31), 2.0**31)
        return bool(((numbers < least) | (numbers >= most)).any())
    return leaf.dtype in (torch.float64, torch.complex128)


def copied(tensors: Any) -> Any:
    """Each tensor of a tree once more, without its history."""
    return tree.map(lambda leaf: leaf.detach().clone() if isinstance(leaf, torch.Tensor) else leaf, tensors)


def wide(tensors: Any) -> Any:
    """A tree of tensors in float64 and complex128; whole numbers and bools as they are."""

    def widened(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor) or not (leaf.is_floating_point() or leaf.is_complex()):
            return leaf
        return leaf.detach().to(torch.complex128 if leaf.is_complex() else torch.float64)

    return tree.map(widened, tensors)
