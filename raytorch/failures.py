"""What ends a run: failures that no restart can mend, and the cause as the workers told it and Ray saw it."""

import os
import re
import socket
import threading
import time
from collections.abc import Collection
from contextlib import suppress
from typing import Any, Self

import ray
import ray.train

from raytorch.causes import Cause, is_storage_fault
from raytorch.monitor import Failure, Status
from raytorch.worker_group import lost_workers

LOOK_S = 2.0
"""Seconds between two looks at Ray's head process and raylet."""
NODE_NOTICE_S = 20.0
"""Ray takes a node for dead some 15 s after it fell silent."""

_GRAVITY = (Cause.HOST_MEMORY, Cause.LOST_NODE, Cause.TIMEOUT, Cause.LOST_WORKER)
"""Where several workers were lost, the first of these explains the others."""


class HeadLostError(ray.exceptions.RayError):
    """Ray's head process, the GCS, no longer answers."""


class RayletLostError(ray.exceptions.RayError):
    """The raylet of the driver's machine is gone, and with it all of Ray there."""

    def __init__(self) -> None:
        super().__init__("the raylet of the driver's machine died, killed or crashed, and with it all of Ray there")


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
"""What a call raises when a part of Ray is gone, and not because of what it called."""
_PARTS = {"RunMonitor": "the run's monitor", "WorkerGroupController": "the run's controller"}


class RayWatch:
    """Asks in a thread of its own whether Ray's head process and the raylet here are there.

    Without the one Ray ends this process after a minute, without the other after a quarter of one (Ray 2.60), before it
    can say why.

    Attributes:
        patience: Seconds without the head process after which it is lost: half of those that Ray has, as it may be
            started again. A raylet is not.
    """

    def __init__(self) -> None:
        self.patience = float(os.environ.get("RAY_gcs_rpc_server_reconnect_timeout_s", 60)) / 2  # noqa: SIM112
        host, _, port = ray.get_runtime_context().gcs_address.rpartition(":")
        self._head = (host.strip("[]"), int(port))
        self._raylet = _raylet_address()
        self._seen = time.monotonic()
        self._is_raylet_gone = False
        self._ended = threading.Event()

    def require(self) -> None:
        """Raise HeadLostError or RayletLostError if one of them is lost."""
        if self._is_raylet_gone:
            raise RayletLostError
        if (silence := time.monotonic() - self._seen) > self.patience:
            raise HeadLostError(f"Ray's head process (gcs_server) has not answered for {silence:.0f} s")

    def __enter__(self) -> Self:
        threading.Thread(target=self._look, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()

    def _look(self) -> None:
        while not self._ended.wait(LOOK_S):
            self._is_raylet_gone |= _is_deserted(self._raylet)
            with suppress(OSError), socket.create_connection(self._head, timeout=LOOK_S):
                self._seen = time.monotonic()


class StopOnFinalFailure(ray.train.UserCallback):
    """Keeps Ray Train from restarting a run whose failure a restart would only meet again."""

    def __init__(self, monitor: Any) -> None:
        self._monitor = monitor

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Called by the controller, which does not retry after an exception from a callback."""
        cause = ray.get(self._monitor.status.remote()).cause
        if cause and cause.cause.is_final:
            raise RuntimeError(f"rank {cause.rank} raised {cause.kind}: {cause.message}")


def diagnose(error: Exception, status: Status) -> dict[str, Any]:
    """The ``error`` of a failed run's ``summary.json``: ``cause``, ``kind``, ``message``, and what is known of the
    ``rank`` and its ``traceback``.

    Args:
        error: What Ray Train ended with.
        status: What the workers said.
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
        return {"cause": cause, "kind": type(error).__name__, "message": str(error)}
    if told.cause is Cause.LOST_WORKER and _lose_node(set(status.nodes.values())):
        return _as_told(told, Cause.LOST_NODE)
    return _as_told(told, told.cause)


def _lost_part(error: Exception) -> str:
    """Which part of Ray a run has lost, in words."""
    if isinstance(error, HeadLostError | RayletLostError):
        return str(error)
    with suppress(Exception):  # what tells it may be gone as well
        if _is_deserted(_raylet_address()):
            return str(RayletLostError())
    name = re.search(r"class_name: (\w+)", str(error))
    part = _PARTS.get(name[1] if name else "", "a process of Ray's")
    return f"{part} died, killed or crashed"


def _raylet_address() -> tuple[str, int]:
    """Where the raylet of this machine listens, on which a run's monitor and controller depend."""
    here = ray.get_runtime_context().get_node_id()
    node = next(node for node in ray.nodes() if node["NodeID"] == here)
    return node["NodeManagerAddress"], node["NodeManagerPort"]


def _is_deserted(address: tuple[str, int]) -> bool:
    """Whether nobody listens there, as the system says at once on the same machine; what only is late does not."""
    try:
        socket.create_connection(address, timeout=LOOK_S).close()
    except ConnectionRefusedError:
        return True
    except OSError:
        return False
    return False


def _as_told(failure: Failure, cause: Cause) -> dict[str, Any]:
    return {
        "cause": cause,
        "rank": failure.rank,
        "kind": failure.kind,
        "message": failure.message,
        "traceback": failure.traceback,
    }


def _as_seen(lost: dict[int, Exception], status: Status) -> dict[str, Any]:
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
    """Whether one of the workers' nodes but the driver's is dead, or is found to be while Ray comes to notice it."""
    others = set(nodes) - {ray.get_runtime_context().get_node_id()}
    deadline = time.monotonic() + (NODE_NOTICE_S if others else 0)
    while True:
        alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        if not others <= alive:
            return True
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.5)
