"""Differentially private training: Poisson batches, clipped sums with noise, and what they cost in privacy."""

from __future__ import annotations

import contextlib
import importlib
import math
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from torchbatch.core import tree
from torchbatch.core.describe import shown
from torchbatch.errors import AxisError, AxisSpecError, GradientValueError, InputTypeError
from torchbatch.per_example.batch import size_of
from torchbatch.per_example.sums import clipped_sum
from torchbatch.per_example.training import accumulate_
from torchbatch.per_example.transform import Options

# --- a step ----------------------------------------------------------------------------------------------------------


def dp_sgd_step(
    model: nn.Module,
    criterion: Any,
    optimizer: torch.optim.Optimizer,
    *,
    max_norm: Any,
    noise_multiplier: float,
    expected_batch_size: float,
    generator: torch.Generator | None = None,
    clipping: str = "flat",
    gamma: float = 0.01,
    **options: Unpack[Options],
) -> PrivateStep:
    """A function that makes one step of differentially private training with a batch.

    The gradients of the examples are clipped and added up, Gaussian noise is added to the sum, the whole is divided by the
    expected batch size and put into ``.grad``, where it takes the place of what was there; then the optimizer steps. Make the
    function once, before the loop, so that it is compiled once.

    A step is as private as :func:`epsilon` says if the batches are Poisson batches (:func:`poisson_batches`, also empty ones) of
    independent examples, and nothing else that depends on the data gets out: neither losses nor norms. The noise is
    pseudo-random and of floating-point numbers, which is right for research; it does not withstand one who can guess the seed.

    Args:
        model: the module. It must not mix the examples of a batch (BatchNorm).
        criterion: as for :func:`~torchbatch.per_example.gradients`; None if the output is the loss.
        optimizer: an optimizer of the module's parameters, and of no others.
        max_norm, clipping, gamma: as for :func:`~torchbatch.per_example.clipped_sum`.
        noise_multiplier: the standard deviation of the noise in multiples of the most that one example can change the sum, which
            is ``max_norm`` (with a tree of them, the norm of all). 0 adds none.
        expected_batch_size: what the sum is divided by: sampling rate times size of the data set. The size of the batch at hand
            would tell something.
        generator: of the noise. Its device is where the noise is drawn. Without it, PyTorch's default generator draws.
        options: as for :func:`~torchbatch.per_example.gradients`. If ``chunk_size`` is not said, batches are filled up to one
            size, somewhat above the expected one, since Poisson batches all have another size, and each size would be traced
            and compiled anew.

    Returns:
        A function of a batch that makes a step, and returns nothing. Its attribute ``clipped_sum`` is the function of a batch
        that comes before the noise, and ``std`` the standard deviation of that.

    Raises:
        AxisSpecError: an option is not as described.
        InputTypeError: ``model`` is no module, or ``optimizer`` no optimizer.
        GradientValueError: the optimizer has parameters that the model does not have.

    Example:
        >>> import torch
        >>> from torchbatch import per_example
        >>> x, y = torch.randn(100, 3), torch.randint(2, (100,))
        >>> model = torch.nn.Linear(3, 2)
        >>> step = per_example.dp_sgd_step(
        ...     model, torch.nn.functional.cross_entropy, torch.optim.SGD(model.parameters(), lr=0.1),
        ...     max_norm=1.0, noise_multiplier=1.1, expected_batch_size=20, generator=torch.Generator().manual_seed(0),
        ... )
        >>> for batch in per_example.poisson_batches((x, y), sample_rate=0.2, steps=10):
        ...     step(*batch)

    Source: Abadi et al., "Deep learning with differential privacy" (2016).
    """
    if not isinstance(model, nn.Module):
        raise InputTypeError(f"dp_sgd_step: model must be a torch.nn.Module, but it is {shown(model)}.")
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise InputTypeError(f"dp_sgd_step: optimizer must be a torch.optim.Optimizer, but it is {shown(optimizer)}.")
    _check_number("dp_sgd_step", "noise_multiplier", noise_multiplier, 0 <= _value(noise_multiplier) < math.inf, "0 or above")
    _check_number("dp_sgd_step", "expected_batch_size", expected_batch_size, _value(expected_batch_size) > 0, "above 0")
    if not (generator is None or isinstance(generator, torch.Generator)):
        raise AxisSpecError(f"dp_sgd_step: generator must be a torch.Generator, but it is {shown(generator)}.")
    if "chunk_size" not in options:
        options["chunk_size"] = _room(expected_batch_size)
    found = clipped_sum(model, criterion, max_norm=max_norm, clipping=clipping, gamma=gamma, **options)
    std = noise_multiplier * _sensitivity(max_norm)
    return PrivateStep(model, optimizer, found, std, expected_batch_size, generator)


def _value(number: Any) -> float:
    return float(number) if isinstance(number, int | float) and not isinstance(number, bool) else math.nan


def _check_number(who: str, name: str, number: Any, is_right: bool, wanted: str) -> None:
    if not is_right:
        raise AxisSpecError(f"{who}: {name} must be a number {wanted}, but it is {shown(number)}.")


def _room(expected: float) -> int:
    """A size that a Poisson batch exceeds once in some hundred steps."""
    return math.ceil(expected + 2.5 * math.sqrt(expected))


def _sensitivity(max_norm: Any) -> float:
    """The most by which one example changes a clipped sum."""
    bounds = [bound.item() if isinstance(bound, Tensor) and not bound.dim() else bound for bound in tree.flatten(max_norm)[0]]
    is_right = all(0 < _value(bound) < math.inf for bound in bounds)
    _check_number("dp_sgd_step", "max_norm", max_norm, is_right, "above 0, or a tree of such numbers")
    return math.sqrt(sum(bound**2 for bound in bounds))


class PrivateStep:
    """The function that :func:`dp_sgd_step` returns.

    Attributes:
        clipped_sum: what is computed of a batch before the noise; a result of :func:`~torchbatch.per_example.clipped_sum`. What
            it gives is not private.
        std: the standard deviation of the noise that is added to it.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        clipped_sum: Any,
        std: float,
        expected_batch_size: float,
        generator: torch.Generator | None,
    ) -> None:
        self.clipped_sum, self.std = clipped_sum, std
        self._model, self._optimizer, self._generator = model, optimizer, generator
        self._expected_batch_size = expected_batch_size
        self._check_optimizer()

    def __call__(self, /, *batch: Any) -> None:
        """Make a step."""
        self._check_optimizer()
        noisy = {name: self._noisy(value) for name, value in self.clipped_sum(*batch).items()}
        for parameter in self._model.parameters():
            parameter.grad = None
        accumulate_(self._model, noisy, scale=1 / self._expected_batch_size)
        self._optimizer.step()

    def _noisy(self, value: Tensor) -> Tensor:
        """The sum with noise, which is drawn in at least single precision."""
        if not self.std:
            return value
        real = torch.view_as_real(value) if value.is_complex() else value
        dtype = torch.promote_types(real.dtype, torch.float32)
        device = real.device if self._generator is None else self._generator.device
        noise = torch.randn(real.shape, generator=self._generator, dtype=dtype, device=device).to(real.device)
        noisy = (real.to(dtype) + self.std * noise).to(real.dtype)
        return torch.view_as_complex(noisy) if value.is_complex() else noisy

    def _check_optimizer(self) -> None:
        mine = {id(parameter) for parameter in self._model.parameters()}
        for i, group in enumerate(self._optimizer.param_groups):
            for parameter in group["params"]:
                if id(parameter) not in mine:
                    raise GradientValueError(
                        f"dp_sgd_step: the optimizer has a parameter of shape {tuple(parameter.shape)} (group {i}) that "
                        f"{type(self._model).__name__} does not have, so what it learns would not be private. Give the optimizer "
                        f"the parameters of this model, and no others."
                    )


# --- batches ---------------------------------------------------------------------------------------------------------


def poisson_batches(
    data: int | Tensor | tuple[Any, ...] | Mapping[str, Any],
    *,
    sample_rate: float,
    steps: int,
    generator: torch.Generator | None = None,
) -> PoissonBatches:
    """Batches in which each example is with a probability of its own, so that their sizes vary, down to none.

    This is the sampling that the accounting of :func:`epsilon` presumes. Each pass over what is returned draws anew.

    Args:
        data: the tensors of a data set, with the examples along the first axis: one, a tuple or a dict of them. Or how many
            examples there are, for batches of their numbers, as the ``batch_sampler`` of a DataLoader takes them (which needs a
            ``collate_fn`` that can do with an empty list).
        sample_rate: the probability, above 0 and at most 1.
        steps: how many batches there are.
        generator: what draws; its device does not matter. Without it, PyTorch's default generator draws.

    Returns:
        An iterable of ``steps`` batches: like ``data``, or tensors of numbers in rising order.

    Raises:
        AxisSpecError: an option is not as described.
        AxisError: the tensors have not as many examples each.
        InputTypeError: ``data`` is none of these.

    Example:
        >>> import torch
        >>> from torchbatch import per_example
        >>> batches = per_example.poisson_batches(6, sample_rate=0.3, steps=4, generator=torch.Generator().manual_seed(0))
        >>> [batch.tolist() for batch in batches]
        [[], [0, 3, 5], [5], [2, 4]]
        >>> x, y = torch.randn(6, 2), torch.arange(6)
        >>> [len(y) for x, y in per_example.poisson_batches((x, y), sample_rate=1.0, steps=2)]
        [6, 6]
    """
    _check_number("poisson_batches", "sample_rate", sample_rate, 0 < _value(sample_rate) <= 1, "above 0 and at most 1")
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
        raise AxisSpecError(f"poisson_batches: steps must be an int, 0 or above, but it is {shown(steps)}.")
    if isinstance(data, bool) or not isinstance(data, int | Tensor | tuple | list | Mapping):
        raise InputTypeError(
            f"poisson_batches: data must be a tensor, a tuple or a dict of tensors, or how many examples there are, but it is "
            f"{shown(data)}."
        )
    if isinstance(data, int) and data < 0:
        raise AxisError(f"poisson_batches: there cannot be {data} examples.")
    return PoissonBatches(data, float(sample_rate), steps, generator)


class PoissonBatches:
    """What :func:`poisson_batches` returns."""

    def __init__(self, data: Any, sample_rate: float, steps: int, generator: torch.Generator | None) -> None:
        self._data, self.sample_rate, self.steps, self._generator = data, sample_rate, steps, generator
        self._size = data if isinstance(data, int) else size_of(data, "poisson_batches")

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[Any]:
        device = "cpu" if self._generator is None else self._generator.device
        for _ in range(self.steps):
            drawn = torch.rand(self._size, generator=self._generator, dtype=torch.float64, device=device)
            yield self._at((drawn < self.sample_rate).nonzero()[:, 0])

    def _at(self, numbers: Tensor) -> Any:
        if isinstance(self._data, int):
            return numbers
        return tree.map_leaves(lambda leaf: leaf[numbers.to(leaf.device)], self._data)


# --- accounting ------------------------------------------------------------------------------------------------------


def epsilon(
    *, noise_multiplier: float, sample_rate: float, steps: int, delta: float, accountant: Literal["prv", "rdp"] = "prv"
) -> float:
    """The ε of (ε, δ)-differential privacy after some steps of :func:`dp_sgd_step`, computed by Opacus.

    Two data sets count as neighbours if one has an example more than the other.

    Args:
        noise_multiplier: as for :func:`dp_sgd_step`; above 0.
        sample_rate: the probability with which an example is in a batch, as for :func:`poisson_batches`.
        steps: how many steps there are.
        delta: δ, the probability with which ε may not hold; well below 1 by the size of the data set.
        accountant: ``"prv"`` adds up privacy losses numerically, with an error of about 0.01, which is added; ``"rdp"`` bounds
            Rényi divergences, which takes no time and gives a greater ε.

    Returns:
        ε, rather too large than too small.

    Raises:
        AxisSpecError: an argument is not as described.
        ImportError: Opacus is not installed.

    Example:
        >>> from torchbatch import per_example
        >>> round(per_example.epsilon(noise_multiplier=1.1, sample_rate=256 / 60000, steps=14040, delta=1e-5), 2)
        2.39

    Source: Gopi et al., "Numerical composition of differential privacy" (2021); Mironov et al., "Rényi differential privacy of
    the sampled Gaussian mechanism" (2019).
    """
    _check_number("epsilon", "noise_multiplier", noise_multiplier, 0 < _value(noise_multiplier) < math.inf, "above 0")
    _check_plan("epsilon", sample_rate, steps, delta, accountant)
    if not steps:
        return 0.0
    made = _opacus("epsilon").create_accountant(accountant)
    made.history = [(noise_multiplier, sample_rate, steps)]
    with _hushed():
        return float(made.get_epsilon(delta=delta))


def noise_multiplier_for(
    *, target_epsilon: float, sample_rate: float, steps: int, delta: float, accountant: Literal["prv", "rdp"] = "prv"
) -> float:
    """The least noise with which some steps of :func:`dp_sgd_step` are (ε, δ)-differentially private.

    Args:
        target_epsilon: ε; a number above 0.
        sample_rate, steps, delta, accountant: as for :func:`epsilon`.

    Returns:
        The noise multiplier, with which ε is at most the one asked for, and less than it by at most a hundredth.

    Raises:
        AxisSpecError: an argument is not as described, or no noise is enough.
        ImportError: Opacus is not installed.

    Example:
        >>> from torchbatch import per_example
        >>> noise = per_example.noise_multiplier_for(target_epsilon=2.0, sample_rate=0.1, steps=100, delta=1e-5, accountant="rdp")
        >>> per_example.epsilon(noise_multiplier=noise, sample_rate=0.1, steps=100, delta=1e-5, accountant="rdp") <= 2.0
        True
    """
    _check_number("noise_multiplier_for", "target_epsilon", target_epsilon, 0 < _value(target_epsilon) < math.inf, "above 0")
    _check_plan("noise_multiplier_for", sample_rate, steps, delta, accountant, fewest=1)
    tolerance = min(0.01, target_epsilon / 100)
    try:
        with _hushed():
            found = _opacus("noise_multiplier_for").utils.get_noise_multiplier(
                target_epsilon=target_epsilon,
                target_delta=delta,
                sample_rate=sample_rate,
                steps=steps,
                accountant=accountant,
                epsilon_tolerance=tolerance,
            )
    except ValueError as error:
        raise AxisSpecError(f"noise_multiplier_for: no noise makes {steps} steps as private as ε = {target_epsilon}.") from error
    return float(found)


def _check_plan(who: str, sample_rate: Any, steps: Any, delta: Any, accountant: Any, fewest: int = 0) -> None:
    _check_number(who, "sample_rate", sample_rate, 0 < _value(sample_rate) <= 1, "above 0 and at most 1")
    _check_number(who, "delta", delta, 0 < _value(delta) < 1, "between 0 and 1")
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < fewest:
        raise AxisSpecError(f"{who}: steps must be an int, {fewest} or above, but it is {shown(steps)}.")
    if accountant not in ("prv", "rdp"):
        raise AxisSpecError(f'{who}: accountant must be "prv" or "rdp", but it is {shown(accountant)}.')


def _opacus(who: str) -> Any:
    """Opacus's accountants, which take seconds to import."""
    try:
        importlib.import_module("opacus.accountants.utils")
        return importlib.import_module("opacus.accountants")
    except ImportError as error:
        raise ImportError(
            f"per_example.{who} computes with Opacus, which is not installed: pip install 'torchbatch[privacy]'."
        ) from error


@contextlib.contextmanager
def _hushed() -> Iterator[None]:
    """Without warnings that say nothing to the caller."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "divide by zero", RuntimeWarning)  # in a branch that is not taken
        warnings.filterwarnings("ignore", "Optimal order is the", UserWarning)  # the bound holds all the same
        yield
