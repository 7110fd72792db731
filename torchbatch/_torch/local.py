"""Tensors made inside a mapped function, which can be written in place with per-sample values.

``out = torch.zeros(3)`` inside ``vmap`` makes one tensor for all samples, and PyTorch refuses ``out[0] = x.sum()`` where
``x`` is per-sample: there is no room for one value per sample. So such a tensor is made a :class:`LocalTensor`: the same
tensor, with a ``__torch_function__`` that looks before it is written to. If the value varies along an axis that the tensor
does not have, the tensor gets that axis first: the Python object is given a new, batched body, and so is every view of it
that is still alive. A tensor that is only read stays one tensor for all samples and costs nothing more.

Private names used, seen on torch 2.11, 2.13 and 2.15: ``torch._C._swap_tensor_impl``, and those of :mod:`torchbatch._torch.levels`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch

from torchbatch._torch import levels, overlay
from torchbatch.errors import InPlaceError

_AUGMENTED = frozenset(f"__i{name}__" for name in "add sub mul truediv floordiv mod pow and or xor lshift rshift".split())


_RANDOM = frozenset(
    "bernoulli_ cauchy_ exponential_ geometric_ kaiming_normal_ kaiming_uniform_ log_normal_ normal_ orthogonal_ random_ "
    "trunc_normal_ uniform_ xavier_normal_ xavier_uniform_".split()
)


class LocalTensor(torch.Tensor):
    """A tensor made inside a mapped function that does not (yet) vary along all of its axes."""

    _home: int  # the number of transforms that were open when it was made
    _parent: LocalTensor | None  # what it is a view of
    _views: list[tuple[weakref.ref[LocalTensor], _Replay]]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for target in _written(func, args, kwargs):
            _make_room(target, args, kwargs)
            if getattr(func, "__name__", "") in _RANDOM:
                _make_room_for_draws(target)
        if "out" in kwargs and any(type(t) is LocalTensor for t in _tensors(kwargs["out"])):
            return _write_out(func, args, dict(kwargs))
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
            _adopt_results(func, args, kwargs, result)
        return result


def adopt(tensor: torch.Tensor) -> torch.Tensor:
    """Make a new tensor a local one, unless it varies along every open axis already."""
    if type(tensor) is torch.Tensor:
        tensor.__class__ = LocalTensor
        tensor._home, tensor._parent, tensor._views = levels.depth(), None, []  # type: ignore[attr-defined]
    return tensor


def settle(tensor: torch.Tensor) -> None:
    """Make a local tensor an ordinary one again, when it leaves the mapped function."""
    if type(tensor) is LocalTensor:
        del tensor._home, tensor._parent, tensor._views
        tensor.__class__ = torch.Tensor  # type: ignore[assignment]


def _written(func: Any, args: Any, kwargs: dict[str, Any]) -> Iterator[LocalTensor]:
    """The local tensor that a call writes to, if any."""
    name = getattr(func, "__name__", "")
    in_place = name == "__setitem__" or name in _AUGMENTED or (name.endswith("_") and not name.endswith("__"))
    if in_place and args and type(args[0]) is LocalTensor:
        yield args[0]


def _write_out(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """``func(..., out=local)``, which PyTorch cannot map, as a call and a copy."""
    out = kwargs.pop("out")
    results = func(*args, **kwargs)
    for target, result in zip(_tensors(out), _tensors(results), strict=True):
        if target.shape != result.shape:
            raise InPlaceError(
                f"out= has shape {tuple(target.shape)}, but the result for one sample has shape {tuple(result.shape)}."
            )
        target.copy_(result)
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
            if level > root._home:
                raise InPlaceError(
                    "a per-sample value is written in place into a tensor that was made outside the vmap that maps it, and so "
                    "is shared by its samples. Make the tensor inside the mapped function, or return the value instead."
                )
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
    while target._parent is not None:
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


def _vary(root: LocalTensor, level: int, size: int) -> None:
    """Give the object ``root``, and all views of it, a body with one copy per sample of ``level``."""
    with torch._C.DisableTorchFunctionSubclass():
        _replace(root, along(root, level, size))


def along(tensor: torch.Tensor, level: int, size: int) -> torch.Tensor:
    """A copy of ``tensor`` with room for one value per sample of ``level``."""
    samples = overlay.call(torch.ones, (size,), {"dtype": torch.bool, "device": tensor.device})
    return torch.where(levels.add_batch_dim(levels.innermost(samples), 0, level), tensor, tensor)


def _replace(old: LocalTensor, body: torch.Tensor) -> None:
    torch._C._swap_tensor_impl(old, body)
    for reference, view in old._views:
        child = reference()
        if child is not None and type(child) is LocalTensor:
            _replace(child, view(old))


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
    local = adopt(view)
    local._home, local._parent = parent._home, parent  # type: ignore[attr-defined]
    parent._views.append((weakref.ref(local), replay))  # type: ignore[arg-type]


_HOLE = object()


class _Replay:
    """A call that made a view, to be made again of the parent's new body; it does not keep the parent alive."""

    def __init__(self, func: Any, args: Any, kwargs: Any, pick: int | None) -> None:
        self._call = func, args, kwargs
        self._pick = pick

    def __call__(self, parent: torch.Tensor) -> torch.Tensor:
        func, args, kwargs = self._call
        result = func(*_fill_hole(args, parent), **_fill_hole(kwargs, parent))
        return result if self._pick is None else result[self._pick]


def _with_hole(value: Any, tensor: torch.Tensor) -> Any:
    return _map(value, lambda item: _HOLE if item is tensor else item)


def _fill_hole(value: Any, tensor: torch.Tensor) -> Any:
    return _map(value, lambda item: tensor if item is _HOLE else item)


def _map(value: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(value, dict):
        return {key: _map(item, change) for key, item in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_map(item, change) for item in value)
    return change(value)
