"""What tests of checkpoints share: small ones, saved into a run's folder."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from uuid import uuid4

import torch
from torch import nn

from raytorch.config import MlpModel, Ranking
from raytorch.models.networks import Architecture
from raytorch.runs.storage import RunFolder
from raytorch.training.checkpoints import Checkpoints
from raytorch.training.saved_state import SavedState, open_checkpoint

NAME = "checkpoint_00000003"
ANOTHER = "delete that checkpoint to resume from the one before it"
CPU = torch.device("cpu")
ANY = Architecture(MlpModel(), (1, 8, 8), 10)
BY_ACCURACY = Ranking("accuracy", higher_is_better=True)


def small_model(fill: float = 1.0) -> nn.Module:
    """A model whose weights are all ``fill``."""
    model = nn.Linear(2, 3)
    nn.init.constant_(model.weight, fill)
    return model


STATE = {"optimizer": [{"exp_avg": torch.ones(3)}], "position": 7}


def stage(folder: RunFolder, fill: float = 1.0) -> Path:
    """A checkpoint that is complete, and not in its place."""
    place = Path(folder.file(f".saving-{uuid4().hex}"))
    with TemporaryDirectory() as elsewhere:
        save(RunFolder(elsewhere, "run"), Path(elsewhere), fill).rename(place)
    return place


def manifest(step: int, accuracy: float | None = None) -> dict[str, Any]:
    """That of a model which was evaluated, if an accuracy is given."""
    metrics = {"accuracy": accuracy or 0.0, "loss": 1.0 - (accuracy or 0.0)}
    return {"step": step, "epoch": 0.5, "metrics": metrics, "evaluated": accuracy is not None}


def keeper(folder: RunFolder, keep: int = 2, ranking: Ranking = BY_ACCURACY) -> Checkpoints:
    """Rank 0's checkpoints, after a start in that folder."""
    folder.make()
    checkpoints = Checkpoints(folder, keep, ranking, lambda: None)
    checkpoints.recover()
    return checkpoints


def save(folder: RunFolder, tmp_path: Path, fill: float = 1.0) -> Path:
    checkpoints = keeper(folder)
    checkpoints.save({"model": (small_model(fill), ANY)}, STATE, manifest(3))
    checkpoints.wait()
    return tmp_path / "run" / NAME


def there(folder: RunFolder) -> list[int]:
    """The steps of the checkpoints that are there."""
    return [int(name.removeprefix("checkpoint_")) for name in folder.folders() if name.startswith("checkpoint_")]


def opened(path: Path) -> SavedState:
    """The checkpoint in a folder."""
    with open_checkpoint(RunFolder(str(path.parent.parent), path.parent.name), path.name) as saved:
        return saved


def change_manifest(path: Path, **changes: Any) -> None:
    manifest = json.loads((path / "checkpoint.json").read_text(encoding="utf-8"))
    (path / "checkpoint.json").write_text(json.dumps(manifest | changes), encoding="utf-8")
