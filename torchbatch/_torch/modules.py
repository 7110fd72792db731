"""What PyTorch's modules consist of.

Private names used, seen on torch 2.11, 2.13 and 2.15: ``Module._parameters``, ``_buffers``, ``_modules``, ``_forward_hooks``,
``_forward_pre_hooks``, ``_backward_hooks``, ``_backward_pre_hooks``; ``torch.nn.modules.module._global_forward_hooks``,
``_global_forward_pre_hooks``, ``_global_backward_hooks``, ``_global_backward_pre_hooks``; ``BasePruningMethod._tensor_name``;
``torch._C._dynamo.guards.dict_version``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as of_modules

dict_version: Callable[[dict[str, Any]], int] = torch._C._dynamo.guards.dict_version  # another one after each write
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
_HOOKS = ("forward_hooks", "forward_pre_hooks", "backward_hooks", "backward_pre_hooks")


def tensors_of(module: nn.Module) -> list[dict[str, Any]]:
    """The dicts in which a module keeps its parameters and its buffers."""
    return [_dict(module._parameters), _dict(module._buffers)]


def held_by(module: nn.Module) -> list[dict[str, Any]]:
    """The dicts in which a module keeps its parameters, buffers and submodules."""
    return [*tensors_of(module), _dict(module._modules)]


def _dict(held: Any) -> dict[str, Any]:
    return held if isinstance(held, dict) else {}  # TorchScript's is of another kind, and cannot be changed


def own_attributes(module: nn.Module) -> dict[str, Any]:
    """What a module has beside that which every module has."""
    return {name: value for name, value in vars(module).items() if name not in _OF_EVERY_MODULE}


def hooks_of(module: nn.Module) -> Iterator[Callable[..., Any]]:
    """The hooks that run with a module, those of all modules left out."""
    for name in _HOOKS:
        yield from getattr(module, f"_{name}").values()


def global_hooks() -> Iterator[Callable[..., Any]]:
    """The hooks that run with every module."""
    for name in _HOOKS:
        yield from getattr(of_modules, f"_global_{name}").values()


def computed_anew(module: nn.Module) -> set[Any]:
    """The attributes that PyTorch itself sets at each call: of recurrent modules, and by weight_norm, spectral_norm, pruning."""
    if isinstance(module, nn.RNNBase):
        return {"_flat_weights"}
    own = [hook for hook in module._forward_pre_hooks.values() if type(hook).__module__.startswith("torch.nn.utils")]
    return {getattr(hook, name) for hook in own for name in ("name", "_tensor_name") if hasattr(hook, name)}
