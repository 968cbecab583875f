"""Runs whose targets are numbers: the models, losses and metrics that ship, and what is said where they do not go."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from command_line import log_level_kept
from lone_runs import train, without_ray
from torch import nn
from torch.nn import functional as F
from typer.testing import CliRunner

import raytorch
from raytorch.cli.main import app
from raytorch.config import Loss, Metric
from raytorch.config.file import from_data
from raytorch.config.sources import ArraysData
from raytorch.errors import ConfigError
from raytorch.models.objectives import loss_function, metrics_of
from raytorch.runs.checkpoint_manifest import latest_checkpoint
from raytorch.serialization import load_model, read_architecture
from raytorch.sources import open_source

FRIEDMAN = Path(__file__).parents[2] / "examples/csv_regression"
TABLE = {
    "name": "table",
    "root": str(FRIEDMAN),
    "train": "friedman.csv",
    "test": 0.2,
    "target": "y",
    "standardize": True,
}
FITTING = {"loss": "mse", "metrics": ["mae"]}


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with without_ray(tmp_path, monkeypatch):
        yield


def run(name: str, **changes: Any) -> Any:
    keys = {"data": TABLE, "batch_size": 32, "epochs": 12, "optimizer": {"name": "adamw", "lr": 1e-2}, **FITTING}
    return train(name, {"name": "mlp", "hidden": [64]}, **keys | changes)


@pytest.mark.parametrize("shapes", [((8, 1), (8,)), ((8,), (8, 1)), ((8,), (8,)), ((8, 3), (8, 3)), ((8, 1), (8, 1))])
def test_errors_are_pytorchs_in_whatever_shape_one_number_is(shapes: Any) -> None:
    outputs, targets = torch.randn(shapes[0]), torch.randn(shapes[1], dtype=torch.float64)
    batch, alike = (outputs.bfloat16(), targets), outputs.bfloat16().float().view(targets.shape)
    for judge, expected in (
        (loss_function(Loss(name="mse"), nn.Identity()), F.mse_loss),
        (metrics_of([Metric(name="mae")], nn.Identity())["mae"], F.l1_loss),
    ):
        found: Any = judge(nn.Identity(), batch)  # type: ignore[operator]
        assert found.shape == (8,)
        torch.testing.assert_close(found.mean(), expected(alike, targets.float()))


def test_an_mlp_learns_numbers_of_a_table_and_ranks_by_the_error() -> None:
    folder = run("numbers")
    lines = [json.loads(line) for line in folder.read_bytes("metrics.jsonl").splitlines()]
    errors = [line["mae"] for line in lines if "mae" in line]
    assert errors[-1] < 2.5 < 9 < errors[0]  # the targets are 14 +- 5
    assert from_data({"epochs": 1, "data": TABLE, **FITTING}).ranking == ("mae", False)
    model = load_model(Path(folder.address) / str(latest_checkpoint(folder)) / "model.safetensors").eval()
    assert model(torch.zeros(2, 5)).shape == (2, 1)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"loss": "cross_entropy"},
            "loss: cross_entropy is for classes, and the targets of data table are numbers: for",
        ),
        (
            {"metrics": []},
            "metrics: accuracy is for classes, and the targets .*: for numbers set loss: mse and metrics",
        ),
        ({"loss": "bce", "metrics": []}, "loss: bce is .*; if they are classes, set data.task: classification$"),
    ],
)
def test_what_is_for_classes_is_refused_before_anything_is_trained(changes: Any, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        run("wrong", **changes)


@pytest.mark.parametrize("name", ["cross_entropy", "bce", "accuracy"])
def test_a_model_of_ones_own_is_told_what_is_for_numbers(name: Any) -> None:
    judge: Any = (
        metrics_of([Metric(name=name)], nn.Identity())[name]
        if name == "accuracy"
        else loss_function(Loss(name=name), nn.Identity())
    )
    with pytest.raises(ConfigError, match=r"for numbers set loss: mse and metrics: \[mae\], or name one of your own"):
        judge(nn.Identity(), (torch.randn(8, 1), torch.randn(8)))
    with pytest.raises(
        ConfigError, match=r"^metrics: mae is for numbers: .* the targets are a tensor \(8,\) of int64; for"
    ):
        metrics_of([Metric(name="mae")], nn.Identity())["mae"](nn.Identity(), (torch.randn(8, 3), torch.arange(8)))  # type: ignore[operator]


@pytest.mark.parametrize(
    ("targets", "facts"),
    [
        (np.zeros(6, np.float32), {"num_targets": 1}),
        (np.zeros((6, 3)), {"num_targets": 3}),
        (np.arange(6), {"num_classes": 6}),
        (np.zeros((6, 2, 2)), {}),
        (np.arange(6) - 1, {}),
    ],
)
def test_arrays_say_how_many_numbers_are_foretold(tmp_path: Path, targets: Any, facts: Any) -> None:
    np.savez(tmp_path / "train.npz", x=np.zeros((6, 4), np.float32), y=targets)
    arrays = open_source(ArraysData(root=str(tmp_path), train="train.npz", test=0.5), "train", training=True)
    assert arrays.facts == {"input_shape": [4], **facts}


def checked(data: Any, **keys: Any) -> tuple[list[str], str]:
    content = {"epochs": 1, "data": data, "model": "mlp"} | keys
    Path("run.yaml").write_text(str(content), encoding="utf-8")
    with log_level_kept():
        result = CliRunner().invoke(app, ["-q", "data", "check", "run.yaml"])
    return [" ".join(line.split()) for line in result.stdout.splitlines()], str(result.exception)


def test_data_check_says_whether_the_model_goes_with_the_data() -> None:
    lines, told = checked(TABLE)
    assert any(line.startswith("model loss: cross_entropy is for classes") for line in lines)
    assert told == "run.yaml: all 600 samples can be read, and what is to be trained does not go with them"
    lines, told = checked(TABLE, **FITTING)
    assert lines[-2:] == ["model mlp of 897 parameters", "all 600 samples can be read"]
    np.savez("pairs.npz", x=np.zeros((6, 4), np.float32), y=np.zeros((6, 2, 2)))
    lines, told = checked({"name": "arrays", "root": ".", "train": "pairs.npz", "test": 0.5})
    assert "model model.name: mlp has to know input_shape and num_classes, or num_targets" in " ".join(lines)


def test_new_data_is_read_as_the_page_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = (FRIEDMAN / "friedman.csv").read_text(encoding="utf-8").splitlines()
    (tmp_path / "friedman.csv").write_text("\n".join(rows), encoding="utf-8")
    (tmp_path / "new.csv").write_text("\n".join(rows[:8]), encoding="utf-8")
    folder = run("flats", data=TABLE | {"root": str(tmp_path)}, epochs=1)
    path = Path(folder.address) / str(latest_checkpoint(folder)) / "model.safetensors"
    found = SimpleNamespace(path=folder.address, model=lambda: load_model(path))
    monkeypatch.setattr(raytorch, "find_run", lambda name: found)
    page = (FRIEDMAN.parents[1] / "docs/files.md").read_text(encoding="utf-8")
    [shown] = [block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "find_run" in block]
    names: dict[str, Any] = {}
    exec(shown, names)
    table = open_source(names["config"].data, "train", training=False)
    with torch.no_grad():
        expected = load_model(path).eval()(table.batch(torch.arange(7))[0])
    torch.testing.assert_close(names["outputs"], expected)
    facts = read_architecture(path).facts
    assert facts["feature_means"] == names["rows"].facts["feature_means"]
