"""Rule 15: ``randomness=`` and ``chunk_size=``: what is drawn, who gets it, and that chunks draw what the whole draws."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Bernoulli, Categorical, Dirichlet, Gamma, Normal
from torch.utils._pytree import tree_leaves

import torchbatch
from torchbatch import vmap
from torchbatch.errors import RandomnessError, UnsupportedOperationError
from torchbatch.testing import assert_close, loop

X = torch.rand(7, 4, generator=torch.Generator().manual_seed(0)) * 0.8 + 0.1
LAYOUTS = {"rows": (X, 0), "columns": (X.t().contiguous(), 1), "transposed": (X.t().contiguous().t(), 0)}

# What draws as many numbers as the shape says, whatever the values are.
OF_SHAPE = {
    "rand": lambda x: torch.rand(3),
    "rand, dtype": lambda x: torch.rand(3, dtype=torch.float64),
    "rand, generator": lambda x: torch.rand(3, generator=torch.default_generator),
    "randn": lambda x: torch.randn(2, 3),
    "randint": lambda x: torch.randint(10, (3,)),
    "randint, low": lambda x: torch.randint(5, 10, (3,)),
    "randperm": lambda x: torch.randperm(6),
    "rand_like": lambda x: torch.rand_like(x),
    "randn_like": lambda x: torch.randn_like(x),
    "randint_like": lambda x: torch.randint_like(x, 9),
    "randint_like, low": lambda x: torch.randint_like(x, 3, 9),
    "normal of numbers": lambda x: torch.normal(0.0, 1.0, (3,)),
    "bernoulli_": lambda x: x.clone().bernoulli_(0.3),
    "uniform_": lambda x: x.clone().uniform_(),
    "normal_": lambda x: x.clone().normal_(),
    "exponential_": lambda x: x.clone().exponential_(),
    "cauchy_": lambda x: x.clone().cauchy_(),
    "geometric_": lambda x: x.clone().geometric_(0.4),
    "log_normal_": lambda x: x.clone().log_normal_(),
    "random_": lambda x: x.clone().random_(9),
    "random_, low": lambda x: x.clone().random_(3, 9),
    "random_, no bounds": lambda x: x.clone().random_(),
    "into a new tensor": lambda x: torch.empty(20).uniform_() + x[0],
    "into a view": lambda x: torch.zeros(2, 4)[0].normal_() + x,
    "initializer": lambda x: torch.nn.init.xavier_uniform_(torch.empty(3, 2)),
    "dropout": lambda x: F.dropout(x, 0.5),
    "dropout of a constant": lambda x: F.dropout(torch.ones(50)),
    "dropout in place": lambda x: F.dropout(x.clone(), 0.5, inplace=True),
    "dropout1d": lambda x: F.dropout1d(x.view(2, 2), 0.5),
    "dropout2d": lambda x: F.dropout2d(x.view(1, 2, 2), 0.5),
    "gumbel_softmax": lambda x: F.gumbel_softmax(x),
    "gumbel_softmax, hard": lambda x: F.gumbel_softmax(x, hard=True),
    "Normal": lambda x: Normal(x, x).rsample(),
    "an index": lambda x: x[torch.randint(4, ())],
    "several": lambda x: (torch.rand(2), {"a": torch.randn(3)}, F.dropout(x)),
    "a Python loop": lambda x: torch.stack([torch.rand(()) for _ in range(4)]) + x,
    "nested, different": lambda x: vmap(lambda s: s + torch.rand(2), randomness="different")(x),
    "nested, same": lambda x: vmap(lambda s: s + torch.rand(2), randomness="same")(x),
    "grad": lambda x: torch.func.grad(lambda y: (F.dropout(y) * torch.rand(4)).sum())(x),
    "torchbatch.grad": lambda x: torchbatch.grad(lambda y: (F.dropout(y) * torch.rand(4)).sum())(x),
    "jvp": lambda x: torch.func.jvp(lambda y: F.dropout(y) * torch.rand(4), (x,), (x,)),
}
# What draws from per-sample values, one number for each element.
OF_VALUES = {
    "normal": lambda x: torch.normal(x, x.abs()),
    "normal, mean": lambda x: torch.normal(x, 2.0),
    "normal, std": lambda x: torch.normal(2.0, x),
    "normal, broadcast": lambda x: torch.normal(x, torch.ones(3, 1)),
    "bernoulli": lambda x: torch.bernoulli(x),
    "bernoulli, p": lambda x: torch.bernoulli(x, 0.3),
    "Bernoulli": lambda x: Bernoulli(x).sample(),
    "under grad": lambda x: torch.func.grad(lambda y: torch.normal(y, 1.0).sum() + y.sum())(x),
    "of an outer sample": lambda x: vmap(lambda s: torch.bernoulli(x) + s, randomness="different")(x),
}
# What takes a number of draws that depends on the values, or draws in an order of its own.
REFUSED = {
    "multinomial": lambda x: torch.multinomial(x, 2),
    "poisson": lambda x: torch.poisson(x),
    "binomial": lambda x: torch.binomial(torch.full_like(x, 5.0), x),
    "alpha_dropout": lambda x: F.alpha_dropout(x, 0.5, training=True),
    "feature_alpha_dropout": lambda x: F.feature_alpha_dropout(x.view(1, 2, 2), 0.5, training=True),
    "_standard_gamma": lambda x: Gamma(x, x).sample(),
    "bernoulli_.Tensor": lambda x: x.clone().bernoulli_(x),
    "fractional_max_pool2d": lambda x: F.fractional_max_pool2d(x.expand(1, 4, 4).contiguous(), 2, output_size=2),
}
CANNOT = (
    "{} cannot draw in chunks what it would draw at once: how many random numbers it takes, or in which order, is not known from "
    'shapes alone. Map without chunk_size, or with randomness="same".'
)
NOT_SAID = (
    'A random operation runs inside vmap, which has to be told what it means: randomness="different" draws for each sample anew, '
    'randomness="same" gives all samples one draw. Or draw from a key, as the loop does too: '
    "torchbatch.random.normal(key, shape), mapped over keys = torchbatch.random.split(torchbatch.random.key(0), n)."
)
NOT_ONE = (
    'randomness="same" asks for one draw for all samples, but what is drawn depends on per-sample values here. Use '
    'randomness="different", or draw uniform numbers and compare them with the values.'
)


def drawn(mapped, x):
    """What a call returns, and the state that it leaves the generator in."""
    torch.manual_seed(5)
    return tree_leaves(mapped(x)), torch.get_rng_state()


def assert_same_draws(one, other):
    (a, state), (b, other_state) = one, other
    assert len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert torch.equal(state, other_state)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", [*OF_SHAPE, *OF_VALUES])
def test_chunks_draw_what_the_whole_draws_bit_for_bit(name, layout):
    fun, (x, axis) = {**OF_SHAPE, **OF_VALUES}[name], LAYOUTS[layout]
    whole = drawn(vmap(fun, axis, randomness="different"), x)
    for size in (1, 3, 7):
        assert_same_draws(drawn(vmap(fun, axis, randomness="different", chunk_size=size), x), whole)


@pytest.mark.parametrize("name", OF_SHAPE)
def test_same_is_what_the_loop_draws_for_every_sample(name):
    fun = OF_SHAPE[name]
    ours, state = drawn(vmap(fun, randomness="same"), X)
    loops, _ = drawn(loop(fun, randomness="same"), X)
    assert_close(ours, loops)
    for size in (1, 3):
        assert_same_draws(drawn(vmap(fun, randomness="same", chunk_size=size), X), (ours, state))


@pytest.mark.parametrize("name", ["rand", "randn", "randperm", "uniform_", "normal_", "into a new tensor", "bernoulli"])
def test_different_samples_draw_different_numbers(name):
    x = torch.full((50, 40), 0.5)
    (result, *_), _ = drawn(vmap({**OF_SHAPE, **OF_VALUES}[name], randomness="different"), x)
    assert len({tuple(row.flatten().tolist()) for row in result}) > 10


@pytest.mark.parametrize("name", [*OF_SHAPE, *OF_VALUES, *sorted(REFUSED)])
def test_a_draw_has_to_be_allowed(name):
    fun = {**OF_SHAPE, **OF_VALUES, **REFUSED}[name]
    if name.startswith("nested") or name == "of an outer sample":
        pytest.skip("the inner map allows it")
    for options in ({}, {"chunk_size": 2}):
        with pytest.raises(RandomnessError) as caught:
            vmap(fun, **options)(X)
        assert str(caught.value).partition("\n")[0] == NOT_SAID
    with pytest.raises(RandomnessError):
        loop(fun)(X)


@pytest.mark.parametrize("fun", [lambda x: F.dropout(x, training=False), lambda x: F.dropout(x, 0.0), lambda x: x + 1])
def test_what_does_not_draw_needs_no_permission_and_leaves_the_generator(fun):
    for options in ({}, {"randomness": "different"}, {"randomness": "same"}, {"randomness": "different", "chunk_size": 3}):
        before = torch.get_rng_state()
        assert_close(vmap(fun, **options)(X), loop(fun)(X))
        assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("name", [n for n in OF_VALUES if "of an outer" not in n])
def test_one_draw_cannot_depend_on_per_sample_values(name):
    with pytest.raises(RandomnessError) as caught:
        vmap(OF_VALUES[name], randomness="same")(X)
    assert str(caught.value).partition("\n")[0] == NOT_ONE


@pytest.mark.parametrize("name", REFUSED)
def test_operators_that_cannot_draw_in_chunks_say_so(name):
    with pytest.raises(RandomnessError) as caught:
        vmap(REFUSED[name], randomness="different", chunk_size=3)(X)
    assert str(caught.value).partition("\n")[0] == CANNOT.format(name.removesuffix("."))


def test_an_operator_that_draws_by_another_way_is_found_out():
    def attention(x):
        q = x.view(1, 2, 2)
        return F.scaled_dot_product_attention(q, q, q, dropout_p=0.5)

    def then_more(x):
        return attention(x) + torch.rand(())

    for fun, what in ((attention, "An operation inside the mapped function"), (then_more, "An operation before this line")):
        with pytest.raises(RandomnessError, match=re.escape(CANNOT.format(what))):
            vmap(fun, randomness="different", chunk_size=3)(X)


def test_a_value_of_a_map_that_draws_the_same_cannot_be_drawn_from_in_chunks():
    def outer(x):
        return vmap(lambda s: torch.bernoulli(x) + s, randomness="different", chunk_size=2)(x)

    with pytest.raises(RandomnessError, match="cannot draw in chunks"):
        vmap(outer, randomness="same")(X)


def test_nested_chunks():
    def outer(x):
        return torch.rand(2), vmap(lambda s: s + torch.rand(3), randomness="different", chunk_size=2)(x), F.dropout(x)

    plain = drawn(
        vmap(lambda x: (torch.rand(2), vmap(lambda s: s + torch.rand(3), randomness="different")(x), F.dropout(x)),
             randomness="different"), X
    )  # fmt: skip
    for size in (1, 3):
        chunked = drawn(vmap(outer, randomness="different", chunk_size=size), X)
        assert [leaf.shape for leaf in chunked[0]] == [leaf.shape for leaf in plain[0]]
        assert_same_draws(chunked, drawn(vmap(outer, randomness="different"), X))


def test_an_exception_in_a_chunk_leaves_nothing_behind():
    def fails(x):
        raise KeyError("here")

    with pytest.raises(KeyError):
        vmap(fails, randomness="different", chunk_size=2)(X)
    whole = drawn(vmap(lambda x: torch.rand(3), randomness="different"), X)
    assert_same_draws(drawn(vmap(lambda x: torch.rand(3), randomness="different", chunk_size=2), X), whole)


@pytest.mark.parametrize("name", ["relu", "sum", "grad", "kwargs", "tree", "unmapped", "nested"])
@pytest.mark.parametrize("size", [1, 2, 3, 7, 8])
def test_chunks_give_what_the_whole_gives(name, size):
    y = torch.arange(4.0)
    calls = {
        "relu": lambda **o: vmap(lambda x: (x - 0.5).relu(), **o)(X),
        "sum": lambda **o: vmap(lambda x: x.sum(), out_axes=None, sum_match=True, **o)(X),
        "grad": lambda **o: vmap(torchbatch.grad(lambda x: (x**3).sum()), **o)(X),
        "kwargs": lambda **o: vmap(lambda x, *, k: x * k, **o)(X, k=X),
        "tree": lambda **o: vmap(lambda x: {"a": (x, None, 2.0)}, out_axes={"a": -1}, **o)(X),
        "unmapped": lambda **o: vmap(lambda x, y: (x * y, y), (0, None), (1, None), **o)(X, y),
        "nested": lambda **o: vmap(vmap(lambda s: s * 2, chunk_size=3), **o)(X),
    }
    assert_close(calls[name](chunk_size=size), calls[name]())


def test_known_gaps_of_pytorch():
    with pytest.raises(UnsupportedOperationError):
        vmap(lambda x: Dirichlet(x).sample(), randomness="different")(X)
    with pytest.raises(RandomnessError, match="depends on per-sample values"):
        vmap(lambda x: Categorical(probs=x).sample(), randomness="same")(X)
