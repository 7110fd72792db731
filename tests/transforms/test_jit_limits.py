"""jit at its limits: libraries that look at values, changes of tensors themselves, subclasses, options, files, attributes."""

from __future__ import annotations

import copy
import functools
import inspect
import os
import pickle
import warnings

import pytest
import torch
from torch import distributions as dist
from torch import nn

from torchbatch import grad, jit, load, make_graph, vmap
from torchbatch.errors import (
    AxisSpecError,
    DataDependentError,
    InPlaceError,
    RetraceWarning,
    StaticArgumentError,
    UnsupportedOperationError,
)
from torchbatch.testing import assert_close

replayed = functools.partial(jit, backend="eager")
X = torch.tensor([[0.5, 1.0, 2.0], [3.0, 4.0, 5.0]])
W = torch.tensor([1.0, 2.0, 3.0])


def line_of(fun):
    lines, first = inspect.getsourcelines(fun)
    return f"\n  in {fun.__name__}, {__file__}:{first + 1}\n    {lines[1].strip()}"


# Distributions

LOG_PROBS = {
    "Normal": lambda x: dist.Normal(x, x + 1).log_prob(x),
    "Categorical": lambda x: dist.Categorical(logits=x).log_prob(torch.zeros(2)),
    "Gamma": lambda x: dist.Gamma(x, x + 1).log_prob(x),
    "Beta": lambda x: dist.Beta(x, x + 1).log_prob(torch.full((), 0.5)),
    "MultivariateNormal": lambda x: dist.MultivariateNormal(x[0], torch.eye(3)).log_prob(x[1]),
    "mapped": vmap(lambda x: dist.Normal(x, 1.0, validate_args=False).log_prob(x + 1)),
}


@pytest.fixture
def validation():
    """Distributions check their arguments, as they do unless PyTorch's compiler was imported."""
    before = dist.Distribution._validate_args
    dist.Distribution.set_default_validate_args(True)
    yield
    dist.Distribution.set_default_validate_args(before)


@pytest.mark.usefixtures("validation")
@pytest.mark.parametrize("name", LOG_PROBS)
def test_distributions_do_not_look_at_values_while_traced(name):
    fun = LOG_PROBS[name]
    assert_close(replayed(fun)(X), fun(X))
    with pytest.raises(ValueError, match="Expected parameter scale"):  # outside they do, as before
        dist.Normal(0.0, -1.0)


@pytest.mark.usefixtures("validation")
def test_distributions_look_again_after_an_error():
    with pytest.raises(RuntimeError):
        replayed(lambda x: x @ torch.ones(7))(X)
    with pytest.raises(ValueError, match="Expected parameter scale"):
        dist.Normal(0.0, -1.0)


def checked(x):
    return dist.Normal(x, 1.0, validate_args=True).log_prob(x)


def test_a_distribution_that_is_told_to_look():
    assert_close(vmap(checked)(X), checked(X))  # all samples are looked at
    with pytest.raises(DataDependentError) as raised:
        replayed(checked)(X)
    text = "A distribution checks its arguments, which needs their values. Make it with validate_args=False."
    assert str(raised.value) == text + line_of(checked)


def drawn(x):
    return nn.init.trunc_normal_(torch.empty(3)) + x


@pytest.mark.skipif("while True" not in inspect.getsource(nn.init), reason="this release of PyTorch draws once")
def test_draws_that_depend_on_draws():
    with pytest.raises(DataDependentError) as raised:
        replayed(drawn)(X)
    assert str(raised.value).startswith("trunc_normal_ draws again until all numbers are within the bounds")
    assert str(raised.value).endswith(line_of(drawn))


# Changes of the tensors themselves


def test_a_differentiable_value_is_written_into_an_argument(recwarn):
    w = torch.ones(3, requires_grad=True)
    with pytest.raises(InPlaceError) as raised:
        replayed(lambda x, w: x.add_(w) * 1)(torch.zeros(3), w)
    assert str(raised.value) == (
        "jit: the function writes a value that depends on something that requires a gradient into an argument, in place. "
        "Return the value, or write value.detach()."
    )
    assert not [warning for warning in recwarn if "not a leaf" in str(warning.message)]


CHANGES = {
    "t_": lambda w: w.t_(),
    "transpose_": lambda w: w.transpose_(0, 1),
    "unsqueeze_": lambda w: w.unsqueeze_(0),
    "squeeze_": lambda w: w.squeeze_(),
    "resize_": lambda w: w.resize_(3, 2),
    "as_strided_": lambda w: w.as_strided_((2,), (1,)),
}


@pytest.mark.parametrize("target", ["an argument", "a tensor that it closes over"])
@pytest.mark.parametrize("name", CHANGES)
def test_the_shape_of_a_tensor_is_changed(name, target, capfd):
    change, w = CHANGES[name], torch.ones(1, 2, 3)[0] if name != "squeeze_" else torch.ones(1, 3)
    fun = change if target == "an argument" else (lambda x: change(w) * 1)
    before = (w.shape, w.stride())
    with pytest.raises(UnsupportedOperationError) as raised:
        replayed(fun)(w if target == "an argument" else torch.ones(()))
    assert str(raised.value).startswith(f"jit: the function changes the shape or the strides of {target} in place (t_(), ")
    assert "While executing" not in str(raised.value) and not any(capfd.readouterr())
    assert (w.shape, w.stride()) == before


def test_a_tensor_made_inside_may_change():
    assert_close(replayed(lambda x: x.clone().t_() * 2)(X), X.T * 2)


# Copies

COPIES = {
    "of a captured tensor": lambda x: copy.deepcopy(W) + x,
    "of an argument": lambda x: copy.deepcopy(x) + copy.copy(x),
    "written": lambda x: copy.deepcopy(x).mul_(2) + x,
    "written, and the same": lambda x: x.clone().add_(0) + copy.copy(x.clone()).mul_(2),
    "of a container": lambda x: sum(copy.deepcopy({"x": x, "w": [W]})["w"]) + x,
}


@pytest.mark.parametrize("name", COPIES)
def test_copies_are_recorded(name):
    assert_close(replayed(COPIES[name])(X.clone()), COPIES[name](X.clone()))


def test_a_deep_copy_is_a_leaf_of_its_own():
    w = W.clone().requires_grad_()
    replayed(lambda x: (copy.deepcopy(w) * x * w).sum())(W).backward()
    assert_close(w.grad, W * W)
    assert replayed(lambda x: copy.deepcopy(w).requires_grad and not copy.deepcopy(x).requires_grad)(W)


def test_a_module_is_copied():
    module = nn.Linear(3, 2)
    assert_close(replayed(lambda x: copy.deepcopy(module)(x))(X), module(X))


def shared(x):
    return copy.copy(W) + x


def pickled(x):
    return pickle.loads(pickle.dumps(W)) + x


@pytest.mark.parametrize("fun", [shared, pickled])
def test_the_memory_of_a_captured_tensor(fun):
    with pytest.raises(UnsupportedOperationError) as raised:
        replayed(fun)(X)
    text = f"The memory of a tensor that {fun.__name__} closes over is asked for (copy.copy, pickle, set_()), but "
    assert str(raised.value).startswith(text) and str(raised.value).endswith(line_of(fun))


# Functions that torch.compile made


def test_a_compiled_function_dissolves():
    inner = torch.compile(lambda x: x.sin() * 2, backend="eager")
    for fun in (inner, lambda x: inner(x) + 1, vmap(inner), lambda x: vmap(inner)(x), grad(lambda x: inner(x).sum())):
        assert_close(replayed(fun)(X), fun(X))
    model = nn.Linear(3, 2)
    assert_close(replayed(torch.compile(model, backend="eager"))(X), model(X))


# Subclasses


class Plain(torch.Tensor):
    pass


class Scale(nn.Parameter):
    pass


def test_a_captured_tensor_of_a_class():
    own = W.as_subclass(Plain)
    with pytest.raises(UnsupportedOperationError, match="closes over a tensor of class Plain; jit takes plain tensors"):
        replayed(lambda x: own * x)(X)


def test_an_argument_of_a_class():
    with pytest.raises(UnsupportedOperationError, match=r"argument x of <lambda> is a Plain; .*x\.as_subclass\(torch\.Tensor\)"):
        replayed(lambda x: x + 1)(X.as_subclass(Plain))


@pytest.mark.parametrize("kind", [nn.Parameter, Scale, nn.Buffer])
def test_classes_that_change_nothing(kind):
    value = kind(W.clone())
    assert_close(replayed(lambda x: value * x)(value), W * W)


# Where a stage cannot be made


@pytest.mark.parametrize("around", [vmap, replayed, grad])
def test_lower_inside_a_transform(around):
    def fun(x):
        jit(torch.sin).lower(x)
        return x.sum()

    with pytest.raises(UnsupportedOperationError, match=r"^lower is called inside a transform, .*jit\(vmap\(f\)\)\.lower"):
        around(fun)(W)


def test_make_graph_inside_a_transform():
    with pytest.raises(UnsupportedOperationError, match=r"^make_graph is called inside a transform, .*make_graph\(vmap\(f\)\)"):
        vmap(lambda x: make_graph(torch.sin)(x))(X)


# Numbers


def rounded(x, n):
    return x * round(n)


def looked_up(x, n):
    return {0: x}[n]


def split(x, n):
    return divmod(n, 2)


@pytest.mark.parametrize(
    ("fun", "error", "text"),
    [
        (rounded, DataDependentError, "round() needs a number of Python's, but rounded is being traced"),
        (looked_up, DataDependentError, "Python looks for a value in a dict or a set, but looked_up is being traced"),
        (split, UnsupportedOperationError, "divmod does not take tensors, and split is being traced, where a number is one."),
    ],
)
def test_what_python_does_with_numbers_alone(fun, error, text):
    with pytest.raises(error) as raised:
        replayed(fun)(X, 3)
    assert str(raised.value).startswith(text) and str(raised.value).endswith(line_of(fun))


def test_a_key_that_is_missing_is_the_users_error():
    with pytest.raises(KeyError, match=r"^'b'$"):
        replayed(lambda x: {"a": x}["b"])(X)


EXPRESSIONS = (
    "n - True, True - n, True + n, n * True, n // True, n % True, n ** -1, n ** -2, n ** 2, n ** True, +n, -n, abs(n), "
    "n * 0.1, n + 1j, n * 1j - True, (n * 0.1) + half, n / 3 * half, n - 0.5 + half"
).split(", ")


@pytest.mark.parametrize("number", [True, 3, -2, 2.5])
@pytest.mark.parametrize("text", EXPRESSIONS)
def test_arithmetic_is_that_of_python(text, number):
    fun = eval(f"lambda n, half: {text}")
    half = torch.ones((), dtype=torch.float16)
    assert_close(replayed(fun)(number, half), torch.as_tensor(fun(number, half)), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("number", [True, False])
@pytest.mark.parametrize("text", ["n & True", "n | False", "n ^ True", "n << 1", "n >> 1", "b ** n", "b & n"])
def test_logic_is_that_of_python(text, number):
    fun = eval(f"lambda b, n: {text}")
    b = torch.tensor([True, False])
    assert_close(replayed(fun)(b, number), torch.as_tensor(fun(b, number)))


# Options


@pytest.mark.parametrize("dynamic", ["yes", 1, None])
def test_dynamic_is_a_truth_value(dynamic):
    with pytest.raises(AxisSpecError, match=r"^jit: dynamic must be True or False, but it is "):
        jit(torch.sin, dynamic=dynamic)


@pytest.mark.parametrize("given", [True, [True], (0, False)])
@pytest.mark.parametrize("option", ["static_argnums", "donate_argnums"])
def test_a_truth_value_is_no_position(option, given):
    with pytest.raises(StaticArgumentError, match=f"^jit: {option} must be one or several ints, but it is "):
        jit(lambda x: x, **{option: given})


def test_none_is_no_function():
    with pytest.raises(AxisSpecError, match=r"^jit compiles a function, but it got None of type NoneType"):
        jit(None)
    assert jit(backend="eager")(torch.sin)(torch.zeros(())) == 0


def test_dynamic_without_a_map_is_said_once():
    def doubled(x):
        return x * 2

    jitted = replayed(doubled, dynamic=True)
    text = r"^jit: dynamic=True opens the sizes of mapped axes, but in doubled no vmap maps an axis of an argument"
    with pytest.warns(RetraceWarning, match=text) as seen:
        for size in (2, 3, 4):
            jitted(torch.ones(size))
    assert len(seen) == 1 and seen[0].filename == __file__


@pytest.mark.parametrize("fun, x", [(vmap(torch.sin), X), (lambda x: vmap(torch.sin)(x), X), (torch.sin, X[0, 0])])
def test_dynamic_with_a_map_or_without_axes_is_not_said(fun, x):
    with warnings.catch_warnings():
        warnings.simplefilter("error", RetraceWarning)
        assert_close(replayed(fun, dynamic=True)(x), x.sin())


# Modes of PyTorch


def test_under_a_default_device_calls_are_recognised():
    jitted = replayed(lambda x: x + torch.ones(3))
    with torch.device("cpu"):
        assert_close(jitted(W), W + 1)
        assert jitted._cache.tickets[0].check(W)
    with torch.device("meta"):
        assert jitted(torch.ones(3)).device.type == "meta" or jitted.cache_size() == 2


# Files and attributes


def doubled(x):
    return 2 * x


@pytest.fixture
def stages(tmp_path):
    lowered = replayed(doubled).lower(W)
    compiled = lowered.compile()
    compiled.save(tmp_path / "stage")
    return {"lowered": lowered, "compiled": compiled, "loaded": load(tmp_path / "stage")}


ADVICE = {"lowered": ".compile()", "compiled": ".save(path)", "loaded": "torchbatch.load(path)"}


@pytest.mark.parametrize(("name", "advice"), ADVICE.items())
def test_stages_are_not_pickled(stages, name, advice):
    with pytest.raises(UnsupportedOperationError) as raised:
        pickle.dumps(stages[name])
    assert str(raised.value).startswith(f"<{name} doubled> cannot be pickled.") and advice in str(raised.value)
    assert copy.deepcopy([stages[name]])[0] is stages[name] is copy.copy(stages[name])


def test_a_folder_is_no_file(stages, tmp_path):
    with pytest.raises(FileExistsError, match=r"^save: .* is a folder\. Give the name of a file, such as .*name\.torchbatch\.$"):
        stages["compiled"].save(tmp_path)
    with pytest.raises(FileExistsError, match=r"is no ordinary file\."):
        stages["compiled"].save(os.devnull)
    assert not os.path.isfile(os.devnull)


def test_a_file_is_replaced_as_a_whole(stages, tmp_path, monkeypatch):
    path, link = tmp_path / "stage", tmp_path / "link"
    link.symlink_to(path)
    before = path.read_bytes()

    def full(self, content):
        with open(self, "wb") as file:
            file.write(content[:10])
        raise OSError("no space left")

    with monkeypatch.context() as patched:
        patched.setattr(type(path), "write_bytes", full)
        with pytest.raises(OSError, match="no space left"):
            stages["compiled"].save(path)
    assert path.read_bytes() == before and sorted(os.listdir(tmp_path)) == ["link", "stage"]
    replayed(lambda x: 3 * x).lower(W).compile().save(link)
    assert link.is_symlink() and torch.equal(load(path)(W), 3 * W)


def test_a_compiled_module_has_the_attributes_of_the_module():
    module = nn.Sequential(nn.Linear(3, 2), nn.Dropout())
    jitted = replayed(module)
    assert list(jitted.state_dict()) == list(module.state_dict())
    assert list(map(id, jitted.parameters())) == list(map(id, module.parameters()))
    assert jitted.eval() is jitted and not module.training
    assert_close(jitted(X), module(X))
    assert jitted.train().training and not hasattr(jitted, "nothing")


def test_a_compiled_function_has_no_attributes_of_a_module():
    with pytest.raises(AttributeError, match="'Jitted' object has no attribute 'parameters'"):
        replayed(doubled).parameters()
