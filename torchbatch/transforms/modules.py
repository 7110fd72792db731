"""``stack_modules``: an ensemble of modules as one function that ``vmap`` maps."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from torchbatch.core.describe import describe
from torchbatch.errors import AxisError, InputTypeError

Tensors = dict[str, torch.Tensor]


class Applied:
    """The modules of an ensemble as one function of parameters, buffers and inputs."""

    def __init__(self, module: nn.Module) -> None:
        self.module = _without_data(module)
        self.__name__ = type(module).__name__

    def __call__(self, params: Tensors, buffers: Tensors, /, *args: Any, **kwargs: Any) -> Any:
        """The output of a module with these parameters and buffers."""
        return torch.func.functional_call(self.module, (params, buffers), args, kwargs)

    def __repr__(self) -> str:
        return f"<apply of stacked {self.__name__}>"


def stack_modules(modules: Iterable[nn.Module]) -> tuple[Applied, Tensors, Tensors]:
    """Stack the parameters and buffers of modules of one architecture, so that one ``vmap`` runs them all.

    Shapes: n modules with a parameter ``[a, b]`` give one stacked parameter ``[n, a, b]``.

    Args:
        modules: the modules. They must agree in class, settings, train or eval mode, and in the names, shapes, dtypes,
            devices, ``requires_grad`` and sharing of their parameters and buffers.

    Returns:
        ``(apply, params, buffers)``: two dicts of stacked tensors by name, and ``apply(params, buffers, *args,
        **kwargs)``, which runs one module. Stacked parameters are new leaves that require a gradient where the modules'
        parameters do. A parameter used under several names is there once. In training mode, ``apply`` updates buffers
        such as running statistics in place.

    Raises:
        InputTypeError: not a collection of modules.
        AxisError: there are no modules, they have parameters without a shape yet, or they differ; the text names the
            first that differs and where.

    Example:
        >>> import torch
        >>> from torchbatch import vmap
        >>> from torchbatch.transforms.modules import stack_modules
        >>> apply, params, buffers = stack_modules([torch.nn.Linear(3, 2) for _ in range(5)])
        >>> vmap(apply, in_axes=(0, 0, None))(params, buffers, torch.ones(7, 3)).shape
        torch.Size([5, 7, 2])
        >>> params["weight"].shape, params["weight"].requires_grad
        (torch.Size([5, 2, 3]), True)

    Source: the idea is that of ``torch.func.stack_module_state``.
    """
    members = _checked_members(modules)
    first = members[0]
    for number, module in enumerate(members[1:], 1):
        difference = _difference(first, module)
        if difference is not None:
            raise AxisError(
                f"stack_modules needs modules of one architecture, but module {number} differs from module 0: "
                f"{difference}. Make them agree, or leave it out."
            )
    params = {name: _stacked(members, name, p.requires_grad) for name, p in first.named_parameters()}
    buffers = {name: _stacked(members, name, b.requires_grad) for name, b in first.named_buffers()}
    return Applied(first), params, buffers


def _checked_members(modules: Iterable[nn.Module]) -> list[nn.Module]:
    if not isinstance(modules, Iterable):
        raise InputTypeError(
            f"stack_modules takes a list of modules, but it got one {type(modules).__name__}. Write "
            "stack_modules([m1, m2])."
        )
    members = list(modules)
    if not members:
        raise AxisError("stack_modules needs at least one module, but the list is empty.")
    for number, module in enumerate(members):
        if not isinstance(module, nn.Module):
            raise InputTypeError(
                f"stack_modules takes a list of modules, but number {number} is of type {type(module).__name__}."
            )
        for name, tensor in _tensors(module).items():
            if nn.parameter.is_lazy(tensor):
                raise AxisError(
                    f"module {number} has the parameter {name}, which has no shape yet. Run the module once "
                    "before stacking."
                )
    return members


def _stacked(members: list[nn.Module], name: str, requires_grad: bool) -> torch.Tensor:
    tensors = [_tensors(module)[name].detach() for module in members]
    return torch.stack(tensors).requires_grad_(requires_grad)


def _tensors(module: nn.Module) -> Tensors:
    """Parameters and buffers under all of their names."""
    return {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }


def _without_data(module: nn.Module) -> nn.Module:
    """A copy whose parameters and buffers have shapes but no storage; what was shared is shared."""
    memo: dict[int, Any] = {}
    for parameter in module.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
    for buffer in module.buffers():
        memo[id(buffer)] = buffer.detach().to("meta")
    return copy.deepcopy(module, memo)


# --- what two modules differ in --------------------------------------------------------------------------------------


def _difference(a: nn.Module, b: nn.Module) -> str | None:
    """The first thing in which two modules differ, as text."""
    return _submodule_difference(a, b) or _tensor_difference(a, b)


def _submodule_difference(a: nn.Module, b: nn.Module) -> str | None:
    mine, theirs = dict(a.named_modules(remove_duplicate=False)), dict(b.named_modules(remove_duplicate=False))
    for name in [*mine, *theirs]:
        where = f" at {name}" if name else ""
        if name not in mine or name not in theirs:
            return f"only one of them has the submodule {name}"
        x, y = mine[name], theirs[name]
        if _class(x) is not _class(y):
            return f"it is of class {_class(y).__name__}, not {_class(x).__name__}{where}"
        if x.training != y.training:
            mode, usual = ("train", "eval") if y.training else ("eval", "train")
            return f"it is in {mode} mode, not {usual} mode{where}"
        setting = _setting_difference(x, y)
        if setting is not None:
            return f"{setting}{where}"
    return None


def _class(module: nn.Module) -> type:
    """The class that the user wrote; a parametrized module has one of its own."""
    return nn.utils.parametrize.type_before_parametrizations(module)


def _setting_difference(a: nn.Module, b: nn.Module) -> str | None:
    """A plain attribute, such as a dropout rate, that the first module would silently give to all."""
    mine, theirs = _settings(a), _settings(b)
    for name in [*mine, *theirs]:
        if name not in mine or name not in theirs:
            return f"only one of them has the attribute {name!r}"
        x, y = mine[name], theirs[name]
        if isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor):
            if not torch.equal(x, y):
                return f"the attribute {name!r} is another tensor; register it as a buffer"
        elif type(x) is not type(y) or x != y:
            return f"the attribute {name!r} is {y!r}, not {x!r}"
    if a.extra_repr() != b.extra_repr():
        return f"it is set up as ({b.extra_repr()}), not ({a.extra_repr()})"
    return None


_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.Size, torch.Tensor)


def _settings(module: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in vars(module).items() if name[:1] != "_" and _is_plain(value)}


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(_is_plain(item) and not isinstance(item, torch.Tensor) for item in value)
    return isinstance(value, _PLAIN)


def _tensor_difference(a: nn.Module, b: nn.Module) -> str | None:
    mine, theirs = _tensors(a), _tensors(b)
    for name in [*mine, *theirs]:
        if name not in mine or name not in theirs:
            return f"only one of them has the parameter or buffer {name}"
        x, y = mine[name], theirs[name]
        if describe(x) != describe(y):
            return f"{name} is {describe(y)}, not {describe(x)}"
        if x.device != y.device:
            return f"{name} is on {y.device}, not {x.device}"
        if x.requires_grad != y.requires_grad:
            return f"{name} {'requires' if y.requires_grad else 'does not require'} a gradient, unlike in module 0"
    if _sharing(mine) != _sharing(theirs):
        return f"its shared parameters are {_sharing(theirs) or 'none'}, not {_sharing(mine) or 'none'}"
    return None


def _sharing(tensors: Tensors) -> list[list[str]]:
    """The names that stand for one tensor, in groups."""
    groups: dict[int, list[str]] = {}
    for name, tensor in tensors.items():
        groups.setdefault(id(tensor), []).append(name)
    return [names for names in groups.values() if len(names) > 1]
