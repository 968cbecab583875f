"""Stopping a run: on Ctrl-C the driver asks the workers, who agree at which optimizer step they save or stop.

Imports neither torch nor ray at its top.
"""

import math
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from enum import IntEnum
from typing import Any

from raytorch.config import RunConfig
from raytorch.errors import CheckpointError
from raytorch.runs.status import MonitorHandle, RunStatus
from raytorch.system.processes import living_children

ABANDON_S = 15.0
"""Longest wait for workers to end when a part of Ray was lost."""
StatusCallback = Callable[[RunStatus], bool | None]
"""Called several times a second with the run's :class:`~raytorch.runs.status.RunStatus`. The answer True ends the
run after a last checkpoint, as Ctrl-C does."""

INTERVAL_S = 2.0
"""Seconds between two agreements, about."""


class DriverRequest(IntEnum):
    """Request of the driver to the workers."""

    CONTINUE = 0
    SAVE = 1
    """Save a checkpoint and go on."""
    STOP = 2
    """Save a checkpoint and end."""


class StopAgreement:
    """Lets all workers save or stop after the same optimizer step, though rank 0 alone hears what the driver wants.

    A collective operation at every step would slow fast steps down, and one every so many steps would make a person
    wait for slow ones. So rank 0 says at each agreement, from its pace since the one before, when the next is due.
    """

    def __init__(
        self, add_up: Callable[[list[float]], list[float]], clock: Callable[[], float] = time.monotonic
    ) -> None:
        """``add_up`` sums numbers over all workers. The first agreement is due after one step, on all of them."""
        self._add_up, self._clock = add_up, clock
        self._steps, self._due, self._since = 0, 1, clock()

    def count_step(self) -> bool:
        """Count an optimizer step; answers whether the workers agree after it, all of them the same."""
        self._steps += 1
        return self._steps >= self._due

    def agree(self, request: DriverRequest | None) -> DriverRequest:
        """Tell all workers what rank 0 wants; the others pass None. A collective operation."""
        ahead = steps_ahead(self._steps, self._clock() - self._since)
        word = [0.0, 0.0] if request is None else [float(request), float(ahead)]
        agreed, due = self._add_up(word)  # rank 0's word plus zeros, so that it arrives to the bit
        self._steps, self._due, self._since = 0, int(due), self._clock()
        return DriverRequest(int(agreed))


def steps_ahead(steps: int, seconds: float) -> int:
    """Steps until the next agreement, if ``steps`` have taken ``seconds``: those of an interval, but at least one.

    At most twice as many as before, so that a pace that was measured wrong does not put it off for long.
    """
    return max(1, min(2 * steps, int(INTERVAL_S * steps / max(seconds, 1e-9))))


class Patience:
    """Ends a run whose metric no longer gets better, on every worker after the same evaluation, as all see its numbers.

    Does nothing in a run that is not to stop early.
    """

    def __init__(self, config: RunConfig) -> None:
        self._config = config.stop
        self._ranking = config.ranking_by(config.stop.metric if config.stop else None)
        self._best: float | None = None
        self._waited = 0

    @property
    def label(self) -> str | None:
        """The metric that has to get better; None in a run that is not to stop early."""
        return self._ranking.label if self._config else None

    @property
    def is_over(self) -> bool:
        """True if the run is to end."""
        return self._config is not None and self._waited >= self._config.patience

    def look(self, metrics: Mapping[str, float]) -> None:
        """Take an evaluation into account."""
        if self._config is None:
            return
        score = self._ranking.score(metrics)
        if score > (-math.inf if self._best is None else self._best + self._config.min_change):
            self._best, self._waited = score, 0
        else:
            self._waited += 1

    def state_dict(self) -> dict[str, Any]:
        """What has been seen, as JSON has it."""
        order = self._ranking._asdict() if self._config else {"label": None}
        return {"metric": order.pop("label"), **order, "best": self._best, "waited": self._waited}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken; with another metric, begin anew. Raises CheckpointError."""
        best, waited = state.get("best"), state.get("waited", 0)
        if not isinstance(best, float | None) or type(waited) is not int or waited < 0:
            raise CheckpointError(f"the checkpoint's evaluations for early stopping, {waited!r:.99}, are damaged")
        order = state.get("metric"), state.get("higher_is_better", self._ranking.higher_is_better)
        if self._config and order == self._ranking:
            self._best, self._waited = best, waited

    def reason(self) -> str | None:
        """Why the run has ended early, if it has."""
        if self._config is None or not self.is_over:
            return None
        return f"no better {self._ranking.label} in {self._waited} evaluation{'s' if self._waited > 1 else ''}"


def abandon_workers(fit: Any, error: Exception) -> None:
    """End the workers after a part of Ray was lost, as far as what is left of it can."""
    from raytorch.cluster.ray_watch import HeadLostError, RayletLostError

    if isinstance(error, RayletLostError):
        living_children()  # a raylet of this process's own: let go of it, and what it has started sees that and ends
    if isinstance(error, RayletLostError | HeadLostError):  # without which nothing can be ended
        fit.abandon()  # a wait that went on after Ray is left would start another
    else:
        threading.Thread(target=fit.end, daemon=True).start()
        fit.done.wait(ABANDON_S)


def leave_workers(fit: Any, monitor: MonitorHandle) -> None:
    """Let workers save and stop by themselves; what waits for workers would have them train a step when they come."""
    import ray

    monitor.request_stop.remote()
    with suppress(ray.exceptions.RayError):  # Ray itself may be gone
        status = ray.get(monitor.status.remote())
        if not status.attempts:
            fit.end()
