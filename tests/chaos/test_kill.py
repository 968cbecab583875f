"""Processes are killed and interrupted; runs end as if nothing had happened."""

import os
import signal
import sys
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
from ray import cloudpickle  # which brings psutil along

# isort: split
import killing
import psutil
import rank_runs
from commands import command, is_alive, kill_part, wait_until, with_its_children
from whole_runs import assert_bitwise_equal, plan, weights

from raytorch.errors import TrainingError
from raytorch.runs.catalog import read_evaluations, read_history, read_summary
from raytorch.runs.checkpoint_manifest import latest_checkpoint
from raytorch.runs.plan import RunPlan, WorkerJob
from raytorch.runs.status import RunStatus
from raytorch.runs.storage import RunFolder
from raytorch.training.driver import run_training

KILLS = int(os.environ.get("RAYTORCH_KILLS", "1"))
"""How often a run is killed; the suite is content with few."""
ALONE = {"epochs": 100_000, "scaling": {"workers": 1}}
ENDLESS = ["--set", "epochs=100000", "--set", "scaling.workers=1"]


def train_and_tell_steps(job: WorkerJob) -> None:
    """Train, and write down each step."""
    from raytorch.training.worker import train_on_worker

    killing.tell_steps()
    train_on_worker(job)


@pytest.mark.timeout(600 + 180 * KILLS)
@pytest.mark.usefixtures("local_ray")
def test_a_run_that_is_killed_again_and_again_ends_with_the_same_bits(
    small_run: dict[str, Any], tmp_path: Path
) -> None:
    """The same as those of two processes without Ray."""
    for module in (killing, sys.modules[__name__]):
        cloudpickle.register_pickle_by_value(module)
    whole, broken = (plan(small_run | killing.often_saved(KILLS), name) for name in ("whole", "broken"))
    assert rank_runs.train(whole, tmp_path) == 0
    with killing.Killer(broken.folder, KILLS) as killer:

        def watch(status: RunStatus) -> None:
            killer.pids = dict(status.pids)

        for_all_that = run_training(broken, watch=watch, work=train_and_tell_steps)
    assert for_all_that["restarts"] == KILLS
    full = read_evaluations(whole.folder)[-1]
    assert (for_all_that["step"], for_all_that["metrics"]) == (full.step, full.metrics)
    assert_bitwise_equal(weights(whole.folder), weights(broken.folder))
    killer.check()


def kill_at(step: int, rank: int) -> Any:
    """A watcher that kills a worker, once, when the run has come to ``step``."""
    killed = False

    def watch(status: RunStatus) -> None:
        nonlocal killed
        if not killed and status.progress and status.progress["step"] >= step:
            os.kill(status.pids[rank], signal.SIGKILL)
            killed = True

    return watch


@pytest.mark.usefixtures("local_ray")
def test_a_worker_that_is_killed_too_often_ends_the_run_with_its_cause(small_run: dict[str, Any]) -> None:
    run: RunPlan = plan(small_run | ALONE, "mortal", failure={"max_restarts": 0})
    with pytest.raises(TrainingError, match="a worker was lost, killed or crashed; resume goes on"):
        run_training(run, watch=kill_at(step=4, rank=0))
    summary = read_summary(run.folder)
    assert (summary["state"], summary["error"]["cause"]) == ("failed", "lost_worker")


@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("ray::RunMonitor", "the run's monitor died, killed or crashed"),
        ("ray::WorkerGroup", "the run's controller died, killed or crashed"),
    ],
)
def test_an_actor_of_a_run_that_is_killed_is_the_cause_that_it_ends_with(
    small_run: dict[str, Any], name: str, told: str
) -> None:
    run: RunPlan = plan(small_run | ALONE, "orphaned")
    killed = False

    def watch(status: RunStatus) -> None:
        nonlocal killed
        if not killed and latest_checkpoint(run.folder):
            kill_part(os.getpid(), name)
            killed = True

    with pytest.raises(TrainingError, match=f"^{told}\n"):
        run_training(run, watch=watch)
    summary = read_summary(run.folder)
    assert (summary["state"], summary["error"]["cause"], summary["error"]["message"]) == ("failed", "lost_ray", told)


def test_a_command_is_killed_resumed_and_interrupted(small_config: Path, tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path / "runs"), "endless")
    with command(str(small_config), *ENDLESS, "--name", "endless") as running:
        wait_until(lambda: folder.exists() and latest_checkpoint(folder) is not None, running)
        processes = with_its_children(running.pid)
        assert listening_beyond_this_machine(processes) == []
        workers = [process for process in processes if process.name().startswith("ray::RayTrain")]
        assert len(workers) == 1
        running.kill()
    wait_until(lambda: not any(is_alive(worker) for worker in workers))
    assert read_summary(folder)["state"] == "lost"
    killed_at = latest_checkpoint(folder)

    with command("--resume", folder.path) as running:
        wait_until(lambda: latest_checkpoint(folder) != killed_at, running)
        wait_until(lambda: not any(is_alive(process) for process in processes))  # Ray's agents as well
        os.killpg(running.pid, signal.SIGINT)  # as a terminal does: Ray's processes get it as well
        output, errors = running.communicate(timeout=120)
    assert running.returncode == 130, errors
    assert "stopping after a last checkpoint; press Ctrl-C again to end at once\n" in errors.decode()
    assert b"Traceback" not in output + errors
    assert f"raytorch train --resume {folder.path}" in output.decode()
    summary = read_summary(folder)
    assert summary["state"] == "stopped"
    assert latest_checkpoint(folder) == f"checkpoint_{summary['step']:08d}"
    steps = [line["step"] for line in read_history(folder) if line["split"] == "train"]
    assert steps == sorted(set(steps))


def listening_beyond_this_machine(processes: list[psutil.Process]) -> list[str]:
    """Where processes listen, but for the loopback."""
    return [
        f"{process.name()} {connection.laddr.ip}:{connection.laddr.port}"
        for process in processes
        for connection in process.net_connections(kind="inet")
        if connection.status == psutil.CONN_LISTEN and not is_loopback(connection.laddr.ip)
    ]


def is_loopback(text: str) -> bool:
    address = ip_address(text)
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback
