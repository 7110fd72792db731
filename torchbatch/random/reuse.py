"""A check that no key is used twice."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Hashable, Iterator
from typing import Any

import torch

from torchbatch._torch import caller, levels, overlay
from torchbatch.errors import RandomnessError


class _Uses(threading.local):
    """The keys that were used so far, with the line that used each; None outside of the check."""

    lines: dict[Hashable, str] | None = None
    alive: list[torch.Tensor] | None = None  # so that an id stands for one tensor


_uses = _Uses()


@contextlib.contextmanager
def debug_key_reuse() -> Iterator[None]:
    """Within this context, using a key twice is an error that names both lines.

    Drawing from a key uses it, and so does :func:`split`; :func:`fold_in` does not. Two keys with the same words are one key,
    wherever they came from; :func:`clone` makes one that may be used once more. While a function is traced by
    :func:`~torchbatch.jit` there are no words, and what is compared is the key's tensors themselves.

    Raises:
        RandomnessError: by the function that is given a used key.

    Example:
        >>> from torchbatch import random
        >>> key = random.key(0)
        >>> with random.debug_key_reuse():
        ...     x = random.normal(key)
        ...     y = random.uniform(key)
        Traceback (most recent call last):
        ...
        torchbatch.errors.RandomnessError: uniform: this key was used before...

    Source: ``jax.debug_key_reuse``.
    """
    outer = _uses.lines, _uses.alive
    _uses.lines, _uses.alive = {}, []
    try:
        yield
    finally:
        _uses.lines, _uses.alive = outer


def _identities(first: torch.Tensor, second: torch.Tensor) -> list[Hashable]:
    """What tells each of the keys from others: its words, or in a trace, which has none, its tensor."""
    if overlay.is_traced() or torch.compiler.is_compiling():
        if _uses.alive is not None:
            _uses.alive.append(first)
        return [id(first)]
    words: Any = torch.broadcast_tensors(*[levels.innermost(word) for word in (first, second)])  # type: ignore[no-untyped-call]
    return list(dict.fromkeys(zip(*[word.flatten().tolist() for word in words], strict=True)))


def use(name: str, first: torch.Tensor, second: torch.Tensor) -> None:
    """Note that a function uses keys.

    Raises:
        RandomnessError: one of them was used before.
    """
    if _uses.lines is None:
        return
    line = caller.line()
    for identity in _identities(first, second):
        if identity in _uses.lines:
            raise RandomnessError(
                f"{name}: this key was used before, so the numbers would not be independent. Give each draw a key of its own: "
                f"key, subkey = split(key).\n first used{_uses.lines[identity] or ' in an unknown place'}\n used again{line}"
            )
        _uses.lines[identity] = line


def forget(first: torch.Tensor, second: torch.Tensor) -> None:
    """Take keys for unused ones."""
    if _uses.lines is not None:
        for identity in _identities(first, second):
            _uses.lines.pop(identity, None)
