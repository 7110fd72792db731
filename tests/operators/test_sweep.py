"""Every operator of PyTorch's database under ``vmap`` gives what a loop gives, or is in the ledger.

By default a fixed part of the cases runs. ``TORCHBATCH_SWEEP=full`` runs all, with gradients and integers.
"""

from __future__ import annotations

import os
import zlib

import pytest
import torch

pytest.importorskip("expecttest")

import sweep_cases as sweep
import sweep_ledger as ledger

from torchbatch import vmap
from torchbatch._torch import factories, repairs, rules

FULL = os.environ.get("TORCHBATCH_SWEEP") == "full"
SAMPLES, FEW_SAMPLES = 6, 2  # of each operator
REGISTERED = (factories, repairs, rules)


def chosen(case: sweep.Case) -> bool:
    """The first case of each operator, and a fixed part of the others."""
    return FULL or (case.sample == 0 and all(case.mapped)) or zlib.crc32(repr(case).encode()) % 12 == 0


def check(name: str, cases: list[sweep.Case], limit: int, dtype: torch.dtype | None = None) -> set[ledger.Gap]:
    """Run some cases of an operator; the entries of the ledger that they need."""
    used: set[ledger.Gap] = set()
    problems = []
    for case in cases:
        verdict = sweep.check(case, vmap, dtype, limit)
        gap = next((g for g in ledger.of(name) if g.covers(case.variant) and verdict.detail.startswith(g.error)), None)
        if gap is not None:
            used.add(gap)
        elif not allowed(name, verdict):
            problems.append(f"{case}: {verdict}")
    assert not problems, "\n".join(problems)
    return used


def allowed(name: str, verdict: sweep.Verdict) -> bool:
    if verdict.kind == "slow":
        return name in ledger.LOOPED
    if verdict.kind == "ragged":
        return verdict.detail.startswith("DataDependentError")
    return verdict.kind in ("ok", "both fail")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", sorted(sweep.OPERATORS))
def test_operator_equals_the_loop(name: str) -> None:
    mine = {gap for gap in ledger.GAPS if gap.operator == name}
    thorough = FULL or bool(mine)
    limit = SAMPLES if thorough else FEW_SAMPLES
    used = check(name, [case for case in sweep.cases(name, limit) if thorough or chosen(case)], limit)
    assert mine <= used, f"no longer needed in the ledger: {mine - used}"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(not FULL, reason="part of the full sweep only: TORCHBATCH_SWEEP=full")
@pytest.mark.parametrize("name", sorted(sweep.OPERATORS))
def test_integers_equal_the_loop(name: str) -> None:
    if torch.int64 in sweep.OPERATORS[name].supported_dtypes("cpu"):
        check(name, list(sweep.cases(name, SAMPLES, torch.int64)), SAMPLES, torch.int64)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(not FULL, reason="part of the full sweep only: TORCHBATCH_SWEEP=full")
@pytest.mark.parametrize("name", sorted(sweep.OPERATORS))
def test_gradients_equal_the_loop(name: str) -> None:
    check(name, list(sweep.cases(name, SAMPLES, gradients=True)), SAMPLES)


def test_the_ledger_names_operators_of_the_database() -> None:
    assert {gap.operator for gap in [*ledger.GAPS, *ledger.FULL_ONLY]} | set(ledger.LOOPED) <= set(sweep.OPERATORS)
