"""``argnums``: which positional arguments a transform is about, and what messages call them."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import optree
import torch

from torchbatch._torch import places
from torchbatch.core import tree
from torchbatch.errors import GradientTypeError, GradientValueError

Argnums = int | tuple[int, ...]

_is_compiling = torch.compiler.is_compiling


def check_callable(fun: Any, transform: str) -> None:
    """Refuse what cannot be called."""
    if not callable(fun):
        raise GradientTypeError(f"{transform} expects a function, but got {fun!r} of type {type(fun).__name__}.")


def parse(argnums: Any, transform: str, option: str = "argnums") -> Argnums:
    """An int, or a tuple of ints, from whatever was given.

    Raises:
        GradientTypeError: it is neither an integer nor a sequence of integers.
        GradientValueError: it is an empty sequence.
    """
    try:
        if hasattr(argnums, "__index__"):
            return operator.index(argnums)
        found = tuple(operator.index(entry) for entry in argnums)
    except TypeError:
        raise GradientTypeError(
            f"{transform}: {option} must be an int or a sequence of ints that number positional arguments, but got "
            f"{argnums!r} of type {type(argnums).__name__}."
        ) from None
    if not found:
        raise GradientValueError(f"{transform}: {option} is empty, so there is nothing to differentiate by.")
    return found


def resolve(
    argnums: Argnums, count: int, transform: str, too_many: type[Exception], option: str = "argnums"
) -> list[int]:
    """``argnums`` as positions in ``range(count)``, negative ones counted from the end.

    Raises:
        too_many: an entry is ``count`` or more.
        GradientValueError: an entry is less than ``-count``, or two mean the same argument.
    """
    if isinstance(argnums, int) and 0 <= argnums < count:
        return [argnums]
    entries = (argnums,) if isinstance(argnums, int) else argnums
    for entry in entries:
        if not -count <= entry < count:
            raise (too_many if entry >= 0 else GradientValueError)(
                f"{transform}: {option}={argnums} needs at least {_needed(entry)} positional argument(s), but the call "
                f"has {count}. Arguments passed by keyword do not count: pass them by position."
            )
    positions = [entry % count for entry in entries]
    if len(set(positions)) < len(positions):
        raise GradientValueError(f"{transform}: {option}={argnums} names an argument twice; the call has {count}.")
    return positions


def _needed(entry: int) -> int:
    return entry + 1 if entry >= 0 else -entry


class Split:
    """The arguments of one call, split into the ones picked by ``argnums`` and the others.

    The others reach the function as they are, but for tensors, which come as aliases made inside the transform: only
    such a tensor may be written in place there, and the caller sees what was written.
    """

    __slots__ = ("fun", "keywords", "others", "picked", "positions")

    def __init__(self, fun: Callable[..., Any], positions: list[int], args: tuple[Any, ...], kwargs: dict[str, Any]):
        self.fun = fun
        self.positions = positions
        self.picked = args
        self.others = self.keywords = None
        if kwargs:
            self.keywords = flatten(kwargs)
        if len(args) > 1:
            self.picked = tuple([args[i] for i in positions])
            if len(args) > len(positions):
                self.others = flatten([arg for i, arg in enumerate(args) if i not in positions])

    def __call__(self, *picked: Any) -> Any:
        """The function at other values of the picked arguments."""
        kwargs = {} if self.keywords is None else _aliased(*self.keywords)
        if len(picked) > 1 or self.others is not None:
            picked = self._ordered(picked, () if self.others is None else _aliased(*self.others))
        return self.fun(*picked, **kwargs)

    def _ordered(self, picked: tuple[Any, ...], rest: Sequence[Any]) -> tuple[Any, ...]:
        if len(picked) == 1 and self.positions[0] == 0:
            return (*picked, *rest)
        by_position = dict(zip(self.positions, picked, strict=True))
        others = iter(rest)
        return tuple([by_position[i] if i in by_position else next(others) for i in range(len(picked) + len(rest))])

    def names(self) -> list[str]:
        """What messages call each leaf of the picked arguments, e.g. ``params['w']``."""
        return leaf_names([argument_name(self.fun, i) for i in self.positions], self.picked)


def flatten(value: Any) -> tuple[list[Any], tree.TreeDef]:
    """:func:`torchbatch.core.tree.flatten`, in a form that ``torch.compile`` can trace."""
    if _is_compiling():
        return optree.tree_flatten(value, namespace=tree.NAMESPACE)
    return tree.flatten(value)


def unflatten(structure: tree.TreeDef, leaves: Iterable[Any]) -> Any:
    """The inverse of :func:`flatten`."""
    return structure.unflatten(leaves)


def alias(leaf: Any) -> Any:
    """The same memory as a tensor that belongs to the innermost transform; anything else as it is."""
    if isinstance(leaf, torch.Tensor) and leaf.layout is torch.strided and not leaf.is_nested:
        inside = leaf[...]
        return inside if inside.dim() or _is_compiling() else places.mark(inside)
    return leaf


def _aliased(leaves: Sequence[Any], structure: tree.TreeDef) -> Any:
    return structure.unflatten([alias(leaf) for leaf in leaves])


def leaf_names(roots: Sequence[str], values: Sequence[Any]) -> list[str]:
    """One name per leaf of ``values``, each beginning with its root."""
    return [path for root, value in zip(roots, values, strict=True) for path in tree.paths(value, root)]


def argument_name(fun: Any, position: int) -> str:
    """The name of a positional argument in the signature of ``fun``."""
    try:
        names = list(_positional_names(inspect.signature(fun)))
    except (ValueError, TypeError):
        return f"args[{position}]"
    if position < len(names):
        return names[position]
    starred = _starred_name(fun)
    return f"{starred}[{position - len(names)}]" if starred else f"args[{position}]"


def _positional_names(signature: inspect.Signature) -> Iterator[str]:
    for parameter in signature.parameters.values():
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            yield parameter.name


def _starred_name(fun: Any) -> str | None:
    parameters = inspect.signature(fun).parameters.values()
    return next((p.name for p in parameters if p.kind is p.VAR_POSITIONAL), None)
