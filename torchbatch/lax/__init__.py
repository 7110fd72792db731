"""What a function calls while it is being mapped: collectives over the axes that ``vmap(…, axis_name=…)`` names, and loops."""

from torchbatch.lax.associative import associative_scan
from torchbatch.lax.collectives import (
    all_gather,
    all_to_all,
    axis_index,
    axis_size,
    pmax,
    pmean,
    pmin,
    ppermute,
    pshuffle,
    psum,
    psum_scatter,
    pswapaxes,
)
from torchbatch.lax.conditionals import cond, select, select_n, switch
from torchbatch.lax.loops import fori_loop, map, scan, while_loop

__all__ = [
    "all_gather",
    "all_to_all",
    "associative_scan",
    "axis_index",
    "axis_size",
    "cond",
    "fori_loop",
    "map",
    "pmax",
    "pmean",
    "pmin",
    "ppermute",
    "pshuffle",
    "psum",
    "psum_scatter",
    "pswapaxes",
    "scan",
    "select",
    "select_n",
    "switch",
    "while_loop",
]
