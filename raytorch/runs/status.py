"""How a run stands, in the words that its workers and its driver have for it. Imports neither torch nor ray."""

import time
from dataclasses import dataclass, field
from typing import Any, Protocol

from raytorch.errors import Cause


@dataclass(frozen=True)
class WorkerFailure:
    """An exception that one worker raised."""

    rank: int
    kind: str
    """Name of the exception's class."""
    message: str
    traceback: str
    """The worker's own traceback, without Ray's frames."""
    cause: Cause
    expected: bool
    """True if it is one of raytorch's own errors, whose message alone tells what to do."""
    user_error: bool
    """True if the input has to change."""
    time: float = field(default_factory=time.time)
    """Seconds since 1970."""


@dataclass(frozen=True)
class Evaluation:
    """What a model has come to on the split that judges its run."""

    step: int
    epoch: float
    metrics: dict[str, float]
    """By name; ``loss`` is one of them."""
    split: str = "test"
    """``test`` or ``validation``."""


@dataclass
class RunStatus:
    """Status of a run, as the workers have told it so far."""

    progress: dict[str, Any] | None = None
    """Rank 0's newest numbers; None until the workers have started."""
    evaluations: list[Evaluation] = field(default_factory=list)
    outcome: dict[str, Any] | None = None
    """Outcome of the run; None until it has ended well."""
    pids: dict[int, int] = field(default_factory=dict)
    """The newest process of each rank there has been."""
    nodes: dict[int, str] = field(default_factory=dict)
    """The node of each rank of the newest attempt, by Ray's name for it."""
    failures: list[WorkerFailure] = field(default_factory=list)
    """The newest attempt's failures, and earlier ones that were final."""
    attempts: int = 0
    resizes: int = 0
    """How many of the restarts were planned, to go on with more or fewer workers."""
    begun_at: float | None = None
    """When the first attempt was ready to train, in seconds since 1970."""
    skipped: int = 0
    """Samples that could not be read, over all workers and attempts."""
    stopping: bool = False
    """True if the workers have been asked to end."""

    @property
    def cause(self) -> WorkerFailure | None:
        """The failure that started it all: the first final one, else the first."""
        return min(self.failures, key=lambda failure: (not failure.cause.is_final, failure.time), default=None)


class ActorMethod(Protocol):
    """A method of an actor, called from another process."""

    def remote(self, *arguments: Any) -> Any:
        """Call it; answers with a reference to what it will return."""


class MonitorHandle(Protocol):
    """Handle of a run's :class:`~raytorch.training.monitor.RunMonitor`, with that actor's methods."""

    status: ActorMethod
    begin_attempt: ActorMethod
    joined: ActorMethod
    progress: ActorMethod
    evaluated: ActorMethod
    skipped: ActorMethod
    skipped_after: ActorMethod
    ended: ActorMethod
    failed: ActorMethod
    request_stop: ActorMethod
    request_save: ActorMethod
    saved: ActorMethod
    is_saved: ActorMethod
    resizing: ActorMethod
