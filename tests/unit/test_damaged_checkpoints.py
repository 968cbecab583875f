"""Checkpoints that are damaged, or somebody else's: one clear error, and nothing in them runs."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import ANOTHER, ANY, CPU, NAME, change_manifest, keeper, manifest, opened, save, small_model
from saved_states import load_saved_state, save_state

from raytorch.errors import CheckpointError, ModelFileError
from raytorch.runs.storage import RunFolder
from raytorch.training.saved_state import open_checkpoint


@pytest.fixture
def local(tmp_path: Path) -> RunFolder:
    folder = RunFolder(str(tmp_path), "run")
    folder.make()
    return folder


@pytest.mark.parametrize("name", ["model.safetensors", "state.json", "state.safetensors"])
def test_a_file_that_is_missing_is_named(local: RunFolder, tmp_path: Path, name: str) -> None:
    path = save(local, tmp_path) / name
    path.unlink()
    with pytest.raises(CheckpointError) as failure:
        read_all(path.parent)
    assert str(failure.value) == f"{path} is missing, or no file; {ANOTHER}"


@pytest.mark.parametrize("name", ["model.safetensors", "state.json", "state.safetensors"])
def test_a_file_that_was_cut_short_is_named(local: RunFolder, tmp_path: Path, name: str) -> None:
    path = save(local, tmp_path) / name
    size = path.stat().st_size
    os.truncate(path, size - 1)
    with pytest.raises(CheckpointError) as failure:
        read_all(path.parent)
    assert str(failure.value) == f"{path} has {size - 1} bytes instead of {size}; {ANOTHER}"


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as failure:
        opened(tmp_path)
    assert str(failure.value) == f"{tmp_path}/checkpoint.json is missing; {ANOTHER}"


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"format": 1}'])
def test_a_manifest_that_is_damaged_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "checkpoint.json").write_text(text, encoding="utf-8")
    with pytest.raises(CheckpointError) as failure:
        opened(tmp_path)
    assert str(failure.value).startswith(f"{tmp_path}/checkpoint.json is damaged, or none of raytorch's: ")
    assert str(failure.value).endswith(f"; {ANOTHER}")


def test_an_older_format_is_refused_with_what_to_do(local: RunFolder, tmp_path: Path) -> None:
    path = save(local, tmp_path)
    change_manifest(path, format=1)
    with pytest.raises(CheckpointError) as failure:
        opened(path)
    assert str(failure.value) == (
        f"{path} has format 1, which cannot be resumed; this raytorch reads format 4 and 5; resume it with the raytorch"
        " that wrote it, or take its weights alone, with raytorch.serialization.load_model("
        f"'{path}/model.safetensors')"
    )


def replace(path: Path, content: bytes) -> None:
    """Replace one of a checkpoint's files, of which the manifest says that it is right."""
    path.write_bytes(content)
    manifest = json.loads((path.parent / "checkpoint.json").read_text(encoding="utf-8"))
    change_manifest(path.parent, files=manifest["files"] | {path.name: len(content)})


class Hostile:
    """What runs a command when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.trace),)


@pytest.mark.parametrize("name", ["model.safetensors", "state.safetensors", "state.json"])
@pytest.mark.parametrize("packed", [True, False])
def test_a_pickle_in_place_of_a_file_runs_nothing(local: RunFolder, tmp_path: Path, name: str, packed: bool) -> None:
    trace, path, plain = tmp_path / "was-here", save(local, tmp_path) / name, tmp_path / "plain"
    torch.save(Hostile(trace), plain, _use_new_zipfile_serialization=packed)
    replace(path, plain.read_bytes())
    with pytest.raises(CheckpointError) as failure:
        read_all(path.parent)
    assert str(failure.value).startswith(f"{path} is ")
    assert str(failure.value).endswith(f"; or {ANOTHER}")
    assert not trace.exists()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "it is not JSON"),
        ('{"a": ', "it is not JSON"),
        ("[" * 10**5 + "]" * 10**5, "it is not JSON"),
        ("\udcff", "it is not JSON"),
        ("[]", "it holds a list, not an object"),
        ('{"a": {"$tensor": "7"}}', "it names a tensor that state.safetensors does not have"),
        ('{"a": {"$tensor": []}}', "it names a tensor that state.safetensors does not have"),
        (" " * (16 * 2**20 + 1), "it has more than 16,777,216 bytes"),
    ],
)
def test_a_state_that_is_damaged_is_told(local: RunFolder, tmp_path: Path, text: str, told: str) -> None:
    path = save(local, tmp_path) / "state.json"
    replace(path, text.encode(errors="surrogateescape"))
    with pytest.raises(CheckpointError) as failure:
        read_all(path.parent)
    assert str(failure.value).startswith(f"{path} is damaged: {told}")


def test_a_header_that_claims_more_than_the_file_has_is_told(local: RunFolder, tmp_path: Path) -> None:
    path = save(local, tmp_path) / "state.safetensors"
    header = b'{"0": {"dtype": "F32", "shape": [10000000000], "data_offsets": [0, 40000000000]}}'
    replace(path, len(header).to_bytes(8, "little") + header + bytes(12))
    with pytest.raises(CheckpointError, match="ends at byte 40,000,000,000 of its data; expected at most 12"):
        read_all(path.parent)


@pytest.mark.parametrize("use", [lambda state: state["nothing"], lambda state: state["position"].shape])
def test_a_checkpoint_of_another_run_is_told(local: RunFolder, tmp_path: Path, use: Any) -> None:
    path = save(local, tmp_path)
    with pytest.raises(CheckpointError) as failure, open_checkpoint(local, NAME) as saved:
        use(saved.state())
    assert str(failure.value).startswith(f"{path} does not fit the run (")
    assert str(failure.value).endswith(
        "): another configuration or raytorch has saved it; resume with those that its checkpoint.json names, or begin "
        "a new run"
    )


@pytest.mark.parametrize("state", [{1: "a", "b": 2}, {(1, 2): "a"}, {"a": {"$tensor": "b"}}, {"a": {1, 2}}])
def test_what_json_would_change_is_not_saved(local: RunFolder, state: Any) -> None:
    with pytest.raises(TypeError):
        keeper(local).save({"model": (small_model(), ANY)}, state, manifest(3))


def test_weights_that_are_damaged_are_named(local: RunFolder, tmp_path: Path) -> None:
    path = save(local, tmp_path) / "model.safetensors"
    path.write_bytes(b"\xff" * path.stat().st_size)
    with pytest.raises(CheckpointError) as failure:
        opened(path.parent).model(CPU)
    assert str(failure.value).startswith(f"{path} is damaged: its header claims 18,446,744,073,709,551,615 bytes")


def read_all(path: Path) -> None:
    saved = opened(path)
    saved.model(CPU)
    saved.state()


@pytest.mark.parametrize("name", ["model.safetensors", "state.json", "state.safetensors"])
def test_a_file_that_is_a_folder_is_refused(local: RunFolder, tmp_path: Path, name: str) -> None:
    path = save(local, tmp_path) / name
    path.unlink()
    path.mkdir()
    with pytest.raises(CheckpointError, match=rf"{name} is missing, or no file"):
        read_all(path.parent)


def test_a_state_that_names_a_tensor_twice_is_refused(tmp_path: Path) -> None:
    """An optimizer would make one of its own parameter's type of each."""
    save_state({"state": {"a": torch.zeros(2)}}, tmp_path)
    (tmp_path / "state.json").write_text('{"state": {"a": {"$tensor": "0"}, "b": {"$tensor": "0"}}}', encoding="utf-8")
    with pytest.raises(ModelFileError, match=r"is damaged: it names a tensor that .* does not have, or twice"):
        load_saved_state(tmp_path)
