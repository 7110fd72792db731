"""One batch, as a formula of a quantity sees it: parameters, examples, and what can be had of the two."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torchbatch._torch import derivatives, levels, one_example, staged
from torchbatch.core import tree
from torchbatch.core.derivative import guarded
from torchbatch.core.describe import shown
from torchbatch.errors import AxisError, GradientTypeError, InputTypeError
from torchbatch.per_example import draws, loops
from torchbatch.per_example.factors import Gradients
from torchbatch.per_example.losses import FunctionLoss, ModuleLoss, said
from torchbatch.per_example.one_way import OneWay
from torchbatch.transforms.vmap import vmap


class Params:
    """A tree of parameters.

    Raises:
        GradientTypeError: there are none, or one has no gradient.
    """

    def __init__(self, given: Any, who: str) -> None:
        self.given = given
        self.leaves, self.structure = tree.flatten(given)
        for i, leaf in enumerate(self.leaves):
            if not isinstance(leaf, Tensor) or not (leaf.is_floating_point() or leaf.is_complex()):
                raise GradientTypeError(
                    f"{who}: {self.names()[i]} is {shown(leaf)}, which has no gradient. Parameters are tensors of floating-point "
                    f"or complex numbers."
                )
        if not self.leaves:
            raise GradientTypeError(f"{who}: there are no parameters to differentiate by: all are frozen, or there are none.")

    def detached(self) -> Params:
        """The parameters without history."""
        if not any(leaf.requires_grad for leaf in self.leaves):
            return self
        return Params(self.structure.unflatten([leaf.detach() for leaf in self.leaves]), "")

    def names(self) -> list[str]:
        """What messages call each parameter."""
        return [path if not self._is_flat_dict() else path[2:-2] for path in tree.paths(self.given, "")]

    def layers(self) -> list[str]:
        """The module, or the container in a tree, that each parameter is directly in."""
        if self._is_flat_dict():
            return [name.rpartition(".")[0] for name in self.names()]
        return [path[:-1].codify("") for path in tree.flatten_with_path(self.given)[0]]

    def _is_flat_dict(self) -> bool:
        return isinstance(self.given, dict) and all(isinstance(value, Tensor) for value in self.given.values())


def size_of(batch: Any, who: str) -> int:
    """How many examples there are in a batch.

    Raises:
        InputTypeError: a leaf is no tensor.
        AxisError: there is nothing that says it, or two leaves say different things.
    """
    leaves = tree.flatten(batch)[0]
    if leaves and all(isinstance(leaf, Tensor) and leaf.dim() for leaf in leaves) and len({len(leaf) for leaf in leaves}) == 1:
        return len(leaves[0])
    sizes: dict[str, int] = {}
    for path, leaf in zip(tree.paths(batch, "batch"), leaves, strict=True):
        name = path.removeprefix("batch.")
        if not isinstance(leaf, Tensor):
            raise InputTypeError(f"{who}: {name} is {shown(leaf)}, which is no tensor. Give an adapter that makes tensors of it.")
        if not leaf.dim():
            raise AxisError(f"{who}: {name} is a single number, which has no axis of examples.")
        sizes[name] = leaf.shape[0]
    if not sizes:
        raise AxisError(f"{who}: the batch has no tensor, so there is nothing that says how many examples there are.")
    first, *others = sizes
    other = next(name for name in others if sizes[name] != sizes[first])
    raise AxisError(f"{who}: {first} has {sizes[first]} examples along its first axis, but {other} has {sizes[other]}.")


class Batch:
    """The loss of one example, parameters and examples, as plain tensors or while jit traces.

    Args:
        loss: the loss of one example.
        leaves, structure: the parameters.
        examples: the batch, with the examples along the first axis of each leaf.
        keys: for the random draws of each example, ``[B, 2]``.
        present: a number for each example, ``[B]``: 1, or 0 for what only fills up a chunk.
    """

    def __init__(
        self, loss: FunctionLoss | ModuleLoss, leaves: list[Tensor], structure: Any, examples: Any, keys: Tensor, present: Tensor
    ) -> None:
        self._loss, self.leaves, self._structure = loss, leaves, structure
        self._values, self._examples = tree.flatten(examples)
        self.keys, self.present = keys, present
        self.draws = False
        self._found: list[Gradients] = []

    def beside(self, examples: Any, keys: Tensor) -> Batch:
        """Another batch, with the same parameters."""
        return Batch(self._loss, self.leaves, self._structure, examples, keys, keys.new_ones(len(keys)).to(self.present.dtype))

    def params(self) -> Params:
        """The parameters as a tree."""
        return Params(self._structure.unflatten(self.leaves), "")

    def loss(self, leaves: Sequence[Tensor], values: Sequence[Tensor]) -> Tensor:
        """The loss of one example."""
        value: Tensor = self._loss(self._structure.unflatten(leaves), self._examples.unflatten(values))
        if not isinstance(value, Tensor) or value.dim() or not value.is_floating_point():
            raise GradientTypeError(
                f"{self._loss.__name__} must return the loss of one example, a floating-point number, but it returned "
                f"{said(value)}."
            )
        return value

    def gradients(self) -> list[Gradients]:
        """Those of each parameter."""
        if self._is_traced():
            found = self._taken_apart()
        else:
            results = self._mapped(lambda *values: self._differentiated(values), self.leaves, randomness="different")
            found = [Gradients.made(leaf, whole) for leaf, whole in zip(self.leaves, results[1:], strict=True)]
        self._found = found
        return found

    def told(self) -> list[str]:
        """In words, what was done with the gradients of each parameter."""
        return [each.how() for each in self._found]

    def along(self, tangents: Sequence[Tensor]) -> Tensor | None:
        """The derivatives of the losses along one direction of the parameters, ``[B]``, in forward mode.

        None, where forward mode does not find what a backward pass does, or does not exist for all that is computed.
        """
        leaves, count = [*self.leaves, *tangents], len(self.leaves)
        one_way = OneWay(self._loss.roots)

        def moved(*values: Tensor) -> list[Tensor]:
            def flat(*inner: Tensor) -> Any:
                with torch.enable_grad(), one_way:
                    return (self.loss(inner, values[2 * count :]),), ()

            primals, directions = list(values[:count]), list(values[count : 2 * count])
            return list(guarded(derivatives.jvp, self._loss.__name__, flat, primals, directions)[1])

        if one_way.at_work():
            return None
        if not self._is_traced():
            found = self._mapped(moved, leaves, randomness="different")[0]
            return None if one_way.at_work() else found
        try:
            taken = self._taken(lambda *values: moved(*values[:-1]), leaves)
        except RuntimeError:  # the gradients say what is wrong, if it is more than forward mode
            return None
        if one_way.at_work():
            return None
        return self._mapped(taken.run, leaves, self.keys, captured=taken.captured)[0]  # type: ignore[no-any-return]

    def _is_traced(self) -> bool:
        """Whether jit traces here, and nothing else is at work."""
        return staged.is_staging() and not levels.depth()

    def _taken_apart(self) -> list[Gradients]:
        taken = self._taken(lambda *values: self._recorded(values[:-1]), self.leaves)
        results = self._mapped(taken.run, self.leaves, self.keys, captured=taken.captured)
        return [Gradients(leaf, results, parts) for leaf, parts in zip(self.leaves, taken.parts, strict=True)]

    def _taken(self, body: Any, leaves: Sequence[Tensor]) -> one_example.Taken:
        inputs = [*leaves, *[_one(value) for value in (*self._values, self.keys)]]
        taken = one_example.taken_apart(body, inputs, 1, draws.from_key, loops.of_program)
        self.draws = self.draws or taken.draws
        return taken

    def _mapped(
        self, function: Any, leaves: Sequence[Tensor], *more: Tensor, captured: Sequence[Tensor] = (), randomness: str = "error"
    ) -> Any:
        axes = [None] * len(leaves) + [0] * (len(self._values) + len(more)) + [None] * len(captured)
        return vmap(function, in_axes=tuple(axes), randomness=randomness)(*leaves, *self._values, *more, *captured)

    def _recorded(self, values: Sequence[Tensor]) -> list[Tensor]:
        """The loss of one example and its gradients, where nothing but a trace is at work: as ``autograd.grad`` finds them."""
        count = len(self.leaves)
        leaves = [leaf.detach().requires_grad_() for leaf in values[:count]]

        def found() -> list[Tensor]:
            value = self.loss(leaves, values[count:])
            if not value.requires_grad:
                return [value, *map(torch.zeros_like, leaves)]
            return [value, *torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True)]

        with torch.enable_grad():
            results: list[Tensor] = self._loss.within(self._structure.unflatten(leaves), found)
            return results

    def _differentiated(self, values: Sequence[Tensor]) -> list[Tensor]:
        """The loss of one example, and its gradients."""
        count = len(self.leaves)

        def flat(*leaves: Tensor) -> Any:
            return (self.loss(leaves, values[count:]),), ()

        value, found, _ = guarded(derivatives.value_and_gradient, self._loss.__name__, flat, list(values[:count]))
        return [value, *found]


def _one(value: Tensor) -> Tensor:
    return value.new_empty(value.shape[1:])
