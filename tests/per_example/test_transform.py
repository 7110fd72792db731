"""Chunks, memory, compilation, options: what all quantities of per_example have in common."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import torchbatch
from torchbatch import per_example
from torchbatch.errors import AxisError, AxisSpecError, CompilerError, GradientTypeError, GradientValueError, InputTypeError
from torchbatch.per_example import memory
from torchbatch.per_example.transform import PerExample
from torchbatch.testing import assert_close

x, y = torch.randn(7, 3, dtype=torch.float64), torch.tensor([0, 1, 1, 0, 1, 0, 0])
EAGER: Any = {"compile": False}


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def by_loop(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
    named = dict(model.named_parameters())
    losses = [F.cross_entropy(model(a[None]), b[None]) for a, b in zip(x, y, strict=True)]
    each = [torch.autograd.grad(value, list(named.values())) for value in losses]
    return {name: torch.stack(found) for name, found in zip(named, zip(*each, strict=True), strict=True)}


def flat(found: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([value.flatten(1) for value in found.values()], 1)


@pytest.mark.parametrize("size", [1, 3, 7, 20, "auto"])
def test_the_chunk_size_changes_nothing(model: nn.Module, size: Any) -> None:
    expected = flat(by_loop(model, x, y))
    options: Any = {"chunk_size": size, **EAGER}
    norms = per_example.norms(model, F.cross_entropy, **options)(x, y)
    assert_close(norms, expected.norm(dim=1))
    mean = per_example.mean(model, F.cross_entropy, **options)(x, y)
    assert_close(torch.cat([value.flatten() for value in mean.values()]), expected.mean(0))
    spread = per_example.variance(model, F.cross_entropy, **options)(x, y)
    assert_close(torch.cat([value.flatten() for value in spread.values()]), expected.var(0))
    others: Any = (x[:4], y[:4])
    gram = per_example.gram(model, F.cross_entropy, other=others, **options)(x, y)
    assert_close(gram, expected @ expected[:4].T)


def test_a_budget_decides_how_many_fit(model: nn.Module) -> None:
    wide = nn.Linear(100, 100)
    many, targets = torch.randn(64, 100), torch.randn(64, 100)
    run = per_example.gradients(wide, F.mse_loss, chunk_size="auto", memory=8 * 100 * 101 * 4, compile=False)
    found = run(many, targets)
    (size,) = run._sizes.values()
    assert 1 <= size <= 8
    whole = per_example.gradients(wide, F.mse_loss, compile=False)(many, targets)
    assert_close(found, whole)


def test_chunks_are_about_equal() -> None:
    assert memory.fitting(lambda count: 100 + 10 * count, 100, 100 + 10 * 60) == 50
    assert memory.fitting(lambda count: 100 + 10 * count, 100, 10) == 1
    assert memory.fitting(lambda count: 100 + 10 * count, 100, 10**9) == 100
    assert memory.fitting(lambda count: 100 + 10 * count, 0, 10**9) == 1


def test_there_is_memory() -> None:
    assert memory.free(torch.device("cpu")) > 10**6


def test_out_of_memory_is_tried_again_with_half(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    run = per_example.norms(model, F.cross_entropy, **EAGER)
    sizes, real = [], PerExample._run

    def scarce(self: Any, backend: str, *arguments: Any) -> Any:
        sizes.append(len(arguments[4]))
        if sizes[-1] > 2:
            raise torch.OutOfMemoryError("no memory")
        return real(self, backend, *arguments)

    monkeypatch.setattr(PerExample, "_run", scarce)
    with pytest.warns(RuntimeWarning, match="norms: out of memory with 7 examples at a time; trying 3"):
        found = run(x, y)
    assert sizes == [7, 3, 1, 1, 1, 1, 1, 1, 1]
    assert_close(found, flat(by_loop(model, x, y)).norm(dim=1))


def test_out_of_memory_with_one_example_is_an_error(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    def scarce(*_: Any) -> Any:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(PerExample, "_run", scarce)
    with pytest.warns(RuntimeWarning), pytest.raises(torch.OutOfMemoryError):
        per_example.norms(model, F.cross_entropy, **EAGER)(x, y)


def test_a_long_run_shows_its_progress(model: nn.Module, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    pytest.importorskip("tqdm")
    monkeypatch.setattr(memory, "_LONG", 0.0)
    monkeypatch.setattr(memory, "fitting", lambda *_: 2)
    per_example.norms(model, F.cross_entropy, chunk_size="auto", **EAGER)(x, y)
    assert "norms" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "tqdm", None)
    per_example.norms(model, F.cross_entropy, chunk_size="auto", **EAGER)(x, y)
    assert not capsys.readouterr().err


def test_it_is_compiled_for_the_second_call(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    used, real = [], PerExample._run

    def noted(self: Any, backend: str, *arguments: Any) -> Any:
        used.append(backend)
        return real(self, "eager", *arguments)

    monkeypatch.setattr(PerExample, "_run", noted)
    run = per_example.norms(model, F.cross_entropy)
    for batch in (x, x, x[:3], x):
        run(batch, y[: len(batch)])
    assert used == ["eager", "inductor", "eager", "inductor"]
    per_example.norms(model, F.cross_entropy, compile=True)(x, y)
    assert used.pop() == "inductor"


def test_without_a_compiler_it_runs_uncompiled(model: nn.Module) -> None:
    run = per_example.norms(model, F.cross_entropy)
    expected = run(x, y)

    def failing(*_: Any) -> Any:
        raise CompilerError("no compiler here")

    run._runs["inductor"] = failing  # type: ignore[assignment]
    with pytest.warns(RuntimeWarning, match="norms runs uncompiled, since the compiler failed: no compiler here"):
        assert_close(run(x, y), expected)
    assert_close(run(x, y), expected)
    strict = per_example.norms(model, F.cross_entropy, compile=True)
    strict._runs["inductor"] = failing  # type: ignore[assignment]
    with pytest.raises(CompilerError):
        strict(x, y)


def test_compiled_it_gives_the_same(model: nn.Module) -> None:
    clipped = per_example.clipped_sum(model, F.cross_entropy, max_norm=0.3, compile=True, chunk_size=4)(x, y)
    assert_close(clipped, per_example.clipped_sum(model, F.cross_entropy, max_norm=0.3, **EAGER)(x, y))


def test_parameters_that_changed_are_seen(model: nn.Module) -> None:
    run = per_example.norms(model, F.cross_entropy, **EAGER)
    run(x, y)
    with torch.no_grad():
        for value in model.parameters():
            value.mul_(2)
    assert_close(run(x, y), flat(by_loop(model, x, y)).norm(dim=1))


def test_a_batch_without_examples(model: nn.Module) -> None:
    none: Any = (x[:0], y[:0])
    assert per_example.norms(model, F.cross_entropy, **EAGER)(*none).shape == (0,)
    assert per_example.gradients(model, F.cross_entropy, **EAGER)(*none)["0.weight"].shape == (0, 4, 3)
    assert per_example.gram(model, F.cross_entropy, other=(x, y), **EAGER)(*none).shape == (0, 7)
    assert per_example.gram(model, F.cross_entropy, **EAGER)(*none).shape == (0, 0)
    for value in per_example.clipped_sum(model, F.cross_entropy, **EAGER)(*none).values():
        assert not value.any() and not value.isnan().any()
    for name in ("mean", "clipped_mean", "fisher_diag", "variance", "noise_scale"):
        with pytest.raises(AxisError, match=f"{name}: "):
            getattr(per_example, name)(model, F.cross_entropy, **EAGER)(*none)


def loss(w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return (w @ x).tanh()


def test_inside_jit_it_is_part_of_the_graph() -> None:
    w, xs = torch.randn(3), torch.randn(5, 3)
    expected = per_example.norms(loss, **EAGER)(w, xs)
    inside = torchbatch.jit(lambda w, xs: per_example.norms(loss)(w, xs) * 2, backend="eager")
    assert_close(inside(w, xs), expected * 2)


def test_inside_vmap_and_grad() -> None:
    w, xs = torch.randn(4, 3), torch.randn(5, 3)
    expected = torch.stack([per_example.norms(loss, **EAGER)(one, xs) for one in w])
    assert_close(torchbatch.vmap(lambda one: per_example.norms(loss)(one, xs))(w), expected)
    slope = torchbatch.grad(lambda one: per_example.norms(loss)(one, xs).sum())(w[0])
    direct = torchbatch.grad(lambda one: torchbatch.vmap(torchbatch.grad(loss), (None, 0))(one, xs).norm(dim=1).sum())(w[0])
    assert_close(slope, direct)


def test_explain_says_what_is_done_with_each_parameter(model: nn.Module) -> None:
    lines = per_example.norms(model, F.cross_entropy).explain(x, y).splitlines()
    assert [line.split()[0] for line in lines] == sorted(dict(model.named_parameters()))
    assert lines[0].endswith("made for each example: it is a vector")
    assert lines[1].endswith("never made: its norm and its sum come from the factors of its product")
    v = dict(model.named_parameters())
    assert "forward-mode" in per_example.dot(model, F.cross_entropy, v=v).explain(x, y)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"chunk": 3}, "norms has no option 'chunk'. Its options are targets, adapter, "),
        ({"chunk_size": 0}, 'norms: chunk_size must be a positive int, "auto" or None, but it is 0'),
        ({"chunk_size": True}, 'norms: chunk_size must be a positive int, "auto" or None, but it is True'),
        ({"memory": 10}, 'norms: memory is the number of bytes to be filled with chunk_size="auto", but it is 10'),
        ({"compile": "yes"}, "norms: compile must be True, False or \"auto\", but it is 'yes'"),
        ({"targets": -1}, "norms: targets counts the arguments that are targets, but it is -1"),
        ({"per": "row"}, "norms: per must be None, \"parameter\" or \"layer\", but it is 'row'"),
    ],
)
def test_wrong_options(model: nn.Module, options: Any, text: str) -> None:
    with pytest.raises(AxisSpecError) as error:
        per_example.norms(model, F.cross_entropy, **options)
    assert text in str(error.value)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"max_norm": 0.0}, "clipped_sum: max_norm must be a number above 0, but it is 0.0"),
        ({"max_norm": {"w": 1.0}}, "clipped_sum: max_norm must be a number above 0, but it is"),
        ({"clipping": "hard"}, 'clipping must be "flat", "per_layer", "per_parameter" or "automatic", but it is \'hard\''),
        ({"gamma": -1}, "clipped_sum: gamma must be a number above 0, but it is -1"),
    ],
)
def test_wrong_clipping(model: nn.Module, options: Any, text: str) -> None:
    with pytest.raises(AxisSpecError) as error:
        per_example.clipped_sum(model, F.cross_entropy, **options)
    assert text in str(error.value)


def test_a_bound_for_each_parameter(model: nn.Module) -> None:
    bounds = {name: 0.1 + i for i, name in enumerate(dict(model.named_parameters()))}
    run: Any = {"max_norm": bounds, "clipping": "per_parameter", **EAGER}
    found = per_example.clipped_sum(model, F.cross_entropy, **run)(x, y)
    for name, each in by_loop(model, x, y).items():
        factor = (bounds[name] / each.flatten(1).norm(dim=1)).clamp(max=1)
        assert_close(found[name], torch.einsum("b,b...->...", factor, each))
    with pytest.raises(AxisSpecError, match=r"such a number for each parameter \(0.bias, 0.weight, 2.bias, 2.weight\)"):
        per_example.clipped_sum(model, F.cross_entropy, max_norm={"0.bias": 1.0}, clipping="per_parameter", **EAGER)(x, y)


class _HookIfTrained(nn.Module):
    """Changes the gradient, where there will be one."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.dense(x)
        if h.requires_grad:
            h.register_hook(lambda cotangent: cotangent * 2)
        return h.sum(1)


def test_a_hook_that_only_a_backward_pass_has_counts_in_products_too() -> None:
    model, inputs = _HookIfTrained(), torch.randn(4, 3)
    v = {name: torch.ones_like(value) for name, value in model.named_parameters()}
    options: Any = {"targets": 0, **EAGER}
    found = per_example.gradients(model, torch.Tensor.sum, **options)(inputs)
    assert_close(found["dense.bias"], torch.full((4, 2), 2.0))
    wanted = sum(value.flatten(1).sum(1) for value in found.values())
    assert_close(per_example.dot(model, torch.Tensor.sum, v=v, **options)(inputs), wanted)


def test_a_bound_for_each_layer(model: nn.Module) -> None:
    bounds, run = {"0": 0.1, "2": 0.3}, {"clipping": "per_layer", **EAGER}
    found = per_example.clipped_sum(model, F.cross_entropy, max_norm=bounds, **run)(x, y)
    alike = per_example.clipped_sum(model, F.cross_entropy, max_norm=0.5, **run)(x, y)
    gradients = by_loop(model, x, y)
    for layer, bound in bounds.items():
        names = [f"{layer}.weight", f"{layer}.bias"]
        norms = torch.cat([gradients[name].flatten(1) for name in names], 1).norm(dim=1)
        for name in names:
            for clipped, limit in ((found, bound), (alike, 0.5 / 2**0.5)):
                wanted = torch.einsum("b,b...->...", (limit / norms).clamp(max=1), gradients[name])
                assert_close(clipped[name], wanted)
    with pytest.raises(AxisSpecError, match=r"such a number for each layer \(0, 2\), but it is"):
        per_example.clipped_sum(model, F.cross_entropy, max_norm={"0": 1.0}, **run)(x, y)


def test_layers_of_a_tree_are_its_containers() -> None:
    params = {"a": {"w": torch.full((2,), 3.0), "b": torch.tensor(4.0)}, "c": torch.tensor(5.0)}

    def loss(params: Any, x: torch.Tensor) -> torch.Tensor:
        return (params["a"]["w"] @ x + params["a"]["b"] + params["c"]) * 1.0

    norms = per_example.norms(loss, per="layer", compile=False)(params, torch.tensor([[2.0, 2.0]]))
    assert {name: value.tolist() for name, value in norms.items()} == {"['a']": [3.0], "": [1.0]}


def test_directions_must_fit(model: nn.Module) -> None:
    with pytest.raises(GradientValueError, match=r"dot: v must be a tree like the parameters \(0.bias, 0.weight"):
        per_example.dot(model, F.cross_entropy, v={"w": torch.ones(3)})(x, y)
    wrong = {name: torch.ones(2) for name, _ in model.named_parameters()}
    with pytest.raises(GradientValueError, match=r"cosine: v has .* for 0.bias, where .* is needed"):
        per_example.cosine(model, F.cross_entropy, v=wrong)(x, y)
    with pytest.raises(GradientValueError, match="one row for each direction and then"):
        per_example.project(model, F.cross_entropy, matrix=wrong)(x, y)
    with pytest.raises(AxisSpecError, match="project: give either matrix"):
        per_example.project(model, F.cross_entropy)
    with pytest.raises(AxisSpecError, match="project: size says onto how many directions"):
        per_example.project(model, F.cross_entropy, key=torchbatch.random.key(0))


def test_random_directions_keep_lengths(model: nn.Module) -> None:
    key = torchbatch.random.key(3)
    found = per_example.project(model, F.cross_entropy, key=key, size=2000, **EAGER)(x, y)
    lengths = flat(by_loop(model, x, y)).norm(dim=1)
    assert_close(found.norm(dim=1), lengths, rtol=0.1, atol=0)
    chunked = per_example.project(model, F.cross_entropy, key=key, size=2000, chunk_size=2, **EAGER)(x, y)
    assert_close(chunked, found)


def test_what_is_no_loss() -> None:
    with pytest.raises(InputTypeError, match="norms takes a function"):
        per_example.norms(3)
    with pytest.raises(InputTypeError, match="norms: a function of parameters and an example is called with the parameters"):
        per_example.norms(loss)(torch.ones(3))
    with pytest.raises(GradientTypeError, match="has no gradient"):
        per_example.norms(loss)(torch.ones(3, dtype=torch.int64), x)
    with pytest.raises(GradientTypeError, match="there are no parameters"):
        per_example.norms(nn.Tanh(), F.mse_loss)(x, x)
    with pytest.raises(AxisSpecError, match="criterion, adapter and batch_norm go with a module"):
        per_example.norms(loss, F.mse_loss)
