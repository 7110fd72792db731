"""What loops and choices refuse, in which words, and whether JAX refuses it too."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import torchbatch
from torchbatch import errors, lax, vmap

jax = pytest.importorskip("jax")
JAX = SimpleNamespace(lax=jax.lax, np=jax.numpy, vmap=jax.vmap, grad=jax.grad)
OURS = SimpleNamespace(lax=lax, np=torch, vmap=vmap, grad=torchbatch.grad)


def summing(c, x):
    return c + x, c


# name: the call, the class, what its text must say
REFUSED = {
    "predicate with axes": (lambda m, x: m.lax.cond(x > 0, lambda: 1, lambda: 2), errors.InputTypeError, "pred .* bool[5].*vmap"),
    "no predicate": (lambda m, x: m.lax.cond("yes", lambda: 1, lambda: 2), errors.InputTypeError, "pred .*'yes'"),
    "branches of other structures": (
        lambda m, x: m.vmap(lambda x: m.lax.cond(x > 0, lambda: (x, x), lambda: x))(x),
        errors.OutputTypeError,
        "same structure",
    ),
    "branches of other shapes": (
        lambda m, x: m.vmap(lambda x: m.lax.cond(x > 0, lambda: {"a": x}, lambda: {"a": x + m.np.ones(3)}))(x),
        errors.OutputTypeError,
        r"identical types.*output['a'].*float32[] .*float32[3]",
    ),
    "branches of other dtypes": (
        lambda m, x: m.vmap(lambda x: m.lax.cond(x > 0, lambda: x, lambda: x > 1))(x),
        errors.OutputTypeError,
        "identical types.*float32[] .*bool[]",
    ),
    "index is no integer": (lambda m, x: m.lax.switch(x[0], [lambda: 1, lambda: 2]), errors.InputTypeError, "index .*float32"),
    "no list of branches": (
        lambda m, x: m.lax.switch(0, 1, x),
        errors.AxisSpecError,
        "switch: branches must be a list of functions, but it is 1 of type int",
    ),
    "carry of another kind of tree": (
        lambda m, x: m.lax.scan(lambda c, z: ({"a": c[0]}, z), (x, x), x),
        errors.OutputTypeError,
        "differ. carry goes in as a tuple of length 2 and comes out as a dict with keys ['a']. Return it as it goes in.",
    ),
    "a part of the value of another structure": (
        lambda m, x: m.lax.while_loop(lambda c: c["a"][0] < 3, lambda c: {"a": (c["a"][0] + 1,)}, {"a": (0, x)}),
        errors.OutputTypeError,
        "the value['a'] goes in as a tuple of length 2 and comes out as a tuple of length 1. Return it",
    ),
    "no branches": (lambda m, x: m.lax.switch(0, []), errors.AxisError, "at least one"),
    "select of other shapes": (
        lambda m, x: m.lax.select(x > 0, x, x[:1]),
        errors.InputTypeError,
        "on_false is float32[1] and on_true is float32[5]",
    ),
    "select by numbers": (lambda m, x: m.lax.select(x, x, x), errors.InputTypeError, "truth values.*float32[5]"),
    "select by another shape": (lambda m, x: m.lax.select(x[:1] > 0, x, x), errors.InputTypeError, "bool[1]"),
    "three cases for two values": (lambda m, x: m.lax.select_n(x > 0, x, x, x), errors.AxisError, "two cases"),
    "carry of another shape": (
        lambda m, x: m.lax.scan(lambda c, z: (c + x, c), 0.0, x),
        errors.OutputTypeError,
        "identical types, but they differ at carry: it goes in as float32[] and comes out as float32[5]",
    ),
    "carry of another dtype": (
        lambda m, x: m.lax.scan(lambda c, z: ((c[0], {"a": c[1]["a"] > 0}), z), (x, {"a": x}), x),
        errors.OutputTypeError,
        "carry[1]['a']: it goes in as float32[5] and comes out as bool[5]",
    ),
    "carry of another structure": (
        lambda m, x: m.lax.scan(lambda c, z: ((c[0], {"b": c[1]["a"]}), z), (x, {"a": x}), x),
        errors.OutputTypeError,
        "identical structure.*['a'].*['b']",
    ),
    "no pair": (lambda m, x: m.lax.scan(lambda c, z: c, x, x), errors.OutputTypeError, "pair (carry, y)"),
    "carry of a string": (lambda m, x: m.lax.scan(summing, "a", x), errors.InputTypeError, "carry is 'a'"),
    "y of a string": (lambda m, x: m.lax.scan(lambda c, z: (c, "y"), 0.0, x), errors.OutputTypeError, "y .*'y'"),
    "xs of other lengths": (
        lambda m, x: m.lax.scan(lambda c, z: (c, z), 0.0, (x, {"b": x[:3]})),
        errors.AxisError,
        "xs[0] has 5 slices, but xs[1]['b'] (float32[3]) has 3",
    ),
    "length and xs": (lambda m, x: m.lax.scan(summing, 0.0, x, length=4), errors.AxisError, "length is 4, but xs"),
    "neither length nor xs": (lambda m, x: m.lax.scan(summing, 0.0, None), errors.AxisError, "length must say"),
    "xs without axes": (lambda m, x: m.lax.scan(summing, 0.0, x[0]), errors.AxisError, "single number"),
    "map over a number": (lambda m, x: m.lax.map(lambda z: z, 1.0), errors.AxisError, "single number"),
    "condition with axes": (
        lambda m, x: m.lax.while_loop(lambda c: c > 0, lambda c: c, x),
        errors.InputTypeError,
        "single number.*bool[5]",
    ),
    "condition is no truth value": (
        lambda m, x: m.lax.while_loop(lambda c: c, lambda c: c, x[0]),
        errors.InputTypeError,
        "truth value.*float32[]",
    ),
    "value of another shape": (
        lambda m, x: m.lax.while_loop(lambda c: c["v"].sum() < 9, lambda c: {"v": c["v"][None]}, {"v": x}),
        errors.OutputTypeError,
        "the value['v']: it goes in as float32[5] and comes out as float32[1,5]",
    ),
    "bound with a fraction": (
        lambda m, x: m.lax.fori_loop(0, x[4], lambda i, c: c, 0.0),
        errors.InputTypeError,
        "upper .*integer",
    ),
    "while in reverse mode": (
        lambda m, x: m.grad(lambda x: m.lax.while_loop(lambda c: c < 9, lambda c: c * 2, x))(x[4]),
        errors.UnsupportedOperationError,
        "no gradient in reverse mode",
    ),
    "while in reverse mode, closed over": (
        lambda m, x: m.grad(lambda x: m.lax.while_loop(lambda c: c < 9, lambda c: c + x, 0.0))(x[4]),
        errors.UnsupportedOperationError,
        "no gradient in reverse mode",
    ),
    "while in reverse mode, mapped": (
        lambda m, x: m.grad(lambda x: m.vmap(lambda x: m.lax.while_loop(lambda c: c < 9, lambda c: c + 2, x))(x).sum())(x),
        errors.UnsupportedOperationError,
        "no gradient in reverse mode",
    ),
    "fori in reverse mode, bounds of each sample": (
        lambda m, x: m.vmap(m.grad(lambda x: m.lax.fori_loop(0, (x > 0) * 2, lambda i, c: c * 2, x)))(x),
        errors.UnsupportedOperationError,
        "fori_loop whose bounds differ",
    ),
    "elems of other sizes": (
        lambda m, x: m.lax.associative_scan(lambda a, b: a, (x, x[:3])),
        errors.AxisError,
        "elems[0] is float32[5] and elems[1] is float32[3]",
    ),
    "fn of another shape": (
        lambda m, x: m.lax.associative_scan(lambda a, b: a.sum(), x),
        errors.OutputTypeError,
        "identical types.*float32[2] and comes out as float32[]",
    ),
}
NUMBERS = [-1.0, -0.5, 0.0, 0.5, 1.0]


def pattern(text):
    return re.compile(".*".join(map(re.escape, text.split(".*"))), re.DOTALL)


@pytest.mark.parametrize("name", REFUSED)
def test_refused_as_in_jax(name):
    call, error, text = REFUSED[name]
    with pytest.raises(error) as caught:
        call(OURS, torch.tensor(NUMBERS))
    assert pattern(text).search(str(caught.value)), str(caught.value)
    with pytest.raises((TypeError, ValueError, IndexError, NotImplementedError)):
        call(JAX, jax.numpy.array(NUMBERS))


@pytest.mark.parametrize("name", [name for name in REFUSED if name not in ("no predicate", "no branches")])
def test_refused_when_traced(name):
    call, error, text = REFUSED[name]
    with pytest.raises(error) as caught:
        torchbatch.jit(lambda x: call(OURS, x), backend="eager")(torch.tensor(NUMBERS))
    assert pattern(text).search(str(caught.value)), str(caught.value)


def changing(x):
    ys = iter([x, (x, x)])
    return lax.scan(lambda c, z: (c, next(ys)), 0, x)


def late(c, x):
    return c + 1, {"a": x > 0 if c == 300 else x}


def one():
    return 1


def half():
    return 0.5


KINDS = iter([torch.ones(2), torch.ones(())])

# What only PyTorch can do, or JAX leaves undefined.
OWN = {
    "no function": (lambda x: lax.cond(True, 1, 2), errors.AxisSpecError, "true_fun must be a function"),
    "operands twice": (lambda x: lax.cond(True, torch.sin, torch.cos, x, operand=x), errors.AxisSpecError, "not both"),
    "body is no function": (lambda x: lax.scan(None, 0, x), errors.AxisSpecError, "f must be a function"),
    "unroll": (lambda x: lax.scan(summing, 0, x, unroll=2.5), errors.AxisSpecError, "unroll must be an int"),
    "batch_size": (lambda x: lax.map(torch.sin, x, batch_size=-1), errors.AxisError, "map: batch_size must be at least 0"),
    "axis": (lambda x: lax.associative_scan(torch.add, x, axis=1), errors.AxisError, "axis 1 is out of bounds.*float32[5]"),
    "y that changes": (changing, errors.OutputTypeError, "same structure at every step"),
    "type of y that changes late": (
        lambda x: lax.scan(late, 0, torch.zeros(600)),
        errors.OutputTypeError,
        "scan: late must return the same types at every step, but y['a'] is float32[] at one step and bool[] at another",
    ),
    "result of map that changes": (
        lambda x: lax.map(lambda z: next(KINDS), x),
        errors.OutputTypeError,
        "map: <lambda> must return the same types at every step, but output is float32[2] at one step and float32[] at another",
    ),
    "result of map": (lambda x: lax.map(lambda z: "y", x), errors.OutputTypeError, "map: output that <lambda> returns is 'y'"),
    "no steps, and values needed": (
        lambda x: lax.scan(lambda c, z: (c, z.item()), 0.0, x[:0]),
        errors.DataDependentError,
        "scan: there are no steps, so that scan looks at shapes and dtypes alone. Here the function needs the value .*(item)",
    ),
    "numbers of two kinds": (
        lambda x: vmap(lambda x: lax.cond(x > 0, one, half))(x),
        errors.OutputTypeError,
        "half returns float32[] and one returns 1 of type int",
    ),
    "case is no array": (lambda x: lax.select(x > 0, "a", "b"), errors.InputTypeError, "on_false is 'b'"),
}


@pytest.mark.parametrize("name", OWN)
def test_refused(name):
    call, error, text = OWN[name]
    with pytest.raises(error) as caught:
        call(torch.tensor(NUMBERS))
    assert pattern(text).search(str(caught.value)), str(caught.value)


def test_a_step_may_not_hand_on_a_carry_that_it_wrote_into():
    def step(c, x):
        c += x
        return c, c

    with pytest.raises(errors.InPlaceError, match="step writes in place into its carry"):
        lax.scan(step, torch.zeros(()), torch.arange(3.0))
    with pytest.raises(errors.InPlaceError, match="belongs into the carry"):
        torchbatch.jit(lambda x: lax.scan(step, torch.zeros(()), x), backend="eager")(torch.arange(3.0))


def test_a_branch_may_not_write_when_traced():
    total = torch.zeros(())
    with pytest.raises(errors.InPlaceError, match="writes in place"):
        torchbatch.jit(lambda x: lax.cond(x > 0, lambda: total.add_(x), lambda: x), backend="eager")(torch.tensor(1.0))


def test_reverse_mode_of_a_while_loop_is_refused_by_backward_too():
    x = torch.tensor(2.0, requires_grad=True)
    result = lax.while_loop(lambda c: c < 100, lambda c: c * x, torch.tensor(1.0))
    with pytest.raises(errors.UnsupportedOperationError, match="no gradient in reverse mode"):
        result.backward()
    with torch.no_grad():
        assert lax.while_loop(lambda c: c < 100, lambda c: c * x, torch.tensor(1.0)) == 128


def test_operators_of_torch_that_take_functions_are_refused_by_jit():
    both = torchbatch.jit(lambda x: torch.cond(x.sum() > 0, torch.sin, torch.cos, (x,)), backend="eager")
    with pytest.raises(errors.UnsupportedOperationError, match=r"torch's operator 'cond'.*torchbatch\.lax"):
        both(torch.ones(2))


def test_python_control_flow_in_a_body_is_refused_when_traced():
    step = lambda c, x: (c + x if x > 0 else c, c)  # noqa: E731
    with pytest.raises(errors.DataDependentError):
        torchbatch.jit(lambda x: lax.scan(step, torch.zeros(()), x), backend="eager")(torch.ones(3))


def test_a_carry_that_is_written_and_handed_on_in_another_place():
    def step(c, x):
        a, b = c
        a += x
        return (b, a), a

    with pytest.raises(errors.InPlaceError, match="step writes in place into its carry"):
        lax.scan(step, (torch.zeros(2), torch.zeros(2)), torch.ones(4, 2))


def test_the_device_belongs_to_the_type_of_a_carry():
    step = lambda c, x: ({"a": torch.empty(3, device="cuda")}, None)  # noqa: E731
    with FakeTensorMode(), pytest.raises(errors.OutputTypeError) as caught:  # no such device is needed
        lax.scan(step, {"a": torch.zeros(3)}, torch.ones(2))
    for text in ("differ at carry['a']: it goes in as float32[3] on cpu and comes out as float32[3] on cuda", "move (.to)"):
        assert text in str(caught.value)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_number_in_the_carry_goes_where_the_step_takes_it():
    x = torch.ones(2, device="cuda")
    last, _ = lax.scan(lambda c, x: (c + x, None), 0.0, x)
    kept, _ = lax.scan(lambda c, x: (1.0, None), x[0], x)
    assert last.device.type == kept.device.type == "cuda" and last.dtype is torch.float32 and last == 2
    with pytest.raises(errors.OutputTypeError, match=r"on cuda:0 and comes out as float32\[2\] on cpu"):
        lax.scan(lambda c, x: (c.cpu(), None), x, x)
    with pytest.raises(errors.OutputTypeError, match=r"on cuda:0 and comes out as float32\[2\] on cpu"):
        torchbatch.jit(lambda x: lax.while_loop(lambda c: c[0] < 9, lambda c: c.cpu() + 1, x), backend="eager")(x)
