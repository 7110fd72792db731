"""Graphs as text: what each line looks like, and that it means what the graph does."""

from __future__ import annotations

import itertools
import operator
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchbatch._torch.graphs import written_in_place
from torchbatch.core import views
from torchbatch.core.listing import letters, listing, of_trace, short
from torchbatch.core.program import Program
from torchbatch.core.signature import StaticArguments, bind
from torchbatch.testing import assert_close
from torchbatch.transforms.grad import grad
from torchbatch.transforms.jacobian import hessian, jacfwd
from torchbatch.transforms.jit import jit
from torchbatch.transforms.vmap import vmap

X, Y = torch.arange(15.0).reshape(3, 5) / 10, torch.arange(1.0, 16).reshape(3, 5) / 7
W, B = torch.linspace(-1, 1, 20).reshape(4, 5), torch.linspace(0, 1, 4)


def traced(fun, *args):
    with torch.no_grad():
        return Program(bind(fun, StaticArguments(fun, None, None), args, {})).trace


def lines(fun, *args):
    return of_trace(traced(fun, *args)).lines


# --- each kind of line -----------------------------------------------------------------------------------------------

ONE = {
    "element by element": (lambda x: x + x, "b:f32[3,5] = add a a"),
    "a number": (lambda x: x * 2, "b:f32[3,5] = mul a 2"),
    "a float": (lambda x: x * 0.1, "b:f32[3,5] = mul a 0.1"),
    "a whole float": (lambda x: x - 1e9, "b:f32[3,5] = sub a 1e+09"),
    "a number in front": (lambda x: 2**x, "b:f32[3,5] = pow 2 a"),
    "infinity": (lambda x: torch.where(x > 1, x, -torch.inf), "c:f32[3,5] = where b a -inf"),
    "a factor that is not usual": (lambda x: torch.add(x, x, alpha=3), "b:f32[3,5] = add[alpha=3] a a"),
    "an axis": (lambda x: x.sum(-1), "b:f32[3] = sum[dim=1] a"),
    "axes": (lambda x: x.amax((0, -1), keepdim=True), "b:f32[1,1] = amax[dim=[0,1],keepdim=True] a"),
    "all axes": (lambda x: x.sum(), "b:f32[] = sum a"),
    "an axis that is new": (lambda x: torch.stack([x, x], -1), "b:f32[3,5,2] = stack[dim=2] a a"),
    "a list": (lambda x: torch.cat([x, x]), "b:f32[6,5] = cat a a"),
    "a bound": (lambda x: x.clamp(min=0), "b:f32[3,5] = clamp[min=0] a"),
    "a flag": (lambda x: x.sort(descending=True), "b:f32[3,5] c:i64[3,5] = sort[descending=True] a"),
    "a name that begins with _": (lambda x: x.softmax(0), "b:f32[3,5] = softmax[dim=0] a"),
    "two results": (lambda x: x.max(1), "b:f32[3] c:i64[3] = max[dim=1] a"),
    "one of two results": (lambda x: x.max(1).indices, "_ b:i64[3] = max[dim=1] a"),
    "a comparison": (lambda x: x > 0, "b:bool[3,5] = gt a 0"),
    "a dtype": (lambda x: x.double(), "b:f64[3,5] = to[f64] a"),
    "a device": (lambda x: x.to("meta"), "b:f32[3,5] = to[meta] a"),
    "both": (lambda x: x.to("meta", torch.int8), "b:i8[3,5] = to[i8,meta] a"),
    "an index": (lambda x: x[torch.tensor([0, 2])], "b:f32[2,5] = index a [0,2]"),
    "an index of the last axis": (lambda x: x[:, torch.tensor([0, 2])], "b:f32[3,2] = index a [:,[0,2]]"),
    "a mask": (lambda x: x.masked_fill(x > 0, 7.0), "c:f32[3,5] = masked_fill a b 7.0"),
    "counting": (lambda x: torch.arange(3), "b:i64[3] = arange[end=3]"),
    "a draw": (lambda x: torch.rand(3), "b:f32[3] = rand"),
    "a bmm of one matrix": (lambda x: torch.bmm(x[None], x.T[None])[0].exp(), "b:f32[3,3] = mm a a.T"),
    "a bmm of several": (lambda x: torch.bmm(x[:, None], x[:, :, None]), "b:f32[3,1,1] = bmm a[:,None] a[:,:,None]"),
    "a convolution": (
        lambda x: torch.conv2d(x[None, None], torch.ones(1, 1, 3, 3), padding=1),
        "b:f32[1,1,3,5] = convolution[padding=1] a[None,None] 1.0:f32[1,1,3,3]",
    ),
}


@pytest.mark.parametrize("name", ONE)
def test_one_line(name):
    fun, line = ONE[name]
    assert line in lines(fun, X)


NONE = {
    "the input": (lambda x: x, "a"),
    "a copy": (lambda x: x.clone(), "a"),
    "a conversion that converts nothing": (lambda x: torch.ops.aten._to_copy(x, dtype=torch.float32), "a"),
    "a view and back": (lambda x: x.T.T[None][0].view(15).view(3, 5), "a"),
    "a transpose": (lambda x: x.T, "a.T"),
    "an index": (lambda x: x[-1], "a[2]"),
    "two indices": (lambda x: x[1, 2], "a[1,2]"),
    "an index of the last axis": (lambda x: x[:, 1], "a[:,1]"),
    "a slice": (lambda x: x[:, 1:3], "a[:,1:3]"),
    "a slice to the end": (lambda x: x[:, -2:], "a[:,3:]"),
    "a slice of a slice": (lambda x: x[:, 1:][:, ::2], "a[:,1::2]"),
    "every second up to": (lambda x: x[:, :4:2], "a[:,:3:2]"),
    "every second to the end": (lambda x: x[:, ::2], "a[:,::2]"),
    "a slice that is empty": (lambda x: x[:, 2:2], "a[:,2:2]"),
    "an index of a slice": (lambda x: x[1:, 1:][0, 3], "a[1,4]"),
    "a new axis": (lambda x: x[:, None], "a[:,None]"),
    "a new axis that went again": (lambda x: x[:, None].squeeze(1), "a"),
    "axes in another order": (lambda x: x[None].permute(2, 1, 0), "a.T[:,:,None]"),
    "the last two swapped": (
        lambda x: x.view(5, 3, 1).expand(5, 3, 2).reshape(2, 3, 5).mT,
        "a.view(5,3,1).expand(5,3,2).view(2,3,5).mT",
    ),
    "three in another order": (
        lambda x: x[:, :, None].expand(3, 5, 2).reshape(2, 3, 5).permute(1, 2, 0),
        "a[:,:,None].expand(3,5,2).view(2,3,5).permute(1,2,0)",
    ),
    "repeats in front": (lambda x: x.expand(2, 3, 5), "a.expand(2,3,5)"),
    "a repeat": (lambda x: x[0].expand(2, 5), "a[0].expand(2,5)"),
    "a part of a repeat": (lambda x: x.expand(4, 3, 5)[1:3, 1], "a[1].expand(2,5)"),
    "a shape without elements": (lambda x: x[:0].view(0), "a[:0].view(0)"),
    "a shape": (lambda x: x.view(5, 3), "a.view(5,3)"),
    "a shape of a shape": (lambda x: x.view(15).view(5, 3), "a.view(5,3)"),
    "a shape of a transpose": (lambda x: x.T.reshape(15), "a.T.view(15)"),
    "one of several parts": (lambda x: x.split(2, 1)[1], "a[:,2:4]"),
    "one of all parts": (lambda x: x.unbind(1)[1], "a[:,1]"),
    "another view": (lambda x: x.diagonal(1), "a.diagonal(1)"),
    "a view of windows": (lambda x: x.unfold(1, 2, 1)[0], "a.unfold(1,2,1)[0]"),
    "what is written over": (lambda x: torch.zeros(3, 5).copy_(x), "a"),
    "what is filled": (lambda x: x.clone().fill_(x[0, 1]), "a[0,1].expand(3,5)"),
    "what is filled with a number": (lambda x: x.clone().fill_(2), "2.0:f32[3,5]"),
    "what is filled with a constant": (lambda x: x.clone().fill_(torch.tensor(3)), "3.0:f32[3,5]"),
    "ones": (lambda x: torch.ones(3), "1.0:f32[3]"),
    "zeros of its kind": (lambda x: torch.zeros_like(x), "0.0:f32[3,5]"),
    "full": (lambda x: torch.full((2,), 7), "7:i64[2]"),
    "a view of a constant": (lambda x: x.new_full((2, 3), True, dtype=torch.bool).T, "True:bool[3,2]"),
    "a constant that was converted": (lambda x: torch.ones(2).long(), "1:i64[2]"),
    "a number": (lambda x: 2.5, "2.5:f32[]"),
    "a complex number": (lambda x: torch.full((), 2j), "2j:c64[]"),
    "a small tensor": (lambda x: torch.tensor([[1.0, 2.0]]), "[[1.0,2.0]]"),
    "two": (lambda x: (x.T, x[0]), "a.T a[0]"),
    "none": (lambda x: (), ""),
}


@pytest.mark.parametrize("name", NONE)
def test_no_line(name):
    fun, text = NONE[name]
    assert lines(fun, X) == ["inputs a:f32[3,5]", f"return {text}".rstrip()]


def test_a_size_of_1_that_went_and_came_again():
    assert lines(lambda x: x.sum(0, keepdim=True).squeeze(0)[None], X)[-1] == "return b"
    assert lines(lambda x: x.sum(1, keepdim=True).T[0][:, None], X)[-1] == "return b"


def test_a_view_that_computes_is_an_operation():
    z = torch.ones(2, dtype=torch.complex64)
    assert lines(lambda z: z.conj(), z)[1] == "b:c64[2] = conj a"
    assert lines(lambda x: x.view(torch.int32), X)[1] == "b:i32[3,5] = view a"


def test_a_constant_that_is_long_has_a_letter():
    long = list(range(7))
    assert lines(lambda x: x + torch.tensor(long).sum(), X)[1:4] == [
        "b:i64[7] = constant",
        "c:i64[] = sum b",
        "d:f32[3,5] = add a c",
    ]


def test_a_constant_has_its_shape_where_nothing_else_gives_it():
    assert lines(lambda x: torch.ones(3) * torch.zeros(3), X)[1] == "b:f32[3] = mul 1.0:f32[3] 0.0:f32[3]"
    assert lines(lambda x: torch.zeros(2, 3) @ x, X)[1] == "b:f32[2,5] = mm 0.0:f32[2,3] a"
    assert lines(lambda x: torch.ones(3, 5) * x, X)[1] == "b:f32[3,5] = mul 1.0 a"


# --- whole listings --------------------------------------------------------------------------------------------------


def test_captured_tensors_stand_apart():
    assert lines(lambda x: torch.tanh(W @ x.T)[0] + B[0], X) == [
        "inputs a:f32[3,5]; captured b:f32[4,5] c:f32[4]",
        "d:f32[4,3] = mm b a.T",
        "e:f32[4,3] = tanh d",
        "f:f32[3] = add e[0] c[0]",
        "return f",
    ]


def test_no_inputs():
    assert lines(lambda: torch.ones(2).exp()) == ["inputs", "a:f32[2] = exp 1.0:f32[2]", "return a"]


def test_what_is_written_in_place():
    def update(x, y):
        y[0] = x[0] * 2
        return y.sum()

    expected = [
        "inputs a:f32[3,5] b:f32[3,5]",
        "c:f32[5] = mul a[0] 2",
        "d:f32[3,5] = select_scatter[dim=0,index=0] b c",
        "e:f32[] = sum d",
        "b <- d",
        "return e",
    ]
    assert lines(update, X, Y) == expected
    trace = traced(update, X, Y)
    assert listing(written_in_place(trace), 0).splitlines() == expected


def test_a_backward_pass():
    x = torch.ones(2, 5, requires_grad=True)

    def fun(x):
        return (x @ W.T).exp()

    trace = Program(bind(fun, StaticArguments(fun, None, None), (x,), {})).trace
    assert of_trace(trace).lines == [
        "inputs a:f32[2,5]; captured b:f32[4,5]; tangents c:f32[2,4]",
        "d:f32[2,4] = mm a b.T",
        "e:f32[2,4] = exp d",
        "f:f32[2,4] = mul c e",
        "g:f32[2,5] = mm f b",
        "return e; gradients g",
    ]
    assert listing(trace.graph, 1, tangents=1).splitlines()[0] == of_trace(trace).lines[0]
    assert listing(trace.graph, 1, tangents=1).splitlines()[-1] == "return e g"


def test_sizes_that_are_left_open():
    low = jit(vmap(lambda x: x.reshape(6)[1:3].flip(0) * x.sum()), dynamic=True, backend="eager").lower(torch.ones(7, 2, 3))
    size = re.search(r"inputs a:f32\[(\w+),2,3\]$", listing(low.graph, 0).splitlines()[0])[1]
    assert listing(low.graph, 0).replace(size, "n").splitlines() == [
        "inputs a:f32[n,2,3]",
        "b:f32[n,2] = flip[dims=1] a.view(n,6)[:,1:3]",
        "c:f32[n] = sum[dim=[1,2]] a",
        "d:f32[n,2] = mul b c[:,None]",
        "return d",
    ]


def test_sizes_that_are_computed():
    def fun(x):
        n = x.shape[0]
        return vmap(torch.sin)(x).view(n * 2, 3)[1 : n + 2] * (n - 1)

    text = listing(jit(fun, dynamic=True, backend="eager").lower(torch.ones(7, 2, 3)).graph, 0)
    size = re.match(r"inputs a:f32\[(\w+),2,3\]", text)[1]
    assert text.replace(size, "n").splitlines() == [
        "inputs a:f32[n,2,3]",
        "b:f32[n,2,3] = sin a",
        "c:f32[n+1,3] = mul b.view(2*n,3).slice(0,1,n+2) n-1",
        "return c",
    ]


def test_an_operator_of_another_kind():
    """What has no schema is listed all the same: a branch, or a Python function."""
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    branch = graph.get_attr("branch")
    chosen = graph.call_function(torch.ops.higher_order.cond, (x, branch, branch, (x,)))
    part = graph.call_function(operator.getitem, (chosen, 0))
    graph.output((part, None))
    x.meta["val"], chosen.meta["val"], part.meta["val"] = X, (X,), X
    module = torch.fx.GraphModule({"branch": torch.nn.Identity()}, graph)
    assert listing(module, 0).splitlines() == [
        "inputs a:f32[3,5]",
        "b:f32[3,5] = cond a branch branch a",
        "return b None",
    ]


def test_letters():
    first = list(itertools.islice(letters(), 30))
    assert first[:3] == ["a", "b", "c"] and first[24:29] == ["y", "z", "aa", "ab", "ac"]


@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        (torch.float64, "f64"),
        (torch.bfloat16, "bf16"),
        (torch.uint8, "u8"),
        (torch.complex128, "c128"),
        (torch.bool, "bool"),
        (torch.float8_e4m3fn, "f8_e4m3fn"),
    ],
)
def test_short_names_of_dtypes(dtype, name):
    assert short(dtype) == name


# --- the text means what the graph does ------------------------------------------------------------------------------


DTYPES = {"f32": torch.float32, "f64": torch.float64, "i64": torch.int64, "bool": torch.bool}


class Reader:
    """Runs a listing: an independent reading of what it says."""

    def __init__(self, text: str) -> None:
        self.lines = text.splitlines()

    def __call__(self, *values):
        names = re.findall(r"(\w+):\w+\[", self.lines[0])
        self.space = dict(zip(names, values, strict=True))
        for line in self.lines[1:-1]:
            self.step(line)
        return [self.operand(text) for text in self.lines[-1].split()[1:]]

    def step(self, line: str) -> None:
        results, call = line.split(" = ")
        name, settings, operands = re.fullmatch(r"(\w+)(?:\[(.*?)\](?= |$))? ?(.*)", call).groups()
        values = self.run(name, settings, [self.operand(text) for text in operands.split()])
        values = values if isinstance(values, tuple) else (values,)
        for result, value in zip(results.split(), values, strict=True):
            if result != "_":
                self.keep(result, value)

    def keep(self, result: str, value: torch.Tensor) -> None:
        letter, dtype, shape = re.fullmatch(r"(\w+):(\w+)\[(.*)\]", result).groups()
        sizes = [int(n) for n in shape.split(",") if n]
        while value.dim() > len(sizes) and value.shape[0] == 1:  # axes of size 1 in front are left to the reader
            value = value[0]
        assert value.dtype is DTYPES[dtype], result
        self.space[letter] = value.expand(sizes)

    def run(self, name, settings, operands):
        if name in ("mm", "bmm", "mv", "dot"):
            return torch.matmul(*operands)
        if name == "to":
            return operands[0].to(DTYPES[settings])
        if name == "tanh_backward":
            return operands[0] * (1 - operands[1] ** 2)
        keywords = eval(f"dict({settings or ''})")
        if name in ("stack", "cat"):
            return getattr(torch, name)(operands, **keywords)
        return getattr(torch, name)(*operands, **keywords)

    def operand(self, text: str):
        typed = re.fullmatch(r"(-?[\w.+-]+):(\w+)\[(.*)\]", text)
        if typed:
            number, dtype, shape = typed.groups()
            return torch.full([int(n) for n in shape.split(",") if n], eval(number), dtype=DTYPES[dtype])
        if text.startswith("["):
            return torch.tensor(eval(text))
        if re.fullmatch(r"-?\d[\d.e+-]*", text):
            return eval(text)
        letter = re.match(r"\w+", text)[0]  # it may be a keyword, such as "as"
        return eval("it" + text[len(letter) :].replace(".view(", ".reshape("), {"it": self.space[letter]})


def mlp(x, w, b):
    return (torch.tanh(torch.tanh(x @ w.T + b) @ w) ** 2).sum()


MEANT = {
    "a model": (vmap(lambda x: mlp(x, W, B)), (X,)),
    "its gradient": (grad(lambda w: mlp(X, w, B)), (W,)),
    "gradients per example": (vmap(grad(mlp, (1, 2)), (0, None, None)), (X, W, B)),
    "a Hessian": (hessian(lambda x: mlp(x, W, B)), (X[0],)),
    "Jacobians of a batch": (vmap(jacfwd(lambda x: torch.sin(W @ x))), (X,)),
    "two axes": (vmap(vmap(lambda x, y: (x - y).abs().max(), (None, 0)), (0, None)), (X, Y)),
    "outer products": (vmap(lambda x, y: x[:, None] * y - x.sum()), (X, Y)),
    "axes in other places": (vmap(lambda x, y: x * y, (1, 0), 1), (X, Y.T)),
    "three axes": (lambda x: torch.einsum("bij,bkj->bik", x, x + 1).mT @ x, (torch.randn(2, 3, 4),)),
    "one of everything": (lambda x: x[0] @ x.view(5, 3)[:, :2] + x[:2, 0] * x.T.reshape(15)[3], (X,)),
    "leading ones": (lambda x: x[None] + torch.stack([x[:1], x[1:2]]), (X,)),
    "a size of 1 in the middle": (lambda x: x.sum(1, keepdim=True) * x[:, None, :].mean(1), (X,)),
}


@pytest.mark.parametrize("name", MEANT)
def test_the_text_says_what_is_done(name):
    fun, args = MEANT[name]
    trace = traced(fun, *args)
    found = Reader("\n".join(of_trace(trace).lines))(*args, *trace.captured)
    expected = trace.graph(*args, *trace.captured)
    for ours, theirs in zip(found, expected, strict=True):
        assert_close(ours.reshape(theirs.shape), theirs)


# Each of these makes one view out of another, if it can, from two numbers.
STEPS = {
    "permute": lambda x, i, j: x.transpose(i % x.dim(), j % x.dim()) if x.dim() else x,
    "select": lambda x, i, j: x.select(i % x.dim(), j % x.shape[i % x.dim()]) if x.dim() else x,
    "slice": lambda x, i, j: x.narrow(i % x.dim(), j % 2, max(x.shape[i % x.dim()] - j % 2, 0)) if x.dim() else x,
    "steps": lambda x, i, j: x[(slice(None),) * (i % x.dim()) + (slice(j % 2, None, 2),)] if x.dim() else x,
    "new": lambda x, i, j: x.unsqueeze(i % (x.dim() + 1)),
    "squeeze": lambda x, i, j: x.squeeze(),
    "expand": lambda x, i, j: x.expand([2 if n == 1 else n for n in x.shape]),
    "in front": lambda x, i, j: x.expand(2, *x.shape),
    "flat": lambda x, i, j: x.reshape(-1),
    "split": lambda x, i, j: x.reshape(2, -1) if x.numel() % 2 == 0 else x,
    "ones": lambda x, i, j: x.reshape(1, *x.shape, 1),
}
CHAINS = st.lists(st.tuples(st.sampled_from(sorted(STEPS)), st.integers(0, 3), st.integers(0, 3)), max_size=6)


@given(CHAINS, st.sampled_from([(4, 3), (2, 1, 3), (1, 1, 6), (6,), ()]))
@settings(max_examples=60)
def test_chains_of_views(chain, shape):
    start = torch.arange(1.0, 1 + torch.Size(shape).numel()).reshape(shape)

    def fun(x):
        for name, i, j in chain:
            if 0 not in x.shape:
                x = STEPS[name](x, i, j)
        return x, x.exp(), x[..., None] + x.reshape(-1)

    trace = traced(fun, start)
    lines = of_trace(trace).lines
    found = Reader("\n".join(lines))(start, *trace.captured)
    for ours, theirs in zip(found, fun(start), strict=True):
        assert ours.shape == theirs.shape, lines
        assert_close(ours, theirs)


def test_a_view_in_terms_of_its_base():
    base = views.named("a", (2, 1, 3))
    assert views.broadcast_text(views.permuted(base, [1, 0, 2])) == "a[:,0]"
    assert views.broadcast_text(views.reshaped(base, (1, 2, 3))) == "a[:,0]"
    assert views.text(views.reshaped(base, (6,))) == "a.view(6)"
