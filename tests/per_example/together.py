"""Several quantities from one trace, since to trace a model takes most of the time of a test."""

from __future__ import annotations

from typing import Any

import torch

from tests.per_example import loop
from tests.per_example.models import Case
from torchbatch import random, testing
from torchbatch.per_example.batch import Batch
from torchbatch.per_example.quantities import Clip, MeanSquares, Moments, NoiseScale, Norms, Projected, Sums, Whole
from torchbatch.per_example.transform import Found, PerExample, Quantity

DIRECTIONS = 3


class _Gram(Quantity):
    def of(self, batch: Batch, extra: list[torch.Tensor]) -> Found:
        return [sum(mine.against(mine) for mine in batch.gradients())], []

    def finish(self, each: Any, total: Any, params: Any, count: int) -> Any:
        return each[0]


def quantities(max_norm: float) -> dict[str, Quantity]:
    """All that are computed from gradients."""
    clips = {kind: Sums("", Clip("", max_norm, kind, 0.01), False) for kind in ("flat", "per_parameter", "automatic")}
    return {
        "gradients": Whole(), "norms": Norms(None), "norms per parameter": Norms("parameter"), "sum": Sums("", None, False),
        **clips, "fisher_diag": MeanSquares(), "variance": Moments(1), "noise_scale": NoiseScale(), "gram": _Gram(),
        "project": Projected(None, random.key(3), DIRECTIONS),
    }  # fmt: skip


class Together(Quantity):
    """Several quantities of the same gradients."""

    def __init__(self, parts: dict[str, Quantity]) -> None:
        self._parts = parts
        self._extra: dict[str, slice] = {}
        self._sizes: dict[str, tuple[int, int]] = {}

    def extra(self, params: Any) -> list[torch.Tensor]:
        found: list[torch.Tensor] = []
        for name, part in self._parts.items():
            new = part.extra(params)
            self._extra[name] = slice(len(found), len(found) + len(new))
            found += new
        return found

    def of(self, batch: Batch, extra: list[torch.Tensor]) -> Found:
        gradients = batch.gradients()
        batch.gradients = lambda: gradients
        each: list[torch.Tensor] = []
        total: list[torch.Tensor] = []
        for name, part in self._parts.items():
            rows, sums = part.of(batch, extra[self._extra[name]])
            self._sizes[name] = len(rows), len(sums)
            each += rows
            total += sums
        return each, total

    def _split(self, each: Any, total: Any) -> Any:
        each, total = iter(each), iter(total)
        for name, (rows, sums) in self._sizes.items():
            yield name, [next(each) for _ in range(rows)], [next(total) for _ in range(sums)]

    def add(self, total: Any, new: Any) -> Any:
        rows = [None] * sum(rows for rows, _ in self._sizes.values())
        pairs = zip(self._split(rows, total), self._split(rows, new), strict=True)
        return [value for (name, _, a), (_, _, b) in pairs for value in self._parts[name].add(a, b)]

    def finish(self, each: Any, total: Any, params: Any, count: int) -> Any:
        return {name: self._parts[name].finish(rows, sums, params, count) for name, rows, sums in self._split(each, total)}


def together(case: Case, parts: dict[str, Quantity], **options: Any) -> tuple[dict[str, Any], dict[str, str]]:
    """The quantities by name, and what ``explain`` would say, by parameter."""
    run = PerExample("together", Together(parts), case.model, case.criterion, {**case.options, **options})
    found = run(*case.batch)
    names = sorted(name for name, value in case.model.named_parameters() if value.requires_grad)
    return found, dict(zip(names, run._told, strict=True))


def by_definition(gradients: dict[str, torch.Tensor], max_norm: float) -> dict[str, Any]:
    """The same quantities, from the gradients themselves."""
    wide = {name: value.to(torch.promote_types(value.dtype, torch.float32)) for name, value in gradients.items()}
    flat = loop.flat(wide)
    norms = torch.linalg.vector_norm(flat, dim=1)
    by_parameter = {name: torch.linalg.vector_norm(value.reshape(len(value), -1), dim=1) for name, value in wide.items()}
    count, mean = len(flat), flat.mean(0)
    trace = (flat - mean).abs().square().sum() / max(count - 1, 1)
    share = max_norm / len(wide) ** 0.5
    return {
        "gradients": gradients, "norms": norms, "norms per parameter": by_parameter, "sum": _scaled(wide, torch.ones_like(norms)),
        "flat": _scaled(wide, (max_norm / norms).clamp(max=1)), "automatic": _scaled(wide, max_norm / (norms + 0.01)),
        "per_parameter": {
            name: _scaled({name: value}, (share / by_parameter[name]).clamp(max=1))[name] for name, value in wide.items()
        },
        "fisher_diag": {name: value.abs().square().mean(0) for name, value in wide.items()},
        "variance": {name: value.var(0) if count > 1 else None for name, value in wide.items()},
        "noise_scale": trace / (mean.abs().square().sum() - trace / count), "gram": flat @ flat.conj().T,
        "project": sum(_projected(wide[name], i) for i, name in enumerate(sorted(wide))),
    }  # fmt: skip


def _scaled(gradients: dict[str, torch.Tensor], weights: torch.Tensor) -> dict[str, torch.Tensor]:
    return {name: torch.tensordot(weights.to(value.dtype), value, 1) for name, value in gradients.items()}


def _projected(gradient: torch.Tensor, number: int) -> torch.Tensor:
    key = random.fold_in(random.key(3), number)
    matrix = random.normal(key, (DIRECTIONS, *gradient.shape[1:]), gradient.dtype) / DIRECTIONS**0.5
    return gradient.reshape(len(gradient), -1) @ matrix.reshape(DIRECTIONS, -1).T


def assert_close(found: Any, expected: Any, tolerance: float, where: str = "") -> None:
    """Equal up to a tolerance, of the size of the largest number or of 1, in trees of dicts."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for name, value in expected.items():
            assert_close(found[name], value, tolerance, f"{where} {name}")
        return
    scale = 1 + float(expected.abs().max()) if expected.numel() else 1.0
    testing.assert_close(found, expected, atol=tolerance * scale, dtypes=False, where=where)
