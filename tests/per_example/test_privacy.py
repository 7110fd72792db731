"""Private training: what a step does, which batches there are, and what it costs in privacy."""

from __future__ import annotations

import builtins
import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.per_example.small import batch, mlp
from torchbatch import per_example
from torchbatch.errors import AxisError, AxisSpecError, GradientValueError, InputTypeError
from torchbatch.testing import assert_close

dp_sgd_step, poisson_batches = per_example.dp_sgd_step, per_example.poisson_batches
epsilon, noise_multiplier_for = per_example.epsilon, per_example.noise_multiplier_for


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def made(model, generator=None, **options):
    """A step of plain SGD with rate 1, so that a parameter moves by the gradient."""
    given = {"max_norm": 0.5, "noise_multiplier": 0.0, "expected_batch_size": 5, "compile": False, **options}
    return dp_sgd_step(model, F.cross_entropy, torch.optim.SGD(model.parameters(), lr=1.0), generator=generator, **given)


def gradients(model, x, y):
    """By the loop, ``[B, numbers]``."""
    losses = [F.cross_entropy(model(x[i : i + 1]), y[i : i + 1]) for i in range(len(x))]
    return torch.stack([flat(torch.autograd.grad(loss, list(model.parameters()))) for loss in losses])


def clipped_sum(model, x, y, max_norm):
    found = gradients(model, x, y)
    return (found * (max_norm / found.norm(dim=1, keepdim=True)).clamp(max=1)).sum(0)


def flat(values):
    return torch.cat([value.detach().flatten() for value in values])


def seeded_generator(seed=0):
    return torch.Generator().manual_seed(seed)


# --- a step ----------------------------------------------------------------------------------------------------------


def test_without_noise_it_is_the_clipped_sum_by_the_expected_size():
    model, (x, y) = mlp(), batch()
    before, wanted = flat(model.parameters()), clipped_sum(model, x, y, 0.5) / 5
    assert made(model)(x, y) is None
    assert_close(flat([value.grad for value in model.parameters()]), wanted)
    assert_close(before - flat(model.parameters()), wanted)


def test_steps_follow_each_other_with_batches_of_any_size():
    model = mlp()
    step = made(model)
    assert step.clipped_sum._chunk_size == 11  # 5 and somewhat more, so that most batches are one chunk of one size
    for count in (6, 0, 1, 14):
        (x, y), before = batch(count), flat(model.parameters())
        wanted = clipped_sum(model, x, y, 0.5) / 5 if count else torch.zeros_like(before)
        step(x, y)
        assert_close(before - flat(model.parameters()), wanted)


def test_what_was_in_grad_is_not_used():
    model, (x, y) = nn.Linear(4, 3).double(), batch()
    model.bias.requires_grad_(False)
    for value in model.parameters():
        value.grad = torch.full_like(value, 1e6)
    before = flat(model.parameters())
    made(model)(x, y)
    assert (flat(model.parameters()) - before).norm() < 1 and model.bias.grad is None


def noise_of(model, step, rounds):
    """What steps with empty batches add to the parameters, in units of what they should: ``[rounds, numbers]``."""
    moves = []
    for _ in range(rounds):
        before = flat(model.parameters())
        step(torch.zeros(0, 4, dtype=torch.float64), torch.zeros(0, dtype=torch.int64))
        moves.append(before - flat(model.parameters()))
    return torch.stack(moves) * 5 / step.std


def test_an_empty_batch_gives_pure_noise_of_the_right_size():
    model = mlp()
    step = made(model, seeded_generator(), noise_multiplier=1.3)
    assert step.std == pytest.approx(1.3 * 0.5)
    drawn = noise_of(model, step, 200)  # 200 x 43 numbers
    count = drawn.numel()
    assert abs(drawn.mean()) < 4 / count**0.5
    assert abs(drawn.square().mean() - 1) < 4 * (2 / count) ** 0.5
    assert abs(drawn.pow(4).mean() - 3) < 4 * (96 / count) ** 0.5
    pairs = torch.corrcoef(drawn.T)  # no parameter knows of another
    assert pairs.fill_diagonal_(0).abs().max() < 5 / 200**0.5
    assert abs((drawn[1:] * drawn[:-1]).mean()) < 4 / count**0.5  # and no step of the one before


def test_the_generator_decides_on_the_noise():
    model, generator = nn.Linear(4, 3).double(), torch.Generator()
    start, (x, y) = copy.deepcopy(model.state_dict()), batch()
    steps = {"explicit": made(model, generator, noise_multiplier=1.0), "default": made(model, noise_multiplier=1.0)}

    def trained(which, seed, manual):
        model.load_state_dict(start)
        generator.manual_seed(seed)
        torch.manual_seed(manual)
        for _ in range(2):
            steps[which](x, y)
        return flat(model.parameters())

    assert torch.equal(trained("explicit", 0, 1), trained("explicit", 0, 2))
    assert not torch.isclose(trained("explicit", 0, 1), trained("explicit", 1, 1)).any()
    assert torch.equal(trained("default", 0, 1), trained("default", 1, 1))
    assert not torch.isclose(trained("default", 0, 1), trained("default", 0, 2)).any()


def test_each_step_draws_anew():
    model = mlp()
    drawn = noise_of(model, made(model, seeded_generator(), noise_multiplier=1.0), 2)
    assert not torch.isclose(drawn[0], drawn[1]).any()


def norm(values):
    return flat(values.values()).abs().square().sum().sqrt()


@pytest.mark.parametrize("clipping", ["flat", "per_layer", "per_parameter", "automatic"])
def test_one_example_changes_the_sum_by_no_more_than_the_noise_is_made_for(clipping):
    model, (x, y) = mlp(), batch(8)
    step = made(model, noise_multiplier=1.0, max_norm=0.3, clipping=clipping, gamma=1e-3)
    whole = step.clipped_sum(x * 10, y)
    changes = []
    for i in range(8):
        rest = [j for j in range(8) if j != i]
        fewer = step.clipped_sum(x[rest] * 10, y[rest])
        changes.append(norm({name: whole[name] - fewer[name] for name in whole}))
    assert max(changes) <= step.std * (1 + 1e-9)
    assert max(changes) > 0.9 * step.std  # the bound is not a loose one


def test_a_bound_for_each_parameter():
    model, (x, y) = mlp(), batch(1)
    bounds = {name: 0.1 * (i + 1) for i, (name, _) in enumerate(model.named_parameters())}
    step = made(model, noise_multiplier=2.0, max_norm=bounds, clipping="per_parameter")
    assert step.std == pytest.approx(2 * 0.1 * math.sqrt(1 + 4 + 9 + 16))
    assert norm(step.clipped_sum(x * 1000, y)) <= step.std / 2 * (1 + 1e-9)


def test_complex_and_half_precision_parameters_get_noise_in_all_their_numbers():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.z = nn.Parameter(torch.zeros(2000, dtype=torch.complex128))
            self.h = nn.Parameter(torch.zeros(4000, dtype=torch.bfloat16))

        def forward(self, x):
            return (x * (self.z.abs().sum() + self.h.double().sum()))[:, 0]

    model = Mixed()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    options = {"max_norm": 2.0, "noise_multiplier": 1.5, "expected_batch_size": 1, "compile": False}
    dp_sgd_step(model, None, optimizer, generator=seeded_generator(), **options)(torch.zeros(0, 1, dtype=torch.float64))
    for drawn in (model.z.real, model.z.imag, model.h.double()):
        assert abs(drawn.std() / 3 - 1) < 0.06
    assert model.h.dtype is torch.bfloat16
    assert torch.corrcoef(torch.stack([model.z.real, model.z.imag]).detach())[0, 1].abs() < 0.1


def test_any_optimizer_and_scheduler():
    model, (x, y) = mlp(), batch()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    step = dp_sgd_step(
        model, F.cross_entropy, optimizer, max_norm=1.0, noise_multiplier=0.0, expected_batch_size=6, compile=False, chunk_size=4
    )
    before = F.cross_entropy(model(x), y)
    for _ in range(5):
        step(x, y)
        scheduler.step()
    assert F.cross_entropy(model(x), y) < before and optimizer.param_groups[0]["lr"] == 0.1 / 32


def with_options(**changed):
    model = changed.pop("model", None) or nn.Linear(2, 1)
    optimizer = changed.pop("optimizer", None) or torch.optim.SGD(nn.Module.parameters(model), lr=1.0)
    options = {"max_norm": 1.0, "noise_multiplier": 1.0, "expected_batch_size": 4, **changed}
    return lambda: dp_sgd_step(model, F.mse_loss, optimizer, **options)


STEP_ERRORS = {
    "model": (
        lambda: dp_sgd_step(torch.sin, None, None, max_norm=1, noise_multiplier=1, expected_batch_size=1),
        InputTypeError,
        "dp_sgd_step: model must be a torch.nn.Module, but it is <built-in",
    ),
    "optimizer": (with_options(optimizer="adam"), InputTypeError, "optimizer must be a torch.optim.Optimizer, but it is 'adam'"),
    "noise": (with_options(noise_multiplier=-1), AxisSpecError, "noise_multiplier must be a number 0 or above, but it is -1"),
    "no number": (with_options(noise_multiplier=True), AxisSpecError, "must be a number 0 or above, but it is True"),
    "size": (with_options(expected_batch_size=0), AxisSpecError, "expected_batch_size must be a number above 0, but it is 0"),
    "generator": (with_options(generator=0), AxisSpecError, "generator must be a torch.Generator, but it is 0 of type int"),
    "max_norm": (with_options(max_norm=0), AxisSpecError, "max_norm must be a number above 0, but it is 0"),
    "bounds": (
        with_options(max_norm={"weight": 1.0, "bias": "x"}, clipping="per_parameter"),
        AxisSpecError,
        "dp_sgd_step: max_norm must be a number above 0, or a tree of such numbers, but it is {'weight': 1.0, 'bias': 'x'}",
    ),
    "infinite": (with_options(max_norm=math.inf), AxisSpecError, "max_norm must be a number above 0, or a tree of such numbers"),
    "option": (with_options(chunks=3), AxisSpecError, "has no option 'chunks'"),
    "others": (
        with_options(optimizer=torch.optim.SGD([nn.Parameter(torch.zeros(7))], lr=1.0)),
        GradientValueError,
        "the optimizer has a parameter of shape (7,) (group 0) that Linear does not have, so what it learns would not be private",
    ),
}


@pytest.mark.parametrize("case", STEP_ERRORS)
def test_errors_of_a_step(case):
    make, error, text = STEP_ERRORS[case]
    with pytest.raises(error) as caught:
        make()
    assert text in str(caught.value)


def test_a_group_that_is_added_later_is_seen():
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    step = dp_sgd_step(model, F.mse_loss, optimizer, max_norm=1.0, noise_multiplier=1.0, expected_batch_size=4)
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3))]})
    with pytest.raises(GradientValueError, match=r"parameter of shape \(3,\) \(group 1\)"):
        step(torch.ones(4, 2), torch.ones(4, 1))


# --- batches ---------------------------------------------------------------------------------------------------------


def test_each_example_is_drawn_by_itself():
    drawn = torch.zeros(400, 50)
    for row, numbers in zip(drawn, poisson_batches(50, sample_rate=0.1, steps=400, generator=seeded_generator()), strict=True):
        row[numbers] = 1
        assert numbers.dtype is torch.int64 and (numbers.diff() > 0).all()
    sizes = drawn.sum(1)
    assert abs(sizes.mean() - 5) < 4 * (4.5 / 400) ** 0.5
    assert 3.3 < sizes.var() < 5.9  # 4.5 for independent draws
    assert (drawn.mean(0) - 0.1).abs().max() < 4.5 * (0.09 / 400) ** 0.5
    assert torch.corrcoef(drawn.T).fill_diagonal_(0).abs().max() < 5.5 / 400**0.5


def test_empty_batches_and_full_ones_occur():
    sizes = [len(numbers) for numbers in poisson_batches(3, sample_rate=0.3, steps=100, generator=seeded_generator())]
    assert set(sizes) == {0, 1, 2, 3}
    assert [len(numbers) for numbers in poisson_batches(3, sample_rate=1.0, steps=2)] == [3, 3]
    assert [len(numbers) for numbers in poisson_batches(0, sample_rate=0.5, steps=2)] == [0, 0]


@pytest.mark.parametrize("kind", ["tensor", "tuple", "dict", "nested"])
def test_batches_are_like_the_data(kind):
    x, y = torch.arange(10.0)[:, None], torch.arange(10)
    data = {"tensor": x, "tuple": (x, y), "dict": {"x": x, "y": y}, "nested": ({"x": x}, y)}[kind]
    batches = poisson_batches(data, sample_rate=0.4, steps=20, generator=seeded_generator())
    numbers = poisson_batches(10, sample_rate=0.4, steps=20, generator=seeded_generator())
    assert len(batches) == 20
    for found, chosen in zip(batches, numbers, strict=True):
        wanted = {"tensor": x[chosen], "tuple": (x[chosen], y[chosen]), "dict": {"x": x[chosen], "y": y[chosen]}}
        wanted["nested"] = ({"x": x[chosen]}, y[chosen])
        assert type(found) is type(data)
        assert_close(found, wanted[kind])


def test_each_pass_draws_anew_and_the_generator_decides():
    batches = poisson_batches(20, sample_rate=0.5, steps=3, generator=seeded_generator())
    first, second = [[numbers.tolist() for numbers in batches] for _ in range(2)]
    again = [numbers.tolist() for numbers in poisson_batches(20, sample_rate=0.5, steps=3, generator=seeded_generator())]
    assert first != second and first == again


def test_a_data_loader_takes_them():
    x, y = torch.randn(6, 4), torch.arange(6)
    sampler = poisson_batches(6, sample_rate=0.3, steps=30, generator=seeded_generator())

    def together(rows):
        return torch.utils.data.default_collate(rows) if rows else [x[:0], y[:0]]

    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_sampler=sampler, collate_fn=together)
    sizes = []
    for images, labels in loader:
        assert_close(images, x[labels])
        sizes.append(len(labels))
    assert len(loader) == 30 and 0 in sizes and max(sizes) > 2


BATCH_ERRORS = {
    "rate": (lambda: poisson_batches(3, sample_rate=1.5, steps=1), AxisSpecError, "sample_rate must be a number above 0"),
    "no rate": (lambda: poisson_batches(3, sample_rate=0, steps=1), AxisSpecError, "above 0 and at most 1, but it is 0"),
    "steps": (lambda: poisson_batches(3, sample_rate=1, steps=1.0), AxisSpecError, "must be an int, 0 or above, but it is 1.0"),
    "data": (lambda: poisson_batches("abc", sample_rate=1, steps=1), InputTypeError, "many examples there are, but it is 'abc'"),
    "negative": (lambda: poisson_batches(-3, sample_rate=1, steps=1), AxisError, "there cannot be -3 examples"),
    "sizes": (
        lambda: poisson_batches((torch.ones(3), torch.ones(4)), sample_rate=1, steps=1),
        AxisError,
        "batch[0] has 3 examples along its first axis, but batch[1] has 4",
    ),
}


@pytest.mark.parametrize("case", BATCH_ERRORS)
def test_errors_of_batches(case):
    make, error, text = BATCH_ERRORS[case]
    with pytest.raises(error) as caught:
        make()
    assert text in str(caught.value)


# --- accounting ------------------------------------------------------------------------------------------------------


def normal(x):
    return (1 + math.erf(x / math.sqrt(2))) / 2


def delta_of_all(noise, steps, eps):
    """δ of steps with all examples, exactly: Balle and Wang, "Improving the Gaussian mechanism" (2018)."""
    mu = math.sqrt(steps) / noise
    return normal(mu / 2 - eps / mu) - math.exp(eps) * normal(-mu / 2 - eps / mu)


def delta_of_one(noise, rate, eps):
    """δ of one step with Poisson sampling, exactly: the privacy loss passes ε from one point on."""
    at = noise**2 * math.log((math.exp(eps) - 1 + rate) / rate) + 0.5
    rest = normal(-at / noise)
    return (1 - rate) * rest + rate * normal((1 - at) / noise) - math.exp(eps) * rest


def solved(delta_of, delta):
    low, high = 0.0, 50.0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if delta_of(middle) > delta else (low, middle)
    return high


@pytest.fixture
def opacus():
    return pytest.importorskip("opacus")


@pytest.mark.parametrize(("noise", "steps", "delta"), [(5.0, 10, 1e-5), (1.0, 1, 1e-6), (20.0, 300, 1e-4)])
def test_steps_with_all_examples_are_a_gaussian_mechanism(opacus, noise, steps, delta):
    exact = solved(lambda eps: delta_of_all(noise, steps, eps), delta)
    plan = {"noise_multiplier": noise, "sample_rate": 1, "steps": steps, "delta": delta}
    assert exact <= epsilon(**plan) <= exact + 0.025
    assert exact <= epsilon(**plan, accountant="rdp") <= 1.15 * exact


@pytest.mark.parametrize(("noise", "rate", "delta"), [(1.0, 0.1, 1e-5), (0.6, 0.01, 1e-5), (2.0, 0.5, 1e-4)])
def test_one_step_with_some_examples(opacus, noise, rate, delta):
    exact = solved(lambda eps: delta_of_one(noise, rate, eps), delta)
    plan = {"noise_multiplier": noise, "sample_rate": rate, "steps": 1, "delta": delta}
    assert exact <= epsilon(**plan) <= exact + 0.025
    assert exact <= epsilon(**plan, accountant="rdp")


#: What Google's dp-accounting 0.6.0 finds: by privacy loss distributions, and by Rényi divergences.
GOOGLE = [
    ((1.1, 256 / 60000, 14040, 1e-5), 2.379644, 2.594363),
    ((4.0, 0.01, 10000, 1e-5), 0.946999, 1.035490),
    ((4.0, 0.2, 100, 1e-4), 1.781157, 1.985262),
]


@pytest.mark.parametrize(("plan", "tight", "renyi"), GOOGLE)
def test_another_library_finds_the_same(opacus, plan, tight, renyi):
    noise, rate, steps, delta = plan
    options = {"noise_multiplier": noise, "sample_rate": rate, "steps": steps, "delta": delta}
    assert tight - 1e-4 <= epsilon(**options) <= tight + 0.025
    assert epsilon(**options, accountant="rdp") == pytest.approx(renyi, rel=1e-5)


@pytest.mark.parametrize(("plan", "tight", "renyi"), GOOGLE)
def test_another_library_still_finds_that(plan, tight, renyi):
    google = pytest.importorskip("dp_accounting")
    noise, rate, steps, delta = plan
    event = google.SelfComposedDpEvent(google.PoissonSampledDpEvent(rate, google.GaussianDpEvent(noise)), steps)
    for made, wanted in ((google.pld.PLDAccountant(), tight), (google.rdp.RdpAccountant(), renyi)):
        assert made.compose(event).get_epsilon(delta) == pytest.approx(wanted, rel=1e-3)


@pytest.mark.parametrize(
    ("plan", "published"),
    [
        ((4.0, 0.01, 10000), 1.26),  # Abadi et al. (2016), section 3.2
        ((1.12, 256 / 60000, 60 * 234), 2.92),  # the tutorials of TensorFlow Privacy
        ((1.2, 256 / 60000, 10 * 234), 1.20),
        ((0.6, 256 / 60000, 30 * 234), 9.74),
    ],
)
def test_published_bounds_hold_and_have_become_somewhat_tighter(opacus, plan, published):
    noise, rate, steps = plan
    found = epsilon(noise_multiplier=noise, sample_rate=rate, steps=steps, delta=1e-5, accountant="rdp")
    assert 0.7 * published < found <= published + 0.005


@pytest.mark.parametrize("accountant", ["prv", "rdp"])
@pytest.mark.parametrize(("target", "rate", "steps"), [(2.0, 0.1, 100), (0.5, 0.01, 1000)])
def test_the_noise_for_an_epsilon(opacus, accountant, target, rate, steps):
    plan = {"sample_rate": rate, "steps": steps, "delta": 1e-5, "accountant": accountant}
    noise = noise_multiplier_for(target_epsilon=target, **plan)
    assert 0.97 * target <= epsilon(noise_multiplier=noise, **plan) <= target


def test_no_steps_cost_nothing(opacus):
    assert epsilon(noise_multiplier=1.0, sample_rate=0.1, steps=0, delta=1e-5) == 0


ACCOUNT_ERRORS = {
    "noise": ({"noise_multiplier": 0}, "epsilon: noise_multiplier must be a number above 0, but it is 0"),
    "rate": ({"sample_rate": 2}, "epsilon: sample_rate must be a number above 0 and at most 1, but it is 2"),
    "steps": ({"steps": -1}, "epsilon: steps must be an int, 0 or above, but it is -1"),
    "delta": ({"delta": 1}, "epsilon: delta must be a number between 0 and 1, but it is 1"),
    "accountant": ({"accountant": "gdp"}, "epsilon: accountant must be \"prv\" or \"rdp\", but it is 'gdp'"),
}


@pytest.mark.parametrize("case", ACCOUNT_ERRORS)
def test_errors_of_the_accounting(case):
    changed, text = ACCOUNT_ERRORS[case]
    with pytest.raises(AxisSpecError) as caught:
        epsilon(**{"noise_multiplier": 1.0, "sample_rate": 0.1, "steps": 10, "delta": 1e-5, **changed})
    assert text in str(caught.value)


@pytest.mark.parametrize(
    ("changed", "text"), [({"target_epsilon": 0}, "target_epsilon must be a number above 0"), ({"steps": 0}, "1 or above")]
)
def test_errors_of_the_noise(changed, text):
    with pytest.raises(AxisSpecError, match=text):
        noise_multiplier_for(**{"target_epsilon": 1.0, "sample_rate": 0.1, "steps": 10, "delta": 1e-5, **changed})


def test_an_epsilon_that_cannot_be_had(opacus):
    with pytest.raises(AxisSpecError, match=r"no noise makes 10 steps as private as ε = 0\.001"):
        noise_multiplier_for(target_epsilon=0.001, sample_rate=0.1, steps=10, delta=1e-5)


def test_without_opacus(monkeypatch):
    def find(name, *args, **kwargs):
        if name.startswith("opacus"):
            raise ModuleNotFoundError(name)
        return builtins.__import__(name, *args, **kwargs)

    monkeypatch.setattr("importlib.import_module", find)
    with pytest.raises(ImportError, match=r"per_example.epsilon computes with Opacus, .* pip install 'torchbatch\[privacy\]'"):
        epsilon(noise_multiplier=1.0, sample_rate=0.1, steps=10, delta=1e-5)


# --- next to Opacus --------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
def test_a_step_is_that_of_opacus(opacus):
    ours, (x, y) = mlp(), batch(8)
    theirs = copy.deepcopy(ours)
    optimizer = torch.optim.SGD(theirs.parameters(), lr=1.0)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=8)
    wrapped, private, _ = opacus.PrivacyEngine().make_private(
        module=theirs, optimizer=optimizer, data_loader=loader, noise_multiplier=0.0, max_grad_norm=0.5, poisson_sampling=False
    )
    F.cross_entropy(wrapped(x), y).backward()
    private.step()
    made(ours, expected_batch_size=8)(x, y)
    assert_close(flat(ours.parameters()), flat(theirs.parameters()), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_grad_samples_are_those_of_opacus(opacus, reduction):
    layers = nn.Conv2d(1, 4, 2), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)
    ours = nn.Sequential(*layers).double()
    theirs = opacus.GradSampleModule(copy.deepcopy(ours), loss_reduction=reduction)
    x, y = torch.randn(4, 1, 3, 3, dtype=torch.float64), torch.tensor([0, 2, 1, 1])
    F.cross_entropy(theirs(x), y, reduction=reduction).backward()
    with per_example.grad_samples(ours, reduction):
        F.cross_entropy(ours(x), y, reduction=reduction).backward()
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert_close(mine.grad_sample, other.grad_sample)
        assert_close(mine.grad, other.grad)


# --- all together ----------------------------------------------------------------------------------------------------


def test_it_learns_what_is_easy(opacus):
    """Two clouds of points, apart by more than the noise of training."""
    y = torch.arange(400) % 2
    x = torch.randn(400, 4) + 4 * (2 * y[:, None] - 1)
    model = nn.Linear(4, 2)
    plan = {"sample_rate": 0.25, "steps": 25}
    noise = noise_multiplier_for(target_epsilon=2.0, delta=1e-4, accountant="rdp", **plan)
    step = dp_sgd_step(
        model,
        F.cross_entropy,
        torch.optim.SGD(model.parameters(), lr=1.0),
        max_norm=1.0,
        noise_multiplier=noise,
        expected_batch_size=100,
        generator=seeded_generator(),
        compile=False,
    )
    for drawn in poisson_batches((x, y), **plan, generator=seeded_generator(1)):
        step(*drawn)
    assert (model(x).argmax(1) == y).float().mean() > 0.97
