"""A run whose steps are timed, for a study: it trains as any other, but neither evaluates nor saves what it trains."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from raytorch.datasets import MicroBatch
from raytorch.distributed import Worker
from raytorch.distributed.collectives import all_gather
from raytorch.runs.plan import WorkerJob
from raytorch.runs.storage import LiveFiles
from raytorch.scaling.step_timer import StepTimer
from raytorch.training.loop import Trainer, train_on_worker


def train_timed(job: WorkerJob, *, warmup: int, steps: int) -> None:
    """Take ``warmup`` optimizer steps, in which memory is taken and kernels are chosen, then time ``steps`` on every
    worker, if the run has as many.

    The run's outcome has ``step_times``: the steps that were timed, and a dict of ``samples`` and of ``seconds``, those
    of waiting for ``data`` and those of ``communication`` for each rank; see
    :class:`~raytorch.scaling.step_timer.StepTotals`.
    """
    train_on_worker(job, lambda *part: TimedTrainer(*part, warmup=warmup, steps=steps))


class TimedTrainer(Trainer):
    """One worker's part in a timed run."""

    def __init__(self, job: WorkerJob, worker: Worker, files: LiveFiles, *, warmup: int, steps: int) -> None:
        super().__init__(job, worker, files)
        self.warmup = warmup
        self.total_steps = min(self.total_steps, warmup + steps + 1)  # the last has no successor and is not counted
        self.timer = StepTimer(self.model, worker.device)

    def batches(self) -> Iterator[list[MicroBatch]]:
        return self.timer.steps(super().batches())

    def backward(self, loss: Tensor) -> None:
        self.timer.backward(loss)

    def finish_epoch(self) -> None:
        self.reduce_losses()
        if self.epoch_is_over:
            self.loader.next_epoch()

    def test(self) -> None:
        pass

    def save(self, *, evaluated: bool = False) -> None:
        pass

    def export(self) -> list[dict[str, Any]]:
        return []

    def outcome(self, state: str, exports: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
        steps, *sums = self.timer.totals(self.warmup)
        own = torch.tensor(sums, dtype=torch.float64, device=self.worker.device)
        ranks = [
            {"samples": int(samples), "seconds": seconds, "data": data, "communication": communication}
            for samples, seconds, data, communication in all_gather(own).tolist()
        ]
        return super().outcome(state, exports) | {"step_times": {"steps": steps, "ranks": ranks}}
