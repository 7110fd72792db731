"""BatchNorm and its like, and modules that write into their buffers."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.per_example import loop
from tests.per_example.models import Case
from tests.per_example.together import assert_close
from torchbatch import per_example, vmap
from torchbatch.errors import AxisError, AxisSpecError, FallbackWarning, GradientTypeError, InPlaceError


def _network(norm: nn.Module | None = None) -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 4, 2), norm or nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)
    return nn.Sequential(*layers).double()


BATCH = torch.randn(4, 1, 3, 3, dtype=torch.float64), torch.tensor([0, 2, 1, 1])
WAYS_OUT = (
    " in training mode. There are three ways out: eval mode (model.eval(), or of these layers only), which takes the running "
    "statistics; per_example.replace_batch_norm(model), a copy with GroupNorm in their place; or "
    'batch_norm="per_example", which normalises each example by statistics of its own.'
)


def _refused(model, *batch, **options):
    with pytest.raises(AxisError) as error:
        per_example.norms(model, F.cross_entropy, **options)(*(batch or BATCH))
    return str(error.value)


def test_batch_norm_is_refused_by_name_with_three_ways_out():
    assert _refused(_network()) == (
        "norms: an example has no gradient of its own where layers take statistics over the batch, as 1 (BatchNorm2d)" + WAYS_OUT
    )


@pytest.mark.parametrize(
    ("norm", "named"),
    [
        (nn.SyncBatchNorm(4), "as 1 (SyncBatchNorm) in"),
        (nn.InstanceNorm2d(4, track_running_stats=True), "as 1 (InstanceNorm2d) in"),
        (nn.Sequential(nn.BatchNorm2d(4), nn.BatchNorm2d(4)), "as 1.0 (BatchNorm2d) and 1.1 (BatchNorm2d) in"),
        (nn.BatchNorm2d(4, track_running_stats=False).eval(), "as 1 (BatchNorm2d) in"),
        (nn.Sequential(*[nn.BatchNorm2d(4) for _ in range(7)]), "1.3 (BatchNorm2d) and 3 others in"),
    ],
)
def test_all_that_take_statistics_over_the_batch_are_named(norm, named):
    assert named in _refused(_network(norm))


def test_a_module_that_is_a_batch_norm():
    assert "as the module (BatchNorm1d) in" in _refused(nn.BatchNorm1d(3), torch.randn(2, 3), torch.tensor([0, 1]))


def test_eval_mode_of_these_layers_is_enough():
    model = _network()
    model[1].eval()
    case = Case(model, F.cross_entropy, BATCH)
    found = per_example.gradients(model, F.cross_entropy, compile=False)(*BATCH)
    assert_close(found, loop.gradients(case), 1e-10)


def test_instance_norm_without_statistics_is_no_matter():
    case = Case(_network(nn.InstanceNorm2d(4, affine=True)), F.cross_entropy, BATCH)
    assert_close(per_example.gradients(case.model, F.cross_entropy, compile=False)(*BATCH), loop.gradients(case), 1e-10)


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(4), nn.InstanceNorm2d(4, track_running_stats=True, affine=True)])
def test_statistics_of_each_example(norm, recwarn):
    model = _network(norm)
    before = copy.deepcopy(model.state_dict())
    found = per_example.gradients(model, F.cross_entropy, batch_norm="per_example", compile=False)(*BATCH)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    expected = loop.gradients(Case(model, F.cross_entropy, BATCH))  # in training mode the module does so with a batch of one
    assert_close(found, expected, 1e-10)
    assert not [each for each in recwarn if issubclass(each.category, FallbackWarning)]


def test_statistics_of_each_example_in_a_transform():
    model = _network()
    found = per_example.norms(model, F.cross_entropy, batch_norm="per_example", compile=False)
    stacked = vmap(found)(BATCH[0][None], BATCH[1][None])
    assert_close(stacked[0], found(*BATCH), 1e-10)


def test_the_option_is_checked():
    with pytest.raises(AxisSpecError, match=r'^norms: batch_norm must be None or "per_example", but it is \'own\' of type str.$'):
        per_example.norms(_network(), F.cross_entropy, batch_norm="own")
    with pytest.raises(AxisSpecError, match="criterion, adapter and batch_norm go with a module"):
        per_example.norms(lambda w, x: w @ x, batch_norm="per_example")


def test_replacing_batch_norm():
    model = _network()
    model[1].weight.data.uniform_()
    model[1].eps = 0.1
    made = per_example.replace_batch_norm(model, groups=6)
    assert isinstance(model[1], nn.BatchNorm2d), "the module itself is left as it is"
    assert isinstance(made[1], nn.GroupNorm) and made[1].num_groups == 2 and made[1].eps == 0.1
    assert torch.equal(made[1].weight, model[1].weight) and made[1].weight is not model[1].weight
    assert {name for name, _ in made.named_parameters()} == {name for name, _ in model.named_parameters()}
    found = per_example.gradients(made, F.cross_entropy, compile=False)(*BATCH)
    assert_close(found, loop.gradients(Case(made, F.cross_entropy, BATCH)), 1e-10)


def test_replacing_keeps_what_is_shared_frozen_and_without_weights():
    shared = nn.BatchNorm1d(4, affine=False).eval()
    model = nn.Sequential(shared, nn.Sequential(shared), nn.BatchNorm1d(3))
    model[2].weight.requires_grad_(False)
    made = per_example.replace_batch_norm(model, groups=4)
    assert made[0] is made[1][0] and not made[0].affine and not made[0].training and made[0].num_groups == 4
    assert not made[2].weight.requires_grad and made[2].bias.requires_grad and made[2].num_groups == 1
    assert isinstance(per_example.replace_batch_norm(nn.BatchNorm3d(4)), nn.GroupNorm)


def test_what_cannot_be_replaced():
    class Activated(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x).relu()

    with pytest.raises(GradientTypeError, match=r"^replace_batch_norm: 0 is a Activated, a kind of BatchNorm with a forward of"):
        per_example.replace_batch_norm(nn.Sequential(Activated(4)))
    for groups in (0, True, 2.0):
        with pytest.raises(AxisSpecError, match="groups must be a positive int"):
            per_example.replace_batch_norm(_network(), groups=groups)


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.linear = nn.Linear(2, 2)

    def forward(self, x):
        if self.training:
            self.calls += 1
        return self.linear(x) * (1 + 0 * self.calls)


def test_a_buffer_that_is_written_to_is_named():
    model, batch = nn.Sequential(Counting()), (torch.randn(3, 2), torch.randn(3, 2))
    with pytest.raises(InPlaceError) as error:
        per_example.norms(model, F.mse_loss, compile=False)(*batch)
    assert str(error.value) == (
        "Sequential: the buffer 0.calls of Counting is written to in the forward pass, and each example would have to see what "
        "the others wrote. Put that module into eval mode, if it then leaves the buffer alone, or write to it outside of the "
        "forward pass."
    )
    assert model[0].calls == 0
    model.eval()
    found = per_example.gradients(model, F.mse_loss, compile=False)(*batch)
    assert_close(found, loop.gradients(Case(model, F.mse_loss, batch)), 1e-5)


def test_spectral_norm_in_training_mode_is_an_error_and_in_eval_mode_none():
    model = nn.utils.parametrizations.spectral_norm(nn.Linear(3, 2))
    with pytest.raises(InPlaceError, match=r"the buffer parametrizations.weight.0._u of _SpectralNorm is written to"):
        per_example.norms(model, F.mse_loss, compile=False)(torch.randn(3, 3), torch.randn(3, 2))


def test_a_lazy_module():
    with pytest.raises(GradientTypeError, match=r"^norms: the parameter weight has no shape yet. Call the module once on a"):
        per_example.norms(nn.LazyLinear(2), F.mse_loss)(torch.randn(3, 3), torch.randn(3, 2))


def test_a_scripted_module():
    with pytest.raises(GradientTypeError, match=r"^norms: RecursiveScriptModule is TorchScript, which cannot be traced."):
        per_example.norms(torch.jit.script(nn.Linear(3, 2)), F.mse_loss)(torch.randn(3, 3), torch.randn(3, 2))


class Causal(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True)
        self.encoder, self.out = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=x.dtype)
        return self.out(self.encoder(x, mask=mask)[:, -1])


def test_a_transformer_does_not_ask_whether_its_mask_is_causal():
    torch.manual_seed(0)
    model, batch = Causal().double(), (torch.randn(3, 4, 4, dtype=torch.float64), torch.tensor([0, 2, 1]))
    found = per_example.gradients(model, F.cross_entropy, compile=False)(*batch)
    assert_close(found, loop.gradients(Case(model, F.cross_entropy, batch)), 1e-10)


def test_statistics_of_a_single_number():
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    with pytest.raises(AxisError, match=r"a layer sees a single number for each channel of it, as the shape \(1, 2\) has"):
        per_example.norms(model, F.mse_loss, batch_norm="per_example")(torch.randn(3, 3), torch.randn(3, 2))


def test_statistics_of_each_example_in_half_precision():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(1, 2, 2), nn.BatchNorm1d(2, affine=False), nn.Flatten()).bfloat16()
    batch = torch.randn(3, 1, 6).bfloat16(), torch.randn(3, 10).bfloat16()
    found = per_example.gradients(model, F.mse_loss, batch_norm="per_example", compile=False)(*batch)
    assert_close(found, loop.gradients(Case(model, F.mse_loss, batch)), 3e-2)
