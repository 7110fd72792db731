"""The rules of the house, read off the source: floors, private names, imports, asserts, sizes."""

from __future__ import annotations

import ast
import functools
import re
import statistics
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "torchbatch"
FILES = sorted(PACKAGE.rglob("*.py"))
FLOORS = {
    "errors": 0,
    "_torch": 1,
    "core": 2,
    "tree": 3,
    "transforms": 3,
    "lax": 3,
    "random": 3,
    "per_example": 4,
    "__init__": 5,
    "testing": 6,
    "demo": 7,
    "checking": 7,
    "cli": 8,
    "__main__": 9,
}
OPTIONAL = {"jax", "matplotlib", "rich", "tqdm", "hypothesis", "pytest", "sklearn"}
PRIVATE = re.compile(r"^torch\.(\w+\.)*_(?!_)|^torch\.fx\.experimental")
LONGEST_FUNCTION, LONGEST_FILE, MEDIAN_FUNCTION = 60, 600, 10


def name_of(path: Path) -> str:
    return str(path.relative_to(PACKAGE.parent))


every_file = pytest.mark.parametrize("path", FILES, ids=name_of)


@functools.cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def module_of(path: Path) -> tuple[str, ...]:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return parts[:-1] if parts[-1] == "__init__" else parts


def top_of(path: Path) -> str:
    """What the floors are called after: ``core`` for ``torchbatch/core/tree.py``."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """The dotted names that a file imports, each with its line."""
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)}:{node.lineno} imports relative to itself"
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


def own_imports(path: Path) -> Iterator[tuple[str, int]]:
    """The parts of torchbatch that a file imports, without the package's name."""
    for name, line in imports(path):
        if name == "torchbatch" or name.startswith("torchbatch."):
            yield name.removeprefix("torchbatch").removeprefix("."), line


def functions(path: Path) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    return [node for node in ast.walk(parsed(path)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def length(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """The lines of a function, without its docstring."""
    first = function.body[0]
    documented = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str)
    doc = (first.end_lineno or 0) - first.lineno + 1 if documented else 0
    return (function.end_lineno or 0) - function.lineno + 1 - doc


def dotted(node: ast.AST) -> str:
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(parts)]) if isinstance(node, ast.Name) else ""


def private_names(path: Path) -> list[str]:
    """The private names of PyTorch that a file uses."""
    names = [(name, line) for name, line in imports(path)]
    names += [(dotted(node), node.lineno) for node in ast.walk(parsed(path)) if isinstance(node, ast.Attribute)]
    return [f"{name_of(path)}:{line} {name}" for name, line in names if PRIVATE.match(name)]


# --- floors ----------------------------------------------------------------------------------------------------------


def test_every_part_of_the_package_has_a_floor():
    assert {top_of(path) for path in FILES} <= FLOORS.keys()


@every_file
def test_imports_run_downwards_only(path):
    if top_of(path) == "__init__":
        return
    mine = FLOORS[top_of(path)]
    wrong = []
    for name, line in own_imports(path):
        top = name.split(".")[0]
        floor = FLOORS.get(top, FLOORS["__init__"])
        if floor > mine or (floor == mine and top != top_of(path)):
            wrong.append(f"{name_of(path)}:{line} imports torchbatch.{name}")
    assert not wrong


def test_no_files_import_each_other_in_a_circle():
    known = {".".join(module_of(path)): path for path in FILES}
    graph = {}
    for module, path in known.items():
        wanted = [f"torchbatch.{name}" for name, _ in own_imports(path) if name]
        graph[module] = {w if w in known else w.rpartition(".")[0] for w in wanted} - {"torchbatch", module}
    done: set[str] = set()

    def visit(module: str, above: tuple[str, ...]) -> None:
        assert module not in above, " -> ".join([*above, module])
        for other in graph.get(module, ()) if module not in done else ():
            visit(other, (*above, module))
        done.add(module)

    for module in graph:
        visit(module, ())


def test_the_oracle_shares_no_code_with_the_engine():
    shared = {name for name, _ in own_imports(PACKAGE / "testing" / "loop.py")}
    assert all(name == "tree" or name.startswith("errors.") for name in shared)


# --- names, imports, asserts -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [p for p in FILES if top_of(p) != "_torch"], ids=name_of)
def test_private_torch_is_used_in_one_room_only(path):
    assert private_names(path) == []


@every_file
def test_functions_import_optional_dependencies_only(path):
    inside = [node for f in functions(path) for node in ast.walk(f) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {f"{name_of(path)}:{n.lineno}": n.module or "" if isinstance(n, ast.ImportFrom) else n.names[0].name for n in inside}
    late = {where: name for where, name in names.items() if name.split(".")[0] not in OPTIONAL}
    # Loading the compiler takes a second, so that is done only where the caller is being compiled.
    assert {where: name for where, name in late.items() if not where.startswith("torchbatch/lax/named.py")} == {}


@every_file
def test_nothing_is_asserted(path):
    """An assert vanishes under ``python -O``, and says nothing to the user."""
    assert [node.lineno for node in ast.walk(parsed(path)) if isinstance(node, ast.Assert)] == []


@every_file
def test_no_exception_is_swallowed(path):
    silent = []
    for node in ast.walk(parsed(path)):
        if not isinstance(node, ast.ExceptHandler):
            continue
        broad = (
            node.type is None
            or dotted(node.type) in ("Exception", "BaseException")
            or (isinstance(node.type, ast.Name) and node.type.id in ("Exception", "BaseException"))
        )
        if broad and not any(isinstance(inner, ast.Raise) for inner in ast.walk(node)):
            silent.append(node.lineno)
    assert silent == []


@every_file
def test_nothing_is_left_to_do(path):
    assert not re.search(r"\b(TODO|FIXME|XXX|HACK)\b", path.read_text(encoding="utf-8"))


@every_file
def test_every_file_says_what_it_is_for(path):
    assert ast.get_docstring(parsed(path))


# --- sizes -----------------------------------------------------------------------------------------------------------


@every_file
def test_a_file_is_not_too_long(path):
    assert path.read_text(encoding="utf-8").count("\n") < LONGEST_FILE


@every_file
def test_a_function_can_be_seen_at_once(path):
    assert {f.name: length(f) for f in functions(path) if length(f) > LONGEST_FUNCTION} == {}


def test_most_functions_are_short():
    assert statistics.median(length(f) for path in FILES for f in functions(path)) < MEDIAN_FUNCTION


# --- the scan itself -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "private"),
    [
        ("import torch._C", True),
        ("from torch._C import _functorch", True),
        ("from torch.utils import _pytree", True),
        ("import torch\ntorch._foreach_add([])", True),
        ("import torch\ntorch.nn.modules._functions", True),
        ("from torch.fx.experimental.proxy_tensor import make_fx", True),
        ("import torch\ntorch.__version__", False),
        ("import torch\ntorch.nn.Linear", False),
        ("import torch\nx._version", False),
    ],
)
def test_the_scan_sees_private_names(source, private, tmp_path, monkeypatch):
    path = tmp_path / "torchbatch" / "file.py"
    path.parent.mkdir()
    path.write_text(source)
    monkeypatch.setitem(globals(), "PACKAGE", path.parent)
    assert bool(private_names(path)) is private
