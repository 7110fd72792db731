"""Derivatives of a mapped function along fixed random directions, and what differences of its values say of them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

import torchbatch as tb
from torchbatch import tree
from torchbatch.testing.compare import LeafDifference, Rules, compare_leaf
from torchbatch.testing.tolerance import Tolerance
from torchbatch.testing.variants import Call, copied, is_inexact, random_like, spread
from torchbatch.testing.ways import LOOP, Flat

Named = dict[str, torch.Tensor]
REVERSE, FORWARD, INSIDE = "reverse-mode gradient", "forward-mode gradient", "per-sample gradient"
_TANGENTS, _COTANGENTS, _ASIDE = 1_000, 2_000, 3_000  # each has seeds of its own
_STEP = 2e-6
_WIDE = (torch.float64, torch.complex128)


def is_differentiable(call: Call, output: Any) -> bool:
    """Whether there is anything to differentiate, and to differentiate by."""
    return any(map(is_inexact, call.tensors)) and any(map(is_inexact, tree.leaves(output)))


def reverse(call: Call, flat: Flat, like: Any, seed: int) -> Named:
    """The gradient of the output times a fixed cotangent, by ``torch.autograd``. ``like`` is what the loop returns."""
    leaves = [copied(tensor).requires_grad_(is_inexact(tensor)) for tensor in call.tensors]
    inputs = [leaf for leaf in leaves if leaf.requires_grad]
    output = flat([leaf.clone() if leaf.requires_grad else leaf for leaf in leaves])
    rows = [(leaf, cotangent) for leaf, cotangent in _with_cotangents(output, like, seed) if leaf.requires_grad]
    found: Sequence[torch.Tensor | None] = [None] * len(inputs)
    if rows:
        outputs, cotangents = zip(*rows, strict=True)
        found = torch.autograd.grad(outputs, inputs, cotangents, allow_unused=True)
    filled = [torch.zeros_like(x) if gradient is None else gradient for x, gradient in zip(inputs, found, strict=True)]
    return dict(zip(_gradient_names(call), filled, strict=True))


def forward(call: Call, flat: Flat, like: Any, seed: int) -> Named:
    """The derivative of the output along fixed tangents, by :func:`torchbatch.jvp`. ``like`` is what the loop returns."""
    tensors = [copied(tensor) for tensor in call.tensors]
    inputs = [tensor for tensor in tensors if is_inexact(tensor)]

    def inexact(*values: torch.Tensor) -> list[torch.Tensor]:
        return _differentiable(flat(_put(tensors, values)), like)

    _, tangents = tb.jvp(inexact, inputs, [random_like(x, seed + _TANGENTS + i) for i, x in enumerate(inputs)])
    names = [f"tangent of output{tree.keystr(path)}" for path, leaf in tree.flatten_with_path(like)[0] if is_inexact(leaf)]
    return dict(zip(names, tangents, strict=True))


def loop_in_full(call: Call) -> Flat:
    """The loop, with every output stacked: where it compares outputs, it cannot be differentiated in forward mode."""
    stacked = tree.map(lambda axis: 0 if axis is None else axis, call.out_axes, is_leaf=lambda node: node is None)
    flat = LOOP.make(dataclasses.replace(call, out_axes=stacked))

    def run(tensors: Sequence[torch.Tensor]) -> Any:
        leaves, structure = tree.flatten(flat(tensors))
        axes = spread(call.out_axes, tree.unflatten(structure, leaves))
        return tree.unflatten(structure, [leaf[0] if axis is None else leaf for leaf, axis in zip(leaves, axes, strict=True)])

    return run


def inside(call: Call, seed: int) -> Call:
    """The mapped gradient of one sample, instead of the gradient of the mapped function."""
    picked = [is_inexact(leaf) for leaf in call.leaves]
    structure = tree.structure((call.args, call.kwargs))

    def gradient(*args: Any, **kwargs: Any) -> tuple[Any, ...]:
        leaves = tree.leaves((args, kwargs))

        def inexact(*values: Any) -> list[Any]:
            remaining = iter(values)
            filled = [next(remaining) if pick else leaf for pick, leaf in zip(picked, leaves, strict=True)]
            positional, keywords = tree.unflatten(structure, filled)
            return [leaf for leaf in tree.leaves(call.fun(*positional, **keywords)) if is_inexact(leaf)]

        outputs, pull = tb.vjp(inexact, *(leaf for pick, leaf in zip(picked, leaves, strict=True) if pick))
        return tuple(pull([random_like(output, seed + _COTANGENTS + i) for i, output in enumerate(outputs)]))

    return dataclasses.replace(call, fun=gradient, out_axes=0)


def name_inside(call: Call, gradients: Sequence[torch.Tensor]) -> Named:
    """What :func:`inside` gives, by the names of the inputs."""
    return dict(zip(_gradient_names(call), gradients, strict=True))


def _gradient_names(call: Call) -> list[str]:
    rows = zip(call.names, call.tensors, strict=True)
    return [f"gradient of {name}" for name, tensor in rows if is_inexact(tensor)]


def _differentiable(output: Any, like: Any) -> list[torch.Tensor]:
    """The leaves that are tensors with a derivative in what the loop returns."""
    return [leaf for leaf, its in zip(tree.leaves(output), tree.leaves(like), strict=True) if is_inexact(its)]


def _with_cotangents(output: Any, like: Any, seed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    leaves = _differentiable(output, like)
    return [(leaf, random_like(leaf, seed + _COTANGENTS + i)) for i, leaf in enumerate(leaves)]


def _put(tensors: Sequence[torch.Tensor], inexact: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The tensors with other ones in the place of those that can be differentiated."""
    remaining = iter(inexact)
    return [next(remaining) if is_inexact(tensor) else tensor for tensor in tensors]


# --- differences -----------------------------------------------------------------------------------------------------


class Slope(NamedTuple):
    """What differences say of a derivative along a direction.

    Attributes:
        slope: the derivative.
        error: how wrong it may be.
        smooth: whether the slopes on both sides come together as the step gets smaller, as at a kink they do not.
    """

    slope: float
    error: float
    smooth: bool


class Differences:
    """Differences of the loop's values in float64, around the inputs or, where these lie on a kink, close by."""

    def __init__(self, call: Call, seed: int) -> None:
        self.seed = seed
        self.call = call.widened()
        self.flat = LOOP.make(self.call)
        self.inputs = [tensor for tensor in self.call.tensors if is_inexact(tensor)]
        self.like = self.flat([copied(tensor) for tensor in self.call.tensors])
        self.narrow = [leaf.dtype for leaf in tree.leaves(self.like) if is_inexact(leaf) and leaf.dtype not in _WIDE]
        self.direction = [_along(tensor, seed + _TANGENTS + i) for i, tensor in enumerate(self.inputs)]
        self.slope = Slope(0.0, 0.0, False) if self.narrow else self._slope()
        if not self.narrow and not self.slope.smooth:
            aside = [_along(tensor, seed + _ASIDE + i) for i, tensor in enumerate(self.inputs)]
            self.inputs = self._moved(aside, 1e-3)
            self.slope = self._slope()

    def _moved(self, direction: Sequence[torch.Tensor], step: float) -> list[torch.Tensor]:
        return [x + step * u for x, u in zip(self.inputs, direction, strict=True)]

    def _projected(self, step: float) -> tuple[float, float]:
        """The output times the cotangent, and the size of what was added up."""
        output = self.flat([copied(tensor) for tensor in _put(self.call.tensors, self._moved(self.direction, step))])
        products = [(leaf * cotangent.conj()).real for leaf, cotangent in _with_cotangents(output, output, self.seed)]
        return float(sum(p.sum() for p in products)), float(sum(p.abs().sum() for p in products))

    def _slope(self, step: float = _STEP) -> Slope:
        (middle, size), *others = [self._projected(part * step) for part in (0, 1, -1, 0.5, -0.5)]
        up, down, half_up, half_down = (value for value, _ in others)
        wide, narrow = (up - down) / (2 * step), (half_up - half_down) / step
        slope = (4 * narrow - wide) / 3
        gap, half_gap = abs(up - 2 * middle + down) / step, 2 * abs(half_up - 2 * middle + half_down) / step
        noise = 64 * size * torch.finfo(torch.float64).eps / step
        smooth = math.isfinite(gap) and half_gap <= 0.75 * gap + noise + 1e-4 * abs(slope)
        return Slope(slope, 8 * abs(slope - narrow) + half_gap + noise, smooth)

    def reverse(self) -> float:
        """The same derivative by reverse mode."""
        gradients = reverse(self._here(), self.flat, self.like, self.seed).values()
        return float(sum((g.conj() * u).real.sum() for g, u in zip(gradients, self.direction, strict=True)))

    def forward(self) -> float:
        """The same derivative by forward mode."""
        tensors, flat = [copied(tensor) for tensor in self.call.tensors], loop_in_full(self.call)

        def inexact(*values: torch.Tensor) -> list[torch.Tensor]:
            return _differentiable(flat(_put(tensors, values)), self.like)

        _, tangents = tb.jvp(inexact, self.inputs, self.direction)
        return float(sum((t * c.conj()).real.sum() for t, c in _with_cotangents(tangents, tangents, self.seed)))

    def _here(self) -> Call:
        return self.call.having(_put(self.call.tensors, self.inputs))

    def compared(self, derivative: float) -> LeafDifference:
        """A derivative against the differences; against those of longer steps too, before it is called wrong."""
        leaf = self._compared(derivative, self.slope)
        if leaf.passed:
            return leaf
        slopes = [self.slope, *(self._slope(times * _STEP) for times in (4, 16))]
        spread_out = max(slope.slope for slope in slopes) - min(slope.slope for slope in slopes)
        return self._compared(derivative, self.slope._replace(error=self.slope.error + 4 * spread_out))

    def _compared(self, derivative: float, slope: Slope) -> LeafDifference:
        tolerance = Tolerance(1e-7, slope.error, "what differences in float64 can tell")
        got, expected = (torch.tensor(value, dtype=torch.float64) for value in (derivative, slope.slope))
        return compare_leaf("the derivative along one direction", got, expected, None, Rules(tolerance))


def _along(tensor: torch.Tensor, seed: int) -> torch.Tensor:
    """A direction in which every number moves by a part of its size; symmetric matrices stay symmetric."""
    size = tensor.abs()
    least = 1e-3 * size.mean() if bool(size.any()) else size.new_ones(())
    direction = random_like(tensor, seed) * torch.maximum(size, least)
    direction = torch.where(direction.isfinite(), direction, torch.zeros_like(direction))
    if tensor.ndim > 1 and tensor.shape[-1] == tensor.shape[-2] and torch.equal(tensor, tensor.mH):
        return (direction + direction.mH) / 2
    return direction
