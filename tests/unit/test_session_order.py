"""The programs of several clients of one session: every worker takes them in the same order."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from random import Random
from threading import Lock
from types import SimpleNamespace
from typing import Any

import pytest

from raytorch.session import open_or_join, worker_connection
from raytorch.session.host import SessionHost
from raytorch.session.open_or_join import Guest

PROGRAMS = 100


class Actor:
    """An actor of this process, which like Ray's executes one call after the other and answers at once."""

    def __init__(self, served: Any) -> None:
        self._served, self._turn = served, Lock()

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=lambda *arguments: self._call(getattr(self._served, name), *arguments))

    def _call(self, method: Callable[..., Any], *arguments: Any) -> Any:
        with self._turn:
            return method(*arguments)


class Worker:
    """Keeps the programs that it is given; some take a while to come."""

    def __init__(self, rank: int) -> None:
        self.programs: list[bytes] = []
        self._random = Random(rank)

    def run_program(self, program: bytes, *data: Any) -> None:
        time.sleep(self._random.random() / 500)
        self.programs.append(program)

    def run_relayed(self, program: bytes, described: bytes, references: list[Any]) -> None:
        self.run_program(program)


class Unwatched:
    """What a connection has for a watch where Ray is not there."""

    def __init__(self, tell: Any) -> None:
        pass

    def __enter__(self) -> "Unwatched":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def require(self) -> None:
        pass

    def wait_for(self, reference: Any, meanwhile: Any) -> Any:
        return reference


@pytest.fixture
def workers() -> list[Worker]:
    return [Worker(rank) for rank in range(2)]


@pytest.fixture
def host(workers: list[Worker], monkeypatch: pytest.MonkeyPatch) -> SessionHost:
    """The host of a session that is open."""
    host = SessionHost(len(workers))
    for rank, worker in enumerate(workers):
        host.join(rank, Actor(worker))
    host.open()
    actor = Actor(host)
    monkeypatch.setattr(open_or_join, "find_host", lambda name: actor)
    monkeypatch.setattr(worker_connection, "RayWatch", Unwatched)
    return host


@pytest.fixture
def clients(host: SessionHost) -> Iterator[list[Guest]]:
    with ExitStack() as leaving:
        clients = [Guest("shared", ExitStack()) for _ in range(3)]
        for client in clients:
            leaving.callback(client.close)
        yield clients


def send_all(client: Guest) -> None:
    for number in range(PROGRAMS):
        client.send(f"{number} of {client.client}".encode(), [])


def test_all_workers_take_the_programs_of_all_clients_in_one_order(
    host: SessionHost, clients: list[Guest], workers: list[Worker]
) -> None:
    host.share(True)
    with ThreadPoolExecutor() as threads:
        list(threads.map(send_all, clients))
    first, second = (worker.programs for worker in workers)
    assert first == second
    for client in clients:
        own = [program for program in first if program.endswith(f" of {client.client}".encode())]
        assert own == [f"{number} of {client.client}".encode() for number in range(PROGRAMS)]


def test_a_client_that_has_joined_sends_nothing_before_the_one_that_opened_the_session_shares_it(
    host: SessionHost, clients: list[Guest], workers: list[Worker]
) -> None:
    with ThreadPoolExecutor() as threads:
        sent = threads.submit(clients[0].send, b"early", [])
        time.sleep(0.2)
        assert not sent.done()
        assert [worker.programs for worker in workers] == [[], []]
        host.share(True)
        sent.result(60)
    assert [worker.programs for worker in workers] == [[b"early"], [b"early"]]
