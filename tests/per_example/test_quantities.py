"""Random models, batches and chunks: every quantity is what its definition makes of the gradients of the loop."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from tests.conftest import LONG
from tests.per_example import loop
from tests.per_example.models import FAMILIES, Case, build
from tests.per_example.together import DIRECTIONS, assert_close, by_definition, quantities, together
from torchbatch import per_example, random

COUNTS = 1, 2, 5


@st.composite
def _cases(draw):
    """A small network on vectors, pictures or tokens."""
    kind = draw(st.sampled_from(["mlp", "conv", "tokens"]))
    torch.manual_seed(draw(st.integers(0, 99)))
    width, count, classes = draw(st.integers(1, 7)), draw(st.sampled_from(COUNTS)), draw(st.integers(2, 5))
    bias, bend = draw(st.booleans()), draw(st.sampled_from([nn.Tanh, nn.GELU, nn.SiLU]))
    labels = torch.randint(classes, (count,))
    if kind == "mlp":
        inside = draw(st.integers(1, 6))
        body, given = nn.Linear(inside, width, bias=bias), torch.randn(count, inside)
        after = width
    elif kind == "conv":
        kernel, stride, padding = draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.integers(0, 2))
        body = nn.Conv1d(2, width, kernel, stride=stride, padding=padding, bias=bias)
        given = torch.randn(count, 2, 5)
        after = body(given).flatten(1).shape[1]
    else:
        vocabulary, length = draw(st.integers(3, 40)), draw(st.integers(1, 5))
        body, given = nn.Embedding(vocabulary, width), torch.randint(3, (count, length))
        after = width * length
    model = nn.Sequential(body, bend(), nn.Flatten(), nn.Linear(after, classes)).double()
    if draw(st.booleans()):
        model[3].bias.requires_grad_(False)
    return Case(model, F.cross_entropy, (given.double() if kind != "tokens" else given, labels))


@given(case=_cases(), chunk_size=st.sampled_from([None, None, 1, 2, 3]), max_norm=st.sampled_from([0.1, 1.0, 100.0]))
def _test_random(case, chunk_size, max_norm):
    parts = quantities(max_norm)
    del parts["project"], parts["gram"]  # drawn for each parameter, and of one chunk
    if len(case.batch[1]) < 2:
        del parts["variance"], parts["noise_scale"]
    expected = by_definition(loop.gradients(case), max_norm)
    found, _ = together(case, parts, compile=False, chunk_size=chunk_size)
    for key, value in found.items():
        assert_close(value, expected[key], 1e-9, key)


def test_random_models(ways):
    ways["eager"].examples(5)(_test_random)()


PUBLIC = {
    "norms": (per_example.norms, {}),
    "norms per parameter": (per_example.norms, {"per": "parameter"}),
    "flat": (per_example.clipped_sum, {"max_norm": 0.7}),
    "per_parameter": (per_example.clipped_sum, {"max_norm": 0.7, "clipping": "per_parameter"}),
    "automatic": (per_example.clipped_sum, {"max_norm": 0.7, "clipping": "automatic"}),
    "sum": (per_example.sum, {}),
    "fisher_diag": (per_example.fisher_diag, {}),
    "variance": (per_example.variance, {}),
    "noise_scale": (per_example.noise_scale, {}),
    "gram": (per_example.gram, {}),
    "project": (per_example.project, {"key": random.key(3), "size": DIRECTIONS}),
}


@pytest.mark.parametrize("name", PUBLIC)
def test_the_public_functions_in_chunks(name):
    case = build("language_model_with_tied_weights")
    expected = by_definition(loop.gradients(case), 0.7)[name]
    quantity, options = PUBLIC[name]
    run = quantity(case.model, case.criterion, chunk_size=2, compile=False, **options)
    assert_close(run(*case.batch), expected, 1e-10)


@pytest.mark.parametrize("name", FAMILIES if LONG else ["raw_parameters"])
def test_directions(name):
    case = build(name)
    if case.tolerance > 1e-4 or name in ("complex_parameters", "encoder_in_eval_mode_with_a_new_head"):
        pytest.skip("rounding, or products that are complex")
    gradients = loop.gradients(case)
    torch.manual_seed(1)
    v = {key: torch.randn_like(value[0]) for key, value in gradients.items()}
    flat, direction = loop.flat(gradients), loop.flat({key: value[None] for key, value in v.items()})[0]
    found = per_example.dot(case.model, case.criterion, v=v, compile=False)(*case.batch)
    assert_close(found, flat @ direction, 1e-10)
    found = per_example.cosine(case.model, case.criterion, v=v, compile=False)(*case.batch)
    assert_close(found, flat @ direction / (flat.norm(dim=1) * direction.norm()), 1e-10)


@pytest.mark.parametrize("name", ["language_model_with_tied_weights", *(["cnn", "transformer_encoder", "lstm"] if LONG else [])])
def test_compiled(name):
    case = build(name)
    expected = by_definition(loop.gradients(case), 0.7)
    found = per_example.clipped_sum(case.model, case.criterion, max_norm=0.7, compile=True)(*case.batch)
    assert_close(found, expected["flat"], 1e-10)


def test_a_batch_without_examples():
    case = build("mlp")
    x, y = case.batch[0][:0], case.batch[1][:0]
    assert per_example.norms(case.model, case.criterion, compile=False)(x, y).shape == (0,)
    for name, value in per_example.gradients(case.model, case.criterion, compile=False)(x, y).items():
        assert value.shape == (0, *case.model.get_parameter(name).shape)
    for name, value in per_example.clipped_sum(case.model, case.criterion, compile=False)(x, y).items():
        assert torch.equal(value, torch.zeros_like(case.model.get_parameter(name)))


def test_gram_of_two_batches():
    case = build("vision_transformer")
    gradients = loop.flat(loop.gradients(case))
    other = tuple(value[:2] for value in case.batch)
    found = per_example.gram(case.model, case.criterion, other=other, chunk_size=2, compile=False)(*case.batch)
    assert_close(found, gradients @ gradients[:2].T, 1e-10)


def test_there_are_enough_families():
    assert len(FAMILIES) > 50
