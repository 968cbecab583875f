"""Workers that raise, run out of memory, or wait in vain: one clear error with its cause."""

import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
import torch.distributed as dist
from ray import cloudpickle
from whole_runs import plan

from raytorch.distributed import Worker, failure_cause
from raytorch.distributed.collectives import all_reduce
from raytorch.errors import StorageError, TrainingError
from raytorch.runs.catalog import read_summary
from raytorch.runs.plan import WorkerJob
from raytorch.runs.status import RunStatus
from raytorch.training import driver
from raytorch.training.monitor import reporting_failures

train_on_worker = driver._train_on_worker
pytestmark = pytest.mark.usefixtures("local_ray")


def raise_on_rank_1() -> None:
    if Worker.current().rank == 1:
        broken_line_of_the_user()
    dist.barrier()


def broken_line_of_the_user() -> None:
    raise ZeroDivisionError("the user's own mistake")


def take_more_memory_than_allowed() -> None:
    taken = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + 2**30, taken + 2**30))
    torch.ones(2**30)


def wait_for_a_rank_that_hangs() -> None:
    if Worker.current().rank == 1:
        time.sleep(60)
    all_reduce(torch.ones(1))


def fill_the_disk(job: WorkerJob) -> None:
    """Train while no file may grow beyond some bytes, as on a disk that is full."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
    train_on_worker(job)


def fail(
    small_run: dict[str, Any], monkeypatch: pytest.MonkeyPatch, do: Callable[[], None], **changes: Any
) -> tuple[str, dict[str, Any]]:
    """Run ``do`` on the workers; returns what is raised and what is written down."""

    def on_worker(job: WorkerJob) -> None:
        rank = Worker.current().rank
        if rank == 0:
            ray.get(job.monitor.begin_attempt.remote())
        with reporting_failures(job.monitor, rank, failure_cause):
            do()

    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    monkeypatch.setattr(driver, "_train_on_worker", on_worker)
    run = plan(small_run, do.__name__, **changes)
    with pytest.raises(TrainingError) as failure:
        driver.run_training(run)
    summary = read_summary(run.folder)
    assert (summary["state"], summary["restarts"], summary["resizes"]) == ("failed", 0, 0)
    error: dict[str, Any] = summary["error"]
    return str(failure.value), error


def test_the_first_failing_ranks_own_traceback_is_shown_and_nothing_is_retried(
    small_run: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    message, error = fail(small_run, monkeypatch, raise_on_rank_1, failure={"max_restarts": 3})
    assert message.startswith("rank 1 failed\nTraceback (most recent call last):")
    assert "broken_line_of_the_user" in message
    assert "ZeroDivisionError: the user's own mistake\nlogs: " in message
    assert "/ray/" not in message
    assert (error["cause"], error["rank"], error["kind"]) == ("error", 1, "ZeroDivisionError")


def test_memory_that_runs_out_is_the_cause_and_nothing_is_retried(
    small_run: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = {"failure": {"max_restarts": 3}, "scaling": {"workers": 1}}
    message, error = fail(small_run, monkeypatch, take_more_memory_than_allowed, **alone)
    assert (error["cause"], error["rank"]) == ("host_memory", 0)
    assert "the machine's memory ran out; use fewer workers on each machine" in message


def test_a_rank_that_hangs_ends_in_a_timeout(small_run: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    changes = {"failure": {"max_restarts": 0}, "scaling": {"workers": 2, "timeout_s": 2}}
    message, error = fail(small_run, monkeypatch, wait_for_a_rank_that_hangs, **changes)
    assert (error["cause"], error["rank"]) == ("timeout", 0)
    assert "workers waited for one another longer than scaling.timeout_s" in message


def test_a_disk_that_is_full_is_the_cause_and_nothing_is_retried(small_run: dict[str, Any]) -> None:
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    alone = {"failure": {"max_restarts": 3}, "scaling": {"workers": 1}}
    run = plan(small_run, "full", **alone, checkpoint={"every_steps": 5})
    with pytest.raises(StorageError, match="the storage failed; make room or mend the access to it") as failure:
        driver.run_training(run, work=fill_the_disk)
    assert "File too large" in str(failure.value)
    summary = read_summary(run.folder)
    assert (summary["state"], summary["restarts"]) == ("failed", 0)
    assert (summary["error"]["cause"], summary["error"]["rank"]) == ("storage", 0)
    assert "rank 0 failed\nTraceback" in Path(run.folder.file("logs/rank-0.log")).read_text(encoding="utf-8")


def test_a_run_whose_folder_is_gone_ends_there_and_makes_no_new_one(small_run: dict[str, Any]) -> None:
    run = plan(small_run, "gone", epochs=2000, failure={"max_restarts": 3}, scaling={"workers": 1})
    folder = Path(run.folder.path)

    def remove(status: RunStatus) -> None:
        if status.progress and folder.exists():
            folder.rename(f"{folder}-elsewhere")  # at once, as an unmounted disk goes

    saving = "a checkpoint cannot be written"  # where that was under way
    with pytest.raises(StorageError, match=rf"^{folder}(?: is gone: it was deleted, or its storage is not|: {saving})"):
        driver.run_training(run, watch=remove)
    assert not folder.exists()
