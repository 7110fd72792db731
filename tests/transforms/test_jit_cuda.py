"""jit on a GPU: the same code, CUDA graphs and tuned kernels. Skipped where there is none."""

from __future__ import annotations

import pytest
import torch

from torchbatch import grad, jit, vmap
from torchbatch.testing import assert_close

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def loss(w, x, y):
    return (torch.tanh(x @ w) - y).square().sum()


def data(batch=64):
    made = torch.Generator("cuda").manual_seed(0)
    return [torch.randn(*shape, device="cuda", generator=made) for shape in ((16, 4), (batch, 16), (batch, 4))]


per_example = vmap(grad(loss), (None, 0, 0))


@pytest.mark.parametrize("mode", [None, "reduce-overhead", "max-autotune"])
def test_per_example_gradients(mode):
    args = data()
    compiled = jit(per_example, mode=mode)
    for _ in range(3):  # a CUDA graph is recorded at the second call, and replayed at the third
        assert_close(compiled(*args).clone(), per_example(*args))


def test_new_inputs_reach_a_cuda_graph():
    w, x, y = data()
    compiled = jit(per_example, mode="reduce-overhead")
    for scale in (1.0, 2.0, 3.0, 4.0):
        assert_close(compiled(w, x * scale, y).clone(), per_example(w, x * scale, y))


def test_gradients_of_captured_parameters():
    w, x, y = data()
    w.requires_grad_()
    compiled = jit(lambda x, y: vmap(loss, (None, 0, 0))(w, x, y).mean())
    found = torch.autograd.grad(compiled(x, y), w)
    assert_close(found, torch.autograd.grad(vmap(loss, (None, 0, 0))(w, x, y).mean(), w))


def test_open_sizes():
    compiled = jit(per_example, dynamic=True)
    for batch in (64, 32, 100):
        args = data(batch)
        assert_close(compiled(*args), per_example(*args))
    assert compiled.cache_size() == 1


def test_devices_are_traced_apart():
    compiled = jit(lambda x: x * 2 + 1)
    for device in ("cpu", "cuda"):
        x = torch.ones(3, device=device)
        assert_close(compiled(x), x * 2 + 1)
    assert compiled.cache_size() == 2


def test_numbers_beside_cuda_tensors():
    x = torch.ones(3, device="cuda", dtype=torch.float16)
    assert_close(jit(lambda x, s: x * s)(x, 0.5), x * 0.5)


def test_donated_memory_is_freed():
    x = torch.ones(1 << 20, device="cuda")
    before = torch.cuda.memory_allocated()
    y = jit(lambda x: x.sin().sum(), donate_argnums=0)(x)
    assert torch.cuda.memory_allocated() <= before - (1 << 20) * 4 + 4096
    assert y.item() > 0
