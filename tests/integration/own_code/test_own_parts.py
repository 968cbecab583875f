"""A model and a loss of a user's own, in a project of several files, have all that a shipped run has."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lone_runs import in_place_of_ray
from whole_runs import assert_bitwise_equal, weights

import raytorch
from raytorch.errors import ConfigError, ModelFileError, TrainingError
from raytorch.runs.storage import RunFolder, split
from raytorch.serialization import load_model
from raytorch.sweeps.file import load_sweep
from raytorch.sweeps.sweep import plan_sweep, run_sweep

pytestmark = pytest.mark.usefixtures("local_ray")

LAYERS = '''
"""Layers, in a module that another imports."""
from torch import nn


def hidden(fan_in, fan_out, dropout):
    return [nn.Linear(fan_in, fan_out), nn.ReLU(), nn.Dropout(dropout)]
'''
NET = '''
from math import prod

from torch import nn
from torch.nn import functional as F

from .layers import hidden


class Net(nn.Sequential):
    """As the shipped mlp."""

    def __init__(self, input_shape: tuple[int, ...], num_classes: int, *, width: int = 32, dropout: float = 0.0):
        layers = hidden(prod(input_shape), width, dropout)
        super().__init__(nn.Flatten(), *layers, nn.Linear(width, num_classes))


def loss(model, batch, *, scale: float = 1.0):
    images, labels = batch
    return scale * F.cross_entropy(model(images).float(), labels, reduction="none")


def errors(model, batch):
    images, labels = batch
    return (model(images).argmax(1) != labels).sum(), len(labels)
'''


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project whose package has no ``__init__.py``; the current folder is elsewhere in it."""
    (tmp_path / ".git").mkdir()
    (tmp_path / "nets").mkdir()
    (tmp_path / "nets/net.py").write_text(NET, encoding="utf-8")
    (tmp_path / "nets/layers.py").write_text(LAYERS, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def own(run: dict[str, Any]) -> dict[str, Any]:
    """The run with a model of one's own in place of the shipped one."""
    model = {"name": "nets/net.py:Net", "dropout": run["model"]["dropout"]}
    return run | {"model": model, "loss": "nets/net.py:loss", "scaling": {"workers": 1}, "storage": "runs"}


def folder_of(result: raytorch.Result) -> RunFolder:
    return RunFolder(*split(result.path))


def test_a_model_of_ones_own_trains_as_the_shipped_one(
    project: Path, small_run: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    metrics = [{"name": "nets/net.py:errors", "better": "lower"}, "accuracy"]
    run = own(small_run) | {"export": ["onnx"], "metrics": metrics}
    (project / "run.yaml").write_text(yaml.safe_dump(run), encoding="utf-8")
    mine = raytorch.train("run.yaml", name="mine")
    with in_place_of_ray(project, monkeypatch):
        shipped = raytorch.train(small_run | {"storage": "runs"}, name="shipped", workers=1)
    assert mine.history()[-1].items() >= mine.metrics.items()
    assert mine.test_metrics == mine.metrics
    errors = mine.metrics.pop("errors")
    assert mine.metrics == shipped.metrics
    assert errors == pytest.approx(1 - shipped.metrics["accuracy"], abs=1e-12)
    assert_bitwise_equal(weights(folder_of(mine)), weights(folder_of(shipped)))
    assert [export["format"] for export in mine.summary["exports"]] == ["onnx"]
    assert (project / "runs/mine/code/step-0/nets/layers.py").read_text(encoding="utf-8") == LAYERS

    images = torch.randn(3, 1, 8, 8)
    assert torch.equal(mine.model()(images), shipped.model()(images))
    assert torch.equal(raytorch.find_run("mine").model()(images), shipped.model()(images))
    file = max(Path(mine.path).glob("checkpoint_*")) / "model.safetensors"
    assert torch.equal(load_model(file, code="nets/net.py")(images), shipped.model()(images))
    with pytest.raises(ModelFileError, match=r"is of nets/net.py:Net, a model of your own, and holds no code"):
        load_model(file)

    refuse_changed_code_unless_it_is_allowed(project, mine)


def refuse_changed_code_unless_it_is_allowed(project: Path, first: raytorch.Result) -> None:
    (project / "nets/layers.py").write_text(LAYERS.replace("ReLU", "GELU"), encoding="utf-8")
    more = {"epochs": 4, "export": []}
    with pytest.raises(ConfigError, match=r"was other than it is: nets/layers.py has changed; bring it back, a copy"):
        raytorch.resume(first, set=more)
    with pytest.raises(
        ModelFileError, match=r"by other code than that in .*: nets/layers.py has changed; give that of"
    ):
        raytorch.find_run("mine").model()
    step = first.summary["step"]
    assert load_model(
        max(Path(first.path).glob("checkpoint_*")) / "model.safetensors", code=f"{first.path}/code/step-0"
    )

    second = raytorch.resume(first, set=more, changed_code=True)
    assert second.state == "finished"
    assert "GELU" in (Path(second.path) / f"code/step-{step}/nets/layers.py").read_text(encoding="utf-8")
    assert "ReLU" in (Path(second.path) / "code/step-0/nets/layers.py").read_text(encoding="utf-8")
    manifests = sorted(Path(second.path).glob("checkpoint_*/checkpoint.json"))
    old, new = (json.loads(path.read_text()) for path in (manifests[0], manifests[-1]))
    assert old["code"]["nets/net.py"] == new["code"]["nets/net.py"]
    assert old["code"]["nets/layers.py"] != new["code"]["nets/layers.py"]
    assert isinstance(second.model().get_submodule("2"), torch.nn.GELU)


def test_an_exception_in_own_code_is_told_from_there_on(project: Path, small_run: dict[str, Any]) -> None:
    (project / "nets/layers.py").write_text(LAYERS.replace("nn.ReLU()", "nn.Relu()"), encoding="utf-8")
    with pytest.raises(TrainingError) as caught:
        raytorch.train(own(small_run), name="wrong")
    told = str(caught.value).splitlines()
    assert told[1] == "Traceback (most recent call last):"
    assert told[2] == f'  File "{project}/nets/net.py", line 14, in __init__'
    assert "nn.Relu()" in str(caught.value)
    assert told[-2].startswith("AttributeError: module 'torch.nn' has no attribute 'Relu'")


def test_a_sweep_over_an_argument_of_ones_own(project: Path, small_run: dict[str, Any]) -> None:
    run = own(small_run) | {"epochs": 1}
    parameters = {"model.width": {"grid": [16]}}
    (project / "sweep.yaml").write_text(yaml.safe_dump({"run": run, "parameters": parameters}), encoding="utf-8")
    plan = plan_sweep(load_sweep("sweep.yaml"), "widths")
    results = run_sweep(plan)
    assert [trial["state"] for trial in results["trials"]] == ["finished"]
    best = raytorch.find_run("runs/widths/trial-000").model()
    assert best.get_submodule("1").out_features == 16
