"""Connection of a session's client: the way to its workers' actors and its host, and what becomes of it when a part
of Ray is lost."""

import contextlib
import threading
import time
from copy import copy
from dataclasses import replace
from typing import Any

import ray

from raytorch.cluster.joining import leave_ray, leaving_ray
from raytorch.cluster.ray_watch import ANSWER_POLL_S, RayWatch
from raytorch.errors import Cause, SessionError, SessionLostError
from raytorch.session.instruction_stream import Future, Parts
from raytorch.session.program import Report
from raytorch.session.tensor_transfer import INLINE, Payload
from raytorch.session.worker_session import describe_data

LAST_WORD_S = 8.0
"""Seconds for which a lost worker's cause is waited for."""


class WorkerConnection:
    """Base of opened and joined sessions' connections: the way to the workers' actors."""

    client = 0
    """The client's number."""

    def __init__(self, resources: contextlib.ExitStack) -> None:
        self._resources = resources
        self._host: Any = None
        self._actors: list[Any] = []
        self._sending = threading.Lock()
        self._is_shared = False
        self._lost: SessionLostError | None = None
        self._left = threading.Event()
        resources.callback(self._left.set)
        self._parts = resources.enter_context(RayWatch(self._lose_ray))

    @property
    def world_size(self) -> int:
        """Number of workers."""
        return len(self._actors)

    def send(self, packed: bytes, attachments: list[Parts]) -> list[Future]:
        """Send a program to every worker. See :class:`raytorch.session.instruction_stream.Transport`."""
        self._require_session()
        shipped = [[_shipped(part, len(parts) == self.world_size) for part in parts] for parts in attachments]
        data = [[part for parts in shipped for part in parts[rank % len(parts)]] for rank in range(self.world_size)]
        with self._sending:
            return self._send_in_order(packed, data) if self._is_shared else self._send_directly(packed, data)

    def _send_directly(self, packed: bytes, data: list[list[Any]]) -> list[Future]:
        program = ray.put(packed) if len(packed) > INLINE and self.world_size > 1 else packed
        return [
            _Reply(self, rank, actor.run_program.remote(program, *data[rank]))
            for rank, actor in enumerate(self._actors)
        ]

    def _send_in_order(self, packed: bytes, data: list[list[Any]]) -> list[Future]:
        """Send through the host, as several clients do."""
        relayed = self._host.relay.remote(self.client, packed, [describe_data(part) for part in data])
        return [_RelayedReply(self, rank, relayed) for rank in range(self.world_size)]

    def wait_for(self, reference: Any) -> Any:
        """Return what a call to an actor answers. Raises RayError, SessionLostError."""
        return self._parts.wait_for(reference, self._require_session)

    def _require_session(self) -> None:
        if self._lost:
            raise copy(self._lost)

    def is_there(self, reference: Any) -> bool:
        """Tell whether :meth:`wait_for` would not wait."""
        try:
            self._parts.require()
        except ray.exceptions.RayError:
            return True
        return bool(ray.wait([reference], timeout=0)[0])

    def _ask_host(self, method: str, *arguments: Any) -> Any:
        """Return what a method of the host answers. Raises RayError."""
        self._parts.require()
        return self.wait_for(getattr(self._host, method).remote(*arguments))

    def lost(self, rank: int, error: Exception) -> SessionLostError:
        """The session is lost, as a call to a worker showed."""
        try:
            self._parts.look()
        except ray.exceptions.RayError as part:
            return self._lose(str(part))
        patience = 0 if isinstance(error, ray.exceptions.RayTaskError) else LAST_WORD_S  # what raised has not died
        return self._lose(self._last_word(patience) or f"rank {rank}: {brief(error)}")

    def require_peers(self) -> None:
        """Raise SessionLostError if a worker has died, as others found who wanted to communicate with it."""
        pending = {actor.look.remote(): rank for rank, actor in enumerate(self._actors)}
        deadline = time.monotonic() + LAST_WORD_S
        while pending and not self._lost and time.monotonic() < deadline:
            for answered in ray.wait([*pending], timeout=ANSWER_POLL_S)[0]:
                rank = pending.pop(answered)
                try:
                    self.wait_for(answered)
                except ray.exceptions.RayError as error:
                    raise self.lost(rank, error) from None
        self._require_session()

    def open(self) -> None:
        """Let others join, if the session was opened here."""

    def skip_clients(self, last: int) -> None:
        """Give no client a number up to ``last``. Raises SessionError if one has joined."""

    def close(self) -> None:
        """Leave Ray, if it was joined for the session."""
        self._resources.close()

    def _last_word(self, patience: float = LAST_WORD_S) -> str | None:
        """Why the session has ended, which may take some seconds to be known; None if it is not, or has not ended."""
        raise NotImplementedError

    def _lose_ray(self, error: Exception) -> None:
        """Leave what is left of Ray, which would end this process, once those who wait have heard of it."""
        with leaving_ray:
            self._lose(str(error))
            if not self._left.wait(2 * ANSWER_POLL_S):
                self._abandon_workers()
                leave_ray()

    def _abandon_workers(self) -> None:
        """Wait for the workers no longer."""

    def _has_ray(self) -> bool:
        """Tell whether Ray is there, as it answers now."""
        try:
            self._parts.look()
        except ray.exceptions.RayError:
            return False
        return True

    def _lose(self, cause: str) -> SessionLostError:
        self._lost = self._lost or SessionLostError(f"the session is lost: {cause}; connect again")
        return self._lost


class _Reply:
    """The future of a worker's report."""

    def __init__(self, connection: WorkerConnection, rank: int, reference: Any) -> None:
        self._connection, self._rank, self._reference = connection, rank, reference

    def done(self) -> bool:
        """Tell whether the report is there."""
        return self._connection.is_there(self._reference)

    def _own(self) -> Any:
        """Where the report will be; None if this client is not known any more."""
        return self._reference

    def result(self) -> Report:
        """The report. Raises SessionLostError."""
        try:
            if not (own := self._own()):
                raise self._connection.lost(self._rank, SessionError("this client is not known any more"))
            told = self._connection.wait_for(own)
        except ray.exceptions.RayError as error:
            raise self._connection.lost(self._rank, error) from None
        report = told if isinstance(told, Report) else Report.unpack(told)
        if any(error and error.cause is Cause.LOST_WORKER for error in (*report.errors, report.failure)):
            self._connection.require_peers()
        return report


class _RelayedReply(_Reply):
    """The future of the report on a program that went through the host; the reference is to what the host answers."""

    def done(self) -> bool:
        is_there = self._connection.is_there
        return is_there(self._reference) and (not (own := self._own()) or is_there(own))

    def _own(self) -> Any:
        references = self._connection.wait_for(self._reference)
        return references and references[self._rank]


def _shipped(payload: Payload | None, has_one_receiver: bool) -> tuple[Payload | None, Any]:
    """The payload as it travels: its array apart, and large ones through the object store, once for all ranks."""
    if payload is None:
        return None, None
    if payload.nbytes <= INLINE:
        return replace(payload, array=None), payload.array
    return replace(payload, array=None, is_private=has_one_receiver), ray.put(payload.array)


def brief(error: Any) -> str:
    """Say what there is to say of a worker's failure, without Ray's advice."""
    error = getattr(error, "health_check_failure", error)
    if isinstance(error, ray.exceptions.RayTaskError):
        return f"{type(error.cause).__name__}: {error.cause}".partition("\n")[0]
    if isinstance(error, ray.exceptions.ActorDiedError):
        return "its process died, killed or out of memory"
    return str(error).strip().partition("\n")[0]
