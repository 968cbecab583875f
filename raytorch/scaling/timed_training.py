"""A run whose steps are timed, for a study: it trains as any other, but neither evaluates nor saves what it trains."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from raytorch.datasets import MicroBatch
from raytorch.distributed import Worker
from raytorch.distributed.collectives import all_gather
from raytorch.errors import ConfigError
from raytorch.runs.plan import WorkerJob
from raytorch.runs.storage import LiveFiles
from raytorch.scaling.step_timer import StepTimer
from raytorch.training.batches import Batches, RunStopped
from raytorch.training.progress import RunProgress
from raytorch.training.worker import train_on_worker


def train_timed(job: WorkerJob, *, warmup: int, steps: int) -> None:
    """Take ``warmup`` optimizer steps, in which memory is taken and kernels are chosen, then time ``steps`` on every
    worker.

    The run's outcome has ``step_times``: the steps that were timed, and a dict of ``samples`` and of ``seconds``, those
    of waiting for ``data`` and those of ``communication`` for each rank; see
    :class:`~raytorch.scaling.step_timer.StepTotals`.
    """
    train_on_worker(job, lambda *part: TimedProgress(*part, warmup=warmup, steps=steps))


class TimedProgress(RunProgress):
    """One worker's part in a timed run."""

    def __init__(self, job: WorkerJob, worker: Worker, files: LiveFiles, *, warmup: int, steps: int) -> None:
        super().__init__(job, worker, files)
        self.warmup, self.timed_steps, self.is_timed = warmup, steps, False
        self.timer = StepTimer(worker.device)

    def take(self, batches: Batches) -> Iterator[list[MicroBatch]]:
        if batches.loader.batch_size != self.config.batch_size:
            raise ConfigError(
                f"batch_size: the loop takes {batches.loader.batch_size} whatever the study says; let run.batches have "
                "that of the configuration"
            )
        if not self.parts.are_sharded:  # which wait for each other in each module
            for model in self.parts.models.values():
                self.timer.watch(model.bare)
        yield from self.timer.steps(super().take(batches))
        self.is_timed = True
        raise RunStopped  # what the loop does after its batches is no step

    def finish(self, state: str) -> dict[str, Any]:
        return super().finish("finished" if self.is_timed else state)

    def last_step(self, began: int, total: int) -> int:
        return began + self.warmup + self.timed_steps

    @property
    def ends_epoch(self) -> bool:
        return False

    def backward(self, loss: Tensor) -> None:
        if self.parts.are_sharded:
            super().backward(loss)
        else:
            self.timer.backward(loss)

    def save(self) -> None:
        pass

    def export(self) -> list[dict[str, Any]]:
        return []

    def outcome(self, state: str, exports: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
        steps, *sums = self.timer.totals(self.warmup)
        own = torch.tensor(
            [math.nan if it is None else it for it in sums], dtype=torch.float64, device=self.worker.device
        )
        ranks = [
            {
                "samples": int(samples),
                "seconds": seconds,
                "data": data,
                "communication": None if math.isnan(communication) else communication,
            }
            for samples, seconds, data, communication in all_gather(own).tolist()
        ]
        return super().outcome(state, exports) | {"step_times": {"steps": steps, "ranks": ranks}}
