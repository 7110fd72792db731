"""Every Python block of the pages and of the README runs, and every doctest of the package."""

from __future__ import annotations

import contextlib
import doctest
import importlib
import importlib.util
import inspect
import io
import pkgutil
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import torchbatch

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("docs/**/*.md"), *ROOT.glob("README.md")])
MODULES = ["torchbatch", *(module.name for module in pkgutil.walk_packages(torchbatch.__path__, "torchbatch."))]
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
BLOCK = re.compile(r"^```(python|text)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def blocks(text):
    """The Python blocks of a page: their line, their code, and the `text` block that directly follows, or None."""
    found = list(BLOCK.finditer(text))
    for i, block in enumerate(found):
        if block[1] == "python":
            after = found[i + 1] if i + 1 < len(found) else None
            shown = after and after[1] == "text" and not text[block.end() : after.start()].strip()
            yield text.count("\n", 0, block.start()) + 1, block[2], after[2] if shown else None


def run_session(code, names, where, line):
    """Run a block of `>>>` lines; the names that it defines stay in `names`."""
    test = doctest.DocTestParser().get_doctest(code, names, where, where, line)
    report = io.StringIO()
    test.globs = names
    failed, _ = doctest.DocTestRunner(optionflags=FLAGS).run(test, out=report.write, clear_globs=False)
    assert not failed, report.getvalue()


def run_script(code, shown, names, where, line):
    """Run a block without prompts, and compare what it printed with the block that follows it."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile("\n" * line + code, where, "exec"), names)
    if shown is not None and not doctest.OutputChecker().check_output(shown, printed.getvalue(), FLAGS):
        pytest.fail(f"{where}:{line} shows\n{shown}\nbut printed\n{printed.getvalue()}")


def run_page(text, where):
    names = {"__name__": "__main__"}
    for line, code, shown in blocks(text):
        if ">>>" in code:
            run_session(code, names, where, line)
        else:
            run_script(code, shown, names, where, line)
    return names


def assert_shown(report, texts):
    """A page of the report opens in a browser, if there is one, without an error, and shows some texts."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
    shown = report.read_text(encoding="utf-8")
    if browser is not None:
        command = [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={report.parent / 'profile'}"]
        command += ["--enable-logging=stderr", "--dump-dom", report.as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        assert "CONSOLE" not in done.stderr
        shown = done.stdout
    words = " ".join(re.sub("<[^>]*>", "", shown).split())
    for text in texts:
        assert text in words


def skip_without_what_it_imports(text):
    """Skip a text with examples for JAX where there is none; CI has it."""
    if re.search(r"^(>>> | +>>> )?import .*\bjax\b", text, re.MULTILINE):
        pytest.importorskip("jax")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_page(page):
    text = page.read_text(encoding="utf-8")
    skip_without_what_it_imports(text)
    names = run_page(text, str(page))
    if page.stem == "porting_from_jax":
        assert_shown(names["folder"] / "first_try.html", ["✕ torch, values", "aten.native_layer_norm", "torch is off"])
        assert_shown(names["folder"] / "port.html", ["4 checks passed", "torch jit"])


@pytest.mark.parametrize("name", MODULES)
def test_module(name):
    if name.endswith("__main__"):
        pytest.skip("importing it would run the program")
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("torchbatch"):
            raise
        pytest.skip(f"needs {error.name}")
    skip_without_what_it_imports(inspect.getsource(module))
    report = io.StringIO()
    runner = doctest.DocTestRunner(optionflags=FLAGS)
    for test in doctest.DocTestFinder(exclude_empty=True).find(module):
        runner.run(test, out=report.write)
    assert not runner.failures, report.getvalue()


class TestTheRunnerItself:
    def test_names_live_on_from_block_to_block(self):
        run_page("```python\nx = 2\n```\ntext\n```python\n>>> x + 1\n3\n```\n", "page.md")

    @pytest.mark.parametrize(
        "page",
        ["```python\n>>> 1 + 1\n3\n```\n", "```python\nprint(1 + 1)\n```\n\n```text\n3\n```\n"],
        ids=["session", "script"],
    )
    def test_a_wrong_output_fails(self, page):
        with pytest.raises((AssertionError, pytest.fail.Exception)):
            run_page(page, "page.md")

    def test_a_script_is_compared_with_the_text_that_follows_at_once(self):
        run_page("```python\nprint(2)\n```\n\n```text\n2\n```\n", "page.md")
        run_page("```python\nprint(2)\n```\n\nwords\n\n```text\n3\n```\n", "page.md")


def test_pictures_are_those_that_the_script_draws():
    folder = ROOT / "docs" / "pictures"
    spec = importlib.util.spec_from_file_location("draw", folder / "draw.py")
    draw = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(draw)
    measured = {"growth", "private_training", "hardest_examples"}  # by benchmarks/jit_growth.py and docs/pictures/tutorials.py
    assert {path.stem for path in folder.glob("*.svg")} - measured == set(draw.PICTURES)
    for name, picture in draw.PICTURES.items():
        assert (folder / f"{name}.svg").read_text(encoding="utf-8") == picture().svg(), f"run {folder / 'draw.py'}"


def test_every_public_name_is_in_the_reference():
    pages = "".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs" / "api").glob("*.md"))
    documented = set(re.findall(r"(?:autofunction|autoclass|automodule):: torchbatch\.(\w+)", pages))
    assert set(torchbatch.__all__) <= documented
