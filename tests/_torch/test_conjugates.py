"""Views of complex numbers that PyTorch makes by a mark on the tensor: a conjugate, and the negative imaginary part of one."""

from __future__ import annotations

import pytest
import torch
from torch._functorch import config as functorch_config

import torchbatch
from torchbatch import grad, jvp, vmap
from torchbatch.errors import UnsupportedOperationError
from torchbatch.testing import assert_close, loop

Z = torch.tensor([[1 + 2j, -3 + 0.5j], [0.0 - 1j, 2 + 2j], [4 - 4j, 0.25j]])
W = torch.tensor([[0.5 - 1j, 2 + 3j], [1 + 0j, -1 - 1j], [3 + 1j, 1 - 2j]])


def written(a, b):
    a = a.clone()
    a.conj().imag.add_(b.real)
    return a


FUNCTIONS = {
    "imaginary part": lambda a, b: a.conj().imag,
    "of a number": lambda a, b: a[0].conj().imag + b[1].conj().imag,
    "negated": lambda a, b: -(a.conj().imag) * b.conj().imag,
    "views of it": lambda a, b: a.conj().imag.flip(0)[:1].expand(3, 1).sum(0) + b.conj().imag.unsqueeze(0).T[1, 0],
    "product with a conjugate": lambda a, b: a * b.conj(),
    "matrix product": lambda a, b: torch.outer(a.conj(), b).conj().imag @ a.conj().imag,
    "resolved": lambda a, b: a.conj().imag.resolve_neg() + torch.view_as_real(b.conj().resolve_conj())[..., 1],
    "a copy": lambda a, b: torch.neg(a.conj().imag.clone()) + a.conj().imag.contiguous(),
    "into a complex number": lambda a, b: torch.complex(a.conj().imag, b.conj().real),
    "absolute value": lambda a, b: a.conj().abs() * b.conj().angle(),
    "written through": written,
}
every_function = pytest.mark.parametrize("f", FUNCTIONS.values(), ids=FUNCTIONS)


def number(out):
    """A real number of a result; not one that treats a number and its conjugate alike."""
    return (out.real.square() + out.real * 2).sum() + (out.imag * out.real * 3).sum() if out.is_complex() else (out**2).sum()


def backward(mapped, a, b):
    a, b = a.clone().requires_grad_(), b.clone().requires_grad_()
    number(mapped(a, b)).backward()
    return a.grad, torch.zeros_like(b) if b.grad is None else b.grad


DERIVATIVES = {
    "values": lambda mapped, a, b: mapped(a, b),
    "backward": backward,
    "grad": lambda mapped, a, b: grad(lambda a, b: number(mapped(a, b)), argnums=(0, 1))(a, b),
    "jvp": lambda mapped, a, b: jvp(mapped, (a, b), (torch.full_like(a, 0.3 + 1j), torch.full_like(b, 1 - 0.7j))),
}


@pytest.fixture(autouse=True)
def no_loops():
    with torchbatch.fallback("error"):
        yield


@every_function
@pytest.mark.parametrize("name", DERIVATIVES)
def test_as_in_the_loop(f, name):
    assert_close(DERIVATIVES[name](vmap(f), Z, W), DERIVATIVES[name](loop(f), Z, W))
    at = {"in_axes": (1, None), "out_axes": -1}
    assert_close(DERIVATIVES[name](vmap(f, **at), Z[:2], W[0]), DERIVATIVES[name](loop(f, **at), Z[:2], W[0]))


@every_function
@pytest.mark.parametrize("name", ["backward", "grad", "jvp"])
def test_derivatives_inside(f, name):
    if name == "backward":
        inner = lambda a, b: torch.func.vjp(f, a, b)[1](torch.ones_like(f(a, b)))  # noqa: E731
    else:
        inner = lambda a, b: DERIVATIVES[name](f, a, b)  # noqa: E731
    assert_close(vmap(inner)(Z, W), loop(inner)(Z, W))


@every_function
@pytest.mark.parametrize("name", DERIVATIVES)
def test_nested(f, name):
    a, b = torch.stack([Z, W * 2]), W
    nested, loops = vmap(vmap(f), in_axes=(0, None)), loop(loop(f), in_axes=(0, None))
    assert_close(DERIVATIVES[name](nested, a, b), DERIVATIVES[name](loops, a, b))


@every_function
def test_traced(f):
    mapped = torchbatch.jit(vmap(f), backend="eager")
    assert_close(mapped(Z, W), loop(f)(Z, W))
    assert_close(backward(mapped, Z, W), backward(loop(f), Z, W))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_traced_gradient(name, request):
    f = FUNCTIONS[name]
    if name == "written through":
        why = "a gradient inside of a trace, of what is written through a view of another dtype, vmap or not"
        request.applymarker(pytest.mark.xfail(reason=why, strict=True, raises=UnsupportedOperationError))
    gradient = torchbatch.jit(lambda a, b: DERIVATIVES["grad"](vmap(f), a, b), backend="eager")
    assert_close(gradient(Z, W), DERIVATIVES["grad"](loop(f), Z, W))


@pytest.mark.parametrize("name", ["imaginary part", "product with a conjugate", "matrix product"])
def test_compiled(name):
    f = FUNCTIONS[name]
    torch._dynamo.reset()
    compiled = torch.compile(lambda a, b: vmap(f)(a, b), backend="aot_eager", fullgraph=True)
    with functorch_config.patch(enable_autograd_cache=False):
        assert_close(compiled(Z, W), loop(f)(Z, W))
        assert_close(backward(compiled, Z, W), backward(loop(f), Z, W))


def test_it_is_a_view():
    z = Z.clone()
    assert vmap(lambda a: a.conj().imag)(z).untyped_storage().data_ptr() == z.untyped_storage().data_ptr()
    vmap(lambda a: a.conj().imag.mul_(2))(z)
    assert_close(z, torch.complex(Z.real, 2 * Z.imag))


def test_marks_are_seen_inside():
    def marks(a):
        assert a.conj().is_conj() and a.conj().imag.is_neg() and not a.conj().imag.resolve_neg().is_neg()
        return a.imag

    vmap(marks)(Z)


def test_an_empty_batch():
    assert_close(vmap(lambda a: a.conj().imag)(Z[:0]), Z[:0].imag)


def test_pytorchs_own_vmap_too():
    assert_close(torch.func.vmap(lambda a: a.conj().imag)(Z), -Z.imag)
