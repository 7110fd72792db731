"""The loss of one example, as a function of parameters and of the example: from a function, or from a module and a criterion."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from torchbatch.core import tree
from torchbatch.core.describe import describe, function_name, shown
from torchbatch.errors import AxisSpecError, GradientTypeError, InputTypeError
from torchbatch.per_example.care import BatchNorm, Buffers, check_examples_apart, checked
from torchbatch.per_example.stand_ins import StandIns

Adapter = Callable[..., tuple[Any, Any]]


class FunctionLoss:
    """``loss(params, *example)``, as the user wrote it."""

    def __init__(self, fun: Callable[..., Any]) -> None:
        self.fun, self.__name__ = fun, function_name(fun)
        self.roots: tuple[Any, ...] = (fun,)

    def split(self, args: tuple[Any, ...], who: str) -> tuple[Any, Any]:
        """The parameters and the batch of a call."""
        if len(args) < 2:
            raise InputTypeError(
                f"{who}: a function of parameters and an example is called with the parameters and a batch, "
                f"{who}({self.__name__})(params, *batch), but it got {len(args)} argument(s)."
            )
        return args[0], self.batch(args[1:], who)

    def batch(self, args: tuple[Any, ...], who: str) -> Any:
        """The batch that the arguments beside the parameters make."""
        return args

    def check(self, who: str) -> None:
        """There is nothing to be said before the call."""

    def within(self, params: Any, run: Callable[[], Any]) -> Any:
        """What ``run()`` gives, while the parameters are in their places."""
        return run()

    def __call__(self, params: Any, example: Any) -> Any:
        with StandIns():
            return self.fun(params, *example)


class Examples(NamedTuple):
    """A batch for a module, or one example of it."""

    inputs: tuple[Any, ...]
    keywords: dict[str, Any]
    targets: tuple[Any, ...]


class ModuleLoss:
    """What a criterion says of a module's output, for one example, which the module sees as a batch of one.

    Args:
        model: the module; it stays what it is.
        criterion: a function of the output and the targets, or None if the output is the loss or has it as ``.loss`` or
            ``["loss"]``.
        targets: how many of a call's last arguments are targets.
        adapter: makes ``(inputs, targets)`` of a call's arguments.
        batch_norm: None, or ``"per_example"``: layers that take statistics over the batch take those of the example.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: Callable[..., Any] | None,
        targets: int = 1,
        adapter: Adapter | None = None,
        batch_norm: BatchNorm = None,
    ) -> None:
        self.model, self.criterion, self._targets, self._adapter = model, criterion, targets, adapter
        self._batch_norm = batch_norm
        self.roots: tuple[Any, ...] = model, criterion
        self.__name__ = type(model).__name__

    def parameters(self) -> dict[str, torch.Tensor]:
        """The parameters that are trained, by name; one that has several names is there once."""
        return {name: value.detach() for name, value in self.model.named_parameters() if value.requires_grad}

    def split(self, args: tuple[Any, ...], who: str) -> tuple[Any, Any]:
        """The parameters and the batch of a call."""
        return self.parameters(), self.batch(args, who)

    def batch(self, args: tuple[Any, ...], who: str) -> Any:
        """The batch that arguments make: inputs by position and by name, and targets."""
        if self._adapter is not None:
            found = self._adapter(*args)
            if not isinstance(found, tuple) or len(found) != 2:
                raise AxisSpecError(
                    f"{who}: the adapter must return a pair (inputs, targets), but it returned {shown(found)}."
                )
            inputs, targets = found
        else:
            count = self._targets if self.criterion is not None else 0
            if len(args) < count + 1:
                raise InputTypeError(
                    f"{who}: {self.__name__} is called with its inputs and then {count} target(s), but it got {len(args)} "
                    f"argument(s). If your batches look otherwise, say targets=… or give an adapter that makes (inputs, targets)."
                )
            inputs, targets = args[: len(args) - count], args[len(args) - count :]
        positional, named = ((), dict(inputs)) if isinstance(inputs, Mapping) else (_as_tuple(inputs), {})
        return Examples(positional, named, () if targets is None else _as_tuple(targets))

    def check(self, who: str) -> None:
        """Refuse a module that mixes the examples of a batch."""
        if self._batch_norm is None:
            check_examples_apart(self.model, who)

    def within(self, params: dict[str, torch.Tensor], run: Callable[[], Any]) -> Any:
        """What ``run()`` gives, while the parameters are in their places: a gradient may need them there again."""
        named = {f"model.{name}": value for name, value in params.items()}
        return torch.func.functional_call(_Around(self.model), named, (run,))

    def __call__(self, params: dict[str, torch.Tensor], example: Any) -> Any:
        leaves, structure = tree.flatten(example)
        found: Any = structure.unflatten([_batch_of_one(leaf) for leaf in leaves])
        positional, named, targets = found
        buffers = Buffers(self.model, self._batch_norm)
        with StandIns(self._batch_norm is not None):
            output = torch.func.functional_call(self.model, {**params, **buffers.values}, positional, named)
            buffers.check_not_written(self.__name__)
            if self.criterion is not None:
                return _one_number(self.criterion(output, *targets), "for a batch of one the criterion returned")
        output = output["loss"] if isinstance(output, Mapping) and "loss" in output else getattr(output, "loss", output)
        return _one_number(output, f"there is no criterion, and for a batch of one {self.__name__} returned")


class _Around(nn.Module):
    """A module inside of which something runs."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, run: Callable[[], Any]) -> Any:
        return run()


def _as_tuple(values: Any) -> tuple[Any, ...]:
    return tuple(values) if isinstance(values, tuple | list) else (values,)


def _batch_of_one(leaf: Any) -> Any:
    return leaf[None] if isinstance(leaf, torch.Tensor) else leaf


def said(value: Any) -> str:
    """What a message says of a result, which has no numbers yet."""
    if isinstance(value, torch.Tensor):
        return describe(value)
    if isinstance(value, Mapping):
        return f"a {type(value).__name__} with the keys {', '.join(map(repr, value))}"
    return f"a {type(value).__name__} of {len(value)} values" if isinstance(value, tuple | list) else shown(value)


def _one_number(value: Any, what: str) -> Any:
    if not isinstance(value, torch.Tensor):
        raise GradientTypeError(f"per-example gradients need the loss of one example, a number, but {what} {said(value)}.")
    if value.numel() != 1:
        raise GradientTypeError(
            f"per-example gradients need the loss of one example, a number, but {what} {describe(value)}. "
            f"Take its sum or its mean."
        )
    return value.reshape(())


def loss_of(
    model: Any, criterion: Any, targets: int, adapter: Adapter | None, who: str, batch_norm: Any = None
) -> FunctionLoss | ModuleLoss:
    """The loss of one example in one form.

    Raises:
        AxisSpecError: options that do not go together.
        InputTypeError: it is neither a function nor a module.
    """
    if isinstance(model, nn.Module):
        if criterion is not None and not callable(criterion):
            raise AxisSpecError(
                f"{who}: criterion must be a function of the output and the targets, but it is {shown(criterion)}."
            )
        if isinstance(targets, bool) or not isinstance(targets, int) or targets < 0:
            raise AxisSpecError(f"{who}: targets counts the arguments that are targets, but it is {shown(targets)}.")
        return ModuleLoss(model, criterion, targets, adapter, checked(batch_norm, who))
    if isinstance(model, type) and issubclass(model, nn.Module):
        raise InputTypeError(f"{who} takes a module, but {model.__name__} is a class of modules. Make one: {model.__name__}(…).")
    if not callable(model):
        raise InputTypeError(f"{who} takes a function loss(params, *example) or a module, but it got {shown(model)}.")
    if isinstance(criterion, nn.Module) and adapter is None and not isinstance(model, nn.Module):
        raise InputTypeError(
            f"{who}: the module comes first and the criterion second, but the first is the function {function_name(model)} and "
            f"the second a {type(criterion).__name__}."
        )
    if criterion is not None or adapter is not None or batch_norm is not None:
        raise AxisSpecError(
            f"{who}: criterion, adapter and batch_norm go with a module, but {function_name(model)} is a function, which returns "
            f"the loss of one example itself."
        )
    return FunctionLoss(model)
