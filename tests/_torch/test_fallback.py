"""Operators without a batching rule: right, announced, refused or quiet, as ``fallback`` says (rule 16)."""

from __future__ import annotations

import re
import threading
import warnings
from collections.abc import Iterator

import pytest
import torch

from torchbatch import vmap
from torchbatch._torch import repairs, rules
from torchbatch._torch.fallback import _Policy, fallback, mode
from torchbatch.errors import AxisError, DataDependentError, FallbackError, FallbackWarning
from torchbatch.testing import assert_close

REGISTERED = (repairs, rules)
LENGTHS = torch.tensor([1, 2])


def segments(x: torch.Tensor) -> torch.Tensor:
    """An operator that has no batching rule, with a gradient that has none."""
    return torch.segment_reduce(x, "sum", lengths=LENGTHS)


@pytest.fixture(autouse=True)
def default_policy() -> Iterator[None]:
    with fallback("warn"):
        yield


@pytest.fixture
def x() -> torch.Tensor:
    return torch.arange(6.0).reshape(2, 3)


def test_rule_16_the_answer_is_right_and_announced_at_the_users_line(x: torch.Tensor) -> None:
    with pytest.warns(FallbackWarning) as caught:
        result = vmap(segments)(x)
    assert_close(result, torch.tensor([[0.0, 3.0], [3.0, 9.0]]))
    assert len(caught) == 1
    assert str(caught[0].message) == (
        "segment_reduce has no batching rule, so it runs once per sample: the result is right, but it takes as long as a "
        "loop. torchbatch.fallback('silent') turns this warning off, fallback('error') makes it an error."
    )
    assert caught[0].filename == __file__
    assert caught[0].lineno == segments.__code__.co_firstlineno + 2


def test_rule_16_once_per_operator_and_line(x: torch.Tensor) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            vmap(segments)(x)
        vmap(lambda x: torch.segment_reduce(x, "sum", lengths=LENGTHS))(x)
    assert len(caught) == 2


def test_rule_16_error_refuses_and_names_operator_and_line(x: torch.Tensor) -> None:
    message = re.escape(
        "segment_reduce has no batching rule, so it would run once per sample, and fallback('error') refuses that. Express it "
        "by other operations, or allow the loop with fallback('warn') or fallback('silent').\n  in segments, "
    )
    with fallback("error"), pytest.raises(FallbackError, match=message):
        vmap(segments)(x)
    with pytest.warns(FallbackWarning):
        vmap(segments)(x)


def test_rule_16_silent_says_nothing(x: torch.Tensor) -> None:
    with fallback("silent"), warnings.catch_warnings():
        warnings.simplefilter("error")
        vmap(segments)(x)


def test_rule_16_holds_in_backward_formulas(x: torch.Tensor) -> None:
    gradient = torch.func.grad(lambda x: segments(x).square().sum())
    with pytest.warns(FallbackWarning, match="^_segment_reduce_backward has no batching rule"):
        result = vmap(gradient)(x)
    assert_close(result, torch.stack([gradient(row) for row in x]))
    with fallback("error"), pytest.raises(FallbackError):
        vmap(gradient)(x)


def test_rule_16_says_nothing_of_what_is_not_per_sample(x: torch.Tensor) -> None:
    with fallback("error"):
        result = vmap(lambda y: y + segments(x[0]))(torch.zeros(2, 2))
    assert_close(result, torch.tensor([[0.0, 3.0], [0.0, 3.0]]))


def test_rule_16_nested_maps(x: torch.Tensor) -> None:
    both = torch.stack([x, x + 1])
    with fallback("silent"):
        result = vmap(vmap(segments), in_axes=1, out_axes=1)(both)
    assert_close(result, torch.stack([torch.stack([segments(row) for row in part]) for part in both]))


def test_the_policy_of_a_with_statement_ends_with_it() -> None:
    assert mode() == "warn"
    with fallback("error"):
        with fallback("silent"):
            assert mode() == "silent"
        assert mode() == "error"
    assert mode() == "warn"


def test_a_with_statement_concerns_its_own_thread_only() -> None:
    seen = []
    with fallback("error"):
        thread = threading.Thread(target=lambda: seen.append(mode()))
        thread.start()
        thread.join()
    assert seen == ["warn"]


def test_a_call_sets_the_policy_for_all_threads() -> None:
    script = "fallback('silent'); t = threading.Thread(target=lambda: seen.append(mode())); t.start(); t.join()"
    seen: list[str] = []
    before = fallback("warn")
    try:
        exec(script, {"fallback": fallback, "mode": mode, "threading": threading, "seen": seen})
        assert seen == ["silent"]
    finally:
        before.__enter__().__exit__(None, None, None)
        fallback("warn")


def test_a_policy_that_there_is_not() -> None:
    message = "fallback takes 'warn', 'error' or 'silent', but it got 'loud'."
    with pytest.raises(AxisError, match=f"^{re.escape(message)}$"):
        fallback("loud")


def test_repr() -> None:
    with fallback("silent") as policy:
        assert repr(policy) == "fallback('silent')"


def test_results_of_different_shapes() -> None:
    counts = torch.tensor([[0, 1], [0, 5]])
    with fallback("silent"), pytest.raises(DataDependentError, match=r"bincount.*depends on values.*Fixed shapes work"):
        vmap(torch.bincount)(counts)


def test_several_results() -> None:
    x = torch.rand(2, 8)
    with fallback("silent"):
        counts, edges = vmap(lambda x: tuple(torch.histogram(x, bins=4)))(x)
    for i in range(2):
        expected = torch.histogram(x[i], bins=4)
        assert_close((counts[i], edges[i]), tuple(expected))


def test_comparing_in_python_is_an_error_even_where_all_samples_agree() -> None:
    with pytest.raises(DataDependentError):
        vmap(lambda a: a if torch.equal(a, a) else -a)(torch.ones(2, 3))


def test_operators_of_other_libraries_keep_to_the_policy() -> None:
    library = torch.library.Library("torchbatch_test", "FRAGMENT")
    library.define("double(Tensor x) -> Tensor")
    library.impl("double", lambda x: 2 * x, "CPU")
    double = torch.ops.torchbatch_test.double
    with fallback("silent"), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_close(vmap(double)(torch.ones(2, 3)), torch.full((2, 3), 2.0))
    with fallback("error"), pytest.raises(FallbackError, match=r"^torchbatch_test::double has no batching rule"):
        vmap(double)(torch.ones(2, 3))


def test_an_empty_batch() -> None:
    with fallback("silent"):
        result = vmap(lambda x: torch.segment_reduce(x, "sum", lengths=LENGTHS))(torch.zeros(0, 3))
    assert result.shape == (0, 2)


def test_a_block_does_not_undo_what_was_said_in_between() -> None:
    block = fallback("silent")
    fallback("error")
    with block:
        assert mode() == "silent"
    assert _Policy.everywhere == "error"
    fallback("warn")
