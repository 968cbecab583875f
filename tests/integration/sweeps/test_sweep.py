"""Sweeps on a real Ray: killed half-way and resumed, stopped by hand; the best run trained again.

One of the trials diverges, and is told from a run that may be restarted.
"""

import csv
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import lone_runs
import pytest
import ray
import yaml
from commands import wait_until, without_warnings_of_no_network

from raytorch.config.file import load_config
from raytorch.runs.catalog import list_runs, read_history, read_summary
from raytorch.runs.checkpoint_manifest import latest_checkpoint
from raytorch.runs.plan import plan_run
from raytorch.runs.storage import RunFolder
from raytorch.sweeps.file import load_sweep
from raytorch.sweeps.sweep import SweepPlan, SweepStatus, plan_resumed_sweep, plan_sweep, run_sweep

pytestmark = pytest.mark.usefixtures("local_ray")

EPOCHS = 6
RATES = [1e-2, 1e-6, 2e-6, 1e30]
"""A good one, two that learn nothing, of which one at least is stopped early, and one that diverges."""


@pytest.fixture
def sweep_file(tmp_path: Path) -> Path:
    """Four trials of one worker; an epoch takes about half a second."""
    sweep = {
        "name": "rates",
        "run": {
            "model": {"name": "mlp", "hidden": [32], "dropout": 0.2},
            "optimizer": "sgd",
            "precision": "fp32",
            "epochs": EPOCHS,
            "batch_size": 4,
            "logging": {"every_steps": 50, "tensorboard": False},
        },
        "parameters": {"optimizer.lr": {"grid": RATES}},
        "asha": {"grace_epochs": 1, "reduction": 4},
        "storage": str(tmp_path / "runs"),
    }
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump(sweep), encoding="utf-8")
    return path


def test_a_sweep_that_is_killed_and_resumed(sweep_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder(str(tmp_path / "runs"), "killed")
    before = kill_half_way(sweep_file, folder)
    plan = plan_resumed_sweep(str(folder))
    assert [trial.config.optimizer.lr for trial in plan.sweep.trials] == RATES
    summary = run_sweep(plan)

    assert summary == json.loads((Path(folder.path) / "sweep.json").read_text(encoding="utf-8"))
    states = {row["trial"]: row["state"] for row in summary["trials"]}
    assert summary["state"] == "finished"
    assert set(states.values()) == {"finished", "stopped early", "failed"}
    assert states["trial-003"] == "failed"
    early = [row for row in summary["trials"] if row["state"] == "stopped early"]
    assert all(row["epoch"] < EPOCHS for row in early)
    assert len(list_runs(str(folder))) == len(RATES)  # each a full run
    for name, text in before.items():  # was not touched again
        assert (Path(folder.path) / name / "summary.json").read_text(encoding="utf-8") == text
    told = r"the loss became (nan|inf) at step \d+ of \d+; lower optimizer.lr \(now 1e\+30\)"
    assert re.search(told, summary["trials"][3]["error"])
    diverged = read_summary(place(folder, "trial-003"))
    assert (diverged["state"], diverged["restarts"], diverged["error"]["kind"]) == ("failed", 0, "DivergedError")
    assert latest_checkpoint(place(folder, "trial-003")) is None

    rows = list(csv.DictReader((Path(folder.path) / "results.csv").read_text(encoding="utf-8").splitlines()))
    assert {row["trial"]: row["state"] for row in rows} == states
    assert [float(row["optimizer.lr"]) for row in rows] == RATES
    assert (Path(folder.path) / "sweep.png").stat().st_size > 10_000
    best = summary["best"]
    finished = [float(row["test_accuracy"]) for row in rows if row["state"] == "finished"]
    assert best["metrics"]["accuracy"] == max(finished) > 0.8
    with lone_runs.in_place_of_ray(tmp_path, monkeypatch):
        again = lone_runs.recorded(plan_run(load_config(Path(folder.path) / "best.yaml")))
    assert again["metrics"] == best["metrics"]


def kill_half_way(sweep_file: Path, folder: RunFolder) -> dict[str, str]:
    """Kill a sweep's command when a trial is over and another has begun; the summaries of the trials that were over."""
    address = ray.get_runtime_context().gcs_address
    raytorch = Path(sys.executable).with_name("raytorch")
    command = [raytorch, "sweep", sweep_file, "--name", folder.name, "--address", address]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as running:
        try:
            wait_until(lambda: count(folder, "stopped", "finished") >= 1 and has_just_begun(folder), running)
        finally:
            running.kill()
        output, news = running.communicate()
    assert not output
    assert {line.split("-")[0] for line in without_warnings_of_no_network(news.decode()).splitlines()} == {
        "trial"
    }  # and nothing of Ray Tune's
    wait_until(lambda: count(folder, "lost") >= 1 and not count(folder, "running"))  # its trials end with it
    over = {name: read_summary(place(folder, name)) for name in folder.folders()}
    ended = [name for name, summary in over.items() if summary["state"] in ("finished", "stopped")]
    assert len(ended) < len(RATES)
    return {name: (Path(folder.path) / name / "summary.json").read_text(encoding="utf-8") for name in ended}


def test_a_lost_trial_goes_on_and_ctrl_c_leaves_a_sweep_to_resume(sweep_file: Path) -> None:
    endless = ["run.epochs=1000", "parameters={optimizer.lr: {grid: [0.01, 0.02]}}", "asha=null", "concurrency=1"]
    plan: SweepPlan = plan_sweep(load_sweep(sweep_file, endless), "stopped")
    trial = place(plan.folder, "trial-000")
    killed = resumed_from = 0
    pressed = False

    def kill_then_press_ctrl_c(status: SweepStatus) -> None:
        nonlocal killed, resumed_from, pressed
        if not killed and latest_checkpoint(trial):
            killed = read_summary(trial)["driver"]["pid"]
            os.kill(killed, signal.SIGKILL)
            resumed_from = int(str(latest_checkpoint(trial))[-8:])
        again = killed and read_summary(trial)["driver"]["pid"] != killed and status.trials[0]["state"] == "training"
        if again and not pressed:
            pressed = True
            wait_until(lambda: ray.available_resources().get("CPU") == 1)  # the killed trial's is free again
            raise KeyboardInterrupt

    stopped = run_sweep(plan, watch=kill_then_press_ctrl_c)
    assert stopped["state"] == "stopped"
    assert [row["state"] for row in stopped["trials"]] == ["stopped", "waiting"]
    assert read_summary(trial)["step"] > resumed_from > 0
    steps = [line["step"] for line in read_history(trial) if line["split"] == "train"]
    assert steps == sorted(set(steps))
    assert latest_checkpoint(trial) == f"checkpoint_{read_summary(trial)['step']:08d}"
    assert [result.is_over for result in plan_resumed_sweep(str(plan.folder)).results({})] == [False, False]


def place(folder: RunFolder, trial: str) -> RunFolder:
    return RunFolder(str(folder), trial)


def has_just_begun(folder: RunFolder) -> bool:
    """Whether a trial runs that has trained nothing yet, and so cannot end before its sweep is killed."""
    running = [summary["name"] for summary in list_runs(str(folder)) if summary["state"] == "running"]
    return any(not read_history(place(folder, name)) for name in running)


def count(folder: RunFolder, *states: str) -> int:
    return sum(summary["state"] in states for summary in list_runs(str(folder)))
