"""Trees of arrays between PyTorch, NumPy and JAX: nothing changes, and memory is shared where it is said to be."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import os
import subprocess
import sys
from typing import Any, NamedTuple

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

import torchbatch
from torchbatch import random, tree
from torchbatch.errors import AxisSpecError, InputTypeError, UnsupportedOperationError
from torchbatch.testing.interchange import from_jax, from_numpy, to_jax, to_numpy

with contextlib.suppress(ImportError):
    import jax
    import jax.numpy as jnp

HAS_JAX, HAS_ML_DTYPES = (importlib.util.find_spec(name) is not None for name in ("jax", "ml_dtypes"))
needs_jax = pytest.mark.skipif(not HAS_JAX, reason="needs JAX")
needs_ml_dtypes = pytest.mark.skipif(not HAS_ML_DTYPES, reason="needs ml_dtypes")
NUMPY_HAS = "bool uint8 uint16 uint32 uint64 int8 int16 int32 int64 float16 float32 float64 complex64 complex128".split()
ML_DTYPES = "bfloat16 float8_e4m3fn float8_e4m3fnuz float8_e5m2 float8_e5m2fnuz float8_e8m0fnu".split()
NAMES = NUMPY_HAS + (ML_DTYPES if HAS_ML_DTYPES else [])
EVERY_WAY = [to_numpy, from_numpy, from_jax, pytest.param(to_jax, marks=needs_jax)]


class Pair(NamedTuple):
    first: Any
    second: Any


@dataclasses.dataclass
class Tagged:
    value: Any
    tag: str = "a"


tree.register_dataclass(Tagged, meta_fields=("tag",))


@contextlib.contextmanager
def x64(on: bool = True):
    """JAX with, or without, 64-bit numbers."""
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", on)
    try:
        yield
    finally:
        jax.config.update("jax_enable_x64", before)


def bits(array: Any) -> tuple[str, tuple[int, ...], bytes]:
    """The dtype, the shape and every bit of an array of any of the three."""
    if isinstance(array, torch.Tensor):
        plain = array.detach().resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)
        name = str(array.dtype).removeprefix("torch.")
        return name, tuple(array.shape), plain.reshape(-1).view(torch.uint8).numpy().tobytes() if plain.numel() else b""
    array = np.asarray(array)
    return array.dtype.name, array.shape, array.astype(array.dtype.newbyteorder("=")).tobytes()


def pointer(array: Any) -> int:
    """Where the first number of an array is in memory."""
    if isinstance(array, torch.Tensor):
        return array.data_ptr()
    return array.ctypes.data if isinstance(array, np.ndarray) else array.unsafe_buffer_pointer()


def random_tensor(name: str, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """Random bits, so that NaN, infinities and the smallest numbers are among them."""
    dtype = getattr(torch, name)
    count = int(np.prod(shape, dtype=np.int64))
    drawn = np.random.default_rng(seed).integers(0, 2 if name == "bool" else 256, count * dtype.itemsize, np.uint8)
    return torch.from_numpy(drawn).view(dtype).reshape(shape).clone() if count else torch.zeros(shape, dtype=dtype)


LAYOUTS = {
    "as it is": lambda x: x,
    "transposed": lambda x: x.movedim(0, -1) if x.dim() else x,
    "strided": lambda x: x[..., ::2] if x.dim() else x,
    "offset": lambda x: x[1:] if x.dim() and x.shape[0] else x,
    "expanded": lambda x: x.unsqueeze(0).expand(3, *x.shape),
    "conjugated": lambda x: x.conj(),
    "negated": lambda x: x.conj().imag if x.is_complex() else x,
    "in a graph": lambda x: x.requires_grad_() if x.dtype in (torch.float32, torch.float64, torch.complex64) else x,
    "a parameter": lambda x: torch.nn.Parameter(x, requires_grad=False),
}
NUMPY_LAYOUTS = {
    "as it is": lambda x: x,
    "reversed": lambda x: x[::-1] if x.ndim else x,
    "transposed": lambda x: x.T,
    "big-endian": lambda x: x.astype(x.dtype.newbyteorder(">")) if x.dtype.name in NUMPY_HAS else x,
    "broadcast": lambda x: np.broadcast_to(x, (2, *x.shape)),
    "read-only": lambda x: _read_only(x.copy()),
    "a field of records": lambda x: _field(x),
    "memory of another class": lambda x: x.view(np.memmap) if x.ndim else x,
}
shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)


def _read_only(array: np.ndarray) -> np.ndarray:
    array.flags.writeable = False
    return array


def _field(array: np.ndarray) -> np.ndarray:
    records = np.zeros(array.shape, [("a", np.int8), ("b", array.dtype)])
    records["b"] = array
    return records["b"]


# --- there and back --------------------------------------------------------------------------------------------------


@given(name=st.sampled_from(NAMES), shape=shapes, layout=st.sampled_from(list(LAYOUTS)), copy=st.sampled_from([None, True]))
def test_tensors_to_numpy_and_back(name, shape, layout, copy):
    tensor = LAYOUTS[layout](random_tensor(name, shape))
    array = to_numpy(tensor, copy=copy)
    assert type(array) is np.ndarray
    assert bits(array) == bits(tensor)
    back = from_numpy(array, copy=copy)
    assert bits(back) == bits(tensor)
    assert not back.requires_grad


@needs_jax
@given(name=st.sampled_from(NAMES), shape=shapes, layout=st.sampled_from(list(LAYOUTS)), copy=st.sampled_from([None, True]))
def test_tensors_to_jax_and_back(name, shape, layout, copy):
    tensor = LAYOUTS[layout](random_tensor(name, shape))
    with x64():
        array = to_jax(tensor, copy=copy)
        assert isinstance(array, jax.Array)
        assert bits(array) == bits(tensor)
        assert bits(to_numpy(array, copy=copy)) == bits(tensor)
        back = from_jax(array, copy=copy)
    assert bits(back) == bits(tensor)
    assert not back.requires_grad


@pytest.mark.parametrize("way", [to_numpy, pytest.param(to_jax, marks=needs_jax)])
@pytest.mark.parametrize("copy", [None, True])
def test_conjugates_and_negatives_that_are_not_computed_yet(way, copy):
    tensor = random_tensor("complex64", (2, 3))
    for view in (tensor.conj(), tensor.conj().imag, tensor.conj().imag.T, tensor.mH):
        assert view.is_conj() or view.is_neg()
        assert bits(way(view, copy=copy)) == bits(view)


@settings(max_examples=60)
@given(name=st.sampled_from(NAMES), shape=shapes, layout=st.sampled_from(list(NUMPY_LAYOUTS)), copy=st.sampled_from([None, True]))
def test_numpy_arrays_of_every_layout(name, shape, layout, copy):
    array = NUMPY_LAYOUTS[layout](to_numpy(random_tensor(name, shape)))
    tensor = from_numpy(array, copy=copy)
    assert bits(tensor) == bits(array)
    if HAS_JAX:
        with x64():
            assert bits(to_jax(array, copy=copy)) == bits(array)
            assert bits(from_jax(array, copy=copy)) == bits(array)


@needs_jax
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(), (0,), (2, 0, 3), (5,)])
def test_arrays_that_jax_made(name, shape):
    with x64():
        array = jnp.asarray(to_numpy(random_tensor(name, shape)))
        assert bits(from_jax(array)) == bits(array)
        assert bits(to_numpy(array)) == bits(array)
        assert from_jax(array).dtype is getattr(torch, name)
        assert bits(from_jax(array.T[::-1] if shape else array)) == bits(array.T[::-1] if shape else array)


def test_numpy_numbers_become_tensors_without_axes():
    found = from_numpy({"a": np.float32(1.5), "b": np.int8(3), "c": np.bool_(True)})
    assert found == {"a": torch.tensor(1.5), "b": torch.tensor(3, dtype=torch.int8), "c": torch.tensor(True)}
    assert found["b"].dtype is torch.int8 and found["a"].shape == ()
    assert to_numpy(np.float32(1.5)) == np.float32(1.5)


@needs_jax
def test_numpy_numbers_become_jax_arrays():
    found = to_jax(np.float32(1.5))
    assert isinstance(found, jax.Array) and found.shape == () and not found.weak_type


# --- trees -----------------------------------------------------------------------------------------------------------


def values_like(leaf):
    nodes = {"b": (leaf, None, [leaf]), "a": Pair(Tagged(leaf, "t"), 3), "empty": ()}
    return {**nodes, "text": "sum", "f": len, "n": 1.5, "none": None}


@pytest.mark.parametrize("way", EVERY_WAY)
def test_the_structure_stays_and_so_does_what_is_no_array(way):
    found = way(values_like(torch.ones(2) if way in (to_jax, to_numpy) else np.ones(2, np.float32)))
    expected = way(torch.ones(2) if way in (to_jax, to_numpy) else np.ones(2, np.float32))
    assert tree.structure(found) == tree.structure(values_like(0))
    assert type(found["a"]) is Pair and type(found["a"].first) is Tagged and found["a"].first.tag == "t"
    assert found["text"] == "sum" and found["f"] is len and type(found["n"]) is float and found["a"].second == 3
    for leaf in (found["b"][0], found["b"][2][0], found["a"].first.value):
        assert type(leaf) is type(expected) and bits(leaf) == bits(expected)


def test_what_is_converted_already_stays_the_same_object():
    x, array = torch.ones(2), np.ones(2)
    assert from_jax(x) is x and from_numpy(x) is x and to_numpy(array) is array
    assert from_numpy(x, copy=True) is not x and to_numpy(array, copy=True) is not array
    if HAS_JAX:
        theirs = jnp.ones(2)
        assert to_jax(theirs) is theirs
        assert pointer(to_jax(theirs, copy=True)) != pointer(theirs)


@needs_jax
def test_nodes_that_only_jax_knows_are_looked_into():
    @jax.tree_util.register_pytree_with_keys_class
    class Box:
        def __init__(self, inside):
            self.inside = inside

        def tree_flatten_with_keys(self):
            return [(jax.tree_util.GetAttrKey("inside"), self.inside)], None

        @classmethod
        def tree_unflatten(cls, _, children):
            return cls(*children)

    found = from_jax({"box": Box({"x": jnp.ones(2), "t": Tagged(jnp.zeros(1))})})["box"]
    assert type(found) is Box and type(found.inside["x"]) is torch.Tensor and type(found.inside["t"].value) is torch.Tensor
    assert type(to_numpy(Box(jnp.ones(2))).inside) is np.ndarray
    with pytest.raises(InputTypeError, match=r"to_numpy: tree\['a'\]\.inside\['x'\] is a masked|is on the meta device"):
        to_numpy({"a": Box({"x": torch.zeros(2, device="meta")})})


# --- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_numpy_and_tensors_share_memory(name):
    tensor = random_tensor(name, (4, 6))
    for view in (tensor, tensor.T, tensor[1:, ::2], tensor[0, 0], tensor[:1].expand(3, 6)):
        array = to_numpy(view, copy=False)
        assert pointer(array) == pointer(view) and bits(array) == bits(view)
        if name in NUMPY_HAS:
            back = from_numpy(array, copy=False)
            assert pointer(back) == pointer(view) and back.stride() == view.stride()
        assert pointer(to_numpy(view, copy=True)) != pointer(view) != pointer(from_numpy(array, copy=True))


def test_a_write_is_seen_on_the_other_side():
    tensor = torch.zeros(3)
    to_numpy(tensor)[0] = 1
    array = np.zeros(3)
    from_numpy(array)[1] = 2
    assert tensor.tolist() == [1, 0, 0] and array.tolist() == [0, 2, 0]
    to_numpy(tensor, copy=True)[0] = 5
    from_numpy(array, copy=True)[1] = 5
    assert tensor.tolist() == [1, 0, 0] and array.tolist() == [0, 2, 0]


def test_read_only_arrays_are_copied_so_that_nobody_writes_into_them():
    array = _read_only(np.zeros(3))
    from_numpy(array)[0] = 1
    from_numpy(np.broadcast_to(np.float32(0), (3,)))[0] = 1
    assert array.tolist() == [0, 0, 0]


@needs_jax
@pytest.mark.parametrize("name", NAMES)
def test_jax_and_tensors_share_memory(name):
    tensor = random_tensor(name, (4, 6))
    with x64():
        array = to_jax(tensor, copy=False)
        assert pointer(array) == pointer(tensor)
        back = from_jax(array, copy=False)
        assert pointer(back) == pointer(tensor)
        assert pointer(to_numpy(array, copy=False)) == pointer(tensor)
        assert len({pointer(tensor), pointer(to_jax(tensor, copy=True)), pointer(from_jax(array, copy=True))}) == 3
        assert pointer(to_numpy(array, copy=True)) != pointer(tensor)


@needs_jax
def test_shared_memory_outlives_its_first_owner():
    found = [from_jax(to_jax(torch.full((1000,), float(i)))) for i in range(20)]
    arrays = [to_jax(torch.full((1000,), float(i))) for i in range(20)]
    assert [x[999].item() for x in found] == [float(x[999]) for x in arrays] == list(range(20))


@needs_jax
def test_a_copy_for_jax_is_made_before_the_call_returns():
    for copy in (None, True):
        tensor = torch.zeros(2**20)[1:]  # not at a multiple of 64, so that None copies too
        array = to_jax(tensor, copy=copy)
        tensor.fill_(1)
        assert not array.any()


@needs_jax
def test_empty_tensors_count_as_shared():
    assert to_jax(torch.zeros(0, 3), copy=False).shape == (0, 3)
    assert from_jax(jnp.zeros((0, 3)), copy=False).shape == (0, 3)
    assert to_numpy(jnp.zeros((0, 3)), copy=False).shape == (0, 3)


@needs_jax
def test_arrays_are_not_tied_to_a_device():
    """Those that are cannot be combined with arrays on another."""
    assert not to_jax(torch.zeros(64)).committed


ONLY_ALIGNED = "JAX shares contiguous memory at an address that is a multiple of 64 only"
NOT_SHARED = {
    "reversed": (from_numpy, lambda: np.zeros(3)[::-1], "float64[3], and copy is False, but it has negative strides"),
    "read-only": (from_numpy, lambda: _read_only(np.zeros(3)), "the array is read-only, and a tensor is not"),
    "big-endian": (from_numpy, lambda: np.zeros(3, ">f4"), "its bytes are in the other order"),
    "records": (from_numpy, lambda: _field(np.zeros(3)), "its strides are no multiples of the size of a number"),
    "number": (from_numpy, lambda: np.float32(0), "a NumPy number has no memory that can be shared"),
    "conjugate": (to_numpy, lambda: torch.zeros(2, dtype=torch.complex64).conj(), "its conjugate is not computed yet"),
    "negative": (to_numpy, lambda: torch.zeros(2, dtype=torch.complex64).conj().imag, "its negative is not computed yet"),
    "transposed": (to_jax, lambda: torch.zeros(3, 4).T, ONLY_ALIGNED),
    "offset": (to_jax, lambda: torch.zeros(30)[1:], ONLY_ALIGNED),
    "swapped": (to_jax, lambda: np.zeros(3, ">f4"), "its bytes are in the other order"),
}


@pytest.mark.parametrize("case", NOT_SHARED)
def test_copy_false_refuses_to_copy(case):
    way, make, text = NOT_SHARED[case]
    if way is to_jax:
        pytest.importorskip("jax")
    with pytest.raises(UnsupportedOperationError) as error:
        way({"x": make()}, copy=False)
    assert str(error.value).startswith(f"{way.__name__}: tree['x'] is ")
    assert text in str(error.value)
    assert str(error.value).endswith(". Say copy=None or copy=True.")


# --- 64-bit numbers --------------------------------------------------------------------------------------------------


@needs_jax
@pytest.mark.parametrize("name", ["int64", "uint64", "float64", "complex128"])
@pytest.mark.parametrize("library", ["torch", "numpy"])
def test_64_bit_numbers_are_not_narrowed_silently(name, library):
    value = torch.ones(3, dtype=getattr(torch, name))
    value = value if library == "torch" else value.numpy()
    narrow = {"int64": "int32", "uint64": "uint32", "float64": "float32", "complex128": "complex64"}[name]
    with x64(False):
        with pytest.raises(InputTypeError) as error:
            to_jax([value])
        assert str(error.value) == (
            f"to_jax: tree[0] is {name}[3], but JAX has no 64-bit numbers while jax_enable_x64 is off: it would make {narrow} of "
            "it. Turn them on with jax.config.update('jax_enable_x64', True), or for a while with "
            f"jax.experimental.enable_x64(); or say narrow=True for {narrow}."
        )
        for how in (True, "exact"):
            found = to_jax(value, narrow=how)
            assert found.dtype == narrow and found.tolist() == [1, 1, 1]
        with pytest.raises(UnsupportedOperationError, match=r"jax_enable_x64 is off"):
            to_jax(value, narrow=True, copy=False)
    with x64():
        assert to_jax(value).dtype == name


@needs_jax
def test_what_is_narrowed_fits():
    third, big = torch.tensor([1 / 3, float("nan")], dtype=torch.float64), torch.tensor([2**31])
    with x64(False):
        assert to_jax(third, narrow=True).tolist()[0] == float(np.float32(1 / 3))
        assert np.isnan(to_jax(torch.tensor([float("nan")], dtype=torch.float64), narrow="exact")[0])
        for value, how in ((third, "exact"), (big, True), (big, "exact"), (torch.tensor([-1]).to(torch.uint64), True)):
            with pytest.raises(InputTypeError, match=r"not all of its numbers are numbers of (u?int|float)32, the type that JAX"):
                to_jax(value, narrow=how)
        assert to_jax(-big, narrow=True).tolist() == [-(2**31)]


# --- keys ------------------------------------------------------------------------------------------------------------


@needs_jax
def test_keys_are_the_same_keys_in_both():
    ours, theirs = random.split(random.key(7), 3), jax.random.split(jax.random.key(7), 3)
    there, back = to_jax({"k": ours})["k"], from_jax({"k": theirs})["k"]
    assert jnp.issubdtype(there.dtype, jax.dtypes.prng_key) and there.shape == (3,)
    assert type(back) is random.Key and bool((back == ours).all())
    assert bits(jax.random.key_data(there)) == bits(jax.random.key_data(theirs))
    drawn = from_jax(jax.random.uniform(there[1], (4,)))
    torch.testing.assert_close(random.uniform(back[1], (4,)), drawn, rtol=0, atol=0)
    same, copied = from_jax(ours), from_jax(ours, copy=True)
    assert same is ours and bool((copied == ours).all()) and copied.first.data_ptr() != ours.first.data_ptr()
    for words in (to_numpy(ours), to_numpy(theirs)):
        assert words.dtype == np.uint32 and words.shape == (3, 2) and bits(words) == bits(random.key_data(ours))


@needs_jax
def test_keys_that_would_give_other_numbers_are_refused():
    with pytest.raises(UnsupportedOperationError, match=r"partitionable=False, but JAX would draw other numbers from it"):
        to_jax(random.key(0, partitionable=False))
    with pytest.raises(InputTypeError, match=r"tree is a key of JAX's generator rbg, which torchbatch does not have"):
        from_jax(jax.random.key(0, impl="rbg"))
    assert to_numpy(jax.random.key(0, impl="rbg")).shape == (4,)


# --- what cannot be converted ----------------------------------------------------------------------------------------


def half_complex():
    return torch.zeros(2, dtype=torch.complex32)


def quantized():
    return torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.quint8)


class Foreign:
    def __array__(self, *args, **kwargs):
        return np.zeros(2)


TENSORS = {
    "sparse": (lambda: torch.eye(2).to_sparse(), "is sparse. Convert tensor.to_dense()."),
    "nested": (lambda: torch.nested.nested_tensor([torch.ones(2)]), "is a nested tensor. Convert its parts, tensor.unbind()."),
    "quantized": (quantized, "is quantized. Convert tensor.dequantize(), or tensor.int_repr()."),
    "meta": (lambda: torch.zeros(2, device="meta"), "is on the meta device, and has no numbers."),
    "lazy": (
        lambda: torch.nn.LazyLinear(2).weight,
        "is a lazy parameter, which has no numbers yet. Call its module once before.",
    ),
    "complex32": (
        half_complex,
        "is complex32[2], a type that NumPy or JAX does not have. Convert it before: tensor.to(dtype).",
    ),
    "module": (
        lambda: torch.nn.Linear(1, 1),
        "is a module of type Linear. Pass its parameters and buffers: state_dict_to_jax(module) makes a JAX tree of them, and "
        "module.state_dict() is a dict.",
    ),
    "foreign": (
        Foreign,
        "is an array of type Foreign, which is neither PyTorch's, NumPy's nor JAX's. Make it one of theirs before, with "
        "numpy.asarray, say.",
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", TENSORS)
@pytest.mark.parametrize("way", [to_numpy, pytest.param(to_jax, marks=needs_jax)])
def test_tensors_without_a_counterpart(case, way):
    make, text = TENSORS[case]
    with pytest.raises(InputTypeError) as error:
        way(("fine", {"x": make()}))
    assert str(error.value) == f"{way.__name__}: tree[1]['x'] {text}"


ARRAYS = {
    "strings": (lambda: np.array(["a"]), "<U1|str32"),
    "objects": (lambda: np.array([None]), "object"),
    "dates": (lambda: np.zeros(1, "M8[s]"), r"datetime64\[s\]"),
    "records": (lambda: np.zeros(1, [("a", "f4")]), "void|a"),
    "long doubles": (lambda: np.zeros(1, np.longdouble), "float128|longdouble"),
}


@pytest.mark.skipif(np.dtype(np.longdouble).itemsize == 8, reason="long doubles are doubles here")
@pytest.mark.parametrize("case", ARRAYS)
@pytest.mark.parametrize(
    ("way", "library"), [(from_numpy, "PyTorch"), (from_jax, "PyTorch"), pytest.param(to_jax, "JAX", marks=needs_jax)]
)
def test_numpy_arrays_without_a_counterpart(case, way, library):
    make, _ = ARRAYS[case]
    with pytest.raises(InputTypeError) as error:
        way({"x": make()})
    assert str(error.value).startswith(f"{way.__name__}: tree['x'] is {make().dtype}[1], a type that {library} does not have. ")


@pytest.mark.parametrize("way", [from_numpy, from_jax, pytest.param(to_jax, marks=needs_jax)])
def test_a_mask_is_not_dropped(way):
    with pytest.raises(InputTypeError, match=r"tree is a masked array\. Convert array\.filled\(value\), or its data and"):
        way(np.ma.masked_array([1.0, 2.0], [True, False]))


@pytest.mark.parametrize("way", [to_numpy, pytest.param(to_jax, marks=needs_jax)])
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=needs_ml_dtypes)])
@pytest.mark.parametrize(
    "transform",
    [torchbatch.vmap, torchbatch.grad, torch.func.vmap, torch.func.grad, lambda f: torchbatch.jit(f, backend="eager")],
    ids=["vmap", "grad", "torch.func.vmap", "torch.func.grad", "jit"],
)
def test_values_inside_a_transform_have_no_numbers(way, dtype, transform):
    with pytest.raises(InputTypeError, match=r"tree\['x'\] is (float32|bfloat16)\[\d,?4?\] without memory of its own: a value "):
        transform(lambda x: way({"x": x}))(torch.ones(3, 4, dtype=dtype))


@needs_jax
@pytest.mark.parametrize("way", [to_numpy, from_jax])
@pytest.mark.parametrize("transform", ["jit", "vmap", "grad"])
def test_jax_values_inside_a_transform_have_no_numbers(way, transform):
    with pytest.raises(InputTypeError, match=r"tree\['x'\] is float32\[.*\] without numbers: a value inside jax\.jit, jax\.grad"):
        getattr(jax, transform)(lambda x: way({"x": x}))(jnp.ones(3))


@needs_jax
def test_other_jax_arrays_without_a_counterpart():
    array = jnp.ones(3) + 1
    array.delete()
    for way in (from_jax, to_numpy):
        with pytest.raises(InputTypeError, match=r"tree is float32\[3\] and was deleted: it was donated to a function"):
            way(array)
    with pytest.raises(InputTypeError, match=r"tree is int4\[2\], a type that PyTorch does not have\. Convert it before"):
        from_jax(jnp.zeros(2, jnp.int4))


@needs_jax
def test_arrays_on_several_devices_are_copied_or_refused():
    code = """
import jax, numpy as np, torch
from torchbatch.testing.interchange import from_jax, to_numpy
from torchbatch.errors import UnsupportedOperationError
mesh = jax.sharding.Mesh(np.array(jax.devices()), "i")
there = jax.device_put(np.arange(8.0, dtype="float32"), jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("i")))
print(len(there.devices()), from_jax(there).tolist() == to_numpy(there).tolist() == list(range(8)))
for way in (from_jax, to_numpy):
    try:
        way(there, copy=False)
    except UnsupportedOperationError as error:
        print("refused")
"""
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**_environment(), **flags})
    assert done.stdout.split("\n")[:3] == ["2 True", "refused", "refused"], done.stderr


def _environment():
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}


@needs_jax
def test_derivatives_of_integers_are_bools_as_in_torchbatch():
    theirs = jax.grad(lambda n: 1.0, allow_int=True)(jnp.arange(3))
    ours = torchbatch.grad(lambda n: n.sum() * 1.0, allow_int=True)(torch.arange(3))
    assert bits(from_jax({"g": theirs})["g"]) == bits(ours)
    assert to_jax(theirs) is theirs and to_numpy(theirs) is theirs


@needs_jax
@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("copy", [None, True])
def test_tensors_on_a_gpu(copy):
    tensor = torch.randn(4, 6, device="cuda")
    assert bits(to_numpy(tensor, copy=copy)) == bits(tensor.cpu())
    with pytest.raises(UnsupportedOperationError, match=r"copy is False, but it is on a GPU"):
        to_numpy(tensor, copy=False)
    if jax.default_backend() != "gpu":
        with pytest.raises(InputTypeError, match=r"on cuda:0, but JAX cannot use it there"):
            to_jax(tensor)
        return
    for view in (tensor, tensor.T, tensor[:, ::2], tensor.bfloat16(), tensor + 1j, tensor > 0):
        array = to_jax(view, copy=copy)
        assert bits(array) == bits(view.cpu()) and bits(from_jax(array, copy=copy).cpu()) == bits(view.cpu())
    assert (pointer(to_jax(tensor, copy=copy)) == tensor.data_ptr()) is (copy is None)


# --- options, and what is not installed ------------------------------------------------------------------------------


@pytest.mark.parametrize("way", EVERY_WAY)
def test_wrong_options(way):
    with pytest.raises(AxisSpecError, match=rf"{way.__name__}: copy must be True, False or None, but it is 'no' of type str\."):
        way(torch.ones(1), copy="no")


@needs_jax
def test_wrong_narrow():
    with pytest.raises(AxisSpecError, match=r"to_jax: narrow must be True, False or 'exact', but it is 'yes'\."):
        to_jax(torch.ones(1), narrow="yes")


def test_without_jax(monkeypatch):
    monkeypatch.setitem(sys.modules, "jax", None)
    with pytest.raises(ImportError) as error:
        to_jax(torch.ones(1))
    assert str(error.value) == "to_jax needs JAX, which is not installed: pip install 'torchbatch[jax]'."
    assert from_jax([np.ones(1), "a"])[0].tolist() == [1]
    assert to_numpy([torch.ones(1), len])[0].tolist() == [1]


def test_without_ml_dtypes(monkeypatch):
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    with pytest.raises(ImportError) as error:
        to_numpy([torch.ones(2, dtype=torch.bfloat16)])
    assert str(error.value) == (
        "to_numpy: tree[0] is bfloat16[2], a type that NumPy has by the package ml_dtypes, which is not installed: "
        "pip install 'torchbatch[jax]', which brings it, or convert to float32 before."
    )


def test_importing_it_imports_no_jax():
    code = "import sys; import torchbatch.testing.interchange, torchbatch.testing.state_dicts, torchbatch.testing.precision\n"
    code += "torchbatch.testing.precision.precision_policy(); torchbatch.testing.interchange.from_numpy({'a': [1, 'b']})\n"
    code += "print([name for name in ('jax', 'ml_dtypes', 'torch._dynamo', 'hypothesis') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=_environment())
    assert done.stdout == "[]\n", done.stderr
