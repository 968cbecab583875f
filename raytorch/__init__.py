"""raytorch: a distributed PyTorch training service on Ray."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from raytorch import autograd, distributed, errors, layers, losses, optimizers, tensor_ops
    from raytorch.config.run import RunConfig
    from raytorch.errors import (
        CheckpointError,
        ClusterError,
        ConfigError,
        DataError,
        DivergedError,
        ExportError,
        HandleError,
        JobError,
        JobNotFoundError,
        MissingPackageError,
        ModelFileError,
        PackageError,
        QuotaError,
        RaytorchError,
        ReaderDiedError,
        RecordError,
        RemoteOpError,
        ResourceError,
        RunExistsError,
        RunNotFoundError,
        SessionError,
        SessionLostError,
        StorageError,
        TrainingError,
        UnknownFunctionError,
        UntrustedFileError,
        UserError,
    )
    from raytorch.service.client import Client
    from raytorch.session import registry
    from raytorch.session.connect import connect
    from raytorch.training.api import Result, find_run, list_runs, load, resume, train
    from raytorch.training.run import Run

__version__ = "0.1.0"
__all__ = [
    "CheckpointError",
    "Client",
    "ClusterError",
    "ConfigError",
    "DataError",
    "DivergedError",
    "ExportError",
    "HandleError",
    "JobError",
    "JobNotFoundError",
    "MissingPackageError",
    "ModelFileError",
    "PackageError",
    "QuotaError",
    "RaytorchError",
    "ReaderDiedError",
    "RecordError",
    "RemoteOpError",
    "ResourceError",
    "Result",
    "Run",
    "RunConfig",
    "RunExistsError",
    "RunNotFoundError",
    "SessionError",
    "SessionLostError",
    "StorageError",
    "TrainingError",
    "UnknownFunctionError",
    "UntrustedFileError",
    "UserError",
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

_HOMES = {
    "Client": "service.client",
    "Run": "training.run",
    "RunConfig": "config.file",  # and not config.run: it says what is wrong with one
    "connect": "session.connect",
    **dict.fromkeys((name for name in __all__ if name.endswith("Error")), "errors"),
    **dict.fromkeys(("Result", "find_run", "list_runs", "load", "resume", "train"), "training.api"),
}


def __getattr__(name: str) -> Any:  # what is used is loaded then: the command line starts without torch and ray
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name in _HOMES:
        return getattr(import_module(f"raytorch.{_HOMES[name]}"), name)
    return import_module("raytorch.session.registry" if name == "registry" else f"raytorch.{name}")
