"""The training loop on a worker.

Every worker of a run calls :func:`train_on_worker` with the same :class:`~raytorch.runs.plan.WorkerJob`. All of them
take the same decisions (stop, save, give up), because these follow from numbers that are reduced over all workers.
"""

import logging
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from typing import Any, cast

import ray
import ray.train
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from raytorch.config import Augment, OwnData
from raytorch.config.metrics import LOSS_LABEL
from raytorch.config.own_calls import imported
from raytorch.datasets import MicroBatch, TrainLoader, evaluation_batches, load_split
from raytorch.distributed.collectives import all_gather, all_reduce, broadcast
from raytorch.distributed.ddp import broadcast_buffers, data_parallel, gradient_sync
from raytorch.distributed.exception_causes import failure_cause
from raytorch.distributed.process_group import leaving_process_group
from raytorch.distributed.worker import Worker, device_name
from raytorch.errors import DivergedError
from raytorch.models.networks import Architecture
from raytorch.models.objectives import EachCallOnce, loss_function, metrics_of, ratio, require_enough_samples, total
from raytorch.optimizers import build_optimizer, optimizer_state, restore_optimizer
from raytorch.runs.checkpoint_manifest import checkpoint_name, checkpoint_step
from raytorch.runs.metrics import METRICS_FILE, MetricsLog, PhaseClock, Throughput, log_to_file, versions
from raytorch.runs.plan import WorkerJob
from raytorch.runs.status import Evaluation
from raytorch.runs.storage import LiveFiles
from raytorch.system.allocator import keep_freed_memory
from raytorch.training.averaging import WeightAverage
from raytorch.training.batch_loss import BatchLoss
from raytorch.training.checkpoints import Checkpoints, SavedState, open_checkpoint
from raytorch.training.monitor import DriverLink, reporting_failures
from raytorch.training.precision import Precision, choose_attention
from raytorch.training.reproducibility import generator_states, restore_generators, seed_everything
from raytorch.training.schedules import build_schedule
from raytorch.training.stopping import DriverRequest, Patience, StopAgreement

EXPORT_FOLDER = "export"
EVALUATION_BATCH = 512
"""Samples per forward pass of a worker in evaluation."""

logger = logging.getLogger("raytorch")


def train_on_worker(
    job: WorkerJob, make_trainer: "Callable[[WorkerJob, Worker, LiveFiles], Trainer] | None" = None
) -> None:
    """Train on this worker until the run is finished or stopped; rank 0 tells the monitor what it came to.

    ``make_trainer`` makes this worker's trainer, by default a :class:`Trainer`.
    """
    worker, code = Worker.current(), job.plan.config.code
    job.monitor.joined.remote(worker.rank, worker.world_size, os.getpid(), ray.get_runtime_context().get_node_id())
    with (
        reporting_failures(job.monitor, worker.rank, failure_cause),  # also that its files cannot be written
        closing(LiveFiles(job.plan.folder)) as files,
        log_to_file(files.extend(f"logs/rank-{worker.rank}.log")),
        reporting_failures(job.monitor, worker.rank, failure_cause, code.root if code else None),
        leaving_process_group(),
    ):
        with closing((make_trainer or Trainer)(job, worker, files)) as run:
            run.restore()
            outcome = run.run()
        if worker.rank == 0:
            ray.get(job.monitor.ended.remote(outcome))


class Trainer:
    """One worker's part in a run."""

    def __init__(self, job: WorkerJob, worker: Worker, files: LiveFiles) -> None:
        self.job, self.worker, self.files = job, worker, files
        self.config, self.folder = job.plan.config, job.plan.folder
        config, device = self.config, worker.device
        if config.export:
            from raytorch.export import require_packages

            require_packages(config.export)
        seed_everything(config.seed)
        torch.set_num_threads(max(1, int(config.scaling.cpus_per_worker)))
        choose_attention(device)
        keep_freed_memory()

        for name in config.references:  # what is wrong with it is found before data is read
            imported(name, config.code)
        self.train_set, self.test_set = load_split(config, "train", device), load_split(config, "test", device)
        self.loader = TrainLoader(
            self.train_set,
            batch_size=config.batch_size,
            micro_batches=config.accumulate,
            rank=worker.rank,
            world_size=worker.world_size,
            seed=config.seed,
            augment=Augment() if isinstance(config.data, OwnData) else config.data.augment,
        )
        self.total_steps = config.steps or (config.epochs or 0) * self.loader.steps_per_epoch

        self.precision = Precision.choose(config.precision, device)
        self.architecture = Architecture.of(config.model, self.train_set.facts, config.code)
        self.model = self.precision.to_memory_format(self.architecture.build().to(device))
        self.loss = loss_function(config.loss, self.model, config.code)
        self.judges = metrics_of(config.judged_by, self.model, config.code)
        require_enough_samples(config, self.loss, self.model, self.train_set)
        # Compiled below DDP, whose own forward pass torch.compile cannot trace; with a graph for each shape of batch,
        # so that a resumed run computes with the same ones.
        net = cast(nn.Module, torch.compile(self.model, dynamic=False)) if config.compile else self.model
        self.net = data_parallel(net)
        self.optimizer = build_optimizer(config.optimizer, self.model.named_parameters())
        self.average = WeightAverage(self.model, config.ema)
        self.step = 0
        self.schedule = self._schedule()
        torch.manual_seed(config.seed + 1 + worker.rank)  # from here on, dropout draws differently on each worker

        self.metrics: dict[str, float] = {}
        self.losses: list[Tensor] = []
        self.batch_loss = BatchLoss(self.model, worker)
        self.patience = Patience(config)
        self.agreement = StopAgreement(lambda numbers: all_reduce(torch.tensor(numbers, device=device)).tolist())
        self.request = DriverRequest.CONTINUE
        self.clock = PhaseClock()
        self.throughput = Throughput()
        self.driver = DriverLink(job.monitor, worker.rank)
        self.log: MetricsLog | None = None
        self.checkpoints: Checkpoints | None = None

    def run(self) -> dict[str, Any]:
        """Train to the end."""
        while not self.is_over:
            for micro_batches in self.batches():
                self.train_step(micro_batches)
                self.take_driver_request()
                if self.step % self.config.logging.every_steps == 0:
                    self.reduce_losses()
                if self.step >= self.total_steps or self.request is DriverRequest.STOP:
                    break
                if self.save_is_due() and not self.epoch_is_over:
                    self.save()
            if self.request is DriverRequest.STOP and self.step < self.total_steps:
                self.save()
                self.finish_saving()
                return self.outcome("stopped")
            self.finish_epoch()
        self.finish_saving()
        return self.outcome("finished", self.export())

    def batches(self) -> Iterator[list[MicroBatch]]:
        """The rest of the epoch, a list of this worker's micro-batches for each optimizer step."""
        return self.clock.waiting(self.loader.remaining())

    def train_step(self, micro_batches: list[MicroBatch]) -> None:
        """One optimizer step over a global batch; the last backward pass averages the gradients over the workers."""
        self.optimizer.zero_grad(set_to_none=True)
        for number, batch in enumerate(micro_batches, start=1):
            with gradient_sync(self.net, enabled=number == len(micro_batches)):
                with self.precision.autocast():
                    value = self.loss(self.net, self.precision.layout_of(batch.content))
                self.backward(self.batch_loss.part(value, batch))
        loss = self.batch_loss.finish()
        if self.config.clip_norm:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_norm)
        self.optimizer.step()
        self.average.update()
        self.schedule.step()
        self.step += 1
        self.losses.append(loss)
        self.driver.report_progress(self._position())
        self.throughput.count(self.loader.epoch * len(self.train_set) + self.loader.position, self.clock)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of ``loss`` to the parameters'."""
        torch.autograd.backward(loss)

    def take_driver_request(self) -> None:
        """Every few seconds, learn from rank 0 whether the driver wants a checkpoint, or the run to end."""
        self.request = DriverRequest.CONTINUE
        if not self.agreement.count_step():
            return
        if self.worker.device.type == "cuda":
            torch.cuda.synchronize(self.worker.device)  # steps that are only queued have no pace
        self.request = self.agreement.agree(self.driver.take_request())

    def reduce_losses(self) -> None:
        """Average the losses since the last call over all workers, and record them."""
        if not self.losses:
            return
        losses = (all_reduce(torch.stack(self.losses)) / self.worker.world_size).tolist()
        first = self.step - len(losses) + 1
        self.losses.clear()
        self._refuse_nonfinite(losses, first)
        if self.log:
            values: dict[str, float | None] = {
                "loss": sum(losses) / len(losses),
                "lr": float(self.schedule.get_last_lr()[-1]),
                "samples_per_s": self.throughput.recent(),
            }
            self.log.write("train", self.step, self.epochs_done, values)
            self.driver.report_progress({**self._position(), **values})

    def finish_epoch(self) -> None:
        """Evaluate, move on to the next epoch and save if it is time."""
        self.reduce_losses()
        self.evaluate()
        self.patience.look(self.metrics)
        exhausted = self.epoch_is_over
        if exhausted:
            self.loader.next_epoch()
        every = self.config.checkpoint.every_epochs
        epoch_is_due = bool(exhausted and every and self.loader.epoch % every == 0)
        if epoch_is_due or self.save_is_due() or self.is_over:
            self.save(evaluated=True)
        self.files.sync()

    @torch.no_grad()
    def evaluate(self) -> None:
        """Loss and metrics on the test split, each sample counted once over all workers."""
        with self.clock.phase("evaluating"):
            self.driver.report_progress({**self._position(), "phase": "evaluating"})
            model = self.average.model
            broadcast_buffers(model)
            model.eval()
            judges: dict[str, Callable[..., Any]] = {**self.judges, LOSS_LABEL: self.loss}
            totals = torch.zeros(len(judges), 2, dtype=torch.float64, device=self.worker.device)
            for batch in evaluation_batches(
                self.test_set, batch_size=EVALUATION_BATCH, rank=self.worker.rank, world_size=self.worker.world_size
            ):
                content, once = self.precision.layout_of(batch.content), EachCallOnce(model)
                with self.precision.autocast():
                    values = {name: once.judged(judge, content) for name, judge in judges.items()}
                parts = [total(value, batch.samples, name) for name, value in values.items()]
                totals += torch.stack([part.to(totals.device) for part in parts])
            model.train()
            sums = all_reduce(totals).tolist()
        self.metrics = {name: ratio(part, count, name) for name, (part, count) in zip(judges, sums, strict=True)}
        self._refuse_nonfinite([self.metrics[LOSS_LABEL]], self.step, "test loss")
        logger.info("epoch %.2f step %d: %s", self.epochs_done, self.step, self.metrics)
        if self.log:
            self.log.write("test", self.step, self.epochs_done, self.metrics)
            self.driver.report_evaluation(Evaluation(self.step, self.epochs_done, self.metrics))

    def save_is_due(self) -> bool:
        """Tell whether this step ends with a checkpoint."""
        every = self.config.checkpoint.every_steps
        return bool(every and self.step % every == 0) or self.request is DriverRequest.SAVE

    def save(self, *, evaluated: bool = False) -> None:
        """Save all that the next step depends on; ``evaluated`` tells whether :attr:`metrics` are this model's."""
        self.reduce_losses()  # a diverged model must not become the latest checkpoint
        with self.clock.phase("checkpointing"):
            device = self.worker.device
            generators = {name: all_gather(state.to(device)).cpu() for name, state in generator_states(device).items()}
            if not self.checkpoints:
                return
            state = {
                "optimizer": optimizer_state(self.optimizer, self.model.parameters()),
                "loader": self.loader.state_dict(),
                "patience": self.patience.state_dict(),
                "average": self.average.state_dict(),
                "generators": generators,
            }
            manifest = {
                "step": self.step,
                "epoch": self.epochs_done,
                "metrics": self.metrics,
                "evaluated": evaluated,
                "seconds": self.clock.read(),
                "config": self.config.model_dump(mode="json"),
                "code": self.config.code.digests() if self.config.code else {},
                "versions": versions(),
            }
            self.checkpoints.save(self.average.model, self.architecture, state, manifest)

    def finish_saving(self) -> None:
        """Wait for a checkpoint that is still on its way to the storage."""
        if self.checkpoints:
            self.driver.report_progress({**self._position(), "phase": "saving"})
            with self.clock.phase("checkpointing"):
                self.checkpoints.wait()

    def restore(self) -> None:
        """Continue from the newest checkpoint in the run's folder, if there is one, and open the records."""
        newest = None
        if self.worker.rank == 0:
            ray.get(self.job.monitor.begin_attempt.remote())
            keep, ranking = self.config.checkpoint.keep, self.config.ranking
            self.checkpoints = Checkpoints(self.folder, keep, ranking, self.job.monitor.saved.remote)
            newest = self.checkpoints.recover()
        agreed = torch.tensor(checkpoint_step(newest) if newest else -1, device=self.worker.device)
        step = int(broadcast(agreed))  # all begin with what rank 0 has found
        if step >= 0:
            with open_checkpoint(self.folder, checkpoint_name(step)) as content:
                self._load(content)
            logger.info("resumed from %s at step %d", checkpoint_name(step), self.step)
        if self.worker.rank == 0:
            self.files.extend(METRICS_FILE).close()
            self.log = MetricsLog(self.files.path, resume_step=self.step, tensorboard=self.config.logging.tensorboard)
            self.driver.report_progress(self._position())

    def _load(self, content: SavedState) -> None:
        state = content.state()
        self.average.load_state_dict(content.model(self.worker.device), state.get("average", {}))
        restore_optimizer(self.optimizer, state["optimizer"], self.model.parameters())
        self.loader.load_state_dict(state["loader"])
        self.patience.load_state_dict(state.get("patience", {}))  # which older checkpoints do not have
        self.step = content.manifest.step
        self.schedule = self._schedule()
        self.metrics = content.manifest.metrics
        self.clock = PhaseClock(content.manifest.seconds)
        restore_generators(state["generators"], self.worker, seed=self.config.seed + self.step)

    def _schedule(self) -> LambdaLR:
        """The schedule at :attr:`step`."""
        span = {"total_steps": self.total_steps, "steps_per_epoch": self.loader.steps_per_epoch}
        return build_schedule(self.config.schedule, self.optimizer, **span, step=self.step)

    @property
    def is_over(self) -> bool:
        """True if there is nothing left to train."""
        return self.step >= self.total_steps or self.patience.is_over

    @property
    def epoch_is_over(self) -> bool:
        """True if every sample of this epoch has been seen."""
        return bool(self.loader.position == len(self.train_set))

    @property
    def epochs_done(self) -> float:
        """Passes over the training split until now."""
        return self.loader.epoch + self.loader.position / len(self.train_set)

    def export(self) -> list[dict[str, Any]]:
        """Rank 0 writes the finished model into ``export`` in each format that the run asks for. Raises ExportError."""
        if self.worker.rank > 0 or not self.config.export:
            return []
        from raytorch.export import export_finished  # onnxruntime takes a second to import

        self.driver.report_progress({**self._position(), "phase": "exporting"})
        model = self.architecture.build()  # on the CPU, in PyTorch's own layout
        model.load_state_dict(self.average.model.state_dict())
        with self.clock.phase("exporting"):
            exports = export_finished(model, self.architecture, self.config.export, self.files.make(EXPORT_FOLDER))
        self.files.sync()
        return exports

    def outcome(self, state: str, exports: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
        """Return what the run came to; ``state`` is finished or stopped."""
        return {
            "state": state,
            "ended_early": self.patience.reason(),
            "metrics": self.metrics,
            "step": self.step,
            "epochs": round(self.epochs_done, 4),
            "samples_per_s": self.throughput.overall(),
            "seconds": self.clock.read(),
            "first_step_at": self.throughput.first_step_at,
            "exports": list(exports),
            "workers": self.worker.world_size,
            "device": device_name(self.worker.device),
            "precision": self.precision.name,
            "backend": self.config.scaling.resolved_backend,
            "seed": self.config.seed,
            "versions": versions(),
        }

    def close(self) -> None:
        """Close the records."""
        if self.log:
            self.log.close()

    def _position(self) -> dict[str, Any]:
        return {
            "phase": "training",
            "step": self.step,
            "total_steps": self.total_steps,
            "epoch": self.epochs_done,
            "workers": self.worker.world_size,
            "first_step_at": self.throughput.first_step_at,
        }

    def _refuse_nonfinite(self, losses: list[float], first_step: int, kind: str = "loss") -> None:
        for step, loss in enumerate(losses, start=first_step):
            if not math.isfinite(loss):
                config = self.config.optimizer
                groups = ", and that of optimizer.groups" if any(group.lr for group in config.groups) else ""
                raise DivergedError(
                    f"the {kind} became {loss} at step {step} of {self.total_steps}; lower optimizer.lr (now "
                    f"{config.lr:g}{groups}), set clip_norm, add schedule.warmup_steps, or try precision: fp32"
                )
