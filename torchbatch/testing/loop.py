"""``loop``: what ``vmap`` means, in plain Python, one sample after the other.

It is the yardstick for the batched engine and shares no code with it but the classes of exceptions. It is slow, and
meant to be read.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from torchbatch import tree as registered
from torchbatch.errors import (
    AxisError,
    AxisSpecError,
    InPlaceError,
    InputTypeError,
    OutputTypeError,
    RandomnessError,
    UnmappedOutputError,
)


def loop(
    fun: Callable[..., Any],
    in_axes: Any = 0,
    out_axes: Any = 0,
    axis_name: Hashable = None,
    axis_size: int | None = None,
    spmd_axis_name: Any = None,
    sum_match: bool = False,
    *,
    randomness: str = "error",
    chunk_size: int | None = None,
    **unknown: Any,
) -> Callable[..., Any]:
    """Call a function once per sample and stack what it returns: the meaning of ``vmap``, without its speed.

    Arguments and exceptions are those of :func:`torchbatch.vmap`. Shapes: ``fun : [a] -> [b]`` becomes
    ``loop(fun) : [n, a] -> [n, b]``. What a loop can only find out from values:

    - An output *varies* if its values differ between samples. Samples may be alike by chance: where ``out_axes`` has a
      None, ``fun`` is therefore called once more, on other numbers.
    - An empty batch has no sample, so ``fun`` is called on zeros to learn what it returns.
    - A write into an unmapped tensor is an error if the samples write different values. Otherwise it counts once.
    - A draw is random if PyTorch's global generators moved.

    Args:
        fun: a function of one sample.
        in_axes: which axis of each positional argument is mapped, or None.
        out_axes: where the mapped axis goes in each output, or None.
        axis_name: accepted; a loop has no collectives.
        axis_size: the number of samples, needed only when no argument is mapped.
        spmd_axis_name: accepted, without effect.
        sum_match: whether an output that varies where ``out_axes`` is None is summed over the samples.
        randomness: ``"error"``, or whether samples draw ``"different"`` numbers or the ``"same"``.
        chunk_size: checked, without effect: a loop takes one sample at a time.
        unknown: any other option is an error.

    Returns:
        The mapped function.

    Raises:
        AxisSpecError, AxisError, InputTypeError, OutputTypeError, UnmappedOutputError, InPlaceError, RandomnessError:
            where ``vmap`` raises them.

    Example:
        >>> import torch
        >>> from torchbatch.testing import loop
        >>> loop(torch.dot, in_axes=(0, None))(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.ones(2))
        tensor([3., 7.])
    """
    _check_options(fun, axis_size, randomness, chunk_size, unknown)
    in_spec, out_spec = _parsed_in_axes(in_axes), _parsed(out_axes, "out_axes")

    @functools.wraps(fun, updated=())
    def looped(*args: Any, **kwargs: Any) -> Any:
        arguments = _cover_arguments(fun, in_spec, args, kwargs)
        size = _batch_size(arguments, axis_size)
        call = _Call(fun, arguments, len(args), kwargs, randomness)
        outputs = call.run(size)
        aside = [] if size else [_zeros]
        if _has_none(out_spec):
            aside.append(_other_numbers)
        return _joined(outputs, call.run_aside(aside) if aside else [], out_spec, bool(sum_match))

    return looped


# --- options ---------------------------------------------------------------------------------------------------------


def _check_options(fun: Any, axis_size: Any, randomness: Any, chunk_size: Any, unknown: dict[str, Any]) -> None:
    for name in unknown:
        hint = {"in_dims": "; write in_axes=", "out_dims": "; write out_axes="}.get(name, "")
        raise AxisSpecError(f"loop has no option {name!r}{hint}.")
    if not callable(fun):
        raise AxisSpecError(f"loop needs a function, but it got {fun!r} of type {type(fun).__name__}.")
    for name, value, least in (("axis_size", axis_size, 0), ("chunk_size", chunk_size, 1)):
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int):
            raise AxisSpecError(f"{name} must be an int or None, but it is {value!r} of type {type(value).__name__}.")
        if value < least:
            raise AxisError(f"{name} must be at least {least}, but it is {value}.")
    if randomness not in ("error", "different", "same"):
        raise AxisError(f"randomness must be 'error', 'different' or 'same', but it is {randomness!r}.")


def _parsed_in_axes(in_axes: Any) -> Any:
    if in_axes is not None and type(in_axes) not in (int, tuple, list):
        raise AxisSpecError(
            "in_axes must be an int, None, or a tuple or list with one entry per positional argument, but it is "
            f"{in_axes!r} of type {type(in_axes).__name__}."
        )
    return _parsed(tuple(in_axes) if isinstance(in_axes, list) else in_axes, "in_axes")


def _parsed(spec: Any, what: str) -> Any:
    for leaf in _leaves(spec, ""):
        if type(leaf.value) is not int:
            raise AxisSpecError(
                f"{what} must be an int, None, or a tree of them, but it holds {leaf.value!r} of type "
                f"{type(leaf.value).__name__}."
            )
    return spec


def _has_none(spec: Any) -> bool:
    node = None if spec is None else _open(spec)
    return spec is None or (node is not None and any(_has_none(child) for child in node.children))


# --- trees -----------------------------------------------------------------------------------------------------------


class _Node(NamedTuple):
    """One level of a tree. Two nodes are of the same make if their ``make`` is equal."""

    make: Any
    steps: list[str]
    children: list[Any]
    rebuild: Callable[[list[Any]], Any]


class _Leaf(NamedTuple):
    where: str
    value: Any


class _Piece(NamedTuple):
    """A subtree and the one axis that an axis specification gives it."""

    where: str
    value: Any
    axis: int | None


def _open(tree: Any) -> _Node | None:
    """One level of ``tree``, or None if it is a leaf."""
    kind = type(tree)
    if tree is None:
        return _Node(kind, [], [], lambda children: None)
    if kind in (tuple, list):
        return _Node((kind, len(tree)), [f"[{i}]" for i in range(len(tree))], list(tree), kind)
    if kind in (dict, OrderedDict, defaultdict):
        return _open_dict(tree)
    if issubclass(kind, tuple) and hasattr(kind, "_fields"):
        return _Node(kind, [f".{name}" for name in kind._fields], list(tree), kind._make)  # type: ignore[attr-defined]
    return _open_registered(tree)


def _open_dict(tree: Any) -> _Node:
    keys = list(tree) if type(tree) is OrderedDict else sorted(tree, key=repr)
    factory = tree.default_factory if type(tree) is defaultdict else None

    def rebuild(children: list[Any]) -> Any:
        new = dict(zip(keys, children, strict=True))
        pairs = [(key, new[key]) for key in tree]
        return defaultdict(factory, pairs) if type(tree) is defaultdict else type(tree)(pairs)

    return _Node((type(tree), keys, factory), [f"[{key!r}]" for key in keys], [tree[key] for key in keys], rebuild)


def _open_registered(tree: Any) -> _Node | None:
    found, treedef = registered.flatten_with_path(tree, is_leaf=lambda x: x is not tree)
    if len(found) == 1 and found[0][1] is tree:
        return None
    steps = [registered.keystr(path) for path, _ in found]
    return _Node(treedef, steps, [child for _, child in found], functools.partial(registered.unflatten, treedef))


def _leaves(tree: Any, where: str) -> list[_Leaf]:
    """The leaves of a tree, each with its place."""
    node = _open(tree)
    if node is None:
        return [_Leaf(where, tree)]
    steps = zip(node.steps, node.children, strict=True)
    return [leaf for step, child in steps for leaf in _leaves(child, where + step)]


def _with_leaves(tree: Any, values: Iterator[Any]) -> Any:
    """The tree with other leaves."""
    node = _open(tree)
    return next(values) if node is None else node.rebuild([_with_leaves(child, values) for child in node.children])


def _skeleton(tree: Any) -> Any:
    """What is left of a tree without its leaves."""
    node = _open(tree)
    return None if node is None else (node.make, [_skeleton(child) for child in node.children])


def _cover(spec: Any, tree: Any, where: str, what: str) -> list[_Piece]:
    """Cut a tree where ``spec`` has its leaves."""
    if spec is None or type(spec) is int:
        return [_Piece(where, tree, spec)]
    mine, theirs = _open(spec), _open(tree)
    if mine is None or theirs is None or mine.make != theirs.make:
        raise AxisError(
            f"{what} must be a tree prefix of what it is for: at {where or 'the top'} it has {_about(spec)}, but the "
            f"value there is {_about(tree)}."
        )
    rows = zip(mine.children, theirs.children, theirs.steps, strict=True)
    return [piece for child, value, step in rows for piece in _cover(child, value, where + step, what)]


def _about(tree: Any) -> str:
    node = _open(tree)
    name = type(tree).__name__
    return f"a leaf of type {name}" if node is None else f"a {name} with {', '.join(node.steps) or 'nothing in it'}"


def _with_pieces(spec: Any, tree: Any, values: Iterator[Any]) -> Any:
    """The tree with other subtrees where ``spec`` has its leaves."""
    mine, theirs = None if spec is None else _open(spec), _open(tree)
    if mine is None or theirs is None:
        return next(values)
    rows = zip(mine.children, theirs.children, strict=True)
    return theirs.rebuild([_with_pieces(child, value, values) for child, value in rows])


# --- arguments -------------------------------------------------------------------------------------------------------


class _Argument(NamedTuple):
    """A positional or keyword argument, its axis specification, and the pieces into which that cuts it."""

    spec: Any
    value: Any
    pieces: list[_Piece]

    def rebuilt(self, take: Callable[[_Piece], Any]) -> Any:
        """The argument with ``take(piece)`` in the place of each piece."""
        return _with_pieces(self.spec, self.value, iter([take(piece) for piece in self.pieces]))


def _cover_arguments(fun: Any, spec: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[_Argument]:
    if not isinstance(spec, tuple):
        spec = (spec,) * len(args)
    if len(spec) != len(args):
        raise AxisError(f"in_axes has {len(spec)} entries for {len(args)} positional arguments; give one for each.")
    specs = [*spec, *(0 for _ in kwargs)]
    rows = zip(specs, [*args, *kwargs.values()], [*_positional_names(fun, len(args)), *kwargs], strict=True)
    return [_Argument(s, value, _prepared(_cover(s, value, name, "in_axes"))) for s, value, name in rows]


def _positional_names(fun: Any, count: int) -> list[str]:
    try:
        parameters = inspect.signature(fun).parameters.values()
    except (TypeError, ValueError):
        parameters = ()  # type: ignore[assignment]
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return [names[i] if i < len(names) else f"args[{i}]" for i in range(count)]


def _prepared(pieces: list[_Piece]) -> list[_Piece]:
    """The same pieces with mapped arrays as tensors, each leaf checked against its axis."""
    return [piece if piece.axis is None else _prepared_piece(piece, piece.axis) for piece in pieces]


def _prepared_piece(piece: _Piece, axis: int) -> _Piece:
    tensors = [_mapped(leaf, axis) for leaf in _leaves(piece.value, piece.where)]
    return piece._replace(value=_with_leaves(piece.value, iter(tensors)))


def _mapped(leaf: _Leaf, axis: int) -> Any:
    """A mapped leaf as a tensor that has the axis; a module passes as it is."""
    if isinstance(leaf.value, torch.nn.Module):
        return leaf.value
    tensor = _as_tensor(leaf.value)
    if tensor is None and hasattr(leaf.value, "__array__"):
        tensor = _as_tensor(np.asarray(leaf.value))
    if tensor is None:
        raise InputTypeError(
            f"argument {leaf.where} is mapped over axis {axis}, but {leaf.value!r} of type {type(leaf.value).__name__} "
            "is not an array. Give None for it in in_axes if it is for all samples."
        )
    if not -tensor.ndim <= axis < tensor.ndim:
        raise AxisError(
            f"argument {leaf.where} is mapped over axis {axis}, but it has {tensor.ndim} dimensions, "
            f"shape {tuple(tensor.shape)}. Axes run over [-ndim, ndim)."
        )
    return tensor


def _as_tensor(value: Any) -> torch.Tensor | None:
    """Tensors, NumPy arrays and numbers as tensors; None for anything else."""
    if isinstance(value, torch.Tensor):
        return value
    if isinstance(value, np.ndarray | np.generic):
        if value.dtype.kind not in "biufc" or value.dtype.char in "gG":
            return None
        plain = np.asarray(value, dtype=value.dtype.newbyteorder("="))
        shareable = plain.flags.writeable and all(stride >= 0 for stride in plain.strides)
        return torch.as_tensor(plain if shareable else plain.copy())
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        return None
    return torch.as_tensor(value) if isinstance(value, bool | int | float | complex) else None


def _mapped_tensors(arguments: list[_Argument]) -> list[tuple[str, torch.Tensor, int]]:
    pieces = [piece for argument in arguments for piece in argument.pieces]
    found = [
        (leaf, piece.axis) for piece in pieces if piece.axis is not None for leaf in _leaves(piece.value, piece.where)
    ]
    return [(leaf.where, leaf.value, axis) for leaf, axis in found if isinstance(leaf.value, torch.Tensor)]


def _batch_size(arguments: list[_Argument], given: int | None) -> int:
    sizes = {f"axis {axis} of {where}": tensor.shape[axis] for where, tensor, axis in _mapped_tensors(arguments)}
    if given is not None:
        sizes["axis_size"] = given
    if not sizes:
        raise AxisError("nothing is mapped: give an argument an axis in in_axes, or give axis_size.")
    if len(set(sizes.values())) > 1:
        listed = ", ".join(f"{name} has {size}" for name, size in sizes.items())
        raise AxisError(f"the axes to loop over have different sizes: {listed}.")
    return next(iter(sizes.values()))


# --- running ---------------------------------------------------------------------------------------------------------


Take = Callable[[torch.Tensor, int], torch.Tensor]


class _Call:
    """One call of the looped function."""

    def __init__(
        self, fun: Any, arguments: list[_Argument], count: int, keywords: Iterable[str], randomness: str
    ) -> None:
        self.fun = fun
        self.randomness = randomness
        self.start = _generators()
        self.arguments = arguments
        self.count = count
        self.keywords = list(keywords)

    def sample(self, take: Take) -> Any:
        """Call the function with ``take(tensor, axis)`` in the place of each mapped tensor."""

        def taken(piece: _Piece) -> Any:
            if piece.axis is None:
                return piece.value
            axis = piece.axis
            leaves = [leaf.value for leaf in _leaves(piece.value, "")]
            new = [take(leaf, axis) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
            return _with_leaves(piece.value, iter(new))

        values = [argument.rebuilt(taken) for argument in self.arguments]
        return self.fun(*values[: self.count], **dict(zip(self.keywords, values[self.count :], strict=True)))

    def run(self, size: int) -> list[Any]:
        """The outputs of all samples."""
        shared = _Shared(self.arguments)
        outputs = []
        with shared.restored():
            for i in range(size):
                outputs.append(self._drawing(_sample_number(i)))
                shared.after_sample()
        shared.keep_common_writes()
        return outputs

    def run_aside(self, takes: Sequence[Take]) -> list[Any]:
        """Outputs for samples that are not in the batch; generators and shared tensors stay as they were."""
        before = _generators()
        try:
            with _Shared(self.arguments).restored():
                return [self._drawing(take) for take in takes]
        finally:
            _set_generators(before)

    def _drawing(self, take: Take) -> Any:
        """The output for one sample, with random numbers drawn as the user asked."""
        if self.randomness == "same":
            _set_generators(self.start)
        output = self.sample(take)
        if self.randomness == "error" and not all(map(torch.equal, self.start, _generators())):
            raise RandomnessError(
                "the function drew random numbers, but randomness is 'error'. Say whether samples draw 'different' "
                "numbers or the 'same'."
            )
        return output


def _sample_number(i: int) -> Take:
    return lambda tensor, axis: tensor.select(axis, i)


def _zeros(tensor: torch.Tensor, axis: int) -> torch.Tensor:
    """One sample of an empty batch."""
    if tensor.requires_grad:
        return tensor.sum(axis)
    return tensor.new_zeros([n for i, n in enumerate(tensor.shape) if i != axis % tensor.ndim])


def _other_numbers(tensor: torch.Tensor, axis: int) -> torch.Tensor:
    """A sample unlike the only one, or unlike zeros; integers, which may be indices, stay."""
    known = tensor.select(axis, 0) if tensor.shape[axis] else _zeros(tensor, axis)
    sample = known.detach()
    if not (sample.is_floating_point() or sample.is_complex()):
        return sample.clone()
    other = torch.where(sample == 0, torch.ones_like(sample), sample * 1.5)
    return torch.where(torch.ones_like(sample, dtype=torch.bool), other, known)  # requires a gradient, if the sample does


def _generators() -> list[torch.Tensor]:
    """The states of PyTorch's global generators."""
    on_cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    return [torch.get_rng_state(), *on_cuda]


def _set_generators(states: list[torch.Tensor]) -> None:
    torch.set_rng_state(states[0])
    if states[1:]:
        torch.cuda.set_rng_state_all(states[1:])


class _SharedTensor:
    """A tensor that all samples share, watched for writes.

    Values are compared, not PyTorch's count of writes, which the running statistics of a batch norm do not move. Only
    inside an outer ``vmap``, where a comparison has no one answer, the count has to do.
    """

    def __init__(self, leaf: _Leaf) -> None:
        self.where, self.tensor = leaf
        self.before = self.tensor.detach().clone()
        self.written: torch.Tensor | None = None
        self.count = self._count()

    def _count(self) -> int | None:
        return None if self.tensor.is_inference() else self.tensor._version

    def _untouched(self) -> bool:
        try:
            return _same(self.tensor, self.before)
        except RuntimeError:
            return self._count() == self.count

    def after_sample(self) -> None:
        """Note what this sample wrote, and give the next one what this one got."""
        now = self.before if self._untouched() else self.tensor.detach().clone()
        self.written = now if self.written is None else self.written
        if not _same(self.written, now):
            raise InPlaceError(
                f"the samples write different values into {self.where}, which is not mapped and belongs to all of "
                "them. Map it, or write into a copy."
            )
        self.restore()

    def restore(self) -> None:
        """The tensor as it was before the call."""
        if not self._untouched():
            self._put(self.before)

    def keep(self) -> None:
        """The tensor as every sample left it."""
        if self.written is not None and self.written is not self.before:
            self._put(self.written)

    def _put(self, value: torch.Tensor) -> None:
        with torch.no_grad():
            self.tensor.copy_(value)
        self.count = self._count()


class _Shared:
    """All tensors that are not mapped."""

    def __init__(self, arguments: list[_Argument]) -> None:
        pieces = [piece for argument in arguments for piece in argument.pieces]
        leaves = [(piece, leaf) for piece in pieces for leaf in _leaves(piece.value, piece.where)]
        self.tensors = [_SharedTensor(part) for piece, leaf in leaves for part in _shared_parts(piece, leaf)]

    def after_sample(self) -> None:
        for tensor in self.tensors:
            tensor.after_sample()

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """Whatever happens inside, the tensors are as they were afterwards."""
        try:
            yield
        finally:
            for tensor in self.tensors:
                tensor.restore()

    def keep_common_writes(self) -> None:
        """What all samples wrote alike stays."""
        for tensor in self.tensors:
            tensor.keep()


def _shared_parts(piece: _Piece, leaf: _Leaf) -> list[_Leaf]:
    """The tensors of an unmapped leaf; a module has many, and is never mapped."""
    if isinstance(leaf.value, torch.nn.Module):
        named = [*leaf.value.named_parameters(), *leaf.value.named_buffers()]
        return [_Leaf(f"{leaf.where}.{name}", tensor) for name, tensor in named]
    return [leaf] if piece.axis is None and isinstance(leaf.value, torch.Tensor) else []


# --- outputs ---------------------------------------------------------------------------------------------------------


def _joined(outputs: list[Any], extra: list[Any], spec: Any, sum_match: bool) -> Any:
    """One output for the batch. ``extra`` are outputs for samples that are not in it."""
    everything = [*outputs, *extra]
    first = everything[0]
    pieces = _cover(spec, first, "", "out_axes")
    axes = [piece.axis for piece in pieces for _ in _leaves(piece.value, "")]
    skeleton = _skeleton(first)
    if any(_skeleton(output) != skeleton for output in everything):
        raise AxisError("the samples return trees of different structure.")
    columns = zip(*(_leaves(output, "") for output in everything), strict=True)
    size = len(outputs)
    rows = zip(columns, axes, strict=True)
    return _with_leaves(first, iter([_joined_leaf(list(column), axis, size, sum_match) for column, axis in rows]))


def _joined_leaf(column: list[_Leaf], axis: int | None, size: int, sum_match: bool) -> Any:
    where = f"the output{column[0].where}"
    first = column[0].value
    if axis is None and all(_same(first, leaf.value) for leaf in column):
        return first
    tensors = [_as_tensor(leaf.value) for leaf in column]
    if any(tensor is None for tensor in tensors):
        raise OutputTypeError(f"{where} is {first!r} of type {type(first).__name__}, which is not an array.")
    batch = _stacked([tensor for tensor in tensors if tensor is not None], size, where)
    if axis is None and sum_match:
        return batch.sum(0)
    if axis is None:
        raise UnmappedOutputError(f"{where} differs between samples, but its out_axes is None. Give it an axis.")
    if not -batch.ndim <= axis < batch.ndim:
        raise AxisError(f"out_axes is {axis} for {where}, which has {batch.ndim} dimensions with the mapped axis.")
    return batch.movedim(0, axis)


def _stacked(tensors: list[torch.Tensor], size: int, where: str) -> torch.Tensor:
    shapes = {tuple(tensor.shape) for tensor in tensors}
    if len(shapes) > 1:
        raise AxisError(f"{where} has different shapes for different samples: {sorted(shapes)}.")
    return torch.stack(tensors[:size]) if size else torch.stack(tensors[:1])[:0]


def _same(a: Any, b: Any) -> bool:
    """Whether two outputs are equal; NaN equals NaN."""
    if a is b:
        return True
    x, y = _as_tensor(a), _as_tensor(b)
    if x is None or y is None:
        return type(a) is type(b) and bool(a == b)
    if x.shape != y.shape or x.dtype != y.dtype:
        return False
    if torch.equal(x, y):
        return True
    return bool(((x == y) | ((x != x) & (y != y))).all())
