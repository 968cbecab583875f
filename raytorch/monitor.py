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

PROGRESS_INTERVAL_S = 0.1

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


@dataclass(frozen=True)
class Status:
    """What the workers have said so far."""

    progress: dict[str, Any] | None
    """Rank 0's newest numbers; None until the workers have started."""
    evaluations: tuple[dict[str, Any], ...]
    """The outcome of each evaluation so far."""
    pids: dict[int, int]
    """The newest process of each rank there has been."""
    failures: tuple[Failure, ...]
    attempts: int
    begun_at: float
    """When the first attempt was ready to train, in seconds since 1970."""
    stopping: bool
    """Whether the workers have been asked to end."""

    @property
    def cause(self) -> Failure | None:
        """The failure that started it all: the first final one, else the first."""
        return next((failure for failure in self.failures if failure.final), next(iter(self.failures), None))


class RunMonitor:
    """The actor itself; see :func:`start_monitor`."""

    def __init__(self) -> None:
        self._progress: dict[str, Any] | None = None
        self._evaluations: list[dict[str, Any]] = []
        self._failures: list[Failure] = []
        self._pids: dict[int, int] = {}
        self._attempts = 0
        self._begun_at = 0.0
        self._stop = False

    def begin_attempt(self) -> None:
        """Rank 0 starts or restarts; what failed before is history unless it was final."""
        self._attempts += 1
        self._begun_at = self._begun_at or time.time()
        self._failures = [failure for failure in self._failures if failure.final]

    def progress(self, update: dict[str, Any]) -> bool:
        """Take rank 0's newest numbers; answers whether the run should stop."""
        self._progress = update
        return self._stop

    def joined(self, rank: int, pid: int) -> None:
        """A worker has started."""
        self._pids[rank] = pid

    def evaluated(self, outcome: dict[str, Any]) -> None:
        """Take the outcome of an evaluation."""
        self._evaluations.append(outcome)

    def failed(self, failure: Failure) -> None:
        """Take a worker's failure."""
        self._failures.append(failure)

    def request_stop(self) -> None:
        """Ask the workers to save a checkpoint and end."""
        self._stop = True

    def status(self) -> Status:
        """What the driver shows."""
        failures = tuple(sorted(self._failures, key=lambda failure: failure.time))
        evaluations = tuple(self._evaluations)
        return Status(
            self._progress, evaluations, dict(self._pids), failures, self._attempts, self._begun_at, self._stop
        )


def start_monitor() -> Any:
    """Start the actor; its handle travels to the workers with their job."""
    return ray.remote(num_cpus=0)(RunMonitor).remote()


class DriverLink:
    """Rank 0's line to the driver; never waits for it."""

    def __init__(self, monitor: Any) -> None:
        self._monitor = monitor
        self._answer: Any = None
        self._told_at = 0.0
        self._stop = False

    def tell(self, update: dict[str, Any]) -> None:
        """Pass on the run's newest numbers, several times a second at most."""
        self._read_answer()
        if self._answer is None and time.monotonic() - self._told_at >= PROGRESS_INTERVAL_S:
            self._answer = self._monitor.progress.remote(update)
            self._told_at = time.monotonic()

    def tell_evaluation(self, outcome: dict[str, Any]) -> None:
        """Pass on the outcome of an evaluation."""
        self._monitor.evaluated.remote(outcome)

    @property
    def stop_wanted(self) -> bool:
        """Whether the driver had asked for an end when it last answered."""
        self._read_answer()
        return self._stop

    def _read_answer(self) -> None:
        if self._answer is not None and ray.wait([self._answer], timeout=0)[0]:
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
