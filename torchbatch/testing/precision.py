"""The settings of each framework that decide how exactly it computes: what most differences between results come from."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch

from torchbatch import tree
from torchbatch.errors import AxisSpecError
from torchbatch.testing.optional import imported, require

FRAMEWORKS = ("torch", "numpy", "jax")
_HALF = ("float16", "bfloat16")
_WIDE = {"float64": "float32", "complex128": "complex64", "int64": "int32", "uint64": "uint32"}


@dataclasses.dataclass(frozen=True)
class TorchPrecision:
    """What PyTorch computes with. A setting that this version of PyTorch does not have, or cannot tell, is None.

    Attributes:
        version: PyTorch's version.
        default_dtype: the type of new floating-point tensors.
        float32_matmul_precision: ``torch.get_float32_matmul_precision()``.
        cuda_available: whether there is a GPU that the settings named ``cuda`` and ``cudnn`` are about.
        cuda_matmul: how float32 matrix products run on the GPU: ``"tf32"``, ``"ieee"`` or ``"none"``, which is ieee too.
        cudnn_conv: how float32 convolutions run on the GPU.
        mkldnn_matmul: how float32 matrix products run on the processor: ``"bf16"``, ``"tf32"``, ``"ieee"`` or ``"none"``.
        mkldnn_conv: how float32 convolutions run on the processor.
        fp16_reduced_precision_reduction: whether sums within float16 matrix products may be kept in float16 on the GPU.
        bf16_reduced_precision_reduction: whether sums within bfloat16 matrix products may be kept in bfloat16 on the GPU.
        fp16_accumulation: whether float16 matrix products add up in float16 on the GPU.
        deterministic_algorithms: ``torch.are_deterministic_algorithms_enabled()``.
        cudnn_deterministic: whether cuDNN may only use deterministic algorithms.
        cudnn_benchmark: whether cuDNN chooses its algorithm by a race.
        autocast: the devices for which autocast is on, each with its dtype, such as ``("cpu: bfloat16",)``.
        flush_denormal: whether numbers below the smallest normal one become zero on the processor.
        num_threads: the number of threads, which decides how sums are split.
    """

    version: str
    default_dtype: str
    float32_matmul_precision: str | None
    cuda_available: bool
    cuda_matmul: str | None
    cudnn_conv: str | None
    mkldnn_matmul: str | None
    mkldnn_conv: str | None
    fp16_reduced_precision_reduction: bool | None
    bf16_reduced_precision_reduction: bool | None
    fp16_accumulation: bool | None
    deterministic_algorithms: bool
    cudnn_deterministic: bool
    cudnn_benchmark: bool
    autocast: tuple[str, ...]
    flush_denormal: bool
    num_threads: int


@dataclasses.dataclass(frozen=True)
class NumpyPrecision:
    """What NumPy computes with.

    Attributes:
        version: NumPy's version.
        blas: the library that its matrix products run in, as NumPy was built.
    """

    version: str
    blas: str | None


@dataclasses.dataclass(frozen=True)
class JaxPrecision:
    """What JAX computes with.

    Attributes:
        version: JAX's version.
        enable_x64: whether there are 64-bit numbers; otherwise JAX makes 32-bit ones of them.
        default_matmul_precision: ``jax.config.jax_default_matmul_precision``; None leaves it to the device.
        platform: where it computes by default, such as ``"cpu"`` or ``"gpu"``.
        default_device: the device that was chosen, or None for the first one.
        numpy_dtype_promotion: ``"standard"`` or ``"strict"``.
        threefry_partitionable: in which of two ways random numbers are counted.
        xla_flags: the environment variable ``XLA_FLAGS``, or None.
    """

    version: str
    enable_x64: bool
    default_matmul_precision: str | None
    platform: str
    default_device: str | None
    numpy_dtype_promotion: str
    threefry_partitionable: bool
    xla_flags: str | None


@dataclasses.dataclass(frozen=True)
class PrecisionPolicy:
    """The settings of each framework that results depend on; :func:`precision_policy` reads them.

    Attributes:
        torch: PyTorch's, or None if it was not asked for.
        numpy: NumPy's, or None.
        jax: JAX's, or None.
        environment: environment variables that overrule the settings, as far as they are set.

    ``str(policy)`` is a table.
    """

    torch: TorchPrecision | None = None
    numpy: NumpyPrecision | None = None
    jax: JaxPrecision | None = None
    environment: tuple[tuple[str, str], ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The settings by framework and name, ready for JSON; frameworks that were not asked for are left out.

        Example:
            >>> from torchbatch.testing.precision import precision_policy
            >>> precision_policy(["torch"]).to_dict()["torch"]["default_dtype"]
            'float32'
        """
        found = {name: dataclasses.asdict(part) for name, part in self._parts()}
        if found.get("torch"):
            found["torch"]["autocast"] = list(found["torch"]["autocast"])
        return {**found, **({"environment": dict(self.environment)} if self.environment else {})}

    def warnings(self, inputs: Any = None) -> list[str]:
        """The settings that make results differ from full precision, or from each other, one plain sentence each.

        Args:
            inputs: a tree with the arrays that are computed with, if known: some settings matter for some dtypes only.

        Returns:
            The sentences; none if every framework computes as its dtypes say.

        Example:
            >>> import torch
            >>> from torchbatch.testing.precision import precision_policy
            >>> with torch.autocast("cpu", torch.bfloat16):
            ...     precision_policy(["torch"]).warnings()
            ['PyTorch casts to lower precision on its own: autocast is on (cpu: bfloat16).']
        """
        dtypes = _dtypes_of(inputs)
        lines: list[str] = []
        if self.torch is not None:
            lines += _torch_warnings(self.torch, dtypes)
        if self.jax is not None:
            lines += _jax_warnings(self.jax, dtypes, self.torch)
        return lines + [f"The environment variable {name}={value} overrules settings." for name, value in self.environment]

    def _parts(self) -> list[tuple[str, Any]]:
        return [(name, getattr(self, name)) for name in FRAMEWORKS if getattr(self, name) is not None]

    def __str__(self) -> str:
        lines = []
        for framework, settings in self.to_dict().items():
            lines.append(framework)
            lines += [f"  {name:<34}{_shown(value)}" for name, value in settings.items()]
        return "\n".join(lines)


def precision_policy(frameworks: Iterable[str] | None = None) -> PrecisionPolicy:
    """Read the settings that the results of each framework depend on.

    Two frameworks that disagree in the fourth digit are most often set differently: one multiplies matrices in TF32, or has no
    64-bit numbers.

    Args:
        frameworks: any of ``"torch"``, ``"numpy"`` and ``"jax"``. By default PyTorch, NumPy and, if it has been imported, JAX.

    Returns:
        The settings: :meth:`PrecisionPolicy.warnings` says which of them make results differ, ``str`` gives a table, and
        :meth:`PrecisionPolicy.to_dict` what a file can hold. Nothing is changed; JAX finds its devices if it has not yet.

    Raises:
        AxisSpecError: there is no such framework.
        ImportError: JAX is asked for and not installed.

    Example:
        >>> from torchbatch.testing.precision import precision_policy
        >>> policy = precision_policy(["torch", "numpy"])
        >>> policy.torch.default_dtype
        'float32'
        >>> policy.warnings()
        []
    """
    wanted = _wanted(frameworks)
    readers: dict[str, Callable[[], Any]] = {"torch": _read_torch, "numpy": _read_numpy, "jax": _read_jax}
    return PrecisionPolicy(**{name: readers[name]() for name in wanted}, environment=_environment())


def _wanted(frameworks: Iterable[str] | None) -> list[str]:
    if frameworks is None:
        return [name for name in FRAMEWORKS if name != "jax" or imported("jax") is not None]
    names = [frameworks] if isinstance(frameworks, str) else list(frameworks)
    for name in names:
        if name not in FRAMEWORKS:
            raise AxisSpecError(f"frameworks may hold 'torch', 'numpy' and 'jax', but it holds {name!r}.")
    return names


def _environment() -> tuple[tuple[str, str], ...]:
    names = ("NVIDIA_TF32_OVERRIDE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "ONEDNN_DEFAULT_FPMATH_MODE")
    return tuple((name, os.environ[name]) for name in names if name in os.environ)


# --- PyTorch ---------------------------------------------------------------------------------------------------------


def _read_torch() -> TorchPrecision:
    backends: Any = torch.backends
    return TorchPrecision(
        version=torch.__version__,
        default_dtype=_name(torch.get_default_dtype()),
        float32_matmul_precision=_told(torch.get_float32_matmul_precision),
        cuda_available=torch.cuda.is_available(),
        cuda_matmul=_fp32(lambda: backends.cuda.matmul, lambda: backends.cuda.matmul.allow_tf32),
        cudnn_conv=_fp32(lambda: backends.cudnn.conv, lambda: backends.cudnn.allow_tf32),
        mkldnn_matmul=_fp32(lambda: backends.mkldnn.matmul),
        mkldnn_conv=_fp32(lambda: backends.mkldnn.conv),
        fp16_reduced_precision_reduction=_flag("allow_fp16_reduced_precision_reduction"),
        bf16_reduced_precision_reduction=_flag("allow_bf16_reduced_precision_reduction"),
        fp16_accumulation=_flag("allow_fp16_accumulation"),
        deterministic_algorithms=torch.are_deterministic_algorithms_enabled(),
        cudnn_deterministic=bool(backends.cudnn.deterministic),
        cudnn_benchmark=bool(backends.cudnn.benchmark),
        autocast=_autocast(),
        flush_denormal=_flushes_denormals(),
        num_threads=torch.get_num_threads(),
    )


def _told(read: Callable[[], Any]) -> Any:
    """What ``read`` tells; None where this version of PyTorch has no such setting.

    PyTorch refuses to tell by the old names what was set by the new ones, with a RuntimeError.
    """
    try:
        return read()
    except (AttributeError, AssertionError, RuntimeError):
        return None


def _fp32(part: Callable[[], Any], allow_tf32: Callable[[], Any] | None = None) -> str | None:
    """How a part of PyTorch computes in float32, by its new setting, or else by its old one."""
    found = _told(lambda: part().fp32_precision)
    if found is None and allow_tf32 is not None:
        allowed = _told(allow_tf32)
        return None if allowed is None else "tf32" if allowed else "ieee"
    return None if found is None else str(found)


def _flag(name: str) -> bool | None:
    found = _told(lambda: getattr(torch.backends.cuda.matmul, name))
    return None if found is None else bool(found)


def _autocast() -> tuple[str, ...]:
    on = [device for device in ("cpu", "cuda") if torch.is_autocast_enabled(device)]
    return tuple(f"{device}: {_name(torch.get_autocast_dtype(device))}" for device in on)


def _flushes_denormals() -> bool:
    """PyTorch has a function to set it, and none to ask: the half of the smallest normal number tells."""
    smallest = torch.tensor(torch.finfo(torch.float64).tiny, dtype=torch.float64, device="cpu")
    return bool((smallest / 2).item() == 0.0)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _torch_warnings(torch_: TorchPrecision, dtypes: set[str]) -> list[str]:
    lines = []
    in_float32 = not dtypes or bool(dtypes & {"float32", "complex64"})
    if torch_.default_dtype in _HALF:
        lines.append(f"PyTorch makes new tensors in low precision: the default dtype is {torch_.default_dtype}.")
    if torch_.autocast:
        lines.append(f"PyTorch casts to lower precision on its own: autocast is on ({', '.join(torch_.autocast)}).")
    for what, precision, setting in (
        ("matrix products", torch_.mkldnn_matmul, "mkldnn.matmul"),
        ("convolutions", torch_.mkldnn_conv, "mkldnn.conv"),
    ):
        if in_float32 and precision not in (None, "none", "ieee"):
            lines.append(
                f"PyTorch's float32 {what} may run in {_FORMATS.get(str(precision), precision)} on this processor "
                f"(torch.backends.{setting}.fp32_precision is {precision!r})."
            )
    if torch_.flush_denormal:
        lines.append("PyTorch makes zeros of numbers below the smallest normal one (torch.set_flush_denormal(True)).")
    if torch_.cuda_available:
        lines += _tf32_warnings(torch_) if in_float32 else []
        lines += _half_warnings(torch_, dtypes)
        if torch_.cudnn_benchmark and not torch_.deterministic_algorithms:
            lines.append("cuDNN chooses its algorithms by a race, so results may differ from run to run (cudnn.benchmark).")
    return lines


_FORMATS = {"tf32": "TF32", "bf16": "bfloat16"}


def _tf32_warnings(torch_: TorchPrecision) -> list[str]:
    lines = []
    if torch_.cuda_matmul == "tf32":
        lines.append("PyTorch's float32 matrix products run in TF32 on the GPU (torch.backends.cuda.matmul).")
    if torch_.cudnn_conv == "tf32":
        lines.append("PyTorch's float32 convolutions run in TF32 on the GPU (torch.backends.cudnn).")
    return lines


def _half_warnings(torch_: TorchPrecision, dtypes: set[str]) -> list[str]:
    """What is known of 16-bit numbers is said only where there are some: PyTorch adds them up so unless it is told not to."""
    used = {*dtypes, torch_.default_dtype, *(entry.rpartition(": ")[2] for entry in torch_.autocast)}
    lines = []
    for dtype, allowed, name in (
        ("float16", torch_.fp16_reduced_precision_reduction, "allow_fp16_reduced_precision_reduction"),
        ("bfloat16", torch_.bf16_reduced_precision_reduction, "allow_bf16_reduced_precision_reduction"),
    ):
        if allowed and dtype in used:
            lines.append(f"PyTorch may add up {dtype} matrix products in {dtype} on the GPU (torch.backends.cuda.matmul.{name}).")
    if torch_.fp16_accumulation and "float16" in used:
        lines.append("PyTorch adds up float16 matrix products in float16 (torch.backends.cuda.matmul.allow_fp16_accumulation).")
    return lines


# --- NumPy -----------------------------------------------------------------------------------------------------------


def _read_numpy() -> NumpyPrecision:
    built: Any = np.show_config(mode="dicts")
    blas = (built or {}).get("Build Dependencies", {}).get("blas", {}).get("name")
    return NumpyPrecision(np.__version__, None if blas is None else str(blas))


# --- JAX -------------------------------------------------------------------------------------------------------------


def _read_jax() -> JaxPrecision:
    jax = require("jax", "precision_policy with 'jax' in frameworks", "jax")
    config = jax.config
    device = config.jax_default_device
    precision = config.jax_default_matmul_precision
    return JaxPrecision(
        version=jax.__version__,
        enable_x64=bool(config.jax_enable_x64),
        default_matmul_precision=None if precision is None else str(precision),
        platform=jax.default_backend() if device is None else str(getattr(device, "platform", device)),
        default_device=None if device is None else str(device),
        numpy_dtype_promotion=str(config.jax_numpy_dtype_promotion),
        threefry_partitionable=bool(config.jax_threefry_partitionable),
        xla_flags=os.environ.get("XLA_FLAGS"),
    )


def _jax_warnings(jax: JaxPrecision, dtypes: set[str], torch_: TorchPrecision | None) -> list[str]:
    lines = []
    if not jax.enable_x64:
        for wide in sorted(_WIDE.keys() & dtypes):
            lines.append(f"JAX computes in {_WIDE[wide]}: jax_enable_x64 is off, and inputs are {wide}.")
        if torch_ is not None and torch_.default_dtype == "float64" and "float64" not in dtypes:
            lines.append("PyTorch's default dtype is float64, but JAX computes in float32: jax_enable_x64 is off.")
    if jax.default_matmul_precision is None and jax.platform in _LOW_BY_DEFAULT:
        lines.append(
            f"JAX's float32 matrix products may run in {_LOW_BY_DEFAULT[jax.platform]} on this device "
            "(jax_default_matmul_precision is not set; 'highest' keeps float32)."
        )
    elif jax.default_matmul_precision not in (None, "highest", "float32", "F32_F32_F32"):
        lines.append(
            "JAX's float32 matrix products may run in lower precision "
            f"(jax_default_matmul_precision is {jax.default_matmul_precision!r})."
        )
    if not jax.threefry_partitionable:
        lines.append("JAX counts random numbers in the way of before JAX 0.5 (jax_threefry_partitionable is off).")
    if jax.xla_flags is not None and "fast_math=true" in jax.xla_flags.replace(" ", ""):
        lines.append("XLA may reorder sums and ignore NaN (XLA_FLAGS turns fast math on).")
    return lines


_LOW_BY_DEFAULT = {"gpu": "TF32", "cuda": "TF32", "rocm": "TF32", "tpu": "bfloat16"}


# --- both ------------------------------------------------------------------------------------------------------------


def _dtypes_of(inputs: Any) -> set[str]:
    """The names of the dtypes of all arrays in a tree."""
    found = (getattr(leaf, "dtype", None) for leaf in tree.leaves(inputs))
    return {str(dtype).removeprefix("torch.") for dtype in found if dtype is not None}


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(value) if value else "off"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "–" if value is None else str(value)
