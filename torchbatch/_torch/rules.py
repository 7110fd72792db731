"""Batching rules for PyTorch's operators that lack one; what is left runs through the loop of ``fallback``.

The rules are added once, at import, under the dispatch key of batched tensors, and never replace one that PyTorch has. So
they serve backward formulas, ``torch.func.vmap`` and ``torch.compile`` too. Most are derived from the operator's own
description: an operator that PyTorch defines by others is run as these, ``op_`` is ``op`` and a copy, and so on.

Private names used, seen on torch 2.11, 2.13 and 2.15: ``OpOverload._op_dk``, ``OpOverload._schema``,
``torch._decomp.decomposition_table`` and those of :mod:`torchbatch._torch.batching`.
"""

from __future__ import annotations

import functools
import gc
import re
from collections.abc import Callable, Container, Iterator
from typing import Any

import torch
from torch._decomp import decomposition_table

from torchbatch._torch import batching, formulas
from torchbatch._torch.batching import Kernel
from torchbatch._torch.fallback import loop_kernel
from torchbatch.errors import InPlaceError

_IMPLICIT = torch._C.DispatchKey.CompositeImplicitAutograd
_EXPLICIT = torch._C.DispatchKey.CompositeExplicitAutograd
_has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key


def _when_batched(name: str, run: Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]) -> Kernel:
    """A kernel that calls ``run(operator, args, kwargs)`` where an argument is batched at the current level."""
    cell: list[Any] = []

    def kernel(*args: Any, **kwargs: Any) -> Any:
        if not cell:
            cell.append(batching.operator_of(name))
        if batching.batch_size(args, kwargs, batching.current_level()) is None:
            with batching.below():
                return cell[0](*args, **kwargs)
        return run(cell[0], args, kwargs)

    return kernel


# --- an operator that PyTorch makes of others ------------------------------------------------------------------------


def _implicit(name: str) -> Kernel:
    """PyTorch's own definition by other operators, or the loop where that needs the values of some sample."""
    loop = loop_kernel(name)

    def kernel(*args: Any, **kwargs: Any) -> Any:
        operator = batching.operator_of(name)
        try:
            return operator._op_dk(_IMPLICIT, *args, **kwargs)
        except RuntimeError as error:
            if operator._schema.is_mutable or not _NEEDS_VALUES.search(str(error)):
                raise
        return loop(*args, **kwargs)

    return kernel


_NEEDS_VALUES = re.compile(
    r"vmap: (?!We do not support batching operators that can output dynamic)|needs one True or False from comparing|"
    r"Cannot access (data pointer|storage) of|requires special handling"
)


def _explicit(name: str) -> Kernel:
    """The same, for operators whose gradient is a formula of its own."""
    return _when_batched(name, lambda operator, args, kwargs: operator._op_dk(_EXPLICIT, *args, **kwargs))


def _decomposed(name: str) -> Kernel:
    """PyTorch's definition in Python."""
    return _when_batched(name, lambda operator, args, kwargs: decomposition_table[operator](*args, **kwargs))


def _formula(name: str) -> Kernel:
    """Our definition, a function in :mod:`torchbatch._torch.formulas`."""
    function = formulas.TABLE[name.removeprefix("aten::")]
    return _when_batched(name, lambda operator, args, kwargs: function(operator, *args, **kwargs))


# --- an operator that is another one and a copy ----------------------------------------------------------------------


def _in_place(name: str) -> Kernel:
    """``op_`` as ``op``, and a copy of its result into the argument."""

    def run(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        functional = _functional(operator)
        if functional is None:
            return loop_kernel(name)(*args, **kwargs)
        _write(operator, args[0], functional(*args, **kwargs))
        return args[0]

    return _when_batched(name, run)


def _out(name: str) -> Kernel:
    """``op(..., out=x)`` as ``op(...)``, and a copy of its result into ``x``."""

    def run(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        functional = _functional(operator)
        if functional is None:
            return loop_kernel(name)(*args, **kwargs)
        places = batching.written(operator)
        targets = [batching.argument(place, args, kwargs) for place in places]
        names = {key for _, key in places}
        results = functional(*args, **{key: value for key, value in kwargs.items() if key not in names})
        single = isinstance(results, torch.Tensor)
        for target, result in _pairs(targets, [results] if single else results):
            _write(operator, target, result)
        return targets[0] if single else tuple(targets)

    return _when_batched(name, run)


def _pairs(targets: Any, results: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    for target, result in zip(targets, results, strict=True):
        if isinstance(target, torch.Tensor):
            yield target, result
        else:
            yield from _pairs(target, result)


def _write(operator: Any, target: torch.Tensor, result: torch.Tensor) -> None:
    if not torch.can_cast(result.dtype, target.dtype):
        raise RuntimeError(f"result type {result.dtype} can't be cast to the desired output type {target.dtype}")
    if target.shape != result.shape:
        raise InPlaceError(
            f"{operator} writes a result of shape {tuple(result.shape)} for one sample into a tensor of shape "
            f"{tuple(target.shape)}, which cannot change its shape inside vmap."
        )
    target.copy_(result)


def _out_or_loop(name: str) -> Kernel:
    """``_out`` for an operator that writes into arguments given for its results, whatever it calls them; else the loop."""
    out, loop = _out(name), loop_kernel(name)

    def kernel(*args: Any, **kwargs: Any) -> Any:
        writes_results = any(argument.is_out for argument in batching.operator_of(name)._schema.arguments)
        return (out if writes_results else loop)(*args, **kwargs)

    return kernel


_functionals: dict[Any, Any] = {}


def _functional(operator: Any) -> Any:
    """The operator that returns what ``operator`` writes, or None."""
    if operator not in _functionals:
        schema = operator._schema
        writes = {place[1] for place in batching.written(operator)}
        out = any(a.is_out for a in schema.arguments)
        wanted = [(a.name, _kind(a)) for a in schema.arguments if not (out and a.name in writes)]
        base = schema.name.removeprefix("aten::")
        packet = getattr(torch.ops.aten, base if out else base.removesuffix("_"), None)
        _functionals[operator] = _overload(packet, wanted)
    return _functionals[operator]


def _overload(packet: Any, wanted: list[tuple[str, str]]) -> Any:
    for overload in packet.overloads() if packet is not None else ():
        found = getattr(packet, overload)
        arguments = found._schema.arguments
        if not found._schema.is_mutable and [(a.name, _kind(a)) for a in arguments] == wanted:
            return found
    return None


def _kind(argument: Any) -> str:
    return str(argument.type)


def _copied_view(name: str) -> Kernel:
    """``view_copy`` as ``view`` and a copy."""
    base, _, overload = name.removeprefix("aten::").partition(".")
    view = getattr(getattr(torch.ops.aten, base.removesuffix("_copy"), None), overload or "default", None)
    if view is None:
        return loop_kernel(name)

    def run(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = view(*args, **kwargs)
        return result.clone() if isinstance(result, torch.Tensor) else [part.clone() for part in result]

    return _when_batched(name, run)


# --- an operator that PyTorch can run on all samples at once ---------------------------------------------------------


def _elementwise(name: str) -> Kernel:
    """An operator that works on each element alone, with broadcasting."""

    def run(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        level = batching.current_level()
        given = [value for value in args if isinstance(value, torch.Tensor)]
        rank = max(value.dim() for value in given)
        dtype = torch.result_type(*given) if len(given) == 2 else None
        with batching.below():
            physical = [batching.replaced(value, lambda x: _aligned(x, rank, dtype, level)) for value in args]
            return batching.wrapped(operator(*physical, **kwargs), level)

    return _when_batched(name, run)


def _aligned(value: torch.Tensor, rank: int, dtype: torch.dtype | None, level: int) -> torch.Tensor:
    inner = batching.opened(value, level)
    if inner.axis is None:
        return value if dtype is None else value.to(dtype)
    front = inner.front()
    front = front.reshape(front.shape[0], *[1] * (rank - value.dim()), *front.shape[1:])
    return front if dtype is None else front.to(dtype)


def _leading(ranks: tuple[int, ...]) -> Callable[[str], Kernel]:
    """An operator on tensors whose last ``ranks[i]`` axes it works on, and whose other axes are a batch already."""

    def make(name: str) -> Kernel:
        def run(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            level = batching.current_level()
            size = batching.batch_size(args, kwargs, level) or 0
            batch = torch.broadcast_shapes(*[args[i].shape[: args[i].dim() - rank] for i, rank in enumerate(ranks)])
            with batching.below():
                physical = list(args)
                for i, rank in enumerate(ranks):
                    inner = batching.opened(args[i], level)
                    front = inner.value.unsqueeze(0) if inner.axis is None else inner.front()
                    own = front.dim() - 1 - rank
                    front = front.reshape(front.shape[0], *[1] * (len(batch) - own), *front.shape[1:])
                    physical[i] = front.expand(size, *batch, *front.shape[1 + len(batch) :])
                result = operator(*physical, **kwargs)
                if isinstance(result, torch.Tensor):
                    return batching.wrapped(result, level)
                return tuple(batching.wrapped(part, level) for part in result)

        return _when_batched(name, run)

    return make


def _folded(ranks: tuple[int, ...]) -> Callable[[str], Kernel]:
    """An operator whose ``i``-th tensor may have a batch axis before its last ``ranks[i]``: the samples become part of it."""

    def make(name: str) -> Kernel:
        def run(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            level = batching.current_level()
            size = batching.batch_size(args, kwargs, level) or 0
            rank_of = dict(zip((id(value) for value in args if isinstance(value, torch.Tensor)), ranks, strict=True))

            def fold(value: torch.Tensor) -> torch.Tensor:
                inner = batching.opened(value, level)
                front = value.unsqueeze(0).expand(size, *value.shape) if inner.axis is None else inner.front()
                return front.flatten(0, 1) if value.dim() > rank_of[id(value)] else front

            with batching.below():
                results = operator(*[batching.replaced(value, fold) for value in args], **kwargs)
                parts = [results] if isinstance(results, torch.Tensor) else results
                if args[0].dim() > ranks[0]:
                    parts = [part.unflatten(0, (size, -1)) for part in parts]
                wrapped = [batching.wrapped(part, level) for part in parts]
            return wrapped[0] if isinstance(results, torch.Tensor) else tuple(wrapped)

        return _when_batched(name, run)

    return make


# --- which operator takes which --------------------------------------------------------------------------------------

_POLYNOMIALS = [
    f"special_{name}"
    for name in (
        "chebyshev_polynomial_t chebyshev_polynomial_u chebyshev_polynomial_v chebyshev_polynomial_w hermite_polynomial_h "
        "hermite_polynomial_he laguerre_polynomial_l legendre_polynomial_p shifted_chebyshev_polynomial_t "
        "shifted_chebyshev_polynomial_u shifted_chebyshev_polynomial_v shifted_chebyshev_polynomial_w"
    ).split()
]

ELEMENTWISE = {
    *_POLYNOMIALS,
    *(f"{name}.{kind}" for name in _POLYNOMIALS for kind in ("n_scalar", "x_scalar")),
    *"_conj_physical _neg_view special_airy_ai _standard_gamma_grad _dirichlet_grad dequantize.self int_repr".split(),
}

LEADING: dict[str, tuple[int, ...]] = {
    "_linalg_eigvals": (2,),
    "linalg_lu": (2,),
    "linalg_ldl_solve": (2, 1, 2),
    "ormqr": (2, 1, 2),
}

FOLDED: dict[str, tuple[int, ...]] = {
    "fractional_max_pool2d": (3, 2),
    "fractional_max_pool2d_backward": (3, 3, 3),
    "fractional_max_pool3d": (4, 2),
    "fractional_max_pool3d_backward": (4, 4, 4),
}

#: Operators whose C++ definition by other operators works for batched tensors.
EXPLICIT = set(
    "binary_cross_entropy_with_logits fill.Scalar fill.Tensor "
    "huber_loss_backward smooth_l1_loss_backward rrelu_with_noise_backward unsafe_split_with_sizes zero "
    "lift linalg__powsum norm.ScalarOpt_dtype".split()
)

#: Operators whose definition in ``torch._decomp`` works for batched tensors.
DECOMPOSED = set(
    "_addmm_activation _upsample_nearest_exact1d _upsample_nearest_exact2d _upsample_nearest_exact3d "
    "_weight_norm_interface addr affine_grid_generator isin.Tensor_Tensor isin.Tensor_Scalar isin.Scalar_Tensor "
    "masked_fill.Tensor mse_loss_backward multi_margin_loss nll_loss_backward nll_loss_forward "
    "nll_loss2d_backward nll_loss2d_forward norm.ScalarOpt_dim_dtype renorm special_log_ndtr unfold_backward "
    "soft_margin_loss soft_margin_loss_backward _batch_norm_with_update _batch_norm_with_update_functional "
    "_chunk_cat view_copy.dtype native_dropout_backward".split()
)

#: Operators of which PyTorch's own definition by others does not work for batched tensors, or answers a question of Python.
LOOPED = set(
    "_add_batch_dim _remove_batch_dim _backward _version data is_leaf output_nr requires_grad_ retain_grad retains_grad "
    "set_data set_.source_Tensor_storage_offset".split()
)


_TABLES: tuple[tuple[Container[str], Callable[[str], Kernel]], ...] = (
    (formulas.TABLE, _formula),
    (ELEMENTWISE, _elementwise),
    (EXPLICIT, _explicit),
    (DECOMPOSED, _decomposed),
    (LOOPED, loop_kernel),
)


def kernel_of(name: str) -> Kernel:
    """The batching rule for an operator of :func:`batching.lacking`."""
    short = name.removeprefix("aten::")
    base, _, overload = short.partition(".")
    for names, make in _TABLES:
        if short in names:
            return make(name)
    if short in LEADING:
        return _leading(LEADING[short])(name)
    if short in FOLDED:
        return _folded(FOLDED[short])(name)
    if base.endswith("_") and not base.endswith("__") and not _has_kernel(name, "CompositeImplicitAutograd"):
        return _in_place(name)
    if base.endswith("_copy") and not overload.endswith("out"):
        return _copied_view(name)
    if _has_kernel(name, "CompositeImplicitAutograd") and not overload.endswith("out"):
        return _implicit(name)
    return _out_or_loop(name)


@functools.cache
def _known_kernel(name: str) -> Kernel:
    return kernel_of(name)


def _run(name: str, *args: Any, **kwargs: Any) -> Any:
    """Make the rule of an operator when it is first needed, and apply it."""
    return _known_kernel(name)(*args, **kwargs)


_library = torch.library.Library("aten", "IMPL")


def _register() -> None:
    """Two thousand small objects, which are to stay: a look at them by the garbage collector would cost more than they do."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        for name in batching.lacking():
            _library.impl(name, functools.partial(_run, name), batching.NAME)
    finally:
        if collecting:
            gc.enable()


_register()
