"""raytorch: a distributed PyTorch training service on Ray."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from raytorch import autograd, distributed, layers, losses, optimizers, tensor_ops
    from raytorch.service.client import Client
    from raytorch.session import registry
    from raytorch.session.connect import connect

__version__ = "0.1.0"
__all__ = [
    "Client",
    "__version__",
    "autograd",
    "connect",
    "distributed",
    "layers",
    "losses",
    "optimizers",
    "registry",
    "tensor_ops",
]


def __getattr__(name: str) -> Any:
    # Loaded when it is used: the command line starts without torch and ray.
    if name == "Client":
        return import_module("raytorch.service.client").Client
    if name == "connect":
        return import_module("raytorch.session.connect").connect
    if name == "registry":
        return import_module("raytorch.session.registry")
    if name in __all__:
        return import_module(f"raytorch.{name}")
    raise AttributeError(f"module 'raytorch' has no attribute {name!r}")
