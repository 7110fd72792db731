"""The kind of call that a compiled function serves, and what a call is refused for."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from torchbatch._torch import guards
from torchbatch._torch.likes import Like, stand_ins
from torchbatch._torch.open_sizes import OpenSizes
from torchbatch.core import tree
from torchbatch.core.compile_log import Difference
from torchbatch.core.describe import function_name
from torchbatch.core.signature import Call, StaticArguments, Statics, bind
from torchbatch.errors import InputTypeError, UnsupportedOperationError


class Named:
    """Stands for a function in messages, which need its name and the names of its arguments."""

    def __init__(self, fun: Callable[..., Any]) -> None:
        self.__name__ = function_name(fun)
        try:
            parameters = inspect.signature(fun).parameters.values()
        except (ValueError, TypeError):
            return
        self.__signature__ = inspect.Signature([inspect.Parameter(each.name, each.kind) for each in parameters])

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError


class _Text(NamedTuple):
    """Stands for a value that is only shown."""

    text: str

    def __repr__(self) -> str:
        return self.text


class Kind(NamedTuple):
    """A kind of call; it can be pickled, and holds no numbers."""

    fun: Named
    likes: list[Like]  # the arguments that are not static, flat
    captured: list[Like]
    numbers: tuple[int, ...]
    structure: tree.TreeDef
    statics: Statics
    sizes: OpenSizes | None
    gradients: bool  # whether the result could be differentiated, if something that goes in requires a gradient

    @classmethod
    def of(cls, call: Call, captured: Sequence[torch.Tensor], sizes: OpenSizes | None) -> Kind:
        """The kind of a call that was traced just now."""
        statics = tuple([(where, str, _Text(repr(value))) for where, _, value in call.statics])
        likes, others = [Like.of(value) for value in call.values], [Like.of(value) for value in captured]
        return cls(Named(call.fun), likes, others, call.numbers, call.structure, statics, sizes, _with_gradients())

    @property
    def name(self) -> str:
        """The name of the function."""
        return self.fun.__name__

    @property
    def example(self) -> Call:
        """A call of this kind, with fake tensors."""
        return Call(self.fun, stand_ins(self.likes), self.numbers, self.structure, self.statics)

    def bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Call:
        """The arguments of a call, taken apart.

        Raises:
            InputTypeError: they are not as many as they should be, or have other names.
            UnsupportedOperationError: a transform or a trace is at work.
        """
        if guards.inside_other():
            raise UnsupportedOperationError(
                f"{self.name} is compiled, so it cannot be transformed or traced. Transform the jit function it was made of, and "
                f"compile the result."
            )
        positional, keywords = self.structure.children()
        count, names = positional.num_children, set(keywords.entries())
        if count != len(args):
            self._refuse_places(f"{count} positional argument(s)", len(args), len(args) > count)
        if names != kwargs.keys():
            expected, given = (", ".join(sorted(each)) or "none" for each in (names, kwargs))
            self._refuse_places(f"the keyword arguments {expected}", given, not kwargs.keys() <= names)
        return bind(self.fun, _NONE, args, kwargs)._replace(statics=self.statics)

    def _refuse_places(self, expected: str, given: Any, too_many: bool) -> None:
        known = self.example.described().items()
        static = [f"{name.removeprefix(_STATIC)}={value}" for name, value in known if name.startswith(_STATIC)]
        hint = f" Leave out what is static, {', '.join(static)}: it is a constant of the compiled function." if static else ""
        raise InputTypeError(f"{self.name} was compiled for {expected}, but got {given}.{hint * too_many}")

    def check(self, call: Call, captured: Sequence[torch.Tensor]) -> None:
        """Refuse a call of another kind.

        Raises:
            InputTypeError: an argument or a captured tensor is not like the one that the function was compiled for.
            UnsupportedOperationError: the result would lack a gradient that is asked for.
        """
        found = self._differences(call, captured)
        if found:
            raise InputTypeError(
                f"{self.name} was compiled for another kind of call: {found}. Lower and compile it for such arguments, or call "
                f"the jit function, which does so itself.{self._hint(call)}"
            )
        self._check_gradients(call, captured)

    def _differences(self, call: Call, captured: Sequence[torch.Tensor]) -> str:
        """In what a call is of another kind, in words."""
        if call.structure != self.structure:
            return _words(self.example, call) or f"{_shown(self.structure)} -> {_shown(call.structure)}"
        is_open = self.sizes is not None
        wrong = {i for i, value in enumerate(call.values) if not _is_like(self.likes[i], value, is_open)}
        wrong |= set(self.numbers) ^ set(call.numbers)
        if wrong or (self.sizes is not None and not self.sizes.accept(call.values)):
            return _words(self.example, call, wrong) or "the order of an argument in memory"
        if len(captured) != len(self.captured) or not all(map(_is_like, self.captured, captured)):
            return "a tensor that it closes over has another shape, dtype or device than before"
        return ""

    def _hint(self, call: Call) -> str:
        """What to do where nothing but the order in memory is different."""
        if call.structure != self.structure:
            return ""
        names = call.names()
        others = [
            f"{names[i]}.contiguous()"
            for i, (like, value) in enumerate(zip(self.likes, call.values, strict=True))
            if like.size == value.shape and not _is_like(like, value) and _is_like(like, value.contiguous())
        ]
        return f" Or pass {', '.join(others)}." if others else ""

    def _check_gradients(self, call: Call, captured: Sequence[torch.Tensor]) -> None:
        """Refuse to return something without a gradient where one is asked for."""
        if not _with_gradients():
            return
        names = call.names()
        for i, value in enumerate(call.values):
            if value.requires_grad and not (self.gradients and self.likes[i].requires_grad):
                raise UnsupportedOperationError(
                    f"{self.name} was compiled without a gradient for argument {names[i]}, which requires one here. Compile it "
                    f"for an argument that requires a gradient, pass {names[i]}.detach(), or call it under torch.no_grad()."
                )
        if not self.gradients and any(value.requires_grad for value in captured):
            raise UnsupportedOperationError(
                f"{self.name} was compiled under torch.no_grad(), but closes over a tensor that requires a gradient. Compile it "
                f"outside torch.no_grad(), or call it inside."
            )


_STATIC = "static argument "
_NONE = StaticArguments(lambda *args, **kwargs: None, None, None)


def _with_gradients() -> bool:
    return torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


def _is_like(like: Like, value: torch.Tensor, any_size: bool = False) -> bool:
    """Whether a tensor can take the place of another one; the stride of an axis of size 1 says nothing."""
    if like.dtype is not value.dtype or like.device != value.device or len(like.size) != value.dim():
        return False
    if any_size:
        return True
    strides = zip(like.size, like.stride, value.stride(), strict=True)
    return like.size == value.shape and (0 in like.size or all(mine == other for size, mine, other in strides if size != 1))


def _words(example: Call, call: Call, wrong: set[int] | None = None) -> str:
    """The differences of two calls; of their tensors only those of ``wrong``, if any is."""
    state = guards.state().keys()
    names = {f"argument {name}" for i, name in enumerate(call.names()) if wrong and i not in wrong}
    old, new = ({name: text for name, text in each.described().items() if name not in state | names} for each in (example, call))
    return str(Difference.between(old, new)) if old != new else ""


def _shown(structure: tree.TreeDef) -> str:
    positional, keywords = structure.unflatten(["*"] * structure.num_leaves)
    return f"{positional} {keywords}" if keywords else f"{positional}"
