"""A function as Python source, with all that it names: closed-over values, globals, other functions."""

from __future__ import annotations

import ast
import builtins
import dis
import functools
import inspect
import linecache
import math
import operator
import symtable
import textwrap
import types
from collections.abc import Iterator
from typing import Any

import torch

from torchbatch.testing.literals import Writer, from_library

__all__ = ["FunctionWriter"]

_HOMES: dict[str, Any] = {
    "torch": torch,
    "torch.nn.functional": torch.nn.functional,
    "torch.linalg": torch.linalg,
    "torch.special": torch.special,
    "torch.fft": torch.fft,
    "torch.Tensor": torch.Tensor,
    "math": math,
    "operator": operator,
}


class FunctionWriter(Writer):
    """A writer that also writes functions."""

    def other(self, value: Any, name: str) -> str:
        """Functions and modules, and what a :class:`Writer` writes."""
        if isinstance(value, types.ModuleType):
            return self.library(value.__name__)
        if callable(value) and not isinstance(value, type | torch.nn.Module):
            return self.function(value, name)
        return super().other(value, name)

    def function(self, fun: Any, name: str) -> str:
        """An expression for a function: its name, where it is defined above."""
        if isinstance(fun, functools.partial):
            return self._partial(fun, name)
        home = _home(fun)
        if home is not None:
            self.library(home.partition(".")[0])
            return home
        if not isinstance(fun, types.FunctionType):
            return self.supplied(name, f"a callable {type(fun).__module__}.{type(fun).__qualname__}")
        if from_library(fun.__module__) and fun.__qualname__.isidentifier():
            return f"{self.library(fun.__module__)}.{fun.__qualname__}"
        return self._defined(fun, name)

    def _partial(self, fun: functools.partial[Any], name: str) -> str:
        self.library("functools")
        inner = self.function(fun.func, name)
        args = [self.value(value, f"{name}_{i}") for i, value in enumerate(fun.args)]
        args += [f"{key}={self.value(value, key)}" for key, value in fun.keywords.items()]
        return f"functools.partial({', '.join([inner, *args])})"

    def _defined(self, fun: types.FunctionType, name: str) -> str:
        """The name of a function whose source is put above, behind that of all that it names."""
        plain = inspect.unwrap(fun)
        found = None if not isinstance(plain, types.FunctionType) else _source(plain, name)
        if found is None:
            return self.supplied(name if name.isidentifier() else "f", f"the function {fun.__module__}.{fun.__qualname__}")
        name, source = found
        if self.taken.get(name) in (fun, plain):
            return name
        if name in self.taken:
            return self.supplied(self.fresh(name), f"{fun.__qualname__}: the name {name!r} stands for something else, too")
        self.taken[name] = fun
        for used, value in _named(plain, source):
            self.define(used, value)
        self.definitions.append(source)
        return name

    def define(self, name: str, value: Any) -> None:
        """Let a name that the source uses stand for its value."""
        if name in self.taken:
            if self.taken[name] is not value and name not in self.missing:
                self.missing[name] = "a name that stands for two things"
            return
        if isinstance(value, types.ModuleType):
            self.taken[name] = value
            self.imports[f"import {value.__name__}" + (f" as {name}" if name != value.__name__ else "")] = None
            return
        if isinstance(value, type):
            self._define_type(name, value)
            return
        if not callable(value) or isinstance(value, torch.nn.Module):
            self.taken[name] = value
        written = self._written_for(name, value)
        if written != name:
            self.taken[name] = value
            self.definitions.append(f"{name} = {written}")

    def _define_type(self, name: str, value: type) -> None:
        written = self.class_name(value)
        if written != name:
            self.taken[name] = value
            self.definitions.append(f"{name} = {written}")

    def _written_for(self, name: str, value: Any) -> str:
        """A value that a name is to stand for; the name itself, if it has to be supplied."""
        before = set(self.missing)
        written = self.value(value, name)
        new = set(self.missing) - before
        if written in new:
            self.missing[name] = self.missing.pop(written)
            return name
        return written


# --- finding sources -------------------------------------------------------------------------------------------------


def _home(fun: Any) -> str | None:
    """The full name by which a function of PyTorch or of the standard library is found."""
    name = getattr(fun, "__name__", "")
    for home, module in _HOMES.items():
        short = name.removeprefix(home.rpartition(".")[2] + "_")  # torch.linalg.norm calls itself linalg_norm
        for known in (name, short):
            if known and getattr(module, known, None) is fun:
                return f"{home}.{known}"
    return None


def _source(fun: types.FunctionType, name: str) -> tuple[str, str] | None:
    """The name of a function and its source, as it stands at the top of a file; None where it is not known."""
    if fun.__name__ == "<lambda>":
        text = _lambda_source(fun)
        name = name if name.isidentifier() else "f"
        return None if text is None else (name, f"{name} = {text}")
    try:
        source = textwrap.dedent(inspect.getsource(fun)).rstrip()
        compile(source, "<source>", "exec")
    except (OSError, TypeError, SyntaxError):
        return None
    return fun.__name__, source


def _lambda_source(fun: types.FunctionType) -> str | None:
    """The source of a lambda, found by its line and its code."""
    code = fun.__code__
    lines = linecache.getlines(code.co_filename, fun.__globals__)
    try:
        parsed = ast.parse("".join(lines))
    except SyntaxError:
        return None
    at_line = [node for node in ast.walk(parsed) if isinstance(node, ast.Lambda) and node.lineno == code.co_firstlineno]
    alike = [node for node in at_line if len(at_line) == 1 or (_code(node, code) and _at_place(node, code))]
    if len({ast.dump(node) for node in alike}) != 1:
        return None  # rather none than another one
    segment = ast.get_source_segment("".join(lines), alike[0]) or ""
    return f"({segment})" if "\n" in segment else segment


def _at_place(node: ast.Lambda, code: types.CodeType) -> bool:
    """Whether the code begins where a lambda does; Python 3.10 does not tell."""
    places: Any = getattr(code, "co_positions", None)
    start = (node.body.lineno, node.body.col_offset)
    return places is None or any((line, column) == start for line, _, column, _ in places())


def _code(node: ast.Lambda, code: types.CodeType) -> bool:
    """Whether a lambda compiles to this code."""
    found = next(const for const in compile(ast.unparse(node), "", "eval").co_consts if isinstance(const, types.CodeType))
    used, wanted = {*found.co_names, *found.co_freevars}, {*code.co_names, *code.co_freevars}
    same = found.co_varnames == code.co_varnames and used == wanted
    return same and _constants(found) == _constants(code) and _operations(found) == _operations(code)


def _constants(code: types.CodeType) -> list[Any]:
    return [repr(const) for const in code.co_consts if not isinstance(const, types.CodeType) and const is not None]


def _operations(code: types.CodeType) -> list[tuple[str, str]]:
    """The operators in a piece of code; what reads a variable depends on where the code stands."""
    steps = dis.get_instructions(code)
    return [(step.opname, step.argrepr) for step in steps if step.opname.startswith(("BINARY_", "COMPARE_"))]


# --- what a function names -------------------------------------------------------------------------------------------


class _Bare(ast.NodeTransformer):
    """Takes the annotations out: they are not evaluated in the program."""

    def visit_arg(self, node: ast.arg) -> ast.arg:
        node.annotation = None
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.returns = None
        return self.generic_visit(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        node.annotation = ast.Constant(None)
        return self.generic_visit(node)


def _global_names(source: str) -> list[str]:
    """The names that a piece of source takes from outside."""
    bare = ast.unparse(ast.fix_missing_locations(_Bare().visit(ast.parse(source))))
    found: dict[str, None] = {}

    def look(table: symtable.SymbolTable) -> None:
        for symbol in table.get_symbols():
            outside = symbol.is_global() if table.get_type() == "function" else not symbol.is_assigned()
            if symbol.is_referenced() and outside:
                found[symbol.get_name()] = None
        for child in table.get_children():
            look(child)

    top = symtable.symtable(bare, "<source>", "exec")
    look(top)
    own = {symbol.get_name() for symbol in top.get_symbols() if symbol.is_assigned()}
    return [name for name in found if name not in own]


def _named(fun: types.FunctionType, source: str) -> Iterator[tuple[str, Any]]:
    """The names that a function takes from outside, with their values; built-in ones are left out."""
    enclosed = _enclosed(fun)
    defaults = _defaults(fun, source)
    for name in _global_names(source):
        for scope in (enclosed, fun.__globals__, defaults):
            if name in scope:
                if scope is defaults or not hasattr(builtins, name) or scope[name] is not getattr(builtins, name):
                    yield name, scope[name]
                break


def _enclosed(fun: types.FunctionType) -> dict[str, Any]:
    """The values that a function closes over."""
    found = {}
    for name, cell in zip(fun.__code__.co_freevars, fun.__closure__ or (), strict=True):
        try:
            found[name] = cell.cell_contents
        except ValueError:  # not set yet
            continue
    return found


def _defaults(fun: types.FunctionType, source: str) -> dict[str, Any]:
    """The values of names that are the default of a parameter: ``scale`` in ``lambda x, k=scale: k * x``."""
    nodes = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef | ast.Lambda))
    arguments = next(nodes).args
    pairs = list(zip(arguments.defaults, fun.__defaults__ or (), strict=False))
    keywords = fun.__kwdefaults__ or {}
    pairs += [(node, keywords[a.arg]) for a, node in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True) if node]
    return {node.id: value for node, value in pairs if isinstance(node, ast.Name)}
