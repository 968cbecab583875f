"""Runs of a loop of a user's own, on one worker and without Ray."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from lone_runs import Monitor, follow, without_ray

from raytorch.config.file import from_data
from raytorch.runs.catalog import read_history
from raytorch.runs.checkpoint_manifest import latest_checkpoint
from raytorch.runs.metrics import PACE_KEYS
from raytorch.runs.plan import RunPlan
from raytorch.runs.storage import RunFolder
from raytorch.training.saved_state import open_checkpoint

CPU = torch.device("cpu")
CODE = """
import pathlib

import torch
from torch import nn


class Points:
    def __init__(self, split):
        self.x = torch.linspace(-1, 1, 40 if split == "train" else 10)[:, None]

    def __len__(self):
        return len(self.x)

    def batch(self, indices):
        return self.x[indices], self.x[indices] ** 2


class Net(nn.Module):
    def __init__(self, *, width: int = 8):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(1, width), nn.Tanh(), nn.Dropout(0.1), nn.Linear(width, 1))

    def forward(self, x):
        return self.layers(x)

    @staticmethod
    def example_inputs(input_shape):
        return {"x": torch.randn(2, 1)}


def main(run, *, width: int = 8, lr: float = 0.01, stop_at: int = 0):
    net = run.model("student", Net, width=width)
    teacher = run.model("teacher", nn.Linear(1, 1))
    average = run.average("student", 0.9)
    first = run.optimizer("first", torch.optim.Adam(net.parameters(), lr))
    second = run.optimizer("second", torch.optim.SGD(teacher.parameters(), 0.1, momentum=0.9))
    schedule = run.keep("schedule", torch.optim.lr_scheduler.MultiStepLR(first, [7, 11], 0.5))
    for x, y in run.batches(Points("train"), epochs=4):
        loss = (net(x) - y).square().mean() + (teacher(x) - net(x).detach()).square().mean()
        for optimizer in (first, second):
            optimizer.zero_grad()
        run.backward(loss)
        for optimizer in (first, second):
            optimizer.step()
        schedule.step()
        run.log(loss=loss)
        if run.step == stop_at:
            raise KeyError("here")
        if run.ends_epoch:
            with run.evaluating():
                errors = [(average(x) - y).square().sum() for x, y in run.share(Points("test"))]
            run.evaluated(error=(sum(errors), 10))
"""
RUN: dict[str, Any] = {
    "name": "own",
    "loop": "loops.py:main",
    "metrics": [{"name": "error", "better": "lower"}],
    "batch_size": 10,
    "checkpoint": {"every_steps": 3, "keep": 99},
    "logging": {"every_steps": 2},
}


@contextmanager
def project_with_loops(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with loops in it, the current one; no Ray."""
    write(folder, CODE)
    with without_ray(folder, monkeypatch):
        yield folder


def write(folder: Path, code: str) -> None:
    (folder / "loops.py").write_text(code, encoding="utf-8")


def train(
    name: str, *, changed_code: bool = False, told: Monitor | None = None, **changes: Any
) -> tuple[RunFolder, dict[str, Any]]:
    """Follow the loop on one worker, from the newest checkpoint on, and return the run's folder and outcome."""
    config = from_data(RUN | changes | {"name": name, "storage": str(Path.cwd() / "runs")})
    folder = RunFolder(config.storage, config.name)
    folder.make()
    return folder, follow(RunPlan(config, changed_code=changed_code), told or Monitor())


def saved(folder: RunFolder) -> tuple[dict[str, Any], dict[str, Any], Any]:
    """The models of the newest checkpoint, and what else it has."""
    with open_checkpoint(folder, str(latest_checkpoint(folder))) as content:
        state = content.state()
        kept = state["kept"] | {"averages": state["averages"]}
        return content.model(CPU, "student"), content.model(CPU, "teacher"), kept


def lines(folder: RunFolder) -> list[dict[str, Any]]:
    """The run's metrics, but for what takes time."""
    return [{key: it for key, it in line.items() if key not in ("time", *PACE_KEYS)} for line in read_history(folder)]
