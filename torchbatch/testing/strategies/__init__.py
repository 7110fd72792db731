"""Hypothesis strategies for arrays, trees, axes, whole calls of ``vmap``, and random programs.

They shrink to what is easy to read: short programs, few small axes, whole numbers, contiguous memory, axis 0. See
:func:`reproduced` for a failing case as a program of its own.
"""

try:
    import hypothesis as _hypothesis
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "torchbatch.testing.strategies needs hypothesis: pip install hypothesis.", name="hypothesis"
    ) from error

from torchbatch.testing.strategies.arrays import LAYOUTS, arrays, dtypes, shapes, tensors
from torchbatch.testing.strategies.axes import axes_for, out_axes_for
from torchbatch.testing.strategies.calls import BatchedCall, batched_calls, reproduced
from torchbatch.testing.strategies.programs import Function, Program, programs
from torchbatch.testing.strategies.trees import NODES, Pair, Record, pytrees, register_with_jax

del _hypothesis

__all__ = [
    "LAYOUTS",
    "NODES",
    "BatchedCall",
    "Function",
    "Pair",
    "Program",
    "Record",
    "arrays",
    "axes_for",
    "batched_calls",
    "dtypes",
    "out_axes_for",
    "programs",
    "pytrees",
    "register_with_jax",
    "reproduced",
    "shapes",
    "tensors",
]
