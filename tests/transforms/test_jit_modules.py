"""jit: what may change about a module, and what a module may not keep."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune

from torchbatch import checkpoint, jit, make_graph, vmap
from torchbatch.errors import InputTypeError, LeakedTracerError, UnsupportedOperationError
from torchbatch.testing import assert_close

replayed = functools.partial(jit, backend="eager")
X = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
ONES = torch.ones(64)

# Training and evaluation


def dropped(module, x):
    return F.dropout(x, 0.5, module.training)


class Nested(nn.Module):
    def forward(self, x):
        return (lambda z: F.dropout(z, 0.5, self.training))(x)


class Generator(nn.Module):
    def forward(self, x):
        return sum(F.dropout(part, 0.5, self.training) for part in [x])


class Decorated(nn.Module):
    @torch.no_grad()
    def forward(self, x):
        return F.dropout(x, 0.5, self.training)


class Encoder(nn.Module):
    def encode(self, x):
        return F.dropout(x, 0.5, self.training)

    def forward(self, x):
        return self.encode(x)


class ByHelper(nn.Module):
    def forward(self, x):
        return dropped(self, x)


class ByProperty(nn.Module):
    @property
    def share(self):
        return 0.5 if self.training else 0.0

    def forward(self, x):
        return F.dropout(x, self.share)


class ByName(nn.Module):
    def forward(self, x):
        return F.dropout(x, 0.5, getattr(self, "train" + "ing"))


class HoldsPartial(nn.Module):
    def __init__(self):
        super().__init__()
        self.drop = functools.partial(dropped, self)

    def forward(self, x):
        return self.drop(x)


class CallsForward(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.encoder = nn.Dropout(0.5), Encoder()

    def forward(self, x):
        return self.encoder.encode(self.inner.forward(x))


class NotRegistered(nn.Module):
    """Its dropout is in a plain list, and in training whatever it is in itself."""

    def __init__(self):
        super().__init__()
        self.layers = [Encoder()]

    def train(self, mode=True):
        self.layers[0].train(mode)
        return super().train(mode)

    def forward(self, x):
        return self.layers[0].encode(x)


def hooked():
    module = nn.Identity()
    module.register_forward_hook(lambda module, args, output: dropped(module, output))
    return module


def scripted():
    return torch.jit.script(nn.Sequential(nn.Dropout(0.5)))


MODULES = [Nested, Generator, Decorated, Encoder, ByHelper, ByProperty, ByName, HoldsPartial, CallsForward, NotRegistered]
MODULES += [hooked, nn.Dropout, pytest.param(scripted, marks=pytest.mark.filterwarnings("ignore:.*torch.jit"))]


def sees_the_mode(fun, module):
    """Whether ``fun`` drops in training, and not in evaluation; each is traced once."""
    jitted = replayed(fun)
    for _ in range(2):
        module.train()
        trained = jitted(ONES)
        module.eval()
        evaluated = jitted(ONES)
        assert torch.equal(evaluated, ONES) and not torch.equal(trained, ONES)
    return jitted.cache_size() == 2


@pytest.mark.parametrize("make", MODULES)
def test_a_module(make):
    module = make()
    assert sees_the_mode(module, module)


GLOBAL = Encoder()


class Model:
    """No module, but it holds one."""

    def __init__(self):
        self.parts = {"encoder": Encoder()}

    def predict(self, x):
        return self.parts["encoder"].encode(x)


def of_global(x):
    return dropped(GLOBAL, x)


def of_default(x, module=GLOBAL):
    return dropped(module, x)


ENCODER, MODEL, DROPOUT = Encoder(), Model(), nn.Dropout(0.5)
FUNCTIONS = {
    "a method": (ENCODER.encode, ENCODER),
    "forward": (DROPOUT.forward, DROPOUT),
    "a lambda": ((lambda m: lambda x: F.dropout(x, 0.5, m.training))(ENCODER), ENCODER),
    "a partial": (functools.partial(dropped, ENCODER), ENCODER),
    "a global": (of_global, GLOBAL),
    "a default": (of_default, GLOBAL),
    "a method of another object": (MODEL.predict, MODEL.parts["encoder"]),
    "another jit function": (replayed(ENCODER.encode), ENCODER),
    "a checkpoint": (checkpoint(ENCODER.encode), ENCODER),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_that_reaches_a_module(name):
    assert sees_the_mode(*FUNCTIONS[name])


def test_a_method_in_vmap():
    module = Encoder()
    jitted = replayed(vmap(module.encode, randomness="different"))
    assert not torch.equal(jitted(torch.ones(8, 8)), torch.ones(8, 8))
    module.eval()
    assert torch.equal(jitted(torch.ones(8, 8)), torch.ones(8, 8))


def test_a_static_module():
    module = Encoder()
    jitted = replayed(dropped, static_argnums=0)
    assert not torch.equal(jitted(module, ONES), ONES)
    module.eval()
    assert torch.equal(jitted(module, ONES), ONES)


def test_a_module_that_is_made_inside_is_not_remembered():
    jitted = replayed(lambda x: nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.0))(x))
    for _ in range(3):
        jitted(X)
    assert jitted.cache_size() == 1


# Other tensors and modules


def assign(model):
    model.load_state_dict({name: value + 1 for name, value in model.state_dict().items()}, assign=True)


def new_weight(model):
    model[0].weight = nn.Parameter(torch.full((3, 3), 5.0))


def no_bias(model):
    model[0].bias = None


def new_buffer(model):
    model[1].running_mean = torch.full((3,), 5.0)


def new_module(model):
    model[1] = nn.Identity()


def one_more(model):
    model.append(nn.Tanh())


def one_less(model):
    del model[1]


def other_dtype(model):
    model.double()
    model.float()


@pytest.mark.parametrize("change", [assign, new_weight, no_bias, new_buffer, new_module, one_more, one_less, other_dtype])
def test_what_is_replaced_is_seen(change):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).eval()
    jitted = replayed(model)
    before = jitted(X)
    change(model)
    got = jitted(X)
    assert_close(got, model(X))
    assert torch.equal(got, before) == (change is other_dtype)


def test_the_buffers_that_are_updated_are_those_of_now():
    model, other = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    jitted = replayed(model)
    jitted(X)
    other(X)
    for module in (model, other):
        module.double().float()
    jitted(X)
    other(X)
    assert_close(model.state_dict(), other.state_dict())


def test_what_is_replaced_for_a_time_only_needs_no_other_trace():
    model = nn.Linear(3, 3)
    jitted = replayed(model)
    want = jitted(X)
    for _ in range(3):
        torch.func.functional_call(model, {"weight": torch.zeros(3, 3)}, X)
        assert torch.equal(jitted(X), want)
    assert jitted.cache_size() == 1


def test_a_module_within_one_that_is_given_other_parameters():
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    model[0].forward = replayed(model[0].forward)
    model(X)
    given = {"0.weight": torch.zeros(3, 3), "0.bias": torch.ones(3)}
    assert torch.equal(torch.func.functional_call(model, given, X), torch.ones(2, 3))


def test_a_compiled_stage_refuses_another_tensor():
    model = nn.Linear(3, 3)
    stage = replayed(model).lower(X).compile()
    stage(X)
    model.weight = nn.Parameter(torch.zeros(3, 3))
    for _ in range(2):
        with pytest.raises(InputTypeError) as raised:
            stage(X)
        assert str(raised.value) == (
            "Linear was compiled for another kind of call: its weight of module Linear was float32[3,3] when it was compiled, "
            "and is another float32[3,3] now. Compile it again."
        )


# Values that a module keeps


class Keeps(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros(()))
        self.state, self.pair, self.kept, self.values = torch.zeros(3), (torch.zeros(3),), [], nn.ParameterDict()

    def forward(self, x, how):
        return getattr(self, how)(x)

    def buffer(self, x):
        self.count = self.count + 1
        return x * self.count

    def attribute(self, x):
        self.state = torch.tanh(self.state + x)
        return self.state

    def tuple(self, x):
        self.pair = (self.pair[0] + x,)
        return self.pair[0]

    def new_buffer(self, x):
        self.register_buffer("last", x * 2)
        return x * 1

    def new_attribute(self, x):
        object.__setattr__(self, "last", {"a": [x * 2]})
        return x * 1

    def inside_vmap(self, x):
        return vmap(self.attribute)(x)

    def parameter_dict(self, x):
        self.values.update({"a": x * 2})
        return x * 1

    def list(self, x):
        self.kept.append(x * 2)
        return x * 1

    def and_fails(self, x):
        self.attribute(x)
        raise KeyError("mine")


KEPT = {
    "buffer": "Keeps keeps a value of the trace in its buffer count",
    "attribute": "Keeps keeps a value of the trace in its attribute state",
    "tuple": "Keeps keeps a value of the trace in its attribute pair",
    "new_buffer": "Keeps keeps a value of the trace in its buffer last",
    "new_attribute": "Keeps keeps a value of the trace in its attribute last",
    "inside_vmap": "Keeps keeps a value of the trace in its attribute state",
    "parameter_dict": "ParameterDict keeps a value of the trace in its parameter a",
    "list": "Keeps keeps a value of the trace in its attribute kept",
}


def contents(module):
    return {**vars(module), **module._buffers, **module.values}


@pytest.mark.parametrize("how", KEPT)
def test_a_module_keeps_a_value(how):
    module = Keeps()
    before = contents(module)
    with pytest.raises(LeakedTracerError) as raised:
        replayed(functools.partial(module, how=how))(X)
    assert str(raised.value).startswith(f"jit: {KEPT[how]}, which would happen only while the function is traced, and")
    after = contents(module)
    assert after.keys() == before.keys() and all(after[name] is before[name] for name in before)


def test_a_method_keeps_a_value_in_each_trace():
    module = Keeps()
    jitted = replayed(module.list)
    for _ in range(2):
        with pytest.raises(LeakedTracerError, match="in its attribute kept"):
            jitted(X)


def test_the_text_of_the_error():
    with pytest.raises(LeakedTracerError) as raised:
        replayed(Keeps().buffer)(X)
    assert str(raised.value) == (
        "jit: Keeps keeps a value of the trace in its buffer count, which would happen only while the function is traced, and "
        "not at each call. Write into a tensor in place (self.count.copy_(…), self.count.add_(…)), or return the new state. If "
        "it is a cache, fill it before: run the module once without jit."
    )


@pytest.mark.parametrize("look", [make_graph, lambda fun: replayed(fun).lower])
def test_looking_at_the_graph_leaves_the_module_as_it_was(look):
    module = Keeps()
    with pytest.raises(LeakedTracerError, match="buffer count"):
        look(module.buffer)(X)
    assert torch.equal(module.count, torch.zeros(()))


def test_an_error_inside_leaves_the_module_as_it_was():
    module = Keeps()
    with pytest.raises(KeyError, match="mine"):
        replayed(module.and_fails)(X)
    assert torch.equal(module.state, torch.zeros(3))


def test_what_is_written_in_place_counts_each_call():
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x):
            self.count.add_(1)
            return x * self.count

    module = Counts()
    jitted = replayed(module)
    assert [jitted(torch.ones(())).item() for _ in range(3)] == [1, 2, 3] and module.count == 3


def test_python_values_may_be_kept():
    class Notes(nn.Module):
        def forward(self, x):
            self.shape, self.other = x.shape, torch.nn.Identity()
            return x * 2

    module = Notes()
    assert torch.equal(replayed(module)(X), X * 2) and module.shape == X.shape


def test_a_module_that_is_made_inside_may_keep_values():
    class Cell(nn.Module):
        def __init__(self):
            super().__init__()
            self.state, self.cycle = None, self.forward

        def forward(self, x):
            self.state = x if self.state is None else self.state + x
            return self.state

    def fun(x):
        cell = Cell()
        cell(x)
        return cell(x)

    assert torch.equal(replayed(fun)(X), X * 2)


def with_given_weights(layer):
    given = {name: value.detach() * 2 for name, value in layer.named_parameters()}
    jitted = replayed(lambda given, x: torch.func.functional_call(layer, given, (x,))[0])
    return lambda x: jitted(given, x), lambda x: torch.func.functional_call(layer, given, (x,))[0]


@pytest.mark.parametrize("make", [nn.LSTM, nn.GRU])
def test_recurrent_modules_with_given_weights(make):
    """PyTorch keeps a list of their weights, and looks whether it is the right one."""
    layer = make(3, 2)
    want_before = layer(X)[0]
    got, want = with_given_weights(layer)
    assert_close(got(X), want(X))
    assert_close(layer(X)[0], want_before)


@pytest.mark.filterwarnings("ignore:.*weight_norm")
@pytest.mark.parametrize(
    "make",
    [torch.nn.utils.weight_norm, torch.nn.utils.spectral_norm, lambda layer: prune.identity(layer, "weight")],
    ids=["weight_norm", "spectral_norm", "prune"],
)
def test_weights_that_pytorch_computes_before_each_call(make):
    torch.manual_seed(0)
    module = make(nn.Linear(3, 3)).eval()
    want = module(X)
    jitted = replayed(module)
    assert_close(jitted(X), want)
    assert_close(module(X), want)


# Hooks


def test_backward_hooks_run_while_the_function_is_traced():
    seen = []
    module = nn.Linear(3, 3)
    module.register_full_backward_hook(lambda module, inner, outer: seen.append(outer[0]))
    jitted = replayed(module)
    for _ in range(2):
        jitted(X).sum().backward()
    assert len(seen) == 1
    with pytest.raises(LeakedTracerError):
        seen[0] + 1


# Lazy modules


@pytest.mark.parametrize("make", [lambda: nn.LazyLinear(2), lambda: nn.Sequential(nn.ReLU(), nn.LazyLinear(2))])
def test_a_lazy_module_is_run_before(make):
    module = make()
    with pytest.raises(UnsupportedOperationError) as raised:
        replayed(module)(X)
    assert str(raised.value) == (
        "jit: the function runs a LazyLinear, whose weight has no shape yet: a lazy module takes it from the first numbers that "
        "it sees. Run the module once before, without jit."
    )
    want = module(X)
    assert_close(replayed(module)(X), want)
