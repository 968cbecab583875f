"""When an elastic run changes its number of workers: Ray Train's decision, and the checkpoint that comes before."""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import ray.train
from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy, NoopDecision, ResizeDecision

from raytorch.cluster.elastic import EXPECTING_LOST_NODES, SavingElasticPolicy
from raytorch.config import RunConfig, Scaling, WorkerRange
from raytorch.runs.plan import WorkerJob, plan_run
from raytorch.training.driver import _build_trainer

MORE = ResizeDecision(num_workers=3, resources_per_worker={"CPU": 1})


class Monitor:
    """A monitor that keeps what it is asked for."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.saved = False

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=lambda: self.saved if name == "is_saved" else self.asked.append(name))


@pytest.fixture
def monitor(monkeypatch: pytest.MonkeyPatch) -> Monitor:
    monkeypatch.setattr(ray, "wait", lambda answers, timeout: (answers, []))
    monkeypatch.setattr(ray, "get", lambda answer: answer)
    return Monitor()


@pytest.fixture
def policy(monitor: Monitor) -> SavingElasticPolicy:
    return SavingElasticPolicy(ray.train.ScalingConfig(num_workers=(1, 3)), monitor)


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What Ray Train's policy decides in turn; after that nothing."""
    decisions: list[Any] = []
    monkeypatch.setattr(
        ElasticScalingPolicy,
        "make_decision_for_running_worker_group",
        lambda *args: decisions.pop(0) if decisions else NoopDecision(),
    )
    return decisions


def poll(policy: SavingElasticPolicy, group: float = 1.0) -> Any:
    """Its decision after a poll of the workers."""
    return policy.make_decision_for_running_worker_group(SimpleNamespace(start_time=group), SimpleNamespace())


def test_nothing_is_saved_while_nothing_changes(policy: SavingElasticPolicy, room: list[Any], monitor: Monitor) -> None:
    assert [type(poll(policy)) for _ in range(3)] == [NoopDecision] * 3
    assert (room, monitor.asked) == ([], [])


def test_a_group_is_changed_once_it_has_saved_a_checkpoint(
    policy: SavingElasticPolicy, room: list[Any], monitor: Monitor
) -> None:
    room.append(MORE)
    assert [type(poll(policy)) for _ in range(3)] == [NoopDecision] * 3
    assert monitor.asked == ["request_save"]
    monitor.saved = True
    assert poll(policy) is MORE
    assert monitor.asked == ["request_save", "resizing"]
    assert isinstance(poll(policy, group=2.0), NoopDecision)


def test_how_long_the_start_may_take_is_set_for_the_run_and_not_for_later_ones(tmp_path: Path) -> None:
    before = dict(os.environ)
    nobody: Any = None
    elastic, fixed = (
        _build_trainer(
            WorkerJob(
                plan_run(RunConfig(epochs=1, scaling=Scaling(workers=workers), storage=str(tmp_path)), "mine"),
                nobody,
            ),
            lambda job: None,
        )
        for workers in (WorkerRange(min=1, max=2), 1)
    )
    assert dict(os.environ) == before
    assert elastic._environment.items() >= EXPECTING_LOST_NODES.items()
    assert not EXPECTING_LOST_NODES.keys() & fixed._environment.keys()


def test_a_group_that_fails_meanwhile_takes_the_plan_with_it(
    policy: SavingElasticPolicy, room: list[Any], monitor: Monitor
) -> None:
    room.append(MORE)
    poll(policy)
    monitor.saved = True
    assert [type(poll(policy, group=2.0)) for _ in range(2)] == [NoopDecision] * 2
    assert monitor.asked == ["request_save"]
