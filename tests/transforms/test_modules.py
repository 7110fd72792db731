"""``stack_modules``: ensembles equal to their members, and errors that name the outlier."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from torchbatch.errors import AxisError, InputTypeError
from torchbatch.testing import assert_close, loop
from torchbatch.transforms.modules import stack_modules


class Net(nn.Module):
    """Every kind of state: parameters, buffers, a tied weight, a frozen one."""

    def __init__(self, width: int = 4, scale: float = 2.0) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 3))
        self.tied = nn.Linear(3, width, bias=False)
        self.tied.weight = self.inner[0].weight
        self.frozen = nn.Parameter(torch.randn(3), requires_grad=False)
        self.register_buffer("offset", torch.randn(3), persistent=False)
        self.scale = scale

    def forward(self, x: torch.Tensor, *, shift: float = 0.0) -> torch.Tensor:
        return self.inner(x) * self.scale + self.frozen + self.offset + self.tied(x).sum() + shift


def nets(count: int = 3) -> list[Net]:
    torch.manual_seed(0)
    return [Net() for _ in range(count)]


MAPS = [torch.func.vmap, loop]


def ensemble(mapping: Any, apply: Any, params: Any, buffers: Any, x: torch.Tensor) -> torch.Tensor:
    options = {"in_dims": (0, 0, None)} if mapping is torch.func.vmap else {"in_axes": (0, 0, None)}
    return mapping(apply, **options)(params, buffers, x)


@pytest.mark.parametrize("mapping", MAPS)
def test_one_call_equals_the_members(mapping: Any) -> None:
    members = [net.eval() for net in nets()]
    x = torch.randn(5, 3)
    out = ensemble(mapping, *stack_modules(members), x)
    assert_close(out, torch.stack([net(x) for net in members]))


@pytest.mark.parametrize("mapping", MAPS)
def test_gradients_equal_those_of_the_members_and_do_not_reach_them(mapping: Any) -> None:
    members = [net.eval() for net in nets()]
    apply, params, buffers = stack_modules(members)
    x = torch.randn(5, 3)
    ensemble(mapping, apply, params, buffers, x).square().sum().backward()
    assert all(p.grad is None for net in members for p in net.parameters())
    for net in members:
        net(x).square().sum().backward()
    for name, stacked in params.items():
        grads = [dict(net.named_parameters())[name].grad for net in members]
        if stacked.requires_grad:
            assert_close(stacked.grad, torch.stack(grads))
        else:
            assert grads == [None] * 3


@pytest.mark.parametrize("mapping", MAPS)
def test_running_statistics_are_updated_in_place_for_each_member(mapping: Any) -> None:
    members = nets()
    apply, params, buffers = stack_modules(members)
    x = torch.randn(6, 3)
    ensemble(mapping, apply, params, buffers, x)
    for net in members:
        net(x)
    for name, stacked in buffers.items():
        assert_close(stacked, torch.stack([dict(net.named_buffers())[name] for net in members]))


def test_what_comes_back() -> None:
    members = nets(2)
    apply, params, buffers = stack_modules(module for module in members)
    assert "tied.weight" not in params
    assert params["inner.0.weight"].shape == (2, 4, 3)
    assert params["inner.0.weight"].is_leaf
    assert params["inner.0.weight"].requires_grad
    assert not params["frozen"].requires_grad
    assert set(buffers) == {"inner.1.running_mean", "inner.1.running_var", "inner.1.num_batches_tracked", "offset"}
    assert repr(apply) == "<apply of stacked Net>"
    assert apply.__name__ == "Net"
    assert apply.module.tied.weight is apply.module.inner[0].weight
    assert all(tensor.is_meta for tensor in [*apply.module.parameters(), *apply.module.buffers()])
    before = params["frozen"].clone()
    with torch.no_grad():
        members[0].frozen.add_(1)
    assert torch.equal(params["frozen"], before)


def test_keyword_arguments_and_pickling() -> None:
    members = [net.eval() for net in nets(2)]
    apply, params, buffers = stack_modules(members)
    first = ({name: p[0] for name, p in params.items()}, {name: b[0] for name, b in buffers.items()})
    x = torch.randn(2, 3)
    assert_close(apply(*first, x, shift=1.0), members[0](x) + 1)
    assert_close(pickle.loads(pickle.dumps(apply))(*first, x), members[0](x))


def test_parametrized_modules_stack() -> None:
    members = [nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)) for _ in range(2)]
    x = torch.randn(4, 3)
    out = ensemble(loop, *stack_modules(members), x)
    assert_close(out, torch.stack([module(x) for module in members]))


def test_module_list() -> None:
    _, params, buffers = stack_modules(nn.ModuleList([nn.Linear(1, 1)]))
    assert params["weight"].shape == (1, 1, 1)
    assert buffers == {}


# --- errors ----------------------------------------------------------------------------------------------------------


def changed(change: Any) -> list[nn.Module]:
    members: list[nn.Module] = [nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.1)) for _ in range(3)]
    members[2] = change(copy.deepcopy(members[2])) or members[2]
    return members


def with_attribute(name: str, value: Any) -> Any:
    def change(module: Any) -> nn.Module:
        setattr(module[0], name, value)
        return module

    return change


def frozen(module: Any) -> nn.Module:
    module[0].weight.requires_grad_(False)
    return module


def tied(module: Any) -> nn.Module:
    module.append(nn.Linear(2, 2))
    return module


class Silent(nn.Module):
    def __init__(self, text: str) -> None:
        super().__init__()
        self._text = text

    def extra_repr(self) -> str:
        return self._text


DIFFERENCES = {
    "class": (lambda m: nn.Linear(2, 2), "it is of class Linear, not Sequential."),
    "inner class": (lambda m: nn.Sequential(nn.Identity(), m[1]), "it is of class Identity, not Linear at 0."),
    "submodule": (tied, "only one of them has the submodule 2."),
    "mode": (lambda m: m.eval(), "it is in eval mode, not train mode."),
    "setting": (lambda m: nn.Sequential(m[0], nn.Dropout(0.5)), "the attribute 'p' is 0.5, not 0.1 at 1."),
    "shape setting": (lambda m: nn.Sequential(nn.Linear(3, 2), m[1]), "the attribute 'in_features' is 3, not 2 at 0."),
    "attribute": (with_attribute("note", "x"), "only one of them has the attribute 'note' at 0."),
    "no bias": (lambda m: nn.Sequential(nn.Linear(2, 2, bias=False), m[1]), "bias"),
    "dtype": (lambda m: m.double(), "0.weight is float64[2,2], not float32[2,2]."),
    "device": (lambda m: m.to("meta"), "0.weight is on meta, not cpu."),
    "frozen": (frozen, "0.weight does not require a gradient, unlike in module 0."),
}


@pytest.mark.parametrize("name", DIFFERENCES)
def test_names_the_outlier(name: str) -> None:
    change, text = DIFFERENCES[name]
    with pytest.raises(AxisError) as caught:
        stack_modules(changed(change))
    message = str(caught.value)
    assert message.startswith("stack_modules needs modules of one architecture, but module 2 differs from module 0: ")
    assert text in message
    assert message.endswith("Make them agree, or leave it out.")


def test_differences_that_only_some_modules_can_have() -> None:
    class Holder(nn.Module):
        def __init__(self, table: torch.Tensor, shared: bool = False, sizes: tuple[int, ...] = (1, 2)) -> None:
            super().__init__()
            self.table, self.sizes = table, sizes
            self.a = nn.Parameter(torch.ones(2))
            self.b = self.a if shared else nn.Parameter(torch.ones(2))

    one = Holder(torch.ones(2))
    cases = [
        (Holder(torch.zeros(2)), "the attribute 'table' is another tensor; register it as a buffer"),
        (Holder(torch.ones(2), sizes=(1, 3)), r"the attribute 'sizes' is \(1, 3\), not \(1, 2\)"),
        (Holder(torch.ones(2), shared=True), r"its shared parameters are \[\['a', 'b'\]\], not none"),
    ]
    for other, text in cases:
        with pytest.raises(AxisError, match=f"module 1 differs from module 0: {text}"):
            stack_modules([one, other])
    stack_modules([one, Holder(torch.ones(2))])
    with pytest.raises(AxisError, match=r"it is set up as \(b\), not \(a\)"):
        stack_modules([Silent("a"), Silent("b")])
    more = Silent("a")
    more.register_buffer("extra", torch.ones(1))
    with pytest.raises(AxisError, match="only one of them has the parameter or buffer extra"):
        stack_modules([Silent("a"), more])


def test_refuses_what_is_no_list_of_modules() -> None:
    with pytest.raises(InputTypeError, match=r"it got one Linear\. Write stack_modules\(\[m1, m2\]\)"):
        stack_modules(nn.Linear(1, 1))  # type: ignore[arg-type]
    with pytest.raises(InputTypeError, match="number 1 is of type str"):
        stack_modules([nn.Linear(1, 1), "x"])  # type: ignore[list-item]
    with pytest.raises(AxisError, match="at least one module, but the list is empty"):
        stack_modules([])
    with pytest.raises(
        AxisError, match=r"module 0 has the parameter weight, which has no shape yet\. Run the module once"
    ):
        stack_modules([nn.LazyLinear(2)])
