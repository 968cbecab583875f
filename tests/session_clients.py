"""What tests of sessions on a real Ray share: waiting, and a client in a process of its own."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

from forked import CONTEXT

import raytorch

Work = Callable[..., Any]
"""What a guest does when it is asked: takes the session and what it is asked, and answers."""


def wait_until(condition: Callable[[], bool], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.05)


@dataclass
class Guest:
    """A process that has joined a session, and works when it is asked to."""

    process: BaseProcess
    pipe: Connection

    def ask(self, *question: Any) -> None:
        self.pipe.send(question)

    def answer(self, timeout_s: float = 60) -> Any:
        assert self.pipe.poll(timeout_s)
        return self.pipe.recv()

    def kill(self) -> None:
        self.process.kill()
        self.process.join()

    def leave(self) -> None:
        self.pipe.send(None)
        self.process.join(60)
        assert self.process.exitcode == 0


@contextmanager
def guest(cluster: str, name: str, work: Work) -> Iterator[Guest]:
    """Have a process join the session of this name, and leave it at the end of the block."""
    ours, theirs = CONTEXT.Pipe()
    environment = os.environ | {"RAY_ADDRESS": cluster}
    process = CONTEXT.Process(target=_join, args=(dict(environment), name, work, theirs))
    process.start()
    theirs.close()
    there = Guest(process, ours)
    try:
        assert there.answer() == "joined"
        yield there
        if process.is_alive():
            there.leave()
    finally:
        there.kill()
        ours.close()


def _join(environment: dict[str, str], name: str, work: Work, pipe: Connection) -> None:
    os.environ.update(environment)
    with raytorch.connect(name=name) as session:
        pipe.send("joined")
        while (question := pipe.recv()) is not None:
            pipe.send(work(session, *question))
