"""Per-example gradients for training loops: what a backward pass would give for each example, and what follows from that."""

from torchbatch.per_example.care import replace_batch_norm
from torchbatch.per_example.directions import cosine, dot, gram, project
from torchbatch.per_example.gradients import gradients, norms
from torchbatch.per_example.moments import fisher_diag, noise_scale, variance
from torchbatch.per_example.privacy import dp_sgd_step, epsilon, noise_multiplier_for, poisson_batches
from torchbatch.per_example.sums import clipped_mean, clipped_sum, mean, sum
from torchbatch.per_example.training import accumulate_, grad_samples

__all__ = [
    "accumulate_",
    "clipped_mean",
    "clipped_sum",
    "cosine",
    "dot",
    "dp_sgd_step",
    "epsilon",
    "fisher_diag",
    "grad_samples",
    "gradients",
    "gram",
    "mean",
    "noise_multiplier_for",
    "noise_scale",
    "norms",
    "poisson_batches",
    "project",
    "replace_batch_norm",
    "sum",
    "variance",
]
