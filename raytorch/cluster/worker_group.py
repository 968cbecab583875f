"""The worker group of Ray Train v2 that everything distributed runs in. Imports no torch.

``ray.train.torch.TorchTrainer`` imports torch in the driver and, to read its ``TorchConfig``, in the controller too,
which delays the first step by seconds. :class:`WorkerGroupTrainer` is the same data-parallel trainer with a backend
that imports torch in the workers only. What it needs of Ray's internals is all here, checked with Ray 2.55 and 2.60,
and tested in ``tests/integration/training/test_worker_group.py``.
"""

import os
import socket
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import ray
import ray._private.state
import ray.train
from ray.core.generated.gcs_pb2 import ActorTableData, PlacementGroupTableData
from ray.train.backend import Backend, BackendConfig
from ray.train.v2._internal.callbacks import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.constants import (
    CHECKPOINT_MANAGER_SNAPSHOT_FILENAME,
    VALIDATE_STORAGE_MARKER_FILENAME,
    get_env_vars_to_propagate,
)
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError, WorkerHealthCheckTimeoutError
from ray.train.v2._internal.execution.controller.controller import TrainController
from ray.train.v2._internal.execution.worker_group import RayTrainWorker, WorkerGroup
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raytorch.runs.storage import RunFolder
from raytorch.system.background import BackgroundWork
from raytorch.system.importing import without_garbage_collection

START_POLL_S = 0.05
ANSWER_POLL_S = 0.5
"""Seconds after which who waits for the workers asks whether they were abandoned."""


@dataclass
class ProcessGroupConfig(BackendConfig):
    """How the workers' process group is set up."""

    backend: str = "gloo"
    """``nccl`` or ``gloo``."""
    timeout_s: int = 1800
    """Seconds after which a collective operation that makes no progress fails."""

    @property
    def backend_cls(self) -> type["ProcessGroupBackend"]:
        """Callback of Ray Train for when the workers have started."""
        return ProcessGroupBackend


class ProcessGroupBackend(Backend):
    """Joins the workers of a group into one ``torch.distributed`` process group."""

    share_cuda_visible_devices = True

    def on_start(self, worker_group: Any, backend_config: ProcessGroupConfig) -> None:
        """Called by the controller once all workers of the group run."""
        address, port = worker_group.execute_single(0, _free_address)
        joining = [
            worker_group.execute_single_async(
                rank,
                _join_process_group,
                backend=backend_config.backend,
                address=address,
                port=port,
                timeout_s=backend_config.timeout_s,
            )
            for rank in range(len(worker_group))
        ]
        while joining:  # a worker that dies is told at once, while its peers would wait for it until their time-out
            joined, joining = ray.wait(joining)
            ray.get(joined)


class WorkerActor(RayTrainWorker):
    """The base of workers' actors that do more than what Ray Train calls them for."""


class WorkerGroupController(TrainController):
    """Starts and watches the workers: Ray Train's own actor, but for the class of theirs."""

    def __init__(self, worker_class: type[RayTrainWorker], **options: Any) -> None:
        super().__init__(**options)
        self.worker_group_cls = type("WorkerGroup", (WorkerGroup,), {"_worker_cls": worker_class})


class WorkerGroupTrainer(DataParallelTrainer):
    """Runs a function on a group of workers that share a process group.

    Args:
        scaling_policy: Decides on the number of workers in place of Ray Train's own policy.
        environment: Environment variables of the controller's own; where Ray Train hands it one that this process
            has, that counts.
        options: See ``ray.train.v2.api.data_parallel_trainer.DataParallelTrainer``.

    Attributes:
        controller: The actor that starts and watches the workers; None before and after.
    """

    controller: Any = None

    def __init__(
        self,
        function: Callable[..., None],
        *,
        scaling_policy: Any = None,
        worker_class: type[RayTrainWorker] = RayTrainWorker,
        environment: Mapping[str, str] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(function, **options)
        self._scaling_policy, self._worker_class = scaling_policy, worker_class
        self._environment = {"RAY_WARN_BLOCKING_GET_INSIDE_ASYNC": "0", **(environment or {})}
        self._abandoned = threading.Event()

    def abandon(self) -> None:
        """Let :meth:`fit` end within a second, whatever becomes of the workers: who waits when Ray is left is ended."""
        self._abandoned.set()

    def _create_default_callbacks(self) -> list[Any]:
        # No Ray Data is used, and workers do not outlive the driver: these actors would only delay the start.
        unused = (DatasetsCallback, PlacementGroupCleanerCallback)
        return [callback for callback in super()._create_default_callbacks() if not isinstance(callback, unused)]

    def _initialize_and_run_controller(self, **options: Any) -> Any:
        # As Ray Train's own, but for the controller's class, and for its signal handler, which is not for threads.
        policy = self._scaling_policy or options["scaling_policy"]
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        environment = {"env_vars": self._environment | get_env_vars_to_propagate()}
        actor = ray.remote(num_cpus=0, scheduling_strategy=here, runtime_env=environment)(WorkerGroupController)
        self.controller = actor.remote(self._worker_class, **options | {"scaling_policy": policy})
        try:
            self._wait_for(self.controller.run.remote())
            return self._wait_for(self.controller.get_result.remote())
        finally:
            self.controller = None

    def _wait_for(self, answer: Any) -> Any:
        while not self._abandoned.is_set():
            with suppress(ray.exceptions.GetTimeoutError):
                return ray.get(answer, timeout=ANSWER_POLL_S)
        raise RuntimeError("the workers were abandoned")


class BackgroundFit(BackgroundWork):
    """A trainer's workers, started and waited for in the background."""

    def __init__(self, trainer: WorkerGroupTrainer) -> None:
        self._trainer = trainer
        super().__init__(self._fit)

    def end(self) -> None:
        """End at once, also what waits for workers, and take back what is held or asked for."""
        while not (controller := self._trainer.controller) and not self.done.wait(START_POLL_S):
            pass
        if controller:
            ray.kill(controller)
        self.done.wait()
        free_abandoned_resources()

    def abandon(self) -> None:
        """Wait for the workers no longer, before a Ray is left that may have lost them."""
        self._trainer.abandon()
        self.done.wait(4 * ANSWER_POLL_S)

    def _fit(self) -> None:
        try:
            self._trainer.fit()
        except SystemExit:  # so Ray ends the calls that wait when it is shut down
            raise RuntimeError("Ray was shut down") from None


def lost_workers(error: Exception) -> dict[int, Exception]:
    """Why Ray Train gave up on workers, by their ranks: what Ray knows of them, not what they raised themselves."""
    lost = (WorkerHealthCheckFailedError, WorkerHealthCheckTimeoutError)
    failures: dict[int, Exception] = getattr(error, "worker_failures", {})
    return {
        rank: getattr(failure, "health_check_failure", failure)
        for rank, failure in failures.items()
        if isinstance(failure, lost)
    }


def forget_snapshot(folder: RunFolder) -> None:
    """Delete what Ray Train opens in a run's folder: a list of checkpoints, which runs once left, and by whose names it
    would go; and the mark that it writes to see whether it may, for which anybody may have put a link."""
    folder.delete(CHECKPOINT_MANAGER_SNAPSHOT_FILENAME)
    folder.delete(VALIDATE_STORAGE_MARKER_FILENAME)


def free_abandoned_resources() -> None:
    """Take back what worker groups of this job hold whose controllers are dead, killed with their drivers.

    Ray removes a placement group with its creator only when the creator's job has ended too; Ray Train's own cleaner
    needs a dashboard.
    """
    accessor = ray._private.state.state._connect_and_get_accessor()
    job = ray.get_runtime_context().get_job_id()
    for packed in accessor.get_placement_group_table():
        group = PlacementGroupTableData.FromString(packed)
        is_there = group.state != PlacementGroupTableData.REMOVED
        if is_there and group.creator_actor_dead and group.creator_job_id.hex() == job:
            creator = accessor.get_actor_info(ray.ActorID(group.creator_actor_id)) if group.creator_actor_id else None
            if creator and ActorTableData.FromString(creator).class_name == WorkerGroupController.__name__:
                ray.util.remove_placement_group(PlacementGroup(ray.PlacementGroupID(group.placement_group_id)))


def _free_address() -> tuple[str, int]:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return ray.util.get_node_ip_address(), probe.getsockname()[1]


def _join_process_group(backend: str, address: str, port: int, timeout_s: int) -> None:
    context = ray.train.get_context()
    os.environ.update(
        MASTER_ADDR=address,
        MASTER_PORT=str(port),
        RANK=str(context.get_world_rank()),
        WORLD_SIZE=str(context.get_world_size()),
        LOCAL_RANK=str(context.get_local_rank()),
        LOCAL_WORLD_SIZE=str(context.get_local_world_size()),
        NODE_RANK=str(context.get_node_rank()),
    )
    with without_garbage_collection():
        import torch.distributed as dist

    rank, timeout = context.get_world_rank(), timedelta(seconds=timeout_s)
    dist.init_process_group(
        backend,
        store=_meeting_point(address, port, timeout, is_host=rank == 0),
        rank=rank,
        world_size=context.get_world_size(),
        timeout=timeout,
    )


def _meeting_point(address: str, port: int, timeout: timedelta, *, is_host: bool) -> Any:
    """The store where the workers meet. It listens on one address; PyTorch's own would on all that the host has."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    if not is_host:
        return TCPStore(address, port, timeout=timeout)
    listener = socket.create_server((address, port))
    return TCPStore(
        address,
        port,
        is_master=True,
        timeout=timeout,
        wait_for_workers=False,
        multi_tenant=True,
        master_listen_fd=listener.detach(),
    )
