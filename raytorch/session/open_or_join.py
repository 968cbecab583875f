"""Opening a session on workers, Ray actors of a worker group of Ray Train, and joining one by its name."""

import contextlib
import threading
import time
from typing import Any

import ray
import ray.train

from raytorch.cluster.worker_group import BackgroundFit, ProcessGroupConfig, WorkerGroupTrainer
from raytorch.errors import SessionError, SessionLostError
from raytorch.session.host import BEAT_S, Group, find_host, start_host
from raytorch.session.instruction_stream import Future
from raytorch.session.worker_actor import SessionWorker
from raytorch.session.worker_connection import LAST_WORD_S, WorkerConnection, brief
from raytorch.session.worker_session import serve
from raytorch.system.temporary_folders import temporary_folder

START_POLL_S = 0.05
LONGEST_CALL_S = str(7 * 24 * 3600)
"""A call may take as long as its user wants; a worker that died is seen all the same."""
CLOSE_S = 10.0
"""Seconds that workers have for ending by themselves."""
LOST_CLOSE_S = 1.0
"""The same where the session is lost, and nobody will hear what they still do."""
LAST_WORD_POLL_S = 0.1
LOOK_ROUND_S = 0.2
"""Seconds between two looks at whether others have joined, or all have left."""
HOST_ROUND_S = 2.0
"""Seconds between two looks at whether the host is there, where none is needed at others."""
SHARE_POLL_S = 0.02


class Owner(WorkerConnection):
    """The connection of the client that opens a session. Raises SessionError, SessionLostError as ``connect`` does."""

    def __init__(self, name: str | None, group: Group, resources: contextlib.ExitStack) -> None:
        super().__init__(resources)
        self._is_named = name is not None
        host = start_host(group.workers, name)
        storage = str(resources.enter_context(temporary_folder()))
        self._fit = BackgroundFit(_trainer(group, host, storage))
        self._host, self._is_closing = host, False
        try:
            self._actors = self._wait_for_workers()
        except BaseException:
            if self._has_ray():
                self._fit.end()
                ray.kill(host)
            raise
        self._telling = threading.Thread(target=self._look_after_host, name="raytorch-host", daemon=True)
        self._telling.start()

    def _wait_for_workers(self) -> list[Any]:
        while not self._fit.done.wait(START_POLL_S):
            try:
                if actors := self._ask_host("workers"):
                    return list(actors)
            except ray.exceptions.RayError as error:
                raise self.lost(0, error) from None
        raise SessionLostError(f"the session's workers could not be started: {brief(self._fit.error)}")

    def _abandon_workers(self) -> None:
        self._fit.abandon()

    def _last_word(self, patience: float = LAST_WORD_S) -> str | None:
        if not self._fit.done.wait(patience):
            return None
        if self._is_closing:
            return "it was closed meanwhile"
        if self._has_lost_host():
            return _HOST_LOST
        error = self._fit.error
        if error is None:
            return "its workers have ended, as it was idle for longer than idle_timeout"
        if failures := getattr(error, "worker_failures", None):
            return "; ".join(f"rank {rank}: {brief(failure)}" for rank, failure in sorted(failures.items()))
        is_lost = isinstance(error, ray.exceptions.ActorDiedError)
        return "its controller died, killed or crashed" if is_lost else brief(error)

    def _has_lost_host(self) -> bool:
        try:
            self._ask_host("has_guests")
        except ray.exceptions.ActorDiedError:
            return True
        except (ray.exceptions.RayError, SessionLostError):
            return False
        return False

    def _look_after_host(self) -> None:
        try:
            self._share_with_guests()
        except ray.exceptions.ActorDiedError:
            if not self._is_closing and self._has_lost_host():  # which workers that are busy do not see
                self._lose(_HOST_LOST)
        except (ray.exceptions.RayError, SessionLostError):
            pass  # the session is about to end
        self._fit.done.wait()
        if not self._is_closing and (cause := self._last_word()):
            with contextlib.suppress(ray.exceptions.RayError, SessionLostError):  # after Ray was shut down, say
                self._ask_host("end", cause)

    def _share_with_guests(self) -> None:
        is_sharable = self._is_named and self.world_size > 1
        while not self._fit.done.wait(LOOK_ROUND_S if is_sharable else HOST_ROUND_S):
            has_guests = self._ask_host("has_guests")
            if is_sharable and has_guests is not self._is_shared:
                self._share(not self._is_shared)

    def _share(self, is_shared: bool) -> None:
        """Send through the host from now on, or no longer, once the workers have done what went the other way."""
        with self._sending:
            if is_shared:
                self.wait_for([actor.look.remote() for actor in self._actors])
                self._is_shared = self._ask_host("share", True)
            elif not self._ask_host("share", False):
                self.wait_for(self._ask_host("settle"))
                self._is_shared = False

    def open(self) -> None:
        """Let others join."""
        self._ask_host("open")

    def skip_clients(self, last: int) -> None:
        """Give no client a number up to ``last``, whose handles are restored. Raises SessionError if one has joined."""
        if not self._ask_host("skip_clients", last):
            raise SessionError(
                "what is restored was partly made by clients that had joined, and others have joined this session: "
                "restore before they do, with connect(restore=path)"
            )

    def close(self) -> None:
        """End the workers, and Ray if it was started for the session."""
        if self._has_ray():
            self._end()
        super().close()

    def _end(self) -> None:
        if self._fit.done.is_set():
            self._telling.join()
            self._fit.end()  # a controller that was killed has left what it held
        else:
            self._is_closing = True
            for actor in self._actors:
                actor.end_session.remote()
            patience = LOST_CLOSE_S if self._lost else CLOSE_S
            if not self._fit.done.wait(patience):  # a call that was given up on, or waits for a rank that never comes
                for actor in self._actors:
                    ray.kill(actor)
                self._fit.done.wait()
        ray.kill(self._host)


class Guest(WorkerConnection):
    """The connection of a client that joined a session by its name."""

    def __init__(self, name: str, resources: contextlib.ExitStack) -> None:
        super().__init__(resources)
        self._host = find_host(name)
        try:
            self.client, self._actors = self._ask_host("attach"), self._ask_host("workers")
        except ray.exceptions.RayError as error:
            raise self.lost(0, error) from None
        if not self.client:
            raise SessionError(f"the session named {name!r} is still starting; try again in some seconds")
        threading.Thread(target=self._beat, name="raytorch-beat", daemon=True).start()

    def _send_directly(self, packed: bytes, data: list[list[Any]]) -> list[Future]:
        """Send to the one worker there is; to several in order, once the client that opened the session does too."""
        if self.world_size == 1:
            return super()._send_directly(packed, data)
        try:
            while not self._ask_host("is_shared"):
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
                is_known = self._ask_host("beat", self.client)
                cause = None if is_known else self._last_word()
            except ray.exceptions.ActorDiedError:
                cause = _OWNER_GONE
            except ray.exceptions.RayError:  # out of reach for a while
                continue
            except SessionLostError:
                return
            if cause:
                self._lose(cause)
                return

    def _last_word(self, patience: float = LAST_WORD_S) -> str | None:
        deadline = time.monotonic() + patience
        try:
            while not (cause := self._ask_host("end_for", self.client)) and time.monotonic() < deadline:
                time.sleep(LAST_WORD_POLL_S)
        except ray.exceptions.ActorDiedError:
            return _OWNER_GONE
        except ray.exceptions.RayError:
            return None
        return str(cause) if cause else None

    def close(self) -> None:
        """Leave the session, which goes on; what this client made is freed."""
        self._left.set()
        with contextlib.suppress(ray.exceptions.RayError, SessionLostError):
            self._ask_host("leave", self.client)
        super().close()


def _trainer(group: Group, host: Any, storage: str) -> WorkerGroupTrainer:
    """The trainer that starts the workers, to host a session."""
    return WorkerGroupTrainer(
        serve,
        worker_class=SessionWorker,
        environment={
            "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": LONGEST_CALL_S,
            "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # by which Ray 2.55 takes what is printed from the session
        },
        train_loop_config={"group": group, "host": host},
        backend_config=ProcessGroupConfig(group.resolved_backend, group.timeout_s),
        scaling_config=ray.train.ScalingConfig(
            num_workers=group.workers, use_gpu=bool(group.each.get("GPU")), resources_per_worker=group.each
        ),
        run_config=ray.train.RunConfig(name="session", storage_path=storage),
    )


_HOST_LOST = "its host, the actor that brings clients and workers together, died, killed or crashed"
_OWNER_GONE = "the client that opened it has closed it, or is gone"
