"""What a function should give: itself in float64, or with fifty digits; and how much it computes."""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

import torchbatch
from torchbatch import tree
from torchbatch.errors import AxisSpecError
from torchbatch.random import words as random_words
from torchbatch.testing.frameworks import Fun, MissingTransformError, framework, wide
from torchbatch.testing.intermediates import of_jax
from torchbatch.testing.multiprecision import run_exactly
from torchbatch.testing.optional import require
from torchbatch.testing.tolerance import Work
from torchbatch.testing.transformed import Options, transformed

REFERENCES = ("float64", "mpmath")
_WIDE = {
    **dict.fromkeys((torch.float16, torch.bfloat16, torch.float32), torch.float64),
    **dict.fromkeys((torch.complex32, torch.complex64), torch.complex128),
}
_CASTS = (torch.Tensor.float, torch.Tensor.half, torch.Tensor.bfloat16)
_RANDOM = frozenset(
    "rand randn randint randperm rand_like randn_like randint_like normal normal_ uniform_ bernoulli bernoulli_ multinomial "
    "dropout dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout rrelu poisson exponential_ geometric_ "
    "log_normal_ cauchy_ random_ gumbel_softmax".split()
)
_DRAWS = "it draws random numbers ({}), which are others in float64"
_KEYED = random_words.__name__  # where all of torchbatch.random makes its bits


class NoReferenceError(Exception):
    """There is no reference, for this reason."""


def in_float64(name: str, fun: Fun, names: Sequence[str], options: Options, tensors: Any) -> Any:
    """What a version gives in float64: its inputs are widened, and in PyTorch everything that it makes of other tensors too.

    Args:
        name: the version's framework.
        fun: the function.
        names, options: the transforms.
        tensors: the arguments.

    Raises:
        NoReferenceError: it draws random numbers, which are others in float64; or it fails.
        MissingTransformError: the framework has no such transform.
    """
    way = framework(name, (), x64=True)
    run = transformed(way, _upcast(fun) if name == "torch" else fun, [each for each in names if each != "jit"], options)
    try:
        with way.context(), _default_float64(name):
            args = way.arrays(wide(tensors))
            if name == "jax" and _draws_in_jax(run, args):
                raise NoReferenceError(_DRAWS.format("jax.random"))
            return run(*args)
    except (NoReferenceError, MissingTransformError, ImportError):
        raise
    except Exception as error:  # such as an AssertionError of a function that wants float32
        text = (str(error).strip().splitlines() or [""])[0]
        raise NoReferenceError(f"in float64 it raises {type(error).__name__}{': ' if text else ''}{text}") from error


def with_digits(fun: Fun, names: Sequence[str], options: Options, tensors: Any, digits: int = 50) -> Any:
    """What a PyTorch function gives, computed with fifty digits: its graph, operation by operation, in mpmath.

    Raises:
        ImportError: mpmath is not installed.
        UnsupportedOperationError: the function has an operation that is not known with so many digits.
    """
    way = framework("torch")
    names = [transform for transform in names if transform != "jit"]
    leaves, structure = tree.flatten(way.arrays(tensors))
    run, results = transformed(way, fun, names, options), []

    def flat(*given: Any) -> list[Any]:
        found, result = tree.flatten(run(*tree.unflatten(structure, given)))
        results.append(result)
        return found

    graph = torchbatch.make_graph(flat)(*leaves)
    found = run_exactly(graph.module, [*map(torch.as_tensor, leaves), *graph.captured], digits)
    return tree.unflatten(results[-1], found[: len(graph.outputs)])


def parse_reference(reference: Any) -> Any:
    """``"float64"``, ``"mpmath"``, None, or a pair of a framework and a function.

    Raises:
        AxisSpecError: it is none of them.
    """
    if reference is None or (isinstance(reference, str) and reference in REFERENCES):
        return reference
    if callable(reference):
        return ("numpy", reference)
    if isinstance(reference, tuple) and len(reference) == 2 and callable(reference[1]):
        return reference
    raise AxisSpecError(
        "check_equivalent: reference must be 'float64', 'mpmath', None, a function of NumPy arrays, or a pair such as "
        f"('jax', fun), but it is {reference!r}."
    )


# --- float64 in PyTorch ----------------------------------------------------------------------------------------------


class _Float64(TorchFunctionMode):
    """Do everything in float64: widen what comes from outside, such as parameters, and every dtype that is asked for."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in _RANDOM and not _idle(name, args, kwargs or {}):
            raise NoReferenceError(_DRAWS.format(name))
        if sys._getframe(1).f_globals.get("__name__") == _KEYED:
            raise NoReferenceError(_DRAWS.format("torchbatch.random"))
        if func in _CASTS:
            func = torch.Tensor.double
        written = args[:1] if name == "__setitem__" or (name.endswith("_") and not name.endswith("__")) else ()
        rest = tree.map(_widened, tuple(args[len(written) :]))
        return func(*written, *rest, **tree.map(_widened, kwargs or {}))


def _idle(name: str, args: Any, kwargs: Any) -> bool:
    """Whether a dropout does nothing."""
    if "dropout" not in name:
        return False
    training = kwargs.get("training", args[2] if len(args) > 2 else True)
    return not training or kwargs.get("p", args[1] if len(args) > 1 else 0.5) == 0


def _widened(leaf: Any) -> Any:
    if isinstance(leaf, torch.Tensor):
        return leaf.to(_WIDE[leaf.dtype]) if leaf.dtype in _WIDE else leaf
    return _WIDE.get(leaf, leaf) if isinstance(leaf, torch.dtype) else leaf


def _upcast(fun: Fun) -> Fun:
    def upcast(*args: Any) -> Any:
        with _Float64():
            return fun(*args)

    return upcast


@contextlib.contextmanager
def _default_float64(name: str) -> Iterator[None]:
    before = torch.get_default_dtype()
    if name == "torch":
        torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


# --- random numbers in JAX --------------------------------------------------------------------------------------------


def _draws_in_jax(fun: Fun, args: Any) -> bool:
    """Whether a JAX function makes random numbers; False if it cannot be traced, since its values decide in Python."""
    jax = require("jax", "a float64 reference", "jax")
    leaves, structure = tree.flatten(tuple(args))
    places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, jax.Array)]

    def of_arrays(*arrays: Any) -> Any:
        given = dict(zip(places, arrays, strict=True))
        fun(*tree.unflatten(structure, [given.get(place, leaf) for place, leaf in enumerate(leaves)]))

    with contextlib.suppress(TypeError, IndexError):  # JAX's errors where a value is asked for
        return "random_bits" in _primitives(jax.make_jaxpr(of_arrays)(*(leaves[place] for place in places)).jaxpr)
    return False


def _primitives(jaxpr: Any) -> Iterator[str]:
    """The names of the operations of a jaxpr, and of those inside them."""
    for equation in jaxpr.eqns:
        yield str(equation.primitive.name)
        for value in equation.params.values():
            for each in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(each, "jaxpr", each)
                yield from _primitives(inner) if hasattr(inner, "eqns") else ()


# --- how much is computed --------------------------------------------------------------------------------------------

_PRODUCTS = frozenset(
    "matmul mm bmm mv dot linear addmm baddbmm einsum bilinear tensordot inner vdot chain_matmul multi_head_attention_forward "
    "scaled_dot_product_attention conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d __matmul__ "
    "__rmatmul__ dot_general conv_general_dilated".split()
)


class Counter(TorchFunctionMode):
    """Count the operations of a PyTorch function, and measure its longest sum.

    Attributes:
        operations: how many there were.
        longest: the longest sum.
        largest: the size of the largest result.
        narrow: whether a result held numbers of 16 bits or fewer.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations, self.longest, self.largest, self.narrow = 0, 1, 1, False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if isinstance(result, torch.Tensor) and name != "__get__":
            given = [leaf.numel() for leaf in tree.leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
            self.add(name, given, result.numel())
            self.narrow |= result.is_floating_point() and result.dtype.itemsize <= 2
        return result

    def add(self, name: str, given: Sequence[int], size: int) -> None:
        """One operation on arrays of the given sizes."""
        self.operations += 1
        self.largest = max(self.largest, size)
        self.longest = max(self.longest, longest_sum(name, given, size))

    def watch(self, fun: Fun) -> Fun:
        """The function, each call counted anew."""

        def counted(*args: Any) -> Any:
            self.operations, self.longest, self.largest, self.narrow = 0, 1, 1, False
            with self:
                return fun(*args)

        return counted


def longest_sum(name: str, given: Sequence[int], size: int) -> int:
    """The length of the sums of an operation, by the sizes of what it takes and gives: of a product ``sqrt(mk * kn / mn)``."""
    size = max(size, 1)
    if name in _PRODUCTS and len(given) > 1:
        return max(1, round(math.sqrt(given[0] * given[1] / size)))
    return max(1, max(given, default=1) // size)


def count_jax(fun: Fun, args: Any) -> Counter:
    """What a JAX function computes, by its jaxpr."""
    counter = Counter()
    steps = of_jax(fun, args).steps
    for step in steps:
        if step.kind == "operation":
            counter.add(step.operation, [steps[place].values.numbers.size for place in step.inputs], step.values.numbers.size)
    return counter


def work_of(counters: Sequence[Counter], names: Sequence[str], tensors: Any) -> Work:
    """How much a version computes under transforms, by what was counted of the function itself.

    A derivative is three times as many operations, and may sum over all that an argument was spread over.
    """
    known = [counter for counter in counters if counter.operations]
    if not known:
        return Work()
    operations = max(counter.operations for counter in known)
    longest = max(counter.longest for counter in known)
    derived = sum(name not in ("vmap", "jit") for name in names)
    if derived:
        sizes = [leaf.numel() for leaf in tree.leaves(tensors) if isinstance(leaf, torch.Tensor) and leaf.numel()]
        longest = max(longest, max(counter.largest for counter in known) // min(sizes, default=1))
    return Work(max(16, operations * 3**derived), max(64, longest))
