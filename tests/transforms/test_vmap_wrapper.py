"""Rules 18 and 19: the mapped function looks like the function, and vmap is spelled as in JAX."""

from __future__ import annotations

import copy
import functools
import inspect
import pickle

import pytest
import torch

import torchbatch
from torchbatch import vmap
from torchbatch.errors import AxisError, AxisSpecError
from torchbatch.testing import loop

jax = pytest.importorskip("jax")
X = torch.arange(6.0).reshape(3, 2)


def plain(x: torch.Tensor, y: float = 2.0, *rest: int, scale: int = 1, **others: str) -> torch.Tensor:
    """Multiply."""
    return x * y


mapped_plain = vmap(plain)


@vmap
def decorated(x):
    """Decorated."""
    return x + 1


@functools.partial(vmap, in_axes=(None, 0), out_axes=1)
def with_options(x, y):
    return x * y


class Callee:
    def __call__(self, x):
        return x * 3


class Model:
    def __init__(self, factor):
        self.factor = factor

    @vmap
    def first(self, x):
        return x * self.factor

    @functools.partial(vmap, in_axes=(None, 0))
    def second(self, x):
        return x * self.factor

    @staticmethod
    @vmap
    def static(x):
        return x * 4

    def mapped_elsewhere(self, x):
        return x * self.factor


# --- rule 18: the wrapper --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attribute", ["__name__", "__qualname__", "__doc__", "__module__", "__annotations__"])
def test_rule_18_keeps_what_describes_the_function(attribute):
    assert getattr(mapped_plain, attribute) == getattr(plain, attribute)


def test_rule_18_keeps_wrapped_and_signature():
    assert mapped_plain.__wrapped__ is plain
    assert inspect.signature(mapped_plain) == inspect.signature(plain) == inspect.signature(jax.vmap(plain))
    assert inspect.unwrap(vmap(vmap(plain))) is plain
    assert inspect.getdoc(mapped_plain) == "Multiply."


@pytest.mark.parametrize("fun", [Callee(), functools.partial(plain, y=3.0), torch.nn.ReLU(), torch.sin, abs, lambda x: x])
def test_rule_18_any_callable_can_be_mapped(fun):
    assert callable(vmap(fun)) and vmap(fun).__wrapped__ is fun
    assert torch.equal(vmap(fun)(X), loop(fun)(X))


def test_rule_18_bound_methods_can_be_mapped():
    model = Model(5.0)
    assert torch.equal(vmap(model.mapped_elsewhere)(X), X * 5)
    assert vmap(model.mapped_elsewhere).__name__ == "mapped_elsewhere"


def test_rule_18_works_as_a_decorator():
    assert torch.equal(decorated(X), X + 1)
    assert decorated.__name__ == "decorated" and decorated.__doc__ == "Decorated."
    assert torch.equal(with_options(X[0, 0] + 2, X), (2 * X).T)


class Number(torch.nn.Module):
    """A module is what a decorated method can get as its first argument, whatever its axis."""

    def __init__(self):
        super().__init__()
        self.factor = torch.nn.Parameter(torch.tensor(5.0))

    @vmap
    def every(self, x):
        return x * self.factor

    @functools.partial(vmap, in_axes=(None, 0))
    def second(self, x):
        return x * self.factor


def test_rule_18_works_on_methods():
    model = Model(5.0)
    assert torch.equal(model.second(X), X * 5)
    assert torch.equal(Model.second(model, X), X * 5)
    assert torch.equal(model.static(X), X * 4)
    assert torch.equal(Number().every(X), X * 5) and torch.equal(Number().second(X), X * 5)
    with pytest.raises(TypeError):
        model.first(X)


def test_rule_18_a_method_through_its_class_is_the_wrapper_itself():
    assert Model.second is Model.__dict__["second"]


def test_rule_18_shows_what_it_maps():
    assert repr(mapped_plain) == "<vmap of plain>"
    assert repr(vmap(Callee())) == "<vmap of Callee>"
    assert repr(vmap(functools.partial(plain))) == "<vmap of partial>"
    assert repr(vmap(mapped_plain)) == "<vmap of plain>"


@pytest.mark.parametrize(
    ("mapped", "args"),
    [
        (mapped_plain, (X,)),
        (vmap(plain, in_axes=1, out_axes=-1), (X,)),
        (vmap(plain, (0, None), chunk_size=2, randomness="same", axis_name="b", axis_size=3), (X, torch.tensor(2.0))),
        (vmap(vmap(plain)), (X,)),
        (vmap(functools.partial(plain, y=3.0)), (X,)),
        (vmap(torch.sin), (X,)),
        (vmap(Callee()), (X,)),
        (vmap(Model(2.0).mapped_elsewhere), (X,)),
        (decorated, (X,)),
        (with_options, (X[0], X)),
    ],
    ids=lambda value: None,
)
def test_rule_18_pickles_where_fun_does(mapped, args):
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        again = pickle.loads(pickle.dumps(mapped, protocol))
        assert torch.equal(again(*args), mapped(*args))
        assert inspect.unwrap(again).__class__ is inspect.unwrap(mapped).__class__
    assert torch.equal(copy.deepcopy(mapped)(*args), mapped(*args))
    assert torch.equal(copy.copy(mapped)(*args), mapped(*args))


def test_rule_18_a_decorated_function_pickles_by_name():
    assert pickle.loads(pickle.dumps(decorated)) is decorated


def test_rule_18_does_not_pickle_where_fun_does_not():
    with pytest.raises((pickle.PicklingError, AttributeError)):
        pickle.dumps(vmap(lambda x: x))


def test_rule_18_attributes_of_fun_are_not_the_wrappers():
    def fun(x):
        return x

    fun.note = 1
    assert not hasattr(vmap(fun), "note") and vmap(fun).__wrapped__.note == 1


def test_rule_18_a_function_can_be_mapped_many_times_and_changed_between():
    weights = {"w": 1.0}
    mapped = vmap(lambda x: x * weights["w"])
    assert torch.equal(mapped(X), X)
    weights["w"] = 2.0
    assert torch.equal(mapped(X), X * 2)


def test_rule_18_works_on_functions_of_no_known_signature():
    mapped = vmap(torch.add)
    assert torch.equal(mapped(X, X), X + X)
    with pytest.raises(AxisError, match=r"argument args\[1\]"):
        mapped(X, X[:2])


# --- rule 19: spelling -----------------------------------------------------------------------------------------------


def test_rule_19_the_first_seven_parameters_are_those_of_jax():
    ours = list(inspect.signature(vmap).parameters.values())
    theirs = list(inspect.signature(jax.vmap).parameters.values())
    assert [(p.name, p.kind, p.default) for p in ours[:7]] == [(p.name, p.kind, p.default) for p in theirs[:7]]


def test_rule_19_the_last_two_parameters_are_those_of_pytorch():
    ours, theirs = inspect.signature(vmap).parameters, inspect.signature(torch.func.vmap).parameters
    for name in ("randomness", "chunk_size"):
        assert ours[name].kind is inspect.Parameter.KEYWORD_ONLY and ours[name].default == theirs[name].default


def test_rule_19_options_can_be_given_by_place():
    assert torch.equal(vmap(plain, 1, 1, "name", 2, "spmd", False)(X), X * 2)


@pytest.mark.parametrize(("wrong", "right"), [("in_dims", "in_axes"), ("out_dims", "out_axes")])
def test_rule_19_the_spelling_of_torch_func_is_refused(wrong, right):
    for mapped in (vmap, loop):
        with pytest.raises(AxisSpecError, match=rf"{wrong}.*{right}="):
            mapped(plain, **{wrong: 0})
    with pytest.raises(AxisSpecError) as caught:
        vmap(plain, **{wrong: 0})
    assert str(caught.value) == f"vmap has no option {wrong!r}: it is spelled {right}= here, as in JAX."


def test_rule_19_unknown_options_are_refused_like_any_unexpected_keyword():
    for mapped in (vmap, loop, jax.vmap):
        with pytest.raises(TypeError):
            mapped(plain, axes=0)


@pytest.mark.parametrize("bad", [3, "text", None, X, [plain]])
def test_rule_19_what_is_no_function_is_refused(bad):
    for mapped in (vmap, loop, jax.vmap):
        with pytest.raises(TypeError):
            mapped(bad)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"randomness": "sometimes"}, AxisError),
        ({"randomness": None}, AxisError),
        ({"randomness": ["same"]}, AxisError),
        ({"chunk_size": 0}, AxisError),
        ({"chunk_size": -1}, AxisError),
        ({"chunk_size": 1.5}, AxisSpecError),
        ({"chunk_size": True}, AxisSpecError),
        ({"axis_size": -1}, AxisError),
        ({"axis_size": "3"}, AxisSpecError),
        ({"axis_name": []}, AxisSpecError),
    ],
)
def test_rule_19_options_are_checked_at_once(options, error):
    with pytest.raises(error):
        vmap(plain, **options)
    if "axis_name" not in options:
        with pytest.raises(error):
            loop(plain, **options)


def test_rule_19_is_importable_from_the_top():
    assert torchbatch.vmap is vmap
