"""``gradients`` and ``norms``: what there is for each example."""

from __future__ import annotations

from typing import Any

from typing_extensions import Unpack

from torchbatch.per_example.quantities import Norms, Whole
from torchbatch.per_example.transform import Options, PerExample


def gradients(model: Any, criterion: Any = None, **options: Unpack[Options]) -> PerExample:
    """The gradient of each example's loss by the parameters.

    Shapes: a batch ``[B, …]`` and a parameter ``[*shape]`` give ``[B, *shape]``.

    There are two forms, which all functions of this module have:

    - ``gradients(loss)(params, *batch)`` for a function ``loss(params, *example)`` of a tree of parameters and of one example.
    - ``gradients(model, criterion)(*inputs, *targets)`` for a module. The module is called on a batch of one, and
      ``criterion(output, *targets)`` is its loss. Nothing is wrapped: the module, its state dict and its optimizer stay as they
      are. Frozen parameters are left out; one that has several names is there once, under the first.

    Args:
        model: the function, or the module.
        criterion: a function of the module's output and the targets, each for a batch of one, that returns one number; without
            it, the output is the loss, or has it as its attribute ``loss``. Any loss of PyTorch will do, as it is.
        options: all functions of this module take them.

            - ``targets``: how many of the last arguments of a call go to the criterion; the others go to the module. One, if it
              is not said.
            - ``adapter``: a function that makes ``(inputs, targets)`` of the arguments of a call, as a data loader gives them.
              Inputs are a tensor, a tuple, or a dict of keyword arguments; targets are a tensor, a tuple or None.
            - ``batch_norm``: layers that take statistics over the batch (BatchNorm in training mode) are refused, unless it is
              ``"per_example"``: then each example is normalised by the mean and the variance of its own places, as the module
              does with a batch of one. Running statistics are neither read nor written. Other ways out are eval mode, and
              :func:`~torchbatch.per_example.replace_batch_norm`.
            - ``chunk_size``: how many examples are worked on at a time; all, if it is None; ``"auto"`` finds out
              how many fit into the memory, and shows a progress bar where it takes long. If memory runs out all the same, it
              is tried again with half as many. What is added up is added up chunk by chunk.
            - ``memory``: with ``chunk_size="auto"``, the bytes that may be filled; if it is not said, a part of what is free.
            - ``compile``: whether the computation is compiled, by :func:`~torchbatch.jit`; ``"auto"``, which is the default,
              compiles when a kind of call comes for the second time. In any case the loss is traced, and traced again where a
              Python value that it depends on is not what it was.

    Returns:
        A function of a batch. It gives a tree like the parameters (for a module a dict by name), whose tensors have one more axis
        in front, and no history. Its method ``explain`` says how each parameter is gone about. Gradients by complex parameters
        are PyTorch's, as optimizers take them. Hooks of parameters are not called; those of modules are.

        On the CPU, memory of large gradients is used again at the next call, if nobody holds the last result.

        Where the model draws random numbers (dropout), each example draws its own. ``torch.manual_seed`` decides them, and the
        chunk size has no influence.

    Raises:
        InputTypeError: neither a function nor a module, or a batch with something else than tensors.
        AxisError: the tensors of a batch have not as many examples each, or a module mixes the examples of a batch (BatchNorm).
        GradientTypeError: the loss is not one number, or a parameter has no gradient.
        AxisSpecError: an option has the wrong type or spelling.

    Example:
        >>> import torch
        >>> from torchbatch import per_example
        >>> model = torch.nn.Linear(3, 2)
        >>> x, y = torch.ones(5, 3), torch.tensor([0, 1, 1, 0, 1])
        >>> found = per_example.gradients(model, torch.nn.functional.cross_entropy)(x, y)
        >>> {name: tuple(value.shape) for name, value in found.items()}
        {'weight': (5, 2, 3), 'bias': (5, 2)}

        >>> def loss(params, x, y):
        ...     return (params["w"] @ x - y) ** 2
        >>> per_example.gradients(loss)({"w": torch.ones(2)}, torch.eye(2), torch.zeros(2))
        {'w': tensor([[2., 0.],
                [0., 2.]])}

    Source: ``jax.vmap(jax.grad(loss), in_axes=(None, 0))``, and the ``grad_sample`` of Opacus.
    """
    return PerExample("gradients", Whole(), model, criterion, options)


def norms(model: Any, criterion: Any = None, *, per: str | None = None, **options: Unpack[Options]) -> PerExample:
    """The norm of each example's gradient, without the gradients where there is a way.

    Shapes: a batch ``[B, …]`` gives ``[B]``.

    Args:
        model, criterion, options: as for :func:`gradients`.
        per: None for the norm over all parameters; ``"parameter"`` for one for each, in a tree like the parameters; ``"layer"``
            for one for each module, by name.

    Returns:
        A function of a batch.

    Raises:
        AxisSpecError: ``per`` is none of these; and all of :func:`gradients`.

    Example:
        >>> import torch
        >>> from torchbatch import per_example
        >>> def loss(w, x):
        ...     return w @ x
        >>> per_example.norms(loss)(torch.zeros(2), torch.tensor([[3.0, 4.0], [0.0, 1.0]]))
        tensor([5., 1.])

    Source: for a product of matrices, Goodfellow, "Efficient per-example gradient computations" (2015), and Li et al., "Large
    language models can be strong differentially private learners" (2022).
    """
    return PerExample("norms", Norms(per), model, criterion, options)
