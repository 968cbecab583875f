"""The actor through which a run's workers tell its driver their progress, and the driver asks them to stop."""

import logging
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import ray
import ray.train

from raytorch.errors import RaytorchError, UserError

PROGRESS_INTERVAL_S = 0.5
ANSWER_WAIT_S = 0.1
"""Longest wait for the driver's answer, which takes about a millisecond."""

logger = logging.getLogger("raytorch")


@dataclass(frozen=True)
class Failure:
    """An exception that one worker raised."""

    rank: int
    kind: str
    """Name of the exception's class."""
    message: str
    traceback: str
    """The worker's own traceback, without Ray's frames."""
    final: bool
    """Whether a restart would meet it again; false for lost peers."""
    expected: bool
    """Whether it is one of raytorch's own errors, whose message alone tells what to do."""
    user_error: bool
    """Whether the input has to change."""
    time: float = field(default_factory=time.time)
    """Seconds since 1970."""


@dataclass
class Status:
    """What the workers have said so far."""

    progress: dict[str, Any] | None = None
    """Rank 0's newest numbers; None until the workers have started."""
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    """The outcome of each evaluation."""
    outcome: dict[str, Any] | None = None
    """What the run came to; None until it has ended well."""
    pids: dict[int, int] = field(default_factory=dict)
    """The newest process of each rank there has been."""
    failures: list[Failure] = field(default_factory=list)
    """The newest attempt's failures, and earlier ones that were final."""
    attempts: int = 0
    begun_at: float | None = None
    """When the first attempt was ready to train, in seconds since 1970."""
    stopping: bool = False
    """Whether the workers have been asked to end."""

    @property
    def cause(self) -> Failure | None:
        """The failure that started it all: the first final one, else the first."""
        return min(self.failures, key=lambda failure: (not failure.final, failure.time), default=None)


class RunMonitor:
    """The actor itself; see :func:`start_monitor`."""

    def __init__(self) -> None:
        self._status = Status()

    def status(self) -> Status:
        """All of it."""
        return self._status

    def begin_attempt(self) -> None:
        """Rank 0 starts or restarts; what failed before is history unless it was final."""
        self._status.attempts += 1
        self._status.begun_at = self._status.begun_at or time.time()
        self._status.failures = [failure for failure in self._status.failures if failure.final]

    def joined(self, rank: int, pid: int) -> None:
        """A worker has started."""
        self._status.pids[rank] = pid

    def progress(self, update: dict[str, Any]) -> bool:
        """Take rank 0's newest numbers; answers whether the run should stop."""
        self._status.progress = update
        return self._status.stopping

    def evaluated(self, outcome: dict[str, Any]) -> None:
        """Take the outcome of an evaluation."""
        self._status.evaluations.append(outcome)

    def ended(self, outcome: dict[str, Any]) -> None:
        """Take what the run came to."""
        self._status.outcome = outcome

    def failed(self, failure: Failure) -> None:
        """Take a worker's failure."""
        self._status.failures.append(failure)

    def request_stop(self) -> None:
        """Ask the workers to save a checkpoint and end."""
        self._status.stopping = True


def start_monitor() -> Any:
    """Start the actor; its handle travels to the workers with their job."""
    return ray.remote(num_cpus=0)(RunMonitor).remote()


class DriverLink:
    """Rank 0's line to the driver; never waits long for it."""

    def __init__(self, monitor: Any) -> None:
        self._monitor = monitor
        self._news: dict[str, Any] = {}
        self._answer: Any = None
        self._told_at = 0.0
        self._stop = False

    def tell(self, update: dict[str, Any]) -> None:
        """Pass on the run's newest numbers, together with earlier ones, several times a second at most."""
        self._news |= update
        self._read_answer()
        if self._answer is None and time.monotonic() - self._told_at >= PROGRESS_INTERVAL_S:
            self._answer = self._monitor.progress.remote(self._news)
            self._told_at = time.monotonic()

    def tell_evaluation(self, outcome: dict[str, Any]) -> None:
        """Pass on the outcome of an evaluation."""
        self._monitor.evaluated.remote(outcome)

    @property
    def stop_wanted(self) -> bool:
        """Whether the driver has asked for an end; the answer to the newest progress is waited for."""
        self._read_answer(ANSWER_WAIT_S)
        return self._stop

    def _read_answer(self, timeout: float = 0) -> None:
        if self._answer is not None and ray.wait([self._answer], timeout=timeout)[0]:
            self._stop, self._answer = self._stop or ray.get(self._answer), None


@contextmanager
def telling_failures(monitor: Any, rank: int, is_lost_peer: Callable[[BaseException], bool]) -> Iterator[None]:
    """Pass an exception in the block on to the driver, and log it, before it is raised further.

    Args:
        monitor: Handle of the run's monitor.
        rank: The worker's rank.
        is_lost_peer: Tells the failures that a restart may get over.
    """
    try:
        yield
    except Exception as error:
        text = _own_traceback(error)
        logger.error("rank %d failed\n%s", rank, text)  # noqa: TRY400 - without Ray's frames
        failure = Failure(
            rank=rank,
            kind=type(error).__name__,
            message=str(error),
            traceback=text,
            final=not is_lost_peer(error),
            expected=isinstance(error, RaytorchError),
            user_error=isinstance(error, UserError),
        )
        ray.get(monitor.failed.remote(failure))
        raise


def _own_traceback(error: BaseException) -> str:
    """The traceback from the first frame below Ray's and this module's."""
    summary = traceback.TracebackException.from_exception(error)
    summary.stack = traceback.StackSummary.from_list([frame for frame in summary.stack if frame.filename != __file__])
    return "".join(summary.format()).rstrip()


class StopOnFinalFailure(ray.train.UserCallback):
    """Keeps Ray Train from restarting a run whose failure a restart would only meet again."""

    def __init__(self, monitor: Any) -> None:
        self._monitor = monitor

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Called by the controller, which does not retry after an exception from a callback."""
        cause = ray.get(self._monitor.status.remote()).cause
        if cause and cause.final:
            raise RuntimeError(f"rank {cause.rank} raised {cause.kind}: {cause.message}")
