"""What the sweep over PyTorch's operators finds that ``vmap`` does not do as a loop does: every known gap, and why.

An entry is a strict expected failure: each gap must still be there, with this exception. ``LOOPED`` lists the operators that
are right but run once per sample.
"""

from __future__ import annotations

from typing import NamedTuple


class Gap(NamedTuple):
    """An operator of the database, in one of its variants, and the exception that it ends in."""

    operator: str
    variant: str
    error: str
    why: str

    def covers(self, variant: str) -> bool:
        """Whether the entry speaks of a variant; a gap is also one of the gradient."""
        return variant == self.variant or (variant == "gradient" and self.variant == "function")


def of(operator: str) -> list[Gap]:
    """The entries of an operator."""
    return [gap for gap in (*GAPS, *FULL_ONLY) if gap.operator == operator]


#: What the result contains depends on values, and so does its shape: it cannot be one tensor for all samples.
NO_FIXED_SHAPE = [
    Gap(name, "function", "DataDependentError", "the number of results depends on values")
    for name in ("argwhere", "masked_select", "nonzero", "unique", "unique_consecutive")
] + [
    Gap("nn.functional.one_hot", "function", "DataDependentError", "num_classes=-1 is the largest value plus one"),
    Gap("tensor_split", "function", "DataDependentError", "the places to cut at are per-sample"),
]

#: A per-sample value is written into an unmapped argument, which a loop would write again and again.
SHARED_WRITE = [
    Gap(name, "function", "InPlaceError", "an unmapped argument is written in place")
    for name in (
        "_batch_norm_with_update", "_native_batch_norm_legit", "native_batch_norm", "nn.functional.batch_norm",
        "nn.functional.instance_norm", "nn.functional.embedding", "nn.functional.embedding_bag",
    )
]  # fmt: skip

#: The samples lie side by side in memory, so one cannot get another shape or layout in place.
LAYOUT = [
    *(
        Gap(name, "inplace", "InPlaceError", "another shape in place")
        for name in ("as_strided", "as_strided.partial_views")
    ),
    *(
        Gap("resize_", variant, "UnsupportedOperationError", "another shape in place, where the batch axis is not the first")
        for variant in ("function", "inplace")
    ),
    *(
        Gap(name, "function", "UnsupportedOperationError", "memory_format=torch.channels_last for one sample")
        for name in (
            "bfloat16", "bool", "byte", "cdouble", "cfloat", "chalf", "char", "double", "float", "half", "int", "long",
            "short", "to",
        )
    ),
]  # fmt: skip

#: PyTorch's Python code looks at a value.
PYTHON = [
    Gap("nn.functional.gaussian_nll_loss", "function", "DataDependentError", "checks in Python that no variance is negative"),
]

#: PyTorch draws into a tensor that all samples share.
RANDOM = [
    Gap("nn.functional.scaled_dot_product_attention", "function", "RandomnessError", "dropout where only the mask is mapped"),
]

#: Found by gradients and by integers, in the full sweep only.
FULL_ONLY = [
    Gap("scatter_reduce.prod", "gradient", "DataDependentError", "PyTorch's formula asks whether there are zeros"),
    Gap("index_reduce.prod", "gradient", "DataDependentError", "PyTorch's formula asks whether there are zeros"),
    Gap("to_sparse", "gradient", "UnsupportedOperationError", "sparse tensors have no batching rules"),
    Gap("as_strided_scatter", "gradient", "result", "PyTorch's own gradient of what is overwritten is 1; ours is 0"),
    Gap("logspace.tensor_overload", "function", "result", "PyTorch rounds integers in another way for batched ends"),
]

#: What jit adds: it has no values while it traces.
TRACED = [
    *(
        Gap(name, "function", "DataDependentError", "PyTorch asks whether there are enough observations")
        for name in ("corrcoef", "cov")
    ),
    *(
        Gap(name, "function", "DataDependentError", "the residuals are empty where the rank is not full")
        for name in ("linalg.lstsq", "linalg.lstsq.grad_oriented")
    ),
    Gap("bincount", "function", "DataDependentError", "the number of bins depends on values"),
    Gap("combinations", "function", "DataDependentError", "PyTorch selects them by a mask"),
    Gap("index_put", "function", "DataDependentError", "an index of booleans selects as many places as are true"),
    Gap("istft", "function", "DataDependentError", "PyTorch checks that the window does not vanish"),
    Gap("narrow", "function", "DataDependentError", "the place to cut at is a tensor"),
    Gap("nn.functional.ctc_loss", "function", "DataDependentError", "PyTorch reads the lengths"),
    Gap("sparse.mm.reduce", "function", "UnsupportedOperationError", "jit takes no sparse tensors"),
    *(
        Gap(name, "function", "RuntimeError", "PyTorch's tracer gives a number to an operator that takes tensors")
        for name in ("linspace.tensor_overload", "logspace.tensor_overload")
    ),
]

GAPS = [*NO_FIXED_SHAPE, *SHARED_WRITE, *LAYOUT, *PYTHON, *RANDOM]  # always checked

#: Operators that run once per sample in some of their cases.
LOOPED = {
    "_segment_reduce.lengths": "segments",
    "_segment_reduce.offsets": "segments",
    "bincount": "the number of bins depends on values",
    "hash_tensor": "no formula",
    "histogram": "no formula",
    "histogramdd": "no formula",
    "istft": "where the window is per-sample: PyTorch checks that it does not vanish",
    "nn.functional.ctc_loss": "where the lengths are per-sample",
    "repeat_interleave": "the number of results depends on values",
    "sparse.mm.reduce": "sparse tensors have no batching rules",
    "torch._scaled_mm": "no formula",
    "torch._scaled_mm_v2": "no formula",
}
