"""Starts a run from its configuration and sees it through to its summary: the driver's side, which imports no torch."""

from collections.abc import Callable
from functools import partial
from typing import Any

from raytorch.runs.plan import RunPlan, WorkerJob, plan_resume, require_free
from raytorch.runs.status import MonitorHandle, RunStatus
from raytorch.system.importing import without_garbage_collection
from raytorch.training.launch import ray_for
from raytorch.training.run_record import RunRecord
from raytorch.training.stopping import StatusCallback, abandon_workers, leave_workers

RESIZE_INTERVAL_S = 60.0
"""Seconds between two looks for room for more workers, while an elastic run trains with fewer than it may have."""

WorkerFunction = Callable[[WorkerJob], None]
"""The work of a worker."""


def run_training(
    plan: RunPlan,
    *,
    address: str | None = None,
    watch: StatusCallback = lambda status: None,
    work: WorkerFunction | None = None,
) -> dict[str, Any]:
    """Run to the end and return the content of the run's ``summary.json``, at once if nothing is left to do.

    Each worker does ``work``; by default it trains. All else is as for :func:`raytorch.training.api.train`.
    """
    if plan.finished is not None:
        return dict(plan.finished)
    record = RunRecord(plan)
    with ray_for([plan.config], address=address, module="raytorch.cluster.worker_group"), plan.folder.claimed():
        if plan.is_new:  # another process may have run there while Ray was started
            require_free(plan.folder)
        elif (finished := _replanned(plan).finished) is not None:
            return dict(finished)
        return _supervise(plan, record, watch, work or _train_on_worker)


def _replanned(plan: RunPlan) -> RunPlan:
    """The plan of a resumed run as its folder is now."""
    return plan_resume(plan.folder.address, plan.config, changed_code=plan.changed_code)


def _supervise(plan: RunPlan, record: RunRecord, watch: StatusCallback, work: WorkerFunction) -> dict[str, Any]:
    """Start the workers, pass on their news, and write down how it ends."""
    import ray

    from raytorch.cluster.ray_watch import RayWatch
    from raytorch.cluster.worker_group import BackgroundFit, forget_snapshot, free_abandoned_resources
    from raytorch.training.monitor import RunMonitor, start_on_this_node

    with record.writing():
        monitor: MonitorHandle = start_on_this_node(RunMonitor)
        monitor.skipped.remote(record.skipped.read())
        forget_snapshot(plan.folder)
        free_abandoned_resources()
        fit = BackgroundFit(_build_trainer(WorkerJob(plan, monitor), work))
        status, abandoned = RunStatus(), False

        def look() -> None:
            nonlocal status, abandoned
            status = parts.wait_for(monitor.status.remote())
            record.note(status)
            record.list_skipped(status, lambda number: parts.wait_for(monitor.skipped_after.remote(number)))
            if watch(status):
                monitor.request_stop.remote()
            if status.stopping and not status.attempts:  # it may never have any workers
                abandoned = True
                fit.end()

        try:
            with RayWatch() as parts:
                fit.follow(look, monitor.request_stop.remote)
                look()
        except ray.exceptions.RayError as error:  # what the workers end with is in fit.error
            abandon_workers(fit, error)
            raise record.fail(error, status) from None
        except BaseException:  # Ctrl-C for the second time, or the watcher's own
            leave_workers(fit, monitor)
            raise
        if abandoned:
            return record.abandon()
        if fit.error is None:
            return record.end(status)
        raise record.fail(fit.error, status) from None


def _build_trainer(job: WorkerJob, work: WorkerFunction) -> Any:
    import ray.train

    from raytorch.cluster.worker_group import ProcessGroupConfig, WorkerGroupTrainer
    from raytorch.training.failures import StopOnFinalFailure

    config, scaling = job.plan.config, job.plan.config.scaling
    elastic = scaling.min_workers != scaling.max_workers
    scaling_config = ray.train.ScalingConfig(
        num_workers=(scaling.min_workers, scaling.max_workers) if elastic else scaling.max_workers,
        use_gpu=scaling.gpus_per_worker > 0,
        resources_per_worker=scaling.worker_resources,
        elastic_resize_monitor_interval_s=RESIZE_INTERVAL_S,
    )
    options: dict[str, Any] = {}
    if elastic:
        from raytorch.cluster.elastic import EXPECTING_LOST_NODES, SavingElasticPolicy

        policy = SavingElasticPolicy(scaling_config, job.monitor)
        options = {"scaling_policy": policy, "environment": EXPECTING_LOST_NODES}
    return WorkerGroupTrainer(
        partial(work, job),
        backend_config=ProcessGroupConfig(scaling.resolved_backend, scaling.timeout_s),
        scaling_config=scaling_config,
        **options,
        run_config=ray.train.RunConfig(
            name=config.name,
            storage_path=config.storage,
            failure_config=ray.train.FailureConfig(max_failures=config.failure.max_restarts),
            callbacks=[StopOnFinalFailure(job.monitor)],
        ),
    )


def _train_on_worker(job: WorkerJob) -> None:
    with without_garbage_collection():
        from raytorch.training.worker import train_on_worker  # torch is imported here, on the worker

    train_on_worker(job)
