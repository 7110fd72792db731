"""Optional dependencies: imported where they are needed, with a text that says how to get them."""

from __future__ import annotations

import importlib
import sys
from typing import Any

_NAMES = {"jax": "JAX"}


def require(module: str, who: str, extra: str) -> Any:
    """The module, imported now.

    Args:
        module: its name, such as ``"jax"``.
        who: what needs it, for the text of the error.
        extra: the extra of torchbatch that installs it.

    Raises:
        ImportError: it is not installed; the text says how to get it.

    Example:
        >>> from torchbatch.testing.optional import require
        >>> require("json", "an example", "test").dumps([1])
        '[1]'
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.split(".")[0]
        if error.name != package:
            raise  # it is installed, but something that it needs is not
        name = _NAMES.get(package, package)
        raise ImportError(f"{who} needs {name}, which is not installed: pip install 'torchbatch[{extra}]'.") from error


def imported(module: str) -> Any:
    """The module if somebody has imported it, else None: without JAX imported, no value can be JAX's."""
    return sys.modules.get(module)
