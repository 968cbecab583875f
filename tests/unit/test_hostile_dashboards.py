"""What answers in the place of a dashboard gets no token that it was not named for, no memory and no time."""

import gzip
import os
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from dashboards import NODES, Answering, Dashboard, dashboard, raw, send, send_json

from raytorch import Client
from raytorch.errors import ClusterError, JobNotFoundError, UserError
from raytorch.service import dashboard as connection
from raytorch.service import http, logs

TOKEN = "0123456789abcdef" * 4
HEAD = b"HTTP/1.1 200 OK\r\n"


@pytest.fixture(autouse=True)
def token(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)


@pytest.fixture
def there() -> Iterator[Dashboard]:
    with dashboard() as told:
        yield told


def ask_to_stop(client: Client) -> Any:
    with client._connection.explaining("one"):
        return client._connection.jobs.stop_job("one")


ASKING: dict[str, tuple[str, Callable[[Client], Any]]] = {
    "jobs": ("/api/jobs/", lambda client: client.jobs()),
    "status": ("/api/jobs/one", lambda client: client.status("one")),
    "stop": ("/api/jobs/one/stop", ask_to_stop),
    "nodes": ("/api/v0/nodes", lambda client: client._connection.nodes()),
}


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_no_token_goes_along_with_a_redirect(there: Dashboard, status: int) -> None:
    with dashboard() as other:
        there.routes["/api/version"] = send(status, b"", Location=f"{other.url}/api/version")
        with pytest.raises(ClusterError) as refusal:
            Client(there.url)
        assert str(refusal.value) == (
            f"{there.url}/api/version redirects to {other.url}/api/version, where the token is not sent; if that is "
            "the cluster, give its URL as the address"
        )
        assert other.seen == []


@pytest.mark.parametrize("asked", ASKING)
def test_no_later_request_is_led_elsewhere(there: Dashboard, asked: str) -> None:
    path, ask = ASKING[asked]
    client = Client(there.url)
    with dashboard() as other:
        there.routes[path] = send(307, b"", Location=f"{other.url}{path}")
        with pytest.raises(ClusterError, match=r"redirects to .*, where the token is not sent"):
            ask(client)
        assert other.seen == []
    assert {authorization for _, _, authorization in there.seen} == {f"Bearer {TOKEN}"}


@pytest.mark.parametrize("path", ["/api/packages/", "/api/jobs/"])
def test_no_project_is_sent_elsewhere(there: Dashboard, path: str, tmp_path: Path) -> None:
    there.routes["/api/v0/nodes"] = send_json(NODES)
    there.routes["/api/packages/"] = send(200, b"")
    script = tmp_path / "train.py"
    script.touch()
    with dashboard() as other:
        there.routes[path] = send(307, b"", Location=f"{other.url}{path}")
        with pytest.raises(ClusterError, match=r"redirects to .*, where the token is not sent"):
            Client(there.url).submit_script(script, storage=str(tmp_path / "runs"))
        assert other.seen == []


def test_what_a_redirect_names_is_shown_as_text(there: Dashboard) -> None:
    there.routes["/api/version"] = raw(b"HTTP/1.1 302 Found\r\nLocation: http://x/\x1b]0;title\x07\r\n\r\n")
    with pytest.raises(ClusterError) as refusal:
        Client(there.url)
    assert "\x1b" not in str(refusal.value)


def test_a_redirect_that_names_no_url_is_told(there: Dashboard) -> None:
    there.routes["/api/version"] = raw(b"HTTP/1.1 302 Found\r\nLocation: http://[x/\r\n\r\n")
    with pytest.raises(ClusterError, match="redirects to http://"):
        Client(there.url)


def test_a_netrc_takes_the_place_of_no_token(there: Dashboard, tmp_path: Path) -> None:
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login me password mine\n", encoding="utf-8")
    there.routes["/api/jobs/"] = send_json([])
    assert Client(there.url).jobs() == []
    assert {authorization for _, _, authorization in there.seen} == {f"Bearer {TOKEN}"}


def endless(there: Dashboard, begin: bytes, piece: bytes, pause: float = 0) -> Answering:
    def answer(request: Any) -> None:
        request.wfile.write(begin)
        while not there.leaving.is_set():
            request.wfile.write(piece)
            if pause:
                request.wfile.flush()
                time.sleep(pause)

    return answer


ENDLESS = {
    "body": (HEAD + b"\r\n", b" " * 4096),
    "chunks": (HEAD + b"Transfer-Encoding: chunked\r\n\r\n", b"1000\r\n" + b" " * 4096 + b"\r\n"),
    "length": (HEAD + b"Content-Length: 1000000000000\r\n\r\n", b" " * 4096),
    "error": (b"HTTP/1.1 500 Failed\r\n\r\n", b" " * 4096),
}


@pytest.mark.parametrize("how", ENDLESS)
def test_an_endless_answer_is_cut_off(there: Dashboard, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "MOST_BYTES", 4 << 20)
    client = Client(there.url)
    there.routes["/api/"] = endless(there, *ENDLESS[how])
    there.routes.pop("/api/version")
    tracemalloc.start()
    try:
        with pytest.raises(ClusterError, match=r"answers with more than 0\.1 MiB, as no Ray dashboard does"):
            Client(there.url)
        for _, ask in ASKING.values():
            with pytest.raises(ClusterError, match=r"answers with more than 4\.0 MiB, as no Ray dashboard does"):
                ask(client)
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()


DRIPS = {
    "nothing": (b"", b""),
    "status": (b"HTTP/1.1 200 ", b"O"),
    "headers": (HEAD + b"X: ", b"y"),
    "body": (HEAD + b"\r\n", b" "),
    "chunks": (HEAD + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n"),
}


@pytest.mark.parametrize("how", DRIPS)
def test_an_answer_that_drips_is_given_up(there: Dashboard, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "ANSWER_S", 0.3)
    monkeypatch.setattr(http, "WITHIN_S", 0.3)
    client = Client(there.url)
    there.routes["/api/"] = endless(there, *DRIPS[how], pause=0.02)
    there.routes.pop("/api/version")
    with pytest.raises(ClusterError, match=r"^no Ray cluster answers at http.* \(timed out\)"):
        Client(there.url)
    for path, ask in ASKING.values():
        if path != "/api/v0/nodes":  # Ray's client asks for these with a bound of its own, of 30 s
            with pytest.raises(ClusterError, match=r"no longer answers: timed out$"):
                ask(client)


ENDED = {"type": "SUBMISSION", "submission_id": "one", "entrypoint": "x", "status": "FAILED", "driver_node_id": "ab"}


@pytest.fixture
def ended_job(there: Dashboard) -> Dashboard:
    """A job that has failed, whose log is asked for."""
    there.routes["/api/jobs/one"] = send_json(ENDED)
    return there


def test_a_log_that_drips_is_given_up(
    ended_job: Dashboard, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(logs, "READING_S", 0.2)
    monkeypatch.setattr(logs, "TAILING_S", 0.2)
    ended_job.routes["/api/v0/logs/file"] = endless(ended_job, *DRIPS["chunks"], pause=0.02)
    client = Client(ended_job.url)
    with pytest.raises(ClusterError, match=r"the answer is not whole after 0\.2 s$"):
        client.logs("one")
    assert client.status("one").state == "failed"
    [told] = caplog.messages
    assert told.startswith("the log of one cannot be read: ")


def test_what_is_said_of_a_log_that_is_not_there_ends(ended_job: Dashboard, caplog: pytest.LogCaptureFixture) -> None:
    ended_job.routes["/api/v0/logs/file"] = send(500, b"no such file")
    ended_job.routes["/api/v0/logs"] = endless(ended_job, *ENDLESS["chunks"])
    client = Client(ended_job.url)
    with pytest.raises(ClusterError, match=r"answers with more than 1\.0 MiB"):
        client.logs("one")
    assert client.status("one").state == "failed"
    assert "answers with more than 1.0 MiB" in caplog.text


GARBAGE = {
    "chunks": raw(HEAD + b"Transfer-Encoding: chunked\r\n\r\n", b"zz\r\nno length\r\n"),
    "cut chunk": raw(HEAD + b"Transfer-Encoding: chunked\r\n\r\n", b'ff\r\n{"ray_'),
    "cut": raw(HEAD + b"Content-Length: 100\r\n\r\n", b'{"ray_'),
    "status": raw(b"\x16\x03\x01\x02\x00\x01\x00"),
    "long status": raw(b"HTTP/1.1 200 " + b"O" * 200_000),
    "headers": raw(HEAD + b"".join(b"X%d: y\r\n" % n for n in range(1000)) + b"\r\n"),
    "gzip bomb": send(200, gzip.compress(bytes(200 << 20)), Content_Encoding="gzip"),
    "deep": send(200, b"[" * 50_000),
    "not utf-8": send(200, b'{"ray_version": "\xff"}'),
    "list": send(200, b"[1]"),
    "text": send(200, b'"ray_version"'),
    "nothing": send(200, b""),
    "failure": send_json({"result": False, "msg": "it is broken"}),
    "long failure": send(500, b"x" * 60_000),
    "redirect to nowhere": send(302, b""),
    "redirect by ftp": send(302, b"", Location="ftp://127.0.0.1/"),
}


@pytest.mark.parametrize("what", GARBAGE)
def test_garbage_is_one_clear_error(there: Dashboard, what: str) -> None:
    client = Client(there.url)
    there.routes = {"/api/": GARBAGE[what]}
    tracemalloc.start()
    try:
        with pytest.raises(
            ClusterError,
            match=r"^(what answers at .* is no Ray d|no Ray cluster answers at |http://\S+ (redirects|answers with))",
        ):
            Client(there.url)
        for _, ask in ASKING.values():
            with pytest.raises(ClusterError, match=r"^(the cluster at |what answers at |)http://127") as refusal:
                ask(client)
            assert len(str(refusal.value)) < 2500
        assert tracemalloc.get_traced_memory()[1] < 32 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", ["../../api/version", "one?x=y", "one#two", "a b", "é", "%2e"])
def test_a_job_is_asked_for_by_its_name_whatever_that_is(there: Dashboard, name: str) -> None:
    client = Client(there.url)
    with pytest.raises(JobNotFoundError, match="no job"):
        client.status(name)
    path = there.seen[-1][1]
    assert path.startswith("/api/jobs/")
    assert "/" not in path.removeprefix("/api/jobs/")
    assert "?" not in path


@pytest.mark.parametrize("what", ["argument", "script", "storage"])
def test_names_that_are_no_text_are_refused_before_anything_is_sent(
    there: Dashboard, tmp_path: Path, what: str
) -> None:
    there.routes["/api/v0/nodes"] = send_json(NODES)
    odd = os.fsdecode(b"caf\xe9.py")
    script = tmp_path / (odd if what == "script" else "train.py")
    script.touch()
    storage = tmp_path / (odd if what == "storage" else "runs")
    with pytest.raises(UserError, match=r"caf\\xe9\.py"):
        Client(there.url).submit_script(script, [odd] if what == "argument" else [], storage=str(storage))
    assert {method for method, _, _ in there.seen} == {"GET"}
