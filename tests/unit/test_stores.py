"""Stores that are reached over a network and do not answer, or have no such bucket."""

import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from raytorch.errors import RunNotFoundError, StorageError, UserError
from raytorch.runs import remote_folder
from raytorch.runs.catalog import find_run, list_runs
from raytorch.runs.storage import RunFolder

COMMAND = Path(sys.executable).with_name("raytorch")
SLACK_S = 8
"""Far less than any client waits of its own accord for a store that is silent, more than a busy machine needs."""


class Silent:
    """A server that takes connections and never answers."""

    def __init__(self) -> None:
        self._socket = socket.create_server(("127.0.0.1", 0))
        self._taken: list[socket.socket] = []
        self.asked = threading.Event()
        threading.Thread(target=self._take, daemon=True).start()

    def _take(self) -> None:
        while True:
            try:
                self._taken.append(self._socket.accept()[0])
            except OSError:
                return
            self.asked.set()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self._socket.getsockname()[1]}"

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        for each in [self._socket, *self._taken]:
            each.close()


@pytest.fixture
def silent() -> Iterator[Silent]:
    server = Silent()
    yield server
    server.close()


def google(address: str) -> str:
    return f"gs://anonymous@bucket/runs?endpoint_override={address}&scheme=http"


def amazon(address: str) -> str:
    return f"s3://key:key@bucket/runs?endpoint_override={address}&scheme=http&region=eu"


@pytest.mark.parametrize("store", [google, amazon])
@pytest.mark.parametrize(
    "call",
    [
        list_runs,
        lambda storage: find_run("mine", storage),
        lambda storage: RunFolder(storage, "mine").write_text("summary.json", "{}"),
        lambda storage: RunFolder(storage, "mine").delete("summary.json"),
        lambda storage: RunFolder(storage, "mine").claimed().__enter__(),
    ],
)
def test_a_store_that_does_not_answer_is_told_in_time(
    silent: Silent, store: Callable[[str], str], call: Callable[[str], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_folder, "ANSWER_S", 0.2)
    began = time.monotonic()
    with pytest.raises(
        StorageError, match=r"did not answer within 0.2 s; is the address right, and the network there\?"
    ):
        call(store(silent.address))
    assert time.monotonic() - began < SLACK_S


@pytest.mark.parametrize("store", [google, amazon])
def test_ctrl_c_ends_a_command_that_waits_for_a_store(silent: Silent, store: Callable[[str], str]) -> None:
    code = "import raytorch.runs.remote_folder as r; r.ANSWER_S = 600.0; import raytorch.cli.main as m; m.main()"
    command = [sys.executable, "-c", code, "runs", "--storage", store(silent.address)]
    with subprocess.Popen(command) as process:
        try:
            assert silent.asked.wait(60)
            process.send_signal(signal.SIGINT)
            process.wait(SLACK_S)
        finally:
            process.kill()
    assert process.returncode == 130


# -- buckets -----------------------------------------------------------------------------------------------------------


class _S3(BaseHTTPRequestHandler):
    """As much of S3 as is asked of a bucket without objects, or of one that is not there."""

    buckets: frozenset[str]

    def do_HEAD(self) -> None:
        bucket, _, key = self.path.partition("?")[0].strip("/").partition("/")
        self._answer(200 if bucket in self.buckets and not key else 404, b"")

    def do_GET(self) -> None:
        bucket = self.path.partition("?")[0].strip("/").partition("/")[0]
        if bucket in self.buckets:
            self._answer(
                200, b"<ListBucketResult><KeyCount>0</KeyCount><IsTruncated>false</IsTruncated></ListBucketResult>"
            )
        else:
            self._answer(404, b"<Error><Code>NoSuchBucket</Code><Message>no such bucket</Message></Error>")

    def _answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def s3(*buckets: str) -> Iterator[Callable[[str], str]]:
    """Makes addresses in an S3 that has these buckets."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("S3", (_S3,), {"buckets": frozenset(buckets)}))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        endpoint = f"endpoint_override=127.0.0.1:{server.server_port}&scheme=http&region=eu"
        yield lambda place: f"s3://key:key@{place}?{endpoint}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.parametrize("place", ["typo/runs", "typo"])
def test_a_bucket_that_is_not_there_is_told(place: str) -> None:
    with s3("bucket") as address:
        calls: list[Callable[[], object]] = [
            lambda: list_runs(address(place)),
            lambda: find_run("mine", address(place)),
            lambda: RunFolder(address(place), "mine").claimed().__enter__(),
        ]
        for call in calls:
            with pytest.raises(UserError, match="there is no bucket typo; correct the address, or make the bucket"):
                call()


def test_a_bucket_without_runs_has_none_to_list() -> None:
    with s3("bucket") as address:
        assert list_runs(address("bucket/runs")) == []
        with pytest.raises(RunNotFoundError, match="no run mine in "):
            find_run("mine", address("bucket/runs"))


def test_a_folder_that_is_not_there_is_said(tmp_path: Path) -> None:
    told = subprocess.run(
        [COMMAND, "runs", "--storage", tmp_path / "typo"], capture_output=True, text=True, check=True
    ).stdout
    assert told == f"no runs in {tmp_path}/typo: there is no such folder\n"
