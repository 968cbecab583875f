"""A checkpoint appears whole or not at all, and loading one runs nothing and builds nothing larger than its files."""

import errno
import json
import tempfile
from pathlib import Path
from threading import Event, Timer
from typing import Any

import pytest
import torch
from checkpoints import (
    ANY,
    BY_ACCURACY,
    CPU,
    NAME,
    STATE,
    keeper,
    manifest,
    opened,
    save,
    small_model,
    stage,
    there,
)
from pyarrow import fs
from torch import nn

from raytorch import training
from raytorch.config import Ranking
from raytorch.errors import ModelFileError, StorageError
from raytorch.runs import storage
from raytorch.runs.checkpoint_manifest import is_complete_checkpoint, latest_checkpoint
from raytorch.runs.storage import RunFolder
from raytorch.serialization import load_tensors
from raytorch.training import checkpoint_files
from raytorch.training.checkpoints import Checkpoints
from raytorch.training.saved_state import model_of_checkpoint, open_checkpoint


@pytest.fixture
def local(tmp_path: Path) -> RunFolder:
    folder = RunFolder(str(tmp_path), "run")
    folder.make()
    return folder


@pytest.fixture
def remote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    """The same folder through a file system that is not pyarrow's local one."""
    bucket = fs.SubTreeFileSystem(str(tmp_path), fs.LocalFileSystem())
    monkeypatch.setattr(storage, "open_storage", lambda address: (bucket, ""))
    return RunFolder("s3://bucket", "run")


@pytest.fixture(params=["local", "remote"])
def folder(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)


# -- saving ------------------------------------------------------------------------------------------------------------


def test_what_was_saved_comes_back(folder: RunFolder, tmp_path: Path) -> None:
    save(folder, tmp_path)
    with open_checkpoint(folder, NAME) as saved:
        assert (saved.manifest.step, saved.manifest.epoch) == (3, 0.5)
        assert torch.equal(saved.model(CPU)["weight"], torch.ones(3, 2))
        state = saved.state()
    assert state["position"] == 7
    assert torch.equal(state["optimizer"][0]["exp_avg"], torch.ones(3))


def test_weights_are_saved_contiguous_whatever_their_layout(local: RunFolder, tmp_path: Path) -> None:
    model = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    checkpoints = keeper(local)
    checkpoints.save({"model": (model, ANY)}, {}, manifest(3))
    checkpoints.wait()
    assert torch.equal(opened(tmp_path / "run" / NAME).model(CPU)["weight"], model.weight)


def test_a_checkpoint_is_in_place_after_the_wait_and_can_be_read_by_others(local: RunFolder, tmp_path: Path) -> None:
    save(local, tmp_path)
    assert latest_checkpoint(local) == NAME
    assert Path(local.file(NAME)).stat().st_mode == Path(local.path).stat().st_mode
    assert there(local) == [3]


def test_a_checkpoint_is_told_of_once_it_is_complete(folder: RunFolder) -> None:
    told: list[Any] = []
    checkpoints = Checkpoints(folder, 2, BY_ACCURACY, lambda: told.append(latest_checkpoint(folder)))
    checkpoints.recover()
    for step in (3, 6):
        checkpoints.save({"model": (small_model(), ANY)}, STATE, manifest(step))
        checkpoints.wait()
    assert told == [NAME, "checkpoint_00000006"]


def test_training_goes_on_while_one_checkpoint_is_sent_and_waits_before_it_saves_another(
    remote: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_go, sent, upload = Event(), [], RunFolder.upload

    def upload_slowly(self: RunFolder, local: Path, name: str = "") -> None:
        assert may_go.wait(60)
        upload(self, local, name)
        sent.append(name)

    monkeypatch.setattr(RunFolder, "upload", upload_slowly)
    checkpoints = keeper(remote)
    checkpoints.save({"model": (small_model(), ANY)}, STATE, manifest(3))  # returns, though nothing may be sent
    assert (sent, latest_checkpoint(remote)) == ([], None)
    Timer(0.1, may_go.set).start()
    checkpoints.save({"model": (small_model(), ANY)}, STATE, manifest(6))
    assert sent[0] == NAME
    checkpoints.wait()
    assert there(remote) == [3, 6]


def test_the_manifest_is_sent_last(remote: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    place, seen = Path(remote.filesystem.base_path, "run", NAME), list[str]()

    def look(*_: Any) -> None:
        seen.extend(sorted(file.name for file in place.iterdir()))
        assert not is_complete_checkpoint(remote, NAME)
        raise MemoryError

    monkeypatch.setattr(RunFolder, "write_text", look)
    checkpoints = keeper(remote)
    checkpoints.save({"model": (small_model(), ANY)}, STATE, manifest(3))
    with pytest.raises(MemoryError):
        checkpoints.wait()
    assert seen == ["model.safetensors", "state.json", "state.safetensors"]
    assert remote.folders() == []


def test_what_a_kill_left_in_a_store_is_deleted(remote: RunFolder, tmp_path: Path) -> None:
    save(remote, tmp_path)
    (tmp_path / "run" / NAME / "checkpoint.json").unlink()
    keeper(remote)
    assert remote.folders() == []


@pytest.mark.parametrize("kind", ["tensors", "manifest"])
def test_a_full_disk_is_told_and_no_half_of_a_checkpoint_stays_on_it(
    folder: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    checkpoints = keeper(folder)
    checkpoints.save({"model": (small_model(), ANY)}, STATE, manifest(3))
    checkpoints.wait()

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    target = {"tensors": (checkpoint_files, "write_pieces"), "manifest": (training.checkpoints, "to_json")}[kind]
    monkeypatch.setattr(*target, full)
    checkpoints.save({"model": (small_model(), ANY)}, STATE, manifest(6))
    with pytest.raises(
        StorageError, match=r"run: a checkpoint cannot be written: .*No space left on device; free space"
    ):
        checkpoints.wait()
    monkeypatch.undo()
    assert folder.folders() == [NAME]
    assert [*temporary.glob("*/*")] == []
    assert is_complete_checkpoint(folder, NAME)


@pytest.mark.parametrize("fault", [OSError(errno.EIO, "it went away"), StorageError("it went away")])
def test_a_store_that_fails_meanwhile_is_told_by_the_next_checkpoint(
    remote: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Exception
) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))

    def fail(*_: Any) -> None:
        raise fault

    checkpoints = keeper(remote)
    monkeypatch.setattr(RunFolder, "upload", fail)
    checkpoints.save({"model": (small_model(), ANY)}, STATE, manifest(3))
    with pytest.raises(StorageError, match=r"a checkpoint cannot be written: .*it went away"):
        checkpoints.save({"model": (small_model(), ANY)}, STATE, manifest(6))
    assert [*temporary.glob("*/*")] == []


def test_in_a_store_the_first_save_of_a_step_counts_until_the_second_is_complete(
    remote: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints, upload, seen = keeper(remote), RunFolder.upload, list[float]()
    checkpoints.save({"model": (small_model(1.0), ANY)}, STATE, manifest(3))
    checkpoints.wait()

    def look_first(self: RunFolder, local: Path, name: str = "") -> None:
        upload(self, local, name)
        with open_checkpoint(remote, NAME) as saved:
            seen.append(saved.model(CPU)["weight"].unique().item())

    monkeypatch.setattr(RunFolder, "upload", look_first)
    again = keeper(remote)  # of a run that is resumed there
    for fill in (2.0, 3.0):
        again.save({"model": (small_model(fill), ANY)}, STATE, manifest(3))
        again.wait()
    with open_checkpoint(remote, NAME) as saved:
        seen.append(saved.model(CPU)["weight"].unique().item())
        assert saved.state()["position"] == 7
    assert seen == [1.0, 2.0, 3.0]
    assert len([*(tmp_path / "run" / NAME).iterdir()]) == 4
    with model_of_checkpoint(remote, NAME) as path:
        assert load_tensors(path)["weight"].unique().item() == 3.0


def test_an_older_checkpoint_that_cannot_be_deleted_costs_none(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints = keeper(folder, keep=1)
    checkpoints.save({"model": (small_model(), ANY)}, STATE, manifest(1))
    checkpoints.wait()

    def refuse(self: RunFolder, name: str) -> None:
        if name == "checkpoint_00000001":
            raise StorageError("503: slow down")

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "delete", refuse)
        checkpoints.save({"model": (small_model(), ANY)}, STATE, manifest(2))
        checkpoints.wait()
        assert there(folder) == [1, 2]
        assert "could not be deleted, which is tried again with the next: 503" in caplog.text
    checkpoints.save({"model": (small_model(), ANY)}, STATE, manifest(3))
    checkpoints.wait()
    assert there(folder) == [3]


@pytest.mark.parametrize(
    ("name", "told"), [("\udc80", "whose name is no text"), ("__metadata__", "is where the file describes itself")]
)
def test_names_that_no_file_can_hold_are_refused(local: RunFolder, name: str, told: str) -> None:
    model = nn.Module()
    model.register_parameter(name, nn.Parameter(torch.ones(1)))
    with pytest.raises(ModelFileError, match=told):
        keeper(local).save({"model": (model, None)}, {}, manifest(3))


def test_any_key_of_a_state_comes_back(local: RunFolder, tmp_path: Path) -> None:
    state = {
        "\udc80": torch.ones(1),
        "~udc80": torch.zeros(1),
        "a/b": {"c": torch.ones(2)},
        "a": {"b/c": torch.zeros(2)},
    }
    checkpoints = keeper(local)
    checkpoints.save({}, state, manifest(3))
    checkpoints.wait()
    found = opened(tmp_path / "run" / NAME).state()
    assert found.keys() == state.keys()
    assert [found["\udc80"].item(), found["~udc80"].item()] == [1, 0]
    assert [found["a/b"]["c"].sum().item(), found["a"]["b/c"].sum().item()] == [2, 0]


# -- which are kept ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keep", "kept"),
    [
        (1, [3, 6]),  # the best, and always the latest
        (2, [3, 4, 6]),
        (3, [3, 4, 5, 6]),
        (9, [1, 2, 3, 4, 5, 6]),
    ],
)
@pytest.mark.parametrize("ranking", [BY_ACCURACY, Ranking("loss", higher_is_better=False)])
def test_the_best_are_kept_and_always_the_latest(
    folder: RunFolder, keep: int, kept: list[int], ranking: Ranking
) -> None:
    checkpoints = keeper(folder, keep, ranking)
    for step, accuracy in enumerate([0.5, 0.6, 0.9, 0.8, 0.7, None], start=1):
        checkpoints.save({"model": (small_model(), ANY)}, STATE, manifest(step, accuracy))
        checkpoints.wait()
    assert there(folder) == kept
    keeper(folder, keep, ranking)
    assert there(folder) == kept
    keeper(folder, 1, ranking)  # what is on the disk goes by the configuration of the day
    assert there(folder) == [3, 6]


def test_among_those_that_were_not_evaluated_the_newest_are_kept_also_over_a_change_of_digits(
    folder: RunFolder,
) -> None:
    checkpoints = keeper(folder, keep=2)
    for step in (99_999_998, 99_999_999, 100_000_000):
        checkpoints.save({"model": (small_model(), ANY)}, STATE, manifest(step))
        checkpoints.wait()
    assert sorted(there(folder)) == [99_999_999, 100_000_000]
    assert latest_checkpoint(folder) == keeper(folder).recover() == "checkpoint_100000000"


def test_there_are_never_more_than_two_beyond_those_to_keep(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    delete, most = RunFolder.delete, 0

    def count(self: RunFolder, name: str) -> None:
        nonlocal most
        most = max(most, len([name for name in self.folders() if name.startswith(("checkpoint_", ".saving-"))]))
        delete(self, name)

    monkeypatch.setattr(RunFolder, "delete", count)
    checkpoints = keeper(folder, keep=2)
    for step in range(1, 20):
        checkpoints.save({"model": (small_model(), ANY)}, STATE, manifest(step, 1 / step if step % 3 == 0 else None))
    checkpoints.wait()
    assert most == 4
    assert len(there(folder)) <= 3


# -- after a kill ------------------------------------------------------------------------------------------------------


def test_a_checkpoint_that_was_complete_when_the_kill_came_is_put_in_place(local: RunFolder) -> None:
    stage(local)
    assert latest_checkpoint(local) is None
    assert Checkpoints(local, 2, BY_ACCURACY, lambda: None).recover() == latest_checkpoint(local) == NAME
    assert local.folders() == [NAME]


def test_one_that_replaces_what_a_killed_attempt_left_is_put_in_place(local: RunFolder, tmp_path: Path) -> None:
    save(local, tmp_path)
    (tmp_path / "run" / NAME / "model.safetensors").unlink()  # a kill while it was deleted, to be replaced
    stage(local, fill=5.0)
    keeper(local)
    assert torch.equal(opened(tmp_path / "run" / NAME).model(CPU)["weight"], torch.full((3, 2), 5.0))
    assert local.folders() == [NAME]


def test_only_leftovers_are_deleted(local: RunFolder, tmp_path: Path) -> None:
    run = tmp_path / "run"
    save(local, tmp_path)
    (stage(local) / "checkpoint.json").unlink()
    incomplete = run / "checkpoint_00000009"
    incomplete.mkdir()
    (incomplete / "model.safetensors").write_bytes(b"half")
    for name in ("logs", "checkpoint_best", ".saving-mine", "checkpoint_000000003"):
        (run / name).mkdir()
    (run / "checkpoint_notes.txt").write_text("a file of the user's", encoding="utf-8")
    keeper(local)
    kept = [".saving-mine", NAME, "checkpoint_000000003", "checkpoint_best", "checkpoint_notes.txt", "logs"]
    assert sorted(path.name for path in run.iterdir()) == sorted(kept)


def test_what_links_in_the_folder_point_to_is_left_alone(local: RunFolder, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "model.safetensors").write_bytes(b"mine")
    run = tmp_path / "run"
    (run / NAME).symlink_to(precious)
    (run / f".saving-{'0' * 32}").symlink_to(precious)
    keeper(local)
    assert [path.name for path in precious.iterdir()] == ["model.safetensors"]
    assert local.folders() == []


@pytest.mark.parametrize(
    "changes",
    [
        {"step": "../../precious"},
        {"step": -1},
        {"step": 10**30},
        {"files": None},
        {"files": {"../../precious/f": 1}},
        {"files": {"model.safetensors": "3"}},
        {"metrics": []},
        {"metrics": {"accuracy": "good"}},
        {"seconds": {"training": None}},
        {"format": None},
    ],
)
def test_a_manifest_of_another_form_makes_no_checkpoint(local: RunFolder, tmp_path: Path, changes: Any) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "f").write_text("1", encoding="utf-8")
    for path in (save(local, tmp_path), stage(local)):
        content = json.loads((path / "checkpoint.json").read_text(encoding="utf-8"))
        (path / "checkpoint.json").write_text(json.dumps(content | changes), encoding="utf-8")
    keeper(local)
    assert local.folders() == []
    assert (tmp_path / "precious" / "f").exists()
