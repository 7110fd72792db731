"""Per-example gradients, their lengths, the clipping, and the training that uses them."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from torchbatch.demo import data, training
from torchbatch.demo.main import new_model
from torchbatch.demo.model import loss_of, parameters, probabilities
from torchbatch.testing import assert_close


@pytest.fixture(scope="module")
def digits():
    return data.load()[:40]


def generator():
    return torch.Generator().manual_seed(0)


def test_the_model_is_small_and_does_not_mix_images(digits):
    model = new_model(0)
    assert 10_000 <= sum(parameter.numel() for parameter in model.parameters()) <= 20_000
    one_by_one = torch.cat([probabilities(model, image[None]) for image in digits.images])
    assert_close(probabilities(model, digits.images), one_by_one)
    assert_close(one_by_one.sum(dim=1), torch.ones(40))


def test_the_loss_of_one_image_is_cross_entropy(digits):
    model = new_model(0)
    found = loss_of(model)(parameters(model), digits.images[0], digits.labels[0])
    assert_close(found, F.cross_entropy(model(digits.images[:1]), digits.labels[:1]))


def test_new_models_follow_the_seed_and_leave_the_callers_random_numbers_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, again, other = new_model(0), new_model(0), new_model(1)
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(first[0].weight, again[0].weight)
    assert not torch.equal(first[0].weight, other[0].weight)


def test_the_mean_of_the_gradients_is_the_gradient_of_the_mean(digits):
    model = new_model(0)
    gradients = training.per_example_gradients(loss_of(model))(parameters(model), digits.images, digits.labels)
    F.cross_entropy(model(digits.images), digits.labels).backward()
    for name, parameter in model.named_parameters():
        assert gradients[name].shape == (40, *parameter.shape)
        assert_close(gradients[name].mean(dim=0), parameter.grad, atol=1e-6, rtol=1e-4)


def test_norms_run_over_all_parameters():
    gradients = {"a": torch.tensor([[3.0, 0.0], [0.0, 0.0]]), "b": torch.tensor([[[4.0]], [[2.0]]])}
    assert training.norms(gradients).tolist() == [5.0, 2.0]


def test_only_long_gradients_are_cut():
    gradients = {"a": torch.tensor([[3.0], [0.5], [0.0]]), "b": torch.tensor([[4.0], [0.0], [0.0]])}
    mean, lengths = training.clipped_mean(gradients, max_norm=1.0)
    assert lengths.tolist() == [5.0, 0.5, 0.0]
    assert_close(mean["a"], torch.tensor([(0.6 + 0.5) / 3]))
    assert_close(mean["b"], torch.tensor([0.8 / 3]))


@pytest.mark.parametrize(("images", "batch_size", "steps"), [(64, 64, 1), (65, 64, 2), (1437, 64, 23), (1, 8, 1)])
def test_steps_per_epoch(images, batch_size, steps):
    assert training.steps_per_epoch(images, batch_size) == steps


def test_training_takes_the_promised_steps_and_lowers_the_loss(digits):
    model = new_model(0)
    before = F.cross_entropy(model(digits.images), digits.labels)
    steps = list(training.train(model, digits, epochs=15, batch_size=16, max_norm=1.0, generator=generator()))
    assert [step.epoch for step in steps] == [epoch for epoch in range(15) for _ in range(3)]
    assert all(0 <= step.clipped <= 1 for step in steps)
    assert F.cross_entropy(model(digits.images), digits.labels) < before / 2


def test_a_gradient_cut_to_nothing_teaches_nothing(digits):
    """Under a tiny bound the optimiser's epsilon is larger than any gradient."""
    model = new_model(0)
    before = {name: value.clone() for name, value in parameters(model).items()}
    list(training.train(model, digits, epochs=1, batch_size=40, max_norm=1e-20, generator=generator()))
    for name, value in parameters(model).items():
        assert_close(value, before[name], atol=1e-9, rtol=0)


def test_gradient_norms_do_not_depend_on_the_batch_size(digits):
    model = new_model(0)
    whole = training.gradient_norms(model, digits)
    assert_close(training.gradient_norms(model, digits, batch_size=7), whole)
    leaves = list(model.parameters())
    loss = F.cross_entropy(model(digits.images[:1]), digits.labels[:1])
    gradient = torch.cat([part.flatten() for part in torch.autograd.grad(loss, leaves)])
    assert_close(whole[0], gradient.norm())
