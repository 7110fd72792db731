"""Graphs whose sizes are partly open: fakes with such sizes, and whether a graph serves a call.

What the trace found out about the sizes must hold for the call. PyTorch's module for them is imported when it is needed: that
takes a third of a second, mostly for SymPy.

Private names used, seen on torch 2.11, 2.13 and 2.15: ``SymInt.node.expr``; ``torch._subclasses.fake_tensor.FakeTensorMode``;
in ``torch.fx.experimental.symbolic_shapes``: ``ShapeEnv`` with its attributes ``guards`` and ``replacements``,
``StatelessSymbolicContext``, ``DimDynamic``.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode


def _symbolic_shapes() -> Any:
    return importlib.import_module("torch.fx.experimental.symbolic_shapes")


def environment() -> Any:
    """Where what is found out about open sizes is written down."""
    return _symbolic_shapes().ShapeEnv()


def fake(mode: FakeTensorMode, value: torch.Tensor, open_axes: Sequence[int]) -> torch.Tensor:
    """A fake tensor whose sizes along some axes are left open."""
    shapes = _symbolic_shapes()
    sizes = [shapes.DimDynamic.DUCK if axis in open_axes else shapes.DimDynamic.STATIC for axis in range(value.dim())]
    return mode.from_tensor(value, symbolic_context=shapes.StatelessSymbolicContext(dynamic_sizes=sizes))


def _expression(size: Any) -> Any:
    """The formula of a size; a number where it is fixed."""
    return size.node.expr if isinstance(size, torch.SymInt) else size


class OpenSizes:
    """The sizes and strides of a graph's inputs as formulas, and the conditions under which it was traced."""

    def __init__(self, examples: Sequence[torch.Tensor], shapes: Any) -> None:
        self._shapes = [[_expression(size) for size in value.size()] for value in examples]
        self._strides = [[_expression(size) for size in value.stride()] for value in examples]
        self._guards = [guard.expr for guard in shapes.guards]
        self._fixed = dict(shapes.replacements)

    def accept(self, values: Sequence[torch.Tensor]) -> bool:
        """Whether tensors with these shapes and strides may go in."""
        sizes: dict[Any, int] = {}
        for formulas, value in zip(self._shapes, values, strict=True):
            if len(formulas) != value.dim():
                return False
            for formula, size in zip(formulas, value.shape, strict=True):
                if getattr(formula, "is_symbol", False) and sizes.setdefault(formula, size) != size:
                    return False
        if any(size < 2 for size in sizes.values()):  # sizes 0 and 1 broadcast, and are traced for themselves
            return False
        fits = all([_value(formula, sizes) for formula in formulas] == list(found) for formulas, found in self._all(values))
        return fits and self._conditions_hold(sizes)

    def _all(self, values: Sequence[torch.Tensor]) -> list[tuple[list[Any], Sequence[int]]]:
        shapes = list(zip(self._shapes, (value.shape for value in values), strict=True))
        return shapes + list(zip(self._strides, (value.stride() for value in values), strict=True))

    def _conditions_hold(self, sizes: dict[Any, int]) -> bool:
        known = {**self._fixed, **sizes}
        conditions = all(bool(_value(guard, known)) for guard in self._guards)
        fixed = [(symbol, to) for symbol, to in self._fixed.items() if symbol in sizes]
        return conditions and all(sizes[symbol] == _value(to, sizes) for symbol, to in fixed)


def _value(formula: Any, sizes: dict[Any, int]) -> Any:
    for _ in range(2):  # what takes the place of a symbol may name another one
        formula = formula if isinstance(formula, int) else formula.xreplace(sizes)
    return formula
