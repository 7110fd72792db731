"""The check that no key is used twice."""

from __future__ import annotations

import threading

import pytest
import torch

from torchbatch import jit, random, vmap
from torchbatch.errors import RandomnessError


def test_both_lines_are_named():
    key = random.key(0)
    with random.debug_key_reuse(), pytest.raises(RandomnessError) as caught:
        x = random.normal(key)
        random.uniform(key), x
    text = str(caught.value)
    assert text.startswith(
        "uniform: this key was used before, so the numbers would not be independent. Give each draw a key of its own: key, "
        "subkey = split(key).\n first used\n  in test_both_lines_are_named, "
    )
    assert "x = random.normal(key)\n used again\n  in test_both_lines_are_named, " in text
    assert text.endswith("random.uniform(key), x")


@pytest.mark.parametrize(
    "second",
    [random.normal, random.split, random.bits, lambda key: random.choice(key, 5), lambda key: random.gamma(key, 1.0)],
)
def test_every_draw_uses_a_key(second):
    key = random.key(1)
    with random.debug_key_reuse():
        random.split(key)
        with pytest.raises(RandomnessError, match="this key was used before"):
            second(key)


def test_what_is_allowed():
    key = random.key(2)
    with random.debug_key_reuse():
        for step in range(2, 5):  # 0 and 1 are what split gives
            random.normal(random.fold_in(key, step))
        a, b = random.split(key)
        random.normal(a), random.normal(b)
        random.normal(random.clone(a))
        vmap(random.normal)(random.split(random.fold_in(key, 9), 5))


def test_keys_are_told_apart_by_their_words():
    with random.debug_key_reuse():
        random.normal(random.key(5))
        with pytest.raises(RandomnessError):
            random.normal(random.PRNGKey(5))


def test_inside_vmap():
    keys = random.split(random.key(0), 3)
    with random.debug_key_reuse():
        vmap(random.normal)(keys)
        with pytest.raises(RandomnessError):
            random.normal(keys[2])
    with random.debug_key_reuse(), pytest.raises(RandomnessError):
        vmap(lambda key: random.normal(key) + random.uniform(key))(keys)


def test_inside_jit():
    with random.debug_key_reuse(), pytest.raises(RandomnessError):
        jit(lambda key: random.normal(key) + random.uniform(key), backend="eager")(random.key(0))


def test_outside_and_in_other_threads_nothing_is_checked():
    key, seen = random.key(0), []
    random.normal(key), random.normal(key)
    with random.debug_key_reuse():
        random.normal(key)
        thread = threading.Thread(target=lambda: seen.append(random.normal(key)))
        thread.start()
        thread.join()
        with random.debug_key_reuse():
            random.normal(key)
        with pytest.raises(RandomnessError):
            random.normal(key)
    assert torch.equal(seen[0], random.normal(key))


def test_choice_uses_its_key_once():
    with random.debug_key_reuse():
        assert random.choice(random.key(0), 5).shape == ()
