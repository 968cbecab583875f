"""`raytorch export`: of a run's checkpoint, wherever it is, and what is refused."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from pyarrow import fs
from torch import nn

from raytorch import onnx
from raytorch.cli.main import main
from raytorch.config import MlpModel, RunConfig
from raytorch.errors import ModelFileError, RunNotFoundError
from raytorch.models.networks import Architecture
from raytorch.runs import storage
from raytorch.runs.storage import RunFolder
from raytorch.serialization import save_model
from raytorch.training.export import SUFFIXES, export_run

MLP = Architecture(MlpModel(hidden=[8]), (1, 4, 4), 3)


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """What a finished run has left of its model."""
    folder = RunFolder(str(tmp_path / "runs"), "mine")
    folder.make()
    checkpoint = Path(folder.path) / "checkpoint_00000007"
    checkpoint.mkdir(parents=True)
    folder.write_text("config.yaml", yaml.safe_dump(RunConfig(name="mine", epochs=1).model_dump(mode="json")))
    weights = checkpoint / "model.safetensors"
    save_model(MLP.build(), weights, MLP)
    manifest = {"format": 1, "step": 7, "files": {weights.name: weights.stat().st_size}}
    (checkpoint / "checkpoint.json").write_text(json.dumps(manifest), encoding="utf-8")
    return folder


def command(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """The status that ``raytorch export`` exits with."""
    monkeypatch.setattr(sys, "argv", ["raytorch", "export", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        main()
    return int(end.value.code or 0)


def doubled(model: nn.Module, *arguments: Any, **options: Any) -> None:
    with torch.no_grad():
        other = MLP.build()
        other.load_state_dict({name: 2 * tensor for name, tensor in model.state_dict().items()})
    onnx_export(other, *arguments, **options)


onnx_export = onnx.export


@pytest.mark.parametrize("kind", [kind for kind in SUFFIXES if kind != "hf"])
def test_the_command_exports_a_run(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, kind: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert command(monkeypatch, run, "--format", kind) == 0
    path, verified = capsys.readouterr().out.splitlines()
    assert path == f"mine{SUFFIXES[kind]}"  # type: ignore[index]
    assert verified.startswith("verified  logits: largest error ")
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted([path, "runs"])
    assert command(monkeypatch, "mine", "--format", kind, "--no-verify", "--out", f"deep/{path}") == 0
    assert capsys.readouterr().out == f"deep/{path}\n"
    assert [file.name for file in (tmp_path / "deep").iterdir()] == [path]


def test_an_export_that_differs_is_not_left_behind(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(onnx, "export", doubled)
    (tmp_path / "m.onnx").write_text("an earlier one", encoding="utf-8")
    assert command(monkeypatch, run, "--format", "onnx", "--out", tmp_path / "m.onnx") == 1
    assert "the export differs from the model: logits: largest error" in capsys.readouterr().err
    assert (tmp_path / "m.onnx").read_text(encoding="utf-8") == "an earlier one"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["m.onnx", "runs"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["mine", "--format", "onx"], "Invalid value for '--format'"),
        (["mine"], "Missing option '--format'"),
        (["none", "--format", "onnx"], "no run none in runs"),
        (["mine", "--format", "safetensors", "--out", "runs"], "runs cannot be written: "),
        (["mine", "--format", "safetensors", "--out", "runs/mine/config.yaml/m"], "cannot be written: "),
    ],
)
@pytest.mark.usefixtures("run")
def test_bad_input_is_refused(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    arguments: list[str],
    told: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert command(monkeypatch, *arguments) == 2
    assert told in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


def test_a_run_on_an_object_store_is_fetched(run: RunFolder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    bucket = fs.SubTreeFileSystem(str(tmp_path / "runs"), fs.LocalFileSystem())
    monkeypatch.setattr(storage, "open_storage", lambda address: (bucket, ""))
    assert export_run(RunFolder("s3://bucket", run.name), "safetensors", tmp_path / "m.safetensors")[0].absolute == 0


def test_a_run_without_a_checkpoint_is_refused(run: RunFolder, tmp_path: Path) -> None:
    run.delete("checkpoint_00000007/checkpoint.json")
    with pytest.raises(RunNotFoundError, match="mine has no complete checkpoint to export"):
        export_run(run, "onnx", tmp_path / "m.onnx")


def test_a_checkpoint_that_is_a_pickle_is_refused(run: RunFolder, tmp_path: Path) -> None:
    name = "checkpoint_00000007/model.safetensors"
    size = Path(run.file(name)).stat().st_size
    Path(run.file(name)).write_bytes(b"cposix\nsystem\n(S'touch was-here'\ntR.".ljust(size, b"."))
    with pytest.raises(ModelFileError, match="expected a safetensors file"):
        export_run(run, "onnx", tmp_path / "m.onnx")
    assert not Path("was-here").exists()
