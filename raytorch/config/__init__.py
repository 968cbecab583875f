"""The schema of a run, and of a sweep of runs: one YAML file, checked in full before anything starts.

Imports neither torch nor ray, so that ``raytorch validate`` answers at once. Reading files, overrides and messages are
in :mod:`raytorch.config.file`. What is exported is imported when it is first asked for.
"""

# ruff: noqa: F403, F405
from typing import TYPE_CHECKING

from raytorch.system.lazy_exports import lazy_exports

if TYPE_CHECKING:
    from raytorch.config.code_snapshot import *
    from raytorch.config.data import *
    from raytorch.config.execution import *
    from raytorch.config.image_files import *
    from raytorch.config.metrics import *
    from raytorch.config.model_keys import *
    from raytorch.config.models import *
    from raytorch.config.optimization import *
    from raytorch.config.optimizers import *
    from raytorch.config.own_parts import *
    from raytorch.config.parallel import *
    from raytorch.config.run import *
    from raytorch.config.run_name import *
    from raytorch.config.section import *
    from raytorch.config.sources import *
    from raytorch.config.sweep import *

__all__ = [
    "Adadelta",
    "Adafactor",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "ArraysData",
    "Asgd",
    "Asha",
    "AttentionModel",
    "Augment",
    "Averaging",
    "Checkpointing",
    "Cifar10Data",
    "CodeSnapshot",
    "ConflictError",
    "ConstantSchedule",
    "Conv3dModel",
    "ConvNetModel",
    "CosineSchedule",
    "Data",
    "DigitsData",
    "EarlyStopping",
    "Failure",
    "GptModel",
    "ImageAugment",
    "ImageData",
    "ImageFiles",
    "ImagesData",
    "Logging",
    "Loss",
    "Metric",
    "MlpModel",
    "MnistData",
    "MnistStripsData",
    "Model",
    "ModelKeys",
    "MovingMnistData",
    "Muon",
    "MuonOthers",
    "NAdam",
    "OneCycleSchedule",
    "Optimizer",
    "OwnData",
    "OwnEvaluation",
    "OwnLoss",
    "OwnMetric",
    "OwnModel",
    "OwnPart",
    "Parallel",
    "Parameter",
    "ParameterGroup",
    "PlateauSchedule",
    "RAdam",
    "Ranking",
    "ResNet18Model",
    "RmsProp",
    "RnnModel",
    "Rprop",
    "RunConfig",
    "RunName",
    "Scaling",
    "Schedule",
    "Section",
    "Seq2SeqModel",
    "Sgd",
    "ShardsData",
    "Source",
    "StepSchedule",
    "StoredData",
    "SweepConfig",
    "TableData",
    "TextData",
    "TokensData",
    "Validation",
    "VitModel",
    "Warmup",
    "WorkerRange",
    "data_root",
]

__getattr__ = lazy_exports(
    __name__,
    __all__,
    "file",  # first, as it says what is wrong with a section that is made here
    "code_snapshot",
    "data",
    "execution",
    "image_files",
    "metrics",
    "model_keys",
    "models",
    "optimization",
    "optimizers",
    "own_parts",
    "parallel",
    "run",
    "run_name",
    "section",
    "sources",
    "sweep",
)
