"""PyTorch's operations on arrays of mpmath's numbers, by their names in aten."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

_Array = Any  # an array of mpmath's numbers, a tensor of whole numbers or bools, or a Python number


class Operations:
    """What :mod:`torchbatch.testing.multiprecision` computes with.

    Attributes:
        table: the operations by name.
        zero: the number 0.
    """

    def __init__(self, mp: Any) -> None:
        self._mp = mp
        self.zero = mp.mpf(0)
        self.table: dict[str, Callable[..., Any]] = {
            **{name: self._each(function) for name, function in self._unary().items()},
            **{name: self._each(function) for name, function in self._binary().items()},
            **{name: self._test(function) for name, function in _TESTS.items()},
            **{name: getattr(self, f"op_{name}") for name in _methods()},
        }

    # --- numbers -----------------------------------------------------------------------------------------------------

    def number(self, value: Any) -> Any:
        """A Python number as mpmath's."""
        if hasattr(value, "_mpf_") or hasattr(value, "_mpc_"):
            return value
        return self._mp.mpc(value) if isinstance(value, complex) else self._mp.mpf(value)

    def numbers(self, value: Any) -> Any:
        """A real or complex tensor as an array of mpmath's numbers; anything else as it is."""
        if not isinstance(value, torch.Tensor):
            return value
        if not (value.is_floating_point() or value.is_complex()):
            return value.cpu()
        wide = value.detach().to("cpu", torch.complex128 if value.is_complex() else torch.float64).resolve_conj()
        return self._array([self.number(number) for number in wide.flatten().tolist()], tuple(wide.shape))

    def boxed(self, value: Any) -> Any:
        """A single number as an array without axes: arithmetic of NumPy's objects takes it out."""
        return self._real(value) if hasattr(value, "_mpf_") or hasattr(value, "_mpc_") else value

    def _array(self, numbers: Sequence[Any], shape: tuple[int, ...]) -> np.ndarray:
        found = np.empty(len(numbers), dtype=object)
        found[:] = numbers
        return found.reshape(shape)

    def _real(self, value: _Array) -> np.ndarray:
        """Anything as an array of mpmath's numbers."""
        if isinstance(value, torch.Tensor):
            return self._array([self.number(number) for number in value.flatten().tolist()], tuple(value.shape))
        if isinstance(value, np.ndarray) and value.dtype == object:
            return value
        numbers = np.asarray(value)
        return self._array([self.number(number) for number in numbers.flatten().tolist()], numbers.shape)

    def _full(self, shape: Sequence[int], value: Any) -> np.ndarray:
        return self._array([self.number(value)] * math.prod(shape), tuple(shape))

    def _each(self, function: Callable[..., Any]) -> Callable[..., np.ndarray]:
        """A function of numbers as one of arrays. A complex result of real numbers is no number; that of 1/0 is infinite."""
        nan = self._mp.nan

        def safe(*numbers: Any) -> Any:
            if any(number != number for number in numbers):
                return nan
            try:
                found = function(*numbers)
            except ZeroDivisionError:
                return nan
            is_odd = hasattr(found, "_mpc_") and not any(hasattr(number, "_mpc_") for number in numbers)
            return nan if is_odd else found

        def each(*arrays: _Array) -> np.ndarray:
            return self._mapped(safe, *arrays)

        return each

    def _mapped(self, function: Callable[..., Any], *arrays: _Array) -> np.ndarray:
        given = np.broadcast_arrays(*(self._real(array) for array in arrays))
        rows = zip(*(array.flat for array in given), strict=True)
        return self._array([function(*row) for row in rows], given[0].shape)

    def _test(self, function: Callable[..., bool]) -> Callable[..., torch.Tensor]:
        def tested(*arrays: _Array) -> torch.Tensor:
            found = self._mapped(function, *arrays)
            return torch.tensor([bool(answer) for answer in found.flat]).reshape(found.shape)

        return tested

    # --- elements ----------------------------------------------------------------------------------------------------

    def _unary(self) -> dict[str, Callable[..., Any]]:
        mp = self._mp
        same = "exp expm1 log log1p log10 sqrt sin cos tan asin acos atan sinh cosh tanh asinh acosh atanh erf erfc floor ceil"
        return {
            **{name: getattr(mp, name) for name in f"{same} sign".split()},
            "abs": abs,
            "neg": lambda x: -x,
            "sgn": mp.sign,
            "square": lambda x: x * x,
            "log2": lambda x: mp.log(x) / mp.log(2),
            "exp2": lambda x: mp.mpf(2) ** x,
            "lgamma": lambda x: mp.log(abs(mp.gamma(x))),
            "relu": lambda x: max(x, self.zero),
            "sigmoid": self._sigmoid,
            "silu": lambda x: x * self._sigmoid(x),
            "trunc": lambda x: mp.floor(x) if x >= 0 else mp.ceil(x),
            "round": mp.nint,
            "reciprocal": lambda x: self._quotient(mp.mpf(1), x),
            "rsqrt": lambda x: self._quotient(mp.mpf(1), mp.sqrt(x)),
            "_conj": mp.conj,
        }

    def _binary(self) -> dict[str, Callable[..., Any]]:
        mp = self._mp
        return {
            "mul": lambda x, y: x * y,
            "maximum": max,
            "minimum": min,
            "atan2": mp.atan2,
            "remainder": lambda x, y: x - y * mp.floor(x / y),
            "fmod": mp.fmod,
            "pow": self._power,
            "xlogy": lambda x, y: x * mp.log(y) if x != 0 else self.zero,
            "lerp": lambda x, y, weight: x + weight * (y - x),
            "addcmul": lambda x, a, b: x + a * b,
            "addcdiv": lambda x, a, b: x + self._quotient(a, b),
            "tanh_backward": lambda g, y: g * (1 - y * y),
            "sigmoid_backward": lambda g, y: g * y * (1 - y),
            "silu_backward": lambda g, x: g * self._sigmoid(x) * (1 + x * (1 - self._sigmoid(x))),
            "threshold_backward": lambda g, x, least: g if x > least else self.zero,
        }

    def _sigmoid(self, x: Any) -> Any:
        return 1 / (1 + self._mp.exp(-x))

    def _quotient(self, x: Any, y: Any) -> Any:
        if y != 0:
            return x / y
        return self._mp.nan if x == 0 or x != x else self._mp.inf * self._mp.sign(x)

    def _power(self, x: Any, y: Any) -> Any:
        if x == 0 and not hasattr(y, "_mpc_") and y < 0:
            return self._mp.inf
        return x**y

    def op_add(self, x: _Array, y: _Array, alpha: Any = 1) -> np.ndarray:
        return self._mapped(lambda a, b: a + b * alpha, x, y)

    def op_sub(self, x: _Array, y: _Array, alpha: Any = 1) -> np.ndarray:
        return self._mapped(lambda a, b: a - b * alpha, x, y)

    def op_rsub(self, x: _Array, y: _Array, alpha: Any = 1) -> np.ndarray:
        return self.op_sub(y, x, alpha)

    def op_div(self, x: _Array, y: _Array, rounding_mode: str | None = None) -> np.ndarray:
        found = self._each(self._quotient)(x, y)
        return found if rounding_mode is None else self.table[rounding_mode](found)

    def op_clamp(self, x: _Array, least: Any = None, most: Any = None) -> np.ndarray:
        x = x if least is None else self.table["maximum"](x, least)
        return self._real(x if most is None else self.table["minimum"](x, most))

    def op_clamp_min(self, x: _Array, least: Any) -> np.ndarray:
        return self.op_clamp(x, least)

    def op_clamp_max(self, x: _Array, most: Any) -> np.ndarray:
        return self.op_clamp(x, None, most)

    def op_where(self, condition: torch.Tensor, x: _Array, y: _Array) -> np.ndarray:
        return self._mapped(lambda c, a, b: a if c != 0 else b, condition, x, y)

    def op_masked_fill(self, x: _Array, mask: torch.Tensor, value: Any) -> np.ndarray:
        return self.op_where(mask, value, x)

    def op_gelu(self, x: _Array, approximate: str = "none") -> np.ndarray:
        return self._each(self._gelu if approximate == "none" else self._gelu_tanh)(x)

    def op_gelu_backward(self, gradient: _Array, x: _Array, approximate: str = "none") -> np.ndarray:
        function = self._gelu if approximate == "none" else self._gelu_tanh
        return self._each(lambda g, number: g * self._mp.diff(function, number))(gradient, x)

    def _gelu(self, x: Any) -> Any:
        return x * self._mp.erfc(-x / self._mp.sqrt(2)) / 2

    def _gelu_tanh(self, x: Any) -> Any:
        mp = self._mp
        return x / 2 * (1 + mp.tanh(mp.sqrt(2 / mp.pi) * (x + mp.mpf("0.044715") * x**3)))

    def op_softplus(self, x: _Array, beta: Any = 1, threshold: Any = 20) -> np.ndarray:
        log1p, exp = self._mp.log1p, self._mp.exp
        return self._each(lambda a: a if a * beta > threshold else log1p(exp(a * beta)) / beta)(x)

    def op_softplus_backward(self, gradient: _Array, x: _Array, beta: Any, threshold: Any) -> np.ndarray:
        return self._each(lambda g, a: g if a * beta > threshold else g * self._sigmoid(a * beta))(gradient, x)

    def op_elu(self, x: _Array, alpha: Any = 1, scale: Any = 1, input_scale: Any = 1) -> np.ndarray:
        return self._each(lambda a: scale * (a if a > 0 else alpha * self._mp.expm1(a * input_scale)))(x)

    def op_elu_backward(
        self, gradient: _Array, alpha: Any, scale: Any, input_scale: Any, is_result: bool, x: _Array
    ) -> np.ndarray:
        def derivative(g: Any, a: Any) -> Any:
            if a > 0:
                return g * scale
            return g * input_scale * (a + scale * alpha if is_result else scale * alpha * self._mp.exp(a * input_scale))

        return self._each(derivative)(gradient, x)

    def op_leaky_relu(self, x: _Array, slope: Any = 0.01) -> np.ndarray:
        return self._each(lambda a: a if a > 0 else a * slope)(x)

    def op_leaky_relu_backward(self, gradient: _Array, x: _Array, slope: Any, is_result: bool) -> np.ndarray:
        return self._each(lambda g, a: g if a > 0 else g * slope)(gradient, x)

    def op__to_copy(self, x: _Array, dtype: torch.dtype | None = None, **rest: Any) -> Any:
        if dtype is None or dtype.is_floating_point or dtype.is_complex:
            return x
        if dtype is torch.bool:
            return self.table["ne"](x, 0)
        return torch.tensor([int(number) for number in self._real(x).flat], dtype=dtype).reshape(x.shape)

    # --- constants ---------------------------------------------------------------------------------------------------

    def op_zeros_like(self, x: _Array) -> np.ndarray:
        return self._full(x.shape, 0)

    def op_ones_like(self, x: _Array) -> np.ndarray:
        return self._full(x.shape, 1)

    def op_empty_like(self, x: _Array) -> np.ndarray:
        return self._full(x.shape, 0)

    def op_full_like(self, x: _Array, value: Any) -> np.ndarray:
        return self._full(x.shape, value)

    def op_fill(self, x: _Array, value: Any) -> np.ndarray:
        return np.broadcast_to(self._real(value), x.shape).copy()

    def op_new_zeros(self, x: _Array, shape: Sequence[int]) -> np.ndarray:
        return self._full(shape, 0)

    def op_new_ones(self, x: _Array, shape: Sequence[int]) -> np.ndarray:
        return self._full(shape, 1)

    def op_new_full(self, x: _Array, shape: Sequence[int], value: Any) -> np.ndarray:
        return self._full(shape, value)

    # --- reductions --------------------------------------------------------------------------------------------------

    def _reduced(self, x: np.ndarray, dim: Any, keepdim: bool, function: Callable[[list[Any]], Any]) -> np.ndarray:
        """A function of the numbers along some axes."""
        x = self._real(x)
        axes = [axis % max(x.ndim, 1) for axis in _axes(x, dim)] if x.ndim else []
        kept = [axis for axis in range(x.ndim) if axis not in axes]
        rows = x.transpose([*kept, *axes]).reshape(math.prod(x.shape[axis] for axis in kept), -1) if x.size else None
        shape = tuple(x.shape[axis] for axis in kept)
        found = [function([])] * math.prod(shape) if rows is None else [function(list(row)) for row in rows]
        result = self._array(found, shape)
        return np.expand_dims(result, axes) if keepdim else result

    def op_sum(self, x: _Array, dim: Any = None, keepdim: bool = False) -> np.ndarray:
        return self._reduced(x, dim, keepdim, lambda row: sum(row, self.zero))

    def op_nansum(self, x: _Array, dim: Any = None, keepdim: bool = False) -> np.ndarray:
        return self._reduced(x, dim, keepdim, lambda row: sum((number for number in row if number == number), self.zero))

    def op_mean(self, x: _Array, dim: Any = None, keepdim: bool = False) -> np.ndarray:
        return self._reduced(x, dim, keepdim, lambda row: self._quotient(sum(row, self.zero), len(row)))

    def op_prod(self, x: _Array, dim: Any = None, keepdim: bool = False) -> np.ndarray:
        return self._reduced(x, dim, keepdim, self._mp.fprod)

    def op_var(self, x: _Array, dim: Any = None, correction: Any = 1, keepdim: bool = False) -> np.ndarray:
        def variance(row: list[Any]) -> Any:
            mean = self._quotient(sum(row, self.zero), len(row))
            total = sum(((number - mean) ** 2 for number in row), self.zero)
            return self._quotient(total, max(len(row) - (1 if correction is None else correction), 0))

        return self._reduced(x, dim, keepdim, variance)

    def op_std(self, x: _Array, dim: Any = None, correction: Any = 1, keepdim: bool = False) -> np.ndarray:
        found: np.ndarray = self.table["sqrt"](self.op_var(x, dim, correction, keepdim))
        return found

    def op_linalg_vector_norm(self, x: _Array, ord: Any = 2, dim: Any = None, keepdim: bool = False) -> np.ndarray:
        return self._reduced(x, dim, keepdim, lambda row: self._mp.norm(row, ord))

    def op_amax(self, x: _Array, dim: Any = (), keepdim: bool = False) -> np.ndarray:
        return self._reduced(x, dim, keepdim, self._largest)

    def op_amin(self, x: _Array, dim: Any = (), keepdim: bool = False) -> np.ndarray:
        return -self._reduced(-x, dim, keepdim, self._largest)

    def _largest(self, row: list[Any]) -> Any:
        return next((number for number in row if number != number), max(row))

    def op_argmax(self, x: _Array, dim: Any = None, keepdim: bool = False) -> torch.Tensor:
        found = self._reduced(x, dim, keepdim, lambda row: row.index(self._largest(row)))
        return torch.tensor([int(place) for place in found.flat]).reshape(found.shape)

    def op_argmin(self, x: _Array, dim: Any = None, keepdim: bool = False) -> torch.Tensor:
        return self.op_argmax(-x, dim, keepdim)

    def op_max(self, x: _Array, dim: Any = None, keepdim: bool = False) -> Any:
        return self.op_amax(x) if dim is None else (self.op_amax(x, dim, keepdim), self.op_argmax(x, dim, keepdim))

    def op_min(self, x: _Array, dim: Any = None, keepdim: bool = False) -> Any:
        return self.op_amin(x) if dim is None else (self.op_amin(x, dim, keepdim), self.op_argmin(x, dim, keepdim))

    def op_logsumexp(self, x: _Array, dim: Any, keepdim: bool = False) -> np.ndarray:
        exp, log = self._mp.exp, self._mp.log
        return self._reduced(x, dim, keepdim, lambda row: log(sum((exp(number) for number in row), self.zero)))

    def op_cumsum(self, x: _Array, dim: int) -> np.ndarray:
        return np.add.accumulate(x, axis=dim)

    def op_cumprod(self, x: _Array, dim: int) -> np.ndarray:
        return np.multiply.accumulate(x, axis=dim)

    # --- products ----------------------------------------------------------------------------------------------------

    def op_mm(self, a: _Array, b: _Array) -> np.ndarray:
        if a.shape[-1] == 0:
            return self._full((*a.shape[:-1], *b.shape[:-2], *b.shape[-1:]), 0)
        return self._real(np.asarray(np.matmul(a, b), dtype=object))

    op_bmm = op_mv = op_dot = op_mm

    def op_addmm(self, x: _Array, a: _Array, b: _Array, beta: Any = 1, alpha: Any = 1) -> np.ndarray:
        return self._mapped(lambda c, d: beta * c + alpha * d, x, self.op_mm(a, b))

    op_baddbmm = op_addmv = op_addmm

    def op__scaled_dot_product_flash_attention_for_cpu(
        self,
        q: _Array,
        k: _Array,
        v: _Array,
        dropout: float = 0.0,
        causal: bool = False,
        attn_mask: Any = None,
        scale: Any = None,
    ) -> tuple[np.ndarray, None]:
        scale = 1 / self._mp.sqrt(q.shape[-1]) if scale is None else scale
        scores = self.op_mm(q, np.swapaxes(k, -1, -2)) * scale
        if causal:
            keep = np.tril(np.ones(scores.shape[-2:], dtype=bool))
            scores = self.op_where(torch.tensor(keep), scores, -math.inf)
        scores = scores if attn_mask is None else self.op_add(scores, attn_mask)
        return self.op_mm(self.op__softmax(scores, -1), v), None

    op__scaled_dot_product_attention_math = op__scaled_dot_product_flash_attention_for_cpu

    # --- layers and losses -------------------------------------------------------------------------------------------

    def op__softmax(self, x: _Array, dim: int, half_to_float: bool = False) -> np.ndarray:
        away = self._each(lambda a, b: a - b)(x, self.op_amax(x, dim, True))
        exp = self.table["exp"](away)
        return self.op_div(exp, self.op_sum(exp, dim, True))

    def op__log_softmax(self, x: _Array, dim: int, half_to_float: bool = False) -> np.ndarray:
        return self.op_sub(x, self.op_logsumexp(x, dim, True))

    def op__softmax_backward_data(self, gradient: _Array, y: _Array, dim: int, dtype: Any = None) -> np.ndarray:
        return self._real(y * (gradient - self.op_sum(gradient * y, dim, True)))

    def op__log_softmax_backward_data(self, gradient: _Array, y: _Array, dim: int, dtype: Any = None) -> np.ndarray:
        return self.op_sub(gradient, self.table["exp"](y) * self.op_sum(gradient, dim, True))

    def op_native_layer_norm(self, x: _Array, shape: Sequence[int], weight: Any, bias: Any, eps: Any) -> tuple[Any, Any, Any]:
        axes = list(range(x.ndim - len(shape), x.ndim))
        mean = self.op_mean(x, axes, True)
        rstd = self.table["rsqrt"](self.op_var(x, axes, 0, True) + self.number(eps))
        normal = (x - mean) * rstd
        normal = normal if weight is None else normal * weight
        return normal if bias is None else normal + bias, mean, rstd

    def op_native_layer_norm_backward(
        self, gradient: Any, x: Any, shape: Sequence[int], mean: Any, rstd: Any, weight: Any, bias: Any, mask: Sequence[bool]
    ) -> tuple[Any, Any, Any]:
        axes = list(range(x.ndim - len(shape), x.ndim))
        outer = list(range(x.ndim - len(shape)))
        normal = (x - mean) * rstd
        inner = gradient if weight is None else gradient * weight
        both = inner - self.op_mean(inner, axes, True) - normal * self.op_mean(inner * normal, axes, True)
        of_weight = self.op_sum(gradient * normal, outer) if outer else gradient * normal
        return both * rstd, of_weight, self.op_sum(gradient, outer) if outer else gradient

    def op_native_batch_norm(
        self, x: Any, weight: Any, bias: Any, mean: Any, var: Any, training: bool, momentum: Any, eps: Any
    ) -> tuple[Any, Any, Any]:
        axes = [axis for axis in range(x.ndim) if axis != 1]
        across = [1, -1, *[1] * (x.ndim - 2)]
        mean = self.op_mean(x, axes) if training else mean
        rstd = self.table["rsqrt"]((self.op_var(x, axes, 0) if training else var) + self.number(eps))
        normal = (x - mean.reshape(across)) * rstd.reshape(across)
        normal = normal if weight is None else normal * weight.reshape(across)
        return normal if bias is None else normal + bias.reshape(across), mean, rstd

    def _mean_or_sum(self, losses: np.ndarray, reduction: int) -> np.ndarray:
        return [lambda: losses, lambda: self.op_mean(losses), lambda: self.op_sum(losses)][reduction]()

    def op_mse_loss(self, x: _Array, y: _Array, reduction: int = 1) -> np.ndarray:
        return self._mean_or_sum((x - y) ** 2, reduction)

    def op_mse_loss_backward(self, gradient: _Array, x: _Array, y: _Array, reduction: int) -> np.ndarray:
        return self._real(2 * (x - y) * gradient / (x.size if reduction == 1 else 1))

    def op_huber_loss(self, x: _Array, y: _Array, reduction: int = 1, delta: Any = 1.0) -> np.ndarray:
        loss = self._each(lambda d: d * d / 2 if abs(d) <= delta else delta * (abs(d) - self.number(delta) / 2))
        return self._mean_or_sum(loss(x - y), reduction)

    def op_huber_loss_backward(self, gradient: _Array, x: _Array, y: _Array, reduction: int, delta: Any) -> np.ndarray:
        return self._real(self.op_clamp(x - y, -delta, delta) * gradient / (x.size if reduction == 1 else 1))

    def _weights(self, target: torch.Tensor, shape: tuple[int, ...], weight: Any, ignored: int) -> np.ndarray:
        """The weight of each log-probability in the loss."""
        classes = len(shape) - 1 if len(shape) < 2 else 1
        found = self._full(shape, 0)
        for place in np.ndindex(*target.shape):
            label = int(target[place])
            if label != ignored:
                found[(*place[:classes], label, *place[classes:])] = self.number(1) if weight is None else weight[label]
        return found

    def op_nll_loss_forward(
        self, x: _Array, target: torch.Tensor, weight: Any, reduction: int, ignored: int
    ) -> tuple[np.ndarray, np.ndarray]:
        weights = self._weights(target, x.shape, weight, ignored)
        axis = 0 if x.ndim == 1 else 1
        total = self.op_sum(weights)
        if reduction == 0:
            return -self.op_sum(x * weights, axis), total
        found = -self.op_sum(x * weights)
        return self._real(self.op_div(found, total) if reduction == 1 else found), total

    op_nll_loss2d_forward = op_nll_loss_forward

    def op_nll_loss_backward(
        self, gradient: _Array, x: _Array, target: torch.Tensor, weight: Any, reduction: int, ignored: int, total: _Array
    ) -> np.ndarray:
        weights = self._weights(target, x.shape, weight, ignored)
        spread = np.expand_dims(gradient, 0 if x.ndim == 1 else 1) if reduction == 0 else gradient
        return self._real(-weights * spread / (total if reduction == 1 else 1))

    op_nll_loss2d_backward = op_nll_loss_backward

    # --- sums of what meets ------------------------------------------------------------------------------------------

    def op_scatter_add(self, x: _Array, dim: int, index: torch.Tensor, source: _Array) -> np.ndarray:
        found: np.ndarray = x.copy()
        for place in np.ndindex(*index.shape):
            target = list(place)
            target[dim] = int(index[place])
            found[tuple(target)] += source[place]
        return found

    def op_index_put(self, x: _Array, indices: Sequence[Any], values: _Array, accumulate: bool = False) -> np.ndarray:
        found: np.ndarray = x.copy()
        where: Any = tuple(slice(None) if index is None else index.numpy() for index in indices)
        np.add.at(found, where, self._real(values))
        return found

    def op_index_add(self, x: _Array, dim: int, index: torch.Tensor, source: _Array, alpha: Any = 1) -> np.ndarray:
        indices: list[Any] = [slice(None)] * x.ndim
        indices[dim] = index.numpy()
        found: np.ndarray = x.copy()
        np.add.at(found, tuple(indices), source * alpha)
        return found

    def op_embedding_dense_backward(
        self, gradient: _Array, index: torch.Tensor, count: int, padding: int, scaled: bool
    ) -> np.ndarray:
        found = self._full((count, gradient.shape[-1]), 0)
        for place in np.ndindex(*index.shape):
            if int(index[place]) != padding:
                found[int(index[place])] += gradient[place]
        return found


_TESTS: dict[str, Callable[..., bool]] = {
    "eq": lambda x, y: x == y,
    "ne": lambda x, y: x != y,
    "lt": lambda x, y: x < y,
    "le": lambda x, y: x <= y,
    "gt": lambda x, y: x > y,
    "ge": lambda x, y: x >= y,
    "isnan": lambda x: x != x,
    "isinf": lambda x: abs(x) == math.inf,
    "logical_not": lambda x: x == 0,
    "logical_and": lambda x, y: x != 0 and y != 0,
    "logical_or": lambda x, y: x != 0 or y != 0,
}


def _axes(x: np.ndarray, dim: Any) -> list[int]:
    if isinstance(dim, int):
        return [dim]
    return list(dim) if dim else list(range(x.ndim))


def _methods() -> list[str]:
    return [name.removeprefix("op_") for name in vars(Operations) if name.startswith("op_")]
