"""The demo from beginning to end: check what it needs, train, measure, print, draw."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from torchbatch.demo import figure, report
from torchbatch.demo.comparison import compare
from torchbatch.demo.data import Digits, load, split
from torchbatch.demo.model import SmallCNN, probabilities
from torchbatch.demo.report import Findings
from torchbatch.demo.training import gradient_norms, steps_per_epoch, train

HELD_OUT = 360
BATCH_SIZE = 64
MAX_NORM = 1.0
COMPARED = 256
REPETITIONS = 5
NEEDED = ("matplotlib", "rich")


class DemoError(Exception):
    """Something that the demo needs is not there; the text says what and what to do."""


@dataclass(frozen=True)
class Options:
    """What the command line of the demo sets."""

    device: str = "cpu"
    seed: int = 0
    epochs: int = 20
    output: Path = Path("torchbatch-demo.png")


def run(options: Options) -> None:
    """Run the demo: print its report and write its picture."""
    check_packages()
    device = check_device(options.device)
    check_output(options.output)
    with one_thread():
        show(options, device)


def show(options: Options, device: torch.device) -> None:
    """The demo itself, once everything that it needs is there."""
    generator = torch.Generator().manual_seed(options.seed)
    digits, held_out = split(load().to(device), HELD_OUT, generator)
    model = new_model(options.seed).to(device)
    report.print_opening(model, digits, held_out, device)
    train_with_progress(model, digits, options.epochs, generator)
    findings = examine(model, held_out)
    report.print_findings(findings)
    figure.save(findings, options.output)
    report.print_picture(options.output)
    with report.waiting(f"Taking {COMPARED} gradients both ways, {REPETITIONS} times"):
        comparison = compare(model, digits[:COMPARED], REPETITIONS)
    report.print_comparison(comparison, device)


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread on the CPU: operators on images this small gain nothing from more, and lose much on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def new_model(seed: int) -> SmallCNN:
    """A network with weights drawn from ``seed``; the caller's own random numbers stay as they were."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return SmallCNN()


def train_with_progress(model: SmallCNN, digits: Digits, epochs: int, generator: torch.Generator) -> None:
    """Train, with a bar that moves at every step."""
    total = epochs * steps_per_epoch(len(digits), BATCH_SIZE)
    steps = train(model, digits, epochs=epochs, batch_size=BATCH_SIZE, max_norm=MAX_NORM, generator=generator)
    with report.training_bar(total, epochs) as advance:
        for step in steps:
            advance(step)


def examine(model: SmallCNN, held_out: Digits) -> Findings:
    """What the trained network makes of images that it was not trained on."""
    chances = probabilities(model, held_out.images)
    return Findings(held_out.to(torch.device("cpu")), chances.cpu(), gradient_norms(model, held_out).cpu())


def check_packages(find: Callable[[str], object] = importlib.util.find_spec) -> None:
    """Refuse to start without the packages that print and draw."""
    missing = [name for name in NEEDED if find(name) is None]
    if missing:
        raise DemoError(
            f"the demo needs {' and '.join(missing)}, not installed here; install with: "
            f"python -m pip install {' '.join(missing)}"
        )


def check_device(name: str) -> torch.device:
    """The device called ``name``, or an error where this machine has none."""
    if name == "cuda" and not torch.cuda.is_available():
        raise DemoError(
            f"--device cuda: PyTorch {report.torch_version()} finds no CUDA device on this machine; "
            "use --device cpu, or install a PyTorch built for CUDA where there is a GPU"
        )
    return torch.device(name)


def check_output(path: Path) -> None:
    """Refuse a picture that could not be written, before the work rather than after it."""
    if path.suffix.lower() not in figure.SUFFIXES:
        wanted = ", ".join(figure.SUFFIXES)
        raise DemoError(f"--output {path}: expected a file name that ends in {wanted}; for example --output digits.png")
    if path.is_dir():
        raise DemoError(f"--output {path}: this is a directory; expected the name of a file to write")
    if not path.parent.is_dir():
        raise DemoError(f"--output {path}: there is no directory {path.parent}; make it first or choose another place")
