"""What PyTorch says when a function cannot be run for all samples at once, said again in terms of the user's own line.

The patterns are texts of torch 2.11, 2.13 and 2.15. Private names used: those of :mod:`torchbatch._torch.levels`; the
attribute ``_torchdynamo_orig_callable`` and ``torch._dynamo.OptimizedModule._orig_mod`` of compiled functions;
``torch._subclasses.fake_tensor.DataDependentOutputException``, ``DynamicOutputShapeException``;
``torch.fx.experimental.symbolic_shapes.GuardOnDataDependentSymNode``.
"""

from __future__ import annotations

import ast
import dis
import linecache
import os
import re
import sysconfig
import textwrap
import traceback
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from torchbatch._torch import caller, levels
from torchbatch.errors import (
    DataDependentError,
    EscapedValueError,
    FallbackError,
    InPlaceError,
    RandomnessError,
    TorchbatchError,
    UnsupportedOperationError,
)


class Rule(NamedTuple):
    """A pattern in PyTorch's text, the class to raise instead, and what to say; ``{0}`` is the pattern's first group."""

    pattern: re.Pattern[str]
    error: type[TorchbatchError]
    text: str


def _rules(*rows: tuple[str, type[TorchbatchError], str]) -> list[Rule]:
    return [Rule(re.compile(pattern, re.DOTALL), error, " ".join(text.split())) for pattern, error, text in rows]


FIXED_SHAPES = "Fixed shapes work: torch.where(mask, x, fill) keeps every element, torch.topk or sorting picks a fixed number."

RULES = _rules(
    (
        r"data-dependent control flow",
        DataDependentError,
        """Python needs one True or False here (an if, a while, an assert, and, or, in), but the value varies from sample to
        sample. Compute both sides and choose with torch.where(condition, a, b).""",
    ),
    (
        r"calling \.item\(\)",
        DataDependentError,
        """Python needs one number here (.item(), int(), float(), a format, a list index, a range, a size), but the value varies
        from sample to sample. Keep it a tensor: index with x[i] or torch.gather, choose with torch.where; or pass it as an
        unmapped argument.""",
    ),
    (
        r"Cannot access (data pointer|storage) of|aten::is_pinned",
        DataDependentError,
        """The memory of a per-sample tensor is asked for (.numpy(), .tolist(), NumPy functions, copy.deepcopy, pickle,
        .data_ptr()), but it holds all samples at once. Use torch operations inside the function, and convert its result.""",
    ),
    (
        r"boolean mask|masked_select|mask.*differently shaped",
        DataDependentError,
        "A boolean mask that varies from sample to sample selects a different number of elements for each. " + FIXED_SHAPES,
    ),
    (
        r"aten::(nonzero)_numpy",
        DataDependentError,
        "The shape of what {0} returns depends on values that vary from sample to sample. " + FIXED_SHAPES,
    ),
    (
        r"Can't detach views in-place",
        DataDependentError,
        """Python needs one number here (torch.tensor of a tensor), but the value varies from sample to sample. Use x.clone(), or
        torch.stack for several.""",
    ),
    (
        r"not implemented for aten::tensor_split",
        DataDependentError,
        "tensor_split is given sections or indices that vary from sample to sample. Give it Python numbers.",
    ),
    (
        r"from the '(Sparse\w*)' backend",
        UnsupportedOperationError,
        "Sparse tensors cannot be made or used inside a mapped function. Use dense ones inside, and convert the result.",
    ),
    (
        r"dynamic shape.*?aten::(\w+)",
        DataDependentError,
        "The shape of what {0} returns depends on values that vary from sample to sample. " + FIXED_SHAPES,
    ),
    (
        r"one_hot.*num_classes",
        DataDependentError,
        "one_hot has to look at the values to find the number of classes, which vary from sample to sample. Give num_classes.",
    ),
    (
        r"torch\.allclose|aten::(equal|allclose)\b",
        DataDependentError,
        """Python needs one True or False from comparing per-sample tensors. Use (a == b).all() or torch.isclose(a, b).all(),
        which stay tensors.""",
    ),
    (
        r"random operation while in randomness error mode",
        RandomnessError,
        """A random operation runs inside vmap, which has to be told what it means: randomness="different" draws for each sample
        anew, randomness="same" gives all samples one draw. Or draw from a key, as the loop does too:
        torchbatch.random.normal(key, shape), mapped over keys = torchbatch.random.split(torchbatch.random.key(0), n).""",
    ),
    (
        r"same randomness with a batched tensor input",
        RandomnessError,
        """randomness="same" asks for one draw for all samples, but what is drawn depends on per-sample values here. Use
        randomness="different", or draw uniform numbers and compare them with the values.""",
    ),
    (
        r"different inplace randomness on an unbatched tensor",
        RandomnessError,
        """randomness="different" asks for a draw for each sample, but it is to be written into a tensor that all samples share.
        Make the tensor inside the mapped function, or map it.""",
    ),
    (
        r"we do not yet support aten::(\w+)",
        UnsupportedOperationError,
        "{0} can be run neither for all samples at once nor one by one. Express it by other operations.",
    ),
    (
        r"atch norm.*running_(mean|var)",
        InPlaceError,
        """BatchNorm in training mode writes per-sample statistics into running averages that all samples share. Use
        model.eval(), track_running_stats=False or a GroupNorm, or map the buffers too.""",
    ),
    (
        r"backward\(\) called inside|requires_grad_\(\)",
        UnsupportedOperationError,
        "backward() and requires_grad_() do not work inside a mapped function. Use torchbatch.grad of a function of the tensor.",
    ),
    (
        r"`data` under vmap|directly with `\.data`",
        UnsupportedOperationError,
        "The attribute .data does not work inside a mapped function. Use x.detach() to read, and x.copy_(…) to write.",
    ),
    (
        r"don't yet support saved tensor hooks",
        UnsupportedOperationError,
        """torch.func.grad and its family do not look into torch.utils.checkpoint and other hooks for saved tensors. Use
        torchbatch.checkpoint.""",
    ),
    (
        r"escaped from inside a function being vmapped|level > batched_level",
        EscapedValueError,
        "A per-sample value is used after the vmap that it belongs to has finished. Return it from the mapped function instead.",
    ),
    (
        r"Batching rule not implemented for aten::(\w+?)(?:_out|\.\w*out\w*); the fallback path doesn't work on out=",
        UnsupportedOperationError,
        "{0} is called with out= on a per-sample tensor. Use its result instead: y.copy_(torch.{0}(…)) or y = torch.{0}(…).",
    ),
    (
        r"([\w:]+) hit the vmap fallback which is currently disabled",
        FallbackError,
        """{0} has no batching rule, so it would run once per sample, and fallback('error') refuses that. Give it a rule with
        torch.library.register_vmap, or allow the loop with fallback('warn') or fallback('silent').""",
    ),
    (
        r"Batching rule not implemented for ([\w:]+)",
        UnsupportedOperationError,
        "{0} can be run neither for all samples at once nor one by one. Express it by other operations.",
    ),
    (
        r"channels_last|is_contiguous inside of vmap|Tensor\.clone\(memory_format\)",
        UnsupportedOperationError,
        """The layout of one sample in memory is asked for (memory_format=torch.channels_last), but the samples lie side by side.
        Leave memory_format out: it changes no value.""",
    ),
    (
        r"autograd\.Function.*?(setup_context|vmap staticmethod|generate_vmap_rule)",
        UnsupportedOperationError,
        """A torch.autograd.Function inside vmap needs forward and setup_context apart, and generate_vmap_rule = True or a vmap
        staticmethod of its own.""",
    ),
)
_SHARED_WRITE = re.compile(r"vmap: inplace arithmetic|vmap: [\w:]+\(self, \*extra_args\) is not possible")
_RAGGED = re.compile(r"stack expects each tensor to be equal size, but got .* at entry \d+ and .* at entry \d+")
_RAGGED_TEXT = "The shape of what is computed here depends on values that vary from sample to sample. " + FIXED_SHAPES
_BROADCAST_WRITE = re.compile(r"output with shape \[([\d, ]*)\] doesn't match the broadcast shape \[\d+(?:, )?([\d, ]*)\]")


def explain(error: Exception, shared: Callable[[], Mapping[str, torch.Tensor]]) -> TorchbatchError | None:
    """The error to raise instead of ``error``, or None if it is not about running for all samples at once.

    Args:
        error: what came out of the mapped function.
        shared: gives the unmapped tensors of the call by name.
    """
    if _is_users_own(error):
        return None
    text = str(error)
    where = _user_frame(error.__traceback__) or _calling_frame()
    if _SHARED_WRITE.search(text) or _same_groups(_BROADCAST_WRITE.search(text)):
        return InPlaceError(_shared_write(where, shared()) + _line(where))
    if _RAGGED.search(text) and (where is None or "stack" not in (where.summary.line or "")):
        return DataDependentError(_RAGGED_TEXT + _line(where))
    for rule in RULES:
        match = rule.pattern.search(text)
        if match is not None and (type(error) in (RuntimeError, NotImplementedError, ValueError)):
            return rule.error(rule.text.format(*match.groups()) + _line(where))
    return None


_TRACE_RULES = _rules(
    (
        r"_local_scalar_dense|__format__|get value out of a tracing tensor|data-dependent|is_nonzero|Could not (guard|extract)",
        DataDependentError,
        """Python needs a value here (an if, a while, a range, a size, .item(), int(), float()), but {fun} is being traced, and
        the value is only known when it runs. Choose with torch.where(condition, a, b); or make the argument that it comes from
        static: jit(…, static_argnames=…).""",
    ),
    (
        r"aten\.(equal|allclose)\b",
        DataDependentError,
        """Python needs one True or False from comparing tensors, but {fun} is being traced. Use (a == b).all(), which stays a
        tensor.""",
    ),
    (
        r"aten\.(\w+)\.\w+|dynamic (output )?shape",
        DataDependentError,
        "The shape of what is computed here depends on values, which {fun} does not have while it is traced. " + FIXED_SHAPES,
    ),
    (
        r"data pointer|numpy\(\)|doesn't have storage|\.tolist\(\)|data is not allocated|ndarray' and 'FakeTensor'|[Pp]ickle",
        DataDependentError,
        """The memory of a tensor is asked for (.numpy(), NumPy functions, pickle, .data_ptr()), but {fun} is being traced, and
        there are no numbers yet. Use torch operations inside the function, and convert its result.""",
    ),
)


_TRACE_RULES += _rules(
    (
        r"UntypedStorage",
        UnsupportedOperationError,
        """The memory of a tensor that {fun} closes over is asked for (copy.copy, pickle, set_()), but {fun} is being traced. Use
        x.detach() for another view of the tensor, or x.clone() for a copy.""",
    ),
    (
        r"doesn't define (__round__) method",
        DataDependentError,
        """round() needs a number of Python's, but {fun} is being traced, and the value is only known when it runs. Use
        torch.round(x); or make the argument that it comes from static: jit(…, static_argnames=…).""",
    ),
    (
        r"for divmod\(\): .*FakeTensor",
        UnsupportedOperationError,
        "divmod does not take tensors, and {fun} is being traced, where a number is one. Write (a // b, a % b).",
    ),
    (
        r"^a tensor is a key$",
        DataDependentError,
        """Python looks for a value in a dict or a set, but {fun} is being traced, and the value is only known when it runs.
        Choose with torch.where or an index (torch.stack(values)[i]); or make the argument that it comes from static:
        jit(…, static_argnames=…).""",
    ),
    (
        r"leaf Variable that requires grad",
        InPlaceError,
        """{fun} writes in place into an argument, or a tensor that it closes over, that requires a gradient. Compute a new value
        and return it.""",
    ),
    (
        r"expected to contain only concrete integers|to be Tensor or scalar, got .*SymInt|must be Tensor or scalar, got",
        UnsupportedOperationError,
        "An operation here needs sizes as numbers, but dynamic=True leaves those of mapped axes open. Leave dynamic out.",
    ),
)


_TRACE_ERRORS = frozenset(
    "RuntimeError TypeError AssertionError AttributeError KeyError NotImplementedError GuardOnDataDependentSymNode".split()
)
_STACKED = re.compile(r"\b(torch\.tensor|torch\.as_tensor|np\.array|np\.asarray)\(\s*[\[(]")
_NAME = re.compile(r"\b(?!True\b|False\b)[^\W\d]\w*")
_STACKED_TEXT = (
    "A tensor is made of a list of tensors ({call}), which asks for their values, but {{fun}} is being traced. Use "
    "torch.stack([…]), which stays a tensor."
)
_LIBRARY_TEXTS = (  # functions of PyTorch that look at values, where the usual advice is of no use
    (
        os.path.join("", "torch", "distributions", "distribution.py"),
        ("__init__", "_validate_sample"),
        "A distribution checks its arguments, which needs their values. Make it with validate_args=False.",
    ),
    (
        os.path.join("", "torch", "nn", "init.py"),
        ("trunc_normal_",),
        "trunc_normal_ draws again until all numbers are within the bounds, so it looks at them. Call it before, and pass the "
        "tensor.",
    ),
)


def explain_trace(error: Exception, fun: str) -> TorchbatchError | None:
    """The error to raise instead of one that came out of a trace of ``fun``, or None if it is not about tracing."""
    if _is_users_own(error):
        return None
    about_values = isinstance(error, DataDependentOutputException | DynamicOutputShapeException)
    if not about_values and type(error).__name__ not in _TRACE_ERRORS:
        return None
    where = _user_frame(error.__traceback__) or _calling_frame()
    for rule in _TRACE_RULES:
        if rule.pattern.search(_text(error)) and (about_values or "aten" not in rule.pattern.pattern[:4]):
            better = _of_library(error.__traceback__) or _of_list(where) if rule.error is DataDependentError else None
            return rule.error((better or rule.text).format(fun=fun) + _line(where))
    return None


def _text(error: Exception) -> str:
    """What an error says; that of a missing key holds the key itself."""
    return "a tensor is a key" if isinstance(error, KeyError) and isinstance(error.args[0], torch.Tensor) else str(error)


def _of_library(trace: TracebackType | None) -> str | None:
    """What to say of functions of PyTorch that look at values themselves."""
    for frame, _ in traceback.walk_tb(trace):
        for path, names, text in _LIBRARY_TEXTS:
            if frame.f_code.co_filename.endswith(path) and frame.f_code.co_name in names:
                return text
    return None


def _of_list(where: _Place | None) -> str | None:
    """What to say where the user's line makes a tensor of a list."""
    line = (where.summary.line or "") if where is not None else ""
    call = next((found[1] for found in _STACKED.finditer(line) if _holds_names(line[found.end() - 1 :])), None)
    return None if call is None else _STACKED_TEXT.format(call=f"{call}([…])")


def _holds_names(text: str) -> bool:
    """Whether anything but numbers and truth values stands in the brackets that a text begins with."""
    depth = 0
    for end, character in enumerate(text):
        depth += (character in "[(") - (character in "])")
        if not depth:
            return bool(_NAME.search(text, 0, end))
    return True


def add_note(error: Exception, samples: Callable[[], list[str]]) -> None:
    """Say what one sample is, under an error of PyTorch whose text may speak of shapes with the batch in front."""
    if type(error) not in (RuntimeError, IndexError) or _is_users_own(error) or not hasattr(error, "add_note"):
        return
    where = _user_frame(error.__traceback__)
    error.add_note(f"(raised inside vmap, where shapes may have the batch in front: {'; '.join(samples())}){_line(where)}")


def _is_users_own(error: Exception) -> bool:
    """Whether the error comes from a ``raise`` outside PyTorch and torchbatch, whatever its text says."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None or trace.tb_frame.f_code.co_filename.startswith(caller.LIBRARIES):
        return False
    return dis.opname[trace.tb_frame.f_code.co_code[trace.tb_lasti]] in ("RAISE_VARARGS", "RERAISE")


def _same_groups(match: re.Match[str] | None) -> bool:
    return match is not None and match.group(1) == match.group(2)


_STANDARD = (sysconfig.get_paths()["stdlib"] + os.sep, sysconfig.get_paths()["purelib"] + os.sep)


class _Place(NamedTuple):
    summary: traceback.FrameSummary
    variables: Mapping[str, Any]


def _user_frame(trace: TracebackType | None) -> _Place | None:
    """The innermost frame of the user's own code, or else of a library that is neither torchbatch nor PyTorch."""
    own, other = None, None
    for (frame, _), summary in zip(traceback.walk_tb(trace), traceback.extract_tb(trace), strict=True):
        path = os.path.abspath(summary.filename)
        if path.startswith(caller.LIBRARIES):
            continue
        place = _Place(summary, {**frame.f_globals, **frame.f_locals})
        if path.startswith(_STANDARD):
            other = place
        else:
            own = place
    return own or other


def _calling_frame() -> _Place | None:
    """The line that calls the mapped function, where that is none of the user's own (``vmap(torch.Tensor.item)``)."""
    frame = caller.user_frame()
    if frame is None:
        return None
    return _Place(traceback.FrameSummary(frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name), {})


def _line(where: _Place | None) -> str:
    if where is None:
        return ""
    summary = where.summary
    source = textwrap.shorten(summary.line or "", 120, placeholder=" …")
    return f"\n  in {summary.name}, {summary.filename}:{summary.lineno}\n    {source}".rstrip()


def _shared_write(where: _Place | None, shared: Mapping[str, torch.Tensor]) -> str:
    target = _written(where)
    names = [name for name, tensor in shared.items() if target is not None and _same_memory(tensor, target[1])]
    if names:
        what = f"argument {names[0]}, which is unmapped (None in in_axes) and so shared by all samples"
        fix = "Map it over an axis, write into a copy (.clone()), or return the value instead."
    else:
        name = repr(target[0]) if target is not None else "a tensor"
        what = f"{name}, which all samples share: it was made outside the mapped function, or from such tensors alone"
        fix = "Make it inside (torch.zeros(…), .clone()), pass it as a mapped argument, or return the value."
    return f"A per-sample value is written in place into {what}. {fix}"


def _same_memory(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors are one, or one is a view of the other."""
    return a is b or levels.share_memory(a, b)


def _written(where: _Place | None) -> tuple[str, torch.Tensor] | None:
    """The expression that the failing line writes to, and the tensor that it starts from."""
    if where is None:
        return None
    for node in ast.walk(_parse(where.summary)):
        target: ast.AST | None = None
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr.endswith("_"):
            target = node.func.value
        elif isinstance(node, ast.AugAssign):
            target = node.target
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Subscript):
            target = node.targets[0]
        found = _lookup(target, where.variables) if target is not None else None
        if target is not None and found is not None:
            return ast.unparse(target), found
    return None


def _parse(summary: traceback.FrameSummary) -> ast.AST:
    """The statement at a line of source; an empty module where it cannot be read alone."""
    first = summary.lineno or 0
    last = getattr(summary, "end_lineno", None) or first
    source = textwrap.dedent("".join(linecache.getline(summary.filename, n) for n in range(first, last + 1)))
    for text in (source, source.strip().removeprefix("return "), source.strip().rstrip(":") + ": pass"):
        try:
            return ast.parse(text)
        except SyntaxError:
            continue
    return ast.Module(body=[], type_ignores=[])


def _lookup(node: ast.AST, variables: Mapping[str, Any]) -> torch.Tensor | None:
    """The tensor that an expression of names, attributes, keys and method calls starts from."""
    value = _value(node, variables)
    return value if isinstance(value, torch.Tensor) else None


def _value(node: ast.AST, variables: Mapping[str, Any]) -> Any:
    """The value of such an expression, up to the first tensor in it; None where it cannot be told."""
    if isinstance(node, ast.Name):
        return variables.get(node.id)
    if isinstance(node, ast.Call):
        node = node.func
    if not isinstance(node, ast.Attribute | ast.Subscript):
        return None
    owner = _value(node.value, variables)
    if owner is None or isinstance(owner, torch.Tensor):
        return owner
    if isinstance(node, ast.Attribute):
        return getattr(owner, node.attr, None)
    key = node.slice.value if isinstance(node.slice, ast.Constant) else _value(node.slice, variables)
    try:
        return owner[key]
    except (LookupError, TypeError):
        return None


def uncompiled(fun: Callable[..., Any]) -> Callable[..., Any]:
    """The function that ``torch.compile`` was given, for a compiled function; any other function as it is."""
    if isinstance(fun, torch.nn.Module):
        return getattr(fun, "_orig_mod", fun)
    return getattr(fun, "_torchdynamo_orig_callable", fun)
