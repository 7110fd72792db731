"""A check that no key is used twice."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch

from torchbatch._torch import caller, draw_state, levels, overlay
from torchbatch.errors import RandomnessError


@contextlib.contextmanager
def debug_key_reuse() -> Iterator[None]:
    """Within this context, using a key twice is an error that names both lines.

    Drawing from a key uses it, and so does :func:`split`; :func:`fold_in` does not, nor does a call that is refused or draws
    nothing. Two keys with the same words are one key, wherever they came from, those of two samples too. :func:`clone` allows
    one use more. Functions of :func:`~torchbatch.jit` are not compiled here, but run as they are.

    These are not repeated uses: the chunks of a map with one key for all samples; the functions of a
    :func:`~torchbatch.lax.cond` that is decided for each sample, of which each uses the key; what
    :func:`~torchbatch.checkpoint` computes again.

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
    with draw_state.checking():
        yield


def begin(name: str) -> None:
    """Note which function draws."""
    if draw_state.contexts:
        uses = draw_state.uses()
        if uses is not None:
            uses.name = name


def use(first: torch.Tensor, second: torch.Tensor) -> None:
    """Note that keys are used.

    Raises:
        RandomnessError: one of them was used before, or two of them are the same.
    """
    uses = draw_state.uses()
    if uses is None:
        return
    line = caller.line() or " in an unknown place"
    for words, count in _words(first, second).items():
        lines = uses.lines.get(words, [])
        if len(lines) + count > 1 + uses.spare.get(words, 0):
            raise _used_twice(uses.name, [*lines, *[line] * count])
        uses.lines[words] = [*lines, *[line] * count]


def _used_twice(name: str, lines: list[str]) -> RandomnessError:
    return RandomnessError(
        f"{name}: this key was used before, so the numbers would not be independent. Give each draw a key of its own: "
        f"key, subkey = split(key).\n first used{lines[0]}\n used again{lines[-1]}"
    )


def allow(first: torch.Tensor, second: torch.Tensor) -> None:
    """Let keys be used once more."""
    uses = draw_state.uses()
    if uses is not None:
        for words in _words(first, second):
            uses.spare[words] = uses.spare.get(words, 0) + 1


def _words(first: torch.Tensor, second: torch.Tensor) -> Counter[tuple[int, int]]:
    """The words of all keys, each with how many have them; in a trace there are none."""
    if overlay.is_traced() or torch.compiler.is_compiling() or first.device.type == "meta":
        return Counter()
    words: Any = torch.broadcast_tensors(*[levels.innermost(word) for word in (first, second)])  # type: ignore[no-untyped-call]
    return Counter(zip(*[word.flatten().tolist() for word in words], strict=True))
