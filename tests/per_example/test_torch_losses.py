"""Every loss of PyTorch as a criterion, as it is, against ``autograd.grad`` of one example after the other."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from torchbatch import per_example
from torchbatch.per_example.ctc import ctc_loss
from torchbatch.testing import assert_close

COUNT = 4


def numbers(*shape):
    return torch.randn(COUNT, *shape, dtype=torch.float64)


def classes():
    return torch.randint(3, (COUNT,))


def bits(*shape):
    return torch.randint(2, (COUNT, *shape)).double()


def signs(*shape):
    return 2 * bits(*shape) - 1


#: A loss of the output (three numbers) and targets, and the targets.
LOSSES = {
    "L1Loss": (nn.L1Loss(), lambda: [numbers(3)]),
    "MSELoss": (nn.MSELoss(), lambda: [numbers(3)]),
    "SmoothL1Loss": (nn.SmoothL1Loss(), lambda: [numbers(3)]),
    "HuberLoss": (nn.HuberLoss(reduction="sum", delta=0.7), lambda: [numbers(3)]),
    "CrossEntropyLoss": (nn.CrossEntropyLoss(label_smoothing=0.1), lambda: [classes()]),
    "CrossEntropyLoss, weights": (nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0]).double()), lambda: [classes()]),
    "CrossEntropyLoss, probabilities": (nn.CrossEntropyLoss(), lambda: [numbers(3).softmax(1)]),
    "CrossEntropyLoss, one left out": (nn.CrossEntropyLoss(ignore_index=1), lambda: [torch.tensor([0, 2, 2, 0])]),
    "NLLLoss": (lambda o, y: nn.NLLLoss()(o.log_softmax(1), y), lambda: [classes()]),
    "PoissonNLLLoss": (nn.PoissonNLLLoss(full=True), lambda: [bits(3) + 2]),
    "GaussianNLLLoss": (lambda o, y: nn.GaussianNLLLoss(full=True)(o[:, :1], y, o[:, 1:2].exp()), lambda: [numbers(1)]),
    "GaussianNLLLoss, small": (lambda o, y: nn.GaussianNLLLoss(eps=1.0)(o, y, o[:, 0].sigmoid()), lambda: [numbers(3)]),
    "KLDivLoss": (lambda o, y: nn.KLDivLoss(reduction="batchmean")(o.log_softmax(1), y), lambda: [numbers(3).softmax(1)]),
    "BCELoss": (lambda o, y: nn.BCELoss()(o.sigmoid(), y), lambda: [bits(3)]),
    "BCEWithLogitsLoss": (nn.BCEWithLogitsLoss(pos_weight=torch.tensor([1.0, 2.0, 3.0]).double()), lambda: [bits(3)]),
    "MarginRankingLoss": (lambda o, y: nn.MarginRankingLoss(0.1)(o[:, :1], o[:, 1:2], y), lambda: [signs(1)]),
    "HingeEmbeddingLoss": (nn.HingeEmbeddingLoss(), lambda: [signs(3)]),
    "MultiLabelMarginLoss": (nn.MultiLabelMarginLoss(), lambda: [torch.tensor([[0, 2, -1]] * COUNT)]),
    "MultiLabelSoftMarginLoss": (nn.MultiLabelSoftMarginLoss(), lambda: [bits(3)]),
    "MultiMarginLoss": (nn.MultiMarginLoss(), lambda: [classes()]),
    "SoftMarginLoss": (nn.SoftMarginLoss(), lambda: [signs(3)]),
    "CosineEmbeddingLoss": (lambda o, x, y: nn.CosineEmbeddingLoss(0.1)(o, x, y), lambda: [numbers(3), signs()]),
    "TripletMarginLoss": (lambda o, a, b: nn.TripletMarginLoss()(o, a, b), lambda: [numbers(3), numbers(3)]),
    "TripletMarginWithDistanceLoss": (
        lambda o, a, b: nn.TripletMarginWithDistanceLoss()(o, a, b),
        lambda: [numbers(3), numbers(3)],
    ),
    "CTCLoss": (
        lambda o, y, n, m: nn.CTCLoss(blank=2)(o.reshape(1, 1, 3).expand(5, 1, 3).cumsum(0).log_softmax(2), y, n, m),
        lambda: [torch.randint(2, (COUNT, 2)), torch.tensor([5, 4, 5, 3]), torch.tensor([2, 1, 0, 2])],
    ),
}
LOSSES_OF_PYTORCH = {name for name in dir(nn) if name.endswith("Loss") and isinstance(getattr(nn, name), type)}
LEFT_OUT = {
    "AdaptiveLogSoftmaxWithLoss": "a layer with parameters",
    "LinearCrossEntropyLoss": "a layer with parameters",
    "NLLLoss2d": "another name of NLLLoss",
}


def test_no_loss_of_pytorch_is_forgotten():
    assert {name.partition(",")[0] for name in LOSSES} == LOSSES_OF_PYTORCH - LEFT_OUT.keys()


def one_by_one(model, criterion, x, targets):
    rows = []
    for i in range(COUNT):
        loss = criterion(model(x[i : i + 1]), *[target[i : i + 1] for target in targets])
        rows.append(torch.autograd.grad(loss.reshape(()), list(model.parameters())))
    return [torch.stack(column) for column in zip(*rows, strict=True)]


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_as_it_is(name):
    torch.manual_seed(0)
    criterion, make = LOSSES[name]
    model, x, targets = nn.Linear(4, 3).double(), numbers(4), make()
    found = per_example.gradients(model, criterion, targets=len(targets), compile=False)(x, *targets)
    assert_close(list(found.values()), one_by_one(model, criterion, x, targets))
    assert any(value.abs().sum() > 0 for value in found.values())


CTC = [(6, 3, 3, 6), (6, 3, 2, 5), (6, 3, 0, 6), (4, 3, 3, 4), (1, 1, 1, 1), (5, 0, 0, 5), (8, 3, 3, 8)]


@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize("sizes", CTC, ids=str)
def test_ctc_has_the_values_and_the_gradients_of_pytorch(sizes, normalised):
    length, labels, count, read = sizes
    torch.manual_seed(0)
    for reduction in ("mean", "sum", "none"):
        logs = torch.randn(length, 1, 5, dtype=torch.float64)
        logs = (logs.log_softmax(-1) if normalised else logs).requires_grad_()
        args = logs, torch.randint(1, 3, (1, labels)), torch.tensor([read]), torch.tensor([count]), 0, reduction, True
        ours, theirs = ctc_loss(*args), functional.ctc_loss(*args)
        assert_close(ours, theirs)
        grads = [torch.autograd.grad(loss.sum(), logs)[0] for loss in (ours, theirs)]
        assert_close(*grads)


def test_ctc_without_a_way_is_infinite_and_has_no_gradient():
    logs = torch.zeros(2, 1, 3, dtype=torch.float64, requires_grad=True)
    args = logs, torch.tensor([[1, 1]]), (2,), (2,), 0, "sum"
    loss = ctc_loss(*args)
    assert loss == functional.ctc_loss(*args) == torch.inf
    assert torch.autograd.grad(loss, logs)[0].isnan().all()
    kept = ctc_loss(*args, zero_infinity=True)
    assert kept == 0 and not torch.autograd.grad(kept, logs)[0].any()


def test_a_negative_variance_is_nan():
    found = per_example.gradients(
        nn.Linear(1, 1).double(), lambda o, y: functional.gaussian_nll_loss(o, y, y), compile=False
    )(torch.ones(2, 1).double(), torch.tensor([[1.0], [-1.0]]).double())["bias"]
    assert found.isnan().flatten().tolist() == [False, True]
