"""Commands that run in processes of their own, and what they start."""

import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ray import cloudpickle  # noqa: F401 - which brings psutil along

# isort: split
import psutil


def without_warnings_of_no_network(errors: str) -> str:
    """What a command that joins a Ray has said, without what Ray's core says where there is no network."""
    return re.sub(r"^\[.*network_util\.cc:.*\n", "", errors, flags=re.MULTILINE)


@contextmanager
def command(*arguments: str, name: str = "train") -> Iterator[subprocess.Popen[bytes]]:
    """A ``raytorch train``, or another command, with an embedded Ray, which does not outlive the block."""
    with subprocess.Popen(
        [Path(sys.executable).with_name("raytorch"), name, *arguments],
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as running:
        try:
            yield running
        finally:
            running.kill()


def with_its_children(pid: int) -> list[psutil.Process]:
    """A process and those that it has started, and they, and so on."""
    process = psutil.Process(pid)
    return [process, *process.children(recursive=True)]


def kill_part(pid: int, name: str) -> list[psutil.Process]:
    """Kill the latest process whose name begins so of those that one has started; answers with all of them."""
    processes = with_its_children(pid)
    parts = [process for process in processes if process.name().startswith(name)]
    max(parts, key=psutil.Process.create_time).kill()
    return processes


def is_alive(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def wait_until(condition: Any, running: subprocess.Popen[bytes] | None = None) -> None:
    deadline = time.monotonic() + 300  # a machine may be slow, and its Python without byte code
    while not condition():
        assert running is None or running.poll() is None, running.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
