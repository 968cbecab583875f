"""Meters and run records."""

import json
import logging
import os
import socket
import subprocess
import sys
import time as clock
import warnings
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tensorboardX.proto.event_pb2 import Event, SessionLog

from raytorch.runs import metrics
from raytorch.runs.metrics import (
    MetricsLog,
    Pace,
    PhaseClock,
    Throughput,
    log_to_file,
    measured,
    read_metrics,
    versions,
)
from raytorch.training.batches import queued_work


class Time:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> Time:
    time = Time()
    monkeypatch.setattr(metrics, "time", SimpleNamespace(time=clock.time, perf_counter=time))
    return time


# -- phases ------------------------------------------------------------------------------------------------------------


def test_each_second_counts_for_one_phase(time: Time) -> None:
    clock = PhaseClock()
    time.now += 1
    with clock.phase("evaluating"):
        time.now += 2
        with clock.phase("checkpointing"):
            time.now += 4
        time.now += 8
    time.now += 16
    assert clock.read() == {"training": 17, "data": 0, "evaluating": 10, "checkpointing": 4}
    assert clock.read() == {"training": 17, "data": 0, "evaluating": 10, "checkpointing": 4}


def test_a_phase_ends_when_its_block_raises(time: Time) -> None:
    clock = PhaseClock()
    with pytest.raises(ZeroDivisionError), clock.phase("data"):  # noqa: PT012
        time.now += 1
        raise ZeroDivisionError
    time.now += 2
    assert clock.read() == {"training": 2, "data": 1, "evaluating": 0, "checkpointing": 0}


def test_waiting_counts_what_the_items_take_and_not_what_is_done_with_them(time: Time) -> None:
    def slow_items() -> Iterator[int]:
        for item in range(3):
            time.now += 1
            yield item
        time.now += 0.5

    clock, seen = PhaseClock(), []
    for item in clock.waiting(slow_items()):
        time.now += 10
        seen.append(item)
    assert seen == [0, 1, 2]
    assert clock.read() == {"training": 30, "data": 3.5, "evaluating": 0, "checkpointing": 0}
    assert clock.working_seconds() == 33.5


def test_waiting_while_the_device_is_at_work_is_no_waiting_of_a_run(time: Time) -> None:
    clock, throughput = PhaseClock(), Throughput()
    at_work = iter([True, False, True])

    def slow_items() -> Iterator[int]:
        for seconds in (3, 2, 1):
            time.now += seconds
            yield seconds

    throughput.count(0, clock)
    for _ in clock.waiting(slow_items(), lambda: lambda: next(at_work)):
        time.now += 2
    throughput.count(60, clock)
    assert clock.read()["data"] == 6
    assert throughput.overall()[:2] == (5, round(2 / 12, 4))


@pytest.mark.parametrize("is_done", [True, False])
def test_work_of_a_gpu_is_under_way_until_it_has_come_to_its_mark(
    monkeypatch: pytest.MonkeyPatch, is_done: bool
) -> None:
    recorded: list[str] = []
    event = SimpleNamespace(record=recorded.append, query=lambda: is_done)
    monkeypatch.setattr(torch.cuda, "Event", lambda: event)
    monkeypatch.setattr(torch.cuda, "current_stream", str)
    mark = queued_work(torch.device("cuda:1"))
    assert recorded == []
    is_under_way = mark()
    assert recorded == ["cuda:1"]
    assert is_under_way() is not is_done
    assert queued_work(torch.device("cpu"))()() is False


def test_a_loop_that_is_left_early_goes_on_as_training(time: Time) -> None:
    clock = PhaseClock()
    for _ in clock.waiting([1, 2, 3]):
        break
    time.now += 5
    assert clock.read()["training"] == 5


def test_a_resumed_clock_goes_on_from_its_checkpoint(time: Time) -> None:
    clock = PhaseClock({"training": 5.0, "data": 1.0})
    time.now += 2
    assert clock.read() == {"training": 7, "data": 1, "evaluating": 0, "checkpointing": 0}


def test_throughput_leaves_out_the_first_step_and_all_that_is_not_training(time: Time) -> None:
    clock, throughput = PhaseClock(), Throughput()
    assert throughput.first_step_at is None
    time.now += 60  # the first step waits for everything
    throughput.count(64, clock)
    assert throughput.first_step_at is not None
    assert (throughput.overall(), throughput.recent()) == (Pace(), Pace())
    time.now += 1.5
    with clock.phase("data"):
        time.now += 0.5
    throughput.count(128, clock)
    assert throughput.recent()[:2] == (32, 0.25)
    assert throughput.recent() == Pace()
    with clock.phase("evaluating"):
        time.now += 100
    time.now += 1
    throughput.count(192, clock)
    assert throughput.recent()[:2] == (64, 0)
    assert throughput.overall()[:2] == pytest.approx((128 / 3, 1 / 6), abs=0.05)


# -- metrics.jsonl -----------------------------------------------------------------------------------------------------


def test_a_line_holds_step_epoch_split_time_and_values(tmp_path: Path) -> None:
    with closing(MetricsLog(tmp_path, tensorboard=False)) as log:
        log.write("train", 3, 1 / 3, {"loss": 0.5, "samples_per_s": None})
        [line] = lines(tmp_path)  # there at once
    seconds = line.pop("time")
    assert seconds > 1.7e9
    assert line == {"step": 3, "epoch": 0.3333, "split": "train", "loss": 0.5, "samples_per_s": None}


def lines(folder: Path) -> list[dict[str, Any]]:
    with (folder / "metrics.jsonl").open("rb") as stream:
        return list(read_metrics(stream, "metrics.jsonl"))


def recorded(folder: Path) -> list[int]:
    return [line["step"] for line in lines(folder)]


def test_a_resumed_run_forgets_the_steps_that_it_takes_again(tmp_path: Path) -> None:
    with closing(MetricsLog(tmp_path, tensorboard=False)) as log:
        for step in range(1, 6):
            log.write("train", step, 0.0, {"loss": 1.0})
        log.write("test", 5, 0.0, {"loss": 1.0})
        assert [log.lines_of(step) for step in (5, 6)] == [2, 0]
    with closing(MetricsLog(tmp_path, resume_step=5, lines=1, tensorboard=False)) as log:
        assert [line["split"] for line in lines(tmp_path)] == ["train"] * 5
        log.write("test", 5, 0.0, {"loss": 1.0})
        assert log.lines_of(5) == 2
    with closing(MetricsLog(tmp_path, resume_step=3, lines=1, tensorboard=False)) as log:
        assert recorded(tmp_path) == [1, 2, 3]
        log.write("train", 4, 0.0, {"loss": 2.0})
    assert recorded(tmp_path) == [1, 2, 3, 4]
    with closing(MetricsLog(tmp_path, tensorboard=False)):
        assert recorded(tmp_path) == []
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_numbers_for_more_than_a_line_are_told_in_several(tmp_path: Path) -> None:
    numbers = {f"{'number ' * 20}{number}": float(number) for number in range(2000)}
    with closing(MetricsLog(tmp_path, tensorboard=False)) as log:
        log.write("train", 1, 0.0, numbers)
        log.write("train", 2, 0.0, {})
        assert log.lines_of(2) == 1
    told = lines(tmp_path)
    assert {key: it for line in told if line["step"] == 1 for key, it in measured(line).items()} == numbers
    assert recorded(tmp_path)[-2:] == [1, 2]


def test_a_torn_last_line_is_left_out_and_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "epoch": 0.1, "split": "train"}\n{"step": 2, "spl', encoding="utf-8")
    assert recorded(tmp_path) == [1]
    with closing(MetricsLog(tmp_path, resume_step=2, tensorboard=False)) as log:
        log.write("train", 3, 0.0, {})
    assert recorded(tmp_path) == [1, 3]
    assert all(json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())


@pytest.mark.parametrize(
    "line",
    [
        *(b"{", b"[]", b"7", b"null", b"{}", b"caf\xe9", b"[" * 5000, b"\x00"),
        b'{"step": 2}',
        b'{"step": 2, "epoch": 0.2}',
        b'{"step": 2, "epoch": 0.2, "split": ["train"]}',
        b'{"step": 2, "epoch": 0.2, "split": "other"}',
        b'{"step": "2", "epoch": 0.2, "split": "train"}',
        b'{"step": 2.5, "epoch": 0.2, "split": "train"}',
        b'{"step": null, "epoch": 0.2, "split": "train"}',
        b'{"step": 2, "epoch": "0.2", "split": "train"}',
        b'{"step": 2, "epoch": 0.2, "split": "train", "loss": "low"}',
        b'{"step": 2, "split": "test", "accuracy": 0.5}',
    ],
)
def test_an_odd_line_is_left_out_and_told(tmp_path: Path, line: bytes, caplog: pytest.LogCaptureFixture) -> None:
    with closing(MetricsLog(tmp_path, tensorboard=False)) as log:
        log.write("train", 1, 0.1, {})
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(line + b"\n")
    with closing(MetricsLog(tmp_path, resume_step=2, tensorboard=False)) as log:
        log.write("train", 3, 0.3, {})
    assert caplog.messages == [f"{tmp_path}/metrics.jsonl: 1 lines are damaged, or none of raytorch's, and left out"]
    assert recorded(tmp_path) == [1, 3]


def test_metrics_survive_a_kill_while_they_are_cut_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with closing(MetricsLog(tmp_path, tensorboard=False)) as log:
        log.write("train", 1, 0.0, {})

    def killed(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        MetricsLog(tmp_path, resume_step=1, tensorboard=False)
    assert recorded(tmp_path) == [1]


def test_tensorboard_gets_every_number(tmp_path: Path) -> None:
    with closing(MetricsLog(tmp_path)) as log:
        log.write("test", 7, 1.0, {"accuracy": 0.5, "nothing": None})
    [events] = (tmp_path / "tensorboard").glob("events.*")
    content = events.read_bytes()
    assert b"test/accuracy" in content
    assert b"nothing" not in content


def events(folder: Path) -> Iterator[Any]:
    """The TensorBoard events of a run, in the order in which they were written."""
    for path in sorted((folder / "tensorboard").iterdir(), key=lambda path: path.stat().st_mtime_ns):
        content = path.read_bytes()
        while content:
            size = int.from_bytes(content[:8], "little")
            yield Event.FromString(content[12 : 12 + size])
            content = content[16 + size :]


def shown(folder: Path) -> list[tuple[int, float]]:
    """Step and value of what TensorBoard shows: a writer's start takes back what others wrote of later steps."""
    points: list[tuple[int, float]] = []
    for event in events(folder):
        if event.session_log.status == SessionLog.START:
            points = [point for point in points if point[0] < event.step]
        points += [(event.step, value.simple_value) for value in event.summary.value]
    return points


@pytest.mark.parametrize("resumed_at", [0, 1])
def test_tensorboard_forgets_the_steps_that_are_taken_again_also_from_the_first(
    tmp_path: Path, resumed_at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for attempt, resume_step in enumerate([0, resumed_at]):
        monkeypatch.setattr(socket, "gethostname", lambda host=f"host-{attempt}": host)  # a part of the file's name
        with closing(MetricsLog(tmp_path, resume_step=resume_step)) as log:
            for step in range(resume_step + 1, 4):
                log.write("train", step, 0.0, {"loss": float(attempt)})
    assert shown(tmp_path) == [(step, float(step > resumed_at)) for step in range(1, 4)]


# -- logs --------------------------------------------------------------------------------------------------------------


def test_a_log_file_takes_raytorchs_messages_and_warnings_while_the_block_runs(tmp_path: Path) -> None:
    path, logger = tmp_path / "logs" / "rank-0.log", logging.getLogger("raytorch")
    path.parent.mkdir()
    before = (logger.level, logger.propagate, list(logger.handlers))
    with warnings.catch_warnings(action="always"), log_to_file(path.open("ab")) as log:
        log.info("in the block")
        warnings.warn("a warning", stacklevel=1)
    assert (logger.level, logger.propagate, logger.handlers) == before
    logger.error("after the block")
    with log_to_file(path.open("ab")):
        logger.info("again")
    text = path.read_text(encoding="utf-8")
    assert [line.partition(" INFO ")[2] for line in text.splitlines() if " INFO " in line] == ["in the block", "again"]
    assert "UserWarning: a warning" in text
    assert "after the block" not in text


def test_versions_name_what_decides_the_numbers() -> None:
    assert versions().keys() == {"python", "raytorch", "torch", "torchvision", "ray", "numpy"}


FILLS_THE_DISK = """
import resource, sys
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from raytorch.runs.metrics import MetricsLog
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
with closing(MetricsLog(Path(sys.argv[1]))) as log:  # the events take more than the lines
    for step in range(1000):
        log.write("train", step, 0.5, {f"n{number}": 0.5 for number in range(50)})
"""


def test_a_full_disk_is_told_to_whoever_writes_metrics(tmp_path: Path) -> None:
    ended = subprocess.run([sys.executable, "-c", FILLS_THE_DISK, tmp_path], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1
    assert "OSError: [Errno 27] File too large" in ended.stderr


LOGS_MUCH = """
import resource, sys
from pathlib import Path
from types import SimpleNamespace
from raytorch.runs.metrics import log_to_file
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
with log_to_file(Path(sys.argv[1]).open("wb")) as log:
    for number in range(1000):
        log.info("line %d of a thousand, as they are", number)
print("trained on")
"""


def test_a_log_that_takes_no_more_ends_nothing_and_is_told_once(tmp_path: Path) -> None:
    command = [sys.executable, "-c", LOGS_MUCH, str(tmp_path / "rank-0.log")]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout) == (0, "trained on\n")
    assert ended.stderr.count("--- Logging error ---") == 1
