"""Sums and means over the examples, as they are and clipped."""

from __future__ import annotations

from typing import Any

from typing_extensions import Unpack

from torchbatch.per_example.quantities import Clip, Sums
from torchbatch.per_example.transform import Options, PerExample


def sum(model: Any, criterion: Any = None, **options: Unpack[Options]) -> PerExample:
    """The sum of the examples' gradients.

    Shapes: a batch ``[B, …]`` and a parameter ``[*shape]`` give ``[*shape]``.

    Args:
        model, criterion, options: as for :func:`~torchbatch.per_example.gradients`.

    Returns:
        A function of a batch that gives a tree like the parameters. A batch without examples gives zeros.

    Raises:
        TorchbatchError: as :func:`~torchbatch.per_example.gradients` does.

    Example:
        >>> import torch
        >>> from torchbatch import per_example
        >>> per_example.sum(lambda w, x: w @ x)(torch.zeros(2), torch.tensor([[3.0, 4.0], [0.0, 1.0]]))
        tensor([3., 5.])
    """
    return PerExample("sum", Sums("sum", None, False), model, criterion, options)


def mean(model: Any, criterion: Any = None, **options: Unpack[Options]) -> PerExample:
    """The mean of the examples' gradients.

    Shapes: a batch ``[B, …]`` and a parameter ``[*shape]`` give ``[*shape]``.

    Args:
        model, criterion, options: as for :func:`~torchbatch.per_example.gradients`.

    Returns:
        A function of a batch that gives a tree like the parameters.

    Raises:
        AxisError: there are no examples; and all of :func:`~torchbatch.per_example.gradients`.

    Example:
        >>> import torch
        >>> from torchbatch import per_example
        >>> per_example.mean(lambda w, x: w @ x)(torch.zeros(2), torch.tensor([[3.0, 4.0], [0.0, 1.0]]))
        tensor([1.5000, 2.5000])
    """
    return PerExample("mean", Sums("mean", None, True), model, criterion, options)


def clipped_sum(
    model: Any,
    criterion: Any = None,
    *,
    max_norm: Any = 1.0,
    clipping: str = "flat",
    gamma: float = 0.01,
    **options: Unpack[Options],
) -> PerExample:
    """The sum of the examples' gradients, each made shorter where it is too long.

    Shapes: a batch ``[B, …]`` and a parameter ``[*shape]`` give ``[*shape]``.

    Args:
        model, criterion, options: as for :func:`~torchbatch.per_example.gradients`.
        max_norm: the largest norm C: a number above 0. With ``clipping="per_parameter"`` also such a number for each parameter,
            in a tree like the parameters, and with ``"per_layer"`` a dict of such numbers by layer; one number C then stands for
            ``C / sqrt(k)`` for each of k parameters or layers, so that the whole is at most C long.
        clipping: ``"flat"`` multiplies a gradient g by ``min(1, C / |g|)``; ``"per_layer"`` does so to the part of each layer
            (the parameters that are directly in one module) by itself, ``"per_parameter"`` to the part of each parameter;
            ``"automatic"`` multiplies by ``C / (|g| + gamma)``, so that all examples count about the same.
        gamma: of ``"automatic"``; a number above 0.

    Returns:
        A function of a batch that gives a tree like the parameters. A batch without examples gives zeros.

    Raises:
        AxisSpecError: an option is not as described; and all of :func:`~torchbatch.per_example.gradients`.

    Example:
        >>> import torch
        >>> from torchbatch import per_example
        >>> clipped = per_example.clipped_sum(lambda w, x: w @ x, max_norm=2.5)
        >>> clipped(torch.zeros(2), torch.tensor([[3.0, 4.0], [0.0, 1.0]]))
        tensor([1.5000, 3.0000])

    Source: Abadi et al., "Deep learning with differential privacy" (2016); for ``"automatic"``, Bu et al., "Automatic clipping"
    (2023), where gamma is 0.01.
    """
    clip = Clip("clipped_sum", max_norm, clipping, gamma)
    return PerExample("clipped_sum", Sums("clipped_sum", clip, False), model, criterion, options)


def clipped_mean(
    model: Any,
    criterion: Any = None,
    *,
    max_norm: Any = 1.0,
    clipping: str = "flat",
    gamma: float = 0.01,
    **options: Unpack[Options],
) -> PerExample:
    """The mean of the examples' gradients, each made shorter where it is too long.

    Shapes: a batch ``[B, …]`` and a parameter ``[*shape]`` give ``[*shape]``.

    Args:
        model, criterion, options: as for :func:`~torchbatch.per_example.gradients`.
        max_norm, clipping, gamma: as for :func:`clipped_sum`.

    Returns:
        A function of a batch that gives a tree like the parameters.

    Raises:
        AxisError: there are no examples; and all of :func:`clipped_sum`.

    Example:
        >>> import torch
        >>> from torchbatch import per_example
        >>> clipped = per_example.clipped_mean(lambda w, x: w @ x, max_norm=2.5)
        >>> clipped(torch.zeros(2), torch.tensor([[3.0, 4.0], [0.0, 1.0]]))
        tensor([0.7500, 1.5000])
    """
    clip = Clip("clipped_mean", max_norm, clipping, gamma)
    return PerExample("clipped_mean", Sums("clipped_mean", clip, True), model, criterion, options)
