"""Runs on data in files whose workers and readers are killed end with the weights of one that was left alone."""

import os
import signal
from pathlib import Path
from random import Random
from typing import Any

import pytest
from ray import cloudpickle  # noqa: F401 (which brings psutil along)

# isort: split
import psutil
from source_files import SOURCES
from whole_runs import assert_bitwise_equal, weights

from raytorch.config.file import from_data
from raytorch.runs.plan import plan_run
from raytorch.runs.status import RunStatus
from raytorch.training.driver import run_training

KILLED = os.environ.get("RAYTORCH_KILLED_SOURCES", "").split()
"""Which are trained on. The suite has a run whose reader is killed, and resumes each source without Ray."""


class Killer:
    """Kills a worker at a random step, and later a reader."""

    def __init__(self) -> None:
        self._random = Random()
        self._left = [("worker", self._random.randrange(5, 50)), ("reader", self._random.randrange(60, 110))]
        self._before: set[int] = set()
        self._killed_at: Any = None
        self.killed: list[str] = []

    def __call__(self, status: RunStatus) -> None:
        """Watch a run."""
        step, pids = (status.progress or {}).get("step", 0), set(status.pids.values())
        if not self._left or len(pids) < 2 or pids & self._before or step < self._left[0][1]:
            return
        if step == self._killed_at:  # which is still told of before the workers that follow have begun
            return
        victim = self._random.choice(sorted(pids))
        if self._left[0][0] == "reader":
            below = psutil.Process(victim).children(recursive=True)
            victim = self._random.choice([child.pid for child in below if not child.children()])
        os.kill(victim, signal.SIGKILL)
        self._before |= pids
        self._killed_at = step
        self.killed.append(f"{self._left.pop(0)[0]} at step {step}")


@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize("source", [name for name in SOURCES if name in KILLED])
def test_a_worker_and_a_reader_are_killed(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    made = SOURCES[source](tmp_path / "data")
    run: dict[str, Any] = {
        **made,
        "data": made["data"] | {"readers": 1},
        "steps": 400,
        "batch_size": 8,
        "precision": "fp32",
        "scaling": {"workers": 2},
        "checkpoint": {"every_steps": 4, "every_epochs": None, "keep": 2},
        "failure": {"max_restarts": -1},
        "storage": str(tmp_path / "runs"),
    }
    whole, broken = (plan_run(from_data(run), name) for name in ("whole", "broken"))
    full = run_training(whole)
    killer = Killer()
    for_all_that = run_training(broken, watch=killer)
    print(source, "killed:", ", ".join(killer.killed))
    assert (full["restarts"], for_all_that["restarts"], len(killer.killed)) == (0, 2, 2)
    assert for_all_that["metrics"] == full["metrics"]
    assert_bitwise_equal(weights(whole.folder), weights(broken.folder))
