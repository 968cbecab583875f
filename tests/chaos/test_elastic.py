"""Nodes of a cluster are killed and added: elastic runs go on with the workers that there are, and miss no sample."""

import json
import os
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from own_ray import rays_leftovers
from ray import cloudpickle
from ray.cluster_utils import Cluster
from ray.util.placement_group import placement_group_table
from whole_runs import plan

from raytorch.errors import TrainingError
from raytorch.runs.catalog import read_summary
from raytorch.runs.plan import WorkerJob
from raytorch.runs.status import RunStatus
from raytorch.training import driver

SAMPLES, BATCH, EPOCHS = 1_500, 64, 6
SOON = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_failure_threshold": 4}
"""Have Ray notice the death of a node after some 2 s."""


class Nodes:
    """A head that no worker fits on, and nodes with room for one each."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._nodes: list[Any] = []
        self.add()
        self.add()

    def add(self) -> None:
        self._nodes.append(self._cluster.add_node(num_cpus=1))

    def kill(self) -> None:
        """Kill a node's raylet, with which its workers end."""
        with rays_leftovers():
            self._cluster.remove_node(self._nodes.pop(), allow_graceful=False)

    def close(self) -> None:
        """Shut the cluster down."""
        with rays_leftovers():
            self._cluster.shutdown()
            del self._cluster, self._nodes

    def replace_lost(self) -> None:
        while len(self._nodes) < 2:
            self.add()


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    cluster = Cluster(True, head_node_args={"num_cpus": 0, "include_dashboard": False, "_system_config": SOON})
    ray.init(cluster.address, log_to_driver=False, logging_level="ERROR")
    nodes = Nodes(cluster)
    del cluster
    yield nodes
    ray.shutdown()
    nodes.close()


def train_and_record(job: WorkerJob) -> None:
    """Train, and write down after each step which samples this rank was given.

    A group of one takes its time, so that there is some to add a node, and saves only when it is asked to.
    """
    from raytorch.training import loop, progress, worker
    from raytorch.training.stopping import DriverRequest

    def save_is_due(self: Any) -> bool:
        asked: bool = self.request is DriverRequest.SAVE
        return asked if self.worker.world_size == 1 else is_due(self)

    is_due = progress.RunProgress._save_is_due
    load, train_step = loop.load_splits, loop.Trainer.train_step
    given: list[int] = []

    def load_recording(*given_to_load: Any) -> Any:
        splits: Any = load(*given_to_load)
        targets = splits.train.targets
        splits.train.targets = lambda index: (given.extend(index.tolist()), targets(index))[1]
        return splits

    def step_recorded(trainer: Any, micro_batches: Any) -> None:
        train_step(trainer, micro_batches)
        run = trainer.run
        alone = run.worker.world_size == 1
        time.sleep(0.5 if alone else 0.02)
        line = {
            "group": os.environ["MASTER_PORT"],
            "time": time.time(),
            "rank": run.worker.rank,
            "workers": run.worker.world_size,
            "step": run.step,
            "epoch": trainer.batches.loader.epoch,
            "samples": given[:],
        }
        given.clear()
        with Path(job.plan.folder.file(f"given-{os.getpid()}.jsonl")).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    loop.load_splits = load_recording
    progress.RunProgress._save_is_due = save_is_due  # type: ignore[method-assign]
    loop.Trainer.train_step = step_recorded  # type: ignore[method-assign]
    worker.train_on_worker(job)


class Trajectory:
    """The steps that led to the final model, put together from what the workers wrote down."""

    def __init__(self, folder: str) -> None:
        groups: dict[str, list[Any]] = defaultdict(list)
        for file in Path(folder).glob("given-*.jsonl"):
            for line in map(json.loads, file.read_text(encoding="utf-8").splitlines()):
                groups[line["group"]].append(line)
        attempts = sorted(groups.values(), key=lambda lines: min(line["time"] for line in lines))
        self.first_steps = [min(line["step"] for line in lines) for lines in attempts]
        self.workers = [lines[0]["workers"] for lines in attempts]
        self.steps: dict[int, list[Any]] = {}
        for lines, first in zip(attempts, self.first_steps, strict=True):
            self.steps = {step: parts for step, parts in self.steps.items() if step < first}
            for line in lines:
                self.steps.setdefault(line["step"], []).append(line)

    def epochs(self) -> dict[int, list[list[int]]]:
        """The samples of each step of each epoch, over all ranks."""
        found: dict[int, list[list[int]]] = defaultdict(list)
        for step in sorted(self.steps):
            parts = self.steps[step]
            assert sorted(part["rank"] for part in parts) == list(range(parts[0]["workers"]))
            found[parts[0]["epoch"]].append([sample for part in parts for sample in part["samples"]])
        return found


def test_a_run_whose_node_is_killed_goes_on_with_fewer_workers_then_with_more_and_sees_each_sample_once(
    nodes: Nodes, small_run: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver, "_train_on_worker", train_and_record)
    monkeypatch.setattr(driver, "RESIZE_INTERVAL_S", 1.0)
    monkeypatch.setenv(
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "3"
    )  # wait less for a node that is not known to be dead
    todo = [
        (lambda news: news["workers"] == 2 and news["step"] >= 30, nodes.kill),
        (lambda news: news["workers"] == 1, nodes.add),
    ]

    def watch(status: RunStatus) -> None:
        if todo and status.progress and todo[0][0](status.progress):
            todo.pop(0)[1]()

    run = plan(
        small_run,
        "elastic",
        epochs=EPOCHS,
        scaling={"workers": {"min": 1, "max": 4}},
        checkpoint={"every_steps": 20, "every_epochs": None},
        failure={"max_restarts": 1},  # a change of size is none
    )
    summary = driver.run_training(run, watch=watch)

    assert (summary["state"], summary["workers"]) == ("finished", 2)
    assert (summary["restarts"], summary["resizes"]) == (1, 1)
    trajectory = Trajectory(run.folder.path)
    assert trajectory.workers == [2, 1, 2]
    _, second, third = trajectory.first_steps
    assert second % 20 == 1  # from the latest checkpoint
    assert third > second > 1  # from one that was saved for the purpose
    epochs = trajectory.epochs()
    assert sorted(epochs) == list(range(EPOCHS))
    for steps in epochs.values():
        assert sorted(sample for step in steps for sample in step) == list(range(SAMPLES))
        assert [len(step) for step in steps] == [BATCH] * (SAMPLES // BATCH) + [SAMPLES % BATCH]


def test_a_lost_node_is_named_as_the_cause_when_nothing_may_be_restarted(
    nodes: Nodes, small_run: dict[str, Any]
) -> None:
    nodes.replace_lost()
    killed = False

    def watch(status: RunStatus) -> None:
        nonlocal killed
        if not killed and status.progress and status.progress["step"] >= 4:
            killed = True
            nodes.kill()

    run = plan(small_run, "bereft", epochs=1_000, failure={"max_restarts": 0})
    with pytest.raises(TrainingError, match="a node of the cluster was lost; resume goes on"):
        driver.run_training(run, watch=watch)
    summary = read_summary(run.folder)
    assert (summary["state"], summary["error"]["cause"]) == ("failed", "lost_node")


def test_a_run_that_starts_after_a_node_was_lost_waits_for_another(nodes: Nodes, small_run: dict[str, Any]) -> None:
    nodes.replace_lost()
    nodes.kill()
    deadline = time.monotonic() + 60
    while ray.cluster_resources()["CPU"] > 1:
        assert time.monotonic() < deadline
        time.sleep(0.1)

    def watch(status: RunStatus) -> None:
        if any(group["state"] == "PENDING" for group in placement_group_table().values()):
            assert not status.attempts
            nodes.replace_lost()

    assert driver.run_training(plan(small_run, "patient"), watch=watch)["state"] == "finished"
