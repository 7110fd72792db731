"""Say when a function is traced and why, and that a compilation takes long."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence

from torchbatch.errors import RetraceWarning

logger = logging.getLogger("torchbatch.jit")
_MANY = 8
_PACKAGE = os.path.dirname(os.path.dirname(__file__)) + os.sep
_PATIENCE = 2.0  # seconds of silence on a terminal


def _to_stderr() -> None:
    """With TORCHBATCH_LOG_COMPILES=1 what is logged is shown, whatever the program does with its loggers."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("torchbatch: %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False


if os.environ.get("TORCHBATCH_LOG_COMPILES", "0") not in ("", "0"):
    _to_stderr()


class Difference(dict[str, tuple[str, str]]):
    """What differs between two kinds of calls: by name, as it was and as it is."""

    @classmethod
    def between(cls, old: Mapping[str, str], new: Mapping[str, str]) -> Difference:
        """The difference of two descriptions."""
        names = [*new, *(name for name in old if name not in new)]
        both = {name: (old.get(name, "absent"), new.get(name, "absent")) for name in names}
        return cls({name: (was, now) for name, (was, now) in both.items() if was != now})

    def __str__(self) -> str:
        parts = [f"{name}: {was} -> {now}" for name, (was, now) in self.items()]
        more = [f"and {len(parts) - _SHOWN} more"] if len(parts) > _SHOWN else []
        return "; ".join([*parts[:_SHOWN], *more]) or "something that no description shows"


_SHOWN = 5


def nearest(differences: Sequence[Difference]) -> str:
    """The least difference in words; of several that are as small the last one."""
    return str(min(reversed(differences), key=len)) if differences else ""


def traced(name: str, known: Sequence[Difference]) -> None:
    """Log that a function is traced, and how the call differs from those that are known.

    Warns:
        RetraceWarning: it is the ninth kind of call.
    """
    if not known:
        logger.info("tracing %s: the first call", name)
        return
    reason = nearest(known)
    logger.info("tracing %s again (kind of call no. %d): %s", name, len(known) + 1, reason)
    if len(known) == _MANY:
        warnings.warn(
            f"jit: {name} is traced for the {len(known) + 1}th time, each for another kind of call; the last one because of "
            f"{reason}. Each trace is compiled and kept. If a size changes, pad it or use jit(…, dynamic=True); if a static "
            f"argument does, pass it as a tensor. TORCHBATCH_LOG_COMPILES=1 shows each reason.",
            RetraceWarning,
            stacklevel=_levels_to_user(),
        )


def nothing_open(name: str) -> None:
    """Warn of ``dynamic=True`` for a function in which no axis of an argument is mapped."""
    warnings.warn(
        f"jit: dynamic=True opens the sizes of mapped axes, but in {name} no vmap maps an axis of an argument, so it is traced "
        f"again for each size. Compile jit(vmap(f), dynamic=True) of the function of one sample, or leave dynamic out.",
        RetraceWarning,
        stacklevel=_levels_to_user(),
    )


def _levels_to_user() -> int:
    """How far up the stack the line is that called the jit function, for a warning that is given by the caller of this."""
    frame, levels = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_PACKAGE):
        frame, levels = frame.f_back, levels + 1
    return levels


@contextlib.contextmanager
def compiling(name: str) -> Iterator[None]:
    """Log how long a compilation takes; on a terminal, show a line while it does if it is long."""
    started, done = time.perf_counter(), threading.Event()
    line = threading.Thread(target=_show, args=(name, started, done), daemon=True)
    shown = sys.stderr.isatty()
    if shown:
        line.start()
    try:
        yield
    finally:
        done.set()
        if shown:
            line.join()
    logger.info("compiled %s in %.2f s", name, time.perf_counter() - started)


def _show(name: str, started: float, done: threading.Event) -> None:
    if done.wait(_PATIENCE):
        return
    while not done.wait(0.2):
        sys.stderr.write(f"\rtorchbatch: compiling {name} … {time.perf_counter() - started:.0f} s")
        sys.stderr.flush()
    sys.stderr.write("\r\033[K")
    sys.stderr.flush()
