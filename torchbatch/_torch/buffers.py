"""How much memory a graph, or the code that Inductor generated for it, takes and moves, found without running it on numbers.

Both are run with fake tensors, while a ledger notes when the memory behind a tensor comes and goes, and what each operation
reads and writes. Of generated code, which is Python that allocates buffers and gives them to kernels, the kernels do nothing.
So reuse of buffers and early release count as they happen. What a library takes for itself within one operation is not seen.

Private names used, seen on torch 2.11, 2.13 and 2.15: ``torch.utils._python_dispatch.TorchDispatchMode``;
``torch.utils._pytree``; ``OpOverload._schema``; of the generated code: the names ``async_compile``, ``call``,
``empty_strided_*``, ``reinterpret_tensor``, ``alloc_from_pool``, ``assert_size_stride``, ``assert_alignment`` and ``*_ptr*``.
"""

from __future__ import annotations

import ast
import re
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch.fx import GraphModule
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from torchbatch._torch.likes import Like, new_mode, stand_ins
from torchbatch.errors import UnsupportedOperationError

_KEPT = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign)
_ALLOCATES = re.compile(r"empty_strided_(cpu|cuda|xpu|mtia|mps)")
_POINTER = re.compile(r"\b(?:in_out|in|out)_ptr\d+")
_PICKS = frozenset("index index_select gather embedding take".split())  # they read a part of their first argument


class Observed(NamedTuple):
    """What was seen of a run.

    Attributes:
        peak: the most memory that was allocated at one time, in bytes, beside the inputs.
        moved: the bytes that operations read and wrote, if each does so once for each of its tensors; views are free.
        flops: the floating-point operations that PyTorch's own counter knows of, which are those of matrix products.
        outputs: what was returned.
    """

    peak: int
    moved: int
    flops: int
    outputs: list[Like]


def observe_graph(module: GraphModule, likes: Sequence[Like]) -> Observed:
    """What a graph of aten operations does, run operation by operation."""
    return _observed(lambda values, ledger: module(*values), likes)


def observe_code(source: str, likes: Sequence[Like]) -> Observed:
    """What code does that Inductor generated.

    Raises:
        UnsupportedOperationError: the code is not of the kind that is known.
    """
    try:
        return _observed(lambda values, ledger: _call_of(source, ledger)(values), likes)
    except Exception as error:
        text = " ".join(str(error).split())[:200]
        raise UnsupportedOperationError(
            f"the code that Inductor generated could not be followed, so its memory is not known: {type(error).__name__}: {text}"
        ) from error


def _observed(run: Callable[[list[torch.Tensor], Ledger], Any], likes: Sequence[Like]) -> Observed:
    mode, ledger, counter = new_mode(), Ledger(), FlopCounterMode(display=False)
    inputs = stand_ins(likes, mode)
    ledger.ignore(inputs)
    with torch.no_grad(), mode, counter, ledger:
        outputs = [Like.of(value) for value in run(inputs, ledger) if isinstance(value, torch.Tensor)]
    return Observed(ledger.peak, ledger.moved, counter.get_total_flops(), outputs)


class Ledger(TorchDispatchMode):
    """Notes the memory that is allocated, read and written while this is active; see :class:`Observed`."""

    def __init__(self) -> None:
        super().__init__()
        self._now = self.peak = self.moved = 0
        self._known: Any = weakref.WeakSet()

    def ignore(self, tensors: Iterable[torch.Tensor]) -> None:
        """Do not count the memory of these tensors."""
        for tensor in tensors:
            self._known.add(tensor.untyped_storage())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        taken, given = _tensors((args, kwargs)), _tensors(result)
        self.moved += _moved(func, taken, given)
        for value in given:
            self._note(value.untyped_storage())
        return result

    def kernel(self, tensors: Sequence[torch.Tensor], updated: Iterable[int]) -> None:
        """Count the call of a kernel that reads or writes these tensors; those of ``updated`` both."""
        self.moved += sum(_size(value) for value in tensors) + sum(_size(tensors[i]) for i in updated)

    def _note(self, storage: Any) -> None:
        if storage not in self._known:
            size = storage.nbytes()
            self._known.add(storage)
            self._now += size
            self.peak = max(self.peak, self._now)
            weakref.finalize(storage, self._forget, size)

    def _forget(self, size: int) -> None:
        self._now -= size


def _tensors(values: Any) -> list[torch.Tensor]:
    """The tensors in a tree, each once."""
    return list({id(value): value for value in pytree.tree_leaves(values) if isinstance(value, torch.Tensor)}.values())


def _moved(func: Any, taken: Sequence[torch.Tensor], given: Sequence[torch.Tensor]) -> int:
    """The bytes that an operation reads and writes."""
    name = func._schema.name.partition("::")[2]
    if not func._schema.is_mutable:
        inside = {value.untyped_storage() for value in taken}
        if name.startswith(("empty", "new_empty")) or all(value.untyped_storage() in inside for value in given):
            return 0
    read = [_size(value) for value in taken]
    new = [_size(value) for value in given if not any(value is other for other in taken)]
    if name in _PICKS:
        read[0] = min(read[0], sum(new))
    return sum(read) + sum(new)


def _size(tensor: torch.Tensor) -> int:
    """The bytes of the elements of a tensor; those that a stride of 0 repeats count once."""
    count = tensor.element_size()
    for size, stride in zip(tensor.size(), tensor.stride(), strict=True):
        count *= size if stride or not size else 1
    return count


# --- generated code --------------------------------------------------------------------------------------------------


def _call_of(source: str, ledger: Ledger) -> Callable[[list[torch.Tensor]], Any]:
    """The function ``call`` of generated code, with kernels that do nothing and allocations that can be faked."""
    body = ast.parse(source).body
    compiled = [statement for statement in body if isinstance(statement, ast.Assign) and _mentions(statement, "async_compile")]
    kept: list[ast.stmt] = [statement for statement in body if isinstance(statement, _KEPT) and statement not in compiled]
    space: dict[str, Any] = {"__name__": "generated"}
    exec(compile(ast.Module(kept, []), "<generated code>", "exec"), space)
    space |= {name: _Kernel(ledger, statement) for statement in compiled for name in _targets(statement)}
    space |= {name: _allocation(found[1]) for name in space if (found := _ALLOCATES.match(name))}
    space |= {"reinterpret_tensor": _reinterpreted, "alloc_from_pool": _part_of_pool}
    space |= {"assert_size_stride": _nothing, "assert_alignment": _nothing}
    call: Callable[[list[torch.Tensor]], Any] = space["call"]
    return call


class _Kernel:
    """Stands for a compiled kernel, which works in buffers that exist already."""

    def __init__(self, ledger: Ledger, made_by: ast.Assign) -> None:
        self._ledger = ledger
        names = list(dict.fromkeys(name for text in _strings(made_by) for name in _POINTER.findall(text)))
        self._updated = [i for i, name in enumerate(names) if name.startswith("in_out")]

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        """What is called in C++."""
        tensors = [value for value in args if isinstance(value, torch.Tensor)]
        self._ledger.kernel(tensors, [i for i in self._updated if i < len(tensors)])

    run = __call__  # what is called in Triton


def _mentions(statement: ast.stmt, name: str) -> bool:
    return any(isinstance(node, ast.Name) and node.id == name for node in ast.walk(statement))


def _strings(statement: ast.stmt) -> Iterator[str]:
    return (node.value for node in ast.walk(statement) if isinstance(node, ast.Constant) and isinstance(node.value, str))


def _targets(statement: ast.Assign) -> Iterator[str]:
    return (target.id for target in statement.targets if isinstance(target, ast.Name))


def _allocation(kind: str) -> Callable[..., torch.Tensor]:
    def allocate(size: Any, stride: Any, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty_strided(size, stride, dtype=dtype, device=kind)

    return allocate


def _reinterpreted(tensor: torch.Tensor, size: Any, stride: Any, offset: int = 0) -> torch.Tensor:
    return torch.as_strided(tensor, size, stride, tensor.storage_offset() + offset)


def _part_of_pool(pool: torch.Tensor, offset: int, dtype: torch.dtype, size: Any, stride: Any) -> torch.Tensor:
    return torch.as_strided(pool.view(torch.uint8)[offset:].view(dtype), size, stride)


def _nothing(*args: Any) -> None:
    """A check that says nothing of memory."""
