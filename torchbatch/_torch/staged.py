"""Trace the body of a loop, or a branch, to a graph of its own, while the function around it is traced.

A body sees values as the function around it does: wrapped by every transform that is open. What the graph works on are the
plain tensors inside. So each value is taken apart (:func:`lowered`) level by level: at the level of a ``vmap`` the samples
become an axis, at that of forward mode a value and its tangent become two. Inside the body it is put together again
(:func:`raised`), with the same transforms open. Levels of reverse mode are looked through: whoever calls this takes care of
gradients.

The places at which a value is batched, or has a tangent, are a set of pairs (level, path), where the path is the number of the
value followed by the levels whose tangent it is. What a loop carries must have the same places going in and coming out, so a
trace that finds new ones (:class:`Grown`) is made again with them.

Private names used, seen on torch 2.11, 2.13 and 2.15: ``torch._functorch.pyfunctorch.temporarily_clear_interpreter_stack``,
``temporarily_restore_interpreter_stack``, ``retrieve_all_functorch_interpreters``;
``torch.utils._python_dispatch._disable_current_modes``, ``_get_current_dispatch_mode_stack``;
``torch._guards.active_fake_mode``; ``torch._subclasses.fake_tensor.FakeTensor``, ``FakeTensorMode``;
``torch._C._functorch.TransformType``, ``_wrap_for_grad``, ``_unwrap_for_grad``; ``torch._VF._make_dual``, ``_unpack_dual``;
``torch.fx.experimental.proxy_tensor.make_fx``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch._functorch.pyfunctorch import (
    retrieve_all_functorch_interpreters,
    temporarily_clear_interpreter_stack,
    temporarily_restore_interpreter_stack,
)
from torch._guards import active_fake_mode
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import GraphModule, Interpreter
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes, _get_current_dispatch_mode_stack

from torchbatch._torch import batching, graphs, levels, seeding, wrappers
from torchbatch._torch.captured import LIFTS, Captured, check_not_higher_order
from torchbatch._torch.programs import Body, Like, Program
from torchbatch.errors import InPlaceError

_functorch: Any = torch._C._functorch
_dual: Any = torch._VF
_VMAP, _JVP, _GRAD = (getattr(_functorch.TransformType, name) for name in ("Vmap", "Jvp", "Grad"))
_aten = torch.ops.aten

Path = tuple[int, ...]
Places = frozenset[tuple[int, Path]]
Named = dict[Path, torch.Tensor]


class Grown(Exception):  # noqa: N818 (it is no error)
    """Values come out batched, or with tangents, that went in without."""

    def __init__(self, places: Places) -> None:
        super().__init__()
        self.places = places


def is_staging() -> bool:
    """Whether jit traces here, so that a loop can become a step of its graph."""
    return graphs.is_tracing() and _capturing() is not None and active_fake_mode() is not None


def _capturing() -> Captured | None:
    for mode in reversed(_get_current_dispatch_mode_stack()):
        if isinstance(mode, Captured):
            return mode
        if isinstance(mode, _Within):
            return mode.captured
    return None


# --- from wrapped values to plain tensors and back -------------------------------------------------------------------


class _Transform(NamedTuple):
    """A transform that is open."""

    level: int
    kind: Any
    size: int  # how many samples a vmap has

    @classmethod
    def of(cls, interpreter: Any) -> _Transform:
        kind = interpreter.key()
        return cls(interpreter.level(), kind, interpreter.batch_size() if kind == _VMAP else 0)


class Stack:
    """The transforms that are open where a loop is called; while one of these is entered, none is."""

    def __init__(self) -> None:
        self._context = contextlib.ExitStack()

    def __enter__(self) -> Stack:
        self.transforms = [_Transform.of(interpreter) for interpreter in reversed(retrieve_all_functorch_interpreters())]
        self._layers = self._context.enter_context(temporarily_clear_interpreter_stack())
        return self

    def __exit__(self, *error: Any) -> None:
        self._context.__exit__(*error)

    def everything(self) -> contextlib.AbstractContextManager[None]:
        """All transforms are open again."""
        return self._from(0)

    def _from(self, index: int) -> contextlib.AbstractContextManager[None]:
        """All transforms but the innermost ones, as many as ``index`` says, are open again."""
        return temporarily_restore_interpreter_stack(self._layers[index:])

    def lowered(self, values: Sequence[torch.Tensor], need: Places = frozenset(), at: int = 0) -> tuple[Named, Places]:
        """Values without wrappers, by path, and the places that they have.

        Args:
            values: as they are where all transforms are open.
            need: places that are made, if they are not there.
            at: the axis that the samples become.
        """
        found: Named = {(i,): wrappers.alive(value) for i, value in enumerate(values)}
        places: set[tuple[int, Path]] = set()
        for i, (level, kind, size) in enumerate(self.transforms):
            if kind == _VMAP:
                with self._from(i + 1):
                    found, new = _unmapped(found, level, size, need, at)
            elif kind == _JVP:
                found, new = self._without_tangents(found, i, need)
            else:
                found, new = {path: _functorch._unwrap_for_grad(value, level) for path, value in found.items()}, set()
            places |= new
        return found, frozenset(places)

    def _without_tangents(self, found: Named, index: int, need: Places) -> tuple[Named, set[tuple[int, Path]]]:
        level = self.transforms[index].level
        result: Named = {}
        places = set()
        for path, value in found.items():
            if not (value.is_floating_point() or value.is_complex()):
                result[path] = _functorch._unwrap_for_grad(value, level)
                continue
            with self._from(index):
                primal, tangent = _dual._unpack_dual(value, level=0)
            result[path] = _functorch._unwrap_for_grad(primal, level)
            if tangent is not None:
                with self._from(index):
                    tangent = levels.of_dtype(tangent, primal)
                result[(*path, level)] = _functorch._unwrap_for_grad(tangent, level)
            elif (level, path) in need:
                with self._from(index + 1):
                    result[(*path, level)] = torch.zeros_like(result[path])
            if (*path, level) in result:
                places.add((level, path))
        return result, places

    def raised(self, values: Named, places: Places, at: int = 0) -> list[torch.Tensor]:
        """The inverse of :meth:`lowered`."""
        found = dict(values)
        for i in reversed(range(len(self.transforms))):
            level, kind, _ = self.transforms[i]
            mine = [path for at_level, path in places if at_level == level]
            with self._from(i):
                for path in mine:
                    if kind == _VMAP:
                        found[path] = levels.add_batch_dim(found[path], at, level)
                    elif kind == _JVP:
                        primal, tangent = found[path], found.pop((*path, level))
                        wrapped = _functorch._wrap_for_grad(primal, level), _functorch._wrap_for_grad(tangent, level)
                        found[path] = _dual._make_dual(*wrapped, level=0)
        return [found[(i,)] for i in range(len(found))]


def _unmapped(found: Named, level: int, size: int, need: Places, at: int) -> tuple[Named, set[tuple[int, Path]]]:
    result: Named = {}
    places = set()
    for path, value in found.items():
        inner, axis = levels.unwrap_batched(value, level)
        if axis is not None:
            inner = inner.movedim(axis, at)
        elif (level, path) in need:
            inner = value.unsqueeze(at).expand(*value.shape[:at], size, *value.shape[at:])
        if axis is not None or (level, path) in need:
            places.add((level, path))
        result[path] = inner
    return result, places


def flat(named: Named) -> list[torch.Tensor]:
    """The tensors in an order that depends on the paths alone."""
    return [named[path] for path in sorted(named)]


# --- graphs ----------------------------------------------------------------------------------------------------------


class Staged(NamedTuple):
    """A traced body: a graph of its inputs and of the tensors from outside that it reads."""

    body: Body  # its inputs are those of the body, then the captured tensors
    captured: list[torch.Tensor]
    results: list[Like]


class _Within(TorchDispatchMode):
    """Puts in the place of each real tensor the fake that stands for it in the trace around."""

    supports_higher_order_operators = True

    def __init__(self, captured: Captured, keep: bool = False) -> None:
        super().__init__()
        self.captured, self._keep = captured, keep
        self.made: dict[int, torch.Tensor] = {}  # what operations returned, if it is kept

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        check_not_higher_order(func)
        if func in LIFTS:
            return self._noted(func(*args, **(kwargs or {})))
        if torch.Tag.nondeterministic_seeded in func.tags:
            seeding.drawn()
        args, kwargs = self.captured.replaced(args, kwargs or {})
        return self._noted(func(*args, **kwargs))

    def _noted(self, result: Any) -> Any:
        if self._keep:
            self.made.update((id(value), value) for value in batching.tensors((result,), {}))
        return self.captured.note(result)


@contextlib.contextmanager
def unrecorded() -> Iterator[Callable[[torch.Tensor], bool]]:
    """Run on fakes as the trace does, without being recorded; a function that tells whether a tensor was made in the run."""
    captured, mode = _capturing(), active_fake_mode()
    with _disable_current_modes(), mode, _Within(captured, keep=True) as within:  # type: ignore[union-attr, arg-type]
        yield lambda value: id(levels.innermost(value)) in within.made


def stage(body: Callable[..., Sequence[torch.Tensor]], inputs: Sequence[torch.Tensor]) -> Staged:
    """Trace ``body``, a function of plain tensors, on fakes like ``inputs``, apart from the trace around.

    Raises:
        InPlaceError: it writes into a tensor from outside.
    """
    captured, mode = _capturing(), active_fake_mode()

    def run(*values: torch.Tensor) -> list[torch.Tensor]:
        with _Within(captured):  # type: ignore[arg-type]
            return [value.detach() for value in body(*values)]

    with _disable_current_modes(), torch.no_grad():
        with mode:  # type: ignore[union-attr]
            recorded = make_fx(run, graphs.DECLARED, _allow_fake_constant=True)(*[_like(value) for value in inputs])
        outside = _outside(recorded)
        shapes = None if mode is None else mode.shape_env
        own_mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=shapes, static_shapes=shapes is None)
        functional = torch.func.functionalize(Interpreter(recorded).run)
        with own_mode:
            examples = [_like(value) for value in [*inputs, *outside]]
            module = make_fx(functional, graphs.REAL_ZEROS, _allow_non_fake_inputs=True)(*examples)
    _check_no_writes(module)
    module.graph.eliminate_dead_code(graphs.has_effect)
    module.recompile()
    outputs: Any = module.graph.output_node().args[0]
    return Staged(Body(module, examples, own_mode), outside, [Like.of(node.meta["val"]) for node in outputs])


def _like(value: torch.Tensor) -> torch.Tensor:
    return torch.empty(value.size(), dtype=value.dtype, device=value.device)


def _outside(module: GraphModule) -> list[torch.Tensor]:
    """Make inputs of the fakes that a graph holds as constants; these fakes."""
    uses: dict[int, tuple[torch.Tensor, list[Any]]] = {}
    for node in module.graph.find_nodes(op="get_attr"):
        value = getattr(module, str(node.target))
        if isinstance(value, FakeTensor):
            uses.setdefault(id(value), (value, []))[1].append(node)
    with module.graph.inserting_before(next(node for node in module.graph.nodes if node.op != "placeholder")):
        made = [module.graph.placeholder(f"outside_{i}") for i in range(len(uses))]
    for placeholder, (value, nodes) in zip(made, uses.values(), strict=True):
        placeholder.meta["val"] = value
        for node in nodes:
            node.replace_all_uses_with(placeholder)
            module.graph.erase_node(node)
    module.recompile()
    return [value for value, _ in uses.values()]


def _check_no_writes(module: GraphModule) -> None:
    placeholders = module.graph.find_nodes(op="placeholder")
    for node in module.graph.find_nodes(op="call_function", target=_aten.copy_.default):
        if node.args[0] in placeholders:
            raise InPlaceError(
                "jit: the body of a loop, or a branch, writes in place into its argument or into a tensor from outside. Return "
                "the new value instead; what changes from step to step belongs into the carry."
            )


_REDUCED = (_aten.sum, _aten.mean, _aten.amax, _aten.amin, _aten.max, _aten.min, _aten.any, _aten.all)


def is_fused(graph: GraphModule) -> bool:
    """Whether a graph has only operations that a compiler fuses with others: on single numbers, views and reductions."""
    return all(_is_simple(node.target) for node in graph.graph.nodes if node.op == "call_function")


def _is_simple(operator: Any) -> bool:
    if not isinstance(operator, torch._ops.OpOverload) or torch.Tag.nondeterministic_seeded in operator.tags:
        return False
    is_view = any(result.alias_info is not None for result in operator._schema.returns)
    return torch.Tag.pointwise in operator.tags or is_view or operator.overloadpacket in _REDUCED


def called(program: Program, values: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The results of a program, as a step of the graph that is traced."""
    captured = _capturing()
    if captured is not None:
        captured.programs.append(program)
    with torch.no_grad():
        return program.call(list(values))
