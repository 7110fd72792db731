"""Tensors made inside a mapped function, which can be written in place with per-sample values.

``out = torch.zeros(3)`` inside ``vmap`` makes one tensor for all samples, and PyTorch refuses ``out[0] = x.sum()`` where
``x`` is per-sample: there is no room for one value per sample. So such a tensor is made a :class:`LocalTensor`: the same
tensor, with a ``__torch_function__`` that looks before it is written to. If the value varies along an axis that the tensor
does not have, the tensor gets that axis first: the Python object is given a new, batched body, and so is every view of it
that is still alive. A tensor that is only read stays one tensor for all samples and costs nothing more.

Private names used, seen on torch 2.11, 2.13 and 2.15: ``torch._C._swap_tensor_impl``,
``torch._C._functorch.set_inplace_requires_grad_allowed``, ``get_inplace_requires_grad_allowed``, ``TransformType``,
``torch._functorch.pyfunctorch.retrieve_all_functorch_interpreters`` and those of :mod:`torchbatch._torch.levels` and
:mod:`torchbatch._torch.batching`.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch._functorch.pyfunctorch import retrieve_all_functorch_interpreters

from torchbatch._torch import batching, caller, levels, overlay
from torchbatch.errors import InPlaceError, UnsupportedOperationError

_AUGMENTED = frozenset(f"__i{name}__" for name in "add sub mul truediv floordiv mod pow and or xor lshift rshift".split())


_RANDOM = frozenset(
    "bernoulli_ cauchy_ exponential_ geometric_ kaiming_normal_ kaiming_uniform_ log_normal_ normal_ orthogonal_ random_ "
    "trunc_normal_ uniform_ xavier_normal_ xavier_uniform_".split()
)
_EXPORTS = frozenset("numpy __array__ __dlpack__ data_ptr storage untyped_storage".split())
_functorch: Any = torch._C._functorch
_swap: Callable[[torch.Tensor, torch.Tensor], None] = torch._C._swap_tensor_impl
_NORMS = frozenset(("batch_norm", "instance_norm"))  # they write into their running averages
_OPERATOR = type(torch.ops.aten.add.Tensor)
_DIFFERENTIATES = (_functorch.TransformType.Grad, _functorch.TransformType.Jvp)


class _Calls(threading.local):
    """The calls of mapped functions that run in this thread and may write, outermost first: a list with the level of each."""

    def __init__(self) -> None:
        self.stack: list[list[int]] = []


calls = _Calls()
given_room: list[weakref.ref[torch.Tensor]] = []  # tensors that got a batched body, which may be older than the call


class LocalTensor(torch.Tensor):
    """A tensor made inside a mapped function that does not (yet) vary along all of its axes."""

    _home: int  # the number of transforms that were open when it was made
    _call: object  # the call of a mapped function in which it was made
    _exported: bool  # whether its memory was handed to something that does not follow exchanges of the body
    _parent: LocalTensor | None  # what it is a view of
    _views: _Views  # what is a view of it, by id

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not levels.depth():
            return _afterwards(func, args, kwargs)
        name = getattr(func, "__name__", "").partition(".")[0]
        special = _SPECIAL.get(name)
        if special is not None and type(args[0]) is LocalTensor:
            return special(func, args, kwargs)
        if name in _EXPORTS and type(args[0]) is LocalTensor:
            _root(args[0])._exported = True
        for target in _written(func, name, args, kwargs):
            _make_room(target, args, kwargs)
            if name in _RANDOM:
                _make_room_for_draws(target)
        if "out" in kwargs and type(func) is not _OPERATOR and next(_locals(kwargs["out"]), None) is not None:
            return _write_out(func, args, dict(kwargs))
        return _run(func, args, kwargs)

    def __copy__(self) -> torch.Tensor:
        return self.view(self.shape)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _plain(self).__reduce_ex__(protocol)

    def __repr__(self, **options: Any) -> str:  # type: ignore[override]
        return torch.Tensor.__repr__(_plain(self), **options)


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    with torch._C.DisableTorchFunctionSubclass():
        result = func(*args, **kwargs)
        _adopt_results(func, args, kwargs, result)
    return result


def adopt(tensor: torch.Tensor) -> torch.Tensor:
    """Make a new tensor a local one, unless it varies along every open axis already."""
    if type(tensor) is torch.Tensor:
        tensor.__class__ = LocalTensor
        local: Any = tensor
        local._home, local._parent, local._views = levels.depth(), None, {}
        local._call, local._exported = calls.stack[-1] if calls.stack else None, False
    return tensor


def settle(tensor: torch.Tensor) -> None:
    """Make a local tensor of the mapped function that ends an ordinary one, or one of the mapped function around it."""
    if type(tensor) is not LocalTensor or tensor._home < levels.depth():
        return
    root = _root(tensor)
    outer = max((level for level, _, _ in levels.open_maps() if level < levels.depth()), default=0)
    if outer:
        root._home = outer
        root._call = next((call for call in reversed(calls.stack) if call[0] <= outer), None)
    else:
        _make_ordinary(tensor)


def _make_ordinary(tensor: LocalTensor) -> None:
    del tensor._home, tensor._parent, tensor._views, tensor._call, tensor._exported
    tensor.__class__ = torch.Tensor  # type: ignore[assignment]


def _afterwards(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """A call when no mapped function runs: what one of them left behind (in a cache, in a module) is an ordinary tensor now."""
    for tensor in _locals([list(args), kwargs]):
        _make_ordinary(tensor)
    return func(*args, **kwargs)


def _plain(tensor: LocalTensor) -> torch.Tensor:
    """An ordinary tensor that shares the memory of a local one."""
    with torch._C.DisableTorchFunctionSubclass(), _may_require_grad(tensor):
        return tensor.detach().requires_grad_() if tensor.requires_grad else tensor.detach()


def _written(func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> Iterator[LocalTensor]:
    """The local tensors that a call writes to, if any."""
    if type(func) is _OPERATOR:
        yield from _locals([batching.argument(place, args, kwargs) for place in batching.written(func)])
    elif name == "__setitem__" or name in _AUGMENTED or (name.endswith("_") and not name.endswith("__")):
        yield from _locals(args[0] if args else kwargs.get("tensor"))
    elif name == "__set__":  # x.real = y
        yield from _locals(args[0])
    elif name in _NORMS:
        yield from _locals([args[1:], kwargs.get("running_mean"), kwargs.get("running_var")])


def _locals(value: Any) -> Iterator[LocalTensor]:
    return (tensor for tensor in _tensors(value) if type(tensor) is LocalTensor)


def _write_out(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """``func(..., out=local)``, which PyTorch cannot map, as a call and a copy."""
    out = kwargs.pop("out")
    results = func(*args, **kwargs)
    for target, result in zip(_tensors(out), _tensors(results), strict=True):
        if not torch.can_cast(result.dtype, target.dtype):
            raise InPlaceError(f"out= has dtype {target.dtype}, to which a result of dtype {result.dtype} cannot be cast.")
        if target.shape != result.shape and target.numel():
            raise InPlaceError(
                f"out= has shape {tuple(target.shape)}, but the result for one sample has shape {tuple(result.shape)}."
            )
        (target if target.shape == result.shape else target.resize_(result.shape)).copy_(result)
    return out


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def _make_room(target: LocalTensor, args: Any, kwargs: dict[str, Any]) -> None:
    """Give ``target`` every axis along which the other tensors of the call vary."""
    root = _root(target)
    has = set(levels.batch_levels(root))
    for other in _tensors([list(args), kwargs]):
        for level, size in _sizes(other):
            if level in has:
                continue
            if level > root._home or not any(call is root._call for call in calls.stack):
                raise InPlaceError(_SHARED.format("the vmap that maps it, so that its samples share it") + caller.line())
            _vary(root, level, size)
            has.add(level)


def _make_room_for_draws(target: LocalTensor) -> None:
    """Give ``target`` the axis of every open vmap that draws for each sample anew."""
    root = _root(target)
    has = set(levels.batch_levels(root))
    for level, size, randomness in levels.open_maps():
        if randomness == "different" and level <= root._home and level not in has:
            _vary(root, level, size)


def _root(target: LocalTensor) -> LocalTensor:
    while type(target._parent) is LocalTensor:
        target = target._parent
    return target


def _sizes(value: torch.Tensor) -> Iterator[tuple[int, int]]:
    """Each level at which ``value`` is batched, with the size of that batch, outermost first."""
    found = []
    while levels.is_wrapped(value):
        if levels.is_batchedtensor(value):
            level = levels.maybe_get_level(value)
            inner, at = levels.unwrap_batched(value, level)
            found.append((level, inner.shape[at]))
        value = levels.get_unwrapped(value)
    return reversed(found)


_SHARED = (
    "A per-sample value is written in place into a tensor that was made outside {}. Make the tensor inside the mapped "
    "function, or return the value instead."
)


def _vary(root: LocalTensor, level: int, size: int) -> None:
    """Give the object ``root``, and all views of it, a body with one copy per sample of ``level``."""
    if root._exported:
        raise InPlaceError(
            "A per-sample value is written in place into a tensor whose memory was handed on (.numpy(), dlpack, .data_ptr()), "
            f"where it would not be seen. Write first, or hand on a copy.{caller.line()}"
        )
    given_room.append(weakref.ref(root))
    for interpreter in retrieve_all_functorch_interpreters():
        if interpreter.level() > root._home and interpreter.key() in _DIFFERENTIATES:
            raise InPlaceError(_SHARED.format("the function that is being differentiated") + caller.line())
    with torch._C.DisableTorchFunctionSubclass():
        if root.requires_grad and root.is_leaf:
            inner, at = levels.unwrap_batched(along(root.detach(), level, size), level)
            with _may_require_grad(inner):
                _replace(root, levels.add_batch_dim(inner.requires_grad_(), at, level))
        else:
            _replace(root, along(root, level, size))


@contextlib.contextmanager
def _may_require_grad(tensor: torch.Tensor) -> Iterator[None]:
    """Let ``requires_grad_`` work, which PyTorch refuses inside transforms, for a tensor that none of them has wrapped."""
    was = _functorch.get_inplace_requires_grad_allowed()
    _functorch.set_inplace_requires_grad_allowed(was or not levels.is_wrapped(tensor))
    try:
        yield
    finally:
        _functorch.set_inplace_requires_grad_allowed(was)


def along(tensor: torch.Tensor, level: int, size: int) -> torch.Tensor:
    """A copy of ``tensor`` with room for one value per sample of ``level``."""
    samples = overlay.call(torch.ones, (size,), {"dtype": torch.bool, "device": tensor.device})
    return torch.where(levels.add_batch_dim(levels.innermost(samples), 0, level), tensor, tensor)


def _replace(old: LocalTensor, body: torch.Tensor) -> None:
    _swap(old, body)
    for reference, replay in list(old._views.values()):
        view = reference()
        if view is None or type(view) is not LocalTensor:
            continue
        remade = replay(old)
        if not levels.share_memory(remade, old):
            raise UnsupportedOperationError(f"{_NO_VIEW.format(replay.name)}{caller.line()}")
        given_room.append(weakref.ref(view))
        _replace(view, remade)


_NO_VIEW = (
    "A per-sample value is written in place into a tensor of which {} made a view, and PyTorch makes no such view where the "
    "tensor varies from sample to sample. Write first and take the view then."
)


def _adopt_results(func: Any, args: Any, kwargs: dict[str, Any], result: Any) -> None:
    """Make what a call on local tensors returns local too: new tensors, and views of local ones."""
    picks = enumerate(result) if isinstance(result, tuple | list) else [(None, result)]
    given = list(_tensors([list(args), kwargs]))
    for pick, item in picks:
        if type(item) is not torch.Tensor:
            continue
        source = next((t for t in given if levels.share_memory(t, item)), None)
        if source is None and not levels.is_wrapped(item):
            adopt(item)
        elif type(source) is LocalTensor:
            _adopt_view(item, source, _Replay(func, _with_hole(args, source), _with_hole(kwargs, source), pick))


def _adopt_view(view: torch.Tensor, parent: LocalTensor, replay: _Replay) -> None:
    local: Any = adopt(view)
    local._home, local._parent = parent._home, parent
    _enter(parent._views, local, replay)


_Views = dict[int, tuple["weakref.ref[LocalTensor]", "_Replay"]]


def _enter(views: _Views, view: LocalTensor, replay: _Replay) -> None:
    key = id(view)
    views[key] = weakref.ref(view, lambda _: views.pop(key, None)), replay


_HOLE = object()


class _Replay:
    """A call that made a view, to be made again of the parent's new body; it does not keep the parent alive."""

    def __init__(self, func: Any, args: Any, kwargs: Any, pick: int | None) -> None:
        self._call = func, args, kwargs
        self._pick = pick
        self._grad = torch.is_grad_enabled()
        self.name = getattr(func, "__name__", "an operation")

    def __call__(self, parent: torch.Tensor) -> torch.Tensor:
        func, args, kwargs = self._call
        with torch.set_grad_enabled(self._grad):
            result = func(*_fill_hole(args, parent), **_fill_hole(kwargs, parent))
        return result if self._pick is None else result[self._pick]


def _with_hole(value: Any, tensor: torch.Tensor) -> Any:
    """``value`` without ``tensor``; an index that is a tensor is copied, since it may be written to later."""
    return _map(value, lambda item: _HOLE if item is tensor else item.clone() if isinstance(item, torch.Tensor) else item)


def _fill_hole(value: Any, tensor: torch.Tensor) -> Any:
    return _map(value, lambda item: tensor if item is _HOLE else item)


def _map(value: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(value, dict):
        return {key: _map(item, change) for key, item in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_map(item, change) for item in value)
    return change(value)


# --- functions with a meaning of their own ---------------------------------------------------------------------------


def _require_grad(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """``requires_grad_``, which ``nn.Parameter`` calls."""
    with _may_require_grad(args[0]):
        return _run(func, args, kwargs)


def _deepcopy(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    with _may_require_grad(args[0]):
        copied = adopt(overlay.call(_plain(args[0]).__deepcopy__, args[1:], kwargs))
    for memo in (*args[1:], *kwargs.values()):
        memo[id(args[0])] = copied
    return copied


def _reshape(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """``unsqueeze_`` and its like: from here on the tensor is a view of what it was, and so are its views."""
    target: LocalTensor = args[0]
    with torch._C.DisableTorchFunctionSubclass():
        before: Any = adopt(torch.ops.aten.alias(target))
        func(*args, **kwargs)
    before._home, before._parent, before._views = target._home, target._parent, target._views
    for reference, _ in before._views.values():
        view = reference()
        if view is not None:
            view._parent = before
    if before._parent is not None:
        siblings = before._parent._views
        _, replay = siblings.pop(id(target))
        _enter(siblings, before, replay)

    def reshaped(parent: torch.Tensor, *rest: Any, **named: Any) -> Any:
        return func(torch.ops.aten.alias(parent), *rest, **named)

    target._parent, target._views = before, {}
    _enter(before._views, target, _Replay(reshaped, (_HOLE, *args[1:]), kwargs, None))
    return target


def _resize(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    target: LocalTensor = args[0]
    if levels.is_wrapped(target) or target._parent is not None or target._views:
        raise UnsupportedOperationError(
            "resize_ cannot change the shape of a tensor that varies from sample to sample, or has views. Make a new one, or "
            f"take a part of it (narrow).{caller.line()}"
        )
    return _run(func, args, kwargs)


def _set(operator: overlay.Operator) -> overlay.Operator:
    """``x.set_(y)``, which knows no ``__torch_function__``."""

    def kernel(*args: Any, **kwargs: Any) -> Any:
        if type(args[0]) is LocalTensor:
            raise UnsupportedOperationError(
                "set_ cannot make a tensor share the memory of another one inside a mapped function. Use the other one, or "
                f"copy_.{caller.line()}"
            )
        return operator(*args, **kwargs)

    return kernel


for _name in ("set_.source_Tensor", "set_.source_Tensor_storage_offset"):
    overlay.register_factory(_name, _set)

_SPECIAL: dict[str, Callable[[Any, Any, dict[str, Any]], Any]] = {
    "__deepcopy__": _deepcopy,
    "requires_grad_": _require_grad,
    "resize_": _resize,
    **dict.fromkeys("as_strided_ squeeze_ swapaxes_ swapdims_ t_ transpose_ unsqueeze_".split(), _reshape),
}
