"""The failed check of a mapped function as a program in plain PyTorch."""

from __future__ import annotations

from torchbatch.testing.function_source import FunctionWriter
from torchbatch.testing.report import Check
from torchbatch.testing.reproducer import reproducer
from torchbatch.testing.variants import Call
from torchbatch.testing.ways import Way


def written_out(failed: Check, call: Call, way: Way, seed: int | None) -> str:
    """A program that makes the call of a failed check in plain PyTorch."""
    given = (leaf.tolerance for leaf in failed.leaves if not leaf.passed and leaf.tolerance.rtol > 0)
    allowed = next(given, None) if failed.what == "values" else None
    program = reproducer(
        call.fun,
        call.args,
        call.in_axes,
        call.out_axes,
        kwargs=call.kwargs,
        axis_size=call.axis_size,
        transform=transform_of(way),
        seed=seed,
        rtol=None if allowed is None else allowed.rtol,
        atol=None if allowed is None else allowed.atol,
    )
    lines = [f"# {failed.name}: {failed.problem}"]
    if failed.what != "values":
        lines.append("# This program compares values only.")
    return "\n".join([*lines, _with_definitions(program, way)])


def transform_of(way: Way) -> str | None:
    """How a program spells a way to run a function."""
    mapped = "torchbatch.vmap({fun}, in_axes={in_axes}, out_axes={out_axes}"
    if way.kind == "chunked":
        return f"{mapped}, chunk_size={way.name.rpartition(' ')[2]})"
    outside = {"jit": "torchbatch.jit(%s)", "traced": 'torchbatch.jit(%s, backend="eager")', "compile": "torch.compile(%s)"}
    return {"loop": None, "batched": "batched"}.get(way.kind, outside.get(way.kind, "%s") % f"{mapped})")


def _with_definitions(program: str, way: Way) -> str:
    """The program with the source of a batched version that somebody wrote, as ``batched``."""
    if way.written is None:
        return program
    writer = FunctionWriter()
    name = writer.function(way.written, "batched")
    known = [f"# Supply {missing}: {what}." for missing, what in writer.missing.items()]
    imports, rest = program.split("\n\n\n", 1)
    lines = sorted({*imports.splitlines(), *writer.imports})
    renamed = [] if name == "batched" else [f"batched = {name}"]
    return "\n\n\n".join(["\n".join(lines), *known, *writer.definitions, *renamed, rest])
