"""Metrics of torchmetrics' kind that a run names: a class or a function that makes one, and mistakes about it."""

from collections.abc import Iterator
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from stored_runs import project_with_store, train
from torch import nn

import raytorch
from raytorch.config import RunConfig
from raytorch.config.file import from_data
from raytorch.datasets import Dataset
from raytorch.datasets.in_memory import Moments
from raytorch.distributed import Worker
from raytorch.errors import ConfigError
from raytorch.models.objectives import metrics_of
from raytorch.models.stateful_metrics import StatefulMetric
from raytorch.runs.catalog import read_history
from raytorch.training.evaluation import Evaluator
from raytorch.training.precision import Precision

pytest.importorskip("torchmetrics")

OWN = """
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

class Accuracy(MulticlassAccuracy):
    def update(self, model, batch):
        super().update(model(batch[0]), batch[1])

class Share(MulticlassAccuracy):
    def __init__(self, *, classes: int = 10, average: str = "micro"):
        super().__init__(classes, average=average)

def f1(*, average: str = "macro"):
    return MulticlassF1Score(num_classes=10, average=average)

def several():
    return MetricCollection([MulticlassF1Score(10)])

def each(*, classes: int):
    return MulticlassF1Score(classes, average=None)

def nothing():
    return 3

def of_outputs(outputs):
    return outputs.mean()
"""


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder, with an object store; no Ray."""
    with project_with_store(tmp_path, monkeypatch) as folder:
        yield folder


@pytest.fixture
def own(project: Path) -> None:
    (project / "own.py").write_text(OWN, encoding="utf-8")


def judges(*metrics: Any) -> tuple[RunConfig, dict[str, Any]]:
    config = from_data({"epochs": 1, "metrics": list(metrics)})
    return config, metrics_of(config.judged_by, nn.Identity(), config.code)


@pytest.mark.usefixtures("own")
def test_a_class_or_a_function_of_keywords_makes_one() -> None:
    named = [{"name": "own.py:Accuracy", "num_classes": 10}, "own.py:Share", {"name": "own.py:f1", "average": "micro"}]
    config, made = judges(*named)
    assert [metric.model_dump() for metric in config.metrics] == [
        {"name": "own.py:Accuracy", "better": "higher", "num_classes": 10},
        {"name": "own.py:Share", "better": "higher", "classes": 10, "average": "micro"},
        {"name": "own.py:f1", "better": "higher", "average": "micro"},
    ]
    assert config.metric_names == ("Accuracy", "Share", "f1")
    assert all(isinstance(judge, StatefulMetric) for judge in made.values())


@pytest.mark.usefixtures("own")
@pytest.mark.parametrize(
    ("metric", "message"),
    [
        ({"name": "own.py:f1", "averag": "x"}, "metrics[0].averag: unknown key; allowed: name, better, average (did"),
        ({"name": "own.py:Share", "classes": "x"}, "metrics[0].classes: must be a whole number, not 'x'"),
        ("own.py:each", "metrics[0].classes: missing; must be a whole number"),
        ({"name": "own.py:Accuracy", "averag": "x"}, "metrics.averag: unknown key; allowed: num_classes, top_k, avera"),
        ("own.py:several", "metrics: several makes a MetricCollection, which is no torchmetrics.Metric; let it make"),
        ("own.py:nothing", "metrics: nothing makes a int, which is no torchmetrics.Metric; let it make one, or take "),
        (
            "own.py:of_outputs",
            "metrics[0].name: a metric is called with the model and a batch, and own.py:of_outputs (line 25) does not "
            "take 2 arguments by position; write one that does, or one of keywords alone that makes a torchmetrics",
        ),
    ],
)
def test_mistakes_about_it(metric: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        judges(metric)
    assert str(caught.value).removeprefix("the configuration: ").startswith(message), str(caught.value)


@pytest.mark.usefixtures("own")
def test_the_class_itself_stands_for_it_in_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path.cwd())
    own = import_module("own")
    metrics = [{"name": own.Accuracy, "num_classes": 10}, partial(own.Share, classes=10), own.f1]
    config = raytorch.load(epochs=1, metrics=metrics)
    assert config.metric_names == ("Accuracy", "Share", "f1")
    with pytest.raises(ConfigError, match=r"^metrics\[0\].averag: unknown key; allowed: num_classes, top_k, "):
        raytorch.load(epochs=1, metrics=[{"name": own.Accuracy, "averag": "macro"}])


@pytest.mark.usefixtures("own")
def test_what_is_no_number_and_what_is_no_pair_are_told() -> None:
    _, made = judges({"name": "own.py:each", "classes": 4})
    worker = Worker(0, 1, torch.device("cpu"))
    measuring = Evaluator(made, lambda model, batch: 0.0, Precision.choose("fp32", worker.device), worker)
    digits = Dataset(torch.ones(5, 1, 2, 2, dtype=torch.uint8), torch.arange(5) % 4, Moments((0.0,), (1.0,)))
    with pytest.raises(TypeError, match=r"^each computed a tensor \(4,\); a metric is one number, as with average: ma"):
        measuring.measure(nn.Flatten(), digits)
    with pytest.raises(TypeError, match=r"^each takes outputs and targets, and a batch is no pair .* but dict; give "):
        made["each"].update(nn.Flatten(), {"images": torch.ones(1)})


@pytest.mark.usefixtures("own")
def test_a_run_is_judged_by_it() -> None:
    metrics = ["own.py:Share", {"name": "own.py:Accuracy", "num_classes": 10, "average": "micro"}, "accuracy"]
    folder = train("judged", epochs=2, metrics=metrics)
    lines = [line for line in read_history(folder) if line["split"] == "test"]
    assert len(lines) == 2
    for line in lines:
        assert line["Share"] == line["Accuracy"] == pytest.approx(line["accuracy"], rel=1e-6)
