"""The cost and the memory of traced and compiled programs, against counting by hand and against measuring."""

from __future__ import annotations

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from torchbatch import ShapeDtypeStruct, grad, jit, vmap
from torchbatch.errors import UnsupportedOperationError

F32 = 4


def lowered(fun, *args, **options):
    return jit(fun, **{"backend": "eager", **options}).lower(*args)


def held_at_most(call, *args):
    """The most memory that PyTorch allocates during a call, as its profiler sees it, in bytes."""
    call(*args)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        kept = call(*args)
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    assert kept is not None
    return most


# --- flops and bytes -------------------------------------------------------------------------------------------------


def test_flops_and_bytes_of_a_matrix_product():
    found = lowered(lambda a, b: a @ b, torch.ones(8, 16), torch.ones(16, 32)).cost_analysis()
    assert found == {"flops": 2 * 8 * 16 * 32, "bytes accessed": F32 * (8 * 16 + 16 * 32 + 8 * 32)}


def test_flops_are_those_of_jax():
    jax = pytest.importorskip("jax")
    a, b = torch.ones(8, 16), torch.ones(16, 32)
    theirs = jax.jit(lambda a, b: a @ b).lower(a.numpy(), b.numpy()).compile().cost_analysis()
    ours = lowered(lambda a, b: a @ b, a, b).cost_analysis()
    assert ours["flops"] == theirs["flops"]


@pytest.mark.parametrize(
    ("fun", "expected"),
    [
        (lambda x: x + 1, 2 * 1000),  # reads and writes
        (lambda x: x.sin().cos(), 4 * 1000),  # twice
        (lambda x: x.reshape(10, 100).T.sum(), 1000 + 1),  # views are free
        (lambda x: x.reshape(1000, 1).expand(1000, 7).sum(), 1000 + 1),  # what is repeated is there once
        (lambda x: x.add_(1).sum(), 2 * 1000 + 1000 + 1 + 2 * 1000),  # computed, summed, written back
        (lambda x: x[torch.arange(5)], 2 * 10 + 2 * 5),  # indices (of 8 bytes) and values, each written and read
    ],
    ids=["map", "maps", "views", "expanded", "in place", "picked"],
)
def test_bytes_of_operations_one_by_one(fun, expected):
    found = lowered(fun, ShapeDtypeStruct((1000,), torch.float32)).cost_analysis()
    assert found["bytes accessed"] == F32 * expected


def test_the_backward_pass_is_not_counted():
    plain, w = torch.ones(8, 16), torch.ones(16, 32)
    once = lowered(torch.matmul, plain, w).cost_analysis()
    assert lowered(torch.matmul, plain.clone().requires_grad_(), w).cost_analysis() == once


def test_a_gradient_inside_is_counted():
    def loss(w, x):
        return torch.tanh(x @ w).sum()

    found = lowered(grad(loss), torch.ones(16, 32), torch.ones(8, 16)).cost_analysis()
    assert found["flops"] == 2 * (2 * 8 * 16 * 32)


def test_a_batch_costs_as_many_flops_as_its_samples():
    one = lowered(torch.mv, torch.ones(8, 16), torch.ones(16)).cost_analysis()
    many = lowered(vmap(torch.mv, (None, 0)), torch.ones(8, 16), torch.ones(5, 16)).cost_analysis()
    assert many["flops"] == 5 * 2 * 8 * 16 and one["flops"] in (0, 2 * 8 * 16)  # some versions do not count mv


def test_open_sizes_are_counted_at_the_sizes_of_the_example():
    sized = jit(vmap(torch.dot), backend="eager", dynamic=True).lower(torch.ones(6, 4), torch.ones(6, 4))
    assert sized.cost_analysis() == lowered(vmap(torch.dot), torch.ones(6, 4), torch.ones(6, 4)).cost_analysis()


# --- memory ----------------------------------------------------------------------------------------------------------


def test_the_parts_of_the_memory():
    scale = torch.ones(100)
    found = lowered(lambda x: ((x * scale).exp() + 1).sum(), torch.ones(100)).compile().memory_analysis()
    assert found.argument_size_in_bytes == 2 * 100 * F32
    assert found.output_size_in_bytes == F32
    assert found.temp_size_in_bytes == 2 * 100 * F32 - F32  # two at a time; the output comes when the first is gone
    assert found.generated_code_size_in_bytes > 0


def two_products(x, w):
    return torch.softmax((x @ w).tanh() @ w.T, -1).sum()


def chain(x, w):
    return (x @ w) @ w @ w, x.sin().sum(0)


@pytest.mark.parametrize("fun", [two_products, chain])
def test_memory_of_the_graph_is_what_is_measured(fun):
    compiled = lowered(fun, torch.ones(64, 32), torch.ones(32, 32)).compile()
    found = compiled.memory_analysis()
    measured = held_at_most(compiled, torch.ones(64, 32), torch.ones(32, 32))
    assert abs(found.output_size_in_bytes + found.temp_size_in_bytes - measured) <= 64  # numbers, which are tensors there


def test_memory_of_compiled_code_is_what_is_measured():
    compiled = jit(two_products).lower(torch.ones(64, 32), torch.ones(32, 32)).compile()
    found = compiled.memory_analysis()
    measured = held_at_most(compiled, torch.ones(64, 32), torch.ones(32, 32))
    assert found.output_size_in_bytes + found.temp_size_in_bytes == measured


def test_compiled_code_moves_and_holds_less():
    staged = jit(lambda x: (x.sin().cos() * 2 + 1).sum()).lower(torch.ones(5000))
    compiled = staged.compile()
    assert staged.cost_analysis()["bytes accessed"] > 8 * 5000 * F32
    assert compiled.cost_analysis()["bytes accessed"] == 5001 * F32
    assert compiled.memory_analysis().temp_size_in_bytes == 0


def test_a_buffer_that_a_kernel_updates_is_read_and_written():
    found = jit(lambda x, w: (x @ w).tanh()).lower(torch.ones(64, 32), torch.ones(32, 16)).compile().cost_analysis()
    assert found["bytes accessed"] == F32 * (64 * 32 + 32 * 16 + 64 * 16 + 2 * 64 * 16)


def test_what_is_kept_for_the_backward_pass_is_held():
    x, w = torch.ones(64, 32), torch.ones(32, 16, requires_grad=True)
    found = lowered(lambda x, w: torch.tanh(x @ w).exp().sum(), x, w).compile().memory_analysis()
    with torch.no_grad():
        alone = lowered(lambda x, w: torch.tanh(x @ w).exp().sum(), x, w).compile().memory_analysis()
    assert found.temp_size_in_bytes >= alone.temp_size_in_bytes >= 64 * 16 * F32


def test_open_sizes_have_no_memory_of_their_own():
    compiled = jit(vmap(torch.sin), dynamic=True).lower(torch.ones(6, 4)).compile()
    with pytest.raises(UnsupportedOperationError, match="depends on the sizes of the call"):
        compiled.memory_analysis()


def test_code_of_an_unknown_kind_is_refused():
    compiled = jit(torch.sin).lower(torch.ones(6)).compile()
    compiled._executable.source[0] = "int main() {}"
    with pytest.raises(UnsupportedOperationError, match="could not be followed, so its memory is not known: SyntaxError"):
        compiled.cost_analysis()
