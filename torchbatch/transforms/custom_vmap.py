"""``custom_vmap``: a function that says itself how it is mapped; ``sequential_vmap``: one that is mapped sample by sample."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from torchbatch._torch import derivatives, lowered
from torchbatch.core import custom, tree
from torchbatch.core.custom import CustomFunction, Level, Rule, Tensors, repeated
from torchbatch.core.derivative import is_inexact
from torchbatch.core.describe import describe, function_name, shown
from torchbatch.core.parcel import Parcel, number_as_tensor, positional
from torchbatch.errors import AxisError, AxisSpecError, OutputTypeError, UnsupportedOperationError

__all__ = ["custom_vmap", "sequential_vmap"]


class custom_vmap(CustomFunction):  # noqa: N801 (JAX's name)
    """A function with its own rule for ``vmap``.

    Shapes: those of ``fun``. For ``fun : [a] -> [b]``, the rule takes ``[n, a]`` to ``[n, b]``.

    Args:
        fun: a function of one sample: of tensors and trees of them, and of anything else, which is not mapped.
        rule: what :meth:`def_vmap` takes.

    Returns:
        The function. Under ``vmap`` the rule runs in its place, with the whole batch, and outside of that ``vmap``: a further
        ``vmap`` around it maps what the rule does. Derivatives under ``vmap`` are those of the rule, which is then asked with
        a batch axis for every argument that is differentiated. Neither function nor rule may close over a value that a
        transform maps or differentiates.

    Raises:
        UnsupportedOperationError: there is no rule, or something that is mapped is closed over.
        AxisError, OutputTypeError: the rule returned something that does not fit.

    Example:
        >>> import torch
        >>> from torchbatch import custom_vmap, vmap
        >>> @custom_vmap
        ... def solve(matrix, vector):
        ...     return torch.linalg.solve(matrix, vector)
        >>> @solve.def_vmap
        ... def solve_many(axis_size, in_batched, matrix, vector):
        ...     if in_batched == [False, True]:          # one matrix, many vectors: one factorization
        ...         return torch.linalg.solve(matrix, vector.T).T, True
        ...     return vmap(torch.linalg.solve, [0 if b else None for b in in_batched])(matrix, vector), True
        >>> vmap(solve, in_axes=(None, 0))(2 * torch.eye(2), torch.tensor([[2.0, 4.0], [6.0, 8.0]]))
        tensor([[1., 2.],
                [3., 4.]])

    Source: ``jax.custom_batching.custom_vmap``, which has no reverse mode.
    """

    def __init__(self, fun: Callable[..., Any], rule: Callable[..., Any] | None = None) -> None:
        if not callable(fun):
            raise AxisSpecError(f"custom_vmap takes a function, but it got {shown(fun)}, which is not callable.")
        super().__init__(fun, rule)
        self.fun, self.vmap_rule = fun, rule

    def def_vmap(self, vmap_rule: Callable[..., Any]) -> Callable[..., Any]:
        """Say how the function is mapped.

        Args:
            vmap_rule: ``vmap_rule(axis_size, in_batched, *args)`` gets the number of samples, a list with a tree of bools for
                each argument, and the arguments, with the samples along axis 0 where the bool is True. It returns the output
                and a tree of bools that says in the same way which of its leaves hold samples along axis 0.

        Returns:
            ``vmap_rule``.
        """
        if not callable(vmap_rule):
            raise AxisSpecError(f"def_vmap takes a function, but it got {shown(vmap_rule)}, which is not callable.")
        self.vmap_rule, self._writes = vmap_rule, None
        self.options = (vmap_rule,)
        return vmap_rule

    def rule(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Rule, Sequence[Callable[..., Any]]]:
        """The rule for one call."""
        if self.vmap_rule is None:
            name = function_name(self.fun)
            rule = f"Give it one: @{name}.def_vmap." if name.isidentifier() else "Give it one with its method def_vmap."
            raise UnsupportedOperationError(f"custom_vmap: {name} has no rule. {rule}")
        return _Custom(self.fun, self.vmap_rule, positional(self.fun, args, kwargs)), (self.fun, self.vmap_rule)

    def __repr__(self) -> str:
        return f"<custom_vmap of {function_name(self.fun)}>"


def sequential_vmap(fun: Callable[..., Any]) -> custom_vmap:
    """Make a function that ``vmap`` runs sample by sample, one after the other.

    Shapes: those of ``fun``.

    Args:
        fun: a function that cannot take a batch, or must not: its memory is then that of one sample.

    Returns:
        The function, as :class:`custom_vmap`.

    Raises:
        AxisSpecError: ``fun`` is not a function.

    Example:
        >>> import torch
        >>> from torchbatch import sequential_vmap, vmap
        >>> @sequential_vmap
        ... def halvings(x):
        ...     count = 0
        ...     while x > 1:            # Python sees the value: there is one sample only
        ...         x, count = x / 2, count + 1
        ...     return torch.tensor(count)
        >>> vmap(halvings)(torch.tensor([1.0, 2.0, 9.0]))
        tensor([0, 1, 4])

    Source: ``jax.custom_batching.sequential_vmap``.
    """
    if not callable(fun):
        raise AxisSpecError(f"sequential_vmap takes a function, but it got {shown(fun)}, which is not callable.")
    made = custom_vmap(fun)

    def one_by_one(axis_size: int, in_batched: list[Any], *args: Any) -> tuple[Any, Any]:
        parcel = Parcel(args)
        flags = [flag for flag, leaf in zip(tree.flatten(in_batched)[0], parcel.leaves, strict=True) if parcel.is_tensor(leaf)]
        samples = [made(*_sample(parcel, flags, i)) for i in range(axis_size)] or [made(*_sample(parcel, flags, None))]
        parcels = [Parcel(sample, number_as_tensor) for sample in samples]
        _check_alike(parcels, function_name(fun))
        stacked = [torch.stack(values) for values in zip(*(each.tensors for each in parcels), strict=True)]
        return parcels[0].rebuild(value[:axis_size] for value in stacked), parcels[0].flags([True] * len(stacked))

    made.def_vmap(one_by_one)
    return made


def _sample(parcel: Parcel, flags: Sequence[bool], index: int | None) -> tuple[Any, ...]:
    """The arguments of one sample; zeros, if there is none."""
    pairs = zip(parcel.tensors, flags, strict=True)
    parts = [_part(value, index) if flag else value for value, flag in pairs]
    arguments: tuple[Any, ...] = parcel.rebuild(parts)
    return arguments


def _part(value: torch.Tensor, index: int | None) -> torch.Tensor:
    return value.new_zeros(value.shape[1:]) if index is None else value[index]


def _check_alike(parcels: Sequence[Parcel], name: str) -> None:
    """Refuse outputs of one sample that cannot be stacked on those of the others."""
    kinds = [[(value.shape, value.dtype) for value in parcel.tensors] for parcel in parcels]
    for i, (parcel, kind) in enumerate(zip(parcels, kinds, strict=True)):
        if parcel.structure != parcels[0].structure or kind != kinds[0]:
            raise OutputTypeError(
                f"sequential_vmap: {name} must return the same tree of the same shapes and dtypes for every sample, but it "
                f"returned {_shape_of(parcels[0])} for sample 0 and {_shape_of(parcel)} for sample {i}."
            )


def _shape_of(parcel: Parcel) -> Any:
    return parcel.rebuild(_Text(describe(value)) for value in parcel.tensors)


class _Text(str):
    """Shows itself without quotes."""

    __slots__ = ()
    __repr__ = str.__str__


class _Mappable(Rule):
    """A rule that differs under ``vmap`` only, and that is differentiated like any other function."""

    kinds: list[bool]  # which outputs are inexact

    def applies(self, values: Tensors) -> bool:
        return any(lowered.is_mapped(value) for value in values)

    def forward(self, values: Tensors) -> list[torch.Tensor]:
        results = custom.call(self, values)
        self.outputs = len(results)
        self.kinds = [is_inexact(result) for result in results]
        self.likes = [(r.shape, r.dtype, r.device) for r in results]
        return results

    def backward(
        self, values: Tensors, results: Tensors, cotangents: Sequence[torch.Tensor | None], wanted: Sequence[bool]
    ) -> list[torch.Tensor | None]:
        back = _Backward(self, wanted)
        given = [_or_zeros(ct, like) for ct, like, inexact in zip(cotangents, self.likes, self.kinds, strict=True) if inexact]
        found = iter(custom.call(back, [*values, *given]))
        return [next(found) if needed else None for needed in wanted]

    def push(self, primals: Tensors, tangents: Tensors) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        pushed = _Pushed(self, [is_inexact(primal) for primal in primals])
        found = custom.call(pushed, [*primals, *(t for p, t in zip(primals, tangents, strict=True) if is_inexact(p))])
        half = len(found) // 2
        return found[:half], found[half:]


def _or_zeros(cotangent: torch.Tensor | None, like: tuple[torch.Size, torch.dtype, torch.device]) -> torch.Tensor:
    shape, dtype, device = like
    return torch.zeros(shape, dtype=dtype, device=device) if cotangent is None else cotangent


class _Custom(_Mappable):
    """One call of a function with a rule for ``vmap``."""

    def __init__(self, fun: Callable[..., Any], rule: Callable[..., Any], args: tuple[Any, ...]) -> None:
        self.fun, self.rule, self.name = fun, rule, function_name(fun)
        self.args = Parcel(args)

    def must_know(self, value: torch.Tensor) -> bool:
        return bool(lowered.is_wrapped(value))

    def run(self, values: Tensors) -> list[torch.Tensor]:
        return self._taken(self.fun(*self.args.rebuild(values)), self.name)

    def mapped(self, level: Level, values: Tensors, mapped: Sequence[bool]) -> tuple[list[torch.Tensor], list[bool]]:
        result = self.rule(level.size, list(self.args.flags(mapped)), *self.args.rebuild(values))
        if not isinstance(result, tuple | list) or len(result) != 2:
            raise OutputTypeError(
                f"custom_vmap: the rule of {self.name} must return a pair (output, out_batched), but it returned {shown(result)}."
            )
        flags, structure = tree.flatten(result[1])
        outputs = self._taken(result[0], f"the rule of {self.name}")
        if structure != self.output.structure or not all(isinstance(flag, bool) for flag in flags):
            raise AxisError(
                f"custom_vmap: the rule of {self.name} must return a tree of bools like its output, but its output is "
                f"{self.output.flags([True] * len(outputs))!r} with True for each array, and out_batched is {result[1]!r}."
            )
        flags = [flag for flag, leaf in zip(flags, self.output.leaves, strict=True) if self.output.is_tensor(leaf)]
        for value, flag in zip(outputs, flags, strict=True):
            if flag and (not value.dim() or value.shape[0] != level.size):
                raise AxisError(
                    f"custom_vmap: the rule of {self.name} says that an output is batched, so that its axis 0 must have size "
                    f"{level.size}, but it is {describe(value)}."
                )
        return outputs, flags

    def _taken(self, output: Any, who: str) -> list[torch.Tensor]:
        self.output = Parcel(output, number_as_tensor)
        for leaf, name in zip(self.output.leaves, self.output.names("output"), strict=True):
            if not self.output.is_tensor(leaf):
                raise OutputTypeError(f"custom_vmap: {who} must return arrays, but {name} is {shown(leaf)}.")
        return self.output.take()


class _Backward(_Mappable):
    """The pullback of a rule: takes its arguments and cotangents of its inexact outputs, gives those that are wanted."""

    def __init__(self, base: _Mappable, wanted: Sequence[bool]) -> None:
        self.base, self.wanted, self.name = base, list(wanted), base.name

    def run(self, values: Tensors) -> list[torch.Tensor]:
        return self._pull(values, self.base.run)

    def mapped(self, level: Level, values: Tensors, mapped: Sequence[bool]) -> tuple[list[torch.Tensor], list[bool]]:
        count, size = len(self.wanted), level.size
        flags = [flag or wanted for flag, wanted in zip(mapped, self.wanted, strict=False)]
        pairs = zip(values, mapped, [*flags, *[True] * (len(values) - count)], strict=True)
        full = [repeated(value, size) if needed and not flag else value for value, flag, needed in pairs]

        def base(inside: Tensors) -> list[torch.Tensor]:
            outputs, batched = self.base.mapped(level, inside, flags)
            return [o if flag else repeated(o, size) for o, flag in zip(outputs, batched, strict=True)]

        found = self._pull(full, base)
        return found, [True] * len(found)

    def _pull(self, values: Tensors, base: Callable[[Tensors], list[torch.Tensor]]) -> list[torch.Tensor]:
        count = len(self.wanted)
        inputs, cotangents = values[:count], values[count:]

        def flat(*active: torch.Tensor) -> Any:
            rest = iter(active)
            outputs = base([next(rest) if wanted else x for x, wanted in zip(inputs, self.wanted, strict=True)])
            return tuple([output for output in outputs if is_inexact(output)]), ()

        pull = derivatives.vjp(flat, [x for x, wanted in zip(inputs, self.wanted, strict=True) if wanted])[2]
        return list(pull(cotangents))


class _Pushed(_Mappable):
    """The pushforward of a rule: takes its arguments and tangents of the inexact ones, gives outputs and their tangents."""

    def __init__(self, base: _Mappable, active: Sequence[bool]) -> None:
        self.base, self.active, self.name = base, list(active), base.name

    def run(self, values: Tensors) -> list[torch.Tensor]:
        return self._push(values, self.base.run)

    def mapped(self, level: Level, values: Tensors, mapped: Sequence[bool]) -> tuple[list[torch.Tensor], list[bool]]:
        count, size = len(self.active), level.size
        moved = iter(mapped[count:])
        tangents = [active and next(moved) for active in self.active]
        flags = [flag or tangent for flag, tangent in zip(mapped, tangents, strict=False)]
        wanted = [*flags, *(flag for flag, active in zip(flags, self.active, strict=True) if active)]
        triples = zip(values, mapped, wanted, strict=True)
        full = [repeated(value, size).contiguous() if needed and not flag else value for value, flag, needed in triples]
        batched: list[bool] = []

        def base(inside: Tensors) -> list[torch.Tensor]:
            outputs, batched[:] = self.base.mapped(level, inside, flags)
            return outputs

        return self._push(full, base), batched * 2

    def _push(self, values: Tensors, base: Callable[[Tensors], list[torch.Tensor]]) -> list[torch.Tensor]:
        count = len(self.active)
        inputs, tangents = values[:count], values[count:]
        kinds: list[bool] = []

        def flat(*active: torch.Tensor) -> Any:
            rest = iter(active)
            outputs = base([next(rest) if is_active else x for x, is_active in zip(inputs, self.active, strict=True)])
            kinds[:] = [is_inexact(output) for output in outputs]
            return tuple(o for o in outputs if is_inexact(o)), tuple(o for o in outputs if not is_inexact(o))

        primals = [x for x, is_active in zip(inputs, self.active, strict=True) if is_active]
        outputs, moved, others = map(iter, derivatives.jvp(flat, primals, tangents))
        results = [next(outputs) if inexact else next(others) for inexact in kinds]
        return [*results, *(next(moved) if inexact else torch.zeros_like(r) for r, inexact in zip(results, kinds, strict=True))]
