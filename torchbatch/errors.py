"""The exceptions torchbatch raises.

Each one is a :class:`TorchbatchError` *and* the built-in class that JAX or PyTorch would have raised, so
``except ValueError``, ``except TypeError`` and ``except RuntimeError`` in existing code keep working.

==========================  ==========================  ==========================================================
class                       also a                      raised when
==========================  ==========================  ==========================================================
AxisSpecError               TypeError                   ``in_axes``, ``out_axes``, an option is of the wrong kind
AxisError                   ValueError                  axes, sizes or tree structures do not fit the values
InputTypeError              TypeError                   a mapped or differentiated input is not an array
OutputTypeError             TypeError                   an output is not an array
UnmappedOutputError         ValueError                  ``out_axes=None`` for an output that varies
DataDependentError          TypeError, RuntimeError     Python needs the value of a per-sample tensor
InPlaceError                ValueError, RuntimeError    a per-sample value is written into a shared tensor
RandomnessError             ValueError, RuntimeError    a random draw under ``randomness="error"``
UnsupportedOperationError   ValueError, RuntimeError    an operator that no batching rule or loop can run
FallbackError               ValueError, RuntimeError    a slow operator under ``fallback("error")``
EscapedValueError           ValueError, RuntimeError    a per-sample value is used after its ``vmap`` ended
GradientTypeError           TypeError                   ``grad`` & co.: output not scalar, dtype not differentiable
GradientValueError          ValueError                  ``grad`` & co.: ``argnums``, tangents or shapes do not fit
AxisNameError               ValueError, NameError       an axis name that no enclosing ``vmap`` defines
StaticArgumentError         TypeError, ValueError       ``jit``: an argument must be static, or cannot be hashed
LeakedTracerError           ValueError, RuntimeError    a value from inside a ``jit`` function is used after its trace
DonatedBufferError          ValueError, RuntimeError    a tensor is used after ``donate_argnums`` gave its memory away
CompilerError               RuntimeError                the compiler failed, or the machine has none
EquivalenceError            AssertionError              ``torchbatch.testing``: two runs of a function differ
RetraceWarning              UserWarning                 a ``jit`` function is traced again and again
FallbackWarning             UserWarning                 an operator without a batching rule runs sample by sample
==========================  ==========================  ==========================================================

>>> import torch, torchbatch
>>> try:
...     torchbatch.vmap(torch.dot)(torch.ones(3, 2), torch.ones(4, 2))
... except torchbatch.errors.AxisError as error:
...     print(isinstance(error, ValueError))
True
"""

from __future__ import annotations

from typing import Any


class TorchbatchError(Exception):
    """Base class of every exception that torchbatch raises on purpose."""

    __module__ = "torchbatch.errors"


class AxisSpecError(TorchbatchError, TypeError):
    """An axis specification or an option of a transform has the wrong type or spelling."""


class AxisError(TorchbatchError, ValueError):
    """Axes, sizes or tree structures do not fit the values they are meant for."""


class InputTypeError(TorchbatchError, TypeError):
    """An input that is mapped or differentiated is not an array."""


class OutputTypeError(TorchbatchError, TypeError):
    """The function returned something that is not an array."""


class UnmappedOutputError(TorchbatchError, ValueError):
    """``out_axes=None`` was asked for an output that varies along the mapped axis."""


class DataDependentError(TorchbatchError, TypeError, RuntimeError):
    """Python control flow, a shape or a Python number was made from a per-sample value."""


class InPlaceError(TorchbatchError, ValueError, RuntimeError):
    """A per-sample value was written in place into a tensor that all samples share."""


class RandomnessError(TorchbatchError, ValueError, RuntimeError):
    """A random operation ran inside ``vmap(..., randomness="error")``."""


class UnsupportedOperationError(TorchbatchError, ValueError, RuntimeError):
    """An operator can be run neither batched nor sample by sample."""


class FallbackError(UnsupportedOperationError):
    """An operator without a batching rule ran under ``fallback("error")``."""


class EscapedValueError(TorchbatchError, ValueError, RuntimeError):
    """A per-sample value was used after the ``vmap`` it belongs to had finished."""


class GradientTypeError(TorchbatchError, TypeError):
    """A value cannot be differentiated: its dtype, or the shape or type of the output."""


class GradientValueError(TorchbatchError, ValueError):
    """``argnums``, tangents, cotangents or structures given to a gradient transform do not fit."""


class AxisNameError(TorchbatchError, ValueError, NameError):
    """An axis name that no enclosing ``vmap`` defines."""


class StaticArgumentError(TorchbatchError, TypeError, ValueError):
    """An argument of a jit function has to be static and is not, or is static and cannot be."""


class DonatedBufferError(TorchbatchError, ValueError, RuntimeError):
    """A tensor was used after its memory had been given to a jit function."""


class CompilerError(TorchbatchError, RuntimeError):
    """The compiler failed, or there is none on this machine."""


class LeakedTracerError(TorchbatchError, ValueError, RuntimeError):
    """A value from inside a function that was traced was used after the trace, or kept by a module."""


class EquivalenceError(TorchbatchError, AssertionError):
    """Two versions of a function do not give the same.

    Attributes:
        report: what was compared and what differed, a :class:`torchbatch.testing.Report`.
    """

    def __init__(self, message: str, report: Any = None) -> None:
        super().__init__(message)
        self.report = report


class RetraceWarning(UserWarning):
    """A jit function is traced again and again, each time for other arguments."""


class FallbackWarning(UserWarning):
    """An operator without a batching rule runs sample by sample, slowly."""


