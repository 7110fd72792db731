"""Where each entry of a module's state dict goes in a tree of Flax's layers (Linen), and how its axes are turned."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from torchbatch.errors import AxisError, UnsupportedOperationError

Path = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class ParameterRule:
    """Where one parameter or buffer of a kind of layer goes in the JAX tree.

    Attributes:
        name: what it is called there; ``"query/kernel"`` is one level further down.
        axes: the order of its axes there: ``kernel = weight.permute(axes)``; None leaves them as they are.
        collection: ``"params"``, or ``"batch_stats"`` for what is no parameter.

    Example:
        >>> import torch
        >>> from torchbatch.testing.flax_layout import ParameterRule
        >>> ParameterRule("kernel", axes=(1, 0)).split(torch.zeros(3, 4))[0].shape
        torch.Size([4, 3])
    """

    name: str
    axes: tuple[int, ...] | None = None
    collection: str = "params"

    @property
    def names(self) -> tuple[str, ...]:
        """What its parts are called; most entries have one."""
        return (self.name,)

    def split(self, entry: torch.Tensor) -> list[torch.Tensor]:
        """The parts of a state dict's entry as they are in the JAX tree; views of it."""
        return [entry if self.axes is None else entry.permute(self.axes)]

    def join(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """The inverse of :meth:`split`."""
        part = parts[0]
        return part if self.axes is None else part.permute(sorted(range(len(self.axes)), key=self.axes.__getitem__))


LayerRule = Mapping[str, ParameterRule | None]
Rules = Mapping[type, LayerRule | Callable[[Any], LayerRule]]


@dataclasses.dataclass(frozen=True)
class _Heads(ParameterRule):
    """Projections to all heads, stacked, as in :class:`torch.nn.MultiheadAttention`: one array for each there."""

    parts: tuple[str, ...] = ()
    heads: int = 1

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(f"{part}/{self.name}" for part in self.parts)

    def split(self, entry: torch.Tensor) -> list[torch.Tensor]:
        return [_by_head(part.mT, 1, self.heads) for part in entry.chunk(len(self.parts))]

    def join(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.cat([part.flatten(1).mT for part in parts])


@dataclasses.dataclass(frozen=True)
class _HeadBiases(_Heads):
    """The biases of such projections."""

    def split(self, entry: torch.Tensor) -> list[torch.Tensor]:
        return [_by_head(part, 0, self.heads) for part in entry.chunk(len(self.parts))]

    def join(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.cat([part.flatten() for part in parts])


@dataclasses.dataclass(frozen=True)
class _FromHeads(ParameterRule):
    """The projection back from all heads."""

    heads: int = 1

    def split(self, entry: torch.Tensor) -> list[torch.Tensor]:
        return [_by_head(entry.mT, 0, self.heads)]

    def join(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        return parts[0].flatten(0, 1).mT


def _by_head(projection: torch.Tensor, axis: int, heads: int) -> torch.Tensor:
    """Cut one axis in two: heads, and what is in each."""
    shape = list(projection.shape)
    shape[axis : axis + 1] = [heads, shape[axis] // heads]
    return projection.reshape(shape)


# --- the layers that Flax has too ------------------------------------------------------------------------------------

_BIAS = {"bias": ParameterRule("bias")}
_SCALE = {"weight": ParameterRule("scale"), **_BIAS}
_STATISTICS = {
    "running_mean": ParameterRule("mean", collection="batch_stats"),
    "running_var": ParameterRule("var", collection="batch_stats"),
    "num_batches_tracked": None,
}
_CONV_AXES = {1: (2, 1, 0), 2: (2, 3, 1, 0), 3: (2, 3, 4, 1, 0)}


def _conv(dimensions: int) -> LayerRule:
    return {"weight": ParameterRule("kernel", _CONV_AXES[dimensions]), **_BIAS}


def _conv_transpose(dimensions: int) -> Callable[[Any], LayerRule]:
    def rule(module: Any) -> LayerRule:
        if module.groups != 1:
            raise UnsupportedOperationError(
                f"layout='flax': Flax's ConvTranspose has no groups, but a {type(module).__name__} has {module.groups}. "
                "Give a rule of your own in rules=, or use layout='torch'."
            )
        return _conv(dimensions)  # Flax's transpose_kernel=True

    return rule


def _attention(module: nn.MultiheadAttention) -> LayerRule:
    heads = module.num_heads
    everything = ("query", "key", "value")
    return {
        "in_proj_weight": _Heads("kernel", parts=everything, heads=heads),
        "q_proj_weight": _Heads("kernel", parts=("query",), heads=heads),
        "k_proj_weight": _Heads("kernel", parts=("key",), heads=heads),
        "v_proj_weight": _Heads("kernel", parts=("value",), heads=heads),
        "in_proj_bias": _HeadBiases("bias", parts=everything, heads=heads),
        "out_proj.weight": _FromHeads("out/kernel", heads=heads),
        "out_proj.bias": ParameterRule("out/bias"),
    }


RULES: Rules = {
    nn.Linear: {"weight": ParameterRule("kernel", (1, 0)), **_BIAS},
    nn.Conv1d: _conv(1),
    nn.Conv2d: _conv(2),
    nn.Conv3d: _conv(3),
    nn.ConvTranspose1d: _conv_transpose(1),
    nn.ConvTranspose2d: _conv_transpose(2),
    nn.ConvTranspose3d: _conv_transpose(3),
    nn.Embedding: {"weight": ParameterRule("embedding")},
    nn.LayerNorm: _SCALE,
    nn.RMSNorm: _SCALE,
    nn.GroupNorm: _SCALE,
    nn.InstanceNorm1d: _SCALE,
    nn.InstanceNorm2d: _SCALE,
    nn.InstanceNorm3d: _SCALE,
    nn.BatchNorm1d: {**_SCALE, **_STATISTICS},
    nn.BatchNorm2d: {**_SCALE, **_STATISTICS},
    nn.BatchNorm3d: {**_SCALE, **_STATISTICS},
    nn.SyncBatchNorm: {**_SCALE, **_STATISTICS},
    nn.MultiheadAttention: _attention,
}


# --- from names to paths ---------------------------------------------------------------------------------------------


class Placement(NamedTuple):
    """Where one entry of a state dict goes: the path of each of its parts, none if it has no place in the JAX tree."""

    name: str
    paths: tuple[Path, ...]
    rule: ParameterRule


def placements(module: nn.Module, entries: Mapping[str, Any], rules: Rules | None) -> list[Placement]:
    """Where each entry of a module's state dict goes.

    Args:
        module: whose layers say what the entries are.
        entries: the state dict, its parameters as they are.
        rules: rules for more kinds of layers, or others for those that are known.

    Raises:
        UnsupportedOperationError: there is no rule for a layer of PyTorch.
        AxisError: two entries would have the same place.
    """
    table = {**RULES, **(rules or {})}
    found = [_placement(module, name, entry, table) for name, entry in entries.items()]
    taken: dict[Path, str] = {}
    for placement in found:
        for path in placement.paths:
            other = taken.setdefault(path, placement.name)
            if other != placement.name:
                raise AxisError(
                    f"layout='flax': {other} and {placement.name} would both become {'/'.join(path)}. Rename one of the modules."
                )
    return found


def _placement(module: nn.Module, name: str, entry: Any, table: Rules) -> Placement:
    """The rule of the outermost module on the way to an entry that has one for it; otherwise the entry as it is."""
    owner: nn.Module = module
    path: Path = ()
    for owner, path, local in _way(module, name):
        layer = _rule_of(owner, table)
        if layer is not None and local in layer:
            rule = layer[local]
            if rule is None:
                return Placement(name, (), ParameterRule(local))
            return Placement(name, tuple((rule.collection, *path, *part.split("/")) for part in rule.names), rule)
    _check_own(owner, name)
    collection = "params" if isinstance(entry, nn.Parameter) else "buffers"
    local = name.rpartition(".")[2]
    return Placement(name, ((collection, *_step(owner, path, local)),), ParameterRule(local, collection=collection))


def _way(module: nn.Module, name: str) -> Iterator[tuple[nn.Module, Path, str]]:
    """The modules on the way to an entry, each with its path in the JAX tree and the entry's name within it."""
    path: Path = ()
    *above, last = name.split(".")
    for i, child in enumerate(above):
        yield module, path, ".".join([*above[i:], last])
        path = _step(module, path, child)
        module = module.get_submodule(child)
    yield module, path, last


def _step(module: nn.Module, path: Path, child: str) -> Path:
    """The path of a child: Flax names what is in a list after the list, and the layers of a Sequential ``layers_0``, …."""
    if isinstance(module, nn.ModuleList | nn.ModuleDict | nn.ParameterList | nn.ParameterDict) and path:
        return (*path[:-1], f"{path[-1]}_{child}")
    numbered = isinstance(module, nn.Sequential | nn.ModuleList) and child.isdigit()
    return (*path, f"layers_{child}" if numbered else child)


def _rule_of(module: nn.Module, table: Rules) -> LayerRule | None:
    for cls in type(module).__mro__:
        if cls in table:
            rule = table[cls]
            return rule(module) if callable(rule) else rule
    return None


def _check_own(module: nn.Module, name: str) -> None:
    """Layers of PyTorch without a rule are refused: Flax's would want their entries in another form."""
    cls = type(module)
    if cls.__module__.startswith("torch.") and not isinstance(module, nn.ParameterList | nn.ParameterDict):
        raise UnsupportedOperationError(
            f"layout='flax' has no rule for {name}, which belongs to a layer of type {cls.__name__}. Give one, such as "
            f"rules={{{cls.__name__}: {{{name.rpartition('.')[2]!r}: ParameterRule('kernel', axes=(1, 0))}}}}, or use "
            "layout='torch'."
        )
