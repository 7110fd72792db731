"""``custom_jvp`` and ``custom_vjp``: functions that say themselves what their derivatives are."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch

from torchbatch._torch import derivatives, lowered
from torchbatch.core import argnums as argnums_
from torchbatch.core import custom, tree
from torchbatch.core.argnums import argument_name
from torchbatch.core.arrays import as_tensor_beside
from torchbatch.core.custom import CustomFunction, Rule, Tensors, check_enclosed
from torchbatch.core.derivative import FLOAT0, as_tensor, conjugate, is_inexact
from torchbatch.core.describe import describe, function_name, method_name, shown
from torchbatch.core.parcel import Parcel, positional, positional_names
from torchbatch.errors import GradientTypeError, GradientValueError, InputTypeError, UnsupportedOperationError

__all__ = ["custom_jvp", "custom_vjp"]


class _Custom(CustomFunction):
    """What both have in common."""

    transform: str

    def __init__(self, fun: Callable[..., Any], nondiff_argnums: Any, nondiff_argnames: Any, *options: Any) -> None:
        argnums_.check_callable(fun, self.transform)
        super().__init__(fun, nondiff_argnums, nondiff_argnames, *options)
        self.fun = fun
        numbers = () if nondiff_argnums in ((), []) else argnums_.parse(nondiff_argnums, self.transform, "nondiff_argnums")
        names = (nondiff_argnames,) if isinstance(nondiff_argnames, str) else tuple(nondiff_argnames)
        self._fixed = (numbers,) if isinstance(numbers, int) else numbers
        self._fixed += tuple(self._place(name) for name in names)

    def _place(self, name: str) -> int:
        parameters = positional_names(self.fun)
        if name not in parameters:
            raise GradientValueError(
                f"{self.transform}: nondiff_argnames has {name!r}, but {function_name(self.fun)} has no such positional argument."
            )
        return parameters.index(name)

    def _bound(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Arguments:
        values = positional(self.fun, args, kwargs)
        fixed = self._fixed
        if fixed:
            fixed = tuple(argnums_.resolve(fixed, len(values), self.transform, GradientValueError, "nondiff_argnums"))
        return _Arguments(self.fun, self.transform, values, frozenset(fixed))

    def _missing(self, method: str) -> UnsupportedOperationError:
        return UnsupportedOperationError(
            f"{self.transform}: {function_name(self.fun)} has no rule for its derivative. Give it one with "
            f"{method_name(self.fun, method)}."
        )

    def __repr__(self) -> str:
        return f"<{self.transform} of {function_name(self.fun)}>"


class _Arguments:
    """The arguments of one call: those that are differentiated, and the others, each with its tensors taken out."""

    def __init__(self, fun: Callable[..., Any], transform: str, values: tuple[Any, ...], fixed: frozenset[int]) -> None:
        self.fun, self.transform, self.count, self._at = fun, transform, len(values), fixed
        self.places = [i for i in range(len(values)) if i not in fixed]
        self.fixed = Parcel([value for i, value in enumerate(values) if i in fixed])
        moving = [values[i] for i in self.places]
        self.moving = Parcel(moving, partial(self._converted, moving))
        self.tensors = [*self.moving.take(), *self.fixed.take()]

    def take(self) -> list[torch.Tensor]:
        """The tensors of all arguments, which are not kept any longer: first of those that are differentiated."""
        tensors, self.tensors = self.tensors, []
        return tensors

    def _converted(self, trees: list[Any], leaf: Any, number: int) -> torch.Tensor:
        found = _tensor_beside(leaf, tree.flatten(trees)[0])
        if found is None:
            name = self._names(trees)[number]
            raise InputTypeError(
                f"{self.transform}: argument {name} of {function_name(self.fun)} is {shown(leaf)}, which is not an array. List "
                "the argument in nondiff_argnums."
            )
        return found

    def names(self) -> list[str]:
        """What messages call each leaf of the differentiated arguments."""
        structure = self.moving.structure
        trees: Any = structure.unflatten([0] * structure.num_leaves)
        return self._names(trees)

    def _names(self, trees: list[Any]) -> list[str]:
        roots = [argument_name(self.fun, i) for i in self.places]
        return [name for root, value in zip(roots, trees, strict=True) for name in tree.paths(value, root)]

    def split(self, values: Tensors) -> tuple[list[Any], list[Any]]:
        """The arguments that are not differentiated, and those that are, with other tensors in them."""
        count = self.moving.count
        return self.fixed.rebuild(values[count:]), self.moving.rebuild(values[:count])

    def all(self, values: Tensors) -> list[Any]:
        """All arguments in their order, with other tensors in them."""
        fixed, moving = map(iter, self.split(values))
        return [next(fixed) if i in self._at else next(moving) for i in range(self.count)]


class _Differentiable(Rule):
    """One call of a function with a rule for its derivative."""

    output: Parcel

    def __init__(self, fun: Callable[..., Any], transform: str, args: _Arguments) -> None:
        self.fun, self.transform, self.args, self.name = fun, transform, args, function_name(fun)

    def applies(self, values: Tensors) -> bool:
        return any(lowered.is_differentiated(value) for value in values)

    def must_know(self, value: torch.Tensor) -> bool:
        return bool(lowered.is_wrapped(value)) or lowered.is_differentiated(value)

    def refuse(self, differentiated: Sequence[bool]) -> None:
        if any(differentiated[self.args.moving.count :]):
            raise GradientTypeError(
                f"{self.transform}: an argument of {self.name} that is listed in nondiff_argnums is differentiated. Take it off "
                "the list and give it a derivative, or pass it through stop_gradient."
            )

    def run(self, values: Tensors) -> list[torch.Tensor]:
        results = self._taken(self.fun(*self.args.all(values)))
        check_enclosed(self, values, results)
        return results

    def _taken(self, output: Any) -> list[torch.Tensor]:
        """The tensors of an output of the function, which gives its output its structure."""
        self.output = Parcel(output, partial(self._array, "output"))
        return self.output.take()

    def _array(self, what: str, leaf: Any, number: int) -> torch.Tensor:
        hint = "Return it beside the function, or make an array of it."
        return as_tensor(leaf, lambda: f"{self.transform}: leaf {number} of the {what} of {self.name}", hint)

    def _zeros(self, values: Tensors) -> list[torch.Tensor]:
        return [torch.zeros_like(value) if is_inexact(value) else _float0(value) for value in values]


def _tensor_beside(leaf: Any, others: Sequence[Any]) -> torch.Tensor | None:
    """An array, or a Python number in the precision of the arrays beside it, which would else be promoted by it."""
    found = as_tensor_beside(leaf, others)
    kinds = [other.dtype for other in others if isinstance(other, torch.Tensor) and is_inexact(other)]
    if found is None or type(leaf) is not float or not kinds:
        return found
    widest = functools.reduce(torch.promote_types, kinds)
    return found.to(torch.empty((), dtype=widest).real.dtype if widest.is_complex else widest)


def _float0(value: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(value, dtype=FLOAT0)


# --- forward mode ----------------------------------------------------------------------------------------------------


class custom_jvp(_Custom):  # noqa: N801 (JAX's name)
    """A function with its own rule for its derivative, given in forward mode.

    Shapes: those of ``fun``. For ``fun : [a] -> [b]``, the rule takes ``([a],), ([a],)`` to ``([b], [b])``.

    Args:
        fun: takes and returns tensors, numbers or trees of them.
        nondiff_argnums: which positional arguments are not differentiated; they may be anything.
        nondiff_argnames: such arguments by name.
        rule: what :meth:`defjvp` takes.

    Returns:
        The function. Forward mode asks the rule; reverse mode (and ``backward()``) asks it too and transposes it, so the
        tangent that it returns must be linear in the tangents that it gets. The output that it returns must be that of
        ``fun``. The rule is differentiated for derivatives of higher order, and mapped under ``vmap``. It must not close over
        a value that a transform maps or differentiates.

    Raises:
        UnsupportedOperationError: there is no rule, or something is closed over that must not be.
        GradientTypeError, GradientValueError: the rule returned something that does not fit.

    Example:
        >>> import torch
        >>> from torchbatch import custom_jvp, grad, vmap
        >>> @custom_jvp
        ... def log1pexp(x):
        ...     return torch.log(1 + torch.exp(x))
        >>> @log1pexp.defjvp
        ... def log1pexp_jvp(primals, tangents):
        ...     (x,), (t,) = primals, tangents
        ...     return log1pexp(x), t * torch.sigmoid(x)
        >>> vmap(grad(log1pexp))(torch.tensor([0.0, 100.0]))      # without the rule: [0.5, nan]
        tensor([0.5000, 1.0000])

    Source: ``jax.custom_jvp``.
    """

    transform = "custom_jvp"

    def __init__(
        self,
        fun: Callable[..., Any],
        nondiff_argnums: int | Sequence[int] = (),
        nondiff_argnames: str | Iterable[str] = (),
        rule: Callable[..., Any] | None = None,
    ) -> None:
        super().__init__(fun, nondiff_argnums, nondiff_argnames, rule)
        self.jvp = rule

    def defjvp(self, jvp: Callable[..., Any], symbolic_zeros: bool = False) -> Callable[..., Any]:
        """Say what the derivative is.

        Args:
            jvp: ``jvp(*nondiff, primals, tangents)`` gets the arguments that are not differentiated, a tuple of those that are,
                and a tuple of their tangents. It returns the output and its tangent. Tangents of integers are zeros of dtype
                ``torch.bool``.
            symbolic_zeros: kept for JAX's signature; must be False: a tangent that is zero is a tensor of zeros.

        Returns:
            ``jvp``.
        """
        if symbolic_zeros:
            raise GradientValueError("defjvp: symbolic_zeros must be False: a tangent that is zero is a tensor of zeros here.")
        argnums_.check_callable(jvp, "defjvp")
        self.jvp, self._writes = jvp, None
        self.options = (*self.options[:2], jvp)
        return jvp

    def defjvps(self, *jvps: Callable[..., Any] | None) -> None:
        """Say what the derivative by each argument is.

        Args:
            jvps: one function for each argument, or None where the derivative is zero. ``jvps[i](tangent, output, *primals)``
                returns the tangent of the output that comes from the tangent of argument number i.
        """
        if self._fixed:
            raise GradientTypeError("defjvps does not go with nondiff_argnums. Give one rule for all, with defjvp.")

        def jvp(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Any, Any]:
            if len(jvps) != len(primals):
                raise GradientTypeError(
                    f"defjvps got {len(jvps)} functions, but {function_name(self.fun)} was called with {len(primals)} arguments."
                )
            output = self(*primals)
            pairs = [(part, tangent) for part, tangent in zip(jvps, tangents, strict=True) if part is not None]
            moved = [part(tangent, output, *primals) for part, tangent in pairs]
            return output, tree.map_leaves(lambda *parts: sum(parts), tree.map_leaves(torch.zeros_like, output), *moved)

        self.defjvp(jvp)

    def rule(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Rule, Sequence[Callable[..., Any]]]:
        """The rule for one call."""
        if self.jvp is None:
            raise self._missing("defjvp")
        return _Jvp(self.fun, self.jvp, self._bound(args, kwargs)), (self.fun, self.jvp)


class _Jvp(_Differentiable):
    def __init__(self, fun: Callable[..., Any], rule: Callable[..., Any], args: _Arguments) -> None:
        super().__init__(fun, "custom_jvp", args)
        self.rule = rule

    def forward(self, values: Tensors) -> list[torch.Tensor]:
        results = custom.call(self, values)
        self.outputs = len(results)
        return results

    def push(self, primals: Tensors, tangents: Tensors) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        fixed, moving = self.args.split(primals)
        count = self.args.moving.count
        moved = [t if is_inexact(p) else _float0(p) for p, t in zip(primals, tangents, strict=True)][:count]
        result = self.rule(*fixed, tuple(moving), tuple(self.args.moving.rebuild(moved)))
        if not isinstance(result, tuple | list) or len(result) != 2:
            raise GradientTypeError(
                f"custom_jvp: the rule of {self.name} must return a pair (output, tangent), but it returned {shown(result)}."
            )
        outputs = self._taken(result[0])
        found = Parcel(result[1], partial(self._array, "tangent"))
        if found.structure != self.output.structure:
            raise GradientTypeError(
                f"custom_jvp: the rule of {self.name} must return a tangent with the structure of the output, but it is "
                f"{result[1]!r} for {result[0]!r}."
            )
        return outputs, [self._fitted(out, moved) for out, moved in zip(outputs, found.take(), strict=True)]

    def _fitted(self, output: torch.Tensor, tangent: torch.Tensor) -> torch.Tensor:
        if not is_inexact(output):
            return torch.zeros_like(output)
        if output.shape != tangent.shape or output.dtype is not tangent.dtype:
            raise GradientTypeError(
                f"custom_jvp: the rule of {self.name} must return a tangent with the shape and dtype of the output, but it "
                f"is {describe(tangent)} for {describe(output)}."
            )
        return tangent

    def backward(
        self, values: Tensors, results: Tensors, cotangents: Sequence[torch.Tensor | None], wanted: Sequence[bool]
    ) -> list[torch.Tensor | None]:
        """The rule is linear in the tangents: its pullback at any point is the pullback of the function."""
        zeros = self._zeros(values)
        given = [(i, ct) for i, ct in enumerate(cotangents) if ct is not None]

        def linear(*moving: torch.Tensor) -> Any:
            rest = iter(moving)
            tangents = [next(rest) if needed else zero for needed, zero in zip(wanted, zeros, strict=True)]
            moved = self.push(values, tangents)[1]
            return tuple([moved[i] for i, _ in given]), ()

        if not given:
            return [None] * len(values)
        pull = derivatives.vjp(linear, [zero for needed, zero in zip(wanted, zeros, strict=True) if needed])[2]
        found = iter(pull([ct for _, ct in given]))
        return [next(found) if needed else None for needed in wanted]


# --- reverse mode ----------------------------------------------------------------------------------------------------


class custom_vjp(_Custom):  # noqa: N801 (JAX's name)
    """A function with its own rule for its gradient, in reverse mode.

    Shapes: those of ``fun``. For ``fun : [a] -> [b]``, the rule takes ``[b]`` to ``([a],)``.

    Args:
        fun: takes and returns tensors, numbers or trees of them.
        nondiff_argnums: which positional arguments are not differentiated; they may be anything.
        nondiff_argnames: such arguments by name.
        fwd, bwd: what :meth:`defvjp` takes.

    Returns:
        The function. Reverse mode (and ``backward()``) asks the rule; forward mode is an error, as in JAX. For derivatives of
        higher order ``fwd`` and ``bwd`` are differentiated, and under ``vmap`` they are mapped. Neither of them may close over
        a value that a transform maps or differentiates.

    Raises:
        UnsupportedOperationError: there is no rule, or something is closed over that must not be.
        GradientTypeError: it is differentiated in forward mode, or the rule returned something of the wrong structure.
        GradientValueError: a cotangent that the rule returned has another shape or dtype than its argument.

    Example:
        >>> import torch
        >>> from torchbatch import custom_vjp, grad
        >>> @custom_vjp
        ... def clip_gradient(limit, x):
        ...     return x
        >>> def fwd(limit, x):
        ...     return x, limit
        >>> def bwd(limit, cotangent):
        ...     return None, torch.clamp(cotangent, -limit, limit)
        >>> clip_gradient.defvjp(fwd, bwd)
        >>> grad(lambda x: (100 * clip_gradient(1.0, x)).sum())(torch.ones(3))
        tensor([1., 1., 1.])

    Source: ``jax.custom_vjp``.
    """

    transform = "custom_vjp"

    def __init__(
        self,
        fun: Callable[..., Any],
        nondiff_argnums: int | Sequence[int] = (),
        nondiff_argnames: str | Iterable[str] = (),
        fwd: Callable[..., Any] | None = None,
        bwd: Callable[..., Any] | None = None,
    ) -> None:
        super().__init__(fun, nondiff_argnums, nondiff_argnames, fwd, bwd)
        self.fwd, self.bwd = fwd, bwd

    def defvjp(
        self, fwd: Callable[..., Any], bwd: Callable[..., Any], symbolic_zeros: bool = False, optimize_remat: bool = False
    ) -> None:
        """Say what the gradient is.

        Args:
            fwd: has the arguments of the function, and returns its output and a tree of anything that ``bwd`` needs.
            bwd: ``bwd(*nondiff, residuals, cotangent)`` gets the arguments that are not differentiated, what ``fwd`` kept, and
                a tree like the output. It returns a tuple with one tree for each argument that is differentiated; None
                stands for zeros. Complex cotangents are JAX's, the conjugates of PyTorch's.
            symbolic_zeros: kept for JAX's signature; must be False: a cotangent that is zero is a tensor of zeros.
            optimize_remat: kept for JAX's signature, where it concerns compilation; it has no effect here.
        """
        if symbolic_zeros:
            raise GradientValueError("defvjp: symbolic_zeros must be False: a cotangent that is zero is a tensor of zeros here.")
        argnums_.check_callable(fwd, "defvjp")
        argnums_.check_callable(bwd, "defvjp")
        self.fwd, self.bwd, self._writes = fwd, bwd, None
        self.options = (*self.options[:2], fwd, bwd)

    def rule(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Rule, Sequence[Callable[..., Any]]]:
        """The rule for one call."""
        if self.fwd is None or self.bwd is None:
            raise self._missing("defvjp")
        return _Vjp(self.fun, self.fwd, self.bwd, self._bound(args, kwargs)), (self.fun, self.fwd, self.bwd)


class _Vjp(_Differentiable):
    kept: Parcel  # the residuals
    origin: list[int]  # for each tensor of them, which argument it is, or else -1
    likes: list[tuple[torch.Size, torch.dtype, torch.device]]  # of the outputs

    def __init__(self, fun: Callable[..., Any], fwd: Callable[..., Any], bwd: Callable[..., Any], args: _Arguments) -> None:
        super().__init__(fun, "custom_vjp", args)
        self.fwd, self.bwd = fwd, bwd

    def push(self, primals: Tensors, tangents: Tensors) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        raise GradientTypeError(
            f"custom_vjp: {self.name} has a rule for reverse mode only, but it is differentiated in forward mode (jvp, jacfwd, "
            "the outer part of hessian). Use jacrev, or give it a rule with custom_jvp, which serves both modes."
        )

    def forward(self, values: Tensors) -> list[torch.Tensor]:
        result = self.fwd(*self.args.all(values))
        if not isinstance(result, tuple | list) or len(result) != 2:
            raise GradientTypeError(
                f"custom_vjp: fwd of {self.name} must return a pair (output, residuals), but it returned {shown(result)}."
            )
        outputs = self._taken(result[0])
        self.likes = [(output.shape, output.dtype, output.device) for output in outputs]
        self.outputs = len(outputs)
        self.kept = Parcel(result[1])
        places = {id(value): i for i, value in enumerate(values)}
        residuals = self.kept.take()
        self.origin = [places.get(id(residual), -1) for residual in residuals]
        return [*outputs, *(residual for residual, place in zip(residuals, self.origin, strict=True) if place < 0)]

    def backward(
        self, values: Tensors, results: Tensors, cotangents: Sequence[torch.Tensor | None], wanted: Sequence[bool]
    ) -> list[torch.Tensor | None]:
        of_outputs, of_kept = cotangents[: self.outputs], cotangents[self.outputs :]
        found = self._pulled(values, results, of_outputs) if any(ct is not None for ct in of_outputs) else [None] * len(values)
        if any(ct is not None for ct in of_kept):
            found = self._with_second_order(found, values, of_kept, wanted)
        return [gradient if needed else None for gradient, needed in zip(found, wanted, strict=True)]

    def _pulled(self, values: Tensors, results: Tensors, cotangents: Sequence[torch.Tensor | None]) -> list[torch.Tensor | None]:
        rest = iter(results)
        residuals = self.kept.rebuild([values[place] if place >= 0 else next(rest) for place in self.origin])
        given = [_cotangent(ct, like) for ct, like in zip(cotangents, self.likes, strict=True)]
        fixed, _ = self.args.split(values)
        result = self.bwd(*fixed, residuals, self.output.rebuild(given))
        moving = self.args.moving
        found = self._checked(result, values[: moving.count])
        return [*found, *[None] * self.args.fixed.count]

    def _checked(self, result: Any, values: Tensors) -> list[torch.Tensor | None]:
        """The flat cotangents that ``bwd`` returned; None for what is zero, or belongs to an integer."""
        count = len(self.args.places)
        if not isinstance(result, tuple | list) or len(result) != count:
            got = f"{len(result)} values" if isinstance(result, tuple | list) else shown(result)
            raise GradientTypeError(
                f"custom_vjp: bwd of {self.name} must return a tuple with one cotangent for each of its {count} differentiated "
                f"argument(s), but it returned {got}."
            )
        subtrees = self.args.moving.rebuild(range(len(values)))
        flat: list[torch.Tensor | None] = [None] * len(values)
        for place, (numbers, cotangents) in enumerate(zip(subtrees, result, strict=True)):
            if cotangents is None:
                continue
            name = argument_name(self.fun, self.args.places[place])
            for number, cotangent in self._pairs(numbers, cotangents, name):
                flat[number] = self._fitted(cotangent, values[number], number)
        return flat

    def _pairs(self, numbers: Any, cotangents: Any, name: str) -> list[tuple[int, Any]]:
        marked = tree.replace_none(cotangents, _ZERO)
        leaves, structure = tree.flatten(numbers)
        found, other = tree.flatten(marked)
        if structure != other:
            raise GradientTypeError(
                f"custom_vjp: bwd of {self.name} must return a cotangent with the structure of argument {name}, or None, but it "
                f"returned {shown(cotangents)}."
            )
        return list(zip(leaves, found, strict=True))

    def _fitted(self, cotangent: Any, value: torch.Tensor, number: int) -> torch.Tensor | None:
        if cotangent is _ZERO or not is_inexact(value):
            return None
        hint = "Give an array of the shape of the argument, or None for zeros."
        found = as_tensor(cotangent, lambda: f"custom_vjp: the cotangent of {self.args.names()[number]}", hint, value)
        if found.shape != value.shape or found.dtype is not value.dtype:
            raise GradientValueError(
                f"custom_vjp: bwd of {self.name} must return a cotangent of the shape and dtype of argument "
                f"{self.args.names()[number]}, {describe(value)}, but it is {describe(found)}."
            )
        return conjugate(found)

    def _with_second_order(
        self,
        found: Sequence[torch.Tensor | None],
        values: Tensors,
        of_kept: Sequence[torch.Tensor | None],
        wanted: Sequence[bool],
    ) -> list[torch.Tensor | None]:
        """The residuals are functions of the arguments too, and were differentiated."""
        given = [(i, ct) for i, ct in enumerate(of_kept) if ct is not None]

        def residuals(*active: torch.Tensor) -> Any:
            rest = iter(active)
            inside = [next(rest) if needed else value for needed, value in zip(wanted, values, strict=True)]
            kept = self.forward(inside)[self.outputs :]
            return tuple([kept[i] for i, _ in given]), ()

        pull = derivatives.vjp(residuals, [value for needed, value in zip(wanted, values, strict=True) if needed])[2]
        more = iter(pull([ct for _, ct in given]))
        added = [next(more) if needed else None for needed in wanted]
        return [a if b is None else b if a is None else a + b for a, b in zip(found, added, strict=True)]


_ZERO = object()


def _cotangent(given: torch.Tensor | None, like: tuple[torch.Size, torch.dtype, torch.device]) -> torch.Tensor:
    """A cotangent in JAX's convention."""
    shape, dtype, device = like
    if not (dtype.is_floating_point or dtype.is_complex):
        return torch.zeros(shape, dtype=FLOAT0, device=device)
    return torch.zeros(shape, dtype=dtype, device=device) if given is None else conjugate(given)
