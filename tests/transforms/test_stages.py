"""lower, compile, save and load: what each stage says, what it computes, and what it refuses."""

from __future__ import annotations

import functools
import re
import weakref

import pytest
import torch
from torch import nn

import torchbatch
from torchbatch import ShapeDtypeStruct, grad, jit, load, vmap
from torchbatch.errors import InputTypeError, StaticArgumentError, UnsupportedOperationError
from torchbatch.testing import assert_close

X = torch.arange(12.0).reshape(4, 3)
STATE = {"w": torch.tensor([1.0, 2.0, 3.0]), "b": torch.ones(2)}
replayed = functools.partial(jit, backend="eager")


def model(n, x, state, k=1.0):
    return {"y": (x.sum(0) * state["w"] * k)[:n], "z": state["b"]}


def staged(fun, *args, **kwargs):
    return replayed(fun).lower(*args, **kwargs)


def saved(compiled, folder):
    compiled.save(folder / "f.torchbatch")
    return load(folder / "f.torchbatch")


@pytest.fixture(scope="module")
def compiled():
    return replayed(model, static_argnums=0).lower(2, X, STATE, k=3.0).compile()


@pytest.fixture(scope="module", params=["compiled", "loaded"])
def either(request, compiled, tmp_path_factory):
    """The model, compiled here or brought back from a file."""
    return compiled if request.param == "compiled" else saved(compiled, tmp_path_factory.mktemp("saved"))


# --- lowered ---------------------------------------------------------------------------------------------------------


def test_lowering_does_not_compile_or_compute():
    def fun(x):
        runs.append(type(x))
        return x @ x

    runs: list[type] = []
    struct = ShapeDtypeStruct((1 << 11, 1 << 11), torch.float32)
    found = jit(fun, backend=lambda graph, inputs: pytest.fail("it was compiled")).lower(struct)
    assert found.cost_analysis()["flops"] == 2 << 33
    assert found.out_info == struct
    assert len(runs) == 1 and runs[0] is not torch.Tensor  # traced once, with a tensor that holds no numbers


def test_lowering_takes_no_memory():
    huge = ShapeDtypeStruct((1 << 20, 1 << 20), torch.float32)
    assert staged(lambda x: x @ x, huge).out_info == huge


def test_stages_say_what_they_are(compiled, tmp_path):
    assert repr(replayed(model, static_argnums=0).lower(2, X, STATE)) == "<lowered model>"
    assert repr(compiled) == "<compiled model>"
    assert repr(saved(compiled, tmp_path)) == "<loaded model>"


def test_the_text_and_the_graph():
    found = staged(vmap(lambda x: x @ STATE["w"]), X)
    assert found.as_text() == "inputs a:f32[4,3]; captured b:f32[3]\nc:f32[4] = mv a b\nreturn c"
    assert_close(found.graph(X, STATE["w"])[0], X @ STATE["w"])


def test_arguments_and_output_are_described():
    found = replayed(model, static_argnums=0).lower(2, X, STATE, k=3.0)
    f32 = functools.partial(ShapeDtypeStruct, dtype=torch.float32)
    assert found.in_info == ((f32((4, 3)), {"w": f32((3,)), "b": f32((2,))}), {"k": ShapeDtypeStruct((), torch.float64)})
    assert found.out_info == {"y": f32((2,)), "z": f32((2,))}
    assert (found.compile().in_info, found.compile().out_info) == (found.in_info, found.out_info)


def test_descriptions_are_those_of_jax():
    jax = pytest.importorskip("jax")

    def fun(x, state):
        return x.sum(0) * state["w"], state["b"]

    ours = staged(fun, X, STATE).out_info
    theirs = jax.jit(fun).lower(X.numpy(), {name: value.numpy() for name, value in STATE.items()}).out_info
    assert [tuple(leaf.shape) for leaf in ours] == [leaf.shape for leaf in theirs]


def test_the_arguments_are_not_kept():
    x = torch.ones(3)
    kept = weakref.ref(x)
    found = staged(lambda x: x + 1, x)
    compiled = found.compile()
    del x
    assert kept() is None and compiled.in_info == found.in_info


# --- what a compiled function computes -------------------------------------------------------------------------------


def test_static_arguments_are_left_out(either):
    found = either(X + 1, STATE, k=2.0)
    expected = model(2, X + 1, STATE, k=2.0)
    assert_close(found, expected)
    assert_close(either(X, STATE, k=-1.5), model(2, X, STATE, k=-1.5))


def test_static_arguments_are_left_out_in_jax_too():
    jax = pytest.importorskip("jax")
    theirs = jax.jit(lambda n, x: x[:n], static_argnums=0).lower(2, X.numpy()).compile()
    assert theirs(X.numpy()).shape == (2, 3)
    with pytest.raises(TypeError):
        theirs(2, X.numpy())


def test_inductor_compiles_it():
    found = jit(vmap(lambda x: torch.tanh(x) * STATE["w"])).lower(X).compile()
    assert_close(found(X + 1), torch.tanh(X + 1) * STATE["w"])
    assert "def call(" in found.as_text() and "tanh" in found.as_text()


def test_a_change_of_a_captured_tensor_is_seen():
    scale = torch.ones(3)
    found = staged(lambda x: x * scale, X).compile()
    found(X)
    scale.mul_(5)
    assert_close(found(X), X * 5)


def test_an_argument_is_written_in_place():
    total = torch.zeros(3)
    found = staged(lambda total, x: total.add_(x.sum(0)) * 2, total, X).compile()
    for count in (1, 2):
        assert_close(found(total, X), 2 * count * X.sum(0))
    assert_close(total, 2 * X.sum(0))


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_the_result_can_be_differentiated(backend):
    layer = nn.Linear(3, 2)
    found = jit(layer, backend=backend).lower(X).compile()
    for _ in range(2):  # the second call takes the short way
        layer.zero_grad()
        found(X).square().sum().backward()
        ours = layer.weight.grad
        layer.zero_grad()
        layer(X).square().sum().backward()
        assert_close(ours, layer.weight.grad)
    assert found.as_text().count("def ") >= 2  # the code of the backward pass was added
    with torch.no_grad():
        assert not found(X).requires_grad


def test_one_compilation_serves_every_batch_size():
    found = replayed(vmap(lambda x: x.sin().sum()), dynamic=True).lower(X).compile()
    for size in (2, 3, 50):
        x = torch.randn(size, 3)
        assert_close(found(x), x.sin().sum(1))
    with pytest.raises(InputTypeError, match=re.escape("argument x: float32[4,3] -> float32[1,3]")):
        found(X[:1])


def test_the_same_tensor_twice():
    found = staged(lambda a, b: a + 2 * b, X, X.clone()).compile()
    for _ in range(2):
        assert_close(found(X, X), 3 * X)


def test_an_axis_of_size_1_may_have_any_stride():
    found = staged(lambda x: x + 1, torch.ones(4, 1)).compile()
    column = X[:, 1:2]
    assert column.stride() == (3, 1)
    with pytest.raises(InputTypeError, match="strides"):
        found(column)
    assert_close(found(torch.ones(1, 4).T), torch.full((4, 1), 2.0))  # strides (1, 4)


def test_an_empty_axis_has_no_strides():
    found = staged(lambda x: x.sum(), torch.ones(0, 3)).compile()
    assert found(torch.ones(3, 0).T).item() == 0


@pytest.mark.filterwarnings("error:Dynamo")
def test_torch_compile_leaves_it_alone():
    found = staged(lambda x: x * 2, X).compile()
    assert_close(torch.compile(lambda x: found(x) + 1, backend="eager")(X), X * 2 + 1)


# --- what it refuses -------------------------------------------------------------------------------------------------

OTHER = "model was compiled for another kind of call: "
DO = ". Lower and compile it for such arguments, or call the jit function, which does so itself."
LEAVE = " Leave out what is static, n=2: it is a constant of the compiled function."
REFUSED = {
    "another shape": (lambda f: f(X[:3], STATE, k=1.0), OTHER + "argument x: float32[4,3] -> float32[3,3]" + DO),
    "another dtype": (lambda f: f(X.double(), STATE, k=1.0), OTHER + "argument x: float32[4,3] -> float64[4,3]" + DO),
    "other strides": (
        lambda f: f(X.T.contiguous().T, STATE, k=1.0),
        OTHER + "argument x: float32[4,3] -> float32[4,3] strides (1, 4)" + DO + " Or pass x.contiguous().",
    ),
    "another kind of number": (lambda f: f(X, STATE, k=torch.tensor(1.0)), OTHER + "argument k: Python float -> float32[]" + DO),
    "a tensor for a number": (
        lambda f: f(X, STATE, k=torch.tensor(1.0, dtype=torch.float64)),
        OTHER + "argument k: Python float -> float64[]" + DO,
    ),
    "a number for a tensor": (
        lambda f: f(X, {**STATE, "b": 1.0}, k=1.0),
        OTHER + "argument state['b']: float32[2] -> Python float" + DO,
    ),
    "a key less": (
        lambda f: f(X, {"w": STATE["w"]}, k=1.0),
        OTHER + "argument state['b']: float32[2] -> absent" + DO,
    ),
    "a static argument": (
        lambda f: f(2, X, STATE, k=1.0),
        "model was compiled for 2 positional argument(s), but got 3." + LEAVE,
    ),
    "a static argument by name": (
        lambda f: f(X, STATE, k=1.0, n=2),
        "model was compiled for the keyword arguments k, but got k, n." + LEAVE,
    ),
    "an argument too few": (lambda f: f(X, k=1.0), "model was compiled for 2 positional argument(s), but got 1."),
    "a keyword too few": (lambda f: f(X, STATE), "model was compiled for the keyword arguments k, but got none."),
}


@pytest.mark.parametrize("case", REFUSED)
def test_another_kind_of_call_is_refused(either, case):
    call, message = REFUSED[case]
    for warm in (False, True):
        if warm:
            either(X, STATE, k=1.0)
        with pytest.raises(InputTypeError) as caught:
            call(either)
        assert str(caught.value) == message


def test_another_container_is_refused():
    found = staged(lambda pair: pair[0] + pair[1], [X, X]).compile()
    with pytest.raises(InputTypeError) as caught:
        found((X, X))
    assert str(caught.value) == "<lambda> was compiled for another kind of call: (['*', '*'],) -> (('*', '*'),)" + DO


def test_what_is_no_array_is_refused(either):
    with pytest.raises(StaticArgumentError, match="argument k of model is 'big' of type str"):
        either(X, STATE, k="big")


def test_a_captured_tensor_of_another_shape_is_refused():
    layer = nn.Linear(3, 2)
    found = staged(layer, X).compile()
    layer.weight.data = torch.ones(3, 3)
    with pytest.raises(InputTypeError, match="a tensor that it closes over has another shape, dtype or device than before"):
        found(X)


def test_a_module_in_another_mode_is_refused():
    layer = nn.Sequential(nn.Linear(3, 2), nn.Dropout(0.5))
    found = staged(layer, X).compile()
    for _ in range(2):
        found(X)
    layer.eval()
    with pytest.raises(InputTypeError, match=r"its module Sequential was in training mode when it was compiled, and is"):
        found(X)
    layer.train()
    found(X)


@pytest.mark.parametrize(
    "around",
    [
        lambda f: vmap(f)(X[None]),
        lambda f: grad(lambda x: f(x).sum())(X),
        lambda f: replayed(lambda x: f(x))(X),
        lambda f: torch.func.jvp(f, (X,), (X,)),
    ],
    ids=["vmap", "grad", "jit", "jvp"],
)
def test_it_cannot_be_transformed(around):
    found = staged(lambda x: x * 2, X).compile()
    found(X)
    with pytest.raises(UnsupportedOperationError, match=r"<lambda> is compiled, so it cannot be transformed or traced\. Trans"):
        around(found)


def test_a_gradient_that_it_lacks_is_refused(either):
    x = X.clone().requires_grad_()
    with pytest.raises(UnsupportedOperationError) as caught:
        either(x, STATE, k=1.0)
    assert str(caught.value) == (
        "model was compiled without a gradient for argument x, which requires one here. Compile it for an argument that requires "
        "a gradient, pass x.detach(), or call it under torch.no_grad()."
    )
    with torch.no_grad():
        assert_close(either(x, STATE, k=1.0), model(2, X, STATE))


def test_a_gradient_of_a_captured_tensor_is_not_lost():
    layer = nn.Linear(3, 2)
    with torch.no_grad():
        found = staged(layer, X).compile()
        assert_close(found(X), layer(X))
    with pytest.raises(UnsupportedOperationError, match=r"compiled under torch\.no_grad\(\), but closes over a tensor"):
        found(X)
    with torch.inference_mode():
        assert_close(found(X), layer(X))


# --- files -----------------------------------------------------------------------------------------------------------


def test_a_loaded_function_owns_what_it_closed_over(tmp_path):
    count = torch.zeros(1)

    def fun(x):
        count.add_(1)
        return x + count

    found = saved(staged(fun, X).compile(), tmp_path)
    for i in (1, 2):
        assert_close(found(X), X + i)
    assert count.item() == 0


def test_a_loaded_function_writes_into_its_arguments(tmp_path):
    found = saved(staged(lambda total, x: total.add_(x), torch.zeros(3), torch.ones(3)).compile(), tmp_path)
    total = torch.zeros(3)
    version = total._version
    found(total, torch.ones(3))
    assert_close(total, torch.ones(3))
    assert total._version > version
    with pytest.raises(UnsupportedOperationError, match="shares memory with another one"):
        found(total, total)


def test_a_loaded_function_serves_every_batch_size(tmp_path):
    found = saved(replayed(vmap(lambda x: x.sin().sum()), dynamic=True).lower(X).compile(), tmp_path)
    for size in (2, 50):
        x = torch.randn(size, 3)
        assert_close(found(x), x.sin().sum(1))
    with pytest.raises(InputTypeError, match=re.escape("float32[4,3] -> float32[1,3]")):
        found(X[:1])


def test_draws_come_from_the_generator(tmp_path):
    found = saved(staged(lambda x: x + torch.rand(3), X).compile(), tmp_path)
    torch.manual_seed(0)
    ours = found(X)
    torch.manual_seed(0)
    assert_close(ours, X + torch.rand(3))


def test_a_view_is_saved_without_its_base(tmp_path):
    base = torch.randn(1_000_000, 2)
    row = base[5:8].T
    compiled = staged(lambda x: x @ row, torch.ones(4, 2)).compile()
    found = saved(compiled, tmp_path)
    assert_close(found(torch.ones(4, 2)), torch.ones(4, 2) @ row)
    assert (tmp_path / "f.torchbatch").stat().st_size < 100_000


def test_what_can_be_differentiated_is_not_saved(tmp_path):
    compiled = staged(lambda a, b: a * b, X, X.clone().requires_grad_()).compile()
    with pytest.raises(UnsupportedOperationError) as caught:
        compiled.save(tmp_path / "f")
    assert str(caught.value) == (
        "save: <lambda> was compiled with gradients for b, but a file holds the forward pass only. Lower it under "
        "torch.no_grad(), or compute the gradient inside: jit(grad(f))."
    )
    assert not (tmp_path / "f").exists()


def test_a_saved_gradient(tmp_path):
    def loss(w, x):
        return torch.tanh(x @ w).sum()

    w = torch.randn(3)
    found = saved(staged(grad(loss), w, X).compile(), tmp_path)
    assert_close(found(w, X), grad(loss)(w, X))


def test_a_module_is_saved_under_no_grad(tmp_path):
    layer = nn.Linear(3, 2)
    with torch.no_grad():
        found = saved(staged(layer, X).compile(), tmp_path)
    assert_close(found(X), layer(X).detach())


def test_a_backend_of_the_users_is_not_saved(tmp_path):
    compiled = jit(lambda x: x + 1, backend=lambda graph, inputs: graph).lower(X).compile()
    with pytest.raises(UnsupportedOperationError, match="was compiled by a backend of yours; only what backend="):
        compiled.save(tmp_path / "f")


def test_a_folder_that_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"save: there is no folder .*nowhere"):
        staged(lambda x: x + 1, X).compile().save(tmp_path / "nowhere" / "f")


def test_a_class_that_cannot_be_pickled(tmp_path):
    class Local:
        def __init__(self, x):
            self.x = x

    torchbatch.tree.register_node(Local, lambda node: ((node.x,), None), lambda _, children: Local(*children))
    compiled = staged(lambda node: node.x + 1, Local(X)).compile()
    with pytest.raises(UnsupportedOperationError, match=r"save: the structure of .* cannot be pickled.*top of a module\."):
        compiled.save(tmp_path / "f")


def test_a_loop_cannot_be_saved(tmp_path):
    doubled = jit(lambda x: torchbatch.lax.fori_loop(0, 3, lambda i, y: y * 2, x), backend="eager")
    compiled = doubled.lower(torch.ones(2)).compile()
    with pytest.raises(UnsupportedOperationError, match="has a loop or a choice inside"):
        compiled.save(tmp_path / "loop.torchbatch")
