"""Runs of a single worker that are stored in an object store, without Ray."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lone_runs import follow, without_ray
from pyarrow import fs
from whole_runs import SMALL_RUN

from raytorch.config.file import from_data
from raytorch.runs import storage
from raytorch.runs.plan import RunPlan
from raytorch.runs.storage import RunFolder


class Monitor:
    """A monitor that keeps what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[str, Any]] = []

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=lambda *arguments: self.told.append((name, arguments)))


@contextmanager
def project_with_store(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An object store, which keeps all in the folder; that is the current one, where a run's own code is; no Ray."""
    bucket = fs.SubTreeFileSystem(str(folder), fs.LocalFileSystem())
    monkeypatch.setattr(storage, "open_storage", lambda address: (bucket, ""))
    with without_ray(folder, monkeypatch):
        yield folder


def train(name: str, told: Monitor | None = None, **changes: Any) -> RunFolder:
    """Train the small run on one worker, from its newest checkpoint on."""
    run = SMALL_RUN | {"scaling": {"workers": 1}, "checkpoint": {"every_steps": 10}} | changes
    config = from_data(run | {"name": name, "storage": "s3://bucket"})
    folder = RunFolder(config.storage, config.name)
    follow(RunPlan(config), told or Monitor())
    return folder
