"""Data sets, held in memory as bytes and made into normalized, augmented batches as whole tensors.

``check`` verifies a data set's files without loading them, ``load`` returns a split as a ``Dataset``, ``TrainLoader``
deals out its samples to the ranks of a training run and ``evaluation_batches`` those of a test split.

Only ``check`` is imported at once: the rest comes with torch, when it is first asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from raytorch.datasets.files import check

if TYPE_CHECKING:
    from raytorch.datasets.loader import MicroBatch, TrainLoader, evaluation_batches
    from raytorch.datasets.sources import END, PAD, Dataset, load

__all__ = ["END", "PAD", "Dataset", "MicroBatch", "TrainLoader", "check", "evaluation_batches", "load"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = "loader" if name in ("MicroBatch", "TrainLoader", "evaluation_batches") else "sources"
    return getattr(import_module(f"{__name__}.{home}"), name)
