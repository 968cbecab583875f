"""A run's ``config.yaml`` and ``summary.json``, which its driver keeps. Imports neither torch nor ray at its top."""

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import datetime
from typing import Any

from raytorch.config.file import dump
from raytorch.errors import Cause, StorageError, TrainingError, UserError, is_storage_fault, message_of
from raytorch.runs.catalog import CONFIG_FILE, HEARTBEAT_S, SUMMARY_FILE
from raytorch.runs.metrics import versions
from raytorch.runs.plan import RunPlan
from raytorch.runs.records import write_end
from raytorch.runs.status import Failure, Status
from raytorch.system.processes import Process

logger = logging.getLogger("raytorch")


class RunRecord:
    """What is written down of a run from its start to its end.

    Attributes:
        started: When the command began, in seconds since 1970.
    """

    def __init__(self, plan: RunPlan) -> None:
        self.started = time.time()
        self._plan, self._folder = plan, plan.folder
        self._lock = threading.Lock()
        self._summary: dict[str, Any] = {
            "name": plan.config.name,
            "path": str(self._folder),
            "state": "running",
            "started": _timestamp(self.started),
            "driver": asdict(Process.current()),
            "seed": plan.config.seed,
            "versions": versions(),
        }

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Write down what is about to run, every half a minute that its driver lives, and an error in the block."""
        self._folder.write_text(CONFIG_FILE, dump(self._plan.config))
        self._write({"seen": _timestamp()})
        ended = threading.Event()
        threading.Thread(target=self._renew_until, args=[ended], daemon=True).start()
        try:
            yield
        except KeyboardInterrupt:
            self._close({"state": "stopped", "seconds": self._seconds()}, only_while="running")
            raise
        except BaseException as error:
            failed = isinstance(error, StorageError) or is_storage_fault(error)
            cause = Cause.STORAGE if failed else Cause.ERROR
            failure = {"cause": cause, "kind": type(error).__name__, "message": message_of(error)}
            self._close({"state": "failed", "error": failure}, only_while="running")
            raise
        finally:
            ended.set()

    def end(self, status: Status) -> dict[str, Any]:
        """Write down what the run came to; returns the summary.

        Raises:
            StorageError: It could not be written down.
        """
        outcome = dict(status.outcome or {})
        first_step_at, seconds = outcome["first_step_at"], outcome.pop("seconds")
        return self._told(
            self._conclude(
                status,
                {
                    **outcome,
                    "first_step_s": round(first_step_at - self.started, 2) if first_step_at else None,
                    "seconds": {"startup": round((status.begun_at or self.started) - self.started, 2), **seconds},
                },
            )
        )

    def abandon(self) -> dict[str, Any]:
        """Write down that the run was ended at once, unless it had ended before that; returns the summary.

        Raises:
            StorageError: It could not be written down.
        """
        return self._told(self._close({"state": "stopped", "seconds": self._seconds()}, only_while="running"))

    def fail(self, error: Exception, status: Status) -> Exception:
        """Write down a failure; returns the exception to raise."""
        from raytorch.training.failures import diagnose

        details = diagnose(error, status)
        self._conclude(status, {"state": "failed", "error": details})
        told = status.cause
        if details["cause"] == Cause.STORAGE:
            return StorageError(f"{details['message']}\n{Cause.STORAGE.advice}\nlogs: {self._folder}/logs")
        if told and told.user_error:
            return UserError(told.message)
        return TrainingError(f"{_explain(details, told)}\nlogs: {self._folder}/logs")

    def _conclude(self, status: Status, values: dict[str, Any]) -> bool:
        restarts = max(0, status.attempts - 1 - status.resizes)
        seconds = values.get("seconds", {}) | self._seconds()
        return self._close(values | {"restarts": restarts, "resizes": status.resizes, "seconds": seconds})

    def _seconds(self) -> dict[str, float]:
        return {"total": round(time.time() - self.started, 2)}

    def _told(self, is_written: bool) -> dict[str, Any]:
        if not is_written:
            raise StorageError(
                f"the run has {self._summary['state']}, but {self._folder} does not say so, as it could not be "
                "written; make room or mend the access to it, and read its logs"
            )
        return self._summary

    def _renew_until(self, ended: threading.Event) -> None:
        while not ended.wait(HEARTBEAT_S):
            with suppress(UserError, OSError):  # the storage may be out of reach for a while
                self._write({"seen": _timestamp()}, only_while="running")

    def _write(self, values: dict[str, Any], only_while: str | None = None) -> None:
        with self._lock:
            if only_while in (None, self._summary["state"]):
                self._summary |= values
                self._folder.write_json(SUMMARY_FILE, self._summary)

    def _close(self, values: dict[str, Any], only_while: str | None = None) -> bool:
        """Write down an end by all means; answers whether that worked. What ended the run is told all the same."""
        with self._lock:
            if only_while in (None, self._summary["state"]):
                self._summary |= values
                return write_end(self._folder, SUMMARY_FILE, self._summary)
        return True


def _explain(details: dict[str, Any], told: Failure | None) -> str:
    """What a person reads of a failure."""
    if "traceback" not in details:
        text = details["message"]
    elif told and told.expected:
        text = told.message
    else:
        text = f"rank {details['rank']} failed\n{details['traceback']}"
    advice = Cause(details["cause"]).advice
    return f"{text}\n{advice}" if advice else str(text)


def _timestamp(seconds: float | None = None) -> str:
    """A time, by default now, with the zone's offset, so that other hosts can read it."""
    moment = datetime.now() if seconds is None else datetime.fromtimestamp(seconds)
    return moment.astimezone().isoformat(timespec="seconds")
