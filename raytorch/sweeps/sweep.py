"""A sweep from its plan to its results: Ray Tune runs the trials, each a full run with a folder of its own.

What a sweep is, and how far it has come, is all in its folder. Nothing of Ray Tune's own state is kept or read again,
for that is pickled: a resumed sweep draws the same trials from ``sweep.yaml``, reads off their folders which are over,
and tells Tune their evaluations anew. Imports no torch.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from raytorch.cluster.capacity import scales_itself
from raytorch.config import RunConfig
from raytorch.config.file import dump_config
from raytorch.errors import (
    ConfigError,
    RecordError,
    Remedy,
    RunExistsError,
    RunNotFoundError,
    StorageError,
    TrainingError,
)
from raytorch.runs.catalog import SUMMARY_FILE
from raytorch.runs.checkpoint_manifest import latest_checkpoint, read_manifest
from raytorch.runs.live_record import LiveRecord
from raytorch.runs.plan import CODE_FOLDER, checked_name, code_changes, placed, timed_name
from raytorch.runs.records import SweepRecord, read_record
from raytorch.runs.storage import RunFolder, split
from raytorch.sweeps.file import Sweep, recorded_sweep
from raytorch.sweeps.result_files import BEST_FILE, write_results
from raytorch.sweeps.results import TrialResult, find_best, read_result
from raytorch.system.background import BackgroundWork
from raytorch.system.environment import environment
from raytorch.system.safe_text import escaped
from raytorch.system.temporary_folders import temporary_folder
from raytorch.training.launch import ray_for

SWEEP_FILE = "sweep.yaml"
"""Configuration that was asked for, with the run in it."""
RECORD_FILE = "sweep.json"
"""How far the sweep has come, and in the end what it came to."""
logger = logging.getLogger("raytorch")
_QUIET_TUNE = {"RAY_AIR_NEW_OUTPUT": "0", "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1"}


@dataclass(frozen=True)
class SweepPlan:
    """A sweep that is ready to run, and where."""

    sweep: Sweep
    folder: RunFolder
    is_new: bool = True
    """False if it goes on with what is there."""

    def results(self, stopped: dict[int, float]) -> list[TrialResult]:
        """Return what every trial has come to; ``stopped`` has the epochs of those that were to be stopped early."""
        return [read_result(self.folder, trial, trial.number in stopped) for trial in self.sweep.trials]


@dataclass(frozen=True)
class SweepStatus:
    """How a sweep stands."""

    trials: list[dict[str, Any]] = field(default_factory=list)
    """Of each: ``state``, and ``epoch`` and ``metrics`` once there are such."""
    stopping: bool = False
    """True if the trials have been asked to end."""


SweepCallback = Callable[[SweepStatus], None]
"""Called several times a second while trials run."""


def plan_sweep(sweep: Sweep, name: str | None = None) -> SweepPlan:
    """Plan a new sweep, called ``name`` or by its own name and the time.

    Raises:
        RunExistsError: The storage holds a sweep of that name already.
        ConfigError: ``name`` cannot name a folder everywhere.
    """
    folder = RunFolder(sweep.config.storage, checked_name(name) if name is not None else timed_name(sweep.config.name))
    _require_free(folder)
    return SweepPlan(sweep, folder)


def _require_free(folder: RunFolder) -> None:
    if folder.exists(SWEEP_FILE) or folder.exists(SUMMARY_FILE) or folder.folders():
        raise RunExistsError(
            f"{folder} exists already; take another name, or resume it",
            remedies=[Remedy("name"), Remedy("resume", str(folder), "sweep")],
        )


def plan_resumed_sweep(sweep: str, storage: str = "runs") -> SweepPlan:
    """Plan to go on with a sweep: with the trials that have neither finished nor been stopped early.

    Args:
        sweep: The sweep's name or path.
        storage: Where to look for one that is given by its name.

    Raises:
        RunNotFoundError: There is no such sweep.
        ConfigError: Its ``sweep.yaml`` is damaged, or code of the user's own has changed since.

    Example:
        >>> run_sweep(plan_resumed_sweep("runs/digits-20261122-093625"))
    """
    if "/" in sweep:
        storage, sweep = split(sweep)
    folder = RunFolder(storage, sweep)
    if not folder.exists(SWEEP_FILE):
        raise RunNotFoundError(f"no sweep {sweep} in {storage}: it has no {SWEEP_FILE}")
    recorded = recorded_sweep(folder.read_bytes(SWEEP_FILE), folder.file(SWEEP_FILE))
    for trial in recorded.trials:
        _require_same_code(trial.config, RunFolder(folder.address, trial.name))
    return SweepPlan(recorded, folder, is_new=False)


def _require_same_code(config: RunConfig, folder: RunFolder) -> None:
    """Refuse other code of the user's own than a trial was trained by: it would be compared with the others."""
    latest = latest_checkpoint(folder) if config.code else None
    if latest and (changes := code_changes(config, read_manifest(folder, latest))):
        raise ConfigError(
            f"the code of {folder} was other than it is: {', '.join(changes)}; bring it back, a copy is in "
            f"{folder.file(CODE_FOLDER)}, or begin a new sweep"
        )


def run_sweep(
    plan: SweepPlan, *, address: str | None = None, watch: SweepCallback = lambda status: None
) -> dict[str, Any]:
    """Run the trials that are not over, write the results, and return the content of ``sweep.json``.

    A sweep that has finished is left as it is.

    Ctrl-C, as KeyboardInterrupt, lets the trials save a checkpoint and end; a second one is raised.

    Args:
        plan: What to run; see :func:`plan_sweep` and :func:`plan_resumed_sweep`.
        address: As :func:`raytorch.training.driver.run_training` takes it.
        watch: Called with the sweep's status while it goes on.

    Raises:
        ResourceError: The machine or cluster can never give the CPUs or GPUs that a trial asks for.
        UserError: The input has to change: a data file is missing or corrupt, say.
        TrainingError: No trial has finished; the message has the first one's.

    Example:
        >>> summary = run_sweep(plan_sweep(load_sweep("configs/sweeps/digits.yaml")))
        >>> summary["best"]["parameters"], summary["best"]["metrics"]
    """
    configs = [placed(trial.config, trial.config.name, "") for trial in plan.sweep.trials]
    if (finished := _finished_record(plan)) is not None:
        return finished
    with ray_for(configs, address=address, module="raytorch.sweeps.trials"), plan.folder.claimed():
        if plan.is_new:  # another process may have run there while Ray was started
            _require_free(plan.folder)
        elif (finished := _finished_record(plan_resumed_sweep(plan.folder.address))) is not None:
            return finished
        record = _LiveSweepRecord(plan)
        with record.writing():
            return _run_trials(plan, record, watch)


def _finished_record(plan: SweepPlan) -> dict[str, Any] | None:
    """The record of a sweep that has finished, with all of its trials; None if something is left to do."""
    before = _read_before(plan.folder)
    record, results = before.model_dump(exclude_unset=True), plan.results(before.stopped_after())
    if record.get("state") != "finished" or not all(result.is_over for result in results):
        return None
    return record | _outcome(plan.folder, results, plan.sweep.config.ranking.label)


def _outcome(folder: RunFolder, results: Sequence[TrialResult], metric: str) -> dict[str, Any]:
    """What the trials have come to, and the best of them."""
    best = find_best(results, metric)
    best_row = best and {**best.row(), "config": folder.file(BEST_FILE)}
    return {"best": best_row, "trials": [result.row() for result in results]}


def _run_trials(plan: SweepPlan, record: "_LiveSweepRecord", watch: SweepCallback) -> dict[str, Any]:
    before = plan.results(record.stopped)
    from ray.exceptions import RayError

    from raytorch.cluster.ray_watch import RayWatch
    from raytorch.sweeps.trial_monitor import TrialMonitor
    from raytorch.training.monitor import start_on_this_node

    stopping = False

    def look() -> None:
        record.keep()
        watch(_status(before, parts.wait_for(trial_monitor.reports.remote()), record, stopping))

    def stop() -> None:
        nonlocal stopping
        stopping = True
        trial_monitor.end_all.remote()

    try:
        with RayWatch() as parts:
            trial_monitor = start_on_this_node(TrialMonitor)
            tuning = BackgroundWork(
                lambda: _tune(plan, trial_monitor, [result.is_over for result in before], record.stopped)
            )
            tuning.follow(look, stop)
            record.keep()
        if tuning.error:
            raise tuning.error
    except RayError as error:
        raise record.lose_ray(error) from None
    results = plan.results(record.stopped)
    watch(SweepStatus([result.row() for result in results], stopping))
    return record.end(results, stopping)


def _status(
    before: Sequence[TrialResult], news: dict[int, dict[str, Any]], record: "_LiveSweepRecord", stopping: bool
) -> SweepStatus:
    """Results that the trials have told since the sweep was started, else what they were before."""
    trials = []
    for result in before:
        number = result.trial.number
        now = {**result.row(), **({"state": "waiting"} if not result.is_over else {}), **news.get(number, {})}
        if number in record.stopped and now["state"] in ("stopped", "lost"):
            now["state"] = "stopped early"
        trials.append(now)
    return SweepStatus(trials, stopping)


def _tune(plan: SweepPlan, trial_monitor: Any, over: Sequence[bool], stopped: dict[int, float]) -> None:
    """Let Ray Tune run the trials to their end."""
    from ray import tune

    from raytorch.sweeps.trials import CheckpointingAsha, TrialRun

    config = plan.sweep.config
    trials, folder = plan.sweep.trials, plan.folder.address
    configs = [placed(trial.config, trial.name, folder) for trial in trials]
    metric, higher_is_better = config.ranking
    mode = "max" if higher_is_better else "min"
    trainable = tune.with_parameters(TrialRun, runs=configs, over=over, metric=metric, trial_monitor=trial_monitor)
    with temporary_folder() as scratch, _without_output():
        tune.Tuner(
            # A byte, for Tune refuses nothing at all: the run's workers hold what it needs.
            tune.with_resources(trainable, {"memory": 1}),
            param_space={"number": tune.grid_search(list(range(len(configs))))},
            tune_config=tune.TuneConfig(
                scheduler=config.asha and CheckpointingAsha(config.asha, mode, trial_monitor, stopped),
                max_concurrent_trials=config.concurrency or _concurrency(configs),
                reuse_actors=True,
                trial_name_creator=lambda trial: f"trial-{trial.config['number']:03}",
                trial_dirname_creator=lambda trial: f"trial-{trial.config['number']:03}",
            ),
            run_config=tune.RunConfig(
                name="tune",
                storage_path=str(scratch),
                verbose=0,
                failure_config=tune.FailureConfig(max_failures=config.max_failures),
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            ),
        ).fit()


@contextmanager
def _without_output() -> Iterator[None]:
    """Silence Ray Tune, whose news the sweep tells itself, and keep it from writing logs of its own."""
    logger = logging.getLogger("ray.tune")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with environment(_QUIET_TUNE):
            yield
    finally:
        logger.setLevel(level)


def _concurrency(configs: Sequence[RunConfig]) -> int:
    """Trials that the cluster has, or may make, room for at a time, going by the one that needs the most."""
    import ray

    if scales_itself():
        return len(configs)
    there = ray.cluster_resources()
    return min(
        max(1, int(there.get(kind, 0) / (config.scaling.max_workers * amount)))
        for config in configs
        for kind, amount in config.scaling.worker_resources.items()
    )


def _read_before(folder: RunFolder) -> SweepRecord:
    """Read what a sweep that is resumed has written down; of a damaged record nothing: its trials know the rest."""
    try:
        return read_record(folder, RECORD_FILE, SweepRecord)
    except RunNotFoundError:
        return SweepRecord()
    except RecordError as error:
        logger.warning("%s; which trials were stopped early is not known", escaped(error))
        return SweepRecord()


class _LiveSweepRecord(LiveRecord):
    """Keeps a sweep's ``sweep.yaml`` and ``sweep.json``."""

    def __init__(self, plan: SweepPlan) -> None:
        before = _read_before(plan.folder)
        super().__init__(plan.folder, RECORD_FILE, metric=plan.sweep.config.ranking.label)
        kept = before.model_dump(exclude_unset=True, exclude={"error"})
        self.content = kept | self.content | ({"started": before.started} if before.started else {})
        self._config, self._seconds_before = plan.sweep.config, before.seconds
        self.stopped: dict[int, float] = before.stopped_after()
        """The trials that were to be stopped early, and after which epoch."""
        self._kept = len(self.stopped)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Write down what is about to run, then as :class:`~raytorch.runs.live_record.LiveRecord` does."""
        config = self._config
        if not self.folder.exists(SWEEP_FILE):
            run = placed(config.run, config.run.name, config.run.storage)
            self.folder.write_text(SWEEP_FILE, dump_config(config.model_copy(update={"run": run})))
        with super().writing():
            yield

    def write(self, **values: Any) -> None:
        kept = len(self.stopped)
        super().write(**self.at_the_end(), **values)
        self._kept = kept

    def keep(self) -> None:
        """Write down which trials were to be stopped early, if there are new ones."""
        if self._kept != len(self.stopped):
            with suppress(StorageError):  # out of reach for a while, or for good, which the trials tell
                self.write()

    def lose_ray(self, error: Exception) -> TrainingError:
        """Write down that a part of Ray was lost; returns the exception to raise."""
        from raytorch.runs.status import RunStatus
        from raytorch.training.failures import diagnose

        details = diagnose(error, RunStatus())
        self.close("failed", error=details)
        return TrainingError(
            f"{details['message']}\na part of Ray was lost, killed or crashed, for want of memory, say; "
            "resume goes on with the trials that are not over, from their latest checkpoints",
            remedies=[Remedy("resume", str(self.folder), "sweep")],
        )

    def end(self, results: Sequence[TrialResult], stopping: bool) -> dict[str, Any]:
        """Write down what the sweep came to.

        Raises:
            TrainingError: No trial has finished, and nobody has stopped them.
            StorageError: It could not be written down.
        """
        write_results(self.folder, self._config, results)
        outcome = _outcome(self.folder, results, self._config.ranking.label)
        cut_short = stopping and not all(result.is_over or result.state == "failed" for result in results)
        state = "stopped" if cut_short else "finished" if outcome["best"] else "failed"
        content = self.require_written(self.close(state, **outcome))
        if state == "failed":
            errors = [message for result in results if (message := result.row()["error"])]
            raise TrainingError(f"no trial has finished; the first error: {errors[0] if errors else 'none was told'}")
        return content

    def at_the_end(self) -> dict[str, Any]:
        stopped = {str(number): epoch for number, epoch in dict(self.stopped).items()}
        return {"stopped": stopped, "seconds": round(self._seconds_before + self.seconds(), 2)}
