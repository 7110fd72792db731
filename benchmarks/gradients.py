"""What does one call of a gradient transform cost, next to torch.func and to autograd written by hand?

    python benchmarks/gradients.py [--device cuda] [--json FILE] [--repeats N]

The functions are tiny, so that what is measured is the cost of the transforms. Each row first checks that all contenders
give the same answer. Then they run in turn, A B A B, in this one process; a figure is the median over the rounds. Only the
ratios are worth quoting, and only with the machine that is printed above them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import side_by_side
import torch
from side_by_side import Call

import torchbatch

ours, theirs = torchbatch, torch.func


class Row(NamedTuple):
    """One kind of call: what torchbatch and torch.func run, and plain autograd where it has a way to say it."""

    name: str
    ours: Call
    torch_func: Call
    by_hand: Call | None = None


def square(x: torch.Tensor) -> torch.Tensor:
    """``[a] -> []``."""
    return (x * x).sum()


def cubes(x: torch.Tensor) -> torch.Tensor:
    """``[a] -> [a]``."""
    return x * x * x


def total(params: dict[str, torch.Tensor]) -> torch.Tensor:
    """Of a dict of tensors."""
    return (params["p3"] * params["p4"]).sum() + params["p5"].sum()


def with_aux(x: torch.Tensor) -> tuple[torch.Tensor, Any]:
    """A number, and something beside it."""
    return (x * x).sum(), {"double": x * 2}


def rows(device: str) -> list[Row]:
    """The calls that are measured."""
    x = torch.arange(8.0, device=device)
    matrix = torch.arange(24.0, device=device).reshape(8, 3)
    return [*first_order(x), *with_trees(x, device), *jacobians(x), *mapped(matrix)]


def first_order(x: torch.Tensor) -> list[Row]:
    """One gradient, one pullback, one pushforward."""
    leaf = x.clone().requires_grad_()
    pulls = ours.vjp(cubes, x)[1], theirs.vjp(cubes, x)[1]
    return [
        made(
            "grad(f)(x)", ours.grad(square), theirs.grad(square), x, lambda: torch.autograd.grad(square(leaf), leaf)[0]
        ),
        Row("grad(f)(x), made anew", lambda: ours.grad(square)(x), lambda: theirs.grad(square)(x)),
        made("grad(grad(f))(x)", _twice(ours.grad), _twice(theirs.grad), x[1]),
        Row("vjp", lambda: ours.vjp(cubes, x)[0], lambda: theirs.vjp(cubes, x)[0]),
        Row("its pullback", lambda: pulls[0](x), lambda: pulls[1](x)),
        Row("jvp", lambda: ours.jvp(cubes, (x,), (x,)), lambda: theirs.jvp(cubes, (x,), (x,))),
    ]


def _twice(grad: Any) -> Any:
    return grad(grad(lambda x: x * x * x))


def with_trees(x: torch.Tensor, device: str) -> list[Row]:
    """Parameters in a dict, several arguments, aux."""
    params = {f"p{i}": torch.full((3,), float(i), device=device) for i in range(20)}
    value_and_grad, grad_and_value = ours.value_and_grad(with_aux, has_aux=True), theirs.grad_and_value(with_aux, has_aux=True)

    def swapped() -> Any:
        gradient, value = grad_and_value(x)
        return value, gradient

    return [
        made("grad by a dict of 20", ours.grad(total), theirs.grad(total), params),
        Row("value_and_grad with aux", lambda: value_and_grad(x), swapped),
    ]


def jacobians(x: torch.Tensor) -> list[Row]:
    """First derivatives of each output, second derivatives."""
    return [
        made("jacrev", ours.jacrev(cubes), theirs.jacrev(cubes), x),
        made("jacfwd", ours.jacfwd(cubes), theirs.jacfwd(cubes), x),
        made("hessian", ours.hessian(lambda v: cubes(v).sum()), theirs.hessian(lambda v: cubes(v).sum()), x),
    ]


def mapped(matrix: torch.Tensor) -> list[Row]:
    """Per-example gradients."""
    return [
        made("vmap(grad(f))", torchbatch.vmap(ours.grad(square)), theirs.vmap(theirs.grad(square)), matrix),
        made("vmap(jacrev(f))", torchbatch.vmap(ours.jacrev(cubes)), theirs.vmap(theirs.jacrev(cubes)), matrix),
    ]


def made(name: str, mine: Any, other: Any, argument: Any, by_hand: Call | None = None) -> Row:
    """The same call of two functions."""
    return Row(name, lambda: mine(argument), lambda: other(argument), by_hand)


def main() -> None:
    """Measure, print a table, and write the figures where asked."""
    options = side_by_side.options(__doc__)
    print(f"{'call':28}{'torchbatch':>12}{'torch.func':>12}{'autograd':>12}{'cheaper than torch.func':>26}")
    figures = []
    for entry in rows(options.device):
        calls = [entry.ours, entry.torch_func, *([entry.by_hand] if entry.by_hand else [])]
        side_by_side.check(entry.name, calls)
        mine, other, *hand = side_by_side.measure(calls, options.repeats, options.device)
        by_hand = f"{hand[0] * 1e6:9.1f} us" if hand else " " * 12
        print(f"{entry.name:28}{mine * 1e6:9.1f} us{other * 1e6:9.1f} us{by_hand}{other / mine:23.1f} x")
        figures.append({"call": entry.name, "torchbatch": mine, "torch_func": other, "autograd": hand[0] if hand else None})
    side_by_side.write(options.json, options.device, figures)


if __name__ == "__main__":
    main()
