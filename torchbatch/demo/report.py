"""What the demo prints: to a terminal in colour, to a file as plain text."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

import torchbatch as tb
from torchbatch.demo.comparison import Comparison
from torchbatch.demo.data import CLASSES, Digits
from torchbatch.demo.training import Step

if TYPE_CHECKING:
    from rich.console import Console

HARDEST = 10
DRAWN = 4
SHADES, ASCII_SHADES = " ░▒▓█", " .+#@"


@dataclass(frozen=True)
class Findings:
    """Some images, how likely each class is for each (``[n, 10]``), and the lengths of their gradients (``[n]``)."""

    digits: Digits
    probabilities: Tensor
    norms: Tensor

    @property
    def predictions(self) -> Tensor:
        """What the network takes each image for."""
        return self.probabilities.argmax(dim=1)

    @property
    def right(self) -> Tensor:
        """Which images it takes for what they are."""
        return self.predictions == self.digits.labels

    @property
    def accuracy(self) -> float:
        """The share of images that it takes for what they are."""
        return self.right.float().mean().item()

    def hardest(self, count: int) -> Tensor:
        """The places of the images with the longest gradients, the longest first."""
        return self.norms.argsort(descending=True)[:count]

    def easiest(self, count: int) -> Tensor:
        """The places of the images with the shortest gradients, the shortest first."""
        return self.norms.argsort()[:count]


def console(stderr: bool = False) -> Console:
    """Where to print: in colour on a terminal only, at most 100 characters wide."""
    from rich.console import Console

    found = Console(stderr=stderr, highlight=False)
    found.width = min(found.width, 100)
    return found


def print_opening(model: nn.Module, digits: Digits, held_out: Digits, device: torch.device) -> None:
    """Say what runs, where, and on what."""
    size = sum(parameter.numel() for parameter in model.parameters())
    out = console()
    out.print(f"[bold]torchbatch {tb.__version__}[/bold], PyTorch {torch_version()}, {machine(device)}")
    out.print(f"A CNN of {size:,} parameters; {len(digits):,} handwritten digits to train on, {len(held_out)} held out")
    out.print()


def torch_version() -> str:
    """The version of PyTorch, with the build it is."""
    return metadata.version("torch")


def machine(device: torch.device) -> str:
    """What the numbers were measured on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    plural = "" if threads == 1 else "s"
    return f"{platform.machine()} CPU ({torch.backends.cpu.get_cpu_capability()}), {threads} thread{plural}"


@contextmanager
def training_bar(total: int, epochs: int) -> Iterator[Callable[[Step], None]]:
    """A progress bar; call what it gives at every step."""
    from rich import progress

    columns = (
        progress.TextColumn("Training  [bold]epoch {task.fields[epoch]:>2}[/bold] of " + str(epochs)),
        progress.BarColumn(30),
        progress.TextColumn("{task.percentage:>3.0f}%  {task.fields[clipped]:>4.0%} clipped"),
        progress.TimeElapsedColumn(),
    )
    with progress.Progress(*columns, console=console(stderr=True)) as bar:
        task = bar.add_task("", total=total, epoch=1, clipped=1.0)
        yield lambda step: bar.update(task, advance=1, epoch=step.epoch + 1, clipped=step.clipped)


@contextmanager
def waiting(text: str) -> Iterator[None]:
    """A sign of life, on a terminal only."""
    with console(stderr=True).status(text):
        yield


def print_findings(findings: Findings) -> None:
    """The accuracy, the two tables and the hardest images."""
    right, count = int(findings.right.sum()), len(findings.digits)
    console().print(f"\n[bold green]Test accuracy {findings.accuracy:.1%}[/bold green] ({right} of {count})\n")
    print_classes(findings)
    print_hardest(findings)
    print_drawings(findings)


def print_classes(findings: Findings) -> None:
    """A table of the gradients' lengths, digit by digit."""
    rows = []
    for digit in range(CLASSES):
        mine = findings.digits.labels == digit
        norms = findings.norms[mine]
        if len(norms):
            numbers = (f"{norms.median():.1e}", f"{norms.mean():.3f}", f"{norms.max():.3f}")
            rows.append((str(digit), str(len(norms)), f"{findings.right[mine].float().mean():.1%}", *numbers))
    title = "Length of the gradient of each held-out image, by class"
    print_table(title, ("digit", "images", "accuracy", "median", "mean", "largest"), rows)


def print_hardest(findings: Findings) -> None:
    """A table of the images with the longest gradients."""
    rows = []
    for rank, place in enumerate(findings.hardest(HARDEST).tolist(), 1):
        label, predicted = int(findings.digits.labels[place]), int(findings.predictions[place])
        seen = str(predicted) if predicted == label else f"[bold red]{predicted}[/bold red]"
        chance = f"{findings.probabilities[place, label]:.1%}"
        number = str(int(findings.digits.numbers[place]))
        rows.append((str(rank), number, str(label), seen, chance, f"{findings.norms[place]:.3f}"))
    title = f"The {HARDEST} hardest images"
    print_table(title, ("rank", "image", "label", "taken for", "chance of label", "gradient"), rows)


def print_table(title: str, header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    """A table of numbers, aligned to the right."""
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in header:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*row)
    console().print(table)


def print_drawings(findings: Findings) -> None:
    """The hardest images, drawn with characters."""
    out = console()
    shades = SHADES if out.encoding.startswith("utf") else ASCII_SHADES
    places = findings.hardest(DRAWN)
    captions = [
        f"{label} taken for {predicted}" if label != predicted else f"{label}, hardly"
        for label, predicted in zip(
            findings.digits.labels[places].tolist(), findings.predictions[places].tolist(), strict=True
        )
    ]
    out.print("   ".join(f"{caption:<16}" for caption in captions).rstrip(), markup=False)
    drawings = [draw(image, shades) for image in findings.digits.images[places]]
    for lines in zip(*drawings, strict=True):
        out.print("   ".join(lines).rstrip(), markup=False)
    out.print()


def draw(image: Tensor, shades: str) -> list[str]:
    """An image as eight lines of text, two characters a pixel: ``[1, 8, 8] -> 8 strings``."""
    levels = (image[0] * (len(shades) - 1)).round().int().tolist()
    return ["".join(shades[level] * 2 for level in row) for row in levels]


def print_picture(path: Path) -> None:
    """Say where the picture is."""
    console().print(f"Picture written to {path}", markup=False, soft_wrap=True)


def print_comparison(comparison: Comparison, device: torch.device) -> None:
    """Say how far apart vmap and the loop are, and how much faster vmap was."""
    out = console()
    out.print(f"\n[bold]vmap(grad(loss)) next to a Python loop of autograd over {comparison.images} images[/bold]")
    absolute, relative = comparison.max_absolute_error, comparison.max_relative_error
    out.print(f"  The same gradients: of {comparison.numbers:,} numbers, the largest difference is {absolute:.1e}")
    out.print(f"  ({relative:.1e} of the largest number in its parameter)")
    loop, vmap = comparison.loop_seconds * 1e3, comparison.vmap_seconds * 1e3
    faster = f"[bold green]{comparison.speedup:.0f} times faster[/bold green]"
    out.print(f"  {faster}: {loop:.0f} ms for the loop, {vmap:.0f} ms for vmap")
    out.print(f"  (medians of {comparison.repetitions} runs in turn; {machine(device)})")
