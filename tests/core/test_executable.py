"""A trace as something that runs: backends, gradients, in-place writes."""

from __future__ import annotations

import pytest
import torch

from torchbatch.core.executable import Backend, Executable
from torchbatch.core.program import Program
from torchbatch.core.signature import StaticArguments, bind
from torchbatch.errors import AxisSpecError, UnsupportedOperationError
from torchbatch.testing import assert_close

X = torch.tensor([1.0, 2.0, 3.0])
REPLAYED = Backend("eager", None, None)


def executable(fun, *args, backend=REPLAYED):
    return Executable(Program(bind(fun, StaticArguments(fun, None, None), args, {})), backend)


def replayed(fun, *args):
    """An executable for arguments like these, and what it gives for them."""
    made = executable(fun, *args)
    return made, made.finish(made.run([*args]))


def test_trees_are_put_back():
    made = executable(lambda x: {"a": (x * 2, None)}, X)
    assert not made.single and torch.equal(made.finish(made.run([X]))["a"][0], X * 2)
    assert executable(lambda x: x * 2, X).single


def test_captured_tensors_are_read_at_each_run():
    w = torch.ones(3)
    made, first = replayed(lambda x: x * w, X)
    w.fill_(5)
    assert torch.equal(first, X) and torch.equal(made.run([X])[0], X * 5) and made.surroundings_same()
    w.requires_grad_()
    assert not made.surroundings_same()


def test_the_mode_of_a_module_belongs_to_the_surroundings():
    model = torch.nn.Dropout(0.5)
    made = executable(model, X)
    assert made.surroundings_same()
    model.eval()
    assert not made.surroundings_same()
    model.train()
    assert made.surroundings_same()


def test_the_list_of_values_is_left_as_it_is():
    for fun in (lambda x: x * 2, lambda x: x.add_(0)):
        made, values = executable(fun, X.clone()), [X.clone()]
        made.run(values)
        assert len(values) == 1 and torch.equal(values[0], X)


# Gradients


@pytest.mark.parametrize("gradients", [True, False])
def test_a_result_requires_a_gradient_if_an_argument_does(gradients):
    x = X.clone().requires_grad_(gradients)
    made, (result,) = replayed(lambda x: [x * 2], x)
    assert result.requires_grad is gradients and bool(made.trace.wanted) is gradients


def test_under_no_grad_the_result_requires_none():
    x = X.clone().requires_grad_()
    with torch.no_grad():
        made = executable(lambda x: x * 2, x)
    assert not made.run([x])[0].requires_grad, "it was traced without gradients"
    assert torch.is_grad_enabled()


def test_forward_and_backward_are_two_graphs():
    x, w = X.clone().requires_grad_(), X.clone().requires_grad_()
    made, value = replayed(lambda x, w: (x * w).exp().sum(), x, w)
    assert len(made.source) == 1, "the backward pass is built when it is needed"
    value.backward()
    assert len(made.source) == 2
    assert_close(x.grad, X * (X * X).exp())
    made.run([x, w])[0].backward()
    assert len(made.source) == 2, "and once"


def test_what_requires_no_gradient_gets_none():
    x = X.clone().requires_grad_()
    made = executable(lambda x, n: (x * n, x > 1, n * 2), x, X)
    results = made.run([x, X])
    assert [value.requires_grad for value in results] == [True, False, False]


def test_the_backward_pass_is_not_differentiated_in_silence():
    x = X.clone().requires_grad_()
    _, value = replayed(lambda x: (x**3).sum(), x)
    (first,) = torch.autograd.grad(value, x, create_graph=True)
    assert_close(first.detach(), 3 * X**2)
    with pytest.raises(UnsupportedOperationError, match="differentiated a second time by autograd"):
        first.sum().backward()


def test_gradients_in_a_backend_of_ones_own():
    graphs = []

    def backend(graph, examples):
        graphs.append((graph, len(examples)))
        return graph.forward

    x = X.clone().requires_grad_()
    made = executable(lambda x: (x.sin() * 2).sum(), x, backend=Backend(backend, None, None))
    made.run([x])[0].backward()
    assert_close(x.grad, 2 * X.cos())
    assert len(graphs) == 2
    assert all(count == len(graph.graph.find_nodes(op="placeholder")) for graph, count in graphs)


# In-place writes


def test_writes_reach_the_argument_and_its_version():
    def unnoticed(graph, examples):  # as generated code writes
        return lambda *values: graph(*(value.data for value in values))

    x = X.clone()
    made = executable(lambda x: x.mul_(2).sum(), x, backend=Backend(unnoticed, None, None))
    before = x._version
    assert made.run([x])[0] == 12 and torch.equal(x, X * 2) and x._version > before


def test_writes_beside_gradients():
    w, x = X.clone().requires_grad_(), torch.ones(3)
    made = executable(lambda w, x: (w * x.add_(1)).sum(), w, x)
    value = made.run([w, x])[0]
    assert torch.equal(x, torch.full((3,), 2.0))
    value.backward()
    assert torch.equal(w.grad, torch.full((3,), 2.0))


@pytest.mark.parametrize("requires_grad", [True, False])
def test_a_written_argument_must_not_share_memory_with_another(requires_grad):
    w = X.clone().requires_grad_(requires_grad)
    base = torch.ones(4)
    made = executable(lambda w, x, y: (w * x.add_(1) + y).sum(), w, torch.ones(3), torch.ones(3))
    with pytest.raises(UnsupportedOperationError) as raised:
        made.run([w, base[:3], base[1:]])
    assert str(raised.value) == (
        "jit: the function writes in place into an argument that shares memory with another one. Pass a copy of one of them "
        "(.clone()), or return the new value instead."
    )
    assert torch.equal(base, torch.ones(4))


def test_only_what_is_written_matters():
    base = torch.ones(4)
    made = executable(lambda x, y: x + y, torch.ones(3), torch.ones(3))
    assert torch.equal(made.run([base[:3], base[1:]])[0], torch.full((3,), 2.0))


# Backends


@pytest.mark.parametrize("name", ["xla", None, 3, ["eager"], "Inductor"])
def test_names_of_backends(name):
    with pytest.raises(AxisSpecError) as raised:
        Backend(name, None, None)
    assert str(raised.value) == f'jit: backend must be "inductor", "eager" or a function, but it is {name!r}.'


@pytest.mark.parametrize(("mode", "options"), [("max-autotune", None), (None, {"max_autotune": True})])
@pytest.mark.parametrize("name", ["eager", lambda graph, examples: graph.forward])
def test_settings_belong_to_inductor(name, mode, options):
    with pytest.raises(AxisSpecError, match="mode and options are settings of Inductor, so they go with backend='inductor'"):
        Backend(name, mode, options)


def test_the_graph_given_to_a_backend_is_flat_aten():
    seen = []

    def backend(graph, examples):
        seen.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    executable(lambda x: torch.nn.functional.gelu(x) @ x, X, backend=Backend(backend, None, None))
    assert seen and all(name.startswith("aten.") for name in seen)


def test_source():
    assert "torch.ops.aten.sin" in executable(torch.sin, X).source[0]
