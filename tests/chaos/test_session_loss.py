"""Workers and clients of sessions are killed: those who wait are told, and nothing stays behind on the cluster."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cloudpickle
import pytest
import ray
import ray._private.state
import torch
from own_ray import own_ray
from ray.util import placement_group_table

import raytorch
from raytorch.distributed import all_reduce
from raytorch.errors import SessionError, SessionLostError

cloudpickle.register_pickle_by_value(sys.modules[__name__])

RAYS_OWN = {"_AutoscalingCoordinatorActor"}
"""Ray Train starts it once per cluster, and leaves it there."""
NOTICE_S = 10.0


@dataclass(frozen=True)
class Cluster:
    """A Ray, of which its head process tells what is there."""

    address: str

    def actors(self) -> list[dict[str, Any]]:
        """Those that are alive."""
        return [actor for actor in ray._private.state.actors().values() if actor["State"] != "DEAD"]

    def leftovers(self) -> list[str]:
        """Actors and placement groups that are alive."""
        groups = [name for name, group in placement_group_table().items() if group["state"] != "REMOVED"]
        names = [actor["ActorClassName"] for actor in self.actors()]
        return [*(name for name in names if name not in RAYS_OWN), *(f"placement group {name}" for name in groups)]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with own_ray(num_cpus=2):
        yield Cluster(ray.get_runtime_context().gcs_address)


def more(tensor: Any) -> Any:
    return tensor + 1


def wait_until(condition: Callable[[], bool], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.1)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_worker_that_is_killed_ends_the_session_for_whoever_waits_and_leaves_nothing(cluster: Cluster) -> None:
    session = raytorch.connect(workers=2, name="mortal")
    pids = [session.rank(rank).run(os.getpid) for rank in (0, 1)]
    tensor = session.ones(1)
    for _ in range(2):
        tensor = more(tensor)  # from here on known, and not waited for
    assert {"SessionWorker", "SessionHost"} <= set(cluster.leftovers())

    def wait_for_a_result(_: int) -> tuple[str, float]:
        with pytest.raises(SessionLostError) as caught:
            session.run(time.sleep, 60)
        return str(caught.value), time.monotonic()

    with ThreadPoolExecutor(1) as pool:
        pending = pool.submit(wait_for_a_result, 0)
        for _ in range(5000):
            tensor = more(tensor)
        os.kill(pids[1], signal.SIGKILL)
        killed = time.monotonic()
        message, told = pending.result(timeout=60)
    assert told - killed < NOTICE_S
    assert message == "the session is lost: rank 1: its process died, killed or out of memory; connect again"

    uses: list[Callable[[], Any]] = [
        tensor.fetch,
        tensor.item,
        lambda: more(tensor),
        lambda: session.ones(2),
        lambda: session.run(os.getpid),
        lambda: session.rank(0).run(os.getpid),
        session.synchronize,
        session.handles,
        session.stats,
    ]
    for use in uses:
        with pytest.raises(SessionLostError, match="the session is lost: rank 1: its process died"):
            use()
    assert time.monotonic() - told < 1
    session.close()  # does not tell it again
    wait_until(lambda: cluster.leftovers() == [], 10)
    wait_until(lambda: not any(map(is_alive, pids)), 10)


def reduce_for_ever(begun: Path) -> None:
    while True:
        all_reduce(torch.ones(4))
        begun.touch()


def test_a_worker_that_is_killed_while_others_wait_for_it_ends_the_session_for_all_clients(
    cluster: Cluster, tmp_path: Path
) -> None:
    wait_until(lambda: cluster.leftovers() == [], 30)
    with raytorch.connect(workers=2, name="collective") as session, raytorch.connect(name="collective") as guest:
        pids = [session.rank(rank).run(os.getpid) for rank in (0, 1)]
        theirs = guest.ones(1)
        with ThreadPoolExecutor(1) as pool:
            pending = pool.submit(session.run, reduce_for_ever, tmp_path / "begun")
            wait_until(lambda: pending.done() or (tmp_path / "begun").exists(), 30)
            os.kill(pids[1], signal.SIGKILL)
            killed = time.monotonic()
            message = "^the session is lost: rank 1: its process died, killed or out of memory; connect again$"
            with pytest.raises(SessionLostError, match=message):
                pending.result(timeout=60)
            with pytest.raises(SessionLostError, match=message):
                theirs.fetch()
        assert time.monotonic() - killed < 2 * NOTICE_S


def test_a_client_that_joined_is_told_why_its_session_has_ended(cluster: Cluster) -> None:
    wait_until(lambda: cluster.leftovers() == [], 30)
    with raytorch.connect(workers=1, name="left") as session:
        silent, other = raytorch.connect(name="left"), raytorch.connect(name="left")
        assert silent.ones(1).item() == other.ones(1).item() == 1
        transport: Any = silent._transport
        ray.get(transport._host.leave.remote(transport.client))  # as after 20 s of silence
        wait_until(lambda: len(session.handles()) < 2, 10)
        with pytest.raises(SessionLostError, match="no sign of life for 20 s, and what it had made was freed"):
            wait_until(lambda: silent.ones(1).item() == 0, 10)
    with pytest.raises(SessionLostError, match="the client that opened it has closed it, or is gone"):
        other.ones(1).item()
    for guest in (silent, other):
        guest.close()


@pytest.mark.parametrize(
    ("part", "told"),
    [
        ("SessionHost", "its host, the actor that brings clients and workers together, died, killed or crashed"),
        ("WorkerGroupController", "its controller died, killed or crashed"),
    ],
)
def test_an_actor_of_a_session_that_is_killed_ends_it_for_whoever_waits(cluster: Cluster, part: str, told: str) -> None:
    wait_until(lambda: cluster.leftovers() == [], 30)
    with raytorch.connect(workers=1) as session, ThreadPoolExecutor(1) as pool:
        worker = session.run(os.getpid)
        pending = pool.submit(session.run, time.sleep, 1000)
        (pid,) = [actor["Pid"] for actor in cluster.actors() if actor["ActorClassName"] == part]
        os.kill(pid, signal.SIGKILL)
        for wait in (lambda: pending.result(timeout=60), session.ones(1).item):
            with pytest.raises(SessionLostError, match=f"^the session is lost: {told}; connect again$"):
                wait()
    wait_until(lambda: cluster.leftovers() == [], 30)
    wait_until(lambda: not is_alive(worker), 10)


OWNER = """
import os, sys
import raytorch
session = raytorch.connect(workers=2, name="orphaned")
pids = [session.rank(rank).run(os.getpid) for rank in (0, 1)]
tensor = session.ones(1)
print(*pids, flush=True)
while True:
    tensor = tensor + 1
"""


def test_a_client_that_is_killed_leaves_no_actor_process_or_placement_group(cluster: Cluster) -> None:
    wait_until(lambda: cluster.leftovers() == [], 30)
    environment = os.environ | {"RAY_ADDRESS": cluster.address}
    with subprocess.Popen(
        [sys.executable, "-c", OWNER], env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as owner:
        try:
            assert owner.stdout
            pids = [int(pid) for pid in owner.stdout.readline().split()]
            assert len(pids) == 2
            assert all(map(is_alive, pids))
            assert len(cluster.leftovers()) >= 4  # the host, the controller, two workers and their placement group
        finally:
            owner.kill()
    wait_until(lambda: cluster.leftovers() == [], 30)
    wait_until(lambda: not any(map(is_alive, pids)), 10)
    with pytest.raises(SessionError, match="there is no session named 'orphaned'"):
        raytorch.connect(name="orphaned")
