"""Tracing a flat function to a graph: operations, captured tensors, gradients, in-place writes, open sizes."""

from __future__ import annotations

import logging

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from torchbatch import grad, vmap
from torchbatch._torch import graphs
from torchbatch.errors import LeakedTracerError
from torchbatch.testing import assert_close

X = torch.tensor([1.0, 2.0, 3.0])


def traced(fun, *inputs, gradients=False, **options):
    return graphs.trace(lambda values: fun(*values), inputs, gradients=gradients, **options)


def operations(trace):
    return [str(node.target) for node in trace.graph.graph.nodes if node.op == "call_function"]


def test_every_transform_is_gone():
    found = traced(lambda x: [vmap(grad(lambda a: a.sin() * 2))(x)], X)
    assert operations(found) and all(name.startswith("aten.") for name in operations(found))
    assert_close(found.graph(X), [X.cos() * 2])
    assert found.outputs == 1 and found.captured == [] and found.mutated == [] and found.sizes is None


def test_the_function_runs_once_and_sees_shapes_only():
    seen = []
    traced(lambda x: [seen.append((tuple(x.shape), x.dtype, x.is_meta)) or x * 2], X)
    assert seen == [((3,), torch.float32, False)]


def test_captured_tensors_become_inputs_in_the_order_in_which_they_are_met():
    a, b, unused = torch.ones(3), torch.full((3,), 2.0), torch.zeros(3)
    found = traced(lambda x: [b * x + a * b + (a + b).sum() * unused.dim()], X)
    assert [value is other for value, other in zip(found.captured, (b, a), strict=True)] == [True, True]
    assert len(found.graph.graph.find_nodes(op="placeholder")) == len(found.examples) == 3
    assert_close(found.graph(X, 10 * b, 2 * a), [10 * b * X + 2 * a * 10 * b + (2 * a + 10 * b).sum()])


def test_what_is_done_to_captured_tensors_alone_is_recorded():
    a = torch.ones(3)
    found = traced(lambda x: [x * (a.exp() + 1).sum()], X)
    assert any("exp" in name for name in operations(found))


def test_constants_are_no_captured_tensors():
    found = traced(lambda x: [x * torch.tensor([1.0, 2.0, 3.0]), torch.tensor(5)], X)
    assert found.captured == []
    assert_close(found.graph(X), [X * X, torch.tensor(5)])


def test_examples_carry_no_numbers_and_no_gradients():
    found = traced(lambda x: [x * 2], X.clone().requires_grad_(), gradients=True)
    assert all(type(value) is not torch.Tensor and not value.requires_grad for value in found.examples)
    assert [tuple(value.shape) for value in found.examples] == [(3,), (3,)]


def test_gradients_are_recorded_with_the_function():
    w = torch.tensor([3.0, 4.0, 5.0], requires_grad=True)
    x = X.clone().requires_grad_()
    found = traced(lambda x, c: [(x * w).sum(), x > 0, x.sin() + c], x, torch.ones(3), gradients=True)
    assert found.differentiable == [0, 2] and found.wanted == [0, 2] and found.outputs == 3
    tangents = [torch.tensor(2.0), torch.tensor([1.0, 0.0, -1.0])]
    *outputs, by_x, by_w = found.graph(x.detach(), torch.ones(3), w.detach(), *tangents)
    assert_close(outputs[2], X.sin() + 1)
    assert_close(by_x, 2 * w.detach() + tangents[1] * X.cos())
    assert_close(by_w, 2 * X)


@pytest.mark.parametrize("gradients", [True, False])
def test_nothing_is_differentiated_that_does_not_require_it(gradients):
    found = traced(lambda x: [x * 2], X.clone().requires_grad_(not gradients), gradients=gradients)
    assert found.differentiable == [] and found.wanted == [] and len(found.examples) == 1


def test_no_grad_detach_and_custom_functions_mean_what_they_mean():
    class Tripled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 1

        @staticmethod
        def backward(ctx, tangent):
            return tangent * 3

    x = X.clone().requires_grad_()
    found = traced(lambda x: [Tripled.apply(x) * x.detach()], x, gradients=True)
    assert_close(found.graph(X, torch.ones(3))[1], 3 * X)
    assert not any("detach" in name for name in operations(found))


def test_in_place_writes_are_taken_out():
    def fun(x, y):
        y.add_(x)
        z = x.clone().mul_(2)
        z[0] = 5
        return [z, y * 2]

    found = traced(fun, X, torch.ones(3))
    assert found.mutated == [1] and found.outputs == 2
    assert not any(name.split(".")[1].endswith("_") for name in operations(found))
    y = torch.ones(3)
    assert_close(found.graph(X, y), [torch.tensor([5.0, 4.0, 6.0]), (X + 1) * 2, X + 1])
    assert torch.equal(y, torch.ones(3))


def test_a_graph_that_writes():
    state = torch.zeros(3)
    found = traced(lambda x: [state.add_(x).sum()], X)
    assert found.mutated == [1], "the captured tensor comes after the argument"
    module = graphs.written_in_place(found)
    written = torch.ones(3)
    assert module(X, written)[0] == 9 and torch.equal(written, X + 1)
    assert len(module(X, written)) == found.outputs == 1
    plain = traced(lambda x: [x * 2], X)
    assert graphs.written_in_place(plain) is plain.graph


def test_running_averages_of_batch_norm_are_written():
    layer = torch.nn.BatchNorm1d(3)
    found = traced(lambda x: [layer(x)], torch.randn(4, 3))
    names = [name for i in found.mutated for name, value in layer.named_buffers() if value is found.captured[i - 1]]
    assert set(names) == {"running_mean", "running_var", "num_batches_tracked"}


@pytest.mark.parametrize("fun", [lambda x: [x], lambda x: [x[1:]], lambda x: [x.t()], lambda x: [X], lambda x: [X[:1]]])
def test_outputs_have_memory_of_their_own(fun):
    found = traced(fun, torch.ones(2, 2))
    inputs = [torch.ones(2, 2), *found.captured]
    (output,) = found.graph(*inputs)
    assert all(output.untyped_storage().data_ptr() != value.untyped_storage().data_ptr() for value in inputs)


def test_dead_operations_go_and_draws_stay():
    found = traced(lambda x: [(x.sin(), torch.rand(3), x * 2)[2]], X)
    assert not any("sin" in name for name in operations(found))
    assert any("rand" in name for name in operations(found))
    assert [graphs.has_effect(node) for node in found.graph.graph.nodes if "mul" in str(node.target)] == [False]


def test_is_tracing():
    seen = []
    traced(lambda x: [(seen.append(graphs.is_tracing()), x * 2)[1]], X)
    make_fx(lambda x: (seen.append(graphs.is_tracing()), x * 2)[1])(X)
    assert seen == [True, True] and not graphs.is_tracing()


@pytest.mark.parametrize("disabled", [False, True])
def test_state_is_put_back_after_an_error(disabled, monkeypatch):
    log = logging.getLogger("torch._subclasses.fake_tensor")
    monkeypatch.setattr(log, "disabled", disabled)
    w = torch.ones(3, requires_grad=True)

    def fun(x):
        w.detach().add_(x)
        raise KeyError

    with pytest.raises(KeyError):
        traced(fun, X)
    assert not graphs.is_tracing() and log.disabled is disabled
    assert torch.equal(w, torch.ones(3)) and w.requires_grad and w.grad is None
    assert torch._C._len_torch_dispatch_stack() == 0
    assert type(X * 2) is torch.Tensor


def test_leaked_values_are_made_unusable():
    kept = []
    traced(lambda x: [(kept.append(x), x * 2)[1]], X)
    with pytest.raises(LeakedTracerError):
        kept[0] + 1


def test_open_sizes_are_symbols():
    found = traced(lambda x, y: [x.sum(0) + y], torch.ones(4, 3), torch.ones(3), open_axes=[[0], []])
    assert found.sizes is not None
    size, fixed = found.examples[0].shape
    assert isinstance(size, torch.SymInt) and fixed == 3
    assert found.sizes.accept([torch.ones(9, 3), torch.ones(3)]) and not found.sizes.accept([torch.ones(9, 4), torch.ones(4)])
    assert_close(found.graph(torch.ones(9, 3), X), [9 + X])
