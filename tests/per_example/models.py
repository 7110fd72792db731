"""Model families, each as small as it can be, with a batch and what is known of their gradients.

A family is a function that makes a :class:`Case`, registered by its name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import torchbatch
from torchbatch import lax, vmap

Batch = tuple[torch.Tensor, ...]


@dataclasses.dataclass
class Case:
    """A model, a criterion and a batch; the options of the call."""

    model: nn.Module
    criterion: Callable[..., torch.Tensor] | None
    batch: tuple[Any, ...]
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    products: tuple[str, ...] = ()  # parameters whose gradients must be known as products
    made: dict[str, str] = dataclasses.field(default_factory=dict)  # parameters that must be made, and a word of why
    tolerance: float = 1e-10


FAMILIES: dict[str, Callable[[], Case]] = {}


def family(make: Callable[[], Case]) -> Callable[[], Case]:
    """Register a family under the name of its function."""
    FAMILIES[make.__name__] = make
    return make


def build(name: str) -> Case:
    """The case of a family, in double precision unless its tolerance says otherwise, the same every time."""
    torch.manual_seed(0)
    case = FAMILIES[name]()
    if case.tolerance < 1e-8:
        case.model.double()
        case.batch = tuple(_double(value) for value in case.batch)
    return case


def _double(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _double(item) for key, item in value.items()}
    return value.double() if value.dtype is torch.float32 else value


def _labels(count: int = 3, classes: int = 4) -> torch.Tensor:
    return torch.randint(classes, (count,))


class Function(nn.Module):
    """A module made of others and of a function of it and of the inputs."""

    def __init__(self, forward: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        self._function = forward
        for name, part in parts.items():
            if isinstance(part, torch.Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._function(self, *args, **kwargs)


def _parameter(*sizes: int, dtype: torch.dtype | None = None) -> nn.Parameter:
    return nn.Parameter(torch.randn(sizes, dtype=dtype) / 2)


# --- layers one after the other --------------------------------------------------------------------------------------


@family
def mlp() -> Case:
    model = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 4))
    return Case(model, F.cross_entropy, (torch.randn(3, 5), _labels()), products=("0.weight", "2.weight", "4.weight"))


@family
def mlp_on_tokens() -> Case:
    model = nn.Sequential(nn.Linear(5, 16), nn.GELU(), nn.Linear(16, 4), nn.Flatten())
    batch = torch.randn(3, 2, 5), torch.randn(3, 8)
    return Case(model, F.mse_loss, batch, products=("0.weight", "2.weight"))


@family
def cnn() -> Case:
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(3, 4, 3, stride=2), nn.ReLU(), nn.Flatten(),
        nn.Linear(4, 4),
    )  # fmt: skip
    return Case(model, F.cross_entropy, (torch.randn(3, 1, 6, 6), _labels()), products=("0.weight", "3.weight", "6.weight"))


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.a = nn.GroupNorm(2, width), nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.b = nn.Conv2d(width, width, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.b(F.relu(self.a(F.relu(self.norm(x)))))


@family
def resnet() -> Case:
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4))
    model = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), _Block(4), _Block(4), head)
    return Case(model, F.cross_entropy, (torch.randn(3, 2, 4, 4), _labels()), products=("1.a.weight", "2.b.weight", "3.2.weight"))


@family
def conv1d_dilated() -> Case:
    model = nn.Sequential(nn.Conv1d(2, 4, 3, dilation=2, padding=2), nn.Tanh(), nn.Conv1d(4, 4, 2, groups=2), nn.Flatten())
    return Case(model, F.mse_loss, (torch.randn(3, 2, 6), torch.randn(3, 20)), products=("0.weight", "2.weight"))


@family
def conv3d() -> Case:
    model = nn.Sequential(nn.Conv3d(1, 2, 2), nn.Flatten(), nn.Linear(16, 4))
    return Case(model, F.cross_entropy, (torch.randn(3, 1, 3, 3, 3), _labels()), products=("0.weight",))


@family
def conv_transposed() -> Case:
    model = nn.Sequential(
        nn.ConvTranspose2d(2, 4, 3, stride=2, groups=2, output_padding=1), nn.ReLU(), nn.ConvTranspose2d(4, 1, 2), nn.Flatten()
    )
    return Case(model, F.mse_loss, (torch.randn(3, 2, 2, 2), torch.randn(3, 49)), products=("0.weight", "2.weight"))


@family
def depthwise_separable() -> Case:
    model = nn.Sequential(nn.Conv2d(4, 4, 3, groups=4, padding="same"), nn.ReLU(), nn.Conv2d(4, 3, 1), nn.Flatten())
    return Case(model, F.mse_loss, (torch.randn(3, 4, 4, 4), torch.randn(3, 48)), products=("0.weight", "2.weight"))


@family
def conv_circular() -> Case:
    model = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1, padding_mode="circular"), nn.Flatten())
    return Case(model, F.mse_loss, (torch.randn(3, 1, 4, 4), torch.randn(3, 32)), products=("0.weight",))


@family
def norms_of_all_kinds() -> Case:
    model = nn.Sequential(
        nn.Conv1d(2, 4, 1), nn.InstanceNorm1d(4, affine=True), nn.GroupNorm(2, 4), nn.LayerNorm([4, 5]), nn.Flatten(),
        nn.RMSNorm(20), nn.Linear(20, 4),
    )  # fmt: skip
    batch = torch.randn(3, 2, 5), _labels()
    return Case(model, F.cross_entropy, batch, products=("0.weight", "6.weight"), made={"3.weight": "native_layer_norm_backward"})


@family
def batch_norm_in_eval_mode() -> Case:
    model = nn.Sequential(nn.Conv2d(1, 2, 2), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 4), nn.BatchNorm1d(4))
    model(torch.randn(7, 1, 3, 3))  # statistics
    return Case(model.eval(), F.cross_entropy, (torch.randn(3, 1, 3, 3), _labels()), products=("0.weight", "3.weight"))


# --- attention -------------------------------------------------------------------------------------------------------


@family
def transformer_encoder() -> Case:
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
    model = nn.Sequential(nn.TransformerEncoder(layer, 1, enable_nested_tensor=False), nn.Flatten(), nn.Linear(24, 4))
    names = "self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight", "linear2.weight"
    products = tuple(f"0.layers.0.{name}" for name in names)
    return Case(model, F.cross_entropy, (torch.randn(3, 3, 8), _labels()), products=(*products, "2.weight"))


@family
def transformer_decoder() -> Case:
    layer = nn.TransformerDecoderLayer(8, 2, 12, dropout=0.0, batch_first=True, norm_first=True, activation="gelu")

    def forward(self: Any, x: Any, memory: Any, padding: Any) -> Any:
        mask = torch.triu(torch.ones(x.shape[1], x.shape[1], dtype=torch.bool), 1)
        return self.layer(x, memory, tgt_mask=mask, memory_key_padding_mask=padding)

    padding = torch.tensor([[False, False, True], [False, False, False], [False, True, True]])
    batch = torch.randn(3, 4, 8), torch.randn(3, 3, 8), padding, torch.randn(3, 4, 8)
    products = "layer.self_attn.in_proj_weight", "layer.multihead_attn.out_proj.weight", "layer.linear1.weight"
    return Case(Function(forward, layer=layer), F.mse_loss, batch, products=products)


@family
def attention_with_other_widths() -> Case:
    attention = nn.MultiheadAttention(4, 2, kdim=3, vdim=5, batch_first=True, add_bias_kv=True)

    def forward(self: Any, q: Any, k: Any, v: Any) -> Any:
        return self.attention(q, k, v)[0]

    batch = torch.randn(3, 2, 4), torch.randn(3, 3, 3), torch.randn(3, 3, 5), torch.randn(3, 2, 4)
    products = "attention.q_proj_weight", "attention.k_proj_weight", "attention.v_proj_weight", "attention.out_proj.weight"
    return Case(Function(forward, attention=attention), F.mse_loss, batch, products=products, made={"attention.bias_k": "vector"})


@family
def encoder_in_eval_mode_with_a_new_head() -> Case:
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True).requires_grad_(False)
    model = nn.Sequential(nn.TransformerEncoder(layer, 1, enable_nested_tensor=False), nn.Flatten(), nn.Linear(24, 4)).eval()
    return Case(model, F.cross_entropy, (torch.randn(3, 3, 8), _labels()), products=("2.weight",))


@family
def attention_by_hand() -> Case:
    def forward(self: Any, x: Any) -> Any:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 2, 3)).movedim(-3, 0).transpose(2, 3)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(-2))

    parts = {"norm": nn.LayerNorm(6), "qkv": nn.Linear(6, 18, bias=False), "out": nn.Linear(6, 4)}
    batch = torch.randn(3, 4, 6), torch.randn(3, 4, 4)
    return Case(Function(forward, **parts), F.mse_loss, batch, products=("qkv.weight", "out.weight"))


@family
def vision_transformer() -> Case:
    layer = nn.TransformerEncoderLayer(8, 2, 8, dropout=0.0, batch_first=True, norm_first=True)

    def forward(self: Any, x: Any) -> Any:
        patches = self.patch(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.token.expand(len(x), -1, -1), patches], 1) + self.position
        return self.head(self.layer(tokens)[:, 0])

    parts = {"patch": nn.Conv2d(1, 8, 2, stride=2), "token": _parameter(1, 1, 8), "position": _parameter(1, 5, 8)}
    model = Function(forward, **parts, layer=layer, head=nn.Linear(8, 4))
    return Case(
        model, F.cross_entropy, (torch.randn(3, 1, 4, 4), _labels()),
        products=("patch.weight", "layer.linear1.weight", "head.weight"),
    )  # fmt: skip


# --- recurrent -------------------------------------------------------------------------------------------------------


def _text_classifier(network: nn.Module, width: int) -> Function:
    def forward(self: Any, tokens: Any) -> Any:
        return self.head(self.network(self.words(tokens))[0][:, -1])

    return Function(forward, words=nn.Embedding(7, 3), network=network, head=nn.Linear(width, 4))


@family
def lstm() -> Case:
    model = _text_classifier(nn.LSTM(3, 4, num_layers=2, bidirectional=True, batch_first=True), 8)
    names = "words.weight", "network.weight_ih_l0", "network.weight_hh_l0_reverse", "network.weight_ih_l1"
    return Case(model, F.cross_entropy, (torch.randint(7, (3, 2)), _labels()), products=names)


@family
def gru() -> Case:
    model = _text_classifier(nn.GRU(3, 4, batch_first=True), 4)
    return Case(model, F.cross_entropy, (torch.randint(7, (3, 3)), _labels()), products=("network.weight_ih_l0", "words.weight"))


@family
def rnn() -> Case:
    model = _text_classifier(nn.RNN(3, 4, batch_first=True, nonlinearity="relu"), 4)
    return Case(model, F.cross_entropy, (torch.randint(7, (3, 3)), _labels()), products=("network.weight_hh_l0",))


@family
def lstm_with_projection() -> Case:
    model = _text_classifier(nn.LSTM(3, 4, proj_size=2, batch_first=True), 2)
    return Case(model, F.cross_entropy, (torch.randint(7, (3, 3)), _labels()), products=("network.weight_hr_l0",))


@family
def lstm_cell_in_a_loop() -> Case:
    def forward(self: Any, x: Any) -> Any:
        state = x.new_zeros(len(x), 4), x.new_zeros(len(x), 4)
        for now in x.unbind(1):
            state = self.cell(now, state)
        return self.head(state[0])

    model = Function(forward, cell=nn.LSTMCell(2, 4), head=nn.Linear(4, 4))
    return Case(model, F.cross_entropy, (torch.randn(3, 4, 2), _labels()), products=("cell.weight_ih", "cell.weight_hh"))


# --- embeddings ------------------------------------------------------------------------------------------------------


@family
def language_model_with_tied_weights() -> Case:
    def forward(self: Any, tokens: Any) -> Any:
        return self.head(torch.tanh(self.mix(self.words(tokens)))).transpose(1, 2)

    model = Function(forward, words=nn.Embedding(30, 6), mix=nn.Linear(6, 6), head=nn.Linear(6, 30, bias=False))
    model.head.weight = model.words.weight
    batch = torch.randint(30, (3, 4)), torch.randint(30, (3, 4))
    return Case(model, F.cross_entropy, batch, products=("words.weight", "mix.weight"))


@family
def embedding_with_padding() -> Case:
    model = nn.Sequential(nn.Embedding(20, 3, padding_idx=1), nn.Flatten(), nn.Linear(15, 4))
    return Case(model, F.cross_entropy, (torch.randint(4, (3, 5)), _labels()), products=("0.weight",))


@family
def embedding_sparse() -> Case:
    model = nn.Sequential(nn.Embedding(20, 3, sparse=True), nn.Flatten(), nn.Linear(15, 4))
    return Case(model, F.cross_entropy, (torch.randint(4, (3, 5)), _labels()), products=("0.weight",))


@family
def embedding_by_frequency() -> Case:
    model = nn.Sequential(nn.Embedding(6, 3, scale_grad_by_freq=True), nn.Flatten(), nn.Linear(15, 4))
    return Case(model, F.cross_entropy, (torch.randint(3, (3, 5)), _labels()), made={"0.weight": "scale_grad_by_freq"})


@family
def embedding_bag() -> Case:
    model = nn.Sequential(nn.EmbeddingBag(20, 3, mode="mean"), nn.Linear(3, 4))
    return Case(model, F.cross_entropy, (torch.randint(5, (3, 5)), _labels()), products=("0.weight", "1.weight"))


@family
def rows_by_index() -> Case:
    def forward(self: Any, numbers: Any) -> Any:
        return self.table[numbers].sum(1)

    batch = torch.randint(-5, 5, (3, 3)), _labels()
    return Case(Function(forward, table=_parameter(30, 4)), F.cross_entropy, batch, products=("table",))


# --- parameters as they are ------------------------------------------------------------------------------------------


@family
def raw_parameters() -> Case:
    def forward(self: Any, x: Any) -> Any:
        mixed = torch.einsum("bi,oi->bo", x, self.w) + self.b
        return self.scale * torch.tanh(mixed) @ self.v + torch.einsum("bi,ijk,bj->bk", x, self.form, x)

    parts = {"w": _parameter(4, 3), "b": _parameter(4), "scale": _parameter(), "v": _parameter(4, 4), "form": _parameter(3, 3, 4)}
    return Case(Function(forward, **parts), F.cross_entropy, (torch.randn(3, 3), _labels()), products=("w", "v"))


@family
def outer_products_and_blocks() -> Case:
    def forward(self: Any, x: Any) -> Any:
        q, k, v = x @ self.packed[:4].T, x @ self.packed[4:8].T, x @ self.packed[8:].T
        return q * k + v + (torch.outer(self.left, self.right) * x.mean()).sum(0)

    parts = {"packed": _parameter(12, 3), "left": _parameter(2), "right": _parameter(4)}
    return Case(Function(forward, **parts), F.cross_entropy, (torch.randn(3, 3), _labels()), products=("packed",))


@family
def reused_layers() -> Case:
    linear, conv = nn.Linear(4, 4), nn.Conv1d(1, 1, 3, padding=1)

    def forward(self: Any, x: Any) -> Any:
        x = self.linear(torch.tanh(self.linear(x)))[:, None]
        return self.conv(torch.tanh(self.conv(x)))[:, 0]

    model = Function(forward, linear=linear, conv=conv)
    return Case(model, F.cross_entropy, (torch.randn(3, 4), _labels()), products=("linear.weight",))


@family
def bilinear() -> Case:
    def forward(self: Any, x: Any, z: Any) -> Any:
        return self.form(x, z)

    batch = torch.randn(3, 3), torch.randn(3, 2), _labels()
    return Case(Function(forward, form=nn.Bilinear(3, 2, 4)), F.cross_entropy, batch, made={"form.weight": "_trilinear"})


@family
def weight_norm_and_others() -> Case:
    model = nn.Sequential(
        parametrizations.weight_norm(nn.Linear(3, 4)), nn.Tanh(), parametrizations.orthogonal(nn.Linear(4, 4)), nn.Tanh(),
        parametrizations.spectral_norm(nn.Linear(4, 4)),
    )  # fmt: skip
    return Case(model.eval(), F.cross_entropy, (torch.randn(3, 3), _labels()))


@family
def graph_layer() -> Case:
    def forward(self: Any, nodes: Any, source: Any, target: Any) -> Any:
        messages = torch.tanh(self.message(nodes)).gather(1, source[..., None].expand(-1, -1, 4))
        summed = torch.zeros_like(messages[:, :1]).expand(-1, nodes.shape[1], -1)
        return self.head(summed.scatter_add(1, target[..., None].expand(-1, -1, 4), messages).mean(1))

    batch = torch.randn(3, 5, 2), torch.randint(5, (3, 7)), torch.randint(5, (3, 7)), _labels()
    model = Function(forward, message=nn.Linear(2, 4), head=nn.Linear(4, 4))
    return Case(model, F.cross_entropy, batch, products=("message.weight", "head.weight"))


@family
def graph_layer_by_index_add() -> Case:
    def forward(self: Any, nodes: Any, source: Any, target: Any) -> Any:
        summed = torch.zeros_like(nodes[0]).index_add(0, target[0], nodes[0][source[0]])
        return self.head(torch.tanh(self.message(summed)).mean(0))[None]

    batch = torch.randn(3, 5, 2), torch.randint(5, (3, 7)), torch.randint(5, (3, 7)), _labels()
    model = Function(forward, message=nn.Linear(2, 4), head=nn.Linear(4, 4))
    return Case(model, F.cross_entropy, batch, products=("message.weight", "head.weight"))


@family
def buffers() -> Case:
    def forward(self: Any, x: Any) -> Any:
        return self.linear((x - self.mean) / self.scale)

    model = Function(forward, linear=nn.Linear(3, 4), mean=torch.randn(3), scale=torch.rand(3) + 1)
    return Case(model, F.cross_entropy, (torch.randn(3, 3), _labels()), products=("linear.weight",))


@family
def frozen_parameters() -> Case:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    model[2].requires_grad_(False)
    model[4].bias.requires_grad_(False)
    return Case(model, F.cross_entropy, (torch.randn(3, 3), _labels()), products=("0.weight", "4.weight"))


@family
def unused_parameters() -> Case:
    def forward(self: Any, x: Any) -> Any:
        return self.used(x)

    model = Function(forward, used=nn.Linear(3, 4), unused=nn.Linear(2, 2))
    return Case(model, F.cross_entropy, (torch.randn(3, 3), _labels()), products=("used.weight",))


@family
def complex_parameters() -> Case:
    def forward(self: Any, x: Any) -> Any:
        return (torch.tanh(x.to(self.w.dtype) @ self.w) @ self.v).abs()

    w, v = _parameter(3, 4, dtype=torch.complex128), _parameter(4, 4, dtype=torch.complex128)
    return Case(Function(forward, w=w, v=v), F.cross_entropy, (torch.randn(3, 3), _labels()), products=("w", "v"))


@family
def mixture_of_experts() -> Case:
    def forward(self: Any, x: Any) -> Any:
        outputs = torch.stack([expert(x) for expert in self.experts], 1)
        return (self.gate(x).softmax(-1)[..., None] * outputs).sum(1)

    model = Function(forward, experts=nn.ModuleList(nn.Linear(3, 4) for _ in range(3)), gate=nn.Linear(3, 3))
    return Case(model, F.cross_entropy, (torch.randn(3, 3), _labels()), products=("experts.1.weight", "gate.weight"))


@family
def ensemble_by_vmap() -> Case:
    def forward(self: Any, x: Any) -> Any:
        return vmap(lambda w: torch.tanh(x @ w))(self.weights).mean(0)

    return Case(Function(forward, weights=_parameter(2, 3, 4)), F.cross_entropy, (torch.randn(3, 3), _labels()))


@family
def scan_over_steps() -> Case:
    def forward(self: Any, x: Any) -> Any:
        def step(state: Any, now: Any) -> Any:
            return torch.tanh(self.mix(state) + now), None

        return lax.scan(step, x.new_zeros(len(x), 4), x.transpose(0, 1))[0]

    case = torch.randn(3, 3, 4), _labels()
    return Case(Function(forward, mix=nn.Linear(4, 4)), F.cross_entropy, case, made={"mix.weight": "torchbatch.lax"})


@family
def choices_by_example_and_by_parameter() -> Case:
    def forward(self: Any, x: Any) -> Any:
        x = lax.cond(x.sum() > 0, lambda x: self.mix(x), lambda x: -self.mix(x.sin()), x)
        return lax.cond(self.mix.bias.sum() > 0, lambda x: x.tanh(), lambda x: x.square() * self.mix.bias, x)

    batch = torch.randn(3, 4), _labels()
    return Case(Function(forward, mix=nn.Linear(4, 4)), F.cross_entropy, batch, made={"mix.weight": "torchbatch.lax"})


@family
def loops_in_loops() -> Case:
    def forward(self: Any, x: Any) -> Any:
        def step(state: Any, now: Any) -> Any:
            bent = lax.cond(now.sum() > 0, torch.tanh, torch.sin, self.mix(state) + now)
            return lax.fori_loop(0, 2, lambda i, s: s * 0.9 + self.shift, bent), bent

        halved = lax.while_loop(lambda v: (v.abs() > 0.5).any(), lambda v: v / 2, x.detach().flatten(1))
        return lax.scan(step, x.new_zeros(len(x), 4), x.transpose(0, 1))[0] + halved[:, :4]

    model = Function(forward, mix=nn.Linear(4, 4), shift=_parameter(4))
    return Case(model, F.cross_entropy, (3 * torch.randn(3, 3, 4), _labels()), made={"mix.weight": "torchbatch.lax"})


@family
def checkpoint_of_torch() -> Case:
    def forward(self: Any, x: Any) -> Any:
        return self.head(torch.utils.checkpoint.checkpoint(lambda x: torch.tanh(self.body(x)), x, use_reentrant=False))

    model = Function(forward, body=nn.Linear(3, 4), head=nn.Linear(4, 4))
    return Case(model, F.cross_entropy, (torch.randn(3, 3), _labels()), products=("body.weight", "head.weight"))


@family
def checkpoint_of_torchbatch() -> Case:
    def forward(self: Any, x: Any) -> Any:
        return self.head(torchbatch.checkpoint(lambda x: torch.tanh(self.body(x)))(x))

    model = Function(forward, body=nn.Linear(3, 4), head=nn.Linear(4, 4))
    return Case(model, F.cross_entropy, (torch.randn(3, 3), _labels()), products=("body.weight", "head.weight"))


# --- dtypes ----------------------------------------------------------------------------------------------------------


@family
def single_precision() -> Case:
    model = nn.Sequential(nn.Conv1d(1, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(12, 6), nn.GELU(), nn.Linear(6, 4))
    return Case(model, F.cross_entropy, (torch.randn(3, 1, 5), _labels()), tolerance=1e-5, products=("3.weight", "5.weight"))


@family
def energies_that_differentiate_inside() -> Case:
    def forward(self: Any, x: Any) -> Any:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            energy = self.out(torch.tanh(self.body(x))).sum()
            return torch.autograd.grad(energy, x, create_graph=True)[0]

    model = Function(forward, body=nn.Linear(3, 4), out=nn.Linear(4, 1))
    return Case(model, F.mse_loss, (torch.randn(3, 3), torch.randn(3, 3)), products=("body.weight",))


@family
def half_precision() -> Case:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4)).half()
    return Case(model, F.cross_entropy, (torch.randn(3, 3).half(), _labels()), tolerance=4e-3, products=("0.weight", "2.weight"))


@family
def bfloat16_under_autocast() -> Case:
    def forward(self: Any, x: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return self.head(torch.tanh(self.body(x))).float()

    model = Function(forward, body=nn.Linear(3, 4), head=nn.Linear(4, 4))
    return Case(model, F.cross_entropy, (torch.randn(3, 3), _labels()), tolerance=3e-2, products=("body.weight", "head.weight"))


@family
def mixed_dtypes() -> Case:
    def forward(self: Any, x: Any) -> Any:
        return self.head(torch.tanh(self.body(x)).double())

    model = Function(forward, body=nn.Linear(3, 4), head=nn.Linear(4, 4).double())
    return Case(model, F.cross_entropy, (torch.randn(3, 3), _labels()), tolerance=1e-5, products=("body.weight", "head.weight"))


# --- what goes in and what comes out ---------------------------------------------------------------------------------


@family
def dict_of_inputs() -> Case:
    def forward(self: Any, words: Any, weights: Any) -> Any:
        return self.head((self.words(words) * weights[..., None]).sum(1))

    def adapter(batch: Any) -> Any:
        return {"words": batch["words"], "weights": batch["weights"]}, batch["labels"]

    batch = {"words": torch.randint(20, (3, 4)), "weights": torch.rand(3, 4), "labels": _labels()}
    model = Function(forward, words=nn.Embedding(20, 3), head=nn.Linear(3, 4))
    return Case(model, F.cross_entropy, (batch,), {"adapter": adapter}, products=("words.weight", "head.weight"))


@dataclasses.dataclass
class Output:
    """As libraries of models return it."""

    loss: torch.Tensor
    logits: torch.Tensor


@family
def output_with_a_loss() -> Case:
    def forward(self: Any, x: Any, labels: Any) -> Any:
        logits = self.head(x)
        return Output(F.cross_entropy(logits, labels), logits)

    return Case(Function(forward, head=nn.Linear(3, 4)), None, (torch.randn(3, 3), _labels()), products=("head.weight",))


@family
def loss_with_weight_decay() -> Case:
    def forward(self: Any, x: Any, labels: Any) -> Any:
        return F.cross_entropy(self.head(x), labels) + 0.1 * self.head.weight.square().sum()

    return Case(Function(forward, head=nn.Linear(3, 4)), None, (torch.randn(3, 3), _labels()), made={"head.weight": "mul"})


@family
def several_targets() -> Case:
    def forward(self: Any, x: Any) -> Any:
        hidden = torch.tanh(self.body(x))
        return self.a(hidden), self.b(hidden)

    def criterion(outputs: Any, labels: Any, values: Any) -> Any:
        return F.cross_entropy(outputs[0], labels) + F.mse_loss(outputs[1], values)

    model = Function(forward, body=nn.Linear(3, 4), a=nn.Linear(4, 4), b=nn.Linear(4, 2))
    batch = torch.randn(3, 3), _labels(), torch.randn(3, 2)
    return Case(model, criterion, batch, {"targets": 2}, products=("body.weight", "a.weight", "b.weight"))


@family
def loss_of_shape_one() -> Case:
    def criterion(output: Any, labels: Any) -> Any:
        return F.cross_entropy(output, labels, reduction="none")

    return Case(nn.Linear(3, 4), criterion, (torch.randn(3, 3), _labels()), products=("weight",))
