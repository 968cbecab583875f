"""What is known of a job: from Ray's Jobs API, and from the folder of its run. Imports neither torch nor ray."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

from raytorch.errors import UserError
from raytorch.runs import SUMMARY_FILE, read_summary
from raytorch.storage import RunFolder, split

Kind = Literal["train", "script", "other"]
State = Literal["pending", "running", "finished", "failed", "stopped"]

STATES: dict[str, State] = {
    "PENDING": "pending",
    "RUNNING": "running",
    "SUCCEEDED": "finished",
    "FAILED": "failed",
    "STOPPED": "stopped",
}
"""Ray's words for a job's state, and those of a run."""
KIND, RUN, DIGEST = "raytorch_kind", "raytorch_run", "raytorch_digest"
"""Keys of a job's metadata, beside Ray's own ``job_name``."""
TRACEBACK = "Traceback (most recent call last):"
LONGEST_TRACEBACK = 60
"""Lines."""


@dataclass(frozen=True)
class Failure:
    """Why a job did not finish."""

    cause: str
    """``error``, ``lost_node``, ``lost_worker``, ``host_memory``, ``gpu_memory``, ``timeout`` or ``stop``."""
    message: str
    rank: int | None = None
    """The first rank that failed, where it was one."""
    traceback: str | None = None


@dataclass(frozen=True)
class Job:
    """A job as it stands."""

    id: str
    name: str
    kind: Kind
    """``other`` is a job that something else than raytorch submitted."""
    state: State
    run: str | None
    """Path or URI of the run's folder."""
    submitted: datetime | None
    started: datetime | None
    """When its driver began, where the run's folder can be read from here."""
    ended: datetime | None
    digest: str | None
    """SHA-256 of the configuration with all its defaults, or of the script's project."""
    address: str
    """URL of the cluster's dashboard."""
    entrypoint: str
    """The command that the cluster runs."""
    failure: Failure | None = None

    @property
    def link(self) -> str:
        """The job's page in the dashboard."""
        return f"{self.address}/#/jobs/{self.id}"

    @property
    def has_ended(self) -> bool:
        """Whether its state is final."""
        return self.state not in ("pending", "running")

    @property
    def folder(self) -> RunFolder | None:
        """The run's folder, which may or may not be readable from here."""
        return RunFolder(*split(self.run)) if self.run else None


def describe(details: Any, address: str) -> Job:
    """The job that Ray's ``JobDetails`` are about, without what its run's folder says."""
    metadata = details.metadata or {}
    kind = metadata.get(KIND)
    return Job(
        id=details.submission_id,
        name=metadata.get("job_name", details.submission_id),
        kind=kind if kind in ("train", "script") else "other",
        state=STATES[str(details.status)],
        run=metadata.get(RUN),
        submitted=_time(details.start_time),
        started=None,
        ended=_time(details.end_time),
        digest=metadata.get(DIGEST),
        address=address,
        entrypoint=details.entrypoint,
    )


def summary_of(job: Job) -> dict[str, Any] | None:
    """What the run's folder says of the job; None where there is nothing, or where it cannot be read from here."""
    try:
        folder = job.folder
        if folder is None or not folder.exists(SUMMARY_FILE):
            return None
        summary = read_summary(folder)
    except UserError:
        return None
    started = started_at(summary)
    if started and job.submitted and started < job.submitted.replace(microsecond=0):
        return None  # of the run that this job was to resume, or that has the name which it was refused
    return summary


def started_at(summary: Mapping[str, Any] | None) -> datetime | None:
    """When a run began, None if its folder does not tell."""
    return datetime.fromisoformat(summary["started"]) if summary and summary["started"] else None


def failure_of(job: Job, details: Any, summary: Mapping[str, Any] | None, log: str) -> Failure | None:
    """Why a job did not finish; None while it may.

    Args:
        job: The job.
        details: Ray's ``JobDetails`` of it.
        summary: What the run's folder says, if it can be read.
        log: The driver's output, which has the reason where the folder has none.
    """
    if job.state == "stopped":
        return Failure("stop", "stopped on request")
    if job.state != "failed":
        return None
    if error := (summary or {}).get("error"):
        return Failure(error.get("cause", "error"), error["message"], error.get("rank"), error.get("traceback"))
    traceback = last_traceback(log)
    if traceback is not None:
        return Failure("error", exception_of(traceback)[1], traceback=traceback)
    return Failure(_cause(details), details.message or "the job failed without a word")


def last_traceback(output: str) -> str | None:
    """The last traceback that a program wrote, None if it wrote none."""
    start = output.rfind(TRACEBACK)
    if start < 0:
        return None
    start = output.rfind("\n", 0, start) + 1  # Ray puts the process in front of a worker's lines
    return "\n".join(output[start:].rstrip().splitlines()[:LONGEST_TRACEBACK])


def exception_of(traceback: str) -> tuple[str, str]:
    """Class and message of the exception that a traceback ends with."""
    for line in reversed(traceback.splitlines()):
        if match := re.match(r"([A-Za-z_][\w.()]*)(?:: (.*))?$", line):
            return match[1].rpartition(".")[2], match[2] or match[1]
    return "Error", traceback.splitlines()[-1]


def _cause(details: Any) -> str:
    """The cause of a failure that only Ray has seen, by its words for errors."""
    if details.error_type == "JOB_SUPERVISOR_ACTOR_START_TIMEOUT":
        return "timeout"
    if details.error_type == "JOB_SUPERVISOR_ACTOR_DIED":
        return "lost_node" if "node" in (details.message or "").lower() else "lost_worker"
    return "error"


def _time(milliseconds: int | None) -> datetime | None:
    return datetime.fromtimestamp(milliseconds / 1000, UTC).astimezone() if milliseconds else None
