"""A graph of PyTorch's operations, run with as many digits as one likes, in mpmath. For small arrays: every number is an object.

The operations that are known:

- of elements: ``abs add addcdiv addcmul atan2 ceil clamp clamp_max clamp_min cos cosh div elu eq erf erfc exp exp2 expm1 floor
  ge gelu gt isinf isnan le leaky_relu lerp lgamma log log10 log1p log2 logical_and logical_not logical_or lt masked_fill maximum
  minimum mul ne neg pow reciprocal relu remainder round rsqrt rsub sgn sigmoid sign silu sin sinh softplus sqrt square sub tan
  tanh trunc where xlogy``, and the inverses of the trigonometric and hyperbolic ones;
- reductions: ``all amax amin any argmax argmin cumprod cumsum linalg_vector_norm logsumexp max mean min nansum prod std sum
  var``;
- products: ``addmm baddbmm bmm dot mm mv`` and attention;
- layers and losses: ``softmax log_softmax layer_norm batch_norm mse_loss huber_loss nll_loss``;
- what moves numbers: views, slices, ``cat``, ``stack``, ``split``, ``gather``, ``index``, ``embedding``, ``scatter``,
  ``scatter_add``, ``index_add``, ``tril``, ``triu``, ``flip``, ``roll``, ``repeat``, padding;
- the derivatives of these, except those of attention and batch norm;
- whatever has to do with whole numbers and bools only, and constants.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch.fx import GraphModule, Interpreter

from torchbatch import tree
from torchbatch.errors import UnsupportedOperationError
from torchbatch.testing.exact_operations import Operations
from torchbatch.testing.optional import require

_MOVES = frozenset(
    "view _unsafe_view reshape _reshape_alias permute transpose t expand squeeze unsqueeze alias clone detach contiguous select "
    "slice flip roll repeat diagonal split split_with_sizes unbind index index_select gather embedding tril triu "
    "constant_pad_nd slice_backward select_backward diagonal_backward cat stack scatter index_put slice_scatter select_scatter "
    "diag_embed unfold movedim lift_fresh lift_fresh_copy take".split()
)
_SILENT = frozenset("dtype layout device pin_memory memory_format non_blocking".split())
_WIDE = {
    torch.float16: torch.float64,
    torch.bfloat16: torch.float64,
    torch.float32: torch.float64,
    torch.complex64: torch.complex128,
}


def run_exactly(module: GraphModule, tensors: Sequence[torch.Tensor], digits: int) -> list[np.ndarray]:
    """The outputs of a graph of aten operations, rounded once, to float64 or complex128.

    Raises:
        ImportError: mpmath is not installed.
        UnsupportedOperationError: an operation is not known; the text names it.
    """
    mp = require("mpmath", "reference='mpmath'", "test").mp.clone()
    mp.dps = digits
    runner = _Exactly(module, mp)
    return [_rounded(output) for output in runner.run(*(runner.operations.numbers(tensor) for tensor in tensors))]


def _rounded(value: Any) -> np.ndarray:
    if isinstance(value, torch.Tensor):
        found: np.ndarray = value.numpy()
        return found
    is_complex = any(hasattr(number, "_mpc_") for number in value.flat)
    dtype = np.complex128 if is_complex else np.float64
    return np.array([complex(number) if is_complex else float(number) for number in value.flat], dtype).reshape(value.shape)


class _Exactly(Interpreter):
    """Run a graph with real and complex tensors as arrays of mpmath's numbers; whole numbers and bools stay PyTorch's."""

    def __init__(self, module: GraphModule, mp: Any) -> None:
        super().__init__(module)
        self.operations = Operations(mp)

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        """A constant of the graph."""
        return self.operations.numbers(super().get_attr(target, args, kwargs))

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Compute one operation."""
        name = getattr(target, "__name__", str(target)).split(".")[0]
        if name == "getitem":
            return args[0][args[1]]
        if not any(isinstance(leaf, np.ndarray) for leaf in tree.leaves((args, kwargs))):
            return self._plain(target, args, kwargs)
        if name in _MOVES and _moves(args):
            return self._moved(target, args, kwargs)
        compute: Callable[..., Any] | None = self.operations.table.get(name)
        if compute is None:
            raise UnsupportedOperationError(
                f"reference='mpmath' does not know the operation {target}. Known are those that "
                "torchbatch.testing.multiprecision lists; take reference='float64', or a function of your own as reference."
            )
        loud = {key: value for key, value in kwargs.items() if key not in _SILENT or name == "_to_copy"}
        return tree.map(self.operations.boxed, compute(*args, **loud))

    def _plain(self, target: Any, args: Any, kwargs: Any) -> Any:
        """An operation that takes no real numbers: PyTorch's own. Real numbers that it makes are made in float64."""
        kwargs = {key: _WIDE.get(value, value) if key == "dtype" else value for key, value in kwargs.items() if key != "device"}
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        try:
            return tree.map(self.operations.numbers, target(*args, **kwargs))
        finally:
            torch.set_default_dtype(before)

    def _moved(self, target: Any, args: Any, kwargs: Any) -> Any:
        """An operation that only moves numbers, or fills in zeros: PyTorch's own moves their places."""
        pool: list[Any] = [self.operations.zero]

        def places(leaf: Any) -> Any:
            if not isinstance(leaf, np.ndarray):
                return leaf
            start = len(pool)
            pool.extend(leaf.flat)
            return torch.arange(start, len(pool)).reshape(leaf.shape)

        args = tree.map(places, args)
        if getattr(target, "__name__", "").startswith("constant_pad_nd") and len(args) > 2:
            pool[0], args = self.operations.number(args[2]), (*args[:2], 0)
        taken = np.array([*pool, None], dtype=object)[:-1]
        return tree.map(lambda found: _take(taken, found), target(*args, **kwargs))


def _moves(args: Any) -> bool:
    """Whether an operation moves numbers only: it does not add those up that meet (``index_put`` with ``accumulate``)."""
    return not (len(args) > 3 and args[3] is True)


def _take(numbers: np.ndarray, places: torch.Tensor) -> np.ndarray:
    found = np.empty(tuple(places.shape), dtype=object)
    found[...] = numbers[places.numpy()]
    return found
