"""A sweep's trial as Ray Tune sees it: an actor that holds no resources, starts a run and tells its evaluations.

A trial is never cut off. When it should end, early or by Ctrl-C, it hears so from the monitor, its run saves a last
checkpoint, and Tune learns that the trial is done: Tune itself would kill an actor that takes long to stop.
"""

import threading
from collections.abc import Iterator, Sequence
from queue import SimpleQueue
from typing import Any

import ray
from ray import tune
from ray.tune.schedulers import ASHAScheduler, TrialScheduler

from raytorch.config import Asha, RunConfig
from raytorch.errors import RunExistsError, UserError
from raytorch.runs.catalog import CONFIG_FILE, read_evaluations, read_summary
from raytorch.runs.plan import RunPlan, plan_resume
from raytorch.runs.status import Evaluation, RunStatus
from raytorch.runs.storage import RunFolder, split
from raytorch.system.background import BackgroundWork
from raytorch.training.driver import run_training

MEASURED = "measured"
"""Key of the metric by which trials are compared, among the keys of Ray Tune's own."""
NO_DEADLINE = 10**9
"""More epochs than any run has."""


class TrialRun(tune.Trainable):
    """Runs one trial, and then others: an actor serves many."""

    def setup(
        self, config: dict[str, Any], runs: Sequence[RunConfig], over: Sequence[bool], metric: str, trial_monitor: Any
    ) -> None:
        """Called once in each actor, with each trial's run, under its final name and storage, and which are over."""
        self._runs, self._over, self._metric, self._trial_monitor = runs, over, metric, trial_monitor
        self._run: BackgroundRun | None = None
        self._results = self._begin(config["number"])

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Go on to another trial."""
        self.cleanup()
        self._results = self._begin(new_config["number"])
        return True

    def step(self) -> dict[str, Any]:
        """The outcome of the next evaluation, or, marked as done, of the last."""
        return next(self._results)

    def cleanup(self) -> None:
        """Called before the actor ends; a run that still trains saves a checkpoint and stops."""
        if self._run:
            self._run.stop()

    def _begin(self, number: int) -> Iterator[dict[str, Any]]:
        config = self._runs[number]
        folder = RunFolder(config.storage, config.name)
        last = Evaluation(0, 0.0, {})
        for last in read_evaluations(folder):  # also of a trial that is over, for others to be compared with
            yield self._told(last)
        if not self._over[number] and not ray.get(self._trial_monitor.report.remote(number, {"state": "starting"})):
            RunFolder(*split(config.storage)).make(config.name)  # unless the sweep's own folder is gone
            plan = plan_resume(folder.address, config) if folder.exists(CONFIG_FILE) else RunPlan(config)
            self._run = BackgroundRun(number, plan, self._trial_monitor)
            for last in iter(self._run.evaluations.get, None):
                yield self._told(last)
            self._run.require_end()
        state = read_summary(folder)["state"] if folder.exists(CONFIG_FILE) else "waiting"
        ray.get(self._trial_monitor.report.remote(number, {"state": state}))
        yield self._told(last) | {"done": True}

    def _told(self, evaluation: Evaluation) -> dict[str, Any]:
        """An evaluation as the scheduler of trials reads it."""
        return {"epoch": evaluation.epoch, MEASURED: evaluation.metrics.get(self._metric, float("nan"))}


class BackgroundRun(BackgroundWork):
    """A run that trains in a thread of its own; its ``evaluations`` come in turn, and None at its end."""

    def __init__(self, number: int, plan: RunPlan, trial_monitor: Any) -> None:
        self._number, self._plan, self._trial_monitor = number, plan, trial_monitor
        self.evaluations: SimpleQueue[Evaluation | None] = SimpleQueue()
        self._seen = 0
        self._failed_for_good = False
        self._stopped = threading.Event()
        super().__init__(self._train)

    def require_end(self) -> None:
        """Raise what a new attempt from the latest checkpoint may get over; other failures are in the run's records."""
        self.done.wait()
        final = isinstance(self.error, UserError) and not isinstance(self.error, RunExistsError)
        if self.error and not final and not self._failed_for_good:
            raise self.error

    def stop(self) -> None:
        """Save a checkpoint and end; returns when it has."""
        self._stopped.set()
        self.done.wait()

    def _train(self) -> None:
        try:
            run_training(self._plan, watch=self._watch)
        finally:
            self.evaluations.put(None)

    def _watch(self, status: RunStatus) -> bool:
        self._failed_for_good = bool(status.cause and status.cause.cause.is_final)
        for evaluation in status.evaluations[self._seen :]:
            self.evaluations.put(evaluation)
        self._seen = len(status.evaluations)
        news: dict[str, Any] = {"state": "training", "epoch": status.progress["epoch"]} if status.progress else {}
        for evaluation in status.evaluations[-1:]:
            news |= {"epoch": evaluation.epoch, "metrics": evaluation.metrics}
        return self._stopped.is_set() or ray.get(self._trial_monitor.report.remote(self._number, news))


class CheckpointingAsha(ASHAScheduler):
    """Ray Tune's ASHA, which asks the trials that it stops to end; ``stopped`` has their numbers and last epochs."""

    def __init__(self, asha: Asha, mode: str, trial_monitor: Any, stopped: dict[int, float]) -> None:
        super().__init__(
            time_attr="epoch",
            metric=MEASURED,
            mode=mode,
            max_t=NO_DEADLINE,
            grace_period=asha.grace_epochs,
            reduction_factor=asha.reduction,
            stop_last_trials=False,
        )
        self._trial_monitor = trial_monitor
        self.stopped = stopped

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Called by Ray Tune with each evaluation of each trial."""
        number = trial.config["number"]
        if result["epoch"] > self.stopped.get(number, NO_DEADLINE):
            return str(TrialScheduler.CONTINUE)  # it is about to end, and no longer one to be compared with
        if super().on_trial_result(tune_controller, trial, result) == TrialScheduler.STOP:
            self.stopped[number] = result["epoch"]
            self._trial_monitor.end.remote(number)
        return str(TrialScheduler.CONTINUE)
