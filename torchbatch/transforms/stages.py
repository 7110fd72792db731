"""The stages of a compilation: ``jit(f).lower(*args)`` traces, ``.compile()`` compiles, and each can be looked at and kept."""

from __future__ import annotations

import functools
import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.fx import GraphModule

from torchbatch._torch import guards, package
from torchbatch._torch.buffers import Observed
from torchbatch._torch.likes import Like
from torchbatch.core import analysis, compile_log, tree
from torchbatch.core.analysis import MemoryAnalysis
from torchbatch.core.executable import Backend, Executable, check_apart
from torchbatch.core.kind import Kind
from torchbatch.core.listing import of_trace
from torchbatch.core.program import Program, one_at_a_time
from torchbatch.core.signature import flat_arguments
from torchbatch.core.training import Modules
from torchbatch.core.weak import WIDEST, as_weak
from torchbatch.errors import InputTypeError, UnsupportedOperationError
from torchbatch.transforms.eval_shape import ShapeDtypeStruct

Run = Callable[[list[torch.Tensor]], Sequence[torch.Tensor]]

_is_compiling = torch.compiler.is_compiling

__all__ = ["Compiled", "Loaded", "Lowered", "load"]


class _OfOneProcess:
    """What belongs to the process that made it; a copy is the thing itself, as with functions."""

    _instead = ""  # of pickling it

    def __reduce__(self) -> Any:
        raise UnsupportedOperationError(f"{self!r} cannot be pickled. {self._instead}")

    def __copy__(self) -> Any:
        return self

    def __deepcopy__(self, memo: Any) -> Any:
        return self


_SAVE = "Write it to a file with .save(path), and bring it back with torchbatch.load(path)."


class Lowered(_OfOneProcess):
    """A function that was traced for one kind of call, and not compiled yet.

    Example:
        >>> import torch
        >>> from torchbatch import ShapeDtypeStruct, jit
        >>> lowered = jit(lambda x: x @ x.T, backend="eager").lower(ShapeDtypeStruct((8, 4), torch.float32))
        >>> print(lowered.as_text())
        inputs a:f32[8,4]
        b:f32[8,8] = mm a a.T
        return b
        >>> lowered.cost_analysis()
        {'flops': 512, 'bytes accessed': 512}
        >>> lowered.out_info
        ShapeDtypeStruct(shape=(8, 8), dtype=float32, device=cpu)

    Source: ``jax.stages.Lowered``.
    """

    _instead = "Compile it first: .compile(). " + _SAVE

    def __init__(self, program: Program, backend: Backend) -> None:
        trace, call = program.trace, program.call
        self._kind = Kind.of(call, trace.captured, trace.sizes)
        program.call = call._replace(values=self._kind.example.values)  # so that the arguments need not be kept
        self._program, self._backend = program, backend

    def __repr__(self) -> str:
        return f"<lowered {self._kind.name}>"

    @property
    def graph(self) -> GraphModule:
        """The operations, as a ``torch.fx.GraphModule``.

        It takes the arguments, flat and without the static ones, then the captured tensors, then a tangent for each output that
        requires a gradient; it returns the outputs, the new values of what is written in place, and the gradients.
        """
        return self._program.trace.graph

    @property
    def in_info(self) -> Any:
        """The arguments ``(args, kwargs)`` without the static ones: a tree of :class:`~torchbatch.ShapeDtypeStruct`."""
        return _structs(self._kind.structure, self._kind.likes)

    @property
    def out_info(self) -> Any:
        """What is returned, as a tree of :class:`~torchbatch.ShapeDtypeStruct`."""
        return _structs(self._program.structure, self._seen.outputs)

    def as_text(self) -> str:
        """The operations as a listing, in the form of :func:`~torchbatch.make_graph`."""
        return str(of_trace(self._program.trace))

    def cost_analysis(self) -> dict[str, int]:
        """What one call costs.

        ``"flops"`` are the floating-point operations that ``torch.utils.flop_counter`` knows of, which are those of matrix
        products, convolutions and attention. ``"bytes accessed"`` is what the operations read and write if each runs alone; views
        are free. A backward pass is not counted: lower a function that computes the gradient, such as ``jit(grad(f))``.
        """
        return {"flops": self._seen.flops, "bytes accessed": self._seen.moved}

    def compile(self) -> Compiled:
        """Compile it.

        Raises:
            CompilerError: the compiler fails, or there is none.
        """
        with one_at_a_time, compile_log.compiling(self._kind.name):
            executable = Executable(self._program, self._backend)
        return Compiled(self._kind, self._program, executable)

    @functools.cached_property
    def _seen(self) -> Observed:
        return analysis.observe(self._program.trace, [*self._kind.likes, *self._kind.captured])


class _Served(_OfOneProcess):
    """A callable for one kind of call.

    Args:
        kind: that kind.
        captured: the tensors that the function closes over, which may change.
        run: takes the flat tensors, and returns the flat outputs.
        structure: that of the output.
    """

    def __init__(
        self,
        kind: Kind,
        captured: Sequence[torch.Tensor],
        run: Run,
        structure: tree.TreeDef,
    ) -> None:
        self.__name__ = kind.name
        self._kind, self._captured, self._run, self._structure = kind, captured, run, structure
        bare = not kind.numbers and kind.structure == tree.flatten(((0,) * len(kind.likes), {}))[1]
        self._bare_count = len(kind.likes) if bare else -1
        self._is_single = structure == tree.flatten(0)[1]
        self._modules = Modules()
        self._check: Callable[..., bool] = _never
        self._same_state: Callable[[], bool] = _never

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        if _is_compiling():
            return _uncompiled(self, args, kwargs)
        if len(args) == self._bare_count and not kwargs and self._check(*args, *self._captured) and self._same_state():
            outputs = self._run([*args])
        else:
            outputs = self._run(self._values(args, kwargs))
        return outputs[0] if self._is_single else self._structure.unflatten(outputs)

    def __repr__(self) -> str:
        return f"<{type(self).__name__.lower()} {self.__name__}>"

    @property
    def in_info(self) -> Any:
        """The arguments ``(args, kwargs)`` without the static ones: a tree of :class:`~torchbatch.ShapeDtypeStruct`."""
        return _structs(self._kind.structure, self._kind.likes)

    def _values(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
        """The flat tensors of a call, which is of the right kind."""
        kind = self._kind
        leaves, structure = flat_arguments(args, kwargs)
        if structure == kind.structure and {type(leaves[i]) for i in kind.numbers} <= WIDEST.keys():
            for i in kind.numbers:
                leaves[i] = as_weak(leaves[i])
            if self._check(*leaves, *self._captured) and self._same_state():
                return leaves
        call = kind.bind(args, kwargs)
        kind.check(call, self._captured)
        _check_modules(kind.name, self._modules)
        self._check, self._same_state = guards.tensors_like([*call.values, *self._captured]), self._state_like_now()
        return call.values

    def _state_like_now(self) -> Callable[[], bool]:
        """A function that tells whether all that is neither an argument nor a captured tensor is as it is now."""
        same, modules_same = guards.state_like_now(), self._modules.same
        return (lambda: same() and modules_same()) if self._modules else same


@guards.hidden_from_compile
def _uncompiled(fun: _Served, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call it where ``torch.compile`` does not look."""
    return fun(*args, **kwargs)


def _check_modules(name: str, modules: Modules) -> None:
    """Refuse to run what was traced in training for evaluation, or the other way round, or for other tensors."""
    if modules.same():
        return
    before, now = modules.changes()
    what = next(iter({**before, **now}))
    was, new = before.get(what, "absent"), now.get(what, "absent")
    if what.startswith("module "):
        was, new, advice = f"in {was} mode", f"in {new} mode", f", or call module.train({was == 'training'})"
    else:
        advice = ""
    raise InputTypeError(
        f"{name} was compiled for another kind of call: its {what} was {was} when it was compiled, and is {new} now. Compile it "
        f"again{advice}."
    )


def _never(*values: torch.Tensor) -> bool:
    return False


class Compiled(_Served):
    """A function that is compiled for one kind of call.

    It takes arguments like those that it was lowered for, without the static ones, which are constants of it. It is compiled for
    autocast and the default dtype as they were then, whatever they are at a call. If it was lowered for arguments that require a
    gradient, its result can be differentiated. Donated arguments are left alone.

    Raises:
        InputTypeError: (a call) an argument is of another kind.
        UnsupportedOperationError: (a call) it is transformed or traced, or asked for a gradient that it lacks.

    Example:
        >>> import torch
        >>> from torchbatch import jit
        >>> compiled = jit(lambda x: 2 * x, backend="eager").lower(torch.ones(3)).compile()
        >>> compiled(torch.ones(3))
        tensor([2., 2., 2.])
        >>> compiled.memory_analysis().output_size_in_bytes
        12

    Source: ``jax.stages.Compiled``.
    """

    _instead = _SAVE

    def __init__(self, kind: Kind, program: Program, executable: Executable) -> None:
        super().__init__(kind, executable.captured, executable.run, program.structure)
        self._executable, self._modules = executable, executable.modules
        self._likes = [*kind.likes, *kind.captured]

    @property
    def out_info(self) -> Any:
        """What is returned, as a tree of :class:`~torchbatch.ShapeDtypeStruct`."""
        return _structs(self._structure, self._seen.outputs)

    def as_text(self) -> str:
        """The generated code: that of the forward pass, and that of the backward pass once it was needed."""
        return "\n\n".join(self._executable.source)

    def cost_analysis(self) -> dict[str, int]:
        """What one call costs, as :meth:`Lowered.cost_analysis` has it.

        Operations that were fused read and write once for all: the bytes are those of the buffers of each kernel. Where a kernel
        reads a part of a buffer, such as a few rows of a table, all of it is counted.

        Raises:
            UnsupportedOperationError: the sizes are open (``dynamic=True``), or the generated code is of an unknown kind.
        """
        moved = analysis.observe_compiled(self._executable, self._likes).moved
        return {"flops": self._seen.flops, "bytes accessed": moved}

    def memory_analysis(self) -> MemoryAnalysis:
        """The memory that one call takes.

        It is found by following the code that Inductor generated, or with another backend the graph, with tensors that have no
        memory: when each buffer is allocated, used again and let go. What a library takes within one operation, such as a sort,
        is not seen, nor is what an allocator keeps beyond it.

        Raises:
            UnsupportedOperationError: the sizes are open (``dynamic=True``), or the generated code is of an unknown kind.
        """
        return analysis.memory(self._executable, self._likes, self._seen.outputs)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the function to a file, from which :func:`~torchbatch.load` brings it back in another process.

        The graph is compiled once more, to machine code for this kind of machine and this version of PyTorch, which takes ten
        seconds or more. With ``backend="eager"`` the operations are saved as they are: that file fits any machine, and needs no
        compiler. The tensors that the function closes over are saved as they are now.

        Args:
            path: the file; one that is there is replaced, once the new one is complete.

        Raises:
            UnsupportedOperationError: the function can be differentiated (a file holds the forward pass only), or its arguments
                are of a class that cannot be pickled.
            FileNotFoundError, FileExistsError: there is no such folder, or ``path`` is a folder itself.
            CompilerError: the compiler fails, or there is none.
        """
        _check_can_be_saved(self._kind, self._executable, Path(path))
        trace, backend = self._executable.trace, self._executable.backend
        call = _pickled(_About(self._kind._replace(captured=[]), self._structure, self._seen.outputs, trace.mutated))
        is_compiled = backend.name == "inductor"
        with one_at_a_time, compile_log.compiling(f"{self.__name__} for a file"):
            exported = package.exported(trace, self._likes)
            settings = backend.settings
            graph = package.compiled(exported, settings) if is_compiled else package.replayed(exported)
        devices = sorted({like.device.type for like in [*self._likes, *self._seen.outputs]})
        package.write(path, package.Package(graph, trace.captured, call), is_compiled=is_compiled, devices=devices)

    @functools.cached_property
    def _seen(self) -> Observed:
        return analysis.observe(self._executable.trace, self._likes)


class Loaded(_Served):
    """A function from a file, which runs without gradients; see :func:`~torchbatch.load`."""

    _instead = "Load the file once more where it is needed, with torchbatch.load(path)."

    def __init__(self, about: _About, captured: list[torch.Tensor], run: Run) -> None:
        mutated, count = about.mutated, about.structure.num_leaves

        def with_captured(values: list[torch.Tensor]) -> Sequence[torch.Tensor]:
            return run([*values, *captured])

        def writing(values: list[torch.Tensor]) -> Sequence[torch.Tensor]:
            values = [*values, *captured]
            written = [values[i] for i in mutated]
            check_apart(written, values)
            with torch.no_grad():
                results = run(values)
                for value, new in zip(written, results[count:], strict=False):  # writes that cross are made here
                    value.copy_(new)
            torch.autograd.graph.increment_version(written)
            return results[:count]

        plain = with_captured if captured else run
        # No gradients are recorded: a call in which an argument requires one is refused, unless they are off.
        super().__init__(about.kind, (), writing if mutated else plain, about.structure)
        self._outputs = about.outputs

    @property
    def out_info(self) -> Any:
        """What is returned, as a tree of :class:`~torchbatch.ShapeDtypeStruct`."""
        return _structs(self._structure, self._outputs)


def load(path: str | os.PathLike[str]) -> Loaded:
    """Bring back a function that ``Compiled.save`` wrote to a file; nothing is traced or compiled.

    Only load files that you trust: like a program, they can do anything when they are loaded.

    Args:
        path: the file.

    Returns:
        The function. It takes arguments of the kind that it was compiled for, without the static ones, and has no gradients. What
        it closed over came with it, and belongs to it alone.

    Raises:
        FileNotFoundError: there is no such file.
        UnsupportedOperationError: the file holds something else, or a function for another machine or another version of PyTorch.
        CompilerError: it holds code for a GPU, and there is none.

    Example:
        >>> import os, tempfile, torch
        >>> from torchbatch import jit, load
        >>> weights = torch.tensor([1.0, 2.0])
        >>> compiled = jit(lambda x: x @ weights, backend="eager").lower(torch.ones(2)).compile()
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     compiled.save(os.path.join(folder, "dot.torchbatch"))
        ...     dot = load(os.path.join(folder, "dot.torchbatch"))
        >>> dot(torch.ones(2))
        tensor(3.)

    Source: ``torch._inductor.aoti_load_package``; ``jax.export`` for the purpose.
    """
    found, is_compiled = package.read(path)
    about = _unpickled(found.call, os.fspath(path))
    return Loaded(about, found.captured, package.opened(found.graph, is_compiled))


class _About(NamedTuple):
    """What surrounds a saved graph."""

    kind: Kind
    structure: tree.TreeDef  # of the output
    outputs: list[Like]
    mutated: list[int]


def _pickled(about: _About) -> bytes:
    """The classes of the nodes of trees come first, since they must be known before a tree is unpickled."""
    classes = {*_node_classes(about.kind.structure), *_node_classes(about.structure)}
    try:
        return pickle.dumps((sorted(classes, key=repr), pickle.dumps((tuple(about.kind), *about[1:]))))
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise UnsupportedOperationError(
            f"save: the structure of the arguments or of the output of {about.kind.name} cannot be pickled: {error}. Define the "
            f"class at the top of a module."
        ) from error


def _unpickled(data: bytes, path: str) -> _About:
    try:
        _, inner = pickle.loads(data)
        tree.flatten(None)  # take notice of classes that were registered by the imports of the line above
        kind, *rest = pickle.loads(inner)
    except (pickle.UnpicklingError, AttributeError, ImportError, RuntimeError, ValueError) as error:
        raise UnsupportedOperationError(
            f"load: {path} needs a class that cannot be found: {error}. The arguments and the output of the saved function are "
            f"made of it, so its module must be there, and must register it."
        ) from error
    return _About(Kind(*kind), *rest)


def _node_classes(structure: tree.TreeDef) -> Iterator[type]:
    """The classes of the nodes of a tree that are not Python's own."""
    if structure.type is not None and structure.type.__module__ != "builtins":
        yield structure.type
    for child in structure.children():
        yield from _node_classes(child)


def _check_can_be_saved(kind: Kind, executable: Executable, path: Path) -> None:
    trace, name = executable.trace, executable.backend.name
    if trace.differentiable:
        names = [*kind.example.names(), *("a tensor that it closes over" for _ in trace.captured)]
        sources = ", ".join(dict.fromkeys(names[i] for i in trace.wanted))
        raise UnsupportedOperationError(
            f"save: {kind.name} was compiled with gradients for {sources}, but a file holds the forward pass only. Lower it "
            f"under torch.no_grad(), or compute the gradient inside: jit(grad(f))."
        )
    if name not in ("inductor", "eager"):
        raise UnsupportedOperationError(
            f'save: {kind.name} was compiled by a backend of yours; only what backend="inductor" and backend="eager" make can be '
            f"saved."
        )
    if trace.programs:
        raise UnsupportedOperationError(
            f"save: {kind.name} has a loop or a choice inside (torchbatch.lax), which a file cannot hold. Write the loop in "
            f"Python, or save what one step computes."
        )
    if not path.parent.is_dir():
        raise FileNotFoundError(f"save: there is no folder {path.parent}.")
    if path.exists() and not path.is_file():
        what, folder = ("a folder", path) if path.is_dir() else ("no ordinary file", path.parent)
        raise FileExistsError(f"save: {path} is {what}. Give the name of a file, such as {folder / 'name.torchbatch'}.")


def _structs(structure: tree.TreeDef, likes: Sequence[Like]) -> Any:
    return structure.unflatten(ShapeDtypeStruct(like.size, like.dtype, like.device) for like in likes)
