"""In training loops: gradients by name go where optimizers look, and an ordinary backward pass leaves those of each example."""

from __future__ import annotations

import contextlib
import copy
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from torchbatch.core import tree
from torchbatch.core.describe import describe, shown
from torchbatch.errors import AxisError, AxisSpecError, GradientTypeError, GradientValueError, InputTypeError, OutputTypeError
from torchbatch.per_example.care import BatchNorm, Buffers, check_examples_apart, checked
from torchbatch.per_example.stand_ins import StandIns
from torchbatch.transforms.vmap import vmap

# --- gradients by name, into .grad -----------------------------------------------------------------------------------


def accumulate_(model: nn.Module, grads: Mapping[str, Tensor], *, scale: float | Tensor = 1.0) -> None:
    """Add gradients to the ``.grad`` of a module's parameters, as a backward pass does.

    What follows a backward pass then works as ever: every optimizer of ``torch.optim``, schedulers, gradients that are added up
    over several batches, ``torch.nn.utils.clip_grad_norm_`` and GradScaler. All is checked before anything is written. Hooks of
    parameters are not called.

    Shapes: a parameter ``[*shape]`` takes ``[*shape]``.

    Args:
        model: the module.
        grads: a gradient for each parameter that is trained, by name, as :func:`~torchbatch.per_example.mean`,
            :func:`~torchbatch.per_example.clipped_mean` and others return them for a module.
        scale: what the gradients are multiplied by: a number or a tensor of one; ``1 / n`` for the mean of n batches,
            ``scaler.scale(torch.ones(()))`` for a GradScaler.

    Raises:
        InputTypeError: ``model`` is no module, or ``grads`` no dict of tensors.
        GradientValueError: a name is missing, unknown, or that of a frozen parameter, or a shape is not the parameter's.
        GradientTypeError: a dtype or a device is not the parameter's.
        AxisSpecError: ``scale`` is no number.

    Example:
        >>> import torch
        >>> from torchbatch import per_example
        >>> model = torch.nn.Linear(3, 1)
        >>> optimizer = torch.optim.Adam(model.parameters())
        >>> clipped = per_example.clipped_mean(model, torch.nn.functional.mse_loss, max_norm=1.0)
        >>> for x, y in [(torch.ones(5, 3), torch.ones(5, 1))]:
        ...     optimizer.zero_grad()
        ...     per_example.accumulate_(model, clipped(x, y))
        ...     optimizer.step()
    """
    _check_module("accumulate_", model)
    factor = _factor(scale)
    trained = _checked(model, grads)
    with torch.no_grad():
        for name, parameter in trained.items():
            value = grads[name].detach()
            value = value.clone() if factor is None else value * factor
            if parameter.grad is None:
                parameter.grad = value
            elif parameter.grad.is_sparse or parameter.grad.requires_grad:
                parameter.grad = value + parameter.grad.detach()
            else:
                parameter.grad += value


def _check_module(who: str, model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise InputTypeError(f"{who}: model must be a torch.nn.Module, but it is {shown(model)}.")


def _factor(scale: Any) -> Any:
    is_number = isinstance(scale, int | float) and not isinstance(scale, bool)
    if not is_number and not (isinstance(scale, Tensor) and not scale.dim() and scale.is_floating_point()):
        raise AxisSpecError(f"accumulate_: scale must be a number, or a tensor of one, but it is {shown(scale)}.")
    return None if is_number and scale == 1 else scale


def _checked(model: nn.Module, grads: Any) -> dict[str, nn.Parameter]:
    """The parameters that are trained, by name, if there is a gradient for each, and no other.

    Raises:
        TorchbatchError: as :func:`accumulate_` says.
    """
    if not isinstance(grads, Mapping):
        raise InputTypeError(f"accumulate_: grads must be a dict of tensors by parameter names, but it is {shown(grads)}.")
    parameters = dict(model.named_parameters())
    for name, value in grads.items():
        if name not in parameters:
            raise GradientValueError(f"accumulate_: {_unknown(model, parameters, name)}")
        _check_gradient(name, value, parameters[name])
    trained = {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}
    missing = [name for name in trained if name not in grads]
    if missing:
        raise GradientValueError(
            f"accumulate_: grads has nothing for {_listed(missing)}. Give a gradient for each parameter that is trained (zeros, "
            f"if that is meant), or freeze it with requires_grad_(False)."
        )
    return trained


def _unknown(model: nn.Module, parameters: dict[str, nn.Parameter], name: Any) -> str:
    every = dict(model.named_parameters(remove_duplicate=False))
    if name in every:
        first = next(other for other, parameter in parameters.items() if parameter is every[name])
        return f"{name!r} is another name of the parameter {first!r}, which the model has under both. Give it as {first!r}."
    return f"{type(model).__name__} has no parameter {name!r}. It has {_listed(list(parameters)) or 'none'}."


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 6} more" if len(names) > 6 else ""
    return ", ".join(map(repr, names[:6])) + more


def _check_gradient(name: str, value: Any, parameter: nn.Parameter) -> None:
    if not isinstance(value, Tensor):
        raise InputTypeError(f"accumulate_: the gradient of {name!r} must be a tensor, but it is {shown(value)}.")
    if not parameter.requires_grad:
        raise GradientValueError(
            f"accumulate_: there is a gradient for {name!r}, which is frozen. Leave it out, or train it: requires_grad_(True)."
        )
    if value.shape != parameter.shape:
        one_more = value.shape[1:] == parameter.shape and value.dim() == parameter.dim() + 1
        hint = " It looks like the gradients of single examples: take their sum or their mean." if one_more else ""
        raise GradientValueError(f"accumulate_: {name!r} is {describe(parameter)}, but its gradient is {describe(value)}.{hint}")
    if value.dtype != parameter.dtype or value.device != parameter.device:
        raise GradientTypeError(
            f"accumulate_: {name!r} is {describe(parameter)} on {parameter.device}, but its gradient is {describe(value)} on "
            f"{value.device}. Convert it: value.to(parameter)."
        )


# --- gradients of single examples, from an ordinary backward pass -------------------------------------------------------


@contextlib.contextmanager
def grad_samples(model: nn.Module, reduction: str = "mean", *, batch_norm: BatchNorm = None) -> Iterator[nn.Module]:
    """A context in which an ordinary backward pass leaves per-example gradients in ``param.grad_sample``, and ``.grad`` too.

    For those who come from Opacus, whose ``GradSampleModule`` this stands for; there is no list of layers. In the context the
    model's ``forward`` runs once for each example, as a batch of one, by :func:`~torchbatch.vmap`, with a copy of the parameters
    for each (of no memory). The module, its state dict and its optimizer stay what they are, and the attribute stays when the
    context ends. Where gradients are off (``torch.no_grad``), the model is called as ever.

    What several backward passes give adds up, as in ``.grad``, until the model is called after one: then ``grad_sample`` starts
    anew, and ``.grad`` does not (that is what ``zero_grad`` is for). What the loss reads of the parameters beside the model's
    output (weight decay) goes into ``.grad`` only.

    Where only sums or norms are needed, :func:`~torchbatch.per_example.clipped_sum` and :func:`~torchbatch.per_example.norms`
    take a fraction of the time and memory.

    Shapes: inputs ``[B, …]``, outputs ``[B, …]``; a parameter ``[*shape]`` gets ``grad_sample`` ``[B, *shape]``.

    Args:
        model: the module. All tensors that it is given have the examples along their first axis (single numbers, and what is no
            tensor, are the same for all examples), and so do the outputs.
        reduction: what the loss makes of those of the examples, ``"mean"`` or ``"sum"``. With ``"mean"`` the gradients of the
            mean are multiplied by B, so that they are those of each example's own loss.
        batch_norm: as for :func:`~torchbatch.per_example.gradients`.

    Yields:
        The model.

    Raises:
        AxisSpecError: an option is not as described, or the model is in such a context already.
        GradientTypeError: no parameter is trained.
        AxisError: the model's inputs have not as many examples each, an output has no axis of examples, batches of several
            sizes meet in one backward pass, or the model mixes the examples of a batch (BatchNorm).
        InPlaceError: the model writes into a buffer.
        OutputTypeError: an output is an object of a class that is no node of trees.
        InputTypeError: ``model`` is no module, or no input is a tensor with an axis of examples.
        GradientValueError: a part of the model is called by itself, or once more during the backward pass (checkpointing).

    Example:
        >>> import torch
        >>> from torchbatch import per_example
        >>> model = torch.nn.Linear(3, 2)
        >>> with per_example.grad_samples(model):
        ...     torch.nn.functional.cross_entropy(model(torch.ones(5, 3)), torch.tensor([0, 1, 1, 0, 1])).backward()
        >>> model.weight.grad_sample.shape, model.weight.grad.shape
        (torch.Size([5, 2, 3]), torch.Size([2, 3]))
        >>> torch.allclose(model.weight.grad_sample.mean(0), model.weight.grad)
        True

    Source: ``GradSampleModule`` of Opacus (Yousefpour et al., 2021).
    """
    _check_module("grad_samples", model)
    if reduction not in ("mean", "sum"):
        raise AxisSpecError(f'grad_samples: reduction must be "mean" or "sum", but it is {shown(reduction)}.')
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise GradientTypeError("grad_samples: there are no parameters to differentiate by: all are frozen, or there are none.")
    modules = list(model.modules())
    for module in modules:
        if module in _in_use:
            raise AxisSpecError(f"grad_samples: {type(module).__name__} is in such a context already, and cannot be in two.")
    samples = _Samples(model, reduction, checked(batch_norm, "grad_samples"))
    _in_use.update(modules)
    try:
        samples.install(modules)
        yield model
    finally:
        samples.remove()
        _in_use.difference_update(modules)


_in_use: weakref.WeakSet[nn.Module] = weakref.WeakSet()


class _Bare(nn.Module):
    """A module around another one, whose forward it calls without its hooks, which ran already."""

    def __init__(self, model: nn.Module, forward: Callable[..., Any]) -> None:
        super().__init__()
        self.inner, self._call = model, forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(*args, **kwargs)


class _ManyTables(TorchFunctionMode):
    """While it is active, the padding of an embedding has no gradient, which PyTorch forgets where each example has a table."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not functional.embedding:
            return func(*args, **(kwargs or {}))
        return _padded(*args, **(kwargs or {}))


def _padded(numbers: Tensor, weight: Tensor, padding_idx: int | None = None, *args: Any, **kwargs: Any) -> Tensor:
    found = functional.embedding(numbers, weight, None, *args, **kwargs)
    if padding_idx is None:
        return found
    return torch.where((numbers == padding_idx % len(weight))[..., None], found.detach(), found)


class _Samples:
    """What takes the place of a model's forward, and gathers the gradients of each example."""

    def __init__(self, model: nn.Module, reduction: str, batch_norm: BatchNorm) -> None:
        self._model, self._is_mean, self._batch_norm = model, reduction == "mean", batch_norm
        self._own = vars(model).get("forward")
        self._forward: Callable[..., Any] = model.forward
        self._bare = _Bare(model, model.forward)
        self._hooks: list[Any] = []
        self._inside = 0
        self._is_over = True  # whether there was a backward pass since the model was last called
        self._is_active = False

    def __deepcopy__(self, memo: dict[int, Any]) -> _Samples:
        """Of a copy of the model, which is called as ever."""
        made = memo[id(self)] = object.__new__(_Samples)
        made._is_active, made._forward = False, copy.deepcopy(self._forward, memo)
        return made

    def install(self, modules: list[nn.Module]) -> None:
        """Take the place of forward, and look after the other modules."""
        self._hooks = [module.register_forward_pre_hook(self._check_inside) for module in modules if module is not self._model]
        self._model.forward = self._in_place_of_forward
        self._is_active = True
        self._forget()

    def remove(self) -> None:
        """Leave the model as it was."""
        for hook in self._hooks:
            hook.remove()
        self._is_active = False
        vars(self._model).pop("forward", None)
        if self._own is not None:
            self._model.forward = self._own

    def _forget(self) -> None:
        for parameter in self._model.parameters():
            parameter.grad_sample = None  # type: ignore[attr-defined]
        self._is_over = False

    def _check_inside(self, module: nn.Module, args: Any) -> None:
        if self._is_active and not self._inside and torch.is_grad_enabled():
            raise GradientValueError(
                f"grad_samples: a part of {type(self._model).__name__}, {type(module).__name__}, is called outside of a call of "
                f"the whole, so its gradients for each example would be missing. Call the model itself. If the part is called "
                f"once more during the backward pass (activation checkpointing), use per_example.gradients instead."
            )

    def _in_place_of_forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self._is_active or not torch.is_grad_enabled():
            return self._forward(*args, **kwargs)
        if self._batch_norm is None:
            check_examples_apart(self._model, "grad_samples")
        if self._is_over:
            self._forget()
        call = _Call(args, kwargs)

        def one(parameters: dict[str, Tensor], examples: list[Tensor]) -> list[Tensor]:
            buffers = Buffers(self._model, self._batch_norm)
            values = {f"inner.{name}": value for name, value in (*parameters.items(), *buffers.values.items())}
            with StandIns(self._batch_norm is not None), _ManyTables():
                output = torch.func.functional_call(self._bare, values, *call.batch_of_one(examples))
            buffers.check_not_written("grad_samples")
            return call.leave(output)

        self._inside += 1
        try:
            return call.result(vmap(one, randomness="different")(self._spread(call.size()), call.examples()))
        finally:
            self._inside -= 1

    def _spread(self, size: int) -> dict[str, Tensor]:
        """The parameters that are trained, for each example, with a hook that sees the gradients come back."""
        found = {}
        for name, parameter in self._model.named_parameters():
            if parameter.requires_grad:
                spread: Any = parameter.expand(size, *parameter.shape)
                spread.register_hook(self._keeper(name, parameter))
                found[name] = spread
        return found

    def _keeper(self, name: str, parameter: nn.Parameter) -> Callable[[Tensor], None]:
        def keep(gradient: Tensor) -> None:
            gradient = gradient.detach() * len(gradient) if self._is_mean else gradient.detach()
            before = parameter.grad_sample  # type: ignore[attr-defined]
            if before is not None and len(before) != len(gradient):
                raise AxisError(
                    f"grad_samples: the model was called with batches of {len(before)} and of {len(gradient)} examples before "
                    f"one backward pass, so the gradients of {name!r} cannot be added up example by example."
                )
            parameter.grad_sample = gradient if before is None else before + gradient  # type: ignore[attr-defined]
            self._is_over = True

        return keep


_PLAIN = (str, bytes, bool, int, float, complex, torch.dtype, torch.device)  # what has no tensors inside


class _Call:
    """The arguments of one call of a model: which have an axis of examples, and what came out."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._leaves, self._structure = tree.flatten((args, kwargs))
        self._names = [*tree.paths(args, "args"), *tree.paths(kwargs, "kwargs")]
        self._mapped = [i for i, leaf in enumerate(self._leaves) if isinstance(leaf, Tensor) and leaf.dim()]
        self._output: tuple[list[Any], Any] = [], None

    def examples(self) -> list[Tensor]:
        """The tensors with an axis of examples."""
        return [self._leaves[i] for i in self._mapped]

    def size(self) -> int:
        """How many examples there are."""
        if not self._mapped:
            raise InputTypeError("grad_samples: no input of the model is a tensor with an axis of examples.")
        first, *others = self._mapped
        size: int = self._leaves[first].shape[0]
        for i in others:
            if self._leaves[i].shape[0] != size:
                raise AxisError(
                    f"grad_samples: {self._names[first]} has {size} examples along its first axis, but {self._names[i]} is "
                    f"{describe(self._leaves[i])}. What all examples share is no input here: make it a buffer of the model."
                )
        return size

    def batch_of_one(self, examples: list[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments for one example."""
        values = list(self._leaves)
        for i, example in zip(self._mapped, examples, strict=True):
            values[i] = example[None]
        inputs: tuple[tuple[Any, ...], dict[str, Any]] = self._structure.unflatten(values)  # type: ignore[assignment]
        return inputs

    def leave(self, output: Any) -> list[Tensor]:
        """The tensors of one example's output, without the batch of one; the rest is remembered."""
        self._output = leaves, _ = tree.flatten(output)
        named = list(zip(leaves, tree.paths(output, "output"), strict=True))
        for leaf, name in named:
            if not isinstance(leaf, (Tensor, *_PLAIN)):
                raise OutputTypeError(
                    f"grad_samples: {name} is {shown(leaf)}, into which torchbatch cannot look for tensors. Return a tensor, a "
                    f"tuple or a dict, or make the class known with torchbatch.tree.register_dataclass or register_node."
                )
        return [_without_axis(leaf, name) for leaf, name in named if isinstance(leaf, Tensor)]

    def result(self, found: list[Tensor]) -> Any:
        """The output of all examples."""
        leaves, structure = self._output
        tensors = iter(found)
        return structure.unflatten([next(tensors) if isinstance(leaf, Tensor) else leaf for leaf in leaves])


def _without_axis(value: Tensor, name: str) -> Tensor:
    if not value.dim() or value.shape[0] != 1:
        raise AxisError(
            f"grad_samples: for a batch of one example, {name} is {describe(value)}, which has no first axis of length 1. "
            f"Outputs must have the examples along their first axis; take the loss outside of the model."
        )
    return value[0]
