"""Pullbacks and pushforwards of a function of trees, on top of those of flat tensors.

PyTorch wants flat tensors that are all differentiable; JAX's functions take numbers, arrays, integers and None, and
pair cotangents with tangents without a complex conjugate. What lies between the two is here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch

from torchbatch._torch import derivatives
from torchbatch._torch.levels import remove_batch_dim
from torchbatch.core import batch, tree
from torchbatch.core.argnums import alias, flatten
from torchbatch.core.describe import describe
from torchbatch.core.weak import active, strong
from torchbatch.errors import GradientTypeError, InPlaceError

FLOAT0 = torch.bool  # the dtype of tangents and cotangents of integers: PyTorch has no empty dtype as JAX's float0

OUTPUT_HINT = "Return other things beside it: return (output, aux) and pass has_aux=True."
TANGENT_HINT = "Give an array of the same shape and dtype as the value it belongs to."
_INPUT_HINT = "Pass it in an argument that is not differentiated, or bind it with functools.partial."
_TENSOR = object()
_CAPTURED = "would mutate a captured Tensor"


def is_inexact(tensor: torch.Tensor) -> bool:
    """Whether a tensor holds floating-point or complex numbers."""
    return tensor.is_floating_point() or tensor.is_complex()


def or_zeros(tangent: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    """A tangent or cotangent; None stands for zeros."""
    return torch.zeros_like(like) if tangent is None else tangent


def conjugate(tensor: torch.Tensor) -> torch.Tensor:
    """The complex conjugate in memory: NumPy takes no lazy one, and ``conj_physical`` is slow under vmap."""
    return torch.complex(tensor.real, -tensor.imag) if tensor.is_complex() else tensor


def as_tensor(leaf: Any, name: Callable[[], str], hint: str, like: torch.Tensor | None = None) -> torch.Tensor:
    """A tensor from a tensor, a number, a NumPy array or anything with ``__array__``.

    Args:
        leaf: what may become a tensor.
        name: what a message calls it.
        hint: what a message says to do.
        like: numbers and NumPy arrays of the same kind take the dtype and device of this tensor.
    """
    if isinstance(leaf, torch.Tensor):
        return leaf
    try:
        array = leaf if isinstance(leaf, bool | int | float | complex) else np.asarray(leaf)
        made = torch.as_tensor(array)
    except (TypeError, ValueError, RuntimeError):
        raise GradientTypeError(
            f"{name()} is {_quote(leaf)} of type {type(leaf).__name__}, where a tensor, a NumPy array or a number is "
            f"needed. {hint}"
        ) from None
    if like is None:
        return made
    same_kind = (made.is_floating_point() and is_inexact(like)) or (made.is_complex() and like.is_complex())
    return made.to(device=like.device, dtype=like.dtype if same_kind else made.dtype)


def _quote(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


class Primals:
    """The arguments to differentiate by: flat tensors, which of them are inexact, and the structure around them."""

    __slots__ = ("active", "names", "structure", "tensors")

    def __init__(self, values: Any, names: Callable[[], list[str]]) -> None:
        leaves, self.structure = flatten(values)
        if active.numbers is not None:
            leaves = [strong(leaf) for leaf in leaves]
        self.names = names
        self.tensors: list[torch.Tensor] = leaves
        self.active: Sequence[int] = range(len(leaves))
        for leaf in leaves:
            if not isinstance(leaf, torch.Tensor) or not is_inexact(leaf):
                self.tensors = [as_tensor(leaf, partial(self._name, i), _INPUT_HINT) for i, leaf in enumerate(leaves)]
                self.active = [i for i, tensor in enumerate(self.tensors) if is_inexact(tensor)]
                break

    def _name(self, index: int) -> str:
        return f"argument {self.names()[index]}"

    def inputs(self, tensors: Sequence[torch.Tensor] | None = None) -> tuple[torch.Tensor, ...]:
        """The inexact ones among ``tensors`` (default: the primals), never empty."""
        tensors = self.tensors if tensors is None else tensors
        return tuple([tensors[i] for i in self.active]) or (torch.zeros(()),)

    def rebuild(self, inputs: Sequence[torch.Tensor]) -> Any:
        """The arguments with other values for the inexact tensors."""
        if len(self.active) == len(self.tensors):
            return self.structure.unflatten(inputs[: len(self.tensors)])
        leaves = [alias(tensor) for tensor in self.tensors]
        for i, value in zip(self.active, inputs, strict=False):
            leaves[i] = value
        return self.structure.unflatten(leaves)

    def cotangents(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Cotangents in JAX's convention for all primals, from PyTorch's for the inexact ones."""
        found = [conjugate(value) for value in inputs[: len(self.active)]]
        if len(self.active) == len(self.tensors):
            return found
        rest = iter(found)
        return [next(rest) if is_inexact(p) else torch.zeros_like(p, dtype=FLOAT0) for p in self.tensors]


class Aux:
    """What a function returns beside its output: the tensors leave the transform, anything else is kept as it is."""

    __slots__ = ("leaves", "structure")

    def take(self, aux: Any) -> tuple[torch.Tensor, ...]:
        """The tensors of ``aux``, inside the transform."""
        leaves, self.structure = flatten(aux)
        self.leaves = [_TENSOR if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        return tuple(leaf for leaf in leaves if isinstance(leaf, torch.Tensor))

    def give(self, tensors: Sequence[torch.Tensor]) -> Any:
        """``aux`` again, with its tensors as they are outside of the transform."""
        rest = iter(tensors)
        return self.structure.unflatten([next(rest) if leaf is _TENSOR else leaf for leaf in self.leaves])


class Outputs:
    """What the function returned, taken apart inside the transform and put together outside of it."""

    __slots__ = ("aux", "kinds", "structure", "transform")

    def __init__(self, has_aux: bool, transform: str) -> None:
        self.transform = transform
        self.aux = Aux() if has_aux else None

    def take(self, result: Any) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
        """The inexact outputs, never none, and all other tensors."""
        aux_tensors: tuple[torch.Tensor, ...] = ()
        if self.aux is not None:
            result, aux = split_aux(result, self.transform)
            aux_tensors = self.aux.take(aux)
        leaves, self.structure = flatten(result)
        tensors = [as_tensor(leaf, partial(self._name, i), OUTPUT_HINT) for i, leaf in enumerate(leaves)]
        self.kinds = [is_inexact(tensor) for tensor in tensors]
        outputs = tuple(tensor for tensor in tensors if is_inexact(tensor)) or (torch.zeros(()),)
        return outputs, (*(tensor for tensor in tensors if not is_inexact(tensor)), *aux_tensors)

    def names(self) -> list[str]:
        """What messages call each leaf of the output."""
        return tree.paths(self.structure.unflatten([0] * self.structure.num_leaves), "output")

    def _name(self, index: int) -> str:
        return f"{self.transform}: {self.names()[index]}"

    def discrete(self, others: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        """The outputs that are not inexact."""
        return others[: self.kinds.count(False)]

    def give(self, outputs: Sequence[torch.Tensor], others: Sequence[torch.Tensor]) -> tuple[Any, Any]:
        """The output and the aux of the function, as trees."""
        aux = None if self.aux is None else self.aux.give(others[self.kinds.count(False) :])
        return self.merge(outputs, self.discrete(others)), aux

    def merge(self, outputs: Sequence[torch.Tensor], discrete: Sequence[torch.Tensor]) -> Any:
        """A tree of the output's structure."""
        return self.structure.unflatten(self.merge_flat(outputs, discrete))

    def merge_flat(self, outputs: Sequence[torch.Tensor], discrete: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """All leaves of the output, in order."""
        left, right = iter(outputs), iter(discrete)
        return [next(left) if inexact else next(right) for inexact in self.kinds]


def split_aux(result: Any, transform: str) -> tuple[Any, Any]:
    """The two parts of what a function returns under ``has_aux=True``."""
    if isinstance(result, tuple | list) and len(result) == 2:
        return result[0], result[1]
    got = f"{type(result).__name__} of length {len(result)}" if isinstance(result, tuple | list) else describe(result)
    raise GradientTypeError(
        f"{transform}: with has_aux=True the function must return a pair (output, aux), but it "
        f"returned a {got.removeprefix('a ')}."
    )


class Pullback(NamedTuple):
    """The result of :func:`reverse`: ``pull`` takes and gives flat inexact tensors in PyTorch's convention."""

    outputs: Outputs
    values: tuple[torch.Tensor, ...]
    others: tuple[torch.Tensor, ...]
    pull: Callable[..., tuple[torch.Tensor, ...]]


def reverse(fun: Callable[..., Any], primals: Primals, has_aux: bool, transform: str) -> Pullback:
    """Run ``fun`` at ``primals`` and keep what its pullback needs."""
    outputs = Outputs(has_aux, transform)

    def flat(*inputs: torch.Tensor) -> Any:
        return outputs.take(fun(*primals.rebuild(inputs)))

    values, others, pull = guarded(derivatives.vjp, transform, flat, primals.inputs())
    return Pullback(outputs, values, others, pull)


def forward(
    fun: Callable[..., Any], primals: Primals, tangents: Sequence[torch.Tensor], has_aux: bool, transform: str
) -> tuple[Any, Any, Any]:
    """The output, its tangent and the aux of ``fun`` at ``primals`` along ``tangents``."""
    outputs = Outputs(has_aux, transform)
    values, out_tangents, others = push(fun, primals, outputs, primals.inputs(tangents))
    out, aux = outputs.give(values, others)
    return out, outputs.merge(out_tangents, float0_like(outputs.discrete(others))), aux


def push(
    fun: Callable[..., Any], primals: Primals, outputs: Outputs, tangents: tuple[torch.Tensor, ...]
) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    """The flat inexact outputs, their tangents, and all other tensors that ``fun`` returns."""

    def flat(*inputs: torch.Tensor) -> Any:
        return outputs.take(fun(*primals.rebuild(inputs)))

    found = guarded(derivatives.jvp, outputs.transform, flat, primals.inputs(), tangents)
    return found  # type: ignore[no-any-return]


def vectorize(function: Callable[..., Any], rows: Sequence[torch.Tensor], writes: bool) -> Any:
    """``function`` of every row (along axis 0) of flat tensors; a random draw in it is the same for every row.

    Args:
        function: returns tensors in tuples.
        rows: its arguments, with the rows in front; at least one.
        writes: whether ``function`` may write into tensors that it makes.
    """
    if torch.compiler.is_compiling():
        return torch.func.vmap(function, randomness="same")(*rows)
    return batch.run(function, rows, (0,) * len(rows), rows[0].shape[0], None, "same", _stacked, writes)[0]


def _stacked(output: Any, level: int, size: int, inputs: Sequence[Any]) -> tuple[Any, int]:
    """The tensors in ``output`` outside of ``level``, with the rows in front."""
    if isinstance(output, torch.Tensor):
        return remove_batch_dim(output, level, size, 0), 1
    return tuple([_stacked(item, level, size, inputs)[0] for item in output]), len(output)


def float0_like(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The zeros that stand for tangents of integers."""
    return [torch.zeros_like(tensor, dtype=FLOAT0) for tensor in tensors]


def guarded(function: Callable[..., Any], transform: str, *args: Any) -> Any:
    """Call a transform of flat tensors and put PyTorch's complaint about a captured tensor in our words."""
    try:
        return function(*args)
    except RuntimeError as error:
        if _CAPTURED not in str(error):
            raise
        raise InPlaceError(
            f"{transform}: the function writes in place into a tensor that it closes over. Pass that tensor as an "
            f"argument (it may be one that is not differentiated), or compute a new value instead."
        ) from error
