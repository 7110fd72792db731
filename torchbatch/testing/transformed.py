"""A function under transforms, the same in any framework: what :func:`~torchbatch.testing.check_equivalent` runs."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from torchbatch import tree
from torchbatch.errors import AxisSpecError
from torchbatch.testing.frameworks import Framework, Fun, MissingTransformError

#: The transforms, and what each of them gives.
TRANSFORMS = {
    "value": "output",
    "grad": "gradient",
    "value_and_grad": "result",
    "vjp": "cotangent",
    "jvp": "tangent",
    "jacobian": "jacobian",
    "hessian": "hessian",
    "vmap": "output",
    "jit": "output",
}


@dataclasses.dataclass(frozen=True)
class Options:
    """How functions are transformed.

    Attributes:
        argnums: the positions, from 0 on, of the arguments to differentiate by; None for all that hold real or complex numbers
            only.
        names: the names of all positional arguments.
        in_axes, out_axes: those of ``vmap``.
        has_aux: whether the function returns ``(output, aux)``, of which only the output is differentiated.
        seed: decides the cotangents and tangents.
        constants: which leaves of the arguments, counted from the left, are never differentiated by: Python numbers.
    """

    argnums: tuple[int, ...] | None = None
    names: tuple[str, ...] = ()
    in_axes: Any = 0
    out_axes: Any = 0
    has_aux: bool = False
    seed: int = 0
    constants: frozenset[int] = frozenset()


def parse_transform(transform: Any) -> tuple[str, ...]:
    """The transforms of an entry of ``transforms``, the outermost first.

    Raises:
        AxisSpecError: there is no such transform.
    """
    names = tuple(transform) if isinstance(transform, tuple | list) else (transform,)
    for name in names:
        if not isinstance(name, str) or name not in TRANSFORMS:
            known = ", ".join(repr(known) for known in TRANSFORMS)
            raise AxisSpecError(
                f"check_equivalent: transforms holds {name!r}; known are {known}, and tuples of them, the outermost first, such "
                "as ('vmap', 'grad')."
            )
    return tuple(name for name in names if name != "value")


def label(names: Sequence[str]) -> str:
    """What a report calls it: ``"values"``, ``"grad"``, ``"vmap(grad)"``."""
    return "(".join(names) + ")" * (len(names) - 1) if names else "values"


def result_name(names: Sequence[str]) -> str:
    """What to call the results of transforms."""
    inner = [TRANSFORMS[name] for name in names if name not in ("vmap", "jit")]
    return inner[0] if inner else "output"


def transformed(framework: Framework, fun: Fun, names: Sequence[str], options: Options) -> Fun:
    """The function under the transforms, the outermost first."""
    for name in reversed(names):
        fun = _BUILDERS[name](framework, fun, options)
    return fun


def argument_names(fun: Fun, count: int) -> tuple[str, ...]:
    """The names of the first ``count`` positional arguments of a function, as far as it tells them."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    try:
        parameters = list(inspect.signature(getattr(fun, "forward", fun)).parameters.values())
    except (ValueError, TypeError):
        parameters = []
    known = [parameter.name for parameter in parameters if parameter.kind in kinds][:count]
    return (*known, *(f"args[{position}]" for position in range(len(known), count)))


# --- derivatives -----------------------------------------------------------------------------------------------------


class _Call:
    """A function at arguments, as a function of those leaves that are differentiated.

    Attributes:
        picked: these leaves.
        output: the structure of the last output, and which of its leaves are real or complex.
    """

    def __init__(self, framework: Framework, fun: Fun, args: tuple[Any, ...], options: Options) -> None:
        self._framework, self._fun, self._options = framework, fun, options
        found, self._structure = tree.flatten_with_path(args)
        self._leaves = [leaf for _, leaf in found]
        inexact = [framework.is_inexact(leaf) and place not in options.constants for place, leaf in enumerate(self._leaves)]
        owners = [next(iter(path)).entry for path, _ in found]
        wanted = _wanted(options, owners, inexact)
        self._places = [place for place, owner in enumerate(owners) if owner in wanted and inexact[place]]
        self._owners = sorted({owners[place] for place in self._places})
        self._paths = [path_name(path, options.names) for path, _ in found]
        if not self._places:
            raise MissingTransformError("no argument holds real or complex numbers only: there is nothing to differentiate by")
        self.picked = [self._leaves[place] for place in self._places]
        self.output: tuple[Any, list[bool]] = (None, [])

    def __call__(self, *values: Any) -> Any:
        """The function's output, without its aux."""
        leaves = list(self._leaves)
        for place, value in zip(self._places, values, strict=True):
            leaves[place] = value
        result = self._fun(*tree.unflatten(self._structure, leaves))
        return result[0] if self._options.has_aux else result

    def inexact(self, *values: Any) -> list[Any]:
        """The leaves of the output that are real or complex."""
        leaves, structure = tree.flatten(self(*values))
        chosen = [self._framework.is_inexact(leaf) for leaf in leaves]
        self.output = (structure, chosen)
        return [leaf for leaf, choice in zip(leaves, chosen, strict=True) if choice]

    def numbers(self, leaf: Any, place: int) -> Any:
        """An array like a leaf of multiples of 1/4, which all formats hold: the same in every framework."""
        random = np.random.default_rng([self._options.seed, place])
        numbers = random.integers(-8, 9, tuple(leaf.shape)) / 4.0
        if "complex" in str(leaf.dtype):
            numbers = numbers + 1j * random.integers(-8, 9, tuple(leaf.shape)) / 4.0
        return self._framework.like(leaf, np.asarray(numbers))

    def by_argument(self, values: Sequence[Any]) -> dict[str, Any]:
        """One tree for each argument, with None at what was not differentiated."""
        leaves: list[Any] = [None] * len(self._leaves)
        for place, value in zip(self._places, values, strict=True):
            leaves[place] = value
        args = tree.unflatten(self._structure, leaves)
        return {self._options.names[owner]: args[owner] for owner in self._owners}

    def by_output(self, values: Sequence[Any]) -> Any:
        """The tree of the output, with None at what is not differentiable."""
        structure, chosen = self.output
        rest = iter(values)
        return tree.unflatten(structure, [next(rest) if choice else None for choice in chosen])

    def names(self) -> list[str]:
        """The names of the leaves that are differentiated: ``"params['w']"``."""
        return [self._paths[place] for place in self._places]


def _wanted(options: Options, owners: Sequence[int], inexact: Sequence[bool]) -> set[int]:
    """The positions of the arguments to differentiate by."""
    if options.argnums is not None:
        return set(options.argnums)
    return set(owners) - {owner for owner, fits in zip(owners, inexact, strict=True) if not fits}


def path_name(path: Any, names: Sequence[str]) -> str:
    """What to call a leaf of the arguments: the argument's name, and the place in it."""
    entries = list(path)
    rest = tree.keystr(path)[len(f"[{entries[0].entry}]") :]
    return f"{names[entries[0].entry]}{rest}"


def _grad(framework: Framework, fun: Fun, options: Options) -> Fun:
    def gradient(*args: Any) -> Any:
        call = _Call(framework, fun, args, options)
        return call.by_argument(framework.grad(call, len(call.picked))(*call.picked))

    return gradient


def _value_and_grad(framework: Framework, fun: Fun, options: Options) -> Fun:
    gradient = _grad(framework, fun, options)
    return lambda *args: {"value": fun(*args), "gradient": gradient(*args)}


def _vjp(framework: Framework, fun: Fun, options: Options) -> Fun:
    def cotangents(*args: Any) -> Any:
        call = _Call(framework, fun, args, options)
        values, pull = framework.vjp(call.inexact, *call.picked)
        if not values:
            raise MissingTransformError("the output holds no real or complex numbers: there is nothing to differentiate")
        return call.by_argument(pull([call.numbers(value, place) for place, value in enumerate(values)])[: len(call.picked)])

    return cotangents


def _jvp(framework: Framework, fun: Fun, options: Options) -> Fun:
    def tangents(*args: Any) -> Any:
        call = _Call(framework, fun, args, options)
        given = [call.numbers(leaf, place) for place, leaf in enumerate(call.picked)]
        return call.by_output(framework.jvp(call.inexact, call.picked, given)[1])

    return tangents


def _jacobian(framework: Framework, fun: Fun, options: Options) -> Fun:
    def jacobian(*args: Any) -> Any:
        call = _Call(framework, fun, args, options)
        rows = framework.jacobian(call.inexact, len(call.picked))(*call.picked)
        return call.by_output([call.by_argument(row) for row in rows])

    return jacobian


def _hessian(framework: Framework, fun: Fun, options: Options) -> Fun:
    def hessian(*args: Any) -> Any:
        call = _Call(framework, fun, args, options)
        rows = framework.hessian(call, len(call.picked))(*call.picked)
        return {name: call.by_argument(row) for name, row in zip(call.names(), rows, strict=True)}

    return hessian


def _vmap(framework: Framework, fun: Fun, options: Options) -> Fun:
    return framework.vmap(fun, options.in_axes, options.out_axes)


def _jit(framework: Framework, fun: Fun, options: Options) -> Fun:
    return framework.jit(fun)


_BUILDERS: dict[str, Callable[[Framework, Fun, Options], Fun]] = {
    "grad": _grad,
    "value_and_grad": _value_and_grad,
    "vjp": _vjp,
    "jvp": _jvp,
    "jacobian": _jacobian,
    "hessian": _hessian,
    "vmap": _vmap,
    "jit": _jit,
}
