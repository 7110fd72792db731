"""How an error finds the tensor that the failing line writes to, and which errors are left alone."""

from __future__ import annotations

import pytest
import torch

from torchbatch import vmap
from torchbatch._torch import explain
from torchbatch.errors import DataDependentError, InPlaceError

X, T = torch.ones(3, 4), torch.zeros(4)


class Holder:
    def __init__(self):
        self.t, self.d, self.l, self.key, self.none = torch.zeros(4), {"k": torch.zeros(4)}, [torch.zeros(4)], "k", None


HOLDER = Holder()
WRITES = {
    "T[0] = x[0]": "T[0]",
    "T.add_(x)": "T",
    "T.view(2, 2).T.add_(x.view(2, 2))": "T.view(2, 2).T",
    "HOLDER.t += x": "HOLDER.t",
    "HOLDER.d['k'][1:] = x[1:]": "HOLDER.d['k'][1:]",
    "HOLDER.d[HOLDER.key].copy_(x)": "HOLDER.d[HOLDER.key]",
    "HOLDER.l[0][0] = x[0]": "HOLDER.l[0][0]",
    "torch.add(x, 1, out=HOLDER.t)": None,
    "[t.add_(x) for t in HOLDER.l]": "t",
}


@pytest.mark.parametrize("line", WRITES)
def test_the_expression_that_is_written_to(line, tmp_path):
    path = tmp_path / "user_code.py"
    path.write_text(f"def write(x):\n    {line}\n    return x\n")
    scope = {"T": T, "HOLDER": HOLDER, "torch": torch}
    exec(compile(path.read_text(), str(path), "exec"), scope)
    with pytest.raises(Exception) as caught:
        vmap(scope["write"])(X)
    if WRITES[line] is not None:
        assert type(caught.value) is InPlaceError
        assert f"written in place into {WRITES[line]!r}, which all samples share" in str(caught.value)


@pytest.mark.parametrize(
    "line", ["HOLDER.none.add_(x)", "HOLDER.d['missing'].add_(x)", "missing.add_(x)", "(x + 1).add_(x)", "f(x)[0].add_(x)"]
)
def test_expressions_that_lead_to_no_tensor(line):
    node = explain.ast.parse(line).body[0].value.func.value
    assert explain._lookup(node, {"HOLDER": HOLDER, "x": 3}) is None


def test_without_a_place():
    error = RuntimeError("vmap: inplace arithmetic(self, *extra_args) is not possible")
    explained = explain.explain(error, dict)
    assert type(explained) is InPlaceError and "written in place into a tensor, which all samples share" in str(explained)
    assert explain._written(None) is None and explain._line(None) == ""
    assert explain.explain(KeyError("calling .item()"), dict) is None
    assert explain.explain(RuntimeError("another text"), dict) is None


def test_a_users_own_stack_of_unequal_tensors_is_left_alone():
    def stacks(x):
        return torch.stack([x, x[:2]])

    with pytest.raises(RuntimeError, match="stack expects each tensor to be equal size") as caught:
        vmap(stacks)(X)
    assert not isinstance(caught.value, DataDependentError)


def test_no_frame_at_all(monkeypatch):
    monkeypatch.setattr(explain.caller, "user_frame", lambda: None)
    assert explain._calling_frame() is None


def test_uncompiled_functions():
    def fun(x):
        return x

    linear = torch.nn.Linear(1, 1)
    assert explain.uncompiled(fun) is fun and explain.uncompiled(torch.compile(fun)) is fun
    assert explain.uncompiled(linear) is linear and explain.uncompiled(torch.compile(linear)) is linear
