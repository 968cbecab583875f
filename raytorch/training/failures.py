"""Ends of a run: failures that no restart can mend, and the cause as the workers told it and Ray saw it."""

import re
import time
from collections.abc import Collection
from contextlib import suppress
from typing import Any

import ray
import ray.train

from raytorch.cluster.ray_watch import HeadLostError, RayletLostError, is_raylet_lost
from raytorch.cluster.worker_group import lost_workers
from raytorch.errors import Cause, is_storage_fault, message_of
from raytorch.runs.status import MonitorHandle, RunStatus, WorkerFailure

NODE_NOTICE_S = 20.0
"""Ray takes a node for dead some 15 s after it fell silent."""

_GRAVITY = (Cause.HOST_MEMORY, Cause.LOST_NODE, Cause.TIMEOUT, Cause.LOST_WORKER)
"""Where several workers were lost, the first of these explains the others."""
_OF_RAY = (
    HeadLostError,
    RayletLostError,
    ray.exceptions.RayActorError,
    ray.exceptions.LocalRayletDiedError,
    ray.exceptions.NodeDiedError,
    ray.exceptions.OwnerDiedError,
    ray.exceptions.RaySystemError,
    ray.exceptions.RpcError,
)
"""Exceptions of a call when a part of Ray is gone, and not because of what it called."""
_PARTS = {
    "RunMonitor": "the run's monitor",
    "WorkerGroupController": "the run's controller",
    "TrialMonitor": "the sweep's monitor",
}


class StopOnFinalFailure(ray.train.UserCallback):
    """Keeps Ray Train from restarting a run whose failure a restart would only meet again."""

    def __init__(self, monitor: MonitorHandle) -> None:
        self._monitor = monitor

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Called by the controller, which does not retry after an exception from a callback."""
        cause = ray.get(self._monitor.status.remote()).cause
        if cause and cause.cause.is_final:
            raise RuntimeError(f"rank {cause.rank} raised {cause.kind}: {cause.message}")


def diagnose(error: Exception, status: RunStatus) -> dict[str, Any]:
    """The ``error`` of a failed run's ``summary.json``: ``cause``, ``kind``, ``message``, and perhaps ``rank`` and
    ``traceback``; from what Ray Train ended with, and what the workers said.
    """
    told = status.cause
    if told and told.cause.is_final:
        return _as_told(told, told.cause)
    lost = lost_workers(error)
    if lost:
        return _as_seen(lost, status)
    if isinstance(error, _OF_RAY):
        return {"cause": Cause.LOST_RAY, "kind": type(error).__name__, "message": _lost_part(error)}
    if told is None:
        cause = Cause.STORAGE if is_storage_fault(error) else Cause.ERROR
        return {"cause": cause, "kind": type(error).__name__, "message": message_of(error)}
    if told.cause is Cause.LOST_WORKER and _lose_node(set(status.nodes.values())):
        return _as_told(told, Cause.LOST_NODE)
    return _as_told(told, told.cause)


def _lost_part(error: Exception) -> str:
    """Which part of Ray a run has lost, in words."""
    if isinstance(error, HeadLostError | RayletLostError):
        return str(error)
    with suppress(Exception):  # what tells it may be gone as well
        if is_raylet_lost():
            return str(RayletLostError())
    name = re.search(r"class_name: (\w+)", str(error))
    part = _PARTS.get(name[1] if name else "", "a process of Ray's")
    return f"{part} died, killed or crashed"


def _as_told(failure: WorkerFailure, cause: Cause) -> dict[str, Any]:
    return {
        "cause": cause,
        "rank": failure.rank,
        "kind": failure.kind,
        "message": failure.message,
        "traceback": failure.traceback,
    }


def _as_seen(lost: dict[int, Exception], status: RunStatus) -> dict[str, Any]:
    causes = {rank: _cause_of_loss(failure) for rank, failure in lost.items()}
    unreachable = {rank for rank, failure in lost.items() if isinstance(failure, ray.exceptions.ActorUnavailableError)}
    if unreachable and _lose_node(set(status.nodes.values())):
        causes |= dict.fromkeys(unreachable, Cause.LOST_NODE)
    rank = min(lost, key=lambda rank: (_GRAVITY.index(causes[rank]), rank))
    lines = [f"rank {each} was lost: {_reason(causes[each], failure)}" for each, failure in sorted(lost.items())]
    return {"cause": causes[rank], "rank": rank, "kind": type(lost[rank]).__name__, "message": "\n".join(lines)}


def _cause_of_loss(failure: Exception) -> Cause:
    """Why a worker could not speak for itself."""
    if isinstance(failure, ray.exceptions.OutOfMemoryError):
        return Cause.HOST_MEMORY
    if isinstance(failure, ray.exceptions.RayActorError):
        return Cause.LOST_NODE if "node has died" in str(failure) else Cause.LOST_WORKER
    return Cause.TIMEOUT if "hanging" in str(failure) else Cause.LOST_WORKER


def _reason(cause: Cause, failure: Exception) -> str:
    """In a few words what Ray takes many for, and in Ray's where it knows more than that a process has gone."""
    match cause:
        case Cause.LOST_NODE:
            return "its node died"
        case Cause.LOST_WORKER if isinstance(failure, ray.exceptions.RayActorError):
            return "its process died, killed or crashed"
        case _:
            return str(failure).strip()


def _lose_node(nodes: Collection[str]) -> bool:
    """True if one of the workers' nodes but the driver's is dead, or is found to be while Ray comes to notice it."""
    others = set(nodes) - {ray.get_runtime_context().get_node_id()}
    deadline = time.monotonic() + (NODE_NOTICE_S if others else 0)
    while True:
        alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        if not others <= alive:
            return True
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.5)
