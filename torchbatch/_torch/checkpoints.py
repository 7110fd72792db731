"""``torch.utils.checkpoint`` in a trace of one example: there it keeps everything, and computes nothing again.

A trace holds both runs of what is computed again, and what is drawn in them would not be the same. The compiler decides what is
kept.

Private names used, seen on torch 2.11, 2.13 and 2.15: ``torch.utils.checkpoint._checkpoint_without_reentrant_generator``, and
that ``checkpoint`` looks it and ``CheckpointFunction`` up when it is called.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

from torch.utils import checkpoint as _module

_of_torch: Any = _module


class _Kept(threading.local):
    active = False


_kept = _Kept()


@contextlib.contextmanager
def everything_kept() -> Iterator[None]:
    """In this thread checkpoints only call their functions."""
    was, _kept.active = _kept.active, True
    try:
        yield
    finally:
        _kept.active = was


def _unless_kept(original: Callable[..., Iterator[None]]) -> Callable[..., Iterator[None]]:
    def around(*args: Any, **kwargs: Any) -> Iterator[None]:
        if _kept.active:
            yield
        else:
            yield from original(*args, **kwargs)

    return around


class _Function(_of_torch.CheckpointFunction):  # type: ignore[misc]
    @classmethod
    def apply(cls, function: Callable[..., Any], preserve_rng_state: bool, *args: Any) -> Any:
        """The reentrant kind of checkpoint."""
        if _kept.active:
            return function(*args)
        return super().apply(function, preserve_rng_state, *args)


_of_torch._checkpoint_without_reentrant_generator = _unless_kept(_of_torch._checkpoint_without_reentrant_generator)
_of_torch.CheckpointFunction = _Function
