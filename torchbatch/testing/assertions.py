"""``assert_close``: two trees of arrays, from whatever framework, hold the same."""

from __future__ import annotations

from typing import Any

from torchbatch.errors import AxisSpecError
from torchbatch.testing.compare import Rules, compare
from torchbatch.testing.report import Check, Report
from torchbatch.testing.tolerance import Tolerance, Work, is_amount


def assert_close(
    got: Any,
    expected: Any,
    *,
    rtol: float | None = None,
    atol: float | None = None,
    reference: Any = None,
    dtypes: bool = True,
    devices: bool = True,
    work: Work | None = None,
    where: str = "output",
) -> Report:
    """Check that two trees have the same structure, shapes, dtypes, devices and, up to a tolerance, numbers.

    Leaves are tensors, NumPy or JAX arrays, Python numbers, or objects that are compared with ``==``. NaN is equal to NaN, and
    infinities to those of the same sign.

    Args:
        got, expected: the trees.
        rtol, atol: ``|got - expected| <= atol + rtol * |expected|`` is allowed. If only one is given the other is 0. If none is,
            they are those of ``torch.testing.assert_close``; with ``work`` or a reference they follow from these, and ``atol``
            from the largest number of the leaf, since sums cancel. Whole numbers and bools are then equal or not.
        reference: the same tree in float64, which says who is off, and how far rounding may go.
        dtypes: whether dtypes must be equal; if not, they must still be of one kind (bool, whole, real, complex).
        devices: whether devices must be equal.
        work: how much was computed, if the tolerance is to follow from it.
        where: what to call the trees.

    Returns:
        The report, with every leaf.

    Raises:
        EquivalenceError: they differ. It is an ``AssertionError``, and has the report as its attribute ``report``.
        AxisSpecError: a tolerance is no number from 0 up.

    Example:
        >>> import numpy as np
        >>> import torch
        >>> from torchbatch.testing import assert_close
        >>> print(assert_close({"a": torch.ones(2)}, {"a": np.ones(2, np.float32)}))
        assert_close: 1 check passed
        <BLANKLINE>
        run  what    on                largest difference
        got  output  as given  passed  equal

    Source: ``torch.testing.assert_close``, ``numpy.testing.assert_allclose``.
    """
    rules = Rules(_tolerance(rtol, atol), work, dtypes, devices)
    leaves = compare(got, expected, reference, rules, where)
    return Report("assert_close", (Check.of_leaves("got", "expected", where, "as given", leaves),)).raise_if_failed()


def _tolerance(rtol: float | None, atol: float | None) -> Tolerance | None:
    for name, value in (("rtol", rtol), ("atol", atol)):
        if value is not None and not is_amount(value):
            raise AxisSpecError(f"assert_close: {name} must be a number from 0 up, but it is {value!r}.")
    return None if rtol is None and atol is None else Tolerance(float(rtol or 0), float(atol or 0))
