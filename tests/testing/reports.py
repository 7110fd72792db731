"""Reports to show: one in which all passed, and one in which everything can be seen that goes wrong."""

from __future__ import annotations

import torch

from torchbatch.testing.compare import compare
from torchbatch.testing.precision import precision_policy
from torchbatch.testing.report import Argument, Check, Report

VARIANTS = ("as given", "batch of 1", "axes moved: in_axes=(1, None)")
ARGUMENTS = (
    Argument("query", "float32", (8, 40, 120), 0),
    Argument("params['w']", "float32", (120, 12)),
    Argument("mask", "bool", (40, 8), 1),
    Argument("scale", "float32", ()),
    Argument("rows", "float32", (3, 0), 1),
)
OUTPUTS = (Argument("output['loss']", "float32", (8,), 0), Argument("output['scores']", "float32", (8, 40, 120), 0))


def good() -> Report:
    """Four checks; one was skipped."""
    x = torch.ones(8, 3)
    checks = [Check.of_leaves("eager", "loop", "values", variant, compare(x, x), 0.01) for variant in VARIANTS]
    skipped = Check("compile", "loop", "values", "as given", "skipped", None, "no compiler")
    return Report("check_vmap(f)", (*checks, skipped), arguments=ARGUMENTS[:1])


def bad() -> Report:
    """A NaN, numbers that are off, another shape, an error, another dtype."""
    generator = torch.Generator().manual_seed(0)
    reference = {name: torch.randn(size, dtype=torch.float64, generator=generator) for name, size in SIZES.items()}
    loop = {name: value.float() for name, value in reference.items()}
    off = {name: value.clone() for name, value in loop.items()}
    off["loss"][2] = float("nan")
    off["scores"][3, 7, 50:90] += torch.logspace(-7, 3, 40)
    turned = {**loop, "scores": loop["scores"].transpose(1, 2)}
    wide = {**loop, "loss": loop["loss"].double()}
    checks = [Check.of_leaves("eager", "loop", "values", variant, compare(loop, loop, reference), 0.01) for variant in VARIANTS]
    checks += [
        Check.of_leaves("jit", "loop", "values", "as given", compare(off, loop, reference), 1.5),
        Check.of_leaves("chunked", "loop", "values", "as given", compare(turned, loop, reference)),
        Check("nested", "loop", "values", "as given", "failed", "error", "AxisError: <script>alert('&')</script>\nsecond line"),
        Check.of_leaves("eager", "loop", "reverse-mode gradient", "as given", compare(wide, loop)),
        Check("compile", "loop", "values", "as given", "skipped", None, "no compiler <b>here</b>"),
    ]
    return Report(
        "check_vmap(<lambda>)",
        tuple(checks),
        tuple(str(argument) for argument in ARGUMENTS),
        ("tolerance: chosen & noted",),
        precision_policy(["torch", "numpy"]),
        "import torch\nassert 1 < 2",
        ARGUMENTS,
        OUTPUTS,
    )


SIZES = {"loss": (8,), "scores": (8, 40, 120)}
