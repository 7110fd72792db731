"""What is public: every name can be imported, is documented with an example, and has type hints."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
import types
import typing
from pathlib import Path

import pytest

import torchbatch
from torchbatch import errors

PUBLIC = ["torchbatch", "torchbatch.tree", "torchbatch.testing", "torchbatch.lax", "torchbatch.per_example", "torchbatch.random"]
NAMES = [(module, name) for module in PUBLIC for name in importlib.import_module(module).__all__]
THINGS = {f"{module}.{name}": getattr(importlib.import_module(module), name) for module, name in NAMES}
CALLABLE = {name: thing for name, thing in THINGS.items() if isinstance(thing, types.FunctionType)}
ERRORS = [cls for cls in vars(errors).values() if isinstance(cls, type) and issubclass(cls, Exception)]


@pytest.mark.parametrize("module", PUBLIC)
def test_all_is_sorted_and_complete(module):
    found = importlib.import_module(module)
    assert list(found.__all__) == sorted(set(found.__all__), key=found.__all__.index)
    assert all(hasattr(found, name) and not name.startswith("_") for name in found.__all__)


@pytest.mark.parametrize("module", PUBLIC)
def test_star_imports_give_what_is_public(module):
    space: dict[str, object] = {}
    exec(f"from {module} import *", space)
    assert set(importlib.import_module(module).__all__) <= space.keys()


def test_every_module_can_be_imported():
    names = [info.name for info in pkgutil.walk_packages(torchbatch.__path__, "torchbatch.")]
    assert "torchbatch.transforms.vmap" in names
    for name in names:
        if not name.endswith("__main__"):
            importlib.import_module(name)


@pytest.mark.parametrize("name", THINGS)
def test_what_is_public_is_documented(name):
    doc = inspect.getdoc(THINGS[name])
    assert doc and doc.splitlines()[0].strip().endswith((".", ":"))


@pytest.mark.parametrize("name", CALLABLE)
def test_functions_are_documented_with_a_runnable_example(name):
    doc = inspect.getdoc(CALLABLE[name]) or ""
    assert "Example" in doc and ">>> " in doc


@pytest.mark.parametrize("name", [name for name in CALLABLE if not name.startswith("torchbatch.tree.")])
def test_every_parameter_is_documented(name):
    doc = inspect.getdoc(CALLABLE[name]) or ""
    for parameter in inspect.signature(CALLABLE[name]).parameters.values():
        if parameter.kind is not parameter.VAR_KEYWORD or parameter.name != "unknown":
            assert re.search(rf"\b{parameter.name}\b[^\n]*:", doc), parameter.name


@pytest.mark.parametrize("name", CALLABLE)
def test_functions_have_type_hints(name):
    signature = inspect.signature(CALLABLE[name])
    assert signature.return_annotation is not inspect.Signature.empty
    assert all(p.annotation is not inspect.Parameter.empty for p in signature.parameters.values())


def test_classes_are_documented():
    for name, thing in THINGS.items():
        if isinstance(thing, type):
            assert inspect.getdoc(thing), name


def test_the_package_is_typed():
    assert (Path(torchbatch.__file__).parent / "py.typed").exists()


def test_the_version():
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.dev\d+)?", torchbatch.__version__)


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", ERRORS, ids=lambda cls: cls.__name__)
def test_errors_are_documented_and_built_in(cls):
    assert inspect.getdoc(cls)
    assert cls.__module__ == "torchbatch.errors"
    if issubclass(cls, errors.TorchbatchError) and cls is not errors.TorchbatchError:
        assert issubclass(cls, ValueError | TypeError | RuntimeError | AssertionError)
        assert cls.__name__ in (errors.__doc__ or "")


@pytest.mark.parametrize("line", [line for line in (errors.__doc__ or "").splitlines() if re.match(r"[A-Z]\w+Error  ", line)])
def test_the_table_of_errors_is_true(line):
    name, also, _ = re.split(r"\s{2,}", line, maxsplit=2)
    bases = [getattr(__builtins__, base, None) or vars(importlib.import_module("builtins"))[base] for base in also.split(", ")]
    assert all(issubclass(getattr(errors, name), base) for base in bases)


def test_warnings_are_warnings():
    assert issubclass(errors.FallbackWarning, UserWarning)


# --- the signatures of JAX -------------------------------------------------------------------------------------------


def spelled(fun):
    return [(p.name, p.kind, p.default) for p in inspect.signature(fun).parameters.values()]


def test_vmap_has_the_parameters_of_jax():
    jax = pytest.importorskip("jax")
    theirs = spelled(jax.vmap)
    assert len(theirs) == 7 and spelled(torchbatch.vmap)[:7] == theirs


@pytest.mark.parametrize(
    "name", ["grad", "value_and_grad", "jacfwd", "jacrev", "hessian", "jvp", "vjp", "linearize", "checkpoint", "eval_shape"]
)
def test_the_gradient_family_has_the_parameters_of_jax(name):
    jax = pytest.importorskip("jax")
    theirs = inspect.signature(getattr(jax, name)).parameters.values()
    ours = list(inspect.signature(getattr(torchbatch, name)).parameters.values())
    about_devices = {"reduce_axes", "prevent_cse", "policy", "static_argnums", "concrete"}
    wanted = [p.name for p in theirs if p.name not in about_devices]
    assert [p.name for p in ours if p.name not in about_devices][: len(wanted)] == wanted


def test_hints_can_be_resolved():
    for fun in CALLABLE.values():
        assert "return" in typing.get_type_hints(fun)
