"""The arguments of a call of a jit function: what is static, what is a tensor, and what tells two calls apart."""

from __future__ import annotations

import inspect
import itertools
import operator
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from torchbatch._torch import guards
from torchbatch._torch.captured import is_plain_class
from torchbatch.core import argnums, tree
from torchbatch.core.describe import describe, function_name, in_detail, shown
from torchbatch.core.weak import WIDEST, as_weak
from torchbatch.errors import StaticArgumentError, UnsupportedOperationError

Statics = tuple[tuple[int | str, Hashable, Hashable], ...]  # where it stands, the classes in it (1 == True), the value


class Call(NamedTuple):
    """One call of a function."""

    fun: Callable[..., Any]
    values: list[torch.Tensor]  # the leaves of all arguments that are not static
    numbers: tuple[int, ...]  # which of them were Python numbers
    structure: tree.TreeDef  # of (positional arguments, keyword arguments) without the static ones
    statics: Statics
    copied: tuple[int, ...] = ()  # which values are copies, so that the caller would not see what is written into them

    def arguments(self, values: Iterable[torch.Tensor]) -> tuple[list[Any], dict[str, Any]]:
        """The arguments with other values for the tensors."""
        built: Any = self.structure.unflatten(values)
        positional, keywords = list(built[0]), built[1]
        for where, _, value in self.statics:
            if isinstance(where, int):
                positional.insert(where, value)
            else:
                keywords[where] = value
        return positional, keywords

    def names(self) -> list[str]:
        """What messages call each leaf, e.g. ``params['w']``."""
        leaf: Any = _LEAF
        positional, keywords = self.arguments([leaf] * len(self.values))
        static = {where for where, _, _ in self.statics}
        roots = {argnums.argument_name(self.fun, i): value for i, value in enumerate(positional) if i not in static}
        roots |= {name: keywords[name] for name in sorted(keywords) if name not in static}
        return [path for root, value in roots.items() for path in tree.paths_in_order(value, root)]

    def owners(self) -> list[int | str]:
        """For each leaf the position or the name of the argument that it belongs to."""
        static = {where for where, _, _ in self.statics}
        positional, keywords = self.structure.children()
        free = (i for i in itertools.count() if i not in static)
        places = [*zip(free, positional.children(), strict=False), *zip(keywords.entries(), keywords.children(), strict=True)]
        return [place for place, child in places for _ in range(child.num_leaves)]

    @property
    def kind(self) -> tuple[Hashable, ...]:
        """The part of the key that does not depend on the tensors."""
        return self.structure, self.numbers, self.statics

    def key(self) -> tuple[Hashable, ...]:
        """Calls with equal keys are served by one trace."""
        like = tuple((tuple(x.shape), x.dtype, x.device, x.stride(), x.requires_grad) for x in self.values)
        return *self.kind, like, tuple(guards.state().items())

    def key_of_open(self) -> tuple[Hashable, ...]:
        """The key without shapes and strides."""
        like = tuple((x.dim(), x.dtype, x.device, x.requires_grad) for x in self.values)
        return *self.kind, like, tuple(guards.state().items())

    def described(self) -> dict[str, str]:
        """The parts of the key, by name and in words."""
        found = {f"argument {name}": self._described(i) for i, name in enumerate(self.names())}
        found |= {f"static argument {_static_name(self.fun, where)}": repr(value) for where, _, value in self.statics}
        return found | {name: str(value) for name, value in guards.state().items()}

    def _described(self, index: int) -> str:
        value = self.values[index]
        if index in self.numbers:
            return f"Python {next(kind.__name__ for kind, dtype in WIDEST.items() if dtype is value.dtype)}"
        return in_detail(value)

    def outline(self) -> dict[str, str]:
        """How the arguments are given."""
        leaf: Any = _LEAF
        positional, keywords = self.arguments([leaf] * len(self.values))
        parts = [*map(repr, positional), *(f"{name}={keywords[name]!r}" for name in sorted(keywords))]
        return {"the structure of the arguments": f"({', '.join(parts)})"}


class _Leaf:
    """Stands for a leaf where only its place matters."""

    def __repr__(self) -> str:
        return "*"


_LEAF = _Leaf()


class StaticArguments:
    """``static_argnums`` and ``static_argnames`` of a function, each completed from the other as in JAX.

    Raises:
        StaticArgumentError: they are no ints or names, or the function has no such argument.
    """

    def __init__(self, fun: Callable[..., Any], nums: Any, names: Any, option: str = "static_argnums") -> None:
        self.fun, self._option = fun, option
        parameters = _parameters(fun)
        positional = [name for name, kind in parameters.items() if kind in _POSITIONAL]
        given_nums = _as_tuple(nums, int, option)
        given_names = _as_tuple(names, str, "static_argnames")
        self.nums = self._complete_nums(given_nums, given_names, positional, parameters)
        self.names = self._complete_names(given_nums, given_names, positional, parameters)
        self.is_empty = not self.nums and not self.names

    def _complete_nums(
        self, nums: tuple[int, ...], names: tuple[str, ...], positional: list[str], parameters: Mapping[str, Any]
    ) -> tuple[int, ...]:
        starred = any(kind is inspect.Parameter.VAR_POSITIONAL for kind in parameters.values())
        if parameters and not starred:
            for num in nums:
                if not -len(positional) <= num < len(positional):
                    raise StaticArgumentError(
                        f"jit: {self._option}={num} is out of range: {function_name(self.fun)} has {len(positional)} "
                        f"positional argument(s): {', '.join(positional) or 'none'}."
                    )
            nums = tuple(num % len(positional) for num in nums)
        return tuple(sorted({*nums, *(positional.index(name) for name in names if name in positional)}))

    def _complete_names(
        self, nums: tuple[int, ...], names: tuple[str, ...], positional: list[str], parameters: Mapping[str, Any]
    ) -> frozenset[str]:
        keywords = any(kind is inspect.Parameter.VAR_KEYWORD for kind in parameters.values())
        for name in names:
            if parameters and not keywords and name not in parameters:
                raise StaticArgumentError(
                    f"jit: static_argnames names {name!r}, but {function_name(self.fun)} has no such argument. It has: "
                    f"{', '.join(parameters)}."
                )
        return frozenset({*names, *(positional[num] for num in nums if -len(positional) <= num < len(positional))})

    def split(
        self, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any], Statics]:
        """The arguments that are not static, and those that are.

        Raises:
            StaticArgumentError: a static argument cannot be hashed.
        """
        if self.is_empty:
            return tuple(args), dict(kwargs), ()
        where = [num if num >= 0 else num + len(args) for num in self.nums]
        static: list[tuple[int | str, Any]] = [(i, args[i]) for i in where if 0 <= i < len(args)]
        static += [(name, kwargs[name]) for name in sorted(self.names) if name in kwargs]
        for place, value in static:
            self._check_hashable(place, value)
        positional = tuple([value for i, value in enumerate(args) if i not in where])
        keywords = {name: value for name, value in kwargs.items() if name not in self.names}
        return positional, keywords, tuple([(place, _classes(value), value) for place, value in static])

    def _check_hashable(self, place: int | str, value: Any) -> None:
        if isinstance(value, torch.Tensor):
            raise StaticArgumentError(
                f"jit: the static argument {_static_name(self.fun, place)} is a tensor, {describe(value)}. A static argument "
                f"is a constant of the trace, and is compared by value: leave a tensor out of static_argnums and "
                f"static_argnames."
            )
        if any(isinstance(entry, torch.Tensor) for entry in _entries(value)):
            raise StaticArgumentError(
                f"jit: the static argument {_static_name(self.fun, place)} holds a tensor: {shown(value)}. A static argument is "
                f"a constant of the trace, and is compared by value. Pass the tensor as an argument of its own."
            )
        try:
            hash(value)
        except TypeError:
            raise StaticArgumentError(
                f"jit: the static argument {_static_name(self.fun, place)} must be hashable, but it is {shown(value)}. Give a "
                f"tuple in the place of a list, and a frozen dataclass or a tuple of pairs in that of a dict."
            ) from None


_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def _classes(value: Any) -> Hashable:
    """The class of a value, and of those that a tuple is made of."""
    found: Any = type(value)
    return (found, *map(_classes, value)) if isinstance(value, tuple) else found


def _entries(value: Any) -> Iterable[Any]:
    """A value, or what a tuple is made of."""
    return itertools.chain.from_iterable(map(_entries, value)) if isinstance(value, tuple) else (value,)


def _parameters(fun: Callable[..., Any]) -> dict[str, Any]:
    try:
        return {parameter.name: parameter.kind for parameter in inspect.signature(fun).parameters.values()}
    except (ValueError, TypeError):
        return {}


def _as_tuple(value: Any, kind: type, option: str) -> tuple[Any, ...]:
    if value is None:
        return ()
    entries = (value,) if isinstance(value, kind) or hasattr(value, "__index__") else value
    try:
        found = tuple([operator.index(entry) if kind is int else entry for entry in entries])
    except TypeError:
        found = (None,)
    if not all(isinstance(entry, kind) for entry in found) or bool in (type(value), *map(type, entries)):
        noun = "ints" if kind is int else "names"
        raise StaticArgumentError(f"jit: {option} must be one or several {noun}, but it is {shown(value)}.")
    return found


def _static_name(fun: Callable[..., Any], place: int | str) -> str:
    return argnums.argument_name(fun, place) if isinstance(place, int) else place


def flat_arguments(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[list[Any], tree.TreeDef]:
    """The leaves of all arguments, and their structure; the order of keyword arguments says nothing."""
    if len(kwargs) > 1:
        kwargs = dict(sorted(kwargs.items()))
    return tree.flatten_in_order((tuple(args), kwargs))


def bind(
    fun: Callable[..., Any],
    static: StaticArguments,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    flat: tuple[list[Any], tree.TreeDef] | None = None,
) -> Call:
    """The arguments of a call, taken apart; ``flat`` is :func:`flat_arguments` of them, if that is known already.

    Raises:
        StaticArgumentError: an argument is neither an array nor static, or static and not hashable.
        UnsupportedOperationError: a tensor is of a class that holds other tensors, or sparse.
    """
    if static.is_empty and flat is not None:
        statics: Statics = ()
        leaves, structure = flat
    else:
        positional, keywords, statics = static.split(args, kwargs)
        leaves, structure = flat_arguments(positional, keywords)
    numbers = tuple([i for i, leaf in enumerate(leaves) if type(leaf) in _NUMBERS])
    call = Call(fun, leaves, numbers, structure, statics)
    copied: list[int] = []
    for i, leaf in enumerate(leaves):
        if type(leaf) is not torch.Tensor:
            leaf = leaves[i] = _as_tensor(leaf, call, i, copied)
        elif leaf.layout is not torch.strided or leaf.is_nested or leaf.is_quantized:
            _check_plain(leaf, call, i)
        if leaf.is_conj() or leaf.is_neg():
            leaves[i] = leaf.resolve_conj().resolve_neg()
            copied.append(i)
    return call._replace(copied=tuple(copied)) if copied else call


_NUMBERS = (*WIDEST, np.float64, np.complex128)  # the last two are Python numbers too, and PyTorch takes them for such


def _as_tensor(leaf: Any, call: Call, index: int, copied: list[int]) -> torch.Tensor:
    if type(leaf) in _NUMBERS:
        return _as_weak(leaf.item() if isinstance(leaf, np.generic) else leaf, call, index)
    if isinstance(leaf, torch.Tensor):
        _check_plain(leaf, call, index)
        return leaf
    if isinstance(leaf, np.ndarray | np.generic) and leaf.dtype.kind in "biufc":
        native = np.asarray(leaf, dtype=leaf.dtype.newbyteorder("="))
        native = native if all(stride >= 0 for stride in native.strides) else native.copy()
        if isinstance(leaf, np.ndarray) and native is not leaf:
            copied.append(index)
        return torch.as_tensor(native)
    name = call.names()[index]
    owner = call.owners()[index]
    option = f"static_argnums={owner}" if isinstance(owner, int) else f"static_argnames={owner!r}"
    raise StaticArgumentError(
        f"jit: argument {name} of {function_name(call.fun)} is {shown(leaf)}, which is not an array. Make it static, "
        f"jit(…, {option}), bind it with functools.partial, or let the function close over it."
    )


def _as_weak(number: Any, call: Call, index: int) -> torch.Tensor:
    try:
        return as_weak(number)
    except (OverflowError, RuntimeError):
        raise StaticArgumentError(
            f"jit: argument {call.names()[index]} of {function_name(call.fun)} is {shown(number)}, which does not fit into "
            f"{str(WIDEST[type(number)]).removeprefix('torch.')}. Make it static."
        ) from None


def _check_plain(leaf: torch.Tensor, call: Call, index: int) -> None:
    dense = leaf.layout is torch.strided and not leaf.is_nested and not leaf.is_quantized
    if dense and is_plain_class(type(leaf)):
        return
    odd = "nested tensor" if leaf.is_nested else "quantized tensor" if leaf.is_quantized else "sparse tensor"
    kind = type(leaf).__name__ if dense else odd
    raise UnsupportedOperationError(
        f"jit: argument {call.names()[index]} of {function_name(call.fun)} is a {kind}; jit takes plain dense tensors. Pass "
        f"the tensors it is made of (x.as_subclass(torch.Tensor) of a class without data of its own), and build it inside "
        f"the function."
    )
