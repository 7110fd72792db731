"""What do loops cost: ``scan``, ``while_loop`` and ``associative_scan`` of a whole batch, under jit?

    python benchmarks/lax_loops.py [--device cuda] [--quick] [--repeats N] [--only TEXT] [--json FILE] [--plot FILE]

The scans have 1,000 steps: of 10,000 numbers each, where the work of a step counts, and of 32 states of 16 numbers, where its
overhead does. The loop is Newton's method for 10,000 cube roots, which take from 1 to 24 iterations each. The associative scan
is a linear recurrence of 100 steps, 10,000 times. By hand is a Python loop over tensors of the whole batch; its gradient is
autograd's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import contenders
import jax
import jax.numpy as jnp
import torch
from contenders import Work

import torchbatch
from torchbatch import lax

STEPS, BATCH = 1000, 10_000
ASKED = {"jax": 1.0}
Function = Callable[..., Any]


def calls(ours: Function, in_jax: Function, by_hand: Function, args: tuple[Any, ...], eager: bool = True) -> dict[str, Any]:
    """The calls of one function; without jit, ours runs its loops in Python."""
    jitted = torchbatch.jit(ours)
    found = {"jit": lambda: jitted(*args), "by hand": lambda: by_hand(*args), "jax": contenders.jax_call(in_jax, args)}
    return {**found, "eager": lambda: ours(*args)} if eager else found


def gradients(fun: Function) -> Function:
    """The gradient of the sum of the outputs by both arguments, recorded by autograd."""

    def found(w: torch.Tensor, xs: torch.Tensor) -> Any:
        leaves = w.detach().requires_grad_(), xs.detach().requires_grad_()
        return torch.autograd.grad(fun(*leaves).sum(), leaves)

    return found


# --- scan ------------------------------------------------------------------------------------------------------------


def scanned(m: Any, cell: Function, start: Function, unroll: int) -> Function:
    """The last state of one sample: ``(w, [steps, ...]) -> [...]``."""
    return lambda w, xs: m.scan(lambda h, x: (cell(w, h, x), None), start(xs), xs, unroll=unroll)[0]


def looped(cell: Function) -> Function:
    """The last states of all samples, by hand."""

    def run(w: torch.Tensor, xs: torch.Tensor) -> torch.Tensor:
        h = torch.zeros_like(xs[:, 0])
        for x in xs.unbind(1):
            h = cell(w, h, x)
        return h

    return run


CELLS: dict[str, tuple[Function, Function, Function]] = {  # of one sample, in JAX, of all samples
    "numbers": (
        lambda w, h, x: torch.tanh(w * h + x),
        lambda w, h, x: jnp.tanh(w * h + x),
        lambda w, h, x: torch.tanh(w * h + x),
    ),
    "states": (
        lambda w, h, x: torch.tanh(w @ h + x),
        lambda w, h, x: jnp.tanh(w @ h + x),
        lambda w, h, x: torch.tanh(h @ w.T + x),
    ),
}


def scans(device: str) -> Iterator[Work]:
    """Forward and gradient, with one and with eight steps at once."""
    sizes = {
        "numbers": (torch.tensor(0.9), torch.randn(BATCH, STEPS)),
        "states": (torch.randn(16, 16) / 4, torch.randn(32, STEPS, 16)),
    }
    for name, (w, xs) in sizes.items():
        args = (w.to(device), xs.to(device) / 2)
        one, one_jax, all_of_them = CELLS[name]
        for unroll in (1, 8):
            ours = torchbatch.vmap(scanned(lax, one, lambda xs: torch.zeros_like(xs[0]), unroll), (None, 0))
            theirs = jax.vmap(scanned(jax.lax, one_jax, lambda xs: jnp.zeros_like(xs[0]), unroll), (None, 0))
            by_hand, first = looped(all_of_them), unroll == 1
            yield Work(f"scan of {name}, unroll={unroll}", calls(ours, theirs, by_hand, args, first), ASKED, 1e-4)
            yield Work(
                f"scan of {name}, gradient, unroll={unroll}",
                calls(*(of(fun) for of, fun in ((summed, ours), (summed_jax, theirs), (gradients, by_hand))), args, first),
                ASKED,
                1e-3,
            )


def summed(fun: Function) -> Function:
    """The gradient of the sum of the outputs by both arguments."""
    return torchbatch.grad(lambda w, xs: fun(w, xs).sum(), (0, 1))


def summed_jax(fun: Function) -> Function:
    """The same in JAX."""
    return jax.grad(lambda w, xs: fun(w, xs).sum(), (0, 1))


# --- while_loop ------------------------------------------------------------------------------------------------------


def root(m: Any) -> Function:
    """The cube root of one number."""
    return lambda a: m.while_loop(lambda x: abs(x * x * x - a) > 1e-4 * a, lambda x: (2 * x + a / (x * x)) / 3, 0 * a + 1)


def roots(a: torch.Tensor) -> torch.Tensor:
    """The cube roots of many, by hand."""
    x = torch.ones_like(a)
    active = (x * x * x - a).abs() > 1e-4 * a
    while active.any():
        x = torch.where(active, (2 * x + a / (x * x)) / 3, x)
        active = (x * x * x - a).abs() > 1e-4 * a
    return x


# --- associative_scan ------------------------------------------------------------------------------------------------


def combined(left: Any, right: Any) -> Any:
    """Two steps ``x -> a x + b`` as one."""
    return left[0] * right[0], left[1] * right[0] + right[1]


def recurrence(m: Any) -> Function:
    """All values of ``x[i] = a[i] x[i - 1] + b[i]``, from 0."""
    return lambda a, b: m.associative_scan(combined, (a, b))[1]


def recurrences(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The same for a whole batch, by hand."""
    x, found = torch.zeros_like(b[:, 0]), []
    for i in range(a.shape[1]):
        x = torch.addcmul(b[:, i], a[:, i], x)
        found.append(x)
    return torch.stack(found, 1)


def works(device: str) -> Iterator[Work]:
    """All rows."""
    torch.manual_seed(0)
    yield from scans(device)
    a = torch.logspace(-6, 6, BATCH, device=device)
    yield Work("while_loop, cube roots", calls(torchbatch.vmap(root(lax)), jax.vmap(root(jax.lax)), roots, (a,)), ASKED, 1e-3)
    args = torch.rand(BATCH, 100, device=device), torch.randn(BATCH, 100, device=device)
    ours, theirs = torchbatch.vmap(recurrence(lax)), jax.vmap(recurrence(jax.lax))
    yield Work("associative_scan, recurrence", calls(ours, theirs, recurrences, args), ASKED, 1e-4)


if __name__ == "__main__":
    options = contenders.options(__doc__)
    contenders.run(works(options.device), options)
