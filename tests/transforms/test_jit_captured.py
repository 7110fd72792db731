"""jit: tensors that the function closes over, and draws from generators."""

from __future__ import annotations

import functools

import pytest
import torch

from torchbatch import jit, vmap
from torchbatch.errors import UnsupportedOperationError
from torchbatch.testing import assert_close

replayed = functools.partial(jit, backend="eager")
X = torch.tensor([1.0, 2.0, 3.0])


def counted(fun):
    """The function, and a list that grows by one when Python runs it."""
    runs: list[int] = []

    @functools.wraps(fun)
    def run(*args, **kwargs):
        runs.append(1)
        return fun(*args, **kwargs)

    return run, runs


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.norm, self.outer = torch.nn.Linear(3, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 1)

    def forward(self, x):
        return self.outer(torch.tanh(self.norm(self.inner(x))))


OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, 0.1, momentum=0.9),
    "adam": lambda parameters: torch.optim.Adam(parameters, 0.01),
}


def trained(backend, optimizer, steps=5):
    """Parameters, buffers and losses after some steps; ``backend=None`` is plain PyTorch."""
    torch.manual_seed(0)
    model = Net()
    steps_of = OPTIMIZERS[optimizer](model.parameters())
    step = lambda x, y: ((model(x) - y) ** 2).mean()  # noqa: E731
    fun, runs = counted(step)
    step = fun if backend is None else jit(fun, backend=backend)
    losses = []
    for _ in range(steps):
        x = torch.randn(16, 3)
        value = step(x, x.sum(1, keepdim=True))
        steps_of.zero_grad()
        value.backward()
        steps_of.step()
        losses.append(value.detach())
    return [*model.state_dict().values(), *losses], len(runs)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_training_loop(backend, optimizer):
    if backend == "inductor" and optimizer == "adam":
        pytest.skip("the compiler sees the same graph as with SGD")
    want, _ = trained(None, optimizer)
    got, runs = trained(backend, optimizer)
    assert_close(got, want)
    assert runs == 1


def test_captured_tensor_that_requires_a_gradient_from_now_on():
    w = torch.ones(3)
    jitted = replayed(lambda x: (x * w).sum())
    assert not jitted(X).requires_grad
    w.requires_grad_()
    jitted(X).backward()
    assert torch.equal(w.grad, X)
    w.requires_grad_(False)
    assert not jitted(X).requires_grad


def test_captured_tensor_gets_another_shape():
    w = torch.ones(3)
    fun, runs = counted(lambda x: x * w)
    jitted = replayed(fun)
    jitted(X)
    w.data = torch.full((1,), 7.0)
    assert torch.equal(jitted(X), X * 7) and torch.equal(jitted(X), X * 7)
    assert len(runs) == 2


def test_captured_non_leaf():
    leaf = torch.ones(3, requires_grad=True)
    inner = leaf * 2
    jitted = replayed(lambda x: (x * inner).sum())
    jitted(X).backward()
    assert torch.equal(leaf.grad, X * 2)


def test_captured_tensors_of_which_one_was_computed_from_the_other():
    leaf = torch.ones(3, requires_grad=True)
    inner = leaf * 2
    with pytest.raises(UnsupportedOperationError, match="another one that was computed from it"):
        replayed(lambda x: (x * inner * leaf).sum())(X)


def test_captured_zero_dimensional_tensor_promotes_as_one():
    scale = torch.tensor(2.0, dtype=torch.float64)
    assert replayed(lambda x: x * scale)(X).dtype == torch.float32
    assert replayed(lambda: scale * 2)().dtype == torch.float64


def test_captured_python_value_is_a_constant():
    factor = [2.0]
    jitted = replayed(lambda x: x * factor[0])
    jitted(X)
    factor[0] = 100.0
    assert torch.equal(jitted(X), X * 2)


def test_captured_tensor_that_is_also_an_argument():
    w = torch.ones(3, requires_grad=True)
    jitted = replayed(lambda x: (x * w).sum())
    jitted(w).backward()
    assert torch.equal(w.grad, torch.full((3,), 2.0))


def test_constants_made_inside_are_new_in_each_call():
    def fun(x):
        out = torch.tensor([0.0, 0.0, 0.0])
        out += x
        other = torch.Tensor([1.0, 1.0, 1.0])
        other *= x
        return out, other

    jitted = replayed(fun)
    for _ in range(3):
        assert all(torch.equal(value, X) for value in jitted(X))


@pytest.mark.parametrize("kind", ["conjugate", "negative"])
@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_lazily_conjugated_and_negated_tensors(kind, backend):
    """They look like plain ones by shape, strides and dtype, but their memory holds other numbers."""
    z = torch.tensor([1 + 2j, 3 + 4j])
    plain, lazy = (z, z.conj()) if kind == "conjugate" else (z.imag, z.conj().imag)
    jitted = jit(lambda x: x * 2, backend=backend)
    assert_close(jitted(plain), plain * 2)
    assert_close(jitted(lazy), lazy * 2)
    with pytest.raises(UnsupportedOperationError, match=r"closes over a tensor that is conjugated or negated only when it is"):
        jit(lambda: lazy * 2, backend=backend)()


# Random draws


def draws(x):
    noise = torch.randn(3) + torch.rand(3) + torch.randint(10, (3,)) + torch.randperm(3) + torch.normal(x, 1.0)
    return noise + torch.nn.functional.dropout(x, 0.5) + torch.bernoulli(torch.full((3,), 0.5)) + torch.empty(3).uniform_()


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_draws_are_those_of_eager(backend):
    jitted = jit(draws, backend=backend)
    jitted(X)
    torch.manual_seed(3)
    want = [draws(X), draws(X)]
    torch.manual_seed(3)
    assert_close([jitted(X), jitted(X)], want)


def test_tracing_draws_nothing():
    torch.manual_seed(3)
    want = [draws(X), torch.rand(())]
    torch.manual_seed(3)
    assert_close([replayed(draws)(X), torch.rand(())], want)


def test_generator_from_outside():
    generator = torch.Generator().manual_seed(0)
    jitted = replayed(lambda x: x + torch.randn(3, generator=generator))
    got = [jitted(X), jitted(X)]
    generator.manual_seed(0)
    assert all(torch.equal(value, X + torch.randn(3, generator=generator)) for value in got)


@pytest.mark.parametrize("randomness", ["same", "different"])
def test_draws_in_vmap(randomness):
    mapped = vmap(lambda x: x + torch.randn(2), randomness=randomness)
    torch.manual_seed(3)
    want = mapped(X)
    torch.manual_seed(3)
    assert_close(replayed(mapped)(X), want)
