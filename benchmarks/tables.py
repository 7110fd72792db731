"""Markdown tables of the figures that the benchmarks of jit wrote with --json.

python benchmarks/tables.py FILE.json ... > docs/speed_tables.md
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

ORDER = ("by hand", "torch.func", "torch.compile", "eager", "jax", "loop")
CACHES = ("empty cache", "filled cache")
UNITS = (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6))


def duration(seconds: float) -> str:
    """Seconds in the unit that suits them."""
    unit, size = next((unit for unit in UNITS if seconds >= unit[1]), UNITS[-1])
    return f"{seconds / size:.3g} {unit}"


def _cell(row: dict[str, Any], name: str) -> str:
    if name not in row["jit / other"]:
        return ""
    found, asked = row["jit / other"][name], row["asked"].get(name)
    ratio = f"{found:.2f}" if found >= 0.01 else f"{found:.1g}"
    if asked is not None:
        ratio = f"**{ratio}**" + ("" if asked["reached"] else f" (asked: {asked['at most']:.2f})")
    return ratio


def _first(row: dict[str, Any]) -> str:
    times = row["first call"]
    return ", ".join(f"{name} {duration(times[name])}" for name in ("jit", "torch.compile", "jax") if name in times)


def _time(seconds: dict[str, float]) -> str:
    filling = f" (writing the result: {duration(seconds['filling'])})" if "filling" in seconds else ""
    return duration(seconds["jit"]) + filling


def _line(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def _head(*cells: str) -> list[str]:
    return [_line(*cells), "|---" * len(cells) + "|"]


def table(figures: dict[str, Any]) -> str:
    """One file's rows: jit's time as a multiple of each other contender's; bold where a limit was set beforehand."""
    lines = _head("", "jit takes", *(f"÷ {name}" for name in ORDER), "first call")
    for row in figures["rows"]:
        cells = [_cell(row, name) for name in ORDER]
        lines.append(_line(row["work"], _time(row["seconds"]), *cells, _first(row)))
    return "\n".join(lines)


def first_calls(figures: dict[str, Any]) -> str:
    """The rows of a file about first calls."""
    lines = _head("first call", "", "empty cache", "filled cache")
    for row in figures["rows"]:
        cells = (duration(statistics.median(row["seconds"][name])) if name in row["seconds"] else "" for name in CACHES)
        lines.append(_line(row["work"], row["contender"], *cells))
    return "\n".join(lines)


LIBRARIES = ("torchbatch", "Opacus hooks", "Opacus functorch", "Opacus ghost", "BackPACK", "torch.func", "torch.compile", "JAX")


def of_the_backward_pass(figures: dict[str, Any]) -> str:
    """Times, and peaks of memory, as multiples of the ordinary backward pass's; the least is bold."""
    lines = _head("", "", "backward pass", *LIBRARIES)
    for row in figures["rows"]:
        lines.append(_line(row["work"], row["quantity"], duration(row["seconds"]["backward"]), *_multiples(row)))
    lines += ["", *_head("peak of memory", "", "backward pass", *LIBRARIES)]
    for row in figures.get("memory", []):
        size = f"{row['bytes']['backward'] / 1e6:.0f} MB"
        lines.append(_line(row["work"], row["quantity"], size, *_multiples(row)))
    return "\n".join(lines)


def _multiples(row: dict[str, Any]) -> list[str]:
    found = {name: row["times the backward pass"].get(name) for name in LIBRARIES}
    least = min(times for times in found.values() if times is not None)
    shown = {name: "" if times is None else f"{times:.2f}" for name, times in found.items()}
    return [f"**{text}**" if found[name] == least else text for name, text in shown.items()]


def memory(figures: dict[str, Any]) -> str:
    """Peaks of memory, if the file has any."""
    rows = figures.get("memory", [])
    names = [name for name in ORDER if name not in ("jax", "loop")]  # JAX keeps memory that it once had: its peak is not seen
    lines = ["\n", *_head("peak of memory, as a multiple of the result", "jit", *names)]
    for row in rows:
        peaks = [row["peak / result"].get(name) for name in ("jit", *names)]
        lines.append(_line(f"N = {row['n']}, D = {row['d']}", *("" if peak is None else f"{peak:.2f}" for peak in peaks)))
    return "\n".join(lines) if rows else ""


def main(files: list[str]) -> None:
    """Print all tables."""
    for name in files:
        figures = json.loads(Path(name).read_text())
        print(f"### {Path(name).stem.removeprefix('jit_').replace('_', ' ').capitalize()}\n")
        first = figures["rows"][0]
        if "times the backward pass" in first:
            text = of_the_backward_pass(figures)
        else:
            text = (first_calls if "contender" in first else table)(figures) + memory(figures)
        print(f"{text}\n\nMeasured on: {figures['machine']}.\n")


if __name__ == "__main__":
    main(sys.argv[1:])
