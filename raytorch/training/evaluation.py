"""What a model comes to on a split: its loss and its metrics, over all workers."""

from collections.abc import Mapping

import torch
from torch import nn

from raytorch.config import RunConfig
from raytorch.config.metrics import LOSS_LABEL
from raytorch.datasets import evaluation_batches
from raytorch.datasets.requests import Split
from raytorch.distributed.collectives import all_reduce, broadcast, gather_objects
from raytorch.distributed.sharding import is_sharded
from raytorch.distributed.worker import Worker
from raytorch.models.objectives import EachCallOnce, Judge, LossFunction, judged_ratio, on_split, total
from raytorch.models.stateful_metrics import StatefulMetric
from raytorch.training.precision import Precision

EVALUATION_BATCH = 512
"""Samples per forward pass of a worker."""


def evaluation_batch(config: RunConfig) -> int:
    """How many samples a worker judges at once: of text, whose logits take gigabytes, no more than it trains on."""
    if config.data.kind != "tokens":
        return EVALUATION_BATCH
    data_workers = config.scaling.max_workers // config.parallel.tensor
    return min(EVALUATION_BATCH, max(1, config.batch_size // (data_workers * config.accumulate)))


class Evaluator:
    """Measures a model on a split, each sample counted once over all workers.

    Args:
        metrics: What to measure beside the loss, by label.
        loss: The loss.
        precision: The arithmetic.
        worker: This worker.
        batch_size: Samples per forward pass.
    """

    def __init__(
        self,
        metrics: Mapping[str, Judge],
        loss: LossFunction,
        precision: Precision,
        worker: Worker,
        batch_size: int = EVALUATION_BATCH,
    ) -> None:
        judges = {**metrics, LOSS_LABEL: loss}
        self._labels = list(judges)
        self._means = {name: judge for name, judge in judges.items() if not isinstance(judge, StatefulMetric)}
        self._stateful = {name: judge for name, judge in metrics.items() if isinstance(judge, StatefulMetric)}
        self._precision, self._worker, self._batch_size = precision, worker, batch_size
        for metric in self._stateful.values():
            metric.to(worker.device)

    def measure(self, model: nn.Module, split: Split) -> dict[str, float]:
        """The metrics and the loss, the same on every worker; a collective operation, within ``run.evaluating()``."""
        worker = self._worker
        means = {name: on_split(judge, split.facts) for name, judge in self._means.items()}
        totals = torch.zeros(len(means), 2, dtype=torch.float64, device=worker.device)
        for metric in self._stateful.values():
            metric.reset()
        shares = {"rank": worker.data_rank, "world_size": worker.data_workers}
        for batch in evaluation_batches(split, batch_size=self._batch_size, **shares, in_step=is_sharded(model)):
            content, once = self._precision.layout_of(batch.content), EachCallOnce(model)
            with self._precision.autocast():
                values = {name: once.judged(judge, content) for name, judge in means.items()}
                for metric in self._stateful.values():
                    metric.update(once, content)
            if not batch.samples:  # which only keeps this worker in step
                for metric in self._stateful.values():
                    metric.reset()
                continue
            parts = [total(value, batch.samples, name) for name, value in values.items()]
            totals += torch.stack([part.to(totals.device) for part in parts])
        sums = all_reduce(totals).tolist()
        measured = {
            name: judged_ratio(part, count, name) for name, (part, count) in zip(self._means, sums, strict=True)
        }
        measured |= self._of_states()
        return {name: measured[name] for name in self._labels}

    def _of_states(self) -> dict[str, float]:
        """The metrics that keep states: the last worker, which has samples if any has, computes and tells them."""
        worker, metrics = self._worker, self._stateful
        if not metrics:
            return {}
        every = gather_objects([metric.states() for metric in metrics.values()])[:: worker.tensor]
        values = torch.zeros(len(metrics), dtype=torch.float64, device=worker.device)
        last = worker.world_size - 1
        if worker.rank == last:
            for number, metric in enumerate(metrics.values()):
                values[number] = metric.compute([states[number] for states in every])
        else:
            for metric in metrics.values():  # which may hold all that the model said, also while it is trained again
                metric.reset()
        return dict(zip(metrics, broadcast(values, src=last).tolist(), strict=True))
