"""Modules for which the gradient of one example is not plainly defined: they normalise over the batch, or keep statistics."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import nn

from torchbatch.core.describe import shown
from torchbatch.errors import AxisError, AxisSpecError, GradientTypeError, InPlaceError

BatchNorm = Literal["per_example"] | None

_OVER_BATCH = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_OVER_PLACES = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)


def checked(batch_norm: Any, who: str) -> BatchNorm:
    """The option ``batch_norm``.

    Raises:
        AxisSpecError: it is something else.
    """
    if batch_norm not in (None, "per_example"):
        raise AxisSpecError(f'{who}: batch_norm must be None or "per_example", but it is {shown(batch_norm)}.')
    return batch_norm  # type: ignore[no-any-return]


def check_examples_apart(model: nn.Module, who: str) -> None:
    """Refuse a module in which the examples of a batch have to do with each other.

    Raises:
        AxisError: a layer normalises over the batch, or keeps statistics of it.
        GradientTypeError: a parameter has no shape yet, or the module is made of copies of another one.
    """
    if isinstance(model, torch.jit.ScriptModule):
        raise GradientTypeError(f"{who}: {type(model).__name__} is TorchScript, which cannot be traced. Give the module itself.")
    for layer in model.modules():
        if isinstance(layer, nn.DataParallel | nn.parallel.DistributedDataParallel):
            kind = type(layer).__name__
            raise GradientTypeError(f"{who}: a {kind} copies its module as it runs. Give its attribute .module instead.")
    for name, value in model.named_parameters():
        if nn.parameter.is_lazy(value):
            raise GradientTypeError(f"{who}: the parameter {name} has no shape yet. Call the module once on a batch before.")
    found = [f"{name or 'the module'} ({type(layer).__name__})" for name, layer in _mixing(model)]
    if found:
        raise AxisError(
            f"{who}: an example has no gradient of its own where layers take statistics over the batch, as "
            f"{_listed(found)} in training mode. There are three ways out: eval mode (model.eval(), or of these layers only), "
            f"which takes the running statistics; per_example.replace_batch_norm(model), a copy with GroupNorm in their place; "
            f'or batch_norm="per_example", which normalises each example by statistics of its own.'
        )


def _mixing(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, layer in model.named_modules():
        if isinstance(layer, _OVER_BATCH) and (layer.training or layer.running_mean is None):
            yield name, layer
        if isinstance(layer, _OVER_PLACES) and layer.training and layer.track_running_stats:
            yield name, layer


def _listed(found: list[str]) -> str:
    shortened = found if len(found) < 6 else [*found[:4], f"{len(found) - 4} others"]
    return shortened[0] if len(shortened) == 1 else f"{', '.join(shortened[:-1])} and {shortened[-1]}"


class Buffers:
    """The buffers of a module for one example: copies, since what one example writes would be seen by the others.

    Args:
        model: the module.
        batch_norm: the option; with it, layers that take statistics may count how often they did.
    """

    def __init__(self, model: nn.Module, batch_norm: BatchNorm) -> None:
        self._model = model
        self._own = set(_statistics(model)) if batch_norm else set()
        self.values = {name: value.clone() for name, value in model.named_buffers()}
        self._versions = {name: value._version for name, value in self.values.items()}

    def check_not_written(self, who: str) -> None:
        """Refuse writes into buffers other than the statistics that the examples have for themselves.

        Raises:
            InPlaceError: there was one.
        """
        for name, value in self.values.items():
            if name not in self._own and value._version != self._versions[name]:
                layer = self._model.get_submodule(name.rpartition(".")[0])
                raise InPlaceError(
                    f"{who}: the buffer {name} of {type(layer).__name__} is written to in the forward pass, and each example "
                    f"would have to see what the others wrote. Put that module into eval mode, if it then leaves the buffer "
                    f"alone, or write to it outside of the forward pass."
                )


def _statistics(model: nn.Module) -> Iterator[str]:
    for prefix, layer in _mixing(model):
        for name, _ in layer.named_buffers(recurse=False):
            yield f"{prefix}.{name}" if prefix else name


def replace_batch_norm(model: nn.Module, *, groups: int = 32) -> nn.Module:
    """A copy of a module with GroupNorm in the place of each BatchNorm, so that the examples of a batch are independent.

    A layer with C channels gets ``gcd(groups, C)`` groups, and the weights, biases and ``eps`` of the layer before; its running
    statistics go. In the state dict the names stay. The copy computes something else than the module, and is to be trained.

    Args:
        model: a module; it is left as it is.
        groups: how many groups of channels there are at most.

    Returns:
        The copy.

    Raises:
        AxisSpecError: ``groups`` is not a positive int.
        GradientTypeError: a layer is of a class derived from BatchNorm with a ``forward`` of its own.

    Example:
        >>> import torch
        >>> from torchbatch import per_example
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))
        >>> type(per_example.replace_batch_norm(model, groups=4)[1]).__name__
        'GroupNorm'

    Source: Wu and He, "Group normalization" (2018).
    """
    if isinstance(groups, bool) or not isinstance(groups, int) or groups < 1:
        raise AxisSpecError(f"replace_batch_norm: groups must be a positive int, but it is {shown(groups)}.")
    model = copy.deepcopy(model)
    found = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, _OVER_BATCH)]
    made = {id(layer): _group_norm(layer, name, groups) for name, layer in found}
    for layer in list(model.modules()):
        for name, child in layer.named_children():
            if id(child) in made:
                setattr(layer, name, made[id(child)])
    return made.get(id(model), model)


def _group_norm(layer: Any, name: str, groups: int) -> nn.GroupNorm:
    if not any(type(layer).forward is base.forward for base in _OVER_BATCH):
        raise GradientTypeError(
            f"replace_batch_norm: {name or 'the module'} is a {type(layer).__name__}, a kind of BatchNorm with a forward of its "
            f"own, which GroupNorm does not replace. Replace it yourself."
        )
    found = nn.GroupNorm(math.gcd(groups, layer.num_features), layer.num_features, layer.eps, layer.affine)
    if layer.affine:
        found.weight, found.bias = layer.weight, layer.bias
    return found.train(layer.training)
