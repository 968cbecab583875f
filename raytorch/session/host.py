"""The actor that brings a session's clients and workers together. Imports no torch."""

import itertools
import time
from typing import Any

import ray

from raytorch.errors import SessionError

NAMESPACE = "raytorch"
BEAT_S = 5.0
"""Seconds between two signs of life of a client that joined."""
SILENCE_S = 20.0
"""Seconds of silence after which such a client counts as gone."""


class SessionHost:
    """The actor itself; see :func:`start_host`."""

    def __init__(self, workers: int) -> None:
        self._actors: dict[int, Any] = {}
        self._pids: dict[int, int] = {}
        self._workers = workers
        self._numbers = itertools.count(1)
        self._heard: dict[int, float] = {}
        self._gone: list[int] = []

    def join(self, rank: int, actor: Any, pid: int) -> None:
        """A worker is ready."""
        self._actors[rank], self._pids[rank] = actor, pid

    def workers(self) -> list[Any] | None:
        """The workers' actors by rank; None until all are ready."""
        if len(self._actors) < self._workers:
            return None
        return [self._actors[rank] for rank in range(self._workers)]

    def pids(self) -> dict[int, int]:
        """The workers' processes by rank."""
        return self._pids

    def attach(self) -> int:
        """A client joins; answers its number. The client that opened the session is 0, and not known here."""
        client = next(self._numbers)
        self._heard[client] = time.monotonic()
        return client

    def beat(self, client: int) -> None:
        """A client is alive."""
        self._heard[client] = time.monotonic()

    def leave(self, client: int) -> None:
        """A client is gone."""
        if self._heard.pop(client, None) is not None:
            self._gone.append(client)

    def gone(self) -> list[int]:
        """All clients that have gone."""
        for client, heard in list(self._heard.items()):
            if time.monotonic() - heard > SILENCE_S:
                self.leave(client)
        return self._gone


def start_host(workers: int, name: str | None) -> Any:
    """Start the actor, under the session's name if it has one; it ends with the process that starts it.

    Raises:
        SessionError: There is a session of that name.
    """
    options: dict[str, Any] = {"num_cpus": 0}
    if name:
        options |= {"name": _actor_name(name), "namespace": NAMESPACE}
    try:
        return ray.remote(SessionHost).options(**options).remote(workers)
    except ValueError:
        raise SessionError(
            f"there is a session named {name!r} already: join it with connect(name={name!r}), without workers, or "
            "choose another name"
        ) from None


def find_host(name: str) -> Any:
    """The actor of the session of that name.

    Raises:
        SessionError: There is none.
    """
    try:
        return ray.get_actor(_actor_name(name), NAMESPACE)
    except ValueError:
        raise SessionError(
            f"there is no session named {name!r} on this cluster: open it with connect(name={name!r}, workers=N)"
        ) from None


def _actor_name(name: str) -> str:
    return f"raytorch-session-{name}"
