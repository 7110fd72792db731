"""Keys: what they are, how they are made, and how one becomes many."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from torchbatch._torch import draw_math, draw_ops, draw_state, registry
from torchbatch.core.arrays import as_tensor
from torchbatch.core.describe import describe, shown
from torchbatch.errors import AxisError, AxisSpecError, InputTypeError
from torchbatch.random import reuse

_INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16, torch.uint32, torch.uint64)
_NAMES = (None, "threefry2x32", "fry")


@contextlib.contextmanager
def threefry_partitionable(new_val: bool) -> Iterator[None]:
    """Within this context, keys are made for one of JAX's two ways of counting.

    Args:
        new_val: True for that of today's JAX, False for the one that was the default before JAX 0.5. The numbers differ.

    A key remembers its way, so this is asked where :func:`key`, :func:`PRNGKey` or :func:`wrap_key_data` makes one. Raw keys,
    which are bare tensors, remember nothing: for them it is asked at each draw. A function of :func:`~torchbatch.jit` is traced
    anew for the other way.

    Raises:
        AxisSpecError: ``new_val`` is no bool.

    Example:
        >>> from torchbatch import random
        >>> with random.threefry_partitionable(False):
        ...     old = random.key(0)
        >>> random.uniform(old), random.uniform(random.key(0))
        (tensor(0.4185), tensor(0.9477))

    Source: ``jax.threefry_partitionable``, the context of the setting ``jax_threefry_partitionable``.
    """
    with draw_state.counting(_checked_mode("threefry_partitionable: new_val", new_val)):
        yield


def _mode(name: str, partitionable: bool | None) -> bool:
    return draw_state.partitionable() if partitionable is None else _checked_mode(f"{name}: partitionable", partitionable)


def _checked_mode(argument: str, mode: Any) -> bool:
    if not isinstance(mode, bool):
        raise AxisSpecError(f"{argument} must be True or False, but it is {shown(mode)}.")
    return mode


class Key:
    """One key, or an array of them: two words of 32 bits each, as two int32 tensors of the shape of the array.

    A key is a node of trees, so it can be mapped by :func:`~torchbatch.vmap`, passed to :func:`~torchbatch.jit`, returned and
    saved as part of any tree. Its axes are those of the array: a key array of shape ``[n]`` is mapped over axis 0.

    Attributes:
        first, second: the words.
        partitionable: which of JAX's two ways of counting is meant, see :func:`threefry_partitionable`.

    Example:
        >>> import torch
        >>> from torchbatch import random, vmap
        >>> keys = random.split(random.key(7), 3)
        >>> keys
        Key(shape=(3,), [[3625411723 1954958720] [ 195045567 4062205631] [ 966301609 1948237315]])
        >>> vmap(random.uniform)(keys).shape
        torch.Size([3])
        >>> torch.stack([keys[0], keys[2]]).shape
        torch.Size([2])

    Source: the key arrays of ``jax.random.key``.
    """

    def __init__(self, first: Any, second: Any, partitionable: bool = True) -> None:
        self.first, self.second, self.partitionable = first, second, partitionable

    @property
    def shape(self) -> torch.Size:
        """The shape of the array of keys."""
        return torch.Size(self.first.shape)

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """The number of keys."""
        return math.prod(self.shape)

    @property
    def device(self) -> torch.device:
        """Where the words are, and what is drawn with them."""
        found: torch.device = self.first.device
        return found

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Key:
        return Key(change(self.first), change(self.second), self.partitionable)

    def to(self, device: Any) -> Key:
        """The same keys on another device."""
        return self._each(lambda word: word.to(device=device))

    def cpu(self) -> Key:
        """The same keys in main memory."""
        return self.to("cpu")

    def cuda(self) -> Key:
        """The same keys on the GPU."""
        return self.to("cuda")

    def reshape(self, *shape: Any) -> Key:
        """The same keys as an array of another shape."""
        return self._each(lambda word: word.reshape(*shape))

    def flatten(self) -> Key:
        """The same keys along one axis."""
        return self.reshape(-1)

    def __getitem__(self, index: Any) -> Key:
        return self._each(lambda word: word[index])

    def __len__(self) -> int:
        return len(self.first)

    def __iter__(self) -> Iterator[Key]:
        return (self[i] for i in range(len(self)))

    def __eq__(self, other: object) -> Any:
        if not isinstance(other, Key):
            return NotImplemented
        return (self.first == other.first) & (self.second == other.second)

    def __ne__(self, other: object) -> Any:
        return ~(self == other) if isinstance(other, Key) else NotImplemented

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        if not isinstance(self.first, torch.Tensor) or not draw_ops.is_plain() or not self.size <= 8:
            return f"Key(shape={tuple(getattr(self.first, 'shape', ()))})"
        words = " ".join(np.array2string(key_data(self).cpu().numpy()).split())
        old = "" if self.partitionable else ", partitionable=False"
        return f"Key(shape={tuple(self.shape)}, {words}{old})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in _STRUCTURAL:
            raise InputTypeError(
                f"torch.{getattr(func, '__name__', func)} got a Key, which is no tensor. Draw from it with the functions of "
                f"torchbatch.random; key_data(key) gives its words."
            )
        if func is torch.where:
            return _chosen(*args, **(kwargs or {}))
        kwargs = dict(kwargs or {})
        keys, *rest = args or (kwargs.pop("tensors"),)
        modes = {item.partitionable for item in keys} if all(isinstance(item, Key) for item in keys) else set()
        if len(modes) != 1:
            raise InputTypeError(f"torch.{func.__name__} got keys together with what is none, or keys of both modes.")
        first, second = (func([getattr(item, word) for item in keys], *rest, **kwargs) for word in ("first", "second"))
        return Key(first, second, modes.pop())


def _chosen(condition: torch.Tensor, input: Any, other: Any) -> Key:
    if not isinstance(input, Key) or not isinstance(other, Key) or input.partitionable is not other.partitionable:
        raise InputTypeError("torch.where got keys together with what is none, or keys of both modes.")
    first, second = (torch.where(condition, *pair) for pair in ((input.first, other.first), (input.second, other.second)))
    return Key(first, second, input.partitionable)


_STRUCTURAL = (torch.stack, torch.cat, torch.concat, torch.concatenate, torch.where)
registry.register(registry.attribute_node(Key, ("first", "second"), ("partitionable",)))
torch.serialization.add_safe_globals([Key])
KeyLike = Key | torch.Tensor


# --- making keys -----------------------------------------------------------------------------------------------------


def key(seed: Any, *, impl: str | None = None, dtype: str | None = None, partitionable: bool | None = None) -> Key:
    """A key made of a seed.

    Shapes: ``[] -> []``.

    Args:
        seed: an integer, or an integer tensor without dimensions. Its low 32 bits count, as in JAX with 32-bit integers.
        impl: the name of the generator; there is ``"threefry2x32"``, which is JAX's default.
        dtype: the same, in JAX's other spelling.
        partitionable: which of JAX's two ways of counting is meant; None is that of :func:`threefry_partitionable`.

    Returns:
        A single key.

    Raises:
        InputTypeError: ``seed`` is no integer, or is an array.
        AxisError: ``seed`` does not fit into 64 bits.
        AxisSpecError: there is no such generator.

    Example:
        >>> from torchbatch import random
        >>> random.normal(random.key(0), (3,))
        tensor([ 1.6226,  2.0253, -0.4336])

    Source: ``jax.random.key``.
    """
    _check_impl("key", impl, dtype)
    mode = _mode("key", partitionable)
    return Key(*_seeded("key", seed), mode)


def PRNGKey(seed: Any, *, impl: str | None = None) -> torch.Tensor:  # noqa: N802
    """A raw key made of a seed: its two words as a tensor, in the older style.

    Shapes: ``[] -> [2]``.

    Args:
        seed: as in :func:`key`.
        impl: as in :func:`key`.

    Returns:
        A tensor of uint32. All functions take it in the place of a :class:`Key`.

    Raises:
        InputTypeError, AxisError, AxisSpecError: as in :func:`key`.

    Example:
        >>> from torchbatch import random
        >>> random.PRNGKey(42)
        tensor([ 0, 42], dtype=torch.uint32)

    Source: ``jax.random.PRNGKey``.
    """
    _check_impl("PRNGKey", impl, None)
    return key_data(Key(*_seeded("PRNGKey", seed)))


def _check_impl(name: str, impl: Any, dtype: Any) -> None:
    if impl is not None and dtype is not None:
        raise AxisError(f"{name}: impl and dtype say the same thing; give one of them.")
    for given in (impl, dtype):
        if given not in _NAMES:
            raise AxisSpecError(f"{name}: the generator is 'threefry2x32'; there is no {shown(given)}.")


def _seeded(name: str, seed: Any) -> tuple[torch.Tensor, torch.Tensor]:
    if isinstance(seed, int) and not isinstance(seed, bool):
        if not -(2**63) <= seed < 2**63:
            raise AxisError(f"{name}: the seed must fit into a signed integer of 64 bits, but it is {seed}.")
        return torch.tensor(0, dtype=torch.int32), torch.tensor(draw_math.signed(seed), dtype=torch.int32)
    word = _word(name, "seed", seed)
    return torch.zeros_like(word), word


def _word(name: str, argument: str, value: Any) -> torch.Tensor:
    """The low 32 bits of an integer tensor without dimensions."""
    found = None if isinstance(value, Key) else as_tensor(value)
    if found is None or found.dtype not in _INTEGERS:
        raise InputTypeError(f"{name}: {argument} must be an integer, but it is {shown(value)}.")
    if found.dim():
        raise InputTypeError(f"{name}: {argument} must be one integer, but it is {describe(found)}. Map over it with vmap.")
    return _as_int32(found)


def _as_int32(value: torch.Tensor) -> torch.Tensor:
    """The low 32 bits of integers as int32."""
    if value.dtype is torch.int32:
        return value
    if value.dtype in (torch.uint32, torch.uint64, torch.uint16):
        value = draw_ops.same_bits(value, {4: torch.int32, 8: torch.int64, 2: torch.int16}[value.itemsize])
        value = value & 0xFFFF if value.itemsize == 2 else value
    if value.dtype is torch.int64:
        value = ((value & draw_math.WORD) ^ 0x80000000) - 0x80000000
    return value.to(torch.int32)


def key_data(keys: KeyLike) -> torch.Tensor:
    """The words of keys as a tensor, which JAX's ``wrap_key_data`` takes after ``.numpy()``.

    Shapes: ``[…] -> […, 2]``.

    Args:
        keys: a key or an array of keys; raw keys are returned as they are.

    Returns:
        A tensor of uint32.

    Raises:
        InputTypeError: ``keys`` is neither.

    Example:
        >>> from torchbatch import random
        >>> random.key_data(random.key(42))
        tensor([ 0, 42], dtype=torch.uint32)

    Source: ``jax.random.key_data``.
    """
    if isinstance(keys, torch.Tensor):
        wrapped("key_data", keys)
        return keys
    found = wrapped("key_data", keys)
    return draw_ops.same_bits(torch.stack((found.first, found.second), -1), torch.uint32)


def wrap_key_data(
    key_bits_array: Any, *, impl: str | None = None, dtype: str | None = None, partitionable: bool | None = None
) -> Key:
    """Keys whose words are given.

    Shapes: ``[…, 2] -> […]``.

    Args:
        key_bits_array: a tensor or an array of 32-bit integers, such as ``jax.random.key_data(key)``.
        impl: as in :func:`key`.
        dtype: as in :func:`key`.
        partitionable: as in :func:`key`.

    Returns:
        The key, or the array of keys, which shares no memory with the words.

    Raises:
        InputTypeError: the words are no 32-bit integers, or the last axis is not of size 2.
        AxisSpecError: there is no such generator.

    Example:
        >>> from torchbatch import random
        >>> random.wrap_key_data(random.PRNGKey(42)) == random.key(42)
        tensor(True)

    Source: ``jax.random.wrap_key_data``.
    """
    _check_impl("wrap_key_data", impl, dtype)
    words = as_tensor(key_bits_array)
    if words is None:
        raise InputTypeError(f"wrap_key_data: the words must be an array of uint32, but they are {shown(key_bits_array)}.")
    found = _of_words("wrap_key_data", words, _mode("wrap_key_data", partitionable))
    return found._each(torch.clone)  # or the key would change with the array


def _of_words(name: str, words: torch.Tensor, partitionable: bool) -> Key:
    if words.dtype not in (torch.uint32, torch.int32) or not words.dim() or words.shape[-1] != 2:
        hint = "" if words.dim() else " An array of keys, such as split gives, can be mapped over."
        raise InputTypeError(
            f"{name}: a raw key is a tensor of uint32 (or int32) whose last axis has size 2, but this is {describe(words)}.{hint}"
        )
    words = draw_ops.same_bits(words, torch.int32)
    return Key(words[..., 0], words[..., 1], partitionable)


def wrapped(name: str, value: Any) -> Key:
    """Keys in either style as a :class:`Key`.

    Raises:
        InputTypeError: it is neither.
    """
    if isinstance(value, Key):
        return value
    if isinstance(value, torch.Tensor):
        return _of_words(name, value, draw_state.partitionable())
    hint = " wrap_key_data makes a key of words." if hasattr(value, "__array__") else ""
    raise InputTypeError(
        f"{name}: the key must come from torchbatch.random (key, PRNGKey, split, fold_in), but it is {shown(value)}.{hint}"
    )


def single(name: str, value: Any) -> Key:
    """The key that a function is called with, which it will use up.

    Raises:
        InputTypeError: it is no key.
        AxisError: it is an array of keys.
    """
    reuse.begin(name)
    return _one(name, value)


def _one(name: str, value: Any) -> Key:
    found = wrapped(name, value)
    if found.ndim:
        raise AxisError(
            f"{name} takes a single key, but it got an array of keys of shape {tuple(found.shape)}. Map over it with vmap."
        )
    return found


# --- one key becomes many --------------------------------------------------------------------------------------------


def split(key: KeyLike, num: int | Sequence[int] = 2) -> Any:
    """New keys made of one, which should not be used again.

    Shapes: ``[] -> [num]``.

    Args:
        key: a single key.
        num: how many, or the shape of an array of keys.

    Returns:
        The new keys, in the style of ``key``.

    Raises:
        InputTypeError, AxisError: ``key`` is no single key.
        AxisSpecError: ``num`` is neither an int nor a tuple of ints.

    Example:
        >>> from torchbatch import random
        >>> key, subkey = random.split(random.key(0))
        >>> random.uniform(key), random.uniform(subkey)
        (tensor(0.8423), tensor(0.0073))

    Source: ``jax.random.split``.
    """
    found = single("split", key)
    shape = shape_of("split", num, "num")
    return _styled(key, children(found, shape))


def children(key: Key, shape: Sequence[int]) -> Key:
    """The array of keys that a key is split into.

    Raises:
        RandomnessError: within ``debug_key_reuse()``, it was used before.
    """
    count = math.prod(shape)
    if draw_state.contexts:
        reuse.use(key.first, key.second)
    words = _few_children(key, count)
    if words is None and key.partitionable:
        words = torch.stack(hashed(key, 0, _counts(count, key.device)))
    elif words is None:
        counts = _counts(2 * count, key.device)
        words = torch.cat(hashed(key, counts[:count], counts[count:])).reshape(count, 2).T
    return Key(words[0].reshape(shape), words[1].reshape(shape), key.partitionable)


def _few_children(key: Key, count: int) -> torch.Tensor | None:
    """The two words of a few keys, if that is quicker one by one."""
    counts = [(0, i) if key.partitionable else (i, count + i) for i in range(min(count, _FEW + 1))]
    found = few(key, counts)
    if found is None or not found:
        return None
    first, second = ([pair[i] for pair in found] for i in (0, 1))
    if not key.partitionable:
        flat = first + second
        first, second = flat[0::2], flat[1::2]
    return torch.tensor([first, second], dtype=torch.int32, device=key.device)


def parts(key: Key, count: int) -> list[Key]:
    """The single keys that a key is split into."""
    found = children(key, (count,))
    return [found[i] for i in range(count)]


def fold_in(key: KeyLike, data: Any) -> Any:
    """A new key made of one and a number, such as that of a step.

    Shapes: ``[], [] -> []``.

    Args:
        key: a single key, which may be used again.
        data: an integer of 32 bits, or an integer tensor without dimensions, whose low 32 bits count.

    Returns:
        The new key, in the style of ``key``.

    Raises:
        InputTypeError: ``key`` is no key, or ``data`` no integer.
        AxisError: ``key`` is an array of keys, or ``data`` is a number that is not in ``[0, 2**32)``.

    Example:
        >>> from torchbatch import random
        >>> [round(random.uniform(random.fold_in(random.key(0), step)).item(), 4) for step in (1, 2)]
        [0.0073, 0.9024]

    Source: ``jax.random.fold_in``.
    """
    found = _one("fold_in", key)
    if isinstance(data, int) and not isinstance(data, bool):
        if not 0 <= data < 2**32:
            raise AxisError(f"fold_in: data must be in [0, 2**32), but it is {data}.")
        pairs = few(found, [(0, data)])
        if pairs is not None:
            first, second = torch.tensor(pairs[0], dtype=torch.int32, device=found.device)
            return _styled(key, Key(first, second, found.partitionable))
        data = torch.tensor(draw_math.signed(data), dtype=torch.int32, device=found.device)
    word = _word("fold_in", "data", data)
    return _styled(key, Key(*hashed(found, 0, word), found.partitionable))


def clone(key: KeyLike) -> Any:
    """The same key, which ``debug_key_reuse`` lets be used once more.

    Shapes: ``[] -> []``.

    Args:
        key: a key or an array of keys.

    Returns:
        A key that gives the same numbers.

    Raises:
        InputTypeError: ``key`` is no key.

    Example:
        >>> from torchbatch import random
        >>> key = random.key(0)
        >>> random.uniform(key) == random.uniform(random.clone(key))
        tensor(True)

    Source: ``jax.random.clone``.
    """
    found = wrapped("clone", key)
    reuse.allow(found.first, found.second)
    return _styled(key, found._each(torch.clone))


def _styled(given: KeyLike, made: Key) -> Key | torch.Tensor:
    """Keys in the style of those that were given."""
    if isinstance(given, Key):
        return made
    return draw_ops.same_bits(torch.stack((made.first, made.second), -1), given.dtype)


# --- hashing ---------------------------------------------------------------------------------------------------------

_FEW = 8  # hashes that Python's own integers make faster than tensors


def _counts(count: int, device: torch.device) -> torch.Tensor:
    return torch.arange(count, dtype=torch.int32, device=device)


def hashed(key: Key, first: Any, second: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The two words that a single key makes of each pair of counters; ``first`` may be 0."""
    word_a, word_b = (word.reshape((1,) * second.dim()) for word in (key.first, key.second))
    if not isinstance(first, torch.Tensor):
        first = torch.zeros_like(word_a)
    return draw_ops.threefry2x32(word_a, word_b, first, second)


def few(key: Key, counts: Sequence[tuple[int, int]]) -> list[tuple[int, int]] | None:
    """The same as Python numbers, for a few counters, where nothing looks on; else None."""
    if len(counts) > _FEW or not draw_ops.is_plain() or key.device.type != "cpu":
        return None
    words = (int(key.first), int(key.second))
    return [draw_math.threefry2x32_of_ints(words, count) for count in counts]


def shape_of(name: str, shape: Any, argument: str = "shape") -> tuple[Any, ...]:
    """A shape as a tuple of ints; one int is the shape of a vector.

    Raises:
        AxisSpecError: it is neither an int nor a sequence of ints.
        AxisError: one of them is negative.
    """
    sizes = (shape,) if is_size(shape) else shape
    if not isinstance(sizes, tuple | list) or not all(is_size(size) for size in sizes):
        raise AxisSpecError(f"{name}: {argument} must be an int or a tuple of ints, but it is {_shown_shape(shape)}")
    if any(size < 0 for size in sizes):
        raise AxisError(f"{name}: {argument} must not be negative, but it is {shape if is_size(shape) else tuple(shape)}.")
    return tuple([size if isinstance(size, torch.SymInt) else int(size) for size in sizes])


def _shown_shape(shape: Any) -> str:
    sizes = shape if isinstance(shape, tuple | list) else [shape]
    if not any(isinstance(size, torch.Tensor) for size in sizes):
        return f"{shown(shape)}."
    texts = [describe(size) if isinstance(size, torch.Tensor) else repr(size) for size in sizes]
    text = f"({', '.join(texts)}{',' if len(texts) == 1 else ''})" if isinstance(shape, tuple | list) else texts[0]
    return (
        f"{text}. Sizes must be known: under jit, name the argument they come from in static_argnums; in vmap, all samples "
        f"share them."
    )


def is_size(value: Any) -> bool:
    """Whether a value may be the size of an axis."""
    return isinstance(value, int | torch.SymInt | np.integer) and not isinstance(value, bool)
