"""raytorch: a distributed PyTorch training service on Ray."""

from importlib import import_module, metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from raytorch import autograd, distributed, layers, losses, optimizers, tensor_ops
    from raytorch.session.connect import connect

__version__ = metadata.version("raytorch")
__all__ = ["__version__", "autograd", "connect", "distributed", "layers", "losses", "optimizers", "tensor_ops"]


def __getattr__(name: str) -> Any:
    # Loaded when it is used: the command line starts without torch and ray.
    if name == "connect":
        return import_module("raytorch.session.connect").connect
    if name in __all__:
        return import_module(f"raytorch.{name}")
    raise AttributeError(f"module 'raytorch' has no attribute {name!r}")
