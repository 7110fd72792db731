"""Every draw inside ``vmap`` is that of the loop, bit by bit; chunked, nested and traced too. And gradients."""

from __future__ import annotations

import os

import pytest
import torch

import torchbatch
from torchbatch import grad, jit, jvp, random, tree, vmap
from torchbatch.errors import AxisError, UnsupportedOperationError
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
    "uniform, float16 tensors": lambda k: random.uniform(k, (3,), torch.float16, T([1.3, 2.7, -3.1]), 7.1),
    "uniform, bfloat16 tensors": lambda k: random.uniform(k, (3,), torch.bfloat16, T([1.3, 2.7, -3.1]), 7.1),
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
    "gumbel, highest": lambda k: random.gumbel(k, (3,), mode="highest"),
    "gumbel, high": lambda k: random.gumbel(k, (3,), torch.float16, "high"),
    "truncated_normal": lambda k: random.truncated_normal(k, -1.0, T([0.5, 2.0])),
    "truncated_normal, float16": lambda k: random.truncated_normal(k, -1.0, T([0.5, 2.0]), dtype=torch.float16),
    "multivariate_normal": lambda k: random.multivariate_normal(k, T([1.0, 2.0]), T([[2.0, 0.3], [0.3, 1.0]]), (4,)),
    "bernoulli": lambda k: random.bernoulli(k, T([0.3, 0.6])),
    "bernoulli, high": lambda k: random.bernoulli(k, 0.4, (9,), "high"),
    "rademacher": lambda k: random.rademacher(k, (3,)),
    "randint": lambda k: random.randint(k, (5,), 0, 10),
    "randint, int8": lambda k: random.randint(k, (5,), 0, T([10]), torch.int8),
    "randint, int64": lambda k: random.randint(k, (5,), -10, 2**50, torch.int64),
    "randint, uint64": lambda k: random.randint(k, (5,), 3, 2**64 - 1, torch.uint64),
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
    "dropout, tensor": lambda k: random.dropout(k, T([1.0, 2.0, 3.0, 4.0]), T(0.3)),
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


COMPILED = [
    "normal", "bits of 8", "uniform, float16", "uniform, float16 tensors", "uniform, bfloat16 tensors",
    "truncated_normal, float16", "gumbel, highest", "normal, float64", "poisson", "choice",
]  # fmt: skip


@pytest.mark.parametrize("partitionable", [True, False])
def test_compiled_draws_are_those_of_the_loop(equal_bits, partitionable):
    chosen = COMPILED if LONG else COMPILED[:4] if partitionable else COMPILED[1:2]
    draw = lambda key: [DRAWS[name](key) for name in chosen]  # noqa: E731
    many = keys(partitionable)
    equal_bits(jit(vmap(draw))(many), vmap(draw)(many))


def test_the_hash_is_compiled_once_for_each_draw():
    code = jit(lambda key: random.normal(key, (1000,))).lower(random.key(0)).compile().as_text()
    assert 0 < code.count("at::vec::fmadd") < 100 and len(code) < 100_000
    if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512"):
        assert "tmpbuf" not in code  # through which the compiler moves numbers one by one
        assert code.count("_epi32") in (20, 40)  # the hash rotates twenty times, by one instruction or by two


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


def test_what_is_drawn_from_may_have_another_size():
    def draws(key, x):
        return vmap(torch.exp)(x), random.choice(key, x, (3,)), random.normal(key, x.shape[0])

    drawn = jit(draws, backend="eager", dynamic=True)
    for n in (4, 6):
        given = random.key(0), torch.arange(n)
        assert tree.leaves(tree.map(torch.equal, drawn(*given), draws(*given))) == [True] * 3


def test_an_empty_batch():
    assert vmap(lambda key: random.normal(key, (3,)))(keys(shape=0)).shape == (0, 3)


def test_eval_shape():
    found = torchbatch.eval_shape(lambda key: random.poisson(key, 3.0, (4,)), random.key(0))
    assert tuple(found.shape) == (4,) and found.dtype is torch.int64


NUMBERS = {
    "bernoulli": lambda k, p: random.bernoulli(k, p, (99,)),
    "dropout": lambda k, p: random.dropout(k, torch.ones(99), p),
    "uniform": lambda k, p: random.uniform(k, (99,), maxval=p),
    "uniform, float16": lambda k, p: random.uniform(k, (99,), torch.float16, -p, p),
    "truncated_normal": lambda k, p: random.truncated_normal(k, -p, p, (99,)),
    "gamma": lambda k, p: random.gamma(k, p, (9,)),
    "poisson": lambda k, p: random.poisson(k, 100 * p, (9,)),
    "ball": lambda k, p: random.ball(k, 3, 1 + p),
    "categorical": lambda k, p: random.categorical(k, p * torch.arange(5.0), shape=(99,)),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_that_are_arguments_of_jit(equal_bits, name):
    """They are tensors there, but of no other dtype."""
    draw = NUMBERS[name]
    equal_bits(jit(draw, backend="eager")(random.key(0), 0.3), draw(random.key(0), 0.3))


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


def along(fun):
    """The derivative in forward mode."""
    return lambda a: jvp(fun, (a,), (torch.ones_like(a),))[1].to(a.dtype)


TWICE = {
    "reverse, reverse": lambda fun: grad(grad(fun)),
    "forward, reverse": lambda fun: along(grad(fun)),
    "reverse, forward": lambda fun: grad(along(fun)),
    "forward, forward": lambda fun: along(along(fun)),
    "mapped": lambda fun: lambda a: vmap(grad(grad(fun)))(a.expand(2))[1],
    "traced": lambda fun: jit(grad(grad(fun)), backend="eager"),
    "autograd": lambda fun: lambda a: twice_by_autograd(fun, a),
}


def twice_by_autograd(fun, a):
    a = a.clone().requires_grad_()
    (slope,) = torch.autograd.grad(fun(a), a, create_graph=True)
    return torch.autograd.grad(slope, a)[0]


@pytest.mark.parametrize("way", TWICE)
def test_second_derivatives(way):
    truncated = lambda a: random.truncated_normal(random.key(0), -a, 2 * a)  # noqa: E731
    assert float(TWICE[way](truncated)(T(1.5))) == pytest.approx(-0.38896263, rel=2e-6)  # JAX's
    step = T(1e-2, dtype=torch.float64)
    wide = lambda a: random.truncated_normal(random.key(0), -a, 2 * a, (5,), torch.float64).sum()  # noqa: E731
    at = T(1.5, dtype=torch.float64)
    estimate = (wide(at + step) - 2 * wide(at) + wide(at - step)) / step**2
    assert float(TWICE[way](wide)(at)) == pytest.approx(float(estimate), rel=1e-3)


def test_third_derivatives_and_derivatives_at_infinite_bounds():
    truncated = lambda a: random.truncated_normal(random.key(0), -a, 2 * a)  # noqa: E731
    assert float(grad(grad(grad(truncated)))(T(1.5))) == pytest.approx(2.489304, rel=1e-5)
    half = lambda a: random.truncated_normal(random.key(0), a, float("inf"), (50,)).sum()  # noqa: E731
    assert grad(grad(half))(T(0.5)).isfinite() and grad(half)(T(float("-inf"))) == 0


@pytest.mark.parametrize("name", ["gamma", "loggamma", "beta", "dirichlet", "ball"])
@pytest.mark.parametrize("way", TWICE)
def test_second_derivatives_of_gamma_are_refused(way, name):
    draws = {
        "beta": lambda a: random.beta(random.key(0), a, 2.0),
        "dirichlet": lambda a: random.dirichlet(random.key(0), torch.stack([a, 2 * a]))[0],
        "ball": lambda a: random.ball(random.key(0), 2, a)[0],
    }
    fun = draws.get(name, lambda a: getattr(random, name)(random.key(0), a))
    with pytest.raises(UnsupportedOperationError) as caught:
        TWICE[way](fun)(T(1.5))
    assert str(caught.value) == (
        "gamma, and what is made of it (loggamma, beta, dirichlet, ball), can be differentiated once by its parameters; there "
        "is no rule for the second derivative. Draw outside of the function that is differentiated twice, or .detach() the "
        "parameter."
    )


def test_a_derivative_of_gamma_may_be_used_in_another_one():
    slope = lambda b: b**2 * grad(lambda a: random.gamma(random.key(0), a))(T(1.5))  # noqa: E731
    assert float(grad(slope)(T(3.0))) == pytest.approx(6 * 0.9511256, rel=1e-5)
    assert float(along(slope)(T(3.0))) == pytest.approx(6 * 0.9511256, rel=1e-5)


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
