"""What do per-example gradients, their norms and their clipped sum cost, next to the ordinary backward pass of a batch?

    python benchmarks/per_example_gradients.py [--device cuda] [--quick] [--repeats N] [--only TEXT] [--json FILE]

Contenders: Opacus (hooks, functorch mode, ghost clipping), BackPACK, torch.func, torch.compile of it, and JAX. All give the same
numbers before they are timed. Memory is the system's, asked for and given back as in any program. What a contender has no form
of its own for is computed from its per-example gradients. On the CPU, then the memory: in a fresh process for each contender, by
how much the peak of the resident memory grows in one call.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import contenders
import jax
import jax.numpy as jnp
import peak_memory
import per_example_models
import side_by_side
import torch
import torch.nn.functional as F
from backpack import backpack, extend
from backpack.extensions import BatchGrad
from opacus.grad_sample import GradSampleModule, GradSampleModuleFastGradientClipping
from per_example_models import Network

from torchbatch import per_example

Call = Callable[[], Any]
Tensors = dict[str, torch.Tensor]
BOUND = 0.5
SLOW = 3.0  # seconds; a contender that takes longer is left out of the rounds
QUANTITIES = ("gradients", "norms", "clipped sum")
OURS, FLOOR = "torchbatch", "backward"


# --- from per-example gradients to the quantities ---------------------------------------------------------------------


def reduced(quantity: str, found: Tensors) -> Any:
    """What is asked for, from the gradients of each example."""
    if quantity == "gradients":
        return found
    square = sum((g * g).flatten(1).sum(1) for g in found.values())
    if quantity == "norms":
        return square.sqrt()  # type: ignore[union-attr]
    factor = (BOUND / square.sqrt()).clamp(max=1)  # type: ignore[union-attr]
    return {name: torch.einsum("b,b...->...", factor, g) for name, g in found.items()}


def reduced_in_jax(quantity: str, found: Any) -> Any:
    """The same in JAX."""
    if quantity == "gradients":
        return found
    square = sum((g * g).reshape(len(g), -1).sum(1) for g in found.values())
    if quantity == "norms":
        return jnp.sqrt(square)
    factor = jnp.minimum(BOUND / jnp.sqrt(square), 1)
    return {name: jnp.einsum("b,b...->...", factor, g) for name, g in found.items()}


# --- the contenders ----------------------------------------------------------------------------------------------------


def ours(network: Network, quantity: str, x: torch.Tensor, y: torch.Tensor) -> Call:
    """torchbatch.per_example, compiled."""
    makers: dict[str, Any] = {"gradients": per_example.gradients, "norms": per_example.norms}
    if quantity == "clipped sum":
        run = per_example.clipped_sum(network.module, F.cross_entropy, max_norm=BOUND, compile=True)
    else:
        run = makers[quantity](network.module, F.cross_entropy, compile=True)
    return lambda: run(x, y)


def backward(network: Network, x: torch.Tensor, y: torch.Tensor) -> Call:
    """The ordinary backward pass: the gradient of the mean, and nothing of single examples."""
    parameters = list(network.module.parameters())
    return lambda: torch.autograd.grad(F.cross_entropy(network.module(x), y), parameters)


def opacus(network: Network, quantity: str, x: torch.Tensor, y: torch.Tensor, functorch: bool) -> Call:
    """Opacus with hooks, or with functorch for every layer."""
    module = GradSampleModule(copy.deepcopy(network.module), loss_reduction="sum", force_functorch=functorch)

    def call() -> Any:
        F.cross_entropy(module(x), y, reduction="sum").backward()
        found = {name: value.grad_sample for name, value in module._module.named_parameters()}
        for value in module.parameters():
            value.grad = value.grad_sample = None
        return reduced(quantity, found)

    return call


def ghost(network: Network, quantity: str, x: torch.Tensor, y: torch.Tensor) -> Call:
    """Opacus with ghost clipping."""
    if quantity == "gradients":
        raise NotImplementedError("ghost clipping has no gradients")
    module = GradSampleModuleFastGradientClipping(
        copy.deepcopy(network.module), max_grad_norm=BOUND, use_ghost_clipping=True, loss_reduction="sum"
    )

    def call() -> Any:
        losses = F.cross_entropy(module(x), y, reduction="none")
        losses.sum().backward(retain_graph=quantity != "norms")
        norms = module.get_norm_sample()
        for value in module.parameters():
            value.grad = None
        if quantity == "norms":
            return norms
        module.disable_hooks()
        ((BOUND / norms).clamp(max=1) * losses).sum().backward()
        module.enable_hooks()
        found = {name: value.grad for name, value in module._module.named_parameters()}
        for value in module.parameters():
            value.grad = None
        return found

    return call


def with_backpack(network: Network, quantity: str, x: torch.Tensor, y: torch.Tensor) -> Call:
    """BackPACK."""
    module = extend(copy.deepcopy(network.module))
    loss = extend(torch.nn.CrossEntropyLoss(reduction="sum"))

    def call() -> Any:
        with backpack(BatchGrad()):
            loss(module(x), y).backward()
        found = {name: value.grad_batch for name, value in module.named_parameters()}
        for value in module.parameters():
            value.grad = None
            del value.grad_batch
        return reduced(quantity, found)

    return call


def torch_func(network: Network, quantity: str, x: torch.Tensor, y: torch.Tensor, compiled: bool) -> Call:
    """torch.func, as it is or compiled."""
    p = {name: value.detach() for name, value in network.module.named_parameters()}

    def loss(p: Tensors, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(torch.func.functional_call(network.module, p, (x[None],)), y[None])

    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))

    def whole(p: Tensors, x: torch.Tensor, y: torch.Tensor) -> Any:
        return reduced(quantity, found(p, x, y))

    run = torch.compile(whole) if compiled else whole
    return lambda: run(p, x, y)


def in_jax(network: Network, quantity: str, x: torch.Tensor, y: torch.Tensor) -> Call:
    """jax.jit of vmap of grad."""
    p = {name: value.detach() for name, value in network.module.named_parameters()}

    def loss(p: Any, x: Any, y: Any) -> Any:
        return -jax.nn.log_softmax(network.in_jax(p, x))[y]

    def whole(p: Any, x: Any, y: Any) -> Any:
        return reduced_in_jax(quantity, jax.vmap(jax.grad(loss), in_axes=(None, 0, 0))(p, x, y))

    return contenders.jax_call(whole, (p, x, y))


def others(network: Network, quantity: str, x: torch.Tensor, y: torch.Tensor) -> dict[str, Callable[[], Call]]:
    """All contenders by name; one that does not know the network fails when it is made, or when it is called."""
    about = network, quantity, x, y
    return {
        "Opacus hooks": lambda: opacus(*about, functorch=False),
        "Opacus functorch": lambda: opacus(*about, functorch=True),
        "Opacus ghost": lambda: ghost(*about),
        "BackPACK": lambda: with_backpack(*about),
        "torch.func": lambda: torch_func(*about, compiled=False),
        "torch.compile": lambda: torch_func(*about, compiled=True),
        "JAX": lambda: in_jax(*about),
    }


# --- measuring -----------------------------------------------------------------------------------------------------------


def measured(network: Network, quantity: str, batch: int, options: argparse.Namespace) -> dict[str, Any]:
    """One row of the table."""
    x = torch.randn(batch, *network.shape, device=options.device)
    y = torch.randint(10, (batch,), device=options.device)
    calls = {OURS: ours(network, quantity, x, y)}
    expected = calls[OURS]()
    left_out: dict[str, str] = {}
    for name, make in others(network, quantity, x, y).items():
        try:
            call = make()
            call()
            taken = contenders.once(call)
        except Exception as error:
            left_out[name] = " ".join(f"{type(error).__name__}: {error}".split())[:120]
            continue
        side_by_side.check(f"{network.name}, {quantity}, {name}", [lambda: expected, call], rtol=1e-3, atol=1e-5)
        if taken > SLOW:
            left_out[name] = f"takes {taken:.1f} s"
        else:
            calls[name] = call
    calls[FLOOR] = backward(network, x, y)
    rounds = dict(zip(calls, side_by_side.rounds(list(calls.values()), options.repeats, options.device), strict=True))
    floors = rounds[FLOOR]
    ratios = {name: statistics.median(a / b for a, b in zip(rounds[name], floors, strict=True)) for name in rounds}
    best = min((name for name in rounds if name not in (OURS, FLOOR)), key=lambda name: ratios[name])
    return {
        "work": f"{network.name}, batch {batch}",
        "quantity": quantity,
        "seconds": {name: statistics.median(found) for name, found in rounds.items()},
        "times the backward pass": ratios,
        "best other": best,
        "ours / best other": statistics.median(a / b for a, b in zip(rounds[OURS], rounds[best], strict=True)),
        "left out": left_out,
    }


def show(row: dict[str, Any]) -> None:
    """Print a row."""
    print(f"{row['work']}: {row['quantity']}  ({row['seconds'][FLOOR] * 1e3:.3g} ms for the backward pass)")
    for name, ratio in sorted(row["times the backward pass"].items(), key=lambda item: item[1]):
        print(f"    {name:18}{ratio:8.2f}")
    print(f"    ours / {row['best other']}: {row['ours / best other']:.2f}")
    for name, reason in row["left out"].items():
        print(f"    {name} is left out: {reason}")
    sys.stdout.flush()


def contenders_of(network: Network, quantity: str, x: torch.Tensor, y: torch.Tensor) -> dict[str, Callable[[], Call]]:
    """Ours, the others and the ordinary backward pass."""
    mine = {OURS: lambda: ours(network, quantity, x, y)}
    return mine | others(network, quantity, x, y) | {FLOOR: lambda: backward(network, x, y)}


def peak(number: int, quantity: str, batch: int, name: str) -> int:
    """Bytes by which the peak of this process grows in one call."""
    torch.manual_seed(0)
    network = per_example_models.NETWORKS[number]()
    x, y = torch.randn(batch, *network.shape), torch.randint(10, (batch,))
    call = contenders_of(network, quantity, x, y)[name]()
    return peak_memory.growth(call)


def peaks(options: argparse.Namespace) -> list[dict[str, Any]]:
    """By how much each contender's peak grows, as a multiple of the ordinary backward pass's."""
    found = []
    for number, make in enumerate(per_example_models.NETWORKS):
        name = make().name
        for quantity in QUANTITIES:
            if options.only not in f"{name}, batch 256, {quantity}" or options.quick:
                continue
            names = [FLOOR, OURS, "Opacus hooks", "Opacus ghost", "torch.func", "torch.compile"]
            sizes = {one: peak_memory.in_fresh_process(__file__, number, quantity, 256, one) for one in names}
            floor = max(sizes[FLOOR] or 0, 1)
            row = {one: size / floor for one, size in sizes.items() if size is not None}
            found.append({"work": f"{name}, batch 256", "quantity": quantity, "bytes": sizes, "times the backward pass": row})
            print(f"peak, {name}, {quantity}: " + ", ".join(f"{one} {times:.2f}" for one, times in row.items()), flush=True)
    return found


def works(options: argparse.Namespace) -> Iterator[tuple[Network, str, int]]:
    """Every network with every batch size and quantity."""
    for make in per_example_models.NETWORKS:
        torch.manual_seed(0)
        network = make()
        network.module.to(options.device)
        for batch in (64,) if options.quick else (16, 64, 256):
            for quantity in QUANTITIES:
                yield network, quantity, batch


def main() -> None:
    """Measure everything that is asked for: times, then memory."""
    warnings.filterwarnings("ignore", "Full backward hook")  # Opacus and BackPACK, each time
    if sys.argv[1:2] == ["--peak"]:
        torch.set_num_threads(1)
        print(peak(int(sys.argv[2]), sys.argv[3], int(sys.argv[4]), sys.argv[5]))
        return
    options = contenders.options(__doc__)
    rows = []
    for network, quantity, batch in works(options):
        if options.only in f"{network.name}, batch {batch}, {quantity}":
            torch.compiler.reset()
            rows.append(measured(network, quantity, batch, options))
            show(rows[-1])
    side_by_side.write(options.json, options.device, rows)
    if options.device == "cpu":
        memory = peaks(options)
        if options.json is not None:
            options.json.write_text(json.dumps(json.loads(options.json.read_text()) | {"memory": memory}, indent=1))


if __name__ == "__main__":
    main()
