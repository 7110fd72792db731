"""Is it the same function? Comparing batched, compiled and ported functions with what they should be."""

from torchbatch.testing.assertions import assert_close
from torchbatch.testing.compare import LeafDifference, Worst
from torchbatch.testing.loop import loop
from torchbatch.testing.report import Check, Report
from torchbatch.testing.tolerance import Tolerance, Work

__all__ = ["Check", "LeafDifference", "Report", "Tolerance", "Work", "Worst", "assert_close", "loop"]
