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

    That are ``no_grad``, hooks (those of modules, and functions with a backward of their own, run without grad mode), and
    embeddings with rows that are not trained, or trained more slowly.

    Args:
        roots: modules, whose hooks for backward passes are looked for, and other things.
    """

    def __init__(self, roots: Iterable[Any] = ()) -> None:
        super().__init__()
        modules = [module for root in roots if isinstance(root, nn.Module) for module in root.modules()]
        self.found = any(vars(module).get(name) for module in modules for name in _OF_MODULES)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.found = self.found or func in _HOOKS or not torch.is_grad_enabled() or _leaves_rows_out(func, args, kwargs)
        return func(*args, **kwargs)


_OF_MODULES = ("_backward_hooks", "_backward_pre_hooks")
_HOOKS = (torch.Tensor.register_hook, torch.Tensor.register_post_accumulate_grad_hook)
_EMBEDDINGS = {
    functional.embedding: (("padding_idx", 2), ("scale_grad_by_freq", 5)),
    torch.embedding: (("padding_idx", 2), ("scale_grad_by_freq", 3)),
    functional.embedding_bag: (("padding_idx", 11), ("scale_grad_by_freq", 5)),
}


def _leaves_rows_out(func: Any, args: Any, kwargs: Any) -> bool:
    given = [args[i] if len(args) > i else kwargs.get(name) for name, i in _EMBEDDINGS.get(func, ())]
    return any(value not in (None, False, -1) for value in given)
