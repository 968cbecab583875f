"""A cluster that jobs are sent to: a head without CPUs and two nodes of one CPU each, with a token and a dashboard."""

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import command_line
import pytest

BIN = Path(sys.executable).parent
TESTS = Path(__file__).resolve().parent
QUICKSTART = TESTS.parent / "configs" / "quickstart.yaml"
SECRET = "f4fb3fcf-a-secret"
JOBS = int(os.environ.get("RAYTORCH_TEST_JOBS", "3"))
"""Jobs that are sent at once; the suite is content with few."""


@dataclass(frozen=True)
class Cluster:
    url: str
    """Of its dashboard."""
    head: str
    """Host and port of its head, which drivers join."""
    process: subprocess.Popen[str]
    temp: Path
    """Where its sessions, with all logs, are."""
    home: Path
    """The folder that jobs are sent from."""

    def shut_down(self) -> None:
        if self.process.poll() is None:
            assert self.process.stdin
            self.process.stdin.close()
            self.process.wait(60)


@contextmanager
def running_cluster(home: Path, environment: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """Run the cluster; this process gets its token and goes to ``home``."""
    (home / "token").write_text("0123456789abcdef" * 4, encoding="utf-8")
    temp = Path(tempfile.mkdtemp(prefix="rt-", dir="/tmp"))  # paths of sockets have to be short
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_TOKEN"):
        environment.delenv(name, raising=False)
    environment.setenv("RAY_AUTH_TOKEN_PATH", str(home / "token"))
    environment.setenv("HOME", str(home))  # Ray Train's own storage is in there
    environment.setenv("PYTHONIOENCODING", "utf-8")
    environment.chdir(home)
    process = subprocess.Popen(
        [sys.executable, str(TESTS / "nodes.py"), str(temp), str(port), "0", "1", "1"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"RAY_AUTH_MODE": "token", "PATH": f"{BIN}:{os.environ['PATH']}", "PYTHONPATH": ""},
    )
    assert process.stdout
    dashboard, head = process.stdout.readline().split()
    assert dashboard == f"127.0.0.1:{port}"
    there = Cluster(f"http://127.0.0.1:{port}", head, process, temp, home)
    yield there
    there.shut_down()
    process.stdout.close()
    subprocess.run(["rm", "-rf", str(temp)], check=True)


def raytorch(cluster: Cluster, *arguments: str, at: Path | None = None) -> "subprocess.CompletedProcess[str]":
    """Run a command in this process."""
    with patch.dict(os.environ, {"RAY_API_SERVER_ADDRESS": cluster.url}):
        return command_line.raytorch(at or cluster.home, *arguments)


def raytorch_of_its_own(
    cluster: Cluster, *arguments: str, at: Path | None = None
) -> "subprocess.CompletedProcess[str]":
    """Run a command as a person does, in a process of its own, of which all that it writes is told."""
    environment = os.environ | {"RAY_API_SERVER_ADDRESS": cluster.url}
    command = [str(BIN / "raytorch"), *arguments]
    return subprocess.run(
        command, capture_output=True, encoding="utf-8", cwd=at or cluster.home, env=environment, check=False
    )


def wait_until(condition: Callable[[], Any], what: str) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen"
        time.sleep(0.2)
