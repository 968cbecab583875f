"""The shipped loop: a model, a data set, a loss, an optimizer with a schedule, and an evaluation after each epoch."""

from collections.abc import Callable
from typing import Any

import torch

from raytorch.config import Augment, OwnData
from raytorch.config.metrics import LOSS_LABEL
from raytorch.config.own_calls import imported
from raytorch.datasets import MicroBatch, load_split
from raytorch.distributed.ddp import gradient_sync
from raytorch.models.networks import Architecture
from raytorch.models.objectives import EachCallOnce, loss_function, metrics_of, require_enough_samples, total
from raytorch.runs.checkpoint_manifest import THE_MODEL
from raytorch.training.batch_loss import BatchLoss
from raytorch.training.optimizer_steps import OptimizerSteps
from raytorch.training.run import Run


class Trainer:
    """One worker's part in the shipped loop."""

    def __init__(self, run: Run) -> None:
        self.run, self.config = run, run.config
        config, device = self.config, run.worker.device
        for name in config.references:  # what is wrong with it is found before data is read
            imported(name, config.code)
        self.train_set, self.test_set = load_split(config, "train", device), load_split(config, "test", device)
        self.batches = run.steps(
            self.train_set,
            accumulate=config.accumulate,
            augment=Augment() if isinstance(config.data, OwnData) else config.data.augment,
        )
        architecture: Any = Architecture.of(config.model, self.train_set.facts, config.code)
        self.net = run.model(THE_MODEL, architecture)
        self.model = run.bare(THE_MODEL)
        self.judged = run.average(THE_MODEL, config.ema.decay) if config.ema else self.model
        self.loss = loss_function(config.loss, self.model, config.code)
        metrics = metrics_of(config.judged_by, self.model, config.code)
        self.judges: dict[str, Callable[..., Any]] = {**metrics, LOSS_LABEL: self.loss}
        require_enough_samples(config, self.loss, self.model, self.train_set)
        span = {"total_steps": self.batches.total, "steps_per_epoch": self.batches.steps_per_epoch}
        self.steps = run.keep("optimizer", OptimizerSteps(config, self.model, run.precision, **span))
        run.gauge("lr", lambda: self.steps.rate)
        self.layout = run.precision.layout_of
        self.batch_loss = BatchLoss(self.model, run.worker)

    def train(self) -> None:
        """Train to the end."""
        for micro_batches in self.batches:
            self.train_step(micro_batches)
            if self.run.ends_epoch:
                self.evaluate()

    def train_step(self, micro_batches: list[MicroBatch]) -> None:
        """One optimizer step over a global batch; the last backward pass averages the gradients over the workers."""
        self.steps.zero_grad()
        for number, batch in enumerate(micro_batches, start=1):
            with gradient_sync(self.net, enabled=number == len(micro_batches)):
                with self.run.autocast():
                    value = self.loss(self.net, self.layout(batch.content))
                self.run.backward(self.steps.scaled(self.batch_loss.part(value, batch)))
        loss = self.batch_loss.finish()
        if self.steps.take():
            self.run.log(loss=loss)
        else:
            self.run.skipped()

    def evaluate(self) -> None:
        """Loss and metrics on the test split, each sample counted once over all workers."""
        totals = {name: torch.zeros(2, dtype=torch.float64) for name in self.judges}
        with self.run.evaluating():
            for batch in self.run.share_of(self.test_set):
                content, once = self.layout(batch.content), EachCallOnce(self.judged)
                with self.run.autocast():
                    values = {name: judge(once, content) for name, judge in self.judges.items()}
                for name, value in values.items():
                    part = total(value, batch.samples, name)
                    totals[name] = totals[name].to(part.device) + part
        self.steps.after_evaluation(self.run.evaluated(**{name: (it[0], it[1]) for name, it in totals.items()}))
