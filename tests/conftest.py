"""What the tests share: hypothesis profiles, JAX on the CPU, and one call made in torchbatch, in the loop and in JAX."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import settings

import torchbatch
from torchbatch.testing import loop
from torchbatch.transforms import grad as grad_

os.environ.setdefault("JAX_PLATFORMS", "cpu")
settings.register_profile("default", deadline=None, derandomize=True)
settings.register_profile("long", deadline=None, derandomize=False, max_examples=2000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


class Library(NamedTuple):
    """The same few names in each of the three."""

    name: str
    vmap: Callable[..., Any]
    grad: Callable[..., Any]
    jvp: Callable[..., Any]
    np: Any
    array: Callable[[Any], Any]
    jit: Callable[..., Any] = lambda f: f
    context: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext

    def tree(self, value: Any) -> Any:
        """The same tree with this library's arrays in the place of NumPy's."""
        return _mapped(value, lambda leaf: self.array(leaf) if isinstance(leaf, np.ndarray) else leaf)


def _mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    children = _children(value)
    if children is None:
        return change(value)
    return _rebuilt(value, [_mapped(child, change) for child in children.values()])


def _children(value: Any) -> dict[Any, Any] | None:
    """The children of a container by key, field or place; None for a leaf."""
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, tuple | list):
        return dict(enumerate(value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return None


def _rebuilt(value: Any, children: list[Any]) -> Any:
    if isinstance(value, Mapping):
        new = dict(zip(value, children, strict=True))
        return type(value)(value.default_factory, new) if hasattr(value, "default_factory") else type(value)(new)
    if isinstance(value, tuple | list):
        return type(value)(*children) if hasattr(value, "_fields") else type(value)(children)
    return type(value)(*children)


def _torch_array(array: np.ndarray) -> torch.Tensor:
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.astype(np.float32)).bfloat16()
    return torch.from_numpy(np.array(array, copy=True))


TORCHBATCH = Library("torchbatch", torchbatch.vmap, grad_.grad, grad_.jvp, torch, _torch_array)
LOOP = Library("the loop", loop, grad_.grad, grad_.jvp, torch, _torch_array)


def _jax() -> Library:
    jax = pytest.importorskip("jax")
    enable = jax.enable_x64 if hasattr(jax, "enable_x64") else jax.experimental.enable_x64

    @contextlib.contextmanager
    def all_dtypes() -> Iterator[None]:
        with enable(True):
            yield

    return Library("JAX", jax.vmap, jax.grad, jax.jvp, jax.numpy, jax.numpy.asarray, jax.jit, all_dtypes)


class Agreement:
    """Make one call in torchbatch, in the loop and in JAX, and hold the three outcomes together."""

    def __init__(self, jax: Library) -> None:
        self.jax = jax

    def __call__(self, fun: Any, *args: Any, kwargs: Any = None, error: Any = None, **options: Any) -> Any:
        """``vmap(fun, **options)(*args, **kwargs)``; see :meth:`call`."""

        def thunk(lib: Library) -> Any:
            return lib.vmap(fun, **options)(*lib.tree(args), **lib.tree(kwargs or {}))

        return self.call(thunk, error)

    def call(
        self,
        thunk: Callable[[Library], Any],
        error: type[Exception] | None = None,
        tolerance: float = 1e-5,
        jit: bool = False,
    ) -> Any:
        """torchbatch's result, equal to the others'; or its error, of class ``error`` as the loop's, and as bad in JAX.

        With ``jit`` JAX compiles the call as one, which takes a tenth of the time of many operators one by one.
        """
        ours, loops = _outcome(TORCHBATCH, thunk), _outcome(LOOP, thunk)
        theirs = _outcome(self.jax, (lambda lib: lib.jit(lambda: thunk(lib))()) if jit else thunk)
        if error is None:
            for outcome in (ours, loops, theirs):
                if isinstance(outcome, Exception):
                    raise outcome
            assert_same(ours, loops, exact=True, tolerance=tolerance)
            assert_same(ours, theirs, tolerance=tolerance)
            return ours
        assert type(ours) is error, ours
        assert type(loops) is error, loops
        assert isinstance(theirs, built_in(error)), theirs
        return ours

    def either(self, thunk: Callable[[Library], Any], tolerance: float = 1e-5) -> Any:
        """The same result or the same kind of error in all three, whichever it is."""
        ours = _outcome(TORCHBATCH, thunk)
        return self.call(thunk, type(ours) if isinstance(ours, torchbatch.errors.TorchbatchError) else None, tolerance)


def built_in(error: type[Exception]) -> tuple[type[Exception], ...]:
    """The built-in classes that an exception class of torchbatch belongs to."""
    kinds = (ValueError, TypeError, RuntimeError)
    return tuple(kind for kind in kinds if issubclass(error, kind))


def _outcome(lib: Library, thunk: Callable[[Library], Any]) -> Any:
    try:
        with lib.context():
            return thunk(lib)
    except Exception as error:
        return error


def assert_same(ours: Any, theirs: Any, *, exact: bool = False, tolerance: float = 1e-5, where: str = "output") -> None:
    """Same containers, shapes and kinds of numbers, and close values; with ``exact`` the same dtypes too."""
    mine, others = _children(ours), _children(theirs)
    if mine is not None or others is not None:
        assert mine is not None and others is not None and type(ours) is type(theirs), (where, ours, theirs)
        assert mine.keys() == others.keys(), (where, ours, theirs)
        for key, child in mine.items():
            assert_same(child, others[key], exact=exact, tolerance=tolerance, where=f"{where}[{key!r}]")
        return
    if not isinstance(ours, torch.Tensor):
        assert type(ours) is type(theirs) and ours == theirs, (where, ours, theirs)
        return
    assert tuple(ours.shape) == tuple(theirs.shape), (where, ours.shape, theirs.shape)
    if exact:
        assert ours.dtype == theirs.dtype, (where, ours.dtype, theirs.dtype)
    a, b = _numbers(ours), _numbers(theirs)
    assert a.dtype.kind == b.dtype.kind, (where, ours.dtype, theirs.dtype)
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance, err_msg=where)


def _numbers(value: Any) -> np.ndarray:
    if isinstance(value, torch.Tensor):
        value = value.detach().resolve_conj().resolve_neg()
        value = value.float() if value.dtype == torch.bfloat16 else value
    array = np.asarray(value)
    return array.astype(np.float32) if array.dtype.name in ("bfloat16", "float16") else array


@pytest.fixture
def agree() -> Agreement:
    """The three-way comparison."""
    return Agreement(_jax())
