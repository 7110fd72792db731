"""The state dict of a PyTorch module as a tree of JAX arrays, and back."""

from __future__ import annotations

import copy as copying
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch

from torchbatch.errors import AxisError, AxisSpecError, InputTypeError
from torchbatch.testing.flax_layout import ParameterRule, Path, Placement, Rules, placements
from torchbatch.testing.interchange import from_jax, to_jax
from torchbatch.testing.optional import require

_LAYOUTS = ("torch", "flax")
_TIED = ("all", "first")


def state_dict_to_jax(
    source: torch.nn.Module | Mapping[str, Any],
    *,
    layout: str = "torch",
    nested: bool = True,
    sep: str = ".",
    lists: bool = False,
    tied: str = "all",
    rules: Rules | None = None,
    copy: bool | None = True,
    narrow: bool | str = "exact",
) -> dict[str, Any]:
    """The parameters and buffers of a module as a tree of JAX arrays.

    Args:
        source: a module, or a state dict: any mapping from names to tensors, such as ``dict(module.named_parameters())``, which
            leaves the buffers out.
        layout: ``"torch"`` keeps names and shapes: the tree has a dict for each module. ``"flax"`` gives the variables of Flax's
            layers (Linen), ``{"params": …, "batch_stats": …}``, and needs the module, whose layers say what the entries are.
        nested: whether the tree is nested; otherwise it is one dict with whole paths as keys.
        sep: what stands between the parts of a path if it is not nested.
        lists: whether modules that are numbered from 0 become lists, not dicts with the keys ``"0"``, ``"1"``, ….
        tied: what becomes of a tensor that has several names: ``"all"`` gives an array for each; ``"first"`` only the first.
        rules: with ``layout="flax"``: for kinds of layers, which Flax does not have or that are to be named otherwise, a dict
            from the names of their entries to a :class:`ParameterRule`, or to None for an entry that has no place in Flax.
        copy: True copies; None and False share memory as in :func:`to_jax`. Optimizers write into parameters in place, which
            would change shared arrays.
        narrow: as in :func:`to_jax`, for 64-bit numbers while JAX has none. By default they become 32-bit numbers if none
            changes: the counter of a BatchNorm does.

    Returns:
        A dict. Entries that are no tensors (``get_extra_state``) are left out.

    Raises:
        ImportError: JAX is not installed.
        AxisSpecError: an option has no such value.
        InputTypeError: ``source`` is neither a module nor a mapping, or the layout needs a module; or as in :func:`to_jax`.
        UnsupportedOperationError: Flax has no such layer, and ``rules`` has none either; or as in :func:`to_jax`.
        AxisError: two entries would have the same place.

    Example:
        >>> import jax, torch
        >>> from torchbatch.testing.state_dicts import state_dict_to_jax
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU(), torch.nn.Linear(3, 1))
        >>> jax.tree.map(lambda x: x.shape, state_dict_to_jax(model))
        {'0': {'bias': (3,), 'weight': (3, 2)}, '2': {'bias': (1,), 'weight': (1, 3)}}
        >>> jax.tree.map(lambda x: x.shape, state_dict_to_jax(model, layout="flax"))["params"]["layers_0"]
        {'bias': (3,), 'kernel': (2, 3)}

    Source: https://flax.readthedocs.io, "Convert PyTorch models to Flax".
    """
    require("jax", "state_dict_to_jax", "jax")
    _check_options("state_dict_to_jax", source, layout, rules)
    if tied not in _TIED:
        raise AxisSpecError(f"state_dict_to_jax: tied must be 'all' or 'first', but it is {tied!r}.")
    entries = _entries("state_dict_to_jax", source, "source")
    places = _placements(source, entries, layout, rules)
    if tied == "first":
        places = [place for place in places if _first_name(entries, place.name) == place.name]
    parts = {place.name: place.rule.split(entries[place.name]) for place in places if place.paths}
    arrays = to_jax(parts, copy=copy, narrow=narrow)
    flat = {path: array for place in places for path, array in zip(place.paths, arrays.get(place.name, ()), strict=True)}
    if not nested:
        return {sep.join(path): array for path, array in flat.items()}
    tree = _nested(flat)
    return {name: _with_lists(child) for name, child in tree.items()} if lists else tree


def state_dict_from_jax(
    params: Any,
    like: torch.nn.Module | Mapping[str, Any],
    *,
    layout: str = "torch",
    sep: str = ".",
    rules: Rules | None = None,
    copy: bool | None = True,
) -> dict[str, Any]:
    """The state dict that a tree of JAX arrays stands for: the inverse of :func:`state_dict_to_jax`.

    Args:
        params: the tree, nested or flat, with dicts or lists.
        like: a module, or a state dict, of the structure that is wanted. With ``layout="flax"``, a module. It is not changed.
        layout: as in :func:`state_dict_to_jax`.
        sep: what stands between the parts of a path where a key of ``params`` has several.
        rules: as in :func:`state_dict_to_jax`.
        copy: True copies; None and False share memory as in :func:`from_jax`. An optimizer that writes into shared tensors
            changes the JAX arrays, which nobody expects to change.

    Returns:
        A state dict for ``load_state_dict``, in the order of ``like``, with its dtypes and on its devices. From ``like`` comes
        what has no place in a JAX tree: entries that are no tensors, and, with ``layout="flax"``, the counter of a BatchNorm.
        A tensor with several names may be missing under some of them.

    Raises:
        AxisSpecError, InputTypeError, UnsupportedOperationError: as in :func:`state_dict_to_jax` and :func:`from_jax`.
        AxisError: entries are missing, unexpected, or of another shape; a dtype would lose digits; or an entry has two names in
            ``like`` and two values in ``params``. The text lists all of them.

    Example:
        >>> import jax, torch
        >>> from torchbatch.testing.state_dicts import state_dict_from_jax, state_dict_to_jax
        >>> model = torch.nn.Linear(2, 3)
        >>> params = jax.tree.map(lambda x: 2 * x, state_dict_to_jax(model))
        >>> torch.equal(state_dict_from_jax(params, like=model)["weight"], 2 * model.weight)
        True
    """
    _check_options("state_dict_from_jax", like, layout, rules)
    entries = _entries("state_dict_from_jax", like, "like")
    places = _placements(like, entries, layout, rules)
    given = dict(_flattened(params, (), sep))
    reading = _Reading(entries, given, layout, [], [], [])
    found = {place.name: reading.read(place, copy) for place in places}
    _fill_tied(reading, found, places)
    _raise_if_wrong(reading, found, places)
    result = _shallow(like)
    for place in places:
        result[place.name] = _or_own(found[place.name], entries[place.name], copy)
    return result


# --- options and entries ---------------------------------------------------------------------------------------------


def _check_options(who: str, source: Any, layout: str, rules: Rules | None) -> None:
    if layout not in _LAYOUTS:
        raise AxisSpecError(f"{who}: layout must be 'torch' or 'flax', but it is {layout!r}.")
    if rules is not None and layout != "flax":
        raise AxisSpecError(f"{who}: rules are for layout='flax', but layout is {layout!r}.")
    if layout == "flax" and not isinstance(source, torch.nn.Module):
        raise InputTypeError(
            f"{who}: layout='flax' depends on the kind of each layer, which a state dict does not tell. Pass the module, with "
            f"the state dict loaded, in the place of a value of type {type(source).__name__}."
        )


def _entries(who: str, source: Any, argument: str) -> dict[str, torch.Tensor]:
    """The tensors of a state dict by name, parameters as they are."""
    if isinstance(source, torch.nn.Module):
        source = source.state_dict(keep_vars=True)
    if not isinstance(source, Mapping):
        raise InputTypeError(
            f"{who}: {argument} must be a module or a state dict, but it is {source!r} of type {type(source).__name__}."
        )
    for name, entry in source.items():
        if not isinstance(name, str):
            raise InputTypeError(f"{who}: the names of a state dict are strings, but one is {name!r}.")
        if torch.nn.parameter.is_lazy(entry):
            raise InputTypeError(f"{who}: {name} has no shape yet: its module is lazy. Call it once before.")
    return {name: entry for name, entry in source.items() if isinstance(entry, torch.Tensor)}


def _placements(source: Any, entries: dict[str, torch.Tensor], layout: str, rules: Rules | None) -> list[Placement]:
    if layout == "flax":
        return placements(source, entries, rules)
    return [Placement(name, (tuple(name.split(".")),), ParameterRule(name)) for name in entries]


def _identity(entry: torch.Tensor) -> Any:
    """The same for two entries that are one tensor."""
    if entry.device.type == "meta" or entry.layout is not torch.strided or entry.numel() == 0:
        return id(entry)
    return entry.device, entry.data_ptr(), entry.dtype, entry.shape, entry.stride()


def _first_name(entries: dict[str, torch.Tensor], name: str) -> str:
    """The first name of the tensor that is called so."""
    wanted = _identity(entries[name])
    return next(other for other, entry in entries.items() if _identity(entry) == wanted)


# --- trees -----------------------------------------------------------------------------------------------------------


def _nested(flat: dict[Path, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, array in flat.items():
        node = tree
        for i, part in enumerate(path[:-1]):
            node = node.setdefault(part, {})
            if not isinstance(node, dict):
                raise AxisError(f"{'.'.join(path)} lies under {'.'.join(path[: i + 1])}, which is an array. Use nested=False.")
        if path[-1] in node:
            raise AxisError(f"{'.'.join(path)} is an array, but others lie under it. Use nested=False.")
        node[path[-1]] = array
    return tree


def _with_lists(tree: Any) -> Any:
    if not isinstance(tree, dict):
        return tree
    children = {name: _with_lists(child) for name, child in tree.items()}
    if set(children) == {str(i) for i in range(len(children))}:
        return [children[str(i)] for i in range(len(children))]
    return children


def _flattened(tree: Any, path: Path, sep: str) -> Iterator[tuple[Path, Any]]:
    """The leaves of a tree of dicts and lists by their paths."""
    if isinstance(tree, Mapping):
        children = [(str(key), child) for key, child in tree.items()]
    elif isinstance(tree, list | tuple):
        children = [(str(i), child) for i, child in enumerate(tree)]
    else:
        yield path, tree
        return
    for key, child in children:
        yield from _flattened(child, (*path, *(key.split(sep) if sep else [key])), sep)


def _text(path: Path, layout: str) -> str:
    return ("/" if layout == "flax" else ".").join(path)


# --- back ------------------------------------------------------------------------------------------------------------


class _Reading(NamedTuple):
    """What is read off a JAX tree, and what is wrong with it."""

    entries: dict[str, torch.Tensor]
    given: dict[Path, Any]
    layout: str
    shapes: list[str]
    dtypes: list[str]
    tied: list[str]

    def read(self, place: Placement, copy: bool | None) -> torch.Tensor | None:
        """The entry, or None where the tree does not have it as it should be."""
        wanted = self.entries[place.name]
        if not place.paths or self.absent(place):
            return None
        parts = zip(place.paths, place.rule.split(wanted.detach()), strict=True)
        found = [self._part(path, part.shape, copy) for path, part in parts]
        tensors = [part for part in found if part is not None]
        return self._as_wanted(place, place.rule.join(tensors), wanted) if len(tensors) == len(found) else None

    def absent(self, place: Placement) -> list[str]:
        """The parts of an entry that the tree does not have."""
        return [_text(path, self.layout) for path in place.paths if path not in self.given]

    def _part(self, path: Path, shape: torch.Size, copy: bool | None) -> torch.Tensor | None:
        text = _text(path, self.layout)
        found = from_jax({text: self.given[path]}, copy=copy)[text]
        if not isinstance(found, torch.Tensor):
            what = f"{found!r} of type {type(found).__name__}"
            raise InputTypeError(f"state_dict_from_jax: {text} must be an array, but it is {what}.")
        if found.shape != shape:
            self.shapes.append(f"{text} is {list(found.shape)}, but {list(shape)} is expected")
            return None
        return found

    def _as_wanted(self, place: Placement, found: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor | None:
        """In the dtype and on the device of what it is to replace, if that loses nothing."""
        if found.dtype != wanted.dtype and not _holds(wanted, found):
            texts = ", ".join(_text(path, self.layout) for path in place.paths)
            self.dtypes.append(f"{texts} is {_dtype(found)}, but {_dtype(wanted)} is expected, which would lose digits")
            return None
        device = found.device if wanted.device.type == "meta" else wanted.device
        return found.to(device=device, dtype=wanted.dtype)


def _holds(wider: torch.Tensor, narrower: torch.Tensor) -> bool:
    """Whether one dtype holds every number of the other."""
    try:
        return torch.promote_types(narrower.dtype, wider.dtype) == wider.dtype
    except RuntimeError:  # float8 is promoted to nothing
        return False


def _raise_if_wrong(reading: _Reading, found: dict[str, torch.Tensor | None], places: list[Placement]) -> None:
    """Say all that is wrong, if anything is."""
    known = {path for place in places for path in place.paths}
    kinds = {
        "missing": [text for place in places if found[place.name] is None for text in reading.absent(place)],
        "unexpected": [_text(path, reading.layout) for path in reading.given if path not in known],
        "shapes": reading.shapes,
        "dtypes": reading.dtypes,
        "tied": reading.tied,
    }
    lines = [f"  {kind}: {'; '.join(texts)}" for kind, texts in kinds.items() if texts]
    if lines:
        raise AxisError("\n".join(["state_dict_from_jax: the tree does not fit `like`.", *lines]))


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _fill_tied(reading: _Reading, found: dict[str, torch.Tensor | None], places: list[Placement]) -> None:
    """Give a tensor with several names the value that it has under one of them."""
    groups: dict[Any, list[Placement]] = {}
    for place in places:
        groups.setdefault(_identity(reading.entries[place.name]), []).append(place)
    for group in groups.values():
        given = [place.name for place in group if found[place.name] is not None]
        for place in group if given else ():
            value = found[given[0]]
            if found[place.name] is None and len(reading.absent(place)) == len(place.paths):
                found[place.name] = value
        reading.tied.extend(
            f"{given[0]} and {name} are one tensor in `like`, but differ"
            for name in given[1:]
            if not torch.equal(_bits(found[given[0]]), _bits(found[name]))
        )


def _bits(tensor: torch.Tensor | None) -> torch.Tensor:
    """The bytes of a tensor: two of them are equal where NaN is NaN, too."""
    if tensor is None or not tensor.numel():
        return torch.empty(0)
    return tensor.clone(memory_format=torch.contiguous_format).view(-1).view(torch.uint8)


def _shallow(like: Any) -> dict[str, Any]:
    """A state dict that may be changed; a copied one keeps the versions of modules that PyTorch notes in it."""
    if isinstance(like, torch.nn.Module):
        return like.state_dict()
    return copying.copy(like) if isinstance(like, dict) else dict(like)


def _or_own(found: torch.Tensor | None, own: torch.Tensor, copy: bool | None) -> torch.Tensor:
    if found is not None:
        return found
    return own.detach().clone() if copy else own.detach()
