"""How the examples' gradients spread."""

from __future__ import annotations

from typing import Any

from typing_extensions import Unpack

from torchbatch.core.describe import shown
from torchbatch.errors import AxisSpecError
from torchbatch.per_example.quantities import MeanSquares, Moments, NoiseScale
from torchbatch.per_example.transform import Options, PerExample


def variance(model: Any, criterion: Any = None, *, correction: int = 1, **options: Unpack[Options]) -> PerExample:
    """The variance of each number of the gradient over the examples.

    Shapes: a batch ``[B, …]`` and a parameter ``[*shape]`` give ``[*shape]``.

    Args:
        model, criterion, options: as for :func:`~torchbatch.per_example.gradients`.
        correction: it is divided by ``B - correction``, as in ``torch.var``.

    Returns:
        A function of a batch that gives a tree like the parameters.

    Raises:
        AxisError: there are not more examples than ``correction``; and all of :func:`~torchbatch.per_example.gradients`.

    Example:
        >>> import torch
        >>> from torchbatch import per_example
        >>> per_example.variance(lambda w, x: w @ x)(torch.zeros(2), torch.tensor([[3.0, 4.0], [1.0, 4.0]]))
        tensor([2., 0.])

    Source: chunks are put together as in Chan, Golub and LeVeque (1983).
    """
    if isinstance(correction, bool) or not isinstance(correction, int) or correction < 0:
        raise AxisSpecError(f"variance: correction must be an int that is not negative, but it is {shown(correction)}.")
    return PerExample("variance", Moments(correction), model, criterion, options)


def fisher_diag(model: Any, criterion: Any = None, **options: Unpack[Options]) -> PerExample:
    """The mean over the examples of the squares of the gradient's numbers: the diagonal of the empirical Fisher matrix.

    Shapes: a batch ``[B, …]`` and a parameter ``[*shape]`` give ``[*shape]``.

    Args:
        model, criterion, options: as for :func:`~torchbatch.per_example.gradients`. For the Fisher matrix the loss is a negative
            log-likelihood.

    Returns:
        A function of a batch that gives a tree like the parameters; of complex parameters, the squares of absolute values.

    Raises:
        AxisError: there are no examples; and all of :func:`~torchbatch.per_example.gradients`.

    Example:
        >>> import torch
        >>> from torchbatch import per_example
        >>> per_example.fisher_diag(lambda w, x: w @ x)(torch.zeros(2), torch.tensor([[3.0, 4.0], [1.0, 4.0]]))
        tensor([ 5., 16.])
    """
    return PerExample("fisher_diag", MeanSquares(), model, criterion, options)


def noise_scale(model: Any, criterion: Any = None, **options: Unpack[Options]) -> PerExample:
    """The simple gradient noise scale: up to about which batch size more examples make a step better in proportion.

    Shapes: a batch ``[B, …]`` gives ``[]``.

    It is ``tr(S) / |G|²``, where S is the covariance of the examples' gradients and G their expectation. Both are estimated from
    the batch without bias: ``tr(S) = (sum |g|² - B |m|²) / (B - 1)`` and ``|G|² = |m|² - tr(S) / B``, with m the mean. Where the
    noise is large for the batch, the second, and so the result, may be negative: take more examples.

    Args:
        model, criterion, options: as for :func:`~torchbatch.per_example.gradients`.

    Returns:
        A function of a batch that gives one number.

    Raises:
        AxisError: there are fewer than two examples; and all of :func:`~torchbatch.per_example.gradients`.

    Example:
        >>> import torch
        >>> from torchbatch import per_example
        >>> per_example.noise_scale(lambda w, x: w @ x)(torch.zeros(2), torch.tensor([[3.0, 4.0], [1.0, 4.0]]))
        tensor(0.1053)

    Source: McCandlish et al., "An empirical model of large-batch training" (2018), appendix A.
    """
    return PerExample("noise_scale", NoiseScale(), model, criterion, options)
