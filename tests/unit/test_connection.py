"""Reaching a cluster's dashboard: one clear message for each way in which that fails, within seconds."""

import json
import logging
import socket
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest

from raytorch.cluster.capacity import Node
from raytorch.cluster.token import find_token
from raytorch.errors import ClusterError
from raytorch.service import dashboard as connection
from raytorch.service.dashboard import DashboardConnection, Nodes, find_address


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No address and no token but those of the test."""
    for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(connection, "ANSWER_S", 0.5)


@pytest.fixture
def dashboard() -> Iterator[tuple[str, dict[str, object]]]:
    """A server that gives the answer that the test sets, and remembers the authorization it was shown."""
    state: dict[str, object] = {"status": 200, "body": b"{}", "seen": None}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            state["seen"] = self.headers.get("Authorization")
            self.send_response(int(str(state["status"])))
            self.end_headers()
            self.wfile.write(bytes(state["body"]))  # type: ignore[call-overload]

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = Thread(target=server.serve_forever, args=[0.01])
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", state
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("message", "lost"),
    [
        ("Unexpected termination: health check failed due to missing too many heartbeats", True),
        ("Terminated due to preemption", True),
        ("Expected termination: received SIGTERM", False),
        ("Terminated due to idle (no Ray activity)", False),
        (None, False),
    ],
)
def test_a_lost_node_is_told_from_one_that_was_to_end(
    dashboard: tuple[str, dict[str, object]], message: str | None, lost: bool
) -> None:
    url, state = dashboard
    node = {"node_ip": "10.0.0.1", "is_head_node": False, "node_name": "n", "labels": {}}
    up = node | {"node_id": "a", "state": "ALIVE", "resources_total": {"CPU": 2.0}, "state_message": None}
    down = node | {"node_id": "b", "state": "DEAD", "resources_total": {}, "state_message": message}
    listed = {"result": [up, down], "total": 2, "num_after_truncation": 2, "num_filtered": 2}
    answer = {"ray_version": "2.60.0", "result": True, "msg": "", "data": {"result": listed}}
    state["body"] = json.dumps(answer | {"version": "4", "ray_commit": "", "session_name": ""}).encode()
    assert DashboardConnection(url).nodes() == Nodes([Node("a", {"CPU": 2.0})], lost)


def test_an_address_is_the_one_given_or_the_environments(monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_address(None) == "http://127.0.0.1:8265"
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")  # of the cluster itself, not of its dashboard
    assert find_address(None) == "http://127.0.0.1:8265"
    monkeypatch.setenv("RAY_ADDRESS", "http://ray:8265/")
    assert find_address(None) == "http://ray:8265"
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "https://jobs")
    assert find_address(None) == "https://jobs"
    assert find_address("http://other:1") == "http://other:1"


@pytest.mark.parametrize("address", ["", "auto", "10.0.0.1:8265", "ray://head:10001"])
def test_an_address_that_is_no_url_is_refused(address: str) -> None:
    with pytest.raises(ClusterError, match=r"give the URL of the cluster's dashboard, such as http"):
        find_address(address)


def test_a_token_is_found_where_ray_keeps_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert find_token() is None
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("at home\n", encoding="utf-8")
    assert find_token() == "at home"
    (tmp_path / "token").write_text("in a file", encoding="utf-8")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    assert find_token() == "in a file"
    monkeypatch.setenv("RAY_AUTH_TOKEN", "itself")
    assert find_token() == "itself"
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert find_token() is None


def test_a_token_file_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "/nowhere/token")
    with pytest.raises(ClusterError, match="RAY_AUTH_TOKEN_PATH=/nowhere/token: No such file or directory"):
        find_token()


def test_nothing_that_listens() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ClusterError, match=f"^no Ray cluster answers at {url} "):
            DashboardConnection(url)


def test_something_that_never_answers() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(ClusterError, match=f"^no Ray cluster answers at {url} \\(timed out\\)"):
            DashboardConnection(url)


@pytest.mark.parametrize(("status", "body"), [(404, b""), (500, b""), (200, b"<html>"), (200, b"{}"), (200, b"[]")])
def test_something_else_that_answers(dashboard: tuple[str, dict[str, object]], status: int, body: bytes) -> None:
    url, state = dashboard
    state |= {"status": status, "body": body}
    with pytest.raises(ClusterError, match=f"^what answers at {url} is no Ray dashboard"):
        DashboardConnection(url)


@pytest.mark.parametrize(
    ("status", "token", "told"),
    [(401, None, "asks for a token, and there is none here"), (403, "wrong", "refuses the token")],
)
def test_a_refused_token(
    dashboard: tuple[str, dict[str, object]],
    monkeypatch: pytest.MonkeyPatch,
    status: int,
    token: str | None,
    told: str,
) -> None:
    url, state = dashboard
    state["status"] = status
    if token:
        monkeypatch.setenv("RAY_AUTH_TOKEN", token)
    with pytest.raises(ClusterError) as refusal:
        DashboardConnection(url)
    assert str(refusal.value) == (
        f"the cluster at {url} {told} (HTTP {status}); give the cluster's token in one of RAY_AUTH_TOKEN, the file "
        "that RAY_AUTH_TOKEN_PATH names, and ~/.ray/auth_token, which are looked into in this order"
    )
    assert state["seen"] == (f"Bearer {token}" if token else None)


def test_rays_clients_are_quiet_and_its_loggers_left_as_they_are(
    dashboard: tuple[str, dict[str, object]], caplog: pytest.LogCaptureFixture
) -> None:
    url, state = dashboard
    state["body"] = json.dumps({"version": "4", "ray_version": "2.60.0", "ray_commit": "", "session_name": ""}).encode()
    talkative = logging.getLogger("ray.dashboard.modules.job.sdk")
    with caplog.at_level(logging.INFO, talkative.name):
        cluster = DashboardConnection(url)
        assert talkative.level == logging.INFO
        with cluster.explaining():
            talkative.info("uploading")
        assert caplog.messages == []
        talkative.info("of somebody else")
    assert caplog.messages == ["of somebody else"]
