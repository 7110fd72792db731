"""The arithmetic behind :mod:`torchbatch.random`: the hash, and what makes numbers of a distribution from uniform ones.

Each is written once, over a namespace of operations, and run twice: on tensors (:class:`OnTensors`) and by the compiler, which
hands in the values of its own intermediate code. The functions give the same bits as XLA's on the CPU: logarithms by the Cephes
library's polynomials, the inverse error function by those of Giles (2012, "Approximating the erfinv function"), every
multiplication that is followed by an addition fused with it.

Private names used: none.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
PARITY = 0x1BD11BDA
WORD = 0xFFFFFFFF  # the digits of a word of 32 bits
TINY, INFINITY, NAN = 2.0**-126, float("inf"), float("nan")
SQRT2 = 1.4142135381698608  # as a float32

_LOG = (
    7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1, -1.6668057665e-1, 2.0000714765e-1,
    -2.4999993993e-1, 3.3333331174e-1,
)  # fmt: skip
_LN2_LOW, _LN2_HIGH = -2.12194440e-4, 0.693359375
_LOG1P_TOP = (
    4.5270000862445199635215e-5, 4.9854102823193375972212e-1, 6.5787325942061044846969e0, 2.9911919328553073277375e1,
    6.0949667980987787057556e1, 5.7112963590585538103336e1, 2.0039553499201281259648e1,
)  # fmt: skip
_LOG1P_BOTTOM = (
    1.0, 1.5062909083469192043167e1, 8.3047565967967209469434e1, 2.2176239823732856465394e2, 3.0909872225312059774938e2,
    2.1642788614495947685003e2, 6.0118660497603843919306e1,
)  # fmt: skip
_ERF_INV_CENTER = (
    2.81022636e-08, 3.43273939e-07, -3.5233877e-06, -4.39150654e-06, 0.00021858087, -0.00125372503, -0.00417768164, 0.246640727,
    1.50140941,
)  # fmt: skip
_ERF_INV_TAIL = (
    -0.000200214257, 0.000100950558, 0.00134934322, -0.00367342844, 0.00573950773, -0.0076224613, 0.00943887047, 1.00167406,
    2.83297682,
)  # fmt: skip
_ERF_TOP = (
    2.2905065861350646e-4, 3.4082910107109506e-3, 5.0955695062380861e-2, 1.8520832239976145e-1, 1.128379143519084,
)  # fmt: skip
_ERF_BOTTOM = (
    -1.1791602954361697e-7, 2.3547966471313185e-5, 1.0179625278914885e-3, 1.4070470171167667e-2, 1.1098505178285362e-1,
    4.9746925110067538e-1, 1.0,
)  # fmt: skip

_ERF_END = 3.7439213  # from which on it is 1


def signed(word: int) -> int:
    """An unsigned 32-bit number as the signed one with the same bits."""
    return (word & WORD) - ((word & 0x80000000) << 1)


def threefry2x32(m: Any, key: Sequence[Any], count: Sequence[Any]) -> tuple[Any, Any]:
    """The two words that the hash of Salmon et al. (2011) gives for two words of a key and two of a counter, in 20 rounds."""
    words = (key[0], key[1], key[0] ^ key[1] ^ m.integer(signed(PARITY)))
    x, y = count[0] + words[0], count[1] + words[1]
    for step in range(5):
        for distance in ROTATIONS[step % 2]:
            x = x + y
            y = m.rotated(y, distance) ^ x
        x = x + words[(step + 1) % 3]
        y = y + (words[(step + 2) % 3] + m.integer(step + 1))
    return x, y


def threefry2x32_of_ints(key: tuple[int, int], count: tuple[int, int]) -> tuple[int, int]:
    """The same for Python's own integers, signed or not; the words it gives are signed."""
    words = [word & WORD for word in (*key, key[0] ^ key[1] ^ PARITY)]
    x, y = (count[0] + words[0]) & WORD, (count[1] + words[1]) & WORD
    for step in range(5):
        for distance in ROTATIONS[step % 2]:
            x = (x + y) & WORD
            y = (((y << distance) & WORD) | (y >> (32 - distance))) ^ x
        x = (x + words[(step + 1) % 3]) & WORD
        y = (y + words[(step + 2) % 3] + step + 1) & WORD
    return signed(x), signed(y)


def _horner(m: Any, x: Any, coefficients: Sequence[float]) -> Any:
    value = m.number(coefficients[0], x)
    for coefficient in coefficients[1:]:
        value = m.fma(value, x, m.number(coefficient, x))
    return value


def log(m: Any, x: Any) -> Any:
    """The natural logarithm."""
    value = _log_of_normal(m, m.maximum(x, m.number(TINY, x)))
    zero = m.number(0.0, x)
    value = m.where(m.equal(x, m.number(INFINITY, x)), x, value)
    value = m.where(m.equal(x, zero), m.number(-INFINITY, x), value)
    return m.where(m.at_least(x, zero), value, m.number(NAN, x))


def _log_of_normal(m: Any, x: Any) -> Any:
    """The same for positive normal numbers."""
    mantissa, exponent = _split(m, x)
    square = mantissa * mantissa
    cube = square * mantissa
    a, b, c = (_horner(m, mantissa, _LOG[i : i + 3]) for i in (0, 3, 6))
    value = m.fma(m.fma(a, cube, b), cube, c)
    value = m.fma(value, cube, exponent * m.number(_LN2_LOW, x))
    value = m.fma(square, m.number(-0.5, x), mantissa) + value
    return m.fma(exponent, m.number(_LN2_HIGH, x), value)


def _split(m: Any, x: Any) -> tuple[Any, Any]:
    """``x`` as ``(1 + mantissa) * 2**exponent``, with ``1 + mantissa`` between the roots of 1/2 and of 2."""
    bits = m.as_bits(x)
    exponent = m.to_float(m.shifted(bits, 23) - m.integer(126))
    mantissa = m.as_float((bits & m.integer(0x007FFFFF)) | m.integer(0x3F000000))
    small = m.less(mantissa, m.number(0.707106781186547524, x))
    zero, one = m.number(0.0, x), m.number(1.0, x)
    return (mantissa - one) + m.where(small, mantissa, zero), exponent - m.where(small, one, zero)


def log1p(m: Any, x: Any, log: Callable[[Any, Any], Any] = log) -> Any:
    """The logarithm of ``1 + x``; ``log`` is the logarithm for where that is not near 1."""
    square = x * x
    small = (x * square) * m.divided(_horner(m, x, _LOG1P_TOP), _horner(m, x, _LOG1P_BOTTOM))
    small = x + (small - m.number(0.5, x) * square)
    return m.where(m.less(m.absolute(x), m.number(0.41421356237309504880, x)), small, log(m, m.number(1.0, x) + x))


def erf_inv(m: Any, x: Any) -> Any:
    """The inverse of the error function."""
    value = _erf_inv_within(m, x, log)
    return m.where(m.equal(m.absolute(x), m.number(1.0, x)), x * m.number(INFINITY, x), value)


def _erf_inv_within(m: Any, x: Any, log: Callable[[Any, Any], Any] = _log_of_normal) -> Any:
    """The same between -1 and 1."""
    w = -log1p(m, x * -x, log)
    center = m.less(w, m.number(5.0, x))
    w = m.where(center, w - m.number(2.5, x), m.root(w) - m.number(3.0, x))
    value = None
    for a, b in zip(_ERF_INV_CENTER, _ERF_INV_TAIL, strict=True):
        coefficient = m.where(center, m.number(a, x), m.number(b, x))
        value = coefficient if value is None else m.fma(value, w, coefficient)
    return value * x


def erf(m: Any, x: Any) -> Any:
    """The error function, as XLA's loops of several operations have it; a kernel of its own is not 1 from there on."""
    square = x * x
    value = m.divided(x * _horner(m, square, _ERF_TOP), _horner(m, square, _ERF_BOTTOM))
    one = m.number(1.0, x)
    value = m.where(m.at_least(x, m.number(_ERF_END, x)), one, value)
    return m.where(m.at_least(-x, m.number(_ERF_END, x)), -one, value)


# What a distribution makes of a uniform number. ``cut`` rounds to the dtype of the result after each step, as XLA does.


def _normal(m: Any, u: Any, cut: Callable[[Any], Any], root: float) -> Any:
    return m.number(root, u) * cut(_erf_inv_within(m, u))


def _exponential(m: Any, u: Any, cut: Callable[[Any], Any]) -> Any:
    return -log1p(m, -u, _log_of_normal)


def _gumbel(m: Any, u: Any, cut: Callable[[Any], Any]) -> Any:
    return -_log_of_normal(m, -cut(_log_of_normal(m, u)))


def _gumbel_high(m: Any, u: Any, cut: Callable[[Any], Any]) -> Any:
    return -_log_of_normal(m, -cut(log1p(m, -u, _log_of_normal)))


def _laplace(m: Any, u: Any, cut: Callable[[Any], Any]) -> Any:
    size = log1p(m, -m.absolute(u), _log_of_normal)
    zero = m.number(0.0, u)
    return m.where(m.less(u, zero), -size, m.where(m.equal(u, zero), zero, size))


def _logistic(m: Any, u: Any, cut: Callable[[Any], Any]) -> Any:
    return cut(_log_of_normal(m, u)) - cut(log1p(m, -u, _log_of_normal))


def _cauchy(m: Any, u: Any, cut: Callable[[Any], Any], pi: float) -> Any:
    return m.tangent(cut(m.number(pi, u) * cut(u - m.number(0.5, u))))


def _affine(m: Any, u: Any, cut: Callable[[Any], Any], span: float, low: float) -> Any:
    return m.maximum(m.number(low, u), m.fma(u, m.number(span, u), m.number(low, u)))


def _affine_in_steps(m: Any, u: Any, cut: Callable[[Any], Any], span: float, low: float) -> Any:
    return m.maximum(m.number(low, u), cut(cut(u * m.number(span, u)) + m.number(low, u)))


STEPS: dict[str, Callable[..., Any]] = {
    "affine": _affine,
    "affine_in_steps": _affine_in_steps,
    "cauchy": _cauchy,
    "erf": lambda m, x, cut: erf(m, x),
    "erf_inv": lambda m, x, cut: erf_inv(m, x),
    "exponential": _exponential,
    "gumbel": _gumbel,
    "gumbel_high": _gumbel_high,
    "laplace": _laplace,
    "log": lambda m, x, cut: log(m, x),
    "log1p": lambda m, x, cut: log1p(m, x),
    "logistic": _logistic,
    "normal": _normal,
    "same": lambda m, x, cut: x,
}


#: The same in float64, with PyTorch's own functions.
WIDE: dict[str, Callable[..., torch.Tensor]] = {
    "cauchy": lambda u, pi: torch.tan(pi * (u - 0.5)),
    "erf": torch.erf,
    "erf_inv": torch.erfinv,
    "exponential": lambda u: -torch.log1p(-u),
    "gumbel": lambda u: -torch.log(-torch.log(u)),
    "gumbel_high": lambda u: -torch.log(-torch.log1p(-u)),
    "laplace": lambda u: u.sign() * torch.log1p(-u.abs()),
    "log": torch.log,
    "log1p": torch.log1p,
    "logistic": lambda u: u.log() - torch.log1p(-u),
    "normal": lambda u, root: root * torch.erfinv(u),
}


def apply(m: Any, x: Any, name: str, numbers: Sequence[float], dropped: int) -> Any:
    """The step ``name`` of :data:`STEPS`, rounded throughout to ``dropped`` bits less than a float32 has."""

    def cut(value: Any) -> Any:
        return value if not dropped else _rounded(m, value, dropped)

    return cut(STEPS[name](m, x, cut, *numbers))


def _rounded(m: Any, x: Any, dropped: int) -> Any:
    """``x`` as bfloat16 (16 bits dropped) or float16 (13) holds it, rounded to the nearest, ties to even."""
    bits = m.as_bits(x)
    odd = m.shifted(bits, dropped) & m.integer(1)
    rounded = bits + m.integer((1 << (dropped - 1)) - 1) + odd
    rounded = m.as_float(rounded & m.integer(signed(-(1 << dropped))))
    if dropped == 16:
        return rounded
    grid = m.number(0.75, x)  # numbers of this size are as far apart as the least ones of float16
    return m.where(m.less(m.absolute(x), m.number(2.0**-14, x)), (x + grid) - grid, rounded)


@functools.cache
def _number(value: float, device: torch.device) -> torch.Tensor:
    with torch.inference_mode(False):
        return torch.tensor(value, dtype=torch.float32, device=device)


def has_fma(device: torch.device) -> bool:
    """Whether ``torch.addcmul`` rounds once on a device. It does wherever PyTorch's kernels were compiled for such processors."""
    return device.type == "cuda" or (device.type == "cpu" and torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512"))


class OnTensors:
    """The operations on tensors of float32 and int32."""

    @staticmethod
    def integer(value: int) -> int:
        return value

    @staticmethod
    def number(value: float, like: torch.Tensor) -> torch.Tensor:
        return _number(value, like.device)

    @staticmethod
    def shifted(x: torch.Tensor, distance: int) -> torch.Tensor:
        """Shifted to the right, with zeros from the left."""
        return (x >> distance) & ((1 << (32 - distance)) - 1)

    @staticmethod
    def rotated(x: torch.Tensor, distance: int) -> torch.Tensor:
        """Shifted to the left, with what is shifted out from the right."""
        return (x << distance) | OnTensors.shifted(x, 32 - distance)

    @staticmethod
    def fma(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        """``a * b + c``, rounded once."""
        if has_fma(a.device):
            return torch.addcmul(c, a, b)
        return (a.double() * b.double() + c.double()).float()

    @staticmethod
    def as_bits(x: torch.Tensor) -> torch.Tensor:
        return x.view(torch.int32)

    @staticmethod
    def as_float(x: torch.Tensor) -> torch.Tensor:
        return x.view(torch.float32)

    @staticmethod
    def to_float(x: torch.Tensor) -> torch.Tensor:
        return x.float()

    @staticmethod
    def root(x: torch.Tensor) -> torch.Tensor:
        """The square root, rounded to the nearest, which ``torch.sqrt`` of float32 is not on every processor."""
        return x.double().sqrt().float()

    @staticmethod
    def tangent(x: torch.Tensor) -> torch.Tensor:
        """The tangent, computed in float64, which hides that libraries differ in the last digit."""
        return x.double().tan().float()

    maximum = staticmethod(torch.maximum)
    absolute = staticmethod(torch.abs)
    divided = staticmethod(torch.div)
    where = staticmethod(torch.where)
    less = staticmethod(torch.lt)
    at_least = staticmethod(torch.ge)
    equal = staticmethod(torch.eq)
