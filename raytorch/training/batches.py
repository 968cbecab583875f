"""The batches of a run, for its loop to iterate over."""

from collections.abc import Callable, Iterator
from typing import Any

import torch

from raytorch.config.run import smallest_batch
from raytorch.datasets import MicroBatch, TrainLoader


class RunStopped(BaseException):
    """Leaves the loop of a run that was asked to stop, once it is saved."""


class Batches:
    """The batches of a number of optimizer steps, to be iterated over once.

    Attributes:
        steps_per_epoch: Optimizer steps in an epoch.
        total: Optimizer steps from the first to the last batch, unless the run ends early.
        samples: Of the data set.
        smallest: Samples of the smallest batch over all workers.
    """

    def __init__(
        self, take: Callable[["Batches"], Iterator[list[MicroBatch]]], loader: TrainLoader, total: int
    ) -> None:
        """``take`` yields them, from the place on at which the run is."""
        self._take, self.loader, self.total = take, loader, total
        self.steps_per_epoch, self.samples = loader.steps_per_epoch, loader.samples
        self.smallest = smallest_batch(loader.samples, loader.batch_size)

    def __iter__(self) -> Iterator[list[MicroBatch]]:
        return self._take(self)

    def __str__(self) -> str:
        return f"{self.total:,} batches of {self.loader.batch_size:,} out of {self.samples:,} samples"


def queued_work(device: torch.device) -> Callable[[], Callable[[], bool]]:
    """What marks the work that a device has been given until then; its answer tells whether that is still under way.

    What a CPU is given it has done when it is asked.
    """
    if device.type != "cuda":
        return lambda: lambda: False
    event: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]

    def mark() -> Callable[[], bool]:
        event.record(torch.cuda.current_stream(device))
        return lambda: not event.query()

    return mark
