"""Map a function over an empty batch.

PyTorch's operators do not all take a batch of size 0: some refuse, some return another shape. So the function runs on one
made-up sample, which tells the shapes and dtypes of the results, and the results are cut to size 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from torchbatch._torch import draws
from torchbatch._torch.batching import made_up
from torchbatch.core import batch
from torchbatch.core.axes import Mapped
from torchbatch.core.outputs import OutAxes


def run(call: Callable[..., Any], mapped: Mapped, randomness: str, out: OutAxes, writes: bool) -> tuple[Any, int]:
    """``call`` mapped over values whose mapped axes have size 0; the results, and how many are new tensors.

    The axis must have no name: a collective over it would see the made-up sample. What it draws is not drawn: the generators
    are left as they were.
    """
    state = draws.GeneratorState(mapped.values) if randomness != "error" else None

    def finish(output: Any, level: int, size: int, inputs: Sequence[Any]) -> tuple[Any, int]:
        leaves, axes, rebuild = out.open(output)
        joins = [out.join(leaf, axis, level) for leaf, axis in zip(leaves, axes, strict=True)]
        taken = out.leaves(leaves, axes, level, size, output)
        results = [_emptied(leaf, how) for leaf, how in zip(taken, joins, strict=True)]
        return rebuild(results), sum(isinstance(leaf, torch.Tensor) for leaf in results)

    def attempt(integer: int) -> tuple[Any, int]:
        values = [_with_one_sample(value, axis, integer) for value, axis in zip(mapped.values, mapped.axes, strict=True)]
        return batch.run(call, values, mapped.axes, 1, None, randomness, finish, writes)

    try:
        return attempt(0)
    except RuntimeError as error:
        if "ZeroDivisionError" not in str(error):
            raise
        return attempt(1)
    finally:
        if state is not None:
            state.restore()


def _with_one_sample(value: torch.Tensor, axis: int, integer: int) -> torch.Tensor:
    sample = made_up(value.movedim(axis, 0), integer)
    return torch.cat([value, sample.unsqueeze(axis)], dim=axis)


def _emptied(leaf: Any, how: int | str) -> Any:
    """A result without its one sample: cut along its axis, or the sum of nothing."""
    if how == "once":
        return leaf
    return leaf.narrow(how, 0, 0) if isinstance(how, int) else torch.zeros_like(leaf)
