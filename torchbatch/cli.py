"""The command line: ``torchbatch demo``, ``torchbatch check``; or ``python -m torchbatch`` with the same."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torchbatch as tb
from torchbatch import checking, demo

_LARGEST = 2**64 - 1


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the result is the exit status: 0; 1 where a check finds a difference; 2 if it cannot be carried out."""
    options = parser().parse_args(argv)
    try:
        return int(options.run(options))
    except (demo.DemoError, checking.CheckError) as error:
        print(f"torchbatch {options.command}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


def parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    top = argparse.ArgumentParser(prog="torchbatch", description="JAX's vmap for PyTorch.", allow_abbrev=False)
    top.add_argument("--version", action="version", version=f"torchbatch {tb.__version__}")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)
    add_demo(commands)
    checking.add_check(commands, _whole(0))
    return top


def add_demo(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``demo`` and its options."""
    text = "train a small CNN with per-example clipped gradients and show which digits it finds hardest"
    defaults = demo.Options()
    command = commands.add_parser("demo", help=text, description=f"{text[0].upper()}{text[1:]}.", allow_abbrev=False)
    command.add_argument("--device", choices=("cpu", "cuda"), default=defaults.device, help="default: %(default)s")
    command.add_argument(
        "--seed", type=_whole(0), default=defaults.seed, metavar="N", help="of all random numbers (%(default)s)"
    )
    command.add_argument(
        "--epochs", type=_whole(1), default=defaults.epochs, metavar="N", help="passes over the data (%(default)s)"
    )
    command.add_argument(
        "--output", type=Path, default=defaults.output, metavar="FILE", help="the picture to write (%(default)s)"
    )
    command.set_defaults(run=_run_demo)


def _run_demo(options: argparse.Namespace) -> int:
    demo.run(demo.Options(options.device, options.seed, options.epochs, options.output))
    return 0


def _whole(smallest: int) -> Callable[[str], int]:
    """Reads a whole number from ``smallest`` up that PyTorch's generators can take, for argparse."""

    def read(text: str) -> int:
        if not text.isdecimal() or int(text) < smallest:
            raise argparse.ArgumentTypeError(f"expected a whole number from {smallest} up, got {text!r}")
        if int(text) > _LARGEST:
            raise argparse.ArgumentTypeError(f"expected a whole number up to {_LARGEST}, got {text!r}")
        return int(text)

    return read
