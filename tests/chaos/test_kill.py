"""Processes are killed and interrupted; runs end as if nothing had happened."""

import os
import signal
import subprocess
import sys
import time
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
import yaml
from whole_runs import SMALL_RUN, assert_bitwise_equal, plan, weights

from raytorch.errors import TrainingError
from raytorch.monitor import Status
from raytorch.runs import RunPlan, latest_checkpoint, read_summary
from raytorch.storage import RunFolder
from raytorch.trainer import train

LONGER = {"epochs": 8, "checkpoint": {"every_steps": 10, "every_epochs": None}}


def kill_at(step: int, rank: int) -> Any:
    """A watcher that kills a worker, once, when the run has come to ``step``."""
    killed = False

    def watch(status: Status) -> None:
        nonlocal killed
        if not killed and status.progress and status.progress["step"] >= step:
            os.kill(status.pids[rank], signal.SIGKILL)
            killed = True

    return watch


@pytest.fixture(scope="module")
def whole(local_ray: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunPlan, dict[str, Any]]:
    """A run that nothing happens to, and its summary."""
    run = plan(SMALL_RUN | LONGER, "whole", storage=str(tmp_path_factory.mktemp("whole")))
    return run, train(run)


@pytest.mark.usefixtures("local_ray")
def test_a_run_whose_worker_is_killed_ends_with_the_same_bits(
    small_run: dict[str, Any], whole: tuple[RunPlan, dict[str, Any]]
) -> None:
    run, full = whole
    broken = plan(small_run | LONGER, "broken")
    for_all_that = train(broken, watch=kill_at(step=30, rank=1))
    assert (full["restarts"], for_all_that["restarts"]) == (0, 1)
    assert for_all_that["step"] == full["step"]
    assert for_all_that["accuracy"] == full["accuracy"]
    assert_bitwise_equal(weights(run.folder), weights(broken.folder))


@pytest.mark.usefixtures("local_ray")
def test_a_worker_that_is_killed_too_often_ends_the_run_with_its_cause(small_run: dict[str, Any]) -> None:
    run: RunPlan = plan(small_run | {"epochs": 40}, "mortal", failure={"max_restarts": 0})
    with pytest.raises(TrainingError, match="a worker was lost, killed or crashed; raytorch train --resume goes on"):
        train(run, watch=kill_at(step=4, rank=1))
    summary = read_summary(run.folder)
    assert (summary["state"], summary["error"]["cause"]) == ("failed", "lost_worker")


def test_a_command_that_is_killed_leaves_a_run_to_resume(
    small_run: dict[str, Any], tmp_path: Path, whole: tuple[RunPlan, dict[str, Any]]
) -> None:
    raytorch = [str(Path(sys.executable).parent / "raytorch"), "train"]
    (tmp_path / "longer.yaml").write_text(yaml.safe_dump(small_run | LONGER))
    folder = RunFolder(small_run["storage"], "killed")
    with subprocess.Popen([*raytorch, tmp_path / "longer.yaml", "--name", "killed"], start_new_session=True) as command:
        try:
            wait_until(lambda: folder.exists() and latest_checkpoint(folder) is not None, command)
        finally:
            command.kill()
    assert read_summary(folder)["state"] == "lost"

    subprocess.run([*raytorch, "--resume", folder.path], check=True)
    assert read_summary(folder)["state"] == "finished"
    assert_bitwise_equal(weights(whole[0].folder), weights(folder))


def test_ctrl_c_leaves_a_checkpoint_to_resume_from(small_config: Path, tmp_path: Path) -> None:
    raytorch = [str(Path(sys.executable).parent / "raytorch"), "train"]
    folder = RunFolder(str(tmp_path / "runs"), "stopped")
    command = [*raytorch, str(small_config), "--set", "epochs=2000", "--name", "stopped"]
    with subprocess.Popen(
        command,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    ) as running:
        try:
            wait_until(lambda: folder.exists() and latest_checkpoint(folder) is not None, running)
            assert listening_beyond_this_machine(running.pid) == []
            os.killpg(running.pid, signal.SIGINT)  # as a terminal does: Ray's processes get it as well
            output, errors = running.communicate(timeout=120)
        finally:
            running.kill()
    assert running.returncode == 130, errors
    assert "stopping after a last checkpoint; press Ctrl-C again to end at once\n" in errors.decode()
    assert b"Traceback" not in output + errors
    assert f"raytorch train --resume {folder.path}" in output.decode()
    summary = read_summary(folder)
    assert summary["state"] == "stopped"
    assert latest_checkpoint(folder) == f"checkpoint_{summary['step']:08d}"


def listening_beyond_this_machine(pid: int) -> list[str]:
    """Where a process and those that it has started listen, but for the loopback."""
    import ray  # noqa: F401 - it brings psutil along

    # isort: split
    import psutil

    process = psutil.Process(pid)
    return [
        f"{each.name()} {connection.laddr.ip}:{connection.laddr.port}"
        for each in (process, *process.children(recursive=True))
        for connection in each.net_connections(kind="inet")
        if connection.status == psutil.CONN_LISTEN and not is_loopback(connection.laddr.ip)
    ]


def is_loopback(text: str) -> bool:
    address = ip_address(text)
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback


def wait_until(condition: Any, command: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert command.poll() is None, "the command ended before it was to be killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
