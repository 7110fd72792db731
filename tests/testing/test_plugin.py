"""The pytest plugin: silent and cheap when unused, one test for each backend when used, and what it says of differences."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import torchbatch
import torchbatch_pytest
from torchbatch.errors import AxisError, AxisSpecError, EquivalenceError, OutputTypeError
from torchbatch.testing.plugin import Batched, run_marked
from torchbatch.testing.tolerance import Tolerance
from torchbatch.testing.ways import BACKENDS

pytest_plugins = ["pytester"]

OFF = """
import torch
from torch.overrides import TorchFunctionMode

def off(x):                                 # [a] -> [a]: one percent more where the loop does not look
    return x if str(type(x)) and not torch._C._functorch.is_batchedtensor(x) else x * 1.01
"""


@pytest.fixture(scope="module")
def everything_imported():
    """A run in this process forgets the modules that were first imported in it; JAX cannot be imported twice."""
    for backend in ("eager", "chunked", "traced", "nested", *(["jax"] if importlib.util.find_spec("jax") else [])):
        with pytest.raises(EquivalenceError):
            Batched(backend)(off_by(0.5), jax=lambda x: 2 * x)(torch.ones(2))


@pytest.fixture
def run(pytester, everything_imported):
    """Run a file of tests with the plugin, in this process."""

    def run(code, *options):
        pytester.makepyfile(test_it=code)
        return pytester.runpytest_inprocess("-p", "torchbatch_pytest", "-p", "no:cacheprovider", "-v", *options)

    return run


def passed(result):
    """The tests that passed, in order."""
    return re.findall(r"::(\S+) PASSED", result.stdout.str())


# --- unused ----------------------------------------------------------------------------------------------------------


def alone(folder, *options):
    code = "import sys, pytest; pytest.main(sys.argv[1:]); print([m in sys.modules for m in ('torch', 'torchbatch', 'numpy')])"
    command = [sys.executable, "-c", code, "-p", "no:cacheprovider", "-p", "no:randomly", *options, str(folder)]
    root = str(Path(torchbatch_pytest.__file__).parent)
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env={"PYTHONPATH": root, "PATH": ""})
    shown = re.sub(r"^plugins: .*\n", "", done.stdout, flags=re.MULTILINE)  # where it is installed pytest names it there
    return re.sub(r"in \d+\.\d+s", "in 0 s", shown), done.stderr


def test_a_run_that_does_not_use_it_prints_nothing_more_and_imports_nothing(tmp_path):
    (tmp_path / "test_other.py").write_text("def test_one(tmp_path): assert True\n\n\ndef test_two(): assert 1 + 1 == 3\n")
    without = alone(tmp_path, "-p", "no:torchbatch_pytest")
    assert alone(tmp_path, "-p", "torchbatch_pytest", "--strict-markers", "--strict-config") == without
    assert "1 failed, 1 passed" in without[0] and without[0].endswith("[False, False, False]\n")


def test_a_fixture_of_the_same_name_wins(run):
    code = "import pytest\n@pytest.fixture\ndef batched(): return 3\ndef test_it(batched): assert batched == 3\n"
    assert passed(run(code)) == ["test_it"]


def test_a_parameter_of_the_same_name_wins(run):
    code = "import pytest\n@pytest.mark.parametrize('batched', [1, 2])\ndef test_it(batched): assert batched in (1, 2)\n"
    assert passed(run(code)) == ["test_it[1]", "test_it[2]"]


# --- options ---------------------------------------------------------------------------------------------------------

USED = "def test_it(batched):\n    pass\n\n\ndef test_other(): pass\n"


def test_by_default_the_loop_and_eager(run):
    assert passed(run(USED)) == ["test_it[loop]", "test_it[eager]", "test_other"]


@pytest.mark.parametrize(("given", "ids"), [("eager", ["eager"]), ("traced, loop,traced", ["traced", "loop"])])
def test_backends_from_the_command_line(run, given, ids):
    assert passed(run(USED, f"--torchbatch-backends={given}")) == [*(f"test_it[{name}]" for name in ids), "test_other"]


def test_backends_from_a_file_and_the_command_line_over_it(run, pytester):
    pytester.makeini("[pytest]\ntorchbatch_backends = nested,loop\n")
    assert passed(run(USED, "--strict-config")) == ["test_it[nested]", "test_it[loop]", "test_other"]
    assert passed(run(USED, "--torchbatch-backends=eager")) == ["test_it[eager]", "test_other"]


@pytest.mark.parametrize(
    ("given", "what"),
    [("egaer", "there is no backend 'egaer'"), ("loop,a,b", "there is no backend 'a', 'b'"), (",", "no backend is named")],
)
def test_unknown_backends_are_a_usage_error(run, given, what):
    result = run(USED, f"--torchbatch-backends={given}")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    text = f"ERROR: --torchbatch-backends: {what}; there are loop, eager, chunked, traced, jit, nested, compile, jax"
    assert text in result.stderr.str()


def test_an_unknown_backend_in_a_file_is_one_too(run, pytester):
    pytester.makeini("[pytest]\ntorchbatch_backends = lop\n")
    result = run(USED)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert "torchbatch_backends: there is no backend 'lop'" in result.stderr.str()


def test_the_backends_are_those_of_check_vmap_and_two_more():
    assert set(torchbatch_pytest.BACKENDS) == {"loop", "jax", *BACKENDS}


def test_help_and_markers(pytester):
    text = pytester.runpytest_inprocess("-p", "torchbatch_pytest", "--help").stdout.str()
    assert "--torchbatch-backends=NAMES" in text and "(default: loop,eager)" in re.sub(r"\s+", " ", text)
    assert "@pytest.mark.torchbatch(in_axes=0, out_axes=0" in pytester.runpytest_inprocess(
        "-p", "torchbatch_pytest", "--markers"
    ).stdout.str()


# --- the fixture -----------------------------------------------------------------------------------------------------


def test_the_fixture(run):
    code = """
import pytest, torch

@pytest.mark.parametrize("n", [2, 5])
def test_it(batched, torchbatch_backend, n):
    out = batched(torch.dot, in_axes=(0, None))(torch.ones(n, 3), torch.ones(3))
    assert out.tolist() == [3.0] * n and repr(batched) == f"Batched({torchbatch_backend!r})"
"""
    names = ("loop", "eager", "chunked", "traced", "nested")
    found = passed(run(code, f"--torchbatch-backends={','.join(names)}", "--strict-markers"))
    assert sorted(found) == sorted(f"test_it[{name}-{n}]" for name in names for n in (2, 5))


def test_a_difference_is_shown_in_a_section_of_its_own(run):
    code = f"{OFF}\ndef test_it(batched):\n    batched(off)(torch.ones(4, 3))\n"
    result = run(code, "--torchbatch-backends=loop,eager")
    assert passed(result) == ["test_it[loop]"]
    text = result.stdout.str()
    assert "EquivalenceError: eager does not give what the loop gives: output: 12 of 12 differ" in text
    assert "the float64 reference says that eager is off" in text
    section = text.partition("--- torchbatch ---")[2]
    assert "batched(off): 1 of 1 check failed" in section and "x: float32[4, 3], mapped over axis 0" in section
    assert "torchbatch/testing" not in text  # the traceback ends in the test


def test_nothing_is_printed_of_what_passes(run):
    code = "import torch\ndef test_it(batched):\n    batched(torch.sin)(torch.ones(3))\n"
    result = run(code, "-rA")
    assert len(passed(result)) == 2
    assert "--- torchbatch" not in result.stdout.str() and not re.search("checks? (passed|failed)", result.stdout.str())


def test_an_error_of_check_vmap_is_not_shown_twice(run):
    code = "from torchbatch.testing.report import Report\ndef test_it():\n    Report('check_vmap(f)').raise_if_failed()\n"
    text = run(code).stdout.str()
    assert "check_vmap(f): nothing checked" in text and "--- torchbatch ---" not in text


def test_it_goes_with_hypothesis(run):
    code = """
import torch
from hypothesis import given, settings, strategies as st

@settings(max_examples=5, deadline=None, database=None)
@given(n=st.integers(1, 5))
def test_it(batched, n):
    assert batched(torch.sum)(torch.ones(n, 2)).shape == (n,)
"""
    assert passed(run(code)) == ["test_it[loop]", "test_it[eager]"]


def test_tests_stay_in_their_order(run):
    code = "def test_a(batched): pass\ndef test_b(): pass\ndef test_c(batched): pass\n"
    assert passed(run(code)) == ["test_a[loop]", "test_a[eager]", "test_b", "test_c[loop]", "test_c[eager]"]


def test_in_two_processes(pytester):
    pytest.importorskip("xdist")
    pytester.makepyfile(test_it=MARKED)
    result = pytester.runpytest_subprocess("-p", "torchbatch_pytest", "-v", "-n", "2")
    result.assert_outcomes(passed=8)
    assert {"test_all[loop]", "test_all[eager]"} <= set(re.findall(r"PASSED \S+::(\S+)", result.stdout.str()))


# --- JAX -------------------------------------------------------------------------------------------------------------

JAX = """
import torch

def test_with(batched):
    mapped = batched(lambda x, w: torch.tanh(x @ w), (0, None), jax=lambda x, w: jax.numpy.tanh(x @ w))
    out = mapped(torch.ones(4, 3), torch.ones(3))
    assert out.shape == (4,) and isinstance(out, torch.Tensor)

def test_without(batched):
    batched(torch.tanh)(torch.ones(4, 3))
"""


def test_jax(run):
    pytest.importorskip("jax")
    result = run(f"import jax\n{JAX}", "--torchbatch-backends=jax", "-rs")
    assert passed(result) == ["test_with[jax]"]
    assert "the backend jax needs the same function in JAX, which this test does not give: jax=..." in result.stdout.str()


def test_jax_is_not_there(run, monkeypatch):
    monkeypatch.setattr(torchbatch_pytest.importlib.util, "find_spec", lambda name: None)
    result = run(JAX, "--torchbatch-backends=loop,jax", "-rs")
    assert passed(result) == ["test_with[loop]", "test_without[loop]"]
    assert "the backend jax needs JAX, which is not installed: pip install 'torchbatch[jax]'" in result.stdout.str()


def test_a_marked_test_is_skipped_without_jax_too(run, monkeypatch):
    monkeypatch.setattr(torchbatch_pytest.importlib.util, "find_spec", lambda name: None)
    run(MARKED, "--torchbatch-backends=jax").assert_outcomes(skipped=4)


def test_jax_that_is_off():
    jax = pytest.importorskip("jax")
    with pytest.raises(EquivalenceError, match=r"jax does not give what the loop gives: output: 4 of 4 differ"):
        Batched("jax")(torch.sin, jax=jax.numpy.cos)(torch.ones(4))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.int64, torch.bfloat16, torch.complex128])
def test_results_of_jax_have_the_dtypes_of_the_loop(dtype):
    pytest.importorskip("jax")
    found = Batched("jax")(lambda x: {"y": x * 2}, jax=lambda x: {"y": x * 2})(torch.ones(4, 3).to(dtype))
    assert found["y"].dtype is dtype and found["y"].tolist() == [[2] * 3] * 4


# --- the marker ------------------------------------------------------------------------------------------------------

MARKED = """
import pytest, torch

@pytest.fixture
def x():
    return torch.arange(12.0).reshape(4, 3)

@pytest.fixture
def w():
    return torch.ones(3)

@pytest.mark.torchbatch(in_axes=(0, None))
def test_tuple(x, w):
    assert x.shape == w.shape == (3,)
    return x @ w

class TestDict:
    @pytest.mark.torchbatch(in_axes={"x": 0})
    @pytest.mark.parametrize("k", [1, 2])
    def test_it(self, k, w, x):
        assert x.shape == (3,)
        return {"y": k * x @ w}

@pytest.mark.torchbatch
def test_all(x):
    return x.sum()
"""


def test_marked_tests(run):
    found = passed(run(MARKED, "--torchbatch-backends=loop,eager,traced", "--strict-markers"))
    names = ["test_tuple[{}]", "TestDict::test_it[{}-1]", "TestDict::test_it[{}-2]", "test_all[{}]"]
    assert sorted(found) == sorted(name.format(backend) for name in names for backend in ("loop", "eager", "traced"))


def test_a_marked_test_that_differs(run):
    code = "import pytest\n@pytest.fixture\ndef x(): return torch.ones(4, 3)\n"
    code += "@pytest.mark.torchbatch\ndef test_it(x): return off(x)\n"
    result = run(f"{OFF}\n{code}")
    assert passed(result) == ["test_it[loop]"]
    assert "eager does not give what the loop gives: output: 12 of 12 differ" in result.stdout.str()
    assert "batched(test_it): 1 of 1 check failed" in result.stdout.str()


def test_a_marked_test_fails_in_the_loop_where_it_asserts(run):
    code = "import pytest, torch\n@pytest.mark.torchbatch\ndef test_it(x):\n    assert x < 3\n    return x\n"
    code += "@pytest.fixture\ndef x(): return torch.arange(5)\n"
    result = run(code, "--torchbatch-backends=loop")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["E*assert tensor(3) < 3"])


def test_a_marked_test_has_to_return_something():
    def test_it(x):
        assert x.shape == ()

    with pytest.raises(OutputTypeError, match=r"test_it has the marker torchbatch, but returns nothing: return the arrays"):
        run_marked(test_it, {"x": torch.ones(3)}, "loop")


def test_axes_of_arguments_that_are_not_there():
    with pytest.raises(AxisSpecError, match=r"in_axes names 'z', but the test has the arguments x, y\."):
        run_marked(lambda x, y: x, {"x": 1, "y": 2, "request": 3}, "loop", {"x": 0, "z": 1})


def test_options_that_the_marker_does_not_have():
    with pytest.raises(AxisSpecError, match=r"the marker torchbatch has no option 'in_axis'; pytest --markers lists those"):
        run_marked(lambda x: x, {"x": torch.ones(3)}, "loop", in_axis=0)


def test_a_marked_test_of_unittest_is_refused(run):
    code = "import pytest, unittest\nclass TestIt(unittest.TestCase):\n    @pytest.mark.torchbatch\n    def test_it(self): pass\n"
    result = run(f"{code}    def test_other(self): pass\n")
    result.assert_outcomes(passed=1, errors=1)
    result.stdout.fnmatch_lines(["the marker torchbatch does not go with unittest.TestCase*"])


def test_a_marked_test_of_hypothesis_is_refused():
    from hypothesis import given, strategies

    @given(strategies.integers())
    def test_it(x):
        return x

    with pytest.raises(AxisSpecError, match=r"does not go with @given: use the fixture batched within the test instead"):
        run_marked(test_it, {}, "loop")


def test_the_page(run):
    """Its tests run, with the outcome that it shows."""
    page = (Path(torchbatch_pytest.__file__).parent / "docs" / "pytest_plugin.md").read_text(encoding="utf-8")
    blocks = [block for block in re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL) if ">>>" not in block]
    (options,) = re.findall(r"^```sh\npytest (.*)$", page, re.MULTILINE)
    shown = re.findall(r"^test_page\.py::(\S+) PASSED$", page, re.MULTILINE)
    assert passed(run("\n".join(blocks), *options.split())) == shown and len(shown) == 9


# --- the comparison --------------------------------------------------------------------------------------------------


def off_by(share):
    """A function that is off where it is mapped by the engine."""
    return lambda x: x * (1 + share) if torch._C._functorch.is_batchedtensor(x) else x * 1


def traced_off(x):
    """A function that is off where it is traced for a compiler."""
    return x + 1 if torch.compiler.is_compiling() or torch._C._functorch.is_batchedtensor(x) else x + 2


def test_the_error_has_the_report():
    with pytest.raises(EquivalenceError) as caught:
        Batched("eager")(off_by(0.5), in_axes=1)(torch.ones(2, 3))
    report = caught.value.report
    assert str(report.arguments[0]) == "x: float32[2, 3], mapped over axis 1"
    assert [check.problem for check in report.failures] == ["values"]
    assert report.precision is not None


@pytest.mark.parametrize(("tolerance", "fails"), [(1e-2, False), (Tolerance(1e-2, 0.0), False), (1e-5, True), (None, True)])
def test_tolerances(tolerance, fails):
    mapped = Batched("eager")(off_by(1e-3), tolerance=tolerance)
    if fails:
        with pytest.raises(EquivalenceError):
            mapped(torch.ones(3))
    else:
        assert mapped(torch.ones(3)).shape == (3,)


@pytest.mark.parametrize("tolerance", [-1, True, "1e-5", float("nan")])
def test_tolerances_it_refuses(tolerance):
    with pytest.raises(AxisSpecError, match=r"tolerance must be a number from 0 up, a Tolerance or None, but it is"):
        Batched("eager")(torch.sin, tolerance=tolerance)


def test_errors_are_those_of_vmap():
    for backend in ("loop", "eager", "traced"):
        with pytest.raises(AxisError):
            Batched(backend)(torch.add)(torch.ones(2), torch.ones(3))


def test_an_error_that_only_the_loop_raises_is_one():
    def fails(x):
        if not torch._C._functorch.is_batchedtensor(x):
            raise KeyError("only here")
        return x

    with pytest.raises(KeyError, match="only here"):
        Batched("eager")(fails)(torch.ones(3))


@pytest.mark.parametrize("backend", ["loop", "eager", "traced"])
def test_what_the_function_writes_is_written_once(backend):
    def bump(x):
        return x.add_(1).sum()

    x = torch.zeros(3, 2)
    assert Batched(backend)(bump)(x).tolist() == [2.0] * 3
    assert x.tolist() == [[1.0] * 2] * 3


def test_what_only_one_of_both_writes_is_a_difference():
    def leaking(x):
        return x.add_(1).sum() if torch._C._functorch.is_batchedtensor(x) else (x + 1).sum()

    with pytest.raises(EquivalenceError, match="eager does not give what the loop gives: input x: afterwards it is not"):
        Batched("eager")(leaking)(torch.zeros(3, 2))


@pytest.mark.parametrize("backend", ["loop", "eager"])
def test_results_can_be_differentiated(backend):
    x = torch.ones(3, 2, requires_grad=True)
    Batched(backend)(lambda x: (x**2).sum())(x).sum().backward()
    assert x.grad.tolist() == [[2.0] * 2] * 3


def test_compiled():
    with pytest.raises(EquivalenceError, match="compile does not give what the loop gives"):
        Batched("compile")(traced_off)(torch.ones(4))


def test_without_a_reference_nobody_is_blamed():
    weights = torch.ones(3)

    def single(x):                          # in float64 it raises an error
        return x @ weights * (1.5 if torch._C._functorch.is_batchedtensor(x) else 1)

    with pytest.raises(EquivalenceError, match=r"4 of 4 differ") as caught:
        Batched("eager")(single)(torch.ones(4, 3))
    assert "reference" not in str(caught.value)


@pytest.mark.parametrize("randomness", ["different", "same"])
def test_of_random_results_the_shapes_count(randomness):
    before = torch.get_rng_state()
    found = Batched("eager")(lambda x: x + torch.rand(3), randomness=randomness)(torch.zeros(4, 3))
    once = torch.get_rng_state()
    torch.set_rng_state(before)
    alone = torchbatch.vmap(lambda x: x + torch.rand(3), randomness=randomness)(torch.zeros(4, 3))
    assert torch.equal(found, alone) and torch.equal(once, torch.get_rng_state())
    assert bool((found == found[0]).all()) == (randomness == "same")


def test_of_random_results_dtypes_count_too():
    def drawn(x):
        return torch.rand(3, dtype=torch.float64 if torch._C._functorch.is_batchedtensor(x) else torch.float32) + x

    with pytest.raises(EquivalenceError, match="dtype float64 instead of float32"):
        Batched("eager")(drawn, randomness="different")(torch.zeros(4, 3))


def test_keyword_arguments_and_modules():
    linear = torch.nn.Linear(3, 2)
    found = Batched("eager")(lambda m, x: m(x), in_axes=(None,))(linear, x=torch.ones(4, 3))
    assert torch.allclose(found, linear(torch.ones(4, 3)))


def test_a_batch_of_one_cannot_be_cut():
    with pytest.raises(pytest.skip.Exception, match="a batch of 1 cannot be cut into chunks"):
        Batched("chunked")(torch.sin)(torch.ones(1))
