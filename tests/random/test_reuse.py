"""The check that no key is used twice."""

from __future__ import annotations

import threading

import pytest
import torch

import torchbatch
from torchbatch import checkpoint, grad, jit, lax, random, vmap
from torchbatch.errors import RandomnessError, TorchbatchError


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


def test_two_samples_with_one_key():
    key = random.key(0)
    with random.debug_key_reuse(), pytest.raises(RandomnessError):
        vmap(random.normal)(torch.stack([key, key]))
    with random.debug_key_reuse():
        vmap(lambda key, x: x + random.normal(key), in_axes=(None, 0))(key, torch.zeros(3))  # one for all


RAW = random.PRNGKey(0)
TWICE = {
    "a key": lambda: (lambda key: random.normal(key) + random.uniform(key), random.key(0)),
    "a raw key": lambda: (lambda key: random.normal(key) + random.uniform(key), RAW),
    "a raw key as int32": lambda: (lambda key: random.normal(key) + random.uniform(key), RAW.view(torch.int32)),
    "an element": lambda: (lambda keys: random.normal(keys[1]) + random.uniform(keys[1]), random.split(random.key(0))),
    "what is closed over": lambda: (lambda x: random.normal(RAW) + random.uniform(RAW), torch.zeros(())),
    "made twice": lambda: (lambda seed: random.normal(random.key(seed)) + random.normal(random.key(seed)), torch.tensor(3)),
    "derived twice": lambda: (lambda key: random.normal(random.fold_in(key, 1)) + random.bits(random.fold_in(key, 1)).int(), RAW),
    "a part of a split key": lambda: (lambda key: random.randint(key, (), 0, 5) + random.normal(random.split(key)[0]), RAW),
    "samples": lambda: (vmap(lambda key: random.normal(key) + random.uniform(key)), random.split(random.key(0), 3)),
}


@pytest.mark.parametrize("name", TWICE)
def test_inside_jit(name):
    fun, key = TWICE[name]()
    for compiled in (fun, jit(fun, backend="eager")):
        compiled(key)  # it has been traced by now
        with random.debug_key_reuse(), pytest.raises(RandomnessError):
            compiled(key)
        compiled(key)


def test_calls_of_jit_functions():
    draw = jit(random.normal, backend="eager")
    keys = random.split(random.key(0), 3)
    wanted = draw(keys[0])
    with random.debug_key_reuse():
        assert torch.equal(draw(keys[0]), wanted)
        draw(keys[1])
        with pytest.raises(RandomnessError):
            draw(keys[0])
    assert draw.cache_size() == 1


@pytest.mark.parametrize("trace", [torchbatch.eval_shape, lambda fun, key: torchbatch.make_graph(fun)(key)])
def test_a_trace_uses_nothing(trace):
    key = random.key(0)
    with random.debug_key_reuse():
        trace(random.normal, key), trace(random.normal, key), random.normal(key)
        with pytest.raises(RandomnessError):
            random.normal(key)


def test_a_call_that_was_refused_used_nothing():
    key = random.key(0)
    refused = [
        lambda: random.normal(key, (-1,)),
        lambda: random.uniform(key, (3,), minval=torch.zeros(2)),
        lambda: random.categorical(key, torch.zeros(2), shape=(3,), replace=False),
        lambda: random.choice(key, 3, (2, 2), replace=False),
        lambda: random.poisson(key, 1.0, dtype=torch.float32),
        lambda: random.split(key, -1),
        lambda: random.dropout(key, torch.ones(3), 2.0),
    ]
    with random.debug_key_reuse():
        for call in refused:
            with pytest.raises(TorchbatchError):
                call()
        random.choice(key, 3, (0,)), random.dropout(key, torch.ones(3), 0)  # which draw nothing
        random.normal(key)


def test_clones_allow_one_use_more():
    key = random.key(0)
    with random.debug_key_reuse():
        copy, another = random.clone(key), random.clone(key)
        random.normal(key), random.normal(copy), random.normal(another)
        with pytest.raises(RandomnessError):
            random.normal(key)
        random.normal(random.clone(key))
        with pytest.raises(RandomnessError):
            random.normal(key)
    keys = random.split(key, 3)
    with random.debug_key_reuse():
        copies = vmap(random.clone)(keys)
        vmap(random.normal)(keys), vmap(random.normal)(copies)
        with pytest.raises(RandomnessError):
            random.normal(keys[1])


def test_chunks_with_one_key_for_all():
    key, x = random.key(0), torch.zeros(5)
    noisy = vmap(lambda key, x: x + random.normal(key), in_axes=(None, 0), chunk_size=2)
    with random.debug_key_reuse():
        noisy(key, x)
        with pytest.raises(RandomnessError):
            noisy(key, x)
    twice = vmap(lambda key, x: x + random.normal(key) + random.normal(key), in_axes=(None, 0), chunk_size=2)
    with random.debug_key_reuse(), pytest.raises(RandomnessError):
        twice(key, x)


def test_what_checkpoint_computes_again():
    key = random.key(0)
    with random.debug_key_reuse():
        block = checkpoint(lambda x: x * x * random.normal(key))
        grad(block)(torch.tensor(2.0))
        with pytest.raises(RandomnessError):
            random.normal(key)


def test_functions_of_which_each_sample_chooses_one():
    keys = random.split(random.key(0), 3)
    draw = vmap(lambda key, x: lax.cond(x > 0, random.normal, random.uniform, key))
    choose = vmap(lambda key, i: lax.switch(i, [random.normal, random.uniform, lambda key: random.normal(key) ** 2], key))
    for fun in (draw, choose):
        with random.debug_key_reuse():
            fun(keys, torch.tensor([1, -1, 2]))
            with pytest.raises(RandomnessError):
                random.normal(keys[1])
    twice = vmap(lambda key, x: lax.cond(x > 0, lambda key: random.normal(key) + random.normal(key), random.uniform, key))
    with random.debug_key_reuse(), pytest.raises(RandomnessError):
        twice(keys, torch.tensor([1, -1, 2]))


def test_samples_that_leave_a_loop_before_others():
    def step(carry):
        key, total = carry
        key, subkey = random.split(key)
        return key, total + random.uniform(subkey)

    run = vmap(lambda key, most: lax.while_loop(lambda carry: carry[1] < most, step, (key, torch.zeros(()))))
    keys = random.split(random.key(0), 3)
    with random.debug_key_reuse():
        run(keys, torch.tensor([0.1, 2.0, 0.5]))
        with pytest.raises(RandomnessError):
            random.normal(keys[0])


def test_a_step_that_runs_again_for_another_dtype():
    key = random.key(0)
    with random.debug_key_reuse():
        lax.fori_loop(0, 3, lambda i, total: total + random.normal(random.fold_in(key, i)), 0)
        with pytest.raises(RandomnessError):
            random.normal(random.fold_in(key, 1))


def test_a_key_that_each_step_uses():
    key = random.key(0)
    with random.debug_key_reuse(), pytest.raises(RandomnessError):
        lax.scan(lambda carry, x: (carry, x + random.normal(key)), 0.0, torch.zeros(3))


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
