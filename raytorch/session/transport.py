"""The way from a client to a session's workers: Ray actors of a worker group of Ray Train."""

import contextlib
import itertools
import threading
import time
from copy import copy
from dataclasses import dataclass, replace
from typing import Any

import ray
import ray.train

from raytorch.causes import Cause
from raytorch.errors import SessionError, SessionLostError
from raytorch.session.host import BEAT_S, find_host, start_host
from raytorch.session.program import Report
from raytorch.session.stream import Future, Parts
from raytorch.session.transfer import INLINE, Payload
from raytorch.session.worker import Limits, SessionWorker, Setup, Shipped, describe_data, serve
from raytorch.temporary import temporary_folder
from raytorch.worker_group import BackgroundFit, ProcessGroupConfig, WorkerGroupTrainer

START_POLL_S = 0.05
LONGEST_CALL_S = str(7 * 24 * 3600)
"""A call may take as long as its user wants; a worker that died is seen all the same."""
CLOSE_S = 10.0
"""Seconds that workers have for ending by themselves."""
LAST_WORD_S = 8.0
"""Seconds for which a lost worker's cause is waited for."""
LAST_WORD_POLL_S = 0.1
LOOK_ROUND_S = 0.2
"""Seconds between two looks at whether others have joined, or all have left."""
SHARE_POLL_S = 0.02


class Connection:
    """What opening and joining have in common: the way to the workers' actors."""

    def __init__(self, client: int, resources: contextlib.ExitStack) -> None:
        self.client = client
        self._resources = resources
        self._host: Any = None
        self._actors: list[Any] = []
        self._sending = threading.Lock()
        self._is_shared = False
        self._lost: SessionLostError | None = None

    @property
    def world_size(self) -> int:
        """Number of workers."""
        return len(self._actors)

    def send(self, packed: bytes, attachments: list[Parts]) -> list[Future]:
        """Send a program to every worker. See :class:`raytorch.session.stream.Transport`."""
        if self._lost:
            raise copy(self._lost)
        shipped = [[_shipped(part, len(parts) == self.world_size) for part in parts] for parts in attachments]
        data = [[parts[rank % len(parts)] for parts in shipped] for rank in range(self.world_size)]
        with self._sending:
            return self._send_in_order(packed, data) if self._is_shared else self._send_directly(packed, data)

    def _send_directly(self, packed: bytes, data: list[list[Shipped]]) -> list[Future]:
        program = ray.put(packed) if len(packed) > INLINE and self.world_size > 1 else packed
        futures: list[Future] = []
        for rank, actor in enumerate(self._actors):
            futures.append(_Reply(self, rank, actor.run_program.remote(program, *itertools.chain(*data[rank]))))
        return futures

    def _send_in_order(self, packed: bytes, data: list[list[Shipped]]) -> list[Future]:
        """Send through the host, as several clients do."""
        relayed = self._host.relay.remote(self.client, packed, [describe_data(part) for part in data])
        return [_RelayedReply(self, rank, relayed) for rank in range(self.world_size)]

    def lost(self, rank: int, error: Exception) -> SessionLostError:
        """The session is lost, as a call to a worker showed."""
        patience = 0 if isinstance(error, ray.exceptions.RayTaskError) else LAST_WORD_S  # what raised has not died
        return self._lose(self._last_word(patience) or f"rank {rank}: {_brief(error)}")

    def require_peers(self) -> None:
        """Raise SessionLostError if a worker has died, as others found who wanted to communicate with it."""
        pending = {actor.look.remote(): rank for rank, actor in enumerate(self._actors)}
        deadline = time.monotonic() + LAST_WORD_S
        while pending and (answered := ray.wait([*pending], timeout=max(0.0, deadline - time.monotonic()))[0]):
            rank = pending.pop(answered[0])
            try:
                ray.get(answered)
            except ray.exceptions.RayError as error:
                raise self.lost(rank, error) from None

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

    def _lose(self, cause: str) -> SessionLostError:
        self._lost = self._lost or SessionLostError(f"the session is lost: {cause}; connect again")
        return self._lost


class _Reply:
    """The future of a worker's report."""

    def __init__(self, connection: Connection, rank: int, reference: Any) -> None:
        self._connection, self._rank, self._reference = connection, rank, reference

    def done(self) -> bool:
        """Whether the report is there."""
        return _is_there(self._reference)

    def _get(self) -> bytes | Report:
        told: bytes | Report = ray.get(self._reference)
        return told

    def result(self) -> Report:
        """The report. Raises SessionLostError."""
        try:
            told = self._get()
        except ray.exceptions.RayError as error:
            raise self._connection.lost(self._rank, error) from None
        report = told if isinstance(told, Report) else Report.unpack(told)
        if any(failure.cause is Cause.LOST_WORKER for failure in report.failures):
            self._connection.require_peers()
        return report


class _RelayedReply(_Reply):
    """The future of the report on a program that went through the host; the reference is to what the host answers."""

    def done(self) -> bool:
        return _is_there(self._reference) and (not (own := self._own()) or _is_there(own))

    def _get(self) -> bytes | Report:
        if own := self._own():
            told: bytes | Report = ray.get(own)
            return told
        raise self._connection.lost(self._rank, SessionError("this client is not known any more"))

    def _own(self) -> Any:
        references = ray.get(self._reference)
        return references and references[self._rank]


def _is_there(reference: Any) -> bool:
    return bool(ray.wait([reference], timeout=0)[0])


@dataclass(frozen=True)
class Group:
    """The workers of a session.

    Attributes:
        workers: Their number.
        each: What each of them holds, such as ``{"CPU": 1}``; its CPUs are also its threads.
        backend: Of their process group: ``nccl``, ``gloo`` or ``auto``.
        timeout_s: Seconds after which a collective operation that makes no progress fails.
    """

    workers: int
    each: dict[str, float]
    backend: str
    timeout_s: int

    @property
    def resolved_backend(self) -> str:
        """The backend that ``auto`` stands for; NCCL refuses two ranks on one GPU."""
        if self.backend != "auto":
            return self.backend
        return "nccl" if self.each.get("GPU", 0) >= 1 else "gloo"

    def trainer(self, setup: Setup, storage: str) -> WorkerGroupTrainer:
        """What starts them, to host a session."""
        return WorkerGroupTrainer(
            _serve,
            worker_class=SessionWorker,
            environment={
                "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": LONGEST_CALL_S,
                "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # by which Ray 2.55 takes what is printed from the session
            },
            train_loop_config={"setup": setup},
            backend_config=ProcessGroupConfig(self.resolved_backend, self.timeout_s),
            scaling_config=ray.train.ScalingConfig(
                num_workers=self.workers, use_gpu=bool(self.each.get("GPU")), resources_per_worker=self.each
            ),
            run_config=ray.train.RunConfig(name="session", storage_path=storage),
        )


class Owner(Connection):
    """The connection of the client that opens a session.

    Raises:
        SessionError: There is a session of that name.
        SessionLostError: The workers could not be started.
    """

    def __init__(self, name: str | None, group: Group, limits: Limits, resources: contextlib.ExitStack) -> None:
        super().__init__(0, resources)
        self._is_named = name is not None
        host = start_host(group.workers, name)
        storage = str(resources.enter_context(temporary_folder()))
        self._fit = BackgroundFit(
            group.trainer(Setup(host, limits, max(1, int(group.each["CPU"])), group.timeout_s), storage)
        )
        self._host, self._is_closing = host, False
        try:
            self._actors = self._wait_for_workers(host)
        except BaseException:
            self._fit.end()
            ray.kill(host)
            raise
        self._telling = threading.Thread(target=self._look_after_guests, name="raytorch-guests", daemon=True)
        self._telling.start()

    def _wait_for_workers(self, host: Any) -> list[Any]:
        while not self._fit.done.wait(START_POLL_S):
            if actors := ray.get(host.workers.remote()):
                return list(actors)
        raise SessionLostError(f"the session's workers could not be started: {_brief(self._fit.error)}")

    def _last_word(self, patience: float = LAST_WORD_S) -> str | None:
        if not self._fit.done.wait(patience):
            return None
        if self._is_closing:
            return "it was closed meanwhile"
        if self._fit.error is None:
            return "its workers have ended, as it was idle for longer than idle_timeout"
        failures = getattr(self._fit.error, "worker_failures", None)
        if not failures:
            return _brief(self._fit.error)
        return "; ".join(f"rank {rank}: {_brief(failure)}" for rank, failure in sorted(failures.items()))

    def _look_after_guests(self) -> None:
        with contextlib.suppress(ray.exceptions.RayError):  # the session is about to end
            while self._is_named and self.world_size > 1 and not self._fit.done.wait(LOOK_ROUND_S):
                if ray.get(self._host.has_guests.remote()) is not self._is_shared:
                    self._share(not self._is_shared)
        self._fit.done.wait()
        if not self._is_closing and (cause := self._last_word()):
            with contextlib.suppress(ray.exceptions.RayError):  # after Ray was shut down, say
                ray.get(self._host.end.remote(cause))

    def _share(self, is_shared: bool) -> None:
        """Send through the host from now on, or no longer, once the workers have done what went the other way."""
        with self._sending:
            if is_shared:
                ray.get([actor.look.remote() for actor in self._actors])
                self._is_shared = ray.get(self._host.share.remote(True))
            elif not ray.get(self._host.share.remote(False)):
                ray.get(ray.get(self._host.settle.remote()))
                self._is_shared = False

    def open(self) -> None:
        """Let others join."""
        ray.get(self._host.open.remote())

    def skip_clients(self, last: int) -> None:
        """Give no client a number up to ``last``, whose handles are restored. Raises SessionError if one has joined."""
        if not ray.get(self._host.skip_clients.remote(last)):
            raise SessionError(
                "what is restored was partly made by clients that had joined, and others have joined this session: "
                "restore before they do, with connect(restore=path)"
            )

    def close(self) -> None:
        """End the workers, and Ray if it was started for the session."""
        if self._fit.done.is_set():
            self._telling.join()
        else:
            self._is_closing = True
            for actor in self._actors:
                actor.end_session.remote()
            if not self._fit.done.wait(CLOSE_S):  # a call that was given up on, or waits for a rank that never comes
                for actor in self._actors:
                    ray.kill(actor)
                self._fit.done.wait()
        ray.kill(self._host)
        super().close()


class Guest(Connection):
    """The connection of a client that joined a session by its name."""

    def __init__(self, name: str, resources: contextlib.ExitStack) -> None:
        host = find_host(name)
        client, actors = ray.get([host.attach.remote(), host.workers.remote()])
        if not client:
            raise SessionError(f"the session named {name!r} is still starting; try again in some seconds")
        super().__init__(client, resources)
        self._host, self._actors = host, actors
        self._left = threading.Event()
        threading.Thread(target=self._beat, name="raytorch-beat", daemon=True).start()

    def _send_directly(self, packed: bytes, data: list[list[Shipped]]) -> list[Future]:
        """Send to the one worker there is; to several in order, once the client that opened the session does too."""
        if self.world_size == 1:
            return super()._send_directly(packed, data)
        try:
            while not ray.get(self._host.is_shared.remote()):
                if cause := self._last_word(patience=0):
                    raise self._lose(cause)
                time.sleep(SHARE_POLL_S)
        except ray.exceptions.RayError as error:
            raise self.lost(0, error) from None
        self._is_shared = True
        return self._send_in_order(packed, data)

    def _beat(self) -> None:
        while not self._left.wait(BEAT_S):
            try:
                is_known = ray.get(self._host.beat.remote(self.client))
            except ray.exceptions.ActorDiedError:
                is_known = False
            except ray.exceptions.RayError:  # out of reach for a while
                continue
            if not is_known and (cause := self._last_word()):
                self._lose(cause)
                return

    def _last_word(self, patience: float = LAST_WORD_S) -> str | None:
        deadline = time.monotonic() + patience
        try:
            while not (cause := ray.get(self._host.end_for.remote(self.client))) and time.monotonic() < deadline:
                time.sleep(LAST_WORD_POLL_S)
        except ray.exceptions.ActorDiedError:
            return _OWNER_GONE
        except ray.exceptions.RayError:
            return None
        return str(cause) if cause else None

    def close(self) -> None:
        """Leave the session, which goes on; what this client made is freed."""
        self._left.set()
        with contextlib.suppress(ray.exceptions.RayError):
            ray.get(self._host.leave.remote(self.client))
        super().close()


_OWNER_GONE = "the client that opened it has closed it, or is gone"


def _serve(config: dict[str, Any]) -> None:
    serve(config["setup"])


def _shipped(payload: Payload | None, has_one_receiver: bool) -> Shipped:
    """The payload as it travels: its array apart, and large ones through the object store, once for all ranks."""
    if payload is None:
        return None, None
    if payload.nbytes <= INLINE:
        return payload.with_array(None), payload.array
    return replace(payload, array=None, is_private=has_one_receiver), ray.put(payload.array)


def _brief(error: Any) -> str:
    """What there is to say of a worker's failure, without Ray's advice."""
    error = getattr(error, "health_check_failure", error)
    if isinstance(error, ray.exceptions.RayTaskError):
        return f"{type(error.cause).__name__}: {error.cause}".partition("\n")[0]
    if isinstance(error, ray.exceptions.ActorDiedError):
        return "its process died, killed or out of memory"
    return str(error).strip().partition("\n")[0]
