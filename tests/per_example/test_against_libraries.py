"""The same numbers as Opacus and BackPACK give, for models that they know."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from torchbatch import per_example
from torchbatch.testing import assert_close

BOUND = 0.5


class Attention(nn.Module):
    """Layers that Opacus knows, put together so that each is used for several tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.norm = nn.Embedding(11, 8), nn.LayerNorm(8)
        self.qkv, self.head = nn.Linear(8, 24), nn.Linear(8, 3)

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.norm(self.words(words))).chunk(3, -1)
        return self.head(F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0].mean(1))


def _models() -> dict[str, tuple[nn.Module, torch.Tensor]]:
    torch.manual_seed(0)
    cnn = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.ReLU(), nn.Conv2d(4, 3, 3, stride=2), nn.Flatten(), nn.Linear(12, 3)
    )
    return {
        "dense": (nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)), torch.randn(4, 5)),
        "convolutions": (cnn, torch.randn(4, 2, 6, 6)),
        "attention": (Attention(), torch.randint(11, (4, 5))),
    }


MODELS = _models()
TARGETS = torch.tensor([0, 2, 1, 1])


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.filterwarnings("ignore")
def test_against_opacus(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    flags: Any = torch.backends.flags_frozen
    monkeypatch.setitem(flags.__globals__, "__allow_nonbracketed_mutation_flag", True)  # Opacus sets one, other tests freeze them
    modules: Any = pytest.importorskip("opacus.grad_sample")
    model, x = MODELS[name]
    known = modules.GradSampleModule(copy.deepcopy(model), loss_reduction="sum")
    F.cross_entropy(known(x), TARGETS, reduction="sum").backward()
    expected = {name: value.grad_sample for name, value in known._module.named_parameters()}
    found = per_example.gradients(model, F.cross_entropy, compile=False)(x, TARGETS)
    assert_close(found, expected)
    norms = sum(value.flatten(1).square().sum(1) for value in expected.values()).sqrt()  # type: ignore[union-attr]
    assert_close(per_example.norms(model, F.cross_entropy, compile=False)(x, TARGETS), norms)
    factor = (BOUND / norms).clamp(max=1)
    clipped = {name: torch.einsum("b,b...->...", factor, value) for name, value in expected.items()}
    run = per_example.clipped_sum(model, F.cross_entropy, max_norm=BOUND, compile=False)
    assert_close(run(x, TARGETS), clipped)


@pytest.mark.parametrize("name", ["dense"])
@pytest.mark.filterwarnings("ignore")
def test_against_backpack(name: str) -> None:
    library: Any = pytest.importorskip("backpack")
    extensions: Any = pytest.importorskip("backpack.extensions")
    model, x = MODELS[name]
    known, loss = library.extend(copy.deepcopy(model)), library.extend(nn.CrossEntropyLoss(reduction="sum"))
    with library.backpack(extensions.BatchGrad(), extensions.BatchL2Grad()):
        loss(known(x), TARGETS).backward()
    expected = {name: value.grad_batch for name, value in known.named_parameters()}
    assert_close(per_example.gradients(model, F.cross_entropy, compile=False)(x, TARGETS), expected)
    squares = {name: value.batch_l2.sqrt() for name, value in known.named_parameters()}
    found = per_example.norms(model, F.cross_entropy, per="parameter", compile=False)(x, TARGETS)
    assert_close(found, squares)
