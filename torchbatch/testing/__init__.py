"""Is it the same function? Comparing batched, compiled and ported functions with what they should be.

:mod:`torchbatch.testing.strategies` draws inputs and programs for hypothesis, and is not imported here.
"""

from torchbatch.testing.assertions import assert_close
from torchbatch.testing.compare import LeafDifference, Worst
from torchbatch.testing.divergence import Divergence, Place, first_divergence
from torchbatch.testing.equivalent import check_equivalent
from torchbatch.testing.flax_layout import ParameterRule
from torchbatch.testing.html import save_html, to_html
from torchbatch.testing.interchange import from_jax, from_numpy, to_jax, to_numpy
from torchbatch.testing.intermediates import Line
from torchbatch.testing.loop import loop
from torchbatch.testing.precision import JaxPrecision, NumpyPrecision, PrecisionPolicy, TorchPrecision, precision_policy
from torchbatch.testing.report import Argument, Check, Report
from torchbatch.testing.reproducer import reproducer
from torchbatch.testing.state_dicts import state_dict_from_jax, state_dict_to_jax
from torchbatch.testing.tolerance import Tolerance, Work
from torchbatch.testing.vmap_checks import check_vmap

__all__ = [
    "Argument",
    "Check",
    "Divergence",
    "JaxPrecision",
    "LeafDifference",
    "Line",
    "NumpyPrecision",
    "ParameterRule",
    "Place",
    "PrecisionPolicy",
    "Report",
    "Tolerance",
    "TorchPrecision",
    "Work",
    "Worst",
    "assert_close",
    "check_equivalent",
    "check_vmap",
    "first_divergence",
    "from_jax",
    "from_numpy",
    "loop",
    "precision_policy",
    "reproducer",
    "save_html",
    "state_dict_from_jax",
    "state_dict_to_jax",
    "to_html",
    "to_jax",
    "to_numpy",
]
