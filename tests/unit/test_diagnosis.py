"""What ended a run, from what its workers said and what Ray knew; the errors are Ray's own classes."""

from typing import Any

import pytest
import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError, OutOfMemoryError
from ray.train import WorkerGroupError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError, WorkerHealthCheckTimeoutError

from raytorch import failures
from raytorch.causes import Cause
from raytorch.failures import diagnose
from raytorch.monitor import Failure, Status

HERE, THERE = "the driver's node", "another"


def told(cause: Cause, rank: int = 0) -> Status:
    failure = Failure(rank, "Kind", "what it said", "Traceback", cause, expected=False, user_error=False)
    return Status(failures=[failure], nodes={0: HERE, 1: THERE})


def died(text: str) -> Exception:
    error = ActorDiedError()
    error.error_msg = f"The actor died unexpectedly before finishing this task.\n\tpid: 1\n{text}"
    return WorkerHealthCheckFailedError("A worker health check failed.", error)


PROCESS = died("The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR")
NODE = died("The actor died because its node has died. Node Id: 0a1b")
MEMORY = WorkerHealthCheckFailedError("A worker health check failed.", OutOfMemoryError("Memory was low; killed."))
HANGING = WorkerHealthCheckTimeoutError("A worker health check has been hanging for 600 seconds.")
RAISED = RuntimeError("Connection closed by peer")


def lost(**failures: Exception) -> Exception:
    return WorkerGroupError("Training failed", {int(rank[1:]): failure for rank, failure in failures.items()})


@pytest.mark.parametrize(
    ("error", "cause", "rank", "message"),
    [
        (lost(r1=PROCESS), Cause.LOST_WORKER, 1, "rank 1 was lost: its process died, killed or crashed"),
        (lost(r0=RAISED, r1=NODE), Cause.LOST_NODE, 1, "rank 1 was lost: its node died"),
        (lost(r3=MEMORY), Cause.HOST_MEMORY, 3, "rank 3 was lost: Memory was low; killed."),
        (
            lost(r0=PROCESS, r1=NODE),
            Cause.LOST_NODE,
            1,
            "rank 0 was lost: its process died, killed or crashed\nrank 1 was lost: its node died",
        ),
        (lost(r0=NODE, r2=MEMORY), Cause.HOST_MEMORY, 2, None),
        (lost(r0=HANGING), Cause.TIMEOUT, 0, None),
    ],
)
def test_a_worker_that_could_not_speak_is_explained_by_what_ray_saw(
    error: Exception, cause: Cause, rank: int, message: str | None
) -> None:
    for status in (Status(), told(Cause.LOST_WORKER), told(Cause.TIMEOUT)):  # what its peers noticed explains less
        details = diagnose(error, status)
        assert (details["cause"], details["rank"]) == (cause, rank)
        assert details["message"] == (message or details["message"])
        assert "traceback" not in details


@pytest.mark.parametrize("cause", [Cause.ERROR, Cause.HOST_MEMORY, Cause.GPU_MEMORY])
def test_what_a_worker_raised_comes_before_what_became_of_the_others(cause: Cause) -> None:
    assert diagnose(lost(r1=NODE), told(cause)) == {
        "cause": cause,
        "rank": 0,
        "kind": "Kind",
        "message": "what it said",
        "traceback": "Traceback",
    }


class Nodes:
    """A cluster whose second node dies after some looks at it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, looks: int) -> None:
        self.looks = looks
        monkeypatch.setattr(ray, "nodes", self.read)
        monkeypatch.setattr(ray, "get_runtime_context", lambda: self)
        monkeypatch.setattr(failures, "NODE_NOTICE_S", 0.1)
        monkeypatch.setattr("time.sleep", lambda seconds: None)

    def get_node_id(self) -> str:
        return HERE

    def read(self) -> list[dict[str, Any]]:
        self.looks -= 1
        return [{"NodeID": HERE, "Alive": True}, {"NodeID": THERE, "Alive": self.looks >= 0}]


@pytest.mark.parametrize(("looks", "cause"), [(0, Cause.LOST_NODE), (5, Cause.LOST_NODE), (10**9, Cause.LOST_WORKER)])
def test_a_peer_that_is_gone_is_a_lost_node_if_ray_comes_to_notice_one(
    monkeypatch: pytest.MonkeyPatch, looks: int, cause: Cause
) -> None:
    Nodes(monkeypatch, looks)
    assert diagnose(lost(r0=RAISED), told(Cause.LOST_WORKER))["cause"] is cause
    assert diagnose(lost(r0=RAISED), told(Cause.TIMEOUT))["cause"] is Cause.TIMEOUT
    unreachable = WorkerHealthCheckFailedError("failed", ActorUnavailableError("RPC error: unavailable", None))
    assert diagnose(lost(r1=unreachable), told(Cause.LOST_WORKER))["cause"] is cause


def test_an_error_of_ray_train_itself_is_an_error() -> None:
    assert diagnose(RuntimeError("what Ray says"), Status()) == {
        "cause": Cause.ERROR,
        "kind": "RuntimeError",
        "message": "what Ray says",
    }
