"""A checkpoint appears whole or not at all, and loading one runs nothing."""

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from pyarrow import fs
from torch import nn

from raytorch import checkpoint, storage
from raytorch.checkpoint import SavedState, delete_leftovers
from raytorch.config import MlpModel
from raytorch.errors import CheckpointError
from raytorch.models import Architecture
from raytorch.runs import is_complete_checkpoint, latest_checkpoint
from raytorch.storage import RunFolder

NAME = "checkpoint_00000003"
CPU = torch.device("cpu")
ANY = Architecture(MlpModel(), (1, 8, 8), 10)


@pytest.fixture
def local(tmp_path: Path) -> RunFolder:
    return RunFolder(str(tmp_path), "run")


@pytest.fixture
def remote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    """The same folder through a file system that is not pyarrow's local one."""
    bucket = fs.SubTreeFileSystem(str(tmp_path), fs.LocalFileSystem())
    monkeypatch.setattr(storage, "open_storage", lambda address: (bucket, ""))
    return RunFolder("s3://bucket", "run")


@pytest.fixture(params=["local", "remote"])
def folder(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)


def stage(folder: RunFolder, fill: float = 1.0) -> Path:
    """A checkpoint of a small model whose weights are all ``fill``."""
    model = nn.Linear(2, 3)
    nn.init.constant_(model.weight, fill)
    state = {"optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}}, "position": 7}
    return checkpoint._stage(folder, model, ANY, state, {"step": 3, "epoch": 0.5})


def save(folder: RunFolder, tmp_path: Path) -> Path:
    checkpoint._publish(folder, stage(folder), NAME)
    return tmp_path / "run" / NAME


def test_what_was_saved_comes_back(folder: RunFolder, tmp_path: Path) -> None:
    saved = SavedState(save(folder, tmp_path))
    assert saved.manifest["step"] == 3
    assert torch.equal(saved.model(CPU)["weight"], torch.ones(3, 2))
    state = saved.state()
    assert state["position"] == 7
    assert torch.equal(state["optimizer"]["state"][0]["exp_avg"], torch.ones(3))


def test_weights_are_saved_contiguous_whatever_their_layout(local: RunFolder, tmp_path: Path) -> None:
    model = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    checkpoint._publish(local, checkpoint._stage(local, model, ANY, {}, {"step": 3}), NAME)
    assert torch.equal(SavedState(tmp_path / "run" / NAME).model(CPU)["weight"], model.weight)


def test_a_staged_checkpoint_is_not_there_yet(folder: RunFolder) -> None:
    staged = stage(folder)
    assert latest_checkpoint(folder) is None
    published = checkpoint._publish(folder, staged, NAME)
    assert latest_checkpoint(folder) == NAME
    assert (published.path, published.filesystem) == (folder.file(NAME), folder.filesystem)
    assert not staged.exists()


def test_a_local_checkpoint_is_staged_beside_its_place_and_can_be_read_by_others(local: RunFolder) -> None:
    Path(local.path).mkdir()
    staged = stage(local)
    assert staged.parent == Path(local.path)  # so that moving it is one rename
    assert staged.name.startswith(".saving-")
    assert staged.stat().st_mode == staged.parent.stat().st_mode


def test_the_manifest_is_sent_last(remote: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    staged = stage(remote)

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(RunFolder, "write_text", killed)
    with pytest.raises(KeyboardInterrupt):
        checkpoint._publish(remote, staged, NAME)
    assert sorted(file.name for file in Path(remote.filesystem.base_path, "run", NAME).iterdir()) == [
        "model.safetensors",
        "state.pt",
    ]
    assert not is_complete_checkpoint(remote, NAME)
    delete_leftovers(remote)
    assert remote.folders() == []


def test_a_checkpoint_of_a_killed_attempt_is_replaced(folder: RunFolder, tmp_path: Path) -> None:
    save(folder, tmp_path)
    checkpoint._publish(folder, stage(folder, fill=5.0), NAME)
    assert torch.equal(SavedState(tmp_path / "run" / NAME).model(CPU)["weight"], torch.full((3, 2), 5.0))


def test_only_leftovers_are_deleted(local: RunFolder, tmp_path: Path) -> None:
    save(local, tmp_path)
    stage(local)
    incomplete = tmp_path / "run" / "checkpoint_00000009"
    incomplete.mkdir()
    (incomplete / "model.safetensors").write_bytes(b"half")
    (tmp_path / "run" / "logs").mkdir()
    (tmp_path / "run" / "checkpoint_notes.txt").write_text("a file of the user's")
    delete_leftovers(local)
    assert sorted(path.name for path in Path(local.path).iterdir()) == [NAME, "checkpoint_notes.txt", "logs"]


@pytest.mark.parametrize("name", ["model.safetensors", "state.pt"])
def test_a_file_that_is_missing_is_named(local: RunFolder, tmp_path: Path, name: str) -> None:
    path = save(local, tmp_path) / name
    path.unlink()
    with pytest.raises(CheckpointError) as failure:
        read_all(path.parent)
    assert str(failure.value) == f"{path} is missing; resume from another checkpoint of the run"


@pytest.mark.parametrize("name", ["model.safetensors", "state.pt"])
def test_a_file_that_was_cut_short_is_named(local: RunFolder, tmp_path: Path, name: str) -> None:
    path = save(local, tmp_path) / name
    size = path.stat().st_size
    os.truncate(path, size - 1)
    with pytest.raises(CheckpointError) as failure:
        read_all(path.parent)
    assert str(failure.value) == f"{path} has {size - 1} bytes instead of {size}; resume from another checkpoint"


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as failure:
        SavedState(tmp_path)
    assert str(failure.value) == f"{tmp_path}/checkpoint.json is missing; resume from another checkpoint of the run"


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"format": 1}'])
def test_a_manifest_that_is_damaged_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "checkpoint.json").write_text(text)
    with pytest.raises(CheckpointError) as failure:
        SavedState(tmp_path)
    assert str(failure.value).startswith(f"{tmp_path}/checkpoint.json is damaged, or none of raytorch's: ")
    assert str(failure.value).endswith("; resume from another checkpoint of the run")


def test_another_format_is_refused(local: RunFolder, tmp_path: Path) -> None:
    path = save(local, tmp_path)
    manifest = json.loads((path / "checkpoint.json").read_text())
    (path / "checkpoint.json").write_text(json.dumps(manifest | {"format": 2}))
    with pytest.raises(CheckpointError) as failure:
        SavedState(path)
    assert str(failure.value) == f"{path} has format 2; this raytorch reads format 1"


class Hostile:
    """What runs a command when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.trace),)


@pytest.mark.parametrize(
    ("write", "told"),
    [
        (torch.save, "names posix.mkdir, which is no tensor and could run code"),
        (lambda content, path: path.write_bytes(pickle.dumps(content, 2)), "is a bare pickle, which could run"),
    ],
)
def test_a_hostile_state_runs_nothing(local: RunFolder, tmp_path: Path, write: Any, told: str) -> None:
    trace, path = tmp_path / "was-here", save(local, tmp_path)
    write(Hostile(trace), path / "state.pt")
    manifest = json.loads((path / "checkpoint.json").read_text())
    manifest["files"]["state.pt"] = (path / "state.pt").stat().st_size
    (path / "checkpoint.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError) as failure:
        SavedState(path).state()
    assert str(failure.value).startswith(f"{path}/state.pt {told}")
    assert str(failure.value).endswith("; or resume from another checkpoint of the run")
    assert not trace.exists()


def test_weights_that_are_damaged_are_named(local: RunFolder, tmp_path: Path) -> None:
    path = save(local, tmp_path) / "model.safetensors"
    path.write_bytes(b"\xff" * path.stat().st_size)
    with pytest.raises(CheckpointError) as failure:
        SavedState(path.parent).model(CPU)
    assert str(failure.value).startswith(f"{path} is damaged: its header claims 18,446,744,073,709,551,615 bytes")


def read_all(path: Path) -> None:
    saved = SavedState(path)
    saved.model(CPU)
    saved.state()
