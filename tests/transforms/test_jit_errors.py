"""jit: its own errors, each with its class, its text and the user's line; the user's errors pass unchanged."""

from __future__ import annotations

import functools
import inspect
import math
import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch

import torchbatch
from torchbatch import grad, jit, vmap
from torchbatch.errors import (
    AxisSpecError,
    DataDependentError,
    OutputTypeError,
)

replayed = functools.partial(jit, backend="eager")
X = torch.tensor([1.0, 2.0, 3.0])


def line_of(fun):
    """The last part of a message: where the user's code is, and what it says there; the first line of a function's body."""
    lines, first = inspect.getsourcelines(fun)
    return f"\n  in {fun.__name__}, {__file__}:{first + 1}\n    {lines[1].strip()}"


# Values that are not known


def an_if(x):
    return x if x.sum() > 0 else -x


def a_while(x):
    while x.sum() > 0:
        x = x - 1


def an_assert(x):
    assert x.sum() > 0


def an_and(x):
    return (x > 0).all() and x


def contained(x):
    return 3 in x


def an_item(x):
    return x[0].item() * x


def a_float(x):
    return float(x[0]) * x


def an_int(x):
    return int(x[0]) * x


def a_complex(x):
    return complex(x[0]) * x


def a_function_of_math(x):
    return math.sin(x[0]) * x


def a_list(x):
    return x.tolist()


def a_range(x):
    return [x for _ in range(x.long()[0])]


def a_list_index(x):
    return [x, x, x][x.long()[0]]


def a_slice(x):
    return x[: x.long()[0]]


def a_size(x):
    return torch.zeros(3, x.long()[0])


def a_sort(x):
    return sorted(x)


def an_if_in_grad(x):
    return grad(an_if)(x)


def formatted(x):
    return f"{x[0]:.2f}" and x


VALUE = (
    "Python needs a value here (an if, a while, a range, a size, .item(), int(), float()), but {0} is being traced, and the "
    "value is only known when it runs. Choose with torch.where(condition, a, b); or make the argument that it comes from static: "
    "jit(…, static_argnames=…)."
)
VALUES = [an_if, a_while, an_assert, an_and, contained, an_item, a_float, an_int, a_complex, a_function_of_math, a_list, a_range]
VALUES += [a_list_index, a_slice, a_size, a_sort, formatted]


@pytest.mark.parametrize("fun", VALUES)
def test_python_needs_a_value(fun):
    with pytest.raises(DataDependentError) as raised:
        replayed(fun)(X)
    assert str(raised.value) == VALUE.format(fun.__name__) + line_of(fun)


@pytest.mark.parametrize("wrap", [lambda f: grad(lambda x: f(x).sum()), lambda f: lambda x: replayed(f)(x)])
def test_python_needs_a_value_inside_another_transform(wrap):
    with pytest.raises(DataDependentError) as raised:
        replayed(wrap(an_if))(X)
    assert str(raised.value).endswith(line_of(an_if))


@pytest.mark.parametrize("fun", [an_if, an_and, an_item, a_float, a_range])
def test_inside_vmap_the_error_is_that_of_vmap(fun):
    x = torch.ones(2, 3)
    with pytest.raises(DataDependentError) as plain:
        vmap(fun)(x)
    with pytest.raises(DataDependentError) as raised:
        replayed(vmap(fun))(x)
    assert str(raised.value) == str(plain.value)


def test_a_value_of_a_number():
    def fun(x, n):
        return x * 2 if n > 1 else x

    with pytest.raises(DataDependentError) as raised:
        replayed(fun)(X, 2)
    assert str(raised.value) == VALUE.format("fun") + line_of(fun)
    assert torch.equal(replayed(fun, static_argnames="n")(X, 2), X * 2), "the advice works"


def test_the_first_call_after_an_error_is_traced_anew():
    values = [True]

    def fun(x):
        if values:
            return an_if(x)
        return x * 2

    jitted = replayed(fun)
    for _ in range(2):
        with pytest.raises(DataDependentError):
            jitted(X)
    assert jitted.cache_size() == 0
    values.clear()
    assert torch.equal(jitted(X), X * 2)


def a_mask(x):
    return x[x > 0]


def masked_select(x):
    return x.masked_select(x > 0)


def nonzero(x):
    return x.nonzero()


def where(x):
    return torch.where(x > 0)


def unique(x):
    return x.unique()


def repeated(x):
    return x.repeat_interleave(x.long())


def counted(x):
    return x.long().bincount()


def mask_and_value_assigned(x):
    x.clone()[x > 0] = x[x > 0]


@pytest.mark.parametrize("fun", [a_mask, masked_select, nonzero, where, unique, repeated, counted, mask_and_value_assigned])
def test_the_shape_would_depend_on_values(fun):
    with pytest.raises(DataDependentError) as raised:
        replayed(fun)(X)
    assert str(raised.value) == (
        f"The shape of what is computed here depends on values, which {fun.__name__} does not have while it is traced. Fixed "
        "shapes work: torch.where(mask, x, fill) keeps every element, torch.topk or sorting picks a fixed number." + line_of(fun)
    )


def equal(x):
    return x if torch.equal(x, x * 2) else -x


def all_close(x):
    return x if torch.allclose(x, x * 2) else -x


@pytest.mark.parametrize("fun", [equal, all_close])
def test_comparing_tensors(fun):
    with pytest.raises(DataDependentError) as raised:
        replayed(fun)(X)
    assert str(raised.value) == (
        f"Python needs one True or False from comparing tensors, but {fun.__name__} is being traced. Use (a == b).all(), which "
        "stays a tensor." + line_of(fun)
    )


def numpy(x):
    return x.numpy()


def a_numpy_function(x):
    return np.sin(x)


def an_array(x):
    return np.asarray(x)


def a_product_with_an_array(x):
    return np.ones(3) * x


def a_pointer(x):
    return x.data_ptr()


def a_tensor_of_tensors(x):
    return torch.tensor([x[0], x[1]])


def as_a_tensor(x):
    return torch.as_tensor([x[0], x[1]])


def a_storage(x):
    return x.untyped_storage().data_ptr()


def saved(x):
    return torch.save(x, os.devnull)


MEMORY = (
    "The memory of a tensor is asked for (.numpy(), NumPy functions, pickle, .data_ptr()), but {0} is being traced, and there "
    "are no numbers yet. Use torch operations inside the function, and convert its result."
)
IN_MEMORY = [numpy, a_numpy_function, an_array, a_product_with_an_array, a_pointer, a_storage]


@pytest.mark.parametrize("fun", [*IN_MEMORY, saved])
def test_the_memory_is_asked_for(fun):
    with pytest.raises(DataDependentError) as raised:
        replayed(fun)(X)
    assert str(raised.value) == MEMORY.format(fun.__name__) + line_of(fun)


@pytest.mark.parametrize("fun, call", [(a_tensor_of_tensors, "torch.tensor"), (as_a_tensor, "torch.as_tensor")])
def test_a_tensor_is_made_of_a_list_of_tensors(fun, call):
    with pytest.raises(DataDependentError) as raised:
        replayed(fun)(X)
    text = (
        f"A tensor is made of a list of tensors ({call}([…])), which asks for their values, but {fun.__name__} is being traced. "
        f"Use torch.stack([…]), which stays a tensor."
    )
    assert str(raised.value) == text + line_of(fun)


def by_a_mask(x):
    x.clone()[torch.tensor([True, False, True])] = x[:2]
    return x


def test_a_list_of_truth_values_is_no_list_of_tensors():
    with pytest.raises(DataDependentError) as raised:
        jit(vmap(by_a_mask), backend="eager")(torch.stack([X, X]))
    assert str(raised.value).startswith("The shape of what is computed here depends on values, which by_a_mask does not have")


def test_printing_shows_no_numbers_and_is_no_error(capsys):
    def fun(x):
        print(x, repr(x), f"{x}")
        return x * 2

    assert torch.equal(replayed(fun)(X), X * 2)
    assert "1." not in capsys.readouterr().out


# Options

OPTIONS = [
    ({"backend": "xla"}, 'jit: backend must be "inductor", "eager" or a function, but it is \'xla\'.'),
    ({"backend": None}, 'jit: backend must be "inductor", "eager" or a function, but it is None.'),
    ({"backend": ["eager"]}, 'jit: backend must be "inductor", "eager" or a function, but it is [\'eager\'].'),
    (
        {"backend": "eager", "mode": "max-autotune"},
        "jit: mode and options are settings of Inductor, so they go with backend='inductor'.",
    ),
    (
        {"backend": "eager", "options": {"x": 1}},
        "jit: mode and options are settings of Inductor, so they go with backend='inductor'.",
    ),
    ({"options": {"nope": 1}}, "jit: options has no entry 'nope'. torch._inductor.list_options() lists those that exist."),
]


@pytest.mark.parametrize(("options", "text"), OPTIONS, ids=str)
def test_wrong_options(options, text):
    with pytest.raises(AxisSpecError) as raised:
        jit(torch.sin, **options)
    assert str(raised.value) == text


@pytest.mark.parametrize("mode", ["fast", 3])
def test_wrong_mode(mode):
    with pytest.raises(AxisSpecError) as raised:
        jit(torch.sin, mode=mode)
    modes = "default, reduce-overhead, max-autotune, max-autotune-no-cudagraphs"
    assert str(raised.value) == f"jit: mode must be one of {modes}, but it is {mode!r}."


@pytest.mark.parametrize("options", [3, [1], {1: True}, "max_autotune"])
def test_options_of_another_kind(options):
    with pytest.raises(AxisSpecError, match="options"):
        jit(torch.sin, options=options)


def test_unknown_options_are_pythons_own_error():
    with pytest.raises(TypeError, match="unexpected keyword argument 'static'"):
        jit(torch.sin, static=1)
    with pytest.raises(TypeError, match="positional argument"):
        jit(torch.sin, 1)


def test_a_backend_that_raises():
    def backend(graph, examples):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        jit(torch.sin, backend=backend)(X)


# Outputs


class Thing:
    def __repr__(self):
        return "a thing"


NO_ARRAYS = {
    "": ("text", "'text' of type str"),
    "['a'][1]": ({"a": (X, {1, 2})}, "{1, 2} of type set"),
    "[0]": ([Thing()], "a thing of type Thing"),
    "[1]": ((X, torch.float32), "torch.float32 of type dtype"),
    "['n']": ({"n": np.array(["a"])}, "array(['a'], dtype='<U1') of type ndarray and dtype <U1"),
}


def test_an_output_that_does_not_fit():
    with pytest.raises(OutputTypeError, match=r"output\['big'\] of .* is 18446744073709551616 of type int, but it does not fit"):
        jit(lambda x: {"big": 2**64}, backend="eager")(torch.ones(1))


@pytest.mark.parametrize("place", NO_ARRAYS)
def test_outputs_must_be_arrays(place):
    value, shown = NO_ARRAYS[place]

    def fun(x):
        return value

    with pytest.raises(OutputTypeError) as raised:
        replayed(fun)(X)
    assert str(raised.value) == f"jit: output{place} of fun is {shown}, but every output must be an array or a number."


def test_outputs_that_are_numbers_and_arrays():
    got = replayed(lambda x: (1, 2.5, True, 1j, np.ones(2), np.float32(3), None, {}))(X)
    assert [value.dtype for value in got[:6]] == [
        torch.int64,
        torch.float32,
        torch.bool,
        torch.complex64,
        torch.float64,
        torch.float32,
    ]
    assert got[6:] == (None, {})


# The user's own errors


class MineError(Exception):
    pass


ERRORS = [MineError("a"), ValueError("data-dependent control flow"), RuntimeError("aten.nonzero.default"), TypeError(".tolist()")]
ERRORS += [
    KeyError("k"),
    StopIteration(),
    KeyboardInterrupt(),
    SystemExit(3),
    RuntimeError("Cannot access data pointer of Tensor"),
]
WRAPS = {
    "plain": lambda f: f,
    "vmap": vmap,
    "grad": grad,
    "vmap of grad": lambda f: vmap(grad(f)),
    "jvp": lambda f: lambda x: torchbatch.jvp(f, (x,), (x,)),
    "jit": replayed,
}


@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_the_users_errors_pass_unchanged(error, wrap):
    def fun(x):
        raise error

    with pytest.raises(type(error)) as raised:
        replayed(WRAPS[wrap](fun))(X)
    assert raised.value is error
    assert error.__cause__ is None and not getattr(error, "__notes__", None)
    assert torch.equal(replayed(lambda x: x + 1)(X), X + 1), "what was open is closed again"


def test_an_error_in_the_middle_leaves_no_trace_and_no_state():
    fail = [True]

    def fun(x):
        y = x * 2
        if fail:
            raise MineError
        return y

    jitted = replayed(fun)
    with pytest.raises(MineError):
        jitted(X)
    assert jitted.cache_size() == 0
    fail.clear()
    assert torch.equal(jitted(X), X * 2) and torch.is_grad_enabled()


@pytest.mark.parametrize("wrap", [lambda f: f, vmap])
def test_a_wrong_shape_prints_nothing_but_the_exception(wrap, capfd):
    with pytest.raises(RuntimeError, match="size") as raised:
        replayed(wrap(lambda x: x @ torch.ones(5)))(torch.ones(2, 3))
    assert type(raised.value) is RuntimeError
    assert capfd.readouterr() == ("", "")


def test_the_traceback_shows_the_users_line():
    def fun(x):
        return x @ torch.ones(5)

    with pytest.raises(RuntimeError) as raised:
        replayed(fun)(X)
    assert any(entry.name == "fun" for entry in raised.traceback)


# Without a compiler


def run(code, tmp_path, **environment):
    """What a fresh process prints; its on-disk cache is empty."""
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"), **environment}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


WITHOUT = """
    import torch
    from torchbatch import errors, jit

    x = torch.ones(3)
    for fun, argument in [(lambda x: x.sin() * 2, x), (lambda x: x.cos().sum(), torch.ones(3, requires_grad=True))]:
        jitted = jit(fun)
        try:
            jitted(argument)
        except errors.CompilerError as error:
            print(isinstance(error, RuntimeError), str(error))
        assert jitted.cache_size() == 0
    print(jit(lambda x: x * 2, backend="eager")(x))
"""


def test_without_a_compiler(tmp_path):
    text = (
        "True jit: there is no C++ compiler on this machine, which Inductor needs for the CPU. Install g++ or clang (or set CXX "
        'to one), or run the traced operations as they are with jit(…, backend="eager").\n'
    )
    assert run(WITHOUT, tmp_path, CXX="/nonexistent") == 2 * text + "tensor([2., 2., 2.])\n"
