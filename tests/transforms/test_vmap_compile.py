"""Rule 10: ``vmap`` with torch.compile, torch.export, make_fx, checkpoint, autocast, and autograd around it."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call, grad, hessian, jacrev
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

import torchbatch
from torchbatch import vmap
from torchbatch.errors import EscapedValueError, UnsupportedOperationError
from torchbatch.testing import assert_close, loop

G = torch.Generator().manual_seed(0)
X, Y, X3 = torch.randn(3, 4, generator=G), torch.randn(3, 4, generator=G), torch.randn(3, 4, 5, generator=G)
torch.manual_seed(0)
MLP = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Tanh(), torch.nn.Linear(3, 1))
PARAMETERS = dict(MLP.named_parameters())
OUTSIDE = vmap(lambda a: a.sin() + 1)
INNER = torch.compile(lambda a: a.cos(), backend="aot_eager")


@vmap
def decorated(a):
    return a * 2


def writes(v):
    room = v.new_zeros(2, 4)
    room[0] = v
    row = room[1]
    row += v * 2
    positions = torch.arange(4.0)
    positions *= v
    other = torch.ones_like(v)
    other[1:] = v[1:]
    return room, positions, other.clone().mul_(v), torch.full((2,), 3.0).add_(v[0])


def writes_nested(v):
    room = torch.zeros(4)

    def inner(s):
        t = torch.zeros(2)
        t[0], t[1] = s, v[0]
        return t

    rows = vmap(inner)(v)
    room[0] = rows.sum()
    return room, rows


class Model(torch.nn.Module):
    def __init__(self, out_axes=0):
        super().__init__()
        self.linear, self.out_axes = torch.nn.Linear(4, 4), out_axes

    def one(self, a):
        room = torch.zeros(4)
        room[0] = a[0]
        return room + self.linear(a).tanh()

    def forward(self, x):
        return vmap(self.one, out_axes=self.out_axes)(x)


# Each is called with X and Y, compiled whole, and compared with itself in eager mode.
PROGRAMS = {
    "plain": lambda x, y: vmap(lambda v: v * 2 + 1)(x),
    "axis 1": lambda x, y: vmap(lambda v: v * 2 + 1, 1, 1)(x),
    "negative axes": lambda x, y: vmap(lambda v: v.sum(0), -1, -1)(X3 * x.sum()),
    "None": lambda x, y: vmap(torch.dot, (None, 0))(x[0], y),
    "list": lambda x, y: vmap(lambda a, b: a + b, [0, 0])(x, y),
    "prefix trees": lambda x, y: vmap(
        lambda d, t: {"a": d["p"] * t[0], "b": (t[1], d["q"])}, ({"p": 0, "q": None}, 0), {"a": 1, "b": (0, None)}
    )({"p": x, "q": 2.0}, (y, y)),
    "keywords": lambda x, y: vmap(lambda a, *, b: a + b)(x, b=y),
    "axis_size": lambda x, y: vmap(lambda a: a * 2, None, axis_size=5)(x),
    "axis_size, no arguments": lambda x, y: vmap(lambda: torch.ones(2), axis_size=5)() * x.sum(),
    "sum_match": lambda x, y: vmap(lambda a: a * 2, out_axes=None, sum_match=True)(x),
    "out_axes None": lambda x, y: vmap(lambda a, b: (a, b.sin()), (0, None), (0, None))(x, y),
    "constant output": lambda x, y: vmap(lambda a: (a, 3.0, torch.ones(2)), out_axes=(0, 0, 1))(x),
    "chunk_size": lambda x, y: vmap(lambda a: (a.sin(), 1.0), chunk_size=2)(x),
    "chunk_size, sum": lambda x, y: vmap(lambda a: (a, y), out_axes=None, sum_match=True, chunk_size=2)(x),
    "different": lambda x, y: vmap(lambda a: (a + torch.rand(4)) * 0, randomness="different")(x),
    "same": lambda x, y: vmap(lambda a: (a + torch.rand(4)) * 0, randomness="same")(x),
    "names": lambda x, y: vmap(lambda a: a.sin(), axis_name="i", spmd_axis_name="j")(x),
    "empty": lambda x, y: vmap(lambda a: a * 2)(x[:0]),
    "NumPy": lambda x, y: vmap(lambda a: a * 2)(x.numpy()),
    "nested": lambda x, y: vmap(vmap(lambda a, b: a * b, (0, None)), (None, 0), 1)(x[0], y[0]),
    "grad": lambda x, y: vmap(grad(lambda a: (a**3).sum()))(x),
    "torchbatch.grad": lambda x, y: vmap(torchbatch.grad(lambda a: (a**3).sum()))(x),
    "grad outside": lambda x, y: grad(lambda z: vmap(lambda a: (a**3).sum())(z).sum())(x),
    "jacrev": lambda x, y: vmap(jacrev(lambda a: a**3))(x),
    "module": lambda x, y: vmap(MLP)(x),
    "module as argument": lambda x, y: vmap(lambda m, a: m(a), (None, 0))(MLP, x),
    "per-example gradients": lambda x, y: vmap(
        grad(lambda p, a: functional_call(MLP, p, (a,)).sum()), (None, 0)
    )(PARAMETERS, x),
    "writes": lambda x, y: vmap(writes)(x),
    "writes, nested": lambda x, y: vmap(writes_nested)(x),
    "partial": lambda x, y: vmap(functools.partial(torch.add, alpha=2))(x, y),
    "made outside": lambda x, y: OUTSIDE(x),
    "decorated": lambda x, y: decorated(x),
    "a compiled function inside": lambda x, y: vmap(INNER)(x),
    "a compiled function called inside": lambda x, y: vmap(lambda v: INNER(v) * 2)(x),
}  # fmt: skip


@pytest.fixture(autouse=True)
def forget_compiled_code():
    yield
    torch._dynamo.reset()


def compiled(fun, backend="aot_eager"):
    return torch.compile(fun, fullgraph=True, backend=backend)


@pytest.mark.parametrize("name", PROGRAMS)
def test_compiled_whole(name):
    assert_close(compiled(PROGRAMS[name])(X, Y), PROGRAMS[name](X, Y))


@pytest.mark.parametrize("name", ["prefix trees", "per-example gradients", "writes"])
def test_compiled_by_inductor(name):
    assert_close(compiled(PROGRAMS[name], "inductor")(X, Y), PROGRAMS[name](X, Y))


def test_the_mapped_function_itself_is_compiled():
    for mapped in (vmap(lambda a: a.sin() + 1), vmap(writes), decorated):
        assert_close(compiled(mapped)(X), mapped(X))


def test_a_module_that_maps_is_compiled_with_its_gradients():
    model, x = Model(), X.clone().requires_grad_()
    expected = torch.autograd.grad(model(x).sum(), [x, *model.parameters()])
    result = torch.autograd.grad(compiled(model)(x).sum(), [x, *model.parameters()])
    assert_close(result, expected)


def test_errors_while_compiling_are_ours():
    def named(text, call):
        with pytest.raises(Exception, match=text):
            compiled(call)(X)

    named("must be a tree prefix of the arguments", lambda x: vmap(lambda a: a, ({"a": 0},))(x))
    named("must be a tree prefix of the output", lambda x: vmap(lambda a: a, out_axes={"a": 0})(x))
    named("must have one entry per positional argument", lambda x: vmap(lambda a: a, (0, 0))(x))
    named("out of bounds for a mapped argument", lambda x: vmap(lambda a: a, 5)(x))
    named("different sizes to map over: 3 and 2", lambda x: vmap(torch.add)(x, x[:2]))
    named("nothing to map", lambda x: vmap(lambda a: a, None)(x))
    named("out_axes 9 is out of bounds", lambda x: vmap(lambda a: a, out_axes=9)(x))
    named("its out_axes is None", lambda x: vmap(lambda a: a, out_axes=None)(x))
    named("returned a str, which is not an array", lambda x: vmap(lambda a: "text")(x))
    named("is to map a float, which is not an array", lambda x: vmap(torch.add)(x, 3.0))


@pytest.mark.xfail(reason="PyTorch cannot compile jacfwd of jacrev under vmap", strict=True)
def test_hessian_in_a_compiled_map():
    def program(x):
        return vmap(hessian(lambda a: (a**3).sum()))(x)

    assert_close(compiled(program)(X), program(X))


# --- vmap over what is compiled ---------------------------------------------------------------------------------------


def test_vmap_over_compiled_functions_and_modules():
    linear = torch.nn.Linear(4, 2)
    in_place = torch.nn.Linear(4, 2)
    in_place.compile(backend="aot_eager")
    as_module = torch.compile(linear, backend="aot_eager")
    assert_close(vmap(INNER)(X), X.cos())
    assert_close(vmap(functools.partial(INNER))(X), X.cos())
    assert_close(vmap(as_module)(X), linear(X))
    assert_close(vmap(torch.compile(linear.forward, backend="aot_eager"))(X), linear(X))
    assert_close(vmap(in_place)(X), in_place(X))


def test_compiled_functions_called_inside():
    def written(v):
        room = torch.zeros(4)
        before = INNER(room)
        room[0] = v[0]
        return INNER(room) + before

    assert_close(vmap(lambda v: INNER(v) * 2)(X), X.cos() * 2)
    assert_close(vmap(vmap(INNER))(X), X.cos())
    assert_close(vmap(grad(lambda v: INNER(v).sum()))(X), -X.sin())
    assert_close(vmap(torchbatch.grad(lambda v: INNER(v).sum()))(X), -X.sin())
    assert_close(vmap(torch.compile(vmap(torch.cos), backend="aot_eager"))(X), X.cos())
    assert_close(vmap(written)(X), loop(written)(X))


# --- export and make_fx -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("out_axes", [0, 1])
def test_export(out_axes):
    model = Model(out_axes)
    program = torch.export.export(model, (X,), strict=False)
    assert_close(program.module()(Y), model(Y))


def test_export_with_a_dynamic_batch():
    model, longer = Model(), torch.cat([X, Y])
    program = torch.export.export(model, (X,), strict=False, dynamic_shapes=({0: torch.export.Dim("b")},))
    assert_close(program.module()(longer), model(longer))


FLAT = {
    "plain": lambda x: vmap(lambda a: a.sin() * 2 + 1)(x),
    "writes": lambda x: vmap(lambda v: writes(v)[:3])(x),
    "writes, nested": lambda x: vmap(writes_nested)(x),
    "constant": lambda x: vmap(lambda v: torch.zeros(2).add_(v[0]) * torch.tensor([1.0, 2.0]))(x),
    "grad": lambda x: vmap(grad(lambda a: (a**3).sum()))(x),
    "nested": lambda x: vmap(vmap(lambda a: torch.zeros(2) + a), 1, 1)(x),
    "chunk_size": lambda x: vmap(lambda a: a.sin(), chunk_size=2)(x),
}


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
@pytest.mark.parametrize("name", FLAT)
def test_make_fx(name, mode):
    graph = make_fx(FLAT[name], tracing_mode=mode)(X)
    assert_close(graph(Y), FLAT[name](Y))


def test_fake_tensors():
    with torch._subclasses.FakeTensorMode():
        room, *_ = vmap(writes)(torch.ones(5, 4))
    assert room.shape == (5, 2, 4)


# --- autograd around and inside ---------------------------------------------------------------------------------------


def test_checkpoint_outside_and_ours_inside():
    x = X.clone().requires_grad_()
    (expected,) = torch.autograd.grad((x.sin() ** 2).sum(), x)
    ours = torchbatch.checkpoint(lambda y: y.sin() ** 2)
    for value in (checkpoint(vmap(lambda y: y.sin() ** 2), x, use_reentrant=False), vmap(ours)(x)):
        assert_close(torch.autograd.grad(value.sum(), x)[0], expected)
    assert_close(vmap(grad(lambda y: ours(y).sum()))(X), expected)
    assert_close(grad(lambda y: vmap(ours)(y).sum())(X), expected)


def test_pytorchs_checkpoint_inside():
    """Its forward pass works; what it recomputes runs after the map, which is an error, and not another call's data."""

    def again(x):
        return checkpoint(lambda y: y.sin() ** 2, x, use_reentrant=False)

    x = X.clone().requires_grad_()
    value = vmap(again)(x)
    assert_close(value, x.sin() ** 2)
    with pytest.raises(EscapedValueError):
        value.sum().backward()
    with pytest.raises(UnsupportedOperationError, match=r"hooks for saved tensors\. Use torchbatch\.checkpoint\.\n  in again"):
        vmap(grad(lambda y: again(y).sum()))(X)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_grad_modes(context):
    def program(x):
        with context():
            room = torch.zeros(4)
            room[0] = x[0]
            inner = x * 2
        return room + 0, inner * 1

    x = X.clone().requires_grad_()
    for mapped, looped in (
        (lambda: context()(vmap(writes))(x), lambda: context()(loop(writes))(x)),
        (lambda: vmap(program)(x), lambda: loop(program)(x)),
    ):
        ours, theirs = mapped(), looped()
        assert_close(ours, theirs)
        assert [t.requires_grad for t in ours] == [t.requires_grad for t in theirs]


def test_backward_through_a_map():
    results = []
    for lib in (vmap, loop):
        model, x = torch.nn.Linear(4, 2), X.clone().requires_grad_()
        with torch.no_grad():
            model.weight.fill_(0.5)
            model.bias.zero_()
        lib(lambda v, m=model: m(v).tanh().sum() * v[0])(x).sum().backward()
        results.append((x.grad, model.weight.grad, model.bias.grad))
    assert_close(*results)


def test_double_backward_and_forward_mode():
    x = X.clone().requires_grad_()
    (first,) = torch.autograd.grad(vmap(lambda v: (v**3).sum())(x).sum(), x, create_graph=True)
    assert_close(torch.autograd.grad(first.sum(), x)[0], 6 * X)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(X, Y)
        primal, tangent = torch.autograd.forward_ad.unpack_dual(vmap(lambda v: v.sin() * v[0])(dual))
    expected = torch.func.jvp(lambda x: x.sin() * x[:, :1], (X,), (Y,))
    assert_close((primal, tangent), expected)


def test_numpy_and_torch_arguments_mix():
    assert_close(vmap(torch.add)(X.numpy(), Y), X + Y)
    assert_close(vmap(torch.mul, (0, None))(np.ones((3, 4), dtype=np.float32), 2.0), torch.full((3, 4), 2.0))


# --- autocast ---------------------------------------------------------------------------------------------------------

AUTOCAST = {
    "matmul": lambda x: x.view(2, 2) @ x.view(2, 2),
    "mv": lambda x: torch.ones(4, 4) @ x,
    "bmm": lambda x: torch.bmm(x.view(1, 2, 2), x.view(1, 2, 2)),
    "softmax": lambda x: F.softmax(x.view(2, 2) @ x.view(2, 2), -1),
    "add": lambda x: x + (x.view(2, 2) @ x.view(2, 2)).sum(),
    "mse_loss": lambda x: F.mse_loss(x.bfloat16(), x.bfloat16()),
    "einsum": lambda x: torch.einsum("i,j->ij", x, x),
    "linear": lambda x: F.linear(x, torch.ones(2, 4)),
    "conv1d": lambda x: F.conv1d(x.view(1, 4), torch.ones(1, 1, 2)),
    "addmm": lambda x: torch.addmm(torch.ones(2, 2), x.view(2, 2), x.view(2, 2)),
    "l1_loss": lambda x: F.l1_loss(x.bfloat16(), x.bfloat16()),
    "conv2d": lambda x: F.conv2d(x.view(1, 2, 2), torch.ones(3, 1, 2, 2), torch.ones(3)),
    "conv_transpose1d": lambda x: F.conv_transpose1d(x.view(1, 4), torch.ones(1, 2, 2)),
    "baddbmm": lambda x: torch.baddbmm(torch.ones(1, 2, 2), x.view(1, 2, 2), x.view(1, 2, 2)),
    "nll_loss": lambda x: F.nll_loss(x.bfloat16().view(2, 2), torch.tensor([0, 1])),
    "cross_entropy": lambda x: F.cross_entropy(x.bfloat16().view(2, 2), torch.tensor([0, 1])),
    "bce_with_logits": lambda x: F.binary_cross_entropy_with_logits(x.bfloat16(), x.bfloat16().sigmoid()),
    "smooth_l1_loss": lambda x: F.smooth_l1_loss(x.bfloat16(), x.bfloat16() * 2),
    "double": lambda x: F.linear(x.double(), torch.ones(2, 4).double()),
}


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("name", AUTOCAST)
def test_autocast_dtypes_are_the_loops_inside_and_around(name, inside):
    def inner(x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return AUTOCAST[name](x)

    if inside:
        ours, theirs = vmap(inner)(X), loop(inner)(X)
    else:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            ours, theirs = vmap(AUTOCAST[name])(X), loop(AUTOCAST[name])(X)
    assert ours.dtype == theirs.dtype
    assert_close(ours, theirs)


@pytest.mark.parametrize("name", AUTOCAST)
def test_autocast_dtypes_of_gradients_are_the_loops(name):
    def loss(x):
        return AUTOCAST[name](x).float().sum()

    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, theirs = vmap(torchbatch.grad(loss))(X), loop(torchbatch.grad(loss))(X)
    assert_close(ours, theirs, rtol=2e-2, atol=2e-2)

