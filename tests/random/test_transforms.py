"""Every draw inside ``vmap`` is that of the loop, bit by bit; chunked, nested and traced too. And gradients."""

from __future__ import annotations

import os

import pytest
import torch

import torchbatch
from torchbatch import grad, jit, jvp, random, tree, vmap
from torchbatch.errors import AxisError
from torchbatch.testing import loop

T = torch.tensor
DRAWS = {
    "bits": lambda k: random.bits(k, (3,)),
    "bits of 8": lambda k: random.bits(k, (5,), torch.uint8),
    "bits of 64": lambda k: random.bits(k, (5,), torch.uint64),
    "uniform": lambda k: random.uniform(k, (2, 3)),
    "uniform, bounds": lambda k: random.uniform(k, (3,), minval=2.5, maxval=7.1),
    "uniform, tensors": lambda k: random.uniform(k, (3,), minval=T([1.0, 2.0, 3.0]), maxval=7.1),
    "uniform, float16": lambda k: random.uniform(k, (3,), torch.float16, -1, 2.3),
    "uniform, bfloat16": lambda k: random.uniform(k, (3,), torch.bfloat16, -1, 2.3),
    "uniform, float64": lambda k: random.uniform(k, (3,), torch.float64, -1, 2.3),
    "normal": lambda k: random.normal(k, (3,)),
    "normal, one": random.normal,
    "normal, none": lambda k: random.normal(k, (0, 2)),
    "normal, bfloat16": lambda k: random.normal(k, (3,), torch.bfloat16),
    "normal, float64": lambda k: random.normal(k, (3,), torch.float64),
    "normal, complex": lambda k: random.normal(k, (3,), torch.complex64),
    "exponential": lambda k: random.exponential(k, (3,)),
    "laplace": lambda k: random.laplace(k, (3,)),
    "logistic": lambda k: random.logistic(k, (3,)),
    "cauchy": lambda k: random.cauchy(k, (3,)),
    "gumbel": lambda k: random.gumbel(k, (3,)),
    "gumbel, high": lambda k: random.gumbel(k, (3,), torch.float16, "high"),
    "truncated_normal": lambda k: random.truncated_normal(k, -1.0, T([0.5, 2.0])),
    "multivariate_normal": lambda k: random.multivariate_normal(k, T([1.0, 2.0]), T([[2.0, 0.3], [0.3, 1.0]]), (4,)),
    "bernoulli": lambda k: random.bernoulli(k, T([0.3, 0.6])),
    "bernoulli, high": lambda k: random.bernoulli(k, 0.4, (9,), "high"),
    "rademacher": lambda k: random.rademacher(k, (3,)),
    "randint": lambda k: random.randint(k, (5,), 0, 10),
    "randint, int8": lambda k: random.randint(k, (5,), 0, T([10]), torch.int8),
    "randint, int64": lambda k: random.randint(k, (5,), -10, 2**50, torch.int64),
    "randint, uint32": lambda k: random.randint(k, (5,), 0, 10, torch.uint32),
    "permutation": lambda k: random.permutation(k, 7),
    "permutation, tensor": lambda k: random.permutation(k, torch.arange(12.0).reshape(3, 4), 1, True),
    "choice": lambda k: random.choice(k, 7, (3,)),
    "choice, without": lambda k: random.choice(k, torch.arange(7.0), (3,), False),
    "choice, weighted": lambda k: random.choice(k, 3, (4,), True, T([0.2, 0.3, 0.5])),
    "choice, both": lambda k: random.choice(k, 3, (2,), False, T([0.2, 0.3, 0.5])),
    "categorical": lambda k: random.categorical(k, T([[0.1, 0.2, 0.3], [1.0, 2.0, 3.0]])),
    "categorical, without": lambda k: random.categorical(k, T([0.1, 0.2, 0.3]), shape=(2,), replace=False),
    "gamma": lambda k: random.gamma(k, T([0.5, 3.0])),
    "gamma, float64": lambda k: random.gamma(k, T([0.5, 3.0]), dtype=torch.float64),
    "loggamma": lambda k: random.loggamma(k, T([0.5, 3.0])),
    "beta": lambda k: random.beta(k, 0.5, T([2.0, 3.0])),
    "dirichlet": lambda k: random.dirichlet(k, T([0.5, 1.0, 3.0]), (2,)),
    "poisson": lambda k: random.poisson(k, T([0.5, 4.0, 30.0]), (2, 3)),
    "ball": lambda k: random.ball(k, 3, shape=(2,)),
    "dropout": lambda k: random.dropout(k, T([1.0, 2.0, 3.0, 4.0]), 0.3),
    "split": lambda k: random.key_data(random.split(k, 3)),
    "split, then normal": lambda k: random.normal(random.split(k)[1], (3,)),
    "fold_in": lambda k: random.key_data(random.fold_in(k, 7)),
    "clone": lambda k: random.key_data(random.clone(k)),
}
LONG = os.environ.get("HYPOTHESIS_PROFILE") == "long"
PUBLIC = set(random.__all__) - {"Key", "PRNGKey", "debug_key_reuse", "key", "key_data", "threefry_partitionable", "wrap_key_data"}


def test_every_draw_is_tested():
    assert {name.partition(",")[0].partition(" ")[0] for name in DRAWS} >= PUBLIC


def keys(partitionable=True, shape=4):
    return random.split(random.key(1, partitionable=partitionable), shape)


COUNTING = {"bits", "bits of 8", "bits of 64", "normal, one", "permutation", "gamma, float64", "poisson", "split", "fold_in"}


@pytest.mark.parametrize(
    ("name", "partitionable"), [(name, True) for name in DRAWS] + [(name, False) for name in DRAWS if LONG or name in COUNTING]
)
def test_mapped_draws_are_those_of_the_loop(equal_bits, name, partitionable):
    draw, many = DRAWS[name], keys(partitionable)
    wanted = loop(draw)(many)
    equal_bits(vmap(draw)(many), wanted)
    equal_bits(vmap(draw, chunk_size=3)(many), wanted)
    nested = vmap(vmap(draw), in_axes=-1, out_axes=1)(many.reshape(2, 2))
    equal_bits(tree.map(lambda x: x.flatten(0, 1), nested), wanted)
    equal_bits(jit(vmap(draw), backend="eager")(many), wanted)
    equal_bits(torch.func.vmap(lambda a, b: draw(random.Key(a, b, partitionable)))(many.first, many.second), wanted)


COMPILED = ["normal", "bits of 8", "uniform, float16", "normal, float64", "poisson", "choice"]


@pytest.mark.parametrize("partitionable", [True, False])
def test_compiled_draws_are_those_of_the_loop(equal_bits, partitionable):
    chosen = COMPILED if LONG else COMPILED[:3] if partitionable else COMPILED[1:2]
    draw = lambda key: [DRAWS[name](key) for name in chosen]  # noqa: E731
    many = keys(partitionable)
    equal_bits(jit(vmap(draw))(many), vmap(draw)(many))


def test_the_hash_is_compiled_once_for_each_draw():
    code = jit(lambda key: random.normal(key, (1000,))).lower(random.key(0)).compile().as_text()
    assert 0 < code.count("at::vec::fmadd") < 100 and len(code) < 100_000


def test_torch_compile_makes_the_same_numbers():
    compiled = torch.compile(lambda raw: random.normal(raw, (5,)), backend="eager", fullgraph=True)
    raw = random.PRNGKey(3)
    assert torch.equal(compiled(raw), random.normal(raw, (5,)))


def test_a_shared_key_draws_once_for_all(equal_bits):
    key = random.key(2)
    for draw in (random.normal, lambda key: random.poisson(key, T([3.0, 30.0])), lambda key: random.gamma(key, 0.5)):
        found = vmap(lambda x, draw=draw: x + draw(key).float())(torch.zeros(3))
        equal_bits(found, draw(key).float().expand(3, *draw(key).shape))


def test_mapped_parameters_and_one_key():
    key, rates = random.key(2), T([0.5, 3.0, 30.0])
    for draw in (random.poisson, random.gamma, random.loggamma):
        fun = lambda rate, draw=draw: draw(key, rate, (4,))  # noqa: E731
        assert torch.equal(vmap(fun)(rates), loop(fun)(rates))


def test_sizes_may_be_open():
    noisy = jit(vmap(lambda key, x: x + random.normal(key, x.shape)), backend="eager", dynamic=True)
    for n in (3, 5):
        many, x = keys(shape=n), torch.zeros(n, 6)
        assert torch.equal(noisy(many, x), vmap(lambda key: random.normal(key, (6,)))(many))
    assert noisy.cache_size() == 1


def test_an_empty_batch():
    assert vmap(lambda key: random.normal(key, (3,)))(keys(shape=0)).shape == (0, 3)


def test_eval_shape():
    found = torchbatch.eval_shape(lambda key: random.poisson(key, 3.0, (4,)), random.key(0))
    assert tuple(found.shape) == (4,) and found.dtype is torch.int64


def test_writing_into_what_was_drawn():
    def fun(key, i):
        x = random.normal(key, (3,))
        x[0] = i
        return x

    many, numbers = keys(), torch.arange(4.0)
    assert torch.equal(vmap(fun)(many, numbers), loop(fun)(many, numbers))


# --- gradients -------------------------------------------------------------------------------------------------------

GRADIENTS = {
    "uniform, maxval": (lambda a: random.uniform(random.key(0), (3,), maxval=a).sum(), 2.0),
    "uniform, minval": (lambda a: random.uniform(random.key(0), (3,), minval=a, maxval=5.0).sum(), 2.0),
    "truncated_normal": (lambda a: random.truncated_normal(random.key(0), -a, 2 * a, (3,)).sum(), 1.0),
    "gamma": (lambda a: random.gamma(random.key(0), a, (3,), torch.float64).sum(), 2.5),
    "loggamma": (lambda a: random.loggamma(random.key(0), a, (3,), torch.float64).sum(), 0.5),
    "beta": (lambda a: random.beta(random.key(0), a, 2.0, (3,), torch.float64).sum(), 1.5),
    "permutation": (lambda a: random.permutation(random.key(0), a * T([1.0, 2.0, 3.0]))[0] ** 2, 1.5),
    "dropout": (lambda a: random.dropout(random.key(0), a * T([1.0, 2.0, 3.0]), 0.5).sum(), 1.5),
    "multivariate_normal": (lambda a: random.multivariate_normal(random.key(0), a.expand(2), torch.eye(2) * a).sum(), 1.5),
}


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients(name):
    fun, at = GRADIENTS[name]
    x = torch.tensor(at, requires_grad=True)
    (wanted,) = torch.autograd.grad(fun(x), x)
    x = x.detach()
    assert torch.allclose(grad(fun)(x), wanted)
    assert torch.allclose(jvp(fun, (x,), (torch.ones_like(x),))[1].float(), wanted)
    assert torch.allclose(vmap(grad(fun))(x.expand(2)), wanted)
    assert torch.allclose(jit(grad(fun), backend="eager")(x), wanted)
    if "gamma" not in name and name != "beta":  # whose draws jump where a try is rejected
        step = 1e-2
        assert torch.allclose((fun(x + step) - fun(x - step)) / (2 * step), wanted, rtol=2e-2, atol=2e-2)


@pytest.mark.skipif(not LONG, reason="JAX compiles this for seconds; HYPOTHESIS_PROFILE=long")
def test_gamma_gradients_are_those_of_jax():
    jax = pytest.importorskip("jax")
    for name in ("gamma", "loggamma"):
        theirs = jax.grad(lambda a, name=name: getattr(jax.random, name)(jax.random.key(0), a, (50,)).sum())(1.7)
        ours = grad(lambda a, name=name: getattr(random, name)(random.key(0), a, (50,)).sum())(T(1.7))
        assert float(ours) == pytest.approx(float(theirs), rel=1e-4)


def test_bounds_that_are_too_large_are_refused_under_transforms():
    keys = random.split(random.key(0), 3)
    mapped, traced = vmap(lambda k: random.randint(k, (), 0, 2**40)), lambda k: random.randint(k[0], (), 0, 2**40)
    for fun in (mapped, jit(traced, backend="eager")):
        with pytest.raises(AxisError, match="need more than 32 bits"):
            fun(keys)


def test_few_numbers_are_on_the_keys_device():
    key = random.key(0)
    with torch.device("meta"):
        assert {random.bits(key, (n,)).device.type for n in (3, 20)} == {"cpu"}
        assert random.key_data(random.fold_in(key, 1)).device.type == random.key_data(random.split(key, 2)).device.type == "cpu"
