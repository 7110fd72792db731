"""jit(…, dynamic=True): one trace for all sizes of mapped axes above 1, and never a wrong answer."""

from __future__ import annotations

import functools

import pytest
import torch

from torchbatch import grad, jit, lax, vmap
from torchbatch.errors import AxisError, UnmappedOutputError
from torchbatch.testing import assert_close, loop

replayed = functools.partial(jit, backend="eager", dynamic=True)
SIZES = (7, 8, 9, 100, 2, 3)


def numbers(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def agrees(jitted, plain, *arguments):
    assert_close(jitted(*arguments), plain(*arguments))


def softmax_head(x):
    return torch.softmax(x.sin(), -1).sum()


def test_one_trace_for_all_sizes():
    mapped = vmap(softmax_head)
    jitted = replayed(mapped)
    for size in SIZES:
        agrees(jitted, mapped, numbers(size, 5))
    assert jitted.cache_size() == 1


@pytest.mark.parametrize("outside", [True, False])
def test_the_function_is_run_once_more_where_vmap_is_inside(outside):
    runs = []

    def counted(x):
        runs.append(1)
        return softmax_head(x)

    jitted = replayed(vmap(counted) if outside else lambda x: vmap(counted)(x))
    for size in SIZES:
        jitted(numbers(size, 5))
    assert jitted.cache_size() == 1
    assert len(runs) == (1 if outside else 2)


@pytest.mark.parametrize("first", [0, 1, 5])
def test_sizes_zero_and_one_are_traced_for_themselves(first):
    mapped = vmap(softmax_head)
    jitted = replayed(mapped)
    for size in (first, 4, 1, 0, 6, 1, 0):
        agrees(jitted, mapped, numbers(size, 5))
    assert jitted.cache_size() == 3


OPERATIONS = {
    "elementwise": lambda a: a.sin() * 2,
    "matmul": lambda a: a[0] @ a[0].T,
    "reshape": lambda a: a.reshape(3, -1),
    "sum": lambda a: a.sum(-1),
    "sort": lambda a: a.sort().values,
    "stack": lambda a: torch.stack([a, a * 2]),
    "index": lambda a: a[torch.tensor([0, 1])],
    "where": lambda a: torch.where(a > 0, a, 0.0),
    "cumsum": lambda a: a.cumsum(-1),
    "inv": lambda a: torch.linalg.inv(a[0, :2, :2] + 5 * torch.eye(2)),
    "attention": lambda a: torch.nn.functional.scaled_dot_product_attention(a, a, a),
    "einsum": lambda a: torch.einsum("ijk,ijl->kl", a, a),
    "write": lambda a: torch.zeros(2, 3, 4).index_put((torch.tensor(0),), a[0]),
    "draw": lambda a: a + torch.zeros(4).exponential_().mul(0),
    "cat": lambda a: torch.cat([a, a]),
    "pad": lambda a: torch.nn.functional.pad(a, (1, 1)),
    "layer_norm": lambda a: torch.nn.functional.layer_norm(a, (4,)),
    "conv1d": lambda a: torch.nn.functional.conv1d(a, torch.ones(1, 3, 2)),
}


READ_THE_SIZE = pytest.mark.xfail(strict=True, reason="PyTorch's batching rule for it reads the size as a number")


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=READ_THE_SIZE) if n in ("draw", "cat", "pad", "layer_norm", "conv1d") else n for n in OPERATIONS],
)
def test_operations_keep_the_size_open(name):
    mapped = vmap(OPERATIONS[name], randomness="different")
    jitted = replayed(mapped)
    for size in (4, 5, 11):
        agrees(jitted, mapped, numbers(size, 2, 3, 4))
    assert jitted.cache_size() == 1


def test_inductor():
    mapped = vmap(lambda a, b: torch.tanh(a @ b).sum(), (0, None))
    jitted = jit(mapped, dynamic=True)
    b = numbers(3, 2)
    for size in (4, 5, 17, 1000, 1, 0):
        agrees(jitted, mapped, numbers(size, 3), b)
    assert jitted.cache_size() == 3


@pytest.mark.parametrize("axis", [0, 1, 2, -1])
def test_another_axis_than_the_first(axis):
    mapped = vmap(lambda a: a.cumsum(0), axis, axis)
    jitted = replayed(mapped)
    for size in (4, 5, 6):
        shape = [3, 2]
        shape.insert(axis % 3, size)
        agrees(jitted, mapped, numbers(*shape))
    assert jitted.cache_size() == 1


@pytest.mark.parametrize("outside", [True, False])
@pytest.mark.parametrize("sizes", [(5, 6, 7, 5), (6, 5, 7), (4, 4, 5)])
def test_batch_and_feature_sizes_may_coincide(outside, sizes):
    weights = numbers(5, 4)
    mapped = vmap(lambda a: a @ weights)
    jitted = replayed(mapped if outside else lambda x: mapped(x))
    for size in sizes:
        agrees(jitted, mapped, numbers(size, 5))
    assert jitted.cache_size() <= 2


@pytest.mark.parametrize("outside", [True, False])
def test_two_axes_that_were_equal_at_first(outside):
    mapped = vmap(vmap(lambda a, b: (a * b).sum(), (None, 0)), (0, None))
    jitted = replayed(mapped if outside else lambda a, b: mapped(a, b))
    for rows, columns in ((4, 4), (4, 5), (6, 7), (8, 8), (3, 9)):
        agrees(jitted, mapped, numbers(rows, 2), numbers(columns, 2))


def test_both_axes_of_nested_vmaps_are_open():
    mapped = vmap(vmap(lambda a, b: (a * b).sum(), (None, 0)), (0, None))
    jitted = replayed(mapped)
    for rows, columns in ((4, 5), (6, 7), (3, 9)):
        agrees(jitted, mapped, numbers(rows, 2), numbers(columns, 2))
    assert jitted.cache_size() == 1


def test_sizes_that_do_not_fit_are_an_error_still():
    jitted = replayed(vmap(lambda a, b: a * b))
    jitted(numbers(4, 3), numbers(4, 3))
    with pytest.raises(AxisError, match="axes of different sizes") as raised:
        jitted(numbers(4, 3), numbers(5, 3))
    with pytest.raises(AxisError) as plain:
        vmap(lambda a, b: a * b)(numbers(4, 3), numbers(5, 3))
    assert str(raised.value) == str(plain.value)


def test_strides():
    mapped = vmap(lambda a: a.cumsum(0))
    jitted = replayed(mapped)
    for size in (4, 5, 6):
        agrees(jitted, mapped, numbers(3, size).t())
        agrees(jitted, mapped, numbers(size, 3))
        agrees(jitted, mapped, numbers(size, 6)[:, ::2])
        agrees(jitted, mapped, numbers(1, 3).expand(size, 3))
    assert jitted.cache_size() == 1


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_gradients(backend):
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
    mapped = vmap(lambda x: model(x).sum())
    jitted = jit(mapped, dynamic=True, backend=backend)
    for size in (4, 5, 9):
        x = numbers(size, 3).requires_grad_()
        inputs = [x, *model.parameters()]
        assert_close(
            torch.autograd.grad(jitted(x).sum(), inputs), torch.autograd.grad(mapped(x).sum(), inputs)
        )
    assert jitted.cache_size() == 1


def test_per_example_gradients():
    w = numbers(3).requires_grad_()
    mapped = vmap(grad(lambda x: (x.sin() * w).sum()))
    jitted = replayed(mapped)
    for size in (4, 5, 9):
        agrees(jitted, mapped, numbers(size, 3))
    assert jitted.cache_size() == 1


@pytest.mark.parametrize("first", ["grad", "no_grad"])
def test_grad_mode(first):
    jitted = replayed(vmap(lambda a: a * 2))
    modes = {"grad": torch.enable_grad, "no_grad": torch.no_grad}
    for size, name in enumerate([first, *(name for name in modes if name != first), first], 4):
        with modes[name]():
            assert jitted(numbers(size).requires_grad_()).requires_grad is (name == "grad")


def branches(x):
    if x.shape[0] > 10:
        return vmap(lambda a: a * 2)(x)
    return vmap(lambda a: a * 3)(x)


def test_a_function_that_branches_on_the_size():
    jitted = replayed(branches)
    for size in (4, 5, 11, 12, 3, 10):
        agrees(jitted, branches, numbers(size))
    assert jitted.cache_size() == 2


def counts(x):
    return sum(vmap(lambda a: a * 3)(x)[i] * i for i in range(x.shape[0]))


def test_a_function_that_counts_to_the_size():
    jitted = replayed(counts)
    for size in (4, 5, 4, 6):
        agrees(jitted, counts, numbers(size))
    assert jitted.cache_size() == 3


@pytest.mark.parametrize(
    "fun",
    [
        lambda x: vmap(lambda a: a * 3)(x) / x.shape[0],
        lambda x: vmap(lambda a: a * 3)(x).sum() + x.shape[0],
        lambda x: vmap(lambda a: a * 3)(x).reshape(-1, x.shape[0] * 2),
        lambda x: torch.zeros(x.shape[0], x.shape[0]) + vmap(torch.sum)(x),
        lambda x: (vmap(lambda a: a * 3)(x), x.shape[0]),
    ],
)
def test_the_size_as_a_value(fun):
    jitted = replayed(fun)
    for size in (4, 6, 8):
        got, want = jitted(numbers(size, 2)), fun(numbers(size, 2))
        if isinstance(want, tuple):
            got, want = (got[0], got[1].item()), want
        assert_close(got, want)
    assert jitted.cache_size() == 1


def test_names_of_axes():
    def centred(x):
        return x - lax.pmean(x, "i")

    def numbered(x):
        return x * lax.axis_index("i")

    for fun in (centred, numbered):
        mapped = vmap(fun, axis_name="i")
        jitted = replayed(mapped)
        for size in (4, 5, 9):
            agrees(jitted, mapped, numbers(size))
        assert jitted.cache_size() == 1


def test_axis_size_and_static_and_keywords():
    mapped = vmap(lambda a, n, b: a * n * b, (0, None))
    jitted = replayed(mapped, static_argnums=1)
    for size in (4, 5):
        for n in (2, 3):
            assert_close(jitted(numbers(size), n, b=numbers(size)), numbers(size) ** 2 * n)
    assert jitted.cache_size() == 2


def test_draws():
    mapped = vmap(lambda a: a + torch.randn(2), randomness="different")
    jitted = replayed(mapped)
    for size in (4, 5):
        torch.manual_seed(0)
        want = mapped(numbers(size))
        torch.manual_seed(0)
        assert_close(jitted(numbers(size)), want)
    assert jitted.cache_size() == 1


def test_trees_against_the_loop():
    def fun(p, x):
        return {"y": p["w"] @ x["a"], "z": x["b"].sum() + p["c"]}

    axes = ({"w": None, "c": 0}, {"a": 1, "b": 0})
    jitted = replayed(vmap(fun, axes))
    for size in (4, 5, 3):
        p, x = {"w": numbers(2, 3), "c": numbers(size)}, {"a": numbers(3, size), "b": numbers(size, 2)}
        assert_close(jitted(p, x), loop(fun, axes)(p, x))
    assert jitted.cache_size() == 1


def test_captured_tensor_as_long_as_the_batch():
    shared = numbers(4)
    mapped = vmap(lambda a: (a * shared).sum())
    jitted = replayed(mapped)
    for size in (4, 5, 6):
        agrees(jitted, mapped, numbers(size, 4))
    whole = replayed(lambda x: vmap(lambda a: a * 2)(x) * shared)
    assert_close(whole(numbers(4)), numbers(4) * 2 * shared)
    with pytest.raises(RuntimeError, match=r"must match|broadcast"):
        whole(numbers(5))


def test_errors_of_vmap_pass():
    with pytest.raises(UnmappedOutputError):
        replayed(vmap(lambda a: a * 2, out_axes=None))(numbers(4))


def test_without_dynamic_each_size_is_a_trace():
    jitted = jit(vmap(torch.sin), backend="eager")
    for size in (4, 5, 6):
        jitted(numbers(size))
    assert jitted.cache_size() == 3
