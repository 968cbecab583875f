"""What ended a run, from what its workers said and what Ray knew; the errors are Ray's own classes."""

import socket
import time
from collections.abc import Iterator
from queue import SimpleQueue
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError, OutOfMemoryError
from ray.train import WorkerGroupError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError, WorkerHealthCheckTimeoutError

from raytorch.cluster import ray_watch
from raytorch.errors import Cause
from raytorch.runs.status import RunStatus, WorkerFailure
from raytorch.training import failures
from raytorch.training.failures import diagnose

HERE, THERE = "the driver's node", "another"


def told(cause: Cause, rank: int = 0) -> RunStatus:
    failure = WorkerFailure(rank, "Kind", "what it said", "Traceback", cause, expected=False, user_error=False)
    return RunStatus(failures=[failure], nodes={0: HERE, 1: THERE})


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
    for status in (RunStatus(), told(Cause.LOST_WORKER), told(Cause.TIMEOUT)):  # what its peers noticed explains less
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
        self.address = ("127.0.0.1", 0)
        monkeypatch.setattr(ray, "nodes", self.read)
        monkeypatch.setattr(ray, "get_runtime_context", lambda: self)
        monkeypatch.setattr(failures, "NODE_NOTICE_S", 0.1)
        clock = SimpleNamespace(monotonic=time.monotonic, sleep=lambda seconds: None)
        monkeypatch.setattr(failures, "time", clock)

    def get_node_id(self) -> str:
        return HERE

    def read(self) -> list[dict[str, Any]]:
        self.looks -= 1
        address, port = self.address
        here = {"NodeID": HERE, "Alive": True, "NodeManagerAddress": address, "NodeManagerPort": port}
        return [here, {"NodeID": THERE, "Alive": self.looks >= 0}]


@pytest.mark.parametrize(("looks", "cause"), [(0, Cause.LOST_NODE), (5, Cause.LOST_NODE), (10**9, Cause.LOST_WORKER)])
def test_a_peer_that_is_gone_is_a_lost_node_if_ray_comes_to_notice_one(
    monkeypatch: pytest.MonkeyPatch, looks: int, cause: Cause
) -> None:
    Nodes(monkeypatch, looks)
    assert diagnose(lost(r0=RAISED), told(Cause.LOST_WORKER))["cause"] is cause
    assert diagnose(lost(r0=RAISED), told(Cause.TIMEOUT))["cause"] is Cause.TIMEOUT
    unreachable = WorkerHealthCheckFailedError("failed", ActorUnavailableError("RPC error: unavailable", None))
    assert diagnose(lost(r1=unreachable), told(Cause.LOST_WORKER))["cause"] is cause


SUPERVISED = """\
The actor died unexpectedly before finishing this task.
\tclass_name: {name}
\tpid: 1
The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit detail: Worker \
unexpectedly exits with a connection error code 2. End of file."""


def of_actor(name: str) -> Exception:
    error = ActorDiedError()
    error.error_msg = SUPERVISED.format(name=name)
    return error


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (of_actor("RunMonitor"), "the run's monitor died, killed or crashed"),
        (of_actor("WorkerGroupController"), "the run's controller died, killed or crashed"),
        (ActorUnavailableError("RPC error: unavailable", None), "a process of Ray's died, killed or crashed"),
        (ray_watch.HeadLostError("Ray's head process is gone"), "Ray's head process is gone"),
    ],
)
def test_a_part_of_ray_that_is_gone_is_named(monkeypatch: pytest.MonkeyPatch, error: Exception, message: str) -> None:
    nodes = Nodes(monkeypatch, looks=10**9)
    with socket.create_server(("127.0.0.1", 0)) as raylet:
        nodes.address = raylet.getsockname()
        for status in (RunStatus(), told(Cause.LOST_WORKER)):  # the workers go with it
            details = diagnose(error, status)
            assert (details["cause"], details["message"]) == (Cause.LOST_RAY, message)


@pytest.mark.parametrize("is_there", [True, False])
def test_a_raylet_that_is_gone_takes_the_others_with_it(monkeypatch: pytest.MonkeyPatch, is_there: bool) -> None:
    """It is asked itself: Ray takes a quarter of a minute to notice."""
    nodes = Nodes(monkeypatch, looks=10**9)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        nodes.address = listener.getsockname()
        if not is_there:
            listener.close()
        details = diagnose(of_actor("RunMonitor"), RunStatus())
    assert details["cause"] is Cause.LOST_RAY
    assert details["message"].startswith("the run's monitor" if is_there else "the raylet of the driver's machine died")
    assert nodes.looks == 10**9 - 1  # without waiting for Ray to notice


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """A head process and a raylet that listen until they are closed."""
    head, raylet = (socket.create_server(("127.0.0.1", 0)) for _ in range(2))
    monkeypatch.setattr(ray_watch, "LOOK_S", 0.01)
    address, port = raylet.getsockname()
    node = {"NodeID": HERE, "Alive": True, "NodeManagerAddress": address, "NodeManagerPort": port}
    context = SimpleNamespace(gcs_address="{}:{}".format(*head.getsockname()), get_node_id=lambda: HERE)
    monkeypatch.setattr(ray, "nodes", lambda: [node])
    monkeypatch.setattr(ray, "get_runtime_context", lambda: context)
    with head, raylet:
        yield SimpleNamespace(head=head, raylet=raylet)


def look(watch: ray_watch.RayWatch, parts: SimpleNamespace, times: int) -> None:
    """Let a watch look so many times at what there is."""
    parts.raylet.settimeout(20)
    for _ in range(times):
        parts.raylet.accept()[0].close()
        watch.require()


def require_again_and_again(watch: ray_watch.RayWatch) -> None:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        watch.require()
        time.sleep(0.01)


def test_a_head_process_is_lost_when_it_has_long_not_answered(parts: SimpleNamespace) -> None:
    with ray_watch.RayWatch() as watch:
        look(watch, parts, 100)
        parts.head.close()
        watch.patience = 0.5
        time.sleep(1)
        with pytest.raises(ray_watch.HeadLostError, match="has not answered for"):
            watch.require()


def test_a_head_process_that_was_started_here_is_lost_as_soon_as_it_refuses(
    parts: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_watch, "has_own_ray", lambda: True)
    lost: SimpleQueue[Exception] = SimpleQueue()
    with ray_watch.RayWatch(lost.put) as watch:
        look(watch, parts, 3)
        parts.head.close()
        assert isinstance(lost.get(timeout=20), ray_watch.HeadLostError)
        with pytest.raises(ray_watch.HeadLostError, match="died, killed or crashed"):
            watch.require()


def test_who_waits_for_an_answer_is_told_that_a_part_of_ray_is_lost(
    parts: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def get(reference: str, timeout: float) -> None:
        raise ray.exceptions.GetTimeoutError

    monkeypatch.setattr(ray, "get", get)
    with ray_watch.RayWatch() as watch, pytest.raises(ray_watch.RayletLostError):
        watch.wait_for("what is never there", parts.raylet.close)
    monkeypatch.setattr(ray, "get", pytest.fail)
    with pytest.raises(ray_watch.RayletLostError):
        watch.wait_for("what would start another Ray")


def test_a_raylet_is_lost_as_soon_as_it_refuses(parts: SimpleNamespace) -> None:
    with ray_watch.RayWatch() as watch:
        look(watch, parts, 3)
        parts.raylet.close()
        with pytest.raises(ray_watch.RayletLostError, match="the raylet of the driver's machine died"):
            require_again_and_again(watch)


def test_an_error_of_ray_train_itself_is_an_error() -> None:
    assert diagnose(RuntimeError("what Ray says"), RunStatus()) == {
        "cause": Cause.ERROR,
        "kind": "RuntimeError",
        "message": "what Ray says",
    }
