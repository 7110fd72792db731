"""The arguments of a call, taken apart: tensors, numbers, static values, and the key."""

from __future__ import annotations

import pytest
import torch

from torchbatch.core.signature import StaticArguments, bind

X = torch.ones(2, 3)


def fun(params, x, n, *rest, flag=None, **others):
    raise NotImplementedError


def bound(*args, nums=None, names=None, **kwargs):
    return bind(fun, StaticArguments(fun, nums, names), args, kwargs)


def test_leaves_are_tensors_in_the_order_of_the_tree():
    call = bound({"a": [2, 1.5], "b": X}, X * 2, True, 1j)
    assert all(type(value) is torch.Tensor for value in call.values)
    assert [value.dtype for value in call.values] == [
        torch.int64, torch.float64, torch.float32, torch.float32, torch.bool, torch.complex128
    ]  # fmt: skip
    assert call.numbers == (0, 1, 4, 5) and call.statics == ()


def test_the_arguments_are_put_together_again():
    call = bound("s", X, 2, X, "t", nums=(0, 4), names="flag", flag="f", y={"z": X})
    args, kwargs = call.arguments(["first", "second", "third", "fourth"])
    assert args == ["s", "first", "second", "third", "t"]
    assert kwargs == {"flag": "f", "y": {"z": "fourth"}}


def test_names_and_owners():
    call = bound({"w": [X, X]}, "s", X, X, 2.0, nums=1, flag={"k": X}, z=X)
    assert call.names() == ["params['w'][0]", "params['w'][1]", "n", "rest[0]", "rest[1]", "flag['k']", "z"]
    assert call.owners() == [0, 0, 2, 3, 4, "flag", "z"]


def test_names_of_a_function_without_a_signature():
    call = bind(torch.add, StaticArguments(torch.add, None, None), (X, [X]), {"out": X})
    assert call.names() == ["args[0]", "args[1][0]", "out"]


def described(**changes):
    """A call with one thing changed: how its key and its description differ from the usual."""
    values = {"params": {"w": X}, "x": X, "n": 2, **changes}
    call = bound(values.pop("params"), values.pop("x"), values.pop("n"), names="flag", **values)
    return call.key(), call.described()


CHANGES = {
    "shape": ({"x": torch.ones(2, 4)}, {"argument x": "float32[2,4]"}),
    "dtype": ({"x": X.double()}, {"argument x": "float64[2,3]"}),
    "strides": ({"x": torch.ones(3, 2).t()}, {"argument x": "float32[2,3] strides (1, 2)"}),
    "requires_grad": ({"x": X.clone().requires_grad_()}, {"argument x": "float32[2,3] requires_grad"}),
    "device": ({"x": X.to("meta")}, {"argument x": "float32[2,3] on meta"}),
    "number": ({"n": 2.0}, {"argument n": "Python float"}),
    "tensor for a number": ({"n": torch.tensor(2)}, {"argument n": "int64[]"}),
    "structure": ({"params": {"w": [X]}}, {"argument params['w']": None, "argument params['w'][0]": "float32[2,3]"}),
    "static": ({"flag": "f"}, {"static argument flag": "'f'"}),
    "more": ({"z": X}, {"argument z": "float32[2,3]"}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_the_key_is_described(change):
    given, expected = CHANGES[change]
    (usual_key, usual), (key, new) = described(), described(**given)
    assert key != usual_key
    assert {name: new.get(name) for name in {*usual, *new} if usual.get(name) != new.get(name)} == expected


@pytest.mark.parametrize("same", [{"n": 3}, {"x": X * 2}, {"x": torch.ones(3, 3)[1:]}, {"params": {"w": X + 1}}])
def test_what_leaves_the_key_as_it_is(same):
    assert described(**same) == described() and hash(described(**same)[0]) == hash(described()[0])


@pytest.mark.parametrize(
    "state", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu"), lambda: torch.device("meta")]
)
def test_state_is_a_part_of_the_key(state):
    key, words = described()
    with state():
        other, other_words = described(x=X)
    assert other != key and other_words != words


def test_the_key_of_open_sizes_leaves_shapes_and_strides_out():
    calls = [bound(X, X, 2), bound(torch.ones(7, 5), torch.ones(3, 2).t(), 3)]
    assert calls[0].key_of_open() == calls[1].key_of_open() and calls[0].key() != calls[1].key()
    for other in (bound(X, X.double(), 2), bound(X, X[0], 2), bound(X, X, 2.0), bound(X, X.clone().requires_grad_(), 2)):
        assert other.key_of_open() != calls[0].key_of_open()


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [(1, True, False), (1, 1.0, False), ((1,), (True,), False), (((0,), 1), ((False,), 1), False), ((1, "a"), (1, "a"), True)],
)
def test_classes_inside_static_values(first, second, same):
    keys = [bound(X, X, value, nums=2).key() for value in (first, second)]
    assert (keys[0] == keys[1]) is same


def test_lazily_conjugated_tensors_are_resolved():
    z = torch.ones(2, dtype=torch.complex64) * 1j
    call = bound(z.conj(), z.conj().imag, 1)
    assert not call.values[0].is_conj() and not call.values[1].is_neg()
    assert torch.equal(call.values[0], z.conj()) and torch.equal(call.values[1], z.conj().imag)


# Which arguments are static


COMPLETED = [
    ((0,), None, (0,), {"params"}),
    (None, "x", (1,), {"x"}),
    (-1, None, None, None),
    (2, "x", (1, 2), {"x", "n"}),
    (5, None, (5,), set()),
    (None, ("flag", "new"), (), {"flag", "new"}),
    ((), (), (), set()),
]


@pytest.mark.parametrize(("nums", "names", "all_nums", "all_names"), COMPLETED)
def test_positions_and_names_complete_each_other(nums, names, all_nums, all_names):
    static = StaticArguments(fun, nums, names)
    if all_nums is None:  # with *rest a negative position depends on the call
        assert static.split((1, 2, 3, 4), {})[2] == ((3, int, 4),)
        return
    assert static.nums == all_nums and static.names == all_names
    assert static.is_empty is (not all_nums and not all_names)


def test_split():
    static = StaticArguments(fun, (0, 2), "flag")
    assert static.split(("a", X, "c", X), {"flag": 1, "z": 2}) == (
        (X, X), {"z": 2}, ((0, str, "a"), (2, str, "c"), ("flag", int, 1))
    )  # fmt: skip
    assert static.split(("a",), {"x": 1, "n": 2}) == ((), {"x": 1}, ((0, str, "a"), ("n", int, 2)))


def test_the_keys_of_dictionaries_stay_in_order():
    call = bound({"b": X, "a": X * 2}, y=X)
    assert call.names() == ["params['b']", "params['a']", "y"]
    assert torch.equal(call.values[0], X) and torch.equal(call.values[1], X * 2)
    (found,), _ = call.arguments("123")
    assert list(found.items()) == [("b", "1"), ("a", "2")]
