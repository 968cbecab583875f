"""What a model comes to on a split: its loss and its metrics, over all workers."""

from collections.abc import Mapping

import torch
from torch import nn

from raytorch.config.metrics import LOSS_LABEL
from raytorch.datasets import evaluation_batches
from raytorch.datasets.requests import Split
from raytorch.distributed.collectives import all_reduce
from raytorch.distributed.ddp import broadcast_buffers
from raytorch.distributed.worker import Worker
from raytorch.models.objectives import EachCallOnce, LossFunction, MetricFunction, ratio, total
from raytorch.training.precision import Precision

EVALUATION_BATCH = 512
"""Samples per forward pass of a worker."""


class Evaluator:
    """Measures a model on a split, each sample counted once over all workers.

    Args:
        metrics: What to measure beside the loss, by label.
        loss: The loss.
        precision: The arithmetic.
        worker: This worker.
    """

    def __init__(
        self, metrics: Mapping[str, MetricFunction], loss: LossFunction, precision: Precision, worker: Worker
    ) -> None:
        self._judges = {**metrics, LOSS_LABEL: loss}
        self._precision, self._worker = precision, worker

    @torch.no_grad()
    def measure(self, model: nn.Module, split: Split) -> dict[str, float]:
        """The metrics and the loss, the same on every worker; a collective operation. The model is left in training."""
        broadcast_buffers(model)
        model.eval()
        worker, judges = self._worker, self._judges
        totals = torch.zeros(len(judges), 2, dtype=torch.float64, device=worker.device)
        for batch in evaluation_batches(
            split, batch_size=EVALUATION_BATCH, rank=worker.rank, world_size=worker.world_size
        ):
            content, once = self._precision.layout_of(batch.content), EachCallOnce(model)
            with self._precision.autocast():
                values = {name: judge(once, content) for name, judge in judges.items()}
            parts = [total(value, batch.samples, name) for name, value in values.items()]
            totals += torch.stack([part.to(totals.device) for part in parts])
        model.train()
        sums = all_reduce(totals).tolist()
        return {name: ratio(part, count, name) for name, (part, count) in zip(judges, sums, strict=True)}
