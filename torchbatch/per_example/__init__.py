"""Per-example gradients for training loops: what a backward pass would give for each example, and what follows from that."""

from torchbatch.per_example.directions import cosine, dot, gram, project
from torchbatch.per_example.gradients import gradients, norms
from torchbatch.per_example.moments import fisher_diag, noise_scale, variance
from torchbatch.per_example.sums import clipped_mean, clipped_sum, mean, sum

__all__ = [
    "clipped_mean",
    "clipped_sum",
    "cosine",
    "dot",
    "fisher_diag",
    "gradients",
    "gram",
    "mean",
    "noise_scale",
    "norms",
    "project",
    "sum",
    "variance",
]
