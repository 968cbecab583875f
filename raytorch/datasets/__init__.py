"""Data sets, shipped ones and a user's own: their files, splits, and the batches that each worker gets of them.

What is exported is imported when it is first asked for, most of it with torch.
"""

# ruff: noqa: F403, F405
from typing import TYPE_CHECKING

from raytorch.system.lazy_exports import lazy_exports

if TYPE_CHECKING:
    from raytorch.datasets.files import *
    from raytorch.datasets.in_memory import *
    from raytorch.datasets.loader import *
    from raytorch.datasets.own import *
    from raytorch.datasets.preparation import *
    from raytorch.datasets.splits import *

__all__ = [
    "END",
    "PAD",
    "Dataset",
    "MicroBatch",
    "TrainLoader",
    "check_dataset",
    "count",
    "evaluation_batches",
    "load_dataset",
    "load_split",
    "load_splits",
    "prepare",
]

__getattr__ = lazy_exports(__name__, __all__, "files", "preparation", "in_memory", "loader", "own", "splits")
