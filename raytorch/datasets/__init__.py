"""Data sets, held in memory as bytes and made into normalized, augmented batches as whole tensors.

Only ``check_dataset`` and ``count`` are imported at once; the rest comes when it is first asked for, most of it with
torch.
"""

from typing import TYPE_CHECKING

from raytorch.datasets.files import check_dataset, count
from raytorch.system.lazy_exports import lazy_exports

if TYPE_CHECKING:
    from raytorch.datasets.in_memory import END, PAD, Dataset, load_dataset
    from raytorch.datasets.loader import MicroBatch, TrainLoader, evaluation_batches
    from raytorch.datasets.preparation import prepare

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
    "prepare",
]

__getattr__ = lazy_exports(
    __name__,
    {
        "in_memory": ["END", "PAD", "Dataset", "load_dataset"],
        "loader": ["MicroBatch", "TrainLoader", "evaluation_batches"],
        "preparation": ["prepare"],
    },
)
