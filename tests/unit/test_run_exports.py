"""A finished training leaves exports, and a script makes more of them. A worker does so in ``test_own_parts.py``."""

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from command_line import raytorch
from lone_runs import in_place_of_ray

from raytorch import onnx
from raytorch.serialization import load_model

JOB = Path(__file__).resolve().parents[2] / "jobs" / "export.py"


def test_a_finished_training_leaves_verified_exports(
    small_run: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = {**small_run, "epochs": 1, "scaling": {"workers": 1}, "export": ["onnx", "safetensors"], "storage": "runs"}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    with in_place_of_ray(tmp_path, monkeypatch):
        trained = raytorch(tmp_path, "train", "run.yaml", "--name", "mine")
    assert trained.returncode == 0, trained
    told = trained.stdout
    run = tmp_path / "runs" / "mine"
    assert "export    runs/mine/export/model.onnx\n" in told
    assert "export    runs/mine/export/model.safetensors\n" in told
    assert sorted(path.name for path in (run / "export").iterdir()) == ["model.onnx", "model.safetensors"]
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    assert [export["format"] for export in summary["exports"]] == ["onnx", "safetensors"]
    assert summary["exports"][0]["relative_error"] < 1e-4
    assert summary["exports"][1]["relative_error"] == 0
    assert summary["seconds"]["exporting"] > 0

    checkpoint = max(run.glob("checkpoint_0*"))
    images = torch.randn(7, 1, 8, 8)
    expected = load_model(checkpoint / "model.safetensors")(images).detach()
    assert torch.equal(load_model(run / "export" / "model.safetensors")(images), expected)
    with onnx.load(run / "export" / "model.onnx") as graph:
        assert (torch.from_numpy(graph.run(images)[0]) - expected).abs().max() < 1e-4 * expected.abs().max()

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(JOB), "runs/mine"])
    capsys.readouterr()
    runpy.run_path(str(JOB), run_name="__main__")
    script = capsys.readouterr().out.splitlines()
    assert script[0].startswith("mine.onnx  logits: largest error ")
    assert script[1].startswith("PyTorch [")
