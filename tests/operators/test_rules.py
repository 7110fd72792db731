"""Operators that PyTorch gives no batching rule have one here: no loop, and the values and gradients of a loop."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from torchbatch import vmap
from torchbatch._torch import batching, repairs, rules
from torchbatch._torch.fallback import fallback
from torchbatch.errors import InPlaceError
from torchbatch.testing import assert_close

REGISTERED = (repairs, rules)
Call = Callable[..., Any]


@pytest.fixture(autouse=True)
def no_loops() -> Iterator[None]:
    torch.manual_seed(0)
    with fallback("error"):
        yield


def loop(call: Call, *args: torch.Tensor) -> Any:
    results = [call(*sample) for sample in zip(*args, strict=True)]
    if isinstance(results[0], torch.Tensor):
        return torch.stack(results)
    return tuple(torch.stack(column) for column in zip(*results, strict=True))


def same_as_loop(call: Call, *args: torch.Tensor, gradient: bool = True) -> None:
    copies = [x.clone() for x in args]
    assert_close(vmap(call)(*[x.clone() for x in args]), loop(call, *copies))
    if gradient:

        def total(x: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
            return call(x, *rest).square().sum()

        def slope(x: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
            leaf = x.clone().requires_grad_()
            return torch.autograd.grad(total(leaf, *rest), leaf)[0]

        assert_close(vmap(torch.func.grad(total))(*args), loop(slope, *args))


IN_PLACE: dict[str, Call] = {
    "addbmm_": lambda x, y: x.addbmm_(y.expand(2, 3, 3), y.expand(2, 3, 3)),
    "addcdiv_": lambda x, y: x.addcdiv_(y, y + 2, value=3),
    "addcmul_": lambda x, y: x.addcmul_(y, y, value=3),
    "addmm_": lambda x, y: x.addmm_(y, y, beta=2),
    "addr_": lambda x, y: x.addr_(y[0], y[1]),
    "clamp_": lambda x, y: x.clamp_(y, y + 0.2),
    "clip_": lambda x, y: x.clip_(0.2, 0.4),
    "cumprod_": lambda x, y: x.cumprod_(0),
    "cumsum_": lambda x, y: x.cumsum_(1),
    "div_ rounding": lambda x, y: x.div_(0.3, rounding_mode="floor"),
    "eq_": lambda x, y: x.eq_(y),
    "floor_divide_": lambda x, y: x.floor_divide_(y + 1),
    "fmod_": lambda x, y: x.fmod_(y + 1),
    "gt_": lambda x, y: x.gt_(0.5),
    "hypot_": lambda x, y: x.hypot_(y),
    "index_copy_": lambda x, y: x.index_copy_(0, torch.tensor([2, 0]), y[:2]),
    "index_reduce_": lambda x, y: x.index_reduce_(0, torch.tensor([2, 0]), y[:2], "amax"),
    "ldexp_": lambda x, y: x.ldexp_(y.round()),
    "lerp_": lambda x, y: x.lerp_(y, 0.3),
    "lerp_ tensor": lambda x, y: x.lerp_(y, y),
    "masked_fill_ tensor": lambda x, y: x.masked_fill_(y > 0.5, y[0, 0]),
    "masked_scatter_": lambda x, y: x.masked_scatter_(y > 0.5, y),
    "nextafter_": lambda x, y: x.nextafter_(y),
    "polygamma_": lambda x, y: x.polygamma_(2),
    "pow_": lambda x, y: x.pow_(y),
    "put_": lambda x, y: x.put_(torch.tensor([1, 5]), y[0, :2]),
    "remainder_": lambda x, y: x.remainder_(y + 1),
    "renorm_": lambda x, y: x.renorm_(2, 0, 0.5),
    "scatter_": lambda x, y: x.scatter_(0, torch.tensor([[0, 2, 1]]), y),
    "scatter_ value": lambda x, y: x.scatter_(0, torch.tensor([[0, 2, 1]]), 2.0),
    "tril_": lambda x, y: x.tril_(),
    "triu_": lambda x, y: x.triu_(1),
    "xlogy_": lambda x, y: x.xlogy_(y),
}


@pytest.mark.parametrize("name", IN_PLACE)
def test_in_place_is_the_functional_form_and_a_copy(name: str) -> None:
    x, y = torch.rand(2, 2, 3, 3, dtype=torch.float64)
    same_as_loop(IN_PLACE[name], x, y, gradient=False)


def test_in_place_writes_into_the_callers_tensor() -> None:
    x = torch.ones(2, 3)
    result = vmap(lambda x: x.addcmul_(x, x))(x)
    assert x.eq(2).all()
    assert result.data_ptr() == x.data_ptr()


def test_in_place_keeps_the_dtype() -> None:
    x = torch.ones(2, 3, dtype=torch.int64)
    with pytest.raises(RuntimeError, match=r"result type torch.float32 can't be cast to the desired output type torch.int64"):
        vmap(lambda x: x.lerp_(x, 0.5) if x.is_floating_point() else x.addcdiv_(x.float(), x.float()))(x)


def test_in_place_keeps_the_shape() -> None:
    with pytest.raises(InPlaceError, match=re.escape("result of shape (2, 3) for one sample into a tensor of shape (3,)")):
        vmap(lambda x, y: x.addcmul_(y, y))(torch.ones(2, 3), torch.ones(2, 2, 3))


def test_in_place_into_a_shared_tensor() -> None:
    with pytest.raises(InPlaceError, match="argument x, which is unmapped"):
        vmap(lambda x, y: x.addcmul_(y, y), in_axes=(None, 0))(torch.ones(3), torch.ones(2, 3))


def test_out_is_the_functional_form_and_a_copy() -> None:
    x, out = torch.rand(2, 3), torch.zeros(2, 3)
    vmap(lambda x, out: torch.exp(x, out=out))(x, out)
    assert_close(out, x.exp())
    values, places = torch.zeros(2), torch.zeros(2, dtype=torch.int64)
    vmap(lambda x, values, places: tuple(torch.max(x, 0, out=(values, places))))(x, values, places)
    assert_close((values, places), tuple(x.max(1)))


POINTWISE: dict[str, Call] = {
    "airy_ai": torch.special.airy_ai,
    "log_ndtr": torch.special.log_ndtr,
    "chebyshev_polynomial_t": lambda x: torch.special.chebyshev_polynomial_t(x, 3),
    "hermite_polynomial_h": lambda x: torch.special.hermite_polynomial_h(x[0], torch.tensor([[0.0], [2.0]])),
    "legendre_polynomial_p": lambda x: torch.special.legendre_polynomial_p(0.5, x.round()),
    "nextafter": lambda x: torch.nextafter(x, x + 1),
    "isin": lambda x: torch.isin(x, x[0]),
    "take": lambda x: torch.take(x, torch.tensor([0, -1])),
    "histc": lambda x: torch.histc(x, 5),
    "histc range": lambda x: torch.histc(x, 5, 0.2, 0.8),
    "quantile": lambda x: torch.quantile(x, 0.3),
    "nanquantile": lambda x: torch.nanquantile(x, 0.3, dim=0),
    "stft": lambda x: torch.view_as_real(torch.stft(x.flatten(), 4, return_complex=True)),
    "istft": lambda x: torch.istft(torch.complex(x, x), 4),
    "nonzero_static": lambda x: torch.nonzero_static(x > 0.5, size=4),
    "eigvals": lambda x: torch.linalg.eigvals(x[:, :3]).abs().sort().values,
    "lu": lambda x: torch.linalg.lu(x)[2],
    "ormqr": lambda x: torch.ormqr(*torch.geqrf(x), x),
}


@pytest.mark.parametrize("name", POINTWISE)
def test_values(name: str) -> None:
    same_as_loop(POINTWISE[name], torch.rand(3, 3, 4), gradient=False)


TARGET = torch.tensor([1, 0, 3])
DIFFERENTIABLE: dict[str, Call] = {
    "huber_loss": lambda x: F.huber_loss(x, x.detach() * 3),
    "soft_margin_loss": lambda x: F.soft_margin_loss(x, torch.ones(3, 4)),
    "multi_margin_loss": lambda x: F.multi_margin_loss(x, TARGET),
    "multilabel_margin_loss": lambda x: F.multilabel_margin_loss(x[0], torch.tensor([3, 0, -1, 1])),
    "kl_div": lambda x: F.kl_div(x.log(), x.detach().flip(0)),
    "margin_ranking_loss": lambda x: F.margin_ranking_loss(x[0], x[1], torch.ones(4)),
    "triplet_margin_loss": lambda x: F.triplet_margin_loss(x, x.flip(0), x.flip(1)),
    "bilinear": lambda x: F.bilinear(x, x, torch.arange(32.0).reshape(2, 4, 4)),
    "pdist": F.pdist,
    "masked_scatter": lambda x: x.masked_scatter(x > 0.5, x.flip(0)),
    "index_reduce": lambda x: x.index_reduce(0, torch.tensor([0, 0]), x[1:], "mean"),
    "put": lambda x: x.put(torch.tensor([0, 5]), x[1, :2]),
    "renorm": lambda x: x.renorm(2, 0, 0.5),
    "max_unpool": lambda x: F.max_unpool1d(*F.max_pool1d(x[None], 2, return_indices=True), 2),
    "lu_solve": lambda x: torch.linalg.lu_solve(*torch.linalg.lu_factor(x[:, :3] + torch.eye(3)), x),
    "embedding_bag": lambda x: F.embedding_bag(torch.tensor([[0, 1], [2, 2]]), x, mode="mean"),
    "embedding_bag, scaled": lambda x: F.embedding_bag(torch.tensor([[0, 1], [2, 2]]), x, scale_grad_by_freq=True),
    "fractional_max_pool": lambda x: F.fractional_max_pool2d(x[None], 2, 2, _random_samples=torch.full((1, 1, 2), 0.5)),
    "nearest-exact": lambda x: F.interpolate(x[None], 6, mode="nearest-exact"),
    "attention": lambda x: F.scaled_dot_product_attention(x[None, None], x[None, None], x[None, None], x @ x.T),
    "ctc_loss": lambda x: F.ctc_loss(x.log_softmax(-1)[:, None], torch.tensor([[1, 2]]), (3,), (2,)),
    "weight_norm": lambda x: torch._weight_norm(x, x[:, :1]),
    "conv_tbc": lambda x: torch.conv_tbc(x[:, None], torch.ones(2, 4, 1), torch.zeros(1)),
    "index_fill": lambda x: x.index_fill(0, torch.tensor([0, 0]), x[1, 1]),
}


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_values_and_gradients(name: str) -> None:
    same_as_loop(DIFFERENTIABLE[name], torch.rand(3, 3, 4))


@pytest.mark.parametrize("kind", [torch.nn.LSTM, torch.nn.GRU, torch.nn.RNN])
def test_recurrent_networks(kind: Any) -> None:
    network = kind(4, 5, batch_first=True)
    same_as_loop(lambda x: network(x)[0], torch.rand(2, 3, 4))


def test_nested_levels_and_shared_arguments() -> None:
    x, y = torch.rand(2, 3, 4), torch.rand(3, 4)
    result = vmap(vmap(lambda x, y: torch.special.hermite_polynomial_h(x, y.round())), in_axes=(0, None))(x, y)
    assert_close(result, torch.special.hermite_polynomial_h(x, y.round()))


def test_rules_are_additions_only() -> None:
    assert batching.lacking() == []
    assert not torch._C._dispatch_has_kernel_for_dispatch_key("aten::mul.Tensor", "Python")


def test_torch_func_has_the_rules_too() -> None:
    x = torch.rand(2, 3)
    assert_close(torch.func.vmap(torch.special.airy_ai)(x), torch.special.airy_ai(x))


def test_compiled() -> None:
    x = torch.rand(2, 3)
    compiled = torch.compile(vmap(lambda x: x.addcmul(x, x).lerp_(x, 0.5)), backend="eager", fullgraph=True)
    assert_close(compiled(x), (x + x * x).lerp(x, 0.5))
