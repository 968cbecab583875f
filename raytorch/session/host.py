"""The actor that brings a session's clients and workers together. Imports no torch."""

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
        self._is_open = False
        self._last = 0
        self._heard: dict[int, float] = {}
        self._gone: list[int] = []
        self._idle: set[int] = set()
        self._is_over = False
        self._end: str | None = None

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

    def open(self) -> None:
        """From now on clients may join."""
        self._is_open = True

    def skip_clients(self, last: int) -> bool:
        """Give out no number up to ``last`` any more; answers whether none was given out before."""
        is_free, self._last = not self._last, max(self._last, last)
        return is_free

    def attach(self) -> int | None:
        """A client joins; answers its number, None before the session is open.

        The client that opened the session is 0, and not known here.
        """
        if not self._is_open:
            return None
        self._last += 1
        self._heard[self._last] = time.monotonic()
        return self._last

    def beat(self, client: int) -> bool:
        """A client is alive; answers whether it still counts as one."""
        if is_known := client in self._heard:
            self._heard[client] = time.monotonic()
        return is_known

    def leave(self, client: int) -> None:
        """A client is gone."""
        if self._heard.pop(client, None) is not None:
            self._gone.append(client)

    def look(self, rank: int, is_idle: bool) -> tuple[list[int], bool]:
        """A worker looks round: answers with all clients that have gone, and whether it is to end."""
        for client, heard in list(self._heard.items()):
            if time.monotonic() - heard > SILENCE_S:
                self.leave(client)
        self._idle = self._idle | {rank} if is_idle else self._idle - {rank}
        self._is_over = self._is_over or len(self._idle) == self._workers  # for all of them, once for one
        return self._gone, self._is_over

    def end(self, cause: str) -> None:
        """The session has ended."""
        self._end = cause

    def end_for(self, client: int) -> str | None:
        """Why the session has ended for a client that had joined; None if it has not."""
        if self._end is None and client not in self._heard:
            return f"this process gave no sign of life for {SILENCE_S:.0f} s, and what it had made was freed"
        return self._end


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
