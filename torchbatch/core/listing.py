"""A traced graph as text: one line an operation, with the dtype and the shape of what it gives.

Views stand where they are used, as Python would write them (``mm a b.T``, ``sub a[:,None] b``). Where the shapes of an
operation say them already, in the broadcasting of an operation on elements and in the batch axes of a matrix product, they are
left out, as are copies. Constants are numbers.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import operator
import string
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch.fx import GraphModule, Node
from torch.fx.operator_schemas import get_signature_for_torch_op

from torchbatch._torch.graphs import Trace
from torchbatch.core import views
from torchbatch.core.views import Shape, Size, View, joined

_SMALL = 6  # a constant with so many elements stands where it is used
_PRODUCTS = frozenset("mm bmm mv dot vdot addmm addmv baddbmm addbmm".split())
_CONSTANTS = {
    **dict.fromkeys("zeros zeros_like new_zeros _efficientzerotensor _new_zeros_with_same_feature_meta".split(), 0),
    **dict.fromkeys("ones ones_like new_ones".split(), 1),
}
_FILLS = frozenset("full full_like new_full scalar_tensor fill _to_copy".split())
_WRITES = frozenset(("copy", "fill"))  # their second argument is what they return
_LAZY = frozenset("_conj _neg_view".split())  # views that compute something
_UNSAID = frozenset("size dtype layout device pin_memory memory_format non_blocking generator implicit".split())
_USUAL = {"stride": 1, "padding": 0, "dilation": 1, "output_padding": 0, "groups": 1}
_WINDOWS = frozenset(["kernel_size", *_USUAL])
_DTYPES = {"float": "f", "bfloat": "bf", "int": "i", "uint": "u", "complex": "c"}


class Constant(NamedTuple):
    """One number, everywhere."""

    number: Any
    dtype: torch.dtype
    shape: Shape


def listing(
    module: GraphModule,
    captured_count: int,
    *,
    outputs: int | None = None,
    mutated: Sequence[int] = (),
    tangents: int = 0,
) -> str:
    """A graph of aten operations as text.

    Args:
        module: the graph. Its inputs are those of the function, the captured tensors and the tangents; its outputs are those
            of the function, the new values of what is written in place, and gradients.
        captured_count: how many captured tensors there are.
        outputs: how many outputs the function has (default: all of the graph's).
        mutated: the positions of the inputs that are written in place.
        tangents: how many tangents there are.
    """
    return str(Listing(module, captured_count, outputs=outputs, mutated=mutated, tangents=tangents))


def of_trace(trace: Trace) -> Listing:
    """A trace as text."""
    return Listing(
        trace.graph,
        len(trace.captured),
        outputs=trace.outputs,
        mutated=trace.mutated,
        tangents=len(trace.differentiable),
    )


class Listing:
    """What :func:`listing` writes.

    Attributes:
        lines: the lines of text.
        operations: the names of the operations, in order.
    """

    def __init__(
        self,
        module: GraphModule,
        captured_count: int,
        *,
        outputs: int | None = None,
        mutated: Sequence[int] = (),
        tangents: int = 0,
    ) -> None:
        self.lines: list[str] = []
        self.operations: list[str] = []
        self._module = module
        self._values: dict[Node, Any] = {}
        self._letters = letters()
        inputs = module.graph.find_nodes(op="placeholder")
        self._inputs(inputs, captured_count, tangents)
        for node in module.graph.nodes:
            if node.op == "get_attr":
                self._attribute(node)
            elif node.op == "call_function":
                self._call(node)
        written = [inputs[position] for position in mutated]
        results: Any = module.graph.output_node().args[0]
        self._return(list(results), written, outputs)

    def __str__(self) -> str:
        return "\n".join(self.lines)

    # --- lines -------------------------------------------------------------------------------------------------------

    def _inputs(self, nodes: Sequence[Node], captured: int, tangents: int) -> None:
        typed = [self._named(node, _value(node)) for node in nodes]
        ends = len(nodes) - captured - tangents, len(nodes) - tangents
        line = " ".join(["inputs", *typed[: ends[0]]])
        line += "".join([f"; captured {' '.join(typed[slice(*ends)])}"] * bool(captured))
        self.lines.append(line + "".join([f"; tangents {' '.join(typed[ends[1] :])}"] * bool(tangents)))

    def _named(self, node: Node, value: Any, shape: Any = None) -> str:
        """Give a node a letter; that letter with its type, which may leave out axes of size 1."""
        if not isinstance(value, torch.Tensor):
            self._values[node] = str(value).replace(" ", "")
            return str(self._values[node])
        letter, shown = next(self._letters), sizes(value.shape if shape is None else shape)
        self._values[node] = views.reshaped(views.named(letter, shown), shape_of(value))
        return f"{letter}:{typed(value.dtype, shown)}"

    def _return(self, results: Sequence[Any], written: Sequence[Node], outputs: int | None) -> None:
        count = len(results) - len(written) if outputs is None else outputs
        for node, value in zip(written, results[count:], strict=False):
            self.lines.append(f"{self._text(node)} <- {self._text(value)}")
        line = " ".join(["return", *map(self._text, results[:count])])
        gradients = [self._text(value) for value in results[count + len(written) :]]
        self.lines.append(f"{line}; gradients {' '.join(gradients)}" if gradients else line)

    def _attribute(self, node: Node) -> None:
        """A tensor that is part of the graph: its numbers if they are few, or else a letter."""
        value = operator.attrgetter(str(node.target))(self._module)
        if not isinstance(value, torch.Tensor):
            self._values[node] = str(node.target)
        elif type(value) is not torch.Tensor or value.numel() > _SMALL:
            node.meta.setdefault("val", value)
            self.lines.append(f"{self._named(node, value)} = constant")
        elif value.numel() == 1:
            self._values[node] = Constant(value.item(), value.dtype, shape_of(value))
        else:
            self._values[node] = views.named(_numbers(value.tolist()), shape_of(value))

    def _call(self, node: Node) -> None:
        value = _value(node)
        if operator_name(node) == "copy_":
            self._write(node)
        elif node.target is operator.getitem:
            self._values[node] = self._values[_node(node.args[0])][node.args[1]]
        elif not isinstance(value, torch.Tensor | tuple | list):
            self._named(node, value)
        else:
            found = self._folded(node)
            if found is None:
                self._operation(node)
            else:
                self._values[node] = found

    def _write(self, node: Node) -> None:
        target = _node(node.args[0])
        self.lines.append(f"{self._text(target)} <- {self._text(node.args[1])}")
        self._values[node] = self._values[target]

    def _operation(self, node: Node) -> None:
        name = operator_name(node)
        operands, parameters = self._arguments(node, name)
        if name == "bmm" and shape_of(_value(node))[0] == 1:
            name = "mm"  # of one matrix
        shown = name.strip("_") if name != "_to_copy" else "to"
        brackets = f"[{','.join(parameters)}]" if parameters else ""
        self.lines.append(f"{self._results(node, name)} = {' '.join([shown + brackets, *operands])}")
        self.operations.append(shown)

    def _results(self, node: Node, name: str) -> str:
        value = _value(node)
        if isinstance(value, torch.Tensor):
            return self._named(node, value, value.shape[-2:] if name == "mm" else None)
        used = {user.args[1]: user for user in node.users if user.target is operator.getitem}
        texts = [self._named(used[i], part) if i in used else "_" for i, part in enumerate(value)]
        self._values[node] = [self._values[used[i]] if i in used else None for i in range(len(value))]
        return " ".join(texts)

    # --- operands and parameters -------------------------------------------------------------------------------------

    def _arguments(self, node: Node, name: str) -> tuple[list[str], list[str]]:
        """The texts of the tensors that go into an operation, and of the settings."""
        elementwise = _is_elementwise(node)
        with_shape = any(isinstance(self._values[other], View) for other in node.all_input_nodes)
        show = functools.partial(self._text, broadcast=elementwise or name in _PRODUCTS, bare=elementwise and with_shape)
        operands: list[str] = []
        parameters = _conversion(node) if name == "_to_copy" else []
        for key, value, default in _bound(node):
            if key in _UNSAID:
                continue
            if _holds_nodes(value):
                operands += _several(value, show)
            elif elementwise and default is inspect.Parameter.empty and isinstance(value, int | float | complex):
                operands.append(_numbers(value))
            elif not _is_usual(key, value, default):
                parameters.append(_setting(key, value, node))
        return operands, parameters

    def _text(self, value: Any, broadcast: bool = False, bare: bool = False) -> str:
        """What stands for a value: with ``broadcast``, where shapes are understood; with ``bare``, a constant's too."""
        if isinstance(value, Node):
            value = self._values[value]
        if isinstance(value, View):
            return views.broadcast_text(value) if broadcast else views.text(value)
        if isinstance(value, Constant):
            number = _numbers(value.number)
            return number if bare else f"{number}:{typed(value.dtype, value.shape)}"
        return _numbers(value)

    # --- what needs no line ------------------------------------------------------------------------------------------

    def _folded(self, node: Node) -> Any:
        """A view or a constant, or a list of them for several results; None for an operation."""
        name, value = operator_name(node), _value(node)
        number = self._number(node, name)
        if number is not None:
            return Constant(_as_dtype(number, value.dtype), value.dtype, shape_of(value))
        source = node.args[1 if name in _WRITES else 0] if node.args else None
        known = self._values.get(source) if isinstance(source, Node) else None
        if isinstance(known, Constant) and (name in _FOLDS or _is_view(node)):
            same = [Constant(known.number, known.dtype, shape_of(part)) for part in _parts(value)]
            return same[0] if isinstance(value, torch.Tensor) else same
        return self._view(node, name, known) if isinstance(known, View) else None

    def _view(self, node: Node, name: str, view: View) -> Any:
        found = _FOLDS[name](view, node) if name in _FOLDS else None
        if found is not None and not (isinstance(found, list) and None in found):
            return found
        value = _value(node)
        if not _is_view(node) or name in _LAZY or not isinstance(value, torch.Tensor) or value.dtype is not _dtype(node):
            return None
        settings = ",".join([self._text(argument) for argument in node.args[1:]])
        return views.named(f"{views.text(view)}.{name}({settings})", shape_of(value))

    def _number(self, node: Node, name: str) -> Any:
        """The number with which an operation fills a tensor, if that is what it does."""
        if name in _CONSTANTS:
            return _CONSTANTS[name]
        number = node.args[-1] if name in _FILLS else None
        if isinstance(number, Node):
            known = self._values[number]
            return known.number if isinstance(known, Constant) else None
        return number


# --- views, by the name of the operator ------------------------------------------------------------------------------


def _copied(view: View, node: Node) -> View | None:
    """What a copy holds, unless it was converted."""
    before, after = _value(_node(node.args[1 if operator_name(node) in _WRITES else 0])), _value(node)
    same = (before.dtype, before.device) == (after.dtype, after.device)
    return views.expanded(view, shape_of(after)) if same else None


def _reshaped(view: View, node: Node) -> View | None:
    value = _value(node)
    return views.reshaped(view, shape_of(value)) if value.dtype is _dtype(node) else None


def _expanded(view: View, node: Node) -> View:
    return views.expanded(view, shape_of(_value(node)))


def _permuted(view: View, node: Node) -> View:
    return views.permuted(view, [dim % len(view.axes) for dim in _given(node)["dims"]])


def _transposed(view: View, node: Node) -> View:
    order = list(range(len(view.axes)))
    first, second = list(_given(node).values())[1:] or [-2, -1]
    if len(order) > 1:
        order[first], order[second] = order[second], order[first]
    return views.permuted(view, order)


def _selected(view: View, node: Node) -> View | None:
    given = _given(node)
    return views.selected(view, given["dim"] % len(view.axes), given["index"])


def _sliced(view: View, node: Node) -> View | None:
    given = _given(node)
    dim = given["dim"] % len(view.axes)
    size = view.axes[dim].size
    start = given["start"] or 0
    if isinstance(start, int) and isinstance(size, int):
        start = min(max(start + size if start < 0 else start, 0), size)
    return views.sliced(view, dim, start, given["step"], shape_of(_value(node))[dim])


def _split(view: View, node: Node) -> list[View | None]:
    dim = _given(node)["dim"] % len(view.axes)
    sizes = [shape_of(part)[dim] for part in _value(node)]
    starts = itertools.accumulate((size if isinstance(size, int) else 0 for size in sizes), initial=0)
    return [views.sliced(view, dim, start, 1, size) for start, size in zip(starts, sizes, strict=False)]


def _unbound(view: View, node: Node) -> list[View | None]:
    dim = _given(node)["dim"] % len(view.axes)
    return [views.selected(view, dim, i) for i in range(len(_value(node)))]


_FOLDS: dict[str, Callable[[View, Node], Any]] = {
    **dict.fromkeys("clone detach alias lift_fresh lift_fresh_copy contiguous copy fill _to_copy".split(), _copied),
    **dict.fromkeys("view reshape _unsafe_view _reshape_alias squeeze unsqueeze".split(), _reshaped),
    **dict.fromkeys("t transpose".split(), _transposed),
    **dict.fromkeys("split split_with_sizes unsafe_split unsafe_split_with_sizes".split(), _split),
    "expand": _expanded,
    "permute": _permuted,
    "select": _selected,
    "slice": _sliced,
    "unbind": _unbound,
}


# --- short texts -----------------------------------------------------------------------------------------------------


def letters() -> Iterator[str]:
    """a, b, …, z, aa, ab, …"""
    for length in itertools.count(1):
        yield from map("".join, itertools.product(string.ascii_lowercase, repeat=length))


def sizes(shape: Sequence[Any]) -> Shape:
    """A shape, with text for sizes that are left open."""
    return tuple([size if isinstance(size, int) else _size(str(size)) for size in shape])


def _size(text: str) -> Size:
    return int(text) if text.isdigit() else text.replace(" ", "")


def shape_of(value: torch.Tensor) -> Shape:
    """The shape of a tensor."""
    return sizes(value.shape)


def typed(dtype: torch.dtype, shape: Shape) -> str:
    """``f32[3,4]``."""
    return f"{short(dtype)}[{joined(shape)}]"


def short(dtype: torch.dtype) -> str:
    """``f32`` for ``torch.float32``."""
    name = str(dtype).removeprefix("torch.")
    kind = name.rstrip("0123456789")
    return _DTYPES[kind] + name[len(kind) :] if kind in _DTYPES else name.replace("float", "f", 1)


def operator_name(node: Node) -> str:
    """The name of an operator without its overload, and without ``aten``."""
    target: Any = node.target
    if not hasattr(target, "overloadpacket"):
        return str(getattr(target, "__name__", target))
    return str(target.name().removeprefix("aten::").partition(".")[0].replace("::", "."))


def _as_dtype(number: Any, dtype: torch.dtype) -> Any:
    if dtype.is_complex or dtype.is_floating_point:
        return complex(number) if dtype.is_complex else float(number)
    return bool(number) if dtype is torch.bool else int(number)


def _numbers(value: Any) -> str:
    """A number, or a list of them, in few characters."""
    if isinstance(value, tuple | list):
        return f"[{','.join([_numbers(entry) for entry in value])}]"
    if not isinstance(value, float):
        return str(value)
    text = f"{value:.6g}"
    return text if set(text) & set(".einf") else f"{text}.0"


def _setting(key: str, value: Any, node: Node) -> str:
    """``dim=1``; axes are counted from the front."""
    if key.startswith("dim"):
        added = 1 if operator_name(node) == "stack" else 0
        rank = _value(node.all_input_nodes[0]).dim() + added
        value = [dim % rank if rank else dim for dim in value] if isinstance(value, tuple | list) else value % max(rank, 1)
    if key in _WINDOWS and isinstance(value, tuple | list) and len(set(value)) == 1:
        value = value[0]
    if key.startswith("dim") and isinstance(value, tuple | list) and len(value) == 1:
        value = value[0]
    return f"{key}={_numbers(value)}" if key else _numbers(value)


def _is_usual(key: str, value: Any, default: Any) -> bool:
    """Whether a setting goes without saying."""
    if key in _UNSAID or value is None or value in ([], default):
        return True
    if key in _USUAL and all(entry == _USUAL[key] for entry in (value if isinstance(value, tuple | list) else [value])):
        return True
    return value is False and default is inspect.Parameter.empty


def _conversion(node: Node) -> list[str]:
    """What a conversion changes: the dtype, the device, or both."""
    before, after = _value(_node(node.args[0])), _value(node)
    dtype = [] if before.dtype is after.dtype else [short(after.dtype)]
    return dtype + ([] if before.device == after.device else [str(after.device)])


# --- nodes -----------------------------------------------------------------------------------------------------------


def _value(node: Node) -> Any:
    return node.meta.get("val")


def _dtype(node: Node) -> torch.dtype:
    """That of the first argument."""
    found: torch.dtype = _value(_node(node.args[0])).dtype
    return found


def _parts(value: Any) -> Sequence[torch.Tensor]:
    return [value] if isinstance(value, torch.Tensor) else value


def _node(value: Any) -> Node:
    return value  # type: ignore[no-any-return]


def _tags(node: Node) -> Any:
    return getattr(node.target, "tags", ())


def _is_elementwise(node: Node) -> bool:
    return torch.Tag.pointwise in _tags(node)


def _is_view(node: Node) -> bool:
    return bool(getattr(node.target, "is_view", False))


def _holds_nodes(value: Any) -> bool:
    return isinstance(value, Node) or (isinstance(value, tuple | list) and any(isinstance(entry, Node) for entry in value))


def _several(value: Any, show: Callable[[Any], str]) -> list[str]:
    """The texts of one operand, or of a list of them; of an index, where some axes are whole, as one text."""
    if isinstance(value, Node):
        return [show(value)]
    texts = [":" if entry is None else show(entry) for entry in value]
    return [f"[{','.join(texts)}]"] if None in value else texts


@functools.cache
def _signature(target: Any) -> list[inspect.Parameter] | None:
    """The parameters of an operator; None where it has no schema."""
    found = get_signature_for_torch_op(target) if hasattr(target, "overloadpacket") else None
    return list(found[0].parameters.values()) if found else None


def _bound(node: Node) -> list[tuple[str, Any, Any]]:
    """The name, the value and the default of each argument that was given."""
    parameters = _signature(node.target)
    if parameters is None:
        return [("", value, inspect.Parameter.empty) for value in (*node.args, *node.kwargs.values())]
    given = {**dict(zip([parameter.name for parameter in parameters], node.args, strict=False)), **node.kwargs}
    defaults = {parameter.name: parameter.default for parameter in parameters}
    return [(key, value, defaults.get(key)) for key, value in given.items()]


def _given(node: Node) -> dict[str, Any]:
    """All arguments by name."""
    parameters = _signature(node.target) or []
    return {parameter.name: parameter.default for parameter in parameters} | {key: value for key, value, _ in _bound(node)}
