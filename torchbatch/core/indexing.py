"""``x[i]`` with an integer tensor ``i`` while a function is traced: PyTorch would ask for its value, as it does for an int.

What is recorded instead is a selection by index, which reads the value when the graph runs.
"""

from __future__ import annotations

from typing import Any

from torch.overrides import TorchFunctionMode

from torchbatch._torch import places


class IntegerIndices(TorchFunctionMode):
    """While this is active, tensors without dimensions may be indices."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in ("__getitem__", "__setitem__"):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            if any(map(places.is_number, index)):
                return places.get(args[0], index) if name == "__getitem__" else places.put(args[0], index, args[2])
        return func(*args, **(kwargs or {}))
