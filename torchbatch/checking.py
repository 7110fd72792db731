"""``torchbatch check``: is a function of one sample, mapped over a batch, the loop; and is it another framework's?"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import importlib
import importlib.util
import inspect
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torchbatch.errors import TorchbatchError
from torchbatch.testing.arguments import inputs_of, outputs_of
from torchbatch.testing.equivalent import check_equivalent
from torchbatch.testing.frameworks import FRAMEWORKS
from torchbatch.testing.html import save_html
from torchbatch.testing.optional import require
from torchbatch.testing.outcomes import attempt, line
from torchbatch.testing.report import Report
from torchbatch.testing.specs import SpecError, read_arguments, read_axes
from torchbatch.testing.terminal import print_report
from torchbatch.testing.tolerance import Tolerance
from torchbatch.testing.variants import call_of, copied
from torchbatch.testing.vmap_checks import DERIVATIVES, check_vmap
from torchbatch.testing.ways import BACKENDS, LOOP

Fun = Callable[..., Any]
_DEFAULT_BACKENDS = ("eager", "chunked", "jit", "nested", "compile")
_ROOTS = {"jax": "jax", "jaxlib": "jax", "torch": "torch", "numpy": "numpy"}
_EPILOG = """\
arguments:
  f32[8,3]        float32 of this shape, normally distributed; f16 f32 f64 bf16 c64 c128
  i64[8]<10       whole numbers below 10; -5<=i64[8]<5 has both bounds, f32[8]>0 is positive
  bool[3]  key  key[8]  weights.npy  2.5  None
  {"w": f32[3,4], "b": f32[4]}    dicts, tuples and lists of these
  A value that begins with - is written with =, as in --in-axes=-1,None.

functions:
  package.module:function, or file.py:function; what is in the current folder can be imported.
  --against takes a function of PyTorch, JAX or NumPy: the framework is what the function's module imports, or is
  written in front, as in jax:package.module:function.

exit status: 0 if all is the same, 1 if something differs, 2 if the check cannot be made.
"""


class CheckError(Exception):
    """The check cannot be made; the text says why and what to do."""


@dataclasses.dataclass(frozen=True)
class Options:
    """What the command line says."""

    target: str
    arguments: Sequence[str]
    in_axes: str | None = None
    out_axes: str = "0"
    axis_name: str | None = None
    axis_size: int | None = None
    randomness: str = "error"
    against: str | None = None
    batched: str | None = None
    backends: Sequence[str] = _DEFAULT_BACKENDS
    derivatives: Sequence[str] = DERIVATIVES
    variants: bool = True
    tolerance: Tolerance | None = None
    seed: int = 0
    json: Path | None = None
    html: Path | None = None


# --- the command line ------------------------------------------------------------------------------------------------


def add_check(commands: argparse._SubParsersAction[argparse.ArgumentParser], seed: Callable[[str], int]) -> None:
    """Add ``check`` and its options; ``seed`` reads a whole number."""
    text = "hold a function, mapped over a batch, against the plain loop, and against another framework"
    command = commands.add_parser(
        "check",
        help=text,
        description=f"{text[0].upper()}{text[1:]}.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    command.add_argument("target", metavar="FUNCTION", help="a function of one sample: module:function, or file.py:function")
    command.add_argument(
        "--arg", action="append", required=True, metavar="SPEC", dest="arguments", help="an argument, with the batch in it"
    )
    command.add_argument("--in-axes", metavar="AXES", help="as Python writes them: 0 (default), 0,None, ({'w': None}, 0)")
    command.add_argument("--out-axes", metavar="AXES", default="0", help="default: %(default)s")
    command.add_argument("--axis-name", metavar="NAME", help="a name for the batch axis")
    command.add_argument("--axis-size", metavar="N", type=seed, help="the size of the batch, where no argument is mapped")
    command.add_argument("--randomness", choices=("error", "different", "same"), default="error", help="default: %(default)s")
    command.add_argument("--against", metavar="FUNCTION", help="the same function in JAX, NumPy or PyTorch")
    command.add_argument("--batched", metavar="FUNCTION", help="a batched version that was written by hand")
    _add_choices(command, "--backends", ("loop", *BACKENDS), _DEFAULT_BACKENDS)
    _add_choices(command, "--derivatives", (*DERIVATIVES, "none"), DERIVATIVES)
    command.add_argument("--no-variants", dest="variants", action="store_false", help="only on the arguments as given")
    command.add_argument(
        "--tolerance", metavar="T", type=_tolerance, help="relative and absolute, or RTOL,ATOL (by default chosen from dtypes)"
    )
    command.add_argument("--seed", type=seed, default=0, metavar="N", help="of all random numbers (%(default)s)")
    command.add_argument("--json", type=Path, metavar="FILE", help="write the report as JSON")
    command.add_argument("--html", type=Path, metavar="FILE", help="write the report as a page, with pictures")
    command.set_defaults(run=lambda found: run(_options(found)))


def _add_choices(command: argparse.ArgumentParser, name: str, known: Sequence[str], default: Sequence[str]) -> None:
    def read(text: str) -> tuple[str, ...]:
        names = tuple(part.strip() for part in text.split(",") if part.strip())
        for part in names:
            if part not in known:
                raise argparse.ArgumentTypeError(f"there is no {part!r}; there are {', '.join(known)}")
        return names

    command.add_argument(
        name, type=read, default=tuple(default), metavar="NAMES", help=f"some of {','.join(known)} (default: {','.join(default)})"
    )


def _tolerance(text: str) -> Tolerance:
    """``1e-5``, or ``1e-5,1e-8``: relative and absolute."""
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) not in (1, 2) or not all(number >= 0 for number in numbers):
        raise argparse.ArgumentTypeError(f"expected one or two numbers from 0 up, such as 1e-5 or 1e-5,1e-8, got {text!r}")
    return Tolerance(numbers[0], numbers[-1])


def _options(found: argparse.Namespace) -> Options:
    return Options(**{field.name: getattr(found, field.name) for field in dataclasses.fields(Options)})


# --- the check -------------------------------------------------------------------------------------------------------


def run(options: Options) -> int:
    """Make the check and print its report; the result is 0 if all is the same, 1 if something differs.

    Raises:
        CheckError: the check cannot be made.
    """
    _check_output(options)
    try:
        require("rich", "torchbatch check", "testing")
        report = _report(options)
    except (SpecError, TorchbatchError, ImportError) as error:
        raise CheckError(str(error)) from error
    except SystemExit as error:
        text = "what is checked, or the file that it is in, ends the program; put what runs alone under if __name__ == '__main__'"
        raise CheckError(f"{options.target}: {text} (SystemExit: {error.code}).") from error
    print_report(report)
    _save(options, report)
    if not report.passed and not report.failures:
        raise CheckError("nothing could be compared: every check was skipped.")
    return 0 if report.passed else 1


def _check_output(options: Options) -> None:
    for name in ("json", "html"):
        path = getattr(options, name)
        if path is not None and (path.is_dir() or not path.resolve().parent.is_dir()):
            what = "it is a folder" if path.is_dir() else f"there is no folder {path.resolve().parent}"
            raise CheckError(f"--{name} {path}: cannot be written: {what}.")


def _save(options: Options, report: Report) -> None:
    writers: dict[str, Callable[[Path], None]] = {"json": report.save_json, "html": lambda path: save_html(report, path)}
    for name, write in writers.items():
        path = getattr(options, name)
        if path is None:
            continue
        try:
            write(path)
        except OSError as error:
            raise CheckError(f"--{name} {path}: cannot be written: {error.strerror}.") from error
        print(f"Report written to {path}")


def _report(options: Options) -> Report:
    fun = load(options.target, "FUNCTION").fun
    arguments = read_arguments(options.arguments, options.seed)
    reports = []
    if options.in_axes is not None or options.against is None:
        reports.append(_mapped(options, fun, arguments))
    if options.against is not None:
        reports.append(_against(options, fun, arguments))
    joined = _joined(f"torchbatch check {options.target}", reports)
    drawn = f"arguments: {' '.join(options.arguments)}, drawn with seed {options.seed}"
    return dataclasses.replace(joined, notes=(drawn, *joined.notes))


def _mapped(options: Options, fun: Fun, arguments: Sequence[Any]) -> Report:
    """The mapped function against the loop."""
    axes = _axes(options)
    more: dict[str, Any] = {"axis_name": options.axis_name, "axis_size": options.axis_size, "randomness": options.randomness}
    call = call_of(fun, tuple(arguments), {}, **axes, **more)
    value = _made(options, lambda: LOOP.make(call)([copied(tensor) for tensor in call.tensors]), ", sample by sample")
    report = check_vmap(
        fun,
        *arguments,
        **axes,
        **more,
        batched=None if options.batched is None else load(options.batched, "--batched").fun,
        backends=tuple(name for name in options.backends if name != "loop"),
        derivatives=tuple(name for name in options.derivatives if name != "none"),
        variants=options.variants,
        tolerance=options.tolerance,
        seed=options.seed,
        raise_on_failure=False,
    )
    return dataclasses.replace(report, arguments=inputs_of(call), outputs=outputs_of(call, value))


def _axes(options: Options) -> dict[str, Any]:
    in_axes = 0 if options.in_axes is None else read_axes(options.in_axes, "--in-axes")
    return {"in_axes": in_axes, "out_axes": read_axes(options.out_axes, "--out-axes")}


def _made(options: Options, make: Callable[[], Any], how: str = "") -> Any:
    """What the function gives in the plainest way: without it there is nothing to hold anything against."""
    found = attempt(make)
    if found.error is not None:
        raise CheckError(f"{options.target} fails on these arguments{how}: {line(found.error)}") from found.error
    return found.value


def _against(options: Options, fun: Fun, arguments: Sequence[Any]) -> Report:
    """The function against another one."""
    other = load(str(options.against), "--against")
    framework = other.framework()
    name = other.name if other.name != options.target else f"{other.name} ({framework})"
    mapped = options.in_axes is not None
    if not mapped:
        _made(options, lambda: fun(*read_arguments(options.arguments, options.seed)))
    return check_equivalent(
        {options.target: ("torch", fun), name: (framework, other.fun)},
        *arguments,
        **(_axes(options) if mapped else {}),
        transforms=_transforms(options.derivatives, mapped),
        against=name,
        tolerance=options.tolerance,
        seed=options.seed,
        raise_on_failure=False,
    )


def _transforms(derivatives: Sequence[str], mapped: bool) -> list[Any]:
    """What is compared with another framework: values, and derivatives along random directions."""
    found = [name for mode, name in (("reverse", "vjp"), ("forward", "jvp")) if mode in derivatives]
    return ["vmap", *(("vmap", name) for name in found)] if mapped else ["value", *found]


def _joined(title: str, reports: Sequence[Report]) -> Report:
    """All reports as one: what only one of them can say is from the first that says it, which knows the batch axes."""
    joined = Report(title)
    for report in reports:
        kept = {name: getattr(joined, name) or getattr(report, name) for name in ("inputs", "precision", "arguments", "outputs")}
        joined = dataclasses.replace(
            joined,
            **kept,
            checks=joined.checks + report.checks,
            notes=joined.notes + report.notes,
            reproducer=joined.reproducer or report.reproducer,
        )
    return joined


# --- functions by name -----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A function that the command line names.

    Attributes:
        name: as it was written, without the framework.
        fun: the function.
        module: the module in which it was looked up.
        prefix: the framework that was written in front, or None.
    """

    name: str
    fun: Fun
    module: types.ModuleType
    prefix: str | None = None

    def framework(self) -> str:
        """The framework it is written in: as said, or by what the function uses, or by what its module imports.

        Raises:
            CheckError: both PyTorch and JAX come into question.
        """
        if self.prefix is not None:
            return self.prefix
        own = _ROOTS.get(type(self.fun).__module__.partition(".")[0])
        if own is not None and own != "numpy":
            return own
        plain = inspect.unwrap(self.fun)
        space = getattr(plain, "__globals__", vars(self.module))
        used = getattr(getattr(plain, "__code__", None), "co_names", ())
        for names in (used, space):
            found = {root for name in names if name in space and (root := _root(space, name)) is not None}
            if found:
                break
        if {"torch", "jax"} <= found:
            raise CheckError(f"--against {self.name}: it may be PyTorch's or JAX's; write torch:{self.name} or jax:{self.name}.")
        return next((name for name in ("jax", "torch", "numpy") if name in found), "torch")


def _root(space: Mapping[str, Any], name: str) -> str | None:
    """The framework that a global name belongs to."""
    value = space[name]
    module = value.__name__ if isinstance(value, types.ModuleType) else getattr(value, "__module__", None)
    return _ROOTS.get(str(module).partition(".")[0])


def load(text: str, option: str) -> Loaded:
    """The function of a name such as ``package.module:function``, ``file.py:function`` or ``jax:package.module:function``.

    Raises:
        CheckError: there is none.
    """
    prefix, _, rest = text.partition(":")
    prefixed = prefix in FRAMEWORKS and ":" in rest
    name = rest if prefixed else text
    place, _, path = name.rpartition(":")
    if not place or not path:
        raise CheckError(f"{option} {text}: write module:function or file.py:function.")
    module = _module(place, f"{option} {text}")
    found: Any = module
    for part in path.split("."):
        if not hasattr(found, part):
            close = difflib.get_close_matches(part, dir(found), n=1)
            hint = f"; there is {close[0]!r}" if close else ""
            raise CheckError(f"{option} {text}: {place} has no {path!r}{hint}.")
        found = getattr(found, part)
    if not callable(found):
        raise CheckError(f"{option} {text}: {path} is no function, but {found!r} of type {type(found).__name__}.")
    return Loaded(name, found, module, prefix if prefixed else None)


def _module(place: str, where: str) -> types.ModuleType:
    folder = str(Path(place).resolve().parent if place.endswith(".py") else Path.cwd())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        return _from_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    except Exception as error:
        raise CheckError(f"{where}: cannot import {place}: {line(error)}") from error


def _from_file(path: Path) -> types.ModuleType:
    """A module from its file, under its own name if that is free."""
    name = path.stem if path.stem not in sys.modules else f"_checked_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no file of Python.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
