"""Inner products of the examples' gradients: with directions, and with each other."""

from __future__ import annotations

from typing import Any

import torch
from typing_extensions import Unpack

from torchbatch.per_example import draws
from torchbatch.per_example.batch import Params, size_of
from torchbatch.per_example.quantities import Along, Inner, Projected
from torchbatch.per_example.transform import Chunk, Options, PerExample


def dot(model: Any, criterion: Any = None, *, v: Any, **options: Unpack[Options]) -> PerExample:
    """The inner product of each example's gradient with one direction, by one pass in forward mode.

    Where a backward pass does not compute a derivative, and forward mode does (``torch.no_grad`` inside of the model, hooks of
    modules, functions with a backward of their own, ``padding_idx`` of embeddings), it is the product with the gradients instead;
    ``explain`` tells.

    Shapes: a batch ``[B, …]`` and a direction with the shapes of the parameters give ``[B]``.

    Args:
        model, criterion, options: as for :func:`~torchbatch.per_example.gradients`.
        v: a tree like the parameters; for a module, a dict by name.

    Returns:
        A function of a batch.

    Raises:
        GradientValueError: ``v`` is not like the parameters; and all of :func:`~torchbatch.per_example.gradients`.

    Example:
        >>> import torch
        >>> from torchbatch import per_example
        >>> along = per_example.dot(lambda w, x: w @ x, v=torch.tensor([1.0, -1.0]))
        >>> along(torch.zeros(2), torch.tensor([[3.0, 4.0], [1.0, 0.0]]))
        tensor([-1.,  1.])

    Source: with the gradient of another loss as ``v``, the influence of TracIn (Pruthi et al., 2020).
    """
    return PerExample("dot", Along("dot", v, False), model, criterion, options)


def cosine(model: Any, criterion: Any = None, *, v: Any, **options: Unpack[Options]) -> PerExample:
    """The cosine between each example's gradient and one direction.

    Shapes: a batch ``[B, …]`` and a direction with the shapes of the parameters give ``[B]``.

    Args:
        model, criterion, options: as for :func:`~torchbatch.per_example.gradients`.
        v: a tree like the parameters; for a module, a dict by name.

    Returns:
        A function of a batch. Where a gradient, or ``v``, is zero, the cosine is NaN.

    Raises:
        GradientValueError: ``v`` is not like the parameters; and all of :func:`~torchbatch.per_example.gradients`.

    Example:
        >>> import torch
        >>> from torchbatch import per_example
        >>> along = per_example.cosine(lambda w, x: w @ x, v=torch.tensor([2.0, 0.0]))
        >>> along(torch.zeros(2), torch.tensor([[3.0, 4.0], [1.0, 0.0]]))
        tensor([0.6000, 1.0000])
    """
    return PerExample("cosine", Along("cosine", v, True), model, criterion, options)


def project(
    model: Any, criterion: Any = None, *, matrix: Any = None, key: Any = None, size: int | None = None, **options: Unpack[Options]
) -> PerExample:
    """The inner products of each example's gradient with several directions.

    Shapes: a batch ``[B, …]`` and k directions, ``[k, *shape]`` for each parameter, give ``[B, k]``.

    Args:
        model, criterion, options: as for :func:`~torchbatch.per_example.gradients`.
        matrix: a tree like the parameters, with one more axis in front: that of the directions.
        key: a key of :mod:`torchbatch.random`, in the place of ``matrix``. The directions are then drawn from a normal
            distribution with variance ``1 / size``, so that lengths and inner products are kept on average.
        size: with ``key``, how many directions there are.

    Returns:
        A function of a batch.

    Raises:
        GradientValueError: ``matrix`` is not like the parameters.
        AxisSpecError: not one of ``matrix`` and ``key``; and all of :func:`~torchbatch.per_example.gradients`.

    Example:
        >>> import torch
        >>> from torchbatch import per_example, random
        >>> x = torch.tensor([[3.0, 4.0], [1.0, 0.0]])
        >>> per_example.project(lambda w, x: w @ x, matrix=torch.eye(2).repeat(2, 1))(torch.zeros(2), x)
        tensor([[3., 4., 3., 4.],
                [1., 0., 1., 0.]])
        >>> per_example.project(lambda w, x: w @ x, key=random.key(0), size=3)(torch.zeros(2), x).shape
        torch.Size([2, 3])

    Source: Johnson and Lindenstrauss (1984); for gradients, TRAK (Park et al., 2023).
    """
    return PerExample("project", Projected(matrix, key, size), model, criterion, options)


def gram(model: Any, criterion: Any = None, *, other: Any = None, **options: Unpack[Options]) -> PerExample:
    """The inner products of the gradients of two batches: the Gram matrix, or the empirical neural tangent kernel.

    Shapes: a batch ``[B, …]`` and another one ``[C, …]`` give ``[B, C]``.

    Args:
        model, criterion, options: as for :func:`~torchbatch.per_example.gradients`. For the tangent kernel, the loss is an output
            of the network.
        other: the other batch, a tuple of what the call takes (without the parameters of a function); without it, the batch is
            its own other one, and the result is symmetric.

    Returns:
        A function of a batch.

    Raises:
        TorchbatchError: as :func:`~torchbatch.per_example.gradients` does, also for ``other``.

    Example:
        >>> import torch
        >>> from torchbatch import per_example
        >>> x = torch.tensor([[3.0, 4.0], [1.0, 0.0]])
        >>> per_example.gram(lambda w, x: w @ x)(torch.zeros(2), x)
        tensor([[25.,  3.],
                [ 3.,  1.]])
        >>> per_example.gram(lambda w, x: w @ x, other=(x[:1],))(torch.zeros(2), x)
        tensor([[25.],
                [ 3.]])

    Source: Jacot et al., "Neural tangent kernel" (2018).
    """
    return Gram(other, model, criterion, options)


class Gram(PerExample):
    """The function that :func:`gram` returns."""

    def __init__(self, other: Any, model: Any, criterion: Any, options: Options) -> None:
        self._inner, self._other = Inner(), other if other is None or isinstance(other, tuple) else (other,)
        super().__init__("gram", self._inner, model, criterion, options)
        self._made_of = other, model, criterion, options

    def _others(self, batch: Any) -> tuple[Any, int]:
        others = batch if self._other is None else self._loss.batch(self._other, self._who)
        return others, size_of(others, self._who)

    def _bytes(self, params: Params, batch: Any, count: int) -> int:
        keys = torch.zeros(count, 2, dtype=torch.int32, device=params.leaves[0].device)
        self._inner.other = Chunk.of(batch, 0, count, count, params).values, keys
        return super()._bytes(params, batch, count)

    def _over_chunks(self, params: Params, batch: Any, count: int, words: torch.Tensor) -> Any:
        others, size = self._others(batch)
        step = self._size(params, others, size)
        columns, drew = [], False
        for start in range(0, max(size, 1), step):
            chunk = Chunk.of(others, start, min(step, size - start), step, params)
            self._inner.other = chunk.values, draws.keys(words, start, step).to(params.leaves[0].device)
            (each, _), drew_here = super()._over_chunks(params, batch, count, words)
            columns.append(each[0][:, : chunk.length])
            drew = drew or drew_here
        return ([torch.cat(columns, 1)], []), drew

    def _inside(self, params: Params, batch: Any, count: int) -> Any:
        others, size = self._others(batch)
        self._inner.other = others, torch.zeros(size, 2, dtype=torch.int32, device=params.leaves[0].device)
        return super()._inside(params, batch, count)
