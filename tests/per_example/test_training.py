"""Gradients by name in ordinary training loops, and ordinary backward passes that leave gradients of each example."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.per_example import loop, models
from tests.per_example.small import batch, mlp
from torchbatch import per_example, tree
from torchbatch.errors import (
    AxisError,
    AxisSpecError,
    GradientTypeError,
    GradientValueError,
    InPlaceError,
    InputTypeError,
    OutputTypeError,
    UnsupportedOperationError,
)
from torchbatch.testing import assert_close

accumulate_, grad_samples = per_example.accumulate_, per_example.grad_samples


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def one_by_one(model, x, y):
    """The gradients of each example's loss, by one backward pass for each."""
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    rows = []
    for i in range(len(x)):
        loss = F.cross_entropy(model(x[i : i + 1]), y[i : i + 1])
        rows.append(torch.autograd.grad(loss, list(trained.values())))
    return {name: torch.stack(column) for name, column in zip(trained, zip(*rows, strict=True), strict=True)}


def samples(model):
    return {name: value.grad_sample for name, value in model.named_parameters() if value.requires_grad}


def assert_equal(found, wanted, tolerance=1e-12):
    assert found.keys() == wanted.keys()
    for name in wanted:
        assert_close(found[name], wanted[name], rtol=tolerance, atol=tolerance)


def grads(model):
    return {name: value.grad for name, value in model.named_parameters()}


# --- accumulate_: the same training as with backward -----------------------------------------------------------------

OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01),
}


def mean(model, x, y):
    return {name: value.mean(0) for name, value in one_by_one(model, x, y).items()}


def twins():
    model = mlp()
    return model, copy.deepcopy(model)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_and_schedulers_go_the_same_way_as_after_backward(name):
    ours, theirs = twins()
    optimizers = [OPTIMIZERS[name](model.parameters()) for model in (ours, theirs)]
    schedulers = [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5) for optimizer in optimizers]
    for _ in range(4):
        x, y = batch()
        found = mean(ours, x, y)
        for optimizer in optimizers:
            optimizer.zero_grad()
        accumulate_(ours, found)
        F.cross_entropy(theirs(x), y).backward()
        assert_equal(grads(ours), grads(theirs))
        for step in (*optimizers, *schedulers):
            step.step()
    assert_equal(dict(ours.named_parameters()), dict(theirs.named_parameters()))


def test_batches_add_up():
    ours, theirs = twins()
    for x, y in (batch(6), batch(4)):
        accumulate_(ours, mean(ours, x, y), scale=torch.tensor(0.5))
        (F.cross_entropy(theirs(x), y) / 2).backward()
    assert_equal(grads(ours), grads(theirs))


def test_it_adds_to_what_backward_left():
    model, (x, y) = mlp(), batch()
    F.cross_entropy(model(x), y).backward()
    before = {name: value.clone() for name, value in grads(model).items()}
    kept = grads(model)
    accumulate_(model, before)
    assert_equal(grads(model), {name: 2 * value for name, value in before.items()})
    assert all(grads(model)[name] is kept[name] for name in kept)  # in place, so what looks at .grad sees it


@pytest.mark.parametrize("overflow", [False, True])
def test_a_grad_scaler_unscales_and_skips(overflow):
    ours, theirs = twins()
    before = {name: value.clone() for name, value in ours.state_dict().items()}
    x, y = batch()
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in (ours, theirs)]
    scalers = [torch.amp.GradScaler("cpu", init_scale=1024.0) for _ in range(2)]
    found = mean(ours, x, y)
    if overflow:
        found["0.weight"][0, 0] = torch.inf
    accumulate_(ours, found, scale=scalers[0].scale(torch.ones(())))
    scalers[1].scale(F.cross_entropy(theirs(x), y)).backward()
    if not overflow:
        assert_equal(grads(ours), grads(theirs))
    for scaler, optimizer in zip(scalers, optimizers, strict=True):
        scaler.step(optimizer)
        scaler.update()
    wanted = before if overflow else theirs.state_dict()
    assert_equal(dict(ours.state_dict()), dict(wanted))
    assert scalers[0].get_scale() == (512 if overflow else 1024)


def test_what_is_given_stays_what_it_is():
    model = mlp()
    given = {name: torch.ones_like(value) for name, value in model.named_parameters()}
    accumulate_(model, given)
    accumulate_(model, given)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    assert all(torch.equal(value, torch.ones_like(value)) for value in given.values())
    assert not any(value.grad.requires_grad for value in model.parameters())


def test_a_history_is_cut_off():
    model = nn.Linear(2, 1, bias=False)
    model.weight.grad = (torch.ones(1, 2, requires_grad=True) * 2).clone()
    accumulate_(model, {"weight": torch.ones(1, 2, requires_grad=True) * 3})
    assert torch.equal(model.weight.grad, torch.full((1, 2), 5.0)) and not model.weight.grad.requires_grad


def test_frozen_tied_complex_half_and_sparse_parameters():
    model = nn.Module()
    model.a = model.b = nn.Parameter(torch.zeros(2, dtype=torch.complex64))
    model.c = nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))
    model.d = nn.Parameter(torch.zeros(2), requires_grad=False)
    model.e = nn.Parameter(torch.zeros(3, 2))
    model.e.grad = torch.ones(3, 2).to_sparse()
    accumulate_(model, {"a": torch.tensor([1j, 2]), "c": torch.ones(2).bfloat16(), "e": torch.ones(3, 2)}, scale=2)
    assert model.b.grad.tolist() == [2j, 4] and model.c.grad.tolist() == [2, 2] and model.d.grad is None
    assert model.c.grad.dtype is torch.bfloat16 and model.e.grad.to_dense().tolist() == [[3, 3]] * 3


def linear(**changes):
    wanted = {"weight": torch.zeros(1, 2), "bias": torch.zeros(1)}
    return {name: value for name, value in {**wanted, **changes}.items() if value is not None}


LINEAR_ERRORS = {
    "no module": (lambda: (nn.functional, {}), InputTypeError, "accumulate_: model must be a torch.nn.Module, but it is <module"),
    "no dict": (lambda: (nn.Linear(2, 1), [1]), InputTypeError, "must be a dict of tensors by parameter names, but it is [1]"),
    "no tensor": (
        lambda: (nn.Linear(2, 1), linear(bias=3)),
        InputTypeError,
        "the gradient of 'bias' must be a tensor, but it is 3 of type int",
    ),
    "unknown": (
        lambda: (nn.Linear(2, 1), linear(wight=torch.zeros(1))),
        GradientValueError,
        "Linear has no parameter 'wight'. It has 'weight', 'bias'.",
    ),
    "missing": (
        lambda: (nn.Linear(2, 1), linear(bias=None)),
        GradientValueError,
        "grads has nothing for 'bias'. Give a gradient for each parameter that is trained (zeros, if that is meant), or freeze",
    ),
    "frozen": (
        lambda: (nn.Linear(2, 1).requires_grad_(False), linear()),
        GradientValueError,
        "there is a gradient for 'weight', which is frozen. Leave it out, or train it: requires_grad_(True).",
    ),
    "shape": (
        lambda: (nn.Linear(2, 1), linear(weight=torch.zeros(2, 1))),
        GradientValueError,
        "'weight' is float32[1,2], but its gradient is float32[2,1].",
    ),
    "of examples": (
        lambda: (nn.Linear(2, 1), linear(weight=torch.zeros(7, 1, 2))),
        GradientValueError,
        "its gradient is float32[7,1,2]. It looks like the gradients of single examples: take their sum or their mean.",
    ),
    "dtype": (
        lambda: (nn.Linear(2, 1), linear(weight=torch.zeros(1, 2).double())),
        GradientTypeError,
        "'weight' is float32[1,2] on cpu, but its gradient is float64[1,2] on cpu. Convert it: value.to(parameter).",
    ),
    "device": (
        lambda: (nn.Linear(2, 1), linear(weight=torch.zeros(1, 2, device="meta"))),
        GradientTypeError,
        "its gradient is float32[1,2] on meta",
    ),
}


@pytest.mark.parametrize("case", LINEAR_ERRORS)
def test_errors_of_accumulate(case):
    make, error, text = LINEAR_ERRORS[case]
    model, given = make()
    with pytest.raises(error) as caught:
        accumulate_(model, given)
    assert text in str(caught.value)
    if isinstance(model, nn.Module):
        assert all(value.grad is None for value in model.parameters())  # all or nothing


@pytest.mark.parametrize("scale", ["1", True, None, torch.ones(2), torch.ones((), dtype=torch.int64)])
def test_scale_is_a_number(scale):
    with pytest.raises(AxisSpecError, match="accumulate_: scale must be a number, or a tensor of one, but it is "):
        accumulate_(nn.Linear(2, 1), linear(), scale=scale)


def test_the_other_name_of_a_tied_parameter():
    model = nn.Module()
    model.a = model.b = nn.Parameter(torch.zeros(2))
    text = "'b' is another name of the parameter 'a', which the model has under both. Give it as 'a'."
    with pytest.raises(GradientValueError) as caught:
        accumulate_(model, {"b": torch.zeros(2)})
    assert text in str(caught.value)


# --- grad_samples ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_gradients_of_each_example_and_of_all(reduction):
    model, (x, y) = mlp(), batch()
    wanted = one_by_one(model, x, y)
    with grad_samples(model, reduction) as same:
        assert same is model
        F.cross_entropy(model(x), y, reduction=reduction).backward()
    assert_equal(samples(model), wanted)
    assert_equal(grads(model), {name: getattr(value, reduction)(0) for name, value in wanted.items()})


#: Families that cannot be done this way, and what is said of them.
REFUSED = {
    "checkpoint_of_torch": ((GradientValueError, RuntimeError), "per_example.gradients|vmap support"),  # torch 2.11 has its own
    "checkpoint_of_torchbatch": (GradientValueError, "per_example.gradients"),
    "output_with_a_loss": (OutputTypeError, "into which torchbatch cannot look"),
    "loss_with_weight_decay": (AxisError, "take the loss outside of the model"),
    "energies_that_differentiate_inside": (UnsupportedOperationError, "do not work inside a mapped function"),
}


def family(name):
    case = models.build(name)
    adapter = case.options.get("adapter")
    inputs, targets = adapter(*case.batch) if adapter else loop._split(case)
    return case, inputs, () if targets is None else targets if isinstance(targets, tuple) else (targets,)


def called(model, inputs):
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def summed_loss(case, inputs, targets, count):
    """What a loss with ``reduction="sum"`` would be, for criteria that take batches of one."""
    output = called(case.model, inputs)
    rows = [tree.map(lambda leaf, i=i: leaf[i : i + 1], (output, targets)) for i in range(count)]
    return sum(case.criterion(row, *labels).reshape(()) for row, labels in rows)


@pytest.mark.parametrize("name", [name for name in models.FAMILIES if name not in REFUSED])
def test_every_family(name):
    case, inputs, targets = family(name)
    wanted = loop.gradients(case)
    with grad_samples(case.model, "sum"):
        summed_loss(case, inputs, targets, len(next(iter(wanted.values())))).backward()
    found = {name: torch.zeros_like(wanted[name]) if value is None else value for name, value in samples(case.model).items()}
    assert_equal(found, wanted, case.tolerance)


@pytest.mark.parametrize("name", REFUSED)
def test_what_it_refuses(name):
    case, inputs, _ = family(name)
    error, text = REFUSED[name]
    with pytest.raises(error, match=text), grad_samples(case.model, "sum"):
        called(case.model, inputs).sum().backward()


def normalised():
    layers = nn.Conv2d(1, 4, 2), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)
    return nn.Sequential(*layers).double(), torch.randn(4, 1, 3, 3, dtype=torch.float64), torch.tensor([0, 2, 1, 1])


def test_batch_norm_is_refused_in_training_mode():
    model, x, y = normalised()
    with grad_samples(model):
        with pytest.raises(AxisError, match=r"^grad_samples: an example has no gradient of its own .*, as 1 \(BatchNorm2d\) in"):
            model(x)
        with torch.no_grad():
            model(x)
        model[1].eval()
        wanted = one_by_one(copy.deepcopy(model), x, y)
        F.cross_entropy(model(x), y).backward()
    assert_equal(samples(model), wanted)


def test_batch_norm_with_statistics_of_each_example():
    model, x, y = normalised()
    wanted = one_by_one(copy.deepcopy(model), x, y)  # in training mode, with a batch of one
    before = copy.deepcopy(model.state_dict())
    with grad_samples(model, batch_norm="per_example"):
        F.cross_entropy(model(x), y).backward()
    assert_equal(samples(model), wanted, 1e-10)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_buffer_that_is_written_to_is_refused():
    model = models.Function(lambda m, x: m.layer(x) + m.seen.add_(1), layer=nn.Linear(2, 2), seen=torch.zeros(()))
    with pytest.raises(InPlaceError, match="grad_samples: the buffer seen of Function is written to"), grad_samples(model):
        model(torch.ones(3, 2))
    assert model.seen == 0


class Pair(nn.Module):
    """Takes and gives tensors in dicts and tuples, beside other things."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3, dtype=torch.float64)

    def forward(self, x, factor=1.0, *, more=None, word="", flag=None):
        assert isinstance(word, str) and flag is None
        out = self.layer(x["a"]) * factor + self.layer(more[0])
        return {"out": out, "both": (out * 2, None), "word": word, "count": 3}


def test_dicts_tuples_and_what_is_no_tensor():
    model, (x, y) = Pair(), batch()
    other = batch()[0]
    wanted = []
    for i in range(6):
        loss = F.cross_entropy(model({"a": x[i : i + 1]}, torch.tensor(2.0), more=[other[i : i + 1]])["both"][0], y[i : i + 1])
        wanted.append(torch.autograd.grad(loss, model.layer.weight)[0])
    plain = model({"a": x}, torch.tensor(2.0), more=[other], word="w")
    with grad_samples(model):
        out = model({"a": x}, torch.tensor(2.0), more=[other], word="w")
        F.cross_entropy(out["both"][0], y).backward()
    assert (out.pop("word"), out.pop("count"), out["both"][1]) == (plain.pop("word"), plain.pop("count"), plain["both"][1])
    assert_close([out["out"], out["both"][0]], [plain["out"], plain["both"][0]])
    assert_close(model.layer.weight.grad_sample, torch.stack(wanted))


def test_frozen_parameters_have_none_and_tied_ones_have_one():
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Linear(4, 3)).double()
    model[2].weight = model[0].weight
    model[3].requires_grad_(False)
    x, y = batch()
    wanted = one_by_one(model, x, y)
    with grad_samples(model):
        F.cross_entropy(model(x), y).backward()
    assert_equal(samples(model), wanted)
    assert model[3].weight.grad_sample is None and model[3].weight.grad is None


def test_a_step_of_training_by_hand():
    """The way of an Opacus loop: clip what is there, sum, step."""
    model, (x, y) = mlp(), batch()
    wanted = per_example.clipped_sum(model, F.cross_entropy, max_norm=0.1, compile=False)(x, y)
    with grad_samples(model):
        F.cross_entropy(model(x), y).backward()
    lengths = sum(value.grad_sample.flatten(1).square().sum(1) for value in model.parameters()).sqrt()
    weights = (0.1 / lengths).clamp(max=1)
    assert_equal({name: torch.tensordot(weights, value, 1) for name, value in samples(model).items()}, wanted)


# --- grad_samples: several calls -------------------------------------------------------------------------------------


def test_calls_before_one_backward_add_up():
    model, (x, y), (other, _) = mlp(), batch(), batch()
    rows = []
    for i in range(6):
        loss = F.cross_entropy(model(x[i : i + 1]) + model(other[i : i + 1]), y[i : i + 1])
        rows.append(torch.autograd.grad(loss, model[0].weight)[0])
    with grad_samples(model):
        F.cross_entropy(model(x) + model(other), y).backward()
    assert_close(model[0].weight.grad_sample, torch.stack(rows))


def test_after_a_backward_pass_it_starts_anew_and_grad_does_not():
    model, first, second = mlp(), batch(6), batch(3)
    with grad_samples(model):
        F.cross_entropy(model(first[0]), first[1]).backward()
        F.cross_entropy(model(second[0]), second[1]).backward()
    assert_equal(samples(model), one_by_one(model, *second))
    wanted = {name: value.mean(0) for name, value in one_by_one(model, *first).items()}
    wanted = {name: wanted[name] + value.mean(0) for name, value in one_by_one(model, *second).items()}
    assert_equal(grads(model), wanted)


def test_two_backward_passes_of_one_call_add_up():
    model, (x, y) = mlp(), batch()
    with grad_samples(model):
        out = model(x)
        F.cross_entropy(out, y).backward(retain_graph=True)
        F.cross_entropy(out, y).backward()
    assert_equal(samples(model), {name: 2 * value for name, value in one_by_one(model, x, y).items()})


def test_batches_of_two_sizes_do_not_add_up():
    model = mlp()
    with pytest.raises(AxisError, match=r"batches of \d and of \d examples before one"), grad_samples(model):
        (model(batch(6)[0]).sum() + model(batch(4)[0]).sum()).backward()


def test_a_parameter_that_is_not_used_this_time_keeps_nothing():
    class Either(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 1), nn.Linear(4, 1)

        def forward(self, x, which):
            return getattr(self, which)(x)

    model, x = Either(), torch.randn(3, 4)
    with grad_samples(model):
        model(x, "a").sum().backward()
        model(x, "b").sum().backward()
    assert model.a.weight.grad_sample is None and model.b.weight.grad_sample.shape == (3, 1, 4)


def test_an_empty_batch():
    model = mlp()
    with grad_samples(model, "sum"):
        F.cross_entropy(model(torch.zeros(0, 4).double()), torch.zeros(0, dtype=torch.int64), reduction="sum").backward()
    assert model[0].weight.grad_sample.shape == (0, 5, 4) and not model[0].weight.grad.any()


def test_dropout_has_a_mask_for_each_example():
    model = nn.Sequential(nn.Linear(1, 64), nn.Dropout(0.5))
    with grad_samples(model, "sum"):
        out = model(torch.ones(4, 1))
        out.sum().backward()
    masks = model[0].bias.grad_sample
    assert set(masks.flatten().tolist()) == {0.0, 2.0} and len({tuple(row.tolist()) for row in masks}) == 4
    assert_close((out != 0).float() * 2, masks)


def test_gradients_flow_on_to_what_comes_before():
    model, (x, y) = mlp(), batch()
    x.requires_grad_()
    (wanted,) = torch.autograd.grad(F.cross_entropy(model(x), y), x)
    with grad_samples(model):
        F.cross_entropy(model(x), y).backward()
    assert_close(x.grad, wanted)


# --- grad_samples: the model stays what it is ------------------------------------------------------------------------


def as_it_is(model):
    hooks = [len(module._forward_pre_hooks) for module in model.modules()]
    return set(vars(model)), list(model.state_dict()), hooks, [name for name, _ in model.named_modules()]


def test_the_model_stays_what_it_is():
    model, (x, y) = mlp(), batch()
    before = as_it_is(model)
    with grad_samples(model):
        assert list(model.state_dict()) == before[1] and [name for name, _ in model.named_modules()] == before[3]
        F.cross_entropy(model(x), y).backward()
    assert as_it_is(model) == before
    pickle.loads(pickle.dumps(model))
    model.zero_grad()
    F.cross_entropy(model(x), y).backward()
    assert_equal(grads(model), {name: value.mean(0) for name, value in one_by_one(model, x, y).items()})


def test_after_an_exception_too():
    model = mlp()
    before = as_it_is(model)
    with pytest.raises(RuntimeError), grad_samples(model):
        model(torch.zeros(3, 7).double())
    assert as_it_is(model) == before
    with grad_samples(model):  # and it can be used again
        model(batch()[0]).sum().backward()


def test_a_forward_of_the_instance_comes_back():
    model = nn.Linear(2, 1)
    model.forward = own = lambda x: F.linear(x, model.weight) * 3
    with grad_samples(model, "sum"):
        model(torch.ones(2, 2)).sum().backward()
    assert model.forward is own and model.weight.grad_sample.tolist() == [[[3.0, 3.0]]] * 2


def test_hooks_of_the_model_run_once_for_the_batch():
    model, seen = mlp(), []
    model.register_forward_hook(lambda module, args, out: seen.append(tuple(out.shape)))
    with grad_samples(model):
        model(batch()[0]).sum().backward()
    assert seen == [(6, 3)]


def test_a_copy_that_is_made_meanwhile_is_a_model_like_any_other():
    model, (x, y) = mlp(), batch()
    with grad_samples(model):
        twin = copy.deepcopy(model)
        twin[0].weight.data += 1
        F.cross_entropy(twin(x), y).backward()
    reference = mlp()
    reference.load_state_dict(twin.state_dict())
    F.cross_entropy(reference(x), y).backward()
    assert_equal(grads(twin), grads(reference))
    assert model[0].weight.grad_sample is None and not hasattr(twin[0].weight, "grad_sample")


def test_without_gradients_the_model_is_called_as_ever():
    model, (x, _) = mlp(), batch()
    with grad_samples(model), torch.no_grad():
        assert torch.equal(model(x), model(x)) and not model(x).requires_grad
        assert model[0](x).shape == (6, 5)
    assert model[0].weight.grad_sample is None


def test_a_part_called_by_itself_is_refused():
    model, (x, _) = mlp(), batch()
    text = "a part of Sequential, Linear, is called outside of a call of the whole"
    with pytest.raises(GradientValueError, match=text), grad_samples(model):
        model[0](x)
    model[0](x)


def test_nested_uses_are_refused():
    model = nn.Sequential(mlp(), nn.Linear(3, 3).double())
    for outer, inner in ((model, model), (model, model[0]), (model[0], model)):
        with grad_samples(outer), pytest.raises(AxisSpecError, match="in such a context already"), grad_samples(inner):
            pass
    with grad_samples(model[0]), grad_samples(model[1]):
        model(batch()[0]).sum().backward()
    assert model[0][0].weight.grad_sample.shape == (6, 5, 4) and model[1].weight.grad_sample.shape == (6, 3, 3)


ERRORS = {
    "no module": (lambda: grad_samples(torch.sin), InputTypeError, "model must be a torch.nn.Module, but it is <built-in"),
    "reduction": (lambda: grad_samples(mlp(), "none"), AxisSpecError, """must be "mean" or "sum", but it is 'none'"""),
    "batch_norm": (lambda: grad_samples(mlp(), batch_norm="own"), AxisSpecError, 'batch_norm must be None or "per_example"'),
    "frozen": (
        lambda: grad_samples(mlp().requires_grad_(False)),
        GradientTypeError,
        "there are no parameters to differentiate by: all are frozen, or there are none",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_before_it_begins(case):
    make, error, text = ERRORS[case]
    with pytest.raises(error) as caught, make():
        pass
    assert text in str(caught.value)


CALL_ERRORS = {
    "sizes": (
        Pair(),
        lambda m: m({"a": torch.ones(3, 4)}, more=[torch.ones(2, 4)]),
        AxisError,
        "args[0]['a'] has 3 examples along its first axis, but kwargs['more'][0] is float32[2,4]. What all examples share",
    ),
    "no tensor": (Pair(), lambda m: m(3, torch.ones(())), InputTypeError, "no input of the model is a tensor with an axis"),
    "output": (
        nn.LSTM(2, 3, num_layers=2, batch_first=True),
        lambda m: m(torch.ones(4, 5, 2)),
        AxisError,
        "for a batch of one example, output[1][0] is float32[2,1,3], which has no first axis of length 1",
    ),
    "a number": (
        models.Function(lambda m, x: m.layer(x).sum(), layer=nn.Linear(2, 2)),
        lambda m: m(torch.ones(4, 2)),
        AxisError,
        "output is float32[], which has no first axis of length 1. Outputs must have the examples along their first axis",
    ),
}


@pytest.mark.parametrize("case", CALL_ERRORS)
def test_errors_of_a_call(case):
    model, call, error, text = CALL_ERRORS[case]
    with pytest.raises(error) as caught, grad_samples(model), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        call(model)
    assert text in str(caught.value)
