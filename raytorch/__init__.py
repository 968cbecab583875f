"""raytorch: a distributed PyTorch training service on Ray."""

from typing import TYPE_CHECKING

from raytorch.system.lazy_exports import lazy_exports

if TYPE_CHECKING:
    from raytorch import autograd, distributed, errors, layers, losses, optimizers, tensor_ops
    from raytorch.config.run import RunConfig
    from raytorch.service.client import Client
    from raytorch.session import registry
    from raytorch.session.connect import connect
    from raytorch.training.api import Result, find_run, list_runs, load, resume, train

__version__ = "0.1.0"
__all__ = [
    "Client",
    "Result",
    "RunConfig",
    "__version__",
    "autograd",
    "connect",
    "distributed",
    "errors",
    "find_run",
    "layers",
    "list_runs",
    "load",
    "losses",
    "optimizers",
    "registry",
    "resume",
    "tensor_ops",
    "train",
]

_MODULES = ["autograd", "distributed", "errors", "layers", "losses", "optimizers", "tensor_ops"]

# Loaded when it is used: the command line starts without torch and ray.
__getattr__ = lazy_exports(
    __name__,
    {
        "config.run": ["RunConfig"],
        "service.client": ["Client"],
        "session.connect": ["connect"],
        "training.api": ["Result", "find_run", "list_runs", "load", "resume", "train"],
    },
    modules={"registry": "session.registry"} | {name: name for name in _MODULES},
)
