"""Loops that do something else on one of their workers: an error of all, where they would wait, or train nonsense."""

from pathlib import Path

import pytest
import ray
from lone_runs import Monitor, follow
from ranks import on_ranks

from raytorch.config.file import from_data
from raytorch.distributed import Worker
from raytorch.runs.plan import RunPlan
from raytorch.runs.storage import RunFolder
from raytorch.training import parts

LOOPS = """
import torch
from torch import nn


def main(run, *, kind: str):
    is_first = run.worker.rank == 0
    names = ["one", "two"] if is_first or kind != "order" else ["two", "one"]
    for name in names if is_first or kind != "alone" else names[:1]:
        run.model(name, nn.Linear(1, 2 if is_first or kind != "shape" else 3))
    if is_first or kind != "part":
        run.keep("part", torch.optim.SGD([nn.Parameter(torch.ones(1))], 0.1))
    data = torch.ones(40 if is_first or kind != "samples" else 38)
    for _ in run.batches(data, steps=3 if is_first or kind != "steps" else 4):
        pass
"""
TOLD = {
    "order": "run.model",
    "shape": "run.model",
    "alone": "run.model|run.batches",
    "part": "run.batches",
    "samples": "run.batches",
    "steps": "run.batches",
}


def refuse_what_differs(worker: Worker) -> None:
    parts.data_parallel = lambda model: model  # type: ignore[assignment]
    ray.get = lambda answer: answer
    for kind, asked in TOLD.items():
        run = {"name": kind, "loop": {"name": "loops.py:main", "kind": kind}, "batch_size": 10, "storage": "runs"}
        plan = RunPlan(from_data(run | {"epochs": 1, "logging": {"tensorboard": False}}))
        RunFolder("runs", kind).make()
        with pytest.raises(ValueError, match=rf"({asked}) was given something else on another worker, or at another"):
            follow(plan, Monitor(), worker)


def test_workers_whose_loops_differ_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "loops.py").write_text(LOOPS, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    on_ranks(refuse_what_differs, 2)
