"""What tests of sessions on a real Ray share: waiting, and a client in a process of its own."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

GUEST = """
import sys
import raytorch
with raytorch.connect(name=sys.argv[1]) as session:
    sys.stdin.readline()
    theirs = session.get(int(sys.argv[2]))
    mine = theirs * 10
    theirs += 1
    print(session.workers, mine.fetch(all=True)[1].tolist(), flush=True)
    sys.stdin.read()
"""


def wait_until(condition: Callable[[], bool], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.05)


@contextmanager
def guest(cluster: str, name: str, handle: int) -> Iterator[subprocess.Popen[str]]:
    """A process that joins a session, works with a handle when it is told to, and stays until its input ends."""
    command = [sys.executable, "-c", GUEST, name, str(handle)]
    environment = os.environ | {"RAY_ADDRESS": cluster}
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=environment, text=True, stdin=pipe, stdout=pipe, stderr=pipe) as process:
        try:
            yield process
        finally:
            process.kill()


def told_to_work(process: subprocess.Popen[str]) -> str:
    assert process.stdin
    assert process.stdout
    process.stdin.write("\n")
    process.stdin.flush()
    return process.stdout.readline()
