"""``torchbatch check``: what it prints, what it refuses, and with which exit status."""

from __future__ import annotations

import doctest
import itertools
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from torchbatch import checking, cli
from torchbatch.testing.tolerance import Tolerance

MODEL = '''
import numpy as np
import torch

def score(x, w):
    return torch.tanh(x @ w).sum()

def by_hand(x, w):                          # off by a thousandth
    return torch.tanh(x @ w) * 1.001

def by_hand_well(x, w):
    return torch.tanh(x @ w)

def off(x):
    return x * 1.01 if torch._C._functorch.is_batchedtensor(x) else x * 1

def tree(params, x):
    return {"y": torch.tanh(params["w"] @ x + params["b"])}

def leaving(x):
    raise SystemExit(0)

def draws(x):
    return x + torch.rand(3)

def in_numpy(x, w):
    return np.tanh(x @ w).sum()

class Holder:
    model = torch.nn.Linear(3, 2)

number = 3
'''
PORT = '''
import jax
import jax.numpy as jnp

def score(x, w):
    return jnp.tanh(x @ w).sum()

def off(x, w):
    return score(x, w) * 1.01

compiled = jax.jit(score)
'''
BOTH = '''
import jax
import torch

def in_torch(x):
    return torch.sin(x)

def in_jax(x):
    return jax.numpy.sin(x)

def either(x):
    return 2 * x
'''
SCORE = ["--arg", "f32[8,3]", "--arg", "f32[3]"]
QUICK = ["--backends", "eager", "--no-variants", "--derivatives", "none"]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder with a few modules, as the current one; what is imported from it is forgotten afterwards."""
    for name, text in (("check_model", MODEL), ("check_port", PORT), ("check_both", BOTH)):
        (tmp_path / f"{name}.py").write_text(text)
    (tmp_path / "check_leaving.py").write_text("import sys\ndef f(x, w): return x\nsys.exit()\n")
    (tmp_path / "check_broken.py").write_text("raise ValueError('broken')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if "check_" in name:
            del sys.modules[name]


@pytest.fixture
def check(here, capsys):
    """Run the command: its exit status, what it printed, and its errors."""

    def run(*arguments):
        status = cli.main(["check", *arguments])
        return status, *capsys.readouterr()

    return run


def line(text, *words):
    """Whether there is a line with these words."""
    return any(row.split()[: len(words)] == list(words) for row in text.splitlines())


# --- it finds what differs and what does not -------------------------------------------------------------------------


def test_the_same(check):
    status, out, err = check("check_model:score", *SCORE, "--in-axes", "0,None", "--backends", "eager,traced")
    assert (status, err) == (0, "")
    assert out.startswith("torchbatch check check_model:score: ") and "failed" not in out
    assert line(out, "eager", "loop", "values", "as", "given", "✓", "ok")
    assert line(out, "traced", "loop", "reverse-mode", "gradient", "as", "given", "✓", "ok")
    assert line(out, "eager", "loop", "values", "batch", "of", "1", "✓", "ok")
    assert "arguments: f32[8,3] f32[3], drawn with seed 0" in out


def test_different(check):
    status, out, err = check("check_model:off", "--arg", "f32[4]", *QUICK)
    assert (status, err) == (1, "")
    assert re.search(r"off: 1 of \d checks? failed", out) and "4 of 4 differ" in out


@pytest.mark.parametrize(("name", "status"), [("by_hand", 1), ("by_hand_well", 0)])
def test_batched_by_hand(check, name, status):
    found, out, _ = check("check_model:score", *SCORE, "--in-axes", "0,None", "--batched", f"check_model:{name}", *QUICK)
    assert found == status
    assert line(out, "batched", "loop", "values", "as", "given", *(["✗", "FAILED"] if status else ["✓", "ok"]))


def test_a_tolerance_that_is_given(check):
    arguments = ["check_model:off", "--arg", "f32[4]", *QUICK]
    assert check(*arguments, "--tolerance", "0.1")[0] == 0
    assert check(*arguments, "--tolerance", "1e-3,0")[0] == 1


def test_trees_axes_and_files(check, here):
    status, out, _ = check(
        "check_model.py:tree", "--arg", '{"w": f32[4,3,8], "b": f32[4]}', "--arg", "f32[3,8]", "--out-axes=-1", *QUICK,
        "--in-axes=({'w': -1, 'b': None}, 1)",
    )  # fmt: skip
    assert status == 0 and "params['w']: float32[4, 3, 8], axis -1" in out
    np.save(here / "x.npy", np.ones((4, 3), np.float32))
    assert check("check_model:Holder.model", "--arg", "x.npy", *QUICK)[0] == 0


def test_random_numbers(check):
    arguments = ["check_model:draws", "--arg", "f32[4,3]", *QUICK]
    status, _, err = check(*arguments)
    assert status == 2 and "fails on these arguments, sample by sample: RandomnessError" in err
    assert check(*arguments, "--randomness", "different")[0] == 0


def test_the_seed_decides_the_numbers(check, here):
    arguments = ["check_model:off", "--arg", "f32[4]", *QUICK, "--json", "a.json"]
    worst = []
    for seed in (0, 0, 1):
        check(*arguments, "--seed", str(seed))
        (failed,) = [found for found in json.loads((here / "a.json").read_text())["checks"] if found["status"] == "failed"]
        worst.append(failed["leaves"][0]["worst"]["got"])
    assert worst[0] == worst[1] != worst[2]


# --- against another framework ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("other", ["check_port:score", "jax:check_port:score", "check_port.py:compiled"])
def test_against_jax(check, other):
    pytest.importorskip("jax")
    status, out, err = check("check_model:score", *SCORE, "--in-axes", "0,None", *QUICK, "--against", other)
    assert (status, err) == (0, "")
    name = other.removeprefix("jax:")
    assert line(out, "eager", "loop", "values")
    assert line(out, "check_model:score", name, "vmap", "as", "given", "✓", "ok")


def test_against_jax_as_it_is_with_derivatives(check):
    pytest.importorskip("jax")
    status, out, _ = check("check_model:score", *SCORE, "--against", "check_port:off")
    assert status == 1 and "3 of 3 checks failed" in out
    for what in ("values", "vjp", "jvp"):
        assert line(out, "check_model:score", "check_port:off", what, "as", "given", "✗", "FAILED")
    assert "eager" not in out.split()


def test_mapped_derivatives_of_both(check):
    pytest.importorskip("jax")
    options = ["--in-axes", "0,None", "--derivatives", "reverse", "--backends", "eager", "--no-variants"]
    status, out, _ = check("check_model:score", *SCORE, *options, "--against", "check_port:score")
    assert status == 0
    assert line(out, "check_model:score", "check_port:score", "vmap(vjp)") and "jvp" not in out
    assert line(out, "x:", "float32[8,", "3],", "axis", "0") and line(out, "w:", "float32[3],", "shared")


def test_against_numpy_and_against_pytorch(check):
    status, out, _ = check("check_model:score", *SCORE, "--against", "check_model:in_numpy")
    assert status == 0 and "NumPy has no vjp" in out
    status, out, _ = check("check_model:score", *SCORE, "--against", "check_model:score", "--derivatives", "none")
    assert status == 0 and line(out, "check_model:score", "check_model:score", "(torch)", "values")


def test_the_framework_is_what_the_function_uses_or_its_module_imports(here):
    pytest.importorskip("jax")
    found = {
        name: checking.load(name, "--against").framework()
        for name in (
            "check_both:in_torch",
            "check_both:in_jax",
            "torch:check_both:either",
            "check_port:off",
            "check_port:compiled",
            "check_model:in_numpy",
            "check_model:tree",
            "check_model:Holder.model",
            "math:sqrt",
        )
    }
    assert list(found.values()) == ["torch", "jax", "torch", "jax", "jax", "numpy", "torch", "torch", "torch"]


# --- files -----------------------------------------------------------------------------------------------------------


def test_files(check, here):
    status, out, _ = check("check_model:off", "--arg", "f32[4]", *QUICK, "--json", "a.json", "--html", "a.html")
    assert status == 1
    assert out.endswith("Report written to a.json\nReport written to a.html\n")
    report = json.loads((here / "a.json").read_text())
    assert report["passed"] is False and report["title"] == "torchbatch check check_model:off"
    assert report["arguments"] == [{"name": "x", "dtype": "float32", "shape": [4], "axis": 0}]
    assert report["outputs"] == [{"name": "output", "dtype": "float32", "shape": [4], "axis": 0}]
    page = (here / "a.html").read_text()
    assert page.startswith("<!DOCTYPE html>") and page.count('class="sheets"') == 2 and 'class="heat"' in page


def test_files_that_cannot_be_written(check, here):
    arguments = ["check_model:off", "--arg", "f32[4]", *QUICK]
    (here / "folder").mkdir()
    for option in ("--json", "--html"):
        status, out, err = check(*arguments, option, "folder")
        assert (status, out) == (2, "")
        assert err == f"torchbatch check: error: {option} folder: cannot be written: it is a folder.\n"
        status, out, err = check(*arguments, option, "nowhere/a")
        assert (status, out) == (2, "") and f"there is no folder {here / 'nowhere'}" in err


def test_a_disk_that_is_full(check):
    status, out, err = check("check_model:off", "--arg", "f32[4]", *QUICK, "--json", "/dev/full")
    assert status == 2 and "4 of 4 differ" in out
    assert err == "torchbatch check: error: --json /dev/full: cannot be written: No space left on device.\n"


# --- what cannot be carried out --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["check_model:scoer", *SCORE], "FUNCTION check_model:scoer: check_model has no 'scoer'; there is 'score'."),
        (["check_model:zzz", *SCORE], "FUNCTION check_model:zzz: check_model has no 'zzz'."),
        (["check_model", *SCORE], "FUNCTION check_model: write module:function or file.py:function."),
        ([":score", *SCORE], "FUNCTION :score: write module:function or file.py:function."),
        (["check_model:number", *SCORE], "FUNCTION check_model:number: number is no function, but 3 of type int."),
        (["check_nothing:f", *SCORE], "cannot import check_nothing: ModuleNotFoundError: No module named 'check_nothing'"),
        (["check_nothing.py:f", *SCORE], "cannot import check_nothing.py: FileNotFoundError: "),
        (["check_broken:f", *SCORE], "cannot import check_broken: ValueError: broken"),
        (["check_leaving:f", *SCORE], "check_leaving:f: what is checked, or the file that it is in, ends the program; put what"),
        (["check_model:leaving", "--arg", "f32[3]"], "under if __name__ == '__main__' (SystemExit: 0)."),
        (["check_model:score", "--arg", "f32[99999999999,99]"], "argument 'f32[99999999999,99]': an array of this shape cannot"),
        (["check_model:score", "--arg", "f33[2]"], "argument 'f33[2]': there is no dtype 'f33'"),
        (["check_model:score", "--arg", "x.npy"], "argument 'x.npy': cannot read the file"),
        (["check_model:score", *SCORE, "--in-axes", "0;None"], "--in-axes '0;None': write axes as Python does"),
        (["check_model:score", *SCORE, "--out-axes", "x"], "--out-axes 'x': write axes as Python does"),
        (["check_model:score", *SCORE, "--in-axes", "0,1"], "argument w is to be mapped over axis 1"),
        (["check_model:score", *SCORE, "--in-axes", "0.5"], "in_axes must be"),
        (["check_model:score", *SCORE, "--in-axes", "None"], "axis_size"),
        (["check_model:score", *SCORE, "--in-axes", "0,None", "--out-axes", "3"], "sample by sample: AxisError: out_axes is 3"),
        (["check_model:score", "--arg", "f32[8,3]"], "fails on these arguments, sample by sample: TypeError: score() missing"),
        (["check_model:score", "--arg", "f32[3]", "--against", "check_model:in_numpy"], "fails on these arguments: TypeError"),
        (["check_model:score", *SCORE, "--against", "check_nothing:f"], "--against check_nothing:f: cannot import"),
        (["check_model:score", *SCORE, "--batched", "check_model:x", "--in-axes", "0,None"], "--batched check_model:x: "),
    ],
)
def test_what_cannot_be_carried_out(check, arguments, text):
    status, out, err = check(*arguments)
    assert (status, out) == (2, "")
    assert err.startswith("torchbatch check: error: ") and text in err and "Traceback" not in err


def test_a_function_of_no_framework_or_two(check):
    pytest.importorskip("jax")
    status, _, err = check("check_both:in_torch", "--arg", "f32[3]", "--against", "check_both:either")
    assert status == 2
    assert "check_both:either: it may be PyTorch's or JAX's; write torch:check_both:either or jax:check_both:either." in err


def test_jax_is_not_there(check, monkeypatch):
    monkeypatch.setitem(sys.modules, "jax", None)
    status, _, err = check("check_model:score", *SCORE, "--against", "jax:check_model:in_numpy")
    assert status == 2 and "JAX, which is not installed: pip install 'torchbatch[jax]'" in err


def test_rich_is_not_there(check, monkeypatch):
    monkeypatch.setitem(sys.modules, "rich", None)
    status, out, err = check("check_model:off", "--arg", "f32[4]", *QUICK)
    assert (status, out) == (2, "")
    needed = "torchbatch check needs rich, which is not installed: pip install 'torchbatch[testing]'."
    assert err == f"torchbatch check: error: {needed}\n"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([], "the following arguments are required: FUNCTION, --arg"),
        (["m:f"], "the following arguments are required: --arg"),
        (["m:f", "--arg", "f32[]", "--backends", "eager,lop"], "argument --backends: there is no 'lop'; there are loop, eager"),
        (["m:f", "--arg", "f32[]", "--derivatives", "all"], "argument --derivatives: there is no 'all'; there are reverse"),
        (["m:f", "--arg", "f32[]", "--tolerance", "x"], "argument --tolerance: expected one or two numbers from 0 up"),
        (["m:f", "--arg", "f32[]", "--tolerance", "1,2,3"], "expected one or two numbers from 0 up"),
        (["m:f", "--arg", "f32[]", "--tolerance=-1"], "expected one or two numbers from 0 up"),
        (["m:f", "--arg", "f32[]", "--seed", "x"], "argument --seed: expected a whole number from 0 up, got 'x'"),
        (["m:f", "--arg", "f32[]", "--randomness", "none"], "argument --randomness: invalid choice: 'none'"),
        (["m:f", "--arg", "f32[]", "--agai", "m:g"], "unrecognized arguments: --agai m:g"),
    ],
)
def test_what_the_parser_refuses(capsys, arguments, text):
    with pytest.raises(SystemExit) as stop:
        cli.main(["check", *arguments])
    assert stop.value.code == 2
    assert text in capsys.readouterr().err


def test_options_are_read(monkeypatch):
    seen = []
    monkeypatch.setattr(checking, "run", lambda options: seen.append(options) or 0)
    assert cli.main(["check", "m:f", "--arg", "f32[]"]) == 0
    assert cli.main(["check", "m:f", "--arg", "1", "--arg", "2", "--axis-size", "3", "--tolerance", "1e-3,1e-5"]) == 0
    assert seen[0] == checking.Options("m:f", ["f32[]"])
    assert seen[1] == checking.Options("m:f", ["1", "2"], axis_size=3, tolerance=Tolerance(1e-3, 1e-5))


def test_help(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["check", "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for words in ("--in-axes AXES", "--against FUNCTION", "f32[8,3]", "exit status: 0 if all is the same", "--html FILE"):
        assert words in text


def test_everything_skipped_is_no_answer(check, monkeypatch):
    skipped = checking.Report("check_vmap(f)", ())
    monkeypatch.setattr(checking, "check_vmap", lambda *args, **options: skipped)
    status, _, err = check("check_model:off", "--arg", "f32[4]", *QUICK)
    assert status == 2 and "nothing could be compared: every check was skipped." in err


def test_an_error_within_the_check_is_no_difference(check, monkeypatch):
    """A bug is shown as one, and is not taken for an answer."""

    def broken(*args, **options):
        raise ZeroDivisionError

    monkeypatch.setattr(checking, "check_vmap", broken)
    with pytest.raises(ZeroDivisionError):
        check("check_model:off", "--arg", "f32[4]", *QUICK)


def test_the_page(tmp_path, monkeypatch, capsys):
    """Its commands print what it shows, in a folder with the files that it shows."""
    pytest.importorskip("jax")
    page = (Path(__file__).parent.parent / "docs" / "check_command.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```(\w+)\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    model, port = [text for kind, text in blocks if kind == "python" and ">>>" not in text]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name, text in (("model", model), ("port", port)):
        monkeypatch.delitem(sys.modules, name, raising=False)
        (tmp_path / f"{name}.py").write_text(text)
    commands = [(text, shown) for (kind, text), (_, shown) in itertools.pairwise(blocks) if kind == "sh"]
    assert len(commands) == 3
    for command, shown in commands:
        status = cli.main(shlex.split(command)[1:])
        printed = capsys.readouterr().out
        assert doctest.OutputChecker().check_output(shown, printed, doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE), printed
        assert status == ("failed" in shown)
    for name in ("model", "port"):
        del sys.modules[name]


def test_from_a_shell(here):
    command = [sys.executable, "-m", "torchbatch", "check", "check_model:off", "--arg", "f32[4]", *QUICK]
    done = subprocess.run(command, capture_output=True, text=True, cwd=here)
    assert done.returncode == 1 and done.stderr == ""
    assert "\x1b" not in done.stdout and "✗ FAILED" in done.stdout
