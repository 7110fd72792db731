"""Files with a function compiled ahead of time: in a fresh process, and for other machines and versions."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import pytest
import torch

import torchbatch
from torchbatch import jit, load, tree, vmap
from torchbatch._torch import package
from torchbatch.errors import CompilerError, UnsupportedOperationError
from torchbatch.testing import assert_close

WEIGHTS = torch.linspace(-1, 1, 15).reshape(5, 3)
X = torch.linspace(0, 1, 20).reshape(4, 5)

# What runs in another process. There is no compiler, nothing may be traced, and the function is nowhere to be found.
FRESH = """
import sys
import torch, torchbatch
from torchbatch._torch import graphs

def refuse(*args, **kwargs):
    raise SystemExit("something was traced")

graphs.trace = refuse
found = torchbatch.load(sys.argv[1])
cases = torch.load(sys.argv[2])
results = []
for args, kwargs in cases:
    torch.manual_seed(0)
    results.append((found(*args, **kwargs), args, [leaf._version for leaf in torchbatch.tree.leaves(args)]))
torch.save(results, sys.argv[3])
"""


class Pair:
    """A node that is known to no one before it is registered."""

    def __init__(self, first, second):
        self.first, self.second = first, second


tree.register_node(Pair, lambda pair: ((pair.first, pair.second), None), lambda _, children: Pair(*children))


def model(mode, x, state, scale=1.0):
    """A bit of everything: a static argument, a tree, a number, captured tensors, a write in place, constants, draws."""
    state["count"].add_(1)
    rows = vmap(lambda row: torch.tanh(row @ WEIGHTS))(x)
    best = {"sum": rows.sum, "max": rows.amax}[mode](0)
    return {"best": best * scale + torch.tensor([1.0, 2.0, 3.0]), "noise": (torch.rand(2), x.T)}


def state():
    return {"count": torch.zeros(2)}


def in_another_process(path, cases, folder):
    """What the function in a file returns for each of ``cases``, and the arguments afterwards."""
    torch.save(cases, folder / "cases")
    env = {**os.environ, "CXX": "/nowhere/c++", "PYTHONPATH": str(Path(torchbatch.__file__).parent.parent)}
    done = subprocess.run(
        [sys.executable, "-c", FRESH, path, folder / "cases", folder / "results"],
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return torch.load(folder / "results")


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_it_runs_in_a_fresh_process(backend, tmp_path):
    jitted = jit(model, static_argnames="mode", backend=backend)
    jitted.lower("max", X, state(), scale=2.0).compile().save(tmp_path / "f")
    cases = [((x, state()), {"scale": scale}) for x, scale in ((X, 2.0), (X - 1, -0.5))]
    results = in_another_process(tmp_path / "f", cases, tmp_path)
    for (args, kwargs), (found, after, versions) in zip(cases, results, strict=True):
        expected_state = state()
        torch.manual_seed(0)
        expected = model("max", args[0], expected_state, **kwargs)
        assert_close(found, expected)
        assert_close(after[1], expected_state)
        assert versions[0] < versions[1]  # autograd is told what was written


def test_open_sizes_run_in_a_fresh_process(tmp_path):
    compiled = jit(vmap(lambda x: torch.tanh(x) * WEIGHTS[:, 0] + x.sum()), dynamic=True).lower(X).compile()
    compiled.save(tmp_path / "f")
    cases = [((torch.randn(size, 5),), {}) for size in (2, 7, 100)]
    for ((x,), _), (found, *_) in zip(cases, in_another_process(tmp_path / "f", cases, tmp_path), strict=True):
        assert_close(found, torch.tanh(x) * WEIGHTS[:, 0] + x.sum(1, keepdim=True))


def test_a_result_is_not_a_constant_of_the_package(tmp_path):
    jit(lambda x: (x, torch.tensor([1.0, 2.0])), backend="eager").lower(X).compile().save(tmp_path / "f")
    found = load(tmp_path / "f")
    found(X)[1].add_(100)
    assert_close(found(X)[1], torch.tensor([1.0, 2.0]))


# --- files that do not fit -------------------------------------------------------------------------------------------


@pytest.fixture
def path(tmp_path):
    jit(lambda pair: Pair(pair.first + 1, pair.second), backend="eager").lower(Pair(X, X)).compile().save(tmp_path / "f")
    return tmp_path / "f"


def changed(path, **about):
    """Say other things about the package in a file."""
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    parts["torchbatch.json"] = json.dumps({**json.loads(parts["torchbatch.json"]), **about}).encode()
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in parts.items():
            archive.writestr(name, data)


def refused(path, error=UnsupportedOperationError):
    with pytest.raises(error) as caught:
        load(path)
    return str(caught.value).replace(str(path), "PATH")


def test_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "nothing")


def test_another_file(tmp_path):
    (tmp_path / "f").write_text("hello")
    assert refused(tmp_path / "f") == "load: PATH is not a file that Compiled.save wrote."
    torch.save(X, tmp_path / "g")  # a zip archive, too
    assert refused(tmp_path / "g") == "load: PATH is not a file that Compiled.save wrote."


def test_another_version(path):
    changed(path, torch="1.0.0")
    mine = torch.__version__.partition("+")[0]
    assert refused(path) == (
        f"load: PATH was made with torch 1.0.0, but this is torch {mine}. Compiled code fits one version: save it again with "
        f"this one."
    )
    changed(path, format=99)
    assert refused(path) == "load: PATH has format 99, but this torchbatch reads 1."


def test_another_machine(path):
    changed(path, processor="z80")
    load(path)  # operations run anywhere
    changed(path, compiled=True)
    found = refused(path)
    assert found.startswith("load: PATH holds machine code for another processor: z80, but this is ")
    assert found.endswith("Save it on a machine like this one, or for any machine with jit(…, backend='eager').")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_missing(path):
    changed(path, devices=["cpu", "cuda"])
    assert refused(path, CompilerError) == "load: PATH holds code for a GPU, but this machine has none that PyTorch can use."


def test_a_class_of_a_module_that_is_missing(path, monkeypatch):
    assert_close(load(path)(Pair(X, X)).first, X + 1)
    monkeypatch.delitem(globals(), "Pair")
    assert refused(path).startswith("load: PATH needs a class that cannot be found: ")


def test_a_class_is_registered_by_its_module(tmp_path):
    """The module of the class is imported when the file is loaded, and registers it then."""
    (tmp_path / "shapes_of_mine.py").write_text(
        textwrap.dedent(
            """
            import dataclasses
            from torchbatch import tree

            @dataclasses.dataclass
            class Box:
                low: object
                high: object

            tree.register_dataclass(Box)
            """
        )
    )
    here = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import torch; from torchbatch import jit, load\n"
    save = """
        from shapes_of_mine import Box
        box = Box(torch.zeros(2), torch.ones(2))
        jit(lambda b: Box(b.high, b.low), backend="eager").lower(box).compile().save(sys.argv[1])
    """
    use = """
        found = load(sys.argv[1])
        from shapes_of_mine import Box
        result = found(Box(torch.zeros(2), torch.ones(2)))
        print(type(result).__name__, result.low.tolist())
    """
    env = {**os.environ, "PYTHONPATH": str(Path(torchbatch.__file__).parent.parent)}
    for code, said in ((save, ""), (use, "Box [1.0, 1.0]\n")):
        done = subprocess.run(
            [sys.executable, "-c", here + textwrap.dedent(code), tmp_path / "f"], env=env, capture_output=True, text=True
        )
        assert (done.returncode, done.stdout) == (0, said), done.stderr


# --- the parts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        torch.randn(100, 7)[3:5].T,
        torch.randn(3).expand(4, 3),
        torch.randn(0, 3),
        torch.tensor(2.0),
        torch.ones(3, dtype=torch.complex64).conj(),
        torch.ones(3, requires_grad=True),
    ],
    ids=["view", "expanded", "empty", "number", "conjugate", "leaf"],
)
def test_a_captured_tensor_keeps_values_and_strides(value):
    found = package._alone(value)
    assert_close(found, value.detach())
    assert found.stride() == value.stride() and not found.requires_grad
    assert found.untyped_storage().nbytes() <= max(value.numel(), 16) * value.element_size()
