"""The tensors that a function closes over, while it is traced: a fake stands in for each, and each is left as it was.

Autograd sits above the place where the fakes step in, and writes what it learns into the real tensors; that is taken back.

Private names used, seen on torch 2.11, 2.13 and 2.15: ``torch._subclasses.fake_tensor.FakeTensor``;
``torch._guards.active_fake_mode``; ``torch._ops.HigherOrderOperator``;
``torch.utils._python_dispatch._disable_current_modes``; ``Tensor._backward_hooks``.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch._guards import active_fake_mode
from torch._ops import HigherOrderOperator
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from torchbatch._torch import seeding
from torchbatch.errors import InPlaceError, UnsupportedOperationError

LIFTS = (torch.ops.aten.lift_fresh_copy.default, torch.ops.aten.lift_fresh.default)


class _Before(NamedTuple):
    """What autograd knew of a tensor before the trace."""

    requires_grad: bool
    grad_fn: Any
    grad: torch.Tensor | None


class Captured(TorchDispatchMode):
    """Puts a fake in the place of each tensor from outside, and remembers both in the order in which they were met.

    Otherwise what is done to such tensors alone would be done at once, and once only.
    """

    def __init__(self) -> None:
        super().__init__()
        self.tensors: list[torch.Tensor] = []
        self.fakes: list[torch.Tensor] = []
        self._known: dict[int, torch.Tensor] = {}
        self._before: list[_Before] = []
        self._standing_in: set[int] = set()  # the ids of the fakes
        self._made: list[weakref.ref[torch.Tensor]] = []  # what operators returned
        self.programs: list[Any] = []  # loops and choices that were traced: the graph holds only their numbers

    supports_higher_order_operators = True  # to refuse them in words of our own

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        check_not_higher_order(func)
        if func in LIFTS:  # a constant that torch.tensor makes of Python numbers, and not one from outside
            return self.note(func(*args, **(kwargs or {})))
        if torch.Tag.nondeterministic_seeded in func.tags:
            seeding.drawn()
        args, kwargs = self.replaced(args, kwargs or {})
        return self.note(func(*args, **kwargs))

    def note(self, result: Any) -> Any:
        """Remember the tensors in a result, but do not keep them alive; what stands for a captured tensor is left out."""
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, FakeTensor) and id(value) not in self._standing_in:
                self._made.append(weakref.ref(value))
        return result

    def any_alive(self) -> bool:
        """Whether a tensor that was noted is still there."""
        return any(reference() is not None for reference in self._made)

    def replaced(self, args: Any, kwargs: Any) -> Any:
        """The arguments of an operator with fakes in the place of tensors from outside."""
        return pytree.tree_map_only(torch.Tensor, self._fake, (args, kwargs))

    def _fake(self, value: torch.Tensor) -> torch.Tensor:
        if type(value) is FakeTensor:
            return value
        known = self._known.get(id(value))
        if known is None:
            known = self._known[id(value)] = self._met(value)
        return known

    def _met(self, value: torch.Tensor) -> torch.Tensor:
        if not is_plain_class(type(value)):
            raise UnsupportedOperationError(
                f"jit: the function closes over a tensor of class {type(value).__name__}; jit takes plain tensors, without a "
                f"class of their own. Take the plain tensor first: x.as_subclass(torch.Tensor)."
            )
        if value.is_nested or value.layout is not torch.strided or value.is_quantized:
            raise UnsupportedOperationError(
                "jit: the function closes over a sparse, nested or quantized tensor; jit takes plain dense tensors. Build it "
                "inside the function from the tensors that it is made of."
            )
        if value.is_conj() or value.is_neg():
            raise UnsupportedOperationError(
                "jit: the function closes over a tensor that is conjugated or negated only when it is read (x.conj(), "
                "x.conj().imag). Resolve it first: x.resolve_conj() or x.resolve_neg()."
            )
        mode: Any = active_fake_mode()
        with _disable_current_modes():
            fake: torch.Tensor = mode.from_tensor(value.detach(), static_shapes=True)
            self._before.append(_Before(value.requires_grad, value.grad_fn, _grad(value)))
        self.tensors.append(value)
        self.fakes.append(fake)
        self._standing_in.add(id(fake))
        return fake

    def forget(self) -> None:
        """Let go of the fakes."""
        self.fakes.clear()
        self._known.clear()

    def restore(self) -> list[Exception]:
        """Make the tensors again what they were; what the function did to them that it cannot do, as errors."""
        found: list[Exception] = []
        for value, fake, before in zip(self.tensors, self.fakes, self._before, strict=True):
            if reshaped(fake, value):
                found.append(changed_shape(_OVER))
            if type(_grad(value)) is FakeTensor:
                value.grad = before.grad
                found += [called_backward()] if value.is_leaf else []
            if value.requires_grad != before.requires_grad or value.grad_fn is not before.grad_fn:
                if before.grad_fn is None:
                    value.detach_().requires_grad_(before.requires_grad)
                found.append(wrote_differentiable(_OVER))
        return found


def is_plain_class(kind: type[torch.Tensor]) -> bool:
    """Whether a class of tensors changes neither operations nor the class of their results; a ``Parameter`` does not."""
    if kind is torch.Tensor:
        return True
    unchanged: Any = kind.__torch_function__
    return kind.__torch_dispatch__ is torch.Tensor.__torch_dispatch__ and unchanged is torch.nn.Parameter.__torch_function__


def check_not_higher_order(func: Any) -> None:
    """Refuse PyTorch's own operators that take functions."""
    if isinstance(func, HigherOrderOperator):
        raise UnsupportedOperationError(
            f"jit: the function calls torch's operator {func.name()!r}, which takes functions, and which jit does not trace. In "
            "the place of torch.cond, while_loop, scan, map and associative_scan use those of torchbatch.lax."
        )


def _grad(value: torch.Tensor) -> torch.Tensor | None:
    return value.grad if value.is_leaf or value.retains_grad else None


def called_backward() -> UnsupportedOperationError:
    """The error for a function that calls ``backward()``."""
    return UnsupportedOperationError(
        "jit: the function calls backward(), which leaves its result in .grad, outside of the function. Return gradients "
        "instead: torchbatch.grad or torch.autograd.grad inside, or call backward() on the result of the jit function."
    )


def wrote_differentiable(target: str) -> InPlaceError:
    """The error for a write that autograd would have to record."""
    return InPlaceError(
        f"jit: the function writes a value that depends on something that requires a gradient into {target}, in place. "
        f"Return the value, or write value.detach()."
    )


def reshaped(after: torch.Tensor, before: torch.Tensor) -> bool:
    """Whether a tensor was given another shape, or other strides."""
    return after.size() != before.size() or after.stride() != before.stride()


def changed_shape(target: str) -> UnsupportedOperationError:
    """The error for ``t_()``, ``resize_()`` and the like, which would happen only while the function is traced."""
    return UnsupportedOperationError(
        f"jit: the function changes the shape or the strides of {target} in place (t_(), transpose_(), unsqueeze_(), resize_(), "
        f"x.data = …). Use the operation that returns a new tensor: x.t(), x.transpose(…), x.reshape(…)."
    )


_OVER = "a tensor that it closes over"


@contextlib.contextmanager
def without_hooks(tensors: Sequence[torch.Tensor]) -> Iterator[None]:
    """Autograd's hooks on tensors from outside run when the compiled function runs, and not also while it is traced."""
    hooks = [(value._backward_hooks, dict(value._backward_hooks)) for value in tensors if value._backward_hooks]
    for registered, _ in hooks:
        registered.clear()
    try:
        yield
    finally:
        for registered, functions in hooks:
            registered.update(functions)


def check_independent(captured: Sequence[torch.Tensor]) -> None:
    """Autograd would follow one captured tensor through the other, and count its gradient twice.

    Raises:
        UnsupportedOperationError: one of the tensors was computed from another one.
    """
    inner = {value.grad_fn: value for value in captured if value.grad_fn is not None}
    leaves = {id(value) for value in captured if value.grad_fn is None}
    seen, left = set(), [node for function in inner for node, _ in function.next_functions]
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node in inner or id(getattr(node, "variable", None)) in leaves:
            raise UnsupportedOperationError(
                "jit: the function closes over a tensor that requires a gradient, and over another one that was computed "
                "from it. Compute the second inside the function, or pass it as an argument."
            )
        left += [following for following, _ in node.next_functions]
