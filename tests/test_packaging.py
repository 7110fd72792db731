"""What is shipped: the wheel's contents, its metadata, the versions that are pinned, the two commands."""

from __future__ import annotations

import configparser
import re
import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from importlib import metadata
from pathlib import Path

import pytest

import torchbatch as tb

ROOT = Path(__file__).resolve().parents[1]
BUILD = "from setuptools import build_meta; import sys; build_meta.build_wheel(sys.argv[1])"


@pytest.fixture(scope="module")
def config():
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    return parser


@pytest.fixture(scope="module")
def tox():
    parser = configparser.ConfigParser()
    parser.read(ROOT / "tox.ini", encoding="utf-8")
    return parser


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel built from a copy of the tree."""
    tree = tmp_path_factory.mktemp("tree")
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE", "torchbatch_pytest.py"):
        shutil.copy(ROOT / name, tree)
    shutil.copytree(ROOT / "torchbatch", tree / "torchbatch", ignore=shutil.ignore_patterns("__pycache__"))
    subprocess.run([sys.executable, "-c", BUILD, "dist"], cwd=tree, check=True, capture_output=True)
    (path,) = (tree / "dist").glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        yield archive


@pytest.fixture(scope="module")
def headers(wheel):
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    return Parser().parsestr(wheel.read(name).decode())


def pins():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def requirement_names(text):
    return [re.match(r"[\w.-]+", line.strip())[0].lower() for line in text.splitlines() if line.strip()]


def test_the_wheel_holds_every_file_of_the_package_and_no_other(wheel):
    files = {str(path.relative_to(ROOT)) for path in (ROOT / "torchbatch").rglob("*") if path.is_file()}
    expected = {name for name in files if "__pycache__" not in name} | {"torchbatch_pytest.py"}
    found = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert found == expected
    assert {"torchbatch/py.typed", "torchbatch/data/digits/digits.npz", "torchbatch/data/digits/NOTICE.md"} <= found


def test_the_wheel_holds_the_licences(wheel):
    names = " ".join(wheel.namelist())
    assert ".dist-info/licenses/LICENSE" in names
    assert ".dist-info/licenses/torchbatch/data/digits/NOTICE.md" in names


def test_the_metadata(headers):
    assert headers["Name"] == "torchbatch"
    assert headers["Version"] == tb.__version__
    assert headers["Requires-Python"] == ">=3.10"
    assert "Apache-2.0" in (headers["License-Expression"] or headers["License"])
    required = [line for line in headers.get_all("Requires-Dist") if "extra ==" not in line]
    assert sorted(required) == ["numpy>=1.26", "optree>=0.13", "torch>=2.11"]
    extras = ["all", "bench", "demo", "docs", "jax", "privacy", "progress", "test", "testing"]
    assert sorted(headers.get_all("Provides-Extra")) == extras


def test_the_extra_all_is_all_of_them(config):
    extras = config["options.extras_require"]
    inside = re.search(r"torchbatch\[([\w,]+)\]", extras["all"])[1].split(",")
    assert sorted([*inside, "all"]) == sorted(extras)


def test_the_console_script(wheel):
    (name,) = (name for name in wheel.namelist() if name.endswith("entry_points.txt"))
    assert wheel.read(name).decode().split("\n")[:2] == ["[console_scripts]", "torchbatch = torchbatch.cli:main"]


def test_the_entry_point_of_pytest(wheel):
    """It is named like its module, so that ``-p torchbatch_pytest`` finds it loaded already."""
    (name,) = (name for name in wheel.namelist() if name.endswith("entry_points.txt"))
    assert "[pytest11]\ntorchbatch_pytest = torchbatch_pytest\n" in wheel.read(name).decode()


def test_the_installed_version_is_this_one():
    try:
        installed = metadata.version("torchbatch")
    except metadata.PackageNotFoundError:
        pytest.skip("torchbatch is not installed, only on the path")
    assert installed == tb.__version__


def test_the_changelog_names_the_version():
    assert f"\n## {tb.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_constraints_are_exact():
    assert "torch==2.13.0" in pins()
    for pin in pins():
        assert re.fullmatch(r'[a-z0-9-]+==[\w.]+(; python_version (<|>=) "3\.11")?', pin), pin


def test_everything_required_is_pinned(config):
    extras = config["options.extras_require"]
    required = requirement_names(config["options"]["install_requires"])
    for extra in set(extras) - {"all"}:
        required += requirement_names(extras[extra])
    pinned = {pin.split("==")[0] for pin in pins()}
    assert set(required) | {"ruff", "mypy", "tox"} <= pinned


def test_pyproject_holds_the_build_system_only():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert re.findall(r"^\[.*\]$", text, re.MULTILINE) == ["[build-system]"]


def test_every_environment_is_constrained_but_those_that_choose_their_own_torch(tox):
    names = {name.removeprefix("testenv:") for name in tox.sections() if name.startswith("testenv:")}
    benchmarks, long = {"bench", "bench-jit", "bench-per-example", "bench-random"}, {"sweep", "jit", "random", "coverage"}
    assert names == {"tests", "lint", "docs", "demo", "torch-latest", "torch-oldest", *benchmarks, *long}
    assert tox["tox"]["env_list"] == "tests, lint, docs, demo, bench"
    assert tox["testenv"]["constraints"] == "{tox_root}{/}constraints.txt"
    for name in names:
        assert ("constraints" in tox[f"testenv:{name}"]) == name.startswith("torch-")


def test_the_readme_has_two_commands_and_ci_runs_the_second():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```sh\n(.*?)^```$", readme, re.MULTILINE | re.DOTALL)
    first, second = block.splitlines()
    assert "python -m torchbatch demo" in first
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    pattern = re.search(r"grep -m 1 '(.*?)' README\.md", script)[1]
    assert [line for line in readme.splitlines() if re.search(pattern, line)] == [second]
    assert "set -euo pipefail" in script
    assert "exec </dev/null" in script
    assert "tox run -e lint,docs" in script


def test_the_licence_is_the_apache_licence():
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in text and "Version 2.0, January 2004" in text and "END OF TERMS AND CONDITIONS" in text
