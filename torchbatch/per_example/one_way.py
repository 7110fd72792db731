"""Where a derivative in forward mode is not what a backward pass computes, since the latter is no derivative."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode


class OneWay(TorchFunctionMode):
    """While it is active, it notes what changes backward passes only.

    That are ``no_grad``, hooks (those of modules, and functions with a backward of their own, run without grad mode), questions
    whether there will be a backward pass, on whose answer a hook may depend, and embeddings with rows that are not trained, or
    trained more slowly.

    Args:
        roots: modules, whose hooks for backward passes are looked for, and other things.
    """

    def __init__(self, roots: Iterable[Any] = ()) -> None:
        super().__init__()
        modules = [module for root in roots if isinstance(root, nn.Module) for module in root.modules()]
        self._found = any(vars(module).get(name) for module in modules for name in _OF_MODULES)

    def at_work(self) -> bool:
        """Whether there was any of that until now."""
        return self._found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        is_of_backward = func in _HOOKS or func in _QUESTIONS or not torch.is_grad_enabled()
        self._found = self._found or is_of_backward or _leaves_rows_out(func, args, kwargs)
        return func(*args, **kwargs)


_OF_MODULES = ("_backward_hooks", "_backward_pre_hooks")
_HOOKS = (torch.Tensor.register_hook, torch.Tensor.register_post_accumulate_grad_hook)
_tensor: Any = torch.Tensor
_QUESTIONS = (_tensor.requires_grad.__get__, _tensor.grad_fn.__get__, _tensor.is_leaf.__get__)
_EMBEDDINGS = {  # the arguments that say so, where they are, and what they are if nothing is said
    functional.embedding: (("padding_idx", 2, None), ("scale_grad_by_freq", 5, False)),
    torch.embedding: (("padding_idx", 2, -1), ("scale_grad_by_freq", 3, False)),
    functional.embedding_bag: (("padding_idx", 11, None), ("scale_grad_by_freq", 5, False)),
}


def _leaves_rows_out(func: Any, args: Any, kwargs: Any) -> bool:
    options = _EMBEDDINGS.get(func, ())
    given = [(args[i] if len(args) > i else kwargs.get(name, usual), usual) for name, i, usual in options]
    return any(type(value) is not type(usual) or value != usual for value, usual in given)
