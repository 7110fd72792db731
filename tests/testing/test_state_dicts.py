"""State dicts as JAX trees and back: exact in both layouts, Flax's names and axes, and errors that list all that is wrong."""

from __future__ import annotations

import collections
import contextlib
import sys
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch import nn

from torchbatch.errors import AxisError, AxisSpecError, InputTypeError, UnsupportedOperationError
from torchbatch.testing.flax_layout import ParameterRule
from torchbatch.testing.state_dicts import state_dict_from_jax, state_dict_to_jax

jax = pytest.importorskip("jax")
jnp = pytest.importorskip("jax.numpy")


@contextlib.contextmanager
def x64(on: bool):
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", on)
    try:
        yield
    finally:
        jax.config.update("jax_enable_x64", before)


class Own(nn.Module):
    """A parameter, buffers and an extra state of its own, beside a layer."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.randn(3))
        self.register_buffer("steps", torch.tensor(7))
        self.register_buffer("gone", torch.ones(2), persistent=False)
        self.dense = nn.Linear(3, 3)

    def get_extra_state(self):
        return {"any": "thing"}

    def set_extra_state(self, state):
        pass


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.dense = nn.Linear(3, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight


class Nest(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(2, 2), nn.ModuleList([nn.Linear(2, 2)])])
        self.heads = nn.ModuleDict({"a": nn.Linear(2, 1), "b": nn.Sequential(nn.ReLU(), nn.Linear(2, 1))})
        self.weights = nn.ParameterList([torch.ones(2), torch.zeros(1)])
        self.named = nn.Sequential(collections.OrderedDict(first=nn.Linear(2, 2)))


def attention(**options):
    return nn.MultiheadAttention(6, 2, **options)


MODELS = {
    "Linear": lambda: nn.Linear(2, 3),
    "no bias": lambda: nn.Linear(2, 3, bias=False),
    "Conv1d": lambda: nn.Conv1d(2, 3, 4),
    "Conv2d": lambda: nn.Conv2d(4, 6, (1, 2), groups=2),
    "Conv3d": lambda: nn.Conv3d(2, 3, (1, 2, 3)),
    "ConvTranspose1d": lambda: nn.ConvTranspose1d(2, 3, 4),
    "ConvTranspose2d": lambda: nn.ConvTranspose2d(2, 3, (4, 5)),
    "ConvTranspose3d": lambda: nn.ConvTranspose3d(2, 3, (1, 2, 3)),
    "Embedding": lambda: nn.Embedding(5, 2),
    "LayerNorm": lambda: nn.LayerNorm((2, 3)),
    "GroupNorm": lambda: nn.GroupNorm(2, 4),
    "RMSNorm": lambda: nn.RMSNorm(3),
    "InstanceNorm2d": lambda: nn.InstanceNorm2d(3, affine=True),
    "BatchNorm1d": lambda: nn.BatchNorm1d(3),
    "BatchNorm without statistics": lambda: nn.BatchNorm3d(3, track_running_stats=False),
    "attention": attention,
    "attention without biases": lambda: attention(bias=False),
    "attention to other sizes": lambda: attention(kdim=3, vdim=5),
    "transformer": lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 8), 2, enable_nested_tensor=False),
    "own": Own,
    "tied": Tied,
    "nest": Nest,
    "sequential": lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3)),
    "nothing": nn.ReLU,
    "no numbers": lambda: nn.Linear(0, 2),
}
every_model = pytest.mark.parametrize("name", MODELS)


def shapes(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: tuple(leaf.shape), tree)


def assert_same_state(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert list(found) == list(expected)
    for name, entry in expected.items():
        if isinstance(entry, torch.Tensor):
            assert found[name].dtype is entry.dtype and found[name].shape == entry.shape, name
            assert torch.equal(found[name], entry), name
        else:
            assert found[name] == entry


# --- there and back --------------------------------------------------------------------------------------------------


@every_model
@pytest.mark.parametrize("layout", ["torch", "flax"])
@pytest.mark.parametrize("options", [{}, {"nested": False, "sep": "/"}, {"lists": True}, {"tied": "first"}], ids=str)
@pytest.mark.filterwarnings("ignore:Initializing zero-element")
def test_there_and_back_is_exact(name, layout, options):
    model = MODELS[name]()
    params = state_dict_to_jax(model, layout=layout, **options)
    back = state_dict_from_jax(params, model, layout=layout, sep=options.get("sep", "."))
    assert_same_state(back, model.state_dict())
    model.load_state_dict(back)


@every_model
@pytest.mark.filterwarnings("ignore:Initializing zero-element")
def test_other_numbers_come_back_as_they_are(name):
    """What comes back is what the tree holds, and not what the model had."""
    model, other = MODELS[name](), MODELS[name]()
    for layout in ("torch", "flax"):
        params = state_dict_to_jax(other, layout=layout)
        back = state_dict_from_jax(params, model, layout=layout)
        expected = other.state_dict()
        assert_same_state(back, expected)


@settings(max_examples=30)
@given(
    names=st.lists(st.text("ab01.", min_size=1, max_size=5), min_size=1, max_size=5, unique=True),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.complex64]),
    lists=st.booleans(),
    nested=st.booleans(),
)
def test_state_dicts_of_any_names(names, dtype, lists, nested):
    state = {name: torch.full((2, i), 1).to(dtype) for i, name in enumerate(names)}
    try:
        params = state_dict_to_jax(state, lists=lists, nested=nested, sep=".")
    except AxisError as error:
        assert "Use nested=False" in str(error)
        assert any(one != other and other.startswith(one + ".") for one in names for other in names)
        return
    assert_same_state(state_dict_from_jax(params, state), state)


def test_the_tree_has_a_dict_for_each_module():
    tree = state_dict_to_jax(MODELS["sequential"]())
    assert shapes(tree) == {
        "0": {"weight": (2, 1, 3, 3), "bias": (2,)},
        "1": {"weight": (2,), "bias": (2,), "running_mean": (2,), "running_var": (2,), "num_batches_tracked": ()},
        "4": {"weight": (3, 8), "bias": (3,)},
    }
    flat = state_dict_to_jax(MODELS["sequential"](), nested=False, sep="/")
    assert list(flat)[:2] == ["0/weight", "0/bias"] and all(isinstance(leaf, jax.Array) for leaf in flat.values())


def test_modules_numbered_from_0_become_lists_if_wanted():
    tree = state_dict_to_jax(nn.ModuleDict({"m": nn.ModuleList([nn.Linear(1, 1)] * 2), "s": MODELS["sequential"]()}), lists=True)
    assert isinstance(tree["m"], list) and len(tree["m"]) == 2
    assert list(tree["s"]) == ["0", "1", "4"]


def test_parameters_without_buffers():
    model = nn.BatchNorm1d(2)
    parameters = dict(model.named_parameters())
    tree = state_dict_to_jax(parameters)
    assert list(tree) == ["weight", "bias"]
    assert_same_state(state_dict_from_jax(tree, parameters), {k: v.detach() for k, v in parameters.items()})
    assert not state_dict_from_jax(tree, parameters)["weight"].requires_grad


def test_a_gradient_computed_in_jax_comes_back_as_a_state_dict():
    torch.manual_seed(0)
    model, x = nn.Linear(3, 2), torch.randn(5, 3)
    (model(x).tanh() ** 2).sum().backward()

    def loss(params, x):
        return (jnp.tanh(x @ params["weight"].T + params["bias"]) ** 2).sum()

    gradient = state_dict_from_jax(jax.grad(loss)(state_dict_to_jax(model), x.numpy()), model)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradient[name], parameter.grad)


# --- memory, dtypes, devices -----------------------------------------------------------------------------------------


def test_copies_unless_sharing_is_asked_for():
    model = nn.Linear(8, 8, bias=False)
    for options, shared in (({}, False), ({"copy": True}, False), ({"copy": None}, True), ({"copy": False}, True)):
        tree = state_dict_to_jax(model, **options)
        assert (tree["weight"].unsafe_buffer_pointer() == model.weight.data_ptr()) is shared
        back = state_dict_from_jax(tree, model, **options)
        assert (back["weight"].data_ptr() == tree["weight"].unsafe_buffer_pointer()) is shared
    own = state_dict_from_jax(state_dict_to_jax(nn.BatchNorm1d(2), layout="flax"), norm := nn.BatchNorm1d(2), layout="flax")
    assert own["num_batches_tracked"].data_ptr() != norm.num_batches_tracked.data_ptr()


def test_64_bit_counters_become_narrower_and_come_back():
    with x64(False):
        tree = state_dict_to_jax(Own())
        assert tree["steps"].dtype == "int32"
        assert state_dict_from_jax(tree, Own())["steps"].dtype is torch.int64
        model = nn.Linear(2, 3).double()  # whose numbers were made in float32
        assert_same_state(state_dict_from_jax(state_dict_to_jax(model), model), model.state_dict())
        nn.init.constant_(model.weight, 1 / 3)
        with pytest.raises(InputTypeError, match=r"tree\['weight'\]\[0\] is float64\[3,2\], and not all of its numbers are"):
            state_dict_to_jax(model)
        back = state_dict_from_jax(state_dict_to_jax(model, narrow=True), model)["weight"]
        assert torch.equal(back, model.weight.float().double())


def test_dtypes_that_would_lose_digits_are_refused():
    model = nn.Linear(2, 3).bfloat16()
    tree = jax.tree.map(lambda x: x.astype("float32"), state_dict_to_jax(model))
    with pytest.raises(AxisError) as error:
        state_dict_from_jax(tree, model)
    text = "is float32, but bfloat16 is expected, which would lose digits"
    assert str(error.value).splitlines()[1] == f"  dtypes: weight {text}; bias {text}"
    float8 = {"x": torch.zeros(2).to(torch.float8_e5m2)}
    with pytest.raises(AxisError, match=r"x is float8_e4m3fn, but float8_e5m2 is expected, which would lose digits"):
        state_dict_from_jax({"x": jnp.zeros(2, jnp.float8_e4m3fn)}, float8)
    assert state_dict_from_jax(state_dict_to_jax(float8), float8)["x"].dtype is torch.float8_e5m2


@pytest.mark.parametrize("layout", ["torch", "flax"])
def test_a_model_on_the_meta_device_says_what_is_wanted(layout):
    model = MODELS["transformer"]()
    with torch.device("meta"):
        empty = MODELS["transformer"]()
    back = state_dict_from_jax(state_dict_to_jax(model, layout=layout), empty, layout=layout)
    assert_same_state(back, model.state_dict())


def test_versions_of_modules_are_kept():
    model = nn.BatchNorm1d(2)
    back = state_dict_from_jax(state_dict_to_jax(model), model)
    assert back._metadata == model.state_dict()._metadata
    saved = model.state_dict()
    assert state_dict_from_jax(state_dict_to_jax(saved), saved)._metadata == saved._metadata
    assert_same_state(saved, model.state_dict())  # `like` itself is not changed


# --- Flax's layout ---------------------------------------------------------------------------------------------------

# What flax 0.12.8 makes for the same layers: jax.eval_shape(layer.init, …).
FLAX = {
    "Linear": {"params": {"kernel": (2, 3), "bias": (3,)}},
    "Conv1d": {"params": {"kernel": (4, 2, 3), "bias": (3,)}},
    "Conv2d": {"params": {"kernel": (1, 2, 2, 6), "bias": (6,)}},
    "Conv3d": {"params": {"kernel": (1, 2, 3, 2, 3), "bias": (3,)}},
    "ConvTranspose1d": {"params": {"kernel": (4, 3, 2), "bias": (3,)}},
    "ConvTranspose2d": {"params": {"kernel": (4, 5, 3, 2), "bias": (3,)}},
    "Embedding": {"params": {"embedding": (5, 2)}},
    "LayerNorm": {"params": {"scale": (2, 3), "bias": (2, 3)}},
    "GroupNorm": {"params": {"scale": (4,), "bias": (4,)}},
    "RMSNorm": {"params": {"scale": (3,)}},
    "BatchNorm1d": {"params": {"scale": (3,), "bias": (3,)}, "batch_stats": {"mean": (3,), "var": (3,)}},
    "attention": {
        "params": {
            **{part: {"kernel": (6, 2, 3), "bias": (2, 3)} for part in ("query", "key", "value")},
            "out": {"kernel": (2, 3, 6), "bias": (6,)},
        }
    },
    "attention to other sizes": {
        "params": {
            "query": {"kernel": (6, 2, 3), "bias": (2, 3)},
            "key": {"kernel": (3, 2, 3), "bias": (2, 3)},
            "value": {"kernel": (5, 2, 3), "bias": (2, 3)},
            "out": {"kernel": (2, 3, 6), "bias": (6,)},
        }
    },
    "own": {"params": {"scale": (3,), "dense": {"kernel": (3, 3), "bias": (3,)}}, "buffers": {"steps": ()}},
    "nest": {
        "params": {
            "blocks_0": {"kernel": (2, 2), "bias": (2,)},
            "blocks_1_0": {"kernel": (2, 2), "bias": (2,)},
            "heads_a": {"kernel": (2, 1), "bias": (1,)},
            "heads_b": {"layers_1": {"kernel": (2, 1), "bias": (1,)}},
            "weights_0": (2,),
            "weights_1": (1,),
            "named": {"first": {"kernel": (2, 2), "bias": (2,)}},
        }
    },
    "sequential": {
        "params": {
            "layers_0": {"kernel": (3, 3, 1, 2), "bias": (2,)},
            "layers_1": {"scale": (2,), "bias": (2,)},
            "layers_4": {"kernel": (8, 3), "bias": (3,)},
        },
        "batch_stats": {"layers_1": {"mean": (2,), "var": (2,)}},
    },
    "nothing": {},
}


@pytest.mark.parametrize("name", FLAX)
def test_names_and_shapes_of_flax(name):
    assert shapes(state_dict_to_jax(MODELS[name](), layout="flax")) == FLAX[name]


def test_kernels_compute_what_the_layers_do():
    """In plain JAX, with the formulas of Flax's layers."""
    torch.manual_seed(1)
    dense, x = nn.Linear(3, 2), torch.randn(4, 3)
    variables = state_dict_to_jax(dense, layout="flax")["params"]
    np.testing.assert_allclose(x.numpy() @ variables["kernel"] + variables["bias"], dense(x).detach(), rtol=1e-5)

    conv, image = nn.Conv2d(4, 6, (2, 3), groups=2, padding=1), torch.randn(1, 4, 5, 5)
    kernel = state_dict_to_jax(conv, layout="flax")["params"]["kernel"]
    dims = ("NHWC", "HWIO", "NHWC")
    out = jax.lax.conv_general_dilated(
        image.movedim(1, -1).numpy(), kernel, (1, 1), [(1, 1)] * 2, dimension_numbers=dims, feature_group_count=2
    )
    expected = (conv(image) - conv.bias[:, None, None]).detach().movedim(1, -1)
    np.testing.assert_allclose(out, expected, atol=1e-5)

    up = nn.ConvTranspose2d(4, 3, (2, 3), stride=2)
    kernel = state_dict_to_jax(up, layout="flax")["params"]["kernel"]
    out = jax.lax.conv_transpose(
        image.movedim(1, -1).numpy(), kernel, (2, 2), "VALID", dimension_numbers=dims, transpose_kernel=True
    )
    expected = (up(image) - up.bias[:, None, None]).detach().movedim(1, -1)
    np.testing.assert_allclose(out, expected, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"kdim": 3, "vdim": 5}, {"bias": False}], ids=str)
def test_attention_computes_what_the_layer_does(options):
    torch.manual_seed(2)
    layer = attention(batch_first=True, **options).eval()
    query, key, value = torch.randn(1, 4, 6), torch.randn(1, 5, layer.kdim), torch.randn(1, 5, layer.vdim)
    for name, entry in layer.named_parameters():
        if "bias" in name:
            nn.init.normal_(entry)
    params = state_dict_to_jax(layer, layout="flax")["params"]

    def project(part, x):
        return jnp.einsum("bte,ehd->bthd", x.numpy(), params[part]["kernel"]) + params[part].get("bias", 0.0)

    q, k, v = project("query", query), project("key", key), project("value", value)
    weights = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) / jnp.sqrt(3.0))
    mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, v)
    out = jnp.einsum("bqhd,hde->bqe", mixed, params["out"]["kernel"]) + params["out"].get("bias", 0.0)
    np.testing.assert_allclose(out, layer(query, key, value, need_weights=False)[0].detach(), atol=1e-5)


class Scaled(nn.Linear):
    """A layer of one's own that is one of PyTorch's, and has one parameter more."""

    def __init__(self):
        super().__init__(2, 3)
        self.gain = nn.Parameter(torch.ones(3))


def test_a_subclass_goes_by_the_rule_of_its_class():
    tree = state_dict_to_jax(Scaled(), layout="flax")
    assert shapes(tree) == {"params": {"kernel": (2, 3), "bias": (3,), "gain": (3,)}}


def test_rules_of_ones_own():
    rules = {
        nn.Bilinear: {"weight": ParameterRule("inner/kernel", axes=(1, 2, 0)), "bias": None},
        Scaled: lambda module: {"gain": ParameterRule(f"gain{module.out_features}", collection="gains")},
    }
    model = nn.Sequential(nn.Bilinear(2, 3, 4), Scaled())
    tree = state_dict_to_jax(model, layout="flax", rules=rules)
    assert shapes(tree) == {
        "params": {"layers_0": {"inner": {"kernel": (2, 3, 4)}}, "layers_1": {"weight": (3, 2), "bias": (3,)}},
        "gains": {"layers_1": {"gain3": (3,)}},
    }
    assert_same_state(state_dict_from_jax(tree, model, layout="flax", rules=rules), model.state_dict())


UNKNOWN = {
    "Bilinear": lambda: nn.Bilinear(2, 3, 4),
    "LSTM": lambda: nn.LSTM(2, 3),
    "PReLU": nn.PReLU,
    "InstanceNorm1d": lambda: nn.InstanceNorm1d(2, track_running_stats=True),
    "MultiheadAttention": lambda: attention(add_bias_kv=True),
    "ParametrizationList": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(2, 3)),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_layers_that_flax_does_not_have_are_refused(name):
    model = nn.Sequential(UNKNOWN[name]())
    with pytest.raises(UnsupportedOperationError) as error:
        state_dict_to_jax(model, layout="flax")
    text = str(error.value)
    assert text.startswith("layout='flax' has no rule for 0.") and f"belongs to a layer of type {name}. Give one, such as" in text
    assert f"rules={{{name}: {{'" in text
    assert_same_state(state_dict_from_jax(state_dict_to_jax(model), model), model.state_dict())


def test_transposed_convolutions_in_groups_are_refused():
    with pytest.raises(UnsupportedOperationError, match=r"Flax's ConvTranspose has no groups, but a ConvTranspose2d has 2\."):
        state_dict_to_jax(nn.ConvTranspose2d(2, 2, 3, groups=2), layout="flax")


def test_two_entries_for_one_place():
    model = nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(1, 1)]), "blocks_0": nn.Linear(1, 1)})
    model = nn.Sequential(model)  # within a dict at the top, names stay as they are
    with pytest.raises(AxisError, match=r"would both become params/layers_0_blocks_0/kernel\. Rename one of the modules\."):
        state_dict_to_jax(model, layout="flax")


# --- tied ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["torch", "flax"])
def test_a_tensor_with_two_names(layout):
    model = Tied()
    both, first = (state_dict_to_jax(model, layout=layout, tied=tied) for tied in ("all", "first"))
    assert len(jax.tree.leaves(both)) == len(jax.tree.leaves(first)) + 1
    assert "head" not in str(jax.tree_util.tree_structure(first))
    for saved in (model, model.state_dict()) if layout == "torch" else (model,):
        assert_same_state(state_dict_from_jax(first, saved, layout=layout), model.state_dict())
    changed = jax.tree.map(lambda x: x, both)
    (changed["embed"] if layout == "torch" else changed["params"]["embed"]).clear()
    assert_same_state(state_dict_from_jax(changed, model, layout=layout), model.state_dict())
    del (changed if layout == "torch" else changed["params"])["head"]
    with pytest.raises(AxisError, match=r"missing: (embed\.weight; head\.weight|params/embed/embedding; params/head/kernel)$"):
        state_dict_from_jax(changed, model, layout=layout)


def test_two_values_for_one_tensor():
    tree = state_dict_to_jax(Tied())
    tree["head"]["weight"] = tree["head"]["weight"] + 1
    with pytest.raises(AxisError, match=r"\n  tied: embed\.weight and head\.weight are one tensor in `like`, but differ$"):
        state_dict_from_jax(tree, Tied())
    nan = {"embed": {"weight": jnp.full((5, 3), jnp.nan)}, "dense": tree["dense"], "head": {"weight": jnp.full((5, 3), jnp.nan)}}
    assert state_dict_from_jax(nan, Tied())["head.weight"].isnan().all()


# --- what is wrong ---------------------------------------------------------------------------------------------------


def test_all_that_is_wrong_is_said_at_once():
    model = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3), attention())
    tree = state_dict_to_jax(model, layout="flax")
    params = tree["params"]
    params["layers_0"]["kernel"] = params["layers_0"]["kernel"].T
    params["layers_0"]["weight"] = params["layers_0"].pop("bias")
    params["layers_1"]["scale"] = params["layers_1"]["scale"].astype("complex64")
    del params["layers_2"]["key"]
    tree["cache"] = {"x": jnp.zeros(1)}
    with pytest.raises(AxisError) as error:
        state_dict_from_jax(tree, model, layout="flax")
    lines = str(error.value).splitlines()
    assert lines[0] == "state_dict_from_jax: the tree does not fit `like`."
    assert lines[1] == "  missing: params/layers_0/bias; params/layers_2/key/kernel; params/layers_2/key/bias"
    assert sorted(lines[2].removeprefix("  unexpected: ").split("; ")) == ["cache/x", "params/layers_0/weight"]
    assert lines[3] == "  shapes: params/layers_0/kernel is [3, 2], but [2, 3] is expected"
    assert lines[4] == "  dtypes: params/layers_1/scale is complex64, but float32 is expected, which would lose digits"


def test_the_layout_of_torch_names_its_entries():
    with pytest.raises(AxisError) as error:
        state_dict_from_jax({"0": {"weight": jnp.zeros((3, 2))}, "x": [jnp.zeros(1)]}, nn.Sequential(nn.Linear(2, 2)))
    assert str(error.value).splitlines()[1:] == [
        "  missing: 0.bias",
        "  unexpected: x.0",
        "  shapes: 0.weight is [3, 2], but [2, 2] is expected",
    ]


def test_leaves_that_are_no_arrays():
    with pytest.raises(InputTypeError, match=r"state_dict_from_jax: weight must be an array, but it is 'a' of type str\."):
        state_dict_from_jax({"weight": "a", "bias": jnp.zeros(3)}, nn.Linear(2, 3))


def test_numpy_arrays_and_tensors_are_taken_too():
    state = nn.Linear(2, 3).state_dict()
    assert_same_state(state_dict_from_jax({"weight": state["weight"].numpy(), "bias": state["bias"]}, state), state)


@pytest.mark.parametrize("who", [state_dict_to_jax, lambda like, **options: state_dict_from_jax({}, like, **options)])
def test_wrong_options(who):
    name = "state_dict_to_jax" if who is state_dict_to_jax else "state_dict_from_jax"
    model = nn.Linear(1, 1)
    with pytest.raises(AxisSpecError, match=rf"{name}: layout must be 'torch' or 'flax', but it is 'haiku'\."):
        who(model, layout="haiku")
    with pytest.raises(AxisSpecError, match=rf"{name}: rules are for layout='flax', but layout is 'torch'\."):
        who(model, rules={})
    with pytest.raises(InputTypeError, match=rf"{name}: layout='flax' depends on the kind of each layer, .* of type dict\."):
        who(dict(model.state_dict()), layout="flax")
    with pytest.raises(InputTypeError, match=rf"{name}: (source|like) must be a module or a state dict, but it is 3 of type"):
        who(3)
    with pytest.raises(InputTypeError, match=rf"{name}: the names of a state dict are strings, but one is 3\."):
        who({3: torch.ones(1)})
    with pytest.raises(InputTypeError, match=rf"{name}: weight has no shape yet: its module is lazy\. Call it once before\."):
        who(nn.LazyLinear(2))


def test_wrong_tied():
    with pytest.raises(AxisSpecError, match=r"state_dict_to_jax: tied must be 'all' or 'first', but it is 'last'\."):
        state_dict_to_jax(nn.Linear(1, 1), tied="last")


def test_an_entry_under_another():
    for names in (["a", "a.b"], ["a.b", "a"]):
        with pytest.raises(AxisError, match=r"Use nested=False\."):
            state_dict_to_jax({name: torch.ones(1) for name in names})
        assert list(state_dict_to_jax({name: torch.ones(1) for name in names}, nested=False)) == names


def test_without_jax(monkeypatch):
    monkeypatch.setitem(sys.modules, "jax", None)
    with pytest.raises(ImportError) as error:
        state_dict_to_jax(nn.Linear(1, 1))
    assert str(error.value) == "state_dict_to_jax needs JAX, which is not installed: pip install 'torchbatch[jax]'."
    state = nn.Linear(1, 1).state_dict()
    assert_same_state(state_dict_from_jax({k: v.numpy() for k, v in state.items()}, state), state)
