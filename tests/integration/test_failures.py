"""A worker that raises: one clear error with its own traceback."""

import sys
from typing import Any

import pytest
import ray
import torch.distributed as dist
from ray import cloudpickle
from whole_runs import plan

from raytorch import trainer
from raytorch.distributed import Worker, failure_cause
from raytorch.errors import TrainingError
from raytorch.monitor import telling_failures
from raytorch.runs import read_summary

pytestmark = pytest.mark.usefixtures("local_ray")


def raise_on_rank_1(job: dict[str, Any]) -> None:
    worker = Worker.current()
    if worker.rank == 0:
        ray.get(job["monitor"].begin_attempt.remote())
    with telling_failures(job["monitor"], worker.rank, failure_cause):
        if worker.rank == 1:
            broken_line_of_the_user()
        dist.barrier()


def broken_line_of_the_user() -> None:
    raise ZeroDivisionError("the user's own mistake")


def test_the_first_failing_ranks_own_traceback_is_shown_and_nothing_is_retried(
    small_run: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    monkeypatch.setattr(trainer, "_train_on_worker", raise_on_rank_1)
    run = plan(small_run, "raises", failure={"max_restarts": 3})
    with pytest.raises(TrainingError) as failure:
        trainer.train(run)
    message = str(failure.value)
    assert message.startswith("rank 1 failed\nTraceback (most recent call last):")
    assert "broken_line_of_the_user" in message
    assert "ZeroDivisionError: the user's own mistake" in message
    assert "/ray/" not in message
    summary = read_summary(run.folder)
    assert (summary["state"], summary["restarts"], summary["error"]["rank"]) == ("failed", 0, 1)
