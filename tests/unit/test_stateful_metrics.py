"""Metrics of torchmetrics' kind: exact for any number of workers, also where some have fewer batches, or none."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from ranks import on_ranks
from torch import Tensor, nn

from raytorch.datasets import Dataset
from raytorch.datasets.in_memory import Moments
from raytorch.distributed import Worker
from raytorch.models.objectives import shipped_loss
from raytorch.models.stateful_metrics import StatefulMetric
from raytorch.training.evaluation import Evaluator
from raytorch.training.precision import Precision

torchmetrics = pytest.importorskip("torchmetrics")
from torchmetrics import classification, regression  # noqa: E402

CLASSES = 4
SIZES = [1, 2, 23, 1025]
"""Samples of a split: of the first two not every worker has one, of the last not every worker has as many batches."""


class Net(nn.Module):
    """Its outputs are the pixels, which do not depend on the batch that they are in."""

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1).softmax(1)


class Sure(torchmetrics.Metric):
    """How sure the model is of the last sample; its list is not to be reduced."""

    def __init__(self) -> None:
        super().__init__()
        self.add_state("seen", [], dist_reduce_fx=None)

    def update(self, model: Any, batch: Any) -> None:
        self.seen.append(model(batch[0]).max(1).values)

    def compute(self) -> Tensor:
        return torch.cat(self.seen)[-1]


class Errors(regression.PearsonCorrCoef):
    """Of the outputs of two classes; its tensors are stacked, and joined when it computes."""

    def update(self, model: Any, batch: Any) -> None:
        outputs = model(batch[0]).double()
        super().update(outputs[:, 0], outputs[:, 1] + batch[1])


class Extremes(torchmetrics.Metric):
    """Tensors of which the largest, the smallest or the mean is taken, where there was a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.add_state("most", torch.tensor(-1.0), dist_reduce_fx="max")
        self.add_state("least", torch.tensor(9.0), dist_reduce_fx="min")
        self.add_state("level", torch.tensor(0.0), dist_reduce_fx="mean")

    def update(self, model: Any, batch: Any) -> None:
        outputs = model(batch[0])
        self.level = torch.tensor(5.0)
        self.most, self.least = torch.max(self.most, outputs.max()), torch.min(self.least, outputs.min())

    def compute(self) -> Tensor:
        return self.most - self.least + self.level


METRICS: dict[str, Callable[[], Any]] = {
    "f1": lambda: classification.MulticlassF1Score(CLASSES, average="macro"),
    "auroc": lambda: classification.MulticlassAUROC(CLASSES, thresholds=None),
    "calibration": lambda: classification.MulticlassCalibrationError(CLASSES),
    "sum": lambda: (
        classification.MulticlassAccuracy(CLASSES, average="micro")
        + 2 * classification.MulticlassRecall(CLASSES, average="macro")
    ),
    "sure": Sure,
    "extremes": Extremes,
    "pearson": Errors,
}
INEXACT = {"pearson": 1e-6, "calibration": 1e-6}
"""Whose own arithmetic depends on how samples are put into batches, and how far."""


def samples(count: int) -> Dataset:
    generator = torch.Generator().manual_seed(count)
    images = torch.randint(0, 256, (count, 1, 2, 2), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, CLASSES, (count,), generator=generator)
    return Dataset(images, labels, Moments((0.5,), (0.25,)))


def evaluator(worker: Worker) -> Evaluator:
    metrics = {name: StatefulMetric(make(), name) for name, make in METRICS.items()}
    return Evaluator(
        {**metrics, "count": lambda model, batch: (len(batch[1]), 1)},
        lambda model, batch: shipped_loss(model, batch, name="cross_entropy"),
        Precision.choose("fp32", worker.device),
        worker,
    )


def whole(make: Callable[[], Any], model: nn.Module, data: Dataset) -> float:
    """The metric of all samples at once, as torchmetrics has it."""
    metric = make()
    metric.distributed_available_fn = lambda: False
    for part in metric.modules():
        part.distributed_available_fn = lambda: False
    images, labels = data.batch(torch.arange(len(data)))
    if isinstance(metric, Sure | Errors | Extremes):
        metric.update(model, (images, labels))
    else:
        metric.update(model(images), labels)
    return float(metric.compute())


def measure_as_one_process(worker: Worker) -> None:
    model, measuring = Net(), evaluator(worker)
    for size in [*SIZES, 23]:  # which is measured anew, without what was seen before
        data = samples(size)
        with torch.no_grad():
            measured = measuring.measure(model.eval(), data)
        assert [*METRICS, "count", "loss"] == list(measured)
        for name, make in METRICS.items():
            if name == "pearson" and size < 3:
                continue
            with torch.no_grad():
                expected = whole(make, model.eval(), data)
            assert measured[name] == pytest.approx(expected, rel=INEXACT.get(name, 0), abs=0), (name, size)


@pytest.mark.filterwarnings("ignore::UserWarning")  # of torchmetrics, that there are few samples
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_workers_measure_as_a_single_process_does_all_samples_at_once(workers: int) -> None:
    on_ranks(measure_as_one_process, workers)


def measure_and_keep_nothing(worker: Worker) -> None:
    kept = StatefulMetric(Sure(), "sure")
    measuring = Evaluator(
        {"sure": kept}, lambda model, batch: batch[1].double(), Precision.choose("fp32", worker.device), worker
    )
    with torch.no_grad():
        measuring.measure(Net().eval(), samples(23))
    assert kept.states() == [None]


def test_no_worker_holds_what_a_metric_has_seen_when_it_is_measured() -> None:
    on_ranks(measure_and_keep_nothing, 2)
