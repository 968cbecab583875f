"""What is told of a job, from Ray's words for it and the record in its run's folder."""

import json
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from raytorch.service.job import Job, JobFailure, describe, failure_of, failure_told, summary_of
from raytorch.service.tracebacks import LONGEST, exception_of, last_traceback

MILLISECONDS = 1_800_000_000_500

CHAINED = """\
step 1
Traceback (most recent call last):
  File "a.py", line 1, in <module>
ZeroDivisionError: division by zero

During handling of the above exception, another exception occurred:

Traceback (most recent call last):
  File "a.py", line 3, in <module>
lib.errors.OwnError: it broke: twice
"""


def details(**changes: Any) -> SimpleNamespace:
    """Ray's JobDetails of a training run that is going on."""
    values: dict[str, Any] = {
        "type": "SUBMISSION",
        "submission_id": "mine",
        "status": "RUNNING",
        "entrypoint": "python -m raytorch train run.yaml --name mine",
        "message": None,
        "error_type": None,
        "start_time": MILLISECONDS,
        "end_time": None,
        "driver_exit_code": None,
        "metadata": {"job_name": "mine", "raytorch_kind": "train", "raytorch_run": "/s/mine", "raytorch_digest": "ab"},
    }
    return SimpleNamespace(**values | changes)


def job(**changes: Any) -> Job:
    return describe(details(**changes), "http://ray:8265")


def test_a_job_of_ours() -> None:
    mine = job()
    assert (mine.id, mine.name, mine.kind, mine.state, mine.run) == ("mine", "mine", "train", "running", "/s/mine")
    assert mine.submitted == datetime.fromtimestamp(MILLISECONDS / 1000, UTC)
    assert mine.link == "http://ray:8265/#/jobs/mine"
    assert not mine.has_ended
    assert mine.folder is not None
    assert str(mine.folder) == "/s/mine"


def test_a_job_of_somebody_else() -> None:
    other = job(metadata=None, status="SUCCEEDED", submission_id="raysubmit_1")
    assert (other.id, other.name, other.kind, other.state, other.run) == (
        "raysubmit_1",
        "raysubmit_1",
        "other",
        "finished",
        None,
    )
    assert other.has_ended
    assert summary_of(other) is None


def test_the_records_word_for_a_failure_comes_first() -> None:
    summary = {"error": {"cause": "gpu_memory", "kind": "E", "message": "full", "rank": 1, "traceback": "T"}}
    failed = details(status="FAILED", message="exit code 1")
    assert failure_of(job(status="FAILED"), failed, summary, CHAINED) == JobFailure("gpu_memory", "full", 1, "T", "E")


def test_a_record_that_says_very_much_is_shown_cut() -> None:
    error = {"cause": "error", "message": "x" * 1_000_000, "traceback": "y" * 1_000_000}
    failure = failure_of(job(status="FAILED"), details(status="FAILED"), {"error": error}, "")
    assert failure is not None
    assert failure.traceback is not None
    assert max(len(failure.message), len(failure.traceback)) < 100_000


def test_then_the_traceback_in_the_drivers_output() -> None:
    failure = failure_of(job(status="FAILED"), details(status="FAILED", message="exit code 1"), None, CHAINED)
    assert failure is not None
    assert (failure.cause, failure.kind, failure.message) == ("error", "OwnError", "it broke: twice")
    assert failure.rank is None
    assert failure.traceback == last_traceback(CHAINED)


LOST = """\
rank 1 was lost: its process died, killed or crashed
a worker was lost
logs: /s/mine/logs
"""
FAILED = """\
rank 1 failed
Traceback (most recent call last):
  File "a.py", line 3, in <module>
torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB
logs: /s/mine/logs
"""
RAY_TRAIN = """\
ray.train.WorkerGroupError: Training failed due to worker errors:
[Rank 1 Error Snippet]:
Traceback (most recent call last):
  File "a.py", line 3, in train
torch.distributed.DistBackendError: timed out
"""


@pytest.mark.parametrize(
    ("output", "cause", "rank", "message"),
    [
        (LOST, "lost_worker", 1, "rank 1 was lost: its process died, killed or crashed"),
        (FAILED, "gpu_memory", 1, "CUDA out of memory. Tried to allocate 2 GiB"),
        (RAY_TRAIN, "timeout", 1, "timed out"),
        (CHAINED, "error", None, "it broke: twice"),
    ],
)
def test_a_failure_as_the_driver_told_it(output: str, cause: str, rank: int | None, message: str) -> None:
    told = failure_told(output)
    assert told is not None
    assert (told.cause, told.rank, told.message) == (cause, rank, message)
    assert told.traceback is None or told.traceback.endswith(message)


@pytest.mark.parametrize(
    ("line", "cause"),
    [
        ("MemoryError", "host_memory"),
        ("ray.exceptions.OutOfMemoryError: Task was killed due to the node running low on memory.", "host_memory"),
        ("RuntimeError: CUDA error: out of memory", "gpu_memory"),
        ("ray.exceptions.ActorDiedError: The actor died because its node has died.", "lost_node"),
        ("ray.exceptions.ActorDiedError: The actor died unexpectedly before finishing this task.", "lost_worker"),
        ("ray.exceptions.GetTimeoutError: Get timed out", "timeout"),
        ("raytorch.errors.StorageError: s3://bucket/a cannot be used", "storage"),
        ("safetensors_rust.SafetensorError: I/O error: No space left on device (os error 28)", "storage"),
        ("ValueError: a timeout of -1 is too short", "error"),
    ],
)
def test_the_cause_of_a_scripts_failure(line: str, cause: str) -> None:
    told = failure_told(f'Traceback (most recent call last):\n  File "a.py", line 1, in <module>\n{line}\n')
    assert told is not None
    assert told.cause == cause


def test_a_long_traceback_keeps_its_ends() -> None:
    frames = "".join(f'  File "a.py", line {n}, in f{n}\n    f{n + 1}()\n' for n in range(100))
    told = failure_told(f"Traceback (most recent call last):\n{frames}RecursionError: too deep\n")
    assert told is not None
    assert told.message == "too deep"
    assert told.traceback is not None
    lines = told.traceback.splitlines()
    assert len(lines) == LONGEST + 1
    assert (lines[0], lines[-1]) == ("Traceback (most recent call last):", "RecursionError: too deep")


def test_a_workers_traceback_is_told_without_rays_marks() -> None:
    text = 'Traceback (most recent call last):\n  File "a.py", line 1, in f\nValueError: no\n'
    marked = "".join(f"(f pid=7) {line}\n" for line in text.splitlines())
    assert last_traceback(marked + "and on\n") == text.rstrip()


@pytest.mark.parametrize(
    ("kind", "message", "cause"),
    [
        ("JOB_ENTRYPOINT_COMMAND_ERROR", "Job entrypoint command failed with exit code 2", "error"),
        ("RUNTIME_ENV_SETUP_FAILURE", "runtime_env setup failed", "error"),
        ("JOB_SUPERVISOR_ACTOR_START_TIMEOUT", "failed to start within 900 seconds", "timeout"),
        ("JOB_SUPERVISOR_ACTOR_DIED", "The actor died because its node has died.", "lost_node"),
    ],
)
def test_then_rays(kind: str, message: str, cause: str) -> None:
    failed = details(status="FAILED", error_type=kind, message=message)
    assert failure_of(job(status="FAILED"), failed, None, "no traceback") == JobFailure(cause, message)


def test_a_supervisor_that_was_killed_is_a_part_of_ray_whatever_ray_says_of_nodes() -> None:
    message = (
        "Job supervisor actor died: The actor died unexpectedly before finishing this task.\n"
        "The actor is dead because its worker process has died. Some common causes include: (1) the process was killed "
        "by the OOM killer; check the logs of the node, or run `ray list nodes`"
    )
    failed = details(status="FAILED", error_type="JOB_SUPERVISOR_ACTOR_DIED", message=message)
    failure = failure_of(job(status="FAILED"), failed, None, f"epoch 1\n{message}")
    assert failure is not None
    assert failure.cause == "lost_ray"
    assert failure.message.startswith("the job's supervisor, a process of Ray's, died, killed or crashed\n")


def test_a_stopped_job_was_stopped() -> None:
    stopped = failure_of(job(status="STOPPED"), details(status="STOPPED"), None, "")
    assert stopped == JobFailure("stop", "stopped on request")


@pytest.mark.parametrize("status", ["PENDING", "RUNNING", "SUCCEEDED"])
def test_others_have_not_failed(status: str) -> None:
    assert failure_of(job(status=status), details(status=status), None, "") is None


def test_a_traceback_is_the_last_one_to_its_end() -> None:
    assert last_traceback("all is well") is None
    text = last_traceback(CHAINED)
    assert text is not None
    assert text.splitlines()[0] == "Traceback (most recent call last):"
    assert text.endswith("it broke: twice")
    assert exception_of(text) == ("OwnError", "it broke: twice")
    assert exception_of("Traceback (most recent call last):\n  File\nKeyboardInterrupt") == (
        "KeyboardInterrupt",
        "KeyboardInterrupt",
    )


def test_a_message_may_hold_what_ends_lines_elsewhere() -> None:
    message = "a\u2028b\x0cc\x85d"
    output = f'Traceback (most recent call last):\r\n  File "a.py", line 1, in f\r\nLookupError: {message}\r\nand on\n'
    failure = failure_told(output)
    assert failure is not None
    assert (failure.kind, failure.message) == ("LookupError", message)
    assert (
        failure.traceback == f'Traceback (most recent call last):\n  File "a.py", line 1, in f\nLookupError: {message}'
    )


def test_a_record_of_an_earlier_run_is_not_the_jobs(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    mine = job(metadata={"raytorch_run": str(folder), "raytorch_kind": "train"})
    assert summary_of(mine) is None
    for started, counts in ((MILLISECONDS / 1000 - 60, False), (MILLISECONDS // 1000, True)):
        record = {"state": "finished", "started": datetime.fromtimestamp(started, UTC).isoformat(timespec="seconds")}
        (folder / "summary.json").write_text(json.dumps(record), encoding="utf-8")
        assert summary_of(mine) == (record | {"name": "mine", "path": str(folder)} if counts else None)


def test_a_record_of_a_later_job_is_not_the_jobs(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    started = datetime.fromtimestamp(MILLISECONDS / 1000 + 60, UTC).isoformat(timespec="seconds")
    (folder / "summary.json").write_text(json.dumps({"state": "finished", "started": started}), encoding="utf-8")
    metadata = {"raytorch_run": str(folder), "raytorch_kind": "train"}
    assert summary_of(job(metadata=metadata, status="FAILED", end_time=MILLISECONDS + 30_000)) is None
    assert summary_of(job(metadata=metadata, status="SUCCEEDED", end_time=MILLISECONDS + 90_000)) is not None
