"""How a run goes on from step to step on one worker: its place in the data, its records, checkpoints and end."""

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import ray
import torch
from torch import Tensor

from raytorch.config.metrics import LOSS_LABEL
from raytorch.datasets import MicroBatch, TrainLoader
from raytorch.datasets.skipping import SkippedSamples
from raytorch.distributed.collectives import all_gather, all_reduce
from raytorch.distributed.worker import Worker, device_name
from raytorch.errors import ConfigError, DivergedError, UserError
from raytorch.runs.checkpoint_manifest import checkpoint_name
from raytorch.runs.metrics import METRICS_FILE, MetricsLog, PhaseClock, Throughput, versions
from raytorch.runs.plan import WorkerJob
from raytorch.runs.skipped_list import SKIPPED_FILE
from raytorch.runs.status import Evaluation
from raytorch.runs.storage import LiveFiles
from raytorch.training.batches import Batches, RunStopped, queued_work
from raytorch.training.monitor import DriverLink, tell_skipped
from raytorch.training.optimizer_steps import diverged
from raytorch.training.parts import Parts
from raytorch.training.place import Place
from raytorch.training.precision import Precision
from raytorch.training.reproducibility import generator_states
from raytorch.training.run_state import Restored
from raytorch.training.saved_state import explaining_misfit
from raytorch.training.saving import Saving
from raytorch.training.step_log import Number, StepLog, reduced, require_the_same
from raytorch.training.stopping import DriverRequest, Patience, StopAgreement
from raytorch.training.work import peak_memory

EXPORT_FOLDER = "export"
logger = logging.getLogger("raytorch")


class RunProgress:
    """The part that a run has on one worker, beside its loop."""

    def __init__(self, job: WorkerJob, worker: Worker, files: LiveFiles) -> None:
        worker = worker.in_groups_of(job.plan.config.parallel.tensor)
        self.job, self.worker, self.files = job, worker, files
        self.config, self.folder = job.plan.config, job.plan.folder
        self.precision = Precision.choose(self.config.precision, worker.device)
        self.is_resumed = self.is_stopped = False
        self.parts = Parts(self.config, worker, self.precision)
        self.log = StepLog(worker)
        self.gauges: dict[str, Callable[[], float]] = {}
        self.step = self.total_steps = 0
        self.metrics: dict[str, float] = {}
        self.test_metrics: dict[str, float] = {}
        self.place = Place(self.parts, worker, self.config.seed)
        self._is_within = self._is_pending = False
        self._evaluated_at, self._saved_at = -1, (-1, -1)
        self.patience = Patience(self.config)
        self.agreement = StopAgreement(lambda it: all_reduce(torch.tensor(it, device=worker.device)).tolist())
        self.request = DriverRequest.CONTINUE
        self.clock, self.throughput = PhaseClock(), Throughput()
        self.queued_work = queued_work(worker.device)
        self.driver = DriverLink(job.monitor, worker.rank)
        listed_in = f"{self.folder}/{SKIPPED_FILE}"
        self.skipped_samples = SkippedSamples(lambda samples: tell_skipped(job.monitor, samples), listed_in)
        self.records: MetricsLog | None = None
        on_saved = job.monitor.saved.remote
        self.saving = Saving(self.config, worker, self.folder, on_saved, is_shared=self.parts.are_sharded)

    # -- beginning ---------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Find the newest checkpoint in the run's folder, if there is one, and open the records."""
        if self.worker.rank == 0:
            ray.get(self.job.monitor.begin_attempt.remote())
        if (step := self.saving.begin()) is not None:
            self._restore(step)
        if self.worker.rank == 0:
            self.files.extend(METRICS_FILE).close()
            wanted, lines = self.config.logging.tensorboard, self.parts.restored.lines if self.parts.restored else 0
            self.records = MetricsLog(self.files.path, resume_step=self.step, lines=lines, tensorboard=wanted)

    def _restore(self, step: int) -> None:
        may_differ = self.job.plan.changed_code
        restored = Restored(
            self.folder,
            step,
            in_parts=self.parts.are_sharded,
            may_differ=may_differ,
            may_be_changed=self.config.loop is not None,
        )
        self.parts.restored, self.is_resumed = restored, True
        with explaining_misfit(restored.name):
            self.patience.load_state_dict(restored.state["patience"])
            self.place.restore(restored.state, restored.manifest.step)
            self.saving.restore(restored.state.get("checkpoints", {}))
        self.step, self.metrics = restored.manifest.step, restored.manifest.metrics
        self.parts.skip_averages(self.step)
        self._evaluated_at = self.step if restored.manifest.evaluated else -1
        self._saved_at = self.step, self._evaluated_at
        self.clock = PhaseClock(restored.manifest.seconds)
        logger.info("resumed from %s at step %d", checkpoint_name(step), self.step)

    # -- batches -----------------------------------------------------------------------------------------------------

    def take(self, batches: Batches) -> Iterator[list[MicroBatch]]:
        """The batches, from the place on at which the checkpoint was saved; each ends the step before it."""
        if self._is_within:
            raise UserError(
                "run.batches: the batches before these are not at their end; iterate over one at a time, or close() "
                "the iterator"
            )
        if batches.loader is self.place.loader:
            raise UserError("run.batches: these were iterated over already; ask for new ones")
        if self.is_stopped:
            raise RunStopped
        self._complete_step()
        is_replaying, total = self.place.is_replaying, batches.total
        require_the_same(self.worker, f"{batches}, with {sorted(self.parts.registered)}", "run.batches")
        began = self.place.enter(batches.loader, self.step, lambda it: self._is_done(self.last_step(it, total)))
        if not is_replaying and self.request is DriverRequest.STOP:  # heard in the last step before these
            self.is_stopped = True
            raise RunStopped
        self._is_within = self.parts.is_within_batches = True
        try:
            if began is not None:
                self.total_steps = self.last_step(began, total)
                self.report({})
                self.place.is_left = True
                yield from self._steps(batches.loader)
                self.place.is_left = False
        finally:
            self._is_within = self.parts.is_within_batches = False

    def last_step(self, began: int, total: int) -> int:
        """The last of ``total`` steps after so many."""
        return began + total

    def _steps(self, loader: TrainLoader) -> Iterator[list[MicroBatch]]:
        while not self.is_over():
            if loader.position == loader.samples:  # a loop that was left by break ended there
                loader.next_epoch()
            for micro_batches in self.clock.waiting(loader.remaining(), self.queued_work):
                self._leave_restored()
                self.step += 1
                self._is_pending = True
                yield micro_batches
                self._finish_step(loader)
                if self.is_over():
                    break

    def _leave_restored(self) -> None:
        restored, self.parts.restored = self.parts.restored, None
        if restored:
            restored.close()

    def _complete_step(self) -> None:
        """Take the step into account that a loop has left by break."""
        if self._is_pending:
            self._is_pending = False
            self.parts.update_averages(self.step)

    def _finish_step(self, loader: TrainLoader) -> None:
        """Hear the driver, write metrics and save, if it is time; leaves the loop if the run is to stop."""
        self._complete_step()
        self.report({})
        self.throughput.count(self.place.samples_seen, self.clock)
        self._hear_the_driver()
        if self.step % self.config.logging.every_steps == 0:
            self.write_log()
        every, exhausted = self.config.checkpoint.every_epochs, loader.position == loader.samples
        if exhausted:
            loader.next_epoch()
        epoch_is_due = bool(exhausted and every and loader.epoch % every == 0)
        stops = self.request is DriverRequest.STOP and not self.is_over()
        must, may = stops or self.is_over() or self.request is DriverRequest.SAVE, epoch_is_due or self._save_is_due()
        if must or (may and not self.saving.is_skipped()):
            self.save()
        self.saving.look()
        if exhausted or self._evaluated_at == self.step:
            self.files.sync()
        if stops:
            self.is_stopped = True
            raise RunStopped

    def is_over(self) -> bool:
        """True if there is nothing left to train in these batches."""
        return self._is_done(self.total_steps)

    def _is_done(self, last_step: int) -> bool:
        return self.step >= last_step or self.patience.is_over

    @property
    def ends_epoch(self) -> bool:
        """True in the last step of an epoch, and of the batches."""
        return self._is_within and (self.place.is_at_end_of_epoch or self.step >= self.total_steps)

    def _hear_the_driver(self) -> None:
        """Every few seconds, learn from rank 0 whether the driver wants a checkpoint, or the run to end."""
        self.request = DriverRequest.CONTINUE
        if not self.agreement.count_step():
            return
        if self.worker.device.type == "cuda":
            torch.cuda.synchronize(self.worker.device)  # steps that are only queued have no pace
        self.request = self.agreement.agree(self.driver.take_request())

    # -- records -----------------------------------------------------------------------------------------------------

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of ``loss`` to the parameters'."""
        torch.autograd.backward(loss)

    def write_log(self) -> None:
        """Write a line of what was logged since the last. Raises DivergedError for what is not finite."""
        taken = self.log.take()
        for name, line in taken.items():
            self._refuse_nonfinite(name, line)
        if self.records and taken:
            values: dict[str, float | None] = {
                name: sum(value for _, value in line) / len(line) for name, line in taken.items()
            }
            values |= {name: float(read()) for name, read in self.gauges.items()}
            values |= {**self.throughput.recent()._asdict(), "peak_memory_bytes": peak_memory(self.worker.device)}
            self.records.write("train", self.step, self.place.epochs_done, values)
            self.report({**values, "data_advice": self.place.data_advice(has_loop=self.config.loop is not None)})

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Let the models be evaluated in the block."""
        self.parts.update_averages(self.step)
        self.write_log()
        with self.clock.phase("evaluating"):
            self.report({"phase": "evaluating"})
            with self.parts.evaluating():
                yield

    def evaluated(self, metrics: Mapping[str, Number | tuple[Number, Number]]) -> dict[str, float]:
        """Take an evaluation of the models as they are."""
        split, measured = self.config.judged_split, reduced(self.worker, metrics, "run.evaluated")
        for needed in (self.config.ranking.label, self.patience.label):
            if needed not in (None, *measured):
                raise ConfigError(
                    f"run.evaluated: has no {needed}, by which checkpoints are ranked or the run ends early; give it, "
                    "or name another first in the configuration's metrics"
                )
        if self.place.is_replaying:  # it was written down before the checkpoint
            return measured
        self.metrics = dict(measured)
        self._record(split, self.metrics)
        self.driver.report_evaluation(Evaluation(self.step, self.place.epochs_done, self.metrics, split))
        self.patience.look(self.metrics)
        self._evaluated_at = self.step
        return measured

    def tested(self, metrics: Mapping[str, Number | tuple[Number, Number]]) -> dict[str, float]:
        """Take what the finished models come to on the test split."""
        self.test_metrics = reduced(self.worker, metrics, "run.tested")
        if not self.place.is_replaying:
            self._record("test", self.test_metrics)
        return self.test_metrics

    def _record(self, split: str, metrics: Mapping[str, float]) -> None:
        if LOSS_LABEL in metrics:
            self._refuse_nonfinite(f"{split} loss", [(self.step, metrics[LOSS_LABEL])])
        logger.info("epoch %.2f step %d: %s %s", self.place.epochs_done, self.step, split, metrics)
        if self.records:
            self.records.write(split, self.step, self.place.epochs_done, metrics)

    def _refuse_nonfinite(self, name: str, values: Sequence[tuple[int, float]]) -> None:
        for step, value in values:
            if not math.isfinite(value):
                what = f"the {name} became {value} at step {step} of {self.total_steps}"
                if not self.config.loop:
                    raise diverged(self.config, what)
                raise DivergedError(f"{what}; lower the learning rate, clip gradients, or try precision: fp32")

    def report(self, values: Mapping[str, Any]) -> None:
        """Tell the driver of ``values``, beside the place of the run."""
        self.driver.report_progress({**self.position(), **values})

    def position(self) -> dict[str, Any]:
        """What the driver is told of the run's place."""
        return {
            "phase": "training",
            "step": self.step,
            "total_steps": self.total_steps,
            "epoch": self.place.epochs_done,
            "workers": self.worker.world_size,
            "first_step_at": self.throughput.first_step_at,
        }

    # -- saving ------------------------------------------------------------------------------------------------------

    def _save_is_due(self) -> bool:
        every = self.config.checkpoint.every_steps
        return bool(every and self.step % every == 0)

    def save(self) -> None:
        """Save all that the next step depends on."""
        self.write_log()  # a diverged model must not become the latest checkpoint
        self._saved_at = self.step, self._evaluated_at
        with self.clock.phase("checkpointing"):
            device, each = self.worker.device, slice(None, None, self.worker.tensor)
            states = generator_states(device).items()
            generators = {name: all_gather(state.to(device)).cpu()[each] for name, state in states}
            if not self.saving.is_part:
                return
            own = self.place.state_dict(is_within=self._is_within)
            own |= {
                "patience": self.patience.state_dict(),
                "generators": generators,
                "checkpoints": self.saving.taken(),
                "lines": self.records.lines_of(self.step) if self.records else 0,
            }
            manifest = {
                "step": self.step,
                "epoch": self.place.epochs_done,
                "metrics": self.metrics,
                "evaluated": self._evaluated_at == self.step,
                "seconds": self.clock.read(),
                "config": self.config.model_dump(mode="json"),
                "code": self.config.code.digests() if self.config.code else {},
                "versions": versions(),
            }
            self.saving.save(self.parts.shown(), self.parts.state() | own, manifest)

    def finish(self, state: str) -> dict[str, Any]:
        """End the run, ``finished`` or ``stopped``, and return what it came to."""
        if state == "finished":
            self.place.reach()
            self._complete_step()
            if self.config.loop or self._saved_at != (self.step, self._evaluated_at):
                self.save()
            self._leave_restored()
        self.report({"phase": "saving"})
        with self.clock.phase("checkpointing"):
            self.saving.wait()
        return self.outcome(state, self.export() if state == "finished" else [])

    def export(self) -> list[dict[str, Any]]:
        """Rank 0 writes the finished models into ``export`` in each format that is asked for. Raises ExportError."""
        if not self.config.export or not (self.worker.rank == 0 or self.parts.are_sharded):
            return []
        every = self.parts.in_one_piece()
        if self.worker.rank > 0:
            return []
        from raytorch.training.export import export_finished  # onnxruntime takes a second to import

        self.report({"phase": "exporting"})
        exports: list[dict[str, Any]] = []
        with self.clock.phase("exporting"):
            for name, (shown, architecture) in every.items():
                assert architecture
                model = architecture.build()  # on the CPU, in PyTorch's own layout
                model.load_state_dict(shown.state_dict())
                exports += export_finished(
                    model, architecture, self.config.export, self.files.make(EXPORT_FOLDER), name
                )
        self.files.sync()
        return exports

    def outcome(self, state: str, exports: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
        """Return what the run came to."""
        return {
            "state": state,
            "ended_early": self.patience.reason(),
            "metrics": self.metrics,
            **({"test_metrics": self.test_metrics} if self.test_metrics else {}),
            "step": self.step,
            "epochs": round(self.place.epochs_done, 4),
            **self.throughput.overall()._asdict(),
            "peak_memory_bytes": peak_memory(self.worker.device),
            "seconds": self.clock.read(),
            "checkpoints": self.saving.taken(),
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
        """Close the records, and the checkpoint if the loop has not come to it."""
        self._leave_restored()
        self.saving.close()
        if self.records:
            self.records.close()
