"""Registers every operator that behaves differently inside ``vmap`` or in a trace. Importing this module once is all it takes.

The order matters where two of them take the same operator: the later kernel goes around the earlier one.
"""

from __future__ import annotations

from torchbatch._torch import autocast, draws, factories, masked, places, recurrent, repairs, rules, selections, zero_tensors

__all__ = ["autocast", "draws", "factories", "masked", "places", "recurrent", "repairs", "rules", "selections", "zero_tensors"]
