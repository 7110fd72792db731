"""The precision policy: every setting is read as it is, and what makes results differ is said in a plain sentence."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from torchbatch.errors import AxisSpecError
from torchbatch.testing.precision import JaxPrecision, PrecisionPolicy, TorchPrecision, precision_policy

QUIET = TorchPrecision(
    version="2.13.0",
    default_dtype="float32",
    float32_matmul_precision="highest",
    cuda_available=True,
    cuda_matmul="none",
    cudnn_conv="ieee",
    mkldnn_matmul="none",
    mkldnn_conv="none",
    fp16_reduced_precision_reduction=False,
    bf16_reduced_precision_reduction=False,
    fp16_accumulation=False,
    deterministic_algorithms=True,
    cudnn_deterministic=True,
    cudnn_benchmark=False,
    autocast=(),
    flush_denormal=False,
    num_threads=1,
)
QUIET_JAX = JaxPrecision(
    version="0.10.2",
    enable_x64=True,
    default_matmul_precision=None,
    platform="cpu",
    default_device=None,
    numpy_dtype_promotion="standard",
    threefry_partitionable=True,
    xla_flags=None,
)


@contextlib.contextmanager
def setting(set_, value, before):
    set_(value)
    try:
        yield
    finally:
        set_(before)


# --- what is read ----------------------------------------------------------------------------------------------------


def test_what_pytorch_computes_with():
    found = precision_policy(["torch"]).torch
    assert found.version == torch.__version__
    assert found.default_dtype == "float32"
    assert found.float32_matmul_precision == "highest"
    assert found.num_threads == torch.get_num_threads()
    assert found.cuda_matmul in ("none", "ieee") and found.mkldnn_matmul in (None, "none", "ieee")
    assert found.autocast == () and not found.flush_denormal and not found.deterministic_algorithms


CHANGES = {
    "default_dtype": (torch.set_default_dtype, torch.float64, torch.float32, "float64"),
    "flush_denormal": (torch.set_flush_denormal, True, False, True),
    "deterministic_algorithms": (torch.use_deterministic_algorithms, True, False, True),
    "float32_matmul_precision": (torch.set_float32_matmul_precision, "medium", "highest", "medium"),
    "cuda_matmul": (torch.set_float32_matmul_precision, "high", "highest", "tf32"),
    "mkldnn_matmul": (torch.set_float32_matmul_precision, "medium", "highest", "bf16"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_setting_of_pytorch_is_seen(name):
    set_, value, before, expected = CHANGES[name]
    if name == "flush_denormal" and not torch.set_flush_denormal(False):
        pytest.skip("this processor has no such setting")
    assert getattr(precision_policy(["torch"]).torch, name) != expected
    with setting(set_, value, before):
        assert getattr(precision_policy(["torch"]).torch, name) == expected


def test_flags_of_the_gpu_are_seen_without_one():
    matmul = torch.backends.cuda.matmul
    for name in ("fp16_reduced_precision_reduction", "bf16_reduced_precision_reduction", "fp16_accumulation"):
        for value in (True, False):
            before = getattr(matmul, f"allow_{name}")
            with setting(lambda on, name=name: setattr(matmul, f"allow_{name}", on), value, before):
                assert getattr(precision_policy(["torch"]).torch, name) is value


def test_autocast_is_seen():
    with torch.autocast("cpu", torch.bfloat16):
        assert precision_policy(["torch"]).torch.autocast == ("cpu: bfloat16",)


def test_old_and_new_names_of_tf32_mixed():
    """PyTorch refuses to tell some of them then."""
    code = """
import torch
from torchbatch.testing.precision import precision_policy
torch.backends.cuda.matmul.fp32_precision = "tf32"
torch.backends.mkldnn.matmul.fp32_precision = "bf16"
found = precision_policy().torch
print(found.cuda_matmul, found.mkldnn_matmul, found.float32_matmul_precision)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout in ("tf32 bf16 None\n", "tf32 bf16 high\n", "tf32 bf16 medium\n"), done.stderr


def test_what_numpy_computes_with():
    found = precision_policy(["numpy"])
    assert found.torch is None and found.jax is None
    assert found.numpy.version == np.__version__ and (found.numpy.blas is None or isinstance(found.numpy.blas, str))


def test_what_jax_computes_with(monkeypatch):
    jax = pytest.importorskip("jax")
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=false")
    found = precision_policy(["jax"]).jax
    assert found.version == jax.__version__ and found.platform == "cpu" and found.xla_flags == "--xla_cpu_enable_fast_math=false"
    assert found.default_matmul_precision is None and found.default_device is None
    assert found.numpy_dtype_promotion == "standard"
    for x64 in (True, False):
        before = jax.config.jax_enable_x64
        with setting(lambda on: jax.config.update("jax_enable_x64", on), x64, before):
            assert precision_policy(["jax"]).jax.enable_x64 is x64
    with jax.default_matmul_precision("bfloat16"), jax.numpy_dtype_promotion("strict"), jax.default_device(jax.devices()[0]):
        found = precision_policy(["jax"]).jax
    assert found.default_matmul_precision == "bfloat16" and found.numpy_dtype_promotion == "strict"
    assert found.default_device == str(jax.devices()[0]) and found.platform == "cpu"


def test_jax_is_recorded_where_it_has_been_imported(monkeypatch):
    pytest.importorskip("jax")
    assert precision_policy().jax is not None
    monkeypatch.delitem(sys.modules, "jax")
    assert precision_policy().jax is None
    assert precision_policy().torch is not None and precision_policy().numpy is not None


def test_without_jax(monkeypatch):
    monkeypatch.setitem(sys.modules, "jax", None)
    assert precision_policy().jax is None
    with pytest.raises(ImportError) as error:
        precision_policy(("torch", "jax"))
    assert str(error.value) == (
        "precision_policy with 'jax' in frameworks needs JAX, which is not installed: pip install 'torchbatch[jax]'."
    )


def test_unknown_framework():
    with pytest.raises(AxisSpecError, match=r"frameworks may hold 'torch', 'numpy' and 'jax', but it holds 'tensorflow'\."):
        precision_policy(["torch", "tensorflow"])
    assert precision_policy("numpy").torch is None


# --- how it is shown -------------------------------------------------------------------------------------------------


def test_a_policy_is_a_value():
    policy = PrecisionPolicy(torch=QUIET, jax=QUIET_JAX)
    assert policy == PrecisionPolicy(torch=QUIET, jax=QUIET_JAX) and hash(policy) == hash(PrecisionPolicy(QUIET, None, QUIET_JAX))
    with pytest.raises(dataclasses.FrozenInstanceError):
        policy.torch = None


def test_json_keeps_everything():
    policy = PrecisionPolicy(
        torch=dataclasses.replace(QUIET, autocast=("cpu: bfloat16",)),
        jax=QUIET_JAX,
        environment=(("NVIDIA_TF32_OVERRIDE", "1"),),
    )
    found = policy.to_dict()
    assert json.loads(json.dumps(found)) == found
    assert list(found) == ["torch", "jax", "environment"]
    assert found["torch"]["autocast"] == ["cpu: bfloat16"] and found["jax"]["enable_x64"] is True
    assert found["environment"] == {"NVIDIA_TF32_OVERRIDE": "1"}
    assert set(found["torch"]) == {field.name for field in dataclasses.fields(TorchPrecision)}


def test_the_table():
    policy = PrecisionPolicy(torch=dataclasses.replace(QUIET, cudnn_conv=None, autocast=("cpu: bfloat16",)), jax=QUIET_JAX)
    lines = str(policy).splitlines()
    assert lines[:3] == ["torch", "  version                           2.13.0", "  default_dtype                     float32"]
    assert "  cuda_available                    yes" in lines
    assert "  cudnn_conv                        –" in lines
    assert "  autocast                          cpu: bfloat16" in lines
    assert "  default_matmul_precision          –" in lines
    assert max(map(len, lines)) < 60 and all(lines)
    assert "  autocast                          off" in str(PrecisionPolicy(torch=QUIET)).splitlines()


# --- what is said about it -------------------------------------------------------------------------------------------


def test_nothing_is_said_where_everything_is_exact():
    assert PrecisionPolicy(torch=QUIET, jax=QUIET_JAX).warnings() == []
    assert PrecisionPolicy().warnings([torch.zeros(1, dtype=torch.float64)]) == []


TORCH_WARNINGS = {
    "default_dtype": ("bfloat16", "PyTorch makes new tensors in low precision: the default dtype is bfloat16."),
    "autocast": (
        ("cpu: bfloat16", "cuda: float16"),
        "PyTorch casts to lower precision on its own: autocast is on (cpu: bfloat16, cuda: float16).",
    ),
    "mkldnn_matmul": (
        "bf16",
        "PyTorch's float32 matrix products may run in bfloat16 on this processor (torch.backends.mkldnn.matmul.fp32_precision is "
        "'bf16').",
    ),
    "mkldnn_conv": (
        "tf32",
        "PyTorch's float32 convolutions may run in TF32 on this processor (torch.backends.mkldnn.conv.fp32_precision is 'tf32').",
    ),
    "flush_denormal": (
        True,
        "PyTorch makes zeros of numbers below the smallest normal one (torch.set_flush_denormal(True)).",
    ),
    "cuda_matmul": ("tf32", "PyTorch's float32 matrix products run in TF32 on the GPU (torch.backends.cuda.matmul)."),
    "cudnn_conv": ("tf32", "PyTorch's float32 convolutions run in TF32 on the GPU (torch.backends.cudnn)."),
    "fp16_reduced_precision_reduction": (
        True,
        "PyTorch may add up float16 matrix products in float16 on the GPU "
        "(torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction).",
    ),
    "bf16_reduced_precision_reduction": (
        True,
        "PyTorch may add up bfloat16 matrix products in bfloat16 on the GPU "
        "(torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction).",
    ),
    "fp16_accumulation": (
        True,
        "PyTorch adds up float16 matrix products in float16 (torch.backends.cuda.matmul.allow_fp16_accumulation).",
    ),
}
OF_HALVES = {name for name in TORCH_WARNINGS if name.startswith(("fp16", "bf16"))}
ON_GPUS = {"cuda_matmul", "cudnn_conv", *OF_HALVES}


@pytest.mark.parametrize("name", TORCH_WARNINGS)
def test_a_sentence_for_each_setting_of_pytorch(name):
    value, sentence = TORCH_WARNINGS[name]
    changed = dataclasses.replace(QUIET, **{name: value})
    inputs = torch.zeros(1), torch.zeros(1, dtype=torch.float16), torch.zeros(1, dtype=torch.bfloat16)
    assert PrecisionPolicy(torch=changed).warnings(inputs) == [sentence]
    without_gpu = PrecisionPolicy(torch=dataclasses.replace(changed, cuda_available=False)).warnings(inputs)
    assert without_gpu == ([] if name in ON_GPUS else [sentence])
    assert PrecisionPolicy(torch=changed).warnings() == ([] if name in OF_HALVES else [sentence])


@pytest.mark.parametrize("name", ["cuda_matmul", "cudnn_conv", "mkldnn_matmul", "mkldnn_conv"])
def test_the_format_of_float32_products_concerns_float32(name):
    policy = PrecisionPolicy(torch=dataclasses.replace(QUIET, **{name: "tf32"}))
    assert len(policy.warnings()) == len(policy.warnings(torch.zeros(1, dtype=torch.complex64))) == 1
    assert policy.warnings([torch.zeros(1, dtype=torch.float64), np.zeros(1, np.float16)]) == []


def test_sums_of_16_bit_numbers_concern_those_of_autocast_too():
    policy = PrecisionPolicy(torch=dataclasses.replace(QUIET, fp16_accumulation=True, autocast=("cuda: float16",)))
    assert len(policy.warnings(torch.zeros(1))) == 2


def test_a_race_of_algorithms_matters_where_they_need_not_be_deterministic():
    racing = dataclasses.replace(QUIET, cudnn_benchmark=True)
    assert PrecisionPolicy(torch=racing).warnings() == []
    assert PrecisionPolicy(torch=dataclasses.replace(racing, deterministic_algorithms=False)).warnings() == [
        "cuDNN chooses its algorithms by a race, so results may differ from run to run (cudnn.benchmark)."
    ]


JAX_WARNINGS = [
    (
        {"platform": "gpu"},
        "JAX's float32 matrix products may run in TF32 on this device (jax_default_matmul_precision is not set; 'highest' keeps "
        "float32).",
    ),
    (
        {"platform": "tpu"},
        "JAX's float32 matrix products may run in bfloat16 on this device (jax_default_matmul_precision is not set; 'highest' "
        "keeps float32).",
    ),
    (
        {"default_matmul_precision": "bfloat16"},
        "JAX's float32 matrix products may run in lower precision (jax_default_matmul_precision is 'bfloat16').",
    ),
    (
        {"threefry_partitionable": False},
        "JAX counts random numbers in the way of before JAX 0.5 (jax_threefry_partitionable is off).",
    ),
    (
        {"xla_flags": "--xla_cpu_enable_fast_math=true"},
        "XLA may reorder sums and ignore NaN (XLA_FLAGS turns fast math on).",
    ),
]


@pytest.mark.parametrize(("change", "sentence"), JAX_WARNINGS)
def test_a_sentence_for_each_setting_of_jax(change, sentence):
    assert PrecisionPolicy(jax=dataclasses.replace(QUIET_JAX, **change)).warnings() == [sentence]


def test_full_precision_of_a_gpu_is_fine():
    for precision in ("highest", "float32"):
        settings = dataclasses.replace(QUIET_JAX, platform="gpu", default_matmul_precision=precision)
        assert PrecisionPolicy(jax=settings).warnings() == []


def test_jax_narrows_what_it_is_given():
    narrow = PrecisionPolicy(torch=QUIET, jax=dataclasses.replace(QUIET_JAX, enable_x64=False))
    inputs = {"x": torch.zeros(1, dtype=torch.float64), "n": [np.zeros(1, np.int64), 3, None], "y": torch.zeros(1)}
    assert narrow.warnings() == [] == narrow.warnings(torch.zeros(1))
    assert narrow.warnings(inputs) == [
        "JAX computes in float32: jax_enable_x64 is off, and inputs are float64.",
        "JAX computes in int32: jax_enable_x64 is off, and inputs are int64.",
    ]
    assert PrecisionPolicy(torch=QUIET, jax=QUIET_JAX).warnings(inputs) == []
    wide = dataclasses.replace(narrow, torch=dataclasses.replace(QUIET, default_dtype="float64"))
    assert wide.warnings() == ["PyTorch's default dtype is float64, but JAX computes in float32: jax_enable_x64 is off."]
    assert len(wide.warnings(inputs)) == 2


def test_environment_variables_that_overrule_settings(monkeypatch):
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "1")
    policy = precision_policy(["numpy"])
    assert policy.environment == (("NVIDIA_TF32_OVERRIDE", "1"),)
    assert policy.warnings() == ["The environment variable NVIDIA_TF32_OVERRIDE=1 overrules settings."]
