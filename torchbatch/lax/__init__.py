"""What a function calls while it is being mapped: collectives over the axes that ``vmap(…, axis_name=…)`` names, and loops."""

from torchbatch.lax.associative import associative_scan
from torchbatch.lax.collectives import (
    all_gather,
    all_to_all,
    axis_index,
    axis_size,
    pbroadcast,
    pmean,
    ppermute,
    pshuffle,
    psum,
    psum_scatter,
    pswapaxes,
)
from torchbatch.lax.conditionals import cond, select, select_n, switch
from torchbatch.lax.extremes import pargmax, pargmin, pmax, pmin
from torchbatch.lax.loops import fori_loop, map, scan, while_loop
from torchbatch.lax.sized import argwhere, flatnonzero, nonzero, unique, where

__all__ = [
    "all_gather",
    "all_to_all",
    "argwhere",
    "associative_scan",
    "axis_index",
    "axis_size",
    "cond",
    "flatnonzero",
    "fori_loop",
    "map",
    "nonzero",
    "pargmax",
    "pargmin",
    "pbroadcast",
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
    "unique",
    "where",
    "while_loop",
]
