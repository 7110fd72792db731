"""What the tests share: hypothesis profiles, JAX on the CPU, and one call made in torchbatch, in the loop and in JAX.

What holds for a call must hold for a traced one. ``how`` says how torchbatch runs it: ``"eager"``, operator by operator;
``"jit"``, traced, and replayed without a compiler; ``"inductor"``, traced and compiled. Property tests run in all three ways,
traced ones on a part of the examples. ``TORCHBATCH_JIT=full`` runs all of them traced, many compiled, and every other
comparison with JAX traced too.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, settings

import torchbatch
from torchbatch.errors import StaticArgumentError
from torchbatch.testing import Tolerance, loop
from torchbatch.testing.compare import Rules, compare
from torchbatch.transforms import grad as grad_

os.environ.setdefault("JAX_PLATFORMS", "cpu")
settings.register_profile("default", deadline=None, derandomize=True)
settings.register_profile("long", deadline=None, derandomize=False, max_examples=2000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))
LONG = os.environ.get("HYPOTHESIS_PROFILE") == "long"
FULL_JIT = os.environ.get("TORCHBATCH_JIT") == "full"


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


class Way(NamedTuple):
    """How torchbatch runs a function: as it stands, or traced by jit, and what runs the trace."""

    backend: str | None = None

    def run(self, fun: Callable[..., Any]) -> Callable[..., Any]:
        """The function, to be run in this way."""
        return fun if self.backend is None else torchbatch.jit(fun, backend=self.backend)

    @property
    def library(self) -> Library:
        """torchbatch, whose transforms run in this way; inside another one the jit of a function is the function."""
        if self.backend is None:
            return TORCHBATCH

        def traced(transform: Callable[..., Any]) -> Callable[..., Any]:
            return lambda fun, *args, **kwargs: self.run(transform(fun, *args, **kwargs))

        def jvp(fun: Callable[..., Any], primals: Any, tangents: Any) -> Any:
            return self.run(lambda primals, tangents: grad_.jvp(fun, primals, tangents))(primals, tangents)

        return TORCHBATCH._replace(vmap=traced(torchbatch.vmap), grad=traced(grad_.grad), jvp=jvp)

    def outcome(self, thunk: Callable[[Library], Any]) -> Any:
        """What a thunk gives; where jit refuses an argument that is no array, with the arguments closed over."""
        found = _outcome(self.library, thunk)
        return _outcome(TORCHBATCH, lambda lib: self.run(lambda: thunk(lib))()) if type(found) is StaticArgumentError else found

    def examples(self, count: int) -> settings:
        """How many examples a property is tested on in this way, out of ``count``, or of what the long profile says.

        What fails when it is compiled is not made smaller, which would compile it a hundred times.
        """
        count = settings.default.max_examples if LONG else count
        share = {None: 1, "eager": 1 if FULL_JIT else 3, "inductor": 4 if FULL_JIT else 20}[self.backend]
        phases = [phase for phase in Phase if self.backend != "inductor" or phase is Phase.generate]
        return settings(max_examples=max(count // share, 3), phases=phases, suppress_health_check=[HealthCheck.too_slow])

    def some(self, items: Sequence[Any], step: int = 4) -> Sequence[Any]:
        """The items on which to run a test in this way: if traced, every fourth."""
        return items if self.backend is None or FULL_JIT else items[::step]


WAYS = {"eager": Way(), "jit": Way("eager"), "inductor": Way("inductor")}


class Agreement:
    """Make one call in torchbatch, in the loop and in JAX, and hold the three outcomes together."""

    def __init__(self, jax: Library, how: Way) -> None:
        self.jax, self.how = jax, how

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
        ours, loops = self.how.outcome(thunk), _outcome(LOOP, thunk)
        theirs = _outcome(self.jax, (lambda lib: lib.jit(lambda: thunk(lib))()) if jit else thunk)
        if error is None:
            for outcome in (ours, loops, theirs):
                if isinstance(outcome, Exception):
                    raise outcome
            assert_same(ours, loops, exact=True, tolerance=tolerance, traced=self.how.backend is not None)
            assert_same(ours, theirs, tolerance=tolerance, traced=self.how.backend is not None)
            return ours
        assert type(ours) is error, ours
        assert type(loops) is error, loops
        assert isinstance(theirs, built_in(error)), theirs
        return ours

    def either(self, thunk: Callable[[Library], Any], tolerance: float = 1e-5) -> Any:
        """The same result or the same kind of error in all three, whichever it is."""
        ours = _outcome(LOOP, thunk)
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


def assert_same(
    ours: Any, theirs: Any, *, exact: bool = False, tolerance: float = 1e-5, traced: bool = False, where: str = "output"
) -> None:
    """Same containers, shapes and kinds of numbers, and close values; with ``exact`` the same dtypes too.

    With ``traced`` ours are what jit returns, which makes arrays of numbers.
    """
    mine, others = _children(ours), _children(theirs)
    if mine is not None or others is not None:
        assert mine is not None and others is not None and type(ours) is type(theirs), (where, ours, theirs)
        assert mine.keys() == others.keys(), (where, ours, theirs)
        for key, child in mine.items():
            assert_same(child, others[key], exact=exact, tolerance=tolerance, traced=traced, where=f"{where}[{key!r}]")
        return
    if not isinstance(ours, torch.Tensor):
        assert type(ours) is type(theirs) and ours == theirs, (where, ours, theirs)
        return
    if traced and isinstance(theirs, bool | int | float | complex | np.generic | np.ndarray):
        theirs = torch.tensor(theirs)
    rules = Rules(Tolerance(tolerance, tolerance), dtypes=exact, numbers=not exact)
    (leaf,) = compare(ours, theirs, rules=rules, where=where)
    assert leaf.passed, f"{where}: {leaf.message}"


#: Tests that hold for a call as it stands, but not for a traced one, and why.
GAPS = {
    "test_rule_04_what_is_not_mapped_reaches_fun_untouched[jit-3]": "jit makes a tensor of a number",
    "test_rule_09_none_hands_back_an_unmapped_output_once[jit]": "while a function is traced that may write in place, what it "
    "makes inside gets room for all samples at once",
}


@pytest.fixture(params=["eager", "jit"] if FULL_JIT else None)
def how(request: pytest.FixtureRequest) -> Way:
    """How torchbatch runs a call; tests that run traced in any case are parametrized with it."""
    if request.node.name in GAPS:
        request.applymarker(pytest.mark.xfail(reason=GAPS[request.node.name], strict=True))
    return WAYS[getattr(request, "param", "eager")]


@pytest.fixture
def ways() -> dict[str, Way]:
    """All ways in which torchbatch runs a call, by name."""
    return WAYS


@pytest.fixture
def agree(how: Way) -> Agreement:
    """The three-way comparison."""
    return Agreement(_jax(), how)


@pytest.fixture(autouse=True, scope="module")
def garbage_of_failed_traces() -> Iterator[None]:
    """Collect, after each file, what failed traces of PyTorch's compiler left behind.

    Among it are context managers that were never left. Where the collector ends them, they put back the dispatcher's state of
    long ago, and transforms work no more in this thread.
    """
    yield
    included, excluded = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
    with torch._C._ForceDispatchKeyGuard(included, excluded):
        gc.collect()
