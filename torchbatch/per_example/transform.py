"""What the functions of :mod:`torchbatch.per_example` have in common: from a loss and a batch to a quantity."""

from __future__ import annotations

import threading
import warnings
from typing import Any, Literal, NamedTuple, TypedDict

import torch
from torch import Tensor

from torchbatch._torch import guards
from torchbatch.core import tree
from torchbatch.core.describe import shown
from torchbatch.core.wrapper import Wrapper
from torchbatch.errors import AxisSpecError, CompilerError, InputTypeError
from torchbatch.per_example import draws, memory
from torchbatch.per_example.batch import Batch, Params, size_of
from torchbatch.per_example.factors import wide
from torchbatch.per_example.losses import Adapter, loss_of
from torchbatch.per_example.memory import Progress
from torchbatch.per_example.settings import Settings, settings_of
from torchbatch.transforms.jit import jit

Found = tuple[list[Tensor], list[Tensor]]
_MOST_SETTINGS = 8  # for so many the traces are kept


class Options(TypedDict, total=False):
    """The options that all quantities have; :func:`~torchbatch.per_example.gradients` says what they mean."""

    targets: int
    adapter: Adapter | None
    batch_norm: Literal["per_example"] | None
    chunk_size: int | Literal["auto"] | None
    memory: int | None
    compile: bool | Literal["auto"]


class Quantity:
    """What is computed of the gradients of a batch."""

    def extra(self, params: Params) -> list[Tensor]:
        """Tensors that :meth:`of` needs beside the batch."""
        return []

    def of(self, batch: Batch, extra: list[Tensor]) -> Found:
        """Tensors with a row for each example, and tensors that are added up over chunks."""
        raise NotImplementedError

    def add(self, total: list[Tensor], new: list[Tensor]) -> list[Tensor]:
        """What two chunks give together."""
        return [a + b for a, b in zip(total, new, strict=True)]

    def finish(self, each: list[Tensor], total: list[Tensor], params: Params, count: int) -> Any:
        """The result, for all examples."""
        raise NotImplementedError


class PerExample(Wrapper):
    """A quantity of the per-example gradients of a loss, as a function of a batch."""

    def __init__(self, who: str, quantity: Quantity, model: Any, criterion: Any, options: Options) -> None:
        _check_names(who, options)
        loss = loss_of(model, criterion, options.get("targets", 1), options.get("adapter"), who, options.get("batch_norm"))
        super().__init__(model, criterion)
        self._made_of: tuple[Any, ...] = who, quantity, model, criterion, options
        self._loss, self._quantity, self._who = loss, quantity, who
        self._chunk_size, self._budget = _checked_sizes(who, options)
        self._compile = _checked_compile(who, options.get("compile", "auto"))
        self._sizes: dict[Any, int] = {}
        self._runs = {name: jit(self._named(), static_argnums=1, backend=name) for name in ("eager", "inductor")}
        self._seen: set[Any] = set()
        self._settings, self._lock = Settings(), threading.Lock()
        self._known: set[Settings] = set()
        self._told: list[str] = []

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self._made_of

    def __call__(self, /, *args: Any, **keywords: Any) -> Any:
        if keywords:
            raise InputTypeError(
                f"{self._who}: the batch is given by position, but {next(iter(keywords))} is a keyword. For inputs by name, "
                f"give an adapter that makes (dict of inputs, targets)."
            )
        params, batch, count = self._bound(args)
        if guards.inside_other():
            return self._quantity.finish(*self._inside(params, batch, count), params, count)
        params, batch = params.detached(), tree.map_leaves(Tensor.detach, batch)
        with torch.no_grad():
            return self._quantity.finish(*self._from_seed(params, batch, count), params, count)

    def explain(self, /, *args: Any) -> str:
        """How each parameter's gradients are gone about, for arguments like these; nothing is computed.

        Example:
            >>> import torch
            >>> from torchbatch import per_example
            >>> model = torch.nn.Linear(3, 2)
            >>> norms = per_example.norms(model, torch.nn.functional.mse_loss)
            >>> print(norms.explain(torch.ones(5, 3), torch.ones(5, 2)))
            bias    made for each example: it is a vector
            weight  never made: its norm and its sum come from the factors of its product
        """
        params, batch, count = self._bound(args)
        chunk = Chunk.of(batch, 0, max(count, 1), max(count, 1), params)
        with torch.no_grad():
            self._runs["eager"].lower(*self._arguments(params, chunk, torch.zeros(2, dtype=torch.int32)))
        names = params.names() if self._told else []
        width = max(map(len, names), default=0)
        lines = [f"{name:{width}}  {how}" for name, how in zip(names, self._told, strict=True)]
        return "\n".join(lines) or f"{self._who} needs no gradients of single examples: it is a forward-mode derivative"

    def _bound(self, args: tuple[Any, ...]) -> tuple[Params, Any, int]:
        """The parameters, the batch, and how many examples it has."""
        self._loss.check(self._who)
        self._look_at_settings()
        given, batch = self._loss.split(args, self._who)
        return Params(given, self._who), batch, size_of(batch, self._who)

    def _look_at_settings(self) -> None:
        """Have the loss traced anew where a Python value that it depends on is not what it was."""
        before, now = self._settings, settings_of(*self._loss.roots)
        self._settings = now
        if now == before:
            return
        with self._lock:
            self._known.add(now)
            if len(self._known) <= _MOST_SETTINGS:
                return
            self._known = {now}
            for run in self._runs.values():
                run.clear_cache()
        warnings.warn(
            f"{self._who} was traced for {_MOST_SETTINGS + 1} sets of Python values that {self._loss.__name__} depends on, which "
            f"takes longer than the computation. Last there was another {', '.join(now.changed(before)) or 'order of them'}. Let "
            f"what changes at each call be a tensor that is written in place (a buffer), or a part of the batch.",
            RuntimeWarning,
            stacklevel=4,
        )

    def _from_seed(self, params: Params, batch: Any, count: int) -> Found:
        """All examples; what they draw follows from the state of PyTorch's generator."""
        words = draws.seed()
        results, drew = self._over_chunks(params, batch, count, words)
        if drew:
            draws.move_on()
        return results

    def _inside(self, params: Params, batch: Any, count: int) -> Found:
        """All examples, where a transform or a trace is at work: at once, as part of it."""
        each, total, _ = self._compute(*self._arguments(params, Chunk.of(batch, 0, count, count, params), draws.traced()))
        return each, total

    def _over_chunks(self, params: Params, batch: Any, count: int, words: Tensor) -> tuple[Found, bool]:
        size, start = self._size(params, batch, count), 0
        rows: list[list[Tensor]] = []
        total: list[Tensor] = []
        drew, backend = False, self._backend(params, batch, size)
        with Progress(self._who, count, self._chunk_size == "auto") as progress:
            while start < count or not start:
                chunk = Chunk.of(batch, start, min(size, count - start), size, params)
                try:
                    each, new, drew_here = self._run(backend, *self._arguments(params, chunk, words))
                except (torch.OutOfMemoryError, MemoryError) as error:
                    size = _half(size, self._who, error)
                    continue
                rows.append(each if chunk.length == size else tree.map_leaves(lambda value, n=chunk.length: value[:n], each))
                total = self._quantity.add(total, new) if start else new
                drew, start = drew or bool(drew_here), start + max(chunk.length, 1)
                progress.update(chunk.length)
        return (rows[0] if len(rows) == 1 else tree.map_leaves(lambda *parts: torch.cat(parts), *rows), total), drew

    def _size(self, params: Params, batch: Any, count: int) -> int:
        """How many examples are worked on at a time."""
        if self._chunk_size != "auto":
            return int(self._chunk_size or max(count, 1))
        key = count, *_likes(params, batch)
        if key not in self._sizes:
            device = params.leaves[0].device
            budget = memory.free(device) * memory.SHARE if self._budget is None else self._budget
            self._sizes[key] = memory.fitting(lambda few: self._bytes(params, batch, few), count, int(budget))
        return self._sizes[key]

    def _bytes(self, params: Params, batch: Any, count: int) -> int:
        """What so many examples take beside the parameters and themselves."""
        arguments = self._arguments(params, Chunk.of(batch, 0, count, count, params), torch.zeros(2, dtype=torch.int32))
        found = self._runs["eager"].lower(*arguments).compile().memory_analysis()
        return int(found.temp_size_in_bytes + found.output_size_in_bytes)

    def _arguments(self, params: Params, chunk: Chunk, words: Tensor) -> tuple[Any, ...]:
        device = params.leaves[0].device
        keys = draws.keys(words.to(device), chunk.start, chunk.size)
        static = Static(params.structure, self._settings)
        return params.leaves, static, chunk.values, keys, chunk.present, self._quantity.extra(params)

    def _backend(self, params: Params, batch: Any, size: int) -> str:
        """Which backend of jit runs a call: with ``compile="auto"`` Inductor, if there was a call of that kind before."""
        if self._compile != "auto":
            return "inductor" if self._compile else "eager"
        key = self._settings, size, *_likes(params, batch)
        known = key in self._seen
        self._seen.add(key)
        return "inductor" if known else "eager"

    def _run(self, backend: str, *arguments: Any) -> Any:
        try:
            return self._runs[backend](*arguments)
        except CompilerError as error:
            if self._compile != "auto":
                raise
            self._compile = False
            warnings.warn(f"{self._who} runs uncompiled, since the compiler failed: {error}", RuntimeWarning, stacklevel=5)
            return self._runs["eager"](*arguments)

    def _named(self) -> Any:
        """:meth:`_compute`, which messages call by the name of the loss."""

        def compute(*args: Any) -> Any:
            return self._compute(*args)

        compute.__name__ = compute.__qualname__ = self._loss.__name__
        return compute

    def _compute(self, leaves: Any, static: Static, examples: Any, keys: Tensor, present: Tensor, extra: Any) -> Any:
        batch = Batch(self._loss, leaves, static.structure, examples, keys, present)
        each, total = self._quantity.of(batch, extra)
        self._told = batch.told()
        return each, total, batch.draws


class Static(NamedTuple):
    """What a trace depends on beside tensors."""

    structure: Any
    settings: Settings


def _likes(params: Params, batch: Any) -> tuple[Any, ...]:
    """What tells calls apart, beside the number of examples."""
    mine = tuple((leaf.shape, leaf.dtype, leaf.device) for leaf in params.leaves)
    return mine, tuple((leaf.shape[1:], leaf.dtype, leaf.device) for leaf in tree.flatten(batch)[0])


class Chunk(NamedTuple):
    """Some examples of a batch, filled up to a size with copies of the last one."""

    start: int
    length: int
    size: int
    values: Any
    present: Tensor

    @classmethod
    def of(cls, batch: Any, start: int, length: int, size: int, params: Params) -> Chunk:
        """``length`` examples from number ``start`` on. Where there are none, zeros take their place."""
        first = params.leaves[0]
        dtype = torch.float64 if any(wide(leaf.dtype) is torch.float64 for leaf in params.leaves) else torch.float32
        present = torch.ones(size, dtype=dtype, device=first.device)
        if length < size:
            present[length:] = 0
        return cls(start, length, size, tree.map_leaves(lambda leaf: _part(leaf, start, length, size), batch), present)


def _part(leaf: Tensor, start: int, length: int, size: int) -> Tensor:
    part = leaf[start : start + length]
    if length == size:
        return part
    last = part[-1:] if length else part.new_zeros(1, *part.shape[1:])
    return torch.cat([part, last.expand(size - length, *last.shape[1:])])


def _half(size: int, who: str, error: BaseException) -> int:
    if size == 1:
        raise error
    warnings.warn(f"{who}: out of memory with {size} examples at a time; trying {size // 2}.", RuntimeWarning, stacklevel=5)
    return size // 2


def _check_names(who: str, options: Options) -> None:
    unknown = sorted(set(options) - set(Options.__annotations__))
    if unknown:
        raise AxisSpecError(f"{who} has no option {unknown[0]!r}. Its options are {', '.join(Options.__annotations__)}.")


def _checked_sizes(who: str, options: Options) -> tuple[int | str | None, int | None]:
    chunk_size, budget = options.get("chunk_size"), options.get("memory")
    if not (chunk_size in (None, "auto") or _is_positive(chunk_size)):
        raise AxisSpecError(f'{who}: chunk_size must be a positive int, "auto" or None, but it is {shown(chunk_size)}.')
    if budget is not None and not (_is_positive(budget) and chunk_size == "auto"):
        raise AxisSpecError(
            f'{who}: memory is the number of bytes to be filled with chunk_size="auto", but it is {shown(budget)}, and '
            f"chunk_size is {shown(chunk_size)}."
        )
    return chunk_size, budget


def _checked_compile(who: str, given: Any) -> bool | str:
    if not (isinstance(given, bool) or given == "auto"):
        raise AxisSpecError(f'{who}: compile must be True, False or "auto", but it is {shown(given)}.')
    return given  # type: ignore[no-any-return]


def _is_positive(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
