"""``check_vmap`` catches what is wrong, in the right line, and nothing that is right."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import torchbatch
from tests.conftest import LONG
from tests.testing.correct_functions import CASES, Case, Draw
from tests.testing.mutants import MUTANTS
from torchbatch.testing.report import Report
from torchbatch.testing.vmap_checks import check_vmap

SEEDS = 20 if LONG else 1
WAYS = ("eager", "chunked", "nested") if LONG else ("eager", "chunked")


@pytest.fixture(autouse=True)
def silent() -> Iterator[None]:
    """Functions of many kinds run; that some of them run slowly, or on too few numbers, is not the point."""
    with torchbatch.fallback("silent"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def checked(case: Case, seed: int, backends: tuple[str, ...]) -> Report:
    draw = Draw(seed)
    options: dict[str, Any] = {"backends": backends, **case.options}
    if "kwargs" in options:
        options["kwargs"] = options["kwargs"](draw)
    return check_vmap(case.fun, *case.inputs(draw), seed=seed, **options)


@pytest.mark.parametrize("name", CASES)
def test_a_correct_function_raises_no_alarm(name):
    for seed in range(SEEDS):
        assert checked(CASES[name], seed, WAYS).passed


@pytest.mark.parametrize("name", list(CASES) if LONG else list(CASES)[::8])
def test_nor_does_one_that_is_traced_or_nested(name):
    case = CASES[name]
    if "backends" not in case.options:
        assert checked(case, 1, ("traced", "nested")).passed


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_caught_in_the_right_line(name):
    mutant = MUTANTS[name]
    inputs = mutant.inputs(Draw(0))
    options = {"backends": () if mutant.batched else ("eager",), **mutant.options}
    args = inputs if type(inputs) is tuple else (inputs,)
    report = check_vmap(mutant.fun, *args, batched=mutant.batched, raise_on_failure=False, **options)
    assert report.failures, report
    first = report.failures[0]
    assert (first.run, first.what, first.variant, first.problem) == (mutant.run, mutant.what, mutant.variant, mutant.problem), (
        report
    )
    assert {check.run for check in report.failures} <= {mutant.run, *mutant.also}, report


def test_there_are_enough_of_both():
    assert len(CASES) >= 100 and sum(case.ill for case in CASES.values()) >= 10
    assert len(MUTANTS) >= 40 and sum(mutant.subtle for mutant in MUTANTS.values()) >= 10


FOUND = {
    "the imaginary part of a conjugate": (lambda a: a.conj().imag, torch.randn(3, 2, dtype=torch.complex64)),
    "max() where several are largest": (lambda a: a.max(), torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 0.0]])),
    "median() where several are in the middle": (lambda a: a.median(), torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 0.0]])),
}


@pytest.mark.parametrize("name", FOUND)
def test_what_it_found_in_vmap(name):
    fun, x = FOUND[name]
    check_vmap(fun, x, backends=("eager", "traced", "nested"))
