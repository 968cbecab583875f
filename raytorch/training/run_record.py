"""A run's ``config.yaml`` and ``summary.json``, which its driver keeps. Imports neither torch nor ray at its top."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from raytorch.config.file import dump_config
from raytorch.errors import Cause, Remedy, StorageError, TrainingError, UserError
from raytorch.runs.catalog import CONFIG_FILE, SUMMARY_FILE, read_summary
from raytorch.runs.live_record import LiveRecord
from raytorch.runs.metrics import PACE_KEYS, versions
from raytorch.runs.plan import RunPlan
from raytorch.runs.skipped_list import SkippedList, SkippedSample
from raytorch.runs.status import RunStatus, WorkerFailure

MEASURED = (*PACE_KEYS, "first_step_at", "first_step_s", "workers", "device", "precision", "backend")
"""What only a command that trains a step can tell: how fast it was, and on what."""


class RunRecord(LiveRecord):
    """Record of a run from its start to its end; of one that is resumed it keeps what it has nothing newer of."""

    def __init__(self, plan: RunPlan) -> None:
        split = {"split": plan.config.judged_split} if plan.config.validation else {}
        super().__init__(plan.folder, seed=plan.config.seed, versions=versions(), **split)
        self._plan = plan
        self.skipped = SkippedList(plan.folder)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Write down what is about to run, then as :class:`~raytorch.runs.live_record.LiveRecord` does."""
        if self.folder.exists(SUMMARY_FILE):
            before = read_summary(self.folder)
            for key in ("error", "ended_early"):
                before.pop(key, None)
            self.content = before | self.content
        self.folder.write_text(CONFIG_FILE, dump_config(self._plan.config))
        self._plan.record_code()
        with super().writing():
            yield

    def note(self, status: RunStatus) -> None:
        """Keep the newest evaluation, which is what a run that fails has come to, what the run began with, and
        where a stream of data was begun again."""
        told = status.progress or {}
        if weights := told.get("initial_weights"):
            self.update(initial_weights=weights)
        if (stream := told.get("stream")) and stream not in (known := self.content.get("stream_restarts", [])):
            self.update(stream_restarts=[*known, stream])
        if status.evaluations:
            newest = status.evaluations[-1]
            untested: dict[str, Any] = {"test_metrics": {}} if "test_metrics" in self.content else {}
            self.update(metrics=newest.metrics, step=newest.step, epochs=round(newest.epoch, 4), **untested)

    def list_skipped(self, status: RunStatus, behind: Callable[[int], list[SkippedSample]]) -> None:
        """List the samples that were skipped since the last call: those ``behind`` the first ones.

        Raises StorageError if they cannot be written down.
        """
        if status.skipped > self.skipped.count:
            self.skipped.append(behind(self.skipped.count))
        if status.skipped:
            self.update(skipped=status.skipped)

    def end(self, status: RunStatus) -> dict[str, Any]:
        """Write down what the run came to; returns the summary. Raises StorageError if it could not be written."""
        outcome = dict(status.outcome or {})
        first_step_at = outcome["first_step_at"]
        outcome["first_step_s"] = round(first_step_at - self.started, 2) if first_step_at else None
        if not first_step_at:
            outcome |= {key: self.content[key] for key in MEASURED if key in self.content}
        startup = round((status.begun_at or self.started) - self.started, 2)
        outcome["seconds"] = {"startup": startup, **outcome["seconds"], "total": self.seconds()}
        return self.require_written(self._close_with(status, **outcome))

    def abandon(self) -> dict[str, Any]:
        """Write down that the run was ended at once, unless it had ended before that; as :meth:`end` otherwise."""
        return self.require_written(self.close("stopped"))

    def fail(self, error: Exception, status: RunStatus) -> Exception:
        """Write down a failure; returns the exception to raise."""
        from raytorch.training.failures import diagnose

        details = diagnose(error, status)
        self.note(status)
        self._close_with(status, state="failed", error=details)
        told, cause = status.cause, Cause(details["cause"])
        if told and told.user_error and cause is not Cause.STORAGE:
            return UserError(told.message)
        remedies = [Remedy("resume", str(self.folder))] if cause.is_resumable else []
        if cause is Cause.STORAGE:
            return StorageError(f"{details['message']}\n{cause.advice}\nlogs: {self.folder}/logs", remedies=remedies)
        return TrainingError(f"{_explain(details, told)}\nlogs: {self.folder}/logs", remedies=remedies)

    def at_the_end(self) -> dict[str, Any]:
        return {"seconds": {**self.content.get("seconds", {}), "total": self.seconds()}}

    def _close_with(self, status: RunStatus, **values: Any) -> bool:
        restarts = max(0, status.attempts - 1 - status.resizes)
        return self.close(restarts=restarts, resizes=status.resizes, **values)


def _explain(details: dict[str, Any], told: WorkerFailure | None) -> str:
    """Say what a person reads of a failure."""
    if "traceback" not in details:
        text = details["message"]
    elif told and told.expected:
        text = told.message
    else:
        text = f"rank {details['rank']} failed\n{details['traceback']}"
    advice = Cause(details["cause"]).advice
    return f"{text}\n{advice}" if advice else str(text)
