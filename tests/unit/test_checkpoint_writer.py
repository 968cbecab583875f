"""Checkpoints are written while the training goes on, of what it was when they were due, and their time is counted."""

import errno
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
from checkpoints import ANY, BY_ACCURACY, CPU, manifest, opened, small_model
from session_clients import wait_until

from raytorch.errors import StorageError
from raytorch.runs.storage import RunFolder
from raytorch.training import checkpoint_writer
from raytorch.training.checkpoint_files import Written, write_files
from raytorch.training.checkpoints import Checkpoints


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    made = RunFolder(str(tmp_path), "run")
    made.make()
    return made


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Event:
    """What has to be set before a file is written."""
    opened = Event()

    def write_later(*what: Any) -> Written:
        assert opened.wait(60)
        return write_files(*what)

    monkeypatch.setattr(checkpoint_writer, "write_files", write_later)
    return opened


def keeper(folder: RunFolder, **how: Any) -> Checkpoints:
    return Checkpoints(folder, 2, BY_ACCURACY, lambda: None, **how)


def test_what_is_written_is_what_was_there_when_it_was_due(folder: RunFolder, gate: Event) -> None:
    checkpoints, model, remembered = keeper(folder), small_model(1.0), torch.ones(3)
    for step in (1, 2):  # the second is copied into the memory of the first
        gate.clear()
        checkpoints.save({"model": (model, ANY)}, {"mean": remembered}, manifest(step))
        assert checkpoints.is_busy
        for tensor in (*model.parameters(), remembered):
            tensor.data.add_(1.0)
        gate.set()
        checkpoints.wait()
        assert not checkpoints.is_busy
        saved = opened(Path(folder.file(f"checkpoint_{step:08d}")))
        assert saved.model(CPU)["weight"].unique().item() == step
        assert saved.state()["mean"].unique().item() == step
    assert checkpoints.saved == 2
    assert checkpoints.written_s > 0


def test_without_a_background_it_is_complete_when_the_training_goes_on(folder: RunFolder) -> None:
    checkpoints = keeper(folder, background=False)
    checkpoints.save({"model": (small_model(), ANY)}, {}, manifest(3))
    assert not checkpoints.is_busy
    assert folder.folders() == ["checkpoint_00000003"]
    assert checkpoints.blocked_s >= checkpoints.written_s > 0


def test_what_could_not_be_written_is_told_as_soon_as_it_is_known(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint_writer, "write_files", full)
    checkpoints = keeper(folder)
    checkpoints.save({"model": (small_model(), ANY)}, {}, manifest(3))
    wait_until(lambda: not checkpoints.is_busy, 60)
    with pytest.raises(StorageError, match="No space left"):
        checkpoints.look()
    checkpoints.look()
    assert folder.folders() == []


def test_the_end_of_a_failed_run_waits_for_what_is_being_written(folder: RunFolder, gate: Event) -> None:
    checkpoints = keeper(folder)
    checkpoints.save({"model": (small_model(), ANY)}, {}, manifest(3))
    gate.set()
    checkpoints.close()
    assert folder.folders() == ["checkpoint_00000003"]
