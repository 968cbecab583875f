"""A run on a worker, from its first message to the driver to its last."""

import os
from collections.abc import Callable
from contextlib import closing

import ray
import torch

from raytorch.config import RunConfig
from raytorch.config.own_calls import own_call
from raytorch.datasets.readers import start_server
from raytorch.distributed.exception_causes import failure_cause
from raytorch.distributed.process_group import leaving_process_group
from raytorch.distributed.worker import Worker
from raytorch.errors import UserError
from raytorch.runs.metrics import log_to_file
from raytorch.runs.plan import WorkerJob
from raytorch.runs.storage import LiveFiles
from raytorch.system.allocator import keep_freed_memory, return_freed_memory
from raytorch.system.importing import without_garbage_collection
from raytorch.training.batches import RunStopped
from raytorch.training.loop import Trainer
from raytorch.training.monitor import reporting_failures
from raytorch.training.precision import Precision, choose_attention
from raytorch.training.progress import RunProgress
from raytorch.training.reproducibility import choose_algorithms, seed_everything
from raytorch.training.run import Run

MakeProgress = Callable[[WorkerJob, Worker, LiveFiles], RunProgress]


def train_on_worker(job: WorkerJob, make_progress: MakeProgress = RunProgress) -> None:
    """Train on this worker until the run is finished or stopped; rank 0 tells the monitor what it came to.

    Every worker of a run calls it with the same job. ``make_progress`` decides how the run goes on from step to step.
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
        prepare(job.plan.config, worker)
        with closing(make_progress(job, worker, files)) as progress:
            outcome = follow_loop(progress)
        if worker.rank == 0:
            ray.get(job.monitor.ended.remote(outcome))


def prepare(config: RunConfig, worker: Worker) -> None:
    """Set up this process for a run."""
    if getattr(config.data, "readers", 0):
        start_server()  # beside all that follows
    if config.export:
        from raytorch.training.export import require_packages

        require_packages(config.export)
    seed_everything(config.seed)
    choose_algorithms(config.deterministic, fixed_shapes=config.loop is None and config.data.input_shape is not None)
    Precision.choose(config.precision, worker.device).prepare()
    torch.set_num_threads(max(1, int(config.scaling.cpus_per_worker)))
    choose_attention(worker.device)
    if config.parallel.strategy == "ddp" and config.parallel.tensor == 1:
        keep_freed_memory()
    else:
        return_freed_memory()
    with without_garbage_collection():  # PyTorch imports its compiler with the first optimizer
        torch.optim.SGD([torch.zeros(1, requires_grad=True)])


def follow_loop(progress: RunProgress) -> dict[str, object]:
    """Call the loop of a run, the user's own or the shipped one, and return what the run came to."""
    progress.begin()
    run, own = Run(progress), progress.config.loop
    try:
        if own:
            own_call("loop", own, progress.config.code)(run)
        else:
            Trainer(run, progress.throughput.tell).train()
    except RunStopped:
        return progress.finish("stopped")
    outcome = progress.finish("stopped" if progress.is_stopped else "finished")  # which a loop may have caught
    if own and not progress.is_stopped:
        _require_evaluation(own.name, progress)
    return outcome


def _require_evaluation(loop: str, progress: RunProgress) -> None:
    """Refuse, once all is saved, a loop that has left out what its configuration needs. Raises UserError."""
    config = progress.config
    needs = " and ".join(key for key, value in (("metrics", config.metrics), ("stop", config.stop)) if value)
    if needs and not progress.metrics:
        raise UserError(
            f"{loop} has ended without run.evaluated, which {needs} of the configuration need: call it, or "
            "leave them out of the next run; what this one trained is saved, and can be loaded"
        )
