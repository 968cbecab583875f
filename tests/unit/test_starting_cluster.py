"""A cluster that has just started: its dashboard answers before the process on its head that takes jobs does."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from dashboards import NODES, Answering, Dashboard, dashboard, send, send_json

from raytorch import Client
from raytorch.errors import ClusterError, UserError
from raytorch.service import dashboard as connection

NOT_YET = {
    "submit": "No available agent to submit job, please try again later.",
    "stop": "Traceback (most recent call last):\n  ...\nTimeoutError: Failed to get head node agent within 10 seconds. "
    "The last exception is 'Agent info not found in internal KV for node 1'",
}
"""Ray's words, for each of which it has waited for ten seconds."""
JOB = {"type": "SUBMISSION", "submission_id": "one", "status": "RUNNING", "entrypoint": "x", "metadata": {}}


@pytest.fixture
def there(monkeypatch: pytest.MonkeyPatch) -> Iterator[Dashboard]:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setattr(connection, "AGENT_PAUSE_S", 0.01)
    with dashboard() as told:
        told.routes["/api/packages/"] = send(200, b"")
        told.routes["/api/jobs/"] = send_json(JOB)
        yield told


def submit(there: Dashboard, tmp_path: Path) -> Any:
    script = tmp_path / "train.py"
    script.touch()
    return Client(there.url).submit_script(script, name="one", storage=str(tmp_path / "runs")).id


def stop(there: Dashboard, tmp_path: Path) -> Any:
    return Client(there.url).stop("one")


CASES: dict[str, tuple[Callable[[Dashboard, Path], Any], str, Any, Any]] = {
    "submit": (submit, "POST /api/jobs/", {"job_id": "one", "submission_id": "one"}, "one"),
    "stop": (stop, "POST /api/jobs/one/stop", {"stopped": True}, True),
}


def in_turn(there: Dashboard, first: list[Answering], then: Answering) -> Answering:
    """What was asked for with POST is answered by each of ``first`` in turn, what comes after by ``then``."""
    others = there.routes["/api/jobs/"]

    def answer(request: Any) -> None:
        (others if request.command != "POST" else first.pop(0) if first else then)(request)

    return answer


@pytest.mark.parametrize("case", CASES)
def test_a_cluster_that_takes_no_jobs_yet_is_asked_again(there: Dashboard, tmp_path: Path, case: str) -> None:
    ask, request, good, result = CASES[case]
    there.routes[request.split()[1]] = in_turn(there, [send(500, NOT_YET[case].encode())] * 3, send_json(good))
    assert ask(there, tmp_path) == result
    assert [f"{method} {path}" for method, path, _ in there.seen].count(request) == 4


@pytest.mark.parametrize("case", CASES)
def test_a_cluster_that_never_takes_any_is_one_clear_error(
    there: Dashboard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    monkeypatch.setattr(connection, "AGENT_S", 0.1)
    ask, request, _, _ = CASES[case]
    there.routes[request.split()[1]] = in_turn(there, [], send(500, NOT_YET[case].encode()))
    with pytest.raises(ClusterError) as refusal:
        ask(there, tmp_path)
    assert str(refusal.value) == (
        f"the cluster at {there.url} takes no jobs: as far as its dashboard knows, no agent listens on its head, which "
        "the dashboard gives jobs to; if the cluster has just started, try again, else another program may have the "
        "agent's port there, 52365 unless 'ray start' was given another: end that, or start the head anew with "
        "--dashboard-agent-listen-port and a free one; dashboard_agent.log on the head says whether it is so"
    )
    assert [f"{method} {path}" for method, path, _ in there.seen].count(request) > 1


@pytest.mark.parametrize("case", CASES)
def test_a_cluster_whose_agent_has_died_is_told_at_once(there: Dashboard, tmp_path: Path, case: str) -> None:
    died = (
        "Traceback (most recent call last):\n  ...\naiohttp.client_exceptions.ClientConnectorError: Cannot connect to "
        "host 10.0.0.7:52365 ssl:default [Connect call failed ('10.0.0.7', 52365)]"
    )
    ask, request, _, _ = CASES[case]
    there.routes[request.split()[1]] = in_turn(there, [], send(500, died.encode()))
    told = (
        r"takes no jobs: the agent on its head, .* no longer answers \(Cannot connect to host 10.0.0.7:52365\); start"
    )
    with pytest.raises(ClusterError, match=told):
        ask(there, tmp_path)
    assert [f"{method} {path}" for method, path, _ in there.seen].count(request) == 1


def test_a_cluster_that_lists_no_node_yet_is_asked_again(
    there: Dashboard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A script's storage is relative: whether the cluster runs here is seen by its nodes."""
    monkeypatch.chdir(tmp_path)
    Path("train.py").touch()
    none = NODES["data"] | {"result": NODES["data"]["result"] | {"result": []}}
    answers = iter([send_json(NODES | {"data": none})] * 2)
    there.routes["/api/v0/nodes"] = lambda request: next(answers, send_json(NODES))(request)
    with pytest.raises(UserError, match="runs elsewhere"):
        Client(there.url).submit_script(Path("train.py"), name="one")
    assert [path.partition("?")[0] for _, path, _ in there.seen].count("/api/v0/nodes") == 3


def test_another_failure_is_told_at_once(there: Dashboard, tmp_path: Path) -> None:
    there.routes["/api/jobs/"] = in_turn(there, [], send(500, b"the disk is full"))
    with pytest.raises(ClusterError, match=r"refuses: .*the disk is full"):
        submit(there, tmp_path)
    assert [method for method, _, _ in there.seen].count("POST") == 1


@pytest.mark.parametrize("moment", ["between two requests", "in a request"])
def test_waiting_for_it_takes_an_interrupt(
    there: Dashboard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    monkeypatch.setattr(connection, "AGENT_PAUSE_S", 600)

    def answer(request: Any) -> None:
        threading.Timer(0.2, os.kill, [os.getpid(), signal.SIGINT]).start()
        if moment == "in a request":
            there.leaving.wait()
        send(500, NOT_YET["submit"].encode())(request)

    there.routes["/api/jobs/"] = answer
    with pytest.raises(KeyboardInterrupt):
        submit(there, tmp_path)
