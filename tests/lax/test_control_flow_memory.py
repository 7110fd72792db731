"""Long loops hold the memory of one step: as they stand and traced, in forward mode, mapped, inside a choice."""

from __future__ import annotations

import os
import resource

import pytest
import torch

import torchbatch
from torchbatch import lax, vmap

LONG = os.environ.get("HYPOTHESIS_PROFILE") == "long"
STEPS = 100_000 if LONG else 500
KEPT = 400_000_000  # bytes, if each step kept what it carries
ALLOWED = KEPT // 3


def step(c):
    return torch.sin(c) + c


LOOPS = {
    "scan": lambda x: lax.scan(lambda c, _: (step(c), None), x, None, length=STEPS)[0],
    "while_loop": lambda x: lax.while_loop(lambda s: s[0] < STEPS, lambda s: (s[0] + 1, step(s[1])), (0, x))[1],
    "fori_loop": lambda x: lax.fori_loop(0, STEPS, lambda i, c: step(c), x),
    "while_loop, mapped": lambda x: vmap(LOOPS["while_loop"])(x[None])[0],
    "scan in a choice": lambda x: vmap(lambda y: lax.cond(y.sum() > 1e9, lambda: y, lambda: LOOPS["scan"](y)))(x[None])[0],
}
MODES = {
    "values": lambda fun: fun,
    "forward mode": lambda fun: lambda x: torchbatch.jvp(fun, (x,), (x,))[1],
}


def peak():
    """The most memory that this process ever held, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@pytest.mark.parametrize("backend", [None, "eager"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", LOOPS)
def test_memory_does_not_grow_with_the_number_of_steps(name, mode, backend):
    fun = MODES[mode](LOOPS[name])
    fun = fun if backend is None else torchbatch.jit(fun, backend=backend)
    x = torch.full((KEPT // 4 // STEPS,), 0.5)
    before = peak()
    result = fun(x)
    assert peak() - before < ALLOWED
    assert result.shape == x.shape


def test_the_gradient_of_a_traced_scan_keeps_the_carries_alone():
    """As it stands, a scan needs ``checkpoint`` for that: see test_checkpoint_in_scan_keeps_only_the_carries."""
    x = torch.tensor(0.5, requires_grad=True)

    def slope(width):
        wide = torch.linspace(0, 1, width)
        step = lambda c, _: (torch.sin(c * wide).square().mean() + c, None)  # noqa: E731
        found = torchbatch.jit(lambda x: lax.scan(torchbatch.checkpoint(step), x, None, length=STEPS)[0], backend="eager")
        return torch.autograd.grad(found(x), x)[0]

    slope(4)  # loads what a trace needs
    before = peak()
    assert slope(KEPT // 4 // STEPS) > 1
    assert peak() - before < ALLOWED  # the products alone would take KEPT
