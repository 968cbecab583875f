"""What a job writes is told whole, once, and to the job's end, whatever bytes it has and whatever breaks on the way."""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from dashboards import Answering, Dashboard, dashboard, raw, send, send_json

from raytorch import Client
from raytorch.cli.main import main
from raytorch.errors import ClusterError, JobNotFoundError
from raytorch.service import logs

HEAD = b"HTTP/1.1 200 OK\r\n"


class ClusterWithJob:
    """A dashboard that tells of one job, whose state and log go on with each time that its state is asked for.

    Attributes:
        steps: The state, and what the log holds by then; the last step stays.
        exit_code: Of the job's driver.
        answers: What answers requests for the log in place of it, one after the other, in each state.
        details: What else is told of the job.
    """

    def __init__(self, there: Dashboard) -> None:
        self.url = there.url
        self.steps: list[tuple[str, bytes]] = []
        self.exit_code: int | None = None
        self.answers: dict[str, list[Answering]] = {}
        self.details: dict[str, Any] = {"driver_node_id": "ab"}
        self._there, self._now = there, ("PENDING", b"")
        there.routes["/api/jobs/one"] = self._tell
        there.routes["/api/v0/logs"] = send_json({"result": True, "data": {"result": {"misc": ["job-driver-one.log"]}}})
        there.routes["/api/v0/logs/file"] = self._log

    def _tell(self, request: Any) -> None:
        self._now = self.steps.pop(0) if len(self.steps) > 1 else self.steps[0]
        known = {"type": "SUBMISSION", "submission_id": "one", "entrypoint": "python s.py", "status": self._now[0]}
        send_json(known | {"driver_exit_code": self.exit_code} | self.details)(request)

    def _log(self, request: Any) -> None:
        instead = self.answers.get(self._now[0])
        (instead.pop(0) if instead else send(200, self._now[1]))(request)

    def asked(self, path: str) -> int:
        """How often something was asked for."""
        return sum(seen.startswith(path) for _, seen, _ in self._there.seen)


@pytest.fixture
def there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Dashboard]:
    for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(logs, "POLL_S", 0.01)
    with dashboard() as told:
        yield told


@pytest.fixture
def job(there: Dashboard) -> ClusterWithJob:
    return ClusterWithJob(there)


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(job: ClusterWithJob, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """The command line; answers the exit status, and what it wrote to standard output and error."""

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["raytorch", *arguments, "--address", job.url])
        with pytest.raises(SystemExit) as end:
            main()
        assert isinstance(end.value.code, int)
        return end.value.code, *capsys.readouterr()

    return call


def lines(output: str) -> list[str]:
    """The lines in JSON output."""
    return [json.loads(line)["line"] for line in output.removesuffix("\n").split("\n")]


HARD = {
    "a long line": ("x" * 5_000_000 + "\nend\n").encode(),
    "no newline at the end": b"begin\nend",
    "bytes that are no utf-8": b"caf\xe9 \xff\xfe\n\x00end\n",
    "separators": "a\u2028b\u2029c\x85d\x0be\x0cf\x1cg\n".encode(),
    "progress": b"1%\r2%\r3%\nend\r\n",
    "letters of many bytes": ("é€😀" * 30_000 + "\n").encode(),
    "nothing": b"",
}


@pytest.mark.parametrize("what", HARD)
def test_any_output_is_followed_to_the_end(job: ClusterWithJob, run: Run, what: str) -> None:
    written = HARD[what]
    text = written.decode(errors="replace")
    parts = [written[:at] for at in (0, 1, 2, 3, len(written) // 2, len(written) // 2 + 1)]
    job.steps = [("RUNNING", part) for part in parts] + [("SUCCEEDED", written)]
    assert "".join(Client(job.url).follow("one")) == text
    assert Client(job.url).logs("one") == text
    assert run("logs", "one") == (0, text, "")
    status, output, _ = run("logs", "one", "--json")
    whole = text.removesuffix("\n").split("\n") if text else []
    expected = [line.removesuffix("\r") for line in whole]
    assert (status, lines(output) if output else []) == (0, expected)
    job.steps = [("RUNNING", part) for part in parts] + [("SUCCEEDED", written)]
    status, output, _ = run("logs", "one", "-f", "--json")
    assert (status, lines(output) if output else []) == (0, expected)


LOG = b"".join(b"line %d\n" % number for number in range(20_000))
BREAKS: dict[str, Answering] = {
    "nothing": raw(),
    "half": raw(HEAD + b"Content-Length: %d\r\n\r\n" % len(LOG), LOG[: len(LOG) // 2]),
    "half in chunks": raw(HEAD + b"Transfer-Encoding: chunked\r\n\r\n", b"%x\r\n" % 50_000, LOG[:50_000]),
    "garbage": raw(b"\x00\x01\x02"),
    "failure": send(500, b"Max number of in-progress requests"),
    "gateway": send(502, b"bad gateway"),
}


@pytest.mark.parametrize("how", BREAKS)
@pytest.mark.parametrize("when", ["meanwhile", "at the end"])
def test_a_log_that_breaks_off_is_gone_on_with_and_nothing_is_told_twice(
    job: ClusterWithJob, how: str, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "SHARE", 0)
    job.steps = [("RUNNING", LOG[: size * 1000]) for size in (100, 100, 120, 130, 140)] + [("SUCCEEDED", LOG)]
    answers = [BREAKS[how]] * 3
    job.answers = {"RUNNING": [send(200, LOG[:90_000]), *answers]} if when == "meanwhile" else {"SUCCEEDED": answers}
    assert "".join(Client(job.url).follow("one")) == LOG.decode()
    assert not any(job.answers.values())


def test_a_cluster_that_is_away_for_a_while_is_waited_for(job: ClusterWithJob, there: Dashboard) -> None:
    job.steps = [("RUNNING", LOG[:100]), ("RUNNING", LOG[:200]), ("SUCCEEDED", LOG)]
    tell = there.routes["/api/jobs/one"]
    away = iter([tell, tell, send(503, b""), raw(), send(200, b"<html>"), raw(b"\x00")])
    there.routes["/api/jobs/one"] = lambda request: next(away, tell)(request)
    assert "".join(Client(job.url).follow("one")) == LOG.decode()
    away = iter([tell, send(503, b""), raw()])
    assert Client(job.url).wait("one").state == "finished"


def test_a_cluster_that_stays_away_is_an_error(
    job: ClusterWithJob, there: Dashboard, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "PATIENCE_S", 0.2)
    job.steps = [("RUNNING", b"begun\n")]
    tell = there.routes["/api/jobs/one"]
    away = iter([tell, tell])
    there.routes["/api/jobs/one"] = lambda request: next(away, raw())(request)
    status, output, error = run("logs", "-f", "one")
    assert (status, output) == (2, "begun\n")
    assert error.startswith(f"the cluster at {job.url} no longer answers: ")


def test_a_job_that_is_gone_is_an_error(job: ClusterWithJob, there: Dashboard) -> None:
    there.routes["/api/jobs/one"] = send(404, b"")
    with pytest.raises(JobNotFoundError):
        Client(job.url).follow("one")
    with pytest.raises(JobNotFoundError):
        Client(job.url).wait("one")


def test_the_end_of_a_log_that_is_lost_with_its_node_is_said(
    job: ClusterWithJob, run: Run, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(logs, "PATIENCE_S", 0.1)
    job.exit_code = 4
    job.steps = [("RUNNING", b"begun\n"), ("RUNNING", b"begun\n"), ("FAILED", b"")]
    job.answers = {"FAILED": [send(500, b"Agent for node id doesn't exist")] * 100}
    assert run("logs", "-f", "one")[:2] == (4, "begun\n")
    assert any(text.startswith("the end of the log of one cannot be read: ") for text in caplog.messages)
    failure = Client(job.url).status("one").failure
    assert failure is not None
    assert failure.cause == "error"


def test_a_job_that_never_started_has_no_log(job: ClusterWithJob, there: Dashboard, run: Run) -> None:
    job.details = {"driver_node_id": None}
    job.steps = [("PENDING", b""), ("FAILED", b"")]
    assert run("logs", "-f", "one")[:2] == (1, "")
    assert job.asked("/api/v0/logs") == 0
    job.details = {"driver_node_id": "ab"}  # and has no file yet
    there.routes["/api/v0/logs"] = send_json({"result": True, "data": {"result": {}}})
    there.routes["/api/v0/logs/file"] = send(500, b"A file is not found")
    assert run("logs", "one") == (0, "", "")


def test_a_log_that_is_too_long_to_be_read_at_once_is_refused(
    job: ClusterWithJob, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "MOST_BYTES", 100_000)
    job.steps = [("SUCCEEDED", LOG)]
    with pytest.raises(ClusterError, match=r"the log of one is longer than .* follow it"):
        Client(job.url).logs("one")
    assert run("logs", "-f", "one") == (0, LOG.decode(), "")


def test_why_a_job_failed_is_found_at_the_end_of_any_log(job: ClusterWithJob) -> None:
    traceback = b'Traceback (most recent call last):\n  File "s.py", line 1, in <module>\nLookupError: not there\n'
    job.steps = [("FAILED", b"\xff" * 5_000_000 + b"\n" + traceback)]
    failure = Client(job.url).status("one").failure
    assert failure is not None
    assert (failure.kind, failure.message) == ("LookupError", "not there")


@pytest.mark.parametrize(
    ("state", "code", "status"),
    [
        ("SUCCEEDED", 0, 0),
        ("FAILED", 3, 3),
        ("FAILED", 255, 255),
        ("FAILED", -9, 137),
        ("FAILED", 0, 1),
        ("FAILED", None, 1),
        ("STOPPED", None, 130),
        ("STOPPED", -15, 130),
        ("STOPPED", 0, 130),
    ],
)
def test_following_ends_as_the_job_does(
    job: ClusterWithJob, run: Run, state: str, code: int | None, status: int
) -> None:
    job.steps = [("RUNNING", b"a\n"), (state, b"a\nb\n")]
    job.exit_code = code
    assert run("logs", "-f", "one")[:2] == (status, "a\nb\n")
    assert run("logs", "one")[:2] == (0, "a\nb\n")


def test_the_log_of_a_rank_is_followed_whatever_it_holds(job: ClusterWithJob, run: Run, tmp_path: Path) -> None:
    log = tmp_path / "run" / "logs" / "rank-1.log"
    log.parent.mkdir(parents=True)
    (tmp_path / "run" / "summary.json").write_text(json.dumps({"name": "run", "state": "running"}), encoding="utf-8")
    job.details |= {"metadata": {"raytorch_kind": "train", "raytorch_run": f"{tmp_path}/run"}}
    job.exit_code = 3
    written = "é€\u2028 caf".encode() + b"\xe9\n" + b"x" * 3_000_000 + b"\nend"

    def grow(size: int) -> bytes:
        log.write_bytes(written[:size])
        return b""

    class Growing(list[Any]):
        def pop(self, _: Any = 0) -> Any:
            state, size = super().pop(0)
            return state, grow(size)

        def __getitem__(self, place: Any) -> Any:
            state, size = super().__getitem__(place)
            return state, grow(size)

    sizes = [0, 0, 1, 2, 3, 4, 5, 1_000_000]
    job.steps = Growing([("RUNNING", size) for size in sizes] + [("FAILED", len(written))])
    assert run("logs", "one", "-f", "--rank", "1")[:2] == (3, written.decode(errors="replace"))
    assert run("logs", "one", "--rank", "1")[:2] == (0, written.decode(errors="replace"))
