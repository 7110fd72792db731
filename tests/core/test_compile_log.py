"""When and why a function is traced: the log, the warning, the line of progress."""

from __future__ import annotations

import functools
import io
import logging
import os
import pty
import re
import runpy
import subprocess
import sys
import textwrap
import time
import warnings

import pytest
import torch

from torchbatch import jit
from torchbatch.core import compile_log
from torchbatch.errors import RetraceWarning

replayed = functools.partial(jit, backend="eager")
X = torch.ones(16, 100)


def predict(params, x, scale=1.0, how="sum"):
    return params["w"] * x * scale


PARAMS = {"w": X}
KIND = "float32[16,100]"
REASONS = {
    "shapes": (
        lambda f: f({"w": torch.ones(17, 100)}, torch.ones(17, 100)),
        f"argument params['w']: {KIND} -> float32[17,100]; argument x: {KIND} -> float32[17,100]",
    ),
    "a shape": (lambda f: f(PARAMS, torch.ones(1, 100)), f"argument x: {KIND} -> float32[1,100]"),
    "a dtype": (lambda f: f(PARAMS, X.half()), f"argument x: {KIND} -> float16[16,100]"),
    "strides": (lambda f: f(PARAMS, torch.ones(100, 16).t()), f"argument x: {KIND} -> {KIND} strides (1, 16)"),
    "requires_grad": (lambda f: f(PARAMS, X.clone().requires_grad_()), f"argument x: {KIND} -> {KIND} requires_grad"),
    "a device": (
        lambda f: f({"w": X.to("meta")}, X.to("meta")),
        f"argument params['w']: {KIND} -> {KIND} on meta; argument x: {KIND} -> {KIND} on meta",
    ),
    "another argument": (lambda f: f(PARAMS, X, 2), "argument scale: absent -> Python int"),
    "a static argument": (lambda f: f(PARAMS, X, how="mean"), "static argument how: absent -> 'mean'"),
    "the structure": (lambda f: f({"w": X, "b": X}, X), f"argument params['b']: absent -> {KIND}"),
    "by name": (lambda f: f(params=PARAMS, x=X), "the structure of the arguments: ({'w': *}, *) -> (params={'w': *}, x=*)"),
    "autocast": (lambda f: autocast(f), "autocast: () -> (('cpu', 'torch.bfloat16'),)"),
}


def autocast(fun):
    with torch.autocast("cpu", torch.bfloat16):
        return fun(PARAMS, X)


def lines(caplog):
    return [re.sub(r"\d+\.\d\d s", "0.00 s", record.getMessage()) for record in caplog.records if record.name == "torchbatch.jit"]


@pytest.mark.parametrize("reason", REASONS)
def test_the_log_says_why(reason, caplog):
    call, text = REASONS[reason]
    jitted = replayed(predict, static_argnames="how")
    with caplog.at_level(logging.INFO, "torchbatch.jit"):
        jitted(PARAMS, X)
        jitted(PARAMS, X)
        call(jitted)
    assert lines(caplog) == [
        "tracing predict: the first call",
        "compiled predict in 0.00 s",
        f"tracing predict again (kind of call no. 2): {text}",
        "compiled predict in 0.00 s",
    ]


def test_the_log_says_that_a_container_is_of_another_kind(caplog):
    jitted = replayed(lambda x: x[0])
    jitted([X])
    with caplog.at_level(logging.INFO, "torchbatch.jit"):
        jitted((X,))
    assert lines(caplog)[0] == "tracing <lambda> again (kind of call no. 2): the structure of the arguments: ([*]) -> ((*,))"


def test_the_nearest_known_call_is_compared():
    known = [{"a": "1", "b": "1"}, {"a": "2", "b": "1"}, {"a": "3 -> 4", "b": "3"}]
    assert nearest(known, {"a": "2", "b": "5"}) == "b: 1 -> 5"
    assert nearest(known, {"a": "3 -> 4", "b": "3", "c": "1"}) == "c: absent -> 1"
    assert nearest(known, {"a": "1"}) == "b: 1 -> absent"
    assert nearest([], {"a": "1"}) == ""


def nearest(known, new):
    return compile_log.nearest([compile_log.Difference.between(old, new) for old in known])


def test_of_many_changes_the_first_are_named():
    old, new = ({str(i): value for i in range(9)} for value in "ab")
    assert nearest([old], new) == "0: a -> b; 1: a -> b; 2: a -> b; 3: a -> b; 4: a -> b; and 4 more"


def test_of_two_that_are_as_near_the_last_is_named():
    assert nearest([{"a": "1"}, {"a": "2"}], {"a": "3"}) == "a: 2 -> 3"


def change_mode(model):
    model.train(not model.training)


def change_weight(model):
    model[0].weight = torch.nn.Parameter(torch.ones(100, 100))


def take_bias_away(model):
    model[0].bias = None


def put_another_in(model):
    model[1] = torch.nn.Identity()


OF_MODULES = {
    change_mode: "module Sequential: training -> evaluation; module Sequential.0: training -> evaluation; module Sequential.1: "
    "training -> evaluation",
    change_weight: "weight of module Sequential.0: float32[100,100] -> another float32[100,100]",
    take_bias_away: "bias of module Sequential.0: float32[100] -> None",
    put_another_in: "1 of module Sequential: Dropout -> Identity",
    lambda model: model[0].bias.requires_grad_(False): "captured tensor no. 2: float32[100] requires_grad -> float32[100]",
}


@pytest.mark.parametrize("change", OF_MODULES)
def test_the_log_says_what_changed_outside(change, caplog):
    model = torch.nn.Sequential(torch.nn.Linear(100, 100), torch.nn.Dropout())
    jitted = replayed(model)
    jitted(X)
    with caplog.at_level(logging.INFO, "torchbatch.jit"):
        change(model)
        jitted(X)
    assert lines(caplog)[0] == f"tracing Sequential again (kind of call no. 2): {OF_MODULES[change]}"


def test_the_backward_pass_is_compiled_when_it_is_needed(caplog):
    with caplog.at_level(logging.INFO, "torchbatch.jit"):
        value = replayed(torch.sin)(X.clone().requires_grad_())
        assert lines(caplog) == ["tracing sin: the first call", "compiled sin in 0.00 s"]
        value.sum().backward()
    assert lines(caplog)[2:] == ["compiled the backward pass of sin in 0.00 s"]


def test_without_a_handler_nothing_is_shown(capfd):
    replayed(torch.sin)(X)
    assert capfd.readouterr() == ("", "")


# The warning


def test_the_ninth_kind_of_call_warns_once():
    jitted = replayed(predict)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for size in range(1, 15):
            jitted({"w": torch.ones(1)}, torch.ones(size))
            assert len(caught) == (size >= 9), size
    assert [warning.category for warning in caught] == [RetraceWarning]
    assert str(caught[0].message) == (
        "jit: predict is traced for the 9th time, each for another kind of call; the last one because of argument x: float32[8] "
        "-> float32[9]. Each trace is compiled and kept. If a size changes, pad it or use jit(…, dynamic=True); if a static "
        "argument does, pass it as a tensor. TORCHBATCH_LOG_COMPILES=1 shows each reason."
    )


def test_the_warning_points_at_the_users_line():
    jitted = replayed(torch.sin)
    with pytest.warns(RetraceWarning) as caught:
        for size in range(1, 10):
            jitted(torch.ones(size))
    assert caught[0].filename == __file__


def test_clear_cache_begins_to_count_anew():
    jitted = replayed(torch.sin)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            for size in range(1, 9):
                jitted(torch.ones(size))
            jitted.clear_cache()


def test_each_function_is_counted_by_itself():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for jitted in (replayed(torch.sin), replayed(torch.sin)):
            for size in range(1, 9):
                jitted(torch.ones(size))


# Other processes


SCRIPT = """
    import torch
    from torchbatch import jit

    @jit(backend="eager")
    def scaled(x):
        return x * 2

    for size in (2, 2, 3):
        scaled(torch.ones(size))
"""


def test_the_environment_variable_shows_the_log():
    environment = {**os.environ, "TORCHBATCH_LOG_COMPILES": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(SCRIPT)],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == ""
    assert re.sub(r"\d+\.\d\d s", "0.00 s", done.stderr) == (
        "torchbatch: tracing scaled: the first call\n"
        "torchbatch: compiled scaled in 0.00 s\n"
        "torchbatch: tracing scaled again (kind of call no. 2): argument x: float32[2] -> float32[3]\n"
        "torchbatch: compiled scaled in 0.00 s\n"
    )


@pytest.mark.parametrize("value", [None, "", "0"])
def test_the_environment_variable_may_be_off(value, monkeypatch):
    monkeypatch.delenv("TORCHBATCH_LOG_COMPILES", raising=False)
    if value is not None:
        monkeypatch.setenv("TORCHBATCH_LOG_COMPILES", value)
    handlers = [*compile_log.logger.handlers]
    runpy.run_path(compile_log.__file__)
    assert compile_log.logger.handlers == handlers


# The line of progress


PROGRESS = """
    import sys, time
    import torch
    from torchbatch import jit
    from torchbatch.core import compile_log

    compile_log._PATIENCE = 0.1

    def backend(graph, examples):
        time.sleep(1.5)
        return graph.forward

    def slow(x):
        return x * 2

    jit(slow, backend=backend)(torch.ones(2))
    sys.stderr.write("done")
"""


def on_a_terminal():
    """What a process writes to stderr, which is a terminal."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(PROGRESS)],
        stderr=theirs,
        stdout=subprocess.DEVNULL,
    )
    os.close(theirs)
    written = b""
    while True:
        try:
            piece = os.read(ours, 4096)
        except OSError:  # the other end is closed
            break
        if not piece:
            break
        written += piece
    os.close(ours)
    assert process.wait() == 0
    return written.decode()


def test_a_long_compilation_shows_a_line_and_takes_it_away():
    text = on_a_terminal()
    assert re.fullmatch(r"(\rtorchbatch: compiling slow … \d+ s)+\r\033\[Kdone", text), text


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_short_compilation_shows_nothing(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    with compile_log.compiling("f"):
        pass
    assert sys.stderr.getvalue() == ""


def test_the_line_is_gone_when_the_compilation_ends(monkeypatch):
    """Nothing is written over what the program shows next."""
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setattr(compile_log, "_PATIENCE", 0.0)
    with compile_log.compiling("f"):
        while "compiling f" not in sys.stderr.getvalue():
            time.sleep(0.01)
    sys.stderr.write("next")
    time.sleep(0.4)
    assert sys.stderr.getvalue().endswith("\r\033[Knext")


def test_without_a_terminal_there_is_no_line(monkeypatch, capsys):
    monkeypatch.setattr(compile_log, "_PATIENCE", 0.0)
    started = []
    monkeypatch.setattr(compile_log.threading.Thread, "start", started.append)
    with compile_log.compiling("f"):
        pass
    assert started == [] and capsys.readouterr().err == ""
