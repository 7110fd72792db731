"""A graph compiled ahead of time, in a file that another process can run without tracing and without a compiler.

The file is a zip archive: ``torchbatch.json`` says for what it was made, ``graph.pt2`` holds the code, ``captured.pt`` the
captured tensors, ``call.pickle`` what is needed to check arguments and to build the output.

The compiler and ``torch.export`` are imported where they are needed. That takes a second; running compiled code needs neither.

Private names used, seen on torch 2.11, 2.13 and 2.15: ``torch._inductor.aoti_compile_and_package``;
``torch._C._aoti.AOTIModelPackageLoader``.
"""

from __future__ import annotations

import copy
import importlib
import io
import json
import os
import platform
import tempfile
import threading
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.fx import GraphModule

from torchbatch._torch import graphs
from torchbatch._torch.graphs import Trace
from torchbatch._torch.likes import Like, stand_ins
from torchbatch.errors import CompilerError, UnsupportedOperationError

if TYPE_CHECKING:
    from torch.export import ExportedProgram

Run = Callable[[list[torch.Tensor]], Sequence[torch.Tensor]]

_ABOUT, _GRAPH, _CAPTURED, _CALL = "torchbatch.json", "graph.pt2", "captured.pt", "call.pickle"
_FORMAT = 1


class Package(NamedTuple):
    """What a file holds.

    Attributes:
        graph: the code, or the operations to replay.
        captured: the captured tensors.
        call: a pickle of what surrounds the graph.
    """

    graph: bytes
    captured: list[torch.Tensor]
    call: bytes


# --- making ----------------------------------------------------------------------------------------------------------


def exported(trace: Trace, likes: Sequence[Like]) -> ExportedProgram:
    """The graph of a trace without gradients, in the form that PyTorch can save.

    It writes the new values of its inputs itself, or, if one is computed from another one, returns them after the outputs.

    Args:
        trace: the trace.
        likes: its inputs and captured tensors; where the trace left a size open, some size that it may have.
    """
    module = trace.graph if graphs.writes_cross(trace) else graphs.written_in_place(trace)
    own = GraphModule(module, copy.deepcopy(module.graph))  # the compiler changes what it is given
    if trace.sizes is None:
        return torch.export.export(own, tuple(stand_ins(likes)), strict=False)
    real = tuple(torch.empty_strided(like.size, like.stride, dtype=like.dtype, device=like.device) for like in likes)
    return torch.export.export(own, real, dynamic_shapes=_open_axes(trace), strict=False)


def _open_axes(trace: Trace) -> tuple[dict[int, Any] | None, ...]:
    sizes: list[tuple[Any, ...]] = [tuple(value.size()) for value in trace.examples]
    axes = [[axis for axis, size in enumerate(found) if isinstance(size, torch.SymInt)] for found in sizes]
    return tuple(dict.fromkeys(entries, torch.export.Dim.DYNAMIC) or None for entries in axes)


def compiled(program: ExportedProgram, settings: Mapping[str, Any]) -> bytes:
    """A graph as machine code, made with these settings of Inductor.

    Raises:
        CompilerError: the compiler failed, or there is none.
    """
    inductor = importlib.import_module("torch._inductor")
    options = {name: value for name, value in settings.items() if name != "triton.cudagraphs"}  # they belong to one process
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        path = os.path.join(folder, _GRAPH)
        try:
            inductor.aoti_compile_and_package(program, package_path=path, inductor_configs=options)
        except Exception as error:
            raise importlib.import_module("torchbatch._torch.inductor").explained(error) from error
        return Path(path).read_bytes()


def replayed(program: ExportedProgram) -> bytes:
    """A graph as a list of operations, which :func:`opened` runs one by one."""
    program.example_inputs = None
    file = io.BytesIO()
    torch.export.save(program, file)
    return file.getvalue()


def write(path: str | os.PathLike[str], package: Package, *, is_compiled: bool, devices: Sequence[str]) -> None:
    """Write a package to a file: all of it, or nothing."""
    captured = io.BytesIO()
    torch.save([_alone(value) for value in package.captured], captured)
    about = {"format": _FORMAT, "torch": _release(), "compiled": is_compiled, "devices": sorted(devices), **_machine(devices)}
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(_ABOUT, json.dumps(about, indent=1))
        archive.writestr(_GRAPH, package.graph)
        archive.writestr(_CAPTURED, captured.getvalue())
        archive.writestr(_CALL, package.call)
    _put(Path(os.path.realpath(path)), file.getvalue())


def _put(path: Path, content: bytes) -> None:
    """Write a file beside the old one first, which stays what it is until the new one is complete."""
    beside = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}")
    try:
        beside.write_bytes(content)
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def _alone(value: torch.Tensor) -> torch.Tensor:
    """The same values and strides in memory that holds nothing else; a view would be saved with all of its base."""
    value = value.detach()
    count = 1 + sum((size - 1) * stride for size, stride in zip(value.size(), value.stride(), strict=True))
    whole = value.as_strided((count if value.numel() else 0,), (1,)).clone()
    return whole.as_strided(value.size(), value.stride(), 0)


# --- opening ---------------------------------------------------------------------------------------------------------


def read(path: str | os.PathLike[str]) -> tuple[Package, bool]:
    """The package in a file, and whether its graph is compiled.

    Raises:
        FileNotFoundError: there is no such file.
        UnsupportedOperationError: it holds no package, or one for another machine or another version.
    """
    name = os.fspath(path)
    with open(path, "rb") as file:
        if not zipfile.is_zipfile(file):
            raise UnsupportedOperationError(f"load: {name} is not a file that Compiled.save wrote.")
        with zipfile.ZipFile(file) as archive:
            if not {_ABOUT, _GRAPH, _CAPTURED, _CALL} <= set(archive.namelist()):
                raise UnsupportedOperationError(f"load: {name} is not a file that Compiled.save wrote.")
            about = json.loads(archive.read(_ABOUT))
            _check_fits(about, name)
            captured = torch.load(io.BytesIO(archive.read(_CAPTURED)), weights_only=True)
            return Package(archive.read(_GRAPH), captured, archive.read(_CALL)), about["compiled"]


def opened(graph: bytes, is_compiled: bool) -> Run:
    """What runs the graph of a package."""
    if not is_compiled:
        module = torch.export.load(io.BytesIO(graph)).module()
        return lambda values: module(*values)
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, _GRAPH)
        Path(path).write_bytes(graph)
        loader: Any = torch._C._aoti.AOTIModelPackageLoader
        run: Run = loader(path, "model", False, 1, -1).run  # it takes the code out of the file at once
        return run


def _release() -> str:
    return torch.__version__.partition("+")[0]


def _machine(devices: Sequence[str]) -> dict[str, Any]:
    """What compiled code depends on."""
    found: dict[str, Any] = {
        "system": platform.system(),
        "processor": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
    }
    if "cuda" in devices and torch.cuda.is_available():
        found["gpu"] = "compute capability {}.{}".format(*torch.cuda.get_device_capability())
    return found


def _check_fits(about: Mapping[str, Any], name: str) -> None:
    """Refuse what was made for another version or another machine."""
    if about["format"] != _FORMAT:
        raise UnsupportedOperationError(f"load: {name} has format {about['format']}, but this torchbatch reads {_FORMAT}.")
    if about["torch"] != _release():
        raise UnsupportedOperationError(
            f"load: {name} was made with torch {about['torch']}, but this is torch {_release()}. Compiled code fits one version: "
            f"save it again with this one."
        )
    if "cuda" in about["devices"] and not torch.cuda.is_available():
        raise CompilerError(f"load: {name} holds code for a GPU, but this machine has none that PyTorch can use.")
    mine = _machine(about["devices"])
    for part in mine if about["compiled"] else ():
        if about.get(part) != mine[part]:
            raise UnsupportedOperationError(
                f"load: {name} holds machine code for another {part}: {about.get(part)}, but this is {mine[part]}. Save it on a "
                f"machine like this one, or for any machine with jit(…, backend='eager')."
            )
