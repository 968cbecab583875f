"""The schema of a run, and of a sweep of runs: one YAML file, checked in full before anything starts.

Imports neither torch nor ray, so that ``raytorch validate`` answers at once. Reading files, overrides and messages are
in :mod:`raytorch.config.file`. What is exported is imported when it is first asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from raytorch.config.data import (
        Augment,
        Cifar10Data,
        Data,
        DigitsData,
        ImageData,
        MnistData,
        MnistStripsData,
        MovingMnistData,
        StoredData,
    )
    from raytorch.config.models import (
        AttentionModel,
        Conv3dModel,
        ConvNetModel,
        MlpModel,
        Model,
        ResNet18Model,
        RnnModel,
        Seq2SeqModel,
        VitModel,
    )
    from raytorch.config.optimization import (
        Adam,
        AdamW,
        ConstantSchedule,
        CosineSchedule,
        Loss,
        OneCycleSchedule,
        Optimizer,
        RmsProp,
        Schedule,
        Sgd,
        StepSchedule,
        Warmup,
    )
    from raytorch.config.run import Checkpointing, Failure, Logging, RunConfig, RunName, Scaling, WorkerRange
    from raytorch.config.section import ConflictError, Section
    from raytorch.config.sweep import Asha, Parameter, SweepConfig

__all__ = [
    "Adam",
    "AdamW",
    "Asha",
    "AttentionModel",
    "Augment",
    "Checkpointing",
    "Cifar10Data",
    "ConflictError",
    "ConstantSchedule",
    "Conv3dModel",
    "ConvNetModel",
    "CosineSchedule",
    "Data",
    "DigitsData",
    "Failure",
    "ImageData",
    "Logging",
    "Loss",
    "MlpModel",
    "MnistData",
    "MnistStripsData",
    "Model",
    "MovingMnistData",
    "OneCycleSchedule",
    "Optimizer",
    "Parameter",
    "ResNet18Model",
    "RmsProp",
    "RnnModel",
    "RunConfig",
    "RunName",
    "Scaling",
    "Schedule",
    "Section",
    "Seq2SeqModel",
    "Sgd",
    "StepSchedule",
    "StoredData",
    "SweepConfig",
    "VitModel",
    "Warmup",
    "WorkerRange",
]

_HOMES = ("data", "models", "optimization", "run", "section", "sweep")


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    homes = [import_module(f"{__name__}.{home}") for home in _HOMES]
    return next(getattr(home, name) for home in homes if hasattr(home, name))
