"""jit: how arguments are bound, static ones, NumPy arrays, tensors of other kinds."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch

from torchbatch import jit
from torchbatch.core import tree
from torchbatch.errors import StaticArgumentError, UnsupportedOperationError
from torchbatch.testing import assert_close

replayed = functools.partial(jit, backend="eager")
X = torch.tensor([1.0, 2.0, 3.0])


def scaled(x, n):
    return x * n


def noted(fun):
    """The function, and a list of the values that its argument ``n`` had when Python ran it."""
    seen = []

    @functools.wraps(fun)
    def run(x, n):
        seen.append(n)
        return fun(x, n)

    return run, seen


# Binding


def everything(a, /, b, c=3.0, *rest, d, e=5.0, **others):
    return {"a": a, "b": b, "c": c, "rest": rest, "d": d, "e": e, "others": others}


CALLS = {
    "least": lambda f: f(X, 2.0, d=4.0),
    "by name": lambda f: f(X, b=2.0, d=4.0),
    "defaults given": lambda f: f(X, 2.0, 30.0, d=4.0, e=50.0),
    "more by position": lambda f: f(X, 2.0, 30.0, 6.0, X, d=4.0),
    "more by name": lambda f: f(X, 2.0, d=X, y=7.0, z={"k": [X]}),
    "the name of a positional-only parameter": lambda f: f(X, 2.0, d=4.0, a=1.0),
    "none and empty trees": lambda f: f(X, None, d=(), e={}, z=[]),
}


@pytest.mark.parametrize("name", CALLS)
def test_arguments_are_bound_as_by_python(name):
    got, want = CALLS[name](replayed(everything)), CALLS[name](everything)
    assert tree.flatten(got)[1] == tree.flatten(want)[1]
    assert_close(tree.flatten(got)[0], [torch.as_tensor(leaf) for leaf in tree.flatten(want)[0]])


BADLY = {
    "missing": lambda f: f(X),
    "too many": lambda f: f(X, 1.0, 2.0),
    "unknown": lambda f: f(X, 1.0, z=2.0),
    "twice": lambda f: f(X, 1.0, x=2.0),
}


@pytest.mark.parametrize("name", BADLY)
@pytest.mark.parametrize("options", [{}, {"static_argnums": 1}, {"donate_argnums": 0}])
def test_badly_bound_arguments_are_pythons_own_error(name, options):
    """Also after a good call; and the message is that of the function itself."""
    jitted = replayed(scaled, **options)
    jitted(X.clone(), 2.0)
    with pytest.raises(TypeError) as plain:
        BADLY[name](scaled)
    with pytest.raises(TypeError) as raised:
        BADLY[name](jitted)
    assert str(raised.value) == str(plain.value)


def test_nothing_comes_in():
    assert torch.equal(replayed(lambda: X * 2)(), X * 2)
    assert replayed(lambda: 3)().dtype == torch.int64
    assert replayed(lambda x: x)(()) == ()


def test_by_position_and_by_name_are_two_kinds_of_call():
    fun, seen = noted(scaled)
    jitted = replayed(fun)
    for _ in range(2):
        assert torch.equal(jitted(X, 2.0), X * 2) and torch.equal(jitted(X, n=3.0), X * 3)
        assert torch.equal(jitted(n=4.0, x=X), X * 4)
    assert len(seen) == jitted.cache_size() == 3


# Static arguments


@pytest.mark.parametrize("nums", [1, -1, (1,), [1], {1}, (1, 1), (1, -1), range(1, 2), np.int64(1)])
def test_static_argnums_in_all_forms(nums):
    fun, seen = noted(scaled)
    jitted = replayed(fun, static_argnums=nums)
    for n in (2, 3, 2):
        assert torch.equal(jitted(X, n), X * n) and torch.equal(jitted(X, n=n), X * n)
    assert set(seen) == {2, 3} and all(type(n) is int for n in seen)


@pytest.mark.parametrize("names", ["n", ("n",), ["n"], {"n"}, ("n", "n"), iter(("n",))])
def test_static_argnames_in_all_forms(names):
    fun, seen = noted(scaled)
    jitted = replayed(fun, static_argnames=names)
    for n in (2, 3, 2):
        assert torch.equal(jitted(X, n), X * n) and torch.equal(jitted(X, n=n), X * n)
    assert set(seen) == {2, 3} and all(type(n) is int for n in seen)


def test_static_argnums_and_static_argnames_together():
    def fun(a, b, c, *, d):
        assert not isinstance(a, torch.Tensor) and not isinstance(d, torch.Tensor) and type(c) is str
        return a * b * d

    jitted = replayed(fun, static_argnums=(0, -1), static_argnames=("d",))
    assert torch.equal(jitted(2, X, "c", d=3), X * 6) and torch.equal(jitted(d=3, c="c", b=X, a=2), X * 6)


def test_static_arguments_among_starred_ones():
    def fun(x, *rest, **others):
        return [isinstance(value, torch.Tensor) for value in (*rest, *(others[name] for name in sorted(others)))]

    jitted = replayed(fun, static_argnums=(1, 3), static_argnames="k")
    assert [bool(value) for value in jitted(X, 1, 1, 1, k=1, j=1)] == [False, True, False, True, False]
    assert [bool(value) for value in jitted(X, 1)] == [False]


def test_negative_positions_count_from_the_end_of_the_call_for_starred_arguments():
    def fun(*values):
        return [isinstance(value, torch.Tensor) for value in values]

    jitted = replayed(fun, static_argnums=-1)
    assert [bool(value) for value in jitted(1, 2, 3)] == [True, True, False]
    assert [bool(value) for value in jitted(1, 2)] == [True, False]


def test_a_default_is_no_static_value_until_it_is_given():
    def fun(x, n=2):
        return x * n

    jitted = replayed(fun, static_argnames="n")
    assert torch.equal(jitted(X), X * 2) and torch.equal(jitted(X, 2), X * 2) and torch.equal(jitted(X, 3), X * 3)


OUT_OF_RANGE = "jit: static_argnums={0} is out of range: scaled has 2 positional argument(s): x, n."
WRONG_OPTIONS = [
    ({"static_argnums": 2}, OUT_OF_RANGE.format(2)),
    ({"static_argnums": (0, 5)}, OUT_OF_RANGE.format(5)),
    ({"static_argnums": -3}, OUT_OF_RANGE.format(-3)),
    ({"static_argnums": 1.0}, "jit: static_argnums must be one or several ints, but it is 1.0 of type float."),
    ({"static_argnums": "n"}, "jit: static_argnums must be one or several ints, but it is 'n' of type str."),
    ({"static_argnums": ("n",)}, "jit: static_argnums must be one or several ints, but it is ('n',) of type tuple."),
    ({"static_argnums": [None]}, "jit: static_argnums must be one or several ints, but it is [None] of type list."),
    ({"static_argnames": "m"}, "jit: static_argnames names 'm', but scaled has no such argument. It has: x, n."),
    ({"static_argnames": ("n", "nm")}, "jit: static_argnames names 'nm', but scaled has no such argument. It has: x, n."),
    ({"static_argnames": 1}, "jit: static_argnames must be one or several names, but it is 1 of type int."),
    ({"static_argnames": ("n", 1)}, "jit: static_argnames must be one or several names, but it is ('n', 1) of type tuple."),
    ({"static_argnames": b"n"}, "jit: static_argnames must be one or several names, but it is b'n' of type bytes."),
    ({"donate_argnums": 2}, OUT_OF_RANGE.format(2).replace("static_argnums", "donate_argnums")),
    ({"donate_argnums": "x"}, "jit: donate_argnums must be one or several ints, but it is 'x' of type str."),
    ({"donate_argnums": (0, 1), "static_argnums": 1}, "jit: argument 1 cannot be both static and donated."),
    ({"donate_argnums": -1, "static_argnames": "n"}, "jit: argument 1 cannot be both static and donated."),
]


@pytest.mark.parametrize(("options", "text"), WRONG_OPTIONS, ids=lambda value: "" if isinstance(value, str) else str(value))
def test_wrong_options_are_refused_at_once(options, text):
    with pytest.raises(StaticArgumentError) as raised:
        jit(scaled, **options)
    assert str(raised.value) == text
    with pytest.raises(StaticArgumentError):
        jit(**options)(scaled)


ALIKE = [
    (1, True, 1.0, 1 + 0j),
    (0, False, 0.0),
    (torch.float32, torch.float64),
    ("a", np.str_("a")),
    (np.int64(1), 1, np.int32(1)),
    ((1, 2), (True, 2), (1.0, 2)),
    (((1,), "a"), ((True,), "a")),
    ((1, (2, (3,))), (1, (2, (3.0,)))),
    (torch.Size([1]), (1,)),
]


@pytest.mark.parametrize("values", ALIKE, ids=str)
def test_static_values_that_are_equal_but_of_other_classes_are_traced_apart(values):
    assert len(set(values)) == 1 or not isinstance(values[0], int | float | str | tuple | frozenset), (
        "Python takes them for equal"
    )
    fun, seen = noted(lambda x, n: x)
    jitted = replayed(fun, static_argnums=1)
    for value in (*values, *values):
        jitted(X, value)
    assert [(type(n), repr(n)) for n in seen] == [(type(value), repr(value)) for value in values]


def test_a_static_class_with_an_equality_of_its_own():
    class Config:
        def __init__(self, scale, comment):
            self.scale, self.comment = scale, comment

        def __hash__(self):
            return hash(self.scale)

        def __eq__(self, other):
            return self.scale == other.scale

    fun, seen = noted(lambda x, n: x * n.scale)
    jitted = replayed(fun, static_argnums=1)
    for config in (Config(2, "a"), Config(2, "b"), Config(3, "a")):
        assert torch.equal(jitted(X, config), X * config.scale)
    assert len(seen) == 2


def test_a_static_module_and_function():
    model = torch.nn.Linear(3, 2)
    fun, seen = noted(lambda x, n: n(x))
    jitted = replayed(fun, static_argnums=1)
    for n in (model, torch.sin, model, torch.cos):
        assert_close(jitted(X, n), n(X))
    assert len(seen) == 3


UNHASHABLE = " Give a tuple in the place of a list, and a frozen dataclass or a tuple of pairs in that of a dict."
NOT_STATIC = [
    ([1], "[1] of type list"),
    ({"a": 1}, "{'a': 1} of type dict"),
    ({1}, "{1} of type set"),
    (([1],), "([1],) of type tuple"),
    (np.ones(2), "array([1., 1.]) of type ndarray and dtype float64"),
]


@pytest.mark.parametrize(("value", "shown"), NOT_STATIC, ids=lambda value: value if isinstance(value, str) else "")
@pytest.mark.parametrize("by_name", [False, True])
def test_static_values_must_be_hashable(value, shown, by_name):
    with pytest.raises(StaticArgumentError) as raised:
        replayed(scaled, static_argnums=1)(X, n=value) if by_name else replayed(scaled, static_argnums=1)(X, value)
    assert str(raised.value) == f"jit: the static argument n must be hashable, but it is {shown}.{UNHASHABLE}"


def test_a_static_tensor_is_refused():
    with pytest.raises(StaticArgumentError) as raised:
        replayed(scaled, static_argnames="n")(X, X)
    assert str(raised.value) == (
        "jit: the static argument n is a tensor, float32[3]. A static argument is a constant of the trace, and is compared by "
        "value: leave a tensor out of static_argnums and static_argnames."
    )


NOT_ARRAYS = ["cos", b"x", torch.float32, torch.nn.ReLU(), object(), len, {1}, range(3), ..., slice(1), torch.device("cpu")]
NOT_ARRAYS += [np.datetime64("2020"), np.array(["a"]), np.array([1, None])]


@pytest.mark.parametrize("value", NOT_ARRAYS, ids=lambda value: type(value).__name__)
def test_what_is_no_array_must_be_static(value):
    for call in (lambda f: f(X, value), lambda f: f(X, n=value), lambda f: f(X, {"a": [X, value]})):
        with pytest.raises(StaticArgumentError, match=r"which is not an array\. Make it static, jit"):
            call(replayed(lambda x, n: x))


def test_the_error_for_what_is_no_array_names_the_argument():
    with pytest.raises(StaticArgumentError) as raised:
        replayed(scaled)(X, "cos")
    assert str(raised.value).startswith(
        "jit: argument n of scaled is 'cos' of type str, which is not an array. Make it static, jit(…, "
    )
    with pytest.raises(StaticArgumentError, match=r"jit: argument n\['a'\]\[1\] of scaled is 'cos' of type str"):
        replayed(scaled)(X, n={"a": [X, "cos"]})
    with pytest.raises(StaticArgumentError, match=r"jit: argument rest\[1\] of everything is 'cos' of type str"):
        replayed(everything)(X, X, X, X, "cos", d=X)
    with pytest.raises(StaticArgumentError, match=r"static_argnums=1|static_argnames='n'"):
        replayed(scaled)(X, {"a": ["cos"]})


@pytest.mark.parametrize("call", [lambda f: f(X, "cos"), lambda f: f(X, n={"a": "cos"}), lambda f: f(X, [X, "cos"])])
def test_the_advice_of_that_error_can_be_followed(call):
    """The option that it names is one that jit takes for this function."""
    with pytest.raises(StaticArgumentError) as raised:
        call(replayed(scaled))
    option, value = str(raised.value).split("jit(…, ")[1].split(")")[0].split("=")
    assert jit(scaled, **{option: int(value) if value.isdigit() else value.strip("'")})


# NumPy


ARRAYS = [
    *(np.arange(6).reshape(2, 3).astype(name) for name in ("bool", "uint8", "int8", "int32", "int64", "float16", "float32")),
    np.ones((2, 3)),
    np.ones((2, 3), np.complex64),
    np.ones((3, 2)).T,
    np.arange(12.0)[::2],
    np.zeros((0, 2)),
    np.asarray(3.0),
    np.float32(2.5),
    np.int64(3),
    np.bool_(True),
    np.arange(3.0)[::-1],
    np.arange(3, dtype=">f4"),
]


@pytest.mark.parametrize("array", ARRAYS, ids=lambda array: f"{type(array).__name__} {array.dtype}{array.shape}{array.strides}")
def test_numpy_arrays_are_taken_as_vmap_takes_them(array):
    got = replayed(lambda x: (x, x * 2))(array)
    want = torch.as_tensor(np.ascontiguousarray(array, array.dtype.newbyteorder("=")).reshape(array.shape))
    assert_close(got, (want, want * 2))


def test_an_array_and_a_tensor_are_one_kind_of_call():
    fun, seen = noted(scaled)
    jitted = replayed(fun)
    assert_close(jitted(np.ones(3, np.float32), X), jitted(torch.ones(3), X))
    assert len(seen) == 1


# Other tensors


class Wrapped(torch.Tensor):
    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return super().__torch_function__(func, types, args, kwargs or {})


def odd_tensors():
    return {
        "a Wrapped": X.as_subclass(Wrapped),
        "sparse": X.to_sparse(),
        "compressed": torch.eye(3).to_sparse_csr(),
        "nested": torch.nested.nested_tensor([X, X[:2]]),
        "jagged": torch.nested.nested_tensor([X, X[:2]], layout=torch.jagged),
        "mkldnn": X.to_mkldnn(),
        "quantized": torch.quantize_per_tensor(X, 0.1, 0, torch.quint8),
    }


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", odd_tensors())
def test_tensors_that_are_not_plain_are_refused(kind):
    value = odd_tensors()[kind]
    for call in (lambda f: f(value), lambda f: f([value])):
        with pytest.raises(UnsupportedOperationError, match=r"argument x(\[0\])? of .* jit takes plain dense tensors"):
            call(replayed(lambda x: x))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["sparse", "nested", "jagged", "quantized"])
def test_captured_tensors_that_are_not_plain_work_or_are_refused(kind):
    value = odd_tensors()[kind]
    fun = (lambda x: torch.mv(value, x)) if kind == "compressed" else (lambda x: value * 2)
    try:
        got = replayed(fun)(X)
    except UnsupportedOperationError:
        return
    assert torch.equal(got.to_dense(), fun(X).to_dense())


@pytest.mark.parametrize("kind", [torch.nn.Parameter, torch.nn.Buffer])
def test_parameters_and_buffers_are_plain(kind):
    fun, seen = noted(scaled)
    jitted = replayed(fun)
    assert_close(jitted(kind(X.clone()), 2.0).detach(), X * 2)
    assert len(seen) == 1
