"""Runs of a single worker, or of one of several, in the process of the test, without Ray."""

from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import torch
from whole_runs import SMALL_RUN

from raytorch.config.file import dump_config, from_data
from raytorch.distributed import Worker
from raytorch.runs.checkpoint_manifest import latest_checkpoint
from raytorch.runs.plan import RunPlan, WorkerJob, placed, plan_resume
from raytorch.runs.status import RunStatus
from raytorch.runs.storage import LiveFiles, RunFolder
from raytorch.training import api, monitor, parts
from raytorch.training.progress import RunProgress
from raytorch.training.reproducibility import choose_algorithms
from raytorch.training.run_record import RunRecord
from raytorch.training.saved_state import open_checkpoint
from raytorch.training.stopping import StatusCallback
from raytorch.training.worker import follow_loop, prepare


class Monitor:
    """A monitor that keeps what it was told last, by name of the call."""

    def __init__(self) -> None:
        self.told: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=lambda *arguments: self.told.update({name: arguments}))


@contextmanager
def without_ray(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A current folder for runs, in which nothing asks for Ray; settings of PyTorch are as before afterwards."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(parts, "data_parallel", lambda model: model)
    monkeypatch.setattr(ray, "get", lambda answer: answer)
    monkeypatch.setattr(monitor, "PROGRESS_INTERVAL_S", 0.0)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    choose_algorithms(False, fixed_shapes=False)


@contextmanager
def in_place_of_ray(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As :func:`without_ray`; what ``raytorch.train`` and ``raytorch.resume`` begin is followed in this process."""
    with monkeypatch.context() as patched, without_ray(folder, patched):
        patched.setattr(api, "run_training", lambda plan, watch, address: recorded(plan, watch))
        yield


def recorded(plan: RunPlan, watch: StatusCallback = lambda status: None) -> dict[str, Any]:
    """Follow a run to its end, with all that is left of one on a Ray; answers with its summary."""
    record, told = RunRecord(plan), Monitor()
    with plan.folder.claimed(), record.writing():
        outcome = follow(plan, told)
        status = RunStatus(*told.told["progress"], outcome=outcome, attempts=1)
        record.note(status)
        watch(status)
        return record.end(status)


def train(name: str, model: dict[str, Any] | None = None, told: Monitor | None = None, **changes: Any) -> RunFolder:
    """Train an epoch of the small run, or go on with it from its newest checkpoint.

    ``model`` changes that of the small run, or is another if it has a name.
    """
    run = SMALL_RUN | {"scaling": {"workers": 1}, "epochs": 1} | changes | {"name": name}
    model = model or {}
    config = from_data(run | {"model": model if "name" in model else SMALL_RUN["model"] | model})
    folder = RunFolder("runs", name)
    plan = (
        plan_resume(folder.address, config) if folder.exists("config.yaml") else RunPlan(placed(config, name, "runs"))
    )
    folder.make()
    folder.write_text("config.yaml", dump_config(plan.config))
    follow(plan, told or Monitor())
    return folder


def follow(plan: RunPlan, told: Any, worker: Worker = Worker(0, 1, torch.device("cpu"))) -> dict[str, Any]:  # noqa: B008
    """Follow a run's loop from its newest checkpoint on, and return what it came to."""
    prepare(plan.config, worker)
    with (
        closing(LiveFiles(plan.folder)) as files,
        closing(RunProgress(WorkerJob(plan, told), worker, files)) as progress,
    ):
        return dict(follow_loop(progress))


def final(folder: RunFolder) -> dict[str, Any]:
    """The weights of a run's latest checkpoint."""
    with open_checkpoint(folder, str(latest_checkpoint(folder))) as saved:
        return saved.model(torch.device("cpu"))
