"""max(), min(), median() and nanmedian() of a whole sample, where several elements are equal; and select_scatter."""

from __future__ import annotations

import pytest
import torch
from torch._functorch import config as functorch_config

import torchbatch
from torchbatch import grad, jvp, vmap
from torchbatch.testing import assert_close, loop

inf, nan = float("inf"), float("nan")
TIES = torch.tensor([[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, -0.0, 0.0], [2.0, -1.0, -1.0, -1.0], [3.0, 1.0, 2.0, 4.0]])
LEAST, MOST = torch.finfo(torch.float32).min, torch.finfo(torch.float32).max
LIMITS = torch.tensor([[inf, 1.0, inf, inf], [-inf, -inf, 2.0, -inf], [LEAST] * 4, [MOST] * 4, [MOST, MOST, MOST, LEAST]])
NANS = torch.tensor([[nan, 1.0, nan, 2.0], [nan, nan, nan, nan], [nan, inf, inf, inf], [1.0, 2.0, 2.0, nan]])
REDUCTIONS = {"max": torch.max, "min": torch.min, "median": torch.median, "nanmedian": torch.nanmedian}
every_reduction = pytest.mark.parametrize("f", REDUCTIONS.values(), ids=REDUCTIONS)


def weighted(mapped, x):
    values = mapped(x)
    return (values * torch.arange(1.0, 1 + values.numel()).reshape(values.shape)).sum()


def backward(mapped, x):
    x = x.clone().requires_grad_()
    weighted(mapped, x).backward()
    return x.grad


def tangents(x):
    return torch.arange(1, 1 + x.numel(), dtype=x.dtype).reshape(x.shape) ** 2


WAYS = {
    "values": lambda mapped, x: mapped(x),
    "backward": backward,
    "grad outside": lambda mapped, x: grad(lambda x: weighted(mapped, x))(x),
    "jvp outside": lambda mapped, x: jvp(mapped, (x,), (tangents(x),)),
    "jacobian outside": lambda mapped, x: torch.func.jacrev(mapped)(x),
    "second order outside": lambda mapped, x: torch.func.hessian(lambda x: weighted(mapped, x * x))(x),
}
INSIDE = {
    "grad": lambda f: grad(f),
    "jvp": lambda f: lambda x: jvp(f, (x,), (tangents(x),)),
    "hessian": lambda f: torch.func.hessian(lambda x: f(x) ** 2),
}


@every_reduction
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("x", [TIES, LIMITS, TIES[:, 0], TIES[:0], TIES.double().reshape(4, 2, 2)], ids=lambda x: f"{x.shape}")
def test_equal_elements_share_as_in_the_loop(f, way, x):
    if way.startswith("second") and x is LIMITS:
        x = x.clamp(-2, 2)
    if way.startswith("jacobian") and x.shape[0] == 0:
        pytest.skip("PyTorch has no Jacobian of nothing")
    assert_close(WAYS[way](vmap(f), x), WAYS[way](loop(f), x))


@every_reduction
@pytest.mark.parametrize("way", ["values", "backward", "grad outside"])
def test_what_is_not_a_number(f, way):
    assert_close(WAYS[way](vmap(f), NANS), WAYS[way](loop(f), NANS))


@pytest.mark.parametrize("f", [torch.max, torch.min, torch.median])
@pytest.mark.xfail(reason="PyTorch's forward mode gives NaN, its reverse mode numbers; ours is one for both", strict=True)
def test_forward_mode_of_what_is_not_a_number(f):
    assert_close(jvp(vmap(f), (NANS,), (tangents(NANS),)), jvp(loop(f), (NANS,), (tangents(NANS),)))


@every_reduction
@pytest.mark.parametrize("name", INSIDE)
@pytest.mark.parametrize("x", [TIES, NANS])
def test_derivatives_inside(f, name, x):
    inner = INSIDE[name](f)
    assert_close(vmap(inner)(x), loop(inner)(x))


@every_reduction
@pytest.mark.parametrize("way", WAYS)
def test_nested(f, way):
    x = torch.stack([TIES, TIES.flip(0)])
    nested, loops = vmap(vmap(f, in_axes=1), in_axes=1), loop(loop(f, in_axes=1), in_axes=1)
    x = x.permute(2, 1, 0)
    assert_close(WAYS[way](nested, x), WAYS[way](loops, x))
    between, slow = vmap(grad(lambda x: (vmap(f)(x) ** 2).sum())), loop(grad(lambda x: (loop(f)(x) ** 2).sum()))
    assert_close(WAYS[way](between, x), WAYS[way](slow, x))


def test_pytorchs_own_vmap_too():
    assert_close(backward(torch.func.vmap(torch.max), TIES), backward(loop(torch.max), TIES))


@every_reduction
def test_forward_mode_of_pytorch(f):
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(TIES, tangents(TIES))
        tangent = torch.autograd.forward_ad.unpack_dual(vmap(f)(dual)).tangent
    assert_close(tangent, jvp(loop(f), (TIES,), (tangents(TIES),))[1])


@every_reduction
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("way", ["values", "backward", "grad outside", "jvp outside"])
def test_traced(f, way, dynamic):
    mapped = torchbatch.jit(vmap(f), backend="eager", dynamic=dynamic)
    if way == "jvp outside":
        mapped = torchbatch.jit(lambda x: jvp(vmap(f), (x,), (tangents(x),)), backend="eager", dynamic=dynamic)
        assert_close(mapped(TIES), WAYS[way](loop(f), TIES))
        return
    for x in (TIES, NANS):
        assert_close(WAYS[way](mapped, x), WAYS[way](loop(f), x))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled(backend):
    def both(x):
        return vmap(lambda x: x.max() * x.median())(x)

    torch._dynamo.reset()
    with functorch_config.patch(enable_autograd_cache=False):  # its keys do not know which rules there are
        found = backward(torch.compile(both, backend=backend, fullgraph=True), TIES)
    assert_close(found, backward(loop(lambda x: x.max() * x.median()), TIES))


@every_reduction
@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.uint8, torch.bool, torch.float16, torch.bfloat16])
def test_dtypes(f, dtype):
    if dtype is torch.bool and "median" in f.__name__:
        pytest.skip("PyTorch has no median of booleans")
    x = torch.tensor([[3, 0, 3], [0, 0, 0]]).to(dtype)
    assert_close(vmap(f)(x), loop(f)(x))
    if dtype.is_floating_point:
        assert_close(backward(vmap(f), x), backward(loop(f), x))


@pytest.mark.parametrize("f", [torch.max, torch.min])
@pytest.mark.parametrize("x", [torch.zeros(2, 0), torch.zeros(0, 0), torch.zeros(2, 0, dtype=torch.int64)])
def test_the_largest_of_nothing(f, x):
    for mapped in (vmap(f), loop(f), torchbatch.jit(vmap(f), backend="eager")):
        with pytest.raises(RuntimeError, match=r"Expected reduction dim to be specified for input.numel\(\) == 0"):
            mapped(x)


@pytest.mark.parametrize("f", [torch.median, torch.nanmedian])
@pytest.mark.parametrize("x", [torch.zeros(2, 0), torch.zeros(0, 0), torch.zeros(2, 3, 0), torch.zeros(2, 0, dtype=torch.int32)])
def test_the_median_of_nothing(f, x):
    assert_close(vmap(f)(x), loop(f)(x))
    if x.is_floating_point():
        assert_close(backward(vmap(f), x), torch.zeros_like(x))


@every_reduction
def test_complex_numbers_have_no_order(f):
    for mapped in (vmap(f), loop(f)):
        with pytest.raises(NotImplementedError, match="not implemented for 'ComplexFloat'"):
            mapped(torch.zeros(2, 3, dtype=torch.complex64))


@every_reduction
def test_of_a_shared_tensor(f):
    shared = torch.tensor([2.0, 2.0], requires_grad=True)
    vmap(lambda x: x + f(shared))(TIES[:, 0]).sum().backward()
    assert_close(shared.grad, torch.tensor([2.0, 2.0]))


@pytest.mark.parametrize("f", [torch.max, torch.min])
def test_into_a_tensor(f):
    assert_close(vmap(lambda x: f(x, out=torch.zeros(())))(TIES), loop(f)(TIES))


@pytest.mark.parametrize("f", [torch.max, torch.min])
def test_zeros_keep_their_sign(f):
    x = torch.tensor([[-0.0, -0.0], [0.0, 0.0]], requires_grad=True)
    assert vmap(f)(x).signbit().tolist() == [True, False]


# --- select_scatter --------------------------------------------------------------------------------------------------

PLACES = [(0, 1), (-1, -2), (1, 0)]


def written(dim, index):
    return lambda x, src: x.select_scatter(src, dim, index)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("axes", [(0, 0), (None, 0), (0, None), (-1, 1)])
def test_select_scatter(place, axes):
    whole = {(0, 1): (3, 4), (-1, -2): (2, 3), (1, 0): (2, 3)}[place]
    x, part = torch.randn(whole), torch.randn(torch.zeros(whole).select(*place).shape)
    x = x if axes[0] is None else torch.stack([x, 2 * x, 3 * x], axes[0])
    part = part if axes[1] is None else torch.stack([part, 2 * part, -part], axes[1])
    mapped, loops = (make(written(*place), in_axes=axes) for make in (vmap, loop))
    assert_close(mapped(x, part), loops(x, part))
    gradient = lambda f: grad(lambda x, part: weighted(lambda x: f(x, part), x), argnums=(0, 1))  # noqa: E731
    assert_close(gradient(mapped)(x, part), gradient(loops)(x, part))
    assert_close(torchbatch.jit(gradient(mapped), backend="eager")(x, part), gradient(loops)(x, part))
    tangent = lambda f: jvp(f, (x, part), (tangents(x), tangents(part)))  # noqa: E731
    assert_close(tangent(mapped), tangent(loops))


def test_select_scatter_nested():
    x, part = torch.randn(2, 3, 4), torch.randn(3, 2, 4)
    nested = vmap(vmap(written(0, 1), in_axes=(None, 0)), in_axes=(0, 1))
    loops = loop(loop(written(0, 1), in_axes=(None, 0)), in_axes=(0, 1))
    for way in (lambda f: f(x, part), lambda f: grad(lambda part: weighted(lambda x: f(x, part), x))(part)):
        assert_close(way(nested), way(loops))


@pytest.mark.parametrize(("dim", "index", "shape"), [(0, 7, (4,)), (2, 0, (4,)), (0, 0, (1,)), (0, 0, ())])
def test_select_scatter_out_of_place(dim, index, shape):
    for mapped in (vmap(written(dim, index)), loop(written(dim, index))):
        with pytest.raises((IndexError, RuntimeError)):
            mapped(torch.zeros(2, 3, 4), torch.zeros(2, *shape))
