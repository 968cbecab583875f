"""The actor through which a run's workers tell its driver their progress, and the driver asks them to stop."""

import logging
import sysconfig
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path, PurePath
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

import raytorch
from raytorch.errors import Cause, RaytorchError, UserError, message_of
from raytorch.runs.skipped_list import SkippedSample
from raytorch.runs.status import Evaluation, MonitorHandle, RunStatus, WorkerFailure
from raytorch.system.safe_text import cut, escaped_line
from raytorch.training.stopping import DriverRequest

PROGRESS_INTERVAL_S = 0.5
ANSWER_WAIT_S = 0.1
"""Longest wait for the driver's answer, which takes about a millisecond."""

logger = logging.getLogger("raytorch")
_TOLD = "_raytorch_told"


class RunMonitor:
    """The actor itself; see :func:`start_on_this_node`."""

    def __init__(self) -> None:
        self._status = RunStatus()
        self._skipped: dict[tuple[str, int], SkippedSample] = {}
        self._save_wanted = False
        self._saved = False

    def status(self) -> RunStatus:
        """All of it."""
        return self._status

    def begin_attempt(self) -> None:
        """Rank 0 starts or restarts; what failed before is history unless it was final."""
        self._status.attempts += 1
        self._status.begun_at = self._status.begun_at or time.time()
        self._status.failures = [failure for failure in self._status.failures if failure.cause.is_final]

    def joined(self, rank: int, world_size: int, pid: int, node: str) -> None:
        """A worker has started."""
        self._status.pids[rank] = pid
        nodes = self._status.nodes | {rank: node}
        self._status.nodes = {rank: node for rank, node in nodes.items() if rank < world_size}

    def progress(self, update: dict[str, Any]) -> DriverRequest:
        """Take rank 0's newest numbers; answers what the workers should do, a request to save once."""
        self._status.progress = update
        save, self._save_wanted = self._save_wanted, False
        return DriverRequest.STOP if self._status.stopping else DriverRequest.SAVE if save else DriverRequest.CONTINUE

    def evaluated(self, evaluation: Evaluation) -> None:
        """Take an evaluation."""
        self._status.evaluations.append(evaluation)

    def skipped(self, samples: Sequence[SkippedSample]) -> int:
        """Take samples that could not be read, of which some may be known; answers how many there are."""
        for sample in samples:
            self._skipped.setdefault(sample[:2], sample)
        self._status.skipped = len(self._skipped)
        return self._status.skipped

    def skipped_after(self, number: int) -> list[SkippedSample]:
        """Those behind the first ``number``, in the order in which they were told."""
        return list(self._skipped.values())[number:]

    def ended(self, outcome: dict[str, Any]) -> None:
        """Take what the run came to."""
        self._status.outcome = outcome

    def failed(self, failure: WorkerFailure) -> None:
        """Take a worker's failure."""
        self._status.failures.append(failure)

    def request_stop(self) -> None:
        """Ask the workers to save a checkpoint and end."""
        self._status.stopping = True

    def request_save(self) -> None:
        """Ask the workers to save a checkpoint and go on."""
        self._save_wanted, self._saved = True, False

    def saved(self) -> None:
        """A checkpoint is complete in the run's folder."""
        self._saved = True

    def is_saved(self) -> bool:
        """Tell whether one has become so since the workers were asked for it."""
        return self._saved

    def resizing(self) -> None:
        """Another number of workers takes over, which have nothing new to save."""
        self._save_wanted = False
        self._status.resizes += 1


def start_on_this_node(kind: type) -> Any:
    """Start an actor on the driver's node, as Ray Train does its controller: one node less that cannot be spared."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(num_cpus=0, scheduling_strategy=here)(kind).remote()


class DriverLink:
    """Rank 0's line to the driver, which never waits long for it; the other ranks' carries nothing."""

    def __init__(self, monitor: MonitorHandle, rank: int) -> None:
        self._monitor, self._is_used = monitor, rank == 0
        self._news: dict[str, Any] = {}
        self._answer: Any = None
        self._told_at = 0.0
        self._request = DriverRequest.CONTINUE

    def report_progress(self, update: dict[str, Any]) -> None:
        """Pass on the run's newest numbers, together with earlier ones, several times a second at most."""
        if not self._is_used:
            return
        self._news |= update
        self._read_answer()
        if self._answer is None and time.monotonic() - self._told_at >= PROGRESS_INTERVAL_S:
            self._answer = self._monitor.progress.remote(self._news)
            self._told_at = time.monotonic()

    def report_evaluation(self, evaluation: Evaluation) -> None:
        """Pass on an evaluation."""
        if self._is_used:
            self._monitor.evaluated.remote(evaluation)

    def take_request(self) -> DriverRequest | None:
        """Answer what the driver wants, a request to save once; None where this is not rank 0.

        The answer to the newest progress is waited for.
        """
        if not self._is_used:
            return None
        self._read_answer(ANSWER_WAIT_S)
        request = self._request
        if request is DriverRequest.SAVE:
            self._request = DriverRequest.CONTINUE
        return request

    def _read_answer(self, timeout: float = 0) -> None:
        if self._answer is not None and ray.wait([self._answer], timeout=timeout)[0]:
            self._request, self._answer = max(self._request, ray.get(self._answer)), None


def tell_skipped(monitor: MonitorHandle, samples: Sequence[SkippedSample]) -> int:
    """Tell of samples that could not be read, in this worker's log too; answers how many there are over all workers."""
    for split, index, error in samples:
        logger.warning("skipped: sample %d of %s: %s", index, split, escaped_line(error))
    count: int = ray.get(monitor.skipped.remote([tuple(sample) for sample in samples]))
    return count


@contextmanager
def reporting_failures(
    monitor: MonitorHandle, rank: int, cause_of: Callable[[BaseException], Cause], project: str | None = None
) -> Iterator[None]:
    """Pass an exception in the block on to the driver, and log it, before it is raised further.

    Of blocks inside each other the innermost does that. ``cause_of`` is :func:`raytorch.distributed.failure_cause`,
    ``project`` the folder of the user's own code, from which on a traceback tells the user something. SystemExit and
    the like are the user's error where that code raises them: what ends a worker does not come through it.
    """
    try:
        yield
    except BaseException as error:
        is_failure = isinstance(error, Exception) or _first_own_frame(_frames(error), project) is not None
        if getattr(error, _TOLD, False) or not is_failure:
            raise
        text = _own_traceback(error, project)
        logger.error("rank %d failed\n%s", rank, text)  # noqa: TRY400 - without Ray's frames
        failure = WorkerFailure(
            rank=rank,
            kind=type(error).__name__,
            message=message_of(error),
            traceback=text,
            cause=cause_of(error),
            expected=isinstance(error, RaytorchError),
            user_error=isinstance(error, UserError),
        )
        with suppress(ray.exceptions.RayError):  # whom it was to be told is gone
            ray.get(monitor.failed.remote(failure))
        with suppress(AttributeError):
            setattr(error, _TOLD, True)
        raise


def _own_traceback(error: BaseException, project: str | None) -> str:
    """The traceback without its middle if it is very long: from the first frame in the user's own code if there is
    one, else below Ray's and this module's.
    """
    frames = _frames(error)
    summary = traceback.TracebackException.from_exception(error)
    summary.stack = traceback.StackSummary.from_list(frames[_first_own_frame(frames, project) or 0 :])
    return cut("".join(summary.format()).rstrip())


def _frames(error: BaseException) -> list[traceback.FrameSummary]:
    stack = traceback.TracebackException.from_exception(error).stack
    return [frame for frame in stack if frame.filename != __file__]


def _first_own_frame(frames: Sequence[traceback.FrameSummary], project: str | None) -> int | None:
    return next((place for place, frame in enumerate(frames) if project and _is_own(frame.filename, project)), None)


def _is_own(file: str, project: str) -> bool:
    """Tell whether a file is the user's: in the project, and not of an environment that is in there too."""
    is_inside = file.startswith(f"{project}/") and not file.startswith(_OTHERS)
    return is_inside and not _INSTALLED & set(PurePath(file.removeprefix(project)).parts)


_OTHERS = tuple(f"{folder}/" for folder in (sysconfig.get_path("stdlib"), Path(raytorch.__file__).parent))
_INSTALLED = {"site-packages", "dist-packages"}
