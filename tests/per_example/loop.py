"""The yardstick: one call of the model and one ``autograd.grad`` per example, and every quantity by its definition."""

from __future__ import annotations

from typing import Any

import torch

from tests.per_example.models import Case


def gradients(case: Case) -> dict[str, torch.Tensor]:
    """The gradients one by one, stacked."""
    named = {name: value for name, value in case.model.named_parameters() if value.requires_grad}
    adapter = case.options.get("adapter")
    inputs, targets = adapter(*case.batch) if adapter else _split(case)
    count = len(next(iter(inputs.values())) if isinstance(inputs, dict) else inputs[0])
    rows: dict[str, list[torch.Tensor]] = {name: [] for name in named}
    for i in range(count):
        loss = _loss(case, _at(inputs, i), _at(targets, i))
        found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
        for (name, value), one in zip(named.items(), found, strict=True):
            rows[name].append(torch.zeros_like(value) if one is None else one.to_dense().detach())
    return {name: torch.stack(values) for name, values in rows.items()}


def _split(case: Case) -> tuple[Any, Any]:
    targets = case.options.get("targets", 1) if case.criterion is not None else 0
    return case.batch[: len(case.batch) - targets], case.batch[len(case.batch) - targets :]


def _at(values: Any, i: int) -> Any:
    if isinstance(values, dict):
        return {key: value[i : i + 1] for key, value in values.items()}
    return tuple(value[i : i + 1] for value in (values if isinstance(values, tuple) else (values,)))


def _loss(case: Case, inputs: Any, targets: Any) -> torch.Tensor:
    output = case.model(**inputs) if isinstance(inputs, dict) else case.model(*inputs)
    if case.criterion is not None:
        return case.criterion(output, *targets).reshape(())
    return getattr(output, "loss", output).reshape(())


def flat(found: dict[str, torch.Tensor]) -> torch.Tensor:
    """``[B, numbers]``; complex numbers count as themselves."""
    return torch.cat([value.reshape(len(value), value[0].numel()) for value in found.values()], 1)
