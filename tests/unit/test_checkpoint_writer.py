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
from raytorch.runs.checkpoint_manifest import checkpoint_names
from raytorch.runs.storage import RunFolder
from raytorch.training import checkpoint_writer
from raytorch.training.checkpoint_files import Content, Share, Written, write_files
from raytorch.training.checkpoint_writer import CheckpointWriter
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


def test_what_a_manifest_is_made_of_may_change_as_soon_as_it_is_saved(folder: RunFolder, gate: Event) -> None:
    checkpoints, told = keeper(folder), manifest(3, accuracy=0.5)
    checkpoints.save({"model": (small_model(), ANY)}, {}, told)
    told["metrics"]["accuracy"] = torch.ones(2)
    gate.set()
    checkpoints.wait()
    assert opened(Path(folder.file("checkpoint_00000003"))).manifest.metrics["accuracy"] == 0.5


def test_rank_0_does_not_wait_for_who_could_not_write(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_for_the_other(content: Content, *where: Any) -> Written:
        if not content.texts:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write_files(content, *where)

    monkeypatch.setattr(checkpoint_writer, "write_files", full_for_the_other)
    both = [CheckpointWriter(folder, Share(1, 2, "a")), keeper(folder, share=Share(0, 2, "a"))]
    for each in both:
        each.save({"model": (small_model(), ANY)}, {}, manifest(3))
    for each in both:
        with pytest.raises(StorageError, match=r"No space left|worker 1 has not written its part|No such file"):
            each.wait()
    assert not checkpoint_names(folder)


def test_workers_complete_a_checkpoint_together(folder: RunFolder) -> None:
    both = [CheckpointWriter(folder, Share(1, 2, "a")), keeper(folder, share=Share(0, 2, "a"))]
    for each in both:
        each.save({"model": (small_model(), ANY)}, {}, manifest(3))
    for each in both:
        each.wait()
    assert folder.folders() == ["checkpoint_00000003"]
    files = {path.name for path in Path(folder.file("checkpoint_00000003")).iterdir()}
    assert files == {
        "checkpoint.json",
        "state.json",
        "model-00001-of-00002.safetensors",
        "state-00001-of-00002.safetensors",
    }


def test_the_end_of_a_failed_run_waits_for_what_is_being_written(folder: RunFolder, gate: Event) -> None:
    checkpoints = keeper(folder)
    checkpoints.save({"model": (small_model(), ANY)}, {}, manifest(3))
    gate.set()
    checkpoints.close()
    assert folder.folders() == ["checkpoint_00000003"]
