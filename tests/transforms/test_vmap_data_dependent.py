"""Rule 14: where Python needs a per-sample value, the error points at the user's line and names the way out."""

from __future__ import annotations

import linecache
import re

import pytest
import torch
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp
from torch.func import vmap as tvmap

import torchbatch
from torchbatch import vmap
from torchbatch.errors import DataDependentError, TorchbatchError, UnsupportedOperationError
from torchbatch.testing import assert_close, loop

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))

TRUTH = (
    "Python needs one True or False here (an if, a while, an assert, and, or, in), but the value varies from sample to sample. "
    "Compute both sides and choose with torch.where(condition, a, b)."
)
NUMBER = (
    "Python needs one number here (.item(), int(), float(), a format, a list index, a range, a size), but the value varies from "
    "sample to sample. Keep it a tensor: index with x[i] or torch.gather, choose with torch.where; or pass it as an unmapped "
    "argument."
)
MEMORY = (
    "The memory of a per-sample tensor is asked for (.numpy(), .tolist(), NumPy functions, copy.deepcopy, pickle, .data_ptr()), "
    "but it holds all samples at once. Use torch operations inside the function, and convert its result."
)
FIXED = "Fixed shapes work: torch.where(mask, x, fill) keeps every element, torch.topk or sorting picks a fixed number."
MASK = "A boolean mask that varies from sample to sample selects a different number of elements for each. " + FIXED
SHAPE = "The shape of what {} returns depends on values that vary from sample to sample. " + FIXED
RAGGED = "The shape of what is computed here depends on values that vary from sample to sample. " + FIXED
COMPARED = (
    "Python needs one True or False from comparing per-sample tensors. Use (a == b).all() or torch.isclose(a, b).all(), which "
    "stay tensors."
)
ONE_HOT = (
    "one_hot has to look at the values to find the number of classes, which vary from sample to sample. Give num_classes."
)
SECTIONS = (
    "tensor_split cuts at places that vary from sample to sample, so the parts have no fixed shape. Give the places as numbers "
    "or as an unmapped tensor, or read windows of one length with torch.narrow or torch.gather."
)

LINES = {
    "if x[0] > 0: return x": TRUTH,
    "return x if x.sum() > 0 else -x": TRUTH,
    "while x[0] > 0: x = x - 1": TRUTH,
    "return (x[0] > 0) and x": TRUTH,
    "return (x[0] > 0) or x": TRUTH,
    "return x * (not x[0])": TRUTH,
    "assert x[0] > 0, 'not positive'": TRUTH,
    "return x * (x[0] in [x[1], x[2]])": TRUTH,
    "return x * (0 < x[0] < 1)": TRUTH,
    "return x * bool(x[0])": TRUTH,
    "return x * x[0].is_nonzero()": TRUTH,
    "return max(x[0], x[1])": TRUTH,
    "return torch.stack(sorted(x))": TRUTH,
    "return x * sum(1 for v in x if v > 0)": TRUTH,
    "return x * any(v > 0 for v in x)": TRUTH,
    "return torch.stack([v for v in x if v > 0])": TRUTH,
    "return torch.nn.functional.dropout(x, x[0])": TRUTH,
    "return x * (1.0 in x)": NUMBER,
    "return x * x[0].item()": NUMBER,
    "return x * int(x[0])": NUMBER,
    "return x * float(x[0])": NUMBER,
    "return x * complex(x[0])": NUMBER,
    "return x * [1, 2, 3][x[0].long()]": NUMBER,
    "return x * operator.index(x[0].long())": NUMBER,
    "return sum(x for _ in range(x[0].long()))": NUMBER,
    "return torch.tensor([x[0], x[1]])": NUMBER,
    "return x * math.sin(x[0])": NUMBER,
    "return x * len(f'{x[0]:.2f}')": NUMBER,
    "return x[: x.argmax()]": NUMBER,
    "return torch.zeros(x.argmax())": NUMBER,
    "return torch.arange(x[0])": NUMBER,
    "return torch.arange(0, x[0])": NUMBER,
    "return torch.linspace(0, 1, x.argmax())": NUMBER,
    "return torch.full((int(x.argmax()),), 1.0)": NUMBER,
    "return torch.split(x, x.argmax())": NUMBER,
    "return x.view(x.argmax(), 2)": NUMBER,
    "return x[0].expand(x.argmax())": NUMBER,
    "return x * {1.0: 2}[x[0].item()]": NUMBER,
    "return torch.topk(x, x.argmax())[0]": NUMBER,
    "return torch.roll(x, int(x.argmax()))": NUMBER,
    "return torch.add(x, x, alpha=x[0])": NUMBER,
    "return x * sum(x.tolist())": MEMORY,
    "return x * x.numpy().sum()": MEMORY,
    "return x * np.asarray(x).sum()": MEMORY,
    "return x * np.sin(x)": MEMORY,
    "return torch.as_tensor(np.array([x[0], x[1]]))": MEMORY,
    "return copy.deepcopy(x)": MEMORY,
    "return pickle.loads(pickle.dumps(x))": MEMORY,
    "return x * x.data_ptr()": MEMORY,
    "return x * len(x.untyped_storage())": MEMORY,
    "return torch.from_dlpack(x)": MEMORY,
    "torch.save(x, io.BytesIO())": MEMORY,
    "return x[x > 0]": MASK,
    "return torch.masked_select(x, x > 0)": MASK,
    "return x[x.nonzero()[:, 0]]": SHAPE.format("nonzero"),
    "return x[x.nonzero(as_tuple=True)]": SHAPE.format("nonzero"),
    "return x[torch.where(x > 0)[0]]": SHAPE.format("where"),
    "return torch.unique(x)": SHAPE.format("_unique2"),
    "return torch.unique_consecutive(x)": SHAPE.format("unique_consecutive"),
    "return x[torch.argwhere(x > 0)[:, 0]]": SHAPE.format("nonzero"),
    "return torch.bincount(x.abs().long())": SHAPE.format("bincount"),
    "return torch.repeat_interleave(x, x.abs().long())": SHAPE.format("repeat_interleave"),
    "return torch.nn.functional.one_hot(x.abs().long())": ONE_HOT,
    "return x * torch.allclose(x, x + 1)": COMPARED,
    "return x * torch.equal(x, x + 1)": COMPARED,
    "return torch.cat(torch.tensor_split(x, x.argmax()[None]))": SECTIONS,
}
IMPORTS = "import copy, io, math, operator, pickle\nimport numpy as np\nimport torch\n\n"


@pytest.fixture
def written(tmp_path):
    """A function of a file of the user's, whose body is one line, and where that line is."""

    def make(line, name="user_function"):
        path = tmp_path / "user_code.py"
        path.write_text(f"{IMPORTS}def {name}(x):\n    {line}\n    return x\n")
        linecache.checkcache(str(path))
        scope = {}
        exec(compile(path.read_text(), str(path), "exec"), scope)
        return scope[name], f"\n  in {name}, {path}:6\n    {line}"

    return make


@pytest.mark.parametrize("line", LINES)
def test_every_use_of_a_per_sample_value_by_python(line, written):
    fun, place = written(line)
    with pytest.raises(DataDependentError) as caught:
        vmap(fun)(X)
    text = re.sub("<(genexpr|listcomp)>", "user_function", str(caught.value))
    assert text == LINES[line] + place
    assert isinstance(caught.value, TypeError) and isinstance(caught.value, RuntimeError)


def test_what_the_loop_can_do_with_a_constant_vmap_can_too(written):
    for line in ("return x * int(torch.ones(()))", "return x if torch.ones(()) > 0 else -x", "return x[torch.ones(4) > 0]"):
        fun, _ = written(line)
        assert_close(vmap(fun)(X), loop(fun)(X))


# --- where the line is ------------------------------------------------------------------------------------------------


def helper(x):
    if x.sum() > 0:
        return x
    return -x


def calls_helper(x):
    return helper(x * 2) + 1


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(4, 1)

    def forward(self, x):
        return x if self.linear(x) > 0 else -x


LINE = "\n  in helper, {}:{}\n    if x.sum() > 0:"
AROUND = {
    "itself": vmap(helper),
    "a function that calls it": vmap(calls_helper),
    "a lambda": vmap(lambda x: helper(x)),
    "over axis 1": vmap(helper, 1, 1),
    "chunk_size": vmap(helper, chunk_size=2),
    "keyword": lambda x: vmap(lambda *, x: helper(x))(x=x),
    "vmap in vmap": vmap(vmap(lambda x: helper(x * 2))),
    "vmap in vmap, outer value": vmap(lambda x: vmap(lambda s: helper(x * 2) + s)(x)),
    "torch.func.vmap inside": vmap(tvmap(helper)),
    "torch.func.vmap outside": tvmap(vmap(helper)),
    "grad": vmap(grad(lambda x: helper(x).sum())),
    "grad of grad": vmap(grad(lambda y: grad(lambda x: helper(x).sum())(y).sum())),
    "torchbatch.grad": vmap(torchbatch.grad(lambda x: helper(x).sum())),
    "grad outside": grad(lambda x: vmap(helper)(x).sum()),
    "jacrev": vmap(jacrev(helper)),
    "jacfwd": vmap(jacfwd(helper)),
    "hessian": vmap(hessian(lambda x: helper(x).sum())),
    "jvp": vmap(lambda x: jvp(helper, (x,), (x,))),
    "vjp": vmap(lambda x: vjp(helper, x)[0]),
}


@pytest.mark.parametrize("how", AROUND)
def test_the_place_is_the_innermost_line_of_the_users_own(how):
    number = helper.__code__.co_firstlineno + 1
    x = X.expand(2, 3, 4) if "vmap in" in how or "func.vmap" in how else X
    with pytest.raises(DataDependentError) as caught:
        AROUND[how](x)
    assert str(caught.value) == TRUTH + LINE.format(__file__, number)


def test_a_value_that_is_the_same_along_the_inner_axis_only():
    def outer(x):
        return vmap(lambda s: s * 2 if x.sum() > 0 else s)(x)

    with pytest.raises(DataDependentError, match=r"in <lambda>, .*test_vmap_data_dependent.py:\d+\n    return vmap"):
        vmap(outer)(X)
    assert torch.equal(vmap(lambda s: s * 2 if X.sum() > -100 else s)(X), X * 2)


def test_the_place_in_a_module():
    with pytest.raises(DataDependentError, match=r"in forward, .*:\d+\n    return x if self.linear\(x\) > 0 else -x$"):
        vmap(Model())(X)


def test_a_statement_of_several_lines_is_found():
    def fun(x):
        return torch.where(
            x > 0,
            x,
            x.item(),
        )

    with pytest.raises(DataDependentError, match=r"in fun, .*:\d+\n    x\.item\(\),$"):
        vmap(fun)(X[:, :1])


def test_code_without_a_file_is_named_without_its_line():
    scope = {}
    exec("def typed(x):\n    return x.item()", scope)
    with pytest.raises(DataDependentError) as caught:
        vmap(scope["typed"])(X[:, 0])
    assert str(caught.value) == NUMBER + "\n  in typed, <string>:2"


def test_a_long_line_is_cut(written):
    fun, _ = written("return x.item()" + " + 1.0" * 30)
    with pytest.raises(DataDependentError) as caught:
        vmap(fun)(X[:, 0])
    *_, last = str(caught.value).splitlines()
    assert last.startswith("    return x.item() + 1.0") and last.endswith(" …") and len(last) <= 124


def test_a_function_of_pytorchs_own_has_the_callers_line():
    with pytest.raises(DataDependentError) as caught:
        vmap(torch.Tensor.item)(X[:, 0])
    text, place, line = str(caught.value).split("\n")
    assert text == NUMBER and place.startswith("  in test_a_function_of_pytorchs") and line.startswith("    vmap")


# --- errors that are not about all samples at once --------------------------------------------------------------------


@pytest.mark.parametrize(
    "line",
    [
        "return x.view(3, 3)",
        "return x @ torch.ones(3)",
        "return x[7]",
        "return undefined",
        "return torch.stack([x, x[:2]])",
        "raise KeyError('data-dependent control flow')",
        "return torch.autograd.grad(x.sum(), x)[0]",
        "return round(x[0])",
        "return {}['calling .item()']",
    ],
)
def test_errors_of_one_sample_come_out_as_they_are(line, written):
    fun, _ = written(line)
    with pytest.raises(Exception) as ours:
        vmap(fun)(X)
    with pytest.raises(Exception) as loops:
        loop(fun)(X)
    assert type(ours.value) is type(loops.value)
    assert not isinstance(ours.value, TorchbatchError)


@pytest.mark.parametrize(
    ("line", "text"),
    [
        (
            "x.sum().backward()",
            "backward() and requires_grad_() do not work inside a mapped function. Use torchbatch.grad of a function of the "
            "tensor.",
        ),
        (
            "x.requires_grad_()",
            "backward() and requires_grad_() do not work inside a mapped function. Use torchbatch.grad of a function of the "
            "tensor.",
        ),
        (
            "return x.to_sparse()",
            "Sparse tensors cannot be made or used inside a mapped function. Use dense ones inside, and convert the result.",
        ),
    ],
)
def test_what_cannot_be_done_for_all_samples_at_once(line, text, written):
    fun, place = written(line)
    with pytest.raises(UnsupportedOperationError) as caught:
        vmap(fun)(X)
    assert str(caught.value) == text + place
