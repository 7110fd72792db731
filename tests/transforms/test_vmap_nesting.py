"""Rules 10 and 11: vmap inside, around and beside other transforms, and the names of its axes."""

from __future__ import annotations

import functools
import itertools
import threading

import numpy as np
import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

from torchbatch import vmap
from torchbatch._torch import levels
from torchbatch.core.frames import in_scope
from torchbatch.errors import AxisError, AxisSpecError
from torchbatch.testing import assert_close, loop
from torchbatch.transforms import grad as ours
from torchbatch.transforms import jacobian
from torchbatch.transforms.checkpoint import checkpoint as own_checkpoint

RNG = np.random.default_rng(0)
X = RNG.standard_normal((3, 4)).astype(np.float32)
Z = RNG.standard_normal((3, 4, 5)).astype(np.float32)
CUBE = RNG.standard_normal((3, 3, 3)).astype(np.float32)
ROW = X[0]


def tx(array=X):
    return torch.tensor(array)


def double(x):
    return x * 2


def cube(x):
    return (x**3).sum()


# --- rule 10: vmap in vmap -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("outer", [0, 1, -1, None])
@pytest.mark.parametrize("inner", [0, 1, -1, None])
def test_rule_10_nests_with_itself(agree, outer, inner):
    def call(lib):
        mapped = lib.vmap(lambda x, y: x * y.sum() + 1, in_axes=(inner, 0), out_axes=-1)
        return lib.vmap(mapped, in_axes=(outer, 0), out_axes=1)(lib.array(CUBE), lib.array(CUBE[0]))

    agree.call(call)


def test_rule_10_three_deep(agree):
    def call(lib):
        f = lib.vmap(lambda x, y, z: x * y + z, in_axes=(None, None, 0))
        f = lib.vmap(f, in_axes=(None, 0, None), out_axes=1)
        f = lib.vmap(f, in_axes=(0, None, None), out_axes=-1)
        return f(*(lib.array(row) for row in (X[0], X[1, :3], X[2, :2])))

    assert agree.call(call).shape == (2, 3, 4)


def test_rule_10_closes_over_outer_samples(agree):
    def call(lib):
        return lib.vmap(lambda x: lib.vmap(lambda y: x * y.sum() + x.sum())(x))(lib.array(X))

    agree.call(call)


def test_rule_10_an_inner_map_may_map_nothing(agree):
    agree.call(lambda lib: lib.vmap(lambda x: lib.vmap(lambda: x * 2, axis_size=2)())(lib.array(X)))
    agree.call(lambda lib: lib.vmap(lambda x: lib.vmap(lambda y: y, in_axes=None, axis_size=2, out_axes=1)(x))(lib.array(X)))


def test_rule_10_an_inner_map_sees_the_rank_of_a_sample(agree):
    agree.call(lambda lib: lib.vmap(lambda x: lib.vmap(double, in_axes=1)(x))(lib.array(X)), AxisError)
    agree.call(lambda lib: lib.vmap(lambda x: lib.vmap(double, out_axes=1)(x))(lib.array(X)), AxisError)
    agree.call(lambda lib: lib.vmap(lambda x, y: lib.vmap(lambda a, b: a)(x, y))(lib.array(Z), lib.array(X[:, :3])), AxisError)


def test_rule_10_the_inner_sizes_disagree_and_the_levels_close():
    with pytest.raises(AxisError):
        vmap(lambda x: vmap(lambda a, b: a)(x, x[:2]))(tx())
    assert in_scope.stack == [] and levels.depth() == 0
    assert torch.equal(vmap(vmap(double))(tx()), tx() * 2)


@pytest.mark.parametrize("sizes", [(0, 3), (3, 0), (0, 0), (1, 1)])
def test_rule_10_empty_batches_nest(agree, sizes):
    array = np.zeros((*sizes, 2), np.float32)
    agree.call(lambda lib: lib.vmap(lib.vmap(lambda x: (x * 2, x.sum(), 1.0)))(lib.array(array)))


def test_rule_10_maps_can_be_mapped_by_the_other_library():
    for mapped in (vmap, loop):
        assert_close(torch.func.vmap(vmap(double))(tx()), tx() * 2)
        assert_close(mapped(torch.func.vmap(double))(tx()), tx() * 2)
        assert_close(mapped(lambda x: torch.func.vmap(lambda y: x * y)(x))(tx()), tx()[:, None] * tx()[..., None])
        assert_close(torch.func.vmap(lambda x: vmap(lambda y: x * y)(x))(tx()), tx()[:, None] * tx()[..., None])


# --- rule 10: gradients ----------------------------------------------------------------------------------------------

ORDERS = [order for n in (2, 3) for order in itertools.product("vg", repeat=n) if "v" in order]


@pytest.mark.parametrize("order", ["".join(order) for order in ORDERS])
def test_rule_10_every_order_of_vmap_and_grad(agree, order):
    """From the inside out; what is not a scalar is summed before a gradient is taken."""

    def call(lib):
        f, shape = lambda x: (lib.np.sin(x) * x).sum(), ()
        for letter in order:
            if letter == "v":
                f, shape = lib.vmap(f), ("n", *shape)
            else:
                f = lib.grad(lambda x, f=f: (f(x) ** 2).sum())
        return f(lib.array(np.stack([Z] * 2)))

    agree.call(call, tolerance=1e-3)


@pytest.mark.parametrize("order", ["vj", "jv", "vjv", "jvj", "gvj", "jvg", "vgj", "vjg"])
def test_rule_10_every_order_with_jvp(agree, order):
    def call(lib):
        def tangent(f):
            return lambda x: lib.jvp(f, (x,), (lib.np.cos(x),))[1]

        f = lambda x: (lib.np.sin(x) * x).sum()  # noqa: E731
        for letter in order:
            if letter == "v":
                f = lib.vmap(f)
            elif letter == "g":
                f = lib.grad(lambda x, f=f: (f(x) ** 2).sum())
            else:
                f = tangent(f)
        return f(lib.array(Z))

    agree.call(call, tolerance=1e-3)


TORCH_FUNC = {
    "grad": lambda f: torch.func.grad(f),
    "grad_and_value": lambda f: torch.func.grad_and_value(f),
    "vjp": lambda f: lambda x: torch.func.vjp(f, x)[1](torch.ones(())),
    "jvp": lambda f: lambda x: torch.func.jvp(f, (x,), (x,)),
    "jacrev": lambda f: torch.func.jacrev(f),
    "jacfwd": lambda f: torch.func.jacfwd(f),
    "hessian": lambda f: torch.func.hessian(f),
}


@pytest.mark.parametrize("name", TORCH_FUNC)
def test_rule_10_nests_with_torch_func(name):
    transform = TORCH_FUNC[name]
    x = tx()
    per_sample = [transform(cube)(row) for row in x]
    found = vmap(transform(cube))(x)
    if not isinstance(found, tuple):
        found, per_sample = (found,), [(one,) for one in per_sample]
    columns = zip(*[_flat(one) for one in per_sample], strict=True)
    for a, b in zip(_flat(found), [torch.stack(column) for column in columns], strict=True):
        assert_close(a, b)
    outside = transform(lambda x: vmap(cube)(x).sum())(x)
    for a, b in zip(_flat(outside), _flat(transform(lambda x: torch.stack([cube(r) for r in x]).sum())(x)), strict=True):
        assert_close(a, b)


def _flat(value):
    return [leaf for item in value for leaf in _flat(item)] if isinstance(value, tuple | list) else [value]


@pytest.mark.parametrize("name", ["jacrev", "jacfwd", "hessian", "vjp", "linearize", "value_and_grad"])
def test_rule_10_nests_with_the_gradient_family(name):
    transform = getattr(jacobian, name, None) or getattr(ours, name)
    if name == "vjp":
        transform = lambda f: lambda x: ours.vjp(f, x)[1](torch.ones(()))  # noqa: E731
    if name == "linearize":
        transform = lambda f: lambda x: ours.linearize(f, x)[1](x)  # noqa: E731
    for a, b in zip(_flat(vmap(transform(cube))(tx())), _flat(loop(transform(cube))(tx())), strict=True):
        assert_close(a, b)


def test_rule_10_autograd_goes_through():
    for mapped in (vmap, loop):
        x = tx().requires_grad_()
        mapped(mapped(lambda v: v**3))(x).sum().backward()
        assert_close(x.grad, 3 * x.detach() ** 2)


def test_rule_10_autograd_grad_works_inside():
    def per_sample(x):
        with torch.enable_grad():
            y = x.detach() * 2
        return y.sum()

    assert_close(vmap(per_sample)(tx()), loop(per_sample)(tx()))


def test_rule_10_no_grad_inside_and_outside():
    x = tx().requires_grad_()
    with torch.no_grad():
        assert not vmap(double)(x).requires_grad

    def inside(x):
        with torch.no_grad():
            return x * 2

    assert not vmap(inside)(x).requires_grad and vmap(double)(x).requires_grad
    with torch.inference_mode():
        assert torch.equal(vmap(double)(tx()), tx() * 2)


def test_rule_10_functional_call_of_modules():
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Tanh(), torch.nn.Linear(3, 1))
    weights = dict(model.named_parameters())

    def loss(weights, x):
        return torch.func.functional_call(model, weights, (x,)).sum() ** 2

    found = vmap(ours.grad(loss), in_axes=(None, 0))(weights, tx())
    expected = loop(ours.grad(loss), in_axes=(None, 0))(weights, tx())
    for name in weights:
        assert_close(found[name], expected[name])


# --- rule 10: the compiler, tracers, checkpoint, autocast ------------------------------------------------------------


@pytest.fixture
def compiled():
    torch._dynamo.reset()
    yield functools.partial(torch.compile, backend="aot_eager", fullgraph=True)
    torch._dynamo.reset()


mapped_before = vmap(lambda x, y: x * y, in_axes=(0, None))

COMPILED = {
    "made inside": (lambda x, y: vmap(lambda x, y: x * y, in_axes=(0, None))(x, y), (X, ROW)),
    "made outside": (lambda x, y: mapped_before(x, y), (X, ROW)),
    "nested": (lambda x: vmap(vmap(lambda x: x * 2 + 1))(x), (Z,)),
    "axes": (lambda x: vmap(double, in_axes=-1, out_axes=1)(x), (Z,)),
    "keywords": (lambda x: vmap(lambda x, w: x * w)(x, w=x), (X,)),
    "trees": (lambda x: vmap(lambda d: {"a": d["b"] * 2, "s": d["b"].sum()})({"b": x}), (X,)),
    "unmapped output": (lambda x, y: vmap(lambda x, y: (x, y * 2), (0, None), (0, None))(x, y), (X, ROW)),
    "sum match": (lambda x: vmap(double, out_axes=None, sum_match=True)(x), (X,)),
    "axis size": (lambda x: vmap(lambda x: x * 2, in_axes=None, axis_size=2)(x), (X,)),
    "numbers out": (lambda x: vmap(lambda x: (x, 1.0))(x), (X,)),
    "gradient": (lambda x: vmap(torch.func.grad(cube))(x), (X,)),
    "under a gradient": (lambda x: torch.func.grad(lambda x: vmap(cube)(x).sum())(x), (X,)),
    "broadcast along a last axis": (lambda x, y: vmap(lambda x, y: y * 2, (0, None), -1)(x, y), (X, ROW)),
}


@pytest.mark.parametrize("name", COMPILED)
def test_rule_10_compile_around_vmap(name, compiled):
    fun, arrays = COMPILED[name]
    args = [tx(array) for array in arrays]
    expected, found = fun(*args), compiled(fun)(*args)
    for a, b in zip(_leaves(found), _leaves(expected), strict=True):
        assert_close(a, b)


def _leaves(value):
    return torch.utils._pytree.tree_leaves(value)


def test_rule_10_compile_of_the_mapped_function_itself(compiled):
    assert_close(compiled(vmap(double))(tx()), tx() * 2)


def test_rule_10_a_compiled_function_inside_is_unwrapped(compiled):
    inner = compiled(lambda x: torch.sin(x) * 2)
    assert_close(vmap(inner)(tx()), torch.sin(tx()) * 2)
    assert_close(vmap(vmap(inner))(tx()), torch.sin(tx()) * 2)
    assert_close(compiled(lambda x: vmap(inner)(x))(tx()), torch.sin(tx()) * 2)


def test_rule_10_a_compiled_module_inside_is_unwrapped(compiled):
    module = torch.nn.Linear(4, 2)
    assert_close(vmap(compiled(module))(tx()), module(tx()))


def test_rule_10_make_fx_over_vmap():
    graph = make_fx(lambda x: vmap(lambda x: torch.sin(x) * x.sum(), out_axes=1)(x))(tx())
    assert_close(graph(tx() + 1), loop(lambda x: torch.sin(x) * x.sum(), out_axes=1)(tx() + 1))
    graph = make_fx(vmap(vmap(double)))(tx())
    assert_close(graph(tx() + 1), 2 * (tx() + 1))


def test_rule_10_export_over_vmap():
    class Model(torch.nn.Module):
        def forward(self, x):
            return vmap(lambda x: torch.sin(x) * x.sum(), in_axes=1)(x)

    exported = torch.export.export(Model(), (tx(),)).module()
    assert_close(exported(tx() + 1), loop(lambda x: torch.sin(x) * x.sum(), in_axes=1)(tx() + 1))


@pytest.mark.parametrize("reentrant", [False, True])
def test_rule_10_checkpoint_around_vmap(reentrant):
    x = tx().requires_grad_()
    checkpoint(vmap(lambda x: torch.sin(x) * x.sum()), x, use_reentrant=reentrant).sum().backward()
    expected = tx().requires_grad_()
    loop(lambda x: torch.sin(x) * x.sum())(expected).sum().backward()
    assert_close(x.grad, expected.grad)


def test_rule_10_checkpoint_inside_vmap():
    def body(x):
        return torch.sin(x) * x.sum()

    x, expected = tx().requires_grad_(), tx().requires_grad_()
    vmap(own_checkpoint(body))(x).sum().backward()
    loop(body)(expected).sum().backward()
    assert_close(x.grad, expected.grad)
    found = vmap(ours.grad(lambda x: own_checkpoint(body)(x).sum()))(tx())
    assert_close(found, loop(ours.grad(lambda x: body(x).sum()))(tx()))


@pytest.mark.parametrize("place", ["around", "inside"])
def test_rule_10_autocast_has_the_dtypes_of_the_loop(place):
    weight = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))

    def body(x):
        return x @ weight, x.sum(), torch.softmax(x @ weight, 0)

    def cast(x):
        with torch.autocast("cpu", torch.bfloat16):
            return body(x)

    results = []
    for mapped in (vmap, loop):
        if place == "inside":
            results.append(mapped(cast)(tx()))
        else:
            with torch.autocast("cpu", torch.bfloat16):
                results.append(mapped(body)(tx()))
    for a, b in zip(*results, strict=True):
        assert a.dtype == b.dtype
        assert_close(a, b, rtol=2e-2, atol=2e-2)


# --- rule 10: threads and exceptions ---------------------------------------------------------------------------------


def test_rule_10_nested_maps_in_threads():
    x, wrong = tx(Z), []

    def work(n):
        for _ in range(20):
            found = vmap(lambda a: vmap(lambda b: b * n + a.sum())(a))(x)
            if not torch.allclose(found, x * n + x.sum((1, 2))[:, None, None], atol=1e-5) or in_scope.stack:
                wrong.append(n)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_rule_10_an_exception_at_any_depth_closes_every_level(depth):
    def nested(level, x):
        if level == depth:
            raise KeyError("stop")
        return vmap(functools.partial(nested, level + 1))(x)

    with pytest.raises(KeyError, match="stop"):
        vmap(functools.partial(nested, 0))(tx(Z))
    assert in_scope.stack == [] and levels.depth() == 0
    assert torch.equal(vmap(double)(tx()), tx() * 2)


# --- rule 11: axis_name ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [None, "batch", 3, ("a", 1), frozenset({"x"})])
def test_rule_11_axis_name_is_in_scope_while_fun_runs(name):
    seen = []

    def fun(x):
        seen.append([frame[:2] for frame in in_scope.stack])
        return x

    vmap(fun, axis_name=name)(tx())
    vmap(fun, axis_name=name, in_axes=1)({"x": tx()})
    assert seen == [[(name, 3)], [(name, 4)]]
    assert in_scope.stack == []


def test_rule_11_axis_names_nest_outermost_first():
    seen = []

    def fun(x):
        seen.append([frame[0] for frame in in_scope.stack])
        return x

    vmap(vmap(fun, axis_name="inner"), axis_name="outer")(tx())
    assert seen == [["outer", "inner"]]


def test_rule_11_axis_name_changes_no_result(agree):
    agree(double, X, axis_name="batch")
    agree.call(lambda lib: lib.vmap(lib.vmap(double, axis_name="i"), axis_name="j", spmd_axis_name="k")(lib.array(X)))


@pytest.mark.parametrize("name", [[], {}, ["a"], {"a"}])
def test_rule_11_axis_name_must_be_hashable(name):
    with pytest.raises(AxisSpecError):
        vmap(double, axis_name=name)
