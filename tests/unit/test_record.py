"""What a driver writes down of its run, and the signs of life that it gives."""

import errno
import json
import os
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from raytorch.config import RunConfig
from raytorch.errors import Cause, DataError, RunExistsError, StorageError, TrainingError, UserError
from raytorch.runs import live_record
from raytorch.runs.catalog import read_summary
from raytorch.runs.plan import RunPlan, plan_run
from raytorch.runs.status import Evaluation, RunStatus, WorkerFailure
from raytorch.runs.storage import RunFolder, translating_storage_errors
from raytorch.system.processes import Process
from raytorch.training.run_record import RunRecord

OUTCOME = {"state": "finished", "metrics": {"accuracy": 0.9}, "first_step_at": None, "seconds": {"training": 2.0}}


@pytest.fixture
def plan(tmp_path: Path) -> RunPlan:
    plan = plan_run(RunConfig(epochs=1, storage=str(tmp_path)), "mine")
    plan.folder.make()
    return plan


def summary(plan: RunPlan) -> Any:
    return json.loads(Path(plan.folder.file("summary.json")).read_text(encoding="utf-8"))


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def failed(cause: Cause, **details: Any) -> RunStatus:
    values = {"rank": 1, "kind": "Kind", "message": "what it said", "traceback": "Traceback of the user's"}
    flags = {"expected": False, "user_error": False}
    return RunStatus(attempts=1, begun_at=1.0, failures=[WorkerFailure(**values | flags | details, cause=cause)])


def test_a_run_that_begins_says_who_drives_it_and_when_it_was_seen(plan: RunPlan) -> None:
    with RunRecord(plan).writing():
        written = summary(plan)
    assert (written["name"], written["state"]) == ("mine", "running")
    assert Process(**written["driver"]) == Process.current()
    for key in ("started", "seen"):
        moment = datetime.fromisoformat(written[key])
        assert moment.utcoffset() is not None
        assert abs((datetime.now().astimezone() - moment).total_seconds()) < 60


def is_made(folder: Path) -> bool:
    """Whether a folder could be made: not while a file of its name is being written."""
    try:
        folder.mkdir()
    except FileExistsError:
        return False
    return True


def test_the_driver_is_seen_again_and_again_though_its_storage_fails_for_a_while(
    plan: RunPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    moments = iter(range(1_000_000))
    monkeypatch.setattr(live_record, "HEARTBEAT_S", 0.001)
    monkeypatch.setattr(live_record, "timestamp", lambda seconds=None: next(moments))
    file, aside = (Path(plan.folder.file(name)) for name in ("summary.json", "aside.json"))
    with RunRecord(plan).writing():
        wait_until(lambda: summary(plan)["seen"] > 3)
        wait_until(lambda: is_made(Path(f"{file}.partial")))  # nothing can be written there now
        time.sleep(0.05)
        file.rename(aside)
        Path(f"{file}.partial").rmdir()
        wait_until(file.exists)
        assert summary(plan)["seen"] > json.loads(aside.read_text(encoding="utf-8"))["seen"]


def test_nothing_is_written_over_the_end_of_a_run(plan: RunPlan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_record, "HEARTBEAT_S", 0.001)
    kept = RunRecord(plan)
    with kept.writing():
        returned = kept.end(RunStatus(outcome=OUTCOME, attempts=4, resizes=2, begun_at=kept.started + 3))
        file = Path(plan.folder.file("summary.json"))
        written = file.stat().st_mtime_ns
        time.sleep(0.05)
        assert file.stat().st_mtime_ns == written
    assert summary(plan) == returned
    assert (returned["state"], returned["restarts"], returned["resizes"]) == ("finished", 1, 2)
    assert returned["seconds"] | {"total": 0} == {"startup": 3.0, "training": 2.0, "total": 0}


def end(plan: RunPlan, **outcome: Any) -> None:
    kept = RunRecord(plan)
    with kept.writing():
        kept.end(RunStatus(outcome=OUTCOME | outcome, attempts=1, begun_at=kept.started))


def test_a_resumed_run_that_trains_no_step_keeps_its_speed(plan: RunPlan) -> None:
    end(plan, samples_per_s=9.0, first_step_at=time.time() + 100)
    before = summary(plan)
    end(plan, samples_per_s=None, first_step_at=None, metrics={"accuracy": 0.8})
    now = summary(plan)
    assert now["metrics"] == {"accuracy": 0.8}
    assert now["first_step_s"] > 50
    for key in ("samples_per_s", "first_step_at", "first_step_s"):
        assert now[key] == before[key]


@pytest.mark.parametrize(
    "attempt",
    [lambda kept: kept.abandon(), lambda kept: kept.fail(RuntimeError("it died"), failed(Cause.ERROR)), lambda _: None],
)
def test_what_a_run_came_to_outlives_an_attempt_that_comes_to_nothing(
    plan: RunPlan, attempt: Callable[[RunRecord], Any]
) -> None:
    end(plan, samples_per_s=9.0, step=7)
    with (kept := RunRecord(plan)).writing():
        attempt(kept)
    now = summary(plan)
    assert (now["metrics"], now["step"], now["samples_per_s"]) == ({"accuracy": 0.9}, 7, 9.0)
    assert now["state"] != "finished"


def test_a_run_that_fails_further_on_says_how_far_it_had_come(plan: RunPlan) -> None:
    end(plan, samples_per_s=9.0, step=7, seconds={"training": 2.0, "startup": 1.0})
    status = failed(Cause.ERROR)
    status.evaluations.append(Evaluation(63, 9.00004, {"accuracy": 0.5, "loss": 3.0}))
    with (kept := RunRecord(plan)).writing():
        kept.fail(RuntimeError("it died"), status)
    now = summary(plan)
    assert (now["state"], now["step"], now["epochs"]) == ("failed", 63, 9.0)
    assert now["metrics"] == {"accuracy": 0.5, "loss": 3.0}
    assert now["seconds"].keys() == {"training", "startup", "total"}


def test_a_run_of_an_older_version_shows_what_it_measured(plan: RunPlan) -> None:
    plan.folder.make()
    old = {"state": "finished", "started": "2026-01-02T03:04:05+00:00", "accuracy": 0.5, "loss": 2.0, "step": 3}
    plan.folder.write_json("summary.json", old)
    summary = read_summary(plan.folder)
    assert summary["metrics"] == {"accuracy": 0.5, "loss": 2.0}
    assert "accuracy" not in summary


def test_a_run_that_goes_on_says_how_far_it_has_come(plan: RunPlan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_record, "HEARTBEAT_S", 0.001)
    with (kept := RunRecord(plan)).writing():
        kept.note(RunStatus(evaluations=[Evaluation(63, 9.0, {"accuracy": 0.5, "loss": 3.0})]))
        wait_until(lambda: summary(plan).get("step") == 63)
        assert summary(plan)["state"] == "running"


def test_speed_is_told_with_what_it_was_reached_on(plan: RunPlan) -> None:
    end(plan, samples_per_s=9.0, first_step_at=time.time(), workers=2, device="H100", precision="bf16", backend="nccl")
    end(plan, samples_per_s=None, first_step_at=None, workers=1, device="cpu", precision="fp32", backend="gloo")
    now = summary(plan)
    assert (now["samples_per_s"], now["workers"], now["device"], now["backend"]) == (9.0, 2, "H100", "nccl")


def test_ctrl_c_while_the_end_is_written_does_not_lose_it(plan: RunPlan, monkeypatch: pytest.MonkeyPatch) -> None:
    write, interrupts = live_record.write_end, iter([KeyboardInterrupt()])

    def interrupted(*arguments: Any) -> bool:
        for interrupt in interrupts:
            raise interrupt
        return write(*arguments)

    monkeypatch.setattr(live_record, "write_end", interrupted)
    with pytest.raises(KeyboardInterrupt):
        end(plan, samples_per_s=9.0)
    assert (summary(plan)["state"], summary(plan)["samples_per_s"]) == ("finished", 9.0)


def test_a_new_run_does_not_take_over_the_record_of_a_script(plan: RunPlan) -> None:
    plan.folder.write_json("summary.json", {"state": "failed", "started": "", "kind": "script", "exit_status": 3})
    with pytest.raises(RunExistsError):
        plan_run(plan.config, "mine")


def test_an_error_that_a_run_got_over_is_forgotten(plan: RunPlan) -> None:
    with (kept := RunRecord(plan)).writing():
        kept.fail(RuntimeError("it died"), failed(Cause.ERROR))
    end(plan)
    assert "error" not in summary(plan)


def test_a_run_that_is_ended_at_once_is_stopped(plan: RunPlan) -> None:
    kept = RunRecord(plan)
    with kept.writing():
        kept.abandon()
    assert summary(plan)["state"] == "stopped"


def test_ctrl_c_does_not_undo_an_end_that_was_written(plan: RunPlan) -> None:
    kept = RunRecord(plan)
    with pytest.raises(KeyboardInterrupt), kept.writing():  # noqa: PT012
        kept.end(RunStatus(outcome=OUTCOME, attempts=1, begun_at=kept.started))
        raise KeyboardInterrupt
    assert summary(plan)["state"] == "finished"
    assert summary(plan)["seconds"]["training"] == 2.0


@pytest.mark.parametrize(
    ("status", "text"),
    [
        (failed(Cause.ERROR), "rank 1 failed\nTraceback of the user's"),
        (failed(Cause.ERROR, expected=True), "what it said"),
        (
            failed(Cause.GPU_MEMORY),
            "rank 1 failed\nTraceback of the user's\n"
            "the GPU's memory ran out; raise accumulate, which keeps batch_size, or lower batch_size",
        ),
    ],
)
def test_a_failure_is_recorded_with_its_cause_and_explained(plan: RunPlan, status: RunStatus, text: str) -> None:
    kept = RunRecord(plan)
    with kept.writing():
        error = kept.fail(RuntimeError("what Ray says"), status)
    assert isinstance(error, TrainingError)
    assert str(error) == f"{text}\nlogs: {plan.folder}/logs"
    written = summary(plan)
    assert (written["state"], written["restarts"], written["resizes"]) == ("failed", 0, 0)
    assert written["error"] == {
        "cause": status.failures[0].cause.value,
        "rank": 1,
        "kind": "Kind",
        "message": "what it said",
        "traceback": "Traceback of the user's",
    }


def test_wrong_input_is_told_as_such(plan: RunPlan) -> None:
    status = failed(Cause.ERROR, kind=DataError.__name__, expected=True, user_error=True)
    with (kept := RunRecord(plan)).writing():
        error = kept.fail(RuntimeError("what Ray says"), status)
    assert type(error) is UserError
    assert str(error) == "what it said"


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def fill_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on no new file can be written in a run's folder."""

    def write(folder: RunFolder, *_: object) -> None:
        with translating_storage_errors(str(folder)):
            raise FULL

    for name in ("write_json", "write_text", "write_bytes"):
        monkeypatch.setattr(RunFolder, name, write)


@pytest.mark.parametrize("length", [10, 100_000])
def test_a_full_disk_takes_the_end_of_a_run_all_the_same(
    plan: RunPlan, monkeypatch: pytest.MonkeyPatch, length: int
) -> None:
    status = failed(Cause.STORAGE, message=f"{FULL} {'m' * length}", traceback="t" * length)
    with (kept := RunRecord(plan)).writing():
        fill_disk(monkeypatch)
        error = kept.fail(RuntimeError("what Ray says"), status)
    assert isinstance(error, StorageError)
    assert str(error) == f"{FULL} {'m' * length}\n{Cause.STORAGE.advice}\nlogs: {plan.folder}/logs"
    written = summary(plan)
    assert (written["state"], written["error"]["cause"]) == ("failed", "storage")
    assert written["error"]["message"].startswith("[Errno 28] No space left on device m")
    assert ("traceback" in written["error"]) == (length == 10)


def test_what_ends_a_run_is_told_though_nothing_can_be_written(
    plan: RunPlan, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ZeroDivisionError), RunRecord(plan).writing():  # noqa: PT012
        fill_disk(monkeypatch)
        Path(plan.folder.file("summary.json")).unlink()
        raise ZeroDivisionError
    assert f"the end of {plan.folder} could not be written down: " in caplog.text
    assert "No space left on device" in caplog.text


def test_an_end_that_cannot_be_written_is_an_error(plan: RunPlan, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StorageError, match=r"mine has finished, but .*mine does not say so"), RunRecord(plan).writing():  # noqa: PT012
        fill_disk(monkeypatch)
        Path(plan.folder.file("summary.json")).unlink()
        kept = RunRecord(plan)
        kept.end(RunStatus(outcome=OUTCOME, attempts=1, begun_at=kept.started))


def test_an_exception_of_the_storage_is_its_own_cause(plan: RunPlan) -> None:
    with pytest.raises(OSError, match="No space"), RunRecord(plan).writing():
        raise FULL
    assert summary(plan)["error"]["cause"] == "storage"
