"""Every family of models, and every quantity, against the loop over examples."""

from __future__ import annotations

import warnings

import pytest

from tests.conftest import LONG
from tests.per_example import loop
from tests.per_example.models import FAMILIES, build
from tests.per_example.together import assert_close, by_definition, quantities, together
from torchbatch.errors import FallbackWarning

MAX_NORM = 0.7
RARELY = {  # what others cover too, if not as a whole
    "mlp_on_tokens", "cnn", "conv1d_dilated", "conv3d", "depthwise_separable", "gru", "rnn", "lstm_with_projection",
    "embedding_with_padding", "embedding_by_frequency", "outer_products_and_blocks", "graph_layer_by_index_add", "buffers",
    "mixture_of_experts", "attention_with_other_widths", "checkpoint_of_torchbatch", "choices_by_example_and_by_parameter",
    "single_precision", "loss_of_shape_one", "output_with_a_loss",
}  # fmt: skip
IN_FULL = ("attention_by_hand", "language_model_with_tied_weights", "reused_layers")
OFTEN = [name for name in FAMILIES if LONG or name not in RARELY]
LOOPING = {"weight_norm_and_others"}  # whose operators have no batching rule in PyTorch, nor here


@pytest.mark.parametrize("name", OFTEN)
def test_family(name):
    case = build(name)
    gradients = loop.gradients(case)
    parts = quantities(MAX_NORM)
    if not (LONG or name in IN_FULL):
        parts = {key: parts[key] for key in ("gradients", "norms", "flat")}
    with warnings.catch_warnings():
        if name not in LOOPING:
            warnings.simplefilter("error", FallbackWarning)
        found, told = together(case, parts, compile=False)
    expected = by_definition(gradients, MAX_NORM)
    for quantity, value in found.items():
        assert_close(value, expected[quantity], case.tolerance, quantity)
    for parameter, value in found["gradients"].items():
        assert value.dtype == gradients[parameter].dtype, parameter
    for parameter in case.products:
        assert not told[parameter].startswith("made for each example: it "), (parameter, told[parameter])
    for parameter, why in case.made.items():
        assert told[parameter].startswith("made for each example: it ") and why in told[parameter], (parameter, told[parameter])
