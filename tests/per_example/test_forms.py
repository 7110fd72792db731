"""The two forms of a call, what a module may change between two calls, and every error by its text."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.per_example import loop
from tests.per_example.models import Case, Function
from tests.per_example.together import assert_close
from torchbatch import grad, jit, per_example, vmap
from torchbatch.errors import (
    AxisError,
    AxisSpecError,
    DataDependentError,
    GradientTypeError,
    InPlaceError,
    InputTypeError,
)

X, Y = torch.linspace(-1, 1, 12).reshape(3, 4), torch.tensor([0, 1, 1])


def _linear():
    torch.manual_seed(0)
    return nn.Linear(4, 2)


def _gradients(model, criterion=F.cross_entropy, **options):
    return per_example.gradients(model, criterion, compile=False, **options)


def _module(forward):
    return Function(lambda self, *args, **kwargs: forward(self.linear, *args, **kwargs), linear=_linear())


# --- two forms -------------------------------------------------------------------------------------------------------


def test_a_function_of_a_tree_of_parameters():
    params = {"w": torch.randn(4, 2), "deep": [torch.randn(2), (torch.randn(()),)]}

    def loss(params, x, y):
        return F.cross_entropy(params["deep"][1][0] * (x @ params["w"]) + params["deep"][0], y)

    found = per_example.gradients(loss, compile=False)(params, X, Y)
    expected = vmap(grad(loss), in_axes=(None, 0, 0))(params, X, Y)
    assert_close({"a": found["w"], "b": found["deep"][0], "c": found["deep"][1][0]},
                 {"a": expected["w"], "b": expected["deep"][0], "c": expected["deep"][1][0]}, 1e-5)  # fmt: skip


def test_a_function_of_trees_of_examples():
    def loss(w, example, scale):
        return (example["x"] @ w).sum() * scale["by"][0]

    found = per_example.gradients(loss, compile=False)(torch.ones(4, 2), {"x": X}, {"by": (torch.tensor([1.0, 2.0, 3.0]),)})
    assert_close(found, X[:, :, None].expand(3, 4, 2) * torch.tensor([1.0, 2.0, 3.0])[:, None, None], 1e-6)


def test_nothing_of_the_module_changes_and_results_have_no_history():
    model = _linear()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = _gradients(model)(X.clone().requires_grad_(), Y)
    assert model.weight.grad is None and not any(value.requires_grad for value in found.values())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not hasattr(model.weight, "grad_sample")


def test_one_call_follows_what_becomes_of_its_module():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.9), nn.Linear(4, 2)).eval()
    run = _gradients(model)
    case = Case(model, F.cross_entropy, (X, Y))
    assert_close(run(X, Y), loop.gradients(case), 1e-5)
    with torch.no_grad():
        model[0].weight.mul_(2)
    assert_close(run(X, Y), loop.gradients(case), 1e-5)
    model.load_state_dict({name: value + 0.5 for name, value in model.state_dict().items()})
    assert_close(run(X, Y), loop.gradients(case), 1e-5)
    model[2].bias.requires_grad_(False)
    assert_close(run(X, Y), loop.gradients(case), 1e-5)
    model.train()
    assert not torch.allclose(run(X, Y)["0.weight"], loop.gradients(case)["0.weight"])


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_reductions_of_the_criterion_are_alike_for_one_example(reduction):
    criterion = nn.CrossEntropyLoss(reduction=reduction)
    assert_close(_gradients(_linear(), criterion)(X, Y), loop.gradients(Case(_linear(), F.cross_entropy, (X, Y))), 1e-6)


def test_a_loss_among_the_entries_of_the_output():
    model = _module(lambda linear, x, y: {"loss": F.cross_entropy(linear(x), y), "logits": linear(x)})
    found = _gradients(model, None)(X, Y)
    assert_close(found["linear.weight"], loop.gradients(Case(model.linear, F.cross_entropy, (X, Y)))["weight"], 1e-6)


def test_a_module_without_a_gradient_by_some_parameter_gives_zeros():
    model = _module(lambda linear, x: linear(x).detach())
    assert not any(value.any() for value in _gradients(model)(X, Y).values())


def test_inside_other_transforms():
    model = _linear()
    norms = per_example.norms(model, F.cross_entropy)
    expected = norms(X, Y)
    assert_close(jit(norms, backend="eager")(X, Y), expected, 1e-6)
    assert_close(vmap(norms)(X[None], Y[None])[0], expected, 1e-6)

    def loss(w, x):
        return (w * x).square().sum()

    def total(w):
        return per_example.norms(loss)(w, X).sum()

    w = torch.arange(1.0, 5.0)
    by_hand = grad(lambda w: (2 * w * X.square()).norm(dim=1).sum())(w)
    assert_close(grad(total)(w), by_hand, 1e-5)
    assert_close(jit(grad(total), backend="eager")(w), by_hand, 1e-5)


def test_explain():
    model = nn.Sequential(nn.Embedding(50, 3), nn.Flatten(), nn.Linear(6, 40))
    said = per_example.norms(model, F.cross_entropy).explain(torch.zeros(3, 2, dtype=torch.int64), Y)
    assert said == (
        "0.weight  never made: its norm and its sum come from the factors of its product\n"
        "2.bias    made for each example: it is a vector\n"
        "2.weight  never made: its norm and its sum come from the factors of its product"
    )


# --- errors ----------------------------------------------------------------------------------------------------------


def _if(linear, x):
    return linear(x) if x.sum() > 0 else -linear(x)


ERRORS = {
    "a loss of two numbers": (
        lambda: _gradients(_linear(), lambda output, y: output)(X, Y), GradientTypeError,
        "per-example gradients need the loss of one example, a number, but for a batch of one the criterion returned "
        "float32[1,2]. Take its sum or its mean.",
    ),
    "a loss that is no tensor": (
        lambda: _gradients(_linear(), lambda output, y: 1.0)(X, Y), GradientTypeError,
        "per-example gradients need the loss of one example, a number, but for a batch of one the criterion returned 1.0 of "
        "type float.",
    ),
    "a loss that is an integer": (
        lambda: _gradients(_linear(), lambda output, y: output.argmax())(X, Y), GradientTypeError,
        "Linear must return the loss of one example, a floating-point number, but it returned int64[].",
    ),
    "a complex loss": (
        lambda: per_example.gradients(lambda w, x: (w * x).sum() * 1j)(X[0], X), GradientTypeError,
        "<lambda> must return the loss of one example, a floating-point number, but it returned complex64[].",
    ),
    "two results": (
        lambda: per_example.gradients(lambda w, x: (w.sum(), x))(X[0], X), GradientTypeError,
        "<lambda> must return the loss of one example, a floating-point number, but it returned a tuple of 2 values.",
    ),
    "an output without a loss": (
        lambda: _gradients(_module(lambda linear, x: {"logits": linear(x)}), None)(X), GradientTypeError,
        "per-example gradients need the loss of one example, a number, but there is no criterion, and for a batch of one "
        "Function returned a dict with the keys 'logits'.",
    ),
    "integer parameters": (
        lambda: per_example.gradients(lambda p, x: (p["w"] * x).sum())({"w": torch.ones(4, dtype=torch.int64)}, X),
        GradientTypeError,
        "gradients: w is tensor([1, 1, 1, 1]) of type Tensor and dtype torch.int64, which has no gradient. Parameters are "
        "tensors of floating-point or complex numbers.",
    ),
    "no parameters": (
        lambda: _gradients(_linear().requires_grad_(False))(X, Y), GradientTypeError,
        "gradients: there are no parameters to differentiate by: all are frozen, or there are none.",
    ),
    "batches of two sizes": (
        lambda: _gradients(_linear())(X, Y[:2]), AxisError,
        "gradients: inputs[0] has 3 examples along its first axis, but targets[0] has 2.",
    ),
    "batches of two sizes, for a function": (
        lambda: per_example.gradients(lambda w, x, y: w * x * y)(X[0], X, X[:2]), AxisError,
        "gradients: batch[0] has 3 examples along its first axis, but batch[1] has 2.",
    ),
    "a leaf that is no tensor": (
        lambda: _gradients(_linear(), adapter=lambda batch: ({"input": batch[0]}, batch[1]))((np.ones((3, 4)), Y)),
        InputTypeError,
        "gradients: keywords['input'] is array([[1., 1., 1., 1.], [1., 1., 1., 1.], [1., 1., 1., 1.]]) of type ndarray and dtype "
        "float64, which is no tensor. Give an adapter that makes tensors of it.",
    ),
    "a leaf without an axis": (
        lambda: _gradients(_linear())(X, torch.tensor(1)), AxisError,
        "gradients: targets[0] is a single number, which has no axis of examples.",
    ),
    "no tensor at all": (
        lambda: per_example.gradients(lambda w, x: w.sum())(X[0], ()), AxisError,
        "gradients: the batch has no tensor, so there is nothing that says how many examples there are.",
    ),
    "no target": (
        lambda: _gradients(_linear())(X), InputTypeError,
        "gradients: Linear is called with its inputs and then 1 target(s), but it got 1 argument(s). If your batches look "
        "otherwise, say targets=… or give an adapter that makes (inputs, targets).",
    ),
    "no batch": (
        lambda: per_example.gradients(lambda w, x: w.sum())(X), InputTypeError,
        "gradients: a function of parameters and an example is called with the parameters and a batch, "
        "gradients(<lambda>)(params, *batch), but it got 1 argument(s).",
    ),
    "an adapter of something else": (
        lambda: _gradients(_linear(), adapter=lambda x, y: [x, 1])(1, 2), AxisSpecError,
        "gradients: the adapter must return a pair (inputs, targets), but it returned [1, 1] of type list.",
    ),
    "a class": (
        lambda: _gradients(nn.Linear), InputTypeError,
        "gradients takes a module, but Linear is a class of modules. Make one: Linear(…).",
    ),
    "None": (
        lambda: _gradients(None), InputTypeError,
        "gradients takes a function loss(params, *example) or a module, but it got None of type NoneType.",
    ),
    "a criterion for a function": (
        lambda: _gradients(lambda w, x: w), AxisSpecError,
        "gradients: criterion, adapter and batch_norm go with a module, but <lambda> is a function, which returns the loss of "
        "one example itself.",
    ),
    "a criterion that is a name": (
        lambda: _gradients(_linear(), "mse"), AxisSpecError,
        "gradients: criterion must be a function of the output and the targets, but it is 'mse' of type str.",
    ),
    "a negative number of targets": (
        lambda: _gradients(_linear(), targets=-1), AxisSpecError,
        "gradients: targets counts the arguments that are targets, but it is -1 of type int.",
    ),
    "a copying module": (
        lambda: _gradients(nn.DataParallel(_linear()))(X, Y), GradientTypeError,
        "gradients: a DataParallel copies its module as it runs. Give its attribute .module instead.",
    ),
    "a write into the input": (
        lambda: _gradients(_module(lambda linear, x: linear(x.mul_(2))))(X.clone(), Y), InPlaceError,
        "per_example: the loss of one example writes in place into an input, a parameter or another tensor from outside (as "
        "max_norm of an embedding does), and each example would have to see what the others wrote. Compute a new value instead.",
    ),
    "an if that depends on the example": (
        lambda: _gradients(_module(_if))(X, Y), DataDependentError,
        "Python needs a value here (an if, a while, a range, a size, .item(), int(), float()), but Function is being traced, and "
        "the value is only known when it runs. Choose with torch.where(condition, a, b)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_error(name):
    call, kind, text = ERRORS[name]
    with pytest.raises(kind, match="^" + re.escape(text)) as error:
        call()
    assert kind is DataDependentError or str(error.value) == text


def test_max_norm_of_an_embedding():
    model = nn.Sequential(nn.Embedding(5, 4, max_norm=1.0), nn.Flatten(), nn.Linear(4, 2))
    with pytest.raises(InPlaceError, match="as max_norm of an embedding does"):
        _gradients(model)(torch.zeros(3, 1, dtype=torch.int64), Y)


def test_the_line_of_an_if_is_named():
    with pytest.raises(DataDependentError, match=r"in _if, .*test_forms.py:\d+\n    return linear\(x\) if x.sum\(\) > 0"):
        _gradients(_module(_if))(X, Y)
