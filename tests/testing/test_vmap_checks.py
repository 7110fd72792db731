"""``check_vmap``: what it runs, what it says, and what it refuses."""

from __future__ import annotations

import copy
import os
import re
import subprocess
import sys

import pytest
import torch

import torchbatch as tb
from torchbatch import lax
from torchbatch.errors import (
    AxisError,
    AxisNameError,
    AxisSpecError,
    CompilerError,
    EquivalenceError,
    InputTypeError,
    RandomnessError,
    UnmappedOutputError,
)
from torchbatch.testing import failing_program, ways
from torchbatch.testing.gradients import Differences, Slope
from torchbatch.testing.tolerance import Tolerance
from torchbatch.testing.variants import Call, call_of, copied, cut, permuted, spread, variants
from torchbatch.testing.vmap_checks import check_vmap

X = torch.tensor([[1.0, 2.0, -3.0], [0.5, -1.0, 4.0], [2.0, 0.0, 1.0], [3.0, 1.5, -2.0], [-1.0, 0.25, 0.75]])


def layer(params, x):
    return torch.tanh(params["w"] @ x + params["b"])


def params():
    return {"w": X[:2], "b": X[0, :2]}


def lines(report):
    return [check.name for check in report.checks]


def failed(fun, *args, **options):
    """The report of a check that fails."""
    with pytest.raises(EquivalenceError) as caught:
        check_vmap(fun, *args, **options)
    assert str(caught.value) == str(caught.value.report)
    return caught.value.report


# --- what is run -----------------------------------------------------------------------------------------------------


def test_every_way_runs_on_the_arguments_as_given_and_some_on_others():
    report = check_vmap(layer, params(), X, in_axes=(None, 0), backends=("eager", "chunked", "traced", "nested"))
    assert report.passed and report.title == "check_vmap(layer)"
    assert lines(report)[:6] == [
        "loop, values, once more",
        "eager, values, as given",
        "chunked by 1, values, as given",
        "chunked by 2, values, as given",
        "traced, values, as given",
        "nested, values, as given",
    ]
    assert {check.variant for check in report.checks} == {
        "once more",
        "as given",
        "as given, in float64",
        "axes moved: in_axes=(None, -1)",
        "out_axes=-1",
        "samples permuted",
        "not contiguous",
        "batch of 1",
        "batch of 0",
    }
    derivatives = {(check.run, check.what) for check in report.checks if check.variant == "as given" and check.what != "values"}
    assert derivatives == {
        *((run, "reverse-mode gradient") for run in ("eager", "chunked by 1", "chunked by 2", "traced", "nested")),
        *((run, "per-sample gradient") for run in ("eager", "chunked by 1", "chunked by 2")),
        *((run, "forward-mode gradient") for run in ("eager", "chunked by 1", "chunked by 2", "nested")),
    }


def test_the_report_names_inputs_settings_and_the_rule_for_the_tolerance():
    report = check_vmap(layer, params(), X, in_axes=(None, 0), backends=("eager",))
    assert report.inputs == ("params['b']: float32[2], shared", "params['w']: float32[2, 3], shared", "x: float32[5, 3], axis 0")
    assert report.notes[0].startswith("tolerance: chosen for each leaf from its dtype, from 16 operations for a sample")
    assert report.precision is not None and report.reproducer == ""


def test_what_is_left_out_is_not_run():
    report = check_vmap(layer, params(), X, in_axes=(None, 0), backends=("eager",), derivatives=(), variants=False)
    assert lines(report) == ["loop, values, once more", "eager, values, as given"]
    report = check_vmap(layer, params(), X, in_axes=(None, 0), backends=("eager",), derivatives=("forward",), variants=False)
    assert lines(report)[2:] == ["eager, forward-mode gradient, as given"]


def test_a_function_of_whole_numbers_has_no_derivatives():
    report = check_vmap(lambda i: i * 2, torch.arange(4), backends=("eager",), variants=False)
    assert lines(report) == ["loop, values, once more", "eager, values, as given"]


def test_a_compiler_is_used():
    report = check_vmap(lambda x: x.sin().sum(), X, backends=("jit", "compile"), derivatives=("reverse",))
    ran = {(check.run, check.what, check.variant) for check in report.checks if check.run != "loop"}
    assert {check.status for check in report.checks} == {"passed"}
    assert ran == {
        (run, what, variant)
        for run in ("jit", "compile")
        for what, variant in (("values", "as given"), ("reverse-mode gradient", "as given"), ("values", "samples permuted"))
    }


def test_without_a_compiler_its_lines_are_skipped_and_say_so(monkeypatch):
    def jit(*args, **options):
        raise CompilerError("there is no C++ compiler on this machine")

    monkeypatch.setattr(tb, "jit", jit)
    report = check_vmap(torch.sin, X, backends=("eager", "jit"))
    skipped = [check for check in report.checks if check.status == "skipped"]
    assert report.passed and [check.name for check in skipped] == ["jit, values, as given"]
    assert skipped[0].message == "no compiler: CompilerError: there is no C++ compiler on this machine"


def test_an_error_of_the_compiler_is_no_lack_of_one(monkeypatch):
    real = tb.jit

    def jit(fun, **options):
        if fun is not ways._probe:
            raise CompilerError("this one it cannot do")
        return real(fun, backend="eager")

    monkeypatch.setattr(tb, "jit", jit)
    report = failed(torch.sin, X, backends=("jit",))
    assert report.failures[0].problem == "error" and "this one it cannot do" in report.failures[0].message


@pytest.mark.parametrize(("size", "counts"), [(0, []), (1, []), (2, [1]), (3, [1, 2]), (4, [1, 3]), (6, [1, 4]), (12, [1, 5])])
def test_chunks_are_of_one_sample_and_of_a_size_with_a_rest(size, counts):
    assert ways.chunk_sizes(size) == counts


@pytest.mark.parametrize("size", [0, 1, 2])
def test_small_batches(size):
    report = check_vmap(layer, params(), X[:size], in_axes=(None, 0), backends=("eager", "chunked", "nested"))
    assert f"eager, values, batch of {size}" not in lines(report)


def test_an_empty_batch_is_left_out_where_the_function_fails_on_zeros():
    report = check_vmap(lambda x: torch.linalg.inv(x), torch.eye(3).expand(4, 3, 3), backends=("eager",))
    assert not [line for line in lines(report) if "batch of 0" in line] and [
        line for line in lines(report) if "batch of 1" in line
    ]


def test_arguments_and_generators_are_left_alone():
    p, x, state = params(), X.clone(), torch.get_rng_state()
    before = copy.deepcopy((p, x))
    check_vmap(lambda p, x: x.mul_(2).sum() + p["w"].sum(), p, x, in_axes=(None, 0), backends=("eager", "nested"), derivatives=())
    check_vmap(lambda x: x + torch.rand(3), X, backends=("eager",), randomness="different")
    assert tb.tree.all(tb.tree.map(torch.equal, before, (p, x))) and torch.equal(state, torch.get_rng_state())


# --- what is found ---------------------------------------------------------------------------------------------------


def test_a_batched_version_is_held_against_the_loop():
    report = failed(lambda x: x / x.sum(), X.abs(), batched=lambda x: x / x.sum(), backends=("eager",))
    assert {check.run for check in report.failures} == {"batched"}
    assert report.failures[0].name == "batched, values, as given"
    assert "the float64 reference says that batched is off" in report.failures[0].message
    passing = check_vmap(lambda x: x / x.sum(), X.abs(), batched=lambda x: x / x.sum(1, keepdim=True), backends=())
    assert {"batched, values, not contiguous", "batched, values, batch of 0", "batched, forward-mode gradient, as given"} <= {
        *lines(passing)
    }


def test_what_cannot_be_mapped_is_shown_with_its_line_and_only_once():
    def choosing(x):
        if x.sum() > 0:
            return x
        return -x

    report = failed(choosing, X, backends=("eager",))
    assert [(check.name, check.problem) for check in report.failures] == [("eager, values, as given", "error")]
    message = report.failures[0].message
    assert message.startswith("DataDependentError: Python needs one True or False here") and "if x.sum() > 0:" in message


def test_errors_must_be_of_one_kind():
    def refusing(x):
        raise KeyError("no")

    def other(x):
        raise TypeError("no")

    report = check_vmap(refusing, X, backends=("eager", "traced"))
    assert {check.message for check in report.checks} == {"both raise KeyError: 'no'"}
    assert report.notes[0] == "note: the loop raises an error on these arguments, and so must every way: KeyError: 'no'"
    assert (
        failed(refusing, X, batched=other, backends=()).failures[0].message
        == "TypeError: no\nwhere the loop raises KeyError: 'no'"
    )
    assert (
        failed(refusing, X, batched=torch.sin, backends=()).failures[0].message == "no error, but the loop raises KeyError: 'no'"
    )


def test_what_a_run_wrote_is_compared():
    report = failed(lambda x: x.relu(), X, batched=lambda x: x.relu_().clone(), backends=(), derivatives=(), variants=False)
    check = report.failures[0]
    assert check.problem == "inputs" and check.message.startswith("input x: afterwards it is not what it is after the loop: ")
    check_vmap(lambda x: x.mul_(2).sum(), X, batched=lambda x: x.mul_(2).sum(1), backends=("eager", "nested"), derivatives=())


def test_a_function_with_a_memory_is_told_so():
    calls = []

    def counting(x):
        calls.append(None)
        return x * len(calls)

    report = failed(counting, X, backends=("eager",))
    assert report.failures[0].name == "loop, values, once more"
    assert report.notes[0].startswith("note: the function gives something else when it is called again")


@pytest.mark.parametrize("tolerance", [Tolerance(0.1, 0.1), 0.1])
def test_a_given_tolerance_is_all_that_counts(tolerance):
    def batched(x):
        return x * 1.01

    assert failed(lambda x: x * 1.0, X, batched=batched, backends=(), derivatives=())
    report = check_vmap(lambda x: x * 1.0, X, batched=batched, backends=(), derivatives=(), tolerance=tolerance)
    assert report.notes == ("tolerance: rtol 0.1, atol 0.1 (given)",)


def test_the_loop_excuses_what_it_is_itself_off():
    x = torch.tensor([[1e4, 1.0, -1e4], [1.0, 1e4, -1e4]])

    def batched(x):
        return x.flip(1).sum(1)

    assert check_vmap(lambda x: x.sum(), x, batched=batched, backends=(), derivatives=()).passed
    assert failed(lambda x: x.sum(), x, batched=lambda x: batched(x) + 0.1, backends=(), derivatives=())


@pytest.mark.parametrize(("dtype", "off"), [(torch.bfloat16, 0.12), (torch.float16, 0.015)])
def test_coarse_numbers_are_no_excuse(dtype, off):
    options = {"batched": lambda x: x.abs() * (1 + off), "backends": (), "derivatives": (), "variants": False}
    assert failed(torch.abs, X.to(dtype), **options).failures[0].problem == "values"


def test_ties_are_not_excused():
    x = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    report = failed(torch.amax, x, batched=lambda x: x.max(1).values, backends=())
    assert report.failures[0].name == "batched, reverse-mode gradient, as given"


# --- differences -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fun",
    [
        torch.sin,
        torch.relu,
        torch.linalg.cholesky,
        lambda x: x.sort().values.cumsum(-1),
        lambda x: (x.abs().sum(), x.argmax()),
        lambda x: torch.view_as_complex(x[:2, :2].contiguous()) ** 2,
    ],
)
def test_differences_agree_with_both_modes(fun):
    x = torch.eye(3).mul(2).add(0.5).expand(2, 3, 3)
    found = Differences(Call(fun, (x,), {}), 0)
    assert found.slope.smooth
    for derivative in (found.reverse(), found.forward()):
        assert found.compared(derivative).passed and not found.compared(derivative * 1.0001 + 1e-5).passed


@pytest.mark.parametrize("fun", [torch.reciprocal, torch.log, lambda x: (1000 * x).exp()], ids=range(3))
def test_differences_of_what_is_infinite_say_nothing(fun):
    assert check_vmap(fun, torch.tensor([[0.0, 1.0], [2.0, 0.0]]), backends=("eager",), variants=False).passed


def test_next_to_a_kink_differences_are_taken_beside_it():
    found = Differences(Call(lambda x: x.abs().sum(), (torch.zeros(3, 2),), {}), 0)
    assert found.slope.smooth and bool(found.inputs[0].all())


def test_where_differences_tell_nothing_the_line_is_skipped(monkeypatch):
    monkeypatch.setattr(Differences, "_slope", lambda self, step=1e-6: Slope(0.0, 1.0, False))
    report = check_vmap(torch.sin, X, backends=("eager",), variants=False)
    skipped = [check.message for check in report.checks if check.status == "skipped"]
    assert skipped == ["the function is not smooth at these inputs or close by"] * 2


def test_a_function_that_needs_float32_is_not_differenced():
    weights = torch.ones(3)
    report = check_vmap(lambda x: x @ weights, X, backends=("eager",), variants=False)
    assert "the function does not run in float64: " in report.checks[-1].message
    report = check_vmap(lambda x: x.float().sin(), X, backends=("eager",), variants=False)
    assert report.checks[-1].message == "the function returns torch.float32 for float64" and report.passed


# --- random numbers --------------------------------------------------------------------------------------------------


def noisy(x):
    return x + torch.rand(3)


@pytest.mark.parametrize("randomness", ["different", "same"])
def test_a_function_that_draws_is_checked_for_who_shares(randomness):
    report = check_vmap(noisy, X, backends=("eager", "chunked", "traced", "nested"), randomness=randomness)
    assert {check.what for check in report.checks} == {"values", "randomness"} and len(report.checks) == 10
    batched = noisy if randomness == "different" else lambda x: x + torch.rand(5, 3)
    report = failed(noisy, X, batched=batched, backends=(), randomness=randomness)
    assert [check.problem for check in report.failures] == ["randomness"]
    assert "torch.manual_seed" in report.reproducer


def test_a_function_that_draws_nothing_is_checked_in_full():
    assert "eager, reverse-mode gradient, as given" in lines(
        check_vmap(torch.sin, X, backends=("eager",), randomness="different")
    )


def test_draws_must_be_announced():
    with pytest.raises(RandomnessError, match="Say whether samples draw 'different' numbers or the 'same'"):
        check_vmap(noisy, X)


def test_keys_are_compared_as_usual():
    def drop(key, x):
        return x * tb.random.bernoulli(key, 0.5, (3,))

    keys = tb.random.split(tb.random.key(0), 5)
    assert "eager, per-sample gradient, as given" in lines(check_vmap(drop, keys, X, backends=("eager", "chunked", "nested")))


# --- reproducers -----------------------------------------------------------------------------------------------------


def run_program(text):
    return subprocess.run(
        [sys.executable, "-c", text], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )


def half(x):
    return x / 2


def third(x):
    return x / 3


def test_the_reproducer_holds_the_function_and_the_batched_version():
    report = failed(half, X, batched=third, backends=())
    assert report.reproducer.startswith("# batched, values, as given: values\n") and "def third" in report.reproducer
    ran = run_program(report.reproducer)
    assert ran.returncode == 1 and "Mismatched elements" in ran.stderr, ran


@pytest.mark.parametrize(
    ("kind", "name", "text"),
    [
        ("eager", "eager", "torchbatch.vmap({fun}, in_axes={in_axes}, out_axes={out_axes})"),
        ("chunked", "chunked by 3", "torchbatch.vmap({fun}, in_axes={in_axes}, out_axes={out_axes}, chunk_size=3)"),
        ("jit", "jit", "torchbatch.jit(torchbatch.vmap({fun}, in_axes={in_axes}, out_axes={out_axes}))"),
        ("batched", "batched", "batched"),
        ("loop", "loop", None),
    ],
)
def test_a_program_runs_what_failed(kind, name, text):
    assert failing_program.transform_of(ways.Way(name, lambda call: None, kind)) == text


# --- bad use ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"backends": ("eagre",)}, AxisSpecError, "backends has 'eagre', but knows only 'eager', 'chunked', 'traced', 'jit'"),
        ({"backends": "eager"}, AxisSpecError, "backends must be a sequence of names, such as ('eager',), but it is 'eager'"),
        ({"backends": ()}, AxisSpecError, "there is nothing to check"),
        ({"derivatives": ("backward",)}, AxisSpecError, "derivatives has 'backward', but knows only 'reverse', 'forward'"),
        ({"tolerance": -1.0}, AxisSpecError, "tolerance must be a Tolerance, a number that serves as rtol and atol, or None"),
        ({"tolerance": "loose"}, AxisSpecError, "but it is 'loose'"),
        ({"randomness": "some"}, AxisSpecError, "randomness must be 'error', 'different' or 'same', but it is 'some'"),
        ({"batched": 3}, AxisSpecError, "batched must be a function, but it is 3 of type int"),
        ({"in_axes": None}, AxisError, "vmap has nothing to map"),
        ({"in_axes": (0, 0)}, AxisError, "in_axes must have one entry per positional argument: it has 2"),
        ({"in_axes": 2}, AxisError, "is to be mapped over axis 2"),
        ({"in_axes": "rows"}, AxisSpecError, "in_axes must be an int"),
        ({"in_axes": ({"a": 0},)}, AxisError, "in_axes"),
        ({"axis_size": 4}, AxisError, "different sizes"),
        ({"out_axes": 5}, AxisError, "out_axes is 5 for the output, which has 2 dimensions"),
        ({"out_axes": {"a": 0}}, AxisError, "out_axes must be a tree prefix"),
        ({"out_axes": None}, UnmappedOutputError, "the output differs between samples, but its out_axes is None"),
        ({"axis_name": ["i"]}, AxisSpecError, "axis_name must be hashable, but it is ['i']"),
        ({"kwargs": [X]}, AxisSpecError, "kwargs must be a dict of arguments by name, or None, but it is [tensor("),
        ({"kwargs": {1: X}}, AxisSpecError, "kwargs must be a dict of arguments by name"),
        ({"seed": -1}, AxisSpecError, "seed must be a whole number from 0 up to 2**64 - 1, but it is -1"),
        ({"seed": 1.5}, AxisSpecError, "but it is 1.5"),
        ({"seed": 2**64}, AxisSpecError, "seed must be a whole number"),
    ],
)
def test_bad_use(options, error, text):
    with pytest.raises(error, match=re.escape(text)):
        check_vmap(torch.sin, X, **options)


def test_bad_arguments():
    with pytest.raises(AxisSpecError, match="fun must be a function, but it is 3 of type int"):
        check_vmap(3, X)
    with pytest.raises(AxisError, match="needs at least 1 dimension"):
        check_vmap(torch.mul, X, 2.0)
    with pytest.raises(InputTypeError, match="name"):
        check_vmap(lambda x, name: x, X, "name")
    with pytest.raises(AxisNameError, match="looks across the samples, by the axis name 'i'"):
        check_vmap(lambda x: lax.psum(x, "i"), X, axis_name="i")


def test_errors_about_axes_within_the_function_are_errors_like_others():
    report = check_vmap(lambda x: tb.vmap(torch.sin, in_axes=3)(x), X, backends=("eager",))
    assert report.passed and "both raise AxisError" in report.checks[0].message


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_derivatives_are_checked_where_none_are_recorded(mode):
    with mode():
        assert check_vmap(torch.sin, X, backends=("eager",), variants=False).passed
        report = check_vmap(torch.sin, X, batched=lambda x: x.detach().sin(), backends=(), raise_on_failure=False)
        assert not torch.is_grad_enabled()
    assert report.failures[0].name == "batched, reverse-mode gradient, as given"


@pytest.mark.parametrize(
    "fun", [torch.sqrt, lambda x: 1 / x, lambda x: (1000 * x).exp(), lambda x, w: (x + w).sqrt() + w.sqrt()], ids=range(4)
)
def test_infinite_derivatives_are_the_same_in_nested_maps(fun):
    args = (torch.tensor([[0.0, 1.0], [2.0, 0.0]]), torch.zeros(2))[: fun.__code__.co_argcount if hasattr(fun, "__code__") else 1]
    assert check_vmap(fun, *args, in_axes=(0, None)[: len(args)], backends=("nested",), variants=False).passed


def test_a_loop_that_pytorch_cannot_differentiate_says_nothing_about_derivatives():
    report = check_vmap(lambda x: x.float() * 2, X.to(torch.float8_e4m3fn), backends=("eager",), variants=False)
    skipped = [check for check in report.checks if check.status == "skipped"]
    assert report.passed and skipped[0].name == "eager, reverse-mode gradient, as given"
    assert skipped[0].message.startswith("PyTorch cannot differentiate the loop: NotImplementedError: ")


def test_the_largest_seed_is_one():
    check_vmap(lambda x: x + torch.rand(3), X, randomness="different", backends=("eager",), seed=2**64 - 1)


def test_failures_need_not_raise():
    report = check_vmap(half, X, batched=third, backends=(), raise_on_failure=False)
    assert not report.passed and report.to_dict()["checks"][1]["problem"] == "values"


# --- parts -----------------------------------------------------------------------------------------------------------


def test_axes_are_spread_over_trees():
    assert spread(({"a": None, "b": 1}, 0), ({"a": [1, 2], "b": 3}, (4, None, 5))) == [None, None, 1, 0, 0]


def test_a_call_knows_its_tensors():
    call = call_of(layer, (params(), X.numpy()), {}, in_axes=(None, 0))
    assert call.names == ["params['b']", "params['w']", "x"] and call.tensor_axes == [None, None, 0] and call.size == 5
    assert isinstance(call.args[1], torch.Tensor)


def test_variants_hold_the_same_samples():
    call = call_of(lambda x, y: x, (X, X.T), {}, in_axes=(0, 1))
    for variant in variants(call, 0):
        x, y = (t.movedim(axis, 0) for t, axis in zip(variant.call.tensors, variant.call.tensor_axes, strict=True))
        assert torch.equal(x, y), variant.name
        assert sorted(x.sum(1).tolist()) == sorted(X[: len(x)].sum(1).tolist()), variant.name
    names = [variant.name for variant in variants(call, 0)]
    assert names[:3] == ["axes moved: in_axes=(-1, 0)", "out_axes=-1", "samples permuted"]
    assert names[3:] == ["not contiguous", "batch of 1", "batch of 0"]


def test_a_permutation_moves_every_sample():
    for seed in range(20):
        call = Call(torch.sin, (torch.arange(5.0)[:, None],), {})
        [variant] = [variant for variant in variants(call, seed) if variant.alike]
        assert not (variant.call.args[0] == call.args[0]).any()
    assert permuted(call, torch.tensor([4, 0])).args[0].flatten().tolist() == [4.0, 0.0]
    assert cut(Call(torch.sin, (X.T,), {}, in_axes=1), 2).args[0].shape == (3, 2)


@pytest.mark.parametrize(
    "tensor",
    [X, X.T, X[:, ::2], X[:1].expand(4, 3), torch.tensor(1.0), X[:0], X[0].unfold(0, 2, 1), X.to(torch.bfloat16), X.to_sparse()],
)
def test_copies_keep_numbers_and_strides_and_share_no_memory(tensor):
    copy = copied(tensor)
    assert torch.equal(copy.to_dense(), tensor.to_dense()) and copy.dtype == tensor.dtype
    if tensor.layout is torch.strided and tensor.numel():
        assert copy.data_ptr() != tensor.data_ptr()
        if tensor.shape != (2, 2):  # windows that overlap are taken apart
            assert copy.stride() == tensor.stride()


def test_arrays_of_numpy_are_taken():
    assert check_vmap(torch.sin, X.numpy(), backends=("eager",), variants=False).passed
