"""One documented way each for autograd functions, custom operators and Triton kernels inside a mapped function."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from torchbatch import custom_vjp, custom_vmap, grad, jacrev, jit, jvp, vmap
from torchbatch.testing import assert_close, loop

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

X = torch.linspace(-1, 2, 12).reshape(2, 2, 3)


class Generated(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x**3

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, ct):
        (x,) = ctx.saved_tensors
        return 3 * x**2 * ct

    @staticmethod
    def jvp(ctx, t):
        (x,) = ctx.saved_tensors
        return 3 * x**2 * t


class Written(Generated):
    generate_vmap_rule = False

    @staticmethod
    def vmap(info, in_dims, x):
        return Written.apply(x), in_dims[0]


@pytest.mark.parametrize("function", [Generated, Written])
@pytest.mark.parametrize("run", [lambda f: f, lambda f: jit(f, backend="eager")], ids=["eager", "jit"])
def test_autograd_functions(function, run):
    cube, plain = function.apply, lambda x: x**3
    assert_close(run(vmap(vmap(cube, 1), 1))(X), loop(loop(plain, 1), 1)(X))
    assert_close(run(vmap(grad(lambda x: cube(x).sum())))(X), 3 * X**2)
    assert_close(run(grad(lambda x: vmap(cube)(x).sum()))(X), 3 * X**2)
    assert_close(run(vmap(jacrev(cube)))(X[0]), torch.diag_embed(3 * X[0] ** 2))
    assert_close(run(lambda x: jvp(vmap(cube), (x,), (x,)))(X), (X**3, 3 * X**3))


def rules_of(scale_rows):
    """The function of one sample ``([a], []) -> [a]`` of an operator ``([n, a], [n]) -> [n, a]``."""
    many = custom_vmap(scale_rows)

    @many.def_vmap
    def many_rule(axis_size, in_batched, x, scale):
        x, scale = spread(axis_size, in_batched, x, scale)
        return many(x.flatten(0, 1), scale.flatten(0, 1)).reshape(x.shape), True

    one = custom_vmap(lambda x, scale: scale_rows(x[None], scale[None])[0])

    @one.def_vmap
    def one_rule(axis_size, in_batched, x, scale):
        return many(*spread(axis_size, in_batched, x, scale)), True

    def spread(size, batched, *values):
        return [value if flag else value.expand(size, *value.shape) for value, flag in zip(values, batched, strict=True)]

    made = custom_vjp(one)
    made.defvjp(lambda x, scale: (one(x, scale), (x, scale)), lambda kept, ct: (one(ct, kept[1]), (ct * kept[0]).sum()))
    return made


def check_scaling(made, x):
    scale = torch.linspace(1, 2, 4, device=x.device).reshape(2, 2)
    plain = lambda x, scale: x * scale  # noqa: E731
    assert_close(made(x[0, 0], scale[0, 0]), x[0, 0] * scale[0, 0])
    for run in (lambda f: f, lambda f: jit(f, backend="eager")):
        assert_close(run(vmap(vmap(made)))(x, scale), loop(loop(plain))(x, scale))
        assert_close(run(vmap(made, (0, None)))(x[0], scale[0, 0]), x[0] * scale[0, 0])
        gradient = grad(lambda x, s: made(x, s).square().sum(), (0, 1))
        expected = grad(lambda x, s: plain(x, s).square().sum(), (0, 1))
        assert_close(run(vmap(vmap(gradient)))(x, scale), loop(loop(expected))(x, scale))
        outside = lambda f, m: grad(lambda x, s: m(m(f), (0, None))(x, s).square().sum(), (0, 1))  # noqa: E731
        assert_close(run(outside(made, vmap))(x, scale[0]), outside(plain, loop)(x, scale[0]))


@torch.library.custom_op("torchbatch_tests::scale_rows", mutates_args=())
def scale_rows_op(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(np.asarray(x.numpy() * scale.numpy()[:, None]))


@scale_rows_op.register_fake
def _(x, scale):
    return torch.empty_like(x)


def test_a_custom_operator():
    check_scaling(rules_of(scale_rows_op), X)


if triton is not None:

    @triton.jit
    def scale_kernel(x, scale, out, width: tl.constexpr):
        row, column = tl.program_id(0), tl.arange(0, width)
        tl.store(out + row * width + column, tl.load(x + row * width + column) * tl.load(scale + row))

    @torch.library.custom_op("torchbatch_tests::scale_rows_triton", mutates_args=())
    def scale_rows_triton(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        out = torch.empty(x.shape, device=x.device)
        scale_kernel[(x.shape[0],)](x.contiguous(), scale.contiguous(), out, x.shape[1])
        return out

    @scale_rows_triton.register_fake
    def _(x, scale):
        return torch.empty(x.shape, device=x.device)


@pytest.mark.cuda
@pytest.mark.skipif(triton is None or not torch.cuda.is_available(), reason="needs Triton and a CUDA device")
def test_a_triton_kernel():
    check_scaling(rules_of(scale_rows_triton), X.cuda()[..., :2].contiguous())
