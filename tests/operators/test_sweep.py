"""Every operator of PyTorch's database under ``vmap``, and under ``jit`` of it, gives what a loop gives, or is in the ledger.

By default a fixed part of the cases runs. ``TORCHBATCH_SWEEP=full`` runs all, with gradients and integers;
``TORCHBATCH_JIT=full`` runs all traced.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch

pytest.importorskip("expecttest")

import sweep_cases as sweep
import sweep_ledger as ledger

from torchbatch import jit, vmap
from torchbatch._torch import factories, repairs, rules

FULL = os.environ.get("TORCHBATCH_SWEEP") == "full"
FULL_JIT = os.environ.get("TORCHBATCH_JIT") == "full"
SAMPLES, FEW_SAMPLES = 6, 2  # of each operator
REGISTERED = (factories, repairs, rules)


def chosen(case: sweep.Case) -> bool:
    """The first case of each operator, and a fixed part of the others."""
    return FULL or (case.sample == 0 and all(case.mapped)) or zlib.crc32(repr(case).encode()) % 12 == 0


def traced(fun: Callable[..., Any], *axes: Any, **options: Any) -> Callable[..., Any]:
    """A mapped function, traced, and replayed without a compiler."""
    return jit(vmap(fun, *axes, **options), backend="eager")


def check(
    cases: Iterable[sweep.Case],
    limit: int,
    gaps: Iterable[ledger.Gap],
    dtype: torch.dtype | None = None,
    mapping: Callable[..., Any] = vmap,
) -> set[ledger.Gap]:
    """Run some cases of an operator; the entries of the ledger that they need."""
    used: set[ledger.Gap] = set()
    problems = []
    for case in cases:
        verdict = sweep.check(case, mapping, dtype, limit)
        gap = next((g for g in gaps if g.covers(case.variant) and verdict.detail.startswith(g.error)), None)
        if gap is not None:
            used.add(gap)
        elif not allowed(case.operator, verdict):
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
    used = check([case for case in sweep.cases(name, limit) if thorough or chosen(case)], limit, ledger.of(name))
    assert mine <= used, f"no longer needed in the ledger: {mine - used}"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(not FULL, reason="part of the full sweep only: TORCHBATCH_SWEEP=full")
@pytest.mark.parametrize("name", sorted(sweep.OPERATORS))
def test_integers_equal_the_loop(name: str) -> None:
    if torch.int64 in sweep.OPERATORS[name].supported_dtypes("cpu"):
        check(sweep.cases(name, SAMPLES, torch.int64), SAMPLES, ledger.of(name), torch.int64)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(not FULL, reason="part of the full sweep only: TORCHBATCH_SWEEP=full")
@pytest.mark.parametrize("name", sorted(sweep.OPERATORS))
def test_gradients_equal_the_loop(name: str) -> None:
    check(sweep.cases(name, SAMPLES, gradients=True), SAMPLES, ledger.of(name))


def traced_by_default(name: str) -> bool:
    """Operators of which a case is traced in every run: a fixed part of them, and all with a gap."""
    return zlib.crc32(name.encode()) % 10 == 0 or any(gap.operator == name for gap in ledger.TRACED)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [name for name in sorted(sweep.OPERATORS) if FULL_JIT or traced_by_default(name)])
def test_traced_operator_equals_the_loop(name: str) -> None:
    mine = {gap for gap in ledger.TRACED if gap.operator == name}
    gaps = [*ledger.of(name), *mine]
    cases = list(sweep.cases(name, FEW_SAMPLES))
    used = check(cases if FULL_JIT else cases[:1], FEW_SAMPLES, gaps, mapping=traced)
    for case in sorted(cases, key=lambda case: all(case.mapped)):
        if mine <= used:  # the other cases are for the long run
            break
        used |= check([case], FEW_SAMPLES, gaps, mapping=traced)
    assert mine <= used, f"no longer needed in the ledger: {mine - used}"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(not FULL_JIT, reason="part of the long run only: TORCHBATCH_JIT=full")
@pytest.mark.parametrize("name", sorted(sweep.OPERATORS))
def test_traced_gradients_equal_the_loop(name: str) -> None:
    cases = [case for case in sweep.cases(name, FEW_SAMPLES, gradients=True) if case.axis == "first" and case.size]
    check(cases, FEW_SAMPLES, [*ledger.of(name), *(gap for gap in ledger.TRACED if gap.operator == name)], mapping=traced)


def test_the_ledger_names_operators_of_the_database() -> None:
    gaps = [*ledger.GAPS, *ledger.FULL_ONLY, *ledger.TRACED]
    assert {gap.operator for gap in gaps} | set(ledger.LOOPED) <= set(sweep.OPERATORS)
