"""checkpoint: the same derivatives in every mode and order, by running the function again."""

from __future__ import annotations

import pickle
from functools import partial

import pytest
import torch

from torchbatch.errors import GradientTypeError, GradientValueError, UnsupportedOperationError
from torchbatch.lax import scan
from torchbatch.testing import assert_close
from torchbatch.transforms.checkpoint import checkpoint
from torchbatch.transforms.grad import grad, jvp, linearize, vjp
from torchbatch.transforms.jacobian import hessian, jacfwd, jacrev
from torchbatch.transforms.vmap import vmap

VMAPS = pytest.mark.parametrize("mapped", [torch.func.vmap, vmap], ids=["torch.func.vmap", "torchbatch.vmap"])
X = torch.tensor([0.5, -1.0, 2.0])
W = torch.tensor([1.5, 0.3, -0.7])
ROWS = torch.stack([X, X * 2 + 1])


def plain(fun, **_):
    return fun


class Counted:
    """A function that counts its calls and reads a tensor from outside."""

    def __init__(self):
        self.calls = 0

    def __call__(self, x):
        self.calls += 1
        return torch.sin(x * W) * x.exp()


def closed(make, calls):
    """A function of ``w``, which the checkpointed part reads from its closure."""

    def function(w):
        def inside(x):
            calls.append(1)
            return torch.sin(x * w) * w

        return make(inside)(X).sum()

    return function


TRANSFORMS = {
    "grad": grad,
    "jacrev": jacrev,
    "jacfwd": jacfwd,
    "hessian": hessian,
    "reverse over reverse": lambda f: jacrev(jacrev(f)),
    "forward over forward": lambda f: jacfwd(jacfwd(f)),
    "reverse over forward": lambda f: jacrev(jacfwd(f)),
    "jvp": lambda f: lambda x: jvp(f, (x,), (x,))[1],
    "vjp": lambda f: lambda x: vjp(f, x)[1](torch.tensor(2.0)),
    "linearize": lambda f: lambda x: linearize(f, x)[1](x),
    "third": lambda f: grad(lambda x: grad(lambda y: (grad(f)(y) ** 2).sum())(x).sum()),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_of_an_argument(name):
    transform = TRANSFORMS[name]
    counted = Counted()
    expected = transform(lambda x: Counted()(x).sum())(X)
    assert_close(transform(lambda x: checkpoint(counted)(x).sum())(X), expected)
    assert counted.calls >= 2


@pytest.mark.parametrize("name", TRANSFORMS)
def test_of_a_closed_over_tensor(name):
    transform, calls = TRANSFORMS[name], []
    expected = transform(closed(plain, []))(W)
    assert_close(transform(closed(checkpoint, calls))(W), expected)
    assert len(calls) >= 2


@VMAPS
@pytest.mark.parametrize("name", ["grad", "hessian", "jvp", "vjp", "linearize", "forward over forward"])
def test_under_vmap(name, mapped):
    transform = TRANSFORMS[name]
    for make in (lambda c: closed(c, []), lambda c: lambda x: c(Counted())(x).sum()):
        expected = torch.func.vmap(transform(make(plain)))(ROWS)
        assert_close(mapped(transform(make(checkpoint)))(ROWS), expected)


@VMAPS
@pytest.mark.parametrize("make", [lambda c: closed(c, []), lambda c: lambda x: c(Counted())(x).sum()])
def test_around_vmap(mapped, make):
    expected = grad(lambda rows: torch.func.vmap(make(plain))(rows).sum())(ROWS)
    assert_close(grad(lambda rows: mapped(make(checkpoint))(rows).sum())(ROWS), expected)
    rows = ROWS.clone().requires_grad_()
    mapped(make(checkpoint))(rows).sum().backward()
    assert_close(rows.grad, expected)


@VMAPS
@pytest.mark.parametrize("make", [lambda c: closed(c, []), lambda c: lambda x: c(Counted())(x).sum()])
@pytest.mark.parametrize("name", ["jvp", "jacfwd", "hessian", "forward over forward"])
def test_forward_mode_around_vmap(mapped, make, name):
    expected = TRANSFORMS[name](lambda rows: torch.func.vmap(make(plain))(rows).sum())(ROWS)
    assert_close(TRANSFORMS[name](lambda rows: mapped(make(checkpoint))(rows).sum())(ROWS), expected)


def test_forward_mode_around_vmap_of_a_loop():
    def steps(c):
        return vmap(lambda x: scan(c(lambda carry, _: (torch.sin(carry) * x, None)), x, None, length=2)[0])

    assert_close(jvp(steps(checkpoint), (ROWS,), (ROWS,)), jvp(steps(plain), (ROWS,), (ROWS,)))


def test_runs_once_forward_and_once_backward():
    counted = Counted()
    checkpoint(counted)(X)
    assert counted.calls == 1
    grad(lambda x: checkpoint(counted)(x).sum())(X)
    assert counted.calls == 3


def test_keeps_nothing_but_its_inputs():
    kept = []

    def save(tensor):
        kept.append(tensor)
        return tensor

    def deep(x):
        for _ in range(10):
            x = torch.sin(x)
        return x

    x = X.clone().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        checkpoint(deep)(x)
        assert len(kept) <= 2
        deep(x)
    assert len(kept) >= 10


def test_modules_and_dropout():
    model = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Dropout(0.5), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    results = []
    for make in (plain, checkpoint):
        torch.manual_seed(0)
        loss = make(model)(X).sum() + torch.rand(())
        results.append((loss, *torch.autograd.grad(loss, list(model.parameters()))))
    assert_close(results[1], results[0])
    state = torch.get_rng_state()
    torch.rand(1)
    loss = checkpoint(model)(X).sum()
    after = torch.get_rng_state()
    loss.backward()
    assert torch.equal(torch.get_rng_state(), after) and not torch.equal(after, state)


def test_functional_call():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
    parameters = {name: value.detach() for name, value in model.named_parameters()}

    def loss(make):
        return lambda p, x: make(lambda x: torch.func.functional_call(model, p, (x,)))(x).sum()

    assert_close(grad(loss(checkpoint))(parameters, X), grad(loss(plain))(parameters, X))
    batched = torch.func.vmap(grad(loss(checkpoint)), in_dims=(None, 0))(parameters, ROWS)
    assert_close(batched, torch.func.vmap(grad(loss(plain)), in_dims=(None, 0))(parameters, ROWS))


def test_autocast_is_the_same_in_both_runs():
    seen = []

    def function(x):
        y = x[None] @ x[:, None]
        seen.append(y.dtype)
        return y.float().sum()

    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, pull = vjp(checkpoint(function), X)
    pull(torch.tensor(1.0))
    assert seen == [torch.bfloat16, torch.bfloat16]


@pytest.mark.parametrize(
    "function",
    [
        lambda make, x, w: make(lambda y: make(lambda z: torch.sin(z * w))(y) * y * w)(x),
        lambda make, x, w: make(lambda y: make(make(lambda z: z * w * y))(x))(x) * w,
        lambda make, x, w: make(lambda y: y * x * w)(x),
        lambda make, x, w: make(lambda y: torch.cat([y, w, y * w]))(x),
        lambda make, x, w: make(lambda y: torch.func.grad(lambda z: (z**3 * w).sum())(y))(x),
        lambda make, x, w: make(lambda y: torch.func.vmap(torch.sin)(torch.func.vmap(lambda a: a * w.sum())(y)))(x),
        lambda make, x, w: make(lambda d, k=1, i=None: (d["a"] * k * w)[i])({"a": x}, k=3, i=torch.tensor([0, 2])),
        lambda make, x, w: make(lambda y: {"f": y * w, "n": 3, "i": torch.tensor(1), "s": "text", "none": None})(x)[
            "f"
        ],
        lambda make, x, w: make(lambda y: stack_in_place(y, w))(x),
        lambda make, x, w: x * make(lambda: w * w)() + make(lambda y: torch.ones(3))(w),
    ],
)
def test_shapes_of_programs(function):
    for transform in (jacrev, jacfwd, lambda f, a: jacfwd(jacrev(f, a), a)):

        def both(make, t=transform):
            return t(lambda x, w: function(make, x, w), (0, 1))(X, W)

        assert_close(both(checkpoint), both(plain))


def stack_in_place(x, w):
    out = torch.zeros(3) * x
    out[0] = (x * w).sum()
    return out


def test_other_outputs_are_handed_through():
    output = checkpoint(lambda x: (x, {"n": 3, "i": torch.tensor(1), "s": "text"}, None))(X)
    assert output[1]["n"] == 3 and output[1]["s"] == "text" and output[1]["i"] == 1 and output[2] is None
    assert torch.equal(output[0], X)
    assert checkpoint(lambda: 3)() == 3


def test_as_a_decorator():
    @checkpoint
    def one(x):
        """One."""
        return x**2

    @partial(checkpoint, static_argnums=(1,), static_argnames="flag", prevent_cse=False)
    def two(x, double, flag=True):
        return x * 2 if double and flag else x

    assert (one.__name__, one.__doc__) == ("one", "One.")
    assert grad(one)(3.0) == 6 and grad(two)(3.0, True, flag=True) == 2
    assert pickle.loads(pickle.dumps(checkpoint(torch.sin)))(X[0]) == torch.sin(X[0])


def test_under_torch_compile_it_is_the_function():
    function = grad(lambda x: checkpoint(lambda y: torch.sin(y))(x).sum())
    torch._dynamo.reset()
    assert_close(torch.compile(function, backend="aot_eager", fullgraph=True)(X), torch.cos(X))


class Twice(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x * 2

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, cotangent):
        return cotangent * 2

    @staticmethod
    def jvp(ctx, tangent):
        return tangent * 2


STRAIGHT = {
    "grad": lambda w: torch.func.grad(lambda v: (v**3).sum())(w),
    "vmap": lambda w: torch.func.vmap(torch.sin)(w),
}


@pytest.mark.parametrize("inner", STRAIGHT)
@pytest.mark.parametrize("name", ["grad", "hessian", "jvp", "forward over forward"])
def test_a_closed_over_tensor_that_goes_straight_into_a_transform_is_an_error(inner, name):
    """PyTorch shows such a tensor to nobody, so that its derivative would be lost."""

    def function(w):
        return checkpoint(lambda x: x * STRAIGHT[inner](w))(X).sum()

    with pytest.raises(UnsupportedOperationError, match="Make that tensor an argument of the checkpointed function"):
        TRANSFORMS[name](function)(W)

    def as_argument(make):
        return lambda w: make(lambda x, w: x * STRAIGHT[inner](w))(X, w).sum()

    assert_close(TRANSFORMS[name](as_argument(checkpoint))(W), TRANSFORMS[name](as_argument(plain))(W))


@pytest.mark.parametrize("name", ["grad", "hessian", "jvp", "forward over forward"])
def test_a_closed_over_tensor_in_an_autograd_function(name):
    def function(make):
        return lambda w: make(lambda x: x * Twice.apply(w) ** 2)(X).sum()

    assert_close(TRANSFORMS[name](function(checkpoint))(W), TRANSFORMS[name](function(plain))(W))


def test_a_closed_over_tensor_in_an_autograd_function_outside_of_transforms():
    w = W.clone().requires_grad_()
    output = checkpoint(lambda x: x * Twice.apply(w))(X).sum()
    with pytest.raises(UnsupportedOperationError, match="Make that tensor an argument"):
        output.backward()


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"policy": len}, GradientValueError, "checkpoint: policy must be None, but it is <built-in function len>"),
        ({"static_argnums": "x"}, GradientTypeError, "checkpoint: static_argnums must be an int or a sequence of ints"),
        ({"static_argnames": [3]}, GradientTypeError, "checkpoint: static_argnames must be a str or several"),
    ],
)
def test_bad_options(options, error, text):
    with pytest.raises(error) as raised:
        checkpoint(torch.sin, **options)
    assert text in str(raised.value)


def test_static_argnums_out_of_range():
    with pytest.raises(GradientValueError, match="checkpoint: static_argnums=5 needs at least 6 positional argument"):
        checkpoint(torch.sin, static_argnums=5)(X)


def test_not_a_function():
    with pytest.raises(GradientTypeError, match="checkpoint expects a function, but got 3 of type int"):
        checkpoint(3)
