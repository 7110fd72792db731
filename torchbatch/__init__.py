"""torchbatch: JAX's ``vmap`` for PyTorch."""

from torchbatch import errors, tree
from torchbatch.transforms.vmap import vmap

__version__ = "0.1.0"
__all__ = ["errors", "vmap"]
