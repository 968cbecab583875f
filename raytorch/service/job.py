"""Status of a job: from Ray's Jobs API, and from the folder of its run. Imports neither torch nor ray."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

from raytorch.errors import STORAGE_FAULT, Cause, UserError
from raytorch.runs.catalog import SUMMARY_FILE, read_summary
from raytorch.runs.records import moment
from raytorch.runs.storage import RunFolder, split
from raytorch.service.tracebacks import exception_of, last_traceback, plain, shortened, snippets
from raytorch.system.safe_text import cut

JobKind = Literal["train", "script", "other"]
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

_WORDS = {
    Cause.GPU_MEMORY: r"CUDA out of memory|CUDA error: out of memory|PYTORCH_(?:CUDA_)?ALLOC_CONF",
    Cause.HOST_MEMORY: (
        r"^(?:MemoryError|OutOfMemoryError)|can't allocate memory|Cannot allocate memory|running low on memory"
    ),
    Cause.LOST_NODE: r"^NodeDiedError|node has died|its node died",
    Cause.LOST_WORKER: (
        r"^(?:ActorDiedError|ActorUnavailableError|WorkerCrashedError)|its process died|[Aa]ctor died unexpectedly"
    ),
    Cause.STORAGE: rf"^StorageError|{STORAGE_FAULT.pattern}",
    Cause.TIMEOUT: r"Timeout|[Tt]imed out|has been hanging",
}
"""Texts of errors whose cause is not the program; the first that fits counts."""
_PEER = re.compile(
    r"connection (?:closed|reset|refused)|by peer|broken pipe|time[d ]*out|gloo|nccl|\bDist\w*Error|has been hanging",
    re.IGNORECASE,
)
"""Texts of a worker that only waits for others, or misses them."""


@dataclass(frozen=True)
class JobFailure:
    """Why a job did not finish."""

    cause: str
    """A :class:`~raytorch.errors.Cause`, or ``stop``."""
    message: str
    rank: int | None = None
    """The first rank that failed, where it was one."""
    traceback: str | None = None
    """The exception's, or the last one in the output of a script that ended with an exit status."""
    kind: str | None = None
    """Name of the exception's class, where it was one; ``ExitStatus`` of a script that ended with one."""


@dataclass(frozen=True)
class Job:
    """A job as it stands."""

    id: str
    name: str
    kind: JobKind
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
    exit_status: int | None = None
    """Of that command, once it has ended by itself; 128 and the signal if one killed it."""
    failure: JobFailure | None = None

    @property
    def link(self) -> str:
        """The job's page in the dashboard."""
        return f"{self.address}/#/jobs/{self.id}"

    @property
    def has_ended(self) -> bool:
        """True if its state is final."""
        return self.state not in ("pending", "running")

    @property
    def folder(self) -> RunFolder | None:
        """The run's folder, which may or may not be readable from here."""
        return RunFolder(*split(self.run)) if self.run else None


def describe(details: Any, address: str) -> Job:
    """The job that Ray's ``JobDetails`` are about, without what its run's folder says."""
    told = details.metadata if isinstance(details.metadata, dict) else {}
    metadata: dict[str, Any] = {key: value for key, value in told.items() if isinstance(value, str)}
    kind, code = metadata.get(KIND), details.driver_exit_code
    return Job(
        id=details.submission_id,
        name=metadata.get("job_name", details.submission_id),
        kind=kind if kind in ("train", "script") else "other",
        state=STATES.get(str(details.status), "running"),
        run=metadata.get(RUN),
        submitted=_time(details.start_time),
        started=None,
        ended=_time(details.end_time),
        digest=metadata.get(DIGEST),
        address=address,
        entrypoint=details.entrypoint,
        exit_status=128 - code if code is not None and code < 0 else code,
    )


def summary_of(job: Job) -> dict[str, Any] | None:
    """Read what the run's folder says of the job; None where there is nothing, or where it cannot be read from here."""
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
    if started and job.ended and started > job.ended:
        return None  # of a later job, which went on with the run
    return summary


def started_at(summary: Mapping[str, Any] | None) -> datetime | None:
    """When a run began, None if its folder does not tell."""
    return moment(summary["started"]) if summary and summary["started"] else None


def failure_of(job: Job, details: Any, summary: Mapping[str, Any] | None, log: str) -> JobFailure | None:
    """Why a job did not finish, by its run's ``summary``, else by the driver's ``log``, else by Ray's ``JobDetails``;
    None while it may."""
    if job.state == "stopped":
        return JobFailure("stop", "stopped on request")
    if job.state != "failed":
        return None
    if error := (summary or {}).get("error"):
        traceback = error.get("traceback")
        return JobFailure(
            error.get("cause", "error"),
            cut(error.get("message", "")),
            error.get("rank"),
            cut(traceback) if traceback else None,
            error.get("kind"),
        )
    return failure_told(log) or _seen(details)


def failure_told(output: str) -> JobFailure | None:
    """Find what a program's output says of its failure: its last traceback, or which ranks were lost; else None."""
    output = plain(output)
    ranks = re.findall(r"^rank (\d+) (?:failed|was lost)", output, re.MULTILINE)
    rank = int(ranks[0]) if ranks else None
    if rank is None and (failures := [_of_rank(*snippet) for snippet in snippets(output)]):
        # By Ray Train's own error; the failure that explains those of the other ranks.
        return next((each for each in failures if not _PEER.search(f"{each.kind}: {each.message}")), failures[0])
    if (traceback := last_traceback(output)) is not None:
        return _raised(traceback, rank)
    if lost := re.findall(r"^rank \d+ was lost: .*$", output, re.MULTILINE):
        return JobFailure(cause_told("\n".join(lost)), "\n".join(lost), rank)
    return None


def failure_raised(kind: str, module: str, message: str, traceback: str) -> JobFailure:
    """The failure of a script that an exception has ended; what Ray and raytorch raise tells of a worker's."""
    told = failure_told(traceback) if module.partition(".")[0] in ("ray", "raytorch") else None
    if told is not None:
        return told
    message = cut(message.partition("\n")[0] or kind)
    return JobFailure(cause_told(f"{kind}: {message}"), message, None, shortened(traceback.rstrip("\n")), kind)


def _of_rank(rank: int, text: str) -> JobFailure:
    if (traceback := last_traceback(text)) is not None:
        return _raised(traceback, rank)
    # A lost worker: a line, many on which worker it was, and then Ray's reason.
    said, _, reason = text.split("\n\n")[0].partition("\n)\n")
    message = (reason if "health check failed" in said else said).strip() or text.strip()
    return JobFailure(cause_told(message), message.partition("\n")[0], rank)


def _raised(traceback: str, rank: int | None) -> JobFailure:
    kind, message = exception_of(traceback)
    return JobFailure(cause_told(f"{kind}: {message}"), cut(message), rank, shortened(traceback), kind)


def cause_told(error: str) -> Cause:
    """The cause of a failure by the error's words."""
    return next((cause for cause, words in _WORDS.items() if re.search(words, error)), Cause.ERROR)


def _seen(details: Any) -> JobFailure:
    """A failure that only Ray has seen, by its words for errors."""
    message = details.message or "the job failed without a word"
    if details.error_type == "JOB_SUPERVISOR_ACTOR_START_TIMEOUT":
        return JobFailure(Cause.TIMEOUT, message)
    if details.error_type != "JOB_SUPERVISOR_ACTOR_DIED":
        return JobFailure(Cause.ERROR, message)
    if re.search(_WORDS[Cause.LOST_NODE], message):
        return JobFailure(Cause.LOST_NODE, message)
    # Ray's own words are a page of what may have been.
    cause = Cause.LOST_RAY
    return JobFailure(cause, f"the job's supervisor, a process of Ray's, died, killed or crashed\n{cause.advice}")


def _time(milliseconds: int | None) -> datetime | None:
    try:
        return datetime.fromtimestamp(milliseconds / 1000, UTC).astimezone() if milliseconds else None
    except (OverflowError, ValueError, OSError, TypeError):  # no time that there is
        return None
