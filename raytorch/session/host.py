"""The actor that brings a session's clients and workers together, and their programs into one order.

It imports no torch. A client that is alone sends its programs to the workers itself. Where there are several, all of
them send through this actor: otherwise each worker would take the programs in an order of its own, and two collectives
could meet that do not belong together. A program that has come here reaches every worker, whatever becomes of its
client.
"""

import time
from dataclasses import dataclass
from typing import Any

import ray

from raytorch.errors import SessionError

NAMESPACE = "raytorch"
BEAT_S = 5.0
"""Seconds between two signs of life of a client that joined."""
SILENCE_S = 20.0
"""Seconds of silence after which such a client counts as gone."""
LARGE_PROGRAM = 64 * 1024
"""Bytes from which a program goes to the workers through the object store, once for all."""


@dataclass(frozen=True)
class Group:
    """The workers of a session, as :func:`raytorch.connect` describes them."""

    workers: int
    each: dict[str, float]
    """What each of them holds, such as ``{"CPU": 1}``."""
    backend: str
    timeout_s: int
    max_bytes: int | None = None
    idle_timeout: float | None = None

    @property
    def threads(self) -> int:
        """Threads of each worker."""
        return max(1, int(self.each["CPU"]))

    @property
    def resolved_backend(self) -> str:
        """The backend that ``auto`` stands for; NCCL refuses two ranks on one GPU."""
        if self.backend != "auto":
            return self.backend
        return "nccl" if self.each.get("GPU", 0) >= 1 else "gloo"


class SessionHost:
    """The actor itself; see :func:`start_host`."""

    def __init__(self, workers: int) -> None:
        self._actors: dict[int, Any] = {}
        self._workers = workers
        self._is_open = False
        self._last = 0
        self._heard: dict[int, float] = {}
        self._gone: list[int] = []
        self._is_shared = False
        self._idle: set[int] = set()
        self._is_over = False
        self._end: str | None = None

    def join(self, rank: int, actor: Any) -> None:
        """A worker is ready."""
        self._actors[rank] = actor

    def workers(self) -> list[Any] | None:
        """The workers' actors by rank; None until all are ready."""
        if len(self._actors) < self._workers:
            return None
        return [self._actors[rank] for rank in range(self._workers)]

    def open(self) -> None:
        """From now on clients may join."""
        self._is_open = True

    def skip_clients(self, last: int) -> bool:
        """Give out no number up to ``last`` any more; answers whether none was given out before."""
        is_free, self._last = not self._last, max(self._last, last)
        return is_free

    def attach(self) -> int | None:
        """A client joins; answers its number, None before the session is open. Who opened it is 0, not known here."""
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

    def has_guests(self) -> bool:
        """Tell whether clients have joined that are not gone."""
        return bool(self._heard)

    def share(self, is_shared: bool) -> bool:
        """The client that opened the session sends its programs through :meth:`relay`, or no longer; answers which.

        It must not while there are others.
        """
        self._is_shared = is_shared or bool(self._heard)
        return self._is_shared

    def is_shared(self) -> bool:
        """Tell whether clients may send programs through :meth:`relay`."""
        return self._is_shared

    def relay(self, client: int, packed: bytes, parts: list[tuple[bytes, list[Any]]]) -> list[Any] | None:
        """Send a client's program on to every worker: all of them take the programs of all clients in this one order.

        ``parts`` are what each rank's ``SessionWorker.run_relayed`` takes beside it. Answers with references to the
        reports, by rank; None if the client counts as gone.
        """
        if client and client not in self._heard:
            return None
        program = ray.put(packed) if len(packed) > LARGE_PROGRAM else packed
        return [self._actors[rank].run_relayed.remote(program, *part) for rank, part in enumerate(parts)]

    def settle(self) -> list[Any]:
        """References that are there once the workers have done what was relayed."""
        return [actor.look.remote() for actor in self._actors.values()]

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

    Raises SessionError: there is a session of that name.
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
    """The actor of the session of that name. Raises SessionError: there is none."""
    try:
        return ray.get_actor(_actor_name(name), NAMESPACE)
    except ValueError:
        raise SessionError(
            f"there is no session named {name!r} on this cluster: open it with connect(name={name!r}, workers=N)"
        ) from None


def _actor_name(name: str) -> str:
    return f"raytorch-session-{name}"
