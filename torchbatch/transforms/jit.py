"""``jit``: trace a function once for each kind of call, compile it, and run that."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from typing import Any

import torch

from torchbatch._torch import donate, draw_state, guards
from torchbatch.core import compile_log, tree
from torchbatch.core.argnums import flatten
from torchbatch.core.axes import InAxes, open_arguments
from torchbatch.core.describe import function_name, shown
from torchbatch.core.executable import Backend, Executable
from torchbatch.core.program import Program, mapped_sizes, one_at_a_time
from torchbatch.core.signature import Call, StaticArguments, bind, flat_arguments
from torchbatch.core.wrapper import Wrapper
from torchbatch.errors import AxisSpecError, DonatedBufferError, InPlaceError, StaticArgumentError
from torchbatch.transforms.eval_shape import bind_shapes
from torchbatch.transforms.stages import Lowered
from torchbatch.transforms.vmap import Vmapped

_is_compiling = torch.compiler.is_compiling
_ABSENT: Any = ...
_TICKETS = 8  # how many kinds of calls are recognised without building their keys


def jit(
    fun: Callable[..., Any] = _ABSENT,
    *,
    static_argnums: int | Sequence[int] | None = None,
    static_argnames: str | Sequence[str] | None = None,
    donate_argnums: int | Sequence[int] | None = None,
    backend: str | Callable[..., Any] = "inductor",
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
    dynamic: bool = False,
) -> Any:
    """Compile a function: it is traced once for each kind of call, and what was recorded is compiled and run.

    ``fun`` must be a pure function of its arguments and of the tensors that it closes over. Python runs only while it is
    traced. Every transform in it (:func:`vmap`, :func:`grad`, :mod:`torchbatch.lax`, ``torch.func``) is gone afterwards;
    what remains is one flat graph.

    Args:
        fun: the function; without it, a decorator is returned.
        static_argnums, static_argnames: positions and names of arguments that are constants of a trace, such as strings,
            modules and sizes. They must be hashable; another value leads to another trace. Each of the two is
            completed from the other.
        donate_argnums: positions of arguments whose memory the function may reuse. The tensors cannot be used afterwards.
        backend: ``"inductor"``, the compiler behind ``torch.compile``; ``"eager"``, which replays the recorded operations
            without a compiler; or a function ``backend(graph, example_inputs)``, as ``torch.compile`` takes it.
        mode, options: Inductor's settings, as in ``torch.compile``: ``mode="reduce-overhead"`` uses CUDA graphs,
            ``mode="max-autotune"`` tries several kernels.
        dynamic: whether the sizes of mapped axes are left open, so that one trace serves every batch size above 1. Where
            ``fun`` is not itself a mapped function, it is traced twice at first: once to learn what it maps. If it maps no axis
            of an argument, a :class:`~torchbatch.errors.RetraceWarning` says so.

    Returns:
        The compiled function, with ``lower``, ``clear_cache`` and ``cache_size`` as methods. That of a module has the
        attributes of the module too: ``parameters()``, ``eval()``, ``state_dict()``.

    A *kind of call* is: the structure of the arguments; the shapes, dtypes, devices, strides and ``requires_grad`` of their
    tensors; the static values; grad mode, autocast, the default dtype and device, and what
    :func:`~torchbatch.random.threefry_partitionable` says. Python numbers are traced as tensors without
    dimensions, which give way to other dtypes as numbers do. A tensor that the function closes over is read anew at each call,
    so an update in place is seen, and gradients flow to it. A captured Python value is a constant of the trace, as in JAX:

    >>> import torch
    >>> from torchbatch import jit
    >>> scale = 2.0
    >>> weights = torch.tensor([1.0, 2.0])
    >>> @jit(backend="eager")
    ... def scaled(x):
    ...     return scale * (x @ weights)
    >>> scaled(torch.ones(2))
    tensor(6.)
    >>> scale = 100.0  # not seen: it was 2.0 when the function was traced
    >>> _ = weights.mul_(10)  # seen
    >>> scaled(torch.ones(2))
    tensor(60.)

    Results are new tensors, which share no memory with arguments. Inside another transform, or another jit function, the
    function itself runs: ``grad(jit(f))`` is ``grad(f)``.

    Raises:
        StaticArgumentError: an argument is neither an array nor static, or is static and not hashable.
        DataDependentError: Python needs the value of a tensor (``if``, ``.item()``, a size).
        OutputTypeError: an output is not an array.
        LeakedTracerError, DonatedBufferError: a tensor is used that has no numbers any more.
        CompilerError: the compiler fails, or there is none.
        AxisSpecError: an option has the wrong type or spelling.

    Example:
        >>> from torchbatch import grad, vmap
        >>> def loss(w, x, y):
        ...     return (x @ w - y) ** 2
        >>> per_example = jit(vmap(grad(loss), in_axes=(None, 0, 0)), backend="eager")
        >>> per_example(torch.ones(2), torch.eye(2), torch.zeros(2))
        tensor([[2., 0.],
                [0., 2.]])

    Source: ``jax.jit``; ``backend``, ``mode``, ``options`` and ``dynamic`` are those of ``torch.compile``.
    """
    options_ = (static_argnums, static_argnames, donate_argnums, backend, mode, options, dynamic)
    if fun is _ABSENT:
        return functools.partial(Jitted, options=options_)
    return Jitted(fun, options=options_)


class Jitted(Wrapper):
    """The compiled function that :func:`~torchbatch.jit` returns."""

    def __init__(self, fun: Callable[..., Any], options: tuple[Any, ...]) -> None:
        if not callable(fun):
            raise AxisSpecError(f"jit compiles a function, but it got {fun!r} of type {type(fun).__name__}.")
        super().__init__(fun, options)
        static_argnums, static_argnames, donate_argnums, backend, mode, settings, self._dynamic = options
        if not isinstance(self._dynamic, bool):
            raise AxisSpecError(f"jit: dynamic must be True or False, but it is {shown(self._dynamic)}.")
        self._static = StaticArguments(fun, static_argnums, static_argnames)
        self._donated = _donated(fun, donate_argnums, self._static)
        self._backend = Backend(backend, mode, settings)
        self._cache = _Cache(function_name(fun))
        self._first: _Ticket | None = None
        self._warned = False

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        if _is_compiling():
            return self.__wrapped__(*args, **kwargs)
        ticket = self._first
        if ticket is not None and len(args) == ticket.count and not kwargs and ticket.check(*args):
            outputs = ticket.run([*args, *ticket.captured])
            return outputs[0] if ticket.single else ticket.finish(outputs)
        return self._general(args, kwargs)

    def _general(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        leaves, structure = flat_arguments(args, kwargs)
        for ticket in self._cache.tickets:
            if ticket.is_plain and ticket.structure == structure and ticket.check(*leaves):
                self._first = ticket if ticket.is_bare else self._first
                return ticket.finish(ticket.run([*leaves, *ticket.captured]))
        if guards.inside_other() or draw_state.uses() is not None:  # a check of keys has to see what is drawn
            return self.__wrapped__(*args, **kwargs)
        return self._bound(bind(self.__wrapped__, self._static, args, kwargs, (leaves, structure)))

    def _bound(self, call: Call) -> Any:
        if self._dynamic and not all(value.is_contiguous() for value in call.values):
            return self._strided(call)
        ticket = self._cache.ticket(call)
        entry = self._entry(call) if ticket is None else ticket.entry
        if call.copied:
            _refuse_writes(call, call.copied, entry, _COPIED)
        if self._donated:
            return entry.finish(entry.run(_take(call, self._donated)))
        if ticket is None:
            ticket = self._cache.add_ticket(call, entry)
        self._first = ticket if ticket.is_bare else None
        return entry.finish(entry.run(call.values))

    def _strided(self, call: Call) -> Any:
        """A call with open sizes and strides that have no formula: the tensors are copied first."""
        strided = [i for i, value in enumerate(call.values) if not value.is_contiguous()]
        plain = call._replace(values=[value.contiguous() for value in call.values])
        entry = self._entry(plain)
        _refuse_writes(call, call.copied, entry, _COPIED)
        _refuse_writes(call, strided, entry, "is not contiguous, which dynamic=True takes a copy of")
        return entry.finish(entry.run(plain.values))

    def _entry(self, call: Call) -> Executable:
        with one_at_a_time:
            key = call.key()
            entry = self._cache.find(key, call)
            if entry is None:
                described = self._cache.explain(call)
                entry = self._compiled(call)
                self._cache.store(key, described, entry)
            return entry

    def _compiled(self, call: Call) -> Executable:
        with compile_log.compiling(function_name(self.__wrapped__)):
            return Executable(self._program(call), self._backend)

    def _program(self, call: Call) -> Program:
        return Program(call, self._open_axes(call) if self._dynamic else None)

    def _open_axes(self, call: Call) -> list[list[int]]:
        axes = _open_axes(call)
        if not self._warned and not any(axes) and any(value.dim() for value in call.values):
            self._warned = True
            compile_log.nothing_open(function_name(call.fun))
        return axes

    def lower(self, /, *args: Any, **kwargs: Any) -> Lowered:
        """Trace the function for arguments like these, without compiling it or running it on numbers.

        Args:
            args, kwargs: arguments of the function; a :class:`~torchbatch.ShapeDtypeStruct` may stand for a tensor.

        Raises:
            UnsupportedOperationError: it is called inside a transform or a trace.
        """
        call = bind_shapes(self.__wrapped__, self._static, args, kwargs, "lower", "jit(vmap(f)).lower(…)")
        return Lowered(self._program(call), self._backend)

    def __getattr__(self, name: str) -> Any:
        """The attributes of a compiled module are its own: ``jit(model).parameters()``."""
        module = self.__dict__.get("__wrapped__")
        if name.startswith("_") or not isinstance(module, torch.nn.Module):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}", name=name, obj=self)
        return self._chained(getattr(module, name))

    def _chained(self, value: Any) -> Any:
        """A method of the module that returns the module, such as ``eval``, as one that returns this object."""
        module = self.__wrapped__
        if getattr(value, "__self__", None) is not module:
            return value

        @functools.wraps(value)
        def method(*args: Any, **kwargs: Any) -> Any:
            result = value(*args, **kwargs)
            return self if result is module else result

        return method

    def __repr__(self) -> str:
        return f"<jit of {function_name(self.__wrapped__)}>"

    def clear_cache(self) -> None:
        """Forget all traces."""
        with one_at_a_time:
            self._cache = _Cache(function_name(self.__wrapped__))
            self._first = None

    def cache_size(self) -> int:
        """How many kinds of calls have been compiled."""
        return self._cache.size


class _Ticket:
    """A kind of call that can be recognised quickly."""

    __slots__ = ("captured", "check", "count", "entry", "finish", "is_bare", "is_plain", "kind", "run", "single", "structure")

    def __init__(self, call: Call, entry: Executable) -> None:
        captured, modules_same = entry.captured, entry.modules.same
        like = guards.calls_like(call.values, captured)
        self.check: Callable[..., bool] = (lambda *values: like(*values) and modules_same()) if entry.modules else like
        self.entry, self.single = entry, entry.single
        self.run, self.captured = (entry.run, ()) if entry.direct is None else (entry.direct, tuple(captured))
        self.finish: Callable[[Any], Any] = entry.finish
        self.kind, self.structure, self.count = call.kind, call.structure, len(call.values)
        self.is_plain = not call.numbers and not call.statics
        self.is_bare = self.is_plain and self.structure == _bare(self.count)  # all arguments are tensors by themselves


@functools.cache
def _bare(count: int) -> tree.TreeDef:
    """The structure of a call with that many bare tensors."""
    return flatten(((0,) * count, {}))[1]


class _Cache:
    """The compiled traces of a function: by key, and those with open sizes in a list."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._entries: dict[Hashable, list[Executable]] = {}
        self._open: list[Executable] = []
        self._known: list[tuple[dict[str, str], dict[str, str], Executable]] = []
        self.tickets: tuple[_Ticket, ...] = ()

    @property
    def size(self) -> int:
        """How many traces there are."""
        return sum(map(len, self._entries.values())) + len(self._open)

    def ticket(self, call: Call) -> _Ticket | None:
        """What recognises a call, if anything does."""
        kind = call.kind
        for ticket in self.tickets:
            if ticket.kind == kind and ticket.check(*call.values):
                return ticket
        return None

    def add_ticket(self, call: Call, entry: Executable) -> _Ticket:
        """Recognise calls like this one from now on."""
        made = _Ticket(call, entry)
        self.tickets = (made, *self.tickets[: _TICKETS - 1])
        return made

    def find(self, key: Hashable, call: Call) -> Executable | None:
        """The trace that serves a call."""
        same = (entry for entry in self._entries.get(key, ()) if entry.surroundings_same())
        return next(same, None) or next((entry for entry in self._open if entry.accepts(call)), None)

    def explain(self, call: Call) -> tuple[dict[str, str], dict[str, str]]:
        """Log why a call needs a trace; what describes the call."""
        described, outline = call.described(), call.outline()
        differences = []
        for old, old_outline, entry in self._known:
            was, now = entry.changes()
            found = compile_log.Difference.between(old | was, described | now)
            differences.append(found if found else compile_log.Difference.between(old_outline, outline))
        compile_log.traced(self._name, differences)
        return described, outline

    def store(self, key: Hashable, described: tuple[dict[str, str], dict[str, str]], entry: Executable) -> None:
        """Keep a trace, and the description of the call that it was made for."""
        self._known.append((*described, entry))
        (self._open if entry.is_open else self._entries.setdefault(key, [])).append(entry)


_COPIED = "is read through a copy, since it is conjugated, negated, reversed or of a foreign byte order"


def _refuse_writes(call: Call, copied: Collection[int], entry: Executable, why: str) -> None:
    """Refuse to write into copies of arguments, which the caller would not see."""
    for i in entry.trace.mutated:
        if i in copied:
            raise InPlaceError(
                f"jit: the function writes in place into argument {call.names()[i]}, which {why}. Pass a contiguous tensor, "
                f"or return the new value."
            )


def _open_axes(call: Call) -> list[list[int]]:
    """For each tensor of a call the axes that are mapped, so far as can be told."""
    if isinstance(call.fun, Vmapped) and not isinstance(call.fun.__wrapped__, Vmapped):
        args, kwargs = call.arguments(call.values)
        mapped = open_arguments(InAxes(call.fun.options[0]), tuple(args), kwargs, call.fun)
        axes = {id(value): axis for value, axis in zip(mapped.values, mapped.axes, strict=True)}
        return [[axes[id(value)]] if id(value) in axes else [] for value in call.values]
    sizes = mapped_sizes(call)
    return [[axis for axis, size in enumerate(value.shape) if size in sizes] for value in call.values]


def _donated(fun: Callable[..., Any], argnums: Any, static: StaticArguments) -> frozenset[int | str]:
    """The positions of donated arguments, and their names for when they are passed by keyword."""
    donated = StaticArguments(fun, argnums, None, "donate_argnums")
    both = sorted(set(donated.nums) & set(static.nums))
    if both:
        raise StaticArgumentError(f"jit: argument {both[0]} cannot be both static and donated.")
    return frozenset({*donated.nums, *donated.names})


def _take(call: Call, donated: Collection[int | str]) -> list[torch.Tensor]:
    """The tensors of a call; those of the donated arguments are taken away from the caller."""
    owners, names = call.owners(), call.names()
    for i, value in enumerate(call.values):
        if owners[i] in donated and sum(value is other for other in call.values) > 1:
            raise DonatedBufferError(f"jit: argument {names[i]} is donated, but the same tensor is passed twice.")
        if owners[i] in donated:
            donate.check(value, names[i])
    return [donate.take(value) if owner in donated else value for owner, value in zip(owners, call.values, strict=True)]
