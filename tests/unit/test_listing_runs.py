"""Listing the runs of a storage: their states, and what is left out."""

import json
import os
import socket
import subprocess
import sys
from dataclasses import asdict
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from run_folders import started
from typer.testing import CliRunner

from raytorch.cli.main import app
from raytorch.config import RunConfig
from raytorch.errors import UserError
from raytorch.runs.catalog import HEARTBEAT_S, LOST_AFTER_S, list_runs, read_history, read_summary
from raytorch.system.processes import Process


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return RunConfig(name="digits", epochs=1, storage=str(tmp_path / "runs"))


def summarized(config: RunConfig, name: str, **summary: Any) -> None:
    started(config, name).write_json("summary.json", {"name": name, **summary})


def ended_process() -> int:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        return process.pid


def ago(seconds: float) -> str:
    """The time so many seconds before now, in another zone than this host's."""
    return (datetime.now(timezone(timedelta(hours=7))) - timedelta(seconds=seconds)).isoformat(timespec="seconds")


def test_runs_are_listed_with_their_states_from_the_oldest_on(config: RunConfig) -> None:
    host = socket.gethostname()
    summarized(config, "c", started="2026-03-01", state="running", driver={"host": host, "pid": os.getpid()})
    summarized(config, "b", started="2026-02-01", state="running", driver={"host": host, "pid": ended_process()})
    summarized(config, "a", started="2026-04-01", state="running", driver={"host": "another", "pid": ended_process()})
    summarized(config, "d", started="2026-01-01", state="failed", driver={"host": host, "pid": ended_process()})
    assert [(run["name"], run["state"]) for run in list_runs(config.storage)] == [
        ("d", "failed"),
        ("b", "lost"),
        ("c", "running"),
        ("a", "running"),
    ]


@pytest.mark.parametrize(
    ("state", "host", "seconds", "read"),
    [
        ("running", "another", 0, "running"),
        ("running", "another", HEARTBEAT_S + 60, "running"),
        ("running", "another", -60, "running"),  # its clock is ahead
        ("running", "another", LOST_AFTER_S + 5, "lost"),
        ("running", socket.gethostname(), 0, "running"),  # its process may be there
        ("running", socket.gethostname(), LOST_AFTER_S + 5, "lost"),  # or another one of its number
        ("finished", "another", 10 * LOST_AFTER_S, "finished"),
        ("stopped", "another", 10 * LOST_AFTER_S, "stopped"),
    ],
)
def test_a_run_of_another_host_is_lost_when_its_driver_has_long_not_been_seen(
    config: RunConfig, state: str, host: str, seconds: float, read: str
) -> None:
    driver = {"host": host, "pid": os.getpid()}
    summarized(config, "mine", started=ago(9999), state=state, seen=ago(seconds), driver=driver)
    assert [run["state"] for run in list_runs(config.storage)] == [read]


HERE = Process.current()
OTHERS = {
    "itself": {},
    "a number that was given anew": {"began": (HERE.began or 0) + 1},
    "a container of that name": {"namespace": "pid:[1]"},
    "a machine of that name": {"boot": "0a1b2c"},
}
"""Drivers whose host has the name and whose process the number of these."""


@pytest.mark.skipif(HERE.began is None, reason="this system does not tell when a process began")
@pytest.mark.parametrize(
    ("driver", "seconds", "read"),
    [
        ("itself", LOST_AFTER_S + 5, "running"),  # it was stopped for a while, or its storage was out of reach
        ("a number that was given anew", 0, "lost"),
        ("a container of that name", 0, "running"),
        ("a container of that name", LOST_AFTER_S + 5, "lost"),
        ("a machine of that name", 0, "running"),
        ("a machine of that name", LOST_AFTER_S + 5, "lost"),
    ],
)
def test_a_driver_is_told_from_others_of_its_number(config: RunConfig, driver: str, seconds: float, read: str) -> None:
    named = asdict(HERE) | OTHERS[driver]
    summarized(config, "mine", started=ago(9999), state="running", seen=ago(seconds), driver=named)
    assert [run["state"] for run in list_runs(config.storage)] == [read]


def test_a_driver_in_another_container_is_not_taken_for_dead_as_its_number_is_not_here(config: RunConfig) -> None:
    named = asdict(HERE) | {"namespace": "pid:[1]", "pid": ended_process()}
    summarized(config, "mine", started=ago(9999), state="running", seen=ago(0), driver=named)
    assert [run["state"] for run in list_runs(config.storage)] == ["running"]


@pytest.mark.skipif(HERE.began is None, reason="this system does not tell that a process only waits for its parent")
def test_a_driver_that_has_ended_but_is_not_let_go_of_is_lost(config: RunConfig) -> None:
    tells = "import json; from raytorch.system.processes import Process; print(json.dumps(vars(Process.current())))"
    with subprocess.Popen([sys.executable, "-c", tells], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        named = json.loads(process.stdout.read())
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        summarized(config, "mine", started=ago(9), state="running", seen=ago(0), driver=named)
        assert [run["state"] for run in list_runs(config.storage)] == ["lost"]


def test_the_list_says_why_runs_failed_where_it_was_no_error_in_them(config: RunConfig) -> None:
    summarized(config, "a", started="2026-01-01", state="failed", error={"cause": "lost_node"})
    summarized(config, "b", started="2026-01-02", state="failed", error={"cause": "error"})
    listed = CliRunner().invoke(app, ["runs", "--storage", config.storage])
    assert [line.split()[:3] for line in listed.output.splitlines()[1:]] == [
        ["a", "failed:", "lost_node"],
        ["b", "failed", "0.0"],
    ]


@pytest.mark.parametrize(
    "text",
    [
        *(None, "", '{"state": ', "{}", "[]", '{"state": "finished"}', '{"state": 1, "started": ""}'),
        '{"state": "running", "started": "", "driver": {"host": "here", "pid": "7"}}',
        '{"state": "finished", "started": "", "seconds": [1]}',
    ],
)
def test_a_run_whose_summary_is_missing_or_damaged_is_lost(config: RunConfig, text: str | None) -> None:
    folder = started(config)
    if text is not None:
        folder.write_text("summary.json", text)
    lost = {"name": "mine", "path": folder.path, "state": "lost", "started": ""}
    assert read_summary(folder) == lost
    assert list_runs(config.storage) == [lost]
    summarized(config, "other", state="finished", started="2026-01-01")
    assert [run["name"] for run in list_runs(config.storage)] == ["mine", "other"]


def test_other_folders_and_files_are_no_runs(config: RunConfig, tmp_path: Path) -> None:
    assert list_runs(config.storage) == []
    (tmp_path / "runs" / "notes").mkdir(parents=True)
    (tmp_path / "runs" / "config.yaml").write_text("", encoding="utf-8")
    assert list_runs(config.storage) == []


def test_a_storage_that_is_a_file_has_no_runs_to_list(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(UserError, match=f"^{tmp_path}/file cannot be used: .*; check the storage and your access"):
        list_runs(str(tmp_path / "file"))


def test_a_run_that_recorded_nothing_has_no_history(config: RunConfig) -> None:
    folder = started(config)
    assert read_history(folder) == []
    line = {"step": 1, "epoch": 0.5, "split": "train", "loss": None}
    folder.write_text("metrics.jsonl", json.dumps(line) + "\n")
    assert read_history(folder) == [line]
