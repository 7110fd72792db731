"""Random numbers from explicit keys: the same numbers as JAX's, and inside ``vmap`` the same as the loop's."""

from torchbatch.random.continuous import (
    cauchy,
    exponential,
    gumbel,
    laplace,
    logistic,
    multivariate_normal,
    normal,
    truncated_normal,
)
from torchbatch.random.discrete import bernoulli, categorical, rademacher, randint
from torchbatch.random.keys import (
    Key,
    PRNGKey,
    clone,
    fold_in,
    key,
    key_data,
    split,
    threefry_partitionable,
    wrap_key_data,
)
from torchbatch.random.masks import dropout
from torchbatch.random.orders import choice, permutation
from torchbatch.random.rejections import ball, beta, dirichlet, gamma, loggamma, poisson
from torchbatch.random.reuse import debug_key_reuse
from torchbatch.random.uniforms import uniform
from torchbatch.random.words import bits

__all__ = [
    "Key",
    "PRNGKey",
    "ball",
    "bernoulli",
    "beta",
    "bits",
    "categorical",
    "cauchy",
    "choice",
    "clone",
    "debug_key_reuse",
    "dirichlet",
    "dropout",
    "exponential",
    "fold_in",
    "gamma",
    "gumbel",
    "key",
    "key_data",
    "laplace",
    "loggamma",
    "logistic",
    "multivariate_normal",
    "normal",
    "permutation",
    "poisson",
    "rademacher",
    "randint",
    "split",
    "threefry_partitionable",
    "truncated_normal",
    "uniform",
    "wrap_key_data",
]
