"""Graphs in a form that costs less: the same values, and the operations that say nothing are gone."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.fx import GraphModule

import torchbatch
from torchbatch import vmap
from torchbatch._torch import graphs
from torchbatch._torch.rewrites import simplify
from torchbatch.testing import assert_close

TRANSPOSITIONS = {
    "permute": lambda x: x.permute(*range(x.dim() - 2), x.dim() - 1, x.dim() - 2),
    "negative permute": lambda x: x.permute(*range(x.dim() - 2), -1, -2),
    "transpose": lambda x: x.transpose(-1, -2),
    "transpose forwards": lambda x: x.transpose(x.dim() - 2, x.dim() - 1),
    "t": lambda x: x.t() if x.dim() == 2 else x.mT,
}


def matrices(rank):
    generator = torch.Generator().manual_seed(0)
    batch = (5,) if rank == 3 else ()
    return [torch.randn(*batch, n, m, generator=generator, dtype=torch.float64) for n, m in ((2, 3), (4, 3), (3, 4), (3, 2))]


def product(a, b):
    return torch.bmm(a, b) if a.dim() == 3 else torch.mm(a, b)


def flat(fun):
    def run(values):
        result = fun(*values)
        return list(result) if isinstance(result, tuple) else [result]

    return run


def rewritten(fun, *inputs, fixed_sizes=True):
    """The names of the operations before and after; both graphs are run and compared, with each other and with the function."""
    trace = graphs.trace(flat(fun), inputs, gradients=False)
    after = GraphModule(trace.graph, copy.deepcopy(trace.graph.graph))
    with torch.no_grad(), trace.mode:
        simplify(after.graph, fixed_sizes)
    after.graph.lint()
    after.recompile()
    values = [*inputs, *trace.captured]
    found = after(*values)
    for expected in (trace.graph(*values), flat(fun)(inputs)):
        assert_close(found, expected)
    for result in found:
        memory = result.untyped_storage().data_ptr()
        assert not result.numel() or all(memory != value.untyped_storage().data_ptr() for value in values)
        result.add_(1)  # each result can be written in place
    return targets(trace.graph), targets(after)


def targets(module):
    return [str(node.target).removeprefix("aten.") for node in module.graph.nodes if node.op == "call_function"]


def transpositions(names):
    return sum(name.startswith(("permute", "transpose", "t.")) for name in names)


# Transposed products


@pytest.mark.parametrize("rank", [2, 3])
@pytest.mark.parametrize("name", TRANSPOSITIONS)
@pytest.mark.parametrize("fixed_sizes", [True, False])
def test_the_transposition_of_a_product_with_a_transposed_operand_goes(name, rank, fixed_sizes):
    transposed = TRANSPOSITIONS[name]
    a, b, c, d = matrices(rank)
    for fun, inputs in (
        (lambda a, b: transposed(product(a, transposed(b))), (a, b)),
        (lambda c, d: transposed(product(transposed(c), d)), (c, d)),
    ):
        before, after = rewritten(fun, *inputs, fixed_sizes=fixed_sizes)
        assert (transpositions(before), transpositions(after)) == (2, 1), "what is left is that of the other operand"


@pytest.mark.parametrize("rank", [2, 3])
def test_both_operands_transposed_leave_no_transposition(rank):
    a, _, c, _ = matrices(rank)
    before, after = rewritten(lambda c, a: product(c.transpose(-1, -2), a.transpose(-1, -2)).transpose(-1, -2), c, a)
    assert transpositions(before) == 3 and after == ["bmm.default" if rank == 3 else "mm.default"]


UNTOUCHED = {
    "no transposed operand": lambda a, b, c, d: product(a, d).transpose(-1, -2),
    "no transposed product": lambda a, b, c, d: product(a, b.transpose(-1, -2)),
    "several users of the product": lambda a, b, c, d: (lambda y: (y.transpose(-1, -2), y + 1))(product(a, b.transpose(-1, -2))),
    "the product is an output too": lambda a, b, c, d: (lambda y: (y.mT.sin(), y))(product(a, b.transpose(-1, -2))),
    "after another operation": lambda a, b, c, d: product(a, b.transpose(-1, -2)).sin().transpose(-1, -2),
}


@pytest.mark.parametrize("rank", [2, 3])
@pytest.mark.parametrize("name", UNTOUCHED)
def test_other_products_are_untouched(name, rank):
    before, after = rewritten(UNTOUCHED[name], *matrices(rank))
    assert after == before


@pytest.mark.parametrize("order", [(1, 0, 2), (2, 1, 0), (0, 1, 2), (1, 2, 0)])
def test_other_permutations_of_three_axes_are_untouched(order):
    a, b, *_ = matrices(3)
    before, after = rewritten(lambda a, b: product(a, b.transpose(-1, -2)).permute(order).sin(), a, b)
    assert after == before


def test_a_transposed_operand_that_others_use_stays():
    a, b, *_ = matrices(2)
    _, after = rewritten(lambda a, b: (lambda v: (product(a, v).t().sin(), v.exp()))(b.t()), a, b)
    assert transpositions(after) == 2


def test_products_in_a_row():
    a, b, *_ = matrices(2)
    before, after = rewritten(lambda a, b: ((a @ b.t()).t() @ a).t() @ b, a, b)
    assert transpositions(after) < transpositions(before)


@pytest.mark.parametrize("fun", [lambda a: (a @ a.t()).t(), lambda a: (a.t() @ a).t(), lambda a: (a @ a.t()).t().t()])
def test_one_matrix_by_itself(fun):
    rewritten(fun, matrices(2)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64, torch.int64])
@pytest.mark.parametrize("sizes", [(2, 3, 4), (0, 3, 4), (2, 0, 4), (1, 1, 1)])
def test_dtypes_and_sizes(dtype, sizes):
    n, k, m = sizes
    rewritten(lambda a, b: (a @ b.t()).t(), torch.ones(n, k).to(dtype), torch.arange(m * k).reshape(m, k).to(dtype))


# Other rewrites


CASES = {
    "forward mode": lambda a, b, c, d: torchbatch.jvp(lambda a: (a @ d, a * 2 + b[:2], b.sin()), (a,), (a,)),
    "Jacobian": lambda a, b, c, d: torchbatch.jacfwd(lambda a: (a @ d).sin())(a),
    "reverse Jacobian": lambda a, b, c, d: torchbatch.jacrev(lambda a: (a @ d).sin())(a),
    "Hessian": lambda a, b, c, d: torchbatch.hessian(lambda x: (x @ d).sin().sum())(a[0]),
    "one matrix for all": lambda a, b, c, d: vmap(lambda x: x @ d)(torch.stack([a, 2 * a])),
    "one matrix for all, transposed": lambda a, b, c, d: vmap(lambda x: (d.t() @ x.t()).t())(torch.stack([a, 2 * a])),
    "one matrix for all vectors": lambda a, b, c, d: torch.bmm(c.t().expand(3, 4, 3), torch.stack([c, c, c])[:, :, :1]),
    "an identity": lambda a, b, c, d: a @ torch.eye(3, dtype=a.dtype),
    "zeros of the user": lambda a, b, c, d: a + torch.zeros(()).expand(2, 3) + a * torch.zeros(2, 3),
    "a wide sum with zeros": lambda a, b, c, d: a[0] + torch.zeros((), dtype=a.dtype).expand(2, 3),
    "copies": lambda a, b, c, d: torch.zeros_like(a).copy_(a).reshape(2, 3).expand(2, 3).view(2, 3),
    "a copy of another dtype": lambda a, b, c, d: torch.zeros(2, 3).copy_(a),
    "results that are arguments": lambda a, b, c, d: (a.reshape(2, 3), a.clone(), a.expand(2, 3)),
    "a write into a copy": lambda a, b, c, d: (lambda y: (y.add_(1), a * 2))(a.clone()),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("fixed_sizes", [True, False])
def test_values_stay(name, fixed_sizes):
    def fun(*inputs):
        leaves, _ = torch.utils._pytree.tree_flatten(CASES[name](*inputs))
        return tuple(leaves)

    rewritten(fun, *matrices(2), fixed_sizes=fixed_sizes)


@pytest.mark.parametrize("name", ["forward mode", "Jacobian", "Hessian", "copies"])
def test_operations_go(name):
    def fun(*inputs):
        leaves, _ = torch.utils._pytree.tree_flatten(CASES[name](*inputs))
        return tuple(leaves)

    before, after = rewritten(fun, *matrices(2))
    assert len(after) < len(before)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_zeros_of_the_user_meet_inf_and_nan(value):
    rewritten(lambda x: x * torch.zeros(()), torch.tensor([value, 1.0]))
    rewritten(lambda x: x * torch.zeros(()).expand(2) + x.cos(), torch.tensor([value, 1.0]))
    rewritten(lambda x: 1 + x * torch.zeros([]).expand(2), torch.tensor([value, 1.0]))


def test_the_jacobian_at_inf():
    x = torch.tensor([1.0, float("inf")])
    trace = graphs.trace(lambda values: [torchbatch.jacrev(lambda x: x * 2)(values[0])], [x], gradients=False)
    assert_close(trace.graph(x)[0], 2 * torch.eye(2))


def test_draws_that_nobody_reads_stay():
    trace = graphs.trace(lambda values: [(torch.rand(3), values[0].sin(), values[0] * 2)[2]], [torch.ones(3)], gradients=False)
    with trace.mode:
        simplify(trace.graph.graph, True)
    assert any("rand" in name for name in targets(trace.graph)) and not any("sin" in name for name in targets(trace.graph))


# Chains of views

CHAINS = {
    "there and back": (lambda x: x.view(2, 12).view(4, 6).cos(), 0),
    "sizes of 1": (lambda x: x.unsqueeze(1).permute(1, 0, 2).view(4, 6).cos(), 0),
    "to another shape": (lambda x: x.unsqueeze(0).transpose(0, 1).view(12, 2).cos(), 1),
    "a transposition is said": (lambda x: x.t().contiguous().view(24).cos(), 3),
    "reshape copies": (lambda x: x.t().reshape(24).view(2, 12).cos(), 3),
}


@pytest.mark.parametrize("name", CHAINS)
def test_chains_of_views(name):
    fun, left = CHAINS[name]
    _, after = rewritten(fun, torch.arange(24.0).view(4, 6))
    views = [name for name in after if name.startswith(("view", "permute", "transpose", "t.", "unsqueeze", "_unsafe", "clone"))]
    assert len(views) <= left


def test_results_that_become_one_are_copied():
    def fun(x):
        first = x.sin()
        second = torch.empty_like(first)
        second.copy_(first)
        return first, second, first.view(-1)

    rewritten(lambda x: fun(x)[:2], torch.rand(3))
    first, second, view = torchbatch.jit(fun)(torch.rand(3))
    before = first.clone()
    first.add_(1)
    assert torch.equal(view, first) and torch.equal(second, before)
