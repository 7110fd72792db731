"""Keys: made, split, mapped, traced, stored, and what they refuse."""

from __future__ import annotations

import copy
import io
import pickle
import threading

import numpy as np
import pytest
import torch

import torchbatch
from torchbatch import jit, random, tree, vmap
from torchbatch._torch import draw_math, draw_ops
from torchbatch.errors import AxisError, AxisSpecError, InputTypeError
from torchbatch.testing import loop

# --- the same keys as JAX's ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1, 42, -1, -(2**63), 2**31, 2**32 + 5, 2**63 - 1])
def test_seeds(both, equal_bits, seed):
    equal_bits(random.key_data(random.key(seed)), both.random.key_data(both.random.key(seed)))
    equal_bits(random.PRNGKey(seed), both.random.PRNGKey(seed))


@pytest.mark.parametrize("seed", [np.uint8(200), np.int16(-3), np.int32(-1), np.uint32(2**32 - 1), np.int64(7)])
def test_seeds_of_other_dtypes(both, equal_bits, seed):
    with both.x64(False):
        theirs = both.random.key_data(both.random.key(seed))
    equal_bits(random.key_data(random.key(torch.from_numpy(np.array(seed)))), theirs)
    equal_bits(random.key_data(random.key(seed)), theirs)


@pytest.mark.parametrize("num", [0, 1, 3, 9, (2, 3)])
def test_split(both, equal_bits, num):
    key, theirs = both.keys(5)
    found = random.split(key, num)
    assert found.partitionable is both.partitionable
    equal_bits(random.key_data(found), both.random.key_data(both.random.split(theirs, num)))
    equal_bits(random.split(random.PRNGKey(5), num), both.random.split(both.random.PRNGKey(5), num))


@pytest.mark.parametrize("data", [0, 1, 77, 2**32 - 1, np.int32(-1), np.uint32(3), np.int8(-5)])
def test_fold_in(both, equal_bits, data):
    key, theirs = both.keys(5)
    wanted = both.random.key_data(both.random.fold_in(theirs, data))
    equal_bits(random.key_data(random.fold_in(key, data)), wanted)
    word = torch.tensor(int(data))
    equal_bits(random.key_data(random.fold_in(key, word)), wanted)
    equal_bits(random.fold_in(random.PRNGKey(5), word), wanted)


def test_to_jax_and_back(both, equal_bits):
    key, theirs = both.keys(11)
    there = both.random.wrap_key_data(random.key_data(key).numpy())
    equal_bits(random.uniform(key, (3,)), both.random.uniform(there, (3,)))
    back = random.wrap_key_data(np.asarray(both.random.key_data(theirs)))
    assert bool(back == key)


# --- hashing ---------------------------------------------------------------------------------------------------------


def test_python_integers_hash_as_tensors_do():
    words = torch.randint(-(2**31), 2**31, (4, 50), dtype=torch.int32)
    first, second = draw_ops.threefry2x32(*words)
    for i in range(50):
        a, b, c, d = words[:, i].tolist()
        assert draw_math.threefry2x32_of_ints((a, b), (c, d)) == (first[i], second[i])


def test_known_answers():
    """From the reference implementation of Random123."""
    full = 0xFFFFFFFF
    cases = [
        ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
        ((full, full), (full, full), (0x1CB996FC, 0xBB002BE7)),
        ((0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3), (0xC4923A9C, 0x483DF7A0)),
    ]
    for key, count, answer in cases:
        found = draw_math.threefry2x32_of_ints(key, count)
        assert tuple(word & full for word in found) == answer


@pytest.mark.parametrize("shape", [(70000,), (3, 40000), (2, 3, 9000), (40000, 2), (1, 1, 70000)])
def test_large_arrays_are_hashed_in_blocks(shape):
    count = torch.arange(torch.Size(shape).numel(), dtype=torch.int32).reshape(shape)
    word = torch.full([1] * len(shape), 7, dtype=torch.int32)
    rows = torch.arange(shape[0], dtype=torch.int32).reshape(-1, *[1] * (len(shape) - 1))
    for key in (word, rows):
        wanted = draw_math.threefry2x32(draw_math.OnTensors, (key, word), (word * 0, count))
        found = draw_ops.threefry2x32(key, word, word * 0, count)
        assert torch.equal(found[0], wanted[0]) and torch.equal(found[1], wanted[1])


# --- arrays of keys --------------------------------------------------------------------------------------------------


def test_arrays_of_keys():
    keys = random.split(random.key(0), (2, 3))
    assert keys.shape == (2, 3) and keys.ndim == 2 and keys.size == 6 and len(keys) == 2
    assert keys.device == torch.device("cpu")
    assert [row.shape for row in keys] == [(3,), (3,)]
    assert keys[1, 2].shape == () and keys[:, 1].shape == (2,)
    assert keys.reshape(3, 2).shape == keys.reshape((3, 2)).shape == (3, 2)
    assert keys.flatten().shape == (6,)
    assert (keys == keys).all() and not (keys[0] == keys[1]).any()
    assert (torch.stack([keys[0], keys[1]]) == keys).all()
    assert torch.cat([keys, keys]).shape == (4, 3)
    assert keys.__eq__(3) is NotImplemented


def test_how_they_look():
    assert repr(random.key(3)) == "Key(shape=(), [0 3])"
    assert repr(random.key(3, partitionable=False)) == "Key(shape=(), [0 3], partitionable=False)"
    assert repr(random.split(random.key(3), 100)) == "Key(shape=(100,))"
    seen = []
    vmap(lambda key: (seen.append(repr(key)), random.uniform(key))[1])(random.split(random.key(0)))
    assert seen == ["Key(shape=())"]


def test_keys_are_trees():
    key = random.key(3, partitionable=False)
    leaves, structure = tree.flatten({"key": key})
    assert len(leaves) == 2
    assert bool(tree.unflatten(structure, leaves)["key"] == key)
    assert structure != tree.structure({"key": random.key(3)})


@pytest.mark.parametrize("axis", [0, 1, -1, -2])
def test_any_axis_of_an_array_is_mapped(axis):
    keys = random.split(random.key(0), (2, 3))
    found = vmap(vmap(random.uniform), in_axes=axis)(keys)
    wanted = vmap(vmap(random.uniform))(keys)
    assert torch.equal(found, wanted if axis in (0, -2) else wanted.T)
    moved = vmap(vmap(lambda key: key), in_axes=axis, out_axes=axis)(keys)
    assert (moved == keys).all()


def test_keys_inside_other_arguments():
    state = {"key": random.split(random.key(0), 3), "x": torch.arange(3.0)}
    fun = lambda state: {"key": random.fold_in(state["key"], 1), "x": state["x"] + random.uniform(state["key"])}  # noqa: E731
    ours, loops = vmap(fun)(state), loop(fun)(state)
    assert torch.equal(ours["x"], loops["x"]) and (ours["key"] == loops["key"]).all()
    shared = vmap(lambda key, x: x + random.uniform(key), in_axes=(None, 0))(random.key(1), torch.zeros(3))
    assert torch.equal(shared, random.uniform(random.key(1)).expand(3))
    mapped = vmap(lambda state: random.uniform(state["key"]), in_axes=({"key": 0, "x": None},))
    assert torch.equal(mapped(state), vmap(random.uniform)(state["key"]))


def test_seeds_and_numbers_are_mapped():
    seeds = torch.tensor([0, 5, -1])
    keys = vmap(random.key)(seeds)
    assert all(bool(keys[i] == random.key(seed)) for i, seed in enumerate(seeds.tolist()))
    steps = vmap(random.fold_in, in_axes=(None, 0))(random.key(0), torch.tensor([1, 2]))
    assert bool(steps[1] == random.fold_in(random.key(0), 2))
    raw = vmap(random.PRNGKey)(seeds)
    assert torch.equal(raw.view(torch.int32), random.key_data(keys).view(torch.int32))


def test_raw_keys_work_everywhere():
    raw, key = random.split(random.PRNGKey(3), 4), random.split(random.key(3), 4)
    assert torch.equal(vmap(random.normal)(raw), vmap(random.normal)(key))
    signed = raw.view(torch.int32)
    assert torch.equal(random.normal(signed[1]), random.normal(key[1]))
    assert random.split(signed[0]).dtype is torch.int32
    assert torch.equal(jit(vmap(random.normal), backend="eager")(raw), vmap(random.normal)(key))
    assert torch.equal(random.key_data(raw).view(torch.int32), signed)


# --- jit, and what keeps keys ----------------------------------------------------------------------------------------


def test_jit_takes_and_returns_keys():
    step = jit(lambda key: (random.split(key), random.normal(key, (2,))), backend="eager")
    key = random.key(9)
    keys, x = step(key)
    assert (keys == random.split(key)).all() and torch.equal(x, random.normal(key, (2,)))
    old = random.key(9, partitionable=False)
    keys, x = step(old)
    assert (keys == random.split(old)).all() and not keys.partitionable
    assert torch.equal(x, random.normal(old, (2,)))
    step(random.key(10))
    assert step.cache_size() == 2


def test_jit_makes_keys_of_numbers():
    draw = jit(lambda seed, data: random.uniform(random.fold_in(random.key(seed), data)), backend="eager")
    for seed, data in ((0, 1), (-5, 2**31)):
        assert torch.equal(draw(seed, data), random.uniform(random.fold_in(random.key(seed), data)))
    assert draw.cache_size() == 1
    closed = random.key(4)
    assert torch.equal(jit(lambda: random.normal(closed), backend="eager")(), random.normal(closed))


def test_what_is_drawn_is_one_step_of_a_graph():
    text = str(torchbatch.make_graph(lambda key: random.normal(key, (5,)))(random.key(0)))
    assert text.count("threefry2x32") == 1 and text.count("name=normal") == 1


@pytest.mark.parametrize("keep", ["pickle", "copy", "deepcopy", "torch.save"])
def test_keys_are_kept(keep):
    keys = random.split(random.key(3, partitionable=False), 3)
    if keep == "torch.save":
        file = io.BytesIO()
        torch.save({"key": keys}, file)
        file.seek(0)
        found = torch.load(file)["key"]
    else:
        copies = {"pickle": lambda x: pickle.loads(pickle.dumps(x)), "copy": copy.copy, "deepcopy": copy.deepcopy}
        found = copies[keep](keys)
    assert (found == keys).all() and not found.partitionable


def test_keys_move():
    keys = random.split(random.key(3), 2)
    assert keys.to("meta").device.type == "meta" and keys.cpu().device.type == "cpu"
    with torch.device("meta"):
        assert random.key(0).device.type == "meta"


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("name", ["bits", "uniform", "normal", "gumbel", "logistic", "laplace", "exponential"])
@pytest.mark.parametrize("backend", [None, "inductor"])
def test_other_devices_give_the_same_bits(equal_bits, name, backend):
    fun = lambda key: getattr(random, name)(key, (10007,))  # noqa: E731
    on_gpu = fun if backend is None else jit(fun, backend=backend)
    equal_bits(on_gpu(random.key(3).cuda()).cpu(), fun(random.key(3)))


# --- modes -----------------------------------------------------------------------------------------------------------


def test_modes():
    new, old = random.key(0), random.key(0, partitionable=False)
    assert new.partitionable and not old.partitionable
    with random.threefry_partitionable(False):
        assert not random.key(0).partitionable
        assert not random.wrap_key_data(random.PRNGKey(0)).partitionable
        assert random.key(0, partitionable=True).partitionable
        assert torch.equal(random.uniform(new), random.uniform(random.key(0, partitionable=True)))
        assert torch.equal(random.uniform(random.PRNGKey(0)), random.uniform(old))
        with random.threefry_partitionable(True):
            assert random.key(0).partitionable
        assert not random.key(0).partitionable
    assert random.key(0).partitionable
    assert not torch.equal(random.uniform(new), random.uniform(old))
    with pytest.raises(ZeroDivisionError), random.threefry_partitionable(False):
        raise ZeroDivisionError
    assert random.key(0).partitionable


def test_a_key_shares_no_memory_with_its_words():
    for words in (random.PRNGKey(5), np.array([0, 5], np.uint32), torch.tensor([0, 5], dtype=torch.int32)):
        key = random.wrap_key_data(words)
        words[1] = 7
        assert bool(key == random.key(5))


MODES = {
    "a raw key": (lambda raw: random.normal(raw, (3,)), random.PRNGKey(0)),
    "raw keys": (vmap(lambda raw: random.normal(raw, (3,))), random.split(random.PRNGKey(0), 4)),
    "a seed": (lambda seed: random.key_data(random.split(random.key(seed))), torch.tensor(3)),
    "a key that is returned": (random.key, torch.tensor(3)),
    "a number": (lambda seed: random.uniform(random.key(seed), (2,)), 3),
}


@pytest.mark.parametrize("name", MODES)
@pytest.mark.parametrize("first", [True, False])
def test_jit_traces_anew_for_the_other_mode(equal_bits, name, first):
    fun, argument = MODES[name]
    traced, wanted = jit(fun, backend="eager"), {}
    for mode in (True, False):
        with random.threefry_partitionable(mode):
            wanted[mode] = fun(argument)
    for mode in (first, first, not first, not first, first, not first):
        with random.threefry_partitionable(mode):
            equal_bits(traced(argument), wanted[mode])
        if mode:
            equal_bits(traced(argument), wanted[mode])
    assert traced.cache_size() == 2


def test_the_mode_of_another_thread_is_its_own():
    draw = jit(random.normal, backend="eager")
    raw, wanted, seen = random.PRNGKey(0), random.normal(random.PRNGKey(0)), []
    draw(raw)
    with random.threefry_partitionable(False):
        thread = threading.Thread(target=lambda: seen.append(draw(raw)))
        thread.start()
        thread.join()
        assert draw(raw) == random.normal(raw) != wanted
    assert torch.equal(seen[0], wanted) and draw.cache_size() == 2


def test_what_was_lowered_keeps_its_mode():
    raw = random.PRNGKey(0)
    compiled = jit(random.normal, backend="eager").lower(raw).compile()
    with random.threefry_partitionable(False):
        assert compiled(raw) != random.normal(raw)
    assert compiled(raw) == random.normal(raw)


def test_checkpoint_computes_again_in_the_same_mode():
    raw, x = random.PRNGKey(0), torch.tensor(2.0, requires_grad=True)
    with random.threefry_partitionable(False):
        y, noise = torchbatch.checkpoint(lambda x: x * x * random.normal(raw))(x), random.normal(raw)
    y.backward()
    assert torch.equal(x.grad, 4 * noise)
    with random.threefry_partitionable(False):
        slope = torchbatch.grad(torchbatch.checkpoint(lambda x: x * x * random.normal(raw)))(x.detach())
    assert torch.equal(slope, 4 * noise)


def test_clone():
    key = random.key(5)
    assert bool(random.clone(key) == key) and random.clone(key) is not key


# --- errors ----------------------------------------------------------------------------------------------------------

KEYS = random.split(random.key(0), 3)
NO_KEY = "the key must come from torchbatch.random (key, PRNGKey, split, fold_in), but it is "
RAW = "a raw key is a tensor of uint32 (or int32) whose last axis has size 2, but this is "
ERRORS = {
    "a large seed": (
        lambda: random.key(2**63), AxisError,
        f"key: the seed must fit into a signed integer of 64 bits, but it is {2**63}.",
    ),
    "a float as seed": (lambda: random.key(1.5), InputTypeError, "key: seed must be an integer, but it is 1.5 of type float."),
    "a bool as seed": (
        lambda: random.PRNGKey(True), InputTypeError,
        "PRNGKey: seed must be an integer, but it is True of type bool.",
    ),
    "an array of seeds": (
        lambda: random.key(torch.arange(3)), InputTypeError,
        "key: seed must be one integer, but it is int64[3]. Map over it with vmap.",
    ),
    "another generator": (
        lambda: random.key(0, impl="rbg"), AxisSpecError, "key: the generator is 'threefry2x32'; there is no 'rbg' of type str.",
    ),
    "two generators": (
        lambda: random.key(0, impl="fry", dtype="fry"), AxisError, "key: impl and dtype say the same thing; give one of them.",
    ),
    "a mode": (
        lambda: random.key(0, partitionable=1), AxisSpecError,
        "key: partitionable must be True or False, but it is 1 of type int.",
    ),
    "no key": (lambda: random.uniform(0), InputTypeError, f"uniform: {NO_KEY}0 of type int."),
    "a float tensor": (lambda: random.normal(torch.zeros(2)), InputTypeError, f"normal: {RAW}float32[2]."),
    "three words": (lambda: random.split(torch.zeros(3, dtype=torch.int32)), InputTypeError, f"split: {RAW}int32[3]."),
    "an array of keys": (
        lambda: random.normal(KEYS), AxisError,
        "normal takes a single key, but it got an array of keys of shape (3,). Map over it with vmap.",
    ),
    "words that are no array": (
        lambda: random.wrap_key_data("ab"), InputTypeError,
        "wrap_key_data: the words must be an array of uint32, but they are 'ab' of type str.",
    ),
    "a negative number": (lambda: random.fold_in(KEYS[0], -1), AxisError, "fold_in: data must be in [0, 2**32), but it is -1."),
    "no number": (
        lambda: random.fold_in(KEYS[0], 0.5), InputTypeError,
        "fold_in: data must be an integer, but it is 0.5 of type float.",
    ),
    "num": (
        lambda: random.split(KEYS[0], 2.0), AxisSpecError,
        "split: num must be an int or a tuple of ints, but it is 2.0 of type float.",
    ),
    "a negative num": (lambda: random.split(KEYS[0], -1), AxisError, "split: num must not be negative, but it is -1."),
    "a mode that is none": (
        lambda: random.threefry_partitionable(None).__enter__(), AxisSpecError,
        "threefry_partitionable: new_val must be True or False, but it is None of type NoneType.",
    ),
    "words of NumPy": (
        lambda: random.uniform(np.zeros(2, np.uint32)), InputTypeError,
        f"uniform: {NO_KEY}array([0, 0], dtype=uint32) of type ndarray and dtype uint32. wrap_key_data makes a key of words.",
    ),
    "a raw key that is mapped": (
        lambda: vmap(random.uniform)(random.PRNGKey(0)), InputTypeError,
        f"uniform: {RAW}uint32[]. An array of keys, such as split gives, can be mapped over.",
    ),
    "a torch function": (
        lambda: torch.exp(KEYS), InputTypeError,
        "torch.exp got a Key, which is no tensor. Draw from it with the functions of torchbatch.random; key_data(key) "
        "gives its words.",
    ),
    "keys of both modes": (
        lambda: torch.stack([KEYS[0], random.key(0, partitionable=False)]), InputTypeError,
        "torch.stack got keys together with what is none, or keys of both modes.",
    ),
    "keys and tensors": (
        lambda: torch.stack([KEYS[0], torch.zeros(())]), InputTypeError,
        "torch.stack got keys together with what is none, or keys of both modes.",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    call, kind, text = ERRORS[name]
    with pytest.raises(kind) as caught:
        call()
    assert str(caught.value) == text


def test_keys_are_compared_one_by_one():
    others = torch.stack([KEYS[0], KEYS[0], KEYS[2]])
    same, different = others == KEYS, others != KEYS
    assert same.tolist() == [True, False, True] and different.tolist() == [False, True, False]
    assert KEYS != 3


def test_keys_are_stacked_by_name_and_chosen():
    assert torch.stack(tensors=[KEYS[0], KEYS[1]], dim=0).shape == (2,)
    chosen = torch.where(torch.tensor([True, False, True]), KEYS, KEYS[0])
    assert (chosen == torch.stack([KEYS[0], KEYS[0], KEYS[2]])).all()
    with pytest.raises(InputTypeError, match="where got keys together with what is none, or keys of both modes"):
        torch.where(torch.tensor(True), KEYS[0], torch.zeros(()))


def test_keys_cannot_be_hashed():
    with pytest.raises(TypeError):
        hash(random.key(0))
