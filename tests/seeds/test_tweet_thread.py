"""The thread that introduces vmap: one neuron's model, the batch it cannot take, and four ways to give it one."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from torchbatch import make_graph, vmap
from torchbatch.testing import assert_close

COMPILED = pytest.mark.parametrize("how", ["eager", "jit", "inductor"], indirect=True)


@pytest.fixture
def arrays(draw):
    """Weights, bias, one input of length 5, and three such inputs as the rows of a matrix."""
    return draw(4, 5), draw(4), draw(5), draw(3, 5)


@pytest.fixture
def models(arrays):
    """The model of the thread, a vector in and a scalar out, written in torch and in JAX."""
    W, b = torch.from_numpy(arrays[0]), torch.from_numpy(arrays[1])
    jW, jb = jnp.asarray(arrays[0]), jnp.asarray(arrays[1])

    def model(x):
        return torch.tanh(W @ x + b).sum()

    def jax_model(x):
        return jnp.tanh(jW @ x + jb).sum()

    return model, jax_model


def batched_by_hand(arrays):
    W, b = torch.from_numpy(arrays[0]), torch.from_numpy(arrays[1])

    def batched_model(x):
        return torch.tanh(torch.einsum("ij,...j->...i", W, x) + b).sum(-1)

    return batched_model


def test_a_vector_gives_a_scalar(arrays, models, same):
    model, jax_model = models
    out = model(torch.from_numpy(arrays[2]))
    assert out.shape == ()
    same(out, jax_model(jnp.asarray(arrays[2])))


def test_the_model_itself_refuses_a_batch(arrays, models):
    model, jax_model = models
    with pytest.raises(RuntimeError, match=r"cannot be multiplied \(4x5 and 3x5\)"):
        model(torch.from_numpy(arrays[3]))
    with pytest.raises(TypeError):
        jax_model(jnp.asarray(arrays[3]))


def test_list_comprehension(arrays, models, same):
    model, jax_model = models
    batch = torch.from_numpy(arrays[3])
    same(torch.stack([model(x) for x in batch]), jnp.array([jax_model(x) for x in jnp.asarray(arrays[3])]))


def test_batched_by_hand(arrays, models, same):
    batch = torch.from_numpy(arrays[3])
    same(batched_by_hand(arrays)(batch), jax.vmap(models[1])(jnp.asarray(arrays[3])))
    same(batched_by_hand(arrays)(batch[0]), models[1](jnp.asarray(arrays[3][0])))


@COMPILED
def test_vmap(arrays, models, same, vmap):
    model, jax_model = models
    batch = torch.from_numpy(arrays[3])
    out = vmap(model)(batch)
    same(out, jax.vmap(jax_model)(jnp.asarray(arrays[3])))
    assert_close(out, torch.stack([model(x) for x in batch]), rtol=1e-5, dtypes=False)
    assert_close(out, batched_by_hand(arrays)(batch), rtol=1e-5, dtypes=False)


class Operators(TorchDispatchMode):
    """Records the name of every operator that reaches the backend."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def arithmetic(function, batch):
    """The operators that compute something, in order: a matrix product under one name, and no views or copies."""
    with Operators() as seen:
        function(batch)
    names = ["product" if name in {"mm", "bmm", "mv", "addmm"} else name for name in seen.names]
    return [name for name in names if name in {"product", "add", "tanh", "sum"}]


def test_the_steps_match_those_written_by_hand(arrays, models):
    """One product, one addition, one tanh, one sum, for the whole batch: no loop is hidden in either."""
    batch = torch.from_numpy(arrays[3])
    steps = ["product", "add", "tanh", "sum"]
    assert arithmetic(vmap(models[0]), batch) == steps
    assert arithmetic(batched_by_hand(arrays), batch) == steps
    assert arithmetic(lambda xs: [models[0](x) for x in xs], batch) == 3 * steps


def test_the_printed_graphs_match(arrays, models):
    """The point of the thread: printed, both forms show the same essential steps in the same order, as JAX's jaxprs do."""
    batch = torch.from_numpy(arrays[3])
    mapped, by_hand = make_graph(vmap(models[0]))(batch), make_graph(batched_by_hand(arrays))(batch)
    assert mapped.operations == by_hand.operations == ["mm", "add", "tanh", "sum"]
    assert str(mapped).splitlines() == [
        "inputs a:f32[3,5]; captured b:f32[4,5] c:f32[4]",
        "d:f32[4,3] = mm b a.T",
        "e:f32[3,4] = add d.T c",
        "f:f32[3,4] = tanh e",
        "g:f32[3] = sum[dim=1] f",
        "return g",
    ]
    assert str(by_hand).splitlines()[1:3] == ["d:f32[3,4] = mm a b.T", "e:f32[3,4] = add d c"]
    assert str(by_hand).splitlines()[3:] == str(mapped).splitlines()[3:]

    theirs = jax.make_jaxpr(jax.vmap(models[1]))(jnp.asarray(arrays[3]))
    names = {"dot_general": "mm", "add": "add", "tanh": "tanh", "reduce_sum": "sum"}
    assert [names[equation.primitive.name] for equation in theirs.eqns if equation.primitive.name in names] == mapped.operations
