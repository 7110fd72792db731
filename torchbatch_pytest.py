"""The pytest plugin of torchbatch, as far as pytest has to know it before a test asks for it.

pytest loads the plugins of an environment into every run, whatever is tested. So this module imports neither PyTorch nor
torchbatch, prints nothing, and changes nothing about tests that use neither its fixture nor its marker. What it does for those
that do is in ``torchbatch.testing.plugin``.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Generator
from typing import Any

import pytest

BACKENDS = ("loop", "eager", "chunked", "traced", "jit", "nested", "compile", "jax")
DEFAULT = "loop,eager"
MARKER = (
    "torchbatch(in_axes=0, out_axes=0, *, jax=None, axis_name=None, axis_size=None, randomness='error', tolerance=None): "
    "the test is a function of one sample; its arguments are batches, and what it returns must be the same in all backends."
)
_FIXTURE = "torchbatch_backend"


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--torchbatch-backends``, and the same as a setting in a file."""
    text = f"how tests of torchbatch are run, some of {','.join(BACKENDS)}"
    group = parser.getgroup("torchbatch", "torchbatch")
    group.addoption("--torchbatch-backends", metavar="NAMES", default=None, help=f"{text} (default: {DEFAULT})")
    parser.addini("torchbatch_backends", f"{text}, where the command line does not say", default=DEFAULT)


def pytest_configure(config: pytest.Config) -> None:
    """Register the marker; a backend that does not exist is an error before any test is run."""
    config.addinivalue_line("markers", MARKER)
    _backends(config)


def _backends(config: pytest.Config) -> list[str]:
    given, where = config.getoption("torchbatch_backends"), "--torchbatch-backends"
    if given is None:
        given, where = config.getini("torchbatch_backends"), "torchbatch_backends"
    names = [name.strip() for name in given.split(",") if name.strip()]
    unknown = [name for name in names if name not in BACKENDS]
    if unknown or not names:
        what = f"there is no backend {', '.join(map(repr, unknown))}" if unknown else "no backend is named"
        raise pytest.UsageError(f"{where}: {what}; there are {', '.join(BACKENDS)}")
    return list(dict.fromkeys(names))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test for each backend, of those that ask for it."""
    if metafunc.definition.get_closest_marker("torchbatch") and _FIXTURE not in metafunc.fixturenames:
        metafunc.fixturenames.append(_FIXTURE)
    if _FIXTURE in metafunc.fixturenames:
        # The fixtures are there for the whole session, so that tests of hypothesis may use them; each test has its own backend.
        metafunc.parametrize(_FIXTURE, _backends(metafunc.config), indirect=True, scope="function")


def _available(backend: Any) -> str:
    """The backend, or the test is skipped."""
    if backend == "jax" and importlib.util.find_spec("jax") is None:
        pytest.skip("the backend jax needs JAX, which is not installed: pip install 'torchbatch[jax]'")
    return str(backend)


@pytest.fixture(scope="session")
def torchbatch_backend(request: pytest.FixtureRequest) -> str:
    """The name of the backend that this test is run in."""
    return _available(request.param)


@pytest.fixture(scope="session")
def batched(torchbatch_backend: str) -> Any:
    """``batched(fun, in_axes=0, out_axes=0)(*args)``: ``vmap``, in this test's backend, held against the loop."""
    return _plugin().Batched(torchbatch_backend)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """A test with the marker that pytest does not run by itself would be run as it is, and pass."""
    if isinstance(item, pytest.Function) and item.get_closest_marker("torchbatch"):
        callspec = getattr(item, "callspec", None)
        if callspec is None or _FIXTURE not in callspec.params:
            pytest.fail("the marker torchbatch does not go with unittest.TestCase: write a plain class.", pytrace=False)


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run a test with the marker: not itself, but mapped over its arguments."""
    __tracebackhide__ = True
    marker = pyfuncitem.get_closest_marker("torchbatch")
    if marker is None:
        return None
    backend = _available(pyfuncitem.callspec.params[_FIXTURE])
    _plugin().run_marked(pyfuncitem.obj, pyfuncitem.funcargs, backend, *marker.args, **marker.kwargs)
    return True


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(call: pytest.CallInfo[None]) -> Generator[None, Any, None]:
    """Put the report of what differs under a test that failed by it, in a section of its own."""
    outcome = yield
    error: Any = call.excinfo.value if call.excinfo is not None else None
    if type(error).__name__ == "EquivalenceError" and getattr(error, "report", None) is not None:
        text = str(error.report)
        if text not in str(error):
            outcome.get_result().sections.append(("torchbatch", text))


def _plugin() -> Any:
    return importlib.import_module("torchbatch.testing.plugin")
