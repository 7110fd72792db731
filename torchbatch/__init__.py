"""torchbatch: JAX's ``vmap`` for PyTorch."""

from torchbatch import errors, lax, per_example, random, tree
from torchbatch._torch.fallback import fallback
from torchbatch.transforms.checkpoint import checkpoint
from torchbatch.transforms.custom_derivatives import custom_jvp, custom_vjp
from torchbatch.transforms.custom_vmap import custom_vmap, sequential_vmap
from torchbatch.transforms.eval_shape import ShapeDtypeStruct, eval_shape
from torchbatch.transforms.grad import grad, jvp, linearize, stop_gradient, value_and_grad, vjp
from torchbatch.transforms.jacobian import hessian, jacfwd, jacrev
from torchbatch.transforms.jit import jit
from torchbatch.transforms.make_graph import make_graph
from torchbatch.transforms.modules import stack_modules
from torchbatch.transforms.stages import load
from torchbatch.transforms.vectorize import vectorize
from torchbatch.transforms.vmap import vmap

__version__ = "0.1.0"
__all__ = [
    "ShapeDtypeStruct",
    "checkpoint",
    "custom_jvp",
    "custom_vjp",
    "custom_vmap",
    "errors",
    "eval_shape",
    "fallback",
    "grad",
    "hessian",
    "jacfwd",
    "jacrev",
    "jit",
    "jvp",
    "lax",
    "linearize",
    "load",
    "make_graph",
    "per_example",
    "random",
    "sequential_vmap",
    "stack_modules",
    "stop_gradient",
    "tree",
    "value_and_grad",
    "vectorize",
    "vjp",
    "vmap",
]
