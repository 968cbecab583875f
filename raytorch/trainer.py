"""Starts a run from its configuration and sees it through to its summary: the driver's side, which imports no torch."""

import os
import socket
import threading
import time
from collections.abc import Callable
from datetime import datetime
from importlib import import_module
from typing import Any

from raytorch.cluster import joined_ray, prepare_ray, require_resources
from raytorch.config import RunConfig
from raytorch.config_file import dump
from raytorch.datasets.files import check
from raytorch.errors import TrainingError, UserError
from raytorch.metrics import versions
from raytorch.runs import CONFIG_FILE, SUMMARY_FILE, RunPlan

POLL_INTERVAL_S = 0.25

Watch = Callable[[Any], bool | None]
"""Called several times a second with the run's :class:`~raytorch.monitor.Status`. The answer True ends the run after a
last checkpoint, as Ctrl-C does."""


def train(plan: RunPlan, *, address: str | None = None, watch: Watch = lambda status: None) -> dict[str, Any]:
    """Run to the end and return the content of the run's ``summary.json``.

    Args:
        plan: What to run; see :func:`raytorch.runs.plan_run`.
        address: A running Ray cluster's address; by default RAY_ADDRESS, else a Ray that is started for this run and
            stopped after it. A Ray that this process has already joined is used as it is.
        watch: Called with the workers' news while the run goes on.

    Raises:
        ResourceError: The machine has fewer CPUs or GPUs than the run asks for.
        UserError: The input has to change: a data file is missing or corrupt, say.
        TrainingError: A worker raised or died; ``summary.json`` holds the details.
    """
    record = _Record(plan)
    if prepare_ray(address):
        check(plan.config.data)
    importing = threading.Thread(target=import_module, args=["raytorch.worker_group"], daemon=True)
    importing.start()  # beside the start of Ray, which takes as long
    with joined_ray(address) as embedded:
        if embedded:
            scaling = plan.config.scaling
            require_resources(scaling.min_workers, _worker_resources(plan.config), "scaling.")
        importing.join()
        with plan.folder.claimed():
            return _supervise(plan, record, watch)


def _supervise(plan: RunPlan, record: "_Record", watch: Watch) -> dict[str, Any]:
    """Start the workers, pass on their news, and write down how it ends."""
    import ray

    from raytorch.monitor import start_monitor
    from raytorch.worker_group import BackgroundFit, forget_broken_snapshot

    record.begin()
    monitor = start_monitor()
    forget_broken_snapshot(plan.folder)
    fit = BackgroundFit(_build_trainer(plan, monitor, record.started))
    try:
        _follow(fit, monitor, watch)
    except KeyboardInterrupt:
        record.abandon()
        raise
    status = ray.get(monitor.status.remote())
    watch(status)
    if fit.error is None:
        return record.end(status)
    raise record.fail(fit.error, status) from None


def _follow(fit: Any, monitor: Any, watch: Watch) -> None:
    """Wait for the end; the first Ctrl-C asks the workers to save and stop, the second is raised."""
    import ray

    stopping = False
    while True:
        try:
            if fit.done.wait(POLL_INTERVAL_S):
                return
            if watch(ray.get(monitor.status.remote())):
                monitor.request_stop.remote()
        except KeyboardInterrupt:
            if stopping:
                raise
            stopping = True
            monitor.request_stop.remote()


def _build_trainer(plan: RunPlan, monitor: Any, started: float) -> Any:
    import ray.train

    from raytorch.monitor import StopOnFinalFailure
    from raytorch.worker_group import ProcessGroupConfig, WorkerGroupTrainer

    config, scaling = plan.config, plan.config.scaling
    elastic = scaling.min_workers != scaling.max_workers
    return WorkerGroupTrainer(
        _train_on_worker,
        train_loop_config={"config": config, "monitor": monitor, "started": started, "resume_from": plan.resume_from},
        backend_config=ProcessGroupConfig(scaling.resolved_backend, scaling.timeout_s),
        scaling_config=ray.train.ScalingConfig(
            num_workers=(scaling.min_workers, scaling.max_workers) if elastic else scaling.max_workers,
            use_gpu=scaling.gpus_per_worker > 0,
            resources_per_worker=_worker_resources(config),
        ),
        run_config=ray.train.RunConfig(
            name=config.name,
            storage_path=config.storage,
            checkpoint_config=ray.train.CheckpointConfig(
                num_to_keep=config.checkpoint.keep,
                checkpoint_score_attribute=config.checkpoint.best_by,
                checkpoint_score_order="max" if config.checkpoint.best_by == "accuracy" else "min",
            ),
            failure_config=ray.train.FailureConfig(max_failures=config.failure.max_restarts),
            callbacks=[StopOnFinalFailure(monitor)],
        ),
    )


def _train_on_worker(job: dict[str, Any]) -> None:
    from raytorch.training import Job, train  # torch is imported here, on the worker

    train(Job(**job))


def _worker_resources(config: RunConfig) -> dict[str, float]:
    resources = {"CPU": config.scaling.cpus_per_worker}
    if config.scaling.gpus_per_worker:
        resources["GPU"] = config.scaling.gpus_per_worker
    return resources


class _Record:
    """Keeps a run's ``config.yaml`` and ``summary.json``."""

    def __init__(self, plan: RunPlan) -> None:
        self.started = time.time()
        self._plan, self._folder = plan, plan.folder
        self._summary: dict[str, Any] = {
            "name": plan.config.name,
            "path": str(self._folder),
            "state": "running",
            "started": datetime.fromtimestamp(self.started).astimezone().isoformat(timespec="seconds"),
            "driver": {"host": socket.gethostname(), "pid": os.getpid()},
            "seed": plan.config.seed,
            "versions": versions(),
        }

    def begin(self) -> None:
        """Write down what is about to run."""
        self._folder.write_text(CONFIG_FILE, dump(self._plan.config))
        self._folder.write_json(SUMMARY_FILE, self._summary)

    def end(self, status: Any) -> dict[str, Any]:
        """Write down what the run came to."""
        outcome = status.outcome
        first_step_at, seconds = outcome["first_step_at"], outcome.pop("seconds")
        self._write(
            status,
            {
                **outcome,
                "first_step_s": round(first_step_at - self.started, 2) if first_step_at else None,
                "seconds": {"startup": round(status.begun_at - self.started, 2), **seconds},
            },
        )
        return self._summary

    def abandon(self) -> None:
        """Write down that the run was ended at once, without a last checkpoint."""
        self._folder.write_json(SUMMARY_FILE, {**self._summary, "state": "stopped"})

    def fail(self, error: Exception, status: Any) -> Exception:
        """Write down a failure; returns the exception to raise."""
        cause = status.cause
        if cause is None:
            details = {"kind": type(error).__name__, "message": _lost_workers(error)}
        else:
            details = {"rank": cause.rank, "kind": cause.kind, "message": cause.message, "traceback": cause.traceback}
        self._write(status, {"state": "failed", "error": details})
        if cause is None:
            return TrainingError(f"{details['message']}\nlogs: {self._folder}/logs")
        if cause.user_error:
            return UserError(cause.message)
        text = cause.message if cause.expected else f"rank {cause.rank} failed\n{cause.traceback}"
        return TrainingError(f"{text}\nlogs: {self._folder}/logs")

    def _write(self, status: Any, values: dict[str, Any]) -> None:
        self._summary |= values
        self._summary["restarts"] = max(0, status.attempts - 1)
        self._summary.setdefault("seconds", {})["total"] = round(time.time() - self.started, 2)
        self._folder.write_json(SUMMARY_FILE, self._summary)


def _lost_workers(error: Exception) -> str:
    """What Ray Train says of workers that could not speak for themselves: one line for each."""
    failures = getattr(error, "worker_failures", {})
    if not failures:
        return str(error)
    return "\n".join(f"rank {rank} was lost: {str(failure).strip()}" for rank, failure in sorted(failures.items()))
