"""Which reference ``check_equivalent`` believes; and its options, and where versions part that have loops or constants."""

import numpy as np
import pytest
import torch

import torchbatch
from torchbatch import lax, random
from torchbatch.errors import AxisSpecError, GradientTypeError
from torchbatch.testing import check_equivalent, first_divergence

jax = pytest.importorskip("jax")
jnp = jax.numpy
X = torch.linspace(-1, 2, 6)


def check(versions, *args, **options):
    return check_equivalent(versions, *args, raise_on_failure=False, **options)


# --- draws by keys ---------------------------------------------------------------------------------------------------


def jax_noisy(key, x):
    return x + 0.01 * jax.random.normal(jax.random.split(key)[0], x.shape)


def noisy(place):
    return lambda key, x: x + 0.01 * random.normal(random.split(key)[place], x.shape)


@pytest.mark.parametrize("trusted", ["jax", "torch"])
def test_numbers_drawn_by_another_key_are_found(trusted):
    """In float64 both draw other numbers: as a reference it would excuse any."""
    wrong, right = ({"jax": jax_noisy, "torch": noisy(place)} for place in (1, 0))
    report = check(wrong, random.key(3), X, transforms=["value"], against=trusted)
    assert [one.problem for one in report.failures] == ["values"]
    assert any("it draws random numbers" in note and "random)" in note for note in report.notes)
    assert check(right, random.key(3), X, transforms=["value", "vjp"], against=trusted).passed


def test_draws_inside_transforms_are_seen():
    keys = random.split(random.key(0), 3)
    versions = {"jax": jax.jit(jax_noisy), "torch": noisy(1)}
    assert not check(versions, keys, torch.ones(3, 4), transforms=["vmap"]).passed
    assert not check({"torch": noisy(0), "torch b": noisy(1)}, keys, torch.ones(3, 4), transforms=["vmap"]).passed


# --- steps -----------------------------------------------------------------------------------------------------------

GRID = torch.arange(-126, 127) / 254


def test_a_reference_that_chooses_otherwise_excuses_nothing():
    """Half of the numbers are ties in float32 and none in float64."""
    scale = np.float32(127)
    versions = {"jax": lambda x: jnp.round(x * scale) / scale, "torch": lambda x: torch.floor(x * 127 + 0.5) / 127}
    report = check(versions, GRID, transforms=["value"])
    assert [one.problem for one in report.failures] == ["values"]
    assert "in float64 jax gives another result" in report.notes[0]
    assert "reference" not in report.failures[0].message
    versions["torch"] = lambda x: torch.round(x * 127) / 127
    assert check(versions, GRID, transforms=["value"]).passed


def test_the_reference_of_an_ill_conditioned_problem_is_believed():
    hilbert = 1 / (torch.arange(6)[:, None] + torch.arange(6) + 1)
    versions = {"jax": jnp.linalg.solve, "torch": torch.linalg.solve}
    report = check(versions, hilbert, torch.ones(6), transforms=["value"])
    assert report.passed and not report.notes


def test_numbers_of_16_bits_on_the_way_are_no_step():
    narrow = {
        "torch": lambda x, w: (x.bfloat16() @ w.bfloat16()).float(),
        "torch b": lambda x, w: torch.einsum("ij,jk->ik", x.to(torch.bfloat16), w.to(torch.bfloat16)).float(),
    }
    draw = torch.Generator().manual_seed(0)
    x, w = (torch.randn(shape, generator=draw) for shape in ((32, 64), (64, 32)))
    report = check(narrow, x, w, transforms=["value"])
    assert report.passed and not report.notes


# --- references that fail, and their names ----------------------------------------------------------------------------


def wants_float32(x):
    assert x.dtype == torch.float32
    return x * 2


LOOKED_UP = {torch.float32: 2}


@pytest.mark.parametrize(
    ("fun", "said"), [(wants_float32, "AssertionError"), (lambda x: x * LOOKED_UP[x.dtype], "KeyError: torch.float64")]
)
def test_a_function_that_fails_in_float64_has_no_reference(fun, said):
    report = check({"torch": fun, "jax": lambda x: x * 2}, X, transforms=["value"])
    assert report.passed and report.notes[0].startswith(f"There is no reference for values: in float64 it raises {said}")


def test_functions_that_jax_cannot_trace():
    versions = {"jax": lambda x: x[x > 0].sum(), "numpy": lambda x: x[x > -0.5].sum()}
    (found,) = check(versions, X, transforms=["value"]).failures
    assert found.run == "numpy" and "the float64 reference says that numpy is off" in found.message
    versions["jax b"] = versions.pop("numpy")
    report = check(versions, X, transforms=["value"])
    assert "Where jax b and jax part is not known: NonConcreteBooleanIndexError" in report.notes[-1]


@pytest.mark.parametrize(("reference", "name"), [("mpmath", "mpmath"), (np.exp, "given"), ("float64", "float64")])
def test_the_reference_that_blames_is_named(reference, name):
    versions = {"torch": torch.exp, "numpy": lambda x: np.exp(x) * np.float32(1.001)}
    report = check(versions, X, transforms=["value"], reference=reference)
    assert report.failures[0].message.endswith(f"; the {name} reference says that numpy is off")
    assert report.failures[0].reference == f"{name} reference"


# --- options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"transforms": 3}, "transforms must be a tuple of names, but it is 3"),
        ({"transforms": [3]}, "transforms holds 3; known are 'value'"),
        ({"argnums": "x"}, "argnums must be an int or a tuple of ints, but it is 'x'"),
        ({"argnums": 0.5}, "argnums must be an int or a tuple of ints, but it is 0.5"),
        ({"tolerance": 1e-3}, r"tolerance must be a Tolerance\(rtol, atol\) or None, but it is 0.001"),
        ({"seed": "a"}, "seed must be a whole number from 0 up, but it is 'a'"),
        ({"seed": -1}, "seed must be a whole number from 0 up, but it is -1"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(AxisSpecError, match=f"check_equivalent: {message}"):
        check({"torch": torch.sin, "jax": jnp.sin}, X, **options)


def test_has_aux_needs_a_pair():
    """Both gradients would fail, and be skipped."""
    for transforms in (None, ["value"], ["vjp"]):
        with pytest.raises(GradientTypeError, match=r"needs functions that return \(output, aux\), but torch returns float32"):
            check({"torch": torch.sum, "jax": jnp.sum}, X, has_aux=True, transforms=transforms)
    versions = {"torch": lambda x: (x.sum(), x), "jax": lambda x: (x.sum(), x)}
    assert check(versions, X, has_aux=True).passed


# --- where they part -------------------------------------------------------------------------------------------------


def running(weights, xs):
    return lax.scan(lambda carry, x: ((carry + x) * weights, carry), torch.zeros(3), xs)[1]


def running_late(weights, xs):
    return lax.scan(lambda carry, x: (carry * weights + x, carry), torch.zeros(3), xs)[1]


def test_loops_are_one_step():
    found = first_divergence(running, running_late, torch.full((3,), 0.5), torch.ones(4, 3))
    assert found.first.operation == "aten.run" and "(carry + x) * weights" in found.first.line.text


def test_a_graph_keeps_its_loops():
    weights, xs = torch.full((3,), 0.5), torch.ones(4, 3)
    module = torchbatch.make_graph(running)(weights, xs).module
    torch.testing.assert_close(module(weights, xs)[0], running(weights, xs), rtol=0, atol=0)


def test_texts_and_numbers_are_constants_where_versions_part():
    def folded(x, rows, kind):
        return x.reshape(rows, -1).sum(0 if kind == "columns" else 1)

    def doubled(x, rows, kind):
        return 2 * folded(x, rows, kind)

    found = first_divergence(folded, ("jax", doubled), X, 2, "columns")
    assert found.first.operation == "aten.sum" and found.second.operation == "mul"


def test_only_numbers_of_one_kind_are_compared_where_versions_part():
    found = first_divergence(torch.nanmean, ("jax", jnp.mean), torch.tensor([1.0, torch.nan, 3.0]))
    assert "instead of nan" in found.difference.message and "dtype" not in found.difference.message


def test_what_is_nan_in_one_version_only_is_in_no_other_order():
    norms = torchbatch.grad(torch.linalg.vector_norm), ("jax", jax.grad(jnp.linalg.norm))
    found = first_divergence(*norms, torch.zeros(3))
    assert "instead of nan" in found.difference.message and not found.hint
