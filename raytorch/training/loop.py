"""The shipped loop: a model, a data set, a loss, an optimizer with a schedule, and an evaluation after each epoch."""

from collections.abc import Callable
from typing import Any, cast

from raytorch.config import Augment, ImageData, OwnData
from raytorch.config.own_calls import imported
from raytorch.datasets import MicroBatch, load_splits
from raytorch.distributed.ddp import gradient_sync
from raytorch.distributed.sharding import whole
from raytorch.models.fitting import require_fitting
from raytorch.models.networks import Architecture
from raytorch.models.objectives import loss_function, metrics_of, require_enough_samples
from raytorch.runs.checkpoint_manifest import THE_MODEL
from raytorch.runs.metrics import Work
from raytorch.training.after_evaluation import AfterEvaluation
from raytorch.training.batch_loss import BatchLoss
from raytorch.training.evaluation import Evaluator, evaluation_batch
from raytorch.training.optimizer_steps import OptimizerSteps
from raytorch.training.preparing import begin, prepare
from raytorch.training.run import Run
from raytorch.training.streams import stream_of
from raytorch.training.work import WorkMeter


class Trainer:
    """One worker's part in the shipped loop."""

    def __init__(self, run: Run, tell_work: Callable[[Work], None] = lambda work: None) -> None:
        """``tell_work`` is called on rank 0 with what a sample takes, in the first step."""
        self.run, self.config = run, run.config
        config, device = self.config, run.worker.device
        for name in config.references:  # what is wrong with it is found before data is read
            imported(name, config.code)
        self.splits = load_splits(
            config,
            device,
            lambda data: stream_of(data, run.worker, run.report, cast(OwnData, config.data)),
            run.skipped_samples,
        )
        require_fitting(config, self.splits.train.facts)
        self.batches = run.steps(
            self.splits.train,
            accumulate=config.accumulate,
            weights=self.splits.weights,
            shuffle=config.shuffle,
            augment=config.data.augment if isinstance(config.data, ImageData) else Augment(),
        )
        architecture: Any = Architecture.of(config.model, self.splits.train.facts, config.code)
        self.net = run.model(THE_MODEL, architecture, lambda model: prepare(model, config.model))
        self.model = run.bare(THE_MODEL)
        if not run.is_resumed:
            begin(self.model, config.model, device, run.report)
        self.judged = run.average(THE_MODEL, config.ema.decay) if config.ema else self.model
        self.loss = loss_function(config.loss, self.model, config.code, compiled=config.compile)
        metrics = metrics_of(config.judged_by, self.model, config.code, self.splits.judged.facts)
        self.evaluator = Evaluator(metrics, self.loss, run.precision, run.worker, evaluation_batch(config))
        require_enough_samples(config, self.loss, self.model, self.splits.train)
        span = {"total_steps": self.batches.total, "steps_per_epoch": self.batches.steps_per_epoch}
        self.steps = run.keep("optimizer", OptimizerSteps(config, self.model, run.precision, **span))
        run.gauge("lr", lambda: self.steps.rate)
        self.layout = run.precision.layout_of
        shown = config.on_evaluation
        self.after_evaluation = AfterEvaluation(shown, config.code, device) if shown else None
        self.batch_loss = BatchLoss(self.model, run.worker)
        self.meter = WorkMeter(config, run.worker, run.precision, self.splits.train.facts, tell_work)

    def train(self) -> None:
        """Train to the end."""
        for micro_batches in self.batches:
            with self.meter.counting(self.model, self.loss, micro_batches):
                self.train_step(micro_batches)
            if self.run.ends_epoch:
                self.evaluate()
        if self.splits.test:
            with self.run.evaluating():
                measured = self.evaluator.measure(self.judged, self.splits.test)
            self.run.tested(**measured)

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
        """Judge the model, by which the schedule may go on and a function of the user's may look at it."""
        run = self.run
        with run.evaluating():
            metrics = run.evaluated(**self.evaluator.measure(self.judged, self.splits.judged))
            if self.after_evaluation:
                judged = whole(self.judged)
                if run.worker.rank == 0:
                    self.after_evaluation(judged, run.writer, run.step, run.epoch, metrics)
        self.steps.after_evaluation(metrics)
